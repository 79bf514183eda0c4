"""Measure a finished run against its dense model, its other stages, other runs and controls."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from moefy import __version__
from moefy.compute import name_of
from moefy.convert.prepare import Watch
from moefy.environment import processor
from moefy.errors import MoefyError
from moefy.evaluate import advice, benchmarks, measure
from moefy.evaluate import conditions as gate
from moefy.evaluate.candidates import finetuning
from moefy.evaluate.session import Bench, prepare
from moefy.evaluate.settings import Settings, check
from moefy.files.publish import write_json
from moefy.models import families
from moefy.report import redraw
from moefy.runs.folder import open_run
from moefy.text.windows import overlap

FORMAT = 2
"""Of report.json."""

USUAL = Settings()


def evaluate(
    run: Path, settings: Settings = USUAL, *, watch: Watch = lambda *_: None
) -> dict[str, Any]:
    """Measure what `settings` ask for; write `report.json` and the pages drawn from it into `run`.

    All models run on the CPU, in the one dtype that `compute_dtype` chooses for the dense model;
    speed is tried in others, too. What has been measured before, of the same weights, text and
    settings, is taken from `run/moefy/measured`. A part that fails is told under `not_run`, and the
    others go on.

    Raises:
        MoefyError: code 2 for what cannot be asked, code 3 when `run` or another is no whole run,
            has another tokenizer than dense, or a text is too short, code 4 for a family that has
            no next-token perplexity, code 5 when a program that was asked for is missing, code 6
            when a model computes no finite likelihood. Where no text can be scored, nothing else is
            measured.
    """
    check(settings)
    conditions = [gate.parse(text) for text in settings.conditions]
    summary = open_run(run)
    if "ForCausalLM" not in families.load(summary["family"]).tasks:
        raise MoefyError(
            f"{summary['family']} has no next-token perplexity on plain text, by which models are "
            "compared here; what each layer lost is in moefy/conversion.md",
            code=4,
        )
    manager = benchmarks.check_tasks(settings.tasks, settings.include) if settings.tasks else None
    with tempfile.TemporaryDirectory(prefix=".moefy-report-", dir=run.resolve().parent) as place:
        bench = prepare(run, summary, settings, Path(place), watch)
        report = _measured(bench, settings, manager)
    report["advice"] = advice.advice(report, bench.main)
    report["failed"] = [
        line for one in conditions for line in gate.failures(one, report, bench.main)
    ]
    write_json(run / "moefy" / "report.json", report)
    redraw(run)
    return report


def _measured(bench: Bench, settings: Settings, manager: Any) -> dict[str, Any]:
    """All parts, each of which may fail without the others."""
    report: dict[str, Any] = {
        "moefy": __version__,
        "format": FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings.told(),
        "main": bench.main,
        "compute": {
            "dtype": bench.compute.name,
            "stored": name_of(bench.stored),
            "note": bench.compute.note,
            "processor": processor(),
        },
        "run": bench.summary,
        "runs": measure.other_runs(bench),
        "models": {},
        "texts": {},
        "seen_in_calibration": {
            name: overlap(bench.tokens.ids_BT, windows) for name, windows in bench.windows.items()
        },
        "robustness": {},
        "benchmarks": {},
        "prompts": [],
        "generation": [],
        "routing": {},
        "speed": {},
        "finetune": {
            stage.label: told for stage in bench.stages if (told := finetuning(stage)) is not None
        },
        "frontier": [],
        "advice": [],
        "not_run": bench.not_run,
        "notes": bench.notes,
        "seconds": bench.seconds,
    }
    measured = {} if settings.effort == "quick" else measure.peaks(bench)
    with bench.part("scores"):
        report |= measure.quality(bench)
    if not report["texts"]:
        raise _no_text(bench)
    with bench.part("sizes"):
        report["models"] = measure.models(bench, measured)
    report["frontier"] = measure.frontier(bench, report["texts"])
    if settings.wants(settings.robustness):
        with bench.part("robustness"):
            report["robustness"] = measure.robustness(bench, report["models"], settings)
    with bench.part("generation"):
        report["generation"] = measure.generation(bench)
    if bench.prompts:
        with bench.part("prompts"):
            report["prompts"] = measure.regression(bench, bench.prompts)
    for task in settings.tasks:
        with bench.part(f"benchmark {task}"):
            report["benchmarks"][task] = measure.benchmark(bench, task, manager, settings.limit)
    if settings.speed is not False:
        with bench.part("speed"):
            measure.speed(bench, report, settings)
    return report


def _no_text(bench: Bench) -> MoefyError:
    """What kept the first text from being scored."""
    row = next(row for row in bench.not_run if row["what"].startswith("scores"))
    return MoefyError(f"no text was scored: {row['reason']}", code=bench.codes.get(row["what"], 5))
