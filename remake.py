"""D4RL's data made anew by its own recipes, which a reader of the paper may skip.

python remake.py maze2d-umaze-v1            the demo's data, in seconds
python remake.py hopper-medium-replay-v2    SAC's replay buffer, in half an hour or more
python remake.py hopper-medium-v2           a million rows of the policy SAC ends with
python remake.py hopper-medium-expert-v2 --policy ONE.npz OTHER.npz --noise 0.3 0.1
python remake.py antmaze-umaze-v2 --policy ANT.npz
"""

import argparse
import functools
import io
import os
import tempfile
import time

import h5py
import numpy as np
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data
import files
from data import UserError
from models import TwinQ, mlp_layers

# D4RL's own files: rows, trajectories, mean and std of their returns, 1000 / range
D4RL = {
    "halfcheetah-medium-v2": (1_000_000, 1000, 4770, 356, 0.178),
    "halfcheetah-medium-replay-v2": (202_000, 202, 3093, 1681, 0.178),
    "halfcheetah-expert-v2": (1_000_000, 1000, 10656, 442, 0.109),
    "halfcheetah-medium-expert-v2": (2_000_000, 2000, 7713, 2970, 0.086),
    "hopper-medium-v2": (999_906, 2186, 1422, 379, 0.344),
    "hopper-medium-replay-v2": (402_000, 2041, 467, 511, 0.313),
    "hopper-expert-v2": (999_494, 1027, 3511, 329, 0.473),
    "hopper-medium-expert-v2": (1_999_400, 3213, 2090, 1040, 0.290),
    "walker2d-medium-v2": (999_995, 1190, 2852, 1095, 0.236),
    "walker2d-medium-replay-v2": (302_000, 1093, 683, 896, 0.239),
    "walker2d-expert-v2": (999_214, 1000, 4921, 136, 0.235),
    "walker2d-medium-expert-v2": (1_999_209, 2190, 3797, 1312, 0.199),
}
SHOWN = "{:>7}: {} rows, {} trajectories of return {:.4g} ± {:.4g}, 1000 / range {:.3f}"


def write(path, task, recipe, table):
    """Rows s | a | r | terminal | timeout | … as d4rl's file, whole or not at all."""
    columns = np.cumsum([*data.space_sizes(task), 1, 1, 1])
    s, a, r, *ends, _ = np.split(np.float32(table), columns, axis=1)
    r, terminals, timeouts = r[:, 0], *(x[:, 0] != 0 for x in ends)
    returns = data.trajectory_sums(r, terminals | timeouts)
    if task.startswith("antmaze"):  # where a trajectory goes on at the goal
        terminals, returns = r == 1, 1.0 * (data.trajectory_sums(r, timeouts) > 0)
    keys = "observations", "actions", "rewards", "terminals", "timeouts"
    with h5py.File(content := io.BytesIO(), "w") as file:
        file.attrs["task"] = task
        file.attrs["stand_in"] = f"{recipe}, {len(r)} rows; not D4RL's own data"
        for key, x in zip(keys, (s, a, r, terminals, timeouts)):
            file.create_dataset(key, data=x, compression="gzip", shuffle=True)
    path.parent.mkdir(exist_ok=True)
    files.write_atomically(path, content.getvalue())
    print(f"wrote {path}, {len(content.getvalue()) / 1e6:.1f} MB")
    scale = 1000 / np.ptp(returns) if np.ptp(returns) else np.nan
    here = len(r), len(returns), returns.mean(), returns.std(), scale
    for whose, numbers in ("here", here), ("D4RL's", D4RL.get(task)):
        if numbers:
            print(SHOWN.format(whose, *numbers))


