"""The paper's figures and tables, each by one command.

    python figures.py bandit    assets/bandit*.png and assets/bandit.csv: Fig. 2-5 and 9-12, without any data of D4RL
"""
import argparse
import csv
import math
import sys
from pathlib import Path

import numpy as np
import torch

from diffusion import alpha_sigma, behavior_loss, log_likelihood
from models import Draw, Layout, NoiseModel, fresh
from srpo import adam, surrogate_gradient

# ------------------------------------------------------------------------------- bandit: Fig. 2, 3, 4, 5 and 9 to 12

NAMES = ("8 Gaussians", "moons", "swiss roll", "rings", "checkerboard", "2 spirals")
BETAS = (10.0, 1.0, 0.1, 0.01, 0.001)
EQ_10, EXACT = "Eq. 10: t = 0.02 alone", "Eq. 10, exact score"
GRADIENTS = {  # ω(t) and the range of t in Eq. 15
    EQ_10: ("alpha_over_sigma", 0.02, 0.02),
    "ensemble, ω = α/σ": ("alpha_over_sigma", 0.02, 0.98),
    "ensemble, ω = 1": ("one", 0.02, 0.98),
    "ensemble, ω = σ²": ("sigma2", 0.02, 0.98),
}
ROWS, TIME, NOISE = 1, 2, 3  # purposes of random numbers


