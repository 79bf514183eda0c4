"""What the same recipe would have given without routing, or with other routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moefy.convert import convert
from moefy.data import Tokens
from moefy.errors import MoefyError
from moefy.job import Job, Watch, prepare
from moefy.oracle import attach
from moefy.recipe import Recipe, build, nearest
from moefy.shape import pruned
from moefy.walk import runnable

MEANING = {
    "static": "the same number of neurons, chosen once for all tokens; refitted alike",
    "static, no refit": "the same without the refit",
    "random router": "our experts behind random router rows; refitted under them",
    "oracle router": "our experts, chosen by their true output energy: a ceiling, not a model",
}

CHANGED = "by the run's own recipe, so changed"

SHOWN = ("static", "random router", "oracle router")
"""The controls of a report; the others are for benchmarks."""

STATIC = {"partition": "static", "partition_options": {}, "target": "auto"} | dict.fromkeys(
    # Its shape is made from the run's; what was asked of the experts may not fit another class.
    ("experts", "experts_per_token", "shared")
)

METHOD = ("partition", "router", "refit", "drift", "total", "seed")
"""What may differ in a recipe that a run is held against; all else is the run's."""


def controls(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of the controls, by name, in the order of `MEANING`."""
    change: list[dict[str, Any]] = [
        STATIC,
        {**STATIC, "refit": False},
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


def changed(recipe: Recipe, changes: str) -> Recipe:
    """The recipe of another method, `partition=coactivation router=representative refit=false`.

    A stage that is named anew starts from its default options.

    Raises:
        MoefyError: code 2, for what is no setting, or changes more than the method.
    """
    values = dataclasses.asdict(recipe)
    for setting in changes.split():
        key = setting.partition("=")[0]
        if key.partition(".")[0] not in METHOD:
            known = nearest(key, [*METHOD, "partition.OPTION", "router.OPTION"])
            raise MoefyError(f"--against {changes!r} changes more than the method; {known}", code=2)
        if key in ("partition", "router"):
            values[f"{key}_options"] = {}
        if setting == "partition=static":
            values |= STATIC
    return build(None, values, changes.split())


def control_jobs(recipe: Recipe, others: Mapping[str, Recipe]) -> dict[str, Job]:
    """The conversions by other recipes, with as many active neurons as that by `recipe` has."""
    jobs = {name: prepare(other, control=True) for name, other in others.items()}
    if all(job.method.fit for job in jobs.values()):
        return jobs
    shape = pruned(prepare(recipe, control=True).shape)
    return {
        name: job if job.method.fit else dataclasses.replace(job, shape=shape)
        for name, job in jobs.items()
    }


def make_control(job: Job, out: Path, tokens: Tokens, watch: Watch) -> Any:
    """Convert with the tokens of the run, and load the result."""
    convert(job, out, tokens=tokens, force=True, watch=watch)
    return load_model(out)


def load_model(folder: Path, dtype: str | torch.dtype = "auto") -> Any:
    """Load a model folder with its stock class; with norms, put the router they are of in."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    return attach(runnable(model.eval()), dict(_norms(folder)))


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
