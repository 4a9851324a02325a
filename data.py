"""D4RL's data, environments and scores (Sec. 6, App. C): a task's file becomes one packed table of checked
transitions, and policies are rolled out in worker processes. No torch here, and the rest only where needed.
"""
import contextlib
import difflib
import functools
import multiprocessing
import os
import shlex
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

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
FILES = {task: (int(size), sha256) for task, size, sha256 in map(str.split, CHECKSUMS.strip().splitlines())}
DEMO = "maze2d-umaze-v1"  # needs no download: its data is generated
TASKS = (*FILES, DEMO)
ANTMAZE = [task for task in FILES if task.startswith("antmaze")]
MIRROR = "https://huggingface.co/datasets/imone/D4RL/resolve/main/"
SIZES = {"halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6), "antmaze": (29, 8), "maze2d": (4, 2)}
BLOCK = 2**14  # rows packed at a time
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1  # the main process's; some reach all of a job


class UserError(Exception):
    """Bad input that a user can cause; its text is one line that says what is wrong and what to do."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))


class Dataset(NamedTuple):
    table: np.ndarray  # [N, 2S + A + 2] float32, s | a | s_next | r | terminal
    s_dim: int
    a_dim: int
    info: dict  # where the data came from and what was done to it


def check_task(task):
    """The task itself; raises UserError, which offers the nearest names, if it is none."""
    if task not in TASKS:
        near = difflib.get_close_matches(str(task), TASKS, 3, 0.3) or TASKS
        raise UserError(f"unknown task {str(task)[:80]!r}; did you mean {' or '.join(near)}?")
    return task


def import_d4rl():
    """d4rl with all our tasks registered, and without its messages."""
    os.environ.setdefault("D4RL_SUPPRESS_IMPORT_ERROR", "1")
    if not os.environ.get("D4RL_DATASET_DIR"):
        os.environ.pop("D4RL_DATASET_DIR", None)  # d4rl would take an empty one for a folder
    try:
        import mujoco210
        mujoco210.install()
        import d4rl
        import d4rl.gym_mujoco  # d4rl's own import ends before these two, at a missing package
        import d4rl.pointmaze
        import gym
    except (ImportError, OSError) as error:  # OSError: it makes its cache folder
        raise UserError(f"cannot import d4rl ({error}); see requirements.txt, D4RL_DATASET_DIR") from error
    gym.logger.set_level(gym.logger.ERROR)
    d4rl.locomotion.maze_env.print = lambda *args: None  # "Target Goal" at every reset
    return d4rl


def make_env(task):
    """The environment that D4RL registers for the task."""
    import_d4rl()
    import gym
    return gym.make(check_task(task))


def step_limit(task):
    """The steps of an episode."""
    import gym
    return gym.spec(task).max_episode_steps


def seed_env(env, seed):
    """Seed all that an environment draws from; AntMaze draws its goal from numpy's global generator."""
    getattr(env.unwrapped, "_wrapped_env", env).seed(seed)  # AntMaze's wrapper would keep the seed to itself
    env.action_space.seed(seed)
    np.random.seed(seed)


def normalized_score(task, returns):
    """D4RL's score, 100 (R - min) / (max - min), with d4rl's reference returns."""
    infos = import_d4rl().infos
    low, high = infos.REF_MIN_SCORE[task], infos.REF_MAX_SCORE[task]
    return 100 * (np.asarray(returns, np.float64) - low) / (high - low)


def counted_limits(terminals, limit, after_terminal):
    """Rows where a step counter reaches the limit. It restarts at 0, or after other terminals where told."""
    reached = np.zeros(len(terminals), bool)
    first, count = 0, 0
    for last in np.append(np.flatnonzero(terminals), len(terminals) - 1):
        reached[first + limit - 1 - count : last + 1 : limit] = True
        first, count = last + 1, 0 if reached[last] else after_terminal
    return reached


def episode_flags(raw, max_episode_steps):
    """terminals, timeouts [N] as d4rl.qlearning_dataset takes them: if timeouts are missing, steps count."""
    terminals = np.zeros(raw["observations"].shape[0], bool)
    if "terminals" in raw:
        terminals = raw["terminals"][:].reshape(-1) != 0
    if "timeouts" in raw:
        return terminals, raw["timeouts"][:].reshape(-1) != 0
    return terminals, counted_limits(terminals, max_episode_steps, after_terminal=1)  # d4rl's counter: 1


def columns(table, s_dim, a_dim):
    """Views of a table: s [N, S], a [N, A], s_next [N, S], r [N], terminal [N]."""
    s, a, s_next, _ = np.split(table, np.cumsum((s_dim, a_dim, s_dim)), axis=1)
    return {"s": s, "a": a, "s_next": s_next, "r": table[:, -2], "terminal": table[:, -1]}


def pack(raw, rows, terminals):
    """The table of the given rows (ascending), each with the file's next row as successor.

    raw: arrays or h5py's datasets, read in blocks, so that no second copy is made.
    """
    s_dim, a_dim = raw["observations"].shape[1], raw["actions"].shape[1]
    r, terminals = raw["rewards"][:].reshape(-1, 1), terminals.reshape(-1, 1)
    table = np.empty((len(rows), 2 * s_dim + a_dim + 2), np.float32)
    for first in range(0, len(rows), BLOCK):
        i = rows[first : first + BLOCK]
        s, a, at = raw["observations"][i[0] : i[-1] + 2], raw["actions"][i[0] : i[-1] + 1], i - i[0]
        np.concatenate([s[at], a[at], s[at + 1], r[i], terminals[i]], 1, casting="same_kind",
                       out=table[first : first + BLOCK])
    return table


def qlearning_transitions(raw, max_episode_steps=1000):
    """d4rl.qlearning_dataset, vectorized: the file's last row and those at a time limit are dropped."""
    terminals, timeouts = episode_flags(raw, max_episode_steps)
    table = pack(raw, np.flatnonzero(~timeouts[:-1]), terminals)
    return columns(table, raw["observations"].shape[1], raw["actions"].shape[1])


def segment_returns(rewards, ends):
    """Sums over the stretches of rows that end where told; what follows the last end is left out."""
    stops = np.flatnonzero(ends) + 1
    return np.add.reduceat(rewards[: stops[-1]], np.append(0, stops[:-1]), dtype=np.float64)


def reward_scale(r, ends):
    """IQL's normalization, 1000 / (largest - smallest trajectory return), or None where they don't differ."""
    spread = np.ptp(segment_returns(r, ends)) if ends.any() else 0
    return float(1000 / spread) if spread > 1e-6 else None


def download(task, url, path, log):
    """Fetch a file of Table 1 from d4rl's server or the mirror; pooch keeps it only if its hash is right."""
    import pooch
    import requests
    pooch.get_logger().setLevel("ERROR")
    (size, sha256), (folder, name), failures = FILES[task], os.path.split(path), []
    for url in (url, MIRROR + name):
        log(f"downloading {url} ({size / 1e6:.0f} MB)")
        fetch = pooch.HTTPDownloader(progressbar=True, chunk_size=2**16)
        try:
            pooch.retrieve(url, f"sha256:{sha256}", fname=name, path=folder, downloader=fetch)
            return
        except requests.RequestException as error:
            failures.append(str(getattr(error.response, "status_code", type(error).__name__)))
        except ValueError:
            failures.append("wrong SHA-256")
    raise UserError(f"cannot download {name} (d4rl's server: {failures[0]}, mirror: {failures[1]}); put it "
                    f"by hand at {path} ({size} bytes, SHA-256 {sha256})")


def generate_maze2d(path, rows=60000, seed=0):
    """maze2d-umaze-v1's data as D4RL's script makes it, without noise and with sparse rewards, from a seed.

    A waypoint controller drives to one random cell after another.
    """
    env = make_env(DEMO)
    import h5py
    from d4rl.pointmaze import maze_model, waypoint_controller
    from tqdm import trange
    controller = waypoint_controller.WaypointController(env.str_maze_spec)
    grid = controller.env
    for name in ("transition_matrix", "reward_matrix"):  # slow, and functions of the target's cell only
        remembered = functools.cache(lambda spec, compute=getattr(grid, name): compute())
        setattr(grid, name, lambda of=remembered: of(grid.gs.spec.tobytes()))
    env = maze_model.MazeEnv(env.str_maze_spec)
    seed_env(env, seed)
    env.set_target()
    s, steps, limit, log = env.reset(), 0, step_limit(DEMO), []
    for _ in trange(rows, desc="generating maze2d data", unit=" rows", unit_scale=True):
        a, done = controller.get_action(s[:2], s[2:], env._target)
        done = done or steps >= limit
        log.append((s, a, done, env._target))
        s_next, steps = env.step(a)[0], steps + 1
        if done:  # D4RL's script keeps s here: the next row shows an observation of one step ago
            env.set_target()
            steps = 0
        else:
            s = s_next
    s, a, done, target = map(np.array, zip(*log))
    reward = np.linalg.norm(s[:, :2] - env.goal_locations[0], axis=1) <= 0.5
    temporary = Path(f"{path}.{os.getpid()}")
    try:
        with h5py.File(temporary, "w") as file:
            file.attrs["generated"] = f"d4rl's waypoint controller, {rows} rows, seed {seed}"
            arrays = {"observations": s, "actions": a, "rewards": reward, "infos/goal": target}
            for key, value in arrays.items():
                file[key] = value.astype(np.float32)
            file["terminals"] = done
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def find_file(task, log):
    """Path and SHA-256 of the task's file in d4rl's cache; a missing one is downloaded or generated."""
    import pooch
    folder = os.environ.get("D4RL_DATASET_DIR") or os.path.expanduser("~/.d4rl/datasets")  # as d4rl
    url = import_d4rl().infos.DATASET_URLS[task]
    path = os.path.join(folder, os.path.basename(url))
    try:
        os.makedirs(folder, exist_ok=True)
        if not os.path.lexists(path):
            generate_maze2d(path) if task == DEMO else download(task, url, path, log)
        if not os.path.isfile(path):
            raise UserError(f"{path} is not a file; move it away")
        return path, pooch.file_hash(path)
    except OSError as error:
        raise UserError(f"cannot read or write {path}: {error.strerror or error}") from error


def check_keys(file, task):
    """The file's datasets, known to be harmless to read; terminals and timeouts may be missing."""
    import h5py
    s_dim, a_dim = SIZES[task.split("-")[0]]
    widths = {"observations": s_dim, "actions": a_dim, "rewards": 0, "terminals": 0, "timeouts": 0}
    raw = {}
    for key, width in widths.items():
        link = file.get(key, getlink=True)
        if link is None and key in ("terminals", "timeouts"):
            continue
        item = file[key] if isinstance(link, h5py.HardLink) else None  # others lead out of the file
        if (not isinstance(item, h5py.Dataset) or item.is_virtual or item.external
                or item.dtype.kind not in "fiub" or item.dtype.itemsize > 8):
            raise UserError(f"has no plain array of numbers {key}")
        rows = raw["observations"].shape[0] if raw else (item.shape or (0,))[0]
        if item.shape not in ([(rows, width)] if width else [(rows,), (rows, 1)]):
            raise UserError(f"has {key} of shape {item.shape}; {rows} rows of {width or 1} are needed")
        if not 2 <= rows <= 10**7:  # D4RL's largest file has 2 million
            raise UserError(f"has {rows} rows; 2 to 10 million can be used")
        stored, chunk = item.id.get_storage_size(), np.prod(item.chunks or 0, dtype=float) * 8
        if item.nbytes > 1100 * stored or chunk > 2**30:  # deflate packs 1032 to 1 at best
            raise UserError(f"claims {item.nbytes} bytes of {key} but stores {stored}")
        raw[key] = item
    return raw


def load(task, any_data=False, log=print):
    """The task's Dataset, from d4rl's cache or its server; raises UserError if the file is missing or unfit.

    Rewards: r * 1000 / (largest - smallest trajectory return) as in IQL; AntMaze: r - 1; maze2d: r. A file
    that isn't D4RL's must have the attribute stand_in, or any_data be true.
    """
    import h5py
    path, sha256 = find_file(check_task(task), log)
    try:
        with h5py.File(path, "r", rdcc_nbytes=2**23) as file, np.errstate(all="ignore"):
            kind = ("D4RL" if task in FILES and sha256 == FILES[task][1] else
                    "generated" if task == DEMO and "generated" in file.attrs else
                    "stand-in" if "stand_in" in file.attrs else "any")
            if kind == "any" and not any_data:
                raise UserError(f"is not D4RL's file (SHA-256 {sha256}); to use it all the same: --any-data")
            dataset = prepare(check_keys(file, task), task)
    except MemoryError as error:
        raise UserError(f"not enough memory for {path}") from error
    except BlockingIOError as error:
        raise UserError(f"{path} is locked by another process ({error})") from error
    except Exception as error:  # h5py has many for damaged files
        reason = error if isinstance(error, UserError) else f"is truncated, damaged or not HDF5 ({error})"
        raise UserError(f"{path} {reason}; to get rid of it: rm {shlex.quote(path)}") from error
    info = {"task": task, "file": os.path.basename(path), "sha256": sha256, "kind": kind, **dataset.info}
    log("{task}: {rows} transitions of {episodes} trajectories, {kind} data, score {data_score:.1f}; "
        "rewards times {reward_scale:.5g}".format(**info))
    if released := info["reward_scale_released_code"]:
        log(f"{task}: {info['reward_scale'] / released:.5f} times the reward scale of the released code")
    if info["clipped_actions"]:
        log(f"{task}: {info['clipped_actions']} action components were outside [-1, 1] and are clipped")
    return dataset._replace(info=info)


def prepare(raw, task):
    """The Dataset of checked arrays; its info lacks the file's."""
    rewards = raw["rewards"][:].reshape(-1).astype(np.float32)
    terminals, dropped = episode_flags(raw, step_limit(task))
    ends = terminals | dropped
    if task == DEMO:  # terminal: the controller arrived. That row and the stale one after it go: nothing ends
        dropped = ends | np.append(False, ends[:-1])
    rows = np.flatnonzero(~dropped[:-1])
    table = pack(raw, rows, terminals)
    s_dim, a_dim = raw["observations"].shape[1], raw["actions"].shape[1]
    s, a, s_next, r, terminal = columns(table, s_dim, a_dim).values()
    for name, values in (("observations", s), ("observations", s_next), ("actions", a), ("rewards", rewards)):
        if not np.isfinite(values).all():
            raise UserError(f"has NaN or infinite {name}")
    clipped = int(np.count_nonzero((a < -1) | (a > 1)))
    np.clip(a, -1, 1, out=a)
    scale = released = None
    if task in ANTMAZE:
        if not (rewards == 1).any():
            raise UserError("has no reward of 1: AntMaze's goal is never reached")
        moved = np.abs(s_next[:, :2] - s[:, :2]).max(axis=1)
        ends[rows[(terminal == 1) & (moved < 1)]] = False  # D4RL's files go on at the goal (1 m: a reset)
        r -= 1
    if len(rows) == 0 or not ends.any():
        raise UserError("has no whole trajectory")
    if task not in ANTMAZE and task != DEMO:
        cut = (terminal == 1) | (np.diff(rows, append=-1) != 1)  # where IQL sees s_next != s
        scale = reward_scale(r, cut)
        released = reward_scale(r, (terminal == 1) | counted_limits(terminal, 1000, after_terminal=0))
        if scale is None:
            raise UserError("has trajectories of equal return only, which can scale no reward")
        r *= scale
    episodes = int(np.count_nonzero(ends))
    if task == DEMO:  # its trajectories chase other goals: score windows as long as an evaluation episode
        ends = np.arange(1, len(rewards) + 1) % min(step_limit(DEMO), len(rewards)) == 0
    returns, lengths = segment_returns(rewards, ends), np.diff(np.flatnonzero(ends), prepend=-1)
    if task in ANTMAZE:
        returns, lengths = returns > 0, None
    score = float(np.average(normalized_score(task, returns), weights=lengths))
    return Dataset(table, s_dim, a_dim, {
        "rows": len(rows), "episodes": episodes, "data_score": score, "reward_scale": scale or 1.0,
        "reward_scale_released_code": released, "clipped_actions": clipped,
        "largest_reward": float(np.abs(r).max())})


class NumpyPolicy:
    """A policy (any picklable policy(obs, rng) -> action): ReLU network, tanh at its end.

    layers: (weight [out, in], bias [out]), the input's first.
    """

    def __init__(self, layers):
        self.layers = [(np.float32(weight), np.float32(bias)) for weight, bias in layers]

    def __call__(self, obs, rng):
        hidden = np.float32(obs)
        for weight, bias in self.layers[:-1]:
            hidden = np.maximum(weight @ hidden + bias, 0)
        weight, bias = self.layers[-1]
        return np.tanh(weight @ hidden + bias).astype(np.float64)


def random_policy(a_dim, obs, rng):
    return rng.uniform(-1, 1, a_dim)


_worker_env = functools.cache(make_env)


def run_episode(task, seed, policy, episode):
    """The episode's return, a function of (seed, episode) and the policy alone."""
    env, source = _worker_env(task), np.random.SeedSequence((seed, episode))
    seed_env(env, int(source.generate_state(1)[0]))
    rng = np.random.default_rng(source.spawn(1)[0])
    obs, total, done = env.reset(), 0.0, False
    while not done:
        obs, reward, done, _ = env.step(np.asarray(policy(obs, rng), np.float64))
        total += reward
    return float(total)


def start_worker(lifeline):
    """Ends when the main process ends, or closes the lifeline."""
    threading.Thread(target=lambda: lifeline.poll(None) and os._exit(1), daemon=True).start()


class Workers(contextlib.AbstractContextManager):
    """Processes of one thread each, one per core unless told; they start when needed."""

    def __init__(self, workers=None):
        context = multiprocessing.get_context("spawn")
        lifeline, self.lifeline = context.Pipe(duplex=False)
        workers = workers or len(os.sched_getaffinity(0))
        self.pool = ProcessPoolExecutor(workers, context, start_worker, (lifeline,))

    def submit(self, function, *arguments):
        """A Future of function(*arguments)."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a new process inherits this
        try:
            with mock.patch.dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""):
                return self.pool.submit(function, *arguments)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def roll_out(self, task, policies, episodes):
        """Futures of the returns of the first `episodes` episodes of each (seed, policy)."""
        return [[self.submit(run_episode, task, seed, policy, episode) for episode in range(episodes)]
                for seed, policy in policies]

    def __exit__(self, *error):
        """End the workers, busy or not."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        self.lifeline.close()


def results(evaluation):
    """Raw returns [policies, episodes] of what `Workers.roll_out` started; waits for them."""
    return np.array([[future.result() for future in episodes] for episodes in evaluation])


def evaluate(policies, task, episodes, workers=None):
    """Returns and normalized scores, each [policies, episodes], of a list of (seed, policy)."""
    with Workers(workers) as pool:
        returns = results(pool.roll_out(check_task(task), policies, episodes))
    return returns, normalized_score(task, returns)
