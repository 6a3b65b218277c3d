"""Plan an extraction: check the dataset and the options, and load the backbones."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from features.errors import UserError
from features.object_storage import is_storage_url
from features.provenance import Provenance
from features.registry import Registry
from features.schema import MODALITIES
from features.warehouse import DatasetInfo, Warehouse
from pipeline.backbones.base import POOLED, Backbone, UnavailableError
from pipeline.backbones.listing import offline_backbone
from pipeline.backbones.loading import (
    check_modality,
    load_backbone,
    name_and_mask,
    name_and_max_tokens,
    with_mask,
    wrong_modality,
)
from pipeline.backbones.packages import INSTALL
from pipeline.backbones.registry import DEFAULT, OFFLINE, WEIGHTLESS
from pipeline.extraction.items import ItemInputs
from pipeline.extraction.loading import MAX_TEXT_CHARS
from pipeline.extraction.options import ExtractOptions
from pipeline.extraction.tasks import EncodeOptions, EncodeTask
from pipeline.media.images import DRAFT_PREPROCESSING, IMAGE_PREPROCESSING
from pipeline.media.raw_storage import RawStorage, raw_folder
from pipeline.media.video import describe_sampling

STORAGE_THREADS = 16
"""Least number of threads that read from object storage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractionPlan:
    """The dataset, the options and the backbones of an extraction."""

    warehouse: Warehouse
    info: DatasetInfo
    items: ItemInputs
    options: ExtractOptions
    names: dict[str, str]
    """Name of the backbone by modality, as the user gave it."""
    backbones: dict[str, Backbone] = field(default_factory=dict)
    """Loaded backbone by modality; empty before :meth:`loaded`."""

    def loaded(self) -> "ExtractionPlan":
        """Return the plan with its backbones.

        Raises:
            UserError: A backbone is unknown, unavailable or does not take a modality or level.
        """
        backbones = _load_backbones(self.info.name, self.names, self.options)
        return replace(self, backbones=backbones)

    def task(self, modality: str) -> EncodeTask:
        """Return the task of encoding one modality."""
        backbone = self.backbones[modality]
        return EncodeTask(
            backbone=backbone,
            backbone_name=self.names[modality],
            options=EncodeOptions(
                modality=modality,
                level=self.options.level,
                batch_size=self.options.batch_size or backbone.batch_size,
                threads=self.threads,
                draft=backbone.input_size if self.options.decode == "draft" else None,
                frames=self.options.frames,
            ),
            device=self.options.device,
            compute=self.options.compute,
            workers=self.options.workers,
            raw=self.raw,
            prepared=self.warehouse.dataset_dir(self.info.name),
        )

    @property
    def raw(self) -> Path | RawStorage:
        """Folder of the raw files."""
        return raw_folder(self.warehouse, self.info.raw)

    @property
    def threads(self) -> int:
        """Number of threads that read and decode; more for object storage, which answers late."""
        cores = _count_cores()
        return max(cores, STORAGE_THREADS) if is_storage_url(self.info.raw) else cores

    def item_id(self, item: int) -> str:
        """Return the id of an item."""
        return str(self.items.ids[item].as_py())


def plan_extraction(warehouse: Warehouse, dataset: str, options: ExtractOptions) -> ExtractionPlan:
    """Check the dataset and the options before anything is encoded; load no backbone.

    Raises:
        UserError: The dataset is not prepared or has no input of a modality, its raw files are
            missing, or an option does not apply.
    """
    info = warehouse.info(dataset)
    items = ItemInputs(warehouse, dataset)
    names = _choose_backbones(info.name, items, options.backbones())
    names = _with_max_tokens(names, options.max_tokens)
    names = _with_mask(names, options.mask_ratio)
    is_local = not is_storage_url(info.raw)
    if set(names) - {"text"} and is_local and not Path(info.raw).is_dir():
        raise UserError(
            f"the raw files of {dataset} are no longer in {info.raw}; put them back or run:"
            f" mmrec prepare --dataset {dataset} --raw DIR"
        )
    if options.frames is not None and "video" not in names:
        raise UserError("--frames applies to videos; give --video BACKBONE too, or leave it out")
    if options.decode == "draft" and not {"image", "joint"} & set(names):
        raise UserError("--decode draft applies to images; give --image BACKBONE, or leave it out")
    return ExtractionPlan(warehouse=warehouse, info=info, items=items, options=options, names=names)


def provenance_of(task: EncodeTask, dtype: str) -> Provenance:
    """Return the provenance of the table that a task writes.

    Args:
        task: The modality and its backbone.
        dtype: Type of a stored element.
    """
    backbone, options = task.backbone, task.options
    image = IMAGE_PREPROCESSING + (f"; {DRAFT_PREPROCESSING}" if options.draft is not None else "")
    text = f"at most {MAX_TEXT_CHARS} characters"
    reading_steps = {
        "image": image,
        "text": text,
        "video": describe_sampling(options.frames),
        "joint": f"{image}; {text}",
    }[options.modality]
    pooling = backbone.pooling(options.modality, options.level)
    return Provenance(
        backbone=backbone.name,
        checkpoint=backbone.checkpoint,
        preprocessing=f"{reading_steps}; {backbone.preprocessing(options.modality)}",
        pooling=f"{pooling}; mean over frames" if options.modality == "video" else pooling,
        modality=options.modality,
        level=options.level,
        compute=backbone.compute,
        dtype=dtype,
        dim=task.token_dim or backbone.dim,
        libraries=backbone.libraries,
    )


