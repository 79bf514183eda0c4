"""Peak memory and seconds per layer of converting a large checkpoint of random weights.

    python benchmarks/large.py --out DIR [--layers 24] [--tokens 4096]

Writes a 7B-shaped llama checkpoint (4096 / 11008, 32 heads, bfloat16) into DIR if it is not there,
converts it in a process of its own, and prints what that process says of itself. The weights are
random, so only memory and time mean anything.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import typer

from moefy.publish import write_json
from moefy.shards import CODES, ShardWriter, Slot

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def main(
    out: Path,
    tokenizer: Path = typer.Option(..., help="Folder whose tokenizer files are used."),
    calibration: Path = typer.Option(..., help="Text file."),
    layers: int = 24,
    tokens: int = 4096,
) -> None:
    """Make the checkpoint, convert it, print memory and time."""
    dense = out / "dense"
    if not (dense / "config.json").exists():
        make(dense, tokenizer, layers)
    weights = sum(file.stat().st_size for file in dense.glob("*.safetensors"))
    command = [sys.executable, "-m", "moefy", "convert", str(dense), str(out / "moe"), "--force"]
    command += ["--calibration", str(calibration), "--tokens", str(tokens), "--json"]
    run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    summary = json.loads(run.stdout)
    seconds, peak = summary["seconds"], summary["peak_resident_bytes"]
    blocks = [layer["seconds"] for layer in summary["layers"]]
    print(f"dense weights {weights / 1e9:.1f} GB in {layers} layers")
    print(f"peak resident memory {peak / 1e9:.2f} GB, {weights / peak:.1f} times less")
    print(f"{tokens} tokens; seconds: {seconds}")
    print(
        f"per layer {seconds['layers'] / layers:.1f} s, of which the FFN's conversion "
        f"{sum(blocks) / len(blocks):.1f} s"
    )
    print(f"reopened {summary['reopened']}")


def make(folder: Path, tokenizer: Path, layers: int) -> None:
    """Write the dense checkpoint, one tensor in memory at a time."""
    folder.mkdir(parents=True)
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    hidden, neurons = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{n}_proj.weight": (hidden, hidden) for n in "qkvo"}
        shapes |= {f"{prefix}mlp.{n}_proj.weight": (neurons, hidden) for n in ("gate", "up")}
        shapes[prefix + "mlp.down_proj.weight"] = (hidden, neurons)
        shapes[prefix + "input_layernorm.weight"] = (hidden,)
        shapes[prefix + "post_attention_layernorm.weight"] = (hidden,)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}
    slots = {name: Slot(CODES[torch.bfloat16], shape) for name, shape in shapes.items()}
    writer = ShardWriter(folder, slots)
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        tensor = torch.ones(shape)
        if len(shape) == 2:
            tensor = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        writer.write(name, tensor.bfloat16())
    writer.finish()
    config = {"vocab_size": vocabulary, "num_hidden_layers": layers, "dtype": "bfloat16"}
    write_json(folder / "config.json", {**CONFIG, **config})


if __name__ == "__main__":
    typer.run(main)
