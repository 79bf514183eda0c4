"""A made-up report of format 2: every part there, or none, to draw pages from."""

import math
from typing import Any

MODELS = {
    "dense": ("dense", "the model that was converted", 1.0, 0.0),
    "moe": ("converted", "the converted model", 0.5, 0.86),
    "moe, fine-tuned": ("finetuned", "the converted model after distillation", 0.5, 0.41),
    "static": ("control", "the same number of neurons, chosen once for all tokens", 0.5, 1.09),
    "random router": ("control", "our experts behind random router rows", 0.5, 1.57),
    "oracle router": ("control", "our experts, chosen by their true output energy", 0.5, 0.64),
}
TEXTS = {"heldout_wiki": (12.34, 1.0), "heldout_code": (4.86, 0.6)}
ROUTED = ("moe", "moe, fine-tuned")
HOSTILE = '<script>alert("x")</script> | pipe `tick` **bold** \n# head'
"""What a model may write, or a file be called: it must come out as text."""


def summary(num_layers: int = 4, num_experts: int = 8) -> dict[str, Any]:
    """A conversion.json."""
    return {
        "moefy": "0.1.0",
        "model": "owner/SmolModel-135M",
        "hub_id": "owner/SmolModel-135M",
        "family": "llama",
        "task": "ForCausalLM",
        "target": "qwen2_moe",
        "target_reason": "the first choice for llama",
        "engines": ["transformers", "vLLM", "llama.cpp"],
        "shape": {
            "num_neurons": 1536,
            "num_shared": 512,
            "num_experts": num_experts,
            "expert_width": 1024 // num_experts,
            "experts_per_token": num_experts // 4,
            "active_fraction": 0.5,
        },
        "parameters_dense": 134515008,
        "layers": [_layer(number, num_experts) for number in range(num_layers)],
        "layers_left_dense": [],
        "calibration": {
            "source": "calib.txt",
            "sha256": "00",
            "documents": 26,
            "sequences": 16,
            "heldout_sequences": 2,
            "sequence_length": 512,
            "notes": [],
        },
        "licence": {"license": "apache-2.0", "language": ["en"]},
        "recipe": {
            "partition": "alternating",
            "router": "linear",
            "refit": True,
            "drift": 0.5,
            "calibration": "calib.txt",
        },
        "reopened": {"class": "Qwen2MoeForCausalLM", "layers": num_layers, "hidden_state_error": 0},
        "notes": ["vLLM: fused kernels may be slow"],
        "seconds": {"layers": 107.2, "total": 109.3},
        "peak_resident_bytes": 1879990272,
        "device": "cpu",
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.24.0"},
        "inputs": {"model.safetensors": "aa", "config.json": "bb"},
        "outputs": {"model.safetensors": "cc", "config.json": "dd"},
    }


