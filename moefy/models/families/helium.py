"""Helium: Llama that rotates neighbours of a head together, not its halves.

The same rotation with the rows of queries and keys in another order, which changes no score.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

from moefy.models.families import llama
from moefy.models.families.family import Config

if TYPE_CHECKING:
    from torch import Tensor


def halved(config: Config, name: str, tensor: Tensor, share: float = 1.0) -> Tensor:
    """Queries and keys in the order of classes that rotate the halves of the first `share` of each
    head; anything else as it is."""
    import torch

    match = re.search(r"self_attn\.([qk])_proj\.(weight|bias)$", name)
    if not match:
        return tensor
    heads = config["num_attention_heads"]
    if match[1] == "k":
        heads = config.get("num_key_value_heads") or heads
    head_HN = tensor.unflatten(0, (heads, -1))
    width = head_HN.shape[1]
    rotated = int(width * share)
    parts = (range(0, rotated, 2), range(1, rotated, 2), range(rotated, width))
    order_N = torch.tensor([row for part in parts for row in part])
    return head_HN[:, order_N].flatten(0, 1)


FAMILY = dataclasses.replace(
    llama.FAMILY,
    rest=lambda config, name, tensor: {name: halved(config, name, tensor)},
)
