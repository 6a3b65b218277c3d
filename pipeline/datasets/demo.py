"""The demo: a small dataset made by the program, so that everything can be tried offline.

Every item has a taste and a topic. Its image and video show only the taste (a colour and a shape);
its title shows only the topic (words of one field). Most of the time a user stays with one taste
and goes through the topics in a fixed order. The taste of the user and the topic of the last item
therefore predict the next item: a model that uses images, titles and order predicts well, and
popularity does not. A tenth of the items is new: these items combine a taste and a topic that no
other item combines. They have few or no training interactions and are the targets of some users,
so only their content can predict them.
"""

import csv
import math
import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from features.errors import UserError

TASTES = (  # colour and shape
    ((214, 48, 49), "circle"), ((243, 156, 18), "square"), ((241, 219, 60), "triangle"),
    ((39, 174, 96), "circle"), ((22, 190, 200), "square"), ((41, 98, 255), "triangle"),
    ((142, 68, 173), "circle"), ((90, 90, 90), "square"),
)  # fmt: skip
TOPICS = {
    "mountain": "summit ridge glacier alpine trail cliff granite snowline",
    "kitchen": "recipe oven spice dough skillet simmer butter pantry",
    "ocean": "wave reef harbour sailor tide lagoon driftwood coral",
    "music": "guitar chorus rhythm melody drummer concert vinyl harmony",
    "space": "orbit comet nebula rocket lunar gravity telescope starlight",
    "garden": "blossom seedling orchard rose compost meadow trellis pollen",
}
FILLERS = ("the", "a", "new", "first", "little", "great", "last", "long", "quiet", "bright", "old")
SIZE = 96  # side of an image in pixels
NEW_SHARE = 0.1
FOLLOWS = 0.85  # probability that a user stays with the taste, and with the order of topics
START = 1_700_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoItem:
    """The hidden properties of one item: its files show them, the tables do not contain them."""

    item_id: str
    taste: int
    topic: int
    new: bool


