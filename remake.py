"""D4RL's data made anew by its own recipes, where its files can't be had; a reader of the paper may skip it.

python remake.py maze2d-umaze-v1              the demo's data, in seconds
python remake.py halfcheetah-medium-replay-v2   (hopper, walker2d) SAC's replay buffer: half an hour on a CPU
python remake.py halfcheetah-medium-v2          a million rows of the policy that SAC ends with: minutes
"""

import functools
import io
import math
import os
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import data
from data import UserError
from models import TwinQ, mlp_layers
from run import Parser, positive, program, progress, reading, write_atomically, writing
from seeds import Draw, Layout
from srpo import Stage

# D4RL's own files: rows of medium-replay, and the mean return of medium
D4RL = {
    "halfcheetah": (202_000, 4770),
    "hopper": (402_000, 1422),
    "walker2d": (302_000, 2852),
}


def write(path, task, recipe, observations, actions, rewards, terminals, timeouts):
    """A file that d4rl and data.py read, whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = Path(f"{path}.{os.getpid()}")
    try:
        with h5py.File(temporary, "w", locking=False) as file:
            file.attrs["stand_in"] = (
                f"{recipe}, {len(rewards)} rows; not D4RL's own data"
            )
            file.attrs["task"] = task
            for key, x in (
                ("observations", observations),
                ("actions", actions),
                ("rewards", rewards),
            ):
                file.create_dataset(
                    key, data=np.float32(x), compression="gzip", shuffle=True
                )
            file["terminals"], file["timeouts"] = terminals, timeouts
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------- maze2d


def maze2d(path, rows=60_000, seed=0, task=data.DEMO):
    """A waypoint controller drives to one random cell after another, as in D4RL's script, without noise.

    An arrival is a timeout, since nothing ends there; rewards are 1 near the goal. The script shows the
    observation at an arrival twice: the second of these rows is left out.
    """
    env = data.make_env(data.DEMO)
    from d4rl.pointmaze import maze_model, waypoint_controller

    controller = waypoint_controller.WaypointController(env.str_maze_spec)
    grid = controller.env
    for name in (
        "transition_matrix",
        "reward_matrix",
    ):  # slow, and functions of the target's cell only
        remembered = functools.cache(
            lambda spec, compute=getattr(grid, name): compute()
        )
        setattr(grid, name, lambda of=remembered: of(grid.gs.spec.tobytes()))
    limit, env = env.spec.max_episode_steps, maze_model.MazeEnv(env.str_maze_spec)
    data.seed_env(env, seed)
    env.set_target()
    s, steps, arrived, log = env.reset(), 0, False, []
    with progress("maze2d's data", " rows", rows) as bar:
        for _ in range(rows):
            stale = arrived
            a, arrived = controller.get_action(s[:2], s[2:], env._target)
            arrived = arrived or steps >= limit
            if not stale:
                log.append((s, a, arrived))
            s_next, steps = env.step(a)[0], steps + 1
            if (
                arrived
            ):  # the next row shows this observation again, as in D4RL's script
                env.set_target()
                steps = 0
            else:
                s = s_next
            bar.update()
    s, a, timeouts = map(np.array, zip(*log))
    rewards = np.linalg.norm(s[:, :2] - env.goal_locations[0], axis=1) <= 0.5
    recipe = f"d4rl's waypoint controller, seed {seed}"
    write(path, task, recipe, s, a, rewards, np.zeros(len(s), bool), timeouts)


# ------------------------------------------------------------------------------------------------ locomotion


class SAC(Stage):
    """Soft actor-critic (Haarnoja et al., 2018) in rlkit's settings, as D4RL made its data; one seed."""

    name, loss_names = "sac", ("q_loss", "policy_loss", "temperature_loss")
    batch, lr = 256, 3e-4

    def __init__(self, table, sizes, seed):
        """table: the replay buffer, filled from its beginning; its rows s | a | r | s_next | terminal."""
        s_dim, a_dim = sizes
        self.policy = Layout(
            lambda: nn.Sequential(*mlp_layers([s_dim, 256, 256, 2 * a_dim]))
        )
        self.q, self.rows = Layout(lambda: TwinQ(s_dim, a_dim)), torch.tensor(0)
        phi, temperature = self.q.fresh([seed], 1), torch.zeros(1, 1)
        theta = torch.cat([self.policy.fresh([seed], 0), phi, temperature], -1)
        super().__init__(
            None, table, sizes, [(None, seed)], theta=theta, phi_target=phi
        )

    def draw(self, state):
        draw = Draw(state["seed"], self.count)
        index = draw.index(2, (self.batch,), self.rows)
        return self.table[index], draw.normal(3, (2, self.batch, self.sizes[1]))

    def act(self, theta, s, noise):
        """Actions of the policy and their log-density."""
        mean, log_std = self.policy.bind(theta)(s).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        u = mean + log_std.exp() * noise
        log_density = (-(noise**2) / 2 - log_std - math.log(2 * math.pi) / 2).sum(-1)
        return u.tanh(), log_density - 2 * (math.log(2) - u - F.softplus(-2 * u)).sum(
            -1
        )

    def losses(self, theta, state, rows, noise):
        s, a, r, s_next, terminal = self.split(rows)
        theta, phi, log_alpha = theta.split([self.policy.size, self.q.size, 1], -1)
        alpha = log_alpha.detach().exp().squeeze(-1)
        with torch.no_grad():
            a_next, log_density = self.act(theta, s_next, noise[0])
            value = (
                self.q.bind(state["phi_target"])(s_next, a_next).amin(-2)
                - alpha * log_density
            )
            target = r + 0.99 * (1 - terminal) * value
        q_loss = ((self.q.bind(phi)(s, a) - target) ** 2).mean(-1).sum()
        a, log_density = self.act(theta, s, noise[1])
        policy_loss = (
            alpha * log_density - self.q.bind(phi.detach())(s, a).amin(-2)
        ).mean()
        temperature_loss = -(log_alpha * (log_density.detach() - self.sizes[1])).mean()
        return q_loss, policy_loss, temperature_loss

    def after_update(self, state, alive):
        _, phi, _ = state["theta"].split([self.policy.size, self.q.size, 1], -1)
        state["phi_target"].add_(0.005 * (phi - state["phi_target"]))


