"""Weights: published once, fetched and verified, never half a file; downloads over https only."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage.errors import BadInput, Misconfigured, NotFound, Unavailable
from storage.objects import open_store
from storage.settings import load
from workers import weights


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    path.write_bytes(b"weights" * 1000)
    return path


def test_published_weights_are_fetched_and_verified(store_url: str, file: Path, tmp_path: Path) -> None:
    store = open_store(store_url, load())
    sha256 = weights.sha256_of(file)
    key = weights.publish(store, file, sha256)
    assert weights.publish(store, file, sha256) == key
    fetched = weights.fetch(store, key, sha256, tmp_path / "cache")
    assert fetched.read_bytes() == file.read_bytes()
    fetched.write_bytes(b"damaged")
    assert weights.fetch(store, key, sha256, tmp_path / "cache").read_bytes() == file.read_bytes()


def test_other_bytes_than_pinned_are_refused_and_not_kept(tmp_path: Path, file: Path) -> None:
    store = open_store((tmp_path / "store").as_uri(), load())
    store.put("weights/x/model.pt", b"other")
    with pytest.raises(Misconfigured, match="not the file that was pinned"):
        weights.fetch(store, "weights/x/model.pt", weights.sha256_of(file), tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_missing_weights_say_so(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        weights.fetch(open_store((tmp_path / "store").as_uri(), load()), "weights/x/y.pt", "0" * 64, tmp_path / "cache")


@pytest.mark.parametrize("url", ["http://example.com/x.pt", "file:///etc/passwd", "ftp://example.com/x"])
def test_only_https_is_downloaded(url: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="https"):
        weights.download(url, tmp_path, "")


def test_a_server_that_does_not_answer_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="give its path to --model"):
        weights.download("https://127.0.0.1:1/x.pt", tmp_path, "")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
