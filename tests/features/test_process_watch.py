"""Processes that watch each other: one that is lost ends the others, one that leaves does not."""

import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from features import process_watch
from features.process_watch import Meeting, ProcessWatch, watch_processes

CHILD = """
import sys
from features.process_watch import Meeting, watch_processes
meeting = Meeting(port=int(sys.argv[1]), token=bytes.fromhex(sys.argv[2]))
gather = lambda flag: [True, flag]
with watch_processes(1, 2, "127.0.0.1", lambda own: meeting, gather) as watch:
    print("watching", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> "queue.Queue[str]":
    """The lines with which this process would have ended."""
    lines: queue.Queue[str] = queue.Queue()
    monkeypatch.setattr(process_watch, "_end_process", lines.put)
    monkeypatch.setattr(process_watch, "_GRACE_SECONDS", 0.1)
    return lines


@contextmanager
def watched_child() -> Iterator[tuple[subprocess.Popen[str], ProcessWatch]]:
    """Yield a process with the number 1 and the watch of process 0, which is this one."""
    children: list[subprocess.Popen[str]] = []

    def share(meeting: Meeting | None) -> Meeting:
        assert meeting is not None
        words = [sys.executable, "-c", CHILD, str(meeting.port), meeting.token.hex()]
        children.append(
            subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        with suppress(OSError), socket.create_connection(("127.0.0.1", meeting.port)) as stranger:
            stranger.sendall(bytes(20))
        return meeting

    def gather(flag: bool) -> list[bool]:
        assert children[0].stdout is not None
        assert children[0].stdout.readline() == "watching\n"
        return [True, True]

    try:
        with watch_processes(0, 2, "127.0.0.1", share, gather) as watch:
            yield children[0], watch
    finally:
        for child in children:
            child.kill()
            child.communicate(timeout=30)


def test_a_killed_process_ends_the_others(ended: "queue.Queue[str]") -> None:
    with watched_child() as (child, watch):
        assert ended.empty()
        child.kill()
        assert ended.get(timeout=60).startswith("process 1 of 2 has ended or does not answer")
        assert watch.ended_process(0) == 1


def test_a_process_that_leaves_ends_no_other(ended: "queue.Queue[str]") -> None:
    with watched_child() as (child, watch):
        child.communicate("", timeout=60)
        assert child.returncode == 0
        assert watch.ended_process(60) == 1
    assert ended.empty()


def test_a_process_that_leaves_in_time_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a collective ends it before the watch does."""
    monkeypatch.setattr(process_watch, "_GRACE_SECONDS", 600)
    lines: list[str] = []
    own, other = socket.socketpair()
    watch = ProcessWatch({1: own}, 2, lines.append)
    other.close()
    assert watch.ended_process(60) == 1
    watch.leave()
    assert not lines


@pytest.mark.parametrize(("last_byte", "told"), [(b"", b""), (b".", b".")], ids=["lost", "left"])
def test_a_process_that_leaves_after_a_loss_is_lost_to_the_third(
    last_byte: bytes, told: bytes
) -> None:
    pairs = {process: socket.socketpair() for process in (1, 2)}
    watch = ProcessWatch({process: own for process, (own, _) in pairs.items()}, 3, print)
    with pairs[1][1] as first:
        first.send(last_byte)
    assert watch.ended_process(60) == 1
    watch.leave()
    with pairs[2][1] as third:
        third.settimeout(60)
        assert third.recv(2) == told


def test_a_process_that_cannot_connect_works_without_a_watch() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    flags: list[bool] = []

    def gather(flag: bool) -> list[bool]:
        flags.append(flag)
        return [True, flag]

    meeting = Meeting(port=port, token=bytes(16))
    before = threading.active_count()
    with watch_processes(1, 2, "127.0.0.1", lambda own: meeting, gather) as watch:
        assert flags == [False]
        assert watch.ended_process(0) is None
    assert threading.active_count() == before
