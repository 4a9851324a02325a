"""The paper's figures and tables, which a reader of the paper may skip; each is one command.

    python figures.py bandit          Fig. 2-5 and 9-12, the 2-D experiments, into assets/
    python figures.py speed           Fig. 1 and 7: what a gradient step and an action cost
    python figures.py report          Table 1, Fig. 6, 8, 13-16 from runs/, into runs/report.md
    python figures.py film runs/TASK  a GIF of one episode

The first two need no data.
"""

import copy
import csv
import functools
import io
import json
import math
import os
import re
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

os.environ.pop(
    "MPLBACKEND", None
)  # one of a notebook can't be imported outside; pictures need none

import numpy as np
import torch
from matplotlib import animation, style
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from PIL import Image

import data
import run as run_files
import srpo
from data import UserError
from diffusion import alpha_sigma, behavior_loss, log_likelihood
from models import NoiseModel
from run import (
    IDQL,
    Parser,
    by_policy,
    load_policies,
    numpy_policy,
    positive,
    program,
    read_config,
    read_csv,
)
from seeds import GRAPH_STEPS
from srpo import Settings, layouts

STYLE = (
    "default",
    "tableau-colorblind10",
)  # of all pictures, whatever style the calling program has


def table(rows, align=True):
    """Rows {column: text or number} as Markdown, without the columns that are empty in all of them."""

    def text(x):
        if isinstance(x, (int, float)):
            return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"
        return " ".join(str(x).replace("|", "/").split())

    names = dict.fromkeys(name for row in rows for name in row)
    columns = [
        (name, "---", *(text(row.get(name, "")) for row in rows)) for name in names
    ]
    columns = [column for column in columns if any(column[2:])]
    widths = [max(map(len, column)) if align else 0 for column in columns]
    return "\n".join(
        f"| {' | '.join(map(str.ljust, line, widths))} |" for line in zip(*columns)
    )


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# ------------------------------------------------------------------- bandit: Fig. 2, 3, 4, 5 and 9 to 12

QUICK, FULL = (
    (5_000, 64),
    (15_000, 256),
)  # steps of the noise model's training, pairs a step
BETAS = (10.0, 1.0, 0.1, 0.01, 0.001)
EQ_10, REGRESSION, GAUSSIAN = (
    "Eq. 10: t = 0.02 alone",
    "weighted regression",
    "Gaussian reverse KL",
)
GRADIENTS = {  # ω(t) and the range of t in surrogate_gradient
    EQ_10: ("alpha_over_sigma", 0.02, 0.02),
    "ensemble, ω = α/σ": ("alpha_over_sigma", 0.02, 0.98),
    "ensemble, ω = 1": ("one", 0.02, 0.98),
    "ensemble, ω = σ²": ("sigma2", 0.02, 0.98),
}
TARGETS = torch.cartesian_prod(*[torch.linspace(-4.5, 4.5, 10)] * 2)  # [100, 2]
EDGE = 4.8  # of the pictures
SIDE = (np.arange(80, dtype=np.float32) + 0.5) / 40 * EDGE - EDGE
PIXELS = torch.cartesian_prod(*[torch.from_numpy(SIDE)] * 2)  # [6400, 2]


