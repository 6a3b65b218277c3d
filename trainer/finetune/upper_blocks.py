"""Train the upper blocks of a backbone in stage 2, on the hidden states of its frozen lower blocks.

PMMRec (Li et al., arXiv:2312.09602, section IV-A3) and MMSR (section 4.2) fine-tune the top two
blocks of their text and vision encoders. The blocks below never change. Hence their output is
extracted once, as the table ``layer-K`` with every item's hidden states after block K. Here the
blocks above run on these states, followed by the final norm if the library's last hidden states
have one. Loss and gradients equal those of the whole encoder with its lower part frozen, with two
differences: the frozen part runs without dropout (in the released code it has some), and a float16
table is rounded. The released code of MMSR freezes the upper two blocks and trains the others.

Legend: K items, T tokens, D width, B items of a chunk, R tokens of several items.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from features.encoder_blocks import EncoderBlocks, states_of
from trainer.config import TrainConfig
from trainer.data.batches import ItemFeatures
from trainer.modules.tokens import Tokens

TOKENS_AT_ONCE = 2**13
"""Number of tokens per chunk. Activations are kept for this number of tokens of a batch; those of
the other chunks are recomputed in the backward pass, one chunk at a time."""


class UpperBlocks(nn.Module):
    """Upper blocks of one transformers encoder, and the norm after them.

    Args:
        encoder: The whole encoder. A block takes (B, T, D) and a mask, and returns (B, T, D).
        cut: Number of blocks that stay frozen.
        document: Description of the blocks, see :func:`trainer.finetune.split_encoder.build`.
    """

    def __init__(self, encoder: EncoderBlocks, cut: int, document: Mapping[str, Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(encoder.blocks[cut:])
        self.norm = encoder.norm
        self.width = encoder.width
        self.causal = encoder.causal
        # Texts of several lengths share a chunk; the images of a chunk have one length.
        self.padded = document["modality"] != "image"
        self.document = document

    def parameter_group(self, config: TrainConfig) -> dict[str, Any]:
        """Return the parameters with the learning rate and weight decay of ``tune_blocks``."""
        return {
            "params": list(self.parameters()),
            "lr": config.tune_lr,
            "weight_decay": config.tune_weight_decay,
        }

    def forward(self, x_KTD: Tensor, mask_KT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden states (K, T, D), zero outside the mask, and the mask (K, T).

        Items of similar length share a chunk of bounded size.

        Args:
            x_KTD: Hidden states after the block below.
            mask_KT: True for the tokens, which are the first ones of each item. An item may have
                no tokens.
        """
        # An item without tokens is encoded as one token of zeros. Thus every parameter has a
        # gradient in each batch, and no softmax is empty.
        length_K, order_K = mask_KT.sum(1).clamp_min(1).sort(stable=True)
        chunks, begin, kept = [], 0, 0
        for rows in cut(length_K.tolist(), TOKENS_AT_ONCE, padded=self.padded):
            lengths_B = length_K[begin : begin + rows]
            x_BTD = x_KTD[order_K[begin : begin + rows], : int(lengths_B[-1])]
            kept += x_BTD.shape[0] * x_BTD.shape[1]
            if torch.is_grad_enabled() and kept > TOKENS_AT_ONCE:
                y_RD = checkpoint(self._run, x_BTD, lengths_B, use_reentrant=False)
            else:
                y_RD = self._run(x_BTD, lengths_B)
            chunks.append(y_RD)
            begin += rows
        # The items follow one another; the last row is zero, for positions without a token. The
        # backward pass of `y_RD[row_KT]` would add in an order that depends on threads.
        y_RD = torch.cat([*chunks, x_KTD.new_zeros(1, x_KTD.shape[2])])
        first_K = torch.empty_like(length_K)
        first_K[order_K] = length_K.cumsum(0) - length_K
        row_KT = first_K[:, None] + torch.arange(mask_KT.shape[1], device=x_KTD.device)
        zero_row = len(y_RD) - 1
        row_KT = torch.where(mask_KT, row_KT, zero_row)
        return functional.embedding(row_KT, y_RD, padding_idx=zero_row), mask_KT

    def _run(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor:
        """Run a chunk; return its tokens without padding, item after item: (R, D)."""
        mask = self._mask(x_BTD, lengths_B)
        for block in self.blocks:
            x_BTD = self._block(block, x_BTD, mask)
        if self.norm is not None:
            x_BTD = self.norm(x_BTD)
        return x_BTD[torch.arange(x_BTD.shape[1], device=x_BTD.device) < lengths_B[:, None]]

    def _block(self, block: nn.Module, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
        return states_of(block(x_BTD, mask))

    def _mask(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor | None:
        """Return which keys a query attends to: (B, 1, 1 or T, T) bool; None for all."""
        T = x_BTD.shape[1]
        if not self.causal and bool(lengths_B[0] == T):  # ascending: all have this length
            return None
        key_T = torch.arange(T, device=x_BTD.device)
        mask = (key_T < lengths_B[:, None])[:, None, None, :]
        return mask & (key_T <= key_T[:, None]) if self.causal else mask


class AddedMaskBlocks(UpperBlocks):
    """Upper blocks of an encoder that adds the mask to its attention scores."""

    def _mask(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor | None:
        mask = super()._mask(x_BTD, lengths_B)
        if mask is None:
            return None
        B, T = x_BTD.shape[:2]
        lowest = torch.finfo(x_BTD.dtype).min
        return (
            torch.zeros_like(mask, dtype=x_BTD.dtype).masked_fill(~mask, lowest).expand(B, 1, T, T)
        )


class OpenClipBlocks(UpperBlocks):
    """Upper blocks of an open_clip encoder; no mask is needed for padding after a causal text."""

    def _block(self, block: nn.Module, x_BTD: Tensor, mask: Tensor | None) -> Tensor:
        state_BTD: Tensor = block(x_BTD, attn_mask=mask)
        return state_BTD

    def _mask(self, x_BTD: Tensor, lengths_B: Tensor) -> Tensor | None:
        T = x_BTD.shape[1]
        return x_BTD.new_full((T, T), -torch.inf).triu(1) if self.causal else None


def cut(lengths: Sequence[int], most: int, *, padded: bool) -> list[int]:
    """Divide rows of ascending lengths into chunks; return the number of rows of each chunk.

    Args:
        lengths: Lengths of the rows, at least 1 each.
        most: Largest number of tokens of a chunk, padding included; a longer row is a chunk of its
            own.
        padded: Whether rows of several lengths may share a chunk. Each row then has at least half
            the length of the longest, unless the chunk is small.
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
    """Return the tokens of items for each modality.

    A pooled vector is one token. A table of tokens runs through the upper blocks of its modality,
    if these are trained.

    Args:
        item_K: (K,) int64 items; each should occur once.
        features: Features of the catalogue.
        backbones: Modality -> :class:`UpperBlocks`, for the modalities that have them.

    Returns:
        Modality -> tokens (K, T, D), and the mask (K, T), True for tokens.
    """
    tokens: dict[str, Tokens] = {}
    for name in features.widths:
        if name in features.tokens:
            x_KTD, mask_KT = features.tokens[name].gather(item_K)
            if name in backbones:
                x_KTD, mask_KT = backbones[name](x_KTD, mask_KT)
            tokens[name] = x_KTD, mask_KT
        else:
            vector_K1D = features.rows(name, item_K)[:, None]
            tokens[name] = vector_K1D, features.present[name][item_K][:, None]
    return tokens
