"""Checkpoints with valid syntax and wrong content: refused in one line, and nothing is loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import AdamW

from features.errors import UserError
from trainer.checkpoint import (
    TrainState,
    load_state,
    load_weights,
    read_tensors,
    save_state,
    save_weights,
)

IDENTITY = {
    "model": "m",
    "train": {"lr": 0.1, "seed": 1},
    "features": [{"modality": "text", "backbone": "a", "dim": 3}],
}
Tensors = dict[str, Tensor]
Document = dict[str, Any]


def trained(seed: int) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    optimizer = AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 2)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def read(path: Path) -> tuple[Tensors, Document]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        document = json.loads(file.metadata()["mmrec"])
        document.pop("checksum", None)
        return {n: file.get_tensor(n) for n in names}, document


def write(path: Path, tensors: Tensors, document: object) -> None:
    save_file(tensors, path, metadata={"mmrec": json.dumps(document)})


def contents(model: nn.Module, optimizer: AdamW) -> list[Tensor]:
    state = optimizer.state_dict()["state"]
    moments = [value for entry in state.values() for _, value in sorted(entry.items())]
    return [t.clone() for t in (*model.state_dict().values(), *moments, torch.get_rng_state())]


def means(value: float) -> Tensors:
    return {"0.weight": torch.full((3, 2), value)}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    model, optimizer = trained(0)
    save_weights(tmp_path / "model.safetensors", model, IDENTITY)
    save_state(
        tmp_path / "resume.safetensors",
        model,
        {"optimizer": optimizer},
        TrainState(step=3),
        IDENTITY,
        means(5),
    )
    return tmp_path


def test_what_was_saved_comes_back(files: Path) -> None:
    saved = contents(*trained(0))
    model, optimizer = trained(1)
    average = means(0)
    progress = load_state(
        files / "resume.safetensors", model, {"optimizer": optimizer}, IDENTITY, average
    )
    assert progress == TrainState(step=3)
    assert torch.equal(average["0.weight"], means(5)["0.weight"])
    assert all(map(torch.equal, contents(model, optimizer), saved))
    model, optimizer = trained(1)
    load_weights(files / "model.safetensors", model, IDENTITY)
    weights = model.state_dict().values()
    assert all(map(torch.equal, weights, saved[: len(weights)]))


def test_losses_come_back_in_their_order(tmp_path: Path) -> None:
    losses = {"loss": 3.0, "v-v": 1.0, "t-t": 2.0, "a": 0.5}
    model, optimizer = trained(seed=1)
    file = tmp_path / "resume.safetensors"
    save_state(
        file, model, {"optimizer": optimizer}, TrainState(step=3, losses=losses), IDENTITY, {}
    )
    progress = load_state(file, model, {"optimizer": optimizer}, IDENTITY, {})
    assert list(progress.losses.items()) == list(losses.items())


def test_equal_identities_give_equal_bytes(tmp_path: Path) -> None:
    model, optimizer = trained(seed=1)
    contents = []
    for identity in ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}):
        save_weights(tmp_path / "weights", model, identity)
        save_state(tmp_path / "state", model, {"optimizer": optimizer}, TrainState(), identity, {})
        contents.append([(tmp_path / name).read_bytes() for name in ("weights", "state")])
    assert contents[0] == contents[1]


def change(**values: Any) -> Callable[[Tensors, Document], None]:
    def apply(tensors: Tensors, document: Document) -> None:
        document["progress"].update(values)

    return apply


BROKEN: dict[str, tuple[Callable[[Tensors, Document], object], str]] = {
    "a weight is missing": (lambda t, d: t.pop("model.0.weight"), "model.0.weight is missing"),
    "a moment is missing": (lambda t, d: t.pop("optimizer.2.exp_avg"), "exp_avg is missing"),
    "a mean is missing": (lambda t, d: t.pop("average.0.weight"), "average.0.weight is missing"),
    "no random state": (lambda t, d: t.pop("random.cpu"), "random.cpu is missing"),
    "a strange tensor": (lambda t, d: t.update(x=torch.ones(1)), "x .*unexpected"),
    "another shape": (
        lambda t, d: t.update({"model.0.weight": torch.ones(3)}),
        r"model.0.weight .*\[3\].*\[3, 2\]",
    ),
    "another kind": (
        lambda t, d: t.update({"optimizer.0.step": torch.ones((), dtype=torch.float64)}),
        "optimizer.0.step .*float64",
    ),
    "a wrong random state": (
        lambda t, d: t.update({"random.cpu": torch.ones(9, dtype=torch.uint8)}),
        "random.cpu is not",
    ),
    "a random state of floats": (
        lambda t, d: t.update({"random.cpu": torch.ones(9)}),
        "random.cpu is not",
    ),
    "a strange key of progress": (change(pace=3), "pace=3"),
    "a wrong value of progress": (change(epoch="2"), "epoch='2'"),
    "a key of progress is missing": (lambda t, d: d["progress"].pop("best"), "best=None"),
    "progress is no table": (lambda t, d: d.update(progress=[1]), "best=None"),
    "no progress": (lambda t, d: d.pop("progress"), "state of a training"),
    "identity is no table": (lambda t, d: d.update(identity=[1]), "state of a training"),
    "half an identity": (lambda t, d: d["identity"].pop("train"), "no identity"),
}


@pytest.mark.parametrize("how", list(BROKEN))
def test_a_damaged_state_is_one_line_and_loads_nothing(files: Path, how: str) -> None:
    path = files / "resume.safetensors"
    tensors, document = read(path)
    BROKEN[how][0](tensors, document)
    write(path, tensors, document)
    model, optimizer = trained(1)
    average, before = means(0), contents(model, optimizer)
    with pytest.raises(UserError, match=rf"is damaged \(.*{BROKEN[how][1]}") as caught:
        load_state(path, model, {"optimizer": optimizer}, IDENTITY, average)
    assert "\n" not in str(caught.value)
    assert torch.equal(average["0.weight"], means(0)["0.weight"])
    assert all(map(torch.equal, contents(model, optimizer), before))


@pytest.mark.parametrize("metadata", [None, {"mmrec": "{"}, {"mmrec": "[1]"}, {"other": "1"}])
@pytest.mark.parametrize("name", ["model", "resume"])
def test_a_file_that_does_not_say_what_it_is_for(
    files: Path, name: str, metadata: dict[str, str] | None
) -> None:
    path = files / f"{name}.safetensors"
    tensors, _ = read(path)
    save_file(tensors, path, metadata=metadata)
    model, optimizer = trained(1)
    loads: dict[str, Callable[[], object]] = {
        "model": lambda: load_weights(path, model, IDENTITY),
        "resume": lambda: load_state(path, model, {"optimizer": optimizer}, IDENTITY, means(0)),
    }
    with pytest.raises(UserError, match="is damaged"):
        loads[name]()


def test_one_kind_of_checkpoint_is_not_the_other(files: Path) -> None:
    model, optimizer = trained(1)
    with pytest.raises(UserError, match="state of a training"):
        load_state(files / "model.safetensors", model, {"optimizer": optimizer}, IDENTITY, means(0))
    with pytest.raises(UserError, match="no identity"):
        load_weights(files / "resume.safetensors", model, IDENTITY)


def test_weights_of_another_shape_are_refused(files: Path) -> None:
    tensors, document = read(files / "model.safetensors")
    write(files / "model.safetensors", {**tensors, "0.bias": torch.ones(7)}, document)
    model, _ = trained(1)
    with pytest.raises(UserError, match=r"0.bias .*\[7\].*\[3\]"):
        load_weights(files / "model.safetensors", model, IDENTITY)


def test_only_what_differs_is_named(files: Path) -> None:
    model, _ = trained(1)
    text = {"modality": "text", "backbone": "a", "dim": 3}
    image = {"modality": "image", "backbone": "b", "dim": 5}
    for other, message in (
        ({"train": {"lr": 0.2, "seed": 1}}, "train.lr=0.1, not 0.2"),
        ({"model": "n"}, "model='m', not 'n'"),
        ({"features": [{**text, "dim": 4}]}, "features.text.dim=3, not 4"),
        ({"features": [image, text]}, r"features.image=nothing, not \.\.\."),
        ({"features": []}, r"features.text=\.\.\., not nothing"),
        (
            {"model": "n", "train": {"lr": 0.2, "seed": 2}, "features": [{**text, "dim": 4}]},
            "features.text.dim=3, not 4; model='m', not 'n'; train.lr=0.1, not 0.2 and 1 more",
        ),
    ):
        with pytest.raises(UserError, match=message):
            load_weights(files / "model.safetensors", model, {**IDENTITY, **other})


def test_a_checkpoint_of_version_0_1_is_refused_with_its_remedy(files: Path) -> None:
    """Its identity has no ``recommender``, and ``model`` is a table of settings."""
    model, optimizer = trained(1)
    identity = {**IDENTITY, "recommender": "m"}
    loads: list[Callable[[], object]] = [
        lambda: load_weights(files / "model.safetensors", model, identity),
        lambda: load_state(
            files / "resume.safetensors", model, {"optimizer": optimizer}, identity, means(0)
        ),
    ]
    for load in loads:
        with pytest.raises(UserError, match=r"safetensors .*mmrec 0\.1; train again"):
            load()


@pytest.mark.parametrize("name", ["model.safetensors", "resume.safetensors"])
def test_weights_of_zero_are_refused(files: Path, name: str) -> None:
    path = files / "resume.safetensors"
    tensors, document = read(path)
    zero = {
        key: value if key.startswith(("optimizer.", "random.")) else torch.zeros_like(value)
        for key, value in tensors.items()
    }
    write(files / name, zero, document)
    with pytest.raises(UserError, match=rf"{name} is damaged .*zero.*train again"):
        read_tensors(files / name, "train again")


def test_a_flipped_byte_of_weights_is_refused(files: Path) -> None:
    path = files / "resume.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"resume\.safetensors is damaged .*changed"):
        read_tensors(path, "train again")


def test_an_unreadable_file_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_weights(path, trained(0)[0], IDENTITY)

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("trainer.checkpoint.verify", refuse)
    with pytest.raises(UserError, match="permission") as error:
        read_tensors(path, "train again")
    assert "damaged" not in str(error.value)


def test_a_killed_save_leaves_nothing_after_the_next_one(files: Path) -> None:
    """safetensors is killed while it writes its own temporary file."""
    script = (
        "import os, sys, threading, time, torch\n"
        "from pathlib import Path\n"
        "from torch import nn\n"
        "from trainer.checkpoint import save_weights\n"
        "folder = Path(sys.argv[1])\n"
        "def kill() -> None:\n"
        "    while not list(folder.glob('.tmp*')):\n"
        "        time.sleep(0)\n"
        "    os.kill(os.getpid(), 9)\n"
        "threading.Thread(target=kill, daemon=True).start()\n"
        "model = nn.Linear(4000, 4000)\n"
        "while True:\n"
        "    save_weights(folder / 'model.safetensors', model, {})\n"
    )
    subprocess.run([sys.executable, "-c", script, str(files)], check=False, timeout=120)
    assert list(files.glob(".tmp*"))
    save_weights(files / "model.safetensors", trained(0)[0], IDENTITY)
    assert sorted(path.name for path in files.iterdir()) == [
        "model.safetensors",
        "resume.safetensors",
    ]
