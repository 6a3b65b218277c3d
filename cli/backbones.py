"""``mmrec backbones``."""

from typing import TYPE_CHECKING

from cli import console
from cli.options import JsonOption

if TYPE_CHECKING:
    pass


_WIDE = 144  # columns that a list of backbones takes with all there is to say of each


def backbones(json: JsonOption = False) -> None:
    """List the frozen backbones by short name."""
    from pipeline.backbones.registry import list_backbones

    rows = list_backbones()
    if json:
        console.emit_json(rows)
        return
    heads = ["name", "takes", "dim", "layers", "library", "offline"]
    facts = [
        [row["name"], " ".join(row["modalities"]), row["dim"], _layers(row["blocks"]),
         row["library"], row["offline"]]
        for row in rows
    ]  # fmt: skip
    origins = [_origin(row["checkpoint"], row["licence"]) for row in rows]
    if console.out.width < _WIDE:
        console.table(heads, facts)
        heads, facts = ["name"], [[row["name"]] for row in rows]
    lines = []
    for fact, (first, *more) in zip(facts, origins, strict=True):
        lines += [[*fact, *first], *([""] * len(heads) + origin for origin in more)]
    console.table([*heads, "checkpoint", "licence"], lines)
    for note in dict.fromkeys(row["note"] for row in rows if row["note"]):
        console.notify(f"{', '.join(row['name'] for row in rows if row['note'] == note)}: {note}")
    console.notify(
        "levels: pooled, tokens, layer-K; of clips, and of pairs by two towers, pooled alone"
    )
    console.notify(
        "beside these: open_clip:ARCH/TAG, hf:ORG/NAME, or a local folder with a saved model"
    )


def _layers(blocks: int) -> str | None:
    return f"1-{blocks - 1}" if blocks else None


def _origin(checkpoint: str, licence: str) -> list[list[str]]:
    """One line for each checkpoint that a backbone is made of."""
    first, *more = checkpoint.split(" + ")
    return [[first, licence], *([f"+ {one}", ""] for one in more)]
