"""The engines that run stock MoE classes: which classes each one knows, and what it gets wrong.

A new engine is one more `Engine` in `ENGINES`; an engine learns a new class by one more entry in
its `classes`. A feature that no check looks at yet is one more function in `engine_checks`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moefy.models import engine_checks as checks
from moefy.models import targets
from moefy.models.engine_checks import Check
from moefy.models.targets.target import Dense
from moefy.types import Shape

NO_SHAPE = Shape(1, 1, 1, 1, 1)
"""A shape that every engine runs, for a model that has none yet."""


@dataclass(frozen=True)
class Engine:
    """A program that runs MoE checkpoints."""

    name: str
    """`--engines` takes it in small letters."""
    classes: Mapping[str, tuple[Check, ...]]
    """Stock class that it is known to run -> checks of models of this class."""
    checks: tuple[Check, ...] = ()
    """Checks of models of every class."""
    stored: Mapping[str, tuple[Check, ...]] = field(default_factory=dict)
    """Class -> checks of stored models: for what other programs write and moefy does not."""
    unpromised: Mapping[str, tuple[Check, ...]] = field(default_factory=dict)
    """The same as `classes` for classes that it may run, though moefy does not promise it."""
    notes: tuple[Check, ...] = ()
    """Checks of what slows a model down, or takes an option."""
    stored_notes: tuple[Check, ...] = ()
    """The same, for stored models only."""

    def issues(
        self, model_type: str, dense: Dense, shape: Shape = NO_SHAPE, *, stored: bool = False
    ) -> list[str]:
        """Why the engine does not run a model of a stock class, or runs it wrongly.

        `dense` is the dense model to be converted or, if `stored`, the MoE model itself. A class
        that the engine does not know has no issues.
        """
        known = {**self.unpromised, **self.classes}
        if model_type not in known:
            return []
        checks = (*self.checks, *known[model_type])
        if stored:
            checks += self.stored.get(model_type, ())
        return _results(checks, dense, shape)

    def warnings(self, dense: Dense, shape: Shape, *, stored: bool = False) -> list[str]:
        """What slows the model down in the engine, or takes an option."""
        return _results(self.notes + self.stored_notes * stored, dense, shape)


def known_engines(model_type: str) -> list[str]:
    """The names of the engines that run a stock class."""
    return [engine.name for engine in ENGINES if model_type in engine.classes]


def engine_issues(model_type: str, dense: Dense, shape: Shape = NO_SHAPE) -> dict[str, list[str]]:
    """Engine -> issues with the model that moefy would write, for engines that have some."""
    issues = {
        engine.name: engine.issues(model_type, dense, shape)
        for engine in ENGINES
        if model_type in engine.classes
    }
    return {name: reasons for name, reasons in issues.items() if reasons}


def by_reason(reasons: Mapping[str, list[str]]) -> dict[str, str]:
    """Reason -> the engines that share it, by name and comma-separated.

    >>> by_reason({"vLLM": ["is slow"], "MLX": ["is slow", "is new"]})
    {'is slow': 'vLLM, MLX', 'is new': 'MLX'}
    """
    engines: dict[str, list[str]] = {}
    for engine, lines in reasons.items():
        for reason in lines:
            engines.setdefault(reason, []).append(engine)
    return {reason: ", ".join(names) for reason, names in engines.items()}


def _results(checks: Iterable[Check], dense: Dense, shape: Shape) -> list[str]:
    return [reason for check in checks if (reason := check(dense, shape))]


TRANSFORMERS = Engine(
    "transformers",
    classes=dict.fromkeys(targets.names(), ()),
    notes=(checks.eager,),
    stored_notes=(checks.older_transformers,),
)
VLLM = Engine(
    "vLLM",
    classes={
        "ernie4_5_moe": (),
        "flex_olmo": (checks.unnormalised,),
        "glm4_moe": (),
        "granitemoehybrid": (checks.attention_biases,),
        "granitemoeshared": (checks.attention_biases,),
        "mixtral": (),
        "qwen2_moe": (checks.mixed_windows, checks.wide_heads),
        "qwen3_moe": (),
    },
    checks=(checks.other_activation,),
    stored={"glm4_moe": (checks.no_head,)},
    notes=(checks.odd_width, checks.odd_count),
)
SGLANG = Engine(
    "SGLang",
    classes={
        "glm4_moe": (checks.several_shared,),
        "granitemoehybrid": (),
        "mixtral": (),
        "qwen2_moe": (checks.dense_layers,),
        "qwen3_moe": (),
    },
    checks=(checks.other_activation,),
    stored={
        "glm4_moe": (checks.no_head,),
        "granitemoehybrid": (checks.full_attention,),
        "qwen2_moe": (checks.no_head,),
    },
    notes=(checks.odd_width,),
)
LLAMA_CPP = Engine(
    "llama.cpp",
    classes={
        "cohere2_moe": (),
        "ernie4_5_moe": (checks.gguf_rope, checks.window, checks.ernie_layers),
        "glm4_moe": (checks.gguf_rope,),
        "granitemoehybrid": (checks.gguf_rope,),
        "granitemoeshared": (checks.gguf_rope,),
        "lfm2_moe": (checks.gguf_rope, checks.window, checks.own_head),
        "mixtral": (checks.gguf_rope_of_llama, checks.window),
        "qwen2_moe": (
            checks.gguf_rope,
            checks.window,
            checks.wide_heads,
            checks.dense_layers,
            checks.unnormalised,
        ),
        "qwen3_moe": (checks.gguf_rope, checks.window, checks.dense_layers),
    },
    checks=(checks.other_activation, checks.many_experts, checks.many_chosen),
    stored={
        "lfm2_moe": (checks.computes_norm_topk_prob(True), checks.scaled_gates),
        "qwen2_moe": (checks.no_head, checks.computes_norm_topk_prob(False)),
        "qwen3_moe": (checks.computes_norm_topk_prob(True),),
    },
    unpromised={
        "hunyuan_v1_moe": (checks.hunyuan_tokenizer,),
        "llama": (checks.gguf_rope_of_llama, checks.window),
        "mistral": (checks.gguf_rope_of_llama, checks.window),
        "qwen2": (checks.gguf_rope, checks.window),
        "qwen3": (checks.gguf_rope, checks.window),
    },
    stored_notes=(checks.quantised_width,),
)
MLX = Engine(
    "MLX",
    classes={
        "glm4_moe": (),
        "granitemoehybrid": (checks.scaled_rope,),
        "mixtral": (checks.scaled_rope, checks.window, checks.wide_heads),
        "qwen2_moe": (
            checks.scaled_rope,
            checks.window,
            checks.dense_layers,
            checks.unnormalised,
        ),
        "qwen3_moe": (checks.window,),
    },
    checks=(checks.other_activation,),
    stored={
        "glm4_moe": (checks.no_head, checks.no_rope_theta),
        "mixtral": (checks.no_rope_theta,),
        "qwen2_moe": (checks.no_head, checks.computes_norm_topk_prob(False)),
    },
)
OLLAMA = dataclasses.replace(  # runs llama.cpp, and reads safetensors of few classes
    LLAMA_CPP,
    name="Ollama",
    classes={"mixtral": LLAMA_CPP.classes["mixtral"]},
    unpromised={},
)
ENGINES = (TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, OLLAMA)
