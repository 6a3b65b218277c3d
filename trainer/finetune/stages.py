"""Train the upper stages of an image encoder: of Swin, of a ResNet, or of GroupViT.

A stage changes the number of tokens, their width, or both. All images have the same number of
tokens: the cells of a grid, row by row, or the segments of GroupViT.

Legend: K items, T tokens, D width, B items of a chunk.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from features.encoder_blocks import EncoderBlocks, states_of
from features.errors import UserError
from trainer.finetune import upper_blocks
from trainer.finetune.upper_blocks import UpperBlocks


class StageBlocks(UpperBlocks):
    """Upper stages of an image encoder, and the norm after them.

    Batch norms keep the statistics of the checkpoint, in training too; their weights are trained.
    With statistics of a batch, the vector of an item would depend on the other items of a chunk.

    Args:
        encoder: The whole encoder.
        cut: Number of stages that stay frozen.
        document: Description of the blocks. ``grid`` has the rows and columns of the states below.
    """

    def __init__(self, encoder: EncoderBlocks, cut: int, document: Mapping[str, Any]) -> None:
        super().__init__(encoder, cut, document)
        self.grid: tuple[int, ...] = tuple(document["grid"])

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all modules but the batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, x_KTD: Tensor, mask_KT: Tensor) -> tuple[Tensor, Tensor]:
        """Return the last hidden states and their mask; see :meth:`UpperBlocks.forward`.

        The number and the width of the tokens are those of the last stage. An item without an image
        is encoded as an image of zeros, so that every parameter has a gradient in each batch.
        """
        has_image_K = mask_KT[:, 0]
        tokens = x_KTD.shape[1]
        expected = self.grid[0] * self.grid[1] if self.grid else tokens
        if tokens < expected and tokens == 1:  # no item of the batch has an image
            x_KTD = x_KTD.expand(-1, expected, -1)
        elif tokens != expected:
            raise UserError(
                f"tune_blocks: an image of the feature table has {tokens} tokens, not the"
                f" {' x '.join(map(str, self.grid))} of its checkpoint's images; run mmrec extract"
                " again with --overwrite"
            )
        rows = max(1, upper_blocks.TOKENS_AT_ONCE // x_KTD.shape[1])
        chunks = []
        for number, x_BTD in enumerate(x_KTD.split(rows)):
            if torch.is_grad_enabled() and number:
                chunks.append(checkpoint(self._run_stages, x_BTD, use_reentrant=False))
            else:
                chunks.append(self._run_stages(x_BTD))
        y_KTD = torch.cat(chunks)
        if self.norm is not None:
            y_KTD = self.norm(y_KTD)
        y_KTD = y_KTD * has_image_K[:, None, None]
        return y_KTD, has_image_K[:, None].expand(y_KTD.shape[:2])

    def _run_stages(self, x_BTD: Tensor) -> Tensor:
        raise NotImplementedError


class SwinStages(StageBlocks):
    """Upper stages of Swin; all but the last merge four cells into one of twice the width."""

    def _run_stages(self, x_BTD: Tensor) -> Tensor:
        rows, columns = self.grid
        for stage in self.blocks:
            x_BTD = states_of(stage(x_BTD, (rows, columns)))
            if stage.downsample is not None:
                rows, columns = (rows + 1) // 2, (columns + 1) // 2
        return x_BTD


class ResNetStages(StageBlocks):
    """Upper stages of a ResNet, each of several convolutional blocks."""

    def _run_stages(self, x_BTD: Tensor) -> Tensor:
        x: Tensor = x_BTD.transpose(1, 2).unflatten(2, self.grid)
        for stage in self.blocks:
            x = stage(x)
        return x.flatten(2).transpose(1, 2)


class GroupViTStages(StageBlocks):
    """Upper stages of GroupViT's vision encoder.

    A stage merges its tokens into segments. A stage that adds group tokens of its own to those of
    the stage below cannot be the first one, because a table does not have the group tokens.

    Raises:
        UserError: The first stage takes the group tokens of the stage below.
    """

    def __init__(self, encoder: EncoderBlocks, cut: int, document: Mapping[str, Any]) -> None:
        super().__init__(encoder, cut, document)
        if _takes_groups(encoder.blocks[cut]):
            depth = len(encoder.blocks)
            able = [depth - k for k, stage in enumerate(encoder.blocks) if not _takes_groups(stage)]
            raise UserError(
                f"tune_blocks: stage {cut + 1} of GroupViT takes the group tokens of the stage"
                f" below, which a table layer-{cut} lacks; give tune_blocks="
                f"{' or '.join(map(str, sorted(able)))} and the table of that layer"
            )

    def _run_stages(self, x_BTD: Tensor) -> Tensor:
        groups_BGD = None
        for stage in self.blocks:
            x_BTD, groups_BGD = stage(x_BTD, groups_BGD)[:2]
        return x_BTD


def _takes_groups(stage: nn.Module) -> bool:
    return getattr(stage, "group_projector", None) is not None


STAGES: dict[str, type[StageBlocks]] = {
    "swin": SwinStages,
    "resnet": ResNetStages,
    "groupvit_vision_model": GroupViTStages,
}
"""Model type of transformers -> its upper stages."""


def grid_below(
    encoder: EncoderBlocks, config: Any, cut: int, sides: Sequence[int]
) -> tuple[int, ...]:
    """Return the rows and columns of the states below a stage; empty if they are no grid.

    Args:
        encoder: The whole encoder.
        config: Its configuration.
        cut: Number of stages below.
        sides: Height and width of the images in pixels.
    """
    if encoder.stages == "swin":
        steps = [config.patch_size, *[2] * cut]
    elif encoder.stages == "resnet":  # the embedder halves the sides twice
        stage_strides = [2 if config.downsample_in_first_stage else 1, *[2] * len(encoder.blocks)]
        steps = [2, 2, *stage_strides[:cut]]
    else:
        return ()
    for step in steps:
        sides = [-(-side // step) for side in sides]
    return tuple(sides)
