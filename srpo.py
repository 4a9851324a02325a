"""SRPO: Score Regularized Policy Optimization through Diffusion Behavior (Chen et al., ICLR 2024).

It reads from top to bottom: the critic's losses, the policy's gradient, the settings of App. C and Table 2,
Algorithm 1's three stages, a run's folder and the command line. Every seed of a task trains side by side:
tensors are [*seeds, B, ...], a loss is one number per seed, and their sum is differentiated.

    python srpo.py train TASK [--seeds 0 1 2 3 4 5] [--out runs] [--beta X] ...
    python srpo.py evaluate runs/TASK [--episodes N]
"""
import argparse
import contextlib
import csv
import dataclasses
import functools
import gc
import io
import json
import math
import os
import platform
import signal
import sys
import time
import timeit
import warnings
import zipfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import filelock
import numpy as np

# Read at the import of torch: its threads spin less while they wait, which on busy cores costs 20-fold.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
import torch
from tqdm import tqdm

import data
from data import UserError
from diffusion import alpha_sigma, behavior_loss, diffuse, sample
from models import Draw, Layout, Linear, NoiseModel, Policy, TwinQ, Value

# --------------------------------------------------------------------------------------------- the equations


def expectile_loss(u, tau):
    """Eq. 11: L₂^τ(u) = |τ − 1(u < 0)| u², shaped like u."""
    return (tau - (u < 0).to(u.dtype)).abs() * u**2


def value_loss(value, q_target, s, a, tau):
    """Eq. 11: expectile regression of V on the smaller of the target twins, [*seeds].

    q_target(s, a): [*seeds, 2, B].
    """
    with torch.no_grad():
        target = q_target(s, a).amin(-2)
    return expectile_loss(target - value(s), tau).mean(-1)


def q_loss(q, value, s, a, r, s_next, terminal, gamma):
    """Eq. 12: squared error to r + γ V(s′), which ends at a terminal; mean of the twins, [*seeds]."""
    with torch.no_grad():
        target = r + gamma * (1 - terminal) * value(s_next)
    return ((q(s, a) - target.unsqueeze(-2)) ** 2).mean((-2, -1))


def surrogate_gradient(
    q, noise_model, s, a, t, noise, beta, weighting="sigma2", baseline=True, grad_norm=None
):
    """Eq. 15: ∂L_sur/∂a of each row, [*seeds, B, A]: ∇_a Q − (1/β) ω(t) (ε̂ − ε).

    q(s, a): [*seeds, B]; beta: a number, or a tensor that broadcasts against a. weighting ω: "sigma2", "one"
    or "alpha_over_sigma". grad_norm: "paper" multiplies the regularizer by ‖∇Q‖₂ (β_norm, App. C),
    "released" divides ∇Q by its root mean square over the action (released code); else ∇Q stays.
    """
    if grad_norm not in (None, "none", "paper", "released"):
        raise ValueError(f"grad_norm {grad_norm!r} is none of paper, released, none")
    with torch.enable_grad():
        a = a.detach().requires_grad_()
        (grad_q,) = torch.autograd.grad(q(s, a).sum(), a)  # ∇_a Q
    with torch.no_grad():
        alpha, sigma = alpha_sigma(t.unsqueeze(-1))
        omega = {"sigma2": sigma**2, "one": torch.ones_like(sigma), "alpha_over_sigma": alpha / sigma}
        omega = omega[weighting]  # ω(t)
        noise_hat = noise_model(diffuse(a, t, noise), s, t)  # ε̂
        regularizer = omega * (noise_hat - noise if baseline else noise_hat)  # ω(t) (ε̂ − ε)
        if grad_norm == "paper":
            regularizer = regularizer * grad_q.norm(dim=-1, keepdim=True)
        if grad_norm == "released":
            size = grad_q.square().mean(-1, keepdim=True).sqrt()
            grad_q = grad_q / size.clamp(min=1e-20)  # 0 stays 0, not NaN
        return grad_q - regularizer / beta


def policy_loss(a, gradient):
    """−(∂L_sur/∂a, held fixed) · π(s), [*seeds]: descending it ascends L_sur; its value means nothing."""
    return -(gradient.detach() * a).sum(-1).mean(-1)


def regression_loss(policy, s, a, advantage, temperature):
    """Eq. 2 for a policy of fixed variance: exp(temperature (Q − V)) ‖π(s) − a‖², [*seeds].

    IQL's policy, with weights of at most 100; temperature 0 is behavior cloning. Not SRPO, but its yardstick.
    """
    weight = (temperature * advantage).exp().clamp(max=100)
    return (weight * ((policy(s) - a) ** 2).sum(-1)).mean(-1)


# -------------------------------------------------------------------------------------------------- settings

TABLE_2 = {  # β of every task
    "halfcheetah-medium-expert-v2": 0.01, "hopper-medium-expert-v2": 0.01, "walker2d-medium-expert-v2": 0.1,
    "halfcheetah-medium-v2": 0.2, "hopper-medium-v2": 0.05, "walker2d-medium-v2": 0.05,
    "halfcheetah-medium-replay-v2": 0.2, "hopper-medium-replay-v2": 0.2, "walker2d-medium-replay-v2": 0.5,
    "antmaze-umaze-v2": 0.02, "antmaze-umaze-diverse-v2": 0.04, "antmaze-medium-play-v2": 0.08,
    "antmaze-medium-diverse-v2": 0.05, "antmaze-large-play-v2": 0.06, "antmaze-large-diverse-v2": 0.05,
}

SWEEPS = {"locomotion": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5), "umaze": (0.01, 0.02, 0.03, 0.04, 0.05),
          "antmaze": (0.03, 0.04, 0.05, 0.06, 0.07, 0.08)}  # App. C


def setting(default, source, least=1e-12, most=1e12, choices=None):
    how = dict(help=source, least=least, most=most, choices=choices)
    return dataclasses.field(default=default, metadata=how)


