"""Datasets that are the frames of one video, told by their time: every one, every n-th, or so many a second.

    clip.mp4                               every frame of a local video, or one on s3://
    video:clip.mp4?every=30                every thirtieth, from the first on
    video:s3://bucket/clip.mp4?fps=2       two a second

Listing reads the packets that frames are stored in and decodes none. Times are pts, whole ticks of the stream's own
clock (its time base), as the file says them; frames of varying rate keep their own. A frame is decoded later, by
workers/videos.py; one that cannot be is a failure row.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import heapq
import os
import re
import urllib.parse
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from jobs.sources import ImageRef, escaped_key, stat_fingerprint
from storage.errors import BadInput, Misconfigured, NotFound
from storage.folder import open_file, translated
from storage.objects import local_path
from storage.settings import Settings, masked

SUFFIXES = (".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg")
# A text file that is called like a video could name any other file or address for FFmpeg to open.
_FORMATS = "mov,matroska,avi,mpeg,mpegts"

_OWN = "video:"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")
_REORDERED = 32  # frames that may be stored before one that is shown earlier; H.264 and HEVC allow 16
_MOST_FPS = 1000
_MOST_EVERY = 10**9
# What a header's duration may be wrong by: so many seconds, of a short video no more than a quarter; and a part of it.
_MISSING_S, _MISSING = 2, Fraction(1, 20)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which frames are items: each `every`-th, or when `fps` is not 0 the first one in each of so many parts a second.

    The parts are counted from the first frame's time; a part in which no frame starts has no item.
    """

    every: int = 1
    fps: Decimal = Decimal(0)

    def __str__(self) -> str:
        """As a URI has it; "" for every frame."""
        if self.fps:
            return f"?fps={self.fps.normalize():f}"
        return f"?every={self.every}" if self.every > 1 else ""


def claims(uri: str) -> bool:
    """What starts with video:, or a name that ends like a video's, on S3 or local, and is no folder."""
    if uri.startswith(_OWN):
        return True
    if "\0" in uri or not uri.rstrip("/").lower().endswith(SUFFIXES):
        return False
    if uri[:5].lower() == "s3://":
        return True
    path = _path(uri)
    return path is not None and not os.path.isdir(path)


def canonical(uri: str) -> str:
    """The absolute path or s3:// URI; with parameters that are not the defaults, video:that?parameters."""
    where, sampling = _parts(uri)
    return f"{_OWN}{where}{sampling}" if str(sampling) else where


def refs(uri: str, settings: Settings) -> Iterator[ImageRef]:
    """The chosen frames in order of time.

    Raises:
        BadInput: the video is missing, damaged or cut short, has frames without times, or PyAV is not installed.
        Unavailable: the video could not be read to its end.
    """
    where, sampling = _parts(uri)
    if settings.untrusted:
        raise BadInput("videos are not decoded where IMAGEMILL_UNTRUSTED is set; extract their frames as images first")
    return _listed(where, sampling, settings)


def chosen(times: Iterable[int], tick_s: Fraction, sampling: Sampling) -> Iterator[int]:
    """The pts of the frames that a sampling takes, of all pts in order.

    Args:
        tick_s: seconds of one tick. Times were rounded to it when the file was written, so half a tick is allowed for.
    """
    first, last = None, -1
    for number, pts in enumerate(times):
        first = pts if first is None else first
        if sampling.fps:
            part = (2 * (pts - first) + 1) * tick_s * Fraction(sampling.fps) // 2
        else:
            part = number // sampling.every
        if part > last:
            last = part
            yield pts


class BadVideo(Exception):
    """What a file is that is no video; one line."""


def open_video(file: BinaryIO) -> Any:
    """PyAV's container of a video. Raises Misconfigured without PyAV, BadVideo for what is no video."""
    try:
        import av
    except ImportError:
        raise Misconfigured("reading videos needs PyAV; install it with: pip install 'imagemill[models]'") from None
    try:
        container = av.open(file, options={"format_whitelist": _FORMATS})
    except av.FFmpegError as error:
        raise BadVideo(f"FFmpeg finds no video in it of the formats {_FORMATS}: {error.strerror}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise BadVideo("it is too short for a video") from error  # FFmpeg goes back to before its start
    if container.streams.best("video") is None:
        container.close()
        raise BadVideo("there are no pictures in it")
    return container


def fingerprint_tag(fingerprint: str) -> str:
    """A few letters that stand for a file's fingerprint in the URIs of its frames."""
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:12]


