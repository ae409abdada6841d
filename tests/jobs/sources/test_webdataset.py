"""The webdataset source: what it lists of a tar, byte for byte as Python's tarfile unpacks it, and what it refuses."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs import sources
from jobs.sources import ImageRef
from storage import objects, s3
from storage.errors import BadInput, Unavailable
from storage.settings import Settings
from tests.faultproxy import HttpFaultProxy
from tests.services import SeaweedFS

Files = dict[str, bytes]

FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
SAMPLES: Files = {
    "0001.jpg": b"one" * 400,
    "0001.json": b'{"caption": "a cat"}',
    "0001.seg.png": b"mask",
    "0002.txt": b"no picture",
    "d.x/0003.json": b'{"boxes": [[1, 2, 3, 4]]}',
    "d.x/0003.WEBP": b"",
    "d.x/0004.jpg": bytes(range(256)) * 9,
}


@pytest.fixture(autouse=True)
def _fresh_clients() -> Iterator[None]:
    """Clients keep the credentials they were made with."""
    s3.store.cache_clear()
    yield
    s3.store.cache_clear()


def make(path: Path, files: Files | list[tuple[str, bytes]] = SAMPLES, kind: str = "gnu") -> Path:
    """Write a tar; a list may hold a name twice."""
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def listed(uri: object, **settings: object) -> list[ImageRef]:
    return [ref for ref in sources.refs(str(uri), Settings(**settings)) if ref is not None]  # type: ignore[arg-type]


def contents(refs: list[ImageRef]) -> Files:
    return {ref.key: objects.read(ref.uri, Settings()) for ref in refs}


@pytest.mark.parametrize("kind", FORMATS)
def test_each_image_has_the_bytes_that_tarfile_unpacks(tmp_path: Path, kind: str) -> None:
    long = {} if kind == "ustar" else {f"{'long/' * 30}{'n' * 120}\u00e9.jpg": b"far", "\U0001f600.png": b"near"}
    path = make(tmp_path / "train.tar", {**SAMPLES, **long}, kind)
    with tarfile.open(path) as tar:
        names = [name for name in tar.getnames() if name.lower().endswith((".jpg", ".png", ".webp"))]
        expected = {f"train/{name}": tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]
    assert contents(listed(path)) == expected
    assert len(expected) == 4 + len(long)


def test_data_is_the_json_of_the_same_sample(tmp_path: Path) -> None:
    found = {ref.key: ref.data for ref in listed(make(tmp_path / "t.tar"))}
    assert json.loads(found["t/0001.jpg"]) == json.loads(found["t/0001.seg.png"]) == {"caption": "a cat"}
    assert json.loads(found["t/d.x/0003.WEBP"]) == {"boxes": [[1, 2, 3, 4]]}
    assert found["t/d.x/0004.jpg"] == ""


@pytest.mark.parametrize(
    "text", [b"[1]", b"{", b'{"a": NaN}', b"\xff", b"", b"[" * 60_000, b'{"a": "' + b"x" * 65_536 + b'"}', b'"text"']
)
def test_a_sidecar_that_is_no_small_object_is_none(tmp_path: Path, text: bytes) -> None:
    (ref,) = listed(make(tmp_path / "t.tar", {"a.jpg": b"1", "a.json": text}))
    assert ref.data == ""


def test_members_of_another_sample_end_a_sample(tmp_path: Path) -> None:
    refs = listed(make(tmp_path / "t.tar", {"a.jpg": b"1", "b.jpg": b"2", "a.json": b'{"a": 1}'}))
    assert [(ref.key, ref.data) for ref in refs] == [("t/a.jpg", ""), ("t/b.jpg", "")]


def test_a_name_that_comes_again_is_another_item(tmp_path: Path) -> None:
    files = [("a.jpg", b"1"), ("./a.jpg", b"2"), ("a~1024.jpg", b"3"), ("e\u0301.jpg", b"4"), ("\u00e9.jpg", b"5")]
    refs = listed(make(tmp_path / "t.tar", files))
    assert len({ref.key for ref in refs}) == 5
    assert list(contents(refs).values()) == [b"1", b"2", b"3", b"4", b"5"]
    assert [ref.key for ref in refs][:2] == ["t/a.jpg", "t/a~1024.jpg"]


def test_what_is_no_regular_file_or_hidden_is_passed_over(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind, target in (
            ("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.jpg", tarfile.LNKTYPE, "real.jpg"),
            ("pipe.jpg", tarfile.FIFOTYPE, ""),
            ("device.jpg", tarfile.CHRTYPE, ""),
            ("folder.jpg", tarfile.DIRTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        for name in ("._real.jpg", ".hidden/a.jpg", "real.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    assert [ref.key for ref in listed(tmp_path / "t.tar")] == ["t/real.jpg"]


def test_names_that_lead_out_are_escaped(tmp_path: Path) -> None:
    names = ["/etc/a.jpg", "../../b.jpg", "c/../d.jpg", "e\\f.jpg", "g\nh.jpg"]
    refs = listed(make(tmp_path / "t.tar", dict.fromkeys(names, b"x")))
    assert len(refs) == len({ref.key for ref in refs}) == len(names)
    assert all(".." not in ref.key.split("/") and ref.key.startswith("t/") for ref in refs)
    assert set(contents(refs).values()) == {b"x"}


def test_an_empty_tar_yields_nothing(tmp_path: Path) -> None:
    assert listed(make(tmp_path / "t.tar", {})) == []
    assert listed(make(tmp_path / "u.tar", {"a.txt": b"1"})) == []


def test_a_sparse_member_is_a_row_that_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "t.tar", {"s.jpg": b"x" * 512, "b.jpg": b"2"})
    header = bytearray(path.read_bytes()[:512])
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    header[483:495] = b"%011o\0" % 100_000_000  # the size it would unpack to
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + path.read_bytes()[512:])
    first, second = listed(path)
    assert (first.key, first.fingerprint) == ("t/s.jpg", "refused")
    with pytest.raises(BadInput, match="refused"):
        objects.read(first.uri, Settings())
    assert objects.read(second.uri, Settings()) == b"2"


def test_fingerprints_tell_the_tar_and_the_place(tmp_path: Path) -> None:
    path = make(tmp_path / "t.tar")
    info = path.stat()
    first = listed(path)
    assert first[0].fingerprint == f"mtime:{info.st_mtime_ns}+{info.st_size}@512+1200"
    assert len({ref.fingerprint for ref in first}) == len(first)
    os.utime(path, (1, 1))
    assert not {ref.fingerprint for ref in first} & {ref.fingerprint for ref in listed(path)}


def test_a_range_of_tars(tmp_path: Path) -> None:
    for folder in ("a0", "a1"):
        (tmp_path / folder).mkdir()
        for number in (8, 9, 10):
            make(tmp_path / folder / f"t-{number:03d}.TAR", {"x.jpg": f"{folder}{number}".encode()})
    refs = listed(tmp_path / "a{0..1}" / "t-{008..010}.TAR")
    assert [ref.key for ref in refs] == [f"a{i}/t-{n:03d}/x.jpg" for i in (0, 1) for n in (8, 9, 10)]
    assert contents(refs)["a1/t-010/x.jpg"] == b"a110"
    assert [ref.uri for ref in listed(tmp_path / "a1" / "t-0{09..10}.TAR")] == [ref.uri for ref in refs[4:]]
    with pytest.raises(BadInput, match=r"t-011.TAR.*does not exist"):
        listed(tmp_path / "a{0..1}" / "t-{008..011}.TAR")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("t-{3..1}.tar", "counts down"),
        ("t-{0..99999999}.tar", "more than 1000000"),
        ("t-{0..9999}-{0..9999}.tar", "more than 1000000"),
        ("none.tar", "does not exist"),
        ("http://host/a.tar", "cannot tell what dataset"),
        ("a.tgz", "compressed with gzip"),
        ("a.tar.gz", "compressed with gzip"),
        ("s3://a.tar", "expected s3://bucket/a.tar"),
        ("s3://key:secret@bucket/a.tar", "credentials go into AWS_ variables"),
    ],
)
def test_what_cannot_be_a_dataset(word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match=message) as caught:
        sources.canonical(word)
    assert "secret" not in str(caught.value)


def test_a_folder_that_is_called_like_a_tar_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.tar").mkdir()
    (tmp_path / "x.tar" / "a.jpg").write_bytes(b"1")
    assert [ref.key for ref in listed(tmp_path / "x.tar")] == ["a.jpg"]


@pytest.mark.parametrize("module", ["gzip", "bz2", "lzma"])
def test_a_compressed_tar_by_another_name(tmp_path: Path, module: str) -> None:
    data = make(tmp_path / "t.tar").read_bytes()
    (tmp_path / "t.tar").write_bytes(__import__(module).compress(data))
    with pytest.raises(BadInput, match=r"compressed with .* unpack it"):
        listed(tmp_path / "t.tar")


def test_cut_anywhere_it_is_refused(tmp_path: Path) -> None:
    """Only what the end mark's second block and the padding after it hold may be missing."""
    whole = make(tmp_path / "t.tar", kind="pax").read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    everything = [ref.key for ref in listed(tmp_path / "t.tar")]
    for size in [*range(0, end, 100), *range(512, end, 512), end - 1, end, end + 511]:
        (tmp_path / "t.tar").write_bytes(whole[:size])
        with pytest.raises(BadInput, match="is damaged"):
            listed(tmp_path / "t.tar")
    (tmp_path / "t.tar").write_bytes(whole[: end + 512])
    assert [ref.key for ref in listed(tmp_path / "t.tar")] == everything


