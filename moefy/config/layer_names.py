"""Layers as a recipe names them: `:`, `4:`, `0,3,7`."""

from __future__ import annotations

from moefy.errors import MoefyError


def dropped_layers(text: str, num_layers: int) -> tuple[int, list[int]]:
    """How many layers `drop_layers` leaves out of `num_layers`, and which, if it names them.

    >>> dropped_layers("2", 6), dropped_layers("2:3", 6), dropped_layers("1,4", 6)
    ((2, []), (1, [2]), (2, [1, 4]))

    Raises:
        MoefyError: code 2, for what is no layer.
    """
    if text.strip().isdecimal():
        return int(text), []
    try:
        layers = chosen_layers(text, num_layers)
    except MoefyError:
        raise MoefyError(
            f"--drop-layers is {text!r}; expected a number, or some of the layers 0 to "
            f"{num_layers - 1}, like `24:26` or `3,7`",
            code=2,
        ) from None
    return len(layers), layers


def chosen_layers(text: str, num_layers: int) -> list[int]:
    """Indices that `layers` names, of a model of `num_layers`.

    >>> chosen_layers("4:", 6), chosen_layers("0,3", 6), chosen_layers("1:3,5", 6)
    ([4, 5], [0, 3], [1, 2, 5])

    Raises:
        MoefyError: code 2, for what is no layer, or none at all.
    """
    layers: set[int] = set()
    for part in text.split(","):
        first, colon, last = part.strip().partition(":")
        try:
            start = int(first) if first or not colon else 0
            stop = (int(last) if last else num_layers) if colon else start + 1
        except ValueError:
            start, stop = 0, -1
        if not 0 <= start < stop <= num_layers:
            raise MoefyError(
                f"--layers {text}: {part.strip()!r} names no layers of 0 to {num_layers - 1}; "
                "expected forms like `:`, `4:`, `0,3,7`, or `auto`",
                code=2,
            )
        layers.update(range(start, stop))
    return sorted(layers)
