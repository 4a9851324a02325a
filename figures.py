"""The paper's figures and tables, each by one command; all but `report` and `film` need no data.

    python figures.py bandit          Fig. 2-5 and 9-12, the 2-D experiments, into assets/
    python figures.py speed           Fig. 1 and 7: what a gradient step and an action cost
    python figures.py report          Table 1, Fig. 6, 8, 13-16 from runs/, into runs/report.md
    python figures.py film runs/TASK  a GIF of one episode
"""
import csv
import functools
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import threadpoolctl
import torch
from matplotlib import animation, collections, pyplot
from PIL import Image
from torch import nn
from torch._inductor.utils import fresh_cache
from torch.utils.flop_counter import FlopCounterMode

import data
import srpo
from data import UserError
from diffusion import alpha_sigma, behavior_loss, log_likelihood
from models import HAS_ONEDNN, Draw, Linear, NoiseModel, fresh, mlp, product
from srpo import NOISE, ROWS, TIME, policy_loss, q_loss, surrogate_gradient, value_loss

pyplot.switch_backend("agg")
pyplot.style.use("tableau-colorblind10")


def table(rows, align=True):
    """Rows {column: text or number} as Markdown, without the columns that are empty in all of them."""
    def text(x):
        if isinstance(x, (int, float)):
            return f"{x:.0f}" if abs(x) >= 1000 else f"{x:.3g}"
        return " ".join(str(x).replace("|", "/").split())

    lines = [(name, "---", *(text(row.get(name, "")) for row in rows))
             for name in dict.fromkeys(name for row in rows for name in row)]
    columns = [column for column in lines if any(column[2:])]
    widths = [max(map(len, column)) if align else 0 for column in columns]
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in zip(*columns))


def write_csv(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


# -------------------------------------------------------------------- bandit: Fig. 2, 3, 4, 5 and 9 to 12

NAMES = ("8 Gaussians", "moons", "swiss roll", "rings", "checkerboard", "2 spirals")
BETAS = (10.0, 1.0, 0.1, 0.01, 0.001)
EQ_10, REGRESSION, GAUSSIAN = "Eq. 10: t = 0.02 alone", "weighted regression", "Gaussian reverse KL"
GRADIENTS = {  # ω(t) and the range of t in surrogate_gradient
    EQ_10: ("alpha_over_sigma", 0.02, 0.02),
    "ensemble, ω = α/σ": ("alpha_over_sigma", 0.02, 0.98),
    "ensemble, ω = 1": ("one", 0.02, 0.98),
    "ensemble, ω = σ²": ("sigma2", 0.02, 0.98),
}
TARGETS = torch.cartesian_prod(*[torch.linspace(-4.5, 4.5, 10)] * 2)  # [100, 2]
EDGE = 4.8  # of the pictures
SIDE = (torch.arange(80) + 0.5) / 40 * EDGE - EDGE
PIXELS = torch.cartesian_prod(SIDE, SIDE)


def behavior_distributions():
    """Six mixtures of 2,048 equal Gaussians, so that density and score are exact: centers [6, 2048, 2] and
    standard deviations [6, 1, 1]. Scikit-learn's shapes at FFJORD's scale (Grathwohl et al., 2019).
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


def draw_actions(seed, step, count, rows):
    """`count` of the rows [seeds, N, 2], the step's times in (0, 1] and noise."""
    draw = Draw(seed, torch.tensor(step, dtype=torch.int32))
    index = draw.index(ROWS, (count,), rows.shape[1]).unsqueeze(-1).expand(-1, -1, 2)
    return rows.gather(1, index), draw.uniform(TIME, (count,)), draw.normal(NOISE, (count, 2))


def log_density(a, centers, std):
    """log μ(a) of such a mixture, [*seeds, B]."""
    exponent = -torch.cdist(a, centers).square() / (2 * std**2)  # [*seeds, B, centers]
    return exponent.logsumexp(-1) - (2 * math.pi * centers.shape[-2] * std[..., 0] ** 2).log()


def exact_noise_model(a_t, s, t, centers, std):
    """ε* of such a mixture: σ Σ r (a_t − α c) / (α² std² + σ²), r the responsibilities."""
    alpha, sigma = alpha_sigma(t.unsqueeze(-1))
    variance = (alpha * std) ** 2 + sigma**2
    gap = a_t.unsqueeze(-2) - alpha.unsqueeze(-1) * centers.unsqueeze(-3)  # [*seeds, B, centers, 2]
    share = (-gap.square().sum(-1) / (2 * variance)).softmax(-1)
    return sigma / variance * (share.unsqueeze(-1) * gap).sum(-2)


def extract(noise_model, seed, steps=250, lr=0.1):
    """surrogate_gradient with Q(a) = −‖a − a_tar‖², ascended by Adam: a is a Dirac policy's parameter.

    All side by side, each action starting at its target: solutions [gradients, seeds, betas, targets, 2].
    """
    target = TARGETS.repeat(len(BETAS), 1)
    beta = torch.tensor(BETAS).repeat_interleave(len(TARGETS)).unsqueeze(-1)
    a = target.repeat(len(GRADIENTS), len(seed), 1, 1)
    m, v = torch.zeros_like(a), torch.zeros_like(a)
    for step in range(1, steps + 1):
        _, u, noise = draw_actions(seed, step, len(target), a[0])
        gradient = torch.stack([
            surrogate_gradient(lambda s, a: -(a - target).square().sum(-1), noise_model, one[..., :0], one,
                               low + (high - low) * u, noise, beta, weighting, baseline=high > low)
            for one, (weighting, low, high) in zip(a, GRADIENTS.values())])
        rate = lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2
        srpo.adam(a, -gradient, m, v, torch.tensor(step), rate, 0.0)
    return a.unflatten(2, (len(BETAS), -1))


def learn(actions, seed, steps=5000, pairs=64):
    """The long part: a noise model for each of actions [3, N, 2], what is extracted, log-density at PIXELS.

    So few steps need little noise: every action is perturbed by ε and by −ε, and t = u² is small more often,
    which leaves the minimum ε* where it is.
    """
    net = fresh(seed.tolist(), 1, lambda: NoiseModel(0, 2, width=64, blocks=2))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        a, u, noise = draw_actions(seed, step, pairs, actions)
        a, t, noise = a.repeat(1, 2, 1), u.square().repeat(1, 2), torch.cat([noise, -noise], 1)
        optimizer.zero_grad()
        behavior_loss(net, a[..., :0], a, t, noise).sum().backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)
    a = PIXELS.expand(len(seed), -1, -1)
    return extract(net, seed), log_likelihood(net, a[..., :0], a, steps=8)


