"""Configuration: one frozen dataclass for the loop, one for each recommender, TOML and --set."""

import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from features.errors import UserError
from retrieval.metrics import per_user
from trainer.checks import check_not_negative, check_positive, check_probability

_WORDS = {
    "schedule": ("constant", "cosine", "linear", "exponential"),
    "monitor_seen": ("filtered", "kept"),
    "precision": ("float32", "bf16"),
}
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,2})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """What the loop needs to know, whatever the recommender."""

    seed: int = 42
    """Fixes initial weights, windows, batches, dropout and masking."""
    epochs: int = 200
    """At most; early stopping usually ends before."""
    batch_size: int = 64
    """Windows to a step."""
    lr: float = 1e-3
    """Learning rate of AdamW, after the warm-up."""
    weight_decay: float = 0.01
    """Of AdamW, on every parameter."""
    tune_blocks: int = 0
    """Upper blocks of the backbones that are trained as well, on tables ``layer-K`` with K = their
    blocks - ``tune_blocks`` (PMMRec and MMSR: 2); recommenders that read tokens can."""
    tune_lr: float = 5e-5
    """Learning rate of these blocks, which the schedule scales too; 0: they stay as they are."""
    tune_weight_decay: float = 0.0
    """Their weight decay."""
    warmup: int = 0
    """Steps over which the learning rate rises from 0."""
    schedule: str = "constant"
    """What follows: ``constant``, ``cosine`` or ``linear`` down to 0 at the end of the last epoch,
    or ``exponential``: times ``decay`` after each epoch."""
    decay: float = 0.9
    """Of the exponential schedule."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: not clipped."""
    average: float = 0.0
    """Weights are validated and saved as their exponential moving average over the steps, of which
    each keeps this share (0.999); 0: as they are."""
    monitor: str = "Recall@10"
    """Metric on the validation split that early stopping and the best checkpoint go by."""
    monitor_seen: str = "filtered"
    """``filtered``: seen items are out of that ranking; ``kept``: they are in it."""
    patience: int = 10
    """Validations without a better value before training stops."""
    validate_every: int = 1
    """Epochs between two validations."""
    eval_batch: int = 512
    """Users encoded together in an evaluation."""
    device: str = "auto"
    """``auto``: CUDA if there is a device, else the CPU."""
    precision: str = "float32"
    """``bf16``: matrix products of training in bfloat16; weights and ranking stay float32."""
    compile: bool = False
    """Compile the transformers of the model; pays where the GPU waits for Python."""

    def __post_init__(self) -> None:
        check_positive(
            self, "epochs", "batch_size", "lr", "decay", "patience", "validate_every", "eval_batch"
        )
        check_not_negative(self, "seed", "weight_decay", "warmup", "clip")
        check_not_negative(self, "tune_blocks", "tune_lr", "tune_weight_decay")
        check_probability(self, "average")
        for prefix in ("", "tune_"):
            lr, decay = getattr(self, f"{prefix}lr"), getattr(self, f"{prefix}weight_decay")
            if lr > 1:
                raise UserError(
                    f"{prefix}lr={lr} must be at most 1: AdamW moves each weight by about lr"
                )
            if lr * decay > 1:
                raise UserError(
                    f"{prefix}weight_decay={decay} times {prefix}lr={lr} must be at most 1:"
                    " more turns the sign of every weight"
                )
        for key, known in _WORDS.items():
            if getattr(self, key) not in known:
                value = getattr(self, key)
                raise UserError(f"{key}={value!r} is not known; known: {', '.join(known)}")
        if self.decay > 1:
            raise UserError(f"decay={self.decay} must be at most 1: the rate falls by it")
        metrics = list(per_user(np.ones(1, np.int64)))
        if self.metric not in metrics:
            raise UserError(f"monitor={self.monitor!r} is not known; known: {', '.join(metrics)}")
        if not _DEVICE.fullmatch(self.device):
            raise UserError(f"device={self.device!r} is not known; known: auto, cpu, cuda, cuda:N")

    @property
    def metric(self) -> str:
        """The monitored metric as tables call it: with one target, Recall@k is HR@k."""
        return self.monitor.replace("Recall@", "HR@")


def parse_settings(settings: Sequence[str]) -> dict[str, str]:
    """Split ``key=value`` pairs.

    Raises:
        UserError: One has no ``=``, or a key stands twice.
    """
    pairs: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"--set {setting!r} must look like key=value")
        if key in pairs:
            raise UserError(f"--set gives {key!r} twice; give it once")
        pairs[key] = value
    return pairs


def build(
    model_config: type[Any],
    file: Path | None,
    settings: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
) -> tuple[TrainConfig, Any]:
    """Make the configurations of the loop and of a recommender, see :func:`build_all`."""
    train, model = build_all([TrainConfig, model_config], file, settings, defaults)
    return train, model


def build_all(
    classes: Sequence[type[Any]],
    file: Path | None,
    settings: Sequence[str],
    defaults: Mapping[str, Any] | None = None,
) -> list[Any]:
    """Make configurations from defaults, a TOML file and ``--set``, the last one winning.

    Their keys share one flat space, in the file (whatever its tables) and in ``--set``.

    Args:
        classes: The configuration classes; no two have a key in common.
        file: A TOML file, such as the ``config.toml`` of a run.
        settings: ``key=value`` pairs.
        defaults: Values that take the place of the classes' own.

    Raises:
        UserError: An unknown key, a value of the wrong kind, or one that is refused; the line
            names the file, where there is one.
    """
    values = {**(defaults or {}), **(_read(file) if file is not None else {})}
    try:
        return _build(classes, values, settings)
    except UserError as error:
        if file is None:
            raise
        source = f"{file} with --set" if settings else str(file)
        raise UserError(f"{source}: {error}") from None


def _build(
    classes: Sequence[type[Any]], values: dict[str, Any], settings: Sequence[str]
) -> list[Any]:
    kinds: dict[str, Any] = {field.name: field.type for one in classes for field in fields(one)}
    pairs = parse_settings(settings)
    for key in (*values, *pairs):
        if key not in kinds:
            raise UserError(f"unknown setting {key!r}; known: {', '.join(sorted(kinds))}")
    for key, text in pairs.items():
        values[key] = _convert(key, text, kinds[key])
    for key, value in values.items():
        if kinds[key] is float and type(value) is int:
            values[key] = float(value) if abs(value) < 2**53 else math.inf  # refused by its range
        elif type(value) is not kinds[key]:
            raise UserError(f"{key}={value!r} must be {_KINDS[kinds[key]]}")
    found = []
    for one in classes:
        known = {field.name for field in fields(one)}
        found.append(one(**{key: value for key, value in values.items() if key in known}))
    return found


def documents(train: TrainConfig, model: Any, *more: Any) -> dict[str, Any]:
    """The tables ``[train]``, ``[model]`` and ``[pretrain]`` of a run's ``config.toml``."""
    found = {"train": asdict(train), "model": asdict(model)}
    return found | ({"pretrain": asdict(more[0])} if more else {})


_KINDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}


def _convert(key: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text!r} must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"{key}={text!r} must be {_KINDS[kind]}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; give a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not TOML: {error}") from None
    document.pop("run", None)  # what a run says of itself is no setting
    flat: dict[str, Any] = {}
    for key, value in document.items():
        entries = value if isinstance(value, dict) else {key: value}
        for name in entries.keys() & flat.keys():
            raise UserError(f"{file} sets {name} twice; tables do not part settings: set it once")
        flat.update(entries)
    return flat
