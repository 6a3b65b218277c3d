"""What goes into a transformers model: pictures through its processor, texts through its tokenizer.

Legend: B inputs of a batch, T tokens of a text, CHW a picture's planes.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from pipeline.backbones import torch_utils
from pipeline.backbones.base import TokenIds
from pipeline.backbones.image_transforms import of_processor

OWN_CODE: dict[str, Any] = {"trust_remote_code": False}  # left out, the user would be asked
_SIZES = (
    "size", "size_divisor", "crop_size", "crop_pct", "resample", "do_center_crop", "image_mean",
    "image_std",
)  # fmt: skip
_STEPS = ("do_resize", "do_rescale", "do_normalize")  # told where they are left out
_LEVEL = 1 / 255  # what pixels are multiplied by, told where it is something else
_MAX_TOKENS = 512  # where neither tokenizer nor model knows a limit
_PADDED = ("siglip", "siglip2")  # text towers trained on padded texts, without a mask


class PictureInput:
    """A checkpoint's image processor."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._processor: Any = transformers.AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, **OWN_CODE
        )
        self._pixels = of_processor(self._processor, device)
        self._device = device

    @property
    def size(self) -> int:
        """Pixels of the side that pictures are resized to."""
        size = dict(self._processor.size)
        side: int = max(value for value in size.values() if value is not None)
        cut = getattr(self._processor, "crop_pct", None)  # ConvNeXt and ResNet: resized, then cut
        return math.ceil(side / cut) if cut and side < 384 else side

    def describe(self) -> str:
        """Name the steps for a table's provenance."""
        known = self._processor.to_dict()
        told = {key: known[key] for key in _SIZES if known.get(key) is not None}
        told |= {key: False for key in _STEPS if known.get(key) is False}
        factor = known.get("rescale_factor")
        if factor is not None and not math.isclose(factor, _LEVEL):
            told["rescale_factor"] = factor
        return f"{type(self._processor).__name__} {json.dumps(told, sort_keys=True, default=str)}"

    def prepare(self, picture: Image.Image) -> Any:
        """Do what the processor does: 8-bit pixels, or (C, H, W) float32."""
        if self._pixels is not None:
            return self._pixels.prepare(picture)
        pixels_1CHW = self._processor(images=picture, return_tensors="pt")["pixel_values"]
        assert len(pixels_1CHW) == 1
        return torch.as_tensor(pixels_1CHW[0])

    def batch(self, images: Sequence[Any]) -> torch.Tensor:
        """Stack prepared pictures of one size: (B, C, H, W) float32 on the device."""
        if self._pixels is not None:
            return self._pixels.batch(images)
        return torch_utils.send(torch.stack(list(images)), self._device)

    def ragged(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Stack prepared pictures of any sizes, with the mask (B, H, W) of what is no padding."""
        planes = [self.batch([image])[0] for image in images]
        high, wide = (max(one.shape[axis] for one in planes) for axis in (1, 2))
        x_BCHW = torch.zeros((len(planes), planes[0].shape[0], high, wide), device=self._device)
        mask_BHW = torch.zeros((len(planes), high, wide), dtype=torch.long, device=self._device)
        for x_CHW, mask_HW, one in zip(x_BCHW, mask_BHW, planes, strict=True):
            x_CHW[:, : one.shape[1], : one.shape[2]] = one
            mask_HW[: one.shape[1], : one.shape[2]] = 1
        return x_BCHW, mask_BHW


class TextInput:
    """A checkpoint's tokenizer, at the length that the model takes.

    Args:
        folder: Where the tokenizer is.
        tower: The model, or its text tower.
        config: Its configuration.
        device: Where batches go.
        most: The most tokens, where the checkpoint says so; else tokenizer and positions decide.
        lower: Whether texts are lower-cased first.
        prompt: What is put before each text.

    Raises:
        ValueError: The folder holds no vocabulary.
    """

    def __init__(
        self,
        folder: Path,
        tower: torch.nn.Module,
        config: Any,
        device: torch.device,
        *,
        most: int | None = None,
        lower: bool = False,
        prompt: str = "",
    ) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **OWN_CODE)
        if len(self._tokenizer) <= len(self._tokenizer.all_special_ids):
            raise ValueError("its tokenizer has no vocabulary")
        # Two tokenizers of one vocabulary may still differ in case, in accents or in the ends.
        probed = self._tokenizer(torch_utils.PROBE)["input_ids"]
        vocabulary = json.dumps([self._tokenizer.get_vocab(), probed], sort_keys=True).encode()
        self._vocabulary = hashlib.sha256(vocabulary).hexdigest()[:8]
        self._device = device
        self._lower = lower
        self._prompt = prompt
        self._pad = self._tokenizer.pad_token_id or 0
        self._full = any(kind in config.model_type for kind in _PADDED)
        self._most = self._limit(tower, config, most)

    def _limit(self, tower: torch.nn.Module, config: Any, most: int | None) -> int:
        """The most tokens that tokenizer, positions and checkpoint allow."""
        limits = [most or _MAX_TOKENS]
        if most is None and self._tokenizer.model_max_length < 1 << 20:
            limits = [self._tokenizer.model_max_length]
        positions = getattr(config, "max_position_embeddings", None)
        if positions:
            # RoBERTa and its kin count positions from behind the padding's own.
            used = [
                module.padding_idx + 1
                for key, module in tower.named_modules()
                if key.endswith("position_embeddings")
                and getattr(module, "padding_idx", None) is not None
            ]
            limits.append(positions - max(used, default=0))
        return int(min(limits))

    def describe(self) -> str:
        """Name the steps for a table's provenance."""
        lower = "lower case, " if self._lower else ""
        lower += f"behind {self._prompt!r}, " if self._prompt else ""
        kind = type(self._tokenizer).__name__
        return f"{lower}{kind} {self._vocabulary}, at most {self._most} tokens"

    def prepare(self, texts: Sequence[str]) -> list[TokenIds]:
        """Run the tokenizer, without padding unless the model was trained on it."""
        given = [f"{self._prompt}{text}" for text in texts]
        given = [text.lower() for text in given] if self._lower else given
        ids = self._tokenizer(
            given, truncation=True, max_length=self._most, return_attention_mask=False
        )["input_ids"]
        if self._full:
            ids = [row + [self._pad] * (self._most - len(row)) for row in ids]
        return [np.asarray(row, dtype=np.int64) for row in ids]

    def batch(self, texts: Sequence[TokenIds]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stack ids (B, T), with the mask of what is no padding, where the model wants one."""
        ids_BT = torch_utils.pad(texts, self._pad, self._device)
        if self._full:
            return ids_BT, None
        lengths_B1 = torch.tensor([[len(ids)] for ids in texts])
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B1).long()
        return ids_BT, torch_utils.send(mask_BT, self._device)

    def lengths(self, texts: Sequence[TokenIds]) -> list[int]:
        """Count each text's own tokens, special ones included."""
        if not self._full:
            return [len(ids) for ids in texts]
        ends = self._pad == self._tokenizer.eos_token_id
        return [torch_utils.without_padding(ids, self._pad, ends=ends) for ids in texts]
