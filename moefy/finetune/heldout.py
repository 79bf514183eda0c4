"""Loss, KL and routing of a model on the text that is not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moefy.config.finetune import Settings
from moefy.finetune import losses
from moefy.finetune.losses import Routed
from moefy.finetune.router_hooks import Layer, RouterStatistics, Routing, over_layers
from moefy.finetune.teacher import Teacher
from moefy.finetune.trainer import text_batch
from moefy.text.tokens import Tokens

CURVES = {"ce": "loss", "kl": "kl"}
"""The losses that are measured, and their names there."""


def measure(
    model: Any, routing: Routing, tokens: Tokens, teacher: Teacher, settings: Settings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The mean losses with a summary of the routing, and a row per MoE layer."""
    was_training = model.training
    model.eval()
    curves = {CURVES[loss.name]: loss for loss in losses.active(settings) if loss.name in CURVES}
    sums = {(source, name): 0.0 for source in tokens.heldout for name in curves}
    counts = dict.fromkeys(tokens.heldout, 0)
    statistics, size = RouterStatistics(settings.dead_below), settings.batch_size
    batches = [
        (source, torch.tensor(numbers[first : first + size]))
        for source, numbers in tokens.heldout.items()
        for first in range(0, len(numbers), size)
    ]
    for source, row_B in batches:
        ids_BT = tokens.ids_BT[row_B].to(model.device)
        with torch.no_grad(), routing.recording() as layers:
            logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        targets = teacher.targets(row_B, ids_BT) if teacher.targets else None
        learned_BT = None if tokens.learned_BT is None else tokens.learned_BT[row_B]
        batch = text_batch(logits_BTV, ids_BT, targets, settings.temperature, learned_BT)
        counts[source] += len(batch.next_T)
        for name, loss in curves.items():
            sums[source, name] += len(batch.next_T) * float(loss.value(batch))
        statistics.add([_routed(layer) for layer in layers], len(ids_BT))
        routing.clear()
    model.train(was_training)
    rows = statistics.layers()
    return _means(sums, counts, list(curves)) | over_layers(rows), rows


def _means(
    sums: Mapping[tuple[str, str], float], counts: Mapping[str, int], names: list[str]
) -> dict[str, float]:
    """The mean losses over all tokens, and over those of each source where there are several."""
    num_tokens = max(1, sum(counts.values()))
    result = {name: sum(sums[source, name] for source in counts) / num_tokens for name in names}
    if len(counts) > 1:
        result |= {f"{n}, {source}": sums[source, n] / max(1, counts[source]) for source, n in sums}
    return result


def _routed(layer: Layer) -> Routed:
    assert layer.logits_TE is not None and layer.index_TK is not None
    load_E = losses.load(layer.index_TK, layer.num_experts)
    return Routed(layer.logits_TE, layer.index_TK, load_E)
