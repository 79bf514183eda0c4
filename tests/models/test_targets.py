"""Which class is chosen and why, what is said of engines, and that classes are whole.

The judge of a class is transformers: it must save what it has loaded, generate with a cache as
without one, and compute the same in each of its ways to run experts.
"""

import pytest
import torch
from stock import (
    GENERATIVE,
    HELD,
    LLAMA3,
    ONE_EACH,
    ONE_WINDOW,
    OWN,
    OWNED,
    UNHELD,
    UNLIKE,
    distance,
    generated,
    logits,
    longrope,
    opened,
    rope,
    some_active,
)
from transformers import AutoModelForCausalLM

from moefy.checkpoint.validate import open_checkpoint
from moefy.config.recipe import build
from moefy.convert.prepare import describe, prepare, serving_notes
from moefy.errors import MoefyError
from moefy.models import families, targets
from moefy.models.engines import ENGINES, known_engines
from moefy.types import Shape


@pytest.fixture
def planned(pico, text):
    """`planned(family, changes, **recipe)`: a prepared conversion."""

    def plan(family: str, changes: dict | None = None, **recipe: object):
        values = {"model": str(pico(family, **(changes or {}))), "calibration": str(text)}
        return prepare(build(None, values | recipe, []))

    return plan


@pytest.fixture
def refused(planned):
    """`refused(code, family, changes, **recipe)`: the line that refuses a conversion."""

    def refuse(code: int, *model: object, **recipe: object) -> str:
        with pytest.raises(MoefyError) as caught:
            planned(*model, **recipe)
        assert caught.value.code == code
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


# --- which class ---------------------------------------------------------------------------------

OPTIONS = [engine.name.lower() for engine in ENGINES]
BIASED = {"attention_bias": True}
HALF = rope(1000.0, partial_rotary_factor=0.5)
CHOICES = [
    # family, changes, recipe, the class, and what is said against those before it
    ("llama", {}, {}, "qwen2_moe", ""),
    ("llama", {"rope_parameters": LLAMA3}, {}, "qwen2_moe", ""),
    (
        "llama",
        {"rope_parameters": LLAMA3},
        {"engines": "llama.cpp"},
        "mixtral",
        "not qwen2_moe: llama.cpp ignores or refuses rope_type llama3",
    ),
    (
        "llama",
        {"rope_parameters": LLAMA3},
        {"engines": "llama.cpp, vllm ,sglang"},
        "mixtral",
        "not qwen2_moe: llama.cpp ignores",
    ),
    ("llama", {}, {"engines": "ollama"}, "mixtral", "not qwen2_moe: not in Ollama"),
    ("llama", {"head_dim": 16}, {"engines": "vllm"}, "glm4_moe", "vLLM assumes head_dim 8, not"),
    ("llama", {"head_dim": 16}, {"engines": "mlx"}, "qwen2_moe", ""),
    ("llama", BIASED, {}, "granitemoeshared", "not qwen2_moe: it has no bias on o"),
    ("llama", {}, {"layers": "1:"}, "qwen2_moe", ""),
    ("llama", {}, {"layers": "1:", "engines": "vllm"}, "qwen2_moe", ""),
    (
        "llama",
        {},
        {"layers": "1:", "engines": "llama.cpp, sglang"},
        "glm4_moe",
        "not qwen2_moe: llama.cpp cannot load dense layers, and 1 stay dense; SGLang cannot",
    ),
    ("qwen2", {}, {"layers": "1:", "engines": "llama.cpp"}, "glm4_moe", "not granitemoeshared: it"),
    ("mistral", {"sliding_window": 16}, {}, "qwen2_moe", ""),
    ("mistral", {"sliding_window": 16}, {"engines": "vllm,sglang"}, "qwen2_moe", ""),
    ("ministral", {}, {}, "qwen2_moe", ""),
    ("qwen2", {}, {}, "qwen2_moe", ""),
    ("qwen3", {}, {}, "qwen3_moe", ""),
    ("qwen3", ONE_WINDOW | {"max_window_layers": 0}, {}, "qwen3_moe", ""),
    ("phi3", {}, {}, "glm4_moe", ""),
    ("phi3", HALF, {}, "glm4_moe", ""),
    ("phi3", {"sliding_window": 16}, {}, "mixtral", "not glm4_moe: its sliding window"),
    ("phi3", {}, {"engines": "llama.cpp"}, "glm4_moe", ""),
    ("granite", {}, {}, "granitemoeshared", ""),
    ("granite", {}, {"engines": "mlx"}, "granitemoehybrid", "not granitemoeshared: not in MLX"),
    ("olmo2", {}, {"engines": "transformers"}, "flex_olmo", ""),
]


