"""Every equation of SRPO on analytic Gaussians, then Algorithm 1 beside plain PyTorch.

The reference is always something else than the code: a closed form, an exact value, torch.distributions,
autograd of the objective, torch.optim. Notation: ρ = σ²/α²; for a Dirac actor KL[π_t‖μ_t] depends on ρ alone.
"""
import contextlib
import csv
import hashlib
import itertools
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import warnings
from concurrent import futures
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import filelock
import h5py
import hypothesis
import numpy as np
import pytest
import requests
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence

import data
import figures
import models
import mujoco210
import srpo
from diffusion import alpha_sigma, behavior_loss, diffuse, drift_diffusion, log_likelihood, sample, score
from models import Draw, NoiseModel, Policy, TwinQ, Value, fresh
from srpo import Settings, adam, policy_loss, q_loss, surrogate_gradient, value_loss

torch.set_num_threads(1)
F32, F64 = torch.float32, torch.float64
SHAPES = pytest.mark.parametrize("seeds", [(), (1,), (6,)], ids=["no_seed_axis", "one_seed", "six_seeds"])
WEIGHTINGS = pytest.mark.parametrize("weighting", ["sigma2", "one", "alpha_over_sigma"])
BOTH = pytest.mark.parametrize("dtype", [F32, F64])
LONG = pytest.mark.skipif(not os.environ.get("LONG"), reason="takes long: LONG=1 pytest")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def tensor(x):
    return torch.tensor(x, dtype=F64)


def near(x, reference, atol=1e-10, rtol=0.0):
    reference = torch.as_tensor(reference, dtype=x.dtype).expand_as(x).detach()
    torch.testing.assert_close(x.detach(), reference, atol=float(atol), rtol=rtol, equal_nan=True)


def scales(t):
    """α, σ and ρ of the VP-SDE, by way of ρ = exp(9.95 t² + 0.1 t) − 1."""
    rho = torch.expm1(9.95 * t**2 + 0.1 * t)
    return (1 + rho).rsqrt(), (rho / (1 + rho)).sqrt(), rho


class Mixture:
    """The behavior Σ_k w_k N(m_k, S_k), diffused exactly: density by torch.distributions, ε* by hand."""

    def __init__(self, w, m, S):
        self.w, self.m, self.S = tensor(w), tensor(m), tensor(S)
        self.variances, self.axes = torch.linalg.eigh(self.S)

    def density(self, t):
        alpha, sigma, _ = (x[..., None, None] for x in scales(t))
        C = alpha[..., None]**2 * self.S + sigma[..., None]**2 * torch.eye(self.m.shape[-1])
        w = Categorical(self.w.expand(*t.shape, -1))
        return MixtureSameFamily(w, MultivariateNormal(alpha * self.m, C))

    def noise_model(self, a_t, s, t):
        """ε* = σ Σ_k r_k C_k⁻¹ (a_t − α m_k), r the responsibilities of the diffused components."""
        w, m, variances, axes = (x.to(a_t.dtype) for x in (self.w, self.m, self.variances, self.axes))
        alpha, sigma, _ = (x[..., None, None] for x in scales(t))
        v = alpha**2 * variances + sigma**2
        z = torch.einsum("...kd,kde->...ke", a_t.unsqueeze(-2) - alpha * m, axes)
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

    Two nodes, ε = ±1, are exact for a Gaussian behavior, whose ε* is affine in ε; a mixture wants 64.
    """
    (u, v), (x, w) = np.polynomial.legendre.leggauss(32), np.polynomial.hermite_e.hermegauss(noises)
    t, v = (0.5 + 0.48 * tensor(u), tensor(v) / 2) if t is None else (tensor([t]), tensor([1.0]))
    t, x = torch.meshgrid(t, tensor(x), indexing="ij")
    return t.flatten(), x.reshape(-1, 1), torch.outer(v, tensor(w / w.sum())).flatten()


def descent(noise_model, a, t, noise, weighting="sigma2", q=lambda s, a: 0 * a.sum(-1), beta=1, **options):
    """Minus the surrogate gradient of actions [N, d] on nodes t, noise: [N, M, d]. ω(t) (ε̂ − ε) if Q = 0."""
    rows = a.unsqueeze(-2).expand(-1, len(t), -1)
    t, noise = t.expand(rows.shape[:-1]), noise.expand_as(rows)
    return -surrogate_gradient(q, noise_model, None, rows, t, noise, beta, weighting, **options)


mean = partial(torch.einsum, "m,nmd->nd")  # of weights [M] and rows [N, M, d]


# ------------------------------------------- Eq. 4: a_t = α a + σ ε, log α = −4.975 t² − 0.05 t, α² + σ² = 1

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


# ------------------------------------------------------------------------- Eq. 6: ∇ log μ_t(a_t) = −ε* / σ_t

@SHAPES
def test_eq6_score_is_the_gradient_of_the_log_density(seeds):
    t = tensor([1e-3, 0.02, 0.3, 0.98]).expand(*seeds, 4)
    a_t = torch.randn(*seeds, 4, 3, dtype=F64).requires_grad_()
    for behavior in (WIDE, BUMPY):
        reference, = torch.autograd.grad(behavior.density(t).log_prob(a_t).sum(), a_t)
        near(score(behavior.noise_model, a_t.detach(), None, t), reference, rtol=1e-11)


# --------------------------------------------- Eq. 7: da_t/dt = f a_t + g²/(2σ) ε*, d log q/dt = −divergence

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
    a = torch.randn(*seeds, 3, 2, dtype=F64)  # N(0, I) stands still, and is the end if not told
    near(log_likelihood(gaussian(0, 1), None, a, 2), Normal(0, 1).log_prob(a).sum(-1))


# --------------------------- Eq. 10: ∇Q + (1/β) ∇ log μ is the limit t₀ → 0 of ω = δ(t − t₀) α/σ, up to O(ρ)

def test_eq10_is_the_limit_of_eq15_at_the_rate_rho():
    a, S, m = torch.randn(4, 3, dtype=F64), WIDE.S[0], WIDE.m[0]
    limit = torch.linalg.solve(S, (a - m).T).T  # −∇ log μ
    for t_0 in (1e-3, 1e-4, 1e-5):
        (t, noise, weights), rho = nodes(t_0), scales(tensor(t_0))[2]
        ours = mean(weights, descent(WIDE.noise_model, a, t, noise, "alpha_over_sigma"))
        near(ours, torch.linalg.solve(S + rho * torch.eye(3, dtype=F64), (a - m).T).T, 1e-9)
        near((limit - ours) / rho, torch.linalg.solve(S, limit.T).T, 0.02, rtol=float(50 * rho))


# --------------------------------- Eq. 11: V = argmin E L₂^τ(min Q − V): Σ w_i (Q_i − V) = 0, w = τ or 1 − τ

@SHAPES
@BOTH
@pytest.mark.parametrize("values, tau, expectile, least", [
    ([0, 1, 3], 0.7, 24 / 13, 47 / 65), ([0, 1, 3], 0.9, 28 / 11, 59 / 165), ([0, 0, 1], 0.5, 1 / 3, 1 / 9)])
def test_eq11_is_least_at_the_expectile_of_the_smaller_twin(values, tau, expectile, least, seeds, dtype):
    v = torch.full((*seeds, 3), expectile, dtype=dtype, requires_grad=True)
    q = v.new_tensor(values) + v.new_tensor([[0, 2, 0], [1, 0, 1]])
    q = q.expand(*seeds, 2, 3).requires_grad_()
    loss = value_loss(lambda s: v, lambda s, a: q, None, None, tau)
    slopes = torch.autograd.grad(loss.sum(), (v, q), allow_unused=True)
    assert loss.shape == seeds and slopes[1] is None
    near(loss, least, 1e-6)
    near(slopes[0].sum(-1), 0, 1e-6 if dtype == F32 else 1e-12)  # and the loss is convex


# -------------------------------------------------- Eq. 12: Q(s, a) = r + γ V(s′), but r alone at a terminal

@SHAPES
@pytest.mark.parametrize("tau, exact_v, exact_q", [
    (0.7, [78510 / 31393, 99700 / 31393], [3.144108559, 1, 3.475867232, 2.475867232]),
    (0.9, [90190 / 11791, 99900 / 11791], [8.387838182, 1, 8.572563820, 7.572563820])])
def test_eq12_and_eq11_solve_a_two_state_chain(tau, exact_v, exact_q, seeds):
    """A: r = 0 to B, or r = 1 and the end. B: r = 1 to A, or r = 0 to A at a time limit: not the end."""
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


# ----------------------------------- Eq. 13: ε* = argmin E ‖ε_ψ(a_t | s, t) − ε‖², its minimum d − σ² tr C⁻¹

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

    inverse, zero = (alpha**2 * S + sigma**2 * torch.eye(3, dtype=F64)).inverse(), torch.zeros(12, dtype=F64)
    fit = -torch.linalg.solve(torch.func.hessian(loss)(zero), torch.func.grad(loss)(zero))  # one Newton step
    near(fit, torch.cat([(sigma * inverse).flatten(), -sigma * alpha * inverse @ m]), 1e-9)
    near(loss(fit), 3 - sigma**2 * inverse.trace())


# ------------------- Eq. 14: E Q − (1/β) E_t ω (σ/α) KL[π_t‖μ_t]; Eq. 15: its gradient ∇Q − (1/β) ω (ε* − ε)

def omega(weighting, t):
    alpha, sigma, _ = scales(t)
    return {"sigma2": sigma**2, "one": torch.ones_like(t), "alpha_over_sigma": alpha / sigma}[weighting]


@SHAPES
@WEIGHTINGS
@BOTH
def test_eq15_is_the_gradient_of_eq14(seeds, weighting, dtype):
    a, s, noise = torch.randn(3, *seeds, 5, 3, dtype=F64)
    t, beta = tensor([0.02, 0.1, 0.3, 0.6, 0.98]).expand(*seeds, 5), torch.linspace(0.5, 1, 6, dtype=F64)
    beta, eye = beta[:math.prod(seeds)].reshape(*seeds, 1, 1), torch.eye(3, dtype=F64)  # β of each seed

    def q(s, a):
        return -((a - s)**2).sum(-1) * (1 + s[..., 0]**2)

    (alpha, sigma, _), a = (x[..., None] for x in scales(t)), a.requires_grad_()
    own, data = sigma[..., None]**2 * eye, alpha[..., None]**2 * WIDE.S + sigma[..., None]**2 * eye
    kl = kl_divergence(MultivariateNormal(alpha * a, own), MultivariateNormal(alpha * WIDE.m, data))
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
    log_mu = LINE.density(t).log_prob(alpha[:, None] * a[:, None] + sigma[:, None] * noise)
    objective = weights * omega(weighting, t) * sigma / alpha * -log_mu  # π_t's entropy is constant
    reference, = torch.autograd.grad(objective.sum(), a)
    near(mean(weights, descent(LINE.noise_model, a, t, noise, weighting)), reference, 1e-9)


def test_eq15_one_sample_has_its_sign_its_baseline_and_its_beta():
    for baseline, exact in ((True, 0.0981377127), (False, 0.8225378692)):
        row = tensor([[0.5]]), tensor([0.3]), tensor([[1.2]])
        ours = descent(gaussian(0.2, 0.3), *row, q=lambda s, a: 2 * a.sum(-1), beta=0.1, baseline=baseline)
        near(ours, 10 * exact - 2, 1e-8)


# ------------------- Baseline: E ω ε = 0; Var ω ε* = ω² c², Var ω (ε* − ε) = ω² (1 − c)², c = ρ/(ρ + width²)

@pytest.mark.parametrize("weighting, width, off, on", [  # averages over t; of width 0, a Dirac: no noise left
    ("sigma2", 0, 0.647654, 0), ("sigma2", 0.1, 0.645987, 1.43509e-5), ("sigma2", 1, 0.567521, 0.0153333),
    ("one", 1, 0.647654, 0.181072), ("alpha_over_sigma", 0.1, 1.92131, 0.534492),
    ("alpha_over_sigma", 1, 0.0856368, 3.37887)])
def test_baseline_cuts_the_variance_save_for_wide_data_and_alpha_over_sigma(weighting, width, off, on):
    t, noise, weights = nodes()  # ε = ±1 has the first two moments of a normal
    actions = tensor([[0.4], [0.9]])
    without, with_it = (descent(gaussian(0.4, width), actions, t, noise, weighting, baseline=baseline)
                        for baseline in (False, True))
    near(mean(weights, with_it), mean(weights, without))
    near(mean(weights, without**2)[0], off, rtol=1e-5)
    near(mean(weights, with_it**2)[0], on, 1e-25, rtol=1e-5)


# ------------------------------- β_norm = β / ‖∇Q‖₂ (paper), or ∇Q over its root mean square (released code)

@pytest.mark.parametrize("d", [1, 3, 8])
def test_grad_norm_takes_the_norm_of_each_row_alone(d):
    c = torch.randn(4, d) * torch.tensor([[1.0], [10.0], [0.0], [1e-30]])  # ∇Q of four rows
    (a, noise), t = torch.randn(2, 4, d), torch.tensor([0.02, 0.3, 0.5, 0.7])
    row = lambda s, a: (c * a).sum(-1), gaussian(0.2, 0.3), None, a, t, noise, 0.05
    kinds = None, "paper", "released"
    plain, paper, released = (surrogate_gradient(*row, grad_norm=kind) for kind in kinds)
    pull, norm = plain - c, (c**2).sum(-1, keepdim=True).sqrt()
    near(paper, c + norm * pull, 1e-5, rtol=1e-5)  # ∇Q = 0: no update at all ...
    unit = c / norm.clamp(min=1e-30)
    near(released[:3], (pull + math.sqrt(d) * unit)[:3], 1e-5, rtol=1e-5)  # ... or towards the data
    assert released.isfinite().all()  # though 1e-30 squared is 0 in float32
    with pytest.raises(ValueError, match="papre"):
        surrogate_gradient(*row, grad_norm="papre")


# --------------- Prop. 1: KL[π_t‖μ_t] = 0 only for π = μ. Remark 1: yet a Dirac actor's optimum moves with t

@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_prop1_diffusion_can_be_divided_out_of_the_characteristic_function(t):
    (_, noise, w), u = nodes(t, 64), torch.linspace(-3, 3, 7, dtype=F64)[:, None]
    a, share = tensor([[-0.7, 0.1, 0.9], [0.2, 0.3, 0.5]])
    a_t = diffuse(a.repeat_interleave(64)[:, None], tensor(t).expand(192), noise.repeat(3, 1))[:, 0]
    alpha, sigma, _ = scales(tensor(t))
    phi_t = (torch.outer(share, w).flatten() * torch.exp(1j * u * a_t)).sum(-1)
    phi = (share * torch.exp(1j * alpha * u * a)).sum(-1)
    near(phi_t * torch.exp(sigma**2 * u[:, 0]**2 / 2), phi)  # so μ_t determines μ


def minimizers(t, weighting):
    """Where a Dirac actor's KL to two modes at ±1 is least: the pull turns from − to + there."""
    a, (t, noise, weights) = torch.linspace(-1.205, 1.205, 242, dtype=F64), nodes(t, noises=64)
    pull = mean(weights, descent(TWO_MODES.noise_model, a[:, None], t, noise, weighting))[:, 0]
    turns = [i for i in range(241) if pull[i] < 0 <= pull[i + 1]]
    return [float(a[i] - pull[i] * 0.01 / (pull[i + 1] - pull[i])) for i in turns]


