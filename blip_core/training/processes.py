"""What the processes of one training tell each other. Rows are put together in the order of the whole batch.

Process r of W holds every W-th row of a batch, beginning with row r: the stream deals them out so.
"""

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


def world() -> int:
    """How many processes train together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, 0..world - 1."""
    return dist.get_rank() if world() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return rank() == 0


@torch.no_grad()
def gather(rows: Tensor) -> Tensor:
    """The rows (B, ...) of all processes, (W * B, ...), in the order of the whole batch."""
    if world() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def gather_with_gradient(rows: Tensor) -> Tensor:
    """As `gather`; what the losses of all processes say of this process's rows comes back to them, summed."""
    return _Gather.apply(rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        return gather(rows)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        if world() == 1:
            return gradient
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return own_rows(total)


def gather_ragged(rows: Tensor, fill: int = 0) -> Tensor:
    """As `gather`, for (B, L) whose L differs between processes: shorter ones are filled on the right."""
    longest = torch.tensor(rows.shape[1], device=rows.device)
    if world() > 1:
        dist.all_reduce(longest, dist.ReduceOp.MAX)
    return gather(torch.nn.functional.pad(rows, (0, int(longest) - rows.shape[1]), value=fill))


def own_rows(rows: Tensor) -> Tensor:
    """This process's rows of a whole batch."""
    return rows[rank() :: world()]


@torch.no_grad()
def mean(values: Tensor) -> Tensor:
    """The mean over processes of equal-shaped values."""
    if world() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total / world()


def gather_objects(value: Value) -> list[Value]:
    """A small picklable value of each process, in their order."""
    if world() == 1:
        return [value]
    parts: list[Value | None] = [None] * world()
    dist.all_gather_object(parts, value)
    return cast(list[Value], parts)


def wait() -> None:
    """Returns when all processes have come here."""
    if world() > 1:
        dist.barrier()
