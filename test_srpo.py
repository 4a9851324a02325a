"""Every equation of SRPO on analytic Gaussians, then Algorithm 1 beside plain PyTorch.

The reference is always something else than the code: a closed form, an exact value, torch.distributions,
autograd of the objective, torch.optim. ρ = σ²/α²: KL[π_t‖μ_t] is that of π and μ, both widened by N(0, ρ I).
"""
import contextlib
import csv
import fcntl
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent import futures
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import filelock
import h5py
import hypothesis
import numpy as np
import pytest
import requests
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal, kl_divergence
from torch.nn import functional as F

import data
import figures
import models
import mujoco210
import srpo
from diffusion import alpha_sigma, behavior_loss, diffuse, drift_diffusion, log_likelihood, sample, score
from models import Draw, NoiseModel, Policy, Value, fresh
from srpo import Settings, adam, policy_loss, q_loss, surrogate_gradient, value_loss

torch.set_num_threads(1)
F32, F64 = torch.float32, torch.float64
SHAPES = pytest.mark.parametrize("seeds", [(), (1,), (6,)], ids=["no_seed_axis", "one_seed", "six_seeds"])
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
    """The behavior Σ_k w_k N(m_k, S_k) diffused exactly, with ε* = −σ ∇ log μ_t by autograd."""

    def __init__(self, w, m, S):
        self.w, self.m, self.S = tensor(w), tensor(m), tensor(S)

    def density(self, t):
        alpha, sigma, _ = (x[..., None, None] for x in scales(t))
        C = alpha[..., None]**2 * self.S + sigma[..., None]**2 * torch.eye(self.m.shape[-1])
        w = Categorical(self.w.expand(*t.shape, -1))
        return MixtureSameFamily(w, MultivariateNormal(alpha * self.m, C))

    def noise_model(self, a_t, s, t):
        with torch.enable_grad():
            a_t = a_t if a_t.requires_grad else a_t.clone().requires_grad_()
            slope, = torch.autograd.grad(self.density(t).log_prob(a_t).sum(), a_t, create_graph=True)
        return -scales(t)[1].unsqueeze(-1) * slope


WIDE = Mixture([1.0], [[0.3, -0.5, 0.2]], [[[0.30, 0.12, 0.00], [0.12, 0.20, -0.05], [0.00, -0.05, 0.08]]])
LINE = Mixture([0.3, 0.7], [[-1.0], [0.8]], [[[0.05]], [[0.1]]])  # in one dimension
TWO_MODES = Mixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.05]], [[0.05]]])


def gaussian(m, width):
    """ε* of N(m, width²) in each dimension; m(s), or a number or tensor; width may carry seed axes."""
    def noise_model(a_t, s, t):
        alpha, sigma, _ = scales(t.unsqueeze(-1))
        return sigma * (a_t - alpha * (m(s) if callable(m) else m)) / (alpha**2 * width**2 + sigma**2)
    return noise_model


def descent(noise_model, a, weighting="sigma2", t=None, noises=2, **more):
    """Mean and mean square of −∂L_sur/∂a, which is ω (ε̂ − ε) if Q = 0, of actions [..., d].

    By quadrature over ε and t ~ U(0.02, 0.98), or at one t. Two nodes, ε = ±1, are exact for a Gaussian
    behavior, whose ε* is affine in ε; a mixture wants 64.
    """
    (u, v), (x, w) = np.polynomial.legendre.leggauss(32), np.polynomial.hermite_e.hermegauss(noises)
    t, v = (0.5 + 0.48 * u, v / 2) if t is None else ([t], [1.0])
    (t, x), weights = np.meshgrid(t, x, indexing="ij"), tensor(np.outer(v, w / w.sum()).ravel())
    a = a.detach().unsqueeze(-2).expand(*a.shape[:-1], t.size, -1)
    t, noise = tensor(t.ravel()).expand(a.shape[:-1]), tensor(x.reshape(-1, 1)).expand_as(a)
    more = {"q": lambda s, a: 0 * a.sum(-1), "beta": 1, "weighting": weighting, **more}
    rows = -surrogate_gradient(noise_model=noise_model, s=None, a=a, t=t, noise=noise, **more)
    return weights @ rows, weights @ rows**2


# ------------------------------------------- Eq. 4: a_t = α a + σ ε, log α = −4.975 t² − 0.05 t, α² + σ² = 1

@pytest.mark.parametrize("dtype, sigma_tolerance, alpha_tolerance",
                         [(F64, 1e-12, 1e-12), (F32, 5e-7, 1.5e-6)])  # |log α| = 5 amplifies α's rounding
def test_eq4_scales_have_all_their_digits(dtype, sigma_tolerance, alpha_tolerance):
    t, alpha, sigma = tensor([
        [1e-7, 0.9999999949999502, 1.0000049724875924e-4],  # where sqrt(1 − α²) is 0 in float32
        [1e-3, 0.99994502651109762, 0.010485416335094896], [0.02, 0.99701446559817840, 0.077214994579930771],
        [0.5, 0.28118288079675238, 0.95965420206803625], [0.98, 0.0080105969106339601, 0.99996791465383295],
        [1, 0.0065715864949296150, 0.99997840689233868]]).T
    ours = alpha_sigma(t.to(dtype))
    near(ours[0] / alpha, 1, alpha_tolerance)
    near(ours[1] / sigma, 1, sigma_tolerance)


# ------------------- Eq. 6: ∇ log μ_t(a_t) = −ε* / σ_t; Eq. 7: da_t/dt = f a_t + g²/(2σ) ε* keeps quantiles

@SHAPES
def test_eq6_score_is_the_gradient_of_the_log_density(seeds):
    t = tensor([1e-3, 0.02, 0.3, 0.98]).expand(*seeds, 4)
    a_t = torch.randn(*seeds, 4, 1, dtype=F64).requires_grad_()
    normal = Mixture([1.0], [[0.4]], [[[0.09]]])
    for behavior, noise_model in (normal, gaussian(0.4, 0.3)), (LINE, LINE.noise_model):
        reference, = torch.autograd.grad(behavior.density(t).log_prob(a_t).sum(), a_t)
        near(score(noise_model, a_t, None, t), reference, rtol=1e-11)


def test_eq7_drift_and_diffusion_belong_to_the_schedule():
    t = torch.linspace(1e-3, 1, 9, dtype=F64).requires_grad_()
    f, growth = (torch.autograd.grad(x.sum(), t)[0] for x in (scales(t)[0].log(), scales(t)[1]**2))
    near(drift_diffusion(t)[0], f)
    near(drift_diffusion(t)[1], growth - 2 * f * scales(t)[1]**2)


@pytest.mark.parametrize("behavior, shape", [(WIDE, (6, 4, 3)), (LINE, (9, 1))], ids=["affine", "quantile"])
def test_eq7_carries_a_gaussian_by_its_affine_map_and_a_mixture_by_its_quantile_map(behavior, shape):
    def quantiles(t, a_t):  # along each axis of S
        (alpha, sigma, _), (variances, axes) = scales(tensor(t)), torch.linalg.eigh(behavior.S)
        z = torch.einsum("...kd,kde->...ke", a_t.unsqueeze(-2) - alpha * behavior.m, axes)
        return behavior.w @ Normal(0, (alpha**2 * variances + sigma**2).sqrt()).cdf(z)

    a_1, errors = torch.randn(shape, dtype=F64), []
    for steps in (100, 200, 400):
        with torch.no_grad():
            a_0 = sample(behavior.noise_model, None, a_1, steps)
        errors.append((quantiles(0.0, a_0) - quantiles(1.0, a_1)).abs().max())
    assert errors[2] < 3e-4 and all(3 < x / y < 5 for x, y in zip(errors, errors[1:]))  # of second order
    at_1 = behavior.density(tensor(1.0)).log_prob  # N(0, I) would be off by α₁ m·a₁, up to 2e-2
    exact = behavior.density(tensor(0.0)).log_prob(a_0)
    near(log_likelihood(behavior.noise_model, None, a_0, 100, at_1), exact, 1e-4)
    standard = gaussian(0, 1)  # which stands still, and is the end if not told
    near(log_likelihood(standard, None, a_1, 2), Normal(0, 1).log_prob(a_1).sum(-1))


# -------- Eq. 11: V = argmin E L₂^τ(min Q − V): Σ w_i (Q_i − V) = 0, w = τ or 1 − τ; Eq. 12: Q = r + γ V(s′)

@SHAPES
@pytest.mark.parametrize("tau, exact_v, exact_q, least", [
    (0.7, [78510 / 31393, 99700 / 31393], [3.144108559, 1, 3.475867232, 2.475867232], 0.2938530795),
    (0.9, [90190 / 11791, 99900 / 11791], [8.387838182, 1, 8.572563820, 7.572563820], 1.2505534425)])
def test_eq11_and_eq12_solve_a_two_state_chain(tau, exact_v, exact_q, least, seeds):
    """A: r = 0 to B, or r = 1 and the end. B: r = 1 to A, or r = 0 to A at a time limit: not the end."""
    rows = tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 0, 0]])
    s, s_next, r, terminal = (row.expand(*seeds, 4) for row in rows)
    v = tensor(exact_v).expand(*seeds, 2).requires_grad_()
    larger = tensor([[0, 2, 0, 2], [2, 0, 2, 0]])  # one of the twins, which Eq. 11 does not see
    q = (tensor(exact_q) + larger).expand(*seeds, 2, 4).requires_grad_()
    value, twins = lambda s: v.gather(-1, s.long()), lambda s, a: q
    losses = value_loss(value, twins, s, 0, tau), q_loss(twins, value, s, 0, r, s_next, terminal, 0.99)
    slopes = [torch.autograd.grad(loss.sum(), (v, q), allow_unused=True) for loss in losses]
    assert slopes[0][1] is None and slopes[1][0] is None and losses[0].shape == losses[1].shape == seeds
    near(losses[0], least, 1e-8)
    near(slopes[0][0], 0, 1e-8)
    near(slopes[1][1], larger / 4, 1e-8)  # of the mean of eight squares


