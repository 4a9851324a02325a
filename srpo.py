"""SRPO: Score Regularized Policy Optimization through Diffusion Behavior (Chen et al., ICLR 2024).

Algorithm 1 reads from top to bottom: the losses of Eq. 11 and 12, the gradient of Eq. 15, the settings of App. C and
Table 2, then the three training stages and the command line. Every seed of a task trains side by side: tensors are
[*seeds, B, ...], a loss is one number per seed, and their sum is differentiated.

    python srpo.py train TASK [--seeds 0 1 2 3 4 5] [--out runs] [--beta X] ...
    python srpo.py evaluate runs/TASK [--episodes N]
"""
import argparse
import contextlib
import csv
import dataclasses
import io
import json
import math
import os
import platform
import signal
import sys
import time
from pathlib import Path

import filelock
import numpy as np
import torch
from tqdm import tqdm

import data
from data import UserError
from diffusion import alpha_sigma, behavior_loss, diffuse
from models import Draw, Layout, Linear, NoiseModel, Policy, TwinQ, Value, fresh

# ------------------------------------------------------------------------------------------------ the equations


def expectile_loss(u, tau):
    """Eq. 11: L₂^τ(u) = |τ − 1(u < 0)| u², shaped like u."""
    return (tau - (u < 0).to(u.dtype)).abs() * u**2


def value_loss(value, q_target, s, a, tau):
    """Eq. 11: expectile regression of V on the smaller of the target twins `q_target(s, a)` [*seeds, 2, B]; [*seeds]."""
    with torch.no_grad():
        target = q_target(s, a).amin(-2)
    return expectile_loss(target - value(s), tau).mean(-1)


def q_loss(q, value, s, a, r, s_next, terminal, gamma):
    """Eq. 12: squared error to r + γ V(s′), which ends at a terminal; mean of the twins, [*seeds]."""
    with torch.no_grad():
        target = r + gamma * (1 - terminal) * value(s_next)
    return ((q(s, a) - target.unsqueeze(-2)) ** 2).mean((-2, -1))


def surrogate_gradient(q, noise_model, s, a, t, noise, beta, weighting="sigma2", baseline=True, grad_norm=None):
    """Eq. 15: ∂L_sur/∂a of each row, [*seeds, B, A]: ∇_a Q − (1/β) ω(t) (ε̂ − ε).

    q(s, a): [*seeds, B]; beta: a number, or a tensor that broadcasts against a. weighting ω: "sigma2", "one" or
    "alpha_over_sigma". grad_norm: "paper" multiplies the regularizer by ‖∇Q‖₂ (β_norm, App. C), "released" divides
    ∇Q by its root mean square over the action (released code).
    """
    with torch.enable_grad():
        a = a.detach().requires_grad_()
        (grad_q,) = torch.autograd.grad(q(s, a).sum(), a)  # ∇_a Q
    with torch.no_grad():
        alpha, sigma = alpha_sigma(t.unsqueeze(-1))
        omega = {"sigma2": sigma**2, "one": torch.ones_like(sigma), "alpha_over_sigma": alpha / sigma}[weighting]
        noise_hat = noise_model(diffuse(a, t, noise), s, t)  # ε̂
        regularizer = omega * (noise_hat - noise if baseline else noise_hat)  # ω(t) (ε̂ − ε)
        if grad_norm == "paper":
            regularizer = regularizer * grad_q.norm(dim=-1, keepdim=True)
        elif grad_norm == "released":
            grad_q = grad_q / grad_q.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)  # 0 stays 0, not NaN
        return grad_q - regularizer / beta


def policy_loss(a, gradient):
    """−(∂L_sur/∂a, held fixed) · a for a = π(s), [*seeds]: descending it ascends L_sur; its value means nothing."""
    return -(gradient.detach() * a).sum(-1).mean(-1)


def regression_loss(policy, s, a, advantage, temperature):
    """Eq. 2 for a policy of fixed variance: exp(temperature · (Q − V)) ‖π(s) − a‖², the weight at most 100; [*seeds].

    IQL's way to extract a policy; temperature 0 is behavior cloning. Not part of SRPO: its yardstick.
    """
    weight = (temperature * advantage).exp().clamp(max=100)
    return (weight * ((policy(s) - a) ** 2).sum(-1)).mean(-1)


# ------------------------------------------------------------------------------------------------------ settings

