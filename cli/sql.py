"""``mmrec sql``: queries of the warehouse."""

import io
import sys
from typing import Annotated, Any

import typer

from cli import console
from cli.options import JsonOption, WarehouseOption
from features.errors import UserError

_MOST_ROWS = 200  # of a printed table; --json and --csv print all rows


def sql(
    statement: Annotated[str, typer.Argument(help="One SELECT over the views.")],
    json: JsonOption = False,
    csv: Annotated[bool, typer.Option("--csv", help="All rows as CSV.")] = False,
    root: WarehouseOption = None,
) -> None:
    """Query the warehouse with SQL, read-only.

    The views are items, interactions, splits, cold, features, tokens, failures, runs, metrics and
    predictions. Each feature table also has a view features_DATASET_BACKBONE_MODALITY, whose
    embedding is FLOAT[D].

    Damaged tables and runs are left out and named, and the exit code is 1.
    """
    if json and csv:
        raise UserError("--json and --csv exclude each other; give one")
    from features.sql_views import query
    from features.warehouse import Warehouse

    damage: list[str] = []

    def on_damage(message: str) -> None:
        damage.append(message)
        console.notify(message)

    table = query(Warehouse(root), statement, console.notify, on_damage, inexact_as_text=True)
    if csv:
        import pyarrow.csv as pa_csv

        if sys.stdout.isatty():
            screen = io.BytesIO()
            pa_csv.write_csv(_flat(table), screen)
            console.out.print(screen.getvalue().decode(), end="")
        else:  # a program reads the values, so they keep all their characters
            pa_csv.write_csv(_flat(table), sys.stdout.buffer)
    elif json:
        console.emit_json(table.to_pylist())
    else:
        rows = table.slice(0, _MOST_ROWS)
        values = [column.to_pylist() for column in rows.columns]
        console.table(table.column_names, zip(*values, strict=True), wrap=False)
        if len(table) > _MOST_ROWS:
            console.notify(
                f"{len(table):,} rows, the first {_MOST_ROWS} shown; --csv or --json for all"
            )
    if damage:  # a program that reads the rows must not take them for all
        raise typer.Exit(1)


def _flat(table: Any) -> Any:
    """Return the table with nested values as JSON, for CSV."""
    from json import dumps

    import pyarrow as pa

    for index, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            texts = [
                None if value is None else dumps(value, ensure_ascii=False, default=str)
                for value in table[index].to_pylist()
            ]
            table = table.set_column(index, field.name, pa.array(texts, pa.string()))
    return table
