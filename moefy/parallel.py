"""Several processes that share the calibration tokens, as `torchrun` starts them.

Each has whole sequences of those that are fitted on and of those that are held out, in order, so
that what is gathered has the order that one process would see. What is summed is summed over all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from moefy.errors import MoefyError

if TYPE_CHECKING:
    from torch import Tensor

WAIT = timedelta(days=7)
"""For another process; the first one alone has work that may take hours."""

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This process among `size` that do one conversion together; the first one writes.

    All methods but `piece` are for all processes to call, in the same order.
    """

    rank: int = 0
    size: int = 1

    def piece(self, count: int) -> slice:
        """Which of `count` things in a row are this process's."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def sum(self, *parts: Tensor) -> None:
        """Replace tensors by their sums over the processes, in place."""
        for part in parts if self.size > 1 else ():
            _distributed().all_reduce(part)

    def total(self, value: float) -> float:
        """The sum of a number over the processes."""
        return value if self.size == 1 else sum(self._all(value))

    def gather(self, part_T: Tensor) -> Tensor:
        """The rows of all processes, one process's behind the other's."""
        if self.size == 1:
            return part_T
        import torch

        sizes = self._all(len(part_T))
        parts = [part_T.new_empty(size, *part_T.shape[1:]) for size in sizes]
        parts[self.rank] = part_T.contiguous()
        for rank, part in enumerate(parts):
            _distributed().broadcast(part, src=rank)
        return torch.cat(parts)

    def before(self, count: int) -> tuple[int, int]:
        """Of a count in every process: how much those before this one have, and all have."""
        counts = [count] if self.size == 1 else self._all(count)
        return sum(counts[: self.rank]), sum(counts)

    def agreed(self, value: T, source: int = 0) -> T:
        """A tensor, or a dataclass's tensors, as one process has them: the others may differ in
        the last bits. What is no tensor stays."""
        import torch

        if self.size == 1:
            return value
        if isinstance(value, torch.Tensor):
            sent = value.contiguous().clone()
            _distributed().broadcast(sent, src=source)
            return sent  # pyright: ignore[reportReturnType]
        tensors = {
            field.name: self.agreed(found, source)
            for field in dataclasses.fields(value)  # pyright: ignore[reportArgumentType]
            if isinstance(found := getattr(value, field.name), torch.Tensor)
        }
        return dataclasses.replace(value, **tensors)  # pyright: ignore[reportArgumentType]

    def tell(self, value: Any) -> None:
        """From the first process, to all that call `hear`."""
        if self.size > 1:
            _distributed().broadcast_object_list([value], src=0)

    def hear(self) -> Any:
        """What the first process tells."""
        told: list[Any] = [None]
        _distributed().broadcast_object_list(told, src=0)
        return told[0]

    def _all(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        _distributed().all_gather_object(found, value)
        return found


ALONE = Group()


@dataclass(frozen=True)
class Share:
    """Which sequences are this process's: some of those to fit on, then some of those held out.

    Rows (B, ...) are one for each sequence, those to fit on first; or so many several times over.
    """

    group: Group
    num_fit: int
    num_heldout: int
    """Of all processes, as `num_fit` is."""

    def own(self, all_B: Tensor) -> Tensor:
        """Its own rows, of those of all."""
        import torch

        if self.group.size == 1:
            return all_B
        times_MB = all_B.view(-1, self.num_fit + self.num_heldout, *all_B.shape[1:])
        fit_MB, heldout_MB = times_MB[:, : self.num_fit], times_MB[:, self.num_fit :]
        fit_MB = fit_MB[:, self.group.piece(self.num_fit)]
        heldout_MB = heldout_MB[:, self.group.piece(self.num_heldout)]
        return torch.cat([fit_MB, heldout_MB], 1).flatten(0, 1)

    def whole(self, own_B: Tensor) -> Tensor:
        """The rows of all, in the order in which `own` takes them."""
        import torch

        if self.group.size == 1:
            return own_B
        fit, heldout = self.group.piece(self.num_fit), self.group.piece(self.num_heldout)
        num_fit = fit.stop - fit.start
        num_own = num_fit + heldout.stop - heldout.start
        own_BM = own_B.view(-1, num_own, *own_B.shape[1:]).transpose(0, 1)
        parts = [self.group.gather(part) for part in (own_BM[:num_fit], own_BM[num_fit:])]
        return torch.cat(parts).transpose(0, 1).flatten(0, 1)

    def last(self, own_B: Tensor) -> Tensor:
        """The last row of all."""
        return self.group.agreed(own_B[-1].clone(), source=self.group.size - 1)


def launched() -> Group:
    """The group that `torchrun` has started this process in; `ALONE` without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    import torch

    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed = torch.distributed
    if not distributed.is_initialized():
        distributed.init_process_group(backend, timeout=WAIT)
    return Group(distributed.get_rank(), size)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Tell in one line of a process of the group that is gone.

    Raises:
        MoefyError: code 5, when another process has stopped.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__.startswith("Dist") or "gloo" in str(error):
            raise MoefyError(
                "another process of this conversion has stopped, and told why; run the same "
                "command again to go on",
                code=5,
            ) from None
        raise


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed
