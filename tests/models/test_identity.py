"""With all experts active, a converted model is the dense model, to the rounding of float32.

The judge is transformers: both folders are opened with `AutoModelForCausalLM` and give logits for
the same tokens. Two bounds, both relative to the largest dense logit:

- `EXACT` where the router's rows are set to zero, so that every gate is exactly one;
- `WRITTEN` for the folder as it was written. Its rows are scaled to a score deviation of 2^-10, so
  a gate is off by 0.1 % for most tokens and by less than 0.5 % for all.

A planted fault moves the logits by `FAULT` or more.
"""

import json
from pathlib import Path

import pytest
import stock
import torch
from safetensors.torch import load_file, save_file
from stock import (
    ELASTIC,
    EXACT,
    FAULT,
    HELD,
    LLAMA3,
    ONE_EACH,
    ONE_WINDOW,
    OWN,
    ROUTER,
    SLICES,
    TARGETS,
    UNLIKE,
    WRITTEN,
    Plant,
    all_active,
    assert_identity,
    auto_class,
    blocks,
    changed,
    dense_logits,
    distance,
    gates,
    logits,
    longrope,
    masked,
    open_all_active,
    opened,
    planted,
    recipe,
    rope,
    router_rows,
    scale,
    scale_half,
    scale_routed,
    silence,
    some_active,
)
from transformers import AutoModelForCausalLM

import moefy.convert.partition
from moefy.errors import MoefyError
from moefy.models import families, targets
from moefy.models.engines import known_engines

PARTITIONS = sorted(
    file.stem.replace("_", "-")
    for file in Path(moefy.convert.partition.__file__).parent.glob("*.py")
    # static routes nothing: it is no MoE; tests/models/test_upcycle.py has the copies
    if file.stem not in ("__init__", "static", "copies")
)
FIRST = list({target: (family, target) for family, target in reversed(HELD)}.values())


@pytest.fixture
def pair(pico):
    """`pair(family, target)`: the tiny model of a family that a class can hold."""
    return lambda family, target: pico(family, **UNLIKE.get((family, target), {}))


def refusal(converted, *model: object, **recipe: object) -> str:
    with pytest.raises(MoefyError) as caught:
        converted(*model, **recipe)
    assert caught.value.code == 4
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what must hold ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "target", "partition"),
    [(*held, "shuffle") for held in HELD]
    + [(*held, name) for held in FIRST for name in PARTITIONS if name != "shuffle"],
)
def test_all_experts_are_the_dense_model(family, target, partition, pair, converted):
    dense = pair(family, target)
    assert_identity(dense, converted(dense, **recipe(target) | {"partition": partition}))


@pytest.mark.parametrize("target", TARGETS)
def test_every_class_is_said_to_be_what_it_is(target):
    """That is, what these tests know of it by the definition of the class."""
    known = targets.load(target)
    assert known.elastic == (target in ELASTIC)
    assert known.model_type == target and "transformers" in known_engines(target)


@pytest.mark.parametrize(("family", "target"), [pair for pair in HELD if pair in UNLIKE])
def test_the_usual_tiny_model_is_refused_where_another_is_used(family, target, pico, converted):
    assert "window" in refusal(converted, pico(family), **recipe(target))


LEFT_DENSE = {
    "1:": {"qwen2_moe", "qwen3_moe", "glm4_moe", "cohere2_moe", "ernie4_5_moe", "lfm2_moe"},
    "0": {"qwen2_moe", "qwen3_moe", "cohere2_moe", "ernie4_5_moe"},
}
"""Layers that are converted, and the classes that can have the other one dense."""


@pytest.mark.parametrize(
    ("family", "target", "layers"),
    [(*held, "1:") for held in HELD] + [(*held, "0") for held in ONE_EACH],
)
def test_a_layer_left_dense(family, target, layers, pair, converted):
    dense, shape = pair(family, target), recipe(target) | {"layers": layers}
    if target not in LEFT_DENSE[layers]:
        assert "dense" in refusal(converted, dense, **shape)
        return
    moe = converted(dense, **shape)
    assert list(blocks(opened(moe))) == [1 if layers == "1:" else 0]
    assert_identity(dense, moe)


ENCODERS = [family for family in families.names() if "ForMaskedLM" in families.load(family).tasks]
GATED = [family for family in families.names() if families.load(family).gated]


