"""Any transformers checkpoint that gives one vector: text encoders, vision encoders, CLIP-likes.

Texts are pooled as the checkpoint's folder says (:mod:`pipeline.backbones.sentence_pooling`).
Images are pooled by the model's own pooling if that has no weights: a head is often missing in a
checkpoint and would be random. Otherwise they are pooled by the class token, or else by the mean.
``NAME@cls``, ``NAME@mean`` and ``NAME@own`` choose.

Legend: B inputs of a batch, T tokens, D width of the embedding, CHW a picture's planes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from features.checkpoint_fingerprint import fingerprint, quiet_transformers, stored_config
from features.errors import UserError
from pipeline.backbones import patch_masking, torch_utils
from pipeline.backbones.base import POOLED, TOKENS, InputBatch, TokenIds, Vectors, split_pooling
from pipeline.backbones.hidden_states import HiddenStates
from pipeline.backbones.processors import OWN_CODE, PictureInput, TextInput
from pipeline.backbones.sentence_pooling import recipe
from pipeline.media.errors import one_line

_HEADS = ("pooler", "mask_token", "position_ids")  # may be missing: they are not used
_OWN = "the model's own pooling"
_GREY = Image.new("RGB", (64, 64), "grey")


class TransformersBackbone:
    """One transformers model out of a folder in its library's own format.

    Args:
        name: Of the backbone; what follows ``@`` chooses the pooling.
        folder: Of the checkpoint.
        device: Where it runs; none: chosen.
        compute: ``float32`` or ``bfloat16``.
        mask: The part of the patches that a masked autoencoder does not see.

    Raises:
        UserError: The folder cannot be loaded, lacks weights, holds another kind of model, or one
            without the pooling that the name asks for.
    """

    def __init__(
        self, name: str, folder: Path, device: str | None, compute: str, *, mask: float = 0.0
    ) -> None:
        self.name = name
        self.compute = compute
        self.libraries = libraries()
        self._asked = split_pooling(name)[1]
        self._mask = mask
        self._device = torch_utils.choose_backbone_device(device)
        self.batch_size = torch_utils.batch_size(self._device)
        self.input_size: int | None = None
        self._vision: HiddenStates | None = None
        self._text: HiddenStates | None = None
        with loading(name, folder):
            self._recipe = recipe(name, folder, self._asked)
            self._load(folder / self._recipe.folder)

    def _load(self, folder: Path) -> None:
        config = read_config(folder)
        if hasattr(config, "mask_ratio"):
            config.mask_ratio = self._mask
        model, missing, self.checkpoint = load_model(folder, config, self._device)
        self.source = {"library": "transformers", "folder": str(folder.absolute())}
        self._model: Any = model
        self._missing = missing
        self._both = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
        if self._both and self._asked not in (None, "own"):
            self._refuse("a model of two towers has a pooling of its own", "own")
        self.modalities: tuple[str, ...] = ()
        dims = set()
        if self._both or model.main_input_name == "pixel_values":
            self.modalities += ("image", "video")
            self._pictures = PictureInput(folder, self._device)
            self.input_size = self._pictures.size
            self._vision = self._tower("vision", self._pixels([self.image(_GREY)]))
            self._vision_pooling = self._choose_vision_pooling()
            dims.add(self.embed(InputBatch(images=[self.image(_GREY)])).shape[1])
        if self._both or model.main_input_name == "input_ids":
            self.modalities += ("text",)
            text_config = getattr(config, "text_config", config)
            self._words = TextInput(
                folder, model, text_config, self._device,
                most=self._recipe.max_tokens, lower=self._recipe.lower, prompt=self._recipe.prompt,
            )  # fmt: skip
            self._text = self._tower("text", self._ids(self.texts(["a"])))
            if self._recipe.mode == "own" and not self._both:
                if getattr(model, "pooler", None) is None:
                    self._refuse("its model has no pooling of its own", "cls or mean")
                self._need_pooler()
            dims.add(self.embed(InputBatch(texts=self.texts(["a"]))).shape[1])
        if self._both:
            self.modalities += ("joint",)
        if len(dims) != 1:
            raise ValueError(f"a {config.model_type} model gives no single vector of one input")
        self.dim = int(dims.pop())

    def _tower(self, side: str, probe: dict[str, Any]) -> HiddenStates | None:
        """Find an encoder of the model; none where two towers are not called as usual."""
        if not self._both:
            depth = getattr(self._model.config, "num_hidden_layers", 0)
            return HiddenStates(self._model, depth, self._model, probe)
        module = getattr(self._model, f"{side}_model", None)
        config = getattr(self._model.config, f"{side}_config", None)
        if module is None or config is None:
            return None
        return HiddenStates(module, getattr(config, "num_hidden_layers", 0), module, probe)

    def _choose_vision_pooling(self) -> str:
        if self._both:
            return "image features"
        pooler = getattr(self._model, "pooler", None)
        learned = pooler is not None and any(True for _ in pooler.parameters())
        with torch.inference_mode():
            output = self._model(**self._pixels([self.image(_GREY)]))
        pools = getattr(output, "pooler_output", None) is not None
        names = [key.rpartition(".")[2] for key, _ in self._model.named_parameters()]
        classed = "cls_token" in names
        registers = int(getattr(self._model.config, "num_register_tokens", 0) or 0)
        # DeiT has a second token beside the class token.
        self._prefix = classed + ("distillation_token" in names) + registers
        if self._asked == "own" and not pools:
            self._refuse("its model has no pooling of its own", "cls or mean")
        if self._asked == "own" and learned:
            self._need_pooler()
        if self._asked == "cls" and not classed:
            self._refuse("its model has no class token", "own or mean")
        if self._asked == "own" or (self._asked is None and pools and not learned):
            return _OWN
        wanted = self._asked or ("cls" if classed else "mean")
        return "class token" if wanted == "cls" else "mean of the tokens of the patches"

    def _need_pooler(self) -> None:
        if any("pooler" in key for key in self._missing):
            self._refuse("its checkpoint has no weights of the model's pooler", "cls or mean")

    def _refuse(self, why: str, instead: str) -> None:
        raise UserError(
            f"backbone {self.name!r}: {why}; after the @ give {instead}, or leave it out"
        )

    # -- the contract -----------------------------------------------------------------------

    @property
    def blocks(self) -> int:
        """Blocks of the deepest tower that can be cut."""
        return max((tower.depth for tower in (self._vision, self._text) if tower), default=0)

    def _of(self, modality: str) -> HiddenStates | None:
        return {"image": self._vision, "text": self._text}.get(modality)

    def levels(self, modality: str) -> tuple[str, ...]:
        """Name what can be had of a modality."""
        tower = self._of(modality)
        return tower.levels if tower else (POOLED,)

    def token_dim(self, level: str, modality: str) -> int:
        """D of one token."""
        tower = self._of(modality)
        assert tower is not None
        return tower.dim(level)

    def preprocessing(self, modality: str) -> str:
        """Say what the checkpoint's own processor or tokenizer does."""
        if modality == "text":
            return self._words.describe()
        if modality == "joint":
            return f"{self._pictures.describe()}; {self._words.describe()}"
        seen = self._pictures.describe()
        if self._mask:
            return f"{seen}; {self._mask:.0%} of the patches masked, chosen by the picture's bytes"
        return seen

    def pooling(self, modality: str, level: str = POOLED) -> str:
        """Say how one vector is made of the last layer, or what the tokens are."""
        tower = self._of(modality)
        if level != POOLED and tower is not None:
            return tower.describe(level)
        if modality == "joint":
            return torch_utils.UNIT_MEAN
        if modality != "text":
            return self._vision_pooling
        return "text features" if self._both else self._recipe.describe()

    def image(self, picture: Image.Image) -> Any:
        """Do what the checkpoint's image processor does: 8-bit pixels, or (C, H, W) float32."""
        return self._pictures.prepare(picture)

    def texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Run the checkpoint's tokenizer, without padding unless the model was trained on it."""
        return self._words.prepare(texts)

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
            if batch.modality == "text":
                assert self._text is not None
                lengths = self._words.lengths(batch.texts)
                return self._text.tokens(level, self._ids(batch.texts), lengths)
            assert self._vision is not None
            return self._vision.tokens(level, self._pixels(batch.images))

    @property
    def shows_parts(self) -> bool:
        """Whether :meth:`parts` can be had."""
        return self._vision is not None and not self._both

    def parts(self, images: Sequence[Any]) -> torch.Tensor:
        """Give the last layer's tokens of a picture's patches or cells alone: (B, V, D)."""
        assert self._vision is not None
        hidden = self._vision.hidden(TOKENS, self._pixels(images))
        if hidden.ndim == 4:
            return hidden.flatten(2).transpose(1, 2)
        return hidden[:, self._prefix :]

    def _pixels(self, images: Sequence[Any]) -> dict[str, Any]:
        """Arguments of a forward pass."""
        inputs: dict[str, Any] = {"pixel_values": self._pictures.batch(images)}
        if hasattr(self._model.config, "mask_ratio"):
            patches = self._model.embeddings.patch_embeddings.num_patches
            noise_BL = patch_masking.noise(images, patches, self._mask)
            inputs["noise"] = torch_utils.send(noise_BL, self._device)
        return inputs

    def _ids(self, texts: Sequence[TokenIds]) -> dict[str, Any]:
        ids_BT, mask_BT = self._words.batch(texts)
        return {"input_ids": ids_BT} | ({} if mask_BT is None else {"attention_mask": mask_BT})

    def _read(self, texts: Sequence[TokenIds]) -> torch.Tensor:
        inputs = self._ids(texts)
        if self._both:
            return _vector(self._model.get_text_features(**inputs))
        output = self._model(**inputs)
        if self._recipe.mode == "own":
            return _vector(output)
        return self._recipe.pool(output.last_hidden_state, inputs["attention_mask"])

    def _see(self, images: Sequence[Any]) -> torch.Tensor:
        inputs = self._pixels(images)
        if self._both:
            return _vector(self._model.get_image_features(**inputs))
        output: Any = self._model(**inputs)
        if self._vision_pooling == _OWN:
            return _vector(output).flatten(1)
        hidden_BTD: torch.Tensor = output.last_hidden_state.float()
        if hidden_BTD.ndim == 4:
            return hidden_BTD.flatten(2).mean(2)
        if self._vision_pooling == "class token":
            return hidden_BTD[:, 0]
        return hidden_BTD[:, self._prefix :].mean(1)