def test_zeros_in_the_middle_do_not_end_it(tmp_path: Path) -> None:
    whole = bytearray(make(tmp_path / "t.tar").read_bytes())
    whole[2048:2560] = bytes(512)  # the header of the second member
    (tmp_path / "t.tar").write_bytes(whole)
    with pytest.raises(BadInput, match="goes on after the end mark at 2048"):
        listed(tmp_path / "t.tar")


def test_a_damaged_header_in_the_middle_does_not_end_it(tmp_path: Path) -> None:
    """Python's own iteration ends here in silence."""
    whole = bytearray(make(tmp_path / "t.tar").read_bytes())
    whole[2050] ^= 1
    (tmp_path / "t.tar").write_bytes(whole)
    with tarfile.open(tmp_path / "t.tar") as tar:
        assert tar.getnames() == ["0001.jpg"]
    with pytest.raises(BadInput, match="bad checksum"):
        listed(tmp_path / "t.tar")


@pytest.mark.parametrize("count", [200, pytest.param(800, marks=pytest.mark.slow)])
def test_any_damage_is_bad_input_or_harmless(tmp_path: Path, count: int) -> None:
    whole = make(tmp_path / "t.tar", kind="pax").read_bytes()[:10_240]
    rng = random.Random(1)
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.choice((0, 1, 48, 55, 128, 255, rng.randrange(256)))
        for start in range(0, len(data), 512):  # right checksums, so that the damage is looked at
            if data[start + 257 : start + 262] == b"ustar":
                data[start + 148 : start + 156] = b" " * 8
                data[start + 148 : start + 156] = b"%06o\0 " % sum(data[start : start + 512])
        (tmp_path / "t.tar").write_bytes(data)
        with contextlib.suppress(BadInput):
            for ref in listed(tmp_path / "t.tar"):
                if ref.fingerprint != "refused":
                    objects.read(ref.uri, Settings())


