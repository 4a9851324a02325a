"""The proof: SRPO's equations on analytic Gaussians, Algorithm 1 beside plain PyTorch.

The reference is something else than the code: a closed form, autograd, torch.optim.
"""

import contextlib
import io
import itertools
import math
import os
import sys
from functools import partial
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock, call

import numpy as np
import pytest
import torch
from torch import distributions as dist
from torch import nn
from torch.nn import functional as F

import diffusion
import srpo
from diffusion import alpha_sigma, behavior_loss, diffuse, log_likelihood, sample, score
from models import NoiseModel, Policy, TwinQ, Value
from seeds import Mish, Networks, Steps, compiled, generator
from srpo import Settings, policy_loss, q_loss, surrogate_gradient, value_loss

torch.set_num_threads(1)
F32, F64, LONG = torch.float32, torch.float64, os.environ.get("LONG")
tensor, mish = partial(torch.tensor, dtype=F64), nn.Mish()
same = partial(torch.testing.assert_close, rtol=0, atol=0, equal_nan=True)
SHAPES = pytest.mark.parametrize("seeds", [(), (1,), (6,)], ids=str)
WEIGHTINGS = pytest.mark.parametrize("weighting", ["sigma2", "one", "alpha_over_sigma"])
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def near(x, reference, atol=1e-10, rtol=0.0):
    reference = torch.as_tensor(reference, dtype=x.dtype).expand_as(x).detach()
    same(x.detach(), reference, atol=float(atol), rtol=float(rtol))


def scales(t):
    """α, σ and ρ of the VP-SDE, by way of ρ = exp(∫ β) − 1, ∫ β = 0.1 t + 9.95 t²."""
    rho = torch.expm1(0.1 * t + 9.95 * t**2)
    return (1 + rho).rsqrt(), (rho / (1 + rho)).sqrt(), rho


def omega(weighting, t):
    alpha, sigma, _ = scales(t)
    by_name = {"sigma2": sigma**2, "one": 1 + 0 * t, "alpha_over_sigma": alpha / sigma}
    return by_name[weighting]


def nodes(t=None):
    """Times and weights of an average over U(0.02, 0.98), or of one time."""
    u, weight = map(tensor, np.polynomial.legendre.leggauss(32))
    return (0.5 + 0.48 * u, weight / 2) if t is None else (tensor([t]), tensor([1.0]))


def hermite(count):
    """Nodes and weights of an average over ε ~ N(0, 1), by quadrature."""
    x, w = map(tensor, np.polynomial.hermite_e.hermegauss(count))
    return x, w / w.sum()


def kappa(weighting, width):
    """E_t ω σ α / (α² width² + σ²): Eq. 15's pull to the mean of N(m, width²)."""
    (t, w), (alpha, sigma, _) = nodes(), scales(nodes()[0])
    return w @ (omega(weighting, t) * sigma * alpha / (alpha**2 * width**2 + sigma**2))


class Mixture:
    """Σ w_k N(m_k, S_k), the behavior, diffused exactly; by autograd, its ε*."""

    def __init__(self, w, m, S):
        self.w, self.m, self.S = tensor(w), tensor(m), tensor(S)

    def density(self, t):
        alpha, sigma, _ = (x[..., None, None] for x in scales(t))
        eye = torch.eye(self.m.shape[-1]).double()
        C = alpha[..., None] ** 2 * self.S + sigma[..., None] ** 2 * eye
        w = dist.Categorical(self.w.expand(*t.shape, -1))
        return dist.MixtureSameFamily(w, dist.MultivariateNormal(alpha * self.m, C))

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
A, quadratic = torch.arange(12, dtype=F64).view(4, 3) - 5, lambda s, a: -(a**2).sum(-1)


def gaussian(m, width, schedule=scales):
    """ε* of N(m, width²) in each dimension; m: of s, or numbers."""

    def noise_model(a_t, s, t):
        alpha, sigma, *_ = schedule(t.unsqueeze(-1))
        gap = a_t - alpha * (m(s) if callable(m) else m)
        return sigma * gap / (alpha**2 * width**2 + sigma**2)

    return noise_model


