import os
import subprocess
import sys

import pytest


@pytest.mark.heavy
def test_damaged_files_are_refused_or_made_again() -> None:
    command = [sys.executable, "-m", "tests.corruption", "--flips", "8", "--truncations", "3"]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
