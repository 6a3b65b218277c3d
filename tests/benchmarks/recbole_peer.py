"""RecBole's side of ``bench_recbole.py``: run by a Python that has RecBole, never by ours.

    PYTHON recbole_peer.py FOLDER NAME THREADS EPOCHS

FOLDER/NAME/NAME.inter holds the interactions; one line of JSON comes out. Nothing of RecBole's
defaults is changed but what makes it run at all: it does not write checkpoints.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any


def clock(work: Callable[[], Any]) -> tuple[float, float]:
    """CPU and wall seconds of a call."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def main(folder: str, name: str, threads: int, epochs: int) -> None:
    """Train ``epochs`` epochs of SASRec and evaluate it on the test split."""
    import torch

    torch.set_num_threads(threads)
    config = import_module("recbole.config").Config(
        model="SASRec",
        dataset=name,
        config_dict={
            "data_path": folder,
            "USER_ID_FIELD": "user_id",
            "ITEM_ID_FIELD": "item_id",
            "TIME_FIELD": "timestamp",
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "train_neg_sample_args": None,
            "eval_args": {
                "split": {"LS": "valid_and_test"},
                "group_by": "user",
                "order": "TO",
                "mode": "full",
            },
            "metrics": ["Hit", "NDCG"],
            "topk": [10],
            "valid_metric": "NDCG@10",
            "show_progress": False,
            "checkpoint_dir": folder,
        },
    )
    data = import_module("recbole.data")
    utils = import_module("recbole.utils")
    utils.init_seed(config["seed"], config["reproducibility"])
    dataset = data.create_dataset(config)
    train, _, test = data.data_preparation(config, dataset)
    model = utils.get_model("SASRec")(config, train.dataset).to(config["device"])
    trainer = utils.get_trainer(config["MODEL_TYPE"], "SASRec")(config, model)
    rows = len(train.dataset)
    spent = [clock(partial(trainer._train_epoch, train, epoch)) for epoch in range(epochs)]
    found: dict[str, float] = {}
    evaluated = clock(lambda: found.update(trainer.runs.evaluate(test, load_best_model=False)))
    print(
        json.dumps(
            {
                "targets": rows,
                "epoch": min(spent, default=None),
                "evaluate": evaluated,
                "users": len(test.dataset),
                "metrics": {key: float(value) for key, value in found.items()},
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
