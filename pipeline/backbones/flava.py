"""FLAVA: an encoder of images, one of texts, and one that sees both (Singh et al., 2022).

Legend: B inputs of a batch, T tokens, D width of the embedding.
"""

from typing import Any

import torch

from pipeline.backbones.base import InputBatch
from pipeline.backbones.hidden_states import HiddenStates, of_transformers
from pipeline.backbones.joint import JointBackbone


class Flava(JointBackbone):
    """FLAVA; the tokens of a pair are the joint class token, the image's and the text's."""

    modalities = ("image", "video", "text", "joint")

    def _find_encoders(self, probe: InputBatch) -> dict[str, HiddenStates]:
        model, config = self._model, self._model.config
        image, text = InputBatch(images=probe.images), InputBatch(texts=probe.texts)
        sides = {
            "image": (model.image_model, config.image_config, model.image_model, image),
            "text": (model.text_model, config.text_config, model.text_model, text),
            "joint": (model.multimodal_model, config.multimodal_config, self._run_all, probe),
        }
        return {
            modality: of_transformers(
                module, side_config.num_hidden_layers, run, self._inputs(batch)
            )
            for modality, (module, side_config, run, batch) in sides.items()
        }

    def _run_all(self, *, output_hidden_states: bool = False, **inputs: Any) -> Any:
        """Run all three encoders; the library returns the states of the first two only."""
        model = self._model
        images = model.image_model(pixel_values=inputs["pixel_values"], output_hidden_states=True)
        texts = model.text_model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            output_hidden_states=True,
        )
        # Like the library, from the states before the last norms of the two encoders.
        images_BTD = model.image_to_mm_projection(images.hidden_states[-1])
        texts_BTD = model.text_to_mm_projection(texts.hidden_states[-1])
        before_text = images_BTD.shape[1] + bool(model.multimodal_model.use_cls_token)
        mask_BT = torch.nn.functional.pad(inputs["attention_mask"], (before_text, 0), value=1)
        return model.multimodal_model(
            torch.cat([images_BTD, texts_BTD], dim=1),
            attention_mask=mask_BT,
            output_hidden_states=output_hidden_states,
        )

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if len(batch.images):
            inputs["pixel_values"] = self._image_input.batch(batch.images)
        if len(batch.texts):
            inputs["input_ids"], inputs["attention_mask"] = self._text_input.batch(batch.texts)
        return inputs

    def _token_mask(self, batch: InputBatch, inputs: dict[str, Any], width: int) -> torch.Tensor:
        if not len(batch.texts):
            return torch.ones((len(batch.images), width), device=self._device)
        mask_BT: torch.Tensor = inputs["attention_mask"]
        return torch.nn.functional.pad(mask_BT, (width - mask_BT.shape[1], 0), value=1)
