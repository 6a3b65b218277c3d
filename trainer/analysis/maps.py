"""Maps of runs: t-SNE of the item vectors and of the states of the users' histories.

As Figures 4 and 5 of MMSR. t-SNE (van der Maaten and Hinton, 2008) keeps neighbours together; the
axes of a map and the distances between far points mean nothing.

Legend: N items of the catalogue, S items of the sample, E users of the sample, P states, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from features.dataset import Dataset, EvalSplit, Ints
from features.errors import UserError
from features.memory import memory_errors
from features.warehouse import Warehouse
from trainer.analysis.figures import STYLE
from trainer.checkpoint import load_weights
from trainer.data.control import marked
from trainer.evaluation.encode import encode_catalogue, encode_histories
from trainer.runs.run import Run, open_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LIBRARY, INSTALL = "sklearn", "pip install 'mmrec[map]'"
MAX_RUNS = 2
"""Runs of one figure."""
COLOURED_USERS = 20
"""Most users that have a colour each."""
POPULAR_SHARE = 0.1
"""Share of the items, those with most training interactions, that a map shows as popular."""
_FEWEST = 5  # points of a map
_PERPLEXITY = 30  # the default of scikit-learn
_GREY = "#BBBBBB"
_GROUPS = (("other", _GREY), ("popular", "#D55E00"), ("cold", "#0072B2"))
_HISTORIES = (("without cold items", _GREY), ("with a cold item", "#0072B2"))
_SIDE = 4.6  # inches of a panel
_POINT = 11  # area of a point

Points = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class MapOptions:
    """The sample that a map shows."""

    items: int = 1500
    """Number of items; all of them if the catalogue has fewer."""
    users: int = 10
    """Number of users. Up to :data:`COLOURED_USERS` users have a colour each, and one point for
    each interaction of their histories; more users have one point each."""
    seed: int = 0
    """Seed of the samples and of t-SNE."""

    def __post_init__(self) -> None:
        for name, value, least in (("items", self.items, _FEWEST), ("users", self.users, 1)):
            if value < least:
                raise UserError(f"--{name} {value} is too small for a map; give {least} or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunMap:
    """The maps of one run."""

    label: str
    run: str
    dataset: str
    items: Ints
    """(S,) the items."""
    item_points: Points
    """(S, 2) their places."""
    item_groups: Ints
    """(S,) 0: other; 1: popular, the tenth of the items with most training interactions; 2: cold,
    fewer than 10 training interactions."""
    users: Ints
    """(P,) user of each state."""
    state_points: Points
    """(P, 2) places of the states, of each user from the oldest interaction to the newest."""
    has_cold: npt.NDArray[np.bool_]
    """(P,) whether a cold item is in the history of the state."""

    def counts(self) -> dict[str, object]:
        """Return the numbers of points, for ``--json``."""
        groups = {name: int((self.item_groups == i).sum()) for i, (name, _) in enumerate(_GROUPS)}
        n_users = len(np.unique(self.users))
        return {"run": self.run, "items": groups, "users": n_users, "states": len(self.users)}


def map_runs(
    warehouse: Warehouse,
    names: Sequence[str],
    options: MapOptions,
    *,
    labels: Sequence[str] | None = None,
    device: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> list[RunMap]:
    """Map the items and the histories of one run, or of two runs.

    Two runs of one dataset show the same items and users. Items without a feature that one of the
    runs reads are left out.

    Args:
        warehouse: Warehouse with the runs.
        names: Names of the runs.
        options: The sample.
        labels: Names of the runs in the figure; by default their own.
        device: Device of the models; by default the one that they were trained on.
        on_stage: Called with the name of each stage.

    Raises:
        UserError: scikit-learn is not installed, there are more than two runs, a run is a
            pre-training or has no item vectors, or too few points are left.
    """
    if find_spec(LIBRARY) is None:
        raise UserError(
            f"a map needs the package scikit-learn, which is not installed; run: {INSTALL}"
        )
    if len(names) > MAX_RUNS:
        raise UserError(f"{len(names)} runs do not fit into one map; give at most {MAX_RUNS}")
    labels = list(names) if labels is None else labels
    if len(labels) != len(names):
        raise UserError(f"{len(labels)} labels for {len(names)} runs; give one for each run")
    runs = [_open(warehouse, name, device) for name in names]
    labels = [marked(label, run.config.control) for label, run in zip(labels, runs, strict=True)]
    maps = []
    for run, label in zip(runs, labels, strict=True):
        alike = [other for other in runs if other.spec.dataset == run.spec.dataset]
        maps.append(_map_run(run, label, _common_items(alike), options, on_stage))
    return maps


def draw_maps(maps: Sequence[RunMap]) -> "Figure":
    """Draw the items above the histories, one column for each run."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        size = (_SIDE * len(maps), _SIDE * 2)
        figure = Figure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # type: ignore[union-attr, call-arg]
        panels = figure.subplots(2, len(maps), squeeze=False)
        for column, run_map in enumerate(maps):
            title = f"{run_map.label} on {run_map.dataset}"
            _draw_items(panels[0, column], run_map, title)
            _draw_histories(panels[1, column], run_map)
    return figure


