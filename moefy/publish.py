"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from moefy.errors import MoefyError

BLOCK = 1 << 24
"""Bytes that are read at a time."""


def write_json(path: Path, value: object) -> Path:
    """Write `value` as indented JSON, flushed to disk."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8, flushed to disk."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return path


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_free(out: Path, *, force: bool = False) -> Path:
    """The absolute path of `out`, when a folder may be published there.

    Raises:
        MoefyError: code 2 when it is a file or link, or a folder with files and no `force`.
    """
    out = Path(os.path.abspath(out))
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise MoefyError(f"OUT {out} is a file or a link; expected a folder to make", code=2)
    if out.exists() and any(out.iterdir()):
        if not force:
            raise MoefyError(f"OUT {out} exists already; give another name, or --force", code=2)
        if not (out / "moefy" / "conversion.json").is_file():
            raise MoefyError(
                f"OUT {out} holds files that moefy did not write; give another name", code=2
            )
    return out


@contextlib.contextmanager
def publishing(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary folder beside `out` that becomes `out` when the block ends well.

    The rename is the moment of publication: before it nothing is named `out`, after it everything
    is there. When the block fails or is interrupted, the temporary folder is removed and `out` is
    as it was. With `force` an existing `out` is replaced, and kept until the new one is whole.

    Raises:
        MoefyError: code 2 when `out` exists without `force`, 5 when its parent cannot be written.
    """
    out = check_free(out, force=force)
    # No process id: in a container a rerun may have that of the run that was killed.
    part = out.with_name(f".{out.name}.moefy-part-{secrets.token_hex(4)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
    except OSError as error:
        raise MoefyError(f"cannot write beside {out}: {error.strerror}", code=5) from None
    try:
        yield part
        check_free(out, force=force)  # again: much may have happened since
        _swap(part, out)
    except OSError as error:
        raise MoefyError(f"writing {out} failed: {error.strerror or error}", code=5) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _swap(part: Path, out: Path) -> None:
    """Rename `part` to `out`, setting an existing folder aside until that is done."""
    sync_folder(part)
    aside = out.with_name(f".{out.name}.moefy-old-{secrets.token_hex(4)}")
    try:
        if out.exists():
            out.rename(aside)
        part.rename(out)
        sync_folder(out.parent)
    finally:
        # Whatever interrupts this: one whole folder is named `out`, and none lies beside it.
        if aside.exists() and not out.exists():
            aside.rename(out)
        shutil.rmtree(aside, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's own entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
