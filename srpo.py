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
import json
import math
import os
import platform
import signal
import sys
import time
import warnings
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # read by torch; threads that spin longer starve evaluations

import filelock
import numpy as np
import torch
from tqdm import tqdm

import data
from data import UserError
from diffusion import alpha_sigma, behavior_loss, diffuse, sample
from models import Draw, Layout, Linear, NoiseModel, Policy, TwinQ, Value, fresh

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


def setting(default, source, choices=None):
    return dataclasses.field(default=default, metadata={"help": source, "choices": choices})


@dataclasses.dataclass
class Settings:
    """Every setting that changes a result, with its default and its source. None: depends on the task."""

    # critic
    critic_steps: int = setting(1_500_000, "gradient steps (App. C)")
    critic_batch: int = setting(256, "rows a step (App. C)")
    critic_lr: float = setting(3e-4, "Adam's learning rate (App. C)")
    critic_width: int = setting(256, "hidden units (App. C)")
    tau: float = setting(None, "expectile of V's regression: 0.7, AntMaze and maze2d 0.9 (App. C)")
    gamma: float = setting(0.99, "discount (IQL)")
    target_rate: float = setting(0.005, "step of the target networks towards Q (IQL)")
    # behavior
    behavior_steps: int = setting(2_000_000, "gradient steps (App. C; 500,000 cost little)")
    behavior_batch: int = setting(2048, "rows a step (App. C)")
    behavior_lr: float = setting(3e-4, "AdamW's learning rate (App. C)")
    behavior_decay: float = setting(0.01, "AdamW's weight decay (PyTorch's default, as the released code)")
    behavior_width: int = setting(256, "units of a residual block (IDQL)")
    behavior_blocks: int = setting(3, "residual blocks of two layers (App. C)")
    dropout: float = setting(0.1, "dropout of the residual blocks (IDQL)")
    # policy extraction
    beta: tuple = setting(None, "temperature β (Table 2); several, or `sweep` (App. C), train side by side")
    policy_steps: int = setting(1_000_000, "gradient steps, on a cosine to 0 (App. C; cosine: released code)")
    policy_batch: int = setting(256, "rows a step (App. C)")
    policy_lr: float = setting(3e-4, "Adam's learning rate (App. C)")
    policy_width: int = setting(256, "hidden units (App. C)")
    policy_layers: int = setting(None, "hidden layers: 2, AntMaze 4 (App. C)")
    weighting: str = setting("sigma2", "ω(t) (Sec. 6.3)", ("sigma2", "one", "alpha_over_sigma"))
    baseline: bool = setting(True, "subtract the noise from the regularizer (Sec. 4.2)")
    grad_norm: str = setting(None, "paper: β_norm (App. C); released: ∇Q of unit RMS (mazes); or none",
                             ("none", "paper", "released"))
    also: tuple = setting((), "policies by weighted regression to train beside SRPO's", ("iql", "bc"))
    temperature: float = setting(None, "of IQL's weights exp(temperature (Q − V)): 3, mazes 10 (IQL)")
    # evaluation
    episodes: int = setting(20, "episodes of each evaluation and seed (App. C)")
    evaluations: int = setting(20, "evaluations of a policy, beside the one at its start (Fig. 16)")
    any_data: bool = setting(False, "accept a data file whose hash is not D4RL's")
    precision: str = setting("fp32", "of the matrix products", ("fp32", "tf32", "bf16"))

    def resolve(self, task):
        """Fills in what depends on the task; raises UserError for values out of range."""
        maze = task.startswith(("antmaze", "maze2d"))
        by_task = dict(tau=0.9 if maze else 0.7, temperature=10.0 if maze else 3.0,
                       policy_layers=4 if task.startswith("antmaze") else 2,
                       beta=(TABLE_2.get(task, 0.4),), grad_norm="released" if maze else "none")
        for name, value in by_task.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if tuple(self.beta) == ("sweep",):
            self.beta = SWEEPS["umaze" if "umaze" in task else "antmaze" if maze else "locomotion"]
        try:
            self.beta = tuple(positive(beta) for beta in map(str, self.beta))
        except ValueError:
            raise UserError("--beta must be numbers above 0, or sweep") from None
        if not self.beta or len(set(self.beta)) < len(self.beta):
            raise UserError("--beta must be different numbers")
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            kinds = {float: (int, float), tuple: (tuple, list)}.get(field.type, field.type)
            if not isinstance(value, kinds) or (isinstance(value, bool) and field.type is not bool):
                raise UserError(f"--{name.replace('_', '-')} {value!r} is of the wrong type")
            if field.type in (int, float):
                least = 0 if name in ("behavior_decay", "dropout", "temperature") else 1e-12
                most = {"tau": 1, "target_rate": 1, "gamma": 1 - 1e-9, "dropout": 1 - 1e-9}.get(name, 1e12)
                if not least <= value <= most:
                    raise UserError(f"--{name.replace('_', '-')} {value} is out of range")
        return self


