"""The proof: SRPO's equations on analytic Gaussians, then Algorithm 1 beside plain PyTorch.

The reference is always something else than the code: a closed form, autograd of the
objective, torch.distributions, torch.optim. ρ = σ²/α²: KL[π_t‖μ_t] is that of π and μ,
both widened by N(0, ρ I).
"""

import contextlib
import gc
import io
import math
import os
import shutil
import warnings
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import distributions as dist
from torch import nn
from torch.nn import functional as F

import seeds as side_by_side
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
from models import NoiseModel, Policy, TwinQ
from seeds import Mish, Networks, Steps, generator
from srpo import Settings, policy_loss, q_loss, surrogate_gradient, value_loss

torch.set_num_threads(1)
F32, F64, LONG = torch.float32, torch.float64, os.environ.get("LONG")
SHAPES = pytest.mark.parametrize("seeds", [(), (1,), (6,)], ids=str)
WEIGHTINGS = pytest.mark.parametrize("weighting", ["sigma2", "one", "alpha_over_sigma"])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tensor(x):
    return torch.tensor(x, dtype=F64)


def near(x, reference, atol=1e-10, rtol=0.0):
    reference = torch.as_tensor(reference, dtype=x.dtype).expand_as(x).detach()
    how = {"atol": float(atol), "rtol": float(rtol), "equal_nan": True}
    torch.testing.assert_close(x.detach(), reference, **how)


def scales(t):
    """α, σ and ρ of the VP-SDE, by way of ρ = exp(∫ β) − 1, ∫ β = 0.1 t + 9.95 t²."""
    rho = torch.expm1(0.1 * t + 9.95 * t**2)
    return (1 + rho).rsqrt(), (rho / (1 + rho)).sqrt(), rho


def omega(weighting, t):
    alpha, sigma, _ = scales(t)
    one = torch.ones_like(t)
    by_name = {"sigma2": sigma**2, "one": one, "alpha_over_sigma": alpha / sigma}
    return by_name[weighting]


def nodes(t=None):
    """Times and weights of an average over U(0.02, 0.98), by quadrature; or one time."""
    u, weight = map(tensor, np.polynomial.legendre.leggauss(32))
    return (0.5 + 0.48 * u, weight / 2) if t is None else (tensor([t]), tensor([1.0]))


def hermite(count):
    """Nodes and weights of an average over ε ~ N(0, 1), by quadrature."""
    x, w = map(tensor, np.polynomial.hermite_e.hermegauss(count))
    return x, w / w.sum()


def kappa(weighting, width):
    """E_t ω σ α / (α² width² + σ²): how strongly Eq. 15 pulls to N(m, width²)'s mean."""
    (t, weight), (alpha, sigma, _) = nodes(), scales(nodes()[0])
    C = alpha**2 * width**2 + sigma**2
    return weight @ (omega(weighting, t) * sigma * alpha / C)


class Mixture:
    """The behavior Σ w_k N(m_k, S_k), diffused exactly; ε* = −σ ∇ log μ_t by autograd."""

    def __init__(self, w, m, S):
        self.w, self.m, self.S = tensor(w), tensor(m), tensor(S)

    def density(self, t):
        alpha, sigma, _ = (x[..., None, None] for x in scales(t))
        eye = torch.eye(self.m.shape[-1], dtype=F64)
        C = alpha[..., None] ** 2 * self.S + sigma[..., None] ** 2 * eye
        w = dist.Categorical(self.w.expand(*t.shape, -1))
        parts = dist.MultivariateNormal(alpha * self.m, C)
        return dist.MixtureSameFamily(w, parts)

    def noise_model(self, a_t, s, t):
        with torch.enable_grad():
            a_t = a_t if a_t.requires_grad else a_t.clone().requires_grad_()
            log_density = self.density(t).log_prob(a_t).sum()
            (slope,) = torch.autograd.grad(log_density, a_t, create_graph=True)
        return -scales(t)[1].unsqueeze(-1) * slope


FULL = [[0.30, 0.12, 0.00], [0.12, 0.20, -0.05], [0.00, -0.05, 0.08]]
WIDE = Mixture([1.0], [[0.3, -0.5, 0.2]], [FULL])
LINE = Mixture([0.3, 0.7], [[-1.0], [0.8]], [[[0.05]], [[0.1]]])  # in one dimension
TWO_MODES = Mixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.05]], [[0.05]]])


def gaussian(m, width, schedule=scales):
    """ε* of N(m, width²) in each dimension; m: of s, or numbers."""

    def noise_model(a_t, s, t):
        alpha, sigma, *_ = schedule(t.unsqueeze(-1))
        gap = a_t - alpha * (m(s) if callable(m) else m)
        return sigma * gap / (alpha**2 * width**2 + sigma**2)

    return noise_model


def descent(noise_model, a, weighting="sigma2", t=None, noises=2, **more):
    """Mean and mean square of −∂L_sur/∂a, which is ω (ε̂ − ε) if Q = 0, of actions [..., d].

    By quadrature over ε and t ~ U(0.02, 0.98), or at one t. Two nodes, ε = ±1, are exact
    for a Gaussian behavior, whose ε* is affine in ε; a mixture wants 64.
    """
    (t, v), (x, w) = nodes(t), hermite(noises)
    t, x = (grid.flatten() for grid in torch.meshgrid(t, x, indexing="ij"))
    weights = torch.outer(v, w).flatten()
    a = a.detach().unsqueeze(-2).expand(*a.shape[:-1], len(t), -1)
    t, noise = t.expand(a.shape[:-1]), x.unsqueeze(-1).expand_as(a)
    q, more = more.pop("q", lambda s, a: 0 * a.sum(-1)), {"beta": 1} | more
    given = q, noise_model, None, a, t, noise
    rows = -surrogate_gradient(*given, weighting=weighting, **more)
    return weights @ rows, weights @ rows**2


# ------------------------------ Eq. 4: a_t = α a + σ ε, α² = exp(−∫ β), α² + σ² = 1


@pytest.mark.parametrize(  # |log α| = 5 amplifies α's rounding
    "dtype, alpha_error, sigma_error", [(F64, 1e-12, 1e-12), (F32, 1.5e-6, 5e-7)]
)
def test_eq4_scales_have_all_their_digits(dtype, alpha_error, sigma_error):
    t = tensor([1e-7, 1e-3, 0.02, 0.5, 0.98, 1]).to(
        dtype
    )  # float32: 1 − α² is 0 at 1e-7
    (alpha, sigma, _), ours = scales(t.double()), alpha_sigma(t)
    near(ours[0] / alpha, 1, alpha_error)
    near(ours[1] / sigma, 1, sigma_error)
    a, noise = torch.randn(2, 6, 3, dtype=F64)
    near(diffuse(a, t.double(), noise), (alpha * a.T + sigma * noise.T).T)


