"""What the dense teacher expects at every place: its likeliest tokens, computed or from a file.

A file holds only the likeliest tokens that make up `top_p` of the probability, `most` at most, so
it is a few hundred bytes a token, and several runs share it: its name is a digest of all it
depends on.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moefy.errors import MoefyError
from moefy.files.publish import sync

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Keep:
    """Which of the teacher's tokens are kept at a place, and how soft they are."""

    top_p: float = 0.98
    most: int = 128
    temperature: float = 1.0


def likeliest(logits_TV: Tensor, keep: Keep) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the tokens to keep, (T, P); minus infinity behind `top_p`."""
    log_z_T1 = (logits_TV.float() / keep.temperature).logsumexp(-1, keepdim=True)
    top = logits_TV.float().topk(min(keep.most, logits_TV.shape[-1]), dim=-1)
    log_p_TP = top.values / keep.temperature - log_z_T1
    before_TP = log_p_TP.exp().cumsum(-1) - log_p_TP.exp()
    return top.indices, log_p_TP.masked_fill(before_TP >= keep.top_p, -torch.inf)


def live(model: Any, keep: Keep) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A function from rows (B,) and their ids (B, T) to what the model keeps, (B, T, P) each."""

    def targets(row_B: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
            ids, log_p = likeliest(logits_BTV.flatten(0, 1), keep)
        shape = (*ids_BT.shape, -1)
        return ids.view(shape).clone(), log_p.view(shape).clone()

    return targets


def cached(
    file: Path, model: Callable[[], Any], ids_BT: Tensor, keep: Keep, batch: int, tick: Tick
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """As `live`, for the rows of `ids_BT`, from `file`, which is written first if it is not there.

    Raises:
        MoefyError: code 7 for a file that is not what it was when it was written.
    """
    if not file.exists():
        _write(file, live(model(), keep), ids_BT, batch, tick)
    try:
        opened = safe_open(file, framework="pt")
        ids, log_p = opened.get_slice("ids"), opened.get_slice("log_p")
        count_BT = opened.get_tensor("count").long()
        end_B = count_BT.sum(1).cumsum(0)
        whole = list(count_BT.shape) == list(ids_BT.shape) and ids.get_shape() == [int(end_B[-1])]
    except (SafetensorError, OSError, KeyError):
        whole = False
    if not whole:
        raise MoefyError(f"{file} is damaged; delete it, it will be made again", code=7)

    def targets(row_B: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        found = []
        for row in row_B.tolist():
            stop, count_T = int(end_B[row]), count_BT[row]
            start = stop - int(count_T.sum())
            used_TP = torch.arange(keep.most) < count_T[:, None]
            ids_TP = torch.zeros(used_TP.shape, dtype=torch.int64)
            ids_TP[used_TP] = ids[start:stop].long()
            log_p_TP = torch.full(used_TP.shape, -torch.inf)
            log_p_TP[used_TP] = log_p[start:stop]
            found.append((ids_TP, log_p_TP))
        ids_BTP, log_p_BTP = map(torch.stack, zip(*found, strict=True))
        return ids_BTP.to(ids_BT.device), log_p_BTP.to(ids_BT.device)

    return targets


def key(teacher: dict[str, str], tokens: str, keep: Keep, dtype: str) -> str:
    """The name of a cache file: a digest of the teacher's files, the tokens and what is kept."""
    told = [sorted(teacher.items()), tokens, keep.top_p, keep.most, keep.temperature, dtype]
    return f"teacher-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]}.safetensors"


def _write(file: Path, targets: Any, ids_BT: Tensor, batch: int, tick: Tick) -> None:
    """Compute what the file is to hold and put it in place whole."""
    ids, log_p, count = [], [], []
    for first in range(0, len(ids_BT), batch):
        part = ids_BT[first : first + batch]
        ids_BTP, log_p_BTP = targets(torch.arange(len(part)) + first, part)
        used_BTP = log_p_BTP.isfinite()
        ids.append(ids_BTP[used_BTP].int().cpu())
        log_p.append(log_p_BTP[used_BTP].cpu())
        count.append(used_BTP.sum(-1).int().cpu())
        tick(first + len(part), len(ids_BT))
    if not all(part.all() for part in count):
        raise MoefyError("the teacher's logits are not finite", code=6)
    tensors = {"ids": torch.cat(ids), "log_p": torch.cat(log_p), "count": torch.cat(count)}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        save_file(tensors, part)
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file)
        sync(file.parent)
    finally:
        part.unlink(missing_ok=True)


def states(model: Any) -> Callable[[Tensor], list[Tensor]]:
    """A function from ids (B, T) to the states behind each of the model's layers, (B * T, D)."""

    def found(ids_BT: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            out = model(input_ids=ids_BT, use_cache=False, output_hidden_states=True)
        return [state.flatten(0, 1).clone() for state in out.hidden_states[1:]]

    return found
