"""Answers from vLLM, for a test that runs in another environment.

Run by the interpreter that has vLLM. Every line of standard input is a request, in JSON:

    {"folder": ..., "prompts": [[token, ...], ...], "new_tokens": n, "overrides": {...}}

and is answered by a line on standard output: per prompt the greedy tokens, and log-probabilities
over the vocabulary at every position but the last, prompt and answer together; or an error.
"""

import os

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # models follow each other in this process
    VLLM_CPU_OMP_THREADS_BIND="nobind",  # OMP_NUM_THREADS counts, and no core is claimed
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
    # Even in eager mode vLLM compiles a function of its sampler, for 20 seconds.
    TORCHDYNAMO_DISABLE="1",
)

import gc
import json
import sys
import traceback

# Whatever is printed on the way goes to standard error.
ANSWERS = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)

from vllm import LLM, SamplingParams  # noqa: E402

KV_CACHE_BYTES = 1 << 24


def answer(request: dict) -> list[dict]:
    """Load the folder, generate, and forget it."""
    llm = LLM(
        request["folder"],
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        max_num_seqs=len(request["prompts"]),
        max_logprobs=-1,
        hf_overrides=request["overrides"],
    )
    greedy = SamplingParams(
        temperature=0,
        max_tokens=request["new_tokens"],
        ignore_eos=True,
        detokenize=False,
        logprobs=-1,
        prompt_logprobs=-1,
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in request["prompts"]]
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    del llm
    gc.collect()
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            # Nothing comes before the first token of the prompt, so it has no log-probability.
            "logprobs": rows(output.prompt_logprobs[1:] + list(output.outputs[0].logprobs)),
        }
        for output in outputs
    ]


def rows(found: list[dict]) -> list[list[float]]:
    """Log-probabilities by token, of each position."""
    return [[at[token].logprob for token in range(len(at))] for at in found]


for line in sys.stdin:
    try:
        reply = answer(json.loads(line))
    except Exception:
        reply = {"error": traceback.format_exc()}
    ANSWERS.write(json.dumps(reply) + "\n")