@dataclasses.dataclass
class Settings:
    """Every setting that changes a result, with its default and its source. None: depends on the task."""

    # critic
    critic_steps: int = setting(1_500_000, "gradient steps (App. C)")
    critic_batch: int = setting(256, "rows a step (App. C)")
    critic_lr: float = setting(3e-4, "Adam's learning rate (App. C)")
    critic_width: int = setting(256, "hidden units (App. C)")
    tau: float = setting(None, "expectile of V's regression: 0.7, AntMaze and maze2d 0.9 (App. C)", most=1)
    gamma: float = setting(0.99, "discount (IQL)", most=1 - 1e-9)
    target_rate: float = setting(0.005, "step of the target networks towards Q (IQL)", most=1)
    # behavior
    behavior_steps: int = setting(2_000_000, "gradient steps (App. C; 500,000 cost little)")
    behavior_batch: int = setting(2048, "rows a step (App. C)")
    behavior_lr: float = setting(3e-4, "AdamW's learning rate (App. C)")
    behavior_decay: float = setting(0.01, "AdamW's weight decay (PyTorch's default, as the released code)", 0)
    behavior_width: int = setting(256, "units of a residual block (IDQL)")
    behavior_blocks: int = setting(3, "residual blocks of two layers (App. C)")
    dropout: float = setting(0.1, "dropout of the residual blocks (IDQL)", 0, 1 - 1e-9)
    # policy extraction
    beta: tuple = setting(None, "temperature β (Table 2); several, or `sweep` (App. C), train side by side")
    policy_steps: int = setting(1_000_000, "gradient steps, on a cosine to 0 (App. C; cosine: released code)")
    policy_batch: int = setting(256, "rows a step (App. C)")
    policy_lr: float = setting(3e-4, "Adam's learning rate (App. C)")
    policy_width: int = setting(256, "hidden units (App. C)")
    policy_layers: int = setting(None, "hidden layers: 2, AntMaze 4 (App. C)")
    weighting: str = setting("sigma2", "ω(t) (Sec. 6.3)", choices=("sigma2", "one", "alpha_over_sigma"))
    baseline: bool = setting(True, "subtract the noise from the regularizer (Sec. 4.2)")
    grad_norm: str = setting(None, "paper: β_norm (App. C); released: ∇Q of unit RMS (mazes); or none",
                             choices=("none", "paper", "released"))
    also: tuple = setting((), "policies by weighted regression to train beside SRPO's", choices=("iql", "bc"))
    temperature: float = setting(None, "of IQL's weights exp(temperature (Q − V)): 3, mazes 10 (IQL)", 0)
    # evaluation
    episodes: int = setting(20, "episodes of each evaluation and seed (App. C)")
    evaluations: int = setting(20, "evaluations of a policy, beside the one at its start (Fig. 16)")
    any_data: bool = setting(False, "accept a data file whose hash is not D4RL's")
    precision: str = setting("tf32", "of the matrix products; on a CPU, tf32 is fp32 (README)",
                             choices=("fp32", "tf32", "bf16"))

    def resolve(self, task):
        """Fills in what depends on the task; raises UserError for values out of range."""
        maze = task.startswith(("antmaze", "maze2d"))
        by_task = dict(tau=0.9 if maze else 0.7, temperature=10.0 if maze else 3.0,
                       policy_layers=4 if task.startswith("antmaze") else 2,
                       beta=(TABLE_2.get(task, 0.4),), grad_norm="released" if maze else "none")
        for name, value in by_task.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if "sweep" in self.beta:
            self.beta = SWEEPS["umaze" if "umaze" in task else "antmaze" if maze else "locomotion"]
        if not self.beta or len({*self.beta}) < len(self.beta):
            raise UserError("--beta must be different numbers, or sweep")
        for field in dataclasses.fields(self):
            value, how = getattr(self, field.name), field.metadata
            for x in value if field.type is tuple else (value,):
                if how["choices"] or field.type is bool:
                    right = x in (how["choices"] or (True, False))
                else:
                    right = how["least"] <= x <= how["most"] and (field.type is not int or type(x) is int)
                if not right:
                    raise UserError(f"--{field.name.replace('_', '-')} {x} is out of range")
        return self


# ----------------------------------------------------------------------------- Algorithm 1, in three stages

ROWS, TIME, NOISE, DROPOUT = 1, 2, 3, 4  # purposes of random numbers, counted from 8 times the stage's number
GRAPH_STEPS = 25  # steps of one CUDA graph launch
THREADS = torch.get_num_threads()  # of a compiled step on a CPU: PyTorch's own choice
COMPILE_FROM = 60  # a seed's eager seconds from which on compiling pays; of one seed, since it changes bits


def adam(theta, gradient, m, v, count, lr, decay):
    """A step of AdamW (without decay, of Adam) with PyTorch's defaults, in place, on tensors [*seeds, P]."""
    m.lerp_(gradient, 1 - 0.9)
    v.lerp_(gradient**2, 1 - 0.999)
    m_hat = m / -torch.expm1(count * math.log(0.9))  # 1 − 0.9^count
    v_hat = v / -torch.expm1(count * math.log(0.999))
    theta.mul_(1 - lr * decay).sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))


def layouts(given, s_dim, a_dim):
    """The networks of App. C in the sizes of given settings."""
    size = s_dim, a_dim
    return {"value": Layout(lambda: Value(s_dim, given.critic_width)),
            "q": Layout(lambda: TwinQ(*size, given.critic_width)),
            "noise_model": Layout(lambda: NoiseModel(*size, given.behavior_width, given.behavior_blocks)),
            "policy": Layout(lambda: Policy(*size, given.policy_width, given.policy_layers))}