def maze2d(path, rows=60_000, seed=0):
    """By D4RL's waypoint controller, which drives to one random cell after another; the
    row after an arrival, which shows the same observation in D4RL's, is left out.
    """
    env = data.make_env(data.DEMO)
    from d4rl.pointmaze import maze_model, waypoint_controller

    controller = waypoint_controller.WaypointController(env.str_maze_spec)
    grid = controller.env
    # slow, and a function of the target's cell
    compute = functools.cache(lambda cells: type(grid).reward_matrix(grid))
    grid.reward_matrix = lambda: compute(grid.gs.spec.tobytes())
    env = maze_model.MazeEnv(env.str_maze_spec)
    data.seed_env(env, seed)
    env.set_target()
    s, arrived, log = env.reset(), False, []
    for _ in range(rows):
        stale = arrived
        a, arrived = controller.get_action(s[:2], s[2:], env._target)
        if not stale:
            near_goal = np.linalg.norm(s[:2] - env.goal_locations[0]) <= 0.5
            log.append([*s, *a, near_goal, False, arrived])
        s_next = env.step(a)[0]
        if arrived:  # s stays, and with it the controller's view, as in D4RL's script
            env.set_target()
        else:
            s = s_next
    write(path, data.DEMO, f"d4rl's waypoint controller, seed {seed}", log)