class Mixture(NamedTuple):
    """A behavior distribution of equal Gaussians, whose density and noise model are exact."""

    centers: torch.Tensor  # [K, 2]
    std: float

    def sample(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(len(self.centers), (count,), generator=generator)
        return self.centers[index] + self.std * torch.randn(
            count, 2, generator=generator
        )

    def log_density(self, a):
        """log μ(a), [B]."""
        exponent = -torch.cdist(a, self.centers).square() / (2 * self.std**2)  # [B, K]
        return exponent.logsumexp(-1) - math.log(
            2 * math.pi * self.std**2 * len(self.centers)
        )

    def margin(self, a, actions):
        """log μ(a) less its 1 % quantile on actions, [B]; the support is where it isn't negative."""
        return self.log_density(a) - self.log_density(actions[:5000]).quantile(0.01)

    def noise_model(self, a_t, s, t):
        """ε* = σ Σ r (a_t − α c) / (α² std² + σ²), with the responsibilities r of the centers c."""
        alpha, sigma = alpha_sigma(t.unsqueeze(-1))
        variance = (alpha * self.std) ** 2 + sigma**2  # [B, 1]
        gap = a_t.unsqueeze(-2) - alpha.unsqueeze(-1) * self.centers  # [B, K, 2]
        share = (-gap.square().sum(-1) / (2 * variance)).softmax(-1)
        return sigma / variance * (share.unsqueeze(-1) * gap).sum(-2)


def behavior_distributions():
    """Six mixtures of 2,048 Gaussians: scikit-learn's shapes at FFJORD's scale (Grathwohl et al., 2019)."""
    from sklearn.datasets import make_circles, make_moons, make_swiss_roll

    n = 2048
    angle = np.arange(n) // (n // 8) * math.pi / 4
    gaussians = 2.83 * np.stack([np.cos(angle), np.sin(angle)], -1)
    x, y = np.meshgrid(*[(np.arange(64) + 0.5) / 8 - 4] * 2)
    board = np.stack([x, y], -1)[(x // 2 + y // 2) % 2 == 0]
    angle = math.pi * np.sqrt(
        0.6 + 5.65 * (np.arange(n // 2) + 0.5) / (n // 2)
    )  # 0.77 π to 2.5 π
    arm = 0.46 * angle[:, None] * np.stack([-np.cos(angle), np.sin(angle)], -1)
    shapes = {
        "8 Gaussians": (gaussians, 0.35),
        "moons": (2 * make_moons(n, shuffle=False)[0] - [1, 0.2], 0.2),
        "swiss roll": (make_swiss_roll(n, random_state=0)[0][:, [0, 2]] / 5, 0.2),
        "rings": (3.6 * make_circles(n, factor=0.5, shuffle=False)[0], 0.25),
        "checkerboard": (board, 0.1),
        "2 spirals": (np.concatenate([arm, -arm]), 0.2),
    }
    return {
        name: Mixture(torch.tensor(centers).float(), std)
        for name, (centers, std) in shapes.items()
    }


def extract(noise_model, seed, steps=250, lr=0.1):
    """surrogate_gradient with Q(a) = −‖a − a_tar‖², ascended by Adam: a is a Dirac policy's parameter.

    All side by side, each action starting at its target: solutions [gradients, betas, targets, 2].
    """
    generator = torch.Generator().manual_seed(seed)
    target = TARGETS.repeat(len(BETAS), 1)
    beta = torch.tensor(BETAS).repeat_interleave(len(TARGETS)).unsqueeze(-1)
    actions = target.repeat(len(GRADIENTS), 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([actions], lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def q(s, a):
        return -(a - target).square().sum(-1)

    for _ in range(steps):
        u = torch.rand(len(target), generator=generator)
        noise = torch.randn(target.shape, generator=generator)
        gradients = []
        for a, (weighting, low, high) in zip(actions.detach(), GRADIENTS.values()):
            inputs = q, noise_model, a[:, :0], a, low + (high - low) * u, noise, beta
            gradients.append(
                srpo.surrogate_gradient(*inputs, weighting, baseline=high > low)
            )
        actions.grad = -torch.stack(gradients)
        optimizer.step()
        schedule.step()
    return actions.detach().unflatten(1, (len(BETAS), -1))


def learn(actions, seed, steps, pairs):
    """A noise model of the actions [N, 2]: what is extracted with it, and its log-density at PIXELS.

    Few steps need little noise: every action is perturbed by ε and by −ε, and t = u² is small more often,
    which leaves the minimum ε* where it is.
    """
    torch.manual_seed(seed)
    noise_model = NoiseModel(0, 2, width=64, blocks=2, dropout=0.0)
    optimizer = torch.optim.Adam(noise_model.parameters(), 3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        a = actions[torch.randint(len(actions), (pairs,))].repeat(2, 1)
        t, noise = torch.rand(pairs).square().repeat(2), torch.randn(pairs, 2)
        optimizer.zero_grad()
        behavior_loss(
            noise_model, a[:, :0], a, t, torch.cat([noise, -noise])
        ).backward()
        optimizer.step()
        schedule.step()
    noise_model.requires_grad_(False)
    return extract(noise_model, seed), log_likelihood(
        noise_model, PIXELS[:, :0], PIXELS, steps=8
    )


def closed_forms(actions):
    """Two other ways to a policy, without any training: {method: solutions [betas, targets, 2]}.

    Forward KL (Eq. 2) with a Gaussian policy is weighted regression: the data's mean, weighted by exp(βQ).
    Reverse KL to a Gaussian behavior model: the maximum of log N(a; the data's mean and covariance) + βQ(a).
    """
    distance = torch.cdist(TARGETS, actions).square()  # [targets, N]
    mean, precision = actions.mean(0), torch.linalg.inv(actions.T.cov())
    regression = [(-beta * distance).softmax(-1) @ actions for beta in BETAS]
    gaussian = [
        torch.linalg.solve(
            precision + 2 * beta * torch.eye(2),
            (precision @ mean + 2 * beta * TARGETS).T,
        ).T
        for beta in BETAS
    ]
    return {REGRESSION: torch.stack(regression), GAUSSIAN: torch.stack(gaussian)}


@style.context(STYLE)
def draw_bandit(path, rows, columns):
    """A picture: lines lead from targets to their solutions. Its rows are of (method, β), its columns of a
    behavior's (name, actions, density and margin at PIXELS, solutions).
    """
    figure = Figure(figsize=(9, 1.47 * len(rows) + 0.25), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    grid = figure.subplots(len(rows), len(columns))
    targets, look = TARGETS.numpy(), {"cmap": "plasma", "clim": (-4.5, 6)}
    for (row, column), axes in np.ndenumerate(grid):
        (method, *beta), (name, actions, density, margin, solutions) = (
            rows[row],
            columns[column],
        )
        if method == "data":
            axes.plot(*actions[:3000].T.numpy(), ",", color="#00224e", alpha=0.7)
        elif method == "density by Eq. 7":
            image = axes.imshow(
                density, "cividis", origin="lower", extent=(-EDGE, EDGE) * 2
            )
            image.set(interpolation="bilinear", clim=(0, np.quantile(density, 0.99)))
        else:
            a = solutions[method][BETAS.index(*beta)].numpy()
            axes.contourf(
                SIDE, SIDE, margin, levels=[0, math.inf], colors="0.86"
            )  # gray: the support
            ways = LineCollection(
                np.stack([targets, a], 1),
                array=targets[:, 0],
                lw=0.5,
                alpha=0.6,
                **look,
            )
            axes.add_collection(ways)
            axes.scatter(*a.T, 7, targets[:, 0], linewidths=0, zorder=3, **look)
        axes.set(
            xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal", xticks=[], yticks=[]
        )
        grid[0, column].set_title(name, fontsize=10)
        grid[row, 0].set_ylabel("\nβ = ".join(map(str, rows[row])), fontsize=8)
    figure.savefig(path, dpi=130)
    with Image.open(path) as image:  # 128 colors: a quarter of the bytes
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            path, optimize=True
        )


def supported(behavior, actions, name, solutions):
    """CSV rows: the share of solutions in the support, of all targets and of those in the actions' box."""
    in_box, rows = (
        ((TARGETS >= actions.amin(0)) & (TARGETS <= actions.amax(0))).all(-1),
        [],
    )
    for method, a in solutions.items():
        inside = (
            (behavior.margin(a.flatten(0, 1), actions) >= 0)
            .double()
            .view(len(BETAS), -1)
        )
        for values in zip(
            BETAS, inside.mean(-1).tolist(), inside[:, in_box].mean(-1).tolist()
        ):
            beta, share, from_box = values
            where = {"method": method, "beta": beta, "behavior": name}
            rows.append(where | {"inside": share, "inside_from_the_box": from_box})
    return rows


def bandit(out, quick):
    """Fig. 2-5 and 9-12 as two pictures, a CSV and a table of how many solutions the behavior supports"""
    behaviors, (steps, pairs) = behavior_distributions(), QUICK if quick else FULL
    samples = [
        behavior.sample(20_000, seed)
        for seed, behavior in enumerate(behaviors.values())
    ]
    print(
        f"training six noise models, {steps:,} steps of {pairs} pairs each", flush=True
    )
    with (
        data.Workers() as workers
    ):  # of one thread each: the same bits on any number of cores
        learned = [
            workers.pool.submit(learn, x, seed, steps, pairs)
            for seed, x in enumerate(samples)
        ]
        gaussians = behaviors["8 Gaussians"]
        once = gaussians._replace(centers=gaussians.centers[::256])
        exact = dict(
            zip(GRADIENTS, workers.pool.submit(extract, once.noise_model, 0).result())
        )
        learned = [future.result() for future in learned]

    columns, records = [], []
    for (name, behavior), actions, (found, log_density) in zip(
        behaviors.items(), samples, learned
    ):
        solutions = dict(zip(GRADIENTS, found)) | closed_forms(actions[:5000])
        fields = log_density.exp(), behavior.margin(PIXELS, actions)
        columns.append(
            (
                name,
                actions,
                *[x.view(len(SIDE), -1).T.numpy() for x in fields],
                solutions,
            )
        )
        records += supported(behavior, actions, name, solutions)
    records += supported(gaussians, samples[0], "8 Gaussians, exact score", exact)
    write_csv(out / "bandit.csv", records)

    shares = {record["method"]: {} for record in records}
    for record in records:
        percent = f"{100 * record['inside_from_the_box']:.0f}"
        shares[record["method"]].setdefault(record["behavior"], []).append(percent)
    print(
        "Share inside the support, percent, for β =",
        " / ".join(f"{beta:g}" for beta in BETAS),
        "\n",
    )
    rows = [
        {"": method, **dict(zip(row, map(" / ".join, row.values())))}
        for method, row in shares.items()
    ]
    print(table(rows))

    shown = [("data",), ("density by Eq. 7",), (EQ_10, 10), (EQ_10, 1), (EQ_10, 0.1)]
    draw_bandit(
        out / "bandit.png", [*shown, (REGRESSION, 0.1), (GAUSSIAN, 0.1)], columns
    )
    draw_bandit(
        out / "bandit_ensemble.png", [(method, 0.01) for method in GRADIENTS], columns
    )


# ---------------------------------------------------------------------------------- speed: Fig. 1 and 7

ALGORITHM_1 = ("critic", "behavior", "srpo")
DEMO_SIZES = {  # run_all.sh's, as far as they cost time
    **{
        "critic_steps": 15_000,
        "critic_width": 128,
        "behavior_steps": 2500,
        "behavior_batch": 256,
    },
    **{
        "behavior_width": 64,
        "behavior_blocks": 2,
        "policy_steps": 3000,
        "policy_width": 128,
    },
}


def released_step(stage):
    """A step of one seed in the manner of the released code (github.com/thu-ml/SRPO), a function of nothing.

    Eager, with an optimizer and a backward pass a network, on data shuffled once an epoch. What isn't part of
    Algorithm 1 is left out: the policy that it trains beside the critic.
    """
    settings = stage.settings
    built = [
        layout.build().to(stage.table.device)
        for layout in layouts(settings, *stage.sizes).values()
    ]
    value, q, noise_model, policy = built
    q_target = copy.deepcopy(q)
    noise_model.train(stage.name == "behavior")
    optimizers = {
        network: torch.optim.Adam(network.parameters(), 3e-4)
        for network in (value, q, policy)
    }
    optimizers[noise_model] = torch.optim.AdamW(noise_model.parameters(), 3e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizers[policy], settings.policy_steps
    )

    def descend(network, loss):
        optimizers[network].zero_grad()
        loss.backward()
        optimizers[network].step()

    def critic(s, a, r, s_next, terminal):
        descend(value, srpo.value_loss(value, q_target, s, a, settings.tau))
        descend(q, srpo.q_loss(q, value, s, a, r, s_next, terminal, settings.gamma))
        for old, new in zip(q_target.parameters(), q.parameters()):
            old.data.copy_(
                settings.target_rate * new.data + (1 - settings.target_rate) * old.data
            )

    def behavior(s, a, *rest):
        loss = behavior_loss(
            noise_model, s, a, torch.rand_like(a[:, 0]), torch.randn_like(a)
        )
        descend(noise_model, loss)
        loss.item()

    def extraction(s, *rest):
        a = policy(s)
        t, noise = 0.02 + 0.96 * torch.rand_like(a[:, 0]), torch.randn_like(a)
        with torch.no_grad():
            _, sigma = alpha_sigma(t.unsqueeze(-1))
            regularizer = sigma**2 * srpo.behavior_gap(noise_model, s, a, t, noise)
        leaf = a.detach().requires_grad_()
        (grad_q,) = torch.autograd.grad(q_target(s, leaf).mean(-2).sum(), leaf)
        if settings.grad_norm == "released":
            grad_q = grad_q / grad_q.square().mean(-1, keepdim=True).sqrt()
        descend(policy, srpo.policy_loss(a, grad_q - regularizer / settings.beta[0]))
        cosine.step()

    def steps(update):
        while True:
            order = torch.randperm(len(stage.table)).to(stage.table.device)
            columns = [column[order] for column in stage.split(stage.table)]
            for i in range(0, len(order) - stage.batch + 1, stage.batch):
                update(*[column[i : i + stage.batch] for column in columns])
                yield

    return steps(
        {"critic": critic, "behavior": behavior, "srpo": extraction}[stage.name]
    ).__next__


def race(calls, rounds, seconds):
    """Seconds a unit of each {name: (call, units)}, [rounds], by turns: what slows the machine slows all."""

    def timed(call, repeats=1):
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / repeats

    for call, _ in calls.values():
        timed(call)  # first calls allocate, or record a graph
    turns = [(call, max(1, round(seconds / timed(call)))) for call, _ in calls.values()]
    times = np.array([[timed(*turn) for turn in turns] for _ in range(rounds)])
    return {
        name: column / units
        for (name, (_, units)), column in zip(calls.items(), times.T)
    }


def spread(ratio):
    return {"ratio": np.median(ratio), "least": ratio.min(), "most": ratio.max()}


def build_stage(name, settings, table, sizes, seeds):
    before = ("critic", "behavior") if name == "srpo" else ()
    trained = [
        build_stage(other, settings, table, sizes, seeds).weights() for other in before
    ]
    return srpo.STAGES[name](settings, table, sizes, range(seeds), *trained)


def compile_cold(stage):
    """Seconds that compiling a stage takes, nothing cached, with its first step; 0 where it cannot work."""
    from torch._inductor.utils import fresh_cache

    begin = time.perf_counter()
    try:
        with fresh_cache(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", module="torch.jit"
            )  # PyTorch's own deprecation
            stage.compile()
            int(stage.count)  # waits for the device
    except torch.OutOfMemoryError:
        raise
    except (torch._dynamo.exc.TorchDynamoException, OSError, RuntimeError) as error:
        print(f"{stage.name} is not compiled: {' '.join(str(error).split())[:200]}")
        return 0.0
    return time.perf_counter() - begin


def step_costs(name, settings, table, sizes, seeds, limits):
    """A stage's rows of the first table: of released manner, ours eager and, where that works, ours fast."""
    eager, fast = (build_stage(name, settings, table, sizes, seeds) for _ in range(2))
    seconds, steps = compile_cold(fast), GRAPH_STEPS if table.is_cuda else 1
    calls = {"released manner": (released_step(eager), 1), "eager": (eager.step, seeds)}
    ways = [
        way
        for way, used in (("compiled", seconds), ("CUDA graphs", table.is_cuda))
        if used
    ]
    if ways:
        calls[", ".join(ways)] = functools.partial(fast.advance, steps), steps * seeds
    times, rows = race(calls, *limits), []
    for way, each in times.items():
        costs = {
            "stage": name,
            "implementation": way,
            "seeds": 1 if way == "released manner" else seeds,
        }
        costs["ms per seed-step"] = 1e3 * np.median(each)
        costs |= spread(times["released manner"] / each)
        rows.append(
            costs
            | {
                "cold compile s": seconds if "compiled" in way else "",
                "steps": eager.steps,
            }
        )
    return rows


def action_costs(settings, sizes, limits):
    """The second table's rows: an action of SRPO's policy and of diffusion."""
    _, q, noise_model, policy = (
        layout.build().eval() for layout in layouts(settings, *sizes).values()
    )
    rng = np.random.default_rng(0)
    obs, in_numpy = rng.standard_normal(sizes[0]), numpy_policy(policy.state_dict())
    ways = {
        "SRPO, numpy": lambda: in_numpy(obs, rng),
        "SRPO, torch": lambda: policy(torch.from_numpy(obs).float()).numpy(),
    }
    for candidates in (1, 64):
        choose = (
            q if candidates > 1 else lambda s, a: torch.zeros(2, 1)
        )  # one needs no choice
        for steps in (5, 15, 50, 100):
            diffusion = IDQL(noise_model, choose, sizes[1], candidates, steps)
            name = f"diffusion, {steps} steps, best of {candidates}"
            ways[name] = functools.partial(diffusion, obs, rng)
    with torch.no_grad():
        times = race({name: (call, 1) for name, call in ways.items()}, *limits)
    return [
        {
            "action": name,
            "microseconds": 1e6 * np.median(each),
            **spread(each / times["SRPO, numpy"]),
        }
        for name, each in times.items()
    ]


def speed(task, stage, seeds, demo, precision, threads, quick, path):
    """What a gradient step and an action cost: Fig. 1 and 7"""
    task, seeds = (
        (data.DEMO, seeds or 3) if demo else (data.check_task(task), seeds or 6)
    )
    settings = Settings(precision=precision, **DEMO_SIZES if demo else {}).resolve(task)
    whole, trainings = ("the demo", 3) if demo else ("Table 1", 6 * len(srpo.TABLE_2))
    sizes, device = (
        data.space_sizes(task),
        "cuda" if torch.cuda.is_available() else "cpu",
    )
    torch.set_num_threads(threads or torch.get_num_threads())
    torch.set_float32_matmul_precision(
        "high" if (device, precision) == ("cuda", "tf32") else "highest"
    )
    rows = torch.randn(60_000 if demo else 10**6, 2 * sizes[0] + sizes[1] + 2).clamp_(
        -1, 1
    )
    rows[:, -1] = torch.rand(len(rows)) < 0.01
    cpu = (
        re.search("model name.*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or "CPU"
    )
    machine = f"{cpu}, threads: {torch.get_num_threads()}, PyTorch {torch.__version__}"
    machine += (
        f"; {torch.cuda.get_device_name()}, {precision}" if device == "cuda" else ""
    )
    print(f"{machine}\n{task}: {len(rows)} random rows, (S, A) = {sizes}")

    def show(costs, path, machine):
        write_csv(path, [{**row, "machine": machine} for row in costs])
        print(f"\n{table(costs)}\n-> {path}", flush=True)

    limits, costs, rows = (3, 0.2) if quick else (7, 1.0), [], rows.to(device)
    for name in stage:
        costs += step_costs(name, settings, rows, sizes, seeds, limits)
    hours, column = {}, f"hours for {whole}"
    for row in costs:
        row[column] = row["ms per seed-step"] * row.pop("steps") * trainings / 3.6e6
        hours[row["implementation"]] = hours.get(row["implementation"], 0) + row[column]
    show(costs, path, machine)
    for way, total in hours.items():
        print(f"{', '.join(stage)} for {whole}, {way}: {total:.3g} hours")
    with data.Workers(1) as workers:  # of one thread, as in a roll-out
        actions = workers.pool.submit(action_costs, settings, sizes, limits).result()
    show(actions, path.with_name(f"{path.stem}-actions.csv"), f"{cpu}, one thread")


# ------------------------------------------------------------------ report: Table 1, Fig. 6, 8 and 13 to 16

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
"""  # of the paper, its tasks in the order of Table 2: means of 6 seeds, SRPO's standard deviation
METHODS, *COLUMNS = zip(*map(str.split, TABLE_1.strip().splitlines()))
PAPER = dict(zip(srpo.TABLE_2, COLUMNS))  # {task: (BEAR's, ..., SRPO's, ±)}, as printed
REPORT = """# {out} beside the paper

Scores: mean ± standard deviation of the seeds' means at the final step (seeds × episodes), or of `run.py
evaluate` where it was run. [ ]: 95 % bootstrap interval over each task's seeds, the paper's mean taken as
exact. Averages and interquartile mean hold D4RL's own data alone; the paper's are those of its rows (it
prints 51.9 for BEAR in locomotion, and elsewhere up to 0.5 more or less). Of several β, Table 1 takes the
task's default, else the first. Ablations (Fig. 8, 14) are runs with other settings. A seed diverged if a loss
was not finite, or if the critic's |mean Q| was above what the largest reward can add up to."""


def read_run(folder, name):
    """A run's config and what its files tell; any exception if it is none, or damaged.

    final: {(method, β): scores [seeds, episodes]}. For `picture`, {line: {x: the seeds' values}}: curves, the
    scores by step; critic, its Q by step; sweep, the scores by β.
    """
    run = SimpleNamespace(**read_config(folder), name=name)
    given, default = run.settings, vars(Settings().resolve(run.task))
    run.mark = "" if run.data["kind"] == "D4RL" else f" ({run.data['kind']} data)"
    run.betas, run.default_beta = [*map(float, given["beta"])], default["beta"][0]
    run.beta = run.default_beta if run.default_beta in run.betas else run.betas[0]
    elsewhere = (
        "beta",
        "also",
        "episodes",
        "evaluations",
    )  # these are in other columns, or change nothing
    differ = [
        key for key in given if given[key] != default[key] and key not in elsewhere
    ]
    run.other = ", ".join(f"{key} {given[key]}" for key in differ)

    rows, run.final, run.curves = read_csv(folder / "scores.csv"), {}, {}
    for path in folder.glob("evaluation-*.json"):
        with run_files.reading(path):
            rows += json.loads(path.read_text())[
                "scores"
            ]  # of step None: these count at last
    numbers = [row[key] for row in rows for key in ("step", "beta", "score")]
    if not all(x is None or math.isfinite(x) for x in numbers):
        raise UserError("a score, its β or its step is not a finite number")
    for (method, beta), steps in by_policy(rows).items():
        for step, scores in steps.items():
            counts = {len(scores.get(seed, ())) for seed in run.seeds}
            if step is not None and counts != {given["episodes"]}:
                continue  # some are still to come
            scores = np.array([scores[seed] for seed in run.seeds])
            if step in (None, given["policy_steps"]):
                run.final[method, beta] = scores
            if step is not None and beta in (None, run.beta):
                run.curves.setdefault(method, {})[step] = scores.mean(1)
    means = {
        beta: run.final["srpo", beta].mean(1)
        for beta in run.betas
        if ("srpo", beta) in run.final
    }
    run.sweep = {"srpo": means} if len(means) > 1 else {}

    log, run.critic = read_csv(folder / "log.csv"), {}
    critic = [row for row in log if row["stage"] == "critic"]
    bound = run.data["largest_reward"] / (1 - given["gamma"])
    diverged = {row["seed"] for row in log if row["alive"] == 0}
    diverged |= {row["seed"] for row in critic if not abs(row["q"]) <= bound}
    for row in critic:
        line = f"seed {row['seed']:.0f}" + " diverged" * (row["seed"] in diverged)
        run.critic.setdefault(line, {})[row["step"]] = [row["q"]]
    wanted = {("srpo", beta) for beta in run.betas} | {
        (method, None) for method in given["also"]
    }
    last = " ({stage}, step {step:,.0f})".format(**log[-1]) if log else ""
    status = ["finished" if wanted <= {*run.final} else "unfinished" + last]
    run.status = ", ".join(
        status + [f"seed {seed} diverged" for seed in run.seeds if seed in diverged]
    )
    return run


def mean_std(scores):
    return f"{scores.mean():.1f} ± {scores.mean(1).std():.1f}"


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
    """A statistic of the tasks' seed means, less a number, and its interval: seeds are drawn by task."""
    rng, sign = np.random.default_rng(0), "+" if minus else ""
    drawn = (
        statistic([rng.choice(means, (10_000, len(means))) for means in tasks]) - minus
    )
    low, high = np.percentile(drawn, (2.5, 97.5))
    interval = (
        f"[{low:{sign}.1f}, {high:{sign}.1f}]"
        if min(map(len, tasks)) > 1
        else "(one seed)"
    )
    return f"{statistic(tasks) - minus:{sign}.1f} {interval}"


def table_1(runs, damaged):
    """The paper's table with ours beside it; damaged: the names of runs that cannot be read."""
    ours, real, rows = {run.name: run for run in runs if run.name == run.task}, {}, []

    def add(task, printed, here, number="", difference="", settings=""):
        cells = {"task": task, **dict(zip(METHODS, printed)), "SRPO (here)": here}
        cells |= {
            "seeds × episodes": number,
            "here − paper": difference,
            "β, other settings": settings,
        }
        rows.append(
            {column: cell.replace("nan", "–") for column, cell in cells.items()}
        )

    for task, (*printed, std) in PAPER.items():
        run, paper = ours.get(task), float(printed[-1])
        printed[-1] += f" ± {std}"
        scores = run and run.final.get(("srpo", run.beta))
        if scores is None:
            add(
                task,
                printed,
                "unfinished" if run else "damaged" if task in damaged else "not run",
            )
            continue
        if not run.mark and not run.other:
            real[task] = scores.mean(1)
        difference = with_interval([real[task]], paper) if task in real else ""
        add(
            task,
            printed,
            mean_std(scores) + run.mark,
            size(scores),
            difference,
            f"{run.beta:g} {run.other}",
        )
    for name, group in (("locomotion", [*PAPER][:9]), ("AntMaze", data.ANTMAZE)):
        paper = np.array([PAPER[task][:-1] for task in group], float).mean(0)
        means = [real[task] for task in group if task in real]
        here = f"incomplete ({len(means)} of {len(group)})", "", ""
        if len(means) == len(group):
            here = with_interval(means), "", with_interval(means, paper[-1])
        add(f"average, {name}", map("{:.1f}".format, paper), *here)
    overall = (
        with_interval([*real.values()], statistic=interquartile_mean)
        if real
        else "not run"
    )
    add("interquartile mean of all runs", [""] * 9, overall)
    return rows


def table_of_runs(runs, wrong):
    """A row for each run, in sweeps for each β, and for each folder that is none; wrong: {name: reason}."""
    rows, methods = [], ("srpo", "iql", "bc", "idql", "random")
    for run, beta in ((run, beta) for run in runs for beta in run.betas):
        cells = dict.fromkeys(methods, "")
        for method in methods:
            scores = run.final.get((method, beta if method == "srpo" else None))
            if scores is not None:
                cells[method] = f"{mean_std(scores)} ({size(scores)})"
        about = {
            "data's mean": f"{run.data['data_score']:.1f}",
            "data": run.data["kind"],
        }
        about |= {"status": run.status, "other settings": run.other}
        rows.append({"run": run.name, "β": f"{beta:g}", **cells, **about})
    return rows + [
        {"run": name, "status": f"not used: {reason}"} for name, reason in wrong.items()
    ]


@style.context(STYLE)
def picture(out, name, runs, xlabel, ylabel):
    """out/name.png of the runs' curves, critic or sweep, a panel a run, as mean ± std; its Markdown."""
    path = out / f"{name}.png"
    panels = [(run, getattr(run, name)) for run in runs if getattr(run, name)]
    if not panels:
        path.unlink(missing_ok=True)
        return ""
    across, down = min(3, len(panels)), -(-len(panels) // 3)
    figure = Figure(figsize=(4 * across, 3.2 * down + 0.6), layout="constrained")
    for place, (run, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place, xlabel=xlabel, ylabel=ylabel)
        axes.set_title(
            f"{run.name}\n{run.mark}".strip().replace("$", r"\$"), fontsize="medium"
        )
        for label, points in lines.items():
            x, y = (
                sorted(points),
                np.array([points[x] for x in sorted(points)], float),
            )  # [x, seeds]
            look = "x--" if "diverged" in label else "o-" if name == "sweep" else "-"
            axes.plot(x, y.mean(1), look, label=label, markersize=4)
            axes.fill_between(
                x, y.mean(1) - y.std(1), y.mean(1) + y.std(1), alpha=0.2, lw=0
            )
            if "diverged" in label:
                axes.set_yscale("symlog")
            if name == "sweep":
                axes.plot(x, y, ".", color="gray")
                axes.set_xscale("log")
                axes.set_xticks(x, [f"{beta:g}" for beta in x])
                axes.minorticks_off()
                axes.axvline(
                    run.default_beta, color="gray", ls=":", label="the task's default β"
                )
        if name != "sweep":
            axes.locator_params("x", nbins=5)
        if name != "critic":
            axes.axhline(
                run.data["data_score"], color="gray", ls="--", label="the data's mean"
            )
            if run.task in PAPER:
                axes.axhline(
                    float(PAPER[run.task][-2]),
                    color="black",
                    lw=1,
                    label="SRPO in the paper",
                )
        axes.legend(fontsize="x-small")
    figure.savefig(image := io.BytesIO(), dpi=110)
    run_files.write_atomically(path, image.getvalue())
    return f"![{name}]({path.name})"


def report(out=Path("runs")):
    """Table 1, Fig. 6, 8 and 13-16 from the runs in out/* and out/*/*: out/report.md and its pictures"""
    runs, wrong = [], {}
    if not out.is_dir():
        raise UserError(
            f"{out} is not a folder; train a task first, or name another --out"
        )
    folders = {
        path.parent
        for depth in ("*", "*/*")
        for path in out.glob(f"{depth}/config.json")
    }
    folders |= {
        path
        for path in out.glob("*")
        if path.is_dir() and not any(path.glob("*/config.json"))
    }
    for folder in sorted(folders):
        name = folder.relative_to(out).as_posix()
        try:
            runs.append(read_run(folder, name))
        except (
            Exception
        ) as error:  # whatever a folder holds, the report goes on without it
            wrong[name] = f"{type(error).__name__} {error}".removeprefix("UserError ")
    damaged = {
        name
        for name, reason in wrong.items()
        if "config.json does not exist" not in reason
    }
    beside, every = table_1(runs, damaged), table_of_runs(runs, wrong)
    print(table(every))
    text = [
        REPORT.format(out=out),
        table(beside, align=False),
        table(every, align=False),
    ]
    text.append(picture(out, "curves", runs, "gradient steps", "score"))  # Fig. 6, 16
    text.append(
        picture(out, "critic", runs, "gradient steps", "the critic's mean Q")
    )  # Fig. 13
    text.append(picture(out, "sweep", runs, "β", "score"))  # Fig. 15
    written = "\n\n".join(filter(None, text)) + "\n"
    run_files.write_atomically(out / "report.md", written.encode(errors="replace"))
    print(f"Table 1 and pictures: {out / 'report.md'}")


# ------------------------------------------------------------------------------------ film: a policy at work


@style.context(STYLE)
def film(folder, seed=None):
    """A GIF of a policy's first episode, folder/film.gif, 8 seconds; of the first β and, unless told, seed"""
    config = read_config(folder)
    task, seeds, maze = config["task"], config["seeds"], "maze" in config["task"]
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise UserError(
            f"{folder} has no seed {seed}, but {', '.join(map(str, seeds))}"
        )
    policy = dict(load_policies(folder, config, "srpo")[1][: len(seeds)])[seed]
    env, poses = data.the_env(task).unwrapped, []
    model, state = (
        getattr(x, name, x)
        for x, name in ((env.sim.model, "_model"), (env.sim.data, "_data"))
    )
    body, walls, plane = (
        model.geom_bodyid > 0,
        model.geom_type == 6,
        [0, 1 if maze else 2],
    )  # mjGEOM_BOX
    capsule = (
        model.geom_type[body, None] == 3
    )  # mjGEOM_CAPSULE, along its z; others are spheres

    def watched(obs, rng):
        x, axis = state.geom_xpos[body], state.geom_xmat[body].reshape(-1, 3, 3)[..., 2]
        half = np.where(capsule, model.geom_size[body, 1:2] * axis, 1e-3)
        poses.append(
            np.stack([x - half, x + half], 1)[..., plane]
        )  # [geoms, 2 ends, 2]
        return policy(obs, rng)

    total, _ = data.run_episode(task, seed, watched, 0)
    score = data.normalized_score(task, total)
    torso, sides = np.array(poses)[:, 0].mean(1), 2 * model.geom_size[walls, :2]
    corners = state.geom_xpos[walls, :2] - sides / 2
    low, high = (
        (corners.min(0), (corners + sides).max(0))
        if maze
        else np.array([[-2, -0.2], [2, 2]])
    )
    inches = 4 * (high - low) / max(high - low)
    figure = Figure(figsize=inches)
    axes = figure.add_axes((0, 0, 1, 1), ylim=(low[1], high[1]))
    axes.axis("off")
    if maze:
        axes.bar(
            corners[:, 0],
            sides[:, 1],
            sides[:, 0],
            corners[:, 1],
            align="edge",
            color="0.7",
        )
        goal = (
            np.add(env._target, 1.2) if task.startswith("maze2d") else env.target_goal
        )  # its origin: 1.2
        axes.add_patch(Circle(goal, 0.5, color="gold"))  # reached: closer than 0.5
    else:
        axes.vlines(
            range(int(torso.min()) - 3, int(torso.max()) + 4), -0.1, 0, color="gray"
        )  # each meter
        axes.axhline(0, color="gray")
    (path,) = axes.plot([], [], "C1", lw=1)
    width = 144 * model.geom_size[body, 0] * inches[0] / (high - low)[0]  # in points
    limbs = axes.add_collection(
        LineCollection(poses[0], capstyle="round", color="C0", lw=width)
    )
    title = f"{task} ({config['data']['kind']} data)\n"
    label = axes.text(0.02, 0.98, "", transform=axes.transAxes, va="top", fontsize=9)
    shown = np.linspace(0, len(poses) - 1, min(64, len(poses))).astype(int)
    writer, film = animation.PillowWriter(fps=len(shown) / 8), folder / "film.gif"
    with writer.saving(figure, film, dpi=80):
        for step in shown:
            axes.set_xlim(np.add((low[0], high[0]), 0 if maze else torso[step, 0]))
            path.set_data(torso[: step + 1].T)
            limbs.set_segments(poses[step])
            label.set_text(
                title
                + f"step {step + 1} of {len(poses)}, the episode's score {score:.1f}"
            )
            writer.grab_frame()
    print(f"{film}: seed {seed}, score {score:.1f}")


# ---------------------------------------------------------------------------------------------- command line


def parse(arguments):
    parser = Parser(
        prog="figures.py", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for_bandit, for_speed, for_report, for_film = (
        commands.add_parser(
            name, help=function.__doc__.splitlines()[0], allow_abbrev=False
        ).add_argument
        for name, function in COMMANDS.items()
    )
    for_bandit(
        "--out",
        type=run_files.folder,
        default=Path("assets"),
        help="the folder for pictures and CSV",
    )
    for_bandit(
        "--quick",
        action="store_true",
        help="train the noise models for a minute, not six",
    )
    for_speed("--stage", nargs="+", choices=ALGORITHM_1, default=ALGORITHM_1)
    for_speed(
        "--task", default="halfcheetah-medium-v2", help="whose sizes and settings"
    )
    for_speed(
        "--demo",
        action="store_true",
        help="the sizes of run_all.sh's demo, instead of a task's",
    )
    for_speed(
        "--seeds",
        type=positive,
        help="how many side by side; default: 6, of the demo 3",
    )
    for_speed("--precision", default="tf32", choices=("tf32", "fp32"), help="on a GPU")
    for_speed(
        "--threads",
        type=positive,
        help="on a CPU, for all alike; default: PyTorch's choice",
    )
    for_speed("--quick", action="store_true", help="fewer, shorter turns: minutes")
    for_speed("--csv", dest="path", type=Path, default=Path("assets/speed.csv"))
    for_report(
        "--out",
        type=run_files.folder,
        default=Path("runs"),
        help="the folder that holds the runs",
    )
    for_film("folder", type=run_files.folder, help="a run's folder, runs/TASK")
    for_film("--seed", type=int, help="default: the run's first")
    return vars(parser.parse_args(arguments))


COMMANDS = {function.__name__: function for function in (bandit, speed, report, film)}


def main(arguments=None):
    """The command line; returns 0, or 2 for what its user can mend."""

    def command():
        given = parse(arguments)
        COMMANDS[given.pop("command")](**given)

    return program("figures", command)


if __name__ == "__main__":
    sys.exit(main())
