"""Training in several processes, started by ``torchrun``: each process takes a share of each batch.

The gradients of the processes are averaged. A loss that is a mean over rows must therefore divide
its local sum by :func:`global_mean_rows`: the average over the processes is then the mean over the
rows of all processes. An in-batch loss reads the rows of all processes through :func:`gather_rows`,
which also passes the gradients back. In a single process every function here changes nothing.

Legend: M rows of this process, R rows of the largest share, W processes, D width.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from features.errors import UserError
from features.process_watch import (
    LostProcessError,
    Meeting,
    ProcessWatch,
    is_distributed,
    lost_line,
    watch_processes,
)
from features.signals import Interrupted, raise_received

P = TypeVar("P")
T = TypeVar("T")

_SECONDS_TO_NAME = 2.0  # after a collective failed, for the watch to learn which process ended


def world_size() -> int:
    """Return the number of processes W that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def process_rank() -> int:
    """Return the number of this process; process 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group if ``torchrun`` has started several processes.

    Raises:
        LostProcessError: A collective failed because another process has ended. A process that
            reaches no collective within 4 s of the loss of another one prints the same line, and
            ends with the same exit code.
    """
    if not is_distributed():
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        with (
            watch_processes(
                dist.get_rank(),
                dist.get_world_size(),
                os.environ["MASTER_ADDR"],
                _shared_meeting,
                _gathered_flags,
            ) as watch,
            _collective_errors(watch),
        ):
            yield
    finally:
        dist.destroy_process_group()


def _shared_meeting(meeting: Meeting | None) -> Meeting:
    values = [meeting]
    dist.broadcast_object_list(values)
    assert values[0] is not None
    return values[0]


def _gathered_flags(flag: bool) -> list[bool]:
    return [bool(count) for count in _counts(int(flag))]


@contextmanager
def _collective_errors(watch: ProcessWatch) -> Iterator[None]:
    """Turn the error of a collective that lacks a process into one line.

    ``torchrun`` sends a signal to the others if a process was lost: the line tells the loss. After
    Ctrl-C, a process can leave before another one's collective: that one was interrupted, too.
    """
    try:
        yield
        return
    except Interrupted:
        if not watch.has_lost:
            raise
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
    process = watch.ended_process(_SECONDS_TO_NAME)
    if not watch.has_lost:
        raise_received()
    raise LostProcessError(lost_line(process, dist.get_world_size()))


def on_rank_zero(make: Callable[[], T]) -> T:
    """Call a function in process 0, and return its result in all processes.

    Raises:
        UserError: The function raised it; it is raised in all processes.
        Interrupted: As UserError.
    """
    if world_size() == 1:
        return make()
    outcome: list[Any] = [None, None]  # result, error
    if process_rank() == 0:
        try:
            outcome[0] = make()
        except (UserError, Interrupted) as error:
            outcome[1] = error
        except BaseException:
            outcome[1] = UserError("the first process failed; see its message above")
            dist.broadcast_object_list(outcome)
            raise
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        if isinstance(outcome[1], UserError) and process_rank() > 0:
            outcome[1].is_reported = True
        raise outcome[1]
    value: T = outcome[0]
    return value


