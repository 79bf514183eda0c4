"""`moefy finetune`."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from moefy.cli.parameters import Options, command
from moefy.cli.shared import FORCE, JSON, QUIET, RESTART, SETTINGS, note, quiet_libraries, show
from moefy.cli.signals import INTERRUPTED
from moefy.config.finetune import Settings, build
from moefy.config.options import option
from moefy.errors import MoefyError

NO_MEMORY = ("allocate memory", "out of memory")


@dataclass(frozen=True)
class Finetune:
    """What `moefy finetune` takes beside the keys of the table `[finetune]`."""

    run: Path = option(MISSING, "Folder that `moefy convert` wrote.", argument=True)
    out: Path | None = option(None, "Folder to write.", unset="RUN-finetuned")
    steps: int | None = option(None, "Steps to train, instead of --tokens.", least=1)
    recipe: Path | None = option(None, "TOML file with a table [finetune].")
    settings: tuple[str, ...] = option((), SETTINGS)
    force: bool = option(False, FORCE)
    restart: bool = option(False, RESTART)
    resume: bool = option(False, "", hidden=True)
    as_json: bool = option(False, JSON)
    quiet: bool = option(False, QUIET)

    @property
    def folder(self) -> Path:
        """The folder to write."""
        return self.out or self.run.with_name(f"{self.run.resolve().name}-finetuned")


@command(Settings, Finetune)
def finetune(options: Options, asked: Finetune) -> None:
    """Fine-tune the converted model RUN: distil from its dense model, keep its experts balanced.

    If it is stopped, the same command goes on from its last checkpoint.
    """
    if asked.resume:
        note("--resume is what happens without it now; --restart starts over")
    settings = build(asked.recipe, options, [*asked.settings], note)
    if asked.steps is not None:
        settings = _of_steps(settings, asked.steps)
    quiet_libraries()
    summary = _train(settings, asked)
    if os.environ.get("RANK", "0") == "0":  # one of several processes prints
        show(summary, lambda summary: _show(summary, asked.folder), asked.as_json, asked.quiet)


def _train(settings: Settings, asked: Finetune) -> dict[str, Any]:
    from moefy.finetune.run import finetune as train
    from moefy.progress import watching

    quiet = asked.quiet or os.environ.get("RANK", "0") != "0"
    try:
        with watching(quiet=quiet) as watch:
            return train(
                asked.run,
                asked.folder,
                settings,
                force=asked.force,
                restart=asked.restart,
                watch=watch,
            )
    except KeyboardInterrupt:
        raise MoefyError(_stopped(asked.folder), code=INTERRUPTED) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in NO_MEMORY):
            raise
        raise MoefyError(
            f"out of memory; lower --batch-size (now {settings.batch_size}) and raise "
            "--gradient-accumulation-steps, give --gradient-checkpointing or --teacher-cache",
            code=5,
        ) from None


def _stopped(out: Path) -> str:
    """The message after an interrupt."""
    from moefy.finetune.run import last_step

    if (step := last_step(out)) is None:
        return "interrupted; nothing was written"
    return f"interrupted; step {step} is kept: run the same command again to go on from there"


def _of_steps(settings: Settings, steps: int) -> Settings:
    """The settings with the tokens that so many steps take, of all processes together."""
    rows = (
        settings.batch_size
        * settings.gradient_accumulation_steps
        * int(os.environ.get("WORLD_SIZE", "1"))
    )
    return dataclasses.replace(settings, tokens=steps * rows * settings.sequence_length)


def _show(summary: dict[str, Any], out: Path) -> None:
    from moefy.report import terminal

    terminal.show_finetune(summary, out)
