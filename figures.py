"""The paper's figures and tables, each one command; a reader of the paper may skip it.

    python figures.py bandit          Fig. 2-5 and 9-12, the 2-D experiments
    python figures.py speed           Fig. 1 and 7: what a step and an action cost
    python figures.py report          Table 1, Fig. 6, 8 and 13-16, of the runs in runs/
    python figures.py film runs/TASK  a GIF of an episode

The first two need no data, and write into the folder figures/.
"""

import csv
import io
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.pop("MPLBACKEND", None)  # a notebook's can't be imported; we need none

import numpy as np
import torch
from matplotlib import style
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from PIL import Image

import data
import files
import run as runs_files
import srpo
from data import UserError
from diffusion import alpha_sigma, log_likelihood
from files import progress, say
from run import mean_std
from seeds import draw
from srpo import Settings

STYLE = ("default", "tableau-colorblind10")  # whatever the caller's style is
NAMES = {"srpo": "SRPO", "iql": "IQL", "bc": "BC", "idql": "IDQL", "random": "random"}


def table(rows, align=True):
    """Rows {column: text or number} as Markdown, without columns that are empty."""

    def text(x):
        if isinstance(x, (int, float)):
            return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"
        return " ".join(str(x).replace("|", "/").split())

    names = dict.fromkeys(name for row in rows for name in row)
    columns = [(x, "---", *(text(row.get(x, "")) for row in rows)) for x in names]
    columns = [column for column in columns if any(column[2:])]
    widths = [max(map(len, column)) if align else 0 for column in columns]
    lines = [map(str.ljust, line, widths) for line in zip(*columns)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, text.getvalue().encode())


# ---------------- bandit: Fig. 2, 3, 4, 5 and 9 to 12

TRAINING = {  # of the noise models
    **{"behavior_steps": 10_000, "behavior_batch": 512, "behavior_lr": 3e-3},
    **{"behavior_width": 64, "behavior_blocks": 2, "behavior_decay": 0, "dropout": 0},
}
QUICK = {"behavior_steps": 1500, "behavior_batch": 256}
BETAS = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
EQ_10, ENSEMBLE = "Eq. 10 (t → 0)", "ensemble, ω = σ²"
REGRESSION, GAUSSIAN = "weighted regression", "Gaussian reverse KL"
GRADIENTS = {  # ω(t) and the range of t in surrogate_gradient
    EQ_10: ("alpha_over_sigma", 0.02, 0.02),
    "ensemble, ω = α/σ": ("alpha_over_sigma", 0.02, 0.98),
    "ensemble, ω = 1": ("one", 0.02, 0.98),
    ENSEMBLE: ("sigma2", 0.02, 0.98),
}
EXACT = "8 Gaussians, exact score"
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
        """log μ(a) less its 1 % quantile on actions, [B]: not negative in the support.

        It is of the exact density: what a network learned has no say in it.
        """
        return self.log_density(a) - self.log_density(actions[:5000]).quantile(0.01)

    def noise_model(self, a_t, s, t):
        """ε* = σ Σ r (a_t − α c) / (α² std² + σ²), r: shares of the centers c."""
        alpha, sigma = alpha_sigma(t.unsqueeze(-1))
        variance = (alpha * self.std) ** 2 + sigma**2  # [..., 1]
        gap = a_t.unsqueeze(-2) - alpha.unsqueeze(-1) * self.centers  # [..., K, 2]
        share = (-gap.square().sum(-1) / (2 * variance)).softmax(-1)
        return sigma / variance * (share.unsqueeze(-1) * gap).sum(-2)


