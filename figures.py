"""The paper's figures and tables, each one command; a reader of the paper may skip it.

    python figures.py bandit          Fig. 2-5 and 9-12, the 2-D experiments
    python figures.py speed           Fig. 1 and 7: what a step and an action cost
    python figures.py report          Table 1, Fig. 6, 8 and 13-16, of the runs in runs/
    python figures.py film runs/TASK  a GIF of an episode

The first two need no data, and write into the folder figures/. Before the second,
RELEASED=CLONE (of github.com/thu-ml/SRPO) has the authors' code timed, too.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import style
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

import data
import files
import run as training
import srpo
from data import UserError
from diffusion import alpha_sigma, log_likelihood
from files import progress, say
from seeds import GRAPH_STEPS, compiled
from srpo import Settings

NAMES = {"srpo": "SRPO", "iql": "IQL", "bc": "BC", "idql": "IDQL", "random": "random"}


def table(rows):
    """Rows {column: text or number} as Markdown, without columns that are empty."""

    def text(x):
        if isinstance(x, (int, float)):
            return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"
        return " ".join(str(x).replace("|", "/").split())

    names = dict.fromkeys(name for row in rows for name in row)
    columns = [(x, "---", *(text(row.get(x, "")) for row in rows)) for x in names]
    columns = [column for column in columns if any(column[2:])]
    widths = [max(map(len, column)) for column in columns]
    lines = [map(str.ljust, line, widths) for line in zip(*columns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([rows[0], *[row.values() for row in rows]])


# ---------------- bandit: Fig. 2, 3, 4, 5 and 9 to 12

TRAINING = {  # of the noise models
    **{"behavior_steps": 10_000, "behavior_batch": 512, "behavior_lr": 3e-3},
    **{"behavior_width": 64, "behavior_blocks": 2, "behavior_decay": 0, "dropout": 0},
}
STEPS = 250  # of the extraction
QUICK = {"behavior_steps": 1500, "behavior_batch": 256}
BETAS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
GRADIENTS = {  # ω(t) and the range of t in surrogate_gradient
    "Eq. 10 (t → 0)": ("alpha_over_sigma", 0.02, 0.02),
    "ensemble, ω = α/σ": ("alpha_over_sigma", 0.02, 0.98),
    "ensemble, ω = 1": ("one", 0.02, 0.98),
    "ensemble, ω = σ²": ("sigma2", 0.02, 0.98),
}
METHODS_2D = (*GRADIENTS, "weighted regression")
SHOWN = ("8 Gaussians", "rings", "2 spirals")  # in the first picture
TARGETS = torch.cartesian_prod(*[torch.linspace(-4.5, 4.5, 10)] * 2)  # [100, 2]
EDGE = 4.8  # of the pictures
SIDE = ((torch.arange(64) + 0.5) / 32 - 1) * EDGE
PIXELS = torch.cartesian_prod(SIDE, SIDE)  # [4096, 2]


class Mixture(NamedTuple):
    """A behavior of equal Gaussians, whose density and noise model are exact."""

    centers: torch.Tensor  # [K, 2]
    std: float

    def sample(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(self.centers), (count,), generator=generator)
        noise = torch.randn(count, 2, generator=generator)
        return self.centers[index] + self.std * noise

    def log_density(self, a):
        """log μ(a), [B]."""
        exponent = -torch.cdist(a, self.centers).square() / (2 * self.std**2)  # [B, K]
        size = 2 * math.pi * self.std**2 * len(self.centers)
        return exponent.logsumexp(-1) - math.log(size)

    def margin(self, a, actions):
        """The exact log μ(a) less its 1 % quantile on actions, [B]: support is ≥ 0."""
        return self.log_density(a) - self.log_density(actions[:5000]).quantile(0.01)

    def noise_model(self, a_t, s, t):
        """ε* = σ Σ r (a_t − α c) / (α² std² + σ²), r: shares of the centers c."""
        alpha, sigma = alpha_sigma(t.unsqueeze(-1))
        variance = (alpha * self.std) ** 2 + sigma**2  # [..., 1]
        gap = a_t.unsqueeze(-2) - alpha.unsqueeze(-1) * self.centers  # [..., K, 2]
        share = (-gap.square().sum(-1) / (2 * variance)).softmax(-1)
        return sigma / variance * (share.unsqueeze(-1) * gap).sum(-2)


def behavior_distributions():
    """Six mixtures of 2,048 Gaussians: scikit-learn's shapes at FFJORD's scale."""
    from sklearn.datasets import make_circles, make_moons, make_swiss_roll

    n, (x, y) = 2048, np.meshgrid(*[(np.arange(64) + 0.5) / 8 - 4] * 2)
    board = np.stack([x, y], -1)[(x // 2 + y // 2) % 2 == 0]
    angle = np.arange(n) // (n // 8) * math.pi / 4
    ring = np.stack([np.cos(angle), np.sin(angle)], -1)
    along = 0.6 + 5.65 * (np.arange(n // 2) + 0.5) / (n // 2)
    angle = math.pi * np.sqrt(along)[:, None]  # 0.77 π to 2.5 π
    arm = angle * np.concatenate([-np.cos(angle), np.sin(angle)], -1)
    roll = make_swiss_roll(n, random_state=0)[0][:, [0, 2]]
    shapes = {
        "8 Gaussians": (2.83 * ring, 0.35),
        "moons": (2 * make_moons(n, shuffle=False)[0] - [1, 0.2], 0.2),
        "swiss roll": (roll / 5, 0.2),
        "rings": (3.6 * make_circles(n, factor=0.5, shuffle=False)[0], 0.25),
        "checkerboard": (board, 0.1),
        "2 spirals": (0.46 * np.concatenate([arm, -arm]), 0.2),
    }
    return {x: Mixture(torch.tensor(c).float(), std) for x, (c, std) in shapes.items()}


class Behaviors(srpo.Behavior):
    """The behavior stage of run.py, but each seed has data of its own."""

    cosine = True

    def __init__(self, settings, actions):
        table = torch.zeros(actions.shape[1], 4)
        table[:, 2] = torch.arange(len(table))  # the actions' numbers, as rewards
        super().__init__(settings, table, (0, 2), range(len(actions)))
        self.actions = actions  # [seeds, N, 2], without states

    def batch(self):
        s, _, r, *rest = super().batch()
        index = r.long().unsqueeze(-1).expand(-1, -1, 2)
        return s, self.actions.gather(1, index), r, *rest


def extract(noise_model, models):
    """Eq. 15's solutions for Q(a) = −‖a − a_tar‖², by Adam from the target on:
    [gradients, models, betas, targets, 2].
    """
    generator = torch.Generator().manual_seed(0)
    target = TARGETS.expand(models, len(BETAS), -1, -1)
    beta = torch.tensor(BETAS).unsqueeze(-1)
    actions = target.repeat(len(GRADIENTS), 1, 1, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([actions], 0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def q(s, a):
        return -(a - target).square().sum(-1)

    with progress("extraction", " steps", STEPS) as bar:
        for _ in range(STEPS):
            u = torch.rand(target.shape[1:3], generator=generator)
            noise = torch.randn(target.shape[1:], generator=generator)
            u, noise, gradients = u.expand(models, -1, -1), noise.expand_as(target), []
            for a, (omega, low, high) in zip(actions.detach(), GRADIENTS.values()):
                t, s = low + (high - low) * u, a[..., :0]
                inputs = q, noise_model, s, a, t, noise, beta, omega
                gradients.append(srpo.surrogate_gradient(*inputs, baseline=low < high))
            actions.grad = -torch.stack(gradients)
            optimizer.step()
            schedule.step()
            bar.update()
    return actions.detach()


def weighted_regression(actions):
    """Eq. 2, Gaussian: the actions' mean by exp(βQ), [betas, targets, 2]."""
    q = -torch.cdist(TARGETS, actions).square()  # [targets, N]
    return torch.stack([(beta * q).softmax(-1) @ actions for beta in BETAS])


