import hashlib
import os
import subprocess
import sys
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import requests

import data

HOPPER = "hopper-medium-v2"


def random_file(rows=40, s_dim=11, a_dim=3, seed=0):
    """Trajectories of 8 rows; every second ends at a time limit, the others at a terminal."""
    rng, step = np.random.default_rng(seed), np.arange(1, rows + 1)
    return {"observations": rng.normal(size=(rows, s_dim)), "actions": rng.uniform(-1, 1, (rows, a_dim)),
            "rewards": rng.normal(size=rows), "terminals": step % 16 == 8, "timeouts": step % 16 == 0}


def quiet(line):
    pass


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(task, arrays or a function of the open file): the path of the task's file in an empty cache."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))

    def write(task, content, mark="stand_in"):
        path = tmp_path / data.FILES[task][0]
        with h5py.File(path, "w") as file:
            file.attrs[mark] = "test"
            content(file) if callable(content) else file_all(file, content)
        return path
    return write


def file_all(file, arrays):
    for key, value in arrays.items():
        file[key] = value


def refusal(task=HOPPER, **options):
    with pytest.raises(data.UserError) as caught:
        data.load(task, log=quiet, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("reward_shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("missing", [(), ("timeouts",), ("terminals",), ("terminals", "timeouts")])
def test_transitions_are_those_of_d4rl_qlearning_dataset(missing, reward_shape, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64)  # several blocks, and rows at their edges
    rng = np.random.default_rng(1)
    raw = random_file(1000, seed=2)
    raw["terminals"], raw["timeouts"] = rng.random((2, 1000)) < [[0.03], [0.05]]
    raw = {key: value for key, value in raw.items() if key not in missing}
    reference = data.import_d4rl().qlearning_dataset(SimpleNamespace(_max_episode_steps=20),
                                                     {"terminals": np.zeros(1000, bool), **raw})
    raw["rewards"] = raw["rewards"].reshape(reward_shape)
    ours = data.qlearning_transitions(raw, max_episode_steps=20)
    for mine, theirs in zip(("s", "a", "s_next", "r", "terminal"),
                            ("observations", "actions", "next_observations", "rewards", "terminals")):
        np.testing.assert_array_equal(ours[mine], reference[theirs])
        assert ours[mine].dtype == np.float32


def test_locomotion_rewards_are_scaled_by_the_range_of_whole_trajectories(write):
    raw = random_file(rows=12)
    raw["rewards"] = np.array([1, 1, 1, 9, 2, 2, 2, 2, 5, 5, 5, 100.0])
    raw["terminals"], raw["timeouts"] = np.isin(np.arange(12), [5, 11]), np.arange(12) == 3
    write(HOPPER, raw)
    dataset = data.load(HOPPER, log=quiet)
    # Row 3 (time limit) and the file's last row go: returns 3, 4, 19. By terminals only, as released: 7.
    expected = 1000 / 16 * np.delete(raw["rewards"], [3, 11])
    np.testing.assert_allclose(data.columns(*dataset[:3])["r"], expected, rtol=1e-6)
    assert dataset.info["reward_scale"] == pytest.approx(1000 / 16)
    assert dataset.info["reward_scale_released_code"] is None  # one return, no range
    score = data.normalized_score(HOPPER, (4 * 12 + 2 * 4 + 6 * 119) / 12)  # weighted by rows
    assert dataset.info["data_score"] == pytest.approx(score)
    assert (dataset.info["rows"], dataset.info["episodes"], dataset.info["kind"]) == (10, 3, "stand-in")
    assert dataset.table.flags.c_contiguous and dataset.table.shape == (10, 2 * 11 + 3 + 2)


@pytest.mark.parametrize("terminals, length, ranges", [([], 3000, [1000] * 3), ([499], 1700, [500, 1000])])
def test_released_reward_range_counts_a_thousand_rows_between_terminals(terminals, length, ranges):
    terminal = np.isin(np.arange(length), terminals)
    ends = terminal | data.counted_limits(terminal, 1000, after_terminal=0)
    assert data.segment_returns(np.ones(length), ends).tolist() == ranges


def test_antmaze_rewards_are_less_one_and_its_score_counts_episodes(write):
    raw = random_file(s_dim=29, a_dim=8) | {"rewards": np.float32(np.isin(np.arange(40), [7, 20, 21]))}
    raw["terminals"], raw["timeouts"] = raw["rewards"] == 1, np.arange(40) % 10 == 9
    raw["observations"][:, :2] = 50 * (np.arange(40) < 8)[:, None]  # a reset after row 7, none after 20, 21
    write("antmaze-umaze-v2", raw)
    dataset = data.load("antmaze-umaze-v2", log=quiet)
    r = data.columns(*dataset[:3])["r"]
    assert set(r) == {-1, 0} and (r == 0).sum() == 3
    assert dataset.info["episodes"] == 5 and dataset.info["data_score"] == pytest.approx(40)


def test_actions_outside_are_clipped_and_counted(write):
    raw, lines = random_file(), []
    raw["actions"][[2, 5], [0, 1]] = -1.0001, 3
    write(HOPPER, raw)
    dataset = data.load(HOPPER, log=lines.append)
    assert np.abs(data.columns(*dataset[:3])["a"]).max() == 1 and dataset.info["clipped_actions"] == 2
    assert any("2 action components" in line for line in lines)


def with_item(key, make):
    """A file in which this key is what make(file) gives."""
    def content(file):
        file_all(file, random_file())
        del file[key]
        file[key] = make(file)
    return content


def unwritten(file):
    for key, shape in (("observations", (10**6, 11)), ("actions", (10**6, 3)), ("rewards", (10**6,))):
        file.create_dataset(key, shape, "f4", chunks=True)


def virtual(file):
    layout = h5py.VirtualLayout((40, 11), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "observations", (40, 11))
    file.create_virtual_dataset("moved", layout)
    return file["moved"]


@pytest.mark.parametrize("content, words", [
    (with_item("observations", lambda file: h5py.ExternalLink("/etc/passwd", "/x")), "no plain array"),
    (with_item("rewards", lambda file: h5py.SoftLink("/actions")), "no plain array"),
    (with_item("observations", virtual), "no plain array"),
    (with_item("observations", lambda file: file.create_dataset(
        "x", (40, 11), "f4", external=[("/etc/passwd", 0, 40 * 44)])), "no plain array"),
    (with_item("observations", lambda file: file.create_group("x")), "no plain array"),
    (with_item("observations", lambda file: file.create_dataset("x", (10**12, 11), "f4", chunks=(1, 11))),
     "1000000000000 rows"),
    (unwritten, "but stores 0"),
    (with_item("actions", lambda file: file.create_dataset("x", (40, 3), h5py.ref_dtype)), "no plain array"),
    ({"rewards": np.full(40, b"1.0")}, "no plain array"),
    ({"rewards": np.ones(40, complex)}, "no plain array"),
    ({"rewards": np.ones(39)}, "shape (39,)"),
    ({"terminals": np.zeros((40, 2), bool)}, "shape (40, 2)"),
    ({"observations": np.zeros((40, 17))}, "shape (40, 17)"),
    ({"actions": 1.0}, "shape ()"),
    ({"observations": np.full((40, 11), np.nan)}, "NaN or infinite observations"),
    ({"observations": np.full((40, 11), 1e300)}, "NaN or infinite observations"),
    ({"actions": np.full((40, 3), np.inf)}, "NaN or infinite actions"),
    ({"rewards": np.full(40, -np.inf)}, "NaN or infinite rewards"),
    ({"rewards": np.zeros(40)}, "equal return"),
    ({"terminals": np.zeros(40), "timeouts": np.zeros(40)}, "no whole trajectory"),
    ({"timeouts": np.ones(40)}, "no whole trajectory"),
    (lambda file: file_all(file, {"observations": np.zeros((40, 11))}), "no plain array of numbers actions"),
    (lambda file: file_all(file, {key: value[:0] for key, value in random_file().items()}), "0 rows"),
    (lambda file: file_all(file, {key: value[:1] for key, value in random_file().items()}), "1 rows")])
def test_a_crafted_file_is_refused_in_one_line(content, words, write):
    path = write(HOPPER, content if callable(content) else random_file() | content)
    line = refusal()
    assert words in line and f"rm {path}" in line


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not HDF5", lambda b: b"",
                                    lambda b: b[:96] + bytes(1000) + b[1096:]])
