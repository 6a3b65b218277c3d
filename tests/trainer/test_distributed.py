"""Two processes that share each batch train what one process trains."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from features.process_watch import LostProcessError, ProcessWatch
from features.signals import Interrupted, handle_signals
from tests.trainer import distributed_worker as worker
from trainer.distributed import (
    all_reduce_mean,
    any_process,
    gather_ids,
    gather_rows,
    global_mean_rows,
    on_rank_zero,
    process_group,
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
    """The folder in which two processes have written the tensors of every case.

    At the end, the second process is killed in the middle of a step.
    """
    folder = tmp_path_factory.mktemp("two")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    process = subprocess.Popen(
        [sys.executable, "-m", worker.__name__, str(folder), "cases"],
        cwd=ROOT,
        env={**os.environ, **address, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        codes, errors = process.communicate(timeout=240)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # both processes, if they have not ended
    assert codes.split() == [str(LostProcessError.exit_code), str(-signal.SIGKILL)], errors
    (folder / "errors.txt").write_text(errors)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in worker.CASES if case != "shared"])
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
def test_a_shared_validation_is_that_of_one_process_to_the_bit(two: Path, tmp_path: Path) -> None:
    alone = worker.shared(tmp_path)
    parts = [load_file(two / f"shared-{process}.safetensors") for process in range(2)]
    users = {60: (32, 28), 13: (8, 5), 5: (4, 1), 1: (1, 0)}  # of each process
    assert len(alone) == len(worker.SHARED) * len(users)
    for name, (count, *metrics) in ((name, value.tolist()) for name, value in alone.items()):
        assert (count, len(metrics)) == (int(name.partition("-")[2]), 18), name
        for together in parts:
            assert tuple(together[name][:2].tolist()) == users[count], name
            assert together[name][2:].tolist() == metrics, name


@pytest.mark.heavy
def test_a_killed_process_ends_the_other_and_the_training_resumes(two: Path) -> None:
    ended = "process 1 of 2 has ended or does not answer"
    assert (two / "errors.txt").read_text().startswith(ended)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(free_port()), "-m", worker.__name__, str(two), "resume"]
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    # The training after the resumed one was killed.
    assert (done.returncode, "(SIGKILL)" in done.stderr) == (1, True), done.stderr
    for process in range(2):
        whole = load_file(two / f"whole-{process}.safetensors")
        resumed = load_file(two / f"resumed-{process}.safetensors")
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())


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


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a process group of one process."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**address, "WORLD_SIZE": "1", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trainer.distributed.is_distributed", lambda: True)
    monkeypatch.setattr("trainer.distributed._SECONDS_TO_NAME", 0.0)


@pytest.mark.usefixtures("group_of_one")
def test_a_collective_that_fails_after_a_signal_is_an_interruption() -> None:
    """After Ctrl-C, the other processes have left."""
    with pytest.raises(LostProcessError), process_group():
        raise RuntimeError("gloo: connection closed by peer")
    with handle_signals(lambda number, frame: None):
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), process_group():
            raise RuntimeError("gloo: connection closed by peer")


@pytest.mark.usefixtures("group_of_one")
def test_a_signal_after_a_loss_tells_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torchrun`` sends a signal to the processes that are left."""
    with pytest.raises(Interrupted), process_group():
        raise Interrupted
    monkeypatch.setattr(ProcessWatch, "has_lost", True)
    with pytest.raises(LostProcessError, match="another process of 1 has ended"), process_group():
        raise Interrupted