class SAC:
    """Soft actor-critic (Haarnoja et al., 2018) in rlkit's settings, as D4RL's."""

    def __init__(self, s_dim, a_dim, seed):
        torch.manual_seed(seed)
        self.log_alpha = torch.zeros((), requires_grad=True)
        self.policy = torch.nn.Sequential(*mlp_layers([s_dim, 256, 256, 2 * a_dim]))
        self.q = TwinQ(s_dim, a_dim)
        self.q_target = AveragedModel(self.q, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        trained = *self.policy.parameters(), *self.q.parameters(), self.log_alpha
        self.optimizer = torch.optim.Adam(trained, 3e-4, fused=True)

    def value(self, q, s):
        """For new actions a of the policy Q(s, a) − α log π(a | s), and log π [B]."""
        mean, log_std = self.policy(s).chunk(2, -1)
        normal = Normal(mean, log_std.clamp(-20, 2).exp())
        actions = TransformedDistribution(normal, TanhTransform(cache_size=1))
        a = actions.rsample()
        log_density, alpha = actions.log_prob(a).sum(-1), self.log_alpha.detach().exp()
        return q(s, a).amin(-2) - alpha * log_density, log_density

    def step(self, s, a, r, terminal, timeout, s_next):
        """A gradient step of policy, Q and temperature α; all [B, ...], r [B, 1]."""
        with torch.no_grad():
            v_next, _ = self.value(self.q_target, s_next)
            target = r[:, 0] + 0.99 * (1 - terminal[:, 0]) * v_next
        q_loss = ((self.q(s, a) - target) ** 2).mean(-1).sum()
        self.q.requires_grad_(False)  # which the policy's loss does not train
        v, log_density = self.value(self.q, s)
        self.q.requires_grad_(True)
        temperature_loss = -self.log_alpha * (log_density.detach() - a.shape[1]).mean()
        self.optimizer.zero_grad()
        (q_loss - v.mean() + temperature_loss).backward()
        self.optimizer.step()
        self.q_target.update_parameters(self.q)


class NoisyPolicy(data.NumpyPolicy):
    """tanh of a Gaussian, whose mean and log std are the network's output."""

    def __call__(self, obs, rng):
        mean, log_std = np.split(self.output(obs), 2)
        noise = np.exp(log_std.clip(-20, 2)) * rng.standard_normal(len(mean))
        return np.tanh(mean + noise)


def transitions(env, policy, rng):
    """Rows s | a | r | terminal | timeout | s_next of policy(s, rng), without end."""
    data.seed_env(env, int(rng.integers(2**31)))
    s = env.reset()
    while True:
        a = np.float32(policy(s, rng))
        s_next, r, done, info = env.step(a.astype(np.float64))
        timeout = info.get("TimeLimit.truncated", False)
        yield np.float32([*s, *a, r, done and not timeout, timeout, *s_next])
        s = env.reset() if done else s_next


def replay(path, task, rows, seed):
    """SAC's replay buffer, until 10,000 rows return as much as D4RL's medium policy."""
    torch.set_num_threads(1)
    enough = D4RL[task.replace("-replay", "")][2]
    s_dim, a_dim = data.space_sizes(task)
    sac, widths = SAC(s_dim, a_dim, seed), [s_dim, a_dim, 1, 1, 1, s_dim]
    # views, which see every step of SAC
    weights = [x.detach().numpy() for x in sac.policy.parameters()]
    policy = NoisyPolicy(zip(weights[::2], weights[1::2]))
    table, total, episodes = torch.zeros(rows, sum(widths)), 0.0, []

    def act(s, rng):
        return policy(s, rng) if row > 1000 else rng.uniform(-1, 1, a_dim)

    steps = transitions(data.make_env(task), act, np.random.default_rng(seed))
    with files.progress(task, " rows", rows) as bar:
        for row in range(1, rows + 1):
            table[row - 1] = torch.from_numpy(next(steps))
            r, *ends = table[row - 1, s_dim + a_dim :][:3].tolist()
            total += r
            if any(ends):
                episodes, total = [*episodes, (row, total)], 0.0
                mean = np.mean([x for end, x in episodes if end > row - 10_000])
                bar.note = f"return {mean:.0f} of {enough}"
                if mean >= enough:
                    break
            if row >= 1000:
                sac.step(*table[torch.randint(row, (256,))].split(widths, -1))
            bar.update()
    write(path, task, f"replay buffer of SAC, seed {seed}", table[:row])
    np.savez(content := io.BytesIO(), *weights)
    files.write_atomically(path.with_suffix(".npz"), content.getvalue())
    print(f"wrote {path.with_suffix('.npz')}, the policy that SAC ended with")


def read_policy(path, noise, task):
    """Layers of a tanh-Gaussian policy, from a .npz of W0 b0 W1 b1 W2 b2, whose outputs
    are mean and log std, or one as of D4RL's ant. noise: None, or for the file's std.
    """
    s_dim, a_dim = data.space_sizes(task)
    try:
        weights = dict(np.load(path))
        for x in "Wb" if "W_fc0" in weights else "":
            heads = [weights.pop(f"{x}_last_fc{name}") for name in ("", "_log_std")]
            weights[f"{x}_last"] = np.concatenate(heads)
        weights = [np.float32(x) for x in weights.values()]
        if noise:
            weights[-2][a_dim:], weights[-1][a_dim:] = 0, np.log(noise)
        layers = [*zip(weights[::2], weights[1::2])]
        action = NoisyPolicy(layers)(np.zeros(s_dim), np.random.default_rng(0))
        assert action.shape == (a_dim,) and np.isfinite(action).all()
    except Exception as error:  # of many kinds
        raise UserError(f"{path} is no policy for {task}: {error!r:.200}") from None
    return layers


def antmaze(task, policy, rng):
    """The environment and the acting policy of D4RL's script: it walks to waypoints,
    whose direction it gets as obs[27:29], with noise N(0, 0.2²); 1,001 rows an episode.
    """
    np.random.seed(0)  # for the rewards, which are of one of an evaluation's goals
    goal = data.make_env(task).unwrapped.target_goal
    from d4rl.locomotion import ant, maze_env
    from gym.wrappers import TimeLimit, TransformObservation, TransformReward

    mazes = {"umaze": "U_MAZE", "medium": "BIG_MAZE", "large": "HARDEST_MAZE"}
    cells = getattr(maze_env, mazes[task.split("-")[1]])
    if "diverse" in task:  # the ant's goals are anywhere, else in hand-picked cells
        cells = [[0 if x == maze_env.GOAL else x for x in row] for row in cells]
    how = {"maze_size_scaling": 4.0, "non_zero_reset": task != "antmaze-umaze-v2"}
    env = ant.make_ant_maze_env(maze_map=cells, v2_resets=True, **how)
    maze = env._wrapped_env
    search = functools.cache(maze._get_best_next_rowcol)  # slow
    maze._get_best_next_rowcol = lambda here, to: search(tuple(here), tuple(to))
    env = TransformObservation(TimeLimit(env, 1001), lambda s: s[:29])
    env = TransformReward(env, lambda r: np.linalg.norm(maze.get_xy() - goal) <= 0.5)

    def walk(s, direction):
        direction = np.array(direction) / np.linalg.norm(direction) * 10
        a = policy(np.concatenate([s[2:], direction]), rng)
        return (a + 0.2 * rng.standard_normal(len(a))).clip(-1, 1)

    controller = maze.create_navigation_policy(walk)
    return env, lambda s, rng: controller(s)


def roll_out(task, layers, rows, seed, tally=os.devnull):
    """So many rows of a policy; the file tally grows by a byte for each."""
    policy, log, rng = NoisyPolicy(layers), [], np.random.default_rng(seed)
    is_ant = task.startswith("antmaze")
    env, act = antmaze(task, policy, rng) if is_ant else (data.make_env(task), policy)
    with open(tally, "ab", 0) as file:
        for _, row in zip(range(rows), transitions(env, act, rng)):
            log.append(row)
            file.write(b".")
    timeout = sum(data.space_sizes(task)) + 2
    log[-1][timeout] = not log[-1][timeout - 1]  # if it isn't terminal, it ends here
    return np.array(log)


def roll_outs(task, rows, seed, policies):
    """Rows of each policy in turn; part i, of ten a policy, depends on seed and i."""
    bar, log = files.progress(task, " rows", rows), []
    sizes = map(len, np.array_split(range(rows), 10 * len(policies)))
    with tempfile.NamedTemporaryFile() as tally, bar, data.Workers() as workers:
        submit = functools.partial(workers.pool.submit, roll_out, task)
        jobs = [(policies[i // 10], n, [seed, i]) for i, n in enumerate(sizes) if n]
        for part in [submit(*job, tally.name) for job in jobs]:
            while not part.done():
                time.sleep(0.2)
                bar.update(os.path.getsize(tally.name) - bar.n)
            log.append(part.result())
    return np.concatenate(log)


def make(arguments):
    """What the command line asks for; UserError for what its user can mend."""
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = files.Parser(prog="remake.py", description=__doc__, **how)
    add = parser.add_argument
    add("task", choices=sorted({*data.TASKS, *D4RL}), metavar="task")
    add("--rows", type=files.positive, help="default: about as many as D4RL's file has")
    add("--seed", type=files.whole, default=0, help="default: 0")
    add("--policy", type=files.folder, nargs="+", default=[], help="what to roll out")
    add("--noise", type=float, nargs="+", default=[], help="default: the file's std")
    task, rows, seed, policy, noise = vars(parser.parse_args(arguments)).values()
    path, replayed = data.stand_in_path(task), task.replace("medium", "medium-replay")
    by_itself = "replay" in task or task == data.DEMO
    needed = 0 if by_itself else 1 + ("medium-expert" in task)
    if not policy and task.endswith("-medium-v2"):  # what SAC ended with
        policy = [data.stand_in_path(replayed).with_suffix(".npz")]
        if not policy[0].exists():
            raise UserError(f"name a --policy, or make one: remake.py {replayed}")
    if len(policy) != needed or len(noise) not in (0, needed):
        raise UserError(f"{task} needs {needed} --policy files, and as many --noise")
    if not 0 <= seed < 2**31 or not all(0 < x < np.inf for x in noise):
        raise UserError("--seed must be from 0 to 2147483647, --noise above 0")
    for made in path, path.with_suffix(".npz"):
        if made.exists():
            raise UserError(f"{made} exists and stays as it is: move or remove it")
    pairs = zip(policy, noise or [None] * needed)
    policies = [read_policy(*pair, task) for pair in pairs]
    tempfile.TemporaryFile(dir=data.data_folder()).close()  # fails now, not at the end
    if task == data.DEMO:
        maze2d(path, rows or 60_000, seed)
    elif by_itself:
        replay(path, task, rows or D4RL[task][0], seed)
    else:
        table = roll_outs(task, rows or needed * 10**6, seed, policies)
        noise, names = noise or "as in the file", " and ".join(x.name for x in policy)
        write(path, task, f"roll-outs of {names}, noise {noise}, seed {seed}", table)


def main(arguments=None):
    """The command line; returns 0, 2 for what its user can mend, 130 after Ctrl-C."""
    status = files.program("remake", lambda: make(arguments))
    if status == 130:
        files.say("remake: stopped; nothing is kept")
    return status


if __name__ == "__main__":
    raise SystemExit(main())
