"""Which patches a masked autoencoder sees: a function of the picture, so its vector is one too.

Legend: B pictures of a batch, L patches of a picture.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def noise(images: Sequence[Any], patches: int, ratio: float) -> torch.Tensor:
    """Make the noise (B, L) by which ViT-MAE masks: it keeps the patches with the smallest.

    They are chosen at random, with a seed from the prepared picture's own bytes, and stay in
    reading order.
    """
    keep = int(patches * (1 - ratio))  # as the library rounds
    noise_BL = np.tile(np.arange(patches, dtype=np.float32), (len(images), 1))
    if keep < patches:
        for row, image in zip(noise_BL, images, strict=True):
            digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
            # RandomState's streams are frozen by numpy's policy (NEP 19).
            random = np.random.RandomState(int.from_bytes(digest[:4], "little"))
            row[random.permutation(patches)[keep:]] += patches
    return torch.from_numpy(noise_BL)
