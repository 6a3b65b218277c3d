from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.errors import UserError
from features.store import FeatureStore
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.data.batches import ItemFeatures
from trainer.data.feature_tables import choose_tables, load_features
from trainer.data.token_features import TokenFeatures

CPU = torch.device("cpu")


def table(lengths: list[int], width: int = 3) -> TokenFeatures:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    values = np.arange(1, offsets[-1] * width + 1, dtype=np.float16).reshape(-1, width)
    return TokenFeatures(values=values, offsets=offsets, device=CPU)


def test_what_is_gathered_is_what_stands_in_the_table() -> None:
    tokens = table([2, 0, 1], width=2)
    x, mask = tokens.gather(torch.tensor([2, 1, 0]))
    assert x.dtype == torch.float32
    assert mask.tolist() == [[True, False], [False, False], [True, True]]
    assert x.tolist() == [[[5, 6], [0, 0]], [[0, 0], [0, 0]], [[1, 2], [3, 4]]]
    assert tokens.present_N.tolist() == [True, False, True]
    assert (tokens.width, tokens.longest) == (2, 2)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    chosen=st.lists(st.integers(0, 5), max_size=8),
)
def test_gathering_equals_slicing(lengths: list[int], chosen: list[int]) -> None:
    tokens = table(lengths)
    items = [item % len(lengths) for item in chosen]
    x, mask = tokens.gather(torch.tensor(items, dtype=torch.int64))
    assert x.shape == (*mask.shape, 3)
    assert mask.shape[1] == max([1, *(lengths[item] for item in items)])
    for row, item in enumerate(items):
        own = tokens.values[tokens.offsets[item] : tokens.offsets[item + 1]]
        np.testing.assert_array_equal(x[row][mask[row]].numpy(), own.astype(np.float32))
        assert not x[row][~mask[row]].any()


def test_a_mapped_file_is_read_and_stays_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.ones((3, 2), np.float16))
    values = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    tokens = TokenFeatures(values=values, offsets=np.array([0, 1, 3]), device=CPU)
    x, mask = tokens.gather(torch.tensor([0, 1]))
    assert x.sum() == 6
    assert mask.sum() == 3
    x.zero_()
    assert np.load(tmp_path / "tokens.npy").sum() == 6


def test_widths_follow_the_order_of_modalities() -> None:
    tokens = table([1, 0], width=4)
    features = ItemFeatures(
        n_items=2,
        vectors={"text": torch.zeros(2, 3)},
        present={"image": tokens.present_N, "text": torch.tensor([True, True])},
        tokens={"image": tokens},
    )
    assert list(features.widths.items()) == [("image", 4), ("text", 3)]
    assert features.coverage() == ({"image": 1, "text": 2}, 0)


@pytest.fixture
def world(warehouse: Warehouse) -> Warehouse:
    """Pooled pictures and texts, and tokens of the texts of items 0 and 3."""
    worlds.prepare(warehouse, [[0, 1, 2, 3, 4, 5]] * 3, 6)
    worlds.extract(warehouse, worlds.features(6))
    tokens = {3: np.full((2, 4), 3.0, np.float32), 0: np.ones((1, 4), np.float32)}
    worlds.extract_tokens(warehouse, "text", tokens)
    return warehouse


@pytest.mark.parametrize(
    ("wanted", "labels"),
    [
        (None, ["image=toy", "text=toy"]),
        (["text"], ["text=toy"]),
        (["text:pooled"], ["text=toy"]),
        (["text:tokens"], ["text=toy:tokens"]),
        (["text=toy:tokens", "image=toy"], ["image=toy", "text=toy:tokens"]),
    ],
)
def test_features_are_named_by_modality_backbone_and_level(
    world: Warehouse, wanted: list[str] | None, labels: list[str]
) -> None:
    chosen = choose_tables(FeatureStore(world), "world", wanted)
    assert [table.label for table in chosen] == labels


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("image:tokens", "'image:tokens'.*--image BACKBONE --level tokens"),
        ("text=toy:layer-3", "'text=toy:layer-3'.*--text toy --level layer-3"),
        ("text=other:tokens", r"image=toy, text=toy, text=toy:tokens\)"),
        ("text:token", "modality 'text:token'"),
        ("sound:tokens", "unknown modality 'sound'"),
    ],
)
def test_a_table_that_is_not_there_is_named(world: Warehouse, entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_tables(FeatureStore(world), "world", [entry])


def test_tokens_and_vectors_are_loaded_side_by_side(world: Warehouse) -> None:
    tables = choose_tables(FeatureStore(world), "world", ["text:tokens", "image"])
    features, identities = load_features(tables, world.info("world"), CPU)
    assert features.widths == {"image": 6, "text": 4}
    assert features.present["text"].tolist() == [True, False, False, True, False, False]
    assert isinstance(features.tokens["text"].values, np.memmap)
    x, mask = features.tokens["text"].gather(torch.tensor([3, 0]))
    assert x[mask].tolist() == [[3.0] * 4, [3.0] * 4, [1.0] * 4]
    assert [identity["level"] for identity in identities] == ["pooled", "tokens"]


def test_a_model_of_pooled_vectors_refuses_tokens(world: Warehouse) -> None:
    with pytest.raises(UserError, match=r"mmsrec .*not text=toy:tokens; .*--features"):
        worlds.begin(world, "mmsrec", "world", features=["text:tokens"])
    assert world.runs() == []
