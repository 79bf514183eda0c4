"""The speed of every stage of a run, in each engine; measured once and cached."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from moefy.compute_dtype import name_of
from moefy.config.report import Settings
from moefy.environment import device_name, processor
from moefy.evaluate import llama_cpp, speed
from moefy.evaluate.cache import tensors_digest
from moefy.evaluate.candidates import Candidate
from moefy.evaluate.dtypes import dtypes_to_try
from moefy.evaluate.session import LONGEST, Session
from moefy.evaluate.sizes import ideals
from moefy.evaluate.timed_rounds import Grid, grid_for
from moefy.timing import now


def key_of(
    candidates: Sequence[Candidate], ids_T: Tensor, grid: Grid, device: torch.device
) -> dict[str, Any]:
    """What speeds depend on: models, text, grid, processor and device."""
    machine = [platform.machine(), processor(), torch.get_num_threads(), device_name(device)]
    return {
        "models": {candidate.label: candidate.digest for candidate in candidates},
        "text": tensors_digest([ids_T]),
        "grid": dataclasses.astuple(grid),
        "machine": machine,
    }


def engine_speeds(session: Session, report: dict[str, Any], settings: Settings) -> None:
    """Tokens per second of every stage, in transformers and in llama.cpp, into `report`.

    llama.cpp runs on the processor, whatever the device is.
    """
    candidates, device, cpu = session.candidates, session.device, torch.device("cpu")
    ids_T = torch.cat([ids_T for windows in session.windows.values() for ids_T in windows])
    folders = {c.label: c.folder for c in candidates if c.folder}
    sizes = {label: report["models"][label] for label in session.labels}
    longest = sizes.get("dense", {}).get("longest") or LONGEST

    def measure(
        engine: str, device: torch.device, key: dict[str, Any], function: Callable[..., Any]
    ) -> None:
        what = f"speed in {engine}"
        grid = settings.grid or grid_for(settings.effort, device.type, longest)
        key = key_of(candidates, ids_T, grid, device) | key
        run = partial(function, grid=grid, watch=partial(session.watch, what))
        facts = {
            "ideal_ratio": ideals(sizes, grid.batches),
            "processor": processor(),
            "device": device_name(device),
        }
        with session.part(what):
            figures = session.cache.once(what.replace(" ", "-"), key, run)
            report["speed"][engine] = facts | figures

    dtypes, untried = dtypes_to_try(
        settings.compute_dtype, session.stored, session.compute.dtype, [*folders.values()], device
    )
    openers = {c.label: partial(session.model, c) for c in candidates}
    clock = partial(now, device)
    measure(
        "transformers",
        device,
        {"dtypes": [name_of(dtype) for dtype in dtypes]},
        partial(speed.measure, openers, ids_T.to(device), dtypes=dtypes, clock=clock),
    )
    result = report["speed"].get("transformers", {})
    left_out = result.get("left_out", {})
    session.notes.extend(
        f"speed at batch {batch}, context {context:,}: memory does not hold it"
        for batch, context in result.get("too_large", ())
    )
    session.notes.extend(f"speed in {name} was not tried: {why}" for name, why in untried.items())
    session.notes.extend(
        f"speed of {label}: {name} was left out, because it cannot compute this model ({reason})"
        for label, reasons in left_out.items()
        for name, reason in reasons.items()
    )
    if not settings.wants(settings.llama_cpp):
        return
    if (missing := llama_cpp.available()) is None:
        measure(
            "llama.cpp",
            cpu,
            {"xllamacpp": version("xllamacpp")},
            partial(llama_cpp.measure, folders, session.place, ids_T),
        )
    elif settings.llama_cpp:
        session.not_run.append({"what": "speed in llama.cpp", "reason": missing})