def full(num_layers: int = 4, num_experts: int = 8) -> dict[str, Any]:
    """Every part of a report."""
    return {
        "moefy": "0.1.0",
        "format": 2,
        "created": "2026-11-26T19:00:00+00:00",
        "main": "moe, fine-tuned",
        "run": summary(num_layers, num_experts),
        "runs": {},
        "models": {label: _model(label) for label in MODELS},
        "texts": {text: {label: _score(label, text) for label in MODELS} for text in TEXTS},
        "seen_in_calibration": {"heldout_wiki": 0.0, "heldout_code": 0.04},
        "robustness": {
            condition: {label: _robust(label, times) for label in ("dense", *ROUTED)}
            for condition, times in (("in domain", 1), ("random tokens", 3), ("truncated", 1.4))
        },
        "benchmarks": {
            "continue_wiki": {label: _benchmark(label, 0.6) for label in ("dense", *ROUTED)},
            "lastword_novel": {label: _benchmark(label, 0.2) for label in ("dense", *ROUTED)},
            "piqa": {label: {"not_run": "no network"} for label in ("dense", *ROUTED)},
        },
        "prompts": [
            {
                "prompt": "The capital of France is",
                "answer": " Paris",
                "scores": {"dense": -0.4, "moe": -2.9, "moe, fine-tuned": -1.1},
                "drop": 2.5,
                "flagged": True,
            },
            {
                "prompt": HOSTILE,
                "answer": " 4",
                "scores": {"dense": -1.0, "moe": -1.1, "moe, fine-tuned": -1.0},
                "drop": 0.1,
                "flagged": False,
            },
        ],
        "generation": [
            {
                "prompt": "The main reason why the sea is salty is that",
                "written": {
                    "dense": "it is full of salt that rivers carry down from rocks.",
                    "moe": HOSTILE,
                    "moe, fine-tuned": "rivers carry salt.",
                },
            }
        ],
        "behaviour": _behaviour(),
        "lost_experts": _lost(num_layers, num_experts),
        "quantized": _quantized(),
        "routing": {label: _routing(num_layers, num_experts, i) for i, label in enumerate(ROUTED)},
        "speed": {"transformers": _speed(0.8), "llama.cpp": _speed(1.3)},
        "finetune": {"moe, fine-tuned": _finetune()},
        "frontier": [
            {
                "label": label,
                "kind": kind,
                "text": text,
                "own": label in ROUTED,
                "a_model": not label.startswith("oracle"),
                "dnll": loss * weight,
                "kl": loss * weight * 1.05,
                "bytes_read": int(269_000_000 * (0.41 + 0.59 * active)),
                "operations": int(134_515_008 * (0.41 + 0.59 * active)),
            }
            | ({"better": {"bytes_read": "static", "operations": None}} if label in ROUTED else {})
            for text, (_, weight) in TEXTS.items()
            for label, (kind, _, active, loss) in MODELS.items()
        ],
        "rivals": {"levels": 13.2},
        "advice": [
            {
                "verdict": "does not pay",
                "sentence": "SLOWER in transformers on this machine: 0.82 times the dense model's.",
                "because": {"ratio": 0.82, "batch": 1, "phase": "decode"},
            },
            {
                "verdict": "pays",
                "sentence": "In llama.cpp it decodes 1.24 times as fast at batch 1.",
                "because": {"ratio": 1.24},
            },
            {"verdict": "not measured", "sentence": "vLLM was not measured.", "because": {}},
        ],
        "not_run": [{"what": "piqa", "reason": "no network"}],
        "notes": ["Speed was measured on one thread."],
    }


def empty() -> dict[str, Any]:
    """A report that holds nothing but its run."""
    lists = ("prompts", "generation", "frontier", "advice", "not_run", "notes")
    tables = ("runs", "models", "texts", "seen_in_calibration", "robustness", "benchmarks")
    tables += ("behaviour", "lost_experts", "quantized", "routing", "speed", "finetune")
    head = {"moefy": "0.1.0", "format": 2, "created": "2026-11-26T19:00:00+00:00"}
    found = {**head, "run": summary(), **{key: [] for key in lists}}
    return {**found, **{key: {} for key in tables}}


def _layer(number: int, num_experts: int) -> dict[str, Any]:
    wave = 0.1 * math.sin(number)
    return {
        "layer": number,
        "shared_neurons": 512,
        "experts": num_experts,
        "expert_width": 1024 // num_experts,
        "experts_per_token": num_experts // 4,
        "error_before_refit": 0.5 + wave,
        "error_after_refit": 0.45 + wave,
        "error_after_refit_on_fitting_tokens": 0.4 + wave,
        "refit_strength": 0.1,
        "energy_static": 0.7 + wave,
        "energy_neurons": 0.98,
        "energy_router": 0.75 + wave,
        "energy_oracle": 0.8 + wave,
        "energy_random": 0.6 + wave,
        "router_oracle_agreement": 0.55,
        "agreement_by_chance": 0.25,
        "expert_load": load(number, num_experts),
        "load_cv": 0.25,
        "balance": [
            {"share": share, "load_cv": 0.6 - 0.5 * share, "worth": 1 - 0.03 * share**2}
            for share in (0.0, 0.25, 0.5, 0.75, 1.0)
        ],
        "seconds": 3.1,
    }


def load(layer: int, num_experts: int) -> list[float]:
    """Shares of the choices, uneven, with a dead expert in layer 1."""
    raw = [math.exp(0.8 * math.sin(3.1 * layer + 1.7 * e)) for e in range(num_experts)]
    if layer == 1:
        raw[-1] = 0.0
    return [value / sum(raw) for value in raw]


