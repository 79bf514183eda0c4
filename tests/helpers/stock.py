"""Converted models as any user opens them, and what they must compute.

Nothing here asks the package how it writes a class: modules are found in the model that
transformers has loaded, and the gates of each class are computed again from its definition.
"""

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from moefy.models import families, targets
from moefy.models.shape import no_shared, one_shared

EXACT, WRITTEN, FAULT = 1e-5, 1e-2, 0.1
"""Bounds on the distance of logits; tests/models/test_identity.py says what each is for."""

NEURONS, TOKENS = 96, 64
HELD = [(family, target) for family in families.names() for target in families.load(family).targets]
"""Every family with every stock class that is said to hold it."""

UNLIKE = {
    (family, target): {"layer_types": ["full_attention"] * 2}
    for family, target in (("ministral", "mixtral"), ("ministral", "glm4_moe"))
}
"""What the tiny model of a family must be for a class that cannot hold the usual one."""

TARGETS = sorted({target for _, target in HELD})
ONE_EACH = [
    next(pair for pair in HELD if pair[1] == target and not families.load(pair[0]).rest)
    for target in TARGETS
]
"""A family per class, of those whose tensors other than the FFN's are copied as they are."""

UNHELD = [name for name in families.names() if not families.load(name).targets]
"""Families that only the package's own class holds."""

SHARES, SIGMOIDS = ("qwen2_moe", "flex_olmo"), ("glm4_moe", "cohere2_moe")
"""Classes whose gates are softmax probabilities over all experts, and sigmoids. In the others the
gates of the chosen experts sum to one, of softmax probabilities or of sigmoids (LFM2-MoE)."""

OWN = "moefy"
"""The package's own class, in which every gate is one."""

ELASTIC = (*SHARES, *SIGMOIDS, OWN)
"""Classes in which the gate of a chosen expert does not depend on how many are chosen."""

SLICES = SIGMOIDS
"""Classes whose experts are the dense weights, or those times a power of two."""

ROUTER = re.compile(r"(mlp|feed_forward|block_sparse_moe)\.(gate|gate\.wg|router\.layer)\.weight$")
ROUTED = re.compile(r"(experts\.\d+\.(down_proj|w2)|block_sparse_moe\.output_linear)\.weight$")
"""Router rows and routed down projections, by the names in which they are stored."""

Tensors = dict[str, torch.Tensor]
Plant = Callable[[Tensors, dict[str, Any]], object]


def recipe(target: str, experts: int = 8) -> dict[str, Any]:
    """Recipe keys under which all experts can be active: at will, or because K = E is baked in."""
    shape = shape_of(target, experts)
    return shape if target in ELASTIC else all_active(shape)


def some_active(target: str, experts: int = 8) -> dict[str, Any]:
    """Recipe keys under which a token goes to two of its experts."""
    return shape_of(target, experts)


def all_active(shape: dict[str, Any]) -> dict[str, Any]:
    return shape | {"top_k": shape["experts"], "active": 1.0}


def shape_of(target: str, experts: int) -> dict[str, Any]:
    """A shape that the class can hold, two experts per token; widths that grouped products take."""
    fits = targets.load(target).fits
    if fits is one_shared:  # one more, as wide as the others, must divide 96
        experts = {8: 7, 6: 5, 4: 2}[experts]
    width = NEURONS // (experts + 1) if fits is one_shared else 8
    width = NEURONS // experts if fits is no_shared else width
    shared = NEURONS - experts * width
    return {
        "target": target,
        "experts": experts,
        "top_k": 2,
        "shared_fraction": shared / NEURONS,
        "active": (shared + 2 * width) / NEURONS,
        "refit": False,
        # No steps: the closed-form router is made in no time, and what is said holds for any.
        "router_options": {"steps": 0},
        "partition": "shuffle",
    }


# --- opening -------------------------------------------------------------------------------------


def opened(folder: Path, dtype: torch.dtype = torch.float32, **options: Any):
    """The model, which must load without a missing, unexpected or mismatched tensor.

    In float64 its experts are computed one by one: grouped products do not exist there.
    """
    if dtype == torch.float64:
        options["experts_implementation"] = "eager"
    model, info = auto_class(folder).from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


