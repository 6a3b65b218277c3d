"""pipeline/README.md names folders and files that exist."""

import re
from pathlib import Path

PIPELINE = Path(__file__).parents[2] / "pipeline"


def test_the_folders_and_files_of_the_readme_exist() -> None:
    text = (PIPELINE / "README.md").read_text()
    names = re.findall(r"`([a-z_]+/[a-z_/.]*|[a-z_]+\.py)`", text)
    assert {"datasets/", "media/", "backbones/", "extraction/"} <= set(names)
    for name in set(names):
        assert (PIPELINE / name).exists(), name
    steps = re.findall(r"^(\d+)\. ", text, re.MULTILINE)
    assert [int(step) for step in steps] == list(range(1, len(steps) + 1))
    assert len(steps) <= 10
