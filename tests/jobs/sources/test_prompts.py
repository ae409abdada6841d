"""Lists of prompts: every form and column, keys and seeds that stay, reference images, and what is refused."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import sources
from jobs.references import Resolver
from jobs.sources import ImageRef, prompts
from storage import objects
from storage.errors import BadInput
from storage.settings import Settings

ROWS: list[dict[str, Any]] = [
    {"prompt": "a cat", "seed": 7, "key": "cats/one", "negative_prompt": "blurry, dark", "style": "oil"},
    {"prompt": "ein Bär, 日本 \U0001f43b", "seed": None, "key": None, "negative_prompt": None, "style": None},
    {"prompt": "a cat", "seed": 2**40, "key": None, "negative_prompt": None, "style": "ink"},
]


def dump(form: str, rows: list[dict[str, Any]]) -> bytes:
    if form == "jsonl":
        return "".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows).encode()
    sink = io.BytesIO()
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def make(folder: Path, form: str, rows: list[dict[str, Any]] | bytes) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"prompts.{form}"
    path.write_bytes(rows if isinstance(rows, bytes) else dump(form, rows))
    return f"prompts:{path}"


def listed(uri: str, **settings: Any) -> list[ImageRef]:
    return [ref for ref in sources.refs(uri, Settings(**settings)) if ref is not None]


def data(refs: list[ImageRef]) -> list[dict[str, Any]]:
    return [json.loads(ref.data) for ref in refs]


def test_lines_of_text(tmp_path: Path) -> None:
    found = listed(make(tmp_path, "txt", "\ufeffa cat\n\n# a remark\n  ein Bär \n".encode()))
    assert [ref.uri for ref in found] == ["", ""]
    assert data(found) == [{"prompt": "a cat", "index": 0}, {"prompt": "ein Bär", "index": 0}]
    digest = hashlib.sha256(b"a cat").hexdigest()[:8]
    assert found[0].key == f"0000001-{digest}"
    assert found[1].key.startswith("0000002-")


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_columns(tmp_path: Path, form: str) -> None:
    """Every form says the same; what is missing is left out; unknown columns are kept."""
    found = listed(make(tmp_path, form, ROWS))
    assert [ref.key.rpartition("-")[0] or ref.key for ref in found] == ["cats/one", "0000002", "0000003"]
    assert data(found) == [
        {"prompt": "a cat", "seed": 7, "negative_prompt": "blurry, dark", "style": "oil", "index": 0},
        {"prompt": "ein Bär, 日本 \U0001f43b", "index": 0},
        {"prompt": "a cat", "seed": 2**40, "style": "ink", "index": 0},
    ]
    assert found == listed(make(tmp_path / "b", "jsonl", ROWS))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), st.integers(1, 3))
def test_a_row_of_a_prompt_alone_is_as_any_other(prompt: str, count: int) -> None:
    """Nothing in the items may tell that such rows go a shorter way."""
    resolver = Resolver("/prompts.csv", "prompt list", Settings())
    assert prompts._alone(prompt, 12, count) == prompts._items({"prompt": prompt}, 12, count, resolver)


def test_several_images_of_each(tmp_path: Path) -> None:
    uri = make(tmp_path, "jsonl", [*ROWS[:2], {"prompt": "a dog", "n": 2}])
    found = listed(f"{uri}?n=3")
    assert [ref.key.partition("/")[2] for ref in found[3:]] == ["0", "1", "2", "0", "1"]
    assert [ref.key for ref in found[:3]] == ["cats/one/0", "cats/one/1", "cats/one/2"]
    assert [row["index"] for row in data(found)] == [0, 1, 2, 0, 1, 2, 0, 1]
    assert [row.get("seed") for row in data(found)] == [7, 8, 9, *[None] * 5]
    assert len({ref.fingerprint for ref in found}) == 8
    assert all("n" not in row for row in data(found))


def test_a_changed_row_has_another_fingerprint(tmp_path: Path) -> None:
    before = listed(make(tmp_path, "csv", ROWS))
    changed = [{**ROWS[0], "negative_prompt": "dark"}, *ROWS[1:]]
    after = listed(make(tmp_path, "csv", changed))
    assert [a.key == b.key for a, b in zip(before, after, strict=True)] == [True] * 3
    assert [a.fingerprint == b.fingerprint for a, b in zip(before, after, strict=True)] == [False, True, True]


def test_reference_images(tmp_path: Path, s3_url: str) -> None:
    """They are found and guarded as a manifest's are, and a changed one changes the item's fingerprint."""
    (tmp_path / "a.png").write_bytes(b"png")
    rows = [{"prompt": "a cat", "image": "a.png"}, {"prompt": "b", "image": "s3://x/b.png"}, {"prompt": "c"}]
    uri = make(tmp_path, "jsonl", rows)
    found = listed(uri)
    assert [ref.uri for ref in found] == [(tmp_path / "a.png").as_uri(), "s3://x/b.png", ""]
    assert all("image" not in row for row in data(found))
    (tmp_path / "a.png").write_bytes(b"other")
    again = listed(uri)
    assert [a.fingerprint == b.fingerprint for a, b in zip(found, again, strict=True)] == [False, True, True]
    (tmp_path / "a.png").unlink()
    assert listed(uri)[0].fingerprint.endswith("+missing")
    with pytest.raises(BadInput, match=r"line 1: .*leads outside the prompt list's folder.*IMAGEMILL_LOCAL_ROOTS"):
        listed(make(tmp_path / "b", "jsonl", [{"prompt": "a", "image": "/etc/hostname"}]))
    store = objects.open_store(s3_url)
    store.put("lists/p.csv", b"prompt,image\na cat,sub/a.png\n")
    (ref,) = listed(f"prompts:{s3_url}/lists/p.csv?n=1")
    assert ref.uri == f"{s3_url}/lists/sub/a.png"


def test_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = make(tmp_path / "a?n", "txt", b"a cat\n")
    monkeypatch.chdir(tmp_path)
    for word in (uri, f"{uri}?n=1", "prompts:a?n/prompts.txt", "prompts:./a?n/../a?n/prompts.txt?n=1"):
        assert sources.canonical(word) == f"prompts:{tmp_path}/a?n/prompts.txt?n=1"
    assert sources.canonical("prompts:s3://b/l.csv?n=4") == "prompts:s3://b/l.csv?n=4"


def test_numbers_of_data_frames(tmp_path: Path) -> None:
    """A column of whole numbers with gaps becomes floats and NaN there; "Text" means the prompt too."""
    table = pa.table({"Text": ["a", "b"], "seed": [3.0, float("nan")], "n": pa.array([2, None], pa.int8())})
    pq.write_table(table, tmp_path / "p.parquet")
    found = listed(f"prompts:{tmp_path}/p.parquet")
    assert data(found) == [
        {"prompt": "a", "seed": 3, "index": 0},
        {"prompt": "a", "seed": 4, "index": 1},
        {"prompt": "b", "index": 0},
    ]


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("txt", b"\n# nothing\n", "holds no prompt"),
        ("txt", b"caf\xe9\n", "line 1: not UTF-8"),
        ("csv", b"", "holds no prompt"),
        ("csv", b"prompt\n", "holds no prompt"),
        ("csv", b"name,size\na,1\n", "line 1: no column 'prompt'.*'name', 'size'"),
        ("csv", b"prompt,seed\na,1\n,2\n", "line 3: expected a prompt as text, but got nothing"),
        ("csv", b"prompt,seed\na,one\n", "line 2: expected seed as a whole number.*'one'"),
        ("csv", b"prompt,seed\na,-1\n", "line 2: expected seed"),
        ("csv", b"prompt,n\na,0\n", "line 2: expected n as a whole number from 1 to 1000"),
        ("csv", b"prompt,key\na,../up\n", "line 2: unsafe item key"),
        ("csv", b"prompt,image\na,https://h/x.png\n", "line 2: .*not allowed in a prompt list"),
        ("jsonl", b'{"prompt": "a"}\n{"text": 3}\n', "line 2: expected a prompt as text, but got 3"),
        ("jsonl", b'{"prompt": "a", "negative_prompt": ["b"]}\n', "line 1: expected a negative_prompt"),
        ("jsonl", b'{"prompt": "a", "seed": 1.5}\n', "line 1: expected seed"),
        ("jsonl", b'{"prompt": "a", "seed": true}\n', "line 1: expected seed"),
        ("jsonl", b'{"prompt": "\\ud800"}\n', "line 1: the prompt has half a letter"),
        ("jsonl", b'{"prompt": "a", "x": [NaN]}\n', "line 1: its values cannot be kept as JSON"),
        ("jsonl", b'{"prompt": "a", "x": "\\ud800"}\n', "line 1: its values cannot be kept as JSON"),
        ("jsonl", b'{"negative_prompt": "a"}\n', "line 1: no column 'prompt'"),
        ("parquet", b"PAR1 no", "not readable as Parquet"),
        ("parquet", dump("parquet", [{"name": "a"}]), "its schema: no column 'prompt'"),
        ("parquet", dump("parquet", [{"prompt": 3}]), "row 1: expected a prompt as text"),
        ("parquet", dump("parquet", [{"prompt": "a", "raw": b"x"}]), "row 1: its values cannot be kept as JSON"),
    ],
)
def test_bad_lists_are_refused_and_say_where(tmp_path: Path, form: str, content: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        listed(make(tmp_path, form, content))
    assert "\n" not in str(caught.value)


def test_bad_uris(tmp_path: Path) -> None:
    uri = make(tmp_path, "txt", b"a cat\n")
    for number in ("0", "1001", "x", "", "-1", "9" * 99):
        with pytest.raises(BadInput, match="expected n as a whole number from 1 to 1000"):
            sources.canonical(f"{uri}?n={number}")
    with pytest.raises(BadInput, match="does not exist"):
        listed(f"prompts:{tmp_path}/none.txt")
    with pytest.raises(BadInput, match=r"expected one of \.parquet, \.csv, \.jsonl, \.txt"):
        listed(f"prompts:{tmp_path}")
    with pytest.raises(BadInput, match=r"expected one of"):
        listed("prompts:")
