"""``mmrec pretrain``: weights for others to start from."""

from typing import Annotated

import typer

from cli.training_options import training_command

DatasetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset", help="Repeatable: several are learned as one. Else the only, or last one."
    ),
]

pretrain = training_command(
    "Pre-train a recommender: mmsrec aligns modalities, pmmrec learns across datasets.",
    DatasetsOption,
    is_pretraining=True,
)
