"""Settings: frozen dataclasses whose fields carry their limits, from TOML files and ``--set``.

The annotation of a field gives its limits::

    @dataclass(frozen=True, kw_only=True)
    class Config(Settings):
        dim: PositiveInt = 64
        dropout: Probability = 0.1
        score: Annotated[str, Choice("score", ("dot", "cosine"))] = "dot"

No torch here: a wrong setting is refused before torch is loaded.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, get_args, get_type_hints

from features.errors import UserError, unknown
from features.registry import Registry
from retrieval.metrics import METRIC_NAMES

# -- limits of a field ----------------------------------------------------------------------


class Limit(Protocol):
    """A condition on the value of one setting."""

    def check(self, name: str, value: Any) -> None:
        """Raise a UserError that names the setting and the value if the value is refused."""


@dataclass(frozen=True, slots=True)
class Range:
    """Limit a number to an interval; NaN is in no interval."""

    low: float
    high: float
    text: str
    """The interval in words."""
    includes_low: bool = True
    includes_high: bool = False

    def check(self, name: str, value: float) -> None:
        """Refuse a number outside the interval."""
        is_inside = self.low < value < self.high
        is_bound = (value == self.low and self.includes_low) or (
            value == self.high and self.includes_high
        )
        if not (is_inside or is_bound):
            raise UserError(f"{name}={value} must be {self.text}")


@dataclass(frozen=True, slots=True)
class Choice:
    """Limit a text to the names of a registry, or to a fixed list."""

    kind: str
    """Kind of the chosen thing, in the singular."""
    names: Mapping[str, Any] | Iterable[str]

    def check(self, name: str, value: str) -> None:
        """Refuse a name that is not known; the error lists the known ones."""
        if isinstance(self.names, Registry):
            self.names.find(value)
        elif value not in (known := list(self.names)):
            raise unknown(name, value, known)


_END = 2**31  # tables and tensors count in int32; an infinite value is refused by it as well
_POSITIVE = Range(0, _END, "above 0 and below 2**31", includes_low=False)
_NOT_NEGATIVE = Range(0, _END, "at least 0 and below 2**31")

ALL_BLOCKS = "all"
"""Value of ``tune_blocks``: all blocks above the level of each table."""
AUTO = "auto"
"""Value of settings that the size of the catalogue determines, see
:func:`trainer.runs.settings.resolve_automatic`."""


@dataclass(frozen=True, slots=True)
class _CountOr:
    """Limit a setting to a number of at least 0, or to one word."""

    word: str

    def check(self, name: str, value: int | str) -> None:
        """Refuse negative numbers and other words."""
        if isinstance(value, int):
            _NOT_NEGATIVE.check(name, value)
        elif value != self.word:
            raise UserError(f"{name}={value!r} must be a whole number, or {self.word}")


PositiveInt = Annotated[int, _POSITIVE]
BlockCount = Annotated[int | str, _CountOr(ALL_BLOCKS)]
CandidateCount = Annotated[int | str, _CountOr(AUTO)]
PositiveFloat = Annotated[float, _POSITIVE]
NonNegativeInt = Annotated[int, _NOT_NEGATIVE]
NonNegativeFloat = Annotated[float, _NOT_NEGATIVE]
Probability = Annotated[float, Range(0, 1, "in [0, 1)")]
Temperature = Annotated[
    float, Range(1e-4, _END, "at least 0.0001: float32 scores are too coarse for less")
]
NormEpsilon = Annotated[
    float, Range(1e-12, 0.01, "at least 1e-12 and at most 0.01", includes_high=True)
]
LayerCount = Annotated[
    int, Range(0, 1000, "above 0 and at most 1000", includes_low=False, includes_high=True)
]
LearningRate = Annotated[
    float,
    Range(
        0, 1, "above 0 and at most 1: AdamW moves each weight by about lr", includes_low=False,
        includes_high=True,
    ),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of all settings: checks the limits of every field when it is created.

    Raises:
        UserError: A value is outside its limits; the line names the setting and the value.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            for limit in get_args(hint)[1:]:
                limit.check(name, getattr(self, name))
        self.check()

    def check(self) -> None:
        """Check what concerns several settings at once."""


@dataclass(frozen=True, kw_only=True)
class WidthSettings(Settings):
    """Settings of everything that lives in the space of item vectors."""

    dim: PositiveInt = 64
    """Width of item vectors and states."""


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(WidthSettings):
    """Settings that the item encoder and the sequence encoder share."""

    hidden: PositiveInt = 1024
    """Width of the feed-forward networks."""
    dropout: Probability = 0.1
    """Dropout probability, in the item encoder and in the sequence encoder."""
    inner_dropout: bool = True
    """Use dropout inside the feed-forward networks as well as on their outputs. As published by
    MMSR and PMMRec: false."""


def check_multiple(settings: Settings, name: str, divisor: str) -> None:
    """Raise a UserError unless one setting is a multiple of another one."""
    value, parts = getattr(settings, name), getattr(settings, divisor)
    if value % parts:
        raise UserError(
            f"{name}={value} is not a multiple of {divisor}={parts}; change one of them"
        )


# -- the settings of the loop ---------------------------------------------------------------

CONTROLS = ("none", "permute", "random")
"""Values of the setting ``control``."""
PRIORS = ("none", "repeats", "transitions")
"""Values of the setting ``prior``."""
ITEM_UPDATES = (AUTO, "all", "rows")
"""Values of the setting ``item_updates``."""
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,2})?")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of the training loop, the same for every model."""

    seed: NonNegativeInt = 42
    """Seed of initial weights, windows, batches, dropout and masking."""
    epochs: PositiveInt = 200
    """Largest number of epochs; early stopping usually ends training before."""
    min_steps: NonNegativeInt = 0
    """Least number of steps that the training plans: ``epochs`` is raised until they have this many
    steps, counted by the steps of the first epoch. Schedules span all of these epochs. Early
    stopping can still end training before."""
    batch_size: PositiveInt = 64
    """Windows in a step."""
    lr: LearningRate = 1e-3
    """Learning rate of AdamW after the warm-up."""
    weight_decay: NonNegativeFloat = 0.01
    """Weight decay of AdamW, on every parameter."""
    hold_out_cold: bool = False
    """Leave the interactions with cold items (fewer than 10 training interactions) out of training,
    so that ``mmrec eval`` can rank every occurrence of a cold item."""
    control: Annotated[str, Choice("control", CONTROLS)] = "none"
    """Train a control that reads no content: ``permute``: with the rows of each feature table
    permuted among the items that have one; ``random``: with Gaussian rows of the same mean and
    covariance. The seed decides the permutation; see ``mmrec compare --control``."""
    tune_blocks: BlockCount = 0
    """Upper blocks of the backbones to train as well, on ``layer-K`` tables with K = number of
    blocks - ``tune_blocks`` (PMMRec and MMSR: 2). ``all``: every block above the table, for any K.
    """
    tune_lr: Annotated[
        float, Range(0, 1, "at least 0 and at most 1: AdamW moves each weight by about lr",
                     includes_high=True),
    ] = 5e-5  # fmt: skip
    """Learning rate of these blocks, scaled by the same schedule; 0 keeps them frozen."""
    tune_weight_decay: NonNegativeFloat = 0.0
    """Weight decay of these blocks."""
    warmup: NonNegativeInt = 0
    """Steps over which the learning rate rises from 0."""
    schedule: Annotated[
        str, Choice("schedule", ("constant", "cosine", "linear", "exponential", "step"))
    ] = "constant"
    """Learning rate after the warm-up: ``constant``; ``cosine`` or ``linear`` down to ``decay_to``
    at the end of the last epoch; ``exponential``: multiplied by ``decay`` after each epoch;
    ``step``: multiplied by ``decay`` once, after ``decay_from`` epochs."""
    decay: Annotated[
        float, Range(0, 1, "above 0 and at most 1", includes_low=False, includes_high=True)
    ] = 0.9
    """Factor of the schedules ``exponential`` and ``step``."""
    decay_from: NonNegativeInt = 0
    """Epochs before the learning rate begins to fall."""
    decay_to: Probability = 0.0
    """Share of the learning rate that remains at the end of the schedules ``cosine`` and
    ``linear``."""
    item_updates: Annotated[str, Choice("item update", ITEM_UPDATES)] = AUTO
    """Learned item vectors that a step changes, with a loss that reads only a part of them:
    ``all``, by AdamW; ``rows``, those that the step reads, by Adam without weight decay, so that a
    step does not depend on the size of the catalogue. ``auto``: ``rows`` above 50,000 items."""
    clip: NonNegativeFloat = 1.0
    """Largest norm of the gradient; 0 disables clipping."""
    average: Probability = 0.0
    """Decay of an exponential moving average of the weights (0.999), which is validated and saved
    instead of the weights; 0 disables the average."""
    monitor: str = "Recall@10"
    """Validation metric of early stopping and of the best checkpoint."""
    monitor_seen: Annotated[str, Choice("ranking", ("filtered", "kept"))] = "filtered"
    """Ranking of that metric: seen items ``filtered`` or ``kept``. If it is not given, ``kept``
    where more than 1% of the validation targets are repeated, whatever ``monitor`` is."""
    monitor_users: NonNegativeInt = 20_000
    """Users that early stopping validates on, a random sample if there are more; 0: all users.
    ``mmrec eval`` always ranks for all."""
    patience: PositiveInt = 10
    """Validations without a better value before training stops."""
    validate_every: PositiveInt = 1
    """Epochs between two validations."""
    prior: Annotated[str, Choice("prior", PRIORS)] = "none"
    """Scores that are added after the training. ``repeats``: one number for the items of the
    history, for the ranking that keeps seen items; ``transitions``: this number, and how often an
    item followed the last items of the history in the training of other users. The number and the
    weight of the counts are chosen on validation, and may be 0."""
    eval_batch: PositiveInt = 512
    """Users encoded together in an evaluation."""
    device: str = "auto"
    """``auto`` takes CUDA if there is a device, else the CPU."""
    precision: Annotated[str, Choice("precision", ("float32", "bf16"))] = "float32"
    """``bf16`` computes the matrix products of training in bfloat16; weights and ranking stay in
    float32."""
    compile: bool = False
    """Compile the transformers of the model; pays if the GPU waits for Python."""

    def check(self) -> None:
        """Check the device, the metric and the products of rates and decays."""
        for prefix in ("", "tune_"):
            lr, decay = getattr(self, f"{prefix}lr"), getattr(self, f"{prefix}weight_decay")
            if lr * decay > 1:
                raise UserError(
                    f"{prefix}weight_decay={decay} times {prefix}lr={lr} must be at most 1:"
                    " more turns the sign of every weight"
                )
        if self.metric not in METRIC_NAMES:
            raise unknown("monitor", self.monitor, list(METRIC_NAMES))
        if not _DEVICE.fullmatch(self.device):
            raise unknown("device", self.device, ["auto", "cpu", "cuda", "cuda:N"])

    @property
    def metric(self) -> str:
        """The monitored metric as tables call it: with one target, Recall@k is HR@k."""
        return self.monitor.replace("Recall@", "HR@")
