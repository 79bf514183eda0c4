"""`moefy finetune`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from dataclasses import MISSING, dataclass
from pathlib import Path

from moefy.cli.parameters import Options, command
from moefy.cli.shared import (
    FORCE,
    JSON,
    QUIET,
    RESTART,
    SETTINGS,
    first,
    note,
    quiet_libraries,
    show,
)
from moefy.cli.signals import interrupted
from moefy.config.finetune import Settings, build
from moefy.config.options import option
from moefy.config.presets import OPEN, own_defaults
from moefy.distributed import together
from moefy.errors import MoefyError, is_out_of_memory


@dataclass(frozen=True)
class Finetune:
    """What `moefy finetune` takes beside the keys of the table `[finetune]`."""

    run: Path = option(MISSING, "Folder that `moefy convert` wrote.", argument=True)
    out: Path | None = option(None, "Folder to write.", unset="RUN-finetuned")
    steps: int | None = option(None, "Steps to train, instead of --tokens.", least=1)
    recipe: Path | None = option(None, "TOML file with a table [finetune].")
    settings: tuple[str, ...] = option((), SETTINGS)
    plan: bool = option(False, "Only say what would be done, from a few steps of the first layers.")
    force: bool = option(False, FORCE)
    restart: bool = option(False, RESTART)
    resume: bool = option(False, "", hidden=True)
    as_json: bool = option(False, JSON)
    quiet: bool = option(False, QUIET)


@command(Settings, Finetune)
def finetune(options: Options, asked: Finetune) -> None:
    """Fine-tune the converted model RUN: distil from its dense model, keep its experts balanced.

    If it is stopped, the same command goes on from its last checkpoint.
    """
    if asked.resume:
        note("--resume is what happens without it now; --restart starts over")
    from moefy.runs.folder import read_recipe

    own = None
    with contextlib.suppress(MoefyError):  # what is no run is refused when it is opened
        own = own_defaults(read_recipe(asked.run))
    tokens = options.get("tokens")
    if asked.steps is not None:
        options = {**options, "tokens": Settings.tokens}
    settings = build(asked.recipe, options, [*asked.settings], note, own=own)
    if asked.steps is not None:
        settings = _of_steps(settings, asked.steps)
        if tokens is not None:
            raise MoefyError(
                f"--steps {asked.steps} and --tokens {tokens}; expected one of them", code=2
            )
    quiet_libraries()
    out = asked.out or asked.run.with_name(f"{asked.run.resolve().name}-finetuned")
    if asked.plan:
        _show_plan(asked, out, settings)
        return
    from moefy.finetune.home import last_step
    from moefy.finetune.run import finetune as train
    from moefy.progress import watching
    from moefy.report import terminal

    quiet, restart = asked.quiet or not first(), asked.restart
    try:
        with together(), watching(quiet=quiet) as watch:
            summary = train(
                asked.run, out, settings, force=asked.force, restart=restart, watch=watch
            )
    except KeyboardInterrupt:
        step = last_step(out)
        raise interrupted(None if step is None else f"step {step} is") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise MoefyError(
            f"out of memory; lower --batch-size (now {settings.batch_size}) and raise "
            "--gradient-accumulation-steps, give --gradient-checkpointing or --teacher-cache",
            code=5,
        ) from None
    show(summary, lambda _: terminal.show_finetune(summary, out), asked.as_json, quiet)


def _show_plan(asked: Finetune, out: Path, settings: Settings) -> None:
    """Print what a fine-tune will take; refuse what does not fit."""
    from moefy.finetune.estimate import check
    from moefy.finetune.prepare import plan
    from moefy.report import terminal

    result = plan(asked.run, out, settings)
    show(result, terminal.show_finetune_plan, asked.as_json, quiet=False)
    check(result)


def _of_steps(settings: Settings, steps: int) -> Settings:
    """The settings with the tokens that so many steps take, of all processes together."""
    if OPEN in (settings.batch_size, settings.gradient_accumulation_steps):
        raise MoefyError(
            f"--steps with --preset {settings.preset}, which chooses the tokens of a step; give "
            "--tokens, or no preset",
            code=2,
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rows = settings.batch_size * settings.gradient_accumulation_steps * world
    return dataclasses.replace(settings, tokens=steps * rows * settings.sequence_length)
