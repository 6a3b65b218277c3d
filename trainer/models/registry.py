"""The table of recommenders: a new one is one file and one line here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from features.errors import unknown


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrain:
    """How a recommender is pre-trained by ``mmrec pretrain``."""

    kind: str
    """``items``: the modalities of items, one by one; ``windows``: training histories."""
    settings: Mapping[str, Any]
    """Settings of the loop and the recommender whose defaults differ there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One recommender: what it is, and how to load its classes when they are needed."""

    summary: str
    needs_features: bool
    load: Callable[[], tuple[Any, Any]]
    """Gives (configuration class, recommender class); imports torch."""
    train: Mapping[str, Any]
    """Settings of the loop whose defaults differ for this recommender."""
    reads_tokens: bool = False
    """Whether it can learn from tables of tokens, not only from pooled vectors."""
    pretrain: Pretrain | None = None
    """``None``: it has no pre-training."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """What the paper compares it with, published forms, and forms that fare well, to the words that
    ask for them."""


def _sasrec() -> tuple[Any, Any]:
    from trainer.models.sasrec import SASRec, SASRecConfig

    return SASRecConfig, SASRec


def _mmsrec() -> tuple[Any, Any]:
    from trainer.models.mmsrec import MMSRec, MMSRecConfig

    return MMSRecConfig, MMSRec


def _idsr() -> tuple[Any, Any]:
    from trainer.models.mmsr import IDSR, IDSRConfig

    return IDSRConfig, IDSR


def _mmsr() -> tuple[Any, Any]:
    from trainer.models.mmsr import MMSR, MMSRConfig

    return MMSRConfig, MMSR


def _pmmrec() -> tuple[Any, Any]:
    from trainer.models.pmmrec import PMMRec, PMMRecConfig

    return PMMRecConfig, PMMRec


MODELS: dict[str, Model] = {
    "sasrec": Model(
        summary="item ids, causal transformer, full softmax: the baseline",
        needs_features=False,
        load=_sasrec,
        # Chosen on the validation split of ml-100k.
        train={"lr": 2e-3, "epochs": 40, "schedule": "cosine", "monitor": "NDCG@10"},
        variants={"on cosines, as mmsrec": "--set score=cosine --set temperature=0.07"},
    ),
    "mmsrec": Model(
        summary="vision and text, one encoder for items and sequences, masked item prediction",
        needs_features=True,
        load=_mmsrec,
        # Each step encodes the catalogue once, whatever the batch: larger ones pay.
        train={"batch_size": 256},
        variants={
            "without vision": "--features text",
            "without text": "--features image",
            "without pre-training": "no --init",
            "sparser or denser data": "mmrec prepare --name NAME --k-core 4..7",
            "as the paper's missing modality": "--set missing=mask",
            "as the released code masks": "--set corruption=81-9-10",
            "next item, not the Cloze task": "--set objective=next",
            "with ids, features whitened": "--set ids=true --set whiten=true",
            "pre-training as published": (
                "--set lr=5e-5 --set batch_size=48000 --set epochs=15 --set duplicates=keep"
            ),
        },
        pretrain=Pretrain(
            kind="items",
            settings={
                "lr": 5e-4,
                "batch_size": 1024,
                "epochs": 50,
                "schedule": "exponential",
                "monitor": "MRR",
            },
        ),
    ),
    "idsr": Model(
        summary="item ids; sequence tower and loss as in mmsr, to compare with",
        needs_features=False,
        load=_idsr,
        train={},
    ),
    "mmsr": Model(
        summary="any modalities or tokens; fusion, sequence tower and loss are settings",
        needs_features=True,
        load=_mmsr,
        train={},
        reads_tokens=True,
        variants={
            "from item ids": "mmrec train --model idsr",
            "as published": "--set loss=bce --set score=dot --set dim=768 --set fusion_heads=12",
            "as the released code fuses": (
                "--set token_types=false --set shared_norm=true --set dnn_relu=true"
            ),
            "GRU of the paper": "--set tower=gru --set layers=4",
            "top blocks fine-tuned": "--set tune_blocks=2, tables layer-K, K = blocks - 2",
        },
    ),
    "pmmrec": Model(
        summary="any modalities or tokens, merge-attention, causal tower; made to be transferred",
        needs_features=True,
        load=_pmmrec,
        train={},
        reads_tokens=True,
        variants={
            "top blocks fine-tuned": "--set tune_blocks=2, tables layer-K, K = blocks - 2",
            "rates of the released code": (
                "--set lr=1e-4 --set tune_lr=1e-4 --set weight_decay=0.1"
            ),
            "Table VIII": "--set align=none|vcl|icl|ncl, --set nid=false, --set rcl=false",
            "the paper's item (Eq. 3)": "--set pool=cls",
            "the released code's item": "--set token_types=false",
            "the paper's DAP (Eq. 5)": "--set debias=false",
            "NICL to the letter (Eq. 8)": "--set align_temperature=1 --set align_literal=true",
            "NID to the letter (Eq. 10)": "--set nid_relu=true",
            "RCL to the letter (Eq. 11)": "--set rcl_cosine=false --set rcl_temperature=1",
        },
        pretrain=Pretrain(kind="windows", settings={"align": "nicl", "nid": True, "rcl": True}),
    ),
}


def find_model(name: str) -> Model:
    """Look a recommender up.

    Raises:
        UserError: There is none of that name.
    """
    if name not in MODELS:
        raise unknown("model", name, list(MODELS))
    return MODELS[name]
