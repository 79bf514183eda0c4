"""Documents out of text files, folders, JSONL and data sets of the hub."""

from __future__ import annotations

import codecs
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch

from moefy.errors import MoefyError
from moefy.kinds import spread
from moefy.source import looks_like_path

MOST_CHARACTERS = 2**28
"""What is read of a file or folder at most, so that a text larger than memory still works."""

STREAM_CHARACTERS_PER_TOKEN = 64
"""What is read of a streamed data set per token wanted: enough to shuffle, little to fetch."""

KIND_CHARACTERS_PER_TOKEN, KIND_CHARACTERS = 256, 2**23
"""Of the shuffled text per token wanted, and at most, whose kinds are told apart: enough to have
all shares, and read in seconds."""

CHARACTERS_PER_TOKEN = 4
"""About what a token stands for."""

SUFFIXES = (".txt", ".md", ".jsonl")
"""The files that are read out of a folder."""


def documents(source: str, *, text_field: str = "text") -> Iterator[str]:
    """Yield the documents of `source`, none of them blank, in the order in which they are stored.

    `source` is one of

    - a text file, its documents separated by two blank lines (without these it is one document);
    - a `.jsonl` file of objects that hold the text in `text_field`;
    - a folder: every `.txt`, `.md` and `.jsonl` file below it, sorted by path;
    - a data set of the hub, streamed: `name`, `name:split` or `name:configuration:split`, where
      the split is `train` if not given. Needs the `datasets` package.

    Raises:
        MoefyError: code 3 for a source that is missing, empty, not UTF-8 text or not valid JSONL.
    """
    path = locate(source)
    if path is None:
        texts = _streamed(source, text_field)
    elif path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file()
        )
        texts = chain.from_iterable(_stored(file, text_field) for file in files)
    else:
        texts = _stored(path, text_field)
    num_read = num_found = 0
    for text in texts:
        num_read += 1
        if text.strip():
            num_found += 1
            yield text
    if not num_found:
        raise MoefyError(
            f"{source}: {num_read} documents or rows and no text in them; expected UTF-8 text "
            f"(of a folder: {', '.join(SUFFIXES)} files); give another text"
        )