class Stage:
    """A gradient loop of Algorithm 1 for all seeds: what the three stages share.

    `state` holds every tensor that belongs to a seed, the seed axis first, at an address that never changes;
    `theta` [seeds, P] are the trained weights. A step is closed: it reads and writes `state`, `count` and the
    data, and takes and returns nothing, so that it can be compiled, captured as a CUDA graph and resumed.
    """

    name, kind, number, losses, decay, cosine, q_bound = "", "", 0, (), 0.0, False, math.inf
    kept = ("theta", "m", "v", "alive", "losses")  # what training changes

    def __init__(self, settings, dataset, seeds, *trained):
        """trained: the weights() of the stages that this one builds upon."""
        self.settings, self.table, device = settings, dataset.table, dataset.table.device
        self.s_dim, self.a_dim = dataset.s_dim, dataset.a_dim
        vars(self).update(layouts(settings, self.s_dim, self.a_dim))
        self.steps, self.batch, self.lr = (
            getattr(settings, f"{self.kind}_{what}") for what in ("steps", "batch", "lr"))
        self.prepare()
        betas = settings.beta if self.name == "policy" else (None,)
        self.members = [(beta, seed) for beta in betas for seed in seeds]
        state = {name: flat.repeat(len(betas), 1) for name, flat in self.start(seeds, *trained).items()}
        beta, seed = zip(*self.members)
        state.update(m=torch.zeros_like(state["theta"]), v=torch.zeros_like(state["theta"]),
                     seed=torch.tensor(seed, dtype=torch.int32), alive=torch.ones(len(seed)),
                     losses=torch.zeros(len(seed), len(self.losses)))
        if self.name == "policy":
            state["beta"] = torch.tensor(beta)
        self.state = {name: tensor.to(device) for name, tensor in state.items()}
        self.count = torch.zeros((), dtype=torch.int32, device=device)
        # On a CPU arithmetic and cache decide: one seed at a time. On a GPU launches do: all side by side.
        self.groups = [self.state] if self.table.is_cuda else self.each_seed()
        self.calls, self.graph = (self.draw, self.slope, self.update), None  # calls: a step's, or compiled

    def each_seed(self):
        """The state of each seed alone, without the seed axis: views."""
        return [{name: tensor[i] for name, tensor in self.state.items()} for i in range(len(self.members))]

    def eager_seconds(self):
        """About how long a seed takes on a CPU without compiling: 2 ms a step, and arithmetic."""
        weights = sum(self.state[name].shape[-1] for name in ("theta", "target", "q", "behavior")
                      if name in self.state)
        return self.steps * (0.002 + 5e-11 * self.batch * weights)

    def prepare(self):
        """Constants that settings and data give."""

    def noise(self, draw):
        """The step's random numbers beside its rows."""
        return ()

    def target(self, state, alive):
        """What follows the weights' update."""

    def watch(self, state):
        """What is worth watching on a batch of this step, {name: [*seeds]}."""
        return {}

    def split(self, rows):
        """Table rows [*seeds, B, 2 S + A + 2] as s, a, r, s_next, terminal."""
        s, a, s_next, r, terminal = rows.split([self.s_dim, self.a_dim, self.s_dim, 1, 1], -1)
        return s, a, r.squeeze(-1), s_next, terminal.squeeze(-1)

    def draw(self, state):
        """The rows and random numbers of this step: a function of (seed, step)."""
        draw = Draw(state["seed"], self.count, 8 * self.number)
        return self.table[draw.index(ROWS, (self.batch,), len(self.table))], *self.noise(draw)

    def slope(self, state, rows, *noise):
        """The losses [*seeds, len(self.losses)] of the seeds in `state`, and their gradient [*seeds, P]."""
        theta = state["theta"].detach().requires_grad_()
        losses = self.loss(theta, state, rows, *noise)
        return losses.detach(), *torch.autograd.grad(losses.sum(), theta)

    @torch.no_grad()
    def update(self, state, losses, gradient):
        """One gradient step by what `slope` returns. A seed whose loss is not finite stops where it is."""
        state["losses"].add_(losses)
        finite = losses.isfinite().all(-1) & gradient.sum(-1).isfinite()
        alive = state["alive"].mul_(finite).unsqueeze(-1)
        lr = self.lr * alive
        if self.cosine:
            lr = lr * (1 + torch.cos(math.pi * (self.count - 1) / self.steps)) / 2
        gradient = torch.where(alive > 0, gradient, 0.0)  # lr 0 holds weights; this, Adam's state finite
        adam(state["theta"], gradient, state["m"], state["v"], self.count, lr, self.decay)
        self.target(state, alive)

    def step(self):
        draw, slope, update = self.calls
        self.count.add_(1)
        for group in self.groups:
            update(group, *slope(group, *draw(group)))

    def advance(self, steps):
        """Takes at most `steps` steps without waiting for the device; returns how many."""
        if not self.table.is_cuda or steps < GRAPH_STEPS:
            self.step()
            return 1
        if self.graph is None:
            return self.capture()
        self.graph.replay()
        return GRAPH_STEPS

    def capture(self):
        """Takes three steps, then records GRAPH_STEPS of them as a CUDA graph. Not measured on a GPU."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # the graph of an earlier stage, if freed during a capture, would spoil it
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(GRAPH_STEPS):
                    self.step()
        finally:
            gc.enable()
        self.graph = graph
        return 3

    def compile(self, required):
        """Compiles the step, or says why not and stays eager, and takes one; returns 1."""
        warnings.filterwarnings("ignore", module="torch.jit")  # torch's own deprecation, at inductor's import
        torch._dynamo.config.trace_autograd_ops = True  # else torch.autograd.grad can't be compiled
        # Apart, since in one function every use of a random number would compute it anew. What is used twice
        # is stored from five operations on, not thirty: else the hash's tracing time doubles with each use of
        # a word, and Adam computes expm1 for every weight.
        stored, eager = {"realize_opcount_threshold": 4}, self.calls
        self.calls = [torch.compile(f, fullgraph=True, dynamic=False, options=options)
                      for f, options in zip(eager, (stored, None, stored))]
        try:
            self.step()
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:  # before anything is written
            self.calls = eager
            reason = " ".join(str(error).split())[:160]
            cure = "install a C++ compiler (g++), on a GPU also a C compiler and Triton"
            if required:
                raise UserError(f"--compile cannot work here ({reason}); {cure}, or drop --compile") from None
            tqdm.write(f"{self.name}: not compiled, which costs speed only ({reason}); to compile: {cure}")
            self.count.sub_(1)
            self.step()
        return 1


class Critic(Stage):
    """// Critic training (IQL): ζ ← ζ − λ_V ∇L_V (value_loss); φ ← φ − λ_Q ∇L_Q (q_loss)."""

    name, kind, number, losses = "critic", "critic", 1, ("value_loss", "q_loss")
    kept = (*Stage.kept, "target")

    def prepare(self):
        self.q_bound = float(self.table[:, -2].abs().max()) / (1 - self.settings.gamma)  # no return is larger

    def start(self, seeds):
        value, q = self.value.fresh(seeds, 1), self.q.fresh(seeds, 2)
        return {"theta": torch.cat([value, q], -1), "target": q}

    def value_and_q(self, theta):
        return theta.split([sum(self.value.sizes), sum(self.q.sizes)], -1)

    def loss(self, theta, state, rows):
        s, a, r, s_next, terminal = self.split(rows)
        value, q = self.value_and_q(theta)
        value, q, q_target = self.value.bind(value), self.q.bind(q), self.q.bind(state["target"])
        return torch.stack([value_loss(value, q_target, s, a, self.settings.tau),
                            q_loss(q, value, s, a, r, s_next, terminal, self.settings.gamma)], -1)

    def target(self, state, alive):
        _, q = self.value_and_q(state["theta"])
        state["target"].add_(self.settings.target_rate * alive * (q - state["target"]))

    def watch(self, state):
        s, a, *_ = self.split(self.draw(state)[0])
        value, q = self.value_and_q(state["theta"])
        return {"q": self.q.bind(q)(s, a).mean((-2, -1)), "v": self.value.bind(value)(s).mean(-1)}

    def weights(self):
        value, q = self.value_and_q(self.state["theta"])
        return {"value": self.value.copies(value), "q": self.q.copies(q),
                "q_target": self.q.copies(self.state["target"])}


