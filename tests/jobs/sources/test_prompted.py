"""The images that a file has prompts for."""

from __future__ import annotations

import json
import urllib.parse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import sources
from jobs.sources import ImageRef
from storage import objects
from storage.errors import BadInput, NotFound
from storage.settings import Settings

BOXES = [[1.0, 2.0, 3.0, 4.5]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "c/d.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"x")
    return tmp_path / "photos"


def listed(folder: Path, file: Path) -> list[ImageRef]:
    uri = sources.canonical("prompted:?" + urllib.parse.urlencode({"of": str(folder), "from": str(file)}))
    return [ref for ref in sources.refs(uri, Settings()) if ref is not None]


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        quoted = [json.dumps(json.dumps(row["boxes"])).replace('\\"', '""') for row in rows]
        path.write_text("key,boxes\n" + "".join(f"{r['key']},{q}\n" for r, q in zip(rows, quoted, strict=True)))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_images_get_the_prompts_of_their_rows(folder: Path, tmp_path: Path, suffix: str) -> None:
    """Rows of one image are joined; images without a row are left out; rows without an image are still items."""
    rows = [{"key": "c/d.png", "boxes": BOXES}, {"key": "a.png", "boxes": BOXES}, {"key": "gone.png", "boxes": BOXES}]
    found = listed(folder, written(tmp_path / f"list{suffix}", [*rows, {"key": "a.png", "boxes": [[5, 6, 7, 8]]}]))
    assert [ref.key for ref in found] == ["a.png", "c/d.png", "gone.png"]
    assert json.loads(found[0].data) == {"boxes": [*BOXES, [5, 6, 7, 8]]}
    assert json.loads(found[1].data) == {"boxes": BOXES}
    with pytest.raises(NotFound, match=r"the dataset has no image 'gone.png'"):
        objects.read(found[2].uri, Settings())


def test_other_prompts_make_an_image_stale(folder: Path, tmp_path: Path) -> None:
    (before,) = listed(folder, written(tmp_path / "list.jsonl", [{"key": "a.png", "boxes": BOXES}]))
    (same,) = listed(folder, written(tmp_path / "list.jsonl", [{"key": "a.png", "boxes": BOXES}]))
    (after,) = listed(folder, written(tmp_path / "list.jsonl", [{"key": "a.png", "boxes": [[0, 0, 1, 1]]}]))
    assert before == same
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "names no image"),
        ("key,box\na.png,1\n", "expected a column 'key' and one of boxes, points or masks"),
        ("boxes\n[]\n", "expected a column 'key'"),
        ("key,boxes\na.png,here\n", "line 2: expected boxes as a list, but got 'here'"),
        ("key,boxes\n../a.png,[]\n", "unsafe item key"),
    ],
)
def test_a_bad_list_is_one_clear_line(folder: Path, tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "list.csv"
    path.write_text(text)
    with pytest.raises(BadInput, match=expected):
        listed(folder, path)


def test_what_is_not_there_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        listed(folder, tmp_path / "none.csv")
    with pytest.raises(BadInput, match="does not exist"):
        listed(tmp_path / "nowhere", written(tmp_path / "list.jsonl", [{"key": "a", "boxes": []}]))
