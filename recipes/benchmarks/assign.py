"""Balanced assignment on a device: how far it stays below the optimum, and how long both take.

    python recipes/benchmarks/assign.py [--device cuda] [--model MODEL --text FILE]

The optimum is that of `assign_balanced` on the CPU. Random values have heavy tails: the scales of
neurons are log-normal, and each prefers a few experts. With MODEL, a dense llama, a layer is split,
too, and all its assignments are compared: means of seconds, and the largest loss. Seconds are those
of the processor, with a GPU those of the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import records
import torch
import typer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from moefy.convert.assign import assign_balanced
from moefy.convert.assign_on_device import assign_on_device
from moefy.convert.partition import alternating
from moefy.convert.profile import Inputs, observe
from moefy.types import FFN, Shape

HEADER = ["values", "F", "E", "exact, s", "device, s", "below the optimum"]
TOKENS, LENGTH = 2048, 256


def main(
    device: str = "cpu",
    neurons: str = "11008,28672",
    experts: str = "8,32,128",
    model: Annotated[Path | None, typer.Option(help="A dense llama.")] = None,
    text: Annotated[Path | None, typer.Option(help="What it reads.")] = None,
    layer: int = 12,
) -> None:
    """Print the table."""
    where, rows = torch.device(device), []
    assign_on_device(heavy_tails(64, 8).to(where), 8)  # what the first call loads
    counts = [int(number) for number in experts.split(",")]
    for num_rows in map(int, neurons.split(",")):
        for count in counts:
            value_FE = heavy_tails(num_rows, count)
            rows.append(["random", num_rows, count, *compared([value_FE], where)])
    if model and text:
        ffn, x_TD = taken(model, text, layer)
        for count in counts:
            values = asked(ffn, x_TD, count)
            name = f"{model.name}, layer {layer}, {len(values)} assignments"
            rows.append([name, len(values[0]), count, *compared(values, where)])
    print(records.table(HEADER, rows))


def heavy_tails(num_rows: int, num_columns: int) -> Tensor:
    """Energies of neurons, of very different sizes, on the tokens of experts (F, E)."""
    dice = np.random.default_rng(0)
    scale_F1 = np.exp(2 * dice.normal(size=(num_rows, 1)))
    return torch.from_numpy(scale_F1 * dice.gamma(0.5, size=(num_rows, num_columns)))


def compared(values: list[Tensor], device: torch.device) -> tuple[str, str, str]:
    """Mean seconds of the optimum and of the device, and the largest part that is lost."""
    seconds, lost = [], 0.0
    for value_FE in values:
        width, there_FE = len(value_FE) // value_FE.shape[1], value_FE.to(device)
        exact, best_F = timed(partial(assign_balanced, value_FE.numpy(), width))
        near, near_F = timed(partial(assign_on_device, there_FE, width))
        objectives = [
            float(value_FE.double().gather(1, torch.as_tensor(column_F).cpu()[:, None]).sum())
            for column_F in (best_F, near_F)
        ]
        seconds.append((exact, near))
        lost = max(lost, 1 - objectives[1] / objectives[0])
    exact, near = np.mean(seconds, axis=0)
    return f"{exact:.2f}", f"{near:.3f}", f"{max(lost, 0):.0e}" if lost > 1e-12 else "0"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds of a call, and what it gives."""
    clock = time.perf_counter if torch.cuda.is_initialized() else time.process_time
    start = clock()
    result = work()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return clock() - start, result


def taken(model: Path, text: Path, layer: int) -> tuple[FFN, Tensor]:
    """A dense llama's FFN, and what enters it on some text."""
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer, seen = AutoTokenizer.from_pretrained(model), []
    ids = tokenizer(text.read_text()[: 20 * TOKENS], return_tensors="pt").input_ids[0, :TOKENS]
    mlp = dense.model.layers[layer].mlp.requires_grad_(False)
    mlp.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.inference_mode():
        dense.model(ids.view(-1, LENGTH))
    weights = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    return FFN(*weights), seen[0].flatten(0, 1)


def asked(ffn: FFN, x_TD: Tensor, num_experts: int) -> list[Tensor]:
    """All values that a split into a third that is shared and `num_experts` assigns."""
    width = ffn.num_neurons * 2 // 3 // num_experts
    num_shared = ffn.num_neurons - num_experts * width
    shape = Shape(ffn.num_neurons, num_shared, num_experts, width, num_experts // 4)
    values: list[Tensor] = []
    assign = alternating.assign

    def keep(value_FE: Tensor, width: int) -> Tensor:
        values.append(value_FE)
        return assign(value_FE, width)

    alternating.assign = keep
    profile = observe(ffn, Inputs(x_TD, len(x_TD) // 8))
    alternating.split(ffn, profile, shape, generator=torch.Generator().manual_seed(0))
    alternating.assign = assign
    return values


if __name__ == "__main__":
    typer.run(main)
