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
import multiprocessing
import os
import platform
import re
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
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
GRADIENTS = {  # ω(t) and the range of t in surrogate_gradient
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
    angle = math.pi * np.sqrt(0.6 + 5.65 * (np.arange(n // 2) + 0.5) / (n // 2))  # 0.77 π to 2.5 π
    arm = 0.46 * angle[:, None] * np.stack([-np.cos(angle), np.sin(angle)], -1)
    centers = np.stack([gaussians, moons, roll, rings, board, np.concatenate([arm, -arm])])
    return torch.tensor(centers).float(), torch.tensor([0.35, 0.2, 0.2, 0.25, 0.1, 0.2])[:, None, None]


def log_density(a, centers, std):
    """log μ(a) of such a mixture, [*seeds, B]."""
    exponent = -torch.cdist(a, centers).square() / (2 * std**2)  # [*seeds, B, centers]
    return exponent.logsumexp(-1) - (2 * math.pi * centers.shape[-2] * std[..., 0] ** 2).log()


def exact_noise_model(centers, std):
    """ε* of such a mixture, exactly: σ Σ r (a_t − α c) / (α² std² + σ²), r the responsibilities."""

    def noise_model(a_t, s, t):
        alpha, sigma = alpha_sigma(t.unsqueeze(-1))
        variance = (alpha * std) ** 2 + sigma**2
        gap = a_t.unsqueeze(-2) - alpha.unsqueeze(-1) * centers.unsqueeze(-3)  # [*seeds, B, centers, 2]
        share = (-gap.square().sum(-1) / (2 * variance)).softmax(-1)
        return sigma / variance * (share.unsqueeze(-1) * gap).sum(-2)

    return noise_model


def train_behavior(data, seed, steps=5000, pairs=64, lr=3e-3):
    """behavior_loss on all of data [6, N, 2] side by side: a noise model of six seeds, a distribution each.

    So few steps need little noise: every action is perturbed by ε and by −ε, and t = u² is small more often,
    which leaves the minimum ε* where it is.
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
    """surrogate_gradient with Q(a) = −‖a − a_tar‖², ascended by Adam: a is a Dirac policy's parameter.

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

    Forward KL (Eq. 2) with a Gaussian policy is weighted regression: the data's mean, weighted by exp(βQ).
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
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    with Image.open(path) as image:  # 128 colors: a quarter of the bytes
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def learn(data, seed, target, grid):
    """The long part, on one thread: `extract` from learned models, and their log-density on grid [N, 2]."""
    torch.set_num_threads(1)
    noise_model = train_behavior(data, seed)
    parts = grid.expand(len(seed), -1, -1).split(1024, 1)
    density = torch.cat([log_likelihood(noise_model, a[..., :0], a, 8) for a in parts], 1)
    return extract(noise_model, seed, target), density


def bandit(out):
    """Fig. 2-5 and 9-12 as two pictures, a CSV and a table of how many solutions the behavior supports."""
    out.mkdir(parents=True, exist_ok=True)
    seed, (centers, std) = torch.arange(6, dtype=torch.int32), behavior_distributions()
    draw = Draw(seed, torch.zeros((), dtype=torch.int32))
    rows = draw.index(ROWS, (20_000,), centers.shape[1]).unsqueeze(-1).expand(-1, -1, 2)
    data = centers.gather(1, rows) + std * draw.normal(NOISE, (20_000, 2))
    target = torch.cartesian_prod(*[torch.linspace(-4.5, 4.5, 10)] * 2)  # [100, 2]
    threshold = log_density(data[:, :5000], centers, std).quantile(0.01, -1)  # of the support, exact

    side = (torch.arange(64) + 0.5) / 32 * EDGE - EDGE
    grid = torch.cartesian_prod(side, side)
    # Steps are too small for two threads, and one gives the same bits on every number of cores.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(learn, data[i:i + 3].clone(), seed[i:i + 3], target, grid) for i in (0, 3)]
        (one, left), (two, right) = [task.result() for task in tasks]
    solutions = {method: torch.cat([one[method], two[method]]) for method in one}
    solutions |= closed_forms(data[:, :5000], target)
    exact = extract(exact_noise_model(centers[:1, ::256], std[:1]), seed[:1], target)  # 8 different centers
    model = torch.cat([left, right])
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
        head = "method", "beta", "behavior", "inside", "inside_from_the_box"
        csv.writer(file).writerows([head, *records])
    columns = [NAMES[0], EXACT, *NAMES[1:]]
    print("Share inside the support, percent, for β =", " / ".join(f"{x:g}" for x in BETAS), "\n")
    table = [(x, *(shares.get((x, y), "–") for y in columns)) for x in solutions]
    for line in ("", *columns), ("---",) * 8, *table:
        print("|", " | ".join(line), "|")

    def image(panel, density):
        size = math.isqrt(len(density))
        panel.imshow(density.view(size, size).T, origin="lower", extent=(-EDGE, EDGE) * 2, cmap="cividis",
                     interpolation="bilinear", vmin=0, vmax=float(density.quantile(0.99)))

    def arrows(method, beta):
        """From each target to its solution, colored by the target, above the support in gray."""
        def paint(panel, column):
            a = solutions[method][column, BETAS.index(beta)]
            density = (fine[column] - threshold[column]).view(150, 150).T
            panel.contourf(side, side, density, levels=[0, math.inf], colors="0.86")
            lines, color = torch.stack([target, a], 1).numpy(), target[:, 0].numpy()
            panel.add_collection(collections.LineCollection(
                lines, array=color, cmap="plasma", linewidths=0.5, alpha=0.6, clim=(-4.5, 6)))
            panel.scatter(*a.T, c=target[:, 0], s=7, cmap="plasma", vmin=-4.5, vmax=6, linewidths=0, zorder=3)
        return paint

    draw_panels(out / "bandit.png", {
        "data": lambda panel, i: panel.plot(*data[i, :3000].T, ",", color="#00224e", alpha=0.7),
        "model density\n(Eq. 7)": lambda panel, i: image(panel, model[i].exp()),
        **{f"SRPO (Eq. 10)\nβ = {beta:g}": arrows(EQ_10, beta) for beta in (10, 1, 0.1)},
        "weighted regr.\nβ = 0.1": arrows(REGRESSION, 0.1),
        "Gaussian rev. KL\nβ = 0.1": arrows(GAUSSIAN, 0.1)})
    draw_panels(out / "bandit_ensemble.png", {
        x.replace(": ", "\n").replace(", ", "\n"): arrows(x, 0.01) for x in GRADIENTS})


# ---------------------------------------------------------------------------------- speed: Fig. 1 and 7

STAGES = {"critic": srpo.Critic, "behavior": srpo.Behavior, "policy": srpo.Extraction}


class Released:
    """One seed's steps in the released code's manner: eager, a backward pass and an optimizer a network,
    epochs of shuffled rows, and a loss that the host reads at each step where it does so there."""

    def __init__(self, stage):
        self.settings, self.batch, self.update = stage.settings, stage.batch, getattr(self, stage.name)
        self.columns = [column.clone() for column in stage.split(stage.table)]
        self.at = len(stage.table)  # the first step shuffles, untimed: 1 % of an epoch
        s, a, given = stage.s_dim, stage.a_dim, stage.settings
        sizes = [s + a, given.critic_width, given.critic_width, 1]
        with torch.device(stage.table.device):
            self.value, (self.q, self.q_target) = Value(s, given.critic_width), [
                nn.ModuleList(nn.Sequential(*mlp(sizes)) for _ in range(2)) for _ in range(2)]
            self.pi = Policy(s, a, given.policy_width, given.policy_layers)
            self.noise_model = NoiseModel(s, a, given.behavior_width, given.behavior_blocks)
            for block in self.noise_model.blocks:
                block.norm = nn.Sequential(nn.Dropout(given.dropout), nn.LayerNorm(given.behavior_width))
        self.noise_model.train(stage.name == "behavior")
        self.adam = {x: torch.optim.Adam(x.parameters(), stage.lr) for x in (self.value, self.q, self.pi)}
        self.adam[self.noise_model] = torch.optim.AdamW(self.noise_model.parameters(), stage.lr)
        for layer in (x for net in (*self.adam, self.q_target) for x in net.modules()):
            layer.precision = None  # of `Linear`: bfloat16 is ours alone
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.adam[self.pi], stage.steps)

    def step(self):
        if self.at + self.batch > len(self.columns[0]):
            order = torch.randperm(len(self.columns[0]), device=self.columns[0].device)
            self.columns, self.at = [column[order] for column in self.columns], 0
        self.update(*[column[self.at : self.at + self.batch] for column in self.columns])
        self.at += self.batch

    def fit(self, network, loss):
        self.adam[network].zero_grad(set_to_none=True)
        loss.backward()
        self.adam[network].step()

    def critic(self, s, a, r, s_next, terminal):
        sa, rate = torch.cat([s, a], -1), self.settings.target_rate
        with torch.no_grad():
            target, v_next = torch.min(*[q(sa).squeeze(-1) for q in self.q_target]), self.value(s_next)
        u = target - self.value(s)
        self.fit(self.value, (torch.abs(self.settings.tau - (u < 0).to(u.dtype)) * u**2).mean())
        target = r + (1.0 - terminal) * self.settings.gamma * v_next
        self.fit(self.q, sum(F.mse_loss(q(sa).squeeze(-1), target) for q in self.q) / 2)
        for old, new in zip(self.q_target.parameters(), self.q.parameters()):
            old.data.copy_(rate * new.data + (1 - rate) * old.data)

    def behavior(self, s, a, *rest, drawn=None):
        t, noise = drawn or (torch.rand_like(a[:, 0]) * (1 - 1e-3) + 1e-3, torch.randn_like(a))
        loss = behavior_loss(self.noise_model, s, a, t, noise)
        self.fit(self.noise_model, loss)
        self.read = loss.detach().cpu().numpy()

    def policy(self, s, of_data, *rest, drawn=None):
        a = self.pi(s)
        t, noise = drawn or (torch.rand_like(a[:, 0]) * 0.96 + 0.02, torch.randn_like(a))

        def mean_q(s, a):
            return sum(q(torch.cat([s, a], -1)).squeeze(-1) for q in self.q_target) / 2

        how = self.settings.beta[0], self.settings.weighting, self.settings.baseline, self.settings.grad_norm
        gradient = surrogate_gradient(mean_q, self.noise_model, s, a, t, noise, *how)
        self.fit(self.pi, policy_loss(a, gradient))
        self.cosine.step()


def multiply_adds(network):
    """One for each weight of the network's linear layers."""
    return sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, Linear))


def gigaflop(stage):
    """1e9 operations of one seed's step: matrix products only, [B, i] [i, o] as 2 B i o.

    Each is counted forward, for the weights' gradient and for the input's; of the last only the columns that
    lead to a trained weight or, in ∇_a Q, to the action.
    """
    s, a, given = stage.s_dim, stage.a_dim, stage.settings
    value, q, noise_model, policy = (multiply_adds(vars(stage)[name].network) if name in vars(stage) else 0
                                     for name in ("value", "q", "noise_model", "policy"))
    total = {"critic": 4 * value + 4 * q - given.critic_width * (3 * s + 2 * a),
             "behavior": 3 * noise_model - given.behavior_width * (s + a) - 64 * 128,
             "policy": noise_model + 2 * q + 3 * policy - (2 * given.critic_width + given.policy_width) * s}
    return 2e-9 * stage.batch * total[stage.name]


def race(calls, rounds, seconds):
    """Seconds of each call, [rounds], taken by turns: what slows the machine slows them all."""

    def timed(call, repeats):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats

    for call in calls.values():
        timed(call, 2)  # first calls allocate, or record a graph
    repeats = [max(1, round(seconds / timed(call, 1))) for call in calls.values()]
    times = [[timed(call, n) for call, n in zip(calls.values(), repeats)] for _ in range(rounds)]
    return dict(zip(calls, np.array(times).T))


def spread(ratio):
    return {"ratio": np.median(ratio), "least": ratio.min(), "most": ratio.max()}


def show(rows, path, machine):
    """Prints rows as an aligned table and writes them, with the machine, as CSV."""
    lines = [[*rows[0], "machine"]]
    for row in rows:
        cells = [x if isinstance(x, str) else f"{x:.0f}" if x >= 1000 else f"{x:.3g}" for x in row.values()]
        lines.append([*cells, machine])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print(*map(str.rjust, line[:-1], widths), sep="  ")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(lines)
    print(f"-> {path}\n", flush=True)


def build_stage(name, settings, dataset, seeds):
    others = ("critic", "behavior") if name == "policy" else ()
    frozen = [build_stage(other, settings, dataset, seeds).weights() for other in others]
    return STAGES[name](settings, dataset, range(seeds), *frozen)


def step_costs(name, settings, dataset, seeds, limits):
    """The first table's rows of a stage; compiling is timed with the first step."""
    eager, fast = (build_stage(name, settings, dataset, seeds) for _ in range(2))
    begin, device = time.perf_counter(), dataset.table.device
    fast.compile(required=False)  # and takes a step
    compiled = time.perf_counter() - begin if fast.fast != (fast.draw, fast.update) else 0.0
    first, graphs = "released manner, eager, 1 seed", f"CUDA graphs, {seeds} seeds"
    calls = {first: Released(eager).step, f"eager, {seeds} seeds": eager.step}
    if compiled:
        calls[f"compiled, {seeds} seeds"] = fast.step
    if device.type == "cuda":
        calls[graphs] = lambda: fast.advance(srpo.GRAPH_STEPS)
    squares = [torch.randn(n, n, device=device, dtype=Linear.precision)
               for n in ((4096, 8192) if device.type == "cuda" else (1024, 2048))]
    calls.update({len(x): functools.partial(torch.matmul, x, x) for x in squares})
    times, rows = race(calls, *limits), []
    peak = np.max([2e-9 * len(x) ** 3 / times.pop(len(x)) for x in squares], 0)
    for label, seconds in times.items():
        step = seconds / (srpo.GRAPH_STEPS if label == graphs else 1)
        each = step / (1 if label == first else seeds)
        gflops = gigaflop(eager) / each
        rows.append({
            "stage": name, "implementation": label, "ms/step": 1e3 * np.median(step),
            "ms/seed-step": 1e3 * np.median(each), "seed-steps/s": 1 / np.median(each),
            **spread(times[first] / each), "GFLOP/s": np.median(gflops), "peak": np.median(peak),
            "of peak": np.median(gflops / peak), "cold compile s": 0.0 if "eager" in label else compiled,
            "Table 1 h": np.median(each) * eager.steps * 6 * len(srpo.TABLE_2) / 3600})
    return rows


def action_costs(settings, s_dim, a_dim, compiles, limits):
    """The second table's rows: an action of SRPO's policy and of diffusion, on one thread of the CPU."""
    policy = Policy(s_dim, a_dim, settings.policy_width, settings.policy_layers)
    noise_model = NoiseModel(s_dim, a_dim, settings.behavior_width, settings.behavior_blocks)
    q, rng = TwinQ(s_dim, a_dim, settings.critic_width), np.random.default_rng(0)
    in_numpy = srpo.numpy_policy(policy.state_dict())
    obs = rng.standard_normal(s_dim)
    rows = [("SRPO, numpy", multiply_adds(policy), lambda: in_numpy(obs, rng))]
    kinds = {"torch": (lambda net: net, [(k, steps) for k in (1, 64) for steps in (5, 15, 50, 100)]),
             **({"compiled": (torch.compile, [(1, 15)])} if compiles else {})}
    for kind, (wrap, samplers) in kinds.items():
        net, model = wrap(policy), wrap(noise_model)
        call = functools.partial(lambda net: net(torch.from_numpy(obs).float()).numpy(), net)
        rows.append((f"SRPO, {kind}", multiply_adds(policy), call))
        for k, steps in samplers:
            choose = q if k > 1 else lambda s, a: torch.zeros(2, 1)  # one needs no choice
            count = k * (steps * multiply_adds(noise_model) + (k > 1) * multiply_adds(q))
            call = functools.partial(srpo.IDQL(model, choose, k, steps), obs, rng)
            rows.append((f"diffusion, {steps} steps, best of {k}, {kind}", count, call))
    torch.set_num_threads(1)
    Linear.precision = None
    with threadpoolctl.threadpool_limits(1), torch.no_grad():
        times = race({label: call for label, _, call in rows}, *limits)
    return [{"action": label, "microseconds": 1e6 * np.median(times[label]),
             **spread(times[label] / times["SRPO, numpy"]), "multiply-adds": count,
             "SRPO's share, %": 100 * multiply_adds(policy) / count} for label, count, _ in rows]


def growth_costs(name, settings, dataset, seeds, limits):
    """The third table's rows of a stage: its uncompiled step (on a GPU, a graph) with more of one thing."""
    rows = []
    for what, sizes in {"seeds": (1, 2, 6, 12, 24), "rows": (200_000, 10**6, 2 * 10**6),
                        "batch": (256, 512, 1024, 2048, 4096, 8192)}.items():
        calls = {}
        for size in sizes:
            batch = {f"{name}_batch": size} if what == "batch" else {}
            stage = build_stage(name, dataclasses.replace(settings, **batch),
                          dataset(size if what == "rows" else 10**6), size if what == "seeds" else seeds)
            calls[size] = functools.partial(stage.advance, srpo.GRAPH_STEPS)
        times = race(calls, *limits)
        per_call = srpo.GRAPH_STEPS if stage.table.is_cuda else 1
        rows += [{"stage": name, "grows": what, "to": size, "times": size / sizes[0],
                  "ms/step": 1e3 * np.median(seconds) / per_call, **spread(seconds / times[sizes[0]])}
                 for size, seconds in times.items()]
    return rows


def speed(task, stage, seeds, device, threads, precision, quick, growth, path, rows=10**6):
    """Tables and CSV: what a gradient step and an action cost and, if asked for, how the first grows."""
    settings, (s_dim, a_dim) = srpo.Settings().resolve(data.check_task(task)), data.SIZES[task.split("-")[0]]
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    Linear.precision = torch.bfloat16 if precision == "bf16" else None

    @functools.cache
    def dataset(rows):
        table = torch.randn(rows, 2 * s_dim + a_dim + 2).clamp_(-1, 1)
        table[:, -1] = torch.rand(rows) < 0.01
        return namedtuple("Table", "table s_dim a_dim")(table.to(device), s_dim, a_dim)

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = (re.findall("model name.*: (.*)", info) or [platform.processor() or platform.machine()])[0]
    gpu = torch.cuda.get_device_name() if device == "cuda" else "not measured on a GPU"
    machine = f"{cpu}, threads: {threads}, PyTorch {torch.__version__}, {precision}; {gpu}"
    print(f"{machine}\n{task}: {rows} synthetic rows of {s_dim} + {a_dim} numbers\n", flush=True)
    limits = (3, 0.2) if quick else (7, 1.0)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # empty, so that compiling is cold
        steps, grown = [], []
        for name in stage:
            steps += step_costs(name, settings, dataset(rows), seeds, limits)
            torch._dynamo.reset()
            grown += growth_costs(name, settings, dataset, seeds, limits) if growth else []
        show(steps, path, machine)
        for label in dict.fromkeys(row["implementation"] for row in steps if len(stage) == len(STAGES)):
            hours = sum(row["Table 1 h"] for row in steps if row["implementation"] == label)
            print(f"all of Table 1, {label}: {hours:.0f} hours")
        compiles = any(row["cold compile s"] for row in steps)
        actions = action_costs(settings, s_dim, a_dim, compiles, limits)
        show(actions, path.with_name(f"{path.stem}-actions.csv"), machine)
        if growth:
            show(grown, path.with_name(f"{path.stem}-growth.csv"), machine)


def add_speed(commands):
    one = commands.add_parser("speed", help="what a gradient step and an action cost: Fig. 1 and 7")
    one.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES))
    one.add_argument("--task", default="halfcheetah-medium-v2", help="whose sizes and settings")
    one.add_argument("--seeds", type=int, default=6, help="how many seeds side by side")
    one.add_argument("--device", choices=("cpu", "cuda"),
                     default="cuda" if torch.cuda.is_available() else "cpu")
    one.add_argument("--threads", type=int, default=torch.get_num_threads())
    one.add_argument("--precision", choices=("fp32", "tf32", "bf16"),
                     default="tf32" if torch.cuda.is_available() else "fp32")
    one.add_argument("--quick", action="store_true", help="fewer, shorter turns: less than three minutes")
    one.add_argument("--growth", action="store_true", help="how cost grows with seeds, rows and batch, too")
    one.add_argument("--csv", dest="path", type=Path, default=Path("assets/speed.csv"))


