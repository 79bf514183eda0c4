"""A dense model of any family whose FFNs are experts: for families that no stock MoE class holds.

`MoefyForCausalLM` is transformers' own dense class, each converted FFN replaced by a `MoeBlock`; so
are the classes for other tasks. Importing this module makes them known to the Auto classes of
transformers; a checkpoint never brings code of its own. They run in transformers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN

from moefy.errors import MoefyError
from moefy.modeling_router import Router, see_places


class MoefyConfig(PreTrainedConfig):
    """The dense configuration under `dense`, and how its FFNs are divided."""

    model_type = "moefy"

    def __init__(
        self,
        dense: dict[str, Any] | None = None,
        layer: str = "model.layers.{layer}.",
        block: str = "mlp",
        emptied: list[str] | None = None,
        activation: str = "hidden_act",
        gated: bool = True,
        biased: bool | None = None,
        down_bias: str | None = None,
        left_dense: list[int] | None = None,
        num_experts: int = 8,
        num_experts_per_tok: int = 2,
        expert_width: int = 1,
        num_shared: int = 0,
        norm_topk_prob: bool = False,
        num_shadow: int = 0,
        lost_experts: list[list[int]] | None = None,
        router_units: int = 0,
        router_positions: int = 0,
        **rest: Any,
    ) -> None:
        dense = dict(dense or {"model_type": "llama"})
        self.dense = dense
        self.layer, self.block, self.emptied = layer, block, list(emptied or [])
        self.activation, self.gated = activation, gated
        self.biased = not gated if biased is None else biased
        self.down_bias = down_bias
        self.left_dense = list(left_dense or [])
        self.num_experts, self.num_experts_per_tok = num_experts, num_experts_per_tok
        self.expert_width, self.num_shared = expert_width, num_shared
        self.norm_topk_prob = norm_topk_prob
        self.num_shadow, self.lost_experts = num_shadow, list(lost_experts or [])
        self.router_units, self.router_positions = router_units, router_positions
        super().__init__(**rest)

    def dense_config(self) -> PreTrainedConfig:
        """The configuration of the dense class."""
        values = {**self.dense, "id2label": self.id2label, "label2id": self.label2id}
        return AutoConfig.for_model(values.pop("model_type"), **values)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The configuration from which caches and samplers take sizes."""
        return self.dense_config()


