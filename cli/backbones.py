"""``mmrec backbones``."""

from typing import Any

from cli import console
from cli.options import JsonOption
from features.registry import OWN

_ONE_TABLE = 144  # columns of a terminal on which all facts fit into one table


def backbones(json: JsonOption = False) -> None:
    """List the frozen backbones by short name."""
    from pipeline.backbones.listing import list_backbones
    from pipeline.backbones.loading import OTHER_NAMES
    from pipeline.backbones.registry import BACKBONES

    rows = list_backbones()
    for name, reason in BACKBONES.broken.items():
        console.notify(f"backbone {name} cannot be used: {reason}")
    if json:
        console.emit_json(rows)
        return
    _print_tables(rows)
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        console.notify(f"{', '.join(row['name'] for row in rows if row['note'] == note)}: {note}")
    console.notify(
        "levels: pooled, tokens, layer-K; videos, and pairs of a model with two encoders: pooled"
    )
    console.notify(f"other names: {OTHER_NAMES} with a saved model")


def _print_tables(rows: list[dict[str, Any]]) -> None:
    """Print one table; on a narrow terminal the checkpoints are a second one."""
    columns = ["name", "takes", "dim", "layers", "library", "offline"]
    facts = [
        [_name(row), " ".join(row["modalities"]), row["dim"], _layers(row["blocks"]),
         row["library"], row["offline"]]
        for row in rows
    ]  # fmt: skip
    if console.out.width < _ONE_TABLE:
        console.table(columns, facts)
        columns, facts = ["name"], [[_name(row)] for row in rows]
    lines = []
    for row, cells in zip(rows, facts, strict=True):
        first, *others = row["checkpoint"].split(" + ")
        lines.append([*cells, first, row["licence"]])
        lines += [[*([""] * len(cells)), f"+ {checkpoint}", ""] for checkpoint in others]
    console.table([*columns, "checkpoint", "licence"], lines)


def _name(row: dict[str, Any]) -> str:
    name = str(row["name"])
    return name if row["origin"] == OWN else f"{name} [{row['origin']}]"


def _layers(blocks: int) -> str | None:
    return f"0-{blocks - 1}" if blocks else None
