import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from features.store import FeatureStore
from features.warehouse import Warehouse
from pipeline.backbones.base import InputBatch
from pipeline.backbones.hashed import Hashed
from pipeline.extraction.job import extract_features
from pipeline.extraction.options import ExtractOptions
from pipeline.media import video
from pipeline.media.errors import MediaError
from pipeline.media.video import sample_frames
from tests.pipeline.backbones.tiny import prepare
from tests.pipeline.media.videos import shade, write_video


def brightness(image: Image.Image) -> int:
    return round(float(np.asarray(image).mean()))


def shades(path: Path) -> list[int]:
    """Return the shades of the sampled frames."""
    with path.open("rb") as stream:
        frames, partial = sample_frames(stream, brightness)
    assert not partial
    return frames


def near(frames: list[int], expected: list[int]) -> bool:
    return len(frames) == len(expected) and np.abs(np.subtract(frames, expected)).max() <= 1


@pytest.mark.parametrize("fps", [10, 24, 30])
def test_one_frame_a_second(tmp_path: Path, fps: int) -> None:
    path = write_video(tmp_path / "a.mp4", frames=3 * fps + 1, fps=fps)
    assert near(shades(path), [shade(index) for index in (0, fps, 2 * fps, 3 * fps)])


def test_the_clock_counts_and_not_the_frames(tmp_path: Path) -> None:
    # Ten frames a second, and after every ten of them a pause of three seconds.
    path = write_video(tmp_path / "a.mkv", frames=30, fps=10, jumps=30)
    # In seconds 1 to 3 frame 9 is on screen, in 5 to 7 frame 19. Each frame is taken once.
    assert near(shades(path), [shade(index) for index in (0, 9, 10, 19, 20)])


class CountedReader(io.BytesIO):
    """A file that counts the bytes that are read from it."""

    n_read = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.n_read += len(data)
        return data


@pytest.mark.parametrize("b_frames", [0, 2])
@pytest.mark.parametrize("gop", [5, 20, 25, 40])
def test_seeking_reads_less_and_gives_the_same_frames(
    tmp_path: Path, gop: int, b_frames: int
) -> None:
    path = write_video(
        tmp_path / "a.mp4", frames=121, fps=20, gop=gop, b_frames=b_frames, noise=90, size=(96, 64)
    )
    with av.open(str(path)) as container:
        every_shade = [brightness(frame.to_image()) for frame in container.decode(video=0)]  # type: ignore[no-untyped-call]
    file = CountedReader(path.read_bytes())
    frames, partial = sample_frames(file, brightness)
    assert frames == every_shade[::20]
    assert not partial
    assert file.n_read < 0.9 * path.stat().st_size


def test_a_long_video_is_sampled_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_SAMPLED_FRAMES", 4)
    path = write_video(tmp_path / "a.mp4", frames=80, fps=10)  # 8 seconds: every 2 of them
    assert near(shades(path), [shade(index) for index in (0, 20, 40, 60)])


def test_a_video_is_used_up_to_the_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray(write_video(tmp_path / "a.mkv", frames=100, fps=10, gop=10).read_bytes())
    del data[int(len(data) * 0.55) :]
    frames, partial = sample_frames(io.BytesIO(data), brightness)
    assert 3 <= len(frames) <= 8
    assert partial
    assert near(frames, [shade(10 * second) for second in range(len(frames))])
    with pytest.raises(MediaError, match="no frame can be decoded"):
        sample_frames(io.BytesIO(bytes(data[:300])), lambda image: None)


def cut(data: bytes, share: float) -> tuple[int, bool]:
    frames, partial = sample_frames(io.BytesIO(data[: int(len(data) * share)]), lambda image: 0)
    return len(frames), partial


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi"])
def test_a_file_that_ends_too_early_is_partial(tmp_path: Path, kind: str) -> None:
    plain = write_video(tmp_path / f"a.{kind}", frames=100, fps=10, gop=10, noise=50)
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


def test_what_is_no_video_has_a_reason(tmp_path: Path) -> None:
    for data in (b"hello", bytes(1000), b"<html>" * 100):
        with pytest.raises(MediaError) as caught:
            sample_frames(io.BytesIO(data), lambda image: None)
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
        sample_frames(sound, lambda image: None)