# ------------------------------------------------------------------ report: Table 1, Fig. 6, 8 and 13 to 16

PAPER = """
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
"""  # Table 1 of the paper, its tasks in the order of Table 2: means of 6 seeds, SRPO's standard deviation
PAPER = {method: dict(zip(srpo.TABLE_2, map(float, values)))
         for method, *values in map(str.split, PAPER.strip().splitlines())}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
METHODS = ("srpo", "iql", "bc", "idql", "random")
REPORT = """# {out} beside the paper

Scores: mean over seeds ± standard deviation of the seeds' means, at the final step, or of `srpo.py evaluate`
where it was run. [ ]: 95 % bootstrap interval over each task's seeds, the paper's mean taken as exact.
Averages and interquartile mean hold D4RL's own data alone. The paper's averages are those of its rows (it
prints 51.9 for BEAR in locomotion, and elsewhere up to 0.5 more or less). ms: for one action, as `srpo.py
evaluate` timed it. Of several β, Table 1 takes the task's default, else the first. Ablations (Fig. 8, 14)
are runs with other settings. A seed diverged if a loss was not finite, or if the critic's |Q|, averaged over
a batch, was above what the largest reward can add up to (where that isn't known: 1 a step in mazes, 10
elsewhere).
"""


def default(task, name):
    return getattr(srpo.Settings().resolve(task), name)


