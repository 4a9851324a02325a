"""The paper's figures and tables, each by one command; all but `report` and `film` need no data.

    python figures.py bandit          Fig. 2-5 and 9-12, the 2-D experiments, into assets/
    python figures.py speed           Fig. 1 and 7: what a gradient step and an action cost
    python figures.py report          Table 1, Fig. 6, 8, 13-16 from runs/, into runs/report.md
    python figures.py film runs/TASK  a GIF of one episode
"""
import csv
import dataclasses
import functools
import json
import math
import os
import platform
import re
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import threadpoolctl
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import data
import srpo
from data import UserError
from diffusion import alpha_sigma, behavior_loss, log_likelihood
from models import Draw, Linear, NoiseModel, Policy, TwinQ, Value, fresh, mlp
from srpo import adam, policy_loss, surrogate_gradient

matplotlib.use("agg")
from matplotlib import animation, collections, pyplot  # noqa: E402

# -------------------------------------------------------------------- bandit: Fig. 2, 3, 4, 5 and 9 to 12

NAMES = ("8 Gaussians", "moons", "swiss roll", "rings", "checkerboard", "2 spirals")
EXACT = "8 Gaussians, exact score"
BETAS = (10.0, 1.0, 0.1, 0.01, 0.001)
EQ_10, REGRESSION, GAUSSIAN = "Eq. 10: t = 0.02 alone", "weighted regression", "Gaussian reverse KL"
GRADIENTS = {  # ω(t) and the range of t in Eq. 15
    EQ_10: ("alpha_over_sigma", 0.02, 0.02),
    "ensemble, ω = α/σ": ("alpha_over_sigma", 0.02, 0.98),
    "ensemble, ω = 1": ("one", 0.02, 0.98),
    "ensemble, ω = σ²": ("sigma2", 0.02, 0.98),
}
EDGE = 4.8  # of the pictures
ROWS, TIME, NOISE = 1, 2, 3  # purposes of random numbers


