"""Convergence curves: what is read from metrics tables, and that a figure shows it."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import tomli_w

from features.atomic_files import read_table, write_table, write_text
from features.errors import UserError
from features.schema import METRICS_SCHEMA
from features.warehouse import Warehouse
from trainer.analysis.curves import read_curves
from trainer.analysis.figures import MAX_RUNS, draw_curves, save_figure
from trainer.runs.folder import SECONDS
from trainer.runs.read import Record, read_records

Epochs = list[tuple[float, float | None, float | None]]
"""Loss, metric where it was validated, and seconds where they were kept."""
EPOCHS: Epochs = [(9.0, 0.1, 2.0), (4.0, 0.3, None), (3.0, None, 4.0), (2.0, 0.3, 3.0)]


def write_run(
    warehouse: Warehouse,
    name: str,
    epochs: Epochs = EPOCHS,
    *,
    about: dict[str, Any] | None = None,
    directions: tuple[str, ...] = (),
    **train: Any,
) -> None:
    """A run as its training leaves it; kept values are half of the filtered ones."""
    folder = warehouse.runs_dir / name
    run = {"model": "m", "dataset": "d", "features": [], "fingerprint": "f", "created": name}
    settings = {"monitor": "Recall@10", "monitor_seen": "filtered", **train}
    document = {"run": {**run, **(about or {})}, "train": settings, "model": {"dim": 8}}
    write_text(folder / "config.toml", tomli_w.dumps(document))
    rows = []
    metric = settings["monitor"] if directions else "HR@10"
    for epoch, (loss, value, seconds) in enumerate(epochs, 1):
        rows.append((epoch, "train", "all", "none", "loss", loss))
        if seconds is not None:
            rows.append((epoch, "train", "all", "none", SECONDS, seconds))
        if value is None:
            continue
        for number, direction in enumerate(directions):
            rows.append((epoch, "validation", direction, "none", metric, value + number / 10))
        if not directions:
            rows.append((epoch, "validation", "all", "filtered", metric, value))
            rows.append((epoch, "validation", "all", "kept", metric, value / 2))
    keys = ("epoch", "split", "targets", "seen", "metric", "value")
    common = {"phase": "train", "ranker": "m", "low": None, "high": None, "users": 4}
    table = [{**dict(zip(keys, row, strict=True)), **common} for row in rows]
    write_table(folder / "metrics.parquet", pa.Table.from_pylist(table, schema=METRICS_SCHEMA))


def read(warehouse: Warehouse, *names: str) -> list[Record]:
    return read_records(warehouse, names)


def test_a_curve_is_what_the_table_says(warehouse: Warehouse) -> None:
    write_run(warehouse, "a")
    (curve,) = read_curves(read(warehouse, "a"))
    assert (curve.label, curve.metric) == ("a", "HR@10 (filtered)")
    assert curve.loss.tolist() == [9, 4, 3, 2]
    assert curve.validated.tolist() == [1, 2, 4]
    assert curve.values.tolist() == [0.1, 0.3, 0.3]
    assert curve.best == 1  # of equals the first one: a later one is no better
    assert curve.seconds is not None
    assert curve.seconds.tolist() == [2, 5, 9, 12]  # the time that is missing counts as the median
    at_E, at_V = curve.at(by_time=True)
    assert at_E.tolist() == [2, 5, 9, 12]
    assert at_V.tolist() == [2, 5, 12]
    (half,) = read_curves(read(warehouse, "a"), seen="kept", labels=["w. PT"])
    assert (half.label, half.metric, half.values.tolist()) == (
        "w. PT",
        "HR@10 (kept)",
        [0.05, 0.15, 0.15],
    )


def test_an_alignment_is_the_mean_of_its_directions(warehouse: Warehouse) -> None:
    ways = ("text-to-vision", "vision-to-text")
    write_run(warehouse, "p", about={"stage": "pretrain"}, directions=ways, monitor="MRR")
    (curve,) = read_curves(read(warehouse, "p"))
    assert curve.metric == "MRR, text to vision and back"
    assert curve.values.tolist() == pytest.approx([0.15, 0.35, 0.35])
    assert curve.best == 1


def test_figures_show_every_run(warehouse: Warehouse, tmp_path: Path) -> None:
    """Two datasets, four panels each; a ring for each run in each; the same bytes twice."""
    write_run(warehouse, "a")
    write_run(warehouse, "b", [(loss, value, None) for loss, value, _ in EPOCHS])
    write_run(warehouse, "c", EPOCHS[:1], about={"dataset": "e"})
    curves = read_curves(read(warehouse, "a", "b", "c"))
    figure = draw_curves(curves)
    shown = [[len(axes.lines) for axes in figure.axes[i : i + 2]] for i in range(0, 8, 2)]
    # By epoch a curve and a ring for a and b; by time for a alone; then c in both.
    assert shown == [[4, 2], [4, 2], [2, 2], [2, 2]]
    assert figure.axes[2].lines[0].get_ydata() == pytest.approx([0.1, 0.3, 0.3])
    assert figure.axes[1].lines[0].get_xdata() == pytest.approx([2, 5, 9, 12])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "a: 0.3000 in epoch 2", "b: 0.3000 in epoch 2", "c: 0.1000 in epoch 1",
        "best epoch: kept weights",
    ]  # fmt: skip
    (without,) = read_curves(read(warehouse, "b"))
    assert len(draw_curves([without]).axes) == 2
    for name in ("one.svg", "two.svg", "a.pdf", "a.png"):
        save_figure(draw_curves([without]), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_first_loss_that_would_press_the_others_flat_is_told(warehouse: Warehouse) -> None:
    write_run(warehouse, "a", [(90.0, 0.1, 1.0), *((1 + i / 10, 0.1, 1.0) for i in range(6))])
    axes = draw_curves(read_curves(read(warehouse, "a"))).axes[0]
    assert axes.get_ylim()[1] < 2
    assert [text.get_text() for text in axes.texts] == ["epoch 1, above: 90.00"]


def test_what_cannot_be_drawn(warehouse: Warehouse, tmp_path: Path) -> None:
    write_run(warehouse, "a")
    write_run(warehouse, "none", [])
    ways = ("text-to-vision", "vision-to-text")
    write_run(warehouse, "p", about={"stage": "pretrain"}, directions=ways, monitor="Recall@10")
    for names, settings, message in (
        (["a"], {"metric": "AUC"}, "'AUC'"),
        (["a"], {"metric": "MRR"}, r"'a' .*MRR .*HR@10"),
        (["a"], {"seen": "x"}, "--seen 'x'"),
        (["a"], {"labels": ["x", "y"]}, "2 labels .*1 run"),
        (["none"], {}, "'none' .*: mmrec train --resume"),
        (["a", "p"], {}, "'p' .*Recall@10.*'a'"),
    ):
        with pytest.raises(UserError, match=message):
            read_curves(read(warehouse, *names), **settings)
    with pytest.raises(UserError, match="at most 21"):
        draw_curves(read_curves(read(warehouse, "a") * (MAX_RUNS + 1)))
    with pytest.raises(UserError, match=r"\.png, \.svg, \.pdf"):
        save_figure(draw_curves(read_curves(read(warehouse, "a"))), tmp_path / "x.jpg")


def test_a_model_without_losses_is_drawn(warehouse: Warehouse) -> None:
    """A model that learns nothing by gradients is validated once and has no loss."""
    write_run(warehouse, "a")
    write_run(warehouse, "counts", [(0.0, 0.25, None)])
    path = warehouse.runs_dir / "counts" / "metrics.parquet"
    rows = [row for row in read_table(path).to_pylist() if row["metric"] != "loss"]
    write_table(path, pa.Table.from_pylist(rows, schema=METRICS_SCHEMA))
    curve = read_curves(read(warehouse, "counts"))[0]
    assert curve.values.tolist() == [0.25]
    assert np.isnan(curve.loss).all()
    for names in (["counts"], ["a", "counts"]):
        loss_axes = draw_curves(read_curves(read(warehouse, *names))).axes[0]
        lines = [np.asarray(line.get_ydata(), np.float64) for line in loss_axes.lines]
        assert np.isfinite(np.concatenate(lines)).any() == ("a" in names)
