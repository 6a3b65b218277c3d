"""The settings that :mod:`tests.benchmarks.equal_versions` trains in both versions.

Settings are written in the words of the version before. The tables at the top say what this version
calls them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# What this version calls a setting of the version before. A key is "key" or "key=value", with
# "MODEL:" before it where it holds for one recommender only; a value of None drops the setting.
RENAMED_SETTINGS: dict[str, str | None] = {
    "monitor_seen=masked": "monitor_seen=filtered",
    "monitor_seen=unmasked": "monitor_seen=kept",
    "idsr:tower": "sequence_encoder",
    "mmsr:tower": "sequence_encoder",
    "mmsrec:length=8": "length=7",
    "pmmrec:cosine=true": "score=cosine",
    "pmmrec:cosine=false": "score=dot",
}
# Settings of this version whose defaults are not what the version before did; given values win.
FORMER_DEFAULTS: dict[str, dict[str, str]] = {
    "idsr": {"score": "scaled", "temperature": "1"},
    "mmsr": {"score": "scaled", "temperature": "1", "centre": "false"},
    "pmmrec": {"score": "dot", "temperature": "1", "centre": "false"},
}
# What this version calls a parameter or buffer of the version before: model, pattern, replacement.
RENAMED_PARAMETERS: list[tuple[str, str, str]] = [
    ("sasrec", r"^item\.", "item_encoder."),
    ("sasrec", r"^(position|norm|transformer)\.", r"sequence_encoder.\1."),
    ("idsr", r"^(item|sequence)_tower\.", r"\1_encoder."),
    ("mmsr", r"^(item|sequence)_tower\.", r"\1_encoder."),
    ("pmmrec", r"^item_tower\.(text|image|video|joint)\.", r"item_encoder.inputs.\1."),
    ("pmmrec", r"^item_tower\.", "item_encoder."),
    ("pmmrec", r"^user_encoder\.", "sequence_encoder."),
]
# Constants of modules that bound the size of a block, and where this version has them.
LIMITS: dict[str, str] = {
    "trainer.mmsrec._NUMBERS_IN_ALL": "trainer.modules.chunked_encoding._LEAST_ELEMENTS",
    "trainer.mmsrec._NUMBERS_AT_ONCE": "trainer.modules.chunked_encoding._CHUNK_ELEMENTS",
    "trainer.mmsr._TOKENS_AT_ONCE": "trainer.models.causal._TOKENS_PER_CHUNK",
    "trainer.objectives._BLOCK_BYTES": "trainer.losses.softmax._BLOCK_BYTES",
    "trainer.objectives._FEWEST_ROWS": "trainer.losses.softmax._FEWEST_ROWS",
    "trainer.score_blocks._BLOCK_BYTES": "trainer.losses.chunked_scores._BLOCK_BYTES",
    "trainer.score_blocks._FEWEST_ROWS": "trainer.losses.chunked_scores._FEWEST_ROWS",
    "trainer.symmetric._KEPT_BYTES": "trainer.losses.clip._KEPT_BYTES",
}

# Settings whose losses differ by rounding alone: pattern of their names, and the largest difference
# that is accepted.
ROUNDED: list[tuple[str, float]] = [
    # The gradients of the chunks are summed from the last chunk to the first, by autograd.
    ("^mmsrec .*in small blocks of mmsrec", 1e-5),
    # The in-batch loss counts equal items as one column, and sums in another order.
    ("^pmmrec", 1e-5),
]

SMALL = ("dim=32", "hidden=64", "heads=2", "length=8", "batch_size=32", "device=cpu")
POOLED = ("image", "text")
TOKENS = ("image=hashed:pooled", "text=hashed:tokens")
BERT_LEVEL = "layer-1"
TUNED = ("image", f"text:{BERT_LEVEL}")
SOFTMAX_BLOCKS = {
    "trainer.objectives._BLOCK_BYTES": 2**14, "trainer.objectives._FEWEST_ROWS": 16,
}  # fmt: skip
SCORE_BLOCKS = {
    "trainer.score_blocks._BLOCK_BYTES": {"cpu": 2**14}, "trainer.score_blocks._FEWEST_ROWS": 16,
}  # fmt: skip
MMSREC_PIECES = {
    "trainer.mmsrec._NUMBERS_IN_ALL": 2**13, "trainer.mmsrec._NUMBERS_AT_ONCE": 2**12,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One training that both versions do, in the words of the version before."""

    model: str
    settings: tuple[str, ...]
    features: tuple[str, ...] = ()
    stage: str = ""
    datasets: tuple[str, ...] = ("demo",)
    limits: Mapping[str, Any]
    label: str

    @property
    def name(self) -> str:
        """The label, unique among the settings."""
        return f"{self.model} {self.label}".strip()


