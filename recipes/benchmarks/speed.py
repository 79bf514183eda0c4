"""Speed of MoE shapes against the dense model they stand for, in transformers on this machine.

    python recipes/benchmarks/speed.py [--hidden 576] [--neurons 1536] [--layers 8] [--active 0.5]

Models have random weights: only shapes matter to time. Every round measures all models in turn,
and the ratio to dense is taken within the round; the median over rounds is printed. The ideal is
the ratio of multiply-adds per token, attention and head included. The dtype is bfloat16 where the
processor has it, else float32, unless `--compute-dtype` names one. With one thread, seconds are
those of the processor, which other programs change least.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import records
import torch
import typer
from transformers import AutoConfig, AutoModelForCausalLM

from moefy.compute_dtype import compute_dtype as choose
from moefy.environment import processor
from moefy.evaluate.timed_rounds import label_rows, timed
from moefy.models import families, targets
from moefy.models.shape import solve
from moefy.models.targets.target import Dense
from moefy.types import Shape

VOCABULARY = 8192


def main(
    hidden: int = 576,
    neurons: int = 1536,
    heads: int = 9,
    layers: int = 8,
    active: float = 0.5,
    experts: str = "8,16,32,64",
    compute_dtype: str = "auto",
    rounds: int = 7,
    threads: int = 1,
) -> None:
    """Print prefill (512 tokens) and decode (batch 1 and 8) speed relative to dense."""
    torch.set_num_threads(threads)
    dense = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 2048,
    }
    cpu = torch.device("cpu")
    chosen = choose(compute_dtype, torch.bfloat16, cpu, float32_bytes=0, room=1)
    print(f"{chosen.name}, {processor()}" + (f": {chosen.note}" if chosen.note else ""))
    clock = time.process_time if threads == 1 else time.perf_counter
    models = {"dense": build(dense, chosen.dtype)}
    ideal = {"dense": 1.0}
    for count in map(int, experts.split(",")):
        shape = solve(neurons, active=active, experts=count)
        for way in ("eager", "grouped_mm"):
            config = targets.load("qwen2_moe").configuration(
                Dense(families.load("llama"), dense), shape
            )
            name = f"{shape} | {way}"
            models[name] = build(config, chosen.dtype, experts_implementation=way)
            ideal[name] = flops(hidden, neurons, layers, None) / flops(
                hidden, neurons, layers, shape
            )
    work = {"prefill 512": (1, 512), "decode 1": (1, 1), "decode 8": (8, 1)}

    def run(name: str, task: str, turn: int) -> dict[Any, float]:
        return {task: measure(models[name], *work[task], clock)}

    seconds = timed([*models], [*work], rounds, run, watch=lambda *_: None)
    ratios = {name: [] for name in models}
    for by_name in seconds.values():
        for row in label_rows(by_name, 1):
            ratios[row["label"]].append(f"{row['ratio']:.2f}")
    del ratios["dense"]
    rows = [[*name.split(" | "), f"{ideal[name]:.2f}", *cells] for name, cells in ratios.items()]
    print(records.table(["shape", "experts", "ideal", *work], rows))


def build(config: dict, dtype: torch.dtype, **options):
    """A model of random weights."""
    config = dict(config)
    settings = AutoConfig.for_model(config.pop("model_type"), **config)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(settings, dtype=dtype, **options).eval()


def measure(model, batch: int, length: int, clock: Callable[[], float]) -> float:
    """Seconds for one prefill, or per decode step after a prefill of 64 tokens."""
    with torch.inference_mode():
        if length > 1:
            ids_BT = torch.randint(VOCABULARY, (batch, length))
            start = clock()
            model(ids_BT, use_cache=False, logits_to_keep=1)
            return clock() - start
        out = model(torch.randint(VOCABULARY, (batch, 64)), use_cache=True, logits_to_keep=1)
        start = clock()
        for _ in range(8):
            token_B1 = out.logits[:, -1:].argmax(-1)
            out = model(token_B1, cache=out.cache, use_cache=True)
        return (clock() - start) / 8


def flops(hidden: int, neurons: int, layers: int, shape: Shape | None) -> float:
    """Multiply-adds per token in matrices."""
    used = neurons if shape is None else shape.num_active
    router = 0 if shape is None else shape.num_experts * hidden
    return layers * (4 * hidden * hidden + 3 * hidden * used + router) + VOCABULARY * hidden


if __name__ == "__main__":
    typer.run(main)
