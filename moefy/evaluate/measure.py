"""The parts of a report, each measured once and cached."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import torch

from moefy.config.report import Settings
from moefy.errors import MoefyError
from moefy.evaluate import (
    behaviour,
    benchmarks,
    distribution_shift,
    prompts,
    tables,
)
from moefy.evaluate.candidates import Candidate
from moefy.evaluate.scoring import TextResult
from moefy.evaluate.session import LONGEST, Session
from moefy.evaluate.sizes import peak_bytes, sizes
from moefy.text.documents import beginning

OWN = "own prompts"
"""The name of the prompts that the package holds, in the part on behaviour."""


def quality(session: Session) -> dict[str, Any]:
    """The scores of every model on every text, and the routing of every stage there."""
    texts: dict[str, Any] = {}
    results: dict[str, dict[str, TextResult]] = {}
    for name, windows in session.windows.items():
        with session.part(f"scores on {name}"):
            results[name] = session.score(session.all_candidates, name, windows)
            num_bytes = tables.num_bytes(session.tokenizer, windows)
            texts[name] = tables.score_rows(results[name], num_bytes)

    def piece(token: int) -> str:
        return session.tokenizer.decode([token])

    return {"texts": texts, "routing": tables.routing_tables(results, session.labels, piece)}


def peaks(session: Session) -> dict[str, int]:
    """Peak memory of every stage, by label; controls have no folder to measure.

    Two processes run at a time, so this comes before a model is loaded here.
    """
    result: dict[str, int] = {}
    threads = max(1, torch.get_num_threads() // 2)

    def measure(candidate: Candidate) -> None:
        if (folder := candidate.folder) is None:
            return
        with session.part(f"peak memory of {candidate.label}"):
            result[candidate.label] = session.cache.once(
                "peak-memory",
                {"model": candidate.digest},
                lambda: peak_bytes(folder, session.compute.name, session.device, threads),
            )

    session.watch("peak memory", 0, 1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(measure, session.candidates))
    return result


def models(session: Session, peaks: Mapping[str, int]) -> dict[str, Any]:
    """The sizes of every model; controls were measured while they were open."""
    result: dict[str, Any] = {}
    for candidate in session.all_candidates:
        row: dict[str, Any] = {
            "kind": candidate.kind,
            "meaning": candidate.meaning,
            "folder": str(candidate.folder) if candidate.folder else None,
            "active_fraction": candidate.active,
        }
        if candidate.folder is not None:
            row |= session.cached("sizes", candidate, lambda model: sizes(model, session.stored))
            row["peak_bytes"] = peaks.get(candidate.label)
        else:
            row |= session.cache.get("sizes", {"model": candidate.digest}) or {}
        result[candidate.label] = row
    return result


def robustness(
    session: Session, sizes: Mapping[str, Any], settings: Settings
) -> dict[str, dict[str, Any]]:
    """Every stage on shifted text and on every text, and how far its routing drifts there."""
    dense, tokenizer = sizes.get("dense", {}), session.tokenizer
    texts = [
        beginning(path, 32 * settings.num_tokens, tokenizer, text_field=settings.text_field)
        for path in session.texts.values()
    ]
    shifted, impossible = distribution_shift.shifts(
        session.tokens,
        "\n\n".join(texts),
        tokenizer,
        vocabulary=min(len(tokenizer), dense.get("vocabulary") or len(tokenizer)),
        longest=dense.get("longest") or LONGEST,
        num_tokens=min(settings.num_tokens // 4, 2048),
        length=settings.sequence_length,
    )
    for name, reason in impossible.items():
        session.not_run.append({"what": f"robustness, {name}", "reason": reason})

    fitted = distribution_shift.reference(session.tokens, settings.num_tokens // 2)
    reference = session.score(session.candidates, "calibration text", fitted)
    plain = {f"text: {name}": (windows, None) for name, windows in session.windows.items()}
    rows: dict[str, dict[str, Any]] = {}
    for name, (windows, keep) in (shifted | plain).items():
        with session.part(f"robustness, {name.removeprefix('text: ')}"):
            results = session.score(session.candidates, name, windows, keep)
            rows[name] = {
                label: tables.robustness_row(result, results["dense"], reference[label].choices)
                for label, result in results.items()
            }
    session.notes.extend(f"{name}: {distribution_shift.MEANING[name]}" for name in shifted)
    return rows


def generation(session: Session) -> list[dict[str, Any]]:
    """The text that every stage writes after a few prompts."""
    return [
        {
            "prompt": prompt,
            "written": {c.label: _continuation(session, c, prompt) for c in session.candidates},
        }
        for prompt in prompts.PROMPTS
    ]


def _continuation(session: Session, candidate: Candidate, prompt: str) -> str:
    session.watch(f"write: {candidate.label}", 0, 1)
    return session.cached(
        "continuation",
        candidate,
        lambda model: prompts.continuation(model, session.tokenizer, prompt),
        prompt=prompt,
        tokens=prompts.NEW_TOKENS,
    )


def regression(session: Session) -> list[dict[str, Any]]:
    """The likelihood of each prompt's answer by every stage; dense writes a missing answer."""
    rows = []
    for number, row in enumerate(session.prompts, 1):
        session.watch("prompts", number, len(session.prompts))
        answer = row["answer"] or _continuation(session, session.candidates[0], row["prompt"])
        if not answer.strip():
            reason = "the dense model writes nothing after it, and no answer was given"
            session.not_run.append({"what": f"prompt {number}", "reason": reason})
            continue
        texts = {"prompt": row["prompt"], "answer": answer, "chat": row["chat"]}
        scores = {
            candidate.label: session.cached(
                "answer",
                candidate,
                lambda model, texts=texts: prompts.likelihood(model, session.tokenizer, **texts),
                **texts,
            )
            for candidate in session.candidates
        }
        rows.append({"prompt": row["prompt"], "answer": answer, "scores": scores})
    return prompts.regressions(rows, session.main) if rows else []


