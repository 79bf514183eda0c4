"""The commands. The only place that prints errors; each stage is imported inside its command."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from moefy import __version__
from moefy.errors import MoefyError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a dense Hugging Face checkpoint into a stock Mixture-of-Experts checkpoint.",
)

exports = typer.Typer(no_args_is_help=True, help="Write a converted model in another format.")
app.add_typer(exports, name="export")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, no summary.")]

NO_MEMORY = "out of memory; lower --tokens or --sequence-length"


def main() -> NoReturn:
    """Run the command line; a `MoefyError` becomes one line and its exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = app(prog_name="moefy", standalone_mode=False)
        if code == 130:  # so typer tells of an interrupt
            raise KeyboardInterrupt
    except MoefyError as error:
        code = _fail(str(error), error.code)
    except KeyboardInterrupt:
        code = _fail("interrupted; nothing was written", 130)
    except typer.Exit as stop:
        code = stop.exit_code
    except MemoryError:
        code = _fail(NO_MEMORY, 5)
    except BrokenPipeError:
        sys.stderr.close()
        code = 141
    except RuntimeError as error:
        # torch has no exception of its own for a machine's memory that is used up.
        if "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        code = _fail(NO_MEMORY, 5)
    except OSError as error:
        code = _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 5)
    except Exception as error:
        # Typer's own complaints about flags carry a message and an exit code; nothing else does.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        code = _fail(message, 2) if message else 2  # there is none when help has been printed
    sys.exit(code if isinstance(code, int) else 0)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
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
        str | None, typer.Option(help="alternating, shuffle or static. (default: alternating)")
    ] = None,
    router: Annotated[str | None, typer.Option(help="linear or random. (default: linear)")] = None,
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
        typer.Option(help="Text file, folder, JSONL, data set id, or `self`. (default: self)"),
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="JSONL field. (default: text)")] = None,
    tokens: Annotated[int | None, typer.Option(help="Calibration tokens. (default: 16384)")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per sequence. (default: 512)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random draw. (default: 0)")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="as-stored, float32, bfloat16, float16. (default: as-stored)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda. (default: auto)")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML file with any of these.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value, e.g. partition.rounds=6; may be repeated."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be done.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert the dense checkpoint MODEL into the MoE checkpoint OUT."""
    flags = {
        key: value
        for key, value in locals().items()
        if key not in ("recipe", "settings", "plan", "force", "as_json", "quiet", "out")
    }
    from moefy.recipe import build

    built = build(recipe, flags, settings or [])
    _imports_are_slow()
    from moefy.job import prepare

    if plan:
        from moefy.plan import estimate
        from moefy.report import terminal

        _print(estimate(prepare(built)), terminal.show_plan, as_json, quiet=False)
        return
    if out is None:
        raise MoefyError("no OUT given; expected `moefy convert MODEL OUT`", code=2)
    from moefy.convert import convert as run
    from moefy.progress import watching
    from moefy.publish import check_free

    check_free(out, force=force)
    with watching(quiet=quiet) as watch:
        summary = run(prepare(built), out, force=force, watch=watch)
    _print(summary, lambda made: _made(made, out), as_json, quiet)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Folder that `moefy convert` wrote.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file to evaluate on; may be repeated. (default: Python's own manual)"
        ),
    ] = None,
    dense: Annotated[
        str | None, typer.Option(help="Dense model to compare with. (default: the run's)")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per text.")] = 4096,
    sequence_length: Annotated[int, typer.Option(help="Tokens per window.")] = 1024,
    controls: Annotated[
        bool, typer.Option("--controls/--no-controls", help="Also make and score the controls.")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare the converted model RUN with the dense model and with the controls."""
    _imports_are_slow()
    from moefy.evaluate.run import evaluate
    from moefy.progress import watching

    with watching(quiet=quiet) as watch:
        found = evaluate(
            run,
            text or [],
            dense=dense,
            num_tokens=tokens,
            length=sequence_length,
            with_controls=controls,
            watch=watch,
        )
    _print(found, lambda made: _reported(made, run), as_json, quiet)


@exports.command()
def gguf(
    run: Annotated[Path, typer.Argument(help="Folder that `moefy convert` wrote.")],
    out: Annotated[
        Path | None, typer.Argument(help="File to write. (default: RUN/<name>-<type>.gguf)")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="f32, f16, bf16, q8_0, q4_0, q4_k_m, ... (default: as stored)"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the model in RUN as one GGUF file OUT, for llama.cpp."""
    _imports_are_slow()
    from moefy.export import export
    from moefy.progress import watching
    from moefy.report import terminal

    with watching(quiet=quiet) as watch:
        made = export(run, out, quantize, force=force, watch=watch)
    _print(made, terminal.show_export, as_json, quiet)


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Folder, hub id in the cache, or `demo`.")],
    revision: Annotated[str | None, typer.Option(help="Of a hub model.")] = None,
    as_json: Json = False,
) -> None:
    """Tell what the checkpoint PATH is, what can become of it, and which engines run it.

    Where something is wrong with it, tells as well what can be read. The exit code is 3 for a
    broken checkpoint and 4 for one that cannot be converted.
    """
    from moefy.describe import describe
    from moefy.report import terminal

    found = describe(path, revision=revision)
    _print(found, terminal.show_inspection, as_json, quiet=False)
    if problems := found["problems"]:
        raise MoefyError("; ".join(problems), code=found["code"])


@app.command()
def families(as_json: Json = False) -> None:
    """List the dense families that can be converted, and the stock classes that hold them."""
    from moefy.describe.catalogue import catalogue
    from moefy.report import terminal

    _print(catalogue(), terminal.show_catalogue, as_json, quiet=False)


def _print(
    value: dict[str, Any], text: Callable[[dict[str, Any]], None], as_json: bool, quiet: bool
) -> None:
    if as_json:
        print(json.dumps(value, indent=2, ensure_ascii=False))
    elif not quiet:
        text(value)


def _made(summary: dict[str, Any], out: Path) -> None:
    from moefy.report import terminal

    terminal.show_conversion(summary, out)


def _reported(found: dict[str, Any], run: Path) -> None:
    from moefy.report import terminal

    terminal.show_report(found, run)


def _imports_are_slow() -> None:
    """Keep the libraries quiet: what they print at import and load is not for the user."""
    import logging
    import os
    import warnings

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> int:
    print(f"moefy: {' '.join(message.split())}", file=sys.stderr)
    return code