class Behavior(Stage):
    """// Behavior training: ψ ← ψ − λ_μ ∇L_μ (behavior_loss)."""

    name, kind, number, losses = "behavior", "behavior", 2, ("behavior_loss",)

    def prepare(self):
        decay = {name: torch.full(shape, self.settings.behavior_decay if name != "frequencies" else 0.0)
                 for name, shape in self.noise_model.shapes.items()}  # frequencies aren't trained
        self.decay = self.noise_model.flatten(decay).to(self.table.device)

    def start(self, seeds):
        return {"theta": self.noise_model.fresh(seeds, 3)}

    def noise(self, draw):
        units = (self.settings.behavior_blocks, self.batch, self.settings.behavior_width)
        return (draw.uniform(TIME, (self.batch,)), draw.normal(NOISE, (self.batch, self.a_dim)),
                draw.keep(DROPOUT, units, self.settings.dropout))

    def loss(self, theta, state, rows, t, noise, keep):
        s, a, *_ = self.split(rows)
        noise_model = self.noise_model.bind(theta)
        dropped_out = functools.partial(noise_model, keep=keep, dropout=self.settings.dropout)
        return behavior_loss(dropped_out, s, a, t, noise).unsqueeze(-1)

    def weights(self):
        return self.noise_model.copies(self.state["theta"])


class Extraction(Stage):
    """// Policy extraction: θ ← θ + λ_π ∇L_sur (surrogate_gradient), critic and behavior model frozen."""

    name, kind, number, losses, cosine = "policy", "policy", 3, ("policy_loss",), True

    def start(self, seeds, critic, behavior):
        return {"theta": self.policy.fresh(seeds, 4), "q": self.q.flatten(critic["q_target"]),
                "value": self.value.flatten(critic["value"]), "behavior": self.noise_model.flatten(behavior)}

    def noise(self, draw):
        t = 0.02 + 0.96 * draw.uniform(TIME, (self.batch,))  # U(0.02, 0.98), Sec. 4.2
        return t, draw.normal(NOISE, (self.batch, self.a_dim))

    def gradient(self, state, s, a, t, noise, **options):
        """∂L_sur/∂a with the settings' choices, or other `options`."""
        q, noise_model = self.q.bind(state["q"]), self.noise_model.bind(state["behavior"])  # without dropout
        chosen = {name: getattr(self.settings, name) for name in ("weighting", "baseline", "grad_norm")}
        options = {"beta": state["beta"][..., None, None], **chosen, **options}
        return surrogate_gradient(lambda s, a: q(s, a).mean(-2), noise_model, s, a, t, noise, **options)

    def loss(self, theta, state, rows, t, noise):
        s, *_ = self.split(rows)
        a = self.policy.bind(theta)(s)
        return policy_loss(a, self.gradient(state, s, a, t, noise)).unsqueeze(-1)

    def watch(self, state):
        rows, *noise = self.draw(state)
        s, *_ = self.split(rows)
        a = self.policy.bind(state["theta"])(s)
        q, value = self.q.bind(state["q"]), self.value.bind(state["value"])
        watched = {"q": q(s, a).mean((-2, -1)), "v": value(s).mean(-1)}
        if self.name == "policy":
            plain = functools.partial(self.gradient, state, s, a, *noise, weighting="one", grad_norm="none")
            grad_q = plain(beta=math.inf)  # 1/β = 0 leaves ∇Q
            gap = grad_q - plain(beta=1, baseline=True)  # ε̂ − ε
            watched.update(grad_q=grad_q.norm(dim=-1).mean(-1), noise_gap=gap.norm(dim=-1).mean(-1))
        return watched

    def weights(self):
        return self.policy.copies(self.state["theta"])


