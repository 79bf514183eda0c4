"""The parts of a report, each measured once and kept."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from moefy.compute import name_of
from moefy.config.report import Settings
from moefy.environment import processor
from moefy.errors import MoefyError
from moefy.evaluate import benchmarks, llama_cpp, prompts, shifts, tables
from moefy.evaluate import speed as transformers_speed
from moefy.evaluate.cache import VERSIONS, tensors_digest
from moefy.evaluate.candidates import Candidate
from moefy.evaluate.dtypes import dtypes_to_try
from moefy.evaluate.implementations import GRIDS
from moefy.evaluate.scoring import TextResult
from moefy.evaluate.session import Session
from moefy.evaluate.sizes import ideals, peak_bytes, sizes
from moefy.evaluate.tables import robustness_row, routing_tables, score_rows
from moefy.text.documents import beginning

LONGEST = 8192
"""Tokens of a context, for a model that names no limit."""


def other_runs(session: Session) -> dict[str, Any]:
    """conversion.json of every stage but the run's own last, by label."""
    return {
        stage.label: stage.summary
        for stage in session.stages
        if stage.summary is not None and stage.label != session.main
    }


def quality(session: Session) -> dict[str, Any]:
    """Every model on every text: scores, and how the stages route meanwhile."""
    texts: dict[str, Any] = {}
    read: dict[str, dict[str, TextResult]] = {}
    for name, windows in session.windows.items():
        with session.part(f"scores on {name}"):
            read[name] = session.scorer.read(windows, watch=_step(session, f"evaluate on {name}"))
            texts[name] = score_rows(read[name], tables.num_bytes(session.tokenizer, windows))
    pieces = routing_tables(read, session.labels, lambda token: session.tokenizer.decode([token]))
    return {"texts": texts, "routing": pieces}