# ------- Eq. 13: ε* = argmin E ‖ε_ψ(a_t | s, t) − ε‖², for a Gaussian affine; its minimum d − σ² tr C⁻¹

@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_eq13_regression_recovers_the_exact_noise_model(t):
    m, width, (alpha, sigma, _) = tensor([0.2, -0.5]), tensor([0.3, 0.6]), scales(tensor(t))
    a = m + width * tensor([[1], [1], [-1], [-1]])  # with noise ±1: all the moments that matter
    s, t, noise = m.expand(4, 2), tensor(t).expand(4), tensor([[1], [-1], [1], [-1]]).expand(4, 2)
    p, exact = tensor([[1, 1], [0, 0]]).requires_grad_(), gaussian(lambda s: s, width)
    loss = behavior_loss(lambda a_t, s, t: p[0] * exact(a_t, s, t) + p[1], s, a, t, noise)
    near(loss, (1 - sigma**2 / (alpha**2 * width**2 + sigma**2)).sum())
    near(torch.autograd.grad(loss, p)[0], 0)  # and the loss is convex


# ------------------- Eq. 14: E Q − (1/β) E_t ω (σ/α) KL[π_t‖μ_t]; Eq. 15: its gradient ∇Q − (1/β) ω (ε* − ε)

@SHAPES
@pytest.mark.parametrize("weighting", ["sigma2", "one", "alpha_over_sigma"])
@pytest.mark.parametrize("t", [0.02, 0.1, 0.3, 0.6, 0.98])
def test_eq15_is_the_gradient_of_eq14(weighting, seeds, t):
    a, beta = torch.randn(*seeds, 3, dtype=F64).requires_grad_(), 0.5 + torch.rand(seeds, dtype=F64)
    (alpha, sigma, rho), q = scales(tensor(t)), lambda s, a: -(a**2).sum(-1)
    S = rho * torch.eye(3, dtype=F64)
    kl = kl_divergence(MultivariateNormal(a, S), MultivariateNormal(WIDE.m[0], WIDE.S[0] + S))
    omega = {"sigma2": sigma**2, "one": 1, "alpha_over_sigma": alpha / sigma}[weighting]
    reference, = torch.autograd.grad((q(None, a) - omega * sigma / alpha * kl / beta).sum(), a)
    ours, _ = descent(WIDE.noise_model, a, weighting, t, beta=beta[..., None, None], q=q)
    near(-ours, reference, 1e-9)
    assert not ours.requires_grad


@pytest.mark.parametrize("weighting, exact", [  # by adaptive quadrature of the objective's slope
    ("sigma2", [-0.1623061776, -0.0332500069, 0.0097880174]),
    ("one", [-0.2236458492, -0.1233680226, -0.0452754149]),
    ("alpha_over_sigma", [-0.0869567932, -0.4133607569, -0.2659585357])])
def test_eq15_is_the_gradient_of_eq14_for_a_mixture(weighting, exact):
    ours, _ = descent(LINE.noise_model, tensor([[-0.9], [0.1], [0.4]]), weighting, noises=64)
    near(ours[:, 0], exact, 1e-7)  # 64 nodes by 32: good to 6e-8


def test_eq10_is_the_limit_of_eq15_at_the_rate_rho():
    a, solve = torch.randn(4, 3, dtype=F64), partial(torch.linalg.solve, WIDE.S[0], left=False)
    limit = solve(a - WIDE.m[0])  # −∇ log μ
    for t in (1e-3, 1e-4, 1e-5):
        rho, (ours, _) = scales(tensor(t))[2], descent(WIDE.noise_model, a, "alpha_over_sigma", t)
        near((limit - ours) / rho, solve(limit), 0.02, rtol=float(50 * rho))


# ------------------- Baseline: E ω ε = 0; Var ω ε* = ω² c², Var ω (ε* − ε) = ω² (1 − c)², c = ρ/(ρ + width²)

@pytest.mark.parametrize("weighting, width, off, on", [  # averages over t; of width 0, a Dirac: no noise left
    ("sigma2", 0, 0.647654, 0), ("sigma2", 0.1, 0.645987, 1.43509e-5), ("sigma2", 1, 0.567521, 0.0153333),
    ("one", 1, 0.647654, 0.181072), ("alpha_over_sigma", 0.1, 1.92131, 0.534492),
    ("alpha_over_sigma", 1, 0.0856368, 3.37887)])
def test_baseline_cuts_the_variance_save_for_wide_data_and_alpha_over_sigma(weighting, width, off, on):
    a, model = tensor([[0.4], [0.9]]), gaussian(0.4, width)
    without, with_it = (descent(model, a, weighting, baseline=baseline) for baseline in (False, True))
    near(with_it[0], without[0])
    near(without[1][0], off, rtol=1e-5)
    near(with_it[1][0], on, 1e-25, rtol=1e-5)


def test_baseline_in_one_sample_has_its_sign():
    row = gaussian(0.2, 0.3), None, tensor([[0.5]]), tensor([0.3]), tensor([[1.2]]), 0.1
    for baseline, exact in (True, 0.0981377127), (False, 0.8225378692):
        near(surrogate_gradient(lambda s, a: 2 * a.sum(-1), *row, baseline=baseline), 2 - 10 * exact, 1e-8)


# ------------------------------- β_norm = β / ‖∇Q‖₂ (paper), or ∇Q over its root mean square (released code)

@pytest.mark.parametrize("d", [1, 3, 8])
def test_grad_norm_takes_the_norm_of_each_row_alone(d):
    c = torch.randn(4, d) * torch.tensor([[1e-6], [10.0], [0.0], [1e-30]])  # ∇Q; 1e-60 is 0 in float32
    (a, noise), t = torch.randn(2, 4, d), torch.tensor([0.02, 0.3, 0.5, 0.7])
    row = gaussian(0.2, 0.3), None, a, t, noise, 0.05
    ours = partial(surrogate_gradient, lambda s, a: (c * a).sum(-1), *row)
    norm, pull = c.double().norm(dim=-1, keepdim=True), ours() - c
    near(ours(grad_norm="paper"), c + norm * pull, 1e-5, rtol=1e-5)  # ∇Q = 0: no update at all ...
    unit = c / norm.clamp(min=1e-20)
    near(ours(grad_norm="released"), math.sqrt(d) * unit + pull, 1e-5, rtol=1e-5)  # ... or towards the data
    with pytest.raises(ValueError, match="papre"):
        ours(grad_norm="papre")


# --------------- Prop. 1: KL[π_t‖μ_t] = 0 only for π = μ. Remark 1: yet a Dirac actor's optimum moves with t

@pytest.mark.parametrize("t", [0.02, 0.3, 0.98])
def test_prop1_diffusion_can_be_divided_out_of_the_characteristic_function(t):
    (x, w), u = map(tensor, np.polynomial.hermite_e.hermegauss(64)), torch.linspace(-3, 3, 7, dtype=F64)
    a, share, (alpha, sigma, _) = tensor([-0.7, 0.1, 0.9]), tensor([0.2, 0.3, 0.5]), scales(tensor(t))
    a_t = diffuse(a.view(3, 1, 1), tensor(t).expand(3, 64), x.view(64, 1)) * u  # [3, 64, 7]
    phi_t = torch.einsum("i,j,iju->u", share, w / w.sum(), torch.cos(a_t))
    phi = share @ torch.cos(alpha * a[:, None] * u)
    near(phi_t * torch.exp(sigma**2 * u**2 / 2), phi)  # so μ_t determines μ


@pytest.mark.parametrize("t, weighting, minimum", [
    (0.05, "one", 1), (0.15, "one", 0.846198), (0.22, "one", 0),
    (None, "alpha_over_sigma", 0.903916), (None, "one", 0.559101), (None, "sigma2", 0)])
def test_remark1_two_modes_within_the_action_range_merge_at_large_t_and_under_sigma2(t, weighting, minimum):
    a = torch.cat([torch.linspace(1e-3, minimum - 1e-3, 8), torch.linspace(minimum + 1e-3, 1.2, 8)]).double()
    pull, _ = descent(TWO_MODES.noise_model, a[:, None], weighting, t, noises=64)
    near(pull[:, 0].sign(), (a - minimum).sign())  # of the modes at ±1, the actor ends at ±minimum


# -------- End to end: Q = c·a: a* = m + β κ⁻¹ c; Q = −‖a − q‖²: (2 + κ/β)⁻¹ (2 q + κ m/β); κ = E_t ω σ α C⁻¹

@pytest.mark.parametrize("weighting, kappa", [  # for behavior widths 0.1, 0.3 and 1
    ("sigma2", [0.23005677997, 0.20755223521, 0.14106803464]),
    ("one", [0.78942247191, 0.51975447615, 0.23565043689]),
    ("alpha_over_sigma", [2.60673722974, 1.11124206309, 0.26670914475])])