# ---- Eq. 6: ∇ log μ_t(a_t) = −ε* / σ_t; Eq. 7: da_t/dt = f a_t + g²/(2σ) ε* keeps quantiles


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
    (f,) = torch.autograd.grad(alpha.log().sum(), t, retain_graph=True)
    (growth,) = torch.autograd.grad((sigma**2).sum(), t)
    near(drift_diffusion(t)[0], f)
    near(drift_diffusion(t)[1], growth - 2 * f * sigma**2)


@pytest.mark.parametrize(
    "behavior, shape", [(WIDE, (6, 4, 3)), (LINE, (9, 1))], ids=["affine", "quantile"]
)
def test_eq7_maps_a_gaussian_affinely_and_a_mixture_by_quantiles(behavior, shape):
    def quantiles(t, a_t):  # along each axis of S
        (alpha, sigma, _), (v, axes) = scales(tensor(t)), torch.linalg.eigh(behavior.S)
        z = (a_t.unsqueeze(-2) - alpha * behavior.m).unsqueeze(-2) @ axes
        normal = dist.Normal(0, (alpha**2 * v + sigma**2).sqrt())
        return behavior.w @ normal.cdf(z.squeeze(-2))

    a_1, errors = torch.randn(shape, dtype=F64), []
    for steps in (100, 200, 400):
        with torch.no_grad():
            a_0 = sample(behavior.noise_model, None, a_1, steps)
        errors.append((quantiles(0.0, a_0) - quantiles(1.0, a_1)).abs().max())
    of_second_order = all(3 < x / y < 5 for x, y in zip(errors, errors[1:]))
    assert errors[2] < 3e-4 and of_second_order
    at_1 = behavior.density(tensor(1.0)).log_prob  # N(0, I) would be off by up to 2e-2
    exact = behavior.density(tensor(0.0)).log_prob(a_0)
    near(log_likelihood(behavior.noise_model, None, a_0, 100, at_1), exact, 1e-4)
    exact = dist.Normal(0, 1).log_prob(a_1).sum(-1)  # which stands still, and is the
    near(log_likelihood(gaussian(0, 1), None, a_1, 2), exact)  # end if not told


def test_eq7_refuses_a_noise_model_whose_dropout_is_on():
    s, a = torch.randn(2, 5, 2)
    for solve in (sample, log_likelihood):
        with pytest.raises(ValueError, match="dropout is on"):
            solve(NoiseModel(2, 2, 8, 1), s, a, 2)
        for fine in NoiseModel(2, 2, 8, 1).eval(), NoiseModel(2, 2, 8, 1, dropout=0.0):
            near(solve(fine, s, a, 2), solve(fine, s, a, 2), 0)


# -- Eq. 11: V = argmin E L₂^τ(min Q − V): Σ w_i (Q_i − V) = 0, w = τ or 1 − τ; Eq. 12: Q = r + γ V(s′)


@SHAPES
@pytest.mark.parametrize("tau", [0.7, 0.9])
def test_eq11_and_eq12_solve_a_two_state_chain(tau, seeds, gamma=0.99):
    """A: r = 0 to B, or r = 1 and the end. B: r = 1 to A, or r = 0 to A at a time limit:
    not the end. So V_B = γ V_A + τ, and V_A = (1 − τ) + τ γ V_B.
    """
    v_a = (1 - tau + tau**2 * gamma) / (1 - tau * gamma**2)
    v_b = gamma * v_a + tau
    exact_q = [gamma * v_b, 1, 1 + gamma * v_a, gamma * v_a]
    weights = [tau, 1 - tau, tau, 1 - tau]  # of an action above V and of one below
    squares = [(q - v) ** 2 for q, v in zip(exact_q, (v_a, v_a, v_b, v_b))]
    least = sum(w * x for w, x in zip(weights, squares)) / 4
    rows = tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]])
    s, s_next, r, terminal = (row.expand(*seeds, 4) for row in rows)
    v = tensor([v_a, v_b]).expand(*seeds, 2).requires_grad_()
    larger = tensor([[0, 2, 0, 2], [2, 0, 2, 0]])  # of a twin that Eq. 11 does not see
    q = (tensor(exact_q) + larger).expand(*seeds, 2, 4).requires_grad_()
    value, twins = lambda s: v.gather(-1, s.long()), lambda s, a: q
    losses = (
        value_loss(value, twins, s, 0, tau),
        q_loss(twins, value, s, 0, r, s_next, terminal, gamma),
    )
    (v_slope, none), (nothing, q_slope) = (
        torch.autograd.grad(x.sum(), (v, q), allow_unused=True) for x in losses
    )
    assert none is nothing is None and losses[0].shape == losses[1].shape == seeds
    near(losses[0], least)
    near(losses[1], 4 * 4 / 8)
    near(v_slope, 0)
    near(q_slope, larger / 4)  # of the mean of eight squares


def test_eq11_and_eq12_refuse_columns_that_would_broadcast():
    s, ones = torch.ones(4, 1), torch.ones(4)
    value, q = lambda s: s.squeeze(-1), lambda s, a: s.squeeze(-1).expand(2, -1)
    with pytest.raises(ValueError, match=r"one shape.*v \[4, 1\], q \[4\]"):
        value_loss(lambda s: s, q, s, s, 0.7)
    for r, end, v, twins in (
        (s, ones, value, q),
        (ones, s, value, q),
        (ones, ones, lambda s: s, q),
        (ones, ones, value, lambda s, a: s.expand(2, 4, 1)),
        (ones, ones, value, lambda s, a: s.expand(4, 2)),
    ):
        with pytest.raises(ValueError, match=r"one shape, a number a row: .*\[4\]"):
            q_loss(twins, v, s, s, r, s, end, 0.99)


# -- Eq. 13: ε* = argmin E ‖ε_ψ(a_t | s, t) − ε‖², for a Gaussian affine; its minimum d − σ² tr C⁻¹


@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_eq13_regression_recovers_the_exact_noise_model(t):
    m, width, t = tensor([0.2, -0.5]), tensor([0.3, 0.6]), tensor(t)
    alpha, sigma, _ = scales(t)
    sign = tensor([[1], [1], [-1], [-1]])  # with noise ±1: all the moments that matter
    a, noise, s = m + width * sign, sign[[0, 2, 0, 2]].expand(4, 2), m.expand(4, 2)
    p, exact = tensor([[1, 1], [0, 0]]).requires_grad_(), gaussian(lambda s: s, width)

    def affine(a_t, s, t):
        return p[0] * exact(a_t, s, t) + p[1]

    loss = behavior_loss(affine, s, a, t.expand(4), noise)
    near(loss, (1 - sigma**2 / (alpha**2 * width**2 + sigma**2)).sum())
    near(torch.autograd.grad(loss, p)[0], 0)  # and the loss is convex


# -- Eq. 14: E Q − (1/β) E_t ω (σ/α) KL[π_t‖μ_t]; Eq. 15: its gradient ∇Q − (1/β) ω (ε* − ε)