def setting(
    model: str,
    given: str = "",
    *,
    features: Sequence[str] | None = None,
    stage: str = "",
    datasets: Sequence[str] = ("demo",),
    limits: Mapping[str, Any] | None = None,
) -> Setting:
    """Return a setting with small sizes; ``given`` holds ``key=value`` pairs, the last one wins."""
    pairs = dict(pair.split("=") for pair in (*SMALL, *given.split()))
    if model in ("mmsr", "pmmrec"):
        pairs = {"fusion_heads": "2", **pairs}
    if features is None:
        features = () if model in ("sasrec", "idsr") else POOLED
    tables: tuple[str, ...] = tuple(features)
    notes = [stage, given, "" if tables in ((), POOLED) else ",".join(tables)]
    if limits:
        modules = dict.fromkeys(name.split(".")[-2] for name in limits)
        notes.append(f"in small blocks of {', '.join(modules)}")
    notes.append("+".join(datasets) if len(datasets) > 1 else "")
    return Setting(
        model=model,
        settings=tuple(f"{key}={value}" for key, value in pairs.items()),
        features=tables,
        stage=stage,
        datasets=tuple(datasets),
        limits=limits or {},
        label=" ".join(note for note in notes if note),
    )


def all_settings() -> Iterator[Setting]:
    """Yield every setting that is compared: each model, and each option of it."""
    yield setting("sasrec")
    yield setting("sasrec", "score=cosine temperature=0.1")
    yield setting("sasrec", "candidates=64")
    yield setting("sasrec", limits=SOFTMAX_BLOCKS)
    for options in LOOPS:
        yield setting("sasrec", options)
    yield from _mmsr()
    yield from _mmsrec()
    yield from _pmmrec()


LOOPS = (
    "average=0.9", "precision=bf16", "clip=0", "schedule=cosine warmup=5", "schedule=linear",
    "schedule=exponential decay=0.5", "weight_decay=0.1", "batch_size=7",
    "monitor=NDCG@10 monitor_seen=unmasked",
)  # fmt: skip


def _mmsr() -> Iterator[Setting]:
    for model in ("idsr", "mmsr"):
        for tower in ("sasrec", "gru", "nextitnet"):
            for loss in ("bce", "softmax", "in-batch debias=true", "in-batch debias=false"):
                for score in ("scaled", "dot", "cosine temperature=0.1"):
                    yield setting(model, f"tower={tower} loss={loss} score={score}")
    coarse, attention = ("sum", "concat", "gate", "film"), ("co-attention", "merge-attention")
    for features in (POOLED, TOKENS):
        for fusion in (*coarse, *attention):
            yield setting("mmsr", f"fusion={fusion}", features=features)
        for fusion in attention:
            for options in ("pool=cls", "token_types=false", "fusion_layers=2"):
                yield setting("mmsr", f"fusion={fusion} {options}", features=features)
    for fusion in (*coarse, *attention):
        yield setting("mmsr", f"fusion={fusion} dnn=true")
    yield setting("mmsr", "fusion=sum shared_norm=true")
    yield setting("mmsr", "fusion=concat dnn=true dnn_relu=true")
    for tables in ("text", "image", "text=hashed:tokens", "image text video"):
        yield setting("mmsr", features=tables.split())
    yield setting("mmsr", "tune_blocks=1", features=TUNED)
    yield setting("mmsr", "loss=softmax", limits=SOFTMAX_BLOCKS)
    yield setting("mmsr", "loss=softmax", limits={"trainer.mmsr._TOKENS_AT_ONCE": 32})
    yield setting("mmsr", "loss=in-batch", limits=SCORE_BLOCKS)


