import os
import subprocess
import sys

import pytest

from tests.marks import heavy_after


@pytest.mark.slow
@pytest.mark.parametrize("kills", heavy_after(1, [2, 6]))
def test_killed_commands_that_continue_give_the_results_of_uninterrupted_ones(kills: int) -> None:
    command = [sys.executable, "-m", "tests.kills", "--kills", str(kills)]
    done = subprocess.run(
        [*command, "--only", "images|tokens|train sasrec"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