TABLE_2 = {  # β of every task
    "halfcheetah-medium-expert-v2": 0.01, "hopper-medium-expert-v2": 0.01, "walker2d-medium-expert-v2": 0.1,
    "halfcheetah-medium-v2": 0.2, "hopper-medium-v2": 0.05, "walker2d-medium-v2": 0.05,
    "halfcheetah-medium-replay-v2": 0.2, "hopper-medium-replay-v2": 0.2, "walker2d-medium-replay-v2": 0.5,
    "antmaze-umaze-v2": 0.02, "antmaze-umaze-diverse-v2": 0.04, "antmaze-medium-play-v2": 0.08,
    "antmaze-medium-diverse-v2": 0.05, "antmaze-large-play-v2": 0.06, "antmaze-large-diverse-v2": 0.05,
}


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
    tau: float = setting(None, "expectile of Eq. 11: 0.7, AntMaze and maze2d 0.9 (App. C)")
    gamma: float = setting(0.99, "discount of Eq. 12 (IQL)")
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
    beta: tuple = setting(None, "β of Eq. 15 (Table 2); several share one critic and one behavior model", float)
    policy_steps: int = setting(1_000_000, "gradient steps, with a cosine to 0 (App. C; cosine: released code)")
    policy_batch: int = setting(256, "rows a step (App. C)")
    policy_lr: float = setting(3e-4, "Adam's learning rate (App. C)")
    policy_width: int = setting(256, "hidden units (App. C)")
    policy_layers: int = setting(None, "hidden layers: 2, AntMaze 4 (App. C)")
    weighting: str = setting("sigma2", "ω(t) of Eq. 15 (Sec. 6.3)", ("sigma2", "one", "alpha_over_sigma"))
    baseline: bool = setting(True, "subtract the noise in Eq. 15 (Sec. 4.2)")
    grad_norm: str = setting(None, "∇Q: none; paper: β_norm of App. C; released: unit root mean square, for mazes",
                             ("none", "paper", "released"))
    also: tuple = setting((), "policies by weighted regression to train beside SRPO's", ("iql", "bc"))
    temperature: float = setting(None, "of IQL's weights exp(temperature (Q − V)): 3, AntMaze and maze2d 10 (IQL)")
    # evaluation
    episodes: int = setting(20, "episodes of each evaluation and seed (App. C)")
    evaluations: int = setting(20, "evaluations during policy extraction, beside the one at its start (Fig. 16)")
    any_data: bool = setting(False, "accept a data file whose hash is not D4RL's")
    precision: str = setting("fp32", "of the matrix products", ("fp32", "tf32", "bf16"))

    def resolve(self, task):
        """Fills in what depends on the task."""
        maze = task.startswith(("antmaze", "maze2d"))
        by_task = dict(tau=0.9 if maze else 0.7, beta=(TABLE_2.get(task, 0.4),), temperature=10.0 if maze else 3.0,
                       policy_layers=4 if task.startswith("antmaze") else 2, grad_norm="released" if maze else "none")
        for name, value in by_task.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                least = 0 if name in ("behavior_decay", "dropout", "temperature") else 1e-12
                most = 1 if name in ("tau", "gamma", "target_rate", "dropout") else math.inf
                if not least <= value <= most or not math.isfinite(value):
                    raise UserError(f"--{name.replace('_', '-')} {value} is out of range")
        return self


# ------------------------------------------------------------------------------------- Algorithm 1, in three stages

ROWS, TIME, NOISE, DROPOUT = 1, 2, 3, 4  # purposes of random numbers, counted from 8 times the stage's number
GRAPH_STEPS = 25  # steps of one CUDA graph launch


def adam(theta, gradient, m, v, count, lr, decay):
    """One step of Adam with decoupled weight decay (AdamW), in place, on flat tensors [*seeds, P]; PyTorch's defaults."""
    m.lerp_(gradient, 1 - 0.9)
    v.lerp_(gradient**2, 1 - 0.999)
    m_hat = m / -torch.expm1(count * math.log(0.9))  # 1 − 0.9^count
    v_hat = v / -torch.expm1(count * math.log(0.999))
    theta.mul_(1 - lr * decay).sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))


