"""`moefy run`: a recipe's stages one after the other, each skipped where it has been done already.

The convert stage writes OUT; the fine-tune, if the recipe has a table `[finetune]`, OUT-finetuned;
the report, by the table `[report]` or its defaults, goes into the last of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moefy.config import finetune, recipe, report
from moefy.config.options import Note, renamed
from moefy.config.presets import OPEN, own_defaults
from moefy.config.recipe import TOKENS, Recipe
from moefy.config.toml import read_toml
from moefy.errors import MoefyError
from moefy.progress import Watch
from moefy.runs import folder as runs

ANEW = "give another OUT, or --force to do all stages anew"

NOT_OF_RESULT = ("device", "ignore_index")
"""Keys of a recipe that may differ from those that a conversion was done with."""

NOT_OF_SELF = ("text_field", "stratify")
"""Keys that say how a text is read, which matters only where the model writes none of its own."""

NOT_OF_TEXT = ("compute_dtype",)
"""The key that says how the model writes its own text."""

NOT_OF_WEIGHTS = ("device", "log_every", "log_to", "save_every", "teacher_cache")
"""Settings of a fine-tune that may differ from those that it was done with."""


@dataclass(frozen=True)
class Stages:
    """What a recipe asks for, checked."""

    recipe: Recipe
    finetune: finetune.Settings | None
    report: report.Settings


@dataclass(frozen=True)
class Stage:
    """One stage: where it writes, whether that is done, and how to do it."""

    name: str
    folder: Path
    done: Callable[[], bool]  # raises where another recipe did it
    do: Callable[[Watch], dict[str, Any]]


def declared(file: Path, note: Note = lambda line: None) -> Stages:
    """The stages that a recipe file asks for.

    Raises:
        MoefyError: code 2 for whatever is wrong in the file.
    """
    tables = read_toml(file)
    table = tables.get(report.TABLE, {})
    if not isinstance(table, dict):
        raise MoefyError(f"recipe {file}: {report.TABLE} is {table!r}; expected a table", code=2)
    made, tuned = recipe.build(file, {}, [], note), None
    if finetune.TABLE in tables:
        tuned = finetune.build(file, {}, [], note, own=own_defaults(made))
    return Stages(
        made,
        tuned,
        report.build(table, note),
    )


def stages(declared: Stages, out: Path, *, force: bool = False) -> list[Stage]:
    """The stages in their order. With `force` all are done anew."""
    recipe, last = declared.recipe, out
    done, do = partial(_converted, out, recipe), partial(_convert, out, recipe, force)
    result = [Stage("convert", out, done, do)]
    if settings := declared.finetune:
        last = out.with_name(f"{out.resolve().name}-finetuned")
        done = partial(_finetuned, out, last, settings)
        do = partial(_finetune, out, last, settings, force)
        result.append(Stage("finetune", last, done, do))
    done, do = partial(_reported, last, declared.report), partial(_report, last, declared.report)
    return [*result, Stage("report", last, done, do)]


def run(
    stages: Sequence[Stage], *, force: bool = False, watch: Watch = lambda *_: None
) -> Iterator[tuple[Stage, dict[str, Any] | None]]:
    """Do the stages in turn; yields each with its summary, or None where it was done already.

    Raises:
        MoefyError: before any stage begins, code 2 where another recipe did a stage and code 3
            where a stage's files are damaged; then what the stages raise.
    """
    done = {stage.name: not force and stage.done() for stage in stages}
    for stage in stages:
        yield stage, None if done[stage.name] else stage.do(watch)


def _converted(out: Path, recipe: Recipe) -> bool:
    folder = out / "moefy"
    if not (folder / runs.REPORT).is_file() or not (folder / runs.RECIPE).is_file():
        return False
    recipe = _amounted(out, recipe)
    _check_same(out, "converted", _deciding(_asked(out, recipe)), _deciding(recipe))
    _check_whole(out)
    if os.path.isdir(recipe.model):  # else a hub id, whose revision is in the recipe
        summary = runs.read_report(out)
        if not runs.dense_model(out, summary, recipe, recipe.model, "MODEL").is_source(summary):
            raise MoefyError(
                f"{out} was converted from other weights than {recipe.model} holds now; {ANEW}",
                code=2,
            )
    return True


def _amounted(out: Path, recipe: Recipe) -> Recipe:
    """The recipe with the calibration tokens of `out`, if it has a machine choose their number."""
    tokens = runs.read_recipe(out).tokens
    if recipe.tokens:
        return recipe
    fits = recipe.minutes is not None or tokens in TOKENS.values()
    return dataclasses.replace(recipe, tokens=tokens if fits else TOKENS["cpu"])


def _asked(out: Path, recipe: Recipe) -> Recipe:
    """The recipe that a conversion was asked for: it keeps the layers and tokens that were chosen.

    How they were chosen counts if `recipe` says so as well.
    """
    kept, report = runs.read_recipe(out), runs.read_report(out)
    if recipe.minutes is not None:
        kept = dataclasses.replace(kept, minutes=report.get("minutes"))
    budget = report.get("budget")
    if not budget or recipe.layers != "auto":
        return kept
    return dataclasses.replace(kept, layers="auto", active=budget["active"])


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide what a conversion is."""
    idle = NOT_OF_RESULT + (NOT_OF_SELF if recipe.calibration == "self" else NOT_OF_TEXT)
    return {key: value for key, value in dataclasses.asdict(recipe).items() if key not in idle}