# ----------------------------------------------------------------------------- Algorithm 1, in three stages

ROWS, TIME, NOISE, DROPOUT = 1, 2, 3, 4  # purposes of random numbers, counted from 8 times the stage's number
GRAPH_STEPS = 25  # steps of one CUDA graph launch
COMPILE_FROM = 60  # a seed's eager seconds from which on compiling pays; of one seed, since it changes bits
THREADS, THREADS_FROM = torch.get_num_threads(), 6e7  # Stage.work() below which one CPU thread is as fast


def adam(theta, gradient, m, v, count, lr, decay):
    """A step of AdamW (without decay, of Adam) with PyTorch's defaults, in place, on tensors [*seeds, P]."""
    m.lerp_(gradient, 1 - 0.9)
    v.lerp_(gradient**2, 1 - 0.999)
    m_hat = m / -torch.expm1(count * math.log(0.9))  # 1 − 0.9^count
    v_hat = v / -torch.expm1(count * math.log(0.999))
    theta.mul_(1 - lr * decay).sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))


class Stage:
    """A gradient loop of Algorithm 1 for all seeds: what the three stages share.

    `state` holds every tensor that belongs to a seed, the seed axis first, at an address that never changes;
    `theta` [seeds, P] are the trained weights. A step is closed: it reads and writes `state`, `count` and the
    data, and takes and returns nothing, so that it can be compiled, captured as a CUDA graph and resumed.
    """

    name, number, losses, decay, cosine, q_bound = "", 0, (), 0.0, False, math.inf
    kept = ("theta", "m", "v", "alive", "losses")  # what training changes

    def __init__(self, settings, dataset, members, theta, **state):
        """members: (beta, seed) of each place on the seed axis, which theta and all of `state` have."""
        self.members, seeds = members, [seed for _, seed in members]
        self.settings, self.table = settings, dataset.table
        self.s_dim, self.a_dim = dataset.s_dim, dataset.a_dim
        kind = self.name if self.name in ("critic", "behavior") else "policy"
        self.steps, self.batch = getattr(settings, kind + "_steps"), getattr(settings, kind + "_batch")
        self.lr, device = getattr(settings, kind + "_lr"), self.table.device
        self.count = torch.zeros((), dtype=torch.int32, device=device)
        state.update(theta=theta, m=torch.zeros_like(theta), v=torch.zeros_like(theta),
                     seed=torch.tensor(seeds, dtype=torch.int32), alive=torch.ones(len(seeds)),
                     losses=torch.zeros(len(seeds), len(self.losses)))
        self.state = {name: tensor.to(device) for name, tensor in state.items()}
        # On a CPU the cache decides: one seed after the other. On a GPU launches do: all side by side.
        self.groups = [self.state] if device.type == "cuda" else self.each_seed()
        self.fast, self.graph = (self.draw, self.update), None  # what a step calls: these, or compiled

    def each_seed(self):
        """The state of each seed alone, without the seed axis: views."""
        return [{name: tensor[i] for name, tensor in self.state.items()} for i in range(len(self.members))]

    def kept_state(self):
        """The tensors that training changes."""
        return {name: self.state[name] for name in self.kept}

    def restore(self, saved):
        """Continues from a checkpoint's tensors; returns its step. Fails if they are of another run."""
        for name, tensor in self.kept_state().items():
            tensor.copy_(saved["state"][name].reshape(tensor.shape))
        self.count.copy_(saved["count"])
        return int(saved["count"])

    def work(self):
        """Weights times rows of one seed's step."""
        weights = [self.state[name] for name in ("theta", "target", "q", "behavior") if name in self.state]
        return self.batch * sum(tensor.shape[-1] for tensor in weights)

    def eager_seconds(self):
        """About how long a seed takes on a CPU without compiling: 2 ms a step, and arithmetic."""
        return self.steps * (0.002 + 5e-11 * self.work())

    def noise(self, draw):
        """The step's random numbers beside its rows."""
        return ()

    def loss(self, theta, state, rows, *noise):
        """The stage's losses at the weights theta: [*seeds, len(self.losses)]."""
        raise NotImplementedError

    def target(self, state, rate):
        """What follows the weights' update."""

    def split(self, rows):
        """Table rows [*seeds, B, 2 S + A + 2] as s, a, r, s_next, terminal."""
        s, a, s_next, r, terminal = rows.split([self.s_dim, self.a_dim, self.s_dim, 1, 1], -1)
        return s, a, r.squeeze(-1), s_next, terminal.squeeze(-1)

    def draw(self, state):
        """The rows and random numbers of this step: a function of (seed, step)."""
        draw = Draw(state["seed"], self.count, 8 * self.number)
        return self.table[draw.index(ROWS, (self.batch,), len(self.table))], *self.noise(draw)

    def update(self, state, rows, *noise):
        """One gradient step of the seeds in `state`. A seed whose loss is not finite stops where it is."""
        theta = state["theta"].detach().requires_grad_()
        losses = self.loss(theta, state, rows, *noise)
        (gradient,) = torch.autograd.grad(losses.sum(), theta)
        with torch.no_grad():
            state["losses"].add_(losses.detach())
            finite = losses.isfinite().all(-1) & gradient.sum(-1).isfinite()
            alive = state["alive"].mul_(finite).unsqueeze(-1)
            lr = self.lr * alive
            if self.cosine:
                lr = lr * (1 + torch.cos(math.pi * (self.count - 1) / self.steps)) / 2
            gradient = torch.where(alive > 0, gradient, 0.0)  # lr 0 holds weights; this, Adam's state finite
            adam(state["theta"], gradient, state["m"], state["v"], self.count, lr, self.decay)
            self.target(state, alive)

    def step(self):
        draw, update = self.fast
        self.count.add_(1)
        for group in self.groups:
            update(group, *draw(group))

    def advance(self, steps):
        """Takes at most `steps` steps without waiting for the device; returns how many."""
        if self.table.device.type != "cuda" or steps < GRAPH_STEPS:
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
        # Apart, since in one function every use of a random number would compute it anew.
        self.fast = [torch.compile(f, fullgraph=True, dynamic=False) for f in (self.draw, self.update)]
        try:
            self.step()
        except torch._dynamo.exc.TorchDynamoException as error:  # raised before anything is written
            reason = str(error).strip().splitlines()[0][:160]
            cure = "install a C++ compiler (g++), on a GPU also a C compiler and Triton"
            if required:
                raise UserError(f"--compile cannot work here ({reason}); {cure}, or drop --compile") from None
            tqdm.write(f"{self.name}: not compiled, which costs speed only ({reason}); to compile: {cure}")
            self.fast = self.draw, self.update
            self.count.sub_(1)
            self.step()
        return 1

    def watch(self, state):
        """What is worth watching on a batch of this step, {name: [*seeds]}."""
        return {}


