"""Starting from another run's best weights: which are taken, which are not, and why.

Weights are matched by name and shape. Three kinds of tables are matched by their rows instead: a
row for each item stays with its catalogue, a row for each modality goes to the modality of the same
name, and of positions counted from the end those are taken that both lengths have.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.errors import UserError, unknown
from trainer.checkpoint import read_tensors
from trainer.models.base import Recommender
from trainer.runs.folder import read_about

FULL = "full"
_VISION = ("image", "video")  # one head serves both: the vectors of a clip are those of its frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What a model got from a run."""

    run: str
    transfer: str
    digest: str
    """Hash of that run's weights."""
    loaded: list[str]
    """Names of the parameters, or of groups of them, that came from there."""
    fresh: list[tuple[str, str]]
    """Those that did not, or not whole, and why."""
    unused: list[tuple[str, str]]
    """Weights of that run that have no place here, and why."""
    share: float
    """Of this model's numbers, how many came from there."""

    def remembered(self) -> dict[str, str]:
        """What a run's configuration and its checkpoints keep of it."""
        return {"run": self.run, "transfer": self.transfer, "weights": self.digest}

    def lines(self) -> list[str]:
        """It all, for people."""
        found = [
            f"from run {self.run} ({self.transfer}): {', '.join(self.loaded)}"
            f" ({self.share:.1%} of the weights)"
        ]
        found += [f"not from there: {name} ({why})" for name, why in self.fresh]
        found += [f"left behind: {name} ({why})" for name, why in self.unused]
        return found


def check_transfer(name: str, model: type[Recommender]) -> None:
    """Refuse a transfer that a recommender does not know.

    Raises:
        UserError: Names those that it knows.
    """
    if name not in (FULL, *model.transfer_groups):
        raise unknown("transfer", name, [FULL, *model.transfer_groups])


def check_source(run: Path, name: str) -> None:
    """Refuse a run that is not of recommender ``name``.

    Raises:
        UserError: It is of another one.
    """
    other = read_about(run / "config.toml")["model"]
    if other != name:
        raise UserError(
            f"run {run.name!r} is of {other!r}, its weights have no place in {name!r};"
            f" give a run of {name!r} as init"
        )