class Experts(nn.Module):
    """The routed experts, stacked; with a gate, `up_proj` holds gate above up.

    The first neurons of each may be stored again as its shadow, which answers where it is `lost`.
    """

    def __init__(self, config: MoefyConfig, hidden: int, act: Any) -> None:
        super().__init__()
        num, width = config.num_experts, config.expert_width
        self.gated, self.act_fn = config.gated, act
        self.up_proj = nn.Parameter(torch.empty(num, width * (1 + config.gated), hidden))
        self.up_bias = nn.Parameter(torch.empty(num, width)) if config.biased else None
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))
        self.lost: frozenset[int] = frozenset()
        if shadow := config.num_shadow:
            self.shadow_up_proj = nn.Parameter(
                torch.empty(num, shadow * (1 + config.gated), hidden)
            )
            self.shadow_up_bias = nn.Parameter(torch.empty(num, shadow)) if config.biased else None
            self.shadow_down_proj = nn.Parameter(torch.empty(num, hidden, shadow))

    def activations(self, expert: int, x_TD: Tensor, ups: Sequence[Tensor] | None = None) -> Tensor:
        """The activations of one expert's neurons, (T, N), or of those of its shadow."""
        up, bias = self.up_proj if ups is None else ups, self.up_bias
        if expert in self.lost:
            up, bias = self.shadow_up_proj, self.shadow_up_bias
        bias = None if bias is None else bias[expert]
        return _activations(nn.functional.linear(x_TD, up[expert], bias), self)

    def forward(self, x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """The chosen experts' outputs, times their gates, summed."""
        y_TD = torch.zeros_like(x_TD)
        # All views at once: the gradient of each indexed expert would be as large as all of them.
        ups, downs = self.up_proj.unbind(), self.down_proj.unbind()
        for expert in range(len(self.up_proj)):
            token, place = (index_TK == expert).nonzero(as_tuple=True)
            if len(token):
                h_TN = self.activations(expert, x_TD[token], ups)
                down = self.shadow_down_proj if expert in self.lost else downs
                part_TD = nn.functional.linear(h_TN, down[expert])
                y_TD.index_add_(0, token, part_TD * gate_TK[token, place, None])
        return y_TD


class Shared(nn.Module):
    """The neurons that are always on."""

    def __init__(self, config: MoefyConfig, hidden: int, act: Any) -> None:
        super().__init__()
        self.gated, self.act_fn = config.gated, act
        width = config.num_shared
        self.up_proj = nn.Linear(hidden, width * (1 + config.gated), bias=config.biased)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Their output."""
        return self.down_proj(_activations(self.up_proj(x_TD), self))


class MoeBlock(nn.Module):
    """Replaces a dense FFN."""

    def __init__(self, config: MoefyConfig, dense: PreTrainedConfig, layer: int) -> None:
        super().__init__()
        hidden = dense.hidden_size
        act = ACT2FN[getattr(dense, config.activation, "silu")]
        self.gate = Router(config, hidden)
        self.experts = Experts(config, hidden, act)
        lost = frozenset(expert for number, expert in config.lost_experts if number == layer)
        (self.experts if config.num_shadow else self.gate).lost = lost
        self.shared = Shared(config, hidden, act) if config.num_shared else None
        self.position_BT: Tensor | None = None
        self.down_bias = config.down_bias
        if self.down_bias:  # it stays where the dense class has it
            home, _, name = self.down_bias.rpartition(".")
            if home:
                self.add_module(home, nn.Module())
            self.get_submodule(home).register_parameter(name, nn.Parameter(torch.empty(hidden)))

    def forward(self, x: Tensor) -> Tensor:
        """The FFN's output, of the shape of its input."""
        x_TD = x.reshape(-1, x.shape[-1])
        _, gate_TK, index_TK = self.gate(x_TD, self.position_BT)
        y_TD = self.experts(x_TD, index_TK, gate_TK)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        if self.down_bias:
            y_TD = y_TD + self.get_parameter(self.down_bias)
        return y_TD.view(x.shape)


class MoefyModel(PreTrainedModel):
    """The dense class of `config.dense` without a head, its FFNs replaced."""

    opens: Any = AutoModel
    """The Auto class of the dense class."""

    config_class = MoefyConfig
    base_model_prefix = "dense"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: MoefyConfig) -> None:
        super().__init__(config)
        dense = config.dense_config()
        asked = config._attn_implementation
        # "sdpa" is what transformers sets where nothing was asked; the dense class knows better.
        chosen = {} if asked in (None, "sdpa") else {"attn_implementation": asked}
        model = self.opens.from_config(dense, **chosen)
        name = model.base_model_prefix
        # Without a head, too, tensors are named as in the classes that have one.
        bare = self.opens is AutoModel and config.layer.startswith(name + ".")
        self.dense: Any = nn.ModuleDict({name: model}) if bare else model
        moe = [n for n in range(dense.num_hidden_layers) if n not in config.left_dense]
        _check_lost(config, moe)
        for layer in moe:
            home = self.dense.get_submodule(config.layer.format(layer=layer).rstrip("."))
            home.set_submodule(config.block, block := MoeBlock(config, dense, layer))
            if config.router_positions:
                home.register_forward_pre_hook(partial(see_places, block), with_kwargs=True)
            for name in config.emptied:
                home.set_submodule(name, nn.Identity())
        tied = model._tied_weights_keys if dense.tie_word_embeddings and not bare else None
        self._tied_weights_keys = {f"dense.{a}": f"dense.{b}" for a, b in (tied or {}).items()}
        self.post_init()

    @property
    def inside(self) -> Any:
        """The model of the dense class."""
        return next(iter(self.dense.values())) if type(self.dense) is nn.ModuleDict else self.dense

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the dense class does."""
        return self.inside(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        """The dense class's."""
        return self.inside.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """The dense class's."""
        self.inside.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The dense class's."""
        return self.inside.get_output_embeddings()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise new weights like those of a linear layer; a checkpoint brings all of them."""
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.02)


class MoefyForCausalLM(MoefyModel, GenerationMixin):
    """The same for causal language models."""

    opens = AutoModelForCausalLM

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as the dense class does."""
        self.dense.generation_config = self.generation_config
        return self.dense.generate(*args, **kwargs)


class MoefyForSeq2SeqLM(MoefyForCausalLM):
    """The same for sequence-to-sequence models."""

    opens = AutoModelForSeq2SeqLM


class MoefyForMaskedLM(MoefyModel):
    """The same for masked language models."""

    opens = AutoModelForMaskedLM


class MoefyForSequenceClassification(MoefyModel):
    """The same for classifiers."""

    opens = AutoModelForSequenceClassification


def _check_lost(config: MoefyConfig, layers: list[int]) -> None:
    """Refuse a lost expert that is not there.

    Raises:
        MoefyError: code 4.
    """
    there = [[layer, expert] for layer in layers for expert in range(config.num_experts)]
    for lost in config.lost_experts:
        if lost not in there:
            raise MoefyError(
                f"lost_experts in config.json names {lost}, which is not there; expected pairs "
                f"[layer, expert] of the layers {layers} and the experts 0 to "
                f"{config.num_experts - 1}",
                code=4,
            )


def _activations(up: Tensor, module: Any) -> Tensor:
    if not module.gated:
        return module.act_fn(up)
    gate, up = up.chunk(2, dim=-1)
    return module.act_fn(gate) * up


AutoConfig.register("moefy", MoefyConfig)
AutoModel.register(MoefyConfig, MoefyModel)
AutoModelForCausalLM.register(MoefyConfig, MoefyForCausalLM)
AutoModelForSeq2SeqLM.register(MoefyConfig, MoefyForSeq2SeqLM)
AutoModelForMaskedLM.register(MoefyConfig, MoefyForMaskedLM)
AutoModelForSequenceClassification.register(MoefyConfig, MoefyForSequenceClassification)
