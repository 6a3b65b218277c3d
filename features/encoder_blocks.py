"""Blocks of the encoders of transformers and open_clip: which modules they are, what follows them.

Extraction at ``layer-K`` stops an encoder after block K, at ``layer-0`` before its first block;
``--tune-blocks`` trains the blocks above.
Both take the modules from here. Nothing here imports torch before a model exists.

Legend: B inputs of a batch, T tokens, D width of a token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderBlocks:
    """Modules of one encoder, from its first block to the tokens of its last layer."""

    library: str
    """Library that defines how a block is called: ``transformers``, ``open_clip`` or ``timm``."""
    blocks: "tuple[nn.Module, ...]" = ()
    """Blocks in the order of the forward pass; empty if the encoder has none of one kind."""
    norm: "nn.Module | None" = None
    """Norm of the tokens after the last block; None if the tokens are not normalized."""
    grid: "nn.Module | None" = None
    """Module that returns the last grid of a convolutional encoder: (B, D, rows, columns)."""
    width: int = 0
    """D."""
    batch_first: bool = True
    """Whether a block returns (B, T, D); else it returns (T, B, D)."""
    causal: bool = False
    """Whether a token attends only to itself and the tokens before it."""
    adds_mask: bool = False
    """Whether a block adds its mask to the attention scores: 0 for a key, the lowest number for
    padding. Else the mask is True for a key."""
    stages: str = ""
    """Model type of an image encoder whose blocks are stages: a stage changes the number of tokens,
    their width, or both. Empty for blocks that keep them."""

    @property
    def last(self) -> "nn.Module":
        """Module that returns the tokens of the last layer."""
        return self.norm or self.grid or self.blocks[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """The blocks of a transformers encoder, and the norm up to its last hidden states.

    Attributes:
        norm: Name of the norm, or empty. CLIP's vision encoder has one after its pooling only.
        causal: See :class:`EncoderBlocks`.
        adds_mask: See :class:`EncoderBlocks`.
        has_stages: Whether the blocks are stages.
    """

    norm: str = ""
    causal: bool = False
    adds_mask: bool = False
    has_stages: bool = False


_LAYOUTS: dict[str, dict[str, _Layout]] = {
    "text": {
        **{kind: _Layout() for kind in ("bert", "roberta", "xlm-roberta", "camembert", "electra")},
        "clip_text_model": _Layout(norm="final_layer_norm", causal=True),
        "groupvit_text_model": _Layout(norm="final_layer_norm", causal=True, adds_mask=True),
        "flava_text_model": _Layout(norm="layernorm", adds_mask=True),
    },
    "image": {
        **{
            kind: _Layout(norm="layernorm")
            for kind in (
                "vit", "deit", "vit_mae", "dinov2", "dinov2_with_registers", "flava_image_model",
            )
        },
        "clip_vision_model": _Layout(),
        "siglip_vision_model": _Layout(norm="post_layernorm"),
        "swin": _Layout(norm="layernorm", has_stages=True),
        "resnet": _Layout(has_stages=True),
        "groupvit_vision_model": _Layout(norm="layernorm", has_stages=True),
    },
    "joint": {
        "vilt": _Layout(norm="layernorm", adds_mask=True),
        "visual_bert": _Layout(adds_mask=True),
        "flava_multimodal_model": _Layout(norm="layernorm", adds_mask=True),
    },
}  # fmt: skip
"""Modality -> model type of transformers -> modules after the blocks.

