"""Write the table of the inputs that could not be used."""

import pyarrow as pa

from features.atomic_files import write_table
from features.schema import FAILURES_SCHEMA
from features.store import FeatureTable
from pipeline.backbones.base import POOLED
from pipeline.extraction.deduplication import Failure
from pipeline.extraction.plan import ExtractionPlan


def write_failures(
    plan: ExtractionPlan, table: FeatureTable, modality: str, failures: list[Failure]
) -> None:
    """Write the failures of a feature table in the order of items; without any, remove the file."""
    folder = plan.warehouse.dataset_dir(plan.info.name) / "failures"
    level = "" if table.level == POOLED else f"-{table.level}"
    path = folder / f"{table.backbone}-{modality}{level}.parquet"
    if not failures:
        path.unlink(missing_ok=True)
        return
    failures = sorted(failures, key=lambda failure: failure.item)
    item = pa.array([failure.item for failure in failures], pa.int32())
    columns = [
        item,
        plan.items.ids.take(item).combine_chunks(),
        pa.array([modality] * len(failures)),
        pa.array([plan.backbones[modality].name] * len(failures)),
        pa.array([failure.stage for failure in failures]),
        pa.array([failure.reason for failure in failures]),
        pa.array([failure.source for failure in failures]),
    ]
    write_table(path, pa.Table.from_arrays(columns, schema=FAILURES_SCHEMA))
