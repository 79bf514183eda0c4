"""Several processes, started as `torchrun` does it, but forked: nothing is imported again."""

import os
import socket
import traceback
from collections.abc import Callable

from accelerate.state import AcceleratorState, GradientState


def exit_codes(count: int, work: Callable[[], object]) -> list[int]:
    """Call `work` in `count` processes with the variables of `torchrun`; give how each ended."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [os.fork() or _work(rank, count, port, work) for rank in range(count)]
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _work(rank: int, count: int, port: int, work: Callable[[], object]) -> int:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
