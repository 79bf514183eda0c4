"""Several processes that share the calibration tokens, as `torchrun` starts them.

Each has whole sequences, one behind the other. What is gathered then has the order that one process
would see. Sums whose last bits decide on bytes are taken in that order, too, and several processes
make what one makes. (Clusters and rounds of assignment magnify any rounding.)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from moefy.errors import MoefyError

if TYPE_CHECKING:
    from torch import Tensor

WAIT = timedelta(days=7)
"""Longest wait for another process. The first one has work of its own that may take hours."""

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This process among `size` that do one conversion together; the first one writes.

    All methods are for all processes to call, in the same order.
    """

    rank: int = 0
    size: int = 1

    def sum(self, *parts: Tensor) -> None:
        """Replace tensors by their sums over the processes, in place."""
        for part in parts if self.size > 1 else ():
            _distributed().all_reduce(part)

    def total(self, value: float) -> float:
        """The sum of a number over the processes."""
        return value if self.size == 1 else sum(self.all_objects(value))

    def in_turn(self, add: Callable[[], None], *sums: Tensor) -> None:
        """Let one process after the other `add` its part to tensors, which then are the same in
        all."""
        if self.size == 1:
            return add()
        for rank in range(self.size):
            if rank == self.rank:
                add()
            for part in sums:
                _distributed().broadcast(part, src=rank)

    def gather(self, part_T: Tensor) -> Tensor:
        """The rows of all processes, one process's behind the other's."""
        if self.size == 1:
            return part_T
        import torch

        sizes = self.all_objects(len(part_T))
        parts = [part_T.new_empty(size, *part_T.shape[1:]) for size in sizes]
        parts[self.rank] = part_T.contiguous()
        for rank, part in enumerate(parts):
            _distributed().broadcast(part, src=rank)
        return torch.cat(parts)

    def before(self, count: int) -> tuple[int, int]:
        """The sum of a count over the processes before this one, and over all."""
        counts = [count] if self.size == 1 else self.all_objects(count)
        return sum(counts[: self.rank]), sum(counts)

    def broadcast(self, value: T, source: int = 0) -> T:
        """A tensor, or a dataclass's tensors, as the process `source` has them: the others may
        differ in the last bits. What is no tensor stays."""
        if self.size == 1:
            return value
        import torch

        if isinstance(value, torch.Tensor):
            sent = value.contiguous().clone()
            _distributed().broadcast(sent, src=source)
            return sent  # pyright: ignore[reportReturnType]
        tensors = {
            field.name: self.broadcast(part, source)
            for field in dataclasses.fields(value)  # pyright: ignore[reportArgumentType]
            if isinstance(part := getattr(value, field.name), torch.Tensor)
        }
        return dataclasses.replace(value, **tensors)  # pyright: ignore[reportArgumentType]

    def broadcast_object(self, value: Any = None) -> Any:
        """The value that the first process gives."""
        values = [value]
        if self.size > 1:
            _distributed().broadcast_object_list(values, src=0)
        return values[0]

    def all_objects(self, value: Any) -> list[Any]:
        """The values that the processes give, in their order."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            _distributed().all_gather_object(values, value)
        return values

    def end(self) -> None:
        """Leave the group; NCCL warns of a process that stops before."""
        if self.size > 1:
            _distributed().destroy_process_group()


ALONE = Group()


@dataclass(frozen=True)
class Share:
    """Which sequences are this process's.

    Tensors (B, ...) have one row per sequence, or several runs of such rows.
    """

    group: Group
    num_sequences: int  # of all processes
    block: int  # sequences that always stay together, because they are computed together

    @property
    def piece(self) -> slice:
        """The sequences of this process."""
        num_blocks, rank = -(-self.num_sequences // self.block), self.group.rank
        ends = [num_blocks * end // self.group.size for end in (rank, rank + 1)]
        return slice(*(min(self.block * end, self.num_sequences) for end in ends))

    def own(self, all_B: Tensor) -> Tensor:
        """The rows of this process, from those of all."""
        if self.group.size == 1:
            return all_B
        times_MB = all_B.view(-1, self.num_sequences, *all_B.shape[1:])
        return times_MB[:, self.piece].flatten(0, 1).clone()

    def whole(self, own_B: Tensor) -> Tensor:
        """The rows of all processes, from those of each."""
        if self.group.size == 1:
            return own_B
        times_MB = own_B.view(-1, self.piece.stop - self.piece.start, *own_B.shape[1:])
        return self.group.gather(times_MB.transpose(0, 1)).transpose(0, 1).flatten(0, 1)

    def last(self, own_B: Tensor) -> Tensor:
        """The last row of the last process."""
        return self.group.broadcast(own_B[-1].clone(), source=self.group.size - 1)


def launched() -> Group:
    """The group that `torchrun`, or what sets the same variables, has started this process in;
    `ALONE` without it."""
    several = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if not several or os.environ["WORLD_SIZE"] == "1":
        return ALONE
    import torch

    num_gpus = torch.cuda.device_count()
    if num_gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % num_gpus)
    distributed = torch.distributed
    if not distributed.is_initialized():
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        distributed.init_process_group(backend(local, num_gpus), timeout=WAIT)
    return Group(distributed.get_rank(), distributed.get_world_size())


def backend(num_processes: int, num_gpus: int) -> str:
    """What sums and broadcasts tensors, for so many processes and GPUs of one machine.

    NCCL takes a GPU's tensors, and wants a GPU for each process. Gloo takes all tensors.
    """
    return "cpu:gloo,cuda:nccl" if num_processes <= num_gpus else "gloo"


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
                "another process has stopped with a message of its own; run the same command again "
                "to go on",
                code=5,
            ) from None
        raise


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed
