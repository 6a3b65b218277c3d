"""Run a part in a process of its own: a failure of one part leaves the others a clean device."""

import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from tests.gpu.parts import Part, Report, Setup, Skip

_GRACE = 1.25  # a part that runs longer than its seconds times this is killed
_OWN_PACKAGES = ("cli", "features", "pipeline", "retrieval", "tests", "trainer")


def run_part(part: Part, setup: Setup, report: Report) -> str:
    """Run a part in a process of its own, and return its outcome.

    For a GPU the process is a new one, because a fork cannot use CUDA if its parent has asked for
    it. For a CPU it is a fork, which has imported what its parent has.

    Args:
        part: The part.
        setup: The machine and the sizes. A part that is still running 1.25 times ``setup.seconds``
            after its start is killed.
        report: Called in this process with each figure of the part.

    Returns:
        ``done``, ``skipped: REASON`` or ``failed: REASON``, in one line.
    """
    context: Any = multiprocessing.get_context("spawn" if setup.device == "cuda" else "fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(part, setup, sender))
    process.start()
    sender.close()  # the child has the other copy: its end is the end of the messages
    outcome, last = "", time.monotonic() + _GRACE * setup.seconds
    try:
        while not outcome:
            if not receiver.poll(max(0.0, last - time.monotonic())):
                outcome = f"failed: stopped after {_GRACE * setup.seconds:.0f} seconds"
                break
            name, value = receiver.recv()
            if name:
                report(name, value)
            else:
                outcome = value
    except EOFError:
        process.join()
        outcome = f"failed: the process ended with exit code {process.exitcode}"
    if outcome.startswith("failed: stopped"):
        process.kill()
    process.join()
    return outcome


def _run(part: Part, setup: Setup, sender: Connection) -> None:
    def report(name: str, value: Any) -> None:
        sender.send((name, value))

    sender.send(("", outcome_of(lambda: part.run(setup, report))))


def outcome_of(measure: Callable[[], object]) -> str:
    """Call a function, and return ``done``, or in one line why it was skipped or failed."""
    try:
        measure()
    except Skip as reason:
        return f"skipped: {reason}"
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package and package not in _OWN_PACKAGES:
            return f"skipped: {package} is not installed"
        return f"failed: {error}"
    except BaseException as error:
        lines = str(error).splitlines() or [""]
        return f"failed: {type(error).__name__}: {lines[0]}"[:300]
    return "done"
