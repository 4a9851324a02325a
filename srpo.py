"""Score Regularized Policy Optimization through Diffusion Behavior (Chen et al., 2024).

From top to bottom: the critic's losses, the policy's gradient, settings, Algorithm 1.
Shapes: actions [*seeds, B, A], times and values [*seeds, B], losses [*seeds]. Leading
axes may be absent; Algorithm 1 has them: all seeds train side by side.
"""

import copy
import dataclasses
import math
from functools import cached_property, partial

import torch
from torch import nn

from diffusion import alpha_sigma, behavior_loss, refuse_dropout
from models import NoiseModel, Policy, TwinQ, Value
from seeds import Networks, Steps, draw, generator

# ---------------- the equations


def same_shape(**tensors):
    """ValueError unless all have one shape: [B, 1] against [B] would become [B, B]."""
    shapes = {name: list(x.shape) for name, x in tensors.items()}
    if any(shape != [*shapes.values()][0] for shape in shapes.values()):
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"these must have one shape, a number a row: {told}")


def expectile_loss(u, tau):
    """Eq. 11: L₂^τ(u) = |τ − 1(u < 0)| u², shaped like u."""
    return (tau - (u < 0).to(u.dtype)).abs() * u**2


def value_loss(value, q_target, s, a, tau):
    """Eq. 11: expectile regression of V on Q, [*seeds].

    q_target(s, a): the target twins [*seeds, 2, B]; of the two the smaller (IQL).
    """
    with torch.no_grad():
        target = q_target(s, a).amin(-2)
    v = value(s)
    same_shape(v=v, q=target)
    return expectile_loss(target - v, tau).mean(-1)


def q_loss(q, value, s, a, r, s_next, terminal, gamma):
    """Eq. 12: squared error to r + γ V(s′), where V(s′) = 0 after a terminal, [*seeds].

    q(s, a): twins [*seeds, 2, B]; the mean of their losses (released code).
    """
    with torch.no_grad():
        v_next = value(s_next)
        target = r + gamma * (1 - terminal) * v_next
    twins = q(s, a)
    same_shape(q_of_a_twin=twins.select(-2, 0), v=v_next, r=r, terminal=terminal)
    return ((twins - target.unsqueeze(-2)) ** 2).mean((-2, -1))


WEIGHTINGS = {  # ω(t), Sec. 6.3; those that Fig. 8 compares, after the released code
    "sigma2": lambda alpha, sigma: sigma**2,
    "one": lambda alpha, sigma: torch.ones_like(sigma),
    "alpha_over_sigma": lambda alpha, sigma: alpha / sigma,
}


def surrogate_gradient(
    q,
    noise_model,
    s,
    a,
    t,
    noise,
    beta,
    weighting="sigma2",
    baseline=True,
    grad_norm=None,
    schedule=alpha_sigma,
):
    """Eq. 15: ∂L_sur/∂a = ∇_a Q − (1/β) ω(t) (ε̂ − ε) of each row, [*seeds, B, A].

    q(s, a): [*seeds, B], one Q; noise_model(a_t, s, t): without dropout; beta: above 0,
    a number, or a tensor that broadcasts to t; weighting: of WEIGHTINGS, or yours, of α
    and σ; schedule(t): your noise model's α and σ. grad_norm: "paper" multiplies the
    regularizer by ‖∇Q‖₂ (β_norm, App. C), "released" divides ∇Q by its root mean square
    over the action, in direction "paper" with √A β; None: neither. ValueError for what
    does not fit, and for a Q that does not depend on a.
    """
    if grad_norm not in (None, "paper", "released"):
        raise ValueError(f"grad_norm {grad_norm!r} is none of paper, released, None")
    refuse_dropout(noise_model)
    if torch.is_tensor(beta):
        same_shape(t=t, t_with_beta=torch.broadcast_tensors(t, beta)[0])
        beta = beta.unsqueeze(-1)
    elif not beta > 0:
        raise ValueError(f"beta {beta} is not above 0")
    with torch.enable_grad():
        leaf, grad_q = a.detach().requires_grad_(), None
        values = q(s, leaf)
        same_shape(q=values, t=t, a_component=a[..., 0])
        if values.requires_grad:  # ∇_a Q
            (grad_q,) = torch.autograd.grad(values.sum(), leaf, allow_unused=True)
        if grad_q is None:
            raise ValueError("q(s, a) does not depend on a: detached, or no_grad?")
    with torch.no_grad():
        alpha, sigma = (x.unsqueeze(-1) for x in schedule(t))
        a_t = alpha * a + sigma * noise
        noise_hat = noise_model(a_t, s, t)  # ε̂ = ε_ψ(a_t | s, t)
        same_shape(a=a, noise=noise, noise_hat=noise_hat)
        named = isinstance(weighting, str)
        omega = (WEIGHTINGS[weighting] if named else weighting)(alpha, sigma)  # ω(t)
        regularizer = omega * (noise_hat - noise if baseline else noise_hat)
        if grad_norm == "paper":
            regularizer = regularizer * grad_q.norm(dim=-1, keepdim=True)
        elif grad_norm == "released":
            size = grad_q.square().mean(-1, keepdim=True).sqrt()
            grad_q = grad_q / size.clamp(min=1e-20)  # 0 stays 0, not NaN
        return grad_q - regularizer / beta


