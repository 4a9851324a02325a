"""To be merged into test_srpo.py; up to the rule below its imports and header."""

import itertools
import os
import sys
from functools import partial
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import srpo
from srpo import Settings

torch.set_num_threads(1)
F32, F64 = torch.float32, torch.float64

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


def same(x, y):
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
            stage.rows = lambda: [x[None] for x in rows]
            stage.noise = lambda: [x[None] for x in noises]
            stage.step()
            losses |= stage.read_losses()[0]
        yield losses
        for x, y, gradient in itertools.chain(*[weights(*pair) for pair in pairs]):
            same(x, y)
            if gradient is not None:
                same(factor * x.grad, gradient)


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
        same(losses["value_loss"], their.v_loss)
        same(losses["q_loss"], their.q_loss)
        same(losses["regression_loss"], theirs.policy_loss)


def test_released_behavior_takes_our_steps(released):
    """Eq. 13; theirs draws t of U(0.001, 1), ours, given the same here, of U(0, 1)."""
    theirs = released("SRPO_Behavior", "hopper-medium-v2")
    stage = ours(srpo.Behavior, Settings("hopper-medium-v2"))
    what = [stage], [(stage.noise_model, theirs.diffusion_behavior)], (0.001, 1), 3
    for losses in five_steps(released, theirs.update_behavior, *what):
        same(losses["behavior_loss"], theirs.loss)


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
