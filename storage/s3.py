"""Objects on S3 or a server that speaks its protocol; boto3's and obstore's errors are translated here.

Reads go through obstore, which on a loopback SeaweedFS moves two to three times the objects a second that boto3 does
(`benchmarks/s3_reads.py` measures it); everything else goes through boto3.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from storage.errors import Conflict, ImagemillError, Misconfigured, NotFound, StoreFull, Unavailable
from storage.objects import Stat, check_key, check_limit
from storage.settings import Settings

# Of one call, with exponential backoff and jitter inside botocore's and obstore's own retry loops. Together they bound
# what a server that is not there costs: less than 20 s.
_ATTEMPTS = 5
_CONNECT_SECONDS = 2
_NOT_FOR_OBSTORE = re.compile(r"[\x00-\x1f\x7f]|^/|//|/$|(?:^|/)\.{1,2}(?:/|$)")
_PART_BYTES = 16 * 1024 * 1024
_BLOCK_BYTES = 1024 * 1024  # of a ranged read


@lru_cache(maxsize=64)
def store(bucket: str, prefix: str, settings: Settings) -> S3Store:
    return S3Store(bucket, prefix, settings)


class S3Store:
    """A prefix of a bucket on AWS S3 or a server that speaks its protocol. Safe to use from several threads."""

    def __init__(self, bucket: str, prefix: str, settings: Settings) -> None:
        self.bucket, self.prefix, self.settings = bucket, prefix, settings
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._base = f"{prefix}/" if prefix else ""
        self._lock = threading.Lock()
        self._boto: Any = None
        self._obstore: Any = None

    @property
    def client(self) -> Any:
        """The boto3 client, made at first use: importing boto3 costs a quarter of a second."""
        with self._lock, translated(self.url):
            if self._boto is None:
                self._boto = _boto_client(self.settings)
            return self._boto

    def _reader(self) -> Any:
        with self._lock:
            if self._obstore is not None:
                return self._obstore
        reader = _obstore_reader(self.bucket, self.settings, self.client)
        with self._lock:
            self._obstore = reader
        return reader

    def get(self, key: str) -> bytes:
        check_key(key)
        return self.read(key, None)

    def read(self, key: str, limit: int | None) -> bytes:
        """The bytes at any key that S3 allows, refused with BadInput when they are more than the limit."""
        import obstore

        path = self._base + key
        with translated(self.url_for(key)):
            # obstore cannot spell these: it would drop the outer slashes, and so read another object.
            if _NOT_FOR_OBSTORE.search(path):
                answer = self.client.get_object(Bucket=self.bucket, Key=path)
                with contextlib.closing(answer["Body"]) as body:
                    check_limit(answer["ContentLength"], limit)
                    return bytes(body.read())
            found = obstore.get(self._reader(), path)
            check_limit(found.meta["size"], limit)
            return bytes(found.bytes())

    def read_part(self, key: str, offset: int, size: int, etag: str = "") -> bytes:
        """`size` bytes from `offset` on, at any key that S3 allows.

        Args:
            etag: the answer must be of this version of the object; empty for any.

        Raises:
            Unavailable: the object ends before, or is another version by now.
        """
        if not size:
            return b""
        where = self.url_for(key)
        try:
            with translated(where):
                data = self._part(self._base + key, offset, size, etag)
        except Conflict:
            raise Unavailable(f"{where} was overwritten while it was read; try again later") from None
        if len(data) != size:
            raise Unavailable(f"{where} gave {len(data)} bytes, not {size} from {offset} on; was it cut?")
        return data

    def _part(self, path: str, offset: int, size: int, etag: str) -> bytes:
        import obstore

        if _NOT_FOR_OBSTORE.search(path):
            wanted = {"Range": f"bytes={offset}-{offset + size - 1}"} | ({"IfMatch": f'"{etag}"'} if etag else {})
            answer = self.client.get_object(Bucket=self.bucket, Key=path, **wanted)
            with contextlib.closing(answer["Body"]) as body:
                return bytes(body.read(size + 1))
        options: dict[str, Any] = {"range": (offset, offset + size)} | ({"if_match": f'"{etag}"'} if etag else {})
        return bytes(obstore.get(self._reader(), path, options=options).bytes())

    def open_file(self, there: Stat) -> BinaryIO:
        """An object, as `stat` found it, as a file that can be sought in; it is read in blocks of 1 MiB.

        When it is overwritten or deleted while it is read, reading raises Unavailable or NotFound.
        """
        return io.BufferedReader(_Ranges(self, there), _BLOCK_BYTES)

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        check_key(key)
        attempt = uuid.uuid4().hex
        more: dict[str, Any] = {"IfNoneMatch": "*"} if if_absent else {}
        with translated(self.url_for(key)):
            try:
                self.client.put_object(
                    Bucket=self.bucket, Key=self._base + key, Body=data, Metadata={"attempt": attempt}, **more
                )
            except self.client.exceptions.ClientError as error:
                # The answer to our own successful put may be lost and the retry then refused: look whose object it is.
                if _status(error) != 412 or self._attempt(key) != attempt:
                    raise

    def _attempt(self, key: str) -> str:
        head = self.client.head_object(Bucket=self.bucket, Key=self._base + key)
        return str(head.get("Metadata", {}).get("attempt", ""))

    def put_file(self, key: str, path: Path) -> None:
        from boto3.s3.transfer import TransferConfig

        check_key(key)
        with translated(self.url_for(key)):
            config = TransferConfig(multipart_threshold=2 * _PART_BYTES, multipart_chunksize=_PART_BYTES)
            self.client.upload_file(str(path), self.bucket, self._base + key, Config=config)

    def get_file(self, key: str, path: Path) -> None:
        check_key(key)
        with translated(self.url_for(key)):
            try:
                self.client.download_file(self.bucket, self._base + key, str(path))
            except self.client.exceptions.ClientError as error:
                self._check_bucket(error, key)
                raise

    def stat(self, key: str) -> Stat | None:
        check_key(key)
        with translated(self.url_for(key)):
            try:
                head = self.client.head_object(Bucket=self.bucket, Key=self._base + key)
            except self.client.exceptions.ClientError as error:
                self._check_bucket(error, key)
                if _status(error) == 404:
                    return None
                raise
        return Stat(key, head["ContentLength"], head["ETag"].strip('"'), head["LastModified"].timestamp())

    def _check_bucket(self, error: Any, key: str) -> None:
        """Raise Misconfigured when it is the bucket that is missing: a HEAD's 404 does not say which."""
        if _status(error) == 404:
            try:
                self.client.head_bucket(Bucket=self.bucket)
            except self.client.exceptions.ClientError as second:
                if _status(second) == 404:
                    raise _no_bucket(self.url_for(key)) from None

    def list(self, prefix: str = "") -> Iterator[Stat]:
        with translated(self.url_for(prefix)):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._base + prefix):
                for entry in page.get("Contents", []):
                    key = entry["Key"][len(self._base) :]
                    yield Stat(key, entry["Size"], entry["ETag"].strip('"'), entry["LastModified"].timestamp())

    def delete(self, keys: Iterable[str]) -> int:
        count = 0
        batch = []
        for key in keys:
            check_key(key)
            batch.append(key)
            if len(batch) == 1000:
                count += self._delete_batch(batch)
                batch = []
        return count + (self._delete_batch(batch) if batch else 0)

    def _delete_batch(self, keys: Sequence[str]) -> int:
        with translated(self.url):
            objects = [{"Key": self._base + key} for key in keys]
            answer = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True})
        failed = answer.get("Errors", [])
        if failed and failed[0].get("Code") == "AccessDenied":
            raise _no_access(self.url, "AccessDenied")
        if failed:
            raise Unavailable(f"could not delete {len(failed)} objects of {self.url}: {failed[0].get('Message', '')}")
        return len(keys)

    def abort_uploads(self, before: float, *, dry_run: bool = False) -> int:
        """Abort multipart uploads that were begun before this time, by the server's clock; returns how many."""
        count = 0
        with translated(self.url):
            for page in self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=self._base
            ):
                for upload in page.get("Uploads", []):
                    if upload["Initiated"].timestamp() >= before:
                        continue
                    count += 1
                    if not dry_run:
                        self.client.abort_multipart_upload(
                            Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                        )
        return count

    def url_for(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._base}{key}"


