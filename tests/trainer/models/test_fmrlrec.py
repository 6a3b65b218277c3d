"""fMRLRec: the recurrence against a loop, nested widths as complete models, the loss."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.trainer import worlds
from tests.trainer.models.test_morec import double
from trainer.data.batches import Sequences
from trainer.models.fmrlrec import FMRLRecConfig, LinearRecurrence, NestedLinear

N = 12


def dense(part: Any) -> tuple[Tensor, Tensor]:
    """A nested map as one matrix (D, D) and one bias (D,), zero above the blocks."""
    size = part.widths[-1]
    matrix, bias = torch.zeros(2, size, size, dtype=torch.float64)[0], torch.zeros(size).double()
    before = 0
    for width, linear in zip(part.widths, part.parts, strict=True):
        matrix[before:width, :width] = linear.weight
        if linear.bias is not None:
            bias[before:width] = linear.bias
        before = width
    return matrix, bias


def looped(recurrence: Any, x_LD: Tensor) -> Tensor:
    """The outputs of one sequence (L, D), one step after another in complex numbers."""
    eigenvalue = torch.exp(torch.complex(-recurrence.nu_D.exp(), recurrence.theta_D.exp()))
    (in_r, bias_r), (in_i, bias_i) = dense(recurrence.in_real), dense(recurrence.in_imaginary)
    (out_r, bias), (out_i, _) = dense(recurrence.out_real), dense(recurrence.out_imaginary)
    w_in, w_out = torch.complex(in_r, in_i), torch.complex(out_r, out_i)
    state, outputs = torch.zeros_like(eigenvalue), []
    for x in x_LD:
        u = w_in @ x.to(w_in.dtype) + torch.complex(bias_r, bias_i)
        state = eigenvalue * state + recurrence.gamma_D.exp() * u
        outputs.append((w_out @ state).real + bias)
    return torch.stack(outputs)


def with_memory(recurrence: Any) -> None:
    """Weights with a long memory and all parts complex."""
    for parameter in recurrence.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.constant_(recurrence.nu_D, -3.0)


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_the_recurrence_equals_a_loop(length: int) -> None:
    recurrence = LinearRecurrence([2, 4, 8]).double()
    with_memory(recurrence)
    x_BLD = torch.randn(2, length, 8, dtype=torch.float64)
    out_BLD = recurrence(x_BLD)
    for row in range(2):
        torch.testing.assert_close(out_BLD[row], looped(recurrence, x_BLD[row]))


def test_it_starts_with_a_memory_of_about_one_step() -> None:
    recurrence = LinearRecurrence([500])
    radius = torch.exp(-recurrence.nu_D.detach().exp())
    assert float(radius.max()) < 0.1
    assert float(radius.square().mean()) == pytest.approx(0.005, rel=0.1)
    torch.testing.assert_close(recurrence.gamma_D.exp(), (1 - radius.square()).sqrt())


def nested_norm(norm: Any, x: Tensor, widths: tuple[int, ...]) -> Tensor:
    parts, before = [], 0
    for number, width in enumerate(widths):
        part = norm.parts[number]
        values = x[..., before:width]
        parts.append(functional.layer_norm(values, (width - before,), part.weight, part.bias))
        before = width
    return torch.cat(parts, dim=-1)


def test_states_equal_the_equations() -> None:
    features = double(worlds.features(N))
    model: Any = worlds.build("fmrlrec", features).double().eval()
    widths, history = model.settings.widths, [1, 5, 11, 2, 3]
    block = model.sequence_encoder.blocks[0]
    with_memory(block.recurrence)
    weight = torch.cat([part.weight for part in model.item_encoder.inputs.values()], dim=1)
    raw = []
    for item in range(N):
        units = [
            x[item] / x[item].norm() if x[item].any() else x[item]
            for x in features.vectors.values()
        ]
        raw.append(weight @ torch.cat(units) + model.item_encoder.bias_D)
    items = torch.stack(raw)
    x = items[history]
    x = x + looped(block.recurrence, nested_norm(block.norm_recurrence, x, widths))
    z = nested_norm(block.norm_feed, x, widths)
    (up, up_bias), (gate, gate_bias) = dense(block.up), dense(block.gate)
    down, down_bias = dense(block.down)
    hidden = functional.silu(z @ gate.T + gate_bias) * (z @ up.T + up_bias)
    states = x + hidden @ down.T + down_bias
    torch.testing.assert_close(model.encode_items(features), items)
    rows = Sequences(items_BL=torch.tensor([history]), lengths_B=torch.tensor([5]))
    torch.testing.assert_close(model.encode_sequences(items, rows, features)[0], states[-1])

    batch = worlds.batch(
        Sequences(items_BL=torch.tensor([[*history, 7]]), lengths_B=torch.tensor([6])),
        features,
        torch.Generator(),
    )
    targets = torch.tensor([*history[1:], 7])
    losses = [
        functional.cross_entropy(states[:, :width] @ items[:, :width].T, targets)
        for width in widths
    ]
    expected = torch.stack(losses).mean().float()
    torch.testing.assert_close(model.loss(batch)["loss"].float(), expected)


def test_a_prefix_of_the_vectors_is_a_complete_model() -> None:
    features = worlds.features(N)
    wide: Any = worlds.build("fmrlrec", features, dim=8).eval()
    narrow: Any = worlds.build("fmrlrec", features, dim=4).eval()
    weights = wide.state_dict()
    kept = {key: weights[key][: len(value)] for key, value in narrow.state_dict().items()}
    narrow.load_state_dict(kept)
    rows = Sequences(items_BL=torch.tensor([[1, 5, 3]]), lengths_B=torch.tensor([3]))
    states = []
    for model in (wide, narrow):
        items = model.encode_items(features)
        states.append((items, model.encode_sequences(items, rows, features)))
    for full, part in zip(*states, strict=True):
        torch.testing.assert_close(full[:, :4], part)


@pytest.mark.parametrize(
    ("dim", "least", "widths"),
    [(64, 8, (8, 16, 32, 64)), (8, 8, (8,)), (6, 8, (6,)), (20, 8, (8, 16, 20))],
)
def test_widths_double_up_to_the_largest(dim: int, least: int, widths: tuple[int, ...]) -> None:
    assert FMRLRecConfig(dim=dim, least_width=least).widths == widths


def test_a_nested_map_reads_only_the_prefix() -> None:
    nested = NestedLinear([2, 4])
    x = torch.randn(3, 4)
    other = torch.cat([x[:, :2], torch.randn(3, 2)], dim=1)
    torch.testing.assert_close(nested(x)[:, :2], nested(other)[:, :2])
    assert not torch.allclose(nested(x)[:, 2:], nested(other)[:, 2:])
