"""The two towers of an open_clip model: where their tokens are, and the text tower cut short.

Legend: B inputs of a batch, T tokens, D width of the embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import timm
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer

from pipeline.backbones import torch_utils
from pipeline.backbones.base import POOLED, block_of, level_names


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenClipHiddenStates:
    """The part of a tower that gives tokens."""

    blocks: tuple[torch.nn.Module, ...] = ()
    last: torch.nn.Module | None = None
    """What gives the last layer's tokens, after its norm where the forward pass has one there."""
    dim: int = 0
    batch_first: bool = True

    @property
    def levels(self) -> tuple[str, ...]:
        """What can be had of it."""
        return level_names(len(self.blocks)) if self.last is not None else (POOLED,)

    def describe(self, level: str) -> str:
        """Name a level other than ``pooled`` for a table's provenance."""
        k, n = block_of(level), len(self.blocks)
        return f"hidden states after block {k} of {n}" if k else "tokens of the last layer"

    def hidden(self, level: str, run: Callable[[], Any]) -> torch.Tensor:
        """Run the forward pass as far as the level needs: (B, T, D), or a grid in planes."""
        k = block_of(level)
        module = self.blocks[k - 1] if k else self.last
        assert module is not None
        found_BTD = torch_utils.stop_after(module, run)
        inside = not self.batch_first and module in self.blocks
        return found_BTD.transpose(0, 1) if inside else found_BTD


def visual(model: Any) -> OpenClipHiddenStates:
    """Find the tokens of an image tower: a vision transformer, or the last grid of a ResNet."""
    tower = model.visual
    if isinstance(tower, VisionTransformer):
        inner: Any = tower.transformer
        blocks = tuple(inner.resblocks)
        # Where pooling comes before the norm, or has weights, the norm sees no tokens.
        normed = tower.attn_pool is None and not tower.final_ln_after_pool
        last = tower.ln_post if normed else blocks[-1]
        return OpenClipHiddenStates(
            blocks=blocks, last=last, dim=inner.width, batch_first=inner.batch_first
        )
    if isinstance(tower, ModifiedResNet):
        grid: Any = tower.layer4
        return OpenClipHiddenStates(last=grid, dim=int(grid[-1].bn3.num_features))
    if isinstance(tower, TimmModel) and isinstance(tower.trunk, timm.models.VisionTransformer):
        trunk: Any = tower.trunk
        return OpenClipHiddenStates(
            blocks=tuple(trunk.blocks), last=trunk.norm, dim=trunk.embed_dim
        )
    return OpenClipHiddenStates()


class Text(torch.nn.Module):
    """The text tower, at the length of the batch instead of the 77 tokens it was built for.

    Under a causal mask nothing behind the end token can reach it, so the position table and the
    mask may be cut; towers that look both ways keep their full length.
    """

    def __init__(self, clip: torch.nn.Module) -> None:
        super().__init__()
        self.clip = clip
        tower: Any = getattr(clip, "text", clip)
        self._prefix = "clip.text." if tower is not clip else "clip."
        pool = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))
        eos = getattr(tower, "text_eos_id", getattr(tower, "eos_id", None))
        self._end = {"argmax": None, "eos": eos}.get(str(pool), -1)
        mask = getattr(tower, "attn_mask", None)
        plain = getattr(tower, "cls_emb", None) is None
        self._cut = self._end != -1 and mask is not None and plain
        self._mask = mask
        self._positions = getattr(tower, "positional_embedding", None)
        self.trunk = OpenClipHiddenStates()
        if plain and hasattr(tower, "ln_final") and hasattr(tower.transformer, "resblocks"):
            self.trunk = OpenClipHiddenStates(
                blocks=tuple(tower.transformer.resblocks),
                last=tower.ln_final,
                dim=tower.transformer.width,
                batch_first=tower.transformer.batch_first,
            )

    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Encode (B, T) ids at full length, for :meth:`encode` to call with shorter tables."""
        return self.clip.encode_text(ids_BT)  # type: ignore[operator, no-any-return]

    @property
    def cut(self) -> bool:
        """Whether texts go without padding."""
        return self._cut

    def ends(self, ids_BT: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """One past the last token of each text that its vector depends on."""
        if not self._cut:
            return np.full(len(ids_BT), ids_BT.shape[1])
        marks_BT = ids_BT if self._end is None else ids_BT == self._end
        return np.asarray(marks_BT.argmax(axis=1) + 1)

    def encode(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Encode (B, T) ids to (B, D)."""
        length = ids_BT.shape[1]
        if not self._cut:
            return self.forward(ids_BT)
        assert self._mask is not None
        assert self._positions is not None
        shorter = {
            f"{self._prefix}positional_embedding": self._positions[:length],
            f"{self._prefix}attn_mask": self._mask[:length, :length],
        }
        out: torch.Tensor = torch.func.functional_call(self, shorter, (ids_BT,))
        return out
