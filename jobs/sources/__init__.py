"""The dataset schemes: one file a scheme, listed from this folder, imported when a URI has to be opened.

A scheme's file defines

    claims(uri) -> bool              whether this URI is of this scheme; looks at the text, and at the disk for local
                                     paths
    canonical(uri) -> str            the one spelling that goes into the recipe: absolute, no trailing slash;
                                     raises BadInput when the disk shows that there is no such dataset
    refs(uri, settings) -> Iterator[ImageRef | None]
                                     every image, streamed; keys stable between two listings, safe and NFC; None says
                                     that there is nothing more just now, of a dataset that still grows;
                                     raises BadInput (no such dataset), Misconfigured (bucket, credentials) or
                                     Unavailable (listing broke off), never ends early in silence: what a listing
                                     does not name is pruned
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pkgutil
import re
import unicodedata
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from storage.errors import BadInput
from storage.settings import Settings

KEY_LIMIT = 1024  # bytes; S3's own limit for a key

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif"}
    | {".heic", ".heif"}  # which nothing here decodes: a failure row says so, where a file left out would say nothing
)

MANIFEST_SUFFIXES = (".parquet", ".csv", ".jsonl", ".txt")

# A path or s3 key with one of these is a dataset in one file, so not a folder: other schemes claim it.
FILE_SUFFIXES = (*MANIFEST_SUFFIXES, ".tar", ".tgz", ".tar.gz", ".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg")

# What safe_key refuses in ASCII text: control characters, backslashes, empty and dotted parts, a drive letter.
_UNSAFE = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff]|(?:^|/)\.{0,2}(?:/|$)|^[^/]:(?:/|$)")
# A percent sign is escaped only before what could be an escape of ours, so that no two names share a key.
_ESCAPED = re.compile(
    r"[\x00-\x1f\x7f\\\ud800-\udfff]|%(?=[01][0-9A-F]|2[5EF]|3A|5C|7F|[89A-F][0-9A-F])"
    r"|(?:(?<=/)|^)/|(?:(?<=/)|^)\.{1,2}(?=/|$)|(?<=^[^/]):(?=/|$)|/$"
)


class ImageRef(NamedTuple):
    """One image of a dataset, not its bytes; or with an empty uri an item that needs no image, such as a prompt.

    Attributes:
        key: its name within the dataset: unique, stable, relative, forward slashes, NFC.
        uri: where the bytes are: file:///... or s3://bucket/key.
        fingerprint: changes when the content changes: "etag:...+size", "mtime:...+size", "given:..." by a manifest,
            or "uri:..." where nothing better is known; "missing" when the file is not there, "refused" when it must
            not be read (its uri then starts with "refused:", which storage.objects.read answers with BadInput).
            Both become failure rows.
        data: a JSON object of what is said of this item alone, such as the boxes to mask or the prompt to draw, or "".
            A "crop" in it, [x1, y1, x2, y2] in pixels of the upright picture, means that part of the picture only.
    """

    key: str
    uri: str
    fingerprint: str
    data: str = ""


def names() -> list[str]:
    """The schemes there are, without importing them."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(uri: str) -> ModuleType:
    """The scheme's module for a dataset URI. Raises BadInput, saying what a dataset may be."""
    # The scheme that is named comes first, for behind it may stand another dataset's name, which others would claim.
    for name in sorted(names(), key=lambda name: not uri.startswith(f"{name}:")):
        module = importlib.import_module(f"{__name__}.{name}")
        if module.claims(uri):
            return module
    raise BadInput(
        f"cannot tell what dataset {uri!r} is: expected an existing folder, an s3://bucket/prefix, a manifest "
        "(.parquet, .csv, .jsonl or .txt), a .tar, a video, or results:JOB; check the spelling"
    )


def canonical(uri: str) -> str:
    """The spelling of a dataset URI that goes into the recipe."""
    return str(find(uri).canonical(uri))


def refs(uri: str, settings: Settings) -> Iterator[ImageRef | None]:
    """Every image of a dataset, streamed in the source's own order; None where it waits for more."""
    found: Iterator[ImageRef | None] = find(uri).refs(uri, settings)
    return found


def safe_key(text: str) -> str:
    """A key as the index may keep it. Raises BadInput for a key that could leave its folder or hide."""
    key = text if text.isascii() else unicodedata.normalize("NFC", text)
    if _UNSAFE.search(key) or len(key) > KEY_LIMIT or (not key.isascii() and len(key.encode()) > KEY_LIMIT):
        raise BadInput(
            f"unsafe item key {text[:200]!r}: expected a relative path of at most {KEY_LIMIT} bytes with no '..', "
            "no empty part, no backslash and no control character; rename it or give a 'key' column"
        )
    return key


def escaped_key(text: str) -> str:
    """A safe key for a name that was found and cannot be refused without losing an image.

    Bytes that safe_key would refuse become %XX; a key that is too long is cut and ends in a hash of the whole name.
    """
    key = text if text.isascii() else unicodedata.normalize("NFC", text)
    key = _ESCAPED.sub(_percent, key)
    if len(key) * 4 > KEY_LIMIT and len(key.encode()) > KEY_LIMIT:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
        cut = key.encode()[: KEY_LIMIT - 72].decode("utf-8", "ignore").rstrip("/")
        key = f"{cut}~{digest}{os.path.splitext(key)[1][:8]}"
    return safe_key(key)


class Keys:
    """The keys of a listing's names, which come sorted: each name its own, also when two are equal once normalised.

    Both spellings of an accented letter are names of different files. The one that is not NFC sorts first, and takes
    the NFC key as everywhere; a name that comes after it with that key has its bytes spelled out as %XX instead. The
    few letters that sort after their NFC form, such as the Kelvin sign, are always spelled out.
    """

    def __init__(self) -> None:
        self._changed: set[int] = set()  # hashes of the keys that are not their names

    def of(self, name: str) -> str:
        """The key of the next name."""
        if name.isascii():
            return escaped_key(name)
        key = unicodedata.normalize("NFC", name)
        number = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest())
        taken = number in self._changed or key < name
        if key != name:
            self._changed.add(number)
        return escaped_key(_spelled_out(name) if taken else key)


def _spelled_out(name: str) -> str:
    """The name with each byte beyond ASCII as a surrogate, which `escaped_key` turns into %XX."""
    return name.encode("utf-8", "surrogateescape").decode("ascii", "surrogateescape")


def _percent(match: re.Match[str]) -> str:
    text = match.group()
    try:
        raw = text.encode("utf-8", "surrogateescape")  # a byte of a file name that is not UTF-8
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass")
    return "".join(f"%{byte:02X}" for byte in raw)


def stat_fingerprint(info: os.stat_result) -> str:
    """The fingerprint of a local file."""
    return f"mtime:{info.st_mtime_ns}+{info.st_size}"


def is_under(real: str, root: str) -> bool:
    """Whether a path lies in a folder, or is it. Both resolved by realpath."""
    return real == root or real.startswith(root if root.endswith("/") else root + "/")
