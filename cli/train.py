"""``mmrec train``."""

from typing import TYPE_CHECKING

from cli.options import DatasetOption, JsonOption, WarehouseOption
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

if TYPE_CHECKING:
    pass


def train(
    model: ModelOption = None,
    dataset: DatasetOption = None,
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
    """Train a recommender on interactions and features; Ctrl-C keeps all and ends with 130."""
    run_training(
        Request(
            warehouse=Warehouse(root),
            root=root,
            stage="",
            model=model,
            datasets=[] if dataset is None else [dataset],
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
