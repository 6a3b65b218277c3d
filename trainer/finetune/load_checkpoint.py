"""Load the upper blocks that stage 2 trains from the checkpoint of a ``layer-K`` table.

The table's manifest gives the location of the checkpoint, and its provenance the fingerprint of the
weights. A run stores the configuration in ``blocks.json`` and the weights with its own weights.
Hence only the start of a training reads the checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from features.checkpoint_fingerprint import quiet_transformers, stored_config
from features.documents import read_json, write_json
from features.encoder_blocks import SIDES, block_count
from features.errors import UserError
from features.store import FeatureTable
from trainer.config import ALL_BLOCKS
from trainer.finetune.split_encoder import LIBRARIES, SplitEncoder, build, find_encoder, load
from trainer.finetune.upper_blocks import UpperBlocks

FILE = "blocks.json"
_CACHED = "models--"  # prefix of a repository's folder in the hub's cache


def open_blocks(tables: Sequence[FeatureTable], count: int | str) -> dict[str, UpperBlocks]:
    """Load the uppermost blocks of the backbones whose ``layer-K`` tables a run reads.

    Args:
        tables: Feature tables of the run. At least one must have a level ``layer-K``; tables of
            other levels are left as they are.
        count: Number of blocks of each backbone, or :data:`trainer.config.ALL_BLOCKS`.

    Returns:
        Modality -> blocks on the CPU, in float32, with the weights of the checkpoint.

    Raises:
        UserError: No table has such a level, one has another block, or its checkpoint is missing,
            has changed, or is of a kind whose blocks cannot be trained.
    """
    layer_tables = [table for table in tables if table.level.startswith("layer-")]
    if not layer_tables:
        raise UserError(_no_table(tables, count))
    return {table.modality: _open(table, count) for table in layer_tables}


def write_blocks(folder: Path, backbones: Mapping[str, UpperBlocks]) -> None:
    """Write the description of a run's blocks into its folder."""
    document = {modality: dict(blocks.document) for modality, blocks in backbones.items()}
    write_json(folder / FILE, document)


def read_blocks(folder: Path) -> dict[str, UpperBlocks]:
    """Build the blocks of a run; all weights are zero until the run's checkpoint is loaded.

    Raises:
        UserError: The file is missing or damaged.
    """
    path = folder / FILE
    if not path.exists():
        raise UserError(f"{path} is missing; train again")
    with _library(f"{path} is damaged", "train again"):
        documents = read_json(path, "train again")
        return {modality: build(document) for modality, document in documents.items()}


def _open(table: FeatureTable, count: int | str) -> UpperBlocks:
    """Load the upper blocks of one table's backbone, and check that they fit the table."""
    source, provenance = _source(table), table.provenance()
    assert provenance is not None
    library, modality = source["library"], table.modality
    location = source["folder"] if library == "transformers" else source["model"]
    message = f"tune_blocks: the checkpoint of {table.label} in {location} cannot be loaded"
    with _library(message, "put it back, or set tune_blocks=0"):
        model, config, checkpoint = load(library, source)
        # The fingerprint of VisualBERT's vectors is that of two models.
        expected = source.get("checkpoint") or provenance.checkpoint
        if checkpoint != expected:
            raise UserError(
                f"tune_blocks: the checkpoint in {location} is not the one that {table.label} was"
                f" made with ({checkpoint}, not {expected}); put that back, or run:"
                f" {_command(table, table.level)} --overwrite"
            )
        encoder = find_encoder(model, library, modality, source.get("image_size"))
        cut = _cut(table, encoder.depth, count, provenance.backbone)
        document = {"library": library, "modality": modality, "cut": cut, "config": config}
        document["grid"] = _grid(table, encoder, cut)
        upper = encoder.above(cut, document).requires_grad_(True)
        if not encoder.matches(upper, cut):
            raise UserError(
                f"tune_blocks: the upper blocks of {provenance.backbone} alone do not give what the"
                f" whole {library} model gives with the version that is installed; set"
                " tune_blocks=0"
            )
    return upper


def _grid(table: FeatureTable, encoder: SplitEncoder, cut: int) -> list[int]:
    """Return the rows and columns of the states below the trained stages; empty without stages."""
    if encoder.encoder.stages and not encoder.image_size:
        raise UserError(
            f"tune_blocks: the checkpoint of {table.label} does not resize all images to one size,"
            " or the table is of an older version; with a processor that crops run:"
            f" {_command(table, table.level)} (encoded items are reused)"
        )
    return list(encoder.grid(cut))


