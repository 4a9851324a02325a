"""D4RL's data made anew by its own recipes, where its files can't be had; a reader of
the paper may skip it. The files go to a folder of their own, stand-in, beside D4RL's.

python remake.py maze2d-umaze-v1            the demo's data, in seconds
python remake.py hopper-medium-replay-v2    SAC's replay buffer, in half an hour or more
python remake.py hopper-medium-v2           a million rows of the policy SAC ends with
python remake.py hopper-medium-v2 --policy FILE.npz --noise 0.3     of any policy
python remake.py hopper-medium-expert-v2 --policy ONE.npz OTHER.npz --noise 0.3 0.1
python remake.py antmaze-umaze-v2 --policy ANT.npz
"""

import argparse
import functools
import io
import math
import os
import sys
import tempfile
import time

import h5py
import numpy as np
import torch
from torch import nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import data
import files
from data import UserError
from models import TwinQ, mlp_layers

# D4RL's own files: rows, trajectories, and of their returns mean, std, least, most
D4RL = {
    "halfcheetah-medium-v2": (1_000_000, 1000, 4770, 356, -310, 5309),
    "halfcheetah-medium-replay-v2": (202_000, 202, 3093, 1681, -638, 4985),
    "halfcheetah-expert-v2": (1_000_000, 1000, 10656, 442, 2046, 11252),
    "halfcheetah-medium-expert-v2": (2_000_000, 2000, 7713, 2970, -310, 11252),
    "hopper-medium-v2": (999_906, 2186, 1422, 379, 316, 3222),
    "hopper-medium-replay-v2": (402_000, 2041, 467, 511, -1, 3193),
    "hopper-expert-v2": (999_494, 1027, 3511, 329, 1645, 3759),
    "hopper-medium-expert-v2": (1_999_400, 3213, 2090, 1040, 316, 3759),
    "walker2d-medium-v2": (999_995, 1190, 2852, 1095, -7, 4227),
    "walker2d-medium-replay-v2": (302_000, 1093, 683, 896, -50, 4132),
    "walker2d-expert-v2": (999_214, 1000, 4921, 136, 763, 5012),
    "walker2d-medium-expert-v2": (1_999_209, 2190, 3797, 1312, -7, 5012),
}
ANTMAZE = [task for task in data.TASKS if task.startswith("antmaze")]


def write(path, task, recipe, table):
    """A file that d4rl and data.py read, whole or not at all; says what is in it.

    table: rows s | a | r | terminal | timeout [N, S + A + 3], or wider.
    """
    columns = np.cumsum([*data.space_sizes(task), 1, 1, 1])
    s, a, r, *ends, _ = np.split(np.float32(table), columns, axis=1)
    r, terminals, timeouts = r[:, 0], *(x[:, 0] != 0 for x in ends)
    arrays = {"observations": s, "actions": a, "rewards": r}
    arrays |= {"terminals": terminals, "timeouts": timeouts}
    with h5py.File(content := io.BytesIO(), "w") as file:
        file.attrs["task"] = task
        file.attrs["stand_in"] = f"{recipe}, {len(r)} rows; not D4RL's own data"
        for key, x in arrays.items():
            file.create_dataset(key, data=x, compression="gzip", shuffle=True)
    path.parent.mkdir(exist_ok=True)
    files.write_atomically(path, content.getvalue())
    print(f"wrote {path}, {len(content.getvalue()) / 1e6:.1f} MB")
    ends = timeouts if task in ANTMAZE else terminals | timeouts
    returns = data.trajectory_sums(r, ends)
    of_returns = returns.mean(), returns.std(), returns.min(), returns.max()
    shown = "{:>7}: {} rows, {} trajectories; return {:.0f} ± {:.0f}, {:.0f} to {:.0f}"
    print(shown.format("here", len(r), len(returns), *of_returns))
    if task in D4RL and np.ptp(returns):
        print(shown.format("D4RL's", *D4RL[task]))
        scales = [1000 / (most - least) for *_, least, most in (of_returns, D4RL[task])]
        print("reward scale {:.3f}, D4RL's {:.3f}".format(*scales))


