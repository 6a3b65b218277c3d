"""VisualBERT: a BERT that reads a text and then attends to features of the parts of an image.

The parts come from a frozen model of images: the cells of a ResNet's last grid, the patches of a
vision transformer after its blocks or before them, or the regions that a detector finds. They are
as wide as VisualBERT's projection takes them (Li et al., "VisualBERT: a Simple and Performant
Baseline for Vision and Language", 2019).

Legend: B inputs of a batch, T tokens of a text, V parts of an image, D width of the embedding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from features.errors import UserError
from pipeline.backbones import torch_utils
from pipeline.backbones.base import TOKENS, InputBatch
from pipeline.backbones.hidden_states import HiddenStates, of_transformers
from pipeline.backbones.joint import JointBackbone
from pipeline.backbones.processors import TextInput
from pipeline.backbones.transformers import TransformersBackbone
from pipeline.backbones.transformers_loading import load_model, loading, read_config


class PartEncoder(Protocol):
    """A frozen model that encodes the parts of images."""

    width: int
    """D of a part."""
    batch_size: int
    """Number of images of a forward pass that suits the device and the size of an image."""
    checkpoint: str
    libraries: dict[str, str]
    input_size: int | None

    def describe(self) -> str:
        """Describe the steps for the provenance of a table."""
        ...

    def image(self, image: Image.Image) -> Any:
        """Prepare one RGB image; several threads call this at once."""
        ...

    def parts(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prepared images to parts (B, V, D) and the mask (B, V), 0 for padding."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSource:
    """The frozen model of images, and what it gives for an image."""

    path: Path | None = None
    """Folder of a vision encoder of transformers, or the file with the weights of torchvision's
    detector. None takes ``vision`` or ``detector.pth`` in the folder of VisualBERT."""
    level: str = TOKENS
    """Level of a vision encoder: ``tokens`` of the last layer, or ``layer-K``."""
    regions: int | None = None
    """Most regions of an image. None takes the detector's default."""


_OWN_PARTS = PartSource()


class TransformersPartEncoder:
    """The tokens of a vision encoder of transformers, without the class token.

    Args:
        name: Name of the backbone, for messages.
        folder: Folder of the vision encoder, or of a model with one such as CLIP.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.
        level: ``tokens`` for those of the last layer, or ``layer-K``.

    Raises:
        UserError: The folder cannot be loaded, or the model has no tokens of parts.
    """

    def __init__(
        self, name: str, folder: Path, device: str | None, compute: str, level: str = TOKENS
    ) -> None:
        self._model = TransformersBackbone(name, folder, device, compute)
        self._level = level
        if not self._model.has_parts:
            raise UserError(
                f"backbone {name!r}: {folder} gives no tokens of an image's parts; take a vision"
                " encoder such as microsoft/resnet-50"
            )
        self.width = self._model.token_dim(level, "image")
        self.batch_size = self._model.batch_size
        self.checkpoint = self._model.checkpoint
        self.libraries = self._model.libraries
        self.input_size = self._model.input_size
        self.image = self._model.image

    def describe(self) -> str:
        """Describe the steps for the provenance of a table."""
        parts = "tokens of its last layer"
        if self._level != TOKENS:
            parts = self._model.pooling("image", self._level)
        return f"{self._model.preprocessing('image')}; {parts}"

    def parts(self, images: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode prepared images to the cells of a grid, or to patches; none is padding."""
        parts_BVD = self._model.parts(images, self._level)
        mask_BV = torch.ones(parts_BVD.shape[:2], dtype=torch.long, device=parts_BVD.device)
        return parts_BVD, mask_BV


class VisualBert(JointBackbone):
    """VisualBERT over a frozen model of images; the tokens of a pair are the text's, the image's.

    Args:
        name: Name of the backbone; the part after ``@`` chooses the pooling.
        folder: Folder of VisualBERT's checkpoint.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.
        parts: The model of images.
        tokenizer: Folder of the tokenizer, which VisualBERT's own checkpoints lack. None takes
            the checkpoint's folder.

    Raises:
        UserError: A folder cannot be loaded, or the two models do not fit together.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        device: str | None,
        compute: str,
        *,
        parts: PartSource = _OWN_PARTS,
        tokenizer: Path | None = None,
    ) -> None:
        vision = parts.path or _vision_in(name, folder)
        self._tokenizer_folder = tokenizer or folder
        if vision.is_dir():
            self._part_encoder: PartEncoder = TransformersPartEncoder(
                f"{name} (its images)", vision, device, compute, parts.level
            )
        else:
            from pipeline.backbones.detector import MAX_REGIONS, RegionEncoder

            with loading(name, vision):
                chosen = torch_utils.choose_backbone_device(device)
                self._part_encoder = RegionEncoder(vision, chosen, parts.regions or MAX_REGIONS)
        super().__init__(name, folder, device, compute)
        self.libraries = {**self._part_encoder.libraries, **self.libraries}
        # A resized image may take 13 MB, and several batches wait in memory.
        self.batch_size = self._part_encoder.batch_size

    def _load(self, folder: Path) -> None:
        config = read_config(folder)
        width = self._part_encoder.width
        if width != config.visual_embedding_dim:
            raise ValueError(
                f"it takes parts of width {config.visual_embedding_dim}, and those of its images"
                f" have width {width}"
            )
        model, missing, checkpoint = load_model(folder, config, self._device)
        self._model = model
        self.source = {
            "library": "transformers",
            "folder": str(folder.absolute()),
            "checkpoint": checkpoint,
        }
        self._need_pooler(missing)
        both = f"{checkpoint} {self._part_encoder.checkpoint}".encode()
        self.checkpoint = hashlib.sha256(both).hexdigest()[:16]
        self._text_input = TextInput(self._tokenizer_folder, model, config, self._device)
        self.input_size = self._part_encoder.input_size

    def image_preprocessing(self) -> str:
        """Describe the preparation of an image, and the model of its parts."""
        return f"{self._part_encoder.describe()} ({self._part_encoder.checkpoint})"

    def image(self, image: Image.Image) -> Any:
        """Prepare one image for the model of its parts."""
        return self._part_encoder.image(image)

    def _find_encoders(self, probe: InputBatch) -> dict[str, HiddenStates]:
        depth, inputs = self._model.config.num_hidden_layers, self._inputs(probe)
        return {"joint": of_transformers(self._model, depth, self._model, inputs)}

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        ids_BT, mask_BT = self._text_input.batch(batch.texts)
        parts_BVD, mask_BV = self._part_encoder.parts(batch.images)
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "visual_embeds": parts_BVD,
            "visual_attention_mask": mask_BV,
        }

    def _token_mask(self, batch: InputBatch, inputs: dict[str, Any], width: int) -> torch.Tensor:
        return torch.cat([inputs["attention_mask"], inputs["visual_attention_mask"]], dim=1)


def _vision_in(name: str, folder: Path) -> Path:
    """Return the model of images in a local folder of VisualBERT."""
    for path in (folder / "vision", folder / "detector.pth"):
        if path.exists():
            return path
    raise UserError(
        f"backbone {name!r}: {folder} holds no folder 'vision' with a vision encoder, such"
        " as microsoft/resnet-50, and no 'detector.pth'; put one there"
    )
