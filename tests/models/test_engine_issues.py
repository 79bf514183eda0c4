"""What engines get wrong with a stored model, by its configuration.

The real llama.cpp is in tests/runs/test_engines.py, the real vLLM in test_vllm.py.
"""

import dataclasses

import pytest

from moefy.inspect.moe import Experts, as_stored
from moefy.models import targets
from moefy.models.engines import ENGINES, LLAMA_CPP, VLLM, Engine, by_reason
from moefy.types import Shape

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
WINDOW = {"sliding_window": 64, "max_position_embeddings": 128, "use_sliding_window": True}
CONFIG = {
    "model_type": "qwen2_moe",
    "hidden_act": "silu",
    "norm_topk_prob": False,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
THIRD = {"model_type": "qwen3_moe", "norm_topk_prob": True}
LFM2 = {"model_type": "lfm2_moe", "norm_topk_prob": True, "tie": True}
ERNIE = {
    "model_type": "ernie4_5_moe",
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "moe_k": 2,
}
MIXTRAL = {"model_type": "mixtral", "norm_topk_prob": None}


def rope(**parameters: object) -> dict:
    return {"rope_parameters": {"rope_theta": 10000.0, **parameters}}


def issues(config: dict) -> list[str]:
    """What llama.cpp gets wrong with a stored model with two shared experts of 24 neurons."""
    config = CONFIG | config
    dense_layers = tuple(config.pop("dense_layers", ()))
    layers = tuple(n for n in range(4) if n not in dense_layers) * config.pop("experts", True)
    head = {} if config.pop("tie", False) else {"lm_head.weight": None}
    shape = Shape(240, 48, 8, 24, 2)
    experts = Experts(layers, 0, shape, 8, 2, dense_layers)
    dense = as_stored(config, head, experts)  # pyright: ignore
    return LLAMA_CPP.issues(config["model_type"], dense, shape, stored=True)


WRONG = {
    "activation": ({"hidden_act": "gelu"}, "silu"),
    "normed gates": ({"norm_topk_prob": True}, "norm_topk_prob"),
    "gates not normed": (THIRD | {"norm_topk_prob": False}, "norm_topk_prob"),
    "gates by default": (THIRD | {"norm_topk_prob": None}, "norm_topk_prob"),
    "llama3": (rope(rope_type="llama3", factor=8.0), "rope_type llama3"),
    "llama3 in old keys": ({"rope_parameters": None, "rope_scaling": {"type": "llama3"}}, "llama3"),
    "longrope": (MIXTRAL | rope(rope_type="longrope"), "longrope"),
    "dynamic": (rope(rope_type="dynamic", factor=2.0), "dynamic"),
    "yarn of its own": (rope(**YARN, attention_factor=1.0), "attention_factor"),
    "yarn not cut": (rope(**YARN, truncate=False), "truncate"),
    "window in some layers": (
        WINDOW | {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "wrong past 64",
    ),
    "window of old": (MIXTRAL | WINDOW, "sliding window"),
    "dense layers": ({"dense_layers": [0, 3]}, "2 stay dense"),
    "wide heads": ({"head_dim": 32}, "head_dim 16, not 32"),
    "embedding as head": ({"tie": True}, "lm_head.weight"),
    "gates of lfm2": (LFM2 | {"norm_topk_prob": False}, "norm_topk_prob"),
    "gates scaled": (LFM2 | {"routed_scaling_factor": 2.0}, "routed_scaling_factor"),
    "head of lfm2": (LFM2 | {"tie": False}, "embedding as its head"),
    "ernie, shared": (ERNIE | {"intermediate_size": 192}, "(96) wide, not 48"),
    "ernie, the last layer dense": (ERNIE | {"dense_layers": [3]}, "only at the start"),
    "llama3 in glm4_moe": ({"model_type": "glm4_moe"} | rope(rope_type="llama3"), "llama3"),
    "hunyuan": ({"model_type": "hunyuan_v1_moe"}, "code of its own"),
    "dense": ({"model_type": "qwen2", "experts": False, "hidden_act": "gelu"}, "silu"),
}
RIGHT = {
    "as written": {},
    "linear": rope(rope_type="linear", factor=4.0),
    "yarn": rope(**YARN, beta_fast=16.0, attention_factor=None),
    "llama3 in mixtral": MIXTRAL | rope(rope_type="llama3", factor=8.0),
    "window not used": WINDOW | {"use_sliding_window": False},
    "window in no layer": WINDOW | {"layer_types": ["full_attention"] * 4},
    "window as long as the context": MIXTRAL | WINDOW | {"sliding_window": 128},
    "wide heads": THIRD | {"head_dim": 32},
    "ernie": ERNIE,
    "ernie, the first layer dense": ERNIE | {"dense_layers": [0]},
    "lfm2": LFM2 | {"routed_scaling_factor": 1.0},
    "dense": {"model_type": "llama", "experts": False},
    "glm4_moe, the first layers dense": {"model_type": "glm4_moe", "dense_layers": [0, 1]},
    "glm4_moe": {"model_type": "glm4_moe", "tie": True, "head_dim": 32} | rope(**YARN),
    "unknown to it": {"model_type": "flex_olmo", "hidden_act": "gelu"},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_llama_cpp_computes_otherwise(name):
    config, says = WRONG[name]
    (issue,) = issues(config)
    assert says in issue


@pytest.mark.parametrize("name", RIGHT)
def test_what_llama_cpp_computes_alike(name):
    assert issues(RIGHT[name]) == []


def test_every_issue_is_given():
    assert len(issues({"hidden_act": "gelu", "head_dim": 32, "dense_layers": [1]})) == 3


@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
def test_the_classes_of_an_engine_are_known(engine: Engine):
    known = {*targets.names()}
    assert {*engine.classes} <= known
    assert {*engine.stored} <= {*engine.classes} or engine.name == "Ollama"
    assert not {*engine.classes} & {*engine.unpromised}


def test_a_new_engine_is_one_value():
    """It is asked like the others, and reasons that engines share are said once."""
    other = dataclasses.replace(VLLM, name="another")
    reasons = {engine.name: ["is slow"] for engine in (VLLM, other)}
    assert by_reason(reasons) == {"is slow": "vLLM, another"}
