"""Two processes that share each batch train what one process trains."""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import distributed_worker as worker
from trainer.distributed import (
    all_reduce_mean,
    any_process,
    gather_ids,
    gather_rows,
    global_mean_rows,
    on_rank_zero,
    rank_offset,
)

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have written the tensors of every case."""
    folder = tmp_path_factory.mktemp("two")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with ExitStack() as stack:
        processes = []
        for rank in range(2):
            place = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = subprocess.Popen(
                [sys.executable, "-m", worker.__name__, str(folder)],
                cwd=ROOT,
                env={**os.environ, **address, **place, "OMP_NUM_THREADS": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)  # closes the pipe and waits
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", list(worker.CASES))
def test_two_processes_are_one_with_the_joined_batch(two: Path, case: str, tmp_path: Path) -> None:
    alone = worker.CASES[case](tmp_path)
    together = load_file(two / f"{case}-0.safetensors")
    other = load_file(two / f"{case}-1.safetensors")
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        assert torch.equal(together[name], other[name]), name
        if name.endswith("qkv.bias"):  # the bias of keys moves no attention: its gradient is noise
            value, together[name] = (x.view(3, -1)[[0, 2]] for x in (value, together[name]))
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.slow
def test_only_the_first_process_writes(two: Path) -> None:
    assert (two / "sasrec" / "model.safetensors").exists()
    assert not (two / "sasrec-of-1").exists()


def test_in_one_process_nothing_is_changed() -> None:
    x = torch.randn(3, 2)
    assert gather_rows(x) is x
    assert gather_ids(x) is x
    assert (global_mean_rows(3), rank_offset(3)) == (3.0, 0)
    assert all_reduce_mean(x) is x
    assert [any_process(condition) for condition in (True, False)] == [True, False]
    assert on_rank_zero(lambda: 4) == 4