def frame_uri(uri: str, tag: str, pts: int, step: int) -> str:
    """Where a frame is: frame:PTS:STEP:TAG:URI.

    Args:
        uri: file:///... or s3://... of the video.
        tag: of the version of the video whose times these are.
        step: ticks from the item before this one, for the decoder to know which frame was wanted too; 0 for the first.
    """
    return f"frame:{pts}:{step}:{tag}:{uri}"


def _parts(uri: str) -> tuple[str, Sampling]:
    """(canonical spelling of the video, sampling)"""
    text = uri.removeprefix(_OWN)
    name, query = text, ""
    if not text.rstrip("/").lower().endswith(SUFFIXES):
        name, _, query = text.rpartition("?")
    if not name.rstrip("/").lower().endswith(SUFFIXES):
        raise BadInput(
            f"cannot read {masked(uri)!r}: expected video:clip.mp4?fps=2 or ?every=30, a {', '.join(SUFFIXES)}"
        )
    where = _on_s3(name) if name[:5].lower() == "s3://" else _local(name)
    return where, _sampling(query)


def _sampling(query: str) -> Sampling:
    given = urllib.parse.parse_qsl(query, keep_blank_values=True)
    if not given:
        return Sampling()
    name, value = given[0]
    if len(given) > 1 or name not in ("fps", "every"):
        raise BadInput(f"expected one of ?fps=2 or ?every=30 behind a video, but got {query!r}")
    if name == "every":
        if not value.isdecimal() or not value.isascii() or not 1 <= int(value[:12]) <= _MOST_EVERY:
            raise BadInput(f"expected every=N with a whole number from 1 to {_MOST_EVERY}, but got {value!r}")
        return Sampling(every=int(value))
    try:
        fps = Decimal(value)
        if not 0 < fps <= _MOST_FPS or fps != round(fps, 6):
            raise InvalidOperation
    except InvalidOperation:
        raise BadInput(f"expected fps=N with a number above 0, up to {_MOST_FPS}, but got {value!r}") from None
    return Sampling(fps=fps)


def _path(uri: str) -> str | None:
    """The local path that a URI or a shell word names, or None."""
    path = local_path(uri)
    if path is not None:
        return str(path)
    return None if _SCHEME.match(uri) else os.path.expanduser(uri)


def _on_s3(uri: str) -> str:
    bucket, _, key = uri[5:].partition("/")
    if not bucket or not key.strip("/") or "@" in bucket:
        raise BadInput(f"cannot read {masked(uri)!r}: expected s3://bucket/a.mp4; credentials go into AWS_ variables")
    return f"s3://{bucket}/{key.strip('/')}"


def _local(name: str) -> str:
    path = _path(name)
    if path is None or "\0" in path:
        raise BadInput(f"cannot read {masked(name)!r}: expected a video's path or s3://bucket/a.mp4")
    # "link/.." is the parent of the link's target, which only realpath knows; abspath keeps a leading "//".
    path = os.path.realpath(path) if ".." in path.split("/") else "/" + os.path.abspath(path).lstrip("/")
    if not os.path.isfile(path):
        raise BadInput(f"video {path!r} does not exist or is not a file; check the spelling")
    try:
        path.encode()
    except UnicodeEncodeError:
        return Path(path).as_uri()
    return path


def _listed(where: str, sampling: Sampling, settings: Settings) -> Iterator[ImageRef]:
    name = os.path.basename(_path(where) or where)
    with _opened(where, settings) as (file, uri, fingerprint), _container(file, where) as container:
        stream = container.streams.best("video")
        tag = fingerprint_tag(fingerprint)
        first = last = None
        for pts in chosen(_times(container, stream, where), stream.time_base, sampling):
            first = pts if first is None else first
            seconds = float((pts - first) * stream.time_base)
            key = escaped_key(f"{name}/{seconds:010.3f}.{pts}")
            step = 0 if last is None else pts - last
            yield ImageRef(key, frame_uri(uri, tag, pts, step), f"{fingerprint}@{pts}")
            last = pts


