"""Titles as users have them: HTML tags, entities and invisible characters."""

from pathlib import Path

import pytest

from features.warehouse import Warehouse
from tests.pipeline.datasets.raws import items_of, prepared


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("<b>Red</b> shoe<br/>of <A HREF='x.html'>wool</A>", "Red shoe of wool"),
        ("&lt;p class=x&gt;Hat&lt;/p&gt;", "Hat"),
        ("<!-- draft -->Hat", "Hat"),
        ("I <3 you, Tom <tom@example.org>", "I <3 you, Tom <tom@example.org>"),
        ("a < b and b > c", "a < b and b > c"),
        ("Salt &amp; pepper &#39;n&#39; &#x41;", "Salt & pepper 'n' A"),
        ("AT&T &copycat R&reg Q&ltd", "AT&T &copycat R&reg Q&ltd"),
        ("\u200b\ufeff\u00ad", None),
        ("\u2800\u3164", None),
        ("&nbsp;&#8203;", None),
        ("<br><p> </p>", None),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
    ],
)
def test_texts_of_titles(
    warehouse: Warehouse, tmp_path: Path, title: str, text: str | None
) -> None:
    content = {
        "interactions.csv": "user_id,item_id\nu,a\nu,b\n",
        "items.csv": f'item_id,title\na,"{title}"\nb,Bread\n',
    }
    prepared(warehouse, tmp_path / "raw", content)
    assert [item["text"] for item in items_of(warehouse)] == [text, "Bread"]
