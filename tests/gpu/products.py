"""The matrix products of a step, recorded by their shapes and computed alone.

Legend: a product has the shape (G, M, K, N): G matrices (M, K) times G matrices (K, N).
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
# Operator -> position of the two factors among its arguments.
_FACTORS: dict[Any, tuple[int, int]] = {
    _aten.mm: (0, 1),
    _aten.bmm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.addmm_: (1, 2),
    _aten.baddbmm: (1, 2),
    _aten.baddbmm_: (1, 2),
}
_FORWARD_PRODUCTS, _BACKWARD_PRODUCTS = 2, 5  # of attention that keeps no scores
Product = tuple[int, int, int, int, torch.dtype]


class RecordedProducts(TorchDispatchMode):
    """Record the matrix products inside the context, those of the backward pass as well.

    Products inside of an attention kernel count as the products of its formula.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[Product] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        factors = _FACTORS.get(func.overloadpacket)
        if factors is not None:
            self._add(args[factors[0]], args[factors[1]])
        elif "scaled_dot_product" in func.overloadpacket.__name__:
            is_backward = func.overloadpacket.__name__.endswith("backward")
            q_BHLE, k_BHSE = args[1:3] if is_backward else args[:2]
            count = _BACKWARD_PRODUCTS if is_backward else _FORWARD_PRODUCTS
            self._add(q_BHLE, k_BHSE.transpose(-2, -1), count)
        return func(*args, **(kwargs or {}))

    def _add(self, left: Tensor, right: Tensor, count: int = 1) -> None:
        (M, K), N = left.shape[-2:], right.shape[-1]
        self.counts[left.numel() // max(1, M * K), M, K, N, left.dtype] += count

    @property
    def flops(self) -> int:
        """Multiplications and additions of all products."""
        return sum(2 * G * M * K * N * n for (G, M, K, N, _), n in self.counts.items())

    def alone(self, device: str) -> Callable[[], None]:
        """Return a function that computes these products, of random factors, and nothing else."""
        factors = []
        for (G, M, K, N, dtype), count in self.counts.items():
            left = torch.randn(G, M, K, device=device).to(dtype)
            right = torch.randn(G, K, N, device=device).to(dtype)
            factors.append((left, right, left.new_empty(G, M, N), count))

        def compute() -> None:
            for left, right, out, count in factors:
                for _ in range(count):
                    if len(left) == 1:
                        torch.mm(left[0], right[0], out=out[0])
                    else:
                        torch.bmm(left, right, out=out)

        return compute
