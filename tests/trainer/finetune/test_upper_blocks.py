"""Training the upper blocks of a backbone on tables of what the lower ones made."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from torch import Tensor, nn

from features.errors import UserError
from features.warehouse import Warehouse
from tests.pipeline.backbones import checkpoints
from tests.trainer import worlds
from tests.trainer.finetune import tuned
from tests.trainer.models.test_recommenders import sequences
from trainer.config import TrainConfig
from trainer.data.batches import ItemFeatures
from trainer.finetune.upper_blocks import UpperBlocks
from trainer.models.registry import MODELS
from trainer.runs.run import Run

SMALL: dict[str, Any] = {
    "dim": 8, "heads": 2, "hidden": 16, "length": 5, "fusion_heads": 2, "epochs": 2,
    "batch_size": 2, "device": "cpu", "tune_blocks": 2, "tune_lr": 0.01, "monitor": "MRR",
}  # fmt: skip
ROWS = [[0, 1, 2, 4, 5], [3, 6, 7], [7, 5]]


@pytest.fixture
def prepared(warehouse: Warehouse, tmp_path: Path) -> Warehouse:
    tuned.world(warehouse, tmp_path / "raw")
    return warehouse


def begin(prepared: Warehouse, *, model: str = "pmmrec", **given: Any) -> Run:
    """Begin a run; what is no option of that is a setting."""
    names = ("features", "is_pretraining", "name", "init", "transfer")
    options = {key: given.pop(key) for key in names if key in given}
    classes = (TrainConfig, MODELS.find(model).load().settings_class)
    known = {field.name for settings_class in classes for field in fields(settings_class)}
    small = {key: value for key, value in SMALL.items() if key in known}
    settings = [f"{key}={value}" for key, value in {**small, **given}.items()]
    return worlds.begin(prepared, model, "tiny", settings=settings, **options)


def tuned_blocks(run: Run, modality: str) -> UpperBlocks:
    blocks = run.model.get_submodule(f"backbones.{modality}")
    assert isinstance(blocks, UpperBlocks)
    return blocks


def loss(model: Any, features: ItemFeatures) -> Tensor:
    """Without dropout; gradients stay in the parameters."""
    batch = worlds.batch(sequences(ROWS), features, torch.Generator().manual_seed(1))
    loss: Tensor = model.eval().loss(batch)["loss"]
    loss.backward()
    return loss.detach()


def equal_to_the_whole(
    run: Run,
    encoders: dict[str, Callable[[Sequence[int]], tuple[Tensor, Tensor]]],
    upper: dict[str, list[nn.Module]],
) -> None:
    """Loss and all gradients equal those of a model that runs the library's whole encoders."""
    features = run.data.features
    reference: Any = copy.deepcopy(run.model)
    reference.backbones = nn.ModuleDict()
    whole = replace(
        features,
        tokens={
            name: tuned.Whole(features.tokens[name], encode) for name, encode in encoders.items()
        },
    )
    ours, theirs = loss(run.model, features), loss(reference, whole)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for name, modules in upper.items():
        mine = list(tuned_blocks(run, name).named_parameters())
        library = [parameter for module in modules for parameter in module.parameters()]
        assert len(mine) == len(library) > 0
        for (key, parameter), other in zip(mine, library, strict=True):
            assert parameter.grad is not None, key
            assert other.grad is not None, key
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4)
        # Keys shift all scores alike, so that of their biases alone the gradient is zero.
        moved = sum(bool(parameter.grad.abs().max() > 1e-4) for _, parameter in mine)  # type: ignore[union-attr]
        assert moved > len(mine) * 0.8, name
    rest = dict(run.model.named_parameters())
    for key, other in reference.named_parameters():
        if other.grad is not None:
            torch.testing.assert_close(rest[key].grad, other.grad, rtol=1e-4, atol=1e-4)


def shaken(folder: Path) -> Any:
    """A library's model with weights that do something, saved and frozen."""
    model: Any = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            draw = torch.Generator().manual_seed(index)
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.1)
    model.save_pretrained(folder)
    return model.eval().requires_grad_(False)


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    return next(list(part) for part in encoder.modules() if isinstance(part, nn.ModuleList))


def thaw(modules: list[nn.Module]) -> list[nn.Module]:
    for module in modules:
        module.requires_grad_(True)
    return modules


CUTS = pytest.mark.parametrize(("cut", "count"), [(1, 2), (0, 3), (0, "all")])
"""Frozen blocks of three, and the setting ``tune_blocks`` that trains the others."""