def test_adam_on_eq15_reaches_the_optimum(weighting, kappa):
    behavior, kappa = gaussian(0.2, tensor([0.1, 0.3, 1.0] * 2).view(6, 1, 1)), tensor(kappa)
    theta, m, v = torch.zeros(3, 6, 1, dtype=F64)  # six actors: three widths, two Q
    for k in range(400):
        slope, _ = descent(behavior, theta, weighting, beta=0.1, q=lambda s, a: torch.cat(
            [a[:3], -(a[3:] - 1.5)**2]).sum(-1))
        a = theta.clone().requires_grad_()
        slope, = torch.autograd.grad(policy_loss(a.unsqueeze(1), -slope.unsqueeze(1)).sum(), a)
        adam(theta, slope, m, v, tensor(k + 1.0), 0.05 * (1 + math.cos(math.pi * k / 400)), 0)
    near(theta[:, 0], torch.cat([0.2 + 0.1 / kappa, (3 + 2 * kappa) / (2 + 10 * kappa)]), 1e-6)


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


def chain(weights, *inputs, activation=torch.relu):
    """Linear, activation, ..., Linear; leading axes side by side."""
    x, (*hidden, w, b) = torch.cat(inputs, -1), weights
    for i in range(0, len(hidden), 2):
        x = activation(x @ hidden[i].mT + hidden[i + 1].unsqueeze(-2))
    return x @ w.mT + b.unsqueeze(-2)


def perceptron(layout, flat):
    return lambda *inputs: chain(layout.tensors(flat).values(), *inputs).squeeze(-1)


def residual_network(p, a_t, s, t, keep=(1, 1), dropout=0.0):
    """ε_ψ with the weights p: two blocks x + MLP(LayerNorm(dropout(x)))."""
    def layers(name, *inputs):
        return chain([x for key, x in p.items() if key.startswith(name)], *inputs, activation=F.mish)
    phase = 2 * math.pi * t[:, None] * p["frequencies"]
    x = layers("input", a_t, s, layers("time", phase.sin(), phase.cos()))
    for i in range(2):
        y = F.layer_norm(keep[i] * x / (1 - dropout), x.shape[1:])
        y = y * p[f"blocks.{i}.norm.weight"] + p[f"blocks.{i}.norm.bias"]
        x = x + layers((f"blocks.{i}.up", f"blocks.{i}.down"), y)
    return layers("output", F.mish(x))


@pytest.mark.parametrize("name, layers, options", [
    ("critic", 2, {}), ("behavior", 2, {}), ("iql", 2, {}), ("bc", 2, {}), ("policy", 2, {}),
    ("policy", 4, {"grad_norm": "released"}), ("policy", 2, {"weighting": "one", "baseline": False})])