@SHAPES
@WEIGHTINGS
@pytest.mark.parametrize("t", [0.02, 0.1, 0.3, 0.6, 0.98])
def test_eq15_is_the_gradient_of_eq14(weighting, seeds, t):
    a = torch.randn(*seeds, 3, dtype=F64).requires_grad_()
    beta, (alpha, sigma, rho) = 0.5 + torch.rand(seeds, dtype=F64), scales(tensor(t))
    S = rho * torch.eye(3, dtype=F64)
    mu = dist.MultivariateNormal(WIDE.m[0], WIDE.S[0] + S)
    kl = dist.kl_divergence(dist.MultivariateNormal(a, S), mu)
    weight = omega(weighting, tensor(t)) * sigma / alpha
    objective = -(a**2).sum(-1) - weight * kl / beta
    (reference,) = torch.autograd.grad(objective.sum(), a)
    more = {"beta": beta[..., None], "q": lambda s, a: -(a**2).sum(-1)}
    ours, _ = descent(WIDE.noise_model, a, weighting, t, **more)
    near(-ours, reference, 1e-9)
    assert not ours.requires_grad and a.grad is None


@WEIGHTINGS
def test_eq15_is_the_gradient_of_eq14_for_a_mixture(weighting):
    a, (x, w), (t, weight) = tensor([-0.9, 0.1, 0.4]), hermite(64), nodes()
    alpha, sigma, _ = scales(t)
    a.requires_grad_()
    a_t = (alpha[:, None] * a[:, None, None] + sigma[:, None] * x).unsqueeze(-1)
    log_mu = LINE.density(t[:, None].expand(3, 32, 64)).log_prob(a_t)  # [3, t, ε]: what
    regularizer = -(log_mu @ w) @ (weight * omega(weighting, t) * sigma / alpha)
    (reference,) = torch.autograd.grad(regularizer.sum(), a)  # moves with a in the KL
    ours, _ = descent(LINE.noise_model, a[:, None], weighting, noises=64)
    near(ours[:, 0], reference)


def test_eq15_takes_a_weighting_and_a_noise_schedule_of_your_own():
    """On the cosine schedule with ω = α σ: E ω (ε* − ε) = α² σ² (a − m) / C."""

    def cosine(t):
        return (math.pi / 2 * t).cos(), (math.pi / 2 * t).sin()

    a, t = torch.randn(4, 3, dtype=F64), 0.3
    alpha, sigma = cosine(tensor(t))
    own = {"schedule": cosine, "weighting": lambda alpha, sigma: alpha * sigma}
    ours, _ = descent(gaussian(0.2, 0.5, cosine), a, t=t, **own)
    C = alpha**2 * 0.25 + sigma**2
    near(ours, (alpha * sigma) ** 2 * (a - 0.2) / C)


def test_eq10_is_the_limit_of_eq15_at_the_rate_rho():
    a, solve = torch.randn(4, 3, dtype=F64), partial(torch.linalg.solve, WIDE.S[0])
    solve = partial(solve, left=False)
    limit = solve(a - WIDE.m[0])  # −∇ log μ
    for t in (1e-3, 1e-4, 1e-5):
        ours, _ = descent(WIDE.noise_model, a, "alpha_over_sigma", t)
        rho = scales(tensor(t))[2]
        near((limit - ours) / rho, solve(limit), 0.02, rtol=50 * rho)


C, ROW = torch.linspace(-1, 1, 3, dtype=F64), torch.randn(4, 3, dtype=F64)


class Quadratic(torch.autograd.Function):
    """c·a − ‖a‖²/2, with a gradient of its own."""

    @staticmethod
    def forward(context, a):
        context.save_for_backward(a)
        return (C * a - a**2 / 2).sum(-1)

    @staticmethod
    def backward(context, slope):
        return slope.unsqueeze(-1) * (C - context.saved_tensors[0])


def quadratic(s, a):
    return (C * a - a**2 / 2).sum(-1)


def of_batch_norm(a):  # ∂/∂a Σ z³ of a batch's z = (a − mean) / deviation
    std = (a.var(0, correction=0) + 1e-5).sqrt()
    z = (a - a.mean(0)) / std
    g = 3 * z**2
    return (g - g.mean(0) - z * (g * z).mean(0)) / std


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("kind", ["plain", "compiled", "own backward", "batch norm"])
def test_eq15_takes_any_critic_and_leaves_it_alone(kind, grad):
    norm, reference = nn.BatchNorm1d(3, dtype=F64), C - ROW
    q = {
        "plain": quadratic,
        "compiled": torch.compile(quadratic, backend="aot_eager"),
        "own backward": lambda s, a: Quadratic.apply(a),
        "batch norm": lambda s, a: (norm(a) ** 3).sum(-1),
    }[kind]
    reference = of_batch_norm(ROW) if kind == "batch norm" else C - ROW
    a, t, noise = ROW.clone().requires_grad_(), tensor([0.3]).expand(4), 0 * ROW
    with grad():
        policy = 1 * a  # has a history, into which nothing may flow
        ours = surrogate_gradient(q, lambda a_t, s, t: noise, None, policy, t, noise, 1)
    near(ours, reference)
    assert not ours.requires_grad and a.grad is None and norm.weight.grad is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"q": lambda s, a: quadratic(s, a.detach())}, "does not depend on a"),
        ({"q": torch.no_grad()(quadratic)}, "does not depend on a"),
        ({"q": lambda s, a: quadratic(s, a)[:, None]}, r"one shape.* q \[4, 1\]"),
        ({"q": lambda s, a: quadratic(s, a).expand(2, 4)}, r"one shape.* q \[2, 4\]"),
        ({"t": torch.full((4, 1), 0.3)}, r"one shape.* t \[4, 1\]"),
        ({"beta": torch.ones(4, 1)}, r"one shape.* t_with_beta \[4, 4\]"),
        ({"beta": 0}, "beta 0 is not above 0"),
        ({"beta": math.nan}, "beta nan is not above 0"),
        ({"grad_norm": "papre"}, "papre"),
    ],
)
def test_eq15_refuses_what_would_broadcast_or_clone_the_behavior(wrong, message):
    given = {"q": quadratic, "noise_model": gaussian(0, 1), "s": None, "a": ROW}
    given |= {"t": torch.full((4,), 0.3), "noise": 0 * ROW, "beta": 0.1} | wrong
    with pytest.raises(ValueError, match=message) as error:
        surrogate_gradient(**given)
    assert "\n" not in str(error.value)


# ---------- Baseline: E ω ε = 0; Var ω ε* = ω² c², Var ω (ε* − ε) = ω² (1 − c)², c = ρ/(ρ + width²)


