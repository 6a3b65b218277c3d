"""The base class of the backbones that run in torch.

Legend: B inputs of a batch, T tokens of an input, D width of the embedding.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.backbones import torch_utils
from pipeline.backbones.base import POOLED, Backbone, InputBatch, TokenIds, Vectors
from pipeline.backbones.hidden_states import HiddenStates

UNIT_MEAN = "mean of the picture's and the text's features, each of unit length"
"""Pooling of a pair, as feature tables record it: other words would make a table unusable."""


class TorchBackbone(Backbone):
    """A backbone whose encoders are torch modules.

    A subclass sets ``modalities`` and ``dim``, puts the encoders into ``_encoders``, and defines
    how the arguments of a forward pass are made (``_inputs``), how one vector is made
    (``_image_vectors`` and ``_text_vectors``, or ``_vectors``) and how that is described
    (``_describe_pooling``). The methods that begin with ``_`` run in inference mode, under autocast
    if :attr:`compute` is ``bfloat16``.

    Args:
        name: Name of the backbone, as the user typed it.
        device: Device to run on; None chooses a CUDA device if there is one, else the CPU.
        compute: ``float32`` or ``bfloat16``.

    Raises:
        UserError: torch has no such device.
    """

    mixes_sizes = False
    """Whether a forward pass takes images of several sizes, padded and masked."""

    def __init__(self, name: str, device: str | None, compute: str) -> None:
        super().__init__(name)
        self.compute = compute
        self._device = torch_utils.choose_backbone_device(device)
        self.batch_size = torch_utils.batch_size(self._device)
        self._encoders: dict[str, HiddenStates] = {}
        """Modality -> encoder whose tokens are available."""

    def _deepest(self) -> int:
        """Return the number of blocks of the deepest encoder."""
        return max((encoder.depth for encoder in self._encoders.values()), default=0)

    # -- defined by subclasses ------------------------------------------------------------------

    @abstractmethod
    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        """Return the keyword arguments of the forward pass of the batch's encoder."""

    @abstractmethod
    def _describe_pooling(self, modality: str) -> str:
        """Describe how one vector is made of the last layer's outputs."""

    def _image_vectors(self, images: Sequence[Any]) -> torch.Tensor:
        """Encode prepared images: (B, D)."""
        raise NotImplementedError

    def _text_vectors(self, texts: Sequence[TokenIds]) -> torch.Tensor:
        """Encode texts: (B, D)."""
        raise NotImplementedError

    def _vectors(self, batch: InputBatch) -> torch.Tensor:
        """Encode a batch: (B, D). A pair is the mean of its two vectors at unit length."""
        if batch.modality == "image":
            return self._image_vectors(batch.images)
        if batch.modality == "text":
            return self._text_vectors(batch.texts)
        images_BD, texts_BD = self._image_vectors(batch.images), self._text_vectors(batch.texts)
        return torch_utils.unit_mean(images_BD, texts_BD)

    def _lengths(self, batch: InputBatch) -> list[int] | None:
        """Return the number of tokens of each input without padding; None if none is padded."""
        return None

    def _split(
        self, hidden: torch.Tensor, batch: InputBatch, inputs: dict[str, Any]
    ) -> list[Vectors]:
        """Cut the padding off hidden states and return those of each input."""
        return torch_utils.split(hidden, self._lengths(batch))

    # -- the interface --------------------------------------------------------------------------

    def levels(self, modality: str) -> tuple[str, ...]:
        """Return the levels that are available for a modality."""
        encoder = self._encoders.get(modality)
        return encoder.levels if encoder else (POOLED,)

    def token_dim(self, level: str, modality: str) -> int:
        """Return the width of one token."""
        return self._encoders[modality].dims[level]

    def pooling(self, modality: str, level: str = POOLED) -> str:
        """Describe how one vector is made of the last layer, or what the tokens are."""
        if level != POOLED and modality in self._encoders:
            return self._encoders[modality].describe(level)
        return self._describe_pooling(modality)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text, special ones included, without padding."""
        batch = InputBatch(texts=self.texts([text]))
        lengths = self._lengths(batch)
        return lengths[0] if lengths else len(batch.texts[0])

    def embed(self, batch: InputBatch) -> Vectors:
        """Encode a batch: (B, D) float32. Images of one size share a forward pass."""
        return np.stack(self._by_size(batch, lambda part: list(self._embed(part))))

    def tokens(self, batch: InputBatch, level: str) -> list[Vectors]:
        """Encode a batch to tokens: (T, D) float32 for each input."""
        return self._by_size(batch, lambda part: self._tokens(part, level))

    def _by_size(
        self, batch: InputBatch, encode: Callable[[InputBatch], Sequence[Vectors]]
    ) -> list[Vectors]:
        """Encode the images of each size in one call; return the results in the batch's order."""
        groups: dict[Any, list[int]] = {}
        for index in range(len(batch)):
            size = None
            if len(batch.images) and not self.mixes_sizes:
                size = tuple(getattr(batch.images[index], "shape", ()))
            groups.setdefault(size, []).append(index)
        if len(groups) == 1:
            return list(encode(batch))
        vectors: dict[int, Vectors] = {}
        for indices in groups.values():
            part = InputBatch(
                images=[batch.images[i] for i in indices],
                texts=[batch.texts[i] for i in indices] if len(batch.texts) else [],
            )
            vectors.update(zip(indices, encode(part), strict=True))
        return [vectors[index] for index in range(len(batch))]

    def _embed(self, batch: InputBatch) -> Vectors:
        with torch_utils.forward(self._device, self.compute):
            return torch_utils.to_numpy(self._vectors(batch))

    def _tokens(self, batch: InputBatch, level: str) -> list[Vectors]:
        with torch_utils.forward(self._device, self.compute):
            inputs = self._inputs(batch)
            hidden = self._encoders[batch.modality].hidden(level, inputs)
            return self._split(hidden, batch, inputs)
