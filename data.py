"""D4RL's data, environments and scores (Sec. 6, App. C): a task's file becomes one packed table of checked
transitions, and policies are rolled out in worker processes. No torch; the rest where needed.
"""

import contextlib
import difflib
import functools
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Table 1's tasks, each with its file's bytes and SHA-256 (TensorFlow Datasets' checksum lists).
CHECKSUMS = """
halfcheetah-medium-v2 237727262 41324e8487a9556d8cfa4538827f8937f4d63dae3030825ebc9f3a726ed08ca0
halfcheetah-medium-replay-v2 59448533 48d494a4770c11f48260736dec090b78bdca8375647ed4d24bfa5b6610c7f683
halfcheetah-medium-expert-v2 474567252 015db75dae5bbe8e94029b71fa0bafc2073365df0c94744e71031189f3f79c06
hopper-medium-v2 152756557 5bdf1bc4a713c82941de44633df669b36c89850b652a25985166796d25cf71a0
hopper-medium-replay-v2 75854457 e121c5f7c9857a307baa9edc6a2c3b48e85fedb9ac316ecddd0f48ca7ef4e39b
hopper-medium-expert-v2 304537315 9d51ad87f8c905be3880d84c6140bcdb7fbf39a19e046a237f238ba34fec9e26
walker2d-medium-v2 232254996 cf00f43add04c17fdfc2958dd581dea0851b2e5bedbe6fda073758a8f841aeda
walker2d-medium-replay-v2 86323963 e75de96a4f77acf7d4e0d6fdf0d7ccb177c26c44bb4388e4fd99f543ccfa18db
walker2d-medium-expert-v2 462197079 6b8d7f868c45bbaedf460be797fb7271b46dee6ebe45fe7a64319f2005b59a04
antmaze-umaze-v2 232532949 5ef15257771c50ef4d23c7de001750e96c8bb5d9b6a5e4a821dcfb3065fbd130
antmaze-umaze-diverse-v2 230854272 c771dd63963cd7d9f55f24a6d809064f6b82250a6aeac4c9d13f9a1d06e8c932
antmaze-medium-play-v2 231110764 c9fec1c1daad97c71d61bd47f4ccc9f74faa855b8a2d2e8107d5378018827e5b
antmaze-medium-diverse-v2 231095166 ad9dcbac05d1f8744a7a216083f513662f43f64f28a4a5eb225e9811902dfae7
antmaze-large-play-v2 230880653 6d353df2457829925d7f9d4b0215587469908bd57478ea76f16417cfa944f471
antmaze-large-diverse-v2 231183710 84f775eb7956ea9cc766704710dc520a8ab357adc7522ade47f556f0e335e284
"""
FILES = {
    task: (int(size), sha256)
    for task, size, sha256 in map(str.split, CHECKSUMS.strip().splitlines())
}
DEMO = "maze2d-umaze-v1"  # needs no download: remake.py makes its data
TASKS = (*FILES, DEMO)
ANTMAZE = [task for task in FILES if task.startswith("antmaze")]
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"
SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
)  # stop a training, which saves first


class UserError(Exception):
    """Bad input; its text says what is wrong and what to do."""


class Dataset(NamedTuple):
    table: np.ndarray  # [N, 2S + A + 2] float32, s | a | r | s_next | terminal
    sizes: tuple  # (S, A)
    info: dict  # where the data came from and what was done to it


def check_task(task):
    """The task, or UserError with the nearest names."""
    if task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, 3, 0.3) or TASKS
        raise UserError(
            f"unknown task {str(task)[:80]!r}; did you mean {' or '.join(near)}?"
        )
    return task


def folder():
    """d4rl's cache: D4RL_DATASET_DIR, else ~/.d4rl/datasets; made if missing."""
    path = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    try:
        path = Path(path).expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise UserError(
            f"cannot make {path} ({error}); name another in D4RL_DATASET_DIR"
        ) from None
    return path


