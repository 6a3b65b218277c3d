"""Vectors of a backbone, and their comparison with those of a library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from pipeline.backbones.base import Backbone, InputBatch, block_of
from tests.pipeline.backbones.inputs import pictures

Floats = npt.NDArray[np.float32]
LONG_TEXTS = ["a red shoe", "x", "words " * 60, "ein sehr viel laengerer satz mit vielen worten"]


def images_of(backbone: Backbone) -> Floats:
    return backbone.embed(InputBatch(images=[backbone.image(one) for one in pictures()]))


def texts_of(backbone: Backbone) -> Floats:
    return backbone.embed(InputBatch(texts=backbone.texts(LONG_TEXTS)))


def close(ours: Floats, theirs: torch.Tensor) -> bool:
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    assert float(theirs.std()) > 1e-3  # random weights, but no constant
    return bool(np.abs(ours - theirs.numpy()).max() < 1e-5)


LIMIT = 1e-5


def library(folder: Path) -> Any:
    return transformers.AutoModel.from_pretrained(folder).eval()


def tokenizer_of(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def processor_of(folder: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]


def near(ours: Any, theirs: Any) -> bool:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert theirs.std() > 1e-3  # random weights, but no constant
    return bool(np.abs(ours - theirs).max() < LIMIT)


def grid(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.flatten(1).T if tokens.ndim == 3 else tokens


def check_levels(
    ours: Backbone,
    batch: InputBatch,
    bare: Callable[[int], Any],
    *,
    levels: int,
    last: str = "last_hidden_state",
) -> None:
    """Compare every level with the library's forward of each input alone.

    Args:
        ours: The backbone.
        batch: Its inputs.
        bare: Of the number of an input: the library's output with hidden states.
        levels: How many levels there are.
        last: What the output calls the last layer's tokens.
    """
    modality = batch.modality
    names = ours.levels(modality)
    assert len(names) == levels
    with torch.inference_mode():
        outputs = [bare(i) for i in range(len(pictures()))]
    for level in names[1:]:
        found = ours.tokens(batch, level)
        k = block_of(level)
        said = {None: "tokens of the last layer", 0: "embeddings, before block 1 of "}.get(
            k, f"hidden states after block {k} of "
        )
        assert said in ours.pooling(modality, level)
        for i, tokens in enumerate(found):
            theirs = outputs[i][last] if k is None else outputs[i].hidden_states[k]
            assert near(tokens, grid(theirs[0]))