def _cut(table: FeatureTable, depth: int, count: int | str, backbone: str) -> int:
    """Return the number of frozen blocks; check that the table has the states after them."""
    level = int(table.level.removeprefix("layer-"))
    cut = level if count == ALL_BLOCKS else depth - int(count)
    if cut < 0:
        raise UserError(
            f"tune_blocks={count} is too many for {backbone}, which has {depth} blocks;"
            f" give at most {depth}, or {ALL_BLOCKS}"
        )
    if table.level != f"layer-{cut}":
        raise UserError(
            f"tune_blocks={count} of the {depth} blocks of {backbone} reads layer-{cut},"
            f" not {table.label}; {_remedy(table, cut)}"
        )
    return cut


# -- the table ------------------------------------------------------------------------------


def _source(table: FeatureTable) -> dict[str, Any]:
    """Return the location of the checkpoint from the manifest; check that it exists."""
    source = (table.manifest() or {}).get("source") or {}
    name = _backbone(table)
    if source.get("library") not in LIBRARIES:
        raise UserError(
            f"tune_blocks: the feature table {table.label} names no checkpoint whose blocks could"
            f" be trained; with a transformer as {name!r} run: {_command(table, table.level)}"
            " (encoded items are reused)"
        )
    if source["library"] == "transformers":
        folder = _existing_folder(Path(source["folder"]))
        if folder is None:
            raise UserError(
                f"tune_blocks: the checkpoint of {table.label} is no longer in {source['folder']};"
                f" put it back, or run: {_command(table, table.level)} (encoded items are reused)"
            )
        return {**source, "folder": str(folder)}
    return dict(source)


def _existing_folder(folder: Path) -> Path | None:
    """Return the folder, or the copy of its repository in the hub's cache of this machine."""
    if folder.is_dir():
        return folder
    cached = [part for part in folder.parts if part.startswith(_CACHED)]
    if not cached:
        return None
    from huggingface_hub import snapshot_download

    repository = cached[-1].removeprefix(_CACHED).replace("--", "/", 1)
    inside = folder.parts[folder.parts.index(cached[-1]) + 3 :]
    try:
        return Path(snapshot_download(repository, local_files_only=True), *inside)
    except Exception:  # not in the cache; the client's classes of errors change
        return None


def _backbone(table: FeatureTable) -> str:
    """Return the name of a table's backbone as the user typed it."""
    provenance = table.provenance()
    return provenance.backbone if provenance else table.backbone


def _command(table: FeatureTable, level: str) -> str:
    """Return the command that extracts the table at a level."""
    name = _backbone(table)
    folder = ((table.manifest() or {}).get("source") or {}).get("folder", "")
    if folder and Path(folder).name == name.partition("@")[0]:
        # A local folder is extracted by its path; the pooling and the number of tokens stay.
        name = folder + name.removeprefix(Path(folder).name)
    return f"mmrec extract --dataset {table.dataset} --{table.modality} {name} --level {level}"


def _remedy(table: FeatureTable, cut: int) -> str:
    """Return what to do to train on the states after block ``cut``."""
    level = f"layer-{cut}"
    label = f"{table.modality}={table.backbone}:{level}"
    return f"run: {_command(table, level)}, and give --features {label}"


def _no_table(tables: Sequence[FeatureTable], count: int | str) -> str:
    """Return the message for a run without a ``layer-K`` table."""
    labels = ", ".join(table.label for table in tables) or "none"
    if count == ALL_BLOCKS:
        cuts = {table: 0 for table in tables if _config_depth(table)}
        level = "layer-0"
    else:
        cuts = {table: _config_depth(table) - int(count) for table in tables}
        level = f"layer-K, K = its blocks - {count}"
    known = next((_remedy(table, cut) for table, cut in cuts.items() if cut >= 0), None)
    unknown = f"run: mmrec extract --text BACKBONE --level {level}"
    return (
        f"tune_blocks={count} trains the blocks above a table layer-K, and the run's tables are"
        f" {labels}; {known or unknown}"
    )


def _config_depth(table: FeatureTable) -> int:
    """Return the number of blocks in a table's encoder by its configuration; 0 if unknown."""
    source = (table.manifest() or {}).get("source") or {}
    try:
        config = stored_config(Path(source["folder"]))
        sides = [config.get(f"{side}_config") for side in SIDES.get(table.modality, ())]
        return block_count(next((side for side in sides if side), config))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return 0


@contextmanager
def _library(message: str, remedy: str) -> Iterator[None]:
    """Silence transformers, and turn any error of a library into one line.

    Args:
        message: Value and place of the error.
        remedy: What the user can do.
    """
    try:
        with quiet_transformers():
            yield
    except UserError:
        raise
    except Exception as error:  # a damaged checkpoint can raise any error
        line = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{message} ({line}); {remedy}") from None