def shuffled(
    source: str, num_tokens: int, seed: int, *, text_field: str = "text"
) -> tuple[list[str], list[str]]:
    """Give the distinct documents of `source` in random order, and notes.

    Of a stream as much is read as `num_tokens` call for.
    """
    stream = locate(source) is None
    most = STREAM_CHARACTERS_PER_TOKEN * num_tokens if stream else MOST_CHARACTERS
    texts: dict[bytes, str] = {}
    notes = []
    num_read = num_characters = 0
    for text in documents(source, text_field=text_field):
        if num_characters >= most:
            notes.append(f"only the first {num_characters:,} characters were read")
            break
        texts.setdefault(hashlib.sha256(text.encode()).digest(), text)
        num_read += 1
        num_characters += len(text)
    if len(texts) < num_read:
        notes.append(
            f"{num_read - len(texts):,} of {num_read:,} documents are duplicates, not used"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    distinct = list(texts.values())
    return [distinct[index] for index in order], notes


def stratified(texts: list[str], num_tokens: int, *, share: int) -> list[str]:
    """Give `texts` in an order in which each kind of them has about its share of any beginning.

    A document counts up to `share` tokens. Texts far behind what gives `num_tokens` stay there.
    """
    most = CHARACTERS_PER_TOKEN * share
    enough = min(KIND_CHARACTERS_PER_TOKEN * num_tokens, KIND_CHARACTERS)
    num = sum(end <= enough for end in accumulate(min(len(text), most) for text in texts))
    return [texts[index] for index in spread(texts[:num], most)] + texts[num:]


def id_rows(source: str, field: str) -> Iterator[list[int]]:
    """Yield the rows of token ids, none of them empty, of a JSONL file or a folder of such files.

    Raises:
        MoefyError: code 3 for a source that is missing, not valid JSONL, or holds no ids.
    """
    path = locate(source)
    files = [] if path is None else [path]
    if path is not None and path.is_dir():
        files = sorted(file for file in path.rglob("*.jsonl") if file.is_file())
    num_found = 0
    for file in files:
        require_utf8(file)
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{file}, line {number}"
                ids = _value(_row(line, where), field, where) if line.strip() else []
                if not isinstance(ids, list) or any(type(n) is not int or n < 0 for n in ids):
                    raise MoefyError(f"{where}: {field!r} holds no list of token ids; expected one")
                num_found += bool(ids)
                if ids:
                    yield ids
    if not num_found:
        raise MoefyError(f"{source}: no token ids; expected JSONL rows with them in {field!r}")


def locate(source: str) -> Path | None:
    """Give the file or folder that `source` names, or None for a data set of the hub."""
    path = Path(source).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if path.exists():
        raise MoefyError(f"{source}: neither a file nor a folder; expected one of these")
    if looks_like_path(source) or path.suffix in SUFFIXES:
        raise MoefyError(f"{source}: no such file or folder; check the path")
    if importlib.util.find_spec("datasets") is None:
        raise MoefyError(
            f"{source}: no such file or folder; to read a data set of the hub by its name: "
            "pip install datasets"
        )
    return None


def _stored(path: Path, text_field: str) -> Iterator[str]:
    """Yield the documents of one file, blank ones included."""
    require_utf8(path)
    with path.open(encoding="utf-8-sig") as lines:
        if path.suffix == ".jsonl":
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield _text(_row(line, where), text_field, where)
        else:
            yield from _separated(lines)


def _separated(lines: Iterator[str]) -> Iterator[str]:
    """Split at two blank lines or more, in memory for one document."""
    document: list[str] = []
    num_blank = 0
    for line in lines:
        num_blank = num_blank + 1 if line == "\n" else 0
        document.append(line)
        if num_blank == 2:
            yield "".join(document).strip("\n")
            document = []
    yield "".join(document).strip("\n")


def _row(line: str, where: str) -> dict[str, Any]:
    """The object that is one line of JSON."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "nested too deeply")
        raise MoefyError(f"{where}: not valid JSON ({reason}); expected an object") from error
    if not isinstance(row, dict):
        raise MoefyError(f"{where}: {type(row).__name__} found; expected an object with the text")
    return row


def _value(row: dict[str, Any], field: str, where: str) -> Any:
    """What a row holds in a field."""
    if field not in row:
        fields = ", ".join(map(repr, row)) or "none"
        raise MoefyError(
            f"{where}: no field {field!r}; the fields are {fields}; name one as the text field"
        )
    return row[field]


def _text(row: dict[str, Any], text_field: str, where: str) -> str:
    """Take the text out of a row; null is an empty text."""
    text = _value(row, text_field, where)
    text = "" if text is None else text
    if not isinstance(text, str):
        raise MoefyError(
            f"{where}: field {text_field!r} holds {type(text).__name__}; expected a string; name "
            "another text field"
        )
    # JSON can spell half of a surrogate pair, which is not a character and has no UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _streamed(source: str, text_field: str) -> Iterator[str]:
    """Yield the texts of a data set of the hub."""
    import datasets
    from datasets.exceptions import DatasetsError

    # The error of whichever HTTP library the hub's client is built on.
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    name, *rest = source.split(":")
    configuration = rest[0] if len(rest) > 1 else None
    split = rest[-1] if rest else "train"
    try:
        rows = datasets.load_dataset(name, configuration, split=split, streaming=True)
        for row in rows:
            yield _text(row, text_field, source)
    except (DatasetsError, HTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MoefyError(
            f"{source}: no such file or folder, and not to be had as a data set ({reason}); "
            "check the name, or give a text file"
        ) from error


def require_utf8(path: Path, most_bytes: int | None = None) -> None:
    """Look through the first `most_bytes` of a file, or all of it, for what is not UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    expected = "expected UTF-8 text; convert the file or give another"
    offset = 0
    with path.open("rb") as file:
        while most_bytes is None or offset < most_bytes:
            block = file.read(2**20)
            if (zero := block.find(b"\0")) >= 0:
                raise MoefyError(f"{path}: binary (byte {offset + zero} is zero); {expected}")
            # The decoder holds back the start of a character that the last block cut in two.
            num_held = len(decoder.getstate()[0])
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                at = offset - num_held + error.start
                raise MoefyError(f"{path}: not UTF-8 at byte {at}; {expected}") from error
            if not block:
                return
            offset += len(block)
