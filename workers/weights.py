"""Weights, a file or a folder: put into the object store once under their sha256, fetched once a machine, verified."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from storage.errors import BadInput, Misconfigured, Unavailable, one_line
from storage.objects import Store, check_key

Progress = Callable[[int, int], None]  # bytes so far, bytes in all (0 when unknown)

_BLOCK = 1 << 20


_LIST = ".files.json"  # name -> sha256 of a folder's files; its key stands for the folder
# What of a repository on the hub is fetched: no pickles, no code.
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_HUB_PREFIX = "hf:"


def sha256_of(path: Path) -> str:
    """The sha256 of a file, or of the names and sha256s of all files in a folder, in hex."""
    if path.is_dir():
        return hashlib.sha256(_listing(path)).hexdigest()
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _listing(folder: Path) -> bytes:
    """The canonical JSON of a folder's files and their sha256s."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path.relative_to(folder)))
    if not files:
        raise BadInput(f"the model folder {str(folder)!r} is empty")
    return json.dumps({path.relative_to(folder).as_posix(): sha256_of(path) for path in files}, sort_keys=True).encode()


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)  # such as the hub's own .cache


def publish(store: Store, path: Path, sha256: str) -> str:
    """Put weights where every worker finds them; returns their key. What is there already is left alone.

    Raises BadInput when the file was replaced since its sha256 was taken: what was put is taken away again, since under
    that key it would be in the way of the right file for ever.
    """
    if path.is_dir():
        return _publish_folder(store, path, sha256)
    key = f"weights/{sha256}/{path.name}"
    _put_file(store, key, path, sha256)
    return key


def _put_file(store: Store, key: str, path: Path, sha256: str) -> None:
    there = store.stat(key)
    if there is not None and there.size == path.stat().st_size:
        return
    store.put_file(key, path)
    if sha256_of(path) != sha256:
        store.delete([key])
        raise BadInput(f"the weights {str(path)!r} were replaced while they were read; run the same command again")


def _publish_folder(store: Store, folder: Path, sha256: str) -> str:
    base = f"weights/{sha256}/{folder.name}"
    listing = _listing(folder)
    if hashlib.sha256(listing).hexdigest() != sha256:
        raise BadInput(f"the model folder {str(folder)!r} was changed while it was read; run the same command again")
    for name, pinned in json.loads(listing).items():
        _put_file(store, f"{base}/{name}", folder / name, pinned)
    store.put(base + _LIST, listing)
    return base + _LIST


def name_in(store: Store, sha256: str) -> str:
    """What the user called the weights that lie in the store: a file's name less its ending, or a folder's; else ""."""
    for stat in store.list(f"weights/{sha256}/"):
        name = stat.key.split("/")[2]
        is_folder = name.endswith(_LIST) or stat.key.count("/") > 2
        return name.removesuffix(_LIST) if is_folder else Path(name).stem
    return ""


def fetch(store: Store, key: str, sha256: str, cache: Path) -> Path:
    """The weights as a local file or folder whose sha256 has been checked. Several processes may fetch them at once."""
    if key.endswith(_LIST):
        return _fetch_folder(store, key, sha256, cache)
    path = cache / "weights" / sha256 / key.rsplit("/", 1)[-1]
    if path.is_file() and sha256_of(path) == sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        store.get_file(key, temporary)
        _verify(temporary, sha256, key)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _fetch_folder(store: Store, key: str, sha256: str, cache: Path) -> Path:
    base = key.removesuffix(_LIST)
    folder = cache / "weights" / sha256 / base.rsplit("/", 1)[-1]
    if folder.is_dir() and sha256_of(folder) == sha256:
        return folder
    listing = store.get(key)
    if hashlib.sha256(listing).hexdigest() != sha256:
        raise Misconfigured(f"the model folder {key} is not the one that was pinned: its list of files differs")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        for name, pinned in json.loads(listing).items():
            check_key(name)
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            store.get_file(f"{base}/{name}", path)
            _verify(path, pinned, name)
        _put_in_place(temporary, folder, sha256)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _put_in_place(temporary: Path, folder: Path, sha256: str) -> None:
    """Rename a finished folder; another process may have been first, or an earlier one may have left a broken one."""
    for _ in range(3):
        try:
            os.replace(temporary, folder)
            return
        except OSError:
            if folder.is_dir() and sha256_of(folder) == sha256:
                return
            shutil.rmtree(folder, ignore_errors=True)
    raise Misconfigured(f"cannot write the model folder {folder}; check the permissions of IMAGEMILL_CACHE")


