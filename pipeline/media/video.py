"""Clips as frames: one a second by timestamp, or so many evenly spread, upright.

A damaged file is used up to where it is damaged.
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

from pipeline.media.images import MediaError, check_size, one_line

MAX_FRAMES = 128
MAX_PIXELS = 36_000_000  # of one frame: 8K has 33 million, and a decoder holds up to 17 of them


def preprocessing(frames: int | None) -> str:
    """Say how :func:`sample` chooses, for a table's provenance."""
    if frames is None:
        return f"1 frame a second, at most {MAX_FRAMES} and then evenly spread, upright, RGB"
    return f"{frames} evenly spread frames, upright, RGB"


_SLACK = 2.0  # seconds that a last frame is shown, or that a header errs
_TICK = 1e-6  # seconds; rounding of timestamps
_TURNS = {90: Transpose.ROTATE_90, 180: Transpose.ROTATE_180, 270: Transpose.ROTATE_270}


def sample(
    stream: BinaryIO, prepare: Callable[[Image.Image], Any], count: int | None = None
) -> tuple[list[Any], bool]:
    """Decode the sampled frames of a clip, and prepare each at once, so that none is kept whole.

    The frame for second t is the first one shown at t or later, counted from the clip's first
    frame. A clip of more than ``MAX_FRAMES`` seconds is sampled at a longer, even distance.

    Args:
        stream: The file, at its beginning.
        prepare: What becomes of a frame.
        count: Take so many frames instead, the first one shown at the middle or later of each of
            ``count`` equal stretches of the clip; a clip of fewer frames gives each once.

    Returns:
        The prepared frames, at least one, and whether the file is damaged: then they are those
        before the damage.

    Raises:
        MediaError: Not one frame can be decoded.
    """
    prepared: list[Any] = []
    try:
        # A playlist is a clip to FFmpeg too, and would have it open other files and addresses.
        with av.open(stream, options={"protocol_whitelist": "none"}) as container:
            assert isinstance(container, InputContainer)
            for frame in _frames(container, count):
                prepared.append(prepare(_picture(frame)))
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
    """From here on, frames are guesses of the decoder, or the file ends too early."""


def _frames(container: InputContainer, count: int | None) -> Iterator[av.VideoFrame]:
    """Give the sampled frames in order, seeking only when a keyframe lies ahead."""
    stream = _stream(container)
    stream.codec_context.thread_count = 1  # clips are decoded side by side instead
    # The size in the header may not be the one that frames turn out to have.
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    keys = _keys(stream)
    length = _length(container, stream)
    span = length or (container.duration or 0) / 1_000_000
    if count is not None and not span:
        raise MediaError("decode", "the file does not say how long it is")
    step = max(1.0, (container.duration or 0) / 1_000_000 / MAX_FRAMES)
    step, first = (step, 0.0) if count is None else (span / count, span / count / 2)
    start: float | None = None
    time = 0.0
    wanted, taken, position, sought = first, 0, 0, False
    frames = container.decode(stream)
    while (frame := next(frames, None)) is not None:
        position += 1
        time = frame.time if frame.time is not None else position / (stream.average_rate or 25)
        start = time if start is None else start
        if time - start < wanted - _TICK:
            sought = False
            continue
        if sought and time - start > wanted + _TICK:  # too far: the index is not what it seems
            keys, sought = [], False
            _seek(container, stream, start)
            frames = container.decode(stream)
            continue
        if frame.is_corrupt:
            raise _DamagedError
        yield frame
        taken += 1
        if taken == (count or MAX_FRAMES):
            return
        wanted = first + (math.floor((time - start - first) / step + _TICK) + 1) * step
        # The index knows when keyframes are decoded; shown they are later, by as much as the first.
        delay = start - keys[0] if keys else 0.0
        best = bisect.bisect_right(keys, start + wanted - delay + _TICK)
        sought = best > bisect.bisect_right(keys, time - delay + _TICK)
        if sought:
            _seek(container, stream, keys[best - 1] + delay)
            frames = container.decode(stream)
    if start is not None and time - start + _SLACK < length:
        raise _DamagedError


def _length(container: InputContainer, stream: av.VideoStream) -> float:
    """Seconds of pictures that the file promises, 0 when it promises nothing."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    told = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
    if told:
        return int(told[1]) * 3600 + int(told[2]) * 60 + float(told[3])
    # The file's is that of its longest stream, which may be sound.
    return 0.0 if container.streams.audio else (container.duration or 0) / 1_000_000


def _seek(container: InputContainer, stream: av.VideoStream, seconds: float) -> None:
    assert stream.time_base is not None
    container.seek(math.ceil(seconds / stream.time_base), stream=stream)


def _stream(container: InputContainer) -> av.VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            check_size(stream.codec_context.width, stream.codec_context.height, MAX_PIXELS)
            return stream
    raise MediaError("decode", "no video stream")


def _keys(stream: av.VideoStream) -> list[float]:
    """Times of the keyframes, where the file has an index of them."""
    if stream.time_base is None:
        return []
    found = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
    return sorted(float(timestamp * stream.time_base) for timestamp in found)


def _picture(frame: av.VideoFrame) -> Image.Image:
    check_size(frame.width, frame.height, MAX_PIXELS)
    picture: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    turn = _TURNS.get(round(frame.rotation) % 360)  # counter-clockwise, as Pillow's are
    return picture if turn is None else picture.transpose(turn)
