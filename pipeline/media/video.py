"""Sample the frames of videos: one a second by timestamp, or a number of evenly spread ones.

The sampled frame of a time is the one on screen then: the last frame shown at that time or before.
The frames before the damage of a damaged file are used.
"""

import math
import struct
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, BinaryIO

import av
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from PIL import Image
from PIL.Image import Transpose

from pipeline.media.errors import MediaError, one_line
from pipeline.media.images import check_size
from pipeline.media.video_times import (
    DisorderedError,
    KeyframeIndex,
    SamplingTimes,
    TimedFrame,
    decoding_times,
    last_interval,
    open_video,
    timed_frames,
    video_lengths,
)

MAX_SAMPLED_FRAMES = 128
"""Limit of the frames of one video when they are sampled once a second."""
MAX_FRAME_PIXELS = 36_000_000
"""Size limit of one frame. 8K has 33 million pixels; a decoder holds up to 17 frames."""

_SLACK = 2.0  # seconds: the error of a header
_ROUNDING = 1e-6  # seconds: rounding of timestamps
_END_ROUNDING = 2e-3  # seconds: rounding of the duration of a frame, of which Matroska stores ms
_TURNS = {
    # How a display matrix maps (x, y): the signs of x to x, x to y, y to x and y to y.
    (-1, 0, 0, 1): Transpose.FLIP_LEFT_RIGHT,
    (-1, 0, 0, -1): Transpose.ROTATE_180,
    (1, 0, 0, -1): Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Transpose.TRANSPOSE,
    (0, -1, 1, 0): Transpose.ROTATE_90,
    (0, -1, -1, 0): Transpose.TRANSVERSE,
    (0, 1, -1, 0): Transpose.ROTATE_270,
}


def describe_sampling(count: int | None) -> str:
    """Describe :func:`sample_frames` for a table's provenance."""
    frames = f"{count} evenly spread frames"
    if count is None:
        frames = f"1 frame a second, at most {MAX_SAMPLED_FRAMES} and then evenly spread"
    return f"{frames}, the one on screen then, each once, upright, square pixels, RGB"


def sample_frames(
    stream: BinaryIO, prepare: Callable[[Image.Image], Any], count: int | None = None
) -> tuple[list[Any], bool]:
    """Decode the sampled frames of a video and prepare each one as soon as it is decoded.

    The frame for second t is the one on screen t seconds after the first frame of the video. A
    frame that is on screen at several of the sampled times is taken once. A video of more than
    :data:`MAX_SAMPLED_FRAMES` seconds is sampled at a longer, even distance.

    Args:
        stream: The file, at its beginning.
        prepare: Converts a frame into the value to return. Frames themselves are not kept.
        count: If given, the number of frames: the video is divided into ``count`` equal
            stretches, and the frame on screen at the middle of each is taken.

    Returns:
        The prepared frames, at least one, and True if the file is damaged. The frames of a
        damaged file are those before the damage.

    Raises:
        MediaError: No frame can be decoded.
    """
    prepared: list[Any] = []

    def sample(times: list[float] | None) -> None:
        prepared.clear()
        with open_video(stream) as container:
            video = _video_stream(container)
            aspect = video.sample_aspect_ratio
            for frame in _sampled(container, video, stream, count, times):
                prepared.append(prepare(_to_image(frame, aspect)))

    try:
        try:
            sample(None)
        except DisorderedError:
            sample(decoding_times(stream))
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