class NoisyPolicy(data.NumpyPolicy):
    """SAC's policy in NumPy: tanh of a Gaussian, whose mean and log std are the network's output."""

    def __call__(self, obs, rng):
        mean, log_std = np.split(self.output(obs), 2)
        return np.tanh(
            mean + np.exp(log_std.clip(-20, 2)) * rng.standard_normal(len(mean))
        )


def transitions(task, seed, act):
    """Steps without end of the policy `act`: s, a, r, s_next, terminal, timeout."""
    env = data.make_env(task)
    data.seed_env(env, seed)
    s = env.reset()
    while True:
        a = np.float32(act(s))
        s_next, r, done, info = env.step(a.astype(np.float64))
        timeout = info.get("TimeLimit.truncated", False)
        yield s, a, r, s_next, done and not timeout, timeout
        s = env.reset() if done else s_next


def replay(path, rows, seed, task):
    """SAC's whole replay buffer, until the episodes of its last 10,000 rows return as much as D4RL's medium
    policy or it has as many rows as D4RL's; beside it the curve of returns (.csv) and the policy (.npz).
    """
    torch.set_num_threads(1)
    _, enough = D4RL[task.split("-")[0]]
    rng, (s_dim, a_dim) = np.random.default_rng(seed), data.space_sizes(task)
    table, timeouts = torch.zeros(rows, 2 * s_dim + a_dim + 2), np.zeros(rows, bool)
    sac = SAC(table, (s_dim, a_dim), seed)
    actor = sac.policy.tensors(sac.state["theta"][0, : sac.policy.size]).values()
    weights = [x.numpy() for x in actor]  # views, which see every step of SAC
    policy = NoisyPolicy(zip(weights[::2], weights[1::2]))
    first, total, mean, episodes = 0, 0.0, -math.inf, []

    def act(s):
        return policy(s, rng) if int(sac.count) else rng.uniform(-1, 1, a_dim)

    steps = transitions(task, seed, act)
    with progress(task, " rows", rows) as bar:
        for row in range(1, rows + 1):
            *fields, timeout = next(steps)
            table[row - 1] = torch.from_numpy(
                np.hstack(fields, dtype=np.float32, casting="unsafe")
            )
            timeouts[row - 1], total = timeout, total + fields[2]
            if fields[-1] or timeout:
                episodes.append((row, row - first, total))
                mean = np.mean(
                    [total for end, _, total in episodes if end > row - 10_000]
                )
                bar.set_postfix_str(
                    f"mean return {mean:.0f} of {enough}", refresh=False
                )
                first, total = row, 0.0
            if row >= 1000:
                sac.rows.fill_(row)
                sac.compile() if row == 1000 else sac.step()
            bar.update()
            if mean >= enough:
                break
    np.savez(policy_file := io.BytesIO(), *weights)
    write_atomically(path.with_suffix(".npz"), policy_file.getvalue())
    lines = [
        "row,length,return",
        *(f"{end},{length},{total:.6g}" for end, length, total in episodes),
    ]
    write_atomically(path.with_suffix(".csv"), "\n".join([*lines, ""]).encode())
    s, a, r, _, terminals = (x.numpy() for x in sac.split(table[:row]))
    write(
        path,
        task,
        f"replay buffer of SAC, seed {seed}",
        s,
        a,
        r,
        terminals != 0,
        timeouts[:row],
    )


