"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from moefy.errors import MoefyError
from moefy.files.lock import locked

BLOCK = 1 << 24
"""Bytes that are read at a time."""

PART, STATE, OLD = "out", "state", "old"
"""Folders in the hidden folder beside OUT: the next OUT, the saved state, the replaced OUT."""

FINAL = (3, 4, 6)
"""Codes of errors that a rerun would meet again."""


def write_json(path: Path, value: object) -> Path:
    """Write `value` as indented JSON, flushed to disk."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Write `text` as UTF-8, flushed to disk."""
    # File names hold surrogates for bytes that are not UTF-8.
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    sync(path)
    return path


@contextlib.contextmanager
def replacing(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a draft to write, and rename it to `file` at the end.

    At any moment `file` is the whole old one, or the whole new one. With `shared` several processes
    may write it at a time: each has its own draft.
    """
    middle = secrets.token_hex(4) if shared else "part"
    draft = file.with_name(f".{file.stem}.{middle}{file.suffix}")
    try:
        yield draft
        sync(draft)
        draft.replace(file)
        sync(file.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_sealed(file: Path, value: object) -> None:
    """Write `value` to a JSON file with its digest."""
    text = json.dumps(value)
    sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "value": text}
    with replacing(file) as draft:
        draft.write_text(json.dumps(sealed), encoding="utf-8")


def read_sealed(file: Path) -> Any:
    """The value that `write_sealed` wrote; None if there is no file.

    Raises:
        MoefyError: code 7 when the digest does not match.
    """
    if not file.exists():
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        sealed = json.loads(file.read_text(encoding="utf-8"))
        text = sealed["value"]
        if hashlib.sha256(text.encode()).hexdigest() == sealed["sha256"]:
            return json.loads(text)
    raise damaged_state(file)


def damaged_state(file: Path) -> MoefyError:
    """An error of code 7 for a file of a saved state."""
    return MoefyError(f"{file} is damaged; start over with --restart", code=7)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    return hexdigest(path, 0, path.stat().st_size)


def file_digests(folder: Path, without: Collection[str] = ()) -> dict[str, str]:
    """SHA-256 of every file below a folder by relative name, except for those of `without`."""
    files = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: sha256(files[name]) for name in sorted(files.keys() - {*without})}


def hexdigest(path: Path, start: int, stop: int) -> str:
    """Hexadecimal SHA-256 of bytes `start` to `stop` of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(min(BLOCK, stop - file.tell())):
            digest.update(block)
    return digest.hexdigest()


def check_free(out: Path, *, force: bool = False) -> Path:
    """The absolute path of `out`, checked to be free for a folder.

    Raises:
        MoefyError: code 2 when it is a file or link, or a folder with files and no `force`.
    """
    out = Path(os.path.abspath(out))
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise MoefyError(f"OUT {out} is a file or a link; expected a folder to create", code=2)
    if out.exists() and any(out.iterdir()):
        if not force:
            raise MoefyError(f"OUT {out} exists already; give another name, or --force", code=2)
        if not (out / "moefy" / "conversion.json").is_file():
            raise MoefyError(
                f"OUT {out} holds files that moefy did not write; give another name", code=2
            )
    return out


def place_of(out: Path) -> Path:
    """The hidden folder beside `out` for files that are not published yet."""
    return out.with_name(f".{out.name}.moefy-part")


@contextlib.contextmanager
def publishing(
    out: Path, *, force: bool = False, resume: bool = False, restart: bool = False
) -> Iterator[Path]:
    """Give a folder to fill, and rename it to `out` when the block ends well.

    Before the rename nothing is named `out`; after it everything is there. With `force` an existing
    `out` is replaced, but it stays until the new one is whole.

    The folder lies in the hidden one of `place_of`, beside the caller's folder `state`. When the
    block fails, `out` stays as it was. The hidden folder is removed, unless it holds a state: a
    rerun with `resume` then gets both folders back, and `restart` removes them. Errors that a rerun
    would meet again (code 3, 4 or 6) leave no state.

    Raises:
        MoefyError: code 2 when `out` exists without `force`; 5 when its parent cannot be written,
            or another process writes `out`; 7 when there is a state and no `resume`.
    """
    out = check_free(out, force=force)
    place = place_of(out)
    with _hold(place, out):
        part = place / PART
        error: BaseException | None = None
        try:
            _recover(place, out)
            check_free(out, force=force)
            if restart or not has_state(place):
                clear(place)
            elif not resume:
                raise MoefyError(
                    f"{place} holds an unfinished run; finish it with the command that began it, "
                    "or remove it",
                    code=7,
                )
            part.mkdir(exist_ok=True)
            if out.exists() and out.stat().st_dev != part.stat().st_dev:
                raise MoefyError(
                    f"OUT {out} is a mount point; expected a folder to create in it", code=5
                )
            yield part
            check_free(out, force=force)  # again: much may have happened since
            _swap(part, out, place / OLD)
        except BaseException as caught:
            error = caught
            # A broken pipe is that of the progress, which nobody reads any more.
            if not isinstance(caught, OSError) or isinstance(caught, BrokenPipeError):
                raise
            reason = f"writing {out} failed: {caught.strerror or caught}"
            if has_state(place):
                reason += "; finished work is saved: make room and run the same command again"
            error = MoefyError(reason, code=5)
            raise error from caught
        finally:
            final = error is None or (isinstance(error, MoefyError) and error.code in FINAL)
            if final or not has_state(place):
                shutil.rmtree(place, ignore_errors=True)


def has_state(place: Path) -> bool:
    """Whether the hidden folder holds something that a rerun can resume from."""
    state = place / STATE
    return state.is_dir() and any(state.iterdir())


def reclaim(out: Path) -> bool:
    """Remove what a run left beside `out` if it was stopped just after publication.

    Returns whether there was such a run.
    """
    out = Path(os.path.abspath(out))
    place = place_of(out)
    if place.is_symlink() or not place.is_dir():
        return False
    with _hold(place, out):
        _recover(place, out)
        published = out.exists() and not (place / PART).exists()
        if published:
            shutil.rmtree(place, ignore_errors=True)
    return published


@contextlib.contextmanager
def _hold(place: Path, out: Path) -> Iterator[None]:
    """Lock `out` for this process. The lock lies in `place`, which is created."""
    with contextlib.ExitStack() as stack:
        try:
            if place.is_symlink():
                raise MoefyError(f"{place} is a link; expected a folder, or nothing", code=5)
            stack.enter_context(locked(place / "lock", out))
        except OSError as error:
            raise MoefyError(f"cannot write beside {out}: {error.strerror}", code=5) from None
        yield


def _recover(place: Path, out: Path) -> None:
    """Put back an `out` that a killed run was replacing."""
    old = place / OLD
    if old.exists():
        if out.exists():
            shutil.rmtree(old)
        else:
            old.rename(out)


def clear(place: Path) -> None:
    """Remove an unfinished run from the hidden folder."""
    for name in (STATE, PART):
        if (place / name).exists():
            shutil.rmtree(place / name)


def _swap(part: Path, out: Path, old: Path) -> None:
    """Rename `part` to `out`, and an existing `out` to `old` until that is done."""
    sync_tree(part)
    try:
        if out.exists():
            out.rename(old)
        part.rename(out)
        sync(out.parent)
    finally:
        # Even after an interrupt one whole folder is named `out`.
        if old.exists() and not out.exists():
            old.rename(out)


def sync_tree(folder: Path) -> None:
    """Flush everything below a folder to disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Flush a file, or a folder's own entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
