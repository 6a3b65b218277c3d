"""Settings of the released code that the presets of MMSR, IDSR and PMMRec share.

The differences that no setting removes are in ``trainer/README.md``.
"""

from collections.abc import Mapping
from typing import Any

RELEASED_ENCODER: Mapping[str, Any] = {
    "dim": 768,
    "hidden": 3072,
    "activation": "relu",
    "final_norm": False,
    "attention_bias": False,
    "norm_eps": 1e-6,
    "inner_dropout": False,
    "initialisation": "released",
}
"""The sequence encoder, with 2 layers, 2 heads and 20 items, and the initial weights."""
RELEASED_ATTENTION: Mapping[str, Any] = {
    "fusion_heads": 12,
    "fusion_norm_eps": 1e-12,
    "centre": False,
}
"""The attention fusions, with one layer."""
RELEASED_COARSE: Mapping[str, Any] = {
    "shared_norm": True,
    "dnn_relu": True,
    "fusion_norm_eps": 1e-6,
    "centre": False,
}
"""The coarse fusions, with and without ``dnn=true``."""
