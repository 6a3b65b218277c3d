"""What the folder of a run tells of it, read without building its model: no torch here."""

import json
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from features.errors import UserError
from features.warehouse import Warehouse
from trainer.runs.folder import held_metrics, read_about


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A run as it describes itself."""

    folder: Path
    about: dict[str, Any]
    """``[run]`` of its ``config.toml``: model, dataset, features, fingerprint, ..."""
    settings: dict[str, Any]
    """All its settings, in one flat space, as ``--set`` knows them."""
    identity: dict[str, Any]
    """What its best weights are for; empty where there are none yet."""

    @property
    def name(self) -> str:
        """The run's name."""
        return self.folder.name

    @property
    def pretraining(self) -> bool:
        """Whether it recommends nothing."""
        return bool(self.about.get("stage"))


def read_record(warehouse: Warehouse, name: str) -> Record:
    """Read the configuration of a run, and what its weights say they are for.

    Raises:
        UserError: There is no such run, or it is damaged.
    """
    folder, _ = warehouse.choose_run(name)
    path = folder / "config.toml"
    about = read_about(path)
    document = tomllib.loads(path.read_text(encoding="utf-8"))
    tables = [document.get(name, {}) for name in ("train", "model", "pretrain")]
    if not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path} is damaged (its settings are no tables); train again")
    settings = {key: value for table in tables for key, value in table.items()}
    return Record(
        folder=folder,
        about=about,
        settings=settings,
        identity=_identity(folder / "model.safetensors"),
    )


def read_records(warehouse: Warehouse, names: Sequence[str]) -> list[Record]:
    """Read several runs, see :func:`read_record`.

    Raises:
        UserError: One cannot be read, or stands twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"run {name!r} is named twice; name it once")
    return [read_record(warehouse, name) for name in names]


def read_metrics(record: Record) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics table; no rows before the end of epoch 1.

    The columns are those of :data:`features.schema.METRICS_SCHEMA`.

    Raises:
        UserError: It is damaged.
    """
    remedy = f"remove it and run mmrec eval --run {record.name}"
    return held_metrics(record.folder / "metrics.parquet", remedy)


def _identity(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="numpy") as file:
            document = json.loads((file.metadata() or {})["mmrec"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({' '.join(str(error).split())}); train again"
        ) from None
    return document if isinstance(document, dict) else {}
