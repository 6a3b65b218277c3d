"""Read the folder of a run without building its model. No torch here."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from features.checksums import verify
from features.documents import read_toml
from features.errors import DamagedError, UserError, no_permission
from features.result_tables import read_protocol
from features.warehouse import Warehouse
from trainer.data.control import NONE
from trainer.evaluation.protocol import PROTOCOL
from trainer.runs.folder import read_about, stored_metrics


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """The files of a run, read."""

    folder: Path
    about: dict[str, Any]
    """Table ``[run]`` of its ``config.toml``: model, dataset, features, fingerprint, ..."""
    settings: dict[str, Any]
    """All settings in one flat space, as ``--set`` takes them."""
    identity: dict[str, Any]
    """Identity that its best weights were saved with; empty if there are no weights yet."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def ties(self) -> tuple[float, str]:
        """Share of interactions tied in time, and their order; (0, file) in runs before 0.2."""
        return float(self.about.get("tied", 0.0)), str(self.about.get("ties", "file"))

    @property
    def control(self) -> str:
        """Value of the setting ``control``; ``none`` in runs of versions without it."""
        return str(self.settings.get("control", NONE))

    @property
    def pretraining(self) -> bool:
        """True if the run is a pre-training, which recommends nothing."""
        return bool(self.about.get("stage"))


def read_record(warehouse: Warehouse, name: str) -> Record:
    """Read the configuration of a run and the identity of its weights.

    Raises:
        UserError: No run has the name, or the run is damaged.
    """
    folder, _ = warehouse.choose_run(name)
    about, settings = read_config(folder)
    return Record(
        folder=folder,
        about=about,
        settings=settings,
        identity=_identity(folder / "model.safetensors"),
    )


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the table ``[run]`` and all settings of a run's ``config.toml``.

    Raises:
        UserError: The file is damaged.
    """
    path = folder / "config.toml"
    about = read_about(path)
    document = read_toml(path, "train again")
    tables = [document.get(name, {}) for name in ("train", "model", "task", "pretrain")]
    if not all(isinstance(table, dict) for table in tables):
        raise DamagedError(
            f"{path} is damaged ([train], [model] or [task] is not a table); train again"
        )
    return about, {key: value for table in tables for key, value in table.items()}


def read_records(warehouse: Warehouse, names: Sequence[str]) -> list[Record]:
    """Read several runs, see :func:`read_record`.

    Raises:
        UserError: A run cannot be read, or is named twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"run {name!r} is named twice; name it once")
    return [read_record(warehouse, name) for name in names]


def has_current_protocol(folder: Path) -> bool:
    """Return False if an earlier version evaluated the run, by another protocol.

    A run without predictions is not evaluated, and has no other protocol.
    """
    return read_protocol(folder / "predictions.parquet") in (None, PROTOCOL)


def read_metrics(record: Record) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics table; no rows before the end of epoch 1.

    The columns are those of :data:`features.schema.METRICS_SCHEMA`.

    Raises:
        UserError: The table is damaged.
    """
    remedy = f"remove it and run mmrec eval --run {record.name}"
    return stored_metrics(record.folder / "metrics.parquet", remedy)


def _identity(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        verify(path)
        with safe_open(path, framework="numpy") as file:
            document = json.loads((file.metadata() or {})["mmrec"])
    except PermissionError:
        raise no_permission(path) from None
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise DamagedError(
            f"{path} is damaged ({' '.join(str(error).split())}); train again"
        ) from None
    if not isinstance(document, dict):
        return {}
    document.pop("checksum", None)
    return document
