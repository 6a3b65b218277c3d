"""One process of :mod:`tests.benchmarks.equal_versions`: trains settings by one version of mmrec.

It is run as a file, with the checkout of the version as the working folder and first on the path:
it imports nothing of the tests, which are those of that version.
"""

import argparse
import hashlib
import importlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

Job = Mapping[str, Any]
"""A setting as a dictionary, in the words of the version that trains it."""


class Version(Protocol):
    """The calls of one version that make, train and evaluate a run."""

    def build(self, root: Path, job: Job) -> Any:
        """Return a run with ``model``, ``task`` and ``folder``; ``root`` is the warehouse."""

    def train(self, run: Any, on_step: Callable[[object], None]) -> None:
        """Train the run and call ``on_step`` after each step."""

    def evaluate(self, root: Path, run: Any) -> None:
        """Write ``predictions.parquet`` into the folder of the run."""


class FlatVersion:
    """Version 0.1: the modules of the trainer lie in one folder."""

    def build(self, root: Path, job: Job) -> Any:
        """Begin a run by ``trainer.run``."""
        warehouse = importlib.import_module("features.warehouse").Warehouse(root)
        start = importlib.import_module("trainer.run").start_run
        return start(
            warehouse,
            job["model"],
            job["datasets"],
            stage=job["stage"],
            features=job["features"] or None,
            settings=job["settings"],
        )

    def train(self, run: Any, on_step: Callable[[object], None]) -> None:
        """Train by ``trainer.run``."""
        importlib.import_module("trainer.run").train(run, on_tick=on_step)

    def evaluate(self, root: Path, run: Any) -> None:
        """Evaluate by ``trainer.evaluate``."""
        warehouse = importlib.import_module("features.warehouse").Warehouse(root)
        importlib.import_module("trainer.evaluate").evaluate(warehouse, run, index="torch")


class CurrentVersion:
    """This version, and versions before it whose runs are in ``trainer/runs``."""

    def build(self, root: Path, job: Job) -> Any:
        """Begin a run by ``trainer.runs.run``."""
        from features.warehouse import Warehouse
        from trainer.runs.run import create_run
        from trainer.runs.spec import RunSpec
        from trainer.setting_sources import SettingSources

        warehouse = Warehouse(root)
        spec = RunSpec.resolve(
            warehouse,
            job["model"],
            job["datasets"],
            is_pretraining=job["stage"] == "pretrain",
            features=job["features"] or None,
            sources=SettingSources(pairs=job["settings"]),
        )
        return create_run(warehouse, spec)

    def train(self, run: Any, on_step: Callable[[object], None]) -> None:
        """Train by ``trainer.runs.run``."""
        from trainer.runs.train import train_run

        train_run(run, on_progress=on_step)

    def evaluate(self, root: Path, run: Any) -> None:
        """Evaluate by ``trainer.runs.evaluate``."""
        from features.warehouse import Warehouse
        from trainer.runs.evaluate import evaluate

        evaluate(Warehouse(root), run, index="torch")


def version_in(checkout: Path) -> Version:
    """Return the calls of the version in a folder."""
    return CurrentVersion() if (checkout / "trainer" / "runs").is_dir() else FlatVersion()


class EnoughError(Exception):
    """Raised when the steps that are compared are done."""


@contextmanager
def _limited(limits: Mapping[str, Any]) -> Iterator[None]:
    """Set constants of modules inside the block.

    Raises:
        AttributeError: A module does not have the constant.
    """
    kept = []
    for name, value in limits.items():
        module_name, _, attribute = name.rpartition(".")
        module = importlib.import_module(module_name)
        kept.append((module, attribute, getattr(module, attribute)))
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, attribute, value in kept:
            setattr(module, attribute, value)


def run_job(role: str, root: Path, job: Job) -> dict[str, Any]:
    """Train one setting.

    Args:
        role: ``before`` writes the weights it starts from to ``job["start"]``; ``after`` starts
            from these.
        root: The warehouse.
        job: What to train.

    Returns:
        The losses of each step, the ranks of each split, how the first weights of ``after`` differ
        from those it starts from, and a hash of the state of torch's generator once the run is
        built.
    """
    import torch
    from safetensors.torch import load_file, save_file

    version = version_in(Path.cwd())
    run = version.build(root, job)
    generator = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    weights = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    own = ""
    if role == "before":
        save_file(weights, job["start"])
    else:
        given = _rename(load_file(job["start"]), job["renamed"])
        own = _difference(weights, given)
        run.model.load_state_dict(given)
    losses: list[dict[str, str]] = []
    task_loss = run.task.loss

    def loss(batch: Any) -> dict[str, Any]:
        terms: dict[str, Any] = task_loss(batch)
        losses.append({name: float(value.detach()).hex() for name, value in terms.items()})
        return terms

    def on_step(progress: object) -> None:
        if job["steps"] and len(losses) >= job["steps"]:
            raise EnoughError

    run.task.loss = loss
    torch.manual_seed(0)  # the first weights may be drawn in another order
    with suppress(EnoughError):
        version.train(run, on_step)
    ranks: dict[str, list[int]] = {}
    if not job["steps"] and not job["stage"]:
        version.evaluate(root, run)
        ranks = _ranks(run.folder / "predictions.parquet")
    shutil.rmtree(run.folder)
    return {"losses": losses, "ranks": ranks, "generator": generator, "own": own}


def _rename(weights: Mapping[str, Any], renamed: list[tuple[str, str]]) -> dict[str, Any]:
    """Replace patterns in the names of weights."""
    named = {}
    for name, tensor in weights.items():
        for pattern, replacement in renamed:
            name = re.sub(pattern, replacement, name)
        named[name] = tensor
    return named


def _difference(weights: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Say how weights differ; empty: they are equal."""
    if weights.keys() != given.keys():
        return f"names differ: {', '.join(sorted(weights.keys() ^ given.keys())[:4])}"
    unequal = [name for name, tensor in weights.items() if not bool((tensor == given[name]).all())]
    return f"values differ: {', '.join(unequal[:3])} ({len(unequal)})" if unequal else ""


def _ranks(file: Path) -> dict[str, list[int]]:
    """Return the ranks of each split with seen items filtered and kept, in the order of users."""
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    columns = {"rank_masked": "filtered", "rank_unmasked": "kept"}
    table = table.rename_columns(
        [re.sub("^rank_", "", columns.get(name, name)) for name in table.column_names]
    ).sort_by([("split", "ascending"), ("user", "ascending")])
    splits = table.column("split").to_pylist()
    return {
        f"{split}, {seen}": [
            rank for rank, of in zip(table.column(seen).to_pylist(), splits, strict=True)
            if of == split
        ]
        for split in sorted(set(splits))
        for seen in ("filtered", "kept")
    }  # fmt: skip


def main() -> None:
    """Run the jobs of a file and write the result of each as ``KEY.json`` into a folder."""
    import torch

    import trainer

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("role", choices=("before", "after"))
    parser.add_argument("warehouse", type=Path)
    parser.add_argument("jobs", type=Path, help="JSON list of jobs")
    parser.add_argument("results", type=Path, help="folder")
    given = parser.parse_args()
    if not Path(str(trainer.__file__)).is_relative_to(Path.cwd()):
        raise SystemExit(f"{trainer.__file__} is not in {Path.cwd()}; put it first on PYTHONPATH")
    torch.set_num_threads(1)
    for job in json.loads(given.jobs.read_text()):
        try:
            with _limited(job["limits"]):
                result = run_job(given.role, given.warehouse, job)
        except Exception as error:  # the other settings are compared all the same
            result = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        (given.results / f"{job['key']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
