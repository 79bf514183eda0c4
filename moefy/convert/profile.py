"""What an FFN does on calibration tokens, neuron by neuron."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moefy.distributed import ALONE, Group
from moefy.errors import MoefyError
from moefy.files.buffers import MEMORY, Store
from moefy.types import FFN, Profile

CHUNK = 2048  # tokens whose activations are in memory at a time
SAMPLE = 8192  # fitting tokens that a split looks at, where it does not need all
SINK = 10.0
"""A neuron makes an attention sink if at some token it writes this many times what the whole FFN
writes at the median token. In the models measured others reach 9, and the strongest 620."""


@dataclass(frozen=True)
class Inputs:
    """What the calibration tokens of one process bring to an FFN."""

    x_TD: Tensor
    num_heldout: int  # the last tokens, which nothing is fitted on
    residual_TD: Tensor | None = None  # what the output is added to; without it tokens weigh alike
    join: Callable[[Tensor], Tensor] | None = None  # what the output goes through before that
    dense_TD: Tensor | None = None  # what leaves the layer in the dense model
    gradient_TD: Tensor | None = None  # see `Profile`
    store: Store = MEMORY  # where tensors of all tokens lie
    group: Group = ALONE  # the processes that have the other tokens
    length: int = 1  # tokens of each sequence


def add_outputs(
    ffn: FFN,
    x_TD: Tensor,
    states_TD: Tensor,
    join: Callable[[Tensor], Tensor] | None,
    store: Store = MEMORY,
) -> None:
    """Add to the states, in place, what an FFN computes from its inputs."""
    for x_CD, state_CD in zip(x_TD.split(CHUNK), states_TD.split(CHUNK), strict=True):
        y_CD = ffn.activations(x_CD) @ ffn.down_DF.T
        state_CD += join(y_CD) if join else y_CD
        store.release()


def chunks(
    ffn: FFN, profile: Profile, part: str = "fit"
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield inputs (T, D), scaled activations (T, F), what the output aims at (T, D), and where in
    their sequences the tokens stand (T,)."""
    (start, stop), device = profile.span(part), ffn.up_FD.device
    for first in range(start, stop, CHUNK):
        tokens = slice(first, min(first + CHUNK, stop))
        x_TD = profile.x_TD[tokens].to(device)
        h_TF = _activations(ffn, profile, x_TD, tokens)
        position_T = torch.arange(tokens.start, tokens.stop, device=device) % profile.length
        yield x_TD, h_TF, profile.goal_TD[tokens].to(device), position_T
        profile.release()


def activations(ffn: FFN, profile: Profile, tokens: slice) -> Tensor:
    """Scaled activations of some of the profile's tokens, shape (T, F)."""
    return _activations(ffn, profile, profile.x_TD[tokens], tokens)


def _activations(ffn: FFN, profile: Profile, x_TD: Tensor, tokens: slice) -> Tensor:
    """The same, with these tokens' inputs."""
    ffn, neuron_A = profile.folded or (ffn, None)
    if profile.h_TF is None:
        h_TF = ffn.activations(x_TD.to(ffn.up_FD.device)).mul_(profile.scale_T[tokens, None])
    else:
        h_TF = profile.h_TF[tokens]
    return h_TF if neuron_A is None else h_TF.index_select(1, neuron_A)


def some_activations(ffn: FFN, profile: Profile, token_T: Tensor, neurons: Tensor) -> Tensor:
    """Scaled activations of some neurons on some tokens."""
    if profile.h_TF is not None:
        neurons = neurons if profile.folded is None else profile.folded[1][neurons]
        return profile.h_TF[token_T[:, None], neurons]
    x_TD = profile.x_TD[token_T.to(profile.x_TD.device)].to(ffn.up_FD.device)
    h_TN = ffn.some(neurons).activations(x_TD)
    return h_TN.mul_(profile.scale_T[token_T, None])


