"""The proof: every equation of SRPO on analytic Gaussians, then Algorithm 1 beside plain PyTorch.

The reference is always something else than the code: a closed form, torch.distributions, autograd of the
objective, torch.optim. ρ = σ²/α²: KL[π_t‖μ_t] is that of π and μ, both widened by N(0, ρ I).
"""

import itertools
import math
import os
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import (
    Categorical,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)
from torch.nn import functional as F

import srpo
from diffusion import (
    alpha_sigma,
    behavior_loss,
    diffuse,
    drift_diffusion,
    log_likelihood,
    sample,
    score,
)
from models import NoiseModel, Policy, TwinQ, Value
from seeds import GRAPH_STEPS, Draw, Layout
from srpo import Settings, adam, policy_loss, q_loss, surrogate_gradient, value_loss

torch.set_num_threads(1)
F32, F64 = torch.float32, torch.float64
SHAPES = pytest.mark.parametrize(
    "seeds", [(), (1,), (6,)], ids=["no_seed_axis", "one_seed", "six_seeds"]
)
LONG = os.environ.get("LONG")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tensor(x):
    return torch.tensor(x, dtype=F64)


def near(x, reference, atol=1e-10, rtol=0.0):
    reference = torch.as_tensor(reference, dtype=x.dtype).expand_as(x).detach()
    torch.testing.assert_close(
        x.detach(), reference, atol=float(atol), rtol=rtol, equal_nan=True
    )


def scales(t):
    """α, σ and ρ of the VP-SDE, by way of ρ = exp(∫ β) − 1, ∫ β = 0.1 t + 9.95 t²."""
    rho = torch.expm1(0.1 * t + 9.95 * t**2)
    return (1 + rho).rsqrt(), (rho / (1 + rho)).sqrt(), rho


def omega(weighting, t):
    alpha, sigma, _ = scales(t)
    return {
        "sigma2": sigma**2,
        "one": torch.ones_like(t),
        "alpha_over_sigma": alpha / sigma,
    }[weighting]


def nodes(t=None):
    """Times and weights of an average over U(0.02, 0.98), by quadrature; or of one time."""
    u, weight = map(tensor, np.polynomial.legendre.leggauss(32))
    return (0.5 + 0.48 * u, weight / 2) if t is None else (tensor([t]), tensor([1.0]))


def hermite(count):
    """Nodes and weights of an average over ε ~ N(0, 1), by quadrature."""
    x, w = map(tensor, np.polynomial.hermite_e.hermegauss(count))
    return x, w / w.sum()


def kappa(weighting, width):
    """E_t ω σ α / (α² width² + σ²): how strongly Eq. 15 pulls to the mean of N(m, width²)."""
    t, weight = nodes()
    alpha, sigma, _ = scales(t)
    return weight @ (
        omega(weighting, t) * sigma * alpha / (alpha**2 * width**2 + sigma**2)
    )


class Mixture:
    """The behavior Σ_k w_k N(m_k, S_k) diffused exactly, with ε* = −σ ∇ log μ_t by autograd."""

    def __init__(self, w, m, S):
        self.w, self.m, self.S = tensor(w), tensor(m), tensor(S)

    def density(self, t):
        alpha, sigma, _ = (x[..., None, None] for x in scales(t))
        C = alpha[..., None] ** 2 * self.S + sigma[..., None] ** 2 * torch.eye(
            self.m.shape[-1]
        )
        w = Categorical(self.w.expand(*t.shape, -1))
        return MixtureSameFamily(w, MultivariateNormal(alpha * self.m, C))

    def noise_model(self, a_t, s, t):
        with torch.enable_grad():
            a_t = a_t if a_t.requires_grad else a_t.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(
                self.density(t).log_prob(a_t).sum(), a_t, create_graph=True
            )
        return -scales(t)[1].unsqueeze(-1) * gradient


WIDE = Mixture(
    [1.0],
    [[0.3, -0.5, 0.2]],
    [[[0.30, 0.12, 0.00], [0.12, 0.20, -0.05], [0.00, -0.05, 0.08]]],
)
LINE = Mixture([0.3, 0.7], [[-1.0], [0.8]], [[[0.05]], [[0.1]]])  # in one dimension
TWO_MODES = Mixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.05]], [[0.05]]])


def gaussian(m, width):
    """ε* of N(m, width²) in each dimension; m(s), or a number or tensor; width may carry seed axes."""

    def noise_model(a_t, s, t):
        alpha, sigma, _ = scales(t.unsqueeze(-1))
        return (
            sigma
            * (a_t - alpha * (m(s) if callable(m) else m))
            / (alpha**2 * width**2 + sigma**2)
        )

    return noise_model


def descent(noise_model, a, weighting="sigma2", t=None, noises=2, **more):
    """Mean and mean square of −∂L_sur/∂a, which is ω (ε̂ − ε) if Q = 0, of actions [..., d].

    By quadrature over ε and t ~ U(0.02, 0.98), or at one t. Two nodes, ε = ±1, are exact for a Gaussian
    behavior, whose ε* is affine in ε; a mixture wants 64.
    """
    t, v = nodes(t)
    x, w = hermite(noises)
    t, x = (grid.reshape(-1) for grid in torch.meshgrid(t, x, indexing="ij"))
    weights = torch.outer(v, w).reshape(-1)
    a = a.detach().unsqueeze(-2).expand(*a.shape[:-1], len(t), -1)
    more = {"q": lambda s, a: 0 * a.sum(-1), "beta": 1, "weighting": weighting, **more}
    t, noise = t.expand(a.shape[:-1]), x.unsqueeze(-1).expand_as(a)
    rows = -surrogate_gradient(
        noise_model=noise_model, s=None, a=a, t=t, noise=noise, **more
    )
    return weights @ rows, weights @ rows**2


# ------------------------------------------- Eq. 4: a_t = α a + σ ε, α² = exp(−∫ β), α² + σ² = 1


