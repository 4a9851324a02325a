"""Every equation of SRPO on analytic Gaussians, then Algorithm 1 beside plain PyTorch.

The reference is always something else than the code: a closed form, an exact value, torch.distributions, autograd of
the objective, torch.optim. Notation: ρ = σ²/α²; a Dirac actor's KL[π_t‖μ_t] depends on t through ρ alone.
"""
import copy
import math
import shutil
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

import models
import srpo
from data import UserError
from diffusion import alpha_sigma, behavior_loss, diffuse, drift_diffusion, log_likelihood, sample, score
from models import Draw, NoiseModel, Policy, TwinQ, Value, fresh, mix
from srpo import Behavior, Critic, Extraction, Regression, Settings, adam, policy_loss, q_loss, surrogate_gradient, value_loss

torch.set_num_threads(1)
F32, F64 = torch.float32, torch.float64
SHAPES = pytest.mark.parametrize("seeds", [(), (1,), (6,)], ids=["no_seed_axis", "one_seed", "six_seeds"])
WEIGHTINGS = pytest.mark.parametrize("weighting", ["sigma2", "one", "alpha_over_sigma"])
BOTH = pytest.mark.parametrize("dtype", [F32, F64])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tensor(x):
    return torch.tensor(x, dtype=F64)


def near(x, reference, atol=1e-10, rtol=0.0):
    reference = torch.as_tensor(reference, dtype=x.dtype).expand_as(x).detach()
    torch.testing.assert_close(x.detach(), reference, atol=float(atol), rtol=rtol)


def scales(t):
    """α, σ and ρ of the VP-SDE, by way of ρ = exp(9.95 t² + 0.1 t) − 1."""
    rho = torch.expm1(9.95 * t**2 + 0.1 * t)
    return (1 + rho).rsqrt(), (rho / (1 + rho)).sqrt(), rho


def omega(weighting, t):
    alpha, sigma, _ = scales(t)
    return {"sigma2": sigma**2, "one": torch.ones_like(t), "alpha_over_sigma": alpha / sigma}[weighting]


class Mixture:
    """The behavior Σ_k w_k N(m_k, S_k), diffused exactly: its density by torch.distributions, its ε* by hand."""

    def __init__(self, w, m, S):
        self.w, self.m, self.S = tensor(w), tensor(m), tensor(S)
        self.variances, self.axes = torch.linalg.eigh(self.S)

    def density(self, t):
        alpha, sigma, _ = (x[..., None, None] for x in scales(t))
        C = alpha[..., None]**2 * self.S + sigma[..., None]**2 * torch.eye(self.m.shape[-1])
        return MixtureSameFamily(Categorical(self.w.expand(*t.shape, -1)), MultivariateNormal(alpha * self.m, C))

    def noise_model(self, a_t, s, t):
        """ε* = σ Σ_k r_k C_k⁻¹ (a_t − α m_k) with the responsibilities r of the diffused components."""
        w, m, variances, axes = (x.to(a_t.dtype) for x in (self.w, self.m, self.variances, self.axes))
        alpha, sigma, _ = (x[..., None, None] for x in scales(t))
        v, z = alpha**2 * variances + sigma**2, torch.einsum("...kd,kde->...ke", a_t.unsqueeze(-2) - alpha * m, axes)
        r = (w.log() - (z**2 / v + v.log()).sum(-1) / 2).softmax(-1)
        return torch.einsum("...k,...ke,kde->...d", r, z / v, axes) * sigma.squeeze(-1)


S3 = [[0.30, 0.12, 0.00], [0.12, 0.20, -0.05], [0.00, -0.05, 0.08]]
WIDE = Mixture([1.0], [[0.3, -0.5, 0.2]], [S3])  # a Gaussian, not isotropic
BUMPY = Mixture([0.3, 0.7], [[0.3, -0.5, 0.2], [-0.6, 0.4, 0.1]], [S3, np.diag([0.05, 0.3, 0.1]).tolist()])
LINE = Mixture([0.3, 0.7], [[-1.0], [0.8]], [[[0.05]], [[0.1]]])  # in one dimension
TWO_MODES = Mixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.05]], [[0.05]]])


def gaussian(m, width):
    """ε* of N(m, width²) in each dimension; m(s), or a number or tensor; width may carry seed axes."""
    def noise_model(a_t, s, t):
        alpha, sigma, _ = scales(t.unsqueeze(-1))
        return sigma * (a_t - alpha * (m(s) if callable(m) else m)) / (alpha**2 * width**2 + sigma**2)
    return noise_model


def nodes(t=None, noises=2):
    """Gauss quadrature over ε ~ N(0, 1) and t ~ U(0.02, 0.98) or at one t: t [M], noise [M, 1], weights [M].

    Two nodes, ε = ±1, are exact for a Gaussian behavior, whose ε* is affine in ε; a mixture wants 64 (to 6e-8).
    """
    (u, v), (x, w) = np.polynomial.legendre.leggauss(32), np.polynomial.hermite_e.hermegauss(noises)
    t, v = (0.5 + 0.48 * tensor(u), tensor(v) / 2) if t is None else (tensor([t]), tensor([1.0]))
    t, x = torch.meshgrid(t, tensor(x), indexing="ij")
    return t.flatten(), x.reshape(-1, 1), torch.outer(v, tensor(w / w.sum())).flatten()


