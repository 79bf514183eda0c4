"""With all experts active, a converted model is the dense model, to the rounding of float32.

The judge is transformers: both folders are opened with `AutoModelForCausalLM` and give logits for
the same tokens. Two bounds, both relative to the largest dense logit:

- `EXACT` where the router's rows are set to zero, so that every gate is exactly one;
- `WRITTEN` for the folder as it was written. Its rows are scaled to a score deviation of 2^-10, so
  a gate is off by 0.1 % for most tokens and by less than 0.5 % for all.

A planted fault moves the logits by `FAULT` or more: by 0.2 to 1.4, when these were measured.
"""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import moefy.partition
from moefy import families, targets

EXACT, WRITTEN, FAULT = 1e-5, 1e-2, 0.1
NEURONS, TOKENS = 96, 64
ROUTER = "mlp.gate.weight"
PARTITIONS = sorted(
    file.stem
    for file in Path(moefy.partition.__file__).parent.glob("*.py")
    if file.stem not in ("__init__", "static")  # static routes nothing: it is no MoE
)
HELD = [(family, target) for family in families.names() for target in families.load(family).targets]
ONE_EACH = [(family, target) for target, family in {held: family for family, held in HELD}.items()]


def recipe(target: str, experts: int = 8) -> dict:
    """Recipe keys under which all experts can be active: at will, or because K = E is baked in."""
    known = targets.load(target)
    if known.has_shared and known.elastic:
        shape = {"experts_per_token": 2, "active": 1 - (experts - 2) * 8 / NEURONS}
    else:
        shape = {"experts_per_token": experts, "active": 1.0}
    # No steps: the closed-form router is made in no time, and the identity holds for every router.
    fast = {"router_options": {"steps": 0}}
    return {"target": target, "experts": experts, "refit": False, **shape, **fast}


def open_all_active(folder: Path, dtype: torch.dtype = torch.float32):
    """The model with every expert active, as any user would open it."""
    experts = json.loads((folder / "config.json").read_text())["num_experts"]
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, num_experts_per_tok=experts, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def logits(model) -> torch.Tensor:
    """For 64 tokens twice, without BOS; float32."""
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(1, model.config.vocab_size, (2, TOKENS), generator=generator)
    with torch.inference_mode():
        return model(ids_BT).logits.float()


@functools.cache
def dense_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest difference of two logits, relative to the largest of them."""
    return float((found - expected).abs().max() / expected.abs().max())


def silence(model):
    """Set the router's rows to zero: every gate is the same."""
    for name, parameter in model.named_parameters():
        if name.endswith(ROUTER):
            parameter.data.zero_()
    return model


def assert_identity(dense: Path, moe: Path) -> None:
    expected = dense_logits(dense)
    model = open_all_active(moe)
    assert distance(logits(model), expected) < WRITTEN
    assert distance(logits(silence(model)), expected) < EXACT


# --- what must hold ------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize(("family", "target"), HELD)
def test_all_experts_are_the_dense_model(family, target, partition, pico, converted):
    dense = pico(family)
    assert_identity(dense, converted(dense, partition=partition, **recipe(target)))


@pytest.mark.parametrize(("family", "target"), HELD)
def test_a_layer_left_dense(family, target, pico, converted):
    dense = pico(family)
    moe = converted(dense, layers="1:", partition="shuffle", **recipe(target))
    names = set(load_file(moe / "model.safetensors"))
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert "model.layers.1.mlp.experts.0.up_proj.weight" in names
    assert_identity(dense, moe)


@pytest.mark.parametrize(("family", "target"), HELD)
def test_a_tied_head(family, target, pico, converted):
    dense = pico(family, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(dense / "model.safetensors")
    assert_identity(dense, converted(dense, partition="shuffle", **recipe(target)))


@pytest.mark.parametrize(("family", "target"), HELD)
def test_six_experts(family, target, pico, converted):
    """1 / 6 has no exact float."""
    dense = pico(family)
    assert_identity(dense, converted(dense, partition="shuffle", **recipe(target, 6)))


VARIANTS = {
    "sliding window of all layers": ("mistral", {"sliding_window": 16}),
    "sliding window of one layer": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
    "scaled rotary frequencies": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "fast rotary frequencies": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}},
    ),
    "wide heads": ("llama", {"head_dim": 16}),
    "another activation": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_configuration_says_is_kept(name, pico, converted):
    family, changes = VARIANTS[name]
    dense = pico(family, **changes)
    target = families.load(family).targets[0]
    assert_identity(dense, converted(dense, partition="shuffle", **recipe(target)))