def share_inside(behavior, actions, solutions):
    """The percentage of solutions in the support, of targets in the actions' box."""
    in_box = (TARGETS >= actions.amin(0)) & (TARGETS <= actions.amax(0))
    inside = behavior.margin(solutions[..., in_box.all(-1), :], actions) >= 0
    return 100 * inside.double().mean(-1)


def draw_bandit(path, panels, rows, columns, title):
    """panels[row][column]: (density, margin, solutions; if these are None: density)."""
    size = 1.4 * len(columns) + 0.3, 1.35 * len(rows) + 1.05
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), len(columns))
    targets, extent, color = TARGETS.numpy(), (-EDGE, EDGE), TARGETS[:, 0].numpy()
    look = {"cmap": "plasma", "clim": (-4.5, 6)}
    for (row, column), axes in np.ndenumerate(grid):
        density, margin, solutions = panels[row][column]
        if solutions is None:
            axes.contour(SIDE, SIDE, margin, [0], colors="0.5", linewidths=0.8)
            image = axes.imshow(density, "Blues", origin="lower", extent=extent * 2)
            image.set(interpolation="bilinear", clim=(0, np.quantile(density, 0.99)))
        else:
            axes.contourf(SIDE, SIDE, margin, [0, math.inf], colors="0.83")
            axes.fill_between([], [], color="0.83", label="support (exact density)")
            ways, how = np.stack([targets, solutions], 1), {"lw": 0.6, "alpha": 0.6}
            axes.add_collection(LineCollection(ways, array=color, **how, **look))
            how = {"linewidths": 0, "zorder": 3}
            axes.scatter(*targets.T, 2, "0.4", label="target: maximum of Q", **how)
            axes.scatter(*solutions.T, 11, color, label="solution", **how, **look)
        axes.set(xlim=extent, ylim=extent, aspect="equal", xticks=[], yticks=[])
        grid[0, column].set_title(columns[column], fontsize=9)
        grid[row, 0].set_ylabel(rows[row], fontsize=9)
    how = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    figure.legend(*axes.get_legend_handles_labels(), fontsize=9, **how)
    figure.suptitle(title, fontsize=8.5)
    figure.savefig(path, dpi=170)
    with Image.open(path) as image:  # 64 colors: a quarter of the bytes
        few = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
        few.save(path, optimize=True)


