"""`moefy convert`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moefy.cli.parameters import Options, command
from moefy.cli.shared import FORCE, JSON, QUIET, RESTART, SETTINGS, note, quiet_libraries, show
from moefy.cli.signals import INTERRUPTED, interrupted
from moefy.config.options import option
from moefy.config.recipe import Recipe, build, num_bytes
from moefy.errors import MoefyError


@dataclass(frozen=True)
class Convert:
    """What `moefy convert` takes beside the keys of a recipe."""

    out: Path | None = option(None, "Folder to write.", argument=True)
    memory: str | None = option(None, "Memory limit, e.g. 6GB.", unset="all")
    recipe: Path | None = option(None, "TOML file with any of the options above.")
    reproduce: Path | None = option(
        None, "recipe.toml of a run, to do it again and compare; takes OUT, or MODEL OUT."
    )
    settings: tuple[str, ...] = option((), SETTINGS)
    plan: bool = option(False, "Only say what would be done.")
    force: bool = option(False, FORCE)
    strict: bool = option(False, "Fail where an expert sees too little text.")
    restart: bool = option(False, dataclasses.replace(RESTART, old="fresh"))
    as_json: bool = option(False, JSON)
    quiet: bool = option(False, QUIET)


@command(Recipe, Convert)
def convert(options: Options, asked: Convert) -> None:
    """Convert the dense checkpoint MODEL into the MoE checkpoint OUT.

    If it is stopped, the same command goes on where it was.
    """
    limit = None if asked.memory is None else num_bytes(asked.memory, "--memory")
    if asked.reproduce:
        _reproduce(options, asked, asked.reproduce, limit)
        return
    from moefy.checkpoint.resolve import resolve
    from moefy.checkpoint.validate import open_checkpoint

    recipe = build(asked.recipe, options, [*asked.settings], note)
    if asked.out is None and not asked.plan:
        raise MoefyError("no OUT given; expected `moefy convert MODEL OUT`", code=2)
    # `prepare` checks it again, after seconds of imports that a refusal need not wait for.
    open_checkpoint(
        resolve(recipe.model, revision=recipe.revision), ignore_index=recipe.ignore_index
    )
    quiet_libraries()
    if asked.plan or asked.out is None:
        from moefy.convert.estimate import estimate
        from moefy.convert.prepare import prepare
        from moefy.report import terminal

        result = estimate(prepare(recipe), limit, asked.out or Path())
        show(result, terminal.show_plan, asked.as_json, quiet=False)
    else:
        _convert(recipe, asked, asked.out, limit)


def _convert(recipe: Recipe, asked: Convert, out: Path, limit: int | None) -> None:
    from moefy.convert.prepare import prepare
    from moefy.convert.run import convert as run
    from moefy.convert.session import Attempt
    from moefy.distributed import launched, together
    from moefy.progress import watching
    from moefy.report import terminal

    group = launched()
    first = group.rank == 0
    quiet = asked.quiet or not first
    ready = _resumable(out, asked.force) if first else contextlib.nullcontext()
    with together(), ready, watching(quiet=quiet) as watch:
        attempt = Attempt(
            force=asked.force,
            restart=asked.restart,
            strict=asked.strict,
            memory=limit,
            group=group,
        )
        summary = run(prepare(recipe), out, attempt, watch=watch)
        group.end()
    show(summary, lambda _: terminal.show_conversion(summary, out), asked.as_json and first, quiet)


def _reproduce(options: Options, asked: Convert, recipe: Path, limit: int | None) -> None:
    settings = options.keys() - {"model"} or asked.recipe or asked.settings
    if settings or asked.plan or asked.strict or "model" not in options:
        raise MoefyError("--reproduce RECIPE takes OUT, or MODEL OUT, and no settings", code=2)
    model = options["model"]
    out, model = (asked.out, model) if asked.out else (Path(model), None)
    quiet_libraries()
    from moefy.progress import watching
    from moefy.report import terminal
    from moefy.runs.reproduce import reproduce

    with _resumable(out, asked.force), watching(quiet=asked.quiet) as watch:
        summary = reproduce(
            recipe,
            out,
            model=model,
            force=asked.force,
            restart=asked.restart,
            memory=limit,
            watch=watch,
        )
    show(summary, lambda _: terminal.show_conversion(summary, out), asked.as_json, asked.quiet)
    result = summary["reproduced"]
    if not result["same"]:
        because = "; ".join(result["because"]) or "nothing else that is known of differs"
        files = ", ".join(result["files_that_differ"])
        raise MoefyError(f"{out} is not as {recipe} made it: {files} differ; {because}", code=6)
    if not (asked.quiet or asked.as_json):
        print(f"Reproduced: all files but the reports are those of {recipe}, byte for byte")


@contextlib.contextmanager
def _resumable(out: Path, force: bool) -> Iterator[None]:
    """Check that OUT may be written, and say on an interrupt how to go on."""
    from moefy.files.publish import check_free, reclaim
    from moefy.files.resume import unfinished

    try:
        reclaim(out)
        check_free(out, force=force)
        yield
    except KeyboardInterrupt:
        if reclaim(out):
            whole = f"interrupted when {out} was whole already"
            raise MoefyError(whole, code=INTERRUPTED) from None
        layers = unfinished(out)
        raise interrupted(None if layers is None else f"{layers} layers are") from None