class Stage:
    """A gradient loop of Algorithm 1 for all seeds: what the three stages share.

    `state` holds every tensor that belongs to a seed, the seed axis first, at an address that never changes; `theta`
    [seeds, P] are the trained weights. A step is closed: it reads and writes `state`, `count` and the data, and takes
    and returns nothing, so that it can be compiled, captured as a CUDA graph and resumed.
    """

    name, number, losses, decay, cosine, betas = "", 0, (), 0.0, False, None
    kept = ("theta", "m", "v", "alive", "losses")  # what training changes

    def __init__(self, settings, dataset, seeds, theta, **state):
        self.settings, self.table = settings, dataset.table
        self.s_dim, self.a_dim = dataset.s_dim, dataset.a_dim
        kind = self.name if self.name in ("critic", "behavior") else "policy"
        self.steps, self.batch, self.lr = (getattr(settings, f"{kind}_{what}") for what in ("steps", "batch", "lr"))
        device = self.table.device
        self.count = torch.zeros((), dtype=torch.int32, device=device)
        self.state = dict(
            theta=theta.to(device), m=torch.zeros_like(theta, device=device), v=torch.zeros_like(theta, device=device),
            seed=torch.tensor(seeds, dtype=torch.int32, device=device), alive=torch.ones(len(seeds), device=device),
            losses=torch.zeros(len(seeds), len(self.losses), device=device), **state)
        # On a CPU the cache decides: one seed after the other. On a GPU launches do: all side by side.
        self.groups = [self.state] if device.type == "cuda" else self.each_seed()
        self.graph, self.betas = None, self.betas or [None] * len(seeds)

    def each_seed(self):
        """The state of each seed alone, without the seed axis: views."""
        return [{name: tensor[i] for name, tensor in self.state.items()} for i in range(len(self.state["seed"]))]

    def restore(self, saved, path):
        """Continues from a checkpoint; returns its step."""
        own = {name: self.state[name] for name in self.kept}
        if {k: x.shape for k, x in saved["state"].items()} != {k: x.shape for k, x in own.items()}:
            raise UserError(f"{path} is not of this run; remove it to train stage {self.name} again")
        for name, tensor in saved["state"].items():
            own[name].copy_(tensor)
        self.count.copy_(saved["count"])
        return int(saved["count"])

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
            state["alive"].mul_(losses.isfinite().all(-1))
            lr = self.lr * state["alive"].unsqueeze(-1)
            if self.cosine:
                lr = lr * (1 + torch.cos(math.pi * (self.count - 1) / self.steps)) / 2
            adam(state["theta"], gradient.nan_to_num(0, 0, 0), state["m"], state["v"], self.count, lr, self.decay)
            self.target(state, state["alive"].unsqueeze(-1))

    def step(self):
        self.count.add_(1)
        for group in self.groups:
            self.update(group, *self.draw(group))

    def advance(self, steps):
        """Takes at most `steps` steps without waiting for the device; returns how many."""
        if self.table.device.type != "cuda":
            self.step()
            return 1
        if self.graph is None:
            return self.capture()
        if steps < GRAPH_STEPS:
            self.step()
            return 1
        self.graph.replay()
        return GRAPH_STEPS

    def capture(self):
        """Takes three steps to warm up, then records GRAPH_STEPS of them as a CUDA graph. Not measured on a GPU."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            for _ in range(GRAPH_STEPS):
                self.step()
        return 3

    def compile(self, required):
        """Compiles the step and takes it once; where that can't be done, says so and stays eager. Returns steps taken."""
        torch._dynamo.config.trace_autograd_ops = True  # lets torch.autograd.grad live inside the compiled step
        eager = self.draw, self.update
        # Apart, since in one function every use of a random number would compute it anew.
        self.draw, self.update = (torch.compile(f, fullgraph=True, dynamic=False) for f in eager)
        try:
            self.step()
            return 1
        except torch._dynamo.exc.TorchDynamoException as error:  # raised before anything is written
            reason = str(error).strip().splitlines()[0][:160]
            cure = "install a C++ compiler (g++), on a GPU also a C compiler and Triton"
            if required:
                raise UserError(f"--compile cannot work here ({reason}); {cure}, or leave --compile out") from None
            tqdm.write(f"{self.name}: not compiled, which costs speed only ({reason}); to compile: {cure}")
            self.draw, self.update = eager
            self.count.sub_(1)
            return 0

    def watch(self, state):
        """What is worth watching on a batch of this step, {name: [*seeds]}."""
        return {}


class Critic(Stage):
    """// Critic training (IQL): ζ ← ζ − λ_V ∇L_V (Eq. 11); φ ← φ − λ_Q ∇L_Q (Eq. 12)."""

    name, number, losses = "critic", 1, ("value_loss", "q_loss")
    kept = (*Stage.kept, "target")

    def __init__(self, settings, dataset, seeds):
        size, width = (dataset.s_dim, dataset.a_dim), settings.critic_width
        self.value, self.q = Layout(Value(size[0], width)), Layout(TwinQ(*size, width))
        value = self.value.flatten(fresh(seeds, 1, lambda: Value(size[0], width)).state_dict())
        q = self.q.flatten(fresh(seeds, 2, lambda: TwinQ(*size, width)).state_dict())
        target = q.to(dataset.table.device, copy=True)
        super().__init__(settings, dataset, seeds, torch.cat([value, q], -1), target=target)
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
        return {"value": self.value.tensors(value), "q": self.q.tensors(q), "q_target": self.q.tensors(self.state["target"])}


