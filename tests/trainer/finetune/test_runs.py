"""Runs that train the upper blocks of a backbone: what they keep, take over, and refuse."""

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from features.documents import read_json, write_json
from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from tests.pipeline.backbones import checkpoints
from tests.trainer import worlds
from tests.trainer.finetune import tuned
from tests.trainer.finetune.test_upper_blocks import begin, tuned_blocks
from tests.trainer.models.test_recommenders import sequences
from trainer.checkpoint import load_weights
from trainer.evaluation.encode import encode_catalogue
from trainer.finetune import split_encoder, upper_blocks
from trainer.finetune.upper_blocks import UpperBlocks, cut
from trainer.loop import TrainProgress
from trainer.models.registry import MODELS
from trainer.optimizer import Optimizer
from trainer.runs.evaluate import evaluate
from trainer.runs.run import Run, open_run
from trainer.runs.train import train_run


def small(folder: Path, **changed: Any) -> Path:
    return checkpoints.bert_folder(folder, num_hidden_layers=3, **changed)


@pytest.fixture
def checkpoint(warehouse: Warehouse, tmp_path: Path) -> Path:
    """A text encoder of three blocks whose states behind the first one are extracted."""
    tuned.world(warehouse, tmp_path / "raw")
    folder = small(tmp_path / "words")
    tuned.extracted(warehouse, "layer-1", text=folder)
    return folder


def weights(run: Run) -> dict[str, Tensor]:
    return load_file(run.folder / "model.safetensors")


# -- a run's life ---------------------------------------------------------------------------


def test_a_run_trains_keeps_and_restores_its_blocks(warehouse: Warehouse, checkpoint: Path) -> None:
    run = begin(warehouse, name="r", epochs=1)
    before = {key: value.clone() for key, value in run.model.state_dict().items()}
    of_checkpoint = load_file(checkpoint / "model.safetensors")
    first = "attention.self.query.weight"
    torch.testing.assert_close(
        before[f"backbones.text.blocks.0.{first}"], of_checkpoint[f"encoder.layer.1.{first}"]
    )
    train_run(run)
    after = weights(run)
    upper = [key for key in after if key.startswith("backbones.")]
    assert {key.split(".")[3] for key in upper} == {"0", "1"}  # two of three, and nothing else
    assert len(upper) == 2 * sum("encoder.layer.0." in key for key in of_checkpoint)
    still = [key for key in upper if (after[key] - before[key]).abs().max() < 1e-5]
    assert all(key.endswith("key.bias") for key in still)  # shifts all scores alike: no gradient
    assert not any("embeddings" in key for key in after)

    shutil.rmtree(checkpoint)  # the run has all it needs
    opened = open_run(warehouse, run.folder)
    report = evaluate(warehouse, opened, index="torch")
    assert report.rows
    again = encode_catalogue(opened.model, opened.data)
    load_weights(run.weights, run.model, run.spec.identity())
    torch.testing.assert_close(again, encode_catalogue(run.model, run.data))


def test_an_interrupted_training_goes_on_to_the_same_blocks(
    warehouse: Warehouse, checkpoint: Path
) -> None:
    whole = begin(warehouse, name="whole", schedule="cosine")
    train_run(whole)
    cut_short = begin(warehouse, name="cut", schedule="cosine")

    def interrupt(tick: TrainProgress) -> None:
        if tick.epoch == 1 and tick.step == 1:
            signal.raise_signal(signal.SIGINT)

    assert not train_run(cut_short, on_progress=interrupt).finished
    train_run(open_run(warehouse, cut_short.folder), resume=True)
    tensors, other = (load_file(r.folder / "resume.safetensors") for r in (whole, cut_short))
    assert tensors.keys() == other.keys()
    assert all(
        torch.equal(tensors[key], other[key]) for key in tensors if not key.startswith("random")
    )


def test_blocks_have_rates_of_their_own(warehouse: Warehouse, checkpoint: Path) -> None:
    run = begin(warehouse, lr=0.001, weight_decay=0.1, tune_lr=0.0, tune_weight_decay=0.5)
    groups = Optimizer(run.model, run.config).adamw.param_groups
    rates = [(group["lr"], group["weight_decay"]) for group in groups]
    assert rates == [(0.001, 0.1), (0.0, 0.5)]
    upper = {id(parameter) for parameter in tuned_blocks(run, "text").parameters()}
    assert {id(parameter) for parameter in groups[1]["params"]} == upper
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in run.model.parameters())
    before = [parameter.clone() for parameter in tuned_blocks(run, "text").parameters()]
    train_run(run)  # a rate of 0: the blocks stay, the rest learns
    after = tuned_blocks(run, "text").parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_trained_blocks_go_to_runs_that_start_from_them(
    warehouse: Warehouse, checkpoint: Path
) -> None:
    source = begin(warehouse, name="source", epochs=1)
    train_run(source)
    for transfer in ("full", "items", "text", "users"):
        run = begin(warehouse, init="source", transfer=transfer)
        assert run.copied_weights is not None
        taken = any(name.startswith("backbones") for name in run.copied_weights.loaded)
        assert taken == (transfer != "users")
        expected = weights(source) if taken else {}
        if not taken:  # as the checkpoint has them
            for key, value in load_file(checkpoint / "model.safetensors").items():
                number, _, name = key.removeprefix("encoder.layer.").partition(".")
                if key.startswith("encoder.layer.") and number != "0":
                    expected[f"backbones.text.blocks.{int(number) - 1}.{name}"] = value
        for key, value in run.model.state_dict().items():
            if key.startswith("backbones."):
                torch.testing.assert_close(value, expected[key])