The table holds the encoders whose blocks need only the states of an item's own tokens, and, for
stages, the rows and columns of their grid. Blocks that share position biases or rotations (MPNet,
DeBERTa, DINOv3), and encoders of texts that attend to their padding (SigLIP), need more and are
left out.
"""


def known_model_types(modality: str) -> tuple[str, ...]:
    """Return the model types of transformers for which :func:`transformers_blocks` has a layout."""
    return tuple(_LAYOUTS.get(modality, ()))


SIDES = {
    "text": ("text",),
    "image": ("vision", "image"),
    "joint": ("multimodal",),
}
"""Modality -> how models of transformers with several encoders prefix the encoder."""


def side_encoder(model: Any, modality: str) -> tuple[Any, Any] | None:
    """Return one encoder of a transformers model that has several, and its configuration.

    Returns:
        Encoder and configuration; None if the model has no separate encoder for the modality.
    """
    for side in SIDES.get(modality, ()):
        encoder = getattr(model, f"{side}_model", None)
        config = getattr(model.config, f"{side}_config", None)
        if encoder is not None and config is not None:
            return encoder, config
    return None


def block_count(config: Any) -> int:
    """Return the number of blocks of a transformers encoder; a stage counts as one block.

    Args:
        config: Configuration of the encoder, as an object or as a document.
    """
    read = config.get if isinstance(config, dict) else partial(getattr, config)
    return len(read("depths", None) or ()) or int(read("num_hidden_layers", None) or 0)


def find_blocks(encoder: "nn.Module", depth: int) -> "tuple[nn.Module, ...]":
    """Return the blocks of a transformers encoder.

    Args:
        encoder: The encoder, or a model that contains it.
        depth: Number of blocks, from :func:`block_count`.

    Returns:
        The modules of the first list of this length; empty if there is none.
    """
    from torch import nn

    for part in encoder.modules():
        if isinstance(part, nn.ModuleList) and len(part) == depth > 0:
            return tuple(part)
    return ()


def transformers_blocks(encoder: Any, config: Any, modality: str) -> EncoderBlocks | None:
    """Return the blocks of a transformers encoder and the norm after them.

    Args:
        encoder: The encoder of the modality.
        config: Its configuration.
        modality: ``image``, ``text`` or ``joint``.

    Returns:
        None if the model type is not one of :func:`known_model_types`.
    """
    layout = _LAYOUTS.get(modality, {}).get(config.model_type)
    if layout is None:
        return None
    blocks = find_blocks(encoder, block_count(config))
    inside = {module for block in blocks for module in block.modules()}
    norms = [
        (name, module)
        for name, module in encoder.named_modules()
        if name and name.rpartition(".")[2] == layout.norm and module not in inside
    ]
    return EncoderBlocks(
        library="transformers",
        blocks=blocks,
        norm=min(norms, key=lambda pair: pair[0].count("."))[1] if layout.norm else None,
        width=int(getattr(config, "hidden_size", 0) or config.hidden_sizes[-1]),
        causal=layout.causal,
        adds_mask=layout.adds_mask,
        stages=config.model_type if layout.has_stages else "",
    )


def open_clip_blocks(model: Any, modality: str) -> EncoderBlocks | None:
    """Return the blocks of one of the two encoders of an open_clip model.

    Args:
        model: The whole model.
        modality: ``image`` or ``text``.

    Returns:
        None if the encoder is of a kind whose tokens are unknown here.
    """
    return _open_clip_text(model) if modality == "text" else _open_clip_image(model.visual)


def _open_clip_text(model: Any) -> EncoderBlocks | None:
    encoder = getattr(model, "text", model)
    transformer = getattr(encoder, "transformer", None)
    has_class_token = getattr(encoder, "cls_emb", None) is not None
    if has_class_token or not hasattr(encoder, "ln_final") or not hasattr(transformer, "resblocks"):
        return None
    assert transformer is not None
    return EncoderBlocks(
        library="open_clip",
        blocks=tuple(transformer.resblocks),
        norm=encoder.ln_final,
        width=transformer.width,
        batch_first=transformer.batch_first,
        causal=getattr(encoder, "attn_mask", None) is not None,
    )


def _open_clip_image(encoder: Any) -> EncoderBlocks | None:
    import timm
    from open_clip.modified_resnet import ModifiedResNet
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if isinstance(encoder, VisionTransformer):
        transformer: Any = encoder.transformer
        # With attention pooling, or a norm after the pooling, the norm is not applied to tokens.
        is_normed = encoder.attn_pool is None and not encoder.final_ln_after_pool
        return EncoderBlocks(
            library="open_clip",
            blocks=tuple(transformer.resblocks),
            norm=encoder.ln_post if is_normed else None,
            width=transformer.width,
            batch_first=transformer.batch_first,
        )
    if isinstance(encoder, ModifiedResNet):
        grid: Any = encoder.layer4
        return EncoderBlocks(library="open_clip", grid=grid, width=int(grid[-1].bn3.num_features))
    if isinstance(encoder, TimmModel) and isinstance(encoder.trunk, timm.models.VisionTransformer):
        trunk: Any = encoder.trunk
        return EncoderBlocks(
            library="timm", blocks=tuple(trunk.blocks), norm=trunk.norm, width=trunk.embed_dim
        )
    return None


# -- running an encoder -----------------------------------------------------------------------


def states_of(output: Any) -> "Tensor":
    """Return the hidden states in the output of a block: some kinds of block return a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states


class _BlockReachedError(Exception):
    """Ends a forward pass at a module, and carries the hidden states there."""

    def __init__(self, states: "Tensor") -> None:
        super().__init__()
        self.states = states


def stop_after(module: "nn.Module", run: Callable[[], Any]) -> "Tensor":
    """Run a forward pass up to the end of one of its modules; return that module's output.

    Args:
        module: A module of the model.
        run: Runs the forward pass of the model.
    """

    def stop(module: "nn.Module", given: Any, output: Any) -> None:
        raise _BlockReachedError(states_of(output))

    hook = module.register_forward_hook(stop)
    try:
        run()
    except _BlockReachedError as reached:
        return reached.states
    finally:
        hook.remove()
    raise AssertionError("the forward pass does not reach this module")


def stop_before(module: "nn.Module", run: Callable[[], Any]) -> "Tensor":
    """Run a forward pass up to one of its modules; return the hidden states that it would take.

    Args:
        module: A module of the model.
        run: Runs the forward pass of the model.
    """

    def stop(module: "nn.Module", inputs: Any, options: Any) -> None:
        raise _BlockReachedError(_states_in(inputs, options))

    hook = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except _BlockReachedError as reached:
        return reached.states
    finally:
        hook.remove()
    raise AssertionError("the forward pass does not reach this module")


def _states_in(inputs: Any, options: Any) -> "Tensor":
    """Return the hidden states in the arguments of a block."""
    states: Tensor = inputs[0] if inputs else options["hidden_states"]
    return states


@contextmanager
def recorded_states(module: "nn.Module") -> "Iterator[list[Tensor]]":
    """Record what a module returns in forward passes that run to their end.

    Yields:
        A list to which each forward pass appends the hidden states that the module returned.
    """
    recorded: list[Tensor] = []

    def record(module: "nn.Module", given: Any, output: Any) -> None:
        recorded.append(states_of(output))

    hook = module.register_forward_hook(record)
    try:
        yield recorded
    finally:
        hook.remove()


@contextmanager
def recorded_inputs(module: "nn.Module") -> "Iterator[list[Tensor]]":
    """Record what a module takes in forward passes that run to their end.

    Yields:
        A list to which each forward pass appends the hidden states that the module took.
    """
    recorded: list[Tensor] = []

    def record(module: "nn.Module", inputs: Any, options: Any) -> None:
        recorded.append(_states_in(inputs, options))

    hook = module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield recorded
    finally:
        hook.remove()