def test_a_damaged_file_is_named_with_the_command_that_removes_it(damage, write):
    path = write(HOPPER, random_file())
    path.write_bytes(damage(path.read_bytes()))
    line = refusal(any_data=True)
    assert "truncated, damaged or not HDF5" in line and f"rm {path}" in line


def test_a_file_of_unknown_origin_needs_any_data(write):
    write(HOPPER, random_file(), mark="generated")  # this word serves the demo's file only
    assert "--any-data" in refusal()
    assert data.load(HOPPER, any_data=True, log=quiet).info["kind"] == "any"


def test_antmaze_without_success_and_a_folder_in_the_files_place_are_refused(write):
    path = write("antmaze-umaze-v2", random_file(s_dim=29, a_dim=8))
    assert "reward of 1" in refusal("antmaze-umaze-v2")
    path.unlink()
    path.mkdir()
    assert "not a file" in refusal("antmaze-umaze-v2")


@pytest.mark.parametrize("task, near", [
    ("hoper-medium-v2", HOPPER), ("../" + HOPPER, HOPPER), ("/etc/passwd\n", data.DEMO)])
def test_a_wrong_task_is_refused_with_the_nearest_names(task, near):
    assert near in refusal(task)


def test_file_names_are_those_of_d4rls_urls():
    urls = data.import_d4rl().infos.DATASET_URLS
    assert {task: os.path.basename(urls[task]) for task in data.TASKS} == {
        **{task: name for task, (name, *_) in data.FILES.items()}, data.DEMO: data.DEMO_FILE}