CLASSES = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSeq2SeqLM": "AutoModelForSeq2SeqLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "Model": "AutoModel",
}
"""How a class's name ends -> the Auto class that opens it; AutoModelForCausalLM all others."""


def auto_class(folder: Path):
    """The Auto class for what a folder's configuration says it holds."""
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    for ending, auto in CLASSES.items():
        if name.endswith(ending):
            return getattr(transformers, auto)
    return transformers.AutoModelForCausalLM


def num_experts(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text())
    keys = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    (count,) = {config[key] for key in keys if key in config}
    return count


def open_all_active(folder: Path, dtype: torch.dtype = torch.float32):
    """The model with every expert active: as it is, or where K is free, by the usual argument."""
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in ELASTIC:
        return opened(folder, dtype)
    return opened(folder, dtype, num_experts_per_tok=num_experts(folder))


def blocks(model) -> dict[int, Any]:
    """The MoE block of each layer that has one."""
    return {
        int(re.search(r"\.(\d+)\.", name)[1]): module
        for name, module in model.named_modules()
        if hasattr(module, "experts")
    }


def router_rows(block) -> torch.nn.Parameter:
    """The router's only matrix, one row per expert."""
    router = block.gate if hasattr(block, "gate") else block.router
    rows = [tensor for name, tensor in router.named_parameters() if name.endswith("weight")]
    assert len(rows) == 1 and len(rows[0]) == len(block.experts.down_proj)
    return rows[0]


def silence(model):
    """Set the routers' rows to zero: every gate is the same."""
    assert blocks(model)
    for block in blocks(model).values():
        router_rows(block).data.zero_()
    return model


def logits(model) -> torch.Tensor:
    """For 64 tokens twice, without BOS; float32."""
    generator = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(1, 128, (2, TOKENS), generator=generator)
    with torch.inference_mode():
        given = {"decoder_input_ids": ids_BT} if model.config.is_encoder_decoder else {}
        return model(ids_BT, **given)[0].float()


