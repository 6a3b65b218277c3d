"""warehouse/README.md describes the tables as the schemas define them."""

import re
from pathlib import Path

import pyarrow as pa
import pytest

from features.schema import (
    FAILURES_SCHEMA,
    INTERACTIONS_SCHEMA,
    ITEMS_SCHEMA,
    METRICS_SCHEMA,
    PREDICTIONS_SCHEMA,
    feature_schema,
)

README = (Path(__file__).parents[2] / "warehouse" / "README.md").read_text()


@pytest.mark.parametrize(
    ("table", "schema"),
    [
        ("items", ITEMS_SCHEMA),
        ("interactions", INTERACTIONS_SCHEMA),
        ("features", feature_schema(4, "float16")),
        ("failures", FAILURES_SCHEMA),
        ("metrics", METRICS_SCHEMA),
        ("predictions", PREDICTIONS_SCHEMA),
    ],
)
def test_the_readme_describes_every_column(table: str, schema: pa.Schema) -> None:
    (section,) = re.findall(rf"^### {table}\n(.*?)(?=^##|\Z)", README, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (.+) \|$", section, re.MULTILINE)
    assert [name for name, _, _ in rows] == schema.names
    for name, kind, meaning in rows:
        field = schema.field(name)
        assert str(field.type).startswith(kind.split()[0])
        assert field.nullable == ("NULL" in meaning), name