class _Ranges(io.RawIOBase):
    """The raw file below `open_file`: each read is a ranged request."""

    def __init__(self, store: S3Store, there: Stat) -> None:
        self._store, self._there, self._at = store, there, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._there.size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._there.size - self._at))
        buffer[:size] = self._store.read_part(self._there.key, self._at, size, self._there.etag)
        self._at += size
        return size


def _boto_client(settings: Settings) -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        retries={"mode": "standard", "max_attempts": _ATTEMPTS},
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=20,
        max_pool_connections=32,
        s3={"addressing_style": "path" if settings.s3_endpoint_url else "auto"},
    )
    return boto3.session.Session().client(
        "s3",
        endpoint_url=settings.s3_endpoint_url or None,
        region_name=settings.s3_region or os.environ.get("AWS_REGION") or None,
        config=config,
    )


def _obstore_reader(bucket: str, settings: Settings, client: Any) -> Any:
    """obstore takes endpoint, region and credentials from the boto3 client, so both speak to the same server."""
    from datetime import UTC, datetime, timedelta

    from obstore.store import S3Store as ObstoreS3

    signer = client._request_signer

    def credentials() -> dict[str, Any]:
        if signer._credentials is None:
            raise Misconfigured("no S3 credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        frozen = signer._credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            # boto3 renews expiring credentials when asked. obstore asks five minutes before the end, so every five.
            "expires_at": datetime.now(UTC) + timedelta(minutes=10),
        }

    return ObstoreS3(
        bucket,
        endpoint=client.meta.endpoint_url if settings.s3_endpoint_url else None,
        region=client.meta.region_name or "us-east-1",
        virtual_hosted_style_request=not settings.s3_endpoint_url,
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=_CONNECT_SECONDS),
            "timeout": timedelta(seconds=60),
        },
        retry_config={"max_retries": _ATTEMPTS - 1, "retry_timeout": timedelta(seconds=60)},
        credential_provider=credentials,
    )


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Map botocore's and obstore's exceptions, and a local disk's, onto our tree."""
    try:
        yield
    except ImagemillError:
        raise
    except Exception as error:
        found = _from_botocore(error, what) or _from_obstore(error, what) or _from_others(error, what)
        if found is None:
            raise
        raise found from error


