"""Speed of expert widths, from 16 neurons to 1,024, for the FFNs of five model sizes.

    python recipes/benchmarks/widths.py ENGINE DTYPE [--sizes 576,896] [--out FILE] [--rounds 3]
    python recipes/benchmarks/widths.py table|fit build/widths.jsonl

ENGINE is `transformers` (DTYPE bfloat16 or float32), `llama.cpp` (bf16, q8_0, q4_0, q4_k; needs
`pip install xllamacpp gguf`) or `vLLM` (bfloat16; `--python` is an interpreter that has it, as
`make test-engines` installs it). Weights are random: only shapes matter to time. Every round
measures the dense model and all shapes in turn. Seconds are those of the processor, on one thread;
medians over rounds are kept, one line of JSON for each shape, and what is in the file already is
not measured again. A model has as many layers as its size needs to be larger than caches.
"""

from __future__ import annotations

import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import records
import torch
import typer
from scipy.optimize import nnls

from moefy.environment import processor
from moefy.models.cost import Cost, Layer, counts
from moefy.types import Shape

VOCABULARY = 1024
TASKS = {"prefill 512": (1, 512), "decode 1": (1, 1), "decode 8": (8, 1), "decode 32": (32, 1)}
STEPS = {1: 16, 8: 6, 32: 3}
"""Decode steps by batch."""

ROW = {"q8_0": 32, "q4_0": 32, "q4_k": 256}
"""Weights of a row that a type packs together."""

Run = Callable[[str], float]
"""Seconds of the processor for a task: of the prompt, or of one decode step."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A dense model's sizes, and the part of its FFN that is shared: about a third, or two."""

    hidden: int
    neurons: int
    heads: int
    key_heads: int
    layers: int
    shared: tuple[int, int]
    widths: tuple[int, ...]


SIZES = {
    "576": Size(576, 1536, 9, 3, 30, (512, 1024), (16, 32, 64, 128, 256)),
    "896": Size(896, 4864, 14, 2, 8, (1792, 3328), (16, 32, 64, 128, 256, 512)),
    "1536": Size(1536, 8960, 12, 2, 3, (2816, 5888), (32, 64, 128, 256, 512, 1024)),
    "4096": Size(4096, 11008, 32, 32, 2, (3840, 7424), (32, 64, 128, 256, 512, 1024)),
    "4096w": Size(4096, 14336, 32, 8, 2, (5120, 9728), (64, 128, 256, 512, 1024)),
}


def shapes(size: Size, few: bool) -> list[Shape]:
    """What is measured of a size: all widths at a half, some at three quarters."""
    third, more = size.shared
    asked = [(0.5, third, width) for width in size.widths]
    some = size.widths[1::2]
    asked += [(0.75, shared, width) for shared in (third, more) for width in some]
    return [_shape(size.neurons, *one) for one in (asked[:: 2 if few else 1])]


def _shape(neurons: int, active: float, shared: int, width: int) -> Shape:
    count = (neurons - shared) // width
    per_token = max(1, round((active * neurons - shared) / width))
    return Shape(neurons, neurons - count * width, count, width, per_token)


def main(
    engine: str,
    dtype: str,
    sizes: str = ",".join(SIZES),
    tasks: str = ",".join(TASKS),
    out: Path = Path("build/widths.jsonl"),
    rounds: int = 3,
    few: bool = False,
    python: Path = typer.Option(None, help="Interpreter that has vLLM."),
) -> None:
    """Measure; or print the table of what was measured, or the constants fitted to it."""
    if engine in ("table", "fit"):
        print({"table": table, "fit": fitted}[engine](records.read(Path(dtype))))
        return
    torch.set_num_threads(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in sizes.split(","):
        measure(engine, dtype, name, tasks.split(","), out, rounds, few, python)


def measure(
    engine: str,
    dtype: str,
    name: str,
    tasks: list[str],
    out: Path,
    rounds: int,
    few: bool,
    python: Path | None,
) -> None:
    """Measure what of a size the file lacks."""
    known = {_key(record) for record in records.read(out)}
    size = SIZES[name]
    shared = {"engine": engine, "dtype": dtype, "size": name}
    lacking = [
        shape
        for shape in shapes(size, few)
        if any((engine, dtype, name, str(shape), task) not in known for task in tasks)
        and shape.expert_width % ROW.get(dtype, 1) == 0
        and (engine != "llama.cpp" or shape.experts_per_token <= 32)
    ]
    if not lacking:
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            shape: opened(engine, dtype, size, shape, Path(folder), python)
            for shape in (None, *lacking)
        }
        seconds: dict[Any, list[float]] = {}
        for turn, task in itertools.product(range(rounds), tasks):
            for shape, run in runs.items():
                seconds.setdefault((shape, task), []).append(run(task))
            typer.echo(f"{engine} {dtype} {name}: round {turn + 1}, {task}", err=True)
    for shape, task in itertools.product(lacking, tasks):
        dense, own = seconds[None, task], seconds[shape, task]
        record = {
            "layers": size.layers,
            "ratio": median(a / b for a, b in zip(dense, own, strict=True)),
            "seconds": median(own),
            "dense_seconds": median(dense),
            "rounds": rounds,
            "processor": processor(),
        }
        records.append(out, {**shared, "shape": dataclasses.asdict(shape), "task": task, **record})