class Critic(Stage):
    """// Critic training (IQL): ζ ← ζ − λ_V ∇L_V (value_loss); φ ← φ − λ_Q ∇L_Q (q_loss)."""

    name, number, losses = "critic", 1, ("value_loss", "q_loss")
    kept = (*Stage.kept, "target")

    def __init__(self, settings, dataset, seeds):
        size, width = (dataset.s_dim, dataset.a_dim), settings.critic_width
        self.value, self.q = Layout(Value(size[0], width)), Layout(TwinQ(*size, width))
        value = self.value.flatten(fresh(seeds, 1, lambda: Value(size[0], width)).state_dict())
        q = self.q.flatten(fresh(seeds, 2, lambda: TwinQ(*size, width)).state_dict())
        members = [(None, seed) for seed in seeds]
        super().__init__(settings, dataset, members, torch.cat([value, q], -1), target=q.clone())
        self.q_bound = float(self.table[:, -2].abs().max()) / (1 - settings.gamma)  # no return is larger

    def networks(self, theta):
        value, q = theta.split([sum(self.value.sizes), sum(self.q.sizes)], -1)
        return self.value.bind(value), self.q.bind(q)

    def loss(self, theta, state, rows):
        s, a, r, s_next, terminal = self.split(rows)
        (value, q), q_target = self.networks(theta), self.q.bind(state["target"])
        return torch.stack([value_loss(value, q_target, s, a, self.settings.tau),
                            q_loss(q, value, s, a, r, s_next, terminal, self.settings.gamma)], -1)

    def target(self, state, rate):
        q = state["theta"][..., sum(self.value.sizes):]
        state["target"].add_(self.settings.target_rate * rate * (q - state["target"]))

    def watch(self, state):
        s, a, *_ = self.split(self.draw(state)[0])
        value, q = self.networks(state["theta"])
        return {"q": q(s, a).mean((-2, -1)), "v": value(s).mean(-1)}

    def weights(self):
        value, q = self.state["theta"].split([sum(self.value.sizes), sum(self.q.sizes)], -1)
        return {"value": self.value.copies(value), "q": self.q.copies(q),
                "q_target": self.q.copies(self.state["target"])}


