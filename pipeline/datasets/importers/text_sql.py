"""SQL that cleans titles and other text on the way into the items table."""

import html
import re

import duckdb

_ENTITY = re.compile(r"&(?:#[0-9]+;?|#[xX][0-9a-fA-F]+;?|[A-Za-z][A-Za-z0-9]*;)")
_TAGS = (
    "a|abbr|b|big|blockquote|body|br|center|code|dd|div|dl|dt|em|font|h[1-6]|head|hr|html|i|img|li"
    "|meta|ol|p|pre|s|script|small|span|strike|strong|style|sub|sup|table|tbody|td|th|thead|tr|tt|u"
    "|ul"
)
# Only tags that HTML has: a text may hold <3 or <me@example.org>.
_TAG = rf"(?i)</?({_TAGS})(\s[^<>]*)?/?>|<!--[^<>]*-->"
_INVISIBLE = (
    r"[\s\p{Z}\p{C}\x{034F}\x{115F}\x{1160}\x{2800}\x{3164}\x{FE00}-\x{FE0F}\x{FFA0}]+"
)  # fmt: skip


def unescape_entities(text: str) -> str:
    """Turn the entities of HTML into characters; named ones without a semicolon are plain text.

    Examples:
        >>> unescape_entities("R&amp;D &copycat AT&T")
        'R&D &copycat AT&T'
    """
    return _ENTITY.sub(lambda match: html.unescape(match[0]), text)


def install_text_functions(db: duckdb.DuckDBPyConnection) -> None:
    """Add the function ``unescape_html(VARCHAR)``, which turns HTML entities into characters."""
    db.create_function("unescape_html", unescape_entities, ["VARCHAR"], "VARCHAR")


def clean_sql(value: str) -> str:
    """Return SQL that removes HTML and collapses white space.

    A text without a visible character becomes NULL.
    """
    # Only rows that contain an entity call the Python function.
    plain = f"CASE WHEN contains({value}, '&') THEN unescape_html({value}) ELSE {value} END"
    plain = f"regexp_replace({plain}, '{_TAG}', ' ', 'g')"
    text = rf"trim(regexp_replace({plain}, '[\s\p{{Z}}\p{{Cc}}]+', ' ', 'g'))"
    return f"CASE WHEN regexp_replace({text}, '{_INVISIBLE}', '', 'g') <> '' THEN {text} END"


def sentence_sql(*values: str) -> str:
    """Return SQL that joins the cleaned values with '. '; NULL if all values are NULL."""
    return f"nullif(concat_ws('. ', {', '.join(clean_sql(value) for value in values)}), '')"