def _model(label: str) -> dict[str, Any]:
    kind, meaning, active, _ = MODELS[label]
    routed = kind != "dense" and label != "static"
    return {
        "kind": kind,
        "meaning": meaning,
        "class": "Qwen2MoeForCausalLM" if routed else "LlamaForCausalLM",
        "folder": "out",
        "parameters_total": 163_000_000 if routed else 134_515_008,
        "parameters_active": int(134_515_008 * (0.41 + 0.59 * active)),
        "flops_per_token": 2.7e8 * (0.41 + 0.59 * active),
        "weight_bytes": 326_000_000 if routed else 269_000_000,
        "kv_bytes_per_token": 23_040,
        "peak_bytes": None if kind == "control" else 1_200_000_000,
    }


def _score(label: str, text: str) -> dict[str, Any]:
    perplexity, weight = TEXTS[text]
    dnll = MODELS[label][3] * weight
    dense = label == "dense"
    return {
        "tokens": 4092,
        "nll": math.log(perplexity) + dnll,
        "perplexity": perplexity * math.exp(dnll),
        "bits_per_byte": 0.9 + dnll / 3,
        "standard_error": 0.05,
        "dnll": dnll,
        "dnll_standard_error": 0 if dense else 0.03,
        "kl": dnll * 1.05,
        "top1_agreement": 1 - 0.4 * dnll,
    }


def _robust(label: str, times: float) -> dict[str, Any]:
    dnll = MODELS[label][3] * times
    routed = label != "dense"
    return {
        "perplexity": 20 * math.exp(dnll),
        "dnll": dnll,
        "kl": dnll,
        "routing_entropy": 0.9 if routed else None,
        "routing_drift": 0.1 * times if routed else None,
    }


def _benchmark(label: str, value: float) -> dict[str, Any]:
    lost = 0.3 * value * MODELS[label][3]
    return {
        "metric": "acc",
        "value": value - lost,
        "standard_error": 0.02,
        "difference": 0.0 if label == "dense" else -lost,
        "p_value": None if label == "dense" else (0.003 if lost > 0.1 else 0.3),
    }


def _behaviour() -> dict[str, Any]:
    figures = {}
    for number, label in enumerate(("dense", *ROUTED)):
        row = {"count": number, "of": 8, "share": number / 8, "low": 0.0, "high": number / 4}
        row |= {"difference": number / 8, "difference_low": -0.1, "difference_high": number / 3}
        figures[label] = dict.fromkeys(("loops", "stops", "json", "keys"), row)
    answer = {"text": "rivers carry salt. " * 40, "tokens": 99, "stops": True, "loops": False}
    asked = {"prompt": "Describe the sea as JSON.", "kind": "json", "json": ["salt"]}
    plain = {"prompt": HOSTILE, "kind": "question", "json": False}
    broken = {**answer, "loops": True, "stops": False, "json": False, "keys": False}
    answers = [
        {**plain, "written": dict.fromkeys(("dense", *ROUTED), {**answer, "text": HOSTILE})},
        {**asked, "written": {"dense": {**answer, "json": True, "keys": True}}
         | dict.fromkeys(ROUTED, broken)},
    ]  # fmt: skip
    one = {"tokens": 192, "figures": figures, "answers": answers}
    sets = {"own prompts": one, HOSTILE: {**one, "answers": []}}
    return {"chat": False, "meaning": {"loops": "the answer ends in a loop"}, "sets": sets}


def _quantized() -> dict[str, Any]:
    """As it is, and in a type with its routers in 32 bits and in that type."""

    def score(text: str, kl: float) -> dict[str, Any]:
        return {"text": text, "dnll": kl, "kl_dense": kl + 0.4, "kl_run": kl, "top1_run": 0.9}

    rows = []
    for number, (kind, routers) in enumerate(
        (("", False), ("q8_0", False), ("q8_0", True), ("q4_K_M", False), ("q4_K_M", True))
    ):
        texts = [score(text, 0.02 * number) for text in TEXTS]
        rows.append({"type": kind, "routers": routers, "weight_bytes": 10**8, "texts": texts})
    return {"label": "moe, fine-tuned", "tokens": 4092, "rows": rows}


def _lost(num_layers: int, num_experts: int) -> dict[str, Any]:
    """Expert 3 of layer 1 is critical."""
    rows = [
        {
            "layer": layer,
            "expert": expert,
            "dnll": 0.15 if (layer, expert) == (1, 3) else 0.01 * math.sin(layer + expert),
            "standard_error": 0.01,
        }
        for layer in range(num_layers)
        for expert in range(num_experts)
    ]
    mean = sum(row["dnll"] for row in rows) / len(rows)
    head = {"label": "moe, fine-tuned", "tokens": 508, "windows": 4, "nll": 3.0}
    return head | {"mean": mean, "worst": 0.15, "experts": rows}