def test_headers_without_end_are_refused_in_little_memory(tmp_path: Path) -> None:
    for name, kind, size in (("g", b"g", 64 << 20), ("L", b"L", 64 << 20), ("chain", b"x", 0)):
        member = tarfile.TarInfo("h")
        member.type, member.size = kind, size
        header = member.tobuf(tarfile.USTAR_FORMAT)
        with (tmp_path / f"{name}.tar").open("wb") as file:
            file.write(header * (3000 if not size else 1))
            file.truncate(max(size, 3000 * 512) + 10_240)
        tracemalloc.start()
        try:
            with pytest.raises(BadInput, match="damaged"):
                listed(tmp_path / f"{name}.tar")
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def test_many_large_headers_of_one_member_are_refused(tmp_path: Path) -> None:
    """Each is small enough, and tarfile would keep them all."""
    member = tarfile.TarInfo("a.jpg")
    long = tarfile.TarInfo("h")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 700 * 1024
    for count in (1, 2):
        header = (long.tobuf() + b"n".ljust(long.size, b"\0")) * count
        (tmp_path / "t.tar").write_bytes(header + member.tobuf() + bytes(1024))
        if count == 1:
            assert listed(tmp_path / "t.tar") == []  # its name is "n"
        else:
            with pytest.raises(BadInput, match="more than 1048576 bytes"):
                listed(tmp_path / "t.tar")


def test_a_long_tar_is_listed_in_little_memory(tmp_path: Path) -> None:
    """Python's own iteration keeps every member: about 2 KB each."""
    with (tmp_path / "t.tar").open("wb") as file:
        for number in range(20_000):
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = 1
            file.write(member.tobuf() + b"x".ljust(512, b"\0"))
        file.write(bytes(1024))
    found = sources.refs(str(tmp_path / "t.tar"), Settings())
    next(found)
    tracemalloc.start()
    try:
        assert sum(1 for _ in found) == 19_999
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


