"""The page about runs: it loads nothing, it is well formed, and it says what is so."""

from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq

from features.atomic_files import write_table
from features.schema import METRICS_SCHEMA
from features.warehouse import Warehouse
from tests.trainer import worlds
from tests.trainer.analysis import test_compare
from tests.trainer.analysis.test_curves import EPOCHS, write_run
from trainer.analysis.curves import read_curves
from trainer.analysis.report import build_report
from trainer.runs.read import read_records

_VOID = {"meta", "br"}


class Reader(HTMLParser):
    """Checks that tags close in order; keeps the rows of tables, and what could be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.fetches: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        attributes = dict(attrs)
        links = {"src", "srcset", "data", "href", "xlink:href"} & attributes.keys()
        self.fetches += [
            f"{tag} {attributes[k]}" for k in links if not str(attributes[k]).startswith("#")
        ]
        self.fetches += [tag] if tag in ("script", "link", "iframe", "img", "object") else []
        self.rows += [[]] if tag == "tr" else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if {"td", "th"} & {*self.open} and self.rows:
            self.rows[-1].append(data.strip())


def page(warehouse: Warehouse, *names: str) -> Reader:
    records = read_records(warehouse, names)
    text = build_report(warehouse, records, read_curves(records))
    assert text == build_report(warehouse, records, read_curves(records))
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.fetches == []
    assert "url(http" not in text
    assert "default-src 'none'" in text
    return reader


def evaluated(warehouse: Warehouse, name: str, values: dict[str, float]) -> None:
    """Add the rows of an evaluation to what training left."""
    path = warehouse.runs_dir / name / "metrics.parquet"
    metrics = pq.read_table(path).to_pylist()
    metrics += [
        {
            "phase": "eval", "epoch": 0, "split": "test", "targets": "all", "ranker": ranker,
            "seen": seen, "metric": metric, "value": value / scale, "low": value / scale - 0.01,
            "high": value / scale + 0.01, "users": 4,
        }
        for metric, value in values.items()
        for ranker, scale in (("m", 1), ("popularity", 4))
        for seen in ("filtered", "kept")
    ]  # fmt: skip
    write_table(path, pa.Table.from_pylist(metrics, schema=METRICS_SCHEMA))


def test_a_page_about_one_run(warehouse: Warehouse) -> None:
    worlds.prepare(warehouse, [[0, 1, 2]] * 4, 3)
    write_run(warehouse, "a", about={"dataset": "world", "parameters": 1234}, note="<b>&")
    evaluated(warehouse, "a", {"HR@10": 0.4})
    reader = page(warehouse, "a")
    for row in (
        ["best epoch", "2"],
        ["parameters", "1,234"],
        ["validation HR@10 (filtered)", "0.3000"],
        ["time until the best epoch", "5.0 s"],
        ["metric", "a", "popularity"],
        ["HR@10", "0.4000", "[.3900, .4100]", "0.1000"],
        ["note", "<b>&"],
        ["world", "4", "3", "12", "3.00", "0.0000%"],
    ):
        assert row in [[cell for cell in cells if cell] for cells in reader.rows], row
    rankings = [text for text in reader.texts if "seen items" in text]
    assert [text.split(": ")[0] for text in rankings] == [
        f"world, all targets, seen items {seen}" for seen in ("filtered", "kept")
    ]
    texts = " ".join(reader.texts)
    assert "leave-one-out: last item test" in texts
    assert "a: 0.3000 in epoch 2" in texts  # the figure's legend is text


def test_a_page_about_runs_that_differ(warehouse: Warehouse) -> None:
    for name, filtered in test_compare.RANKS.items():
        test_compare.write_run(warehouse, name, filtered)
        write_run(warehouse, name, lr=0.1 if name == "a" else 0.2, seed=3)
        evaluated(warehouse, name, {"HR@10": 0.3 if name == "a" else 0.5})
    write_run(warehouse, "c", [(loss, value, None) for loss, value, _ in EPOCHS], lr=0.1, seed=3)
    reader = page(warehouse, "a", "b", "c")
    rows = [[cell for cell in row if cell] for row in reader.rows]
    assert ["lr", "0.1", "0.2", "0.1"] in rows
    assert ["seed", "3"] in rows
    below = rows[rows.index(["metric", "a", "b", "popularity"]) + 1]
    assert below[:5] == ["HR@10", "0.3000", "[.2900, .3100]", "0.5000", "[.4900, .5100]"]
    texts = " ".join(reader.texts)
    assert "c is not evaluated; run: mmrec eval --run c" in texts
    assert "Runs without recorded times: c." in texts
    assert "Differences to a on d" in texts
    difference = next(row for row in rows if row[:2] == ["MRR", "b"])
    assert (difference[2], difference[4]) == (
        "-0.1561",
        "0.5000",
    )  # as worked out in the other test
    assert "d is no longer in this warehouse" in texts


def test_equal_values_are_not_marked_as_the_best(warehouse: Warehouse) -> None:
    for name, second in (("a", 0.3), ("b", 0.6)):
        write_run(warehouse, name)
        evaluated(warehouse, name, {"HR@10": 0.5, "NDCG@10": second})
    records = read_records(warehouse, ["a", "b"])
    text = build_report(warehouse, records, read_curves(records))
    assert "<b>0.6000</b>" in text
    assert "<b>0.5000</b>" not in text
    assert text.count("0.5000") >= 2
