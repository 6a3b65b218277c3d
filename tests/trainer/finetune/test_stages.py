"""Upper stages of image encoders, equal to the library's whole encoder, on tiny random weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from features.documents import read_json, write_json
from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from tests.pipeline.backbones import checkpoints
from tests.trainer import worlds
from tests.trainer.finetune import tuned
from tests.trainer.finetune.test_upper_blocks import (
    begin,
    equal_to_the_whole,
    loss,
    prepared,
    shaken,
    thaw,
    tuned_blocks,
)
from tests.trainer.models.test_recommenders import sequences
from trainer.evaluation.encode import encode_catalogue
from trainer.finetune import upper_blocks
from trainer.runs.run import open_run
from trainer.runs.train import train_run

__all__ = ["prepared"]

SWIN = {**checkpoints.SWIN, "image_size": 56, "depths": [1, 2, 2], "num_heads": [1, 2, 4],
        "window_size": 3}  # fmt: skip
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16, 16], "depths": [1, 2, 1]}
KINDS: dict[str, tuple[dict[str, Any], Any]] = {
    # grids of 14, 7 and 4 cells a side, so that windows and merging are padded
    "Swin": (SWIN, transformers.ViTImageProcessor(size={"height": 56, "width": 56})),
    # 24 x 40 pixels: grids that are no squares
    "ResNet": (RESNET, transformers.ViTImageProcessor(size={"height": 24, "width": 40})),
}


def folder_of(path: Path, kind: str) -> Path:
    config, processor = KINDS[kind]
    return checkpoints.vision_folder(path, kind=kind, processor=processor, **config)


def stages_of(kind: str, model: Any) -> list[nn.Module]:
    return list(model.encoder.layers if kind == "Swin" else model.encoder.stages)


@pytest.mark.parametrize(("cut", "count"), [(2, 1), (1, 2), (0, 3), (1, "all")])
@pytest.mark.parametrize("kind", ["Swin", "ResNet"])
def test_stages_train_as_if_the_encoder_were_whole(
    prepared: Warehouse, tmp_path: Path, kind: str, cut: int, count: int | str
) -> None:
    folder = folder_of(tmp_path / "eyes", kind)
    model = shaken(folder)
    tuned.extracted(prepared, f"layer-{cut}", image=folder)
    run = begin(prepared, tune_blocks=count)
    norms = [model.layernorm] if kind == "Swin" else []
    upper = {"image": thaw([*stages_of(kind, model)[cut:], *norms])}
    whole = tuned.whole_picture(folder, model, tmp_path / "raw")
    equal_to_the_whole(run, {"image": whole}, upper)


@pytest.mark.parametrize("cut", [2, 0])
def test_stages_of_groupvit_and_its_text_encoder(
    prepared: Warehouse, tmp_path: Path, cut: int
) -> None:
    folder = checkpoints.clip_folder(tmp_path / "both", kind="GroupViT")
    model = shaken(folder)
    tuned.extracted(prepared, f"layer-{cut}", image=folder)
    tuned.extracted(prepared, "layer-1", text=folder)
    run = begin(prepared, tune_blocks="all", features=[f"image:layer-{cut}", "text:layer-1"])
    sees, reads = model.vision_model, model.text_model
    whole = {
        "image": tuned.whole_picture(folder, sees, tmp_path / "raw"),
        "text": tuned.whole_text(folder, reads),
    }
    upper = {
        "image": thaw([*list(sees.encoder.stages)[cut:], sees.layernorm]),
        "text": thaw([*list(reads.encoder.layers)[1:], reads.final_layer_norm]),
    }
    equal_to_the_whole(run, whole, upper)


def test_a_stage_of_groupvit_that_takes_group_tokens_is_refused(
    prepared: Warehouse, tmp_path: Path
) -> None:
    folder = checkpoints.clip_folder(tmp_path / "both", kind="GroupViT")
    tuned.extracted(prepared, "layer-1", image=folder)
    with pytest.raises(UserError, match=r"stage 2 of GroupViT .*tune_blocks=1 or 3 "):
        begin(prepared, tune_blocks=2)


@pytest.mark.parametrize("kind", ["Swin", "ResNet"])
def test_a_run_with_stages_trains_and_is_read_again(
    prepared: Warehouse, tmp_path: Path, kind: str
) -> None:
    folder = folder_of(tmp_path / "eyes", kind)
    tuned.extracted(prepared, "layer-1", image=folder)
    run = begin(prepared, name="r", tune_blocks="all", epochs=1)
    statistics = {key: b.clone() for key, b in run.model.named_buffers() if "running" in key}
    assert bool(statistics) == (kind == "ResNet")
    train_run(run)
    trained = dict(run.model.named_buffers())
    assert all(torch.equal(before, trained[key]) for key, before in statistics.items())
    for file in folder.iterdir():
        file.unlink()  # the run has all it needs
    opened = open_run(prepared, run.folder)
    assert tuned_blocks(opened, "image").state_dict().keys() == (
        tuned_blocks(run, "image").state_dict().keys()
    )
    expected = encode_catalogue(run.model, run.data)
    opened.model.load_state_dict(run.model.state_dict())
    torch.testing.assert_close(encode_catalogue(opened.model, opened.data), expected)


@pytest.mark.parametrize("kind", ["Swin", "ResNet"])
def test_chunks_computed_again_give_the_same(
    prepared: Warehouse, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "eyes", kind)
    shaken(folder)
    tuned.extracted(prepared, "layer-1", image=folder)
    run = begin(prepared, tune_blocks="all")
    results: list[list[Tensor]] = []
    for most in (10**6, 60):
        monkeypatch.setattr(upper_blocks, "TOKENS_AT_ONCE", most)
        run.model.zero_grad()
        value = loss(run.model, run.data.features)
        upper = tuned_blocks(run, "image").parameters()
        gradients = [p.grad.clone() for p in upper if p.grad is not None]
        assert gradients
        results.append([value, *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_items_without_images_leave_gradients_of_zero(prepared: Warehouse, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "eyes", "Swin")
    tuned.extracted(prepared, "layer-1", image=folder)
    run = begin(prepared, tune_blocks="all")
    tokens, mask = run.data.features.tokens["image"].gather(torch.tensor([5, 5]))
    assert tokens.shape[1] == 1
    states, mask = tuned_blocks(run, "image")(tokens, mask)
    assert states.shape == (2, 16, 64)
    assert not states.any()
    assert not mask.any()
    states.sum().backward()
    gradients = [parameter.grad for parameter in tuned_blocks(run, "image").parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("kind", ["Swin", "ResNet", "GroupViT"])
def test_every_parameter_has_the_same_gradient_in_two_trainings(
    prepared: Warehouse, tmp_path: Path, kind: str
) -> None:
    if kind == "GroupViT":
        folder = checkpoints.clip_folder(tmp_path / "both", kind=kind)
    else:
        folder = folder_of(tmp_path / "eyes", kind)
    tuned.extracted(prepared, "layer-0", image=folder)
    run = begin(prepared, tune_blocks="all")

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        run.model.train().zero_grad(set_to_none=True)
        drawn = torch.Generator().manual_seed(2)
        batch = worlds.batch(sequences([[0, 1, 2, 3], [5], [3, 5]]), run.data.features, drawn)
        run.model.loss(batch)["loss"].backward()
        named = list(run.model.named_parameters())
        assert [key for key, parameter in named if parameter.grad is None] == []
        return [p.grad.clone() for _, p in named if p.grad is not None]

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


def test_images_of_several_sizes_cannot_be_cut(prepared: Warehouse, tmp_path: Path) -> None:
    processor = transformers.ConvNextImageProcessor(
        size={"shortest_edge": 400}, do_resize=False, crop_pct=1.0
    )
    folder = checkpoints.vision_folder(
        tmp_path / "eyes", kind="ResNet", processor=processor, **RESNET
    )
    tuned.extracted(prepared, "layer-2", image=folder)
    with pytest.raises(UserError, match=r"image=eyes:layer-2 does not resize .*--level layer-2 "):
        begin(prepared, tune_blocks=1)


def test_a_table_of_an_older_version_names_the_command(prepared: Warehouse, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "eyes", "Swin")
    tuned.extracted(prepared, "layer-2", image=folder)
    (table,) = FeatureStore(prepared).tables("tiny")
    path = table.manifest_path
    manifest = dict(read_json(path, "extract again"))
    manifest["source"] = {key: manifest["source"][key] for key in ("library", "folder")}
    del manifest["request"]
    write_json(path, manifest)
    with pytest.raises(UserError, match=r"older version; .*--level layer-2 "):
        begin(prepared, tune_blocks=1)
    tuned.extracted(prepared, "layer-2", image=folder)
    assert begin(prepared, tune_blocks=1).spec.features == ("image=eyes:layer-2",)
