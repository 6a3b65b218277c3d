"""Checkpoints: tensors and one JSON text in a safetensors file, whole or absent, never pickled.

``model.safetensors`` holds the best weights, ``resume.safetensors`` everything that a resumed run
needs to go on to the bit: weights, AdamW's moments, the random state, and where it was.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from features.errors import UserError
from features.files import whole


@dataclass(kw_only=True, slots=True)
class Progress:
    """Where a training is; mutable, the loop's own notebook."""

    epoch: int = 0
    """Epoch that comes next, or that is under way when ``step`` is not 0."""
    step: int = 0
    """Batches of that epoch that are done."""
    steps: int = 0
    """Optimizer steps in all."""
    loss_sum: float = 0.0
    """Of the epoch under way."""
    best: float = -1.0
    """Best value of the monitored metric."""
    best_epoch: int = -1
    waited: int = 0
    """Validations since the best one."""
    finished: bool = False


def save_weights(path: Path, model: nn.Module, identity: dict[str, Any]) -> None:
    """Write the weights and what they are for."""
    tensors = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
    with whole(path) as beside:
        save_file(tensors, beside, metadata={"mmrec": json.dumps(identity, sort_keys=True)})


def load_weights(path: Path, model: nn.Module, identity: dict[str, Any]) -> None:
    """Load weights into a model that was built for the same thing.

    Raises:
        UserError: The file is absent, damaged, or was written for something else.
    """
    tensors, metadata = _read(path)
    _check(path, json.loads(metadata["mmrec"]), identity)
    model.load_state_dict(tensors)


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    identity: dict[str, Any],
) -> None:
    """Write all that a resumed run needs."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    tensors["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    document = json.dumps({"identity": identity, "progress": asdict(progress)}, sort_keys=True)
    with whole(path) as beside:
        save_file(tensors, beside, metadata={"mmrec": document})


def load_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    identity: dict[str, Any],
) -> Progress:
    """Put model, optimizer and random state back where they were.

    Raises:
        UserError: The file is absent, damaged, or of a run with another configuration.
    """
    tensors, metadata = _read(path)
    document = json.loads(metadata["mmrec"])
    _check(path, document["identity"], identity)
    model.load_state_dict(_under("model.", tensors))
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _under("optimizer.", tensors).items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    return Progress(**document["progress"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.exists():
        raise UserError(
            f"{path} is not there: the run ended before it was saved;"
            " go on with mmrec train --resume, or train again"
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); train again") from None


def _check(path: Path, held: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in wanted:
        if held.get(key) != wanted[key]:
            raise UserError(
                f"{path} was written for {key}={held.get(key)!r}, not {wanted[key]!r};"
                " give the run's own settings or start a new run"
            )
