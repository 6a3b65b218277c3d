import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_commands_that_continue_give_the_results_of_uninterrupted_ones() -> None:
    command = [sys.executable, "-m", "tests.kills", "--kills", "6"]
    done = subprocess.run(
        [*command, "--only", "images|tokens|train sasrec"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