def descent(noise_model, a, weighting="sigma2", t=None, noises=2, **more):
    """Mean and mean square of −∂L_sur/∂a, of actions [..., d]: if Q = 0, of ω (ε̂ − ε).

    By quadrature over ε and t ~ U(0.02, 0.98), or at one t. Two nodes, ε = ±1, suffice
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


# ---------- Eq. 4: a_t = α a + σ ε, α² = exp(−∫ β), α² + σ² = 1
@pytest.mark.parametrize(
    "dtype, errors", [(F64, (1e-12, 1e-12)), (F32, (1.5e-6, 5e-7))]
)
def test_eq4_scales_have_all_their_digits(dtype, errors):
    t = tensor([1e-7, 1e-3, 0.02, 0.5, 0.98, 1]).to(dtype)  # at 1e-7 1 − α²
    (alpha, sigma, _), ours = scales(t.double()), alpha_sigma(t)  # is 0 in float32
    near(ours[0] / alpha, 1, errors[0])  # |log α| = 5 amplifies α's rounding
    near(ours[1] / sigma, 1, errors[1])
    a, noise = torch.randn(2, 6, 3, dtype=F64)
    near(diffuse(a, t.double(), noise), (alpha * a.T + sigma * noise.T).T)


# ---------- Eq. 6: ∇ log μ_t(a_t) = −ε* / σ_t
@SHAPES
def test_eq6_score_is_the_gradient_of_the_log_density(seeds):
    t = tensor([1e-3, 0.02, 0.3, 0.98]).expand(*seeds, 4)
    a_t = torch.randn(*seeds, 4, 1, dtype=F64).requires_grad_()
    normal = Mixture([1.0], [[0.4]], [[[0.09]]])
    for behavior, noise_model in (normal, gaussian(0.4, 0.3)), (LINE, LINE.noise_model):
        (reference,) = torch.autograd.grad(behavior.density(t).log_prob(a_t).sum(), a_t)
        near(score(noise_model, a_t, None, t), reference, rtol=1e-11)


# ---------- Eq. 7: da_t/dt = f a_t + g²/(2σ) ε*, which keeps quantiles
def test_eq7_drift_and_diffusion_belong_to_the_schedule():
    t = torch.linspace(1e-3, 1, 9, dtype=F64).requires_grad_()
    alpha, sigma, _ = scales(t)
    (f,) = torch.autograd.grad(alpha.log().sum(), t, retain_graph=True)
    (growth,) = torch.autograd.grad((sigma**2).sum(), t)
    near(diffusion.drift_diffusion(t)[0], f)
    near(diffusion.drift_diffusion(t)[1], growth - 2 * f * sigma**2)


@pytest.mark.parametrize(
    "behavior, shape", [(WIDE, (6, 4, 3)), (LINE, (9, 1))], ids=["affine", "quantile"]
)
def test_eq7_maps_a_gaussian_affinely_and_a_mixture_by_quantiles(behavior, shape):
    def quantiles(t, a_t):  # along each axis of S
        (alpha, sigma, _), (v, axes) = scales(tensor(t)), torch.linalg.eigh(behavior.S)
        z = (a_t.unsqueeze(-2) - alpha * behavior.m).unsqueeze(-2) @ axes
        cdf = dist.Normal(0, (alpha**2 * v + sigma**2).sqrt()).cdf(z.squeeze(-2))
        return behavior.w @ cdf

    a_1, errors = torch.randn(shape, dtype=F64), []
    for steps in (50, 100, 200):
        a_0 = torch.no_grad()(sample)(behavior.noise_model, None, a_1, steps)
        errors.append((quantiles(0.0, a_0) - quantiles(1.0, a_1)).abs().max())
    assert errors[2] < 1.2e-4 and all(3 < x / y < 5 for x, y in zip(errors, errors[1:]))
    at_1 = behavior.density(tensor(1.0)).log_prob  # N(0, I) would be off by up to 2e-2
    exact = behavior.density(tensor(0.0)).log_prob(a_0)
    near(log_likelihood(behavior.noise_model, None, a_0, 100, at_1), exact, 1e-5)
    exact = dist.Normal(0, 1).log_prob(a_1).sum(-1)  # it stands still, and is the end
    near(log_likelihood(gaussian(0, 1), None, a_1, 2), exact)  # if not told


# ---------- Eq. 11: Σ w_i (Q_i − V) = 0, w = τ or 1 − τ; Eq. 12: Q = r + γ V(s′)
@SHAPES
@pytest.mark.parametrize("tau", [0.7, 0.9])
def test_eq11_and_eq12_solve_a_two_state_chain(tau, seeds, gamma=0.99):
    """A: r = 0 to B, or r = 1 and the end. B: r = 1 or, at a time limit, r = 0 to A."""
    v_a = (1 - tau + tau**2 * gamma) / (1 - tau * gamma**2)  # (1 − τ) + τ γ V_B
    v_b = gamma * v_a + tau
    exact_q = [gamma * v_b, 1, 1 + gamma * v_a, gamma * v_a]
    gaps = [q - v for q, v in zip(exact_q, (v_a, v_a, v_b, v_b))]
    least = sum(abs(tau - (gap < 0)) * gap**2 for gap in gaps) / 4
    rows = tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]])
    s, s_next, r, terminal = (row.expand(*seeds, 4) for row in rows)
    v = tensor([v_a, v_b]).expand(*seeds, 2).requires_grad_()
    larger = tensor([[0, 2, 0, 2], [2, 0, 2, 0]])  # of a twin that Eq. 11 does not see
    q = (tensor(exact_q) + larger).expand(*seeds, 2, 4).requires_grad_()
    value, twins = lambda s: v.gather(-1, s.long()), lambda s, a: q
    step = s, 0, r, s_next, terminal, gamma
    losses = value_loss(value, twins, s, 0, tau), q_loss(twins, value, *step)
    slopes = [torch.autograd.grad(x.sum(), (v, q), allow_unused=True) for x in losses]
    assert slopes[0][1] is slopes[1][0] is None
    assert losses[0].shape == losses[1].shape == seeds
    near(losses[0], least)
    near(losses[1], 4 * 4 / 8)  # the mean of eight squares
    near(slopes[0][0], 0)
    near(slopes[1][1], larger / 4)


def test_eq11_and_eq12_refuse_columns_that_would_broadcast():
    column, row = torch.ones(4, 1), torch.ones(4)
    v, q = lambda s: s.squeeze(-1), lambda s, a: s.squeeze(-1).expand(2, -1)
    wrong = [(v, q, column, row), (v, q, row, column), (lambda s: s, q, row, row)]
    wrong += [(v, lambda s, a: x, row, row) for x in (torch.ones(2, 4, 1), column)]
    for value, twins, r, end in wrong:
        with pytest.raises(ValueError, match=r"one shape, a number a row: .*\[4\]"):
            q_loss(twins, value, column, column, r, column, end, 0.99)
    with pytest.raises(ValueError, match=r"one shape.*v \[4, 1\], q \[4\]"):
        value_loss(lambda s: s, q, column, column, 0.7)


# ---------- Eq. 13: ε* = argmin E ‖ε_ψ(a_t | s, t) − ε‖²; its minimum d − σ² tr C⁻¹
@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_eq13_regression_recovers_the_exact_noise_model(t):
    m, width, t = tensor([0.2, -0.5]), tensor([0.3, 0.6]), tensor(t)
    alpha, sigma, _ = scales(t)
    sign = tensor([[1], [1], [-1], [-1]])  # with noise ±1: all the moments that matter
    a, noise, s = m + width * sign, sign[[0, 2, 0, 2]].expand(4, 2), m.expand(4, 2)
    p, exact = tensor([[1, 1], [0, 0]]).requires_grad_(), gaussian(lambda s: s, width)
    loss = behavior_loss(lambda *x: p[0] * exact(*x) + p[1], s, a, t.expand(4), noise)
    near(loss, (1 - sigma**2 / (alpha**2 * width**2 + sigma**2)).sum())
    near(torch.autograd.grad(loss, p)[0], 0)  # and the loss is convex


# ---------- Eq. 14: Q − (1/β) E ω (σ/α) KL[π_t‖μ_t]; Eq. 15: ∇Q − (1/β) ω (ε* − ε)
@SHAPES
@WEIGHTINGS
@pytest.mark.parametrize("t", [0.02, 0.1, 0.3, 0.6, 0.98])
def test_eq15_is_the_gradient_of_eq14(weighting, seeds, t):
    a = torch.randn(*seeds, 3, dtype=F64).requires_grad_()
    beta, (alpha, sigma, rho) = 0.5 + torch.rand(seeds, dtype=F64), scales(tensor(t))
    S = rho * torch.eye(3, dtype=F64)  # KL[π_t‖μ_t]: of π, μ, both widened by N(0, ρ I)
    mu = dist.MultivariateNormal(WIDE.m[0], WIDE.S[0] + S)
    kl = dist.kl_divergence(dist.MultivariateNormal(a, S), mu)
    weight = omega(weighting, tensor(t)) * sigma / alpha
    objective = quadratic(None, a) - weight * kl / beta
    (reference,) = torch.autograd.grad(objective.sum(), a)
    given = WIDE.noise_model, a, weighting, t
    ours, _ = descent(*given, q=quadratic, beta=beta.unsqueeze(-1))
    near(-ours, reference, 1e-9)
    assert not ours.requires_grad and a.grad is None


@WEIGHTINGS
def test_eq15_is_the_gradient_of_eq14_for_a_mixture(weighting):
    (x, w), (t, weight), a = hermite(64), nodes(), tensor([-0.9, 0.1, 0.4])
    (alpha, sigma, _), a = scales(t), a.requires_grad_()
    a_t = (alpha[:, None] * a[:, None, None] + sigma[:, None] * x).unsqueeze(-1)
    log_mu = LINE.density(t[:, None].expand(3, 32, 64)).log_prob(a_t)  # [3, t, ε]: what
    regularizer = -(log_mu @ w) @ (weight * omega(weighting, t) * sigma / alpha)
    (reference,) = torch.autograd.grad(regularizer.sum(), a)  # moves with a in the KL
    ours, _ = descent(LINE.noise_model, a[:, None], weighting, noises=64)
    near(ours[:, 0], reference)


def test_eq15_takes_a_weighting_and_a_noise_schedule_of_your_own():
    """α = 1 − t, σ = t and ω = α σ: E ω (ε* − ε) = (α σ)² (a − m) / C."""
    a, linear = torch.randn(4, 3, dtype=F64), {"schedule": lambda t: (1 - t, t)}
    behavior = gaussian(0.2, 0.5, *linear.values())
    ours, _ = descent(behavior, a, lambda alpha, sigma: alpha * sigma, 0.3, **linear)
    near(ours, 0.21**2 * (a - 0.2) / (0.7**2 * 0.5**2 + 0.3**2))


def test_eq10_is_the_limit_of_eq15_at_the_rate_rho():
    a, inverse = torch.randn(4, 3, dtype=F64), torch.linalg.inv(WIDE.S[0])
    limit = (a - WIDE.m[0]) @ inverse  # −∇ log μ
    for t in (1e-3, 1e-4, 1e-5):
        ours, _ = descent(WIDE.noise_model, a, "alpha_over_sigma", t)
        rho = scales(tensor(t))[2]
        near((limit - ours) / rho, limit @ inverse, 0.02, rtol=50 * rho)


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("kind", ["plain", "compiled", "own gradient", "batch norm"])
def test_eq15_takes_any_critic_and_leaves_it_alone(kind, grad):
    class Twice(torch.autograd.Function):  # Σ a, whose gradient is said to be 2
        forward = staticmethod(lambda context, a: a.sum(-1))
        backward = staticmethod(lambda context, slope: slope[:, None] * (0 * A + 2))

    norm = nn.BatchNorm1d(3, dtype=F64)  # ∂/∂a Σ z³ of z = (a − mean) / deviation
    deviation = (A.var(0, correction=0) + norm.eps).sqrt()
    z = (A - A.mean(0)) / deviation
    g = 3 * z**2 - 3 * (z**2).mean(0) - z * 3 * (z**3).mean(0)
    q, exact = {
        "plain": (quadratic, -2 * A),
        "compiled": (torch.compile(quadratic, backend="aot_eager"), -2 * A),
        "own gradient": (lambda s, a: Twice.apply(a), 0 * A + 2),
        "batch norm": (lambda s, a: (norm(a) ** 3).sum(-1), g / deviation),
    }[kind]
    with grad():
        a = A.clone().requires_grad_()
        pi, t, noise = 1 * a, tensor([0.3] * 4), 0 * A
        ours = surrogate_gradient(q, lambda *given: noise, None, pi, t, noise, 1)
    near(ours, exact)
    assert not ours.requires_grad and a.grad is norm.weight.grad is None
    assert pi.requires_grad == (grad is torch.enable_grad)


def test_eq15_refuses_what_would_broadcast_or_clone_the_behavior():
    given = {"q": quadratic, "noise_model": gaussian(0, 1), "s": None, "a": A}
    given |= {"t": torch.ones(4), "noise": 0 * A, "beta": 0.1}
    for wrong, message in (
        ({"q": lambda s, a: quadratic(s, a.detach())}, "does not depend on a"),
        ({"q": torch.no_grad()(quadratic)}, "does not depend on a"),
        ({"q": lambda s, a: quadratic(s, a)[:, None]}, r"one shape.* q \[4, 1\]"),
        ({"q": lambda s, a: quadratic(s, a).expand(2, 4)}, r"one shape.* q \[2, 4\]"),
        ({"t": torch.ones(4, 1)}, r"one shape.* t \[4, 1\]"),
        ({"beta": torch.ones(4, 1)}, r"one shape.* t_with_beta \[4, 4\]"),
        ({"beta": 0}, "beta 0 is not above 0"),
        ({"beta": math.nan}, "beta nan is not above 0"),
        ({"grad_norm": "papre"}, "papre"),
    ):
        with pytest.raises(ValueError, match=f"^.*{message}.*$"):  # in one line
            surrogate_gradient(**given | wrong)


# ---------- Baseline: Var ω ε* = ω² c², Var ω (ε* − ε) = ω² (1 − c)², c = ρ/(ρ + w²)
@pytest.mark.parametrize(
    "weighting, width, helps",  # a Dirac, of width 0, leaves no noise at all
    [("sigma2", 0, True), ("sigma2", 0.1, True), ("sigma2", 1, True), ("one", 1, True)]
    + [("alpha_over_sigma", 0.1, True), ("alpha_over_sigma", 1, False)],
)
def test_baseline_helps_but_for_alpha_over_sigma(weighting, width, helps):
    (t, weight), model, a = nodes(), gaussian(0.4, width), tensor([[0.4], [0.9]])
    c = scales(t)[2] / (scales(t)[2] + width**2)
    off, on = (weight @ (omega(weighting, t) * x) ** 2 for x in (c, 1 - c))
    for baseline, variance in (False, off), (True, on):
        mean, square = descent(model, a, weighting, baseline=baseline)
        near(mean, kappa(weighting, width) * (a - 0.4))
        near(square[0], variance)
    assert (on < off) == helps


# ---------- β_norm = β / ‖∇Q‖₂ (paper), or ∇Q by its root mean square (released code)
@pytest.mark.parametrize("d", [1, 3, 8])
def test_grad_norm_takes_the_norm_of_each_row_alone(d):
    size = torch.tensor([[1e-6], [10.0], [0.0], [1e-30]])  # 1e-60 is 0 in float32
    c, (a, noise) = torch.randn(4, d) * size, torch.randn(2, 4, d)  # c: ∇Q
    row = gaussian(0.2, 0.3), None, a, torch.tensor([0.02, 0.3, 0.5, 0.7]), noise, 0.05
    ours = partial(surrogate_gradient, lambda s, a: (c * a).sum(-1), *row)
    norm, pull = c.double().norm(dim=-1, keepdim=True), ours() - c
    paper, released = norm * pull, math.sqrt(d) * c / norm.clamp(min=1e-20)
    near(ours(grad_norm="paper"), c + paper, 1e-5, 1e-5)  # ∇Q = 0: no update at all
    near(ours(grad_norm="released"), released + pull, 1e-5, 1e-5)  # to the data


# ---------- Prop. 1: KL[π_t‖μ_t] = 0 only for π = μ. Remark 1: yet optima move with t
@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_prop1_diffusion_can_be_divided_out_of_the_characteristic_function(t):
    (x, w), u, t = hermite(64), torch.linspace(-3, 3, 7, dtype=F64), tensor(t)
    a, share = tensor([-0.7, 0.1, 0.9]), tensor([0.2, 0.3, 0.5])
    alpha, sigma, _ = scales(t)
    a_t = diffuse(a.view(3, 1, 1), t.expand(3, 64), x.view(64, 1)) * u  # [3, 64, 7]
    phi_t = torch.einsum("i,j,iju->u", share, w, torch.cos(a_t))
    phi = phi_t * torch.exp(sigma**2 * u**2 / 2)  # so μ_t determines μ
    near(phi, share @ torch.cos(alpha * a[:, None] * u))


@pytest.mark.parametrize(
    "t, weighting, merged",
    [(0.05, "one", False), (0.15, "one", False), (0.22, "one", True)]
    + [(None, "alpha_over_sigma", False), (None, "one", False), (None, "sigma2", True)],
)
def test_remark1_two_modes_merge_at_large_t_and_under_sigma2(t, weighting, merged):
    """ε* of N(±1, v): σ (x − α tanh(α x/W)) / W, W = α² v + σ². Merged: all go to 0."""
    a, (times, weight), (x, w) = torch.linspace(0.01, 1.2, 60), nodes(t), hermite(64)
    a, (alpha, sigma, _) = a.double(), (scale[:, None] for scale in scales(times))
    a_t, W = alpha * a[:, None, None] + sigma * x, alpha**2 * 0.05 + sigma**2
    noise = sigma * (a_t - alpha * torch.tanh(alpha * a_t / W)) / W  # [60, t, ε]
    reference = (noise - x) @ w @ (weight * omega(weighting, times))
    ours, _ = descent(TWO_MODES.noise_model, a[:, None], weighting, t, noises=64)
    near(ours[:, 0], reference)
    assert bool((reference > 0).all()) == merged


# ---------- Optima: m + β c/κ of Q = c·a; (2 q + κ m/β) / (2 + κ/β) of Q = −‖a − q‖²
@WEIGHTINGS
def test_adam_on_eq15_reaches_the_optimum(weighting):
    widths = [0.1, 0.3, 1.0]  # six actors: three widths, two Q
    behavior = gaussian(0.2, tensor(widths * 2).view(6, 1, 1))
    actors = torch.zeros(6, 1, dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([actors], 0.1)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    q = {"q": lambda s, a: torch.cat([a[:3], -((a[3:] - 1.5) ** 2)]).sum(-1)}
    for _ in range(400):
        ascent = -descent(behavior, actors, weighting, beta=0.1, **q)[0]
        optimizer.zero_grad()
        policy_loss(actors.unsqueeze(1), ascent.unsqueeze(1)).sum().backward()
        optimizer.step()
        cosine.step()
    pull = torch.stack([kappa(weighting, x) for x in widths])
    optimum = torch.cat([0.2 + 0.1 / pull, (3 + 2 * pull) / (2 + 10 * pull)])
    near(actors[:, 0], optimum, 1e-6)


# ---------- Algorithm 1: its loops beside plain loops of PyTorch
STAGES = {x.name: x for x in (*srpo.Stage.__subclasses__(), srpo.BehaviorCloning)}
EACH = pytest.mark.parametrize("name", STAGES)
ROWS = torch.randn(200, 10, generator=torch.Generator().manual_seed(1))
ROWS[:, 3:5].tanh_()  # s, a, r, s′, terminal
ROWS[:, 9] = (ROWS[:, 9] > 0).float()


def tiny(**options):
    small = {"target_rate": 0.3, "behavior_blocks": 2, "behavior_decay": 0.1}
    small |= {"dropout": 0.25, "beta": (0.1, 0.5)}
    for i, kind in enumerate(("critic", "behavior", "policy")):
        small |= {f"{kind}_steps": 8, f"{kind}_batch": 16 + i}
        small |= {f"{kind}_width": 8 + i, f"{kind}_lr": 0.01 + 0.001 * i}
    return Settings(**small | options)


def build(name, seeds=(3, 7), table=ROWS, dtype=F64, **options):
    """A stage, a policy's with a fresh critic and noise model; it draws in float32."""
    settings, fixed = tiny(**options), ()
    if name not in ("critic", "behavior"):
        critic = build("critic", seeds, table, dtype, **options)
        fixed = critic.q_target, critic.value
    if name == "srpo":
        noise_model = build("behavior", seeds, table, dtype, **options).noise_model
        fixed = (lambda s, a: critic.q_target(s, a).mean(-2)), noise_model
    stage = STAGES[name](settings, table, (3, 2), seeds, *fixed).to(dtype)
    stage.table, batch = stage.table.to(dtype), stage.batch
    stage.batch = lambda: [x.to(dtype) if x.is_floating_point() else x for x in batch()]
    return stage


