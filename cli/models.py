"""``mmrec models``."""

import textwrap
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from cli import console
from cli.options import JsonOption

if TYPE_CHECKING:
    pass


def models(json: JsonOption = False) -> None:
    """List the recommenders and their settings for --set."""
    from trainer.config import TrainConfig
    from trainer.models.registry import MODELS
    from trainer.tasks.pretrain import pretrain_defaults

    documents: list[dict[str, Any]] = []
    for name, model in MODELS.items():
        settings, recommender = model.load()
        own = {field.name: field.default for field in fields(settings)}
        documents.append(
            {
                "model": name,
                "summary": model.summary,
                "settings": own,
                "train": dict(model.train),
                "pretrain": pretrain_defaults(model),
                "transfers": ["full", *recommender.transfer_groups],
                "variants": dict(model.variants),
            }
        )
    loop = {field.name: field.default for field in fields(TrainConfig)}
    if json:
        console.emit_json({"models": documents, "train": loop})
        return
    for entry in documents:
        console.out.print(f"{entry['model']}: {entry['summary']}")
        console.out.print(_settings({**entry["settings"], **entry["train"]}))
        if entry["pretrain"]:
            console.out.print("  mmrec pretrain:")
            console.out.print(_settings(entry["pretrain"], "    "))
        console.out.print(f"  --transfer: {', '.join(entry['transfers'])}")
        for what, words in entry["variants"].items():
            console.out.print(f"  {what}: {words}")
    console.out.print("the loop, for all of them where they do not say otherwise:")
    console.out.print(_settings(loop))


def _settings(values: dict[str, Any], indent: str = "  ") -> str:
    from trainer.runs.grid_file import text

    words = [f"{key}={text(value)}" for key, value in values.items()]
    return textwrap.fill(" ".join(words), 79, initial_indent=indent, subsequent_indent=indent)
