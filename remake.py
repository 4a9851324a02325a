"""D4RL's data made anew by its own recipes, where its files can't be had; a reader of
the paper may skip it. The files go to a folder of their own, stand-in, beside D4RL's.

python remake.py maze2d-umaze-v1             the demo's data, in a minute
python remake.py hopper-medium-replay-v2     SAC's replay buffer, in half an hour or more
python remake.py hopper-medium-v2            a million rows of the policy SAC ends with
python remake.py hopper-medium-v2 --policy FILE.npz --noise 0.3    of any policy
python remake.py hopper-medium-expert-v2 --policy ONE.npz OTHER.npz --noise 0.3 0.1
python remake.py antmaze-umaze-v2 --policy ANT.npz
"""

import argparse
import concurrent.futures
import copy
import functools
import itertools
import math
import os
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn

import data
import files
from data import UserError
from models import TwinQ, mlp_layers
from seeds import compiled

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
MAZES = {"umaze": "U_MAZE", "medium": "BIG_MAZE", "large": "HARDEST_MAZE"}
ANTMAZE = [task for task in data.TASKS if task.startswith("antmaze")]


def write(path, task, recipe, table):
    """A file that d4rl and data.py read, whole or not at all, and what is in it.

    table: rows s | a | r | terminal | timeout [N, S + A + 3], or wider.
    """
    table = np.float32(table)
    *parts, _ = np.split(table, np.cumsum([*data.space_sizes(task), 1, 1, 1]), axis=1)
    s, a, r, terminals, timeouts = (x if x.shape[1] > 1 else x[:, 0] for x in parts)
    columns = {"observations": s, "actions": a, "rewards": r}
    columns |= {"terminals": terminals != 0, "timeouts": timeouts != 0}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}")
    try:
        with h5py.File(temporary, "w", locking=False) as file:
            file.attrs["task"] = task
            file.attrs["stand_in"] = f"{recipe}, {len(r)} rows; not D4RL's own data"
            for key, x in columns.items():
                how = {"compression": "gzip", "shuffle": True}
                file.create_dataset(key, data=x, **how)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")

    ends = columns["timeouts"] | (columns["terminals"] & (task not in ANTMAZE))
    starts = np.append(0, np.flatnonzero(ends[:-1]) + 1)
    returns = np.add.reduceat(r, starts, dtype=np.float64)
    spread = returns.mean(), returns.std(), returns.min(), returns.max()
    described = {"here": (len(r), len(returns), *spread), "D4RL's": D4RL.get(task)}
    for whose, numbers in described.items():
        if numbers:
            rows, trajectories, mean, std, least, most = numbers
            told = f"{rows} rows, {trajectories} trajectories; return {mean:.0f} ± "
            told += f"{std:.0f}, from {least:.0f} to {most:.0f}"
            scale = 1000 / (most - least) if most > least else math.nan
            print(f"{whose:>7}: {told}; reward scale {scale:.3f}")


# ---------------- maze2d


def maze2d(path, rows=60_000, seed=0):
    """A waypoint controller drives to one random cell after another, as in D4RL's
    script, without noise.

    An arrival is a timeout, since nothing ends there; rewards are 1 near the goal. The
    script shows the observation at an arrival twice: here the second row is left out.
    """
    env = data.make_env(data.DEMO)
    from d4rl.pointmaze import maze_model, waypoint_controller

    controller = waypoint_controller.WaypointController(env.str_maze_spec)
    grid = controller.env
    # slow, and functions of the target's cell only
    for name in "transition_matrix", "reward_matrix":
        compute = getattr(grid, name)
        remembered = functools.cache(lambda cells, compute=compute: compute())
        setattr(grid, name, lambda of=remembered: of(grid.gs.spec.tobytes()))
    limit, env = env.spec.max_episode_steps, maze_model.MazeEnv(env.str_maze_spec)
    data.seed_env(env, seed)
    env.set_target()
    s, steps, arrived, log = env.reset(), 0, False, []
    with files.progress("maze2d's data", " rows", rows) as bar:
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
            bar.update()
    write(path, data.DEMO, f"d4rl's waypoint controller, seed {seed}", log)


# ---------------- medium-replay


