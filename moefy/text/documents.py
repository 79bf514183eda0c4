"""Documents out of text files, folders, rows and data sets of the hub."""

from __future__ import annotations

import importlib.util
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moefy.checkpoint.resolve import looks_like_path
from moefy.errors import MoefyError, first_line
from moefy.text import chat
from moefy.text.rows import SUFFIXES, TABLES, lines, rows, suffix
from moefy.text.stratify import spread

TEXT = "text"  # the field of a row that holds its text by default

MOST_CHARACTERS, MOST_IDS = 2**28, 2**26
"""The most to read of a file or folder, so that a text larger than memory still works."""

STREAM_CHARACTERS_PER_TOKEN = 64
"""Characters of a streamed data set to read per token: enough to shuffle, little to fetch."""

KIND_CHARACTERS_PER_TOKEN, KIND_CHARACTERS = 256, 2**23
"""Characters to sort into kinds, per token and at most: enough for all shares, and read in
seconds."""

BOM = "\ufeff"


class Document(NamedTuple):
    """A text, and the spans of its characters to learn from; None for all of it."""

    text: str
    answers: tuple[tuple[int, int], ...] | None = None


def documents(source: str, *, text_field: str = TEXT, tokenizer: Any = None) -> Iterator[str]:
    """Yield the texts of `read`."""
    return (document.text for document in read(source, text_field=text_field, tokenizer=tokenizer))


def read(
    source: str, *, text_field: str = TEXT, tokenizer: Any = None, answers_only: bool = False
) -> Iterator[Document]:
    """Yield the documents of `source`, none of them blank, in the order in which they are stored.

    `source` is one of

    - a file of running text, its documents separated by two blank lines (without these it is one
      document);
    - a file of JSON or parquet rows (see `rows`) that hold the text in `text_field`, or turns of a
      conversation, which the chat template of `tokenizer` makes text of: there, or, where the
      field is not named, in `messages` or `conversations`;
    - a folder: every file below it whose name ends as `SUFFIXES` have it, sorted by path;
    - a data set of the hub, streamed: `name`, `name:split` or `name:configuration:split`, where
      the split is `train` if not given. Needs the `datasets` package.

    With `answers_only` a conversation tells what the assistant writes in it (`chat.answered`).

    Raises:
        MoefyError: code 3 for a source that is missing, empty, neither UTF-8 text nor rows, and for
            rows without text.
    """
    reader = RowReader(text_field, tokenizer, answers_only)
    path = locate(source)
    if path is None:
        stored = (reader.document(row, source) for row in _streamed(source))
    else:
        stored = chain.from_iterable(_stored(file, reader) for file in _files(path))
    num_read = num_texts = 0
    for document in stored:
        num_read += 1
        if document.text.strip():
            num_texts += 1
            yield document
    if not num_texts:
        raise MoefyError(
            f"{source}: {num_read} documents or rows and no text in them; expected UTF-8 text "
            f"(of a folder: {', '.join(SUFFIXES)} files); give another text"
        )


def beginning(path: Path, num_characters: int, tokenizer: Any, *, text_field: str = TEXT) -> str:
    """The first characters of a file as one text to evaluate on.

    Running text stays as it is. Between rows stands the end-of-text token of `tokenizer`, as in
    calibration.

    Raises:
        MoefyError: as `documents`.
    """
    path = path.expanduser()
    if rows(path) is None:
        texts, end = lines(path, num_characters), ""
    else:
        texts = documents(str(path), text_field=text_field, tokenizer=tokenizer)
        end = tokenizer.eos_token or tokenizer.sep_token or "\n\n\n"
    parts: list[str] = []
    length = 0
    for text in texts:
        parts.append(text)
        length += len(text) + len(end)
        if length >= num_characters:
            break
    return end.join(parts)[:num_characters]


