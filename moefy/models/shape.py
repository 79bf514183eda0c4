"""Which divisions F = S + E * N of an FFN are possible, and which one answers a request."""

from __future__ import annotations

from collections.abc import Callable

from moefy.errors import MoefyError
from moefy.types import Shape

PREFERRED_EXPERTS = (8, 16, 32, 4, 64, 7, 9, 6, 10, 12, 5, 14, 20, 24, 28, 3, 48, 2, 128)
"""Counts, best first: powers of two, where softmax gates of 1 / E are exact, then others near 8."""

LEAST_PART = 0.1
"""Neurons that are routed at least, as a share of those that run or of those that do not, whichever
are fewer, and that are shared at least where any are, as a share of those that run. With less
routed there is next to nothing to choose; less shared is a matrix product too small to pay."""

ALIGNMENTS = (128, 64, 32, 16, 8)
"""Widths that kernels and quantised formats like, best first; 8 is the least that all run."""

OVERLAPPING = (32, 28, 24, 20, 16, 12, 8, 7, 6, 5, 4, 3, 2)
"""Experts that overlap, most first: more than 8 only of the greatest width."""


TOLERANCE = 0.01
"""How far the active and the shared fraction may be from the requested ones."""


def solve(
    num_neurons: int,
    *,
    active: float = 0.5,
    experts: int | None = None,
    experts_per_token: int | None = None,
    shared: float | None = None,
    fits: Callable[[Shape], bool] | None = None,
    total: float = 1.0,
) -> Shape:
    """The best legal shape for an FFN of `num_neurons` under the given options.

    Options that are None are chosen in this order: neither almost all nor almost none of the active
    neurons shared (`LEAST_PART`); expert widths in multiples of 32, if there are any; 8 experts,
    else the next preferred count; two experts per token, else the next higher number; the widest
    alignment. With all neurons active, all experts are. `fits` says which shapes the target holds;
    by default a shared expert of any width. With a `total` above one experts overlap: 8 experts and
    one per token, or more experts if there is room, as wide as it allows.

    Raises:
        MoefyError: code 2, naming the nearest legal values, when nothing fits.
    """
    _check(num_neurons, active, experts, experts_per_token, shared)
    fits = fits or any_shared

    def answers(shape: Shape) -> bool:
        return (
            fits(shape)
            and abs(shape.active_fraction - active) <= TOLERANCE
            and (shared is None or abs(shape.num_shared / num_neurons - shared) <= TOLERANCE)
        )

    if total > 1:
        k = experts_per_token or 1
        if shape := _overlapping(num_neurons, active, total, experts, k, answers):
            return shape
    else:
        possible = _disjoint(num_neurons, active, experts, experts_per_token)
        if fitting := list(filter(answers, possible)):
            return min(fitting, key=lambda shape: _rank(shape, active))
    asked = {
        "experts": experts,
        "top-k": experts_per_token,
        "shared-fraction": shared,
        "overlap": total if total > 1 else None,
    }
    options = ", ".join(f"--{name} {value}" for name, value in asked.items() if value is not None)
    raise MoefyError(
        f"no split of {num_neurons} FFN neurons has --active {active:g}"
        + (f" with {options}" if options else "")
        + f"; {_nearest(num_neurons, active, experts, fits)}",
        code=2,
    )


