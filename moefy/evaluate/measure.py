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
from moefy.environment import processor
from moefy.errors import MoefyError
from moefy.evaluate import benchmarks as bench_tasks
from moefy.evaluate import llama_cpp, prompts, tables
from moefy.evaluate import shifts as conditions
from moefy.evaluate import speed as clock
from moefy.evaluate.cache import VERSIONS, tensors_digest
from moefy.evaluate.candidates import Stage
from moefy.evaluate.computing import dtypes_to_try
from moefy.evaluate.scoring import Reading
from moefy.evaluate.session import Bench
from moefy.evaluate.settings import Settings
from moefy.evaluate.sizes import ideals, peak_bytes, sizes
from moefy.evaluate.tables import robustness_row, routing_tables, score_rows
from moefy.text.documents import beginning

LONGEST = 8192
"""Tokens of a context, for a model that names no limit."""


def other_runs(bench: Bench) -> dict[str, Any]:
    """conversion.json of every stage but the run's own last, by label."""
    return {
        stage.label: stage.summary
        for stage in bench.stages
        if stage.summary is not None and stage.label != bench.main
    }


def quality(bench: Bench) -> dict[str, Any]:
    """Every model on every text: scores, and how the stages route meanwhile."""
    texts: dict[str, Any] = {}
    read: dict[str, dict[str, Reading]] = {}
    for name, windows in bench.windows.items():
        with bench.part(f"scores on {name}"):
            read[name] = bench.readers.read(windows, watch=_step(bench, f"evaluate on {name}"))
            texts[name] = score_rows(read[name], tables.num_bytes(bench.tokenizer, windows))
    pieces = routing_tables(read, bench.labels, lambda token: bench.tokenizer.decode([token]))
    return {"texts": texts, "routing": pieces}


def peaks(bench: Bench) -> dict[str, int]:
    """Peak memory of every stage, by label; of a control, which is not kept, none.

    Two processes at a time: so this is for when no model is open here yet.
    """
    found: dict[str, int] = {}
    threads = max(1, torch.get_num_threads() // 2)

    def measure(stage: Stage) -> None:
        if (folder := stage.folder) is None:
            return
        with bench.part(f"peak memory of {stage.label}"):
            key = {"model": stage.digest, **VERSIONS}
            found[stage.label] = bench.store.once(
                "peak-memory", key, lambda: peak_bytes(folder, bench.compute.name, threads)
            )

    bench.watch("peak memory", 0, 1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(measure, bench.stages))
    return found


def models(bench: Bench, measured: Mapping[str, int]) -> dict[str, Any]:
    """What every model is; of controls, which are not kept, only what they mean."""
    found: dict[str, Any] = {}
    for stage in (*bench.stages, *bench.others):
        told: dict[str, Any] = {
            "kind": stage.kind,
            "meaning": stage.meaning,
            "folder": str(stage.folder) if stage.folder else None,
            "active_fraction": stage.active,
        }
        if stage.folder is not None:
            key = {"model": stage.digest, **VERSIONS}
            told |= bench.store.once(
                "sizes", key, lambda s=stage: sizes(bench.opened(s.label), bench.stored)
            )
            told["peak_bytes"] = measured.get(stage.label)
        found[stage.label] = told
    return found


def frontier(bench: Bench, texts: Mapping[str, Any]) -> list[dict[str, Any]]:
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
        for stage in (*bench.stages, *bench.others)
        if stage.label in rows
    ]


