"""VisualBERT: a BERT that reads a text and then looks at features of a picture's parts.

The parts come from a frozen encoder of pictures: the cells of a ResNet's last grid, or the patches
of a vision transformer, as wide as VisualBERT's projection takes them (Li et al., "VisualBERT: a
Simple and Performant Baseline for Vision and Language", 2019).

Legend: B inputs of a batch, T tokens of a text, V parts of a picture, D width of the embedding.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline.backends.contract import TOKENS, Batch
from pipeline.backends.hf import Transformer, load_model, read_config
from pipeline.backends.inputs import TextInput
from pipeline.backends.joint import Joint
from pipeline.backends.towers import Tower


class VisualBert(Joint):
    """VisualBERT over a frozen encoder of pictures; tokens of a pair: the text's, the picture's.

    Args:
        name: Of the backbone; what follows ``@`` chooses the pooling.
        folder: Of VisualBERT's checkpoint.
        device: Where both run; none: chosen.
        compute: ``float32`` or ``bfloat16``.
        vision: Folder of the encoder of pictures.
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
        self._eyes = Transformer(f"{name} (its pictures)", vision, device, compute)
        self._vocabulary = words or folder
        super().__init__(name, folder, device, compute)

    def _load(self, folder: Path) -> None:
        config = read_config(folder)
        if not self._eyes.shows_parts:
            raise ValueError("what looks at its pictures gives no tokens of their parts")
        width = self._eyes.token_dim(TOKENS, "image")
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

    def _find(self, probe: Batch) -> dict[str, Tower]:
        depth = self._model.config.num_hidden_layers
        return {"joint": Tower(self._model, depth, self._model, self._inputs(probe))}

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        ids_BT, mask_BT = self._words.batch(batch.texts)
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "visual_embeds": self._eyes.parts(batch.images),
        }

    def _masks(self, batch: Batch, inputs: dict[str, Any], width: int) -> torch.Tensor:
        mask_BT: torch.Tensor = inputs["attention_mask"]
        return torch.nn.functional.pad(mask_BT, (0, width - mask_BT.shape[1]), value=1)

    @property
    def input_size(self) -> int | None:
        """Pixels of the side that pictures are resized to."""
        return self._eyes.input_size

    def preprocessing(self, modality: str) -> str:
        """Say what both checkpoints do."""
        seen = self._eyes.preprocessing("image")
        return f"{seen}; {self._eyes.checkpoint} shows the parts; {self._words.describe()}"

    def image(self, picture: Image.Image) -> Any:
        """Do what the image processor of the encoder of pictures does."""
        return self._eyes.image(picture)