def answer(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("no", response=response)


@pytest.mark.parametrize("first, second, words", [
    (requests.ConnectionError("x\ny"), answer(404), "server: ConnectionError, mirror: 404"),
    (answer(403), b"other bytes", "server: 403, mirror: wrong SHA-256"),
    (OSError(28, "No space left on device"), None, "No space left"),
    (answer(403), b"right bytes", None)])
def test_downloads_are_verified_and_fail_in_one_line(first, second, words, tmp_path, monkeypatch):
    asked = []

    def fetch(self, url, output_file, pooch, check_only=False):
        asked.append(url)
        reply = (first, second)[len(asked) - 1]
        if isinstance(reply, Exception):
            raise reply
        with open(output_file, "wb") as file:
            file.write(reply)
    name, size, _ = data.FILES[HOPPER]
    right = hashlib.sha256(b"right bytes").hexdigest()
    monkeypatch.setitem(data.FILES, HOPPER, (name, size, right))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "new"))
    monkeypatch.setattr("pooch.HTTPDownloader.__call__", fetch)
    line = refusal()
    if words is None:
        assert (tmp_path / "new" / name).read_bytes() == b"right bytes" and asked[1] == data.MIRROR + name
    else:
        assert words in line and str(tmp_path / "new" / name) in line and os.listdir(tmp_path / "new") == []
        assert "No space" in line or right in line


