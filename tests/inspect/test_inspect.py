"""What `moefy inspect` and `moefy families` tell, judged by transformers and by the conversion."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pico import FAMILY, PICO
from safetensors.torch import load_file, save_file
from stock import auto_class

from moefy import cli
from moefy.checkpoint.validate import open_checkpoint
from moefy.config.recipe import build
from moefy.convert import prepare
from moefy.errors import MoefyError
from moefy.files import safetensors_header
from moefy.files.shards import DTYPES
from moefy.inspect import describe, terminal
from moefy.inspect.catalogue import catalogue
from moefy.inspect.config_defaults import as_dense
from moefy.inspect.moe import PER_TOKEN
from moefy.models import families, targets
from moefy.models.engines import ENGINES, engine_issues
from moefy.types import Shape

ESCAPE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
ODD = (
    "architectures dense full_attn_idxs head_dim layer_types no_rope_layers quantization "
    "rope_parameters rope_scaling sliding_window text_config use_sliding_window"
).split()
"""Keys that are read, and not in every configuration."""

BIAS = re.compile(r"\.(e_score_correction_bias|expert_bias)$")
STOCK = [name for name in families.names() if name in FAMILY]
LLAMA3 = {
    "rope_theta": 10000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def moefy(monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """`moefy(*arguments)`: exit code, output and errors of the command, run in this process."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moefy", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, captured.out, captured.err

    before = signal.getsignal(signal.SIGTERM)
    yield run
    signal.signal(signal.SIGTERM, before)


