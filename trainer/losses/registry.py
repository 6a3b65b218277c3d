"""Registry of the next-item losses: a new loss is one file and one line."""

from dataclasses import fields

from features.registry import Registry
from trainer.config import Settings
from trainer.losses.base import Loss
from trainer.losses.bce import SampledBCE
from trainer.losses.in_batch import InBatch
from trainer.losses.pairwise import BPR, TOP1, BPRMax, TOP1Max
from trainer.losses.softmax import Softmax

LOSSES: Registry[type[Loss]] = Registry(
    "loss",
    {
        "softmax": Softmax,
        "in-batch": InBatch,
        "bce": SampledBCE,
        "bpr": BPR,
        "top1": TOP1,
        "bpr-max": BPRMax,
        "top1-max": TOP1Max,
    },
    group="mmrec.losses",
    base=Loss,
)


def unread_settings(settings: Settings) -> list[str]:
    """Return the settings that have other values than their defaults and that the loss ignores.

    A setting that the loss ignores because of another of its settings is not among them.

    Args:
        settings: Settings of a model. Without a setting ``loss``, none is returned.

    Returns:
        Names, in the order of the settings. There are none if the class of the loss does not say
        which settings it reads.
    """
    loss = getattr(settings, "loss", None)
    own = None if loss is None else LOSSES.find(loss).reads
    if own is None:
        return []
    of_others = {name for key in LOSSES for name in LOSSES.find(key).reads or ()} - own
    changed = [x.name for x in fields(settings) if getattr(settings, x.name) != x.default]
    if getattr(settings, "candidates", None) == 0 and "candidates" in changed:
        changed.remove("candidates")  # a run replaces auto by 0
    return [name for name in changed if name in of_others]
