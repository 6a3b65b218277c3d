"""Upper blocks of joint models, equal to the library's whole model, on tiny random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from features.warehouse import Warehouse
from tests.pipeline.backbones import checkpoints
from tests.trainer.finetune import tuned
from tests.trainer.finetune.test_upper_blocks import (
    begin,
    equal_to_the_whole,
    prepared,
    shaken,
    thaw,
)

__all__ = ["prepared"]

CUTS = pytest.mark.parametrize("cut", [1, 0])


@CUTS
@pytest.mark.parametrize("name", ["mmsr", "pmmrec", "morec"])
def test_vilt(prepared: Warehouse, tmp_path: Path, cut: int, name: str) -> None:
    folder = checkpoints.vilt_folder(tmp_path / "vilt")
    model = shaken(folder)
    embed = model.embeddings.visual_embed

    def in_reading_order(x: Any, mask: Any, max_image_length: int = -1) -> Any:
        """Return what the library returns, without its random order of the patches."""
        seen, kept, (place, (rows, columns)) = embed(x, mask, max_image_length)
        order = (place[..., 0] * columns + place[..., 1])[0].argsort()
        seen[:, 1:] = seen[:, 1:][:, order]
        return seen, kept, (place[:, order], (rows, columns))

    model.embeddings.visual_embed = in_reading_order
    tuned.extracted(prepared, f"layer-{cut}", joint=folder)
    given: dict[str, Any] = {"align": "none"} if name == "pmmrec" else {}
    run = begin(prepared, model=name, tune_blocks=2 - cut, **given)
    whole = tuned.whole_pair(
        folder, folder, tmp_path / "raw", lambda **inputs: model(**inputs).last_hidden_state
    )
    upper = thaw([*list(model.encoder.layer)[cut:], model.layernorm])
    equal_to_the_whole(run, {"joint": whole}, {"joint": upper})


@CUTS
def test_visualbert(prepared: Warehouse, tmp_path: Path, cut: int) -> None:
    folder = checkpoints.visualbert_folder(tmp_path / "visualbert", width=16)
    looks = checkpoints.vision_folder(folder / "vision", kind="ResNet", **checkpoints.RESNET)
    model = shaken(folder)
    vision: Any = transformers.AutoModel.from_pretrained(looks).eval()
    tuned.extracted(prepared, f"layer-{cut}", joint=folder)
    run = begin(prepared, model="mmsr", tune_blocks=2 - cut)

    def pair(pixel_values: Tensor, **words: Tensor) -> Tensor:
        with torch.no_grad():
            grid = vision(pixel_values=pixel_values).last_hidden_state
        states = model(**words, visual_embeds=grid.flatten(2).transpose(1, 2))
        last: Tensor = states.last_hidden_state
        return last

    whole = tuned.whole_pair(folder, looks, tmp_path / "raw", pair)
    upper = thaw(list(model.encoder.layer)[cut:])
    equal_to_the_whole(run, {"joint": whole}, {"joint": upper})


@CUTS
def test_flava_has_three_encoders(prepared: Warehouse, tmp_path: Path, cut: int) -> None:
    folder = checkpoints.flava_folder(tmp_path / "flava")
    model = shaken(folder)
    sides: dict[str, tuple[Any, Callable[..., Any]]] = {
        "image": (
            model.image_model,
            tuned.whole_picture(folder, model.image_model, tmp_path / "raw"),
        ),
        "text": (model.text_model, tuned.whole_text(folder, model.text_model)),
        "joint": (
            model.multimodal_model,
            tuned.whole_pair(
                folder,
                folder,
                tmp_path / "raw",
                lambda **inputs: model(**inputs).multimodal_output.last_hidden_state,
            ),
        ),
    }
    for modality, (encoder, whole) in sides.items():
        tuned.extracted(prepared, f"layer-{cut}", **{modality: folder})
        run = begin(
            prepared, model="mmsr", tune_blocks=2 - cut, features=[f"{modality}:layer-{cut}"]
        )
        modules: list[nn.Module] = [*list(encoder.encoder.layer)[cut:], encoder.layernorm]
        equal_to_the_whole(run, {modality: whole}, {modality: thaw(modules)})
        model.requires_grad_(False)
