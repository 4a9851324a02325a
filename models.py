"""The networks of App. C, each an ordinary module: V, the twin Q, the policy and the noise model.

Shapes: states s [B, S], actions a and a_t [B, A], times t [B] in [0, 1]. Needs nothing but torch.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Mish(nn.Module):
    """x tanh(softplus(x)); compiled, with one exponential: x n / (n + 2), n = eˣ (eˣ + 2)."""

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return x * torch.tanh(
                F.softplus(x)
            )  # of nn.Mish torch.func.grad takes a slower gradient
        e = x.clamp(max=20).exp()  # beyond 20, n / (n + 2) is 1
        n = e * (e + 2)
        return x * n / (n + 2)


def mlp_layers(sizes, activation=nn.ReLU):
    """The layers of a multi-layer perceptron: Linear, activation, ..., Linear."""
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [nn.Linear(inputs, outputs), activation()]
    return layers[:-1]


class Value(nn.Sequential):
    """V_ζ(s): [B]. Two hidden layers of 256, ReLU (App. C)."""

    def __init__(self, s_dim, width=256):
        super().__init__(*mlp_layers([s_dim, width, width, 1]))

    def forward(self, s):
        return super().forward(s).squeeze(-1)


class TwinQ(nn.Module):
    """Q_φ(s, a) of two networks: [2, B]. Each has two hidden layers of 256, ReLU (App. C; twins: IQL)."""

    def __init__(self, s_dim, a_dim, width=256):
        super().__init__()
        sizes = [s_dim + a_dim, width, width, 1]
        self.twins = nn.ModuleList(nn.Sequential(*mlp_layers(sizes)) for _ in range(2))

    def forward(self, s, a):
        sa = torch.cat([s, a], -1)
        return torch.stack([twin(sa).squeeze(-1) for twin in self.twins], -2)  # [2, B]


class Policy(nn.Sequential):
    """π_θ(s): [B, A] in [−1, 1]. Two hidden layers of 256, in AntMaze four, ReLU (App. C); then tanh."""

    def __init__(self, s_dim, a_dim, width=256, layers=2):
        super().__init__(*mlp_layers([s_dim] + [width] * layers + [a_dim]), nn.Tanh())


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(dropout(x))), the block of IDQL (Hansen-Estruch et al., 2023; App. C)."""

    def __init__(self, width, dropout=0.1):
        super().__init__()
        self.dropout, self.norm = dropout, nn.LayerNorm(width)
        self.mlp = nn.Sequential(*mlp_layers([width, 4 * width, width], Mish))

    def forward(self, x, keep=None):
        if keep is None:
            dropped = F.dropout(x, self.dropout, self.training)
        else:
            dropped = keep * x / (1 - self.dropout)
        return x + self.mlp(self.norm(dropped))


class NoiseModel(nn.Module):
    """ε_ψ(a_t | s, t): [B, A]. Three residual blocks of two layers, the "6-layer MLP" of App. C, as in IDQL.

    Dropout acts in training mode, as usual. Or a mask keep [blocks, B, width] tells which units stay, in any
    mode: so srpo.py makes dropout a function of (seed, step). A copy elsewhere can do without the mask.
    """

    def __init__(self, s_dim, a_dim, width=256, blocks=3, dropout=0.1):
        super().__init__()
        self.register_buffer(
            "frequencies", 30.0 * torch.randn(32)
        )  # fixed; their number and scale: released
        self.embed_time = nn.Sequential(
            *mlp_layers([64, 128, 128], Mish)
        )  # code, as these sizes and Mish
        self.input = nn.Linear(a_dim + s_dim + 128, width)
        self.blocks = nn.ModuleList(
            ResidualBlock(width, dropout) for _ in range(blocks)
        )
        self.output = nn.Sequential(Mish(), nn.Linear(width, a_dim))

    def forward(self, a_t, s, t, keep=None):
        phase = 2 * math.pi * t.unsqueeze(-1) * self.frequencies  # [B, 32]
        time = self.embed_time(torch.cat([phase.sin(), phase.cos()], -1))  # [B, 128]
        x = self.input(torch.cat([a_t, s, time], -1))  # [B, width]
        for i, block in enumerate(self.blocks):
            x = block(x, None if keep is None else keep[i])
        return self.output(x)