def bandit(out, quick):
    """Fig. 2-5 and 9-12: two pictures, a CSV and a table"""
    torch.set_num_threads(1)  # the same bits on any number of cores
    behaviors = behavior_distributions()
    samples = [one.sample(20_000, i) for i, one in enumerate(behaviors.values())]
    settings = Settings(beta=1.0, **TRAINING | (QUICK if quick else {}))
    stage = Behaviors(settings, torch.stack(samples))
    with progress("six noise models", " steps", stage.steps) as bar:
        while stage.done < stage.steps:
            bar.update(stage.advance(1))
    noise_model, densities = stage.noise_model.requires_grad_(False), []
    with progress("their densities (Eq. 7)", " pixels", len(PIXELS)) as bar:
        for a in PIXELS.expand(6, -1, -1).split(256, 1):
            densities.append(log_likelihood(noise_model, a[..., :0], a, steps=8).exp())
            bar.update(a.shape[1])
    solutions, fields, shares = {}, {}, {}
    found, densities = extract(noise_model, 6), torch.cat(densities, 1)
    for i, (name, one) in enumerate(behaviors.items()):
        a, density, margin = samples[i], densities[i], one.margin(PIXELS, samples[i])
        solutions[name] = torch.cat([found[:, i], weighted_regression(a)[None]])
        shares[name] = share_inside(one, a, solutions[name])  # [methods, betas]
        fields[name] = [x.view(64, 64).T.numpy() for x in (density, margin)]
        share = density[margin >= 0].sum() / density.sum()
        say(f"{name}: {share:.1%} of the learned density is inside, 99 % of the data")
    mean = torch.stack([*shares.values()]).mean(0)
    exact = behaviors["8 Gaussians"]
    exact = exact._replace(centers=exact.centers[::256])  # each of them once
    exact = share_inside(exact, samples[0], extract(exact.noise_model, 1)[:, 0])

    rows, shares = [], shares | {"mean": mean, "8 Gaussians, exact score": exact}
    for name, share in shares.items():
        for method, values in zip(METHODS_2D, share):
            values = {f"{beta:g}": f"{x:.0f}" for beta, x in zip(BETAS, values)}
            rows.append({"behavior": name, "method": method} | values)
    write_csv(out / "bandit.csv", rows)
    means = table([row for row in rows if row["behavior"] not in behaviors])
    say(f"\nPercentage of solutions in the support, by β\n\n{means}")

    def panel(name, method, beta):
        return *fields[name], solutions[name][method, beta].numpy()

    best = mean.argmax(-1).tolist()  # the largest β of several
    chosen = [(0, best[0]), (3, best[3]), (3, min(best[3] + 2, 8)), (4, best[4])]
    labels, panels = ["behavior\n(learned, Eq. 7)"], []
    for method, beta in chosen:
        label = f"β = {BETAS[beta]:g}: {mean[method, beta]:.0f} % inside"
        labels.append(f"{METHODS_2D[method]}\n{label}")
    for name in SHOWN:
        panels.append([(*fields[name], None), *[panel(name, *x) for x in chosen]])
    title = "β: best of nine by the share inside, mean of six behaviors; then a tenth"
    draw_bandit(out / "bandit.png", panels, SHOWN, labels, title)
    panels = [[panel(name, x, 6) for name in behaviors] for x in range(4)]  # β = 0.01
    labels = [name.replace(", ", ",\n") for name in GRADIENTS]
    draw_bandit(out / "bandit_ensemble.png", panels, labels, [*behaviors], "β = 0.01")
    say(f"-> {out}/bandit.csv, bandit.png, bandit_ensemble.png")


# ---------------- speed: Fig. 1 and 7

TURNS = (7, 1.0), (3, 0.2)  # turns and seconds of each; quick


def released_modules(folder, device):
    """model, utils, dataset, SRPO of a clone of thu-ml/SRPO, with "cuda" our device."""
    for name in ("model", "utils", "dataset", "SRPO"):
        sys.modules[name] = ModuleType(name)  # they import each other
        code = (Path(folder) / f"{name}.py").read_text()
        exec(code.replace('"cuda"', f'"{device}"'), vars(sys.modules[name]))
        yield sys.modules[name]


