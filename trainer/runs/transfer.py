"""Copy initial weights from another run, and report which weights were copied.

Weights are matched by name and shape. Three kinds of tables are matched by their rows: a table with
a row for each item is copied only within one catalogue; a row of a modality is copied to the
modality of the same name; of a table of positions that count from the end, the rows that both runs
have are copied.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from features.errors import UserError, unknown
from trainer.checkpoint import read_tensors
from trainer.models.base import Recommender
from trainer.runs.folder import check_format, read_about
from trainer.runs.settings import given_weights_settings

FULL = "full"
_VISION = (
    "image",
    "video",
)  # a video is the mean of image vectors: one head fits both


@dataclass(frozen=True, kw_only=True, slots=True)
class CopiedWeights:
    """The weights that were copied from another run into a model."""

    run: str
    transfer: str
    digest: str
    """Hash of that run's weights."""
    loaded: list[str]
    """Names of the parameters that were copied, or of groups of them."""
    fresh: list[tuple[str, str]]
    """Parameters that were not copied, or not as a whole, and the reason."""
    unused: list[tuple[str, str]]
    """Weights of that run that this model does not have, and the reason."""
    share: float
    """Share of this model's weights that were copied."""

    def lines(self) -> list[str]:
        """Return a report for people."""
        report = [
            f"from run {self.run} ({self.transfer}): {', '.join(self.loaded)}"
            f" ({self.share:.1%} of the weights)"
        ]
        report += [f"not from that run: {name} ({reason})" for name, reason in self.fresh]
        report += [f"not used: {name} ({reason})" for name, reason in self.unused]
        return report


def check_transfer(name: str, recommender: type[Recommender]) -> None:
    """Raise a UserError unless a recommender knows the transfer."""
    if name not in (FULL, *recommender.transfer_groups):
        raise unknown("transfer", name, [FULL, *recommender.transfer_groups])


def check_source(run: Path, name: str) -> None:
    """Raise a UserError unless a run is of recommender ``name``."""
    about = read_about(run / "config.toml")
    check_format(run, about)
    other = about["model"]
    if other != name:
        raise UserError(
            f"run {run.name!r} is of {other!r}, its weights have no place in {name!r};"
            f" give a run of {name!r} as init"
        )