@pytest.mark.parametrize(
    "weighting, width, helps",  # a Dirac, of width 0, leaves no noise at all
    [("sigma2", 0, True), ("sigma2", 0.1, True), ("sigma2", 1, True), ("one", 1, True)]
    + [("alpha_over_sigma", 0.1, True), ("alpha_over_sigma", 1, False)],
)
def test_baseline_cuts_the_variance_but_for_wide_data_and_alpha_over_sigma(
    weighting, width, helps
):
    (t, weight), model = nodes(), gaussian(0.4, width)
    c = scales(t)[2] / (scales(t)[2] + width**2)
    off, on = (weight @ (omega(weighting, t) * x) ** 2 for x in (c, 1 - c))
    a = tensor([[0.4], [0.9]])  # at the data's mean, and beside it
    without = descent(model, a, weighting, baseline=False)
    with_it = descent(model, a, weighting, baseline=True)
    near(with_it[0], without[0])
    near(without[1][0], off)
    near(with_it[1][0], on)
    assert (on < off) == helps


def test_baseline_in_one_sample_has_its_sign():
    (alpha, sigma, _), a, m, width, noise = scales(tensor(0.3)), 0.5, 0.2, 0.3, 1.2
    gap = alpha * a + sigma * noise - alpha * m
    noise_hat = sigma * gap / (alpha**2 * width**2 + sigma**2)
    row = gaussian(m, width), None, tensor([[a]]), tensor([0.3]), tensor([[noise]]), 0.1
    for baseline, pull in (True, noise_hat - noise), (False, noise_hat):
        ours = surrogate_gradient(lambda s, a: 2 * a.sum(-1), *row, baseline=baseline)
        near(ours, 2 - 10 * sigma**2 * pull)


# ---------- β_norm = β / ‖∇Q‖₂ (paper), or ∇Q over its root mean square (released code)


@pytest.mark.parametrize("d", [1, 3, 8])
def test_grad_norm_takes_the_norm_of_each_row_alone(d):
    size = torch.tensor([[1e-6], [10.0], [0.0], [1e-30]])  # 1e-60 is 0 in float32
    c, (a, noise) = torch.randn(4, d) * size, torch.randn(2, 4, d)  # c: ∇Q
    row = gaussian(0.2, 0.3), None, a, torch.tensor([0.02, 0.3, 0.5, 0.7]), noise, 0.05
    ours = partial(surrogate_gradient, lambda s, a: (c * a).sum(-1), *row)
    norm, pull = c.double().norm(dim=-1, keepdim=True), ours() - c
    paper, released = norm * pull, math.sqrt(d) * c / norm.clamp(min=1e-20)
    near(ours(grad_norm="paper"), c + paper, 1e-5, rtol=1e-5)  # ∇Q = 0: no update ...
    near(
        ours(grad_norm="released"), released + pull, 1e-5, rtol=1e-5
    )  # ... to the data


# -- Prop. 1: KL[π_t‖μ_t] = 0 only for π = μ. Remark 1: yet a Dirac actor's optimum moves with t


@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_prop1_diffusion_can_be_divided_out_of_the_characteristic_function(t):
    (x, w), u, t = hermite(64), torch.linspace(-3, 3, 7, dtype=F64), tensor(t)
    a, share = tensor([-0.7, 0.1, 0.9]), tensor([0.2, 0.3, 0.5])
    alpha, sigma, _ = scales(t)
    a_t = diffuse(a.view(3, 1, 1), t.expand(3, 64), x.view(64, 1)) * u  # [3, 64, 7]
    phi_t = torch.einsum("i,j,iju->u", share, w, torch.cos(a_t))
    phi = share @ torch.cos(alpha * a[:, None] * u)
    near(phi_t * torch.exp(sigma**2 * u**2 / 2), phi)  # so μ_t determines μ


@pytest.mark.parametrize(
    "t, weighting, merged",
    [(0.05, "one", False), (0.15, "one", False), (0.22, "one", True)]
    + [(None, "alpha_over_sigma", False), (None, "one", False), (None, "sigma2", True)],
)
def test_remark1_two_modes_merge_at_large_t_and_under_sigma2(t, weighting, merged):
    """ε* of two modes N(±1, v): σ (x − α tanh(α x / W)) / W, W = α² v + σ². Merged, all
    of [0, 1.2] is pulled to 0.
    """
    a, (times, weight), (x, w) = torch.linspace(0.01, 1.2, 60), nodes(t), hermite(64)
    a, (alpha, sigma, _) = a.double(), (scale[:, None] for scale in scales(times))
    a_t, W = alpha * a[:, None, None] + sigma * x, alpha**2 * 0.05 + sigma**2
    noise = sigma * (a_t - alpha * torch.tanh(alpha * a_t / W)) / W  # [60, t, ε]
    reference = (noise - x) @ w @ (weight * omega(weighting, times))
    ours, _ = descent(TWO_MODES.noise_model, a[:, None], weighting, t, noises=64)
    near(ours[:, 0], reference)
    assert bool((reference > 0).all()) == merged


# -- End to end: Q = c·a: a* = m + β κ⁻¹ c; Q = −‖a − q‖²: (2 + κ/β)⁻¹ (2 q + κ m/β); κ = E_t ω σ α C⁻¹