def observe(ffn: FFN, inputs: Inputs, error_propagation: float = 0.0) -> Profile:
    """Profile `ffn` on its inputs.

    The layers below are converted already, and the residual stream has drifted from the dense
    model's. The FFN aims at repairing the share `error_propagation` of that drift.

    Source: `error_propagation` is the propagation strength of QEP (arXiv 2504.09629), which
    corrects the weights of a quantised layer for the errors of those below it. Attention sinks made
    by one or two neurons are the "massive activations" of arXiv 2402.17762, found here by what a
    neuron writes and not by the state.

    Raises:
        MoefyError: code 6, for outputs that are not finite.
    """
    x_TD, store, group = inputs.x_TD, inputs.store, inputs.group
    num_tokens, device = x_TD.shape[0], ffn.up_FD.device
    num_fit = num_tokens - inputs.num_heldout
    all_TF = store.empty(num_tokens, ffn.num_neurons) if store.keeps_activations else None
    goal_TD = store.empty(*x_TD.shape)
    scales, squares, lengths, finite = [], [], [], True
    peak_F = torch.zeros(ffn.num_neurons, device=device)
    for first in range(0, num_tokens, CHUNK):
        part = slice(first, first + CHUNK)
        h_TF = ffn.activations(x_TD[part].to(device))
        y_TD = h_TF @ ffn.down_DF.T
        finite = finite and bool(y_TD.isfinite().all())
        num_part = max(num_fit - first, 0)
        lengths.append(y_TD[:num_part].norm(dim=1))
        if num_part:
            torch.maximum(peak_F, h_TF[:num_part].norm(torch.inf, dim=0), out=peak_F)
        scale_T, lacking_TD = _scale_and_drift(inputs, part, y_TD, error_propagation)
        if lacking_TD is not None:
            y_TD.add_(lacking_TD)
        goal_TD[part] = y_TD.mul_(scale_T[:, None])
        h_TF.mul_(scale_T[:, None])
        squares.append(h_TF[:num_part].square().sum(0))
        scales.append(scale_T)
        if all_TF is not None:
            all_TF[part] = h_TF
        store.release()
    total_F = torch.zeros(ffn.num_neurons, dtype=torch.float64, device=device)
    for square_F in group.gather(torch.stack(squares)):
        total_F += square_F
    energy_F = (total_F / group.total(num_fit)).float() * ffn.down_norm_sq_F
    if group.total(not finite) or not energy_F.isfinite().all():
        raise MoefyError("an FFN's outputs overflow float32 on the calibration tokens", code=6)
    length_F = group.gather(peak_F[None]).amax(0) * ffn.down_norm_sq_F.sqrt()
    return Profile(
        x_TD,
        goal_TD,
        torch.cat(scales),
        inputs.num_heldout,
        energy_F=energy_F,
        sink_F=length_F > SINK * group.gather(torch.cat(lengths)).median(),
        h_TF=all_TF,
        gradient_TD=inputs.gradient_TD,
        release=store.release,
        group=group,
        length=inputs.length,
    )


def _scale_and_drift(
    inputs: Inputs, part: slice, y_TD: Tensor, error_propagation: float
) -> tuple[Tensor, Tensor | None]:
    """The weights of some tokens, and what their outputs `y_TD` lack to repair the share
    `error_propagation` of the drift, if the dense model's states are there."""
    if inputs.residual_TD is None:
        return torch.ones_like(y_TD[:, 0]), None
    added_TD = inputs.join(y_TD) if inputs.join else y_TD
    leaving_TD = inputs.residual_TD[part].to(y_TD.device) + added_TD
    scale_T = leaving_TD.norm(dim=1).clamp_min(1e-6).reciprocal_()
    if inputs.join:  # an error in the output arrives as much larger as the output itself does
        scale_T *= added_TD.norm(dim=1) / y_TD.norm(dim=1).clamp_min(1e-12)
    if inputs.dense_TD is None or not error_propagation:
        return scale_T, None
    lacking_TD = (inputs.dense_TD[part].to(y_TD.device) - leaving_TD).mul_(error_propagation)
    if inputs.join:  # what has to enter it, so that this leaves it
        lacking_TD.div_(_slopes(y_TD, added_TD))
    return scale_T, lacking_TD


def _slopes(y_TD: Tensor, added_TD: Tensor) -> Tensor:
    """How much larger each output leaves a join than it enters, at least as much as the median.

    A norm's weights differ by thousands. Through those that are almost zero nothing can be made
    good, and trying to would fill the output that the norm divides by.
    """
    slope_TD = (added_TD / y_TD).nan_to_num_(0.0, 0.0, 0.0)
    least_T1 = slope_TD.abs().median(dim=1, keepdim=True).values.clamp_min(1e-12)
    return slope_TD.abs().maximum(least_T1).copysign_(slope_TD)
