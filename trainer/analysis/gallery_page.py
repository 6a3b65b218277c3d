"""Build the HTML page of a gallery: one file that loads nothing.

All images are in two sprites, large images of a grid whose cells the page shows. Titles and ids are
texts of strangers: the template escapes them, and a policy of the page forbids the browser to fetch
anything and to run another script than that of the page, which it knows by its hash.
"""

import base64
import hashlib
import importlib.metadata
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from features.splits import COLD_BELOW
from trainer.analysis.gallery import KINDS, Gallery, GalleryUser, ItemMap, RankedList

MAX_BYTES = 5_000_000
"""Limit of the page."""
CARD_SIDE, MAP_SIDE = 96, 48
"""Sides of the images in lists and of those of the map, in pixels."""
_IMAGE_BYTES = 3_000_000  # of both sprites, before their base64 encoding makes them longer by 1/3
_QUALITIES = (82, 70, 55, 40, 25, 12)  # of JPEG; the first one that fits
_MAX_TITLE = 120  # characters
_MAP_WIDTH, _MAP_HEIGHT, _MARGIN = 1000, 620, 14  # units of the map's drawing
_HERE = Path(__file__).parent

ReadImage = Callable[[int, int], Image.Image | None]
"""Function of an item and a side in pixels that returns a square image, or ``None``."""


@dataclass(frozen=True, slots=True)
class Card:
    """One item in a list."""

    title: str
    item_id: str
    cell: tuple[int, int] | None
    """Place of the image in the sprite in pixels, ``None`` without an image."""
    trained: int
    """Training interactions."""
    mark: str = ""
    """``hit``, ``target`` or empty."""


