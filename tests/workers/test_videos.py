"""Frames by their time: what PyAV decodes from the start, whoever asks in whatever order, without jumping for each."""

from __future__ import annotations

import os
import random
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import psutil
import pytest

from jobs import sources
from storage import objects, s3
from storage.errors import BadInput, ItemFailed, Misconfigured, NotFound
from storage.settings import Settings
from tests.clips import CODECS, Pixels, clip, decoded
from tests.faultproxy import HttpFaultProxy
from tests.services import SeaweedFS
from workers import images, videos


@pytest.fixture(autouse=True)
def _nothing_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test begins without open videos, and without clients that keep another test's credentials."""
    s3.store.cache_clear()
    monkeypatch.setattr(videos, "_videos", videos._Videos())
    yield
    s3.store.cache_clear()


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often decoders have jumped, and how many frames came out of them."""
    counts = {"jumps": 0, "frames": 0}
    jump, following = videos._Decoder.jump, videos._Decoder._following

    def counted_jump(self: Any, pts: int) -> int:
        counts["jumps"] += 1
        return jump(self, pts)

    def counted_following(self: Any, *args: Any) -> Iterator[Any]:
        for frame in following(self, *args):
            counts["frames"] += 1
            yield frame

    monkeypatch.setattr(videos._Decoder, "jump", counted_jump)
    monkeypatch.setattr(videos._Decoder, "_following", counted_following)
    return counts


def uris(dataset: object) -> list[str]:
    return [ref.uri for ref in sources.refs(str(dataset), Settings()) if ref is not None]


def pixels_of(uri: str, **settings: Any) -> Pixels:
    return images.decode(videos.read(uri, Settings(**settings)), images.Limits()).pixels


def pts_of(uri: str) -> int:
    return int(uri.split(":")[1])


def check(wanted: Sequence[str], expected: dict[int, Pixels], threads: int = 1) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for uri, pixels in zip(wanted, pool.map(pixels_of, wanted), strict=True):
            np.testing.assert_array_equal(pixels, expected[pts_of(uri)], err_msg=uri)


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("order", ["forward", "backward", "random", "threads"])
def test_every_frame_is_the_one_that_is_decoded_from_the_start(tmp_path: Path, suffix: str, order: str) -> None:
    path = clip(tmp_path / f"a.{suffix}")
    wanted = uris(path)
    assert len(wanted) == 40
    if order == "backward":
        wanted.reverse()
    if order in ("random", "threads"):
        random.Random(1).shuffle(wanted)
    check(wanted, decoded(path), threads=8 if order == "threads" else 1)


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video"])
def test_program_streams_whose_times_are_wrong_after_a_jump(tmp_path: Path, codec: str) -> None:
    path = clip(tmp_path / "a.mpg", 60, codec=codec, gop=12)
    check(uris(path)[::-7], decoded(path))


@pytest.mark.parametrize("options", [{"x264-params": "open-gop=1:keyint=12:bframes=4"}, {"x264-params": "bframes=0"}])
def test_open_and_plain_groups_of_pictures(tmp_path: Path, options: dict[str, str]) -> None:
    """In an open group, frames that are shown before a keyframe need the group before."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(60):
            noise = np.random.default_rng(number // 3).integers(0, 255, (64, 96, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
        container.mux(stream.encode())
    expected = decoded(path)
    assert len(expected) == 60
    check(uris(path)[::-1], expected)


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_a_varying_rate_and_an_odd_start(tmp_path: Path, suffix: str) -> None:
    ticks = [7003 + 40 * i + 13 * (i % 3) + (9000 if i > 20 else 0) for i in range(40)]
    path = clip(tmp_path / f"a.{suffix}", times=ticks, tick_s=Fraction(1, 1000))
    expected = decoded(path)
    check(uris(path), expected)
    check(uris(f"video:{path}?fps=7")[::-1], expected)


def test_frames_whose_times_are_out_of_order(tmp_path: Path, work: dict[str, int]) -> None:
    """H.264 with reordered frames has wrong times in an .avi; each frame still has one of its own."""
    path = clip(tmp_path / "a.avi", codec="libx264")
    expected = decoded(path)
    assert list(expected) != sorted(expected)
    check(uris(path), expected)
    assert work["jumps"] <= 2


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_phones_turn_their_videos(tmp_path: Path, degrees: int) -> None:
    """Against OpenCV, which turns them by itself."""
    path = clip(tmp_path / "a.mp4", 3, degrees=degrees)
    _, frame = cv2.VideoCapture(str(path)).read()
    pixels = pixels_of(uris(path)[0])
    assert pixels.shape == frame.shape == ((64, 96, 3) if degrees == 180 else (96, 64, 3))
    assert np.abs(pixels.astype(int) - frame[:, :, ::-1]).mean() < 3
    np.testing.assert_array_equal(pixels, np.rot90(decoded(path)[0], degrees // 90))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), [[1, 2, 3], [4, 5, 6]]),
        ((-1, 0, 0, 1), [[3, 2, 1], [6, 5, 4]]),
        ((1, 0, 0, -1), [[4, 5, 6], [1, 2, 3]]),
        ((0, 1, 1, 0), [[1, 4], [2, 5], [3, 6]]),
        ((0, -1, 1, 0), [[3, 6], [2, 5], [1, 4]]),
        ((0, 1, -1, 0), [[4, 1], [5, 2], [6, 3]]),
        ((0, -1, -1, 0), [[6, 3], [5, 2], [4, 1]]),
    ],
)
def test_each_matrix(matrix: videos.Matrix, expected: list[list[int]]) -> None:
    pixels = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)[:, :, None]
    a, b, c, d = (65536 * value for value in matrix)
    assert videos._upright(pixels, (a, b, c, d))[:, :, 0].tolist() == expected