def read_csv(path, columns):
    """The rows of a run's CSV file, numbers as float, empty fields as None; without half a last line."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = list(csv.DictReader([line for line in lines if line.endswith("\n")], restval="missing"))
    if any(tuple(row) != columns for row in rows):
        raise UserError(f"{path.name} has other columns")
    return [{key: x if key in ("stage", "method") else float(x) if x else None for key, x in row.items()}
            for row in rows]


def read_run(folder, name):
    """A run's config, its log, scores {(method, β, step): [seeds, episodes]}; any exception if it is none.

    final: {(method, β): scores}, a later evaluation's before those of the last step.
    """
    run = SimpleNamespace(**srpo.read_config(folder), name=name, scores={}, final={}, milliseconds={})
    task, given, kind, beta = run.task, run.settings, run.data["kind"], default(run.task, "beta")[0]
    run.mark, run.betas = "" if kind == "D4RL" else f" ({kind} data)", [*map(float, given["beta"])]
    run.data_score = float(run.data["data_score"])
    run.beta = beta if beta in run.betas else run.betas[0]
    run.other = ", ".join(f"{key} {x}" for key, x in given.items() if x != default(task, key)
                          and key not in ("beta", "also", "episodes", "evaluations", "any_data"))
    rows = read_csv(folder / "scores.csv", srpo.SCORES)
    for path in folder.glob("evaluation-*.json"):
        facts = json.loads(path.read_text())
        run.milliseconds[path.stem.split("-")[1]] = float(facts["milliseconds_per_action"])
        rows += facts["scores"]
    for row in rows:
        key = row["method"], row["beta"], row["step"]
        run.scores.setdefault(key, {seed: [] for seed in run.seeds})[row["seed"]].append(row["score"])
    run.scores = {key: np.array([*cell.values()], float) for key, cell in run.scores.items()
                  if len({*map(len, cell.values())}) == 1}  # else half of it is still to come
    if not all(np.isfinite(scores).all() for scores in run.scores.values()):
        raise UserError("a score is not finite")
    for step in (given["policy_steps"], None):
        run.final.update({key[:2]: scores for key, scores in run.scores.items() if key[2] == step})
    run.log = read_csv(folder / "log.csv", srpo.LOG)
    bound = run.data.get("largest_reward", 1 if "maze" in task else 10) / (1 - given["gamma"])
    diverged = {row["seed"] for row in run.log if row["alive"] == 0 or
                row["stage"] == "critic" and not abs(row["q"]) <= bound}
    run.q = {f"seed {seed}" + " diverged" * (seed in diverged): {
        float(row["step"]): [row["q"]] for row in run.log if (row["stage"], row["seed"]) == ("critic", seed)}
        for seed in run.seeds}
    whole = {("srpo", beta) for beta in run.betas} | {(method, None) for method in given["also"]}
    last = " ({stage}, step {step:,.0f})".format(**run.log[-1]) if run.log else ""
    run.status = ", ".join(["finished" if whole <= {*run.final} else "unfinished" + last,
                            *(name for name in run.q if "diverged" in name)])
    return run


def mean_std(scores):
    return f"{scores.mean():.1f} ± {scores.mean(1).std():.1f}"


def mean(tasks):
    return np.mean([means.mean(-1) for means in tasks], 0)


def interquartile_mean(tasks):
    """The mean of all runs' middle half, as rliable has it (Agarwal et al., 2021)."""
    means = np.sort(np.concatenate(tasks, -1), -1)
    cut = means.shape[-1] // 4
    return means[..., cut : means.shape[-1] - cut].mean(-1)