def test_one_tar_may_be_a_link_and_a_pattern_may_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    real = make(tmp_path / "out" / "real.tar", {"a.jpg": b"1"})
    (tmp_path / "in" / "t0.tar").symlink_to(real)
    (ref,) = listed(tmp_path / "in" / "t0.tar")
    assert (ref.key, ref.uri) == ("t0/a.jpg", f"part:512+1:{real.as_uri()}")
    with pytest.raises(BadInput, match="leads out of its folder"):
        listed(tmp_path / "in" / "t{0..0}.tar")
    assert listed(tmp_path / "in" / "t{0..0}.tar", local_roots=str(tmp_path / "out")) == [ref]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.tar")
    with pytest.raises(BadInput, match="not a file"):
        listed(tmp_path / "t.tar")


def test_a_tar_on_s3(s3_url: str, tmp_path: Path) -> None:
    files = {f"{number:03d}.jpg": os.urandom(300_000) for number in range(12)} | SAMPLES
    store = objects.open_store(s3_url)
    for number in (0, 1):
        store.put_file(f"d/t-{number}.tar", make(tmp_path / "t.tar", files))
    refs = listed(f"{s3_url}/d/t-{{0..1}}.tar")
    local = listed(tmp_path / "t.tar")
    assert [ref.key for ref in refs] == [f"t-{n}/{ref.key[2:]}" for n in (0, 1) for ref in local]
    assert [ref.data for ref in refs] == [ref.data for ref in local] * 2
    assert list(contents(refs[:16]).values()) == list(contents(local).values())
    there = store.stat("d/t-0.tar")
    assert there is not None
    assert refs[0].fingerprint == f"etag:{there.etag}+{there.size}@512+300000"
    assert refs[0].uri == f"part:512+300000:{s3_url}/d/t-0.tar"


def test_a_tar_on_s3_is_not_read_whole(seaweed: SeaweedFS, s3_url: str, tmp_path: Path) -> None:
    files = {f"{number}.jpg": os.urandom(8 << 20) for number in range(4)}
    objects.open_store(s3_url).put_file("t.tar", make(tmp_path / "t.tar", files))
    with HttpFaultProxy(seaweed.port) as proxy:
        assert len(listed(f"{s3_url}/t.tar", s3_endpoint_url=proxy.url)) == 4
        gets = [seen for seen in proxy.seen if seen.method == "GET"]
    assert 4 <= len(gets) <= 6  # of 1 MiB each, for 32


def test_a_tar_on_s3_that_is_missing_cut_or_lost_on_the_way(seaweed: SeaweedFS, s3_url: str, tmp_path: Path) -> None:
    whole = make(tmp_path / "t.tar", {f"{n}.jpg": bytes(3 << 20) for n in range(3)}).read_bytes()
    store = objects.open_store(s3_url)
    store.put("cut.tar", whole[: 4 << 20])
    store.put("t.tar", whole)
    with pytest.raises(BadInput, match="does not exist"):
        listed(f"{s3_url}/none.tar")
    with pytest.raises(BadInput, match="cut short"):
        listed(f"{s3_url}/cut.tar")
    with HttpFaultProxy(seaweed.port) as proxy:
        found = sources.refs(f"{s3_url}/t.tar", Settings(s3_endpoint_url=proxy.url))
        next(found)
        proxy.add("truncate", "GET")
        with pytest.raises(Unavailable):
            list(found)


def test_a_tar_on_s3_that_changes_meanwhile(s3_url: str, tmp_path: Path) -> None:
    store = objects.open_store(s3_url)
    store.put("t.tar", make(tmp_path / "t.tar", {f"{n}.jpg": bytes(3 << 20) for n in range(3)}).read_bytes())
    found = sources.refs(f"{s3_url}/t.tar", Settings())
    next(found)
    store.put("t.tar", make(tmp_path / "t.tar", {f"{n}.jpg": b"x" * (3 << 20) for n in range(3)}).read_bytes())
    with pytest.raises(Unavailable):
        list(found)


def test_gzip_in_a_bucket(s3_url: str, tmp_path: Path) -> None:
    objects.open_store(s3_url).put("t.tar", gzip.compress(make(tmp_path / "t.tar").read_bytes()))
    with pytest.raises(BadInput, match="compressed with gzip"):
        listed(f"{s3_url}/t.tar")