def roll_out(task, layers, rows, seed):
    """So many steps of a policy, rows s | a | r | terminal | timeout; the last one ends its episode."""
    rng, policy = np.random.default_rng(seed), NoisyPolicy(layers)
    steps, log = (
        transitions(task, int(rng.integers(2**31)), lambda s: policy(s, rng)),
        [],
    )
    for _ in range(rows):
        s, a, r, _, terminal, timeout = next(steps)
        log.append(np.float32([*s, *a, r, terminal, timeout]))
    log[-1][-1] = not terminal
    return np.array(log)


def medium(path, rows, seed, task):
    """A million rows of the policy that `replay` ends with, by worker processes."""
    replayed = task.replace("medium", "medium-replay")
    source = data.stand_in_path(replayed).with_suffix(".npz")
    if not source.exists():
        raise UserError(f"{source} is missing: make it by remake.py {replayed}")
    (s_dim, a_dim), log = data.space_sizes(task), []
    with reading(source):
        weights = [*np.load(source).values()]
        layers = [*zip(weights[::2], weights[1::2])]
        NoisyPolicy(layers)(np.zeros(s_dim), np.random.default_rng()) + np.zeros(a_dim)
    sizes = [len(part) for part in np.array_split(range(rows), 10)]
    with data.Workers() as workers, progress(task, " rows", rows) as bar:
        parts = [
            workers.pool.submit(roll_out, task, layers, n, [seed, i])
            for i, n in enumerate(sizes)
            if n
        ]
        for part in parts:
            log.append(part.result())
            bar.update(len(log[-1]))
    s, a, r, *ends = np.split(np.concatenate(log), np.cumsum([s_dim, a_dim, 1, 1]), 1)
    terminals, timeouts = (end[:, 0] != 0 for end in ends)
    write(
        path,
        task,
        f"the policy in {source.name}, seed {seed}",
        s,
        a,
        r[:, 0],
        terminals,
        timeouts,
    )


def main(arguments=None):
    """The command line; returns 0, or 2 for what its user can mend."""
    recipes = {data.DEMO: (maze2d, 60_000)}
    for robot, (rows, _) in D4RL.items():
        recipes |= {
            f"{robot}-medium-replay-v2": (replay, rows),
            f"{robot}-medium-v2": (medium, 10**6),
        }

    def command():
        parser = Parser(
            prog="remake.py", description=__doc__.splitlines()[0], allow_abbrev=False
        )
        parser.add_argument("task", choices=recipes)
        parser.add_argument(
            "--rows", type=positive, help="default: as many as D4RL's file has"
        )
        parser.add_argument("--seed", type=int, default=0)
        given = parser.parse_args(arguments)
        path, (recipe, rows) = data.stand_in_path(given.task), recipes[given.task]
        if not 0 <= given.seed < 2**31:
            raise UserError("--seed must be a whole number from 0 to 2147483647")
        if path.exists():
            raise UserError(
                f"{path} exists and stays as it is; name another folder in D4RL_DATASET_DIR"
            )
        with writing(path):  # found out now, not at the end
            path.parent.mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=path.parent).close()
        recipe(path, given.rows or rows, given.seed, given.task)

    return program("remake", command)


if __name__ == "__main__":
    sys.exit(main())
