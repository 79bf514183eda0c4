"""What the same recipe would have given without routing, or with other routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moefy.convert import convert
from moefy.data import Tokens
from moefy.job import Job, Watch, prepare
from moefy.oracle import attach
from moefy.recipe import Recipe
from moefy.shape import pruned

MEANING = {
    "static": "the same number of neurons, chosen once for all tokens; refitted alike",
    "static, no refit": "the same without the refit",
    "random router": "our experts behind random router rows; refitted under them",
    "oracle router": "our experts, chosen by their true output energy: a ceiling, not a model",
}

SHOWN = ("static", "random router", "oracle router")
"""The controls of a report; the others are for benchmarks."""


def controls(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of the controls, by name, in the order of `MEANING`."""
    static = {"partition": "static", "partition_options": {}, "layers": ":", "target": "auto"}
    # Its shape is made from the run's; what was asked of the experts may not fit another class.
    static |= {"experts": None, "experts_per_token": None, "shared": None}
    change: list[dict[str, Any]] = [
        static,
        {**static, "refit": False},
        {"router": "random", "router_options": {}},
        {"router": "oracle", "router_options": {}},
    ]
    if recipe.layers != ":":
        change[0] = change[1] = {}
    made = {
        name: dataclasses.replace(recipe, **values)
        for name, values in zip(MEANING, change, strict=True)
        if values
    }
    return made


def make_control(recipe: Recipe, like: Job, out: Path, tokens: Tokens, watch: Watch) -> Any:
    """Convert by a control's recipe with the shape and tokens of the run, and load the result."""
    job = prepare(recipe, control=True)
    shape = pruned(like.shape) if job.method.fit is None else like.shape
    job = dataclasses.replace(job, shape=shape)
    convert(job, out, tokens=tokens, force=True, watch=watch)
    return load_model(out)


def load_model(folder: Path, dtype: str | torch.dtype = "auto") -> Any:
    """Load a model folder with its stock class; with an oracle's norms, put the oracle in."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return attach(model.eval(), dict(_norms(folder)))


def _norms(folder: Path) -> Iterator[tuple[int, torch.Tensor]]:
    file = folder / "moefy" / "calibration.safetensors"
    if file.is_file():
        for name, norm_EN in load_file(file).items():
            if name.startswith("norm."):
                yield int(name.removeprefix("norm.")), norm_EN


def calibration_tokens(folder: Path, summary: dict[str, Any]) -> Tokens:
    """The tokens that a run was calibrated on, as it stored them."""
    told = summary["calibration"]
    ids_BT = load_file(folder / "moefy" / "calibration.safetensors")["ids"].long()
    return Tokens(
        ids_BT,
        told["heldout_sequences"],
        told["source"],
        told["sha256"],
        told["documents"],
        tuple(told["notes"]),
    )
