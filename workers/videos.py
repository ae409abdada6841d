"""Gives single frames of videos, by their time, to many threads that ask in nearly increasing order.

A decoder only goes forward, and a jump costs all frames from the last keyframe on. So each open video has one decoder,
which one thread at a time drives; while it looks for its own frame it keeps those that other threads wait for, and the
item before each of those, whose thread may be about to ask. It jumps only where that is likely to be quicker.

A frame comes out as FFmpeg decodes it from the file's start: after a jump only what follows the keyframe counts, and a
frame that does not come or is damaged is looked for once more from an earlier keyframe. MPEG program streams (.mpg) are
not jumped in, since FFmpeg gives frames after a jump the times of others. Frames become RGB as PyAV does it by itself
and are turned upright by the display matrix that phones write. They are not deinterlaced, not stretched by a pixel
aspect ratio, and HDR is not tone-mapped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import os
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from jobs.sources import stat_fingerprint
from jobs.sources.video import BadVideo, fingerprint_tag, open_video
from storage.errors import BadInput, ItemFailed, NotFound
from storage.folder import open_file, translated
from storage.objects import local_path
from storage.settings import Settings, masked

Matrix = tuple[int, int, int, int]  # (a, b, c, d): a pixel at x, y is shown at ax + cy, bx + dy

_UPRIGHT: Matrix = (1, 0, 0, 1)
_FRAME = re.compile(r"frame:(-?\d{1,19}):(\d{1,19}):([0-9a-f]{12}):((?:file|s3)://.+)", re.DOTALL | re.ASCII)
_OPEN_VIDEOS = 4
_KEPT_BYTES = 64 * 1024 * 1024  # of one video's decoded frames that no thread waits for
_LATE_FRAMES = 16  # that may come before one of an earlier time, where a file has its times wrong
_MISSES = 2  # places to start from, before a frame is given up
_GAP_S = 2  # between keyframes, until a video has shown its own
_THREADS = 4  # of one decoder
_COPIES_BYTES = 20_000_000_000  # of videos from S3 that are kept in the cache folder


def read(uri: str, settings: Settings) -> bytes:
    """One frame, upright, as an uncompressed PPM (P6) picture of 8 bits a channel.

    Args:
        uri: as jobs.sources.video.frame_uri makes it.

    Raises:
        ItemFailed: stage fetch, reason refused (untrusted pictures) or changed (the video was written anew since it was
            listed); stage decode, reason corrupt or too-many-pixels.
        NotFound, Unavailable, BadInput, Misconfigured: as storage.objects.read does.
    """
    if settings.untrusted:
        raise ItemFailed("fetch", "refused", "videos are not decoded where IMAGEMILL_UNTRUSTED is set; extract frames")
    found = _FRAME.fullmatch(uri)
    if found is None:
        raise BadInput(f"cannot read {masked(uri)!r}: expected frame:PTS:STEP:TAG: before a file:/// or s3:// URI")
    pts, step, tag, where = int(found[1]), int(found[2]), found[3], found[4]
    with _videos.using(where, tag, settings) as video:
        frame, matrix = video.frame(pts, step)
    return _ppm(frame, matrix, settings.max_image_pixels)


class _Videos:
    """The videos that this process holds open: those in use, and a few that were used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, str, Settings], _Video] = OrderedDict()

    @contextlib.contextmanager
    def using(self, where: str, tag: str, settings: Settings) -> Iterator[_Video]:
        """A video that stays open meanwhile."""
        key = (where, tag, settings)
        with self._lock:
            video = self._open.setdefault(key, _Video(where, tag, settings))
            self._open.move_to_end(key)
            video.users += 1
        try:
            yield video
        finally:
            with self._lock:
                video.users -= 1
                surplus = [self._open.pop(key) for key in self._surplus()]
            for old in surplus:
                old.close()

    def _surplus(self) -> list[tuple[str, str, Settings]]:
        idle = [key for key, video in self._open.items() if not video.users]
        return idle[: max(0, len(self._open) - _OPEN_VIDEOS)]