def change(folder: Path, **keys: object) -> Path:
    """Change keys of config.json; `...` removes a key."""
    file = folder / "config.json"
    value = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: item for key, item in value.items() if item is not ...}))
    return folder


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    """What transformers loads, every tensor once."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in auto_class(folder).from_pretrained(folder).state_dict().items():
        found.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(found.values())


# --- dense models --------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", STOCK)
def test_the_facts_of_a_dense_model(model_type, pico):
    folder = pico(model_type)
    found = describe(str(folder))
    assert (found["kind"], found["model_type"], found["problems"]) == ("dense", model_type, [])
    tensors = loaded(folder)
    total = sum(tensor.numel() for tensor in tensors.values())
    assert found["parameters"] == found["parameters_active"] == total
    family = families.load(model_type)
    first = family.layer.format(layer=0)
    parts = tuple(f"{first}{part}." for part in (family.block, *family.emptied))
    ffn = sum(t.numel() for name, t in tensors.items() if name.startswith(parts))
    assert found["parameters_ffn"] == ffn * 2 * (2 if family.beside else 1)  # layers, and decoder's
    assert found["sizes"]["ffn"] == PICO["intermediate_size"]
    known = FAMILY.get(model_type, {})
    heads = known.get("head_dim", known.get("d_kv", 8))
    assert found["sizes"]["head_dim"] == heads
    assert found["sizes"]["layers"] == PICO["num_hidden_layers"]
    assert found["dtypes"] == {"F32": len(tensors)}
    assert found["disk_bytes"] == (folder / "model.safetensors").stat().st_size
    assert found["shards"] == 1


CONFIGS = {
    "as saved": {},
    "linear as it was": {
        "rope_parameters": ...,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "llama3": {"rope_parameters": LLAMA3},
    "windows by the class": {"layer_types": ..., "sliding_window": ..., "use_sliding_window": ...},
    "windows on": {
        "layer_types": ...,
        "sliding_window": 16,
        "use_sliding_window": True,
        "max_window_layers": 1,
    },
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("model_type", STOCK)
def test_a_configuration_is_filled_in_as_transformers_does(model_type, kind, own_pico):
    """As far as a target asks."""
    family = families.load(model_type)
    try:
        checkpoint = open_checkpoint(change(own_pico(model_type), **CONFIGS[kind]))
        expected = prepare.describe(checkpoint, family, [0, 1])
    except Exception as error:
        pytest.skip(f"no such {model_type}: {error}")
    found = as_dense(family, checkpoint.config, checkpoint.entries)
    assert (found.tied, found.biases) == (expected.tied, expected.biases)
    if not family.targets:
        return
    for name in family.targets:
        target, shape = targets.load(name, family), Shape(96, 24, 3, 24, 1)
        assert target.why_unsupported(found) == target.why_unsupported(expected)
        assert engine_issues(name, found, shape) == engine_issues(name, expected, shape)
    assert found.head_dim == expected.head_dim
    assert found.rotary_share == expected.rotary_share
    assert found.windowed == expected.windowed


def test_targets_and_shapes_are_those_of_the_conversion(pico):
    for model_type in ("llama", "qwen3"):
        told = describe(str(pico(model_type)))["targets"]
        assert [*told] == [*families.load(model_type).targets, targets.OWN]
        for name, target in told.items():
            assert target["holds"] and not target["reason"]
            for active, shape in target["shapes"].items():
                flags = {"model": str(pico(model_type)), "target": name, "active": float(active)}
                try:
                    expected = prepare.prepare(build(None, flags, [])).shape
                except MoefyError:
                    assert shape is None
                    continue
                assert shape.pop("active") == expected.active_fraction
                assert Shape(**shape) == expected


@pytest.mark.parametrize("rope", [{}, {"rope_parameters": LLAMA3}])
def test_the_target_for_an_engine_is_that_of_the_conversion(rope, own_pico):
    folder = change(own_pico("llama"), **rope)
    told = describe(str(folder))["engines"]
    assert [*told] == [engine.name for engine in ENGINES]
    for engine in ENGINES:
        flags = {"model": str(folder), "engines": engine.name.lower()}
        made = prepare.prepare(build(None, flags, []))
        assert told[engine.name][0] == made.target.model_type
    assert told["llama.cpp"][0] == ("mixtral" if rope else "qwen2_moe")


def test_aligned_widths(pico):
    told = describe(str(pico("llama")))["targets"]
    assert told["qwen2_moe"]["widths"] == {"128": {}, "32": {"2": 32}}
    assert told["mixtral"]["widths"] == {"128": {}, "32": {"3": 32}}
    assert told["glm4_moe"]["widths"] == {"128": {}, "32": {"2": 32}}


def test_a_family_that_no_stock_class_holds(pico, moefy):
    told = describe(str(pico("gpt2")))
    assert told["convertible"] and told["missing_feature"]
    assert [*told["targets"]] == [targets.OWN]
    assert not any(told["engines"].values())
    code, out, _ = moefy("inspect", pico("gpt2"))
    assert code == 0 and told["missing_feature"] in " ".join(out.split())


def test_a_class_that_cannot_hold_a_model_says_why(pico):
    told = describe(str(pico("ministral")))
    assert told["targets"]["qwen2_moe"]["holds"]
    assert "window" in told["targets"]["mixtral"]["reason"]
    assert told["targets"]["mixtral"]["engines"] == []
    assert "qwen2_moe" not in told["engines"]["llama.cpp"]
    assert "sliding window" in told["targets"]["qwen2_moe"]["engine_issues"]["llama.cpp"][0]


# --- what is wrong -------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def reshape(name: str, *shape: int) -> Callable[[Path], None]:
    """Give a tensor another shape of as many values."""

    def damage(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        stored[name] = stored[name].reshape(shape)
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def quantise(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file({name: t.to(torch.int8) for name, t in stored.items()}, folder / "model.safetensors")


def code_of_its_own(folder: Path) -> None:
    change(folder, model_type="own", auto_map={"AutoConfig": "own.Config"})
    (folder / "own.py").write_text("raise SystemExit('it ran')")


def other(**keys: object) -> Callable[[Path], object]:
    return lambda folder: change(folder, **keys)


MLP = "model.layers.0.mlp."
WRONG: list[tuple[str, str, Callable[[Path], object], int, str]] = [
    # name, family, damage, exit code, what is said
    ("unknown", "llama", other(model_type="foo"), 4, "unknown; `moefy families` lists"),
    ("a typo", "llama", other(model_type="lama"), 4, "the nearest is llama"),
    ("no type", "llama", other(model_type=...), 3, "has no model_type"),
    ("odd type", "llama", other(model_type=["llama"]), 3, "has no model_type"),
    (
        "several models",
        "llama",
        other(model_type="llava", text_config={"model_type": "llama"}, vision_config={"a": 1}),
        4,
        "several models in one",
    ),
    ("an encoder", "llama", other(model_type="electra", type_vocab_size=2), 4, "an encoder"),
    ("an encoder by name", "llama", other(model_type="modernbert"), 4, "an encoder"),
    ("two halves", "llama", other(model_type="x", is_encoder_decoder=True), 4, "encoder-decoder"),
    ("SSM", "llama", other(model_type="mamba2", state_size=4), 4, "state-space"),
    ("recurrent", "llama", other(model_type="recurrent_gemma"), 4, "recurrent"),
    ("SSM layers", "granitemoehybrid", other(layer_types=["mamba", "attention"]), 4, "mamba"),
    ("its own code", "llama", code_of_its_own, 4, "auto_map"),
    ("quantised", "llama", other(quantization_config={"bits": 4}), 4, "dequantise"),
    ("quantised tensors", "llama", quantise, 4, "stored as I8"),
    ("fused", "phi3", reshape(MLP + "gate_up_proj.weight", 96, 64), 3, "implies [192, 32]"),
    ("split", "llama", reshape(MLP + "down_proj.weight", 96, 32), 3, "implies [32, 96]"),
    (
        "fused attention",
        "phi3",
        reshape("model.layers.1.self_attn.qkv_proj.weight", 32, 64),
        3,
        "has shape [32, 64], but config.json implies",
    ),
    ("transposed", "gpt2", reshape("transformer.h.0.mlp.c_fc.weight", 96, 32), 3, "[32, 96]"),
    ("fused, not split", "phi3", other(model_type="llama"), 3, "lacks tensors"),
    ("split, not fused", "llama", other(model_type="phi3"), 3, "lacks tensors"),
    ("layers", "llama", other(num_hidden_layers=3), 3, "2 layers are stored"),
    ("odd value", "llama", other(rope_parameters="x"), 3, "cannot be understood"),
    ("truncated", "llama", cut, 3, "not a whole safetensors file"),
    ("pickle", "llama", pickle, 3, "pytorch_model.bin"),
]


@pytest.mark.parametrize(
    ("family", "damage", "expected", "says"),
    [row[1:] for row in WRONG],
    ids=[row[0] for row in WRONG],
)
def test_what_cannot_be_converted_is_described_all_the_same(
    family, damage, expected, says, own_pico, moefy
):
    folder = own_pico(family)
    damage(folder)
    code, out, err = moefy("inspect", folder, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert (code, found["code"]) == (expected, expected)
    assert says in " ".join(found["problems"])
    assert not found["convertible"] and found["sizes"]["hidden"] == PICO["hidden_size"]
    line = err.splitlines()
    assert len(line) == 1 and line[0].startswith("moefy: ") and says in line[0]
    code, out, again = moefy("inspect", folder)
    assert (code, again) == (expected, err)
    assert "hidden 32" in out and not ESCAPE.search(out)


JUNK: list[object] = [None, "x", -1, [None], {"rope_theta": "x"}, 10**30]


@pytest.mark.parametrize("model_type", ["smollm3", "qwen2_moe"])
def test_no_value_of_a_configuration_is_too_odd(model_type, own_pico, stock, tmp_path, capsys):
    if model_type in MOE:
        folder = Path(shutil.copytree(stock(model_type), tmp_path / "own"))
    else:
        folder = own_pico(model_type)
    plain = json.loads((folder / "config.json").read_text())
    for key in sorted({*plain, *ODD}):
        for value in JUNK:
            (folder / "config.json").write_text(json.dumps(plain | {key: value}))
            found = describe(str(folder))
            terminal.show_inspection(found)
            assert found["code"] in (0, 3, 4)
    assert not ESCAPE.search(capsys.readouterr().out)


def nothing(folder: Path) -> None:
    shutil.rmtree(folder)


NOTHING: dict[str, Callable[[Path], object]] = {
    "no folder": nothing,
    "no configuration": lambda folder: (folder / "config.json").unlink(),
    "no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "neither a type nor tensors": lambda folder: (change(folder, model_type=...), cut(folder)),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_describe(name, own_pico, moefy):
    folder = own_pico("llama")
    NOTHING[name](folder)
    code, out, err = moefy("inspect", folder)
    assert (code, out) == (3, "")
    assert err.startswith("moefy: ") and len(err.splitlines()) == 1


def test_a_hub_id_is_looked_for_in_the_cache_only(moefy, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    real = huggingface_hub.snapshot_download
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **how: asked.append(how) or real(name, **how, cache_dir=tmp_path),
    )
    code, out, err = moefy("inspect", "owner/none")
    assert (code, out) == (3, "") and "hf download owner/none" in err
    assert [how["local_files_only"] for how in asked] == [True]


# --- Mixtures of Experts -------------------------------------------------------------------------

WIDE = {"moe_intermediate_size": 24, "intermediate_size": 96}
EIGHT = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 24}
QWEN3_5 = FAMILY["qwen3_5_text"] | {"head_dim": 8, "shared_expert_intermediate_size": 40}
MOE: dict[str, tuple[dict[str, Any], int, list[int]]] = {
    "mixtral": (LOCAL, 0, []),
    "qwen2_moe": ({**EIGHT, **WIDE, "shared_expert_intermediate_size": 40}, 40, []),
    "qwen3_moe": ({**EIGHT, **WIDE, "mlp_only_layers": [1]}, 0, [1]),
    "granitemoeshared": ({**LOCAL, "shared_intermediate_size": 40}, 40, []),
    "granitemoehybrid": (
        {
            **LOCAL,
            "shared_intermediate_size": 40,
            "layer_types": ["attention", "attention"],
            "mamba_n_heads": 2,
        },
        40,
        [],
    ),
    "glm4_moe": (
        {
            **WIDE,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        48,
        [0],
    ),
    "flex_olmo": ({**EIGHT, "intermediate_size": 24}, 0, []),
    "hunyuan_v1_moe": (
        {"num_experts": 8, "moe_topk": 2, "intermediate_size": 24, "head_dim": 8},
        24,
        [],
    ),
    "ernie4_5_moe": (
        {
            **WIDE,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
        },
        24,
        [0],
    ),
    "cohere2_moe": (
        {**EIGHT, "intermediate_size": 24, "num_shared_experts": 1, "head_dim": 8},
        24,
        [],
    ),
    "lfm2_moe": (
        {
            **EIGHT,
            **WIDE,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention"],
        },
        0,
        [0],
    ),
    "qwen3_5_moe_text": (
        {**EIGHT, **WIDE, **QWEN3_5},
        40,
        [],
    ),
    "olmoe": ({**EIGHT, "intermediate_size": 24}, 0, []),  # no target
}


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Callable[..., Path]:
    """`stock(model_type, **overrides)`: the folder of a tiny MoE that transformers saved."""

    def make(model_type: str, **overrides: Any) -> Path:
        from transformers import AutoConfig, AutoModelForCausalLM

        values = PICO | MOE[model_type][0] | overrides
        config = AutoConfig.for_model(model_type, **values)
        folder = tmp_path_factory.mktemp(model_type)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        return folder

    return make


def assert_experts(folder: Path, count: int, per_token: int) -> dict[str, Any]:
    """Parameters in all and active, as transformers has them in memory: experts stacked."""
    found = describe(str(folder))
    tensors = loaded(folder)
    total = sum(tensor.numel() for tensor in tensors.values())
    stacked = [t for name, t in tensors.items() if re.search(r"[^_]experts\.|(in|out)put_li", name)]
    routed = sum(t.numel() for t in stacked if t.ndim == 3)
    assert routed > 0
    assert found["kind"] == "MoE"
    assert found["parameters"] == total
    assert found["parameters_active"] == total - routed * (count - per_token) // count
    experts = found["experts"]
    assert (experts["count"], experts["per_token"]) == (count, per_token)
    assert experts["parameters"] == routed
    return found


@pytest.mark.parametrize("model_type", MOE)
def test_the_facts_of_a_stock_model(model_type, stock):
    _, shared, dense_layers = MOE[model_type]
    found = assert_experts(stock(model_type), 8, 2)
    experts = found["experts"]
    assert (experts["width"], experts["shared_width"]) == (24, shared)
    assert experts["active_fraction"] == round((shared + 48) / (shared + 192), 4)
    assert experts["dense_layers"] == dense_layers
    assert (found["sizes"]["ffn"], found["sizes"]["head_dim"]) == (shared + 192, 8)
    assert found["problems"] == []
    assert bool(found["serving"]) == (model_type in targets.names())


@pytest.mark.parametrize("model_type", sorted({*MOE} & {*targets.names()}))
def test_a_selection_bias_moves_the_choice_and_no_gate(model_type, stock):
    """As the class itself computes: with all experts chosen it changes nothing."""
    from transformers import AutoModelForCausalLM

    ids_BT = torch.arange(24).view(1, -1)
    key = next(key for key in PER_TOKEN if key in MOE[model_type][0])
    changes = []
    for chosen in (2, 8):
        model = AutoModelForCausalLM.from_pretrained(stock(model_type), **{key: chosen}).eval()
        before = model(ids_BT).logits
        biases = [t for name, t in model.state_dict().items() if BIAS.search(name)]
        for bias in biases:
            bias += torch.linspace(0, 9, 8)
        changes.append(not torch.allclose(model(ids_BT).logits, before, atol=1e-6))
    told = catalogue()["targets"][model_type]["selection_bias"]
    assert (bool(biases), *changes) == (told, told, False)


def test_every_stock_target_is_tried():
    assert {*targets.names()} <= {*MOE, "moefy"}


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_the_facts_of_a_conversion(model_type, pico, converted):
    out = converted(pico(model_type))
    made = json.loads((out / "moefy" / "conversion.json").read_text())["shape"]
    found = assert_experts(out, made["num_experts"], made["experts_per_token"])
    assert found["experts"]["width"] == made["expert_width"]
    assert found["experts"]["shared_width"] == made["num_shared"]
    serving = found["serving"]
    assert [*serving] == [engine.name for engine in ENGINES]
    head_dim = ["vLLM", "llama.cpp"] if model_type == "qwen2_moe" else []
    for engine in ("transformers", "vLLM", "SGLang", "llama.cpp", "MLX"):
        assert serving[engine]["runs"] or engine in head_dim, serving[engine]
    assert serving["Ollama"]["runs"] is None
    assert any("128" in note for note in serving["vLLM"]["notes"])


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neox", "opt", "bert", "distilbert", "t5"])
def test_the_facts_of_a_conversion_to_no_stock_class(model_type, pico, converted):
    out = converted(pico(model_type), target=targets.OWN)
    made = json.loads((out / "moefy" / "conversion.json").read_text())["shape"]
    found = describe(str(out))
    shape = {key: found["experts"][key] for key in ("count", "per_token", "width", "shared_width")}
    keys = ("num_experts", "experts_per_token", "expert_width", "num_shared")
    assert [*shape.values()] == [made[key] for key in keys]
    dense = describe(str(pico(model_type)))
    assert found["sizes"] == dense["sizes"]
    converted_ffn = dense["parameters_ffn"] / (2 if families.load(model_type).beside else 1)
    saved = round((1 - found["experts"]["active_fraction"]) * converted_ffn)
    assert abs(found["parameters"] - found["parameters_active"] - saved) < 0.02 * saved
    assert [engine for engine, told in found["serving"].items() if told["runs"]] == ["transformers"]


SERVING: list[tuple[str, dict[str, Any], str, str]] = [
    ("qwen2_moe", {"norm_topk_prob": True}, "llama.cpp", "norm_topk_prob were false"),
    ("qwen3_moe", {"norm_topk_prob": False}, "llama.cpp", "norm_topk_prob were true"),
    ("qwen3_moe", {}, "llama.cpp", "dense layers"),
    ("qwen2_moe", {"tie_word_embeddings": True}, "MLX", "lm_head.weight"),
    ("qwen2_moe", {"hidden_act": "gelu"}, "vLLM", "silu"),
    ("qwen2_moe", {"rope_parameters": LLAMA3}, "llama.cpp", "llama3"),
    ("mixtral", {"sliding_window": 16}, "MLX", "wrong past 16"),
    ("mixtral", {"head_dim": 16}, "MLX", "head_dim 8, not 16"),
    ("mixtral", {}, "MLX", "rope_theta"),
    ("mixtral", {"num_local_experts": 520}, "llama.cpp", "512"),
    ("granitemoehybrid", {}, "SGLang", "full_attention"),
    ("glm4_moe", {}, "SGLang", "2 shared experts"),
]


@pytest.mark.parametrize(("model_type", "changes", "engine", "says"), SERVING)
def test_why_an_engine_does_not_run_a_model(model_type, changes, engine, says, stock):
    told = describe(str(stock(model_type, **changes)))["serving"][engine]
    assert told["runs"] is False
    assert says in " ".join(told["reasons"])


def test_an_engine_that_runs_a_model(stock):
    serving = describe(str(stock("mixtral", intermediate_size=256)))["serving"]
    for engine in ("vLLM", "SGLang", "llama.cpp", "Ollama"):
        assert serving[engine] == {"runs": True, "reasons": [], "notes": []}
    assert "rope_theta" in " ".join(serving["transformers"]["notes"])


def test_contradictions(stock, moefy):
    folder = change(stock("mixtral"), num_local_experts=7, num_experts_per_tok=9)
    problems = describe(str(folder))["problems"]
    assert "config.json has 7 experts, the tensors 8" in problems
    assert "9 experts per token, but only 8 experts" in problems
    code, out, err = moefy("inspect", folder)
    assert code == 3 and "8 routed" in out
    assert err == f"moefy: {'; '.join(problems)}\n"


def test_a_moe_without_tensors(stock):
    folder = stock("mixtral")
    cut(folder)
    found = describe(str(folder))
    assert (found["kind"], found["experts"]["count"]) == ("MoE", 8)
    assert len(found["problems"]) == 1 and found["serving"] == {}


# --- the commands --------------------------------------------------------------------------------


def test_the_text_is_plain_and_narrow(moefy, pico, stock, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    for folder in (pico("llama"), pico("qwen3"), stock("qwen2_moe")):
        code, out, err = moefy("inspect", folder)
        assert (code, err) == (0, "")
        assert folder.name in out and not ESCAPE.search(out)
        assert max(map(len, out.splitlines())) <= 100
    code, out, err = moefy("inspect", pico("llama"), "--json")
    assert json.loads(out, parse_constant=pytest.fail) == describe(str(pico("llama")))


def test_families(moefy):
    code, out, err = moefy("families", "--json")
    known = json.loads(out)
    assert (code, err, known) == (0, "", catalogue())
    assert [*known["families"]] == families.names()
    assert sorted(known["targets"]) == targets.names()
    told = {name: (told["shared"], told["dense_layers"]) for name, told in known["targets"].items()}
    assert told["qwen2_moe"] == ("any width", "any")
    assert told["mixtral"] == ("none", "none")
    assert told["glm4_moe"] == ("multiple of an expert", "first")
    assert told["ernie4_5_moe"] == ("multiple of an expert", "first and last")
    assert told["hunyuan_v1_moe"] == ("as an expert", "none")
    assert told["moefy"] == ("any width", "any")
    code, out, err = moefy("families")
    assert all(name in out for name in (*known["families"], *known["targets"]))
    assert not ESCAPE.search(out)


def test_nothing_slow_is_imported(pico, stock, own_pico):
    """What takes seconds to import, whatever there is to tell."""
    folders = [pico(name) for name in STOCK] + [stock(name) for name in MOE]
    folders.append(change(own_pico("llama"), model_type="bert"))
    script = (
        "import sys\n"
        "from moefy.inspect import catalogue, describe\n"
        "catalogue.catalogue()\n"
        "for folder in sys.argv[1:]: describe(folder)\n"
        "print([name for name in sys.modules if name in ('torch', 'transformers', 'numpy')])"
    )
    command = [sys.executable, "-c", script, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_sizes_of_values():
    assert safetensors_header.BYTES == {code: dtype.itemsize for code, dtype in DTYPES.items()}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3", "arcee", "smollm3", "bert"])
def test_the_floor_is_what_a_narrower_ffn_leaves(family, pico):
    """Parameters are linear in the FFN's width, and in the number of layers."""
    lists = {
        key: FAMILY[family][key] * 2
        for key in ("layer_types", "no_rope_layers")
        if key in FAMILY[family]
    }
    folder = pico(family)
    facts, wide, deep = (
        describe(str(model))
        for model in (
            folder,
            pico(family, intermediate_size=2 * PICO["intermediate_size"]),
            pico(family, num_hidden_layers=2 * PICO["num_hidden_layers"], **lists),
        )
    )
    floor = facts["floor"]
    assert floor["parameters"] == 2 * facts["parameters"] - wide["parameters"]
    assert floor["share"] == pytest.approx(floor["parameters"] / facts["parameters"], abs=1e-4)
    layers = PICO["num_hidden_layers"]
    assert floor["layer_with_ffn"] * layers == deep["parameters"] - facts["parameters"]
    assert floor["layer"] * layers == deep["floor"]["parameters"] - floor["parameters"]


def test_the_floor_is_printed(moefy, pico):
    code, out, _ = moefy("inspect", pico("llama"))
    assert code == 0 and re.search(r"floor +0\.0 M \(\d+%\) whatever is --active", out)
