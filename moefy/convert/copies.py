"""Turn one FFN into copies of itself: route among them, vary them, and measure both."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moefy.convert.ffn import Block, Method
from moefy.convert.profile import CHUNK, Inputs, observe
from moefy.convert.routed_ffn import RoutedFFN, top_mask
from moefy.timing import Clock
from moefy.types import FFN, Partition, Shape


def copy_block(
    ffn: FFN, inputs: Inputs, shape: Shape, method: Method, *, dtype: torch.dtype, seed: int
) -> Block:
    """Make copies of `ffn`, and write weights as `dtype` holds them; see `convert_block`.

    The gates of the chosen experts sum to one. As long as the copies are alike, whichever are
    chosen compute what `ffn` does.
    """
    assert method.fit is not None
    clock, group = Clock({}), inputs.group
    generator = torch.Generator().manual_seed(seed)
    with clock.stage("profile"):
        profile = observe(ffn, inputs)
    with clock.stage("split"):
        partition = group.broadcast(method.split(ffn, profile, shape, generator=generator))
    with clock.stage("route"):
        router = method.fit(ffn, profile, partition, shape.whole, generator=generator)
        # All slices of a copy have its row, so that they are chosen together.
        rows_ED = router.weight_ED.repeat_interleave(shape.granularity, 0).to(dtype).float()
        router = group.broadcast(dataclasses.replace(router, weight_ED=rows_ED))
    with clock.stage("vary"):
        if method.noise or method.reinit:
            ffn, partition = varied(ffn, partition, method, generator)
        every_F = torch.arange(ffn.num_neurons, device=ffn.up_FD.device)
        stored = ffn.some(every_F, dtype).some(every_F, torch.float32)
    routed = RoutedFFN(stored, partition, router, shape.experts_per_token)
    with clock.stage("run"):
        load_E, squares_2 = (
            torch.zeros(shape.num_experts, device=profile.device),
            torch.zeros(2, dtype=torch.float64),
        )
        for number, x_TD in enumerate(profile.x_TD.split(CHUNK)):
            x_TD, first = x_TD.to(profile.device), number * CHUNK
            part = slice(first, first + CHUNK)
            gate_TE = gates(x_TD @ router.weight_ED.T, routed.k)
            y_TD = outputs(routed, x_TD, gate_TE, shape.granularity)
            load_E += (gate_TE > 0).sum(0)
            held = slice(max(profile.num_fit - first, 0), None)
            dense_TD = profile.goal_TD[part].to(profile.device)[held]
            wrong_TD = y_TD[held] * profile.scale_T[part][held, None] - dense_TD
            squares_2 += torch.stack([wrong_TD.square().sum(), dense_TD.square().sum()]).cpu()
            profile.goal_TD[part] = y_TD
            profile.release()
    group.sum(squares_2)
    group.sum(load_E)
    share_E = load_E / load_E.sum()
    seconds = clock.seconds()
    figures = {
        "shared_neurons": shape.num_shared,
        "experts": shape.num_experts,
        "expert_width": shape.expert_width,
        "experts_per_token": shape.experts_per_token,
        "error": float((squares_2[0] / squares_2[1].clamp_min(1e-30)).sqrt()),
        "expert_load": [round(float(share), 5) for share in share_E],
        "load_cv": float(share_E.std(correction=0) / share_E.mean()),
        "seconds": round(seconds.pop("total"), 3),
        "stage_seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }
    return Block(routed, profile.goal_TD, figures)


def varied(
    ffn: FFN, partition: Partition, method: Method, generator: torch.Generator
) -> tuple[FFN, Partition]:
    """An FFN in which every copy of a neuron stands for itself, the copies varied, and where the
    neurons stand in it. Shared neurons stay as they are.

    With `noise` s every weight w gets s * std(W) * n, n normal. With `reinit` r a share r of each
    expert's neurons is drawn anew: their rows of gate and up and their column of down are normal,
    with the mean and the deviation that these weights have in the dense FFN.

    Source: Drop-Upcycling (arXiv 2502.19261) for `reinit`. It draws with the mean and the deviation
    of the weights that it replaces, we with those of the whole matrix.
    """
    shared, (num_experts, width) = len(partition.shared_S), partition.experts_EN.shape
    neurons = torch.cat([partition.shared_S, partition.experts_EN.reshape(-1)])
    place = torch.arange(len(neurons), device=neurons.device)
    anew_EN = torch.zeros(num_experts, width)
    for anew_N in anew_EN:
        anew_N[torch.randperm(width, generator=generator)[: round(method.reinit * width)]] = 1
    copied_F1 = (place >= shared).float()[:, None]
    anew_F1 = torch.cat([torch.zeros(shared), anew_EN.reshape(-1)])[:, None].to(neurons.device)

    def vary(weight_FD: Tensor) -> Tensor:
        size = (len(neurons), weight_FD.shape[1])
        draw_FD = torch.randn(size, generator=generator).to(weight_FD.device) * weight_FD.std()
        noisy_FD = weight_FD[neurons] + method.noise * copied_F1 * draw_FD
        return torch.where(anew_F1 > 0, weight_FD.mean() + draw_FD, noisy_FD)

    copied = FFN(
        None if ffn.gate_FD is None else vary(ffn.gate_FD),
        vary(ffn.up_FD),
        vary(ffn.down_DF.T).T.contiguous(),
        ffn.activation,
        None if ffn.bias_F is None else ffn.bias_F[neurons],
    )
    return copied, Partition(place[:shared], place[shared:].view(num_experts, width))


def gates(score_TE: Tensor, k: int) -> Tensor:
    """Softmax weights of the `k` experts of highest score, which sum to one, and zeros (T, E)."""
    chosen_TE = top_mask(score_TE, k) > 0
    return score_TE.masked_fill(~chosen_TE, float("-inf")).softmax(1)


def outputs(routed: RoutedFFN, x_TD: Tensor, gate_TE: Tensor, granularity: int) -> Tensor:
    """What the shared neurons write, and the experts times their gates and `granularity` (T, D)."""

    def run(neurons: Tensor, x_TD: Tensor) -> Tensor:
        part = routed.ffn.some(neurons)
        return part.activations(x_TD) @ part.down_DF.T

    y_TD = run(routed.partition.shared_S, x_TD)
    for expert, neurons in enumerate(routed.partition.experts_EN):
        token_T = gate_TE[:, expert].nonzero()[:, 0]
        part_TD = run(neurons, x_TD[token_T])
        y_TD.index_add_(0, token_T, part_TD * (granularity * gate_TE[token_T, expert])[:, None])
    return y_TD