class Behavior(Stage):
    """// Behavior training: ψ ← ψ − λ_μ ∇L_μ (behavior_loss)."""

    name, number, losses = "behavior", 2, ("behavior_loss",)

    def __init__(self, settings, dataset, seeds):
        shape = (dataset.s_dim, dataset.a_dim, settings.behavior_width, settings.behavior_blocks)
        self.noise_model = Layout(NoiseModel(*shape))
        self.decay = settings.behavior_decay * self.noise_model.trainable().to(dataset.table.device)
        theta = self.noise_model.flatten(fresh(seeds, 3, lambda: NoiseModel(*shape)).state_dict())
        super().__init__(settings, dataset, [(None, seed) for seed in seeds], theta)

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

    name, number, losses, cosine = "policy", 3, ("policy_loss",), True

    def __init__(self, settings, dataset, seeds, critic, behavior):
        size = (dataset.s_dim, dataset.a_dim)
        self.q = Layout(TwinQ(*size, settings.critic_width))
        self.value = Layout(Value(size[0], settings.critic_width))
        self.noise_model = Layout(NoiseModel(*size, settings.behavior_width, settings.behavior_blocks))
        shape = (*size, settings.policy_width, settings.policy_layers)
        self.policy = Layout(Policy(*shape))
        theta = self.policy.flatten(fresh(seeds, 4, lambda: Policy(*shape)).state_dict())
        frozen = dict(q=self.q.flatten(critic["q_target"]), value=self.value.flatten(critic["value"]),
                      behavior=self.noise_model.flatten(behavior))
        betas = settings.beta if self.name == "policy" else (None,)
        members = [(beta, seed) for beta in betas for seed in seeds]
        beta = torch.tensor([beta or math.nan for beta, _ in members])
        super().__init__(settings, dataset, members, theta.repeat(len(betas), 1), beta=beta,
                         **{name: flat.repeat(len(betas), 1) for name, flat in frozen.items()})

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
        rows, t, noise = self.draw(state)
        s, *_ = self.split(rows)
        a = self.policy.bind(state["theta"])(s)
        plain = functools.partial(self.gradient, state, s, a, t, noise, weighting="one", grad_norm="none")
        grad_q = plain(beta=math.inf)  # 1/β = 0 leaves ∇Q
        gap = grad_q - plain(beta=1, baseline=True)  # ε̂ − ε
        return {**self.q_and_v(state, s, a), "grad_q": grad_q.norm(dim=-1).mean(-1),
                "noise_gap": gap.norm(dim=-1).mean(-1)}

    def q_and_v(self, state, s, a):
        q, value = self.q.bind(state["q"]), self.value.bind(state["value"])
        return {"q": q(s, a).mean((-2, -1)), "v": value(s).mean(-1)}

    def weights(self):
        return self.policy.copies(self.state["theta"])


class Regression(Extraction):
    """IQL's policy on the same critic, or behavior cloning; not part of SRPO."""

    losses = ("regression_loss",)

    def __init__(self, name, *args):
        self.name, self.number = name, {"iql": 4, "bc": 5}[name]
        super().__init__(*args)

    def noise(self, draw):
        return ()

    def loss(self, theta, state, rows):
        s, a, *_ = self.split(rows)
        advantage = self.q.bind(state["q"])(s, a).amin(-2) - self.value.bind(state["value"])(s)
        temperature = self.settings.temperature if self.name == "iql" else 0.0
        return regression_loss(self.policy.bind(theta), s, a, advantage, temperature).unsqueeze(-1)

    def watch(self, state):
        s, *_ = self.split(*self.draw(state))
        return self.q_and_v(state, s, self.policy.bind(state["theta"])(s))


