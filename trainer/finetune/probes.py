"""Run a whole encoder of transformers on random inputs, to compare its upper blocks with it.

Legend: B inputs, T tokens, D width, CHW the planes of an image.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Probe = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""Function that runs an encoder on random inputs. It returns the last hidden states (B, T, D), and
the mask (B, T), True for tokens."""
_TOKENS = 6


def probe_of_transformers(
    encoder: Any, config: Any, modality: str, image_size: Sequence[int]
) -> Probe:
    """Return the probe of an encoder.

    Args:
        encoder: The encoder of the modality.
        config: Its configuration.
        modality: ``image``, ``text`` or ``joint``.
        image_size: Height and width of an image in pixels; empty takes those of the configuration.
    """

    def run_text(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        padding = int(getattr(config, "pad_token_id", None) or 0)
        ids_BT = torch.randint(config.vocab_size, (2, _TOKENS), generator=draw)
        ids_BT = torch.where(ids_BT == padding, (padding + 1) % config.vocab_size, ids_BT)
        mask_BT = torch.arange(_TOKENS) < torch.tensor([[_TOKENS], [3]])
        ids_BT = torch.where(mask_BT, ids_BT, padding)
        output = encoder(input_ids=ids_BT, attention_mask=mask_BT.long())
        return output.last_hidden_state, mask_BT

    def run_image(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return _unpadded(encoder(pixel_values=_pixels(config, image_size, draw)))

    def run_joint(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return _unpadded(encoder(**_joint_inputs(config, draw)))

    return {"text": run_text, "image": run_image, "joint": run_joint}[modality]


def as_tokens(states: Tensor) -> Tensor:
    """Return hidden states as (B, T, D), the cells of a grid (B, D, rows, columns) row by row."""
    return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


def _pixels(config: Any, image_size: Sequence[int], draw: torch.Generator) -> Tensor:
    """Return one random image: (1, C, H, W)."""
    size = image_size or config.image_size
    sides = [size, size] if isinstance(size, int) else list(size)
    return torch.randn(1, config.num_channels, *sides, generator=draw)


def _joint_inputs(config: Any, draw: torch.Generator) -> dict[str, Tensor]:
    """Return the arguments of the forward pass of an image and a text."""
    if config.model_type == "flava_multimodal_model":  # it takes the states of two encoders
        return {"hidden_states": torch.randn(1, _TOKENS, config.hidden_size, generator=draw)}
    ids_BT = torch.randint(config.vocab_size, (1, _TOKENS), generator=draw)
    if config.model_type == "visual_bert":
        parts = 1, _TOKENS, config.visual_embedding_dim
        return {"input_ids": ids_BT, "visual_embeds": torch.randn(*parts, generator=draw)}
    return {"input_ids": ids_BT, "pixel_values": _pixels(config, (), draw)}


def _unpadded(output: Any) -> tuple[Tensor, Tensor]:
    """Return the last hidden states of an output, and a mask that is True for all tokens."""
    last_BTD = as_tokens(output.last_hidden_state)
    return last_BTD, torch.ones(last_BTD.shape[:2], dtype=torch.bool)
