"""SQL that cleans titles and other text on the way into the items table."""

import html

import duckdb


def install_text_functions(db: duckdb.DuckDBPyConnection) -> None:
    """Add the function ``unescape_html(VARCHAR)``, which turns HTML entities into characters."""
    db.create_function("unescape_html", html.unescape, ["VARCHAR"], "VARCHAR")


def clean_sql(value: str) -> str:
    """Return SQL that unescapes HTML and collapses white space; an empty text becomes NULL."""
    # Only rows that contain an entity call the Python function.
    plain = f"CASE WHEN contains({value}, '&') THEN unescape_html({value}) ELSE {value} END"
    return rf"nullif(trim(regexp_replace({plain}, '[\s\p{{Z}}\p{{Cc}}]+', ' ', 'g')), '')"


def sentence_sql(*values: str) -> str:
    """Return SQL that joins the cleaned values with '. '; NULL if all values are NULL."""
    return f"nullif(concat_ws('. ', {', '.join(clean_sql(value) for value in values)}), '')"
