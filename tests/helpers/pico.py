"""Tiny dense models, a tokenizer, a text, a recipe, and the records of a fine-tune, on disk."""

import hashlib
import json
import random
import string
from pathlib import Path

PICO = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.5,
    "residual_multiplier": 0.7,
    "logits_scaling": 2.0,
}
RECIPE = """model = "{model}"
calibration = "{text}"
tokens = 512
sequence_length = 64

[finetune]
data = "{text}"
tokens = 512
sequence_length = 64
batch_size = 2
validation_tokens = 128
save_every = 2

[report]
text = "{text}"
effort = "quick"
speed = false
"""
"""The stages of `moefy run`, small; what is appended is of the report."""

ONE_SLIDING = {
    "sliding_window": 16,
    "layer_types": ["full_attention", "sliding_attention"],
}
GROWING = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "llama_4_scaling_beta": 0.5,
}
T5 = {"d_ff": 96, "d_kv": 16, "num_decoder_layers": 2, "decoder_start_token_id": 0}
T5 |= {"pad_token_id": 0, "eos_token_id": 1}
FAMILY = {
    "arcee": {},
    "bert": {},
    "camembert": {"pad_token_id": 1},
    "cohere": {},
    "cohere2": ONE_SLIDING,
    "cwm": {"head_dim": 8, **ONE_SLIDING},
    "distilbert": {"hidden_dim": 96},
    "ernie4_5": {"head_dim": 16},
    "exaone": {},
    "exaone4": ONE_SLIDING,
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, **ONE_SLIDING},
    "gemma3_text": {"head_dim": 16, **ONE_SLIDING},
    "glm": {"head_dim": 16},
    "glm4": {"head_dim": 16},
    "gpt2": {"n_inner": 96},
    "gpt_neox": {},
    "granite": MULTIPLIERS,
    "granitemoehybrid": MULTIPLIERS
    | {
        "layer_types": ["full_attention", "full_attention"],
        "position_embedding_type": "rope",
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
        "mamba_n_heads": 2,
    },
    "helium": {"head_dim": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hyperclovax": MULTIPLIERS,
    "internlm3": {"head_dim": 8},
    "iquestcoder": {"head_dim": 8},
    "jais2": {},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "llama": {},
    "ministral": {"head_dim": 8, **ONE_SLIDING},
    "ministral3": {"head_dim": 8, "sliding_window": None, "rope_parameters": GROWING},
    "mistral": {"sliding_window": None},
    "mt5": T5,
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": ONE_SLIDING,
    "opt": {"ffn_dim": 96, "num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},  # not hidden_size / num_attention_heads, as in real ones
    "qwen3_5_text": {
        "head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "roberta": {"pad_token_id": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True},
    "starcoder2": {"sliding_window": None},
    "t5": T5,
    "vaultgemma": {"head_dim": 16, **ONE_SLIDING},
    "xlm-roberta": {"pad_token_id": 1},
}
SPACE, NEWLINE = "\u0120", "\u010a"  # as byte-level tokenizers write them
PAIRS = "th he in er an re on at en nd st es ng of te ed or ti hi as to it is ar".split()
PAIRS += [SPACE + letter for letter in "tswcnmo"]
WORDS = (
    "river stone garden winter letter market signal copper engine harbour meadow lantern window "
    "painter doctor farmer captain teacher sister merchant carries finds repairs remembers sells "
    "follows measures watches paints counts old quiet distant broken heavy narrow green early "
    "slowly again today often together the a this every near under behind without after beside"
).split()


def build_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of 128 pieces, which knows ASCII text and nothing else."""
    # Not a class of no family: AutoTokenizer would put this one in its place for qwen2.
    from transformers import Qwen2Tokenizer

    visible = sorted(set(string.printable) - set(string.whitespace))
    pieces = ["<|endoftext|>", SPACE, NEWLINE, *visible, *PAIRS]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[(first, second) for first, second in PAIRS],
    )
    assert len(tokenizer) == PICO["vocab_size"]
    tokenizer.save_pretrained(folder)


def build_model(folder: Path, model_type: str, overrides: dict) -> None:
    """Save a random model in which every tensor matters: norms are not one, biases not zero."""
    import torch
    from transformers import AutoConfig

    from moefy.models import families
    from moefy.models.load import auto_class

    values = PICO | FAMILY.get(model_type, {}) | overrides
    task = values.pop("task", families.load(model_type).tasks[0])
    config = AutoConfig.for_model(model_type, **values)
    generator = torch.Generator().manual_seed(0)
    model = auto_class(task).from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.lower().endswith("norm.weight"):
            parameter.data = 1 + 0.2 * noise
        elif parameter.ndim == 1:
            parameter.data = 0.2 * noise
        else:
            parameter.data = noise / parameter.shape[1] ** 0.5
    model.save_pretrained(folder)


def write_text(file: Path) -> None:
    """Write 40 documents, some 4,000 words, with two blank lines between documents."""
    dice = random.Random(0)

    def sentence() -> str:
        words = [dice.choice(WORDS) for _ in range(dice.randint(6, 14))]
        return " ".join(words).capitalize() + "."

    documents = [" ".join(sentence() for _ in range(10)) for _ in range(40)]
    file.write_text("\n\n\n".join(documents) + "\n", encoding="utf-8")


def sha256_of(folder: Path, *patterns: str) -> dict[str, str]:
    """The digests of the files below a folder, by their names from there."""
    files = [file for pattern in patterns for file in folder.rglob(pattern) if file.is_file()]
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }


def write_tuning(run: Path, parent: Path | None = None, **more: object) -> dict:
    """Make a run of ours one that `moefy finetune` wrote from `parent`, and give its report."""
    checks = {"before": {"loss": 3.0, "kl": 0.5}, "after": {"loss": 2.5, "kl": 0.2}}
    started = sha256_of(parent, "model*.safetensors") if parent else {}
    report = {
        "format": 1,
        "parent": {"folder": str(parent or "nowhere"), "files": started},
        "teacher": {"model": "teacher", "files": {}},
        "train": {"source": "train.txt"},
        "settings": {},
        "tokens": 1000,
        "steps": 2,
        "seconds": 1.0,
        "validation": checks,
        "routing": {},
        "guard": [],
        "outputs": {k: v for k, v in sha256_of(run, "*").items() if k != "README.md"},
    } | more
    (run / "moefy" / "finetune.json").write_text(json.dumps(report))
    return report