@pytest.mark.parametrize(
    "dtype, sigma_tolerance, alpha_tolerance",
    [(F64, 1e-12, 1e-12), (F32, 5e-7, 1.5e-6)],  # |log α| = 5 amplifies α's rounding
)
def test_eq4_scales_have_all_their_digits(dtype, sigma_tolerance, alpha_tolerance):
    t = tensor([1e-7, 1e-3, 0.02, 0.5, 0.98, 1]).to(
        dtype
    )  # at 1e-7 sqrt(1 − α²) is 0 in float32
    alpha, sigma, _ = scales(t.double())
    ours = alpha_sigma(t)
    near(ours[0] / alpha, 1, alpha_tolerance)
    near(ours[1] / sigma, 1, sigma_tolerance)


# ------------------- Eq. 6: ∇ log μ_t(a_t) = −ε* / σ_t; Eq. 7: da_t/dt = f a_t + g²/(2σ) ε* keeps quantiles


@SHAPES
def test_eq6_score_is_the_gradient_of_the_log_density(seeds):
    t = tensor([1e-3, 0.02, 0.3, 0.98]).expand(*seeds, 4)
    a_t = torch.randn(*seeds, 4, 1, dtype=F64).requires_grad_()
    normal = Mixture([1.0], [[0.4]], [[[0.09]]])
    for behavior, noise_model in (normal, gaussian(0.4, 0.3)), (LINE, LINE.noise_model):
        (reference,) = torch.autograd.grad(behavior.density(t).log_prob(a_t).sum(), a_t)
        near(score(noise_model, a_t, None, t), reference, rtol=1e-11)


def test_eq7_drift_and_diffusion_belong_to_the_schedule():
    t = torch.linspace(1e-3, 1, 9, dtype=F64).requires_grad_()
    alpha, sigma, _ = scales(t)
    f, growth = (
        torch.autograd.grad(x.sum(), t, retain_graph=True)[0]
        for x in (alpha.log(), sigma**2)
    )
    near(drift_diffusion(t)[0], f)
    near(drift_diffusion(t)[1], growth - 2 * f * sigma**2)


@pytest.mark.parametrize(
    "behavior, shape", [(WIDE, (6, 4, 3)), (LINE, (9, 1))], ids=["affine", "quantile"]
)
def test_eq7_carries_a_gaussian_by_its_affine_map_and_a_mixture_by_its_quantile_map(
    behavior, shape
):
    def quantiles(t, a_t):  # along each axis of S
        (alpha, sigma, _), (variances, axes) = (
            scales(tensor(t)),
            torch.linalg.eigh(behavior.S),
        )
        z = torch.einsum(
            "...kd,kde->...ke", a_t.unsqueeze(-2) - alpha * behavior.m, axes
        )
        return behavior.w @ Normal(0, (alpha**2 * variances + sigma**2).sqrt()).cdf(z)

    a_1, errors = torch.randn(shape, dtype=F64), []
    for steps in (100, 200, 400):
        with torch.no_grad():
            a_0 = sample(behavior.noise_model, None, a_1, steps)
        errors.append((quantiles(0.0, a_0) - quantiles(1.0, a_1)).abs().max())
    assert errors[2] < 3e-4 and all(
        3 < x / y < 5 for x, y in zip(errors, errors[1:])
    )  # of second order
    at_1 = behavior.density(
        tensor(1.0)
    ).log_prob  # N(0, I) would be off by α₁ m·a₁, up to 2e-2
    exact = behavior.density(tensor(0.0)).log_prob(a_0)
    near(log_likelihood(behavior.noise_model, None, a_0, 100, at_1), exact, 1e-4)
    standard = gaussian(0, 1)  # which stands still, and is the end if not told
    near(log_likelihood(standard, None, a_1, 2), Normal(0, 1).log_prob(a_1).sum(-1))


# -------- Eq. 11: V = argmin E L₂^τ(min Q − V): Σ w_i (Q_i − V) = 0, w = τ or 1 − τ; Eq. 12: Q = r + γ V(s′)


@SHAPES
@pytest.mark.parametrize("tau", [0.7, 0.9])
def test_eq11_and_eq12_solve_a_two_state_chain(tau, seeds, gamma=0.99):
    """A: r = 0 to B, or r = 1 and the end. B: r = 1 to A, or r = 0 to A at a time limit: not the end.

    V_B = γ V_A + τ, and V_A = (1 − τ) + τ γ V_B.
    """
    v_a = (1 - tau + tau**2 * gamma) / (1 - tau * gamma**2)
    v_b = gamma * v_a + tau
    exact_q = [gamma * v_b, 1, 1 + gamma * v_a, gamma * v_a]
    better, worse = tau, 1 - tau  # the weights of an action above V and of one below
    squares = [(q - v) ** 2 for q, v in zip(exact_q, (v_a, v_a, v_b, v_b))]
    least = sum(w * x for w, x in zip((better, worse, better, worse), squares)) / 4
    rows = tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]])
    s, s_next, r, terminal = (row.expand(*seeds, 4) for row in rows)
    v = tensor([v_a, v_b]).expand(*seeds, 2).requires_grad_()
    larger = tensor(
        [[0, 2, 0, 2], [2, 0, 2, 0]]
    )  # one of the twins, which Eq. 11 does not see
    q = (tensor(exact_q) + larger).expand(*seeds, 2, 4).requires_grad_()
    value, twins = lambda s: v.gather(-1, s.long()), lambda s, a: q
    losses = (
        value_loss(value, twins, s, 0, tau),
        q_loss(twins, value, s, 0, r, s_next, terminal, gamma),
    )
    slopes = [
        torch.autograd.grad(loss.sum(), (v, q), allow_unused=True) for loss in losses
    ]
    assert (
        slopes[0][1] is None
        and slopes[1][0] is None
        and losses[0].shape == losses[1].shape == seeds
    )
    near(losses[0], least)
    near(slopes[0][0], 0)
    near(slopes[1][1], larger / 4)  # of the mean of eight squares


# ------- Eq. 13: ε* = argmin E ‖ε_ψ(a_t | s, t) − ε‖², for a Gaussian affine; its minimum d − σ² tr C⁻¹


