"""Checkpoints: safetensors files with tensors and one JSON document, written whole or not at all.

``model.safetensors`` holds the best weights. ``resume.safetensors`` holds the state of a training,
so that a resumed run gives the same bits: weights and their averages, AdamW's moments, the random
state, and the position in the training.
"""

import errno
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer, SparseAdam

from features.atomic_files import atomic_write, require_path
from features.checksums import EMPTY_CHECKSUM, seal, verify
from features.errors import DamagedError, UserError, no_permission

_MOST_DIFFERENCES = 3  # that an error message names
_ABSENT = object()
_SAFETENSORS_TEMPORARY = ".tmp??????"  # names of the temporary files of safetensors
_CHECKSUM = "checksum"  # entry of the document in the header of a file


class IdentityError(UserError):
    """A checkpoint was written for another model, other settings or other data."""


@dataclass(kw_only=True, slots=True)
class TrainState:
    """The position in a training; the loop updates it."""

    epoch: int = 0
    """Number of the current epoch, from 0."""
    step: int = 0
    """Number of steps of the current epoch that are done."""
    steps: int = 0
    """Number of steps of the training that are done."""
    losses: dict[str, float] = field(default_factory=dict)
    """Sums of the named losses over the steps of the current epoch."""
    best: float = -1.0
    """Best value of the monitored metric."""
    best_epoch: int = -1
    waited: int = 0
    """Number of validations since the best one."""
    finished: bool = False


def save_weights(path: Path, model: nn.Module, identity: dict[str, Any]) -> None:
    """Write the weights and the identity of their run."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    _save(path, tensors, _sorted(identity))


def _sorted(identity: dict[str, Any]) -> dict[str, Any]:
    """Return an identity with sorted keys, so that equal identities give equal bytes."""
    document: dict[str, Any] = json.loads(json.dumps(identity, sort_keys=True))
    return document


def _save(path: Path, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """Write a file whole or not at all.

    safetensors writes a temporary file of its own next to ours. A process that was killed meanwhile
    leaves it, and the next save in the folder removes it: the lock of a run, under which its
    weights are saved, admits one process.

    Raises:
        OSError: The disk is full, or the folder is not writable.
        UserError: The folder was removed.
    """
    require_path(path.parent)
    for leftover in path.parent.glob(_SAFETENSORS_TEMPORARY):
        leftover.unlink(missing_ok=True)
    with atomic_write(path) as temporary:
        try:
            text = json.dumps({_CHECKSUM: EMPTY_CHECKSUM, **document})
            save_file(tensors, temporary, metadata={"mmrec": text})
        except SafetensorError as error:  # safetensors wraps the OSError
            raise OSError(errno.EIO, " ".join(str(error).split())[:200], str(path)) from None
        seal(temporary)


def load_weights(path: Path, model: nn.Module, identity: dict[str, Any]) -> None:
    """Load weights into a model of the same identity.

    Raises:
        UserError: The file is absent, damaged, or of another identity; the model does not change.
    """
    tensors, document = read_tensors(path, _remedy(path))
    load_tensors(path, model, tensors, document, identity)


def load_tensors(
    path: Path,
    model: nn.Module,
    tensors: dict[str, Tensor],
    document: dict[str, Any],
    identity: dict[str, Any],
) -> None:
    """Load the tensors of a checkpoint into a model.

    Args:
        path: The file, for messages.
        model: The model.
        tensors: The tensors that :func:`read_tensors` returns.
        document: The document that it returns.
        identity: The identity that the document must have.

    Raises:
        UserError: Identity, names, shapes or dtypes differ; the model does not change.
    """
    _check_identity(path, document, identity)
    _check_tensors(path, tensors, model.state_dict())
    model.load_state_dict(tensors)


def _remedy(path: Path) -> str:
    """Return what to do without the best weights: resume, unless they were saved and are lost."""
    state = path.with_name("resume.safetensors")
    is_lost = not path.exists() and state.exists()
    if is_lost and (progress := _read_progress(state)).best_epoch >= 0:
        return (
            f"the weights of epoch {progress.best_epoch}, the best one, are lost; remove"
            f" {path.parent} and train again"
        )
    return f"continue with mmrec train --resume --run {path.parent.name}, or train again"


def _read_progress(path: Path) -> TrainState:
    document = read_tensors(path, "train again")[1]
    return _progress(path, document.get("progress"))


def save_state(
    path: Path,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    progress: TrainState,
    identity: dict[str, Any],
    average: Mapping[str, Tensor],
) -> None:
    """Write the state of a training, from which :func:`load_state` resumes it.

    Args:
        path: The file.
        model: The model.
        optimizers: Name of an optimizer -> optimizer, after at least one step of every parameter.
        progress: The position in the training.
        identity: The identity of the run.
        average: Name of a parameter -> its average; empty without averaging.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for part, optimizer in optimizers.items():
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{part}.{index}.{key}"] = torch.as_tensor(value)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    # The losses stay in their order, which is that of the rows of the metrics table.
    _save(path, tensors, {"identity": _sorted(identity), "progress": asdict(progress)})


