"""One process at a time on one folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""How a file system says that it cannot lock files."""


@contextlib.contextmanager
def locked(file: Path, what: Path) -> Iterator[None]:
    """Hold `file`, whose folder is made if need be, locked while the block runs.

    The lock is the operating system's, which a killed process does not keep. The file tells who
    holds it, for the others to say; where a file system has no locks, that is the lock.

    Raises:
        MoefyError: code 5, when another process works on `what`.
    """
    handle = _take(file, what)
    try:
        owner = {"process": os.getpid(), "host": socket.gethostname()}
        os.truncate(handle, 0)
        os.pwrite(handle, json.dumps(owner).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.truncate(handle, 0)
        os.close(handle)


def _take(file: Path, what: Path) -> int:
    while True:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # whoever held it has just removed the folder
        if not _lock(handle):
            owner = _owner(handle)
            os.close(handle)
            who = f"process {owner['process']} on {owner['host']}" if owner else "another process"
            raise MoefyError(f"{who} is writing {what}; wait until it is done", code=5)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(file)):
                return handle
        os.close(handle)  # a lock on a file that is no longer there


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


def _owner(handle: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(handle, 1000, 0))
        return {"process": int(found["process"]), "host": str(found["host"])}
    except (ValueError, KeyError, TypeError):
        return {}


def _alive(owner: dict[str, Any]) -> bool:
    """Whether the process that a lock file names may still run: of another host, always."""
    if not owner or owner["host"] != socket.gethostname():
        return bool(owner)
    try:
        os.kill(owner["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