def test_a_stage_is_a_plain_loop_of_torch_optim(name, layers, options):
    """Eight steps with the same rows and noise have the same losses and end at the same weights."""
    stage, draws, losses = build(name, [7], beta=(0.5,), policy_layers=layers, **options), [], 0
    loss_of, first = stage.loss, {key: x[0].clone() for key, x in stage.state.items()}
    stage.loss = lambda theta, state, *inputs: draws.append(inputs) or loss_of(theta, state, *inputs)
    take(8, stage)
    theta = first["theta"].clone().requires_grad_()
    optimizer = torch.optim.AdamW([theta], lr=1e-2, weight_decay=0.1 if name == "behavior" else 0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    critic, behavior = (build(kind, [7]).state["theta"][0] for kind in ("critic", "behavior"))
    trained, size = theta if name == "critic" else critic, sum(stage.q.sizes)
    target = critic[-size:] * (1 if name == "critic" else -3)  # as build has it
    value, q, q_target = (perceptron(*pair) for pair in (
        (stage.value, trained[:-size]), (stage.q, trained[-size:]), (stage.q, target)))
    psi = partial(residual_network, stage.noise_model.tensors(behavior))  # without dropout
    for rows, *noise in draws:
        s, a, s_next, r, terminal = rows[:, :3], rows[:, 3:5], rows[:, 5:8], rows[:, 8], rows[:, 9]
        if name == "critic":
            loss = value_loss(value, q_target, s, a, 0.7), q_loss(q, value, s, a, r, s_next, terminal, 0.99)
        elif name == "behavior":
            weights = stage.noise_model.tensors(theta)
            dropped_out = partial(residual_network, weights, keep=noise[2], dropout=0.25)
            loss = behavior_loss(dropped_out, s, a, *noise[:2]),
        else:
            pi = perceptron(stage.policy, theta)(s).tanh()
        if name == "policy":
            t, noise = noise
            ascent = surrogate_gradient(
                lambda s, a: q_target(s, a).mean(0), psi, s, pi, t, noise, 0.5, **options)
            loss = -(ascent * pi).sum(1).mean(),
        if name in ("iql", "bc"):
            advantage = q_target(s, a).min(0).values - value(s)
            weight = (3 * advantage).exp().clamp(max=100) if name == "iql" else 1
            loss = (weight * ((pi - a)**2).sum(1)).mean(),
        optimizer.zero_grad()
        sum(loss).backward()
        optimizer.step()
        losses = losses + tensor([x.item() for x in loss])
        if name == "critic":
            target.lerp_(theta.data[-size:], 0.3)
        elif name == "behavior":  # decay spares the frequencies, which aren't trained
            weights["frequencies"].data.copy_(stage.noise_model.tensors(behavior)["frequencies"])
        else:
            cosine.step()
    near(stage.state["theta"][0], theta, 1e-6)  # the step's number is float32
    near(stage.state["losses"][0], losses, 1e-5)
    watched, expected = stage.watch(stage.groups[0]), {}  # on the last step's batch, of the new weights
    if name == "critic":
        near(stage.state["target"][0], target, 1e-6)
        expected = {"q": q(s, a).mean(), "v": value(s).mean()}
    elif name != "behavior":
        pi = perceptron(stage.policy, theta)(s).tanh()
        expected = {"q": q_target(s, pi).mean(), "v": value(s).mean()}
    if name == "policy":
        slope, = torch.autograd.grad(len(s) * expected["q"], pi, retain_graph=True)
        gap = psi(diffuse(pi, t, noise), s, t) - noise
        expected |= {"grad_q": slope.norm(dim=1).mean(), "noise_gap": gap.norm(dim=1).mean()}
    for key in {*watched} | {*expected}:
        near(watched[key], expected[key], 1e-6)


@STAGES
@pytest.mark.parametrize("side_by_side", [False, True])
@pytest.mark.parametrize("spoil", [lambda x: 0 / x.detach(), lambda x: x.sqrt() - x], ids=["loss", "slope"])
def test_a_seed_trains_as_if_alone_even_if_one_stops_at_its_last_finite_weights(name, side_by_side, spoil):
    six, alone = build(name, [0, 1, 2, 3, 4, 5], beta=(0.3, 0.1)), build(name, [4], beta=(0.1,))
    stopped = build(name, [1], beta=(0.1,))
    six.groups, loss_of = [six.state] if side_by_side else six.groups, six.loss

    def loss(theta, state, *inputs):
        ill = ((state["seed"] == 1) & (six.count == 2)).double().unsqueeze(-1)
        spoiled = spoil(1 - ill + 0 * theta.sum(-1, keepdim=True))  # 0, but for the ill NaN or of slope NaN
        return loss_of(theta, state, *inputs) + F.pad(spoiled, (0, len(six.losses) - 1))
    six.loss = loss
    take(1, stopped)
    take(4, six, alone)
    assert six.members[-2] == alone.members[0]
    for key, x in six.state.items():
        near(x[-2], alone.state[key][0], 1e-9 if side_by_side else 0)  # sums in another order
    for key in {"theta", "target"} & {*six.state}:
        near(six.state[key][-5], stopped.state[key][0], 1e-9 if side_by_side else 0)
    assert six.state["alive"].tolist() == [seed != 1 for _, seed in six.members]
    assert all(six.state[key].isfinite().all() for key in "mv")


def test_extraction_reaches_the_optimum_of_states_it_has_not_seen():
    """A policy of two layers, a behavior N(0.4 s, 0.3²), twins of mean slope 1: a* = 0.4 s + β/κ."""
    table = torch.rand(500, 5, generator=torch.Generator().manual_seed(2)) * 2 - 1
    options = dict(beta=(0.1, 0.05), policy_steps=300, policy_batch=64, policy_width=32)
    stage = build("policy", [0], table, (1, 1), **options)
    stage.q = SimpleNamespace(bind=lambda flat: lambda s, a: torch.stack([3 * a, -a], -3).squeeze(-1))
    stage.noise_model = SimpleNamespace(bind=lambda flat: gaussian(lambda s: 0.4 * s, 0.3))
    take(300, stage)
    s = torch.linspace(-0.9, 0.9, 50, dtype=F64)[:, None]
    a = chain(stage.weights().values(), s).tanh()
    near(a, 0.4 * s + tensor([[[0.1]], [[0.05]]]) / 0.20755223521, 0.03)  # half of it is the networks' fit


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


def test_settings_and_networks_are_those_of_appendix_c_and_table_2():
    betas = [0.05, 0.06, 0.05, 0.08, 0.04, 0.02, 0.01, 0.2, 0.2, 0.01, 0.2, 0.05, 0.1, 0.5, 0.05]
    assert srpo.TABLE_2 == dict(zip(sorted(data.FILES), betas)) and len(data.FILES) == 15
    for task, beta in srpo.TABLE_2.items():
        given, maze = Settings().resolve(task), "antmaze" in task
        assert (given.tau, given.policy_layers, given.grad_norm, given.temperature, given.beta) == (
            (0.9, 4, "released", 10.0, (beta,)) if maze else (0.7, 2, "none", 3.0, (beta,)))
        sweep = Settings(beta=srpo.parse(["train", task, "--beta", "sweep"])["beta"]).resolve(task).beta
        assert sweep == ((0.01, 0.02, 0.03, 0.04, 0.05) if "umaze" in task else
                         (0.03, 0.04, 0.05, 0.06, 0.07, 0.08) if maze else (0.01, 0.02, 0.05, 0.1, 0.2, 0.5))
    ours = [getattr(given, f"{stage}_{what}") for stage in ("critic", "behavior", "policy")
            for what in ("steps", "batch", "lr")]
    assert ours == [1.5e6, 256, 3e-4, 2e6, 2048, 3e-4, 1e6, 256, 3e-4]
    assert (given.gamma, given.target_rate, given.dropout, given.behavior_decay) == (0.99, 0.005, 0.1, 0.01)
    assert (given.weighting, given.baseline) == ("sigma2", True)

    def dense(*sizes):
        return sum((i + 1) * o for i, o in zip(sizes, sizes[1:]))
    networks = Policy(11, 3), *(layout.network for layout in srpo.layouts(given, 11, 3).values())  # AntMaze's
    assert [sum(x.numel() for x in network.parameters()) for network in networks] == [
        dense(11, 256, 256, 3), dense(11, 256, 256, 1), 2 * dense(14, 256, 256, 1),
        dense(64, 128, 128) + dense(142, 256) + 3 * (512 + dense(256, 1024, 256)) + dense(256, 3),
        dense(11, 256, 256, 256, 256, 3)]


def test_fresh_weights_are_a_function_of_seed_and_purpose_alone():
    state = torch.get_rng_state()
    addresses = list(itertools.product((0, 1, 2, 3, 256), (1, 2, 3)))
    biases = [fresh([seed], purpose, lambda: Value(3))[0].bias for seed, purpose in addresses]
    assert len(torch.cat(biases).unique()) == 15 * 256 and torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    near(fresh([2, 3], 1, lambda: Value(3))[0].bias, torch.stack([biases[6], biases[9]])[:, 0], 0)
    assert len(models.TwinQ(3, 2).twins[0].bias.unique()) == 2 * 256  # else the twins stay one
    frequencies = fresh(range(100), 3, lambda: NoiseModel(1, 1, 8, 1)).frequencies  # of N(0, 30²)
    assert abs(frequencies.std() - 30) < 1.2 and abs(frequencies.mean()) < 1.6  # three errors


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

    index = draw().index(1, (N,), 10)
    assert far(draw().uniform(1, (N,)), lambda x: x) < 2 and far(draw().normal(2, (N,)), Normal(0, 1).cdf) < 2
    assert ((index.bincount() - N / 10)**2).sum() / (N / 10) < 30  # chi-squared of 9 degrees
    for dropout in (0.0, 0.1, 0.5):
        assert draw().keep(4, (N,), dropout).double().mean() == pytest.approx(1 - dropout, abs=0.005)
    extreme = draw()  # the least word, the middle and the largest
    extreme.bits = lambda purpose, shape: torch.tensor([0, -2**31, -1], dtype=torch.int32)
    near(extreme.uniform(1, (3,)), [2**-25, 0.5, 1], 0)
    near(extreme.index(1, (3,), 10), [0, 5, 9], 0)


def test_random_numbers_are_independent_across_seeds_steps_and_purposes():
    places = (3, 5), (4, 5), (3, 6), (5, 3), (3, 5, 16)  # seed, step, and the stage's base
    streams = [draw(*place).uniform(purpose, (N,)) for place in places for purpose in (1, 2, -2)]
    correlation = torch.corrcoef(torch.stack([*streams, streams[0].roll(1)])) - torch.eye(16)
    assert correlation.abs().max() < 5 / math.sqrt(N)
    words = draw(range(2**20)).bits(1, (2,)).numpy()  # if streams were shifts of one another, twice as many
    assert len(np.intersect1d(*words.T)) < 350  # words would be shared as the 256 by chance


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


# ----------------------------------------------------------------------------------------------- D4RL's data

def random_file(rows=40, s_dim=11, a_dim=3, seed=0):
    """Trajectories of 8 rows; every second ends at a time limit, the others at a terminal."""
    rng, step = np.random.default_rng(seed), np.arange(1, rows + 1)
    return {"observations": rng.normal(size=(rows, s_dim)), "actions": rng.uniform(-1, 1, (rows, a_dim)),
            "rewards": rng.normal(size=rows), "terminals": step % 16 == 8, "timeouts": step % 16 == 0}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write({key: array, link, function of the open file or None}): the task's file in an empty cache."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))

    def write(content, task=HOPPER, mark="stand_in"):
        with h5py.File(tmp_path / os.path.basename(url_of(task)), "w") as file:
            file.attrs[mark] = "test"
            for key, x in content.items():
                if x is not None:
                    file[key] = x(file) if callable(x) else x
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
    raw["terminals"][:40] = np.arange(40) == 19  # one just where the steps reach their limit
    raw = {key: value for key, value in raw.items() if key not in missing}
    reference = data.import_d4rl().qlearning_dataset(SimpleNamespace(_max_episode_steps=20),
                                                     {"terminals": np.zeros(1000, bool), **raw})
    raw["rewards"] = raw["rewards"].reshape(reward_shape)
    ours = data.qlearning_transitions(raw, 20)
    for mine, theirs in zip(("s", "a", "s_next", "r", "terminal"),
                            ("observations", "actions", "next_observations", "rewards", "terminals")):
        np.testing.assert_array_equal(ours[mine], reference[theirs])
        assert ours[mine].dtype == np.float32


def test_locomotion_rewards_are_scaled_by_the_range_of_whole_trajectories(write):
    raw, row = random_file(1703), np.arange(1703)
    raw["terminals"], raw["timeouts"] = np.isin(row, [499, 1702]), row == 1400
    raw["rewards"] = np.select([row == 1400, row == 1702], [50.0, 100.0], 1.0)
    raw["actions"][[2, 5], [0, 1]] = -1.0001, 3
    write(raw)
    dataset, columns, log = load()
    # Row 1400 (time limit) and the file's last row go: returns 500, 900, 301. The released code counts 1000
    # rows after a terminal, over the time limit: 500, 1000.
    np.testing.assert_allclose(columns["r"], 1000 / 599, rtol=1e-6)
    assert (dataset.info["reward_scale"], dataset.info["reward_scale_released_code"]) == (1000 / 599, 2.0)
    score = data.normalized_score(HOPPER, (500 * 500 + 901 * 950 + 302 * 401) / 1703)  # weighted by rows
    assert dataset.info["data_score"] == pytest.approx(score)
    assert (dataset.info["rows"], dataset.info["episodes"], dataset.info["kind"]) == (1701, 3, "stand-in")
    assert dataset.table.flags.c_contiguous and dataset.table.shape == (1701, 2 * 11 + 3 + 2)
    assert np.abs(columns["a"]).max() == 1 and "2 action components" in log  # clipped and counted
    assert "0.83472 times the reward scale of the released code" in log


def test_antmaze_rewards_are_less_one_and_its_score_counts_episodes(write):
    raw = random_file(s_dim=29, a_dim=8) | {"rewards": np.float32(np.isin(np.arange(40), [7, 20, 21]))}
    raw["terminals"], raw["timeouts"] = raw["rewards"] == 1, np.arange(40) % 10 == 9
    raw["observations"][:, :2] = 50 * (np.arange(40) < 8)[:, None]  # a reset after row 7, none after 20, 21
    write(raw, "antmaze-umaze-v2")
    dataset, columns, _ = load("antmaze-umaze-v2")
    assert set(columns["r"]) == {-1, 0} and (columns["r"] == 0).sum() == 3
    assert dataset.info["episodes"] == 5 and dataset.info["data_score"] == pytest.approx(40)


def bomb(file, rows=40, chunk=2**24, **how):
    """A chunk of which 1000 bytes are stored, 40 rows are said to be used and 700 MB would be unpacked."""
    dataset = file.create_dataset("x", (rows, 11), "f4", chunks=(chunk, 11), maxshape=(None, 11), **how)
    dataset.id.write_direct_chunk((0, 0), bytes(1000))
    return dataset


@pytest.mark.parametrize("content, words", [
    ({"observations": h5py.ExternalLink("/etc/passwd", "/x")}, "no plain array"),
    ({"rewards": h5py.SoftLink("/actions")}, "no plain array"),
    ({"observations": lambda file: file.create_virtual_dataset(
        "x", h5py.VirtualLayout((40, 11), "f4"))}, "no plain array"),
    ({"observations": lambda file: file.create_dataset(
        "x", (40, 11), "f4", external=[("/etc/passwd", 0, 40 * 44)])}, "no plain array"),
    ({"observations": lambda file: file.create_group("x")}, "no plain array"),
    ({"actions": lambda file: file.create_dataset("x", (40, 3), h5py.ref_dtype)}, "no plain array"),
    ({"rewards": np.full(40, b"1.0")}, "no plain array"),
    ({"rewards": np.ones(40, np.longdouble)}, "no plain array"),
    ({"actions": None}, "no plain array of numbers actions"),
    ({"rewards": np.ones(39)}, "shape (39,)"), ({"terminals": np.zeros((40, 2), bool)}, "shape (40, 2)"),
    ({"observations": np.zeros((40, 17))}, "shape (40, 17)"), ({"actions": 1.0}, "shape ()"),
    (random_file(rows=0), "0 rows"), (random_file(rows=1), "1 rows"),
    ({"observations": partial(bomb, rows=10**12, chunk=1)}, "1000000000000 rows"),
    ({"observations": partial(bomb, rows=10**6, chunk=1)}, "claims 44000000 bytes"),
    ({"observations": partial(bomb, compression="gzip")}, "claims 1760 bytes"),
    ({"observations": np.full((40, 11), np.nan)}, "NaN or infinite observations"),
    ({"observations": np.where(np.arange(440) < 439, 0, np.nan).reshape(40, 11)}, "NaN or infinite"),
    ({"observations": np.full((40, 11), 1e300)}, "NaN or infinite observations"),
    ({"actions": np.full((40, 3), np.inf)}, "NaN or infinite actions"),
    ({"rewards": np.full(40, -np.inf)}, "NaN or infinite rewards"),
    ({"rewards": np.full(40, 1e300)}, "NaN or infinite rewards"),
    ({"rewards": np.zeros(40)}, "equal return"), ({"timeouts": np.ones(40)}, "no whole trajectory"),
    ({"terminals": np.zeros(40), "timeouts": np.zeros(40)}, "no whole trajectory"),
    (lambda intact: intact[: len(intact) // 2], "truncated, damaged or not HDF5"),
    (lambda intact: intact[:96] + bytes(1000) + intact[1096:], "truncated, damaged or not HDF5"),
    (lambda intact: b"not HDF5", "truncated, damaged or not HDF5"),
    (lambda intact: b"", "truncated, damaged or not HDF5")])
def test_a_crafted_or_damaged_file_is_refused_with_the_command_that_removes_it(content, words, write):
    path = write(random_file() | (content if isinstance(content, dict) else {}))
    if callable(content):
        path.write_bytes(content(path.read_bytes()))
    line = refusal(any_data=True)
    assert words in line and f"rm {path}" in line


def test_a_file_of_unknown_origin_or_without_success_a_locked_one_and_a_folder_are_refused(write):
    path = write(random_file(), mark="generated")  # this word serves the demo's file only
    assert "--any-data" in refusal()
    assert load(any_data=True)[0].info["kind"] == "any"
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "locked by another process" in refusal(any_data=True)
    path = write(random_file(s_dim=29, a_dim=8), "antmaze-umaze-v2")
    assert "reward of 1" in refusal("antmaze-umaze-v2")
    path.unlink()
    path.mkdir()
    assert "not a file" in refusal("antmaze-umaze-v2")
    for task in ("", "..", "\n", "../" + HOPPER, HOPPER + "\0", "/etc/passwd", 10**6 * "x"):
        assert refusal(task).startswith("unknown task")


@pytest.mark.parametrize("replies, words", [
    ([requests.ConnectionError("x\ny"), 404], "server: ConnectionError, mirror: 404"),
    ([403, b"other bytes"], "server: 403, mirror: wrong SHA-256"),
    ([OSError(28, "No space left on device")], "No space left"),
    ([403, b"right bytes"], "truncated, damaged or not HDF5")])
def test_downloads_are_verified_and_fail_in_one_line(replies, words, tmp_path, monkeypatch):
    folder, name = tmp_path / "new", os.path.basename(url_of(HOPPER))
    answers = dict(zip([url_of(HOPPER), data.MIRROR + name], replies))

    def fetch(self, url, output_file, pooch, check_only=False):
        if isinstance(answers[url], int):
            raise requests.HTTPError(response=SimpleNamespace(status_code=answers[url]))
        if isinstance(answers[url], Exception):
            raise answers[url]
        Path(output_file).write_bytes(answers[url])
    monkeypatch.setitem(data.FILES, HOPPER, (11, hashlib.sha256(b"right bytes").hexdigest()))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(folder))
    monkeypatch.setattr("pooch.HTTPDownloader.__call__", fetch)
    line = refusal()
    assert words in line and str(folder / name) in line
    assert os.listdir(folder) == ([name] if "HDF5" in words else [])  # its bytes are kept if right


def test_maze2d_data_is_what_d4rls_script_makes_and_a_function_of_the_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    path = tmp_path / os.path.basename(url_of(data.DEMO))
    np.random.seed(7)  # of no effect
    data.generate_maze2d(path, rows=400)
    assert os.listdir(tmp_path) == [path.name]
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

def test_returns_are_functions_of_seed_and_episode_to_the_last_bit():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(8, 11)), rng.normal(size=(3, 8))
    network = data.NumpyPolicy([(weights[0], np.ones(8)), (weights[1], np.ones(3))])
    random = partial(data.random_policy, 3)
    policies = [(0, random), (1, random), (0, network)]
    expected = [[data.run_episode(HOPPER, *policy, episode) for episode in (2, 1, 0)][::-1]
                for policy in policies[::-1]][::-1]
    assert len(np.unique(expected)) == 9
    scores = 100 * (np.array(expected) + 20.272305) / (3234.3 + 20.272305)
    np.testing.assert_allclose(data.normalized_score(HOPPER, expected), scores, rtol=1e-12)
    with data.Workers(2) as evaluator:
        evaluations = [evaluator.roll_out(HOPPER, policies[first:], 3) for first in (0, 1)]
        np.testing.assert_array_equal(data.results(evaluations[1]), expected[1:])
        np.testing.assert_array_equal(data.results(evaluations[0]), expected)


def test_busy_workers_outlive_the_jobs_signals_and_end_with_their_evaluator():
    with data.Workers(1) as evaluator:
        busy = evaluator.submit(signal.pause)
        while not busy.running():  # else the worker would end for want of work
            pass
        worker, = evaluator.pool._processes.values()
        for number in data.SIGNALS:
            os.kill(worker.pid, number)
    deadline = time.monotonic() + 60
    while worker.exitcode is None and time.monotonic() < deadline:
        worker.join(1)  # ends at once, and the code is missing for a moment, if the pool's thread was faster
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "MUJOCO_GL": "none such", "D4RL_DATASET_DIR": ""})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ------------------------------------------------------------------------------- the physics of MuJoCo 2.1.0

