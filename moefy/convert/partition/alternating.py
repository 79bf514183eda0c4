"""Our split: experts made of neurons that deliver their energy on the tokens routed to them."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from moefy.convert.assign_on_device import assign
from moefy.convert.cluster import gathered, ranked
from moefy.convert.kmeans import kmeans
from moefy.convert.profile import CHUNK, SAMPLE, activations
from moefy.convert.ridge import scorer
from moefy.convert.routed_ffn import membership, top_mask
from moefy.errors import MoefyError
from moefy.types import FFN, Partition, Profile, Range, Shape

OVERLAPS = True  # a neuron may stand in several of its experts

ROUNDS = 4
"""Times that neurons are assigned by true energies, and again by those of the fitted routers."""

SKETCH = 128
"""Random directions that a neuron's profile over the tokens is projected on before k-means."""


def split(
    ffn: FFN,
    profile: Profile,
    shape: Shape,
    *,
    generator: torch.Generator,
    rounds: Annotated[int, Range(0)] = ROUNDS,
    routed_rounds: Annotated[int, Range(0)] = ROUNDS,
    sample: Annotated[int, Range(64)] = SAMPLE,
) -> Partition:
    """Alternate between routing tokens to experts and neurons to experts.

    Start: neurons of greatest mean output energy are shared, the others are clustered by their
    output profile over the tokens (k-means, then balanced). Each round routes the tokens, gives
    neuron i in expert e the energy A_ie = sum over e's tokens of c_ti it would deliver there,
    shares the neurons that lose most by being routed, and assigns the others on A (balanced,
    optimal). The first `rounds` route by the experts' true energies; the `routed_rounds` after
    them route by the linear router fitted to the experts of that moment, so that experts form
    which such a router can serve. The round whose linear router captures most energy on the
    held-out tokens is returned. At most `sample` fitting tokens are used. Neurons that make
    attention sinks (`Profile.sink_F`) are shared before all others, so that no model hangs on one
    expert.

    Where the shape overlaps, every expert takes the neurons that deliver most on its own tokens,
    whoever else has them, the neurons that deliver most in all are shared, and the start is k-means
    of the tokens' inputs.

    Source: the loop is ours; its ingredients are the balanced clustering of MoEfication
    (arXiv 2110.01786) and the output-aware assignment of DOT-MoE (arXiv 2606.01666).
    Cost: a few passes of T * F * E operations.
    """
    x_TD, energy_TF = _sample(ffn, profile, sample, "fit")
    held_x_TD, held_energy_TF = _sample(ffn, profile, sample // 4, "heldout")
    sink_F = profile.sink_F
    if shape.overlaps:
        start = _reassign(energy_TF, _cluster_tokens(x_TD, shape, generator), shape, sink_F)
    else:
        shared_S, rest = ranked(profile.energy_F, shape.num_shared, sink_F)
        start = _cluster(energy_TF, shared_S, rest, shape, generator)
    partitions, captured, fit = [start], [], scorer(x_TD)
    for turn in range(rounds + routed_rounds + 1):
        partition = partitions[-1]
        experts_TE = _expert_energy(energy_TF, partition)
        weight_ED = fit(experts_TE)
        captured.append(_captured(held_energy_TF, held_x_TD @ weight_ED.T, partition, shape))
        if turn < rounds + routed_rounds:
            score_TE = experts_TE if turn < rounds else x_TD @ weight_ED.T
            mask_TE = top_mask(score_TE, shape.experts_per_token)
            partitions.append(_reassign(energy_TF, mask_TE, shape, sink_F))
    return partitions[int(torch.stack(captured).argmax())]


def _sample(ffn: FFN, profile: Profile, most: int, part: str) -> tuple[Tensor, Tensor]:
    """Inputs (T, D) and output energies (T, F) of at most `most` evenly spaced tokens."""
    first, last = profile.span(part)
    before, total = profile.group.before(last - first)
    step = max(1, -(-total // most))
    first = min(first + -before % step, last)
    tokens = slice(first, last, step)
    x_TD, norm_F = profile.x_TD[tokens].to(profile.device), ffn.down_norm_sq_F
    energy_TF = x_TD.new_empty(len(x_TD), ffn.num_neurons)
    for number, part_TF in enumerate(energy_TF.split(CHUNK)):
        start = first + number * CHUNK * tokens.step
        some = slice(start, start + len(part_TF) * tokens.step, tokens.step)
        torch.square(activations(ffn, profile, some), out=part_TF).mul_(norm_F)
        profile.release()
    return profile.group.gather(x_TD), profile.group.gather(energy_TF)


def _cluster(
    energy_TF: Tensor, shared_S: Tensor, rest: Tensor, shape: Shape, generator: torch.Generator
) -> Partition:
    """Balanced k-means of the neurons that are not shared on their sketched profiles."""
    profile_TR = energy_TF[:, rest].sqrt_()
    profile_TR -= profile_TR.mean(0)
    profile_TR /= profile_TR.norm(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    directions_TQ = torch.randn(len(profile_TR), SKETCH, generator=generator).to(profile_TR.device)
    point_RQ = profile_TR.T @ directions_TQ
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    centre_EQ, _ = kmeans(point_RQ, shape.num_experts, seed)
    closeness_RE = point_RQ @ centre_EQ.T - 0.5 * centre_EQ.square().sum(1)
    return _partition(shared_S, rest, closeness_RE, shape)


def _cluster_tokens(x_TD: Tensor, shape: Shape, generator: torch.Generator) -> Tensor:
    """One where a token is in a cluster, (T, E): k-means of the sketched inputs."""
    if len(x_TD) < shape.num_experts:
        raise MoefyError(
            f"{len(x_TD)} tokens to fit on cannot make {shape.num_experts} clusters; raise "
            "--tokens and partition.sample, or lower --experts",
            code=2,
        )
    directions_DQ = torch.randn(x_TD.shape[1], SKETCH, generator=generator).to(x_TD.device)
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    _, cluster_T = kmeans(x_TD @ directions_DQ, shape.num_experts, seed)
    return torch.nn.functional.one_hot(cluster_T, shape.num_experts).to(x_TD)


def _reassign(energy_TF: Tensor, mask_TE: Tensor, shape: Shape, sink_F: Tensor | None) -> Partition:
    """Share the sinks and what loses most by being routed; give the others their best expert."""
    delivered_FE = (mask_TE.T @ energy_TF).T  # a tenth of the time that energy_TF.T takes
    if shape.overlaps:
        shared_S = ranked(energy_TF.sum(0), shape.num_shared, sink_F)[0].sort().values
        delivered_FE[shared_S] = -1.0
        best_FE = delivered_FE.argsort(dim=0, descending=True, stable=True)
        return Partition(shared_S, best_FE[: shape.expert_width].T.sort(1).values.contiguous())
    loss_F = energy_TF.sum(0) - delivered_FE.max(1).values
    shared_S, rest = ranked(loss_F, shape.num_shared, sink_F)
    return _partition(shared_S, rest, delivered_FE[rest], shape)


def _partition(shared_S: Tensor, rest: Tensor, value_RE: Tensor, shape: Shape) -> Partition:
    return gathered(shared_S, rest, assign(value_RE, shape.expert_width), shape.num_experts)


def _expert_energy(energy_TF: Tensor, partition: Partition) -> Tensor:
    return energy_TF @ membership(partition, energy_TF.shape[1])


def _captured(energy_TF: Tensor, score_TE: Tensor, partition: Partition, shape: Shape) -> Tensor:
    """Share of all output energy that the shared and the chosen experts deliver."""
    routed_TE = _expert_energy(energy_TF, partition) * top_mask(score_TE, shape.experts_per_token)
    delivered = routed_TE.sum() + energy_TF[:, partition.shared_S].sum()
    return delivered / energy_TF.sum()
