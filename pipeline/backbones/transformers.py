"""Checkpoints of transformers with one encoder, or with one of images and one of texts.

Texts are pooled as the checkpoint's folder says (:mod:`pipeline.backbones.sentence_pooling`).
Images are pooled by the model's own pooling if it has no weights: many checkpoints lack the weights
of a head, which would then be random. Other models are pooled by the class token if there is one,
else by the mean. ``NAME@cls``, ``NAME@mean`` and ``NAME@own`` choose a pooling.

Legend: B inputs of a batch, T tokens, V parts of an image, D width of the embedding, CHW the planes
of an image.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from features.encoder_blocks import block_count, side_encoder
from features.errors import UserError
from pipeline.backbones import patch_masking, torch_utils
from pipeline.backbones.base import TOKENS, InputBatch, TokenIds, folder_files, split_pooling
from pipeline.backbones.hidden_states import of_transformers
from pipeline.backbones.processors import ImageInput, TextInput
from pipeline.backbones.sentence_pooling import read_pooling
from pipeline.backbones.torch_backbone import UNIT_MEAN, TorchBackbone
from pipeline.backbones.transformers_loading import libraries, load_model, loading, read_config

_OWN = "the model's own pooling"
_GREY = Image.new("RGB", (64, 64), "grey")
_WIDE = Image.new("RGB", (96, 64), "grey")


class TransformersBackbone(TorchBackbone):
    """A transformers model in a folder of its library's own format.

    Args:
        name: Name of the backbone; the part after ``@`` chooses the pooling.
        folder: Folder of the checkpoint.
        device: Device to run on; None chooses one.
        compute: ``float32`` or ``bfloat16``.
        mask_ratio: Share of the patches that a masked autoencoder does not see.

    Raises:
        UserError: The folder cannot be loaded, lacks weights, holds another kind of model, or one
            without the pooling that the name asks for.
    """

    def __init__(
        self, name: str, folder: Path, device: str | None, compute: str, *, mask_ratio: float = 0.0
    ) -> None:
        super().__init__(name, device, compute)
        self.libraries = libraries()
        self._asked = split_pooling(name)[1]
        self._mask_ratio = mask_ratio
        with loading(name, folder):
            self._text_pooling = read_pooling(name, folder, self._asked)
            self._load(folder / self._text_pooling.folder)
        self.weight_files = folder_files(folder)
        self.blocks = self._deepest()

    def _load(self, folder: Path) -> None:
        config = read_config(folder)
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = self._mask_ratio
        model, missing, self.checkpoint = load_model(folder, config, self._device)
        self.source = {"library": "transformers", "folder": str(folder.absolute())}
        self._model: Any = model
        self._missing = missing
        self._has_both = hasattr(model, "get_text_features") and hasattr(
            model, "get_image_features"
        )
        if self._has_both and self._asked not in (None, "own"):
            self._refuse("a model with two encoders has a pooling of its own", "own")
        self.modalities = ()
        dims = set()
        if self._has_both or model.main_input_name == "pixel_values":
            dims.add(self._load_image_side(folder))
        if self._has_both or model.main_input_name == "input_ids":
            dims.add(self._load_text_side(folder, config))
        if self._has_both:
            self.modalities += ("joint",)
        if len(dims) != 1:
            raise ValueError(f"a {config.model_type} model gives no single vector of one input")
        self.dim = dims.pop()

    def _load_image_side(self, folder: Path) -> int:
        """Prepare the encoding of images; return the width of a vector."""
        self.modalities += ("image", "video")
        self._image_input = ImageInput(folder, self._device)
        self.input_size = self._image_input.size
        probe = InputBatch(images=[self.image(_GREY)])
        self._note_image_size(probe)
        self._add_encoder("image", probe)
        self._image_pooling = self._choose_image_pooling(probe)
        return int(self.embed(probe).shape[1])

    def _note_image_size(self, probe: InputBatch) -> None:
        """Note the height and width of a prepared image in the source, if all images share them."""
        wide = InputBatch(images=[self.image(_WIDE)])
        sizes = [list(self._inputs(batch)["pixel_values"].shape[2:]) for batch in (probe, wide)]
        if sizes[0] == sizes[1]:
            self.source["image_size"] = sizes[0]

    def _load_text_side(self, folder: Path, config: Any) -> int:
        """Prepare the encoding of texts; return the width of a vector."""
        self.modalities += ("text",)
        pooling = self._text_pooling
        self._text_input = TextInput(
            folder,
            self._model,
            getattr(config, "text_config", config),
            self._device,
            max_tokens=pooling.max_tokens,
            lower=pooling.lower,
            prompt=pooling.prompt,
        )
        self.token_limit = self._text_input.token_limit
        probe = InputBatch(texts=self.texts(["a"]))
        self._add_encoder("text", probe)
        if pooling.mode == "own" and not self._has_both:
            if getattr(self._model, "pooler", None) is None:
                self._refuse("its model has no pooling of its own", "cls or mean")
            self._need_pooler()
        return int(self.embed(probe).shape[1])

    def _add_encoder(self, modality: str, probe: InputBatch) -> None:
        """Make the tokens of an encoder available, unless two encoders have unusual names."""
        encoder, config = self._model, self._model.config
        if self._has_both:
            side = side_encoder(self._model, modality)
            if side is None:
                return
            encoder, config = side
        depth = block_count(config)
        self._encoders[modality] = of_transformers(encoder, depth, encoder, self._inputs(probe))

    def _choose_image_pooling(self, probe: InputBatch) -> str:
        encoder = self._model
        if self._has_both:
            side = side_encoder(encoder, "image")
            encoder = encoder if side is None else side[0]
        names = [key.rpartition(".")[2] for key, _ in encoder.named_parameters()]
        has_class_token = "cls_token" in names or "class_embedding" in names
        registers = int(getattr(self._model.config, "num_register_tokens", 0) or 0)
        # DeiT has a distillation token after the class token.
        self._prefix_tokens = has_class_token + ("distillation_token" in names) + registers
        if self._has_both:
            return "image features"
        pooler = getattr(self._model, "pooler", None)
        has_weights = pooler is not None and any(True for _ in pooler.parameters())
        with torch.inference_mode():
            output = self._model(**self._inputs(probe))
        has_pooling = getattr(output, "pooler_output", None) is not None
        if self._asked == "own" and not has_pooling:
            self._refuse("its model has no pooling of its own", "cls or mean")
        if self._asked == "own" and has_weights:
            self._need_pooler()
        if self._asked == "cls" and not has_class_token:
            self._refuse("its model has no class token", "own or mean")
        if self._asked == "own" or (self._asked is None and has_pooling and not has_weights):
            return _OWN
        pooling = self._asked or ("cls" if has_class_token else "mean")
        return "class token" if pooling == "cls" else "mean of the tokens of the patches"

    def _need_pooler(self) -> None:
        if any("pooler" in key for key in self._missing):
            self._refuse("its checkpoint has no weights of the model's pooler", "cls or mean")

    def _refuse(self, reason: str, remedy: str) -> None:
        raise UserError(
            f"backbone {self.name!r}: {reason}; after the @ give {remedy}, or leave it out"
        )

    # -- the interface --------------------------------------------------------------------------

    def image_preprocessing(self) -> str:
        """Describe the checkpoint's image processor, and the masking of patches."""
        steps, ratio = self._image_input.describe(), self._mask_ratio
        if not ratio:
            return steps
        return f"{steps}; {ratio:.0%} of the patches masked, chosen by the picture's bytes"

    def text_preprocessing(self) -> str:
        """Describe the checkpoint's tokenizer."""
        return self._text_input.describe(self.max_tokens)

    def mask_patches(self, percent: int) -> None:
        """Encode images without a share of their patches, chosen by the bytes of the image."""
        if not hasattr(self._model.config, "mask_ratio"):
            super().mask_patches(percent)
        if self._mask_ratio or not 1 <= percent <= 99:
            masked = f" masks {self._mask_ratio:.0%} already and"
            raise UserError(
                f"backbone {self.name!r}{masked if self._mask_ratio else ''} cannot mask {percent}%"
                " of the patches; give mae-b, and --mask-ratio 0.01 to 0.99"
            )
        self._mask_ratio = percent / 100
        self._model.config.mask_ratio = self._mask_ratio
        self.name = f"{self.name}@mask-{percent}"

    def image(self, image: Image.Image) -> Any:
        """Run the checkpoint's image processor: 8-bit pixels, or (C, H, W) float32."""
        return self._image_input.prepare(image)

    def texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Run the checkpoint's tokenizer, without padding unless the model was trained on it."""
        return self._text_input.prepare(texts, self.max_tokens)

    @property
    def has_parts(self) -> bool:
        """True if :meth:`parts` is available."""
        return "image" in self._encoders

    def parts(self, images: Sequence[Any], level: str = TOKENS) -> torch.Tensor:
        """Encode images to the tokens of their patches or cells alone: (B, V, D).

        Args:
            images: Prepared images.
            level: ``tokens``, or ``layer-K``.
        """
        inputs = self._inputs(InputBatch(images=images))
        hidden = self._encoders["image"].hidden(level, inputs)
        if hidden.ndim == 4:
            return hidden.flatten(2).transpose(1, 2)
        return hidden[:, self._prefix_tokens :]

    # -- the forward pass -----------------------------------------------------------------------

    def _describe_pooling(self, modality: str) -> str:
        if modality == "joint":
            return UNIT_MEAN
        if modality != "text":
            return self._image_pooling
        return "text features" if self._has_both else self._text_pooling.describe()

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        if batch.modality == "text":
            ids_BT, mask_BT = self._text_input.batch(batch.texts)
            return {"input_ids": ids_BT} | ({} if mask_BT is None else {"attention_mask": mask_BT})
        inputs: dict[str, Any] = {"pixel_values": self._image_input.batch(batch.images)}
        if hasattr(self._model.config, "mask_ratio"):
            patches = self._model.embeddings.patch_embeddings.num_patches
            noise_BL = patch_masking.noise(batch.images, patches, self._mask_ratio)
            inputs["noise"] = torch_utils.send(noise_BL, self._device)
        return inputs

    def _lengths(self, batch: InputBatch) -> list[int] | None:
        return self._text_input.lengths(batch.texts) if batch.modality == "text" else None

    def _text_vectors(self, texts: Sequence[TokenIds]) -> torch.Tensor:
        inputs = self._inputs(InputBatch(texts=texts))
        if self._has_both:
            return _pooled(self._model.get_text_features(**inputs))
        output = self._model(**inputs)
        if self._text_pooling.mode == "own":
            return _pooled(output)
        return self._text_pooling.pool(output.last_hidden_state, inputs["attention_mask"])

    def _image_vectors(self, images: Sequence[Any]) -> torch.Tensor:
        inputs = self._inputs(InputBatch(images=images))
        if self._has_both:
            return _pooled(self._model.get_image_features(**inputs))
        output: Any = self._model(**inputs)
        if self._image_pooling == _OWN:
            return _pooled(output).flatten(1)
        hidden_BTD: torch.Tensor = output.last_hidden_state.float()
        if hidden_BTD.ndim == 4:
            return hidden_BTD.flatten(2).mean(2)
        if self._image_pooling == "class token":
            return hidden_BTD[:, 0]
        return hidden_BTD[:, self._prefix_tokens :].mean(1)


def _pooled(output: Any) -> torch.Tensor:
    """Return the pooled vectors of an output; older versions of a model return them alone."""
    vectors = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert isinstance(vectors, torch.Tensor)
    return vectors
