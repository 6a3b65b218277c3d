"""Watch the processes that work together: if one of them is lost, the others end.

A collective fails at once when a process is killed. A process that computes for itself notices
nothing until its next collective, and the connections of a machine without power or network stay
open for hours. Each process therefore has a connection to process 0. The kernel closes it when a
process ends, also by SIGKILL, and when the other machine has not answered for 14 s. A process that
leaves by itself, also by an exception, sends one byte before: it is not lost, and the others go on
to their next collective. No process has to send anything while it works, so one that is busy for
long is not taken for a lost one.
"""

import hmac
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from features.errors import UserError

_IDLE_SECONDS, _PROBE_SECONDS, _PROBES = 5, 3, 3  # a silent machine is lost after 5 + 3 * 3 s
_GRACE_SECONDS = 4.0  # for a process to end by the error of its own collective
_CONNECT_SECONDS = 10.0
_BYE = b"."
_RANK_BYTES = 4


class LostProcessError(UserError):
    """Another process of the same work was killed, failed, or does not answer."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """The place where processes connect to process 0."""

    port: int
    token: bytes
    """Secret that a connection begins with."""


class ProcessWatch:
    """The connections of a process, and the thread that waits for their ends.

    Args:
        peers: Process number to connection: all others in process 0, and process 0 in the others.
        size: Number of processes.
        end_process: Called with the error line if a process is lost and this one does not end by
            itself within 4 s.
    """

    def __init__(
        self,
        peers: dict[int, socket.socket],
        size: int,
        end_process: Callable[[str], object],
    ) -> None:
        self._peers, self._size, self._end_process = peers, size, end_process
        self._ended: int | None = None
        self._has_lost = False
        self._has_ended, self._is_left = threading.Event(), threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._wait, name="process watch", daemon=True)
        self._thread.start()

    @property
    def has_lost(self) -> bool:
        """True if a process was lost; one that has left is not."""
        return self._has_lost

    def ended_process(self, seconds: float) -> int | None:
        """Return the number of a process that was lost or has left, or None.

        Args:
            seconds: Longest time to wait for one.
        """
        self._has_ended.wait(seconds)
        return self._ended

    def leave(self) -> None:
        """Stop watching, tell the others, and close the connections.

        After the loss of a process the others are not told, so that this one is lost to them too:
        only process 0 is connected with all of them.
        """
        self._is_left.set()
        self._wake.send(_BYE)
        self._thread.join()
        for connection in self._peers.values():
            with suppress(OSError), connection:
                if not self._has_lost:
                    connection.send(_BYE)
        self._wake.close()
        self._woken.close()

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            for process, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while not self._is_left.is_set():
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    selector.unregister(key.fileobj)
                    self._has_lost = _is_lost(self._peers[key.data])
                    self._ended = key.data
                    self._has_ended.set()
                    if self._has_lost:
                        if not self._is_left.wait(_GRACE_SECONDS):
                            self._end_process(lost_line(key.data, self._size))
                        return


def _is_lost(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) != _BYE
    except OSError:  # reset, or no answer to the probes
        return True


def is_distributed() -> bool:
    """Return True if ``torchrun`` started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_later_process() -> bool:
    """Return True if ``torchrun`` started this process, and not as process 0.

    It needs neither torch nor a process group.
    """
    return is_distributed() and int(os.environ.get("RANK", "0")) > 0


def lost_line(process: int | None, size: int) -> str:
    """Return the error line for a lost process.

    Args:
        process: Its number; None if it is not known.
        size: Number of processes.
    """
    name = "another process" if process is None else f"process {process}"
    return (
        f"{name} of {size} has ended or does not answer, so this one ends too; saved files are"
        " complete: start all processes again, a training with --resume"
    )


@contextmanager
def watch_processes(
    rank: int,
    size: int,
    address: str,
    share: Callable[[Meeting | None], Meeting],
    gather: Callable[[bool], list[bool]],
) -> Iterator[ProcessWatch]:
    """Watch the other processes in the body.

    A process that cannot connect is not watched: the others notice its end at the next collective.

    Args:
        rank: Number of this process.
        size: Number of processes.
        address: Address of the machine of process 0.
        share: Collective that returns the value of process 0 in all processes.
        gather: Collective that returns the values of all processes.

    Yields:
        The watch.
    """
    with ExitStack() as stack:
        peers: dict[int, socket.socket] = {}
        if rank == 0:
            server = stack.enter_context(_server(size))
            meeting = share(Meeting(port=server.getsockname()[1], token=secrets.token_bytes(16)))
            count = sum(gather(True)) - 1
            peers = _accept(server, count, meeting.token)
        else:
            meeting = share(None)
            with suppress(OSError):
                peers[0] = _connect(address, meeting, rank)
            gather(bool(peers))
        watch = ProcessWatch(peers, size, _end_process)
    try:
        yield watch
    finally:
        watch.leave()


def _server(size: int) -> socket.socket:
    """Return a socket that listens at a free port on all addresses of this machine."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, backlog=2 * size, dualstack_ipv6=True
        )
    return socket.create_server(("", 0), backlog=2 * size)


def _connect(address: str, meeting: Meeting, rank: int) -> socket.socket:
    connection = socket.create_connection((address, meeting.port), timeout=_CONNECT_SECONDS)
    connection.sendall(meeting.token + rank.to_bytes(_RANK_BYTES, "big"))
    return _probed(connection)


def _accept(server: socket.socket, count: int, token: bytes) -> dict[int, socket.socket]:
    """Return the connections of the other processes, which wait in the backlog already."""
    server.settimeout(_CONNECT_SECONDS)
    peers: dict[int, socket.socket] = {}
    with suppress(OSError):
        while len(peers) < count:
            connection, _ = server.accept()
            connection.settimeout(_CONNECT_SECONDS)
            hello = b""
            with suppress(OSError):
                hello = connection.recv(len(token) + _RANK_BYTES, socket.MSG_WAITALL)
            if hmac.compare_digest(hello[: len(token)], token):
                peers[int.from_bytes(hello[len(token) :], "big")] = _probed(connection)
            else:  # a stranger
                connection.close()
    return peers


def _probed(connection: socket.socket) -> socket.socket:
    """Let the kernel probe whether the other machine answers, and wait without a limit."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", _IDLE_SECONDS),
        ("TCP_KEEPALIVE", _IDLE_SECONDS),  # its name on macOS
        ("TCP_KEEPINTVL", _PROBE_SECONDS),
        ("TCP_KEEPCNT", _PROBES),
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return connection


def _end_process(line: str) -> None:
    """End this process although its main thread waits in a library."""
    sys.stderr.write(f"\nerror: {line}\n")
    sys.stderr.flush()
    os._exit(LostProcessError.exit_code)
