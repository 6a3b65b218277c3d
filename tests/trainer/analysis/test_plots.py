"""The figures of grids: what they show, read from the SVG and from the axes."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from features.errors import UserError
from tests.trainer.analysis.test_speed_up import curve
from trainer.analysis.figures import save_figure
from trainer.analysis.plots import Panel, draw_bars, draw_lines, draw_validation

METRICS = ["Recall@10", "NDCG@10"]


def panel(title: str, labels: list[str], *, y_label: str = "") -> Panel:
    values: list[tuple[float, float] | None] = [(0.5, 0.0), (0.25, 0.0)]
    return Panel(
        title=title,
        x_label="k-core",
        y_label=y_label,
        positions=METRICS,
        series={label: list(values) for label in labels},
    )


def bars(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def svg(figure: object, folder: Path) -> str:
    path = folder / "figure.svg"
    save_figure(figure, path)  # type: ignore[arg-type]
    return path.read_text()


def test_bars_have_a_panel_for_each_dataset_and_a_bar_for_each_value(tmp_path: Path) -> None:
    figure = draw_bars([panel("sports", ["whole", "w/o V"]), panel("ml-1m", ["whole", "w/o V"])])
    for axes in figure.axes:
        assert sorted(bar.get_height() for bar in bars(axes)) == [0.25, 0.25, 0.5, 0.5]
        edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars(axes))
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(edges))
    text = svg(figure, tmp_path)
    assert all(name in text for name in ("sports", "ml-1m", "whole", "w/o V", *METRICS))


def test_a_value_that_is_missing_leaves_a_gap() -> None:
    gap = Panel(
        title="d", x_label="", y_label="", positions=METRICS, series={"a": [None, (0.25, 0.0)]}
    )  # fmt: skip
    heights = [bar.get_height() for bar in bars(draw_bars([gap]).axes[0])]
    assert np.isnan(heights[0])
    assert heights[1] == 0.25
    line = draw_lines([gap]).axes[0].lines[0].get_ydata()
    assert np.isnan(np.asarray(line, dtype=float)).tolist() == [True, False]


def test_lines_of_one_dataset_are_in_one_row(tmp_path: Path) -> None:
    panels = [panel(title, ["SASRec", "Ours"], y_label=y) for title in "ab" for y in METRICS]
    figure = draw_lines(panels)
    rows = [axes.get_subplotspec().rowspan.start for axes in figure.axes]  # type: ignore[union-attr]
    assert rows == [0, 0, 1, 1]
    assert [axes.get_ylabel() for axes in figure.axes] == METRICS * 2
    text = svg(figure, tmp_path)
    assert all(name in text for name in ("k-core", "SASRec", "Ours"))


def test_validation_curves_have_a_row_for_each_dataset(tmp_path: Path) -> None:
    curves = [
        curve(label, [0.1, 0.3, 0.2], dataset=dataset)
        for dataset in ("food", "shoes")
        for label in ("w/o PT", "w. PT")
    ]
    figure = draw_validation(curves)
    assert [axes.get_title("left") for axes in figure.axes] == ["food", "", "shoes", ""]
    by_epoch, by_time = figure.axes[:2]
    assert by_epoch.lines[0].get_xdata() == pytest.approx([1, 2, 3])
    assert by_time.lines[0].get_xdata() == pytest.approx([2, 4, 6])
    assert by_epoch.lines[1].get_xdata() == pytest.approx([2])  # the ring of the best epoch
    text = svg(figure, tmp_path)
    assert all(text.count(name) == 1 for name in ("w/o PT", "w. PT"))
    assert "validation HR@10 (filtered)" in text


def test_curves_without_times_are_drawn_by_epoch_alone() -> None:
    figure = draw_validation([curve("a", [0.1, 0.2], seconds_per_epoch=None)])
    assert len(figure.axes) == 1


def test_too_many_values_for_one_figure_are_refused() -> None:
    labels = [f"run-{i}" for i in range(40)]
    for draw in (draw_bars, draw_lines):
        with pytest.raises(UserError, match="40 values do not fit into one figure"):
            draw([panel("d", labels)])
    with pytest.raises(UserError, match="40 curves do not fit"):
        draw_validation([curve(label, [0.1]) for label in labels])
