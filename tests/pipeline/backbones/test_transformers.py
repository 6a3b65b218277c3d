"""Models of transformers, against the library's own forward passes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from features.errors import UserError
from pipeline.backbones.loading import load_backbone
from tests.pipeline.backbones.checkpoints import (
    bert_folder,
    clip_folder,
    vision_folder,
)
from tests.pipeline.backbones.inputs import pictures
from tests.pipeline.backbones.references import (
    LONG_TEXTS,
    close,
    images_of,
    processor_of,
    texts_of,
)


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_two_tower_models(tmp_path: Path, kind: str) -> None:
    folder = clip_folder(tmp_path / kind, kind=kind)
    ours = load_backbone(str(folder), device="cpu")
    assert ours.modalities == ("image", "video", "text", "joint")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = processor_of(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        pixels = processor(images=pictures(), return_tensors="pt")
        inputs = tokenizer(
            LONG_TEXTS, padding="max_length", truncation=True, max_length=40, return_tensors="pt"
        )
        if kind == "Siglip":
            del inputs["attention_mask"]
        del inputs["token_type_ids"]
        images = model.get_image_features(**pixels).pooler_output
        texts = model.get_text_features(**inputs).pooler_output
    assert close(images_of(ours), images)
    assert close(texts_of(ours), texts)


def test_a_pooler_without_weights_is_not_missed_but_a_layer_is(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert")
    reference = texts_of(load_backbone(str(folder), device="cpu"))
    weights = load_file(folder / "model.safetensors")
    headless = {key: value for key, value in weights.items() if "pooler" not in key}
    save_file(headless, folder / "model.safetensors", metadata={"format": "pt"})
    assert (texts_of(load_backbone(str(folder), device="cpu")) == reference).all()
    lost = {key: value for key, value in headless.items() if "layer.1" not in key}
    save_file(lost, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"cannot load .*16 weights are missing, such as encoder"):
        load_backbone(str(folder), device="cpu")


def test_all_that_is_done_to_an_input_is_told_apart(tmp_path: Path, clip: Path) -> None:
    vision, words = vision_folder(tmp_path / "vision"), bert_folder(tmp_path / "words")

    def says(folder: Path, modality: str, name: str = "", **changed: Any) -> str:
        if name:
            document = json.loads((folder / name).read_text())
            document.update(changed)
            (folder / name).write_text(json.dumps(document))
        return load_backbone(str(folder), device="cpu").preprocessing(modality)

    seen = [says(vision, "image")]
    for change in ({"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 0.01}):
        seen.append(says(vision, "image", "preprocessor_config.json", **change))
    assert len(set(seen)) == 4
    assert says(vision, "image") == seen[-1]
    before = json.loads((words / "tokenizer.json").read_text())["normalizer"]
    read = [says(words, "text"), says(words, "text", "tokenizer.json", normalizer=before)]
    assert read[0] == read[1]
    changes: list[dict[str, Any]] = [
        {"normalizer": before | {"lowercase": False}},
        {"post_processor": None},
    ]
    for changed in changes:
        (words / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
        read.append(says(words, "text", "tokenizer.json", **changed))
    assert len({line.split()[1] for line in read}) == 3
    assert (
        load_backbone(str(clip), device="cpu")
        .preprocessing("text")
        .startswith("open_clip SimpleTokenizer ")
    )