def libraries() -> dict[str, str]:
    """Versions of the libraries that do the work."""
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def read_config(folder: Path) -> Any:
    """Read a checkpoint's configuration.

    Raises:
        ValueError: It is of an encoder-decoder.
    """
    config = transformers.AutoConfig.from_pretrained(folder, **OWN_CODE)
    if config.is_encoder_decoder:
        raise ValueError("an encoder-decoder gives no single vector")
    return config


def load_model(
    folder: Path, config: Any, device: torch.device
) -> tuple[torch.nn.Module, list[str], str]:
    """Load the weights in float32, frozen, onto the device.

    Returns:
        The model, the names of heads that the checkpoint lacks, and the fingerprint.

    Raises:
        ValueError: Weights are missing that a vector depends on.
    """
    model, found = transformers.AutoModel.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True, **OWN_CODE
    )
    missing = list(found["missing_keys"])
    lost = [key for key in missing if not any(head in key for head in _HEADS)]
    if lost:
        raise ValueError(f"{len(lost)} weights are missing, such as {min(lost)}")
    checkpoint = fingerprint(model.state_dict(), stored_config(folder), missing)
    torch_utils.ready(model, device)
    return model, missing, checkpoint


def _vector(output: Any) -> torch.Tensor:
    found = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert isinstance(found, torch.Tensor)
    return found


@contextmanager
def loading(name: str, folder: Path) -> Iterator[None]:
    """Keep the library quiet_transformers, and make one line of whatever it stumbles over."""
    try:
        with quiet_transformers():
            yield
    except UserError:
        raise
    except Exception as error:  # whatever is wrong with a checkpoint, it is not ours
        raise UserError(
            f"backbone {name!r}: transformers cannot load {folder} ({one_line(error)})"
        ) from None
