"""A conversion from end to end: what is in the folder, what decides its bytes, what can go wrong.

The judges are safetensors, transformers and huggingface_hub.
"""

import dataclasses
import json
import os
import re
import shutil
import stat
import tomllib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from stock import auto_class
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from moefy import __version__
from moefy.checkpoint.reload import reopen
from moefy.config.recipe import Recipe, build, read
from moefy.config.report import Settings
from moefy.convert import forward, layers
from moefy.convert.calibration import calibration_tokens
from moefy.convert.prepare import Job, prepare
from moefy.convert.run import convert
from moefy.convert.session import Attempt
from moefy.errors import MoefyError
from moefy.evaluate.controls import AS_WRITTEN, changed, control_jobs, controls
from moefy.evaluate.metrics import compare
from moefy.evaluate.run import evaluate
from moefy.files.safetensors_header import read_header
from moefy.models import families
from moefy.models.load import open_model
from moefy.models.shape import pruned
from moefy.text import packing
from moefy.text.tokenizer import load_tokenizer
from moefy.types import Shape

SINGLE = "model.safetensors"
METHODS = Path(__file__).parents[2] / "recipes" / "guide" / "methods.md"


@pytest.fixture
def a_job(pico, text) -> Callable[..., Job]:
    """`a_job(model, **recipe)`: a prepared conversion of a tiny model on few tokens."""

    def job(model: Path | None = None, **recipe: Any) -> Job:
        few = {"tokens": 512, "sequence_length": 64, "calibration": str(text)}
        values = {"model": str(model or pico("llama")), **few, **recipe}
        return prepare(build(None, values, []))

    return job


def listing(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, with the bytes of its files."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


def summary_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "moefy" / "conversion.json").read_text())


