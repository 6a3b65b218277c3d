"""The four pre-training losses of S3-Rec (Zhou et al., CIKM 2020).

All losses are sums over positions and attributes, as in the released code. Divided by the number of
rows they are means over the sequences of a batch.

Legend: M positions, B sequences, A attributes, D width.
"""

from torch import Tensor
from torch.nn import functional


def attribute_loss(state_MD: Tensor, attribute_AD: Tensor, has_attribute_MA: Tensor) -> Tensor:
    """Return the sum of the cross-entropies of all attributes at all positions (AAP, MAP).

    Eq. 5 and 9: -sum over a of y_a log sigma(A_a . h) + (1 - y_a) log(1 - sigma(A_a . h)).

    Args:
        state_MD: Mapped states.
        attribute_AD: Vectors of the attributes.
        has_attribute_MA: Float, 1 where the item of the position has the attribute.
    """
    logits_MA = state_MD @ attribute_AD.T
    return functional.binary_cross_entropy_with_logits(logits_MA, has_attribute_MA, reduction="sum")


def ranking_loss(query_MD: Tensor, positive_MD: Tensor, negative_MD: Tensor) -> Tensor:
    """Return the sum of the losses of a positive against one negative (MIP, SP).

    The released code applies the sigmoid twice: -log sigma(sigma(q . p) - sigma(q . n)). Its
    argument is between -1 and 1, so a position costs at least log(1 + 1/e) = 0.313.

    Args:
        query_MD: Mapped states.
        positive_MD: Vectors of the hidden items or segments.
        negative_MD: Vectors of the others.
    """
    positive_M = (query_MD * positive_MD).sum(-1).sigmoid()
    negative_M = (query_MD * negative_MD).sum(-1).sigmoid()
    return functional.softplus(negative_M - positive_M).sum()