class _Sprite:
    """Square images in the cells of a grid.

    Args:
        items: The items; those without an image get no cell.
        read: Reads the images.
        side: Side of a cell in pixels.
    """

    def __init__(self, items: Sequence[int], read: ReadImage, side: int) -> None:
        images = {item: image for item in items if (image := read(item, side)) is not None}
        self.columns = max(1, math.ceil(math.sqrt(len(images))))
        rows = max(1, math.ceil(len(images) / self.columns))
        self.size = (self.columns * side, rows * side)
        self.cells: dict[int, tuple[int, int]] = {}
        self._image = Image.new("RGB", self.size, (255, 255, 255))
        for number, (item, image) in enumerate(images.items()):
            cell = (number % self.columns * side, number // self.columns * side)
            self._image.paste(image, cell)
            self.cells[item] = cell

    def jpeg(self, quality: int) -> bytes:
        """Encode the sprite."""
        stream = io.BytesIO()
        self._image.save(stream, "JPEG", quality=quality, optimize=True)
        return stream.getvalue()


def build_gallery(gallery: Gallery, items: pa.Table, read_image: ReadImage) -> str:
    """Build the page.

    Args:
        gallery: What it shows.
        items: The columns ``item_id`` and ``text`` of the dataset's items.
        read_image: Reads the image of an item.

    Returns:
        The HTML document, smaller than :data:`MAX_BYTES`. Equal inputs give equal documents.
    """
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    listed = _Sprite(gallery.listed_items(), read_image, CARD_SIDE)
    on_map = [] if gallery.map is None else gallery.map.items.tolist()
    mapped = _Sprite(on_map, read_image, MAP_SIDE)
    cards = _Cards(gallery, items, listed)
    script = (_HERE / "gallery.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    card_sprite, map_sprite = _encode(listed, mapped)
    return environment.get_template("gallery.html.j2").render(
        title=f"Gallery: {', '.join(gallery.labels)} on {gallery.dataset}",
        version=importlib.metadata.version("mmrec"),
        gallery=gallery,
        kinds=KINDS,
        users=[_user(user, cards) for user in gallery.users],
        neighbours=[
            {
                "item": cards.of(entry.item),
                "spaces": {
                    name: [cards.of(item) for item in nearest]
                    for name, nearest in entry.spaces.items()
                },
            }
            for entry in gallery.neighbours
        ],
        map=None if gallery.map is None else _map(gallery, gallery.map, cards, mapped),
        card_sprite=card_sprite,
        card_size=listed.size,
        map_sprite=map_sprite,
        map_size=mapped.size,
        cold_below=COLD_BELOW,
        script=Markup(script),
        script_hash=digest,
    )


def _encode(*sprites: _Sprite) -> list[str]:
    """Return the sprites as ``data:`` addresses, in the best quality that fits; empty: no image."""
    for quality in _QUALITIES:
        files = [sprite.jpeg(quality) if sprite.cells else b"" for sprite in sprites]
        if sum(map(len, files)) <= _IMAGE_BYTES:
            break
    return [
        f"data:image/jpeg;base64,{base64.b64encode(file).decode('ascii')}" if file else ""
        for file in files
    ]


class _Cards:
    """Makes cards of items."""

    def __init__(self, gallery: Gallery, items: pa.Table, sprite: _Sprite) -> None:
        self._ids, self._texts = items["item_id"], items["text"]
        self._counts_N, self._cells = gallery.train_counts, sprite.cells

    def title(self, item: int) -> str:
        """Return the title of an item, cut; the id of an item without a title."""
        text = " ".join((self._texts[item].as_py() or "").split())
        text = text or str(self._ids[item].as_py())
        return text if len(text) <= _MAX_TITLE else f"{text[: _MAX_TITLE - 1]}…"

    def of(self, item: int, mark: str = "") -> Card:
        """Return the card of an item."""
        return Card(
            title=self.title(item),
            item_id=str(self._ids[item].as_py()),
            cell=self._cells.get(item),
            trained=int(self._counts_N[item]),
            mark=mark,
        )


def _user(user: GalleryUser, cards: _Cards) -> dict[str, Any]:
    """Return the cards of a user's history and lists; a hit is the target in a list."""

    def ranked(entry: RankedList) -> dict[str, Any]:
        return {
            "label": entry.label,
            "rank": f"{entry.rank:,}" if entry.rank else "",
            "is_hit": user.target in entry.items,
            "cards": [cards.of(item, "hit" if item == user.target else "") for item in entry.items],
        }

    return {
        "kind": user.kind,
        "user_id": user.user_id,
        "earlier": user.earlier,
        "history": [cards.of(item) for item in user.history],
        "target": cards.of(user.target, "target"),
        "lists": [ranked(entry) for entry in user.lists],
    }


def _map(gallery: Gallery, item_map: ItemMap, cards: _Cards, sprite: _Sprite) -> dict[str, Any]:
    """Return the points of the map with their groups, and what the script shows of each item."""
    # Later points are drawn over earlier ones: items that training has not seen are the last.
    order_S = np.argsort(gallery.train_counts[item_map.items] == 0, kind="stable")
    items_S, points_S2 = item_map.items[order_S], item_map.points[order_S]
    counts_S = gallery.train_counts[items_S]
    seen = counts_S[counts_S > 0]
    bounds = np.unique(np.quantile(seen, [0.25, 0.5, 0.75, 0.95]).round()) if len(seen) else [0.0]
    levels_S = np.searchsorted(bounds, counts_S, side="left")
    low_2, high_2 = points_S2.min(0), points_S2.max(0)
    size_2 = np.array([_MAP_WIDTH, _MAP_HEIGHT]) - 2 * _MARGIN
    places_S2 = _MARGIN + (points_S2 - low_2) / np.maximum(high_2 - low_2, 1e-9) * size_2
    texts = []
    edges = [int(bound) for bound in bounds]
    for level in range(len(edges) + 1):
        first = 0 if level == 0 else edges[level - 1] + 1
        if level == len(edges):
            texts.append(f"{first:,} or more")
        else:
            texts.append(f"{first:,} to {edges[level]:,}")
    numbers = np.bincount(levels_S, minlength=len(texts)).tolist()
    n_unseen = int((counts_S == 0).sum())
    return {
        "label": item_map.label,
        "width": _MAP_WIDTH,
        "height": _MAP_HEIGHT,
        "points": [
            (f"{x:.0f}", f"{y:.0f}", int(level), int(count == 0))
            for (x, y), level, count in zip(places_S2, levels_S, counts_S, strict=True)
        ],
        "entries": [
            [cards.title(item), int(count), *sprite.cells.get(item, (-1, -1))]
            for item, count in zip(items_S.tolist(), counts_S, strict=True)
        ],
        "levels": list(zip(texts, numbers, strict=True)),
        "unseen": n_unseen,
        "seen": len(counts_S) - n_unseen,
    }
