"""What an engine may get wrong with a model: one feature each, for the entries of `engines`."""

from __future__ import annotations

from collections.abc import Callable

from moefy.models.targets.target import Dense
from moefy.types import Shape

Check = Callable[[Dense, Shape], str | None]
"""What an engine does wrong with a model (as a predicate of the engine), or None."""


def other_activation(dense: Dense, shape: Shape) -> str | None:
    """The engine runs SiLU, whatever the configuration says."""
    activation = dense.config.get("hidden_act", "silu")
    return None if activation in ("silu", "swish") else f"runs silu only, not {activation}"


def many_experts(dense: Dense, shape: Shape) -> str | None:
    """llama.cpp is compiled for at most 512 experts."""
    most = 512
    return f"has at most {most} experts, not {shape.num_experts}" * (shape.num_experts > most)


def many_chosen(dense: Dense, shape: Shape) -> str | None:
    """llama.cpp's graph has room for 8 nodes a tensor, and each chosen expert takes two: 32 ran in
    models of 8 to 30 layers, 36 aborted."""
    most = 32
    if shape.experts_per_token > most:
        return f"has room for {most} experts per token, not {shape.experts_per_token}"
    return None


def scaled_rope(dense: Dense, shape: Shape) -> str | None:
    """The engine computes unscaled rotary frequencies only."""
    if dense.rope_type != "default":
        return f"ignores or refuses rope_type {dense.rope_type} in this class"
    return None


def gguf_rope(dense: Dense, shape: Shape) -> str | None:
    """A GGUF file's own keys hold linear scaling, and yarn without options."""
    rope = dense.config.get("rope_parameters") or {}
    own = [key for key in ("attention_factor", "mscale", "mscale_all_dim") if rope.get(key)]
    if dense.rope_type == "yarn" and (own or rope.get("truncate") is False):
        return f"does not compute yarn with {', '.join(own) or 'truncate'} alike"
    return None if dense.rope_type in ("linear", "yarn") else scaled_rope(dense, shape)


def gguf_rope_of_llama(dense: Dense, shape: Shape) -> str | None:
    """The classes with Llama's graph read the factors of llama3 from a tensor."""
    return None if dense.rope_type == "llama3" else gguf_rope(dense, shape)


def window(dense: Dense, shape: Shape) -> str | None:
    """The engine ignores the sliding window."""
    size = dense.config.get("sliding_window")
    if any(dense.windowed) and size < dense.config.get("max_position_embeddings", 0):
        return f"ignores the sliding window: wrong past {size} tokens"
    return None


def mixed_windows(dense: Dense, shape: Shape) -> str | None:
    """The engine gives all layers the same window."""
    if all(dense.windowed) or not window(dense, shape):
        return None
    size = dense.config["sliding_window"]
    return f"ignores windows that only some layers have: wrong past {size} tokens"


def wide_heads(dense: Dense, shape: Shape) -> str | None:
    """The engine takes the heads together to be as wide as the model."""
    hidden, heads = dense.config["hidden_size"], dense.config["num_attention_heads"]
    if heads * dense.head_dim != hidden:
        return f"assumes head_dim {hidden / heads:g}, not {dense.head_dim}"
    return None


def dense_layers(dense: Dense, shape: Shape) -> str | None:
    """The engine expects experts in every layer."""
    if count := len(dense.left_dense):
        return f"cannot load dense layers, and {count} stay dense"
    return None


def attention_biases(dense: Dense, shape: Shape) -> str | None:
    """The engine does not load the attention's biases."""
    return "ignores the attention's biases in this class" if dense.biases else None


def unnormalised(dense: Dense, shape: Shape) -> str | None:
    """The engine never lets the gates of this class sum to one, as those of copies must."""
    if shape.granularity:
        return "computes as if norm_topk_prob were false, so that copies count too little"
    return None


def several_shared(dense: Dense, shape: Shape) -> str | None:
    """SGLang fuses one shared expert."""
    if shape.num_shared == shape.expert_width:
        return None
    units = shape.num_shared // shape.expert_width
    return f"needs --disable-shared-experts-fusion for {units} shared experts"