def closed_forms(actions):
    """Two other ways to a policy, without any training: {method: solutions [seeds, betas, targets, 2]}.

    Forward KL (Eq. 2) with a Gaussian policy is weighted regression: the data's mean, weighted by exp(βQ).
    Reverse KL to a Gaussian behavior model: the maximum of log N(a; the data's mean and covariance) + βQ(a).
    """
    distance = torch.cdist(TARGETS, actions).square()  # [seeds, targets, N]
    regression = torch.stack([(-beta * distance).softmax(-1) @ actions for beta in BETAS], 1)
    mean, precision = actions.mean(1), torch.linalg.inv(torch.stack([rows.T.cov() for rows in actions]))
    pull = 2 * torch.tensor(BETAS)[:, None, None]
    right = (precision @ mean.unsqueeze(-1)).unsqueeze(1) + pull * TARGETS.T  # [seeds, betas, 2, targets]
    gaussian = torch.linalg.solve(precision.unsqueeze(1) + pull * torch.eye(2), right).mT
    return {REGRESSION: regression, GAUSSIAN: gaussian}


def draw(path, rows, actions, density, support, solutions):
    """A row for each (method, β), a column for each behavior: lines lead from targets to their solutions."""
    figure, grid = pyplot.subplots(len(rows), 6, figsize=(9, 1.47 * len(rows) + 0.25), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    for (row, i), axes in np.ndenumerate(grid):
        method, *beta = rows[row]
        if method == "data":
            axes.plot(*actions[i, :3000].T, ",", color="#00224e", alpha=0.7)
        elif method == "density by Eq. 7":
            axes.imshow(density[i], origin="lower", extent=(-EDGE, EDGE) * 2, cmap="cividis",
                        interpolation="bilinear", vmax=density[i].quantile(0.99))
        else:
            a, look = solutions[method][i, BETAS.index(*beta)], {"cmap": "plasma", "clim": (-4.5, 6)}
            axes.contourf(SIDE, SIDE, support[i], levels=[0, math.inf], colors="0.86")  # gray
            axes.add_collection(collections.LineCollection(
                torch.stack([TARGETS, a], 1), array=TARGETS[:, 0], linewidths=0.5, alpha=0.6, **look))
            axes.scatter(*a.T, 7, TARGETS[:, 0], linewidths=0, zorder=3, **look)
        axes.set(xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal", xticks=[], yticks=[])
        grid[0, i].set_title(NAMES[i], fontsize=10)
        grid[row, 0].set_ylabel("\nβ = ".join(map(str, rows[row])), fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    with Image.open(path) as image:  # 128 colors: a quarter of the bytes
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def bandit(out):
    """Fig. 2-5 and 9-12 as two pictures, a CSV and a table of how many solutions the behavior supports."""
    seed, (centers, std) = torch.arange(6, dtype=torch.int32), behavior_distributions()
    actions, _, noise = draw_actions(seed, 0, 20_000, centers)
    actions = actions + std * noise
    threshold = log_density(actions[:, :5000], centers, std).quantile(0.01, -1)  # of the support, exact
    with data.Workers(2) as crew:  # of one thread each: the same bits on any machine
        learned = [crew.submit(learn, *part) for part in zip(actions.split(3), seed.split(3))]
        found, density = zip(*[future.result() for future in learned])
    solutions = dict(zip(GRADIENTS, torch.cat(found, 1))) | closed_forms(actions[:, :5000])
    eight = functools.partial(exact_noise_model, centers=centers[:1, ::256], std=std[:1])
    exact = dict(zip(GRADIENTS, extract(eight, seed[:1])))

    in_box = ((TARGETS >= actions.amin(1)[:, None]) & (TARGETS <= actions.amax(1)[:, None])).all(-1)
    shares, records = {method: {"": method} for method in solutions}, []
    for name, i in [*zip(NAMES, range(6)), ("8 Gaussians, exact score", 0)]:
        for method, a in (solutions if name in NAMES else exact).items():
            inside = log_density(a[i], centers[i], std[i]) >= threshold[i]  # [betas, targets]
            every, from_box = (x.double().mean(-1).tolist() for x in (inside, inside[:, in_box[i]]))
            shares[method][name] = " / ".join(f"{100 * share:.0f}" for share in from_box)
            records += [{"method": method, "beta": beta, "behavior": name, "inside": share,
                         "inside_from_the_box": other} for beta, share, other in zip(BETAS, every, from_box)]
    write_csv(out / "bandit.csv", records)
    print("Share inside the support, percent, for β =", " / ".join(f"{x:g}" for x in BETAS), "\n")
    print(table([*shares.values()]))

    support = (log_density(PIXELS, centers, std) - threshold.unsqueeze(-1)).unflatten(1, (len(SIDE), -1)).mT
    density = torch.cat(density).exp().unflatten(1, (len(SIDE), -1)).mT
    shown = actions, density, support, solutions
    draw(out / "bandit.png", [("data",), ("density by Eq. 7",), (EQ_10, 10), (EQ_10, 1), (EQ_10, 0.1),
                              (REGRESSION, 0.1), (GAUSSIAN, 0.1)], *shown)
    draw(out / "bandit_ensemble.png", [(method, 0.01) for method in GRADIENTS], *shown)


# ---------------------------------------------------------------------------------- speed: Fig. 1 and 7

STAGES = ("critic", "behavior", "policy")
COMPILES = bool(shutil.which("g++"))


def released_step(stage):
    """One seed's step in the released code's manner, a function without arguments: eager, a backward pass and
    an optimizer a network, and a loss that the host reads at each step where it does so there."""
    given, sizes = stage.settings, [stage.s_dim + stage.a_dim, *[stage.settings.critic_width] * 2, 1]
    q, q_target = (nn.ModuleList(nn.Sequential(*mlp(sizes)) for _ in range(2)) for _ in range(2))
    value, policy, noise_model = (layout.build() for layout in (stage.value, stage.policy, stage.noise_model))
    for block in noise_model.blocks:
        block.norm = nn.Sequential(nn.Dropout(given.dropout), nn.LayerNorm(given.behavior_width))
    networks = nn.ModuleList([value, q, q_target, policy, noise_model]).to(stage.table.device)
    networks.train(stage.name == "behavior")
    networks.apply(lambda module: setattr(module, "precision", None))  # of `Linear`: bfloat16 is ours alone
    adam = {network: torch.optim.Adam(network.parameters(), stage.lr) for network in networks}
    adam[noise_model] = torch.optim.AdamW(noise_model.parameters(), stage.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adam[policy], stage.steps)

    def both(twins, s, a):  # one after the other: [2, B]
        sa = torch.cat([s, a], -1)
        return torch.stack([twin(sa).squeeze(-1) for twin in twins])

    def losses(s, a, *rest):
        if stage.name == "critic":
            return {value: value_loss(value, functools.partial(both, q_target), s, a, given.tau),
                    q: q_loss(functools.partial(both, q), value, s, a, *rest, given.gamma)}
        t, noise = torch.rand_like(a[:, 0]), torch.randn_like(a)
        if stage.name == "behavior":
            return {noise_model: behavior_loss(noise_model, s, a, t, noise)}
        a = policy(s)
        gradient = surrogate_gradient(
            lambda s, a: both(q_target, s, a).mean(-2), noise_model, s, a, 0.02 + 0.96 * t, noise,
            given.beta[0], given.weighting, given.baseline, given.grad_norm)
        return {policy: policy_loss(a, gradient)}

    def steps():
        while True:
            order = torch.randperm(len(stage.table), device=stage.table.device)
            for batch in zip(*[column[order].split(stage.batch) for column in stage.split(stage.table)]):
                for network, loss in losses(*batch).items():
                    adam[network].zero_grad()
                    loss.backward()
                    adam[network].step()
                if stage.name == "critic":
                    for old, new in zip(q_target.parameters(), q.parameters()):
                        old.data.copy_(given.target_rate * new.data + (1 - given.target_rate) * old.data)
                elif stage.name == "behavior":
                    loss.item()
                else:
                    cosine.step()
                yield

    return steps().__next__


def operations(call):
    """Those of its matrix products, [B, i] [i, o] as 2 B i o."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


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
    return {name: column / units for (name, (_, units)), column in zip(calls.items(), times.T)}


def spread(ratio):
    return {"ratio": np.median(ratio), "least": ratio.min(), "most": ratio.max()}


def build_stage(name, settings, dataset, seeds):
    before = STAGES[:2] if name == "policy" else ()
    trained = [build_stage(other, settings, dataset, seeds).weights() for other in before]
    return srpo.STAGES[name](settings, dataset, range(seeds), *trained)


def step_costs(name, settings, dataset, seeds, limits):
    """A stage's rows of the first table; compiling, if there is a compiler, is timed with the first step."""
    eager, fast = (build_stage(name, settings, dataset, seeds) for _ in range(2))
    on_gpu, released = dataset.table.is_cuda, released_step(eager)
    begin = time.perf_counter()
    fast.compile(required=False)
    compiled = time.perf_counter() - begin if COMPILES else 0.0
    steps = srpo.GRAPH_STEPS if on_gpu else 1
    way = ", ".join(["compiled"] * COMPILES + ["CUDA graphs"] * on_gpu) or "not compiled"
    square = torch.randn([8192 if on_gpu else 2048] * 2, device=eager.table.device, dtype=Linear.precision)
    work, rows, peaks = operations(released), [], {"peak": lambda: square @ square}
    if HAS_ONEDNN and not on_gpu and Linear.precision is None:  # PyTorch's own is MKL's on a CPU
        peaks["oneDNN's peak"] = lambda: product(square, square)
    calls = {"released manner": (released, work), "eager": (eager.step, seeds * work),
             way: (functools.partial(fast.advance, steps), steps * seeds * work)}
    times = race(calls | {peak: (call, 2 * len(square) ** 3) for peak, call in peaks.items()}, *limits)
    for way, side_by_side, compiling in zip(calls, (1, seeds, seeds), (0.0, 0.0, compiled)):
        each = np.median(times[way]) * work  # seconds of a seed's step; times are those of an operation
        rows.append({
            "stage": name, "implementation": way, "seeds": side_by_side, "ms/step": 1e3 * each * side_by_side,
            "ms/seed-step": 1e3 * each, "seed-steps/s": 1 / each,
            **spread(times["released manner"] / times[way]), "GFLOP/s": 1e-9 / np.median(times[way])})
        for peak in peaks:
            rows[-1][peak] = 1e-9 / np.median(times[peak])
            rows[-1][f"of {peak.removesuffix(' peak')}"] = np.median(times[peak] / times[way])
        rows[-1] |= {"cold compile s": compiling, "Table 1 h": each * eager.steps * 6 * len(PAPER) / 3600}
    return rows


def action_costs(settings, size, limits):
    """The second table: an action of SRPO's policy and of diffusion, on one thread of the CPU."""
    policy, noise_model, q = (srpo.layouts(settings, *size)[name].network
                              for name in ("policy", "noise_model", "q"))
    rng = np.random.default_rng(0)
    obs, in_numpy = rng.standard_normal(size[0]), srpo.numpy_policy(policy.state_dict())

    def direct(network):
        return lambda: network(torch.from_numpy(obs).float()).numpy()

    def diffusion(network, candidates, steps):
        choose = q if candidates > 1 else lambda s, a: torch.zeros(2, 1)  # one needs no choice
        return functools.partial(srpo.IDQL(network, choose, candidates, steps), obs, rng)

    ways = {"SRPO, numpy": (lambda: in_numpy(obs, rng), direct(policy)), "SRPO, torch": (direct(policy),)}
    ways |= {f"diffusion, {steps} steps, best of {candidates}": (diffusion(noise_model, candidates, steps),)
             for candidates in (1, 64) for steps in (5, 15, 50, 100)}
    if COMPILES:  # the last of a way's calls is the same work uncompiled, whose products can be counted
        ways["SRPO, compiled"] = direct(torch.compile(policy)), direct(policy)
        ways["diffusion, 15 steps, best of 1, compiled"] = (
            diffusion(torch.compile(noise_model), 1, 15), diffusion(noise_model, 1, 15))
    srpo.set_precision(srpo.Settings(precision="fp32"), "cpu")
    torch.set_num_threads(1)
    with threadpoolctl.threadpool_limits(1), torch.no_grad():
        times = race({way: (calls[0], 1) for way, calls in ways.items()}, *limits)
        return [{"action": way, "microseconds": 1e6 * np.median(times[way]),
                 **spread(times[way] / times["SRPO, numpy"]), "multiply-adds": operations(calls[-1]) // 2}
                for way, calls in ways.items()]


def growth_costs(name, settings, dataset, seeds, limits):
    """A stage's rows of the third table: its uncompiled step (on a GPU, a graph) with more of one thing."""
    rows, growing = [], {"seeds": (1, 2, 6, 12, 24), "rows": (200_000, 10**6, 2 * 10**6),
                         "batch": (256, 512, 1024, 2048, 4096, 8192)}
    for what, sizes in growing.items():
        calls = {}
        for size in sizes:
            now = {"seeds": seeds, "rows": 10**6, "batch": getattr(settings, f"{name}_batch"), what: size}
            given = srpo.Settings(**{**vars(settings), f"{name}_batch": now["batch"]})
            stage = build_stage(name, given, dataset(now["rows"]), now["seeds"])
            steps = srpo.GRAPH_STEPS if stage.table.is_cuda else 1
            calls[size] = functools.partial(stage.advance, steps), steps
        times = race(calls, *limits)
        rows += [{"stage": name, "grows": what, "to": size, "times": size / sizes[0],
                  "ms/step": 1e3 * np.median(times[size]), **spread(times[size] / times[sizes[0]])}
                 for size in sizes]
    return rows


def speed(task, stage, seeds, precision, quick, growth, path):
    """What a gradient step and an action cost: Fig. 1 and 7"""
    settings = srpo.Settings(precision=precision).resolve(data.check_task(task))
    size = data.SIZES[task.split("-")[0]]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    srpo.set_precision(settings, device)
    cpu = re.search("model name.*: (.*)|$", Path("/proc/cpuinfo").read_text())[1] or "CPU"
    gpu = torch.cuda.get_device_name() if device == "cuda" else "not measured on a GPU"
    machine = f"{cpu}, threads: {srpo.THREADS}, PyTorch {torch.__version__}, {precision}; {gpu}"
    print(f"{machine}\n{task}: a million synthetic rows of {size[0]} + {size[1]} numbers")

    @functools.cache
    def dataset(rows):
        rows = torch.randn(rows, 2 * size[0] + size[1] + 2).clamp_(-1, 1)
        rows[:, -1] = torch.rand(len(rows)) < 0.01
        return data.Dataset(rows.to(device), *size, {})

    def show(rows, suffix="", where=machine):
        target = path.with_name(f"{path.stem}{suffix}.csv")
        write_csv(target, [{**row, "machine": where} for row in rows])
        print(f"\n{table(rows)}\n-> {target}", flush=True)

    limits, steps = (3, 0.2) if quick else (7, 1.0), []
    with fresh_cache():  # compiling is cold
        for name in stage:
            steps += step_costs(name, settings, dataset(10**6), seeds, limits)
    show(steps)
    for way in dict.fromkeys(row["implementation"] for row in steps if len(stage) == len(STAGES)):
        hours = sum(row["Table 1 h"] for row in steps if row["implementation"] == way)
        print(f"all of Table 1, {way}: {hours:.0f} hours")
    if growth:
        grown = [growth_costs(name, settings, dataset, seeds, limits) for name in stage]
        show(sum(grown, []), "-growth")
    show(action_costs(settings, size, limits), "-actions",
         f"{cpu}, threads: 1, PyTorch {torch.__version__}, fp32")


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
METHODS, *PAPER = zip(*map(str.split, PAPER.strip().splitlines()))
PAPER = dict(zip(srpo.TABLE_2, PAPER))  # {task: (BEAR's, ..., SRPO's, ±)}, as printed
REPORT = """# {out} beside the paper

Scores: mean ± standard deviation of the seeds' means at the final step, or of `srpo.py evaluate` where it was
run, as were milliseconds per action. [ ]: 95 % bootstrap interval over each task's seeds, the paper's mean
taken as exact. Averages and interquartile mean hold D4RL's own data alone; the paper's are those of its rows
(it prints 51.9 for BEAR in locomotion, and elsewhere up to 0.5 more or less). Of several β, Table 1 takes the
task's default, else the first. Ablations (Fig. 8, 14) are runs with other settings. A seed diverged if a loss
was not finite, or if the critic's |mean Q| was above what the largest reward can add up to (unknown: 1 a step
in mazes, else 10)."""


def read_csv(path, columns):
    """The rows of a run's CSV file, numbers as float, empty fields as None; without half a last line."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    rows = list(csv.DictReader([line for line in lines if line.endswith("\n")], restval="missing"))
    if any(tuple(row) != columns for row in rows):
        raise UserError(f"{path.name} has other columns")
    return [{key: x if key in ("stage", "method") else float(x) if x else None for key, x in row.items()}
            for row in rows]


def read_run(folder, name):
    """A run's config and what its files tell; any exception if it is none.

    final: {(method, β): scores [seeds, episodes]}. For `picture`, {name: {x: the seeds' values}}: curves, the
    scores by step; critic, its Q by step; sweep, the scores by β.
    """
    run = SimpleNamespace(**srpo.read_config(folder), name=name, milliseconds={})
    run.final, run.curves, run.critic = {}, {}, {}
    given, kind, default = run.settings, run.data["kind"], vars(srpo.Settings().resolve(run.task))
    run.mark, run.betas = "" if kind == "D4RL" else f" ({kind} data)", [*map(float, given["beta"])]
    run.data_score, run.default_beta = float(run.data["data_score"]), default["beta"][0]
    run.beta = run.default_beta if run.default_beta in run.betas else run.betas[0]
    run.other = ", ".join(f"{key} {x}" for key, x in given.items() if x != default[key]
                          and key not in ("beta", "also", "episodes", "evaluations", "any_data"))
    rows, cells = read_csv(folder / "scores.csv", srpo.SCORES), {}
    for path in folder.glob("evaluation-*.json"):
        facts = json.loads(path.read_text())
        method = path.stem.removeprefix("evaluation-")
        run.milliseconds[method] = float(facts["milliseconds_per_action"])
        rows += [{**row, "method": method} for row in facts["scores"]]  # of step None: these count at last
    for row in rows:
        cell = cells.setdefault((row["method"], row["beta"], row["step"]), {seed: [] for seed in run.seeds})
        cell[row["seed"]].append(row["score"])
    for (method, beta, step), cell in cells.items():
        numbers = [beta or 0, step or 0, *sum(cell.values(), [])]
        if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
            raise UserError("a score, its β or its step is not a finite number")
        if step is not None and {*map(len, cell.values())} != {given["episodes"]}:
            continue  # some are still to come
        scores = np.array([*cell.values()])
        if step in (None, given["policy_steps"]):
            run.final[method, beta] = scores
        if step is not None and beta in (None, run.beta):
            run.curves.setdefault(method, {})[step] = scores.mean(1)
    means = {beta: scores.mean(1) for (method, beta), scores in run.final.items()
             if method == "srpo" and beta}
    run.sweep = {"srpo": means} if len(means) > 1 else {}
    log = read_csv(folder / "log.csv", srpo.LOG)
    critic = [row for row in log if row["stage"] == "critic"]
    bound = run.data.get("largest_reward", 1 if "maze" in run.task else 10) / (1 - given["gamma"])
    diverged = {row["seed"] for row in log if row["alive"] == 0}
    diverged |= {row["seed"] for row in critic if not abs(row["q"]) <= bound}
    for row in critic:
        name = f"seed {row['seed']:.0f}" + " diverged" * (row["seed"] in diverged)
        run.critic.setdefault(name, {})[float(row["step"])] = [row["q"]]
    whole = {("srpo", beta) for beta in run.betas} | {(method, None) for method in given["also"]}
    last = " ({stage}, step {step:,.0f})".format(**log[-1]) if log else ""
    run.status = ", ".join(["finished" if whole <= {*run.final} else "unfinished" + last,
                            *(f"seed {seed} diverged" for seed in run.seeds if seed in diverged)])
    return run


def mean_std(scores):
    return f"{scores.mean():.1f} ± {scores.mean(1).std():.1f}"


def interquartile_mean(tasks):
    """The mean of all runs' middle half, as rliable has it (Agarwal et al., 2021)."""
    means = np.sort(np.concatenate(tasks, -1), -1)
    cut = means.shape[-1] // 4
    return means[..., cut : means.shape[-1] - cut].mean(-1)


def with_interval(tasks, minus=0, statistic=lambda tasks: np.mean([means.mean(-1) for means in tasks], 0)):
    """A statistic of the tasks' seed means, less a number, and its interval: seeds are drawn by task."""
    rng, sign = np.random.default_rng(0), "+" if minus else ""
    drawn = statistic([rng.choice(means, (10_000, len(means))) for means in tasks])
    interval = "[{:{s}.1f}, {:{s}.1f}]".format(*np.percentile(drawn - minus, (2.5, 97.5)), s=sign)
    return f"{statistic(tasks) - minus:{sign}.1f} {interval if min(map(len, tasks)) > 1 else '(one seed)'}"


def table_1(runs, damaged):
    """The paper's table with ours beside it; damaged: the names of runs that cannot be read."""
    ours, real, rows = {run.name: run for run in runs if run.name == run.task}, {}, []
    for task, (*others, paper, std) in PAPER.items():
        run = ours.get(task)
        scores = run and run.final.get(("srpo", run.beta))
        if scores is None:
            here = ["unfinished" if run else "damaged" if task in damaged else "not run"]
        else:
            real |= {} if run.mark or run.other else {task: scores.mean(1)}
            difference = with_interval([real[task]], float(paper)) if task in real else ""
            here = [mean_std(scores) + run.mark, "{} × {}".format(*scores.shape), difference,
                    f"{run.beta:g} {run.other}"]
        rows.append([task, *others, f"{paper} ± {std}", *here])
    for name, group in (("locomotion", [*PAPER][:9]), ("AntMaze", data.ANTMAZE)):
        paper = np.array([PAPER[task][:9] for task in group], float).mean(0)
        means = [real[task] for task in group if task in real]
        here = [f"incomplete ({len(means)} of {len(group)})"]
        if len(means) == len(group):
            here = [with_interval(means), "", with_interval(means, paper[8])]
        rows.append([f"average, {name}", *map("{:.1f}".format, paper), *here])
    overall = with_interval([*real.values()], statistic=interquartile_mean) if real else "not run"
    rows.append(["interquartile mean of all runs", *[""] * 9, overall])
    columns = ("task", *METHODS[:8], "SRPO (paper)", "SRPO (here)", "seeds × episodes", "here − paper",
               "β, other settings")
    return [{column: cell.replace("nan", "–") for column, cell in zip(columns, row)} for row in rows]


def table_of_runs(runs, wrong):
    """A row for each run, in sweeps for each β, and for each other folder."""
    rows, methods = [], ("srpo", "iql", "bc", "idql", "random")
    for run, beta in ((run, beta) for run in runs for beta in run.betas):
        cells, sizes = dict.fromkeys(methods, ""), {}
        for method in methods:
            scores = run.final.get((method, beta if method == "srpo" else None))
            if scores is not None:
                time = f", {run.milliseconds[method]:.2f} ms" if method in run.milliseconds else ""
                cells[method], sizes[method] = mean_std(scores) + time, "{} × {}".format(*scores.shape)
        if len({*sizes.values()}) > 1:
            sizes = {method: f"{method} {scores}" for method, scores in sizes.items()}
        rows.append({"run": run.name, "β": f"{beta:g}", **cells, "data's mean": f"{run.data_score:.1f}",
                     "data": run.data["kind"],
                     "seeds × episodes": ", ".join(dict.fromkeys(sizes.values())) or "–",
                     "status": run.status, "other settings": run.other})
    return rows + [{"run": name, "status": f"not used: {reason}"} for name, reason in wrong.items()]


def picture(path, runs, xlabel, ylabel):
    """A PNG of what has its name in each run, a panel a run, as mean ± std; its line in Markdown."""
    path.unlink(missing_ok=True)
    panels = [(run, vars(run)[path.stem]) for run in runs if vars(run)[path.stem]]
    if not panels:
        return ""
    across, down = min(3, len(panels)), -(-len(panels) // 3)
    figure = pyplot.figure(figsize=(4 * across, 3.2 * down + 0.6), layout="constrained")
    for place, (run, lines) in enumerate(panels, 1):
        axes = figure.add_subplot(down, across, place, xlabel=xlabel, ylabel=ylabel)
        axes.set_title(f"{run.name}\n{run.mark}".strip().replace("$", r"\$"), fontsize="medium")
        for name, points in lines.items():
            x, y = sorted(points), np.array([points[x] for x in sorted(points)], float)  # [x, seeds]
            look = "x--" if "diverged" in name else "o-" if xlabel == "β" else "-"
            axes.plot(x, y.mean(1), look, label=name, markersize=4)
            axes.fill_between(x, y.mean(1) - y.std(1), y.mean(1) + y.std(1), alpha=0.2, lw=0)
            if "diverged" in name:
                axes.set_yscale("symlog")
        if xlabel == "β":
            axes.plot(x, y, ".", color="gray")
            axes.set_xscale("log")
            axes.axvline(run.default_beta, color="gray", ls=":", label="the task's default β")
        if ylabel == "score":
            axes.axhline(run.data_score, color="gray", ls="--", label="the data's mean")
            if run.task in PAPER:
                axes.axhline(float(PAPER[run.task][8]), color="black", lw=1, label="SRPO in the paper")
        axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return f"![{path.stem}]({path.name})"


def report(out="runs"):
    """Table 1, Fig. 6, 8 and 13-16 from the runs in out/* and out/*/*: out/report.md and its pictures"""
    out, runs, wrong = Path(out), [], {}
    if not out.is_dir():
        raise UserError(f"{out} is not a folder; train a task first, or name another --out")
    folders = {path.parent for depth in ("*", "*/*") for path in out.glob(f"{depth}/config.json")}
    folders |= {path for path in out.glob("*") if path.is_dir() and not any(path.glob("*/config.json"))}
    for folder in sorted(folders):
        name = folder.relative_to(out).as_posix()
        try:
            runs.append(read_run(folder, name))
        except Exception as error:  # whatever a folder holds, the report goes on without it
            wrong[name] = f"{type(error).__name__} {error}".removeprefix("UserError ")
    damaged = {name for name, reason in wrong.items() if "config.json does not exist" not in reason}
    beside, every = table_1(runs, damaged), table_of_runs(runs, wrong)
    print(table(every))
    text = [REPORT.format(out=out), table(beside, align=False), table(every, align=False),
            picture(out / "curves.png", runs, "gradient steps", "score"),  # Fig. 6, 16
            picture(out / "critic.png", runs, "gradient steps", "the critic's mean Q"),  # Fig. 13
            picture(out / "sweep.png", runs, "β", "score")]  # Fig. 15
    (out / "report.md").write_text("\n\n".join(filter(None, text)) + "\n")
    print(f"Table 1 and pictures: {out / 'report.md'}")


# ------------------------------------------------------------------------------------ film: a policy at work


def film(folder, seed=None):
    """A GIF of a policy's first episode, folder/film.gif, 8 seconds; of the first β and, unless told, seed"""
    config = srpo.read_config(folder)
    task, seeds, maze = config["task"], config["seeds"], "maze" in config["task"]
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise UserError(f"{folder} has no seed {seed}, but {', '.join(map(str, seeds))}")
    policy = dict(srpo.load_policies(folder, config, "srpo", None, None)[1][: len(seeds)])[seed]
    env, poses = data._worker_env(task).unwrapped, []  # the one of run_episode
    model, state = (getattr(x, name, x) for x, name in ((env.sim.model, "_model"), (env.sim.data, "_data")))
    body, walls, plane = model.geom_bodyid > 0, model.geom_type == 6, [0, 1 if maze else 2]  # mjGEOM_BOX
    capsule = model.geom_type[body, None] == 3  # mjGEOM_CAPSULE, along its z; others are spheres

    def watched(obs, rng):
        x, axis = state.geom_xpos[body], state.geom_xmat[body].reshape(-1, 3, 3)[..., 2]
        half = np.where(capsule, model.geom_size[body, 1:2] * axis, 1e-3)
        poses.append(np.stack([x - half, x + half], 1)[..., plane])  # [geoms, 2 ends, 2]
        return policy(obs, rng)

    score = data.normalized_score(task, data.run_episode(task, seed, watched, 0))
    torso, sides = np.array(poses)[:, 0].mean(1), 2 * model.geom_size[walls, :2]
    corners = state.geom_xpos[walls, :2] - sides / 2
    low, high = (corners.min(0), (corners + sides).max(0)) if maze else np.array([[-2, -0.2], [2, 2]])
    inches = 4 * (high - low) / max(high - low)
    figure = pyplot.figure(figsize=inches)
    axes = figure.add_axes((0, 0, 1, 1), ylim=(low[1], high[1]))
    axes.axis("off")
    if maze:
        axes.bar(*corners.T[:1], sides[:, 1], sides[:, 0], corners[:, 1], align="edge", color="0.7")
        goal = np.add(env._target, 1.2) if task == data.DEMO else env.target_goal  # its origin: 1.2
        axes.add_patch(pyplot.Circle(goal, 0.5, color="gold"))  # reached: closer than 0.5
    else:
        axes.vlines(range(int(torso.min()) - 3, int(torso.max()) + 4), -0.1, 0, color="gray")  # each meter
        axes.axhline(0, color="gray")
    (path,) = axes.plot([], [], "C1", lw=1)
    width = 144 * model.geom_size[body, 0] * inches[0] / (high - low)[0]  # in points
    limbs = axes.add_collection(collections.LineCollection(poses[0], capstyle="round", color="C0", lw=width))
    title = f"{task} ({config['data']['kind']} data)\n"
    label = axes.text(0.02, 0.98, "", transform=axes.transAxes, va="top", fontsize=9)
    shown = np.linspace(0, len(poses) - 1, min(64, len(poses))).astype(int)
    writer = animation.PillowWriter(fps=len(shown) / 8)
    with writer.saving(figure, folder / "film.gif", dpi=80):
        for step in shown:
            axes.set_xlim(np.add((low[0], high[0]), 0 if maze else torso[step, 0]))
            path.set_data(torso[: step + 1].T)
            limbs.set_segments(poses[step])
            label.set_text(title + f"step {step + 1} of {len(poses)}, the episode's score {score:.1f}")
            writer.grab_frame()
    pyplot.close(figure)
    print(f"{folder / 'film.gif'}: seed {seed}, score {score:.1f}")


# ---------------------------------------------------------------------------------------------- command line


def main():
    parser = srpo.Parser(prog="figures.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    functions = {function.__name__: function for function in (bandit, speed, report, film)}
    for_bandit, for_speed, for_report, for_film = (
        commands.add_parser(name, help=function.__doc__.splitlines()[0], allow_abbrev=False).add_argument
        for name, function in functions.items())
    for_bandit("--out", type=Path, default=Path("assets"), help="the folder for pictures and CSV")
    for_speed("--stage", nargs="+", choices=STAGES, default=STAGES)
    for_speed("--task", default="halfcheetah-medium-v2", help="whose sizes and settings")
    for_speed("--seeds", type=srpo.positive, default=6, help="how many seeds side by side")
    for_speed("--precision", default="tf32" if torch.cuda.is_available() else "fp32",
              choices=("fp32", "tf32", "bf16"))
    for_speed("--quick", action="store_true", help="fewer, shorter turns: minutes")
    for_speed("--growth", action="store_true", help="how cost grows with seeds, rows and batch, too")
    for_speed("--csv", dest="path", type=Path, default=Path("assets/speed.csv"))
    for_report("--out", default="runs", help="the folder that holds the runs")
    for_film("folder", type=Path, help="a run's folder, runs/TASK")
    for_film("--seed", type=int, help="default: the run's first")
    try:
        given = vars(parser.parse_args())
        functions[given.pop("command")](**given)
        return 0
    except (UserError, OSError) as error:
        print(f"figures: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