def test_remark1_a_dirac_actor_sees_two_modes_at_small_t_and_one_at_large():
    for t, expected in (0.05, [-1, 1]), (0.15, [-0.846198, 0.846198]), (0.22, [0]):
        assert minimizers(t, "one") == pytest.approx(expected, abs=1e-3)


def test_two_equal_modes_within_the_action_range_merge_under_sigma2_alone():
    for weighting, expected in ("alpha_over_sigma", 0.903916), ("one", 0.559101), ("sigma2", None):
        expected = [-expected, expected] if expected else [0]
        assert minimizers(None, weighting) == pytest.approx(expected, abs=1e-3)


# -------- End to end: Q = c·a: a* = m + β κ⁻¹ c; Q = −‖a − q‖²: (2 + κ/β)⁻¹ (2 q + κ m/β); κ = E_t ω σ α C⁻¹

@pytest.mark.parametrize("weighting, linear, quadratic", [  # for behavior widths 0.1, 0.3, 1
    ("sigma2", [0.434675301, 0.481806423, 0.708877814], [0.804571331, 0.837955034, 0.962311251]),
    ("one", [0.126674884, 0.192398535, 0.424357371], [0.462779558, 0.561234294, 0.796808767]),
    ("alpha_over_sigma", [0.0383621329, 0.0899893941, 0.374940275], [0.292634251, 0.398285280, 0.757092148])])
def test_adam_on_eq15_reaches_the_optimum(weighting, linear, quadratic):
    width, (t, noise, weights) = tensor([0.1, 0.3, 1.0] * 2).view(6, 1, 1), nodes()  # six actors, two Q
    theta, m, v = torch.zeros(3, 6, 1, dtype=F64)
    for k in range(400):
        gradient = -descent(gaussian(0.2, width), theta, t, noise, weighting, beta=0.1,
                            q=lambda s, a: torch.cat([a[:3], -(a[3:] - 1.5)**2]).sum(-1))
        a = theta.detach().requires_grad_()
        loss = policy_loss(a.unsqueeze(1), gradient * len(t) * weights[:, None])
        slope, = torch.autograd.grad(loss.sum(), a)
        adam(theta, slope, m, v, tensor(k + 1.0), 0.05 * (1 + math.cos(math.pi * k / 400)), 0)
    near(theta[:, 0], tensor([0.2 + x for x in linear] + quadratic), 1e-6)


# ------------------------------------------------------------------ Algorithm 1: networks, optimizer, stages

ROWS = torch.randn(200, 10, generator=torch.Generator().manual_seed(1))  # s, a, s′, r, terminal
ROWS[:, 9] = (ROWS[:, 9] > 0).float()
HOPPER = "hopper-medium-v2"
STAGES = pytest.mark.parametrize("name", ["critic", "behavior", "policy", "iql", "bc"])


def build(name, seeds, table=ROWS, sizes=(3, 2), **options):
    """A tiny stage in float64, its learning and target rates large enough to see."""
    small = {f"{kind}_{what}": value for kind in ("critic", "behavior", "policy")
             for what, value in (("steps", 8), ("batch", 16), ("width", 8), ("lr", 1e-2))}
    small.update(target_rate=0.3, behavior_blocks=2, behavior_decay=0.1, dropout=0.25)
    rest = Settings(**{**small, **options}).resolve(HOPPER), data.Dataset(table, *sizes, {}), seeds
    if name in ("critic", "behavior"):
        stage = srpo.STAGES[name](*rest)
    else:
        critic, behavior = (build(kind, seeds, table, sizes, **options) for kind in ("critic", "behavior"))
        critic.state["target"] *= -3  # not Q itself
        stage = srpo.STAGES[name](*rest, critic.weights(), behavior.weights())
    stage.table, noise = stage.table.double(), stage.noise
    stage.noise = lambda draw: [x.double() if x.is_floating_point() else x for x in noise(draw)]
    stage.state = {key: x.double() if x.is_floating_point() else x for key, x in stage.state.items()}
    stage.groups = stage.each_seed()
    return stage


def take(steps, *stages):
    for _ in range(steps):
        for stage in stages:
            stage.step()


def chain(weights, x, activation=torch.relu):
    """Linear, activation, ..., Linear."""
    *hidden, w, b = weights
    for i in range(0, len(hidden), 2):
        x = activation(x @ hidden[i].T + hidden[i + 1])
    return x @ w.T + b