def own_head(dense: Dense, shape: Shape) -> str | None:
    """The engine has no place for a head of its own."""
    return None if dense.tied else "knows this class with the embedding as its head only"


def ernie_layers(dense: Dense, shape: Shape) -> str | None:
    """The converter takes the shared experts to be intermediate_size / num_key_value_heads wide."""
    if "moe_k" not in dense.config:  # no MoE yet: moefy writes a width that fits, if it can
        return dense_layers(dense, shape)
    if dense.num_layers - 1 in dense.left_dense:
        return "knows dense layers of this class only at the start"
    width = dense.config["intermediate_size"] // (dense.config.get("num_key_value_heads") or 1)
    if shape.num_shared in (0, width):
        return None
    guess = f"intermediate_size / num_key_value_heads ({width}) wide"
    return f"takes the shared experts to be {guess}, not {shape.num_shared}"


def hunyuan_tokenizer(dense: Dense, shape: Shape) -> str | None:
    """llama.cpp's converter would run the tokenizer's own code."""
    return "reads this class's tokenizer only as code of its own"


# --- checks of stored models ---------------------------------------------------------------------


def no_head(dense: Dense, shape: Shape) -> str | None:
    """The engine does not take the embedding for the head."""
    return "needs lm_head.weight, and the head is the embedding" if dense.tied else None


def computes_norm_topk_prob(value: bool) -> Check:
    """The engine knows one value of `norm_topk_prob` only."""

    def check(dense: Dense, shape: Shape) -> str | None:
        if bool(dense.config.get("norm_topk_prob", False)) == value:
            return None
        return f"computes as if norm_topk_prob were {str(value).lower()}"

    return check


def scaled_gates(dense: Dense, shape: Shape) -> str | None:
    """The engine does not scale the gates."""
    factor = dense.config.get("routed_scaling_factor", 1.0)
    return None if factor == 1.0 else "ignores the routed_scaling_factor of this class"


def no_rope_theta(dense: Dense, shape: Shape) -> str | None:
    """Newer versions of transformers do not write it."""
    if "rope_theta" in dense.config:
        return None
    return "reads rope_theta, which config.json lacks"


def full_attention(dense: Dense, shape: Shape) -> str | None:
    """Newer versions of transformers write it so."""
    if "full_attention" in (dense.config.get("layer_types") or ()):
        return "wants layer_types to say attention, not full_attention"
    return None


# --- notes ---------------------------------------------------------------------------------------


def eager(dense: Dense, shape: Shape) -> str | None:
    """`grouped_mm` of transformers takes rows of multiples of 16 bytes."""
    width = shape.expert_width
    reason = f"needs experts_implementation='eager': expert width {width} is no multiple of 8"
    return reason if width % 8 else None


def older_transformers(dense: Dense, shape: Shape) -> str | None:
    """Newer versions of transformers no longer write `rope_theta` at the top."""
    if "rope_theta" in dense.config or dense.config.get("model_type") == "moefy":
        return None
    return "versions before 5 read rope_theta, which config.json lacks"


def odd_width(dense: Dense, shape: Shape) -> str | None:
    """Fused kernels work in blocks of 128."""
    width = shape.expert_width
    if width % 128:
        return f"fused kernels may refuse expert width {width}, no multiple of 128, or be slow"
    return None


def odd_count(dense: Dense, shape: Shape) -> str | None:
    """vLLM's fused top-k takes powers of two."""
    count = shape.num_experts
    slow = f"routes to {count} experts, no power of two, by a slower kernel"
    return slow if count & (count - 1) else None


def quantised_width(dense: Dense, shape: Shape) -> str | None:
    """Quantised formats pack 32 weights of a row, K-quants 256."""
    width = shape.expert_width
    if width % 256 == 0:
        return None
    formats, unit = ("quantised formats", 32) if width % 32 else ("K-quants", 256)
    return f"{formats} fall back to others: expert width {width} is no multiple of {unit}"
