"""Small images of items: fitted into a square, of a video where there is no image, or none."""

from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from features.warehouse import Warehouse
from pipeline.datasets.prepare import PrepareOptions, prepare_dataset
from pipeline.media.thumbnails import Thumbnails
from tests.pipeline.media.videos import write_video

# a: an image; b: a damaged image; c: nothing; d: a video; e: a damaged image and a video
ITEMS = "item_id,image,video\na,a.png,\nb,b.png,\nc,,\nd,,v.mp4\ne,b.png,v.mp4\n"


@pytest.mark.parametrize(("size", "bars"), [((40, 20), "rows"), ((10, 50), "columns")])
def test_an_image_or_a_frame_is_fitted_into_a_white_square(
    warehouse: Warehouse, tmp_path: Path, size: tuple[int, int], bars: str
) -> None:
    raw = tmp_path / "raw"
    raw.mkdir()
    Image.new("RGB", size, (200, 0, 0)).save(raw / "a.png")
    (raw / "b.png").write_bytes((raw / "a.png").read_bytes()[:40])
    write_video(raw / "v.mp4", frames=3)
    (raw / "interactions.csv").write_text("user_id,item_id\nu,a\nu,b\nu,c\nu,d\nu,e\n")
    (raw / "items.csv").write_text(ITEMS)
    options = PrepareOptions(dataset="shop", format="table", raw=raw, k_core=0)
    prepare_dataset(warehouse, options, notify=lambda text: None)
    with closing(Thumbnails(warehouse, "shop")) as thumbnails:
        image, damaged, absent, *frames = (thumbnails.read(item, 20) for item in range(5))
    assert damaged is None
    assert absent is None
    assert image is not None
    pixels = np.asarray(image)
    assert pixels.shape == (20, 20, 3)
    is_white = (pixels == 255).all(2)
    assert pixels[10, 10].tolist() == [200, 0, 0]
    assert is_white[0].all() == (bars == "rows")
    assert is_white[:, 0].all() == (bars == "columns")
    for frame in frames:
        assert frame is not None
        assert np.asarray(frame)[10, 10].max() < 20  # the shade of the second frame
