"""SRPO: Score Regularized Policy Optimization through Diffusion Behavior (Chen et al., ICLR 2024).

From top to bottom: the critic's losses, the policy's gradient, settings, Algorithm 1. Shapes: actions
[*seeds, B, A], times and values [*seeds, B], losses [*seeds]. Leading axes may be absent, as in training:
seeds.py runs what is written here for one seed on all of them.
"""

import dataclasses
import math
from functools import partial

import torch

from diffusion import alpha_sigma, behavior_loss, diffuse
from models import NoiseModel, Policy, TwinQ, Value
from seeds import Draw, Layout, Loop

# ---------------- the equations


def expectile_loss(u, tau):
    """Eq. 11: L₂^τ(u) = |τ − 1(u < 0)| u², shaped like u."""
    return (tau - (u < 0).to(u.dtype)).abs() * u**2


def value_loss(value, q_target, s, a, tau):
    """Eq. 11: expectile regression of V on Q, here the smaller of the target twins (IQL), [*seeds].

    q_target(s, a): [*seeds, 2, B].
    """
    with torch.no_grad():
        target = q_target(s, a).amin(-2)
    return expectile_loss(target - value(s), tau).mean(-1)


def q_loss(q, value, s, a, r, s_next, terminal, gamma):
    """Eq. 12: squared error to r + γ V(s′), with V(s′) = 0 after a terminal; mean of the twins, [*seeds].

    q(s, a): [*seeds, 2, B].
    """
    with torch.no_grad():
        target = r + gamma * (1 - terminal) * value(s_next)
    return ((q(s, a) - target.unsqueeze(-2)) ** 2).mean((-2, -1))


WEIGHTINGS = {  # ω(t), Sec. 6.3; those that Fig. 8 compares, after the released code
    "sigma2": lambda alpha, sigma: sigma**2,
    "one": lambda alpha, sigma: torch.ones_like(sigma),
    "alpha_over_sigma": lambda alpha, sigma: alpha / sigma,
}


def q_gradient(q, s, a):
    """∇_a Q(s, a), shaped like a. q(s, a): [*seeds, B], one Q; ValueError for the pair of a TwinQ."""

    def total(a):
        values = q(s, a)
        if values.shape != a.shape[:-1]:
            raise ValueError(
                f"q(s, a) is {[*values.shape]}, not a value a row: take the mean of twins"
            )
        return values.sum()

    return torch.func.grad(total)(a)


def behavior_gap(noise_model, s, a, t, noise, baseline=True):
    """ε̂ − ε, or without the baseline ε̂, shaped like a: ε̂ = ε_ψ(a_t | s, t) at a_t = α_t a + σ_t ε."""
    noise_hat = noise_model(diffuse(a, t, noise), s, t)
    return noise_hat - noise if baseline else noise_hat


@torch.no_grad()  # for the result; torch.func.grad works all the same
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
):
    """Eq. 15: ∇_a Q − (1/β) ω(t) (ε̂ − ε) of each state, one sample of Eq. 14's gradient, [*seeds, B, A].

    q(s, a): [*seeds, B], one Q; noise_model: without dropout, in evaluation mode; beta: a number, or a tensor
    that broadcasts against a; weighting: of WEIGHTINGS. grad_norm: "paper" multiplies the regularizer by
    ‖∇Q‖₂ (β_norm, App. C); "released" divides ∇Q by its root mean square over the action (released code),
    which has the direction of "paper" with √A β; None does neither. ValueError for others.
    """
    if grad_norm not in (None, "paper", "released"):
        raise ValueError(f"grad_norm {grad_norm!r} is none of paper, released, None")
    grad_q = q_gradient(q, s, a)
    omega = WEIGHTINGS[weighting](*alpha_sigma(t.unsqueeze(-1)))
    regularizer = omega * behavior_gap(
        noise_model, s, a, t, noise, baseline
    )  # ω(t) (ε̂ − ε)
    if grad_norm == "paper":
        regularizer = regularizer * grad_q.norm(dim=-1, keepdim=True)
    elif grad_norm == "released":
        size = grad_q.square().mean(-1, keepdim=True).sqrt()
        grad_q = grad_q / size.clamp(min=1e-20)  # 0 stays 0, not NaN
    return grad_q - regularizer / beta


