"""What a conversion records of itself: the files of `OUT/moefy/`, and the model card."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from moefy import __version__, report
from moefy.checkpoint.resolve import DEMO
from moefy.config.recipe import render
from moefy.convert.prepare import Job
from moefy.environment import versions
from moefy.files.publish import file_digests, write_json, write_text
from moefy.files.shards import save
from moefy.models.engines import known_engines
from moefy.text import packing

END = "end"
"""Name of the tensor that holds the states behind the last layer that was reopened."""


def summarise(
    job: Job,
    tokens: packing.Tokens,
    layers: list[dict[str, Any]],
    checked: dict[str, Any],
    seconds: dict[str, float],
    inputs: dict[str, str],
) -> dict[str, Any]:
    """What `moefy/conversion.json` holds, less the digests of the output."""
    local = job.recipe.model == DEMO or Path(job.recipe.model).expanduser().is_dir()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "moefy": __version__,
        "model": job.recipe.model,
        "hub_id": None if local else job.recipe.model,
        "family": job.family.model_type,
        "task": job.task,
        "target": job.target.model_type,
        "target_reason": job.reason,
        "licence": licence(job.checkpoint.folder),
        "engines": known_engines(job.target.model_type) if job.method.fit else ["every engine"],
        "shape": {**dataclasses.asdict(job.shape), "active_fraction": job.shape.active_fraction},
        "parameters_dense": job.num_weights,
        "layers": layers,
        "dropped_layers": [*job.dropped],
        "layers_left_dense": [n for n in range(job.num_layers) if n not in job.layers],
        "recipe": dataclasses.asdict(job.recipe),
        "calibration": {**tokens.figures(), "compute_dtype": tokens.compute_dtype},
        "reopened": checked,
        "notes": list(job.notes),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_resident_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        "device": str(job.device),
        "versions": versions(),
        "inputs": inputs,
    }


def gaps(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings on the figures of layers whose experts or neurons have seen too little text.

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
    if silent := [layer for layer in layers if layer.get("silent_neurons")]:
        total = sum(layer["silent_neurons"] for layer in silent)
        notes.append(
            f"{total} neurons in {len(silent)} layers wrote nothing on any calibration token, "
            f"{silent[0]['silent_neurons']} of them in layer {silent[0]['layer']}; give more "
            "--tokens, or text of the model's own kind"
        )
    return notes


def write_report(job: Job, part: Path, summary: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Recipe, calibration tokens, pages and report; the report's existence means whole."""
    folder = part / "moefy"
    folder.mkdir(exist_ok=True)
    save(folder, "calibration", tensors)
    versions = {"moefy": summary["moefy"], **summary["versions"]}
    text = render(job.recipe, made=versions, inputs=summary["inputs"])
    write_text(folder / "recipe.toml", text)
    # These describe the others, or are for people to edit; a stopped run may have left some.
    without = ("README.md", "moefy/conversion.json", "moefy/conversion.md")
    summary["outputs"] = file_digests(part, without=without)
    write_text(folder / "conversion.md", report.conversion_page(summary))
    write_text(part / "README.md", report.model_card(summary))
    write_json(folder / "conversion.json", summary)


def licence(folder: Path) -> dict[str, Any]:
    """The licence and the languages that the dense model's card names, if it has a card."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    card = folder / "README.md"
    if not card.is_file():
        return {}
    with card.open(encoding="utf-8", errors="replace") as file:
        text = file.read(100_000)
    try:
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, YAMLError):  # a card is for people: a model is no worse for a broken one
        return {}
    keys = ("license", "license_name", "license_link", "language")
    return {key: data[key] for key in keys if isinstance(data.get(key), str | list)}
