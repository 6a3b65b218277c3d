"""Settings of the released code that the variants "as published" of MMSR, IDSR and PMMRec share.

The differences that no setting removes are in ``trainer/README.md``.
"""

RELEASED_ENCODER = (
    "--set dim=768 --set hidden=3072 --set activation=relu --set final_norm=false"
    " --set attention_bias=false --set norm_eps=1e-6 --set inner_dropout=false"
    " --set initialisation=released"
)
"""The sequence encoder, with 2 layers, 2 heads and 20 items, and the initial weights."""
RELEASED_ATTENTION = "--set fusion_heads=12 --set fusion_norm_eps=1e-12"
"""The attention fusions, with one layer."""
RELEASED_COARSE = "--set shared_norm=true --set dnn_relu=true --set fusion_norm_eps=1e-6"
"""The coarse fusions, with and without ``dnn=true``."""