@WEIGHTINGS
def test_adam_on_eq15_reaches_the_optimum(weighting):
    widths = [0.1, 0.3, 1.0]  # six actors: three widths, two Q
    behavior = gaussian(0.2, tensor(widths * 2).view(6, 1, 1))
    actors = torch.zeros(6, 1, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([actors], 0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)

    def q(s, a):
        return torch.cat([a[:3], -((a[3:] - 1.5) ** 2)]).sum(-1)

    for _ in range(400):
        ascent = -descent(behavior, actors, weighting, beta=0.1, q=q)[0]
        optimizer.zero_grad()
        policy_loss(actors.unsqueeze(1), ascent.unsqueeze(1)).sum().backward()
        optimizer.step()
        cosine.step()
    pull = torch.stack([kappa(weighting, x) for x in widths])
    optimum = torch.cat([0.2 + 0.1 / pull, (3 + 2 * pull) / (2 + 10 * pull)])
    near(actors[:, 0], optimum, 1e-6)


# --------------------------- Algorithm 1: networks, settings, rows, and its three loops

STAGES = (srpo.Critic, srpo.Behavior, srpo.Extraction)
STAGES = {x.name: x for x in (*STAGES, srpo.WeightedRegression, srpo.BehaviorCloning)}
EACH_STAGE = pytest.mark.parametrize("name", STAGES)
ROWS = torch.randn(200, 10, generator=torch.Generator().manual_seed(1))
ROWS[:, 3:5].tanh_()  # s, a, r, s′, terminal
ROWS[:, 9] = (ROWS[:, 9] > 0).float()


def tiny(**options):
    """Learning and target rates are large enough to see."""
    small = {"target_rate": 0.3, "behavior_blocks": 2, "dropout": 0.25, "beta": 0.1}
    for kind in ("critic", "behavior", "policy"):
        small |= {f"{kind}_steps": 8, f"{kind}_batch": 16, f"{kind}_width": 8}
        small |= {f"{kind}_lr": 1e-2}
    return Settings(**{**small, "behavior_decay": 0.1, **options})


def build(name, seeds, table=ROWS, sizes=(3, 2), dtype=F64, q=None, **options):
    """A stage, a policy's with a fresh critic and noise model; float32's draws."""
    settings, given = tiny(**options), ()
    if name not in ("critic", "behavior"):
        critic, behavior = (
            build(x, seeds, table, sizes, dtype, **options)
            for x in ("critic", "behavior")
        )
        given = critic.q_target, critic.value
        if name == "srpo":
            mean = lambda s, a: critic.q_target(s, a).mean(-2)  # noqa: E731
            given = mean, behavior.noise_model
    stage = STAGES[name](settings, table, sizes, seeds, *given).to(dtype)
    stage.given, stage.table = given, stage.table.to(dtype)
    noise = stage.noise
    stage.noise = lambda: [x.to(dtype) if x.is_floating_point() else x for x in noise()]
    return stage


def take(steps, *stages):
    for stage in stages:
        for _ in range(steps):
            assert stage.advance(1) == 1


def plain(networks, build, *place):
    """The ordinary module of one seed (and β), by its own names."""
    module = build().double().eval()
    state = {key: x[place] for key, x in networks.network.state_dict().items()}
    module.load_state_dict(state)
    return module


def same(one, other, atol=0.0):
    torch.testing.assert_close(one, other, atol=atol, rtol=0, equal_nan=True)


def state(stage):
    """All that a stage goes on with."""
    random = [x.get_state() for x in stage.generators]
    return stage.state_dict(), stage.optimizer.state_dict(), random, stage.done


@pytest.mark.parametrize(
    "name, options",
    [("critic", {}), ("behavior", {}), ("iql", {}), ("bc", {}), ("srpo", {})]
    + [("srpo", {"grad_norm": "released", "policy_layers": 4})]
    + [("srpo", {"grad_norm": "paper", "weighting": "one", "baseline": False})],
)
def test_a_stage_is_a_plain_loop_of_torch_optim(name, options):
    """Eight steps with the same rows and noise end at the same weights, with ordinary
    modules and torch.optim: here of the second seed of two, and the second β.
    """
    stage, batches, total = build(name, [3, 7], beta=(0.1, 0.5), **options), [], 0
    new, losses_of = srpo.builders(stage.settings, 3, 2), stage.losses
    stage.losses = lambda *batch: batches.append(batch) or losses_of(*batch)
    nets = dict(stage.named_children())
    if name == "critic":
        new["q_target"] = new["q"]
    elif name != "behavior":
        critic = build("critic", [3, 7], beta=(0.1, 0.5), **options)
        behavior = build("behavior", [3, 7], beta=(0.1, 0.5), **options)
        fixed = {
            "q": plain(critic.q_target, new["q"], 1),
            "value": plain(critic.value, new["value"], 1),
            "noise_model": plain(behavior.noise_model, new["noise_model"], 1),
        }
    place = (1, 1) if name == "srpo" else (1,)
    own = {key: plain(nets[key], new[key], *place) for key in nets}
    trained = [x for key in own if key != "q_target" for x in own[key].parameters()]
    kind, how = (
        (torch.optim.Adam, {})
        if name != "behavior"
        else (torch.optim.AdamW, {"weight_decay": 0.1})
    )
    optimizer = kind(trained, lr=1e-2, **how)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    assert stage.run(report=lambda line: None) is stage and stage.done == 8
    for batch in batches:
        s, a, r, s_next, terminal, *noise = (x[1] for x in batch)
        if name == "critic":
            q, q_target, value = own["q"], own["q_target"], own["value"]
            step = s, a, r, s_next, terminal, 0.99
            losses = value_loss(value, q_target, s, a, 0.7), q_loss(q, value, *step)
        elif name == "behavior":
            t, noise, keep = noise
            model = partial(own["noise_model"], keep=keep)
            losses = (behavior_loss(model, s, a, t, noise),)
        else:
            q, value, pi = fixed["q"], fixed["value"], own["policy"](s)
            advantage = q(s, a).min(0).values - value(s)
            weight = (3 * advantage).exp().clamp(max=100) if name == "iql" else 1
            losses = ((weight * ((pi - a) ** 2).sum(1)).mean(),)
        if name == "srpo":
            given = (lambda s, a: q(s, a).mean(0)), fixed["noise_model"], s, pi
            more = {key: x for key, x in options.items() if key != "policy_layers"}
            ascent = surrogate_gradient(*given, *noise, 0.5, **more)
            losses = (-(ascent * pi).sum(1).mean(),)
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        total = total + tensor([x.item() for x in losses]) / 8
        if name == "critic":
            for old, x in zip(q_target.parameters(), q.parameters()):
                old.data.lerp_(x.data, 0.3)
        elif name != "behavior":
            cosine.step()
    for key, module in own.items():
        ours = {key: x[place] for key, x in stage.weights()[key].items()}
        same(ours, dict(module.state_dict()), 1e-9)


@EACH_STAGE
def test_a_seed_and_a_beta_train_as_if_alone_and_a_nan_stays_its_own(name):
    six, ill = (build(name, range(6), beta=(0.3, 0.1)) for _ in range(2))
    alone = build(name, [4])
    take(2, six, ill, alone)
    with torch.no_grad():
        for x in ill.parameters():
            x[(1, 0) if name == "srpo" else 1] = math.nan
    take(3, six, ill, alone)
    for network, weights in six.weights().items():
        for key, x in weights.items():
            near(
                alone.weights()[network][key][0],
                x[(4, 1) if name == "srpo" else 4],
                1e-9,
            )
            if name == "srpo":
                x, y = (one.flatten(0, 1) for one in (x, ill.weights()[network][key]))
                others = [0, 1, 3, *range(4, 12)]
            else:
                y, others = ill.weights()[network][key], [0, 2, 3, 4, 5]
            assert torch.equal(x[others], y[others])
    assert ill.read_losses()[1] == [1] and six.read_losses()[1] == []


@EACH_STAGE
def test_a_rerun_and_a_resumed_stage_have_the_bits_of_one_that_never_stopped(name):
    whole, again, first, second = (build(name, [0, 5], dtype=F32) for _ in range(4))
    take(3, first)
    first.done = 3
    file = io.BytesIO()
    torch.save(state(first), file)
    file.seek(0)
    weights, moments, random, done = torch.load(file, weights_only=True)
    second.load_state_dict(weights)
    second.optimizer.load_state_dict(moments)
    for x, saved in zip(second.generators, random):
        x.set_state(saved)
    second.done = done
    for stage in (whole, again, second):
        stage.run(report=lambda line: None)
    same(state(again), state(whole))
    same(state(second), state(whole))


@EACH_STAGE
def test_the_optimizer_is_adam_with_decay_on_a_cosine_to_exactly_0(name):
    stage = build(name, [0], dtype=F32)
    (group,) = stage.optimizer.param_groups
    assert type(stage.optimizer) is torch.optim.AdamW
    assert (group["betas"], group["eps"]) == ((0.9, 0.999), 1e-8)
    assert group["weight_decay"] == (0.1 if name == "behavior" else 0)
    for k in range(9):
        take(1, stage)
        cosine = 0.005 * (1 + math.cos(math.pi * k / 8))
        near(group["lr"], 0.01 if name in ("critic", "behavior") else cosine, 1e-9)
        if k == 7:
            before = {key: x.clone() for key, x in stage.named_parameters()}
    if name not in ("critic", "behavior"):
        assert group["lr"] == 0  # at which no weight moves, or becomes NaN
        same(dict(stage.named_parameters()), before)


@EACH_STAGE
def test_nothing_is_read_to_the_host_within_a_step(name):
    stage = build(name, [0, 1])
    take(1, stage)
    stage.optimizer.step = lambda: None  # fused, on a CPU it reads its own rate
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profile:
        stage.step()
    calls = {event.name for event in profile.events()}
    assert len(calls) > 20 and "aten::bmm" in calls
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::item"} & calls


def distance(x, cdf):
    """Kolmogorov and Smirnov's; above 2 once in 1,500 times."""
    x, n = x.flatten().double().sort().values, x.numel()
    return (cdf(x) - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n)


@pytest.mark.parametrize(
    "name, least, most", [("behavior", 0, 1), ("srpo", 0.02, 0.98)]
)
def test_rows_times_noise_and_dropout_have_their_distributions(name, least, most):
    table = ROWS[:10].clone()
    table[:, 5] = torch.arange(10)
    stage = build(name, [0, 1], table, policy_batch=2**15, behavior_batch=2**15)
    s, a, r, s_next, terminal = stage.rows()
    t, noise, *keep = stage.noise()
    batch = torch.cat([s, a, r[..., None], s_next, terminal[..., None]], -1)
    same(batch, table.double()[r.long()])
    for counts in (r.long().flatten(1)[i].bincount() for i in range(2)):
        assert ((counts - 3276.8) ** 2).sum() / 3276.8 < 30  # chi-squared of 9 degrees
    assert distance(t, lambda x: (x - least) / (most - least)) < 2
    assert least <= t.min() and t.max() <= most
    assert distance(noise, dist.Normal(0, 1).cdf) < 2
    for mask in keep:  # [seeds, blocks, batch, width]
        assert abs(mask.double().mean() - 0.75) < 0.002
        assert mask.shape == (2, 2, 2**15, 8)
    streams = [r[0], r[1], t[0], t[1], *noise[0].T, *noise[1].T, stage.rows()[2][0]]
    streams += [
        stage.noise()[0][0],
        build("critic", [0], table, critic_batch=2**15).rows()[2][0],
    ]
    off_diagonal = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert off_diagonal.abs().max() < 5 / 2**7.5
    other = build(name, [1], table, policy_batch=2**15, behavior_batch=2**15)
    same(
        [x[0] for x in (*other.rows(), *other.noise())],
        [x[1] for x in (s, a, r, s_next, terminal, t, noise, *keep)],
    )


def test_generators_are_a_function_of_seed_and_purpose_alone():
    purposes = [*STAGES, "value", "q", "noise_model", "policy"]
    seeds = [0, 1, 2, 3, 256, 2**31, 2**32, 2**40]
    numbers = {generator(x, y).initial_seed() for x in seeds for y in purposes}
    assert len(numbers) == len(seeds) * len(purposes)
    assert generator(3, "q").initial_seed() == generator(3, "q").initial_seed()


@pytest.mark.parametrize(
    "kind, inputs",
    [("value", "s"), ("q", "sa"), ("noise_model", "ast"), ("policy", "s")],
)
@pytest.mark.parametrize("copies", [None, 2])
def test_networks_are_the_plain_modules_of_their_seeds(kind, inputs, copies):
    new, before = srpo.builders(tiny(), 3, 2)[kind], torch.get_rng_state()
    axes = (3, copies) if copies else (3,)
    many = Networks(new, [0, 5, 7], kind, copies).double()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    same(
        Networks(new, [5], kind).double().network.state_dict(),
        {
            key: x[1:2, 0] if copies else x[1:2]
            for key, x in many.network.state_dict().items()
        },
    )
    with torch.no_grad():
        for x in many.parameters():
            x += torch.randn_like(x) / 10
    inputs = [
        torch.rand(*axes, 4, *size, dtype=F64)
        for size in ({"s": [3], "a": [2], "t": []}[x] for x in inputs)
    ]
    out = many(*inputs)
    for place in np.ndindex(*axes):
        near(out[place], plain(many, new, *place)(*(x[place] for x in inputs)))
    assert [*dict(many.named_parameters())] == [
        f"network.{key}" for key, _ in new().named_parameters()
    ]


def test_twins_differ_and_frequencies_are_of_their_scale():
    twins = TwinQ(3, 2).twins
    assert len(torch.cat([twin[0].bias for twin in twins]).unique()) == 2 * 256
    many = Networks(lambda: NoiseModel(1, 1, 8, 1), range(100), "noise_model")
    frequencies = many.network.frequencies  # of N(0, 30²)
    assert abs(frequencies.std() - 30) < 1.2 and abs(frequencies.mean()) < 1.6
    assert "network.frequencies" not in dict(many.named_parameters())


@pytest.mark.parametrize("compiling", [False, True])
def test_mish_is_that_of_torch(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    x = torch.cat([torch.linspace(-40, 40, 321), tensor([-1e4, 1e4])]).double()
    for dtype, error in (F64, 1e-14), (F32, 1e-6):
        x = x.detach().to(dtype).requires_grad_()
        near(Mish()(x), F.mish(x.double()), error, error)
        slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (Mish()(x), F.mish(x))]
        near(*slopes, 10 * error)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64])