GATED_T5 = {"feed_forward_proj": "gated-gelu"}
OWN_VARIANTS: list[tuple[str, dict]] = [
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),  # as the 350M has it
    ("opt", {"enable_bias": False, "activation_function": "gelu"}),  # as Galactica
    ("opt", {"_remove_final_layer_norm": True, "layer_norm_elementwise_affine": False}),
    ("bert", {"tie_word_embeddings": True, "type_vocab_size": 1, "layer_norm_eps": 0.3}),
    ("bert", {"hidden_act": "gelu_new"}),
    ("arcee", {"mlp_bias": True}),
    ("jais2", {"mlp_bias": False}),
    ("olmo", {"clip_qkv": 0.5}),
    ("phi", {"qk_layernorm": True}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("ministral3", {"sliding_window": 16}),
    ("roberta", {"tie_word_embeddings": True, "pad_token_id": 3}),
    ("distilbert", {"tie_word_embeddings": True, "sinusoidal_pos_embds": True}),
    ("t5", GATED_T5),
    ("t5", {"tie_word_embeddings": True, "num_decoder_layers": 1}),
    *((f, {"task": t}) for f in ENCODERS for t in ("Model", "ForSequenceClassification")),
    ("bert", {"task": "ForSequenceClassification", "num_labels": 5}),
]


@pytest.mark.parametrize(
    ("family", "changes"), [*((family, {}) for family in families.names()), *OWN_VARIANTS]
)
def test_its_own_class_holds_every_family(family, changes, pico, converted):
    """All of the experts are the dense model, as written, with a layer left dense or none."""
    dense = pico(family, **changes)
    for layers in (":", "1:"):
        folder = converted(dense, **recipe(OWN) | {"layers": layers})
        moe = open_all_active(folder)
        assert type(moe).__name__ == "Moefy" + changes.get("task", families.load(family).tasks[0])
        assert list(blocks(moe)) == {":": [0, 1], "1:": [1]}[layers]
        assert distance(logits(moe), dense_logits(dense)) < EXACT
    moe = opened(folder)
    assert distance(logits(moe), dense_logits(dense)) > 10 * EXACT  # with two experts it is not


def test_a_head_of_its_own_in_its_own_class(own_pico, converted):
    """T5 1.1 has one, and its class ties it to the embedding where no other is stored."""
    dense = own_pico("t5", **GATED_T5)
    stored = load_file(dense / "model.safetensors")
    stored["lm_head.weight"] = stored["shared.weight"].flip(0).contiguous()
    tied = dense_logits(dense)
    save_file(stored, dense / "model.safetensors", metadata={"format": "pt"})
    untied = logits(auto_class(dense).from_pretrained(dense, dtype=torch.float32).eval())
    assert distance(untied, tied) > FAULT
    moe = open_all_active(converted(dense, **recipe(OWN)))
    assert distance(logits(moe), untied) < EXACT


@pytest.mark.parametrize("family", GATED)
def test_in_its_own_class_the_number_of_experts_is_free(family, pico, converted):
    dense = pico(family)
    folder = converted(dense, **some_active(OWN))
    for k in (1, 5):
        moe = louder(opened(folder, num_experts_per_tok=k))
        assert distance(logits(moe), logits(masked(dense, moe, k))) < EXACT


