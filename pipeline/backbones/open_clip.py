"""CLIP and its kin through open_clip: pretrained tags, files of weights, local folders.

Legend: B inputs of a batch, T tokens of a text, D width of the embedding, HWC a picture's sides
and channels.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME
from open_clip.transform import PreprocessCfg
from PIL import Image

from features.checkpoint_fingerprint import fingerprint
from features.errors import UserError
from pipeline.backbones import hub, torch_utils
from pipeline.backbones.base import POOLED, InputBatch, TokenIds, Vectors, split_pooling
from pipeline.backbones.image_transforms import of_open_clip
from pipeline.backbones.open_clip_towers import OpenClipHiddenStates, Text, visual
from pipeline.media.errors import one_line

_WEIGHTS = (".safetensors", ".bin", ".pth")
CONFIG = "open_clip_config.json"
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


class Clip:
    """One open_clip model; pictures are handed over as 8-bit pixels, normalised in the batch."""

    modalities: tuple[str, ...] = ("image", "text", "video", "joint")

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        config: dict[str, Any],
        tokenizer: Any,
        device: torch.device,
        compute: str,
    ) -> None:
        self.name = name
        self.dim = int(config["embed_dim"])
        self.compute = compute
        self.batch_size = torch_utils.batch_size(device)
        self.libraries = {"open_clip": open_clip.__version__, "torch": torch.__version__}
        self.checkpoint = fingerprint(model.state_dict(), config)
        self.source: dict[str, Any] = {}
        self._device = device
        torch_utils.ready(model, device)
        self._model = model
        self._tokenizer = tokenizer
        cfg = PreprocessCfg(**model.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
        self._pixels = of_open_clip(cfg, device)
        self._cfg = cfg
        self._text = Text(model)
        self._visual = visual(model)
        inner = getattr(tokenizer, "tokenizer", None)  # of transformers; open_clip's pads with 0
        probed = np.asarray(tokenizer([torch_utils.PROBE]))
        self._words = hashlib.sha256(probed.tobytes()).hexdigest()[:8]
        self._pad = getattr(inner, "pad_token_id", 0) or 0
        self._pad_ends = self._pad == getattr(inner, "eos_token_id", None)
        self.blocks = max(len(self._visual.blocks), len(self._text.trunk.blocks))
        self.input_size: int | None = max(cfg.size) if isinstance(cfg.size, tuple) else cfg.size

    def preprocessing(self, modality: str) -> str:
        """Say how open_clip prepares the input."""
        length, kind = self._tokenizer.context_length, type(self._tokenizer).__name__
        text = f"open_clip {kind} {self._words}, at most {length} tokens"
        cfg = self._cfg
        seen = (
            f"{cfg.resize_mode} side to {cfg.size}, {cfg.interpolation}, centre crop,"
            f" mean {_short(cfg.mean)}, std {_short(cfg.std)}"
        )
        if cfg.resize_mode == "longest":
            seen += f", filled with {cfg.fill_color}"
        return {"text": text, "joint": f"{seen}; {text}"}.get(modality, seen)

    def pooling(self, modality: str, level: str = POOLED) -> str:
        """Say which of open_clip's outputs is taken, or what the tokens are."""
        if level != POOLED:
            return self._trunk(modality).describe(level)
        if modality == "joint":
            return torch_utils.UNIT_MEAN
        return "encode_text" if modality == "text" else "encode_image"

    def _trunk(self, modality: str) -> OpenClipHiddenStates:
        return {"image": self._visual, "text": self._text.trunk}.get(
            modality, OpenClipHiddenStates()
        )

    def levels(self, modality: str) -> tuple[str, ...]:
        """Name what can be had of a modality."""
        return self._trunk(modality).levels

    def token_dim(self, level: str, modality: str) -> int:
        """D of one token: the width of the tower."""
        return self._trunk(modality).dim

    def image(self, picture: Image.Image) -> npt.NDArray[np.uint8]:
        """Resize and crop to (H, W, 3) 8-bit pixels; the rest of the transform is linear."""
        return self._pixels.prepare(picture)

    def texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Tokenise; what follows the end token is cut off where it cannot matter."""
        ids_BT = self._tokenizer(list(texts)).numpy()
        return [ids[:end] for ids, end in zip(ids_BT, self._text.ends(ids_BT), strict=True)]

    def embed(self, batch: InputBatch) -> Vectors:
        """Encode a batch: (B, D) float32."""
        with torch_utils.forward(self._device, self.compute):
            if batch.modality == "joint":
                pair = self._see(batch.images), self._read(batch.texts)
                return torch_utils.to_numpy(torch_utils.unit_mean(*pair))
            found = self._read(batch.texts) if len(batch.texts) else self._see(batch.images)
            return torch_utils.to_numpy(found)

    def tokens(self, batch: InputBatch, level: str) -> list[Vectors]:
        """Encode a batch to tokens: (T, D) float32 for each input."""
        with torch_utils.forward(self._device, self.compute):
            if batch.modality == "image":
                return torch_utils.split(
                    self._visual.hidden(level, lambda: self._see(batch.images))
                )
            hidden_BTD = self._text.trunk.hidden(level, lambda: self._read(batch.texts))
            return torch_utils.split(hidden_BTD, [self._length(ids) for ids in batch.texts])

    def _length(self, ids: TokenIds) -> int:
        """Count a text's own tokens."""
        if self._text.cut:
            return len(ids)
        return torch_utils.without_padding(ids, self._pad, ends=self._pad_ends)

    def _see(self, images: Sequence[Any]) -> torch.Tensor:
        return self._model.encode_image(self._pixels.batch(images))  # type: ignore[operator, no-any-return]

    def _read(self, texts: Sequence[TokenIds]) -> torch.Tensor:
        return self._text.encode(torch_utils.pad(texts, 0, self._device))


