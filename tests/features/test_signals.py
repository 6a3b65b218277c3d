import contextlib
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from features.signals import SIGNALS, Interrupted, exit_code, handle_signals, raise_received


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """A background job ignores SIGINT and a job of `nohup` SIGHUP; child processes inherit it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        is_interrupt = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if is_interrupt else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_raises_and_gives_its_exit_code(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=number.name), handle_signals():
        signal.raise_signal(number)
    assert exit_code() == 128 + number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_an_ignored_signal_stays_ignored(number: signal.Signals) -> None:
    script = (
        "import signal, sys\nfrom features.signals import handle_signals\n"
        "number = int(sys.argv[1])\nsignal.signal(number, signal.SIG_IGN)\n"
        "with handle_signals():\n    signal.raise_signal(number)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(int(number))], check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_ends_with_the_code_of_its_signal(number: signal.Signals) -> None:
    script = (
        "import signal, sys\nfrom cli import app, datasets\nimport pipeline.datasets.listing\n"
        "def listing(warehouse):\n    signal.raise_signal(int(NUMBER))\n    return []\n"
        "pipeline.datasets.listing.list_datasets = listing\n"
        "sys.argv = ['mmrec', 'datasets']\napp.main()\n"
    ).replace("NUMBER", str(int(number)))
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == 128 + number
    assert done.stderr == b"interrupted\n"


@pytest.mark.parametrize("place", ["a destructor", "a callback of a weak reference"])
def test_a_signal_that_python_ignores_is_not_printed_and_raised_again(
    capsys: pytest.CaptureFixture[str], place: str
) -> None:
    class Raising:
        def __del__(self) -> None:
            if place == "a destructor":
                signal.raise_signal(signal.SIGTERM)

    class Failing:
        def __del__(self) -> None:
            raise ValueError(place)

    hooks: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "unraisablehook", lambda ignored: hooks.append(ignored.exc_type))
        with handle_signals():
            victim = Raising()
            reference = weakref.ref(victim, lambda _: signal.raise_signal(signal.SIGTERM))
            if place == "a destructor":
                del reference
            del victim
            with pytest.raises(Interrupted, match="SIGTERM"):
                raise_received()
            assert hooks == []
            Failing()
        assert hooks == [ValueError]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_swallowed_signal_is_raised_again(number: signal.Signals) -> None:
    with handle_signals():
        raise_received()
        with contextlib.suppress(KeyboardInterrupt):  # as a library does
            signal.raise_signal(number)
        with handle_signals(lambda number, frame: None):  # the handler of a part of the command
            pass
        for _ in range(2):
            with pytest.raises(Interrupted, match=number.name):
                raise_received()
        with handle_signals():  # the next command
            raise_received()
    raise_received()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_a_part_of_a_command_handles_is_raised_after_the_part(
    number: signal.Signals,
) -> None:
    with handle_signals():
        with handle_signals(lambda number, frame: None):
            signal.raise_signal(number)
        with pytest.raises(Interrupted, match=number.name):
            raise_received()
    with handle_signals(lambda number, frame: None):  # without a command around it
        signal.raise_signal(number)
    raise_received()
