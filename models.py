"""The networks of App. C, the seed axis they may carry, and random numbers that are a function of an address.

Every module is ordinary one-network code. `stack` puts networks of one shape into a single module by giving
each parameter a leading axis; the same forward pass then runs all of them side by side. Shapes: states s
[*seeds, B, S], actions [*seeds, B, A], times t [*seeds, B], values [*seeds, B]. Needs nothing but torch.
"""
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

HAS_ONEDNN = torch.backends.mkldnn.is_available()


@torch.library.custom_op("srpo::product", mutates_args=(), device_types="cpu")
def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x Wᵀ of float32 by oneDNN, [*seeds, B, O]: on AMD with AVX-512 twice as fast as F.linear."""
    if weight.dim() > 2:
        return torch.stack([product(*pair) for pair in zip(x, weight)])
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def product_slopes(ctx, slope):
    x, weight = ctx.saved_tensors
    return product(slope, weight.mT), product(slope.mT, x.mT)


product.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], weight.shape[-2]))
product.register_autograd(product_slopes, setup_context=lambda ctx, inputs, output:
                          ctx.save_for_backward(*inputs))


class Linear(nn.Linear):
    """nn.Linear whose weight and bias may carry leading axes; the matrix product runs in `precision`."""

    precision = None  # torch.bfloat16 rounds operands and product to it; weights and bias stay float32

    def forward(self, x):
        weight = self.weight
        if self.precision is not None:
            x, weight = x.to(self.precision), weight.to(self.precision)
        elif (torch.compiler.is_compiling() and HAS_ONEDNN and x.device.type == "cpu"
              and x.dtype == torch.float32 and x.numel() * self.out_features >= 2**22):  # less gains nothing
            return product(x.expand(*weight.shape[:-2], *x.shape[-2:]), weight) + self.bias.unsqueeze(-2)
        if weight.dim() == 2 and self.precision is None:
            return F.linear(x, weight, self.bias)
        return (x @ weight.mT).to(self.bias.dtype) + self.bias.unsqueeze(-2)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm whose weight and bias may carry leading axes."""

    def forward(self, x):
        x = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        return x * self.weight.unsqueeze(-2) + self.bias.unsqueeze(-2)


def mish(x):
    """x tanh(softplus(x)), shaped like x; compiled with one exponential: x n / (n + 2), n = eˣ (eˣ + 2)."""
    if not torch.compiler.is_compiling():
        return F.mish(x)
    e = x.clamp(max=20).exp()  # beyond 20, n / (n + 2) is 1 in float32
    n = e * (e + 2)
    return x * (n / (n + 2))


class Mish(nn.Module):
    def forward(self, x):
        return mish(x)


def mlp(sizes, activation=nn.ReLU, last=None):
    """The layers of a multi-layer perceptron: Linear, activation, ..., Linear and, if given, `last`."""
    layers = [layer for i, o in zip(sizes, sizes[1:]) for layer in (Linear(i, o), activation())]
    return layers[:-1] + ([last()] if last else [])


class Value(nn.Sequential):
    """V_ζ(s): [*seeds, B]. Two hidden layers of 256, ReLU (App. C)."""

    def __init__(self, s_dim, width=256):
        super().__init__(*mlp([s_dim, width, width, 1]))

    def forward(self, s):
        return super().forward(s).squeeze(-1)


class TwinQ(nn.Module):
    """Q_φ(s, a) of two networks: [*seeds, 2, B]. Each has two hidden layers of 256, ReLU (App. C)."""

    def __init__(self, s_dim, a_dim, width=256):
        super().__init__()
        self.twins = stack([nn.Sequential(*mlp([s_dim + a_dim, width, width, 1])) for _ in range(2)])

    def forward(self, s, a):
        return self.twins(torch.cat([s, a], -1).unsqueeze(-3)).squeeze(-1)


class Policy(nn.Sequential):
    """π_θ(s): [*seeds, B, A] in [−1, 1]. Hidden layers of 256, ReLU, tanh: two, in AntMaze four (App. C)."""

    def __init__(self, s_dim, a_dim, width=256, layers=2):
        super().__init__(*mlp([s_dim] + [width] * layers + [a_dim], last=nn.Tanh))


