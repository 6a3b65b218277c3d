"""The gallery: its lists are those of the runs, and its page is whole, safe and loads nothing."""

import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from features.errors import UserError
from features.warehouse import Warehouse
from tests.trainer import worlds
from trainer.analysis.gallery import (
    KINDS,
    Gallery,
    GalleryOptions,
    GalleryUser,
    ItemMap,
    RankedList,
    collect_gallery,
)
from trainer.analysis.gallery_page import MAX_BYTES, build_gallery
from trainer.analysis.item_neighbours import ItemNeighbours
from trainer.checkpoint import load_weights
from trainer.evaluation.encode import encode_catalogue, encode_histories
from trainer.runs.run import Run, open_run
from trainer.runs.train import train_run

N_ITEMS = 40
SEQUENCES = [
    [user % 4, 4 + user % 8, (user + 1) % 4, 4 + user * 5 % 8, 12 + user % 28, (user + 2) % 4]
    if user % 3
    else [user % 4, 4 + user % 8, (user + 1) % 4, 4 + user * 5 % 8, 12 + user % 28]
    for user in range(60)
]
HOSTILE = ['</script><script>alert("1")</script>', '"><img src=x onerror=alert(2)>', "<b>&amp;'"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


class Page(HTMLParser):
    """Reads a page: tags that are open, cards, headings, and what a browser could load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.cards: list[dict[str, str]] = []
        self.images: list[str | None] = []
        self.headings: list[tuple[int, str]] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.circles = 0
        self.scripts = 0
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        if tag not in ("meta", "input", "circle", "br"):
            self.open.append(tag)
        self.loads += [f"{tag} {named[key]}" for key in ("src", "srcset", "data") if key in named]
        self.loads += [tag] if tag in ("img", "link", "iframe", "object", "base") else []
        assert not any(name.startswith("on") for name in named)
        self.scripts += tag == "script"
        self.circles += tag == "circle"
        self.ids += [named["id"]] if "id" in named else []
        self.links += [named["href"]] if "href" in named else []
        if named.get("role") == "img":
            self.images.append(named.get("aria-label"))
        if tag == "li" and named.get("class", "").startswith("card"):
            self.cards.append({"mark": named["class"].removeprefix("card").strip(), "text": ""})
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "li" in self.open and self.cards:
            self.cards[-1]["text"] += data
        if self.headings and self.open and self.open[-1] == f"h{self.headings[-1][0]}":
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)


def noise(item: int, side: int) -> Image.Image | None:
    """Draw the image that compresses worst; every seventh item has none."""
    if item % 7 == 0:
        return None
    random = np.random.default_rng(item)
    return Image.fromarray(random.integers(0, 256, (side, side, 3)).astype(np.uint8))


def table(titles: list[str | None]) -> pa.Table:
    ids = [f"i{item}" for item in range(len(titles))]
    return pa.table({"item_id": ids, "text": pa.array(titles, pa.string())})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Warehouse:
    """A warehouse with a run of ids and a run of features."""
    warehouse = Warehouse(tmp_path_factory.mktemp("gallery") / "warehouse")
    worlds.prepare(warehouse, SEQUENCES, N_ITEMS)
    worlds.extract(warehouse, worlds.features(N_ITEMS))
    small = ["device=cpu", "epochs=1", "dim=8", "heads=2", "hidden=8", "length=5"]
    for name, model in (("ids", "sasrec"), ("content", "mmsrec")):
        train_run(worlds.begin(warehouse, model, settings=small, name=name))
    train_run(worlds.begin(warehouse, "popularity", settings=["device=cpu"], name="counts"))
    return warehouse


def expected_lists(run: Run, k: int) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Return the list of each test user and the rank of the target, by plain inner products."""
    load_weights(run.weights, run.model, run.spec.identity())
    dataset = run.data.dataset
    users = dataset.eval_split("test")
    items_ND = encode_catalogue(run.model, run.data)
    scores_EN = (encode_histories(run.model, run.data, items_ND, users, 64) @ items_ND.T).numpy()
    lists, ranks = {}, {}
    for number, user in enumerate(users.users.tolist()):
        target = int(dataset.items[users.targets[number]])
        seen = set(dataset.items[users.starts[number] : users.targets[number]].tolist())
        scores = scores_EN[number]
        order = [item for item in np.argsort(-scores, kind="stable").tolist() if item not in seen]
        lists[f"u{user}"] = order[:k]
        ahead = (scores >= scores[target]) & ~np.isin(np.arange(len(scores)), [*seen, target])
        ranks[f"u{user}"] = 0 if target in seen else 1 + int(ahead.sum())
    return lists, ranks


def test_lists_and_marks_are_those_of_the_runs(trained: Warehouse) -> None:
    pytest.importorskip("sklearn", reason="the extra map is not installed")
    options = GalleryOptions(map_items=25, seed=3)
    gallery = collect_gallery(trained, ["ids", "content"], options, labels=["IDs", "<content>"])
    assert gallery.chosen_by == "<content>"
    assert [user.kind for user in gallery.users] == [kind for kind in KINDS for _ in range(2)]
    assert len({user.user_id for user in gallery.users}) == 8
    page = Page(build_gallery(gallery, table([None] * N_ITEMS), noise))
    for position, name in enumerate(("ids", "content")):
        run = open_run(trained, trained.runs_dir / name)
        lists, ranks = expected_lists(run, 10)
        for user in gallery.users:
            entry = user.lists[position]
            assert entry.items == lists[user.user_id]
            assert entry.rank == ranks[user.user_id]
            assert (user.target in entry.items) == (0 < entry.rank <= 10)
        if name == "content":
            by_kind = {kind: [u for u in gallery.users if u.kind == kind] for kind in KINDS}
            all_ranks = [rank for rank in ranks.values() if rank]
            assert by_kind["best rank"][0].lists[1].rank == min(all_ranks)
            assert by_kind["worst rank"][0].lists[1].rank == max(all_ranks)
            counts = gallery.train_counts
            assert all(counts[user.target] < 10 for user in by_kind["cold target"])
    hits = sum(user.target in entry.items for user in gallery.users for entry in user.lists)
    marks = [card["mark"] for card in page.cards]
    assert marks.count("hit") == hits > 0
    assert marks.count("target") == 8
    marked = [card["text"] for card in page.cards if card["mark"] == "hit"]
    targets = [u.target for u in gallery.users for entry in u.lists if u.target in entry.items]
    assert [text.split("✓")[0].removeprefix("no image") for text in marked] == [
        f"i{item}" for item in targets
    ]
    assert gallery.map is not None
    assert len(gallery.map.items) == page.circles == 25


def test_neighbours_are_the_nearest_in_each_table(trained: Warehouse) -> None:
    gallery = collect_gallery(trained, ["content"], GalleryOptions(map_items=0))
    vectors = worlds.features(N_ITEMS)
    assert len(gallery.neighbours) == 6
    for entry in gallery.neighbours:
        assert set(entry.spaces) == {"image=toy", "text=toy", "vectors of content"}
        for modality in ("image", "text"):
            unit = vectors.vectors[modality].numpy().astype(np.float16).astype(np.float32)
            present = vectors.present[modality].numpy().copy()
            unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
            present[entry.item] = False
            cosine = np.where(present, unit @ unit[entry.item], -np.inf)
            nearest = entry.spaces[f"{modality}=toy"]
            assert len(set(nearest)) == 6
            assert cosine[nearest] == pytest.approx(np.sort(cosine)[::-1][:6], abs=1e-3)


@pytest.mark.parametrize("model", ["ids", "counts"])
def test_a_run_without_features_images_and_titles_has_a_page(
    trained: Warehouse, model: str
) -> None:
    gallery = collect_gallery(trained, [model], GalleryOptions(map_items=10))
    page = Page(build_gallery(gallery, table([None] * N_ITEMS), lambda item, side: None))
    assert page.images == []
    assert page.cards
    assert all(card["text"].startswith("i") for card in page.cards)
    assert [text for level, text in page.headings if level == 2] == [
        "Users", "Neighbours of items", "Map of items",
    ]  # fmt: skip
    if model == "counts":
        assert gallery.map is None
        assert gallery.map_note


@pytest.mark.parametrize(
    ("names", "labels", "message"),
    [
        (["ids"] * 5, None, r"5 runs.*at most 4"),
        (["ids", "ids"], None, r"'ids'.*twice"),
        (["ids", "content"], ["a", "a"], r"'a'.*twice"),
        (["ids", "content"], ["a"], r"1 labels for 2 runs"),
    ],
)
def test_mistakes(
    trained: Warehouse, names: list[str], labels: list[str] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        collect_gallery(trained, names, GalleryOptions(), labels=labels)


def hand_made(n_items: int, n_map: int) -> Gallery:
    """A gallery of many items."""
    lists = [RankedList(label=HOSTILE[0], rank=3, items=[*range(20, 28), 1, 29])]
    user = GalleryUser(
        kind="typical", user_id=HOSTILE[1], history=[0, 2, 3], earlier=4, target=1, lists=lists
    )
    users = [user] * 8
    random = np.random.default_rng(0)
    near = [
        ItemNeighbours(item=item, spaces={HOSTILE[2]: list(range(item * 40, item * 40 + 40))})
        for item in range(6)
    ]
    items = np.arange(n_map)
    return Gallery(
        dataset=HOSTILE[0],
        labels=[HOSTILE[0]],
        chosen_by=HOSTILE[0],
        ranked_users=1,
        users=users,
        neighbours=near,
        map=ItemMap(label=HOSTILE[2], items=items, points=random.normal(size=(n_map, 2))),
        map_note="",
        train_counts=random.integers(0, 50, n_items),
    )


@pytest.fixture(scope="module")
def large_page() -> str:
    """A page of the largest map, with hostile titles and images that compress badly."""
    titles: list[str | None] = [HOSTILE[item % 3] for item in range(1600)]
    return build_gallery(hand_made(1600, 1500), table(titles), noise)


def test_the_largest_page_is_small_safe_and_loads_nothing(large_page: str) -> None:
    assert len(large_page.encode()) < MAX_BYTES
    page = Page(large_page)
    assert page.loads == []
    assert page.scripts == 2  # the items of the map, and the script of the page
    assert "http://" not in large_page.replace("http://www.w3.org", "")
    assert "https://" not in large_page
    assert page.circles == 1500
    assert all(page.images)
    assert set(page.images) <= {f"image of {title}" for title in HOSTILE}
    assert all(link.removeprefix("#") in page.ids for link in page.links)
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert sum(card["mark"] == "hit" for card in page.cards) == 8


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_shows_the_page_without_a_fault(large_page: str, tmp_path: Path) -> None:
    """A request that the policy of the page refuses would be an error on the console."""
    assert CHROMIUM is not None
    (tmp_path / "page.html").write_text(large_page)
    image = tmp_path / "page.png"
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    done = subprocess.run(
        [CHROMIUM, *options, "--enable-logging=stderr", "--window-size=400,900",
         f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={image}",
         (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    with Image.open(image) as opened:
        assert np.asarray(opened.convert("L")).std() > 10