def test_threads_that_ask_in_order_need_no_jumps(tmp_path: Path, work: dict[str, int]) -> None:
    """As a worker's fetchers do: they take the next item from one queue, and run into each other."""
    path = clip(tmp_path / "a.mp4", 600, size=(320, 192), gop=100)
    check(uris(path), decoded(path), threads=16)
    assert work["jumps"] <= 6
    assert work["frames"] <= 600 + 6 * 100


def test_a_sparse_sampling_decodes_no_more_than_it_must(tmp_path: Path, work: dict[str, int]) -> None:
    """Every 300th frame with a keyframe every 50: jumps are quicker, and each is to the keyframe before."""
    path = clip(tmp_path / "a.mp4", 1500, size=(32, 16), gop=50, b_frames=0, codec="mpeg4")
    check(uris(f"video:{path}?every=310"), decoded(path))
    assert work["frames"] <= 5 * 60


def test_a_video_with_few_keyframes_is_gone_through_once(tmp_path: Path, work: dict[str, int]) -> None:
    """Every 60th frame is 2.4 s from the one before, and the only keyframe is the first."""
    path = clip(tmp_path / "a.mp4", 900, size=(32, 16), gop=900, b_frames=0, codec="mpeg4")
    check(uris(f"video:{path}?every=60"), decoded(path))
    assert work["frames"] <= 900 + 60 + 120


def test_a_thread_that_is_a_little_late_finds_its_frame(tmp_path: Path, work: dict[str, int]) -> None:
    path = clip(tmp_path / "a.mp4", 60, gop=60)
    wanted = uris(f"video:{path}?every=5")
    for first, second in ((0, 1), (3, 2), (5, 4), (7, 6), (9, 8)):
        pixels_of(wanted[first])
        pixels_of(wanted[second])
    assert work["jumps"] == 1  # to the start
    assert work["frames"] <= 60 + videos._LATE_FRAMES


def test_the_same_frame_for_many_items(tmp_path: Path, work: dict[str, int]) -> None:
    uri = uris(clip(tmp_path / "a.mp4"))[30]
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: videos.read(uri, Settings()), range(32)))) == 1
    assert work["jumps"] == 1


def test_more_videos_than_are_held_open(tmp_path: Path) -> None:
    paths = [clip(tmp_path / f"{number}.mp4", 8 + number) for number in range(7)]
    every = {path: (uris(path), decoded(path)) for path in paths}
    before = open_files(tmp_path)
    jobs = [(uri, expected) for i in range(8) for wanted, expected in every.values() for uri in [wanted[i]]]

    def one(job: tuple[str, dict[int, Pixels]]) -> bool:
        return np.array_equal(pixels_of(job[0]), job[1][pts_of(job[0])])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, jobs))
    assert len(videos._videos._open) == videos._OPEN_VIDEOS
    assert open_files(tmp_path) == before + videos._OPEN_VIDEOS


def open_files(folder: Path) -> int:
    return sum(file.path.startswith(str(folder)) for file in psutil.Process().open_files())


def test_a_long_video_takes_little_memory(tmp_path: Path) -> None:
    """All frames of it would be 480 MB."""
    path = clip(tmp_path / "a.mp4", 700, size=(640, 360), codec="mpeg4", gop=50)
    wanted = uris(path)
    process = psutil.Process()

    def run(some: Sequence[str]) -> int:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(lambda uri: len(videos.read(uri, Settings())), some)) == len(some) * (
                640 * 360 * 3 + 15
            )
        return process.memory_info().rss

    after_300 = run(wanted[:300])
    after_all = run(wanted[300:])
    assert after_all - after_300 < 60 << 20
    (video,) = videos._videos._open.values()
    kept = [videos._nbytes(frame) for frame in video._kept.values()]
    assert sum(kept) <= videos._KEPT_BYTES + 8 * max(kept)  # those that threads waited for are not counted


