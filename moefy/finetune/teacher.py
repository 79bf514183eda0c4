"""The dense teacher's likeliest tokens at every position, computed or read from a cache file.

A file holds the likeliest tokens that make up `top_p` of the probability, at most `top_tokens`:
a few hundred bytes a position. Its name is a digest of all it depends on; several runs share it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moefy.config.finetune import Settings
from moefy.errors import MoefyError
from moefy.files.publish import replacing
from moefy.finetune.log_probabilities import chunk

Targets = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From rows (B,) and their ids (B, T) to the teacher's tokens: ids and log-probabilities, each
(B, T, P)."""


@dataclass(frozen=True)
class Teacher:
    """What the losses ask of the dense model; None for what no loss needs."""

    targets: Targets | None = None
    states: Callable[[Tensor], list[Tensor]] | None = None
    """From ids (B, T) to the states behind each layer, (B * T, D)."""


def likeliest(logits_TV: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the tokens to keep, (T, P); minus infinity behind `top_p`."""
    parts = [_likeliest(part_CV.float(), settings) for part_CV in logits_TV.split(chunk(logits_TV))]
    ids, log_p = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return ids, log_p


def _likeliest(logits_CV: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    log_z_C1 = (logits_CV / settings.temperature).logsumexp(-1, keepdim=True)
    top = logits_CV.topk(min(settings.top_tokens, logits_CV.shape[-1]), dim=-1)
    log_p_CP = top.values / settings.temperature - log_z_C1
    before_CP = log_p_CP.exp().cumsum(-1) - log_p_CP.exp()
    return top.indices, log_p_CP.masked_fill(before_CP >= settings.top_p, -torch.inf)


def live(model: Any, settings: Settings) -> Targets:
    """The targets as the model computes them."""

    def targets(row_B: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            logits_BTV = model(input_ids=ids_BT.to(model.device), use_cache=False).logits
            ids, log_p = likeliest(logits_BTV.flatten(0, 1), settings)
        shape = (*ids_BT.shape, -1)
        return ids.view(shape).clone(), log_p.view(shape).clone()

    return targets


def cached(
    file: Path,
    model: Callable[[], Any],
    ids_BT: Tensor,
    settings: Settings,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Targets:
    """The targets of the rows of `ids_BT`, read from `file`; `model` computes a missing file.

    Raises:
        MoefyError: code 7 for a file that is not what it was when it was written.
    """
    if not file.exists():
        _write(file, live(model(), settings), ids_BT, settings.batch_size, progress)
    try:
        tensors = safe_open(file, framework="pt")
        ids, log_p = tensors.get_slice("ids"), tensors.get_slice("log_p")
        count_BT = tensors.get_tensor("count").long()
        end_B = count_BT.sum(1).cumsum(0)
        whole = list(count_BT.shape) == list(ids_BT.shape) and ids.get_shape() == [int(end_B[-1])]
    except (SafetensorError, OSError, KeyError):
        whole = False
    if not whole:
        raise MoefyError(f"{file} is damaged; delete it, it is then computed again", code=7)

    def targets(row_B: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        rows = []
        for row in row_B.tolist():
            stop, count_T = int(end_B[row]), count_BT[row]
            start = stop - int(count_T.sum())
            used_TP = torch.arange(settings.top_tokens) < count_T[:, None]
            ids_TP = torch.zeros(used_TP.shape, dtype=torch.int64)
            ids_TP[used_TP] = ids[start:stop].long()
            log_p_TP = torch.full(used_TP.shape, -torch.inf)
            log_p_TP[used_TP] = log_p[start:stop]
            rows.append((ids_TP, log_p_TP))
        ids_BTP, log_p_BTP = map(torch.stack, zip(*rows, strict=True))
        return ids_BTP.to(ids_BT.device), log_p_BTP.to(ids_BT.device)

    return targets


def cache_name(teacher: dict[str, str], tokens: str, settings: Settings, dtype: str) -> str:
    """The name of a cache file: a digest of the teacher's files, the tokens and what is kept."""
    kept = (settings.top_p, settings.top_tokens, settings.temperature)
    key = [sorted(teacher.items()), tokens, *kept, dtype]
    return f"teacher-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}.safetensors"


def _write(
    file: Path,
    targets: Targets,
    ids_BT: Tensor,
    batch_size: int,
    progress: Callable[[int, int], None],
) -> None:
    ids, log_p, count = [], [], []
    for first in range(0, len(ids_BT), batch_size):
        part = ids_BT[first : first + batch_size]
        ids_BTP, log_p_BTP = targets(torch.arange(len(part)) + first, part)
        used_BTP = log_p_BTP.isfinite()
        ids.append(ids_BTP[used_BTP].int().cpu())
        log_p.append(log_p_BTP[used_BTP].cpu())
        count.append(used_BTP.sum(-1).int().cpu())
        progress(first + len(part), len(ids_BT))
    if not all(part.all() for part in count):
        raise MoefyError("the teacher's logits are not finite", code=6)
    tensors = {"ids": torch.cat(ids), "log_p": torch.cat(log_p), "count": torch.cat(count)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, shared=True) as draft:
        save_file(tensors, draft)


def states(model: Any, layers: Sequence[int]) -> Callable[[Tensor], list[Tensor]]:
    """The function of `Teacher.states`, for some of the model's layers."""

    def compute(ids_BT: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            out = model(input_ids=ids_BT, use_cache=False, output_hidden_states=True)
        return [out.hidden_states[layer + 1].flatten(0, 1).clone() for layer in layers]

    return compute
