"""What moefy needs to know of a dense family."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moefy.types import FFN

if TYPE_CHECKING:
    from torch import Tensor

Config = Mapping[str, Any]


FFN_BIASES = "its FFN has biases, which no stock MoE class can hold"


def fuse(ffn: FFN) -> Tensor:
    """Gate and up as one matrix, gate above."""
    import torch

    assert ffn.gate_FD is not None
    return torch.cat([ffn.gate_FD, ffn.up_FD])


@dataclass(frozen=True)
class Family:
    """Where the FFN of a dense `model_type` stands, and which stock MoE classes can hold it.

    The defaults are Llama's names, which most families share.
    """

    model_type: str = ""
    """The name of the family's file; `families.load` sets it."""
    targets: tuple[str, ...] = ()
    """Stock MoE classes that hold this family exactly, best first."""
    missing_feature: str = ""
    """What this family has and no stock MoE class, where there are no targets."""
    refused: Mapping[str, str] = field(default_factory=lambda: {"mlp_bias": FFN_BIASES})
    """Key -> why a checkpoint whose configuration sets it cannot be converted."""
    refuse: Callable[[Config], str | None] = lambda config: None
    """The same for what is more than a key that is set."""
    layer: str = "model.layers.{layer}."
    ffn: tuple[str, ...] = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
    """The FFN's tensors behind the layer's prefix: gate, up and down, or gate and up as one matrix
    and down; without a gate up, its bias if there is one, and down."""
    transposed: bool = False
    """Whether its matrices are stored transposed."""
    beside: str = ""
    """What has FFNs of the same width and stays dense, beside the layers that are converted."""
    down_bias: str | None = None
    """The bias that is added to the FFN's output, behind the layer's prefix."""
    gated: bool = True
    keys: Mapping[str, str] = field(default_factory=dict)
    """Where the configuration names a size by another key than Llama's: usual key -> this one."""
    width: str = "intermediate_size"
    """The configuration's key for the number of FFN neurons."""
    neurons: Callable[[Config], int] | None = None
    """That number, where it is not what the key says."""
    activation: str = "hidden_act"
    """The configuration's key for it; a family without the key has SiLU."""
    unadjusted: Mapping[str, Any] = field(default_factory=dict)
    """What makes a configuration mean the number that its key says."""
    windows: str = "none"
    """Which layers the class gives the configured sliding window: "none", "all", or "some", as
    `layer_types` says."""
    partial_rotary: bool = False
    """Whether the class reads `partial_rotary_factor`."""
    gated_heads: bool = False
    """Whether queries are stored together with a gate of each head, as wide as they are."""
    block: str = "mlp"
    """The FFN's module in a layer of transformers' class."""
    emptied: tuple[str, ...] = ()
    """Modules that do a part of the FFN's work before `block`, where it is not all in one."""
    named: Callable[[str], str] = lambda name: name
    """The name that transformers' class has for a tensor, of the one under which it is stored."""
    unread: str = r"\.rotary_emb\.inv_freq$"
    """Tensors that are stored in some checkpoints and that the class does not read, by a pattern of
    their names."""
    tasks: tuple[str, ...] = ("ForCausalLM",)
    """What its checkpoints are for, the usual first: how the names of their Auto classes end."""
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    positions: str | None = None
    """Learned positions that are added to the embeddings."""
    tells_positions: bool = True
    """Whether a layer of transformers' class is told where in a text its tokens stand, or always
    has the whole text."""
    first_position: int = 0
    """The row of the first token's position."""
    projection: str | None = None
    """A matrix that embeddings of another width than the model's go through, where they are."""
    embeddings: str | None = None
    """The module that makes the first layer's states of token ids, where more is done."""
    embedding_scale: Callable[[Config], float] = lambda config: 1.0
    """What the embeddings are multiplied by before the first layer."""
    join: Callable[[Any], Callable[[Tensor], Tensor]] | None = None
    """A layer's module -> what the FFN's output goes through before it is added; None: nothing."""
    behind: str | None = None
    """A layer's norm that the sum of the residual and the FFN's output goes through."""
    rest: Callable[[Config, str, Tensor], dict[str, Tensor]] | None = None
    """(configuration, name, tensor) -> what is written for a tensor that is no FFN, in the names
    of the targets. None: everything is copied byte for byte."""
    canonical: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config
    """The configuration in the keys of the targets, as `rest` has changed the tensors."""
    variant: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    """What of the above is otherwise in models of this configuration."""

    @property
    def biased(self) -> bool:
        """Whether the neurons have biases, as only those without a gate can."""
        return not self.gated and len(self.ffn) == 3

    @property
    def fused(self) -> bool:
        """Whether gate and up are stored as one matrix, gate above."""
        return self.gated and len(self.ffn) == 2

    def why_refused(self, config: Config) -> str | None:
        """Why a checkpoint with this configuration cannot be converted; None if it can."""
        for key, reason in self.refused.items():
            if config.get(key):
                return f"{reason} ({key})"
        return self.refuse(config)

    def read(self, stored: Sequence[Tensor], activation: str) -> FFN:
        """The FFN from its tensors as stored, and the name of its activation."""
        if self.transposed:
            stored = [tensor.T.contiguous() if tensor.ndim == 2 else tensor for tensor in stored]
        first, *second, down_DF = stored
        if not self.gated:
            return FFN(None, first, down_DF, activation, *second)
        gate_FD, up_FD = first.chunk(2) if self.fused else (first, *second)
        return FFN(gate_FD, up_FD, down_DF, activation)

    def write(self, ffn: FFN) -> list[Tensor]:
        """The FFN's tensors as they are stored."""
        inputs = [fuse(ffn)] if self.fused else [ffn.gate_FD, ffn.up_FD, ffn.bias_F]
        tensors = [tensor for tensor in (*inputs, ffn.down_DF) if tensor is not None]
        return [tensor.T if self.transposed and tensor.ndim == 2 else tensor for tensor in tensors]

    def shapes(self, neurons: int, hidden: int) -> list[tuple[int, ...]]:
        """The shapes of those tensors."""
        up = (neurons, hidden)
        second = [(neurons,)] if self.biased else [up] * (len(self.ffn) - 2)
        shapes = [(2 * neurons, hidden) if self.fused else up, *second, (hidden, neurons)]
        return [shape[::-1] if self.transposed else shape for shape in shapes]

    def task(self, config: Config) -> str:
        """What a checkpoint is for, as the name of its class says."""
        classes = config.get("architectures")
        (name, *_) = classes if isinstance(classes, list) and classes else [""]
        return next((task for task in self.tasks if str(name).endswith(task)), self.tasks[0])

    def tied(self, config: Config, names: Iterable[str]) -> bool:
        """Whether the embedding is the head of a checkpoint that holds tensors of these names."""
        return "LM" in self.task(config) and not any(name.endswith(self.head) for name in names)

    def ffn_names(self, layer: int) -> tuple[str, ...]:
        """Names of the FFN's tensors of a layer."""
        prefix = self.layer.format(layer=layer)
        return tuple(prefix + name for name in self.ffn)

    def resized(self, config: Config, neurons: int) -> dict[str, Any]:
        """A configuration with another number of FFN neurons."""
        own = self.keys.get(self.width, self.width)
        named = {own: neurons} if own in config else {}
        return {**config, self.width: neurons, **named, **self.unadjusted}

    def sized(self, config: Config) -> dict[str, Any]:
        """A configuration with its sizes under the usual keys as well."""
        return {**config, **{key: config[own] for key, own in self.keys.items() if own in config}}

    def num_neurons(self, config: Config) -> int:
        """F."""
        return self.neurons(config) if self.neurons else int(config[self.width])