def test_value_twin_q_and_policy_are_chains_of_layers_for_each_seed():
    s, a = torch.randn(2, 7, 3), torch.randn(2, 7, 2)
    kinds = lambda: Value(3), lambda: TwinQ(3, 2), lambda: Policy(3, 2), lambda: Policy(3, 2, layers=4)
    value, q, policy, deep = (fresh([5, 6], 1, kind) for kind in kinds)
    assert [len([*net.parameters()]) for net in (value, q, policy, deep)] == [6, 6, 6, 10]
    biases = [fresh([seed], purpose, kinds[0])[0].bias[0] for seed, purpose in ((6, 1), (5, 1), (6, 2))]
    assert torch.equal(biases[0], value[0].bias[1])  # a function of seed and purpose
    assert len(torch.stack(biases).flatten().unique()) == 3 * 256
    for i in range(2):
        near(value(s)[i], chain([x[i] for x in value.parameters()], s[i])[:, 0], 1e-6)
        for net in (policy, deep):
            near(net(s)[i], chain([x[i] for x in net.parameters()], s[i]).tanh(), 1e-6)
        for j in range(2):
            twin = [x[i, j] for x in q.parameters()]
            near(q(s, a)[i, j], chain(twin, torch.cat([s[i], a[i]], 1))[:, 0], 1e-6)


@pytest.mark.parametrize("dropout", [None, 0.25])
def test_noise_model_is_three_residual_blocks_of_two_layers(dropout):
    net, t = NoiseModel(3, 2).double(), torch.rand(7, dtype=F64)
    for x in net.parameters():
        x.data += 0.03 * torch.randn_like(x)  # LayerNorms start at 1 and 0
    a_t, s = torch.randn(7, 5, dtype=F64).split([2, 3], 1)
    keep = None if dropout is None else torch.rand(3, 7, 256) > dropout
    p = net.state_dict()

    def layers(x, *names):
        return chain([x for key, x in p.items() if key.startswith(names)], x, nn.Mish())

    phase = 2 * math.pi * t[:, None] * p["frequencies"]
    x = layers(torch.cat([a_t, s, layers(torch.cat([phase.sin(), phase.cos()], 1), "time")], 1), "input")
    for i in range(3):
        y = x if dropout is None else keep[i] * x / (1 - dropout)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        y = y * p[f"blocks.{i}.norm.weight"] + p[f"blocks.{i}.norm.bias"]
        x = x + layers(y, f"blocks.{i}.up", f"blocks.{i}.down")
    near(net(a_t, s, t, keep, dropout), layers(nn.Mish()(x), "output"), 1e-9)
    assert 19 < p["frequencies"].std() < 41 and len(p["blocks.0.up.bias"]) == 1024  # 30, three errors off


def test_compiled_mish_is_mish(monkeypatch):
    x = torch.linspace(-30, 100, 2001, dtype=F64)
    both = [torch.func.vmap(torch.func.grad_and_value(nn.functional.mish))(x)]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    both.append(torch.func.vmap(torch.func.grad_and_value(models.mish))(x))
    torch.testing.assert_close(*both, atol=1e-12, rtol=1e-12)
    assert models.mish(torch.tensor(100.0)) == 100  # exp(100) is infinite in float32


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_that_of_torch_for_a_thousand_steps(decay):
    theta, m, v = torch.zeros(3, 2, 5, dtype=F64)
    other = torch.zeros(2, 5, dtype=F64, requires_grad=True)
    optimizer = (torch.optim.AdamW if decay else torch.optim.Adam)([other], lr=1e-2, weight_decay=decay)
    for k in range(1000):
        other.grad = torch.randn(2, 5, dtype=F64) * 10.0**(k % 7 - 6)
        adam(theta, other.grad, m, v, tensor(k + 1.0), 1e-2, decay)
        optimizer.step()
    near(theta, other, 1e-11)


@pytest.mark.parametrize("name, options", [
    ("critic", {}), ("behavior", {}), ("iql", {}), ("bc", {}), ("policy", {}),
    ("policy", {"grad_norm": "released"}), ("policy", {"weighting": "one", "baseline": False})])
