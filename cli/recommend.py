"""``mmrec recommend``: what to show next, from a trained run."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli import console
from cli.options import DeviceOption, JsonOption, WarehouseOption
from features.errors import UserError, unknown
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.runs.recommend import Predictor

_ASKS = "--user USER_ID, --history ITEM_ID,ITEM_ID,..., --all, or --similar ITEM_ID"


def recommend(
    user: Annotated[
        str | None, typer.Option("--user", help="A user of the dataset, by id.")
    ] = None,
    history: Annotated[
        list[str] | None,
        typer.Option("--history", help="ITEM_ID,ITEM_ID,... of anyone, oldest first; repeatable."),
    ] = None,
    all: Annotated[bool, typer.Option("--all", help="Every user; needs --out.")] = False,
    similar: Annotated[
        str | None, typer.Option("--similar", help="Items like this one, by the run's vectors.")
    ] = None,
    k: Annotated[int, typer.Option("--k", help="Length of a list.")] = 10,
    keep_seen: Annotated[
        bool, typer.Option("--keep-seen", help="Items that the user has had may come again.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="With --all: the Parquet file to write.")
    ] = None,
    run: Annotated[str | None, typer.Option("--run", help="Else the last one.")] = None,
    index: Annotated[str, typer.Option("--index", help="What searches the catalogue.")] = "faiss",
    device: DeviceOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Recommend items to a user, to a history, or to everybody; or find items like one.

    Items without any interaction are in the catalogue too.
    """
    from retrieval.indexes import INDEXES

    if index not in INDEXES:
        raise unknown("index", index, list(INDEXES))
    if sum((user is not None, bool(history), all, similar is not None)) != 1:
        raise UserError(f"give one of {_ASKS}")
    if all != (out is not None):
        raise UserError("--all and --out FILE.parquet go together")
    if k < 1:
        raise UserError(f"--k {k} is no length of a list; give at least 1")
    warehouse = Warehouse(root)
    folder, why = warehouse.choose_run(run)
    if why != "given":
        console.notify(f"run: {folder.name} ({why})")
    from trainer.runs.recommend import Predictor
    from trainer.runs.run import open_run

    adviser = Predictor(warehouse, open_run(warehouse, folder, device), index=index)
    document: dict[str, Any] = {"run": folder.name, "dataset": adviser.run.dataset}
    if out is not None:
        document |= _write(adviser, out, k, keep_seen)
        if json:
            console.emit_json(document)
        return
    if user is not None:
        items = adviser.history(adviser.user(user)).tolist()
        document |= {"user": user, **_told(adviser, items)}
        found = adviser.for_history(items, k, keep_seen=keep_seen)
    elif history:
        items = _items(adviser, history)
        document |= _told(adviser, items)
        found = adviser.for_history(items, k, keep_seen=keep_seen)
    else:
        assert similar is not None
        found = adviser.similar(adviser.item(similar), k)
        document |= {"similar": similar}
    suggestions = adviser.named(found)
    if json:
        console.emit_json({**document, "items": [asdict(one) for one in suggestions]})
        return
    console.table(
        ["rank", "item_id", "text", "score" if similar is None else "cosine", "cold"],
        [[one.rank, one.item_id, one.text, one.score, one.cold] for one in suggestions],
    )
    if len(suggestions) < k:
        console.notify(f"no more than these {len(suggestions)} items are left")


def _items(adviser: "Predictor", history: list[str]) -> list[int]:
    """The items of a history; an id that has a comma in it is given by an option of its own."""
    known = set(adviser.item_ids.to_pylist()) if any("," in entry for entry in history) else set()
    ids = [
        part.strip()
        for entry in history
        for part in ([entry] if entry in known else entry.split(","))
        if part.strip()
    ]
    if not ids:
        raise UserError("--history names no item; give ITEM_ID,ITEM_ID,..., the oldest first")
    return [adviser.item(one) for one in ids]


def _told(adviser: "Predictor", items: list[int]) -> dict[str, Any]:
    """Say on which history the list rests."""
    last = adviser.item_ids[items[-1]].as_py()
    console.notify(f"from a history of {len(items):,} items, the last one {last}")
    return {"history": len(items), "last": last}


def _write(adviser: "Predictor", out: Path, k: int, keep_seen: bool) -> dict[str, Any]:
    from trainer.runs.recommend import write_all

    line, began = console.ProgressLine(), time.monotonic()

    def tell(done: int, total: int) -> None:
        rate = done / max(1e-9, time.monotonic() - began)
        left = console.format_duration((total - done) / rate)
        line.update(f"{done:,} of {total:,} users, {rate:,.0f}/s, {left} left")

    try:
        rows = write_all(adviser, out, k, keep_seen=keep_seen, on_users=tell)
    finally:
        line.close()
    users = adviser.dataset.info.users
    console.notify(f"{rows:,} recommendations for {users:,} users: {out}")
    return {"out": str(out), "users": users, "rows": rows}
