"""Describe the protocol of an evaluation, for printing below every table."""

from features.splits import COLD_BELOW
from features.warehouse import DatasetInfo


def protocol_lines(info: DatasetInfo) -> list[str]:
    """Return the description of the protocol of a dataset, one statement per line."""
    core = f"{info.k_core}-core" if info.k_core > 1 else "no k-core"
    order = "by time, ties in file order" if info.timestamps else "in file order (no times)"
    return [
        f"{core}; interactions {order}; leave-one-out: last item test, the one before validation",
        "full catalogue ranking, ties against the model; test input includes the validation item",
        "filtered: items the user has seen are out of the ranking; kept: they are in it",
        "repeated: targets that the user already had, misses when filtered; new: all others",
        "HR@k equals Recall@k with one target; 95% intervals: bootstrap over users",
        f"cold: targets with fewer than {COLD_BELOW} training interactions",
        "popularity: training interactions only; the checkpoint is the best one by validation",
    ]
