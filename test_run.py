"""Everything that is not the proof: data, environments, the command line, runs that survive, the report."""

import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock, Mock

import h5py
import loky
import numpy as np
import pytest
import requests
import torch

import data
import figures
import mujoco210
import remake
import run
import srpo

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
SMALL = "".join(
    f"--{x}-steps 12 --{x}-batch 16 --{x}-width 16 "
    for x in ("critic", "behavior", "policy")
)
TRAIN = f"train {data.DEMO} --evaluations 2 --episodes 1 --seeds 0 --behavior-blocks 1 {SMALL}"


def maze_file():  # instead of the demo's data
    return random_file(400, data.DEMO) | {"rewards": np.arange(400) % 9 == 0}


RUN, SPOILED = Path("runs", data.DEMO), Path("spoiled", data.DEMO)


def submit(function, *arguments):  # to this process: others take a while to start
    (future := loky.Future()).set_result(function(*arguments))
    future.done = Mock(
        side_effect=itertools.chain([False], itertools.repeat(True))
    )  # at the second asking
    return future


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """cli(line, exit status) -> stderr, or stdout of status 0."""
    monkeypatch.setattr(remake, "maze2d", lambda path: write(maze_file(), data.DEMO))
    monkeypatch.setattr(
        loky, "ProcessPoolExecutor", Mock(return_value=Mock(submit=submit))
    )
    monkeypatch.chdir(tmp_path)

    def call(line, status=0):
        capsys.readouterr()
        assert run.main(line.split()) == status
        return capsys.readouterr()[status > 0].strip()

    return call


def files(out):  # {name: bytes} of a run's results
    names = {f"{name}.pt" for name in srpo.STAGES} | {"log.csv", "scores.csv"}
    return {
        path.name: path.read_bytes()
        for path in Path(out, data.DEMO).iterdir()
        if path.name in names
    }


@pytest.mark.parametrize("compiled", ["", pytest.param("--compile ", marks=LONG)])
def test_stages_train_through_the_command_line_and_each_seed_as_if_alone(
    compiled, cli, monkeypatch
):
    train = TRAIN + compiled + "--beta 0.1 0.4 --also iql bc "
    with monkeypatch.context() as patch:
        patch.setattr(
            loky, "ProcessPoolExecutor", loky.process_executor.ProcessPoolExecutor
        )  # for once
        told = cli(train + "--seeds 3 1")
    assert (
        told.splitlines()[0]
        == f"{data.DEMO}: training on a CPU, at most {run.THREADS} threads"
    )
    before, rows = files("runs"), run.read_csv(RUN / "scores.csv")
    policies = ("srpo", 0.1), ("srpo", 0.4), ("iql", None), ("bc", None)
    places = {
        (*policy, step, seed)
        for policy in policies
        for step in (0, 6, 12)
        for seed in (1, 3)
    }
    assert {
        (row["method"], row["beta"], row["step"], row["seed"]) for row in rows
    } == places
    told, scores = (
        cli(train + "--seeds 3 1"),
        [row["score"] for row in rows[-2:]],
    )  # finished
    assert (
        "nothing to do" in told
        and f"bc: {np.mean(scores):.1f} ± {np.std(scores):.1f} over 2" in told
    )
    torch._dynamo.reset()  # it gives up after eight stages in a process
    cli(train + "--seeds 1 --out alone")
    both, one = (
        torch.load(Path(out, data.DEMO, "srpo.pt")) for out in ("runs", "alone")
    )
    for name in one:
        torch.testing.assert_close(
            both[name][1::2], one[name], rtol=0, atol=1e-4
        )  # sums in another order
    monkeypatch.setattr(run, "IDQL", partial(run.IDQL, candidates=2, steps=1))
    for method in (*run.POLICIES, "idql", "random"):
        cli(f"evaluate {RUN} --method {method} --episodes 2")
        anew = json.loads((RUN / f"evaluation-{method}.json").read_text())["scores"]
        assert [row["episode"] for row in anew] == [0, 1] * (
            4 if method == "srpo" else 2
        )
        final = [
            row["return"]
            for row in rows
            if (row["method"], row["step"]) == (method, 12)
        ]
        assert (
            not final or [row["return"] for row in anew[::2]] == final
        )  # from the saved weights
    assert files("runs") == before


