"""Time and memory of the in-batch operator, against the naive form and other packages.

Each way computes the loss and the gradients of both factors. ``both`` is the mean of the two
directions, as CLIP has it.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from features.memory import is_out_of_memory
from tests.gpu.parts import Report, Setup
from tests.gpu.timing import best_seconds, free_bytes, peak_bytes, rounded
from trainer.losses.clip import in_batch_symmetric
from trainer.losses.in_batch import in_batch

SCALE = 20.0
SIZES, SMALL_SIZES = (8_192, 48_000, 262_144), (64, 100)
DIM = 512
_MATRICES = 4  # of B x B that the naive form has at once: scores, their softmax, its gradient
Loss = Callable[[Tensor, Tensor], Tensor]


def run(setup: Setup, report: Report) -> None:
    """Report each way at each size, in float32 and in bfloat16."""
    dim = setup.size(DIM, 16)
    for size in SMALL_SIZES if setup.small else SIZES:
        generator = torch.Generator(setup.device).manual_seed(0)
        x_BD, y_BD = (
            functional.normalize(
                torch.randn(size, dim, device=setup.device, generator=generator), dim=1
            ).requires_grad_()
            for _ in range(2)
        )
        for name, loss in _ways():
            for precision in ("bf16", "float32"):
                key = f"{name}, {size:,} pairs, {precision}"
                report(key, _measure(setup, name, loss, x_BD, y_BD, precision))


def _ways() -> Iterator[tuple[str, Loss]]:
    """Yield the name and the loss of each way that this machine has."""
    yield "operator", lambda x, y: in_batch(x, y, _targets(x), scale=SCALE)
    yield "operator, both", lambda x, y: in_batch_symmetric(x, y, scale=SCALE)
    yield "naive", lambda x, y: functional.cross_entropy(SCALE * x @ y.T, _targets(x))
    yield "naive, both", _naive_both
    liger_kernel, inf_cl = _optional("liger_kernel.transformers"), _optional("inf_cl")
    if liger_kernel is not None:
        liger = liger_kernel.LigerFusedLinearCrossEntropyLoss()
        yield "Liger", lambda x, y: liger(y, SCALE * x, _targets(x))
    if inf_cl is not None:
        yield "Inf-CL", lambda x, y: inf_cl.cal_inf_loss(x, y, scale=x.new_tensor(SCALE))


def _optional(module: str) -> Any:
    """Return a module; ``None`` if it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        return None


def _naive_both(x_BD: Tensor, y_BD: Tensor) -> Tensor:
    score_BB, target_B = SCALE * x_BD @ y_BD.T, _targets(x_BD)
    columns = functional.cross_entropy(score_BB.T, target_B)
    return (functional.cross_entropy(score_BB, target_B) + columns) / 2


def _targets(x_BD: Tensor) -> Tensor:
    return torch.arange(len(x_BD), device=x_BD.device)


def _measure(
    setup: Setup, name: str, loss: Loss, x_BD: Tensor, y_BD: Tensor, precision: str
) -> dict[str, Any] | str:
    """Return loss, seconds and memory; or, in words, why it was not measured."""
    if setup.seconds_left == 0:
        return "no time left"
    is_naive = name.startswith("naive")
    if is_naive and _MATRICES * 4 * len(x_BD) ** 2 > free_bytes(setup.device):
        return "its matrices do not fit"
    value = x_BD.new_zeros(())

    def work() -> None:
        nonlocal value
        x_BD.grad = y_BD.grad = None
        with torch.autocast(setup.device, torch.bfloat16, enabled=precision == "bf16"):
            value = loss(x_BD, y_BD)
        value.backward()

    try:
        peak = peak_bytes(setup.device, work)
        seconds = best_seconds(setup, work)
    except RuntimeError as error:
        free_bytes(setup.device)
        return "out of memory" if is_out_of_memory(error) else str(error).splitlines()[0]
    products = 3 + ("both" in name)
    flops = 2 * products * x_BD.shape[1] * len(x_BD) ** 2
    return {
        "loss": rounded(float(value.detach())),
        "milliseconds": rounded(1e3 * seconds),
        "TFLOP/s": rounded(flops / seconds / 1e12),
        "GiB": None if peak is None else rounded(peak / 2**30),
    }
