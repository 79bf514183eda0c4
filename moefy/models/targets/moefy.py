"""The dense class itself with experts in place of its FFNs: for what no stock class holds.

Needs `moefy.modeling` to be imported, runs in transformers only. Gates are exactly one,
whatever the number of experts per token, and every expert is a bare slice of the dense FFN. Those
of copies are softmax weights that sum to one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moefy.models.families.family import Family, fuse
from moefy.models.shape import any_shared
from moefy.models.targets.target import Dense, Split, Target, Tensors
from moefy.types import FFN, Shape

if TYPE_CHECKING:
    from torch import Tensor


def target(family: Family) -> Target:
    """The dense class of `family` with experts."""

    def configure(dense: Dense, shape: Shape) -> dict[str, Any]:
        task = family.task(dense.own)
        return {
            "architectures": ["Moefy" + task],
            "model_type": "moefy",
            "dense": {k: v for k, v in dense.own.items() if k != "dtype"},
            "layer": family.layer,
            "block": family.block,
            "emptied": list(family.emptied),
            "activation": family.activation,
            "gated": family.gated,
            "biased": family.biased,
            "down_bias": family.down_bias and family.down_bias.removeprefix(f"{family.block}."),
            "left_dense": list(dense.left_dense),
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.experts_per_token,
            "expert_width": shape.expert_width,
            "num_shared": shape.num_shared,
            "norm_topk_prob": shape.granularity > 0,
            "tie_word_embeddings": dense.tied,
            **{key: dense.own.get(key) for key in (*TOKENS, *MORE.get(task, ()))},
        }

    def tensors(split: Split) -> Tensors:
        import torch

        block, experts_EN = family.block + ".", split.partition.experts_EN
        scale = float(split.granularity or 1)
        block_tensors = {block + f"gate.{name}": term for name, term in split.terms.items()}
        block_tensors[block + "gate.weight"] = split.scaled_ED
        kinds = {"experts.": experts_EN, "experts.shadow_": experts_EN[:, : split.num_shadow]}
        for prefix, neurons_EN in kinds.items() if split.num_shadow else [*kinds.items()][:1]:
            experts = [split.part(neurons, scale) for neurons in neurons_EN]
            block_tensors |= {
                block + prefix + "up_proj": torch.stack([_above(part) for part in experts]),
                block + prefix + "down_proj": torch.stack([part.down_DF for part in experts]),
            }
            biases = [part.bias_F for part in experts if part.bias_F is not None]
            if biases:
                block_tensors[block + prefix + "up_bias"] = torch.stack(biases)
        if len(split.partition.shared_S):
            shared = split.part(split.partition.shared_S)
            block_tensors[block + "shared.up_proj.weight"] = _above(shared)
            block_tensors[block + "shared.down_proj.weight"] = shared.down_DF
            if shared.bias_F is not None:
                block_tensors[block + "shared.up_proj.bias"] = shared.bias_F
        return block_tensors

    return Target(
        "",
        configure,
        tensors,
        any_shared,
        elastic=True,
        native=True,
        dense_layers="any",
        prefix="dense.",
        copies=True,
        ties=True,
    )


TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
MORE = {
    "ForSequenceClassification": ("id2label", "label2id"),
    "ForSeq2SeqLM": ("is_encoder_decoder", "decoder_start_token_id"),
}
"""What else others look for in a model's own configuration, by task."""


def _above(part: FFN) -> Tensor:
    """Gate above up, or up alone."""
    return part.up_FD if part.gate_FD is None else fuse(part)
