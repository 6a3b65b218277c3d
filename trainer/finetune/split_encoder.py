"""How encoders of transformers and open_clip are cut behind one of their blocks.

Only kinds that are known here are cut: those whose blocks need nothing but the states of an item's
own tokens. Blocks that share position biases or rotations (MPNet, DeBERTa, DINOv3), windows (Swin),
and texts whose padding takes part (SigLIP) are refused by name.

Legend: B items, T tokens, D width.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from features.checkpoint_fingerprint import fingerprint, stored_config
from features.errors import UserError
from trainer.finetune.upper_blocks import OpenClipBlocks, UpperBlocks

LIBRARIES = ("transformers", "open_clip")
_NEAR = 1e-4
_PROBE_TOKENS = 6


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """What stands above the blocks of a transformers encoder, as far as its last hidden states."""

    norm: str = ""
    """Name of the norm behind them; CLIP's vision tower has one behind its pooling only."""
    causal: bool = False


_LAYOUTS: dict[str, dict[str, _Layout]] = {
    "text": {
        **{kind: _Layout() for kind in ("bert", "roberta", "xlm-roberta", "camembert", "electra")},
        "clip_text_model": _Layout(norm="final_layer_norm", causal=True),
    },
    "image": {
        **{
            kind: _Layout(norm="layernorm")
            for kind in ("vit", "deit", "vit_mae", "dinov2", "dinov2_with_registers")
        },
        "clip_vision_model": _Layout(),
        "siglip_vision_model": _Layout(norm="post_layernorm"),
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """One encoder of a library's model, as far as its last hidden states."""

    blocks: list[nn.Module]
    norm: nn.Module | None
    causal: bool
    probe: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    """Runs it on something drawn: last hidden states (B, T, D), and (B, T) which tokens exist."""
    form: type[UpperBlocks]

    def above(self, cut: int, document: Mapping[str, Any]) -> UpperBlocks:
        """The blocks above the first ``cut`` ones."""
        padded = document["modality"] == "text"
        return self.form(
            self.blocks[cut:], self.norm, causal=self.causal, padded=padded, document=document
        )

    @torch.no_grad()
    def gives(self, upper: UpperBlocks, cut: int) -> bool:
        """Whether the upper blocks make the last hidden states of what the lower ones give.

        Libraries change, and what they compute around their blocks is known here by name only.
        """
        seen: list[Tensor] = []

        def keep(module: nn.Module, given: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        hook = self.blocks[cut - 1].register_forward_hook(keep)
        with torch.random.fork_rng(devices=[]):  # a masked autoencoder draws its patches
            last_BTD, mask_BT = self.probe(torch.Generator().manual_seed(0))
        hook.remove()
        found_BTD = upper(seen[0], mask_BT)
        most = _NEAR * max(1.0, float(last_BTD.abs().max()))
        return bool(((found_BTD - last_BTD)[mask_BT].abs() < most).all())


def load(library: str, source: Mapping[str, Any]) -> tuple[Any, dict[str, Any], str]:
    """Load a whole model from where a table's manifest says.

    Returns:
        The model on the CPU in float32, what builds it again, and the fingerprint of its weights.
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
    local: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    model, found = transformers.AutoModel.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
        **local,
    )
    known = stored_config(folder)
    checkpoint = fingerprint(model.state_dict(), known, list(found["missing_keys"]))
    return model.eval(), json.loads(model.config.to_json_string(use_diff=False)), checkpoint


def build(document: Mapping[str, Any]) -> UpperBlocks:
    """Build upper blocks again from their document, without weights: all zeros, on the CPU."""
    config, modality = document["config"], document["modality"]
    with torch.device("meta"):
        if document["library"] == "open_clip":
            from open_clip.model import CLIP, CustomTextCLIP

            given = {key: value for key, value in config.items() if key != "custom_text"}
            whole: Any = (CustomTextCLIP if config.get("custom_text") else CLIP)(**given)
        else:
            import transformers

            models: Any = transformers.AutoModel
            made = transformers.AutoConfig.for_model(**config)
            whole = models.from_config(made, attn_implementation="sdpa")
    encoder = find(whole, document["library"], modality)
    upper = encoder.above(document["cut"], document).to_empty(device="cpu")
    for tensor in upper.state_dict().values():
        tensor.zero_()
    return upper


def find(whole: Any, library: str, modality: str) -> Encoder:
    """Find the encoder of a modality.

    Raises:
        UserError: It is of no kind that is known here.
    """
    return (_of_open_clip if library == "open_clip" else _of_transformers)(whole, modality)


def _of_transformers(whole: Any, modality: str) -> Encoder:
    side = "text" if modality == "text" else "vision"
    tower: Any = getattr(whole, f"{side}_model", None)
    config = getattr(whole.config, f"{side}_config", None)
    if tower is None or config is None:
        tower, config = whole, whole.config
    known = _LAYOUTS.get(modality, {})
    if config.model_type not in known:
        raise UserError(
            f"tune_blocks: the upper blocks of {config.model_type!r} cannot be trained on a table"
            f" of {modality} tokens; known: {', '.join(known) or 'none'}, and towers of open_clip"
        )
    layout = known[config.model_type]
    blocks = next(
        list(part)
        for part in tower.modules()
        if isinstance(part, nn.ModuleList) and len(part) == config.num_hidden_layers
    )
    inside = {module for block in blocks for module in block.modules()}
    norms = [
        module
        for name, module in tower.named_modules()
        if name.rpartition(".")[2] == layout.norm and module not in inside and name
    ]

    def read(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        padding = int(getattr(config, "pad_token_id", None) or 0)
        ids_BT = torch.randint(config.vocab_size, (2, _PROBE_TOKENS), generator=draw)
        ids_BT = torch.where(ids_BT == padding, (padding + 1) % config.vocab_size, ids_BT)
        mask_BT = torch.arange(_PROBE_TOKENS) < torch.tensor([[_PROBE_TOKENS], [3]])
        ids_BT = torch.where(mask_BT, ids_BT, padding)
        output = tower(input_ids=ids_BT, attention_mask=mask_BT.long())
        return output.last_hidden_state, mask_BT

    def see(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        size = config.image_size
        sides = [size, size] if isinstance(size, int) else list(size)
        pixels = torch.randn(1, config.num_channels, *sides, generator=draw)
        last_BTD = tower(pixel_values=pixels).last_hidden_state
        return last_BTD, torch.ones(last_BTD.shape[:2], dtype=torch.bool)

    return Encoder(
        blocks=blocks,
        norm=norms[0] if layout.norm else None,
        causal=layout.causal,
        probe=read if modality == "text" else see,
        form=UpperBlocks,
    )


def _of_open_clip(whole: Any, modality: str) -> Encoder:
    tower = getattr(whole, "text", whole) if modality == "text" else whole.visual
    inner: Any = getattr(tower, "transformer", None)
    blocks = list(getattr(inner, "resblocks", []))
    if modality == "text":  # a text that sees its padding is not whole in a table of its own tokens
        causal = getattr(tower, "attn_mask", None) is not None
        plain = getattr(tower, "cls_emb", None) is None
        fits, norm = causal and plain, getattr(tower, "ln_final", None)
    else:
        fits, norm = hasattr(tower, "ln_post"), None
        if fits and tower.attn_pool is None and not tower.final_ln_after_pool:
            norm = tower.ln_post
    if not (blocks and fits and inner.batch_first):  # the default of all its towers
        raise UserError(
            f"tune_blocks: the upper blocks of open_clip's {type(tower).__name__} cannot be trained"
            f" on a table of {modality} tokens; known: its own transformers, of texts causal ones"
        )

    def run(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        last = blocks[-1] if norm is None else norm
        hook = last.register_forward_hook(lambda module, given, output: seen.append(output))
        if modality == "text":
            shape = 1, tower.context_length
            whole.encode_text(torch.randint(tower.vocab_size, shape, generator=draw))
        else:
            whole.encode_image(torch.randn(1, 3, *tower.image_size, generator=draw))
        hook.remove()
        return seen[0], torch.ones(seen[0].shape[:2], dtype=torch.bool)

    return Encoder(
        blocks=blocks, norm=norm, causal=modality == "text", probe=run, form=OpenClipBlocks
    )
