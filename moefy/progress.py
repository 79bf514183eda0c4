"""Progress on a terminal as a bar, elsewhere as plain lines, or not at all."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

Watch = Callable[[str, int, int], None]
"""Called with the name of a stage, how much of it is done, and how much there is."""

EVERY = 10.0
"""Seconds between plain lines."""


@contextlib.contextmanager
def watching(*, quiet: bool) -> Iterator[Watch]:
    """Give a function of (stage, done, total) that shows progress on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if quiet:
        yield lambda *_: None
        return
    if not console.is_terminal:
        yield _lines()
        return
    share = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    columns = ("{task.description}", *share, "{task.fields[memory]}")
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", memory="")

        def show(stage: str, done: int, total: int) -> None:
            progress.update(task, description=stage, completed=done, total=total, memory=_memory())

        yield show


def _lines() -> Watch:
    last = 0.0

    def show(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < EVERY:
            return
        last = now
        print(f"moefy: {stage} {done}/{total}, {_memory()}", file=sys.stderr, flush=True)

    return show


def _memory() -> str:
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak {peak / 1e9:.1f} GB"
