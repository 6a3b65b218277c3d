import io
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.backbones.base import InputBatch
from pipeline.backbones.hashed import Hashed
from pipeline.extraction.job import extract
from pipeline.extraction.options import Options
from pipeline.media import video
from pipeline.media.images import MediaError
from pipeline.media.video import sample
from tests.pipeline.backbones.tiny import prepare

Pixels = npt.NDArray[np.uint8]


def clip(
    path: Path, *, frames: int, fps: int = 25, gop: int = 250, b_frames: int = 2, jumps: int = 0,
    size: tuple[int, int] = (64, 48), noise: int = 1,
) -> Path:  # fmt: skip
    """Write a clip whose frame i is grey of shade 2 + 2 i (up to 250, then again), and noise."""
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
            picture = np.full((size[1], size[0], 3), shade(index), np.uint8)
            picture += random.randint(0, noise, picture.shape, dtype=np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = index + jumps * (index // 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def shade(index: int) -> int:
    return 2 + 2 * (index % 125)


def shades(path: Path) -> list[int]:
    """Which frames were sampled, told by their shade."""
    with path.open("rb") as stream:
        found, partial = sample(stream, lambda picture: round(float(np.asarray(picture).mean())))
    assert not partial
    return found


def near(found: list[int], expected: list[int]) -> bool:
    return len(found) == len(expected) and np.abs(np.subtract(found, expected)).max() <= 1


@pytest.mark.parametrize("fps", [10, 24, 30])
def test_one_frame_a_second(tmp_path: Path, fps: int) -> None:
    path = clip(tmp_path / "a.mp4", frames=3 * fps + 1, fps=fps)
    assert near(shades(path), [shade(index) for index in (0, fps, 2 * fps, 3 * fps)])


def test_the_clock_counts_and_not_the_frames(tmp_path: Path) -> None:
    # Ten frames a second, and after every ten of them a pause of three seconds.
    path = clip(tmp_path / "a.mkv", frames=30, fps=10, jumps=30)
    # Seconds 0 (frame 0), 4 (frame 10) and 8 (frame 20); nothing is shown in between.
    assert near(shades(path), [shade(0), shade(10), shade(20)])


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("gop", [5, 20, 25, 40])
def test_seeking_changes_nothing_but_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gop: int, b_frames: int
) -> None:
    path = clip(tmp_path / "a.mp4", frames=121, fps=20, gop=gop, b_frames=b_frames)
    sought: list[float] = []
    plain: Callable[..., None] = video._seek

    def seek(container: object, stream: object, seconds: float) -> None:
        sought.append(seconds)
        plain(container, stream, seconds)

    monkeypatch.setattr(video, "_seek", seek)
    with_seeking = shades(path)
    assert bool(sought)
    monkeypatch.setattr(video, "_keys", lambda stream: [])
    assert near(with_seeking, [shade(index) for index in range(0, 121, 20)])
    assert with_seeking == shades(path)


def test_a_long_clip_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_FRAMES", 4)
    path = clip(tmp_path / "a.mp4", frames=80, fps=10)  # 8 seconds: every 2 of them
    assert near(shades(path), [shade(index) for index in (0, 20, 40, 60)])


def test_a_clip_is_used_up_to_the_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(clip(tmp_path / "a.mkv", frames=100, fps=10, gop=10).read_bytes())
    del data[int(len(data) * 0.55) :]
    found, partial = sample(
        io.BytesIO(data), lambda picture: round(float(np.asarray(picture).mean()))
    )
    assert 3 <= len(found) <= 8
    assert partial
    assert near(found, [shade(10 * second) for second in range(len(found))])
    with pytest.raises(MediaError, match="no frame can be decoded"):
        sample(io.BytesIO(bytes(data[:300])), lambda picture: None)


def cut(data: bytes, share: float) -> tuple[int, bool]:
    found, partial = sample(io.BytesIO(data[: int(len(data) * share)]), lambda picture: 0)
    return len(found), partial


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_a_file_that_ends_too_early_is_partial(tmp_path: Path, kind: str) -> None:
    plain = clip(tmp_path / f"a.{kind}", frames=100, fps=10, gop=10, noise=50)
    if kind == "mp4":  # its index stands at the end, unless it is put first
        with av.open(str(plain)) as old, av.open(
            str(tmp_path / "b.mp4"), "w", options={"movflags": "faststart"}
        ) as new:  # fmt: skip
            to = new.add_stream_from_template(old.streams.video[0])
            for packet in old.demux(video=0):
                if packet.dts is not None:
                    packet.stream = to
                    new.mux(packet)
        plain = tmp_path / "b.mp4"
    data = plain.read_bytes()
    assert cut(data, 1.0) == (10, False)
    count, partial = cut(data, 0.6)
    # An AVI without its end is taken for a shorter one: nothing at its beginning tells.
    assert partial == (kind != "avi")
    assert 3 <= count <= 8


def test_what_is_no_clip_has_a_reason(tmp_path: Path) -> None:
    for data in (b"hello", bytes(1000), b"<html>" * 100):
        with pytest.raises(MediaError) as caught:
            sample(io.BytesIO(data), lambda picture: None)
        assert (caught.value.stage, caught.value.reason) == ("decode", "no frame can be decoded")
    with av.open(str(tmp_path / "sound.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
    with (
        (tmp_path / "sound.wav").open("rb") as sound,
        pytest.raises(MediaError, match="no video stream"),
    ):
        sample(sound, lambda picture: None)


def test_a_playlist_cannot_name_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip(tmp_path / "secret.mp4", frames=5)
    monkeypatch.chdir(tmp_path)
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"
    for text in ("ffconcat version 1.0\nfile secret.mp4\n", hls):
        with pytest.raises(MediaError):
            sample(io.BytesIO(text.encode()), lambda picture: None)


def test_frames_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_PIXELS", 3000)
    path = clip(tmp_path / "a.mp4", frames=2)
    with path.open("rb") as stream, pytest.raises(MediaError, match="megapixels"):
        sample(stream, lambda picture: None)


def test_a_clip_is_the_mean_of_its_frames(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    clip(raw / "a.mp4", frames=60, fps=10)
    clip(raw / "b.mp4", frames=15, fps=10)
    (raw / "c.mp4").write_bytes(b"no clip")
    info = prepare(
        warehouse, raw, ids=list("abcde"), video=["a.mp4", "b.mp4", "c.mp4", None, "a.mp4"]
    )
    # Batches of 4 frames: clip a spans two of them, and its end shares one with clip b.
    report = extract(warehouse, "tiny", Options(video="hashed", batch_size=4)).tables[0]
    assert (report.encoded, report.shared, report.absent) == (2, 1, 1)
    assert report.failed == {"no frame can be decoded": 1}
    table = FeatureStore(warehouse).table("tiny", "hashed", "video")
    matrix = table.read(info.items, info.fingerprint, info.inputs["video"])
    assert matrix.present.tolist() == [True, True, False, False, True]
    assert table.light().sort_by("item")["n_frames"].to_pylist() == [6, 2, 6]
    assert (matrix.vectors[0] == matrix.vectors[4]).all()
    backbone = Hashed()
    for item, name in enumerate(["a.mp4", "b.mp4"]):
        with (raw / name).open("rb") as stream:
            frames, _ = sample(stream, backbone.image)
        mean = backbone.embed(InputBatch(images=frames)).mean(axis=0)
        assert np.abs(matrix.vectors[item] - mean).max() < 1e-3
    assert matrix.provenance.preprocessing.startswith("1 frame a second, at most 128")
    assert matrix.provenance.pooling.endswith("mean over frames")


@pytest.mark.slow
def test_every_odd_clip_gives_frames_or_a_reason(real_data: Path) -> None:
    lengths: dict[str, tuple[int, bool]] = {}
    sizes: dict[str, tuple[int, int]] = {}

    def size(picture: Image.Image) -> tuple[int, int]:
        assert picture.mode == "RGB"
        return picture.size

    for path in sorted((real_data / "weird" / "videos").iterdir()):
        with path.open("rb") as stream:
            found, partial = sample(stream, size)
        lengths[path.name] = (len(found), partial)
        sizes[path.name] = found[0]
    assert lengths["decord_corrupted.mp4"] == (3, True)  # damaged after 2.8 of 5 seconds
    assert sum(partial for _, partial in lengths.values()) == 1
    assert lengths["archery.mp4"] == (10, False)  # 29.97 frames a second
    assert lengths["mmaction_test.avi"] == (7, False)
    assert sizes["decord_video_0.mov"] == sizes["decord_video_180.mov"] == (568, 320)
    assert sizes["decord_video_270.mov"] == (320, 568)


@pytest.mark.parametrize("gop", [5, 250])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_so_many_frames_evenly_spread(tmp_path: Path, count: int, gop: int) -> None:
    path = clip(tmp_path / "a.mp4", frames=120, fps=10, gop=gop)
    with path.open("rb") as stream:
        found, _ = sample(stream, lambda one: round(float(np.asarray(one).mean())), count)
    step = 120 / count  # the middle of each stretch, and the frame shown then or next
    assert near(found, [shade(int(np.ceil(step * (i + 0.5)))) for i in range(count)])


def test_a_short_clip_gives_each_frame_once(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", frames=5, fps=10)
    with path.open("rb") as stream:
        found, _ = sample(stream, lambda one: round(float(np.asarray(one).mean())), 12)
    assert len(found) == len(set(found)) <= 5
    assert len(found) >= 4
