"""MovieLens as GroupLens releases it: ml-100k, ml-1m, ml-latest-small.

The file's ending tells the layout: ``u.data`` / ``u.item``, ``ratings.dat`` / ``movies.dat``,
``ratings.csv`` / ``movies.csv``; interactions in a ``.txt`` are one line a user, oldest first.
Every rating is a positive interaction, whatever its value.
"""

from pathlib import Path

import duckdb

from features.dataset import quoted
from features.errors import UserError
from pipeline.datasets.importers.base import Files, Raw
from pipeline.datasets.importers.media_files import create_items
from pipeline.datasets.importers.raw_sql import (
    column,
    create,
    create_interactions,
    delimited_sql,
    ident,
    table_sql,
)
from pipeline.datasets.importers.sequences import create_from_sequences
from pipeline.datasets.importers.text_sql import install, sentence_sql

# The flags of u.item, in the order of u.genre.
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary",
    "Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi",
    "Thriller", "War", "Western",
)  # fmt: skip
PLOTS = (
    "id", "title", "year", "rated", "released", "genre", "director", "writer", "actors", "plot",
    "poster",
)  # fmt: skip


def read(db: duckdb.DuckDBPyConnection, root: Path, files: Files) -> Raw:
    """Read ratings, movies, pictures named by movie id and, where there are any, plots.

    The text of a movie is its title, its genres and its plot.

    Raises:
        UserError: A file is damaged or of another layout.
    """
    install(db)
    timestamps = _interactions(db, files["interactions"][0])
    _movies(db, files["items"][0])
    plots = files.get("plots", ())
    _plots(db, plots[0] if plots else None)
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
    return Raw(timestamps=timestamps, notes=create_items(db, root, files))


def _interactions(db: duckdb.DuckDBPyConnection, path: Path) -> bool:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        create_from_sequences(db, path)
        return False
    if suffix == ".csv":
        source, names = table_sql(db, path)
        user, item, time = (
            ident(column(path, names, name)) for name in ("userId", "movieId", "timestamp")
        )
    elif suffix in _DELIMITER:
        source = delimited_sql(
            path, ["user", "item", "rating", "time"], delimiter=_DELIMITER[suffix]
        )
        user, item, time = "user", "item", "time"
    else:
        raise UserError(f"{path} ends in none of .data, .dat, .csv, .txt; rename it to what it is")
    create_interactions(db, path, source, user, item, time)
    return True


_DELIMITER = {".data": "\t", ".dat": "::"}


def _movies(db: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Make ``movies`` (item_id, title, genres: a list)."""
    suffix = path.suffix.lower()
    if suffix == ".csv":
        source, names = table_sql(db, path)
        item, title, genres = (
            ident(column(path, names, name)) for name in ("movieId", "title", "genres")
        )
        listed = f"string_split(nullif({genres}, '(no genres listed)'), '|')"
    elif suffix == ".item":
        flags = [f"g{index}" for index in range(len(GENRES))]
        names = ["item", "title", "released", "video_released", "url", *flags]
        source = delimited_sql(path, names, delimiter="|", encoding="latin-1")
        cases = ", ".join(
            f"CASE WHEN {flag} = '1' THEN {quoted(genre)} END"
            for flag, genre in zip(flags[1:], GENRES[1:], strict=True)
        )
        item, title = "item", "title"
        listed = f"list_filter([{cases}], lambda genre: genre IS NOT NULL)"
    elif suffix == ".dat":
        source = delimited_sql(
            path, ["item", "title", "genres"], delimiter="::", encoding="latin-1"
        )
        item, title, listed = "item", "title", "string_split(genres, '|')"
    else:
        raise UserError(f"{path} ends in none of .item, .dat, .csv; rename it to what it is")
    select = f"SELECT {item} AS item_id, {title} AS title, {listed} AS genres FROM {source}"
    create(db, "movies", select, path)


def _plots(db: duckdb.DuckDBPyConnection, path: Path | None) -> None:
    """Make ``plots``, one row for each movie that has one, empty when there is no file."""
    if path is None:
        columns = ", ".join(f"NULL::VARCHAR AS {name}" for name in PLOTS)
        db.execute(f"CREATE TABLE plots AS SELECT {columns} WHERE false")
        return
    source = delimited_sql(path, PLOTS, delimiter="::")
    known = ", ".join(
        f"any_value(nullif({name}, 'N/A')) AS {name}" for name in PLOTS if name != "id"
    )
    create(db, "plots", f"SELECT id, {known} FROM {source} GROUP BY id", path)