def copied(
    num_neurons: int,
    experts: int,
    experts_per_token: int,
    granularity: int,
    shared: float | None,
    fits: Callable[[Shape], bool],
) -> Shape:
    """The shape of so many copies of an FFN in `granularity` slices each, of which so many run.

    A class that must share neurons shares as few as leave experts of a width that kernels like, or
    about the fraction `shared`; the copies then hold all others.

    Raises:
        MoefyError: code 2 for numbers that do not go together.
    """
    _check(num_neurons, 1.0, experts, experts_per_token, shared)
    step, sizes = _step(num_neurons), (experts * granularity, experts_per_token * granularity)
    shapes = [
        Shape(
            num_neurons, num_neurons - width * granularity, sizes[0], width, sizes[1], granularity
        )
        for width in range(step, num_neurons // granularity + 1, step)
    ]
    wanted = num_neurons * (shared or 0.0)
    if fitting := [
        shape
        for shape in shapes
        if fits(shape)
        and (shared is None or abs(shape.num_shared - wanted) <= TOLERANCE * num_neurons)
    ]:
        return min(
            fitting,
            key=lambda s: (-min(alignment(s.expert_width), 32), abs(s.num_shared - wanted)),
        )
    near = sorted({shape.num_shared / num_neurons for shape in shapes if fits(shape)})
    fractions = ", ".join(f"{fraction:.3g}" for fraction in near[:12]) or "none"
    asked = "" if shared is None else f" and --shared-fraction {shared:g}"
    raise MoefyError(
        f"no copies of {num_neurons} FFN neurons have --granularity {granularity}{asked}; possible "
        f"shared fractions: {fractions}; try another --granularity",
        code=2,
    )


def any_shared(shape: Shape) -> bool:
    """A shared expert of any width."""
    return shape.num_shared > 0


def no_shared(shape: Shape) -> bool:
    """No shared expert."""
    return shape.num_shared == 0


def shared_multiple(shape: Shape) -> bool:
    """A shared expert as wide as one or several routed ones."""
    return shape.num_shared > 0 and shape.num_shared % shape.expert_width == 0


def one_shared(shape: Shape) -> bool:
    """A shared expert as wide as a routed one."""
    return shape.num_shared == shape.expert_width


def pruned(shape: Shape) -> Shape:
    """The static control of `shape`: as many neurons as it has active, all of them always on."""
    return Shape(shape.num_neurons, shape.num_active, 0, 0, 0)


def legal(num_neurons: int, num_experts: int, fits: Callable[[Shape], bool]) -> list[Shape]:
    """Every shape with `num_experts` that `fits`, its expert width a multiple of 8 (or F small)."""
    step = _step(num_neurons)
    shapes = [
        _shape(num_neurons, num_experts, width, k)
        for width in range(step, num_neurons // num_experts + 1, step)
        for k in range(1, num_experts + 1)
    ]
    return [shape for shape in shapes if fits(shape)]


def _disjoint(
    num_neurons: int, active: float, experts: int | None, per_token: int | None
) -> list[Shape]:
    """Shapes that divide the FFN and have about this active fraction."""
    return [
        shape
        for count in ((experts,) if experts else PREFERRED_EXPERTS)
        for k in (_routing(count, active) if per_token is None else (per_token,))
        for shape in _near(num_neurons, count, k, active)
    ]


def _overlapping(
    num_neurons: int,
    active: float,
    total: float,
    experts: int | None,
    k: int,
    fits: Callable[[Shape], bool],
) -> Shape | None:
    """The shape that stores most of the FFN's neurons again, at most `total` times, at `active`.

    Of as many experts as there is room for at their widest, of 8 narrower ones where there is room
    for no more, or of the next lower number that has any. SmolLM2-135M at 0.25, three layers dense,
    32,768 tokens: 24 experts of 224 neurons lose 0.995 and 0.723 on prose and code, 8 of them 1.133
    and 0.733 (recipes/results/shapes.md).
    """
    step = _step(num_neurons)
    running = round(active * num_neurons / step) * step
    for count in (experts,) if experts else OVERLAPPING:
        shapes = [
            Shape(num_neurons, running - k * width, count, width, k)
            for width in range(step, running // k + 1, step)
            if k < count
        ]
        possible = [
            shape
            for shape in shapes
            if shape.overlaps
            and shape.num_shared + shape.expert_width <= num_neurons
            and fits(shape)
        ]
        fitting = [shape for shape in possible if shape.num_stored <= total * num_neurons]
        if fitting and (widest := _widest(possible)) in fitting:
            return widest
        if fitting and (experts or count <= 8):
            return _widest(fitting)
    return None


def _widest(shapes: list[Shape]) -> Shape:
    """That of the widest experts, of those whose width kernels like best, up to 32."""
    even = max(min(alignment(shape.expert_width), 32) for shape in shapes)
    return [shape for shape in shapes if shape.expert_width % even == 0][-1]


def _near(num_neurons: int, num_experts: int, k: int, active: float) -> list[Shape]:
    """The legal shapes with `k` experts per token that may have about this active fraction."""
    step, most = _step(num_neurons), num_neurons // num_experts
    least = step
    if idle := num_experts - k:  # F * (1 - active) = idle * N
        least = max(least, int((1 - active - TOLERANCE) * num_neurons / idle) // step * step)
        most = min(most, int((1 - active + TOLERANCE) * num_neurons / idle) + 1)
    return [_shape(num_neurons, num_experts, n, k) for n in range(least, most + 1, step)]


def _shape(num_neurons: int, num_experts: int, width: int, k: int) -> Shape:
    return Shape(num_neurons, num_neurons - num_experts * width, num_experts, width, k)


def _step(num_neurons: int) -> int:
    """What expert widths are multiples of."""
    return 8 if num_neurons >= 256 else 1


def alignment(width: int) -> int:
    """The largest of 128, 64, 32, 16, 8 that divides `width`; 1 if none does."""
    return next((unit for unit in ALIGNMENTS if width % unit == 0), 1)


def _routing(num_experts: int, active: float) -> range:
    """Experts per token that may answer: all of them alone where all neurons are to run."""
    return range(num_experts if active >= 1 else 1, num_experts + 1)


def _rank(shape: Shape, active: float) -> tuple[float, ...]:
    """A choice to make, widths that quantised formats take, the preferred count, two per token."""
    every = shape.experts_per_token == shape.num_experts
    unit = alignment(shape.expert_width)
    count = shape.num_experts
    place = PREFERRED_EXPERTS.index(count) if count in PREFERRED_EXPERTS else count
    chosen = shape.experts_per_token
    off = round(abs(shape.active_fraction - active), 4)
    order = (-min(unit, 32), place, chosen if chosen >= 2 else 99, -unit, off, shape.num_shared)
    return (every, _lopsided(shape), *order)


def _lopsided(shape: Shape) -> bool:
    """Whether next to nothing is routed, or shared where any is (`LEAST_PART`)."""
    active, idle = shape.num_active, shape.num_neurons - shape.num_active
    routed = active - shape.num_shared
    few = LEAST_PART * active
    return routed < LEAST_PART * min(active, idle) or 0 < shape.num_shared < few


def _check(
    num_neurons: int,
    active: float,
    experts: int | None,
    per_token: int | None,
    shared: float | None,
) -> None:
    """Refuse what the ranges of a recipe's options do not."""
    if not 0 < active <= 1:
        raise MoefyError(f"--active is {active:g}; expected a fraction above 0, up to 1", code=2)
    if shared is not None and not 0 <= shared < 1:
        raise MoefyError(
            f"--shared-fraction is {shared:g}; expected a fraction from 0 to below 1", code=2
        )
    if experts is not None and not 2 <= experts <= num_neurons:
        raise MoefyError(f"--experts is {experts}; expected 2 to {num_neurons}", code=2)
    if experts is not None and per_token is not None and per_token > experts:
        raise MoefyError(
            f"--top-k is {per_token} but there are {experts} experts; expected at most {experts}",
            code=2,
        )


def _nearest(
    num_neurons: int, active: float, experts: int | None, fits: Callable[[Shape], bool]
) -> str:
    """What would be possible: the nearest shapes, and the counts and widths that align."""
    counts = (experts,) if experts else PREFERRED_EXPERTS
    shapes = [shape for count in counts for shape in legal(num_neurons, count, fits)]
    if not shapes:
        even = [n for n in range(2, 129) if num_neurons % n == 0 and num_neurons // n % 8 == 0]
        return (
            f"expected an expert count that divides {num_neurons} into widths of 8: {_some(even)}"
        )
    shapes.sort(key=lambda shape: (abs(shape.active_fraction - active), _rank(shape, active)))
    near = "; ".join(str(shape) for shape in shapes[:3])
    widths = sorted({s.expert_width for s in shapes if alignment(s.expert_width) >= 32})
    return f"nearest: {near}; expert widths that are multiples of 32: {_some(widths)}"


def _some(values: list[int], most: int = 12) -> str:
    text = ", ".join(map(str, values[:most])) or "none"
    return text + (", ..." if len(values) > most else "")