@pytest.mark.parametrize(
    ("family", "changes", "recipe", "target", "against"),
    CHOICES,
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else None,
)
def test_the_first_class_that_will_do_is_chosen(family, changes, recipe, target, against, planned):
    job = planned(family, changes, **recipe)
    assert job.target.model_type == target
    assert job.reason.startswith(f"the first choice for {family}")
    assert against in job.reason
    assert ("; not " in job.reason) == bool(against)
    before = families.load(family).targets
    assert all(name in job.reason for name in before[: before.index(target)])


@pytest.mark.parametrize(("family", "target"), HELD)
def test_a_class_that_is_asked_for_is_taken(family, target, planned):
    job = planned(family, UNLIKE.get((family, target)), target=target)
    assert (job.target.model_type, job.reason) == (target, "asked for")


@pytest.mark.parametrize("family", families.names())
def test_its_own_class_is_taken_only_when_asked_for(family, planned, refused):
    job = planned(family, target=OWN)
    assert (job.target.model_type, job.reason) == (OWN, "asked for")
    assert "vLLM" in refused(4, family, target=OWN, engines="vllm")
    if family in UNHELD:
        reason = families.load(family).missing_feature
        says = [family, reason, f"--target {OWN}"]
        for recipe in ({}, {"engines": "transformers"}):
            message = refused(4, family, **recipe)
            assert reason and [part for part in says if part not in message] == [], message
    else:
        assert planned(family).target.model_type != OWN


@pytest.mark.parametrize(
    ("code", "family", "changes", "recipe", "says"),
    [
        (4, "olmo2", {}, {"engines": "sglang"}, ["flex_olmo: not in SGLang"]),
        (
            4,
            "llama",
            {},
            {"layers": ":1", "engines": "llama.cpp"},
            [
                "qwen2_moe: llama.cpp cannot load dense layers",
                "glm4_moe: it can leave only its first layers dense",
                "mixtral: it can leave no layer",
                "granitemoeshared: it can leave no layer",
            ],
        ),
        (
            4,
            "qwen2",
            ONE_WINDOW,
            {"engines": "mlx"},
            [
                "qwen2_moe: MLX ignores the sliding window: wrong past 16 tokens",
                "granitemoeshared: its sliding window is on no layer",
                "glm4_moe: its sliding window is on no layer",
            ],
        ),
        (
            4,
            "llama",
            {"hidden_act": "gelu"},
            {"engines": "vllm"},
            [f"{t}: vLLM runs silu only, not gelu" for t in families.load("llama").targets],
        ),
        (4, "llama", {}, {"target": "qwen3_moe"}, ["qwen3_moe cannot hold llama", "qwen2_moe"]),
        (4, "llama", {}, {"target": "qwen2_moe", "engines": "ollama"}, ["not in Ollama"]),
        (4, "llama", BIASED, {"target": "mixtral"}, ["mixtral: it has no bias on k, o, q, v"]),
        (2, "llama", {}, {"target": "mixtrall"}, ["'mixtrall'", "did you mean mixtral?"]),
        (2, "llama", {}, {"engines": "vlm"}, ["'vlm'", "did you mean vllm?", *OPTIONS]),
        (2, "llama", {}, {"engines": "vllm,lama.cpp"}, ["did you mean llama.cpp?"]),
    ],
)
def test_what_no_class_does_is_refused_with_every_reason(
    code, family, changes, recipe, says, refused
):
    message = refused(code, family, changes, **recipe)
    assert [part for part in says if part not in message] == [], message


