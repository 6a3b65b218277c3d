"""Encode many items or slots in chunks: for the cache of a CPU, and to save memory.

With many tokens on a CPU, a chunk is small enough for the cache. After a step has run out of
memory, the backward pass also computes each chunk again, see
:attr:`trainer.models.base.Recommender.chunks`. Otherwise the encoder is called once.

Legend: B batch, L sequence length, K items to encode, D width, M selected slots.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trainer.data.batches import ItemFeatures, Sequences
from trainer.data.device_copy import to_device
from trainer.kernels.dispatch import use_kernels
from trainer.modules.multimodal_encoder import MultimodalEncoder

T = TypeVar("T")

_CHUNK_ELEMENTS = 2**21  # tokens times width of a chunk
_LEAST_ELEMENTS = 2**22  # fewer are one chunk


def recomputed(encode: Callable[..., T], chunks: int, *inputs: Tensor) -> list[T]:
    """Call a function on chunks of its inputs; the backward pass computes each chunk again.

    Only the results and one chunk's activations are in memory at a time.

    Args:
        encode: Function of chunks of ``inputs``. It can read other tensors and parameters, and all
            of them get their gradients.
        chunks: Number of chunks.
        inputs: Tensors of equal length.
    """
    parts = zip(*(x.chunk(chunks) for x in inputs), strict=True)
    return [checkpoint(encode, *part, use_reentrant=False) for part in parts]


def encode_in_chunks(encode: Callable[..., Tensor], chunks: int, *inputs: Tensor) -> Tensor:
    """Return ``encode(*inputs)``, computed by :func:`recomputed` with more than one chunk."""
    if chunks == 1 or not torch.is_grad_enabled():
        return encode(*inputs)
    return torch.cat(recomputed(encode, chunks, *inputs))


def encode_blocks(
    encode: Callable[[Tensor], Tensor], items_N: Tensor, size: int, *, chunks: int = 1
) -> Tensor:
    """Encode items in blocks: (N, D).

    Without gradients, each block is written into one matrix, so that the vectors are never in
    memory twice.

    Args:
        encode: Function of (K,) int64 items that returns their vectors (K, D).
        items_N: (N,) int64 item ids.
        size: Items of a block.
        chunks: More than 1: with gradients, compute each block again in the backward pass.
    """
    blocks = items_N.split(size)
    if chunks > 1 and torch.is_grad_enabled():
        return torch.cat(recomputed(encode, max(chunks, len(blocks)), items_N))
    if torch.is_grad_enabled() or len(blocks) == 1:
        return torch.cat([encode(items_K) for items_K in blocks])
    first_KD = encode(blocks[0])
    vectors_ND = first_KD.new_empty(len(items_N), first_KD.shape[1])
    vectors_ND[:size] = first_KD
    for number, items_K in enumerate(blocks[1:], 1):
        vectors_ND[number * size : (number + 1) * size] = encode(items_K)
    return vectors_ND


def encode_slots_in_chunks(
    encoder: MultimodalEncoder,
    sequences: Sequences,
    features: ItemFeatures,
    hidden_BL: Tensor | None,
    selected_BL: Tensor,
) -> tuple[Tensor, Tensor]:
    """Encode the selected slots of sequences, in chunks of sequences of similar length.

    Args:
        encoder: The encoder.
        sequences: Items of the slots.
        features: Features of the whole catalogue.
        hidden_BL: (B, L) bool, on the CPU, true where the slot gets the mask token; ``None``: no
            slot.
        selected_BL: (B, L) bool, on the CPU, true for the slots to encode.

    Returns:
        (M, D) vectors of the selected slots, sequence by sequence, and (B,) int64, on the CPU, the
        order of the sequences in these vectors.
    """
    device = sequences.items_BL.device
    rows = sequences.on_host
    item_K, row_BL = rows.items_BL.unique(return_inverse=True)
    items = encoder.embed_items(to_device(item_K, device), features)
    lengths_B = rows.lengths_B
    if hidden_BL is None:
        hidden_BL = torch.zeros_like(selected_BL)

    def encode(order_B: Tensor) -> Tensor:
        items_BL, rows_BL, hides_BL, selects_BL = (
            x_BL[order_B, : int(lengths_B[order_B].max())]
            for x_BL in (rows.items_BL, row_BL, hidden_BL, selected_BL)
        )
        slot_M = selects_BL.flatten().nonzero()[:, 0]
        rows_BL, hides_BL, slot_M = (to_device(x, device) for x in (rows_BL, hides_BL, slot_M))
        chunk = Sequences(items_BL=items_BL, lengths_B=lengths_B[order_B]).to(device)
        tokens = encoder.embed_slots(chunk, rows_BL, items, features, hides_BL)
        return encoder.encode_slots(*tokens, slot_M)

    width = len(encoder.names) * sequences.items_BL.shape[1]  # tokens of a sequence
    size = _tokens_per_chunk(encoder, len(lengths_B) * width)
    if not size:
        order_B = torch.arange(len(lengths_B))
        return encode(order_B), order_B
    order_B = lengths_B.argsort(stable=True)
    chunks = order_B.split(max(1, size // width))
    return torch.cat([_run(encoder, encode, chunk_B) for chunk_B in chunks]), order_B


def encode_items_in_chunks(
    encoder: MultimodalEncoder, item_K: Tensor, features: ItemFeatures
) -> Tensor:
    """Encode each item as a sequence of length 1, in chunks: (K, D).

    Args:
        encoder: The encoder.
        item_K: (K,) int64 item ids.
        features: Features of the whole catalogue.
    """
    size = _tokens_per_chunk(encoder, len(item_K) * len(encoder.names))
    if not size:
        return encoder.encode_single_items(item_K, features)
    # Items with all modalities need no attention mask: they are encoded first, in separate chunks.
    complete_K = encoder.present(item_K, features).all(-1)
    order_K = complete_K.int().argsort(stable=True, descending=True)
    chunks = [
        chunk_K
        for part in item_K[order_K].split([int(complete_K.sum()), int((~complete_K).sum())])
        for chunk_K in part.split(max(1, size // len(encoder.names)))
        if len(chunk_K)
    ]
    # One lookup for all chunks, because the gradient of a lookup is as large as the table.
    identities: Sequence[Tensor | None] = [None] * len(chunks)
    if encoder.settings.ids:
        identities = encoder.embed_identity(item_K[order_K]).split([len(c) for c in chunks])
    vectors = [
        _run(
            encoder,
            functools.partial(
                encoder.encode_single_items, features=features, identity_KD=identity_KD
            ),
            chunk_K,
        )
        for chunk_K, identity_KD in zip(chunks, identities, strict=True)
    ]
    return torch.cat(vectors).index_select(0, order_K.argsort())


def _tokens_per_chunk(encoder: MultimodalEncoder, tokens: int) -> int:
    """Return the number of tokens of a chunk; 0: all of them."""
    token_D = encoder.mask_token_D
    if not torch.is_grad_enabled():
        return 0
    if encoder.chunks > 1:
        return math.ceil(tokens / encoder.chunks)
    is_small = tokens * len(token_D) <= _LEAST_ELEMENTS
    if is_small or encoder.transformer.compiled or not use_kernels(token_D):
        return 0
    return max(1, _CHUNK_ELEMENTS // len(token_D))


def _run(encoder: MultimodalEncoder, encode: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
    """Encode a chunk; the backward pass computes it again if memory has run out before."""
    if encoder.chunks == 1:
        return encode(part)
    encoded: Tensor = checkpoint(encode, part, use_reentrant=False)
    return encoded
