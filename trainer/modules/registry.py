"""Registries of fusions and sequence encoders. A new one is one class, and one line here."""

from features.registry import Registry
from trainer.modules.fusion import (
    CoAttention,
    Concat,
    FiLM,
    Fusion,
    Gate,
    MergeAttention,
    Sum,
)
from trainer.modules.sequence_encoders import (
    GRUEncoder,
    NextItNetEncoder,
    SASRecEncoder,
    SequenceEncoder,
)

FUSIONS: Registry[type[Fusion]] = Registry(
    "fusion",
    {
        "sum": Sum,
        "concat": Concat,
        "gate": Gate,
        "film": FiLM,
        "co-attention": CoAttention,
        "merge-attention": MergeAttention,
    },
    group="mmrec.fusions",
    base=Fusion,
)

SEQUENCE_ENCODERS: Registry[type[SequenceEncoder]] = Registry(
    "sequence encoder",
    {
        "sasrec": SASRecEncoder,
        "gru": GRUEncoder,
        "nextitnet": NextItNetEncoder,
    },
    group="mmrec.sequence_encoders",
    base=SequenceEncoder,
)