def _choose_backbones(dataset: str, items: ItemInputs, names: dict[str, str]) -> dict[str, str]:
    """Return the backbone of each modality; by default, CLIP for images and texts."""
    counts = items.counts
    if not names:
        names = {modality: DEFAULT for modality in ("image", "text") if counts[modality]}
        if not names:
            raise UserError(
                f"no item of {dataset} has an image or a text; prepare the dataset again with"
                " images or texts, or give --video BACKBONE"
            )
    for modality in names:
        if counts[modality]:
            continue
        if modality == "joint":
            raise UserError(
                f"no item of {dataset} has both an image and a text, which --joint needs;"
                " leave it out or prepare the dataset again with both"
            )
        filled = ", ".join(name for name in MODALITIES if counts[name]) or "none"
        raise UserError(
            f"the column {modality} of {dataset} is empty for all {len(items)} items;"
            f" leave out --{modality} (filled columns: {filled}) or prepare the dataset again"
        )
    return names


def _with_max_tokens(names: dict[str, str], max_tokens: int | None) -> dict[str, str]:
    """Put ``@max_tokens`` after the names of the backbones of texts and pairs."""
    if max_tokens is None:
        return names
    with_texts = [modality for modality in ("text", "joint") if modality in names]
    limited = dict(names)
    for modality in with_texts:
        base, given = name_and_max_tokens(names[modality])
        if given not in (None, max_tokens):
            raise UserError(
                f"--{modality} {names[modality]} and --max-tokens {max_tokens} give two numbers of"
                " tokens; give one"
            )
        limited[modality] = f"{base}@{max_tokens}"
    if not with_texts:
        raise UserError(
            f"--max-tokens {max_tokens} applies to texts; give --text BACKBONE or --joint BACKBONE,"
            " or leave it out"
        )
    return limited


def _with_mask(names: dict[str, str], mask_ratio: float | None) -> dict[str, str]:
    """Put ``@mask-PERCENT`` after the names of the backbones of images and videos."""
    if mask_ratio is None:
        return names
    percent = round(mask_ratio * 100)
    masked = dict(names)
    for modality in {"image", "video"} & set(names):
        base, given = name_and_mask(names[modality])
        if given not in (None, percent):
            raise UserError(
                f"--{modality} {names[modality]} and --mask-ratio {mask_ratio} give two shares of"
                " the patches; give one"
            )
        masked[modality] = with_mask(base, percent)
    if not {"image", "video"} & set(names):
        raise UserError(
            f"--mask-ratio {mask_ratio} applies to images; give --image mae-b, or leave it out"
        )
    return masked


def _load_backbones(
    dataset: str, names: dict[str, str], options: ExtractOptions
) -> dict[str, Backbone]:
    """Load each backbone once, before any input is read: a missing backbone is reported early."""
    loaded: dict[str, Backbone] = {}
    for modality, name in names.items():
        check_modality(name, modality)
        if name not in loaded:
            try:
                loaded[name] = load_backbone(name, device=options.device, compute=options.compute)
            except UnavailableError as error:
                advice = _offline_command(dataset, names, name, options.level)
                raise UserError(f"{error}, or run: {advice}") from None
        _check_level(loaded[name], modality, options.level)
    return {modality: loaded[name] for modality, name in names.items()}


def _offline_command(dataset: str, names: dict[str, str], name: str, level: str) -> str:
    """Return the command that extracts without a backbone that is unavailable.

    Args:
        dataset: Name of the dataset.
        names: Modality -> name of the backbone that was asked for.
        name: The backbone that is unavailable.
        level: Level that was asked for.
    """
    base = name_and_max_tokens(name)[0]
    limits = {key: asked.removeprefix(base) for key, asked in names.items()}
    others = {
        key: offline_backbone(key)
        for key, asked in names.items()
        if name_and_max_tokens(asked)[0] == base
    }
    chosen = {**names, **{key: backbone + limits[key] for key, backbone in others.items()}}
    flags = " ".join(f"--{modality} {backbone}" for modality, backbone in chosen.items())
    command = f"mmrec extract --dataset {dataset} {flags}"
    command += f" --level {level}" if level != POOLED else ""
    lacks = [key for key, backbone in others.items() if backbone == WEIGHTLESS and key in OFFLINE]
    if lacks:
        offline = " and ".join(dict.fromkeys(OFFLINE[modality] for modality in lacks))
        command += f" ({WEIGHTLESS} has no weights; for {offline} run first: {INSTALL})"
    return command


def _check_level(backbone: Backbone, modality: str, level: str) -> None:
    if modality not in backbone.modalities:
        raise wrong_modality(backbone.name, backbone.modalities, modality)
    kind = f"{modality} level of backbone {backbone.name!r}:"
    Registry(kind, dict.fromkeys(backbone.levels(modality), modality)).find(level)


def _count_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
