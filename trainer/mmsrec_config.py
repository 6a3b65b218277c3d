"""Hyper-parameters of MMSRec."""

from dataclasses import dataclass

from features.errors import UserError
from trainer.checks import (
    check_heads,
    check_not_negative,
    check_positive,
    check_probability,
    check_temperature,
)

# Below the first number an item is masked, below the second swapped; how many are never swapped in.
CORRUPTIONS = {"80-10-10": (0.8, 0.9, 0), "81-9-10": (0.81, 0.9, 1)}
_WORDS = {
    "objective": ("masked", "next"),
    "missing": ("drop", "mask"),
    "corruption": tuple(CORRUPTIONS),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MMSRecConfig:
    """Hyper-parameters of MMSRec; sizes, dropout, temperature and mask ratio are the paper's."""

    dim: int = 512
    """Width of tokens, transformer and shared space."""
    layers: int = 2
    """Transformer blocks."""
    heads: int = 8
    """Attention heads."""
    hidden: int = 1024
    """Width of the feed-forward networks."""
    length: int = 20
    """Most items of a sequence, the slot of the predicted item included."""
    dropout: float = 0.5
    """Probability inside the transformer (0.2 for dense data such as ML-1M)."""
    embed_dropout: float = 0.2
    """Probability on the embedded tokens."""
    temperature: float = 0.05
    """Divides the cosine in the softmax."""
    objective: str = "masked"
    """``masked``: what is hidden in a history (the paper); ``next``: what comes after each item, by
    a tower that sees nothing later, which learns from every interaction in one pass."""
    mask_ratio: float = 0.2
    """Share of positions that are predicted when masked; the last one always is."""
    stride: int = 0
    """Interactions between two windows of a user when masked; 0: half of ``length``."""
    corruption: str = "80-10-10"
    """When masked: shares of predicted items that are masked, swapped and kept (the paper);
    ``81-9-10`` is what the released code does, which also never swaps the last item in."""
    missing: str = "drop"
    """``drop``: a missing modality has no token; ``mask``: it is the mask token (the paper)."""
    ids: bool = False
    """Each item has a learned vector, added to its tokens and to its vector; one without training
    interactions has none, and is known by its features alone."""
    whiten: bool = False
    """Decorrelate each modality's features by what they are for the items seen in training."""
    candidates: int = 0
    """Items that the softmax of a step runs over: the predicted ones, and others drawn evenly that
    stand for all the rest; 0: the whole catalogue, as in the paper."""

    def __post_init__(self) -> None:
        check_positive(self, "dim", "layers", "heads", "hidden", "length")
        check_temperature(self, "temperature")
        check_not_negative(self, "stride", "candidates")
        check_probability(self, "dropout", "embed_dropout", "mask_ratio")
        check_heads(self.dim, self.heads)
        if self.length < 2:
            raise UserError(f"length={self.length} must be at least 2: history and predicted item")
        for key, known in _WORDS.items():
            if getattr(self, key) not in known:
                value = getattr(self, key)
                raise UserError(f"{key}={value!r} is not known; known: {', '.join(known)}")
