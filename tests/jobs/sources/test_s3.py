"""The s3 source on a real server: what it lists, page by page, and what it says when it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from jobs import sources
from jobs.sources import s3 as source
from storage import objects, s3
from storage.errors import BadInput, Misconfigured, Unavailable
from storage.settings import Settings
from tests.faultproxy import HttpFaultProxy
from tests.services import SeaweedFS


@pytest.fixture(autouse=True)
def _fresh_clients() -> Iterator[None]:
    """Clients keep the credentials they were made with."""
    s3.store.cache_clear()
    yield
    s3.store.cache_clear()


def put(seaweed: SeaweedFS, url: str, *keys: str) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = seaweed.client(max_pool_connections=16)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=key.encode()), keys))


def test_images_below_the_prefix(seaweed: SeaweedFS, s3_url: str) -> None:
    put(seaweed, s3_url, "photos/a.jpg", "photos/sub/b.PNG", "photos2/x.jpg", "photos.jpg", "photos/notes.txt")
    put(seaweed, s3_url, "photos/.hidden/c.jpg", "photos/.d.jpg")
    found = list(sources.refs(f"{s3_url}/photos", Settings()))
    assert [ref.key for ref in found] == ["a.jpg", "sub/b.PNG"]
    stat = objects.open_store(s3_url).stat("photos/a.jpg")
    assert stat is not None
    assert found[0] == sources.ImageRef("a.jpg", f"{s3_url}/photos/a.jpg", f"etag:{stat.etag}+12")
    assert objects.read(found[1].uri, Settings()) == b"photos/sub/b.PNG"
    assert list(sources.refs(f"{s3_url}/photos/", Settings())) == found


def test_names_equal_after_normalisation_are_images_of_their_own(seaweed: SeaweedFS, s3_url: str) -> None:
    put(seaweed, s3_url, "p/\u00e9.jpg", "p/e\u0301.jpg", "p/only e\u0301.jpg")
    found = list(sources.refs(f"{s3_url}/p", Settings()))
    assert {ref.key for ref in found} == {"\u00e9.jpg", "%C3%A9.jpg", "only \u00e9.jpg"}
    assert len({objects.read(ref.uri, Settings()) for ref in found}) == 3


def test_a_whole_bucket(seaweed: SeaweedFS, s3_url: str) -> None:
    bucket = seaweed.new_bucket()
    put(seaweed, f"s3://{bucket}/d", "a.jpg")
    (ref,) = sources.refs(f"s3://{bucket}", Settings())
    assert (ref.key, ref.uri) == ("d/a.jpg", f"s3://{bucket}/d/a.jpg")


def test_folder_markers_are_not_images(seaweed: SeaweedFS, s3_url: str) -> None:
    put(seaweed, s3_url, "p/a.jpg")
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    seaweed.client().put_object(Bucket=bucket, Key=f"{prefix}/p/folder.jpg/", Body=b"")
    assert [ref.key for ref in sources.refs(f"{s3_url}/p", Settings())] == ["a.jpg"]


def test_more_objects_than_one_page(seaweed: SeaweedFS, s3_url: str) -> None:
    keys = [f"p/{number:04d}.jpg" for number in range(1010)]
    put(seaweed, s3_url, *keys)
    assert [f"p/{ref.key}" for ref in sources.refs(f"{s3_url}/p", Settings())] == keys


def test_a_listing_cut_between_two_pages_says_so(seaweed: SeaweedFS, s3_url: str) -> None:
    put(seaweed, s3_url, *(f"p/{number:04d}.jpg" for number in range(1010)))
    with HttpFaultProxy(seaweed.port) as proxy:
        found = sources.refs(f"{s3_url}/p", Settings(s3_endpoint_url=proxy.url))
        for _ in range(1000):
            next(found)
        proxy.add("error", "GET", "continuation-token")
        with pytest.raises(Unavailable, match="does not serve"):
            next(found)


def test_odd_keys_are_rows_that_open(seaweed: SeaweedFS, s3_url: str) -> None:
    keys = ["a b+c.jpg", "é.jpg", "a%20b.jpg", "a%5Cb.jpg", "x?y#z.jpg", "a\\b.jpg", "n\nl.jpg", "\x01.jpg", "C:/x.jpg"]
    keys += ["{a}[b]|~^.jpg", "*\"<>'`.jpg", "😀.jpg", "a&b=c;d:@$,.jpg"]
    put(seaweed, s3_url, *keys)
    found = list(sources.refs(s3_url, Settings()))
    assert sorted(objects.read(ref.uri, Settings()).decode() for ref in found) == sorted(keys)
    assert len({ref.key for ref in found}) == len(keys)
    assert all(sources.safe_key(ref.key) == ref.key for ref in found)


@pytest.mark.parametrize("key", ["d//e.jpg", "/lead.jpg", "./dot.jpg", "up/../u.jpg"])
def test_keys_that_only_other_servers_keep(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SeaweedFS folds these into other keys; on AWS they are keys of their own."""
    stat = objects.Stat(key, 3, "tag", 0.0)
    monkeypatch.setattr(s3.S3Store, "list", lambda _self, _prefix="": iter([stat]))
    (ref,) = sources.refs("s3://bucket/p", Settings())
    assert ref.uri == f"s3://bucket/p/{key}"
    assert sources.safe_key(ref.key) == ref.key != key


def test_an_empty_prefix_yields_nothing(s3_url: str) -> None:
    assert list(sources.refs(f"{s3_url}/nothing", Settings())) == []


def test_one_image_is_not_a_folder(seaweed: SeaweedFS, s3_url: str) -> None:
    put(seaweed, s3_url, "a.jpg")
    with pytest.raises(BadInput, match="give the prefix above it"):
        list(sources.refs(f"{s3_url}/a.jpg", Settings()))


def test_a_missing_bucket(s3_url: str) -> None:
    with pytest.raises(Misconfigured, match=r"bucket of s3://nowhere/p/? does not exist; create it"):
        list(sources.refs("s3://nowhere/p", Settings()))


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials(s3_url: str, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "wrong")
    with pytest.raises(Misconfigured, match=r"S3 refused .*check AWS_ACCESS_KEY_ID"):
        list(sources.refs(s3_url, Settings()))


def test_no_server(s3_url: str) -> None:
    with pytest.raises(Unavailable, match="check that the server is up"):
        list(sources.refs(s3_url, Settings(s3_endpoint_url="http://127.0.0.1:9")))


def test_spelling() -> None:
    assert sources.canonical("S3://bucket/photos//") == "s3://bucket/photos"
    assert sources.canonical("s3://bucket/") == "s3://bucket"
    assert sources.canonical("s3://bucket/v1.2") == "s3://bucket/v1.2"
    for word in ("s3://", "s3:///photos", "s3://key:secret@bucket/photos"):
        with pytest.raises(BadInput, match="expected s3://bucket/prefix") as caught:
            sources.canonical(word)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "word", ["s3://b/list.csv", "s3://b/x-{000..009}.tar", "s3://b/clip.MP4", "/data", "http://b/p"]
)
def test_words_that_are_no_prefix(word: str) -> None:
    assert not source.claims(word)