def test_a_playlist_cannot_name_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_video(tmp_path / "secret.mp4", frames=5)
    monkeypatch.chdir(tmp_path)
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mp4\n#EXT-X-ENDLIST\n"
    for text in ("ffconcat version 1.0\nfile secret.mp4\n", hls):
        with pytest.raises(MediaError):
            sample_frames(io.BytesIO(text.encode()), lambda image: None)


def test_frames_too_large_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 3000)
    path = write_video(tmp_path / "a.mp4", frames=2)
    with path.open("rb") as stream, pytest.raises(MediaError, match="megapixels"):
        sample_frames(stream, lambda image: None)


def test_a_video_is_the_mean_of_its_frames(warehouse: Warehouse, tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    write_video(raw / "a.mp4", frames=60, fps=10)
    write_video(raw / "b.mp4", frames=15, fps=10)
    (raw / "c.mp4").write_bytes(b"no video")
    info = prepare(
        warehouse, raw, ids=list("abcde"), video=["a.mp4", "b.mp4", "c.mp4", None, "a.mp4"]
    )
    # Batches of 4 frames: video a spans two of them, and its end shares one with video b.
    report = extract_features(
        warehouse, "tiny", ExtractOptions(video="hashed", batch_size=4)
    ).tables[0]
    assert (report.encoded, report.shared, report.absent) == (2, 1, 1)
    assert report.failed == {"no frame can be decoded": 1}
    table = FeatureStore(warehouse).table("tiny", "hashed", "video")
    matrix = table.read(info.items, info.fingerprint, info.inputs["video"])
    assert matrix.present.tolist() == [True, True, False, False, True]
    assert table.small_columns().sort_by("item")["n_frames"].to_pylist() == [6, 2, 6]
    assert (matrix.vectors[0] == matrix.vectors[4]).all()
    backbone = Hashed()
    for item, name in enumerate(["a.mp4", "b.mp4"]):
        with (raw / name).open("rb") as stream:
            frames, _ = sample_frames(stream, backbone.image)
        mean = backbone.embed(InputBatch(images=frames)).mean(axis=0)
        assert np.abs(matrix.vectors[item] - mean).max() < 1e-3
    assert matrix.provenance.preprocessing.startswith("1 frame a second, at most 128")
    assert matrix.provenance.pooling.endswith("mean over frames")


@pytest.mark.slow
def test_every_odd_video_gives_frames_or_a_reason(real_data: Path) -> None:
    lengths: dict[str, tuple[int, bool]] = {}
    sizes: dict[str, tuple[int, int]] = {}

    def size(image: Image.Image) -> tuple[int, int]:
        assert image.mode == "RGB"
        return image.size

    for path in sorted((real_data / "weird" / "videos").iterdir()):
        with path.open("rb") as stream:
            frames, partial = sample_frames(stream, size)
        lengths[path.name] = (len(frames), partial)
        sizes[path.name] = frames[0]
    assert lengths["decord_corrupted.mp4"] == (3, True)  # damaged after 2.8 of 5 seconds
    assert sum(partial for _, partial in lengths.values()) == 1
    assert lengths["archery.mp4"] == (11, False)  # 29.97 frames a second, 10.01 seconds
    assert lengths["mmaction_test.avi"] == (7, False)
    assert sizes["decord_video_0.mov"] == sizes["decord_video_180.mov"] == (568, 320)
    assert sizes["decord_video_270.mov"] == (320, 568)


@pytest.mark.parametrize("gop", [5, 250])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_so_many_frames_evenly_spread(tmp_path: Path, count: int, gop: int) -> None:
    path = write_video(tmp_path / "a.mp4", frames=120, fps=10, gop=gop)
    with path.open("rb") as stream:
        frames, _ = sample_frames(stream, brightness, count)
    step = 120 / count  # the middle of each stretch, and the frame on screen then
    assert near(frames, [shade(int(step * (i + 0.5))) for i in range(count)])


def test_a_short_video_gives_each_frame_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", frames=5, fps=10)
    with path.open("rb") as stream:
        frames, _ = sample_frames(stream, brightness, 12)
    assert len(frames) == len(set(frames)) <= 5
    assert len(frames) >= 4
