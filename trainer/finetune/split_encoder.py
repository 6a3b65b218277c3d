"""Split encoders of transformers and open_clip below one of their blocks, for training.

The blocks come from :mod:`features.encoder_blocks`. An encoder is split only if its upper blocks
need nothing but the states of an item's own tokens; other kinds are refused by name.

Legend: B items, T tokens, D width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.checkpoint_fingerprint import fingerprint, stored_config
from features.checkpoint_paths import check_shards
from features.encoder_blocks import (
    EncoderBlocks,
    known_model_types,
    open_clip_blocks,
    recorded_inputs,
    recorded_states,
    side_encoder,
    transformers_blocks,
)
from features.errors import UserError
from trainer.finetune.probes import Probe, as_tokens, probe_of_transformers
from trainer.finetune.stages import STAGES, grid_below
from trainer.finetune.upper_blocks import AddedMaskBlocks, OpenClipBlocks, UpperBlocks

LIBRARIES = ("transformers", "open_clip")
_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitEncoder:
    """One encoder of a library's model, up to its last hidden states."""

    encoder: EncoderBlocks
    probe: Probe
    config: Any = None
    """Configuration of the encoder, if it is one of transformers."""
    image_size: tuple[int, ...] = ()
    """Height and width of the images in pixels; empty if they are unknown."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.encoder.blocks)

    def grid(self, cut: int) -> tuple[int, ...]:
        """Return the rows and columns of the states after block ``cut``; empty without stages."""
        return grid_below(self.encoder, self.config, cut, self.image_size)

    def above(self, cut: int, document: Mapping[str, Any]) -> UpperBlocks:
        """Return the blocks above the first ``cut`` ones.

        Args:
            cut: Number of blocks that stay frozen.
            document: Description of the blocks, see :func:`build`.
        """
        kind: type[UpperBlocks] = UpperBlocks
        if self.encoder.stages:
            kind = STAGES[self.encoder.stages]
        elif self.encoder.library == "open_clip":
            kind = OpenClipBlocks
        elif self.encoder.adds_mask:
            kind = AddedMaskBlocks
        return kind(self.encoder, cut, document)

    @torch.no_grad()
    def matches(self, upper: UpperBlocks, cut: int) -> bool:
        """Return whether upper blocks turn the states after block ``cut`` into the last states.

        A new version of a library may compute something else around its blocks.
        """
        with (
            recorded_inputs(self.encoder.blocks[cut]) as states,
            torch.random.fork_rng(devices=[]),  # a masked autoencoder draws its patches
        ):
            last_BTD, mask_BT = self.probe(torch.Generator().manual_seed(0))
        states_BTD = as_tokens(states[0])
        if mask_BT.shape != states_BTD.shape[:2]:  # of stages: all tokens, of another number
            mask_BT = torch.ones(states_BTD.shape[:2], dtype=torch.bool)
        upper_BTD, mask_BT = upper(states_BTD, mask_BT)
        limit = _TOLERANCE * max(1.0, float(last_BTD.abs().max()))
        return bool(((upper_BTD - last_BTD)[mask_BT].abs() < limit).all())


def load(library: str, source: Mapping[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """Load the whole model of a feature table.

    Args:
        library: ``transformers`` or ``open_clip``.
        source: Location of the checkpoint, from the table's manifest.

    Returns:
        The model on the CPU in float32, the configuration that builds it again, and the
        fingerprint of its weights.
    """
    if library == "open_clip":
        import open_clip

        config = dict(source["config"])
        model = open_clip.create_model(
            source["model"],
            pretrained=source["weights"] or None,
            require_pretrained=True,
            weights_only=True,
            force_quick_gelu=bool(config.get("quick_gelu")),
        )
        return model.eval(), config, fingerprint(model.state_dict(), config)
    import transformers

    folder = Path(source["folder"])
    check_shards(folder)
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    model, report = transformers.AutoModel.from_pretrained(
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        **local,
    )
    stored = stored_config(folder)
    checkpoint = fingerprint(model.state_dict(), stored, list(report["missing_keys"]))
    return model.eval(), json.loads(model.config.to_json_string(use_diff=False)), checkpoint


def build(document: Mapping[str, Any]) -> UpperBlocks:
    """Build upper blocks from their description, on the CPU; all weights are zero.

    Args:
        document: ``library``, ``modality``, ``cut`` (number of frozen blocks), ``config`` (of the
            whole model) and ``grid`` (rows and columns of the states below stages), as a run's
            ``blocks.json`` stores them.
    """
    upper = _build_on("meta", document).to_empty(device="cpu")
    # Swin computes buffers that no checkpoint stores, which a meta device does not hold.
    if {name for name, _ in upper.named_buffers()} - upper.state_dict().keys():
        upper = _build_on("cpu", document)
    for tensor in upper.state_dict().values():
        tensor.zero_()
    return upper


def _build_on(device: str, document: Mapping[str, Any]) -> UpperBlocks:
    config, modality = document["config"], document["modality"]
    with torch.device(device):
        if document["library"] == "open_clip":
            from open_clip.model import CLIP, CustomTextCLIP

            arguments = {key: value for key, value in config.items() if key != "custom_text"}
            model: Any = (CustomTextCLIP if config.get("custom_text") else CLIP)(**arguments)
        else:
            import transformers

            models: Any = transformers.AutoModel
            model_config = transformers.AutoConfig.for_model(**config)
            model = models.from_config(model_config)
    return find_encoder(model, document["library"], modality).above(document["cut"], document)


def find_encoder(
    model: Any, library: str, modality: str, image_size: Sequence[int] | None = None
) -> SplitEncoder:
    """Return the encoder of a modality.

    Args:
        model: The whole model.
        library: ``transformers`` or ``open_clip``.
        modality: ``image``, ``text`` or ``joint``.
        image_size: Height and width of all images in pixels; None if they are unknown.

    Raises:
        UserError: The blocks of this kind of encoder cannot be trained on a table.
    """
    find = _of_open_clip if library == "open_clip" else _of_transformers
    return find(model, modality, image_size)


def _of_transformers(model: Any, modality: str, image_size: Sequence[int] | None) -> SplitEncoder:
    encoder, config = side_encoder(model, modality) or (model, model.config)
    blocks = transformers_blocks(encoder, config, modality)
    if blocks is None:
        known = ", ".join(known_model_types(modality)) or "none"
        raise UserError(
            f"tune_blocks: the upper blocks of {config.model_type!r} cannot be trained on a table"
            f" of {modality} tokens; known: {known}, and encoders of open_clip"
        )
    sides = tuple(image_size or ())
    probe = probe_of_transformers(encoder, config, modality, sides)
    return SplitEncoder(encoder=blocks, probe=probe, config=config, image_size=sides)


def _of_open_clip(model: Any, modality: str, image_size: Sequence[int] | None) -> SplitEncoder:
    encoder = getattr(model, "text", model) if modality == "text" else model.visual
    blocks = open_clip_blocks(model, modality)
    is_own = blocks is not None and blocks.library == "open_clip" and len(blocks.blocks) > 0
    # A text that attends to its padding is incomplete in a table of its own tokens.
    if (
        blocks is None
        or not is_own
        or not blocks.batch_first
        or (modality == "text" and not blocks.causal)
    ):
        raise UserError(
            f"tune_blocks: the upper blocks of open_clip's {type(encoder).__name__} cannot be"
            f" trained on a table of {modality} tokens; known: its own transformers, of texts"
            " causal ones"
        )

    def run(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        with recorded_states(blocks.last) as states:
            if modality == "text":
                shape = 1, encoder.context_length
                model.encode_text(torch.randint(encoder.vocab_size, shape, generator=draw))
            else:
                model.encode_image(torch.randn(1, 3, *encoder.image_size, generator=draw))
        return states[0], torch.ones(states[0].shape[:2], dtype=torch.bool)

    return SplitEncoder(encoder=blocks, probe=run)