# Recorded once with mujoco-py on MuJoCo 2.1.0 (gym 0.23.1, d4rl 1.1, Python 3.9): states, actions and what
# step returned. Most antmaze rows touch a wall, a few with a leg's axis inside it, where other versions fail.
RECORDED = np.load(Path(__file__).with_name("physics210.npz"))


@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in RECORDED.files}))
def test_steps_and_resets_are_those_of_mujoco_210(name):
    close = partial(np.testing.assert_allclose, rtol=0)
    record = {key.split("/", 1)[1]: RECORDED[key] for key in RECORDED.files if key.startswith(name + "/")}
    env = data.make_env(next(task for task in data.TASKS if task.startswith(name.replace("_", "-"))))
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
def hopper(monkeypatch):
    """The environment, after which mujoco_py can be installed anew."""
    env = data.make_env(HOPPER)
    if sys.modules["mujoco_py"] is not mujoco210:
        pytest.skip("mujoco-py itself is installed")
    monkeypatch.delitem(sys.modules, "mujoco_py")
    return env


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


def test_mujoco_py_goes_first_where_it_is_built_and_no_mujoco_but_one_is_taken(
        hopper, monkeypatch, tmp_path, capfd):
    package, cython = tmp_path / "mujoco_py", SimpleNamespace(cythonize=lambda: None)
    (package / "generated").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "Cython", SimpleNamespace(Build=cython))
    monkeypatch.setitem(sys.modules, "Cython.Build", cython)
    monkeypatch.setenv("MUJOCO_PY_MUJOCO_PATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    extension = package / "generated" / "cymj_2.1.2.14_{}{}_linuxcpu.so".format(*sys.version_info)
    for code, built, ours in [("print('building')", False, True), ("print('loaded')", True, False),
                              ("import Cython.Build; Cython.Build.cythonize()", True, True)]:
        (package / "__init__.py").write_text(code)
        extension.touch() if built else None
        monkeypatch.delitem(sys.modules, "mujoco_py", raising=False)
        assert (mujoco210.install() is mujoco210) == ours
    assert capfd.readouterr() == ("", "")

    monkeypatch.delitem(sys.modules, "mujoco_py")
    monkeypatch.setattr("mujoco.__version__", "3.2.7")
    with pytest.raises(data.UserError, match=r"mujoco 3\.2\.7 .*: pip install mujoco==3\.2\.6\)"):
        data.import_d4rl()
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ImportError, match=r"^.* MuJoCo: pip install mujoco==3\.2\.6$"):
        mujoco210.install()
    requirements = Path(__file__).with_name("requirements.txt").read_text()
    assert "mujoco_py" not in sys.modules and f"\nmujoco=={mujoco210.VERSION} " in requirements


# ------------------------------------------------------------------------------ the command line, end to end

TRAIN = (f"train {data.DEMO} --critic-steps 12 --critic-batch 16 --critic-width 16 --behavior-steps 8 "
         "--behavior-batch 16 --behavior-width 16 --behavior-blocks 1 --policy-steps 10 --policy-batch 16 "
         "--policy-width 16 --evaluations 2 --episodes 1 --workers 1 --device cpu ")
RUN, SPOILED = Path("runs", data.DEMO), Path("spoiled", data.DEMO)


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
    """cli(line, exit status) -> stderr, or stdout of status 0, with the demo's data, in tmp_path."""
    monkeypatch.setenv("D4RL_DATASET_DIR", str(demo_data))
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda *_: InThisProcess())
    monkeypatch.chdir(tmp_path)

    def run(line, status=0):
        assert srpo.main(line.split()) == status
        return capsys.readouterr()[status > 0].strip()
    return run


def tables(folder):
    """The rows of log.csv and of scores.csv."""
    texts = [(folder / name).read_text() for name in ("log.csv", "scores.csv")]
    return [[*csv.DictReader(text.splitlines())] for text in texts]