def test_every_engine_has_a_class_and_every_class_a_known_engine():
    named = {name for _, target in HELD for name in known_engines(target)}
    assert named == {engine.name for engine in ENGINES}


# --- what is said of engines ---------------------------------------------------------------------

SHAPE = Shape(2048, 1024, 8, 128, 4)
ONE_SHARED = Shape(2048, 128, 15, 128, 4)
UNSHARED = Shape(2048, 0, 16, 128, 4)
NOTES = [
    # family, changes, converted layers, target, shape, the notes by what each contains
    ("llama", {}, 2, "qwen2_moe", SHAPE, []),
    ("llama", {}, 2, "mixtral", UNSHARED, []),
    ("llama", {}, 2, "granitemoeshared", SHAPE, []),
    ("llama", {}, 2, "glm4_moe", ONE_SHARED, [("15 experts", "no power of two")]),
    ("llama", {}, 2, "glm4_moe", SHAPE, [("SGLang", "fusion for 8 shared experts")]),
    ("qwen3", {}, 2, "qwen3_moe", UNSHARED, []),
    ("llama", {"head_dim": 16}, 2, "qwen2_moe", SHAPE, [("vLLM, llama.cpp", "head_dim 8, not 16")]),
    ("llama", {"head_dim": 16}, 2, "mixtral", UNSHARED, [("MLX", "head_dim 8, not 16")]),
    (
        "llama",
        {"rope_parameters": LLAMA3},
        2,
        "qwen2_moe",
        SHAPE,
        [("llama.cpp, MLX", "rope_type llama3")],
    ),
    ("llama", {"rope_parameters": LLAMA3}, 2, "mixtral", UNSHARED, [("MLX", "rope_type llama3")]),
    (
        "llama",
        {"rope_parameters": LLAMA3},
        2,
        "granitemoeshared",
        SHAPE,
        [("llama.cpp", "rope_type llama3")],
    ),
    (
        "phi3",
        longrope(32),
        2,
        "qwen2_moe",
        SHAPE,
        [("llama.cpp, MLX", "rope_type longrope"), ("text that grows", "past 32 tokens")],
    ),
    ("mistral", {"sliding_window": 16}, 2, "mixtral", UNSHARED, [("llama.cpp, MLX", "past 16")]),
    ("mistral", {"sliding_window": 16}, 2, "qwen2_moe", SHAPE, [("llama.cpp, MLX", "past 16")]),
    ("qwen2", ONE_WINDOW | {"use_sliding_window": False}, 2, "qwen2_moe", SHAPE, []),
    ("llama", {}, 1, "qwen2_moe", SHAPE, [("SGLang", "cannot load dense layers, and 1 stay")]),
    ("qwen3", {}, 1, "qwen3_moe", UNSHARED, [("llama.cpp:", "cannot load dense layers")]),
    ("llama", {}, 2, "mixtral", Shape(131072, 0, 1024, 128, 4), [("llama.cpp", "most 512")]),
    ("llama", {}, 2, "qwen2_moe", Shape(2048, 1280, 8, 96, 4), [("vLLM, SGLang", "width 96")]),
    (
        "llama",
        {"hidden_act": "gelu"},
        2,
        "qwen2_moe",
        SHAPE,
        [("vLLM, SGLang, llama.cpp, MLX", "silu only, not gelu")],
    ),
    (
        "llama",
        {"hidden_act": "relu", "head_dim": 16},
        1,
        "qwen2_moe",
        SHAPE,
        [
            ("vLLM, SGLang, llama.cpp, MLX", "silu only, not relu"),
            ("vLLM, llama.cpp", "head_dim 8, not 16"),
            ("SGLang, llama.cpp, MLX", "cannot load dense layers"),
        ],
    ),
]


