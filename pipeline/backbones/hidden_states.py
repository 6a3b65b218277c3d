"""Hidden states of one encoder at each level: its last tokens, and its states after each block.

Legend: B inputs of a batch, T tokens, D width of a token.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from features.encoder_blocks import EncoderBlocks, find_blocks, stop_after, stop_before
from pipeline.backbones.base import POOLED, TOKENS, block_of, level_names


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenStates:
    """An encoder that can be run as far as a level needs."""

    run: Callable[..., Any]
    """Forward pass; takes the keyword arguments that the backbone makes of a batch."""
    blocks: tuple[torch.nn.Module, ...] = ()
    """Blocks before and after which the encoder can be cut, in order."""
    dims: Mapping[str, int] = field(default_factory=dict)
    """Level -> D of one token."""
    last: torch.nn.Module | None = None
    """Module that returns the tokens of the last layer. None: :attr:`run` returns an output of
    transformers, which has them as ``last_hidden_state``."""
    batch_first: bool = True
    """Whether a block returns (B, T, D); else it returns (T, B, D)."""

    @property
    def depth(self) -> int:
        """Number of blocks after which the encoder can be cut; 0 if it cannot."""
        return len(self.blocks)

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels that are available."""
        return level_names(self.depth)

    def describe(self, level: str) -> str:
        """Describe a level other than ``pooled`` for the provenance of a table."""
        assert level != POOLED
        k = block_of(level)
        if k is None:
            return "tokens of the last layer"
        if k == 0:
            return f"embeddings, before block 1 of {self.depth}"
        return f"hidden states after block {k} of {self.depth}"

    def hidden(self, level: str, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Run the encoder as far as the level needs.

        Returns:
            (B, T, D), or (B, D, rows, columns) for a convolutional encoder.
        """
        k = block_of(level)
        if k == 0:
            states = stop_before(self.blocks[0], lambda: self.run(**inputs))
            return states if self.batch_first else states.transpose(0, 1)
        module = self.last if k is None else self.blocks[k - 1]
        if module is None:
            last_BTD: torch.Tensor = self.run(**inputs).last_hidden_state
            return last_BTD
        states = stop_after(module, lambda: self.run(**inputs))
        return states if self.batch_first or module not in self.blocks else states.transpose(0, 1)


def of_transformers(
    module: torch.nn.Module, depth: int, run: Callable[..., Any], probe: Mapping[str, Any]
) -> HiddenStates:
    """Return the hidden states of a transformers encoder.

    Blocks whose outputs the library does not list as ``hidden_states`` (shared, grouped or
    convolutional ones) are not offered: the encoder then has the tokens of its last layer only.

    Args:
        module: Module that contains the blocks.
        depth: Number of blocks, from :func:`features.encoder_blocks.block_count`.
        run: Forward pass; takes keyword arguments and returns the library's output.
        probe: Arguments of one forward pass, which finds the widths.
    """
    with torch.inference_mode():
        output = run(**probe, output_hidden_states=True)
        last = output.last_hidden_state
        dims = {TOKENS: int(last.shape[1 if last.ndim == 4 else -1])}
        states: list[torch.Tensor] = list(output.hidden_states or ())
        blocks = find_blocks(module, depth) if len(states) == depth + 1 else ()
        if blocks:
            around = [stop(blocks[0], lambda: run(**probe)) for stop in (stop_before, stop_after)]
            if not all(map(_are_equal, around, states[:2])):
                blocks = ()
    widths = [int(state.shape[1 if state.ndim == 4 else -1]) for state in states]
    dims |= {f"layer-{k}": widths[k] for k in range(len(blocks))}
    return HiddenStates(run=run, blocks=blocks, dims=dims)


def _are_equal(states: torch.Tensor, others: torch.Tensor) -> bool:
    return states.shape == others.shape and torch.allclose(states, others)


def of_open_clip(encoder: EncoderBlocks, run: Callable[..., Any]) -> HiddenStates:
    """Return the hidden states of one encoder of an open_clip model.

    Args:
        encoder: Its blocks.
        run: Forward pass of the encoder.
    """
    return HiddenStates(
        run=run,
        blocks=encoder.blocks,
        dims=dict.fromkeys(level_names(len(encoder.blocks))[1:], encoder.width),
        last=encoder.last,
        batch_first=encoder.batch_first,
    )
