"""Everything but the proof: data, environments, runs that survive, the report."""

import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import h5py
import loky
import numpy as np
import pytest
import requests
import torch
from PIL import Image

import data
import figures
import mujoco210
import remake
import run
import srpo
from models import TwinQ
from released import released_checkpoints
from srpo import Settings

torch.set_num_threads(1)
HERE, HOPPER, ANTMAZE = Path(__file__).parent, "hopper-medium-v2", "antmaze-umaze-v2"
LONG = pytest.mark.skipif(
    not os.environ.get("LONG"), reason="takes long: LONG=1 pytest"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))


def python(
    code, folder=HERE, **more
):  # ends when the last who holds its output has ended
    how = {
        "cwd": folder,
        "env": os.environ | more,
        "capture_output": True,
        "text": True,
        "timeout": 60,
    }
    return subprocess.run([sys.executable, "-c", code], **how)


# ---------------- D4RL's data
def random_file(rows=40, task=HOPPER, seed=0):
    """Trajectories of 8 rows, all of them first states; of those of hopper and walker2d
    every second ends at a terminal, the others at time limits.
    """
    rng, step = np.random.default_rng(seed), np.arange(1, rows + 1)
    s_dim, a_dim = data.space_sizes(task)
    falls = (step % 16 == 8) & task.startswith(("hopper", "walker2d"))
    data.seed_env(data.the_env(task), seed)
    s = np.array([data.the_env(task).reset() for _ in range(rows)])
    a, r = rng.uniform(-1, 1, (rows, a_dim)), rng.normal(size=rows)
    ends = {"terminals": falls, "timeouts": (step % 8 == 0) & ~falls}
    return {"observations": s.reshape(-1, s_dim), "actions": a, "rewards": r} | ends


def write(content, task=HOPPER, path=None, stand_in=True):
    """A stand-in of {key: array, function of the file, or None to leave it out}."""
    path = path or data.stand_in_path(task)
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file.attrs.update({"stand_in": "test", "task": task} if stand_in else {})
        for key, x in content.items():
            if x is not None:
                file[key] = x(file) if callable(x) else x
    return path


def load(task=HOPPER, **options):
    table, (s_dim, a_dim), info = data.load(task, log=(lines := []).append, **options)
    columns = np.split(table, np.cumsum((s_dim, a_dim, 1, s_dim)), axis=1)
    names = ("s", "a", "r", "s_next", "terminal")
    return dict(zip(names, columns)), info, "\n".join(lines)


