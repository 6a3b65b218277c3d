"""Videos for tests, whose frames are told apart by their shade."""

from pathlib import Path

import av
import numpy as np


def write_video(
    path: Path, *, frames: int, fps: int = 25, gop: int = 250, b_frames: int = 2, jumps: int = 0,
    size: tuple[int, int] = (64, 48), noise: int = 1,
) -> Path:  # fmt: skip
    """Write a video whose frame i is grey of :func:`shade` (i), plus noise."""
    random = np.random.RandomState(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "preset": "veryfast", "g": str(gop), "bf": str(b_frames), "qp": "4",
            "x264-params": "scenecut=0:log-level=none",
        }  # fmt: skip
        for index in range(frames):
            pixels = np.full((size[1], size[0], 3), shade(index), np.uint8)
            pixels += random.randint(0, noise, pixels.shape, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = index + jumps * (index // 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shade(index: int) -> int:
    """Return the shade of a frame: 2, 4, ... 250, 2, ..."""
    return 2 + 2 * (index % 125)