def shuffled(
    source: str,
    num_tokens: int,
    seed: int,
    *,
    text_field: str = TEXT,
    tokenizer: Any = None,
    answers_only: bool = False,
) -> tuple[list[Document], list[str]]:
    """The distinct documents of `source` in random order, and notes.

    Of a stream it reads only as much as `num_tokens` need.
    """
    stream = locate(source) is None
    most = STREAM_CHARACTERS_PER_TOKEN * num_tokens if stream else MOST_CHARACTERS
    texts: dict[Document, None] = {}  # a set that keeps the order
    notes = []
    num_read = num_characters = 0
    for document in read(
        source, text_field=text_field, tokenizer=tokenizer, answers_only=answers_only
    ):
        if num_characters >= most:
            notes.append(f"only the first {num_characters:,} characters were read")
            break
        texts[document] = None
        num_read += 1
        num_characters += len(document.text)
    if len(texts) < num_read:
        notes.append(
            f"{num_read - len(texts):,} of {num_read:,} documents are duplicates, not used"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    distinct = list(texts)
    return [distinct[index] for index in order], notes


def stratified(items: list[Document], num_tokens: int, *, share: int) -> list[Document]:
    """`items` in an order in which each kind has about its share of any beginning.

    A document counts up to `share` tokens. Texts far beyond the first `num_tokens` stay in place.
    """
    texts = [document.text for document in items]
    most = 4 * share  # characters, of which a token has about four
    enough = min(KIND_CHARACTERS_PER_TOKEN * num_tokens, KIND_CHARACTERS)
    num = sum(end <= enough for end in accumulate(min(len(text), most) for text in texts))
    return [items[index] for index in spread(texts[:num], most)] + items[num:]


def id_rows(source: str, field: str) -> Iterator[array[int]]:
    """Yield the token ids of the rows of a file or folder; skip rows that have none.

    Raises:
        MoefyError: code 3 for a source that is missing, is no file of rows, or holds no ids.
    """
    path = locate(source)
    files = _files(path) if path else []
    num_rows = 0
    for where, row in chain.from_iterable(rows(file) or () for file in files):
        ids = _value(row, field, where)
        whole = isinstance(ids, list) and all(type(n) is int and 0 <= n < 2**31 for n in ids)
        if not whole:
            raise MoefyError(f"{where}: {field!r} holds no list of token ids; expected one")
        num_rows += bool(ids)
        if ids:
            yield array("i", ids)
    if not num_rows:
        raise MoefyError(
            f"{source}: no token ids; expected a file of JSON or parquet rows with them in "
            f"{field!r}"
        )


def locate(source: str) -> Path | None:
    """The file or folder that `source` names, or None for a data set of the hub."""
    path = Path(source).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if path.exists():
        raise MoefyError(f"{source}: neither a file nor a folder; expected one of these")
    if looks_like_path(source) or suffix(path) in (*SUFFIXES, *TABLES):
        raise MoefyError(f"{source}: no such file or folder; check the path")
    if importlib.util.find_spec("datasets") is None:
        raise MoefyError(
            f"{source}: no such file or folder; to read a data set of the hub by its name: "
            "pip install datasets"
        )
    return None


def _files(path: Path) -> list[Path]:
    """The files of text and rows in a folder and below; a file alone is itself."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.rglob("*") if suffix(file) in SUFFIXES and file.is_file())


def _stored(path: Path, reader: RowReader) -> Iterator[Document]:
    """Yield the documents of one file, blank ones included."""
    stored = rows(path)
    if stored is None:
        yield from map(Document, _separated(lines(path)))
    else:
        for where, row in stored:
            yield reader.document(row, where)


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


def _value(row: dict[str, Any], field: str, where: str) -> Any:
    """What a row holds in a field."""
    if field not in row:
        fields = ", ".join(repr(key[:40]) for key in list(row)[:8]) or "none"
        raise MoefyError(
            f"{where}: no field {field!r}; the fields are {fields}{' ...' * (len(row) > 8)}; name "
            "one as the text field: --text-field"
        )
    return row[field]


@dataclass(frozen=True)
class RowReader:
    """How rows become documents."""

    text_field: str
    tokenizer: Any
    answers_only: bool

    def document(self, row: dict[str, Any], where: str) -> Document:
        """A row's document, its turns written as one text; null is an empty text."""
        text = row.get(self.text_field)
        if text is None and self.text_field == TEXT:
            text = chat.conversation(row)
        text = _value(row, self.text_field, where) if text is None else text
        answers = None
        if isinstance(text, list) and all(isinstance(turn, dict) for turn in text):
            turns = chat.turns(text, where)
            if self.answers_only and turns:
                text, answers = chat.answered(self.tokenizer, turns, where)
            else:
                text = chat.written(self.tokenizer, turns, where)
        elif isinstance(text, str):
            text = text.removeprefix(BOM)
        text = "" if text is None else text
        if not isinstance(text, str):
            raise MoefyError(
                f"{where}: field {self.text_field!r} holds {type(text).__name__}; expected a "
                "string or the turns of a conversation; name another: --text-field"
            )
        # JSON can spell half of a surrogate pair, which is not a character and has no UTF-8.
        return Document(text.encode("utf-8", "replace").decode("utf-8"), answers)


def _streamed(source: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set of the hub."""
    import datasets

    name, *rest = source.split(":")
    configuration = rest[0] if len(rest) > 1 else None
    split = rest[-1] if rest else "train"
    try:
        yield from datasets.load_dataset(name, configuration, split=split, streaming=True)
    except Exception as error:  # of the library, or of the HTTP client of the day
        raise MoefyError(
            f"{source}: no such file or folder, and no data set that can be read "
            f"({first_line(error)}); check the name, or give a text file"
        ) from error