def fresh(kind, seed=7, **options):
    """The ordinary module that a seed begins with."""
    kind = kind.removesuffix("_target")
    torch.set_rng_state(generator(seed, kind).get_state())
    return srpo.builders(tiny(**options), 3, 2)[kind]().double().eval()


def take(steps, *stages):
    assert all(stage.advance(1) == 1 for stage in stages for _ in range(steps))


def state(stage):
    random = [x.get_state() for x in stage.generators]
    return stage.state_dict(), stage.optimizer.state_dict(), random, stage.done


@pytest.mark.parametrize(
    "name, layers, equation",
    [(name, 2, {}) for name in STAGES]
    + [("srpo", 4, {"grad_norm": "released"}), ("srpo", 2, {"grad_norm": "paper"})]
    + [("srpo", 2, {"weighting": "one", "baseline": False})],
)
def test_a_stage_is_a_plain_loop_of_torch_optim(name, layers, equation):
    """With the same rows and noise; of two seeds the second, and the second β."""
    options = {"policy_layers": layers, **equation}
    stage, batches = build(name, **options), []
    losses_of, place = stage.losses, (1, 1) if name == "srpo" else (1,)
    stage.losses = lambda *batch: batches.append(batch) or losses_of(*batch)
    take(9, stage)  # the ninth of a policy's steps has the rate 0
    kinds = "value", "q", "q_target", "noise_model", "policy"
    networks = {kind: fresh(kind, **options) for kind in kinds}
    value, q, q_target, noise_model, policy = networks.values()
    own = {"critic": ["value", "q", "q_target"], "behavior": ["noise_model"]}
    own = own.get(name, ["policy"])
    size, lr = {"critic": (16, 0.01), "behavior": (17, 0.011)}.get(name, (18, 0.012))
    trained = nn.ModuleList(networks[x] for x in own if x != "q_target").parameters()
    decay = 0.1 if name == "behavior" else 0
    adam = torch.optim.AdamW if decay else torch.optim.Adam
    optimizer = adam(trained, lr, weight_decay=decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for batch in batches:
        s, a, r, s_next, terminal, *noise = (x[1] for x in batch)
        assert len(s) == size
        if name == "critic":
            row = s, a, r, s_next, terminal, 0.99
            losses = value_loss(value, q_target, s, a, 0.7), q_loss(q, value, *row)
        elif name == "behavior":
            dropped = partial(noise_model, keep=noise.pop())
            losses = [behavior_loss(dropped, s, a, *noise)]
        elif name == "srpo":
            given = (lambda s, a: q(s, a).mean(0)), noise_model, s, policy(s), *noise
            ascent = surrogate_gradient(*given, beta=0.5, **equation)
            losses = [-(ascent * policy(s)).sum(1).mean()]
        else:
            advantage = q(s, a).amin(0) - value(s)
            weight = (3 * advantage).exp().clamp(max=100) if name == "iql" else 1
            losses = [(weight * ((policy(s) - a) ** 2).sum(1)).mean()]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        if name == "critic":
            for old, new in zip(q_target.parameters(), q.parameters()):
                old.data.lerp_(new.data, 0.3)
        elif name != "behavior":
            cosine.step()
    assert stage.cosine == (stage.optimizer.param_groups[0]["lr"] == 0)
    for kind in own:
        ours = {key: x[place] for key, x in stage.weights()[kind].items()}
        same(ours, {**networks[kind].state_dict()}, atol=1e-9)


def test_extraction_reaches_the_optimum_of_states_it_has_not_seen():
    """With your own Q = a, behavior N(0.4 s, 0.3²) and rows: a* = 0.4 s + β/κ."""
    options = {"policy_steps": 300, "policy_batch": 64, "policy_width": 32}
    own = (lambda s, a: a.sum(-1)), gaussian(lambda s: 0.4 * s, 0.3)
    table, beta = np.random.default_rng(2).uniform(-1, 1, (500, 5)), tensor([0.1, 0.05])
    settings = tiny(beta=beta.tolist(), **options)
    stage = srpo.Extraction(settings, table, (1, 1), [0], *own).run(report=str).double()
    s = torch.linspace(-0.9, 0.9, 50, dtype=F64).view(1, 1, 50, 1).expand(1, 2, 50, 1)
    near(stage.policy(s), 0.4 * s + beta.view(2, 1, 1) / kappa("sigma2", 0.3), 0.03)


def test_a_trained_noise_model_recovers_the_score_of_a_mixture():
    options = {"behavior_batch": 128, "behavior_width": 32, "behavior_blocks": 1}
    options |= {"behavior_lr": 5e-3, "behavior_steps": 300, "dropout": 0.0}
    mixture = Mixture([0.3, 0.7], [[-0.5], [0.4]], [[[0.01]], [[0.02]]])
    a = mixture.density(tensor(0.0)).sample((1, 20000)).clip(-1, 1)
    table = a[0] * tensor([0, 1, 0, 0, 0])
    stage = srpo.Behavior(tiny(**options), table, (1, 1), [0]).run(report=str).double()
    s, t, noise = 0 * a, 0.02 + 0.96 * torch.rand_like(a[..., 0]), torch.randn_like(a)
    a_t, ours = diffuse(a, t, noise), stage.noise_model
    exact = mixture.noise_model(a_t, s, t)
    assert ((ours(a_t, s, t) - exact) ** 2).mean() < 0.1 * (exact**2).mean()
    assert behavior_loss(ours, s, a, t, noise) > ((exact - noise) ** 2).mean()


def test_eq2_weights_a_regression_by_the_advantage():
    """exp(β A) = 1, 2 and, capped, 100: optimal is Σ w a / Σ w; with β = 0 the mean."""
    a, advantage = tensor([[0.1], [0.4], [0.9]]), tensor([0, math.log(2) / 3, 7])
    for beta, w in (3, tensor([1, 2, 100])), (0.0, tensor([1, 1, 1])):
        pi = (w @ a / w.sum()).requires_grad_()
        loss = srpo.regression_loss(lambda s: pi.expand(3, 1), None, a, advantage, beta)
        near(loss.expand(1), w @ (a - pi) ** 2 / 3)
        near(torch.autograd.grad(loss, pi)[0], 0)
    with pytest.raises(ValueError, match=r"one shape.*advantage \[3, 1\]"):
        srpo.regression_loss(lambda s: a, None, a, advantage[:, None], 3)


# ---------- Algorithm 1: what one can rely on
@EACH
def test_a_seed_and_a_beta_train_as_if_alone_and_a_nan_stays_its_own(name):
    six, ill = (build(name, range(6), beta=(0.3, 0.1)) for _ in "ab")
    alone, sick = build(name, [4], beta=0.1), (1, 0) if name == "srpo" else (1,)
    take(2, six, ill, alone)
    for x in ill.parameters():
        x.data[sick] = math.nan
    take(3, six, ill, alone)
    fine, other, ours = (stage.weights() for stage in (six, ill, alone))
    assert [x.read_losses()[1] for x in (six, ill, alone)] == [[], [1], []]
    for network in fine:
        for key, x in fine[network].items():
            near(ours[network][key][0], x[4][1:] if name == "srpo" else x[4], 1e-9)
            x[sick] = other[network][key][sick] = 0
            same(x, other[network][key])


@EACH
def test_a_rerun_and_a_resumed_stage_have_the_bits_of_one_that_never_stopped(name):
    whole, again, first, second = (build(name, dtype=F32) for _ in range(4))
    take(3, first)
    torch.save(state(first), file := io.BytesIO())
    file.seek(0)
    weights, moments, random, second.done = torch.load(file, weights_only=True)
    second.load_state_dict(weights)
    second.optimizer.load_state_dict(moments)
    for x, saved in zip(second.generators, random):
        x.set_state(saved)
    take(8, whole, again)
    take(5, second)
    same(state(again), state(whole))
    same(state(second), state(whole))


@EACH
def test_nothing_is_read_to_the_host_within_a_step(name):
    stage, cpu = build(name), [torch.profiler.ProfilerActivity.CPU]
    take(1, stage)
    stage.optimizer.step = lambda: None  # fused, on a CPU, it reads its own rate
    with torch.profiler.profile(activities=cpu) as profile:
        stage.step()
    seen = {"aten::bmm", "aten::_local_scalar_dense", "aten::nonzero"}
    assert seen & {event.name for event in profile.events()} == {"aten::bmm"}


@pytest.mark.parametrize("name, low, high", [("behavior", 0, 1), ("srpo", 0.02, 0.98)])
def test_rows_times_noise_and_dropout_have_their_distributions(name, low, high):
    def distance(x, cdf):  # Kolmogorov and Smirnov's; above 2 once in 1,500 times
        x, n = x.flatten().sort().values, x.numel()
        return (cdf(x) - (torch.arange(n) + 0.5) / n).abs().max() * math.sqrt(n)

    N, table = 2**15, ROWS[:10].clone()
    big = {f"{kind}_batch": N for kind in ("critic", "behavior", "policy")}
    table[:, 5] = torch.arange(10)
    stage, other = build(name, table=table, **big), build("critic", [3], **big)
    s, a, r, s_next, terminal, t, noise, *keep = stage.batch()
    rows = torch.cat([s, a, r[..., None], s_next, terminal[..., None]], -1)
    same(rows, table.double()[r.long()])
    for numbers in r.long():  # chi-squared of 9 degrees
        assert ((numbers.bincount() - N / 10) ** 2).sum() / (N / 10) < 30
    assert distance(t, lambda x: (x - low) / (high - low)) < 2
    assert low <= t.min() < low + 0.001 and high - 0.001 < t.max() <= high
    assert distance(noise, dist.Normal(0, 1).cdf) < 2
    for mask in keep:
        assert mask.shape == (2, 2, N, 9) and abs(mask.double().mean() - 0.75) < 0.002
    again = stage.batch()
    streams = *r, *t, *noise[0].T, *noise[1].T, again[2][0], again[5][0]
    streams = torch.stack([*streams, other.batch()[2][0]])
    assert (torch.corrcoef(streams) - torch.eye(11)).abs().max() < 5 / math.sqrt(N)
    words = *STAGES, "value", "q", "noise_model", "policy"
    assert (
        len({generator(x, y).initial_seed() for x in (0, 1, 256) for y in words}) == 27
    )


def test_a_table_of_nonsense_is_refused():
    table = ROWS.double().numpy().copy()
    table[0, 3:5] = 1, -1
    same(srpo.check_table(table, 3, 2), torch.tensor(table).float())
    wrong = [(x, r"not \[N, 10\]") for x in (table[:, :9], table[0], table[:0])]
    for column, x in (3, 1.001), (4, -1.001), (0, math.nan), (9, 1e99):
        bad = table.copy()
        bad[5, column] = x
        wrong.append((bad, "outside" if column in (3, 4) else "NaN or infinite"))
    for table, message in wrong:
        with pytest.raises(ValueError, match=message):
            srpo.Critic(tiny(), table, (3, 2), [0])


def test_a_stage_reports_its_mean_losses_and_the_seeds_that_are_lost():
    stage, lines, terms = build("critic", critic_steps=32), [], []
    losses_of = stage.losses
    stage.losses = lambda *batch: terms.append(losses_of(*batch)) or terms[-1]
    stage.run(lines.append)
    v, q = (torch.stack(x[30:]).mean() for x in zip(*terms))  # since the tenth line
    assert lines[10:] == [f"critic: step 32 of 32, value_loss {v:.3g}, q_loss {q:.3g}"]
    stage.loop, stage.done = MagicMock(take=lambda most: most), 0
    assert stage.run(report=str).done == 32 and not stage.sums.requires_grad
    stage = build("srpo", [4, 9])
    next(stage.parameters()).data[1] = math.nan
    stage.run(lines.append)
    assert lines[-1] == "srpo: step 8 of 8, not finite: seed [9]"


# ---------- App. C: networks and settings
def test_networks_are_the_plain_modules_of_their_seeds():
    seeds, before = [0, 5, 7], torch.get_rng_state()
    many = Networks(srpo.builders(tiny(), 3, 2)["q"], seeds, "q", copies=2).double()
    assert torch.equal(torch.get_rng_state(), before)
    s, a = torch.randn(3, 2, 4, 3, dtype=F64), torch.randn(3, 2, 4, 2, dtype=F64)
    out, weights, sa = many(s, a), many.network.state_dict(), torch.cat([s, a], -1)
    for i, j in np.ndindex(3, 2):
        one = fresh("q", seeds[i])
        same({key: x[i, j] for key, x in weights.items()}, {**one.state_dict()})
        near(out[i, j], torch.cat([twin(sa[i, j]).T for twin in one.twins]))
    assert (one.twins[0][0].bias != one.twins[1][0].bias).all()


def test_a_noise_model_is_idqls_network_and_drops_out_as_a_module_does():
    model, a_t = NoiseModel(3, 2, 16, 2, dropout=0.25), torch.randn(64, 2)
    s, t = torch.randn(64, 3), torch.rand(64)

    def expected(keep):  # x + MLP(LayerNorm(dropout(x)))
        phase = 2 * math.pi * t[:, None] * model.frequencies
        time = model.embed_time(torch.cat([phase.sin(), phase.cos()], 1))
        x = model.input(torch.cat([a_t, s, time], 1))
        for mask, block in zip(keep, model.blocks):
            up, _, down = block.mlp
            y = torch.layer_norm(
                x * mask / 0.75, [16], block.norm.weight, block.norm.bias
            )
            x = x + down(mish(up(y)))
        return model.output[1](mish(x))

    torch.manual_seed(1)
    keep = torch.stack(
        [torch.dropout(torch.ones(64, 16), 0.25, train=True) > 0 for _ in range(2)]
    )
    torch.manual_seed(1)
    near(model(a_t, s, t), expected(keep), 1e-5)
    near(model(a_t, s, t, keep), expected(keep), 1e-5)
    for solve in (sample, log_likelihood):
        with pytest.raises(ValueError, match="dropout is on"):
            solve(model.train(), s, a_t, 2)
        for fine in model.eval(), NoiseModel(3, 2, 8, dropout=0.0):
            solve(fine, s, a_t, 2)
    near(model(a_t, s, t), expected([0.75, 0.75]), 1e-5)
    x = torch.cat([NoiseModel(1, 1, 8).frequencies for _ in range(100)])  # N(0, 30²)
    assert abs(x.std() - 30) < 1.2 and abs(x.mean()) < 1.6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64])
