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
_is_raised = False
"""True if a signal has raised :class:`Interrupted` in the command."""


class Interrupted(KeyboardInterrupt):
    """A signal of :data:`SIGNALS` was received."""


def exit_code() -> int:
    """Return 128 + the number of the last received signal; 130 before any."""
    return 128 + _last


def raise_received() -> None:
    """Raise :class:`Interrupted` again if a signal has raised it in this command.

    Libraries swallow exceptions in callbacks and imports. Long work therefore calls this function
    between its steps.

    Raises:
        Interrupted: A signal was received, and the command goes on.
    """
    if _is_raised:
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

    global _is_raised
    if handler is None:
        _is_raised = False

    def receive(number: int, frame: FrameType | None) -> None:
        global _last, _is_raised
        _last = number
        if handler is None:
            _is_raised = True
            raise Interrupted(signal.Signals(number).name)
        handler(number, frame)

    def report_ignored(ignored: "sys.UnraisableHookArgs") -> None:
        if not isinstance(ignored.exc_value, Interrupted):
            hook_before(ignored)

    hook_before, sys.unraisablehook = sys.unraisablehook, report_ignored
    before = {number: signal.getsignal(number) for number in SIGNALS}
    handled = [number for number in SIGNALS if before[number] not in (signal.SIG_IGN, None)]
    for number in handled:
        signal.signal(number, receive)
    try:
        yield
    finally:
        if handler is None:
            _is_raised = False
        for number in handled:
            signal.signal(number, before[number])
        sys.unraisablehook = hook_before