def load_state(
    path: Path,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    identity: dict[str, Any],
    average: Mapping[str, Tensor],
) -> TrainState:
    """Restore model, optimizer, averages and random state from a file of :func:`save_state`.

    Returns:
        The position in the training.

    Raises:
        UserError: The file is absent, damaged, or of another identity; nothing changes.
    """
    tensors, document = read_tensors(path, f"remove {path.parent} and train again")
    if document.keys() != {"identity", "progress"} or not isinstance(document["identity"], dict):
        raise _damaged(path, "it does not hold the state of a training")
    _check_identity(path, document["identity"], identity)
    progress = _progress(path, document["progress"])
    random = {name: value for name, value in tensors.items() if name.startswith("random.")}
    tensors = {name: value for name, value in tensors.items() if name not in random}
    averages = {f"average.{name}": value for name, value in average.items()}
    _check_tensors(path, tensors, _expected(model, optimizers) | averages)
    _check_random(path, random)

    model.load_state_dict(_with_prefix("model.", tensors))
    for name, value in averages.items():
        value.copy_(tensors[name])
    for part, optimizer in optimizers.items():
        state: dict[int, dict[str, Any]] = {}
        for name, tensor in _with_prefix(f"{part}.", tensors).items():
            index, key = name.split(".", 1)
            # SparseAdam counts its steps in an integer, AdamW in a float32 scalar.
            is_count = tensor.dtype == torch.int64
            state.setdefault(int(index), {})[key] = tensor.item() if is_count else tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(random["random.cpu"])
    if "random.cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["random.cuda"])
    return progress


def _with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with the prefix, by the rest of their names."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _damaged(path: Path, reason: object) -> DamagedError:
    return DamagedError(f"{path} is damaged ({' '.join(str(reason).split())}); train again")


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the JSON document of a checkpoint.

    Args:
        path: The file.
        remedy: What to do if the file is absent, for the error message.

    Raises:
        UserError: The file is absent or damaged.
    """
    if not path.exists():
        raise UserError(
            f"{path} does not exist: nothing was saved yet, or it was removed; {remedy}"
        )
    try:
        verify(path)
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {})["mmrec"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except KeyError:
        raise _damaged(path, "it has no identity of a run") from None
    except PermissionError:
        raise no_permission(path) from None
    except (SafetensorError, OSError, ValueError, RecursionError) as error:  # no or deep JSON
        raise _damaged(path, error) from None
    if not isinstance(document, dict):
        raise _damaged(path, "it has no identity of a run")
    document.pop(_CHECKSUM, None)
    _check_not_zero(path, tensors)
    return tensors, document


def _check_not_zero(path: Path, tensors: dict[str, Tensor]) -> None:
    """Refuse weights that are all zero, as an empty disk block leaves them.

    Vectors and scalars do not count: biases can be zero. Files without a matrix of more than one
    column are not checked.
    """
    matrices = [
        tensor
        for name, tensor in tensors.items()
        if not name.startswith(("optimizer.", "rows.", "random."))
        and tensor.is_floating_point()
        and tensor.ndim > 1
        and tensor.shape[-1] > 1
    ]
    if matrices and not any(bool(tensor.count_nonzero()) for tensor in matrices):
        raise _damaged(path, "all its weights are zero")


def _check_tensors(path: Path, tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Refuse tensors whose names, shapes and dtypes are not exactly the expected ones."""
    for name in sorted(tensors.keys() | expected.keys()):
        if name not in tensors:
            raise _damaged(path, f"{name} is missing")
        if name not in expected:
            raise _damaged(path, f"{name} is unexpected")
        actual, wanted = (f"{t.dtype} {list(t.shape)}" for t in (tensors[name], expected[name]))
        if actual != wanted:
            raise _damaged(path, f"{name} is {actual}, not {wanted}")


