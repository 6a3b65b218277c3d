from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainer.data.batches import Sequences
from trainer.modules.registry import SEQUENCE_ENCODERS
from trainer.modules.sequence_encoders import SequenceEncoder, SequenceSettings, last_state
from trainer.modules.transformer import initialise


@pytest.fixture(params=list(SEQUENCE_ENCODERS))
def encoder(request: pytest.FixtureRequest) -> SequenceEncoder:
    torch.manual_seed(0)
    settings = SequenceSettings(dim=8, heads=2, hidden=16, length=12, layers=2)
    built = SEQUENCE_ENCODERS[str(request.param)](settings, settings.dropout)
    initialise(built, std=0.5)
    return built.eval()


def inputs(rows: int = 3, length: int = 10) -> Tensor:
    return torch.randn(rows, length, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_later_item_never_changes_an_earlier_state(encoder: SequenceEncoder) -> None:
    x, lengths = inputs(), torch.full((3,), 10)
    before = encoder(x, lengths)
    for position in range(10):
        changed = x.clone()
        changed[:, position] = x[:, position].flip(-1)
        after = encoder(changed, lengths)
        torch.testing.assert_close(after[:, :position], before[:, :position])
        assert not torch.isclose(after[:, position], before[:, position]).all(-1).any()


@torch.no_grad()
def test_padding_changes_nothing(encoder: SequenceEncoder) -> None:
    x, lengths = inputs(), torch.tensor([10, 4, 1])
    together = encoder(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(x[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_first_item_reaches_the_last_state(encoder: SequenceEncoder) -> None:
    x, lengths = inputs(), torch.full((3,), 10)
    changed = x.clone()
    changed[:, 0] = x[:, 0].flip(-1)
    assert not torch.allclose(encoder(changed, lengths)[:, -1], encoder(x, lengths)[:, -1])


@torch.no_grad()
def test_the_convolution_is_the_dilated_one() -> None:
    torch.manual_seed(0)
    encoder: Any = SEQUENCE_ENCODERS["nextitnet"](SequenceSettings(dim=8), 0.1)
    assert [block.convolutions[i].dilation for block in encoder.blocks for i in range(2)] == [
        1, 2, 4, 8, 1, 2, 4, 8,
    ]  # fmt: skip
    for convolution in encoder.blocks[1].convolutions:
        # The linear layer reads kernel position by kernel position, channels inside.
        weight = convolution.map.weight.view(8, 3, 8).transpose(1, 2)
        x = inputs()
        padded = functional.pad(x.transpose(1, 2), (2 * convolution.dilation, 0))
        expected = functional.conv1d(
            padded, weight, convolution.map.bias, dilation=convolution.dilation
        )
        torch.testing.assert_close(convolution(x), expected.transpose(1, 2))


def test_the_last_state_is_the_one_of_the_last_item() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    rows = Sequences(items_BL=torch.zeros(2, 3), lengths_B=torch.tensor([1, 3]))
    assert last_state(states, rows).tolist() == [[0, 1], [10, 11]]
