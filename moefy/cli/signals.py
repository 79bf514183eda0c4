"""What stops a command: Ctrl-C, a termination, a terminal that is closed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

from moefy.errors import MoefyError

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
INTERRUPTED = 130


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Raise KeyboardInterrupt on the first signal to stop, and end the process at the second.

    The first waits until the running tensor operation is done, the second for nothing: what is on
    disk is whole at any moment. Signals that the process was started to ignore (nohup) stay so.
    """
    heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _interrupt) for number in heard}
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    earlier = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    threading.Thread(target=_second, args=(ear, set(heard)), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(mouth)


def interrupted(kept: str | None) -> MoefyError:
    """The error after an interrupt; `kept` names what the same command goes on from."""
    end = f"{kept} kept: run the same command again to go on from there"
    return MoefyError(f"interrupted; {end if kept else 'nothing was written'}", code=INTERRUPTED)


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _second(ear: int, heard: set[int]) -> None:
    """Read the numbers of signals as they come in, until there are two, or no more can come."""
    count = 0
    while numbers := os.read(ear, 1):
        count += numbers[0] in heard
        if count == 2:
            os._exit(INTERRUPTED)
    os.close(ear)
