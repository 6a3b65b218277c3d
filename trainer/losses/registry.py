"""Registry of the next-item losses: a new loss is one file and one line."""

from features.registry import Registry
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
