"""Published datasets have the published counts, where their files are present."""

from pathlib import Path

import pytest

from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from tests.pipeline.datasets.raws import items_of, sequences_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "folder_name", "k_core", "counts", "media"),
    [
        ("ml-100k", "ml100k", None, (943, 1349, 99287), (1349, 0, 0)),
        ("ml-1m", "ml1m", None, (6040, 3416, 999611), (3416, 3415, 0)),
        ("ml-latest-small", "ml_latest_small", 1, (610, 9724, 100836), (9724, 0, 0)),
        ("amazon-beauty", "amazon", None, (22363, 12101, 198502), (12101, 0, 0)),
        ("amazon-sports", "amazon", None, (35598, 18357, 296337), (0, 0, 0)),
        ("microlens-50k", "microlens50k", None, (50000, 19220, 359708), (19220, 0, 3)),
    ],
)
def test_real_datasets_have_the_published_counts(
    warehouse: Warehouse,
    real_data: Path,
    name: str,
    folder_name: str,
    k_core: int | None,
    counts: tuple[int, int, int],
    media: tuple[int, int, int],
) -> None:
    info = prepare_dataset(
        warehouse, PrepareOptions(dataset=name, raw=real_data / folder_name, k_core=k_core)
    )
    assert (info.users, info.items, info.interactions) == counts
    rows = items_of(warehouse, name)
    have = tuple(sum(row[key] is not None for row in rows) for key in ("text", "image", "video"))
    assert have == media
    if name == "ml-1m":
        (bare,) = [row["item_id"] for row in rows if row["image"] is None]
        assert bare == "3027"
        text = (real_data / folder_name / "ml1m_sequences_chronological.txt").read_text()
        assert sequences_of(warehouse, name)["1"] == text.splitlines()[0].split()[1:]
    if name == "amazon-beauty":
        untitled = next(row for row in rows if row["item_id"] == "495")
        assert untitled["text"] == "Beauty, Hair Care, Styling Products, Hair Sprays"
