"""To be merged into test_run.py; up to the rule below its imports and header."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import data
import srpo
from released import released_checkpoints

HOPPER = "hopper-medium-v2"


# ---------------- the authors' checkpoints
def like_theirs(s_dim=11, a_dim=3, blocks=3):
    """Random weights under the names of theirs: critic, behavior model."""
    critic, behavior, width = {}, {"embed.0.W": torch.randn(32)}, 256

    def layers(weights, name, *sizes):
        for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
            layer = f"{name}.{2 * i}" if len(sizes) > 2 else name
            weights[f"{layer}.weight"] = torch.randn(outputs, inputs) / 16
            weights[f"{layer}.bias"] = torch.randn(outputs)

    layers(critic, "vf.v", s_dim, width, width, 1)
    for twin in "q0.q1", "q0.q2", "q0_target.q1", "q0_target.q2":
        layers(critic, twin, s_dim + a_dim, width, width, 1)
    layers(behavior, "cond_model", 64, 128, 128)
    layers(behavior, "main.fc", a_dim + s_dim + 128, width)
    layers(behavior, "main.out_fc", width, a_dim)
    for block in (f"main.blocks.{i}" for i in range(blocks)):
        for name in "weight", "bias":
            behavior[f"{block}.layer_norm.{name}"] = torch.randn(width)
        layers(behavior, f"{block}.fc1", width, 4 * width)
        layers(behavior, f"{block}.fc2", 4 * width, width)
        layers(behavior, f"{block}.residual", width, width)
    return critic, {f"diffusion_behavior.{name}": x for name, x in behavior.items()}


def save(folder, seed, critic, behavior):
    where = folder / f"{HOPPER}-baseline-seed{seed}"
    where.mkdir()
    torch.save(critic, where / "critic_ckpt150.pth")
    torch.save(behavior, where / "behavior_ckpt200.pth")


def take(folder, seeds, **options):
    """Critic and behavior stages with the weights of these files."""
    settings, table = srpo.Settings(HOPPER, **options), torch.zeros(1, 27)
    both = [
        kind(settings, table, (11, 3), seeds) for kind in (srpo.Critic, srpo.Behavior)
    ]
    loaded = released_checkpoints(folder, HOPPER, seeds, settings, (11, 3))
    for stage in both:
        weights = loaded.pop(stage.name)
        assert weights.keys() == stage.weights().keys()
        for name, state in weights.items():
            getattr(stage, name).network.load_state_dict(state)
    return both


def test_files_of_the_authors_names_become_our_weights(tmp_path):
    files = {seed: like_theirs() for seed in (3, 5)}
    for seed, both in files.items():
        save(tmp_path, seed, *both)
    critic, behavior = take(tmp_path, [*files])
    s, a = torch.randn(2, 7, 11), torch.randn(2, 7, 3)
    for i, (theirs, _) in enumerate(files.values()):
        for q, prefix in (critic.q, "q0.q"), (critic.q_target, "q0_target.q"):
            for twin in 0, 1:
                x = torch.cat([a[i], s[i]], -1)  # theirs has the action first
                for layer in (f"{prefix}{twin + 1}.{j}" for j in (0, 2, 4)):
                    x = x @ theirs[f"{layer}.weight"].T + theirs[f"{layer}.bias"]
                    x = x if layer.endswith("4") else x.relu()
                torch.testing.assert_close(q(s, a)[i, twin], x[:, 0], atol=1e-4, rtol=0)
    ours, theirs = behavior.noise_model.network.state_dict(), files[5][1]
    for name, other in {
        **{"frequencies": "embed.0.W", "embed_time.2.bias": "cond_model.2.bias"},
        **{"input.weight": "main.fc.weight", "output.1.bias": "main.out_fc.bias"},
        "blocks.1.norm.weight": "main.blocks.1.layer_norm.weight",
        "blocks.2.mlp.0.weight": "main.blocks.2.fc1.weight",
        "blocks.0.mlp.2.bias": "main.blocks.0.fc2.bias",
    }.items():
        assert ours[name][1].equal(theirs[f"diffusion_behavior.{other}"])


@pytest.mark.parametrize(
    "of_file, of_settings, told",
    [
        ({"s_dim": 12}, {}, "(ValueError vf.v.0.weight is not [256, 11] finite"),
        ({}, {"critic_width": 9}, "(ValueError vf.v.0.weight is not [9, 11] finite"),
        ({"blocks": 2}, {}, "(KeyError 'diffusion_behavior.main.blocks.2."),
        ({"blocks": 4}, {}, "(ValueError diffusion_behavior.main.blocks.3."),
    ],
)
def test_their_files_of_other_sizes_are_refused(tmp_path, of_file, of_settings, told):
    save(tmp_path, 0, *like_theirs(**of_file))
    with pytest.raises(data.UserError, match="ckpt[0-9]*.pth does not fit") as caught:
        take(tmp_path, [0], **of_settings)
    assert told in str(caught.value)


def test_their_files_that_are_missing_or_damaged_are_refused(tmp_path):
    save(tmp_path, 0, *(both := like_theirs()))
    with pytest.raises(
        data.UserError, match="seed1/critic_ckpt150.pth does not fit.*No"
    ):
        take(tmp_path, [0, 1])
    path = next(tmp_path.glob("*/behavior*"))
    half, spoiled = path.read_bytes()[:1000], {"W": Path("code, not weights")}
    both[1]["diffusion_behavior.embed.0.W"][7] = float("nan")
    for content in half, b"", b"text", spoiled, [1, 2], both[1]:
        as_it_is = isinstance(content, bytes)
        path.write_bytes(content) if as_it_is else torch.save(content, path)
        with pytest.raises(data.UserError, match="behavior_ckpt200.pth does not fit"):
            take(tmp_path, [0])


@pytest.mark.skipif(
    not os.environ.get("RELEASED"), reason="needs RELEASED=a clone of thu-ml/SRPO"
)
def test_released_checkpoints_have_the_outputs_of_their_networks(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *where, **how: module)
    monkeypatch.syspath_prepend(os.environ["RELEASED"])
    import SRPO

    args = SimpleNamespace(env=HOPPER, device="cpu", q_layer=2, actor_blocks=3)
    theirs = [
        (SRPO.SRPO_IQL(14, 3, args), SRPO.SRPO_Behavior(14, 3, None, args))
        for seed in (0, 1)
    ]
    for seed, (iql, behavior) in enumerate(theirs):
        torch.nn.init.normal_(iql.q[0].q0_target.q2[2].weight)  # it is Q's at first
        save(tmp_path, seed, iql.q[0].state_dict(), behavior.state_dict())
    critic, behavior = take(tmp_path, [0, 1])
    s, a, t = torch.randn(2, 50, 11), torch.randn(2, 50, 3), torch.rand(2, 50)
    for i, (iql, theirs_behavior) in enumerate(theirs):
        their, noise_model = iql.q[0], theirs_behavior.diffusion_behavior.eval()
        for ours, y in (
            (critic.value(s), their.vf(s[i])[:, 0]),
            (critic.q(s, a), torch.cat(their.q0.both(a[i], s[i]), 1).T),
            (critic.q_target(s, a), torch.cat(their.q0_target.both(a[i], s[i]), 1).T),
            (behavior.noise_model(a, s, t), noise_model(a[i], t[i], s[i])),
        ):
            torch.testing.assert_close(ours[i], y, atol=2e-5, rtol=0)
