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
    NewRun,
    PresetOption,
    ResumeOption,
    RunOption,
    SetOption,
    TransferOption,
    TuneOption,
    check_no_run,
    resume_training,
    start_training,
)

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
    preset: PresetOption = None,
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
    datasets = dataset or []
    new = NewRun(
        features=features,
        set=set,
        config=config,
        preset=preset,
        name=name,
        init=init,
        transfer=transfer,
        tune_blocks=tune_blocks,
    )
    if resume:
        resume_training(root, run, model, datasets, new, is_pretraining=True, json=json)
    else:
        check_no_run(run)
        start_training(root, model, datasets, new, is_pretraining=True, json=json)
