"""``mmrec models``: the recommenders, and the settings of one of them."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from cli import console
from cli.options import JsonOption

if TYPE_CHECKING:
    from trainer.runs.describe import ModelDescription, Setting


def models(
    name: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Print the settings of this model.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """List the recommenders, or print the settings of one recommender."""
    from trainer.runs.describe import broken_models, describe_model, list_models

    if name is not None:
        description = describe_model(name)
        if json:
            console.emit_json(asdict(description))
        else:
            show_model(description)
        return
    summaries = list_models()
    if json:
        document = [asdict(summary) for summary in summaries]
        console.emit_json({"models": document, "broken": broken_models()})
        return
    console.table(
        ["model", "summary", "origin"],
        [[entry.model, Text(entry.summary), entry.origin] for entry in summaries],
    )
    for broken, reason in broken_models().items():
        console.notify(f"{broken} cannot be used: {reason}")
    console.notify("settings of one model: mmrec models MODEL")


def show_model(description: "ModelDescription") -> None:
    """Print the settings of a recommender, its pre-training, transfers and variants."""
    console.print_text(f"{description.model}: {description.summary} ({description.origin})")
    _show_settings("settings of the model (--set NAME=VALUE)", description.settings)
    _show_settings("settings of the training (--set NAME=VALUE)", description.training)
    if description.pretraining:
        _show_settings(
            "mmrec pretrain: its own settings and other defaults", description.pretraining
        )
    console.out.print()
    console.out.print("--transfer (with --init RUN)", style="bold")
    console.print_text(", ".join(description.transfers), indent=2)
    for preset, settings in description.presets.items():
        *stage, name = preset.split(" ")
        console.out.print()
        console.out.print(f"mmrec {stage[0] if stage else 'train'} --preset {name}", style="bold")
        values = ", ".join(f"{key}={_value(value)}" for key, value in settings.items())
        console.print_text(values, indent=2)
    if description.variants:
        console.out.print()
        console.table(
            ["variant", "options"],
            [[Text(name), Text(options)] for name, options in description.variants.items()],
        )


def _show_settings(title: str, settings: "Sequence[Setting]") -> None:
    console.out.print()
    console.table(
        ["name", "default", "meaning"],
        [[entry.name, Text(_value(entry.default)), Text(entry.meaning)] for entry in settings],
        title=title,
    )


def _value(default: object) -> str:
    """Return a default as ``--set`` takes it."""
    return str(default).lower() if isinstance(default, bool) else str(default)
