"""Convert one FFN: profile, partition, route, refit, and measure what was lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moefy.convert.profile import (
    CHUNK,
    active_neurons,
    choose,
    chunks,
    energies_of,
    observe,
    top_mask,
    unfold,
)
from moefy.convert.refit import refit, refit_experts
from moefy.distributed import ALONE, Group
from moefy.errors import MoefyError
from moefy.files.buffers import MEMORY, Store
from moefy.timing import Clock
from moefy.types import FFN, Partition, Profile, Router, Shape


@dataclass(frozen=True)
class Method:
    """How to convert an FFN: the three stages, with their options bound."""

    split: Callable[..., Partition]
    fit: Callable[..., Router] | None
    """None for the static control, which routes nothing."""
    refit: bool
    refine: Callable[..., Router] | None = None
    """Fits the router again to what a refit has left, where the router's file has a way to."""
    drift: float = 0.0
    """Share of the drift of the residual stream that the refit makes good."""
    gradient: bool = False
    """Whether `split` needs the gradient of the dense model's loss."""


@dataclass(frozen=True)
class Block:
    """One converted FFN, ready to be written, and what it does to the calibration tokens."""

    ffn: FFN
    """The dense FFN, its `down_DF` refitted."""
    partition: Partition
    router: Router
    y_TD: Tensor
    """Outputs under the actual routing, with weights as they will be stored."""
    figures: dict[str, Any]
    """What the conversion report says of this layer."""


