"""``mmrec train``."""

from cli.options import DatasetOption, JsonOption, WarehouseOption
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


def train(
    model: ModelOption = None,
    dataset: DatasetOption = None,
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
    """Train a recommender on interactions and features; Ctrl-C keeps all and ends with 130."""
    datasets = [] if dataset is None else [dataset]
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
        resume_training(root, run, model, datasets, new, is_pretraining=False, json=json)
    else:
        check_no_run(run)
        start_training(root, model, datasets, new, is_pretraining=False, json=json)
