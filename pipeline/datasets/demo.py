"""The demo: a small synthetic dataset, so that everything can be tried offline.

A program draws the images and simulates the users; nothing is taken from life. As in life, users
have a taste in content and a taste in order. Every item has a style, which its image and video show
(a colour and a shape), and a topic, from which most words of its title are. Every user has two
favourite styles and two favourite topics, and most often goes on to the topic that follows the last
one. A model that uses images, titles and order therefore predicts well, also new items: a tenth of
the items has at most four training interactions, half of them none, so only their content can
predict them. Popularity predicts little.
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

STYLES = (  # colour and shape
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
TITLE_WORDS = 4  # of the topic, after a word that tells nothing
NEW_SHARE = 0.1
STYLE_SHARES = (0.7, 0.2)  # of a user's interactions, with the first and the second favourite
FAVOURITE_TOPICS = 2
FOLLOWS = 0.7  # probability of the topic that follows the last one
RETURNS = 0.2  # probability of a favourite topic; otherwise any topic
START = 1_700_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoItem:
    """The hidden properties of one item: its files show them, the tables do not contain them."""

    item_id: str
    style: int
    topic: int
    new: bool


def make_demo(raw: Path, *, users: int = 1000, items: int = 432, seed: int = 0) -> list[DemoItem]:
    """Write the raw files of the demo in the ``table`` layout.

    Args:
        raw: The folder to make; it appears when all files are written.
        users: Number of users; each has 8 to 18 interactions.
        items: Number of items.
        seed: Seed of every random choice; the same seed gives the same bytes.

    Returns:
        The items with their hidden properties, in the order of their ids.

    Raises:
        UserError: ``raw`` exists, or there are fewer than four items for each style and topic.
    """
    cells = len(STYLES) * len(TOPICS)
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
    """Distribute the items evenly over the cells (style, topic); new items are in all cells."""
    cells = len(STYLES) * len(TOPICS)
    order = random.permutation(items)
    # The first items fill each cell, so that every cell has items that are not new.
    new = cells + random.choice(items - cells, round(items * NEW_SHARE), replace=False)
    is_new = np.isin(np.arange(items), new)
    catalogue = [
        DemoItem(
            item_id=f"i{order[index] + 1:04d}",
            style=index % len(STYLES),
            topic=index % cells // len(STYLES),
            new=bool(is_new[index]),
        )
        for index in range(items)
    ]
    return sorted(catalogue, key=lambda item: item.item_id)


# -- interactions ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _User:
    """The hidden preferences of one user."""

    styles: npt.NDArray[np.float64]
    """(8,) probability of each style."""
    topics: npt.NDArray[np.int64]
    """The favourite topics."""

    @classmethod
    def draw(cls, random: np.random.Generator) -> "_User":
        """Draw the favourites."""
        styles = np.full(len(STYLES), (1 - sum(STYLE_SHARES)) / len(STYLES))
        styles[random.choice(len(STYLES), len(STYLE_SHARES), replace=False)] += STYLE_SHARES
        topics = random.choice(len(TOPICS), FAVOURITE_TOPICS, replace=False)
        return cls(styles=styles, topics=topics)

    def next_topic(self, topic: int, random: np.random.Generator) -> int:
        """Draw the topic after a topic."""
        chance = random.random()
        if chance < FOLLOWS:
            return (topic + 1) % len(TOPICS)
        if chance < FOLLOWS + RETURNS:
            return int(random.choice(self.topics))
        return int(random.integers(len(TOPICS)))


def _write_interactions(
    raw: Path, catalogue: list[DemoItem], users: int, random: np.random.Generator
) -> None:
    cells: dict[tuple[int, int], list[int]] = {}
    for index, item in enumerate(catalogue):
        cells.setdefault((item.style, item.topic), []).append(index)
    # Within a cell some items are more popular than others, so popularity predicts a little.
    appeal = random.gamma(3.0, 1.0, len(catalogue)) + 0.2
    appeal[[item.new for item in catalogue]] = appeal.mean()
    trained = np.zeros(len(catalogue), dtype=np.int64)
    # Half of the new items have no training interaction, the others at most four.
    limit = np.where(np.arange(len(catalogue)) % 2 == 0, 0, 4)
    limit[[not item.new for item in catalogue]] = np.iinfo(np.int64).max
    rows: list[tuple[str, str, int]] = []
    for number in range(users):
        user = _User.draw(random)
        length = int(random.integers(8, 19))
        topic = int(random.choice(user.topics))
        time = START + int(random.integers(30 * 86_400))
        seen: set[int] = set()
        for step in range(length):
            style = int(random.choice(len(STYLES), p=user.styles))
            topic = user.next_topic(topic, random)
            held_out = step >= length - 2
            # While the cell has no item left, try the same topic with another style.
            while not (
                candidates := [
                    index
                    for index in cells[style, topic]
                    if index not in seen and (held_out or trained[index] < limit[index])
                ]
            ):
                style = int(random.integers(len(STYLES)))
            weight = appeal[candidates]
            chosen = int(random.choice(candidates, p=weight / weight.sum()))
            trained[chosen] += not held_out
            seen.add(chosen)
            rows.append((f"u{number + 1:05d}", catalogue[chosen].item_id, time))
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
                random.choice(FILLERS),
                *random.choice(fields[item.topic], TITLE_WORDS, replace=False),
            ]
            title = " ".join(str(word) for word in words).capitalize()
            image, video = f"images/{item.item_id}.png", f"videos/{item.item_id}.mp4"
            drawing = _draw(item.style, random)
            if index not in without_image:
                drawing.save(raw / image)
                if index == broken:
                    content = (raw / image).read_bytes()
                    (raw / image).write_bytes(content[: len(content) // 2])
            if index in with_video:
                _write_video(raw / video, item.style, random)
            writer.writerow(
                [
                    item.item_id,
                    "" if index in without_title else title,
                    "" if index in without_image else image,
                    video if index in with_video else "",
                    f"{random.integers(100, 5000) / 100:.2f}",
                ]
            )


def _draw(style: int, random: np.random.Generator, turn: float = 0.0) -> Image.Image:
    """Draw a coloured shape on pale noise near the middle of an image."""
    colour, shape = STYLES[style]
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


def _write_video(path: Path, style: int, random: np.random.Generator) -> None:
    """Write two to three seconds of the turning shape as MPEG-4 with four frames a second."""
    import av

    # Without the protocol, a path with a colon is read as that of another protocol.
    with av.open(f"file:{path}", "w", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.flags |= 1 << 23  # AV_CODEC_FLAG_BITEXACT: equal bytes each time
        for step in range(int(random.integers(8, 13))):
            drawing = np.asarray(_draw(style, random, turn=step * math.pi / 12))
            frame = av.VideoFrame.from_ndarray(drawing)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
