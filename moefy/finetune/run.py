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
from moefy.config.finetune import TABLE, Settings
from moefy.config.toml import render_table
from moefy.convert.prepare import Watch
from moefy.errors import MoefyError
from moefy.files.lock import locked
from moefy.files.publish import FINAL, check_free, file_digests, publishing, write_json, write_text
from moefy.files.safetensors_header import some
from moefy.finetune import teacher
from moefy.finetune.checkpoints import foreign, steps
from moefy.finetune.checks import check_machine, check_run
from moefy.finetune.inputs import (
    Opened,
    computing,
    load_student,
    load_teacher,
    one_dtype,
    open_run,
    read_text,
    teacher_folder,
)
from moefy.finetune.train import Text, Tuned, Watchers, device, tune
from moefy.finetune.trainer import Targets
from moefy.finetune.write import check_checkpoint, save, write_checkpoint
from moefy.report import model_card

LOG = "finetune.jsonl"
LOCK, SAVED = "lock", "saved"
"""In the folder of the checkpoints: who works on it, and the weights at the end of the training."""

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
    restart: bool = False,
    watch: Watch = lambda *_: None,
) -> dict[str, Any]:
    """Fine-tune the run in `run` and publish the folder `out` whole; return its report.

    `out` is `run` with `-finetuned` behind it, if not given. Until then checkpoints lie beside it,
    from the last of which a fine-tune that was stopped goes on, unless `restart`. Those of another
    one are removed with `force`, which also replaces `out`.

    Raises:
        MoefyError: code 2 for places that are taken and for what cannot be done with this run, 3
            for a run, text or teacher that will not do, 5 for what the machine does not have, 6
            when training goes wrong, 7 for checkpoints of another fine-tune.
    """
    check_machine(settings)
    process = PartialState(cpu=device(settings).type == "cpu")
    watch = watch if process.is_main_process else lambda *_: None
    out = check_free(out or run.with_name(f"{run.resolve().name}-finetuned"), force=force)
    if out == run.resolve():
        raise MoefyError(f"OUT {out} is the run itself; give another name", code=2)
    opened = open_run(run)
    check_run(opened, settings)
    taught = settings.kl or settings.hidden
    asked = taught or settings.data == "self"
    folder, digests = teacher_folder(opened, settings) if asked else (run, {})
    computed = computing(opened, folder if asked else None, settings)
    load = partial(load_teacher, folder, settings, computed.teacher.dtype)
    text, tokens = read_text(opened, settings, process.num_processes, load, watch)
    identity = {
        "run": opened.digests,
        "text": text.sha256,
        "teacher": digests if taught else {},
        "processes": process.num_processes,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        **{k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_OF_A_RUN},
        "compute_dtype": {"student": computed.student.name, "teacher": computed.teacher.name},
    }
    home = home_of(out)
    with _begun(home, out, process):
        if process.is_main_process:
            _claim(home, identity, force=force, restart=restart)
        process.wait_for_everyone()
        keep = teacher.Keep(
            settings.top_p, min(settings.top_tokens, opened.vocab_size), settings.temperature
        )
        name = teacher.key(digests, text.sha256, keep, computed.teacher.name)
        targets, states = _teacher(load, settings, text, keep, name, process, watch)
        log = home / LOG
        if not steps(home):
            log.unlink(missing_ok=True)
        tuned = tune(
            partial(load_student, opened, settings, computed.student.dtype),
            text,
            settings,
            home,
            targets=targets,
            states=states,
            identity=identity,
            stored=computed.stored if one_dtype(opened.folder) else None,
            watchers=(
                Watchers(partial(_append, log), partial(_rewind, log), watch)
                if process.is_main_process  # one of several processes writes the log
                else Watchers()
            ),
        )
        summary = _summary(opened, settings, tuned, tokens, digests if taught else {})
        summary["compute"] = computed.summary()
        saved = home / SAVED
        save(tuned.model, saved)
        process.wait_for_everyone()
        if process.is_main_process:
            with publishing(out, force=force) as part:
                watch("write", 0, 1)
                write_checkpoint(saved, opened, part)
                # Of a model that is shared among processes, none has all: then what they saved.
                model = (
                    load_teacher(saved, settings, computed.student.dtype)
                    if settings.fsdp
                    else tuned.model
                )
                summary["reopened"] = check_checkpoint(model, opened, part, text.ids_BT[-1])
                _write_reports(opened, settings, summary, log, part)
            _remove(home)
        process.wait_for_everyone()
    return summary


def home_of(out: Path) -> Path:
    """The folder of the checkpoints of an unfinished fine-tune to `out`."""
    return out.with_name(f".{out.name}.moefy-finetune")


def last_step(out: Path) -> int | None:
    """The step that an unfinished fine-tune to `out` would go on from; None where there is none."""
    return max(steps(home_of(Path(os.path.abspath(out)))), default=None)


@contextlib.contextmanager
def _begun(home: Path, out: Path, process: PartialState) -> Iterator[None]:
    """Hold the folder of the checkpoints, which stays only if a rerun can go on from it."""
    if not process.is_main_process:
        yield
        return
    with locked(home / LOCK, out):
        final = False
        try:
            yield
        except MoefyError as error:
            final = error.code in FINAL and not (home / SAVED).exists()
            raise
        finally:
            if final or not steps(home):
                _remove(home)


def _claim(home: Path, identity: dict[str, Any], *, force: bool, restart: bool) -> None:
    """See that the checkpoints are of this fine-tune, or start over where that is asked for.

    Raises:
        MoefyError: code 7, when they are of another one.
    """
    other = foreign(home, identity)
    if other and not (force or restart):
        raise MoefyError(
            f"{home} is of another fine-tune: {some(other)}; give the command that began it, or "
            "--force to start over",
            code=7,
        )
    if other or restart:
        for file in home.iterdir():
            if file.name != LOCK:
                shutil.rmtree(file) if file.is_dir() else file.unlink()


def _remove(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)


def _teacher(
    load: Callable[[], Any],
    settings: Settings,
    text: Text,
    keep: teacher.Keep,
    name: str,
    process: PartialState,
    watch: Watch,
) -> tuple[Targets | None, Callable[[Tensor], list[Tensor]] | None]:
    """What gives the teacher's expectations and its hidden states; `name` is that of a cache."""
    if not settings.kl and not settings.hidden:
        return None, None
    if settings.teacher_cache:
        file = Path(settings.teacher_cache).expanduser() / name
        with process.main_process_first():
            tick = partial(watch, "teacher")
            found = teacher.cached(file, load, text.ids_BT, keep, settings.batch_size, tick)
        return found, None
    model = load()
    states = teacher.states(model) if settings.hidden else None
    return teacher.live(model, keep) if settings.kl else None, states


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
