"""vLLM computes from a written folder what transformers computes, to the rounding of float32.

vLLM requires a torch and a transformers of its own, so it runs in another environment, which
`make test-engines` builds; MOEFY_VLLM_PYTHON names its interpreter. Without it nothing runs here.

Greedy tokens must be equal, and log-probabilities, over the whole vocabulary and at every position,
within `CLOSE`: they were within 6e-6 when this was measured. A planted fault moves them by `FAULT`
or more: by 2 to 4, when these were measured.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from stock import HELD, UNLIKE, Plant, planted
from transformers import AutoModelForCausalLM

from moefy.models import targets
from moefy.models.engines import VLLM
from moefy.models.shape import no_shared

PYTHON = os.environ.get("MOEFY_VLLM_PYTHON")
pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif(not PYTHON, reason="MOEFY_VLLM_PYTHON names no interpreter"),
]
DRIVER = Path(__file__).with_name("vllm_driver.py")
CLOSE, FAULT = 1e-4, 0.1
EXPERTS, VOCABULARY = 6, 128
LENGTHS, NEW_TOKENS = (1, 7, 20, 40), 16
SOME_WINDOWS = (("ministral", "qwen2_moe"), ("cwm", "qwen2_moe"))
LLAMAS = ("exaone", "helium", "internlm3", "iquestcoder")  # written as Llama is
PAIRS = [
    (family, target)
    for family, target in HELD
    if target in VLLM.classes
    and family != "gemma"  # GELU, which it refuses
    and family not in LLAMAS
    and (family, target) not in (("qwen2", "granitemoeshared"), *SOME_WINDOWS)
]
"""Families and classes that vLLM runs; what it does with the others is told below."""

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
Ask = Callable[..., list[dict]]


class Refused(Exception):
    """vLLM raised this."""


def prompts() -> list[list[int]]:
    dice = torch.Generator().manual_seed(2)
    return [torch.randint(1, VOCABULARY, (n,), generator=dice).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory) -> Iterator[Ask]:
    """`vllm(folder, **overrides)`: tokens and log-probabilities for every prompt."""
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    command = [str(PYTHON), str(DRIVER)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with log.open("w") as errors, subprocess.Popen(command, stderr=errors, **pipes) as driver:

        def ask(folder: Path, **overrides: object) -> list[dict]:
            asked = {"folder": str(folder), "prompts": prompts(), "new_tokens": NEW_TOKENS}
            driver.stdin.write(json.dumps(asked | {"overrides": overrides}) + "\n")
            line = driver.stdout.readline()
            assert line, log.read_text()
            reply = json.loads(line)
            if isinstance(reply, dict):
                raise Refused(reply["error"])
            return reply

        yield ask


def stock(folder: Path, **options: object) -> list[dict]:
    """What transformers makes of the same prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    greedy = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None}
    found = []
    for prompt in prompts():
        ids_BT = model.generate(torch.tensor([prompt]), **greedy)
        with torch.inference_mode():
            logprobs_TV = model(ids_BT).logits[0, :-1].log_softmax(-1)
        found.append({"tokens": ids_BT[0, len(prompt) :].tolist(), "logprobs": logprobs_TV})
    return found


def distance(found: list[dict], expected: list[dict]) -> float:
    """Greatest difference of two log-probabilities where the tokens before are the same."""
    gaps = []
    for one, other in zip(found, expected, strict=True):
        pairs = enumerate(zip(one["tokens"], other["tokens"], strict=True))
        same = next((place for place, (a, b) in pairs if a != b), NEW_TOKENS)
        gap_TV = torch.tensor(one["logprobs"]) - other["logprobs"]
        gaps.append(gap_TV[: len(gap_TV) - NEW_TOKENS + same + 1])
    return max(float(gap_TV.abs().max()) for gap_TV in gaps)


def assert_alike(found: list[dict], expected: list[dict]) -> None:
    assert [one["tokens"] for one in found] == [one["tokens"] for one in expected]
    assert distance(found, expected) < CLOSE


def wide(family: str, target: str) -> dict:
    """Sizes with heads that vLLM's attention on a CPU knows: 32, 64, 80, 96, 112, 128 or more."""
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    own = {"head_dim": 64 if family == "qwen3" else 32}
    return heads | own | UNLIKE.get((family, target), {})


def one_of(target: str) -> str:
    """A family that the class holds."""
    return next(family for family, held in reversed(PAIRS) if held == target)


def recipe(target: str) -> dict:
    """Two experts for each token, and a quarter of the neurons shared where they can be."""
    known = targets.load(target)
    if target not in VLLM.classes:
        pytest.skip(f"vLLM does not run {target}")
    active = 1 / 2 if known.fits is not no_shared else 2 / EXPERTS
    return {"target": target, "experts": EXPERTS, "top_k": 2, "active": active}