def test_time_features_are_float32s_whatever_the_precision(dtype):
    model, t, (a_t, s) = NoiseModel(2, 2, 8), torch.rand(64), torch.randn(2, 64, 2)
    phase = 2 * math.pi * t[:, None] * model.frequencies
    exact, seen = [model.frequencies.clone(), model.eval()(a_t, s, t)], []
    model.to(dtype).embed_time.register_forward_pre_hook(lambda _, x: seen.extend(x))
    near(model(a_t.to(dtype), s.to(dtype), t.double()).float(), exact[1], 0.03)
    features = torch.cat([phase.sin(), phase.cos()], 1).to(dtype)
    same([model.frequencies, *seen], [exact[0], features])


@pytest.mark.parametrize("compiling", [False, True])
def test_mish_is_that_of_torch(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    for dtype, error in (F64, 1e-14), (F32, 1e-6):
        x = torch.linspace(-40, 40, 321, dtype=dtype).sinh().requires_grad_()
        ours, exact = Mish()(x), mish(x.double())
        near(ours, exact, error, error)
        slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (ours, exact)]
        near(*slopes, 10 * error)


def test_settings_and_networks_are_those_of_appendix_c_and_table_2():
    betas = [5, 6, 5, 8, 4, 2, 1, 20, 20, 1, 20, 5, 10, 50, 5]  # in hundredths, by name
    assert [x for _, x in sorted(srpo.TABLE_2.items())] == [x / 100 for x in betas]
    for task, beta in srpo.TABLE_2.items():
        given, maze = Settings(task), "antmaze" in task
        ours = given.tau, given.policy_layers, given.grad_norm, given.iql_beta
        assert ours == ((0.9, 4, "released", 10.0) if maze else (0.7, 2, "off", 3.0))
        assert given.beta == (beta,)
        sweep = range(1, 6) if "umaze" in task else range(3, 9)
        sweep = [x / 100 for x in (sweep if maze else (1, 2, 5, 10, 20, 50))]
        assert [*Settings(task, beta="sweep").beta] == sweep
    maze2d = Settings("maze2d-umaze-v1", beta=1)
    assert (maze2d.tau, maze2d.policy_layers, maze2d.grad_norm) == (0.9, 2, "released")
    paper = {"critic_steps": 1_500_000, "behavior_steps": 2_000_000, "critic_lr": 3e-4}
    paper |= {"policy_steps": 1_000_000, "behavior_lr": 3e-4, "policy_lr": 3e-4}
    paper |= {"critic_batch": 256, "behavior_batch": 2048, "policy_batch": 256}
    paper |= {"gamma": 0.99, "target_rate": 0.005, "dropout": 0.1, "episodes": 20}
    paper |= {"behavior_decay": 0.01, "weighting": "sigma2", "baseline": True}
    paper |= {"critic_width": 256, "behavior_width": 256, "policy_width": 256}
    assert vars(given) | paper == vars(given)

    def dense(*sizes):
        return sum((i + 1) * o for i, o in zip(sizes, sizes[1:]))

    kinds = [type(layer).__name__ for layer in Policy(11, 3, layers=4)]
    assert kinds == ["Linear", "ReLU"] * 4 + ["Linear", "Tanh"]
    small = {"critic_width": 8, "behavior_width": 9, "policy_width": 7, "dropout": 0.3}
    given = Settings(task, behavior_blocks=2, policy_layers=3, **small)
    built = [new() for new in srpo.builders(given, 11, 3).values()]
    assert built[2].blocks[0].dropout.p == 0.3
    paper = Value(11), TwinQ(11, 3), NoiseModel(11, 3), Policy(11, 3)
    for nets, v, w, b, pi in (paper, 256, 256, 3, [256] * 2), (built, 8, 9, 2, [7] * 3):
        behavior = (
            dense(64, 128, 128) + dense(142, w, 3) + b * (2 * w + dense(w, 4 * w, w))
        )
        exact = dense(11, v, v, 1), 2 * dense(14, v, v, 1), behavior, dense(11, *pi, 3)
        assert tuple(sum(x.numel() for x in net.parameters()) for net in nets) == exact


