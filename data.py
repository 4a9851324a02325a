"""D4RL's data, environments and scores (Sec. 6, App. C): a task's file becomes a table
of checked transitions, and policies are rolled out in worker processes. No torch.
"""

import contextlib
import ctypes
import difflib
import functools
import os
import re
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

# Table 1's tasks with their files' bytes and SHA-256 (TensorFlow Datasets' lists)
CHECKSUMS = """\
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
"""  # noqa: E501
LINES = map(str.split, CHECKSUMS.splitlines())
FILES = {task: (int(size), sha256) for task, size, sha256 in LINES}
DEMO = "maze2d-umaze-v1"  # needs no download: remake.py makes its data
TASKS = (*FILES, DEMO)
ANTMAZE = [task for task in FILES if task.startswith("antmaze")]
OTHERS = "(halfcheetah|hopper|walker2d|antmaze)-.+-v2|maze2d-(medium|large)-v1"
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # which stop a training


class UserError(Exception):
    """Bad input; its text says what is wrong and what to do."""


class Dataset(NamedTuple):
    table: np.ndarray  # [N, 2S + A + 2] float32, s | a | r | s_next | terminal
    sizes: tuple  # (S, A)
    info: dict  # where the data came from and what was done to it


def check_task(task):
    """The task, if D4RL has it and we its robot or maze; else UserError."""
    if task in TASKS:
        return task
    others = import_d4rl().infos.DATASET_URLS if re.fullmatch(OTHERS, str(task)) else ()
    if task in others:
        return task
    near = difflib.get_close_matches(str(task), TASKS, 3, 0.3) or TASKS
    raise UserError(f"unknown task {task!r}; did you mean {' or '.join(near)}?")


def data_folder():
    """d4rl's cache: D4RL_DATASET_DIR, else ~/.d4rl/datasets; made if missing."""
    path = os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets"
    try:
        path = Path(path).expanduser()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise UserError(f"cannot make {path}: {error}; set D4RL_DATASET_DIR") from None
    return path


def import_d4rl():
    """d4rl with all our tasks registered; UserError where it can't be imported."""
    os.environ["D4RL_DATASET_DIR"] = str(data_folder())
    try:
        import mujoco210

        return mujoco210.import_d4rl()
    except ImportError as error:
        raise UserError(f"cannot import d4rl: {error}; see requirements.txt") from error


def make_env(task):
    """D4RL's environment of the task."""
    import_d4rl()
    import gym

    return gym.make(check_task(task))


the_env = functools.cache(make_env)  # once: each of AntMaze's leaves a file open


def space_sizes(task):
    """(S, A), the sizes of the task's states and actions."""
    env = the_env(task)
    return env.observation_space.shape[0], env.action_space.shape[0]


def seed_env(env, seed):
    """Seed all that an environment draws from."""
    # AntMaze's wrapper doesn't pass a seed on, and its goal is drawn by np.random
    getattr(env.unwrapped, "_wrapped_env", env).seed(seed)
    env.action_space.seed(seed)
    np.random.seed(seed)


def normalized_score(task, returns):
    """D4RL's score, 100 (R - min) / (max - min), like returns."""
    infos = import_d4rl().infos
    low, high = infos.REF_MIN_SCORE[task], infos.REF_MAX_SCORE[task]
    return 100 * (np.asarray(returns, np.float64) - low) / (high - low)


def path_of(task):
    """Where d4rl looks for the task's file."""
    url = import_d4rl().infos.DATASET_URLS[check_task(task)]
    return data_folder() / os.path.basename(url)


def stand_in_path(task):
    """Where remake.py's data is: apart from D4RL's, or others would train on it."""
    return data_folder() / "stand-in" / path_of(task).name


def data_file(task):
    """The path of D4RL's file, or of its stand-in where that alone is there."""
    theirs, stand_in = path_of(task), stand_in_path(task)
    return stand_in if stand_in.exists() and not theirs.exists() else theirs