def released_steps(folder, task, settings, table, sizes):
    """[Steps of critic, behavior, policy, each a call] of one seed of their code."""
    (s_dim, a_dim), device = sizes, str(table.device)
    _, utils, dataset, theirs = released_modules(folder, device)
    options = {"env": task, "device": device, "q_layer": 2, "actor_blocks": 3}
    options |= {"policy_layer": settings.policy_layers, "n_policy_epochs": 100}
    options |= {"WT": "VDS_noise", "beta": settings.beta[0]}
    options = SimpleNamespace(**options, regq=settings.grad_norm == "released")
    warnings.filterwarnings("ignore", "To copy construct from a tensor")  # in utils
    schedule = partial(utils.marginal_prob_std, device=device)
    with contextlib.redirect_stdout(io.StringIO()):
        critic = theirs.SRPO_IQL(s_dim + a_dim, a_dim, options)
        how = s_dim + a_dim, a_dim, schedule, options
        behavior = theirs.SRPO_Behavior(*how).to(device)
        policy = theirs.SRPO(*how).to(device)
    loader = object.__new__(dataset.D4RL_dataset)  # of our rows
    names = "states", "actions", "rewards", "next_states", "is_finished"
    columns = table.split([s_dim, a_dim, 1, s_dim, 1], -1)
    vars(loader).update(zip(names, columns), len=len(table), current_idx=0)
    return [
        lambda: critic.update_iql(loader.sample(settings.critic_batch)),
        lambda: behavior.update_behavior(loader.sample(settings.behavior_batch)),
        lambda: policy.update_SRPO_policy(loader.sample(settings.policy_batch)),
    ]


def race(what, calls, rounds, seconds):
    """Milliseconds a unit of {name: (call, units)}, by turns: {name: [rounds]}."""

    def timed(call, repeats=1):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin) / repeats

    for call, _ in calls.values():
        timed(call)  # first calls allocate, or record a graph
    repeats = [max(1, round(1e3 * seconds / timed(call))) for call, _ in calls.values()]
    times = []
    with progress(f"{what}, timing", " turns", rounds) as bar:
        for _ in range(rounds):
            turn = zip(calls.values(), repeats)
            times.append([timed(call, many) / units for (call, units), many in turn])
            bar.update()
    return dict(zip(calls, np.transpose(times)))


def step_costs(stage, released, limits):
    """A stage's rows of the first table: the released code's, ours eager and fast."""
    eager, fast, seeds = stage.losses, compiled(stage.losses), len(stage.seeds)

    def take(losses, steps):
        stage.losses, end = losses, stage.done + steps
        while stage.done < end:
            stage.advance(end - stage.done)

    calls = {"released code": (released, 1)} if released else {}
    calls["eager"] = partial(take, eager, 1), seeds
    say(f"{stage.name}, compiling")
    try:
        take(fast, 1)
        way = "compiled" + ", CUDA graphs" * stage.table.is_cuda
        calls[way] = partial(take, fast, GRAPH_STEPS), GRAPH_STEPS * seeds
    except (OSError, RuntimeError) as error:
        say(f"{stage.name} is not compiled: {' '.join(str(error).split())[:200]}")
    times, rows = race(stage.name, calls, *limits), []
    for way, each in times.items():
        ratio, ms = [*times.values()][0] / each, np.median(each)
        row = {"stage": stage.name, "code": way, "ms a step and seed": ms}
        row |= {"times as fast": np.median(ratio)}
        rows.append(row | {"hours of Table 1": 90 * stage.steps * ms / 3.6e6})
    return rows


def action_costs(settings, sizes, limits):
    """The second table's rows: an action of SRPO's policy and of diffusion."""
    build, rng = srpo.builders(settings, *sizes), np.random.default_rng(0)
    arrays = [x.numpy() for x in build["policy"]().state_dict().values()]
    obs = rng.standard_normal(sizes[0])
    policy = data.NumpyPolicy([*zip(arrays[::2], arrays[1::2])])
    calls = {"SRPO": (partial(policy, obs, rng), 1)}
    for candidates, steps in itertools.product((1, 64), (5, 15, 50, 100)):
        what = build["noise_model"]().eval(), build["q"](), sizes[1], candidates, steps
        name = f"diffusion, {steps} steps, best of {candidates}"
        calls[name] = partial(training.IDQL(*what), obs, rng), 1
    times, rows = race("actions", calls, *limits), []
    for name, each in times.items():
        ratio = np.median(each / times["SRPO"])
        rows.append({"action": name, "ms": np.median(each), "times SRPO's": ratio})
    return rows


def speed(out, quick, task, seeds):
    """Fig. 1 and 7: what a step and an action cost"""
    settings, sizes = Settings(data.check_task(task)), data.space_sizes(task)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    facts = training.describe(task, settings, [], device)
    machine = f"{facts['gpu'] or facts['cpu']}, PyTorch {facts['torch']}"
    say(f"{machine}, {torch.get_num_threads()} threads; {task}, {seeds} seeds")
    rows = torch.rand(10**6, 2 * sizes[0] + sizes[1] + 2).to(device) * 2 - 1
    what, limits = (settings, rows, sizes, range(seeds)), TURNS[quick]
    folder = os.environ.get("RELEASED")
    theirs = released_steps(folder, task, *what[:3]) if folder else [None] * 3
    critic, behavior = srpo.Critic(*what), srpo.Behavior(*what)
    costs = step_costs(critic, theirs[0], limits)
    costs += step_costs(behavior, theirs[1], limits)
    noise_model = behavior.noise_model.requires_grad_(False)
    fixed = lambda s, a: critic.q_target(s, a).mean(-2), noise_model
    costs += step_costs(srpo.Extraction(*what, *fixed), theirs[2], limits)
    torch.set_num_threads(1)  # as in a roll-out
    tables = {"speed": costs, "speed-actions": action_costs(settings, sizes, limits)}
    for name, rows in tables.items():
        write_csv(out / f"{name}.csv", [row | {"machine": machine} for row in rows])
        say(f"\n{table(rows)}\n-> {out / name}.csv")