# -------------------------------------------------------------------------------------------- a run's folder

LOG = ("stage", "step", "seed", "beta", "alive", "value_loss", "q_loss", "behavior_loss", "policy_loss",
       "regression_loss", "q", "v", "grad_q", "noise_gap")
SCORES = ("method", "step", "seed", "beta", "episode", "return", "score")
METHODS = {"policy": "srpo", "iql": "iql", "bc": "bc"}  # a stage's name: its policy's


class Stopped(Exception):
    """Training cannot go on: exit status 3."""


def write_atomically(path, write):
    """write(file) to a temporary file, flush it, rename it: `path` is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save tells of a full disk by a RuntimeError
        temporary.unlink(missing_ok=True)
        if isinstance(error, torch.AcceleratorError):
            raise
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise UserError(f"cannot write {path} ({reason}); what was saved before is intact") from None


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
    with reading(path):
        return torch.load(path, map_location=device, weights_only=True)


def read_config(folder):
    """A run folder's config.json; UserError where it is missing, damaged or not ours."""
    path = Path(folder) / "config.json"
    with reading(path, remove="the folder"):  # what else is there belongs to its settings
        config = json.loads(path.read_text())
        data.check_task(config["task"])
        Settings(**config["settings"]).resolve(config["task"])
        if not all(type(seed) is int for seed in config["seeds"]) or not config["seeds"]:
            raise ValueError("seeds must be whole numbers")
        float(config["data"]["data_score"]), [config["data"][key] for key in ("kind", "sha256")]
        return config


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
    """{(method, β): {step: scores [seeds, episodes]}} of a run's rows of scores."""
    cells = {}
    for row in rows:
        steps = cells.setdefault((row["method"], row["beta"]), {})
        steps.setdefault(row["step"], {}).setdefault(row["seed"], []).append(row["score"])
    return {policy: {step: np.array([*seeds.values()]) for step, seeds in steps.items()}
            for policy, steps in cells.items()}


def print_scores(rows, config):
    """One line a method and β: mean and standard deviation over the seeds' mean scores at the last step."""
    words = "" if config["data"]["kind"] == "D4RL" else f" ({config['data']['kind']} data)"
    for (method, beta), steps in by_policy(rows).items():
        scores = [*steps.values()][-1]
        means, name = scores.mean(1), f"{method}, β = {beta}" if beta else method
        print(f"{config['task']}{words} {name}: {means.mean():.1f} ± {means.std():.1f} over {len(means)} "
              f"seeds of {scores.shape[1]} episodes ({' '.join(f'{mean:.1f}' for mean in means)})")