def _mmsrec() -> Iterator[Setting]:
    for objective in ("masked", "next"):
        given = f"objective={objective}"
        yield setting("mmsrec", given)
        for options in (
            "ids=true", "whiten=true", "ids=true whiten=true", "candidates=64", "missing=mask",
            "ids=true candidates=64 missing=mask",
        ):  # fmt: skip
            yield setting("mmsrec", f"{given} {options}")
        yield setting("mmsrec", given, features=("text",))
        yield setting("mmsrec", given, features=("image", "text", "video"))
        for options in ("", " ids=true", " candidates=64", " missing=mask"):
            yield setting("mmsrec", given + options, limits=MMSREC_PIECES)
        yield setting("mmsrec", given, limits={**MMSREC_PIECES, **SOFTMAX_BLOCKS})
    for options in ("corruption=81-9-10", "stride=2", "mask_ratio=0.5", "temperature=0.1"):
        yield setting("mmsrec", options)
    for options in (
        "", "duplicates=keep", "missing=mask", "whiten=true", "ids=true",
        "weight_vv=1 weight_tt=0 weight_vt=0.5",
    ):  # fmt: skip
        yield setting("mmsrec", options, stage="pretrain")
    yield setting("mmsrec", stage="pretrain", limits={"trainer.symmetric._KEPT_BYTES": 2**10})
    yield setting("mmsrec", stage="pretrain", datasets=("demo", "other"))


def _pmmrec() -> Iterator[Setting]:
    for options in (
        "", "debias=false", "cosine=true temperature=0.1", "pool=cls", "token_types=false",
        "fusion_layers=2",
    ):  # fmt: skip
        yield setting("pmmrec", options)
    for kind in ("vcl", "icl", "ncl", "nicl"):
        yield setting("pmmrec", f"align={kind}")
        yield setting("pmmrec", f"align={kind} dap=false")
    yield setting("pmmrec", "align=nicl align_literal=true align_temperature=1")
    yield setting("pmmrec", "nid=true")
    yield setting("pmmrec", "nid=true nid_relu=true")
    for pool in ("mean", "last"):
        yield setting("pmmrec", f"rcl=true rcl_pool={pool}")
        yield setting("pmmrec", f"rcl=true rcl_pool={pool} rcl_cosine=false rcl_temperature=1")
    yield setting("pmmrec", features=("text",))
    yield setting("pmmrec", features=TOKENS)
    yield setting("pmmrec", "tune_blocks=1", features=TUNED)
    yield setting("pmmrec", "tune_blocks=1 tune_lr=0", features=TUNED)
    yield setting("pmmrec", limits=SCORE_BLOCKS)
    yield setting("pmmrec", stage="pretrain")
    yield setting("pmmrec", "pool=cls cosine=true", stage="pretrain")
    yield setting("pmmrec", stage="pretrain", features=TOKENS)
    yield setting("pmmrec", stage="pretrain", limits=SCORE_BLOCKS)
    yield setting("pmmrec", stage="pretrain", datasets=("demo", "other"))


def rename_settings(model: str, settings: Sequence[str]) -> list[str]:
    """Return ``key=value`` pairs in the words of this version.

    See ``RENAMED_SETTINGS`` and ``FORMER_DEFAULTS``.
    """
    renamed: list[str] = []
    for pair in settings:
        key, _, value = pair.partition("=")
        for name in (f"{model}:{pair}", pair, f"{model}:{key}", key):
            if name in RENAMED_SETTINGS:
                new = RENAMED_SETTINGS[name]
                if new is not None:
                    renamed.append(new if "=" in new else f"{new}={value}")
                break
        else:
            renamed.append(pair)
    given = {pair.partition("=")[0] for pair in renamed}
    former = FORMER_DEFAULTS.get(model, {}).items()
    return [*renamed, *(f"{key}={value}" for key, value in former if key not in given)]