def _open(warehouse: Warehouse, name: str, device: str | None) -> Run:
    """Open a run with its best weights, if its model learns item vectors."""
    run = open_run(warehouse, warehouse.choose_run(name)[0], device=device)
    run.check_recommends()
    has_parameters = any(True for _ in run.model.parameters())
    if not run.model.has_vectors or not has_parameters:
        raise UserError(
            f"run {name!r} cannot be mapped: {run.spec.model} learns no item vectors; give a run of"
            " a model that does, such as sasrec"
        )
    load_weights(run.weights, run.model, run.spec.identity())
    return run


def _common_items(runs: Sequence[Run]) -> Ints:
    """Return the items that have a feature in every run, ascending."""
    is_present_N = np.ones(runs[0].data.features.n_items, dtype=bool)
    for run in runs:
        present = list(run.data.features.present.values())
        if present:
            is_present_N &= torch.stack(present).any(0).cpu().numpy()
    return np.flatnonzero(is_present_N)


def _map_run(
    run: Run, label: str, items: Ints, options: MapOptions, on_stage: Callable[[str], None]
) -> RunMap:
    dataset = run.data.dataset
    rng = np.random.default_rng(options.seed)
    items_S = np.sort(rng.permutation(items)[: options.items])
    prefixes = _prefixes(dataset.eval_split("test"), options, run.model.history)
    on_stage(f"encoding items and histories of {label}")
    place = f"the map of run {run.name}"
    with memory_errors(place, "free memory, or give fewer --items and --users"):
        items_ND = encode_catalogue(run.model, run.data)
        states_PD = encode_histories(run.model, run.data, items_ND, prefixes, run.config.eval_batch)
        on_stage(f"t-SNE of the items of {label}")
        item_points = tsne_points(items_ND[torch.from_numpy(items_S)], "items", options.seed)
        on_stage(f"t-SNE of the histories of {label}")
        state_points = tsne_points(states_PD, "histories", options.seed)
    return RunMap(
        label=label,
        run=run.name,
        dataset=run.spec.dataset,
        items=items_S,
        item_points=item_points,
        item_groups=_item_groups(dataset)[items_S],
        users=prefixes.users,
        state_points=state_points,
        has_cold=_has_cold(dataset, prefixes),
    )


def _prefixes(test: EvalSplit, options: MapOptions, length: int) -> EvalSplit:
    """Return the histories of a sample of users, one row for each.

    Few users have a row for each of their last ``length`` interactions before the test target,
    which is the history up to this interaction; many users have their whole history.
    """
    users = test.sample(options.users, options.seed)
    if len(users.users) > COLOURED_USERS:
        return users
    counts = np.minimum(users.targets - users.starts, length)
    back = np.concatenate([np.arange(count - 1, -1, -1) for count in counts])
    row = np.repeat(np.arange(len(counts)), counts)
    return EvalSplit(
        users=users.users[row], starts=users.starts[row], targets=users.targets[row] - back
    )


