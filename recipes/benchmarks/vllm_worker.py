"""Times one folder in vLLM and prints tokens per second, in JSON. Run by `vllm_speed.py`."""

from __future__ import annotations

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # no time goes into talking to another process
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

import json
import random
import sys
import time
from pathlib import Path
from statistics import median

# Whatever is printed on the way goes to standard error.
RESULT = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from vllm import LLM, SamplingParams  # noqa: E402

PROMPT = 32


def main(
    folder: str,
    prefill: int,
    steps: int,
    repeats: int,
    batches: list[int],
    clock: str = "perf_counter",
    **options: object,
) -> None:
    """Print tokens per second, by a clock of the module time, in decode and prefill."""
    now = getattr(time, clock)
    llm = load(folder, max(prefill, PROMPT + steps) + 1, max(batches), **options)
    vocabulary = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    dice = random.Random(0)

    def seconds(batch: int, length: int, new: int) -> float:
        prompts = [[dice.randrange(vocabulary) for _ in range(length)] for _ in range(batch)]
        greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = now()
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], greedy, use_tqdm=False)
        return now() - start

    def decode(batch: int) -> float:
        # What a longer answer takes longer is the decoding alone.
        return seconds(batch, PROMPT, 1 + steps) - seconds(batch, PROMPT, 1)

    tasks = {f"decode {batch}": (batch * steps, decode, (batch,)) for batch in batches}
    tasks[f"prefill {prefill}"] = (prefill, seconds, (1, prefill, 1))
    speeds = {}
    for name, (tokens, timed, arguments) in tasks.items():
        timed(*arguments)  # warms up
        speeds[name] = tokens / median(timed(*arguments) for _ in range(repeats))
    json.dump(speeds, RESULT)


def load(folder: str, length: int, batch: int, dtype: str, eager: bool, cache_mib: int) -> LLM:
    """The engine, for up to `batch` sequences of up to `length` tokens."""
    return LLM(
        folder,
        skip_tokenizer_init=True,
        dtype=dtype,
        enforce_eager=eager,
        max_model_len=length,
        max_num_seqs=batch,
        kv_cache_memory_bytes=cache_mib << 20,
        enable_prefix_caching=False,
    )


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