# ---------------- report: Table 1, Fig. 6, 8 and 13 to 16

# as printed: tasks as in TABLE_2 and averages, means and SRPO's standard deviation
TABLE_1 = """\
BEAR 53.4 96.3 40.1 41.7 52.1 59.1 38.6 33.7 19.2 51.9 73.0 61.0 0.0 8.0 0.0 0.0 23.7
TD3+BC 90.7 98.0 110.1 48.3 59.3 83.7 44.6 60.9 81.8 75.3 78.6 71.4 10.6 3.0 0.2 0.0 27.3
IQL 86.7 91.5 109.6 47.4 66.3 78.3 44.2 94.7 73.9 76.9 87.5 62.2 71.2 70.0 39.6 47.5 63.0
SfBC 92.6 108.6 109.8 45.9 57.1 77.9 37.1 86.2 65.1 75.6 92.0 85.3 81.3 82.0 59.3 45.5 74.2
Diffuser 79.8 107.2 108.4 44.2 58.5 79.7 42.2 101.3 61.2 75.3 – – – – – – –
Diffusion-QL 96.8 111.1 110.1 51.1 90.5 87.0 47.8 100.7 95.5 88.0 93.4 66.2 76.6 78.6 46.4 56.6 69.6
QGPO 93.5 108.0 110.7 54.1 98.0 86.0 47.6 96.9 84.4 86.6 96.4 74.4 83.6 83.8 66.6 64.8 78.3
IDQL 95.9 108.6 112.7 51.0 65.4 82.5 45.9 92.1 85.1 82.1 94.0 80.2 84.5 84.8 63.5 67.9 79.1
SRPO 92.2 100.1 114.0 60.4 95.5 84.4 51.4 101.2 84.6 87.1 97.1 82.1 80.7 75.0 53.6 53.6 73.6
± 3.0 13.9 2.1 0.8 2.0 4.4 3.4 1.0 7.1 – 2.7 10.8 7.1 12.3 12.5 6.3 –
"""  # noqa: E501
METHODS, *COLUMNS = zip(*map(str.split, TABLE_1.splitlines()))
GROUPS = {"average, locomotion": [*srpo.TABLE_2][:9], "average, AntMaze": data.ANTMAZE}
ROWS = [x for average, tasks in GROUPS.items() for x in (*tasks, average)]
PAPER = dict(zip(ROWS, COLUMNS))  # {task: (BEAR's, ..., SRPO's, ±)}
REPORT = """\
# {out} beside the paper

Normalized scores at the final step, or of `run.py evaluate` where it was run: mean ±
standard deviation (N − 1) of the seeds' means (seeds × episodes); one seed has no ±.
[ ]: 95 % bootstrap interval over the seeds, the paper's mean taken as exact. Averages
hold D4RL's own data alone. Of several β, Table 1 and the curves have Table 2's, else
the first. Ablations (Fig. 8, 14) are runs with other settings. The data's mean is over
trajectories. A lost seed had a loss that was not finite, a diverged one |mean Q| of its
critic above what the largest reward can add up to.
"""


def read_run(folder, name):
    """A run's config and tables; UserError if there is none, or it is damaged."""
    run = SimpleNamespace(**training.read_config(folder), names=[name], notes=[])
    run.log = training.read_csv(folder / "log.csv")
    run.scores = training.read_csv(folder / "scores.csv")
    for path in sorted(folder.glob("evaluation-*.json")):
        with files.reading(path):
            made = json.loads(path.read_text())
            if other := training.differences(made, vars(run), ("also", "device")):
                run.notes.append(f"{path.name} is another run's ({', '.join(other)})")
            else:
                run.scores += made["scores"]  # of step None: these count at last
    with files.reading(folder):
        if not np.isfinite([row["score"] for row in run.scores]).all():
            raise ValueError("a score is not a finite number")
        return summarize(run)


def join(runs):
    """Runs of the same task, data and settings, but of other seeds, become one."""
    joined, free = [], ("seeds", "also", "episodes", "evaluations", "device")
    for run in runs:
        same = [x for x in joined if not {*run.seeds} & {*x.seeds}]
        same = [x for x in same if not training.differences(vars(run), vars(x), free)]
        for name in ("names", "notes", "seeds", "log", "scores") if same else ():
            getattr(same[0], name).extend(getattr(run, name))
        joined += [] if same else [run]
    return [summarize(run) for run in joined]


