"""The folder of an unfinished fine-tune: its lock, its log, and what may go on in it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState

from moefy.config.finetune import Settings
from moefy.errors import MoefyError
from moefy.files.lock import locked
from moefy.files.publish import FINAL, write_text
from moefy.files.safetensors_header import some
from moefy.finetune.checkpoints import Checkpoints, steps
from moefy.finetune.train import sequences_per_step

LOG, LOCK, SAVED = "finetune.jsonl", "lock", "saved"
"""The log, the lock, and the weights at the end of the training."""

NOT_OF_A_RUN = (
    "log_every", "log_to", "save_every", "teacher_cache", "device", "data", "answers", "teacher",
    "guard_restarts",
)  # fmt: skip
"""Settings that do not change the weights, or that a digest stands for."""

SEQUENCES = "sequences_per_step"
"""The key of the identity for the sequences that a step takes."""


def home_of(out: Path) -> Path:
    """The folder of the checkpoints of an unfinished fine-tune to `out`."""
    return out.with_name(f".{out.name}.moefy-finetune")


def answers_of(out: Path) -> Path:
    """The folder of the teacher's answers until a fine-tune to `out` is done, without a cache."""
    return out.with_name(f".{out.name}.moefy-answers")


def last_step(out: Path) -> int | None:
    """The step from which an unfinished fine-tune to `out` would resume; None without one."""
    return max(steps(home_of(Path(os.path.abspath(out)))), default=None)


@contextlib.contextmanager
def open_home(home: Path, out: Path, process: PartialState) -> Iterator[None]:
    """Lock the folder of the checkpoints; remove it at the end if no rerun can resume from it."""
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
                shutil.rmtree(home, ignore_errors=True)


def claim(checkpoints: Checkpoints, *, force: bool, restart: bool) -> None:
    """Check that the checkpoints are of this fine-tune.

    `force` removes those of another one instead, and `restart` removes all.

    Raises:
        MoefyError: code 7, when they are of another one.
    """
    home, lines = checkpoints.home, checkpoints.differences()
    if lines and not (force or restart):
        raise MoefyError(
            f"{home} is of another fine-tune: {some(lines)}; give the command that began it, or "
            "--force to start over",
            code=7,
        )
    if lines or restart:
        for file in home.iterdir():
            if file.name != LOCK:
                shutil.rmtree(file) if file.is_dir() else file.unlink()


def check_step(home: Path, settings: Settings, world: int) -> None:
    """Check that a step takes as many sequences as one of the checkpoints in `home`.

    Raises:
        MoefyError: code 7, with the --gradient-accumulation-steps that make them as many.
    """
    now, before = sequences_per_step(settings, world), Checkpoints(home).stored.get(SEQUENCES)
    if before in (None, now):
        return
    of_batch, left = divmod(before, settings.batch_size * world)
    advice = f"--gradient-accumulation-steps {of_batch}"
    if left:
        advice = f"a --batch-size and --gradient-accumulation-steps of {before} / {world} together"
    if before % world:
        advice = f"a number of processes that divides {before}"
    raise MoefyError(
        f"{home} was trained with {before} sequences a step, and {now} are asked for, on {world} "
        f"process{'es' * (world > 1)}; give {advice} to go on, or --force to start over",
        code=7,
    )


def check_shared(home: Path) -> None:
    """Check that this process sees the folder of the checkpoints.

    Raises:
        MoefyError: code 5.
    """
    if not (home / LOCK).exists():
        raise MoefyError(
            f"{platform.node()} does not see {home}, which the first process has made; expected "
            "an OUT in a folder that all machines share",
            code=5,
        )


def append(log: Path, row: dict[str, Any]) -> None:
    """Add a row to a log."""
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def rewind(log: Path, step: int) -> None:
    """Remove the rows after `step`, but not those of the guard."""
    rows = [row for row in read_log(log) if row["step"] <= step or "guard" in row]
    write_text(log, "".join(json.dumps(row) + "\n" for row in rows))


def read_log(log: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log, without a line that a kill or a crash has cut."""
    text = log.read_text("utf-8", errors="replace") if log.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)
