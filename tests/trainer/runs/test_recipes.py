import re
from pathlib import Path

import pytest

from features.encoder_blocks import block_count
from features.errors import UserError
from pipeline.backbones.registry import BACKBONES
from trainer.models.registry import MODELS
from trainer.runs.grid_axes import Combination
from trainer.runs.grid_file import read_grid
from trainer.runs.recipes import fill_recipe, read_recipe, recipe_names
from trainer.runs.settings import resolve_settings
from trainer.setting_sources import SettingSources

GRIDS = [name for name in recipe_names() if not read_recipe(name).is_statistics]
LIMITED = [name for name in GRIDS if not name.startswith("mmsrec/") and name != "mmsr/table-13"]
"""Recipes of the papers that read at most 50 words of a text."""
REDUCED = Path(__file__).parents[2] / "benchmarks" / "reduced"


def combinations(name: str) -> list[Combination]:
    recipe = read_recipe(name)
    sources = ["s"] if "{source" in str(recipe.document.get("pretrain")) else []
    return fill_recipe(recipe, ["a"], sources).combinations


def tables(combination: Combination) -> dict[str, str]:
    """Return modality -> ``BACKBONE[:LEVEL]`` of the feature tables of a run."""
    entries = (combination.features or "").split(",")
    named = dict(entry.split("=") for entry in entries if "=" in entry)
    bare = {entry: combination.tables[entry] for entry in entries if entry in combination.tables}
    return named | bare


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_the_title_of_its_table(name: str) -> None:
    recipe = read_recipe(name)
    paper, _, table = name.partition("/")
    kind, _, _ = table.partition("-")
    assert recipe.title.lower().startswith(f"{paper}, {kind} ")


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("quick", [False, True])
def test_every_recipe_is_a_grid_on_a_dataset(name: str, quick: bool) -> None:
    recipe = read_recipe(name)
    sources = ["s", "t"] if "{source" in str(recipe.document.get("pretrain")) else []
    grid = fill_recipe(recipe, ["a"], sources, quick=quick)
    assert {combination.dataset for combination in grid.combinations} == {"a"}
    assert grid.departs == recipe.departs
    for combination in grid.combinations:
        assert combination.init is None or combination.pretraining is not None


def test_datasets_are_rows_where_the_paper_has_them() -> None:
    grid = fill_recipe(read_recipe("pmmrec/table-8"), ["a", "b"])
    assert (grid.rows, grid.columns, grid.metric_rows) == (["dataset"], ["objectives"], True)
    assert list(dict.fromkeys(entry.keys["objectives"] for entry in grid.combinations)) == [
        "w/o NICL", "only VCL", "only NCL", "w/o NID", "w/o RCL", "PMMRec",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"mmsr/table-12 is a table of one dataset, not of a, b"):
        fill_recipe(read_recipe("mmsr/table-12"), ["a", "b"])


def test_each_source_is_a_column_and_a_pre_training() -> None:
    grid = fill_recipe(read_recipe("pmmrec/table-6"), ["d"], ["s", "t"])
    sources = {
        entry.keys["source"]: entry.pretraining.datasets if entry.pretraining else None
        for entry in grid.combinations
    }
    assert sources == {"ID": None, "w/o PT": None, "s": ["s"], "t": ["t"]}
    fused = fill_recipe(read_recipe("pmmrec/table-5"), ["d"], ["s", "t"])
    assert {
        tuple(entry.pretraining.datasets) for entry in fused.combinations if entry.pretraining
    } == {("s", "t")}


@pytest.mark.parametrize("name", recipe_names())
def test_commands_to_type_first_are_no_differences_from_the_paper(name: str) -> None:
    recipe = read_recipe(name)
    assert "mmrec extract" not in recipe.departs