def peaks(session: Session) -> dict[str, int]:
    """Peak memory of every stage, by label; of a control, which is not kept, none.

    Two processes at a time: so this is for when no model is open here yet.
    """
    found: dict[str, int] = {}
    threads = max(1, torch.get_num_threads() // 2)

    def measure(stage: Candidate) -> None:
        if (folder := stage.folder) is None:
            return
        with session.part(f"peak memory of {stage.label}"):
            key = {"model": stage.digest, **VERSIONS}
            found[stage.label] = session.cache.once(
                "peak-memory", key, lambda: peak_bytes(folder, session.compute.name, threads)
            )

    session.watch("peak memory", 0, 1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(measure, session.stages))
    return found


def models(session: Session, measured: Mapping[str, int]) -> dict[str, Any]:
    """What every model is; of controls, which are not kept, only what they mean."""
    found: dict[str, Any] = {}
    for stage in (*session.stages, *session.others):
        told: dict[str, Any] = {
            "kind": stage.kind,
            "meaning": stage.meaning,
            "folder": str(stage.folder) if stage.folder else None,
            "active_fraction": stage.active,
        }
        if stage.folder is not None:
            key = {"model": stage.digest, **VERSIONS}
            told |= session.cache.once(
                "sizes", key, lambda s=stage: sizes(session.opened(s.label), session.stored)
            )
            told["peak_bytes"] = measured.get(stage.label)
        found[stage.label] = told
    return found


def frontier(session: Session, texts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Loss against active fraction, a point for each model and text."""
    return [
        {
            "active": stage.active,
            "label": stage.label,
            "kind": stage.kind,
            "text": text,
            "dnll": rows[stage.label]["dnll"],
        }
        for text, rows in texts.items()
        for stage in (*session.stages, *session.others)
        if stage.label in rows
    ]


def robustness(
    session: Session, sizes: Mapping[str, Any], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Every stage in every condition and on every text, and how far its routing drifts there."""
    dense = sizes.get("dense", {})
    made, lacking = shifts.shifts(
        session.tokens,
        {
            name: beginning(
                path, 32 * settings.num_tokens, session.tokenizer, text_field=settings.text_field
            )
            for name, path in session.texts.items()
        },
        session.tokenizer,
        vocabulary=min(len(session.tokenizer), dense.get("vocabulary") or len(session.tokenizer)),
        longest=dense.get("longest") or LONGEST,
        num_tokens=min(settings.num_tokens // 4, 2048),
        length=settings.sequence_length,
    )
    for name, reason in lacking.items():
        session.not_run.append({"what": f"robustness, {name}", "reason": reason})
    count = settings.num_tokens // 2
    reference = session.scorer.read(
        shifts.reference(session.tokens, count),
        labels=session.labels,
        watch=_step(session, "evaluate on calibration text"),
    )
    found: dict[str, dict[str, Any]] = {}
    for name, condition in made.items():
        with session.part(f"robustness, {name}"):
            read = session.scorer.read(
                condition.windows,
                labels=session.labels,
                keep=condition.keep,
                watch=_step(session, f"evaluate on {name}"),
            )
            found[name] = _drifts(read, reference)
    for name, windows in session.windows.items():
        with session.part(f"robustness, {name}"):
            read = session.scorer.read(windows, labels=session.labels)
            found[f"text: {name}"] = _drifts(read, reference)
    session.notes.extend(f"{name}: {shifts.MEANING[name]}" for name in made)
    return found


def _drifts(
    read: Mapping[str, TextResult], reference: Mapping[str, TextResult]
) -> dict[str, dict[str, Any]]:
    return {
        label: robustness_row(reading, read["dense"], reference[label].choices)
        for label, reading in read.items()
    }


def generation(session: Session) -> list[dict[str, Any]]:
    """What every stage writes after a few prompts."""
    return [
        {
            "prompt": prompt,
            "written": {s.label: _written(session, s, prompt) for s in session.stages},
        }
        for prompt in prompts.PROMPTS
    ]


def _written(session: Session, stage: Candidate, prompt: str) -> str:
    key = {"model": stage.digest, "prompt": prompt, "tokens": prompts.NEW_TOKENS, **VERSIONS}
    session.watch(f"write: {stage.label}", 0, 1)
    return session.cache.once(
        "written",
        key,
        lambda: prompts.written(session.opened(stage.label), session.tokenizer, prompt),
    )


def regression(session: Session, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How likely every stage finds the answers; where there is none, dense writes it."""
    scored = []
    for number, row in enumerate(rows, 1):
        session.watch("prompts", number, len(rows))
        answer = row["answer"] or _written(session, session.stages[0], row["prompt"])
        if not answer.strip():
            reason = "the dense model writes nothing after it, and no answer was given"
            session.not_run.append({"what": f"prompt {number}", "reason": reason})
            continue
        scores = {s.label: _likelihood(session, s, row, answer) for s in session.stages}
        scored.append({"prompt": row["prompt"], "answer": answer, "scores": scores})
    return prompts.regressions(scored, session.main) if scored else []


def _likelihood(session: Session, stage: Candidate, row: Mapping[str, Any], answer: str) -> float:
    asked = {"prompt": row["prompt"], "answer": answer, "chat": row["chat"]}
    key = {"model": stage.digest, **asked, **VERSIONS}
    return session.cache.once(
        "answer",
        key,
        lambda: prompts.likelihood(session.opened(stage.label), session.tokenizer, **asked),
    )


def benchmark(session: Session, task: str, manager: Any, limit: int | None) -> dict[str, Any]:
    """One task by every stage; one that fails is told in its place."""
    found: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    content = benchmarks.content(task, manager)
    for stage in session.stages:
        key = {"model": stage.digest, "task": task, "content": content, "limit": limit, **VERSIONS}
        key |= {"lm_eval": version("lm_eval"), "softmax": "float32"}
        session.watch(f"benchmark {task}: {stage.label}", 0, 1)
        before = len(session.not_run)
        with session.part(f"benchmark {task}, {stage.label}"):
            found[stage.label] = session.cache.once(
                "benchmark",
                key,
                lambda s=stage: benchmarks.run_task(
                    session.opened(s.label), session.tokenizer, task, manager, limit
                ),
            )
            if "dense" not in found:
                raise MoefyError("dense was not scored, so there is nothing to compare with")
            rows[stage.label] = benchmarks.compared(found[stage.label], found["dense"])
        if len(session.not_run) > before:
            rows[stage.label] = {"not_run": session.not_run[-1]["reason"]}
    return rows


def speed(session: Session, report: dict[str, Any], settings: Settings) -> None:
    """Tokens per second of every stage, in transformers and in llama.cpp, into `report`."""
    grid, labels = settings.grid or GRIDS[settings.effort], session.labels
    ids_T = torch.cat([ids_T for windows in session.windows.values() for ids_T in windows])
    batches = sorted({batch for batch, _ in grid.work})
    key = {
        "models": {stage.label: stage.digest for stage in session.stages},
        "text": tensors_digest([ids_T]),
        "grid": [list(map(list, grid.work)), grid.rounds, grid.new_tokens],
        "machine": [platform.machine(), processor(), torch.get_num_threads()],
        **VERSIONS,
    }
    folders = [stage.folder for stage in session.stages if stage.folder]
    dtypes, untried = dtypes_to_try(
        settings.compute_dtype, session.stored, session.compute.dtype, folders
    )
    ideal = ideals({label: report["models"][label] for label in labels}, batches)
    with session.part("speed in transformers"):
        found = session.cache.once(
            "speed",
            key | {"dtypes": [name_of(dtype) for dtype in dtypes]},
            lambda: transformers_speed.measure(
                {label: partial(session.opened_in, label) for label in labels},
                ids_T,
                grid,
                dtypes=dtypes,
                watch=_step(session, "speed in transformers"),
            ),
        )
        measured = {"ideal_ratio": ideal, "processor": processor()}
        report["speed"]["transformers"] = measured | found
        session.notes.extend(
            f"speed in {name} was not tried: {reason}" for name, reason in untried.items()
        )
        session.notes.extend(
            f"speed of {label}: {way} was left out, which cannot compute this model ({reason})"
            for label, reasons in found.get("left_out", {}).items()
            for way, reason in reasons.items()
        )
    wanted = settings.wants(settings.llama_cpp)
    if not wanted or (reason := llama_cpp.available()) is not None:
        if wanted and settings.llama_cpp:
            session.not_run.append({"what": "speed in llama.cpp", "reason": str(reason)})
        return
    with session.part("speed in llama.cpp"):
        found = session.cache.once(
            "speed-llama-cpp",
            key | {"xllamacpp": version("xllamacpp")},
            lambda: llama_cpp.measure(
                {stage.label: stage.folder for stage in session.stages if stage.folder},
                session.place,
                ids_T,
                grid,
                watch=_step(session, "speed in llama.cpp"),
            ),
        )
        measured = {"ideal_ratio": ideal, "processor": processor()}
        report["speed"]["llama.cpp"] = measured | found


def _step(session: Session, stage: str) -> Any:
    return lambda done, total: session.watch(stage, done, total)
