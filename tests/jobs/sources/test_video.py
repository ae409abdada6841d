"""The video source: the frames that it lists are those that PyAV decodes, the chosen ones are the right ones."""

from __future__ import annotations

import io
import itertools
import sys
import tracemalloc
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import sources
from jobs.sources import ImageRef, video
from jobs.sources.video import Sampling, chosen, in_order
from storage import objects, s3
from storage.errors import BadInput, Unavailable
from storage.settings import Settings
from tests.clips import CODECS, clip, decoded
from tests.faultproxy import HttpFaultProxy
from tests.services import SeaweedFS


@pytest.fixture(autouse=True)
def _fresh_clients() -> Iterator[None]:
    """Clients keep the credentials they were made with."""
    s3.store.cache_clear()
    yield
    s3.store.cache_clear()


def listed(uri: object, **settings: Any) -> list[ImageRef]:
    return [ref for ref in sources.refs(str(uri), Settings(**settings)) if ref is not None]


def times(refs: list[ImageRef]) -> list[int]:
    return [int(ref.uri.split(":")[1]) for ref in refs]


def test_its_suffixes_are_those_of_files() -> None:
    assert set(video.SUFFIXES) == {f".{suffix}" for suffix in CODECS} <= set(sources.FILE_SUFFIXES)


@pytest.mark.parametrize("suffix", CODECS)
def test_frames_are_those_that_are_decoded(tmp_path: Path, suffix: str) -> None:
    path = clip(tmp_path / f"a.{suffix}")
    refs = listed(path)
    assert times(refs) == list(decoded(path))
    assert len(refs) == 40
    assert [ref.key for ref in refs] == sorted(ref.key for ref in refs)
    assert refs[0].key.startswith(f"a.{suffix}/000000.000.")
    assert refs[39].key.startswith(f"a.{suffix}/000001.560.")


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_of_a_varying_rate_keep_their_times(tmp_path: Path, suffix: str) -> None:
    ticks = [7003 + 40 * i + 13 * (i % 3) + (900 if i > 20 else 0) for i in range(40)]
    path = clip(tmp_path / f"a.{suffix}", times=ticks, tick_s=Fraction(1, 1000))
    refs = listed(path)
    assert times(refs) == list(decoded(path))
    seconds = [float(ref.key.split("/")[1][:10]) for ref in refs]
    assert seconds == [(tick - ticks[0]) / 1000 for tick in ticks]


def test_what_an_edit_list_cuts_away_is_not_listed(tmp_path: Path) -> None:
    """As in a film that was trimmed on a phone: the frames from the keyframe on are stored, and not shown."""
    with av.open(str(clip(tmp_path / "whole.mp4"))) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is None:
                continue
            packet.pts, packet.dts, packet.stream = packet.pts - 4 * 512, packet.dts - 4 * 512, stream
            cut.mux(packet)
    with av.open(str(tmp_path / "cut.mp4")) as container:
        assert any(packet.is_discard for packet in container.demux(video=0) if packet.size)
    refs = listed(tmp_path / "cut.mp4")
    assert times(refs) == list(decoded(tmp_path / "cut.mp4"))
    assert 30 < len(refs) < 40


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("every=1", range(40)),
        ("every=7", range(0, 40, 7)),
        ("every=40", [0]),
        ("every=1000000000", [0]),
        ("fps=25", range(40)),
        ("fps=1000", range(40)),
        ("fps=12.5", range(0, 40, 2)),
        ("fps=5", range(0, 40, 5)),
        ("fps=1", [0, 25]),
        ("fps=0.5", [0]),
        ("fps=10", [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30, 33, 35, 38]),
    ],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_which_frames_are_chosen(tmp_path: Path, suffix: str, query: str, expected: Any) -> None:
    """In an .mkv times are whole milliseconds, which must not choose others."""
    path = clip(tmp_path / f"a.{suffix}")
    everything = listed(path)
    assert listed(f"video:{path}?{query}") != []
    found = listed(f"video:{path}?{query}")
    assert [ref.key for ref in found] == [everything[number].key for number in expected]
    assert [ref.fingerprint for ref in found] == [everything[number].fingerprint for number in expected]


