"""The commands. The only place that prints errors; each stage is imported inside its command."""

from __future__ import annotations

import io
import sys
from typing import Annotated, NoReturn

import typer

from moefy import __version__
from moefy.cli.convert import convert
from moefy.cli.export import gguf
from moefy.cli.finetune import finetune
from moefy.cli.inspect import families, inspect
from moefy.cli.push import push
from moefy.cli.report import report
from moefy.cli.run import run
from moefy.cli.signals import INTERRUPTED, interruptible
from moefy.cli.verify import verify
from moefy.errors import MoefyError, is_out_of_memory

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Turn a dense Hugging Face checkpoint into a stock Mixture-of-Experts checkpoint.",
)
exports = typer.Typer(no_args_is_help=True, help="Write a converted model in another format.")


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")  # for what a terminal's locale lacks
    with interruptible():
        code = _run()
    sys.exit(code)


def _run() -> int:
    """Run the command line; a `MoefyError` becomes one line and its exit code."""
    try:
        code = app(prog_name="moefy", standalone_mode=False)
        if code == INTERRUPTED:  # so typer tells of an interrupt
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except MoefyError as error:
        return _fail(str(error), error.code)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written", INTERRUPTED)
    except typer.Exit as stop:
        return stop.exit_code
    except BrokenPipeError:
        sys.stderr.close()
        return 141
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail("out of memory; lower --tokens or --sequence-length", 5)
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 5)
    except Exception as error:
        # Typer's own complaints about flags carry a message and an exit code; nothing else does.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        return _fail(message, 2) if message else 2  # there is none when help has been printed


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


for command in (convert, finetune, report, push, run, verify, inspect, families):
    app.command()(command)
app.add_typer(exports, name="export")
exports.command()(gguf)


def _fail(message: str, code: int) -> int:
    print(f"moefy: {' '.join(message.split())}", file=sys.stderr)
    return code