def test_time_features_stay_float32_whatever_the_precision(dtype):
    model, seen = NoiseModel(3, 2, 8, 1).eval(), []
    (a_t, s), t = (torch.randn(64, 2), torch.randn(64, 3)), torch.rand(64)
    frequencies, reference = model.frequencies.clone(), model(a_t, s, t)
    phase = 2 * math.pi * t[:, None] * frequencies
    features = torch.cat([phase.sin(), phase.cos()], 1).to(dtype)
    model.to(dtype)
    model.embed_time.register_forward_pre_hook(
        lambda module, given: seen.append(given[0])
    )
    out = model(a_t.to(dtype), s.to(dtype), t)
    assert model.frequencies.dtype == F32 and out.dtype == dtype
    same([model.frequencies, seen[0]], [frequencies, features])
    near(out, reference, 0.03)


def test_a_noise_model_is_idqls_network_and_drops_out_as_a_module_does():
    model, a_t, s = NoiseModel(3, 2, 16, 2, dropout=0.5), *torch.randn(2, 64, 3)
    a_t, t = a_t[:, :2], torch.rand(64)

    def expected(keep):  # x + MLP(LayerNorm(dropout(x)))
        phase = 2 * math.pi * t[:, None] * model.frequencies
        time = model.embed_time(torch.cat([phase.sin(), phase.cos()], 1))
        x = model.input(torch.cat([a_t, s, time], 1))
        for mask, block in zip(keep, model.blocks):
            up, _, down = block.mlp
            y = F.layer_norm(x * mask / 0.5, [16], block.norm.weight, block.norm.bias)
            x = x + down(F.mish(up(y)))
        return model.output[1](F.mish(x))

    keep = torch.rand(2, 64, 16) < 0.5
    near(model(a_t, s, t, keep), expected(keep), 1e-5)
    torch.manual_seed(1)
    dropped = model(a_t, s, t)
    torch.manual_seed(1)
    keep = [F.dropout(torch.ones(64, 16), 0.5) > 0 for _ in range(2)]
    near(dropped, expected(keep), 1e-5)
    near(model.eval()(a_t, s, t), expected([0.5, 0.5]), 1e-5)