def behavior_distributions():
    """Six mixtures of 2,048 equal Gaussians: centers [6, 2048, 2] and standard deviations [6, 1, 1].

    The centers are scikit-learn's shapes without their noise, at FFJORD's scale (Grathwohl et al., 2019); so density
    and score are exact.
    """
    from sklearn.datasets import make_circles, make_moons, make_swiss_roll

    n = 2048
    angle = np.arange(n) // (n // 8) * math.pi / 4
    gaussians = 2.83 * np.stack([np.cos(angle), np.sin(angle)], -1)
    moons = 2 * make_moons(n, shuffle=False)[0] - [1, 0.2]
    roll = make_swiss_roll(n, random_state=0)[0][:, [0, 2]] / 5
    rings = 3.6 * make_circles(n, factor=0.5, shuffle=False)[0]
    x, y = np.meshgrid(*[(np.arange(64) + 0.5) / 8 - 4] * 2)
    board = np.stack([x, y], -1)[(x // 2 + y // 2) % 2 == 0]
    angle = math.pi * np.sqrt(0.6 + 8.4 * (np.arange(n // 2) + 0.5) / (n // 2))  # from 0.77 π, off the middle, to 3 π
    arm = angle[:, None] / 3 * np.stack([-np.cos(angle), np.sin(angle)], -1)
    centers = np.stack([gaussians, moons, roll, rings, board, np.concatenate([arm, -arm])])
    return torch.tensor(centers).float(), torch.tensor([0.35, 0.2, 0.2, 0.25, 0.1, 0.15])[:, None, None]


def log_density(a, centers, std):
    """log μ(a) of such a mixture, [*seeds, B]."""
    exponent = -torch.cdist(a, centers).square() / (2 * std**2)  # [*seeds, B, centers]
    return exponent.logsumexp(-1) - (2 * math.pi * len(centers[0]) * std[..., 0] ** 2).log()


def exact_noise_model(centers, std):
    """Eq. 6 in closed form for such a mixture: ε* = σ Σ r (a_t − α c) / (α² std² + σ²), r the responsibilities."""

    def noise_model(a_t, s, t):
        alpha, sigma = alpha_sigma(t.unsqueeze(-1))
        variance = (alpha * std) ** 2 + sigma**2
        gap = a_t.unsqueeze(-2) - alpha.unsqueeze(-1) * centers.unsqueeze(-3)  # [*seeds, B, centers, 2]
        share = (-gap.square().sum(-1) / (2 * variance)).softmax(-1)
        return sigma / variance * (share.unsqueeze(-1) * gap).sum(-2)

    return noise_model


def cosine(lr, step, steps):
    return lr * (1 + math.cos(math.pi * (step - 1) / steps)) / 2


def train_behavior(data, seed, steps=2500, batch=256, lr=3e-3):
    """Eq. 13 on all of data [6, N, 2] side by side: a noise model with six seeds, each its own distribution."""

    def build():
        return NoiseModel(0, 2, width=64)

    net = Layout(build())
    theta = net.flatten(fresh(seed.tolist(), 1, build).state_dict())
    m, v = torch.zeros_like(theta), torch.zeros_like(theta)
    for step in range(1, steps + 1):
        draw = Draw(seed, torch.tensor(step, dtype=torch.int32))
        rows = draw.index(ROWS, (batch,), data.shape[1])
        a = data.gather(1, rows.unsqueeze(-1).expand(-1, -1, 2))
        t, noise = draw.uniform(TIME, (batch,)), draw.normal(NOISE, (batch, 2))
        theta.requires_grad_()
        loss = behavior_loss(net.bind(theta), a[..., :0], a, t, noise)
        (gradient,) = torch.autograd.grad(loss.sum(), theta)
        theta = theta.detach()
        adam(theta, gradient, m, v, torch.tensor(step), cosine(lr, step, steps), 0.0)
    return net.bind(theta)


def extract(noise_model, seed, target, steps=300, lr=0.1):
    """Eq. 15 with Q(a) = −‖a − a_tar‖² and the action itself as a Dirac policy's only parameter, by Adam.

    Every gradient, β and target [T, 2] side by side, each action starting at its target: the solutions
    [gradients, seeds, betas, T, 2].
    """
    target = target.repeat(len(BETAS), 1)  # [betas · T, 2]
    beta = torch.tensor(BETAS).repeat_interleave(len(target) // len(BETAS)).unsqueeze(-1)
    a = target.repeat(len(GRADIENTS), len(seed), 1, 1)
    m, v = torch.zeros_like(a), torch.zeros_like(a)
    for step in range(1, steps + 1):
        draw = Draw(seed, torch.tensor(step, dtype=torch.int32))
        u, noise = draw.uniform(TIME, (len(target),)), draw.normal(NOISE, (len(target), 2))
        gradient = torch.stack([
            surrogate_gradient(lambda s, a: -(a - target).square().sum(-1), noise_model, one[..., :0], one,
                               low + (high - low) * u, noise, beta, weighting, baseline=high > low)
            for one, (weighting, low, high) in zip(a, GRADIENTS.values())])
        adam(a, -gradient, m, v, torch.tensor(step), cosine(lr, step, steps), 0.0)
    return a.unflatten(2, (len(BETAS), -1))


def closed_forms(data, target):
    """Two other ways to extract a policy, {name: [seeds, betas, T, 2]}, without any training.

    Weighted regression (Eq. 2, forward KL) on a Gaussian policy: the mean of the data weighted by exp(βQ). Reverse
    KL to a Gaussian behavior model: the maximum of log N(a; mean, covariance of the data) + βQ(a).
    """
    beta = torch.tensor(BETAS)[:, None, None]
    distance = torch.cdist(target, data).square()  # [seeds, T, N]
    regression = torch.stack([(-b * distance).softmax(-1) @ data for b in BETAS], 1)
    mean, precision = data.mean(1), torch.linalg.inv(torch.stack([x.T.cov() for x in data]))
    pull = (precision @ mean.unsqueeze(-1)).mT.unsqueeze(1)  # [seeds, 1, 1, 2]
    curvature = precision.unsqueeze(1) + 2 * beta * torch.eye(2)  # [seeds, betas, 2, 2]
    gaussian = torch.linalg.solve(curvature, (pull + 2 * beta * target).mT).mT
    return {"weighted regression": regression, "Gaussian reverse KL": gaussian}