def make_demo(raw: Path, *, users: int = 2000, items: int = 432, seed: int = 0) -> list[DemoItem]:
    """Write the raw files of the demo in the ``table`` layout.

    Args:
        raw: The folder to make; it appears when all files are written.
        users: Number of users; each has 8 to 18 interactions.
        items: Number of items.
        seed: Seed of every random choice; the same seed gives the same bytes.

    Returns:
        The items with their hidden properties, in the order of their ids.

    Raises:
        UserError: ``raw`` exists, or there are fewer than four items for each taste and topic.
    """
    cells = len(TASTES) * len(TOPICS)
    if items < 4 * cells:
        raise UserError(f"--items {items} is too few for the demo; give at least {4 * cells}")
    if raw.exists():
        raise UserError(f"{raw} exists already; remove it to make the demo's files again")
    random = np.random.default_rng(seed)
    catalogue = _catalogue(items, random)
    temporary = raw.with_name(f".{raw.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        _write_items(temporary, catalogue, random)
        _write_interactions(temporary, catalogue, users, random)
        os.replace(temporary, raw)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return catalogue


def _catalogue(items: int, random: np.random.Generator) -> list[DemoItem]:
    """Distribute the items evenly over the cells (taste, topic); a cell is new as a whole."""
    cells = len(TASTES) * len(TOPICS)
    order = random.permutation(items)
    new = random.choice(cells, round(cells * NEW_SHARE), replace=False)
    catalogue: list[DemoItem] = []
    for index in range(items):
        cell = index % cells
        catalogue.append(
            DemoItem(
                item_id=f"i{order[index] + 1:04d}",
                taste=cell % len(TASTES),
                topic=cell // len(TASTES),
                new=bool(np.isin(cell, new)),
            )
        )
    return sorted(catalogue, key=lambda item: item.item_id)


# -- interactions ---------------------------------------------------------------------------


def _write_interactions(
    raw: Path, catalogue: list[DemoItem], users: int, random: np.random.Generator
) -> None:
    cells: dict[tuple[int, int], list[int]] = {}
    for index, item in enumerate(catalogue):
        cells.setdefault((item.taste, item.topic), []).append(index)
    # Within a cell some items are more popular than others, so popularity predicts a little.
    appeal = random.gamma(1.5, 1.0, len(catalogue)) + 0.2
    trained = np.zeros(len(catalogue), dtype=np.int64)
    # Half of the new items have no training interaction, the others at most four.
    limit = np.where(np.arange(len(catalogue)) % 2 == 0, 0, 4)
    limit[[not item.new for item in catalogue]] = np.iinfo(np.int64).max
    rows: list[tuple[str, str, int]] = []
    for user in range(users):
        length = int(random.integers(8, 19))
        user_taste = int(random.integers(len(TASTES)))
        topic = int(random.integers(len(TOPICS)))
        time = START + int(random.integers(30 * 86_400))
        seen: set[int] = set()
        for step in range(length):
            follows = random.random(2) < FOLLOWS
            taste = user_taste if follows[0] else int(random.integers(len(TASTES)))
            topic = (topic + 1) % len(TOPICS) if follows[1] else int(random.integers(len(TOPICS)))
            held_out = step >= length - 2
            # While the cell has no item left, try the same topic with another taste.
            while not (
                candidates := [
                    index
                    for index in cells[taste, topic]
                    if index not in seen and (held_out or trained[index] < limit[index])
                ]
            ):
                taste = int(random.integers(len(TASTES)))
            weight = appeal[candidates]
            chosen = int(random.choice(candidates, p=weight / weight.sum()))
            trained[chosen] += not held_out
            seen.add(chosen)
            rows.append((f"u{user + 1:05d}", catalogue[chosen].item_id, time))
            # Some interactions have the time of the one before; the order of the file orders them.
            time += int(random.integers(0, 4)) * 3600
    with (raw / "interactions.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["user_id", "item_id", "timestamp"])
        writer.writerows(rows)


# -- content of items -----------------------------------------------------------------------


def _write_items(raw: Path, catalogue: list[DemoItem], random: np.random.Generator) -> None:
    (raw / "images").mkdir()
    (raw / "videos").mkdir()
    fields = [words.split() for words in TOPICS.values()]
    without_image = set(random.choice(len(catalogue), len(catalogue) // 12, replace=False))
    without_title = set(random.choice(len(catalogue), len(catalogue) // 12, replace=False))
    with_video = set(random.choice(len(catalogue), len(catalogue) // 10, replace=False))
    broken = next(index for index in range(len(catalogue)) if index not in without_image)
    with (raw / "items.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["item_id", "title", "image", "video", "price"])
        for index, item in enumerate(catalogue):
            words = [
                *random.choice(FILLERS, 2, replace=False),
                *random.choice(fields[item.topic], 3, replace=False),
            ]
            title = " ".join(str(word) for word in words).capitalize()
            image, video = f"images/{item.item_id}.png", f"videos/{item.item_id}.mp4"
            drawing = _draw(item.taste, random)
            if index not in without_image:
                drawing.save(raw / image)
                if index == broken:
                    content = (raw / image).read_bytes()
                    (raw / image).write_bytes(content[: len(content) // 2])
            if index in with_video:
                _write_video(raw / video, item.taste, random)
            writer.writerow(
                [
                    item.item_id,
                    "" if index in without_title else title,
                    "" if index in without_image else image,
                    video if index in with_video else "",
                    f"{random.integers(100, 5000) / 100:.2f}",
                ]
            )


def _draw(taste: int, random: np.random.Generator, turn: float = 0.0) -> Image.Image:
    """Draw a coloured shape on pale noise near the middle of an image."""
    colour, shape = TASTES[taste]
    background: npt.NDArray[np.uint8] = random.integers(225, 256, (SIZE, SIZE, 3)).astype(np.uint8)
    image = Image.fromarray(background)
    draw = ImageDraw.Draw(image)
    x, y = (SIZE / 2 + offset for offset in random.uniform(-10, 10, 2))
    radius = random.uniform(26, 36)
    tint = tuple(int(np.clip(part + random.integers(-12, 13), 0, 255)) for part in colour)
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tint)
        return image
    sides = {"square": 4, "triangle": 3}[shape]
    corners = [
        (
            x + radius * math.cos(turn + 2 * math.pi * corner / sides + math.pi / sides),
            y + radius * math.sin(turn + 2 * math.pi * corner / sides + math.pi / sides),
        )
        for corner in range(sides)
    ]
    draw.polygon(corners, fill=tint)
    return image


def _write_video(path: Path, taste: int, random: np.random.Generator) -> None:
    """Write two to three seconds of the turning shape as MPEG-4 with four frames a second."""
    import av

    # Without the protocol, a path with a colon is read as that of another protocol.
    with av.open(f"file:{path}", "w", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.flags |= 1 << 23  # AV_CODEC_FLAG_BITEXACT: equal bytes each time
        for step in range(int(random.integers(8, 13))):
            drawing = np.asarray(_draw(taste, random, turn=step * math.pi / 12))
            frame = av.VideoFrame.from_ndarray(drawing)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
