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
        """Return a function that computes these products, of random factors, and nothing else.

        Factors and results of all products share memory.
        """
        memory: dict[torch.dtype, list[Tensor]] = {}
        for dtype in {product[-1] for product in self.counts}:
            sizes = [
                (G * M * K, G * K * N, G * M * N)
                for G, M, K, N, used in self.counts
                if used == dtype
            ]
            memory[dtype] = [
                torch.randn(max(of_part), device=device).to(dtype)
                for of_part in zip(*sizes, strict=True)
            ]

        def compute() -> None:
            for (G, M, K, N, dtype), count in self.counts.items():
                left, right, out = memory[dtype]
                left_GMK = left[: G * M * K].view(G, M, K)
                right_GKN = right[: G * K * N].view(G, K, N)
                out_GMN = out[: G * M * N].view(G, M, N)
                for _ in range(count):
                    if G == 1:
                        torch.mm(left_GMK[0], right_GKN[0], out=out_GMN[0])
                    else:
                        torch.bmm(left_GMK, right_GKN, out=out_GMN)

        return compute
