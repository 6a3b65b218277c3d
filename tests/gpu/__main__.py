"""Check and measure mmrec on a GPU, in one command of at most nine minutes.

    python -m tests.gpu --out results.json [--seconds 520] [--parts NAME ...]
    python -m tests.gpu --device cpu --small --out results.json

The command needs torch and NumPy, and no internet. A part that needs more is skipped, and the
result names what is missing. The second form runs the same code with tiny sizes on a CPU.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.gpu import stand_ins
from tests.gpu.child import run_part
from tests.gpu.parts import PARTS, Part, Setup

_FIRST_IMPORT = 60.0  # seconds: on a fresh machine torch is read from a cold disk
_PRELOADED = ("torch", "torch._dynamo", "tests.gpu.world")
_KILLED_AFTER = 1.25  # times the seconds of a part, see `run_part`


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, write the figures, and return 1 if a part has failed."""
    options = _parse(arguments)
    results: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": options.device,
        "small": options.small,
        "seconds": options.seconds,
    }

    def write() -> None:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    def measure(name: str, part: Part, seconds: float) -> None:
        figures: dict[str, Any] = {}
        began = time.monotonic()

        def report(figure: str, value: Any) -> None:
            figures[figure] = value
            print(f"  {figure}: {_short(value)}", flush=True)
            write()

        results[name] = figures
        print(f"{name}: {part.summary}", flush=True)
        setup = Setup(device=options.device, small=options.small, seconds=seconds)
        figures["outcome"] = run_part(part, setup, report)
        figures["seconds"] = round(time.monotonic() - began, 2)
        write()

    if (
        options.device == "cpu" and len(options.parts) > 1
    ):  # the processes of the parts are forks of this one
        with suppress(Exception):  # a part that needs the module reports the error
            for module in _PRELOADED:
                import_module(module)
    began = time.monotonic()
    measure("machine", Part("machine", 0, "the card and the libraries"), _FIRST_IMPORT)
    if results["machine"]["outcome"] != "done":
        print(f"{results['machine']['outcome']}; without a GPU give --device cpu --small")
        return 1
    waiting = {name: PARTS[name] for name in options.parts}
    while waiting:
        name, part = next(iter(waiting.items()))
        seconds_left = options.seconds - (time.monotonic() - began)
        share = part.share / sum(other.share for other in waiting.values())
        measure(name, part, max(0.0, seconds_left) * share / _KILLED_AFTER)
        del waiting[name]
    _print_table(results)
    outcomes = [results[name]["outcome"] for name in ("machine", *options.parts)]
    return int(any(outcome.startswith("failed") for outcome in outcomes))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results.json"), help="JSON file")
    parser.add_argument("--seconds", type=float, default=520.0, help="time of all parts")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    if options.seconds <= 0:
        parser.error(f"--seconds {options.seconds:g} is no time; give more than 0, such as 520")
    if not options.out.parent.is_dir():
        parser.error(f"--out {options.out}: {options.out.parent} is no folder; create it")
    return options


def _short(value: Any) -> str:
    """Return a figure in one line."""
    if value is None:
        return "not measured"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(part)}" for name, part in value.items()) or "none"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _print_table(results: Mapping[str, Any]) -> None:
    """Print the outcome and the seconds of each part."""
    card = results["machine"].get("card", "no card")
    print(f"\n{card}, torch {results['machine'].get('torch', 'unknown')}, {results['date']}")
    print("| part | outcome | seconds |\n|---|---|---|")
    for name, figures in results.items():
        if isinstance(figures, dict):
            print(f"| {name} | {figures['outcome']} | {figures['seconds']:.1f} |")
    if stand_ins.missing():
        print(f"replaced by stand-ins: {', '.join(stand_ins.missing())}")


if __name__ == "__main__":
    # A thread of a product that waits by spinning takes the core of another one.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
