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
from pathlib import Path
from typing import Any

from moefy.config.recipe import Recipe, build, located, nearest, read_toml
from moefy.convert.prepare import Watch
from moefy.errors import MoefyError
from moefy.evaluate.settings import Settings as ReportSettings
from moefy.evaluate.settings import check
from moefy.finetune.settings import TABLE as FINETUNE
from moefy.finetune.settings import Settings as FinetuneSettings
from moefy.finetune.settings import build as build_finetune
from moefy.finetune.settings import renamed
from moefy.runs.folder import (
    RECIPE,
    check_present,
    dense_model,
    open_run,
    read_recipe,
    read_report,
    read_tuning,
    written,
)
from moefy.runs.folder import REPORT as REPORTED

REPORT = "report"
"""The table of a recipe that says what to measure."""

KEYS = {
    "text": (list, "texts"),
    "text_field": (str, "text_field"),
    "dense": (str, "dense"),
    "against": (list, "against"),
    "effort": (str, "effort"),
    "tokens": (int, "num_tokens"),
    "sequence_length": (int, "length"),
    "controls": (bool, "controls"),
    "tasks": (list, "tasks"),
    "include_path": (str, "include"),
    "limit": (int, "limit"),
    "prompts": (str, "prompts"),
    "robustness": (bool, "robustness"),
    "speed": (bool, "speed"),
    "llama_cpp": (bool, "engines"),
    "compute_dtype": (str, "compute_dtype"),
    "fail_if": (list, "conditions"),
}
"""The keys of that table, named as the flags of `moefy report`: type, and what they set."""

PATHS = ("text", "include_path", "prompts")
EFFORTS = ("quick", "usual", "full")
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
    finetune: FinetuneSettings | None
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """One stage: where it writes, whether that is done, and how to do it."""

    name: str
    folder: Path
    done: Callable[[], bool]
    """Raises where it was done otherwise."""
    do: Callable[[Watch], dict[str, Any]]


def declared(file: Path) -> Stages:
    """The stages that a recipe file asks for.

    Raises:
        MoefyError: code 2 for whatever is wrong in the file.
    """
    tables = read_toml(file)
    finetune = build_finetune(file, {}, []) if FINETUNE in tables else None
    table = tables.get(REPORT, {})
    if not isinstance(table, dict):
        raise MoefyError(f"recipe {file}: {REPORT} is {table!r}; expected a table", code=2)
    report_settings(table)
    return Stages(build(file, {}, []), finetune, table)