def _expected(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, Tensor]:
    """Return tensors of the names, shapes and dtypes that :func:`save_state` writes."""
    expected = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for part, optimizer in optimizers.items():
        steps = torch.zeros((), dtype=torch.int64 if isinstance(optimizer, SparseAdam) else None)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            expected[f"{part}.{index}.step"] = steps
            expected[f"{part}.{index}.exp_avg"] = parameter
            expected[f"{part}.{index}.exp_avg_sq"] = parameter
    return expected


def _check_random(path: Path, random: dict[str, Tensor]) -> None:
    if "random.cpu" not in random:
        raise _damaged(path, "random.cpu is missing")
    for name, state in random.items():
        device = name.removeprefix("random.")
        if device == "cpu" or torch.cuda.is_available():
            try:
                torch.Generator(device=device).set_state(state)
            except (RuntimeError, TypeError):
                raise _damaged(path, f"{name} is not a random state") from None


def _progress(path: Path, document: Any) -> TrainState:
    types = {entry.name: entry.type for entry in fields(TrainState)} | {"losses": dict}
    values = document if isinstance(document, dict) else {}
    for key in sorted(types.keys() | values.keys()):
        if type(values.get(key)) is not types.get(key):
            raise _damaged(path, f"its progress has {key}={values.get(key)!r}")
    if any(type(value) is not float for value in values["losses"].values()):
        raise _damaged(path, f"its progress has losses={values['losses']!r}")
    return TrainState(**values)


def _check_identity(path: Path, actual: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a checkpoint of another run, and one of mmrec 0.1, which names no recommender."""
    if "recommender" in expected and "recommender" not in actual and "model" in actual:
        raise UserError(
            f"{path} was written by mmrec 0.1; train again, or keep mmrec 0.1 for this run"
        )
    if not expected.keys() <= actual.keys():
        raise _damaged(path, "it has no identity of a run")
    differences = list(_differences("", actual, expected))
    if differences:
        rest = len(differences) - _MOST_DIFFERENCES
        raise IdentityError(
            f"{path} was written for {'; '.join(differences[:_MOST_DIFFERENCES])}"
            f"{f' and {rest} more' if rest > 0 else ''};"
            " change that back, or train again"
        )


def _differences(name: str, actual: Any, expected: Any) -> Iterator[str]:
    """Yield each difference, such as ``train.lr=0.1, not 0.2``; never a whole table."""
    actual, expected = _by_modality(actual), _by_modality(expected)
    if isinstance(actual, dict) and isinstance(expected, dict):
        for key in sorted(actual.keys() | expected.keys()):
            yield from _differences(
                f"{name}.{key}".lstrip("."), actual.get(key, _ABSENT), expected.get(key, _ABSENT)
            )
    elif actual != expected:
        yield f"{name}={_format(actual)}, not {_format(expected)}"


def _by_modality(value: Any) -> Any:
    """Return a list of feature tables by modality, so that an added table differs alone."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return {str(entry.get("modality", i)): entry for i, entry in enumerate(value)}
    return value


def _format(value: Any) -> str:
    return "..." if isinstance(value, dict) else "nothing" if value is _ABSENT else repr(value)