def test_the_rest_starts_as_without_them(warehouse: Warehouse, checkpoint: Path) -> None:
    asked: dict[str, Any] = {"features": ["text:layer-1"]}
    with_blocks, without = (begin(warehouse, tune_blocks=count, **asked) for count in (2, 0))
    mine, plain = with_blocks.model.state_dict(), without.model.state_dict()
    assert plain.keys() < mine.keys()
    assert all(torch.equal(mine[key], value) for key, value in plain.items())


# -- the contract of recommenders -----------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, model in MODELS.items() if model.load().reads_tokens])
def test_the_contract_holds_with_blocks(warehouse: Warehouse, checkpoint: Path, name: str) -> None:
    run = begin(warehouse, model=name, dim=8)
    features, model = run.data.features, run.model.eval()
    with torch.no_grad():
        items = model.encode_items(features)
        assert items.shape == (tuned.N, 8)
        assert torch.isfinite(items).all()
        rows = [[1, 2, 3], [4]]
        together = model.encode_sequences(items, sequences(rows), features)
        alone = [model.encode_sequences(items, sequences([row]), features) for row in rows]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        model.train().zero_grad(set_to_none=True)
        drawn = torch.Generator().manual_seed(2)
        batch = worlds.batch(sequences([[0, 1, 2, 3], [3], [3, 5]]), features, drawn)
        model.loss(batch)["loss"].backward()
        missing = [key for key, parameter in model.named_parameters() if parameter.grad is None]
        assert missing == []
        return [
            parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
        ]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


# -- chunks ---------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 20), max_size=30),
    most=st.integers(1, 60),
    padded=st.booleans(),
)
def test_chunks_are_bounded_and_hold_every_row_once(
    lengths: list[int], most: int, padded: bool
) -> None:
    lengths.sort()
    sizes = cut(lengths, most, padded=padded)
    assert sum(sizes) == len(lengths)
    assert all(sizes)
    begin = 0
    for size in sizes:
        chunk = lengths[begin : begin + size]
        assert size == 1 or size * chunk[-1] <= most
        assert padded or chunk[0] == chunk[-1]
        begin += size


def upper_of(lengths: list[int]) -> tuple[UpperBlocks, Tensor, Tensor]:
    torch.manual_seed(0)
    config = {**checkpoints._TEXT, "model_type": "bert", "num_hidden_layers": 2}
    document = {"library": "transformers", "modality": "text", "cut": 1, "config": config}
    upper = split_encoder.build(document)
    for parameter in upper.parameters():
        nn.init.normal_(parameter, std=0.3)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return upper.eval(), torch.randn(*mask.shape, 32), mask


