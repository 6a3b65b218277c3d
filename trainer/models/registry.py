"""Registry of the recommenders. A new recommender is one file, and one line here.

This module does not import torch.
"""

from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from features.errors import UserError
from features.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Callable

    from trainer.models.base import Recommender


@dataclass(frozen=True, slots=True)
class Model:
    """An entry of the registry: the location of the class of a recommender, and a summary."""

    path: str
    """``package.module:Class``, imported by :meth:`load`."""
    summary: str
    """One line for ``mmrec models``."""

    def load(self) -> "type[Recommender]":
        """Import the class of the recommender, and with it torch.

        Raises:
            UserError: The class of an installed package cannot be imported, or is not a
                recommender.
        """
        from trainer.models.base import Recommender

        module, _, name = self.path.partition(":")
        try:
            recommender: type[Recommender] = getattr(import_module(module), name)
            if not issubclass(recommender, Recommender):
                raise TypeError(f"{name} is not a subclass of Recommender")
        except Exception as error:
            if module.partition(".")[0] == "trainer":
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"the model {self.path} cannot be loaded ({reason}); repair or remove its package"
            ) from None
        return recommender


MODELS: Registry[Model] = Registry(
    "model",
    {
        "popularity": Model(
            "trainer.models.popularity:Popularity",
            "counts of training interactions, the same list for everybody: a reference",
        ),
        "transitions": Model(
            "trainer.models.transitions:Transitions",
            "counts of which item followed which in training histories: a reference",
        ),
        "itemknn": Model(
            "trainer.models.itemknn:ItemKNN",
            "cosines of items by the users that they share: a reference",
        ),
        "ease": Model(
            "trainer.models.ease:EASE",
            "a linear model of items by items in closed form: a reference",
        ),
        "sasrec": Model(
            "trainer.models.sasrec:SASRec",
            "item ids, causal transformer, softmax over the catalogue: the baseline",
        ),
        "gru4rec": Model("trainer.models.gru4rec:GRU4Rec", "item ids, a recurrent network"),
        "nextitnet": Model(
            "trainer.models.nextitnet:NextItNet", "item ids, dilated causal convolutions"
        ),
        "bert4rec": Model(
            "trainer.models.bert4rec:BERT4Rec",
            "item ids, bidirectional transformer, masked item prediction",
        ),
        "bsarec": Model(
            "trainer.models.bsarec:BSARec",
            "item ids, self-attention mixed with a low-pass filter",
        ),
        "duorec": Model(
            "trainer.models.duorec:DuoRec",
            "sasrec with a contrast between histories that lead to the same item",
        ),
        "fdsa": Model(
            "trainer.models.fdsa:FDSA",
            "item ids and features or attributes in two streams of self-attention",
        ),
        "s3rec": Model(
            "trainer.models.s3rec:S3Rec",
            "item ids, pre-trained on the attributes of items, then fine-tuned as sasrec",
        ),
        "unisrec": Model(
            "trainer.models.unisrec:UniSRec",
            "texts through a mixture of experts, and sasrec; pre-trained on several datasets",
        ),
        "vqrec": Model(
            "trainer.models.vqrec:VQRec",
            "discrete codes of texts, and sasrec; pre-trained on several datasets",
        ),
        "morec": Model(
            "trainer.models.morec:MoRec",
            "vectors or tokens of texts and images, concatenated, under sasrec",
        ),
        "tedrec": Model(
            "trainer.models.tedrec:TedRec",
            "ids and texts of a history, multiplied in the frequency domain, and sasrec",
        ),
        "fmrlrec": Model(
            "trainer.models.fmrlrec:FMRLRec",
            "texts and images, nested widths over a linear recurrent unit",
        ),
        "carca": Model(
            "trainer.models.carca:CARCA",
            "ids, features and dates; the candidate attends to the history",
        ),
        "idsr": Model(
            "trainer.models.mmsr:IDSR",
            "item ids with the sequence encoders and losses of mmsr, to compare with",
        ),
        "mmsrec": Model(
            "trainer.models.mmsrec:MMSRec",
            "vision and text, one encoder for items and sequences, masked item prediction",
        ),
        "mmsr": Model(
            "trainer.models.mmsr:MMSR",
            "any modalities or tokens; fusion, sequence encoder and loss are settings",
        ),
        "pmmrec": Model(
            "trainer.models.pmmrec:PMMRec",
            "any modalities or tokens, merge-attention, causal encoder; made to be transferred",
        ),
    },
    group="mmrec.models",
)


def names_of(condition: "Callable[[type[Recommender]], bool]") -> list[str]:
    """Return the names of the recommenders that meet a condition; this imports torch.

    A recommender of an installed package that cannot be loaded is left out.
    """
    names = []
    for name, model in MODELS.items():
        with suppress(UserError):
            if condition(model.load()):
                names.append(name)
    return names
