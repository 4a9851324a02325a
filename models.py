"""The networks of App. C, each an ordinary module: V, twin Q, policy, noise model.

Shapes: states s [B, S], actions a and a_t [B, A], times t [B] in [0, 1]; further axes
may come before B. Needs nothing but torch.
"""

import math

import torch
from torch import nn


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
    """Q_φ(s, a): [2, B], of two networks like V's (App. C; twins: IQL)."""

    def __init__(self, s_dim, a_dim, width=256):
        super().__init__()
        sizes = [s_dim + a_dim, width, width, 1]
        self.twins = nn.ModuleList(nn.Sequential(*mlp_layers(sizes)) for _ in range(2))

    def forward(self, s, a):
        sa = torch.cat([s, a], -1)
        return torch.stack([twin(sa).squeeze(-1) for twin in self.twins], -2)  # [2, B]


class Policy(nn.Sequential):
    """π_θ(s): [B, A] in [−1, 1]. Two hidden layers of 256, in AntMaze four (App. C)."""

    def __init__(self, s_dim, a_dim, width=256, layers=2):
        sizes = [s_dim] + [width] * layers + [a_dim]
        super().__init__(*mlp_layers(sizes), nn.Tanh())


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(dropout(x))), a block of IDQL (Hansen-Estruch et al., 2023)."""

    def __init__(self, width, dropout=0.1):
        super().__init__()
        self.dropout, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)
        self.mlp = nn.Sequential(*mlp_layers([width, 4 * width, width], nn.Mish))

    def forward(self, x, keep=None):
        kept = self.dropout(x) if keep is None else keep * x / (1 - self.dropout.p)
        return x + self.mlp(self.norm(kept))


class NoiseModel(nn.Module):
    """ε_ψ(a_t | s, t): [B, A]. The "6-layer MLP" of App. C: three blocks of two layers.

    Dropout acts in training mode, as usual; or, in any mode, a mask keep [blocks, B,
    width], of random numbers of your own, tells which units stay.
    """

    def __init__(self, s_dim, a_dim, width=256, blocks=3, dropout=0.1):
        super().__init__()
        # fixed; their number and scale, these sizes and Mish are the released code's
        self.register_buffer("frequencies", 30.0 * torch.randn(32))
        self.embed_time = nn.Sequential(*mlp_layers([64, 128, 128], nn.Mish))
        self.input = nn.Linear(a_dim + s_dim + 128, width)
        blocks = [ResidualBlock(width, dropout) for _ in range(blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.output = nn.Sequential(nn.Mish(), nn.Linear(width, a_dim))

    def _apply(self, function, *more):
        """Whatever the weights become, half say, the frequencies stay float32."""
        frequencies = self.frequencies
        super()._apply(function, *more)
        self.frequencies = frequencies.to(self.frequencies.device)  # the new one
        return self

    def forward(self, a_t, s, t, keep=None):
        phase = 2 * math.pi * t.float().unsqueeze(-1) * self.frequencies  # [B, 32]
        features = torch.cat([phase.sin(), phase.cos()], -1).to(a_t.dtype)
        x = self.input(torch.cat([a_t, s, self.embed_time(features)], -1))  # [B, width]
        for i, block in enumerate(self.blocks):
            x = block(x, None if keep is None else keep.select(-3, i))
        return self.output(x)
