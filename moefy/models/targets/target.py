"""The facts of a stock MoE class that moefy needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moefy.models.families.family import Family
from moefy.models.shape import no_shared
from moefy.types import FFN, Partition, Router, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROUTER_SCALE = 2.0**-10
"""Router rows are written this small, so that every softmax gate is 1 / E to about 0.1 %."""

NAMES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
"""An expert's tensors in most classes: gate, up and down."""

NUMBERED = ("w1.weight", "w3.weight", "w2.weight")
"""The same in those that number them."""

COMMON = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim hidden_act max_position_embeddings initializer_range "
    "rms_norm_eps use_cache attention_dropout pad_token_id bos_token_id eos_token_id "
    "rope_parameters"
).split()
"""Keys that llama-like MoE classes share with the dense ones."""

Tensors = dict[str, "Tensor"]
"""By the name behind the layer's prefix."""


@dataclass(frozen=True)
class Dense:
    """A dense model as a target sees it."""

    family: Family
    config: Mapping[str, Any]
    """In the keys of transformers, with its defaults filled in."""
    own: Mapping[str, Any] = field(default_factory=dict)
    """In the keys of the dense class."""
    biases: frozenset[str] = frozenset()
    """The attention's projections that have a bias, of q, k, v and o."""
    tied: bool = False
    """Whether the embedding is the head."""
    left_dense: tuple[int, ...] = ()
    """Layers that are not converted."""

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.config["num_hidden_layers"])

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        heads = self.config["num_attention_heads"]
        return int(self.config.get("head_dim") or self.config["hidden_size"] // heads)

    @property
    def rope_type(self) -> str:
        """How rotary frequencies are scaled; "default" where they are not."""
        rope = self.config.get("rope_parameters") or {}
        return str(rope.get("rope_type", rope.get("type", "default")))

    @property
    def rotary_share(self) -> float:
        """Share of a head that is rotated."""
        if not self.family.partial_rotary:
            return 1.0
        rope = self.config.get("rope_parameters") or {}
        share = rope.get("partial_rotary_factor") or self.config.get("partial_rotary_factor")
        return float(share or 1.0)

    @property
    def windowed(self) -> list[bool]:
        """Whether each layer's attention ends at `config["sliding_window"]`."""
        window = self.config.get("use_sliding_window", True) and self.config.get("sliding_window")
        types = self.config.get("layer_types") if self.family.windows == "some" else None
        types = types or ["sliding_attention"] * self.num_layers
        used = bool(window) and self.family.windows != "none"
        return [used and kind == "sliding_attention" for kind in types]

    @property
    def common(self) -> dict[str, Any]:
        """The part of the configuration that llama-like MoE classes share."""
        result = {key: self.config[key] for key in COMMON if self.config.get(key) is not None}
        # An absent padding token is not the class's own default.
        result["pad_token_id"] = self.config.get("pad_token_id")
        rope = self.config.get("rope_parameters") or {}
        # Loaders older than transformers 5, and other engines, read only these two.
        result["rope_theta"] = rope.get("rope_theta", 10000.0)
        scaled = rope.get("rope_type", "default") != "default"
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        result["rope_scaling"] = scaling if scaled else None
        return result

    @property
    def sliding(self) -> dict[str, Any]:
        """Sliding-window keys of the Qwen classes; layer types as the dense model has them."""
        windowed = self.windowed
        used = any(windowed)
        return {
            "use_sliding_window": used,
            "sliding_window": self.config["sliding_window"] if used else None,
            "max_window_layers": self.num_layers if used else 0,
            "layer_types": [f"{'sliding' if local else 'full'}_attention" for local in windowed],
        }


@dataclass(frozen=True)
class Split:
    """A split FFN that is about to be written."""

    ffn: FFN
    partition: Partition
    router: Router
    experts_per_token: int
    dtype: torch.dtype
    granularity: int = 0
    """See `Shape`."""
    num_shadow: int = 0
    """Neurons of each expert, its first ones, that are written again as its backup."""

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.router.weight_ED)

    @property
    def scaled_ED(self) -> Tensor:
        """Router rows as they are written: those that choose among copies set their gates, too."""
        return (self.router.weight_ED * (1.0 if self.granularity else ROUTER_SCALE)).to(self.dtype)

    @property
    def terms(self) -> Tensors:
        """The router's other terms, as moefy's own class holds them. Only what adds to the scores
        is small; the first of two layers is as it was."""
        output_EH, position_PE = self.router.output_EH, self.router.position_PE
        terms = {"hidden": self.router.hidden_HD}
        terms["output"] = None if output_EH is None else output_EH * ROUTER_SCALE
        terms["position"] = None if position_PE is None else position_PE * ROUTER_SCALE
        return {name: t.to(self.dtype) for name, t in terms.items() if t is not None}

    @property
    def unbiased_E(self) -> Tensor:
        """The selection bias as it is written: zeros in float32."""
        return self.router.weight_ED.new_zeros(self.num_experts).float()

    def experts(
        self, gate: float, prefix: str = "mlp.experts.", names: tuple[str, ...] = NAMES
    ) -> Tensors:
        """The routed experts as linear layers of their own, their `down_proj` divided by `gate`."""
        tensors = {}
        for expert, neurons in enumerate(self.partition.experts_EN):
            tensors |= _glu(self.part(neurons, 1 / gate), f"{prefix}{expert}.", names)
        return tensors

    def shared(self, prefix: str, scale: float = 1.0) -> Tensors:
        """The shared expert as linear layers, its `down_proj` times `scale`."""
        return _glu(self.part(self.partition.shared_S, scale), prefix, NAMES)

    def part(self, neurons: Tensor, scale: float = 1.0) -> FFN:
        """The FFN of some of the neurons as it is written, `down_proj` times `scale`."""
        return self.ffn.some(neurons, self.dtype, scale)

    def gate(self, count: int) -> float:
        """What the class multiplies a chosen expert's output by, if equal scores share one among
        `count` experts, as `dtype` holds it.

        Of copies the gates stay as they are. Those of the slices of one copy are alike, so each
        slice gets one part in `granularity` of what the copy is to count.
        """
        return 1 / self.granularity if self.granularity else self.rounded(1 / count)

    def rounded(self, value: float) -> float:
        """`value` as `dtype` holds it: what a gate computed in that precision really is."""
        import torch

        return float(torch.tensor(value, dtype=torch.float64, device="cpu").to(self.dtype))


