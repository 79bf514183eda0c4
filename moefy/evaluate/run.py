"""Compare a finished run with its dense model, its earlier stages, other runs and controls."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moefy import __version__
from moefy.compute_dtype import name_of
from moefy.config.report import Settings
from moefy.environment import device_name, processor
from moefy.errors import MoefyError
from moefy.evaluate import (
    advice,
    benchmarks,
    fail_if,
    frontier,
    lost_experts,
    measure,
    quantized,
    rivals,
)
from moefy.evaluate.candidates import finetuning
from moefy.evaluate.engine_speeds import engine_speeds
from moefy.evaluate.prepare import prepare
from moefy.evaluate.session import Session
from moefy.files.publish import write_json
from moefy.models import families
from moefy.progress import Watch
from moefy.report import redraw
from moefy.runs.folder import open_run
from moefy.text.windows import overlap

FORMAT = 2
"""Version of report.json."""

USUAL = Settings()


def evaluate(
    run: Path, settings: Settings = USUAL, *, watch: Watch = lambda *_: None
) -> dict[str, Any]:
    """Measure what `settings` ask for; write `report.json` and the pages drawn from it into `run`.

    All models run on one device, in the dtype that `compute_dtype` chooses for the dense model;
    speed is measured in other dtypes, too. Measurements of the same weights, text and settings are
    taken from `run/moefy/measured`. A part that fails is listed under `not_run`, and the others go
    on.

    Raises:
        MoefyError: code 2 for wrong settings, code 3 when `run` or another one is no whole run, has
            another tokenizer than dense, or a text is too short, code 4 for a family without
            next-token perplexity, code 5 when a program or a device is missing, code 6 when a model
            computes no finite likelihood. Without a scored text nothing else is measured.
    """
    parsed = [fail_if.parse(text) for text in settings.fail_if]
    summary = open_run(run)
    if "ForCausalLM" not in families.load(summary["family"]).tasks:
        raise MoefyError(
            f"{summary['family']} has no next-token perplexity on plain text, by which a report "
            "compares models; see moefy/conversion.md for the error of each layer",
            code=4,
        )
    tasks, include_path = settings.tasks, settings.include_path
    manager = benchmarks.check_tasks(tasks, include_path) if tasks else None
    with tempfile.TemporaryDirectory(prefix=".moefy-report-", dir=run.resolve().parent) as place:
        session = prepare(run, summary, settings, Path(place), watch)
        report = _empty(session, settings)
        _measure(session, report, settings, manager)
    report["advice"] = advice.advice(report, session.main)
    report["failed"] = [
        line for one in parsed for line in fail_if.failures(one, report, session.main)
    ]
    write_json(run / "moefy" / "report.json", report)
    redraw(run)
    return report


def _empty(session: Session, settings: Settings) -> dict[str, Any]:
    """A report before its measurements; lists of the session fill up later."""
    tunings, main = {c.label: finetuning(c) for c in session.candidates}, session.main
    return {
        "moefy": __version__,
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings.as_json(),
        "main": main,
        "compute": {
            "dtype": session.compute.name,
            "stored": name_of(session.stored),
            "note": session.compute.note,
            "processor": processor(),
            "device": device_name(session.device),
        },
        "run": session.summary,
        "runs": {c.label: c.summary for c in session.candidates if c.summary and c.label != main},
        "models": {},
        "texts": {},
        "seen_in_calibration": {
            name: overlap(session.tokens.ids_BT, windows)
            for name, windows in session.windows.items()
        },
        "robustness": {},
        "benchmarks": {},
        "prompts": [],
        "generation": [],
        "behaviour": {},
        "lost_experts": {},
        "quantized": {},
        "routing": {},
        "speed": {},
        "finetune": {label: tuning for label, tuning in tunings.items() if tuning is not None},
        "rivals": {},
        "frontier": [],
        "advice": [],
        "not_run": session.not_run,
        "notes": session.notes,
        "seconds": session.seconds,
    }


def _measure(session: Session, report: dict[str, Any], settings: Settings, manager: Any) -> None:
    """Fill `report` part by part; each part may fail without the others."""
    peaks = {} if settings.effort == "quick" else measure.peaks(session)
    with session.part("scores"):
        report |= measure.quality(session)
    if not report["texts"]:
        row = next(row for row in session.not_run if row["what"].startswith("scores"))
        code = session.codes.get(row["what"], 5)
        raise MoefyError(f"no text was scored: {row['reason']}", code=code)
    with session.part("sizes"):
        report["models"] = measure.models(session, peaks)
    if settings.rivals or rivals.named(settings):
        with session.part("rivals"):
            rivals.rivals(session, report, settings)
    if settings.quantized:
        with session.part("quantized"):
            report["quantized"] = quantized.quantized(session, settings)
    report["frontier"] = frontier.points(report["texts"], report["models"], session.main)
    if settings.wants(settings.robustness):
        with session.part("robustness"):
            report["robustness"] = measure.robustness(session, report["models"], settings)
    with session.part("generation"):
        report["generation"] = measure.generation(session)
    if session.prompts:
        with session.part("prompts"):
            report["prompts"] = measure.regression(session)
    if settings.wants(settings.behaviour, ("full",)):
        with session.part("behaviour"):
            report["behaviour"] = measure.behaviours(session, report["models"], settings)
    if settings.lost_experts:
        with session.part("lost experts"):
            report["lost_experts"] = lost_experts.lost_experts(session, settings)
    for task in settings.tasks:
        with session.part(f"benchmark {task}"):
            report["benchmarks"][task] = measure.benchmark(session, task, manager, settings.limit)
    if settings.speed:
        with session.part("speed"):
            engine_speeds(session, report, settings)