def download(task, path, log):
    """From d4rl's server or the mirror; with a wrong SHA-256 no file is left."""
    import pooch
    import requests

    pooch.get_logger().setLevel("ERROR")
    (size, sha256), failures = FILES.get(task, ("unknown", None)), []
    for url in (import_d4rl().infos.DATASET_URLS[task], MIRROR + path.name):
        log(f"downloading {url} ({size} bytes, SHA-256 {sha256 or 'unknown'})")
        http = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=2**16)
        try:
            pooch.retrieve(url, sha256, path.name, path.parent, downloader=http)
            return
        except requests.RequestException as error:
            status = getattr(error.response, "status_code", type(error).__name__)
            failures.append(f"{status}")
        except ValueError:
            failures.append("wrong SHA-256")
    raise UserError(
        f"cannot be downloaded (d4rl's server: {failures[0]}, mirror: {failures[1]}); "
        f"put it there by hand ({size} bytes, SHA-256 {sha256 or 'unknown'}), "
        f"or for some tasks make a stand-in: python remake.py {task}"
    )


def load(task, any_data=False, log=print):
    """The task's Dataset; UserError if its file is missing, unfit, or neither D4RL's
    nor marked as a stand-in (unless any_data).
    """
    import h5py
    import pooch

    path, sha256 = data_file(task), ""
    known_size, known_sha256 = FILES.get(task, ("unknown", None))
    try:
        if not path.exists():
            if task == DEMO:
                raise UserError(f"is missing; to make one: python remake.py {DEMO}")
            download(task, path, log)
        sha256 = pooch.file_hash(str(path))
        with h5py.File(path, locking=False) as file, np.errstate(all="ignore"):
            kind = kind_of(task, sha256, file.attrs, any_data)
            dataset = transitions(read_arrays(file, task), task, kind == "D4RL")
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    except Exception as error:  # h5py has many for damaged files
        hint = f"D4RL's has {known_size} bytes"
        if sha256 == known_sha256:
            hint = "its SHA-256 is D4RL's, so it is intact"
        reason = f"cannot be read ({type(error).__name__}: {error}); {hint}"
        raise UserError(f"{path} {reason}") from None
    info = {"task": task, "file": path.name, "sha256": sha256, "kind": kind}
    info |= dataset.info
    place = "" if kind == "D4RL" else f" ({path})"
    told = "{rows} rows of {episodes} trajectories, score {data_score:.1f}, "
    told += "rewards times {reward_scale:.4g}"
    for line in (f"{kind} data{place}, {told.format(**info)}", *info["odd"]):
        log(f"{task}: {line}")
    return dataset._replace(info=info)


def kind_of(task, sha256, attributes, any_data):
    """What a file is by its hash and attributes; UserError where it may not be used."""
    owners = {known: name for name, (_, known) in FILES.items()}
    owner = owners.get(sha256) or attributes.get("task", task)
    if owner != task:
        raise UserError(f"is data of {owner}; move it to where that task's belongs")
    if sha256 in owners:
        return "D4RL"
    if "stand_in" in attributes:
        return "stand-in"
    if task not in FILES:
        return "unverified"  # no hash of D4RL's file is known
    if any_data:
        return "any"
    raise UserError(f"is not D4RL's (SHA-256 {sha256}); to use it: --any-data")


def read_arrays(file, task):
    """{key: HDF5 dataset} of what is used; UserError if missing or of wrong shape."""
    s_dim, a_dim = space_sizes(task)
    widths = {"observations": s_dim, "actions": a_dim, "rewards": 1, "terminals": 1}
    widths["timeouts"] = 1
    if "next_observations" in file:
        widths["next_observations"] = s_dim
    for key, width in widths.items():
        if not hasattr(file.get(key), "shape"):
            raise UserError(f"has no {key}, but {', '.join(file)}")
        rows, shape = len(file["observations"]), file[key].shape
        if shape != (rows, width) and (width > 1 or shape != (rows,)):
            raise UserError(f"has {key} of shape {shape}, not {rows} rows of {width}")
    return {key: file[key] for key in widths}


