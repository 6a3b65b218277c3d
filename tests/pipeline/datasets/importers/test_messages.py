"""Parts of the messages of importers."""

import pytest

from pipeline.datasets.importers.messages import plural


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 items"), (1, "1 item"), (2, "2 items"), (60_000, "60,000 items")]
)
def test_a_count_has_its_noun_and_separators(count: int, text: str) -> None:
    assert plural(count, "item") == text