class WeightedRegression(Extraction):
    """IQL's policy on the same critic; not part of SRPO."""

    name, number, losses = "iql", 4, ("regression_loss",)

    def noise(self, draw):
        return ()

    def loss(self, theta, state, rows):
        s, a, *_ = self.split(rows)
        advantage = self.q.bind(state["q"])(s, a).amin(-2) - self.value.bind(state["value"])(s)
        temperature = self.settings.temperature if self.name == "iql" else 0.0
        return regression_loss(self.policy.bind(theta), s, a, advantage, temperature).unsqueeze(-1)


class BehaviorCloning(WeightedRegression):
    """Regression without weights; not part of SRPO."""

    name, number = "bc", 5


STAGES = {stage.name: stage for stage in (Critic, Behavior, Extraction, WeightedRegression, BehaviorCloning)}


# -------------------------------------------------------------------------------------------- a run's folder

LOG = ("stage", "step", "seed", "beta", "alive", "value_loss", "q_loss", "behavior_loss", "policy_loss",
       "regression_loss", "q", "v", "grad_q", "noise_gap")
SCORES = ("method", "step", "seed", "beta", "episode", "return", "score")
METHODS = {"policy": "srpo", "iql": "iql", "bc": "bc"}  # a stage's name: its policy's


class Stopped(Exception):
    """Training cannot go on: exit status 3."""


def packed(value):
    """What torch.save writes, as bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write_atomically(path, content):
    """Bytes to a temporary file, flushed, then renamed: `path` is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error.strerror}); what was saved before is intact") from None


@contextlib.contextmanager
def reading(path, remove="it"):
    """Whatever goes wrong within it is blamed on the file: damaged ones fail in many ways."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):  # no fault of the file's
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} does not exist: train it first") from None
    except Exception as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())[:80]
        raise UserError(f"{path} is damaged or foreign ({reason}); remove {remove}, train again") from None


def load_tensors(path, device="cpu"):
    """What torch.save wrote, tensors and plain values only; UserError for anything else."""
    with reading(path), zipfile.ZipFile(path) as archive:
        if archive.testzip():  # torch.load doesn't look at checksums
            raise ValueError("other bytes than were written")
        return torch.load(path, map_location=device, weights_only=True)


def read_config(folder):
    """A run folder's config.json; UserError where it is missing, damaged or not ours."""
    path = Path(folder) / "config.json"
    with reading(path, remove="the folder"):  # what else is there belongs to its settings
        config = json.loads(path.read_text())
        data.check_task(config["task"])
        settings = Settings(**config["settings"]).resolve(config["task"])
        config["settings"] = json.loads(json.dumps(vars(settings)))  # what it lacks is as by default
        if not all(type(seed) is int for seed in config["seeds"]) or not config["seeds"]:
            raise ValueError("seeds must be whole numbers")
        float(config["data"]["data_score"]), [config["data"][key] for key in ("kind", "sha256")]
        return config


def differences(config, other, keys):
    """Which of these facts and settings, if any, are not the same in two configs."""
    config, other = ({**one, **one["settings"]} for one in (config, other))
    return ", ".join([key for key in keys if config.get(key) != other.get(key)][:4])


def numpy_policy(tensors):
    """A policy for data.evaluate from a policy network's state dict."""
    arrays = [tensor.numpy() for tensor in tensors.values()]
    return data.NumpyPolicy([*zip(arrays[::2], arrays[1::2])])


def score_rows(task, method, step, members, returns):
    """The rows of scores.csv for returns [members, episodes]; members: (beta, seed) of each policy."""
    scores = data.normalized_score(task, returns)
    return [dict(zip(SCORES, (method, step, seed, beta, episode, value, score)))
            for (beta, seed), *row in zip(members, returns.tolist(), scores.tolist())
            for episode, (value, score) in enumerate(zip(*row))]


def by_policy(rows):
    """{"METHOD, β = ...": {step: scores [seeds, episodes]}} of a run's rows of scores."""
    cells = {}
    for row in rows:
        name = f"{row['method']}, β = {row['beta']}" if row["beta"] else row["method"]
        steps = cells.setdefault(name, {}).setdefault(row["step"], {})
        steps.setdefault(row["seed"], []).append(row["score"])
    return {name: {step: np.array([*seeds.values()]) for step, seeds in steps.items()}
            for name, steps in cells.items()}


def print_scores(rows, config):
    """One line a policy: mean and standard deviation over the seeds' mean scores at the last step."""
    kind = config["data"]["kind"]
    for name, steps in by_policy(rows).items():
        scores = [*steps.values()][-1]
        means, words = scores.mean(1), "" if kind == "D4RL" else f" ({kind} data)"
        print(f"{config['task']}{words} {name}: {means.mean():.1f} ± {means.std():.1f} over {len(means)} "
              f"seeds of {scores.shape[1]} episodes ({' '.join(f'{mean:.1f}' for mean in means)})")


def draw_curves(path, config, rows):
    """Score against step, mean and range over seeds, with the data's own mean as a line."""
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, steps in by_policy(rows).items():
        means = np.array([scores.mean(1) for scores in steps.values()])
        axes.plot([*steps], means.mean(1), label=name)
        axes.fill_between([*steps], means.min(1), means.max(1), alpha=0.2)
    label = f"the data's mean ({config['data']['kind']})"
    axes.axhline(config["data"]["data_score"], color="gray", ls="--", label=label)
    axes.set(xlabel="gradient steps", ylabel="score (mean and range over seeds)", title=config["task"])
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


