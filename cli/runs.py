"""``mmrec runs``: list the runs of a warehouse, or delete some."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.warehouse import Warehouse

_RUNS = """
SELECT r.run, r.model, r.dataset, r.created, m.value AS "NDCG@10", r.control, r.settings
FROM runs r LEFT JOIN metrics m ON m.run = r.run AND m.ranker = r.model AND m.phase = 'eval'
    AND m.split = 'test' AND m.targets = 'all' AND m.seen = 'filtered' AND m.metric = 'NDCG@10'
ORDER BY r.created, r.run
"""


def runs(
    delete: Annotated[
        list[str] | None, Option("--delete", metavar="RUN", help="Delete a run; repeatable.")
    ] = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """List the runs: test NDCG@10 (seen items filtered), date, size, and changed settings."""
    from features.sql_views import query

    warehouse = Warehouse(root)
    if delete:
        _delete(warehouse, delete)
        return
    rows = query(warehouse, _RUNS, console.notify).to_pylist()
    for row in rows:
        row["MB"] = _size(warehouse.runs_dir / row["run"]) / 1e6
    if json:
        console.emit_json([{**row, "created": str(row["created"])} for row in rows])
        return
    if not rows:
        console.notify(f"there is no run in {warehouse.runs_dir}; run: mmrec train --model sasrec")
        return
    columns = ("run", "model", "dataset", "created", "MB", "NDCG@10", "settings")
    console.table(columns, [[_shown(row, column) for column in columns] for row in rows])


def _shown(row: dict[str, Any], column: str) -> Any:
    from trainer.data.control import marked

    if column == "model":
        return marked(row["model"], row["control"])
    if column == "created":
        return f"{row[column]:%Y-%m-%d %H:%M}"
    if column == "MB":
        return f"{row[column]:,.1f}"
    return row[column]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _delete(warehouse: Warehouse, names: list[str]) -> None:
    """Delete the folders of runs; nothing is deleted if one of them cannot be."""
    from trainer.runs.folder import delete_runs

    sizes = delete_runs(warehouse, names)
    for name, size in sizes.items():
        console.notify(f"deleted {name} ({size / 1e6:,.1f} MB)")
