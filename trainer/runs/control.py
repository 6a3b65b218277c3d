"""Find the controls of runs: the same trainings on features without content.

A control of a run has the run's model, preparation, feature tables, initial weights and settings,
the seed included. Only the setting ``control`` differs, and what does not decide the result: the
device and the size of evaluation batches. Equal seeds give equal initial weights, windows and
batches, so that nothing but the features differs. Several seeds are compared with as many controls.
"""

import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from features.errors import UserError
from features.warehouse import Warehouse
from trainer.data.control import MEANINGS, NONE, PERMUTE
from trainer.models.registry import MODELS
from trainer.runs.folder import check_run_name
from trainer.runs.read import Record, read_config, read_record, read_records
from trainer.runs.settings import settings_classes, stage_defaults
from trainer.runs.spec import OF_EARLIER_RUNS

_IGNORED = ("control", "device", "eval_batch")
_SAME = ("model", "dataset", "features", "fingerprint", "interactions", "stage", "init")


def with_controls(warehouse: Warehouse, names: Sequence[str], options: str = "") -> list[str]:
    """Return the names of the controls of runs, followed by the names of the runs.

    A kind of control is left out unless every run has one. Of several controls of one kind, the
    newest evaluated one counts.

    Args:
        warehouse: Warehouse of the runs.
        names: Names of the runs, which differ at most in their seeds.
        options: Further words of the commands that an error names, such as ``--warehouse DIR``.

    Raises:
        UserError: A run is a control itself, reads no features, or has no control. The message
            names the commands that train and evaluate the control.
    """
    records = read_records(warehouse, names)
    for record in records:
        _check_controllable(record)
    _check_one_system(records)
    others = _other_controls(warehouse)
    by_kind = {
        kind: [_find(warehouse, record, kind, others) for record in records] for kind in MEANINGS
    }
    complete = [name for controls in by_kind.values() if None not in controls for name in controls]
    if not complete:
        kind = next((kind for kind, controls in by_kind.items() if any(controls)), PERMUTE)
        missing = records[by_kind[kind].index(None)]
        raise UserError(
            f"run {missing.name!r} has no control; run: {training_command(missing, kind, options)}"
        )
    return [*filter(None, complete), *names]


def training_command(record: Record, kind: str, options: str = "") -> str:
    """Return the commands that train and evaluate a control of a run."""
    about = record.about
    words = ["mmrec", "train", "--model", about["model"], "--dataset", about["dataset"]]
    words += [word for label in about["features"] for word in ("--features", label)]
    if "init" in about:
        words += ["--init", about["init"]["run"], "--transfer", about["init"]["transfer"]]
    words += ["--config", str(record.folder / "config.toml"), "--control", kind]
    name = f"{record.name}-{kind}"
    if (record.folder.parent / name).exists() or not _can_be_name(name):
        return f"{shlex.join(words)}{options} && mmrec eval{options}"
    return f"{shlex.join([*words, '--name', name])}{options} && mmrec eval {name}{options}"


def _can_be_name(name: str) -> bool:
    try:
        check_run_name(name)
    except UserError:
        return False
    return True


def _check_controllable(record: Record) -> None:
    if record.control != NONE:
        raise UserError(
            f"run {record.name!r} is a control itself (control={record.control}); name the run that"
            " it controls"
        )
    if not record.about["features"]:
        raise UserError(
            f"run {record.name!r} ({record.about['model']}) reads no feature table, so no control"
            " can take their content away; leave --control out"
        )


def _check_one_system(records: Sequence[Record]) -> None:
    """Refuse runs that differ in more than their seed."""
    keys = [{**_key(record.about, record.settings), "seed": None} for record in records]
    for record, key in zip(records, keys, strict=True):
        if key != keys[0]:
            raise UserError(
                f"runs {records[0].name!r} and {record.name!r} differ in more than their seed;"
                " compare each with its control alone"
            )


def _key(about: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return all that a run and its control have in common, with defaults for absent settings."""
    recommender = MODELS.find(about["model"]).load()
    is_pretraining = bool(about.get("stage"))
    classes = settings_classes(recommender, is_pretraining)
    key: dict[str, Any] = {entry.name: entry.default for kind in classes for entry in fields(kind)}
    key |= stage_defaults(recommender, is_pretraining, OF_EARLIER_RUNS)
    key |= settings
    for name in _IGNORED:
        key.pop(name, None)
    return key | {f"run.{name}": about.get(name) for name in _SAME}


def _other_controls(warehouse: Warehouse) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Return name to description and settings of each control; runs that are damaged have none."""
    controls = {}
    for name in warehouse.runs():
        try:
            about, settings = read_config(warehouse.runs_dir / name)
        except UserError:
            continue
        if settings.get("control", NONE) != NONE:
            controls[name] = about, settings
    return controls


def _find(
    warehouse: Warehouse,
    record: Record,
    kind: str,
    others: dict[str, tuple[dict[str, Any], dict[str, Any]]],
) -> str | None:
    """Return the name of the control of a run; ``None`` without one."""
    wanted = _key(record.about, record.settings)
    names = [
        name
        for name, (about, settings) in others.items()
        if (about["model"], settings["control"]) == (record.about["model"], kind)
        and _key(about, settings) == wanted
    ]
    names.sort(key=lambda name: str(others[name][0].get("created", "")), reverse=True)
    names.sort(key=lambda name: not (warehouse.runs_dir / name / "predictions.parquet").exists())
    for name in names:
        identity = read_record(warehouse, name).identity
        if not identity or identity.get("features") == record.identity.get("features"):
            return name
    return None