def test_idql_takes_the_best_of_its_candidates_by_the_smaller_target_twin(cli):
    normal = Mock(
        side_effect=lambda a_t, s, t: srpo.alpha_sigma(t)[1][:, None] * a_t
    )  # of N(0, 1)
    policy = run.IDQL(
        normal, lambda s, a: torch.stack([a[:, 0], a[:, 1] - 0.5]), 2, 64, 5
    )
    noise = torch.from_numpy(
        np.random.default_rng(0).standard_normal((64, 2), np.float32)
    )
    a = run.sample(normal, None, noise, 5).clamp(
        -1, 1
    )  # without, the best a₀ would be 1.4
    best = torch.minimum(a[:, 0], a[:, 1] - 0.5).argmax()
    np.testing.assert_array_equal(policy(np.ones(3), np.random.default_rng(0)), a[best])
    cli(TRAIN)
    _, ((_, trained),) = run.load_policies(RUN, run.read_config(RUN), "idql")
    tensors = torch.load(RUN / "critic.pt")["q_target"]
    (q := srpo.TwinQ(4, 2, 16)).load_state_dict(
        {name: x[0] for name, x in tensors.items()}
    )
    torch.testing.assert_close(
        trained.q(torch.ones(1, 4), a[:1]), q(torch.ones(1, 4), a[:1])
    )


def test_the_log_has_mean_losses_names_what_diverges_and_ends_if_nothing_is_finite(
    cli, monkeypatch, capsys
):
    monkeypatch.setattr(
        srpo.Critic,
        "losses",
        lambda stage, theta, *_: (0 * theta.sum() + stage.count,) * 2,
    )
    monkeypatch.setattr(
        srpo.Behavior, "losses", lambda stage, theta, *_: (np.nan * theta.sum(),)
    )
    monkeypatch.setattr(
        srpo.Critic,
        "watched",
        lambda stage, state, rows: {"q": 99.0 + 2 * state["seed"]},
    )
    with pytest.raises(
        SystemExit, match="^3$"
    ):  # no return is beyond 1 / (1 − γ): Q = 101 can't be
        cli(TRAIN + "--seeds 0 1 --critic-steps 41")
    (out, err), rows = capsys.readouterr(), run.read_csv(RUN / "log.csv")
    means = [*np.arange(0.5, 40, 2), 40.0]  # of two steps, and at last of one
    assert (
        [row["q_loss"] for row in rows[:42:2]]
        == [row["value_loss"] for row in rows[1:42:2]]
        == means
    )
    assert [row["alive"] for row in rows] == [1] * 42 + [0, 0]
    assert (
        out.count("the critic diverges")
        == out.count("seed 1: the critic diverges: Q is beyond 100,")
        == 1
    )
    assert f"run: no seed's behavior loss is finite; see {RUN / 'log.csv'}\n" in err


def test_a_seed_that_stopped_and_episodes_that_broke_are_told_and_training_goes_on(
    cli, monkeypatch
):
    monkeypatch.setattr(
        srpo.Behavior,
        "losses",
        lambda _, x, state, *__: (x.sum() / (1 - state["seed"]),),
    )
    monkeypatch.setattr(
        data.NumpyPolicy, "__call__", lambda policy, obs, rng: np.full(2, np.nan)
    )
    told = cli(TRAIN + "--seeds 0 1")
    assert (
        told.count("MuJoCo gave up on 2 episodes") == 1
        and "of seed 0 stopped" not in told
    )
    assert (
        "the behavior stage of seed 1 stopped, its loss not finite; its score counts"
        in told
    )
    assert "MuJoCo gave up on 2 episodes" in cli(f"evaluate {RUN}")


