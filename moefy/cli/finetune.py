"""`moefy finetune`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.shared import Force, Json, Quiet, Restart, note, quiet_libraries, show
from moefy.cli.signals import INTERRUPTED
from moefy.errors import MoefyError

NO_SETTINGS = "run out steps recipe settings force restart resume as_json quiet".split()
"""Options that are no settings of a fine-tune."""


def finetune(
    run: Annotated[Path, typer.Argument(help="Folder that `moefy convert` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write. (default: RUN-finetuned)")] = (
        None
    ),
    data: Annotated[
        str | None,
        typer.Option(
            help="File or folder of text, rows or chats; data set id; or `self`. (default: self)"
        ),
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of rows. (default: text)")] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens to train on. (default: 1,000,000)")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps instead of --tokens.")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per sequence. (default: 512)")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences per process and forward. (default: 4)")
    ] = None,
    accumulate: Annotated[int | None, typer.Option(help="Forwards per step. (default: 1)")] = None,
    train: Annotated[
        str | None,
        typer.Option(help="all, router+experts, experts, router, lora. (default: all)"),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Of the experts. (default: 2e-4)")
    ] = None,
    router_learning_rate: Annotated[
        float | None, typer.Option(help="Of the routers. (default: 1e-3)")
    ] = None,
    rest_learning_rate: Annotated[
        float | None, typer.Option(help="Of all else. (default: 1e-4)")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Folder or hub id. (default: the dense model of the run)")
    ] = None,
    teacher_cache: Annotated[
        str | None, typer.Option(help="Folder that keeps what the teacher expects.")
    ] = None,
    kl: Annotated[float | None, typer.Option(help="Weight of the distillation. (default: 1)")] = (
        None
    ),
    ce: Annotated[
        float | None, typer.Option(help="Weight of the text's own loss. (default: 0)")
    ] = (None),
    balance: Annotated[
        str | None, typer.Option(help="switch, variation, bias, none. (default: switch)")
    ] = None,
    balance_weight: Annotated[float | None, typer.Option(help="(default: 0.01)")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, more time.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random draw. (default: 0)")] = None,
    compute_dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16, float16. (default: auto)")
    ] = None,
    dtype: Annotated[str | None, typer.Option(hidden=True)] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda. (default: auto)")] = None,
    log_to: Annotated[str | None, typer.Option(help="tensorboard or wandb.")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. (default: 100)")
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="TOML file with a table \\[finetune].")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, e.g. router_ce=0.1; may be repeated."),
    ] = None,
    force: Force = False,
    restart: Restart = False,
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune the converted model RUN: distil from its dense model, keep its experts balanced.

    If it is stopped, the same command goes on from its last checkpoint.
    """
    flags = {key: value for key, value in locals().items() if key not in NO_SETTINGS}
    from moefy.finetune.settings import build

    if resume:
        note("--resume is what happens without it now; --restart starts over")
    built = build(recipe, flags, settings or [], note)
    if steps is not None:
        built = _of_steps(built, steps)
    quiet_libraries()
    from moefy.finetune.run import finetune as tune
    from moefy.progress import watching

    place = out or run.with_name(f"{run.resolve().name}-finetuned")
    try:
        with watching(quiet=quiet or os.environ.get("RANK", "0") != "0") as watch:
            summary = tune(run, place, built, force=force, restart=restart, watch=watch)
    except KeyboardInterrupt:
        raise MoefyError(_stopped(place), code=INTERRUPTED) from None
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in NO_MEMORY):
            raise
        raise MoefyError(
            f"out of memory; lower --batch-size (now {built.batch_size}) and raise --accumulate, "
            "give --gradient-checkpointing or --teacher-cache",
            code=5,
        ) from None
    if os.environ.get("RANK", "0") != "0":  # one of several processes tells
        return
    show(summary, lambda made: _tuned(made, place), as_json, quiet)


NO_MEMORY = ("allocate memory", "out of memory")


def _stopped(out: Path) -> str:
    """What to say to whoever has interrupted a fine-tune."""
    from moefy.finetune.run import last_step

    if (step := last_step(out)) is None:
        return "interrupted; nothing was written"
    return f"interrupted; step {step} is kept: run the same command again to go on from there"


def _of_steps(built: Any, steps: int) -> Any:
    """The settings with the tokens that so many steps take, of all processes together."""
    import dataclasses

    if steps < 1:
        raise MoefyError(f"--steps is {steps}; expected at least 1", code=2)
    rows = built.batch_size * built.accumulate * int(os.environ.get("WORLD_SIZE", "1"))
    return dataclasses.replace(built, tokens=steps * rows * built.sequence_length)


def _tuned(summary: dict[str, Any], out: Path) -> None:
    from moefy.report import terminal

    terminal.show_finetune(summary, out)