def import_d4rl():
    """d4rl with all our tasks registered, and without its messages."""
    os.environ.setdefault("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    os.environ["D4RL_DATASET_DIR"] = str(folder())
    try:
        import mujoco210

        mujoco210.install()
        import d4rl
        import d4rl.gym_mujoco  # d4rl's own import stops before these two
        import d4rl.pointmaze
        import gym
    except ImportError as error:
        raise UserError(
            f"cannot import d4rl ({error}); see requirements.txt"
        ) from error
    gym.logger.set_level(gym.logger.ERROR)
    d4rl.locomotion.maze_env.print = lambda *args: None  # "Target Goal" at every reset
    return d4rl


def make_env(task):
    """D4RL's environment of the task."""
    import_d4rl()
    import gym

    return gym.make(check_task(task))


the_env = functools.cache(make_env)  # once: each of AntMaze's leaves a file open


def sizes(task):
    """(S, A) of the task's states and actions."""
    env = the_env(task)
    return env.observation_space.shape[0], env.action_space.shape[0]


def seed_env(env, seed):
    """Seed all that an environment draws from: AntMaze draws its goal from numpy's generator."""
    getattr(env.unwrapped, "_wrapped_env", env).seed(
        seed
    )  # AntMaze's wrapper doesn't pass a seed on
    env.action_space.seed(seed)
    np.random.seed(seed)


def normalized_score(task, returns):
    """D4RL's score, 100 (R - min) / (max - min)."""
    infos = import_d4rl().infos
    low, high = infos.REF_MIN_SCORE[task], infos.REF_MAX_SCORE[task]
    return 100 * (np.asarray(returns, np.float64) - low) / (high - low)


def path_of(task):
    """Where d4rl looks for the task's file."""
    return folder() / os.path.basename(
        import_d4rl().infos.DATASET_URLS[check_task(task)]
    )


def download(task, path, log):
    """From d4rl's server or the mirror; pooch keeps a file only if its hash is right."""
    import pooch
    import requests

    pooch.get_logger().setLevel("ERROR")
    (size, sha256), failures = FILES[task], []
    for url in (import_d4rl().infos.DATASET_URLS[task], MIRROR + path.name):
        log(f"downloading {url} ({size / 1e6:.0f} MB)")
        fetch = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=2**16)
        try:
            pooch.retrieve(
                url,
                f"sha256:{sha256}",
                fname=path.name,
                path=path.parent,
                downloader=fetch,
            )
            return
        except requests.RequestException as error:
            failures.append(
                str(getattr(error.response, "status_code", type(error).__name__))
            )
        except ValueError:
            failures.append("wrong SHA-256")
    raise UserError(
        f"cannot be downloaded (d4rl's server: {failures[0]}, mirror: {failures[1]}); put it there by hand "
        f"({size} bytes, SHA-256 {sha256}), or for some tasks make a stand-in: python remake.py {task}"
    )


def load(task, any_data=False, log=print):
    """The task's Dataset, from d4rl's cache or its server; UserError if the file is missing or unfit.

    Rewards: r * 1000 / (largest - smallest trajectory return) as in IQL; AntMaze: r - 1; maze2d: r. A file
    that isn't D4RL's must have the attribute stand_in, or any_data be true.
    """
    import h5py
    import pooch

    path, found, kind = path_of(task), "", ""
    size, sha256 = FILES.get(task, (None, None))
    with contextlib.suppress(ImportError):
        import hdf5plugin  # noqa: F401  more filters, if it is there
    try:
        if not path.exists():
            if task == DEMO:
                raise UserError(f"does not exist; to make it: python remake.py {DEMO}")
            download(task, path, log)
        found = pooch.file_hash(str(path))
        with h5py.File(path, locking=False) as file, np.errstate(all="ignore"):
            kind = (
                "D4RL"
                if found == sha256
                else "stand-in"
                if "stand_in" in file.attrs
                else "any"
            )
            if kind == "any" and not any_data:
                raise UserError(
                    f"is not D4RL's (SHA-256 {found}); to use it all the same: --any-data"
                )
            dataset = prepare(arrays(file, task), task)
    except UserError as error:
        reason = error
    except MemoryError:
        reason = "does not fit into memory"
    except Exception as error:  # h5py has many for damaged files
        reason = f"cannot be read ({type(error).__name__}: {error}); "
        if getattr(error, "errno", None):
            reason += "the file itself may be intact"
        elif found == sha256:
            reason += "its SHA-256 is D4RL's, so it is intact: is h5py that of requirements.txt?"
        elif sha256 and kind != "stand-in" and not any_data:
            bytes_here, place = path.stat().st_size, shlex.quote(str(path))
            reason += f"it has {bytes_here} bytes, D4RL's {size}; if a download was broken off: rm {place}"
    else:
        info = {
            "task": task,
            "file": path.name,
            "sha256": found,
            "kind": kind,
            **dataset.info,
        }
        told = f"{kind} data, {info['rows']} rows of {info['episodes']} trajectories"
        log(
            f"{task}: {told}, score {info['data_score']:.1f}, rewards times {info['reward_scale']:.4g}"
        )
        for line in info["odd"]:
            log(f"{task}: {line}")
        return dataset._replace(info=info)
    raise UserError(f"{path} {reason}")


