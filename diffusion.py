"""The diffusion process (Eq. 4-7, 13): noise schedule, score, behavior loss; then what
IDQL and the figures need besides, sampling and likelihood.

A noise model is any function noise_model(a_t, s, t) that predicts the noise in a_t.
Shapes: a, a_t and noise [*seeds, B, A], s [*seeds, B, S], t [*seeds, B] in [0, 1];
leading axes may be absent.
"""

import torch

BETA_MIN, BETA_MAX = 0.1, 20.0  # noise rates of the VP-SDE (Song et al., 2021); not β


def alpha_sigma(t):
    """Eq. 4: signal and noise scale α_t, σ_t, shaped like t."""
    log_alpha = -(BETA_MAX - BETA_MIN) / 4 * t**2 - BETA_MIN / 2 * t
    # 1 − α² would lose all digits at small t
    return log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()


def diffuse(a, t, noise):
    """Eq. 4: a_t = α_t a + σ_t ε."""
    alpha, sigma = alpha_sigma(t.unsqueeze(-1))
    return alpha * a + sigma * noise


def score(noise_model, a_t, s, t):
    """Eq. 6: ∇ log μ_t(a_t | s) = −ε(a_t | s, t) / σ_t, shaped like a_t; ∞ at 0."""
    _, sigma = alpha_sigma(t.unsqueeze(-1))
    return -noise_model(a_t, s, t) / sigma


def drift_diffusion(t):
    """Eq. 7: f(t) = d log α / dt, g²(t) = dσ² / dt − 2 f σ² = −2 f, as α² + σ² = 1."""
    f = -(BETA_MIN + (BETA_MAX - BETA_MIN) * t) / 2
    return f, -2 * f


def behavior_loss(noise_model, s, a, t, noise):
    """Eq. 13 (Eq. 5 given s): ‖ε_ψ(a_t | s, t) − ε‖², the mean over B, [*seeds]."""
    return ((noise_model(diffuse(a, t, noise), s, t) - noise) ** 2).sum(-1).mean(-1)


def refuse_dropout(noise_model):
    """ValueError for a module with dropout switched on: an ODE needs a function."""
    modules = noise_model.modules() if isinstance(noise_model, torch.nn.Module) else ()
    if any(isinstance(m, torch.nn.Dropout) and m.training and m.p > 0 for m in modules):
        raise ValueError("the noise model's dropout is on: call its eval() before")


# ---------------- for IDQL and the figures; SRPO neither samples nor needs a likelihood


def sample(noise_model, s, noise, steps):
    """Eq. 7 from t = 1 to 0: the actions [*seeds, B, A] made of `noise`.

    With y = a_t / α and k = σ / α, whose dk/dt is g² / (2 α σ), Eq. 7 reads dy/dk =
    ε(a_t | s, t). Euler's method on it is DDIM; this is the two-step Adams-Bashforth
    method, of second order.
    """
    refuse_dropout(noise_model)
    times = torch.linspace(1, 0, steps + 1).to(noise) ** 2  # dense near t = 0
    alpha, sigma = alpha_sigma(times)
    k = sigma / alpha
    y, dy_dk = noise / alpha[0], None
    for i in range(steps):
        t, before = times[i].expand(noise.shape[:-1]), dy_dk
        dy_dk = noise_model(alpha[i] * y, s, t)
        # d²y/dk²; the first step is Euler's
        change = 0 if i == 0 else (dy_dk - before) / (k[i] - k[i - 1])
        y = y + (k[i + 1] - k[i]) * (dy_dk + (k[i + 1] - k[i]) / 2 * change)
    return y


def log_likelihood(noise_model, s, a, steps, log_density_1=None):
    """Eq. 7 from t = 0 to 1: log μ(a | s), [*seeds, B], by the change of variables.

    Runge-Kutta 4 in u = √t, in which the score's 1 / σ stays harmless at t = 0; the
    divergence is exact (Song et al., 2021). log_density_1(a_1): the log-density at
    t = 1, unless told the standard normal's, since α is 0.007 there.
    """
    refuse_dropout(noise_model)
    normal = torch.distributions.Normal(0.0, 1.0)
    log_density_1 = log_density_1 or (lambda a_1: normal.log_prob(a_1).sum(-1))

    def field(a_t, u):
        """d(a_t)/du and its divergence."""
        f, g2 = drift_diffusion(u**2)
        with torch.enable_grad():
            a_t = a_t.detach().requires_grad_()
            gradient = score(noise_model, a_t, s, (u**2).expand(a_t.shape[:-1]))
            rows = [
                torch.autograd.grad(x.sum(), a_t, retain_graph=True)[0][..., i]
                for i, x in enumerate(gradient.unbind(-1))
            ]  # the diagonal of the score's Jacobian
        velocity = f * a_t.detach() - g2 / 2 * gradient.detach()
        return 2 * u * velocity, 2 * u * (f * a_t.shape[-1] - g2 / 2 * sum(rows))

    grid = torch.linspace(1e-3, 1, steps + 1).to(a)  # from t = 1e-6, since 0 is 0/0
    integral = torch.zeros_like(a[..., 0])  # of the divergence
    for u, u_next in zip(grid, grid[1:]):
        h = u_next - u
        k1, d1 = field(a, u)
        k2, d2 = field(a + h / 2 * k1, u + h / 2)
        k3, d3 = field(a + h / 2 * k2, u + h / 2)
        k4, d4 = field(a + h * k3, u_next)
        a = a + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        integral = integral + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    return log_density_1(a) + integral
