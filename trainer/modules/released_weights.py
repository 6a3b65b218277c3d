"""Initial weights as in the released code of MMSR, PMMRec and MMSRec.

The rules follow from the published descriptions and from the standard deviations of the weights:

==================================================  ==============================================
part                                                distribution
==================================================  ==============================================
linear layers, embeddings of MMSR and PMMRec        Glorot normal, 2 / (columns + rows); biases 0
queries, keys, values of their sequence encoder     Glorot normal, each of the three matrices alone
their attention fusions                             N(0, 0.02^2), as in BERT; biases 0
convolutions of NextItNet                           U(-a, a), a = 1 / sqrt(inputs); biases as well
layer 0 of the GRU                                  Glorot normal, each matrix of three gates
further layers of the GRU                           U(-a, a), a = 1 / sqrt(width)
linear layers, embeddings of MMSRec                 N(0, 0.02^2); biases 0
queries, keys, values of MMSRec                     Glorot uniform, one matrix; equal in all layers
==================================================  ==============================================

The matrix that maps the pooled modalities of a co-attention to one vector is drawn as the other
linear layers are. The tokens of absent modalities, which the released code does not have, and the
vectors of modalities are drawn from N(0, 0.02^2).
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from trainer.config import Choice, Settings
from trainer.modules.fusion import CoAttention, MergeAttention
from trainer.modules.sequence_encoders import CausalConvolution, GRUEncoder, SASRecEncoder
from trainer.modules.transformer import Transformer, initialise, initialise_glorot


@dataclass(frozen=True, kw_only=True)
class InitialisationSettings(Settings):
    """Settings of the initial weights of a model whose authors released their code."""

    initialisation: Annotated[str, Choice("initialisation", ("default", "released"))] = "default"
    """Distribution of the initial weights: ``default``, or as in the ``released`` code."""


def initialise_released(model: nn.Module) -> None:
    """Draw the weights of an MMSR or PMMRec model as in the released code of both."""
    initialise_glorot(model)
    for part in model.modules():
        if isinstance(part, SASRecEncoder):
            for block in part.transformer.blocks:
                _draw_separately(block.get_parameter("qkv.weight"))
        elif isinstance(part, CausalConvolution):
            part.map.reset_parameters()
        elif isinstance(part, GRUEncoder):
            nn.init.xavier_normal_(part.gru.get_parameter("weight_ih_l0"))
            nn.init.xavier_normal_(part.gru.get_parameter("weight_hh_l0"))
        elif isinstance(part, MergeAttention):
            initialise(part.blocks)
        elif isinstance(part, CoAttention):
            initialise(part.cross)
            initialise(part.own)


@torch.no_grad()
def initialise_attention_released(transformer: Transformer) -> None:
    """Draw the queries, keys and values as in MMSRec: Glorot uniform, equal in all blocks."""
    first, *others = (block.get_parameter("qkv.weight") for block in transformer.blocks)
    nn.init.xavier_uniform_(first)
    for weight in others:
        weight.copy_(first)


@torch.no_grad()
def _draw_separately(weight: Tensor) -> None:
    for weight_DD in weight.chunk(3):
        nn.init.xavier_normal_(weight_DD)