def test_a_stage_is_a_plain_loop_of_torch_optim(name, options):
    """Eight steps with the same rows and noise end at the same weights; what is frozen stays."""
    stage, draws = build(name, [7], beta=(0.5,), **options), []
    loss_of, before = stage.loss, {key: x[0].clone() for key, x in stage.state.items()}
    stage.loss = lambda theta, state, *inputs: draws.append(inputs) or loss_of(theta, state, *inputs)
    take(8, stage)
    theta, target = before["theta"].clone().requires_grad_(), before.get("target", torch.empty(0)).clone()
    optimizer = torch.optim.AdamW([theta], lr=1e-2, weight_decay=0.1 if name == "behavior" else 0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for rows, *noise in draws:
        s, a, s_next, r, terminal = rows[:, :3], rows[:, 3:5], rows[:, 5:8], rows[:, 8], rows[:, 9]
        if name == "critic":
            value, q = stage.value_and_q(theta)
            value, q, q_target = stage.value.bind(value), stage.q.bind(q), stage.q.bind(target)
            loss = value_loss(value, q_target, s, a, 0.7) + q_loss(q, value, s, a, r, s_next, terminal, 0.99)
        elif name == "behavior":
            dropped_out = partial(stage.noise_model.bind(theta), keep=noise[2], dropout=0.25)
            loss = behavior_loss(dropped_out, s, a, *noise[:2])
        else:
            pi, q, value, psi = stage.policy.bind(theta)(s), *(layout.bind(before[key]) for layout, key in (
                (stage.q, "q"), (stage.value, "value"), (stage.noise_model, "behavior")))
        if name == "policy":  # the mean of the twins, and a behavior model without dropout
            ascent = surrogate_gradient(lambda s, a: q(s, a).mean(0), psi, s, pi, *noise, beta=0.5, **options)
            loss = -(ascent * pi).sum(1).mean()
        if name in ("iql", "bc"):
            advantage = q(s, a).min(0).values - value(s)
            weight = (3 * advantage.detach()).exp().clamp(max=100) if name == "iql" else 1
            loss = (weight * ((pi - a)**2).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if name == "critic":
            target.lerp_(theta.detach()[-len(target):], 0.3)
        elif name == "behavior":  # decay spares the frequencies, which aren't trained
            tensors, first = (stage.noise_model.tensors(x) for x in (theta.detach(), before["theta"]))
            tensors["frequencies"].copy_(first["frequencies"])
        else:
            cosine.step()
    trained, critic, behavior = stage.state, build("critic", [7]).state, build("behavior", [7]).state
    near(trained["theta"][0], theta, 1e-6)  # the step's number and β are float32
    if name == "critic":
        near(trained["target"][0], target, 1e-6)
        near(before["target"], before["theta"][-len(target):], 0)
    elif name != "behavior":  # the trained networks, of Q the target
        near(trained["q"], -3 * critic["target"], 1e-6)
        near(trained["value"], critic["theta"][:, :-critic["target"].shape[1]], 1e-6)
        near(trained["behavior"], behavior["theta"], 1e-6)


@STAGES
def test_a_seed_alone_is_bitwise_the_seed_among_six_and_side_by_side_to_rounding(name):
    six, stacked = (build(name, [0, 1, 2, 3, 4, 5], beta=(0.3, 0.1)) for _ in range(2))
    alone, stacked.groups = build(name, [4], beta=(0.1,)), [stacked.state]
    take(3, six, alone, stacked)
    assert six.members[-2] == alone.members[0]
    for key, x in six.state.items():
        near(x[-2], alone.state[key][0], 0)
        near(stacked.state[key], x, 1e-9)  # sums in another order
    assert not torch.equal(six.state["theta"][-1], six.state["theta"][-2])


@STAGES
@pytest.mark.parametrize("side_by_side, gradient_only", [(False, False), (True, False), (True, True)])
def test_what_is_not_finite_stops_that_seed_alone_at_its_finite_weights(name, side_by_side, gradient_only):
    sound, broken = (build(name, [0, 1, 2]) for _ in range(2))
    for stage in (sound, broken):
        stage.groups, loss = [stage.state] if side_by_side else stage.groups, stage.loss
    spoiled = tensor([math.nan, 1])[:len(broken.losses)]  # one loss of a seed is enough

    def breaks(theta, state, *rows):
        ill = ((state["seed"] == 1) & (broken.count == 2)).unsqueeze(-1)
        if not gradient_only:
            return loss(theta, state, *rows) * torch.where(ill, spoiled, 1.0)
        well = 1.0 - ill.double()
        return loss(theta, state, *rows) + (well + 0 * theta.sum(-1, keepdim=True)).sqrt() - well
    broken.loss = breaks
    take(1, sound, broken)
    first = {key: broken.state[key][1].clone() for key in ("theta", "target") if key in broken.state}
    take(3, sound, broken)
    for key, x in first.items():
        near(broken.state[key], torch.stack([sound.state[key][0], x, sound.state[key][2]]), 0)
    assert broken.state["alive"].tolist() == [1, 0, 1]
    assert broken.state["losses"][1].isfinite().all() == gradient_only
    assert all(broken.state[key].isfinite().all() for key in "mv")


def test_extraction_reaches_the_optimum_of_states_it_has_not_seen():
    """A policy of two layers, a behavior N(0.4 s, 0.3²), twins of mean slope 1: a* = 0.4 s + β/κ."""
    table = torch.rand(500, 5, generator=torch.Generator().manual_seed(2)) * 2 - 1
    options = dict(beta=(0.1, 0.05), policy_steps=300, policy_batch=64, policy_width=32)
    stage = build("policy", [0], table, (1, 1), **options)
    stage.q = SimpleNamespace(bind=lambda flat: lambda s, a: torch.stack([3 * a, -a], -3).squeeze(-1))
    stage.noise_model = SimpleNamespace(bind=lambda flat: gaussian(lambda s: 0.4 * s, 0.3))
    take(300, stage)
    s = torch.linspace(-0.9, 0.9, 50, dtype=F64)[:, None]
    for i, beta in enumerate((0.1, 0.05)):
        a = chain([x[i] for x in stage.weights().values()], s).tanh()
        near(a, 0.4 * s + beta / 0.20755223521, 0.03)  # half of it is the networks' fit


def test_a_trained_noise_model_recovers_the_score_of_a_mixture():
    a, t = LINE.density(tensor(0.0)).sample((20000,)), 0.02 + 0.96 * torch.rand(20000, dtype=F64)
    table = torch.cat([torch.zeros(20000, 1), a, torch.zeros(20000, 3)], 1)
    options = dict(dropout=0.0, behavior_batch=128, behavior_width=32, behavior_lr=5e-3, behavior_blocks=1)
    stage = build("behavior", [0], table, (1, 1), **options)
    take(300, stage)
    net, s, noise = stage.noise_model.bind(stage.state["theta"][0]), 0 * a, torch.randn(20000, 1, dtype=F64)
    a_t = diffuse(a, t, noise)
    exact = LINE.noise_model(a_t, s, t)
    assert ((net(a_t, s, t) - exact)**2).mean() < 0.1 * (exact**2).mean()  # seen: 0.03 to 0.06
    assert behavior_loss(net, s, a, t, noise) > ((exact - noise)**2).mean()  # the floor


@pytest.mark.parametrize("name, least, most", [("behavior", 0, 1), ("policy", 0.02, 0.98)])  # Eq. 13, Eq. 14
def test_rows_times_and_dropout_cover_their_ranges_anew_for_each_seed_step_and_stage(name, least, most):
    stage, critic = build(name, [0, 1], **{f"{name}_batch": 4096}), build("critic", [0], critic_batch=4096)
    rows, t, _, *keep = stage.draw(stage.groups[0])
    others = [stage.draw(stage.groups[1]), critic.draw(critic.groups[0])]
    stage.count.add_(1)
    for other in (*others, stage.draw(stage.groups[0])):
        assert (rows == other[0]).all(1).double().mean() < 0.02  # 1 in 200 by chance
    assert all(abs(x.double().mean() - 0.75) < 0.01 for x in keep)
    assert least < t.min() < least + 0.002 and most - 0.002 < t.max() <= most
    assert abs(t.mean() - 0.5) < 0.02 and len(rows.unique(dim=0)) == 200


def test_settings_are_those_of_appendix_c_and_table_2():
    rows = {"medium-expert": (0.1, 0.01, 0.01), "medium": (0.05, 0.2, 0.05), "medium-replay": (0.5, 0.2, 0.2)}
    table_2 = {f"{body}-{kind}-v2": beta for kind, betas in rows.items()
               for body, beta in zip(("walker2d", "halfcheetah", "hopper"), betas)}
    mazes = {"umaze": 0.02, "medium-play": 0.08, "large-play": 0.06,
             "umaze-diverse": 0.04, "medium-diverse": 0.05, "large-diverse": 0.05}
    table_2.update({f"antmaze-{maze}-v2": beta for maze, beta in mazes.items()})
    assert srpo.TABLE_2 == table_2
    for task, beta in table_2.items():
        given, maze = Settings().resolve(task), "antmaze" in task
        assert (given.tau, given.policy_layers, given.grad_norm, given.temperature, given.beta) == (
            (0.9, 4, "released", 10.0, (beta,)) if maze else (0.7, 2, "none", 3.0, (beta,)))
    for stage, steps, batch in (("critic", 1.5e6, 256), ("behavior", 2e6, 2048), ("policy", 1e6, 256)):
        ours = [getattr(given, f"{stage}_{what}") for what in ("steps", "batch", "lr")]
        assert ours == [steps, batch, 3e-4]
    assert (given.gamma, given.target_rate, given.dropout, given.behavior_decay) == (0.99, 0.005, 0.1, 0.01)
    assert (given.weighting, given.baseline) == ("sigma2", True)


# ---------------------------------------------- Random numbers: a function of (seed, step, purpose, element)

N = 2**18


def draw(seed=3, step=5, base=8):
    return Draw(torch.tensor(seed, dtype=torch.int32), torch.tensor(step, dtype=torch.int32), base)


@pytest.mark.parametrize("words", [1, 1001, 10**6])
@pytest.mark.parametrize("purpose, address", [(2, 10), (-2, -10)])  # counted from the stage's base, 8
def test_random_words_are_lowbias32_of_their_address(words, purpose, address):
    def mix(*numbers):
        x = sum(np.asarray(number).astype(np.uint32) for number in numbers)  # modulo 2³²
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
        return x
    seed, step = np.array([3, 2**31 - 1]), np.array([2**30])
    first, second = mix(mix(seed, [address]), step), mix(mix(step, [address]), seed)
    exact = mix(mix(np.arange(words), first[:, None]), second[:, None])
    ours = draw(seed, 2**30).bits(purpose, (words,)).numpy()
    np.testing.assert_array_equal(ours.view(np.uint32), exact)


def test_random_numbers_have_their_distributions():
    def far(x, cdf):  # Kolmogorov and Smirnov's distance; above 2 once in 1,500 times
        return (cdf(x.double().sort().values) - (torch.arange(N) + 0.5) / N).abs().max() * math.sqrt(N)

    uniform, index = draw().uniform(1, (N,)), draw().index(1, (N,), 10)
    assert far(uniform, lambda x: x) < 2 and far(draw().normal(2, (N,)), Normal(0, 1).cdf) < 2
    assert ((index.bincount() - N / 10)**2).sum() / (N / 10) < 30  # chi-squared of 9 degrees
    extreme = draw()  # the least word, the middle and the largest
    extreme.bits = lambda purpose, shape: torch.tensor([0, -2**31, -1], dtype=torch.int32)
    near(extreme.uniform(1, (3,)), [2**-25, 0.5, 1], 0)
    near(extreme.index(1, (3,), 10), [0, 5, 9], 0)
    for dropout in (0.0, 0.1, 0.5):
        assert draw().keep(4, (N,), dropout).double().mean() == pytest.approx(1 - dropout, abs=0.005)


def test_random_numbers_are_independent_across_seeds_steps_and_purposes():
    places = (3, 5), (4, 5), (3, 6), (5, 3), (3, 5, 16)  # seed, step, and the stage's base
    streams = [draw(*place).uniform(purpose, (N,)) for place in places for purpose in (1, 2, -2)]
    correlation = torch.corrcoef(torch.stack([*streams, streams[0].roll(1)])) - torch.eye(16)
    assert correlation.abs().max() < 5 / math.sqrt(N)
    words = draw(range(2**20)).bits(1, (2,)).numpy()  # if streams were shifts of one another, twice as many
    assert len(np.intersect1d(*words.T)) < 350  # words would be shared as the 256 by chance


# ----------------------------------------------------------------------------------------------- D4RL's data

def random_file(rows=40, s_dim=11, a_dim=3, seed=0):
    """Trajectories of 8 rows; every second ends at a time limit, the others at a terminal."""
    rng, step = np.random.default_rng(seed), np.arange(1, rows + 1)
    return {"observations": rng.normal(size=(rows, s_dim)), "actions": rng.uniform(-1, 1, (rows, a_dim)),
            "rewards": rng.normal(size=rows), "terminals": step % 16 == 8, "timeouts": step % 16 == 0}


close = partial(np.testing.assert_allclose, rtol=0)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(arrays, or a function of the open file): the path of the task's file in an empty cache."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))

    def write(content, task=HOPPER, mark="stand_in"):
        with h5py.File(tmp_path / os.path.basename(url_of(task)), "w") as file:
            file.attrs[mark] = "test"
            content(file) if callable(content) else file.update(content)
            return Path(file.filename)
    return write


def url_of(task):
    return data.import_d4rl().infos.DATASET_URLS[task]


def load(task=HOPPER, **options):
    """The Dataset, its columns by name and what was logged."""
    lines = []
    dataset = data.load(task, log=lines.append, **options)
    return dataset, data.columns(*dataset[:3]), " ".join(lines)


def refusal(task=HOPPER, **options):
    with pytest.raises(data.UserError) as caught:
        load(task, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("reward_shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("missing", [(), ("timeouts",), ("terminals",), ("terminals", "timeouts")])
def test_transitions_are_those_of_d4rl_qlearning_dataset(missing, reward_shape, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 64)  # several blocks, and rows at their edges
    raw = random_file(1000, seed=2)
    raw["terminals"], raw["timeouts"] = np.random.default_rng(1).random((2, 1000)) < [[0.03], [0.05]]
    raw = {key: value for key, value in raw.items() if key not in missing}
    reference = data.import_d4rl().qlearning_dataset(SimpleNamespace(_max_episode_steps=20),
                                                     {"terminals": np.zeros(1000, bool), **raw})
    raw["rewards"] = raw["rewards"].reshape(reward_shape)
    ours = data.qlearning_transitions(raw, max_episode_steps=20)
    for mine, theirs in zip(("s", "a", "s_next", "r", "terminal"),
                            ("observations", "actions", "next_observations", "rewards", "terminals")):
        np.testing.assert_array_equal(ours[mine], reference[theirs])
        assert ours[mine].dtype == np.float32


def test_locomotion_rewards_are_scaled_by_the_range_of_whole_trajectories(write):
    raw = random_file(rows=12)
    raw["rewards"] = np.array([1, 1, 1, 9, 2, 2, 2, 2, 5, 5, 5, 100.0])
    raw["terminals"], raw["timeouts"] = np.isin(np.arange(12), [5, 11]), np.arange(12) == 3
    raw["actions"][[2, 5], [0, 1]] = -1.0001, 3
    write(raw)
    dataset, columns, log = load()
    # Row 3 (time limit) and the file's last row go: returns 3, 4, 19. By terminals only, as released: 7.
    expected = 1000 / 16 * np.delete(raw["rewards"], [3, 11])
    np.testing.assert_allclose(columns["r"], expected, rtol=1e-6)
    assert dataset.info["reward_scale"] == pytest.approx(1000 / 16)
    assert dataset.info["reward_scale_released_code"] is None  # one return, no range
    score = data.normalized_score(HOPPER, (4 * 12 + 2 * 4 + 6 * 119) / 12)  # weighted by rows
    assert dataset.info["data_score"] == pytest.approx(score)
    assert (dataset.info["rows"], dataset.info["episodes"], dataset.info["kind"]) == (10, 3, "stand-in")
    assert dataset.table.flags.c_contiguous and dataset.table.shape == (10, 2 * 11 + 3 + 2)
    assert np.abs(columns["a"]).max() == 1 and "2 action components" in log  # clipped and counted


def test_released_reward_range_counts_a_thousand_rows_between_terminals():
    for terminals, length, ranges in ([], 3000, [1000] * 3), ([499], 1700, [500, 1000]):
        terminal = np.isin(np.arange(length), terminals)
        ends = terminal | data.counted_limits(terminal, 1000, after_terminal=0)
        assert data.segment_returns(np.ones(length), ends).tolist() == ranges


def test_antmaze_rewards_are_less_one_and_its_score_counts_episodes(write):
    raw = random_file(s_dim=29, a_dim=8) | {"rewards": np.float32(np.isin(np.arange(40), [7, 20, 21]))}
    raw["terminals"], raw["timeouts"] = raw["rewards"] == 1, np.arange(40) % 10 == 9
    raw["observations"][:, :2] = 50 * (np.arange(40) < 8)[:, None]  # a reset after row 7, none after 20, 21
    write(raw, "antmaze-umaze-v2")
    dataset, columns, _ = load("antmaze-umaze-v2")
    assert set(columns["r"]) == {-1, 0} and (columns["r"] == 0).sum() == 3
    assert dataset.info["episodes"] == 5 and dataset.info["data_score"] == pytest.approx(40)


def item(key, make):
    """A file in which this key is what make(file) gives."""
    def content(file):
        file.update({name: array for name, array in random_file().items() if name != key})
        file[key] = make(file)
    return content


def unwritten(file):
    for key, shape in (("observations", (10**6, 11)), ("actions", (10**6, 3)), ("rewards", (10**6,))):
        file.create_dataset(key, shape, "f4", chunks=True)


def virtual(file):
    layout = h5py.VirtualLayout((40, 11), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "observations", (40, 11))
    return file.create_virtual_dataset("moved", layout)


@pytest.mark.parametrize("content, words", [
    (item("observations", lambda file: h5py.ExternalLink("/etc/passwd", "/x")), "no plain array"),
    (item("rewards", lambda file: h5py.SoftLink("/actions")), "no plain array"),
    (item("observations", virtual), "no plain array"),
    (item("observations", lambda file: file.create_dataset(
        "x", (40, 11), "f4", external=[("/etc/passwd", 0, 40 * 44)])), "no plain array"),
    (item("observations", lambda file: file.create_group("x")), "no plain array"),
    (item("actions", lambda file: file.create_dataset("x", (40, 3), h5py.ref_dtype)), "no plain array"),
    ({"rewards": np.full(40, b"1.0")}, "no plain array"),
    (lambda file: file.update({"observations": np.zeros((40, 11))}), "no plain array of numbers actions"),
    ({"rewards": np.ones(39)}, "shape (39,)"), ({"terminals": np.zeros((40, 2), bool)}, "shape (40, 2)"),
    ({"observations": np.zeros((40, 17))}, "shape (40, 17)"), ({"actions": 1.0}, "shape ()"),
    (lambda file: file.update(random_file(rows=0)), "0 rows"),
    (lambda file: file.update(random_file(rows=1)), "1 rows"),
    (item("observations", lambda file: file.create_dataset("x", (10**12, 11), "f4", chunks=(1, 11))),
     "1000000000000 rows"), (unwritten, "but stores 0"),
    ({"observations": np.full((40, 11), np.nan)}, "NaN or infinite observations"),
    ({"observations": np.full((40, 11), 1e300)}, "NaN or infinite observations"),
    ({"actions": np.full((40, 3), np.inf)}, "NaN or infinite actions"),
    ({"rewards": np.full(40, -np.inf)}, "NaN or infinite rewards"),
    ({"rewards": np.zeros(40)}, "equal return"), ({"timeouts": np.ones(40)}, "no whole trajectory"),
    ({"terminals": np.zeros(40), "timeouts": np.zeros(40)}, "no whole trajectory"),
    (lambda intact: intact[: len(intact) // 2], "truncated, damaged or not HDF5"),
    (lambda intact: intact[:96] + bytes(1000) + intact[1096:], "truncated, damaged or not HDF5"),
    (lambda intact: b"not HDF5", "truncated, damaged or not HDF5"),
    (lambda intact: b"", "truncated, damaged or not HDF5")])
def test_a_crafted_or_damaged_file_is_refused_with_the_command_that_removes_it(content, words, write):
    if "truncated" in words:
        path = write(random_file())
        path.write_bytes(content(path.read_bytes()))
    else:
        path = write(content if callable(content) else random_file() | content)
    line = refusal(any_data=True)
    assert words in line and f"rm {path}" in line


def test_a_file_of_unknown_origin_or_without_success_and_a_folder_are_refused(write):
    write(random_file(), mark="generated")  # this word serves the demo's file only
    assert "--any-data" in refusal()
    assert load(any_data=True)[0].info["kind"] == "any"
    path = write(random_file(s_dim=29, a_dim=8), "antmaze-umaze-v2")
    assert "reward of 1" in refusal("antmaze-umaze-v2")
    path.unlink()
    path.mkdir()
    assert "not a file" in refusal("antmaze-umaze-v2")


def answer(status):
    return requests.HTTPError("no", response=SimpleNamespace(status_code=status))


@pytest.mark.parametrize("replies, words", [
    ([requests.ConnectionError("x\ny"), answer(404)], "server: ConnectionError, mirror: 404"),
    ([answer(403), b"other bytes"], "server: 403, mirror: wrong SHA-256"),
    ([OSError(28, "No space left on device")], "No space left"),
    ([answer(403), b"right bytes"], "truncated, damaged or not HDF5")])
def test_downloads_are_verified_and_fail_in_one_line(replies, words, tmp_path, monkeypatch):
    name = os.path.basename(url_of(HOPPER))
    urls = iter([url_of(HOPPER), data.MIRROR + name])

    def fetch(self, url, output_file, pooch, check_only=False):
        assert url == next(urls)
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        Path(output_file).write_bytes(reply)
    monkeypatch.setitem(data.FILES, HOPPER, (11, hashlib.sha256(b"right bytes").hexdigest()))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "new"))
    monkeypatch.setattr("pooch.HTTPDownloader.__call__", fetch)
    line = refusal()
    assert words in line and str(tmp_path / "new" / name) in line
    assert os.listdir(tmp_path / "new") == ([name] if "HDF5" in words else [])  # its bytes are kept if right


def test_maze2d_data_is_what_d4rls_script_makes_and_a_function_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = tmp_path / os.path.basename(url_of(data.DEMO))
    data.generate_maze2d(path, rows=400)
    first = path.read_bytes()
    np.random.seed(7)
    data.generate_maze2d(path, rows=400)
    assert path.read_bytes() == first and os.listdir(tmp_path) == [path.name]

    from d4rl.pointmaze import maze_model, waypoint_controller  # the script's loop, with nothing remembered
    env = maze_model.MazeEnv(data.make_env(data.DEMO).str_maze_spec)
    controller = waypoint_controller.WaypointController(env.str_maze_spec)
    data.seed_env(env, 0)
    env.set_target()
    s, expected = env.reset(), []
    for _ in range(400):
        a, done = controller.get_action(s[:2], s[2:4], env._target)
        expected.append([*s, *a, np.linalg.norm(np.float32(s[:2]) - 1) <= 0.5, done])
        after = env.step(a)[0]
        s = s if done else after
        if done:
            env.set_target()
    with h5py.File(path) as file:
        stored = np.column_stack([file[key] for key in ("observations", "actions", "rewards", "terminals")])
    np.testing.assert_array_equal(stored, np.float32(expected))

    dataset, columns, _ = load(data.DEMO)
    ends = stored[:, 7]
    kept = [i for i in range(399) if not ends[i] and not (i and ends[i - 1])]
    np.testing.assert_array_equal(columns["s"], stored[kept, :4])
    np.testing.assert_array_equal(columns["s_next"], stored[np.add(kept, 1), :4])
    assert not columns["terminal"].any() and dataset.info["kind"] == "generated" and sum(ends) >= 3
    score = 100 * (stored[:300, 6].sum() - 23.85) / (161.86 - 23.85)  # of the one window of 300 rows
    assert dataset.info["data_score"] == pytest.approx(score)


# ------------------------------------------------------------------------- environments, seeds and evaluation


class Endless:
    def __call__(self, obs, rng):
        time.sleep(3600)


def test_returns_are_functions_of_seed_and_episode_to_the_last_bit():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(8, 11)), rng.normal(size=(3, 8))
    network = data.NumpyPolicy([(weights[0], np.ones(8)), (weights[1], np.ones(3))])
    policies = [(0, data.RandomPolicy(3)), (1, data.RandomPolicy(3)), (0, network)]
    expected = [[data.run_episode(HOPPER, *policy, episode) for episode in (2, 1, 0)][::-1]
                for policy in policies[::-1]][::-1]
    assert len(np.unique(expected)) == 9
    scores = 100 * (np.array(expected) + 20.272305) / (3234.3 + 20.272305)
    np.testing.assert_allclose(data.normalized_score(HOPPER, expected), scores, rtol=1e-12)
    with data.Evaluator(HOPPER, workers=2) as evaluator:
        evaluations = [evaluator.submit(policies[first:], 3) for first in (0, 1)]
        np.testing.assert_array_equal(data.results(evaluations[1]), expected[1:])
        np.testing.assert_array_equal(data.results(evaluations[0]), expected)


def test_busy_workers_end_with_their_evaluator():
    with data.Evaluator(HOPPER, workers=1) as evaluator:
        evaluator.submit([(0, Endless())], 1)
        worker, = evaluator.pool._processes.values()
    worker.join(60)
    assert worker.exitcode == 1


@pytest.mark.parametrize("task", data.TASKS)
def test_every_task_runs_and_a_seed_fixes_start_goal_and_actions(task):
    env, seen = data.make_env(task), []
    for seed in (3, 4, 3):
        np.random.rand()
        env.reset()
        data.seed_env(env, seed)
        start = env.reset()
        seen.append((*start, *getattr(env.unwrapped, "target_goal", ()), *env.action_space.sample()))
    assert seen[0] == seen[2]
    assert np.not_equal(seen[0], seen[1])[:2].all() and np.not_equal(seen[0], seen[1])[-5:].all()
    action = env.action_space.sample()
    after, reward, done, _ = env.step(action)
    assert (len(start), len(action)) == (len(after), len(action)) == data.SIZES[task.split("-")[0]]
    assert np.isfinite([*after, data.normalized_score(task, reward)]).all() and not done


def test_importing_is_light_and_environments_are_quiet():
    code = ("import sys, data; heavy = {'torch', 'h5py', 'gym', 'd4rl', 'pooch', 'tqdm'} & set(sys.modules);"
            "env = data.make_env('antmaze-umaze-v2'); data.seed_env(env, 0); env.reset();"
            "env.step(env.action_space.sample()); sys.exit(str(heavy) if heavy else 0)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ------------------------------------------------------------------------------- the physics of MuJoCo 2.1.0

# Recorded once with mujoco-py on MuJoCo 2.1.0 (gym 0.23.1, d4rl 1.1, Python 3.9): states, actions and what
# step returned. Most antmaze rows touch a wall, a few with a leg's axis inside it, where other versions fail.
RECORDED = np.load(Path(__file__).with_name("physics210.npz"))
RECORDED_WITH = {"halfcheetah": "halfcheetah-medium-v2", "hopper": HOPPER, "walker2d": "walker2d-medium-v2",
                 "antmaze_umaze": "antmaze-umaze-v2", "antmaze_medium": "antmaze-medium-play-v2",
                 "antmaze_large": "antmaze-large-play-v2", "maze2d_umaze": data.DEMO}


@pytest.mark.parametrize("name, task", RECORDED_WITH.items())
def test_steps_and_resets_are_those_of_mujoco_210(name, task):
    record = {key.split("/", 1)[1]: RECORDED[key] for key in RECORDED.files if key.startswith(name + "/")}
    env = data.make_env(task)
    inner = getattr(env.unwrapped, "_wrapped_env", env.unwrapped)
    for seed in range(4):
        inner.seed(seed)
        np.random.seed(seed)  # antmaze draws its goal from here
        for obs, goal in zip(record["seed_obs"][seed], record["seed_goal"][seed]):
            close(env.reset(), obs, atol=1e-12)
            close(getattr(inner, "target_goal", getattr(inner, "_target", 0)), goal, atol=1e-12)
            env.step(np.zeros(env.action_space.shape))
    if "goal" in record:
        inner.set_target(tuple(record["goal"]))

    def play(qpos, qvel, actions):
        inner.sim.reset()  # a simulation also remembers its time and its last accelerations
        inner.set_state(qpos, qvel)
        return [env.unwrapped.step(action) for action in actions][-1]

    rows = zip(record["qpos"], record["qvel"], record["action"])
    obs, reward, done, _ = zip(*(play(qpos, qvel, [action]) for qpos, qvel, action in rows))
    close(obs, record["next_obs"], atol=1e-9)  # seen: 2e-12; a wrong mass or contact gives 1e-3 to 1
    close(reward, record["reward"], atol=1e-9)
    assert np.array_equal(done, record["done"])
    episode, = (key[:-len("obs10")] for key in record if key.endswith("obs10"))
    after_ten = play(*(record[episode + key] for key in ("qpos", "qvel", "actions")))[0]
    close(after_ten, record[episode + "obs10"], atol=1e-6)  # seen: 4e-11, in halfcheetah, which is chaotic


@pytest.fixture
def hopper():
    env = data.make_env(HOPPER)
    return env if sys.modules["mujoco_py"] is mujoco210 else pytest.skip("mujoco-py itself is installed")


def test_another_mujoco_is_refused_with_the_cure(hopper, monkeypatch):
    monkeypatch.delitem(sys.modules, "mujoco_py")
    monkeypatch.setattr("mujoco.__version__", "3.2.7")
    with pytest.raises(ImportError, match=r"^mujoco 3\.2\.7 .*: pip install mujoco==3\.2\.6$"):
        mujoco210.install()
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ImportError, match=r"^.* MuJoCo: pip install mujoco==3\.2\.6$"):
        mujoco210.install()
    requirements = Path(__file__).with_name("requirements.txt").read_text()
    assert "mujoco_py" not in sys.modules and f"\nmujoco=={mujoco210.VERSION} " in requirements


def test_an_unstable_simulation_and_rendering_raise(hopper):
    hopper.reset()
    hopper.unwrapped.sim.data.qvel[0] = np.nan
    with pytest.raises(mujoco210.MujocoException, match="^Got MuJoCo Warning: "):
        hopper.step(np.zeros(3))
    hopper.reset()
    hopper.step(np.zeros(3))  # well again
    for mode in ("human", "rgb_array"):
        with pytest.raises(mujoco210.MujocoException, match="^no rendering[^\n]*$"):
            hopper.render(mode)


def test_a_mujoco_py_that_is_not_built_is_left_alone(hopper, monkeypatch, tmp_path, capfd):
    """It builds itself on import; here that import would fail the test."""
    (tmp_path / "mujoco_py" / "generated").mkdir(parents=True)
    (tmp_path / "mujoco_py" / "__init__.py").write_text("print('building')")
    monkeypatch.setenv("MUJOCO_PY_MUJOCO_PATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mujoco_py")
    assert mujoco210.install() is mujoco210 and capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------ the command line, end to end

TRAIN = (f"train {data.DEMO} --critic-steps 12 --critic-batch 16 --critic-width 16 --behavior-steps 8 "
         "--behavior-batch 16 --behavior-width 16 --behavior-blocks 1 --policy-steps 10 --policy-batch 16 "
         "--policy-width 16 --evaluations 2 --episodes 1 --workers 1 --device cpu ")


class InThisProcess(futures.Executor):
    """A pool without processes, which take seconds to start; results are there at the third asking."""

    def submit(self, function, *arguments):
        future, asked = futures.Future(), itertools.count()
        future.set_result(function(*arguments))
        future.done = lambda: next(asked) > 1
        return future


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory):
    """A D4RL cache with a short generated file of the demo task."""
    folder = tmp_path_factory.mktemp("d4rl")
    data.generate_maze2d(str(folder / os.path.basename(url_of(data.DEMO))), rows=900)
    return folder


@pytest.fixture
def cli(demo_data, tmp_path, monkeypatch, capsys):
    """cli(line, exit status) -> stderr, with the demo's data and runs below tmp_path."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(demo_data))
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda *_: InThisProcess())
    monkeypatch.chdir(tmp_path)

    def run(line, status=0):
        assert srpo.main(line.split()) == status
        return capsys.readouterr().err.strip()
    return run


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / data.DEMO


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def tables(folder):
    return [read(folder / name) for name in ("log.csv", "scores.csv")]


def test_three_stages_train_through_the_command_line_and_a_seed_alone_bit_for_bit(cli, folder, monkeypatch):
    train = TRAIN + "--beta 0.1 0.4 --also iql bc "
    with monkeypatch.context() as patch:
        patch.setattr(data, "ProcessPoolExecutor", futures.ProcessPoolExecutor)
        cli(train + "--seeds 3 1")
    before, rows = tables(folder), read(folder / "scores.csv")
    cli(train + "--seeds 3 1")  # finished: nothing is done
    cli(train + "--seeds 1 --out alone")
    alone = Path("alone", data.DEMO)
    assert tables(folder) == before
    assert tables(alone) == [[row for row in table if row["seed"] == "1"] for table in before]
    for name, tensor in srpo.load_tensors(alone / "policy.pt").items():
        assert torch.equal(tensor, srpo.load_tensors(folder / "policy.pt")[name][1::2])
    places = {(row["method"], row["step"], row["beta"], row["seed"]) for row in rows}
    betas = [("srpo", "0.1"), ("srpo", "0.4"), ("iql", ""), ("bc", "")]
    assert len(rows) == 24 and places == {(method, step, beta, seed) for method, beta in betas
                                          for step in ("0", "5", "10") for seed in ("1", "3")}
    assert json.loads((folder / "config.json").read_text())["data"]["kind"] == "generated"
    assert (folder / "curves.png").stat().st_size > 1000
    for method in ("srpo", "idql", "iql", "bc", "random"):
        cli(f"evaluate {folder} --method {method} --episodes 1 --steps 2")
        if method in ("srpo", "iql", "bc"):  # the final scores, from the saved weights
            anew = json.loads((folder / f"evaluation-{method}.json").read_text())["scores"]
            final = [row["return"] for row in rows if (row["method"], row["step"]) == (method, "10")]
            assert [str(row["return"]) for row in anew] == final


def test_a_policy_loads_without_this_project(tmp_path):
    weights, obs = build("policy", [0, 5]).weights(), 3 * np.linspace(-1, 1, 3)  # as policy.pt holds them
    policy = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh())
    policy.load_state_dict({name: tensor[1] for name, tensor in weights.items()})
    expected = srpo.numpy_policy(policy.state_dict())(obs, None)
    np.testing.assert_allclose(policy(torch.tensor(obs, dtype=F32)).detach(), expected, atol=1e-6)
    pytest.importorskip("onnxscript", reason="ONNX export needs the packages onnx and onnxscript")
    torch.onnx.export(policy, (torch.zeros(1, 3),), str(tmp_path / "policy.onnx"), dynamo=True)


def test_idql_takes_the_best_of_its_candidates_by_the_smaller_twin():
    noise_model, noise = gaussian(0, 0.3), np.random.default_rng(0).standard_normal((64, 2), np.float32)
    noise_model.output = SimpleNamespace(out_features=2)
    policy = srpo.IDQL(noise_model, lambda s, a: torch.stack([a[:, 0], -a[:, 0]]), 64, 5)  # least: −|a₀|
    candidates = sample(noise_model, None, torch.from_numpy(noise), 5)
    near(candidates[candidates[:, 0].abs().argmin()], policy(np.ones(3), np.random.default_rng(0)), 0)


def test_reuse_takes_critic_and_behavior_of_a_like_run_only(cli, tmp_path, folder):
    cli(TRAIN + "--seeds 0")
    reuse = TRAIN + f"--seeds 0 --reuse {folder} --no-baseline "
    cli(reuse + "--out other")
    same = [(folder / name).read_bytes() == (tmp_path / "other" / data.DEMO / name).read_bytes()
            for name in ("critic.pt", "behavior.pt", "policy.pt")]
    assert same == [True, True, False]
    assert "another tau" in cli(reuse + "--tau 0.5 --out third", 2)


def test_the_log_has_mean_losses_and_the_run_ends_when_none_is_finite(cli, folder, monkeypatch):
    def loss(stage, theta, *rest):  # of the step's number; from the 21st step on, none
        return (0 * theta.sum() + stage.count * (1 if stage.count <= 20 else math.nan)).expand(2)
    monkeypatch.setattr(srpo.Critic, "loss", loss)
    line = cli(TRAIN + "--seeds 0 1 --critic-steps 40", 3)
    rows = read(folder / "log.csv")
    assert [float(row["q_loss"]) for row in rows[:20]] == [i + 0.5 for i in range(1, 20, 2) for _ in (0, 1)]
    assert [row["alive"] for row in rows[18:]] == ["1", "1", "0", "0"]
    assert line.endswith(f"every seed's critic loss is not finite; see {Path('runs', data.DEMO, 'log.csv')}")


@pytest.mark.parametrize("line, words", [
    ("train hoper-medium-v2", HOPPER), (f"train ../{HOPPER}", HOPPER), ("train /etc/passwd", data.DEMO),
    (TRAIN + "--critic-stepz 3", "unrecognized arguments"), (TRAIN + "--critic 3", "unrecognized arguments"),
    (TRAIN + "--tau 2", "--tau 2.0 is out of range"), (TRAIN + "--gamma 1", "--gamma 1.0 is out of range"),
    (TRAIN + "--policy-steps 0", "--policy-steps 0 is out of range"),
    (TRAIN + "--critic-lr nan", "--critic-lr nan is out of range"),
    (TRAIN + "--weighting sigma3", "invalid choice"), (TRAIN + "--beta 0", "--beta 0.0 is out of"),
    (TRAIN + "--seeds 1 1", "--seeds must be different"), (TRAIN + "--seeds -1", "--seeds must be different"),
    pytest.param(TRAIN + "--device cuda", "PyTorch sees no GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    (TRAIN + "--out /proc/nowhere", "cannot write to /proc/nowhere"),
    ("evaluate nowhere", "nowhere/config.json does not exist"), ("", "required: command")])
def test_bad_input_is_one_line_and_exit_status_2(line, words, cli):
    told = cli(line, 2)
    assert words in told and "\n" not in told


class Payload:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.mark.parametrize("line, name, content", [
    *((f"evaluate runs/{data.DEMO}", "config.json", content) for content in (
        b"", b"[]", b"{", b"null", b"[" * 100000,
        b'{"task": "../x", "settings": {}, "data": {"kind": 0, "sha256": 0, "data_score": 0}, "seeds": []}',
        b'{"task": "maze2d-umaze-v1", "settings": [], "data": {}, "seeds": []}',
        b'{"task": "maze2d-umaze-v1", "settings": {"x": 1}, "data": {}, "seeds": []}')),
    *((TRAIN, "checkpoint.pt", content) for content in (b"", b"PK", pickle.dumps(Payload(), 2)))])
def test_a_crafted_file_in_a_run_is_refused_in_one_line(line, name, content, cli, folder):
    folder.mkdir(parents=True)
    (folder / name).write_bytes(content)
    told = cli(line, 2)
    assert f"{name} is damaged" in told and "\n" not in told and not Path("pwned").exists()


FUZZED = dict(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
              max_examples=2500 if os.environ.get("LONG") else 25)
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x, max_size=3))
DAMAGE = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=9)), max_size=4), st.floats(0.5, 1)
ARRAYS = st.builds(lambda value, kind, shape: np.full(shape, value).astype(kind),
                   st.sampled_from([0, 1, 3, 1e300, math.inf, math.nan]),
                   st.sampled_from(["f2", "f4", "f8", "i1", "i8", "u8", "?", "c8", "S3", "V4"]),
                   st.sampled_from([(40, 11), (40, 3), (40,), (40, 1), (0, 11), (1, 3), (39,), (40, 11, 1)]))


def damaged(content, marks, length):
    """Bytes with others written over them at relative places, then cut."""
    content = bytearray(content)
    for place, some in marks:
        at = int(place * len(content))
        content[at : at + len(some)] = some
    return bytes(content[: math.ceil(length * len(content))])


def harmless(call, *arguments, **options):
    """Fails if what a crafted file raises is not one line for its user."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return call(*arguments, **options)
    except data.UserError as error:
        assert len(str(error).splitlines()) == 1


@pytest.fixture
def trained(cli, folder):
    """A tiny finished run's folder."""
    cli(TRAIN + "--seeds 0")
    return folder


@hypothesis.settings(**FUZZED)
@given(st.dictionaries(st.sampled_from(["observations", "actions", "rewards", "terminals", "timeouts", "x"]),
                       st.none() | ARRAYS, max_size=4), *DAMAGE)
def test_no_data_file_leads_to_a_traceback(write, items, marks, length):
    path = write({key: x for key, x in (random_file() | items).items() if x is not None})
    path.write_bytes(damaged(path.read_bytes(), marks, length))
    harmless(load, HOPPER, any_data=True)


@hypothesis.settings(**FUZZED)
@given(st.sampled_from(["", "seeds", "data", "settings"]), st.text(max_size=9) | st.sampled_from(
    ["task", "seeds", "settings", "data", *vars(Settings())]), JSON, *DAMAGE)
def test_no_config_leads_to_a_traceback(trained, tmp_path, part, key, value, marks, length):
    config = json.loads((trained / "config.json").read_text())
    place = config[part] if part else config
    place[0 if part == "seeds" else key] = value
    (tmp_path / "config.json").write_bytes(damaged(json.dumps(config).encode(), marks, length))
    config = harmless(srpo.read_config, tmp_path)
    if config and config["seeds"] == [0]:
        harmless(srpo.load_policies, trained, config, "srpo", 2, 2)


@hypothesis.settings(**FUZZED)
@given(st.sampled_from(["critic", "behavior", "policy", "checkpoint"]), st.none() | st.text(max_size=5) |
       st.sampled_from(["state", "count", "log", "pending", "stage"]), JSON, *DAMAGE)
def test_no_weights_lead_to_a_traceback(trained, tmp_path, name, key, value, marks, length):
    """In evaluation, and where training would go on from them."""
    folder = tmp_path / "fuzzed" / data.DEMO
    shutil.copytree(trained, folder, dirs_exist_ok=True)
    tensors = torch.load(folder / f"{name}.pt", weights_only=True)
    tensors = value if key is None else tensors if key == "" else tensors | {key: value}
    torch.save(tensors, folder / f"{name}.pt")
    content = (folder / f"{name}.pt").read_bytes()
    (folder / f"{name}.pt").write_bytes(damaged(content, marks, length))
    for method in ("srpo", "idql"):
        harmless(srpo.load_policies, folder, srpo.read_config(folder), method, 2, 2)
    if name != "policy":
        (folder / "policy.pt").unlink()
    assert srpo.main((TRAIN + f"--seeds 0 --out {folder.parent}").split()) in (0, 2)


@hypothesis.settings(**FUZZED)
@given(st.text() | st.builds("{0}{2}{1}".format, st.text(max_size=3), st.text(max_size=3), st.sampled_from(
    [HOPPER, "../" + HOPPER, "/etc/passwd", "runs/.."])))
def test_no_task_name_leads_out_of_the_table(task):
    if task not in data.TASKS:
        assert refusal(task).startswith("unknown task")


# ----------------------------------------------------------------------------------------- runs that survive

SURVIVES = TRAIN + "--critic-steps 40 --also bc --seeds 0 1 --checkpoint-minutes 1e-9 --out "


def assert_same_run(folder, other):
    assert tables(folder) == tables(other)
    for name in ("critic.pt", "behavior.pt", "policy.pt", "bc.pt"):
        torch.testing.assert_close(*(srpo.load_tensors(x / name) for x in (folder, other)), atol=0, rtol=0)


def breaks(function, calls):
    """The function, interrupted after so many calls."""
    left = iter(range(1, calls))

    def broken(*arguments, **options):
        result = function(*arguments, **options)
        if next(left, None) is None:
            raise KeyboardInterrupt
        return result
    return broken


def test_a_run_broken_off_anywhere_ends_as_one_that_was_not(cli, tmp_path, monkeypatch):
    """Broken off in a step, at a log's row, at a checkpoint, its writing or renaming: three times a run."""
    monkeypatch.setattr(data, "run_episode", lambda task, seed, policy, episode:  # quick, of the weights
                        float(policy(np.ones(4), None)[0]))
    writer, run = csv.DictWriter, srpo.Run
    places = [(srpo, "adam"), (writer, "writeheader"), (run, "submit"), (writer, "writerows"), (run, "save"),
              (os, "fsync"), (torch, "save"), (os, "replace")]
    rng, unbroken = np.random.default_rng(0), 0
    runs = [[(place, rng.integers(1, 9)) for place in rng.permutation(8)[:3]] for _ in range(4)]
    runs.append([(3, 1), (4, 1)])  # with scores that no checkpoint knows, then before they came anew
    cli(SURVIVES + "whole")
    for out, breaks_of_run in enumerate(runs):
        for place, calls in breaks_of_run:
            owner, name = places[place]
            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
                patch.setattr(owner, name, breaks(getattr(owner, name), calls))
                cli(SURVIVES + str(out))
                unbroken += 1
        cli(SURVIVES + str(out))
        assert_same_run(tmp_path / str(out) / data.DEMO, tmp_path / "whole" / data.DEMO)
    assert unbroken <= 7  # of 14


@LONG
def test_a_hundred_kills_change_nothing(demo_data, tmp_path):
    """SIGKILL at random moments of real processes, until at least a hundred have hit."""
    environment = {**os.environ, "D4RL_DATASET_DIR": str(demo_data), "OMP_NUM_THREADS": "1"}
    longer = "--behavior-steps 30 --policy-steps 30".split()

    def finishes(out, timeout=None):
        command = [sys.executable, "srpo.py", *SURVIVES.split(), tmp_path / out, *longer]
        try:
            subprocess.run(command, timeout=timeout, env=environment, cwd=Path(srpo.__file__).parent,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
        except subprocess.TimeoutExpired:  # run() has killed it
            return False
        return True
    begin = time.monotonic()
    finishes("whole")
    whole, kills, rng = time.monotonic() - begin, 0, np.random.default_rng(0)
    while kills < 100:
        out = f"from-{kills}"
        while not finishes(out, whole * rng.uniform(0.2, 1)):
            kills += 1
        assert_same_run(tmp_path / out / data.DEMO, tmp_path / "whole" / data.DEMO)


def test_a_signal_saves_and_the_same_command_goes_on(cli, tmp_path, folder, monkeypatch):
    train, step, signals = TRAIN + "--seeds 0 ", srpo.Behavior.step, iter([signal.SIGTERM])

    def stopped(stage):
        step(stage)
        for number in signals:
            os.kill(os.getpid(), number)
    cli(train + "--out whole")
    monkeypatch.setattr(srpo.Behavior, "step", stopped)
    with pytest.raises(SystemExit) as end:
        cli(train)
    assert end.value.code == 143 and srpo.load_tensors(folder / "checkpoint.pt")["count"] == 1
    assert "another gamma" in cli(train + "--gamma 0.5", 2)
    (folder / "log.csv").write_text("spoiled")  # the checkpoint has its rows
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        assert "another torch" in cli(train, 2)
    cli(train)
    assert tables(folder) == tables(tmp_path / "whole" / data.DEMO)
    cli(train + "--also bc")  # a policy more, and no policy less
    cli(train)
    assert srpo.read_config(folder)["settings"]["also"] == ["bc"]


def test_two_processes_never_share_a_folder(cli, folder):
    folder.mkdir(parents=True)
    (folder / ".holder").write_text("process 1 on mars")
    with filelock.FileLock(folder / ".lock"):
        assert "in use by process 1 on mars" in cli(TRAIN, 2)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")
    path = tmp_path / "checkpoint.pt"
    srpo.write_atomically(path, b"good")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(data.UserError, match="No space left.*intact"):
        srpo.write_atomically(path, b"half")
    assert path.read_bytes() == b"good" and [*tmp_path.iterdir()] == [path]


FAKE_PYTHON = """#!/bin/bash
[ "$1" = srpo.py ] || exit 0
echo "$3 $CUDA_VISIBLE_DEVICES" >>log
case $3 in
    hopper-medium-v2) kill -KILL $$;;  # the training dies
    hopper-medium-expert-v2) kill -KILL $PPID;;  # the worker dies
    antmaze*) touch started; exec sleep 9;;
esac
sleep 0.3
"""


@pytest.fixture
def run_all(tmp_path):
    """Starts run_all.sh on two GPUs, with a stand-in for Python."""
    shutil.copy(Path(srpo.__file__).with_name("run_all.sh"), tmp_path)
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    environment = {**os.environ, "PYTHON": "./python", "GPUS": "3 5"}
    return lambda *tasks: subprocess.Popen(["bash", "run_all.sh", *tasks], env=environment, cwd=tmp_path,
                                           stderr=subprocess.PIPE, text=True)


def test_run_all_gives_each_gpu_a_task_and_outlives_what_dies(run_all, tmp_path):
    tasks = ["hopper-medium-v2", "hopper-medium-expert-v2", *data.TASKS[6:9]]
    process = run_all(*tasks)
    lines = process.communicate(timeout=30)[1].splitlines()
    done = dict(line.split() for line in (tmp_path / "log").read_text().splitlines())
    assert process.returncode == 1 and sorted(done) == sorted(tasks) and {*done.values()} == {"3", "5"}
    failed = [line for line in lines if line.startswith("run_all:")]
    assert len(failed) == 2 and "hopper-medium-v2 failed (137)" in failed[0] and "worker died" in failed[1]


def test_run_all_stops_every_training_at_a_signal(run_all, tmp_path):
    process = run_all("antmaze-umaze-v2", *data.TASKS[:3])
    while not (tmp_path / "started").exists():
        assert process.poll() is None
    process.terminate()
    assert "the same command goes on" in process.communicate(timeout=5)[1] and process.returncode == 143


# -------------------------------------------------------------------- the step, compiled and as a CUDA graph

@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
@pytest.mark.parametrize("name", [
    "critic", *(pytest.param(name, marks=LONG) for name in ("behavior", "policy", "iql"))])
def test_a_compiled_step_is_the_eager_one(name, monkeypatch):
    eager, compiled = (build(name, [0, 1], critic_batch=1001) for _ in range(2))
    if name != "critic":  # which draws whole numbers only: others differ compiled in float32's last digit
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **how: f if "draw" in str(f) else compile(f, **how))
    assert compiled.compile(required=True) == 1
    take(1, eager)
    for _ in range(4):
        assert torch.equal(compiled.fast[0](compiled.groups[1])[0], eager.draw(eager.groups[1])[0])
        take(1, eager, compiled)
    for key in eager.kept:
        near(compiled.state[key], eager.state[key], 1e-9)


def test_without_a_compiler_a_step_stays_eager_unless_told_to_compile(monkeypatch):
    def fails(*arguments):
        raise torch._dynamo.exc.TorchDynamoException("no g++")
    eager, stage = build("critic", [0]), build("critic", [0])
    monkeypatch.setattr(torch, "compile", lambda *_, **options: fails)
    with pytest.raises(data.UserError, match="^--compile cannot work here .*no g"):
        stage.compile(required=True)
    stage.count.zero_()
    assert stage.compile(required=False) == 1
    take(2, eager)
    take(1, stage)
    near(stage.state["theta"], eager.state["theta"], 0)


@STAGES
def test_a_step_reads_nothing_to_the_host_and_keeps_every_address(name):
    stage = build(name, [0, 1])
    stage.groups = [stage.state]

    def fixed():
        return ({key: x.data_ptr() for key, x in stage.state.items()},
                {key: x for key, x in vars(stage).items() if isinstance(x, (int, float))})
    before = fixed()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stage.step()
    calls = {event.name for event in profile.events()}
    assert len(calls) > 20 and not {"aten::_local_scalar_dense", "aten::nonzero"} & calls
    assert fixed() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: eager steps against replayed")
@pytest.mark.parametrize("compiled", [False, True])
@STAGES
def test_replayed_cuda_graphs_take_the_eager_steps(name, compiled):
    plain, graphs = (build(name, [0, 1], ROWS.cuda()) for _ in range(2))
    plain.groups, graphs.groups, taken = [plain.state], [graphs.state], 0
    if compiled:
        torch._dynamo.reset()
        taken = plain.compile(required=True) and graphs.compile(required=True)
    while taken < 4 + 2 * srpo.GRAPH_STEPS:
        taken += graphs.advance(10**6)
    take(taken - compiled, plain)
    assert int(plain.count) == int(graphs.count) == taken
    for key in plain.kept:
        near(graphs.state[key], plain.state[key], 0)


# ------------------------------------------------------------------------------------------------ the report

def hand_made_run(folder, kind="D4RL", step=1_000_000, scores=("90", "94", "98", "102"), **settings):
    """A folder as training leaves it: two episodes of seed 0, two of seed 1."""
    folder.mkdir(parents=True)
    given = {**vars(Settings().resolve(folder.name)), **settings}
    facts = {"kind": kind, "sha256": "", "data_score": 50.0}
    text = json.dumps({"task": folder.name, "seeds": [0, 1], "settings": given, "data": facts})
    (folder / "config.json").write_text(text)
    rows = [f"srpo,{step},{i // 2},{given['beta'][0]},{i % 2},0,{score}" for i, score in enumerate(scores)]
    (folder / "scores.csv").write_text("\n".join([",".join(srpo.SCORES), *rows, ""]))


def test_report_compares_final_scores_on_d4rls_data_and_lists_what_it_cannot_use(tmp_path, capsys):
    hand_made_run(tmp_path / HOPPER)  # 92 and 100 are the seeds' means, 95.5 is the paper's
    hand_made_run(tmp_path / "walker2d-medium-v2", kind="stand-in")
    hand_made_run(tmp_path / "walker2d-medium-expert-v2", step=50_000)
    hand_made_run(tmp_path / "no-baseline" / HOPPER, baseline=False)
    hand_made_run(tmp_path / "hopper-medium-replay-v2", scores=("1", "1O", "2", "3"))
    (tmp_path / "photos").mkdir()
    figures.report(tmp_path)
    lines = [line.split(" | ") for line in (tmp_path / "report.md").read_text().splitlines()]
    rows = {line[0][2:]: line[10:] for line in lines if len(line) == 14}  # Table 1
    assert rows[HOPPER][:3] == ["96.0 ± 4.0", "2 × 2", "+0.5 [-3.5, +4.5]"]
    assert rows["walker2d-medium-v2"][:3] == ["96.0 ± 4.0 (stand-in data)", "2 × 2", ""]
    assert rows["walker2d-medium-expert-v2"][0] == "unfinished"
    assert rows["hopper-medium-replay-v2"][0] == "damaged"
    assert rows["antmaze-umaze-v2"][0] == "not run"
    assert rows["average, locomotion"][0] == "incomplete (1 of 9)"
    assert rows["interquartile mean of all runs"][0] == "96.0 [92.0, 100.0]"
    told = capsys.readouterr().out
    assert all(word in told for word in ("no-baseline/hopper", "baseline False", "does not exist", "'1O'"))


def test_interquartile_mean_leaves_out_a_quarter_at_either_end():
    assert figures.interquartile_mean([np.array([0.0, 100, 5]), np.array([4.0, 6, 7, 900, -9])]) == 5.5
