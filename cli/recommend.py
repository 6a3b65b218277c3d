"""``mmrec recommend``: recommend items with a trained run."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from cli import console
from cli.options import (
    DeviceOption,
    IndexOption,
    JsonOption,
    RunArgument,
    TrainedRunOption,
    WarehouseOption,
    choose_run,
)
from features.errors import UserError
from features.warehouse import Warehouse

if TYPE_CHECKING:
    from trainer.evaluation.search_facts import SearchFacts
    from trainer.runs.exported import ExportedRun
    from trainer.runs.recommend import Predictor, Suggestion

_REQUESTS = "--user USER_ID, --history ITEM_ID,ITEM_ID,..., --all, or --similar ITEM_ID"


def recommend(
    name: RunArgument = None,
    user: Annotated[str | None, Option(help="Id of a user of the dataset.")] = None,
    history: Annotated[
        list[str] | None, Option(help="ITEM_ID,ITEM_ID,... oldest first; repeatable.")
    ] = None,
    all: Annotated[bool, Option("--all", help="Recommend to every user; needs --out.")] = False,
    similar: Annotated[str | None, Option(help="Id of an item: find items like it.")] = None,
    k: Annotated[int, Option("--k", help="Number of items for each user.")] = 10,
    keep_seen: Annotated[
        bool, Option("--keep-seen", help="Also recommend items of the user's history.")
    ] = False,
    only: Annotated[Path | None, Option(help="File of allowed item ids, one a line.")] = None,
    exclude: Annotated[Path | None, Option(help="File of item ids that are not allowed.")] = None,
    new_share: Annotated[float, Option(help="Least share of new items in each list.")] = 0.0,
    new_below: Annotated[int, Option(help="New: fewer training interactions than this.")] = 10,
    out: Annotated[
        Path | None, Option(help="With --all: file to write, .parquet, .csv or .jsonl.")
    ] = None,
    run: TrainedRunOption = None,
    dataset: Annotated[
        str | None, Option(help="Another dataset; default: that of the run, as it is now.")
    ] = None,
    export: Annotated[
        Path | None, Option(help="Folder of mmrec export, in place of a run; for --history.")
    ] = None,
    index: IndexOption = "faiss",
    device: DeviceOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Recommend items to a user, to a history or to all users, or find similar items.

    Items without interactions are recommended too. After a new mmrec prepare and mmrec extract, the
    run recommends from the new catalogue without training.
    """
    _check_out(out, is_for_all=all)
    _check_request((user is not None, bool(history), all, similar is not None), k)
    if export is not None:
        others = {"RUN": name, "--run": run, "--dataset": dataset, "--new-share": new_share}
        _check_export(others, history)
        exported = _open_export(export, index, {"only": only, "exclude": exclude})
        items = _history(exported, history or [])
        _recommend_one(exported, exported.source, None, items, k, keep_seen=keep_seen, json=json)
        return
    warehouse = Warehouse(root)
    predictor = _open(warehouse, choose_run(warehouse, name, run), dataset, device, index, {
        "only": only, "exclude": exclude, "new_share": new_share, "new_below": new_below,
    })  # fmt: skip
    document = {"run": predictor.run.name, "dataset": predictor.run.spec.dataset}
    document |= {"control": predictor.run.config.control}
    if out is not None:
        document |= _write_all(predictor, out, k, keep_seen)
        if json:
            console.emit_json(document)
    elif similar is not None:
        _recommend_similar(predictor, document | {"similar": similar}, k, json=json)
    else:
        items = _history(predictor, history or []) if user is None else _own_items(predictor, user)
        _recommend_one(predictor, document, user, items, k, keep_seen=keep_seen, json=json)


def _recommend_similar(
    predictor: "Predictor", document: dict[str, Any], k: int, *, json: bool
) -> None:
    """Find the items like the item ``similar`` of the document, and print the list."""
    suggestions = predictor.named(predictor.similar(predictor.item(document["similar"]), k))
    document |= _tell_search(predictor.index, predictor.similar_facts(k))
    _print(document, suggestions, k, json=json, score="cosine")


def _recommend_one(
    predictor: "Predictor | ExportedRun",
    document: dict[str, Any],
    user: str | None,
    items: list[int],
    k: int,
    *,
    keep_seen: bool,
    json: bool,
) -> None:
    """Recommend for the items of a history, and print the list."""
    document |= _describe_history(predictor, user, items)
    suggestions = predictor.named(predictor.for_history(items, k, keep_seen=keep_seen))
    document |= _tell_search(predictor.index, predictor.search_facts(k))
    _print(document, suggestions, k, json=json)


def _tell_search(index: str, facts: "SearchFacts") -> dict[str, Any]:
    """Tell the user how the index searched, and return the same facts for the JSON document."""
    if facts.line:
        console.notify(f"index {index}: {facts.line}")
    return {"index": index, "search": facts.line, "recall": facts.recall}


