"""Where the blocks come from that stage 2 trains: the checkpoint behind a ``layer-K`` table.

The table's manifest says where its checkpoint lies, its provenance what its weights hash to. A run
keeps the configuration in ``blocks.json`` and the weights with its own, so that only the beginning
of a training reads the checkpoint.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from features.atomic_files import write_json
from features.checkpoint_fingerprint import quiet_transformers, stored_config
from features.errors import UserError
from features.store import FeatureTable
from features.warehouse import read_json
from trainer.finetune.split_encoder import LIBRARIES, build, find, load
from trainer.finetune.upper_blocks import UpperBlocks

FILE = "blocks.json"
_CACHED = "models--"  # of a repository's folder in the hub's cache


def open_blocks(tables: Sequence[FeatureTable], count: int) -> dict[str, UpperBlocks]:
    """Load the uppermost blocks of the backbones whose ``layer-K`` tables a run reads.

    Args:
        tables: Of the run; those of another level stay as they are, but one must be ``layer-K``.
        count: How many blocks of each.

    Returns:
        Modality -> blocks on the CPU, in float32, as the checkpoint has them.

    Raises:
        UserError: There is no such table, one is of another block, its checkpoint is gone, has
            changed or is of a kind that cannot be cut here.
    """
    found = {}
    for table in tables:
        if table.level.startswith("layer-"):
            found[table.modality] = _open(table, count)
    if not found:
        raise UserError(_no_table(tables, count))
    return found


def write_blocks(folder: Path, backbones: Mapping[str, UpperBlocks]) -> None:
    """Keep in a run's folder what builds its blocks again."""
    document = {modality: dict(blocks.document) for modality, blocks in backbones.items()}
    write_json(folder / FILE, document)


def read_blocks(folder: Path) -> dict[str, UpperBlocks]:
    """Build the blocks of a run again, all zeros: the run's checkpoint has their weights.

    Raises:
        UserError: The file is absent or damaged.
    """
    path = folder / FILE
    if not path.exists():
        raise UserError(f"{path} is not there; train again")
    with _library(f"{path} is damaged", "train again"):
        return {name: build(about) for name, about in read_json(path, "train again").items()}


def _open(table: FeatureTable, count: int) -> UpperBlocks:
    source, made = _source(table), table.provenance()
    assert made is not None
    library, modality = source["library"], table.modality
    where = source["folder"] if library == "transformers" else source["model"]
    trouble = f"tune_blocks: the checkpoint of {table.label} in {where} cannot be loaded"
    with _library(trouble, "put it back, or set tune_blocks=0"):
        whole, config, checkpoint = load(library, source)
        if checkpoint != made.checkpoint:
            raise UserError(
                f"tune_blocks: the checkpoint in {where} is not the one that {table.label} was made"
                f" with ({checkpoint}, not {made.checkpoint}); put that back, or run:"
                f" {_command(table, table.level)} --overwrite"
            )
        encoder = find(whole, library, modality)
        depth = len(encoder.blocks)
        if count >= depth:
            raise UserError(
                f"tune_blocks={count} is too many for {made.backbone}, which has {depth} blocks;"
                f" give at most {depth - 1}"
            )
        cut = depth - count
        if table.level != f"layer-{cut}":
            raise UserError(
                f"tune_blocks={count} of the {depth} blocks of {made.backbone} reads layer-{cut},"
                f" not {table.label}; {_remedy(table, cut)}"
            )
        document = {"library": library, "modality": modality, "cut": cut, "config": config}
        upper = encoder.above(cut, document).requires_grad_(True)
        if not encoder.gives(upper, cut):
            raise UserError(
                f"tune_blocks: the upper blocks of {made.backbone} alone do not give what the whole"
                f" {library} model gives with the version that is installed; set tune_blocks=0"
            )
    return upper


# -- the table ------------------------------------------------------------------------------


def _source(table: FeatureTable) -> dict[str, Any]:
    """Where the manifest says that the checkpoint is, and is it still there."""
    source = (table.manifest() or {}).get("source") or {}
    made = table.provenance()
    name = made.backbone if made else table.backbone
    if source.get("library") not in LIBRARIES:
        raise UserError(
            f"tune_blocks: the feature table {table.label} names no checkpoint whose blocks could"
            f" be trained; with a transformer as {name!r} run: {_command(table, table.level)}"
            " (what is already encoded is reused)"
        )
    if source["library"] == "transformers":
        folder = _present(Path(source["folder"]))
        if folder is None:
            raise UserError(
                f"tune_blocks: the checkpoint of {table.label} is no longer in {source['folder']};"
                f" put it back, or run: {_command(table, table.level)} (what is encoded is reused)"
            )
        return {**source, "folder": str(folder)}
    return dict(source)


def _present(folder: Path) -> Path | None:
    """The folder, or what the hub's cache of this machine has of the same repository."""
    if folder.is_dir():
        return folder
    named = [part for part in folder.parts if part.startswith(_CACHED)]
    if not named:
        return None
    from huggingface_hub import snapshot_download

    repository = named[-1].removeprefix(_CACHED).replace("--", "/", 1)
    inside = folder.parts[folder.parts.index(named[-1]) + 3 :]
    try:
        return Path(snapshot_download(repository, local_files_only=True), *inside)
    except Exception:  # not in the cache; the client's classes of errors change
        return None


def _command(table: FeatureTable, level: str) -> str:
    made = table.provenance()
    name = made.backbone if made else table.backbone
    folder = ((table.manifest() or {}).get("source") or {}).get("folder", "")
    if folder and Path(folder).name == name.partition("@")[0]:
        name = folder  # a local one goes by its own name
    return f"mmrec extract --dataset {table.dataset} --{table.modality} {name} --level {level}"


def _remedy(table: FeatureTable, cut: int) -> str:
    level = f"layer-{cut}"
    label = f"{table.modality}={table.backbone}:{level}"
    return f"run: {_command(table, level)}, and give --features {label}"


def _no_table(tables: Sequence[FeatureTable], count: int) -> str:
    labels = ", ".join(table.label for table in tables) or "none"
    depths = {table: _config_depth(table) - count for table in tables}
    known = next((_remedy(table, cut) for table, cut in depths.items() if cut > 0), None)
    unknown = f"run: mmrec extract --text BACKBONE --level layer-K, K = its blocks - {count}"
    return (
        f"tune_blocks={count} trains the blocks above a table layer-K, and the run's tables are"
        f" {labels}; {known or unknown}"
    )


def _config_depth(table: FeatureTable) -> int:
    """How many blocks the encoder of a table has, as its configuration says; 0: it does not."""
    source = (table.manifest() or {}).get("source") or {}
    try:
        config = stored_config(Path(source["folder"]))
        side = config.get("text_config" if table.modality == "text" else "vision_config") or config
        return int(side["num_hidden_layers"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


@contextmanager
def _library(trouble: str, remedy: str) -> Iterator[None]:
    """Keep the library quiet_transformers, and make one line of whatever it stumbles over."""
    try:
        with quiet_transformers():
            yield
    except UserError:
        raise
    except Exception as error:  # whatever is wrong with a checkpoint, it is not ours
        line = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{trouble} ({line}); {remedy}") from None
