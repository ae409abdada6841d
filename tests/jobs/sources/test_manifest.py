"""The manifest source: four formats, one meaning; which paths may be read; errors that name the line."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import sources, tabular
from jobs.sources import ImageRef, manifest
from storage import objects, s3
from storage.errors import BadInput, Misconfigured, Unavailable
from storage.settings import Settings

FORMATS = ["csv", "jsonl", "parquet", "txt"]


@pytest.fixture(autouse=True)
def _fresh_clients() -> Iterator[None]:
    s3.store.cache_clear()
    yield
    s3.store.cache_clear()


def dump(form: str, rows: list[dict[str, Any]]) -> bytes:
    """Rows as the bytes of a manifest; a .txt holds only the first column."""
    if form == "txt":
        return "".join(f"{next(iter(row.values()))}\n" for row in rows).encode()
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    names = list(rows[0])
    if form == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    buffer = io.BytesIO()
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), buffer)
    return buffer.getvalue()


def make(folder: Path, form: str, content: bytes | list[dict[str, Any]]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"list.{form}"
    path.write_bytes(content if isinstance(content, bytes) else dump(form, content))
    return str(path)


def listed(uri: str, **more: Any) -> list[ImageRef]:
    return list(sources.refs(uri, Settings(**more)))


def images(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_means_the_same(tmp_path: Path, form: str) -> None:
    images(tmp_path, "a.jpg", "sub/é b.png")
    names = ["a.jpg", "./sub/é b.png", str(tmp_path / "sub/é b.png"), "s3://bucket/x/y.jpg", "gone.jpg"]
    found = listed(make(tmp_path, form, [{"uri": name} for name in names]))
    assert [ref.key for ref in found] == ["a.jpg", "sub/é b.png", "sub/é b.png", "bucket/x/y.jpg", "gone.jpg"]
    info = (tmp_path / "a.jpg").stat()
    assert found[0] == ImageRef("a.jpg", (tmp_path / "a.jpg").as_uri(), f"mtime:{info.st_mtime_ns}+5")
    assert objects.read(found[1].uri, Settings()) == "sub/é b.png".encode()
    assert found[3].uri == "s3://bucket/x/y.jpg"
    assert found[3].fingerprint.startswith("uri:")
    assert found[4].fingerprint == "missing"


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", ["uri", "path", "image", "file", "url", "URI "])
def test_columns_and_their_other_names(tmp_path: Path, form: str, column: str) -> None:
    rows = [
        {"label": "dog", column: "s3://b/1.jpg", "key": "one", "etag": "abc"},
        {"label": "cat", column: "s3://b/2.jpg", "key": None, "etag": None},
    ]
    first, second = listed(make(tmp_path, form, rows))
    assert first == ImageRef("one", "s3://b/1.jpg", "given:abc")
    assert second.key == "b/2.jpg"
    assert second.fingerprint.startswith("uri:")


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_numbers_as_keys(tmp_path: Path, form: str) -> None:
    (ref,) = listed(make(tmp_path, form, [{"uri": "s3://b/1.jpg", "key": 7, "fingerprint": 8}]))
    assert (ref.key, ref.fingerprint) == ("7", "given:8")


@pytest.mark.parametrize("form", ["csv", "jsonl", "txt"])
def test_an_empty_manifest_yields_nothing(tmp_path: Path, form: str) -> None:
    for content in (b"", b"\n\n", b"\xef\xbb\xbf"):
        assert listed(make(tmp_path, form, content)) == []


def test_an_empty_table_yields_nothing(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": pa.array([], pa.string())}), tmp_path / "list.parquet")
    assert listed(str(tmp_path / "list.parquet")) == []


def test_text_details(tmp_path: Path) -> None:
    found = listed(
        make(tmp_path, "txt", b"\xef\xbb\xbfs3://b/1.jpg\r\n\r\n# note\r\n   \n s3://b/2.jpg \ns3://b/3.jpg")
    )
    assert [ref.uri for ref in found] == ["s3://b/1.jpg", "s3://b/2.jpg", "s3://b/3.jpg"]


def test_csv_details(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf"uri",key,note\r\n"s3://b/a,1.jpg",one,"two\nlines"\r\n\r\ns3://b/2.jpg\r\n'
    found = listed(make(tmp_path, "csv", content))
    assert [(ref.key, ref.uri) for ref in found] == [("one", "s3://b/a,1.jpg"), ("b/2.jpg", "s3://b/2.jpg")]


@pytest.mark.parametrize(
    "kind", [pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()]
)
def test_parquet_text_types(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(["s3://b/1.jpg", "s3://b/2.jpg"]).cast(kind)
    pq.write_table(pa.table({"uri": column, "blob": [b"x", b"y"]}), tmp_path / "list.parquet")
    assert [ref.key for ref in listed(str(tmp_path / "list.parquet"))] == ["b/1.jpg", "b/2.jpg"]


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("jsonl", b'{"uri": "s3://b/1.jpg"}\n{"uri": \n', "line 2: not JSON"),
        ("jsonl", b'{"uri": "s3://b/1.jpg"}\n["a"]\n', "line 2: expected a JSON object"),
        ("jsonl", b"[" * 100_000 + b"\n", "line 1: not JSON"),
        ("jsonl", b'{"name": "a", "size": 3}\n', "line 1: no column 'uri'.*'name', 'size'"),
        ("jsonl", b'{"uri": ["a"]}\n', "line 1: expected a URI or path as text"),
        ("jsonl", b'{"uri": "a.jpg", "key": [1]}\n', "line 1: expected the key as text"),
        ("jsonl", b'{"uri": "s3://b/1.jpg", "fingerprint": {}}\n', "line 1: expected a fingerprint"),
        ("jsonl", b'{"uri": "s3://b/\\ud800.jpg"}\n', "line 1: .*half a letter"),
        ("jsonl", b'{"uri": "a\\u0000.jpg", "key": "k"}\n', "line 1: .*control character"),
        ("jsonl", b'{"uri": ""}\n', "line 1: expected a URI or path"),
        ("csv", b"uri,key\ns3://b/1.jpg,a\n,b\n", "line 3: expected a URI or path"),
        ("csv", b"name,size\na,1\n", "line 1: no column 'uri'.*'name', 'size'"),
        ("csv", b"uri;key\na;1\n", "no column 'uri'.*'uri;key'"),
        ("csv", b"uri\ns3://b/a,b.jpg\n", "line 2: 2 values under 1 columns; quote"),
        ("csv", b'uri\n"s3://b/1.jpg\ns3://b/2.jpg\n', "line 3: not CSV"),
        ("csv", b'uri\n"s3://b/1.jpg\n"s3://b/2.jpg\n', "line 3: not CSV"),
        ("csv", b"uri\n" + b"x" * 200_000 + b"\n", "line 2: not CSV .*field larger"),
        ("txt", b"s3://b/1.jpg\ncaf\xe9.jpg\n", "line 2: not UTF-8"),
        ("txt", "uri\n".encode("utf-16"), "line 1: not UTF-8"),
        ("txt", b"x" * (tabular.LINE_LIMIT + 1), "line 1: longer than"),
        ("txt", b"s3://b\n", "line 1: .*not s3://bucket/key"),
        ("txt", b"s3://key:secret@b/1.jpg\n", "line 1: .*credentials go into AWS_"),
        ("txt", b"s3://b//1.jpg\n", "line 1: unsafe item key.*'key' column"),
        ("txt", b"s3://b/../1.jpg\n", "line 1: .*'..' part"),
        ("txt", b"s3://b/1.jpg\nsub/../../1.jpg\n", "line 2: .*'..' part"),
        ("txt", b"a\\b.jpg\n", "line 1: unsafe item key"),
        ("txt", b"file:///etc/passwd\n", "line 1: .*give a plain path"),
        ("txt", b"FILE:///etc/passwd\n", "line 1: .*give a plain path"),
        ("txt", b"https://h/1.jpg?token=secret\n", "line 1: .*copy the images to a folder or bucket first"),
        ("txt", b"http://[/1.jpg\n", "line 1: .*web addresses are off"),
        ("txt", b"gs://b/1.jpg\n", "line 1: .*give s3:// or a path"),
        ("txt", b"/etc/hostname\n", "line 1: .*leads outside the manifest's folder.*IMAGEMILL_LOCAL_ROOTS"),
        ("txt", b".\n", "line 1: unsafe item key"),
        ("parquet", b"PAR1 this is not", "not readable as Parquet"),
        ("parquet", b"", "not readable as Parquet"),
        ("parquet", dump("parquet", [{"name": "a"}]), "its schema: no column 'uri'.*'name'"),
        ("parquet", dump("parquet", [{"image": {"bytes": b"x", "path": "p"}}]), "column 'image' is struct"),
        ("parquet", dump("parquet", [{"uri": "s3://b/1"}, {"uri": None}]), "row 2: expected a URI or path"),
    ],
)
def test_errors_name_the_line_and_the_file(tmp_path: Path, form: str, content: bytes, message: str) -> None:
    uri = make(tmp_path, form, content)
    with pytest.raises(BadInput, match=message) as caught:
        listed(uri)
    text = str(caught.value)
    assert uri in text
    assert "secret" not in text
    assert "\n" not in text
    assert len(text) < 1000


def test_rows_are_counted_over_all_batches(tmp_path: Path) -> None:
    rows = [{"uri": f"s3://b/{number}.jpg"} for number in range(9000)]
    assert len(listed(make(tmp_path, "parquet", rows))) == 9000
    rows[8499] = {"uri": "s3://b"}
    with pytest.raises(BadInput, match="row 8500: "):
        listed(make(tmp_path, "parquet", rows))


def test_a_parquet_file_with_broken_pages(tmp_path: Path) -> None:
    whole = dump("parquet", [{"uri": f"s3://b/{os.urandom(8).hex()}.jpg"} for _ in range(10_000)])
    uri = make(tmp_path, "parquet", whole[:2000] + b"\xff" * 2000 + whole[4000:])
    with pytest.raises(BadInput, match=r"not readable as Parquet|not UTF-8|control character|as text"):
        listed(uri)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["s3://b/1.jpg"]), pa.array(["s3://b/2.jpg"])], ["uri", "uri"])
    pq.write_table(table, tmp_path / "list.parquet")
    with pytest.raises(BadInput, match="not readable as Parquet"):
        listed(str(tmp_path / "list.parquet"))


def test_local_files_stay_under_the_roots(tmp_path: Path) -> None:
    images(tmp_path, "lists/in.jpg", "pool/deep/a.jpg", "secret/b.jpg", "pool2/c.jpg")
    (tmp_path / "lists/away").symlink_to("../secret")
    (tmp_path / "lists/one.jpg").symlink_to("../secret/b.jpg")
    (tmp_path / "lists/near.jpg").symlink_to("in.jpg")
    for name in ("away/b.jpg", "one.jpg", str(tmp_path / "pool/deep/a.jpg"), "away/no-such.jpg"):
        with pytest.raises(BadInput, match=r"line 2: .*may not be read.*IMAGEMILL_LOCAL_ROOTS"):
            listed(make(tmp_path / "lists", "txt", f"in.jpg\n{name}\n".encode()))
    pool = tmp_path / "pool"
    (ref,) = listed(make(tmp_path / "lists", "txt", f"{pool}/deep/a.jpg\n".encode()), local_roots=(pool,))
    assert (ref.key, ref.uri) == ("deep/a.jpg", (pool / "deep/a.jpg").as_uri())
    with pytest.raises(BadInput, match="may not be read"):
        listed(make(tmp_path / "lists", "txt", f"{tmp_path}/pool2/c.jpg\n".encode()), local_roots=(pool,))
    (ref,) = listed(make(tmp_path / "lists", "txt", b"near.jpg\n"))
    assert (ref.key, ref.uri) == ("near.jpg", (tmp_path / "lists/in.jpg").as_uri())


def test_a_root_that_is_a_link(tmp_path: Path) -> None:
    images(tmp_path, "real/deep/a.jpg")
    (tmp_path / "pool").symlink_to("real")
    for name in ("pool/deep/a.jpg", "real/deep/a.jpg"):
        uri = make(tmp_path / "lists", "txt", f"{tmp_path}/{name}\n".encode())
        (ref,) = listed(uri, local_roots=(tmp_path / "pool",))
        assert (ref.key, ref.uri) == ("deep/a.jpg", (tmp_path / "real/deep/a.jpg").as_uri())


def test_missing_files_are_rows(tmp_path: Path) -> None:
    images(tmp_path, "a.jpg")
    (tmp_path / "self.jpg").symlink_to("self.jpg")
    (tmp_path / "dangling.jpg").symlink_to("nothing.jpg")
    names = ["no/such/b.jpg", "a.jpg/c.jpg", "self.jpg", "dangling.jpg", "n" * 300 + ".jpg"]
    found = listed(make(tmp_path, "txt", "\n".join(names).encode()))
    assert [(ref.key, ref.fingerprint) for ref in found] == [(name, "missing") for name in names]


def test_folders_and_pipes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in (b"folder.jpg", b"pipe.jpg"):
        with pytest.raises(BadInput, match=r"line 1: .*not a regular file"):
            listed(make(tmp_path, "txt", name))


def test_an_unreadable_folder_breaks_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path, "a.jpg")
    uri = make(tmp_path, "txt", b"a.jpg\n")

    def lstat(path: str) -> os.stat_result:
        raise PermissionError(13, "Permission denied", path)

    found = sources.refs(uri, Settings())
    monkeypatch.setattr(manifest.os, "lstat", lstat)
    with pytest.raises(Unavailable, match=r"a\.jpg.*nothing was pruned"):
        next(found)


def test_keys_are_checked(tmp_path: Path) -> None:
    for key in ("../up", "/abs", "a\\b", "a//b"):
        with pytest.raises(BadInput, match="line 1: unsafe item key"):
            listed(make(tmp_path, "jsonl", [{"uri": "s3://b/1.jpg", "key": key}]))


@pytest.mark.parametrize("form", FORMATS)
def test_a_manifest_on_s3(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    objects.open_store(s3_url).put(f"lists/day.{form}", dump(form, [{"uri": "sub/a.jpg"}, {"uri": "s3://other/b.jpg"}]))
    found = sources.refs(f"{s3_url}/lists/day.{form}", Settings())
    first = next(found)
    assert list((tmp_path / "temporary").iterdir()) == []
    assert (first.key, first.uri) == ("sub/a.jpg", f"{s3_url}/lists/sub/a.jpg")
    assert [(ref.key, ref.uri) for ref in found] == [("other/b.jpg", "s3://other/b.jpg")]


def test_local_paths_in_a_manifest_on_s3_need_a_root(s3_url: str, tmp_path: Path) -> None:
    images(tmp_path, "a.jpg")
    objects.open_store(s3_url).put("day.txt", f"{tmp_path}/a.jpg\n".encode())
    with pytest.raises(BadInput, match=r"line 1: .*no folder is open to a manifest on S3.*IMAGEMILL_LOCAL_ROOTS"):
        listed(f"{s3_url}/day.txt")
    (ref,) = listed(f"{s3_url}/day.txt", local_roots=(tmp_path,))
    assert ref.key == "a.jpg"


def test_manifests_that_are_not_there(s3_url: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        sources.refs(str(tmp_path / "list.csv"), Settings())
    with pytest.raises(BadInput, match="does not exist"):
        listed(f"{s3_url}/list.csv")
    with pytest.raises(Misconfigured, match="bucket"):
        listed("s3://nowhere/list.csv")


def test_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = make(tmp_path / "lists", "csv", b"")
    monkeypatch.chdir(tmp_path)
    for word in (uri, "lists/list.csv", "./lists/../lists/list.csv", f"file://{uri}", f"/{uri}"):
        assert sources.canonical(word) == uri
    assert sources.canonical("S3://b/l/list.CSV") == "s3://b/l/list.CSV"
    (tmp_path / "folder.csv").mkdir()
    assert sources.find("folder.csv").__name__ == "jobs.sources.folder"
    assert not manifest.claims("https://host/list.csv")
    with pytest.raises(BadInput, match="expected s3://bucket") as caught:
        sources.canonical("s3://key:secret@b/list.csv")
    assert "secret" not in str(caught.value)