def download(url: str, cache: Path, sha256: str, on_progress: Progress = lambda done, total: None) -> Path:
    """The file at an https URL or the folder of a hub's repository, kept in the cache.

    Args:
        url: https://..., or hf:owner/name[@revision].
        sha256: checked when one is pinned; that of a file may be its beginning only.

    Raises:
        Unavailable: the server does not answer, or breaks off; nothing half-fetched is left.
        Misconfigured: the bytes are not those that were pinned.
    """
    if url.startswith(_HUB_PREFIX):
        return _from_hub(url.removeprefix(_HUB_PREFIX), cache, sha256)
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https":
        raise BadInput(f"cannot fetch weights from {url!r}: expected an https:// URL, hf:owner/name, or a local file")
    path = cache / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16] / Path(parts.path).name
    if path.is_file() and (not sha256 or sha256_of(path).startswith(sha256)):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        _stream(url, temporary, on_progress)
        _verify(temporary, sha256, url)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _from_hub(name: str, cache: Path, sha256: str) -> Path:
    """A repository of the Hugging Face hub, through its own client, which shows its own progress."""
    repo, _, revision = name.partition("@")
    try:
        from huggingface_hub import list_repo_files, snapshot_download
    except ImportError:
        raise Misconfigured(
            "models from the hub need huggingface_hub; install it with: pip install 'imagemill[models]'"
        ) from None
    folder = cache / "hub" / (repo.replace("/", "--") + (f"@{revision}" if revision else ""))
    try:
        files = _wanted(list_repo_files(repo, revision=revision or None))
        snapshot_download(repo, revision=revision or None, local_dir=folder, allow_patterns=files)
    except Exception as error:  # besides its own, its client raises the errors of the HTTP library under it
        raise Unavailable(
            f"cannot download {_HUB_PREFIX}{name}: {one_line(str(error), 200)}; "
            "fetch the folder on another machine and give its path to --model"
        ) from error
    _verify(folder, sha256, f"{_HUB_PREFIX}{name}")
    return folder


def _wanted(files: Sequence[str]) -> list[str]:
    """The files of a repository that a model is loaded from: no pickles, no code, nothing twice.

    A pipeline of diffusers has its parts in folders; beside them some publish the whole once more in one file, and
    most the same weights in half precision.
    """
    known = [f for f in files if any(fnmatch.fnmatch(f, pattern) for pattern in _HUB_FILES)]
    pipeline = "model_index.json" in files
    return [f for f in known if not (pipeline and f.endswith(".safetensors") and ("/" not in f or ".fp16." in f))]


def _stream(url: str, path: Path, on_progress: Progress) -> None:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, path.open("wb") as file:
            total = int(answer.headers.get("Content-Length") or 0)
            done = 0
            while block := answer.read(_BLOCK):
                file.write(block)
                done += len(block)
                on_progress(done, total)
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise Unavailable(
            f"cannot download {url}: {getattr(error, 'reason', error)}; "
            "fetch the file on another machine and give its path to --model"
        ) from error
    if total and done != total:
        raise Unavailable(f"the download of {url} broke off after {done} of {total} bytes; run the same command again")


def _verify(path: Path, sha256: str, source: str) -> None:
    if sha256 and not (found := sha256_of(path)).startswith(sha256):
        raise Misconfigured(
            f"{source} is not the file that was pinned: sha256 {found[:16]}..., expected {sha256[:16]}..."
        )
