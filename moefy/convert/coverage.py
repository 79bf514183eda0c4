"""Has every expert, and every neuron, seen enough of the calibration text?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def gaps(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One-line warnings on the figures of converted layers (see `block.Block`).

    An expert's columns are fitted by least squares, which fewer tokens than it has neurons leave
    to the ridge.
    """
    notes = []
    thin = [
        (tokens, layer["expert_width"], layer["layer"])
        for layer in layers
        for tokens in layer.get("fit_tokens", [])
        if tokens < layer["expert_width"]
    ]
    if thin:
        least, width, number = min(thin)
        total = sum(len(layer.get("fit_tokens", [])) for layer in layers)
        notes.append(
            f"{len(thin)} of {total} experts got fewer calibration tokens than they have neurons, "
            f"in layer {number} {least} for {width}; give more --tokens, or other text"
        )
    if silent := [layer for layer in layers if layer["silent_neurons"]]:
        total = sum(layer["silent_neurons"] for layer in silent)
        notes.append(
            f"{total} neurons in {len(silent)} layers wrote nothing on any calibration token, "
            f"{silent[0]['silent_neurons']} of them in layer {silent[0]['layer']}; give more "
            "--tokens, or text of the model's own kind"
        )
    return notes