def descent(noise_model, a, t, noise, weighting="sigma2", q=lambda s, a: 0 * a.sum(-1), beta=1, **options):
    """Minus Eq. 15 of each action [N, d] on nodes t, noise: [N, M, d]; ω(t) (ε̂ − ε) where Q = 0."""
    rows = a.unsqueeze(-2).expand(-1, len(t), -1)
    t, noise = t.expand(rows.shape[:-1]), noise.expand_as(rows)
    return -surrogate_gradient(q, noise_model, None, rows, t, noise, beta, weighting, **options)


def mean(weights, rows):
    return torch.einsum("m,nmd->nd", weights, rows)


# ---------------------------------------------- Eq. 4: a_t = α a + σ ε, log α = −4.975 t² − 0.05 t, α² + σ² = 1


@pytest.mark.parametrize("dtype, sigma_tolerance, alpha_tolerance",
                         [(F64, 1e-12, 1e-12), (F32, 5e-7, 1.5e-6)])  # |log α| = 5 amplifies α's rounding
def test_eq4_scales_have_all_their_digits(dtype, sigma_tolerance, alpha_tolerance):
    t, alpha, sigma = tensor([
        [1e-7, 0.9999999949999502, 1.0000049724875924e-4],  # where sqrt(1 − α²) is 0 in float32
        [1e-3, 0.99994502651109762, 0.010485416335094896], [0.02, 0.99701446559817840, 0.077214994579930771],
        [0.5, 0.28118288079675238, 0.95965420206803625], [0.98, 0.0080105969106339601, 0.99996791465383295],
        [1, 0.0065715864949296150, 0.99997840689233868]]).T
    ours = [x.double() for x in alpha_sigma(t.to(dtype))]
    near(ours[0] / alpha, 1, alpha_tolerance)
    near(ours[1] / sigma, 1, sigma_tolerance)


# ----------------------------------------------------------------------------- Eq. 6: ∇ log μ_t(a_t) = −ε* / σ_t


@SHAPES
def test_eq6_score_is_the_gradient_of_the_log_density(seeds):
    t = tensor([1e-3, 0.02, 0.3, 0.98]).expand(*seeds, 4)
    a_t = torch.randn(*seeds, 4, 3, dtype=F64).requires_grad_()
    for behavior in (WIDE, BUMPY):
        reference, = torch.autograd.grad(behavior.density(t).log_prob(a_t).sum(), a_t)
        near(score(behavior.noise_model, a_t.detach(), None, t), reference, rtol=1e-11)


# ------------------------------------------------ Eq. 7: da_t/dt = f a_t + g²/(2σ) ε*, d log q/dt = −divergence


def test_eq7_drift_and_diffusion_belong_to_the_schedule():
    t = torch.linspace(1e-3, 1, 9, dtype=F64).requires_grad_()
    alpha, sigma, _ = scales(t)
    (f,), (growth,) = (torch.autograd.grad(x.sum(), t, retain_graph=True) for x in (alpha.log(), sigma**2))
    near(drift_diffusion(t)[0], f)
    near(drift_diffusion(t)[1], growth - 2 * f * sigma**2)
    near(drift_diffusion(t)[1], 0.1 + 19.9 * t)


@SHAPES
def test_eq7_carries_a_gaussian_by_its_affine_map(seeds):
    a_1, (alpha, sigma, _) = torch.randn(*seeds, 4, 3, dtype=F64), scales(tensor(1.0))
    stretch = (WIDE.variances / (alpha**2 * WIDE.variances + sigma**2)).sqrt()[0]  # along the axes of S
    exact = WIDE.m[0] + (a_1 - alpha * WIDE.m[0]) @ (WIDE.axes[0] * stretch) @ WIDE.axes[0].T
    errors = [(sample(WIDE.noise_model, None, a_1, steps) - exact).abs().max() for steps in (100, 200, 400)]
    assert errors[2] < 3e-4
    assert 3 < errors[0] / errors[1] < 5 and 3 < errors[1] / errors[2] < 5  # second order


def test_eq7_carries_a_mixture_by_its_quantile_map():
    a_1, shares = torch.linspace(-2, 2, 9, dtype=F64)[:, None], []
    for t, x in ((1.0, a_1), (0.0, sample(LINE.noise_model, None, a_1, 400))):
        alpha, sigma, _ = scales(tensor(t))
        parts = Normal(alpha * LINE.m[:, 0], (alpha**2 * LINE.S[:, 0, 0] + sigma**2).sqrt())
        shares.append((parts.cdf(x) * LINE.w).sum(-1))
    near(shares[1], shares[0], 1e-3)


@pytest.mark.parametrize("behavior, seeds", [(WIDE, (1,)), (BUMPY, (6,)), (LINE, ())])
def test_eq7_log_likelihood_is_that_of_the_data(behavior, seeds):
    a = behavior.m[0] + 0.3 * torch.randn(*seeds, 3, behavior.m.shape[-1], dtype=F64)
    at_1 = behavior.density(tensor(1.0)).log_prob  # N(0, I) would be off by α₁ m·a₁, up to 2e-2
    exact = behavior.density(tensor(0.0)).log_prob(a)
    near(log_likelihood(behavior.noise_model, None, a, 100, at_1), exact, 1e-4)
    a = torch.randn(*seeds, 3, 2, dtype=F64)  # N(0, I) stands still, and is what the end is taken for if not told
    near(log_likelihood(gaussian(0, 1), None, a, 2), Normal(0, 1).log_prob(a).sum(-1))


# -------------------- Eq. 10: ∇Q + (1/β) ∇ log μ is the limit t₀ → 0 of ω = δ(t − t₀) α/σ, with an error linear in ρ


