"""Seconds that a layer takes in an engine, by a model with seven constants, fitted to measurements.

A layer of `tokens` tokens takes

    read * weights touched + product * multiply-adds + routed * multiply-adds in routed experts
        + call * experts touched + row * values carried to experts and back + layer,
        and + block if it has experts

so narrow experts cost by their number (calls) and by the rows that go to each of them. The weights
of an expert are touched when any token goes to it. `recipes/benchmarks/widths.py fit` prints the
constants and their error, which recipes/results/shapes.md shows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from moefy.types import Shape


@dataclass(frozen=True)
class Layer:
    """The sizes of a dense layer that decide its time."""

    hidden: int
    """D."""
    num_neurons: int
    """F."""
    other_weights: int
    """Weights outside the FFN: the attention's."""
    num_matrices: int = 3
    """Of the FFN: 3 where it is gated, else 2."""


@dataclass(frozen=True)
class Cost:
    """What things take in an engine, in nanoseconds."""

    read: float
    product: float
    routed: float
    """More for a product in a routed expert, whose tokens lie anywhere."""
    call: float
    row: float
    layer: float
    block: float

    def seconds(self, layer: Layer, shape: Shape | None, tokens: int) -> float:
        """Of a layer with this shape (None: dense) for so many tokens at once."""
        counted = zip(dataclasses.astuple(self), counts(layer, shape, tokens), strict=True)
        return 1e-9 * sum(price * count for price, count in counted)


def counts(layer: Layer, shape: Shape | None, tokens: int) -> tuple[float, ...]:
    """How often each constant of a `Cost` counts."""
    neuron = layer.num_matrices * layer.hidden
    if shape is None or shape.num_experts == 0:
        weights = layer.other_weights + layer.num_neurons * neuron
        return (weights, tokens * weights, 0, 0, 0, 1, 0)
    unused = (1 - shape.experts_per_token / shape.num_experts) ** tokens
    touched = shape.num_experts * (1 - unused)
    router = layer.hidden * shape.num_experts
    weights = layer.other_weights + router
    return (
        weights + (shape.num_shared + touched * shape.expert_width) * neuron,
        tokens * (weights + shape.num_active * neuron),
        tokens * shape.experts_per_token * shape.expert_width * neuron,
        touched,
        tokens * shape.experts_per_token * layer.hidden,
        1,
        1,
    )


def ideal(layer: Layer, shape: Shape) -> float:
    """How much faster the layer would be if only multiply-adds took time."""
    return counts(layer, None, 1)[1] / counts(layer, shape, 1)[1]


COSTS = {
    "transformers": Cost(0.191, 0.0117, 0.0, 1.59e4, 4.79, 8.84e5, 4.22e5),
    "llama.cpp": Cost(0.0164, 0.0327, 0.00927, 0.0, 6.34, 7.08e4, 0.0),
    "vLLM": Cost(0.124, 0.00967, 0.0113, 0.0, 1.69, 2.52e5, 1.61e4),
}
"""By engine: transformers and vLLM in bfloat16, llama.cpp in q8_0, on one thread of an AMD EPYC
with AVX512-BF16. In transformers a product costs the same in an expert, to the error of the fit."""

MEASURED = {"Ollama": "llama.cpp", "SGLang": "vLLM", "MLX": "llama.cpp"}
"""Engines that were not measured, and those by whose costs a shape is chosen for them."""

UNITS = {"transformers": 8, "llama.cpp": 32, "vLLM": 64}
"""What expert widths should be multiples of, if they can: for kernels, and for the blocks of 32 in
which q8_0 and q4_0 pack weights."""
