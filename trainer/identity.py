"""The identity of a run: everything that decides its result."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.config import documents


@dataclass(frozen=True, kw_only=True, slots=True)
class RunIdentity:
    """Everything that decides the result of a run.

    Two runs with equal identities give equal weights on one machine. Checkpoints carry the
    identity, and the grid names runs by its digest.
    """

    recommender: str
    """Name of the recommender in the registry."""
    dataset: str
    """Names of the datasets, joined by ``+``."""
    items: str
    """Fingerprint of the item ids."""
    interactions: str
    """Digest of the interactions."""
    features: Sequence[Mapping[str, Any]]
    """Provenance and content digest of each feature table."""
    configs: Sequence[Any]
    """Configurations of the loop, of the recommender and, for a pre-training, of its task."""
    init: Mapping[str, str] | None = None
    """The run whose weights are the initial weights, the transfer, and a hash of the weights."""

    def document(self) -> dict[str, Any]:
        """Return the identity as a JSON document."""
        found: dict[str, Any] = {
            "recommender": self.recommender,
            "dataset": self.dataset,
            "items": self.items,
            "interactions": self.interactions,
            "features": [dict(table) for table in self.features],
        }
        settings = documents(*self.configs)
        assert not found.keys() & settings.keys(), (
            "a table of settings hides a part of the identity"
        )
        return found | settings | ({"init": dict(self.init)} if self.init else {})

    def digest(self) -> str:
        """Return 12 hexadecimal digits of a hash of the identity.

        The names of the datasets are left out: equal data under two names give one digest.
        """
        document = self.document()
        del document["dataset"]
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:12]
