"""``mmrec pretrain``: weights for others to start from."""

from typing import Annotated

import typer

from cli.options import JsonOption, WarehouseOption
from cli.training_options import (
    ConfigOption,
    FeaturesOption,
    InitOption,
    ModelOption,
    NameOption,
    Request,
    ResumeOption,
    RunOption,
    SetOption,
    TransferOption,
    TuneOption,
    run_training,
    with_blocks,
)
from features.warehouse import Warehouse

DatasetsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset", help="Repeatable: several are learned as one. Else the only, or last one."
    ),
]


def pretrain(
    model: ModelOption = None,
    dataset: DatasetsOption = None,
    features: FeaturesOption = None,
    set: SetOption = None,
    config: ConfigOption = None,
    name: NameOption = None,
    init: InitOption = None,
    transfer: TransferOption = None,
    tune_blocks: TuneOption = None,
    resume: ResumeOption = False,
    run: RunOption = None,
    json: JsonOption = False,
    root: WarehouseOption = None,
) -> None:
    """Pre-train a recommender: mmsrec aligns modalities, pmmrec learns across datasets."""
    run_training(
        Request(
            warehouse=Warehouse(root),
            root=root,
            stage="pretrain",
            model=model,
            datasets=dataset or [],
            features=features,
            settings=with_blocks(set, tune_blocks),
            config=config,
            name=name,
            init=init,
            transfer=transfer,
            resume=resume,
            run=run,
            json=json,
        )
    )