def _check_request(requests: tuple[bool, ...], k: int) -> None:
    """Raise a UserError unless one list of at least one item is asked for."""
    if sum(requests) != 1:
        raise UserError(f"give one of {_REQUESTS}")
    if k < 1:
        raise UserError(f"--k {k} is not a number of items; give at least 1")


def _check_export(others: dict[str, Any], history: list[str] | None) -> None:
    """Raise a UserError if ``--export`` is given with an option that needs a warehouse."""
    given = [option for option, value in others.items() if value]
    if given or not history:
        reason = f"{' and '.join(given)} need a warehouse" if given else "an export has no users"
        raise UserError(f"{reason}; give --export DIR --history ITEM_ID,ITEM_ID,...")


def _open_export(folder: Path, index: str, choice: dict[str, Any]) -> "ExportedRun":
    """Open the files of ``mmrec export``."""
    from trainer.runs.choice import Choice
    from trainer.runs.exported import ExportedRun

    return ExportedRun(folder, index=index, choice=Choice(**choice))


def _print(
    document: dict[str, Any],
    suggestions: "list[Suggestion]",
    k: int,
    *,
    json: bool,
    score: str = "score",
) -> None:
    if json:
        console.emit_json({**document, "items": [asdict(entry) for entry in suggestions]})
    else:
        _show(suggestions, k, score=score)


def _open(
    warehouse: Warehouse,
    folder: Path,
    dataset: str | None,
    device: str | None,
    index: str,
    choice: dict[str, Any],
) -> "Predictor":
    """Open the run on the catalogue as it is now, and tell the user what has changed."""
    from trainer.data.control import NONE, control_line
    from trainer.runs.choice import Choice
    from trainer.runs.later import open_current
    from trainer.runs.recommend import Predictor

    items = Choice(**choice)
    run = open_current(warehouse, folder, dataset, device=device)
    predictor = Predictor(warehouse, run, index=index, choice=items, on_stage=console.notify)
    for text in run.catalogue_lines():
        console.notify(text)
    if run.config.control != NONE:
        console.notify(control_line(run.config.control))
    return predictor


def _check_out(out: Path | None, *, is_for_all: bool) -> None:
    """Raise a UserError if ``--out`` lacks ``--all``, or the reverse, or is of another format."""
    if is_for_all != (out is not None):
        raise UserError("--all and --out FILE go together")
    if out is not None:
        from features.table_files import check_ending  # imports pyarrow

        check_ending(out)


def _own_items(predictor: "Predictor", user: str) -> list[int]:
    """Return the items of a user of the dataset."""
    items: list[int] = predictor.history(predictor.user(user)).tolist()
    return items


def _history(predictor: "Predictor | ExportedRun", history: list[str]) -> list[int]:
    """Return the items of the values of ``--history``.

    A value that is itself an item id is not divided at its commas.
    """
    has_comma = any("," in value for value in history)
    known = set(predictor.item_ids.to_pylist()) if has_comma else set()
    ids = [
        part.strip()
        for value in history
        for part in ([value] if value in known else value.split(","))
        if part.strip()
    ]
    if not ids:
        raise UserError("--history names no item; give ITEM_ID,ITEM_ID,..., the oldest first")
    return [predictor.item(item_id) for item_id in ids]


def _describe_history(
    predictor: "Predictor | ExportedRun", user: str | None, items: list[int]
) -> dict[str, Any]:
    """Tell the user which history is used, and return the same facts for the JSON document."""
    last = predictor.item_ids[items[-1]].as_py()
    console.notify(f"from a history of {len(items):,} items, the last one {last}")
    facts: dict[str, Any] = {"history": len(items), "last": last}
    return facts if user is None else {"user": user, **facts}


def _show(suggestions: "list[Suggestion]", k: int, *, score: str) -> None:
    console.table(
        ["rank", "item_id", "text", score, "cold"],
        [[entry.rank, entry.item_id, entry.text, entry.score, entry.cold] for entry in suggestions],
        wrap=False,
    )
    if len(suggestions) < k:
        console.notify(f"there are no more than these {len(suggestions)} items")


def _write_all(predictor: "Predictor", out: Path, k: int, keep_seen: bool) -> dict[str, Any]:
    """Write the recommendations of all users, and return the counts for the JSON document."""
    from trainer.runs.recommend import write_all

    start = time.monotonic()
    with console.ProgressLine() as line:

        def show_progress(done: int, total: int) -> None:
            rate = done / max(1e-9, time.monotonic() - start)
            left = console.format_duration((total - done) / rate)
            line.update(
                f"{done:,} of {total:,} users, {rate:,.0f}/s, {left} left", share=done / total
            )

        rows = write_all(predictor, out, k, keep_seen=keep_seen, on_users=show_progress)
    users = predictor.dataset.info.users
    console.notify(f"{rows:,} recommendations for {users:,} users: {out}")
    facts = _tell_search(predictor.index, predictor.search_facts(k))
    return {"out": str(out), "users": users, "rows": rows, **facts}