def with_interval(statistic, tasks, minus=None):
    """A statistic of the tasks' seed means, less a number, and its interval: seeds are drawn by task."""
    rng, sign, less = np.random.default_rng(0), "" if minus is None else "+", minus or 0
    drawn = statistic([rng.choice(means, (10_000, len(means))) for means in tasks]) - less
    interval = "[{:{s}.1f}, {:{s}.1f}]".format(*np.percentile(drawn, (2.5, 97.5)), s=sign)
    return f"{statistic(tasks) - less:{sign}.1f} {interval if min(map(len, tasks)) > 1 else '(one seed)'}"


def table_1(runs, wrong):
    """The paper's table with ours beside it."""
    ours, real = {run.name: run for run in runs if run.name == run.task}, {}
    rows = [["task", *list(PAPER)[:8], "SRPO (paper)", "SRPO (here)", "seeds × episodes", "here − paper",
             "β, other settings"]]
    for task in srpo.TABLE_2:
        *others, paper, std = (values[task] for values in PAPER.values())
        rows.append([task, *(f"{x:.1f}" for x in others), f"{paper:.1f} ± {std:.1f}"])
        if not (run := ours.get(task)) or ("srpo", run.beta) not in run.final:
            rows[-1] += ["damaged" if task in wrong else "unfinished" if run else "not run"]
            continue
        scores = run.final["srpo", run.beta]
        real.update({} if run.mark else {task: scores.mean(1)})
        difference = "" if run.mark else with_interval(mean, [real[task]], paper)
        rows[-1] += [mean_std(scores) + run.mark, "{} × {}".format(*scores.shape), difference,
                     f"{run.beta:g} {run.other}"]
    for name, group in (("locomotion", [*srpo.TABLE_2][:9]), ("AntMaze", data.ANTMAZE)):
        paper = [np.mean([values[task] for task in group]) for values in PAPER.values()][:9]
        here = [real[task] for task in group if task in real]
        rows.append([f"average, {name}", *(f"{x:.1f}" for x in paper), *(
            [with_interval(mean, here), "", with_interval(mean, here, paper[8])] if len(here) == len(group)
            else [f"incomplete ({len(here)} of {len(group)})"])])
    rows.append(["interquartile mean of all runs", *[""] * 9,
                 with_interval(interquartile_mean, [*real.values()]) if real else "not run"])
    return [[cell.replace("nan", "–") for cell in row] + [""] * (14 - len(row)) for row in rows]


