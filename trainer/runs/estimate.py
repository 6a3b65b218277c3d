"""Estimate the memory and the time of a training from its first batch, before it starts.

The estimate runs forward and backward passes. Weights, buffers and random states stay as they are.
"""

import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from features.errors import OutOfMemoryError
from features.memory import (
    available_memory,
    format_size,
    free_memory,
    is_out_of_memory,
    resident_memory,
)
from trainer.data.batches import Batch, Shard
from trainer.runs.run import Run
from trainer.runs.settings import CANDIDATES

_BATCHES = 8  # the longest of these is measured
_BYTES = 4  # of a float32
_SHOWN = 10**8  # bytes of the last digit that `format_size` shows


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingEstimate:
    """The estimated memory and time of a training."""

    parameters: int
    """Number of parameters."""
    feature_bytes: int
    """Size of the feature matrices."""
    peak_bytes: int
    """Largest memory of the process, or of the device if it is a GPU."""
    budget_bytes: int
    """Memory that the training may take."""
    step_seconds: float
    """Time of the forward and the backward pass of a step."""
    steps: int
    """Steps of an epoch."""

    @property
    def epoch_seconds(self) -> float:
        """Time of the steps of an epoch, without validation."""
        return self.step_seconds * self.steps


class _OverBudgetError(Exception):
    """The tensors of a step take more than the budget."""


class _MemoryMeter(TorchDispatchMode):
    """Measure the largest memory of the tensors that are created in the context.

    Args:
        device: Kind of device whose tensors count.
        budget: Bytes.

    Raises:
        _OverBudgetError: The tensors take more than the budget.
    """

    def __init__(self, device: str, budget: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._device = device
        self._budget = budget
        self._live = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and count the memory of its results."""
        kwargs = kwargs or {}
        known = {id(s) for s in _storages((args, kwargs))}
        result = func(*args, **kwargs)
        for storage in _storages(result):
            if id(storage) not in known and id(storage) not in self._counted:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage.device.type != self._device:
            return
        key, size = id(storage), storage.nbytes()
        self._counted.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._release, key, size).atexit = False
        if self.peak > self._budget:
            raise _OverBudgetError

    def _release(self, key: int, size: int) -> None:
        self._counted.discard(key)
        self._live -= size


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor)]


def estimate_training(run: Run, budget: int | None = None) -> TrainingEstimate | None:
    """Measure a step of a run, and check that its training fits into memory.

    Args:
        run: A run that is not trained yet, or not to its end.
        budget: Bytes that the process, or the device if it is a GPU, may take in all; by default
            those that are in use and those that are free.

    Returns:
        The estimate; ``None`` for a model that learns nothing by gradients.

    Raises:
        OutOfMemoryError: The training does not fit. The message names a setting that fits.
    """
    if not any(parameter.requires_grad for parameter in run.model.parameters()):
        return None
    in_use, free = _memory_of(run.data.device)
    more = "free memory" if budget is None else "raise --memory"
    budget = in_use + free if budget is None else budget
    lasting = in_use + _bytes_besides_steps(run)
    of_validation = _validation_bytes(run)
    place = (
        f"training of {run.spec.model} on {run.spec.dataset} does not fit into"
        f" {format_size(budget)}: {format_size(lasting)} for data, weights and optimizer"
    )
    if lasting + of_validation > budget:
        needed = math.ceil((lasting + of_validation) / _SHOWN) * _SHOWN
        raise OutOfMemoryError(
            f"{place}, and {format_size(of_validation)} to validate on"
            f" {run.data.features.n_items:,} items; {more}, which must be at least"
            f" {format_size(needed)}, or set a smaller dim"
        )
    peak = _step_bytes(run, run.config.batch_size, budget - lasting)
    if peak is None:
        raise OutOfMemoryError(
            f"{place}, and the rest for a step of batch_size={run.config.batch_size};"
            f" {_fitting_setting(run, budget - lasting, more)}"
        )
    steps, batches = _batches(run, run.config.batch_size)
    with _unchanged(run.model, run.data.device):
        began = time.monotonic()
        _step(run, next(batches))
        seconds = time.monotonic() - began
    return TrainingEstimate(
        parameters=run.parameters,
        feature_bytes=sum(x.nbytes for x in run.data.features.vectors.values()),
        peak_bytes=lasting + max(peak, of_validation),
        budget_bytes=budget,
        step_seconds=seconds,
        steps=steps,
    )


def _memory_of(device: torch.device) -> tuple[int, int]:
    """Return the bytes that the process uses on a device, and those that are free."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.mem_get_info(device)[0]
    return resident_memory(), available_memory()


def _bytes_besides_steps(run: Run) -> int:
    """Return the bytes of the moments of Adam and of averaged weights, which do not exist yet."""
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    return trained * _BYTES * (3 if run.config.average else 2)


def _validation_bytes(run: Run) -> int:
    """Return the bytes of the vectors of the catalogue, and of a copy for the index."""
    width = getattr(run.spec.settings, "dim", 0) if run.model.has_vectors else 0
    return 2 * _BYTES * width * run.data.features.n_items


def _batches(run: Run, batch_size: int) -> tuple[int, Iterator[Any]]:
    config = replace(run.config, batch_size=batch_size)
    return run.task.epoch(config, 0, skip=0, shard=Shard())


def _step_bytes(run: Run, batch_size: int, budget: float) -> int | None:
    """Return the largest memory of a step's tensors; ``None`` if the budget is too small."""
    _, batches = _batches(run, batch_size)
    batch = max(islice(batches, _BATCHES), key=_slots)
    meter = _MemoryMeter(run.data.device.type, budget)
    with _unchanged(run.model, run.data.device):
        try:
            with meter:
                _step(run, batch)
        except _OverBudgetError:
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None
    return meter.peak


def _slots(batch: Any) -> int:
    """Return the number of slots of the sequences of a batch; 0 for other batches."""
    return batch.sequences.items_BL.numel() if isinstance(batch, Batch) else 0


def _step(run: Run, batch: Any) -> None:
    device = run.data.device
    with torch.autocast(device.type, torch.bfloat16, run.config.precision == "bf16"):
        loss = run.task.loss(batch)["loss"]
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Train mode in the context; afterwards no gradients, and the random states as before."""
    random = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)
        torch.set_rng_state(random)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        free_memory()


def _fitting_setting(run: Run, budget: float, more: str) -> str:
    """Return the remedy: the largest half, quarter and so on of the batch that fits, if any.

    Args:
        run: The run.
        budget: Bytes of a step.
        more: The remedy if no batch fits.
    """
    for halvings in range(1, int(math.log2(run.config.batch_size)) + 1):
        batch_size = run.config.batch_size >> halvings
        if _step_bytes(run, batch_size, budget) is not None:
            return f"train again with --set batch_size={batch_size}, which fits"
    if getattr(run.spec.settings, "candidates", None) == 0:
        return f"no batch_size fits; train again with --set candidates={CANDIDATES}"
    return f"no batch_size fits; {more}, or train a smaller model"