def test_settings_need_a_beta_alone_and_name_what_is_wrong():
    for beta, x in (0.1, (0.1,)), ([0.1, 1], (0.1, 1)), ("sweep", srpo.SWEEPS[""]):
        assert Settings(beta=beta).beta == x
    wrong = {"tau": 1.0, "gamma": 1, "critic_lr": math.nan, "policy_batch": 1.5}
    wrong |= {"beta": -1.0, "also": ("ppo",), "weighting": "sigma3", "dropout": -0.1}
    wrong |= {"baseline": 2, "grad_norm": "papre"}
    for field, x in (*wrong.items(), ("beta", (0.1, 0.1))):
        with pytest.raises(ValueError, match=f"^{field} "):
            Settings("hopper-medium-v2", **{field: x})
    for task in "my-own", "":
        told = f"^give --beta: Table 2 has none for {task or 'this task'}$"
        with pytest.raises(ValueError, match=told):
            Settings(task)


# ---------- The step: compiled, in bfloat16, as a CUDA graph
@EACH
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_losses_are_the_eager_ones(name, backend, monkeypatch):
    if (backend == "inductor" or name in ("iql", "bc")) and not LONG:
        pytest.skip("takes long: LONG=1 pytest, which needs g++")
    torch._dynamo.reset()  # it gives up after eight stages in a process
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    width, dtype, error = (8, F64, 1e-10) if backend != "inductor" else (256, F32, 1e-5)
    size = {f"{kind}_width": width for kind in ("critic", "behavior", "policy")}
    eager, fast = (build(name, dtype=dtype, **size) for _ in "ab")
    fast.losses = compiled(fast.losses)
    take(1, eager, fast)
    same(fast.read_losses(), eager.read_losses(), atol=error)
    same(*([x.grad for x in stage.parameters()] for stage in (fast, eager)), atol=error)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_bfloat16_products_change_the_behavior_loss_little(device):
    exact, half = (build("behavior", table=ROWS.to(device), dtype=F32) for _ in "ab")
    assert half.bfloat16 == (device == "cuda")
    exact.bfloat16, half.bfloat16 = False, True
    take(1, exact, half)
    (losses,), (other,) = (x.read_losses()[0].values() for x in (exact, half))
    assert 0 < (losses - other).abs().max() < 0.02 * losses.max()  # it has 8 bits
    for x, y in zip(exact.parameters(), half.parameters()):
        assert (x.grad - y.grad).norm() < 0.1 * x.grad.norm() and y.grad.dtype == F32


