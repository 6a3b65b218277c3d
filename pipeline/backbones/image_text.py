"""Models that look at a picture and a text together: FLAVA and ViLT.

One vector of a pair is the class token of the encoder that sees both, after its last norm;
``NAME@mean`` takes the mean of all its tokens, ``NAME@own`` the model's pooler.

Legend: B inputs of a batch, T tokens, L patches, D width of the embedding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from features.errors import UserError
from pipeline.backbones import torch_utils
from pipeline.backbones.base import POOLED, InputBatch, TokenIds, Vectors, split_pooling
from pipeline.backbones.hidden_states import HiddenStates
from pipeline.backbones.processors import PictureInput, TextInput
from pipeline.backbones.transformers import libraries, load_model, loading, read_config

_GREY = Image.new("RGB", (64, 64), "grey")
_KEPT = torch.iinfo(torch.long).max


class Joint:
    """What these models have in common; the rest is in what they override.

    Args:
        name: Of the backbone; what follows ``@`` chooses the pooling.
        folder: Of the checkpoint.
        device: Where it runs; none: chosen.
        compute: ``float32`` or ``bfloat16``.

    Raises:
        UserError: The folder cannot be loaded, lacks weights, or has no pooler although asked for.
    """

    modalities: tuple[str, ...] = ("joint",)

    def __init__(self, name: str, folder: Path, device: str | None, compute: str) -> None:
        self.name = name
        self.compute = compute
        self.libraries = libraries()
        self._asked = split_pooling(name)[1] or "cls"
        self._device = torch_utils.choose_backbone_device(device)
        self.batch_size = torch_utils.batch_size(self._device)
        with loading(name, folder):
            self._load(folder)
            grey, word = self.image(_GREY), self.texts(["a"])[0]
            with torch.inference_mode():
                self._towers = self._find(InputBatch(images=[grey], texts=[word]))
                self.dim = self._towers["joint"].dim("tokens")

    def _load(self, folder: Path) -> None:
        config = read_config(folder)
        model, missing, self.checkpoint = load_model(folder, config, self._device)
        self._model: Any = model
        self._need_pooler(missing)
        self._pictures = PictureInput(folder, self._device)
        text_config = getattr(config, "text_config", config)
        self._words = TextInput(folder, model, text_config, self._device)

    def _need_pooler(self, missing: list[str]) -> None:
        if self._asked == "own" and any("pooler" in key for key in missing):
            raise UserError(
                f"backbone {self.name!r}: its checkpoint has no weights of the model's pooler;"
                " after the @ give cls or mean, or leave it out"
            )

    # -- what differs -----------------------------------------------------------------------

    def _find(self, probe: InputBatch) -> dict[str, HiddenStates]:
        """Find the towers by modality."""
        raise NotImplementedError

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        """Arguments of the tower's forward pass."""
        raise NotImplementedError

    def _masks(self, batch: InputBatch, inputs: dict[str, Any], width: int) -> torch.Tensor:
        """(B, T): which of the tower's tokens are no padding."""
        raise NotImplementedError

    # -- the contract -----------------------------------------------------------------------

    @property
    def input_size(self) -> int | None:
        """Pixels of the side that pictures are resized to."""
        return self._pictures.size

    @property
    def blocks(self) -> int:
        """Blocks of the deepest encoder."""
        return max(tower.depth for tower in self._towers.values())

    def levels(self, modality: str) -> tuple[str, ...]:
        """Name what can be had of a modality."""
        tower = self._towers.get(modality)
        return tower.levels if tower else (POOLED,)

    def token_dim(self, level: str, modality: str) -> int:
        """D of one token."""
        return self._towers[modality].dim(level)

    def preprocessing(self, modality: str) -> str:
        """Say what the checkpoint's own processor and tokenizer do."""
        seen, read = self._pictures.describe(), self._words.describe()
        return {"joint": f"{seen}; {read}", "text": read}.get(modality, seen)

    def pooling(self, modality: str, level: str = POOLED) -> str:
        """Say how one vector is made of the last layer, or what the tokens are."""
        if level != POOLED:
            return self._towers[modality].describe(level)
        what = {"cls": "class token", "mean": "mean of the tokens", "own": "the model's own pooler"}
        where = "the joint encoder" if modality == "joint" else f"the {modality} encoder"
        return f"{what[self._asked]} of {where}"

    def image(self, picture: Image.Image) -> Any:
        """Do what the checkpoint's image processor does."""
        return self._pictures.prepare(picture)

    def texts(self, texts: Sequence[str]) -> list[TokenIds]:
        """Run the checkpoint's tokenizer, without padding."""
        return self._words.prepare(texts)

    def embed(self, batch: InputBatch) -> Vectors:
        """Encode a batch: (B, D) float32."""
        tower = self._towers[batch.modality]
        with torch_utils.forward(self._device, self.compute):
            inputs = self._inputs(batch)
            output = tower.run(**inputs)
            if self._asked == "own":
                return torch_utils.to_numpy(output.pooler_output)
            hidden_BTD = output.last_hidden_state.float()
            if self._asked == "cls":
                return torch_utils.to_numpy(hidden_BTD[:, 0])
            mask_BT1 = self._masks(batch, inputs, hidden_BTD.shape[1]).unsqueeze(-1)
            return torch_utils.to_numpy((hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1))

    def tokens(self, batch: InputBatch, level: str) -> list[Vectors]:
        """Encode a batch to tokens: (T, D) float32 for each input."""
        tower = self._towers[batch.modality]
        with torch_utils.forward(self._device, self.compute):
            inputs = self._inputs(batch)
            hidden_BTD = tower.hidden(level, inputs)
            mask_BT = self._masks(batch, inputs, hidden_BTD.shape[1]).bool()
        home_BTD, kept_BT = torch_utils.to_numpy(hidden_BTD), mask_BT.cpu().numpy()
        return [home_TD[kept_T] for home_TD, kept_T in zip(home_BTD, kept_BT, strict=True)]