def test_the_step_is_from_the_item_before(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    refs = listed(f"video:{path}?every=3")
    steps = [int(ref.uri.split(":")[2]) for ref in refs]
    assert steps == [0, *(b - a for a, b in itertools.pairwise(times(refs)))]


increasing = st.lists(st.integers(1, 90), min_size=1, max_size=80).map(lambda steps: list(itertools.accumulate(steps)))


@given(ticks=increasing, every=st.integers(1, 100))
def test_every_is_a_slice(ticks: list[int], every: int) -> None:
    assert list(chosen(ticks, Fraction(1, 30), Sampling(every=every))) == ticks[::every]


@given(ticks=increasing, fps=st.decimals("0.01", "1000", places=2), base=st.sampled_from([30, 1000, 15360, 90000]))
def test_fps_is_the_first_frame_of_each_part(ticks: list[int], fps: Decimal, base: int) -> None:
    found = list(chosen(ticks, Fraction(1, base), Sampling(fps=fps)))
    parts: dict[int, int] = {}
    for tick in ticks:
        exact = (Fraction(tick - ticks[0]) + Fraction(1, 2)) / base * Fraction(fps)
        parts.setdefault(exact.numerator // exact.denominator, tick)
    assert found == list(parts.values())


@given(frames=st.integers(1, 300), every=st.integers(1, 30), rate=st.sampled_from([24, 25, 30, 60]))
def test_fps_of_a_steady_rate_is_every(frames: int, every: int, rate: int) -> None:
    fps = Decimal(rate) / every
    if fps == round(fps, 6):
        ticks = [number * 512 for number in range(frames)]
        tick_s = Fraction(1, rate * 512)
        assert list(chosen(ticks, tick_s, Sampling(fps=fps))) == ticks[::every]


@given(data=st.data(), ticks=increasing)
def test_reordered_times_are_sorted(data: st.DataObject, ticks: list[int]) -> None:
    keys = [number + data.draw(st.integers(0, 30)) for number in range(len(ticks))]
    stored = [tick for _, tick in sorted(zip(keys, ticks, strict=True))]
    assert list(in_order(stored)) == ticks


def test_times_that_go_back_and_times_that_come_twice() -> None:
    assert list(in_order([1, 2, 2, 3])) == [1, 2, 3]
    with pytest.raises(Exception, match="go back, from 67 to 0"):
        list(in_order([*range(1, 100), 0]))


@pytest.mark.parametrize(
    ("word", "spelled"),
    [
        ("a.mp4", "{}/a.mp4"),
        ("video:a.mp4", "{}/a.mp4"),
        ("video:a.mp4?every=1", "{}/a.mp4"),
        ("video:a.mp4?every=030", "video:{}/a.mp4?every=30"),
        ("video:a.mp4?fps=2.50", "video:{}/a.mp4?fps=2.5"),
        ("video:a.mp4?fps=1e2", "video:{}/a.mp4?fps=100"),
        ("video:file://{}/a.mp4?fps=2", "video:{}/a.mp4?fps=2"),
        ("video:q?.mp4", "{}/q?.mp4"),
        ("video:s3://bucket/d/a.MP4?fps=2", "video:s3://bucket/d/a.MP4?fps=2"),
        ("S3://bucket/d/a.mkv/", "s3://bucket/d/a.mkv"),
    ],
)
def test_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, spelled: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "q?.mp4"):
        (tmp_path / name).touch()
    assert sources.canonical(word.format(tmp_path)) == spelled.format(tmp_path)
    assert sources.canonical(spelled.format(tmp_path)) == spelled.format(tmp_path)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("none.mp4", "does not exist"),
        ("video:none.mp4?fps=2", "does not exist"),
        ("video:", "expected video:clip.mp4"),
        ("video:photos", "expected video:clip.mp4"),
        ("video:http://host/a.mp4", "expected a video's path"),
        ("video:a.mp4?fps=0", "expected fps=N"),
        ("video:a.mp4?fps=-1", "expected fps=N"),
        ("video:a.mp4?fps=nan", "expected fps=N"),
        ("video:a.mp4?fps=inf", "expected fps=N"),
        ("video:a.mp4?fps=1e-99999999", "expected fps=N"),
        ("video:a.mp4?fps=1001", "expected fps=N"),
        ("video:a.mp4?fps=two", "expected fps=N"),
        ("video:a.mp4?every=0", "expected every=N"),
        ("video:a.mp4?every=1.5", "expected every=N"),
        ("video:a.mp4?every=", "expected every=N"),
        ("video:a.mp4?every=9999999999999", "expected every=N"),
        ("video:a.mp4?every=2&fps=2", "expected one of"),
        ("video:a.mp4?step=2", "expected one of"),
        ("s3://a.mp4", "expected s3://bucket/a.mp4"),
        ("s3://key:secret@bucket/a.mp4", "credentials go into AWS_ variables"),
    ],
)
def test_what_cannot_be_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").touch()
    with pytest.raises(BadInput, match=message) as caught:
        sources.canonical(word)
    assert "secret" not in str(caught.value)


def test_a_folder_that_is_called_like_a_video_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").mkdir()
    (tmp_path / "x.mp4" / "a.jpg").write_bytes(b"1")
    assert [ref.key for ref in listed(tmp_path / "x.mp4")] == ["a.jpg"]


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = clip(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadInput, match=r"PyAV.*pip install 'imagemill\[models\]'"):
        listed(path)


def test_untrusted_videos_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"hostile")
    with pytest.raises(BadInput, match="IMAGEMILL_UNTRUSTED"):
        listed(tmp_path / "a.mp4", untrusted=True)


