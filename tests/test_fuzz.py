import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["command lines", "settings files", "raw tables"])
def test_random_inputs_end_with_success_or_one_line_of_error(kind: str) -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--inputs", "12", "--commands", "1"]
    done = subprocess.run(
        [*command, "--only", kind],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