def refusal(task=HOPPER, **options):
    with pytest.raises(data.UserError) as caught:
        load(task, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_transitions_are_those_of_d4rl_qlearning_dataset():
    raw, rng = random_file(1000, seed=2), np.random.default_rng(1)
    raw["terminals"], raw["timeouts"] = rng.random((2, 1000)) < [[0.03], [0.05]]
    reference = data.import_d4rl().qlearning_dataset(None, raw)
    write(raw | {"rewards": raw["rewards"][:, None]})  # [N, 1] is as good as [N]
    columns, info, _ = load()
    reference["rewards"] *= np.float32(info["reward_scale"])
    for key, theirs in zip(("s", "a", "s_next", "r", "terminal"), reference.values()):
        theirs = np.float32(theirs).reshape(columns[key].shape)
        np.testing.assert_array_equal(columns[key], theirs)


def test_rewards_are_scaled_by_the_range_of_returns_and_the_score_is_their_mean():
    raw, row = random_file(1703), np.arange(1703)
    raw["terminals"], raw["timeouts"] = np.isin(row, [499, 1702]), row == 1400
    raw["rewards"] = np.select([row == 1400, row == 1702], [50.0, 100.0], 1.0)
    raw["actions"][[2, 5], [0, 1]] = -1.0001, 3
    path = write(raw)
    columns, info, told = load()
    # Row 1400 (time limit) and the file's last row go: returns 500, 900, 301.
    np.testing.assert_allclose(columns["r"], 1000 / 599, rtol=1e-6)
    assert info["reward_scale"] == 1000 / 599
    assert info["largest_reward"] == columns["r"][0]
    score = data.normalized_score(HOPPER, (500 + 950 + 401) / 3)  # whatever lengths
    assert info["data_score"] == pytest.approx(score)
    assert info["odd"] == ["2 action components are clipped to [-1, 1]"]
    assert np.abs(columns["a"]).max() == 1 and info["odd"][0] in told
    assert f"{HOPPER}: stand-in data ({path}), 1701 rows of 3 trajectories" in told


def test_antmaze_rewards_are_less_one_and_its_score_counts_trajectories():
    raw, row = random_file(task=ANTMAZE), np.arange(40)
    raw["rewards"] = np.float32(np.isin(row, [7, 20, 21]))
    raw["terminals"], raw["timeouts"] = raw["rewards"] == 1, row % 10 == 9
    raw["observations"][:8, 0] = 8  # a reset after row 7, none after 20 and 21
    write(raw, ANTMAZE)
    columns, info, _ = load(ANTMAZE)
    assert set(columns["r"].flat) == {-1, 0} and (columns["r"] == 0).sum() == 3
    assert info["episodes"] == 5 and info["data_score"] == pytest.approx(40)
    write(raw | {"rewards": 2 * raw["rewards"]}, ANTMAZE)
    assert "needs AntMaze's rewards of 0 and, at the goal, 1" in refusal(ANTMAZE)


def test_what_is_odd_but_may_be_right_is_used_and_told():
    raw = random_file() | {"rewards": np.ones(40)}
    after = np.roll(raw["observations"], -1, axis=0)
    after[[3, 7, 15]] += 1  # no flag; a terminal and a time limit, which may differ
    write(raw | {"next_observations": after})
    columns, info, _ = load()
    used = np.float32(after)[~raw["timeouts"]][:-1]
    np.testing.assert_array_equal(columns["s_next"], used)
    assert info["episodes"] == 6 and info["reward_scale"] == 1000 / (8 - 4)
    assert info["odd"] == ["1 next_observations aren't the next row's"]
    raw, row = random_file(2500), np.arange(2500)
    raw |= {"terminals": row == 1200, "timeouts": row == 1250}
    write(raw | {"rewards": np.full(2500, 1e3)})
    assert re.search("\n.*1249 rows in a trajec.*\n.*rewards scaled", load()[2])


def test_an_unfit_file_is_refused_in_one_line():
    x, gone = np.zeros((40, 17)), np.full((40, 11), np.nan)
    for words, *contents in [
        ("has no actions, but observations, rewards, term", {"actions": None}),
        ("has no obs", {"observations": lambda file: file.create_group("x")}),
        ("shape (40, 17), not 40 rows of 11", {"observations": x}),
        (" of shape (", {"terminals": x}, {"rewards": x[0]}, {"actions": 1.0}),
        ("NaN or inf", {"observations": gone}, {"rewards": np.full(40, 1e300)}),
        ("other than 0 and 1", {"terminals": gone[:, 0]}, {"timeouts": x[:, 0] + 2}),
        ("equal return", {"rewards": np.zeros(40)}),
        ("no whole traj", {"timeouts": 0 * x[:, 0]}, random_file(0), random_file(1)),
    ]:
        for content in contents:
            ends = {"terminals": x[:, 0]} if "no whole" in words else {}
            path = write(random_file() | ends | content)
            assert (line := refusal()).startswith(f"{path} ") and words in line


def test_data_that_cannot_be_the_tasks_is_refused_also_with_any_data(monkeypatch):
    def said(raw, task):
        write(raw, task)
        return refusal(task, any_data=True)

    fault, row = "states unlike those after resets", np.arange(40)
    raw = random_file(task=(cheetah := "halfcheetah-medium-v2"))
    assert fault in said(raw, "walker2d-medium-v2")  # of the same sizes
    swapped = {"terminals": raw["timeouts"], "timeouts": raw["terminals"]}
    assert "terminals where halfcheetah goes on" in said(raw | swapped, cheetah)
    raw = random_file()
    s = raw["observations"]
    assert fault in said(raw | {"observations": (s - s.mean(0)) / s.std(0)}, HOPPER)
    assert "of one or two rows" in said(raw | {"next_observations": s + 1}, HOPPER)
    limits = np.arange(2000) % 1000 == 999
    raw = random_file(2000) | {"terminals": limits, "timeouts": 0 * limits}
    assert "terminals where hopper goes on" in said(raw, HOPPER)
    for task in (ANTMAZE, data.DEMO):
        raw = random_file(task=task) | {"rewards": np.float32(row % 8 == 7)}
        assert "terminals where " in said(raw | {"terminals": row % 8 == 3}, task)
        s = np.array(raw["observations"])
        s[:, :2] += 4 if task == ANTMAZE else 1.5
        assert "positions inside walls" in said(raw | {"observations": s}, task)
    # D4RL's own is not doubted, as long as it is at the right place.
    path = data.path_of(HOPPER)
    write(random_file() | {"observations": np.zeros((40, 11))}, path=path)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(data.FILES, HOPPER, (0, sha256))
    assert load()[1]["kind"] == "D4RL"
    shutil.copy(path, data.path_of(other := "hopper-medium-replay-v2"))
    assert f"is data of {HOPPER}" in refusal(other)
    write(random_file(seed=1), path=data.path_of(other))  # which says for which task
    assert f"is data of {HOPPER}" in refusal(other)


def test_a_stand_in_lies_apart_from_d4rls_file_which_goes_first():
    stand_in = write(random_file())
    assert stand_in.parent != data.path_of(HOPPER).parent == data.data_folder()
    assert data.data_file(HOPPER) == stand_in and load()[1]["kind"] == "stand-in"
    write(random_file(seed=1), path=(path := data.path_of(HOPPER)), stand_in=False)
    assert data.data_file(HOPPER) == path
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert refusal().endswith(f"(SHA-256 {sha256}); to use it: --any-data")
    assert load(any_data=True)[1]["kind"] == "any"


def test_other_tasks_of_d4rls_with_the_same_robots_and_mazes_can_be_had(monkeypatch):
    for task in "hopper-expert-v2", "walker2d-random-v2", "maze2d-large-v1":
        path = write(random_file(400, task), task, data.path_of(task), stand_in=False)
        _, info, told = load(data.check_task(task))
        assert (info["kind"], info["episodes"]) == ("unverified", 50)
        assert f"unverified data ({path})" in told
    for task in "hopper-expert-v0", "maze2d-umaze-dense-v1", "door-human-v1", None:
        with pytest.raises(data.UserError, match="^unknown task .*; did you mean "):
            data.check_task(task)
    monkeypatch.setattr(data, "import_d4rl", Mock(side_effect=AssertionError))
    assert [*map(data.check_task, data.TASKS)] == [*data.TASKS]  # at once


def test_a_file_that_cannot_be_read_is_told_in_one_line(monkeypatch):
    path = write(random_file(), HOPPER, data.path_of(HOPPER))
    intact, size = path.read_bytes(), data.FILES[HOPPER][0]
    for place, fault in [
        ("h5py.File", OSError(5, "Input/output error")),
        ("data.transitions", MemoryError("Unable to allocate")),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=fault))
            assert f"cannot be read ({type(fault).__name__}: {fault})" in refusal()
    for content in intact[: len(intact) // 2], intact[:96] + bytes(10_000), b"":
        path.write_bytes(content)
        assert refusal().startswith(f"{path} cannot be read (")
        assert refusal(any_data=True).endswith(f"; D4RL's has {size} bytes")
    monkeypatch.setitem(data.FILES, HOPPER, (0, hashlib.sha256(b"").hexdigest()))
    assert refusal().endswith("its SHA-256 is D4RL's, so it is intact")


def test_downloads_are_verified_and_fail_in_one_line(monkeypatch):
    def downloader(*_, **__):
        return lambda url, to, _: replies.pop(0)(to)

    monkeypatch.setattr("pooch.HTTPDownloader", downloader)
    right = hashlib.sha256(b"right bytes").hexdigest()
    monkeypatch.setitem(data.FILES, HOPPER, (11, right))
    missing = Mock(side_effect=requests.HTTPError(response=Mock(status_code=404)))
    lost = Mock(side_effect=requests.ConnectionError())
    for words, *replies in [
        ("server: ConnectionError, mirror: 404", lost, missing),
        ("mirror: wrong SHA", missing, lambda to: Path(to).write_bytes(b"other")),
        ("it is intact", missing, lambda to: Path(to).write_bytes(b"right bytes")),
    ]:
        line, path = refusal(), data.path_of(HOPPER)
        assert words in line and path.exists() == ("intact" in words)  # kept if right
    content = write(random_file(), "hopper-expert-v2").read_bytes()
    data.stand_in_path("hopper-expert-v2").unlink()
    replies = [lambda to: Path(to).write_bytes(content)]
    assert "SHA-256 unknown" in load("hopper-expert-v2")[2]
    assert refusal(data.DEMO).endswith(f"python remake.py {data.DEMO}")


def test_the_folder_for_data_is_where_it_is_wished(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, path in ("~/x", tmp_path / "x"), ("", tmp_path / ".d4rl/datasets"):
        monkeypatch.setenv("D4RL_DATASET_DIR", value)
        assert data.data_folder() == path and path.is_dir()
    monkeypatch.setenv("D4RL_DATASET_DIR", __file__)
    assert re.search("^cannot make .*; set D4RL_DATASET_DIR$", refusal())


def test_maze2d_data_is_what_d4rls_script_makes_without_its_stale_rows():
    remake.maze2d(path := data.stand_in_path(data.DEMO), rows=400)
    demo, maze = data.the_env(data.DEMO), data.import_d4rl().pointmaze
    env = maze.maze_model.MazeEnv(demo.str_maze_spec)
    controller = maze.waypoint_controller.WaypointController(demo.str_maze_spec)
    data.seed_env(env, 0)
    env.set_target()
    s, steps, log = env.reset(), 0, []
    for _ in range(400):  # the script's loop, with nothing remembered
        a, done = controller.get_action(s[:2], s[2:], env._target)
        done = done or steps >= demo.spec.max_episode_steps
        log.append([*a, *s, np.linalg.norm(np.float32(s[:2]) - 1) <= 0.5, 0, done])
        s_next, steps = env.step(a)[0], 0 if done else steps + 1
        s = s if done else s_next
        env.set_target() if done else None
    # without the row after an arrival, which repeats it
    fresh = np.diff(np.array(log)[:, 8], prepend=0) >= 0
    with h5py.File(path) as file:  # actions, observations, rewards, terminals, timeouts
        stored = np.column_stack([*file.values()])
        assert file.attrs["task"] == data.DEMO
    np.testing.assert_array_equal(stored, np.float32(log)[fresh])
    _, info, _ = load(data.DEMO)
    score = 100 * demo.get_normalized_score(stored[:300, 6].sum())  # one stretch
    assert info["data_score"] == pytest.approx(score) and info["odd"] == []
    assert info["episodes"] == stored[:, 8].sum() >= 3


# ---------------- environments, evaluation, and the physics of MuJoCo 2.1.0
@pytest.mark.parametrize("task", data.TASKS)
def test_every_task_runs_and_a_seed_fixes_start_goal_and_actions(task):
    env, seen = data.make_env(task), []
    for seed in (3, 4, 3):
        env.reset()
        data.seed_env(env, seed)
        start, action = env.reset(), env.action_space.sample()
        goal = getattr(env.unwrapped, "target_goal", ())
        seen.append([*start[:2], *start[-3:], *goal, *action])
    assert seen[0] == seen[2] and np.not_equal(seen[0], seen[1]).all()
    after, reward, done, _ = env.step(action)
    assert data.space_sizes(task) == (len(start), len(action))
    assert np.isfinite([*after, data.normalized_score(task, reward)]).all() and not done


def test_returns_are_functions_of_seed_and_episode_in_any_process():
    rng, random = np.random.default_rng(0), partial(data.random_policy, 3)
    sizes = (8, 11), (8,), (3, 8), (3,)
    weights = [rng.normal(size=size).astype(np.float32) for size in sizes]
    network = data.NumpyPolicy([weights[:2], weights[2:]])
    policies = [(0, random), (1, random), (0, network)]
    with data.Workers(2) as workers:
        returns, broken = data.returns_of(workers.roll_out(HOPPER, policies, 3))
    assert broken == 0 and len(np.unique(returns)) == 9
    for row, (seed, policy) in reversed([*enumerate(policies)]):
        for i in (2, 1, 0):  # the other way round
            episode = data.run_episode(HOPPER, seed, policy, i)
            assert episode == (returns[row, i], True)
    env = data.the_env(HOPPER)
    scores = 100 * env.get_normalized_score(returns)
    np.testing.assert_allclose(data.normalized_score(HOPPER, returns), scores, 1e-12)
    # An episode that breaks the simulation has the rewards until then.
    actions = iter([*np.zeros((5, 3)), np.full(3, np.nan)])
    total, whole = data.run_episode(HOPPER, 0, lambda obs, rng: next(actions), 0)
    data.seed_env(env, int(np.random.SeedSequence((0, 0)).generate_state(1)[0]))
    env.reset()
    assert total == sum(env.step(np.zeros(3))[1] for _ in range(5)) and whole is False


def test_workers_hold_no_torch_outlive_signals_and_end_with_us(tmp_path, monkeypatch):
    (tmp_path / "mujoco.py").write_text("raise ImportError('broken')")
    monkeypatch.syspath_prepend(tmp_path)  # of no effect here, where it is imported
    with data.Workers(1) as workers:
        broken = workers.roll_out(HOPPER, [(0, None)], 1)
        with pytest.raises(data.UserError, match="^cannot import d4rl: .*pip install"):
            data.returns_of(broken)
        submit = workers.pool.submit
        pid = submit(os.getpid).result()
        for number in data.SIGNALS:
            os.kill(pid, number)
        assert submit(os.getpid).result() == pid
        assert not submit(eval, "'torch' in __import__('sys').modules").result()
        busy = submit(signal.pause)
        while not busy.running():
            pass
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    code = "import data, os, signal; data.Workers(1).pool.submit(signal.pause)\n"
    # python() waits for whoever holds the output: the worker has ended, too
    assert python(code + "os.kill(os.getpid(), 9)").returncode == -signal.SIGKILL
    pool = Mock(side_effect=OSError(30, "Read-only"))
    monkeypatch.setattr(loky, "ProcessPoolExecutor", pool)
    with pytest.raises(data.UserError, match="Read-only.*/dev/shm"):
        data.Workers()
    assert pool.call_args.args == (loky.cpu_count(),)  # the cores that a container has


def test_importing_is_light_and_changes_nothing_and_environments_are_quiet(tmp_path):
    code = """
import sys, data
heavy = {"torch", "h5py", "gym", "d4rl", "tqdm", "loky"} & {*sys.modules}
env = data.make_env("antmaze-umaze-v2")
data.seed_env(env, 0)
env.reset()
env.step(env.action_space.sample())
sys.exit(str(heavy) if heavy else 0)"""
    done = python(code, MUJOCO_GL="none such", D4RL_DATASET_DIR="", HOME=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    code = """
import matplotlib, sys, torch
state = lambda: ([*dict.items(matplotlib.rcParams)], torch.get_num_threads())
before = state()
import run, figures
sys.exit(before != state() or "matplotlib.pyplot" in sys.modules)"""
    assert python(code).returncode == 0


# Recorded once with mujoco-py on MuJoCo 2.1.0 (gym 0.23.1, d4rl 1.1, Python 3.9):
# states, actions and what step returned. Most antmaze rows touch a wall, a few with a
# leg's axis inside it, where other versions fail.
@pytest.mark.parametrize(
    "name", sorted({key.split("/")[0] for key in np.load(HERE / "physics210.npz")})
)
def test_steps_and_resets_are_those_of_mujoco_210(name):
    file, close = np.load(HERE / "physics210.npz"), np.testing.assert_allclose
    record = {
        key.split("/")[1]: file[key] for key in file if key.startswith(f"{name}/")
    }
    (task, *_) = (x for x in data.TASKS if x.startswith(name.replace("_", "-")))
    env = data.make_env(task)
    inner = getattr(env.unwrapped, "_wrapped_env", env.unwrapped)
    for seed in range(4):
        inner.seed(seed)
        np.random.seed(seed)  # antmaze draws its goal from here
        for obs, goal in zip(record["seed_obs"][seed], record["seed_goal"][seed]):
            close(env.reset(), obs, rtol=0, atol=1e-12)
            ours = getattr(inner, "target_goal", getattr(inner, "_target", 0))
            close(ours, goal, rtol=0, atol=1e-12)
            env.step(np.zeros(env.action_space.shape))
    if "goal" in record:
        inner.set_target(tuple(record["goal"]))

    def play(qpos, qvel, actions):
        inner.sim.reset()  # which also remembers its time and last accelerations
        inner.set_state(qpos, qvel)
        return [env.unwrapped.step(action) for action in actions][-1]

    starts = record["qpos"], record["qvel"], record["action"][:, None]
    obs, reward, done, _ = zip(*map(play, *starts))
    # seen: 2e-12; a wrong mass or contact gives 1e-3 to 1
    close(obs, record["next_obs"], rtol=0, atol=1e-9)
    close(reward, record["reward"], rtol=0, atol=1e-9)
    assert np.array_equal(done, record["done"])
    (episode,) = (key.removesuffix("obs10") for key in record if key.endswith("obs10"))
    after_ten = play(*(record[episode + key] for key in ("qpos", "qvel", "actions")))
    # seen: 4e-11, in halfcheetah, which is chaotic
    close(after_ten[0], record[episode + "obs10"], rtol=0, atol=1e-6)


def test_mujoco_py_is_ours_of_the_one_mujoco_that_steps_as_210_did(monkeypatch):
    (env := data.make_env(HOPPER)).reset()
    env.unwrapped.sim.data.qvel[0] = np.nan
    with pytest.raises(mujoco210.MujocoException, match="^Got MuJoCo Warning: "):
        env.step(np.zeros(3))
    env.reset()
    env.step(np.zeros(3))  # well again
    assert sys.modules["mujoco_py"] is mujoco210
    monkeypatch.delitem(sys.modules, "mujoco_py")
    monkeypatch.setattr("mujoco.__version__", "3.2.7")
    words = r"mujoco 3\.2\.7 .*: pip install mujoco==3\.2\.6;"
    with pytest.raises(data.UserError, match=words):
        data.import_d4rl()
    assert f"\nmujoco=={mujoco210.VERSION} " in (HERE / "requirements.txt").read_text()


# ---------------- the command line, a run's folder, and what ends a run
SIZES = "--{0}-steps 12 --{0}-batch 16 --{0}-width 16 "
SMALL = "".join(map(SIZES.format, ("critic", "behavior", "policy")))
TRAIN = f"train {data.DEMO} --beta 0.4 --evaluations 2 --episodes 1 --seeds 0 "
TRAIN += f"--behavior-blocks 1 {SMALL}"
RUN, SPOILED = Path("runs", data.DEMO), Path("spoiled", data.DEMO)


def submit(function, *arguments):
    (future := loky.Future()).set_result(function(*arguments))
    at_the_second_asking = itertools.chain([False], itertools.repeat(True))
    future.done = Mock(side_effect=at_the_second_asking)
    return future


@functools.cache
def maze_rows():
    return random_file(400, data.DEMO) | {"rewards": np.arange(400) % 9 == 0}


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(line, exit status) -> stderr, or stdout of status 0."""
    # in place of the demo's data, and of processes, which take a while to start
    monkeypatch.setattr(remake, "maze2d", lambda path: write(maze_rows(), data.DEMO))
    pool = Mock(return_value=Mock(submit=submit))
    monkeypatch.setattr(loky, "ProcessPoolExecutor", pool)
    monkeypatch.chdir(tmp_path)

    def call(line, status=0):
        capsys.readouterr()
        assert run.main(line.split()) == status
        return capsys.readouterr()[status > 0].strip()

    return call


def results(out):  # {name: bytes} of what a run leaves
    names = {f"{name}.pt" for name in run.STAGES} | {"log.csv", "scores.csv"}
    paths = Path(out, data.DEMO).iterdir()
    return {path.name: path.read_bytes() for path in paths if path.name in names}


@pytest.mark.parametrize("compiled", ["", pytest.param("--compile ", marks=LONG)])
def test_stages_train_through_the_command_line_and_each_seed_as_if_alone(
    compiled, cli, monkeypatch
):
    train = TRAIN + compiled + "--beta 0.1 0.4 --also iql bc "
    with monkeypatch.context() as patch:  # for once by other processes
        pool = loky.process_executor.ProcessPoolExecutor
        patch.setattr(loky, "ProcessPoolExecutor", pool)
        told = cli(train + "--seeds 3 1")
    assert "srpo, β = 0.1: mean score" in told
    before, rows = results("runs"), run.read_csv(RUN / "scores.csv")
    policies = ("srpo", 0.1), ("srpo", 0.4), ("iql", None), ("bc", None)
    places = itertools.product(policies, (0, 6, 12), (1, 3))
    found = [(row["method"], row["beta"], row["step"], row["seed"]) for row in rows]
    assert sorted(map(str, found)) == sorted(str((*p, *x)) for p, *x in places)
    log = [row for row in run.read_csv(RUN / "log.csv") if row["step"] == 12]
    of_srpo = [row for row in log if row["stage"] == "srpo"][0].items()
    filled = [key for key, x in of_srpo if x is not None]
    assert filled == [*run.COLUMNS["log"][:4], "q", "grad_q", "noise_gap"]
    assert b"\r" not in before["log.csv"] and b"\ncritic,12,3,," in before["log.csv"]
    told, scores = cli(train + "--seeds 3 1"), [row["score"] for row in rows[-2:]]
    mean, deviation = np.mean(scores), np.std(scores, ddof=1)
    assert "nothing to do" in told
    assert f"bc: {mean:.1f} ± {deviation:.1f} over 2 seeds × 1 episodes" in told
    torch._dynamo.reset()  # it gives up after eight stages in a process
    assert "±" not in cli(train + "--seeds 1 --out alone")
    paths = [Path(out, data.DEMO, "srpo.pt") for out in ("runs", "alone")]
    both, alone = (torch.load(path)["policy"] for path in paths)
    for name in alone:  # sums in another order
        torch.testing.assert_close(both[name][1:], alone[name], rtol=0, atol=1e-4)
    config = json.loads((RUN / "config.json").read_text())
    assert (config["device"], config["settings"]["precision"]) == ("cpu", "exact")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True)
    assert config["cpu"] and (config["commit"] or "").startswith(
        head.stdout.decode()[:40]
    )
    monkeypatch.setattr(run, "IDQL", partial(run.IDQL, candidates=2, steps=1))
    for method in (*run.POLICIES, "idql", "random"):
        cli(f"evaluate {RUN} --method {method} --episodes 2")
        anew = json.loads((RUN / f"evaluation-{method}.json").read_text())
        assert anew | run.read_config(RUN) == anew
        last = [row for row in rows if (row["method"], row["step"]) == (method, 12)]
        again = [row["return"] for row in anew["scores"] if row["episode"] == 0]
        assert not last or again == [row["return"] for row in last]
        assert len(anew["scores"]) == (8 if method == "srpo" else 4)
    assert results("runs") == before


def test_idql_takes_the_best_of_its_candidates_by_the_smaller_target_twin(cli):
    def normal(a_t, s, t):  # the noise model of N(0, 1)
        return srpo.alpha_sigma(t)[1][:, None] * a_t

    def twins(s, a):
        return torch.stack([a[:, 0], a[:, 1] - 0.5])

    numbers, policy = np.random.default_rng(0), run.IDQL(normal, twins, 2, 64, 5)
    noise = torch.from_numpy(numbers.standard_normal((64, 2), np.float32))
    # unclamped, the best a₀ would be 1.4
    a = run.sample(normal, None, noise, 5).clamp(-1, 1)
    best = torch.minimum(a[:, 0], a[:, 1] - 0.5).argmax()
    np.testing.assert_array_equal(policy(np.ones(3), np.random.default_rng(0)), a[best])
    cli(TRAIN)
    ((_, _, trained),) = run.load_policies(RUN, run.read_config(RUN), "idql")
    weights, s = torch.load(RUN / "critic.pt")["q_target"], torch.ones(64, 4)
    (q := TwinQ(4, 2, 16)).load_state_dict({key: x[0] for key, x in weights.items()})
    torch.testing.assert_close(trained.q(s, a), q(s, a))


def losses_of(*values):
    """A stage's losses that are these of the seeds, with a gradient."""

    def losses(stage, *batch):
        zero = next(stage.parameters()).flatten(1).sum(1) * 0
        value = torch.tensor(values) if values else stage.count
        return len(stage.loss_names) * (zero + value,)

    return losses


def test_the_log_has_mean_losses_names_what_diverges_and_ends_if_nothing_is_finite(
    cli, monkeypatch, capsys
):
    monkeypatch.setattr(srpo.Critic, "losses", losses_of())  # the number of the step
    monkeypatch.setattr(srpo.Behavior, "losses", losses_of(np.nan, np.nan))
    # no return is beyond 1 / (1 − γ): of seed 1 Q = 101 can't be
    monkeypatch.setattr(run, "watch", lambda stage: {"q": torch.tensor([99.0, 101.0])})
    with pytest.raises(SystemExit, match="^3$"):
        cli(TRAIN + "--seeds 0 1 --critic-steps 41")
    told, rows = capsys.readouterr().out, run.read_csv(RUN / "log.csv")
    means = [*np.arange(0.5, 40, 2), 40.0]  # of two steps, and at last of one
    assert [row["q_loss"] for row in rows[:42:2]] == means
    assert [row["value_loss"] for row in rows[1:42:2]] == means
    assert told.count("diverges") == told.count("seed 1: the critic diverges") == 1
    assert f"no seed's behavior loss is finite; see {RUN / 'log.csv'}\n" in told


def test_a_lost_seed_and_episodes_that_broke_are_told_once_and_training_goes_on(
    cli, monkeypatch
):
    monkeypatch.setattr(srpo.Behavior, "losses", losses_of(0.0, torch.nan))
    told = cli(TRAIN + "--seeds 0 1")
    assert told.count("seed 1 is lost: a loss of behavior is not finite") == 1
    assert told.count("is lost") == 1 and "srpo, β = 0.4: mean score" in told
    policy = Mock(return_value=np.full(2, np.nan))
    monkeypatch.setattr(data.NumpyPolicy, "__call__", policy)
    assert "MuJoCo gave up on 2 episodes" in cli(f"evaluate {RUN}")


MISTAKES = [  # what is told of lines at fault
    ("the following arguments are required: ", "", "train"),
    (f"did you mean {HOPPER}", "train hoper-medium-v2", f"train ../{HOPPER}"),
    ("--critic-stepz 3, did you mean --critic-steps?", TRAIN + "--critic-stepz 3"),
    ("; see run.py train --help", TRAIN + "--critic-stepz 3", TRAIN + "--also x"),
    (
        " is out of range",
        TRAIN + "--tau 2",
        TRAIN + "--critic-lr nan",
        TRAIN + "--beta 0",
    ),
    ("invalid whole value: '1.5'", TRAIN + "--policy-steps 1.5"),
    ("invalid positive value: '0'", TRAIN + "--workers 0", "evaluate x --episodes 0"),
    ("give --beta: Table 2 has none", f"train {data.DEMO}", TRAIN + "--beta"),
    ("--seeds must be different", TRAIN + "--seeds 1 1", TRAIN + "--seeds -1"),
    ("/proc/nowhere", TRAIN + "--out /proc/nowhere"),
    ("nowhere is no run's folder", TRAIN + "--reuse nowhere", "evaluate nowhere"),
]


def test_a_mistake_is_one_line_and_status_2_but_a_bug_has_its_traceback(
    cli, monkeypatch
):
    for words, *lines in MISTAKES:
        for told in (cli(line, 2) for line in lines):
            assert told.startswith("run: ") and words in told and "\n" not in told
    assert not Path("runs").exists()
    for error, words in [
        (RuntimeError("DefaultCPUAllocator: not enough"), "memory is full"),
        (loky.process_executor.BrokenProcessPool("a\nworker"), "run: a worker"),
        (OSError(28, "No space left on device"), "No space left on device"),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(run.Run, "train", Mock(side_effect=error))
            assert words in cli(TRAIN, 2).splitlines()[-1]
    before = [*Path().rglob("*")]
    for line in f"evaluate {RUN}/srpo.pt", "evaluate runs", TRAIN + "--reuse runs":
        assert f"did you mean {RUN}?" in cli(line, 2)
    assert f"{RUN} is a run's folder" in cli(TRAIN + f"--out {RUN}", 2)
    assert [*Path().rglob("*")] == before
    monkeypatch.setattr(run, "train", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli(TRAIN)


def test_what_is_not_given_is_the_demos_or_another_runs_and_help_has_every_default(
    cli, monkeypatch, capsys
):
    cli(TRAIN + "--tau 0.8 --critic-steps 1e1 --seeds 4")
    monkeypatch.setattr(run, "train", given := Mock())
    cli(f"train {data.DEMO} --reuse {RUN} --beta sweep --episodes 7")
    (_, settings), options = given.call_args
    assert (settings.beta, settings.episodes) == (srpo.SWEEPS["maze2d"], 7)
    assert (settings.tau, settings.critic_steps, options["seeds"]) == (0.8, 10, [4])
    cli(f"train {data.DEMO} --demo --policy-steps 9")
    (_, settings), options = given.call_args
    assert (settings.policy_steps, settings.critic_steps) == (9, 20_000)
    assert (options["seeds"], options["compile"]) == ([0, 1, 2], False)
    for command, tasks in ("train", data.TASKS), ("evaluate", ()):
        with pytest.raises(SystemExit):
            run.main([command, "--help"])
        told = " ".join(capsys.readouterr().out.split()).split("options: -h")[1]
        flags = {*re.findall(r"--[a-z-]+", told)} - {"--help"}
        positive = [flag for flag in flags if not flag.startswith("--no-")]
        assert told.count("default: ") == len(positive)
        told = told.replace("- ", "-")  # where a line was broken
        assert all(task in told for task in tasks)


def test_where_compiling_fails_a_step_stays_eager_unless_told_to_compile(
    cli, monkeypatch
):
    cli(TRAIN + "--out eager")
    error = "CppCompileError: " + 300 * "flags " + "the end\n\nSet TORCHDYNAMO_VERBOSE"
    fails = Mock(side_effect=torch._dynamo.exc.TorchDynamoException(error))
    monkeypatch.setattr(torch, "compile", lambda *_, **options: fails)
    monkeypatch.setattr(run, "PATIENCE", -1)
    monkeypatch.setattr(run, "TRIAL", 6)
    told = cli(TRAIN)
    assert len(re.findall("not compiled, .*: [flags ]*the end", told)) == 3
    assert results("runs") == results("eager")
    monkeypatch.setattr(shutil, "which", Mock(return_value=None))
    told = cli(TRAIN + "--out must --compile", 2)
    assert re.fullmatch("run: --compile cannot .*the end; install g[+][+].*", told)


def test_whether_to_compile_is_chosen_once_by_the_time_of_a_stages_first_steps(
    cli, monkeypatch
):
    compiling = Mock(side_effect=lambda losses: losses)
    monkeypatch.setattr(run, "compiled", compiling)
    monkeypatch.setattr(run, "TRIAL", 6)
    assert "critic: eager on 1 thread, 0.0 minutes" in cli(TRAIN + "--out 1")
    assert "eager" not in cli(TRAIN + "--out 2 --no-compile") and not compiling.called
    with pytest.raises(SystemExit), monkeypatch.context() as patch:
        send(patch, srpo.Stage, "step", 8, signal.SIGTERM)
        patch.setattr(run, "PATIENCE", -1)
        cli(TRAIN)
    told = cli(TRAIN)  # by now steps may take longer
    assert "goes on at step 8 of 12\ncritic: compiling its steps" in told
    assert compiling.call_count == 2 and results("1") == results("runs")


def test_output_costs_no_training_by_a_character_a_full_disk_or_a_reader_who_left(
    cli, monkeypatch
):
    reader, writer = os.pipe()
    os.close(reader)
    latin = open("latin", "w", encoding="latin-1")
    for i, stream in enumerate(
        (open("/dev/full", "w"), open(writer, "w"), latin, None)
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert run.main([*TRAIN.split(), "--out", str(i)]) == 0
    assert "srpo, ? = 0.4: -17.3 over 1" in Path("latin").read_bytes().decode("latin-1")


def test_progress_is_a_line_after_four_seconds_then_more_rarely_and_one_at_the_end(
    monkeypatch, capsys
):
    monkeypatch.setattr(run.files.time, "monotonic", lambda: now)
    now = 0.0
    with run.progress("critic", " steps", 100, 40) as bar:
        for now in range(60):
            bar.note = f"at {now}"
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[-1] for line in lines] == ["5", "14", "31", "59"]
    assert lines[0].startswith("critic: 46 of 100 steps, 0.1 minutes, 0.8 left")
    with run.progress("critic", " steps", 100) as bar:
        bar.update(100)  # in no time
    assert capsys.readouterr().err == ""


EVALUATE, RESUME = f"evaluate {SPOILED} ", TRAIN + "--also bc --out spoiled "
REUSE = TRAIN + f"--out x --reuse {SPOILED} "
FAULTS = [  # a line, the file at fault, the place in it, what is told, what is there
    (EVALUATE, "config.json", None, "config.json is damaged", b"", b"[]", 10**5 * b"["),
    (EVALUATE, "config.json", "version", "of another version of this code", None, 1),
    (EVALUATE, "config.json", "task", "unknown task", "../x", None),
    (EVALUATE, "config.json", "settings", "of another version", {"x": 1}),
    (EVALUATE, "config.json", "settings", "config.json is damaged", None, {"tau": "x"}),
    (EVALUATE, "config.json", "seeds", "config.json is damaged", [], [0.5], 3),
    (EVALUATE, "config.json", "data", "config.json is damaged", {"kind": 1}, None),
    (REUSE, "config.json", "seeds", "that run has seeds [1] instead of [0]", [1]),
    (REUSE, "log.csv", None, "log.csv is damaged", b"x\n1\n"),
    (REUSE, "critic.pt", None, "critic.pt does not exist: train it first", None),
    (
        EVALUATE,
        "srpo.pt",
        None,
        "other bytes",
        lambda x: x.replace(b"\0\0", b"\0\1", 99),
    ),
    (EVALUATE, "srpo.pt", None, "srpo.pt is damaged", b"", lambda x: x[:-99]),
    (EVALUATE, "srpo.pt", "policy", "Weights only load failed", HERE),  # a Path
    (EVALUATE, "srpo.pt", "policy/4.bias", "srpo.pt is damaged", 0, torch.zeros(1, 2)),
    (RESUME, "checkpoint.pt", None, "has critic.pt, but no checkpoint.pt", None),
    (RESUME, "checkpoint.pt", "config", "checkpoint.pt is damaged", 0, HERE),
    (RESUME, "checkpoint.pt", "config/torch", "(torch 1.0 instead of 2", "1.0"),
    (RESUME, "checkpoint.pt", "under_way/stage", "checkpoint.pt is damaged", {}, None),
]


def spoil(path, place, value):
    """Puts the value at a place, KEY/KEY, of a JSON or PyTorch file; at None: bytes."""
    if place is None:
        value = value(path.read_bytes()) if callable(value) else value
        return path.unlink() if value is None else path.write_bytes(value)
    is_json = path.suffix == ".json"
    content = json.loads(path.read_text()) if is_json else torch.load(path)
    *outer, key = place.split("/")
    (content[outer[0]] if outer else content)[key] = value
    path.write_text(json.dumps(content)) if is_json else torch.save(content, path)


def send(patch, owner, name, call, *numbers):
    """Signals to this process, at the end of that call."""
    function, calls = getattr(owner, name), itertools.count(1)

    def sending(*arguments, **options):
        result = function(*arguments, **options)
        for number in numbers if next(calls) == call else ():
            os.kill(os.getpid(), number)
        return result

    patch.setattr(owner, name, sending)


@pytest.fixture
def spoiled(cli, monkeypatch):
    """spoiled(): a fresh copy, SPOILED, of a run that was stopped at bc's step 4."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        send(patch, srpo.Stage, "step", 3 * 12 + 4, signal.SIGTERM)
        cli(TRAIN + "--also bc")

    def copy():
        for folder in "spoiled", "x":
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(RUN, SPOILED)

    return copy


def test_every_fault_of_a_runs_files_is_told_in_one_line_and_leaves_nothing_behind(
    spoiled, cli
):
    for line, name, place, words, *values in FAULTS:
        for value in values:
            spoiled()
            spoil(SPOILED / name, place, value)
            told = cli(line, 2)
            assert words in told and "\n" not in told, (name, place, value)
            assert not Path("x").exists()


@pytest.mark.parametrize("count", [20, pytest.param(10_000, marks=LONG)])
def test_damaged_files_lead_to_no_traceback(count, spoiled):
    places = [fault[1:3] for fault in FAULTS if fault[2] and fault[0] != RESUME]
    values = [None, True, -1, 1e308, np.nan, "", "srpo", [], [0.5], [[]], {}, 10**30]
    rng = np.random.default_rng(0)
    for _ in range(count):
        spoiled()
        name, place = places[rng.integers(len(places))]
        data_file = write(maze_rows(), data.DEMO)
        if rng.random() < 0.5:
            spoil(SPOILED / name, place, values[rng.integers(len(values))])
        path = (SPOILED / name, SPOILED / "checkpoint.pt", data_file)[rng.integers(3)]
        content, start = bytearray(path.read_bytes()), rng.integers(path.stat().st_size)
        content[start : start + rng.integers(9)] = rng.bytes(rng.integers(9))
        path.write_bytes(content[: int(rng.choice([0.9, 1, 1]) * len(content))])
        with contextlib.suppress(SystemExit):
            line = (EVALUATE, RESUME, REUSE)[rng.integers(3)]
            assert run.main(line.split()) in (0, 2)


def test_what_differs_is_named_on_both_sides_with_the_way_that_leads_there(
    spoiled, cli
):
    for given, words in [
        ("--gamma 0.5", "(gamma 0.99 instead of 0.5); another --out trains anew"),
        ("--policy-lr 0.1", f"with --reuse {SPOILED}, policies only"),
        ("--beta 0.2 0.4", "(beta [0.4] instead of [0.2, 0.4])"),
        ("--seeds 0 1", "with --seeds of those it lacks"),
        ("--episodes 9", f"run.py evaluate {SPOILED} --episodes"),
    ]:
        spoiled()
        assert words in cli(RESUME + given, 2)
    # with other policies; or on another device, if told, or with another build
    cli(TRAIN + f"--no-baseline --out another --reuse {RUN}")
    ours, other = results("runs"), results("another")
    same = [ours[f"{x}.pt"] == other[f"{x}.pt"] for x in ("critic", "behavior", "srpo")]
    assert same == [True, True, False]
    start = ours["log.csv"][: ours["log.csv"].index(b"srpo")]
    assert other["log.csv"].startswith(start)  # as it was, to the last digit
    spoil(SPOILED / "checkpoint.pt", "config/torch", torch.__version__ + "+other")
    spoil(SPOILED / "checkpoint.pt", "config/device", "cuda")
    assert "(device cuda instead of cpu)" in cli(RESUME, 2)
    cli(RESUME + "--device cpu")
    cli(TRAIN + "--also bc")
    assert results("spoiled") == results("runs")


def killed(out, seconds=None, *place):
    """Whether SIGKILL hit a training: after so many seconds, or at a call, if told."""
    line = f"{TRAIN} --also bc --seeds 0 1 --checkpoint-minutes 1e-9 --out {out} "
    line = line.replace("steps 12", "steps 6")
    with pytest.MonkeyPatch.context() as patch:
        send(patch, *place, signal.SIGKILL) if place else None
        train = partial(run.main, line.split())
        child = multiprocessing.get_context("fork").Process(target=train)
        child.start()
    child.join(seconds)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.parametrize(
    "least", [6, pytest.param(100, marks=LONG)], ids=["at_calls", "at_any_moment"]
)
def test_a_run_killed_anywhere_ends_as_one_that_was_not(least, cli, monkeypatch):
    def episode(task, seed, policy, i):
        return policy(np.ones(4), None)[0], True

    monkeypatch.setattr(data, "run_episode", episode)
    places = [(run.Run, "save", 30), (os, "replace", 90), (srpo.Stage, "step", 24)]
    places += [(os, "fsync", 90), (data.Workers, "roll_out", 6), (run.Run, "log", 24)]
    places, rng, kills = itertools.cycle(places), np.random.default_rng(0), 0
    assert not killed("whole")
    for out in map(str, itertools.count()):
        for owner, name, calls in itertools.islice(places, 3):
            when = None, owner, name, rng.integers(calls) + 1
            kills += killed(out, *when if least == 6 else [rng.uniform(0, 3)])
        assert not killed(out) and results(out) == results("whole")
        if kills >= least:
            break


def test_a_signal_saves_and_the_same_command_goes_on(cli, monkeypatch):
    cli(TRAIN + "--also iql bc --out whole")
    monkeypatch.setattr(os, "_exit", at_once := Mock())  # at the second Ctrl-C
    handlers = [*map(signal.getsignal, data.SIGNALS)]
    for owner, name, call, step, scores, status, *numbers in [
        (srpo.Stage, "step", 12 + 1, 1, 0, "143", signal.SIGUSR1),
        (srpo.Stage, "step", 1, 2, 0, "143", signal.SIGTERM),
        (data.Workers, "roll_out", 1, 0, 0, "143", signal.SIGTERM),
        (srpo.Stage, "step", 12 + 1, 1, 4, "130", signal.SIGINT, signal.SIGINT),
    ]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=status):
            send(patch, owner, name, call, *numbers)
            cli(TRAIN + "--also iql")
        saved = torch.load(RUN / "checkpoint.pt")
        assert saved["under_way"]["stage"]["count"] == step
        assert len(run.read_csv(RUN / "scores.csv")) == len(saved["scores"]) == scores
    at_once.assert_called_once_with(130)
    assert handlers == [*map(signal.getsignal, data.SIGNALS)]
    # a policy more, and no policy less; what is under way goes first
    assert "iql: goes on at step 1 of 12" in cli(TRAIN + "--also bc")
    assert results("runs") == results("whole")
    assert run.read_config(RUN)["settings"]["also"] == ["bc", "iql"]


def test_a_run_keeps_others_out_of_its_folder_and_replaces_a_file_at_once_or_not(
    cli, monkeypatch
):
    cli(TRAIN)
    with open(RUN / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert cli(TRAIN, 2) == f"run: {RUN} is in use by another process"
    cli(TRAIN)
    with monkeypatch.context() as patch:
        error = OSError(37, "No locks available")
        patch.setattr(fcntl, "flock", Mock(side_effect=error))
        assert "cannot be locked (No locks available)" in cli(TRAIN + "--out other")
    before = (path := RUN / "srpo.pt").read_bytes()
    with open(path, "rb") as reader:
        run.files.write_atomically(path, before + b"new")
        assert reader.read() == before  # whoever reads it meanwhile has it whole
    path.write_bytes(before)
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left")))
    assert "No space left" in cli(f"evaluate {RUN}", 2)
    assert not [*RUN.glob("*.tmp")] and not [*RUN.glob("evaluation*")]
    failing = Mock(side_effect=OSError(5, "Input/output error"))
    monkeypatch.setattr(Path, "read_bytes", failing)
    assert f"cannot read {path}: Input/output error" in cli(f"evaluate {RUN}", 2)


# ---------------- the authors' checkpoints
def like_theirs(s_dim=11, a_dim=3, blocks=3):
    """Random weights under the names of theirs: critic, behavior model."""
    critic, behavior, width = {}, {"embed.0.W": torch.randn(32)}, 256

    def layers(weights, name, *sizes):
        for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
            layer = f"{name}.{2 * i}" if len(sizes) > 2 else name
            weights[f"{layer}.weight"] = torch.randn(outputs, inputs) / 16
            weights[f"{layer}.bias"] = torch.randn(outputs)

    layers(critic, "vf.v", s_dim, width, width, 1)
    for twin in "q0.q1", "q0.q2", "q0_target.q1", "q0_target.q2":
        layers(critic, twin, s_dim + a_dim, width, width, 1)
    layers(behavior, "cond_model", 64, 128, 128)
    layers(behavior, "main.fc", a_dim + s_dim + 128, width)
    layers(behavior, "main.out_fc", width, a_dim)
    for block in (f"main.blocks.{i}" for i in range(blocks)):
        for name in "weight", "bias":
            behavior[f"{block}.layer_norm.{name}"] = torch.randn(width)
        layers(behavior, f"{block}.fc1", width, 4 * width)
        layers(behavior, f"{block}.fc2", 4 * width, width)
        layers(behavior, f"{block}.residual", width, width)
    return critic, {f"diffusion_behavior.{name}": x for name, x in behavior.items()}


def save(folder, seed, critic, behavior):
    where = folder / f"{HOPPER}-baseline-seed{seed}"
    where.mkdir()
    torch.save(critic, where / "critic_ckpt150.pth")
    torch.save(behavior, where / "behavior_ckpt200.pth")


def take(folder, seeds, **options):
    """Critic and behavior stages with the weights of these files."""
    settings, table = srpo.Settings(HOPPER, **options), torch.zeros(1, 27)
    both = [
        kind(settings, table, (11, 3), seeds) for kind in (srpo.Critic, srpo.Behavior)
    ]
    loaded = released_checkpoints(folder, HOPPER, seeds, settings, (11, 3))
    for stage in both:
        weights = loaded.pop(stage.name)
        assert weights.keys() == stage.weights().keys()
        for name, state in weights.items():
            getattr(stage, name).network.load_state_dict(state)
    return both


def test_files_of_the_authors_names_become_our_weights(tmp_path):
    files = {seed: like_theirs() for seed in (3, 5)}
    for seed, both in files.items():
        save(tmp_path, seed, *both)
    critic, behavior = take(tmp_path, [*files])
    s, a = torch.randn(2, 7, 11), torch.randn(2, 7, 3)
    for i, (theirs, _) in enumerate(files.values()):
        for q, prefix in (critic.q, "q0.q"), (critic.q_target, "q0_target.q"):
            for twin in 0, 1:
                x = torch.cat([a[i], s[i]], -1)  # theirs has the action first
                for layer in (f"{prefix}{twin + 1}.{j}" for j in (0, 2, 4)):
                    x = x @ theirs[f"{layer}.weight"].T + theirs[f"{layer}.bias"]
                    x = x if layer.endswith("4") else x.relu()
                torch.testing.assert_close(q(s, a)[i, twin], x[:, 0], atol=1e-4, rtol=0)
    ours, theirs = behavior.noise_model.network.state_dict(), files[5][1]
    for name, other in {
        **{"frequencies": "embed.0.W", "embed_time.2.bias": "cond_model.2.bias"},
        **{"input.weight": "main.fc.weight", "output.1.bias": "main.out_fc.bias"},
        "blocks.1.norm.weight": "main.blocks.1.layer_norm.weight",
        "blocks.2.mlp.0.weight": "main.blocks.2.fc1.weight",
        "blocks.0.mlp.2.bias": "main.blocks.0.fc2.bias",
    }.items():
        assert ours[name][1].equal(theirs[f"diffusion_behavior.{other}"])


@pytest.mark.parametrize(
    "of_file, of_settings, told",
    [
        ({"s_dim": 12}, {}, "(ValueError vf.v.0.weight is not [256, 11] finite"),
        ({}, {"critic_width": 9}, "(ValueError vf.v.0.weight is not [9, 11] finite"),
        ({"blocks": 2}, {}, "(KeyError 'diffusion_behavior.main.blocks.2."),
        ({"blocks": 4}, {}, "(ValueError diffusion_behavior.main.blocks.3."),
    ],
)
def test_their_files_of_other_sizes_are_refused(tmp_path, of_file, of_settings, told):
    save(tmp_path, 0, *like_theirs(**of_file))
    with pytest.raises(data.UserError, match="ckpt[0-9]*.pth does not fit") as caught:
        take(tmp_path, [0], **of_settings)
    assert told in str(caught.value)


def test_their_files_that_are_missing_or_damaged_are_refused(tmp_path):
    save(tmp_path, 0, *(both := like_theirs()))
    with pytest.raises(
        data.UserError, match="seed1/critic_ckpt150.pth does not fit.*No"
    ):
        take(tmp_path, [0, 1])
    path = next(tmp_path.glob("*/behavior*"))
    half, spoiled = path.read_bytes()[:1000], {"W": Path("code, not weights")}
    both[1]["diffusion_behavior.embed.0.W"][7] = float("nan")
    for content in half, b"", b"text", spoiled, [1, 2], both[1]:
        as_it_is = isinstance(content, bytes)
        path.write_bytes(content) if as_it_is else torch.save(content, path)
        with pytest.raises(data.UserError, match="behavior_ckpt200.pth does not fit"):
            take(tmp_path, [0])


@pytest.mark.skipif(
    not os.environ.get("RELEASED"), reason="needs RELEASED=a clone of thu-ml/SRPO"
)
def test_released_checkpoints_have_the_outputs_of_their_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *where, **how: module)
    monkeypatch.syspath_prepend(os.environ["RELEASED"])
    import SRPO

    args = SimpleNamespace(env=HOPPER, device="cpu", q_layer=2, actor_blocks=3)
    theirs = [
        (SRPO.SRPO_IQL(14, 3, args), SRPO.SRPO_Behavior(14, 3, None, args))
        for seed in (0, 1)
    ]
    for seed, (iql, behavior) in enumerate(theirs):
        torch.nn.init.normal_(iql.q[0].q0_target.q2[2].weight)  # it is Q's at first
        save(tmp_path, seed, iql.q[0].state_dict(), behavior.state_dict())
    critic, behavior = take(tmp_path, [0, 1])
    s, a, t = torch.randn(2, 50, 11), torch.randn(2, 50, 3), torch.rand(2, 50)
    for i, (iql, theirs_behavior) in enumerate(theirs):
        their, noise_model = iql.q[0], theirs_behavior.diffusion_behavior.eval()
        for ours, y in (
            (critic.value(s), their.vf(s[i])[:, 0]),
            (critic.q(s, a), torch.cat(their.q0.both(a[i], s[i]), 1).T),
            (critic.q_target(s, a), torch.cat(their.q0_target.both(a[i], s[i]), 1).T),
            (behavior.noise_model(a, s, t), noise_model(a[i], t[i], s[i])),
        ):
            torch.testing.assert_close(ours[i], y, atol=2e-5, rtol=0)


def test_reuse_takes_critic_and_behavior_model_of_the_authors(cli):
    Path("theirs").mkdir(), save(Path("theirs"), 0, *like_theirs())
    write(random_file())
    few = "--policy-steps 2 --evaluations 1 --episodes 1 --seeds 0"
    assert "critic:" not in cli(f"train {HOPPER} --reuse theirs {few}")
    weights = torch.load(Path("runs", HOPPER, "critic.pt"))
    assert weights["q"]["twins.0.0.weight"].shape == (1, 256, 14)


# ---------------- remake.py
def write_policy(s_dim=11, a_dim=3):
    policy = remake.SAC(s_dim, a_dim, seed=0).policy.parameters()
    np.savez("policy.npz", *(weights := [x.detach().numpy() for x in policy]))
    return weights


@pytest.fixture
def remade(tmp_path, monkeypatch, capsys):
    workers = Mock(pool=ThreadPoolExecutor(1))  # others take seconds to start
    monkeypatch.setattr(data, "Workers", lambda: contextlib.nullcontext(workers))
    monkeypatch.chdir(tmp_path)

    def call(line):
        assert remake.main(line.split()) == 0
        with h5py.File(data.stand_in_path(task := line.split()[0])) as file:
            assert file.attrs["task"] == task and "not D4RL" in file.attrs["stand_in"]
            return {key: x[:] for key, x in file.items()}, capsys.readouterr().out

    return call


def test_sac_learns_the_best_action_and_knows_its_density():
    sac, s = remake.SAC(2, 1, seed=0), torch.randn(500, 2)
    a, ones = torch.rand(500, 1) * 2 - 1, torch.ones(500, 1)
    sac.optimizer.param_groups[0]["lr"] = 3e-3
    for _ in range(100):
        sac.step(s, a, -20 * (a - 0.5) ** 2, ones, 0 * ones, s)
    mean, log_std = sac.policy(s).chunk(2, -1)
    assert abs(mean.tanh().mean() - 0.5) < 0.3 and sac.log_alpha < -0.1
    taken = []  # log π(a) = log N(u) − log(1 − a²), a = tanh u
    _, log_density = sac.value(lambda s, a: taken.append(a) or torch.zeros(2, 500), s)
    u = torch.distributions.Normal(mean, log_std.exp())
    expected = u.log_prob(taken[0].atanh()) - (1 - taken[0] ** 2).log()
    torch.testing.assert_close(log_density, expected[:, 0], atol=1e-3, rtol=1e-3)


def test_medium_replay_is_sacs_buffer_and_medium_is_by_its_policy(remade, capsys):
    rows, told = remade("hopper-medium-replay-v2 --rows 1010")
    assert len(rows["rewards"]) == 1010 and "2041 trajectories of return 467" in told
    assert data.load("hopper-medium-replay-v2", log=str)[2]["kind"] == "stand-in"
    assert len(remade(f"{HOPPER} --rows 7")[0]["rewards"]) == 7
    assert remake.main([HOPPER]) == 2 and "exists and stays" in capsys.readouterr().err


def test_part_i_of_the_roll_outs_is_a_function_of_seed_and_i(remade):
    weights = write_policy()
    rows, _ = remade(f"{HOPPER} --policy policy.npz --noise 0.3 --rows 20 --seed 5")
    env, rng = data.make_env(HOPPER), np.random.default_rng([5, 7])
    data.seed_env(env, int(rng.integers(2**31)))
    x = s = env.reset()
    for w, b in zip(weights[::2], weights[1::2]):
        x, output = np.maximum(w @ x + b, 0), w @ x + b
    a = np.tanh(output[:3] + 0.3 * rng.standard_normal(3))
    np.testing.assert_array_equal(rows["observations"][14], np.float32(s))
    np.testing.assert_allclose(rows["actions"][14], a, atol=1e-5)
    assert rows["rewards"][14] == np.float32(
        env.step(np.float64(rows["actions"][14]))[1]
    )
    assert rows["timeouts"][1::2].all() and not rows["timeouts"][::2].any()
    line = "hopper-medium-expert-v2 --policy policy.npz policy.npz --noise 0.3 0.1"
    both, _ = remade(f"{line} --rows 40 --seed 5")
    np.testing.assert_array_equal(both["actions"][:20], rows["actions"])


@pytest.mark.parametrize("task", [x for x in data.TASKS if x.startswith("antmaze")])
def test_antmaze_is_walked_by_an_ant_policy(task, remade):
    *weights, w, b = write_policy(s_dim=29, a_dim=8)
    made, _ = remade(f"{task} --policy policy.npz --rows 200")
    spread = np.ptp(made["observations"][::20, :2], axis=0)  # of the parts' starts
    assert (spread > 1).any() == (task != ANTMAZE) and made["actions"].max() == 1
    names = "fc0", "fc1", "last_fc", "last_fc_log_std"  # as in the file of D4RL's ant
    names = [f"{x}_{name}" for name in names for x in "Wb"]
    np.savez("ant.npz", **dict(zip(names, [*weights, w[:8], b[:8], w[8:], b[8:]])))
    again = remake.roll_out(task, remake.read_policy("ant.npz", None, task), 20, [0, 3])
    np.testing.assert_array_equal(again[:, :29], made["observations"][60:80])


def test_antmaze_has_episodes_of_1001_rows_and_rewards_at_the_goal():
    rng = np.random.default_rng(0)
    env, act = remake.antmaze(ANTMAZE, lambda s, rng: np.zeros(8), rng)
    rows = [row for _, row in zip(range(1002), remake.transitions(env, act, rng))]
    assert [*np.flatnonzero(np.array(rows)[:, 39])] == [1000]
    np.random.seed(0)
    goal = data.make_env(ANTMAZE).unwrapped.target_goal
    env.unwrapped._wrapped_env.set_xy(goal)
    assert env.step(np.zeros(8))[1:3] == (1, False) and not np.array(rows)[:, 37].any()


def test_what_cannot_be_made_is_refused_in_one_line(remade, capsys):
    write_policy()
    for line, reason in {
        "maze2d-umaze-v1 --seed -1": "--seed",
        "hopper-medium-expert-v2 --policy policy.npz": "needs 2 --policy files",
        f"{HOPPER} --policy policy.npz --noise 0.1 0.2": "as many --noise",
        f"{HOPPER} --policy policy.npz --noise 0": "--noise above 0",
        HOPPER: "or make one: remake.py hopper-medium-replay-v2",
        "walker2d-medium-v2 --policy policy.npz": "is no policy for walker2d",
    }.items():
        assert remake.main(line.split()) == 2
        assert re.search(f"^remake: .*{reason}.*\n$", capsys.readouterr().err)


def test_ctrl_c_keeps_nothing_and_ends_the_workers(remade):
    write_policy()
    command = [sys.executable, HERE / "remake.py", HOPPER, "--policy", "policy.npz"]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    how["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, **how)
    assert " of 1,000,000 rows" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=60)  # ends with the last who holds it
    assert process.returncode == 130 and told.endswith("nothing is kept\n")


# ---------------- run_all.sh, the README and the report
STAND_INS = {  # for Python: the first trains and installs, the second makes .venv
    "python": f"""#!/bin/bash
[ "$1" != -m ] || {{ [ -e online ]; exit; }}
[ "$1 $2" = "run.py train" ] || exit 0
echo "$3 $5 $CUDA_VISIBLE_DEVICES $D4RL_DATASET_DIR" >>log
[ "$3" != {HOPPER} ] || kill -KILL $$  # this training dies, and one is stopped
[[ "$3" != antmaze* ]] || {{ kill -TERM "$RUN_ALL"; exec {sys.executable} -c '
import signal, sys, time
signal.signal(15, lambda *_: print("saved") or sys.exit(143))
time.sleep(9)'; }}
sleep 0.3""",
    "python3": """#!/bin/bash
[ "$1" != -c ] || exit ${OLD:-0}
[ "$*" = "-m venv --clear .venv" ] || exit 0
rm -rf .venv && mkdir -p .venv/bin && cp python .venv/bin""",
}


@pytest.fixture
def run_all(tmp_path):
    """run_all(tasks, exit status) -> what run_all.sh says, on two GPUs and with
    stand-ins for Python, from a folder beside its own.
    """
    (here := tmp_path / "here").mkdir(), (beside := tmp_path / "beside").mkdir()
    for name in ("run_all.sh", "run.py", "requirements.txt", *STAND_INS):
        text = STAND_INS.get(name) or (HERE / name).read_text()
        (here / name).write_text(text)
        (here / name).chmod(0o755)
    fixed = {"PYTHON": "../here/python", "GPUS": "3,5", "OUT": "out"}
    fixed |= {"D4RL_DATASET_DIR": "d4rl", "PATH": f"{here}:{os.environ['PATH']}"}

    def call(tasks, status, **more):
        line = f"export RUN_ALL=$$; exec bash ../here/run_all.sh {tasks}"
        how = {"cwd": beside, "text": True, "timeout": 20, "stderr": subprocess.STDOUT}
        how |= {"stdout": subprocess.PIPE, "env": os.environ | fixed | more}
        done = subprocess.run(["bash", "-c", line], **how)
        assert done.returncode == status, done.stdout
        return done.stdout

    return call


def test_run_all_gives_each_gpu_a_task_outlives_a_training_that_dies_and_stops_all(
    run_all, tmp_path
):
    tasks, out = [HOPPER, *data.TASKS[6:9]], tmp_path / "beside/out"
    told = run_all(" ".join(tasks), 1)
    log = [line.split() for line in (tmp_path / "here/log").read_text().splitlines()]
    assert sorted(line[0] for line in log) == sorted(tasks)
    assert {line[2] for line in log} == {"3", "5"}
    assert {(line[1], line[3]) for line in log} == {(f"{out}", f"{out.parent}/d4rl")}
    failed = f"run_all: {HOPPER} failed; see {out}/{HOPPER}/output.txt"
    assert re.findall("run_all: .*", told) == [failed]
    told = run_all(f"{ANTMAZE} {data.TASKS[6]}", 143)
    assert "saved\nrun_all: stopped; the same command" in told


def test_run_all_sets_up_anew_what_failed_and_has_a_command_for_every_task_and_no_other(
    run_all, tmp_path
):
    before = {*tmp_path.rglob("*")}
    assert "OUT=runs" in run_all("--help", 0)
    for tasks in "hoper", f"demo {HOPPER}", f"{HOPPER} demo", "demo setup":
        assert "is none of: halfcheetah" in run_all(tasks, 2)
    lines = run_all("--dry-run", 0) + run_all("--dry-run demo", 0, OPTIONS="--tau 0.7")
    given = [run.parse(line.split()[2:]) for line in lines.splitlines()]
    assert sorted(one["task"] for one in given) == sorted(data.TASKS)
    assert given[-1]["demo"] and given[-1]["tau"] == 0.7
    new = {"PYTHON": ""}
    assert "Python 3.10 to 3.13 is needed" in run_all("setup", 2, OLD="1", **new)
    assert {*tmp_path.rglob("*")} == before
    (half := tmp_path / "here/.venv/half").mkdir(parents=True)
    for status in (2, 0):
        run_all("setup", status, **new)
        stamp = tmp_path / "here/.venv/requirements.txt"
        assert stamp.exists() == (status == 0)
        (tmp_path / "here/online").touch()
    run_all("setup", 0, OLD="1", **new)  # what is made needs no other
    (tmp_path / "here/flock").symlink_to("/bin/false")
    stamp.unlink()
    assert "no locks here" in run_all("setup", 0, **new) and not half.exists()


def test_readmes_blocks_run_with_the_four_files_that_are_copied_or_have_a_runs_policy(
    cli, monkeypatch
):
    texts = [(HERE / name).read_text() for name in ("README.md", "assets/RESULTS.md")]
    blocks = re.findall(r"```python\n(.*?)```", "".join(texts), re.DOTALL)
    alone = [block for block in blocks if "runs/" not in block]
    for name in ("diffusion.py", "models.py", "seeds.py", "srpo.py"):
        shutil.copy(HERE / name, ".")
    blocked = "data files run figures gym d4rl mujoco h5py tqdm loky matplotlib".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
    code += "import srpo\n"  # of which a few steps do
    code += "srpo.Stage.run = lambda stage: (stage.advance(1), stage)[1]\n"
    code += f"for block in {alone!r}: exec(block, {{}})"
    done = python(code, ".", OMP_NUM_THREADS="1")
    assert alone and (done.returncode, done.stderr) == (0, "")
    for block in set(blocks) - set(alone):
        task = data.check_task(re.search(r"runs/([\w-]+)", block)[1])
        write(random_file(40, task), task)
        line = TRAIN.replace("--policy-width 16", "").replace(data.DEMO, task)
        cli(line)
        exec(block, names := {})
        folder = Path("runs", task)
        ((_, _, ours),) = run.load_policies(folder, run.read_config(folder), "srpo")
        s = torch.linspace(-1, 1, data.space_sizes(task)[0])
        theirs = names["policy"](s).detach()
        np.testing.assert_allclose(theirs, ours(s.numpy(), None), atol=1e-6)


# ---------------- figures.py


def finished_run(folder, seeds=(0, 1), scores=(90, 94, 98, 102), **more):
    """A run's folder as training leaves it, with two episodes a seed; its config."""
    facts = {"kind": "D4RL", "step": 10**6, "loss": 0.5, "q": 0.0, "settings": {}}
    facts |= more
    settings = Settings(folder.name, episodes=2, **facts["settings"])
    config = run.describe(folder.name, settings, [*seeds], "cpu")
    config["data"] = {"sha256": "0f", "data_score": 50.0, "largest_reward": 10.0}
    config["data"]["kind"], rows = facts["kind"], []
    for beta in settings.beta:
        for i, score in enumerate(scores):
            row = "srpo", facts["step"], seeds[i // 2], beta, i % 2, 0, score
            rows.append(dict(zip(run.COLUMNS["scores"], row)))
    log = [dict.fromkeys(run.COLUMNS["log"], "") | {"seed": seed} for seed in seeds]
    log = [row | {"stage": "critic", "step": 1, "q": 5.0} for row in log]
    log[0]["value_loss"], log[-1]["q"] = facts["loss"], facts["q"]
    figures.write_csv(folder / "scores.csv", rows)
    figures.write_csv(folder / "log.csv", log)
    (folder / "config.json").write_text(json.dumps(config))
    return config | {"scores": [row | {"step": None} for row in rows]}


def test_report_compares_final_scores_on_d4rls_data_and_lists_what_it_cannot_use(
    tmp_path, capsys
):
    ours, other = "96.0 ± 5.7 (2 × 2)", {"settings": {"baseline": False}}
    sweep = {"settings": {"beta": (0.01, 0.05)}, "loss": math.nan, "q": 1001.0}
    runs = {  # 92 and 100 are the seeds' means, 95.5 the paper's; |Q| ≤ 10 / (1 − γ)
        HOPPER: ({}, ours, "0.05", "+0.5 [-3.5, +4.5]"),
        "walker2d-medium-v2": ({"kind": "any"}, f"{ours} (any data)", "0.05", ""),
        "walker2d-medium-expert-v2": ({"step": 50_000}, "unfinished", "0.1", ""),
        "walker2d-medium-replay-v2": (other, ours, "0.5 baseline False", ""),
        "halfcheetah-medium-replay-v2": (
            *({"seeds": [7], "scores": (90, 94)}, "92.0 (1 × 2)"),
            *("0.2", "+40.6 (one seed)"),
        ),
        "hopper-medium-replay-v2": ({"scores": (1, "1O", 2, 3)}, "not run", "", ""),
        f"no-baseline/{HOPPER}": (other,),
        f"sweep/{HOPPER}": (sweep,),
    }
    for name, (how, *_) in runs.items():
        finished_run(tmp_path / name, **how)
    assert figures.main(["report", "--out", str(tmp_path)]) == 0
    lines = (tmp_path / "report.md").read_text().splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    table_1 = {line[0]: line[10:] for line in lines if len(line) == 13}
    runs["average, locomotion"] = {}, "2 of 9 tasks", "", ""
    for name, (_, *cells) in runs.items():
        assert not cells or table_1[name] == cells
    told = capsys.readouterr().out
    for text in "no-baseline/", "baseline False", "damaged or", "0 lost", "1 diverged":
        assert text in told
    for name in "curves", "critic", "sweep":
        assert {path.suffix for path in tmp_path.glob(f"{name}.*")} == {".png", ".pdf"}


def test_report_joins_seeds_of_other_folders_and_leaves_out_evaluations_of_another_run(
    tmp_path, capsys
):
    made = finished_run(tmp_path / HOPPER)
    finished_run(tmp_path / "more" / HOPPER, seeds=[2], scores=(10, 10))
    evaluation = tmp_path / HOPPER / "evaluation-srpo.json"
    for other in {}, {"settings": made["settings"] | {"tau": 0.8}}:
        evaluation.write_text(json.dumps(made | other))
        figures.report(tmp_path)
        told = capsys.readouterr().out
        assert "(3 × 2)" in told
        assert ("is another run's (tau)" in told) == bool(other)


def test_report_given_a_runs_own_folder_or_none_writes_nothing(tmp_path, capsys):
    finished_run(folder := tmp_path / HOPPER)
    before = os.listdir(folder)
    assert figures.main(["report", "--out", str(folder)]) == 2
    assert os.listdir(folder) == before
    (tmp_path / "none").mkdir()
    assert figures.main(["report", "--out", str(tmp_path / "none")]) == 2
    told = capsys.readouterr().err
    assert "is a run's folder" in told and "holds no run" in told


def test_bandit_draws_what_is_in_the_exact_support(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "QUICK", {"behavior_steps": 2, "behavior_batch": 8})
    monkeypatch.setattr(figures, "STEPS", 2)
    monkeypatch.setattr(figures, "log_likelihood", lambda *what, steps: what[2][..., 0])
    assert figures.main(["bandit", "--quick", "--out", str(tmp_path)]) == 0
    few = Settings(beta=1.0, behavior_batch=8, behavior_width=4)
    numbers = torch.arange(6.0).view(6, 1, 1).expand(6, 9, 2)  # of behaviors
    assert (figures.Behaviors(few, numbers).batch()[1] == numbers[:, :1]).all()
    for name in "bandit.png", "bandit_ensemble.png":
        with Image.open(tmp_path / name) as image:
            assert image.width > image.height
    # the inside is what holds 99 % of the data, the middle of the ring is not in it
    ring = figures.behavior_distributions()["8 Gaussians"]
    data = ring.sample(20_000, seed=1)
    assert (ring.margin(data, ring.sample(5000, 0)) >= 0).float().mean() > 0.98
    assert ring.margin(torch.zeros(1, 2), data) < 0


def test_speed_times_every_way(tmp_path, monkeypatch):
    def few(task):
        return Settings(task, critic_batch=4, behavior_batch=4, policy_batch=4)

    monkeypatch.setattr(figures, "Settings", few)
    monkeypatch.setattr(figures, "compiled", lambda losses: losses)
    monkeypatch.setattr(figures, "TURNS", [None, (1, 1e-3)])
    where = ["--out", str(tmp_path)]
    assert figures.main(["speed", "--quick", "--seeds", "1", *where]) == 0
    text = (tmp_path / "speed.csv").read_text()
    for stage in "critic", "behavior", "srpo":
        assert f"{stage},eager" in text and f"{stage},compiled" in text


def test_film_shows_an_episode(tmp_path):
    folder, few = tmp_path / "maze2d-umaze-v1", {"beta": 1.0, "policy_width": 4}
    finished_run(folder, kind="stand-in", settings=few)
    settings = Settings(folder.name, **few)
    policies = run.Networks(run.srpo.builders(settings, 4, 2)["policy"], [0, 1], "", 1)
    torch.save({"policy": policies.network.state_dict()}, folder / "srpo.pt")
    assert figures.main(["film", str(folder), "--seed", "1"]) == 0
    with Image.open(folder / "film.gif") as film:
        assert film.width == 640 and film.n_frames > 1
