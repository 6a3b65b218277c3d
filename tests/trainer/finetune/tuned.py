"""A small prepared world with texts and pictures, and library models run whole as the reference."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import torch
import transformers
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor

from features.atomic_files import write_table
from features.documents import write_json
from features.schema import INTERACTIONS_SCHEMA
from features.warehouse import Warehouse
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.backbones import tiny
from trainer.data.token_features import TokenFeatures

TEXTS: list[str | None] = ["a red one", "b", "cd efg", None, "hijk lmn op", "q r s", "tu", "vwxyz"]
N = len(TEXTS)
SEQUENCES = [[0, 1, 2, 4, 5], [3, 4, 6, 7, 0], [7, 5, 1, 2], [2, 6, 0, 3, 7]]
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip


def world(warehouse: Warehouse, raw: Path) -> None:
    """Prepare the dataset ``tiny``: eight items, of which one has no text and one no picture."""
    files = [tiny.picture(raw / f"{i}.png", i).name for i in range(N)]
    images: list[str | None] = [None if i == 5 else name for i, name in enumerate(files)]
    ids = [f"i{i}" for i in range(N)]
    info = tiny.prepare(warehouse, raw, ids=ids, text=TEXTS, image=images)
    rows = [
        {"user": user, "user_id": f"u{user}", "item": item, "timestamp": None, "position": position}
        for user, sequence in enumerate(SEQUENCES)
        for position, item in enumerate(sequence)
    ]
    folder = warehouse.dataset_dir("tiny")
    table = pa.Table.from_pylist(rows, INTERACTIONS_SCHEMA)
    write_table(folder / "interactions" / "part-0.parquet", table)
    info = replace(info, users=len(SEQUENCES), interactions=len(rows))
    write_json(folder / "dataset.json", asdict(info))


def extracted(warehouse: Warehouse, level: str, **backbones: Path) -> None:
    """Extract what our pipeline makes of a checkpoint, in float32."""
    names: dict[str, Any] = {modality: str(folder) for modality, folder in backbones.items()}
    options = ExtractOptions(level=level, dtype="float32", device="cpu", **names)
    extract_features(warehouse, "tiny", options)


class Whole(TokenFeatures):
    """In place of a table: the whole library model on the items' own texts or pictures."""

    def __init__(
        self, table: TokenFeatures, encode: Callable[[Sequence[int]], tuple[Tensor, Tensor]]
    ) -> None:
        set_once = object.__setattr__  # the base is frozen
        set_once(self, "values", table.values)
        set_once(self, "offsets", table.offsets)
        set_once(self, "device", table.device)
        set_once(self, "row_N", None)
        set_once(self, "_encode", encode)

    _encode: Callable[[Sequence[int]], tuple[Tensor, Tensor]]

    def gather(self, items_K: Tensor) -> tuple[Tensor, Tensor]:
        has_tokens = (np.diff(self.offsets) > 0)[items_K.numpy()]
        x, mask = self._encode([int(item) for item in items_K[torch.from_numpy(has_tokens)]])
        rows = torch.from_numpy(np.flatnonzero(has_tokens))
        x_KTD = x.new_zeros((len(items_K), *x.shape[1:])).index_copy(0, rows, x)
        mask_KT = mask.new_zeros((len(items_K), mask.shape[1])).index_copy(0, rows, mask)
        return x_KTD, mask_KT


def whole_text(folder: Path, model: Any) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
    """A text encoder of transformers, fed by its own tokenizer."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)

    def encode(items: Sequence[int]) -> tuple[Tensor, Tensor]:
        given = tokenizer([TEXTS[i] for i in items], padding=True, return_tensors="pt")
        mask = given["attention_mask"]
        output = model(input_ids=given["input_ids"], attention_mask=mask)
        return output.last_hidden_state, mask.bool()

    return encode


def whole_picture(
    folder: Path, model: Any, raw: Path
) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
    """A vision encoder of transformers, fed by its own processor."""
    processors: Any = transformers.AutoImageProcessor
    processor = processors.from_pretrained(folder)

    def encode(items: Sequence[int]) -> tuple[Tensor, Tensor]:
        images = [Image.open(raw / f"{i}.png").convert("RGB") for i in items]
        states = model(**processor(images=images, return_tensors="pt")).last_hidden_state
        if states.ndim == 4:
            states = states.flatten(2).transpose(1, 2)
        return states, torch.ones(states.shape[:2], dtype=torch.bool)

    return encode


def whole_pair(
    folder: Path, processor_folder: Path, raw: Path, run: Callable[..., Tensor]
) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
    """A joint model, pair by pair: no padding, and its own processor and tokenizer.

    Args:
        folder: Folder of the tokenizer.
        processor_folder: Folder of the image processor.
        raw: Folder of the pictures.
        run: From the inputs of one picture and one text to the last hidden states (1, T, D).
    """
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    processors: Any = transformers.AutoImageProcessor
    processor = processors.from_pretrained(processor_folder)

    def encode(items: Sequence[int]) -> tuple[Tensor, Tensor]:
        states = []
        for item in items:
            image = Image.open(raw / f"{item}.png").convert("RGB")
            pixels = processor(images=image, return_tensors="pt")
            states.append(run(**pixels, **tokenizer(TEXTS[item], return_tensors="pt"))[0])
        lengths = torch.tensor([len(state) for state in states])
        x_BTD = torch.nn.utils.rnn.pad_sequence(states, batch_first=True)
        return x_BTD, torch.arange(x_BTD.shape[1]) < lengths[:, None]

    return encode


def whole_clip(
    model: Any, modality: str, raw: Path
) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
    """A tower of open_clip's at its full length of 77 tokens; the norm behind its last block."""
    show = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    norm = model.visual.ln_post if modality == "image" else model.ln_final

    def encode(items: Sequence[int]) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        hook = norm.register_forward_hook(lambda module, given, output: seen.append(output))
        if modality == "image":
            images = [Image.open(raw / f"{i}.png").convert("RGB") for i in items]
            model.encode_image(torch.stack([show(image) for image in images]))
            mask = torch.ones(seen[0].shape[:2], dtype=torch.bool)
        else:
            ids = open_clip.tokenize([TEXTS[i] or "" for i in items])
            model.encode_text(ids)
            mask = torch.arange(77) <= ids.argmax(1, keepdim=True)
        hook.remove()
        return seen[0], mask

    return encode