def from_tag(name: str, arch: str, tag: str, device: str | None, compute: str) -> Clip:
    """Load an architecture that open_clip knows, with a pretrained tag or a file of weights.

    Raises:
        UserError: There is no such architecture, tag or file, or the weights cannot be had.
    """
    config = open_clip.get_model_config(arch)
    if config is None:
        some = ", ".join(open_clip.list_models()[:8])
        raise UserError(
            f"backbone {name!r}: open_clip has no architecture {arch!r} (has: {some}, ...)"
        )
    known = open_clip.get_pretrained_cfg(arch, tag)
    if known:
        weights = _download(name, arch, tag, known)
    elif Path(tag).expanduser().is_file():
        weights = str(Path(tag).expanduser())
    else:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(arch)) or "none"
        raise UserError(
            f"backbone {name!r}: {tag!r} is neither a file nor a tag of {arch} (tags: {tags})"
        )
    # OpenAI's weights were trained with another GELU than the architecture's default.
    gelu = bool(known.get("quick_gelu")) or bool(config.get("quick_gelu"))
    return _load(
        name, arch, {**config, "quick_gelu": gelu}, device, compute,
        pretrained=weights,
        force_quick_gelu=gelu,
        force_preprocess_cfg={key: known[key] for key in _PREPROCESS if key in known},
    )  # fmt: skip


def from_folder(name: str, folder: Path, device: str | None, compute: str) -> Clip:
    """Load a folder in open_clip's own format: ``open_clip_config.json`` and weights.

    Raises:
        UserError: The configuration or the weights are missing or do not fit.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"backbone {name!r}: {folder / CONFIG} cannot be used ({one_line(error)})"
        ) from None
    if not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        raise UserError(f"backbone {name!r}: {folder} holds no weights ({', '.join(_WEIGHTS)})")
    return _load(name, f"local-dir:{folder}", config, device, compute)


def _load(
    name: str, source: str, config: dict[str, Any], device: str | None, compute: str, **more: Any
) -> Clip:
    if split_pooling(name)[1] not in (None, "own"):
        raise UserError(
            f"backbone {name!r}: a model of two towers has a pooling of its own; after the @ give"
            " own, or leave it out"
        )
    chosen = torch_utils.choose_backbone_device(device)
    text = config.get("text_cfg") if isinstance(config, dict) else None
    names = ["hf_model_name"]
    if not source.startswith("local-dir:"):  # a folder has its tokenizer
        names.append("hf_tokenizer_name")
    elsewhere = [text[key] for key in names if text.get(key)] if isinstance(text, dict) else []
    try:
        with hub.at_once(elsewhere), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = open_clip.create_model(
                source, require_pretrained=True, weights_only=True, **more
            )
            tokenizer = open_clip.get_tokenizer(source)
            clip = Clip(name, model, config, tokenizer, chosen, compute)
            clip.source = {
                "library": "open_clip",
                "model": source,
                "weights": str(Path(more["pretrained"]).absolute()) if more else "",
                "config": config,
            }
            return clip
    except Exception as error:  # whatever is wrong with a checkpoint, it is not ours
        raise UserError(
            f"backbone {name!r}: open_clip cannot load {source.removeprefix('local-dir:')}"
            f" ({one_line(error)})"
        ) from None


def _download(name: str, arch: str, tag: str, known: dict[str, Any]) -> str:
    """Find the weights of a tag in the hub's cache, or fetch them."""
    repository, _, filename = str(known["hf_hub"]).rpartition("/")
    for candidate in _files(filename):
        found = try_to_load_from_cache(repository, candidate)
        if isinstance(found, str):
            return found
    hub.require(name, repository, f"open_clip {arch}/{tag}")
    try:
        return str(open_clip.download_pretrained(known))
    except Exception as error:
        raise UserError(
            f"backbone {name!r}: no download of {repository} ({one_line(error)})"
        ) from None


def _files(filename: str) -> tuple[str, ...]:
    """The files that open_clip would take, best first."""
    if not filename:
        return (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    return (str(Path(filename).with_suffix(".safetensors")), filename)


def _short(values: Any) -> str:
    return "/".join(f"{float(value):.4g}" for value in values)
