import subprocess
import sys

import pytest
import torch
from torch import Tensor

from trainer.kernels.dispatch import plain_forms, use_kernels, with_cpu_kernel


@with_cpu_kernel(lambda x: x + 1)
def operator(x: Tensor) -> Tensor:
    """Return ``x``."""
    return x


def test_a_cpu_runs_the_kernel_unless_plain_forms_are_asked_for() -> None:
    x = torch.zeros(())
    assert operator(x) == 1
    with plain_forms():
        assert operator(x) == 0
    assert operator(x) == 1
    assert operator.__doc__ == "Return ``x``."


def test_plain_forms_end_with_an_error_inside() -> None:
    with pytest.raises(RuntimeError, match="inside"), plain_forms():
        raise RuntimeError("inside")
    assert use_kernels(torch.zeros(()))


def test_other_devices_and_autocast_run_the_plain_form() -> None:
    assert operator(torch.zeros((), device="meta")).device.type == "meta"
    assert not use_kernels(torch.zeros((), device="meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert operator(torch.zeros(())) == 0


def test_an_environment_variable_turns_the_kernels_off() -> None:
    code = "import torch; from trainer.kernels.dispatch import *; print(use_kernels(torch.ones(1)))"
    output = subprocess.run(
        [sys.executable, "-c", code],
        env={"MMREC_KERNELS": "off"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert output.stdout.strip() == "False"