@GPU
@EACH
@pytest.mark.parametrize("fast", [False, True])
def test_replayed_cuda_graphs_take_the_eager_steps(name, fast):
    steps = {f"{kind}_steps": 60 for kind in ("critic", "behavior", "policy")}
    eager, graph = (build(name, table=ROWS.cuda(), dtype=F32, **steps) for _ in "ab")
    for stage in (eager, graph):
        stage.losses = compiled(stage.losses) if fast else stage.losses
    take(60, eager)
    while graph.done < 60:
        graph.advance(60 - graph.done)
    assert graph.loop.graph
    same(state(graph), state(eager))
    same(graph.batch(), eager.batch())


@pytest.mark.parametrize("fails", [False, True])
def test_steps_are_replayed_or_go_on_one_by_one(fails, monkeypatch, recwarn):
    log, taken = [], []

    @contextlib.contextmanager
    def graph(one, stream):  # writes down the steps, and doesn't take them
        before = len(log)
        yield
        one.replay = partial(log.extend, log[before:])
        del log[before:]
        if fails:
            raise RuntimeError("an old driver")

    for name in ("Stream", "stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", graph)
    stage = build("critic")
    stage.loop = Steps(lambda: log.append(None), ["a", "b"], True)
    for most in (24, 25, 100, 24, 25, 1):
        taken.append(stage.advance(most))
        assert sum(taken) == stage.done == len(log)
    assert taken == ([1, 3, 1, 1, 1, 1] if fails else [1, 3, 25, 1, 25, 1])
    known = torch.cuda.CUDAGraph().register_generator_state.call_args_list
    assert known == [call("a"), call("b")]
    assert [str(x.message)[-13:] for x in recwarn] == fails * ["an old driver"]


