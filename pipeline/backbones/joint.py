"""The base class of the models that encode an image and a text together.

The vector of a pair is the class token of the encoder that sees both, after its last norm;
``NAME@mean`` takes the mean of all its tokens, ``NAME@own`` the model's pooler.

Legend: B inputs of a batch, T tokens, D width of the embedding.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from features.errors import UserError
from pipeline.backbones import torch_utils
from pipeline.backbones.base import (
    TOKENS,
    InputBatch,
    TokenIds,
    Vectors,
    folder_files,
    split_pooling,
)
from pipeline.backbones.hidden_states import HiddenStates
from pipeline.backbones.processors import ImageInput, TextInput
from pipeline.backbones.torch_backbone import TorchBackbone
from pipeline.backbones.transformers_loading import libraries, load_model, loading, read_config

_GREY = Image.new("RGB", (64, 64), "grey")
_POOLINGS = {"cls": "class token", "mean": "mean of the tokens", "own": "the model's own pooler"}


class JointBackbone(TorchBackbone):
    """A transformers model whose encoder sees an image and a text together.

    A subclass defines how the encoders are found, the arguments of their forward passes, and which
    tokens are not padding.

    Args:
        name: Name of the backbone; the part after ``@`` chooses the pooling.
        folder: Folder of the checkpoint.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.

    Raises:
        UserError: The folder cannot be loaded, lacks weights, or has no pooler although the name
            asks for it.
    """

    modalities: tuple[str, ...] = ("joint",)

    def __init__(self, name: str, folder: Path, device: str | None, compute: str) -> None:
        super().__init__(name, device, compute)
        self.libraries = libraries()
        self._asked = split_pooling(name)[1] or "cls"
        with loading(name, folder):
            self._load(folder)
            self.token_limit = self._text_input.token_limit
            grey, word = self.image(_GREY), self.texts(["a"])[0]
            with torch.inference_mode():
                self._encoders = self._find_encoders(InputBatch(images=[grey], texts=[word]))
        self.dim = self._encoders["joint"].dims[TOKENS]
        self.blocks = self._deepest()

    def _load(self, folder: Path) -> None:
        config = read_config(folder)
        model, missing, self.checkpoint = load_model(folder, config, self._device)
        self._model: Any = model
        self.source = {"library": "transformers", "folder": str(folder.absolute())}
        self.weight_files = folder_files(folder)
        self._need_pooler(missing)
        self._image_input = ImageInput(folder, self._device)
        self.input_size = self._image_input.size
        text_config = getattr(config, "text_config", config)
        self._text_input = TextInput(folder, model, text_config, self._device)

    def _need_pooler(self, missing: list[str]) -> None:
        if self._asked == "own" and any("pooler" in key for key in missing):
            raise UserError(
                f"backbone {self.name!r}: its checkpoint has no weights of the model's pooler;"
                " after the @ give cls or mean, or leave it out"
            )

    # -- defined by subclasses ------------------------------------------------------------------

    @abstractmethod
    def _find_encoders(self, probe: InputBatch) -> dict[str, HiddenStates]:
        """Return the encoder of each modality.

        Args:
            probe: An image and a text, to try the encoders with.
        """

    @abstractmethod
    def _token_mask(self, batch: InputBatch, inputs: dict[str, Any], width: int) -> torch.Tensor:
        """Return which of the encoder's tokens are not padding: (B, ``width``)."""

    # -- the interface --------------------------------------------------------------------------

    def image_preprocessing(self) -> str:
        """Describe the checkpoint's image processor."""
        return self._image_input.describe()

    def text_preprocessing(self) -> str:
        """Describe the checkpoint's tokenizer."""
        return self._text_input.describe(self.max_tokens)

    def image(self, image: Image.Image) -> Any:
        """Run the checkpoint's image processor."""
        return self._image_input.prepare(image)

    def texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Run the checkpoint's tokenizer, without padding."""
        return self._text_input.prepare(texts, self.max_tokens)

    # -- the forward pass -----------------------------------------------------------------------

    def _describe_pooling(self, modality: str) -> str:
        encoder = "the joint encoder" if modality == "joint" else f"the {modality} encoder"
        return f"{_POOLINGS[self._asked]} of {encoder}"

    def _vectors(self, batch: InputBatch) -> torch.Tensor:
        inputs = self._inputs(batch)
        output = self._encoders[batch.modality].run(**inputs)
        if self._asked == "own":
            vectors_BD: torch.Tensor = output.pooler_output
            return vectors_BD
        hidden_BTD: torch.Tensor = output.last_hidden_state.float()
        if self._asked == "cls":
            return hidden_BTD[:, 0]
        mask_BT1 = self._token_mask(batch, inputs, hidden_BTD.shape[1]).unsqueeze(-1)
        return (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1)

    def _split(
        self, hidden: torch.Tensor, batch: InputBatch, inputs: dict[str, Any]
    ) -> list[Vectors]:
        mask_BT = self._token_mask(batch, inputs, hidden.shape[1]).bool().cpu().numpy()
        vectors_BTD = torch_utils.to_numpy(hidden)
        return [tokens[mask] for tokens, mask in zip(vectors_BTD, mask_BT, strict=True)]