@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_eq13_regression_recovers_the_exact_noise_model(t):
    m, width, (alpha, sigma, _) = (
        tensor([0.2, -0.5]),
        tensor([0.3, 0.6]),
        scales(tensor(t)),
    )
    a = m + width * tensor(
        [[1], [1], [-1], [-1]]
    )  # with noise ±1: all the moments that matter
    s, t, noise = (
        m.expand(4, 2),
        tensor(t).expand(4),
        tensor([[1], [-1], [1], [-1]]).expand(4, 2),
    )
    p, exact = tensor([[1, 1], [0, 0]]).requires_grad_(), gaussian(lambda s: s, width)
    loss = behavior_loss(
        lambda a_t, s, t: p[0] * exact(a_t, s, t) + p[1], s, a, t, noise
    )
    near(loss, (1 - sigma**2 / (alpha**2 * width**2 + sigma**2)).sum())
    near(torch.autograd.grad(loss, p)[0], 0)  # and the loss is convex


# ------------------- Eq. 14: E Q − (1/β) E_t ω (σ/α) KL[π_t‖μ_t]; Eq. 15: its gradient ∇Q − (1/β) ω (ε* − ε)


@SHAPES
@pytest.mark.parametrize("weighting", ["sigma2", "one", "alpha_over_sigma"])
@pytest.mark.parametrize("t", [0.02, 0.1, 0.3, 0.6, 0.98])
def test_eq15_is_the_gradient_of_eq14(weighting, seeds, t):
    a, beta = (
        torch.randn(*seeds, 3, dtype=F64).requires_grad_(),
        0.5 + torch.rand(seeds, dtype=F64),
    )
    (alpha, sigma, rho), q = scales(tensor(t)), lambda s, a: -(a**2).sum(-1)
    S = rho * torch.eye(3, dtype=F64)
    kl = kl_divergence(
        MultivariateNormal(a, S), MultivariateNormal(WIDE.m[0], WIDE.S[0] + S)
    )
    objective = q(None, a) - omega(weighting, tensor(t)) * sigma / alpha * kl / beta
    (reference,) = torch.autograd.grad(objective.sum(), a)
    ours, _ = descent(
        WIDE.noise_model, a, weighting, t, beta=beta[..., None, None], q=q
    )
    near(-ours, reference, 1e-9)
    assert not ours.requires_grad


@pytest.mark.parametrize("weighting", ["sigma2", "one", "alpha_over_sigma"])
def test_eq15_is_the_gradient_of_eq14_for_a_mixture(weighting):
    a = tensor([-0.9, 0.1, 0.4]).requires_grad_()
    t, weight = nodes()
    alpha, sigma, _ = scales(t)
    x, w = hermite(64)
    a_t = (alpha[:, None] * a[:, None, None] + sigma[:, None] * x).unsqueeze(
        -1
    )  # [3, t, ε, 1]
    log_mu = LINE.density(t[:, None].expand(a_t.shape[:-1])).log_prob(
        a_t
    )  # the part of KL[π_t‖μ_t] that
    regularizer = -(log_mu @ w) @ (
        weight * omega(weighting, t) * sigma / alpha
    )  # moves with a
    (reference,) = torch.autograd.grad(regularizer.sum(), a)
    ours, _ = descent(LINE.noise_model, a[:, None], weighting, noises=64)
    near(ours[:, 0], reference)


def test_eq10_is_the_limit_of_eq15_at_the_rate_rho():
    a, solve = (
        torch.randn(4, 3, dtype=F64),
        partial(torch.linalg.solve, WIDE.S[0], left=False),
    )
    limit = solve(a - WIDE.m[0])  # −∇ log μ
    for t in (1e-3, 1e-4, 1e-5):
        rho, (ours, _) = (
            scales(tensor(t))[2],
            descent(WIDE.noise_model, a, "alpha_over_sigma", t),
        )
        near((limit - ours) / rho, solve(limit), 0.02, rtol=float(50 * rho))


# ------------------- Baseline: E ω ε = 0; Var ω ε* = ω² c², Var ω (ε* − ε) = ω² (1 − c)², c = ρ/(ρ + width²)


@pytest.mark.parametrize(
    "weighting, width, helps",  # a Dirac, of width 0, leaves no noise at all
    [("sigma2", 0, True), ("sigma2", 0.1, True), ("sigma2", 1, True), ("one", 1, True)]
    + [("alpha_over_sigma", 0.1, True), ("alpha_over_sigma", 1, False)],
)
def test_baseline_cuts_the_variance_save_for_wide_data_and_alpha_over_sigma(
    weighting, width, helps
):
    (t, weight), model = nodes(), gaussian(0.4, width)
    c = scales(t)[2] / (scales(t)[2] + width**2)
    off, on = (weight @ (omega(weighting, t) * x) ** 2 for x in (c, 1 - c))
    a = tensor([[0.4], [0.9]])  # at the data's mean, and beside it
    without, with_it = (
        descent(model, a, weighting, baseline=baseline) for baseline in (False, True)
    )
    near(with_it[0], without[0])
    near(without[1][0], off)
    near(with_it[1][0], on)
    assert (on < off) == helps


def test_baseline_in_one_sample_has_its_sign():
    (alpha, sigma, _), a, m, width, noise = scales(tensor(0.3)), 0.5, 0.2, 0.3, 1.2
    noise_hat = (
        sigma
        * (alpha * a + sigma * noise - alpha * m)
        / (alpha**2 * width**2 + sigma**2)
    )
    row = gaussian(m, width), None, tensor([[a]]), tensor([0.3]), tensor([[noise]]), 0.1
    for baseline, gap in (True, noise_hat - noise), (False, noise_hat):
        near(
            surrogate_gradient(lambda s, a: 2 * a.sum(-1), *row, baseline=baseline),
            2 - 10 * sigma**2 * gap,
        )


# ------------------------------- β_norm = β / ‖∇Q‖₂ (paper), or ∇Q over its root mean square (released code)


