"""The engines that run stock MoE classes: which classes each one knows, and what it gets wrong.

A new engine is one more `Engine` in `ENGINES`; an engine learns a new class by one more entry in
its `classes`. Each check looks at one feature of a model. All of this was tried with the engines or
read in their code, but for classes of which only the name is known to be listed there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from moefy.models import targets
from moefy.models.targets.target import Dense
from moefy.types import Shape

NO_SHAPE = Shape(1, 1, 1, 1, 1)
"""A shape that every engine runs, for a model that has none yet."""

Check = Callable[[Dense, Shape], str | None]
"""What an engine does wrong with a model (as a predicate of the engine), or None."""


@dataclass(frozen=True)
class Engine:
    """A program that runs MoE checkpoints."""

    name: str
    option: str
    """What `--engines` calls it."""
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

    def heed(self, dense: Dense, shape: Shape, *, stored: bool = False) -> list[str]:
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


# --- checks of one feature each ------------------------------------------------------------------


def _other_activation(dense: Dense, shape: Shape) -> str | None:
    activation = dense.config.get("hidden_act", "silu")
    return None if activation in ("silu", "swish") else f"runs silu only, not {activation}"


def _many_experts(dense: Dense, shape: Shape) -> str | None:
    most = 512  # llama.cpp is built for so many
    return f"has at most {most} experts, not {shape.num_experts}" * (shape.num_experts > most)


def _scaled_rope(dense: Dense, shape: Shape) -> str | None:
    if dense.rope_type != "default":
        return f"ignores or refuses rope_type {dense.rope_type} in this class"
    return None


def _gguf_rope(dense: Dense, shape: Shape) -> str | None:
    """A GGUF file's own keys hold linear scaling, and yarn without options."""
    rope = dense.config.get("rope_parameters") or {}
    own = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key)]
    if dense.rope_type == "yarn" and (own or rope.get("truncate") is False):
        return f"does not compute yarn with {', '.join(own) or 'truncate'} alike"
    return None if dense.rope_type in ("linear", "yarn") else _scaled_rope(dense, shape)


def _gguf_rope_of_llama(dense: Dense, shape: Shape) -> str | None:
    """The classes with Llama's graph read the factors of llama3 from a tensor."""
    return None if dense.rope_type == "llama3" else _gguf_rope(dense, shape)


def _window(dense: Dense, shape: Shape) -> str | None:
    size = dense.config.get("sliding_window")
    if any(dense.windowed) and size < dense.config.get("max_position_embeddings", 0):
        return f"ignores the sliding window: wrong past {size} tokens"
    return None


def _mixed_windows(dense: Dense, shape: Shape) -> str | None:
    if all(dense.windowed) or not _window(dense, shape):
        return None
    size = dense.config["sliding_window"]
    return f"ignores windows that only some layers have: wrong past {size} tokens"


def _wide_heads(dense: Dense, shape: Shape) -> str | None:
    hidden, heads = dense.config["hidden_size"], dense.config["num_attention_heads"]
    if heads * dense.head_dim != hidden:
        return f"assumes head_dim {hidden / heads:g}, not {dense.head_dim}"
    return None


def _dense_layers(dense: Dense, shape: Shape) -> str | None:
    if count := len(dense.left_dense):
        return f"cannot load dense layers, and {count} stay dense"
    return None


def _attention_biases(dense: Dense, shape: Shape) -> str | None:
    return "ignores the attention's biases in this class" if dense.biases else None


def _several_shared(dense: Dense, shape: Shape) -> str | None:
    if shape.num_shared == shape.expert_width:
        return None
    units = shape.num_shared // shape.expert_width
    return f"needs --disable-shared-experts-fusion for {units} shared experts"


def _own_head(dense: Dense, shape: Shape) -> str | None:
    return None if dense.tied else "knows this class with the embedding as its head only"


def _ernie_layers(dense: Dense, shape: Shape) -> str | None:
    """The converter takes the shared experts to be intermediate_size / num_key_value_heads wide."""
    if "moe_k" not in dense.config:  # no MoE yet: moefy writes a width that fits, if it can
        return _dense_layers(dense, shape)
    if dense.num_layers - 1 in dense.left_dense:
        return "knows dense layers of this class only at the start"
    width = dense.config["intermediate_size"] // (dense.config.get("num_key_value_heads") or 1)
    if shape.num_shared in (0, width):
        return None
    guess = f"intermediate_size / num_key_value_heads ({width}) wide"
    return f"takes the shared experts to be {guess}, not {shape.num_shared}"


def _hunyuan_tokenizer(dense: Dense, shape: Shape) -> str | None:
    return "reads this class's tokenizer only as code of its own"


# --- checks of stored models ---------------------------------------------------------------------


def _no_head(dense: Dense, shape: Shape) -> str | None:
    return "needs lm_head.weight, and the head is the embedding" if dense.tied else None


def _normed(dense: Dense, shape: Shape) -> str | None:
    if dense.config.get("norm_topk_prob", False):
        return "computes as if norm_topk_prob were false"
    return None


def _unnormed(dense: Dense, shape: Shape) -> str | None:
    if dense.config.get("norm_topk_prob", False):
        return None
    return "computes as if norm_topk_prob were true"


def _scaled_gates(dense: Dense, shape: Shape) -> str | None:
    factor = dense.config.get("routed_scaling_factor", 1.0)
    return None if factor == 1.0 else "ignores the routed_scaling_factor of this class"