def _convert(out: Path, recipe: Recipe, force: bool, watch: Watch) -> dict[str, Any]:
    from moefy.convert.prepare import prepare
    from moefy.convert.run import convert
    from moefy.convert.session import Attempt
    from moefy.files.publish import check_free

    check_free(out, force=force)
    return convert(prepare(recipe), out, Attempt(force=force), watch=watch)


def _finetuned(run: Path, out: Path, settings: finetune.Settings) -> bool:
    if (tuning := runs.read_tuning(out)) is None:
        return False
    idle = NOT_OF_WEIGHTS + (NOT_OF_SELF if settings.data == ("self",) else ())
    # What a preset has chosen need not be chosen alike again, nor rates that nobody gave.
    asked = {k: v for k, v in dataclasses.asdict(settings).items() if k not in idle and v != OPEN}
    asked = {k: v for k, v in asked.items() if v is not None or not k.endswith("learning_rate")}
    # A setting that an older moefy lacked has its default: that is what it did.
    before = renamed(finetune.Settings, tuning["settings"])
    before = dataclasses.asdict(finetune.Settings()) | before
    _check_same(out, "fine-tuned", finetune.complete(before), asked)
    _check_whole(out)
    base = runs.read_report(run)["outputs"] if (run / "moefy" / runs.REPORT).is_file() else {}
    started = tuning["parent"]["files"]
    if changed := [name for name, digest in started.items() if base.get(name) != digest]:
        raise MoefyError(
            f"{out} was fine-tuned from another conversion than {run} ({changed[0]} differs); "
            f"{ANEW}",
            code=2,
        )
    return True


def _finetune(
    run: Path, out: Path, settings: finetune.Settings, force: bool, watch: Watch
) -> dict[str, Any]:
    from moefy.finetune.run import finetune

    return finetune(run, out, settings, force=force, watch=watch)


def _reported(out: Path, settings: report.Settings) -> bool:
    """Whether the report is of these settings; the cache keeps what other reports measured."""
    try:
        summary = json.loads((out / "moefy" / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and summary.get("settings") == settings.as_json()


def _report(out: Path, settings: report.Settings, watch: Watch) -> dict[str, Any]:
    from moefy.evaluate.run import evaluate

    return evaluate(out, settings, watch=watch)


def _check_same(out: Path, done: str, before: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a folder that another recipe wrote."""
    differences = [
        f"{key} is {before.get(key)!r} there and {value!r} in the recipe"
        for key, value in asked.items()
        if before.get(key) != value
    ]
    if differences:
        raise MoefyError(
            f"{out} was {done} by another recipe: {'; '.join(differences)}; {ANEW}", code=2
        )


def _check_whole(out: Path) -> None:
    """Refuse the result of a stage that has lost files, or parts of them, since it was done.

    Names, headers and sizes answer that at once; `moefy verify` compares all bytes.
    """
    try:
        runs.check_present(out, runs.written(out, runs.open_run(out)))
    except MoefyError as error:
        reason = str(error).partition("; fetch")[0]
        raise MoefyError(f"{reason}; {ANEW}", code=error.code) from None
