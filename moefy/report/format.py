"""Numbers as text; an unknown number is an empty cell, never a zero."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Number = float | int | None


def fixed(value: Number, places: int = 2) -> str:
    """`value` with `places` digits behind the point.

    >>> fixed(1.2345), fixed(None), fixed(1234567.0, 1)
    ('1.23', '', '1,234,567.0')
    """
    return "" if value is None else f"{value:,.{places}f}"


def uncertain(value: Number, error: Number, places: int = 3) -> str:
    """`value` ± its standard error, which is unknown for a single window of text.

    >>> uncertain(0.5, 0.01), uncertain(0.5, None), uncertain(None, 0.1)
    ('0.500 ± 0.010', '0.500', '')
    """
    plain = fixed(value, places)
    return f"{plain} ± {fixed(error, places)}" if plain and error is not None else plain


def percent(value: Number) -> str:
    """A share in percent.

    >>> percent(0.5), percent(None)
    ('50.0%', '')
    """
    return "" if value is None else f"{value:.1%}"


def ranged(value: float, low: float, high: float, sign: str = "") -> str:
    """A share with the ends of its interval; with `sign` "+", a difference of shares.

    >>> ranged(0.25, 0.149, 0.388), ranged(0.25, 0.1, 0.4, "+"), ranged(0.0, -0.07, 0.07, "+")
    ('25% (15 to 39)', '+25% (+10 to +40)', '+0% (-7 to +7)')
    """
    ends = " to ".join(f"{100 * end:{sign}.0f}" for end in (low, high))
    return f"{value:{sign}.0%} ({ends})"


def times(value: Number) -> str:
    """A ratio.

    >>> times(0.823)
    '0.82×'
    """
    return "" if value is None else f"{value:.2f}×"


def large(value: Number, unit: str = "") -> str:
    """A count with a prefix.

    >>> large(134515008), large(2.7e9, "B"), large(12), large(None)
    ('134.5 M', '2.70 GB', '12', '')
    """
    if value is None:
        return ""
    for size, prefix, places in ((1e9, "G", 2), (1e6, "M", 1), (1e3, "k", 1)):
        if value >= size:
            return f"{value / size:,.{places}f} {prefix}{unit}"
    return f"{value:g} {unit}".rstrip()


def probability(value: Number) -> str:
    """A p-value, and a star where it is below 0.05.

    >>> probability(0.2), probability(0.012), probability(1e-5)
    ('0.20', '0.012 *', '< 0.001 *')
    """
    if value is None:
        return ""
    if value < 0.001:
        return "< 0.001 *"
    return f"{value:.3f} *" if value < 0.05 else f"{value:.2f}"


def shape_text(run: Mapping[str, Any]) -> str:
    """The shape of a run's FFNs in one line, and the layers that it lacks."""
    shape, dropped = run["shape"], run.get("dropped_layers")
    lacks = f"; without layers {', '.join(map(str, dropped))}" if dropped else ""
    if not shape["num_experts"]:
        return f"{shape['num_shared']} of {shape['num_neurons']} FFN neurons kept{lacks}"
    if slices := shape.get("granularity", 0):  # an older moefy made no copies
        beside = f", beside {shape['num_shared']} shared" * bool(shape["num_shared"])
        return (
            f"{shape['num_experts'] // slices} copies of {shape['expert_width'] * slices} FFN "
            f"neurons{beside}" + f", in {slices} slices each" * (slices > 1) + ", "
            f"{shape['experts_per_token'] // slices} per token: {shape['active_fraction']:.2f} "
            f"times the dense FFN computed{lacks}"
        )
    return (
        f"{shape['num_neurons']} neurons = {shape['num_shared']} shared + {shape['num_experts']} "
        f"experts x {shape['expert_width']}, {shape['experts_per_token']} experts per token: "
        f"{shape['active_fraction']:.1%} of the FFN active{lacks}"
    )


def active_share(run: Mapping[str, Any]) -> float:
    """Share of the neurons of all the dense model's layers that are active: all in layers that stay
    dense, none in those that are dropped."""
    converted, dense = len(run["layers"]), len(run["layers_left_dense"])
    count = converted + dense + len(run.get("dropped_layers", []))
    return (dense + converted * run["shape"]["active_fraction"]) / count


def model_name(run: Mapping[str, Any]) -> str:
    """The dense model's name, without its folder."""
    return (
        run.get("hub_id") or str(run["model"]).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
    )


def computed_in(report: Mapping[str, Any]) -> str:
    """The dtype of the scores of a report, and the GPU, as `, in float32`; empty if unknown."""
    compute = report.get("compute", {})
    dtype, device = compute.get("dtype"), compute.get("device", "cpu")
    where = f" on {device}" if device != "cpu" else ""
    return f", in {dtype}{where}" if dtype else ""


BANDS = (
    (0.05, "indistinguishable"),
    (0.1, "hardly noticeable"),
    (0.3, "noticeable"),
    (0.5, "clearly different"),
    (float("inf"), "a different model"),
)
"""KL to the dense model below which a model is so. The first, the third and the last are those of
Hugging Face's PEFT; the others lie between them."""


def band(kl: float) -> str:
    """What a KL divergence means, in words.

    >>> band(0.049), band(0.05), band(0.2)
    ('indistinguishable', 'hardly noticeable', 'noticeable')
    """
    return next((word for most, word in BANDS if kl < most), BANDS[-1][1])


FEW_LEVELS = 24
"""Fewer different values in a block of 32 weights than this were rounded before. The kit's models,
which come from 4 and 5 bits, have 13 to 18; random weights in bfloat16 have 31.6."""


def flattered(levels: float | None) -> str:
    """A warning where the dense weights were quantised once; `levels` in a block of 32.

    >>> flattered(31.6), flattered(13.2)[:42]
    ('', 'The dense weights were quantised before (a')
    """
    if levels is None or levels >= FEW_LEVELS:
        return ""
    return (
        "The dense weights were quantised before (a block of 32 holds "
        f"{levels:.0f} different values), which may flatter types of 4 and 5 bits."
    )