# ---------------- Beside the authors' own code: RELEASED=FOLDER pytest -k released
# (a clone of github.com/thu-ml/SRPO). With the same first weights, rows, times, noise
# and dropout, in float64, theirs has all our losses, gradients and weights of 5 steps.


@pytest.fixture
def released(monkeypatch):
    """new(class, task, ...): one of theirs; new.numbers: what it will draw."""
    if not os.environ.get("RELEASED"):
        pytest.skip("RELEASED=FOLDER: a clone of github.com/thu-ml/SRPO")
    for absent in "d4rl", "gym":  # for their evaluation only
        monkeypatch.setitem(sys.modules, absent, ModuleType(absent))
    monkeypatch.syspath_prepend(os.environ["RELEASED"])
    import SRPO as theirs
    from utils import marginal_prob_std

    def new(kind, task, **options):
        options |= {"env": task, "device": "cpu", "q_layer": 2, "actor_blocks": 3}
        schedule = [partial(marginal_prob_std, device="cpu")] * (kind != "SRPO_IQL")
        return getattr(theirs, kind)(5, 2, *schedule, SimpleNamespace(**options))

    def draw(*shape, **how):
        return new.numbers.pop(0)

    def dropout(x, p, training, inplace):
        return draw() * x / (1 - p) if training else x

    monkeypatch.setattr(torch, "rand", draw)
    monkeypatch.setattr(torch, "randn_like", draw)
    monkeypatch.setattr(F, "dropout", dropout)
    monkeypatch.setattr(torch, "tensor", torch.as_tensor)  # of a tensor it would warn
    # deaf to their "cuda" and float32, and to the float32 of our features of time
    monkeypatch.setattr(nn.Module, "to", lambda module, *where, **how: module)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(F64)
    yield new
    torch.set_default_dtype(F32)


