"""`moefy finetune`: from a run's folder to another run's folder."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from moefy import __version__
from moefy.errors import MoefyError
from moefy.finetune import teacher
from moefy.finetune.checkpoints import steps
from moefy.finetune.opened import (
    Opened,
    check_machine,
    load_student,
    load_teacher,
    open_run,
    read_text,
    teacher_folder,
)
from moefy.finetune.settings import TABLE, Settings
from moefy.finetune.trainer import Targets
from moefy.finetune.tune import Text, Tuned, Watchers, device, tune
from moefy.finetune.write import check_checkpoint, save, write_checkpoint
from moefy.job import Watch
from moefy.publish import check_free, file_digests, publishing, write_json, write_text
from moefy.recipe import render_table
from moefy.report import model_card

LOG = "finetune.jsonl"

NOT_OF_A_RUN = (
    "log_every", "log_to", "save_every", "teacher_cache", "device", "data", "teacher",
    "guard_restarts",
)  # fmt: skip
"""Settings that do not change the weights, or that a digest stands for."""


def finetune(
    run: Path,
    out: Path | None,
    settings: Settings,
    *,
    force: bool = False,
    resume: bool = False,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Fine-tune the run in `run` and publish the folder `out` whole; return its report.

    `out` is `run` with `-finetuned` behind it, if not given. Until then checkpoints lie beside it.

    Raises:
        MoefyError: code 2 for places that are taken, 3 for a run, text or teacher that will not
            do, 5 for a device or package that is not there, 6 when training goes wrong, 7 for checkpoints of another run.
    """
    check_machine(settings)
    process = PartialState(cpu=device(settings).type == "cpu")
    watch = watch if process.is_main_process else lambda *_: None
    out = check_free(out or run.with_name(f"{run.resolve().name}-finetuned"), force=force)
    if out == run.resolve():
        raise MoefyError(f"OUT {out} is the run itself; give another name", code=2)
    home = _home(out, resume=resume, force=force)
    opened = open_run(run)
    text, tokens = read_text(opened, settings, process.num_processes, watch)
    targets, states, taught = _teacher(opened, settings, text, process, watch)
    identity = {
        "run": opened.digests,
        "text": text.sha256,
        "teacher": taught,
        "processes": process.num_processes,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        **{k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_OF_A_RUN},
    }
    home.mkdir(parents=True, exist_ok=True)
    log = home / LOG
    if not steps(home):
        log.unlink(missing_ok=True)
    tuned = tune(
        partial(load_student, opened, settings),
        text,
        settings,
        home,
        targets=targets,
        states=states,
        identity=identity,
        watchers=(
            Watchers(partial(_append, log), partial(_rewind, log), watch)
            if process.is_main_process  # one of several processes writes the log
            else Watchers()
        ),
    )
    summary = _summary(opened, settings, tuned, tokens, taught)
    saved = home / "saved"
    save(tuned.model, saved)
    process.wait_for_everyone()
    if process.is_main_process:
        with publishing(out, force=force) as part:
            watch("write", 0, 1)
            write_checkpoint(saved, opened, part)
            # Of a model that is shared among processes, none has all: then what they have saved.
            model = load_teacher(saved, settings) if settings.fsdp else tuned.model
            summary["reopened"] = check_checkpoint(model, opened, part, text.ids_BT[-1])
            _write_reports(opened, settings, summary, log, part)
        _remove(home)
    process.wait_for_everyone()
    return summary


def home_of(out: Path) -> Path:
    """The folder of the checkpoints of an unfinished fine-tune to `out`."""
    return out.with_name(f".{out.name}.moefy-finetune")


def _home(out: Path, *, resume: bool, force: bool) -> Path:
    """The folder of the checkpoints."""
    home = home_of(out)
    if resume and not home.is_dir():
        raise MoefyError(f"nothing to resume: no {home}; start without --resume", code=7)
    if not resume and steps(home):
        if not force:
            raise MoefyError(
                f"an unfinished fine-tune lies in {home}; --resume goes on with it, --force starts "
                "anew",
                code=2,
            )
        _remove(home)
    return home


def _remove(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)


def _teacher(
    opened: Opened, settings: Settings, text: Text, process: PartialState, watch: Watch
) -> tuple[Targets | None, Callable[[Tensor], list[Tensor]] | None, dict[str, str]]:
    """What gives the teacher's expectations and its hidden states, and its files' digests."""
    if not settings.kl and not settings.hidden:
        return None, None, {}
    folder, digests = teacher_folder(opened, settings)
    keep = teacher.Keep(settings.top_p, settings.top_tokens, settings.temperature)
    load = partial(load_teacher, folder, settings)
    if settings.teacher_cache:
        name = teacher.key(digests, text.sha256, keep, settings.dtype)
        file = Path(settings.teacher_cache).expanduser() / name
        with process.main_process_first():
            found = teacher.cached(
                file, load, text.ids_BT, keep, settings.batch_size, partial(watch, "teacher")
            )
        return found if settings.kl else None, None, digests
    model = load()
    states = teacher.states(model) if settings.hidden else None
    return teacher.live(model, keep) if settings.kl else None, states, digests


def _append(log: Path, row: dict[str, Any]) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _rewind(log: Path, step: int) -> None:
    """Drop what was logged after `step`; what the guard did stays."""
    rows = [row for row in _rows(log) if row["step"] <= step or "guard" in row]
    write_text(log, "".join(json.dumps(row) + "\n" for row in rows))


def _rows(log: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log; a line that a kill or a crash has torn is passed over."""
    text = log.read_text("utf-8", errors="replace") if log.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _summary(
    opened: Opened, settings: Settings, tuned: Tuned, tokens: Any, taught: dict[str, str]
) -> dict[str, Any]:
    """What `moefy/finetune.json` holds, less the digests of the output."""
    return {
        "moefy": __version__,
        "format": 1,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "parent": {"folder": os.path.abspath(opened.folder), "files": opened.digests},
        "teacher": {"model": settings.teacher or opened.recipe.model, "files": taught},
        "train": {
            "source": tokens.source,
            "sha256": tokens.sha256,
            "documents": tokens.num_documents,
            "sequences": len(tokens.ids_BT),
            "heldout_sequences": tokens.num_heldout,
            "sequence_length": tokens.ids_BT.shape[1],
            "notes": list(tokens.notes),
        },
        "settings": dataclasses.asdict(settings),
        "tokens": tuned.tokens,
        "steps": tuned.steps,
        "seconds": tuned.seconds,
        "tokens_per_second": tuned.tokens_per_second,
        "validation": tuned.validation,
        "routing": tuned.routing,
        "guard": tuned.guard,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "accelerate")},
        },
    }


def _write_reports(
    opened: Opened, settings: Settings, summary: dict[str, Any], log: Path, part: Path
) -> None:
    """The curve, the recipe with its table, the card, and last the report: it means whole."""
    folder = part / "moefy"
    write_text(folder / LOG, log.read_text("utf-8") if log.exists() else "")
    recipe = (opened.folder / "moefy" / "recipe.toml").read_text("utf-8").split(f"\n[{TABLE}]")[0]
    write_text(folder / "recipe.toml", recipe + render_table(TABLE, dataclasses.asdict(settings)))
    write_text(part / "README.md", model_card(opened.summary, trained=summary))
    summary["outputs"] = file_digests(part, without=("README.md",))
    write_json(folder / "finetune.json", summary)


def _version(name: str) -> str:
    return str(importlib.import_module(name).__version__)
