"""Convert one FFN: profile, partition, route, refit, and measure what was lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moefy.convert.polish import polish
from moefy.convert.profile import CHUNK, SAMPLE, Inputs, chunks, observe
from moefy.convert.refit import Refit, refit, refit_experts
from moefy.convert.routed_ffn import RoutedFFN, energies_of, top_mask, unfold, unrouted
from moefy.timing import Clock
from moefy.types import FFN, Partition, Profile, Router, Shape

TERMS = ("weight_ED", "hidden_HD", "output_EH", "position_PE")
"""The tensors of a router that are written."""


@dataclass(frozen=True)
class Method:
    """How to convert an FFN: the three stages, with their options bound."""

    split: Callable[..., Partition]
    fit: Callable[..., Router] | None  # None for the static control, which routes nothing
    refit: bool
    refine: Callable[..., Router] | None = None  # fits the router again to what a refit has left
    error_propagation: float = 0.0  # share of the residual stream's drift that the refit repairs
    gradient: bool = False  # whether `split` needs the gradient of the dense model's loss
    polish: int = 0  # passes over the tokens in which the neurons are trained behind the refit
    ranked: bool = False  # whether an expert's neurons stand by their energy, the greatest first
    router_sizes: Mapping[str, int] = field(default_factory=dict)  # as moefy's own class names them
    sample: int | None = SAMPLE  # fitting tokens whose neurons `split` holds at a time; None: all
    copies: bool = False  # whether the experts are copies of the FFN
    noise: float = 0.0  # on these, as a multiple of their weights' standard deviation
    reinit: float = 0.0  # share of their neurons that are drawn anew


@dataclass(frozen=True)
class Block:
    """One converted FFN, ready to be written, and what it does to the calibration tokens."""

    routed: RoutedFFN  # the dense FFN, its `down_DF` refitted, split and routed
    y_TD: Tensor  # outputs under the actual routing, with weights as they will be stored
    figures: dict[str, Any]  # what the conversion report says of this layer


def convert_block(
    ffn: FFN, inputs: Inputs, shape: Shape, method: Method, *, dtype: torch.dtype, seed: int
) -> Block:
    """Split `ffn` on its inputs, and write weights as `dtype` holds them.

    All processes of the inputs' group make the same block; only `y_TD` is of this one's tokens.

    The outputs lie where `goal_TD` of the profile lay, of which nothing needs the values any more.

    Raises:
        MoefyError: code 6, for outputs that are not finite.
    """
    clock, group = Clock({}), inputs.group
    generator = torch.Generator().manual_seed(seed)
    with clock.stage("profile"):
        profile = observe(ffn, inputs, method.error_propagation)
    num_silent = int((profile.energy_F == 0).sum())
    with clock.stage("split"):
        partition = group.broadcast(method.split(ffn, profile, shape, generator=generator))
    if method.ranked:
        order_EN = profile.energy_F[partition.experts_EN].argsort(
            dim=1, descending=True, stable=True
        )
        experts_EN = partition.experts_EN.gather(1, order_EN)
        partition = group.broadcast(dataclasses.replace(partition, experts_EN=experts_EN))
    profile.release()
    # Where all experts run there is nothing to choose, and zero rows make every gate one.
    choice = 1.0 if shape.experts_per_token < shape.num_experts else 0.0

    def stored(router: Router) -> Router:
        terms = {n: t for n in TERMS if (t := getattr(router, n)) is not None}
        terms = {name: (term * choice).to(dtype).float() for name, term in terms.items()}
        return group.broadcast(dataclasses.replace(router, **terms))

    routed = unrouted(ffn, partition)
    if method.fit is not None:
        with clock.stage("route"):
            router = stored(method.fit(ffn, profile, partition, shape, generator=generator))
        routed = RoutedFFN(ffn, partition, router, shape.experts_per_token)
    with clock.stage("refit"):
        fitted = group.broadcast(refit(routed, profile, enabled=method.refit))
    if method.refine is not None and choice and fitted.strength is not None:
        with clock.stage("route"):
            refitted = routed.with_down(fitted.down_DF)
            router = stored(method.refine(refitted, profile, generator=generator))
            del refitted
        with clock.stage("refit"):
            routed, fitted = _better(routed, fitted, router, profile)
    with clock.stage("measure"):
        shares = captured(routed, profile)
    error = fitted.error_after
    routed = routed.with_down(fitted.down_DF)
    if overlaps := shape.overlaps and routed.k > 0:
        routed, profile = unfold(routed, profile)
    if method.polish:
        with clock.stage("polish"):
            routed, polished = polish(routed, profile, method.polish, generator)
            routed = dataclasses.replace(routed, ffn=routed.ffn.rounded(dtype))
            # The activations that are kept were other neurons'.
            profile = dataclasses.replace(profile, h_TF=None, folded=None)
            shares["error_after_polish"] = polished
    if overlaps and method.refit:
        with clock.stage("refit"):
            down_DF, error = refit_experts(routed, profile)
            routed = routed.with_down(group.broadcast(down_DF))
    routed = routed.with_down(routed.ffn.down_DF.to(dtype).float())
    with clock.stage("run"):
        y_TD, tokens_E = _run(routed, profile)
    seconds = clock.seconds()
    figures = {
        "shared_neurons": len(partition.shared_S),
        "experts": len(partition.experts_EN),
        "expert_width": partition.experts_EN.shape[1] if routed.k else 0,
        "experts_per_token": routed.k,
        "error_before_refit": fitted.error_before,
        "error_after_refit": error,
        "error_after_refit_on_fitting_tokens": fitted.error_fit,
        "refit_strength": fitted.strength,
        **shares,
        **({"fit_tokens": tokens_E, "least_tokens": min(tokens_E)} if routed.k else {}),
        "silent_neurons": num_silent,
        "balance": list(routed.router.balance),
        "seconds": round(seconds.pop("total"), 3),
        "stage_seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }
    return Block(routed, y_TD, figures)


def _better(
    routed: RoutedFFN, fitted: Refit, router: Router, profile: Profile
) -> tuple[RoutedFFN, Refit]:
    """The FFN behind another `router`, with a refit under that, if it errs less than `fitted`."""
    again = dataclasses.replace(routed, router=router)
    refitted = profile.group.broadcast(refit(again, profile, known=fitted.strength))
    return (again, refitted) if refitted.error_after < fitted.error_after else (routed, fitted)


def captured(routed: RoutedFFN, profile: Profile) -> dict[str, Any]:
    """Shares of output energy on the held-out tokens, and how the router loads its experts.

    `energy_neurons` is the ceiling: the best active neurons of each token; `energy_static` keeps
    the same neurons for all tokens; `energy_random` picks experts by lot (in expectation).
    """
    ffn, partition, k = routed.ffn, routed.partition, routed.k
    totals = dict.fromkeys(("all", "static", "neurons", "router", "oracle", "random"), 0.0)
    load_E = torch.zeros(len(partition.experts_EN))
    agree = tokens = 0.0
    norm_F = ffn.down_norm_sq_F
    static_S = profile.energy_F.topk(routed.num_active).indices
    for x_TD, h_TF, _, position_T in chunks(ffn, profile, "heldout"):
        energy_TF = h_TF.square() * norm_F
        totals["all"] += float(energy_TF.sum())
        totals["static"] += float(energy_TF[:, static_S].sum())
        totals["neurons"] += float(energy_TF.topk(routed.num_active, dim=1).values.sum())
        if not k:
            continue
        shared = float(energy_TF[:, partition.shared_S].sum())
        experts_TE = energies_of(ffn, partition, h_TF)
        mask_TE = routed.mask(x_TD, h_TF, position_T)
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


def _run(routed: RoutedFFN, profile: Profile) -> tuple[Tensor, list[int]]:
    """Outputs on all tokens (T, D), written over what they aimed at, and how many of the fitting
    tokens go to each expert."""
    y_TD, masks = profile.goal_TD, []
    down_AD = routed.down_AD
    for number, (x_TD, h_TF, _, position_T) in enumerate(chunks(routed.ffn, profile, "all")):
        part = slice(number * CHUNK, (number + 1) * CHUNK)
        masks.append(routed.mask(x_TD, h_TF, position_T))
        run_TD = routed.run(h_TF, masks[-1]).outputs(down_AD)
        y_TD[part] = run_TD.div_(profile.scale_T[part, None])
    tokens_E = torch.cat(masks)[: profile.num_fit].sum(0)
    profile.group.sum(tokens_E)
    return y_TD, [int(n) for n in tokens_E]