def ours(kind, settings, *fixed):
    return kind(settings, torch.zeros(1, 10), (3, 2), [0], *fixed)


def weights(our, their):
    """Our tensors, theirs and their gradients, by order; but ours embeds t first, and
    our Q reads s, a, theirs a, s. Their layers `residual` are never used.
    """
    named = [x for x in their.named_parameters() if "residual" not in x[0]]
    named.sort(key=lambda x: not x[0].startswith(("embed", "cond_model")))
    states = our.network.state_dict(keep_vars=True).values()
    for x, (name, y) in zip(states, named, strict=True):
        a_dim = 2 if name in ("q1.0.weight", "q2.0.weight") else 0
        yield x, *[z if z is None else z.roll(-a_dim, -1) for z in (y.data, y.grad)]


def equal(x, y):
    torch.testing.assert_close(x.detach(), y.detach().view_as(x), atol=1e-10, rtol=0)


def five_steps(new, update, stages, pairs, times=(0, 1), draws=0, factor=1):
    """Takes them and yields our losses; theirs has each of our weights, from the first
    on, and `factor` times each of our gradients.
    """
    for x, y, _ in itertools.chain(*[weights(*pair) for pair in pairs]):
        x.data.copy_(y.view_as(x))
    for _ in range(5):
        s, a, r, s_next, terminal = torch.randn(32, 10).split([3, 2, 1, 3, 1], -1)
        a, terminal = a.tanh(), (terminal > 1).to(F64)
        rows = s, a, r.squeeze(-1), s_next, terminal.squeeze(-1)
        u, noise = torch.empty(32).uniform_(), torch.randn(32, 2)
        keep, losses = torch.empty(3, 32, 256).uniform_() < 0.9, {}
        noises = [times[0] + (times[1] - times[0]) * u, noise, keep][:draws]
        new.numbers = [u, noise, *keep]
        update({"s": s, "a": a, "r": r, "s_": s_next, "d": terminal})
        for stage in stages:
            stage.batch = lambda: [x[None] for x in (*rows, *noises)]
            stage.step()
            losses |= stage.read_losses()[0]
        yield losses
        for x, y, gradient in itertools.chain(*[weights(*pair) for pair in pairs]):
            equal(x, y)
            if gradient is not None:
                equal(factor * x.grad, gradient)


@pytest.mark.parametrize("task", ["hopper-medium-v2", "antmaze-umaze-v2"])
def test_released_critic_and_iql_take_our_steps(released, task):
    """Eq. 11, 12; and Eq. 2, which theirs trains beside, with V and Q of each step."""
    theirs = released("SRPO_IQL", task)
    settings = Settings(task, policy_layers=2, policy_steps=1_500_000)
    critic, their = ours(srpo.Critic, settings), theirs.q[0]
    iql = ours(srpo.WeightedRegression, settings, critic.q_target, critic.value)
    pairs = (critic.value, their.vf), (critic.q, their.q0)
    pairs += (critic.q_target, their.q0_target), (iql.policy, theirs.deter_policy)
    for losses in five_steps(released, theirs.update_iql, [critic, iql], pairs):
        equal(losses["value_loss"], their.v_loss)
        equal(losses["q_loss"], their.q_loss)
        equal(losses["regression_loss"], theirs.policy_loss)


def test_released_behavior_takes_our_steps(released):
    """Eq. 13; theirs draws t of U(0.001, 1), ours, given the same here, of U(0, 1)."""
    theirs = released("SRPO_Behavior", "hopper-medium-v2")
    stage = ours(srpo.Behavior, Settings("hopper-medium-v2"))
    what = [stage], [(stage.noise_model, theirs.diffusion_behavior)], (0.001, 1), 3
    for losses in five_steps(released, theirs.update_behavior, *what):
        equal(losses["behavior_loss"], theirs.loss)


@pytest.mark.parametrize("regq, layers, beta", [(0, 2, 0.2), (1, 4, 0.05)])
@pytest.mark.parametrize("wt", ["VDS", "stable", "score"])
@pytest.mark.parametrize("baseline", [True, False])
def test_released_policy_takes_our_steps(released, baseline, wt, regq, layers, beta):
    """Eq. 15; theirs is β times ours, so Adam's ε must be, too, for the same steps."""
    how = {"WT": wt + "_noise" * baseline, "regq": regq, "beta": beta}
    how |= {"policy_layer": layers, "n_policy_epochs": 5 / 10_000}  # the whole cosine
    theirs = released("SRPO", "hopper-medium-v2", **how)
    theirs.SRPO_policy_optimizer.param_groups[0]["eps"] *= beta
    weighting = {"VDS": "sigma2", "stable": "one", "score": "alpha_over_sigma"}[wt]
    how = {"policy_layers": layers, "policy_steps": 5, "weighting": weighting}
    how |= {"baseline": baseline, "grad_norm": "released" if regq else "off"}
    settings = Settings(beta=beta, **how)
    q, behavior = ours(srpo.Critic, settings).q, ours(srpo.Behavior, settings)
    fixed = lambda s, a: q(s, a).mean(-2), behavior.noise_model
    stage = ours(srpo.Extraction, settings, *fixed)
    pairs = (q, theirs.q[0].q0_target), (fixed[1], theirs.diffusion_behavior)
    pairs = *pairs, (stage.policy, theirs.SRPO_policy)
    what = [stage], pairs, (0.02, 0.98), 2, beta
    assert len([*five_steps(released, theirs.update_SRPO_policy, *what)]) == 5