def report_settings(table: Mapping[str, Any]) -> ReportSettings:
    """What a `[report]` table asks `moefy report` for.

    Raises:
        MoefyError: code 2 for an unknown key or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in KEYS:
            raise MoefyError(f"unknown key {key!r} in [report]; {nearest(key, [*KEYS])}", code=2)
        kind, name = KEYS[key]
        words = [value] if kind is list and isinstance(value, str) else value
        whole = type(words) is kind and (kind is not list or all(type(w) is str for w in words))
        if not whole:
            wanted = "a list of strings" if kind is list else kind.__name__
            raise MoefyError(f"[report] {key} is {value!r}; expected {wanted}", code=2)
        if kind is list:
            values[name] = tuple(Path(word) if key in PATHS else word for word in words)
        else:
            values[name] = Path(str(words)) if key in PATHS else words
    if (effort := values.get("effort", EFFORTS[0])) not in EFFORTS:
        raise MoefyError(f"[report] effort is {effort!r}; {nearest(effort, [*EFFORTS])}", code=2)
    return check(ReportSettings(**values))


def stages(declared: Stages, out: Path, *, force: bool = False) -> list[Stage]:
    """The stages in their order. With `force` all are done anew."""
    found = [
        Stage(
            "convert",
            out,
            lambda: _converted(out, declared.recipe),
            lambda watch: _convert(out, declared.recipe, force, watch),
        )
    ]
    last = out
    if settings := declared.finetune:
        last = out.with_name(f"{out.resolve().name}-finetuned")
        found.append(
            Stage(
                "finetune",
                last,
                lambda: _finetuned(out, last, settings),
                lambda watch: _finetune(out, last, settings, force, watch),
            )
        )
    found.append(
        Stage(
            "report",
            last,
            lambda: _reported(last, declared.report),
            lambda watch: _report(last, declared.report, watch),
        )
    )
    return found


def run(
    wanted: Sequence[Stage], *, force: bool = False, watch: Watch = lambda *_: None
) -> Iterator[tuple[Stage, dict[str, Any] | None]]:
    """Do the stages in turn, and give of each what it tells, or None where it was done already.

    Raises:
        MoefyError: code 2 where a stage was done by another recipe, and 3 where its files are not
            whole any more, before any is begun; else what the stages raise.
    """
    done = {stage.name: not force and stage.done() for stage in wanted}
    for stage in wanted:
        # What comes after a stage that is done now was not done on its result.
        yield stage, None if done[stage.name] else stage.do(watch)


def _converted(out: Path, recipe: Recipe) -> bool:
    folder = out / "moefy"
    if not (folder / REPORTED).is_file() or not (folder / RECIPE).is_file():
        return False
    _check_same(out, "converted", _deciding(read_recipe(out)), _deciding(recipe))
    _check_whole(out)
    if os.path.isdir(recipe.model):  # else a hub id, whose revision is in the recipe
        summary = read_report(out)
        if not dense_model(out, summary, recipe, recipe.model, "MODEL").made(summary):
            raise MoefyError(
                f"{out} was converted from other weights than {recipe.model} holds now; {ANEW}",
                code=2,
            )
    return True


def _deciding(recipe: Recipe) -> dict[str, Any]:
    """The keys of a recipe that decide what a conversion is."""
    idle = NOT_OF_RESULT + (NOT_OF_SELF if recipe.calibration == "self" else NOT_OF_TEXT)
    return {key: value for key, value in dataclasses.asdict(recipe).items() if key not in idle}


def _convert(out: Path, recipe: Recipe, force: bool, watch: Watch) -> dict[str, Any]:
    from moefy.convert.prepare import prepare
    from moefy.convert.run import convert
    from moefy.files.publish import check_free

    check_free(out, force=force)
    return convert(prepare(recipe), out, force=force, watch=watch)


def _finetuned(run: Path, out: Path, settings: FinetuneSettings) -> bool:
    if (tuning := read_tuning(out)) is None:
        return False
    idle = NOT_OF_WEIGHTS + (NOT_OF_SELF if settings.data == "self" else ())
    wanted = {k: v for k, v in dataclasses.asdict(settings).items() if k not in idle}
    # What an older moefy had no setting for, it did as the default does.
    known = dataclasses.asdict(FinetuneSettings()) | renamed(tuning["settings"])
    _check_same(out, "fine-tuned", located(known, "data", "teacher"), wanted)
    _check_whole(out)
    base = read_report(run)["outputs"] if (run / "moefy" / REPORTED).is_file() else {}
    started = tuning["parent"]["files"]
    if changed := [name for name, digest in started.items() if base.get(name) != digest]:
        raise MoefyError(
            f"{out} was fine-tuned from another conversion than {run} ({changed[0]} differs); "
            f"{ANEW}",
            code=2,
        )
    return True


def _finetune(
    run: Path, out: Path, settings: FinetuneSettings, force: bool, watch: Watch
) -> dict[str, Any]:
    from moefy.finetune.run import finetune

    return finetune(run, out, settings, force=force, watch=watch)


def _reported(out: Path, table: Mapping[str, Any]) -> bool:
    """Whether the report there is of what is asked for; other measurements are in its cache."""
    told = _read(out / "moefy" / "report.json")
    return told is not None and told.get("settings") == report_settings(table).told()


def _report(out: Path, table: Mapping[str, Any], watch: Watch) -> dict[str, Any]:
    from moefy.evaluate.run import evaluate

    return evaluate(out, report_settings(table), watch=watch)


def _check_same(out: Path, done: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a folder that another recipe has made."""
    differs = [
        f"{key} is {found.get(key)!r} there and {value!r} in the recipe"
        for key, value in wanted.items()
        if found.get(key) != value
    ]
    if differs:
        raise MoefyError(
            f"{out} was {done} by another recipe: {'; '.join(differs)}; {ANEW}", code=2
        )


def _check_whole(out: Path) -> None:
    """Refuse the result of a stage that has lost files, or parts of them, since it was done.

    Names, headers and sizes tell that at once; `moefy verify` compares all bytes.
    """
    try:
        check_present(out, written(out, open_run(out)))
    except MoefyError as error:
        reason = str(error).partition("; fetch")[0]
        raise MoefyError(f"{reason}; {ANEW}", code=error.code) from None


def _read(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