def behaviours(session: Session, sizes: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """How the answers of every stage behave: to our own prompts, and to those of `--prompts`."""
    sets = {OWN: behaviour.own_prompts()}
    if settings.prompts is not None:
        sets[settings.prompts.name] = session.prompts
    longest = sizes.get("dense", {}).get("longest") or LONGEST
    return {
        "chat": behaviour.is_chat(session.tokenizer),
        "meaning": behaviour.MEANING,
        "sets": {name: _answered(session, name, some, longest) for name, some in sets.items()},
    }


def _answered(
    session: Session, name: str, prompts: list[dict[str, Any]], longest: int
) -> dict[str, Any]:
    """The figures of a set of prompts, and the answers of every stage to each of them."""
    asked, rows = [], []
    for number, prompt in enumerate(prompts, 1):
        text = behaviour.question(session.tokenizer, prompt, f"{name}, prompt {number}")
        length = len(session.tokenizer(text)["input_ids"])
        if length + behaviour.LEAST_ROOM > longest:
            reason = (
                f"it has {length:,} tokens, and the model takes {longest:,}, its answer included"
            )
            session.not_run.append({"what": f"{name}, prompt {number}", "reason": reason})
            continue
        last = prompt["turns"][-1]["content"]
        row = {"prompt": last, "kind": prompt.get("kind"), "json": prompt["json"], "written": {}}
        asked.append((length, text, row))
        rows.append(row)
    if not asked:
        raise MoefyError(f"{name}: no prompt fits in the {longest:,} tokens that the model takes")
    asked.sort(key=lambda one: one[0])  # so that little is padded
    limit = min(behaviour.NEW_TOKENS, longest - max(length for length, _, _ in asked))
    for candidate in session.candidates:
        for start in range(0, len(asked), behaviour.BATCH):
            session.watch(f"behaviour: {candidate.label}", start, len(asked))
            some = asked[start : start + behaviour.BATCH]
            texts = [text for _, text, _ in some]
            written = session.cached(
                "answers",
                candidate,
                lambda model, texts=texts: behaviour.answers(
                    model, session.tokenizer, texts, limit
                ),
                questions=texts,
                tokens=limit,
            )
            for (_, _, row), answer in zip(some, written, strict=True):
                row["written"][candidate.label] = behaviour.judged(answer, row["json"])
    return {"tokens": limit, "figures": behaviour.figures(rows), "answers": rows}


def benchmark(session: Session, task: str, manager: Any, limit: int | None) -> dict[str, Any]:
    """One task by every stage; the row of a stage that fails holds the reason."""
    results: dict[str, Any] = {}
    rows: dict[str, Any] = {}
    key = {"task": task, "content": benchmarks.content(task, manager), "limit": limit}
    key |= {"lm_eval": version("lm_eval"), "softmax": "float32"}
    for label, candidate in zip(session.labels, session.candidates, strict=True):
        session.watch(f"benchmark {task}: {label}", 0, 1)
        before = len(session.not_run)
        with session.part(f"benchmark {task}, {label}"):
            results[label] = session.cached(
                "benchmark",
                candidate,
                lambda model: benchmarks.run_task(model, session.tokenizer, task, manager, limit),
                **key,
            )
            if "dense" not in results:
                raise MoefyError("dense was not scored, so there is nothing to compare with")
            rows[label] = benchmarks.compared(results[label], results["dense"])
        if len(session.not_run) > before:
            rows[label] = {"not_run": session.not_run[-1]["reason"]}
    return rows
