"""Find the times at which the frames of a video are shown, and those at which it is sampled.

All times are in seconds. Containers count them from different beginnings, and some have none.
"""

import bisect
import contextlib
import heapq
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import av
from av.container import InputContainer

_ROUNDING = 1e-6  # seconds: rounding of timestamps
_HEADER_ERROR = 2.0  # seconds
_EXACT_FORMATS = ("mov", "avi", "mpegts")
"""Formats whose streams have durations that count from the first frame."""
_MOST_GAP = 13 * 3600.0
"""Seconds between two frames from which on FFmpeg has taken an earlier time for a later one.

Where the timestamps of a transport stream jump back, FFmpeg adds their range, 26.5 hours."""
_DEFAULT_RATE = 25  # frames a second, where neither the file nor the codec names a rate


class DisorderedError(Exception):
    """The timestamps of the frames are missing or run backwards."""


@dataclass(frozen=True, slots=True)
class TimedFrame:
    """A decoded frame, the time from which it is shown and the time at which that ends."""

    time: float
    end: float
    frame: av.VideoFrame


class SamplingTimes:
    """The times at which a video is sampled, counted from its first frame.

    Args:
        length: Length of the video.
        count: If given, the number of times: the middles of equal stretches. Otherwise each
            second, or a longer distance in a video of more than ``limit`` seconds.
        limit: Largest number of times if ``count`` is None.
    """

    def __init__(self, length: float, count: int | None, limit: int) -> None:
        self._step = max(1.0, length / limit) if count is None else max(length / count, _ROUNDING)
        self._first = 0.0 if count is None else self._step / 2
        self.count = limit if count is None else count
        self.index = 0

    @property
    def time(self) -> float:
        """Return the current time."""
        return self._first + self.index * self._step

    def skip_to(self, time: float) -> None:
        """Make the first time that is not before ``time`` the current one."""
        self.index = max(self.index, math.ceil((time - self._first) / self._step))


class KeyframeIndex:
    """The times of the keyframes by the index of the file; none if it has no index.

    Args:
        stream: Stream of images.
        is_used: False for a file whose timestamps cannot be sought.
    """

    def __init__(self, stream: av.VideoStream, is_used: bool) -> None:
        self._times: list[float] = []
        if is_used and stream.time_base is not None:
            keys = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe]
            self._times = sorted(float(key * stream.time_base) for key in keys)

    def clear(self) -> None:
        """Forget the keyframes."""
        self._times = []

    def key_between(self, start: float, shown: float, target: float) -> float | None:
        """Return the timestamp of the last keyframe after ``shown`` and not after ``target``.

        Args:
            start: Timestamp of the first frame.
            shown: Time from the first frame.
            target: Time from the first frame.
        """
        if not self._times:
            return None
        # The index holds decoding times. Frames are shown later, by the delay of the first one.
        delay = start - self._times[0]
        first = bisect.bisect_right(self._times, start + shown - delay + _ROUNDING)
        last = bisect.bisect_right(self._times, start + target - delay + _ROUNDING)
        return self._times[last - 1] + delay if last > first else None


@contextmanager
def open_video(file: BinaryIO) -> Iterator[InputContainer]:
    """Open a video from its beginning; the file is at its former position afterwards."""
    position = file.tell()
    file.seek(0)
    try:
        # FFmpeg would open the files and addresses that a playlist names.
        with av.open(file, options={"protocol_whitelist": "none"}) as container:
            assert isinstance(container, InputContainer)
            yield container
    finally:
        file.seek(position)


def timed_frames(
    container: InputContainer, stream: av.VideoStream, times: list[float] | None
) -> Iterator[TimedFrame]:
    """Yield the frames from the position of the container on, in the order in which they are shown.

    Args:
        container: The opened file.
        stream: Its stream of images.
        times: Times of all frames, instead of their timestamps.

    Raises:
        DisorderedError: Without ``times``, a timestamp is missing or runs backwards.
    """
    step = _frame_seconds(stream)
    previous = -math.inf
    for position, frame in enumerate(container.decode(stream)):
        if times is None:
            if frame.time is None or frame.time < previous - _ROUNDING:
                raise DisorderedError
            time = frame.time
        else:
            time = times[position] if position < len(times) else previous + step
        duration = step
        if frame.duration and frame.time_base is not None:
            duration = float(frame.duration * frame.time_base)
        yield TimedFrame(time, time + duration, frame)
        previous = time