@contextlib.contextmanager
def _opened(where: str, settings: Settings) -> Iterator[tuple[BinaryIO, str, str]]:
    """A video's bytes, their file:// or s3:// URI and their fingerprint."""
    path = _path(where)
    try:
        if path is not None:
            # The target's own name goes into the URIs, so that moving a link later leads nobody elsewhere.
            real = Path(os.path.realpath(path))
            with translated(where), open_file(real) as file:
                yield file, real.as_uri(), stat_fingerprint(os.fstat(file.fileno()))
            return
        from storage import s3

        bucket, _, key = where[5:].partition("/")
        store = s3.store(bucket, "", settings)
        there = store.stat(key)
        if there is None:
            raise NotFound(where)
        with store.open_file(there) as file:
            yield file, where, f"etag:{there.etag}+{there.size}"
    except NotFound:
        raise BadInput(f"video {where!r} does not exist; check the spelling") from None


@contextlib.contextmanager
def _container(file: BinaryIO, where: str) -> Iterator[Any]:
    try:
        container = open_video(file)
    except Misconfigured as error:
        raise BadInput(str(error)) from None
    except BadVideo as error:
        raise _damaged(where, str(error)) from error
    with container:
        yield container


def _times(container: Any, stream: Any, where: str) -> Iterator[int]:
    """The pts of all frames that are shown, in order of time, from the packets that they are stored in."""
    import av

    end: list[Fraction] = [Fraction(0)]
    found = False
    try:
        for pts in in_order(_stored(container, stream, where, end)):
            found = True
            yield pts
    except _Backwards as error:
        raise _damaged(where, str(error)) from None
    except av.FFmpegError as error:
        raise _damaged(where, f"it cannot be read to its end ({error.strerror})") from error
    if not found:
        raise _damaged(where, "there is no frame in it")
    _check_end(container, stream, end[0], where)


def _stored(container: Any, stream: Any, where: str, end: list[Fraction]) -> Iterator[int]:
    """The pts of all frames in the order in which they are stored; when the last packet ends goes into `end`."""
    for packet in container.demux():
        if not packet.size:  # the mark of the end
            continue
        if packet.pts is not None:
            end[0] = max(end[0], Fraction((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index or packet.is_discard:  # discarded: cut away by an edit list
            continue
        if packet.pts is None:
            raise _damaged(where, "it has frames without a time")
        yield packet.pts


class _Backwards(Exception):
    """The times of a video are not in order."""


def in_order(stored: Iterable[int]) -> Iterator[int]:
    """Times sorted that were stored in the order of decoding, in which none is more than 32 places too late.

    A time that comes twice is given once: nobody could tell the two frames apart.
    """
    waiting: list[int] = []
    last: int | None = None
    for pts in stored:
        heapq.heappush(waiting, pts)
        if len(waiting) > _REORDERED:
            last = yield from _smallest(waiting, last)
    while waiting:
        last = yield from _smallest(waiting, last)


def _smallest(waiting: list[int], last: int | None) -> Generator[int, None, int]:
    pts = heapq.heappop(waiting)
    if last is not None and pts < last:
        raise _Backwards(f"its times go back, from {last} to {pts}")
    if pts != last:
        yield pts
    return pts


def _check_end(container: Any, stream: Any, end: Fraction, where: str) -> None:
    """Raise BadInput for a video that ends long before its header says: FFmpeg takes that for its end."""
    declared = Fraction(container.duration or 0, 1_000_000)  # from microseconds
    if container.format.name == "avi" and stream.frames and stream.average_rate:
        declared = stream.frames / stream.average_rate  # FFmpeg has made the duration fit to what there is
    if declared - end > max(min(Fraction(_MISSING_S), declared / 4), _MISSING * declared):
        raise _damaged(where, f"it says that it ends at {float(declared):.1f} s, but does so at {float(end):.1f} s")


def _damaged(where: str, what: str) -> BadInput:
    return BadInput(
        f"video {where!r} is damaged: {what}; nothing was pruned: copy it again, or repair it with: "
        "ffmpeg -fflags +genpts -i VIDEO -c copy repaired.mkv"
    )
