"""Training in several processes, started by ``torchrun``: each process takes a share of each batch.

The gradients of the processes are averaged. A loss that is a mean over rows must therefore divide
its local sum by :func:`global_mean_rows`: the average over the processes is then the mean over the
rows of all processes. An in-batch loss reads the rows of all processes through :func:`gather_rows`,
which also passes the gradients back. In a single process every function here changes nothing.

Legend: M rows of this process, R rows of the largest share, W processes, D width.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from features.errors import UserError

T = TypeVar("T")


def is_distributed() -> bool:
    """Whether this process was started as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def world_size() -> int:
    """W, how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """Which of them this is; the first one writes and speaks."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def process_group() -> Iterator[None]:
    """Meet the other processes, where ``torchrun`` has started several; else nothing."""
    if not is_distributed():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_rank_zero(make: Callable[[], T]) -> T:
    """Let the first process do something, and give all of them what it gave.

    Raises:
        UserError: What the first one raised, in all of them.
    """
    if world_size() == 1:
        return make()
    found: list[Any] = [None, None]
    if process_rank() == 0:
        try:
            found[0] = make()
        except UserError as error:
            found[1] = str(error)
        except BaseException:
            found[1] = "the first process failed; what it says stands above"
            dist.broadcast_object_list(found)
            raise
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise UserError(found[1])
    value: T = found[0]
    return value


def all_reduce_mean(
    values: list[float], stop: bool, device: torch.device
) -> tuple[list[float], bool]:
    """The means of the processes' values, and whether any of them wants to stop."""
    if world_size() == 1:
        return values, stop
    sums = torch.tensor([*values, float(stop)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    found = sums.tolist()
    return [value / world_size() for value in found[:-1]], found[-1] > 0


def global_mean_rows(rows: int, device: torch.device) -> float:
    """The processes' mean number of rows: what a local sum is divided by to give a joint mean."""
    if world_size() == 1:
        return float(rows)
    total = torch.tensor(rows, device=device)
    dist.all_reduce(total)
    return int(total) / world_size()


def scale_to_global_mean(loss: Tensor, rows: Tensor) -> Tensor:
    """Turn a mean over this process's rows into its share of the mean over all processes'."""
    mean = global_mean_rows(len(rows), rows.device)
    return loss if len(rows) == mean else loss * (len(rows) / mean)


def rank_offset(rows: int, device: torch.device) -> int:
    """Where this process's rows begin in what :func:`gather_rows` gives."""
    return sum(_counts(rows, device)[: process_rank()])


def gather_ids(ids_M: Tensor) -> Tensor:
    """The ids of all processes' rows, in the order of the processes."""
    if world_size() == 1:
        return ids_M
    return _gathered(ids_M, _counts(len(ids_M), ids_M.device))


def gather_rows(x_MD: Tensor) -> Tensor:
    """The rows of all processes, in their order; each process gets its own rows' gradients."""
    if world_size() == 1:
        return x_MD
    rows: Tensor = _Gather.apply(x_MD)
    return rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor) -> Tensor:
        ctx.counts = _counts(len(x_MD), x_MD.device)
        return _gathered(x_MD, ctx.counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """The sum over processes of the gradients of this one's rows: a reduce-scatter."""
        # One reduction to each owner: unlike reduce_scatter, every backend knows it, and shares
        # need not be of one size.
        parts: list[Tensor] = [part.contiguous() for part in grad.split(ctx.counts)]
        for owner, part in enumerate(parts):
            dist.reduce(part, owner)
        return parts[process_rank()]


def _counts(rows: int, device: torch.device) -> list[int]:
    if world_size() == 1:
        return [rows]
    found = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(found, torch.tensor(rows, device=device))
    return [int(count) for count in found]


def _gathered(x_M: Tensor, counts: list[int]) -> Tensor:
    """Gather shares of different sizes: padded to the largest, cut again."""
    padded = x_M.new_zeros((max(counts), *x_M.shape[1:]))
    padded[: len(x_M)] = x_M.detach()
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])
