"""LFM 2: short convolutions in place of most attentions, which its MoE sibling has as well."""

from __future__ import annotations

from moefy.models.families.family import Config, Family


def neurons(config: Config) -> int:
    """The configured width, two thirds of it rounded up where the class adjusts it."""
    width = int(config["intermediate_size"])
    if not config.get("block_auto_adjust_ff_dim", True):
        return width
    width = int(2 * width / 3)
    factor = config.get("block_ffn_dim_multiplier", 1.0)
    if factor is None:
        return width
    unit = int(config.get("block_multiple_of", 256))
    return -(-int(factor * width) // unit) * unit


FAMILY = Family(
    targets=("lfm2_moe",),
    ffn=("feed_forward.w1.weight", "feed_forward.w3.weight", "feed_forward.w2.weight"),
    neurons=neurons,
    unadjusted={"block_auto_adjust_ff_dim": False},
    keys={"intermediate_size": "block_ff_dim"},
    activation="",  # always SiLU
    block="feed_forward",
)
