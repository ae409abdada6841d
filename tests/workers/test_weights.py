"""Weights: published once, fetched and verified, never half a file; downloads over https only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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


class Replacing:
    """A store before which the file at a path is replaced, by one of the same size, when its bytes are asked for."""

    def __init__(self, store: Any, path: Path) -> None:
        self._store, self._path = store, path

    def put_file(self, key: str, path: Path) -> None:
        self._path.write_bytes(self._path.read_bytes()[::-1])
        self._store.put_file(key, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_a_file_replaced_between_its_sha256_and_its_bytes(store_url: str, file: Path, tmp_path: Path) -> None:
    """It is refused, and nothing that lies about its sha256 stays behind to fail the right file for ever."""
    store, right = open_store(store_url, load()), file.read_bytes()
    sha256 = weights.sha256_of(file)
    with pytest.raises(BadInput, match="were replaced while they were read"):
        weights.publish(Replacing(store, file), file, sha256)
    assert list(store.list("weights/")) == []
    file.write_bytes(right)
    key = weights.publish(store, file, sha256)
    assert weights.fetch(store, key, sha256, tmp_path / "cache").read_bytes() == right


def test_a_folder_changed_while_it_is_published(model_folder: Path, tmp_path: Path) -> None:
    store = open_store((tmp_path / "store").as_uri(), load())
    sha256 = weights.sha256_of(model_folder)
    changed = next(path for path in sorted(model_folder.rglob("*")) if path.is_file() and path.stat().st_size > 1)
    right = changed.read_bytes()
    with pytest.raises(BadInput, match="were replaced while they were read"):
        weights.publish(Replacing(store, changed), model_folder, sha256)
    with pytest.raises(BadInput, match="was changed while it was read"):
        weights.publish(store, model_folder, sha256)
    changed.write_bytes(right)
    key = weights.publish(store, model_folder, sha256)
    assert weights.sha256_of(weights.fetch(store, key, sha256, tmp_path / "cache")) == sha256


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


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    for name, data in {"config.json": b"{}", "unet/model.safetensors": b"w" * 999, ".cache/lock": b""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_of_weights_is_published_fetched_and_verified(
    store_url: str, model_folder: Path, tmp_path: Path
) -> None:
    store = open_store(store_url, load())
    sha256 = weights.sha256_of(model_folder)
    key = weights.publish(store, model_folder, sha256)
    fetched = weights.fetch(store, key, sha256, tmp_path / "cache")
    assert contents(fetched) == {"config.json": b"{}", "unet/model.safetensors": b"w" * 999}
    (fetched / "config.json").write_bytes(b"damaged")
    again = weights.fetch(store, key, sha256, tmp_path / "cache")
    assert contents(again) == contents(fetched)
    assert weights.sha256_of(again) == sha256
    base = key.removesuffix(".files.json")
    store.put(f"{base}/config.json", b"{ }")
    with pytest.raises(Misconfigured, match="not the file that was pinned"):
        weights.fetch(store, key, sha256, tmp_path / "other cache")
    assert not [p for p in (tmp_path / "other cache").rglob("*") if p.is_file()]


def test_the_names_of_files_are_part_of_a_folder(model_folder: Path) -> None:
    before = weights.sha256_of(model_folder)
    (model_folder / "config.json").rename(model_folder / "other.json")
    assert weights.sha256_of(model_folder) != before


def test_a_hostile_list_of_files_leads_nowhere(tmp_path: Path) -> None:
    import hashlib

    store = open_store((tmp_path / "store").as_uri(), load())
    listing = b'{"../../evil": "00"}'
    sha256 = hashlib.sha256(listing).hexdigest()
    store.put("weights/x/tiny.files.json", listing)
    with pytest.raises(BadInput, match="unsafe object key"):
        weights.fetch(store, "weights/x/tiny.files.json", sha256, tmp_path / "cache")


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["config.json", "model.safetensors", "pytorch_model.bin", "run.py"], ["config.json", "model.safetensors"]),
        (
            [
                "model_index.json",
                "v1-5.safetensors",
                "unet/a.safetensors",
                "unet/a.fp16.safetensors",
                "unet/config.json",
            ],
            ["model_index.json", "unet/a.safetensors", "unet/config.json"],
        ),
    ],
)
def test_of_a_repository_only_what_is_needed_is_fetched(files: list[str], wanted: list[str]) -> None:
    assert weights._wanted(files) == wanted


def test_the_beginning_of_a_sha256_pins_a_file(file: Path) -> None:
    sha256 = weights.sha256_of(file)
    weights._verify(file, sha256[:8], "x")
    with pytest.raises(Misconfigured, match="not the file that was pinned"):
        weights._verify(file, "00000000", "x")


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client raises the errors of the HTTP library under it; the user is told what to do."""
    from huggingface_hub import hf_api
    from huggingface_hub.utils import _http

    monkeypatch.setattr(hf_api.api, "endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)  # before it tries again
    with pytest.raises(Unavailable, match=r"cannot download hf:some/model: .*give its path to --model"):
        weights.download("hf:some/model", tmp_path, "")