def test_extraction_reaches_the_optimum_of_states_it_has_not_seen():
    """A policy of two layers; your own behavior N(0.4 s, 0.3²), Q = a: a* = 0.4 s + β/κ."""
    table = torch.rand(500, 5, generator=torch.Generator().manual_seed(2)) * 2 - 1
    settings = tiny(
        beta=(0.1, 0.05), policy_steps=300, policy_batch=64, policy_width=32
    )
    own = (lambda s, a: a.sum(-1)), gaussian(lambda s: 0.4 * s, 0.3)
    stage = srpo.Extraction(settings, table.double().numpy(), (1, 1), [0], *own)
    stage.run(report=lambda line: None)
    s = torch.linspace(-0.9, 0.9, 50, dtype=F64)[:, None]
    for i, beta in enumerate((0.1, 0.05)):
        new = srpo.builders(settings, 1, 1)["policy"]
        exact = 0.4 * s + beta / kappa("sigma2", 0.3)
        near(plain(stage.policy, new, 0, i)(s), exact, 0.03)  # the networks' fit


def test_a_trained_noise_model_recovers_the_score_of_a_mixture():
    a, t = LINE.density(tensor(0.0)).sample((20000,)), 0.02 + 0.96 * torch.rand(20000)
    a, t = a / 2, t.double()
    table = torch.cat([torch.zeros(20000, 1), a, torch.zeros(20000, 3)], 1)
    table, a = table[a[:, 0].abs() <= 1], a
    options = {"dropout": 0.0, "behavior_batch": 128, "behavior_width": 32}
    options |= {"behavior_lr": 5e-3, "behavior_blocks": 1, "behavior_steps": 300}
    stage = srpo.Behavior(tiny(**options), table, (1, 1), [0])
    stage.run(report=lambda line: None)
    net = plain(
        stage.noise_model, srpo.builders(stage.settings, 1, 1)["noise_model"], 0
    )
    half = Mixture([0.3, 0.7], [[-0.5], [0.4]], [[[0.0125]], [[0.025]]])
    s, noise = 0 * a, torch.randn(20000, 1, dtype=F64)
    exact = half.noise_model(diffuse(a, t, noise), s, t)
    gap = (net(diffuse(a, t, noise), s, t) - exact) ** 2
    assert gap.mean() < 0.1 * (exact**2).mean()
    assert behavior_loss(net, s, a, t, noise) > ((exact - noise) ** 2).mean()


def test_eq2_weights_a_regression_by_the_advantage():
    """exp(β A) = 1, 2 and, past the cap, 100: π minimizes at Σ w a / Σ w; β = 0: the mean."""
    a = tensor([[0.1], [0.4], [0.9]])
    advantage, w = tensor([0, math.log(2) / 3, 7]), tensor([1, 2, 100])
    for beta, w in (3, w), (0.0, torch.ones_like(w)):
        pi = ((w @ a) / w.sum()).requires_grad_()
        loss = srpo.regression_loss(lambda s: pi.expand(3, 1), None, a, advantage, beta)
        near(loss, (w @ (a - pi) ** 2 / 3)[0])
        near(torch.autograd.grad(loss, pi)[0], 0)
    with pytest.raises(ValueError, match=r"one shape.*advantage \[3, 1\]"):
        srpo.regression_loss(lambda s: a, None, a, advantage[:, None], 3)


def test_settings_and_networks_are_those_of_appendix_c_and_table_2():
    betas = [5, 6, 5, 8, 4, 2, 1, 20, 20, 1, 20, 5, 10, 50, 5]  # hundredths, by name
    assert [beta for _, beta in sorted(srpo.TABLE_2.items())] == [
        x / 100 for x in betas
    ]
    for task, beta in srpo.TABLE_2.items():
        given, maze = Settings(task), "antmaze" in task
        ours = given.tau, given.policy_layers, given.grad_norm, given.iql_beta
        assert ours == ((0.9, 4, "released", 10.0) if maze else (0.7, 2, "off", 3.0))
        assert given.beta == (beta,)
        sweep = range(1, 6) if "umaze" in task else range(3, 9)
        sweep = sweep if maze else (1, 2, 5, 10, 20, 50)
        assert Settings(task, beta="sweep").beta == tuple(x / 100 for x in sweep)
    for kind, steps, batch in (
        ("critic", 1.5e6, 256),
        ("behavior", 2e6, 2048),
        ("policy", 1e6, 256),
    ):
        ours = [getattr(given, f"{kind}_{what}") for what in ("steps", "batch", "lr")]
        assert ours == [steps, batch, 3e-4]
    ours = given.gamma, given.target_rate, given.dropout, given.behavior_decay
    assert ours == (0.99, 0.005, 0.1, 0.01)
    assert (given.weighting, given.baseline) == ("sigma2", True)

    def dense(*sizes):
        return sum((i + 1) * o for i, o in zip(sizes, sizes[1:]))

    kinds = [type(layer).__name__ for layer in Policy(11, 3, layers=4)]
    assert kinds == ["Linear", "ReLU"] * 4 + ["Linear", "Tanh"]
    networks = Policy(11, 3), *(new() for new in srpo.builders(given, 11, 3).values())
    assert [sum(x.numel() for x in net.parameters()) for net in networks] == [
        dense(11, 256, 256, 3),
        dense(11, 256, 256, 1),
        2 * dense(14, 256, 256, 1),
        dense(64, 128, 128)
        + dense(142, 256)
        + 3 * (512 + dense(256, 1024, 256))
        + dense(256, 3),
        dense(11, 256, 256, 256, 256, 3),  # AntMaze's
    ]


@pytest.mark.parametrize("field, wrong", [("tau", 1.0), ("gamma", math.nan), ("critic_steps", 0),
    ("critic_steps", 1.5), ("beta", (0.1, 0.1)), ("beta", (-1.0,)), ("weighting", "sigma3"),
    ("also", ("ppo",)), ("dropout", -0.1), ("baseline", 2), ("grad_norm", "papre")])  # fmt: skip