@functools.cache
def dense_logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return logits(auto_class(folder).from_pretrained(folder, dtype=dtype).eval())


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest difference of two logits, relative to the largest of them."""
    return float((found - expected).abs().max() / expected.abs().max())


def assert_identity(dense: Path, moe: Path, dtype: torch.dtype = torch.float32) -> None:
    """With all experts active the converted model is the dense one.

    In float64 no rounding counts, which many layers, or recurrent ones, would add up.
    """
    expected = dense_logits(dense, dtype)
    model = open_all_active(moe, dtype)
    assert distance(logits(model), expected) < WRITTEN
    assert distance(logits(silence(model)), expected) < EXACT


# --- an independent computation with some of the experts -----------------------------------------


def gates(target: str, score_BTE: torch.Tensor, k: int) -> torch.Tensor:
    """What each expert's dense neurons count for each token, zero for those not chosen (B, T, E).

    By the definitions of the classes, times what makes equal scores count one.
    """
    if target == OWN:
        return torch.zeros_like(score_BTE).scatter(-1, score_BTE.topk(k).indices, 1.0)
    sigmoid = target in (*SIGMOIDS, "lfm2_moe")
    share_BTE = score_BTE.sigmoid() if sigmoid else score_BTE.softmax(-1)
    share_BTK, chosen_BTK = share_BTE.topk(k)
    if target in SIGMOIDS:
        gate_BTK = share_BTK * 2
    elif target in SHARES:
        gate_BTK = share_BTK * score_BTE.shape[-1]
    else:
        gate_BTK = share_BTK / share_BTK.sum(-1, keepdim=True) * k
    return torch.zeros_like(score_BTE).scatter(-1, chosen_BTK, gate_BTK)


def masked(dense: Path, moe, k: int):
    """The dense model with its neurons counting as the experts of `moe` in which they stand."""
    family = families.load(json.loads((dense / "config.json").read_text())["model_type"])
    model = auto_class(dense).from_pretrained(dense, dtype=torch.float32).eval()
    for number, block in blocks(moe).items():
        layer = model.get_submodule(family.layer.format(layer=number).rstrip("."))
        first, last = family.ffn[0], family.ffn[-1].removesuffix(".weight")
        down = layer.get_submodule(last)
        gate_FD = layer.get_parameter(first)[: down.in_features]  # up may stand below
        experts = block.experts
        both = experts.up_proj if moe.config.model_type == OWN else experts.gate_up_proj
        owner_F = owners(gate_FD, both)
        rows_ED = router_rows(block)
        seen: list[torch.Tensor] = []

        def watch(module, args, seen=seen) -> None:
            seen[:] = args

        def mask(module, args, seen=seen, owner_F=owner_F, rows_ED=rows_ED):
            gate_BTE = gates(moe.config.model_type, seen[0] @ rows_ED.T, k)
            shared_BT1 = torch.ones_like(gate_BTE[..., :1])  # owner -1
            return (args[0] * torch.cat([gate_BTE, shared_BT1], -1)[..., owner_F],)

        layer.get_submodule(family.block).register_forward_pre_hook(watch)
        down.register_forward_pre_hook(mask)
    return model


def owners(gate_FD: torch.Tensor, expert_END: torch.Tensor) -> torch.Tensor:
    """The expert in which each dense neuron stands, by its gate row; shared ones are -1."""
    place = {row.numpy().tobytes(): neuron for neuron, row in enumerate(gate_FD.detach())}
    assert len(place) == len(gate_FD)
    owner_F = torch.full((len(gate_FD),), -1)
    for expert, gate_up in enumerate(expert_END.detach()):
        for row in gate_up.chunk(2)[0]:
            owner_F[place.pop(row.numpy().tobytes())] = expert
    return owner_F


# --- planted faults ------------------------------------------------------------------------------


def planted(moe: Path, place: Path, plant: Plant) -> Path:
    """A copy of a written folder with a fault in its weights or configuration."""
    folder = Path(shutil.copytree(moe, place))
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    plant(tensors, config)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def changed(tensors: Tensors, pattern: str | re.Pattern, change: Callable) -> None:
    """Replace every tensor whose name matches by what `change` makes of it."""
    names = [name for name in tensors if re.search(pattern, name)]
    assert names, pattern
    tensors.update({name: change(tensors[name]) for name in names})


def scale(ending: str, factor: float) -> Plant:
    pattern = re.escape(ending) + "$"
    return lambda tensors, config: changed(tensors, pattern, lambda tensor: tensor * factor)


def scale_routed(tensors: Tensors, config: dict[str, Any]) -> None:
    """Routed down projections a seventh of what they are."""
    changed(tensors, ROUTED, lambda tensor: tensor / 7)


def scale_half(tensors: Tensors, config: dict[str, Any]) -> None:
    """Every other down column of the experts a seventh of what it is."""

    def shrink(down: torch.Tensor) -> torch.Tensor:
        down = down.clone()
        down[..., ::2] /= 7
        return down

    changed(tensors, ROUTED, shrink)


OWNED = [(family, OWN) for family in UNHELD]


GENERATIVE = ("ForCausalLM", "ForSeq2SeqLM")


def generated(model, use_cache: bool) -> torch.Tensor:
    ids_BT = torch.randint(1, 128, (2, 24), generator=torch.Generator().manual_seed(2))
    return model.generate(
        ids_BT,
        attention_mask=torch.ones_like(ids_BT),
        do_sample=False,
        min_new_tokens=12,
        max_new_tokens=12,
        pad_token_id=0,
        use_cache=use_cache,
    )


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


ONE_WINDOW = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}


def rope(theta: float, **more: object) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **more}}


def longrope(length: int, **more: object) -> dict:
    """Factors for short texts and for those longer than `length`."""
    factors = {"short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 4.0, 8.0]}
    if more:
        factors = {name: values[:2] for name, values in factors.items()}
    return {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": length,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1000.0,
            "original_max_position_embeddings": length,
            **factors,
            **more,
        },
    }