def test_bad_input_or_what_runs_out_is_one_line_and_status_2_but_a_bug_has_its_traceback(
    cli, monkeypatch
):
    for words, *lines in [
        ("the following arguments are required: ", "", "train"),
        (f"did you mean {HOPPER}", "train hoper-medium-v2", f"train ../{HOPPER}"),
        (
            "unrecognized arguments: --critic",
            TRAIN + "--critic-stepz 3",
            TRAIN + "--critic 3",
        ),
        (
            " is out of range",
            TRAIN + "--tau 2",
            TRAIN + "--critic-lr nan",
            TRAIN + "--policy-steps 0",
        ),
        (
            "beta must be different numbers",
            *(TRAIN + f"--beta {x}" for x in ("", "1 1", "1 sweep")),
        ),
        (
            "invalid choice: 'x'",
            TRAIN + "--also x",
            TRAIN + "--weighting x",
            f"evaluate {RUN} --method x",
        ),
        (
            "--seeds must be different whole numbers",
            *(TRAIN + f"--seeds {x}" for x in ("1 1", -1, 2**31)),
        ),
        (
            "--workers: invalid positive value: '0'",
            TRAIN + "--workers 0",
            f"evaluate {RUN} --workers 0",
        ),
        (
            "cpu or cuda; which GPU: CUDA_VISIBLE_DEVICES=1 before the command",
            TRAIN + "--device cuda:1",
        ),
        (
            "cannot write to /",
            TRAIN + "--out /proc/nowhere",
            TRAIN + f"--out {__file__}",
        ),
        (
            "nowhere/config.json does not exist: train it",
            TRAIN + "--reuse nowhere",
            "evaluate nowhere",
        ),
    ]:
        for told in (cli(line, 2) for line in lines):
            assert told.startswith("run: ") and words in told and "\n" not in told
    for place, error, words in [
        (
            "torch.load",
            torch.OutOfMemoryError("no fault of the file"),
            "memory is full",
        ),
        ("run.Run.train", MemoryError(), "memory is full"),
        (
            "run.Run.train",
            RuntimeError("DefaultCPUAllocator: not enough"),
            "memory is full",
        ),
        (
            "run.Run.train",
            loky.BrokenProcessPool("a worker\ndied"),
            "run: a worker died",
        ),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(place, Mock(side_effect=error))
            assert words in cli(TRAIN, 2).splitlines()[-1]
    monkeypatch.setattr(run, "train", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli(TRAIN)


def test_where_compiling_fails_a_step_stays_eager_unless_told_to_compile(
    cli, monkeypatch
):
    train = TRAIN + "--behavior-steps 8 --out "
    cli(train + "eager")
    error = (
        "CppCompileError: "
        + 300 * "flags "
        + "the end of it\n\nSet TORCHDYNAMO_VERBOSE=1 for more"
    )
    fails = Mock(side_effect=torch._dynamo.exc.TorchDynamoException(error))
    monkeypatch.setattr(torch, "compile", lambda *_, **options: fails)
    monkeypatch.setattr(
        run, "COMPILE_FROM", 9
    )  # eight steps of the behavior model are too few
    for out, compiler, advice in (
        ("1", "/usr/bin/g++", ""),
        ("2", None, "; install g++, a C++ compiler"),
    ):
        monkeypatch.setattr(shutil, "which", Mock(return_value=compiler))
        found = re.findall(
            "(.*): not compiled.*?: [flags ]*the end of it(.*)", cli(train + out)
        )
        assert found == [("critic", advice), ("srpo", advice)] and files(out) == files(
            "eager"
        )
        told = cli(train + "3 --compile", 2)
        assert re.search(
            f"^run: --compile cannot work here: .*end of it{re.escape(advice)}$",
            told,
            re.M,
        )


def test_a_calling_program_finds_its_process_as_it_was(cli, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    torch.set_float32_matmul_precision("medium")
    states = []
    for line, status in (
        ("", 2),
        (TRAIN + "--compile", 0),
        (TRAIN + "--tau 0.6", 2),
        (TRAIN, 0),
        ("", 2),
    ):
        numbers = torch.get_num_threads(), torch.get_float32_matmul_precision()
        states.append(
            (numbers, sys.stdout, sys.stderr, [*map(signal.getsignal, data.SIGNALS)])
        )
        cli(line, status)
    torch.set_float32_matmul_precision("highest")
    assert states == states[:1] * 5


def test_output_costs_no_training_by_a_character_a_full_disk_or_a_reader_who_left(
    cli, monkeypatch
):
    reader, writer = os.pipe()
    os.close(reader)
    latin = open("latin", "w", encoding="latin-1", newline="")
    for i, stream in enumerate((open("/dev/full", "w"), open(writer, "w"), latin)):
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        assert run.main([*TRAIN.split(), "--out", str(i)]) == 0
    said = Path("latin").read_bytes().decode("latin-1")
    assert (
        "srpo, ? = 0.4: -17.3 ± 0.0 over" in said
        and "\r" not in said
        and "critic: 100%" in said
    )
    assert (
        subprocess.run(
            f"{sys.executable} run.py train x >&- 2>&-", shell=True, cwd=HERE
        ).returncode
        == 2
    )


EVALUATE, RESUME = f"evaluate {SPOILED} ", TRAIN + "--also bc --out spoiled "
FAULTS = [  # what is done with a run, the file at fault, the place in it, what is told, and what may be there
    (
        EVALUATE,
        "config.json",
        None,
        "config.json is damaged",
        b"",
        b"[]",
        b"{",
        b"null",
        100_000 * b"[",
    ),
    (EVALUATE, "config.json", "task", "unknown task", "../x", 1, None),
    (
        EVALUATE,
        "config.json",
        "settings",
        "srpo.pt is damaged",
        {},
    ),  # of the default width
    (
        EVALUATE,
        "config.json",
        "settings",
        "is damaged",
        [],
        None,
        {"x": 1},
        {"critic_steps": 1.5},
    ),
    (
        EVALUATE,
        "config.json",
        "settings/beta",
        "beta must be different numbers",
        [],
        [0.1, 0.1],
    ),
    (EVALUATE, "config.json", "seeds", "seeds must be whole numbers", [], [0.5]),
    (
        EVALUATE,
        "config.json",
        "data",
        "config.json is damaged",
        {"data_score": 1, "kind": "D4RL"},
        None,
    ),
    (RESUME, "config.json", "settings/gamma", "holds a run of another gamma", 0.5),
    (
        TRAIN + f"--out x --reuse {SPOILED}",
        "config.json",
        "seeds",
        "that run has another seeds",
        [1],
    ),
    (EVALUATE, "srpo.pt", None, "srpo.pt does not exist: train it first", None),
    (
        EVALUATE,
        "srpo.pt",
        None,
        "other bytes",
        lambda x: x[:2000] + bytes([x[2000] ^ 1]) + x[2001:],
    ),
    (
        EVALUATE,
        "srpo.pt",
        "4.bias",
        "Weights only load failed",
        HERE,
    ),  # what isn't a plain value
    (
        EVALUATE,
        "srpo.pt",
        "4.bias",
        "NaN or infinite weights",
        torch.full((1, 2), torch.nan),
    ),
    (
        EVALUATE,
        "srpo.pt",
        "4.bias",
        "srpo.pt is damaged",
        0,
        torch.zeros(2, 2),
        torch.zeros(1, 3),
    ),
    (
        EVALUATE + "--method idql",
        "critic.pt",
        "q_target",
        "critic.pt is damaged",
        {},
        None,
    ),
    (
        RESUME,
        "critic.pt",
        "value/0.weight",
        "or behavior.pt is damaged",
        None,
        torch.zeros(1, 4, 16),
    ),
    (RESUME, "checkpoint.pt", None, "by which this run goes on, is missing", None),
    (
        RESUME,
        "checkpoint.pt",
        None,
        "checkpoint.pt is damaged",
        b"PK",
        lambda x: x[:-99],
    ),
    (RESUME, "checkpoint.pt", "config", "checkpoint.pt is damaged", 0, {}, HERE),
    (RESUME, "checkpoint.pt", "config/torch", "of a run of another torch", "1.0"),
    (RESUME, "checkpoint.pt", "finished", "checkpoint.pt is damaged", None, 5),
    (
        RESUME,
        "checkpoint.pt",
        "sizes",
        "checkpoint.pt is damaged",
        None,
        {"../../precious": 0},
    ),
    (
        RESUME,
        "checkpoint.pt",
        "state/theta",
        "checkpoint.pt is damaged",
        None,
        torch.zeros(1, 3),
    ),
    (
        RESUME,
        "checkpoint.pt",
        "count",
        "checkpoint.pt is damaged",
        None,
        torch.tensor(-9),
        torch.tensor(13),
    ),
    (
        RESUME,
        "scores.csv",
        None,
        "not as this run left it",
        None,
        lambda x: x[:-1],
        lambda x: b"9" + x,
    ),
    (
        EVALUATE,
        "log.csv",
        None,
        "log.csv is damaged",
        b"x\n1\n",
        lambda x: x + b"bc" + 13 * b"," + b"\n",
    ),
]


def spoil(path, place, value):
    """Puts the value at a place, KEY/KEY, of a JSON or PyTorch file; at None: bytes, or of these."""
    if place is None:
        value = value(path.read_bytes()) if callable(value) else value
        return path.unlink() if value is None else path.write_bytes(value)
    content = (
        json.loads(path.read_text()) if path.suffix == ".json" else torch.load(path)
    )
    *outer, key = place.split("/")
    (content[outer[0]] if outer else content)[key] = value
    path.write_text(json.dumps(content)) if path.suffix == ".json" else torch.save(
        content, path
    )


def send(
    patch, owner, name, call, *numbers
):  # signals to this process, at the end of that call
    function, calls = getattr(owner, name), itertools.count(1)

    def sending(*arguments, **options):
        result = function(*arguments, **options)
        for number in numbers if next(calls) == call else ():
            os.kill(os.getpid(), number)
        return result

    patch.setattr(owner, name, sending)


@pytest.fixture
def spoiled(cli, monkeypatch):
    """spoiled() is a fresh copy, SPOILED, of a run that a signal ended at step 4 of its last stage, bc."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        send(patch, srpo.BehaviorCloning, "step", 4, signal.SIGTERM)
        cli(TRAIN + "--also bc")
    return lambda: (
        shutil.rmtree("spoiled", ignore_errors=True),
        shutil.copytree(RUN, SPOILED),
    )


def test_every_fault_of_a_runs_files_is_told_in_one_line_and_what_is_none_is_taken(
    spoiled, cli
):
    Path("precious.csv").write_text("mine")
    for line, name, place, words, *values in FAULTS:
        for value in values:
            spoiled()
            spoil(SPOILED / name, place, value)
            told = cli(line, 2)
            assert words in told and "\n" not in told, (name, place, value)
    assert Path("precious.csv").read_text() == "mine"
    cli(
        TRAIN + f"--no-baseline --out another --reuse {RUN}"
    )  # other settings of a policy
    (ours, other), names = (
        map(files, ("runs", "another")),
        ("critic.pt", "behavior.pt", "srpo.pt"),
    )
    assert [ours[name] == other[name] for name in names] == [True, True, False]
    spoiled()
    for name, place in ("config.json", "device"), ("checkpoint.pt", "config/device"):
        spoil(SPOILED / name, place, "cuda")
    assert "holds a run of another device" in cli(RESUME, 2)
    cli(RESUME + "--device cpu")
    cli(TRAIN + "--also bc")
    assert files("spoiled") == files("runs")


@pytest.mark.parametrize("count", [20, pytest.param(10_000, marks=LONG)])
def test_damaged_files_lead_to_no_traceback(count, spoiled):
    rng, places = np.random.default_rng(0), [fault[1:3] for fault in FAULTS if fault[2]]
    values = [
        None,
        True,
        -1,
        5,
        1e308,
        np.nan,
        "",
        "srpo",
        [],
        [0.5],
        [[]],
        {},
        {"a": 1},
        10**30,
    ]
    for _ in range(count):
        spoiled()
        (name, place), path = (
            places[rng.integers(len(places))],
            write(maze_file(), data.DEMO),
        )
        if rng.random() < 0.8:
            spoil(path := SPOILED / name, place, values[rng.integers(len(values))])
        content, start = bytearray(path.read_bytes()), rng.integers(path.stat().st_size)
        content[start : start + rng.integers(9)] = rng.bytes(rng.integers(9))
        path.write_bytes(content[: int(rng.choice([0.9, 1, 1]) * len(content))])
        with run.contextlib.suppress(SystemExit):
            assert run.main(EVALUATE.split()) in (0, 2) and run.main(
                RESUME.split()
            ) in (0, 2)


def killed(out, seconds=None, *place):
    """Whether SIGKILL hit a process that trains: after so many seconds, or at a function's call, if told."""
    line = f"{TRAIN} --also bc --seeds 0 1 --checkpoint-minutes 1e-9 --out {out}"
    with pytest.MonkeyPatch.context() as patch:
        send(patch, *place, signal.SIGKILL) if place else None
        patch.setattr(
            run.tqdm, "_lock", MagicMock(), raising=False
        )  # the dead don't give it back
        child = multiprocessing.get_context("fork").Process(
            target=lambda: sys.exit(run.main(line.split()))
        )
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
    monkeypatch.setattr(
        data, "run_episode", lambda _, seed, policy, i: (policy(np.ones(4), 0)[0], True)
    )
    places = [
        (run.Run, "save", 40),
        (run.csv.DictWriter, "writerows", 40),
        (os, "replace", 45),
    ]
    places += [
        (srpo, "adam", 40),
        (os, "fsync", 120),
        (data.Workers, "roll_out", 6),
        (run.Run, "cut", 2),
    ]
    places, rng, kills = (
        itertools.cycle(places),
        np.random.default_rng(0),
        0,
    )  # about as often is a run there
    assert not killed("whole")
    for out in itertools.takewhile(
        lambda out: kills < least, map(str, itertools.count())
    ):
        for owner, name, calls in itertools.islice(places, 3):
            when = (
                (None, owner, name, rng.integers(calls) + 1)
                if least == 6
                else (rng.uniform(0, 2),)
            )
            kills += killed(out, *when)
        assert not killed(out) and files(out) == files("whole")


def test_a_signal_saves_and_the_same_command_goes_on(cli, monkeypatch):
    cli(TRAIN + "--also iql bc --out whole")
    monkeypatch.setattr(os, "_exit", at_once := Mock())  # at the second Ctrl-C
    for owner, name, step, scores, status, *numbers in [
        (srpo.Behavior, "step", 1, 0, "143", signal.SIGUSR1),
        (srpo.Behavior, "step", 2, 0, "143", signal.SIGTERM),
        (
            data.Workers,
            "roll_out",
            0,
            0,
            "143",
            signal.SIGTERM,
        ),  # this evaluation is made anew
        (srpo.WeightedRegression, "step", 1, 4, "130", signal.SIGINT, signal.SIGINT),
    ]:
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=status):
            send(patch, owner, name, 1, *numbers)
            cli(TRAIN + "--also iql")
        assert torch.load(RUN / "checkpoint.pt")["count"] == step
        assert len(run.read_csv(RUN / "scores.csv")) == scores
    at_once.assert_called_once_with(130)
    cli(
        TRAIN + "--also bc"
    )  # a policy more, and no policy less; what is under way goes first
    assert files("runs") == files("whole") and run.read_config(RUN)["settings"][
        "also"
    ] == ["bc", "iql"]


def test_a_run_keeps_others_out_of_its_folder_and_replaces_a_file_at_once_or_not(
    cli, monkeypatch, capsys
):
    cli(TRAIN)
    with open(RUN / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert (
            cli(TRAIN, 2)
            == f"run: {RUN} is in use by process {os.getpid()} on {os.uname().nodename}"
        )
    cli(TRAIN + "--tau 0.6", 2)
    cli(TRAIN)  # what was refused holds nothing
    with monkeypatch.context() as patch:
        patch.setattr(
            fcntl, "flock", Mock(side_effect=OSError(37, "No locks available"))
        )
        assert f"other/{data.DEMO} can't be locked (No locks available)" in cli(
            TRAIN + "--out other"
        )
    before = (path := RUN / "srpo.pt").read_bytes()
    with open(path, "rb") as reader:
        run.write_atomically(path, before + b"new")
        assert reader.read() == before  # whoever reads it meanwhile has it whole
    path.write_bytes(before)
    monkeypatch.setattr(
        os, "fsync", Mock(side_effect=OSError(28, "No space left on device"))
    )
    with pytest.raises(data.UserError, match="No space left.*intact"):
        run.write_atomically(path, b"half")
    assert path.read_bytes() == before and not [*RUN.glob("*.tmp")]
    assert run.main(["evaluate", str(RUN)]) == 2
    out, err = capsys.readouterr()
    assert (
        "srpo, β = 0.4: -17.3 ± 0.0 over" in out
        and "evaluation-srpo.json (No space left" in err
    )


def test_what_a_machine_can_do_less_costs_no_run(cli, monkeypatch):
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(22, "Invalid argument")))
    cli(TRAIN)
    with (
        monkeypatch.context() as patch,
        pytest.raises(SystemExit),
    ):  # before a stage's first checkpoint
        patch.setattr(
            run.Run,
            "finish",
            lambda self, *_: sys.exit((self.folder / "critic.pt").touch()),
        )
        cli(TRAIN + "--out other")
    cli(TRAIN + "--out other")
    assert files("other") == files("runs")
    cli(
        TRAIN + f"--out more --reuse {RUN}"
    )  # with what its critic and behavior model went through
    assert run.read_csv(Path("more", data.DEMO, "log.csv")) == run.read_csv(
        RUN / "log.csv"
    )
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "read_bytes", Mock(side_effect=OSError(5, "Input/output error"))
        )
        assert "srpo.pt ([Errno 5] Input/output error); the file itself" in cli(
            f"evaluate {RUN}", 2
        )
    (RUN / "log.csv").unlink()
    done = []  # evaluated and trained by a thread, which may not ask for signals
    lines = f"evaluate {RUN}", TRAIN + "--out third"
    thread = threading.Thread(
        target=lambda: done.extend(run.main(line.split()) for line in lines)
    )
    thread.start()
    thread.join()
    assert done == [0, 0] and (RUN / "evaluation-srpo.json").exists()


