"""CLIP and similar models of open_clip: pretrained tags, files of weights, local folders.

Legend: B inputs of a batch, T tokens of a text, D width of the embedding, HWC the sides and
channels of an image.
"""

import hashlib
import json
import re
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
from features.encoder_blocks import open_clip_blocks
from features.errors import UserError
from pipeline.backbones import hub, torch_utils
from pipeline.backbones.base import InputBatch, TokenIds, folder_files, split_pooling
from pipeline.backbones.hidden_states import of_open_clip as of_open_clip_blocks
from pipeline.backbones.image_transforms import of_open_clip
from pipeline.backbones.open_clip_text import OpenClipTextEncoder
from pipeline.backbones.torch_backbone import UNIT_MEAN, TorchBackbone
from pipeline.media.errors import one_line

_WEIGHTS = (".safetensors", ".bin", ".pth")
CONFIG = "open_clip_config.json"
_NAMES = (("text_cfg", "hf_model_name"), ("vision_cfg", "timm_model_name"))
"""Section and key of the names of other models in a configuration."""
_PREPROCESS = ("mean", "std", "interpolation", "resize_mode", "fill_color")


class OpenClipBackbone(TorchBackbone):
    """One open_clip model, with an encoder of images and one of texts.

    Args:
        name: Name of the backbone.
        model: The model, with its weights.
        config: Its architecture, as open_clip writes it.
        tokenizer: Its tokenizer.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.
    """

    modalities = ("image", "text", "video", "joint")

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        config: dict[str, Any],
        tokenizer: Any,
        device: str | None,
        compute: str,
    ) -> None:
        super().__init__(name, device, compute)
        self.dim = int(config["embed_dim"])
        self.libraries = {"open_clip": open_clip.__version__, "torch": torch.__version__}
        self.checkpoint = fingerprint(model.state_dict(), config)
        torch_utils.freeze(model, self._device)
        self._model = model
        self._tokenizer = tokenizer
        cfg = PreprocessCfg(**model.visual.preprocess_cfg)  # type: ignore[union-attr, arg-type]
        self._transform = of_open_clip(cfg, self._device)
        self._cfg = cfg
        self._text = OpenClipTextEncoder(model)
        runs = {"image": self._run_image, "text": self._text.encode}
        for modality, run in runs.items():
            encoder = open_clip_blocks(model, modality)
            if encoder is not None:
                self._encoders[modality] = of_open_clip_blocks(encoder, run)
        inner = getattr(tokenizer, "tokenizer", None)  # of transformers; open_clip's pads with 0
        probed = np.asarray(tokenizer([torch_utils.PROBE]))
        self._tokenizer_hash = hashlib.sha256(probed.tobytes()).hexdigest()[:8]
        self.token_limit = int(tokenizer.context_length)
        self._pad = getattr(inner, "pad_token_id", 0) or 0
        self._pad_ends = self._pad == getattr(inner, "eos_token_id", None)
        self.blocks = self._deepest()
        self.input_size = max(cfg.size) if isinstance(cfg.size, tuple) else cfg.size

    def image_preprocessing(self) -> str:
        """Describe how open_clip prepares an image."""
        cfg = self._cfg
        steps = (
            f"{cfg.resize_mode} side to {cfg.size}, {cfg.interpolation}, centre crop,"
            f" mean {_short(cfg.mean)}, std {_short(cfg.std)}"
        )
        return f"{steps}, filled with {cfg.fill_color}" if cfg.resize_mode == "longest" else steps

    def text_preprocessing(self) -> str:
        """Describe open_clip's tokenizer."""
        length = self.max_tokens or self.token_limit
        kind = type(self._tokenizer).__name__
        return f"open_clip {kind} {self._tokenizer_hash}, at most {length} tokens"

    def image(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resize and crop to (H, W, 3) 8-bit pixels; they are normalized in the batch."""
        return self._transform.prepare(image)

    def texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Tokenize, without the tokens on which a text's vector does not depend."""
        ids_BT = self._tokenizer(list(texts), context_length=self.max_tokens).numpy()
        if not self._text.trims and self.max_tokens is not None:  # the model takes a fixed length
            missing = self.token_limit - ids_BT.shape[1]
            ids_BT = np.pad(ids_BT, ((0, 0), (0, missing)), constant_values=self._pad)
        return [ids[:end] for ids, end in zip(ids_BT, self._text.ends(ids_BT), strict=True)]

    def _describe_pooling(self, modality: str) -> str:
        return {"joint": UNIT_MEAN, "text": "encode_text"}.get(modality, "encode_image")

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        if batch.modality == "image":
            return {"x_BCHW": self._transform.batch(batch.images)}
        return {"ids_BT": torch_utils.pad(batch.texts, 0, self._device)}

    def _lengths(self, batch: InputBatch) -> list[int] | None:
        if batch.modality == "image":
            return None
        if self._text.trims:
            return [len(ids) for ids in batch.texts]
        return [
            torch_utils.without_padding(ids, self._pad, ends=self._pad_ends) for ids in batch.texts
        ]

    def _image_vectors(self, images: Sequence[Any]) -> torch.Tensor:
        return self._run_image(**self._inputs(InputBatch(images=images)))

    def _text_vectors(self, texts: Sequence[TokenIds]) -> torch.Tensor:
        return self._text.encode(**self._inputs(InputBatch(texts=texts)))

    def _run_image(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self._model.encode_image(x_BCHW)  # type: ignore[operator, no-any-return]


def from_tag(name: str, arch: str, tag: str, device: str | None, compute: str) -> OpenClipBackbone:
    """Load an architecture of open_clip with a pretrained tag or a file of weights.

    Raises:
        UserError: There is no such architecture, tag or file, or the weights cannot be downloaded.
    """
    config = open_clip.get_model_config(arch)
    if config is None:
        examples = ", ".join(open_clip.list_models()[:8])
        raise UserError(
            f"backbone {name!r}: open_clip has no architecture {arch!r} (has: {examples}, ...)"
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


def from_folder(name: str, folder: Path, device: str | None, compute: str) -> OpenClipBackbone:
    """Load a folder in open_clip's own format: ``open_clip_config.json`` and weights.

    Raises:
        UserError: The configuration or the weights are missing or do not fit, or the configuration
            names a folder or a remote place as its text or vision model.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"backbone {name!r}: {folder / CONFIG} cannot be used ({one_line(error)})"
        ) from None
    for section, key in _NAMES:
        encoder = config.get(section) if isinstance(config, dict) else None
        other = encoder.get(key) if isinstance(encoder, dict) else None
        # A name of a model is no path and has no scheme, such as local-dir: and hf-hub:.
        if other and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", str(other)):
            raise UserError(
                f"backbone {name!r}: {folder / CONFIG} names {str(other)[:80]!r} as {key}, which is"
                " no name of a model; take a folder that contains its whole model"
            )
    if not any(path.suffix in _WEIGHTS for path in folder.iterdir()):
        raise UserError(f"backbone {name!r}: {folder} holds no weights ({', '.join(_WEIGHTS)})")
    return _load(name, f"local-dir:{folder}", config, device, compute)


def _load(
    name: str,
    model_name: str,
    config: dict[str, Any],
    device: str | None,
    compute: str,
    **options: Any,
) -> OpenClipBackbone:
    """Create the model and the tokenizer.

    Args:
        name: Name of the backbone.
        model_name: Architecture, or ``local-dir:FOLDER``.
        config: The architecture.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.
        **options: Further arguments of ``open_clip.create_model``; empty for a folder.
    """
    if split_pooling(name)[1] not in (None, "own"):
        raise UserError(
            f"backbone {name!r}: a model with two encoders has a pooling of its own; after the @"
            " give own, or leave it out"
        )
    text = config.get("text_cfg") if isinstance(config, dict) else None
    keys = ["hf_model_name"]
    if not model_name.startswith("local-dir:"):  # a folder has its tokenizer
        keys.append("hf_tokenizer_name")
    repositories = [text[key] for key in keys if text.get(key)] if isinstance(text, dict) else []
    chosen = str(torch_utils.choose_backbone_device(device))
    try:
        with hub.offline_unless_reachable(repositories), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = open_clip.create_model(
                model_name, require_pretrained=True, weights_only=True, **options
            )
            tokenizer = open_clip.get_tokenizer(model_name)
            backbone = OpenClipBackbone(name, model, config, tokenizer, chosen, compute)
    except Exception as error:  # a damaged checkpoint can raise any error
        raise UserError(
            f"backbone {name!r}: open_clip cannot load {model_name.removeprefix('local-dir:')}"
            f" ({one_line(error)})"
        ) from None
    folder = Path(model_name.removeprefix("local-dir:"))
    weights = Path(options["pretrained"]) if options else folder
    backbone.weight_files = (weights,) if weights.is_file() else folder_files(folder)
    backbone.source = {
        "library": "open_clip",
        "model": model_name,
        "weights": str(weights.absolute()) if options else "",
        "config": config,
    }
    return backbone


def _download(name: str, arch: str, tag: str, known: dict[str, Any]) -> str:
    """Return the path of the weights of a tag in the hub's cache; download them if necessary."""
    repository, _, filename = str(known["hf_hub"]).rpartition("/")
    for candidate in _weight_files(filename):
        path = try_to_load_from_cache(repository, candidate)
        if isinstance(path, str):
            return path
    hub.require(name, repository, f"open_clip {arch}/{tag}")
    try:
        return str(open_clip.download_pretrained(known))
    except Exception as error:
        raise UserError(
            f"backbone {name!r}: no download of {repository} ({one_line(error)})"
        ) from None


def _weight_files(filename: str) -> tuple[str, ...]:
    """Return the names of the files that open_clip would load, in its order."""
    if not filename:
        return (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    return (str(Path(filename).with_suffix(".safetensors")), filename)


def _short(values: Any) -> str:
    return "/".join(f"{float(value):.4g}" for value in values)