def test_eq10_is_the_limit_of_eq15_at_the_rate_rho():
    a, S, m = torch.randn(4, 3, dtype=F64), WIDE.S[0], WIDE.m[0]
    limit = torch.linalg.solve(S, (a - m).T).T  # −∇ log μ
    for t_0 in (1e-3, 1e-4, 1e-5):
        (t, noise, weights), rho = nodes(t_0), scales(tensor(t_0))[2]
        ours = mean(weights, descent(WIDE.noise_model, a, t, noise, "alpha_over_sigma"))
        near(ours, torch.linalg.solve(S + rho * torch.eye(3, dtype=F64), (a - m).T).T, 1e-9)
        near((limit - ours) / rho, torch.linalg.solve(S, limit.T).T, 0.02, rtol=float(50 * rho))


# ---------------- Eq. 11: V = argmin E L₂^τ(min Q − V), the expectile: Σ w_i (Q_i − V) = 0, w = τ above and 1 − τ below


@SHAPES
@BOTH
@pytest.mark.parametrize("values, tau, expectile, least", [
    ([0, 1, 3], 0.7, 24 / 13, 47 / 65), ([0, 1, 3], 0.9, 28 / 11, 59 / 165), ([0, 0, 1], 0.5, 1 / 3, 1 / 9)])
def test_eq11_is_least_at_the_expectile_of_the_smaller_target_twin(values, tau, expectile, least, seeds, dtype):
    v = torch.full((*seeds, 3), expectile, dtype=dtype, requires_grad=True)
    q = (v.new_tensor(values) + v.new_tensor([[0, 2, 0], [1, 0, 1]])).expand(*seeds, 2, 3).clone().requires_grad_()
    loss = value_loss(lambda s: v, lambda s, a: q, None, None, tau)
    slopes = torch.autograd.grad(loss.sum(), (v, q), allow_unused=True)
    assert loss.shape == seeds and slopes[1] is None
    near(loss, least, 1e-6)
    near(slopes[0].sum(-1), 0, 1e-6 if dtype == F32 else 1e-12)  # and the loss is convex


# ----------------------------------------------------------- Eq. 12: Q(s, a) = r + γ V(s′), but r alone at a terminal


@SHAPES
@pytest.mark.parametrize("tau, exact_v, exact_q", [
    (0.7, [78510 / 31393, 99700 / 31393], [3.144108559, 1, 3.475867232, 2.475867232]),
    (0.9, [90190 / 11791, 99900 / 11791], [8.387838182, 1, 8.572563820, 7.572563820])])
def test_eq12_and_eq11_solve_a_two_state_chain(tau, exact_v, exact_q, seeds):
    """A: r = 0 to B, or r = 1 and the end. B: r = 1 to A, or r = 0 to A at a time limit, which is not the end."""
    rows = tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]])
    s, s_next, r, terminal = (row.expand(*seeds, 4) for row in rows)
    v, q = (tensor(x).expand(*seeds, -1).clone().requires_grad_() for x in (exact_v, exact_q + exact_q))
    value, twins = lambda s: v.gather(-1, s.long()), lambda s, a: q.unflatten(-1, (2, 4))
    near(torch.autograd.grad(value_loss(value, twins, s, None, tau).sum(), v)[0], 0, 1e-8)
    loss = q_loss(twins, value, s, None, r, s_next, terminal, 0.99)
    slopes = torch.autograd.grad(loss.sum(), (q, v), allow_unused=True)
    near(slopes[0], 0, 1e-8)
    assert loss.shape == seeds and slopes[1] is None
    off = q_loss(lambda s, a: twins(s, a) + tensor([[1.0], [3.0]]), value, s, None, r, s_next, terminal, 0.99)
    near(off, (1**2 + 3**2) / 2, 1e-7)  # the mean of both twins


# ------------------------------------- Eq. 13: ε* = argmin E ‖ε_ψ(a_t | s, t) − ε‖², and the minimum is d − σ² tr C⁻¹


@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_eq13_regression_recovers_the_exact_noise_model(t):
    S, m, (alpha, sigma, _) = WIDE.S[0], WIDE.m[0], scales(tensor(t))
    points = torch.cat([torch.eye(3), -torch.eye(3)]).double() * math.sqrt(3)  # of moments 0 and I
    a, noise = (m + points @ torch.linalg.cholesky(S).T).repeat_interleave(6, 0), points.repeat(6, 1)

    def loss(p):
        def affine(a_t, s, times):
            assert s == "s" and (times == t).all()
            return a_t @ p[:9].view(3, 3).T + p[9:]
        return behavior_loss(affine, "s", a, tensor(t).expand(36), noise)

    zero, inverse = torch.zeros(12, dtype=F64), torch.linalg.inv(alpha**2 * S + sigma**2 * torch.eye(3, dtype=F64))
    fit = -torch.linalg.solve(torch.func.hessian(loss)(zero), torch.func.grad(loss)(zero))  # one Newton step
    near(fit, torch.cat([(sigma * inverse).flatten(), -sigma * alpha * inverse @ m]), 1e-9)
    near(loss(fit), 3 - sigma**2 * inverse.trace())


# ----------- Eq. 14: L_sur = E Q − (1/β) E_t ω (σ/α) KL[π_t‖μ_t];  Eq. 15, Prop. 2: its gradient ∇Q − (1/β) ω (ε* − ε)