class _Video:
    """One version of one video. It is opened when the first frame is asked for, also after it was closed.

    Attributes:
        users: threads that have it in use.
    """

    def __init__(self, where: str, tag: str, settings: Settings) -> None:
        self._where, self._tag, self._settings = where, tag, settings
        self.users = 0
        self._driving = threading.Lock()  # of the decoder
        self._decoder: _Decoder | None = None
        self._matrix = _UPRIGHT
        self._guard = threading.Lock()  # of what follows
        self._asked: list[tuple[int, int]] = []  # (pts, step) of each thread that waits
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def frame(self, pts: int, step: int) -> tuple[Any, Matrix]:
        """PyAV's frame with this pts, and how it has to be turned. Raises ItemFailed."""
        with self._guard:
            self._asked.append((pts, step))
        try:
            with self._driving:
                frame = self._kept_frame(pts)
                return self._decoded(pts) if frame is None else frame, self._matrix
        finally:
            with self._guard:
                self._asked.remove((pts, step))

    def close(self) -> None:
        """Free the decoder and the frames."""
        with self._driving:
            self._stop()
            with self._guard:
                self._kept.clear()

    def _kept_frame(self, pts: int) -> Any:
        with self._guard:
            if pts in self._kept:
                self._kept.move_to_end(pts)
            return self._kept.get(pts)

    def _decoded(self, pts: int) -> Any:
        if self._decoder is None:
            self._decoder = _Decoder(_opened(self._where, self._tag, self._settings), self._settings.max_image_pixels)
        decoder = self._decoder
        try:
            if local_path(self._where) is not None:
                _check_tag(decoder.file, self._tag)  # the copy of one on S3 is written once
            _check_pixels(decoder.width, decoder.height, self._settings.max_image_pixels)
            with translated(self._where):
                frame = self._found(decoder, pts)
        except BaseException:
            self._stop()  # its place is not known any more
            raise
        if frame is None:
            raise _corrupt(f"the frame at {pts} cannot be decoded")
        self._matrix = decoder.matrix or _UPRIGHT
        return frame

    def _stop(self) -> None:
        if self._decoder is not None:
            self._decoder.close()
        self._decoder = None

    def _found(self, decoder: _Decoder, pts: int) -> Any:
        """The frame, or None when it does not come from two places to start from."""
        frame = self._ahead(decoder, pts) if decoder.is_near(pts) else None
        back = misses = 0
        while frame is None and misses < _MISSES:
            landed = decoder.jump(pts - back)
            if landed <= pts:
                frame = self._ahead(decoder, pts)
                misses += 1
            if landed == _START:
                break
            # A second before the keyframe: where frames are reordered, a jump goes by another clock than theirs.
            back = max(2 * back, pts - landed + decoder.second)
        return frame

    def _ahead(self, decoder: _Decoder, pts: int) -> Any:
        """The frame, from where the decoder is, or None when it is past it. Keeps what others want on the way."""
        late = 0
        for frame in decoder.frames:
            if frame.is_corrupt:
                continue
            late += frame.pts > pts
            # One is kept after it was given as well: several items may lie in it.
            if frame.pts >= pts or self._is_wanted(frame.pts):
                self._keep(frame)
            if frame.pts == pts:
                return frame
            if late >= _LATE_FRAMES:
                break
        return None

    def _is_wanted(self, pts: int) -> bool:
        with self._guard:
            return any(pts in (asked, asked - step) for asked, step in self._asked)

    def _keep(self, frame: Any) -> None:
        with self._guard:
            self._kept[frame.pts] = frame
            waited_for = {pts for pts, _ in self._asked}
            others = [pts for pts in self._kept if pts not in waited_for]
            surplus = sum(_nbytes(self._kept[pts]) for pts in others) - _KEPT_BYTES
            for pts in others:
                if surplus <= 0:
                    break
                surplus -= _nbytes(self._kept.pop(pts))