def _key(record: dict[str, Any]) -> tuple[str, ...]:
    shape = str(Shape(**record["shape"]))
    return (record["engine"], record["dtype"], record["size"], shape, record["task"])


def _group(record: dict[str, Any]) -> tuple[str, ...]:
    """What has constants of its own."""
    return (record["engine"], record["dtype"], record["processor"])


def opened(
    engine: str, dtype: str, size: Size, shape: Shape | None, folder: Path, python: Path | None
) -> Run:
    """A model of random weights in an engine, and how long it takes for a task."""
    place = folder / str(shape or "dense").replace(" ", "")
    if engine == "transformers":
        return _transformers(_model(dtype, size, shape), shape)
    if engine == "vLLM":
        _model(dtype, size, shape).save_pretrained(place)
        return _vllm(dtype, place, python)
    return _llama_cpp(dtype, size, shape, place)


def _model(dtype: str, size: Size, shape: Shape | None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from moefy.models import families, targets
    from moefy.models.targets.target import Dense

    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": size.hidden,
        "intermediate_size": size.neurons,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.key_heads,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": 2048,
    }
    if shape:
        values = targets.load("qwen2_moe").configuration(
            Dense(families.load("llama"), values), shape
        )
    settings = AutoConfig.for_model(values.pop("model_type"), **values)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, dtype)).eval()
    noise_N = 0.02 * torch.randn(999_983, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():  # no row as any other, in little time
        size = parameter.numel()
        values_N = noise_N.repeat(-(-size // len(noise_N)))[:size]
        values_N = values_N if parameter.ndim > 1 else torch.ones(size)
        parameter.data.copy_(values_N.view(parameter.shape))
    return model


def _transformers(model: Any, shape: Shape | None) -> Run:
    def run(task: str) -> float:
        batch, length = TASKS[task]
        ways = ("grouped_mm", "eager") + ("batched_mm",) * (batch == 1 == length)
        taken = []
        for way in ways if shape else ways[:1]:
            if shape:
                model.set_experts_implementation(way)
            taken.append(_step(model, batch, length))
        return min(taken)

    return run


@torch.inference_mode()
def _step(model: Any, batch: int, length: int) -> float:
    """Seconds for one prefill, or per decode step behind a short prompt."""
    if length > 1:
        ids_BT = torch.randint(VOCABULARY, (batch, length))
        start = time.process_time()
        model(ids_BT, use_cache=False, logits_to_keep=1)
        return time.process_time() - start
    output = model(torch.randint(VOCABULARY, (batch, 16)), use_cache=True, logits_to_keep=1)
    start = time.process_time()
    for _ in range(STEPS[batch]):
        ids_B1 = torch.randint(VOCABULARY, (batch, 1))
        output = model(ids_B1, cache=output.cache, use_cache=True)
    return (time.process_time() - start) / STEPS[batch]


def _vllm(dtype: str, folder: Path, python: Path | None) -> Run:
    import vllm_speed

    options = {"dtype": dtype, "eager": False, "cache_mib": 1024, "repeats": 3}
    options |= {"prefill": 512, "steps": 16, "clock": "process_time"}
    options |= {"batches": [batch for batch, length in TASKS.values() if length == 1]}
    left: dict[str, float] = {}

    def run(task: str) -> float:
        if task not in left:  # a process measures all of them
            left.update(vllm_speed.measure(python, 1, folder, options))
        batch, length = TASKS[task]
        return batch * length / left.pop(task)

    return run


def _llama_cpp(kind: str, size: Size, shape: Shape | None, file: Path) -> Run:
    import random_gguf

    from moefy.evaluate.llama_cpp import serve

    random_gguf.write(file, dataclasses.asdict(size), shape, kind, VOCABULARY)
    server = serve(file, 1, parallel=32, context=64, shared=True)
    dice = torch.Generator().manual_seed(0)

    def answered(prompts: list[list[int]], new_tokens: int) -> float:
        asked = {"n_predict": new_tokens, "ignore_eos": True, "cache_prompt": False}
        asked |= {"temperature": 1.0, "samplers": [], "seed": 1}
        start = time.process_time()
        with ThreadPoolExecutor(len(prompts)) as pool:
            list(pool.map(lambda ids: server.handle_completions({"prompt": ids, **asked}), prompts))
        return time.process_time() - start

    def run(task: str) -> float:
        batch, length = TASKS[task]
        ids_BT = torch.randint(VOCABULARY, (batch, max(length, 2)), generator=dice)
        if length > 1:
            return answered(ids_BT.tolist(), 1)
        few, many = 2, 2 + STEPS[batch] * 2
        return (answered(ids_BT.tolist(), many) - answered(ids_BT.tolist(), few)) / (many - few)

    return run


def counted(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """What the constants of the cost model count in the model of a row, and in its dense model.

    llama.cpp reads a prompt's FFNs but in the last layer, where only the last token goes on.
    """
    size, shape = SIZES[row["size"]], Shape(**row["shape"])
    other = int(2 * size.hidden**2 * (1 + size.key_heads / size.heads))
    layer = Layer(size.hidden, size.neurons, other)
    batch, length = TASKS[row["task"]]
    skipped = row["engine"] == "llama.cpp" and length > 1
    both = []
    for one in (shape, None):
        full = np.array(counts(layer, one, batch * length), dtype=float)
        last = np.array(counts(layer, one, 1), dtype=float)
        attention = np.array([other, other * length, 0, 0, 0, 0, 0]) * skipped
        last = last + attention if skipped else full
        both.append((row["layers"] - 1) * full + last)
    return both[0], both[1]


def ideal_of(row: dict[str, Any]) -> float:
    """The ratio of multiply-adds."""
    moe, dense = counted(row)
    return dense[1] / moe[1]


def constants(rows: list[dict[str, Any]]) -> np.ndarray:
    """The cost model's, in nanoseconds, of least squares in relative time, none below zero."""
    counted_R = [(both, row) for row in rows for both in [counted(row)]]
    lines = [moe / (1e9 * row["seconds"]) * 1e9 for (moe, _), row in counted_R]
    lines += [dense / (1e9 * row["dense_seconds"]) * 1e9 for (_, dense), row in counted_R]
    lines_RC = np.array(lines)
    scale_C = lines_RC.max(0) + 1e-30
    found, _ = nnls(lines_RC / scale_C, np.ones(len(lines_RC)))
    return found / scale_C * 1e9


def errors(rows: list[dict[str, Any]], constants_C: np.ndarray) -> list[float]:
    """Of the predicted ratio to dense, relative to the measured one."""
    result = []
    for row in rows:
        moe, dense = counted(row)
        result.append(float(dense @ constants_C / (moe @ constants_C)) / row["ratio"] - 1)
    return result


def fitted(rows: list[dict[str, Any]]) -> str:
    """Constants by engine, type and processor, with their error on what they were fitted to or not.

    Each size is left out of a fit in turn, and its ratios are predicted by that fit.
    """
    lines = []
    latest = {(_group(row), _key(row)): row for row in rows}
    for group in sorted({group for group, _ in latest}):
        own = [row for (of, _), row in latest.items() if of == group]
        found = constants(own)
        inside = [abs(error) for error in errors(own, found)]
        outside = []
        for name in {row["size"] for row in own}:
            others = [row for row in own if row["size"] != name]
            left_out = [row for row in own if row["size"] == name]
            if others:
                outside += [abs(error) for error in errors(left_out, constants(others))]
        cells = [f"{median(inside):.0%}", f"{max(inside):.0%}"]
        cells += [f"{median(outside):.0%}", f"{max(outside):.0%}"] if outside else ["", ""]
        lines.append([*group, len(own), *(f"{c:.3g}" for c in found), *cells])
    names = [field.name for field in dataclasses.fields(Cost)]
    header = ["engine", "type", "processor", "ratios", *names, "median", "worst"]
    return records.table([*header, "left out: median", "worst"], lines)


def table(rows: list[dict[str, Any]]) -> str:
    """Ratios to dense by shape, and as a part of what the multiply-adds allow."""
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        *key, task = row["processor"], *_key(row)
        cells.setdefault(tuple(key), {})[task] = (
            f"{row['ratio']:.2f} ({row['ratio'] / ideal_of(row):.0%})"
        )
    lines = [[*key, *(by_task.get(task, "") for task in TASKS)] for key, by_task in cells.items()]
    return records.table(["processor", "engine", "dtype", "hidden", "shape", *TASKS], lines)


if __name__ == "__main__":
    typer.run(main)
