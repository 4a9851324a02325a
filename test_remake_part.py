"""A section for test_run.py, which has these imports and the first fixture."""

import contextlib
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import h5py
import numpy as np
import pytest
import torch

import data
import remake

torch.set_num_threads(1)
HERE, HOPPER, ANTMAZE = Path(__file__).parent, "hopper-medium-v2", "antmaze-umaze-v2"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))


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