def _item_groups(dataset: Dataset) -> Ints:
    """Return the group of each item, (N,), see :class:`RunMap`."""
    counts_N = dataset.train_counts
    limit = np.quantile(counts_N, 1 - POPULAR_SHARE)
    return np.where(dataset.cold, 2, np.where(counts_N >= limit, 1, 0))


def _has_cold(dataset: Dataset, prefixes: EvalSplit) -> npt.NDArray[np.bool_]:
    """Return whether each history has a cold item: (P,)."""
    cold = np.concatenate([[0], np.cumsum(dataset.cold[dataset.items])])
    return np.asarray(cold[prefixes.targets] > cold[prefixes.starts])


def tsne_points(vectors: torch.Tensor, kind: str, seed: int) -> Points:
    """Return places on a plane for vectors (P, D): (P, 2).

    Raises:
        UserError: There are too few vectors.
    """
    from sklearn.manifold import TSNE

    x_PD = vectors.cpu().numpy()
    if len(x_PD) < _FEWEST:
        raise UserError(
            f"{len(x_PD)} {kind} are too few for a map, which needs {_FEWEST}; give more --items or"
            " --users, or map a larger dataset"
        )
    has_directions = x_PD.shape[1] > 1 and bool(np.ptp(x_PD, axis=0).any())
    tsne = TSNE(
        perplexity=min(_PERPLEXITY, (len(x_PD) - 1) / 3),
        init="pca" if has_directions else "random",
        random_state=seed,
    )
    return np.asarray(tsne.fit_transform(x_PD), dtype=np.float64)


def _draw_items(axes: "Axes", run_map: RunMap, title: str) -> None:
    axes.set_title(title, loc="left")
    _prepare(axes, f"{len(run_map.items):,} items")
    for number, (name, colour) in enumerate(_GROUPS):
        chosen = run_map.item_points[run_map.item_groups == number]
        _scatter(axes, chosen, colour, f"{name} ({len(chosen):,})", f"items-{name}")
    _legend(axes)


def _draw_histories(axes: "Axes", run_map: RunMap) -> None:
    import matplotlib

    users = np.unique(run_map.users)
    if len(users) == len(run_map.users) and len(users) > COLOURED_USERS:
        _prepare(axes, f"states after the histories of {len(users):,} users")
        for is_cold, (name, colour) in zip((False, True), _HISTORIES, strict=True):
            chosen = run_map.state_points[run_map.has_cold == is_cold]
            gid = f"histories-{name.replace(' ', '-')}"
            _scatter(axes, chosen, colour, f"{name} ({len(chosen):,})", gid)
        _legend(axes)
        return
    _prepare(axes, f"{len(users)} users, one colour each: states after each interaction")
    colours = matplotlib.colormaps["tab10" if len(users) <= 10 else "tab20"]
    for number, user in enumerate(users):
        points = run_map.state_points[run_map.users == user]
        axes.plot(points[:, 0], points[:, 1], color=colours(number), linewidth=0.6, alpha=0.25)
        _scatter(axes, points, colours(number), "", f"user-{number}")


def _prepare(axes: "Axes", caption: str) -> None:
    """Remove the scales, which mean nothing, and write a caption below."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(caption)
    for side in axes.spines.values():
        side.set_visible(True)
        side.set_color("#DDDDDD")


def _scatter(axes: "Axes", points: Points, colour: Any, label: str, gid: str) -> None:
    x_P, y_P = points.T
    axes.scatter(
        x_P, y_P, s=_POINT, color=[colour], alpha=0.8, linewidths=0, label=label or None, gid=gid
    )


def _legend(axes: "Axes") -> None:
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=len(_GROUPS), handletextpad=0.1,
        columnspacing=1.2, markerscale=1.4, fontsize=9,
    )  # fmt: skip
