"""The sampled frames of a video are those on screen at the sampled times, in any container."""

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from pipeline.media.video import sample_frames

TEN_SECONDS = [index / 10 for index in range(100)]


def write(
    path: Path, times: list[float], *, rate: Fraction | int = 10, start: float = 0, sound: int = 0,
    b_frames: int = 2, options: dict[str, str] | None = None,
) -> bytes:  # fmt: skip
    """Return a video whose frame for second t is grey of 20 + 10 t; ``sound`` is in seconds."""
    base = Fraction(1, 10)
    with av.open(str(path), "w", options=options or {}) as file:
        video = file.add_stream("libx264", rate=rate)
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        video.codec_context.time_base = base
        video.options = {
            "bf": str(b_frames), "qp": "4", "g": "25", "x264-params": "log-level=none",
        }  # fmt: skip
        audio = file.add_stream("aac", rate=8000, layout="mono") if sound else None
        for time in times:
            grey = np.full((48, 64, 3), 20 + round(10 * time), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = round((time + start) * 10), base
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        if audio is not None:
            assert isinstance(audio, av.AudioStream)
            for position in range(0, sound * 8000, 1024):
                silence = np.zeros((1, 1024), np.float32)
                samples = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 8000, position
                samples.time_base = Fraction(1, 8000)
                file.mux(audio.encode(samples))
            file.mux(audio.encode(None))
    return path.read_bytes()


def seconds(data: bytes, count: int | None) -> list[float]:
    """Return the times of the sampled frames by their shades; the file must be undamaged."""
    frames, is_damaged = sample_frames(
        io.BytesIO(data), lambda image: (float(np.asarray(image).mean()) - 20) / 10, count
    )
    assert not is_damaged
    return frames


def on_screen(times: list[float], length: float, count: int | None) -> list[float]:
    """Return the times of the frames on screen at the sampled times, each once."""
    moments = np.arange(0, length - 1e-3)
    if count is not None:
        moments = (np.arange(count) + 0.5) * length / count
    return list(dict.fromkeys(max(t for t in times if t <= moment + 1e-6) for moment in moments))


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv", "flv", "ts", "avi", "h264"])
@pytest.mark.parametrize(
    ("start", "sound"), [(0, 0), (100, 0), (0, 60), (1, 30)], ids=["", "late", "sound", "both"]
)
def test_the_frame_on_screen_in_any_container(
    tmp_path: Path, kind: str, b_frames: int, start: float, sound: int
) -> None:
    if kind == "h264" and sound:
        pytest.skip("images only")
    if kind == "avi" and (start or sound):
        pytest.skip("no timestamps: FFmpeg writes empty frames after the first one")
    data = write(
        tmp_path / f"a.{kind}", TEN_SECONDS, start=start, sound=sound, b_frames=b_frames
    )  # fmt: skip
    for count in (None, 1, 3, 8):
        times = seconds(data, count)
        expected = on_screen(TEN_SECONDS, 10, count)
        assert len(times) == len(expected), count
        # Middles of stretches that fall on the beginning of a frame may be rounded either way.
        assert np.abs(np.subtract(times, expected)).max() < 0.16, count


@pytest.mark.parametrize("count", [None, 1, 3, 5])
@pytest.mark.parametrize("sound", [0, 30])
@pytest.mark.parametrize(
    ("name", "options"),
    [("a.mp4", {"movflags": "frag_keyframe+empty_moov"}), ("a.mkv", {"live": "1"})],
)
def test_a_header_without_a_length(
    tmp_path: Path, name: str, options: dict[str, str], sound: int, count: int | None
) -> None:
    data = write(tmp_path / name, TEN_SECONDS, sound=sound, options=options)
    assert seconds(data, count) == pytest.approx(on_screen(TEN_SECONDS, 10, count), abs=0.16)


@pytest.mark.parametrize(
    ("kind", "sound"), [("mp4", 0), ("mp4", 60), ("mkv", 0), ("mkv", 60), ("flv", 0)]
)
@pytest.mark.parametrize("every", [1, 5, 7])
def test_slow_videos_are_whole(tmp_path: Path, kind: str, sound: int, every: int) -> None:
    times = [0.0, every, 2.0 * every]
    data = write(tmp_path / f"a.{kind}", times, rate=Fraction(1, every), sound=sound, b_frames=0)
    for count in (None, 3):
        assert seconds(data, count) == pytest.approx(times, abs=0.16)


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "h264"])
@pytest.mark.parametrize("count", [None, 1, 5])
def test_a_video_of_one_image(tmp_path: Path, kind: str, count: int | None) -> None:
    data = write(tmp_path / f"a.{kind}", [0.0])
    assert seconds(data, count) == pytest.approx([0.0], abs=0.16)