def convert_block(
    ffn: FFN,
    x_TD: Tensor,
    residual_TD: Tensor,
    num_heldout: int,
    shape: Shape,
    method: Method,
    *,
    dtype: torch.dtype,
    seed: int,
    join: Callable[[Tensor], Tensor] | None = None,
    dense_TD: Tensor | None = None,
    gradient_TD: Tensor | None = None,
    store: Store = MEMORY,
    group: Group = ALONE,
) -> Block:
    """Split `ffn` on its inputs `x_TD`, of which the last `num_heldout` are only measured on.

    `residual_TD` is what the output is added to, having gone through `join`; it weighs the tokens
    (see `Profile`, also for `gradient_TD`). `dense_TD` is what leaves the layer in the dense model.
    What is made for all tokens lies in `store`. The processes of `group` have other tokens, and
    all make the same block; only `y_TD` is of this one's.

    Raises:
        MoefyError: code 6, for outputs that are not finite.
    """
    clock = Clock({})
    with clock.stage("profile"):
        profile = observe(
            ffn,
            x_TD,
            num_heldout=num_heldout,
            residual_TD=residual_TD,
            join=join,
            dense_TD=dense_TD,
            drift=method.drift,
            gradient_TD=gradient_TD,
            store=store,
            group=group,
        )
        finite = all(y_TD.isfinite().all() for y_TD in profile.y_TD.split(CHUNK))
    if group.total(not finite) or not profile.energy_F.isfinite().all():
        raise MoefyError("an FFN's outputs overflow float32 on the calibration tokens", code=6)
    num_silent = int((profile.energy_F == 0).sum())
    generator = torch.Generator().manual_seed(seed)
    with clock.stage("split"):
        partition = group.agreed(method.split(ffn, profile, shape, generator=generator))
    store.release()
    router = _no_router(ffn)
    # Where all experts run there is nothing to choose, and zero rows make every gate one.
    choice = 1.0 if shape.experts_per_token < shape.num_experts else 0.0

    def stored(router: Router) -> Router:
        rows_ED = (router.weight_ED * choice).to(dtype).float()
        return dataclasses.replace(router, weight_ED=rows_ED)

    if method.fit is not None:
        with clock.stage("route"):
            router = stored(method.fit(ffn, profile, partition, shape, generator=generator))
            router = group.agreed(router)
    k = shape.experts_per_token if method.fit is not None else 0
    with clock.stage("refit"):
        fitted = group.agreed(refit(ffn, profile, partition, router, k, enabled=method.refit))
    if method.refine is not None and choice and fitted.strength is not None:
        with clock.stage("route"):
            changed = dataclasses.replace(ffn, down_DF=fitted.down_DF)
            again = stored(
                method.refine(changed, profile, partition, shape, router, generator=generator)
            )
            again = group.agreed(again)
            del changed
        with clock.stage("refit"):
            refitted = refit(ffn, profile, partition, again, k, known=fitted.strength)
            refitted = group.agreed(refitted)
        if refitted.error_after < fitted.error_after:
            router, fitted = again, refitted
        del refitted
    with clock.stage("measure"):
        shares = captured(ffn, profile, partition, router, shape, k)
    kept, error = dataclasses.replace(ffn, down_DF=fitted.down_DF), fitted.error_after
    if shape.overlaps and k:
        with clock.stage("refit"):
            kept, profile, partition = unfold(kept, profile, partition)
            if method.refit:
                down_DF, error = refit_experts(kept, profile, partition, router, k)
                kept = dataclasses.replace(kept, down_DF=group.agreed(down_DF))
    kept = dataclasses.replace(kept, down_DF=kept.down_DF.to(dtype).float())
    with clock.stage("run"):
        y_TD, tokens_E = _run(kept, profile, partition, router, k, store)
    seconds = clock.seconds()
    figures = {
        "shared_neurons": len(partition.shared_S),
        "experts": len(partition.experts_EN),
        "expert_width": partition.experts_EN.shape[1] if k else 0,
        "experts_per_token": k,
        "error_before_refit": fitted.error_before,
        "error_after_refit": error,
        "error_after_refit_on_fitting_tokens": fitted.error_fit,
        "refit_strength": fitted.strength,
        **shares,
        **({"fit_tokens": tokens_E, "least_tokens": min(tokens_E)} if k else {}),
        "silent_neurons": num_silent,
        "balance": list(router.balance),
        "seconds": round(seconds.pop("total"), 3),
        "stage_seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }
    return Block(kept, partition, router, y_TD, figures)


def captured(
    ffn: FFN, profile: Profile, partition: Partition, router: Router, shape: Shape, k: int
) -> dict[str, Any]:
    """Shares of output energy on the held-out tokens, and how the router loads its experts.

    `energy_neurons` is the ceiling: the best active neurons of each token; `energy_static` keeps
    the same neurons for all tokens; `energy_random` picks experts by lot (in expectation).
    """
    totals = dict.fromkeys(("all", "static", "neurons", "router", "oracle", "random"), 0.0)
    load_E = torch.zeros(len(partition.experts_EN))
    agree = tokens = 0.0
    norm_F = ffn.down_norm_sq_F
    static_S = profile.energy_F.topk(shape.num_active).indices
    for x_TD, h_TF, _ in chunks(ffn, profile, "heldout"):
        energy_TF = h_TF.square() * norm_F
        totals["all"] += float(energy_TF.sum())
        totals["static"] += float(energy_TF[:, static_S].sum())
        totals["neurons"] += float(energy_TF.topk(shape.num_active, dim=1).values.sum())
        if not k:
            continue
        shared = float(energy_TF[:, partition.shared_S].sum())
        experts_TE = energies_of(ffn, partition, h_TF)
        mask_TE = choose(partition, router, k, x_TD, h_TF)
        best_TE = top_mask(experts_TE, k)
        totals["router"] += shared + float((experts_TE * mask_TE).sum())
        totals["oracle"] += shared + float((experts_TE * best_TE).sum())
        totals["random"] += shared + float(experts_TE.sum()) * k / len(load_E)
        agree += float((mask_TE * best_TE).sum()) / k
        load_E += mask_TE.sum(0).cpu()
        tokens += len(x_TD)
    group = profile.group
    totals = {name: group.total(value) for name, value in totals.items()}
    agree, tokens = group.total(agree), group.total(tokens)
    group.sum(load_E)
    figures: dict[str, Any] = {
        f"energy_{name}": value / max(totals["all"], 1e-30)
        for name, value in totals.items()
        if name != "all" and (k or name in ("static", "neurons"))
    }
    if k:
        share_E = load_E / load_E.sum()
        figures["router_oracle_agreement"] = agree / tokens
        figures["agreement_by_chance"] = k / len(load_E)
        figures["expert_load"] = [round(float(share), 5) for share in share_E]
        figures["load_cv"] = float(share_E.std(correction=0) / share_E.mean())
    return figures


def _run(
    ffn: FFN, profile: Profile, partition: Partition, router: Router, k: int, store: Store
) -> tuple[Tensor, list[int]]:
    """Outputs on all tokens (T, D), and how many of the fitting tokens go to each expert."""
    y_TD, masks = store.empty(*profile.y_TD.shape, device=profile.y_TD.device), []
    for number, (x_TD, h_TF, _) in enumerate(chunks(ffn, profile, "all")):
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        mask_TE = choose(partition, router, k, x_TD, h_TF) if k else x_TD.new_zeros(len(x_TD), 0)
        active_TF = active_neurons(partition, mask_TE, ffn.num_neurons)
        run_TD = h_TF.mul(active_TF) @ ffn.down_DF.T
        y_TD[part] = run_TD.div_(profile.scale_T[part, None])
        masks.append(mask_TE)
    tokens_E = torch.cat(masks)[: profile.num_fit].sum(0)
    profile.group.sum(tokens_E)
    return y_TD, [int(n) for n in tokens_E]


def _no_router(ffn: FFN) -> Router:
    return Router(ffn.up_FD.new_zeros(0, ffn.hidden_size))
