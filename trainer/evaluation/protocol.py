"""Describe the protocol of an evaluation, for printing below every table."""

from features.splits import COLD_BELOW, format_time
from features.warehouse import DatasetInfo

PROTOCOL = "2"
"""Version of the protocol, stored with the predictions of an evaluation. Evaluations without one
rank repeated targets among the items that the user has not seen."""

OCCURRENCES = "cold-occurrences"
HIDDEN = "hidden"
TARGETS = ("all", "new", "repeated", "cold", HIDDEN, OCCURRENCES)
"""Subsets of targets. ``repeated``: the user already had the target; ``new``: all others; ``cold``:
held-out targets with fewer than 10 training interactions; ``hidden``: test targets that are hidden
items, see :attr:`features.warehouse.DatasetInfo.hidden_items`; ``cold-occurrences``: the cold test
targets and the occurrences of cold items at training positions, for runs that were trained with
``hold_out_cold``."""
NEW_ITEM, KNOWN_ITEM = "new-item", "known-item"
"""Subsets of the targets of an evaluation on a later preparation: items that the training did not
have, and all others."""
TRAIN = "train"
"""Value of ``split`` in the predictions for occurrences of cold items at training positions."""

REFERENCES = ("popularity", "transitions")
"""Models that every table shows next to the evaluated model. They need no training."""


_OCCURRENCE_LINES = (
    f"{OCCURRENCES}: sequences cut before each occurrence of a cold item, at training positions and"
    " at the test position; no interaction with a cold item was in training",
    f"{OCCURRENCES}: the intervals resample users with all their sequences",
)


def protocol_lines(info: DatasetInfo, *, hold_out_cold: bool = False) -> list[str]:
    """Return the description of the protocol of a dataset, one statement per line.

    Args:
        info: The dataset.
        hold_out_cold: Whether the training left interactions with cold items out.
    """
    core = f"{info.k_core}-core" if info.k_core > 1 else "no k-core"
    if info.min_user > info.k_core:
        core += f", users with at least {info.min_user} interactions"
    if info.sampled_users is not None:
        core += f", a sample of {info.sampled_users:,} users (seed {info.seed})"
    order = "by time" if info.timestamps else "in file order (no times)"
    return [
        f"{core}; interactions {order}; {_split(info)}",
        *ties_lines(info.tied, info.ties),
        "full catalogue ranking, ties against the model; the input is all earlier interactions",
        "filtered: items the user has seen are out of the ranking; kept: they are in it",
        "repeated: targets that the user already had, misses when filtered; new: all others",
        "HR@k equals Recall@k with one target; 95% intervals: bootstrap over users",
        f"cold: targets with fewer than {COLD_BELOW} training interactions",
        *hidden_lines(info),
        *(_OCCURRENCE_LINES if hold_out_cold else ()),
        "coverage@10: share of the catalogue in the lists of all users; cold_share@10: cold items"
        " in them; novelty@10: mean -log2 of their items' share of training interactions",
        f"{' and '.join(REFERENCES)}: counts of training interactions only",
        "the checkpoint is the best one by validation",
    ]


def hidden_lines(info: DatasetInfo) -> list[str]:
    """Return the line about the hidden items of a dataset; no line without any."""
    if not info.hidden_items:
        return []
    return [
        f"hidden: test targets among {info.hidden_items:,} of {info.items:,} items (seed"
        f" {info.seed}) that are in no history and no negatives; their other interactions are"
        " dropped"
    ]


def _split(info: DatasetInfo) -> str:
    if info.dates is None:
        return "leave-one-out: last item test, the one before validation"
    dates = (info.dates.valid_from, info.dates.test_from)
    valid, test = (format_time(date, info.time_unit) for date in dates)
    return (
        f"split by time: training before {valid}; validation: first interaction from then on; test:"
        f" first one from {test} on"
    )


def ties_lines(tied: float, ties: str) -> list[str]:
    """Return the line about interactions of equal times; no line if there are none.

    Args:
        tied: Share of interactions with the time of the user's interaction before.
        ties: Order of these interactions, a name in ``mmrec prepare --ties``.
    """
    if not tied:
        return []
    return [f"ties in time: {tied:.1%} of interactions, ordered by {ties}"]


def earlier_protocol_line(run: str) -> str:
    """Return the line about results of a run that an earlier version measured."""
    return (
        f"{run}: measured by an earlier protocol, which differs where targets are repeated;"
        f" run mmrec eval --run {run} again"
    )