@pytest.mark.parametrize("compiled", ["", pytest.param("--compile ", marks=LONG)], ids=["eager", "compiled"])
def test_three_stages_train_through_the_command_line_and_a_seed_alone_bit_for_bit(compiled, cli, monkeypatch):
    train, alone = TRAIN + compiled + "--beta 0.1 0.4 --also iql bc ", Path("alone", data.DEMO)
    with monkeypatch.context() as patch:
        patch.setattr(data, "ProcessPoolExecutor", futures.ProcessPoolExecutor)  # evaluations, for once
        cli(train + "--seeds 3 1")
    assert compiled or torch.get_num_threads() == 1  # else bits would depend on the cores
    _, rows = before = tables(RUN)
    told = cli(train + "--seeds 3 1")  # finished: nothing is done
    scores = [float(row["score"]) for row in rows if (row["method"], row["step"]) == ("bc", "10")]
    assert "nothing to do" in told and f"bc: {np.mean(scores):.1f} ± {np.std(scores):.1f} over 2" in told
    cli(train + "--seeds 1 --out alone")
    assert tables(RUN) == before
    assert tables(alone) == [[row for row in table if row["seed"] == "1"] for table in before]
    for name, tensor in srpo.load_tensors(alone / "policy.pt").items():
        assert torch.equal(tensor, srpo.load_tensors(RUN / "policy.pt")[name][1::2])
    places = {(row["method"], row["step"], row["beta"], row["seed"]) for row in rows}
    betas = [("srpo", "0.1"), ("srpo", "0.4"), ("iql", ""), ("bc", "")]
    assert len(rows) == 24 and places == {(method, step, beta, seed) for method, beta in betas
                                          for step in ("0", "5", "10") for seed in ("1", "3")}
    assert (RUN / "curves.png").stat().st_size > 1000
    assert srpo.read_config(RUN)["data"]["kind"] == "generated"
    for method in ("srpo", "idql", "iql", "bc", "random"):
        cli(f"evaluate {RUN} --method {method} --episodes 2 --steps 2")
        anew = json.loads((RUN / f"evaluation-{method}.json").read_text())["scores"]
        assert [row["episode"] for row in anew] == [0, 1] * (4 if method == "srpo" else 2)
        if method in ("srpo", "iql", "bc"):  # the final scores, from the saved weights
            final = [row["return"] for row in rows if (row["method"], row["step"]) == (method, "10")]
            assert [str(row["return"]) for row in anew[::2]] == final
    once = [sorted(map(str, table)) for table in tables(alone)]
    for name in ("critic.pt", "policy.pt"):
        (alone / name).unlink()
    cli(train + "--seeds 1 --out alone")  # trained anew, with no row twice
    assert [sorted(map(str, table)) for table in tables(alone)] == once


def test_a_policy_loads_without_this_project(tmp_path):
    weights, obs = build("policy", [0, 5]).weights(), 3 * np.linspace(-1, 1, 3)  # as policy.pt holds them
    policy = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh())
    policy.load_state_dict({name: tensor[1] for name, tensor in weights.items()})
    expected = srpo.numpy_policy(policy.state_dict())(obs, None)
    np.testing.assert_allclose(policy(torch.tensor(obs, dtype=F32)).detach(), expected, atol=1e-6)
    pytest.importorskip("onnxscript", reason="ONNX export needs the packages onnx and onnxscript")
    torch.onnx.export(policy, (torch.zeros(1, 3),), str(tmp_path / "policy.onnx"), dynamo=True)


def test_idql_takes_the_best_of_its_candidates_by_the_smaller_target_twin(cli):
    noise_model, noise = gaussian(0, 1), np.random.default_rng(0).standard_normal((64, 2), np.float32)
    noise_model.output = SimpleNamespace(out_features=2)
    policy = srpo.IDQL(noise_model, lambda s, a: torch.stack([a[:, 0], a[:, 1] - 0.5]), 64, 5)
    candidates = sample(noise_model, None, torch.from_numpy(noise), 5).clamp(-1, 1)
    best = (candidates - torch.tensor([0, 0.5])).amin(1).argmax()  # whose a₀ would be 1.4
    near(candidates[best], policy(np.ones(3), np.random.default_rng(0)), 0)
    cli(TRAIN + "--seeds 0")
    _, ((_, trained),) = srpo.load_policies(RUN, srpo.read_config(RUN), "idql", 2, 2)
    for name, tensor in trained.q.state_dict().items():
        assert torch.equal(tensor, srpo.load_tensors(RUN / "critic.pt")["q_target"][name][0])


def test_the_log_has_mean_losses_names_what_diverges_and_ends_when_nothing_is_finite(cli, monkeypatch):
    def loss(stage, theta, *rest):  # the step's number; the behavior's is none
        return (0 * theta.sum() + stage.count * stage.fate).expand(len(stage.losses))
    for stage, fate in (srpo.Critic, 1), (srpo.Behavior, math.nan):
        monkeypatch.setattr(stage, "loss", loss)
        monkeypatch.setattr(stage, "fate", fate, raising=False)
    # No return is beyond 1 / (1 − γ): Q = 101 of seed 1 can't be.
    monkeypatch.setattr(srpo.Critic, "watch", lambda stage, state: {"q": 99.0 + 2 * state["seed"]})
    told = []
    monkeypatch.setattr(srpo.tqdm, "write", told.append)
    line = cli(TRAIN + "--seeds 0 1 --critic-steps 41", 3)
    rows, _ = tables(RUN)
    means = [*np.arange(1.5, 41, 2), 41.0]  # of two steps, and at last of one
    assert [float(row["q_loss"]) for row in rows[:42:2]] == [
        float(row["value_loss"]) for row in rows[:42:2]] == means
    assert [row["alive"] for row in rows] == ["1"] * 42 + ["0", "0"]
    assert told[0].startswith("seed 1: the critic diverges") and len(told) == 3
    assert line.endswith(f"every seed's behavior loss is not finite; see {RUN / 'log.csv'}")


