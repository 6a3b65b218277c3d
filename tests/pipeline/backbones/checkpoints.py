"""Tiny checkpoints with random weights, saved in the libraries' own formats."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file

from pipeline.backbones.entries import BackboneEntry

CLIP_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
_TEXT: dict[str, Any] = {
    "vocab_size": 57, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip


SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2],
    "window_size": 4,
}  # fmt: skip
RESNET: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
SIDE = {"height": 32, "width": 32}


def open_clip_folder(folder: Path, *, seed: int = 0, **changed: Any) -> Path:
    """A CLIP with its configuration, as ``open_clip.push_to_hf_hub`` lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CLIP_CONFIG, **changed}
    torch.manual_seed(seed)
    weights = CLIP(**copy.deepcopy(config)).state_dict()
    for name, tensor in weights.items():
        if ".bn" in name and tensor.is_floating_point():  # a new ResNet gives nearly nothing
            tensor.add_(torch.rand_like(tensor))
    save_file(weights, folder / "open_clip_model.safetensors")
    look = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    document = {"model_cfg": config, "preprocess_cfg": look}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    return folder


def siglip_folder(folder: Path) -> Path:
    """SigLIP as open_clip builds it: a timm encoder, a tokenizer that pads, no causal mask."""
    folder.mkdir(parents=True)
    config = {
        "embed_dim": 64, "custom_text": True, "init_logit_bias": -10,
        "vision_cfg": {"image_size": 32, "timm_model_name": "test_vit", "timm_model_pretrained":
                       False, "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {"context_length": 24, "vocab_size": 60, "hf_tokenizer_name": str(folder),
                     "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 32, "heads": 2,
                     "layers": 3, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    }  # fmt: skip
    torch.manual_seed(0)
    made = CustomTextCLIP(
        **{key: value for key, value in json.loads(json.dumps(config)).items() if key[:2] != "cu"}
    )
    save_file(made.state_dict(), folder / "open_clip_model.safetensors")
    document = {"model_cfg": config, "preprocess_cfg": {"resize_mode": "squash"}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    bert_folder(folder / "words")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((folder / "words" / name).read_bytes())
    return folder


def bert_folder(folder: Path, *, seed: int = 0, kind: str = "Bert", **changed: Any) -> Path:
    """A text encoder of ``kind`` with a tokenizer that spells."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**{**_TEXT, **changed})
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def vision_folder(
    folder: Path, *, kind: str = "ViT", seed: int = 0, processor: Any = None, **changed: Any
) -> Path:
    """A vision encoder of ``kind``."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(**(changed or _VISION))
    model = getattr(transformers, f"{kind}Model")(config)
    for tensor in model.state_dict().values():  # running statistics that are not 0 and 1
        if tensor.is_floating_point() and "ResNet" in kind:
            tensor.add_(torch.rand_like(tensor) * 0.1)
    model.save_pretrained(folder)
    (processor or transformers.ViTImageProcessor(size=SIDE)).save_pretrained(folder)
    return folder


def clip_folder(folder: Path, *, kind: str = "CLIP", seed: int = 0) -> Path:
    """A two-tower model in the format of transformers."""
    torch.manual_seed(seed)
    text = {**_TEXT, "eos_token_id": 3, "bos_token_id": 2}
    vision = dict(_VISION)
    more: dict[str, Any] = {} if kind == "Siglip" else {"projection_dim": 24}
    if kind == "Siglip":
        text["projection_size"] = 32
    if kind == "GroupViT":
        vision |= {"depths": [1, 1, 1], "num_group_tokens": [8, 4, 0],
                   "num_output_groups": [8, 4, 4], "num_hidden_layers": 12}  # fmt: skip
        more |= {"projection_intermediate_dim": 40}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(folder)
    if kind == "Siglip":
        transformers.SiglipImageProcessor(size=SIDE).save_pretrained(folder)
    else:
        transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SIDE).save_pretrained(
            folder
        )
    _tokenizer(folder)
    return folder


def flava_folder(folder: Path, *, seed: int = 0) -> Path:
    """FLAVA: three encoders."""
    torch.manual_seed(seed)
    over = {key: value for key, value in _VISION.items() if key not in ("image_size", "patch_size")}
    config = transformers.FlavaConfig(
        text_config=_TEXT, image_config=_VISION, multimodal_config=over, hidden_size=32,
        projection_dim=24,
    )  # fmt: skip
    transformers.FlavaModel(config).save_pretrained(folder)
    transformers.FlavaImageProcessor(size=SIDE, crop_size=SIDE).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def vilt_folder(folder: Path, *, seed: int = 0) -> Path:
    """ViLT: one encoder, pictures of any shape."""
    torch.manual_seed(seed)
    transformers.ViltModel(transformers.ViltConfig(**{**_TEXT, **_VISION})).save_pretrained(folder)
    steps: dict[str, Any] = {"size": {"shortest_edge": 32}, "size_divisor": 8}
    transformers.ViltImageProcessor(**steps).save_pretrained(folder)
    _tokenizer(folder)
    return folder


def visualbert_folder(folder: Path, *, seed: int = 0, width: int = 16) -> Path:
    """VisualBERT with its tokenizer; whoever looks at its pictures is not in it."""
    torch.manual_seed(seed)
    config = transformers.VisualBertConfig(**_TEXT, visual_embedding_dim=width)
    transformers.VisualBertModel(config).save_pretrained(folder)
    _tokenizer(folder)
    return folder


TIMM: dict[str, dict[str, Any]] = {
    "test_efficientnet": {},
    "test_resnet": {},
    "test_convnext": {},
    "test_vit": {"img_size": 32, "patch_size": 8},
    "swin_tiny_patch4_window7_224": {
        "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (1, 1, 2),
        "num_heads": (1, 2, 2),
    },
}  # fmt: skip
"""Architecture of timm -> arguments that make it tiny: convolutions, blocks, channels last."""


def timm_model(arch: str, *, seed: int = 0) -> Any:
    """A tiny timm model with random weights and running statistics, for images of 32 pixels."""
    import timm

    torch.manual_seed(seed)
    overlay = {"input_size": (3, 32, 32), "crop_pct": 0.8}
    arguments: dict[str, Any] = TIMM[arch]
    model: Any = timm.create_model(arch, num_classes=7, pretrained_cfg_overlay=overlay, **arguments)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            shift = 0.0 if "running_var" in name else 0.5
            tensor.add_((torch.rand_like(tensor) - shift) * 0.2)
    return model.eval()


def timm_folder(folder: Path, arch: str = "test_efficientnet", *, seed: int = 0) -> Path:
    """A timm model, as timm saves it for the hub."""
    import timm

    model = timm_model(arch, seed=seed)
    save: Any = timm.models.save_for_hf
    save(model, folder, model_args=TIMM[arch], safe_serialization=True)
    return folder


def sentence_folder(folder: Path, *, dense: int = 0, seed: int = 0, **changed: Any) -> Path:
    """A sentence-transformers model: BERT, mean, a dense layer if asked for, unit length."""
    sentence_transformers = pytest.importorskip(
        "sentence_transformers", reason="the extra offline is not installed"
    )
    from sentence_transformers.base import modules as layers
    from sentence_transformers.sentence_transformer.modules import Pooling

    bert_folder(folder.with_name(f"{folder.name}-bert"), seed=seed)
    transformer = layers.Transformer(
        str(folder.with_name(f"{folder.name}-bert")), max_seq_length=24
    )
    modules: list[Any] = [transformer, Pooling(32, pooling_mode=changed.pop("mode", "mean"))]
    if dense:
        modules.append(layers.Dense(32, dense))
    modules.append(layers.Normalize())
    model = sentence_transformers.SentenceTransformer(modules=modules, device="cpu", **changed)
    model.save(str(folder), create_model_card=False)
    return folder


def tiny_folder(folder: Path, model_type: str, modalities: tuple[str, ...]) -> Path:
    """A tiny model of any model type of transformers."""
    if model_type == "groupvit":
        return clip_folder(folder, kind="GroupViT")
    if model_type in ("flava", "vilt"):
        return {"flava": flava_folder, "vilt": vilt_folder}[model_type](folder)
    config = transformers.AutoConfig.for_model(model_type)
    kind = type(config).__name__.removesuffix("Config")
    if modalities == ("text",):
        return bert_folder(folder, kind=kind)
    sizes = {**SWIN, **RESNET} if hasattr(config, "depths") else _VISION  # of stages, or of blocks
    return vision_folder(
        folder, kind=kind, **{key: size for key, size in sizes.items() if hasattr(config, key)}
    )


def cached_folder(cache: Path, repository: str) -> Path:
    """The folder in which a cache like the hub's keeps a repository."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    return folder / "snapshots" / "abc"


def fill_cache(cache: Path, entry: BackboneEntry) -> Path:
    """Put tiny checkpoints into a cache like the hub's: all that an entry of the registry needs."""
    folder = cached_folder(cache, entry.hub)
    if entry.library == "open_clip":
        (siglip_folder if "SigLIP" in entry.checkpoint else open_clip_folder)(folder)
        return folder
    if entry.model_type != "visual_bert":
        tiny_folder(folder, entry.model_type, entry.modalities)
        return folder
    (vision,) = entry.other_weights
    kind = "resnet" if "resnet" in vision else "vit"
    tiny_folder(cached_folder(cache, vision), kind, ("image", "video"))
    visualbert_folder(folder, width=16 if kind == "resnet" else 32)
    bert_folder(cached_folder(cache, entry.tokenizer))
    return folder


def _tokenizer(folder: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_LETTERS, *(f"##{c}" for c in _LETTERS)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
