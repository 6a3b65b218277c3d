import hashlib
from collections import Counter
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from features.dataset import Dataset, load_dataset
from features.errors import UserError
from features.warehouse import Warehouse
from pipeline.datasets.demo import STYLES, TITLE_WORDS, TOPICS, DemoItem, make_demo
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from tests.pipeline.datasets.raws import items_of

SMALL = {"users": 300, "items": 192}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[DemoItem]]:
    raw = tmp_path_factory.mktemp("demo") / "raw"
    return raw, make_demo(raw, **SMALL, seed=3)


def _hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.slow
def test_the_seed_decides_every_byte(demo: tuple[Path, list[DemoItem]], tmp_path: Path) -> None:
    # FFmpeg reads what precedes a colon as a protocol.
    again = tmp_path / "http:again"
    make_demo(again, **SMALL, seed=3)
    assert _hashes(again) == _hashes(demo[0])
    make_demo(tmp_path / "other", **SMALL, seed=4)
    assert _hashes(tmp_path / "other") != _hashes(demo[0])


def test_some_things_are_missing_and_one_is_broken(
    demo: tuple[Path, list[DemoItem]], warehouse: Warehouse
) -> None:
    raw, _ = demo
    info = prepare_dataset(warehouse, PrepareOptions(dataset="demo", raw=raw))
    rows = items_of(warehouse, "demo")
    missing = Counter(key for row in rows for key in ("text", "image") if row[key] is None)
    assert missing == {"text": 16, "image": 16}
    videos = [raw / row["video"] for row in rows if row["video"]]
    assert len(videos) == 19
    broken = []
    for row in rows:
        if row["image"] is not None:
            try:
                with Image.open(raw / row["image"]) as image:
                    image.load()
                    assert image.size == (96, 96)
            except OSError:
                broken.append(row["item_id"])
    assert len(broken) == 1
    with av.open(str(videos[0])) as container:
        frames = sum(1 for _ in container.decode(video=0))
        assert container.streams.video[0].average_rate == 4
    assert 8 <= frames <= 12
    assert info.timestamps
    assert 0 < info.tied < 0.5


def test_the_image_shows_the_style_and_the_title_the_topic(
    demo: tuple[Path, list[DemoItem]], warehouse: Warehouse
) -> None:
    raw, truth = demo
    prepare_dataset(warehouse, PrepareOptions(dataset="demo", raw=raw))
    colours = np.array([colour for colour, _ in STYLES])
    words = [set(text.split()) for text in TOPICS.values()]
    right = wrong = 0
    for row, item in zip(items_of(warehouse, "demo"), truth, strict=True):
        assert row["item_id"] == item.item_id
        if row["text"] is not None:
            known = set(row["text"].lower().split())
            assert [len(known & field) for field in words].index(TITLE_WORDS) == item.topic
        if row["image"] is not None:
            try:
                with Image.open(raw / row["image"]) as image:
                    middle = np.asarray(image)[44:52, 44:52].mean((0, 1))
            except OSError:
                continue
            hit = np.abs(colours - middle).sum(1).argmin() == item.style
            right, wrong = right + hit, wrong + (not hit)
    assert wrong <= 1
    assert right > 170


def _traits(dataset: Dataset, truth: list[DemoItem]) -> npt.NDArray[np.int64]:
    return np.array([(item.style, item.topic) for item in truth])[dataset.items]


def test_taste_and_order_predict_the_next_item_and_popularity_does_not(
    demo: tuple[Path, list[DemoItem]], warehouse: Warehouse
) -> None:
    raw, truth = demo
    prepare_dataset(warehouse, PrepareOptions(dataset="demo", raw=raw))
    dataset = load_dataset(warehouse, "demo")
    traits = _traits(dataset, truth)
    held_out = dataset.eval_split("test")
    counts = [
        np.bincount(traits[start:end, 0], minlength=len(STYLES))
        for start, end in zip(held_out.starts, held_out.targets, strict=True)
    ]
    favourites = np.argsort(counts, axis=1)[:, ::-1]
    targets = traits[held_out.targets, 0]
    assert np.mean(targets == favourites[:, 0]) > 0.5
    assert np.mean((targets[:, None] == favourites[:, :2]).any(1)) > 0.7
    follows = (traits[held_out.targets - 1, 1] + 1) % len(TOPICS)
    assert np.mean(traits[held_out.targets, 1] == follows) > 0.6
    popular = np.argsort(-dataset.train_counts)[:10]
    assert np.isin(dataset.items[held_out.targets], popular).mean() < 0.15


def test_a_user_returns_to_favourite_topics(
    demo: tuple[Path, list[DemoItem]], warehouse: Warehouse
) -> None:
    """Apart from the order, some topics are more frequent in a history than by chance."""
    raw, truth = demo
    prepare_dataset(warehouse, PrepareOptions(dataset="demo", raw=raw))
    dataset = load_dataset(warehouse, "demo")
    topics = _traits(dataset, truth)[:, 1]
    shares = []
    for start, end in zip(dataset.offsets, dataset.offsets[1:], strict=False):
        jumps = topics[start + 1 : end][
            (topics[start + 1 : end] - topics[start : end - 1]) % 6 != 1
        ]
        if len(jumps) >= 3:
            shares.append(np.sort(np.bincount(jumps, minlength=6))[-2:].sum() / len(jumps))
    random = np.random.default_rng(0)
    lengths = random.integers(3, 6, 2000)
    by_chance = [
        np.sort(np.bincount(random.integers(6, size=n), minlength=6))[-2:].sum() / n
        for n in lengths
    ]
    assert np.mean(shares) > np.mean(by_chance) + 0.05


def test_new_items_are_cold_and_targets(
    demo: tuple[Path, list[DemoItem]], warehouse: Warehouse
) -> None:
    raw, truth = demo
    prepare_dataset(warehouse, PrepareOptions(dataset="demo", raw=raw))
    dataset = load_dataset(warehouse, "demo")
    new = np.array([item.new for item in truth])
    assert new.sum() == 19
    cells = {(item.style, item.topic) for item in truth}
    assert {(item.style, item.topic) for item in truth if not item.new} == cells
    assert dataset.cold[new].all()
    assert (dataset.train_counts[new] == 0).any()
    assert (dataset.train_counts[new] > 0).any()
    targets = dataset.items[dataset.eval_split("test").targets]
    assert new[targets].mean() > 0.05


def test_mistakes(demo: tuple[Path, list[DemoItem]], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"raw .*remove"):
        make_demo(demo[0])
    with pytest.raises(UserError, match=r"191.*192"):
        make_demo(tmp_path / "few", items=191)
    assert not (tmp_path / "few").exists()
