"""Train the neurons of a split FFN against the outputs it aims at, behind the closed form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from moefy.convert.profile import CHUNK, chunks
from moefy.convert.routed_ffn import RoutedFFN
from moefy.types import ACTIVATIONS, FFN, Profile

RATE = 0.01
"""Step of Adam at its greatest, as a share of a matrix's standard deviation."""

WARMUP = 0.1  # share of the steps in which the rate rises


def polish(
    routed: RoutedFFN, profile: Profile, passes: int, generator: torch.Generator
) -> tuple[RoutedFFN, float]:
    """Train gate, up and down by Adam on the fitting tokens, the router as it is.

    The loss is the squared error of the outputs under the actual routing. `passes` go over all
    tokens, in batches of `profile.CHUNK`; after each one the held-out tokens are looked at. Gives
    the weights that err least there, with their error as in `Refit`: those that came, where no pass
    made them better.

    Source: what a quantised block is trained for in BRECQ (arXiv 2102.05426), its own output. Cost:
    18 * T * A * D operations a pass, of A active neurons.
    """
    ffn, partition = routed.ffn, routed.partition
    # The shared neurons, then one expert's behind the other's, as rows of matrices of their own.
    used_A = torch.cat([partition.shared_S, partition.experts_EN.reshape(-1)])
    sizes = [len(partition.shared_S), *[partition.experts_EN.shape[1]] * len(partition.experts_EN)]
    rows = {"gate_FD": ffn.gate_FD, "up_FD": ffn.up_FD, "down_DF": ffn.down_DF.T}
    trained = {
        name: matrix.index_select(0, used_A).requires_grad_()
        for name, matrix in rows.items()
        if matrix is not None
    }
    bias_A = None if ffn.bias_F is None else ffn.bias_F[used_A]
    seen = chunks(ffn, profile, "all")
    chosen_TE = torch.cat([routed.mask(x_TD, h_TF, at_T) > 0 for x_TD, h_TF, _, at_T in seen])

    def outputs(x_TD: Tensor, chosen_TE: Tensor) -> Tensor:
        parts = {name: matrix.split(sizes) for name, matrix in trained.items()}
        biases = [None] * len(sizes) if bias_A is None else bias_A.split(sizes)
        y_TD = torch.zeros_like(x_TD)
        for number, bias_N in enumerate(biases):
            part = FFN(
                parts["gate_FD"][number] if "gate_FD" in parts else None,
                parts["up_FD"][number],
                parts["down_DF"][number].T,
                ffn.activation,
                bias_N,
            )
            if number == 0:
                y_TD = y_TD + activations(part, x_TD) @ part.down_DF.T
                continue
            token_T = chosen_TE[:, number - 1].nonzero()[:, 0]
            part_TD = activations(part, x_TD[token_T]) @ part.down_DF.T
            y_TD = y_TD.index_add(0, token_T, part_TD)
        return y_TD

    def wrong(token_T: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error and squared aim of some tokens."""
        x_TD, goal_TD = (
            part_TD.index_select(0, token_T.to(part_TD.device)).to(profile.device)
            for part_TD in (profile.x_TD, profile.goal_TD)
        )
        token_T = token_T.to(profile.device)
        y_TD = outputs(x_TD, chosen_TE[token_T]) * profile.scale_T[token_T, None]
        profile.release()
        return (y_TD - goal_TD).square().sum(), goal_TD.square().sum()

    def error() -> float:
        held_T = torch.arange(profile.num_fit, len(profile.x_TD))
        left, norm = (
            torch.tensor([wrong(token_T) for token_T in held_T.split(CHUNK)]).double().sum(0)
        )
        return float((left / norm.clamp_min(1e-30)).sqrt())

    adam = torch.optim.Adam(
        {"params": [matrix], "lr": RATE * float(matrix.detach().std())}
        for matrix in trained.values()
    )
    steps = passes * math.ceil(profile.num_fit / CHUNK)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: _share(step / steps))
    with torch.no_grad():
        best, least = ffn, error()
    for _ in range(passes):
        for token_T in torch.randperm(profile.num_fit, generator=generator).split(CHUNK):
            adam.zero_grad()
            left, norm = wrong(token_T)
            (left / norm).backward()
            adam.step()
            schedule.step()
        with torch.no_grad():
            if (left := error()) < least:
                best, least = _with_rows(ffn, used_A, trained), left
    return dataclasses.replace(routed, ffn=best), least


def _with_rows(ffn: FFN, used_A: Tensor, rows: Mapping[str, Tensor]) -> FFN:
    """The FFN with other weights of some neurons."""
    changed = {name: getattr(ffn, name).clone() for name in rows}
    for name, matrix in changed.items():
        (matrix.T if name == "down_DF" else matrix)[used_A] = rows[name].detach()
    return dataclasses.replace(ffn, **changed)


def activations(ffn: FFN, x_TD: Tensor) -> Tensor:
    """`FFN.activations`, through which gradients go: nothing is overwritten."""
    name, options = ACTIVATIONS[ffn.activation]
    options = {key: value for key, value in options.items() if key != "inplace"}
    h_TF = x_TD @ (ffn.up_FD if ffn.gate_FD is None else ffn.gate_FD).T
    h_TF = h_TF if ffn.bias_F is None else h_TF + ffn.bias_F
    h_TF = getattr(functional, name)(h_TF, **options)
    h_TF = h_TF.square() if ffn.activation == "relu2" else h_TF
    return h_TF if ffn.gate_FD is None else h_TF * (x_TD @ ffn.up_FD.T)


def _share(done: float) -> float:
    """Of the greatest rate: it rises straight, then falls as a cosine to zero."""
    return min(1.0, (done + 1e-3) / WARMUP) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