def summarize(run):
    """Adds what a run's tables tell. final: {(method, β): scores [seeds, episodes]};
    for pictures, {line: {x: numbers}}: curves and critic by step, sweep by β.
    """
    given, run.name = run.settings, " + ".join(run.names)
    run.mark = f" ({run.data['kind']} data)" * (run.data["kind"] != "D4RL")
    run.betas, demo = given["beta"], training.DEMO if run.task == data.DEMO else {}
    run.usual = srpo.TABLE_2.get(run.task) or demo.get("beta", [None])[0]
    run.beta = run.usual if run.usual in run.betas else run.betas[0]
    default = vars(Settings(run.task, beta=run.beta)) | demo
    elsewhere = "beta", "also", "episodes", "evaluations", "precision"
    differ = [x for x in given if given[x] != default[x] and x not in elsewhere]
    run.other = ", ".join(f"{x} {given[x]}" for x in differ)

    run.final, run.curves, last = {}, {}, (None, given["policy_steps"])
    for (method, beta), steps in training.by_policy(run.scores).items():
        label = NAMES[method] + (f", β = {beta:g}" if beta else "")
        for step, by_seed in steps.items():
            scores = [by_seed[seed] for seed in run.seeds if seed in by_seed]
            if step in last and len({*map(len, scores)}) == 1:
                if len(scores) >= len(run.final.get((method, beta), [])):
                    run.final[method, beta] = np.array(scores)
            if step is not None and beta in (None, run.beta):
                run.curves.setdefault(label, {})[step] = [np.mean(x) for x in scores]
    sweep = {b: x.mean(1) for (method, b), x in run.final.items() if method == "srpo"}
    run.sweep = {"SRPO": sweep} if len(sweep) > 1 else {}

    run.critic, bad = {}, []
    run.bound = run.data["largest_reward"] / (1 - given["gamma"])
    for seed in run.seeds:
        rows = [row for row in run.log if row["seed"] == seed]
        q = {row["step"]: [row["q"]] for row in rows if row["stage"] == "critic"}
        numbers = [x for row in rows for x in row.values() if isinstance(x, float)]
        what = "" if np.isfinite(numbers).all() else " lost"
        if any(not abs(x) <= run.bound for (x,) in q.values()):
            what = " diverged"
        run.critic[f"seed {seed}{what}"] = q
        bad += [f"seed {seed}{what}"] * bool(what)
    wanted = [("srpo", x) for x in run.betas] + [(x, None) for x in given["also"]]
    done = all(len(run.final.get(x, [])) == len(run.seeds) for x in wanted)
    at = " ({stage}, step {step:,})".format(**run.log[-1]) if run.log else ""
    status = "finished" if done else "unfinished" + at
    run.status = ", ".join([status, *bad, *run.notes])
    return run


def scores_text(scores):
    return f"{training.mean_std(scores)} ({len(scores)} × {len(scores[0])})"


def with_interval(tasks, minus=0):
    """The average of tasks' seed means, less a number, and its bootstrap interval."""
    rng, sign = np.random.default_rng(0), "+" if minus else ""
    drawn = [rng.choice(means, (10_000, len(means))).mean(1) for means in tasks]
    low, high = np.percentile(np.mean(drawn, 0) - minus, (2.5, 97.5))
    told = f"{np.mean([x.mean() for x in tasks]) - minus:{sign}.1f} "
    several = min(map(len, tasks)) > 1
    return told + (f"[{low:{sign}.1f}, {high:{sign}.1f}]" if several else "(one seed)")


def table_1(runs):
    """The paper's table with ours beside it."""
    ours, means, rows = {x.task: x for x in runs if x.task in x.names}, {}, []
    for name, (*printed, std) in PAPER.items():
        row = {"task": name, **dict(zip(METHODS, printed)), "SRPO (here)": "not run"}
        paper, run, group = float(printed[-1]), ours.get(name), GROUPS.get(name, [name])
        row["SRPO"] += f" ± {std}" * (std != "–")
        if run:
            scores = run.final.get(("srpo", run.beta))
            row["SRPO (here)"] = "unfinished" if scores is None else scores_text(scores)
            row["SRPO (here)"] += run.mark
            row["β, other settings"] = f"{run.beta:g} {run.other}"
            if scores is not None and not run.mark and not run.other:
                means[name] = scores.mean(1)
        ready = [means[task] for task in group if task in means]
        if name in GROUPS:
            row["SRPO (here)"] = f"{len(ready)} of {len(group)} tasks"
        if len(ready) == len(group):
            row["SRPO (here)"] += f", {with_interval(ready)}" * (name in GROUPS)
            row["here − paper"] = with_interval(ready, paper)
        rows.append(row)
    return rows


