"""Preparation of a dataset: from raw files to the canonical tables."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import duckdb

from features.checksums import read_checksums
from features.errors import UserError
from features.item_columns import own_columns
from features.splits import TimeSplit
from features.warehouse import DatasetInfo, Warehouse
from pipeline.datasets.canonical_sql import (
    TIES,
    UNLISTED,
    create_tables,
    data_notes,
    describe_tables,
    filter_core,
    handle_unlisted,
    index_ids,
    sample_users,
    write_tables,
)
from pipeline.datasets.database import preparation_database
from pipeline.datasets.duplicates import (
    DUPLICATE_INTERACTIONS,
    DUPLICATE_ITEMS,
    count_copies,
    drop_duplicate_interactions,
    handle_duplicate_items,
)
from pipeline.datasets.hidden_items import check_share, hide_items
from pipeline.datasets.importers.base import Files, ImageColumn, ImportResult, check_raw_tables
from pipeline.datasets.importers.image_column import MEDIA, copy_image_column
from pipeline.datasets.importers.messages import quote_all
from pipeline.datasets.importers.raw_sql import fetch_row
from pipeline.datasets.importers.registry import IMPORTERS
from pipeline.datasets.importers.table import COLUMNS
from pipeline.datasets.raw_copies import RawSource, raw_copies
from pipeline.datasets.raw_files import RawFormat, locate_files, raw_format
from pipeline.datasets.registry import DATASETS
from pipeline.datasets.swap import finish_swap, hash_table, staging, swap_tables
from pipeline.datasets.time_split import check_dates, describe_split, time_split
from pipeline.media.raw_storage import raw_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class PrepareOptions:
    """The dataset to prepare, and the way to prepare it.

    Raises:
        UserError: The k-core is negative, or a choice such as ``unlisted`` or ``ties`` is unknown.
    """

    dataset: str
    """A known dataset, or any name together with ``format``."""
    name: str | None = None
    """Name of the prepared dataset, to keep several preparations; None: as ``dataset``."""
    raw: Path | str | None = None
    """The raw folder, or its URL, such as ``s3://bucket/prefix``; None: that of the last
    preparation, else the one in the warehouse."""
    k_core: int | None = None
    """Minimum interactions of every user and item. 1 removes items without an interaction, 0 keeps
    them. None: as the dataset is registered, or 0 for a given format."""
    format: str | None = None
    """Name of an importer, for one's own data. None: that of the last preparation, else the one
    that the dataset is registered with."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Role of a raw file to a path that replaces the expected names."""
    unlisted: str = "refuse"
    """Treatment of interactions whose item is not in the file of items: ``refuse``, ``keep`` (the
    item has no text and no image) or ``drop``."""
    ties: str = "file"
    """Order of the interactions of a user with equal times: ``file``, ``id``, ``id-desc`` or
    ``hash``; see :data:`pipeline.datasets.canonical_sql.TIES`."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """Names of the columns of one's own tables: ``user``, ``item`` and ``time`` to a name. Only for
    layouts that take them (:attr:`pipeline.datasets.importers.base.Importer.options`)."""
    text_columns: Sequence[str] = ()
    """Columns that form the text of items, in this order; empty: the usual ones of the layout. Only
    for layouts that take them."""
    duplicate_items: str = "refuse"
    """Treatment of items with several rows: ``refuse``, ``first`` or ``last`` (the row that is
    used)."""
    duplicate_interactions: str = "keep"
    """Treatment of interactions that agree in user, item and time: ``keep``, or ``drop`` all but
    the first."""
    split: str = "leave-one-out"
    """``leave-one-out``, or ``time``: train before a date, see :mod:`features.splits`."""
    valid_from: str | None = None
    """First date of validation of a split by time, such as ``2026-03-01``."""
    test_from: str | None = None
    """First date of test of a split by time."""
    users: int | None = None
    """Number of users of a random sample that is drawn before the k-core; None: all users."""
    seed: int = 0
    """Seed of the samples of users and of hidden items."""
    hide_items: float | None = None
    """Share of the items that are hidden: they are test targets only, see
    :mod:`pipeline.datasets.hidden_items`. None hides none."""
    min_user: int | None = None
    """Minimum interactions of users alone. Without ``k_core``, items are not filtered by it."""

    def __post_init__(self) -> None:
        for option, value in (("--users", self.users), ("--min-user", self.min_user)):
            if value is not None and value < 1:
                raise UserError(f"{option} {value} is not positive; give at least 1")
        if self.k_core is not None and self.k_core < 0:
            raise UserError(
                f"--k-core {self.k_core} is negative; give 0 for no filter, or 5 as most papers do"
            )
        check_share(self.hide_items)
        check_dates(self.split, self.valid_from, self.test_from)
        UNLISTED.find(self.unlisted)
        TIES.find(self.ties)
        DUPLICATE_ITEMS.find(self.duplicate_items)
        DUPLICATE_INTERACTIONS.find(self.duplicate_interactions)

    @property
    def target(self) -> str:
        """The name of the prepared dataset."""
        return self.dataset if self.name is None else self.name


def _ignore(message: str) -> None:
    """Ignore a message."""


def prepare_dataset(
    warehouse: Warehouse, options: PrepareOptions, *, notify: Callable[[str], None] = _ignore
) -> DatasetInfo:
    """Write the canonical tables of a dataset, replacing those of an earlier preparation.

    The same input gives the same bytes. After an error the earlier tables are unchanged. If the
    process is killed while it replaces them, the next call completes the replacement.

    Args:
        warehouse: The warehouse that gets the tables.
        options: The dataset and the way to prepare it.
        notify: Called with one line for each message to the user.

    Raises:
        UserError: A file is missing, damaged or contradicts another, or no interaction is left.

    Examples:
        >>> options = PrepareOptions(dataset="demo")
        >>> prepare_dataset(Warehouse("warehouse"), options).users  # doctest: +SKIP
        2000
    """
    folder = warehouse.dataset_dir(options.target)
    _check_target(options)
    finish_swap(folder, options.target)
    earlier = earlier_info(warehouse, options.dataset)
    format = options.format or _own_format(options.dataset, earlier)
    layout = raw_format(options.dataset, format)
    k = _choose_core(options, layout.k_core)
    default = earlier.raw if earlier else warehouse.raw_dir(options.dataset)
    raw = raw_folder(warehouse, options.raw or default)
    if format is None and isinstance(raw, Path) and not raw.exists():
        _generate(options.dataset, raw, notify)
    with raw_copies(raw, notify) as copies:
        files = locate_files(options.dataset, layout, copies.root, options.files)
        copies.fetch(files)
        source = RawSource(copies=copies, files=files, layout=layout, k_core=k)
        _write_tables(warehouse, source, options, notify)
    return warehouse.info(options.target)


def _write_tables(
    warehouse: Warehouse,
    source: RawSource,
    options: PrepareOptions,
    notify: Callable[[str], None],
) -> None:
    """Read the raw files and write the canonical tables."""
    importer_options = _importer_options(options, source.layout)
    text_columns = _earlier_text_columns(warehouse, options.target)
    with staging(warehouse, options.target) as stage:
        with preparation_database(stage, source.root) as db:
            result = source.layout.importer.read(db, source.root, source.files, **importer_options)
            check_raw_tables(db, source.files)
            for note in chain(result.notes, _text_notes(result.text_columns, text_columns)):
                notify(note)
            given = options.valid_from, options.test_from
            dates = time_split(*given, has_times=result.timestamps, unit=result.time_unit)
            for note in _filter_rows(db, source, options, result.timestamps):
                notify(note)
            order = TIES.find(options.ties)
            for note in hide_items(db, options.hide_items, options.seed, order, dates):
                notify(note)
            for note in _copy_images(db, source, options, result.images, stage):
                notify(note)
            create_tables(db, source.k_core, options.ties)
            info, copies = _describe(db, source, options, result, dates)
            write_tables(db, stage)
            split_notes = describe_split(db, info.dates, info.time_unit) if info.dates else ()
            for note in chain(data_notes(db, info, copies), split_notes):
                notify(note)
        folder = warehouse.dataset_dir(options.target)
        swap_tables(folder, stage, replace(info, **table_hashes(stage, info.users)))


def _earlier_text_columns(warehouse: Warehouse, target: str) -> list[str] | None:
    """Return the columns of text of the earlier preparation that is replaced; None without one."""
    earlier = earlier_info(warehouse, target)
    return None if earlier is None else earlier.text_columns


def _text_notes(columns: Sequence[str] | None, earlier: Sequence[str] | None) -> Iterator[str]:
    """Yield messages about the columns that form the text of items."""
    if columns is None:
        return
    names = ", ".join(columns) or "no column"
    yield f"text of items: {names} (--text-columns NAME,NAME chooses others)"
    if earlier is not None and list(earlier) != list(columns):
        yield (
            f"the text of the last preparation was {', '.join(earlier) or 'no column'}: mmrec"
            " extract encodes changed texts again; to keep the text, prepare again with"
            f" --text-columns {','.join(earlier)}"
        )


def _filter_rows(
    db: duckdb.DuckDBPyConnection, source: RawSource, options: PrepareOptions, timestamps: bool
) -> Iterator[str]:
    """Create ``core`` without duplicates, unlisted items and filtered users; yield messages."""
    yield from handle_duplicate_items(db, options.duplicate_items, source.items)
    _check_ties(options.ties, timestamps, source.files)
    yield from handle_unlisted(db, options.unlisted, source.files)
    index_ids(db)
    if not DUPLICATE_INTERACTIONS.find(options.duplicate_interactions):
        yield drop_duplicate_interactions(db, timestamps, source.interactions)
    _filter(db, source.files, options, source.k_core)


def _copy_images(
    db: duckdb.DuckDBPyConnection,
    source: RawSource,
    options: PrepareOptions,
    images: ImageColumn | None,
    stage: Path,
) -> Iterator[str]:
    """Copy images that are bytes in the table of items; yield messages."""
    if images is None:
        return
    yield from copy_image_column(
        db,
        images,
        source.root,
        stage / MEDIA,
        all_items=source.k_core == 0,
        keep_last=options.duplicate_items == "last",
    )


def _describe(
    db: duckdb.DuckDBPyConnection,
    source: RawSource,
    options: PrepareOptions,
    result: ImportResult,
    dates: TimeSplit | None,
) -> tuple[DatasetInfo, int]:
    """Return the content of ``dataset.json``, and the number of copies of interactions."""
    info = describe_tables(
        db,
        name=options.target,
        format=source.layout.name,
        raw=source.copies.place,
        k=source.k_core,
        timestamps=result.timestamps,
        ties=options.ties,
    )
    copies, copied_targets = count_copies(db, dates)
    columns = result.text_columns
    kept = "SELECT attributes FROM items JOIN raw_items USING (item_id)"
    info = replace(
        info,
        time_unit=result.time_unit,
        valid_from=dates.valid_from if dates else None,
        test_from=dates.test_from if dates else None,
        duplicate_interactions=options.duplicate_interactions,
        copied_targets=copied_targets,
        text_columns=None if columns is None else list(columns),
        item_columns=own_columns(db, kept),
        hidden_items=fetch_row(db, "SELECT count(*) FROM hidden")[0],
        **_samples(options),
    )
    return info, copies


def table_hashes(stage: Path, users: int) -> dict[str, Any]:
    """Return the fields of ``DatasetInfo`` by which readers know the new tables.

    Args:
        stage: Folder of the new tables.
        users: Number of users.
    """
    tables = ("items", "interactions")
    parts = {table: sorted((stage / table).glob("*.parquet")) for table in tables}
    return {
        "sequences": hash_table(stage / "interactions", users),
        "checksums": {table: read_checksums(paths) for table, paths in parts.items()},
    }


def _importer_options(options: PrepareOptions, layout: RawFormat) -> dict[str, Any]:
    """Return the given options that the importer of the layout takes.

    Raises:
        UserError: The importer does not take an option that is given, or a role is unknown.
    """
    choices = {"columns": options.columns, "text_columns": options.text_columns}
    given: dict[str, Any] = {name: value for name, value in choices.items() if value}
    for name, value in given.items():
        if name not in layout.importer.options:
            takers = [key for key, importer in IMPORTERS.items() if name in importer.options]
            raise UserError(
                f"--{name.replace('_', '-')} is no option of the layout {layout.name!r}; leave it"
                f" out, or give --format {' or '.join(takers)}"
            )
        if name == "columns":
            unknown = sorted(set(value) - set(COLUMNS))
            if unknown:
                raise UserError(
                    f"--columns {','.join(f'{role}={value[role]}' for role in unknown)}:"
                    f" {quote_all(unknown)} {'is' if len(unknown) == 1 else 'are'} none of"
                    f" {', '.join(COLUMNS)}; write user=customer,item=sku,time=ts"
                )
    return given


def _check_target(options: PrepareOptions) -> None:
    if options.target != options.dataset and options.target in DATASETS:
        raise UserError(f"--name {options.target} is a dataset of its own; give another name")


def _choose_core(options: PrepareOptions, registered: int) -> int:
    """Return the k-core: the one given, else the registered one, which ``min_user`` replaces."""
    if options.k_core is not None:
        return options.k_core
    return registered if options.min_user is None else min(registered, 1)


def _filter(db: duckdb.DuckDBPyConnection, files: Files, options: PrepareOptions, k: int) -> None:
    """Draw the sample of users, then apply the k-core; a dataset without users is left as it is."""
    if not files.get("interactions"):
        return
    if options.users is not None:
        sample_users(db, options.users, options.seed)
    filter_core(db, k, options.dataset, options.min_user or 0)


def _samples(options: PrepareOptions) -> dict[str, Any]:
    """Return the fields of ``DatasetInfo`` about the choice of users and of hidden items."""
    is_sampled = options.users is not None or options.hide_items is not None
    seed = options.seed if is_sampled else None
    return {"sampled_users": options.users, "seed": seed, "min_user": options.min_user or 0}


def _check_ties(ties: str, timestamps: bool, files: Files) -> None:
    """Refuse an order of equal times for interactions without times."""
    if ties != "file" and not timestamps:
        raise UserError(
            f"--ties {ties} orders interactions of equal times, but {files['interactions'][0]} has"
            " no times; leave --ties out"
        )


def earlier_info(warehouse: Warehouse, name: str) -> DatasetInfo | None:
    """Return the facts about an earlier preparation; None if there is none or it is damaged."""
    try:
        return warehouse.info(name) if warehouse.is_prepared(name) else None
    except UserError:
        return None


def _own_format(dataset: str, earlier: DatasetInfo | None) -> str | None:
    """Return the format of the earlier preparation if it is not the one that is registered."""
    if earlier is None:
        return None
    known = DATASETS.get(dataset)
    return None if known and known.importer == earlier.format else earlier.format


def _generate(dataset: str, root: Path, notify: Callable[[str], None]) -> None:
    """Write the raw files of a dataset that the program makes itself."""
    known = DATASETS.get(dataset)
    if known and known.generate:
        known.generate(root)
        notify(f"made the raw files of {dataset} in {root}")
