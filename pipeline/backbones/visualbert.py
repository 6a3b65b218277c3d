"""VisualBERT: a BERT that reads a text and then looks at features of a picture's parts.

The parts come from a frozen model of pictures: the cells of a ResNet's last grid, the patches of a
vision transformer, or the regions that a detector finds, as wide as VisualBERT's projection takes
them (Li et al., "VisualBERT: a Simple and Performant Baseline for Vision and Language", 2019).

Legend: B inputs of a batch, T tokens of a text, V parts of a picture, D width of the embedding.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from features.errors import UserError
from pipeline.backbones import torch_utils
from pipeline.backbones.base import TOKENS, InputBatch
from pipeline.backbones.hidden_states import HiddenStates
from pipeline.backbones.image_text import Joint
from pipeline.backbones.processors import TextInput
from pipeline.backbones.transformers import TransformersBackbone, load_model, loading, read_config


class PartEncoder(Protocol):
    """What shows the parts of pictures."""

    width: int
    batch_size: int
    """Pictures together: a resized one may have 13 MB, and some batches wait in memory."""
    checkpoint: str
    libraries: dict[str, str]

    @property
    def input_size(self) -> int | None:
        """Pixels of the side that pictures are resized to."""
        ...

    def describe(self) -> str:
        """Name the steps for a table's provenance."""
        ...

    def image(self, picture: Image.Image) -> Any:
        """Prepare one RGB picture; called in several threads at once."""
        ...

    def parts(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Show the parts (B, V, D), and which of them (B, V) are no padding."""
        ...


class Parts:
    """The last layer's tokens of a vision encoder of transformers, without the class token.

    Raises:
        UserError: It cannot be loaded.
    """

    def __init__(self, name: str, folder: Path, device: str | None, compute: str) -> None:
        self._model = TransformersBackbone(name, folder, device, compute)
        if not self._model.shows_parts:
            raise UserError(
                f"backbone {name!r}: {folder} gives no tokens of a picture's parts; take a vision"
                " encoder such as microsoft/resnet-50"
            )
        self.width = self._model.token_dim(TOKENS, "image")
        self.batch_size = self._model.batch_size
        self.checkpoint = self._model.checkpoint
        self.libraries = self._model.libraries
        self.input_size = self._model.input_size
        self.image = self._model.image

    def describe(self) -> str:
        """Name the steps for a table's provenance."""
        return f"{self._model.preprocessing('image')}; tokens of its last layer"

    def parts(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Show the parts: cells of a grid, or patches."""
        parts_BVD = self._model.parts(images)
        shape = parts_BVD.shape[:2]
        return parts_BVD, torch.ones(shape, dtype=torch.long, device=parts_BVD.device)


class VisualBert(Joint):
    """VisualBERT over a frozen model of pictures; tokens of a pair: the text's, the picture's.

    Args:
        name: Of the backbone; what follows ``@`` chooses the pooling.
        folder: Of VisualBERT's checkpoint.
        device: Where both run; none: chosen.
        compute: ``float32`` or ``bfloat16``.
        vision: Folder of a vision encoder of transformers, or file of the weights of torchvision's
            detector.
        words: Folder of the tokenizer, which VisualBERT's own checkpoints lack.

    Raises:
        UserError: A folder cannot be loaded, or the two do not fit.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        device: str | None,
        compute: str,
        *,
        vision: Path,
        words: Path | None = None,
    ) -> None:
        self._vocabulary = words or folder
        if vision.is_dir():
            self._eyes: PartEncoder = Parts(f"{name} (its pictures)", vision, device, compute)
        else:
            from pipeline.backbones.detector import Regions

            with loading(name, vision):
                self._eyes = Regions(vision, torch_utils.choose_backbone_device(device))
        super().__init__(name, folder, device, compute)
        self.libraries = {**self._eyes.libraries, **self.libraries}
        self.batch_size = self._eyes.batch_size

    def _load(self, folder: Path) -> None:
        config = read_config(folder)
        width = self._eyes.width
        if width != config.visual_embedding_dim:
            raise ValueError(
                f"it takes parts of width {config.visual_embedding_dim}, and those of its pictures"
                f" have {width}"
            )
        model, missing, checkpoint = load_model(folder, config, self._device)
        self._model = model
        self._need_pooler(missing)
        both = f"{checkpoint} {self._eyes.checkpoint}".encode()
        self.checkpoint = hashlib.sha256(both).hexdigest()[:16]
        self._words = TextInput(self._vocabulary, model, config, self._device)

    def _find(self, probe: InputBatch) -> dict[str, HiddenStates]:
        depth = self._model.config.num_hidden_layers
        return {"joint": HiddenStates(self._model, depth, self._model, self._inputs(probe))}

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        ids_BT, mask_BT = self._words.batch(batch.texts)
        parts_BVD, mask_BV = self._eyes.parts(batch.images)
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "visual_embeds": parts_BVD,
            "visual_attention_mask": mask_BV,
        }

    def _masks(self, batch: InputBatch, inputs: dict[str, Any], width: int) -> torch.Tensor:
        return torch.cat([inputs["attention_mask"], inputs["visual_attention_mask"]], dim=1)

    @property
    def input_size(self) -> int | None:
        """Pixels of the side that pictures are resized to."""
        return self._eyes.input_size

    def preprocessing(self, modality: str) -> str:
        """Say what both checkpoints do."""
        return f"{self._eyes.describe()} ({self._eyes.checkpoint}); {self._words.describe()}"

    def image(self, picture: Image.Image) -> Any:
        """Do what the model of pictures does before it looks."""
        return self._eyes.image(picture)
