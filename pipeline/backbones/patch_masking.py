"""Choose the patches that a masked autoencoder sees, as a function of the image alone.

Legend: B images of a batch, L patches of an image.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def noise(images: Sequence[Any], patches: int, ratio: float) -> torch.Tensor:
    """Return the noise by which ViT-MAE masks: the model keeps the patches with the smallest.

    The kept patches are chosen at random, with a seed from the bytes of the prepared image. Thus
    the vector of an image depends on the image alone. The patches stay in reading order.

    Args:
        images: Prepared images.
        patches: L.
        ratio: Share of the patches that are masked.

    Returns:
        (B, L) float32.
    """
    keep = int(patches * (1 - ratio))  # rounded like the library
    noise_BL = np.tile(np.arange(patches, dtype=np.float32), (len(images), 1))
    if keep < patches:
        for row, image in zip(noise_BL, images, strict=True):
            digest = hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()
            # RandomState's streams are frozen by numpy's policy (NEP 19).
            random = np.random.RandomState(int.from_bytes(digest[:4], "little"))
            row[random.permutation(patches)[keep:]] += patches
    return torch.from_numpy(noise_BL)
