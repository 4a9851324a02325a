"""The authors' checkpoints (github.com/thu-ml/SRPO) as weights of this code."""

import torch
from torch.utils.data import default_collate

from data import UserError
from srpo import builders

CHECKPOINTS = {  # the last of each stage; what the names of a network begin with
    "critic_ckpt150": {"value": "vf.v.", "q": "q0.", "q_target": "q0_target."},
    "behavior_ckpt200": {"noise_model": "diffusion_behavior."},
}
NAMES = {  # our part of a name: theirs
    **{"twins.0": "q1", "twins.1": "q2", "frequencies": "embed.0.W"},
    **{"embed_time": "cond_model", "blocks": "main.blocks", "norm": "layer_norm"},
    **{"input": "main.fc", "mlp.0": "fc1", "mlp.2": "fc2", "output.1": "main.out_fc"},
}


def fill(state, theirs, prefix, a_dim):
    """Takes the tensors of our state dict out of a checkpoint of theirs."""
    for key, like in state.items():
        name = key
        for pair in NAMES.items():
            name = name.replace(*pair)
        x = theirs.pop(prefix + name).float()
        if x.shape != like.shape or not x.isfinite().all():
            raise ValueError(f"{prefix}{name} is not {[*like.shape]} finite numbers")
        is_q = name in ("q1.0.weight", "q2.0.weight")  # theirs reads a, s, ours s, a
        state[key] = x.roll(-a_dim, -1) if is_q else x


def released_checkpoints(folder, task, seeds, settings, sizes):
    """{stage: weights} of the authors' critic and behavior model, or UserError."""
    with torch.device("meta"):  # for shapes alone
        ours = {name: build() for name, build in builders(settings, *sizes).items()}
    ours["q_target"], stages = ours["q"], {}
    for file, parts in CHECKPOINTS.items():
        each = []
        for seed in seeds:
            path = folder / f"{task}-baseline-seed{seed}" / f"{file}.pth"
            try:
                theirs = torch.load(path, map_location="cpu", weights_only=True)
                each.append({name: ours[name].state_dict() for name in parts})
                for name, prefix in parts.items():
                    fill(each[-1][name], theirs, prefix, sizes[1])
                if more := [name for name in theirs if ".residual." not in name]:
                    raise ValueError(f"{more[0]} is beyond our networks")
            except Exception as error:  # damaged files fail in many ways
                reason = f"{type(error).__name__} {error}"[:120]
                raise UserError(f"--reuse: {path} does not fit ({reason})") from None
        stages[file.split("_")[0]] = default_collate(each)  # stacked, the seeds first
    return stages
