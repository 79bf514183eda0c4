"""How fast a device does what a conversion consists of, from a probe of about half a second."""

from __future__ import annotations

from collections.abc import Callable
from operator import sub
from typing import Any

import torch

from moefy.convert.assign_on_device import assign
from moefy.convert.kmeans import kmeans
from moefy.convert.partition.alternating import SKETCH
from moefy.timing import now
from moefy.types import Shape

SIZE = {"cpu": 1024, "cuda": 4096}
"""Rows of the matrices: a smaller one leaves most of a GPU idle."""

ROWS = 4096
"""Neurons that are clustered and assigned at most; the time for more follows from theirs."""

STARTS = 100
"""Small operations that are started at a time: waiting for a GPU takes longer than one of them."""

LEAST = 0.05
"""Seconds that each kind of work is repeated for."""

LEAST_CALLS = 3
"""Times that it is repeated, if that takes longer: one call alone may fall on a busy moment."""


def speeds(device: torch.device, shape: Shape) -> dict[str, float]:
    """Work per second by kind.

    Float32 operations of a `product`, of a `factor` (Cholesky's) and of a `solve` (two triangles);
    elements of a `pass` over memory; `start`s of operations too small to take time themselves;
    `cluster`ings of a layer's routed neurons, and balanced `assign`ments of them to its experts.
    """
    size = SIZE[device.type]
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    def start() -> None:
        for _ in range(STARTS):
            one.add_(1.0)

    a_NN, b_NN = drawn(size, size), drawn(size, size)
    gram_NN = (a_NN @ a_NN.T).div_(size)
    gram_NN.diagonal().add_(1.0)
    factor_NN, one = torch.linalg.cholesky(gram_NN), torch.ones(1, device=device)

    def solve() -> None:
        half_NN = torch.linalg.solve_triangular(factor_NN, b_NN, upper=False)
        torch.linalg.solve_triangular(factor_NN.mT, half_NN, upper=True)

    rates = {
        "product": rate(device, lambda: a_NN @ b_NN, 2.0 * size**3),
        "factor": rate(device, lambda: torch.linalg.cholesky_ex(gram_NN), size**3 / 3),
        "solve": rate(device, solve, 2.0 * size**3),
        "pass": rate(device, lambda: torch.square(a_NN, out=b_NN), size**2),
        "start": rate(device, start, STARTS),
    }
    if not shape.num_experts:
        return rates
    routed = shape.num_experts * shape.expert_width
    width = max(1, min(routed, ROWS) // shape.num_experts)
    rows = width * shape.num_experts
    point_RQ, value_RE = drawn(rows, SKETCH), drawn(rows, shape.num_experts)
    some = rows / routed
    return rates | {
        "cluster": rate(device, lambda: kmeans(point_RQ, shape.num_experts, 0), some),
        "assign": rate(device, lambda: assign(value_RE, width), some),
    }


def rate(device: torch.device, work: Callable[[], Any], amount: float) -> float:
    """Amount of work per second, where one call does `amount`.

    The first call only warms up, and the fastest one counts: others may share the machine.
    """
    work()
    times = [now(device)]
    while len(times) <= LEAST_CALLS or times[-1] - times[0] < LEAST:
        work()
        times.append(now(device))
    return amount / max(min(map(sub, times[1:], times)), 1e-9)
