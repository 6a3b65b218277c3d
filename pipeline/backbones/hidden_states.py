"""One encoder of a transformers model: its tokens, and its states behind any of its blocks.

Legend: B inputs of a batch, T tokens, D width of a token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pipeline.backbones import torch_utils
from pipeline.backbones.base import POOLED, TOKENS, Vectors, block_of, level_names


class HiddenStates:
    """An encoder with its blocks in order.

    Args:
        module: Where the blocks are looked for.
        depth: How many there are, as the configuration says.
        run: The forward pass, of keyword arguments; gives what the library's gives.
        probe: Arguments of one forward pass, to see what comes out. Blocks that the library does
            not list as ``hidden_states`` (shared, grouped or convolutional ones) are not offered.
    """

    def __init__(
        self, module: torch.nn.Module, depth: int, run: Callable[..., Any], probe: dict[str, Any]
    ) -> None:
        self.run = run
        with torch.inference_mode():
            output = run(**probe, output_hidden_states=True)
            last = output.last_hidden_state
            self._dims = {TOKENS: int(last.shape[1 if last.ndim == 4 else -1])}
            states: list[torch.Tensor] = list(output.hidden_states or ())
            self._blocks = _blocks(module, depth) if len(states) == depth + 1 else []
            if self._blocks:
                first = torch_utils.stop_after(self._blocks[0], lambda: run(**probe))
                if first.shape != states[1].shape or not torch.allclose(first, states[1]):
                    self._blocks = []
        for k in range(1, len(self._blocks)):
            self._dims[f"layer-{k}"] = int(states[k].shape[-1])

    @property
    def depth(self) -> int:
        """Blocks that it can be cut behind, the last one included; 0: none."""
        return len(self._blocks)

    @property
    def levels(self) -> tuple[str, ...]:
        """What can be had of it."""
        return level_names(self.depth)

    def dim(self, level: str) -> int:
        """D of one token."""
        return self._dims[level]

    def describe(self, level: str) -> str:
        """Name a level other than ``pooled`` for a table's provenance."""
        assert level != POOLED
        k = block_of(level)
        return f"hidden states after block {k} of {self.depth}" if k else "tokens of the last layer"

    def hidden(self, level: str, inputs: dict[str, Any]) -> torch.Tensor:
        """Run it as far as the level needs: (B, T, D), or (B, D, rows, columns) of a grid."""
        k = block_of(level)
        if k:
            return torch_utils.stop_after(self._blocks[k - 1], lambda: self.run(**inputs))
        last: torch.Tensor = self.run(**inputs).last_hidden_state
        return last

    def tokens(
        self, level: str, inputs: dict[str, Any], lengths: Sequence[int] | None = None
    ) -> list[Vectors]:
        """Give (T, D) of each input, its padding cut off."""
        return torch_utils.split(self.hidden(level, inputs), lengths)


def _blocks(module: torch.nn.Module, depth: int) -> list[torch.nn.Module]:
    for part in module.modules():
        if isinstance(part, torch.nn.ModuleList) and len(part) == depth > 0:
            return list(part)
    return []