@pytest.mark.parametrize("d", [1, 3, 8])
def test_grad_norm_takes_the_norm_of_each_row_alone(d):
    c = torch.randn(4, d) * torch.tensor(
        [[1e-6], [10.0], [0.0], [1e-30]]
    )  # ∇Q; 1e-60 is 0 in float32
    (a, noise), t = torch.randn(2, 4, d), torch.tensor([0.02, 0.3, 0.5, 0.7])
    row = gaussian(0.2, 0.3), None, a, t, noise, 0.05
    ours = partial(surrogate_gradient, lambda s, a: (c * a).sum(-1), *row)
    norm, pull = c.double().norm(dim=-1, keepdim=True), ours() - c
    near(
        ours(grad_norm="paper"), c + norm * pull, 1e-5, rtol=1e-5
    )  # ∇Q = 0: no update at all ...
    unit = c / norm.clamp(min=1e-20)
    near(
        ours(grad_norm="released"), math.sqrt(d) * unit + pull, 1e-5, rtol=1e-5
    )  # ... or towards the data
    with pytest.raises(ValueError, match="papre"):
        ours(grad_norm="papre")
    with pytest.raises(ValueError, match="mean of twins"):
        surrogate_gradient(lambda s, a: (c * a).sum(-1).expand(2, -1), *row)


# --------------- Prop. 1: KL[π_t‖μ_t] = 0 only for π = μ. Remark 1: yet a Dirac actor's optimum moves with t


@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_prop1_diffusion_can_be_divided_out_of_the_characteristic_function(t):
    (x, w), u = hermite(64), torch.linspace(-3, 3, 7, dtype=F64)
    a, share, (alpha, sigma, _) = (
        tensor([-0.7, 0.1, 0.9]),
        tensor([0.2, 0.3, 0.5]),
        scales(tensor(t)),
    )
    a_t = (
        diffuse(a.view(3, 1, 1), tensor(t).expand(3, 64), x.view(64, 1)) * u
    )  # [3, 64, 7]
    phi_t = torch.einsum("i,j,iju->u", share, w, torch.cos(a_t))
    phi = share @ torch.cos(alpha * a[:, None] * u)
    near(phi_t * torch.exp(sigma**2 * u**2 / 2), phi)  # so μ_t determines μ


@pytest.mark.parametrize(
    "t, weighting, merged",
    [(0.05, "one", False), (0.15, "one", False), (0.22, "one", True)]
    + [(None, "alpha_over_sigma", False), (None, "one", False), (None, "sigma2", True)],
)
def test_remark1_two_modes_within_the_action_range_merge_at_large_t_and_under_sigma2(
    t, weighting, merged
):
    """ε* of two modes N(±1, v): σ (x − α tanh(α x / W)) / W, W = α² v + σ². Merged, all are pulled to 0."""
    a, (times, weight), (x, w) = (
        torch.linspace(0.01, 1.2, 60).double(),
        nodes(t),
        hermite(64),
    )
    alpha, sigma, _ = (scale[:, None] for scale in scales(times))
    a_t, W = (
        alpha * a[:, None, None] + sigma * x,
        alpha**2 * 0.05 + sigma**2,
    )  # [60, t, ε]
    noise = sigma * (a_t - alpha * torch.tanh(alpha * a_t / W)) / W
    reference = (noise - x) @ w @ (weight * omega(weighting, times))
    ours, _ = descent(TWO_MODES.noise_model, a[:, None], weighting, t, noises=64)
    near(ours[:, 0], reference)
    assert bool((reference > 0).all()) == merged


# -------- End to end: Q = c·a: a* = m + β κ⁻¹ c; Q = −‖a − q‖²: (2 + κ/β)⁻¹ (2 q + κ m/β); κ = E_t ω σ α C⁻¹


@pytest.mark.parametrize("weighting", ["sigma2", "one", "alpha_over_sigma"])
def test_adam_on_eq15_reaches_the_optimum(weighting):
    widths = [0.1, 0.3, 1.0]
    pull, behavior = (
        torch.stack([kappa(weighting, x) for x in widths]),
        gaussian(0.2, tensor(widths * 2).view(6, 1, 1)),
    )
    theta, m, v = torch.zeros(3, 6, 1, dtype=F64)  # six actors: three widths, two Q

    def q(s, a):
        return torch.cat([a[:3], -((a[3:] - 1.5) ** 2)]).sum(-1)

    for k in range(400):
        gradient, _ = descent(behavior, theta, weighting, beta=0.1, q=q)
        a = theta.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(
            policy_loss(a.unsqueeze(1), -gradient.unsqueeze(1)).sum(), a
        )
        adam(
            theta,
            gradient,
            m,
            v,
            tensor(k + 1.0),
            0.05 * (1 + math.cos(math.pi * k / 400)),
        )
    near(
        theta[:, 0],
        torch.cat([0.2 + 0.1 / pull, (3 + 2 * pull) / (2 + 10 * pull)]),
        1e-6,
    )


# ------------------------------------------------------------------ Algorithm 1: networks, optimizer, stages

ROWS = torch.randn(
    200, 10, generator=torch.Generator().manual_seed(1)
)  # s, a, r, s′, terminal
ROWS[:, 9] = (ROWS[:, 9] > 0).float()
STAGES = pytest.mark.parametrize("name", list(srpo.STAGES))


def tiny(**options):
    small = {
        "target_rate": 0.3,
        "behavior_blocks": 2,
        "behavior_decay": 0.1,
        "dropout": 0.25,
    }
    for kind in ("critic", "behavior", "policy"):
        small |= {
            f"{kind}_steps": 8,
            f"{kind}_batch": 16,
            f"{kind}_width": 8,
            f"{kind}_lr": 1e-2,
        }
    return Settings(**{**small, **options}).resolve("hopper-medium-v2")


def build(name, seeds, table=ROWS, sizes=(3, 2), dtype=F64, **options):
    """A tiny stage, its learning and target rates large enough to see; its random numbers stay float32's."""
    settings, trained = tiny(**options), []
    if name not in ("critic", "behavior"):
        before = ("critic", "behavior")
        trained = [
            build(kind, seeds, table, sizes, dtype, **options).weights()
            for kind in before
        ]
        trained[0]["q_target"] = {
            key: -3 * x for key, x in trained[0]["q_target"].items()
        }  # not Q itself
    torch.set_default_dtype(dtype)
    try:
        stage = srpo.STAGES[name](settings, table.to(dtype), sizes, seeds, *trained)
    finally:
        torch.set_default_dtype(F32)
    noise = stage.noise
    stage.noise = lambda random: [
        x.to(dtype) if x.is_floating_point() else x for x in noise(random)
    ]
    return stage