FOUR = {
    "qwen2_moe": ("qwen2", {"layer_types": None}),
    "qwen3_moe": ("qwen3", {}),
    "cohere2_moe": ("cohere2", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    "ernie4_5_moe": ("ernie4_5", {}),
}


@pytest.mark.parametrize("layers", ["1:3", "0,2", "1,3"])
@pytest.mark.parametrize("target", FOUR)
def test_any_layers_left_dense(target, layers, pico, converted):
    family, changes = FOUR[target]
    dense = pico(family, num_hidden_layers=4, **changes)
    shape = recipe(target) | {"layers": layers}
    if target == "ernie4_5_moe" and layers != "1:3":  # it has a first MoE layer and a last one
        assert "only its first and last layers dense" in refusal(converted, dense, **shape)
        return
    assert_identity(dense, converted(dense, **shape))


@pytest.mark.parametrize(("family", "target"), HELD)
def test_a_tied_head(family, target, pico, converted):
    dense = pico(family, tie_word_embeddings=True, **UNLIKE.get((family, target), {}))
    assert "lm_head.weight" not in load_file(dense / "model.safetensors")
    moe = converted(dense, **recipe(target))
    # Gemma's embeddings are written as they are used, so its head is another matrix.
    tied = targets.load(target).ties and family != "gemma"
    assert ("lm_head.weight" in load_file(moe / "model.safetensors")) != tied
    assert json.loads((moe / "config.json").read_text())["tie_word_embeddings"] == tied
    assert_identity(dense, moe)


@pytest.mark.parametrize(("family", "target"), ONE_EACH)
def test_six_experts(family, target, pico, converted):
    """1 / 6 has no exact float."""
    assert_identity(pico(family), converted(pico(family), **recipe(target, 6)))


YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


ALL = "all of them"
VARIANTS: dict[str, tuple[str, dict, str]] = {
    "window of all layers, mistral": ("mistral", {"sliding_window": 16}, "qwen2_moe mixtral"),
    "window of all layers, ministral": (
        "ministral",
        {"layer_types": ["sliding_attention"] * 2},
        "qwen2_moe mixtral",
    ),
    "window of all layers, qwen2": (
        "qwen2",
        ONE_WINDOW | {"max_window_layers": 0},
        "qwen2_moe",
    ),
    "window of all layers, qwen3": (
        "qwen3",
        ONE_WINDOW | {"max_window_layers": 0},
        "qwen3_moe",
    ),
    "window of all layers, phi3": ("phi3", {"sliding_window": 16}, "mixtral qwen2_moe"),
    "window of one layer, qwen2": ("qwen2", ONE_WINDOW, "qwen2_moe"),
    "window of one layer, qwen3": ("qwen3", ONE_WINDOW, ""),
    "window of no layer, cohere2": ("cohere2", {"layer_types": ["full_attention"] * 2}, ALL),
    "llama3 frequencies": ("llama", {"rope_parameters": LLAMA3}, ALL),
    "llama3 frequencies, granite": ("granite", {"rope_parameters": LLAMA3}, ALL),
    "llama3 frequencies, smollm3": ("smollm3", {"rope_parameters": LLAMA3}, ALL),
    "llama3 frequencies, olmo2": ("olmo2", {"rope_parameters": LLAMA3}, ALL),
    "llama3 frequencies, ernie": ("ernie4_5", {"rope_parameters": LLAMA3}, ALL),
    "yarn, qwen2": ("qwen2", {"rope_parameters": YARN}, ALL),
    "yarn, qwen3": ("qwen3", {"rope_parameters": YARN}, ALL),
    "dynamic frequencies": (
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1000.0, "factor": 4.0},
        },
        ALL,
    ),
    "dynamic frequencies by alpha": (
        "hunyuan_v1_dense",
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 1e3,
                "alpha": 50.0,
                "factor": 1,
            }
        },
        ALL,
    ),
    "fast frequencies": ("llama", rope(100.0), ALL),
    "fast frequencies, cohere2": ("cohere2", rope(100.0), ALL),
    "fast frequencies, gemma": ("gemma", rope(100.0), ALL),
    "fast frequencies, lfm2": ("lfm2", rope(100.0), ALL),
    "half of each head rotated": ("phi3", rope(1000.0, partial_rotary_factor=0.5), "glm4_moe"),
    "half of each head rotated, by the old key": (
        "phi3",
        {"partial_rotary_factor": 0.5},
        "glm4_moe",
    ),
    "longrope, short text": ("phi3", longrope(256), ALL),
    "longrope, long text": ("phi3", longrope(32), ALL),
    "longrope of half heads": ("phi3", longrope(32, partial_rotary_factor=0.5), "glm4_moe"),
    "nothing rotated": ("granitemoehybrid", {"position_embedding_type": "nope"}, ALL),
    "rotated by an interval": (
        "smollm3",
        {"num_hidden_layers": 4, "no_rope_layers": None, "no_rope_layer_interval": 2},
        ALL,
    ),
    "wide heads": ("llama", {"head_dim": 16}, "qwen2_moe mixtral glm4_moe"),
    "wide heads, smollm3": ("smollm3", {"head_dim": 16}, ALL),
    "wide heads, granite": ("granite", {"head_dim": 16}, ""),
    "wide heads, olmo2": ("olmo2", {"head_dim": 16}, ""),
    "every head its own key": ("phi3", {"num_key_value_heads": 4}, ALL),
    "one key for all heads": ("smollm3", {"num_key_value_heads": 1}, ALL),
    "biases at attention": ("llama", {"attention_bias": True}, "granitemoeshared"),
    "biases at attention, qwen3": ("qwen3", {"attention_bias": True}, "qwen3_moe"),
    "biases at attention, granite": ("granite", {"attention_bias": True}, ALL),
    "biases at attention, granite 4": ("granitemoehybrid", {"attention_bias": True}, ALL),
    "biases at attention, olmo2": ("olmo2", {"attention_bias": True}, ALL),
    "biases at attention, cohere2": ("cohere2", {"attention_bias": True}, ALL),
    "biases at attention, hunyuan": ("hunyuan_v1_dense", {"attention_bias": True}, ALL),
    "biases at attention, smollm3": ("smollm3", {"attention_bias": True}, ""),
    "biases at attention, gemma": ("gemma", {"attention_bias": True}, ""),
    "biases in the FFN": ("llama", {"mlp_bias": True}, ""),
    "biases everywhere": ("ernie4_5", {"use_bias": True}, ""),
    "biases in the convolutions": ("lfm2", {"conv_bias": True}, ALL),
    "no convolution": ("lfm2", {"layer_types": ["full_attention"] * 2}, ALL),
    "a width that is adjusted": (
        "lfm2",
        {"block_auto_adjust_ff_dim": True, "intermediate_size": 132, "block_multiple_of": 32},
        ALL,
    ),
    "experts": ("granitemoehybrid", {"num_local_experts": 2, "num_experts_per_tok": 1}, ""),
    "a state-space layer": (
        "granitemoehybrid",
        {"layer_types": ["mamba", "full_attention"], "mamba_n_heads": 2, "mamba_d_head": 32},
        "",
    ),
    "another activation": ("llama", {"hidden_act": "gelu_pytorch_tanh"}, ALL),
    "another activation, phi3": ("phi3", {"hidden_act": "gelu"}, ALL),
    "another activation, cohere2": ("cohere2", {"hidden_act": "gelu"}, ALL),
    "halves in another order, one key for all heads": ("helium", {"num_key_value_heads": 1}, ALL),
    "halves in another order, llama3": ("helium", {"rope_parameters": LLAMA3}, ALL),
    "whole heads rotated, glm": ("glm", rope(1000.0, partial_rotary_factor=1.0), ALL),
    "no biases at attention, glm": ("glm", {"attention_bias": False}, ALL),
    "biases at attention, cohere": ("cohere", {"attention_bias": True}, ALL),
    "norms on heads, cohere": ("cohere", {"use_qk_norm": True}, ""),
    "biases at attention, qwen3.5": ("qwen3_5_text", {"attention_bias": True}, ALL),
    "no linear attention": ("qwen3_5_text", {"layer_types": ["full_attention"] * 2}, ALL),
    "whole heads rotated, qwen3.5": (
        "qwen3_5_text",
        rope(1000.0, partial_rotary_factor=1.0),
        ALL,
    ),
    "llama3 frequencies, cwm": ("cwm", {"rope_parameters": LLAMA3}, ALL),
    "no growth with the position": (
        "ministral3",
        {"rope_parameters": YARN | {"llama_4_scaling_beta": 0}},
        ALL,
    ),
    "no outer norms": ("hyperclovax", {"use_post_norm": False}, ALL),
    "another scale of logits": ("cohere2", {"logit_scale": 0.25}, ALL),
}
VARIANTS |= {
    f"a large epsilon, {family}": (
        family,
        {
            {"cohere": "layer_norm_eps", "cohere2": "layer_norm_eps", "lfm2": "norm_eps"}.get(
                family, "rms_norm_eps"
            ): 0.3
        },
        ALL,
    )
    for family in sorted({family for family, _ in HELD} - {"ministral"})
}
"""Name -> family, changes of its configuration, and those of its classes that can hold them."""