def _sampled(
    container: InputContainer,
    stream: av.VideoStream,
    file: BinaryIO,
    count: int | None,
    times: list[float] | None,
) -> Iterator[av.VideoFrame]:
    """Yield the sampled frames in order; seek only where a keyframe lies ahead.

    The file is read a second time if its header does not tell the length. The times of all frames
    are given if their timestamps are out of order.
    """
    length, promised = video_lengths(container, stream, file, times)
    targets = SamplingTimes(length, count, MAX_SAMPLED_FRAMES)
    index = KeyframeIndex(stream, is_used=times is None)
    frames = timed_frames(container, stream, times)
    start: float | None = None
    current: TimedFrame | None = None
    end, last_taken, has_sought = 0.0, -1.0, False
    while True:
        following = next(frames, None)
        if has_sought and start is not None and not _reaches(following, start + targets.time):
            index.clear()  # it is wrong
            has_sought = False
            frames = _sought(container, stream, start)
            continue
        if following is None:
            break
        has_sought = False
        start = following.time if start is None else start
        shown, end = following.time - start, following.end - start
        index_before = targets.index
        if current is not None and shown > targets.time + _ROUNDING:
            if current.time - start > last_taken:
                yield _intact(current)
                last_taken = current.time - start
            targets.skip_to(shown - _ROUNDING)
        current = following
        if targets.index < targets.count and shown >= targets.time - _ROUNDING:
            yield _intact(current)
            last_taken = shown
            targets.index += 1
        if targets.index >= targets.count:
            return
        if targets.index > index_before:
            key = index.key_between(start, shown, targets.time)
            if key is not None:
                frames = _sought(container, stream, key)
                has_sought, current = True, None
    is_damaged = end + _SLACK < promised and end + last_interval(file) + _SLACK < promised
    last = end if is_damaged else max(end, length)
    is_shown = targets.time < last - _END_ROUNDING
    if current is not None and start is not None and is_shown and current.time - start > last_taken:
        yield _intact(current)
    if is_damaged:
        raise _DamagedError


def _reaches(first: TimedFrame | None, target: float) -> bool:
    """Return whether the first frame after a seek is shown at the target or before."""
    return first is not None and first.time <= target + _ROUNDING


def _intact(timed: TimedFrame) -> av.VideoFrame:
    if timed.frame.is_corrupt:
        raise _DamagedError
    return timed.frame


def _sought(
    container: InputContainer, stream: av.VideoStream, seconds: float
) -> Iterator[TimedFrame]:
    assert stream.time_base is not None
    container.seek(math.ceil(seconds / stream.time_base), stream=stream)
    return timed_frames(container, stream, None)


def _video_stream(container: InputContainer) -> av.VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            check_size(stream.codec_context.width, stream.codec_context.height, MAX_FRAME_PIXELS)
            stream.codec_context.thread_count = 1  # several videos are decoded at a time instead
            # The size in the header may differ from the size of the frames.
            stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
            return stream
    raise MediaError("decode", "no video stream")


def _to_image(frame: av.VideoFrame, aspect: Fraction | None) -> Image.Image:
    """Return a frame in RGB, upright, with square pixels.

    Args:
        frame: The decoded frame.
        aspect: Width of a pixel over its height, or None for square ones.
    """
    width, height = frame.width, frame.height
    check_size(width, height, MAX_FRAME_PIXELS)
    if aspect is not None and aspect > 0:  # the shorter side of a pixel grows
        ratio = float(aspect)
        width, height = round(width * max(ratio, 1.0)), round(height * max(1 / ratio, 1.0))
        check_size(width, height, MAX_FRAME_PIXELS)
    image: Image.Image = frame.to_image(width=width, height=height)  # type: ignore[no-untyped-call]
    turn = _turn(frame)
    return image if turn is None else image.transpose(turn)


def _turn(frame: av.VideoFrame) -> Transpose | None:
    """Return the rotation or mirroring that is nearest to the display matrix of a frame."""
    side_data: Any = frame.side_data  # PyAV declares a mapping, and iterates over the values
    for data in side_data:
        if data.type == SideDataType.DISPLAYMATRIX:
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
            is_upright = abs(a) + abs(d) >= abs(b) + abs(c)
            a, b, c, d = ((value > 0) - (value < 0) for value in (a, b, c, d))
            return _TURNS.get((a, 0, 0, d) if is_upright else (0, b, c, 0))
    return None