def test_a_still_image_is_a_video_of_one_frame() -> None:
    for kind in ("PNG", "GIF", "JPEG"):
        stream = io.BytesIO()
        Image.new("RGB", (64, 48), "red").save(stream, kind)
        assert sample_frames(stream, lambda image: image.size, 3) == ([(64, 48)], False)


@pytest.mark.parametrize("lengths", [(50, 50), (30, 90), (90, 30), (20, 100, 40)])
@pytest.mark.parametrize("starts", [(0, 0, 0), (200, 0, 5), (0, 1, 0)])
def test_joined_files_run_on(
    tmp_path: Path, lengths: tuple[int, ...], starts: tuple[int, ...]
) -> None:
    """Each file begins where the one before ends if its timestamps jump back."""
    parts = [
        write(tmp_path / f"{length}.ts", TEN_SECONDS[:length], start=start)
        for length, start in zip(lengths, starts, strict=False)
    ]
    joined = [time for length in lengths for time in TEN_SECONDS[:length]]
    instants = [index / 10 for index in range(len(joined))]
    for count in (None, 1, 2, 5, 9):
        expected = [joined[round(10 * t)] for t in on_screen(instants, len(joined) / 10, count)]
        assert seconds(b"".join(parts), count) == pytest.approx(expected, abs=0.16), count


CORNER = np.zeros((48, 64, 3), np.uint8)
CORNER[:24, :32] = 250, 0, 0


def corner_video(
    path: Path, matrix: tuple[int, int, int, int] = (1, 0, 0, 1), aspect: str = "1/1"
) -> bytes:
    """Return a video whose upper left quarter is red, with a display matrix (a, b, c, d)."""
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=10)
        assert isinstance(video, av.VideoStream)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv444p"
        video.options = {"x264-params": f"sar={aspect}:log-level=none"}
        file.mux(video.encode(av.VideoFrame.from_ndarray(CORNER, format="rgb24")))
        file.mux(video.encode(None))
    data = path.read_bytes()
    at = data.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


@pytest.mark.parametrize(
    ("matrix", "corner"),
    [
        ((1, 0, 0, 1), "upper left"),
        ((-1, 0, 0, 1), "upper right"),
        ((-1, 0, 0, -1), "lower right"),
        ((1, 0, 0, -1), "lower left"),
        ((0, 1, 1, 0), "upper left"),
        ((0, 1, -1, 0), "upper right"),
        ((0, -1, -1, 0), "lower right"),
        ((0, -1, 1, 0), "lower left"),
    ],
)
def test_display_matrices_rotate_and_mirror(
    tmp_path: Path, matrix: tuple[int, int, int, int], corner: str
) -> None:
    data = corner_video(tmp_path / "a.mp4", matrix)
    (image,), _ = sample_frames(io.BytesIO(data), lambda image: image)
    assert image.size == ((64, 48) if matrix[0] else (48, 64))
    pixels = np.asarray(image)[..., 0]
    half = pixels[: len(pixels) // 2] if "upper" in corner else pixels[len(pixels) // 2 :]
    middle = half.shape[1] // 2
    assert (half[:, :middle] if "left" in corner else half[:, middle:]).mean() > 200
    assert pixels.mean() < 80


@pytest.mark.parametrize(
    ("aspect", "size"),
    [("1/1", (64, 48)), ("2/1", (128, 48)), ("1/2", (64, 96)), ("64/45", (91, 48))],
)
def test_pixels_become_square(tmp_path: Path, aspect: str, size: tuple[int, int]) -> None:
    data = corner_video(tmp_path / "a.mp4", aspect=aspect)
    (image,), _ = sample_frames(io.BytesIO(data), lambda image: image)
    assert image.size == size
    quarter = np.asarray(image)[: size[1] // 2 - 2, : size[0] // 2 - 2, 0]
    assert quarter.mean() > 200
