"""Text encoder of an open_clip model, at the length of a batch instead of the model's 77 tokens.

Legend: B inputs of a batch, T tokens, D width of the embedding.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class OpenClipTextEncoder(torch.nn.Module):
    """Encode texts without their padding where the padding cannot change a vector.

    Under a causal mask no token after the end token reaches it, so the position table and the mask
    are cut to the longest text of a batch. Encoders without a causal mask keep their full length.

    Args:
        model: The whole open_clip model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        encoder: Any = getattr(model, "text", model)
        self._prefix = "model.text." if encoder is not model else "model."
        pool = getattr(encoder, "text_pool_type", getattr(encoder, "pool_type", None))
        eos = getattr(encoder, "text_eos_id", getattr(encoder, "eos_id", None))
        self._end = {"argmax": None, "eos": eos}.get(str(pool), -1)
        mask = getattr(encoder, "attn_mask", None)
        has_class_token = getattr(encoder, "cls_emb", None) is not None
        self._mask = mask
        self._positions = getattr(encoder, "positional_embedding", None)
        self._trims = self._end != -1 and mask is not None and not has_class_token

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Encode (B, T) ids with the tables of the model, which :meth:`encode` replaces."""
        return self.model.encode_text(ids_BT)  # type: ignore[operator, no-any-return]

    @property
    def trims(self) -> bool:
        """True if texts are encoded without padding."""
        return self._trims

    def ends(self, ids_BT: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each text on which its vector depends: (B,)."""
        if not self._trims:
            return np.full(len(ids_BT), ids_BT.shape[1])
        marks_BT = ids_BT if self._end is None else ids_BT == self._end
        return np.asarray(marks_BT.argmax(axis=1) + 1)

    def encode(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Encode (B, T) ids to (B, D)."""
        length = ids_BT.shape[1]
        if not self._trims:
            return self.forward(ids_BT)
        assert self._mask is not None
        assert self._positions is not None
        shorter = {
            f"{self._prefix}positional_embedding": self._positions[:length],
            f"{self._prefix}attn_mask": self._mask[:length, :length],
        }
        vectors_BD: torch.Tensor = torch.func.functional_call(self, shorter, (ids_BT,))
        return vectors_BD