class ResidualBlock(nn.Module):
    """x + MLP(LayerNorm(dropout(x))), the block of IDQL (Hansen-Estruch et al., 2023; App. C)."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = LayerNorm(width), Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x, keep=None, dropout=0.1):
        kept = x if keep is None else torch.where(keep, x / (1 - dropout), 0.0)
        return x + self.down(mish(self.up(self.norm(kept))))


class NoiseModel(nn.Module):
    """ε_ψ(a_t | s, t): [*seeds, B, A]. Three residual blocks of two layers: the "6-layer MLP" of App. C.

    Dropout acts only where `keep`, a mask [*seeds, blocks, B, width], says which units stay.
    """

    def __init__(self, s_dim, a_dim, width=256, blocks=3):
        super().__init__()
        self.register_buffer("frequencies", 30.0 * torch.randn(32))  # Gaussian Fourier; 32, 30: released code
        self.time = nn.Sequential(*mlp([64, 128, 128], Mish))
        self.input = Linear(a_dim + s_dim + 128, width)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.output = Linear(width, a_dim)

    def forward(self, a_t, s, t, keep=None, dropout=0.1):
        phase = 2 * math.pi * t.unsqueeze(-1) * self.frequencies.detach().unsqueeze(-2)  # [*seeds, B, 32]
        time = self.time(torch.cat([phase.sin(), phase.cos()], -1))  # [*seeds, B, 128]
        x = self.input(torch.cat([a_t, s, time], -1))  # [*seeds, B, width]
        for i, block in enumerate(self.blocks):
            x = block(x, None if keep is None else keep[..., i, :, :], dropout)
        return self.output(mish(x))


def stack(networks):
    """One module from networks of one shape: every parameter and buffer gains a leading axis."""
    stacked = copy.deepcopy(networks[0])
    for kind in (nn.Module.parameters, nn.Module.buffers):
        for mine, theirs in zip(kind(stacked), zip(*map(kind, networks))):
            mine.data = torch.stack([tensor.data for tensor in theirs])
    return stacked


def fresh(seeds, purpose, build):
    """`stack` of one newly initialized network per seed, its weights a function of (seed, purpose) alone."""
    networks = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed << 8 | purpose)
            networks.append(build())
    return stack(networks)


class Layout:
    """How a network's tensors lie one behind the other in a flat vector [*seeds, P].

    Optimizer, target network and checkpoint then handle one tensor, whatever the network. Each of the
    network's tensors starts at a multiple of 32 numbers, as fast matrix products want it.
    """

    def __init__(self, build):
        """build(): one network; this one's weights don't matter, its shapes and forward pass do."""
        self.build, self.network = build, build()
        self.shapes = {name: tensor.shape for name, tensor in self.network.state_dict().items()}
        self.sizes = [-(-shape.numel() // 32) * 32 for shape in self.shapes.values()]

    def fresh(self, seeds, purpose):
        """[seeds, P]: newly initialized weights."""
        return self.flatten(fresh(seeds, purpose, self.build).state_dict())

    def flatten(self, tensors):
        """{name: [*seeds, ...]} as [*seeds, P], the gaps filled with zeros; ValueError for other shapes."""
        if any(tensors[name].shape[-len(shape):] != shape for name, shape in self.shapes.items()):
            raise ValueError("these tensors are of a network of another shape")
        rows = [tensors[name].flatten(-len(shape)) for name, shape in self.shapes.items()]
        return torch.cat([F.pad(row, (0, size - row.shape[-1])) for row, size in zip(rows, self.sizes)], -1)

    def tensors(self, flat):
        """[*seeds, P] as {name: [*seeds, ...]}, views of it: a state dict."""
        pieces = flat.split(self.sizes, -1)
        return {name: piece[..., :shape.numel()].unflatten(-1, shape)
                for (name, shape), piece in zip(self.shapes.items(), pieces)}

    def copies(self, flat):
        """`tensors` to save: on the CPU, and no views."""
        return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in self.tensors(flat).items()}

    def bind(self, flat):
        """The network as a function of its inputs, with the weights that `flat` holds."""
        tensors = self.tensors(flat)
        return lambda *inputs, **options: torch.func.functional_call(
            self.network, tensors, inputs, options, tie_weights=False)


def mix(x):
    """A bijective hash of 32-bit words (lowbias32), on int32 tensors: the same bits on every device."""
    # Products are formed in 64 bits, since a compiled signed 32-bit overflow is undefined (of a sum too, but
    # only its low 32 bits count); & drops >>'s sign.
    x = ((x ^ ((x >> 16) & 0xFFFF)).long() * 0x7FEB352D).int()
    x = ((x ^ ((x >> 15) & 0x1FFFF)).long() * (0x846CA68B - 2**32)).int()
    return x ^ ((x >> 16) & 0xFFFF)


class Draw:
    """Random numbers that are a function of (seed, step, purpose, element), whatever else is drawn.

    seed: int32, [*seeds]; step: int32, []; purpose: a small int above 0, counted from `base`. Results have
    shape [*seeds, *shape].
    """

    def __init__(self, seed, step, base=0):
        self.seed, self.step, self.base = seed, step, base

    def bits(self, purpose, shape):
        """int32, uniform over all 32 bits."""
        purpose = purpose + self.base if purpose > 0 else purpose - self.base
        first = mix(mix(self.seed + purpose) + self.step).unsqueeze(-1)
        second = mix(mix(self.step + purpose) + self.seed).unsqueeze(-1)  # one word would make streams shifts
        element = torch.arange(math.prod(shape), dtype=torch.int32, device=self.seed.device)
        return mix(mix(element + first) + second).unflatten(-1, shape)

    def index(self, purpose, shape, high):
        """int64, uniform over 0 ... high − 1. A 24-bit float times a large `high` would favour some rows."""
        return ((self.bits(purpose, shape).long() & 0xFFFFFFFF) * high) >> 32

    def uniform(self, purpose, shape):
        """float32, uniform over (0, 1]."""
        return (((self.bits(purpose, shape) >> 8) & 0xFFFFFF).float() + 0.5) * 2.0**-24

    def normal(self, purpose, shape):
        """float32, standard normal (Box and Muller)."""
        radius = (-2 * self.uniform(purpose, shape).log()).sqrt()
        return radius * (2 * math.pi * self.uniform(-purpose, shape)).cos()

    def keep(self, purpose, shape, dropout=0.1):
        """bool, true with probability 1 − dropout."""
        return self.bits(purpose, shape) >= int(dropout * 2**32) - 2**31
