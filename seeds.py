"""Many seeds side by side, which a reader of the paper may skip: networks with stacked
weights, random numbers of a generator a seed, steps compiled and as a CUDA graph.
"""

import gc
import warnings

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap

GRAPH_STEPS = 25  # steps of one CUDA graph launch


def generator(seed, purpose, device="cpu"):
    """A random generator, a function of the seed and its purpose, a word."""
    number = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1)[0]
    return torch.Generator(device).manual_seed(int(number))


def draw(generators, method, *shape, dtype=torch.float32, **how):
    """[seeds, *shape]: what a tensor's in-place method, such as normal_, fills in; a
    generator a seed, so that each trains as if alone.
    """
    device = generators[0].device
    numbers = torch.empty(len(generators), *shape, dtype=dtype, device=device)
    for row, generator in zip(numbers, generators):
        getattr(row, method)(**how, generator=generator)
    return numbers


class Mish(nn.Module):
    """nn.Mish as is fastest; compiled, that is by one exponential, in a tenth of the
    time on a CPU: x n / (n + 2), n = eˣ (eˣ + 2).
    """

    def forward(self, x):
        if not torch.compiler.is_compiling():
            return x * torch.tanh(nn.functional.softplus(x))
        e = x.clamp(max=20).exp()  # beyond 20, n / (n + 2) is 1
        n = e * (e + 2)
        return x * (n / (n + 2))


class Networks(nn.Module):
    """A network of each seed, as one module: its weights, inputs and outputs have the
    seeds first. `network` holds the weights under the names of a single one's.
    """

    def __init__(self, build, seeds, purpose, copies=None):
        """build(): a new network; copies: of each, along a second axis."""
        super().__init__()
        states, self.axes = [], 2 if copies else 1
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.set_rng_state(generator(seed, purpose).get_state())
                self.network = build().eval()
                states.append(self.network.state_dict())
        for name in states[0]:
            x = torch.stack([state[name] for state in states])  # [seeds, ...]
            x = torch.stack(copies * [x], 1) if copies else x  # [seeds, copies, ...]
            owner, _, leaf = name.rpartition(".")
            owner = self.network.get_submodule(owner)
            is_weight = isinstance(getattr(owner, leaf), nn.Parameter)
            setattr(owner, leaf, nn.Parameter(x) if is_weight else x)
        for module in list(self.network.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.Mish):
                    setattr(module, name, Mish())

    def forward(self, *inputs):
        def call(tensors, inputs):
            return functional_call(self.network, tensors, inputs)

        for _ in range(self.axes):
            call = vmap(call)
        return call(self.network.state_dict(keep_vars=True), inputs)


class Steps:
    """Takes a loop's steps: one by one, or on a GPU many at a time, as a CUDA graph."""

    def __init__(self, step, generators, use_graph):
        self.step, self.generators, self.use_graph = step, generators, use_graph
        self.graph = None

    def take(self, most):
        """Takes at most `most` steps without waiting for the device; how many."""
        if not self.use_graph or most < GRAPH_STEPS:
            self.step()
            return 1
        if self.graph is None:
            return self.record()
        self.graph.replay()
        return GRAPH_STEPS

    def record(self):
        """Takes three steps to warm up, then records a graph of GRAPH_STEPS."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        gc.collect()  # an earlier graph, freed during the capture, would spoil it
        try:
            for generator in self.generators:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(GRAPH_STEPS):
                    self.step()
            self.graph = graph
        except RuntimeError as error:  # an older driver, or another PyTorch
            self.use_graph = False
            warnings.warn(
                f"no CUDA graph, which costs speed only: {error}", stacklevel=2
            )
        return 3


def compiled(losses):
    """torch.compile, with private settings, of which only the speed depends.

    recompute_views: else ReLU's masks are stored as bytes, on a CPU slower than all the
    rest. trace_autograd_ops: else ∇Q splits a step once more.
    """
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch

    for config, name in (functorch, "recompute_views"), (dynamo, "trace_autograd_ops"):
        if hasattr(config, name):
            setattr(config, name, True)
    return torch.compile(losses, dynamic=False)
