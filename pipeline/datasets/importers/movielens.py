"""Importer of MovieLens as GroupLens releases it: ml-100k, ml-1m, ml-latest-small.

The suffix of a file determines how the file is read: ``u.data`` and ``u.item``, ``ratings.dat``
and ``movies.dat``, ``ratings.csv`` and ``movies.csv``. Interactions in a ``.txt`` file are one
line for each user, oldest first. Every rating is a positive interaction.
"""

from pathlib import Path

import duckdb

from features.errors import UserError
from features.sql_text import quote_identifier, quoted
from pipeline.datasets.importers.base import Files, Importer, ImportResult
from pipeline.datasets.importers.interactions import Times, create_interactions
from pipeline.datasets.importers.media_files import create_raw_items
from pipeline.datasets.importers.raw_sql import (
    create_table,
    delimited_sql,
    find_columns,
    table_sql,
)
from pipeline.datasets.importers.sequences import create_from_sequences
from pipeline.datasets.importers.text_sql import sentence_sql

_DELIMITER = {".data": "\t", ".dat": "::"}
# Columns of flags in u.item, in the order of u.genre.
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
PLOTS = (
    "id", "title", "year", "rated", "released", "genre", "director", "writer", "actors", "plot",
    "poster",
)  # fmt: skip


def read(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> ImportResult:
    """Read ratings, movies, images named by movie id and, optionally, plots.

    The text of a movie is its title, its genres and its plot.

    Raises:
        UserError: A file is damaged or has another layout.
    """
    times = _create_interactions(db, files["interactions"][0])
    _create_movies(db, files["items"][0])
    plots = files.get("plots", ())
    _create_plots(db, plots[0] if plots else None)
    genres = "array_to_string(m.genres, ', ')"
    db.execute(
        "CREATE TABLE described AS SELECT m.item_id,"
        f" {sentence_sql('m.title', genres, 'e.plot')} AS text,"
        " NULL::VARCHAR AS image, NULL::VARCHAR AS video,"
        " json_merge_patch('{}', json_object('title', m.title, 'genres', m.genres,"
        " 'released', e.released, 'rated', e.rated, 'director', e.director,"
        " 'actors', e.actors))::VARCHAR AS attributes"
        " FROM movies m LEFT JOIN plots e ON e.id = m.item_id"
    )
    notes = create_raw_items(db, root, files)
    if times is None:
        return ImportResult(timestamps=False, notes=notes)
    return ImportResult(timestamps=True, time_unit=times.unit, notes=times.notes + notes)


def _create_interactions(db: duckdb.DuckDBPyConnection, path: Path) -> Times | None:
    """Create ``raw_interactions``; return None if the file has no times."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        create_from_sequences(db, path)
        return None
    if suffix == ".csv":
        source, names = table_sql(db, path)
        user, item, time = (
            quote_identifier(column)
            for column in find_columns(path, names, ["userId"], ["movieId"], ["timestamp"])
        )
    elif suffix in _DELIMITER:
        source = delimited_sql(
            path, ["user", "item", "rating", "time"], delimiter=_DELIMITER[suffix]
        )
        user, item, time = "user", "item", "time"
    else:
        raise UserError(
            f"{path} ends in none of .data, .dat, .csv, .txt; rename it to match its format"
        )
    return create_interactions(db, path, source, user=user, item=item, time=time)


def _create_movies(db: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Create ``movies`` (item_id, title, genres: a list)."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        source, names = table_sql(db, path)
        item, title, genres = (
            quote_identifier(column)
            for column in find_columns(path, names, ["movieId"], ["title"], ["genres"])
        )
        genre_list = f"string_split(nullif({genres}, '(no genres listed)'), '|')"
    elif suffix == ".item":
        flags = [f"g{index}" for index in range(len(GENRES))]
        names = ["item", "title", "released", "video_released", "url", *flags]
        source = delimited_sql(path, names, delimiter="|", encoding="latin-1")
        cases = ", ".join(
            f"CASE WHEN {flag} = '1' THEN {quoted(genre)} END"
            for flag, genre in zip(flags[1:], GENRES[1:], strict=True)
        )
        item, title = "item", "title"
        genre_list = f"list_filter([{cases}], lambda genre: genre IS NOT NULL)"
    elif suffix == ".dat":
        source = delimited_sql(
            path, ["item", "title", "genres"], delimiter="::", encoding="latin-1"
        )
        item, title, genre_list = "item", "title", "string_split(genres, '|')"
    else:
        raise UserError(f"{path} ends in none of .item, .dat, .csv; rename it to match its format")
    select = f"SELECT {item} AS item_id, {title} AS title, {genre_list} AS genres FROM {source}"
    create_table(db, "movies", select, path)


def _create_plots(db: duckdb.DuckDBPyConnection, path: Path | None) -> None:
    """Create ``plots`` with a row for each movie that has one; without a file it is empty."""
    if path is None:
        columns = ", ".join(f"NULL::VARCHAR AS {name}" for name in PLOTS)
        db.execute(f"CREATE TABLE plots AS SELECT {columns} WHERE false")
        return
    source = delimited_sql(path, PLOTS, delimiter="::")
    known = ", ".join(
        f"any_value(nullif({name}, 'N/A')) AS {name}" for name in PLOTS if name != "id"
    )
    create_table(db, "plots", f"SELECT id, {known} FROM {source} GROUP BY id", path)


IMPORTER = Importer(
    summary="ratings and movies as GroupLens releases them",
    files={
        "interactions": ("u.data", "ratings.dat", "ratings.csv", "*sequences*.txt"),
        "items": ("u.item", "movies.dat", "movies.csv"),
        "images": ("posters*", "images"),
        "videos": ("trailers", "videos"),
        "plots": ("movies_extrainfos.dat",),
    },
    read=read,
    example={
        "ratings.csv": "userId,movieId,rating,timestamp\n1,10,5,100\n1,20,3,200\n2,10,4,150\n",
        "movies.csv": "movieId,title,genres\n10,Alien (1979),Horror|Sci-Fi\n20,Brazil,Comedy\n",
    },
)
