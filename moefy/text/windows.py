"""Evaluation texts: cut into windows, and compared with the calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moefy.config.report import SHORTEST_WINDOW
from moefy.errors import MoefyError
from moefy.text.documents import TEXT, beginning
from moefy.text.tokenizer import encode, first_ids, require_rows


def text_windows(
    tokenizer: Any,
    path: str | Path,
    *,
    num_tokens: int,
    length: int,
    text_field: str = TEXT,
    vocab_size: int | None = None,
) -> list[Tensor]:
    """Cut the start of a file into consecutive evaluation windows, int64, one-dimensional.

    The file holds running text or rows (see `beginning`). All windows have `length` tokens,
    beginning-of-text token included if the tokenizer puts one before a text; the last may be
    shorter, but is dropped below 64 tokens. At most `num_tokens` tokens of text are used, and
    8 * `num_tokens` characters read: real text has fewer per token.

    Raises:
        MoefyError: code 3 for a file that is missing, neither UTF-8 text nor rows, or shorter
            than one window, and for a tokenizer with ids beyond `vocab_size`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise MoefyError(f"{path}: {what}; expected a file of text or rows to evaluate on")
    text = beginning(file, 8 * num_tokens, tokenizer, text_field=text_field)
    ids = encode(tokenizer, text)[:num_tokens]
    bos = first_ids(tokenizer)
    room = length - len(bos)
    shortest = min(SHORTEST_WINDOW, length)
    windows = [torch.tensor(bos + ids[at : at + room]) for at in range(0, len(ids), room)]
    windows = [window_T for window_T in windows if len(window_T) >= shortest]
    if not windows:
        raise MoefyError(
            f"{path}: {len(ids)} tokens; expected at least {shortest} to evaluate on; give a "
            "longer text"
        )
    require_rows(torch.cat(windows), vocab_size)
    return windows


def overlap(ids_BT: Tensor, windows: list[Tensor], *, span: int = 32) -> float:
    """The share of the windows' `span`-token pieces that occur word for word in `ids_BT`.

    Pieces are shorter where a window or a sequence is.
    Near 0 for a separate text, near 1 for one that is part of the calibration text.
    Compares 64-bit hashes: memory and time are those of B * T * `span` integers.
    """
    span = min(span, ids_BT.shape[1], *map(len, windows))
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (span,), generator=generator)
    seen = torch.cat([(ids_T.unfold(0, span, 1) * weights).sum(-1) for ids_T in ids_BT])
    pieces = torch.cat([(ids_T.unfold(0, span, span) * weights).sum(-1) for ids_T in windows])
    return torch.isin(pieces, seen).float().mean().item()