def test_settings_out_of_range_are_named(field, wrong):
    with pytest.raises(ValueError, match=f"^{field} "):
        Settings("hopper-medium-v2", **{field: wrong})


def test_settings_need_a_beta_alone():
    assert Settings(beta=0.1).beta == (0.1,) and Settings(beta=[0.1, 1]).beta == (
        0.1,
        1,
    )
    assert Settings(beta="sweep").beta == (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    for task, told in ("my-own-task", "my-own-task"), ("", "this task"):
        with pytest.raises(
            ValueError, match=f"give --beta: Table 2 has none for {told}"
        ):
            Settings(task)


@pytest.mark.parametrize(
    "place, wrong, message",
    [
        ((3, 0), math.nan, "NaN or infinite"),
        ((3, 9), math.inf, "NaN or infinite"),
        ((0, 3), 1.001, r"outside \[-1, 1\]"),
        ((0, 4), -1.001, r"outside \[-1, 1\]"),
    ],
)
def test_rows_that_would_train_nonsense_are_refused(place, wrong, message):
    table = ROWS.double().numpy().copy()
    table[0, 3:5] = 1, -1
    same(srpo.check_table(table, 3, 2), torch.tensor(table).float())
    for shape in (table[:, :9], table[0], table[:0]):
        with pytest.raises(ValueError, match=r"not \[N, 10\]"):
            srpo.check_table(shape, 3, 2)
    table[place] = wrong
    with pytest.raises(ValueError, match=message):
        srpo.Critic(tiny(), table, (3, 2), [0])


def test_a_stage_reports_its_losses_and_the_seeds_that_are_lost():
    stage, lines = build("srpo", [4, 9], policy_steps=20), []
    with torch.no_grad():
        next(stage.parameters())[1] = math.nan
    stage.run(lines.append)
    assert lines == [
        f"srpo: step {k} of 20, not finite: seed [9]" for k in range(2, 21, 2)
    ]
    stage, lines = build("critic", [0, 1], critic_steps=3), []
    terms, losses_of = [], stage.losses
    stage.losses = lambda *batch: terms.append(losses_of(*batch)) or terms[-1]
    take(3, stage)
    losses, lost = stage.read_losses()
    mean = torch.stack([torch.stack(x) for x in terms]).mean(0).detach()
    same(losses, dict(zip(("value_loss", "q_loss"), mean)), 1e-12)
    take(1, stage)
    same(stage.read_losses()[0]["q_loss"], terms[-1][1].detach(), 1e-12)


# ------------------------------------ the step: compiled, in bfloat16, as a CUDA graph


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
@pytest.mark.parametrize(
    "name, width, dtype",
    [*((x, 8, F64) for x in STAGES), *((x, 256, F32) for x in STAGES)],
)
def test_compiled_steps_are_the_eager_ones(name, width, dtype):
    if not LONG:
        pytest.skip("takes long: LONG=1 pytest")
    torch._dynamo.reset()
    size = {f"{kind}_width": width for kind in ("critic", "behavior", "policy")}
    eager, fast = (build(name, [0, 1], dtype=dtype, **size) for _ in range(2))
    fast.losses = side_by_side.compiled(fast.losses)
    take(2, eager, fast)
    same(fast.read_losses(), eager.read_losses(), 1e-9 if dtype == F64 else 1e-4)
    if dtype == F64:
        same(fast.weights(), eager.weights(), 1e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_bfloat16_products_change_the_behavior_loss_little(device):
    exact, half = (build("behavior", [0, 1], ROWS.to(device), dtype=F32) for _ in "ab")
    exact.bfloat16, half.bfloat16 = False, True
    batch = *exact.rows(), *exact.noise()
    losses = [stage.losses(*batch)[0] for stage in (exact, half)]
    slopes = [
        torch.cat(
            [
                x.flatten()
                for x in torch.autograd.grad(loss.sum(), [*stage.parameters()])
            ]
        )
        for loss, stage in zip(losses, (exact, half))
    ]
    assert losses[1].dtype == slopes[1].dtype == F32
    assert 0 < (losses[0] - losses[1]).abs().max() < 0.02 * losses[0].max()  # 8 bits
    assert (slopes[0] - slopes[1]).norm() < 0.1 * slopes[0].norm()


@GPU
@pytest.mark.parametrize("compiled", [False, True])
@EACH_STAGE
def test_replayed_cuda_graphs_take_the_eager_steps(name, compiled):
    steps = {f"{kind}_steps": 60 for kind in ("critic", "behavior", "policy")}
    one_by_one, graphs = (
        build(name, [0, 1], ROWS.cuda(), dtype=F32, **steps) for _ in range(2)
    )
    if compiled:
        torch._dynamo.reset()
        one_by_one.losses = side_by_side.compiled(one_by_one.losses)
        graphs.losses = side_by_side.compiled(graphs.losses)
    graphs.run(report=lambda line: None)
    for _ in range(60):
        one_by_one.step()
    one_by_one.done = 60
    assert graphs.loop.graph
    same(state(graphs), state(one_by_one))
    same(graphs.rows(), one_by_one.rows())


@pytest.fixture
def cuda(monkeypatch):
    """A stand-in for torch.cuda's graphs: what is recorded, a replay does again."""
    log, waits = [], SimpleNamespace(wait_stream=lambda other: None)
    made = SimpleNamespace(log=log, generators=[], fails=False)

    class Graph:
        register_generator_state = made.generators.append

        def replay(self):
            log.extend(self.steps)

    @contextlib.contextmanager
    def graph(one, stream):
        if made.fails:
            raise RuntimeError("an old driver")
        before, enabled = len(log), gc.isenabled()
        yield
        one.steps = log[before:]
        del log[before:]
        assert not enabled

    for name, fake in {
        "Stream": lambda: waits,
        "current_stream": lambda: waits,
        "stream": contextlib.nullcontext,
        "CUDAGraph": Graph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return made


def test_steps_are_recorded_once_and_replayed(cuda):
    loop = Steps(lambda: cuda.log.append("step"), ["a", "b"], True)
    for most, taken in (24, 1), (25, 3), (100, 25), (25, 25), (24, 1), (1, 1), (99, 25):
        before = len(cuda.log)
        assert loop.take(most) == taken == len(cuda.log) - before
    assert cuda.generators == ["a", "b"] and gc.isenabled()


def test_steps_go_on_one_by_one_where_no_graph_can_be_captured(cuda):
    cuda.fails, loop = True, Steps(lambda: cuda.log.append("step"), [], True)
    with pytest.warns(UserWarning, match="no CUDA graph.*an old driver") as told:
        taken = [loop.take(100) for _ in range(3)]
    assert taken == [3, 1, 1] and len(cuda.log) == 5 and len(told) == 1
    assert gc.isenabled()
    with warnings.catch_warnings(action="error"):
        assert Steps(lambda: None, [], False).take(100) == 1