OLD_KEYS = {
    "rope_theta": ("llama", {"rope_theta": 100.0, "torch_dtype": "float32"}),
    "rope_scaling": (
        "llama",
        {
            "rope_theta": 1000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "a window that is not used": (
        "qwen2",
        {"rope_theta": 1e6, "use_sliding_window": False, "sliding_window": 16},
    ),
    "a window that is used": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ),
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
    target = families.load(family).targets[0]
    moe = converted(dense, partition="shuffle", **recipe(target))
    assert_identity(dense, moe)
    written = json.loads((moe / "config.json").read_text())
    assert written["rope_theta"] == keys.get("rope_theta", 10000.0)
    scaling = written["rope_scaling"] or {}
    assert keys.get("rope_scaling", {}).items() <= scaling.items()


def test_a_head_that_differs_from_the_embedding_it_is_said_to_be_tied_to(own_pico, converted):
    """Then transformers uses the stored head, and so must the result."""
    dense = own_pico("llama", tie_word_embeddings=True)
    stored = load_file(dense / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(stored, dense / "model.safetensors", metadata={"format": "pt"})
    assert_identity(dense, converted(dense, partition="shuffle", **recipe("qwen2_moe")))


# --- bfloat16 ------------------------------------------------------------------------------------


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
    moe = converted(dense, partition="shuffle", **recipe(target, 4))
    stored = load_file(moe / "model.safetensors").values()
    assert {tensor.dtype for tensor in stored} == {torch.bfloat16}
    assert_identity(dense, moe)


@pytest.mark.parametrize(("family", "target"), ONE_EACH)
def test_six_experts_in_bfloat16(family, target, own_pico, converted):
    """Rounding 1 / 6 and the weights divided by it moves an FFN's output by less than 2^-8 of it.

    What that does to the logits is measured on the dense model, whose `down_proj` is scaled so.
    """
    dense = in_bfloat16(own_pico(family))
    moe = converted(dense, partition="shuffle", **recipe(target, 6))
    expected = dense_logits(dense)
    scaled = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    for layer in scaled.model.layers:
        layer.mlp.down_proj.weight.data *= 1 + 2.0**-8
    bound = distance(logits(scaled), expected)
    assert EXACT < distance(logits(silence(open_all_active(moe))), expected) < bound < WRITTEN


@pytest.mark.parametrize("experts", [4, 6])
@pytest.mark.parametrize(("family", "target"), ONE_EACH)
def test_computed_in_bfloat16(family, target, experts, own_pico, converted):
    """The result is off by no more than twice what bfloat16 costs the dense model itself."""
    dense = in_bfloat16(own_pico(family))
    moe = converted(dense, partition="shuffle", **recipe(target, experts))
    expected = dense_logits(dense)
    bound = 2 * distance(dense_logits(dense, torch.bfloat16), expected)
    assert distance(logits(open_all_active(moe, torch.bfloat16)), expected) < bound < 0.1


# --- some experts active -------------------------------------------------------------------------


def some_active(target: str) -> dict:
    """Recipe keys under which a token goes to two of its experts."""
    if targets.load(target).has_shared:
        return recipe(target)
    return recipe(target, 4) | {"experts_per_token": 2, "active": 0.5}


def owners(dense_FD: torch.Tensor, tensors: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    """The expert in which each dense neuron stands, by its gate row; shared ones are -1."""
    place = {row.numpy().tobytes(): neuron for neuron, row in enumerate(dense_FD)}
    assert len(place) == len(dense_FD)
    owner_F = torch.full((len(dense_FD),), -1)
    for expert in range(len(tensors[f"{prefix}gate.weight"])):
        for row in tensors[f"{prefix}experts.{expert}.gate_proj.weight"]:
            owner_F[place[row.numpy().tobytes()]] = expert
    return owner_F


def masked(dense: Path, moe: Path):
    """The dense model with the neurons of the experts that a token does not go to held at zero."""
    tensors = load_file(moe / "model.safetensors")
    config = json.loads((moe / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}.mlp."
        owner_F = owners(layer.mlp.gate_proj.weight.data, tensors, prefix)

        def forward(x_BTD, mlp=layer.mlp, owner_F=owner_F, rows_ED=tensors[prefix + "gate.weight"]):
            share_BTE = (x_BTD @ rows_ED.T).softmax(-1)
            share_BTK, chosen_BTK = share_BTE.topk(config["num_experts_per_tok"])
            total = share_BTK.sum(-1, keepdim=True) if config["norm_topk_prob"] else 1.0
            count = share_BTK.shape[-1] if config["norm_topk_prob"] else len(rows_ED)
            # One but for the size of the router's rows, which the next layer must see as well.
            gate_BTK = share_BTK / total * count
            assert (gate_BTK - 1).abs().max() < 0.005
            runs = torch.zeros(*x_BTD.shape[:2], len(rows_ED) + 1).scatter(-1, chosen_BTK, gate_BTK)
            runs[..., -1] = 1  # the shared ones: owner -1
            h_BTF = mlp.act_fn(mlp.gate_proj(x_BTD)) * mlp.up_proj(x_BTD)
            return mlp.down_proj(h_BTF * runs[..., owner_F])

        layer.mlp.forward = forward
    return model


@pytest.mark.parametrize(("family", "target"), HELD)
def test_the_chosen_experts_are_dense_neurons(family, target, pico, converted, tmp_path):
    """At fewer experts than all, a chosen one counts fully and the others not at all."""
    dense = pico(family)
    moe = converted(dense, partition="shuffle", **some_active(target))
    expected = logits(masked(dense, moe))
    assert distance(logits(AutoModelForCausalLM.from_pretrained(moe).eval()), expected) < EXACT
    assert distance(dense_logits(dense), expected) > FAULT
    folder = planted(moe, tmp_path / "planted", scale_routed)
    assert distance(logits(AutoModelForCausalLM.from_pretrained(folder).eval()), expected) > FAULT


# --- generation ----------------------------------------------------------------------------------

GENERATES = {family: (family, {}) for family in families.names()} | {
    name: VARIANTS[name] for name in list(VARIANTS)[:3]
}


@pytest.mark.parametrize("name", GENERATES)
def test_generation_with_a_cache_is_generation_without(name, pico, converted):
    family, changes = GENERATES[name]
    shape = some_active(families.load(family).targets[0])
    moe = converted(pico(family, **changes), partition="shuffle", **shape)
    model = AutoModelForCausalLM.from_pretrained(moe).eval()
    ids_BT = torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(2))
    with_cache, without = (
        model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            min_new_tokens=16,
            max_new_tokens=16,
            pad_token_id=0,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    )
    assert with_cache.shape == (2, 40)
    assert torch.equal(with_cache, without)
    assert len(with_cache[:, 24:].unique()) > 4  # it does not write one token over and over


# --- planted faults ------------------------------------------------------------------------------

Plant = Callable[[dict[str, torch.Tensor], dict], object]


def scale(ending: str, factor: float) -> Plant:
    def plant(tensors: dict[str, torch.Tensor], config: dict) -> None:
        names = [name for name in tensors if name.endswith(ending)]
        assert names
        tensors.update({name: tensors[name] * factor for name in names})

    return plant


def unscaled_router(tensors: dict[str, torch.Tensor], config: dict) -> None:
    """Router rows as large as the scores were fitted, or as any trained router has them."""
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(ROUTER)]:
        tensors[name] = torch.randn(tensors[name].shape, generator=generator)


def scale_routed(tensors: dict[str, torch.Tensor], config: dict) -> None:
    for expert in range(config["num_experts"]):
        scale(f"experts.{expert}.down_proj.weight", 1 / config["num_experts"])(tensors, config)


def exchange(first: str, second: str) -> Plant:
    """Exchange the tensors with two endings."""

    def plant(tensors: dict[str, torch.Tensor], config: dict) -> None:
        for layer in range(2):
            one, other = (f"model.layers.{layer}.mlp.{ending}.weight" for ending in (first, second))
            tensors[one], tensors[other] = tensors[other], tensors[one]

    return plant


def without(*keys: str) -> Plant:
    return lambda tensors, config: [config.pop(key) for key in keys]


def full_attention(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["layer_types"] = ["full_attention"] * len(config["layer_types"])


def frequencies_as_they_were(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    config["rope_scaling"] = None


FAULTS: dict[str, tuple[str, dict, Plant]] = {
    "shared down_proj not doubled": ("llama", {}, scale("shared_expert.down_proj.weight", 1 / 2)),
    "routed down_proj not times E": ("llama", {}, scale_routed),
    "routed down_proj not times K": ("qwen3", {}, scale_routed),
    "down columns of two experts swapped": (
        "llama",
        {},
        exchange("experts.0.down_proj", "experts.1.down_proj"),
    ),
    "down columns of two experts swapped, qwen3": (
        "qwen3",
        {},
        exchange("experts.0.down_proj", "experts.1.down_proj"),
    ),
    "gate and up of one expert exchanged": (
        "llama",
        {},
        exchange("experts.2.gate_proj", "experts.2.up_proj"),
    ),
    "gate and up of the shared expert exchanged": (
        "llama",
        {},
        exchange("shared_expert.gate_proj", "shared_expert.up_proj"),
    ),
    "shared gate not near zero": ("llama", {}, scale("shared_expert_gate.weight", 1e6)),
    "q bias zeroed": ("qwen2", {}, scale("q_proj.bias", 0)),
    "k bias zeroed": ("qwen2", {}, scale("k_proj.bias", 0)),
    "v bias zeroed": ("qwen2", {}, scale("v_proj.bias", 0)),
    "query norm lost": ("qwen3", {}, scale("q_norm.weight", 2)),
    "rope_theta dropped": (
        *VARIANTS["fast rotary frequencies"],
        without("rope_theta", "rope_parameters"),
    ),
    "rope scaling dropped": (*VARIANTS["scaled rotary frequencies"], frequencies_as_they_were),
    "window dropped, mistral": (*VARIANTS["sliding window of all layers"], full_attention),
    "window dropped, qwen2": (*VARIANTS["sliding window of one layer"], full_attention),
    "head not written": ("llama", {"tie_word_embeddings": True}, scale("lm_head.weight", 0)),
    "activation dropped": (*VARIANTS["another activation"], without("hidden_act")),
}


def planted(moe: Path, place: Path, plant: Plant) -> Path:
    """A copy of a written folder with a fault in its weights or configuration."""
    folder = Path(shutil.copytree(moe, place))
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    plant(tensors, config)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_breaks_the_identity(name, pico, converted, tmp_path):
    family, changes, plant = FAULTS[name]
    dense = pico(family, **changes)
    target = families.load(family).targets[0]
    moe = converted(dense, partition="shuffle", **recipe(target))
    folder = planted(moe, tmp_path / "planted", plant)
    assert distance(logits(silence(open_all_active(folder))), dense_logits(dense)) > FAULT


@pytest.mark.parametrize(("family", "target"), HELD)
def test_router_rows_that_are_not_scaled_down_break_the_identity(
    family, target, pico, converted, tmp_path
):
    dense = pico(family)
    moe = converted(dense, partition="shuffle", **recipe(target))
    folder = planted(moe, tmp_path / "planted", unscaled_router)
    assert distance(logits(open_all_active(folder)), dense_logits(dense)) > FAULT


@pytest.mark.parametrize(("family", "target"), HELD)
def test_where_no_choice_is_left_the_folder_is_exact_as_written(family, target, pico, converted):
    dense = pico(family)
    shared = {"shared": 1 / 3} if targets.load(target).has_shared else {}
    given = {"experts": 4, "experts_per_token": 4, "active": 1.0, "refit": False, **shared}
    moe = converted(dense, target=target, **given)
    found = logits(AutoModelForCausalLM.from_pretrained(moe).eval())
    assert distance(found, dense_logits(dense)) < EXACT
