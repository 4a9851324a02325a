"""Many seeds at once, which a reader of the paper may skip: srpo.py writes the losses of one seed. Here are
flat weights, random numbers by address, and the loop that runs all seeds, compiled, on a GPU as a CUDA graph.
"""

import gc
import math
import warnings
from functools import partial

import torch
import torch.nn.functional as F

GRAPH_STEPS = 25  # steps of one CUDA graph launch


class Layout:
    """How a network's tensors lie one behind the other in a flat vector [*seeds, P].

    Optimizer, target network and checkpoint then handle one tensor, whatever the network. Each of the
    network's tensors starts at a multiple of 32 numbers, as fast matrix products want it.
    """

    def __init__(self, build):
        """build(): a new network, with random weights."""
        self.build = build
        with torch.device("meta"):
            self.network = build().eval()
        self.shapes = {
            name: tensor.shape for name, tensor in self.network.state_dict().items()
        }
        self.sizes = [-(-shape.numel() // 32) * 32 for shape in self.shapes.values()]
        self.size = sum(self.sizes)

    def fresh(self, seeds, purpose):
        """[seeds, P]: newly initialized weights of each seed, a function of (seed, purpose) alone."""
        rows = []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.manual_seed(seed << 8 | purpose)
                rows.append(self.flatten(self.build().state_dict()))
        return torch.stack(rows)

    def flatten(self, tensors):
        """{name: [*seeds, ...]} as [*seeds, P], the gaps filled with zeros; ValueError for other shapes."""
        if any(
            tensors[name].shape[-len(shape) :] != shape
            for name, shape in self.shapes.items()
        ):
            raise ValueError("these tensors are of a network of another shape")
        rows = [
            tensors[name].flatten(-len(shape)) for name, shape in self.shapes.items()
        ]
        return torch.cat(
            [
                F.pad(row, (0, size - row.shape[-1]))
                for row, size in zip(rows, self.sizes)
            ],
            -1,
        )

    def tensors(self, flat):
        """[*seeds, P] as {name: [*seeds, ...]}, views of it: a state dict."""
        pieces = zip(self.shapes.items(), flat.split(self.sizes, -1))
        return {
            name: piece[..., : shape.numel()].unflatten(-1, shape)
            for (name, shape), piece in pieces
        }

    def copies(self, flat):
        """`tensors` to save: on the CPU, and no views."""
        return {
            name: tensor.to("cpu", copy=True).contiguous()
            for name, tensor in self.tensors(flat).items()
        }

    def bind(self, flat):
        """The network as a function of its inputs, with the weights [P] that `flat` holds."""
        tensors = self.tensors(flat)
        return lambda *inputs: torch.func.functional_call(self.network, tensors, inputs)


def mix(x):
    """A bijective hash of 32-bit words (lowbias32), on int32 tensors: the same bits on every device."""
    # Products are formed in 64 bits, since a compiled signed 32-bit overflow is undefined (of a sum too, but
    # only its low 32 bits count); & drops >>'s sign.
    x = ((x ^ ((x >> 16) & 0xFFFF)).long() * 0x7FEB352D).int()
    x = ((x ^ ((x >> 15) & 0x1FFFF)).long() * (0x846CA68B - 2**32)).int()
    return x ^ ((x >> 16) & 0xFFFF)


class Draw:
    """Random numbers [*seeds, *shape], functions of (seed, step, purpose, element), whatever else is drawn.

    seed: int32, [*seeds]; step: int32, []; purpose: a small int.
    """

    def __init__(self, seed, step):
        self.seed, self.step = seed, step

    def bits(self, purpose, shape):
        """int32, uniform over all 32 bits."""
        first = mix(mix(self.seed + purpose) + self.step).unsqueeze(-1)
        second = mix(mix(self.step + purpose) + self.seed).unsqueeze(
            -1
        )  # one word would make streams shifts
        element = torch.arange(
            math.prod(shape), dtype=torch.int32, device=self.seed.device
        )
        return mix(mix(element + first) + second).unflatten(-1, shape)

    def index(self, purpose, shape, high):
        """int64, uniform over 0 ... high − 1. A 24-bit float times a large `high` would favor some rows."""
        return ((self.bits(purpose, shape).long() & 0xFFFFFFFF) * high) >> 32

    def uniform(self, purpose, shape):
        """float32, uniform over (0, 1]."""
        return (((self.bits(purpose, shape) >> 8) & 0xFFFFFF).float() + 0.5) * 2.0**-24

    def normal(self, purpose, shape):
        """float32, standard normal (Box and Muller)."""
        radius, angle = self.uniform(purpose, (2, *shape)).unbind(-len(shape) - 1)
        return (-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()

    def keep(self, purpose, shape, dropout):
        """bool, true with probability 1 − dropout."""
        return self.bits(purpose, shape) >= int(dropout * 2**32) - 2**31


class Loop:
    """A gradient loop over all seeds. `state` has every tensor that belongs to a seed, the seed axis first.

    A subclass has draw(state), a step's random inputs; losses(theta, state, *inputs) of one seed, scalars
    whose sum is descended; and update(state, losses, gradient). Such a step is closed: it reads and writes
    tensors whose addresses never change, so that it can be compiled, recorded as a graph and resumed.
    """

    def __init__(self, state, device, side_by_side=True):
        """side_by_side: False where the activations of all seeds together would leave a CPU's cache."""
        self.state = {name: tensor.to(device) for name, tensor in state.items()}
        self.count = torch.zeros((), dtype=torch.int32, device=device)  # steps taken
        self.functions, self.graph = (self.draw, self.gradient, self.update), None
        self.turns = [self.state]  # what a step does one after the other
        if not side_by_side:  # views of each seed
            seeds = range(len(self.state["theta"]))
            self.turns = [
                {name: x[i : i + 1] for name, x in self.state.items()} for i in seeds
            ]

    def gradient(self, state, *inputs):
        """The losses [seeds, losses], and the gradient of each seed's sum [seeds, P]."""

        def of_one_seed(theta, state, inputs):
            losses = torch.stack(self.losses(theta, state, *inputs))
            return losses.sum(), losses

        of_all = torch.func.vmap(torch.func.grad(of_one_seed, has_aux=True))
        gradient, losses = of_all(state["theta"], state, inputs)
        return losses, gradient

    def watched(self, state, *inputs):
        """What is worth watching of one seed, {name: scalar}."""
        return {}

    @torch.no_grad()
    def watch(self):
        """`watched` on the inputs of the next step, {name: [seeds]}."""
        of_all = torch.func.vmap(lambda state, inputs: self.watched(state, *inputs))
        parts = [of_all(state, self.draw(state)) for state in self.turns]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def step(self, functions=None):
        draw, gradient, update = functions or self.functions
        for state in self.turns:
            update(state, *gradient(state, *draw(state)))
        self.count.add_(1)

    def advance(self, steps):
        """Takes at most `steps` steps without waiting for the device; returns how many."""
        if not self.count.is_cuda or steps < GRAPH_STEPS:
            self.step()
            return 1
        if self.graph is None:
            return self.record()
        self.graph.replay()
        return GRAPH_STEPS

    def record(self):
        """Takes three steps, then records GRAPH_STEPS of them as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # the graph of an earlier stage, if freed during a capture, would spoil it
        gc.disable()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(GRAPH_STEPS):
                    self.step()
        finally:
            gc.enable()
        self.graph = graph
        return 3

    def run(self, steps):
        while steps > 0:
            steps -= self.advance(steps)

    def compile(self):
        """Compiles the step and takes one; where that fails, the step stays as it was."""
        # Apart, since in one function every use of a random number would compute it anew. Stored from five
        # operations on, not thirty, a hash is traced in linear time, and Adam's expm1 is computed once.
        stored = {"realize_opcount_threshold": 4}
        how = partial(torch.compile, fullgraph=True, dynamic=False)
        draw, gradient, update = self.functions
        compiled = how(draw, options=stored), how(gradient), how(update, options=stored)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", module="torch.jit"
            )  # PyTorch's own, of itself
            self.step(
                compiled
            )  # where it fails, nothing is written before the last one is compiled
        self.functions = compiled
