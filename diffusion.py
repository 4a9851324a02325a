"""The diffusion process: noise schedule, score, sampling, likelihood and behavior loss (Eq. 4-7 and 13).

A noise model is any function `noise_model(a_t, s, t)` that predicts the noise in a_t. Shapes, here and
everywhere: actions a, a_t and noise [*seeds, B, A]; states s [*seeds, B, S]; times t [*seeds, B] in [0, 1].
The seed axis is optional. Needs nothing but torch.
"""
import math

import torch

BETA_MIN, BETA_MAX = 0.1, 20.0  # VP-SDE's default noise rates (Song et al., 2021; App. C)


def alpha_sigma(t):
    """Eq. 4: signal and noise scale α_t, σ_t, shaped like t."""
    log_alpha = -(BETA_MAX - BETA_MIN) / 4 * t**2 - BETA_MIN / 2 * t
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()  # sqrt(1 − α²) loses all digits at small t


def diffuse(a, t, noise):
    """Eq. 4: a_t = α_t a + σ_t ε."""
    alpha, sigma = alpha_sigma(t.unsqueeze(-1))
    return alpha * a + sigma * noise


def score(noise_model, a_t, s, t):
    """Eq. 6: ∇ log μ_t(a_t | s) = −ε(a_t | s, t) / σ_t, shaped like a_t. Infinite at t = 0."""
    return -noise_model(a_t, s, t) / alpha_sigma(t.unsqueeze(-1))[1]


def drift_diffusion(t):
    """Eq. 7: f(t) = d log α / dt and g²(t) = dσ² / dt − 2 f σ², which is −2 f since α² + σ² = 1."""
    f = -(BETA_MIN + (BETA_MAX - BETA_MIN) * t) / 2
    return f, -2 * f


def sample(noise_model, s, noise, steps):
    """Eq. 7 from t = 1 to 0: the actions [*seeds, B, A] that the ODE makes of `noise`.

    With y = a_t / α and k = σ / α, Eq. 7 reads dy/dk = ε(a_t | s, t). Euler's method on it is DDIM; this is
    the two-step Adams-Bashforth method: still one evaluation a step, and an error of second order.
    """
    times = torch.linspace(1, 0, steps + 1, dtype=noise.dtype, device=noise.device) ** 2  # finer at the data
    alpha, sigma = alpha_sigma(times)
    k = sigma / alpha
    y, before = noise / alpha[0], None
    for i in range(steps):
        now = noise_model(alpha[i] * y, s, times[i].expand(noise.shape[:-1]))
        slope = now
        if before is not None:
            slope = now + (now - before) * (k[i + 1] - k[i]) / (k[i] - k[i - 1]) / 2
        y, before = y + (k[i + 1] - k[i]) * slope, now
    return y


def standard_normal_log_density(a):
    """log N(a; 0, I), summed over the action: the density at t = 1, but for 0.7 % of signal left there."""
    return -(a**2 + math.log(2 * math.pi)).sum(-1) / 2


def log_likelihood(noise_model, s, a, steps, log_density_1=standard_normal_log_density):
    """Eq. 7 from t = 0 to 1: log μ(a | s), [*seeds, B], by the change of variables (Song et al., 2021).

    Runge-Kutta 4 in u = √t, with the exact divergence; `log_density_1(a_1)` is the log-density at t = 1.
    """

    def field(a_t, u):
        """d(a_t)/du and its divergence."""
        f, g2 = drift_diffusion(u**2)
        _, sigma = alpha_sigma(u**2)
        with torch.enable_grad():
            a_t = a_t.detach().requires_grad_()
            noise = noise_model(a_t, s, (u**2).expand(a_t.shape[:-1]))
            rows = [torch.autograd.grad(n.sum(), a_t, retain_graph=True)[0] for n in noise.unbind(-1)]
        divergence = sum(row[..., i] for i, row in enumerate(rows))
        velocity = f * a_t.detach() + g2 / (2 * sigma) * noise.detach()
        return 2 * u * velocity, 2 * u * (f * a.shape[-1] + g2 / (2 * sigma) * divergence)

    grid = torch.linspace(1e-3, 1, steps + 1, dtype=a.dtype, device=a.device)  # from t = 1e-6: 0 is 0/0
    total = torch.zeros_like(a[..., 0])
    for u, u_next in zip(grid, grid[1:]):
        h = u_next - u
        k1, d1 = field(a, u)
        k2, d2 = field(a + h / 2 * k1, u + h / 2)
        k3, d3 = field(a + h / 2 * k2, u + h / 2)
        k4, d4 = field(a + h * k3, u_next)
        a = a + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        total = total + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return log_density_1(a) + total


def behavior_loss(noise_model, s, a, t, noise):
    """Eq. 13: ‖ε_ψ(a_t | s, t) − ε‖², summed over the action and averaged over the batch, [*seeds]."""
    return ((noise_model(diffuse(a, t, noise), s, t) - noise) ** 2).sum(-1).mean(-1)