def table_of_runs(runs, wrong):
    """A row for each run, in sweeps for each β, and for each other folder; without empty columns."""
    rows = [["run", "β", *METHODS, "data's mean", "data", "seeds × episodes", "status", "other settings"]]
    for run, beta in ((run, beta) for run in runs for beta in run.betas):
        cells, size = [], "–"
        for method in METHODS:
            scores = run.final.get((method, beta if method == "srpo" else None))
            time = f", {run.milliseconds[method]:.2f} ms" if method in run.milliseconds else ""
            cells.append("" if scores is None else mean_std(scores) + time)
            size = "{} × {}".format(*scores.shape) if scores is not None and method == "srpo" else size
        rows.append([run.name, f"{beta:g}", *cells, f"{run.data_score:.1f}", run.data["kind"], size,
                     run.status, run.other])
    rows += [[name, *[""] * 9, f"not used: {reason}", ""] for name, reason in wrong.items()]
    return [*zip(*(column for column in zip(*rows) if any(column[1:])))]


def picture(path, panels, xlabel, ylabel):
    """A PNG with a panel for each (run, {name: {x: seeds' values}}), as mean ± std; its line in Markdown."""
    path.unlink(missing_ok=True)
    if not panels:
        return ""
    across, down, legend = min(3, len(panels)), -(-len(panels) // 3), {}
    figure, grid = pyplot.subplots(down, across, squeeze=False, layout="constrained",
                                   figsize=(4 * across, 3.2 * down + 0.6))
    for axes in grid.flat[len(panels):]:
        axes.axis("off")
    for axes, (run, lines) in zip(grid.flat, panels):
        axes.set_title(f"{run.name}\n{run.mark}".strip(), fontsize="medium")
        axes.set(xlabel=xlabel, ylabel=ylabel, xscale="log" if xlabel == "β" else "linear",
                 yscale="symlog" if any("diverged" in name for name in lines) else "linear")
        for color, (name, points) in zip(COLORS * len(lines), lines.items()):
            x, y = sorted(points), np.array([points[x] for x in sorted(points)], float)  # [x, seeds]
            look = "x--" if "diverged" in name else "o-" if xlabel == "β" else "-"
            axes.plot(x, y.mean(1), look, color=color, label=name, markersize=4)
            axes.fill_between(x, y.mean(1) - y.std(1), y.mean(1) + y.std(1), color=color, alpha=0.2, lw=0)
            if xlabel == "β":
                axes.plot(x, y, ".", color="gray")
                axes.axvline(default(run.task, "beta")[0], color="gray", ls=":", label="the task's default β")
        if ylabel == "score":
            axes.axhline(run.data_score, color="gray", ls="--", label="the data's mean")
            if run.task in srpo.TABLE_2:
                axes.axhline(PAPER["SRPO"][run.task], color="black", lw=1, label="SRPO in the paper")
        legend.update(zip(*axes.get_legend_handles_labels()[::-1]))
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=2 * across, fontsize="small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"![{path.stem}]({path.name})"


def report(out="runs"):
    """Writes out/report.md and its pictures from the runs in out/* and out/*/*, and prints all runs."""
    out, runs, wrong, text = Path(out), [], {}, []
    if not out.is_dir():
        raise UserError(f"{out} is not a folder; train a task first, or name another --out")
    found = {path.parent for depth in ("*", "*/*") for path in out.glob(f"{depth}/config.json")}
    inside = {folder.parent for folder in found}
    others = {folder for folder in out.glob("*") if folder.is_dir() and folder not in inside}
    for folder in sorted(found | others):
        name = folder.relative_to(out).as_posix()
        try:
            runs.append(read_run(folder, name))
        except Exception as error:  # whatever a folder holds, the report goes on without it
            wrong[name] = f"{type(error).__name__} {error}".removeprefix("UserError ")
    for table in (table_1(runs, wrong), table_of_runs(runs, wrong)):
        table = [[" ".join(cell.replace("|", "/").split()) for cell in row] for row in table]
        lines = [table[0], ["---"] * len(table[0]), *table[1:]]
        text.append("\n".join(f"| {' | '.join(row)} |" for row in lines))
    widths = [max(map(len, column)) for column in zip(*table)]
    print("\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in table))
    curves, sweeps = [], []
    for run in runs:
        lines = {}
        for (method, beta, step), scores in run.scores.items():
            if step is not None and beta in (None, run.beta):
                lines.setdefault(method, {})[step] = scores.mean(1)
        points = {beta: scores.mean(1) for (_, beta), scores in run.final.items() if beta}
        curves += [(run, lines)] if lines else []
        sweeps += [(run, {"srpo": points})] if len(points) > 1 else []
    critics = [(run, run.q) for run in runs if all(run.q.values())]
    text += [picture(out / "curves.png", curves, "gradient steps", "score"),  # Fig. 6, 16
             picture(out / "critic.png", critics, "gradient steps", "the critic's mean Q"),  # Fig. 13
             picture(out / "sweep.png", sweeps, "β", "score")]  # Fig. 15
    (out / "report.md").write_text("\n\n".join([REPORT.format(out=out), *filter(None, text)]) + "\n")
    print(f"Table 1 and pictures: {out / 'report.md'}")


# ------------------------------------------------------------------------------------ film: a policy at work


def film(folder, seed=None, episode=0, frames=64):
    """folder/film.gif: an episode of the evaluation in 8 seconds; the first seed unless told, the first β."""
    folder, config = Path(folder), srpo.read_config(folder)
    task, seed = config["task"], config["seeds"][0] if seed is None else seed
    policies = dict(srpo.load_policies(folder, config, "srpo", None, None)[1][: len(config["seeds"])])
    if seed not in policies:
        raise UserError(f"{folder} has no seed {seed}, but {', '.join(map(str, policies))}")
    env, poses, maze = data._worker_env(task).unwrapped, [], "maze" in task  # the one of run_episodes
    model, state = (getattr(x, name, x) for x, name in ((env.sim.model, "_model"), (env.sim.data, "_data")))
    body, box, plane = model.geom_bodyid > 0, model.geom_type == 6, [0, 1 if maze else 2]  # mjGEOM_BOX
    capsule = model.geom_type[body, None] == 3  # mjGEOM_CAPSULE, along its z; others are spheres

    def watched(obs, rng):
        x, axis = state.geom_xpos[body], state.geom_xmat[body].reshape(-1, 3, 3)[..., 2]
        half = np.where(capsule, model.geom_size[body, 1:2] * axis, 1e-3)
        poses.append(np.stack([x - half, x + half], 1)[..., plane])  # [geoms, 2 ends, 2]
        return policies[seed](obs, rng)

    # The torso's path, and the picture's corners: around the torso, or the maze's.
    score = data.normalized_score(task, data.run_episodes(task, seed, watched, [episode]))[0]
    path, low, high = np.array(poses)[:, 0].mean(1), np.array([-2, -0.2]), np.array([2, 2])
    if maze:
        corner, extent = state.geom_xpos[box, :2] - model.geom_size[box, :2], 2 * model.geom_size[box, :2]
        low, high = corner.min(0), (corner + extent).max(0)
    inches = 4 * (high - low) / max(high - low)
    figure = pyplot.figure(figsize=inches)
    axes = figure.add_axes([0, 0, 1, 1], xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.axis("off")
    if maze:
        for x, size in zip(corner, extent):
            axes.add_patch(pyplot.Rectangle(x, *size, color="#BBBBBB"))
        goal = np.add(env._target, 1.2) if task == data.DEMO else env.target_goal  # maze2d's origin: 1.2
        axes.add_patch(pyplot.Circle(goal, 0.5, color=COLORS[2], alpha=0.5))  # reached: closer than 0.5
    else:
        axes.vlines(np.arange(int(path.min()) - 3, path.max() + 3), -0.1, 0, color="gray")  # each meter
        axes.axhline(0, color="gray")
    (trail,) = axes.plot([], [], color=COLORS[1], lw=1)
    lw = 2 * model.geom_size[body, 0] * 72 * inches[0] / (high - low)[0]
    limbs = axes.add_collection(collections.LineCollection([], capstyle="round", color=COLORS[0], lw=lw))
    text = axes.text(0.02, 0.98, "", transform=axes.transAxes, va="top", fontsize=9)
    shown = np.linspace(0, len(poses) - 1, min(frames, len(poses))).astype(int)
    writer = animation.PillowWriter(fps=len(shown) / 8)
    with writer.saving(figure, folder / "film.gif", dpi=80):
        for step in shown:
            limbs.set_segments(poses[step])
            if maze:
                trail.set_data(*path[: step + 1].T)
            else:
                axes.set_xlim(path[step, 0] + low[0], path[step, 0] + high[0])
            text.set_text(f"{task} ({config['data']['kind']} data)\n"
                          f"step {step + 1} of {len(poses)}, the episode's score {score:.1f}")
            writer.grab_frame()
    pyplot.close(figure)
    print(f"{folder / 'film.gif'}: seed {seed}, episode {episode}, score {score:.1f}")


# ---------------------------------------------------------------------------------------------- command line


def main():
    parser = srpo.Parser(prog="figures.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=srpo.Parser)
    zero = commands.add_parser("bandit", help="the 2-D experiments: Fig. 2-5 and 9-12")
    zero.add_argument("--out", type=Path, default=Path("assets"), help="the folder for pictures and CSV")
    add_speed(commands)
    one = commands.add_parser("report", help="Table 1 and training curves from the runs in a folder")
    one.add_argument("--out", default="runs", help="the folder that holds the runs")
    two = commands.add_parser("film", help="a GIF of one episode of a trained policy")
    two.add_argument("folder", type=Path, help="a run's folder, runs/TASK")
    two.add_argument("--seed", type=int, help="default: the run's first")
    two.add_argument("--episode", type=int, default=0)
    try:
        given = vars(parser.parse_args())
        {"bandit": bandit, "speed": speed, "report": report, "film": film}[given.pop("command")](**given)
        return 0
    except (UserError, OSError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
