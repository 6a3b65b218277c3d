"""Loss and gradients of each model on the GPU, against the same model on the CPU.

The models are small, without dropout, in float32 without TF32. On a machine without a GPU, the
plain forms of the operators take the place of the GPU, and the CPU runs its kernels.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from retrieval.blocks import strict_fp32
from tests.gpu.parts import Report, Setup
from tests.gpu.timing import rounded
from tests.trainer import worlds
from trainer.data.batches import ItemFeatures, TrainingData
from trainer.kernels.dispatch import plain_forms
from trainer.models.base import Recommender
from trainer.models.registry import MODELS

BOUND = 2e-3
"""Largest relative difference. Sums of float32 in another order differ by about 1e-5."""
_ITEMS = 24
Differences = tuple[float, float]
"""Relative difference of the loss, and the largest one of the gradients of a parameter."""


def run(setup: Setup, report: Report) -> None:
    """Report the differences of each model that learns by gradients; fail beyond the bound."""
    apart = []
    for name in MODELS:
        try:
            if not worlds.build(name, worlds.features(_ITEMS)).learns_by_gradients:
                continue
            loss, gradient = differences(name, setup.device)
        except ModuleNotFoundError as error:
            report(name, f"skipped: {error.name} is not installed")
        except Exception as error:  # the other models are compared all the same
            report(name, f"failed: {type(error).__name__}: {error}".splitlines()[0])
            apart.append(name)
        else:
            report(name, {"loss": rounded(loss), "gradients": rounded(gradient)})
            if not (loss <= BOUND and gradient <= BOUND):  # also NaN
                apart.append(name)
    if apart:
        raise AssertionError(f"they differ by more than {BOUND}, or fail: {', '.join(apart)}")


def differences(name: str, device: str) -> Differences:
    """Return how loss and gradients of a model on the device differ from those on the CPU.

    The difference of a parameter's gradients is relative to the largest gradient of the parameter,
    or to a thousandth of the largest gradient of the model where that is more.
    """
    dropouts: dict[str, Any] = {
        field.name: 0.0
        for field in fields(MODELS.find(name).load().settings_class)
        if field.name.endswith("dropout")
    }
    model = worlds.build(name, worlds.features(_ITEMS), **dropouts).train()
    with torch.no_grad():  # as after some steps: the first weights make all scores nearly equal
        for parameter in model.parameters():
            parameter.mul_(2)
    data = _training_data("cpu")
    model.fit_buffers(data.features, data.train)  # once: a cluster is the same on both devices
    other = copy.deepcopy(model).to(device)
    loss, gradients = _loss_and_gradients(model, "cpu")
    with plain_forms() if device == "cpu" else nullcontext():
        other_loss, other_gradients = _loss_and_gradients(other, device)
    assert gradients.keys() == other_gradients.keys()
    largest_P = torch.stack([gradient.abs().max() for gradient in gradients.values()])
    apart_P = torch.stack(
        [(other_gradients[key] - gradient).abs().max() for key, gradient in gradients.items()]
    )
    relative_P = apart_P / torch.maximum(largest_P, 1e-3 * largest_P.max())
    return abs(other_loss - loss) / max(abs(loss), 1e-6), float(relative_P.max())


def _loss_and_gradients(model: Recommender, device: str) -> tuple[float, dict[str, Tensor]]:
    """Return the loss of the first batch, and the gradients by parameter, on the CPU."""
    data = _training_data(device)
    _, batches = data.epoch(model.window_sampling, batch_size=16, seed=0, epoch=0)
    torch.manual_seed(0)
    with _without_tf32(data.device):
        with mock.patch.object(torch, "randn_like", _noise):
            loss = model.loss(next(batches))["loss"]
        loss.backward()
    gradients = {
        key: parameter.grad.to_dense().cpu()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return float(loss.detach()), gradients


def _training_data(device: str) -> TrainingData:
    features = worlds.features(_ITEMS)
    on_device = ItemFeatures(
        n_items=_ITEMS,
        vectors={key: x_ND.to(device) for key, x_ND in features.vectors.items()},
        present={key: has_N.to(device) for key, has_N in features.present.items()},
    )
    return TrainingData(worlds.cycles(users=40, n_items=_ITEMS), on_device, torch.device(device))


@contextmanager
def _without_tf32(device: torch.device) -> Iterator[None]:
    """Compute matrix products, convolutions and recurrent layers in float32."""
    cudnn: Any = torch.backends.cudnn  # torch's type stubs lack its parts
    parts = (cudnn.conv, cudnn.rnn)
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        with strict_fp32(device):
            yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def _noise(x: Tensor) -> Tensor:
    """Return normal noise of the shape of ``x`` that is the same on each device."""
    return torch.randn(x.shape, dtype=x.dtype).to(x.device)