class Flava(Joint):
    """FLAVA (Singh et al., 2022): an encoder for pictures, one for texts, and one over both.

    Tokens of a pair: the joint class token, the picture's, the text's.
    """

    modalities: tuple[str, ...] = ("image", "video", "text", "joint")

    def _find(self, probe: InputBatch) -> dict[str, HiddenStates]:
        model = self._model
        depths = model.config
        image = InputBatch(images=probe.images)
        text = InputBatch(texts=probe.texts)
        return {
            "image": HiddenStates(
                model.image_model,
                depths.image_config.num_hidden_layers,
                model.image_model,
                self._inputs(image),
            ),
            "text": HiddenStates(
                model.text_model,
                depths.text_config.num_hidden_layers,
                model.text_model,
                self._inputs(text),
            ),
            "joint": HiddenStates(
                model.multimodal_model,
                depths.multimodal_config.num_hidden_layers,
                self._both,
                self._inputs(probe),
            ),
        }

    def _both(self, *, output_hidden_states: bool = False, **inputs: Any) -> Any:
        """Run all three encoders; the library lists the states of the first two only."""
        model = self._model
        seen = model.image_model(pixel_values=inputs["pixel_values"], output_hidden_states=True)
        read = model.text_model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
        )
        # As the library does, from the states before the encoders' last norm.
        seen_BTD = model.image_to_mm_projection(seen.hidden_states[-1])
        read_BTD = model.text_to_mm_projection(read.hidden_states[-1])
        before = seen_BTD.shape[1] + bool(model.multimodal_model.use_cls_token)
        mask_BT = torch.nn.functional.pad(inputs["attention_mask"], (before, 0), value=1)
        return model.multimodal_model(
            torch.cat([seen_BTD, read_BTD], dim=1),
            attention_mask=mask_BT,
            output_hidden_states=output_hidden_states,
        )

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if len(batch.images):
            inputs["pixel_values"] = self._pictures.batch(batch.images)
        if len(batch.texts):
            inputs["input_ids"], inputs["attention_mask"] = self._words.batch(batch.texts)
        return inputs

    def _masks(self, batch: InputBatch, inputs: dict[str, Any], width: int) -> torch.Tensor:
        if not len(batch.texts):
            return torch.ones((len(batch.images), width), device=self._device)
        mask_BT: torch.Tensor = inputs["attention_mask"]
        return torch.nn.functional.pad(mask_BT, (width - mask_BT.shape[1], 0), value=1)


class Vilt(Joint):
    """ViLT (Kim et al., 2021): one encoder over a text's tokens and a picture's patches.

    Pictures keep their shape; patches are taken in reading order. Tokens of a pair: the text's,
    the picture's class token, the patches.
    """

    def _find(self, probe: InputBatch) -> dict[str, HiddenStates]:
        depth = self._model.config.num_hidden_layers
        return {"joint": HiddenStates(self._model, depth, self._model, self._inputs(probe))}

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        ids_BT, mask_BT = self._words.batch(batch.texts)
        x_BCHW, mask_BHW = self._pictures.ragged(batch.images)
        # The library draws the order of the patches, and which padding follows them, at random.
        embed = self._model.embeddings.visual_embed
        with torch.random.fork_rng(devices=[]):
            x_BLD, mask_BL, (place_BL2, (_, wide)) = embed(x_BCHW, mask_BHW, max_image_length=-1)
        place_BL = (place_BL2[..., 0] * wide + place_BL2[..., 1]).to(self._device)
        place_BL = torch.where(mask_BL[:, 1:] > 0, place_BL, _KEPT)
        order_BL = torch.nn.functional.pad(place_BL.argsort(dim=1, stable=True) + 1, (1, 0))
        rows_B1 = torch.arange(len(order_BL), device=self._device).unsqueeze(1)
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "image_embeds": x_BLD[rows_B1, order_BL],
            "pixel_mask": mask_BL[rows_B1, order_BL],
        }

    def _masks(self, batch: InputBatch, inputs: dict[str, Any], width: int) -> torch.Tensor:
        return torch.cat([inputs["attention_mask"], inputs["pixel_mask"]], dim=1)