# ---------------- run_all.sh, the README and the report
STAND_INS = {  # for Python: the first trains and installs, the second makes .venv
    "python": """#!/bin/bash
[ "$1" != -m ] || { [ -e online ]; exit; }
[ "$1 $2" = "run.py train" ] || exit 0
echo "$3 $CUDA_VISIBLE_DEVICES" >>log
[ "$3" != hopper-medium-v2 ] || kill -KILL $$  # the training dies
[[ "$3" != antmaze* ]] || { kill -TERM $PPID; exec sleep 9; }  # and one is stopped
sleep 0.3""",
    "python3": """#!/bin/bash
[ "$1" != -c ] || exit ${OLD:-0}
[ "$*" != "-m venv --clear .venv" ] || { rm -rf .venv && mkdir -p .venv/bin && cp python .venv/bin; }""",
}


@pytest.fixture
def run_all(tmp_path):
    """run_all(tasks, exit status) -> what run_all.sh says, on two GPUs and with stand-ins for Python."""
    for name in ("run_all.sh", "run.py", "requirements.txt", *STAND_INS):
        (tmp_path / name).write_text(STAND_INS.get(name) or (HERE / name).read_text())
        (tmp_path / name).chmod(0o755)
    fixed = os.environ | {
        "PYTHON": "./python",
        "GPUS": "3,5",
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
    }

    def call(tasks, status, **more):
        how = {
            "cwd": tmp_path,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        done = subprocess.run(
            ["bash", "run_all.sh", *tasks.split()], env=fixed | more, timeout=8, **how
        )
        assert done.returncode == status
        return done.stdout

    return call


def test_run_all_gives_each_gpu_a_task_outlives_a_training_that_dies_and_stops_all(
    run_all, tmp_path
):
    told = run_all(" ".join(tasks := [HOPPER, *data.TASKS[6:9]]), 1)
    done = dict(line.split() for line in (tmp_path / "log").read_text().splitlines())
    assert sorted(done) == sorted(tasks) and {*done.values()} == {"3", "5"}
    assert re.findall("run_all: .*", told) == [
        f"run_all: {HOPPER} failed; see runs/{HOPPER}/output.txt"
    ]
    assert "the same command goes on" in run_all(f"{ANTMAZE} {data.TASKS[6]}", 143)


def test_run_all_sets_up_anew_what_failed_and_has_a_command_for_every_task_and_no_other(
    run_all, tmp_path
):
    before = {*tmp_path.iterdir()}
    for tasks in (
        "hoper",
        f"demo {HOPPER}",
        f"{HOPPER} demo",
        f"{HOPPER} setup",
        "demo setup",
    ):
        assert "is none of: halfcheetah" in run_all(tasks, 2)
    out, demo = (
        run_all("--dry-run", 0),
        run_all("--dry-run demo", 0, OPTIONS="--episodes 7"),
    )
    given = [run.parse(line.split()[2:]) for line in (out + demo).splitlines()]
    assert (
        sorted(one["task"] for one in given) == sorted(data.TASKS)
        and given[-1]["episodes"] == 7
    )
    assert "Python 3.10 to 3.13 is needed" in run_all("setup", 2, PYTHON="", OLD="1")
    assert {*tmp_path.iterdir()} == before
    (half := tmp_path / ".venv/half").mkdir(parents=True)
    for status in (2, 0):
        run_all("setup", status, PYTHON="")
        assert (tmp_path / ".venv/requirements.txt").exists() == (status == 0)
        (tmp_path / "online").touch()
    run_all("setup", 0, PYTHON="", OLD="1")  # what is made needs no other
    (tmp_path / "flock").symlink_to("/bin/false")
    (tmp_path / ".venv/requirements.txt").unlink()
    assert (
        "no locks in this folder" in run_all("setup", 0, PYTHON="")
        and not half.exists()
    )


def test_readmes_blocks_run_with_the_four_files_that_are_copied_or_have_a_runs_policy(
    cli, monkeypatch
):
    text = (HERE / "README.md").read_text() + (
        HERE / "assets" / "RESULTS.md"
    ).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    alone = [block for block in blocks if "runs/" not in block]
    for name in ("diffusion.py", "models.py", "seeds.py", "srpo.py"):
        shutil.copy(HERE / name, ".")
    blocked = "data run figures gym d4rl mujoco h5py tqdm loky matplotlib".split()
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked})); import seeds; run = seeds.Loop.run\n"
    code += f"seeds.Loop.run = lambda loop, steps: run(loop, 9)  # few\nfor x in {alone!r}: exec(x, {{}})"
    done = python(code, ".", OMP_NUM_THREADS="1")
    assert alone and (done.returncode, done.stderr) == (0, "")
    if not any(Path(path, "onnxscript").exists() for path in sys.path):
        monkeypatch.setattr(
            torch.onnx, "export", Mock()
        )  # needs packages that are not required
    for block in set(blocks) - set(alone):
        task = data.check_task(re.search(r"runs/([\w-]+)", block)[1])
        write(random_file(40, task), task)
        cli(TRAIN.replace("--policy-width 16", "").replace(data.DEMO, task))
        exec(block, names := {})
        _, ((_, ours),) = run.load_policies(
            Path("runs", task), run.read_config(f"runs/{task}"), "srpo"
        )
        obs = torch.linspace(-1, 1, data.space_sizes(task)[0])
        np.testing.assert_allclose(
            names["policy"](obs).detach(), ours(obs.numpy(), None), atol=1e-6
        )