def read_source(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the best weights of a run, and what they are for.

    Raises:
        UserError: The run has no weights yet.
    """
    return read_tensors(
        run / "model.safetensors", f"train it first: mmrec train --resume --run {run.name}"
    )


def take_weights(
    run: Path, name: str, model: Recommender, identity: dict[str, Any], transfer: str = FULL
) -> Taken:
    """Copy another run's best weights into a model, as far as they fit.

    Args:
        run: The folder of the other run.
        name: Of the recommender.
        model: As it was drawn; what does not come from there stays so.
        identity: What the model is for, see :meth:`trainer.runs.spec.RunSpec.identity`.
        transfer: ``full``, or one of the model's ``transfer_groups``.

    Raises:
        UserError: The run has no weights yet, is of another recommender, or nothing fits.
    """
    check_transfer(transfer, type(model))
    check_source(run, name)
    tensors, held = read_source(run)
    digest = hash_tensors(tensors)
    matching = _Matching(held, identity)
    tensors = {matching.renamed(key): tensor for key, tensor in tensors.items()}
    for key in model.fitted_buffers:
        tensors.pop(key, None)
    wanted = {k: place for k, place in model.state_dict().items() if k not in model.fitted_buffers}
    prefixes = ("",) if transfer == FULL else model.transfer_groups[transfer]
    loaded: list[str] = []
    fresh: dict[str, str] = {}
    numbers = 0
    for key, place in wanted.items():
        reason = "" if key.startswith(prefixes) else f"not part of the transfer {transfer!r}"
        reason = reason or matching.refused(key)
        if key.startswith(model.item_tables or ("\0",)) and matching.other_catalogue:
            reason = reason or "a row for each item, and the catalogue is another one"
        if not reason and key not in tensors:
            reason = "that run does not have it"
        if reason:
            fresh[key] = reason
            continue
        rows = None
        if key in model.modality_tables:
            rows = matching.modality_rows()
        elif key in model.reverse_positions and tensors[key].shape[1:] == place.shape[1:]:
            both = range(min(len(place), len(tensors[key])))
            rows = [(row, row) for row in both]
        filled, reason = _filled(place, tensors[key], rows)
        numbers += filled
        if filled:
            loaded.append(key)
        if reason:
            fresh[key] = reason
    if not loaded:
        key, reason = next(iter(fresh.items()))
        raise UserError(
            f"nothing of run {run.name!r} fits: {key} is not taken ({reason});"
            " give another run by --init, or train it with the same settings"
        )
    unused = {key: "no place here" for key in tensors if key not in wanted}
    return Taken(
        run=run.name,
        transfer=transfer,
        digest=digest,
        loaded=list(_grouped(dict.fromkeys(loaded, ""), {*wanted})),
        fresh=list(_grouped(fresh, {*wanted}).items()),
        unused=list(_grouped(unused, {*tensors}).items()),
        share=numbers / max(1, sum(place.numel() for place in wanted.values())),
    )


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Hash of names, kinds, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


class _Matching:
    """How the modalities and the catalogue of the other run stand to this one's."""

    def __init__(self, held: dict[str, Any], identity: dict[str, Any]) -> None:
        self.there = {table["modality"]: table for table in held.get("features", [])}
        self.here = {table["modality"]: table for table in identity["features"]}
        self.other_catalogue = held.get("items") != identity["items"]
        vision = [[m for m in _VISION if m in tables] for tables in (self.there, self.here)]
        self.vision: tuple[str, str] | None = None
        if len(vision[0]) == len(vision[1]) == 1 and vision[0] != vision[1]:
            self.vision = vision[0][0], vision[1][0]
            self.there = {self._as_here(name): table for name, table in self.there.items()}

    def _as_here(self, modality: str) -> str:
        return self.vision[1] if self.vision and modality == self.vision[0] else modality

    def renamed(self, name: str) -> str:
        """A clip's head takes the place of a picture's, where each run has only one of them."""
        return ".".join(self._as_here(word) for word in name.split("."))

    def refused(self, name: str) -> str:
        """Why the weights of a modality do not fit here: other vectors under the same name."""
        for word in name.split("."):
            if word in self.here and word in self.there:
                held, wanted = self.there[word], self.here[word]
                for key in ("backbone", "checkpoint", "level"):
                    if held.get(key) != wanted.get(key):
                        return f"{word}: {key} {held.get(key)} there, {wanted.get(key)} here"
        return ""

    def modality_rows(self) -> list[tuple[int, int]]:
        """(row here, row there) of each modality that both have."""
        there = list(self.there)
        return [(row, there.index(name)) for row, name in enumerate(self.here) if name in there]


def _filled(place: Tensor, tensor: Tensor, rows: list[tuple[int, int]] | None) -> tuple[int, str]:
    """Fill a parameter, whole or by rows; how many numbers came, and why not all."""
    with torch.no_grad():
        if rows is None:
            if tensor.shape != place.shape:
                return 0, f"{_size(tensor)} there, {_size(place)} here"
            place.copy_(tensor)
            return place.numel(), ""
        if tensor.shape[1:] != place.shape[1:]:
            return 0, f"{_size(tensor)} there, {_size(place)} here"
        for here, there in rows:
            place[here].copy_(tensor[there])
    left = len(place) - len(rows)
    reason = f"{left} of {len(place)} rows: {len(tensor)} there" if left else ""
    return len(rows) * place[:1].numel(), reason


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "1"


def _grouped(names: dict[str, str], known: set[str]) -> dict[str, str]:
    """Names under their longest common beginning, where all known ones under it say the same."""
    found: dict[str, str] = {}
    for name, value in names.items():
        for prefix in _prefixes(name):
            under = [other for other in known if other == prefix or other.startswith(prefix + ".")]
            if all(names.get(other) == value for other in under):
                found[prefix] = value
                break
    return found


def _prefixes(name: str) -> Iterator[str]:
    words = name.split(".")
    for count in range(1, len(words) + 1):
        yield ".".join(words[:count])
