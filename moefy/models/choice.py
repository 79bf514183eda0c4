"""The shape that a conversion takes by default: the least loss among those that run fast enough."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb, log2
from statistics import fmean
from typing import Any

from moefy.models.cost import COSTS, MEASURED, UNITS, Layer, ideal
from moefy.models.families.family import Family
from moefy.types import Shape

COUNTS = (128, 64, 56, 48, 32, 16, 8)
"""Numbers of experts: powers of two, where softmax gates of 1 / E are exact, and two for FFNs that
64 does not divide well."""

OTHER_COUNTS = (40, 28, 24, 20, 14, 12, 10, 9, 7, 6, 5, 4)
"""Those that are tried where none of the first divides the FFN."""

NARROWEST = 16
"""Neurons: no kernel is made for narrower experts."""

SHARED = (1 / 8, 1 / 2)
"""Share of the FFN that is always on, least and most. Between them loss was flat where the router
had as much choice (recipes/results/shapes.md)."""

ROUTED = 0.2
"""Share of the active neurons that are routed at least."""

LOWER = 0.03
"""How far below the fraction that was asked for the active one may lie. It is never above."""

SLACK = 1.05
"""A shape may take this many times what the fastest takes."""

PHASES = (512, 1)
"""Tokens at once: in a prompt, and in decoding at batch 1."""

BITS, PER_DOUBLING, POWER = 40.0, 0.05, 1.15
"""Loss falls by 5 % with every doubling of the bits of choice, up to 40 bits, and grows with this
power of the share of neurons that do not run. Pairs of conversions that differ in shape alone gave
4 to 8 %, and none gained above 40 bits (recipes/results/shapes.md)."""

CLEAR = 0.98
"""A shape is finer if it is expected to lose less than this part."""

SMALLEST = 512
"""FFN neurons: smaller FFNs were not measured, and the chooser leaves them alone."""

DEFAULT_ENGINE = "transformers"
"""What a shape is chosen for where no engine is named: every result runs in it."""


@dataclass(frozen=True)
class Choice:
    """A shape, and what it is expected to cost."""

    layer: Layer
    engines: tuple[str, ...]
    shape: Shape
    time: float
    """Of the layer, as a part of the dense layer's, mean over phases and engines."""
    finer: Shape | None
    """The fastest shape of clearly less expected loss."""

    def __str__(self) -> str:
        """One line for plan and report."""
        engines = ", ".join(self.engines)
        line = f"shape chosen for {engines}: {1 / self.time:.2f} times dense expected"
        line += f", {ideal(self.layer, self.shape):.2f} by multiply-adds"
        if self.finer is None:
            return f"{line}; none finer loses less"
        less = 1 - expected_loss(self.finer) / expected_loss(self.shape)
        more = relative_time(self.layer, self.finer, self.engines) / self.time - 1
        return f"{line}; {self.finer} would lose about {less:.0%} less and take {more:.0%} longer"


def layer_sizes(family: Family, config: Mapping[str, Any], entries: Mapping[str, Any]) -> Layer:
    """The sizes of a model's first layer; `entries` are the headers of its tensors by name."""
    first, ffn = family.layer.format(layer=0), family.ffn_names(0)
    other = sum(
        entry.num_elements
        for name, entry in entries.items()
        if name.startswith(first) and name not in ffn
    )
    matrices = 3 if family.gated else 2
    return Layer(config["hidden_size"], family.num_neurons(config), other, matrices)


def bits_of_choice(shape: Shape) -> float:
    """log2 of the number of sets of experts that a token can be sent to.

    >>> round(bits_of_choice(Shape(1536, 512, 8, 128, 2)), 1)
    4.8
    """
    return log2(comb(shape.num_experts, shape.experts_per_token))


def expected_loss(shape: Shape) -> float:
    """Loss relative to other shapes of the same FFN; no unit."""
    bits = min(max(bits_of_choice(shape), 1.0), BITS)
    return (1 - shape.active_fraction) ** POWER * (1 - PER_DOUBLING) ** log2(bits)


def relative_time(layer: Layer, shape: Shape, engines: Sequence[str]) -> float:
    """Time of the layer as a part of the dense one's, mean over phases and engines."""
    engines = [MEASURED.get(name, name) for name in engines]
    return fmean(
        COSTS[engine].seconds(layer, shape, tokens) / COSTS[engine].seconds(layer, None, tokens)
        for engine in engines
        for tokens in PHASES
    )


def over_ideal(layer: Layer, shape: Shape, engines: Sequence[str]) -> float:
    """The same, times what its multiply-adds allow: so shapes compare that run more and less."""
    return relative_time(layer, shape, engines) * ideal(layer, shape)


def choose(
    layer: Layer, active: float, fits: Callable[[Shape], bool], engines: Sequence[str]
) -> Choice | None:
    """The shape of least expected loss among those within 5 % of the fastest in these engines, for
    as many multiply-adds.

    With no engine named, transformers counts. None for an FFN that is too small or that no
    candidate divides, or where all neurons are to run.
    """
    if layer.num_neurons < SMALLEST or active >= 1:
        return None
    engines = [MEASURED.get(name, name) for name in engines] or [DEFAULT_ENGINE]
    for any_width, counts in itertools.product((False, True), (COUNTS, OTHER_COUNTS)):
        possible = candidates(layer.num_neurons, active, fits, counts)
        if shapes := [shape for shape in possible if any_width or _suits(shape, engines)]:
            break
    else:
        return None
    excess = {shape: over_ideal(layer, shape, engines) for shape in shapes}
    most = SLACK * min(excess.values())
    order = sorted(shapes, key=lambda shape: (round(expected_loss(shape), 4), excess[shape]))
    best = next(shape for shape in order if excess[shape] <= most)
    finer = [shape for shape in order if expected_loss(shape) < CLEAR * expected_loss(best)]
    dearer = min(finer, key=lambda shape: excess[shape], default=None)
    time = relative_time(layer, best, engines)
    return Choice(layer, tuple(engines), best, time, dearer)


def _suits(shape: Shape, engines: Sequence[str]) -> bool:
    """Whether kernels and formats of the engines like a shape."""
    unit = max(UNITS[engine] for engine in engines)
    counts_two = shape.num_experts & (shape.num_experts - 1) == 0
    return shape.expert_width % unit == 0 and (counts_two or "vLLM" not in engines)


def candidates(
    num_neurons: int, active: float, fits: Callable[[Shape], bool], counts: Sequence[int]
) -> Iterator[Shape]:
    """Shapes that divide the FFN, are alike active, and share and route enough."""
    for count in counts:
        for width in range(NARROWEST, num_neurons // count + 1, 8):
            num_shared = num_neurons - count * width
            per_token = int((active * num_neurons - num_shared) / width + 1e-6)
            if not 0 < per_token < count:
                continue
            shape = Shape(num_neurons, num_shared, count, width, per_token)
            routed = per_token * width / shape.num_active
            least, most = SHARED
            if (
                active - LOWER <= shape.active_fraction
                and routed >= ROUTED
                and (not num_shared or least <= num_shared / num_neurons <= most)
                and fits(shape)
            ):
                yield shape