@SHAPES
@WEIGHTINGS
@BOTH
def test_eq15_is_the_gradient_of_eq14(seeds, weighting, dtype):
    a, s, noise = torch.randn(3, *seeds, 5, 3, dtype=F64)
    t, beta = tensor([0.02, 0.1, 0.3, 0.6, 0.98]).expand(*seeds, 5), torch.linspace(0.5, 1, 6, dtype=F64)
    beta, eye = beta[:math.prod(seeds)].reshape(*seeds, 1, 1), torch.eye(3, dtype=F64)  # β of each seed

    def q(s, a):
        return -((a - s)**2).sum(-1) * (1 + s[..., 0]**2)

    alpha, sigma, _ = (x[..., None] for x in scales(t))
    a.requires_grad_()
    kl = kl_divergence(MultivariateNormal(alpha * a, sigma[..., None]**2 * eye),
                       MultivariateNormal(alpha * WIDE.m, alpha[..., None]**2 * WIDE.S + sigma[..., None]**2 * eye))
    objective = q(s, a) - omega(weighting, t) * (sigma / alpha / beta).squeeze(-1) * kl
    reference, = torch.autograd.grad(objective.sum(), a)
    twice = [torch.cat(x, len(seeds)).to(dtype).detach() for x in ((s, s), (a, a), (t, t), (noise, -noise))]
    ours = surrogate_gradient(q, WIDE.noise_model, *twice, beta.to(dtype), weighting)
    assert ours.dtype == dtype and not ours.requires_grad
    # ε* is affine in ε, so a pair ±ε is the expectation exactly; its halves grow as ω does
    near(ours.double().unflatten(-2, (2, 5)).mean(-3), reference, 1e-9 if dtype == F64 else 4e-4, 1e-5)


@WEIGHTINGS
def test_eq15_is_the_gradient_of_eq14_for_a_mixture(weighting):
    a, (t, noise, weights) = tensor([[-0.9], [0.1], [0.4]]).requires_grad_(), nodes(noises=64)
    alpha, sigma, _ = scales(t)
    log_mu = LINE.density(t).log_prob(alpha[:, None] * a[:, None] + sigma[:, None] * noise)  # entropy is constant
    reference, = torch.autograd.grad(-(weights * omega(weighting, t) * sigma / alpha * log_mu).sum(), a)
    near(mean(weights, descent(LINE.noise_model, a.detach(), t, noise, weighting)), reference, 1e-9)


def test_eq15_one_sample_has_its_sign_its_baseline_and_its_beta():
    for baseline, exact in ((True, 0.0981377127), (False, 0.8225378692)):
        ours = descent(gaussian(0.2, 0.3), tensor([[0.5]]), tensor([0.3]), tensor([[1.2]]), beta=0.1, baseline=baseline,
                       q=lambda s, a: 2 * a.sum(-1))
        near(ours, 10 * exact - 2, 1e-8)


# -------------- Baseline: E ω ε = 0; the variance of ω ε* is ω² c², of ω (ε* − ε) it is ω² (1 − c)², c = ρ/(ρ + width²)


@BOTH
def test_baseline_leaves_no_noise_on_a_dirac_behavior(dtype):
    m, t, noise = torch.randn(1, 2, dtype=dtype), torch.linspace(0.02, 0.98, 20, dtype=dtype), torch.randn(20, 2, dtype=dtype)
    near(descent(gaussian(m, 0.0), m, t, noise, "one"), 0, 5e-6 if dtype == F32 else 1e-12)


@pytest.mark.parametrize("weighting, width, without, with_it", [  # averages over t
    ("sigma2", 1, 0.567521, 0.0153333), ("sigma2", 0.1, 0.645987, 1.43509e-5), ("one", 1, 0.647654, 0.181072),
    ("alpha_over_sigma", 0.1, 1.92131, 0.534492), ("alpha_over_sigma", 1, 0.0856368, 3.37887)])
def test_baseline_cuts_the_variance_except_for_wide_data_under_alpha_over_sigma(weighting, width, without, with_it):
    t, noise, weights = nodes()  # ε = ±1 has the first two moments of a normal
    off, on = (descent(gaussian(0.4, width), tensor([[0.4], [0.9]]), t, noise, weighting, baseline=b) for b in (False, True))
    near(mean(weights, on), mean(weights, off))
    near(mean(weights, off**2)[0] / without, 1, 1e-5)
    near(mean(weights, on**2)[0] / with_it, 1, 1e-5)


# --------------------------------- Gradient normalization: β_norm = β / ‖∇Q‖₂ (paper), or ∇Q over its rms (released code)


@pytest.mark.parametrize("d", [1, 3, 8])
def test_grad_norm_takes_the_norm_of_each_row_alone(d):
    c = torch.randn(4, d) * torch.tensor([[1.0], [10.0], [0.0], [1e-30]])  # ∇Q of four rows
    (a, noise), t = torch.randn(2, 4, d), torch.tensor([0.02, 0.3, 0.5, 0.7])
    plain, paper, released = (surrogate_gradient(lambda s, a: (c * a).sum(-1), gaussian(0.2, 0.3), None, a, t, noise, 0.05,
                                                 grad_norm=kind) for kind in (None, "paper", "released"))
    pull, norm = plain - c, (c**2).sum(-1, keepdim=True).sqrt()
    near(paper, c + norm * pull, rtol=1e-5)  # ∇Q = 0: no update at all ...
    near(released[:3], (pull + math.sqrt(d) * c / norm.clamp(min=1e-30))[:3], rtol=1e-5)  # ... or towards the data
    assert released.isfinite().all()  # though 1e-30 squared is 0 in float32