def test_chunks_computed_again_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    upper, x, mask = upper_of([3, 0, 7, 1, 7, 2])
    results = []
    for most in (10_000, 8):
        monkeypatch.setattr(upper_blocks, "TOKENS_AT_ONCE", most)
        upper.zero_grad()
        y, _ = upper(x, mask)
        (y**2).sum().backward()
        results.append([y.detach(), *(parameter.grad for parameter in upper.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert not results[0][0][~mask].any()


def test_what_stands_in_the_padding_changes_nothing() -> None:
    upper, x, mask = upper_of([3, 5, 4])
    other = torch.where(mask[..., None], x, torch.full_like(x, 9.0))
    torch.testing.assert_close(upper(x, mask), upper(other, mask))
    alone, _ = upper(x[:1, :3], mask[:1, :3])
    torch.testing.assert_close(upper(x, mask)[0][:1, :3], alone, rtol=1e-4, atol=1e-5)


def test_items_without_tokens_leave_gradients_of_zero() -> None:
    upper, x, mask = upper_of([2, 2])
    upper(x, torch.zeros_like(mask))[0].sum().backward()
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in upper.parameters()
    )


# -- refusals -------------------------------------------------------------------------------


def refused(warehouse: Warehouse, match: str, **settings: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        begin(warehouse, **settings)
    assert "\n" not in str(caught.value)
    assert warehouse.runs() == []


def test_a_table_of_another_block_names_the_command(warehouse: Warehouse, checkpoint: Path) -> None:
    refused(
        warehouse,
        r"tune_blocks=1 .*layer-2, not text=words:layer-1; run:"
        rf" mmrec extract --dataset tiny --text {checkpoint} --level layer-2, .*--features"
        r" text=words:layer-2$",
        tune_blocks=1,
    )
    refused(warehouse, "words.* 3 blocks; .*at most 3", tune_blocks=4)
    refused(warehouse, r"tune_blocks=3 .*layer-0, .*--level layer-0, ", tune_blocks=3)
    assert begin(warehouse, tune_blocks="all").spec.features == ("text=words:layer-1",)


def test_a_pooled_table_names_the_command(warehouse: Warehouse, checkpoint: Path) -> None:
    tuned.extracted(warehouse, "pooled", text=checkpoint)
    refused(
        warehouse,
        rf"text=words; run: mmrec extract --dataset tiny --text {checkpoint}"
        r" --level layer-1, .*--features text=words:layer-1$",
        features=["text"],
    )
    refused(warehouse, r"--level layer-0, .*layer-0$", features=["text"], tune_blocks="all")
    assert begin(warehouse).spec.features == ("text=words:layer-1",)  # unasked, the one that fits


@pytest.mark.parametrize("model", ["sasrec", "mmsrec", "idsr"])
def test_a_model_without_tokens_is_refused(
    warehouse: Warehouse, checkpoint: Path, model: str
) -> None:
    with pytest.raises(UserError, match=rf"tune_blocks=2 .*\(.*mmsr, pmmrec\), not {model}"):
        worlds.begin(warehouse, model, "tiny", settings=["tune_blocks=2"])


def test_a_table_that_names_no_checkpoint(warehouse: Warehouse, checkpoint: Path) -> None:
    (table,) = FeatureStore(warehouse).tables("tiny")
    path = table.manifest_path
    manifest = read_json(path, "extract again")
    write_json(path, {key: manifest[key] for key in manifest if key != "source"})
    refused(warehouse, "text=words:layer-1 .*no checkpoint")


def test_a_checkpoint_that_is_gone(warehouse: Warehouse, checkpoint: Path) -> None:
    checkpoint.rename(checkpoint.parent / "elsewhere")
    refused(warehouse, rf"text=words:layer-1 .*{checkpoint}; put it")
    # Extraction from the new folder computes nothing, and stores the new path.
    (checkpoint.parent / "new").mkdir()
    moved = (checkpoint.parent / "elsewhere").rename(checkpoint.parent / "new" / "words")
    tuned.extracted(warehouse, "layer-1", text=moved)
    assert begin(warehouse).spec.features == ("text=words:layer-1",)


def test_a_checkpoint_that_has_changed(warehouse: Warehouse, checkpoint: Path) -> None:
    small(checkpoint, seed=1)
    refused(warehouse, rf"{checkpoint} is not .*text=words:layer-1")
    (checkpoint / "config.json").write_text("{")
    refused(warehouse, r"text=words:layer-1 in .*cannot be loaded")


def test_an_architecture_that_cannot_be_cut(warehouse: Warehouse, tmp_path: Path) -> None:
    tuned.world(warehouse, tmp_path / "raw")
    folder = checkpoints.vision_folder(tmp_path / "s", kind="DINOv3ViT", **tuned.VISION)
    tuned.extracted(warehouse, "layer-1", image=folder)
    refused(warehouse, "'dinov3_vit'.*known: vit, .*dinov2.*swin, resnet", tune_blocks=2)


def test_a_library_that_computes_otherwise(
    warehouse: Warehouse, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UpperBlocks, "_mask", lambda self, x, lengths: None)  # sees the padding
    refused(warehouse, "the upper blocks of words alone")


def test_a_run_without_its_description_of_blocks(warehouse: Warehouse, checkpoint: Path) -> None:
    run = begin(warehouse, name="r")
    path = run.folder / "blocks.json"
    document = read_json(path, "train again")
    document["text"]["config"]["hidden_size"] = "wide"
    write_json(path, document)
    with pytest.raises(UserError, match=r"blocks\.json is damaged.*; train again"):
        open_run(warehouse, run.folder)
    path.unlink()
    with pytest.raises(UserError, match=r"blocks\.json .*train again"):
        open_run(warehouse, run.folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tune_blocks": -1}, "tune_blocks=-1 .*at least 0"),
        ({"tune_blocks": "most"}, "tune_blocks='most' .*whole number, or all"),
        ({"tune_blocks": "1.5"}, "tune_blocks='1.5' .*whole number, or all"),
        ({"tune_lr": 2.0}, "tune_lr=2.0 .*at most 1"),
        ({"tune_lr": 0.5, "tune_weight_decay": 3.0}, "tune_weight_decay=3.0 .*tune_lr=0.5"),
        ({"tune_lr": np.nan}, "tune_lr=nan .*at least 0"),
    ],
)
def test_settings_out_of_range(
    warehouse: Warehouse, checkpoint: Path, setting: dict[str, Any], message: str
) -> None:
    refused(warehouse, message, **setting)
