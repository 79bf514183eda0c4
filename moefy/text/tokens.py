"""Packed sequences of token ids, to calibrate or to train on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Part:
    """What one source gives to a mix."""

    name: str
    source: str
    share: float
    documents: int
    sequences: int
    """Different ones to train on."""
    epochs: float
    """How often each of them is trained on."""
    heldout_sequences: int


@dataclass(frozen=True, eq=False)
class Tokens:
    """Packed sequences of token ids, the last `num_heldout` of them for validation.

    `ids_BT` is int64, num_sequences x length; `sha256` is the digest of its bytes; `num_documents`
    counts the documents that its tokens come from; `notes` are one-line warnings. `compute_dtype`
    names the dtype that the model computed in where it wrote them itself. A mix has `parts`, whose
    held-out sequences follow one another, and trains on the rows `fit_N`, in which sequences of a
    short source are repeated, and the last `num_last` of which come last. `learned_BT` says which
    tokens are learned; None for all.
    """

    ids_BT: Tensor
    num_heldout: int
    source: str
    sha256: str
    num_documents: int
    notes: tuple[str, ...]
    compute_dtype: str | None = None
    parts: tuple[Part, ...] = ()
    fit_N: Tensor | None = None
    learned_BT: Tensor | None = None
    num_last: int = 0

    @property
    def rows(self) -> list[int]:
        """The sequences to train on, by their numbers."""
        if self.fit_N is not None:
            return self.fit_N.tolist()
        return list(range(len(self.ids_BT) - self.num_heldout))

    @property
    def learned(self) -> Tensor:
        """Whether each token is learned, (B, T)."""
        return self.ids_BT >= 0 if self.learned_BT is None else self.learned_BT

    @property
    def heldout(self) -> dict[str, range]:
        """The held-out sequences of each source, by their numbers, under its name."""
        counts = {part.name: part.heldout_sequences for part in self.parts}
        result, start = {}, len(self.ids_BT) - self.num_heldout
        for source, count in (counts or {self.source: self.num_heldout}).items():
            result[source] = range(start, start + count)
            start += count
        return result

    @property
    def trained(self) -> str:
        """The digest of all that decides what is trained on."""
        more = [tensor for tensor in (self.fit_N, self.learned_BT) if tensor is not None]
        return digest(self.ids_BT, *more) if more else self.sha256

    def figures(self) -> dict[str, Any]:
        """What the written summaries say of the text."""
        return {
            "source": self.source,
            "sha256": self.sha256,
            "documents": self.num_documents,
            "sequences": len(self.ids_BT),
            "heldout_sequences": self.num_heldout,
            "sequence_length": self.ids_BT.shape[1],
            "notes": list(self.notes),
            **({} if self.learned_BT is None else {"learned": int(self.learned_BT.sum())}),
            **({"parts": [vars(part) for part in self.parts]} if self.parts else {}),
        }


def digest(*numbers: Tensor) -> str:
    """The SHA-256 of ids, and of other numbers, as little-endian 64-bit integers."""
    result = hashlib.sha256()
    for tensor in numbers:
        result.update(tensor.numpy().astype("<i8").tobytes())
    return result.hexdigest()