def logits(folder: Path, **options: Any) -> torch.Tensor:
    model = auto_class(folder).from_pretrained(folder, dtype=torch.float32, **options).eval()
    ids_BT = torch.randint(1, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(ids_BT).logits


# --- what is in the folder -----------------------------------------------------------------------


@pytest.fixture
def littered(own_pico) -> Path:
    """A model folder with all that may lie about in one."""
    folder = own_pico("llama")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A model\n")
    (folder / "modeling_own.py").write_text("raise SystemExit")
    (folder / "tokenizer.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n")
    (folder / "special_tokens_map.json").write_bytes(b'{"eos_token":  "<|endoftext|>"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_bytes(b"{{ tools }}")
    return folder


def test_the_folder_that_is_written(littered, a_job, tmp_path):
    job, out = a_job(littered, partition_options={"rounds": 1}, seed=3), tmp_path / "out"
    summary = convert(job, out)
    made, given = listing(out), listing(littered)
    copied = [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "special_tokens_map.json",
        "generation_config.json",
        "additional_chat_templates/tools.jinja",
    ]
    assert {name: made[name] for name in copied} == {name: given[name] for name in copied}
    own = ["README.md", "config.json", SINGLE, "additional_chat_templates", "moefy"]
    own += [f"moefy/{name}" for name in ("recipe.toml", "conversion.json", "conversion.md")]
    assert sorted(made) == sorted([*copied, *own, "moefy/calibration.safetensors"])

    config = json.loads(made["config.json"])
    assert config["architectures"] == ["Qwen2MoeForCausalLM"]
    assert not {"auto_map", "quantization_config", "_name_or_path"} & config.keys()
    assert len(AutoTokenizer.from_pretrained(out)) == 128
    assert json.loads(made["moefy/conversion.json"]) == summary
    assert read_recipe(out) == job.recipe


def read_recipe(out: Path) -> Recipe:
    return Recipe(**read(out / "moefy" / "recipe.toml"))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_is_no_ffn_is_copied_byte_for_byte(family, pico, converted):
    dense, moe = load_file(pico(family) / SINGLE), load_file(converted(pico(family)) / SINGLE)
    kept = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    assert len(kept) > 10
    for name, tensor in kept.items():
        assert moe[name].dtype == tensor.dtype
        assert moe[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    added = {name for name in moe if ".mlp." not in name} - kept.keys()
    assert all(name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")) for name in added)
    assert not any(moe[name].any() for name in added)


def test_the_recipe_gives_the_same_bytes_again(pico, converted, tmp_path):
    first = converted(pico("llama"))
    recipe = build(first / "moefy" / "recipe.toml", {}, [])
    convert(prepare(recipe), tmp_path / "again")
    assert weights(tmp_path / "again") == weights(first)
    assert read_recipe(tmp_path / "again") == read_recipe(first) == recipe
    told = tomllib.loads((first / "moefy" / "recipe.toml").read_text())
    assert told["made"]["moefy"] == __version__
    assert told["made"]["torch"] == str(torch.__version__)


def test_the_report_of_a_conversion(pico, converted):
    dense, out = pico("llama"), converted(pico("llama"))
    summary = summary_of(out)
    assert [layer["layer"] for layer in summary["layers"]] == [0, 1]
    for layer in summary["layers"]:
        assert sum(layer["expert_load"]) == pytest.approx(1, abs=1e-3)
        assert len(layer["expert_load"]) == layer["experts"] == summary["shape"]["num_experts"]
        assert 0 <= layer["energy_static"] <= layer["energy_neurons"] <= 1
        assert layer["energy_router"] <= layer["energy_oracle"] <= layer["energy_neurons"] + 1e-6
        assert layer["error_after_refit"] <= layer["error_before_refit"] < 1
    assert summary["reopened"]["class"] == "Qwen2MoeForCausalLM"
    assert summary["reopened"]["layers"] == 2
    assert summary["reopened"]["hidden_state_error"] < 0.01
    for folder, digests in ((dense, summary["inputs"]), (out, summary["outputs"])):
        assert {SINGLE, "config.json"} <= set(digests)
        for name, digest in digests.items():
            assert sha256((folder / name).read_bytes()).hexdigest() == digest
    ids = load_file(out / "moefy" / "calibration.safetensors")["ids"]
    calibration = summary["calibration"]
    assert ids.shape == (calibration["sequences"], calibration["sequence_length"]) == (8, 64)
    stored = ids.long().numpy().astype("<i8").tobytes()
    assert sha256(stored).hexdigest() == calibration["sha256"]
    page = (out / "moefy" / "conversion.md").read_text()
    for layer in summary["layers"]:
        assert f"{layer['error_after_refit']:.3f}" in page


def test_the_parameters_that_the_report_counts(pico, converted):
    config = AutoConfig.from_pretrained(pico("llama"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = summary_of(converted(pico("llama")))["parameters_dense"]
    assert counted == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("card", ["license: mit", "license: apache-2.0\nlanguage:\n- en", None])
def test_the_model_card(card, own_pico, a_job, tmp_path):
    dense = own_pico("llama")
    if card:
        (dense / "README.md").write_text(f"---\n{card}\n---\n# A model\n")
    convert(a_job(dense), tmp_path / "out")
    written = ModelCard.load(tmp_path / "out" / "README.md")
    assert written.data.library_name == "transformers"
    assert {"moe", "moefy"} <= set(written.data.tags)
    assert written.data.license == (card.split()[1] if card else None)
    assert written.data.base_model is None  # a folder, which the hub does not know
    assert "Qwen2MoeForCausalLM" in written.text


def test_a_folder_given_by_a_relative_path_is_no_hub_id(own_pico, a_job, tmp_path, monkeypatch):
    dense = own_pico("llama")
    monkeypatch.chdir(dense.parent.parent)
    convert(a_job(dense.relative_to(Path.cwd())), tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model is None


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_mode_that_the_umask_gives(mask, mode, littered, a_job, tmp_path):
    for file in littered.rglob("*"):
        file.chmod(0o700 if file.is_dir() else 0o600)
    before = os.umask(mask)
    try:
        convert(a_job(littered), tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").rglob("*")}
    folders = {path for path in modes if path.is_dir()}
    assert len(folders) == 2
    wrong = {
        p.name: oct(m) for p, m in modes.items() if m != (0o777 & ~mask if p in folders else mode)
    }
    assert wrong == {}


# --- what decides the bytes ----------------------------------------------------------------------


def test_the_seed_decides(pico, a_job, converted, tmp_path):
    first = converted(pico("llama"))
    convert(a_job(), tmp_path / "same")
    convert(a_job(seed=1), tmp_path / "other")
    assert weights(tmp_path / "same") == weights(first)
    assert weights(tmp_path / "other") != weights(first)


def test_the_state_of_global_generators_does_not(a_job, converted, pico, tmp_path):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    convert(a_job(calibration="self"), tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(321)
    convert(a_job(calibration="self"), tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert summary_of(tmp_path / "a")["calibration"]["source"] == "self"


@pytest.mark.parametrize("by", ["halves", "turns"])
def test_shards_do_not(by, own_pico, a_job, converted, pico, tmp_path):
    """Two shards, holding the tensors by halves or in turns, give what one file gives."""
    dense = own_pico("llama")
    tensors = load_file(dense / SINGLE)
    names = sorted(tensors)
    first = set(names[: len(names) // 2] if by == "halves" else names[::2])
    shards = {name: f"model-0000{1 + (name in first)}-of-00002.safetensors" for name in names}
    for shard in set(shards.values()):
        held = {name: tensors[name] for name in names if shards[name] == shard}
        save_file(held, dense / shard, metadata={"format": "pt"})
    (dense / SINGLE).unlink()
    index = {"metadata": {}, "weight_map": shards}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    convert(a_job(dense), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(converted(pico("llama")))
    assert len(summary_of(tmp_path / "out")["inputs"]) == 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_another_dtype(dtype, pico, converted):
    dense, out = pico("llama"), converted(pico("llama"), dtype=dtype)
    stored = load_file(out / SINGLE)
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    rounded = load_file(dense / SINGLE)["model.embed_tokens.weight"].to(getattr(torch, dtype))
    assert torch.equal(stored["model.embed_tokens.weight"], rounded)
    assert AutoConfig.from_pretrained(out).dtype == getattr(torch, dtype)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == getattr(torch, dtype)
    assert summary_of(out)["reopened"]["hidden_state_error"] < 0.05


def test_mixed_dtypes_stay_as_they_are(own_pico, a_job, tmp_path):
    dense = own_pico("llama")
    tensors = {
        name: tensor if "norm" in name else tensor.bfloat16() if ".mlp." in name else tensor.half()
        for name, tensor in load_file(dense / SINGLE).items()
    }
    save_file(tensors, dense / SINGLE, metadata={"format": "pt"})
    convert(a_job(dense), tmp_path / "out")
    stored = load_file(tmp_path / "out" / SINGLE)
    for name, tensor in tensors.items():
        if ".mlp." not in name:
            assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor)
    assert {t.dtype for name, t in stored.items() if ".mlp." in name} == {torch.bfloat16}


MASK = torch.ones(1, 1, 8, 8).tril().bool()
PLACES = torch.arange(128)[None]
NEEDLESS: dict[str, dict[str, torch.Tensor]] = {
    "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)},
    "gpt2": {"transformer.h.0.attn.bias": MASK},
    "gpt_neox": {
        "gpt_neox.layers.0.attention.bias": MASK,
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    },
    "bert": {
        "bert.embeddings.position_ids": PLACES,
        "bert.pooler.dense.weight": torch.ones(32, 32),
        "cls.seq_relationship.bias": torch.ones(2),
    },
    "roberta": {"roberta.embeddings.position_ids": PLACES},
    "t5": {
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 4)
    },
}


@pytest.mark.parametrize("family", NEEDLESS)
def test_what_old_versions_stored_needlessly_is_not_in_the_way(family, own_pico, a_job, tmp_path):
    dense = own_pico(family)
    tensors = load_file(dense / SINGLE)
    assert not tensors.keys() & NEEDLESS[family].keys()
    save_file(tensors | NEEDLESS[family], dense / SINGLE, metadata={"format": "pt"})
    target = "auto" if families.load(family).targets else "moefy"
    summary = convert(a_job(dense, target=target), tmp_path / "out")
    assert all(any(name in note for note in summary["notes"]) for name in NEEDLESS[family])
    written = load_file(tmp_path / "out" / SINGLE)
    assert not any(name.endswith(tuple(NEEDLESS[family])) for name in written)


def as_google_stored(name: str) -> str:
    name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
    return name.replace("LayerNorm.bias", "LayerNorm.beta")


OLD_NAMES: dict[str, tuple[str, dict, Callable[[str], str]]] = {
    "gpt2": ("gpt2", {}, lambda name: name.removeprefix("transformer.")),
    "bert": ("bert", {}, as_google_stored),
}


@pytest.mark.parametrize("name", OLD_NAMES)
def test_names_of_the_first_checkpoints(name, own_pico, converted):
    family, changes, old = OLD_NAMES[name]
    quick = {"target": "moefy", "refit": False, "partition": "shuffle"}
    dense = own_pico(family, **changes)
    expected = weights(converted(dense, **quick))
    tensors = load_file(dense / SINGLE)
    renamed = {old(name): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, dense / SINGLE, metadata={"format": "pt"})
    assert weights(converted(dense, **quick, seed=0)) == expected


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize(("spare", "dtype"), [(0, "float32"), (-1, "auto")])
def test_a_model_that_is_too_large_to_be_reopened_whole(
    family, spare, dtype, pico, a_job, converted, tmp_path, monkeypatch
):
    """One layer in float32 if it fits; as stored, if it lacks a byte."""
    target = "auto" if families.load(family).targets else "moefy"
    seen = []

    def opened(*args, **more):
        seen.append(more["dtype"])
        return open_model(*args, **more)

    whole = read_header(converted(pico(family), target=target) / SINGLE)
    second = families.load(family).layer.format(layer=1)
    kept = [entry.num_elements for name, entry in whole.items() if second not in name]
    monkeypatch.setattr("moefy.checkpoint.reload.MEMORY", 4 * sum(kept) + spare)
    monkeypatch.setattr("moefy.checkpoint.reload.open_model", opened)
    reopened = convert(a_job(pico(family), target=target), tmp_path / "out")["reopened"]
    assert reopened["layers"] == 1 and reopened["hidden_state_error"] < 0.05
    assert str(seen[-1]).removeprefix("torch.") == dtype


# --- encoders ------------------------------------------------------------------------------------


def told(job, code: int) -> str:
    with pytest.raises(MoefyError) as caught:
        job()
    assert caught.value.code == code and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", ["bert", "distilbert", "t5"])
def test_what_an_encoder_does_not_do(family, pico, a_job, converted):
    model = pico(family)
    assert "--calibration FILE" in told(lambda: a_job(model, target="moefy", calibration="self"), 2)
    by_loss = {"target": "moefy", "partition": "llama-moe-v2"}
    assert "no next-token loss" in told(lambda: a_job(model, **by_loss), 2)
    assert not a_job(model, target="moefy", layers="auto").weighs
    out = converted(model, target="moefy", partition="shuffle", refit=False)
    assert "no next-token perplexity" in told(lambda: evaluate(out), 4)
    assert "moefy report" not in (out / "README.md").read_text()
    if family == "t5":
        assert "decoder" in told(lambda: a_job(model, partition="static"), 2)
        assert "the decoder stays dense" in summary_of(out)["notes"]


def test_a_decoder_made_of_an_encoder_is_refused(own_pico, a_job):
    dense = own_pico("bert")
    config = json.loads((dense / "config.json").read_text()) | {"is_decoder": True}
    (dense / "config.json").write_text(json.dumps(config))
    assert "is_decoder" in told(lambda: a_job(dense, target="moefy"), 4)


@pytest.mark.parametrize(("family", "most"), [("opt", 128), ("roberta", 126), ("gpt2", 128)])
def test_sequences_longer_than_the_positions(family, most, pico, a_job, tmp_path):
    job = a_job(pico(family), target="moefy", tokens=2048, sequence_length=most + 1)
    assert f"positions for {most}" in told(lambda: convert(job, tmp_path / "out"), 2)


def test_an_encoder_is_opened_for_other_tasks(pico, converted):
    """All experts active: what the dense model gives, with a head of one's own or none."""
    dense = pico("bert")
    shape = {"experts": 4, "top_k": 4, "active": 1.0}
    out = converted(dense, target="moefy", partition="shuffle", refit=False, **shape)
    ids_BT = torch.randint(1, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        states = AutoModel.from_pretrained(out).eval()(ids_BT).last_hidden_state
        expected = AutoModel.from_pretrained(dense).eval()(ids_BT).last_hidden_state
        kinds = AutoModelForSequenceClassification.from_pretrained(out, num_labels=5)
        assert torch.allclose(states, expected, atol=1e-4)
        assert kinds.eval()(ids_BT).logits.shape == (2, 5)


# --- the controls --------------------------------------------------------------------------------


TRANSPOSED_OR_NOT_ALL = ("gpt2", "t5", "mt5")
PRUNED = [(name, {}) for name in families.names() if name not in TRANSPOSED_OR_NOT_ALL]
PRUNED += [
    (
        "lfm2",
        {"block_auto_adjust_ff_dim": True, "intermediate_size": 144, "block_multiple_of": 32},
    ),
    ("smollm3", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("family", "changes"), PRUNED)
def test_static_pruning_is_the_dense_class_with_fewer_neurons(family, changes, pico, converted):
    dense = pico(family, **changes)
    out = converted(dense, partition="static", refit=False)
    whole = auto_class(dense).from_pretrained(dense).eval()
    assert AutoConfig.from_pretrained(out).architectures == [type(whole).__name__]
    stored = load_file(out / SINGLE)
    known = families.load(family)
    first, *_, last = known.ffn
    for number in range(2):
        prefix = known.layer.format(layer=number)
        layer = whole.get_submodule(prefix.rstrip("."))
        gate_FD = layer.get_parameter(first).data[:96]  # up may stand below
        rows = {row.numpy().tobytes(): at for at, row in enumerate(gate_FD)}
        written = stored[prefix + first][:48]
        kept = [rows[row.numpy().tobytes()] for row in written]
        assert len(set(kept)) == 48
        lost = torch.ones(96, dtype=torch.bool).index_fill(0, torch.tensor(kept), False)
        layer.get_parameter(last).data[:, lost] = 0
    ids_BT = torch.randint(1, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        by_hand = whole(ids_BT).logits
    assert torch.allclose(logits(out), by_hand, atol=1e-5)
    assert (logits(dense) - by_hand).abs().max() > 0.1
    (first, *_) = summary_of(out)["layers"]
    assert first["experts_per_token"] == 0 and "energy_router" not in first


def test_a_refit_makes_static_pruning_better(pico, converted):
    plain = summary_of(converted(pico("llama"), partition="static", refit=False))
    fitted = summary_of(converted(pico("llama"), partition="static", tokens=4096))
    assert all(
        layer["error_after_refit"] < layer["error_before_refit"] for layer in fitted["layers"]
    )
    assert all(layer["refit_strength"] is None for layer in plain["layers"])


def test_a_random_router_routes_worse(pico, converted):
    ours = summary_of(converted(pico("llama"), tokens=4096))
    by_lot = summary_of(converted(pico("llama"), tokens=4096, router="random"))
    for fitted, drawn in zip(ours["layers"], by_lot["layers"], strict=True):
        assert fitted["energy_router"] > drawn["energy_router"]
        assert drawn["router_oracle_agreement"] == pytest.approx(
            drawn["agreement_by_chance"], abs=0.2
        )
    assert logits(converted(pico("llama"), tokens=4096, router="random")).isfinite().all()


def few(texts, **more) -> Settings:
    """Scores and text, and nothing that takes long."""
    return Settings(text=tuple(texts), effort="quick", speed=False, **more)


@pytest.mark.parametrize(
    ("family", "recipe"),
    [
        ("llama", {}),
        ("qwen3", {"experts": 4, "top_k": 2}),
        ("llama", {"layers": "1:"}),
        ("phi3", {}),
        ("granite", {}),
        ("olmo2", {"partition": "shuffle"}),
        ("llama", {"partition": "llama-moe-v2", "router": "llama-moe-v2", "calibration": "self"}),
    ],
)
def test_an_evaluation_with_controls(family, recipe, pico, converted, text, tmp_path):
    run = Path(shutil.copytree(converted(pico(family), **recipe), tmp_path / "run"))
    report = evaluate(run, few([text], tokens=500, sequence_length=128, controls=True))
    assert report["not_run"] == []
    rows = report["texts"]["text"]
    expected = {"static", "random router", "oracle router", AS_WRITTEN}
    assert rows.keys() == {"dense", "converted"} | expected
    kinds = {label: told["kind"] for label, told in report["models"].items()}
    assert kinds == {"dense": "dense", "converted": "converted"} | dict.fromkeys(
        expected, "control"
    )
    assert rows["dense"]["kl"] == 0 and rows["dense"]["dnll"] == 0
    for name in rows.keys() - {"dense"}:
        assert rows[name]["kl"] > 0 and 0 < rows[name]["top1_agreement"] < 1
    assert sorted(tmp_path.iterdir()) == [run]  # the controls are gone
    assert json.loads((run / "moefy" / "report.json").read_text()) == json.loads(json.dumps(report))
    page = (run / "moefy" / "report.md").read_text()
    assert all(name in page for name in rows)

    # By the losses that transformers itself computes.
    ids = AutoTokenizer.from_pretrained(run)(text.read_text()[: 8 * 500])["input_ids"][:500]
    windows = [torch.tensor(ids[at : at + 128]) for at in range(0, 500, 128)]
    assert sum(len(window) - 1 for window in windows) == rows["converted"]["tokens"]
    for name, folder in (("dense", pico(family)), ("converted", run)):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.inference_mode():
            losses = [model(w[None], labels=w[None]).loss * (len(w) - 1) for w in windows]
        nll = float(sum(losses)) / rows["converted"]["tokens"]
        assert rows[name]["perplexity"] == pytest.approx(torch.tensor(nll).exp().item(), rel=1e-4)


OURS = "partition=alternating"
SETTINGS = re.findall(r"`(partition=[^`]+)` \|", METHODS.read_text("utf-8"))
COPIES = "partition=copies"
PUBLISHED = [settings for settings in SETTINGS if not settings.startswith((OURS, COPIES))]
"""What the guide says to give `moefy report --against` for each published method that divides an
FFN."""


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_evaluation_against_the_published_methods(family, pico, converted, text, tmp_path):
    target = {"target": "moefy"} if family == "gpt2" else {}
    run = Path(shutil.copytree(converted(pico(family), **target), tmp_path / "run"))
    against = [*PUBLISHED, "partition=moefication partition.restarts=2", "seed=1"]
    assert len(against) == 7
    report = evaluate(
        run, few([text], tokens=300, sequence_length=100, controls=False, against=tuple(against))
    )
    rows = report["texts"]["text"]
    assert list(rows) == ["dense", "converted", *against]
    assert [name for name, told in report["models"].items() if told["kind"] == "other"] == against
    assert all(row["kl"] > 0 for name, row in rows.items() if name != "dense")
    assert len({row["kl"] for row in rows.values()}) == len(rows)
    assert sorted(tmp_path.iterdir()) == [run]


def test_what_a_run_is_held_against_has_its_shape_and_its_settings(pico):
    given = {"model": str(pico("llama")), "experts": 4, "tokens": 4096}
    recipe = build(None, given, ["partition.rounds=2", "router.steps=5"])
    other = changed(recipe, "partition=moefication partition.restarts=2 refit=false")
    assert other.partition_options == {"restarts": 2} and other.router_options == {"steps": 5}
    assert (other.partition, other.router, other.refit) == ("moefication", "linear", False)
    jobs = control_jobs(recipe, {"weights": other, "static": changed(recipe, "partition=static")})
    shape = prepare(recipe).shape
    assert jobs["weights"].shape == shape
    assert jobs["static"].shape == pruned(shape)


def test_static_pruning_has_no_dense_layers_but_as_many_active_neurons(pico):
    model = pico("llama", num_hidden_layers=3, intermediate_size=96)
    recipe = build(None, {"model": str(model), "layers": "1:", "active": 0.5}, [])
    (job,) = control_jobs(recipe, {"static": controls(recipe)["static"]}).values()
    assert job.layers == [0, 1, 2]
    assert job.shape == Shape(96, round((96 + 2 * prepare(recipe).shape.num_active) / 3), 0, 0, 0)


def test_a_model_compared_with_itself(pico):
    model = AutoModelForCausalLM.from_pretrained(pico("llama")).eval()
    again = AutoModelForCausalLM.from_pretrained(pico("llama")).eval()
    windows = [torch.randint(1, 128, (n,)) for n in (60, 30)]
    scores = compare(model, {"again": again}, windows)
    assert scores["dense"].kl == 0 and scores["dense"].agreement == 1
    assert abs(scores["again"].kl) < 1e-6 and scores["again"].agreement == 1
    assert scores["again"].nll == scores["dense"].nll


def test_sequences_and_windows_shorter_than_what_is_looked_up(pico, converted, text, tmp_path):
    run = converted(pico("llama"), sequence_length=16)
    run = Path(shutil.copytree(run, tmp_path / "run"))
    report = evaluate(run, few([text], tokens=60, sequence_length=20, controls=False))
    assert report["texts"]["text"]["converted"]["tokens"] == 57


def test_activations_that_are_not_finite_are_refused(own_pico, a_job, tmp_path):
    """Every weight is finite, but not what they make of the first token."""
    dense = own_pico("llama")
    tensors = load_file(dense / SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e30
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1e30
    save_file(tensors, dense / SINGLE, metadata={"format": "pt"})
    before = listing(tmp_path)
    told = (({"calibration": "self"}, "logits"), ({}, "overflow"), ({"layers": "1:"}, "layer 1"))
    for given, says in told:
        with pytest.raises(MoefyError, match=says) as caught:
            convert(a_job(dense, **given), tmp_path / "out")
        assert caught.value.code == 6
        assert listing(tmp_path) == before


# --- a folder that is not what was computed ------------------------------------------------------


def states(folder: Path, ids_T: torch.Tensor) -> list[torch.Tensor]:
    """What leaves each layer, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ends: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, args, out: ends.append(out[0].clone()))
    with torch.inference_mode():
        model(ids_T[None])
    return ends


def scaled(ending: str, factor: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        names = [name for name in tensors if name.endswith(ending)]
        assert names
        tensors.update({name: tensors[name] * factor for name in names})

    return change


TAMPERED = {
    "a shared weight scaled": scaled("0.mlp.shared_expert.up_proj.weight", 2),
    "routed weights scaled": scaled("down_proj.weight", 0.5),
    "router rows scaled": scaled("mlp.gate.weight", 2**10),
    "a norm scaled": scaled("1.post_attention_layernorm.weight", 2),
    "a tensor too many": lambda tensors: tensors.update({"model.layers.0.mlp.x": torch.ones(2)}),
    "a tensor too few": lambda tensors: tensors.pop("model.layers.1.mlp.gate.weight"),
    "a wrong shape": lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)}),
    "not a number": scaled("model.layers.0.mlp.gate.weight", float("nan")),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_folder_that_was_tampered_with_is_refused(name, pico, converted, tmp_path):
    out = Path(shutil.copytree(converted(pico("llama")), tmp_path / "out"))
    ids_T = torch.randint(1, 128, (40,), generator=torch.Generator().manual_seed(1))
    ends = states(out, ids_T)
    assert reopen(out, ids_T, ends)["hidden_state_error"] < 1e-5
    tensors = load_file(out / SINGLE)
    TAMPERED[name](tensors)
    save_file(tensors, out / SINGLE, metadata={"format": "pt"})
    with pytest.raises(MoefyError) as caught:
        reopen(out, ids_T, ends)
    assert caught.value.code == 6
    assert str(caught.value).isprintable()


def test_weights_that_overflow_float16_are_refused(own_pico, a_job, tmp_path):
    dense = own_pico("llama")
    tensors = load_file(dense / SINGLE)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = 60_000.0
    save_file(tensors, dense / SINGLE, metadata={"format": "pt"})
    before = listing(tmp_path)
    with pytest.raises(MoefyError, match="bfloat16") as caught:
        convert(a_job(dense, dtype="float16"), tmp_path / "out")
    assert caught.value.code == 6
    assert listing(tmp_path) == before


# --- what stops it -------------------------------------------------------------------------------

STAGES = ("calibration text", "copy", "layer 0", "layer 1", "layers")


@pytest.mark.parametrize(("error", "force"), [(KeyboardInterrupt, True), (RuntimeError, False)])
@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupt_leaves_no_trace_where_nothing_is_to_be_kept(
    error, stage, force, a_job, tmp_path
):
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    if force:
        (out / "moefy").mkdir(parents=True)
        (out / "moefy" / "conversion.json").write_text("{}")
        (out / "model.safetensors").write_bytes(b"of an older run")
    before = listing(out.parent)
    seen = []

    def watch(now: str, done: int, total: int) -> None:
        seen.append(now)
        if now.startswith(stage):
            assert list(out.parent.glob(".out.*"))  # it had begun
            raise error

    with pytest.raises(error):
        job = a_job(calibration="self", tokens=64, sequence_length=8)
        convert(job, out, Attempt(force=force, keep=False), watch=watch)
    assert seen[-1].startswith(stage)
    assert listing(out.parent) == before


def test_force_replaces_a_run(pico, a_job, converted, tmp_path):
    out = Path(shutil.copytree(converted(pico("qwen3")), tmp_path / "out"))
    (out / "left over").write_text("x")
    with pytest.raises(MoefyError, match="--force"):
        convert(a_job(), out)
    convert(a_job(), out, Attempt(force=True))
    assert weights(out) == weights(converted(pico("llama")))
    assert not (out / "left over").exists()
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("place", ["", "out", "deep/er/out", ".."])
@pytest.mark.parametrize("linked", [False, True])
def test_out_may_not_lie_in_the_model_nor_around_it(place, linked, own_pico, a_job, tmp_path):
    dense = own_pico("llama")
    if place == "..":  # a run of moefy, as far as can be seen
        (dense.parent / "moefy").mkdir()
        (dense.parent / "moefy" / "conversion.json").write_text("{}")
    else:
        (dense / "moefy").mkdir()
        (dense / "moefy" / "conversion.json").write_text("{}")
    out = Path(os.path.normpath(dense / place))
    if linked:
        (tmp_path / "link").symlink_to(out.parent)
        out = tmp_path / "link" / out.name
    before = listing(tmp_path)
    with pytest.raises(MoefyError, match="MODEL") as caught:
        convert(a_job(dense), out, Attempt(force=True))
    assert caught.value.code == 2
    assert listing(tmp_path) == before


def test_a_disk_that_is_too_small_is_told_beforehand(a_job, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(MoefyError, match="free") as caught:
        convert(a_job(), tmp_path / "out")
    assert caught.value.code == 5
    assert listing(tmp_path) == {}


def test_the_model_card_says_what_the_class_is(pico, converted):
    quick = {"partition": "shuffle", "refit": False, "router_options": {"steps": 0}}
    stock = (converted(pico("llama"), **quick) / "README.md").read_text()
    assert "stock `Qwen2MoeForCausalLM`" in stock and "import moefy" not in stock
    own = (converted(pico("gemma3_text"), target="moefy", **quick) / "README.md").read_text()
    assert "stock" not in own and "import moefy.modeling" in own and "transformers only" in own
    static = (converted(pico("llama"), partition="static", refit=False) / "README.md").read_text()
    assert "statically pruned" in static and "Mixture of Experts" not in static


@pytest.mark.parametrize("target", ["qwen2_moe", "mixtral", "granitemoeshared", "moefy"])
def test_overlapping_experts_in_a_class(target, pico, converted):
    """Reopened by the conversion itself; here, that the class stores and runs as many neurons."""
    out = converted(pico("llama"), overlap=2.0, target=target)
    told = summary_of(out)
    shape = told["shape"]
    assert shape["num_shared"] + shape["num_experts"] * shape["expert_width"] > 96
    assert told["reopened"]["hidden_state_error"] < 1e-2
    assert logits(out).isfinite().all()
    sizes = [
        sum(tensor.numel() for tensor in load_file(folder / SINGLE).values())
        for folder in (pico("llama"), out)
    ]
    assert sizes[1] - sizes[0] > 0.5 * (2 * 96 * 3 * 32)


def test_only_one_partition_lets_experts_overlap(pico, a_job):
    with pytest.raises(MoefyError, match="overlap"):
        a_job(overlap=2.0, partition="shuffle")


def test_only_what_is_needed_goes_through_dense_layers(pico, a_job, tmp_path, monkeypatch):
    """One copy of the states below the layers that are converted, one sequence behind them; and the
    layer comes out as where the dense model's states went along from the start."""
    passed: dict[int, int] = {}
    passage = forward.passage

    def counted(checkpoint, family, layer, device, **options):
        around = passage(checkpoint, family, layer, device, **options)

        def run(states_BTD, x_BTD):
            passed[layer] = passed.get(layer, 0) + len(states_BTD)
            around.run(states_BTD, x_BTD)

        return dataclasses.replace(around, run=run)

    monkeypatch.setattr(forward, "passage", counted)
    job = a_job(pico("llama", num_hidden_layers=5), layers="2")
    told = convert(job, tmp_path / "out")
    num_sequences = 512 // 64
    assert [*passed.values()] == [num_sequences, num_sequences, 2 * num_sequences, 1, 1]
    assert told["reopened"]["hidden_state_error"] < 1e-2  # of the last layer, 3 and 4 passed alone

    monkeypatch.setattr(forward, "passage", passage)
    states = []
    passing = layers._pass

    def both(session, layer, states_BTD, *rest):
        states.append(states_BTD.clone())
        return passing(session, layer, states_BTD, *rest)

    monkeypatch.setattr(layers, "_pass", both)
    convert(job, tmp_path / "again")
    converted_BTD, dense_BTD = states[2].split(num_sequences)
    assert torch.equal(converted_BTD, dense_BTD) and not torch.equal(dense_BTD, states[1])


def test_files_of_a_size(pico, a_job, converted, tmp_path):
    """Only how tensors lie in files depends on it, and transformers opens the result."""
    convert(a_job(pico("llama"), max_shard_size="20KB"), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 22_000 for file in files)
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(converted(pico("llama")) / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}


@pytest.mark.parametrize("stratify", [True, False])
def test_calibration_text_is_stratified_unless_the_recipe_says_no(stratify, pico, text):
    folder = pico("llama")
    few = {"tokens": 1024, "sequence_length": 64, "calibration": str(text), "stratify": stratify}
    job = prepare(build(None, {"model": str(folder), **few}, []))
    found = calibration_tokens(job, lambda *_: None)
    amount = packing.Amount(1024, 64)
    known = [
        packing.load(load_tokenizer(folder), str(text), amount, stratify=flag).sha256
        for flag in (stratify, not stratify)
    ]
    assert found.sha256 == known[0] != known[1]