# --- what vLLM computes --------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "target"), PAIRS)
def test_tokens_and_log_probabilities(family, target, pico, converted, vllm):
    moe = converted(pico(family, **wide(family, target)), **recipe(target))
    assert_alike(vllm(moe), stock(moe))


@pytest.mark.parametrize(("family", "target"), [("llama", "qwen2_moe"), ("llama", "glm4_moe")])
def test_a_layer_left_dense(family, target, pico, converted, vllm):
    first = ":1" if target == "qwen2_moe" else "1:"
    moe = converted(pico(family, **wide(family, target)), layers=first, **recipe(target))
    assert_alike(vllm(moe), stock(moe))


@pytest.mark.parametrize("target", sorted({target for _, target in PAIRS}))
def test_a_tied_head(target, pico, converted, vllm):
    family = one_of(target)
    dense = pico(family, **wide(family, target), tie_word_embeddings=True)
    moe = converted(dense, **recipe(target))
    assert_alike(vllm(moe), stock(moe))


SAID = {
    "window of all layers": ("mistral", {"sliding_window": 16}, "qwen2_moe"),
    "window of all layers, mixtral": ("mistral", {"sliding_window": 16}, "mixtral"),
    "llama3 frequencies": ("llama", {"rope_parameters": LLAMA3}, "qwen2_moe"),
    "llama3 frequencies, mixtral": ("llama", {"rope_parameters": LLAMA3}, "mixtral"),
    "half of each head rotated": (
        "phi3",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000.0,
                "partial_rotary_factor": 0.5,
            }
        },
        "glm4_moe",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_what_a_configuration_says_is_kept(name, pico, converted, vllm):
    family, changes, target = SAID[name]
    moe = converted(pico(family, **wide(family, target) | changes), **recipe(target))
    assert_alike(vllm(moe), stock(moe))


@pytest.mark.parametrize("experts", [1, 4, EXPERTS])
@pytest.mark.parametrize("target", ["qwen2_moe", "glm4_moe", "flex_olmo"])
def test_another_number_of_experts_per_token(target, experts, pico, converted, vllm):
    family = one_of(target)
    moe = converted(pico(family, **wide(family, target)), **recipe(target))
    found = vllm(moe, num_experts_per_tok=experts)
    assert_alike(found, stock(moe, num_experts_per_tok=experts))
    assert distance(found, stock(moe)) > FAULT


# --- what it does not ----------------------------------------------------------------------------


def test_a_sliding_window_of_one_layer_is_ignored(pico, converted, vllm):
    """Without a word, where vLLM refuses the dense class."""
    window = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}
    moe = converted(pico("qwen2", **wide("qwen2", "qwen2_moe") | window), **recipe("qwen2_moe"))
    found = vllm(moe)
    assert distance(found, stock(moe, layer_types=["full_attention"] * 2)) < CLOSE
    assert distance(found[:1], stock(moe)[:1]) < CLOSE  # no longer than the window
    assert distance(found, stock(moe)) > FAULT


def test_biases_of_a_granite_model_are_ignored(pico, converted, vllm):
    target = "granitemoeshared"
    moe = converted(pico("qwen2", **wide("qwen2", target)), **recipe(target))
    assert distance(vllm(moe), stock(moe)) > FAULT


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu_pytorch_tanh"}, "Only silu is supported"),
        ({"head_dim": 16}, "exceeds dimension size"),
    ],
)
def test_what_vllm_refuses(changes, said, pico, converted, vllm):
    moe = converted(pico("llama", **wide("llama", "qwen2_moe") | changes), **recipe("qwen2_moe"))
    with pytest.raises(Refused, match=said):
        vllm(moe)


# --- that a fault would be seen ------------------------------------------------------------------


def other_experts(tensors: dict[str, torch.Tensor], config: dict) -> None:
    """Each expert gets the tokens of another."""
    shape = (EXPERTS, config["hidden_size"])
    routers = [name for name, tensor in tensors.items() if tensor.shape == shape]
    assert len(routers) == config["num_hidden_layers"]
    tensors.update({name: tensors[name].roll(1, 0) for name in routers})


def one_expert_less(tensors: dict[str, torch.Tensor], config: dict) -> None:
    config[next(key for key in ("num_experts_per_tok", "moe_k") if key in config)] -= 1


@pytest.mark.parametrize("plant", [other_experts, one_expert_less])
@pytest.mark.parametrize("target", sorted({target for _, target in PAIRS}))
def test_a_planted_fault_is_seen(target, plant: Plant, pico, converted, vllm, tmp_path):
    family = one_of(target)
    moe = converted(pico(family, **wide(family, target)), **recipe(target))
    folder = planted(moe, tmp_path / "planted", plant)
    assert distance(vllm(folder), stock(moe)) > FAULT