def take(steps, *stages):
    for stage in stages:
        stage.run(steps)


def module(layout, flat):
    """The network itself with these weights [P], as a module."""
    network = layout.build().to(flat.dtype).eval()
    network.load_state_dict(layout.tensors(flat))
    return network


@pytest.mark.parametrize(
    "name, layers, options",
    [
        ("critic", 2, {}),
        ("behavior", 2, {}),
        ("iql", 2, {}),
        ("bc", 2, {}),
        ("srpo", 2, {}),
    ]
    + [
        ("srpo", 4, {"grad_norm": "released"}),
        ("srpo", 2, {"weighting": "one", "baseline": False}),
    ],
)
def test_a_stage_is_a_plain_loop_of_torch_optim(name, layers, options):
    """Eight steps with the same rows and noise have the same losses and end at the same weights."""
    stage, draws, losses = (
        build(name, [7], beta=(0.5,), policy_layers=layers, **options),
        [],
        0,
    )
    draw, gradient, update = stage.functions
    stage.functions = (
        lambda state: draws.append(draw(state)) or draws[-1],
        gradient,
        update,
    )
    first = {key: x[0].clone() for key, x in stage.state.items()}
    take(8, stage)
    if name == "behavior":
        trained = noise_model = module(stage.noise_model, first["theta"])
    else:
        zeta, phi = (
            stage.zeta_phi(first["theta"])
            if name == "critic"
            else (first["zeta"], None)
        )
        value, q_target = (
            module(stage.value, zeta),
            module(stage.q, first["phi_target"]),
        )
    if name == "critic":
        q = module(stage.q, phi)
        trained = nn.ModuleList([value, q])
    elif name != "behavior":
        trained = module(stage.policy, first["theta"])
    if name == "srpo":
        noise_model = module(stage.noise_model, first["psi"])
    decay = 0.1 if name == "behavior" else 0.0
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, weight_decay=decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for rows, *noise in draws:
        rows, noise = rows[0], [x[0] for x in noise]
        s, a, r, s_next, terminal = (
            rows[:, :3],
            rows[:, 3:5],
            rows[:, 5],
            rows[:, 6:9],
            rows[:, 9],
        )
        if name == "critic":
            loss = (
                value_loss(value, q_target, s, a, 0.7),
                q_loss(q, value, s, a, r, s_next, terminal, 0.99),
            )
        elif name == "behavior":
            t, noise, keep = noise
            loss = (behavior_loss(partial(noise_model, keep=keep), s, a, t, noise),)
        elif name == "srpo":
            mean, pi = (lambda s, a: q_target(s, a).mean(0)), trained(s)
            ascent = surrogate_gradient(
                mean, noise_model, s, pi, *noise, 0.5, **options
            )
            loss = (-(ascent * pi).sum(1).mean(),)
        else:
            advantage = q_target(s, a).min(0).values - value(s)
            weight = (3 * advantage).exp().clamp(max=100) if name == "iql" else 1
            loss = ((weight * ((trained(s) - a) ** 2).sum(1)).mean(),)
        optimizer.zero_grad()
        sum(loss).backward()
        optimizer.step()
        losses = losses + tensor([x.item() for x in loss])
        if name == "critic":
            for old, new in zip(q_target.parameters(), q.parameters()):
                old.data.lerp_(new.data, 0.3)
        elif name != "behavior":
            cosine.step()
    ours = stage.weights()
    pairs = [(ours, trained)]
    if name == "critic":
        pairs = (ours["value"], value), (ours["q"], q), (ours["q_target"], q_target)
    for weights, network in pairs:
        for key, x in network.state_dict().items():
            near(weights[key][0], x, 1e-6)  # the step's number is float32
    near(stage.state["losses"][0], losses, 1e-5)
    watched, expected, (rows, *noise) = (
        stage.watch(),
        {},
        (x[0] for x in stage.draw(stage.state)),
    )
    s, a, *_ = stage.split(rows)
    if name != "behavior":
        a, q = (a, q) if name == "critic" else (trained(s), q_target)
        expected = {"q": q(s, a).mean(), "v": value(s).mean()}
    if name == "srpo":
        (grad_q,) = torch.autograd.grad(len(s) * expected["q"], a, retain_graph=True)
        gap = noise_model(diffuse(a, *noise), s, noise[0]) - noise[1]
        expected |= {
            "grad_q": grad_q.norm(dim=1).mean(),
            "noise_gap": gap.norm(dim=1).mean(),
        }
    assert {*watched} == {*expected}
    for key in watched:
        near(watched[key][0], expected[key], 1e-6)


def test_algorithm_1_takes_its_three_stages_to_their_ends():
    table, sizes, seeds = ROWS, (3, 2), [0, 1]
    critic, behavior = (
        srpo.STAGES[name](tiny(), table, sizes, seeds)
        for name in ("critic", "behavior")
    )
    take(8, critic, behavior)
    policy = srpo.Extraction(
        tiny(), table, sizes, seeds, critic.weights(), behavior.weights()
    )
    take(8, policy)
    assert torch.equal(policy.state["phi_target"], critic.state["phi_target"])  # not φ
    expected = critic.weights(), behavior.weights(), policy.weights()
    torch.testing.assert_close(
        srpo.algorithm_1(tiny(), table, sizes, seeds), expected, atol=0, rtol=0
    )


