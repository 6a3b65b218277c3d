"""Signals that end a command: Ctrl-C, and those of job schedulers and lost connections."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C; `kill`, SLURM, Kubernetes and `timeout`; a lost terminal; SLURM's early warning."""

_last: int = signal.SIGINT
_is_received = False
"""True if a signal was received in the command."""
_n_contexts = 0
"""Number of contexts of :func:`handle_signals` around the current code."""


class Interrupted(KeyboardInterrupt):
    """A signal of :data:`SIGNALS` was received."""


def exit_code() -> int:
    """Return 128 + the number of the last received signal, or 130 if none was received."""
    return 128 + _last


def raise_received() -> None:
    """Raise :class:`Interrupted` if a signal was received in this command.

    Libraries swallow exceptions in callbacks and imports, and a part of a command that handles a
    signal by itself can end as if there were none. Long work therefore calls this function between
    its steps.

    Raises:
        Interrupted: A signal was received, and the command goes on.
    """
    if _is_received:
        raise Interrupted(signal.Signals(_last).name)


@contextmanager
def handle_signals(
    handler: Callable[[int, FrameType | None], None] | None = None,
) -> Iterator[None]:
    """Call a handler for each of :data:`SIGNALS` inside the context.

    Signals that this process ignores stay ignored: a shell starts background jobs with SIGINT
    ignored, and `nohup` ignores SIGHUP. Outside the main thread nothing changes. Python ignores
    an :class:`Interrupted` that is raised in a destructor or a callback of the garbage collector;
    it is not printed there, and :func:`raise_received` raises it again.

    Args:
        handler: Called as by ``signal.signal``; None: raise :class:`Interrupted`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    global _is_received, _n_contexts
    is_command = handler is None or _n_contexts == 0  # not a part of a command
    if is_command:
        _is_received = False

    def receive(number: int, frame: FrameType | None) -> None:
        global _last, _is_received
        _last, _is_received = number, True
        if handler is None:
            raise Interrupted(signal.Signals(number).name)
        handler(number, frame)

    hook_before = sys.unraisablehook

    def report_ignored(ignored: "sys.UnraisableHookArgs") -> None:
        if not isinstance(ignored.exc_value, Interrupted):
            hook_before(ignored)

    sys.unraisablehook = report_ignored
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, receive)
    _n_contexts += 1
    try:
        yield
    finally:
        _n_contexts -= 1
        if is_command:
            _is_received = False
        for number in handled:
            signal.signal(number, before[number])
        sys.unraisablehook = hook_before
