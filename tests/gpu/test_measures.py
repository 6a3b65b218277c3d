"""What the parts compute from their measurements."""

from typing import Any

import pytest
import torch

from tests.gpu import agreement
from tests.gpu.marked_tests import marked_files
from tests.gpu.parts import Setup
from tests.gpu.products import RecordedProducts
from tests.gpu.steps import covered
from trainer.kernels.dispatch import use_kernels
from trainer.models.sasrec import SASRec


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(0, 2), (1, 3)], 3), ([(0, 9), (1, 2), (4, 5)], 9), ([(0, 1), (4, 6)], 3)],
)
def test_overlapping_kernels_count_once(spans: list[tuple[float, float]], length: float) -> None:
    assert covered(spans) == length


def test_products_of_both_passes_are_recorded() -> None:
    layer = torch.nn.Linear(6, 5)
    query = torch.randn(2, 3, 4, 8, requires_grad=True)
    with RecordedProducts() as products:
        layer(torch.randn(7, 6, requires_grad=True)).sum().backward()
    assert products.flops == 3 * 2 * 7 * 6 * 5
    products.alone("cpu")()
    with RecordedProducts() as products:
        attended = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        attended.sum().backward()
    assert products.flops >= 6 * (2 * 3) * 2 * 4 * 4 * 8


@pytest.mark.parametrize("planted", [1.01, 0.99, float("nan")])
def test_a_planted_difference_fails(monkeypatch: pytest.MonkeyPatch, planted: float) -> None:
    loss = SASRec.loss

    def scaled(self: SASRec, batch: Any) -> dict[str, torch.Tensor]:
        """Return another loss where the kernels of the CPU do not run, as on a GPU."""
        factor = 1.0 if use_kernels(next(self.parameters())) else planted
        return {name: factor * value for name, value in loss(self, batch).items()}

    monkeypatch.setattr(SASRec, "loss", scaled)
    monkeypatch.setattr(agreement, "MODELS", {"sasrec": None, "itemknn": None})
    with pytest.raises(AssertionError, match="sasrec"):
        agreement.run(Setup(device="cpu", small=True, seconds=60), lambda name, value: None)


def test_files_with_marked_tests_are_listed() -> None:
    files = marked_files()
    assert {"tests/gpu/test_on_gpu.py", "tests/retrieval/test_ranking.py"} <= set(files)
