import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_random_inputs_end_with_success_or_one_line_of_error() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "18", "--commands", "3"]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
