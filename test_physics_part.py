import functools
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import mujoco210

# ---------------------------------------------------------------- until data.make_env is here


@functools.cache
def make_env(task):
    os.environ["D4RL_SUPPRESS_IMPORT_ERROR"] = "1"
    mujoco210.install()
    import d4rl.gym_mujoco
    import d4rl.locomotion.maze_env
    import d4rl.pointmaze
    import gym
    gym.logger.set_level(gym.logger.ERROR)
    d4rl.locomotion.maze_env.print = lambda *args, **kwargs: None
    return gym.make(task)


ROBOTS = ("halfcheetah", "hopper", "walker2d")
TASKS = [f"{robot}-{kind}-v2" for robot in ROBOTS for kind in ("medium", "medium-replay", "medium-expert")]
TASKS += [f"antmaze-{size}-{kind}-v2" for size in ("medium", "large") for kind in ("play", "diverse")]
TASKS += ["antmaze-umaze-v2", "antmaze-umaze-diverse-v2", "maze2d-umaze-v1"]

# ---------------------------------------------------------------- the physics of MuJoCo 2.1.0

# Recorded once with mujoco-py on MuJoCo 2.1.0 (gym 0.23.1, d4rl 1.1, Python 3.9): states, actions and what
# step returned. Most antmaze rows touch a wall, a few with a leg's axis inside it, where other versions fail.
RECORDED = np.load(Path(__file__).with_name("physics210.npz"))
RECORDED_WITH = {"halfcheetah": "halfcheetah-medium-v2", "hopper": "hopper-medium-v2",
                 "walker2d": "walker2d-medium-v2", "antmaze_umaze": "antmaze-umaze-v2",
                 "antmaze_medium": "antmaze-medium-play-v2", "antmaze_large": "antmaze-large-play-v2",
                 "maze2d_umaze": "maze2d-umaze-v1"}
near = functools.partial(np.testing.assert_allclose, rtol=0)


@pytest.fixture(params=RECORDED_WITH)
def recorded(request):
    """What was recorded by its key, the environment, and the MujocoEnv inside it."""
    env, name = make_env(RECORDED_WITH[request.param]), request.param + "/"
    record = {key.removeprefix(name): RECORDED[key] for key in RECORDED.files if key.startswith(name)}
    return record, env, getattr(env.unwrapped, "_wrapped_env", env.unwrapped)


def test_steps_are_those_of_mujoco_210(recorded):
    record, env, inner = recorded
    if "goal" in record:
        inner.set_target(tuple(record["goal"]))

    def play(qpos, qvel, actions):
        inner.sim.reset()  # a simulation also remembers its time and its last accelerations
        inner.set_state(qpos, qvel)
        return [env.unwrapped.step(action) for action in actions][-1]

    rows = zip(record["qpos"], record["qvel"], record["action"])
    obs, reward, done, _ = zip(*(play(qpos, qvel, [action]) for qpos, qvel, action in rows))
    near(obs, record["next_obs"], atol=1e-9)  # seen: 2e-12; a wrong mass or contact gives 1e-3 to 1
    near(reward, record["reward"], atol=1e-9)
    assert np.array_equal(done, record["done"])
    episode, = (key[:-len("obs10")] for key in record if key.endswith("obs10"))
    after_ten = play(*(record[episode + key] for key in ("qpos", "qvel", "actions")))[0]
    near(after_ten, record[episode + "obs10"], atol=1e-6)  # seen: 4e-11, in halfcheetah, which is chaotic


def test_seeds_give_the_resets_of_mujoco_210(recorded):
    record, env, inner = recorded
    for seed in range(4):
        inner.seed(seed)
        np.random.seed(seed)  # antmaze draws its goal from here
        for obs, goal in zip(record["seed_obs"][seed], record["seed_goal"][seed]):
            near(env.reset(), obs, atol=1e-12)
            near(getattr(inner, "target_goal", getattr(inner, "_target", 0)), goal, atol=1e-12)
            env.step(np.zeros(env.action_space.shape))


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs(task):
    env = make_env(task)
    env.seed(0)
    obs = env.reset()
    after, reward, done, _ = env.step(env.action_space.sample())
    assert obs.shape == after.shape == env.observation_space.shape and np.isfinite([*after, reward]).all()
    assert done in (False, True)


@pytest.fixture
def hopper():
    env = make_env("hopper-medium-v2")
    if sys.modules["mujoco_py"] is not mujoco210:
        pytest.skip("mujoco-py itself is installed")
    return env


def test_another_mujoco_is_refused_with_the_cure(hopper, monkeypatch):
    monkeypatch.delitem(sys.modules, "mujoco_py")
    monkeypatch.setattr("mujoco.__version__", "3.2.7")
    with pytest.raises(ImportError, match=r"^mujoco 3\.2\.7 .*: pip install mujoco==3\.2\.6$"):
        mujoco210.install()
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ImportError, match=r"^.* MuJoCo: pip install mujoco==3\.2\.6$"):
        mujoco210.install()
    requirements = Path(__file__).with_name("requirements.txt").read_text()
    assert "mujoco_py" not in sys.modules and re.search(rf"^mujoco=={mujoco210.VERSION} ", requirements, re.M)


def test_an_unstable_simulation_raises(hopper):
    hopper.reset()
    hopper.unwrapped.sim.data.qvel[0] = np.nan
    with pytest.raises(mujoco210.MujocoException, match="^Got MuJoCo Warning: "):
        hopper.step(np.zeros(3))


@pytest.mark.parametrize("mode", ["human", "rgb_array"])
def test_rendering_raises_one_line(hopper, mode):
    with pytest.raises(mujoco210.MujocoException, match="^no rendering[^\n]*$"):
        hopper.render(mode)


def test_a_mujoco_py_that_is_not_built_is_left_alone(hopper, monkeypatch, tmp_path, capfd):
    """It builds itself on import; here that import would fail the test."""
    (tmp_path / "mujoco_py" / "generated").mkdir(parents=True)
    (tmp_path / "mujoco_py" / "__init__.py").write_text("print('building')")
    monkeypatch.setenv("MUJOCO_PY_MUJOCO_PATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mujoco_py")
    assert mujoco210.install() is mujoco210 and capfd.readouterr() == ("", "")