@pytest.mark.parametrize(
    "text",
    [
        "no video",
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile real.mp4\n",
    ],
)
def test_what_is_no_video_opens_nothing_else(tmp_path: Path, text: str) -> None:
    """A playlist could name any file or address."""
    real = clip(tmp_path / "real.mp4")
    (tmp_path / "a.mp4").write_text(text.format(real.as_uri()))
    with pytest.raises(BadInput, match="FFmpeg finds no video"):
        listed(tmp_path / "a.mp4")


@pytest.mark.parametrize("size", [0, 1, 8, 40])
def test_a_file_of_a_few_bytes(tmp_path: Path, size: int) -> None:
    path = clip(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadInput, match="is damaged"):
        listed(path)


def test_a_file_without_pictures(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=48000, layout="mono")
        frame = av.AudioFrame(format="fltp", layout="mono", samples=1024)
        frame.sample_rate, frame.pts = 48000, 0
        frame.planes[0].update(bytes(4096))
        container.mux([*stream.encode(frame), *stream.encode()])
    with pytest.raises(BadInput, match="no pictures in it"):
        listed(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "webm"])
def test_a_file_that_was_cut_short(tmp_path: Path, suffix: str) -> None:
    """FFmpeg ends quietly where the bytes do."""
    options = {"movflags": "faststart"} if suffix == "mp4" else None
    path = clip(tmp_path / f"a.{suffix}", 400, options=options)
    whole = path.read_bytes()
    for part in (0.5, 0.7):
        path.write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(BadInput, match="is damaged"):
            listed(path)


def test_a_short_video_that_is_cut_or_damaged(tmp_path: Path) -> None:
    """Less than two seconds of it are missing, but most of it."""
    path = clip(tmp_path / "a.mkv")
    whole = path.read_bytes()
    third = len(whole) // 3
    for data in (whole[: len(whole) // 2], whole[:third] + b"Z" * 400 + whole[third + 400 :]):
        path.write_bytes(data)
        with pytest.raises(BadInput, match=r"is damaged: it says that it ends at 1\.6 s, but does so at"):
            listed(path)
    path.write_bytes(whole)
    assert len(listed(path)) == 40


def test_a_file_without_an_end_is_no_video(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(BadInput, match="is damaged"):
        listed(path)


def test_fingerprints_follow_the_file(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    info = path.stat()
    first = listed(path)
    assert first[1].fingerprint == f"mtime:{info.st_mtime_ns}+{info.st_size}@512"
    clip(path, 41)
    second = listed(path)
    assert [ref.key for ref in second[:40]] == [ref.key for ref in first]
    assert not {ref.fingerprint for ref in first} & {ref.fingerprint for ref in second}
    assert not {ref.uri for ref in first} & {ref.uri for ref in second}


def test_a_link_is_followed_once(tmp_path: Path) -> None:
    real = clip(tmp_path / "real.mp4")
    (tmp_path / "link.mp4").symlink_to(real)
    ref = listed(tmp_path / "link.mp4")[0]
    assert ref.key.startswith("link.mp4/")
    assert ref.uri.endswith(real.as_uri())


def test_a_video_on_s3(s3_url: str, tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4")
    store = objects.open_store(s3_url)
    store.put_file("d/a.mp4", path)
    there = store.stat("d/a.mp4")
    assert there is not None
    refs = listed(f"video:{s3_url}/d/a.mp4?every=4")
    local = listed(f"video:{path}?every=4")
    assert [ref.key for ref in refs] == [ref.key for ref in local]
    assert refs[0].fingerprint == f"etag:{there.etag}+{there.size}@0"
    assert refs[0].uri.endswith(f":{s3_url}/d/a.mp4")
    with pytest.raises(BadInput, match="does not exist"):
        listed(f"{s3_url}/d/none.mp4")


def test_a_video_on_s3_that_is_lost_on_the_way(seaweed: SeaweedFS, s3_url: str, tmp_path: Path) -> None:
    """The listing must not take it for the video's end."""
    path = clip(tmp_path / "a.mp4", 60, size=(640, 480), options={"movflags": "faststart"}, codec="mpeg4", gop=1)
    objects.open_store(s3_url).put_file("a.mp4", path)
    with HttpFaultProxy(seaweed.port) as proxy:
        found = sources.refs(f"{s3_url}/a.mp4", Settings(s3_endpoint_url=proxy.url))
        proxy.add("truncate", "GET")
        with pytest.raises(Unavailable):
            list(found)


def test_reading_that_breaks_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = clip(tmp_path / "a.mkv", 400).read_bytes()

    class Breaking(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > len(whole) // 2:
                raise Unavailable("gone")
            return super().read(size)

    with Breaking(whole) as file, video.open_video(file) as container, pytest.raises(Unavailable, match="gone"):
        list(video._times(container, container.streams.best("video"), "a.mkv"))


def test_a_long_video_is_listed_in_little_memory(tmp_path: Path) -> None:
    path = clip(tmp_path / "a.mp4", 3000, size=(32, 16), codec="mpeg4")
    found = sources.refs(str(path), Settings())
    next(found)
    tracemalloc.start()
    try:
        assert sum(1 for _ in found) == 2999
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