@dataclass(frozen=True)
class Target:
    """How a split FFN is written as a stock MoE class."""

    architecture: str
    """The MoE class; empty where `configure` names it."""
    configure: Callable[[Dense, Shape], dict[str, Any]]
    """The configuration of the MoE class, without its name."""
    tensors: Callable[[Split], Tensors]
    """The MoE block's tensors."""
    fits: Callable[[Shape], bool] = no_shared
    """Whether a shape's shared neurons are of a number that the class can hold."""
    elastic: bool = False
    """Whether the gate of a chosen expert is independent of how many are chosen."""
    attention_biases: str = ""
    """The attention's projections that may have a bias, of q, k, v and o."""
    windows: str = "no layer"
    """Where its sliding window may be: "no layer", "all layers or none" or "any"."""
    partial_rotary: bool = False
    """Whether a part of a head may be rotated."""
    dense_layers: str = "none"
    """Which layers may stay dense: "none", "first", "first and last" or "any"."""
    wide_heads: bool = True
    """Whether the heads together may be of another width than the model."""
    selection_bias: bool = False
    """Whether the class has a bias that moves which experts are chosen, and not their gates."""
    biases: Callable[[Dense], str] = lambda dense: ""
    """The attention's projections, of q, k, v and o, for which zeros are written where the dense
    model has no bias."""
    native: bool = False
    """Whether everything but the FFNs is what the dense class has, in its own names."""
    prefix: str = ""
    """What stands before every tensor's name."""
    copies: bool = False
    """Whether the gates of the chosen experts can be softmax weights that sum to one."""
    ties: bool = False
    """Whether all engines load the class with the embedding as its head."""
    model_type: str = ""
    """The name of the target's file; `targets.load` sets it."""

    def configuration(self, dense: Dense, shape: Shape) -> dict[str, Any]:
        """The configuration of a MoE model of this shape."""
        config = self.configure(dense, shape)
        if not self.architecture:
            return config
        return {"architectures": [self.architecture], "model_type": self.model_type, **config}

    def why_unsupported(self, dense: Dense) -> str | None:
        """Why the class cannot hold a model exactly; None if it can."""
        if self.native:
            return None
        if extra := sorted(dense.biases - set(self.attention_biases)):
            return f"it has no bias on {', '.join(extra)} of the attention"
        windowed = dense.windowed
        if any(windowed) and self.windows != "any":
            if self.windows == "no layer" or not all(windowed):
                return f"its sliding window is on {self.windows}"
        if dense.rotary_share != 1.0 and not self.partial_rotary:
            return f"it rotates whole heads, not {dense.rotary_share:g} of each"
        if not self._leaves(dense):
            held = f"only its {self.dense_layers} layers"
            return f"it can leave {'no layer' if self.dense_layers == 'none' else held} dense"
        width = dense.head_dim * dense.config["num_attention_heads"]
        if not self.wide_heads and width != dense.config["hidden_size"]:
            return f"its heads have width hidden_size / heads, not {dense.head_dim}"
        return None

    def _leaves(self, dense: Dense) -> bool:
        """Whether the class can leave these layers dense."""
        left = dense.left_dense
        if self.dense_layers == "first":
            return left == tuple(range(len(left)))
        if self.dense_layers == "first and last":
            converted = [number for number in range(dense.num_layers) if number not in left]
            return converted == list(range(converted[0], converted[-1] + 1))
        return not left or self.dense_layers == "any"


def _glu(part: FFN, prefix: str, names: tuple[str, ...]) -> Tensors:
    """Gate, up and down under a prefix."""
    assert part.gate_FD is not None, "stock classes hold gated FFNs only"
    matrices = (part.gate_FD, part.up_FD, part.down_DF)
    return {prefix + name: tensor for name, tensor in zip(names, matrices, strict=True)}
