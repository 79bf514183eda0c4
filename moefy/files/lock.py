"""One process at a time on one folder.

The library `filelock` is no substitute: it fails on file systems that answer ENOLCK or EOPNOTSUPP,
as network file systems do, and its locks name no holder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from moefy.errors import MoefyError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""How a file system says that it cannot lock files."""


@contextlib.contextmanager
def locked(file: Path, what: Path) -> Iterator[None]:
    """Lock `file` while the block runs; its folder is created where there is none.

    The operating system holds the lock, so a killed process loses it. The file names its owner for
    the error message. On a file system without locks, that name is the lock.

    Raises:
        MoefyError: code 5, when another process works on `what`.
    """
    handle = _acquire(file, what)
    try:
        os.truncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.truncate(handle, 0)
        os.close(handle)


def _acquire(file: Path, what: Path) -> int:
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # the last owner has just removed the folder
        if not _lock(handle):
            owner = _owner(handle) or "another process"
            os.close(handle)
            raise MoefyError(f"{owner} is writing {what}; wait until it is done", code=5)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        os.close(handle)  # the last owner has removed this file


def _lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return not _alive(_owner(handle))
    return True


def _owner(handle: int) -> str:
    return os.pread(handle, 1000, 0).decode(errors="replace")


def _alive(owner: str) -> bool:
    """Whether the owner may still run. A process on another host counts as alive."""
    match = re.fullmatch(r"process (\d+) on (.+)", owner)
    if not match or match[2] != socket.gethostname():
        return bool(match)
    try:
        os.kill(int(match[1]), 0)
    except OSError as error:
        return error.errno != errno.ESRCH  # EPERM: another user's
    return True