def read_source(run: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the best weights of a run, and the identity that they were saved with.

    Raises:
        UserError: The run has no weights yet.
    """
    return read_tensors(
        run / "model.safetensors", f"train it first: mmrec train --resume --run {run.name}"
    )


def copy_weights(
    run: Path, name: str, model: Recommender, identity: dict[str, Any], transfer: str = FULL
) -> CopiedWeights:
    """Copy another run's best weights into a model, as far as they fit.

    Args:
        run: Folder of the other run.
        name: Name of the recommender.
        model: The model with random weights; weights that are not copied stay random.
        identity: Identity of this run, see :meth:`trainer.runs.spec.RunSpec.identity`.
        transfer: ``full``, or one of the model's ``transfer_groups``.

    Raises:
        UserError: The run has no weights yet, is of another recommender, or nothing fits.
    """
    check_transfer(transfer, type(model))
    check_source(run, name)
    tensors, source_identity = read_source(run)
    digest = hash_tensors(tensors)
    matching = _Matching(model, source_identity, identity, transfer)
    tensors = {matching.renamed(key): tensor for key, tensor in tensors.items()}
    fitting = {key: tensor for key, tensor in tensors.items() if not matching.refusal(key)}
    tensors = {k: x for k, x in tensors.items() if k not in fitting} | dict(model.adapted(fitting))
    for key in model.fitted_buffers:
        tensors.pop(key, None)
    own = {k: tensor for k, tensor in model.state_dict().items() if k not in model.fitted_buffers}
    loaded: list[str] = []
    fresh: dict[str, str] = {}
    copied = 0
    for key, tensor in own.items():
        reason = matching.refusal(key)
        if not reason and key not in tensors:
            reason = "that run does not have it"
        if not reason:
            rows = matching.rows(key, tensor, tensors[key])
            count, reason = _copy(tensor, tensors[key], rows)
            copied += count
            if count:
                loaded.append(key)
        if reason:
            fresh[key] = reason
    if not loaded:
        key, reason = next(iter(fresh.items()))
        raise UserError(
            f"nothing of run {run.name!r} fits: {key} is not copied ({reason});"
            " give another run by --init, or train it with the same settings"
        )
    _check_frozen(run, model, loaded, fresh)
    unused = {key: "this model does not have it" for key in tensors if key not in own}
    return CopiedWeights(
        run=run.name,
        transfer=transfer,
        digest=digest,
        loaded=list(_grouped(dict.fromkeys(loaded, ""), {*own})),
        fresh=list(_grouped(fresh, {*own}).items()),
        unused=list(_grouped(unused, {*tensors}).items()),
        share=copied / max(1, sum(tensor.numel() for tensor in own.values())),
    )


def _check_frozen(
    run: Path, model: Recommender, loaded: Sequence[str], fresh: Mapping[str, str]
) -> None:
    """Refuse a model that would keep random weights, because a setting freezes them."""
    names = given_weights_settings(type(model), model.settings)
    for key, parameter in model.named_parameters():
        if names and not parameter.requires_grad and key not in loaded:
            raise UserError(
                f"{names[0]}=true keeps {key}, which run {run.name!r} does not give"
                f" ({fresh[key]}); give another run or --transfer, or leave {names[0]}=true out"
            )


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the names, dtypes, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _Matching:
    """Match the modalities and the catalogue of another run with those of this run.

    Args:
        model: The model of this run.
        source: Identity of the other run.
        target: Identity of this run.
        transfer: The weights to copy.
    """

    def __init__(
        self, model: Recommender, source: dict[str, Any], target: dict[str, Any], transfer: str
    ) -> None:
        self._model = model
        self._transfer = transfer
        self._prefixes = ("",) if transfer == FULL else model.transfer_groups[transfer]
        self._is_other_catalogue = source.get("items") != target["items"]
        self._has_other_users = source.get("interactions") != target["interactions"]
        self._source = {table["modality"]: table for table in source.get("features", [])}
        self._target = {table["modality"]: table for table in target["features"]}
        vision = [[m for m in _VISION if m in tables] for tables in (self._source, self._target)]
        self._vision: tuple[str, str] | None = None
        if len(vision[0]) == len(vision[1]) == 1 and vision[0] != vision[1]:
            self._vision = vision[0][0], vision[1][0]
            self._source = {self._modality(m): table for m, table in self._source.items()}

    def _modality(self, name: str) -> str:
        return self._vision[1] if self._vision and name == self._vision[0] else name

    def renamed(self, name: str) -> str:
        """Return a weight's name here: a head of videos takes the weights of a head of images."""
        return ".".join(self._modality(word) for word in name.split("."))

    def refusal(self, name: str) -> str:
        """Return the reason why a weight must not be copied, or an empty text."""
        if not name.startswith(self._prefixes):
            return f"not part of the transfer {self._transfer!r}"
        for word in name.split("."):
            if word in self._target and word in self._source:
                source, target = self._source[word], self._target[word]
                for key in ("backbone", "checkpoint", "level"):
                    if source.get(key) != target.get(key):
                        return f"{word}: {key} {source.get(key)} there, {target.get(key)} here"
        if self._is_other_catalogue and name.startswith(self._model.item_tables or ("\0",)):
            return "a row for each item, and the catalogue is another one"
        if self._has_other_users and name.startswith(self._model.user_tables or ("\0",)):
            return "a row for each user, and the interactions are others"
        return ""

    def rows(self, name: str, own: Tensor, other: Tensor) -> list[tuple[int, int]] | None:
        """Return (own row, other row) of the rows to copy; ``None``: the whole tensor."""
        if name in self._model.modality_tables:
            names = list(self._source)
            return [(row, names.index(m)) for row, m in enumerate(self._target) if m in names]
        if name in self._model.reverse_positions and other.shape[1:] == own.shape[1:]:
            return [(row, row) for row in range(min(len(own), len(other)))]
        return None


def _copy(own: Tensor, other: Tensor, rows: list[tuple[int, int]] | None) -> tuple[int, str]:
    """Copy a tensor, whole or by rows; return how many elements, and why not all of them."""
    with torch.no_grad():
        if rows is None:
            if other.shape != own.shape:
                return 0, f"{_size(other)} there, {_size(own)} here"
            own.copy_(other)
            return own.numel(), ""
        if other.shape[1:] != own.shape[1:]:
            return 0, f"{_size(other)} there, {_size(own)} here"
        for own_row, other_row in rows:
            own[own_row].copy_(other[other_row])
    missing = len(own) - len(rows)
    reason = f"{missing} of {len(own)} rows: {len(other)} there" if missing else ""
    return len(rows) * own[:1].numel(), reason


def _size(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "1"


def _grouped(values: dict[str, str], known: set[str]) -> dict[str, str]:
    """Replace names by their longest common prefix, if all known names under it share the value."""
    groups: dict[str, str] = {}
    for name, value in values.items():
        for prefix in _prefixes(name):
            under = [other for other in known if other == prefix or other.startswith(prefix + ".")]
            if all(values.get(other) == value for other in under):
                groups[prefix] = value
                break
    return groups


def _prefixes(name: str) -> Iterator[str]:
    words = name.split(".")
    for count in range(1, len(words) + 1):
        yield ".".join(words[:count])