@CUTS
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra"])
def test_a_text_encoder_trains_as_if_it_were_whole(
    prepared: Warehouse, tmp_path: Path, kind: str, cut: int, count: int | str
) -> None:
    folder = checkpoints.bert_folder(tmp_path / "words", kind=kind, num_hidden_layers=3)
    model = shaken(folder)
    tuned.extracted(prepared, f"layer-{cut}", text=folder)
    run = begin(prepared, tune_blocks=count)
    upper = thaw(blocks_of(model)[cut:])
    equal_to_the_whole(run, {"text": tuned.whole_text(folder, model)}, {"text": upper})


@CUTS
@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "ViTMAE"])
def test_a_vision_encoder_trains_as_if_it_were_whole(
    prepared: Warehouse, tmp_path: Path, kind: str, cut: int, count: int | str
) -> None:
    # A filtered autoencoder that masks nothing still shuffles: the mean of its tokens is the same.
    options: dict[str, Any] = {"mask_ratio": 0.0} if kind == "ViTMAE" else {}
    folder = checkpoints.vision_folder(tmp_path / "eyes", kind=kind, **tuned.VISION, **options)
    model = shaken(folder)
    tuned.extracted(prepared, f"layer-{cut}", image=folder)
    run = begin(prepared, tune_blocks=count)
    upper = thaw([*blocks_of(model)[cut:], model.layernorm])
    whole = tuned.whole_picture(folder, model, tmp_path / "raw")
    equal_to_the_whole(run, {"image": whole}, {"image": upper})


def test_both_modalities_train_together_under_every_objective(
    prepared: Warehouse, tmp_path: Path
) -> None:
    text_folder = checkpoints.bert_folder(tmp_path / "words", num_hidden_layers=3)
    image_folder = checkpoints.vision_folder(tmp_path / "eyes", **tuned.VISION)
    text_model, image_model = shaken(text_folder), shaken(image_folder)
    tuned.extracted(prepared, "layer-1", text=text_folder, image=image_folder)
    run = begin(prepared, is_pretraining=True)
    whole = {
        "text": tuned.whole_text(text_folder, text_model),
        "image": tuned.whole_picture(image_folder, image_model, tmp_path / "raw"),
    }
    upper = {
        "text": thaw(blocks_of(text_model)[1:]),
        "image": thaw([*blocks_of(image_model)[1:], image_model.layernorm]),
    }
    equal_to_the_whole(run, whole, upper)


def test_mmsr_trains_them_too(prepared: Warehouse, tmp_path: Path) -> None:
    folder = checkpoints.bert_folder(tmp_path / "words", num_hidden_layers=3)
    model = shaken(folder)
    tuned.extracted(prepared, "layer-1", text=folder)
    run = begin(prepared, model="mmsr", loss="softmax")
    upper = thaw(blocks_of(model)[1:])
    equal_to_the_whole(run, {"text": tuned.whole_text(folder, model)}, {"text": upper})


@pytest.mark.parametrize("cut", [1, 0])
@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_both_encoders_of_one_checkpoint(
    prepared: Warehouse, tmp_path: Path, kind: str, cut: int
) -> None:
    folder = checkpoints.clip_folder(tmp_path / "both", kind=kind)
    model = shaken(folder)
    tuned.extracted(prepared, f"layer-{cut}", text=folder, image=folder)
    sees, reads = model.vision_model, model.text_model
    whole = {"image": tuned.whole_picture(folder, sees, tmp_path / "raw")}
    norms = [sees.post_layernorm] if kind == "Siglip" else []  # CLIP's is behind the pooling
    upper = {"image": thaw([*blocks_of(sees)[cut:], *norms])}
    if kind == "CLIP":
        whole["text"] = tuned.whole_text(folder, reads)
        upper["text"] = thaw([*blocks_of(reads)[cut:], reads.final_layer_norm])
    else:  # of a text that sees its padding, the table has its own tokens only
        with pytest.raises(UserError, match="'siglip_text_model' cannot be trained"):
            begin(prepared, tune_blocks=2 - cut)
    run = begin(prepared, tune_blocks=2 - cut, features=[f"{name}:layer-{cut}" for name in whole])
    equal_to_the_whole(run, whole, upper)


@pytest.mark.parametrize("cut", [1, 0])
def test_both_encoders_of_open_clip(prepared: Warehouse, tmp_path: Path, cut: int) -> None:
    folder = checkpoints.open_clip_folder(tmp_path / "clip")
    model: Any = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
    model.eval().requires_grad_(False)
    tuned.extracted(prepared, f"layer-{cut}", text=folder, image=folder)
    run = begin(prepared, tune_blocks=2 - cut)
    whole = {name: tuned.whole_clip(model, name, tmp_path / "raw") for name in ("text", "image")}
    upper = {
        "text": thaw([*model.transformer.resblocks[cut:], model.ln_final]),
        "image": thaw([*model.visual.transformer.resblocks[cut:], model.visual.ln_post]),
    }
    equal_to_the_whole(run, whole, upper)
