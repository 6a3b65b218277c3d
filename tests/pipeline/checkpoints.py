"""Tiny checkpoints with random weights, saved in the libraries' own formats."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from open_clip.model import CLIP
from safetensors.torch import save_file

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_TEXT = {
    "vocab_size": 57, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip


def open_clip_folder(folder: Path, *, seed: int = 0, **changed: Any) -> Path:
    """A CLIP with its configuration, as ``open_clip.push_to_hf_hub`` lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CLIP_CONFIG, **changed}
    torch.manual_seed(seed)
    save_file(CLIP(**copy.deepcopy(config)).state_dict(), folder / "open_clip_model.safetensors")
    look = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    document = {"model_cfg": config, "preprocess_cfg": look}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return folder


def bert_folder(folder: Path, *, seed: int = 0, kind: str = "Bert") -> Path:
    """A text encoder of ``kind`` with a tokenizer that spells."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**_TEXT)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def vision_folder(folder: Path, *, kind: str = "ViT", seed: int = 0, **changed: Any) -> Path:
    """A vision encoder of ``kind``."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(changed or _VISION))
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def clip_folder(folder: Path, *, kind: str = "CLIP", seed: int = 0) -> Path:
    """A two-tower model in the format of transformers."""
    torch.manual_seed(seed)
    text = {**_TEXT, "eos_token_id": 3, "bos_token_id": 2}
    more = {"projection_dim": 24} if kind == "CLIP" else {}
    if kind == "Siglip":
        text["projection_size"] = 32
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=_VISION, **more)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    size = {"shortest_edge": 32} if kind == "CLIP" else {"height": 32, "width": 32}
    processor = getattr(transformers, f"{kind}ImageProcessor")
    crop = {"crop_size": {"height": 32, "width": 32}} if kind == "CLIP" else {}
    processor(size=size, **crop).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def _tokenizer(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{c}" for c in _LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