def table_of_runs(runs, wrong):
    """A row for each run, in sweeps for each β; and for what is none: the reason."""
    rows = []
    for run, beta in ((run, beta) for run in runs for beta in run.betas):
        row = {"run": run.name, "β": f"{beta:g}"} | dict.fromkeys(NAMES.values(), "")
        for method, name in NAMES.items():
            scores = run.final.get((method, beta if method == "srpo" else None))
            row[name] = "" if scores is None else scores_text(scores)
        row["data's mean"] = f"{run.data['data_score']:.1f}{run.mark}"
        rows.append(row | {"status": run.status, "other settings": run.other})
    return rows + [{"run": x, "status": f"not used: {why}"} for x, why in wrong.items()]


def draw_run(axes, kind, run):
    """A run's curves, critic or sweep: means and, of several seeds, ± deviation."""
    for label, points in getattr(run, kind).items():
        x, y = sorted(points), [np.array(points[x]) for x in sorted(points)]
        mean, diverged = np.array([one.mean() for one in y]), "diverged" in label
        look = "x--" if diverged else "o-" if kind == "sweep" else "-"
        axes.plot(x, mean, look, label=label, markersize=4)
        if min(map(len, y)) > 1:
            std = np.array([one.std(ddof=1) for one in y])
            axes.fill_between(x, mean - std, mean + std, alpha=0.2, lw=0)
        if kind == "sweep":
            axes.set_xscale("log")
            axes.set_xticks(x, [f"{beta:g}" for beta in x])
            axes.minorticks_off()
        if diverged:
            axes.set_yscale("symlog")
    level, paper = {"color": "gray", "lw": 1}, PAPER.get(run.task)
    if kind == "critic":
        sign = -1 if axes.dataLim.y0 + axes.dataLim.y1 < 0 else 1
        axes.axhline(sign * run.bound, ls="--", label="bound of a return", **level)
        return
    axes.axhline(run.data["data_score"], ls="--", label="the data's mean", **level)
    if kind == "sweep" and run.usual:
        label = "β of Table 2" if paper else "the demo's β"
        axes.axvline(run.usual, ls=":", label=label, **level)
    if paper:
        axes.axhline(float(paper[-2]), c="black", lw=1, label="SRPO in the paper")