@pytest.mark.parametrize(("family", "changes", "converted", "target", "shape", "says"), NOTES)
def test_notes_on_engines(family, changes, converted, target, shape, says, pico):
    known = families.load(family)
    dense = describe(open_checkpoint(pico(family, **changes)), known, [0, 1][-converted:])
    notes = serving_notes(targets.load(target), dense, shape)
    assert len(notes) == len(says), notes
    for parts, note in zip(says, notes, strict=True):
        assert [part for part in parts if part not in note] == [], note


def test_notes_are_kept_with_the_job(planned):
    """And in order, behind those on the checkpoint."""
    job = planned("llama", {"rope_parameters": LLAMA3})
    rope_note, width_note = job.notes
    assert "llama3" in rope_note and "width" in width_note


# --- a class is whole ----------------------------------------------------------------------------


@pytest.fixture
def a_run(pico, converted):
    """`a_run(family, target, **changes)`: the folder of a conversion with two experts active."""

    def convert(family: str, target: str, **changes: object):
        dense = pico(family, **(changes or UNLIKE.get((family, target), {})))
        return converted(dense, **some_active(target))

    return convert


SAVED = [(*pair, {}) for pair in [*HELD, *OWNED]]
SAVED += [("bert", OWN, {"task": "Model"}), ("bert", OWN, {"tie_word_embeddings": True})]


@pytest.mark.parametrize(("family", "target", "changes"), SAVED)
def test_what_transformers_saves_again_is_the_same_model(family, target, changes, a_run, tmp_path):
    model = opened(a_run(family, target, **changes))
    model.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    assert type(again) is type(model)
    assert again.config.architectures == [type(model).__name__]
    assert torch.equal(logits(again), logits(model))


WRITE = [pair for pair in OWNED if {*families.load(pair[0]).tasks} & {*GENERATIVE}]
GENERATES = [(family, target, {}) for family, target in [*HELD, *WRITE]] + [
    ("t5", OWN, {"feed_forward_proj": "gated-gelu"}),
    ("mistral", "qwen2_moe", {"sliding_window": 16}),
    ("mistral", "mixtral", {"sliding_window": 16}),
    ("qwen2", "qwen2_moe", ONE_WINDOW),
    ("llama", "mixtral", {"rope_parameters": LLAMA3}),
    ("phi3", "glm4_moe", HALF),
    # Not across the length where factors change: only Phi 3's own class computes its keys anew.
    ("phi3", "mixtral", longrope(64)),
    ("phi3", "mixtral", longrope(16)),
]


@pytest.mark.parametrize(("family", "target", "changes"), GENERATES)
def test_generation_with_a_cache_is_generation_without(family, target, changes, a_run):
    model = opened(a_run(family, target, **changes))
    with_cache, without = (generated(model, use_cache) for use_cache in (True, False))
    assert with_cache.shape == (2, 1 + 12 if model.config.is_encoder_decoder else 24 + 12)
    assert torch.equal(with_cache, without)
    # It does not write one token over and over.
    assert len(with_cache[:, -12:].unique()) > (1 if target == OWN else 3)


@pytest.mark.parametrize(("family", "target"), ONE_EACH)
def test_experts_run_alike_in_every_implementation(family, target, a_run):
    run = a_run(family, target)
    ways = ("eager", "batched_mm", "grouped_mm")
    models = [
        AutoModelForCausalLM.from_pretrained(run, experts_implementation=way).eval() for way in ways
    ]
    # transformers keeps the choice in the configuration; unknown ones would be refused.
    assert [model.config._experts_implementation for model in models] == list(ways)
    expected, *others = map(logits, models)
    assert all(distance(found, expected) < 1e-5 for found in others)


@pytest.mark.parametrize(
    "family", ["distilbert", "gpt_neox", "mt5", "opt", "phi", "starcoder2", "t5"]
)
def test_a_key_that_a_family_does_not_read_refuses_nothing(family):
    assert families.load(family).why_refused({"mlp_bias": True}) is None
    reason = families.load("llama").why_refused({"mlp_bias": True})
    assert reason and "mlp_bias" in reason  # the negative control