@contextmanager
def held_by_rank_zero(make: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Hold a context of process 0, such as a lock, in the bodies of all processes.

    Args:
        make: Creates the context; called in process 0.

    Raises:
        UserError: Entering the context raised it; it is raised in all processes.
    """
    with ExitStack() as stack:

        def enter() -> None:
            stack.enter_context(make())

        on_rank_zero(enter)
        yield


def check_single_process(work: str) -> None:
    """Raise a UserError if ``torchrun`` started several processes, which ``work`` does not share.

    Args:
        work: A command or option, which begins the line.
    """
    if is_distributed():
        raise UserError(
            f"{work} runs in one process, not in {os.environ['WORLD_SIZE']}; start it without"
            " torchrun (WORLD_SIZE is set)"
        )


def on_all_ranks(make: Callable[[], P], join: Callable[[list[P]], T]) -> T:
    """Call a function in every process, join the results in process 0, and return what it returns.

    Args:
        make: Returns the part of this process.
        join: Called in process 0 with the parts of all processes, in their order.

    Raises:
        UserError: One of the functions raised it; it is raised in all processes.
        Interrupted: As UserError.
    """
    if world_size() == 1:
        return join([make()])
    outcome: list[Any] = [None, None]  # part, error
    failure: BaseException | None = None
    try:
        outcome[0] = make()
    except (UserError, Interrupted) as error:
        outcome[1] = error
    except BaseException as error:
        failure = error
        outcome[1] = UserError(f"process {process_rank()} failed; see its message")
    outcomes: list[Any] | None = [None] * world_size() if process_rank() == 0 else None
    dist.gather_object(outcome, outcomes)

    def joined() -> T:
        assert outcomes is not None
        for _, error in outcomes:
            if error is not None:
                raise error
        return join([part for part, _ in outcomes])

    try:
        return on_rank_zero(joined)
    except (UserError, Interrupted):
        if failure is not None:
            raise failure from None
        raise


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the means of values over the processes, float64 if there are several."""
    if world_size() == 1:
        return values
    sums = values.double()
    dist.all_reduce(sums)
    return sums / world_size()


def any_process(condition: bool) -> bool:
    """Return True if the condition is true in any process.

    The hosts agree with each other: the call does not wait for a device.
    """
    if world_size() == 1:
        return condition
    count = torch.tensor(int(condition))
    dist.all_reduce(count)
    return bool(count)


def global_mean_rows(rows: int) -> float:
    """Return the mean number of rows of a process: the divisor of a local sum."""
    if world_size() == 1:
        return float(rows)
    total = torch.tensor(rows)  # on the CPU: the hosts agree without waiting for a device
    dist.all_reduce(total)
    return int(total) / world_size()


def scale_to_global_mean(loss: Tensor, rows: Tensor) -> Tensor:
    """Turn a mean over the rows of this process into its share of the mean over all rows."""
    mean = global_mean_rows(len(rows))
    return loss if len(rows) == mean else loss * (len(rows) / mean)


def rank_offset(rows: int) -> int:
    """Return the position of this process's first row in the result of :func:`gather_rows`."""
    return sum(_counts(rows)[: process_rank()])


def gather_ids(ids_M: Tensor) -> Tensor:
    """Return the ids of the rows of all processes, in the order of the processes."""
    if world_size() == 1:
        return ids_M
    return _gathered(ids_M, _counts(len(ids_M)))


def gather_rows(x_MD: Tensor) -> Tensor:
    """Return the rows of all processes in their order; gradients go back to the owner."""
    if world_size() == 1:
        return x_MD
    rows: Tensor = _Gather.apply(x_MD)
    return rows


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor) -> Tensor:
        ctx.counts = _counts(len(x_MD))
        return _gathered(x_MD, ctx.counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Return the sum over processes of the gradients of this process's rows."""
        # One reduction to each owner: unlike reduce_scatter, every backend has it, and it takes
        # shares of different sizes.
        parts: list[Tensor] = [part.contiguous() for part in grad.split(ctx.counts)]
        for owner, part in enumerate(parts):
            dist.reduce(part, owner)
        return parts[process_rank()]


def _counts(rows: int) -> list[int]:
    """Return the number of rows of each process. The hosts exchange them, no device waits."""
    if world_size() == 1:
        return [rows]
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor(rows))
    return [int(count) for count in counts]


def _gathered(x_M: Tensor, counts: list[int]) -> Tensor:
    """Gather parts of different sizes: pad them to the largest, gather, and cut them."""
    padded = x_M.new_zeros((max(counts), *x_M.shape[1:]))
    padded[: len(x_M)] = x_M.detach()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