def test_a_damaged_video_gives_the_frames_that_are_left(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 100, size=(320, 192), gop=10)
    wanted = uris(path)
    expected = decoded(path)
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size, packet.pts) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    lost = set()
    for number in (33, 57):
        at, size, pts = packets[number]
        data[at : at + size] = bytes(size)
        lost.add(pts)
    times = (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(data)
    os.utime(path, ns=times)
    failed = []
    intact = 0
    for uri in wanted:
        try:
            intact += np.array_equal(pixels_of(uri), expected[pts_of(uri)])
        except ItemFailed as error:
            failed.append((pts_of(uri), error.stage, error.reason))
    assert lost <= {pts for pts, _, _ in failed}
    assert {(stage, reason) for _, stage, reason in failed} == {("decode", "corrupt")}
    assert 80 <= intact <= 98


def test_a_frame_that_was_patched_up_is_corrupt(tmp_path: Path) -> None:
    """Decoders invent what is missing of a damaged frame, and say so."""
    path = clip(tmp_path / "a.mp4", codec="mpeg4", size=(320, 192))
    with av.open(str(path)) as container:
        at, size, pts = next((p.pos, p.size, p.pts) for p in container.demux(video=0) if p.pts == 12 * 512)
    data = bytearray(path.read_bytes())
    data[at + size // 2 : at + size] = random.Random(1).randbytes(size - size // 2)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert [frame.pts for frame in container.decode(video=0) if frame.is_corrupt] == [pts]
    (uri,) = [uri for uri in uris(path) if pts_of(uri) == pts]
    for _ in range(2):
        with pytest.raises(ItemFailed, match="cannot be decoded"):
            videos.read(uri, Settings())


def test_what_is_shown_before_a_keyframe_does_not_count_after_a_jump(tmp_path: Path) -> None:
    """Decoders that are asked to give what they cannot know do so."""

    class Thing:
        is_keyframe, is_corrupt, side_data = True, False, dict[str, bytes]()

        def __init__(self, pts: int, *frames: Thing) -> None:
            self.pts, self.frames = pts, frames

        def decode(self) -> list[Thing]:
            return list(self.frames)

    path = clip(tmp_path / "a.mp4")
    with videos.open_file(path) as file:
        decoder = videos._Decoder(file, 10**6)
        packets = [Thing(100, Thing(80)), Thing(90, Thing(90), Thing(100)), Thing(110, Thing(110))]
        assert [frame.pts for frame in decoder._following(packets, 100)] == [100, 110]
        decoder.close()


def test_a_frame_that_is_not_there(tmp_path: Path) -> None:
    uri = uris(clip(tmp_path / "a.mp4"))[5]
    for pts in (-5000, 513, 10**9):
        with pytest.raises(ItemFailed, match="cannot be decoded") as caught:
            videos.read(uri.replace(":2560:", f":{pts}:"), Settings())
        assert (caught.value.stage, caught.value.reason) == ("decode", "corrupt")
    assert len(videos.read(uri, Settings())) > 96 * 64 * 3


def test_bytes_that_are_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"no video" * 100)
    tag = sources.video.fingerprint_tag(sources.stat_fingerprint(path.stat()))  # type: ignore[attr-defined]
    with pytest.raises(ItemFailed, match="corrupt video"):
        videos.read(f"frame:0:0:{tag}:{path.as_uri()}", Settings())
    assert open_files(tmp_path) == 0


def test_a_video_that_was_written_anew(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    wanted = uris(path)
    videos.read(wanted[0], Settings())
    clip(tmp_path / "b.mp4", 41)
    with path.open("r+b") as file:
        file.write((tmp_path / "b.mp4").read_bytes())
    for uri in wanted[1:3]:
        with pytest.raises(ItemFailed, match="written anew") as caught:
            videos.read(uri, Settings())
        assert (caught.value.stage, caught.value.reason, caught.value.retry) == ("fetch", "changed", True)
    assert videos.read(uris(path)[1], Settings())


def test_a_video_that_is_gone(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    wanted = uris(path)
    path.unlink()
    with pytest.raises(NotFound, match="does not exist"):
        videos.read(wanted[0], Settings())


def test_limits(tmp_path: Path) -> None:
    uri = uris(clip(tmp_path / "a.mp4"))[0]
    assert videos.read(uri, Settings(max_image_pixels=96 * 64))
    with pytest.raises(ItemFailed, match="over the limit of 6143") as caught:
        videos.read(uri, Settings(max_image_pixels=96 * 64 - 1))
    assert (caught.value.stage, caught.value.reason) == ("decode", "too-many-pixels")


def test_untrusted_videos_are_refused(tmp_path: Path) -> None:
    uri = uris(clip(tmp_path / "a.mp4"))[0]
    with pytest.raises(ItemFailed) as caught:
        videos.read(uri, Settings(untrusted=True))
    assert (caught.value.stage, caught.value.reason) == ("fetch", "refused")


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = uris(clip(tmp_path / "a.mp4"))[0]
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(Misconfigured, match=r"pip install 'imagemill\[models\]'"):
        videos.read(uri, Settings())


@pytest.mark.parametrize(
    "uri",
    [
        "frame:",
        "frame:0:0:file:///a.mp4",
        "frame:0:0:0123456789ab:/a.mp4",
        "frame:0:0:0123456789ab:http://key:secret@host/a.mp4",
        "frame:0:-1:0123456789ab:file:///a.mp4",
        "frame:0:0:0123456789ab:part:0+1:file:///a.mp4",
    ],
)
def test_what_is_no_frame(uri: str) -> None:
    with pytest.raises(BadInput, match="cannot read") as caught:
        videos.read(uri, Settings())
    assert "secret" not in str(caught.value)


def test_a_video_on_s3_is_fetched_once(seaweed: SeaweedFS, s3_url: str, tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    objects.open_store(s3_url).put_file("a.mp4", path)
    wanted, expected = uris(f"{s3_url}/a.mp4"), decoded(path)
    with HttpFaultProxy(seaweed.port) as proxy, ThreadPoolExecutor(8) as pool:
        settings = {"s3_endpoint_url": proxy.url}
        for uri, pixels in zip(wanted, pool.map(lambda uri: pixels_of(uri, **settings), wanted), strict=True):
            np.testing.assert_array_equal(pixels, expected[pts_of(uri)])
        videos._videos = videos._Videos()  # as in another process
        pixels_of(wanted[0], **settings)
        assert sum(seen.method == "GET" for seen in proxy.seen) == 1


def test_a_video_on_s3_that_is_gone_or_written_anew(s3_url: str, tmp_path: Path) -> None:
    store = objects.open_store(s3_url)
    store.put_file("a.mp4", clip(tmp_path / "a.mp4"))
    uri = uris(f"{s3_url}/a.mp4")[0]
    store.put_file("a.mp4", clip(tmp_path / "b.mp4", 41))
    with pytest.raises(ItemFailed, match="written anew"):
        videos.read(uri, Settings())
    store.delete(["a.mp4"])
    with pytest.raises(NotFound, match="does not exist"):
        videos.read(uri, Settings())
    assert [path.name for path in (Settings().cache_folder / "videos").iterdir()] == [".lock"]


def test_copies_from_s3_are_bounded(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = objects.open_store(s3_url)
    sizes = []
    for number in range(4):
        path = clip(tmp_path / f"{number}.mp4", 40 + number)
        store.put_file(f"{number}.mp4", path)
        sizes.append(path.stat().st_size)
    monkeypatch.setattr(videos, "_COPIES_BYTES", sum(sizes[1:]))
    folder = Settings().cache_folder / "videos"
    folder.mkdir(parents=True)
    (folder / ".fetching").write_bytes(bytes(10_000_000))  # of a process that was killed
    every = [uris(f"{s3_url}/{number}.mp4") for number in range(4)]
    for wanted in every:
        assert videos.read(wanted[1], Settings())
    there = sorted(path.stat().st_size for path in folder.iterdir() if path.name != ".lock")
    assert there == sorted(sizes[1:])
    assert videos.read(every[0][2], Settings())  # still open, though its copy is gone


def test_threads_do_not_wait_for_each_other_forever(tmp_path: Path) -> None:
    """Two videos, closed and opened again all the time."""
    first = clip(tmp_path / "0.mp4", 20)
    second = Path(shutil.copy(first, tmp_path / "1.mp4"))
    wanted = [uri for pair in zip(uris(first), uris(second), strict=True) for uri in pair]
    stop = threading.Event()

    def close_all() -> None:
        while not stop.is_set():
            with videos._videos._lock:
                there = list(videos._videos._open.values())
            for video in there:
                video.close()

    closer = threading.Thread(target=close_all)
    closer.start()
    try:
        check(wanted, decoded(first), threads=8)
    finally:
        stop.set()
        closer.join()
