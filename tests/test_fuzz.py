import os
import subprocess
import sys

import pytest

from tests.marks import heavy_after


@pytest.mark.slow
@pytest.mark.parametrize(("inputs", "commands"), heavy_after(1, [(2, 1), (18, 3)]))
def test_random_inputs_end_with_success_or_one_line_of_error(inputs: int, commands: int) -> None:
    sizes = ["--inputs", str(inputs), "--commands", str(commands)]
    command = [sys.executable, "-m", "tests.fuzz", *sizes]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