class SAC(nn.Module):
    """Soft actor-critic (Haarnoja et al., 2018) in rlkit's settings, as D4RL's."""

    def __init__(self, s_dim, a_dim, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.policy = nn.Sequential(*mlp_layers([s_dim, 256, 256, 2 * a_dim]))
            self.q = TwinQ(s_dim, a_dim)
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.sizes, self.generator = (s_dim, a_dim), torch.Generator().manual_seed(seed)
        trained = [x for x in self.parameters() if x.requires_grad]
        self.optimizer = torch.optim.Adam(trained, 3e-4, fused=True)

    def act(self, s, noise):
        """Actions tanh(mean + std ε) [B, A] and their log-densities [B]."""
        mean, log_std = self.policy(s).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise
        log_density = (-(noise**2) / 2 - log_std - math.log(2 * math.pi) / 2).sum(-1)
        # tanh's slope at u is 1 − tanh² u
        log_slope = 2 * (math.log(2) - u - nn.functional.softplus(-2 * u)).sum(-1)
        return u.tanh(), log_density - log_slope

    def losses(self, rows, noise):
        """Of Q, policy and temperature; rows as of `transitions`, noise [2, B, A]."""
        s_dim, a_dim = self.sizes
        s, a, rest, s_next = rows.split([s_dim, a_dim, 3, s_dim], -1)
        r, terminal, _ = rest.unbind(-1)
        alpha = self.log_alpha.detach().exp()
        with torch.no_grad():
            a_next, log_density = self.act(s_next, noise[0])
            v_next = self.q_target(s_next, a_next).amin(-2) - alpha * log_density
            target = r + 0.99 * (1 - terminal) * v_next
        q_loss = ((self.q(s, a) - target) ** 2).mean(-1).sum()
        a, log_density = self.act(s, noise[1])
        fixed = {name: x.detach() for name, x in self.q.named_parameters()}
        q = torch.func.functional_call(self.q, fixed, (s, a)).amin(-2)
        policy_loss = (alpha * log_density - q).mean()
        temperature_loss = -self.log_alpha * (log_density.detach() - a_dim).mean()
        return q_loss, policy_loss, temperature_loss

    def step(self, table):
        """One step of everything, with 256 of the table's rows [N, 2S + A + 3]."""
        index = torch.randint(len(table), (256,), generator=self.generator)
        noise = torch.randn(2, 256, self.sizes[1], generator=self.generator)
        self.optimizer.zero_grad()
        sum(self.losses(table[index], noise)).backward()
        self.optimizer.step()
        with torch.no_grad():
            old, new = [*self.q_target.parameters()], [*self.q.parameters()]
            torch._foreach_lerp_(old, new, 0.005)


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
    policy, total, row, episodes = NoisyPolicy(pairs(weights)), 0.0, 0, []

    def act(s, rng):
        return rng.uniform(-1, 1, a_dim) if row < 1000 else policy(s, rng)

    steps = transitions(task, act, np.random.default_rng(seed))
    with files.progress(task, " rows", rows) as bar:
        for row in range(1, rows + 1):
            fields = next(steps)
            table[row - 1] = torch.from_numpy(fields)
            r, *ends = fields[s_dim + a_dim :][:3]
            total += r
            if any(ends):
                episodes = [x for x in episodes if x[0] > row - 10_000]
                episodes, total = [*episodes, (row, total)], 0.0
                mean = np.mean([x[1] for x in episodes])
                bar.set_postfix_str(f"return {mean:.0f} of {enough}", refresh=False)
                if mean >= enough:
                    break
            if row == 1000:
                try:
                    sac.losses = compiled(sac.losses)
                    sac.step(table[:row])
                except Exception as error:  # of many kinds: no C++ compiler, ...
                    del sac.losses
                    reason = f"({type(error).__name__}), which costs time only"
                    print(f"{task}: not compiled {reason}", file=sys.stderr)
            if row >= 1000:
                sac.step(table[:row])
            bar.update()
    write(path, task, f"replay buffer of SAC, seed {seed}", table[:row])
    np.savez(path.with_suffix(".npz"), *weights)
    print(f"wrote {path.with_suffix('.npz')}, the policy that SAC ended with")


# ---------------- roll-outs of given policies


def pairs(weights):
    return [*zip(weights[::2], weights[1::2])]


def read_policy(path, task, noise):
    """The layers (weight [out, in], bias [out]), … of a tanh-Gaussian policy.

    A .npz of W0 b0 W1 b1 W2 b2, whose last layer gives mean and log std, or one named as
    that of D4RL's ant. noise: a std in place of the file's, or None.
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
        layers = pairs(weights)
        action = NoisyPolicy(layers)(np.zeros(s_dim), np.random.default_rng(0))
        assert action.shape == (a_dim,) and np.isfinite(action).all()
    except Exception as error:  # of many kinds
        reason = f"{type(error).__name__} {error}"[:200]
        raise UserError(f"{path} is no policy for {task} ({reason})") from None
    return layers


def antmaze(task, policy, rng):
    """Rows s | a | r | terminal | timeout without end, by D4RL's script; r is still 0.

    The policy walks to waypoints, whose direction it gets as obs[27:29], and N(0, 0.2²)
    is added to its actions; episodes have 1,001 rows.
    """
    data.import_d4rl()
    from d4rl.locomotion import ant, maze_env, wrappers

    cells = getattr(maze_env, MAZES[task.split("-")[1]])
    if "diverse" in task:  # goals are anywhere, else in hand-picked cells
        cells = [[0 if x == maze_env.GOAL else x for x in row] for row in cells]
    seed = int(rng.integers(2**31))
    np.random.seed(seed)  # draws goals, starts and waypoints
    anywhere = task != "antmaze-umaze-v2"
    maze = ant.AntMazeEnv(
        None, maze_map=cells, maze_size_scaling=4.0, non_zero_reset=anywhere
    )
    maze.seed(seed)
    env = wrappers.NormalizedBoxEnv(maze)
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
            yield np.float32([*s[:29], *a, 0, 0, step == 1000])
            s = env.step(a.astype(np.float64))[0]
        maze.set_target_goal()


def roll_out(task, layers, rows, seed, tally=os.devnull):
    """So many rows of a policy; the last one ends its trajectory.

    tally: a file that grows by a byte for each hundred rows.
    """
    steps = antmaze if task in ANTMAZE else transitions
    made, log = steps(task, NoisyPolicy(layers), np.random.default_rng(seed)), []
    last = sum(data.space_sizes(task)) + 2
    with open(tally, "ab", 0) as file:
        for row in itertools.islice(made, rows):
            log.append(row[: last + 1])
            if len(log) % 100 == 0:
                file.write(b".")
    log[-1][last] = not log[-1][last - 1]
    return np.array(log)


def roll_outs(path, task, rows, seed, recipe, policies):
    """As many rows of each policy, by worker processes, in ten parts a policy, of which
    part i is a function of seed and i.
    """
    jobs = []
    for layers, share in zip(policies, np.array_split(range(rows), len(policies))):
        jobs += [(task, layers, len(part)) for part in np.array_split(share, 10)]
    bar = files.progress(task, " rows", rows)
    with tempfile.NamedTemporaryFile() as tally, bar, data.Workers() as workers:
        parts = waiting = [
            workers.pool.submit(roll_out, *job, [seed, i], tally.name)
            for i, job in enumerate(jobs)
            if job[-1]
        ]
        while waiting:
            done, waiting = concurrent.futures.wait(waiting, 0.5)
            for part in done:
                part.result()  # raises what it raised
            made = 100 * os.path.getsize(tally.name)
            bar.update((made if waiting else rows) - bar.n)
    table = np.concatenate([part.result() for part in parts])
    if task in ANTMAZE:  # rewards as D4RL's, of an evaluation's goal, not of the ant's
        env = data.make_env(task)
        data.seed_env(env, seed)
        env.reset()
        distance = np.linalg.norm(table[1:, :2] - env.unwrapped.target_goal, axis=1)
        same = table[:-1, -1:] == 0  # the next row is of this trajectory
        table[:-1, -3:-1] = same & (distance[:, None] <= 0.5)
    write(path, task, f"roll-outs of {recipe}, seed {seed}", table)


# ---------------- the command line


def make(task, rows, seed, policy, noise):
    """Makes the task's file by its recipe; policy: paths, noise: numbers, or none."""
    path, needed = data.stand_in_path(task), 1 + ("medium-expert" in task)
    if "replay" in task or task == data.DEMO:
        needed = 0
    if not policy and task.endswith("-medium-v2"):
        replayed = task.replace("medium", "medium-replay")
        policy = [data.stand_in_path(replayed).with_suffix(".npz")]
        if not policy[0].exists():
            cure = f"name one by --policy, or make it: python remake.py {replayed}"
            raise UserError(f"{policy[0]} is missing: {cure}")
    if len(policy) != needed:
        raise UserError(f"{task} needs {needed} files for --policy, not {len(policy)}")
    if noise and (len(noise) != needed or not all(0 < x < math.inf for x in noise)):
        raise UserError("--noise needs a number above 0 for each policy")
    if not 0 <= seed < 2**31:
        raise UserError("--seed must be a whole number from 0 to 2147483647")
    for made in path, path.with_suffix(".npz"):
        if made.exists():
            cure = "move it, or name another folder in D4RL_DATASET_DIR"
            raise UserError(f"{made} exists and stays as it is: {cure}")
    noise = noise or [None] * needed
    policies = [read_policy(file, task, std) for file, std in zip(policy, noise)]
    recipe = " and ".join(
        f"{x.name} (noise {y or 'its'})" for x, y in zip(policy, noise)
    )
    with files.writing(path):  # found out now, not at the end
        path.parent.mkdir(exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    if data.path_of(task).exists():
        print(f"{data.path_of(task)} is there too, and goes first")
    try:
        if task == data.DEMO:
            maze2d(path, rows or 60_000, seed)
        elif not needed:
            replay(path, task, rows or D4RL[task][0], seed)
        else:
            roll_outs(path, task, rows or needed * 10**6, seed, recipe, policies)
    except KeyboardInterrupt:
        print("remake.py: stopped; nothing is kept", file=sys.stderr)
        raise


def main(arguments=None):
    """The command line; returns 0, 2 for what its user can mend, 130 after Ctrl-C."""

    def command():
        how = {"formatter_class": argparse.RawDescriptionHelpFormatter}
        parser = files.Parser(
            "remake.py", description=__doc__, allow_abbrev=False, **how
        )
        add = parser.add_argument
        add("task", choices=[data.DEMO, *D4RL, *ANTMAZE])
        add("--rows", type=files.positive, help="default: about as many as D4RL's")
        add("--seed", type=int, default=0)
        add("--policy", type=Path, nargs="+", default=[], help="to roll out")
        add("--noise", type=float, nargs="+", default=[], help="instead of their std")
        make(**vars(parser.parse_args(arguments)))

    return files.program("remake", command)


if __name__ == "__main__":
    sys.exit(main())