def robustness(
    bench: Bench, sizes: Mapping[str, Any], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Every stage in every condition and on every text, and how far its routing drifts there."""
    dense = sizes.get("dense", {})
    made, lacking = conditions.conditions(
        bench.tokens,
        {
            name: beginning(
                path, 32 * settings.tokens, bench.tokenizer, text_field=settings.text_field
            )
            for name, path in bench.texts.items()
        },
        bench.tokenizer,
        vocabulary=min(len(bench.tokenizer), dense.get("vocabulary") or len(bench.tokenizer)),
        longest=dense.get("longest") or LONGEST,
        num_tokens=min(settings.tokens // 4, 2048),
        length=settings.length,
    )
    for name, reason in lacking.items():
        bench.not_run.append({"what": f"robustness, {name}", "reason": reason})
    count = settings.tokens // 2
    reference = bench.readers.read(
        conditions.reference(bench.tokens, count),
        labels=bench.labels,
        watch=_step(bench, "evaluate on calibration text"),
    )
    found: dict[str, dict[str, Any]] = {}
    for name, condition in made.items():
        with bench.part(f"robustness, {name}"):
            read = bench.readers.read(
                condition.windows,
                labels=bench.labels,
                keep=condition.keep,
                watch=_step(bench, f"evaluate on {name}"),
            )
            found[name] = _drifts(read, reference)
    for name, windows in bench.windows.items():
        with bench.part(f"robustness, {name}"):
            read = bench.readers.read(windows, labels=bench.labels)
            found[f"text: {name}"] = _drifts(read, reference)
    bench.notes.extend(f"{name}: {conditions.MEANING[name]}" for name in made)
    return found


def _drifts(
    read: Mapping[str, Reading], reference: Mapping[str, Reading]
) -> dict[str, dict[str, Any]]:
    return {
        label: robustness_row(reading, read["dense"], reference[label].choices)
        for label, reading in read.items()
    }


def generation(bench: Bench) -> list[dict[str, Any]]:
    """What every stage writes after a few prompts."""
    return [
        {"prompt": prompt, "written": {s.label: _written(bench, s, prompt) for s in bench.stages}}
        for prompt in prompts.PROMPTS
    ]


def _written(bench: Bench, stage: Stage, prompt: str) -> str:
    key = {"model": stage.digest, "prompt": prompt, "tokens": prompts.NEW_TOKENS, **VERSIONS}
    bench.watch(f"write: {stage.label}", 0, 1)
    return bench.store.once(
        "written",
        key,
        lambda: prompts.written(bench.opened(stage.label), bench.tokenizer, prompt),
    )


def regression(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How likely every stage finds the answers; where there is none, dense writes it."""
    scored = []
    for number, row in enumerate(rows, 1):
        bench.watch("prompts", number, len(rows))
        answer = row["answer"] or _written(bench, bench.stages[0], row["prompt"])
        if not answer.strip():
            reason = "the dense model writes nothing after it, and no answer was given"
            bench.not_run.append({"what": f"prompt {number}", "reason": reason})
            continue
        scores = {s.label: _likelihood(bench, s, row, answer) for s in bench.stages}
        scored.append({"prompt": row["prompt"], "answer": answer, "scores": scores})
    return prompts.regressions(scored, bench.main) if scored else []


def _likelihood(bench: Bench, stage: Stage, row: Mapping[str, Any], answer: str) -> float:
    asked = {"prompt": row["prompt"], "answer": answer, "chat": row["chat"]}
    key = {"model": stage.digest, **asked, **VERSIONS}
    return bench.store.once(
        "answer",
        key,
        lambda: prompts.likelihood(bench.opened(stage.label), bench.tokenizer, **asked),
    )


def benchmark(bench: Bench, task: str, manager: Any, limit: int | None) -> dict[str, Any]:
    """One task by every stage; one that fails is told in its place."""
    found: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    content = bench_tasks.content(task, manager)
    for stage in bench.stages:
        key = {"model": stage.digest, "task": task, "content": content, "limit": limit, **VERSIONS}
        key |= {"lm_eval": version("lm_eval"), "softmax": "float32"}
        bench.watch(f"benchmark {task}: {stage.label}", 0, 1)
        before = len(bench.not_run)
        with bench.part(f"benchmark {task}, {stage.label}"):
            found[stage.label] = bench.store.once(
                "benchmark",
                key,
                lambda s=stage: bench_tasks.run_task(
                    bench.opened(s.label), bench.tokenizer, task, manager, limit
                ),
            )
            if "dense" not in found:
                raise MoefyError("dense was not scored, so there is nothing to compare with")
            rows[stage.label] = bench_tasks.compared(found[stage.label], found["dense"])
        if len(bench.not_run) > before:
            rows[stage.label] = {"not_run": bench.not_run[-1]["reason"]}
    return rows


def speed(bench: Bench, report: dict[str, Any], settings: Settings) -> None:
    """Tokens per second of every stage, in transformers and in llama.cpp, into `report`."""
    grid, labels = settings.work, bench.labels
    ids_T = torch.cat([ids_T for windows in bench.windows.values() for ids_T in windows])
    batches = sorted({batch for batch, _ in grid.work})
    key = {
        "models": {stage.label: stage.digest for stage in bench.stages},
        "text": tensors_digest([ids_T]),
        "grid": [list(map(list, grid.work)), grid.rounds, grid.new_tokens],
        "machine": [platform.machine(), processor(), torch.get_num_threads()],
        **VERSIONS,
    }
    folders = [stage.folder for stage in bench.stages if stage.folder]
    dtypes, untried = dtypes_to_try(
        settings.compute_dtype, bench.stored, bench.compute.dtype, folders
    )
    ideal = ideals({label: report["models"][label] for label in labels}, batches)
    with bench.part("speed in transformers"):
        found = bench.store.once(
            "speed",
            key | {"dtypes": [name_of(dtype) for dtype in dtypes]},
            lambda: clock.measure(
                {label: partial(bench.opened_in, label) for label in labels},
                ids_T,
                grid,
                dtypes=dtypes,
                watch=_step(bench, "speed in transformers"),
            ),
        )
        measured = {"ideal_ratio": ideal, "processor": processor()}
        report["speed"]["transformers"] = measured | found
        bench.notes.extend(
            f"speed in {name} was not tried: {reason}" for name, reason in untried.items()
        )
        bench.notes.extend(
            f"speed of {label}: {way} was left out, which cannot compute this model ({reason})"
            for label, reasons in found.get("left_out", {}).items()
            for way, reason in reasons.items()
        )
    wanted = settings.wants(settings.engines)
    if not wanted or (reason := llama_cpp.available()) is not None:
        if wanted and settings.engines:
            bench.not_run.append({"what": "speed in llama.cpp", "reason": str(reason)})
        return
    with bench.part("speed in llama.cpp"):
        found = bench.store.once(
            "speed-llama-cpp",
            key | {"xllamacpp": version("xllamacpp")},
            lambda: llama_cpp.measure(
                {stage.label: stage.folder for stage in bench.stages if stage.folder},
                bench.place,
                ids_T,
                grid,
                watch=_step(bench, "speed in llama.cpp"),
            ),
        )
        measured = {"ideal_ratio": ideal, "processor": processor()}
        report["speed"]["llama.cpp"] = measured | found


def _step(bench: Bench, stage: str) -> Any:
    return lambda done, total: bench.watch(stage, done, total)
