"""features/README.md lists every file, and its example reads a table without mmrec."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa

from features.arrow_columns import embedding_array
from features.provenance import Provenance
from features.schema import feature_schema
from features.store import FeatureStore
from features.warehouse import Warehouse

PACKAGE = Path(__file__).parents[2] / "features"
README = (PACKAGE / "README.md").read_text(encoding="utf-8")


def test_the_table_lists_every_file() -> None:
    table = README.partition("## The way of the data")[0]
    files = set(re.findall(r"^\| `(\w+\.py)` \|", table, re.MULTILINE))
    assert files == {path.name for path in PACKAGE.glob("[!_]*.py")}


def test_the_example_reads_the_store_without_mmrec(warehouse: Warehouse) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    table = FeatureStore(warehouse).table("demo", "hashed", "image")
    provenance = Provenance(
        backbone="hashed",
        checkpoint="c",
        preprocessing="p",
        pooling="mean",
        modality="image",
        level="pooled",
        compute="float32",
        dtype="float16",
        dim=3,
    )
    vectors = np.array([[1, 0, 0], [0, 1, 0], [2, 1, 0], [3, 0, 0], [1, 2, 0]], np.float16)
    for begin, end in ((0, 2), (2, 5)):
        rows = end - begin
        part = pa.Table.from_arrays(
            [
                pa.array(range(begin, end), pa.int32()),
                pa.array(["a", "b", "c", "d", "e"][begin:end]),
                pa.array(["h"] * rows),
                pa.nulls(rows, pa.int32()),
                pa.nulls(rows, pa.int32()),
                pa.nulls(rows, pa.bool_()),
                embedding_array(vectors[begin:end]),
            ],
            schema=feature_schema(3, "float16"),
        )
        table.append(part, provenance)
    table.finish("f", provenance)
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=warehouse.root.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['d', 'c', 'e']\n" * 2