def policy_loss(a, gradient):
    """−(∂L_sur/∂a, held fixed) · π(s), [*seeds]: descending it ascends L_sur; its value means nothing."""
    return -(gradient.detach() * a).sum(-1).mean(-1)


def regression_loss(policy, s, a, advantage, temperature):
    """Eq. 2 for a policy of fixed variance: exp(temperature (Q − V)) ‖π(s) − a‖², [*seeds]. Not SRPO.

    temperature: Eq. 2's β; 0 is behavior cloning. V for Eq. 2's Z, and weights of at most 100, are IQL's.
    """
    weight = (temperature * advantage).exp().clamp(max=100)
    return (weight * ((policy(s) - a) ** 2).sum(-1)).mean(-1)


def adam(theta, gradient, m, v, count, lr, decay=0.0):
    """A step of AdamW (without decay, of Adam) with PyTorch's defaults, in place; lr may be a tensor, so that
    each seed has its own. count: the step's number, from 1, as a tensor.
    """
    m.lerp_(gradient, 1 - 0.9)
    v.mul_(0.999).addcmul_(
        gradient, gradient, value=1 - 0.999
    )  # lerp_ would make NaN of an infinite square
    m_hat = m / -torch.expm1(count * math.log(0.9))  # 1 − 0.9^count
    v_hat = v / -torch.expm1(count * math.log(0.999))
    theta.mul_(1 - lr * decay).sub_(lr * m_hat / (v_hat.sqrt() + 1e-8))


# ---------------- settings