class Behavior(Stage):
    """// Behavior training: ψ ← ψ − λ_μ ∇L_μ (Eq. 13)."""

    name, number, losses = "behavior", 2, ("behavior_loss",)

    def __init__(self, settings, dataset, seeds):
        shape = (dataset.s_dim, dataset.a_dim, settings.behavior_width, settings.behavior_blocks)
        self.noise_model = Layout(NoiseModel(*shape))
        self.decay = settings.behavior_decay * self.noise_model.trainable().to(dataset.table.device)
        theta = self.noise_model.flatten(fresh(seeds, 3, lambda: NoiseModel(*shape)).state_dict())
        super().__init__(settings, dataset, seeds, theta)

    def noise(self, draw):
        units = (self.settings.behavior_blocks, self.batch, self.settings.behavior_width)
        return (draw.uniform(TIME, (self.batch,)), draw.normal(NOISE, (self.batch, self.a_dim)),
                draw.keep(DROPOUT, units, self.settings.dropout))

    def loss(self, theta, state, rows, t, noise, keep):
        s, a, *_ = self.split(rows)
        noise_model = self.noise_model.bind(theta)
        return behavior_loss(lambda a_t, s, t: noise_model(a_t, s, t, keep, self.settings.dropout), s, a, t, noise).unsqueeze(-1)

    def weights(self):
        return self.noise_model.tensors(self.state["theta"])


class Extraction(Stage):
    """// Policy extraction: θ ← θ + λ_π ∇L_sur (Eq. 15), the critic and the behavior model frozen."""

    name, number, losses, cosine = "policy", 3, ("policy_loss",), True

    def __init__(self, settings, dataset, seeds, critic, behavior, betas):
        size = (dataset.s_dim, dataset.a_dim)
        self.q = Layout(TwinQ(*size, settings.critic_width))
        self.value = Layout(Value(size[0], settings.critic_width))
        self.noise_model = Layout(NoiseModel(*size, settings.behavior_width, settings.behavior_blocks))
        shape = (*size, settings.policy_width, settings.policy_layers)
        self.policy = Layout(Policy(*shape))
        theta = self.policy.flatten(fresh(seeds, 4, lambda: Policy(*shape)).state_dict())
        frozen = dict(q=self.q.flatten(critic["q_target"]), value=self.value.flatten(critic["value"]),
                      behavior=self.noise_model.flatten(behavior))
        self.betas = [beta for beta in betas for _ in seeds]  # every β beside every seed
        super().__init__(settings, dataset, seeds * len(betas), theta.repeat(len(betas), 1),
                         beta=torch.tensor([beta or 0.0 for beta in self.betas], device=dataset.table.device),
                         **{name: flat.repeat(len(betas), 1) for name, flat in frozen.items()})

    def noise(self, draw):
        t = 0.02 + 0.96 * draw.uniform(TIME, (self.batch,))  # U(0.02, 0.98), Eq. 14
        return t, draw.normal(NOISE, (self.batch, self.a_dim))

    def gradient(self, state, s, a, t, noise, **options):
        """∂L_sur/∂a (Eq. 15) with the settings' choices, or other `options`."""
        q, noise_model = self.q.bind(state["q"]), self.noise_model.bind(state["behavior"])  # without dropout
        given = self.settings
        grad_norm = None if given.grad_norm == "none" else given.grad_norm
        chosen = dict(beta=state["beta"][..., None, None], weighting=given.weighting, baseline=given.baseline, grad_norm=grad_norm)
        return surrogate_gradient(lambda s, a: q(s, a).mean(-2), noise_model, s, a, t, noise, **{**chosen, **options})

    def loss(self, theta, state, rows, t, noise):
        s, *_ = self.split(rows)
        a = self.policy.bind(theta)(s)
        return policy_loss(a, self.gradient(state, s, a, t, noise)).unsqueeze(-1)

    def watch(self, state):
        rows, t, noise = self.draw(state)
        s, *_ = self.split(rows)
        a = self.policy.bind(state["theta"])(s)
        grad_q = self.gradient(state, s, a, t, noise, beta=math.inf, grad_norm=None)  # 1/β = 0 leaves ∇Q
        gap = grad_q - self.gradient(state, s, a, t, noise, beta=1, grad_norm=None, weighting="one", baseline=True)
        return {"q": self.q.bind(state["q"])(s, a).mean((-2, -1)), "v": self.value.bind(state["value"])(s).mean(-1),
                "grad_q": grad_q.norm(dim=-1).mean(-1), "noise_gap": gap.norm(dim=-1).mean(-1)}

    def weights(self):
        return self.policy.tensors(self.state["theta"])


class Regression(Extraction):
    """IQL's policy on the same critic (Eq. 2), or behavior cloning; not part of SRPO."""

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


# ------------------------------------------------------------------------------------------------- a run's folder

LOG = ("stage", "step", "seed", "beta", "alive", "value_loss", "q_loss", "behavior_loss", "policy_loss",
       "regression_loss", "q", "v", "grad_q", "noise_gap")