def _no_rope_theta(dense: Dense, shape: Shape) -> str | None:
    """Newer versions of transformers do not write it."""
    if "rope_theta" in dense.config:
        return None
    return "reads rope_theta, which config.json lacks"


def _full_attention(dense: Dense, shape: Shape) -> str | None:
    """Newer versions of transformers write it so."""
    if "full_attention" in (dense.config.get("layer_types") or ()):
        return "wants layer_types to say attention, not full_attention"
    return None


# --- notes ---------------------------------------------------------------------------------------


def _eager(dense: Dense, shape: Shape) -> str | None:
    width = shape.expert_width
    reason = f"needs experts_implementation='eager': expert width {width} is no multiple of 8"
    return reason if width % 8 else None


def _older_transformers(dense: Dense, shape: Shape) -> str | None:
    if "rope_theta" in dense.config or dense.config.get("model_type") == "moefy":
        return None
    return "versions before 5 read rope_theta, which config.json lacks"


def _odd_width(dense: Dense, shape: Shape) -> str | None:
    width = shape.expert_width
    if width % 128:
        return f"fused kernels may refuse expert width {width}, no multiple of 128, or be slow"
    return None


def _odd_count(dense: Dense, shape: Shape) -> str | None:
    count = shape.num_experts
    slow = f"routes to {count} experts, no power of two, by a slower kernel"
    return slow if count & (count - 1) else None


def _quantised_width(dense: Dense, shape: Shape) -> str | None:
    width = shape.expert_width
    if width % 256 == 0:
        return None
    formats, unit = ("quantised formats", 32) if width % 32 else ("K-quants", 256)
    return f"{formats} fall back to others: expert width {width} is no multiple of {unit}"


# --- the engines ---------------------------------------------------------------------------------

TRANSFORMERS = Engine(
    "transformers",
    "transformers",
    classes=dict.fromkeys(targets.names(), ()),
    notes=(_eager,),
    stored_notes=(_older_transformers,),
)
VLLM = Engine(
    "vLLM",
    "vllm",
    classes={
        "ernie4_5_moe": (),
        "flex_olmo": (),
        "glm4_moe": (),
        "granitemoehybrid": (_attention_biases,),
        "granitemoeshared": (_attention_biases,),
        "mixtral": (),
        "qwen2_moe": (_mixed_windows, _wide_heads),
        "qwen3_moe": (),
    },
    checks=(_other_activation,),
    stored={"glm4_moe": (_no_head,)},
    notes=(_odd_width, _odd_count),
)
SGLANG = Engine(
    "SGLang",
    "sglang",
    classes={
        "glm4_moe": (_several_shared,),
        "granitemoehybrid": (),
        "mixtral": (),
        "qwen2_moe": (_dense_layers,),
        "qwen3_moe": (),
    },
    checks=(_other_activation,),
    stored={
        "glm4_moe": (_no_head,),
        "granitemoehybrid": (_full_attention,),
        "qwen2_moe": (_no_head,),
    },
    notes=(_odd_width,),
)
LLAMA_CPP = Engine(
    "llama.cpp",
    "llama.cpp",
    classes={
        "cohere2_moe": (),
        "ernie4_5_moe": (_gguf_rope, _window, _ernie_layers),
        "granitemoehybrid": (_gguf_rope,),
        "granitemoeshared": (_gguf_rope,),
        "lfm2_moe": (_gguf_rope, _window, _own_head),
        "mixtral": (_gguf_rope_of_llama, _window),
        "qwen2_moe": (_gguf_rope, _window, _wide_heads, _dense_layers),
        "qwen3_moe": (_gguf_rope, _window, _dense_layers),
    },
    checks=(_other_activation, _many_experts),
    stored={
        "lfm2_moe": (_unnormed, _scaled_gates),
        "qwen2_moe": (_no_head, _normed),
        "qwen3_moe": (_unnormed,),
    },
    unpromised={
        "glm4_moe": (_gguf_rope, _window),
        "hunyuan_v1_moe": (_hunyuan_tokenizer,),
        "llama": (_gguf_rope_of_llama, _window),
        "mistral": (_gguf_rope_of_llama, _window),
        "qwen2": (_gguf_rope, _window),
        "qwen3": (_gguf_rope, _window),
    },
    stored_notes=(_quantised_width,),
)
MLX = Engine(
    "MLX",
    "mlx",
    classes={
        "glm4_moe": (),
        "granitemoehybrid": (_scaled_rope,),
        "mixtral": (_scaled_rope, _window, _wide_heads),
        "qwen2_moe": (_scaled_rope, _window, _dense_layers),
        "qwen3_moe": (_window,),
    },
    checks=(_other_activation,),
    stored={
        "glm4_moe": (_no_head, _no_rope_theta),
        "mixtral": (_no_rope_theta,),
        "qwen2_moe": (_no_head, _normed),
    },
)
OLLAMA = dataclasses.replace(  # runs llama.cpp, and reads safetensors of few classes
    LLAMA_CPP,
    name="Ollama",
    option="ollama",
    classes={"mixtral": LLAMA_CPP.classes["mixtral"]},
    unpromised={},
)
ENGINES = (TRANSFORMERS, VLLM, SGLANG, LLAMA_CPP, MLX, OLLAMA)