TABLE_2 = {  # β of every task
    "halfcheetah-medium-expert-v2": 0.01, "hopper-medium-expert-v2": 0.01, "walker2d-medium-expert-v2": 0.1,
    "halfcheetah-medium-v2": 0.2, "hopper-medium-v2": 0.05, "walker2d-medium-v2": 0.05,
    "halfcheetah-medium-replay-v2": 0.2, "hopper-medium-replay-v2": 0.2, "walker2d-medium-replay-v2": 0.5,
    "antmaze-umaze-v2": 0.02, "antmaze-umaze-diverse-v2": 0.04, "antmaze-medium-play-v2": 0.08,
    "antmaze-medium-diverse-v2": 0.05, "antmaze-large-play-v2": 0.06, "antmaze-large-diverse-v2": 0.05,
}  # fmt: skip
SWEEPS = {  # β of App. C's searches
    "locomotion": (0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    "antmaze-umaze": (0.01, 0.02, 0.03, 0.04, 0.05),
    "antmaze": (0.03, 0.04, 0.05, 0.06, 0.07, 0.08),
}


def setting(default, source, choices=None):
    return dataclasses.field(
        default=default, metadata={"help": source, "choices": choices}
    )


@dataclasses.dataclass
class Settings:
    """Every setting that changes a result, with its default and its source. None: depends on the task."""

    # critic
    critic_steps: int = setting(1_500_000, "gradient steps (App. C)")
    critic_batch: int = setting(256, "rows a step (App. C)")
    critic_lr: float = setting(3e-4, "Adam's learning rate (App. C)")
    critic_width: int = setting(256, "hidden units (App. C)")
    tau: float = setting(None, "expectile of V's regression: 0.7, mazes 0.9 (App. C)")
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
    beta: tuple = setting(
        None, "β (Table 2); several, or `sweep` (App. C), train side by side"
    )
    policy_steps: int = setting(
        1_000_000, "gradient steps (App. C), the rate on a cosine to 0 (released code)"
    )
    policy_batch: int = setting(256, "rows a step (App. C)")
    policy_lr: float = setting(3e-4, "Adam's learning rate (App. C)")
    policy_width: int = setting(256, "hidden units (App. C)")
    policy_layers: int = setting(None, "hidden layers: 2, AntMaze 4 (App. C)")
    weighting: str = setting("sigma2", "ω(t) (Sec. 6.3)", tuple(WEIGHTINGS))
    baseline: bool = setting(
        True, "subtract ε from the regularizer (Sec. 4.2)", (True, False)
    )
    grad_norm: str = setting(
        None,
        "β_norm: of App. C, or of the released code (default in mazes)",
        ("none", "paper", "released"),
    )
    also: tuple = setting((), "other policies to train too", ("iql", "bc"))
    temperature: float = setting(None, "of IQL's policy: 3, mazes 10 (IQL)")
    # evaluation
    episodes: int = setting(20, "of each evaluation and seed (App. C)")
    evaluations: int = setting(20, "of a policy, after the one at its start")
    # on a GPU
    precision: str = setting(
        "tf32", "of matrix products; tf32: bfloat16 in behavior", ("tf32", "fp32")
    )

    def resolve(self, task=""):
        """Fills in what depends on the task, and returns itself; ValueError for a value out of range."""
        maze = task.startswith(("antmaze", "maze2d"))
        by_task = {
            "tau": 0.9 if maze else 0.7,
            "temperature": 10.0 if maze else 3.0,
            "policy_layers": 4 if task.startswith("antmaze") else 2,
            "grad_norm": "released" if maze else "none",
            "beta": (TABLE_2[task],)
            if task in TABLE_2
            else (0.4,)
            if maze
            else (),  # 0.4: demo
        }
        for name, value in by_task.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.beta == ("sweep",):
            self.beta = SWEEPS[
                "antmaze-umaze"
                if "umaze" in task
                else "antmaze"
                if maze
                else "locomotion"
            ]
        if (
            not self.beta
            or len(set(self.beta)) < len(self.beta)
            or "sweep" in self.beta
        ):
            raise ValueError(
                "beta must be different numbers, or sweep; Table 2 has none for other tasks"
            )
        for field in dataclasses.fields(self):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            least = (
                0
                if field.name in ("behavior_decay", "dropout", "temperature")
                else 1e-12
            )
            most = 1 - 1e-9 if field.name in ("tau", "gamma", "dropout") else 1e12
            for x in value if field.type is tuple else (value,):
                whole = field.type is not int or type(x) is int
                if not (x in choices if choices else least <= x <= most and whole):
                    raise ValueError(f"{field.name} {x} is out of range")
        return self


def layouts(settings, s_dim, a_dim):
    """{name: Layout} of App. C's networks; bind(weights) of one is the network as a function."""
    behavior = settings.behavior_width, settings.behavior_blocks, settings.dropout
    return {
        "value": Layout(partial(Value, s_dim, settings.critic_width)),
        "q": Layout(partial(TwinQ, s_dim, a_dim, settings.critic_width)),
        "noise_model": Layout(partial(NoiseModel, s_dim, a_dim, *behavior)),
        "policy": Layout(
            partial(Policy, s_dim, a_dim, settings.policy_width, settings.policy_layers)
        ),
    }


# ---------------- Algorithm 1

PURPOSES = (  # of random numbers, the initial weights' first; the place of each gives its stream
    "zeta", "phi", "psi", "theta", "critic rows", "behavior rows", "behavior time", "behavior noise",
    "behavior dropout", "srpo rows", "srpo time", "srpo noise", "iql rows", "bc rows",
)  # fmt: skip
purpose = PURPOSES.index


def algorithm_1(settings, table, sizes, seeds):
    """Algorithm 1, as run.py has it with logs; the weights() of critic, behavior model and policies.

    table: [N, 2S + A + 2], rows s | a | r | s_next | terminal; sizes: (S, A).
    """
    critic = Critic(settings, table, sizes, seeds)
    critic.run(critic.steps)
    behavior = Behavior(settings, table, sizes, seeds)
    behavior.run(behavior.steps)
    policy = Extraction(
        settings, table, sizes, seeds, critic.weights(), behavior.weights()
    )
    policy.run(policy.steps)
    return critic.weights(), behavior.weights(), policy.weights()


class Stage(Loop):
    """What the stages share. A step draws rows and noise of each seed (`draw`), takes the gradient of the sum
    of a subclass's `losses` of one seed (Loop does, for all) and descends it (`update`).
    """

    name, loss_names = "", ()
    decay, cosine = 0.0, False
    changing = (
        "theta",
        "m",
        "v",
        "alive",
        "losses",
    )  # of `state`: what a checkpoint saves

    def __init__(self, settings, table, sizes, members, **state):
        """members: (β or None, seed) along the seed axis, the first of all state; state: theta [members, P],
        and what else the losses need. A subclass sets steps, batch and lr before.
        """
        self.settings, self.table, self.sizes, self.members = (
            settings,
            table,
            sizes,
            members,
        )
        betas, seeds = zip(*members)
        state |= {
            "m": torch.zeros_like(state["theta"]),
            "v": torch.zeros_like(state["theta"]),
        }
        state["seed"] = torch.tensor(seeds, dtype=torch.int32)
        state["beta"] = torch.tensor(
            [beta or math.nan for beta in betas]
        )  # NaN: a stage without
        state["alive"] = torch.ones(len(members))
        state["losses"] = torch.zeros(
            len(members), len(self.loss_names)
        )  # sums since they were read
        in_cache = self.batch <= 512  # of a CPU, with all seeds at once
        super().__init__(state, table.device, side_by_side=table.is_cuda or in_cache)

    def noise(self, random):
        """Random inputs beside the rows."""
        return ()

    def after_update(self, state, alive):
        """What follows the update of the weights."""

    def split(self, rows):
        """Table rows as s [B, S], a [B, A], r [B], s_next [B, S], terminal [B]."""
        s_dim, a_dim = self.sizes
        s, a, r, s_next, terminal = rows.split([s_dim, a_dim, 1, s_dim, 1], -1)
        return s, a, r.squeeze(-1), s_next, terminal.squeeze(-1)

    def draw(self, state):
        """The rows [members, B, ...] and noise of this step, functions of (seed, step)."""
        random = Draw(state["seed"], self.count)
        index = random.index(
            purpose(f"{self.name} rows"), (self.batch,), len(self.table)
        )
        return self.table[index], *self.noise(random)

    @torch.no_grad()
    def update(self, state, losses, gradient):
        """A step of Adam. A seed whose loss or gradient is not finite stops where it is."""
        state["losses"].add_(losses)
        finite = losses.isfinite().all(-1) & gradient.abs().amax(-1).isfinite()
        alive = state["alive"].mul_(finite).unsqueeze(-1)
        gradient = torch.where(alive > 0, gradient, 0.0)  # keeps Adam's moments finite
        lr = self.lr * alive
        if self.cosine:
            lr = lr * (1 + torch.cos(math.pi * self.count / self.steps)) / 2
        adam(
            state["theta"],
            gradient,
            state["m"],
            state["v"],
            self.count + 1,
            lr,
            self.decay,
        )
        self.after_update(state, alive)


class Critic(Stage):
    """// Critic training (IQL): ζ ← ζ − λ_V ∇L_V (value_loss); φ ← φ − λ_Q ∇L_Q (q_loss), both at once."""

    name, loss_names = "critic", ("value_loss", "q_loss")
    changing = (*Stage.changing, "phi_target")

    def __init__(self, settings, table, sizes, seeds):
        self.steps, self.batch, self.lr = (
            settings.critic_steps,
            settings.critic_batch,
            settings.critic_lr,
        )
        self.value, self.q, *_ = layouts(settings, *sizes).values()
        zeta = self.value.fresh(seeds, purpose("zeta"))
        phi = self.q.fresh(seeds, purpose("phi"))
        members = [(None, seed) for seed in seeds]
        super().__init__(
            settings,
            table,
            sizes,
            members,
            theta=torch.cat([zeta, phi], -1),
            phi_target=phi,
        )

    def zeta_phi(self, theta):
        return theta.split([self.value.size, self.q.size], -1)

    def losses(self, theta, state, rows):
        s, a, r, s_next, terminal = self.split(rows)
        zeta, phi = self.zeta_phi(theta)
        value, q, q_target = (
            self.value.bind(zeta),
            self.q.bind(phi),
            self.q.bind(state["phi_target"]),
        )
        return (
            value_loss(value, q_target, s, a, self.settings.tau),
            q_loss(q, value, s, a, r, s_next, terminal, self.settings.gamma),
        )

    def after_update(self, state, alive):
        _, phi = self.zeta_phi(state["theta"])
        state["phi_target"].add_(
            self.settings.target_rate * alive * (phi - state["phi_target"])
        )

    def watched(self, state, rows):
        s, a, *_ = self.split(rows)
        zeta, phi = self.zeta_phi(state["theta"])
        return {
            "q": self.q.bind(phi)(s, a).mean(),
            "v": self.value.bind(zeta)(s).mean(),
        }

    def weights(self):
        """State dicts, each tensor [seeds, ...]."""
        zeta, phi = self.zeta_phi(self.state["theta"])
        q_target = self.q.copies(self.state["phi_target"])
        return {
            "value": self.value.copies(zeta),
            "q": self.q.copies(phi),
            "q_target": q_target,
        }


class Behavior(Stage):
    """// Behavior training: ψ ← ψ − λ_μ ∇L_μ (behavior_loss)."""

    name, loss_names = "behavior", ("behavior_loss",)

    def __init__(self, settings, table, sizes, seeds):
        self.steps, self.batch = settings.behavior_steps, settings.behavior_batch
        self.lr, self.decay = settings.behavior_lr, settings.behavior_decay
        self.noise_model = layouts(settings, *sizes)["noise_model"]
        supported = table.is_cuda and torch.cuda.is_bf16_supported(
            including_emulation=False
        )
        self.bfloat16 = settings.precision == "tf32" and supported
        psi = self.noise_model.fresh(seeds, purpose("psi"))
        frequencies = self.noise_model.tensors(psi)[
            "frequencies"
        ].clone()  # in ψ too, but not trained
        members = [(None, seed) for seed in seeds]
        super().__init__(
            settings, table, sizes, members, theta=psi, frequencies=frequencies
        )

    def noise(self, random):
        t = random.uniform(purpose("behavior time"), (self.batch,))
        noise = random.normal(purpose("behavior noise"), (self.batch, self.sizes[1]))
        shape = self.settings.behavior_blocks, self.batch, self.settings.behavior_width
        return (
            t,
            noise,
            random.keep(purpose("behavior dropout"), shape, self.settings.dropout),
        )

    def after_update(self, state, alive):
        self.noise_model.tensors(state["theta"])["frequencies"].copy_(
            state["frequencies"]
        )

    def losses(self, theta, state, rows, t, noise, keep):
        s, a, *_ = self.split(rows)
        network = self.noise_model.bind(theta)

        def noise_model(
            a_t, s, t
        ):  # a cache of casts would be stale when the step is replayed
            with torch.autocast(
                self.table.device.type,
                torch.bfloat16,
                self.bfloat16,
                cache_enabled=False,
            ):
                return network(a_t, s, t, keep)

        return (behavior_loss(noise_model, s, a, t, noise),)

    def weights(self):
        """A state dict, each tensor [seeds, ...]."""
        return self.noise_model.copies(self.state["theta"])


class PolicyStage(Stage):
    """Trains a policy for each β and seed, critic and behavior model fixed."""

    cosine = True

    def __init__(self, settings, table, sizes, seeds, critic, behavior, betas=(None,)):
        """critic, behavior: the weights() of those stages."""
        self.steps, self.batch, self.lr = (
            settings.policy_steps,
            settings.policy_batch,
            settings.policy_lr,
        )
        self.value, self.q, self.noise_model, self.policy = layouts(
            settings, *sizes
        ).values()
        state = {
            "theta": self.policy.fresh(seeds, purpose("theta")),
            "zeta": self.value.flatten(critic["value"]),
            "phi_target": self.q.flatten(critic["q_target"]),
            "psi": self.noise_model.flatten(behavior),
        }
        state = {name: flat.repeat(len(betas), 1) for name, flat in state.items()}
        super().__init__(
            settings,
            table,
            sizes,
            [(beta, seed) for beta in betas for seed in seeds],
            **state,
        )

    def watched(self, state, rows, *noise):
        s, *_ = self.split(rows)
        q, value = self.q.bind(state["phi_target"]), self.value.bind(state["zeta"])
        return {
            "q": q(s, self.policy.bind(state["theta"])(s)).mean(),
            "v": value(s).mean(),
        }

    def weights(self):
        """A state dict, each tensor [βs · seeds, ...], the first β's seeds first."""
        return self.policy.copies(self.state["theta"])


class Extraction(PolicyStage):
    """// Policy extraction: θ ← θ + λ_π ∇L_sur (surrogate_gradient)."""

    name, loss_names = "srpo", ("policy_loss",)

    def __init__(self, settings, table, sizes, seeds, critic, behavior):
        super().__init__(settings, table, sizes, seeds, critic, behavior, settings.beta)

    def noise(self, random):
        t = 0.02 + 0.96 * random.uniform(
            purpose("srpo time"), (self.batch,)
        )  # U(0.02, 0.98), Sec. 4.2
        return t, random.normal(purpose("srpo noise"), (self.batch, self.sizes[1]))

    def q_and_noise_model(self, state):
        """The mean of the target twins (released code); no dropout."""
        twins = self.q.bind(state["phi_target"])
        return lambda s, a: twins(s, a).mean(-2), self.noise_model.bind(state["psi"])

    def losses(self, theta, state, rows, t, noise):
        s, *_ = self.split(rows)
        a = self.policy.bind(theta)(s)
        q, noise_model = self.q_and_noise_model(state)
        grad_norm = (
            None if self.settings.grad_norm == "none" else self.settings.grad_norm
        )
        how = state["beta"], self.settings.weighting, self.settings.baseline, grad_norm
        gradient = surrogate_gradient(q, noise_model, s, a, t, noise, *how)
        return (policy_loss(a, gradient),)

    def watched(self, state, rows, t, noise):
        s, *_ = self.split(rows)
        a = self.policy.bind(state["theta"])(s)
        q, noise_model = self.q_and_noise_model(state)
        gaps = {
            "grad_q": q_gradient(q, s, a),
            "noise_gap": behavior_gap(noise_model, s, a, t, noise),
        }
        return super().watched(state, rows) | {
            name: gap.norm(dim=-1).mean() for name, gap in gaps.items()
        }


class WeightedRegression(PolicyStage):
    """IQL's policy on the same critic."""

    name, loss_names = "iql", ("regression_loss",)
    temperature = property(lambda self: self.settings.temperature)

    def losses(self, theta, state, rows):
        s, a, *_ = self.split(rows)
        q, value = self.q.bind(state["phi_target"]), self.value.bind(state["zeta"])
        advantage = q(s, a).amin(-2) - value(s)
        return (
            regression_loss(self.policy.bind(theta), s, a, advantage, self.temperature),
        )


class BehaviorCloning(WeightedRegression):
    """Regression without weights."""

    name, temperature = "bc", 0.0


STAGES = {
    stage.name: stage
    for stage in (Critic, Behavior, Extraction, WeightedRegression, BehaviorCloning)
}