def maze2d(path, rows=60_000, seed=0):
    """A waypoint controller drives to one random cell after another, as in D4RL's
    script, without noise.

    An arrival is a timeout; rewards are 1 near the goal. The script shows the
    observation at an arrival twice: here the second row is left out.
    """
    env = data.make_env(data.DEMO)
    from d4rl.pointmaze import maze_model, waypoint_controller

    controller = waypoint_controller.WaypointController(env.str_maze_spec)
    grid = controller.env
    # slow, and a function of the target's cell
    compute = functools.cache(lambda cells: type(grid).reward_matrix(grid))
    grid.reward_matrix = lambda: compute(grid.gs.spec.tobytes())
    limit, env = env.spec.max_episode_steps, maze_model.MazeEnv(env.str_maze_spec)
    data.seed_env(env, seed)
    env.set_target()
    s, steps, arrived, log = env.reset(), 0, False, []
    for _ in range(rows):
        stale = arrived
        a, arrived = controller.get_action(s[:2], s[2:], env._target)
        arrived = arrived or steps >= limit
        if not stale:
            near_goal = np.linalg.norm(s[:2] - env.goal_locations[0]) <= 0.5
            log.append([*s, *a, near_goal, False, arrived])
        s_next, steps = env.step(a)[0], steps + 1
        if arrived:  # s stays: the next row shows it again, as in D4RL's script
            env.set_target()
            steps = 0
        else:
            s = s_next
    write(path, data.DEMO, f"d4rl's waypoint controller, seed {seed}", log)