def transitions(raw, task, verified=False):
    """The Dataset of a file's arrays; verified: they are D4RL's own and not doubted.

    Rows are those of d4rl.qlearning_dataset: none at a time limit or the file's end,
    where the next row isn't s_next. Rewards are r * 1000 / (largest - smallest return)
    as in IQL; in AntMaze r - 1, in maze2d r.
    """
    s_dim, a_dim = space_sizes(task)
    rewards = raw["rewards"][:].reshape(-1).astype(np.float32)
    terminals, timeouts = (raw[k][:].reshape(-1) for k in ("terminals", "timeouts"))
    if not (np.isin(terminals, (0, 1)) & np.isin(timeouts, (0, 1))).all():
        raise UserError("has terminals or timeouts other than 0 and 1")
    terminals, timeouts = terminals == 1, timeouts == 1
    rows = np.flatnonzero(~timeouts[:-1])

    table = np.empty((len(rows), 2 * s_dim + a_dim + 2), np.float32)
    s, a, r, s_next, terminal = np.split(table, np.cumsum((s_dim, a_dim, 1, s_dim)), 1)
    r[:, 0], terminal[:, 0] = rewards[rows], terminals[rows]
    jumps = np.zeros(len(rows), bool)  # where s_next isn't the next row's s
    filled = [(a, "actions", 0), (s, "observations", 0), (s_next, "observations", 1)]
    if "next_observations" in raw:
        filled.append((s_next, "next_observations", 0))
    for part, key, shift in filled:
        # by columns: all at once would make a second copy
        for column, values in zip(part.T, raw[key][:][shift:].T):
            if key == "next_observations":
                jumps |= np.abs(column - values[rows]) > 1e-5
            column[:] = values[rows]
        del values  # and so the whole array, before the next is read

    ends = terminals | timeouts  # of a trajectory
    if task.startswith("antmaze"):
        # these files go on at the goal: only a jump by a meter is a reset
        steps = np.abs(np.diff(raw["observations"][:, :2], axis=0)).max(axis=1)
        ends[:-1] &= timeouts[:-1] | (steps >= 1)
    jumps &= ~terminals[rows]
    ends[rows[jumps]] = True
    if not len(rows) or not ends.any():
        raise UserError("has no whole trajectory: are all ends flagged?")
    if not np.isfinite([table.min(), table.max(), rewards.sum()]).all():
        raise UserError("has NaN or infinite values")
    if not verified:
        check_plausible(task, s, rows, rewards, terminals & ~timeouts, ends)

    outside = np.count_nonzero(np.abs(a) > 1)
    np.clip(a, -1, 1, out=a)
    longest = trajectory_sums(np.ones(len(ends)), ends).max()
    episodes, scale = np.count_nonzero(ends), 1.0
    returns = trajectory_sums(rewards, ends)[:episodes]
    if task.startswith("antmaze"):
        if set(np.unique(rewards)) != {0, 1}:
            raise UserError("needs AntMaze's rewards of 0 and, at the goal, 1")
        returns = returns > 0  # of the goal, where the file may go on
        r -= 1
    elif task.startswith("maze2d"):
        # its trajectories go elsewhere: stretches as long as an evaluation's episode
        length = min(the_env(task).spec.max_episode_steps, len(rewards))
        stretches = rewards[: len(rewards) // length * length].reshape(-1, length)
        returns = stretches.sum(axis=1)
    else:
        scale = iql_scale(rewards, ends, rows)
        r *= scale
    score = float(normalized_score(task, returns).mean())
    odd = {
        f"{jumps.sum()} next_observations aren't the next row's": jumps.any(),
        f"{outside} action components are clipped to [-1, 1]": outside,
        f"{longest:.0f} rows in a trajectory: are its ends flagged?": longest > 1100,
        f"score {score:.0f}: are the rewards scaled?": not -50 < score < 250,
    }
    info = {"rows": len(rows), "episodes": episodes, "data_score": score}
    info |= {"reward_scale": scale, "largest_reward": float(np.abs(r).max())}
    info["odd"] = [line for line, found in odd.items() if found]
    return Dataset(table, (s_dim, a_dim), info)


def trajectory_sums(values, ends):
    """Sums of values [rows] over trajectories, the last one whole or not."""
    starts = np.append(0, np.flatnonzero(ends[:-1]) + 1)
    return np.add.reduceat(values, starts, dtype=np.float64)


def iql_scale(rewards, ends, rows):
    """IQL's factor of the rewards, from trajectories' returns over the used rows."""
    used = np.zeros(len(rewards))
    used[rows] = 1
    returns = trajectory_sums(rewards * used, ends)[trajectory_sums(used, ends) > 0]
    if np.ptp(returns) < 1e-6:
        raise UserError("has trajectories of equal return only, which scales no reward")
    return float(1000 / np.ptp(returns))


def check_plausible(task, s, rows, rewards, terminals, ends):
    """UserError for data that cannot be the task's; s: [N, S], the states of `rows`."""
    robot, env, stops = task.split("-")[0], the_env(task), np.flatnonzero(ends)
    lengths = np.diff(stops, prepend=-1)
    untimely = {  # where the environment doesn't end by itself
        "halfcheetah": terminals,
        "maze2d": terminals,
        "antmaze": terminals & (rewards == 0),
    }.get(robot, terminals[stops] & (lengths == 1000))
    starts = np.searchsorted(rows, np.append(0, stops + 1))
    states, dims, in_walls = s[starts[starts < len(rows)]], slice(None), [False]
    places = s[:: len(s) // 300 + 1, :2]
    if robot == "maze2d":  # one episode without end, begun anywhere
        dims, free = slice(0), {*map(tuple, env.unwrapped.empty_and_goal_locations)}
        in_walls = [tuple(cell) not in free for cell in np.rint(places)]
    if robot == "antmaze":  # episodes that may begin anywhere in the maze
        dims = slice(2, None)
        in_walls = [*map(env.unwrapped._wrapped_env._is_in_collision, places)]
    numbers = np.random.get_state()
    seed_env(env, 0)
    resets = np.array([env.reset() for _ in range(100)])[:, dims]
    np.random.set_state(numbers)  # as the caller had it
    distance = np.abs(states[:, dims] - resets.mean(axis=0))
    near = (distance <= 0.7 * np.ptp(resets, axis=0)).all(axis=1)
    faults = {  # of most trajectories, as files may have some wrong cuts
        f"terminals where {robot} goes on": untimely.sum() > len(stops) // 200,
        "trajectories of one or two rows": np.median(lengths) <= 2,
        "positions inside walls": np.mean(in_walls) > 0.01,
        "states unlike those after resets": near.mean() < 0.5,
    }
    if found := [fault for fault, is_so in faults.items() if is_so]:
        cure = "needed are the task's own states, in order, and time limits as timeouts"
        raise UserError(f"has {' and '.join(found)}; {cure}")


class NumpyPolicy:
    """A ReLU network with tanh at its end; layers: (weight [out, in], bias [out]), …"""

    def __init__(self, layers):
        self.layers = [*layers]

    def output(self, obs):
        *layers, (weight, bias) = self.layers
        hidden = np.float32(obs)
        for hidden_weight, hidden_bias in layers:
            hidden = np.maximum(hidden_weight @ hidden + hidden_bias, 0)
        return weight @ hidden + bias

    def __call__(self, obs, rng):
        return np.tanh(self.output(obs)).astype(np.float64)


def random_policy(a_dim, obs, rng):
    return rng.uniform(-1, 1, a_dim)


def run_episode(task, seed, policy, episode):
    """The episode's return, a function of (seed, episode) and the policy; and whether
    it ended by itself, or MuJoCo gave up (on NaN, or a broken simulation).
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
    """Workers ignore what stops a training, and end with their parent."""
    import mujoco210  # noqa: F401  now, whatever is edited later

    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # Linux's PR_SET_PDEATHSIG
    if os.getppid() != parent:  # which has ended before
        os._exit(1)


class Workers(contextlib.AbstractContextManager):
    """Processes of one thread; by default one for each core that we may use."""

    def __init__(self, count=None):
        import loky

        alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        how = {"initializer": start_worker, "initargs": (os.getpid(),), "env": alone}
        try:
            self.pool = loky.ProcessPoolExecutor(count or loky.cpu_count(), **how)
            self.pool.submit(os.getpid).result()  # all start now
        except OSError as error:
            raise UserError(f"cannot start workers ({error}): /dev/shm?") from None

    def roll_out(self, task, policies, episodes):
        """Futures of the first episodes of each (seed, policy(obs, rng) → action)."""
        submit = functools.partial(self.pool.submit, run_episode, task)
        return [[submit(*policy, i) for i in range(episodes)] for policy in policies]

    def __exit__(self, *error):
        self.pool.shutdown(kill_workers=True)  # busy or not


def returns_of(evaluation):
    """Returns [policies, episodes] of a `Workers.roll_out`, and how many broke off."""
    pairs = np.array([[future.result() for future in row] for row in evaluation])
    return pairs[..., 0], int((pairs[..., 1] == 0).sum())