# ------------------- Prop. 1: KL[π_t‖μ_t] = 0 only for π = μ.  Remark 1: a Dirac actor's minimizers move with t all the same


@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_prop1_diffusion_can_be_divided_out_of_the_characteristic_function(t):
    (_, noise, w), u, a, share = nodes(t, 64), torch.linspace(-3, 3, 7, dtype=F64)[:, None], tensor([-0.7, 0.1, 0.9]), tensor([0.2, 0.3, 0.5])
    a_t = diffuse(a.repeat_interleave(64)[:, None], tensor(t).expand(192), noise.repeat(3, 1))[:, 0]
    alpha, sigma, _ = scales(tensor(t))
    phi_t = (torch.outer(share, w).flatten() * torch.exp(1j * u * a_t)).sum(-1)
    near(phi_t * torch.exp(sigma**2 * u[:, 0]**2 / 2), (share * torch.exp(1j * alpha * u * a)).sum(-1))  # so μ_t determines μ


def minimizers(t, weighting="sigma2"):
    """Where a Dirac actor's KL to two modes at ±1 is least: the pull turns from − to + there."""
    a, (t, noise, weights) = torch.linspace(-1.205, 1.205, 242, dtype=F64), nodes(t, noises=64)
    pull = mean(weights, descent(TWO_MODES.noise_model, a[:, None], t, noise, weighting))[:, 0]
    return [float(a[i] - pull[i] * 0.01 / (pull[i + 1] - pull[i])) for i in range(241) if pull[i] < 0 <= pull[i + 1]]


@pytest.mark.parametrize("t, expected", [(0.05, [-1, 1]), (0.15, [-0.846198, 0.846198]), (0.22, [0])])
def test_remark1_a_dirac_actor_sees_two_modes_at_small_t_and_one_at_large(t, expected):
    assert minimizers(t) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("weighting, expected", [
    ("alpha_over_sigma", [-0.903916, 0.903916]), ("one", [-0.559101, 0.559101]), ("sigma2", [0])])
def test_two_equal_modes_at_the_ends_of_the_action_range_merge_under_sigma2_alone(weighting, expected):
    assert minimizers(None, weighting) == pytest.approx(expected, abs=1e-3)


# ------- End to end: a* = m + β κ⁻¹ c for Q = c·a, (2 + κ/β)⁻¹ (2 q + κ m/β) for Q = −‖a − q‖², with κ = E_t ω σ α C_t⁻¹


@pytest.mark.parametrize("weighting, linear, quadratic", [  # for behavior widths 0.1, 0.3, 1
    ("sigma2", [0.434675301, 0.481806423, 0.708877814], [0.804571331, 0.837955034, 0.962311251]),
    ("one", [0.126674884, 0.192398535, 0.424357371], [0.462779558, 0.561234294, 0.796808767]),
    ("alpha_over_sigma", [0.0383621329, 0.0899893941, 0.374940275], [0.292634251, 0.398285280, 0.757092148])])
def test_adam_on_eq15_reaches_the_optimum(weighting, linear, quadratic):
    width, (t, noise, weights) = tensor([0.1, 0.3, 1.0] * 2).view(6, 1, 1), nodes()  # six actors: three widths, two Q
    theta, m, v = torch.zeros(3, 6, 1, dtype=F64)
    for k in range(400):
        gradient = -descent(gaussian(0.2, width), theta, t, noise, weighting, beta=0.1,
                            q=lambda s, a: torch.cat([a[:3], -(a[3:] - 1.5)**2]).sum(-1))
        a = theta.detach().requires_grad_()
        loss = policy_loss(a.unsqueeze(1), gradient * len(t) * weights[:, None])
        slope, = torch.autograd.grad(loss.sum(), a)
        adam(theta, slope, m, v, tensor(k + 1.0), 0.05 * (1 + math.cos(math.pi * k / 400)), 0)
    near(theta[:, 0], tensor([0.2 + x for x in linear] + quadratic), 1e-6)


# ------------------------------------------------------------------------ Algorithm 1: networks, optimizer, stages

Data = namedtuple("Data", "table s_dim a_dim")  # rows s, a, s′, r, terminal
STAGES = pytest.mark.parametrize("name", ["critic", "behavior", "policy", "iql", "bc"])


@pytest.fixture(scope="module")
def dataset():
    table = torch.randn(200, 10, generator=torch.Generator().manual_seed(1))
    return Data(torch.cat([table[:, :9], (table[:, 9:] > 0).float()], 1), 3, 2)


def build(name, dataset, seeds, **options):
    """A tiny stage in float64, its learning and target rates large enough to see."""
    sizes = {f"{kind}_{what}": value for kind in ("critic", "behavior", "policy")
             for what, value in (("steps", 8), ("batch", 16), ("width", 8), ("lr", 1e-2))}
    options = {**sizes, "target_rate": 0.3, "behavior_blocks": 2, "behavior_decay": 0.1, "dropout": 0.25, **options}
    given = Settings(**options).resolve("hopper-medium-v2")
    if name in ("critic", "behavior"):
        stage = {"critic": Critic, "behavior": Behavior}[name](given, dataset, seeds)
    else:
        critic, behavior = (build(kind, dataset, seeds, **options).weights() for kind in ("critic", "behavior"))
        critic["q_target"] = {key: 1.5 * x for key, x in critic["q_target"].items()}  # not Q itself
        rest = (given, dataset, seeds, critic, behavior)
        stage = Extraction(*rest) if name == "policy" else Regression(name, *rest)
    stage.table, draw = stage.table.double(), stage.draw
    stage.state = {key: x.double() if x.is_floating_point() else x for key, x in stage.state.items()}
    stage.groups = stage.each_seed()
    stage.draw = lambda state: [x.double() if x.is_floating_point() else x for x in draw(state)]
    return stage


