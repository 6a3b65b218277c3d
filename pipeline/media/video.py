"""Sample the frames of videos: one a second by timestamp, or a number of evenly spread ones.

The frames before the damage of a damaged file are used.
"""

import bisect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.stream import Disposition
from PIL import Image
from PIL.Image import Transpose

from pipeline.media.errors import MediaError, one_line
from pipeline.media.images import check_size

MAX_SAMPLED_FRAMES = 128
"""Limit of the frames of one video when they are sampled once a second."""
MAX_FRAME_PIXELS = 36_000_000
"""Size limit of one frame. 8K has 33 million pixels; a decoder holds up to 17 frames."""

_SLACK = 2.0  # seconds: how long a last frame is shown, or the error of a header
_ROUNDING = 1e-6  # seconds: rounding of timestamps
_TURNS = {90: Transpose.ROTATE_90, 180: Transpose.ROTATE_180, 270: Transpose.ROTATE_270}


def describe_sampling(count: int | None) -> str:
    """Describe :func:`sample_frames` for a table's provenance."""
    if count is None:
        return (
            f"1 frame a second, at most {MAX_SAMPLED_FRAMES} and then evenly spread, upright, RGB"
        )
    return f"{count} evenly spread frames, upright, RGB"


def sample_frames(
    stream: BinaryIO, prepare: Callable[[Image.Image], Any], count: int | None = None
) -> tuple[list[Any], bool]:
    """Decode the sampled frames of a video and prepare each one as soon as it is decoded.

    The frame for second t is the first one shown at t or later, counted from the first frame of
    the video. A video of more than :data:`MAX_SAMPLED_FRAMES` seconds is sampled at a longer, even
    distance.

    Args:
        stream: The file, at its beginning.
        prepare: Converts a frame into the value to return. Frames themselves are not kept.
        count: If given, the number of frames: the video is divided into ``count`` equal
            stretches, and the first frame shown at the middle of each or later is taken. A video
            of fewer frames gives each of them once.

    Returns:
        The prepared frames, at least one, and True if the file is damaged. The frames of a
        damaged file are those before the damage.

    Raises:
        MediaError: No frame can be decoded.
    """
    prepared: list[Any] = []
    try:
        # FFmpeg would open the files and addresses that a playlist names.
        with av.open(stream, options={"protocol_whitelist": "none"}) as container:
            assert isinstance(container, InputContainer)
            for frame in _sampled(container, count):
                prepared.append(prepare(_to_image(frame)))
    except MediaError:
        raise
    except (av.FFmpegError, _DamagedError):
        if not prepared:
            raise MediaError("decode", "no frame can be decoded") from None
        return prepared, True
    except Exception as error:  # a decoder's bug on a hostile file must not stop the job
        raise MediaError("decode", one_line(error)) from None
    if not prepared:
        raise MediaError("decode", "no frame can be decoded")
    return prepared, False


class _DamagedError(Exception):
    """The file ends too early, or the decoder guesses the frames from here on."""


def _sampled(container: InputContainer, count: int | None) -> Iterator[av.VideoFrame]:
    """Yield the sampled frames in order; seek only where a keyframe lies ahead."""
    stream = _video_stream(container)
    stream.codec_context.thread_count = 1  # several videos are decoded at the same time instead
    # The size in the header may differ from the size of the frames.
    stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    keys = _keyframe_times(stream)
    length = _promised_seconds(container, stream)
    first, step = _sampling_times(container, length, count)
    start: float | None = None
    time = 0.0
    target, taken, position, has_sought = first, 0, 0, False
    frames = container.decode(stream)
    while (frame := next(frames, None)) is not None:
        position += 1
        time = frame.time if frame.time is not None else position / (stream.average_rate or 25)
        start = time if start is None else start
        if time - start < target - _ROUNDING:
            has_sought = False
            continue
        if has_sought and time - start > target + _ROUNDING:  # the index is wrong: use none
            keys, has_sought = [], False
            _seek(container, stream, start)
            frames = container.decode(stream)
            continue
        if frame.is_corrupt:
            raise _DamagedError
        yield frame
        taken += 1
        if taken == (count or MAX_SAMPLED_FRAMES):
            return
        passed = math.floor((time - start - first) / step + _ROUNDING)
        target = first + (passed + 1) * step
        # The index holds decoding times. Frames are shown later, by the delay of the first one.
        delay = start - keys[0] if keys else 0.0
        best = bisect.bisect_right(keys, start + target - delay + _ROUNDING)
        has_sought = best > bisect.bisect_right(keys, time - delay + _ROUNDING)
        if has_sought:
            _seek(container, stream, keys[best - 1] + delay)
            frames = container.decode(stream)
    if start is not None and time - start + _SLACK < length:
        raise _DamagedError


def _sampling_times(
    container: InputContainer, length: float, count: int | None
) -> tuple[float, float]:
    """Return the time of the first sampled frame and the distance to the next, in seconds."""
    duration = (container.duration or 0) / 1_000_000
    if count is None:
        return 0.0, max(1.0, duration / MAX_SAMPLED_FRAMES)
    span = length or duration
    if not span:
        raise MediaError("decode", "the length is missing from the file")
    return span / count / 2, span / count


def _promised_seconds(container: InputContainer, stream: av.VideoStream) -> float:
    """Return the seconds of video that the file's header promises, or 0 if it has none."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    # The duration of the file is that of its longest stream, which may be the sound.
    return 0.0 if container.streams.audio else (container.duration or 0) / 1_000_000


def _seek(container: InputContainer, stream: av.VideoStream, seconds: float) -> None:
    assert stream.time_base is not None
    container.seek(math.ceil(seconds / stream.time_base), stream=stream)


def _video_stream(container: InputContainer) -> av.VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            check_size(stream.codec_context.width, stream.codec_context.height, MAX_FRAME_PIXELS)
            return stream
    raise MediaError("decode", "no video stream")


def _keyframe_times(stream: av.VideoStream) -> list[float]:
    """Return the times of the keyframes in seconds; empty if the file has no index."""
    if stream.time_base is None:
        return []
    timestamps = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
    return sorted(float(timestamp * stream.time_base) for timestamp in timestamps)


def _to_image(frame: av.VideoFrame) -> Image.Image:
    check_size(frame.width, frame.height, MAX_FRAME_PIXELS)
    image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    turn = _TURNS.get(round(frame.rotation) % 360)  # counter-clockwise, as in Pillow
    return image if turn is None else image.transpose(turn)