@pytest.mark.parametrize("line, words", [
    ("train hoper-medium-v2", HOPPER), (f"train ../{HOPPER}", HOPPER), ("train /etc/passwd", data.DEMO),
    (TRAIN + "--critic-stepz 3", "unrecognized arguments"), (TRAIN + "--critic 3", "unrecognized arguments"),
    (TRAIN + "--tau 2", "--tau 2.0 is out of range"), (TRAIN + "--gamma 1", "--gamma 1.0 is out of range"),
    (TRAIN + "--policy-steps 0", "--policy-steps 0 is out of range"),
    (TRAIN + "--critic-lr nan", "--critic-lr nan is out of range"),
    (TRAIN + "--weighting sigma3", "invalid choice"), (TRAIN + "--beta 0", "--beta 0.0 is out of"),
    (TRAIN + "--beta", "--beta must be different"), (TRAIN + "--beta 1 1", "--beta must be different"),
    (TRAIN + "--seeds 1 1", "--seeds must be different"), (TRAIN + "--seeds -1", "--seeds must be different"),
    (TRAIN + "--seeds 2147483648", "--seeds must be"), (TRAIN + "--workers 0", "invalid positive value: '0'"),
    (TRAIN + "--checkpoint-minutes inf", "invalid minutes value"),
    pytest.param(TRAIN + "--device cuda", "PyTorch sees no GPU",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")),
    (TRAIN + "--out /proc/nowhere", "cannot write to /proc/nowhere"),
    ("evaluate nowhere", "nowhere/config.json does not exist"), ("", "required: command")])
def test_bad_input_is_one_line_and_exit_status_2(line, words, cli):
    told = cli(line, 2)
    assert words in told and "\n" not in told


@pytest.mark.parametrize("place, error, words", [
    ("torch.load", torch.OutOfMemoryError("no fault of the file"), "the GPU's memory is full"),
    ("data.prepare", MemoryError(), "not enough memory for"),
    ("srpo.Run.train", MemoryError(), "memory is full"),
    ("srpo.Run.train", RuntimeError("DefaultCPUAllocator: not enough"), "memory is full"),
    ("srpo.Run.train", srpo.BrokenProcessPool(), "a worker process died")])
def test_what_runs_out_or_dies_is_told_in_one_line_but_a_bug_has_its_traceback(
        place, error, words, cli, monkeypatch):
    monkeypatch.setattr(place, Mock(side_effect=error))
    assert words in cli(TRAIN, 2).splitlines()[-1]
    monkeypatch.setattr(srpo, "train", Mock(side_effect=RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli(TRAIN)


# -------------------------------------------------------- whatever a run's files hold: one line, no traceback

def spoil(path, place, value):
    """Puts the value at a place, KEY/KEY, of a JSON, PyTorch or HDF5 file; at None: bytes, or of these."""
    if place is None:
        value = value(path.read_bytes()) if callable(value) else value
        path.unlink() if value is None else path.write_bytes(value)
    elif path.suffix == ".hdf5":
        with h5py.File(path, "a") as file:
            file.pop(place, None)
            file[place] = value
    else:
        inner = content = json.loads(path.read_text()) if path.suffix == ".json" else srpo.load_tensors(path)
        *outer, last = place.split("/")
        for key in outer:
            inner = inner[key]
        inner[last] = value
        path.write_text(json.dumps(content)) if path.suffix == ".json" else torch.save(content, path)


def flip(content):
    """One bit in the middle, which is a number's."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1:]


class Payload:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


EVALUATE, RESUME = f"evaluate {SPOILED}", TRAIN + "--seeds 0 --also bc --out spoiled"
IDQL, REUSE = EVALUATE + " --method idql", TRAIN + f"--seeds 0 --out other --reuse {SPOILED}"
FAULTS = [  # what is done with a run, the file at fault, the place in it, what is there and what is told
    *((EVALUATE, "config.json", None, content, "config.json is damaged")
      for content in (b"", b"[]", b"{", b"null", b"[" * 100000)),
    (EVALUATE, "config.json", None, None, "config.json does not exist"),
    (EVALUATE, "config.json", "settings", {}, "policy.pt is damaged"),  # of the default width
    *((EVALUATE, "config.json", *fault) for fault in [
        ("task", "../x", "unknown task"), ("settings", [], "damaged"), ("settings/x", 1, "damaged"),
        ("settings/tau", 7, "--tau 7 is out of range"), ("settings/critic_steps", 1.5, "out of range"),
        ("settings/weighting", "sigma3", "out of range"), ("settings/baseline", 2, "out of range"),
        ("settings/beta", [], "--beta must be"), ("settings/beta", [0.1, 0.1], "--beta must be"),
        ("seeds", [], "whole numbers"), ("seeds", [0.5], "whole numbers"),
        ("data/data_score", "x", "damaged"), ("data", {"data_score": 1, "kind": "D4RL"}, "damaged")]),
    *((RESUME, "config.json", place, value, f"holds a run of another {what}") for place, value, what in [
        ("settings/gamma", 0.5, "gamma"), ("torch", "1.0", "torch"), ("data/sha256", "x", "data"),
        ("seeds", [1], "seeds")]),
    (RESUME, "config.json", None, json.dumps({"task": data.DEMO, "settings": {}, "seeds": [0], "data": {
        "kind": "", "sha256": "", "data_score": 0}}).encode(), "of another critic_steps"),  # the least
    *((REUSE, "config.json", place, value, f"that run has another {what}") for place, value, what in [
        ("settings/tau", 0.5, "tau"), ("settings/behavior_lr", 1.0, "behavior_lr"),
        ("data/sha256", "x", "data"), ("seeds", [1], "seeds")]),
    (REUSE, "critic.pt", None, b"PK", f"{SPOILED}/critic.pt is damaged"),
    *((EVALUATE, "policy.pt", *fault) for fault in [
        (None, None, "does not exist: train it first"), (None, pickle.dumps(Payload(), 2), "damaged"),
        (None, flip, "other bytes"),
        ("4.bias", Payload(), "Weights only"), ("4.bias", torch.full((1, 2), math.nan), "NaN or"),
        ("4.bias", torch.zeros(1, 3), "policy.pt is damaged"), ("4.bias", 0, "policy.pt is damaged")]),
    (IDQL, "critic.pt", "q_target", {}, "critic.pt is damaged"),
    (RESUME, "critic.pt", "value/0.weight", torch.zeros(1, 4, 16), "of another shape"),  # transposed
    (RESUME, "critic.pt", "value", [], "critic.pt or behavior.pt is damaged"),
    *((RESUME, "checkpoint.pt", *fault) for fault in [
        (None, None, "holds the scores, is missing"), (None, b"PK", "damaged"),
        (None, pickle.dumps(Payload(), 2), "damaged"), ("log", Payload(), "Weights only"),
        ("log", [1], "damaged"), ("scores", [{}], "damaged"),
        ("config/settings/gamma", 0.5, "run of another gamma"), ("state/theta", torch.zeros(1, 3), "damaged"),
        ("state/m", None, "damaged"), ("count", None, "damaged"), ("count", torch.tensor(-9), "step -9"),
        ("count", torch.tensor(11), "step 11"), ("pending", [1], "damaged")])]


def test_every_fault_of_a_runs_files_is_told_in_one_line(cli):
    cli(TRAIN + "--seeds 0 --also bc")
    (RUN / "bc.pt").unlink()  # a run that stands in its last stage
    for line, name, place, value, words in FAULTS:
        shutil.rmtree("spoiled", ignore_errors=True)
        shutil.copytree(RUN, SPOILED)
        spoil(SPOILED / name, place, value)
        told = cli(line, 2)
        assert words in told and "\n" not in told, (name, place, value)
    assert not Path("pwned").exists()
    spoil(SPOILED / name, "pending", [])
    spoil(SPOILED / name, "log", [{"another version's": 1}])
    cli(RESUME)  # no fault
    with filelock.FileLock(SPOILED / ".lock"):  # another process's
        assert f"in use by process {os.getpid()}" in cli(RESUME, 2)
    cli(f"{TRAIN} --seeds 0 --no-baseline --out without --reuse {RUN}")  # what is not at fault is taken
    same = [(RUN / name).read_bytes() == Path("without", data.DEMO, name).read_bytes()
            for name in ("critic.pt", "behavior.pt", "policy.pt")]
    assert same == [True, True, False]


PLACES = [*(fault[1:3] for fault in FAULTS if fault[2]), *(("hdf5", key) for key in random_file())]
JSON = st.recursive(st.none() | st.booleans() | st.integers(-9, 99) | st.floats() | st.text(max_size=9),
                    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=9), x, max_size=3))
ARRAYS = arrays(st.sampled_from(["f2", "f4", "f8", "g", "i1", "i8", "u8", "?", "c8", "S3"]),
                st.sampled_from([(900, 4), (900, 2), (900,), (900, 1), (0, 4), (1, 3), (899,)]))


@LONG
@hypothesis.settings(max_examples=10_000, deadline=None, derandomize=True, database=None,
                     suppress_health_check=list(HealthCheck))
@given(st.sampled_from(PLACES), JSON, ARRAYS, st.floats(0, 1), st.binary(max_size=9), st.floats(0.9, 2))
def test_ten_thousand_damaged_files_lead_to_no_traceback(
        cli, demo_data, tmp_path, monkeypatch, at, value, array, start, some, length):
    """A value or an array at a place, or other bytes or a cut too, of any file that is read."""
    if not RUN.exists():
        cli(TRAIN + "--seeds 0 --also bc --any-data")
        (RUN / "bc.pt").unlink()
        shutil.copy(next(demo_data.iterdir()), RUN)
        monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / SPOILED))
    shutil.rmtree("spoiled", ignore_errors=True)
    shutil.copytree(RUN, SPOILED)
    path, = SPOILED.glob("*" + at[0])
    spoil(path, at[1], array if at[0] == "hdf5" else value)
    content = bytearray(path.read_bytes())
    start = int(start * len(content))
    content[start : start + len(some)] = some
    path.write_bytes(content[: math.ceil(length * len(content))])
    for method in ("srpo", "idql"):
        with contextlib.suppress(data.UserError):
            srpo.load_policies(SPOILED, srpo.read_config(SPOILED), method, 2, 2)
    assert srpo.main((RESUME + " --any-data").split()) in (0, 2, 3)


# ----------------------------------------------------------------------------------------- runs that survive

SURVIVES = TRAIN + "--critic-steps 40 --also bc --seeds 0 1 --checkpoint-minutes 1e-9 --out "


def killed(out, seconds=None, place=None, calls=0):
    """Whether SIGKILL hit a process that trains: after so many seconds, or calls of a function, if told."""
    def live():
        srpo.tqdm.set_lock(threading.RLock())  # its own one is shared with this process, and not given back
        if place:
            owner, name = place
            function, count = getattr(owner, name), itertools.count(1)

            def last(*arguments, **options):
                result = function(*arguments, **options)
                if next(count) == calls:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result
            setattr(owner, name, last)
        sys.exit(srpo.main((SURVIVES + out).split()))
    child = multiprocessing.get_context("fork").Process(target=live)
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


@pytest.mark.parametrize("least", [6, pytest.param(100, marks=LONG)], ids=["at_calls", "at_any_moment"])
@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_a_run_killed_anywhere_ends_as_one_that_was_not(least, cli, monkeypatch):
    """Three kills a run: in a step, at a log's row, at a checkpoint, its writing or renaming, or any time."""
    monkeypatch.setattr(data, "run_episode", lambda task, seed, policy, episode:  # quick, of the weights
                        float(policy(np.ones(4), None)[0]))
    rng, writer, run, kills, out = np.random.default_rng(0), csv.DictWriter, srpo.Run, 0, 0
    places = itertools.cycle([  # and about how often a run is there
        (run, "save", 70), (writer, "writerows", 60), (os, "replace", 80), (srpo, "adam", 130),
        (os, "fsync", 80), (run, "submit", 6), (torch, "save", 70), (writer, "writeheader", 10)])
    begin = time.monotonic()
    assert not killed("whole")
    whole = time.monotonic() - begin
    while kills < least:
        out += 1
        for _ in range(3):
            *place, calls = next(places)
            moment = (whole * rng.uniform(),) if least == 100 else (None, place, rng.integers(calls) + 1)
            kills += killed(str(out), *moment)
        assert not killed(str(out))
        ours, theirs = Path(str(out), data.DEMO), Path("whole", data.DEMO)
        assert tables(ours) == tables(theirs)
        for name in ("critic.pt", "behavior.pt", "policy.pt", "bc.pt"):
            tensors = [srpo.load_tensors(folder / name) for folder in (ours, theirs)]
            torch.testing.assert_close(*tensors, atol=0, rtol=0)


def test_a_signal_saves_and_the_same_command_goes_on(cli, monkeypatch):
    train, step, at_once = TRAIN + "--seeds 0 ", srpo.Stage.step, []
    stops = [("behavior", [signal.SIGUSR1]), ("behavior", [signal.SIGTERM]), ("iql", [signal.SIGINT] * 2)]

    def stopped(stage):
        step(stage)
        if stops and stage.name == stops[0][0]:
            for number in stops.pop(0)[1]:
                os.kill(os.getpid(), number)
    cli(train + "--also iql bc --out whole")
    monkeypatch.setattr(srpo.Stage, "step", stopped)
    monkeypatch.setattr(os, "_exit", at_once.append)  # at the second Ctrl-C
    for status, count in (143, 1), (143, 2), (130, 1):
        with pytest.raises(SystemExit) as end:
            cli(train + "--also iql")
        assert (end.value.code, srpo.load_tensors(RUN / "checkpoint.pt")["count"]) == (status, count)
    assert at_once == [130]
    (RUN / "log.csv").write_text("spoiled")  # the checkpoint has its rows
    cli(train + "--also bc")  # a policy more, and no policy less; what is under way goes first
    assert tables(RUN) == tables(Path("whole", data.DEMO))
    assert srpo.read_config(RUN)["settings"]["also"] == ["bc", "iql"]


def test_a_file_is_replaced_at_once_or_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(b"old")
    with open(path, "rb") as reader:
        srpo.write_atomically(path, b"good")
        assert reader.read() == b"old"  # whoever reads it meanwhile has it whole
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(data.UserError, match="No space left.*intact"):
        srpo.write_atomically(path, b"half")
    assert path.read_bytes() == b"good" and [*tmp_path.iterdir()] == [path]


FAKE_PYTHON = """#!/bin/bash
[ "$1" != -m ] || [ -e online ] || exit 1
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
    return lambda *tasks, **more: subprocess.Popen(
        ["bash", "run_all.sh", *tasks], env={**environment, **more}, cwd=tmp_path, stderr=subprocess.PIPE,
        text=True)


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


def test_run_all_repeats_a_setup_that_failed_and_refuses_other_tasks(run_all, tmp_path):
    (tmp_path / "python3").write_text("#!/bin/bash\nmkdir -p .venv/bin && cp python .venv/bin")
    (tmp_path / "python3").chmod(0o755)
    (tmp_path / "requirements.txt").write_text("#no-deps: d4rl")
    fresh = {"PYTHON": "", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for status in (2, 0):
        assert run_all("setup", **fresh).wait(30) == status
        assert (tmp_path / ".venv/requirements.txt").exists() == (status == 0)
        (tmp_path / "online").touch()
    before = {*tmp_path.iterdir()}
    assert "hoper is none of" in run_all("hoper").communicate()[1] and {*tmp_path.iterdir()} == before


# -------------------------------------------------------------------- the step, compiled and as a CUDA graph

@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")
@pytest.mark.parametrize("name", [
    "critic", *(pytest.param(name, marks=LONG) for name in ("behavior", "policy", "iql"))])
def test_a_compiled_step_is_the_eager_one(name, monkeypatch):
    torch._dynamo.reset()  # it gives up after eight stages in a process
    eager, compiled = (build(name, [0, 1], critic_batch=1001) for _ in range(2))
    if name != "critic":  # which draws whole numbers only: others differ compiled in float32's last digit
        compile = torch.compile
        monkeypatch.setattr(torch, "compile", lambda f, **how: f if "draw" in str(f) else compile(f, **how))
    assert compiled.compile(required=True) == 1
    take(1, eager)
    for _ in range(4):
        assert torch.equal(compiled.calls[0](compiled.groups[1])[0], eager.draw(eager.groups[1])[0])
        take(1, eager, compiled)
    for key in eager.kept:
        near(compiled.state[key], eager.state[key], 1e-9)


def test_without_a_compiler_a_step_stays_eager_unless_told_to_compile(monkeypatch):
    eager, stage = build("critic", [0]), build("critic", [0])
    fails = Mock(side_effect=torch._dynamo.exc.TorchDynamoException("no g++"))
    monkeypatch.setattr(torch, "compile", lambda *_, **options: fails)
    with pytest.raises(data.UserError, match="^--compile cannot work here .*no g"):
        stage.compile(required=True)
    stage.count.zero_()
    assert stage.compile(required=False) == 1
    take(2, eager)
    take(1, stage)
    near(stage.state["theta"], eager.state["theta"], 0)


@pytest.mark.parametrize("twins", [(), (2,)], ids=["one", "twins"])
def test_the_compiled_forms_of_mish_and_linear_are_the_eager_ones(twins, monkeypatch):
    layer, x, used = models.Linear(140, 130), 20 * torch.randn(256, 140), []
    x[0, 0] = 100  # exp(100) is infinite in float32
    if twins:
        layer = models.stack([layer, models.Linear(140, 130)])

    def values_and_slopes():
        inputs = x.clone().requires_grad_(), *layer.parameters()
        y = layer(models.mish(inputs[0]))
        return y, *torch.autograd.grad((y**2).sum(), inputs)
    exact = values_and_slopes()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(models, "product", lambda *pair, by=models.product: used.append(1) or by(*pair))
    for ours, reference in zip(values_and_slopes(), exact):
        near(ours, reference, 1e-5 * reference.detach().abs().max())
    assert used or not models.HAS_ONEDNN


def test_products_are_rounded_to_the_precision_that_is_set(monkeypatch):
    monkeypatch.setattr(models.Linear, "precision", None)  # and is put back
    layer, x, off = models.Linear(64, 64), torch.randn(32, 64), {}
    exact = F.linear(x, layer.weight, layer.bias).detach()
    for precision in ("bf16", "tf32", "fp32"):
        srpo.set_precision(Settings(precision=precision), "cpu")
        off[precision] = (layer(x).detach() - exact).abs().max()
    assert 1e-4 < off["bf16"] < 0.05 and off["tf32"] == off["fp32"] == 0  # bf16 has 8 bits


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

def hand_made_run(folder, kind="D4RL", step=1_000_000, scores=("90", "94", "98", "102"), log=(), **settings):
    """A folder as training leaves it: two episodes of seed 0, two of seed 1, and of a row's start more."""
    folder.mkdir(parents=True)
    given = {**vars(Settings(episodes=2).resolve(folder.name)), **settings}
    config = {"task": folder.name, "seeds": [0, 1], "settings": given,
              "data": {"kind": kind, "sha256": "", "data_score": 50.0}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [f"srpo,{step},{i // 2},{beta},{i % 2},0,{score}" for beta in given["beta"]
            for i, score in enumerate(scores)]
    (folder / "scores.csv").write_text("\n".join([",".join(srpo.SCORES), *rows, f"srpo,{step},0"]))
    rows = [f"critic,1000,{seed},,{alive},,,,,,{q},,," for seed, (alive, q) in enumerate(log)]
    (folder / "log.csv").write_text("\n".join([",".join(srpo.LOG), *rows, ""]))


def test_report_compares_final_scores_on_d4rls_data_and_lists_what_it_cannot_use(
        tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.pyplot.Figure, "savefig", lambda figure, path, **_: drawn.append(figure))
    hand_made_run(tmp_path / HOPPER)  # 92 and 100 are the seeds' means, 95.5 is the paper's
    hand_made_run(tmp_path / "walker2d-medium-v2", kind="stand-in")
    hand_made_run(tmp_path / "walker2d-medium-expert-v2", step=50_000)
    hand_made_run(tmp_path / "halfcheetah-medium-replay-v2", scores=("90", "94", "98"))  # one is to come
    hand_made_run(tmp_path / "no-baseline" / HOPPER, baseline=False)
    hand_made_run(tmp_path / "walker2d-medium-replay-v2", baseline=False)  # no run of the paper's settings
    hand_made_run(tmp_path / "sweep" / HOPPER, beta=(0.01, 0.05), log=[(0, 5), (1, 1001)])  # Q ≤ 10 / (1 − γ)
    (tmp_path / "halfcheetah-medium-v2").mkdir()  # a training that ended before it began
    hand_made_run(tmp_path / "hopper-medium-replay-v2", scores=("1", "1O", "2", "3"))
    (tmp_path / "photos").mkdir()
    figures.report(tmp_path)
    lines = [line.split(" | ") for line in (tmp_path / "report.md").read_text().splitlines()]
    rows = {line[0][2:]: line[10:] for line in lines if len(line) == 14}  # Table 1
    assert rows[HOPPER][:3] == ["96.0 ± 4.0", "2 × 2", "+0.5 [-3.5, +4.5]"]
    assert rows["walker2d-medium-v2"][:3] == ["96.0 ± 4.0 (stand-in data)", "2 × 2", ""]
    assert rows["walker2d-medium-expert-v2"][0] == rows["halfcheetah-medium-replay-v2"][0] == "unfinished"
    assert rows["hopper-medium-replay-v2"][0] == "damaged"
    assert rows["walker2d-medium-replay-v2"][:3] == ["96.0 ± 4.0", "2 × 2", ""]
    assert rows["antmaze-umaze-v2"][0] == rows["halfcheetah-medium-v2"][0] == "not run"
    assert rows["average, locomotion"][0] == "incomplete (1 of 9)"
    assert rows["interquartile mean of all runs"][0] == "96.0 [92.0, 100.0]"
    told = capsys.readouterr().out
    assert all(word in told for word in ("no-baseline/hopper", "baseline False", "does not exist", "'1O'",
                                         "finished, seed 0 diverged, seed 1 diverged"))
    default, = ([*line.get_xdata()] for figure in drawn for axes in figure.axes for line in axes.lines
                if line.get_label() == "the task's default β")
    assert default == [0.05, 0.05]
    assert figures.read_run(tmp_path / "sweep" / HOPPER, "").beta == 0.05  # which Table 1 takes of several


def test_interquartile_mean_leaves_out_a_quarter_at_either_end():
    means = [np.array([0.0, 100, 5, -1, 4, 99]), np.array([5.0, 6, 7, 8, 3, 1e9])]
    assert figures.interquartile_mean(means) == pytest.approx((4 + 5 + 5 + 6 + 7 + 8) / 6)