def network(kind, weights, seed=0, **options):
    """An ordinary network of one seed from a stage's weights."""
    net = kind(3, **options).double() if kind is Value else kind(3, 2, **options).double()
    net.load_state_dict({key: x[seed] for key, x in weights.items()})
    return net


def chain(weights, x, activation=torch.relu):
    """Linear, activation, ..., Linear."""
    *hidden, w, b = weights
    for i in range(0, len(hidden), 2):
        x = activation(x @ hidden[i].T + hidden[i + 1])
    return x @ w.T + b


@pytest.mark.parametrize("layers", [2, 4])
def test_value_twin_q_and_policy_are_chains_of_layers(layers):
    s, a = torch.randn(2, 7, 3), torch.randn(2, 7, 2)
    value, q, policy = (fresh([5, 6], 1, build) for build in (
        lambda: Value(3), lambda: TwinQ(3, 2), lambda: Policy(3, 2, layers=layers)))
    assert sum(x[0].numel() for x in policy.parameters()) == 4 * 256 + (layers - 1) * 257 * 256 + 2 * 257
    for i in range(2):
        near(value(s)[i], chain([x[i] for x in value.parameters()], s[i])[:, 0], 1e-6)
        near(policy(s)[i], chain([x[i] for x in policy.parameters()], s[i]).tanh(), 1e-6)
        for j in range(2):
            near(q(s, a)[i, j], chain([x[i, j] for x in q.parameters()], torch.cat([s[i], a[i]], 1))[:, 0], 1e-6)


@pytest.mark.parametrize("dropout", [None, 0.25])
def test_noise_model_is_three_residual_blocks_of_two_layers(dropout):
    net, a_t, s, t = NoiseModel(3, 2).double(), *torch.randn(5, 7, dtype=F64).T.split([2, 3], 1), torch.rand(7, dtype=F64)
    keep = None if dropout is None else torch.rand(3, 7, 256) > dropout
    p = {key: x.detach() for key, x in net.state_dict().items()}

    def layers(x, *names):
        return chain([x for key, x in p.items() if key.startswith(names)], x, nn.Mish())

    phase = 2 * math.pi * t[:, None] * p["frequencies"]
    x = layers(torch.cat([a_t, s, layers(torch.cat([phase.sin(), phase.cos()], 1), "time")], 1), "input")
    for i in range(3):
        y = x if dropout is None else keep[i] * x / (1 - dropout)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        x = x + layers(y * p[f"blocks.{i}.norm.weight"] + p[f"blocks.{i}.norm.bias"], f"blocks.{i}.up", f"blocks.{i}.down")
    near(net(a_t, s, t, keep, dropout), layers(nn.Mish()(x), "output"), 1e-9)
    assert p["frequencies"].shape == (32,) and p["blocks.0.up.weight"].shape == (1024, 256) and 15 < p["frequencies"].std() < 50