@STAGES
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize(
    "spoil",
    [lambda x: 0 / x.detach(), lambda x: x.sqrt() - x],
    ids=["loss", "gradient"],
)
def test_a_seed_trains_as_if_alone_even_if_one_stops_at_its_last_finite_weights(
    name, side_by_side, spoil
):
    batch = 16 if side_by_side else 513  # above 512 one seed at a time
    one = {
        "beta": (0.1,),
        "critic_batch": batch,
        "behavior_batch": batch,
        "policy_batch": batch,
    }
    six = build(name, [0, 1, 2, 3, 4, 5], **one | {"beta": (0.3, 0.1)})
    alone, stopped, losses_of = (
        build(name, [4], **one),
        build(name, [1], **one),
        six.losses,
    )
    assert len(six.turns) == (1 if side_by_side else len(six.members))

    def losses(theta, state, *inputs):
        ill = ((state["seed"] == 1) & (six.count == 1)).double()
        spoiled = spoil(
            1 - ill + 0 * theta.sum()
        )  # 0, but for the ill NaN or of a gradient NaN
        first, *others = losses_of(theta, state, *inputs)
        return first + spoiled - spoil(torch.ones(())), *others

    six.losses = losses
    take(1, stopped)
    take(4, six, alone)
    assert six.members[-2] == alone.members[0]
    for key, x in six.state.items():
        near(
            x[-2], alone.state[key][0], 1e-9 if side_by_side else 0
        )  # sums in another order
    for key in {"theta", "phi_target"} & {*six.state}:
        near(six.state[key][-5], stopped.state[key][0], 1e-9 if side_by_side else 0)
    for key, x in alone.watch().items():
        near(six.watch()[key][-2], x[0], 1e-9)
    assert six.state["alive"].tolist() == [seed != 1 for _, seed in six.members]
    assert all(six.state[key].isfinite().all() for key in "mv")


def test_extraction_reaches_the_optimum_of_states_it_has_not_seen():
    """A policy of two layers, a behavior N(0.4 s, 0.3²), twins of mean slope 1: a* = 0.4 s + β/κ."""
    table = torch.rand(500, 5, generator=torch.Generator().manual_seed(2)) * 2 - 1
    options = dict(beta=(0.1, 0.05), policy_steps=300, policy_batch=64, policy_width=32)
    stage = build("srpo", [0], table, (1, 1), **options)
    stage.q = SimpleNamespace(
        bind=lambda flat: lambda s, a: torch.stack([3 * a, -a], -3).squeeze(-1)
    )
    stage.noise_model = SimpleNamespace(
        bind=lambda flat: gaussian(lambda s: 0.4 * s, 0.3)
    )
    take(300, stage)
    s = torch.linspace(-0.9, 0.9, 50, dtype=F64)[:, None]
    for theta, beta in zip(stage.state["theta"], (0.1, 0.05)):
        a = module(stage.policy, theta)(s)
        near(
            a, 0.4 * s + beta / kappa("sigma2", 0.3), 0.03
        )  # half of it is the networks' fit


def test_a_trained_noise_model_recovers_the_score_of_a_mixture():
    a, t = (
        LINE.density(tensor(0.0)).sample((20000,)),
        0.02 + 0.96 * torch.rand(20000, dtype=F64),
    )
    table = torch.cat([torch.zeros(20000, 1), a, torch.zeros(20000, 3)], 1).float()
    options = dict(
        dropout=0.0,
        behavior_batch=128,
        behavior_width=32,
        behavior_lr=5e-3,
        behavior_blocks=1,
    )
    stage = build("behavior", [0], table, (1, 1), **options)
    take(300, stage)
    net, s, noise = (
        stage.noise_model.bind(stage.state["theta"][0]),
        0 * a,
        torch.randn(20000, 1, dtype=F64),
    )
    a_t = diffuse(a, t, noise)
    exact = LINE.noise_model(a_t, s, t)
    assert ((net(a_t, s, t) - exact) ** 2).mean() < 0.1 * (
        exact**2
    ).mean()  # seen: 0.03 to 0.06
    assert (
        behavior_loss(net, s, a, t, noise) > ((exact - noise) ** 2).mean()
    )  # the floor