def policy_loss(a, gradient):
    """−(∂L_sur/∂a, held fixed) · π(s), [*seeds]: its value means nothing."""
    same_shape(a=a, gradient=gradient)
    return -(gradient.detach() * a).sum(-1).mean(-1)


# ---------------- settings

TABLE_2 = {  # β of every task
    "halfcheetah-medium-expert-v2": 0.01,
    "hopper-medium-expert-v2": 0.01,
    "walker2d-medium-expert-v2": 0.1,
    "halfcheetah-medium-v2": 0.2,
    "hopper-medium-v2": 0.05,
    "walker2d-medium-v2": 0.05,
    "halfcheetah-medium-replay-v2": 0.2,
    "hopper-medium-replay-v2": 0.2,
    "walker2d-medium-replay-v2": 0.5,
    "antmaze-umaze-v2": 0.02,
    "antmaze-umaze-diverse-v2": 0.04,
    "antmaze-medium-play-v2": 0.08,
    "antmaze-medium-diverse-v2": 0.05,
    "antmaze-large-play-v2": 0.06,
    "antmaze-large-diverse-v2": 0.05,
}
SWEEPS = {  # β of App. C's searches, by the beginning of a task; of maze2d: ours
    "antmaze-umaze": (0.01, 0.02, 0.03, 0.04, 0.05),
    "antmaze": (0.03, 0.04, 0.05, 0.06, 0.07, 0.08),
    "maze2d": (0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    "": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
}


def setting(default, source, choices=None):
    return dataclasses.field(
        default=default, metadata={"help": source, "choices": choices}
    )


@dataclasses.dataclass
class Settings:
    """Every setting that changes a result, with its default and its source.

    What is None depends on the task and is filled in. ValueError if out of range.
    """

    task: dataclasses.InitVar[str] = ""
    # critic
    critic_steps: int = setting(1_500_000, "gradient steps (App. C)")
    critic_batch: int = setting(256, "rows a step (App. C)")
    critic_lr: float = setting(3e-4, "Adam's learning rate (App. C)")
    critic_width: int = setting(256, "hidden units (App. C)")
    tau: float = setting(None, "expectile: 0.7, AntMaze 0.9 (App. C), maze2d too")
    gamma: float = setting(0.99, "discount (IQL)")
    target_rate: float = setting(0.005, "of the target networks to Q (IQL)")
    # behavior
    behavior_steps: int = setting(2_000_000, "gradient steps (App. C)")
    behavior_batch: int = setting(2048, "rows a step (App. C)")
    behavior_lr: float = setting(3e-4, "AdamW's learning rate (App. C)")
    behavior_decay: float = setting(0.01, "AdamW's weight decay (released code)")
    behavior_width: int = setting(256, "units of a residual block (IDQL)")
    behavior_blocks: int = setting(3, "residual blocks of two layers (App. C)")
    dropout: float = setting(0.1, "of the residual blocks (IDQL)")
    # policy extraction
    beta: tuple = setting(None, "β (Table 2); several, or `sweep` (App. C), at once")
    policy_steps: int = setting(1_000_000, "gradient steps (App. C)")
    policy_batch: int = setting(256, "rows a step (App. C)")
    policy_lr: float = setting(3e-4, "Adam's (App. C), on a cosine to 0 (released)")
    policy_width: int = setting(256, "hidden units (App. C)")
    policy_layers: int = setting(None, "hidden layers: 2, AntMaze 4 (App. C)")
    weighting: str = setting("sigma2", "ω(t) (Sec. 6.3)", tuple(WEIGHTINGS))
    baseline: bool = setting(True, "subtract ε (Sec. 4.2)", (True, False))
    grad_norm: str = setting(
        None, "β_norm (App. C); mazes: released, else off", ("off", "paper", "released")
    )
    also: tuple = setting((), "other policies to train too", ("iql", "bc"))
    iql_beta: float = setting(None, "Eq. 2's of IQL's policy: 3, mazes 10 (IQL)")
    # evaluation
    episodes: int = setting(20, "of each evaluation and seed (App. C)")
    evaluations: int = setting(20, "of a policy, after the one at its start")
    # on a GPU
    precision: str = setting(
        "fast", "fast: TF32, in the behavior stage bfloat16", ("fast", "exact")
    )

    def __post_init__(self, task):
        maze = task.startswith(("antmaze", "maze2d"))
        by_task = {
            "tau": 0.9 if maze else 0.7,
            "iql_beta": 10.0 if maze else 3.0,
            "policy_layers": 4 if task.startswith("antmaze") else 2,
            "grad_norm": "released" if maze else "off",
            "beta": TABLE_2.get(task, ()),
        }
        for name, value in by_task.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.beta in ("sweep", ("sweep",), ["sweep"]):
            self.beta = next(x for name, x in SWEEPS.items() if task.startswith(name))
        one = isinstance(self.beta, (int, float))
        self.beta, self.also = (self.beta,) if one else (*self.beta,), (*self.also,)
        if not self.beta:
            raise ValueError(f"give --beta: Table 2 has none for {task or 'this task'}")
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            least = 0 if field.name in ("behavior_decay", "dropout") else 1e-12
            below_1 = field.name in ("tau", "gamma", "dropout")
            values = value if field.type is tuple else (value,)
            for x in values:
                whole = field.type is not int or type(x) is int
                in_range = choices or least <= x <= (1 - 1e-9 if below_1 else 1e12)
                if not (x in choices if choices else in_range and whole):
                    raise ValueError(f"{field.name} {x} is out of range")
            if len(set(values)) < len(values):
                raise ValueError(f"{field.name} has a value twice")


def builders(settings, s_dim, a_dim):
    """Functions that build App. C's networks: V, twin Q, noise model, policy."""
    behavior = settings.behavior_width, settings.behavior_blocks, settings.dropout
    policy = settings.policy_width, settings.policy_layers
    return {
        "value": partial(Value, s_dim, settings.critic_width),
        "q": partial(TwinQ, s_dim, a_dim, settings.critic_width),
        "noise_model": partial(NoiseModel, s_dim, a_dim, *behavior),
        "policy": partial(Policy, s_dim, a_dim, *policy),
    }


# ---------------- Algorithm 1


def check_table(table, s_dim, a_dim):
    """Rows s | a | r | s_next | terminal [N, 2S + A + 2] as float32, or ValueError."""
    table, width = torch.as_tensor(table).float(), 2 * s_dim + a_dim + 2
    if table.ndim != 2 or table.shape[1] != width or not len(table):
        raise ValueError(f"the table is {list(table.shape)}, not [N, {width}]")
    if not table.isfinite().all():
        raise ValueError("the table has NaN or infinite numbers")
    if table[:, s_dim : s_dim + a_dim].abs().max() > 1:
        raise ValueError("the table has actions outside [-1, 1]: clip or rescale them")
    return table


class Stage(nn.Module):
    """A loop of Algorithm 1 for all seeds: every tensor of it has the seeds first.

    A subclass builds its networks, and has the losses of a batch and its noise.
    """

    name = uses = ""  # `uses`: whose steps, batch and lr in the settings
    loss_names, decay, cosine = (), 0.0, False

    def __init__(self, settings, table, sizes, seeds, copies=None):
        """table: as for check_table, on any device; sizes: (S, A); seeds: whole."""
        super().__init__()
        self.settings, self.table = settings, check_table(table, *sizes)
        self.sizes, self.seeds, self.done = sizes, seeds, 0
        self.steps = getattr(settings, f"{self.uses}_steps")
        self.batch_size = getattr(settings, f"{self.uses}_batch")
        self.lr = getattr(settings, f"{self.uses}_lr")
        device, on_gpu = self.table.device, self.table.is_cuda
        self.fast = on_gpu and settings.precision == "fast"
        if on_gpu:
            torch.set_float32_matmul_precision("high" if self.fast else "highest")
        self.generators = [generator(seed, self.name, device) for seed in seeds]
        self.draw = partial(draw, self.generators)
        self.loop = Steps(self.step, self.generators, on_gpu)
        # on the device, so that no step waits for it: sums of losses and steps; `done`
        shape = len(self.loss_names) + 1, len(seeds), *([copies] if copies else [])
        self.register_buffer("sums", torch.zeros(shape, device=device))
        self.register_buffer("count", torch.zeros((), device=device))

    def build(self, network, copies=None):
        """A network of App. C for each seed, by its name in `builders`."""
        one = builders(self.settings, *self.sizes)[network]
        return Networks(one, self.seeds, network, copies).to(self.table.device)

    @cached_property
    def optimizer(self):
        """AdamW, which without decay is Adam; fused, that is one kernel."""
        trained = [x for x in self.parameters() if x.requires_grad]
        rate, on_gpu = torch.full_like(self.count, self.lr), self.table.is_cuda
        return torch.optim.AdamW(
            trained, rate, weight_decay=self.decay, fused=True, capturable=on_gpu
        )

    def batch(self):
        """Of each seed s [seeds, B, S], a [seeds, B, A], r, s_next, terminal; and what
        a subclass's losses need beside these rows.
        """
        size, rows = self.batch_size, len(self.table)
        index = self.draw("random_", size, dtype=torch.int64, to=rows)
        s_dim, a_dim = self.sizes
        widths = s_dim, a_dim, 1, s_dim, 1
        s, a, r, s_next, terminal = self.table[index].split(widths, -1)
        return s, a, r.squeeze(-1), s_next, terminal.squeeze(-1)

    def step(self):
        """For each gradient step: batch → losses → backward → optimizer."""
        losses = torch.stack(self.losses(*self.batch()))  # [losses, seeds]
        self.optimizer.zero_grad()
        losses.sum().backward()  # a seed's weights are in its own losses alone
        if self.cosine:  # to 0 (released code)
            rate = (1 + torch.cos(math.pi * self.count / self.steps)) / 2 * self.lr
            self.optimizer.param_groups[0]["lr"].copy_(rate)
        self.optimizer.step()
        self.sums[:-1].add_(losses.detach())
        self.sums[-1].add_(1)
        self.count.add_(1)

    def advance(self, most):
        """Takes at most `most` steps without waiting for the device; how many."""
        taken = self.loop.take(most)
        self.done += taken
        return taken

    def read_losses(self):
        """Mean losses since the last reading, {name: [seeds, ...]}, and the seeds, if
        any, with one that is not finite.
        """
        means = (self.sums[:-1] / self.sums[-1].clamp(min=1)).cpu()
        self.sums.zero_()
        finite = means.isfinite().transpose(0, 1).flatten(1).all(1)
        lost = [seed for seed, fine in zip(self.seeds, finite) if not fine]
        return dict(zip(self.loss_names, means)), lost

    def run(self, report=print):
        """Takes the steps that are left; about ten times report(a line of losses)."""
        every = max(1, self.steps // 10)
        while self.done < self.steps:
            self.advance(min(every - self.done % every, self.steps - self.done))
            if self.done % every == 0 or self.done == self.steps:
                losses, lost = self.read_losses()
                losses.pop("policy_loss", None)  # a number without a meaning
                told = "".join(f", {name} {x.mean():.3g}" for name, x in losses.items())
                told += f", not finite: seed {lost}" if lost else ""
                report(f"{self.name}: step {self.done} of {self.steps}{told}")
        return self

    def weights(self):
        """{network: state dict}, on the CPU, each tensor with the seeds first."""
        return {
            name: {key: x.cpu() for key, x in one.network.state_dict().items()}
            for name, one in self.named_children()
        }


class Critic(Stage):
    """// Critic training (IQL): ζ ← ζ − λ_V ∇L_V (Eq. 11), φ ← φ − λ_Q ∇L_Q (Eq. 12).

    Both in one step, of the sum: neither loss has a gradient in the other's weights.
    """

    name, uses, loss_names = "critic", "critic", ("value_loss", "q_loss")

    def __init__(self, settings, table, sizes, seeds):
        super().__init__(settings, table, sizes, seeds)
        self.value, self.q = self.build("value"), self.build("q")
        self.q_target = copy.deepcopy(self.q).requires_grad_(False)

    def losses(self, s, a, r, s_next, terminal):
        tau, gamma = self.settings.tau, self.settings.gamma
        return (
            value_loss(self.value, self.q_target, s, a, tau),
            q_loss(self.q, self.value, s, a, r, s_next, terminal, gamma),
        )

    def step(self):
        super().step()
        with torch.no_grad():  # φ_target ← φ_target + rate (φ − φ_target) (IQL)
            old, new = [*self.q_target.parameters()], [*self.q.parameters()]
            torch._foreach_lerp_(old, new, self.settings.target_rate)

    def mean_q(self, s, a):
        """Eq. 15's Q: the mean of the target twins (released code), [seeds, B]."""
        return self.q_target(s, a).mean(-2)


class Behavior(Stage):
    """// Behavior training: ψ ← ψ − λ_μ ∇L_μ (Eq. 13)."""

    name, uses, loss_names = "behavior", "behavior", ("behavior_loss",)

    def __init__(self, settings, table, sizes, seeds):
        super().__init__(settings, table, sizes, seeds)
        self.noise_model = self.build("noise_model")
        self.decay = settings.behavior_decay
        self.bfloat16 = self.fast and torch.cuda.is_bf16_supported(
            including_emulation=False
        )

    def batch(self):
        rows, size, settings = super().batch(), self.batch_size, self.settings
        t = self.draw("uniform_", size)
        noise = self.draw("normal_", size, self.sizes[1])
        units = settings.behavior_blocks, size, settings.behavior_width
        keep = self.draw("bernoulli_", *units, dtype=torch.bool, p=1 - settings.dropout)
        return *rows, t, noise, keep

    def losses(self, s, a, r, s_next, terminal, t, noise, keep):
        def noise_model(a_t, s, t):  # uncached: old casts would stay in a CUDA graph
            kind, on = s.device.type, self.bfloat16
            with torch.autocast(kind, torch.bfloat16, enabled=on, cache_enabled=False):
                return self.noise_model(a_t, s, t, keep)

        return (behavior_loss(noise_model, s, a, t, noise),)


class Extraction(Stage):
    """// Policy extraction: θ ← θ + λ_π ∇L_sur (Eq. 15), for each seed and β."""

    name, uses, loss_names, cosine = "srpo", "policy", ("policy_loss",), True

    def __init__(self, settings, table, sizes, seeds, q, noise_model):
        """q(s, a): [seeds, βs, B]; noise_model(a_t, s, t): shaped like a_t [seeds, βs,
        B, A]. Any functions, which are not trained.
        """
        super().__init__(settings, table, sizes, seeds, copies=len(settings.beta))
        self.policy = self.build("policy", copies=len(settings.beta))
        self.beta = torch.tensor(settings.beta, device=self.table.device)[:, None]
        self.fixed = q, noise_model  # a tuple: no submodules, so not trained, not saved

    def batch(self):
        rows, size = super().batch(), self.batch_size
        t = 0.02 + 0.96 * self.draw("uniform_", size)  # U(0.02, 0.98), Sec. 4.2
        noise = self.draw("normal_", size, self.sizes[1])
        return *rows, t, noise

    def losses(self, s, a, r, s_next, terminal, t, noise):
        (q, noise_model), settings = self.fixed, self.settings
        weighting, baseline = settings.weighting, settings.baseline
        grad_norm = None if settings.grad_norm == "off" else settings.grad_norm
        s, t, noise = (  # the same for each β: [seeds, βs, B, ...]
            x.unsqueeze(1).expand(-1, len(self.beta), *x.shape[1:])
            for x in (s, t, noise)
        )
        a = self.policy(s)
        gradient = surrogate_gradient(
            q, noise_model, s, a, t, noise, self.beta, weighting, baseline, grad_norm
        )
        return (policy_loss(a, gradient),)


# ---------------- beside SRPO: other policies, from the same critic


def regression_loss(policy, s, a, advantage, beta):
    """Eq. 2 for a policy of fixed variance: exp(β (Q − V)) ‖π(s) − a‖², [*seeds].

    β = 0 is behavior cloning. V for Eq. 2's Z, and weights of at most 100, are IQL's.
    """
    same_shape(advantage=advantage, a_component=a[..., 0])
    weight = (beta * advantage).exp().clamp(max=100)
    return (weight * ((policy(s) - a) ** 2).sum(-1)).mean(-1)


class WeightedRegression(Stage):
    """IQL's policy."""

    name, uses, loss_names, cosine = "iql", "policy", ("regression_loss",), True

    def __init__(self, settings, table, sizes, seeds, q_target, value):
        super().__init__(settings, table, sizes, seeds)
        self.policy, self.fixed = self.build("policy"), (q_target, value)

    def losses(self, s, a, *rest):
        q_target, value = self.fixed
        with torch.no_grad():
            advantage = q_target(s, a).amin(-2) - value(s)
        beta = 0.0 if self.name == "bc" else self.settings.iql_beta
        return (regression_loss(self.policy, s, a, advantage, beta),)


class BehaviorCloning(WeightedRegression):
    name = "bc"