@pytest.mark.parametrize(
    ("name", "sources", "message"),
    [
        ("pmmrec/table-6", ["ID"], "'ID'.*--name"),
        ("pmmrec/table-6", ["s", "w/o PT"], "'w/o PT'.*--name"),
        ("mmsr/table-9", ["Scratch"], "'Scratch'.*--name"),
        ("pmmrec/table-6", ["s", "s"], "--source s is given twice"),
        ("pmmrec/table-5", ["s", "t", "s"], "--source s is given twice"),
        ("mmsrec/table-3", ["s"], "mmsrec/table-3.*leave --source out"),
        ("mmsrec/figure-3", ["s", "t"], "mmsrec/figure-3.*leave --source out"),
    ],
)
def test_a_source_that_has_no_place_is_refused(name: str, sources: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fill_recipe(read_recipe(name), ["d"], sources)


def test_what_does_not_fit_a_recipe_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown recipe 'pmmrec/table-99'"):
        read_recipe("pmmrec/table-99")
    with pytest.raises(UserError, match="no pre-training; leave --source out"):
        fill_recipe(read_recipe("pmmrec/table-7"), ["a"], ["s"])
    path = tmp_path / "own.toml"
    path.write_text('[runs]\nmodel = "sasrec"\ndataset = "a"\n')
    with pytest.raises(UserError, match=re.escape("sets its datasets itself; leave --dataset out")):
        fill_recipe(read_recipe(str(path)), ["b"])


@pytest.mark.parametrize("name", GRIDS)
def test_a_recipe_trains_the_blocks_above_its_tables(name: str) -> None:
    for combination in combinations(name):
        recommender = MODELS.find(combination.model).load()
        levels = {table.partition(":")[2] for table in tables(combination).values()}
        preset = recommender.presets.get(combination.preset or "", {})
        settings = {**preset, **combination.settings}
        if not recommender.reads_tokens:
            assert levels <= {""}, combination.label
        elif any(level.startswith("layer-") for level in levels):
            assert settings.get("tune_blocks"), combination.label


@pytest.mark.parametrize("name", GRIDS)
def test_the_commands_of_a_recipe_make_its_tables(name: str) -> None:
    commands = " ".join(read_recipe(name).first)
    for combination in combinations(name):
        for modality, table in tables(combination).items():
            backbone, _, level = table.partition(":")
            shown = re.sub(r"@\d+$", "", backbone)
            assert re.search(rf"\b{re.escape(shown)}(?![-\w])", commands), table
            assert f"--{modality} " in commands, table
            assert level in commands, table


@pytest.mark.parametrize("name", LIMITED)
def test_texts_have_at_most_50_tokens_as_in_the_papers(name: str) -> None:
    for combination in combinations(name):
        for modality, table in tables(combination).items():
            backbone = table.partition(":")[0]
            if modality in ("text", "joint") and backbone != "vilt":  # its limit is 40 tokens
                assert backbone.endswith("@50"), table


@pytest.mark.parametrize("name", ["mmsr/table-2", "mmsr/table-6", "mmsr/table-11"])
def test_the_levels_of_images_are_below_the_last_block_or_stage(name: str) -> None:
    from transformers import GroupViTVisionConfig

    stages = block_count(GroupViTVisionConfig())
    for combination in combinations(name):
        backbone, _, level = tables(combination).get("image", "").partition(":layer-")
        if backbone == "groupvit":
            assert int(level) in (0, stages - 1)
        elif backbone:
            assert 0 <= int(level) < BACKBONES.find(backbone).blocks


@pytest.mark.parametrize("objective", ["w/o NICL", "only VCL", "only NCL", "w/o NID", "w/o RCL"])
def test_the_ablation_changes_the_pre_training_and_not_the_fine_tuning(objective: str) -> None:
    variants = {entry.keys["objectives"]: entry for entry in combinations("pmmrec/table-8")}
    changed, whole = variants[objective], variants["PMMRec"]
    assert changed.settings == whole.settings
    assert changed.pretraining is not None
    assert whole.pretraining is not None
    assert changed.pretraining.settings != whole.pretraining.settings == {}
    assert changed.pretraining.datasets == ["s"]


def test_a_recipe_with_masked_images_says_that_the_patches_never_change() -> None:
    masked = [name for name in GRIDS if "mae-b-mask" in str(read_recipe(name).document["runs"])]
    assert "mmsr/table-3" in masked
    for name in masked:
        assert "patches that MAE sees are the same in every epoch" in read_recipe(name).departs


@pytest.mark.parametrize(
    ("name", "of", "over"),
    [
        ("pmmrec/table-4", ["PMMRec w. PT"], ["PMMRec w/o PT"]),  # 43.78 / 40.42 = 1 + 8.31%
        ("mmsr/table-10", ["Transfer"], ["Scratch"]),
    ],
)
def test_an_improvement_is_over_the_form_that_the_paper_divides_by(
    name: str, of: list[str], over: list[str]
) -> None:
    improvement = fill_recipe(read_recipe(name), ["a"], ["s"]).improvement
    assert improvement is not None
    assert (improvement.of, improvement.over) == (of, over)


@pytest.mark.parametrize("path", sorted(REDUCED.glob("*.toml")), ids=lambda path: path.stem)
def test_the_reduced_grids_of_the_results_have_settings_of_their_models(path: Path) -> None:
    for combination in read_grid(path).combinations:
        recommender = MODELS.find(combination.model).load()
        pairs = [f"{name}={value}" for name, value in combination.settings.items()]
        resolve_settings(recommender, False, SettingSources(pairs=pairs))