def test_settings_and_networks_are_those_of_appendix_c_and_table_2():
    betas = [
        0.05,
        0.06,
        0.05,
        0.08,
        0.04,
        0.02,
        0.01,
        0.2,
        0.2,
        0.01,
        0.2,
        0.05,
        0.1,
        0.5,
        0.05,
    ]
    assert [beta for _, beta in sorted(srpo.TABLE_2.items())] == betas
    for task, beta in srpo.TABLE_2.items():
        given, maze = Settings().resolve(task), "antmaze" in task
        assert (
            given.tau,
            given.policy_layers,
            given.grad_norm,
            given.temperature,
            given.beta,
        ) == (
            (0.9, 4, "released", 10.0, (beta,))
            if maze
            else (0.7, 2, "none", 3.0, (beta,))
        )
        first, last, step = (1, 5, 1) if "umaze" in task else (3, 8, 1)
        sweep = (
            [x / 100 for x in range(first, last + 1, step)]
            if maze
            else [0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
        )
        assert list(Settings(beta=("sweep",)).resolve(task).beta) == sweep
    for kind, steps, batch in (
        ("critic", 1.5e6, 256),
        ("behavior", 2e6, 2048),
        ("policy", 1e6, 256),
    ):
        ours = [getattr(given, f"{kind}_{what}") for what in ("steps", "batch", "lr")]
        assert ours == [steps, batch, 3e-4]
    assert (given.gamma, given.target_rate, given.dropout, given.behavior_decay) == (
        0.99,
        0.005,
        0.1,
        0.01,
    )
    assert (given.weighting, given.baseline) == ("sigma2", True)
    for wrong in ({"tau": 1.0}, {"gamma": math.nan}, {"critic_steps": 0}, {"critic_steps": 1.5}, {"beta": ()},
                  {"beta": (0.1, 0.1)}, {"beta": (-1.0,)}, {"weighting": "sigma3"}, {"also": ("ppo",)},
                  {"dropout": -0.1}, {"baseline": 2}, {"grad_norm": "papre"}):  # fmt: skip
        with pytest.raises(ValueError, match=[*wrong][0]):
            Settings(**wrong).resolve("hopper-medium-v2")
    with pytest.raises(ValueError, match="beta"):
        Settings().resolve("my-own-task")  # Table 2 has none

    def dense(*sizes):
        return sum((i + 1) * o for i, o in zip(sizes, sizes[1:]))

    kinds = [type(layer).__name__ for layer in Policy(11, 3, layers=4)]
    assert kinds == ["Linear", "ReLU"] * 4 + ["Linear", "Tanh"]
    networks = (
        Policy(11, 3),
        *(layout.network for layout in srpo.layouts(given, 11, 3).values()),
    )  # AntMaze's
    assert [sum(x.numel() for x in network.parameters()) for network in networks] == [
        dense(11, 256, 256, 3),
        dense(11, 256, 256, 1),
        2 * dense(14, 256, 256, 1),
        dense(64, 128, 128)
        + dense(142, 256)
        + 3 * (512 + dense(256, 1024, 256))
        + dense(256, 3),
        dense(11, 256, 256, 256, 256, 3),
    ]


def test_a_noise_model_is_idqls_network_and_drops_out_as_a_module_does():
    model, (a_t, s, t) = (
        NoiseModel(3, 2, 16, 2, dropout=0.5),
        (torch.randn(64, 2), torch.randn(64, 3), torch.rand(64)),
    )

    def expected(keep):  # x + MLP(LayerNorm(dropout(x)))
        phase = 2 * math.pi * t[:, None] * model.frequencies
        x = model.input(
            torch.cat(
                [a_t, s, model.embed_time(torch.cat([phase.sin(), phase.cos()], 1))], 1
            )
        )
        for mask, block in zip(keep, model.blocks):
            up, _, down = block.mlp
            x = x + down(
                F.mish(
                    up(
                        F.layer_norm(
                            x * mask / 0.5, [16], block.norm.weight, block.norm.bias
                        )
                    )
                )
            )
        return model.output[1](F.mish(x))

    keep = torch.rand(2, 64, 16) < 0.5
    near(model(a_t, s, t, keep), expected(keep), 1e-5)
    torch.manual_seed(1)
    dropped = model(a_t, s, t)
    torch.manual_seed(1)
    near(
        dropped,
        expected([F.dropout(torch.ones(64, 16), 0.5) > 0 for _ in range(2)]),
        1e-5,
    )
    near(model.eval()(a_t, s, t), expected([0.5, 0.5]), 1e-5)


def test_fresh_weights_are_a_function_of_seed_and_purpose_alone():
    state, layout = torch.get_rng_state(), Layout(lambda: Value(3))
    addresses = list(itertools.product((0, 1, 2, 3, 256), (1, 2, 3)))
    fresh = [
        layout.tensors(layout.fresh([seed], purpose))["0.bias"][0]
        for seed, purpose in addresses
    ]
    assert len(torch.cat(fresh).unique()) == 15 * 256 and torch.equal(
        torch.get_rng_state(), state
    )
    torch.manual_seed(7)
    near(
        layout.tensors(layout.fresh([2, 3], 1))["0.bias"],
        torch.stack([fresh[6], fresh[9]]),
        0,
    )
    twins = TwinQ(3, 2).twins
    assert (
        len(torch.cat([twin[0].bias for twin in twins]).unique()) == 2 * 256
    )  # else the twins stay one
    layout = Layout(lambda: NoiseModel(1, 1, 8, 1))
    frequencies = layout.tensors(layout.fresh(range(100), 3))[
        "frequencies"
    ]  # of N(0, 30²)
    assert (
        abs(frequencies.std() - 30) < 1.2 and abs(frequencies.mean()) < 1.6
    )  # three errors
    with pytest.raises(ValueError, match="another shape"):
        layout.flatten(NoiseModel(2, 1, 8, 1).state_dict())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "dtype, largest", [(F64, 1), (F32, 1e30)], ids=["float64", "overflow"]
)
def test_adam_is_that_of_torch_for_a_thousand_steps(decay, dtype, largest):
    """Also where the square of a finite gradient is infinite, after which no weight may become NaN."""
    theta, m, v = torch.zeros(3, 2, 5, dtype=dtype)
    other = torch.zeros(2, 5, dtype=dtype, requires_grad=True)
    optimizer = (torch.optim.AdamW if decay else torch.optim.Adam)(
        [other], lr=1e-2, weight_decay=decay
    )
    for k in range(1000):
        other.grad = (
            torch.randn(2, 5, dtype=dtype)
            * 10.0 ** (k % 7 - 6)
            * (largest if k == 500 else 1)
        )
        adam(theta, other.grad, m, v, torch.tensor(k + 1.0, dtype=dtype), 1e-2, decay)
        optimizer.step()
    near(theta, other, 1e-11 if dtype == F64 else 1e-4)


# ---------------------------------------------- Random numbers: a function of (seed, step, purpose, element)

N = 2**18


def draw(seed=3, step=5):
    return Draw(
        torch.tensor(seed, dtype=torch.int32), torch.tensor(step, dtype=torch.int32)
    )


@pytest.mark.parametrize("words", [1, 1001, 10**6])
def test_random_words_are_lowbias32_of_their_address(words, purpose=10):
    def mix(*numbers):
        x = sum(
            np.asarray(number).astype(np.uint32) for number in numbers
        )  # modulo 2³²
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x

    seed, step = np.array([3, 2**31 - 1]), np.array([2**30])
    first, second = mix(mix(seed, [purpose]), step), mix(mix(step, [purpose]), seed)
    exact = mix(mix(np.arange(words), first[:, None]), second[:, None])
    ours = draw(seed, 2**30).bits(purpose, (words,)).numpy()
    np.testing.assert_array_equal(ours.view(np.uint32), exact)


def test_random_numbers_have_their_distributions():
    def far(x, cdf):  # Kolmogorov and Smirnov's distance; above 2 once in 1,500 times
        return (
            cdf(x.double().sort().values) - (torch.arange(N) + 0.5) / N
        ).abs().max() * math.sqrt(N)

    index = draw().index(1, (N,), 10)
    assert (
        far(draw().uniform(1, (N,)), lambda x: x) < 2
        and far(draw().normal(2, (N,)), Normal(0, 1).cdf) < 2
    )
    assert ((index.bincount() - N / 10) ** 2).sum() / (
        N / 10
    ) < 30  # chi-squared of 9 degrees
    for dropout in (0.0, 0.1, 0.5):
        assert draw().keep(4, (N,), dropout).double().mean() == pytest.approx(
            1 - dropout, abs=0.005
        )
    extreme = draw()  # the least word, the middle and the largest
    extreme.bits = lambda purpose, shape: torch.tensor(
        [0, -(2**31), -1], dtype=torch.int32
    )
    near(extreme.uniform(1, (3,)), [2**-25, 0.5, 1], 0)
    near(extreme.index(1, (3,), 10), [0, 5, 9], 0)


