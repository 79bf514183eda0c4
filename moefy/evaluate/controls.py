"""Controls: what the same recipe gives without routing, or with other routers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from moefy.config.options import nearest
from moefy.config.recipe import OWN_CLASS_ROUTERS, Recipe, build
from moefy.convert.oracle import attach
from moefy.convert.prepare import Job, prepare
from moefy.convert.run import convert
from moefy.convert.session import Attempt
from moefy.errors import MoefyError
from moefy.evaluate.cache import VERSIONS, digest
from moefy.evaluate.candidates import Candidate, load_model
from moefy.models import routing
from moefy.models.targets import OWN
from moefy.progress import Watch
from moefy.text.tokens import Tokens
from moefy.types import Shape

MEANING = {
    "static": "the same number of neurons, chosen once for all tokens; refitted alike",
    "random router": "our experts behind random router rows; refitted under them",
    "oracle router": "our experts, chosen by their true output energy: a ceiling, not a model",
}

CHANGED = "by the run's own recipe with these changes"

AS_WRITTEN = "oracle router, as written"
"""The one control without a conversion: the run's own weights behind another router. A random
router without a refit under it would be a straw man, so there is none (SmolLM2-135M, half active:
dNLL 3.53 on text where it costs 1.9 refitted, and the run itself 1.27)."""

STATIC = {
    "partition": "static",
    "partition_options": {},
    "target": "auto",
    "layers": ":",
    "shadow": 0.0,
} | dict.fromkeys(
    # Its shape follows from the run's; the options of the experts may not fit another class.
    ("experts", "top_k", "shared_fraction")
)

UNKEPT = Attempt(force=True, keep=False)

METHOD = ("method", "partition", "router", "refit", "drift", "polish", "overlap", "seed")
"""The settings that `--against` may change; all others are those of the run."""


def controls(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes of the controls, by name."""
    changes: dict[str, dict[str, Any]] = {
        "static": STATIC,
        "random router": {"router": "random", "router_options": {}},
        "oracle router": {"router": "oracle", "router_options": {}},
    }
    return {name: dataclasses.replace(recipe, **values) for name, values in changes.items()}


def _as_active(job: Job) -> Shape:
    """The shape of static pruning with as many active neurons as all layers of the run together.

    A dense class has one FFN width, so it also prunes the layers that the run leaves dense.
    """
    neurons, dense = job.shape.num_neurons, job.num_layers - len(job.layers)
    active = dense * neurons + len(job.layers) * job.shape.num_active
    return Shape(neurons, round(active / job.num_layers), 0, 0, 0)


def changed(recipe: Recipe, changes: str) -> Recipe:
    """The recipe of another method, such as `method=cmoe` or `partition=shuffle refit=false`.

    A partition or router that is named starts from its default options.

    Raises:
        MoefyError: code 2, for an unknown setting, or one that is not part of the method.
    """
    values = dataclasses.asdict(recipe)
    for setting in changes.split():
        key = setting.partition("=")[0]
        if key.partition(".")[0] not in METHOD:
            known = nearest(key, [*METHOD, "partition.OPTION", "router.OPTION"])
            raise MoefyError(f"--against {changes!r} changes more than the method; {known}", code=2)
        if key in ("partition", "router"):
            values[f"{key}_options"] = {}
        if setting in [f"router={name}" for name in OWN_CLASS_ROUTERS]:
            values["target"] = OWN
        if setting in ("partition=static", "method=flap"):
            values |= STATIC
    return build(None, values, changes.split())


def control_jobs(recipe: Recipe, others: Mapping[str, Recipe]) -> dict[str, Job]:
    """The conversions by other recipes, with as many active neurons as the one by `recipe`."""
    if not others:
        return {}
    run = prepare(recipe, control=True)
    shape = _as_active(run)
    jobs = {}
    for name, other in others.items():
        if other.partition == "static":
            other = dataclasses.replace(other, active=shape.active_fraction)
        job = prepare(other, control=True, source=run.source)
        jobs[name] = job if job.method.fit else dataclasses.replace(job, shape=shape)
    return jobs


def control_candidates(
    recipe: Recipe,
    others: Mapping[str, Recipe],
    dense: Candidate,
    tokens: Tokens,
    place: Path,
    watch: Watch,
) -> list[Candidate]:
    """The controls that take a conversion each; it runs in `place` when the model is opened."""

    def candidate(number: int, name: str, job: Job) -> Candidate:
        def load(dtype: torch.dtype) -> Any:
            def named(stage: str, done: int, total: int) -> None:
                watch(f"{name}: {stage}", done, total)

            folder = place / str(number)
            if not folder.is_dir():
                convert(job, folder, UNKEPT, tokens=tokens, watch=named)
            return load_model(folder, dtype)

        settings = dataclasses.asdict(job.recipe) | {"model": "", "device": "", "calibration": ""}
        sources = [settings, dataclasses.asdict(job.shape), tokens.sha256, dense.digest, VERSIONS]
        kind = "control" if name in MEANING else "other"
        active = job.shape.active_fraction
        meaning = MEANING.get(name, CHANGED)
        return Candidate(name, kind, meaning, digest(sources), load, active=active)

    jobs = control_jobs(recipe, others)
    return [candidate(number, name, job) for number, (name, job) in enumerate(jobs.items())]


def as_written(run: Candidate) -> Candidate:
    """The run's own weights behind oracle routers."""
    assert run.folder is not None
    folder = run.folder

    def load(dtype: torch.dtype) -> Any:
        model = load_model(folder, dtype)
        return attach(model, true_norms(model))

    return Candidate(
        AS_WRITTEN,
        "control",
        "the run's own weights, chosen by true output energy without a refit: what a better router "
        "alone could reach, not a model",
        digest([AS_WRITTEN, run.digest]),
        load,
        active=run.active,
    )


def true_norms(model: Any) -> dict[int, torch.Tensor]:
    """Squared norm of the output of each expert's neurons at activation one, (E, N), by layer."""
    return {
        layer: experts.down_proj.detach().float().square().sum(1)
        for layer, experts in routing.experts(model).items()
    }


def calibration_tokens(folder: Path, summary: dict[str, Any]) -> Tokens:
    """The tokens that a run was calibrated on, as its folder stores them."""
    calibration = summary["calibration"]
    return Tokens(
        load_file(folder / "moefy" / "calibration.safetensors")["ids"].long(),
        calibration["heldout_sequences"],
        calibration["source"],
        calibration["sha256"],
        calibration["documents"],
        tuple(calibration["notes"]),
    )