def _nbytes(frame: Any) -> int:
    return sum(plane.buffer_size for plane in frame.planes)


_START = -(1 << 63)  # where a decoder lands that begins with the file


class _Decoder:
    """A video that is decoded from some place on. Used by one thread at a time.

    Args:
        file: closed with the decoder.
        max_pixels: a video whose frames grow beyond this is not decoded on.

    Attributes:
        frames: those that follow, in order of time; after the last one there is nothing more without a jump.
        width, height: of the frames as stored, by the video's header.
        second: in ticks of the stream's clock.
        matrix: the display matrix of its first frame, None before that.
    """

    def __init__(self, file: BinaryIO, max_pixels: int) -> None:
        self.file, self._max_pixels = file, max_pixels
        self._container: Any = None
        self._begin()
        self.width, self.height = int(self._stream.width), int(self._stream.height)
        self.second = max(1, round(1 / self._stream.time_base))
        self._gap = _GAP_S * self.second  # the longest time between two keyframes that was seen
        self._at: int | None = None  # pts of the last frame that came
        self.matrix: Matrix | None = None

    def _begin(self) -> None:
        """Open the file anew, at its start."""
        if self._container is not None:
            self._container.close()
        self.file.seek(0)
        try:
            self._container = open_video(self.file)
        except BadVideo as error:
            self.close()
            raise _corrupt(str(error)) from error
        except BaseException:
            self.close()
            raise
        self._stream = self._container.streams.best("video")
        self._jumps = self._container.format.name != "mpeg"
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.thread_count = min(_THREADS, os.cpu_count() or 1)
        # Decoders count in whole blocks of pixels, so a little more than what a frame may have.
        self._stream.codec_context.options = {"max_pixels": str(2 * self._max_pixels)}
        self.frames: Iterator[Any] = self._following(self._packets(), _START)

    def close(self) -> None:
        """Free everything."""
        self.frames = iter(())
        if self._container is not None:
            self._container.close()
        self.file.close()

    def is_near(self, pts: int) -> bool:
        """Whether a frame lies ahead, and so near that the last keyframe before it has likely been passed."""
        return self._at is not None and self._at < pts and (not self._jumps or pts <= self._at + self._gap)

    def jump(self, pts: int) -> int:
        """Go to the last keyframe before a time; returns its pts, which may yet be later, or _START."""
        self._at = None
        first = None
        if self._jumps and self._stream.start_time is not None and pts > self._stream.start_time:
            with contextlib.suppress(_ffmpeg_error()):  # formats differ in what they cannot find
                self._container.seek(pts, stream=self._stream)
                packets = self._packets()
                first = next((packet for packet in packets if packet.is_keyframe and packet.pts is not None), None)
        if first is None:
            self._begin()
            return _START
        self._gap = max(self._gap, pts - first.pts)
        self.frames = self._following(itertools.chain([first], packets), first.pts)
        return int(first.pts)

    def _packets(self) -> Iterator[Any]:
        packets: Iterator[Any] = self._container.demux(self._stream)
        return packets

    def _following(self, packets: Iterable[Any], start: int) -> Iterator[Any]:
        """The frames in some packets, those from a time on: what is shown before a keyframe needs the one before."""
        key = None
        for packet in self._readable(packets):
            if packet.is_keyframe and packet.pts is not None:
                self._gap = max(self._gap, 0 if key is None else packet.pts - key)
                key = packet.pts
            for frame in _frames_in(packet):
                if self.matrix is None:
                    # Of one frame only: PyAV's side data and its frame refer to each other, so both stay for a while.
                    self.matrix = _display_matrix(frame)
                if frame.pts is not None and frame.pts >= start:
                    self._at = frame.pts if self._at is None else max(self._at, frame.pts)
                    yield frame
        self._at = None

    @staticmethod
    def _readable(packets: Iterable[Any]) -> Iterator[Any]:
        """Packets up to where the file cannot be read any more."""
        with contextlib.suppress(_ffmpeg_error()):
            yield from packets


