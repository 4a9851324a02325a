"""Figures 1 and 7: what a gradient step and an action cost."""
import argparse
import csv
import dataclasses
import functools
import os
import platform
import re
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import threadpoolctl
import torch
import torch.nn.functional as F
from torch import nn

import data
import srpo
from diffusion import behavior_loss
from models import Linear, NoiseModel, Policy, TwinQ, Value, mlp
from srpo import policy_loss, surrogate_gradient

# ---------------------------------------------------------------------------------------- speed: Fig. 1 and 7

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


def build(name, settings, dataset, seeds):
    others = ("critic", "behavior") if name == "policy" else ()
    frozen = [build(other, settings, dataset, seeds).weights() for other in others]
    return STAGES[name](settings, dataset, range(seeds), *frozen)


def step_costs(name, settings, dataset, seeds, limits):
    """The first table's rows of a stage; compiling is timed with the first step."""
    eager, fast = (build(name, settings, dataset, seeds) for _ in range(2))
    begin, device = time.perf_counter(), dataset.table.device
    compiled = (time.perf_counter() - begin) if fast.compile(required=False) else 0.0  # and one step
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
    [(_, in_numpy)] = srpo.numpy_policies({k: x.detach()[None] for k, x in policy.named_parameters()}, [0])
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
            stage = build(name, dataclasses.replace(settings, **batch),
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
    one.add_argument("--precision", default="fp32", choices=("fp32", "tf32", "bf16"))
    one.add_argument("--quick", action="store_true", help="fewer, shorter turns: less than three minutes")
    one.add_argument("--growth", action="store_true", help="how cost grows with seeds, rows and batch, too")
    one.add_argument("--csv", dest="path", type=Path, default=Path("assets/speed.csv"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_speed(parser.add_subparsers(dest="command", required=True))
    given = vars(parser.parse_args())
    given.pop("command")
    speed(**given)
