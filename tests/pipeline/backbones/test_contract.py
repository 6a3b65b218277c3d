"""The interface of backbones, for each entry of the registry and a tiny checkpoint of each library.

An entry whose weights are installed runs with them. The other ones run with random weights: a tiny
model of the entry's architecture lies in a cache like the hub's.
"""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from huggingface_hub import constants
from open_clip import factory

from features.errors import UserError
from features.warehouse import slug
from pipeline.backbones.base import POOLED, Backbone, InputBatch, block_of, level_names
from pipeline.backbones.listing import is_offline
from pipeline.backbones.loading import load_backbone
from pipeline.backbones.registry import BACKBONES
from tests.pipeline.backbones import checkpoints
from tests.pipeline.backbones.inputs import images, one_by_one, pairs, texts

LIMIT = 1e-5
BATCHES = {"image": images, "text": texts, "joint": pairs}
# The detector's random weights take 160 MB: tests of regions load them once.
NAMES = [
    name
    for name, entry in BACKBONES.items()
    if not any(weights.endswith(".pth") for weights in entry.other_weights)
]
FOLDERS: dict[str, Callable[[Path], Path]] = {  # for which the registry has no name
    "CLIP": lambda folder: checkpoints.clip_folder(folder, kind="CLIP"),
    "Siglip": lambda folder: checkpoints.clip_folder(folder, kind="Siglip"),
    "timm": checkpoints.timm_folder,
    "timm-vit": lambda folder: checkpoints.timm_folder(folder, "test_vit"),
    "sentence": checkpoints.sentence_folder,
}
SOURCES = {"sentence": "sentence-transformers:"}  # prefix of the folder's path


@pytest.fixture(scope="module", params=[*NAMES, *FOLDERS])
def backbone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Backbone]:
    name, folder = request.param, tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        if name in FOLDERS:
            name = f"{SOURCES.get(name, '')}{FOLDERS[name](folder / name)}"
        elif not BACKBONES[name].hub and not is_offline(BACKBONES[name]):
            pytest.skip(f"the package with the weights of {name} is not installed")
        elif not is_offline(BACKBONES[name]):
            patch.setattr(constants, "HF_HUB_CACHE", str(folder))
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            weights = checkpoints.fill_cache(folder, BACKBONES[name])
            if BACKBONES[name].library == "open_clip":
                arch = BACKBONES[name].checkpoint.partition("/")[0]
                document = json.loads((weights / "open_clip_config.json").read_text())
                patch.setitem(factory._MODEL_CONFIGS, arch, document["model_cfg"])
        yield load_backbone(name, device="cpu")


LONG = "a red shoe with words and many more words after these words"


def test_texts_are_truncated_to_a_number_of_tokens(backbone: Backbone) -> None:
    limited = copy.deepcopy(backbone)
    if not {"text", "joint"} & set(backbone.modalities):
        with pytest.raises(UserError, match=r"takes no texts.*--max-tokens"):
            limited.limit_tokens(10)
        return
    fewest = backbone.count_tokens("a")
    for wrong in (0, fewest - 1, backbone.token_limit + 1):
        with pytest.raises(UserError, match=rf"{wrong} tokens.*{fewest} to {backbone.token_limit}"):
            limited.limit_tokens(wrong)
    limit = fewest + 2
    limited.limit_tokens(limit)
    assert limited.name == f"{backbone.name}@{limit}"
    assert limited.text_preprocessing() != backbone.text_preprocessing()
    assert limited.count_tokens(LONG) == limit < backbone.count_tokens(LONG)
    ids = limited.texts([LONG])[0]
    prefixes = backbone.texts([LONG[:length] for length in range(1, len(LONG))])
    assert any(np.array_equal(ids, prefix) for prefix in prefixes)
    assert np.array_equal(limited.texts(["a"])[0], backbone.texts(["a"])[0])


def batches(backbone: Backbone) -> dict[str, InputBatch]:
    return {
        modality: make(backbone)
        for modality, make in BATCHES.items()
        if modality in backbone.modalities
    }


def near(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> bool:
    return ours.shape == theirs.shape and bool(np.abs(ours - theirs).max() < LIMIT)


def test_it_describes_itself(backbone: Backbone) -> None:
    entry = BACKBONES.get(backbone.name)
    assert set(backbone.modalities) <= {"image", "text", "video", "joint"}
    assert ("video" in backbone.modalities) == ("image" in backbone.modalities)
    if entry is not None:
        assert set(backbone.modalities) == set(entry.modalities)
        assert slug(backbone.name) == backbone.name  # the folder of its tables has its name
        assert entry.licence or not entry.hub
        assert entry.checkpoint
        assert entry.library in ("open_clip", "transformers", "timm", "mmrec")
    assert backbone.checkpoint
    assert backbone.compute == "float32"
    assert backbone.batch_size > 0
    assert backbone.libraries
    json.dumps(backbone.source)
    takes_images = bool({"image", "joint"} & set(backbone.modalities))
    assert (backbone.input_size is not None) == takes_images
    for modality in backbone.modalities:
        assert backbone.preprocessing(modality)
        assert all(backbone.pooling(modality, level) for level in backbone.levels(modality))


def test_levels_are_named_as_they_are_everywhere(backbone: Backbone) -> None:
    depths = {0}
    for modality in backbone.modalities:
        levels = backbone.levels(modality)
        cuts = [block_of(level) for level in levels]
        depth = sum(k is not None for k in cuts)
        assert levels in ((POOLED,), level_names(depth))
        depths.add(depth)
    assert backbone.blocks == max(depths)
    if "video" in backbone.modalities:
        assert backbone.levels("video") == (POOLED,)


def test_a_vector_depends_on_its_input_alone(backbone: Backbone) -> None:
    for batch in batches(backbone).values():
        vectors = backbone.embed(batch)
        assert vectors.dtype == np.float32
        assert vectors.shape == (len(batch), backbone.dim)
        assert np.isfinite(vectors).all()
        assert np.ptp(vectors, axis=0).max() > 0  # other inputs, other vectors
        assert (vectors == backbone.embed(batch)).all()
        alone = [backbone.embed(single) for single in one_by_one(batch)]
        assert near(np.concatenate(alone), vectors)


def test_tokens_depend_on_their_input_alone(backbone: Backbone) -> None:
    for modality, batch in batches(backbone).items():
        for level in backbone.levels(modality)[1:]:
            tokens, again = backbone.tokens(batch, level), backbone.tokens(batch, level)
            assert len(tokens) == len(batch)
            for ours, same, single in zip(tokens, again, one_by_one(batch), strict=True):
                assert ours.dtype == np.float32
                assert ours.shape[1:] == (backbone.token_dim(level, modality),)
                assert len(ours) > 0
                assert (ours == same).all()
                (alone,) = backbone.tokens(single, level)
                assert near(alone, ours)