def _frames_in(packet: Any) -> list[Any]:
    """Players go on after a packet that cannot be decoded; which frames are missing is seen when they are asked for."""
    try:
        return list(packet.decode())
    except _ffmpeg_error():
        return []


def _ffmpeg_error() -> type[Exception]:
    import av

    error: type[Exception] = av.FFmpegError
    return error


def _corrupt(what: str) -> ItemFailed:
    return ItemFailed("decode", "corrupt", f"corrupt video: {what}")


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        message = f"{width} x {height} is {width * height} pixels, over the limit of {max_pixels}"
        raise ItemFailed("decode", "too-many-pixels", message)


def _check_tag(file: BinaryIO, tag: str) -> None:
    if fingerprint_tag(stat_fingerprint(os.fstat(file.fileno()))) != tag:
        raise _changed()


def _changed() -> ItemFailed:
    message = "the video was written anew since it was listed, so its times may be others; run the same command again"
    return ItemFailed("fetch", "changed", message, retry=True)


def _opened(where: str, tag: str, settings: Settings) -> BinaryIO:
    """A video's bytes, of the version that was listed."""
    path = local_path(where)
    if path is None:
        path = _copied(where, tag, settings)
        return path.open("rb")
    file = open_file(path)
    try:
        _check_tag(file, tag)
    except BaseException:
        file.close()
        raise
    return file


def _copied(where: str, tag: str, settings: Settings) -> Path:
    """A video on S3 as a file in the cache folder, fetched once a machine."""
    from storage import s3

    folder = settings.cache_folder / "videos"
    path = folder / f"{hashlib.sha256(where.encode()).hexdigest()[:24]}-{tag}"
    bucket, _, key = where.removeprefix("s3://").partition("/")
    store = s3.store(bucket, "", settings)
    with translated(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.is_file():
                os.utime(path)
                return path
            there = store.stat(key)
            if there is None:
                raise NotFound(f"{where} does not exist")
            if fingerprint_tag(f"etag:{there.etag}+{there.size}") != tag:
                raise _changed()
            _make_room(folder, there.size)
            temporary = folder / ".fetching"
            store.get_file(key, temporary)
            if store.stat(key) != there:
                raise _changed()
            os.replace(temporary, path)
    return path


def _make_room(folder: Path, nbytes: int) -> None:
    """Delete the copies that were opened longest ago; a process that still reads one keeps its bytes."""
    copies = sorted((path for path in folder.iterdir() if path.name != ".lock"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in copies) + nbytes
    for path in copies:
        if total <= _COPIES_BYTES and path.name != ".fetching":  # that one is of a process that was killed
            continue
        total -= path.stat().st_size
        path.unlink()


def _ppm(frame: Any, matrix: Matrix, max_pixels: int) -> bytes:
    from av.video.reformatter import VideoReformatter

    _check_pixels(frame.width, frame.height, max_pixels)
    # A reformatter of its own: several threads may have the same frame.
    rgb = cast(npt.NDArray[np.uint8], VideoReformatter().reformat(frame, format="rgb24").to_ndarray())
    pixels = _upright(rgb, matrix)
    return f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode() + pixels.tobytes()


def _display_matrix(frame: Any) -> Matrix:
    """The first two columns of a frame's display matrix (ISO/IEC 14496-12), without its scale."""
    side = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return _UPRIGHT
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(side))
    return a, b, c, d


def _upright(pixels: npt.NDArray[np.uint8], matrix: Matrix) -> npt.NDArray[np.uint8]:
    """A picture as a display matrix shows it, turned by the nearest right angle and mirrored."""
    a, b, c, d = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


_videos = _Videos()