def draw_curves(folder, config, rows):
    """curves.png: score against step, mean and range over seeds, with the data's own mean as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for (method, beta), steps in by_policy(rows).items():
        means = np.array([scores.mean(1) for scores in steps.values()])
        axes.plot([*steps], means.mean(1), label=f"{method}, β = {beta}" if beta else method)
        axes.fill_between([*steps], means.min(1), means.max(1), alpha=0.2)
    kind = config["data"]["kind"]
    axes.axhline(config["data"]["data_score"], color="gray", ls="--", label=f"the data's mean ({kind})")
    axes.set(xlabel="gradient steps", ylabel="score (mean and range over seeds)", title=config["task"])
    axes.legend(fontsize="small")
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)


class Run:
    """A task's folder: config.json, log.csv, scores.csv, curves.png, a .pt file a stage, checkpoint.pt."""

    def __init__(self, folder, config, minutes, board=None):
        self.folder, self.config, self.minutes, self.board = folder, config, minutes, board
        self.stopped, self.told = None, set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(folder / ".lock", timeout=0)
            self.lock.acquire()
            (folder / ".holder").write_text(f"process {os.getpid()} on {platform.node()}")
        except filelock.Timeout:
            raise UserError(f"{folder} is in use by {(folder / '.holder').read_text()}") from None
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}); choose another --out") from None
        if (folder / "config.json").exists():
            old, new = read_config(folder), config["settings"]
            also = sorted({*new["also"], *old["settings"]["also"]})  # a policy more changes no other
            new["also"] = old["settings"]["also"] = also
            differ = [key for part in ("settings", "data") for key in {**config[part], **old[part]}
                      if config[part].get(key) != old[part].get(key)]
            differ += [key for key in ("task", "seeds", "torch") if config[key] != old.get(key)]
            if differ:
                what = ", ".join(differ[:4])
                raise UserError(f"{folder} holds a run of another {what}; choose another --out")
            self.config = config = old
        text = json.dumps(config, indent=1).encode()
        write_atomically(folder / "config.json", lambda file: file.write(text))
        self.checkpoint, self.saved = folder / "checkpoint.pt", {"stage": "", "log": 0, "scores": 0}
        if self.checkpoint.exists():
            self.saved = load_tensors(self.checkpoint)
        with reading(self.checkpoint):
            self.log, self.scores = self.open("log", LOG), self.open("scores", SCORES)

    def open(self, name, columns):
        """A CSV file, cut to what the checkpoint knows of it: later rows are made again."""
        file = open(self.folder / f"{name}.csv", "a+", newline="")
        if file.seek(0, os.SEEK_END) < self.saved[name]:
            raise ValueError(f"{file.name} is shorter than it was")
        file.seek(self.saved[name])
        file.truncate()
        if self.saved[name] == 0:
            csv.writer(file).writerow(columns)
        return file

    @contextlib.contextmanager
    def held(self):
        """Within it SIGINT, SIGTERM and SIGUSR1 make the loop save and stop, a second Ctrl-C at once."""

        def ask(number, frame):
            if self.stopped == number == signal.SIGINT:
                os._exit(128 + number)
            self.stopped = self.stopped or (signal.SIGTERM if number == signal.SIGUSR1 else number)

        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = [signal.signal(number, ask) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)
            for file in (self.log, self.scores):
                file.close()
            self.lock.release()

    def save(self, stage, pending):
        """The checkpoint: the stage's tensors and step, evaluations under way, the lengths of the logs."""
        for file in (self.log, self.scores):
            file.flush()
            os.fsync(file.fileno())
        self.saved = {"stage": stage.name, "count": stage.count, "state": stage.kept_state(),
                      "pending": [(step, theta) for step, theta, _ in pending],
                      "log": self.log.tell(), "scores": self.scores.tell()}
        write_atomically(self.checkpoint, lambda file: torch.save(self.saved, file))

    def train(self, stage, evaluator, compiled):
        """Takes a stage from where it stands to its end, with logs, evaluations and checkpoints."""
        torch.set_num_threads(THREADS if stage.work() > THREADS_FROM else 1)
        done, pending, members = 0, [], len(stage.members)
        evaluations = self.config["settings"]["evaluations"] if stage.name in METHODS else 0
        if self.saved["stage"] == stage.name:
            with reading(self.checkpoint):
                done = stage.restore(self.saved)
                pending = [self.submit(stage, *place, evaluator) for place in self.saved["pending"]]
        elif evaluations:
            pending = [self.submit(stage, 0, stage.state["theta"], evaluator)]
        fast = compiled if compiled is not None else stage.eager_seconds() > COMPILE_FROM
        marks = {round(i * stage.steps / evaluations) for i in range(1, evaluations + 1)}
        every, saved_at = max(1, min(1000, stage.steps // 20)), time.monotonic()
        with tqdm(desc=stage.name, total=members * stage.steps, initial=members * done, unit=" seed-steps",
                  unit_scale=True, mininterval=1, smoothing=0.05) as bar:
            while done < stage.steps:
                stop = min(mark for mark in {*marks, stage.steps, (done // every + 1) * every} if mark > done)
                steps = stage.compile(required=compiled) if fast else stage.advance(stop - done)
                done, fast = done + steps, False
                bar.update(members * steps)
                if done in marks:
                    pending.append(self.submit(stage, done, stage.state["theta"], evaluator))
                if done % every == 0 or done == stage.steps:
                    self.write_log(stage, done, done % every or every, bar)
                self.collect(stage, pending)
                if self.stopped or time.monotonic() - saved_at > 60 * self.minutes:
                    self.save(stage, pending)
                    saved_at = time.monotonic()
                if self.stopped:
                    tqdm.write(f"saved at step {done} of {stage.name}; the same command goes on from there")
                    raise SystemExit(128 + self.stopped)
        self.collect(stage, pending, wait=True)
        self.save(stage, [])
        weights = stage.weights()
        write_atomically(self.folder / f"{stage.name}.pt", lambda file: torch.save(weights, file))

    def write_log(self, stage, step, since, bar):
        """A row a seed: mean losses over the steps since the last row, and what is worth watching now."""
        losses, alive = (stage.state["losses"] / since).tolist(), stage.state["alive"].tolist()
        stage.state["losses"].zero_()
        watched = [stage.watch(group) for group in stage.groups]
        columns = {name: torch.stack([group[name] for group in watched]).flatten().tolist()
                   for name in watched[0]}
        rows = [{**dict(zip(stage.losses, values)), **{name: column[i] for name, column in columns.items()}}
                for i, values in enumerate(losses)]
        for (beta, seed), lives, row in zip(stage.members, alive, rows):
            where = {"stage": stage.name, "step": step, "seed": seed, "beta": beta, "alive": int(lives)}
            csv.DictWriter(self.log, LOG).writerow({**where, **row})
            name = f"seed {seed}{f', β = {beta}' if beta else ''}"
            if not lives:
                self.tell(f"{name}: a {stage.name} loss is not finite; stopped at its last finite weights")
            if abs(row.get("q", 0)) > stage.q_bound:
                self.tell(f"{name}: the critic diverges: Q is beyond {stage.q_bound:.3g}, the largest return")
            for key, value in row.items() if self.board else ():
                self.board.add_scalar(f"{stage.name}/{key}/{name}", value, step)
        self.log.flush()
        bar.set_postfix({key: f"{np.mean([row[key] for row in rows]):.3g}" for key in rows[0]}, refresh=False)
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
        return step, theta, evaluator.submit(policies, self.config["settings"]["episodes"])

    def collect(self, stage, pending, wait=False):
        """Writes the scores of finished evaluations, in the order of their steps."""
        while pending and (wait or pending[0][2].done()):
            step, _, evaluation = pending.pop(0)
            method = METHODS[stage.name]
            rows = score_rows(self.config["task"], method, step, stage.members, evaluation.result())
            csv.DictWriter(self.scores, SCORES).writerows(rows)
            self.scores.flush()
            mean = np.mean([row["score"] for row in rows])
            tqdm.write(f"{method}: mean score {mean:.1f} at step {step}")
            if self.board:
                self.board.add_scalar(f"score/{method}", mean, step)

    def take(self, stage, folder):
        """Copies the trained critic or behavior model of a run of the same task, data, seeds and settings."""
        other, shared = read_config(folder), ("tau", "gamma", "target_rate", "dropout", "precision")
        differ = [key for key in ("task", "seeds", "data") if other[key] != self.config[key]]
        differ += [key for key, value in self.config["settings"].items() if other["settings"][key] != value
                   and (key.startswith(("critic", "behavior")) or key in shared)]
        if differ:
            raise UserError(f"--reuse {folder}: that run has another {', '.join(differ[:4])}")
        load_tensors(folder / f"{stage}.pt")
        content = (folder / f"{stage}.pt").read_bytes()
        write_atomically(self.folder / f"{stage}.pt", lambda file: file.write(content))

    def read_scores(self):
        """The rows of scores.csv."""
        self.scores.seek(0)
        return [{**row, "step": int(row["step"]), "seed": int(row["seed"]), "score": float(row["score"])}
                for row in csv.DictReader(self.scores)]


# ---------------------------------------------------------------------------------------------- command line


def train(task, settings, given):
    """Algorithm 1 on one task: trains what is not yet trained and writes everything under OUT/TASK."""
    folder, seeds, device = Path(given["out"]) / task, given["seeds"], given["device"]
    torch.set_float32_matmul_precision("highest" if settings.precision == "fp32" else "high")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    Linear.precision = torch.bfloat16 if settings.precision == "bf16" else None
    board = None
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
    dataset = dataset._replace(table=torch.from_numpy(dataset.table).to(device))
    with run.held(), data.Evaluator(task, given["workers"]) as evaluator:
        for name in ("critic", "behavior") if given["reuse"] else ():
            run.take(name, Path(given["reuse"]))
        stages = ("critic", "behavior", "policy", *settings.also)
        todo = [name for name in stages if not (folder / f"{name}.pt").exists()]
        for name in todo:
            if name in ("critic", "behavior"):
                stage = {"critic": Critic, "behavior": Behavior}[name](settings, dataset, seeds)
            else:
                frozen = [load_tensors(folder / f"{x}.pt", device) for x in ("critic", "behavior")]
                with reading(f"{folder / 'critic.pt'} or behavior.pt"):
                    stage = (Extraction(settings, dataset, seeds, *frozen) if name == "policy" else
                             Regression(name, settings, dataset, seeds, *frozen))
            run.train(stage, evaluator, given["compile"])
        rows = run.read_scores()
        draw_curves(folder, run.config, rows)
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

    def networks(stage, build, part=None):
        """One network a member, with the weights of a file or of a part of it."""
        tensors = load_tensors(folder / f"{stage}.pt")
        with reading(folder / f"{stage}.pt"):
            tensors, found = tensors[part] if part else tensors, [build() for _ in members]
            for i, network in enumerate(found):
                network.load_state_dict({name: tensor[i] for name, tensor in tensors.items()})
        return found

    if method == "random":
        policies = [data.RandomPolicy(size[1]) for _ in members]
    elif method == "idql":
        shape = (*size, given.behavior_width, given.behavior_blocks)
        both = zip(networks("behavior", lambda: NoiseModel(*shape)),
                   networks("critic", lambda: TwinQ(*size, given.critic_width), "q_target"))
        policies = [IDQL(*pair, candidates, steps) for pair in both]
    else:
        stage = {method: stage for stage, method in METHODS.items()}[method]
        policies = networks(stage, lambda: Policy(*size, given.policy_width, given.policy_layers))
        policies = [numpy_policy(policy.state_dict()) for policy in policies]
    return members, [(seed, policy) for (_, seed), policy in zip(members, policies)]


def evaluate(folder, method, episodes, workers, candidates, steps):
    """Scores a trained run's policies anew; writes evaluation-METHOD.json."""
    config = read_config(folder)
    members, policies = load_policies(folder, config, method, candidates, steps)
    rng, obs = np.random.default_rng(0), np.zeros(data.SIZES[config["task"].split("-")[0]][0])
    begin = time.perf_counter()
    for _ in range(20):
        policies[0][1](obs, rng)
    milliseconds = 1000 * (time.perf_counter() - begin) / 20
    returns, _ = data.evaluate(policies, config["task"], episodes or config["settings"]["episodes"], workers)
    rows = score_rows(config["task"], method, None, members, returns)
    facts = {"milliseconds_per_action": milliseconds, "candidates": candidates, "steps": steps,
             "scores": rows, **config}
    text = json.dumps(facts, indent=1).encode()
    write_atomically(folder / f"evaluation-{method}.json", lambda file: file.write(text))
    print_scores(rows, config)
    print(f"{method}: {milliseconds:.3f} ms per action")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return int(text) if text.isdigit() else number


def parse(arguments):
    """The command line; its settings are made from the dataclass, so that --help and the code are one."""
    parser = Parser(prog="srpo.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    one = commands.add_parser("train", help="train and score a task", allow_abbrev=False)
    one.add_argument("task", help=f"a task of Table 1, or {data.DEMO}")
    one.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5], help="trials, side by side")
    one.add_argument("--out", default="runs", help="results go to OUT/TASK")
    one.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    one.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: where it saves time")
    one.add_argument("--checkpoint-minutes", type=positive, default=5, help="the most that a crash loses")
    one.add_argument("--reuse", metavar="FOLDER", help="take critic and behavior model from this run")
    one.add_argument("--tensorboard", action="store_true", help="write the logs for tensorboard too")
    for field in dataclasses.fields(Settings):
        how = {"type": field.type, "choices": field.metadata["choices"]}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            how = {"nargs": "*", "type": str, "choices": field.metadata["choices"]}
        default = "by task" if field.default is None else field.default
        how["help"] = f"{field.metadata['help']}; default: {default}"
        one.add_argument("--" + field.name.replace("_", "-"), default=field.default, **how)
    two = commands.add_parser("evaluate", help="score a trained run anew", allow_abbrev=False)
    two.add_argument("folder", type=Path, help="a run's folder, OUT/TASK")
    two.add_argument("--method", default="srpo", choices=("srpo", "idql", "iql", "bc", "random"))
    two.add_argument("--episodes", type=positive, help="episodes of each seed; default: the run's")
    two.add_argument("--candidates", type=positive, default=32, help="IDQL's actions to choose from")
    two.add_argument("--steps", type=positive, default=15, help="IDQL's steps of the ODE")
    for command in (one, two):
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
    except torch.OutOfMemoryError:
        print("srpo: the GPU's memory is full; train fewer --seeds at a time, each set with its own --out",
              file=sys.stderr)
        return 2
    except (UserError, Stopped) as error:
        print(f"srpo: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 3


if __name__ == "__main__":
    sys.exit(main())