SCORES = ("method", "step", "seed", "beta", "episode", "return", "score")
METHODS = {"policy": "srpo", "iql": "iql", "bc": "bc"}  # a stage's name: its policy's
COMPILE_FROM = 3e12  # weights x rows x steps x seeds: below, compiling takes longer than it saves


def write_atomically(path, write):
    """write(file) into a temporary file, flushed to the disk and renamed: `path` is the old file or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; what was saved before is intact") from None


def load_tensors(path, device="cpu"):
    """What torch.save wrote: tensors and plain values only."""
    try:
        return torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: train it first") from None
    except Exception as error:  # torch.load's errors for damaged files are of many kinds
        reason = str(error).strip().splitlines()[0][:100] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is damaged or not a file of tensors ({reason}); remove it to train it again") from None


class Run:
    """The folder of one task's run: config.json, log.csv, scores.csv, a .pt file for each stage, curves.png."""

    def __init__(self, folder, config):
        self.folder, self.config, self.stopped, self.told = folder, config, None, set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(folder / ".lock", timeout=0)
            self.lock.acquire()
        except filelock.Timeout:
            holder = (folder / ".holder").read_text() if (folder / ".holder").exists() else "another process"
            raise UserError(f"{folder} is in use by {holder}; wait for it or choose another --out") from None
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from None
        (folder / ".holder").write_text(f"process {os.getpid()} on {platform.node()}")
        if (folder / "config.json").exists():
            old = read_config(folder)
            differ = [f"{part} {key}" for part in ("settings", "data") for key in {**config[part], **old[part]}
                      if config[part].get(key) != old[part].get(key)]
            differ += [key for key in ("task", "seeds") if config[key] != old[key]]
            if differ:
                raise UserError(f"{folder} holds a run with other {', '.join(differ[:4])}; choose another --out")
        else:
            text = json.dumps(config, indent=1).encode()
            write_atomically(folder / "config.json", lambda file: file.write(text))
        self.checkpoint = folder / "checkpoint.pt"
        saved = load_tensors(self.checkpoint) if self.checkpoint.exists() else {"stage": None, "log": 0, "scores": 0}
        self.saved = saved
        self.log, self.scores = (self.open(name, saved[name.split(".")[0]], columns)
                                 for name, columns in (("log.csv", LOG), ("scores.csv", SCORES)))

    def open(self, name, size, columns):
        """A CSV file cut to what the checkpoint knows of it: what came after is made again."""
        file = open(self.folder / name, "a+", newline="")
        file.truncate(size)
        writer = csv.DictWriter(file, columns, extrasaction="raise")
        if size == 0:
            writer.writeheader()
        writer.file = file
        return writer

    @contextlib.contextmanager
    def stopping(self):
        """Within it SIGINT, SIGTERM and SIGUSR1 ask the loop to save and stop; a second one ends the process at once."""

        def ask(number, frame):
            if self.stopped:
                os._exit(128 + self.stopped)
            self.stopped = signal.SIGTERM if number == signal.SIGUSR1 else number

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def save(self, stage, pending):
        """The checkpoint: the stage's tensors, its step, evaluations under way and the lengths of the logs."""
        for writer in (self.log, self.scores):
            writer.file.flush()
            os.fsync(writer.file.fileno())
        self.saved = {"stage": stage.name, "count": stage.count, "state": {name: stage.state[name] for name in stage.kept},
                      "pending": [(step, theta) for step, theta, _ in pending],
                      "log": self.log.file.tell(), "scores": self.scores.file.tell()}
        write_atomically(self.checkpoint, lambda file: torch.save(self.saved, file))

    def train(self, stage, evaluator, compiled, minutes):
        """Takes a stage from where it stands to its end, with logs, evaluations and checkpoints on the way."""
        pending, done, members = [], 0, len(stage.state["seed"])
        evaluations = self.config["settings"]["evaluations"] if stage.name in METHODS else 0
        if self.saved["stage"] == stage.name:
            done = stage.restore(self.saved, self.checkpoint)
            pending = [(step, theta, self.submit(stage, theta, evaluator)) for step, theta in self.saved["pending"]]
        elif evaluations:
            pending = [self.snapshot(stage, 0, evaluator)]
        work = stage.state["theta"].numel() * stage.batch * stage.steps
        if compiled or (compiled is None and work > COMPILE_FROM and done < stage.steps):
            done += stage.compile(required=compiled)
        marks = {round(i * stage.steps / evaluations) for i in range(1, evaluations + 1)}
        every, saved_at = max(1, min(1000, stage.steps // 20)), time.monotonic()
        with tqdm(desc=stage.name, total=members * stage.steps, initial=members * done, unit=" seed-steps",
                  unit_scale=True, mininterval=1, smoothing=0.05) as bar:
            while done < stage.steps:
                stop = min(mark for mark in {*marks, stage.steps, (done // every + 1) * every} if mark > done)
                steps = stage.advance(stop - done)
                done += steps
                bar.update(members * steps)
                if done in marks:
                    pending.append(self.snapshot(stage, done, evaluator))
                if done % every == 0 or done == stage.steps:
                    self.write_log(stage, done, done % every or every, bar)
                self.collect(stage, pending)
                if self.stopped or time.monotonic() - saved_at > 60 * minutes:
                    self.save(stage, pending)
                    saved_at = time.monotonic()
                if self.stopped:
                    tqdm.write(f"saved at step {done} of stage {stage.name}; the same command goes on from there")
                    raise SystemExit(128 + self.stopped)
        self.collect(stage, pending, wait=True)
        self.save(stage, [])
        weights = torch.utils._pytree.tree_map(lambda tensor: tensor.cpu().clone(), stage.weights())  # views of theta
        write_atomically(self.folder / f"{stage.name}.pt", lambda file: torch.save(weights, file))

    def write_log(self, stage, step, since, bar):
        """A row a seed: mean losses over the steps since the last row, and what is worth watching now."""
        watched = [{name: float(x) for name, x in stage.watch(group).items()} for group in stage.each_seed()]
        losses, alive = (stage.state["losses"] / since).tolist(), stage.state["alive"].tolist()
        stage.state["losses"].zero_()
        for i, (seed, beta) in enumerate(zip(stage.state["seed"].tolist(), stage.betas)):
            row = {**dict(zip(stage.losses, losses[i])), **watched[i]}
            self.log.writerow({"stage": stage.name, "step": step, "seed": seed, "beta": beta, "alive": int(alive[i]), **row})
            name = f"seed {seed}" if beta is None or len(set(stage.betas)) == 1 else f"seed {seed}, beta {beta}"
            if not alive[i]:
                self.tell(f"{name}: a {stage.name} loss is not finite: stopped at its last finite weights")
            if stage.name == "critic" and abs(row["q"]) > stage.q_bound:
                self.tell(f"{name}: the critic diverges, |Q| is beyond {stage.q_bound:.3g}, the largest return (Fig. 13)")
        self.log.file.flush()
        shown = {key: [x[key] for x in watched] for key in watched[0]} if watched[0] else {}
        shown.update({name: [x[k] for x in losses] for k, name in enumerate(stage.losses)})
        bar.set_postfix({name: f"{np.mean(values):.3g}" for name, values in shown.items()}, refresh=False)
        if not any(alive):
            raise Stopped(f"every seed's {stage.name} loss is not finite; see {self.folder / 'log.csv'}")

    def take(self, stage, folder):
        """Copies the trained critic or behavior model of another run of the same task, data, seeds and settings."""
        other, shared = read_config(folder), ("tau", "gamma", "target_rate", "dropout", "precision")
        differ = [key for key in ("task", "seeds", "data") if other[key] != self.config[key]]
        differ += [key for key, value in self.config["settings"].items()
                   if (key.startswith(("critic", "behavior")) or key in shared) and other["settings"].get(key) != value]
        if differ:
            raise UserError(f"--reuse {folder}: that run has other {', '.join(differ[:4])}")
        load_tensors(folder / f"{stage}.pt")
        content = (folder / f"{stage}.pt").read_bytes()
        write_atomically(self.folder / f"{stage}.pt", lambda file: file.write(content))

    def tell(self, line):
        """Prints a line the first time."""
        if line not in self.told:
            self.told.add(line)
            tqdm.write(line)

    def snapshot(self, stage, step, evaluator):
        theta = stage.state["theta"].cpu().clone()
        return step, theta, self.submit(stage, theta, evaluator)

    def submit(self, stage, theta, evaluator):
        policies = numpy_policies(stage.policy.tensors(theta), stage.state["seed"].tolist())
        return evaluator.submit(policies, self.config["settings"]["episodes"])

    def collect(self, stage, pending, wait=False):
        """Writes the scores of finished evaluations, in the order of their steps."""
        while pending and (wait or pending[0][2].done()):
            step, _, handle = pending.pop(0)
            returns = handle.result()
            scores = data.normalized_score(self.config["task"], returns)
            for seed, beta, row, row_scores in zip(stage.state["seed"].tolist(), stage.betas, returns, scores):
                for episode, (value, score) in enumerate(zip(row.tolist(), row_scores.tolist())):
                    self.scores.writerow({"method": METHODS[stage.name], "step": step, "seed": seed, "beta": beta,
                                          "episode": episode, "return": value, "score": score})
            self.scores.file.flush()
            tqdm.write(f"{METHODS[stage.name]} step {step}: score {scores.mean():.1f}"
                       f" (seeds {' '.join(f'{x:.1f}' for x in scores.mean(1))})")


class Stopped(Exception):
    """Training cannot go on: exit status 3."""


def read_config(folder):
    """A run folder's config.json; raises UserError where it is missing, damaged or not ours."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text())
        data.check_task(config["task"])
        if not (isinstance(config["settings"], dict) and isinstance(config["data"], dict)
                and all(isinstance(seed, int) for seed in config["seeds"])):
            raise TypeError("wrong types")
        return config
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {folder} is not a run's folder") from None
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {str(error)[:80]}); remove the folder") from None


def numpy_policies(tensors, seeds):
    """[(seed, policy)] for data.evaluate, from a policy's tensors with a leading seed axis."""
    arrays = [tensor.numpy() for tensor in tensors.values()]
    return [(seed, data.NumpyPolicy([(w[i], b[i]) for w, b in zip(arrays[::2], arrays[1::2])]))
            for i, seed in enumerate(seeds)]


def read_scores(folder):
    """scores.csv as a list of rows with numbers for text."""
    with open(folder / "scores.csv", newline="") as file:
        return [{**row, "step": int(row["step"]), "seed": int(row["seed"]), "score": float(row["score"])}
                for row in csv.DictReader(file)]


def draw_curves(folder, config):
    """curves.png: score against step, mean and band over seeds, with the data's own mean as a line."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    curves = {}
    for row in read_scores(folder):
        name = row["method"] + (f", β = {row['beta']}" if len(config["settings"]["beta"]) > 1 and row["beta"] else "")
        curves.setdefault(name, {}).setdefault(row["step"], {}).setdefault(row["seed"], []).append(row["score"])
    for name, curve in curves.items():
        steps = sorted(curve)
        seeds = np.array([[np.mean(scores) for _, scores in sorted(curve[step].items())] for step in steps])
        axes.plot(steps, seeds.mean(1), label=f"{name} (mean and range of {seeds.shape[1]} seeds)")
        axes.fill_between(steps, seeds.min(1), seeds.max(1), alpha=0.2)
    kind = config["data"]["kind"]
    axes.axhline(config["data"]["data_score"], color="gray", linestyle="--", label=f"the data's mean ({kind})")
    axes.set(xlabel="gradient steps of policy extraction", ylabel="normalized score", title=config["task"])
    axes.legend(fontsize="small")
    figure.savefig(folder / "curves.png", dpi=120)
    pyplot.close(figure)


# --------------------------------------------------------------------------------------------------- command line


def print_scores(rows, config):
    """One line a method: mean and standard deviation over seeds of each seed's mean score."""
    words = "" if config["data"]["kind"] == "D4RL" else f" [{config['data']['kind']} data]"
    for method in dict.fromkeys((row["method"], row["beta"]) for row in rows):
        mine = [row for row in rows if (row["method"], row["beta"]) == method]
        seeds = {row["seed"]: [] for row in mine}
        for row in mine:
            seeds[row["seed"]].append(row["score"])
        means = [np.mean(scores) for scores in seeds.values()]
        print(f"{config['task']}{words} {' β = '.join(filter(None, method))}: {np.mean(means):.1f} ± {np.std(means):.1f} over "
              f"{len(seeds)} seeds of {len(mine) // len(seeds)} episodes ({' '.join(f'{mean:.1f}' for mean in means)})")


def train(task, settings, seeds, out, device, compiled, minutes, workers, reuse):
    """Algorithm 1 on one task: trains what is not yet trained and writes everything under out/task."""
    folder = Path(out) / task
    if settings.precision != "fp32":
        torch.set_float32_matmul_precision("high")
        Linear.precision = torch.bfloat16 if settings.precision == "bf16" else None
    dataset = data.load(task, settings.any_data)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    config = {"task": task, "seeds": seeds, "settings": dataclasses.asdict(settings), "data": dataset.info,
              "versions": versions, "device": name, "command": sys.argv}
    run = Run(folder, json.loads(json.dumps(config)))
    stages = ["critic", "behavior", "policy", *settings.also]
    todo = [stage for stage in stages if not (folder / f"{stage}.pt").exists()]
    if not todo:
        print(f"{folder} is finished: nothing to do")
        return
    for stage in ("critic", "behavior") if reuse else ():
        run.take(stage, Path(reuse))
        todo = [name for name in todo if name != stage]
    dataset = dataset._replace(table=torch.from_numpy(dataset.table).to(device))
    with data.Evaluator(task, workers) as evaluator, run.stopping():
        for name in stages:
            if name not in todo:
                continue
            if name == "critic":
                stage = Critic(settings, dataset, seeds)
            elif name == "behavior":
                stage = Behavior(settings, dataset, seeds)
            else:
                critic, behavior = (load_tensors(folder / f"{x}.pt", device) for x in ("critic", "behavior"))
                rest = (settings, dataset, seeds, critic, behavior)
                stage = Extraction(*rest, settings.beta) if name == "policy" else Regression(name, *rest, [None])
            run.train(stage, evaluator, compiled, minutes)
    draw_curves(folder, run.config)
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    rows = read_scores(folder)
    last = {row["method"]: row["step"] for row in rows}
    print_scores([row for row in rows if row["step"] == last[row["method"]]], run.config)


def evaluate(folder, method, episodes, workers):
    """Scores a finished run's policies anew and writes them to evaluation-METHOD.csv."""
    folder = Path(folder)
    config = read_config(folder)
    seeds, betas = config["seeds"], [None]
    if method == "random":
        policies = [(seed, data.RandomPolicy(data.SIZES[config["task"].split("-")[0]][1])) for seed in seeds]
    else:
        stage = {name: stage for stage, name in METHODS.items()}[method]
        betas = config["settings"]["beta"] if method == "srpo" else betas
        policies = numpy_policies(load_tensors(folder / f"{stage}.pt"), seeds * len(betas))
    returns, scores = data.evaluate(policies, config["task"], episodes or config["settings"]["episodes"], workers)
    rows = [{"method": method, "step": None, "seed": seed, "beta": None if beta is None else str(beta),
             "episode": episode, "return": returns[i, episode], "score": scores[i, episode]}
            for i, (beta, seed) in enumerate((beta, seed) for beta in betas for seed in seeds)
            for episode in range(returns.shape[1])]
    text = io.StringIO()
    writer = csv.DictWriter(text, SCORES)
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / f"evaluation-{method}.csv", lambda file: file.write(text.getvalue().encode()))
    print_scores(rows, config)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see --help)")


def parse(arguments):
    """The command line; its settings are made from the dataclass, so that --help, table and code are one."""
    parser = Parser(prog="srpo.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    one = commands.add_parser("train", help="train and score a task", allow_abbrev=False)
    one.add_argument("task", help="a task of Table 1, or maze2d-umaze-v1")
    one.add_argument("--seeds", type=int, nargs="+", default=list(range(6)), help="independent trials, side by side")
    one.add_argument("--out", default="runs", help="results go to OUT/TASK")
    one.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    one.add_argument("--compile", action=argparse.BooleanOptionalAction, help="default: where it is worth its time")
    one.add_argument("--checkpoint-minutes", type=float, default=5, help="at most this much is lost to a crash")
    one.add_argument("--reuse", help="take the critic and the behavior model from this run's folder")
    for field in dataclasses.fields(Settings):
        how = {"type": field.type if field.type is not tuple else field.metadata["choices"]}
        if field.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            how = {"nargs": "+", "type": float} if field.name == "beta" else {"nargs": "*", "choices": ("iql", "bc")}
        elif field.metadata["choices"]:
            how = {"choices": field.metadata["choices"]}
        source = f"{field.metadata['help']}; default: {'by task' if field.default is None else field.default}"
        one.add_argument("--" + field.name.replace("_", "-"), default=field.default, help=source.replace("%", "%%"), **how)
    two = commands.add_parser("evaluate", help="score a trained run anew", allow_abbrev=False)
    two.add_argument("folder", help="a run's folder, runs/TASK")
    two.add_argument("--method", default="srpo", choices=("srpo", "iql", "bc", "random"))
    two.add_argument("--episodes", type=int, help="episodes a seed; default: the run's")
    for command in (one, two):
        command.add_argument("--workers", type=int, help="evaluation processes; default: one per core")
    return parser.parse_args(arguments)


def main(arguments=None):
    """The command line's entry: exit status 0, 2 for what the user can mend, 3 if every seed diverged."""
    try:
        given = vars(parse(arguments))
        for name in ("episodes", "workers", "checkpoint_minutes"):
            if given.get(name) is not None and given[name] <= 0:
                raise UserError(f"--{name.replace('_', '-')} must be above 0")
        if given["command"] == "evaluate":
            evaluate(given["folder"], given["method"], given["episodes"], given["workers"])
            return 0
        names = [field.name for field in dataclasses.fields(Settings)]
        task = data.check_task(given["task"])
        settings = Settings(**{name: given[name] for name in names}).resolve(task)
        seeds = given["seeds"]
        if len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**31 for seed in seeds):
            raise UserError("--seeds must be different whole numbers from 0 to 2147483647")
        if given["device"] == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: this PyTorch sees no CUDA GPU; use --device cpu or install a CUDA build")
        device = given["device"] if given["device"] != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        train(task, settings, seeds, given["out"], device, given["compile"], given["checkpoint_minutes"],
              given["workers"], given["reuse"])
        return 0
    except (UserError, Stopped) as error:
        print(f"srpo: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 3


if __name__ == "__main__":
    sys.exit(main())
