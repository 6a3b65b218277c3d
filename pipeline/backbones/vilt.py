"""ViLT: one encoder of a text's tokens and an image's patches (Kim et al., 2021).

Legend: B inputs of a batch, L patches of an image, D width of the embedding, CHW the planes of an
image.
"""

from typing import Any

import torch

from pipeline.backbones.base import InputBatch
from pipeline.backbones.hidden_states import HiddenStates, of_transformers
from pipeline.backbones.joint import JointBackbone

_LAST = torch.iinfo(torch.long).max  # sorts after all patches


class Vilt(JointBackbone):
    """ViLT; the tokens of a pair are the text's, the image's class token, and the patches.

    Images keep their shape, and the patches are in reading order.
    """

    mixes_sizes = True

    def _find_encoders(self, probe: InputBatch) -> dict[str, HiddenStates]:
        depth, inputs = self._model.config.num_hidden_layers, self._inputs(probe)
        return {"joint": of_transformers(self._model, depth, self._model, inputs)}

    def _inputs(self, batch: InputBatch) -> dict[str, Any]:
        ids_BT, mask_BT = self._text_input.batch(batch.texts)
        x_BCHW, mask_BHW = self._image_input.ragged(batch.images)
        # The library draws the order of the patches at random; here they are sorted again.
        embed = self._model.embeddings.visual_embed
        with torch.random.fork_rng(devices=[]):
            x_BLD, mask_BL, (place_BL2, (_, columns)) = embed(x_BCHW, mask_BHW, max_image_length=-1)
        place_BL = (place_BL2[..., 0] * columns + place_BL2[..., 1]).to(self._device)
        place_BL = torch.where(mask_BL[:, 1:] > 0, place_BL, _LAST)
        order_BL = torch.nn.functional.pad(place_BL.argsort(dim=1, stable=True) + 1, (1, 0))
        rows_B1 = torch.arange(len(order_BL), device=self._device).unsqueeze(1)
        return {
            "input_ids": ids_BT,
            "attention_mask": mask_BT,
            "image_embeds": x_BLD[rows_B1, order_BL],
            "pixel_mask": mask_BL[rows_B1, order_BL],
        }

    def _token_mask(self, batch: InputBatch, inputs: dict[str, Any], width: int) -> torch.Tensor:
        return torch.cat([inputs["attention_mask"], inputs["pixel_mask"]], dim=1)