def behavior_distributions():
    """Six mixtures of 2,048 Gaussians: scikit-learn's shapes at FFJORD's scale
    (Grathwohl et al., 2019).
    """
    from sklearn.datasets import make_circles, make_moons, make_swiss_roll

    n = 2048
    angle = np.arange(n) // (n // 8) * math.pi / 4
    gaussians = 2.83 * np.stack([np.cos(angle), np.sin(angle)], -1)
    x, y = np.meshgrid(*[(np.arange(64) + 0.5) / 8 - 4] * 2)
    board = np.stack([x, y], -1)[(x // 2 + y // 2) % 2 == 0]
    along = 0.6 + 5.65 * (np.arange(n // 2) + 0.5) / (n // 2)
    angle = math.pi * np.sqrt(along)[:, None]  # 0.77 π to 2.5 π
    arm = 0.46 * angle * np.concatenate([-np.cos(angle), np.sin(angle)], -1)
    shapes = {
        "8 Gaussians": (gaussians, 0.35),
        "moons": (2 * make_moons(n, shuffle=False)[0] - [1, 0.2], 0.2),
        "swiss roll": (make_swiss_roll(n, random_state=0)[0][:, [0, 2]] / 5, 0.2),
        "rings": (3.6 * make_circles(n, factor=0.5, shuffle=False)[0], 0.25),
        "checkerboard": (board, 0.1),
        "2 spirals": (np.concatenate([arm, -arm]), 0.2),
    }
    tensors = {name: torch.tensor(x).float() for name, (x, _) in shapes.items()}
    return {name: Mixture(x, shapes[name][1]) for name, x in tensors.items()}


class Behaviors(srpo.Behavior):
    """The behavior stage of run.py, but each seed has data of its own."""

    cosine = True

    def __init__(self, settings, actions):
        """actions: [seeds, N, 2], without states."""
        super().__init__(settings, torch.zeros(1, 4), (0, 2), range(len(actions)))
        self.actions = actions

    def rows(self):
        how = {"dtype": torch.int64, "from": 0, "to": self.actions.shape[1]}
        index = draw(self.generators, "random_", self.batch, **how)
        a = self.actions.gather(1, index.unsqueeze(-1).expand(-1, -1, 2))
        return a[..., :0], a, None, None, None


def extract(noise_model, models, steps=250, lr=0.1):
    """Eq. 15 with Q(a) = −‖a − a_tar‖², ascended by Adam: a is a Dirac policy's
    parameter, first at its target; solutions [gradients, models, betas, targets, 2].
    """
    generator = torch.Generator().manual_seed(0)
    target = TARGETS.expand(models, len(BETAS), *TARGETS.shape)
    beta = torch.tensor(BETAS).unsqueeze(-1)
    actions = target.repeat(len(GRADIENTS), 1, 1, 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([actions], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def q(s, a):
        return -(a - target).square().sum(-1)

    with progress("extraction", " steps", steps) as bar:
        for _ in range(steps):
            u = torch.rand(target.shape[1:3], generator=generator).expand(
                models, -1, -1
            )
            noise = torch.randn(target.shape[1:], generator=generator)
            gradients = []
            for a, (omega, low, high) in zip(actions.detach(), GRADIENTS.values()):
                t, what = low + (high - low) * u, (a, noise.expand_as(a))
                inputs = q, noise_model, a[..., :0], what[0], t, what[1], beta, omega
                gradients.append(srpo.surrogate_gradient(*inputs, low < high))
            actions.grad = -torch.stack(gradients)
            optimizer.step()
            schedule.step()
            bar.update()
    return actions.detach()


def closed_forms(actions):
    """Other ways to a policy, without training: {method: solutions [betas, targets, 2]}.

    Forward KL (Eq. 2) with a Gaussian policy is weighted regression: the data's mean,
    weighted by exp(βQ). Reverse KL to a Gaussian behavior model: the maximum of
    log N(a; the data's mean and covariance) + βQ(a).
    """
    distance = torch.cdist(TARGETS, actions).square()  # [targets, N]
    mean, precision = actions.mean(0), torch.linalg.inv(actions.T.cov())
    regression, gaussian = [], []
    for beta in BETAS:
        regression.append((-beta * distance).softmax(-1) @ actions)
        pull = precision @ mean + 2 * beta * TARGETS
        matrix = precision + 2 * beta * torch.eye(2)
        gaussian.append(torch.linalg.solve(matrix, pull.T).T)
    return {REGRESSION: torch.stack(regression), GAUSSIAN: torch.stack(gaussian)}


def supported(behavior, actions, name, solutions):
    """CSV rows: the share of solutions in the support, of all targets and of those in
    the actions' box, and how far from its target a solution is.
    """
    in_box = (TARGETS >= actions.amin(0)) & (TARGETS <= actions.amax(0))
    in_box, rows = in_box.all(-1), []
    for method, found in solutions.items():
        for beta, a in zip(BETAS, found):
            inside = (behavior.margin(a, actions) >= 0).double()
            row = {"method": method, "beta": beta, "behavior": name}
            row |= {"inside": float(inside.mean())}
            row |= {"inside_from_the_box": float(inside[in_box].mean())}
            rows.append(row | {"distance": float((a - TARGETS).norm(dim=-1).mean())})
    return rows


@style.context(STYLE)
def draw_bandit(path, panels, rows, columns, title):
    """A picture of panels[row][column], each (actions, density, margin, solutions):
    lines lead from targets to solutions or, where these are None, there is a density.
    """
    height = 1.35 * len(panels) + 1.05
    figure = Figure(figsize=(1.4 * len(columns) + 0.3, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    grid = figure.subplots(len(panels), len(columns), squeeze=False)
    targets, extent = TARGETS.numpy(), (-EDGE, EDGE)
    look, gray = {"cmap": "plasma", "clim": (-4.5, 6)}, "0.83"
    for (row, column), axes in np.ndenumerate(grid):
        density, margin, solutions = panels[row][column]
        if solutions is None:
            axes.contour(SIDE, SIDE, margin, [0], colors="0.5", linewidths=0.8)
            image = axes.imshow(density, "Blues", origin="lower", extent=extent * 2)
            image.set(interpolation="bilinear", clim=(0, np.quantile(density, 0.99)))
        else:
            axes.contourf(SIDE, SIDE, margin, [0, math.inf], colors=gray)
            ways, color = np.stack([targets, solutions], 1), targets[:, 0]
            lines = LineCollection(ways, array=color, lw=0.6, alpha=0.6, **look)
            axes.add_collection(lines)
            axes.scatter(*targets.T, 1.5, "black", linewidths=0, alpha=0.5)
            axes.scatter(*solutions.T, 11, color, linewidths=0, zorder=3, **look)
        axes.set(xlim=extent, ylim=extent, aspect="equal", xticks=[], yticks=[])
        grid[0, column].set_title(columns[column], fontsize=9)
        grid[row, 0].set_ylabel(rows[row], fontsize=9)
    how = {"color": "none", "markeredgewidth": 0}
    dot = Line2D([], [], marker=".", markerfacecolor="0.3", markersize=4, **how)
    ball = Line2D([], [], marker="o", markerfacecolor="C1", markersize=6, **how)
    legend = {"target, the maximum of Q": dot, "solution": ball}
    legend["support (exact density)"] = Patch(facecolor=gray, edgecolor="0.5")
    how = {"loc": "outside lower center", "ncols": 3, "frameon": False}
    figure.legend(legend.values(), legend, fontsize=9, **how)
    figure.suptitle(title, fontsize=8.5)
    figure.savefig(path, dpi=170)
    with Image.open(path) as image:  # 64 colors: a quarter of the bytes
        few = image.convert("RGB").quantize(64, dither=Image.Dither.NONE)
        few.save(path, optimize=True)


def bandit(out, training):
    """Fig. 2-5 and 9-12: two pictures, a CSV and a table"""
    torch.set_num_threads(1)  # the same bits on any number of cores
    behaviors = behavior_distributions()
    samples = [one.sample(20_000, i) for i, one in enumerate(behaviors.values())]
    settings = Settings(beta=1.0, **TRAINING | training)
    stage = Behaviors(settings, torch.stack(samples))
    with progress("six noise models", " steps", stage.steps) as bar:
        while stage.done < stage.steps:
            bar.update(stage.advance(1))
    learned = stage.noise_model.requires_grad_(False)
    gaussians = behaviors["8 Gaussians"]
    exact = gaussians._replace(centers=gaussians.centers[::256])  # each of them once

    def noise_models(a_t, s, t):
        once = exact.noise_model(a_t[6:], s, t[6:])
        return torch.cat([learned(a_t[:6], s[:6], t[:6]), once])

    solutions = extract(noise_models, 7)
    densities = []
    with progress("learned densities (Eq. 7)", " pixels", len(PIXELS)) as bar:
        for pixels in PIXELS.expand(6, -1, -1).split(512, 1):
            densities.append(log_likelihood(learned, pixels[..., :0], pixels, steps=8))
            bar.update(pixels.shape[1])
    densities = torch.cat(densities, 1).exp()

    found, fields, records = {}, {}, []
    for i, (name, one) in enumerate(behaviors.items()):
        found[name] = dict(zip(GRADIENTS, solutions[:, i])) | closed_forms(samples[i])
        records += supported(one, samples[i], name, found[name])
        margin = one.margin(PIXELS, samples[i])
        mass = float(densities[i][margin >= 0].sum() / densities[i].sum())
        say(
            f"{name}: {mass:.1%} of the learned density is in the support, of data 99 %"
        )
        square = [x.view(len(SIDE), -1).T.numpy() for x in (densities[i], margin)]
        fields[name] = square
    again = dict(zip(GRADIENTS, solutions[:, 6]))
    records += supported(gaussians, samples[0], EXACT, again)
    write_csv(out / "bandit.csv", records)

    shares = {}  # of all six behaviors and, apart, with the exact score
    for record in records:
        where = record["method"] + ", exact score" * (record["behavior"] == EXACT)
        values = shares.setdefault(where, {}).setdefault(record["beta"], [])
        values.append(100 * record["inside_from_the_box"])
    means = {x: {b: np.mean(y) for b, y in row.items()} for x, row in shares.items()}
    say("\nShare of solutions in the support, mean of the behaviors, percent, by β\n")
    texts = {
        x: {f"{b:g}": f"{y:.0f}" for b, y in row.items()} for x, row in means.items()
    }
    say(table([{"": method, **row} for method, row in texts.items()]))

    best = {method: max(row, key=row.get) for method, row in means.items()}
    chosen = [(EQ_10, best[EQ_10]), (ENSEMBLE, best[ENSEMBLE])]
    chosen += [(ENSEMBLE, best[ENSEMBLE] / 10), (REGRESSION, best[REGRESSION])]

    def panel(name, method, beta):
        return *fields[name], found[name][method][BETAS.index(beta)].numpy()

    panels = [
        [(*fields[name], None), *[panel(name, *one) for one in chosen]]
        for name in SHOWN
    ]
    labels = ["behavior\n(learned, Eq. 7)"]
    for method, beta in chosen:
        labels.append(f"{method}\nβ = {beta:g}: {means[method][beta]:.0f} % inside")
    title = "β: with most solutions inside, of nine; for ω = σ² a tenth of it, too"
    draw_bandit(out / "bandit.png", panels, SHOWN, labels, title)
    panels = [[panel(name, x, 0.01) for name in behaviors] for x in GRADIENTS]
    labels = [name.replace(", ", ",\n") for name in GRADIENTS]
    title = "β = 0.01 with each ω(t)"
    draw_bandit(out / "bandit_ensemble.png", panels, labels, [*behaviors], title)
    say(f"-> {out}/bandit.png, bandit_ensemble.png, bandit.csv")


# ---------------- report: Table 1, Fig. 6, 8 and 13 to 16

TABLE_1 = """
BEAR 53.4 96.3 40.1 41.7 52.1 59.1 38.6 33.7 19.2 73.0 61.0 0.0 8.0 0.0 0.0
TD3+BC 90.7 98.0 110.1 48.3 59.3 83.7 44.6 60.9 81.8 78.6 71.4 10.6 3.0 0.2 0.0
IQL 86.7 91.5 109.6 47.4 66.3 78.3 44.2 94.7 73.9 87.5 62.2 71.2 70.0 39.6 47.5
SfBC 92.6 108.6 109.8 45.9 57.1 77.9 37.1 86.2 65.1 92.0 85.3 81.3 82.0 59.3 45.5
Diffuser 79.8 107.2 108.4 44.2 58.5 79.7 42.2 101.3 61.2 nan nan nan nan nan nan
Diffusion-QL 96.8 111.1 110.1 51.1 90.5 87.0 47.8 100.7 95.5 93.4 66.2 76.6 78.6 46.4 56.6
QGPO 93.5 108.0 110.7 54.1 98.0 86.0 47.6 96.9 84.4 96.4 74.4 83.6 83.8 66.6 64.8
IDQL 95.9 108.6 112.7 51.0 65.4 82.5 45.9 92.1 85.1 94.0 80.2 84.5 84.8 63.5 67.9
SRPO 92.2 100.1 114.0 60.4 95.5 84.4 51.4 101.2 84.6 97.1 82.1 80.7 75.0 53.6 53.6
± 3.0 13.9 2.1 0.8 2.0 4.4 3.4 1.0 7.1 2.7 10.8 7.1 12.3 12.5 6.3
"""  # noqa: E501; tasks as in TABLE_2: means of 6 seeds, SRPO's standard deviation
METHODS, *COLUMNS = zip(*map(str.split, TABLE_1.strip().splitlines()))
PAPER = dict(zip(srpo.TABLE_2, COLUMNS))  # {task: (BEAR's, ..., SRPO's, ±)}
REPORT = """# {out} beside the paper

Normalized scores at the final step, or of `run.py evaluate` where it was run: mean ±
standard deviation (N − 1) of the seeds' means (seeds × episodes); one seed has no ±.
[ ]: 95 % bootstrap interval over each task's seeds, the paper's mean taken as exact.
Averages and interquartile mean hold D4RL's own data alone; the paper's are those of its
rows (it prints 51.9 for BEAR in locomotion, elsewhere up to 0.5 more or less). Of
several β, Table 1 and the curves take Table 2's, else the first. Ablations (Fig. 8, 14)
are runs with other settings. The data's mean is over its trajectories. A seed is lost
if a loss was not finite, and its critic diverged if |mean Q| was above what the largest
reward can add up to."""


def read_folder(folder, name):
    """A run's config and tables; UserError if there is none, or it is damaged."""
    run = SimpleNamespace(**runs_files.read_config(folder), names=[name], notes=[])
    run.log = runs_files.read_csv(folder / "log.csv")
    run.scores = runs_files.read_csv(folder / "scores.csv")
    for path in sorted(folder.glob("evaluation-*.json")):
        with files.reading(path):
            made, keys = json.loads(path.read_text()), {*run.settings} - {"also"}
            keys |= {"task", "data", "torch", "seeds"}
            if differ := runs_files.differences(made, vars(run), sorted(keys)):
                told = f"{path.name} is of another run ({', '.join(differ)}): not used"
                run.notes.append(told)
            else:
                run.scores += made["scores"]  # of step None: these count at last
    numbers = [row["score"] for row in run.scores]
    if not np.isfinite(numbers).all():
        raise UserError("a score is not a finite number")
    return run


def join(runs):
    """Runs of one task, with the same data and settings, but other seeds, as one."""
    result = []
    for run in runs:
        keys = {*run.settings, "task", "data", "torch"}
        keys -= {"also", "episodes", "evaluations"}
        for one in result:
            differ = runs_files.differences(vars(run), vars(one), sorted(keys))
            if not differ and not {*run.seeds} & {*one.seeds}:
                for name in ("names", "notes", "seeds", "log", "scores"):
                    getattr(one, name).extend(getattr(run, name))
                break
        else:
            result.append(run)
    return result


def summarize(run):
    """Adds what a run's tables tell. final: {(method, β): scores [seeds, episodes]};
    for pictures {line: {x: a number a seed}}: curves, scores by step; critic, Q by
    step; sweep, scores by β.
    """
    given, default = run.settings, srpo.TABLE_2.get(run.task)
    run.name = " + ".join(run.names)
    run.mark = "" if run.data["kind"] == "D4RL" else f" ({run.data['kind']} data)"
    run.betas, run.final, run.curves = given["beta"], {}, {}
    demo = runs_files.DEMO if run.task == data.DEMO else {}
    usual = {x: demo[x] for x in demo if x in given} | {"beta": given["beta"]}
    usual = vars(Settings(run.task, **usual))
    run.usual_beta = default or demo.get("beta", [None])[0]
    run.beta = run.usual_beta if run.usual_beta in run.betas else run.betas[0]
    elsewhere = {"beta", "also", "episodes", "evaluations", "precision"}
    differ = [x for x in given if x not in elsewhere and given[x] != usual[x]]
    run.other = ", ".join(f"{x} {given[x]}" for x in differ)

    last = given["policy_steps"]
    for (method, beta), steps in runs_files.by_policy(run.scores).items():
        label = NAMES[method] + (f", β = {beta:g}" if beta else "")
        for step, scores in steps.items():
            scores = [scores[seed] for seed in run.seeds if seed in scores]
            if step in (None, last) and len({*map(len, scores)}) == 1:
                if len(scores) >= len(run.final.get((method, beta), [])):
                    run.final[method, beta] = np.array(scores)
            if step is not None and beta in (None, run.beta):
                run.curves.setdefault(label, {})[step] = [np.mean(x) for x in scores]
    means = {b: run.final["srpo", b].mean(1) for m, b in run.final if m == "srpo"}
    run.sweep = {"SRPO": means} if len(means) > 1 else {}

    run.critic, run.bound = {}, run.data["largest_reward"] / (1 - given["gamma"])
    for seed in run.seeds:
        rows = [row for row in run.log if row["seed"] == seed]
        numbers = [x for row in rows for x in row.values() if isinstance(x, float)]
        q = {row["step"]: [row["q"]] for row in rows if row["stage"] == "critic"}
        diverged = any(not abs(x) <= run.bound for (x,) in q.values())
        what = (
            " diverged" if diverged else "" if np.isfinite(numbers).all() else " lost"
        )
        run.critic[f"seed {seed}{what}"] = q
        run.notes += [f"seed {seed}{what}"] if what else []
    wanted = {("srpo", beta) for beta in run.betas}
    wanted |= {(method, None) for method in given["also"]}
    at = " ({stage}, step {step:,})".format(**run.log[-1]) if run.log else ""
    done = all(len(run.final.get(x, [])) == len(run.seeds) for x in wanted)
    run.status = ", ".join(["finished" if done else "unfinished" + at, *run.notes])
    return run


def size(scores):
    return "{} × {}".format(*scores.shape)


def interquartile_mean(tasks):
    """The mean of all runs' middle half, as rliable has it (Agarwal et al., 2021)."""
    means = np.sort(np.concatenate(tasks, -1), -1)
    cut = means.shape[-1] // 4
    return means[..., cut : means.shape[-1] - cut].mean(-1)


def average(tasks):
    return np.mean([means.mean(-1) for means in tasks], 0)


def with_interval(tasks, minus=0, statistic=average):
    """A statistic of the tasks' seed means, less a number, and its interval: seeds are
    drawn by task.
    """
    rng, sign = np.random.default_rng(0), "+" if minus else ""
    drawn = statistic([rng.choice(means, (10_000, len(means))) for means in tasks])
    low, high = np.percentile(drawn - minus, (2.5, 97.5))
    interval = f"[{low:{sign}.1f}, {high:{sign}.1f}]"
    interval = interval if min(map(len, tasks)) > 1 else "(one seed)"
    return f"{statistic(tasks) - minus:{sign}.1f} {interval}"


def table_1(runs, damaged):
    """The paper's table with ours beside it; damaged: names that cannot be read."""
    ours, real, rows = {run.task: run for run in runs if run.task in run.names}, {}, []
    last = "seeds × episodes", "here − paper", "β, other settings"

    def add(task, printed, here, *cells):
        row = {"task": task, **dict(zip(METHODS, printed)), "SRPO (here)": here}
        row |= dict(zip(last, [*cells, "", "", ""]))
        rows.append({x: cell.replace("nan", "–") for x, cell in row.items()})

    for task, (*printed, std) in PAPER.items():
        run, paper = ours.get(task), float(printed[-1])
        printed[-1] += f" ± {std}"
        scores = run and run.final.get(("srpo", run.beta))
        if scores is None:
            why = "damaged" if task in damaged else "not run"
            add(task, printed, "unfinished" if run else why)
            continue
        if not run.mark and not run.other:
            real[task] = scores.mean(1)
        difference = with_interval([real[task]], paper) if task in real else ""
        cells = size(scores), difference, f"{run.beta:g} {run.other}"
        add(task, printed, mean_std(scores) + run.mark, *cells)
    for name, group in (("locomotion", [*PAPER][:9]), ("AntMaze", data.ANTMAZE)):
        paper = np.array([PAPER[task][:-1] for task in group], float).mean(0)
        means = [real[task] for task in group if task in real]
        here = [f"incomplete ({len(means)} of {len(group)})"]
        if len(means) == len(group):
            here = with_interval(means), "", with_interval(means, paper[-1])
        add(f"average, {name}", map("{:.1f}".format, paper), *here)
    overall = "not run"
    if real:
        overall = with_interval([*real.values()], statistic=interquartile_mean)
    add("interquartile mean of all runs", [""] * 9, overall)
    return rows


def table_of_runs(runs, wrong):
    """A row for each run, in sweeps for each β; and for what is none, with the reason."""
    rows = []
    for run, beta in ((run, beta) for run in runs for beta in run.betas):
        row = {"run": run.name, "β": f"{beta:g}"} | dict.fromkeys(NAMES.values(), "")
        for method, name in NAMES.items():
            scores = run.final.get((method, beta if method == "srpo" else None))
            if scores is not None:
                row[name] = f"{mean_std(scores)} ({size(scores)})"
        row["data's mean"] = f"{run.data['data_score']:.1f}"
        row |= {"data": run.data["kind"], "status": run.status}
        rows.append(row | {"other settings": run.other})
    not_used = {name: f"not used: {reason}" for name, reason in wrong.items()}
    return rows + [{"run": name, "status": reason} for name, reason in not_used.items()]


def draw_run(axes, kind, run):
    """A run's curves, critic or sweep as mean and, of several seeds, ± deviation."""
    for label, points in getattr(run, kind).items():
        diverged = "diverged" in label
        x, y = sorted(points), [np.array(points[x]) for x in sorted(points)]
        mean = np.array([one.mean() for one in y])
        look = "x--" if diverged else "o-" if kind == "sweep" else "-"
        axes.plot(x, mean, look, label=label, markersize=4)
        if kind != "critic" and min(map(len, y)) > 1:
            std = np.array([one.std(ddof=1) for one in y])
            axes.fill_between(x, mean - std, mean + std, alpha=0.2, lw=0)
        if kind == "sweep":
            for beta, values in zip(x, y):
                axes.plot([beta] * len(values), values, ".", color="gray")
            axes.set_xscale("log")
            axes.set_xticks(x, [f"{beta:g}" for beta in x])
            axes.minorticks_off()
        if diverged:
            axes.set_yscale("symlog")
    level = {"color": "gray", "lw": 1}
    if kind == "critic":
        sign = -1 if axes.dataLim.y0 + axes.dataLim.y1 < 0 else 1
        label = "largest possible return"
        axes.axhline(sign * run.bound, ls="--", label=label, **level)
        return
    if kind == "sweep" and run.usual_beta:
        label = "β of Table 2" if run.task in PAPER else "the demo's β"
        axes.axvline(run.usual_beta, ls=":", label=label, **level)
    axes.axhline(run.data["data_score"], ls="--", label="the data's mean", **level)
    if run.task in PAPER:
        paper = float(PAPER[run.task][-2])
        axes.axhline(paper, color="black", lw=1, label="SRPO in the paper")


@style.context(STYLE)
def picture(out, kind, runs, xlabel, ylabel):
    """out/kind.png and .pdf, a panel a run, or neither; its Markdown."""
    runs, path = [run for run in runs if any(getattr(run, kind).values())], out / kind
    if not runs:
        for ending in (".png", ".pdf"):
            path.with_suffix(ending).unlink(missing_ok=True)
        return ""
    across, down = min(3, len(runs)), -(-len(runs) // 3)
    figure = Figure(figsize=(4 * across, 3.2 * down + 0.6), layout="constrained")
    for place, run in enumerate(runs, 1):
        axes = figure.add_subplot(down, across, place, xlabel=xlabel, ylabel=ylabel)
        title = f"{run.name}\n{run.mark}".strip().replace("$", r"\$")
        axes.set_title(title, fontsize="medium")
        draw_run(axes, kind, run)
        if kind != "sweep":
            axes.locator_params("x", nbins=5)
        axes.legend(fontsize="x-small")
    for ending in ("png", "pdf"):
        figure.savefig(image := io.BytesIO(), format=ending, dpi=110)
        files.write_atomically(path.with_suffix(f".{ending}"), image.getvalue())
    return f"![{kind}]({kind}.png)"


def report(out):
    """Table 1, Fig. 6, 8 and 13-16 of the runs in OUT/TASK and OUT/NAME/TASK"""
    if (out / "config.json").exists():
        raise UserError(f"{out} is a run's folder; give the one around it: --out")
    folders = {
        x.parent for x in [*out.glob("*/config.json"), *out.glob("*/*/config.json")]
    }
    if not folders:
        raise UserError(
            f"{out} holds no run; train a task first, or give another --out"
        )
    folders |= {
        x for x in out.iterdir() if x.is_dir() and not [*x.glob("*/config.json")]
    }
    runs, wrong, missing = [], {}, set()
    for folder in sorted(folders):
        name = folder.relative_to(out).as_posix()
        if not (folder / "config.json").exists():
            missing.add(name)
        try:
            runs.append(read_folder(folder, name))
        except UserError as error:
            wrong[name] = error
    runs = [summarize(run) for run in join(runs)]
    beside, every = table_1(runs, {*wrong} - missing), table_of_runs(runs, wrong)
    say(table(every))
    text = [REPORT.format(out=out), table(beside, False), table(every, False)]
    score, steps = "normalized score", "gradient steps"
    text.append(picture(out, "curves", runs, steps, score))  # Fig. 6, 16
    text.append(picture(out, "critic", runs, steps, "mean Q of the critic"))  # Fig. 13
    text.append(picture(out, "sweep", runs, "β", score))  # Fig. 15
    written = "\n\n".join(filter(None, text)) + "\n"
    files.write_atomically(out / "report.md", written.encode(errors="replace"))
    say(f"Table 1 and pictures: {out / 'report.md'}")


# ---------------- command line


def parse(arguments):
    parser = files.Parser(prog="figures.py", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = {}
    for name, command in COMMANDS.items():
        add[name] = commands.add_parser(name, help=command.__doc__).add_argument
    help = "for pictures and CSV; default: figures"
    add["bandit"]("--out", type=files.folder, default=Path("figures"), help=help)
    help = "noise models of a minute"
    add["bandit"](
        "--quick",
        dest="training",
        action="store_const",
        const=QUICK,
        default={},
        help=help,
    )
    help = "the folder that holds the runs; default: runs"
    add["report"]("--out", type=files.folder, default=Path("runs"), help=help)
    return vars(parser.parse_args(arguments))


COMMANDS = {function.__name__: function for function in (bandit, report)}


def main(arguments=None):
    """The command line; returns 0, or 2 for what its user can mend."""

    def command():
        given = parse(arguments)
        COMMANDS[given.pop("command")](**given)

    return files.program("figures", command)


if __name__ == "__main__":
    sys.exit(main())