def _status(error: Any) -> int:
    # botocore's connection errors carry .response = None rather than no attribute.
    response = getattr(error, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _from_botocore(error: BaseException, what: str) -> ImagemillError | None:
    if type(error).__module__.split(".")[0] not in ("botocore", "boto3", "s3transfer"):
        return None
    if type(error).__name__ == "S3UploadFailedError" and error.__context__ is not None:
        return _from_botocore(error.__context__, what)
    response = getattr(error, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    status = _status(error)
    if code == "NoSuchBucket":
        return _no_bucket(what)
    if status == 404:
        return NotFound(f"{what} does not exist")
    if status in (409, 412):
        return Conflict(f"{what} exists already")
    if status in (401, 403) or type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
        return _no_access(what, code or type(error).__name__)
    if type(error).__name__ in ("InvalidEndpointError", "ParamValidationError", "InvalidRegionError"):
        return Misconfigured(
            f"cannot reach S3 for {what}: {error}; check IMAGEMILL_S3_ENDPOINT_URL and the bucket's name"
        )
    if status == 507 or code in ("XMinioStorageFull", "QuotaExceeded"):
        return StoreFull(f"the S3 server has no space left for {what}")
    return _no_answer(what, code or type(error).__name__)


def _from_obstore(error: Exception, what: str) -> ImagemillError | None:
    # obstore says FileNotFoundError where the server said 404, so this is asked before the local disk's errors.
    if type(error).__name__ in ("NotFoundError", "FileNotFoundError") and "404" in str(error):
        return _no_bucket(what) if "<Code>NoSuchBucket</Code>" in str(error) else NotFound(f"{what} does not exist")
    if type(error).__module__.split(".")[0] != "obstore":
        return None
    if type(error).__name__ in ("UnauthenticatedError", "PermissionDeniedError"):
        return _no_access(what, type(error).__name__)
    return _no_answer(what, type(error).__name__)


def _from_others(error: Exception, what: str) -> ImagemillError | None:
    if isinstance(error, ValueError) and "endpoint" in str(error).lower():
        return Misconfigured(
            f"cannot reach S3 for {what}: {error}; set IMAGEMILL_S3_ENDPOINT_URL to a URL like http://host:9000"
        )
    if isinstance(error, OSError):
        from storage.folder import from_os

        return from_os(error, str(error.filename or what))
    return None


def _no_bucket(what: str) -> Misconfigured:
    return Misconfigured(f"the bucket of {what} does not exist; create it or correct the URL")


def _no_access(what: str, code: str) -> Misconfigured:
    return Misconfigured(
        f"S3 refused {what} ({code}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do"
    )


def _no_answer(what: str, code: str) -> Unavailable:
    return Unavailable(f"S3 does not serve {what} ({code}); check that the server is up, and try again later")