def test_compiled_mish_is_mish(monkeypatch):
    x = torch.linspace(-30, 100, 2001, dtype=F64).requires_grad_()
    reference = nn.Mish()(x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    for ours, exact in zip((models.mish(x), *torch.autograd.grad(models.mish(x).sum(), x)),
                           (reference, *torch.autograd.grad(reference.sum(), x))):
        near(ours, exact, 1e-12, rtol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_that_of_torch_for_a_thousand_steps(decay):
    theta, m, v = torch.zeros(3, 2, 5, dtype=F64)
    theta += torch.randn(2, 5, dtype=F64)
    other = theta.clone().requires_grad_()
    optimizer = (torch.optim.AdamW if decay else torch.optim.Adam)([other], lr=1e-2, weight_decay=decay)
    for k in range(1000):
        other.grad = torch.randn(2, 5, dtype=F64) * 10.0**(k % 7 - 6)
        adam(theta, other.grad, m, v, tensor(k + 1.0), 1e-2, decay)
        optimizer.step()
    near(theta, other, 1e-11)


@pytest.mark.parametrize("name, grad_norm", [
    ("critic", "none"), ("behavior", "none"), ("policy", "none"), ("policy", "released"), ("iql", "none"), ("bc", "none")])
def test_a_stage_is_a_plain_loop_of_torch_optim(name, grad_norm, dataset):
    """Eight steps with the same rows and noise end at the same weights; what is frozen stays."""
    stage, draws = build(name, dataset, [7], grad_norm=grad_norm, beta=(0.5,)), []
    before, draw = copy.deepcopy(stage.state), stage.draw
    if name == "critic":
        nets = [network(Value, stage.weights()["value"], width=8)]
        nets += [network(TwinQ, stage.weights()[key], width=8) for key in ("q", "q_target")]
        value, q, q_target = nets
    else:
        kind, options = (NoiseModel, {"blocks": 2}) if name == "behavior" else (Policy, {})
        nets = [network(kind, stage.weights(), width=8, **options)]
    if stage.cosine:
        value, q_target, psi = (network(kind, layout.tensors(stage.state[key]), width=8, **options) for kind, layout, key, options in (
            (Value, stage.value, "value", {}), (TwinQ, stage.q, "q", {}), (NoiseModel, stage.noise_model, "behavior", {"blocks": 2})))
    stage.draw = lambda state: draws.append(draw(state)) or draws[-1]
    for _ in range(8):
        stage.step()
    decay = 0.1 if name == "behavior" else 0
    optimizer = torch.optim.AdamW([x for net in nets[:2] for x in net.parameters()], lr=1e-2, weight_decay=decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for rows, *noise in draws:
        s, a, s_next, r, terminal = rows[:, :3], rows[:, 3:5], rows[:, 5:8], rows[:, 8], rows[:, 9]
        if name == "critic":
            loss = value_loss(value, q_target, s, a, 0.7) + q_loss(q, value, s, a, r, s_next, terminal, 0.99)
        elif name == "behavior":
            loss = behavior_loss(lambda *inputs: nets[0](*inputs, noise[2], 0.25), s, a, *noise[:2])  # noqa: B023
        elif name == "policy":  # the mean of the twins, and a behavior model without dropout
            pi, norm = nets[0](s), None if grad_norm == "none" else grad_norm
            g = surrogate_gradient(lambda s, a: q_target(s, a).mean(0), psi, s, pi, *noise, beta=0.5, grad_norm=norm)
            loss = -(g * pi).sum(1).mean()
        else:
            weight = (3 * (q_target(s, a).min(0).values - value(s)).detach()).exp().clamp(max=100) if name == "iql" else 1
            loss = (weight * ((nets[0](s) - a)**2).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if stage.cosine:
            cosine.step()
        if name == "critic":
            for mine, theirs in zip(q_target.parameters(), q.parameters()):
                mine.data.lerp_(theirs.data, 0.3)
    weights = stage.weights().values() if name == "critic" else [stage.weights()]
    for net, tensors in zip(nets, weights):
        for key, x in net.state_dict().items():
            near(tensors[key][0], x, 1e-6)  # the step's number and β are float32
    assert all(torch.equal(stage.state[key], x) for key, x in before.items() if key not in stage.kept)


@STAGES
def test_a_seed_alone_is_bitwise_the_seed_among_six_and_side_by_side_to_rounding(name, dataset):
    six, alone, stacked = (build(name, dataset, seeds, beta=beta) for seeds, beta in (
        (list(range(6)), (0.3, 0.1)), ([4], (0.1,)), (list(range(6)), (0.3, 0.1))))
    stacked.groups = [stacked.state]
    for _ in range(3):
        six.step(), alone.step(), stacked.step()
    assert six.members[-2] == alone.members[0]
    for key, x in six.state.items():
        assert torch.equal(x[-2], alone.state[key][0])
        near(stacked.state[key], x, 1e-9)  # sums in another order
    assert not torch.equal(six.state["theta"][-1], six.state["theta"][-2])


@STAGES
@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_loss_that_is_not_finite_stops_that_seed_alone_at_its_finite_weights(name, side_by_side, dataset):
    sound, broken = (build(name, dataset, [0, 1, 2]) for _ in range(2))
    for stage in (sound, broken):
        stage.groups = [stage.state] if side_by_side else stage.groups
    loss = broken.loss
    broken.loss = lambda theta, state, *rows: loss(theta, state, *rows) * torch.where(
        (state["seed"] == 1) & (broken.count == 2), math.nan, 1.0).unsqueeze(-1)
    for k in range(4):
        sound.step(), broken.step()
        if k == 0:
            first = {key: x.clone() for key, x in broken.state.items() if key in ("theta", "target")}
    for key, x in first.items():
        assert torch.equal(broken.state[key][1], x[1]) and torch.equal(broken.state[key][::2], sound.state[key][::2])
    assert broken.state["alive"].tolist() == [1, 0, 1] and not broken.state["losses"][1].isfinite().all()


def test_extraction_reaches_the_optimum_of_states_it_has_not_seen():
    """A policy of two layers, a behavior N(m(s), 0.3²) and twins of mean slope 1: a* = m(s) + β/κ for each β."""
    table = torch.rand(500, 5, generator=torch.Generator().manual_seed(2)) * 2 - 1
    stage = build("policy", Data(table, 1, 1), [0], beta=(0.1, 0.05), policy_steps=500, policy_batch=64, policy_width=32)
    stage.q = SimpleNamespace(bind=lambda flat: lambda s, a: torch.stack([3 * a, -a], -3).squeeze(-1))
    stage.noise_model = SimpleNamespace(bind=lambda flat: gaussian(lambda s: 0.4 * torch.sin(3 * s), 0.3))
    for _ in range(500):
        stage.step()
    s = torch.linspace(-0.9, 0.9, 50, dtype=F64)[:, None]
    for i, beta in enumerate((0.1, 0.05)):
        a = chain([x[i] for x in stage.weights().values()], s).tanh()
        near(a, 0.4 * torch.sin(3 * s) + beta / 0.20755223521, 0.02)


def test_a_trained_noise_model_recovers_the_score_of_a_mixture():
    a = LINE.density(tensor(0.0)).sample((20000,))
    stage = build("behavior", Data(torch.cat([torch.zeros(20000, 1), a, torch.zeros(20000, 3)], 1), 1, 1), [0],
                  behavior_batch=256, behavior_width=32, behavior_lr=3e-3, behavior_blocks=1, dropout=0.0)
    for _ in range(600):
        stage.step()
    net, s, t, noise = stage.noise_model.bind(stage.state["theta"][0]), 0 * a, 0.02 + 0.96 * torch.rand(20000), torch.randn(20000, 1)
    a_t, t, noise = diffuse(a, t.double(), noise.double()), t.double(), noise.double()
    exact = LINE.noise_model(a_t, s, t)
    print(((net(a_t, s, t) - exact)**2).mean() / (exact**2).mean())
    assert ((net(a_t, s, t) - exact)**2).mean() < 0.02 * (exact**2).mean()  # where there is data
    assert behavior_loss(net, s, a, t, noise) > behavior_loss(LINE.noise_model, s, a, t, noise)  # the floor


def test_settings_are_those_of_appendix_c_and_table_2():
    paper = {"medium-expert": (0.1, 0.01, 0.01), "medium": (0.05, 0.2, 0.05), "medium-replay": (0.5, 0.2, 0.2)}
    table_2 = {f"{body}-{kind}-v2": beta for kind, betas in paper.items()
               for body, beta in zip(("walker2d", "halfcheetah", "hopper"), betas)}
    fixed, diverse = {"umaze": 0.02, "medium-play": 0.08, "large-play": 0.06}, {"umaze": 0.04, "medium": 0.05, "large": 0.05}
    table_2 |= {f"antmaze-{maze}-v2": beta for maze, beta in fixed.items()}
    table_2 |= {f"antmaze-{maze}-diverse-v2": beta for maze, beta in diverse.items()}
    assert srpo.TABLE_2 == table_2
    for task, beta in table_2.items():
        given, maze = Settings().resolve(task), "antmaze" in task
        assert (given.tau, given.policy_layers, given.grad_norm, given.temperature, given.beta) == (
            (0.9, 4, "released", 10.0, (beta,)) if maze else (0.7, 2, "none", 3.0, (beta,)))
    assert [getattr(given, f"{stage}_{what}") for stage in ("critic", "behavior", "policy") for what in ("steps", "batch", "lr")] == [
        1_500_000, 256, 3e-4, 2_000_000, 2048, 3e-4, 1_000_000, 256, 3e-4]
    assert (given.gamma, given.target_rate, given.weighting, given.baseline, given.dropout) == (0.99, 0.005, "sigma2", True, 0.1)
    with pytest.raises(UserError, match="tau"):
        Settings(tau=1.5).resolve(task)


# ------------------------------------------------------ Random numbers: a function of (seed, step, purpose, element)

N = 2**18


def draw(seed=3, step=5, base=8):
    return Draw(torch.tensor(seed, dtype=torch.int32), torch.tensor(step, dtype=torch.int32), base)


@pytest.mark.parametrize("words", [1, 7, 1001, 10**6])
def test_the_hash_is_lowbias32(words):
    x = np.random.default_rng(0).integers(0, 2**32, words, dtype=np.uint32)
    ours = mix(torch.from_numpy(x.view(np.int32))).numpy().view(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    assert (ours == x).all()


def test_random_numbers_have_their_distributions():
    def far(x, cdf):  # Kolmogorov-Smirnov; above 2 once in 1,500 times
        return (cdf(x.double().sort().values) - (torch.arange(N) + 0.5) / N).abs().max() * math.sqrt(N)

    uniform, index = draw().uniform(1, (N,)), draw().index(1, (N,), 10)
    assert far(uniform, lambda x: x) < 2 and far(draw().normal(2, (N,)), Normal(0, 1).cdf) < 2
    assert 0 < uniform.min() and uniform.max() <= 1 and index.min() == 0 and index.max() == 9
    assert draw().index(1, (N,), 1_999_999).double().std() == pytest.approx(1_999_999 / math.sqrt(12), rel=0.01)
    assert ((index.bincount() - N / 10)**2).sum() / (N / 10) < 30  # chi-squared of 9 degrees
    for dropout in (0.0, 0.1, 0.5):
        assert draw().keep(4, (N,), dropout).double().mean() == pytest.approx(1 - dropout, abs=0.005)


def test_random_numbers_are_independent_across_seeds_steps_and_purposes():
    streams = [draw(*where).uniform(purpose, (N,)) for where in ((3, 5), (4, 5), (3, 6), (5, 3), (3, 5, 16)) for purpose in (1, 2, -2)]
    streams += [streams[0].roll(1), draw().bits(1, (N,)) % 2]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / math.sqrt(N)
    seeds = torch.arange(2**20, dtype=torch.int32)
    words = Draw(seeds, torch.tensor(5, dtype=torch.int32)).bits(1, (2,)).numpy()
    assert len(np.intersect1d(*words.T)) < 350  # 256 by chance; shifts of one sequence would give as many again


def test_random_numbers_do_not_depend_on_what_is_drawn_beside():
    six = Draw(torch.arange(6, dtype=torch.int32), torch.tensor(5, dtype=torch.int32), 8)
    for kind, more in (("bits", ()), ("uniform", ()), ("normal", ()), ("keep", ()), ("index", (50,))):
        assert torch.equal(getattr(six, kind)(2, (4, 9), *more)[3], getattr(draw(), kind)(2, (5, 9), *more)[:4])


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler to compile with")
def test_compiled_random_numbers_are_the_eager_ones():
    torch._dynamo.reset()
    def index(seed, step):
        return Draw(seed, step, 8).index(1, (1001,), 1_999_999)
    where = torch.arange(3, dtype=torch.int32) * 2**29, torch.tensor(5, dtype=torch.int32)
    assert torch.equal(torch.compile(index, fullgraph=True)(*where), index(*where))
