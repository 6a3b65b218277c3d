"""The upper blocks of a backbone, trained in stage 2 on what its lower, frozen blocks have made.

PMMRec (Li et al., arXiv:2312.09602, section IV-A3) and MMSR (section 4.2) fine-tune the top two
blocks of their text and vision encoders. What lies below never changes, so its output is extracted
once, as the table ``layer-K`` of every item's hidden states behind block K; here the blocks above
run on it, and the final norm where the library's last hidden states have one. Loss and gradients
are those of the whole encoder with its lower part frozen. Two things differ from a training of the
whole: the frozen part runs without dropout (in the released code it has some), and a table of
float16 is rounded. (The released code of MMSR freezes the upper two blocks and trains the rest.)

Legend: K items, T tokens, D width, B items of a chunk, R tokens of several items.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainer.data.batches import ItemFeatures
from trainer.modules.tokens import Tokens

TOKENS_AT_ONCE = 2**13
"""Of a chunk. Activations are kept of so many tokens of a batch; those of its other chunks are
computed again in the backward pass, one chunk at a time."""


class UpperBlocks(nn.Module):
    """Blocks of one transformers encoder, in order, and what follows the last one.

    Args:
        blocks: Each takes (B, T, D) and a mask, and gives (B, T, D).
        norm: Behind the last block; none where the encoder has none there.
        causal: Whether a token sees only those before it.
        padded: Whether items of several lengths go through together; else each length alone.
        document: What builds it again, see :mod:`trainer.finetune.split_encoder`.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        norm: nn.Module | None,
        *,
        causal: bool,
        padded: bool,
        document: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.causal = causal
        self.padded = padded
        self.document = document

    def forward(self, x_KTD: Tensor, mask_KT: Tensor) -> Tensor:
        """Give the last hidden states (K, T, D); where there is no token they are zero.

        Items of similar length go through together, in chunks of bounded size.

        Args:
            x_KTD: Hidden states behind the block below these.
            mask_KT: Which tokens exist: the first ones of each item. An item may have none.
        """
        # An item without tokens goes through as one token of zeros: so every parameter has a
        # gradient, whatever the batch holds, and no softmax is over nothing.
        length_K, order_K = mask_KT.sum(1).clamp_min(1).sort(stable=True)
        found, begin, kept = [], 0, 0
        for rows in cut(length_K.tolist(), TOKENS_AT_ONCE, padded=self.padded):
            lengths_B = length_K[begin : begin + rows]
            x_BTD = x_KTD[order_K[begin : begin + rows], : int(lengths_B[-1])]
            kept += x_BTD.shape[0] * x_BTD.shape[1]
            if torch.is_grad_enabled() and kept > TOKENS_AT_ONCE:
                y_RD = checkpoint(self._run, x_BTD, lengths_B, use_reentrant=False)
            else:
                y_RD = self._run(x_BTD, lengths_B)
            found.append(y_RD)
            begin += rows
        # One item behind another; the last row is of what is no token. Not `y_RD[row_KT]`: the
        # order in which its backward pass adds is left to the threads.
        y_RD = torch.cat([*found, x_KTD.new_zeros(1, x_KTD.shape[2])])
        first_K = torch.empty_like(length_K)
        first_K[order_K] = length_K.cumsum(0) - length_K
        row_KT = first_K[:, None] + torch.arange(mask_KT.shape[1], device=x_KTD.device)
        nothing = len(y_RD) - 1
        row_KT = torch.where(mask_KT, row_KT, nothing)
        return functional.embedding(row_KT, y_RD, padding_idx=nothing)

    def _run(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Run a chunk; give its tokens alone, one item behind another: (R, D)."""
        mask = self._mask(x_BTD, lengths_B)
        for block in self.blocks:
            x_BTD = self._block(block, x_BTD, mask)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return x_BTD[torch.arange(x_BTD.shape[1], device=x_BTD.device) < lengths_B[:, None]]

    def _block(self, block: nn.Module, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
        found = block(x_BTD, mask)
        state_BTD: Tensor = found[0] if isinstance(found, tuple) else found
        return state_BTD

    def _mask(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor | None:
        """Which keys a query sees: (B, 1, 1 or T, T) bool; none: all of them."""
        T = x_BTD.shape[1]
        if not self.causal and bool(lengths_B[0] == T):  # ascending: then all are as long
            return None
        key_T = torch.arange(T, device=x_BTD.device)
        seen = (key_T < lengths_B[:, None])[:, None, None, :]
        return seen & (key_T <= key_T[:, None]) if self.causal else seen


class OpenClipBlocks(UpperBlocks):
    """The same of an open_clip tower: nothing masks padding, which a causal text never sees."""

    def _block(self, block: nn.Module, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
        state_BTD: Tensor = block(x_BTD, attn_mask=mask)
        return state_BTD

    def _mask(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor | None:
        T = x_BTD.shape[1]
        return x_BTD.new_full((T, T), -torch.inf).triu(1) if self.causal else None


def cut(lengths: Sequence[int], most: int, *, padded: bool) -> list[int]:
    """Cut rows of ascending lengths into chunks: how many rows each has.

    Args:
        lengths: Of the rows, at least 1.
        most: Tokens of a chunk, padding included; a longer row is a chunk of its own.
        padded: Whether rows of several lengths may stand in a chunk: then each is at least half as
            long as the longest, unless the chunk is small.
    """
    sizes, first = [], 0
    for row, length in enumerate(lengths):
        rows, shortest = row - first, lengths[first]
        apart = (
            length > 2 * shortest and rows * length > most // 16 if padded else length > shortest
        )
        if rows and ((rows + 1) * length > most or apart):
            sizes.append(rows)
            first = row
    return [*sizes, len(lengths) - first] if lengths else []


def item_tokens(
    item_K: Tensor, features: ItemFeatures, backbones: nn.ModuleDict
) -> dict[str, Tokens]:
    """The tokens of some items, each modality's: (K, T, D) and (K, T) bool, which of them exist.

    A pooled vector is a modality of one token; a table of tokens goes through the modality's upper
    blocks, where these are trained.

    Args:
        item_K: (K,) int64, best each item once.
        features: Of the catalogue.
        backbones: Modality -> its :class:`UpperBlocks`, where there are any.
    """
    found: dict[str, Tokens] = {}
    for name in features.widths:
        if name in features.tokens:
            x_KTD, mask_KT = features.tokens[name].gather(item_K)
            if name in backbones:
                x_KTD = backbones[name](x_KTD, mask_KT)
            found[name] = x_KTD, mask_KT
        else:
            vector_K1D = features.vectors[name][item_K][:, None]
            found[name] = vector_K1D, features.present[name][item_K][:, None]
    return found
