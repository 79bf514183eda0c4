"""Rows or running text out of a file, whose content decides which of the two it holds."""

from __future__ import annotations

import contextlib
import gzip
import importlib.util
import io
import json
import math
import re
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from moefy.errors import MoefyError, first_line

JSON = (".json", ".jsonl", ".ndjson")
SUFFIXES = (".txt", ".md", *JSON, ".parquet")
"""The files of a folder that are read, also with `.gz` behind."""

TABLES = (".csv", ".tsv")
"""Their content cannot be told from text."""

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
OTHERS = {
    b"%PDF-": "a PDF file; extract its text",
    b"PK\x03\x04": "a zip archive; unpack it, or save its text",
    **{bytes((0x80, n)): "a pickle, which is never loaded; write JSON rows" for n in range(2, 6)},
    b"\xfd7zXZ\0": "compressed by xz; unpack it, or compress it by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it, or compress it by gzip",
    b"BZh91AY": "compressed by bzip2; unpack it, or compress it by gzip",
    b"ARROW1": "an Arrow file; write parquet or JSON rows",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself: git lfs pull",
}
"""What else files begin with, and what to do about it."""

BLOCK = 2**20
"""Bytes or characters that are read at once."""

BATCH = 256  # rows of a parquet file that are held at once

SPACE = re.compile(r"[ \t\r\n]*")


def suffix(path: Path) -> str:
    """The suffix of a file's name, in lower case, without that of gzip.

    >>> suffix(Path("a.JSONL")), suffix(Path("a.json.gz"))
    ('.jsonl', '.json')
    """
    return Path(path.name.lower().removesuffix(".gz")).suffix


def rows(path: Path, *, kinds: tuple[type, ...] = (dict,)) -> Iterator[tuple[str, Any]] | None:
    """The rows of a file, each with its place; None for running text.

    Rows are JSON objects, or values of other `kinds`, one after the other or in one array, or those
    of a parquet file; either may be compressed by gzip. A file of another name holds rows if it
    begins with two JSON objects, or is one: `[Chapter 1]` and `{\\bf LaTeX}` are text. One row is
    in memory at a time.

    Raises:
        MoefyError: code 3 for a file that can be neither, or, while the rows are read, for one that
            is damaged; 5 for parquet without the package that reads it.
    """
    named = suffix(path)
    with _binary(path) as file:
        head = file.read(BLOCK)
    for magic, what in OTHERS.items():
        if head.startswith(magic):
            raise MoefyError(f"{path}: {what}; expected UTF-8 text, JSON rows or parquet")
    if named in TABLES:
        raise MoefyError(
            f"{path}: a table ({named}); expected UTF-8 text, JSON rows or parquet; write its rows "
            "as JSON lines"
        )
    if head.startswith(PARQUET):
        return _parquet(path)
    if named == ".parquet":
        raise MoefyError(f"{path}: no parquet file ({head[:4]!r} at its start, expected {PARQUET})")
    if b"\0" in head:
        raise _fault(path)
    return _json(path, kinds) if named in JSON or _holds_rows(path) else None


def lines(path: Path, most: int = -1) -> Iterator[str]:
    """Yield the lines of a file of running text, or at most `most` characters of one at a time.

    There is no byte-order mark in them.

    Raises:
        MoefyError: code 3, with the byte, where it is not UTF-8 text.
    """
    with _text(path) as file:
        while line := file.readline(most):
            if "\0" in line:
                raise _fault(path)
            yield line


@contextlib.contextmanager
def _binary(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == GZIP
            file.seek(0)
            if packed:
                with gzip.open(file) as unpacked:
                    yield cast(BinaryIO, unpacked)
            else:
                yield file
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MoefyError(f"{path}: damaged gzip ({error}); fetch or compress it again") from None
    except OSError as error:
        raise MoefyError(f"{path}: cannot be read ({error.strerror or error})") from None


@contextlib.contextmanager
def _text(path: Path) -> Iterator[TextIO]:
    """The text of a file, without a byte-order mark."""
    try:
        with _binary(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig") as text:
            yield text
    except UnicodeDecodeError:
        raise _fault(path) from None


def _fault(path: Path) -> MoefyError:
    """The error for a file that is no UTF-8 text, with the first wrong byte."""
    expected = "expected UTF-8 text; convert the file or give another"
    offset = 0
    with _binary(path) as file:
        for line in file:  # no character has a line end inside
            if (zero := line.find(b"\0")) >= 0:
                return MoefyError(f"{path}: binary (byte {offset + zero} is zero); {expected}")
            try:
                line.decode()
            except UnicodeDecodeError as error:
                at = offset + error.start
                return MoefyError(f"{path}: not UTF-8 at byte {at}; {expected}")
            offset += len(line)
    return MoefyError(f"{path}: changed while it was read; run the command again")


def _holds_rows(path: Path) -> bool:
    """Whether a file that is not named so holds JSON rows."""
    try:
        return bool(list(islice(_json(path), 2)))
    except MoefyError:
        return False


def _json(path: Path, kinds: tuple[type, ...] = (dict,)) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file of JSON, one behind the other or in one array."""
    with _text(path) as file:
        values = _Values(file)
        number = 0
        if in_array := values.peek() == "[":
            values.at += 1
        while (character := values.peek()) and not (in_array and character == "]"):
            number += 1
            where = f"{path}, {f'row {number}' if in_array else f'line {values.line}'}"
            row = values.take(where)
            if not isinstance(row, kinds):
                raise MoefyError(f"{where}: the row is {type(row).__name__}; expected an object")
            yield where, row
            if in_array and values.peek() == ",":
                values.at += 1
            elif in_array and values.peek() not in ("", "]"):
                raise MoefyError(f"{where}: not valid JSON (no ',' or ']' follows it)")
        if in_array and not character:
            raise MoefyError(f"{path}: the array is cut off; fetch the file again")
        values.at += 1
        if in_array and values.peek():
            raise MoefyError(f"{path}, line {values.line}: text after the array")


class _Values:
    """JSON values out of a stream of text; it holds one of them, or a block."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.text, self.at, self.line = "", 0, 1
        self.decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no space; none at the end."""
        while True:
            match = SPACE.match(self.text, self.at)
            assert match is not None
            self._go(match.end())
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, where: str) -> Any:
        """The next value."""
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except (ValueError, RecursionError) as error:
                # More text may help: no word, number or escape has more than 16 characters.
                near = getattr(error, "pos", -math.inf) > len(self.text) - 16
                open_ended = getattr(error, "msg", "").startswith("Unterminated string")
                if (near or open_ended) and self._more():
                    continue
                reason = getattr(error, "msg", "nested too deeply, or a number too long")
                raise MoefyError(
                    f"{where}: not valid JSON ({reason}); expected an object"
                ) from None
            self._go(end)
            return value

    def _go(self, at: int) -> None:
        self.line += self.text.count("\n", self.at, at)
        self.at = at

    def _more(self) -> bool:
        # Twice as much each time, so that one long value is not tried over and over.
        block = self.file.read(max(BLOCK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + block, 0
        return bool(block)


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a parquet file."""
    if importlib.util.find_spec("pyarrow") is None:
        raise MoefyError(
            f"{path}: a parquet file, which pyarrow reads; run: pip install pyarrow", code=5
        )
    from pyarrow import ArrowException, parquet

    number = 0
    with _binary(path) as file:
        try:
            for batch in parquet.ParquetFile(file).iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
        except (ArrowException, OSError) as error:
            reason = first_line(error, 120)
            raise MoefyError(f"{path}: damaged parquet ({reason}); fetch it again") from None