def test_report_compares_final_scores_on_d4rls_data_and_lists_what_it_cannot_use(
    tmp_path, capsys
):
    """Runs as training leaves them: two episodes of seed 0, two of seed 1, and half a line more."""
    runs = [  # 92 and 100 are the seeds' means, 95.5 is the paper's; Q ≤ 10 / (1 − γ)
        (HOPPER, {}, "96.0 ± 4.0", "2 × 2", "+0.5 [-3.5, +4.5]"),
        (
            "walker2d-medium-v2",
            {"kind": "stand-in"},
            "96.0 ± 4.0 (stand-in data)",
            "2 × 2",
            "",
        ),
        ("walker2d-medium-expert-v2", {"step": 50_000}, "unfinished"),
        ("walker2d-medium-replay-v2", {"baseline": False}, "96.0 ± 4.0", "2 × 2", ""),
        ("halfcheetah-medium-replay-v2", {"scores": "90 94 98"}, "unfinished"),
        ("hopper-medium-replay-v2", {"scores": "1 1O 2 3"}, "damaged"),
        (f"no-baseline/{HOPPER}", {"baseline": False}),
        (f"sweep/{HOPPER}", {"beta": (0.01, 0.05), "alive": 0, "q": 1001}),
    ]
    for name, options, *_ in runs:
        one = {
            "kind": "D4RL",
            "step": 10**6,
            "scores": "90 94 98 102",
            "alive": 1,
            "q": 0,
        } | options
        (folder := tmp_path / name).mkdir(parents=True)
        settings = vars(srpo.Settings(episodes=2).resolve(folder.name))
        settings |= {key: one[key] for key in {*settings} & {*one}}
        facts = {"kind": one["kind"], "data_score": 50.0, "largest_reward": 10.0}
        config = {
            "task": folder.name,
            "seeds": [0, 1],
            "settings": settings,
            "data": facts,
        }
        (folder / "config.json").write_text(json.dumps(config))
        each = itertools.product(settings["beta"], enumerate(one["scores"].split()))
        rows = [
            f"srpo,{one['step']},{i // 2},{beta},{i % 2},0,{score}"
            for beta, (i, score) in each
        ]
        (folder / "scores.csv").write_text(
            "\n".join([",".join(run.COLUMNS["scores"]), *rows, "srpo,1"])
        )
        rows = [
            f"critic,1,0,,{one['alive']},,,,,,5,,,",
            f"critic,1,1,,1,,,,,,{one['q']},,,",
            "",
        ]
        (folder / "log.csv").write_text(
            "\n".join([",".join(run.COLUMNS["log"]), *rows])
        )
    (
        tmp_path / "halfcheetah-medium-v2"
    ).mkdir()  # a training that ended before it began
    figures.report(tmp_path)
    lines = [
        line.split(" | ") for line in (tmp_path / "report.md").read_text().splitlines()
    ]
    table_1 = {line[0][2:]: line[10:13] for line in lines if len(line) == 14}
    runs += [
        ("halfcheetah-medium-v2", {}, "not run"),
        ("average, locomotion", {}, "incomplete (1 of 9)"),
    ]
    runs += [("interquartile mean of all runs", {}, "96.0 [92.0, 100.0]")]
    assert all(
        table_1[name][: len(cells)] == cells for name, _, *cells in runs if cells
    )
    told = capsys.readouterr().out
    assert all(
        x in told
        for x in (
            "no-baseline/",
            "baseline False",
            "not exist",
            "1O",
            "0 diverged, seed 1",
        )
    )
    assert {path.stem for path in tmp_path.glob("*.png")} == {
        "curves",
        "critic",
        "sweep",
    }
    means = [np.array([0.0, 100, 5, -1, 4, 99]), np.array([5.0, 6, 7, 8, 3, 1e9])]
    assert figures.interquartile_mean(means) == pytest.approx(
        (4 + 5 + 5 + 6 + 7 + 8) / 6
    )