def held_by(name: str) -> list[str]:
    family, changes, holders = VARIANTS[name]
    known = families.load(family, changes).targets
    return list(known) if holders is ALL else [target for target in known if target in holders]


@pytest.mark.parametrize(
    ("name", "target"), [(name, target) for name in VARIANTS for target in held_by(name)]
)
def test_what_a_configuration_says_is_kept(name, target, pico, converted):
    family, changes, _ = VARIANTS[name]
    dense = pico(family, **changes)
    assert_identity(dense, converted(dense, **recipe(target)))


@pytest.mark.parametrize(
    ("name", "target"),
    [
        (name, target)
        for name, (family, changes, _) in VARIANTS.items()
        for target in families.load(family, changes).targets
        if target not in held_by(name)
    ],
)
def test_what_a_class_cannot_express_is_refused(name, target, pico, converted):
    family, changes, _ = VARIANTS[name]
    refusal(converted, pico(family, **changes), **recipe(target))


OLD_KEYS = {
    "rope_theta": ("llama", {"rope_theta": 100.0, "torch_dtype": "float32"}),
    "rope_scaling": (
        "llama",
        {
            "rope_theta": 1000.0,
            "rope_scaling": {key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"},
        },
    ),
    "a window that is not used": (
        "qwen2",
        {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 16},
    ),
    "a window that is used": ("qwen2", ONE_WINDOW),
    "Mistral's window": ("mistral", {"rope_theta": 100.0, "sliding_window": 16}),
    "half of each head": ("phi3", {"rope_theta": 100.0, "partial_rotary_factor": 0.5}),
    "a list of layers that do not rotate": ("smollm3", {"rope_theta": 100.0}),
    "Granite's multipliers": ("granite", {"rope_theta": 100.0, "rope_scaling": None}),
    "Cohere's windows": ("cohere2", {"rope_theta": 100.0, "sliding_window_pattern": 2}),
    "convolutions by their absence": ("lfm2", {"rope_theta": 100.0, "full_attn_idxs": [1]}),
    "olmo2": ("olmo2", {"rope_theta": 100.0}),
    "ernie4_5": ("ernie4_5", {"rope_theta": 100.0}),
    "gemma": ("gemma", {"rope_theta": 100.0}),
}


@pytest.mark.parametrize("name", OLD_KEYS)
def test_a_configuration_of_transformers_4(name, own_pico, converted):
    """It has no `rope_parameters` and no `layer_types`; most checkpoints have such a one."""
    family, keys = OLD_KEYS[name]
    dense = own_pico(family)
    config = json.loads((dense / "config.json").read_text())
    new = ("rope_parameters", "layer_types", "dtype", "transformers_version")
    old = {key: value for key, value in config.items() if key not in new} | keys
    (dense / "config.json").write_text(json.dumps(old))
    moe = converted(dense, **recipe(families.load(family).targets[0]))
    assert_identity(dense, moe)
    written = json.loads((moe / "config.json").read_text())
    assert written["rope_theta"] == keys.get("rope_theta", 10000.0)
    scaling = written["rope_scaling"] or {}
    assert (keys.get("rope_scaling") or {}).items() <= scaling.items()


@pytest.mark.parametrize("target", ["qwen2_moe", "mixtral"])
def test_a_head_that_differs_from_the_embedding_it_is_said_to_be_tied_to(
    target, own_pico, converted
):
    """Then transformers uses the stored head, and so must the result."""
    dense = own_pico("llama", tie_word_embeddings=True)
    stored = load_file(dense / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(stored, dense / "model.safetensors", metadata={"format": "pt"})
    assert_identity(dense, converted(dense, **recipe(target)))


# --- bfloat16 ------------------------------------------------------------------------------------

KEPT_IN_FLOAT32 = ("e_score_correction_bias", "expert_bias")


def in_bfloat16(folder: Path) -> Path:
    """Store a model's weights in bfloat16."""
    stored = load_file(folder / "model.safetensors")
    rounded = {name: tensor.bfloat16() for name, tensor in stored.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(("family", "target"), ONE_EACH)
def test_a_power_of_two_of_experts_loses_nothing_in_bfloat16(family, target, own_pico, converted):
    dense = in_bfloat16(own_pico(family))
    moe = converted(dense, **recipe(target, 4))
    stored = load_file(moe / "model.safetensors")
    kinds = {t.dtype for name, t in stored.items() if not name.endswith(KEPT_IN_FLOAT32)}
    assert kinds == {torch.bfloat16}
    assert_identity(dense, moe)


@pytest.mark.parametrize(("family", "target"), ONE_EACH)
def test_six_experts_in_bfloat16(family, target, own_pico, converted):
    """Rounding 1 / 6 and the weights divided by it moves an FFN's output by less than 2^-8 of it.

    What that does to the logits is measured on the dense model, whose down columns are scaled so.
    Classes whose experts are slices of the dense weights lose nothing.
    """
    dense = in_bfloat16(own_pico(family))
    moe = converted(dense, **recipe(target, 6))
    expected = dense_logits(dense)
    scaled = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    for layer in scaled.model.layers:
        down_DF = layer.get_parameter(families.load(family).ffn[-1]).data
        down_DF[:, ::2] *= 1 + 2.0**-8
        down_DF[:, 1::2] *= 1 - 2.0**-8
    bound = distance(logits(scaled), expected)
    found = distance(logits(silence(open_all_active(moe))), expected)
    assert found < bound < WRITTEN
    assert (found < EXACT) == (target in SLICES)


ROUNDED = {"qwen3_5_text": 0.12}
"""Where bfloat16 alone moves the dense model by more than 0.05: its recurrent layers by 0.053."""


@pytest.mark.parametrize(
    ("family", "target", "experts"),
    [(*held, experts) for held in ONE_EACH for experts in (4, 6)]
    + [(family, "glm4_moe", 4) for family in ("gemma", "smollm3", "phi3")],
)
def test_computed_in_bfloat16(family, target, experts, own_pico, converted):
    """The result is off by no more than twice what bfloat16 costs the dense model itself."""
    dense = in_bfloat16(own_pico(family))
    moe = converted(dense, **recipe(target, experts))
    expected = dense_logits(dense)
    bound = 2 * distance(dense_logits(dense, torch.bfloat16), expected)
    assert (
        distance(logits(open_all_active(moe, torch.bfloat16)), expected)
        < bound
        < ROUNDED.get(family, 0.1)
    )


# --- some experts active -------------------------------------------------------------------------

LOUD = 2.0**8
"""What router rows are multiplied by so that rounding does not decide between two experts."""


def louder(moe, *, factor: float = LOUD):
    for block in blocks(moe).values():
        router_rows(block).data *= factor
    return moe


@pytest.mark.parametrize(("family", "target"), HELD)
def test_the_chosen_experts_are_dense_neurons(family, target, pair, converted, tmp_path):
    """At fewer experts than all, a chosen one counts by its gate and the others not at all."""
    dense = pair(family, target)
    folder = converted(dense, **some_active(target))
    moe = louder(opened(folder))
    assert moe.config.num_experts_per_tok == 2
    expected = logits(masked(dense, moe, 2))
    assert distance(logits(moe), expected) < EXACT
    assert distance(dense_logits(dense), expected) > FAULT
    wrong = louder(opened(planted(folder, tmp_path / "planted", scale_half)))
    assert distance(logits(wrong), expected) > FAULT


@pytest.mark.parametrize("target", TARGETS)
def test_as_written_the_gates_of_chosen_experts_are_one(target, pico, converted):
    """But for the size of the router's rows."""
    family = dict(map(reversed, ONE_EACH))[target]
    dense = pico(family)
    moe = opened(converted(dense, **some_active(target)))
    expected = masked(dense, moe, 2)
    seen = []
    for number in blocks(moe):
        layer = expected.model.layers[number]
        block = layer.get_submodule(families.load(family).block)
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits(expected)
    for x_BTD, block in zip(seen, blocks(moe).values(), strict=True):
        gate_BTE = gates(target, x_BTD @ router_rows(block).detach().T, 2)
        assert ((gate_BTE > 0).sum(-1) == 2).all()
        assert (gate_BTE[gate_BTE > 0] - 1).abs().max() < 0.005


@pytest.mark.parametrize(("family", "target"), ONE_EACH)
def test_the_number_of_experts_is_free_in_some_classes_only(family, target, pico, converted):
    """One folder, opened with any number of experts per token."""
    dense = pico(family)
    folder = converted(dense, **some_active(target))
    for k in range(1, stock.num_experts(folder) + 1):
        moe = louder(opened(folder, num_experts_per_tok=k))
        assert moe.config.num_experts_per_tok == k
        off = distance(logits(moe), logits(masked(dense, moe, k)))
        if target in ELASTIC or k == 2:
            assert off < EXACT
        else:
            assert off > FAULT


# --- planted faults ------------------------------------------------------------------------------


def unscaled_router(tensors: dict[str, torch.Tensor], config: dict) -> None:
    """Router rows as large as the scores were fitted, or as any trained router has them."""
    generator = torch.Generator().manual_seed(0)
    changed(tensors, ROUTER, lambda rows: torch.randn(rows.shape, generator=generator))


def exchange(first: str, second: str) -> Plant:
    """Exchange the tensors with two names in each layer, or what is alike of them."""

    def plant(tensors: dict[str, torch.Tensor], config: dict) -> None:
        for layer in range(2):
            one, other = (f"model.layers.{layer}.{name}.weight" for name in (first, second))
            rows = min(len(tensors[one]), len(tensors[other]))
            kept = tensors[one][:rows].clone()
            tensors[one][:rows] = tensors[other][:rows]
            tensors[other][:rows] = kept

    return plant


def without(*keys: str) -> Plant:
    return lambda tensors, config: [config.pop(key) for key in keys]


def said(**values: object) -> Plant:
    """Other values for keys that the configuration has."""

    def plant(tensors: dict[str, torch.Tensor], config: dict) -> None:
        assert all(config[key] != value for key, value in values.items())
        config.update(values)

    return plant


def full_attention(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["layer_types"] = ["full_attention"] * len(config["layer_types"])


def frequencies_as_they_were(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    config["rope_scaling"] = None


def rotated(share: float) -> Plant:
    """Another share of each head rotated."""

    def plant(tensors: dict[str, torch.Tensor], config: dict) -> None:
        config["partial_rotary_factor"] = share
        config["rope_parameters"]["partial_rotary_factor"] = share

    return plant


def halves_exchanged(tensors: dict[str, torch.Tensor], config: dict) -> None:
    """Queries of the first layer padded in front instead of behind."""

    def turn(query: torch.Tensor) -> torch.Tensor:
        heads = query.unflatten(0, (config["num_attention_heads"], 2, -1))
        assert not heads[:, 1].any() and heads[:, 0].any()
        return heads.flip(1).flatten(0, 2)

    changed(tensors, r"layers\.0\.self_attn\.q_proj\.weight$", turn)


def norms_less_one(tensors: dict[str, torch.Tensor], config: dict) -> None:
    changed(tensors, r"norm\.weight$", lambda weight: weight - 1)


def inside(**values: object) -> Plant:
    """The same for the dense configuration inside."""
    return lambda tensors, config: said(**values)(tensors, config["dense"])


def one_row_on(pattern: str) -> Plant:
    return lambda tensors, config: changed(tensors, pattern, lambda rows: rows.roll(1, 0))


def gate_below_up(tensors: dict[str, torch.Tensor], config: dict) -> None:
    changed(tensors, r"experts\.up_proj$", lambda both: torch.cat(both.chunk(2, 1)[::-1], 1))


DOWN_SWAPPED = exchange("mlp.experts.0.down_proj", "mlp.experts.1.down_proj")
FAULTS: dict[str, tuple[str, str, dict, Plant]] = {
    "shared down_proj not doubled": (
        "llama",
        "qwen2_moe",
        {},
        scale("shared_expert.down_proj.weight", 1 / 2),
    ),
    "down columns of two experts swapped": ("llama", "qwen2_moe", {}, DOWN_SWAPPED),
    "down columns of two experts swapped, qwen3": ("qwen3", "qwen3_moe", {}, DOWN_SWAPPED),
    "gate and up of one expert exchanged": (
        "llama",
        "qwen2_moe",
        {},
        exchange("mlp.experts.2.gate_proj", "mlp.experts.2.up_proj"),
    ),
    "gate and up of the shared expert exchanged": (
        "llama",
        "qwen2_moe",
        {},
        exchange("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    ),
    "gate and up of one expert exchanged, mixtral": (
        "llama",
        "mixtral",
        {},
        exchange("block_sparse_moe.experts.2.w1", "block_sparse_moe.experts.2.w3"),
    ),
    "gate and up exchanged, granite": (
        "granite",
        "granitemoeshared",
        {},
        lambda tensors, config: changed(
            tensors, r"moe\.input_linear\.weight$", lambda w: torch.cat(w.chunk(2, 1)[::-1], 1)
        ),
    ),
    "shared gate not near zero": (
        "llama",
        "qwen2_moe",
        {},
        scale("shared_expert_gate.weight", 1e6),
    ),
    "q bias zeroed": ("qwen2", "qwen2_moe", {}, scale("q_proj.bias", 0)),
    "k bias zeroed": ("qwen2", "qwen2_moe", {}, scale("k_proj.bias", 0)),
    "v bias zeroed": ("qwen2", "qwen2_moe", {}, scale("v_proj.bias", 0)),
    "q bias zeroed, glm4_moe": ("qwen2", "glm4_moe", {}, scale("q_proj.bias", 0)),
    "v bias zeroed, granite": ("qwen2", "granitemoeshared", {}, scale("v_proj.bias", 0)),
    "o bias zeroed": (
        "llama",
        "granitemoeshared",
        {"attention_bias": True},
        scale("o_proj.bias", 0),
    ),
    "query norm lost": ("qwen3", "qwen3_moe", {}, scale("q_norm.weight", 2)),
    "query norm lost, glm4_moe": ("qwen3", "glm4_moe", {}, scale("q_norm.weight", 2)),
    "query norm lost, hunyuan": (
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        {},
        scale("query_layernorm.weight", 2),
    ),
    "rope_theta dropped": (
        "llama",
        "qwen2_moe",
        rope(100.0),
        without("rope_theta", "rope_parameters"),
    ),
    "rope scaling dropped": (
        "llama",
        "mixtral",
        {"rope_parameters": LLAMA3},
        frequencies_as_they_were,
    ),
    "window dropped, mistral": ("mistral", "qwen2_moe", {"sliding_window": 16}, full_attention),
    "window dropped, mixtral": (
        "mistral",
        "mixtral",
        {"sliding_window": 16},
        said(sliding_window=None),
    ),
    "window dropped, qwen2": ("qwen2", "qwen2_moe", ONE_WINDOW, full_attention),
    "window dropped, cohere2": ("cohere2", "cohere2_moe", {}, full_attention),
    "head not written": (
        "llama",
        "qwen2_moe",
        {"tie_word_embeddings": True},
        scale("lm_head.weight", 0),
    ),
    "activation dropped": (
        "llama",
        "qwen2_moe",
        {"hidden_act": "gelu_pytorch_tanh"},
        without("hidden_act"),
    ),
    "residual_multiplier dropped": (
        "granite",
        "granitemoeshared",
        {},
        without("residual_multiplier"),
    ),
    "embedding_multiplier dropped": (
        "granite",
        "granitemoeshared",
        {},
        without("embedding_multiplier"),
    ),
    "attention_multiplier dropped": (
        "granite",
        "granitemoehybrid",
        {},
        without("attention_multiplier"),
    ),
    "logits_scaling dropped": (
        "granitemoehybrid",
        "granitemoehybrid",
        {},
        without("logits_scaling"),
    ),
    "attention scaled as in Granite": (
        "llama",
        "granitemoeshared",
        {},
        said(attention_multiplier=1),
    ),
    "post-FFN norm doubled": (
        "olmo2",
        "flex_olmo",
        {},
        scale("post_feedforward_layernorm.weight", 2),
    ),
    "routed_scaling_factor one": ("llama", "glm4_moe", {}, said(routed_scaling_factor=1.0)),
    "gates normalised": ("llama", "glm4_moe", {}, said(norm_topk_prob=True)),
    "gates not normalised, lfm2": ("lfm2", "lfm2_moe", {}, said(norm_topk_prob=False)),
    "down columns scaled, flex_olmo": ("olmo2", "flex_olmo", {}, scale_half),
    "whole heads rotated": (
        "phi3",
        "glm4_moe",
        rope(1000.0, partial_rotary_factor=0.5),
        rotated(1),
    ),
    "half heads rotated": ("llama", "glm4_moe", {}, rotated(0.5)),
    "whole heads rotated, smollm3": ("smollm3", "glm4_moe", {}, rotated(1)),
    "rotated halves exchanged": ("smollm3", "glm4_moe", {}, halves_exchanged),
    "shared experts added": (
        "cohere2",
        "cohere2_moe",
        {},
        said(shared_expert_combination_strategy="sum"),
    ),
    "logit_scale dropped": (
        "cohere2",
        "cohere2_moe",
        {"logit_scale": 0.25},
        without("logit_scale"),
    ),
    "another K": ("ernie4_5", "ernie4_5_moe", {}, said(moe_k=4)),
    "another K, hunyuan": ("hunyuan_v1_dense", "hunyuan_v1_moe", {}, said(moe_topk=3)),
    "another K, mixtral": ("llama", "mixtral", {}, said(num_experts_per_tok=4)),
    "queries and keys exchanged": (
        "phi3",
        "glm4_moe",
        {},
        exchange("self_attn.q_proj", "self_attn.k_proj"),
    ),
    "norms less one": ("gemma", "glm4_moe", {}, norms_less_one),
    "embeddings as stored": ("gemma", "glm4_moe", {}, scale("embed_tokens.weight", 32**-0.5)),
    "positions one on": ("opt", OWN, {}, one_row_on("embed_positions")),
    "norms before, not behind": (
        "opt",
        OWN,
        {"do_layer_norm_before": False, "_remove_final_layer_norm": True},
        inside(do_layer_norm_before=True),
    ),
    "bias of the neurons lost, opt": ("opt", OWN, {}, scale("experts.up_bias", 0)),
    "bias behind the FFN lost, opt": ("opt", OWN, {}, scale("fc2.bias", 0)),
    "bias of the neurons lost, bert": ("bert", OWN, {}, scale("experts.up_bias", 0)),
    "bias behind the FFN lost, bert": ("bert", OWN, {}, scale("layer.1.output.dense.bias", 0)),
    "positions one on, roberta": ("roberta", OWN, {}, one_row_on("position_embeddings")),
    "kinds of tokens lost": ("bert", OWN, {}, scale("token_type_embeddings.weight", 0)),
    "another activation, distilbert": ("distilbert", OWN, {}, inside(activation="relu")),
    "distances lost": ("t5", OWN, {}, scale("relative_attention_bias.weight", 0)),
    "gate below up": ("t5", OWN, GATED_T5, gate_below_up),
    "a convolution lost": ("lfm2", "lfm2_moe", {}, scale("conv.conv.weight", 0)),
}
FAULTS |= {
    f"routed down columns of another expert, {family}": (
        family,
        OWN,
        {},
        one_row_on(r"experts\.down_proj$"),
    )
    for family in ("opt", *ENCODERS, "t5")
}
FAULTS |= {
    f"routed down not rescaled, {target}": (family, target, {}, scale_routed)
    for family, target in ONE_EACH
    if target != "flex_olmo"  # whose norm behind the FFN makes up for it
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_breaks_the_identity(name, pico, converted, tmp_path):
    family, target, changes, plant = FAULTS[name]
    dense = pico(family, **changes)
    folder = planted(converted(dense, **recipe(target)), tmp_path / "planted", plant)
    assert distance(logits(silence(open_all_active(folder))), dense_logits(dense)) > FAULT


@pytest.mark.parametrize(("family", "target"), ONE_EACH)
def test_router_rows_that_are_not_scaled_down_break_the_identity(
    family, target, pico, converted, tmp_path
):
    dense = pico(family)
    moe = converted(dense, **recipe(target))
    folder = planted(moe, tmp_path / "planted", unscaled_router)
    assert distance(logits(open_all_active(folder)), dense_logits(dense)) > FAULT


@pytest.mark.parametrize(("family", "target"), HELD)
def test_where_no_choice_is_left_the_folder_is_exact_as_written(family, target, pair, converted):
    dense = pair(family, target)
    moe = converted(dense, **all_active(some_active(target)))
    assert distance(logits(opened(moe)), dense_logits(dense)) < EXACT