def arrays(file, task):
    """The file's datasets; UserError where one that d4rl uses is missing or unfit."""
    import h5py

    s_dim, a_dim = sizes(task)
    widths = {
        "observations": s_dim,
        "actions": a_dim,
        "rewards": 1,
        "terminals": 1,
        "timeouts": 1,
    }
    other_names = {
        "terminals": "terminations",
        "timeouts": "truncations",
    }  # Gymnasium's
    found = {}
    for key, width in (widths | {"next_observations": s_dim}).items():
        name = key if key in file else other_names.get(key, key)
        if name not in file and key == "next_observations":
            continue
        if not isinstance(file.get(name), h5py.Dataset):
            raise UserError(
                f"has no {' or '.join(dict.fromkeys((key, name)))}, but {', '.join(file)}"
            )
        found[key] = item = file[name]
        rows = len(found["observations"])
        if item.shape not in ((rows, width), (rows,) if width == 1 else None):
            raise UserError(
                f"has {name} of shape {item.shape}; {rows} rows of {width} are needed"
            )
        filters = item.id.get_create_plist()
        for code, _, _, title in map(filters.get_filter, range(filters.get_nfilters())):
            if not h5py.h5z.filter_avail(code):
                title = title.decode(errors="replace")
                raise UserError(
                    f"needs the HDF5 filter {title} ({code}): pip install hdf5plugin"
                )
    return found


def gather(out, values, rows):
    """out[:] = values[rows], by columns: all at once would make a second copy."""
    for column, value in zip(out.T, values.T):
        column[:] = value[rows]


def segment_returns(rewards, ends):
    """Sums over the stretches of rows that end where told, without what follows."""
    stops = np.flatnonzero(ends) + 1
    return np.add.reduceat(
        rewards[: stops[-1]], np.append(0, stops[:-1]), dtype=np.float64
    )


def prepare(raw, task):
    """The Dataset of a file's arrays; its info lists what is odd in it."""
    (s_dim, a_dim), odd = sizes(task), []
    rewards = raw["rewards"][:].reshape(-1).astype(np.float32)
    for key in ("terminals", "timeouts"):
        if not np.isin(raw[key], (0, 1)).all():
            raise UserError(f"has {key} other than 0 and 1")
    terminals, timeouts = (
        raw[key][:].reshape(-1) == 1 for key in ("terminals", "timeouts")
    )
    rows = np.flatnonzero(
        ~timeouts[:-1]
    )  # as d4rl.qlearning_dataset: none at a time limit or the end
    table = np.empty((len(rows), 2 * s_dim + a_dim + 2), np.float32)
    s, a, r, s_next, terminal = np.split(
        table, np.cumsum((s_dim, a_dim, 1, s_dim)), axis=1
    )  # views
    r, terminal = r[:, 0], terminal[:, 0]
    r[:], terminal[:] = rewards[rows], terminals[rows]
    gather(a, raw["actions"][:], rows)
    observations = raw["observations"][:]
    gather(s, observations, rows)
    gather(s_next, observations[1:], rows)
    ends = terminals | timeouts  # of a trajectory, by rows of the file
    cuts = (terminal == 1) | (
        np.diff(rows, append=-1) != 1
    )  # the same by rows of the table
    if (
        task in ANTMAZE
    ):  # whose files go on at the goal: only a jump by a meter is a reset
        ends[:-1] &= timeouts[:-1] | (
            np.abs(np.diff(observations[:, :2], axis=0)).max(axis=1) >= 1
        )
    del observations
    if "next_observations" in raw:  # other than the next row's: an end without a flag
        jumps = np.zeros(len(rows), bool)
        for column, value in zip(s_next.T, raw["next_observations"][:].T):
            jumps |= np.abs(column - value[rows]) > 1e-5
            column[:] = value[rows]
        jumps &= terminal == 0
        ends[rows[jumps]], cuts[jumps] = True, True
        if count := np.count_nonzero(jumps):
            odd.append(
                f"{count} next_observations are not the next row's: used, and a trajectory ends there"
            )
    for name, values in (
        ("observations", s),
        ("observations", s_next),
        ("actions", a),
        ("rewards", rewards),
    ):
        if not np.isfinite(values).all():
            raise UserError(f"has NaN or infinite {name}")
    if not cuts.any() or not ends.any():
        raise UserError("has no whole trajectory")
    if count := np.count_nonzero(np.abs(a) > 1):
        np.clip(a, -1, 1, out=a)
        odd.append(f"{count} action components were outside [-1, 1] and are clipped")
    stops = np.flatnonzero(ends)
    lengths = np.diff(stops, prepend=-1)
    if count := np.count_nonzero(
        np.append(lengths, len(rewards) - 1 - stops[-1]) > 1000
    ):
        odd.append(
            f"{count} trajectories are longer than D4RL's 1000 steps: are ends not flagged?"
        )
    returns, weights, scale = (
        segment_returns(rewards, ends),
        lengths,
        1.0,
    )  # the mean is over rows
    if task in ANTMAZE:
        if set(np.unique(rewards)) != {0, 1}:
            raise UserError("needs AntMaze's rewards of 0 and, at the goal, 1")
        returns, weights = returns > 0, None
        r -= 1
    elif (
        task == DEMO
    ):  # its trajectories chase other goals: score windows as long as an evaluation episode
        limit = min(the_env(task).spec.max_episode_steps, len(rewards))
        windows = np.arange(1, len(rewards) + 1) % limit == 0
        returns, weights = segment_returns(rewards, windows), None
    else:  # IQL's normalization; it cuts where s_next is not the next row's s
        spread = np.ptp(segment_returns(r, cuts))
        if spread < 1e-6:
            raise UserError(
                "has trajectories of equal return only, which scales no reward"
            )
        scale = float(1000 / spread)
        r *= scale
    score = float(np.average(normalized_score(task, returns), weights=weights))
    if not -50 < score < 250:
        odd.append(
            f"a mean score of {score:.0f}: are the rewards the task's own, not scaled?"
        )
    info = {
        "rows": len(rows),
        "episodes": len(stops),
        "data_score": score,
        "reward_scale": scale,
    }
    return Dataset(
        table,
        (s_dim, a_dim),
        info | {"largest_reward": float(np.abs(r).max()), "odd": odd},
    )


