"""Any transformers checkpoint that gives one vector: text encoders, vision encoders, CLIP-likes.

Texts are pooled as the checkpoint's folder says (:mod:`pipeline.backends.sentence`). Pictures are
pooled by the model's own pooling when that has no weights, since a head is often missing in a
checkpoint and would be random; else by the class token, else by the mean.

Legend: B inputs of a batch, T tokens, D width of the embedding, CHW a picture's planes.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from features.errors import UserError
from pipeline.backends import torched
from pipeline.backends.contract import Batch, Tokens, Vectors
from pipeline.backends.pixels import of_processor
from pipeline.backends.sentence import recipe
from pipeline.media import one_line

_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
_HEADS = ("pooler", "mask_token", "position_ids")  # may be missing: they are not used
_SIZES = ("size", "crop_size", "resample", "do_center_crop", "image_mean", "image_std")
_OWN_CODE: dict[str, Any] = {"trust_remote_code": False}  # left out, the user would be asked
_MAX_TOKENS = 512  # where neither tokenizer nor model knows a limit


class Transformer:
    """One transformers model out of a folder in its library's own format.

    Raises:
        UserError: The folder cannot be loaded, lacks weights, or holds another kind of model.
    """

    def __init__(self, name: str, folder: Path, device: str | None, compute: str) -> None:
        self.name = name
        self.compute = compute
        self.libraries = {"torch": torch.__version__, "transformers": transformers.__version__}
        self._device = torched.choose_device(device)
        self.batch_size = torched.batch_size(self._device)
        with _loading(name, folder):
            self._recipe = recipe(name, folder)
            self._load(folder / self._recipe.folder)

    def _load(self, folder: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(folder, **_OWN_CODE)
        if config.is_encoder_decoder:
            raise ValueError("an encoder-decoder gives no single vector")
        model, found = transformers.AutoModel.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, **_OWN_CODE
        )
        lost = [key for key in found["missing_keys"] if not any(head in key for head in _HEADS)]
        if lost:
            raise ValueError(f"{len(lost)} weights are missing, such as {min(lost)}")
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = {key: value for key, value in stored.items() if key not in _VOLATILE}
        self.checkpoint = torched.fingerprint(model, kept)
        torched.ready(model, self._device)
        self._model: Any = model
        self._both = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
        self.modalities: tuple[str, ...] = ()
        dims = set()
        if self._both or model.main_input_name == "pixel_values":
            self.modalities += ("image", "video")
            self._processor: Any = _image_processor(folder)
            self._pixels = of_processor(self._processor, self._device)
            self._vision_pooling = self._choose_vision_pooling()
            grey = self.image(Image.new("RGB", (64, 64), "grey"))
            dims.add(self.embed(Batch(images=[grey])).shape[1])
        if self._both or model.main_input_name == "input_ids":
            self.modalities += ("text",)
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **_OWN_CODE)
            if len(self._tokenizer) <= len(self._tokenizer.all_special_ids):
                raise ValueError("its tokenizer has no vocabulary")
            text_config = getattr(config, "text_config", config)
            self._pad = self._tokenizer.pad_token_id or 0
            self._max_tokens = self._limit(text_config)
            # SigLIP's text towers were trained on padded texts, without a mask.
            self._full = "siglip" in config.model_type
            vocabulary = json.dumps(self._tokenizer.get_vocab(), sort_keys=True).encode()
            self._vocabulary = hashlib.sha256(vocabulary).hexdigest()[:8]
            dims.add(self.embed(Batch(texts=self.texts(["a"]))).shape[1])
        if len(dims) != 1:
            raise ValueError(f"a {config.model_type} model gives no single vector of one input")
        self.dim = int(dims.pop())

    def _limit(self, config: Any) -> int:
        """The most tokens that tokenizer, positions and sentence recipe allow."""
        limits = [self._recipe.max_tokens or _MAX_TOKENS]
        if self._recipe.max_tokens is None and self._tokenizer.model_max_length < 1 << 20:
            limits = [self._tokenizer.model_max_length]
        positions = getattr(config, "max_position_embeddings", None)
        if positions:
            # RoBERTa and its kin count positions from behind the padding's own.
            used = [
                module.padding_idx + 1
                for key, module in self._model.named_modules()
                if key.endswith("position_embeddings")
                and getattr(module, "padding_idx", None) is not None
            ]
            limits.append(positions - max(used, default=0))
        return int(min(limits))

    def _choose_vision_pooling(self) -> str:
        if self._both:
            return "image features"
        pooler = getattr(self._model, "pooler", None)
        learned = pooler is not None and any(True for _ in pooler.parameters())
        with torch.inference_mode():
            pixels_1CHW = self._stack([self.image(Image.new("RGB", (64, 64)))])
            output = self._model(pixel_values=pixels_1CHW)
        if not learned and getattr(output, "pooler_output", None) is not None:
            return "the model's own pooling"
        names = (key for key, _ in self._model.named_parameters())
        return "class token" if any("cls_token" in key for key in names) else "mean of the tokens"

    # -- the contract -----------------------------------------------------------------------

    def preprocessing(self, modality: str) -> str:
        """Say what the checkpoint's own processor or tokenizer does."""
        if modality == "text":
            lower = "lower case, " if self._recipe.lower else ""
            kind = type(self._tokenizer).__name__
            return f"{lower}{kind} {self._vocabulary}, at most {self._max_tokens} tokens"
        known = self._processor.to_dict()
        sizes = {key: known[key] for key in _SIZES if known.get(key) is not None}
        return f"{type(self._processor).__name__} {json.dumps(sizes, sort_keys=True, default=str)}"

    def pooling(self, modality: str) -> str:
        """Say how one vector is made of the last layer."""
        if modality != "text":
            return self._vision_pooling
        return "text features" if self._both else self._recipe.describe()

    def image(self, picture: Image.Image) -> Any:
        """Do what the checkpoint's image processor does: 8-bit pixels, or (C, H, W) float32."""
        if self._pixels is not None:
            return self._pixels.prepare(picture)
        pixels_1CHW = self._processor(images=picture, return_tensors="pt")["pixel_values"]
        assert len(pixels_1CHW) == 1
        return torch.as_tensor(pixels_1CHW[0])

    def texts(self, texts: Sequence[str]) -> list[Tokens]:
        """Run the checkpoint's tokenizer, without padding."""
        given = [text.lower() for text in texts] if self._recipe.lower else list(texts)
        ids = self._tokenizer(
            given, truncation=True, max_length=self._max_tokens, return_attention_mask=False
        )["input_ids"]
        if self._full:
            ids = [row + [self._pad] * (self._max_tokens - len(row)) for row in ids]
        return [np.asarray(row, dtype=np.int64) for row in ids]

    def embed(self, batch: Batch) -> Vectors:
        """Encode a batch: (B, D) float32."""
        with torched.forward(self._device, self.compute):
            if len(batch.texts):
                return torched.to_numpy(self._read(batch.texts))
            return torched.to_numpy(self._see(self._stack(batch.images)))

    def _stack(self, images: Sequence[Any]) -> torch.Tensor:
        if self._pixels is not None:
            return self._pixels.batch(images)
        return torch.stack(list(images)).to(self._device)

    def _read(self, texts: Sequence[Tokens]) -> torch.Tensor:
        ids_BT = torched.pad(texts, self._pad, self._device)
        if self._full:
            return _vector(self._model.get_text_features(input_ids=ids_BT))
        lengths_B1 = torch.tensor([[len(ids)] for ids in texts], device=self._device)
        mask_BT = (torch.arange(ids_BT.shape[1], device=self._device) < lengths_B1).long()
        if self._both:
            return _vector(self._model.get_text_features(input_ids=ids_BT, attention_mask=mask_BT))
        output = self._model(input_ids=ids_BT, attention_mask=mask_BT)
        return self._recipe.pool(output.last_hidden_state, mask_BT)

    def _see(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        if self._both:
            return _vector(self._model.get_image_features(pixel_values=pixels_BCHW))
        output: Any = self._model(pixel_values=pixels_BCHW)
        if self._vision_pooling == "the model's own pooling":
            return _vector(output).flatten(1)
        hidden_BTD: torch.Tensor = output.last_hidden_state.float()
        if self._vision_pooling == "class token":
            return hidden_BTD[:, 0]
        return hidden_BTD.mean(1)


def _image_processor(folder: Path) -> Any:
    return transformers.AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
        folder, **_OWN_CODE
    )


def _vector(output: Any) -> torch.Tensor:
    found = output if isinstance(output, torch.Tensor) else output.pooler_output
    assert isinstance(found, torch.Tensor)
    return found


@contextmanager
def _loading(name: str, folder: Path) -> Iterator[None]:
    """Keep the library quiet, and make one line of whatever it stumbles over."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    progress = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:  # whatever is wrong with a checkpoint, it is not ours
        raise UserError(
            f"backbone {name!r}: transformers cannot load {folder} ({one_line(error)})"
        ) from None
    finally:
        transformers.logging.set_verbosity(verbosity)
        if progress:
            transformers.logging.enable_progress_bar()  # type: ignore[no-untyped-call]
