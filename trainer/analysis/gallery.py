"""Collect what the gallery of a page shows: lists of users, neighbours of items, a map of items.

The lists are those of the evaluation: the history before the test target is given, and the target
is a hit if it is among the first ten.

Legend: N items of the catalogue, S items of the sample, E users, R runs, K items of a list, D
width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch

from features.dataset import Dataset, EvalSplit, Ints, load_user_ids
from features.errors import UserError
from features.memory import memory_errors
from features.warehouse import Warehouse
from retrieval.metrics import UNRANKED
from trainer.analysis.item_neighbours import (
    ItemNeighbours,
    find_neighbours,
    has_vectors,
    read_spaces,
)
from trainer.analysis.maps import INSTALL, LIBRARY, Points, tsne_points
from trainer.checkpoint import load_weights
from trainer.data.control import marked
from trainer.evaluation.encode import targets_of
from trainer.evaluation.search import CatalogueSearch
from trainer.runs.run import Run, open_run

MAX_RUNS = 4
"""Runs of one gallery."""
_INDEX = "torch"  # every index returns the same lists
_LEAST_MAP = 5  # items of a map


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryOptions:
    """The sizes of a gallery."""

    users: int = 2
    """Users of each kind."""
    ranked_users: int = 2000
    """Test users, a random sample, among which the users of each kind are chosen."""
    k: int = 10
    """Length of a list."""
    history: int = 12
    """Largest number of items of a history, the last ones."""
    items: int = 6
    """Items whose neighbours are shown: a half that training has not seen or seen least."""
    neighbours: int = 6
    """Neighbours of an item."""
    map_items: int = 1500
    """Items of the map, a random sample; all of them if the catalogue has fewer."""
    seed: int = 0
    """Seed of the samples and of t-SNE."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedList:
    """The list of one run for one user."""

    label: str
    """Label of the run."""
    rank: int
    """Rank of the target among the items that the user has not seen; 0 if the user has seen it."""
    items: list[int]
    """The best items, best first, without those of the history."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GalleryUser:
    """One user with the lists of all runs."""

    kind: str
    """A name in :data:`KINDS`."""
    user_id: str
    history: list[int]
    """The last items of the history before the target, oldest first."""
    earlier: int
    """Number of earlier items of the history."""
    target: int
    """The held-out item."""
    lists: list[RankedList]
    """One for each run, in order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemMap:
    """Items on a plane, by the vectors of one run."""

    label: str
    """Label of the run."""
    items: Ints
    """(S,) the items."""
    points: Points
    """(S, 2) their places."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gallery:
    """Everything that the page shows, as numbers of items."""

    dataset: str
    labels: list[str]
    """Label of each run."""
    chosen_by: str
    """Label of the run whose ranks choose the users."""
    ranked_users: int
    """Number of users among whom they are chosen."""
    users: list[GalleryUser]
    neighbours: list[ItemNeighbours]
    map: ItemMap | None
    """``None`` if no run has item vectors, or too few items, or scikit-learn is absent."""
    map_note: str
    """Reason if there is no map, else empty."""
    train_counts: Ints
    """(N,) training interactions of each item."""

    def listed_items(self) -> list[int]:
        """Return the items of all lists, ascending, without those that only the map shows."""
        items: set[int] = set()
        for user in self.users:
            items.update(user.history, [user.target], *(entry.items for entry in user.lists))
        for entry in self.neighbours:
            items.update([entry.item], *entry.spaces.values())
        return sorted(items)


KINDS = {
    "typical": "the rank of the target is nearest to the median",
    "cold target": "a random choice of those whose target has fewer than 10 training interactions",
    "best rank": "the lowest rank of the target",
    "worst rank": "the highest rank of the target",
}
"""Kinds of users, and how they are chosen."""


def collect_gallery(
    warehouse: Warehouse,
    names: Sequence[str],
    options: GalleryOptions,
    *,
    labels: Sequence[str] | None = None,
    device: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Gallery:
    """Collect the gallery of some runs of one dataset.

    The first run that reads features chooses the users and places the items of the map; without
    such a run, the first one does.

    Args:
        warehouse: Warehouse with the runs.
        names: Names of the runs.
        options: Sizes.
        labels: Labels of the runs on the page; by default their names.
        device: Device of the models; by default the one that they were trained on.
        on_stage: Called with the name of each stage.

    Raises:
        UserError: There are too many runs, or of several datasets, or one recommends nothing; or
            there is not one distinct label for each run.
    """
    labels = list(names) if labels is None else list(labels)
    runs = _open_runs(warehouse, names, labels, device)
    labels = [marked(label, run.config.control) for label, run in zip(labels, runs, strict=True)]
    main = next((i for i, run in enumerate(runs) if run.spec.features), 0)
    dataset = runs[0].data.dataset
    sample = dataset.eval_split("test").sample(options.ranked_users, options.seed)
    searches = []
    for run, label in zip(runs, labels, strict=True):
        on_stage(f"ranking with {label}")
        searches.append(_search(run))
    ranks_RE = np.stack([s.rank(sample, targets_of(dataset, sample)).filtered for s in searches])
    chosen = _choose_users(dataset, sample, ranks_RE[main], options)
    on_stage("neighbours of items")
    spaces = read_spaces(warehouse, runs, searches, labels)
    on_stage("t-SNE of the items")
    item_map, note = _map(runs, searches, labels, main, options)
    return Gallery(
        dataset=runs[0].spec.dataset,
        labels=labels,
        chosen_by=labels[main],
        ranked_users=len(sample.users),
        users=_users(warehouse, searches, labels, sample, ranks_RE, chosen, options),
        neighbours=find_neighbours(
            dataset, spaces, items=options.items, count=options.neighbours, seed=options.seed
        ),
        map=item_map,
        map_note=note,
        train_counts=dataset.train_counts,
    )


def _open_runs(
    warehouse: Warehouse, names: Sequence[str], labels: Sequence[str], device: str | None
) -> list[Run]:
    """Open the runs, and check that they are of one dataset and have distinct labels."""
    if len(names) > MAX_RUNS:
        raise UserError(f"{len(names)} runs do not fit into a gallery; give at most {MAX_RUNS}")
    if len(labels) != len(names):
        raise UserError(f"{len(labels)} labels for {len(names)} runs; give one for each run")
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"the run or label {label!r} is given twice; leave one out")
    runs = [open_run(warehouse, warehouse.choose_run(name)[0], device=device) for name in names]
    datasets = list(dict.fromkeys(run.spec.dataset for run in runs))
    if len(datasets) > 1:
        raise UserError(
            f"the runs are of {len(datasets)} datasets: {', '.join(datasets)}; give runs of one"
        )
    return runs


def _search(run: Run) -> CatalogueSearch:
    run.check_recommends()
    with memory_errors(f"the gallery of run {run.name}", "free memory"):
        load_weights(run.weights, run.model, run.spec.identity())
        batch_size = run.config.eval_batch
        return CatalogueSearch(run.model, run.data, index=_INDEX, batch_size=batch_size)


# -- users ----------------------------------------------------------------------------------


def _choose_users(
    dataset: Dataset, sample: EvalSplit, ranks_E: Ints, options: GalleryOptions
) -> list[tuple[str, int]]:
    """Return kinds and rows of the sample; a user is of one kind only.

    Users with a target that they had already have no rank, and are not chosen.
    """
    rng = np.random.default_rng(options.seed)
    order_E = rng.permutation(len(ranks_E))  # decides between equal ranks
    order_E = order_E[ranks_E[order_E] != UNRANKED]
    if not len(order_E):
        return []
    shuffled_E = ranks_E[order_E]
    is_cold_E = dataset.cold[targets_of(dataset, sample)][order_E]
    median = np.median(shuffled_E)
    orders = {
        "cold target": np.flatnonzero(is_cold_E),
        "best rank": np.argsort(shuffled_E, kind="stable"),
        "worst rank": np.argsort(-shuffled_E, kind="stable"),
        "typical": np.argsort(np.abs(shuffled_E - median), kind="stable"),
    }
    taken: set[int] = set()
    chosen = []
    for kind, order in orders.items():
        rows = [row for row in order_E[order].tolist() if row not in taken][: options.users]
        taken.update(rows)
        chosen += [(kind, row) for row in rows]
    return sorted(chosen, key=lambda pair: list(KINDS).index(pair[0]))


def _users(
    warehouse: Warehouse,
    searches: Sequence[CatalogueSearch],
    labels: Sequence[str],
    sample: EvalSplit,
    ranks_RE: Ints,
    chosen: Sequence[tuple[str, int]],
    options: GalleryOptions,
) -> list[GalleryUser]:
    """Return the chosen users with their histories and the lists of all runs."""
    if not chosen:
        return []
    dataset = searches[0].data.dataset
    rows = np.array([row for _, row in chosen])
    users = sample.take(rows)
    k = min(options.k, dataset.info.items)
    lists = [search.best_for_users(users, k, keep_seen=False)[1] for search in searches]
    ids = load_user_ids(warehouse, dataset.info.name)
    entries = []
    for number, (kind, row) in enumerate(chosen):
        start, target = int(users.starts[number]), int(users.targets[number])
        shown = max(start, target - options.history)
        entries.append(
            GalleryUser(
                kind=kind,
                user_id=ids[int(users.users[number])].as_py(),
                history=dataset.items[shown:target].tolist(),
                earlier=shown - start,
                target=int(dataset.items[target]),
                lists=[
                    RankedList(
                        label=label,
                        rank=_shown_rank(int(ranks_RE[position, row])),
                        items=[item for item in lists[position][number].tolist() if item >= 0],
                    )
                    for position, label in enumerate(labels)
                ],
            )
        )
    return entries


def _shown_rank(rank: int) -> int:
    """Return a rank, or 0 for a target that the user has seen."""
    return 0 if rank == UNRANKED else rank


# -- map ------------------------------------------------------------------------------------


def _map(
    runs: Sequence[Run],
    searches: Sequence[CatalogueSearch],
    labels: Sequence[str],
    main: int,
    options: GalleryOptions,
) -> tuple[ItemMap | None, str]:
    """Return the map of a sample of the items, or the reason why there is none."""
    order = [main, *(number for number in range(len(runs)) if number != main)]
    drawn = [number for number in order if has_vectors(runs[number], searches[number])]
    if not drawn:
        return None, "No run has item vectors, so there is no map."
    if find_spec(LIBRARY) is None:
        return None, f"The map needs the package scikit-learn; run: {INSTALL}"
    run, search = runs[drawn[0]], searches[drawn[0]]
    present = list(run.data.features.present.values())
    items = np.arange(len(search.items_ND))
    if present:
        items = np.flatnonzero(torch.stack(present).any(0).cpu().numpy())
    items_S = np.sort(np.random.default_rng(options.seed).permutation(items)[: options.map_items])
    if len(items_S) < _LEAST_MAP:
        return None, f"{len(items_S)} items are too few for a map."
    points = tsne_points(search.items_ND[torch.from_numpy(items_S)], "items", options.seed)
    return ItemMap(label=labels[drawn[0]], items=items_S, points=points), ""