class NumpyPolicy:
    """A ReLU network with tanh at its end. Any picklable function policy(obs, rng) → action is a policy.

    layers: float32 (weight [out, in], bias [out]), the input's first.
    """

    def __init__(self, layers):
        self.layers = [*layers]

    def output(self, obs):
        hidden = np.float32(obs)
        for weight, bias in self.layers[:-1]:
            hidden = np.maximum(weight @ hidden + bias, 0)
        weight, bias = self.layers[-1]
        return weight @ hidden + bias

    def __call__(self, obs, rng):
        return np.tanh(self.output(obs)).astype(np.float64)


def random_policy(a_dim, obs, rng):
    return rng.uniform(-1, 1, a_dim)


def run_episode(task, seed, policy, episode):
    """The episode's return, a function of (seed, episode) and the policy, and whether it ended by itself.

    It also ends where MuJoCo gives up on it (a policy with NaN, or one that breaks the simulation).
    """
    env, source = the_env(task), np.random.SeedSequence((seed, episode))
    from mujoco_py import MujocoException

    seed_env(env, int(source.generate_state(1)[0]))
    rng = np.random.default_rng(source.spawn(1)[0])
    obs, total, done = env.reset(), 0.0, False
    while not done:
        try:
            obs, reward, done, _ = env.step(np.asarray(policy(obs, rng), np.float64))
        except MujocoException:
            return total, False
        total += float(reward)
    return total, True


def start_worker(parent):
    """Workers ignore what stops a training, end with their parent, and have loaded our modules."""
    import mujoco210  # noqa: F401  now, whatever is edited later

    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Workers(contextlib.AbstractContextManager):
    """Processes of one thread; by default one for each core that this process may use."""

    def __init__(self, count=None):
        import loky

        alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        try:
            self.pool = loky.ProcessPoolExecutor(
                count or loky.cpu_count(),
                initializer=start_worker,
                initargs=(os.getpid(),),
                env=alone,
            )
            self.pool.submit(os.getpid).result()  # all start now
        except OSError as error:
            raise UserError(
                f"cannot start workers ({error}): too many? /dev/shm not writable?"
            ) from None

    def roll_out(self, task, policies, episodes):
        """Futures of the first `episodes` episodes of each (seed, policy)."""
        submit = functools.partial(self.pool.submit, run_episode, task)
        return [
            [submit(seed, policy, i) for i in range(episodes)]
            for seed, policy in policies
        ]

    def __exit__(self, *error):
        """End the workers, busy or not."""
        self.pool.shutdown(kill_workers=True)


def results(evaluation):
    """Returns [policies, episodes] of what `Workers.roll_out` started, and how many MuJoCo gave up on."""
    pairs = np.array(
        [[future.result() for future in row] for row in evaluation]
    )  # [policies, episodes, 2]
    return pairs[..., 0], int((pairs[..., 1] == 0).sum())
