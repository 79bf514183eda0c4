"""`moefy convert`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.shared import Force, Json, Quiet, Restart, note, quiet_libraries, show
from moefy.cli.signals import INTERRUPTED
from moefy.errors import MoefyError

NO_RECIPE = "memory recipe reproduce settings plan force strict restart fresh".split()
NO_RECIPE += "as_json quiet out".split()
"""Options that are no keys of a recipe."""


def convert(
    model: Annotated[str | None, typer.Argument(help="Folder, hub id, or `demo`.")] = None,
    out: Annotated[Path | None, typer.Argument(help="Folder to write.")] = None,
    active: Annotated[
        float | None,
        typer.Option(help="FFN neurons active per token, as a fraction. (default: 0.5)"),
    ] = None,
    experts: Annotated[
        int | None, typer.Option(help="Routed experts per layer. (default: 8)")
    ] = None,
    experts_per_token: Annotated[
        int | None, typer.Option(help="Routed experts that each token goes to. (default: 2)")
    ] = None,
    shared: Annotated[
        float | None, typer.Option(help="FFN neurons that are always active, as a fraction.")
    ] = None,
    total: Annotated[
        float | None,
        typer.Option(
            help="FFN neurons stored, as a multiple; above 1 experts overlap. (default: 1)"
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to convert: `:`, `4:`, `0,3,7`, `auto`. (default: all)"),
    ] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="alternating; or coactivation, expertweaver, gradient, shuffle, static, weights. "
            "(default: alternating)"
        ),
    ] = None,
    router: Annotated[
        str | None, typer.Option(help="linear; or centroids, gates, random. (default: linear)")
    ] = None,
    refit: Annotated[
        bool | None, typer.Option("--refit/--no-refit", help="Correct down_proj. (default: refit)")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Stock class to write, or `auto`. (default: auto)")
    ] = None,
    engines: Annotated[
        str | None, typer.Option(help="Engines that must run it, e.g. `llama.cpp,vllm`.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="File or folder of text, rows or chats; data set id; or `self`. (default: self)"
        ),
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of rows. (default: text)")] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens. (default: 16384)")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per sequence. (default: 512)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random draw. (default: 0)")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="as-stored, float32, bfloat16, float16. (default: as-stored)")
    ] = None,
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            help="Of self-written text: auto, float32, bfloat16, float16. (default: auto)"
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Bytes in a file of OUT at most. (default: 5GB)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda. (default: auto)")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="Bytes to keep to, e.g. 6GB. (default: all)"),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file with any of these.")] = None,
    reproduce: Annotated[
        Path | None,
        typer.Option(help="recipe.toml of a run, to do it again and compare; takes OUT alone."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, e.g. partition.rounds=6; may be repeated."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be done.")] = False,
    force: Force = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where an expert sees too little text.")
    ] = False,
    restart: Restart = False,
    fresh: Annotated[bool, typer.Option("--fresh", hidden=True)] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert the dense checkpoint MODEL into the MoE checkpoint OUT.

    If it is stopped, the same command goes on where it was.
    """
    flags = {key: value for key, value in locals().items() if key not in NO_RECIPE}
    if fresh:
        note("--fresh is called --restart now")
        restart = True
    if reproduce:
        given = [key for key, value in flags.items() if value is not None and key != "model"]
        if recipe or settings or plan or strict or given or not model:
            raise MoefyError("--reproduce RECIPE takes OUT, or MODEL OUT, and no settings", code=2)
        place, where = (out, model) if out else (Path(model), None)
        _reproduce(reproduce, place, where, _bytes(memory), force, restart, as_json, quiet)
        return
    from moefy.checkpoint.resolve import resolve
    from moefy.checkpoint.validate import open_checkpoint
    from moefy.config.recipe import build

    built, limit = build(recipe, flags, settings or []), _bytes(memory)
    if out is None and not plan:
        raise MoefyError("no OUT given; expected `moefy convert MODEL OUT`", code=2)
    # `prepare` asks it again, but behind seconds of imports, which a refusal need not wait for.
    open_checkpoint(resolve(built.model, revision=built.revision), ignore_index=built.ignore_index)
    quiet_libraries()
    from moefy.convert.prepare import prepare

    if plan or out is None:
        from moefy.convert.estimate import estimate
        from moefy.report import terminal

        show(estimate(prepare(built), limit), terminal.show_plan, as_json, quiet=False)
        return
    from moefy.convert.run import convert as run
    from moefy.distributed import launched, together
    from moefy.progress import watching

    group = launched()
    first = group.rank == 0
    quiet = quiet or not first
    ready = _resumable(out, force) if first else contextlib.nullcontext()
    with together(), ready, watching(quiet=quiet) as watch:
        summary = run(
            prepare(built),
            out,
            force=force,
            strict=strict,
            restart=restart,
            memory=limit,
            group=group,
            watch=watch,
        )
    show(summary, lambda made: _made(made, out), as_json and first, quiet)


def _bytes(memory: str | None) -> int | None:
    from moefy.config.recipe import num_bytes

    return None if memory is None else num_bytes(memory, "--memory")


def _reproduce(
    recipe: Path,
    out: Path,
    model: str | None,
    memory: int | None,
    force: bool,
    restart: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    quiet_libraries()
    from moefy.progress import watching
    from moefy.runs.reproduce import reproduce

    with _resumable(out, force), watching(quiet=quiet) as watch:
        made = reproduce(
            recipe, out, model=model, force=force, restart=restart, memory=memory, watch=watch
        )
    show(made, lambda made: _made(made, out), as_json, quiet)
    found = made["reproduced"]
    if not found["same"]:
        because = "; ".join(found["because"]) or "nothing else that is known of differs"
        files = ", ".join(found["files_that_differ"])
        raise MoefyError(f"{out} is not as {recipe} made it: {files} differ; {because}", code=6)
    if not (quiet or as_json):
        print(f"Reproduced: all files but the reports are those of {recipe}, byte for byte")


@contextlib.contextmanager
def _resumable(out: Path, force: bool) -> Iterator[None]:
    """See that OUT may be written, and tell whoever interrupts the block how to go on."""
    from moefy.files.publish import check_free, reclaim

    try:
        reclaim(out)
        check_free(out, force=force)
        yield
    except KeyboardInterrupt:
        raise MoefyError(_stopped(out), code=INTERRUPTED) from None


def _stopped(out: Path) -> str:
    """What to say to whoever has interrupted a conversion."""
    from moefy.files.publish import reclaim
    from moefy.files.resume import unfinished

    if reclaim(out):
        return f"interrupted when {out} was whole already"
    if (layers := unfinished(out)) is None:
        return "interrupted; nothing was written"
    return f"interrupted; {layers} layers are kept: run the same command again to go on from there"


def _made(summary: dict[str, Any], out: Path) -> None:
    from moefy.report import terminal

    terminal.show_conversion(summary, out)
