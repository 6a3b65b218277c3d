"""Maps of items and histories: which points they show, the files, and runs without a map."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from features.errors import UserError
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.analysis import maps as maps_module
from trainer.analysis.curves import read_curves
from trainer.analysis.figures import save_figure
from trainer.analysis.maps import MapOptions, RunMap, draw_maps, map_runs
from trainer.analysis.report import build_report
from trainer.runs.read import read_records
from trainer.runs.train import train_run

pytest.importorskip("sklearn", reason="the extra map is not installed")

N_ITEMS = 40
# The items 0 to 3 are popular, 4 to 11 are neither popular nor cold, and 12 to 39 are cold.
SEQUENCES = [
    [user % 4, 4 + user % 8, (user + 1) % 4, 4 + user * 5 % 8, 12 + user % 28, (user + 2) % 4]
    for user in range(60)
]


def trained(warehouse: Warehouse, model: str, name: str) -> str:
    settings: dict[str, object] = {"device": "cpu", "epochs": 1}
    if model in ("sasrec", "mmsrec"):
        settings |= {"dim": 8, "heads": 2, "hidden": 8, "length": 5}
    pairs = [f"{key}={value}" for key, value in settings.items()]
    train_run(worlds.begin(warehouse, model, settings=pairs, name=name))
    return name


@pytest.fixture
def prepared(warehouse: Warehouse) -> Warehouse:
    worlds.prepare(warehouse, SEQUENCES, N_ITEMS)
    return warehouse


def same(first: RunMap, second: RunMap) -> bool:
    return np.array_equal(first.item_points, second.item_points) and np.array_equal(
        first.state_points, second.state_points
    )


def test_the_points_are_those_of_the_sample(prepared: Warehouse) -> None:
    name = trained(prepared, "sasrec", "s")
    options = MapOptions(items=25, users=6, seed=3)
    (run_map,) = map_runs(prepared, [name], options)
    assert len(run_map.items) == len(set(run_map.items)) == 25
    assert run_map.item_points.shape == (25, 2)
    train = [item for sequence in SEQUENCES for item in sequence[:-2]]
    counts = np.bincount(train, minlength=N_ITEMS)
    groups = np.where(counts < 10, 2, np.where(counts >= np.quantile(counts, 0.9), 1, 0))
    assert run_map.item_groups.tolist() == groups[run_map.items].tolist()
    assert set(run_map.item_groups) == {0, 1, 2}
    users, counts_of = np.unique(run_map.users, return_counts=True)
    assert len(users) == 6
    assert set(counts_of) == {5}  # after each interaction before the test target
    assert run_map.state_points.shape == (30, 2)
    assert np.isfinite(run_map.item_points).all()
    assert same(run_map, map_runs(prepared, [name], options)[0])
    assert not same(run_map, map_runs(prepared, [name], MapOptions(items=25, users=6, seed=4))[0])


def test_many_users_are_one_point_each(prepared: Warehouse) -> None:
    name = trained(prepared, "sasrec", "s")
    (run_map,) = map_runs(prepared, [name], MapOptions(users=1000))
    assert run_map.users.tolist() == list(range(60))
    assert run_map.has_cold.all()  # the validation item of each history is cold
    assert len(run_map.items) == N_ITEMS


def test_two_runs_show_the_same_items_and_users(prepared: Warehouse, tmp_path: Path) -> None:
    item_features = worlds.features(N_ITEMS)
    worlds.extract(prepared, item_features)
    names = [trained(prepared, "sasrec", "ids"), trained(prepared, "mmsrec", "content")]
    both = map_runs(prepared, names, MapOptions(items=30, users=3), labels=["IDSR", "w. text"])
    assert both[0].items.tolist() == both[1].items.tolist()
    assert both[0].users.tolist() == both[1].users.tolist()
    assert N_ITEMS - 1 not in both[0].items  # has no feature
    assert [run_map.label for run_map in both] == ["IDSR", "w. text"]

    image = tmp_path / "map.svg"
    save_figure(draw_maps(both), image)
    svg = ElementTree.parse(image).getroot()
    points: dict[str, list[int]] = {}
    for group in svg.iter("{http://www.w3.org/2000/svg}g"):
        drawn = list(group.iter("{http://www.w3.org/2000/svg}use"))
        points.setdefault(group.get("id", ""), []).append(len(drawn))
    for number, kind in enumerate(("other", "popular", "cold")):
        expected = [int((run_map.item_groups == number).sum()) for run_map in both]
        assert points[f"items-{kind}"] == expected
    assert points["user-0"] == points["user-2"] == [5, 5]
    text = image.read_text()
    assert "IDSR on world" in text
    assert "w. text on world" in text
    before = image.read_bytes()
    save_figure(draw_maps(both), image)
    assert image.read_bytes() == before


def test_the_image_has_the_colours_and_the_page_has_the_image(
    prepared: Warehouse, tmp_path: Path
) -> None:
    name = trained(prepared, "sasrec", "s")
    maps = map_runs(prepared, [name], MapOptions())
    image = tmp_path / "map.png"
    save_figure(draw_maps(maps), image)
    with Image.open(image) as opened:
        pixels = np.asarray(opened.convert("RGB")).reshape(-1, 3).astype(int)
    for colour in ((213, 94, 0), (0, 114, 178)):  # popular and cold, with some transparency
        assert (np.abs(pixels - colour).sum(axis=1) < 160).sum() > 200
    records = read_records(prepared, [name])
    curves = read_curves(records)
    page = build_report(prepared, records, curves, maps)
    assert page.count("data:image/png;base64,") == 1
    assert "data:image" not in build_report(prepared, records, curves)
    assert page == build_report(prepared, records, curves, maps)


@pytest.mark.parametrize("model", ["popularity", "transitions", "itemknn", "ease", "carca"])
def test_models_without_item_vectors_are_refused(prepared: Warehouse, model: str) -> None:
    worlds.extract(prepared, worlds.features(N_ITEMS, missing=False))
    name = trained(prepared, model, model)
    with pytest.raises(UserError, match=rf"{model}.*no item vectors") as error:
        map_runs(prepared, [name], MapOptions())
    assert "\n" not in str(error.value)


def test_other_mistakes_are_one_line(prepared: Warehouse, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [trained(prepared, "sasrec", name) for name in ("a", "b", "c")]
    with pytest.raises(UserError, match=r"3 runs.*at most 2"):
        map_runs(prepared, names, MapOptions())
    with pytest.raises(UserError, match=r"1 labels for 2 runs"):
        map_runs(prepared, names[:2], MapOptions(), labels=["x"])
    with pytest.raises(UserError, match=r"unknown run 'z'"):
        map_runs(prepared, ["z"], MapOptions())
    for options in ({"items": 4}, {"users": 0}):
        with pytest.raises(UserError, match=r"too small.*or more"):
            MapOptions(**options)
    monkeypatch.setattr(maps_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"scikit-learn.*pip install 'mmrec\[map\]'"):
        map_runs(prepared, names[:1], MapOptions())


def test_equal_vectors_have_a_map(prepared: Warehouse) -> None:
    """A model whose vectors have collapsed to one point."""
    run = worlds.begin(
        prepared, "sasrec", settings=["device=cpu", "dim=8", "heads=2", "lr=1e-9"], name="s"
    )
    for parameter in run.model.parameters():
        parameter.data.fill_(0.5)
    points = maps_module.tsne_points(
        run.model.encode_items(run.data.features).detach(), "items", seed=0
    )
    assert points.shape == (N_ITEMS, 2)
    assert np.isfinite(points).all()
