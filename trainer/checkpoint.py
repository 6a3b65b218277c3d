"""Checkpoints: tensors and one JSON text in a safetensors file, whole or absent, never pickled.

``model.safetensors`` holds the best weights, ``resume.safetensors`` everything that a resumed run
needs to go on to the bit: weights and their running means, AdamW's moments, the random state, and
where it was.
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
from torch.optim import AdamW

from features.atomic_files import atomic_write
from features.errors import UserError

_MOST = 3  # differences that one line names
_NOTHING = object()


@dataclass(kw_only=True, slots=True)
class TrainState:
    """Where a training is; mutable, the loop's own notebook."""

    epoch: int = 0
    """Epoch that comes next, or that is under way when ``step`` is not 0."""
    step: int = 0
    """Batches of that epoch that are done."""
    steps: int = 0
    """Optimizer steps in all."""
    losses: dict[str, float] = field(default_factory=dict)
    """Sums of the named losses over the epoch under way."""
    best: float = -1.0
    """Best value of the monitored metric."""
    best_epoch: int = -1
    waited: int = 0
    """Validations since the best one."""
    finished: bool = False


def save_weights(path: Path, model: nn.Module, identity: dict[str, Any]) -> None:
    """Write the weights and what they are for."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    _save(path, tensors, identity)


def _save(path: Path, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: There is no room, or the folder may not be written.
    """
    with atomic_write(path) as beside:
        try:
            save_file(tensors, beside, metadata={"mmrec": json.dumps(document, sort_keys=True)})
        except SafetensorError as error:  # not an OSError, though it tells of one
            raise OSError(errno.EIO, " ".join(str(error).split())[:200], str(path)) from None


def load_weights(path: Path, model: nn.Module, identity: dict[str, Any]) -> None:
    """Load weights into a model that was built for the same thing.

    Raises:
        UserError: The file is absent, damaged, or was written for something else; the model is as
            it was.
    """
    resume = f"mmrec train --resume --run {path.parent.name}"
    tensors, document = read_tensors(path, f"go on with {resume}, or train again")
    _check(path, document, identity)
    _fit(path, tensors, model.state_dict())
    model.load_state_dict(tensors)


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: AdamW,
    progress: TrainState,
    identity: dict[str, Any],
    average: Mapping[str, Tensor],
) -> None:
    """Write all that a resumed run needs, once every parameter has had a step.

    ``average`` holds the running means of parameters by their names, or nothing.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    _save(path, tensors, {"identity": identity, "progress": asdict(progress)})


def load_state(
    path: Path,
    model: nn.Module,
    optimizer: AdamW,
    identity: dict[str, Any],
    average: Mapping[str, Tensor],
) -> TrainState:
    """Put model, optimizer, running means and random state back where they were.

    Raises:
        UserError: The file is absent, damaged, or of a run with another configuration; model,
            optimizer, means and random state are as they were.
    """
    tensors, document = read_tensors(path, f"remove {path.parent} and train again")
    if document.keys() != {"identity", "progress"} or not isinstance(document["identity"], dict):
        raise _damaged(path, "it is no state of a training")
    _check(path, document["identity"], identity)
    progress = _progress(path, document["progress"])
    random = {f"random.{name}": value for name, value in _under("random.", tensors).items()}
    tensors = {name: value for name, value in tensors.items() if name not in random}
    means = {f"average.{name}": mean for name, mean in average.items()}
    _fit(path, tensors, _expected(model, optimizer) | means)
    _check_random(path, random)

    model.load_state_dict(_under("model.", tensors))
    for name, mean in means.items():
        mean.copy_(tensors[name])
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under("optimizer.", tensors).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(random["random.cpu"])
    if "random.cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["random.cuda"])
    return progress


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(f"{path} is damaged ({' '.join(str(reason).split())}); train again")


def read_tensors(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of tensors and the document that it carries.

    Raises:
        UserError: It is absent (``remedy`` says what to do), or damaged.
    """
    if not path.exists():
        raise UserError(f"{path} is not there: nothing was saved yet, or it was removed; {remedy}")
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {})["mmrec"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except KeyError:
        raise _damaged(path, "it does not say what it is for") from None
    except (SafetensorError, OSError, ValueError) as error:  # ValueError: not JSON
        raise _damaged(path, error) from None
    if not isinstance(document, dict):
        raise _damaged(path, "it does not say what it is for")
    return tensors, document


def _fit(path: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse tensors that are not exactly the wanted ones, by name, shape and kind of number."""
    for name in sorted(tensors.keys() | wanted.keys()):
        if name not in tensors:
            raise _damaged(path, f"{name} is missing")
        if name not in wanted:
            raise _damaged(path, f"{name} has no place")
        held, place = (f"{t.dtype} {list(t.shape)}" for t in (tensors[name], wanted[name]))
        if held != place:
            raise _damaged(path, f"{name} is {held}, not {place}")


def _expected(model: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    wanted = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    parameters = [held for group in optimizer.param_groups for held in group["params"]]
    for index, parameter in enumerate(parameters):
        wanted[f"optimizer.{index}.step"] = torch.zeros(())
        wanted[f"optimizer.{index}.exp_avg"] = wanted[f"optimizer.{index}.exp_avg_sq"] = parameter
    return wanted


def _check_random(path: Path, random: dict[str, Tensor]) -> None:
    if "random.cpu" not in random:
        raise _damaged(path, "random.cpu is missing")
    for name, state in random.items():
        device = name.removeprefix("random.")
        if device == "cpu" or torch.cuda.is_available():
            try:
                torch.Generator(device=device).set_state(state)
            except (RuntimeError, TypeError):
                raise _damaged(path, f"{name} is no random state") from None


def _progress(path: Path, document: Any) -> TrainState:
    kinds = {entry.name: entry.type for entry in fields(TrainState)} | {"losses": dict}
    found = document if isinstance(document, dict) else {}
    for key in sorted(kinds.keys() | found.keys()):
        if type(found.get(key)) is not kinds.get(key):
            raise _damaged(path, f"its progress has {key}={found.get(key)!r}")
    if any(type(value) is not float for value in found["losses"].values()):
        raise _damaged(path, f"its progress has losses={found['losses']!r}")
    return TrainState(**found)


def _check(path: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    if not wanted.keys() <= held.keys():
        raise _damaged(path, "it does not say what it is for")
    found = list(_differences("", held, wanted))
    if found:
        more = f" and {len(found) - _MOST} more" if len(found) > _MOST else ""
        raise UserError(
            f"{path} was written for {'; '.join(found[:_MOST])}{more};"
            " put that back as it was, or train again"
        )


def _differences(name: str, held: Any, wanted: Any) -> Iterator[str]:
    """What differs, each as ``train.lr=0.1, not 0.2``: never a whole table."""
    held, wanted = _by_name(held), _by_name(wanted)
    if isinstance(held, dict) and isinstance(wanted, dict):
        for key in sorted(held.keys() | wanted.keys()):
            yield from _differences(
                f"{name}.{key}".lstrip("."), held.get(key, _NOTHING), wanted.get(key, _NOTHING)
            )
    elif held != wanted:
        yield f"{name}={_shown(held)}, not {_shown(wanted)}"


def _by_name(value: Any) -> Any:
    """Tables of features by their modality, so that one more does not make all of them differ."""
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        return {str(entry.get("modality", i)): entry for i, entry in enumerate(value)}
    return value


def _shown(value: Any) -> str:
    return "..." if isinstance(value, dict) else "nothing" if value is _NOTHING else repr(value)