def _routing(num_layers: int, num_experts: int, shift: int) -> dict[str, Any]:
    def layers(offset: int, tokens: bool) -> list[dict[str, Any]]:
        return [
            {
                "layer": number,
                "load_E": load(number + offset, num_experts),
                "load_cv": 0.4 + 0.1 * math.sin(number + offset),
                "entropy": 0.9,
                "dead": int(number + offset == 1),
                "coactivation_EE": [
                    [0.25 if a == b else 0.02 * ((a + b) % 5) for a in range(num_experts)]
                    for b in range(num_experts)
                ],
                "top_tokens": [
                    [{"token": token, "share": 0.9, "times": 9} for token in (f" t{e}", "<b>", "|")]
                    for e in range(num_experts)
                ]
                if tokens
                else [],
            }
            for number in range(num_layers)
        ]

    by_text = {text: {"layers": layers(i + shift, False)} for i, text in enumerate(TEXTS)}
    return {"layers": layers(shift, True), "by_text": by_text}


def _speed(ratio: float) -> dict[str, Any]:
    rows = []
    for phase, dense in (("prefill", 500.0), ("decode", 60.0)):
        for batch in (1, 8, 32):
            for context in (128, 512):
                for label in ("dense", *ROUTED):
                    times = 1.0 if label == "dense" else ratio + 0.01 * batch - context / 9999
                    found = dense * batch**0.5 * times
                    rows.append(
                        {
                            "phase": phase,
                            "batch": batch,
                            "context": context,
                            "label": label,
                            "dtype": "bfloat16",
                            "tokens_per_second": found,
                            "low": found * 0.95,
                            "high": found * 1.05,
                            "ratio": times,
                            "ratio_low": times * 0.95,
                            "ratio_high": times * 1.05,
                        }
                    )
    return {
        "implementation": {label: "prefill eager; decode grouped_mm" for label in ROUTED},
        "threads": 1,
        "dtype": dict.fromkeys(("dense", *ROUTED), "bfloat16"),
        "ideal_ratio": {
            label: {"prefill": 1.41, "decode": {"1": 1.42, "8": 1.4, "32": 1.38}}
            for label in ROUTED
        },
        "rows": rows,
    }


def _finetune() -> dict[str, Any]:
    curve: list[dict[str, Any]] = [
        {
            "step": step,
            "tokens": step * 4096,
            "seconds": step * 20.0,
            "lr": 1e-4,
            "loss": 3 + 2 * math.exp(-step / 20),
            "kl": 0.4 + 0.5 * math.exp(-step / 20),
            "ce": 3 + math.exp(-step / 20),
            "aux": 0.01,
            "z": 0.001,
            "load_cv": 0.5 + 0.3 * math.exp(-step / 10),
            "entropy": 0.9,
            "dead": 0,
            "tokens_per_second": 200.0,
        }
        for step in range(1, 60, 2)
    ]
    curve += [
        {"step": step, "validation": {"loss": 3.1 + math.exp(-step / 20), "kl": 0.5}}
        for step in (1, 30, 59)
    ]
    layer = {"layer": 0, "load_E": load(0, 8), "load_cv": 0.4, "entropy": 0.9, "dead": 0}
    return {
        "summary": {
            "moefy": "0.1.0",
            "format": 1,
            "parent": {"folder": "out", "files": {}},
            "teacher": {"model": "owner/SmolModel-135M", "files": {}},
            "train": {"source": "/home/me/train.txt", "sha256": "00", "sequences": 9},
            "settings": {"learning_rate": 1e-4},
            "tokens": 59 * 4096,
            "steps": 59,
            "seconds": 1200.0,
            "tokens_per_second": 200.0,
            "validation": {"before": {"loss": 4.1, "kl": 0.9}, "after": {"loss": 3.2, "kl": 0.5}},
            "routing": {"before": [layer], "after": [layer]},
            "guard": [{"step": 12, "reason": "expert 3 dead", "action": "raised its bias"}],
            "versions": {"torch": "2.13.0"},
            "outputs": {"model.safetensors": "ee", "config.json": "ff"},
        },
        "curve": curve,
    }