def test_random_numbers_are_independent_across_seeds_steps_and_purposes():
    places = (3, 5), (4, 5), (3, 6), (5, 3)  # seed, step
    streams = [
        draw(*place).uniform(purpose, (N,)) for place in places for purpose in (1, 2, 3)
    ]
    streams += [draw().normal(4, (N,)), draw().normal(4, (2, N))[1], streams[0].roll(1)]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(15)
    assert correlation.abs().max() < 5 / math.sqrt(N)
    words = (
        draw(range(2**20)).bits(1, (2,)).numpy()
    )  # if streams were shifts of one another, twice as many
    assert (
        len(np.intersect1d(*words.T)) < 350
    )  # words would be shared as the 256 by chance
    assert len({*srpo.PURPOSES}) == len(srpo.PURPOSES)


@pytest.mark.parametrize(
    "name, least, most", [("behavior", 0, 1), ("srpo", 0.02, 0.98)]
)  # Eq. 13, Eq. 14
def test_rows_times_and_dropout_cover_their_ranges_anew_for_each_seed_step_and_stage(
    name, least, most
):
    size = {"behavior_batch": 4096, "policy_batch": 4096, "critic_batch": 4096}
    stage, critic = build(name, [0, 1], **size), build("critic", [0], **size)
    rows, t, _, *keep = (x[0] for x in stage.draw(stage.state))
    others = [stage.draw(stage.state)[0][1], critic.draw(critic.state)[0][0]]
    stage.count.add_(1)
    for other in (*others, stage.draw(stage.state)[0][0]):
        assert (rows == other).all(1).double().mean() < 0.02  # 1 in 200 by chance
    assert all(abs(x.double().mean() - 0.75) < 0.01 for x in keep)
    assert least < t.min() < least + 0.002 and most - 0.002 < t.max() <= most
    assert abs(t.mean() - 0.5) < 0.02 and len(rows.unique(dim=0)) == 200


# -------------------------------------------------------------------- the step, compiled and as a CUDA graph


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
@pytest.mark.parametrize("name", srpo.STAGES)
@pytest.mark.parametrize(
    "width, dtype", [(8, F64), (256, F32)], ids=["float64", "full_width_float32"]
)
def test_compiled_steps_are_the_eager_ones(name, width, dtype):
    if (name, width) not in (("critic", 8), ("srpo", 256)) and not LONG:
        pytest.skip("takes long: LONG=1 pytest")
    torch._dynamo.reset()  # it gives up after eight stages in a process
    size = {f"{kind}_width": width for kind in ("critic", "behavior", "policy")} | {
        "critic_batch": 101
    }
    eager, compiled = (build(name, [0, 1], dtype=dtype, **size) for _ in range(2))
    compiled.compile()
    take(1, eager)
    for key in (
        eager.changing if dtype == F64 else ("m", "losses")
    ):  # Adam's quotients amplify rounding
        near(compiled.state[key], eager.state[key], 1e-5 * eager.state[key].abs().max())
    assert torch.equal(
        compiled.functions[0](compiled.state)[0], eager.draw(eager.state)[0]
    )  # the rows
    assert int(eager.count) == int(compiled.count) == 1
    assert compiled.functions != (compiled.draw, compiled.gradient, compiled.update)


def test_a_step_that_cannot_be_compiled_stays_as_it_was(monkeypatch):
    def fails(*inputs):
        raise RuntimeError("no compiler")

    eager, stage = build("critic", [0]), build("critic", [0])
    monkeypatch.setattr(torch, "compile", lambda *function, **options: fails)
    with pytest.raises(RuntimeError, match="no compiler"):
        stage.compile()
    take(2, eager, stage)
    near(stage.state["theta"], eager.state["theta"], 0)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: bfloat16 against TF32"
)
def test_bfloat16_products_change_the_behavior_loss_little():
    exact, half = (build("behavior", [0, 1], ROWS.cuda(), dtype=F32) for _ in range(2))
    exact.bfloat16 = False
    losses, gradients = zip(
        *(
            stage.gradient(stage.state, *stage.draw(stage.state))
            for stage in (exact, half)
        )
    )
    assert (
        0 < (losses[0] - losses[1]).abs().max() < 0.02 * losses[0].max()
    )  # bfloat16 has 8 bits
    assert (
        gradients[1].dtype == F32
        and (gradients[0] - gradients[1]).norm() < 0.1 * gradients[0].norm()
    )


@STAGES
def test_a_step_reads_nothing_to_the_host_and_keeps_every_address(name):
    stage = build(name, [0, 1])
    before = (
        {key: x.data_ptr() for key, x in stage.state.items()},
        stage.lr,
        stage.decay,
    )
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        stage.step()
    calls = {event.name for event in profile.events()}
    assert (
        len(calls) > 20 and not {"aten::_local_scalar_dense", "aten::nonzero"} & calls
    )
    assert (
        {key: x.data_ptr() for key, x in stage.state.items()},
        stage.lr,
        stage.decay,
    ) == before


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: eager steps against replayed"
)
@pytest.mark.parametrize("compiled", [False, True])
@STAGES
def test_replayed_cuda_graphs_take_the_eager_steps(name, compiled):
    one_by_one, graphs = (build(name, [0, 1], ROWS.cuda()) for _ in range(2))
    if compiled:
        torch._dynamo.reset()
        one_by_one.compile(), graphs.compile()
    graphs.run(3 + 2 * GRAPH_STEPS)  # three to warm up
    for _ in range(3 + 2 * GRAPH_STEPS):
        one_by_one.step()
    assert graphs.graph and int(graphs.count) == int(one_by_one.count)
    for key in one_by_one.changing:
        near(graphs.state[key], one_by_one.state[key], 0)
