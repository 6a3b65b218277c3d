"""Inputs of a transformers model: images through its processor, texts through its tokenizer.

Legend: B inputs of a batch, T tokens of a text, CHW the planes of an image.
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
from pipeline.backbones.transformers_loading import OWN_CODE

_SIZES = (
    "size", "size_divisor", "crop_size", "crop_pct", "resample", "do_center_crop", "image_mean",
    "image_std",
)  # fmt: skip
_STEPS = ("do_resize", "do_rescale", "do_normalize")  # described if they are left out
_RESCALE_FACTOR = 1 / 255  # described if it is another one
_MAX_TOKENS = 512  # if neither the tokenizer nor the model has a limit
_PADDED = ("siglip", "siglip2")  # text encoders trained on padded texts, without a mask


class ImageInput:
    """A checkpoint's image processor.

    Args:
        folder: Folder of the checkpoint.
        device: Device to which batches are copied.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._processor: Any = transformers.AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            folder, **OWN_CODE
        )
        self._transform = of_processor(self._processor, device)
        self._device = device

    @property
    def size(self) -> int:
        """Pixels of the side to which images are resized."""
        size = dict(self._processor.size)
        side: int = max(value for value in size.values() if value is not None)
        crop = getattr(self._processor, "crop_pct", None)  # ConvNeXt, ResNet: resized, then cropped
        return math.ceil(side / crop) if crop and side < 384 else side

    def describe(self) -> str:
        """Describe the steps for the provenance of a table."""
        settings = self._processor.to_dict()
        described = {key: settings[key] for key in _SIZES if settings.get(key) is not None}
        described |= {key: False for key in _STEPS if settings.get(key) is False}
        factor = settings.get("rescale_factor")
        if factor is not None and not math.isclose(factor, _RESCALE_FACTOR):
            described["rescale_factor"] = factor
        steps = json.dumps(described, sort_keys=True, default=str)
        return f"{type(self._processor).__name__} {steps}"

    def prepare(self, image: Image.Image) -> Any:
        """Apply the steps of the processor: 8-bit pixels, or (C, H, W) float32."""
        if self._transform is not None:
            return self._transform.prepare(image)
        pixels_1CHW = self._processor(images=image, return_tensors="pt")["pixel_values"]
        assert len(pixels_1CHW) == 1
        return torch.as_tensor(pixels_1CHW[0])

    def batch(self, images: Sequence[Any]) -> torch.Tensor:
        """Stack prepared images of one size: (B, C, H, W) float32 on the device."""
        if self._transform is not None:
            return self._transform.batch(images)
        return torch_utils.send(torch.stack(list(images)), self._device)

    def ragged(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Stack prepared images of any sizes.

        Returns:
            (B, C, H, W) float32 padded with zeros, and the mask (B, H, W), 0 for padding.
        """
        planes = [self.batch([image])[0] for image in images]
        height, width = (max(x_CHW.shape[axis] for x_CHW in planes) for axis in (1, 2))
        x_BCHW = torch.zeros((len(planes), planes[0].shape[0], height, width), device=self._device)
        shape = (len(planes), height, width)
        mask_BHW = torch.zeros(shape, dtype=torch.long, device=self._device)
        for padded_CHW, mask_HW, x_CHW in zip(x_BCHW, mask_BHW, planes, strict=True):
            _, rows, columns = x_CHW.shape
            padded_CHW[:, :rows, :columns] = x_CHW
            mask_HW[:rows, :columns] = 1
        return x_BCHW, mask_BHW


class TextInput:
    """A checkpoint's tokenizer, with the length that the model takes.

    Args:
        folder: Folder of the tokenizer.
        encoder: The model, or its text encoder.
        config: Configuration of the encoder.
        device: Device to which batches are copied.
        max_tokens: Largest number of tokens, if the checkpoint defines it; None takes the limits
            of the tokenizer and of the position table.
        lower: Whether texts are lower-cased first.
        prompt: Text that is put before each text.

    Raises:
        ValueError: The folder has no vocabulary.
    """

    def __init__(
        self,
        folder: Path,
        encoder: torch.nn.Module,
        config: Any,
        device: torch.device,
        *,
        max_tokens: int | None = None,
        lower: bool = False,
        prompt: str = "",
    ) -> None:
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **OWN_CODE)
        if len(self._tokenizer) <= len(self._tokenizer.all_special_ids):
            raise ValueError("its tokenizer has no vocabulary")
        # Two tokenizers with one vocabulary may differ in case, accents or special tokens.
        probed = self._tokenizer(torch_utils.PROBE)["input_ids"]
        vocabulary = json.dumps([self._tokenizer.get_vocab(), probed], sort_keys=True).encode()
        self._vocabulary = hashlib.sha256(vocabulary).hexdigest()[:8]
        self._device = device
        self._lower = lower
        self._prompt = prompt
        self._pad = self._tokenizer.pad_token_id or 0
        self._is_padded = any(kind in config.model_type for kind in _PADDED)
        self.token_limit = self._limit(encoder, config, max_tokens)
        """Most tokens of a text, special ones included."""

    def _limit(self, encoder: torch.nn.Module, config: Any, max_tokens: int | None) -> int:
        """Return the number of tokens that tokenizer, position table and checkpoint allow."""
        limits = [max_tokens or _MAX_TOKENS]
        if max_tokens is None and self._tokenizer.model_max_length < 1 << 20:
            limits = [self._tokenizer.model_max_length]
        positions = getattr(config, "max_position_embeddings", None)
        if positions:
            # RoBERTa's first position is the one after the position of the padding.
            used = [
                module.padding_idx + 1
                for key, module in encoder.named_modules()
                if key.endswith("position_embeddings")
                and getattr(module, "padding_idx", None) is not None
            ]
            limits.append(positions - max(used, default=0))
        return int(min(limits))

    def describe(self, max_tokens: int | None = None) -> str:
        """Describe the steps for the provenance of a table.

        Args:
            max_tokens: As for :meth:`prepare`.
        """
        steps = "lower case, " if self._lower else ""
        steps += f"behind {self._prompt!r}, " if self._prompt else ""
        kind = type(self._tokenizer).__name__
        return f"{steps}{kind} {self._vocabulary}, at most {max_tokens or self.token_limit} tokens"

    def prepare(self, texts: Sequence[str], max_tokens: int | None = None) -> list[TokenIds]:
        """Run the tokenizer, without padding unless the model was trained on it.

        Args:
            texts: The texts.
            max_tokens: Tokens to which a text is truncated; None takes :attr:`token_limit`.
        """
        prompted = [f"{self._prompt}{text}" for text in texts]
        prepared = [text.lower() for text in prompted] if self._lower else prompted
        ids = self._tokenizer(
            prepared,
            truncation=True,
            max_length=max_tokens or self.token_limit,
            return_attention_mask=False,
        )["input_ids"]
        if self._is_padded:
            ids = [row + [self._pad] * (self.token_limit - len(row)) for row in ids]
        return [np.asarray(row, dtype=np.int64) for row in ids]

    def batch(self, texts: Sequence[TokenIds]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Stack ids to (B, T), with the mask (B, T), 0 for padding; None if the model has none."""
        ids_BT = torch_utils.pad(texts, self._pad, self._device)
        if self._is_padded:
            return ids_BT, None
        lengths_B1 = torch.tensor([[len(ids)] for ids in texts])
        mask_BT = (torch.arange(ids_BT.shape[1]) < lengths_B1).long()
        return ids_BT, torch_utils.send(mask_BT, self._device)

    def lengths(self, texts: Sequence[TokenIds]) -> list[int]:
        """Return the number of tokens of each text, special ones included, without padding."""
        if not self._is_padded:
            return [len(ids) for ids in texts]
        ends = self._pad == self._tokenizer.eos_token_id
        return [torch_utils.without_padding(ids, self._pad, ends=ends) for ids in texts]