def video_lengths(
    container: InputContainer, stream: av.VideoStream, file: BinaryIO, times: list[float] | None
) -> tuple[float, float]:
    """Return the length of a video, and the one that its header promises, or 0 if it has none.

    Args:
        container: The opened file.
        stream: Its stream of images.
        file: The file. It is read again if the header does not tell the length.
        times: Times of all frames, if their timestamps are out of order.

    Raises:
        DisorderedError: Without ``times``, the timestamps of a transport stream jump.
    """
    base = stream.time_base
    header = _header_seconds(container, stream)
    # A transport stream has no length. FFmpeg subtracts its first timestamp from its last.
    is_guessed = container.format.name == "mpegts"
    if times:
        return times[-1] - times[0] + _frame_seconds(stream), 0.0 if is_guessed else header
    if is_guessed:
        _check_order(file)
    if header and (container.format.name.startswith(_EXACT_FORMATS) or not stream.start_time):
        return header, header
    start, end = _scanned_range(file)
    if not header or base is None:
        return end - start, 0.0
    # The duration counts from 0 or from the first frame: writers differ.
    promised = header - start if end <= header + _HEADER_ERROR else header
    is_near = abs(end - start - promised) <= _HEADER_ERROR
    return end - start if is_near else promised, promised


def decoding_times(file: BinaryIO) -> list[float]:
    """Return the times at which packets are decoded, which never run backwards.

    Decoders emit frames in the order in which they are shown, so the time of the k-th frame is
    that of the k-th packet, apart from a delay that is the same for all.
    """
    times: list[float] = []
    offset = 0.0
    for packet, step in _packets(file):
        time = None if packet.dts is None else float(packet.dts * packet.time_base)
        if times and (time is None or not 0 < time + offset - times[-1] < _MOST_GAP):
            following = times[-1] + step
            offset = offset if time is None else following - time
            times.append(following)
        else:
            times.append((time or 0.0) + offset)
    return times


def _check_order(file: BinaryIO) -> None:
    """Check that the times at which packets are decoded ascend without a jump.

    Raises:
        DisorderedError: They do not, as in a file that is several files joined.
    """
    previous: float | None = None
    for packet, _ in _packets(file):
        if packet.dts is not None:
            time = float(packet.dts * packet.time_base)
            if previous is not None and not 0 <= time - previous < _MOST_GAP:
                raise DisorderedError
            previous = time


def last_interval(file: BinaryIO) -> float:
    """Return the seconds between the last two frames, by the timestamps of all packets.

    Some containers do not store the duration of a frame.
    """
    times = [float(packet.pts * packet.time_base) for packet, _ in _packets(file) if packet.pts]
    last = heapq.nlargest(2, times)
    return last[0] - last[1] if len(last) == 2 else 0.0


def _scanned_range(file: BinaryIO) -> tuple[float, float]:
    """Return the time of the first frame and the end of the last, by all packets of the file."""
    start, end, position = math.inf, -math.inf, 0.0
    for packet, step in _packets(file):
        time = position if packet.pts is None else float(packet.pts * packet.time_base)
        start, end = min(start, time), max(end, time + step)
        position = time + step
    return (start, end) if start < end else (0.0, 0.0)


def _packets(file: BinaryIO) -> Iterator[tuple["av.Packet[av.VideoStream]", float]]:
    """Yield the packets of the first stream of images and the duration of each."""
    with open_video(file) as container:
        stream = container.streams.video[0]
        step = _frame_seconds(stream)
        with contextlib.suppress(av.FFmpegError):  # the file is used up to its damage
            for packet in container.demux(stream):
                if packet.size:
                    duration = float(packet.duration * packet.time_base) if packet.duration else 0
                    yield packet, duration or step


def _header_seconds(container: InputContainer, stream: av.VideoStream) -> float:
    """Return the seconds of video by the file's header, or 0 if it has none."""
    tag = re.fullmatch(r"(\d+):(\d+):(\d+\.\d+)", stream.metadata.get("DURATION", ""))
    if tag:
        return int(tag[1]) * 3600 + int(tag[2]) * 60 + float(tag[3])
    total = (container.duration or 0) / 1_000_000
    length = 0.0
    if stream.duration and stream.time_base is not None:
        length = float(stream.duration * stream.time_base)
    if length and (abs(length - total) > 1e-3 or container.format.name.startswith(_EXACT_FORMATS)):
        return length
    # The duration of the file is that of its longest stream, which may be the sound. FFmpeg gives
    # it to a stream that has none.
    return 0.0 if container.streams.audio else total


def _frame_seconds(stream: av.VideoStream) -> float:
    """Return the seconds for which a frame is shown by the rate of the stream."""
    return float(1 / (stream.guessed_rate or stream.average_rate or _DEFAULT_RATE))
