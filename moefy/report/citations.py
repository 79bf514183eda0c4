"""Whose methods went into a conversion, for its model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moefy.config.options import renamed
from moefy.config.recipe import Recipe

MOEFICATION = "MoEfication (arXiv 2110.01786): balanced clustering of neurons into experts"
LLAMA_MOE_V2 = "LLaMA-MoE v2 (arXiv 2411.15708): experts and routers from clusters of tokens"

PARTITION = {
    "copies": (
        "Sparse upcycling (arXiv 2212.05055): experts that start as copies of the FFN",
        "Virtual groups (arXiv 2410.07524): copies in slices that are chosen together",
    ),
    "alternating": (MOEFICATION, "DOT-MoE (arXiv 2606.01666): assignment that looks at outputs"),
    "cmoe": ("CMoE (arXiv 2502.04416): experts of neurons that are active together",),
    "expertweaver": ("ExpertWeaver (arXiv 2602.15521): experts of neurons by activation pattern",),
    "llama-moe-v2": (LLAMA_MOE_V2,),
    "shuffle": ("LLaMA-MoE (arXiv 2406.16554): random split",),
    "static": ("FLAP (arXiv 2312.11983): pruning by fluctuation or energy",),
    "moefication": (MOEFICATION,),
}
LINEAR = (
    "HARC (arXiv 2606.03391): closed-form routers",
    "Auxiliary-loss-free balancing (arXiv 2408.15664): biases that even out the load",
)
ROUTER = {
    "linear": LINEAR,
    "mlp": ("MoEfication (arXiv 2110.01786): routers of two layers with tanh", *LINEAR),
    "position": LINEAR,
    "llama-moe-v2": (LLAMA_MOE_V2,),
    "expertweaver": ("EMoE (arXiv 2310.10908): routers from the mean gate of an expert",),
    "cmoe": ("CMoE (arXiv 2502.04416): routers from a representative neuron",),
}
DROP = "Drop-Upcycling (arXiv 2502.19261): a share of each copy's neurons drawn anew"
REFIT = "SparseGPT (arXiv 2301.00774): least squares over a mask, here one that routing sets"
DRIFT = "QEP (arXiv 2504.09629): making up for the error of the layers below"
SELF = "LLM-QAT (arXiv 2305.17888): calibration text written by the model itself"


def sources(recipe: Mapping[str, Any]) -> list[str]:
    """The works that the stages of a recipe build on, each once."""
    recipe = renamed(Recipe, recipe)
    static = recipe["partition"] == "static"
    works = [*PARTITION.get(recipe["partition"], ())]
    works += () if static else ROUTER.get(recipe["router"], ())
    works += [DROP] if recipe.get("reinit") else []
    works += [REFIT] if recipe["refit"] else []
    works += [DRIFT] if recipe["refit"] and recipe["drift"] else []
    works += [SELF] if recipe["calibration"] == "self" else []
    return list(dict.fromkeys(works))