def behavior_distributions():
    """Six mixtures of 2,048 equal Gaussians: centers [6, 2048, 2] and standard deviations [6, 1, 1].

    The centers are scikit-learn's shapes without their noise, at FFJORD's scale (Grathwohl et al., 2019); so
    density and score are exact.
    """
    from sklearn.datasets import make_circles, make_moons, make_swiss_roll

    n = 2048
    angle = np.arange(n) // (n // 8) * math.pi / 4
    gaussians = 2.83 * np.stack([np.cos(angle), np.sin(angle)], -1)
    moons = 2 * make_moons(n, shuffle=False)[0] - [1, 0.2]
    roll = make_swiss_roll(n, random_state=0)[0][:, [0, 2]] / 5
    rings = 3.6 * make_circles(n, factor=0.5, shuffle=False)[0]
    x, y = np.meshgrid(*[(np.arange(64) + 0.5) / 8 - 4] * 2)
    board = np.stack([x, y], -1)[(x // 2 + y // 2) % 2 == 0]
    angle = math.pi * np.sqrt(0.6 + 5.65 * (np.arange(n // 2) + 0.5) / (n // 2))  # from 0.77 π, off the middle, to 2.5 π
    arm = 0.46 * angle[:, None] * np.stack([-np.cos(angle), np.sin(angle)], -1)
    centers = np.stack([gaussians, moons, roll, rings, board, np.concatenate([arm, -arm])])
    return torch.tensor(centers).float(), torch.tensor([0.35, 0.2, 0.2, 0.25, 0.1, 0.2])[:, None, None]


def log_density(a, centers, std):
    """log μ(a) of such a mixture, [*seeds, B]."""
    exponent = -torch.cdist(a, centers).square() / (2 * std**2)  # [*seeds, B, centers]
    return exponent.logsumexp(-1) - (2 * math.pi * len(centers[0]) * std[..., 0] ** 2).log()


def exact_noise_model(centers, std):
    """Eq. 6 for such a mixture: ε* = σ Σ r (a_t − α c) / (α² std² + σ²), r the responsibilities."""

    def noise_model(a_t, s, t):
        alpha, sigma = alpha_sigma(t.unsqueeze(-1))
        variance = (alpha * std) ** 2 + sigma**2
        gap = a_t.unsqueeze(-2) - alpha.unsqueeze(-1) * centers.unsqueeze(-3)  # [*seeds, B, centers, 2]
        share = (-gap.square().sum(-1) / (2 * variance)).softmax(-1)
        return sigma / variance * (share.unsqueeze(-1) * gap).sum(-2)

    return noise_model


def train_behavior(data, seed, steps=5000, pairs=64, lr=3e-3):
    """Eq. 13 on all of data [6, N, 2] side by side: a noise model with six seeds, each its own distribution.

    So few steps need little noise: every action is perturbed by ε and by −ε, and t = u² is small more often, which
    leaves the minimum ε* where it is.
    """
    net = fresh(seed.tolist(), 1, lambda: NoiseModel(0, 2, width=64, blocks=2))
    optimizer = torch.optim.Adam(net.parameters(), lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        draw = Draw(seed, torch.tensor(step, dtype=torch.int32))
        rows = draw.index(ROWS, (pairs,), data.shape[1]).unsqueeze(-1).expand(-1, -1, 2)
        a, t = data.gather(1, rows).repeat(1, 2, 1), draw.uniform(TIME, (pairs,)).square().repeat(1, 2)
        noise = draw.normal(NOISE, (pairs, 2))
        loss = behavior_loss(net, a[..., :0], a, t, torch.cat([noise, -noise], 1))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        schedule.step()
    return net.requires_grad_(False)


def extract(noise_model, seed, target, steps=250, lr=0.1):
    """Eq. 15 with Q(a) = −‖a − a_tar‖² and the action itself as a Dirac policy's only parameter, by Adam.

    Every gradient, β and target [T, 2] side by side, each action starting at its target: {gradient: solutions
    [*seeds, betas, T, 2]}.
    """
    target = target.repeat(len(BETAS), 1)  # [betas · T, 2]
    beta = torch.tensor(BETAS).repeat_interleave(len(target) // len(BETAS)).unsqueeze(-1)
    a = target.repeat(len(GRADIENTS), len(seed), 1, 1)
    m, v = torch.zeros_like(a), torch.zeros_like(a)
    for step in range(1, steps + 1):
        draw = Draw(seed, torch.tensor(step, dtype=torch.int32))
        u, noise = draw.uniform(TIME, (len(target),)), draw.normal(NOISE, (len(target), 2))
        gradient = torch.stack([
            surrogate_gradient(lambda s, a: -(a - target).square().sum(-1), noise_model, one[..., :0], one,
                               low + (high - low) * u, noise, beta, weighting, baseline=high > low)
            for one, (weighting, low, high) in zip(a, GRADIENTS.values())])
        rate = lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        adam(a, -gradient, m, v, torch.tensor(step), rate, 0.0)
    return dict(zip(GRADIENTS, a.unflatten(2, (len(BETAS), -1))))


def closed_forms(data, target):
    """Two other ways to a policy, without any training: {method: solutions [seeds, betas, T, 2]}.

    Forward KL (Eq. 2) with a Gaussian policy is weighted regression: its mean is the data's, weighted by exp(βQ).
    Reverse KL to a Gaussian behavior model: the maximum of log N(a; the data's mean and covariance) + βQ(a).
    """
    distance = torch.cdist(target, data).square()  # [seeds, T, N]
    regression = torch.stack([(-beta * distance).softmax(-1) @ data for beta in BETAS], 1)
    mean, precision = data.mean(1), torch.linalg.inv(torch.stack([rows.T.cov() for rows in data]))
    pull = 2 * torch.tensor(BETAS)[:, None, None]
    right = (precision @ mean.unsqueeze(-1)).unsqueeze(1) + pull * target.T  # [seeds, betas, 2, T]
    gaussian = torch.linalg.solve(precision.unsqueeze(1) + pull * torch.eye(2), right).mT
    return {REGRESSION: regression, GAUSSIAN: gaussian}


def draw_panels(path, rows):
    """A picture with one column per distribution; rows {label: paint(axes, column)}."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(rows), 6, figsize=(9, 1.47 * len(rows) + 0.25), layout="constrained",
                                   squeeze=False)
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    for (label, paint), line in zip(rows.items(), axes):
        line[0].set_ylabel(label, fontsize=9)
        for column, panel in enumerate(line):
            paint(panel, column)
            panel.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal", xticks=[], yticks=[])
            panel.spines[:].set(color="0.6", linewidth=0.6)
    for name, panel in zip(NAMES, axes[0]):
        panel.set_title(name, fontsize=10)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def bandit(out):
    """Fig. 2-5 and 9-12 as two pictures, a CSV and a table of how many solutions the behavior supports."""
    from matplotlib.collections import LineCollection

    out.mkdir(parents=True, exist_ok=True)
    seed, (centers, std) = torch.arange(6, dtype=torch.int32), behavior_distributions()
    draw = Draw(seed, torch.zeros((), dtype=torch.int32))
    rows = draw.index(ROWS, (20_000,), centers.shape[1]).unsqueeze(-1).expand(-1, -1, 2)
    data = centers.gather(1, rows) + std * draw.normal(NOISE, (20_000, 2))
    target = torch.cartesian_prod(*[torch.linspace(-4.5, 4.5, 10)] * 2)  # [100, 2]
    threshold = log_density(data[:, :5000], centers, std).quantile(0.01, -1)  # of the support, exact

    noise_model = train_behavior(data, seed)
    solutions = extract(noise_model, seed, target) | closed_forms(data[:, :5000], target)
    exact = extract(exact_noise_model(centers[:1, ::256], std[:1]), seed[:1], target)  # 8 different centers
    side = (torch.arange(64) + 0.5) / 32 * EDGE - EDGE
    grid = torch.cartesian_prod(side, side).expand(6, -1, -1)
    model = torch.cat([log_likelihood(noise_model, a[..., :0], a, 8) for a in grid.split(1024, 1)], 1)
    side = (torch.arange(150) + 0.5) / 75 * EDGE - EDGE
    fine = torch.stack([log_density(torch.cartesian_prod(side, side), c, s) for c, s in zip(centers, std)])

    inside_box = ((target >= data.amin(1)[:, None]) & (target <= data.amax(1)[:, None])).all(-1)  # [6, T]
    shares, records = {}, []
    for name, column, found in [(NAMES[i], i, solutions) for i in range(6)] + [(EXACT, 0, exact)]:
        for method, a in found.items():
            inside = log_density(a[column], centers[column], std[column]) >= threshold[column]  # [betas, T]
            from_box = inside[:, inside_box[column]].double().mean(-1).tolist()
            shares[method, name] = " / ".join(f"{100 * share:.0f}" for share in from_box)
            records += zip([method] * 5, BETAS, [name] * 5, inside.double().mean(-1).tolist(), from_box)
    with open(out / "bandit.csv", "w", newline="") as file:
        csv.writer(file).writerows([("method", "beta", "behavior", "inside", "inside_from_the_box"), *records])
    columns = [NAMES[0], EXACT, *NAMES[1:]]
    print(f"Solutions inside the behavior's support, in percent, for β = {' / '.join(f'{beta:g}' for beta in BETAS)}:\n")
    for line in ("", *columns), ("---",) * 8, *((x, *(shares.get((x, y), "–") for y in columns)) for x in solutions):
        print("|", " | ".join(line), "|")

    def image(panel, density):
        size = math.isqrt(len(density))
        panel.imshow(density.view(size, size).T, origin="lower", extent=(-EDGE, EDGE, -EDGE, EDGE), cmap="cividis",
                     interpolation="bilinear", vmin=0, vmax=float(density.quantile(0.99)))

    def arrows(method, beta):
        """From each target to its solution, colored by the target, above the support in gray."""
        def paint(panel, column):
            a = solutions[method][column, BETAS.index(beta)]
            density = (fine[column] - threshold[column]).view(150, 150).T
            panel.contourf(side, side, density, levels=[0, math.inf], colors="0.86")
            lines = LineCollection(torch.stack([target, a], 1).numpy(), array=target[:, 0].numpy(), cmap="plasma",
                                   linewidths=0.5, alpha=0.6, clim=(-4.5, 6))
            panel.add_collection(lines)
            panel.scatter(*a.T, c=target[:, 0], s=7, cmap="plasma", vmin=-4.5, vmax=6, linewidths=0, zorder=3)
        return paint

    draw_panels(out / "bandit.png", {
        "data": lambda panel, i: panel.plot(*data[i, :3000].T, ",", color="#00224e", alpha=0.7),
        "model density\n(Eq. 7)": lambda panel, i: image(panel, model[i].exp()),
        **{f"SRPO (Eq. 10)\nβ = {beta:g}": arrows(EQ_10, beta) for beta in (10, 1, 0.1)},
        "weighted regr.\nβ = 0.1": arrows(REGRESSION, 0.1), "Gaussian rev. KL\nβ = 0.1": arrows(GAUSSIAN, 0.1)})
    draw_panels(out / "bandit_ensemble.png", {
        f"{x.replace(': ', ':').replace(', ', ':')}".replace(":", "\n", 1): arrows(x, 0.01) for x in GRADIENTS})


# --------------------------------------------------------------------------------------------------- command line


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="figures.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("bandit", help="2-D experiments: Fig. 2-5 and 9-12", allow_abbrev=False)
    one.add_argument("--out", type=Path, default=Path("assets"), help="the folder for pictures and CSV")
    one.set_defaults(run=bandit)
    given = vars(parser.parse_args(arguments))
    del given["command"]
    given.pop("run")(**given)


if __name__ == "__main__":
    main()
