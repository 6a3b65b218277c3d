"""What becomes of titles and other words on their way into the items table, as SQL."""

import html

import duckdb


def install(db: duckdb.DuckDBPyConnection) -> None:
    """Give ``db`` the one function that SQL lacks: HTML entities to characters."""
    db.create_function("unescape_html", html.unescape, ["VARCHAR"], "VARCHAR")


def clean_sql(value: str) -> str:
    """SQL that unescapes HTML and makes one space of any run of white space; '' becomes NULL."""
    # The condition spares all other rows the way through Python.
    plain = f"CASE WHEN contains({value}, '&') THEN unescape_html({value}) ELSE {value} END"
    return rf"nullif(trim(regexp_replace({plain}, '[\s\p{{Z}}\p{{Cc}}]+', ' ', 'g')), '')"


def sentence_sql(*values: str) -> str:
    """SQL that joins cleaned parts with '. ', leaving out what is NULL; NULL when nothing stays."""
    return f"nullif(concat_ws('. ', {', '.join(clean_sql(value) for value in values)}), '')"