class SAC:
    """Soft actor-critic (Haarnoja et al., 2018) in rlkit's settings, as D4RL's. Not
    compiled, since that gains nothing here.
    """

    def __init__(self, s_dim, a_dim, seed):
        torch.manual_seed(seed)
        self.sizes, self.log_alpha = (s_dim, a_dim), torch.zeros((), requires_grad=True)
        self.policy = nn.Sequential(*mlp_layers([s_dim, 256, 256, 2 * a_dim]))
        self.q = TwinQ(s_dim, a_dim)
        self.q_target = AveragedModel(self.q, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        trained = *self.policy.parameters(), *self.q.parameters(), self.log_alpha
        self.optimizer = torch.optim.Adam(trained, 3e-4, fused=True)

    def act(self, s):
        """Actions tanh(mean + std ε) [B, A] and their log-densities [B]."""
        mean, log_std = self.policy(s).chunk(2, -1)
        normal = Normal(mean, log_std.clamp(-20, 2).exp())
        actions = TransformedDistribution(normal, TanhTransform(cache_size=1))
        a = actions.rsample()
        return a, actions.log_prob(a).sum(-1)

    def step(self, rows):
        """A gradient step of policy, Q and temperature α; rows as of `transitions`."""
        s_dim, a_dim = self.sizes
        s, a, rest, s_next = rows.split([s_dim, a_dim, 3, s_dim], -1)
        r, terminal, _ = rest.unbind(-1)
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            a_next, log_density = self.act(s_next)
            v_next = self.q_target(s_next, a_next).amin(-2) - alpha * log_density
            target = r + 0.99 * (1 - terminal) * v_next
        q_loss = ((self.q(s, a) - target) ** 2).mean(-1).sum()
        a, log_density = self.act(s)
        fixed = {name: x.detach() for name, x in self.q.named_parameters()}
        q = torch.func.functional_call(self.q, fixed, (s, a)).amin(-2)
        policy_loss = (alpha * log_density - q).mean()
        temperature_loss = -self.log_alpha * (log_density.detach() - a_dim).mean()
        self.optimizer.zero_grad()
        (q_loss + policy_loss + temperature_loss).backward()
        self.optimizer.step()
        self.q_target.update_parameters(self.q)


class NoisyPolicy(data.NumpyPolicy):
    """tanh of a Gaussian, whose mean and log std are the network's output."""

    def __call__(self, obs, rng):
        mean, log_std = np.split(self.output(obs), 2)
        std = np.exp(log_std.clip(-20, 2))
        return np.tanh(mean + std * rng.standard_normal(len(mean)))


def transitions(task, policy, rng):
    """Rows s | a | r | terminal | timeout | s_next of policy(s, rng), without end."""
    env = data.make_env(task)
    data.seed_env(env, int(rng.integers(2**31)))
    s = env.reset()
    while True:
        a = np.float32(policy(s, rng))
        s_next, r, done, info = env.step(a.astype(np.float64))
        timeout = info.get("TimeLimit.truncated", False)
        yield np.float32([*s, *a, r, done and not timeout, timeout, *s_next])
        s = env.reset() if done else s_next


def replay(path, task, rows, seed):
    """SAC's whole replay buffer, until the episodes of its last 10,000 rows return as
    much as D4RL's medium policy, or it has so many rows; and its last policy (.npz).
    """
    torch.set_num_threads(1)
    enough = D4RL[task.replace("-replay", "")][2]
    s_dim, a_dim = data.space_sizes(task)
    sac, table = SAC(s_dim, a_dim, seed), torch.zeros(rows, 2 * s_dim + a_dim + 3)
    # views, which see every step of SAC
    weights = [x.detach().numpy() for x in sac.policy.parameters()]
    policy = NoisyPolicy(zip(weights[::2], weights[1::2]))
    row, total, episodes = 0, 0.0, []

    def act(s, rng):
        return rng.uniform(-1, 1, a_dim) if row < 1000 else policy(s, rng)

    steps = transitions(task, act, np.random.default_rng(seed))
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
                sac.step(table[torch.randint(row, (256,))])
            bar.update()
    write(path, task, f"replay buffer of SAC, seed {seed}", table[:row])
    np.savez(content := io.BytesIO(), *weights)
    files.write_atomically(path.with_suffix(".npz"), content.getvalue())
    print(f"wrote {path.with_suffix('.npz')}, the policy that SAC ended with")


def read_policy(path, task, noise):
    """The layers (weight [out, in], bias [out]), … of a tanh-Gaussian policy.

    A .npz of W0 b0 W1 b1 W2 b2, the last of them for mean and log std, or named as that
    of D4RL's ant. noise: a std in place of the file's, or None.
    """
    s_dim, a_dim = data.space_sizes(task)
    try:
        weights = dict(np.load(path))
        for x in "Wb" if "W_fc0" in weights else "":
            heads = [weights.pop(f"{x}_last_fc{name}") for name in ("", "_log_std")]
            weights[f"{x}_last"] = np.concatenate(heads)
        weights = [np.float32(x) for x in weights.values()]
        if noise:
            weights[-2][a_dim:], weights[-1][a_dim:] = 0, math.log(noise)
        layers = [*zip(weights[::2], weights[1::2])]
        action = NoisyPolicy(layers)(np.zeros(s_dim), np.random.default_rng(0))
        assert action.shape == (a_dim,) and np.isfinite(action).all()
    except Exception as error:  # of many kinds
        raise UserError(f"{path} is no policy for {task}: {error!r:.200}") from None
    return layers


def antmaze(task, policy, rng):
    """Rows s | a | r | terminal | timeout by D4RL's script, without end.

    The policy walks to waypoints, whose direction it gets as obs[27:29]; N(0, 0.2²) is
    added to its actions, episodes have 1,001 rows, r is 1 at an evaluation's goal.
    """
    evaluation = data.make_env(task)
    np.random.seed(0)  # draws goals, starts and waypoints
    evaluation.reset()
    goal, seed = evaluation.unwrapped.target_goal, int(rng.integers(2**31))
    from d4rl.locomotion import ant, maze_env

    # D4RL's file names tell its script's arguments
    _, _, maze, _, _, starts, _, goals, *_ = data.path_of(task).stem.split("_")
    cells = getattr(maze_env, maze.replace("-", "_").upper())
    if goals == "True":  # anywhere, else in hand-picked cells
        cells = [[0 if x == maze_env.GOAL else x for x in row] for row in cells]
    np.random.seed(seed)
    how = {"maze_size_scaling": 4.0, "non_zero_reset": starts == "True"}
    env = ant.make_ant_maze_env(maze_map=cells, **how)
    maze = env._wrapped_env
    maze.seed(seed)
    search = functools.cache(maze._get_best_next_rowcol)  # slow
    maze._get_best_next_rowcol = lambda here, to: search(tuple(here), tuple(to))

    def walk(s, direction):
        direction = np.array(direction) / np.linalg.norm(direction) * 10
        return policy(np.concatenate([s[2:29], direction]), rng)

    controller = maze.create_navigation_policy(walk)
    while True:
        s = env.reset()
        for step in range(1001):
            a = controller(s) + 0.2 * rng.standard_normal(8)
            a = np.float32(a.clip(-1, 1))
            s_next = env.step(a.astype(np.float64))[0]
            near = np.linalg.norm(s_next[:2] - goal) <= 0.5
            yield np.float32([*s[:29], *a, near, near, step == 1000])
            s = s_next
        maze.set_target_goal()


def roll_out(task, layers, rows, seed, tally=os.devnull):
    """So many rows of a policy, of which the last one ends its trajectory; for each
    hundred of them the file tally grows by a byte.
    """
    steps = antmaze if task in ANTMAZE else transitions
    timeout, log, rng = sum(data.space_sizes(task)) + 2, [], np.random.default_rng(seed)
    with open(tally, "ab", 0) as file:
        for _, row in zip(range(rows), steps(task, NoisyPolicy(layers), rng)):
            log.append(row)
            if len(log) % 100 == 0:
                file.write(b".")
    log[-1][timeout] = not log[-1][timeout - 1]
    return np.array(log)


def roll_outs(task, rows, seed, policies):
    """As many rows of each policy, by worker processes, in ten parts a policy, of which
    part i is a function of seed and i.
    """
    parts, log, bar = [], [], files.progress(task, " rows", rows)
    with tempfile.NamedTemporaryFile() as tally, bar, data.Workers() as workers:
        sizes = map(len, np.array_split(range(rows), 10 * len(policies)))
        for i, size in enumerate(sizes):
            job = task, policies[i // 10], size, [seed, i], tally.name
            parts.append(workers.pool.submit(roll_out, *job))
        for part in parts:
            while not part.done():
                time.sleep(0.2)
                bar.update(100 * os.path.getsize(tally.name) - bar.n)
            log.append(part.result())
    return np.concatenate(log)


def make(arguments):
    """What the command line asks for; UserError for what its user can mend."""
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = files.Parser(prog="remake.py", description=__doc__, **how)
    add = parser.add_argument
    add("task", choices=[data.DEMO, *D4RL, *ANTMAZE], metavar="task")
    add("--rows", type=files.positive, help="default: about as many as D4RL's file has")
    add("--seed", type=files.whole, default=0, help="default: 0")
    add("--policy", type=files.folder, nargs="+", default=[], help="what to roll out")
    add("--noise", type=float, nargs="+", default=[], help="default: the file's std")
    given = parser.parse_args(arguments)
    task, seed, policy, noise = given.task, given.seed, given.policy, given.noise
    path, needed = data.stand_in_path(task), 1 + ("medium-expert" in task)
    if "replay" in task or task == data.DEMO:
        needed = 0
    if not policy and task.endswith("-medium-v2"):  # what SAC ended with
        replayed = task.replace("medium", "medium-replay")
        policy = [data.stand_in_path(replayed).with_suffix(".npz")]
    if len(policy) != needed or noise and len(noise) != needed:
        wanted = f"{needed} files for --policy, and as many numbers for --noise, if any"
        raise UserError(f"{task} needs {wanted}")
    if not 0 <= seed < 2**31 or not all(0 < x < math.inf for x in noise):
        raise UserError("--seed must be from 0 to 2147483647, --noise above 0")
    for made in path, path.with_suffix(".npz"):
        if made.exists():
            cure = "move it, or name another folder in D4RL_DATASET_DIR"
            raise UserError(f"{made} exists and stays as it is: {cure}")
    pairs = zip(policy, noise or [None] * needed)
    policies = [read_policy(file, task, std) for file, std in pairs]
    path.parent.mkdir(exist_ok=True)
    tempfile.TemporaryFile(dir=path.parent).close()  # fails now, not at the end
    if task == data.DEMO:
        maze2d(path, given.rows or 60_000, seed)
    elif not needed:
        replay(path, task, given.rows or D4RL[task][0], seed)
    else:
        recipe = f"roll-outs of {' and '.join(x.name for x in policy)}"
        recipe += f", noise {noise or 'as in the file'}, seed {seed}"
        rows = given.rows or needed * 10**6
        write(path, task, recipe, roll_outs(task, rows, seed, policies))


def main(arguments=None):
    """The command line; returns 0, 2 for what its user can mend, 130 after Ctrl-C."""
    status = files.program("remake", lambda: make(arguments))
    if status == 130:
        print("remake: stopped; nothing is kept", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
