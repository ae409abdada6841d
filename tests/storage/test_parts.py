"""Ranges of files and objects, part:OFFSET+SIZE:URI: exactly those bytes, or an error that says what is wrong."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import objects, s3
from storage.errors import BadInput, Misconfigured, NotFound, Unavailable
from storage.objects import part_of
from storage.settings import Settings
from tests.faultproxy import HttpFaultProxy
from tests.services import SeaweedFS

DATA = os.urandom(3_000_000)


@pytest.fixture(autouse=True)
def _fresh_clients() -> Iterator[None]:
    """Clients keep the credentials they were made with."""
    s3.store.cache_clear()
    yield
    s3.store.cache_clear()


@pytest.fixture
def uri(store_url: str) -> str:
    """An object of 3 MB, once a file and once on S3."""
    store = objects.open_store(store_url)
    store.put("d/a b.tar", DATA)
    return store.url_for("d/a b.tar")


@pytest.mark.parametrize(("offset", "size"), [(0, 3_000_000), (0, 1), (2_999_999, 1), (512, 1_100_000), (7, 0)])
def test_exactly_these_bytes(uri: str, offset: int, size: int) -> None:
    assert objects.read(part_of(uri, offset, size), Settings()) == DATA[offset : offset + size]


@pytest.mark.parametrize(("offset", "size"), [(2_999_999, 2), (3_000_000, 1), (9 * 10**18, 1), (0, 9 * 10**18)])
def test_bytes_that_are_not_there(uri: str, offset: int, size: int) -> None:
    """Before memory is taken for them."""
    with pytest.raises(Unavailable):
        objects.read(part_of(uri, offset, size), Settings())


def test_the_limit_is_of_the_part(uri: str) -> None:
    assert len(objects.read(part_of(uri, 5, 1000), Settings(), limit=1000)) == 1000
    with pytest.raises(BadInput, match="has 1001 bytes and the limit is 1000"):
        objects.read(part_of(uri, 5, 1001), Settings(), limit=1000)


def test_of_a_thing_that_is_gone(uri: str, store_url: str) -> None:
    objects.open_store(store_url).delete(["d/a b.tar"])
    with pytest.raises(NotFound, match="does not exist"):
        objects.read(part_of(uri, 0, 1), Settings())


@pytest.mark.parametrize(
    "uri",
    [
        "part:0+1:part:0+1:file:///a.tar",
        "part:0+1:refused:file:///a.tar",
        "part:0+1:frame:0:0:file:///a.mp4",
        "part:-1+1:file:///a.tar",
        "part:0+:file:///a.tar",
        "part:0+1:/a.tar",
        "part:0+1:http://key:secret@host/a.tar",
        "part:0+1:s3://bucket",
        "part:٣+1:file:///a.tar",
        "part:0+1:file://host/a.tar",
        "part:" + "9" * 30 + "+1:file:///a.tar",
    ],
)
def test_what_is_no_part(uri: str) -> None:
    with pytest.raises(BadInput, match="cannot read") as caught:
        objects.read(uri, Settings())
    assert "secret" not in str(caught.value)


@given(text=st.text(st.sampled_from("part:0+1file/s3"), max_size=30))
def test_any_text_is_bad_input_or_not_found(text: str) -> None:
    with pytest.raises((BadInput, NotFound, Unavailable, Misconfigured)):
        objects.read(f"part:0+1:file:///nowhere/{text}", Settings())
    with pytest.raises(BadInput):
        objects.read(f"part:{text}", Settings())


def test_of_what_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadInput, match="not a regular file"):
        objects.read(part_of((tmp_path / "pipe").as_uri(), 0, 1), Settings())
    with pytest.raises((NotFound, BadInput)):
        objects.read(part_of(tmp_path.as_uri(), 0, 1), Settings())


@pytest.mark.parametrize("action", ["slowdown", "error", "lost"])
def test_passing_faults_are_outlived(seaweed: SeaweedFS, s3_url: str, action: str) -> None:
    objects.open_store(s3_url).put("k", DATA)
    with HttpFaultProxy(seaweed.port) as proxy:
        settings = Settings(s3_endpoint_url=proxy.url)
        rule = proxy.add(action, "GET", times=1)  # type: ignore[arg-type]
        assert objects.read(part_of(f"{s3_url}/k", 9, 99_999), settings) == DATA[9:100_008]
        assert rule.hits == 1


def test_a_cut_body_is_never_taken_for_the_part(seaweed: SeaweedFS, s3_url: str) -> None:
    objects.open_store(s3_url).put("k", DATA)
    with HttpFaultProxy(seaweed.port) as proxy:
        proxy.add("truncate", "GET")
        with pytest.raises(Unavailable):
            objects.read(part_of(f"{s3_url}/k", 0, 200_000), Settings(s3_endpoint_url=proxy.url))


def test_keys_that_obstore_would_change_go_through_boto3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        def get_object(self, Bucket: str, Key: str, Range: str) -> dict[str, object]:
            assert (Bucket, Key, Range) == ("bucket", "a//b", "bytes=2-4")
            return {"Body": io.BytesIO(answers.pop())}

    monkeypatch.setattr(s3, "_boto_client", lambda _settings: Client())
    answers = [b"abcdef", b"ab", b"abc"]  # from a server that does not know ranges; cut; right
    assert objects.read("part:2+3:s3://bucket/a//b", Settings()) == b"abc"
    for _ in range(2):
        with pytest.raises(Unavailable):
            objects.read("part:2+3:s3://bucket/a//b", Settings())


def test_an_object_as_a_file(s3_url: str) -> None:
    store = objects.open_store(s3_url)
    store.put("k", DATA)
    there = store.stat("k")
    assert isinstance(store, s3.S3Store)
    assert there is not None
    with store.open_file(there) as file:
        for offset, whence, size in [(0, 0, 10), (2_000_000, 0, 1_500_000), (-5, 2, 10), (-1_000_000, 1, 7), (9, 2, 1)]:
            plain = io.BytesIO(DATA)
            plain.seek(file.tell())
            assert file.seek(offset, whence) == plain.seek(offset, whence)
            assert file.read(size) == plain.read(size)
        file.seek(0)
        assert file.read() == DATA


def test_an_object_as_a_file_is_one_version(s3_url: str) -> None:
    store = objects.open_store(s3_url)
    store.put("k", DATA)
    there = store.stat("k")
    assert isinstance(store, s3.S3Store)
    assert there is not None
    store.put("k", DATA[::-1])
    with store.open_file(there) as file, pytest.raises(Unavailable):
        file.read(10)


def test_both_libraries_pin_the_version(s3_url: str) -> None:
    """The server here answers boto3 with 412, which is another error elsewhere."""
    store = objects.open_store(s3_url)
    store.put("k", DATA)
    assert isinstance(store, s3.S3Store)
    odd = s3.store(store.bucket, f"{store.prefix}/", Settings())  # its keys hold "//"
    for one, key in ((store, "k"), (odd, "k")):
        with pytest.raises((Unavailable, NotFound)):
            one.read_part(key, 0, 1, "0" * 32)