def picture(out, kind, runs, xlabel, ylabel):
    """out/kind.png and .pdf, a panel a run, or neither; its Markdown."""
    paths = [out / f"{kind}.{ending}" for ending in ("png", "pdf")]
    for path in paths:
        path.unlink(missing_ok=True)
    if not (runs := [run for run in runs if any(getattr(run, kind).values())]):
        return ""
    across, down = min(3, len(runs)), -(-len(runs) // 3)
    figure = Figure(figsize=(4 * across, 3.2 * down + 0.6), layout="constrained")
    for place, run in enumerate(runs, 1):
        axes = figure.add_subplot(down, across, place, xlabel=xlabel, ylabel=ylabel)
        axes.set_title(f"{run.name}\n{run.mark}".strip(), size=10, parse_math=False)
        axes.locator_params("x", nbins=5)
        draw_run(axes, kind, run)
        axes.legend(fontsize="x-small")
    for path in paths:
        figure.savefig(path, dpi=110)
    return f"![{kind}]({kind}.png)"


def report(out):
    """Table 1, Fig. 6, 8 and 13-16 of the runs in OUT/TASK and OUT/NAME/TASK"""
    if (out / "config.json").exists():
        raise UserError(f"{out} is a run's folder; --out is the one around it")
    runs, wrong = [], {}
    for path in sorted([*out.glob("*/config.json"), *out.glob("*/*/config.json")]):
        name = path.parent.relative_to(out).as_posix()
        try:
            runs.append(read_run(path.parent, name))
        except UserError as error:
            wrong[name] = error
    if not runs and not wrong:
        raise UserError(f"{out} holds no run: train a task, or give another --out")
    runs = join(runs)
    every, steps = table_of_runs(runs, wrong), "gradient steps"
    text = [REPORT.format(out=out), table(table_1(runs)), "", table(every), ""]
    text.append(picture(out, "curves", runs, steps, "normalized score"))  # Fig. 6, 16
    text.append(picture(out, "critic", runs, steps, "mean Q of the critic"))  # Fig. 13
    text.append(picture(out, "sweep", runs, "β", "normalized score"))  # Fig. 15
    files.write_atomically(out / "report.md", "\n".join(text).encode())
    say(f"{table(every)}\nTable 1 and pictures: {out / 'report.md'}")


# ---------------- film: a policy at work


def film(folder, seed):
    """A GIF of an episode of a run's first β, FOLDER/film.gif, 8 seconds"""
    config = training.read_config(folder)
    task, maze = config["task"], "maze" in config["task"]
    policies = training.load_policies(folder, config, "srpo")
    policies = {one: policy for one, _, policy in reversed(policies)}
    seed = config["seeds"][0] if seed is None else seed
    if seed not in policies:
        raise UserError(f"{folder} has no seed {seed}, but {config['seeds']}")
    env, poses = data.the_env(task).unwrapped, []
    parts = (env.sim.model, "_model"), (env.sim.data, "_data")
    model, state = (getattr(x, name, x) for x, name in parts)
    body, walls = model.geom_bodyid > 0, model.geom_type == 6  # mjGEOM_BOX
    # mjGEOM_CAPSULE lies along its z; the others are spheres
    length = np.where(model.geom_type == 3, model.geom_size[:, 1], 0)[body, None]

    def watched(obs, rng):
        x, axes = state.geom_xpos[body], state.geom_xmat[body].reshape(-1, 3, 3)
        half = length * axes[..., 2] + 1e-3  # else nothing is drawn
        pose = np.stack([x - half, x + half], 1)  # [geoms, 2 ends, 3]
        poses.append(pose[..., [0, 1] if maze else [0, 2]])
        return policies[seed](obs, rng)

    total, _ = data.run_episode(task, seed, watched, 0)
    torso, steps = np.array(poses)[:, 0].mean(1), len(poses)  # [steps, 2]
    low, high, at_goal = np.array([-2, -0.1]), np.array([2, 2.1]), [""] * steps
    sides = 2 * model.geom_size[walls, :2]
    corners = state.geom_xpos[walls, :2] - sides / 2
    if maze:  # without most of the outer walls
        low, high = corners.min(0) + 0.7 * sides[0], (corners + 0.3 * sides).max(0)
    width, height = 6.4 * (high - low) / max(high - low)
    figure = Figure(figsize=(width, height + 0.9))  # above: title and legend
    axes = figure.add_axes((0, 0, 1, height / (height + 0.9)), ylim=(low[1], high[1]))
    axes.axis("off")
    if maze:
        how = {"align": "edge", "color": "0.75", "label": "wall"}
        axes.bar(corners[:, 0], sides[:, 1], sides[:, 0], corners[:, 1], **how)
        # the origin of maze2d's is at 1.2
        goal = np.add(env._target, 1.2) if "2d" in task else env.target_goal
        axes.add_patch(Circle(goal, 0.5, color="gold", label="goal"))
        near = np.linalg.norm(torso - goal, axis=1) < 0.5
        at_goal = [f", {count} of them at the goal" for count in near.cumsum()]
    else:
        axes.vlines(range(-9, 99), 0, 0.1, color="gray", label="meters")
    (path,) = axes.plot([], [], "C1", lw=2, label="its path")
    wide = 144 * model.geom_size[body, 0] * width / (high - low)[0]  # in points
    robot = axes.add_collection(LineCollection(poses[0], lw=wide, capstyle="round"))
    axes.plot([], [], "C0o", label="robot")
    place = {"loc": "upper left", "bbox_to_anchor": (0, 1 - 0.42 / (height + 0.9))}
    figure.legend(ncols=4, frameon=False, **place)
    score, kind = data.normalized_score(task, total), config["data"]["kind"]
    title = f"{task} ({kind} data), SRPO, seed {seed}, score {score:.1f}"
    label, images = figure.text(0.02, 0.98, "", va="top", fontsize=11), []
    for step in np.linspace(0, steps - 1, min(64, steps)).astype(int):
        axes.set_xlim(np.add((low[0], high[0]), 0 if maze else torso[step, 0]))
        path.set_data(torso[: step + 1].T)
        robot.set_segments(poses[step])
        label.set_text(f"{title}\nstep {step + 1} of {steps}{at_goal[step]}")
        figure.savefig(image := io.BytesIO(), dpi=100)
        images.append(Image.open(image).convert("RGB"))
    few = images[-1].quantize(32)  # colors, of all frames
    images = [x.quantize(palette=few, dither=Image.Dither.NONE) for x in images]
    how = {"append_images": images[1:], "duration": 8000 // len(images), "loop": 0}
    images[0].save(folder / "film.gif", save_all=True, **how)
    say(f"{folder / 'film.gif'}: {title}{at_goal[-1]}")


# ---------------- the command line


def command(arguments):
    functions = {x.__name__: x for x in (bandit, speed, report, film)}
    parser = files.Parser(prog="figures.py", description=__doc__.splitlines()[0])
    commands, add = parser.add_subparsers(dest="command", required=True), {}
    for name, function in functions.items():
        add[name] = commands.add_parser(name, help=function.__doc__).add_argument
    for name, out in ("bandit", "figures"), ("speed", "figures"), ("report", "runs"):
        add[name]("--out", type=files.folder, default=Path(out), help=f"default: {out}")
    for name in ("bandit", "speed"):
        add[name]("--quick", action="store_true", help="less exact, in minutes")
    add["speed"]("--task", default="halfcheetah-medium-v2", help="default: %(default)s")
    add["speed"]("--seeds", type=files.positive, default=6, help="default: 6")
    add["film"]("folder", type=files.folder, help="a run's folder, runs/TASK")
    add["film"]("--seed", type=files.whole, help="default: the run's first")
    given = vars(parser.parse_args(arguments))
    style.use(["default", "tableau-colorblind10"])
    functions[given.pop("command")](**given)


def main(arguments=None):
    """The command line; returns 0, or 2 for what its user can mend."""
    return files.program("figures", partial(command, arguments))


if __name__ == "__main__":
    sys.exit(main())
