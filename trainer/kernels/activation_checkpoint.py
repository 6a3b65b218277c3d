"""Selective recomputation: the backward pass repeats what is cheap and keeps what is dear.

A model run piece by piece under :func:`in_pieces` keeps the outputs of its linear layers; all
between them, element-wise, is computed again in the backward pass, while the piece is in a core's
cache. Random masks are not kept but drawn again, from the same state of the generator.

Legend: P tokens, D width, F width of a layer's output.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class _Tape:
    """What a piece's forward pass kept, in the order in which it was made."""

    def __init__(self) -> None:
        self.state = torch.get_rng_state()
        self.kept: list[Tensor] = []
        self.sums: dict[Tensor, Tensor] | None = None
        """Gradients of weights so far; not ``None``: the tape is being read."""
        self._at = 0

    def keep(self, make: Callable[[], Tensor]) -> Tensor:
        if self.sums is None:
            self.kept.append(make())
            return self.kept[-1]
        self._at += 1
        return self.kept[self._at - 1]


_tape: _Tape | None = None  # of the piece that is being run


def linear(layer: nn.Linear, x: Tensor, rows: slice | None = None, *, bias: bool = True) -> Tensor:
    """``layer(x)``, or only the outputs ``rows`` of it; in a piece it is computed once."""
    held = [layer.weight, layer.bias] if bias else [layer.weight]
    used = held if rows is None else [tensor[rows] for tensor in held]
    if _tape is None:
        return functional.linear(x, *used)
    kept = _tape.keep(lambda: functional.linear(x, *used))
    if _tape.sums is None:
        return kept
    sums = [_sum_of(_tape.sums, tensor) for tensor in held]
    if rows is not None:
        sums = [total[rows] for total in sums]
    found: Tensor = _Linear.apply(x, used[0], kept, *sums)
    return found


def in_pieces(
    run: Callable[..., Tensor],
    pieces: Sequence[Any],
    parameters: Iterable[nn.Parameter],
    inputs: Sequence[Tensor] = (),
) -> Tensor:
    """``torch.cat([run(piece, *inputs) for piece in pieces])``, keeping little for its gradient.

    Gradients are summed piece after piece, so that they are the same every time.

    Args:
        run: Gives (P, D), on the CPU. Its linear layers go through :func:`linear`; but for what it
            draws from torch's generator it is a function of what it is given.
        pieces: What ``run`` takes; at least one.
        parameters: All that ``run`` reads by itself and that may need a gradient.
        inputs: Tensors that the pieces share and that may need a gradient.
    """
    if not torch.is_grad_enabled() or _tape is not None:
        return torch.cat([run(piece, *inputs) for piece in pieces])
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    found: Tensor = _Pieces.apply(run, pieces, len(inputs), *inputs, *learned)
    return found


class _Linear(torch.autograd.Function):
    """A linear layer whose output is known; gradients of its weights go straight into sums."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_FD: Tensor, known: Tensor, sum_FD: Tensor, *sum_F: Tensor
    ) -> Tensor:
        ctx.sum_FD, ctx.sum_F = sum_FD, sum_F
        ctx.save_for_backward(x, weight_FD)
        return known.view_as(known)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_FD = ctx.saved_tensors
        grad_PF = grad.flatten(0, -2)
        ctx.sum_FD.addmm_(grad_PF.T, x.flatten(0, -2))
        for total_F in ctx.sum_F:
            total_F += grad_PF.sum(0)
        into = grad @ weight_FD if ctx.needs_input_grad[0] else None
        return into, *(None,) * (3 + len(ctx.sum_F))


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: Callable[..., Tensor], pieces: Sequence[Any], inputs: int, *tensors: Tensor
    ) -> Tensor:
        ctx.run, ctx.pieces, ctx.tapes = run, pieces, []
        ctx.parameters = tensors[inputs:]
        ctx.inputs = inputs
        ctx.save_for_backward(*tensors)
        found = []
        for piece in pieces:
            ctx.tapes.append(_Tape())
            found.append(_with(ctx.tapes[-1], run, piece, tensors[:inputs]))
        ctx.sizes = [len(part) for part in found]
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        # Detached: what lies before the pieces is not theirs to differentiate.
        inputs = [held.detach().requires_grad_() for held in ctx.saved_tensors[: ctx.inputs]]
        tensors = [*inputs, *ctx.parameters]
        sums: dict[Tensor, Tensor] = {}
        state = torch.get_rng_state()
        for number, part_PD in enumerate(grad_PD.split(ctx.sizes)):
            # Taken out: what a piece kept is free as soon as it has been used.
            tape, ctx.tapes[number] = ctx.tapes[number], None
            assert tape is not None, "the backward pass can be run once"
            tape.sums = sums
            torch.set_rng_state(tape.state)
            with torch.enable_grad():
                found_PD = _with(tape, ctx.run, ctx.pieces[number], inputs)
            del tape
            grads = torch.autograd.grad(found_PD, tensors, part_PD, allow_unused=True)
            for tensor, grad in zip(tensors, grads, strict=True):
                if grad is not None:
                    _sum_of(sums, tensor).add_(grad)
        torch.set_rng_state(state)
        return None, None, None, *(sums.get(tensor) for tensor in tensors)


def _sum_of(sums: dict[Tensor, Tensor], tensor: Tensor) -> Tensor:
    if tensor not in sums:
        sums[tensor] = torch.zeros_like(tensor)
    return sums[tensor]


def _with(tape: _Tape, run: Callable[..., Tensor], piece: Any, inputs: Sequence[Tensor]) -> Tensor:
    global _tape
    _tape = tape
    try:
        return run(piece, *inputs)
    finally:
        _tape = None
