"""A prepared dataset of a handful of items, written straight into the canonical tables."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from features.atomic_files import write_table
from features.documents import write_json
from features.schema import INTERACTIONS_SCHEMA, ITEMS_SCHEMA
from features.warehouse import DatasetInfo, Warehouse


def prepare(
    warehouse: Warehouse,
    raw: Path,
    *,
    ids: Sequence[str],
    text: Sequence[str | None] | None = None,
    image: Sequence[str | None] | None = None,
    video: Sequence[str | None] | None = None,
    name: str = "tiny",
) -> DatasetInfo:
    """Write the tables of a dataset whose one user has clicked every item once."""
    n = len(ids)
    none = [None] * n
    columns = [
        pa.array(range(n), pa.int32()),
        pa.array(list(ids), pa.string()),
        pa.array(list(text or none), pa.string()),
        pa.array(list(image or none), pa.string()),
        pa.array(list(video or none), pa.string()),
        pa.array(none, pa.string()),
    ]
    folder = warehouse.dataset_dir(name)
    write_table(
        folder / "items" / "part-0.parquet", pa.Table.from_arrays(columns, schema=ITEMS_SCHEMA)
    )
    clicks = [
        pa.array([0] * n, pa.int32()),
        pa.array(["u"] * n),
        pa.array(range(n), pa.int32()),
        pa.array(none, pa.int64()),
        pa.array(range(n), pa.int32()),
    ]
    table = pa.Table.from_arrays(clicks, schema=INTERACTIONS_SCHEMA)
    write_table(folder / "interactions" / "part-0.parquet", table)
    info = DatasetInfo(
        name=name,
        format="test",
        raw=str(raw),
        k_core=0,
        users=1,
        items=n,
        interactions=n,
        fingerprint=hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        inputs={
            modality: hashlib.sha256(repr(list(values or none)).encode()).hexdigest()
            for modality, values in (("image", image), ("text", text), ("video", video))
        },
        timestamps=False,
        tied=0.0,
    )
    write_json(folder / "dataset.json", asdict(info))
    return info


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    """Draw a picture of coloured noise blocks; another seed is another picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.RandomState(seed).randint(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(path)
    return path
