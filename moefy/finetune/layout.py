"""Where a stock class keeps the neurons of an FFN, so that what `convert` wrote can be read back.

A target says how a split FFN is written, and nothing says how it is read. So a numbered FFN is
written: where its numbers are then, there its neurons are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moefy.models.targets.target import Split, Target, Tensors
from moefy.types import FFN, Partition, Router, Shape


@dataclass(frozen=True)
class Layout:
    """How a target holds FFNs of one shape, the shared neurons first, then expert by expert."""

    target: Target
    shape: Shape
    gated: bool

    @property
    def partition(self) -> Partition:
        """The place of every neuron, in that order."""
        shared, place = self.shape.num_shared, torch.arange(self.shape.num_stored)
        return Partition(place[:shared], place[shared:].view(self.shape.num_experts, -1))

    def write(self, ffn: FFN, dtype: torch.dtype) -> Tensors:
        """The tensors of `down_proj`, of an FFN in that order, as they are stored in `dtype`."""
        tensors = self._tensors(ffn, dtype)
        return {name: tensors[name] for name in self.downs}

    def read(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The rows of gate and of up, as they are stored, (F, D) each.

        Without a gate its rows are empty, (F, 0).
        """
        place, rows = self._numbered(1.0), [torch.empty(0), torch.empty(0)]
        for name, number in place.items():
            number_R = number.flatten().int()
            for part, at_R in enumerate((-number_R, number_R)):
                if name in self.downs or not (chosen_R := at_R > 0).any():
                    continue
                own_RD = tensors[name].reshape(len(number_R), -1)
                if not rows[part].numel():
                    rows[part] = own_RD.new_empty(self.shape.num_stored, own_RD.shape[1])
                rows[part][at_R[chosen_R].long() - 1] = own_RD[chosen_R]
        gate_FD, up_FD = rows
        return gate_FD if self.gated else up_FD.new_empty(len(up_FD), 0), up_FD

    def read_down(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The columns of `down_proj` as they were before the class's scales, float32 (D, F)."""
        one, numbered = self._numbered(1.0), self._numbered(1.0, by_neuron=True)
        places, columns = [], []
        for name in self.downs:
            scale_N1 = one[name].flatten()[:, None]
            places.append((numbered[name].flatten() / scale_N1[:, 0]).round())
            own_ND = tensors[name].float().movedim(-1, -2).reshape(len(scale_N1), -1)
            columns.append(own_ND / scale_N1)
        return torch.cat(columns)[torch.cat(places).argsort()].T

    @cached_property
    def downs(self) -> list[str]:
        """The names of the tensors of `down_proj`."""
        one, two = self._numbered(1.0), self._numbered(2.0)
        return [name for name, tensor in one.items() if not torch.equal(tensor, two[name])]

    @property
    def gate(self) -> float:
        """What the class multiplies the output of a chosen expert by."""
        written = self._numbered(1.0, shared=0.0)
        return 1 / max(float(written[name].max()) for name in self.downs)

    def _numbered(
        self, down: float, *, shared: float | None = None, by_neuron: bool = False
    ) -> Tensors:
        """Up rows are 1 to F, those of gate the same below zero; hidden states have one number.

        `down_proj` is `down`, times the number of the neuron if `by_neuron`; of the shared neurons
        it is `shared`, if that is given.
        """
        number_F1 = torch.arange(1, self.shape.num_stored + 1)[:, None].float()
        down_1F = down * (number_F1.T if by_neuron else torch.ones_like(number_F1.T))
        if shared is not None:
            down_1F[:, : self.shape.num_shared] = shared
        gate_F1 = -number_F1 if self.gated else None
        return self._tensors(FFN(gate_F1, number_F1, down_1F), torch.float32)

    def _tensors(self, ffn: FFN, dtype: torch.dtype) -> Tensors:
        router = Router(torch.zeros(self.shape.num_experts, ffn.hidden_size))
        k = self.shape.experts_per_token
        return self.target.tensors(Split(ffn, self.partition, router, k, dtype))
