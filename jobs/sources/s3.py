"""Datasets that are a prefix of an S3 bucket: every image object below it, told by ETag and size."""

from __future__ import annotations

import os
from collections.abc import Iterator

from jobs.sources import FILE_SUFFIXES, IMAGE_SUFFIXES, ImageRef, Keys
from storage.errors import BadInput
from storage.settings import Settings, masked


def claims(uri: str) -> bool:
    """s3://bucket/prefix, where the prefix is not a dataset in one file."""
    return uri[:5].lower() == "s3://" and not uri.rstrip("/").lower().endswith(FILE_SUFFIXES)


def canonical(uri: str) -> str:
    bucket, _, prefix = uri[5:].partition("/")
    if not bucket or "@" in bucket:
        raise BadInput(f"cannot read {masked(uri)!r}: expected s3://bucket/prefix; credentials go into AWS_ variables")
    return f"s3://{bucket}/{prefix.strip('/')}".rstrip("/")


def refs(uri: str, settings: Settings) -> Iterator[ImageRef]:
    """Every image below the prefix, which is taken as a folder, in the server's order."""
    bucket, _, prefix = canonical(uri)[5:].partition("/")
    return _listed(bucket, prefix, settings)


def _listed(bucket: str, prefix: str, settings: Settings) -> Iterator[ImageRef]:
    from storage import s3

    base = f"s3://{bucket}/{prefix}/" if prefix else f"s3://{bucket}/"
    empty, keys = True, Keys()
    for found in s3.store(bucket, prefix, settings).list():
        if _is_image(found.key):
            empty = False
            yield ImageRef(keys.of(found.key), base + found.key, f"etag:{found.etag}+{found.size}")
    if empty and os.path.splitext(prefix)[1].lower() in IMAGE_SUFFIXES:
        raise BadInput(f"{base[:-1]!r} is not a folder; give the prefix above it, or a .txt manifest that lists it")


def _is_image(key: str) -> bool:
    """Whether a key below the prefix ends like an image and no part of it is hidden; "folder/" markers do not."""
    if os.path.splitext(key)[1].lower() not in IMAGE_SUFFIXES:
        return False
    return not any(part.startswith(".") and part not in (".", "..") for part in key.split("/"))