class Run:
    """A task's folder: config.json, log.csv, scores.csv, curves.png, a .pt file a stage, checkpoint.pt.

    The checkpoint also holds the rows of the CSV files, which are written anew when a run goes on.
    """

    def __init__(self, folder, config, minutes, board=None):
        self.folder, self.minutes, self.board, self.stopped, self.told = folder, minutes, board, None, set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(folder / ".lock", timeout=0)
            self.lock.acquire()
            (folder / ".holder").write_text(f"process {os.getpid()} on {platform.node()}")
        except filelock.Timeout:
            raise UserError(f"{folder} is in use by {(folder / '.holder').read_text()}") from None
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}); choose another --out") from None
        same = [*config["settings"], "task", "data", "seeds", "torch"]
        same.remove("also")  # a policy more changes no other
        if (folder / "config.json").exists():
            old = read_config(folder)
            if differ := differences(config, old, same):
                raise UserError(f"{folder} holds a run of another {differ}; choose another --out")
            old["settings"]["also"] = sorted({*config["settings"]["also"], *old["settings"]["also"]})
            config = old
        self.config, self.checkpoint = config, folder / "checkpoint.pt"
        write_atomically(folder / "config.json", json.dumps(config, indent=1).encode())
        self.saved = {"stage": "", "log": [], "scores": [], "config": config}
        if self.checkpoint.exists():
            self.saved = load_tensors(self.checkpoint)
        elif any((folder / f"{name}.pt").exists() for name in METHODS):
            raise UserError(f"{self.checkpoint}, which holds the scores, is missing; choose another --out")
        with reading(self.checkpoint):
            if differ := differences(config, self.saved["config"], same):
                raise ValueError(f"of a run of another {differ}")
            rows = {name: [dict(row) for row in self.saved[name]] for name in ("log", "scores")}
            by_policy(rows["scores"])
        self.saved.update(log=[], scores=[])
        self.add("log", LOG, rows["log"], "w")
        self.add("scores", SCORES, rows["scores"], "w")

    def add(self, name, columns, rows, mode="a"):
        """More rows for a CSV file."""
        self.saved[name] += rows
        with open(self.folder / f"{name}.csv", mode, newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")  # a foreign checkpoint's
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    @contextlib.contextmanager
    def held(self):
        """Within it SIGINT, SIGTERM and SIGUSR1 make the loop save and stop, a second Ctrl-C at once."""

        def ask(number, frame):
            if self.stopped == number == signal.SIGINT:
                os._exit(128 + number)
            self.stopped = self.stopped or (signal.SIGTERM if number == signal.SIGUSR1 else number)

        before = [signal.signal(number, ask) for number in data.SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(data.SIGNALS, before):
                signal.signal(number, handler)
            self.lock.release()

    def save(self, stage, pending):
        """The checkpoint: the stage's tensors and step, evaluations under way, the rows of the CSV files."""
        self.saved.update(stage=stage.name, count=stage.count, pending=[entry[:2] for entry in pending],
                          state={name: stage.state[name] for name in stage.kept})
        write_atomically(self.checkpoint, packed(self.saved))

    def train(self, stage, evaluator, compiled):
        """Takes a stage from where it stands to its end, with logs, evaluations and checkpoints."""
        done, pending, members = 0, [], len(stage.members)
        evaluations = self.config["settings"]["evaluations"] if stage.name in METHODS else 0
        if self.saved["stage"] == stage.name:
            with reading(self.checkpoint):
                for name in stage.kept:
                    stage.state[name].copy_(self.saved["state"][name].reshape(stage.state[name].shape))
                stage.count.copy_(self.saved["count"])
                done = int(stage.count)
                if not 0 <= done <= stage.steps:
                    raise ValueError(f"step {done}")
                pending = [self.submit(stage, *place, evaluator) for place in self.saved["pending"]]
        else:  # from its start, without what an earlier attempt wrote
            for name, columns in (("log", LOG), ("scores", SCORES)):
                mine = stage.name if name == "log" else METHODS.get(stage.name)
                rows, self.saved[name] = [row for row in self.saved[name] if row[columns[0]] != mine], []
                self.add(name, columns, rows, "w")
            if evaluations:
                pending = [self.submit(stage, 0, stage.state["theta"], evaluator)]
        fast = compiled if compiled is not None else stage.eager_seconds() > COMPILE_FROM
        torch.set_num_threads(THREADS if fast else 1)  # one: the same bits on any number of cores
        marks = {round(i * stage.steps / evaluations) for i in range(1, evaluations + 1)}
        every, saved_at = max(1, min(1000, stage.steps // 20)), time.monotonic()
        with tqdm(desc=stage.name, total=members * stage.steps, initial=members * done, unit=" seed-steps",
                  unit_scale=True, mininterval=1, smoothing=0.05) as bar:
            while done < stage.steps or pending:
                if done == stage.steps:
                    time.sleep(0.02)  # evaluations go on
                else:
                    stops = {*marks, stage.steps, (done // every + 1) * every}
                    stop = min(mark for mark in stops if mark > done)
                    steps = stage.compile(required=compiled) if fast else stage.advance(stop - done)
                    done, fast = done + steps, False
                    bar.update(members * steps)
                    if done in marks:
                        pending.append(self.submit(stage, done, stage.state["theta"], evaluator))
                    if done % every == 0 or done == stage.steps:
                        self.log(stage, done, done % every or every, bar)
                self.collect(stage, pending)
                if self.stopped or time.monotonic() - saved_at > 60 * self.minutes:
                    self.save(stage, pending)
                    saved_at = time.monotonic()
                if self.stopped:
                    tqdm.write(f"saved at step {done} of {stage.name}; the same command goes on from there")
                    raise SystemExit(128 + self.stopped)
        self.save(stage, [])
        write_atomically(self.folder / f"{stage.name}.pt", packed(stage.weights()))

    def log(self, stage, step, since, bar):
        """A row a seed: mean losses over the steps since the last row, and what is worth watching now."""
        losses, alive = (stage.state["losses"] / since).tolist(), stage.state["alive"].tolist()
        stage.state["losses"].zero_()
        watched = [stage.watch(group) for group in stage.groups]
        columns = [torch.stack([group[name] for group in watched]).flatten().tolist() for name in watched[0]]
        values = [dict(zip((*stage.losses, *watched[0]), (*row, *rest)))
                  for row, *rest in zip(losses, *columns)]
        self.add("log", LOG, [dict(zip(LOG, (stage.name, step, seed, beta, int(lives))), **row)
                              for (beta, seed), lives, row in zip(stage.members, alive, values)])
        for (beta, seed), lives, row in zip(stage.members, alive, values):
            name = f"seed {seed}{f', β = {beta}' if beta else ''}"
            if not lives:
                self.tell(f"{name}: a {stage.name} loss is not finite; stopped at its last finite weights")
            if abs(row.get("q", 0)) > stage.q_bound:
                self.tell(f"{name}: the critic diverges: Q is beyond {stage.q_bound:.3g}, the largest return")
            for key, value in row.items() if self.board else ():
                self.board.add_scalar(f"{stage.name}/{key}/{name}", value, step)
        means = {key: f"{np.mean([row[key] for row in values]):.3g}" for key in values[0]}
        bar.set_postfix(means, refresh=False)
        if not any(alive):
            raise Stopped(f"every seed's {stage.name} loss is not finite; see {self.folder / 'log.csv'}")

    def tell(self, line):
        """Prints a line the first time."""
        if line not in self.told:
            self.told.add(line)
            tqdm.write(line)

    def submit(self, stage, step, theta, evaluator):
        """Starts an evaluation of the policies with weights theta, which goes on while training does."""
        theta = theta.to("cpu", copy=True)
        policies = [(seed, numpy_policy(stage.policy.tensors(weights)))
                    for (_, seed), weights in zip(stage.members, theta)]
        task, episodes = self.config["task"], self.config["settings"]["episodes"]
        return step, theta, evaluator.roll_out(task, policies, episodes)

    def collect(self, stage, pending):
        """Writes the scores of finished evaluations, in the order of their steps."""
        while pending and all(future.done() for episodes in pending[0][2] for future in episodes):
            step, _, evaluation = pending.pop(0)
            method = METHODS[stage.name]
            rows = score_rows(self.config["task"], method, step, stage.members, data.results(evaluation))
            self.add("scores", SCORES, rows)
            mean = np.mean([row["score"] for row in rows])
            tqdm.write(f"{method}: mean score {mean:.1f} at step {step}")
            if self.board:
                self.board.add_scalar(f"score/{method}", mean, step)

    def take(self, stage, folder):
        """Copies the trained critic or behavior model of a run of the same task, data, seeds and settings."""
        keys = [key for key in self.config["settings"] if key.startswith(("critic", "behavior"))]
        keys += ["task", "seeds", "data", "tau", "gamma", "target_rate", "dropout", "precision"]
        if differ := differences(self.config, read_config(folder), keys):
            raise UserError(f"--reuse {folder}: that run has another {differ}")
        load_tensors(folder / f"{stage}.pt")
        write_atomically(self.folder / f"{stage}.pt", (folder / f"{stage}.pt").read_bytes())


# ---------------------------------------------------------------------------------------------- command line


def set_precision(settings, device):
    """Of matrix products."""
    fast = device == "cuda" and settings.precision != "fp32"
    torch.set_float32_matmul_precision("high" if fast else "highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    Linear.precision = torch.bfloat16 if settings.precision == "bf16" else None


def train(task, settings, given):
    """Algorithm 1 on one task: trains what is not yet trained and writes everything under OUT/TASK."""
    folder, seeds, device, board = Path(given["out"]) / task, given["seeds"], given["device"], None
    set_precision(settings, device)
    if given["tensorboard"]:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs the package: pip install tensorboard") from None
        board = SummaryWriter(str(folder))
    dataset = data.load(task, settings.any_data)
    config = {"task": task, "seeds": seeds, "settings": dataclasses.asdict(settings), "data": dataset.info,
              "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
              "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "CPU"}
    run = Run(folder, json.loads(json.dumps(config)), given["checkpoint_minutes"], board)
    with run.held(), data.Workers(given["workers"]) as evaluator:
        dataset = dataset._replace(table=torch.from_numpy(dataset.table).to(device))
        for name in ("critic", "behavior") if given["reuse"] else ():
            run.take(name, Path(given["reuse"]))
        todo = [name for name in ("critic", "behavior", "policy", *run.config["settings"]["also"])
                if not (folder / f"{name}.pt").exists()]
        todo.sort(key=lambda name: (name in METHODS, name != run.saved["stage"]))  # what is under way first
        for name in todo:
            before = () if name in ("critic", "behavior") else ("critic", "behavior")
            trained = [load_tensors(folder / f"{other}.pt", device) for other in before]
            with reading(f"{folder / 'critic.pt'} or behavior.pt") if before else contextlib.nullcontext():
                stage = STAGES[name](settings, dataset, seeds, *trained)
            run.train(stage, evaluator, given["compile"])
        rows = run.saved["scores"]
        draw_curves(folder / "curves.png", run.config, rows)
    if not todo:
        print(f"{folder} is finished: nothing to do")
    print_scores(rows, run.config)


class IDQL:
    """IDQL's policy (Hansen-Estruch et al., 2023): of actions drawn from the behavior, the best by Q."""

    def __init__(self, noise_model, q, candidates, steps):
        self.noise_model, self.q, self.candidates, self.steps = noise_model, q, candidates, steps

    def __call__(self, obs, rng):
        shape = (self.candidates, self.noise_model.output.out_features)
        noise = torch.from_numpy(rng.standard_normal(shape, np.float32))
        s = torch.as_tensor(obs, dtype=torch.float32).expand(self.candidates, -1)
        with torch.no_grad():
            a = sample(self.noise_model, s, noise, self.steps).clamp(-1, 1)
            return a[self.q(s, a).amin(-2).argmax()].numpy()


def load_policies(folder, config, method, candidates, steps):
    """A trained run's policies: their (beta, seed), and (seed, policy) as data.evaluate takes them."""
    given, size = Settings(**config["settings"]), data.SIZES[config["task"].split("-")[0]]
    betas = given.beta if method == "srpo" else [None]
    members = [(beta, seed) for beta in betas for seed in config["seeds"]]
    build = {name: layout.build for name, layout in layouts(given, *size).items()}

    def networks(stage, kind, part=None):
        """One network a member, with the weights of a file or of a part of it."""
        tensors = load_tensors(folder / f"{stage}.pt")
        with reading(folder / f"{stage}.pt"):
            tensors, found = tensors[part] if part else tensors, [build[kind]() for _ in members]
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise ValueError("NaN or infinite weights")
            for i, network in enumerate(found):
                network.load_state_dict({name: tensor[i] for name, tensor in tensors.items()})
        return found

    if method == "random":
        policies = [functools.partial(data.random_policy, size[1]) for _ in members]
    elif method == "idql":
        both = zip(networks("behavior", "noise_model"), networks("critic", "q", "q_target"))
        policies = [IDQL(*pair, candidates, steps) for pair in both]
    else:
        stage = {method: stage for stage, method in METHODS.items()}[method]
        policies = [numpy_policy(policy.state_dict()) for policy in networks(stage, "policy")]
    return members, [(seed, policy) for (_, seed), policy in zip(members, policies)]


def evaluate(folder, method, episodes, workers, candidates, steps):
    """Scores a trained run's policies anew; writes evaluation-METHOD.json."""
    config = read_config(folder)
    members, policies = load_policies(folder, config, method, candidates, steps)
    rng, obs = np.random.default_rng(0), np.zeros(data.SIZES[config["task"].split("-")[0]][0])
    milliseconds = 1000 * timeit.timeit(lambda: policies[0][1](obs, rng), number=20) / 20
    returns, _ = data.evaluate(policies, config["task"], episodes or config["settings"]["episodes"], workers)
    rows = score_rows(config["task"], method, None, members, returns)
    facts = {"milliseconds_per_action": milliseconds, "candidates": candidates, "steps": steps,
             "scores": rows, **config}
    write_atomically(folder / f"evaluation-{method}.json", json.dumps(facts, indent=1).encode())
    print_scores(rows, config)
    print(f"{method}: {milliseconds:.3f} ms per action")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text, kind=int):
    """A number above 0, for what is no setting."""
    if not 0 < kind(text) < math.inf:
        raise ValueError
    return kind(text)


def minutes(text):
    return positive(text, float)


def beta(text):
    return text if text == "sweep" else float(text)


def parse(arguments):
    """The command line; its settings are made from the dataclass, so that --help and the code are one."""
    parser = Parser(prog="srpo.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    training = commands.add_parser("train", help="train and score a task", allow_abbrev=False)
    training.add_argument("task", help=f"a task of Table 1, or {data.DEMO}")
    training.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="trials")
    training.add_argument("--out", default="runs", help="results go to OUT/TASK")
    training.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    training.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: where it pays")
    training.add_argument("--checkpoint-minutes", type=minutes, default=5, help="the most that a crash loses")
    training.add_argument("--reuse", metavar="FOLDER", help="take critic and behavior model from this run")
    training.add_argument("--tensorboard", action="store_true", help="write the logs for tensorboard too")
    for field in dataclasses.fields(Settings):
        how = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            how.update(nargs="*", type=str if how["choices"] else beta)
        default = "by task" if field.default is None else field.default
        how["help"] = f"{field.metadata['help']}; default: {default}"
        training.add_argument("--" + field.name.replace("_", "-"), default=field.default, **how)
    scoring = commands.add_parser("evaluate", help="score a trained run anew", allow_abbrev=False)
    scoring.add_argument("folder", type=Path, help="a run's folder, OUT/TASK")
    scoring.add_argument("--method", default="srpo", choices=("srpo", "idql", "iql", "bc", "random"))
    scoring.add_argument("--episodes", type=positive, help="episodes of each seed; default: the run's")
    scoring.add_argument("--candidates", type=positive, default=32, help="IDQL's actions to choose from")
    scoring.add_argument("--steps", type=positive, default=15, help="IDQL's steps of the ODE")
    for command in (training, scoring):
        command.add_argument("--workers", type=positive, help="evaluation processes; default: one per core")
    return vars(parser.parse_args(arguments))


def main(arguments=None):
    """The command line; returns 0, 2 for what its user can mend, 3 if every seed diverged."""
    try:
        given = parse(arguments)
        if given.pop("command") == "evaluate":
            evaluate(**given)
            return 0
        task = data.check_task(given["task"])
        names, seeds = [field.name for field in dataclasses.fields(Settings)], given["seeds"]
        settings = Settings(**{name: given[name] for name in names}).resolve(task)
        if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
            raise UserError("--seeds must be different whole numbers from 0 to 2147483647")
        if given["device"] == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU; take --device cpu or torch's CUDA build")
        if given["device"] == "auto":
            given["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        train(task, settings, given)
        return 0
    except BrokenProcessPool:
        status, reason = 2, "a worker process died (killed, or out of memory?); start again"
    except torch.OutOfMemoryError:
        status, reason = 2, "the GPU's memory is full; fewer --seeds at a time, each set with its own --out"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        status, reason = 2, "memory is full; smaller settings, or fewer --seeds at a time"
    except (UserError, OSError, Stopped) as error:
        status, reason = 3 if isinstance(error, Stopped) else 2, str(error)
    print(f"srpo: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    for stopping in data.SIGNALS:  # before training, too: half a download is removed
        signal.signal(stopping, lambda number, frame: sys.exit(130 if number == signal.SIGINT else 143))
    sys.exit(main())