def test_maze2d_data_is_what_d4rls_script_makes_and_a_function_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = tmp_path / data.DEMO_FILE
    data.generate_maze2d(path, rows=400)
    first = path.read_bytes()
    np.random.seed(7)
    data.generate_maze2d(path, rows=400)
    assert path.read_bytes() == first and os.listdir(tmp_path) == [path.name]

    from d4rl.pointmaze import maze_model, waypoint_controller  # the script's loop, with nothing remembered
    env = maze_model.MazeEnv(data.make_env(data.DEMO).str_maze_spec)
    controller = waypoint_controller.WaypointController(env.str_maze_spec)
    data.seed_env(env, 0)
    env.set_target()
    s, expected, ends = env.reset(), [], []
    for _ in range(400):
        a, done = controller.get_action(s[:2], s[2:4], env._target)
        expected.append([*s, *a, np.linalg.norm(np.float32(s[:2]) - 1) <= 0.5])
        ends.append(done)
        after = env.step(a)[0]
        s = s if done else after
        if done:
            env.set_target()
    with h5py.File(path) as file:
        stored = np.column_stack([file["observations"], file["actions"], file["rewards"]])
        np.testing.assert_array_equal(stored, np.float32(expected))
        np.testing.assert_array_equal(file["terminals"], ends)

    dataset = data.load(data.DEMO, log=quiet)
    kept = [i for i in range(399) if not ends[i] and not (i and ends[i - 1])]
    table = data.columns(*dataset[:3])
    np.testing.assert_array_equal(table["s"], stored[kept, :4])
    np.testing.assert_array_equal(table["s_next"], stored[np.add(kept, 1), :4])
    assert not table["terminal"].any() and dataset.info["kind"] == "generated" and sum(ends) >= 3
    score = 100 * (stored[:300, 6].sum() - 23.85) / (161.86 - 23.85)  # of the one window of 300 rows
    assert dataset.info["data_score"] == pytest.approx(score)


class Quitter:
    def __call__(self, obs, rng):
        os._exit(1)


def test_returns_are_functions_of_seed_and_episode_to_the_last_bit():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(8, 11)), rng.normal(size=(3, 8))
    network = data.NumpyPolicy([(weights[0], np.ones(8)), (weights[1], np.ones(3))])
    policies = [(0, data.RandomPolicy(3)), (1, data.RandomPolicy(3)), (0, network)]
    expected = [data.run_episodes(HOPPER, *policy, [2, 0, 1]) for policy in policies[::-1]]
    expected = np.roll(expected[::-1], -1, axis=1)
    assert len(np.unique(expected)) == 9
    returns, scores = data.evaluate(policies, HOPPER, 3, workers=1)
    np.testing.assert_array_equal(returns, expected)
    np.testing.assert_allclose(scores, 100 * (expected + 20.272305) / (3234.3 + 20.272305), rtol=1e-12)
    with data.Evaluator(HOPPER, workers=2) as evaluator:
        evaluations = [evaluator.submit(policies[first:], 3) for first in (0, 1)]
        np.testing.assert_array_equal(evaluations[1].result(), expected[1:])
        np.testing.assert_array_equal(evaluations[0].result(), expected)
        assert evaluations[0].done()
        with pytest.raises(data.UserError, match="died"):
            evaluator.submit([(0, Quitter())], 3).result()
        with pytest.raises(data.UserError, match="died"):
            evaluator.submit(policies, 3)


def test_numpy_policy_is_a_relu_network_with_tanh():
    layers = [(np.eye(2), np.array([0.0, -1])), (np.array([[1.0, 2]]), np.array([0.5]))]
    assert data.NumpyPolicy(layers)(np.array([-3.0, 2]), None) == pytest.approx(np.tanh([0 + 2 * 1 + 0.5]))


@pytest.mark.parametrize("task", [HOPPER, "antmaze-umaze-v2", "antmaze-large-diverse-v2", data.DEMO])
def test_a_seed_fixes_start_goal_and_actions(task):
    env, seen = data.make_env(task), []
    for seed in (3, 4, 3):
        np.random.rand()
        env.reset()
        data.seed_env(env, seed)
        start = env.reset()
        seen.append((*start, *getattr(env.unwrapped, "target_goal", ()), *env.action_space.sample()))
    assert seen[0] == seen[2]
    assert np.not_equal(seen[0], seen[1])[:2].all() and np.not_equal(seen[0], seen[1])[-5:].all()


def test_importing_is_light_and_environments_are_quiet():
    code = ("import sys, data; heavy = {'torch', 'h5py', 'gym', 'd4rl', 'pooch', 'tqdm'} & set(sys.modules);"
            "env = data.make_env('antmaze-umaze-v2'); data.seed_env(env, 0); env.reset();"
            "env.step(env.action_space.sample()); sys.exit(str(heavy) if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
