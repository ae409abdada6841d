"""Every environment variable imagemill reads, once. Nothing set means: everything under one home folder."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated

import platformdirs
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from storage.errors import Misconfigured

# The sun_path of a unix socket holds 108 bytes on Linux, 104 on macOS, with the closing NUL.
_SOCKET_PATH_LIMIT = 100
_NOT_IN_URLS = re.compile(r"[?#%]")  # what one of the libraries between us and the socket would take for syntax


class Settings(BaseSettings):
    """Where things are and how much they may use. Each field is the variable IMAGEMILL_<FIELD> in capitals."""

    model_config = SettingsConfigDict(env_prefix="IMAGEMILL_", frozen=True, extra="ignore", allow_inf_nan=False)

    home: Path = Field(
        default_factory=lambda: _user_data(),
        description="Folder for everything that has no URL of its own.",
    )
    database_url: str = Field("", description="SQL index: postgresql://user:password@host/db or sqlite:///path.")
    store_url: str = Field("", description="Object store for results: s3://bucket/prefix or file:///folder.")
    broker_url: str = Field("", description="Redis or Valkey: redis://:password@host:6379/0, rediss:// for TLS.")
    s3_endpoint_url: str = Field("", description="S3 server when it is not AWS, such as http://host:9000.")
    s3_region: str = Field("", description="S3 region; empty takes the AWS configuration, else us-east-1.")
    cache: Path | None = Field(None, description="Folder for fetched weights; default <home>/cache.")
    local_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="Folders that paths in a manifest may lead to, separated by ':'; default: the manifest's own."
    )
    lease_seconds: float = Field(60, ge=0.5, description="A worker that has not beaten for so long loses its shards.")
    stall_seconds: float = Field(300, ge=1, description="A worker in which no batch finishes for so long is replaced.")
    ticket_seconds: float = Field(600, ge=1, description="How long one ticket may keep a worker before it rings again.")
    reconcile_seconds: float = Field(5, ge=0.1, description="Pause between two rounds of the reconciler.")
    orphan_hours: float = Field(24, ge=0, description="Age at which objects of attempts that never committed may go.")
    max_errors: int = Field(3, ge=1, description="A shard that failed so often is given up; its items become failures.")
    max_image_bytes: int = Field(100_000_000, ge=1, description="Larger files become failures before decoding.")
    max_image_pixels: int = Field(100_000_000, ge=1, description="Larger pictures become failures before decoding.")
    untrusted: bool = Field(False, description="Decode pictures in child processes that may do nothing else.")
    decode_memory_bytes: int = Field(3_000_000_000, ge=500_000_000, description="Address space of such a child.")
    decode_seconds: float = Field(30, gt=0, description="How long such a child may take for one picture.")
    decode_threads: int = Field(0, ge=0, description="Threads that fetch and decode; 0 chooses by the cores.")
    gpu_decode: bool = Field(False, description="Decode JPEGs on the GPU (nvJPEG), where a worker has one.")
    buffer_bytes: int = Field(
        1_000_000_000, ge=8, description="Pictures a worker may hold, encoded, decoded or prepared."
    )
    encodings_bytes: int = Field(20_000_000_000, ge=0, description="Encoded images kept for mask jobs; 0 keeps none.")
    tune_seconds: float = Field(13, ge=0, description="How long a worker may measure a model at a long job; 0 never.")
    log_level: str = Field("warning", description="debug, info, warning or error.")

    @field_validator("home", "cache", mode="after")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return None if path is None else path.expanduser().absolute()

    @field_validator("local_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(Path(p) for p in value.split(os.pathsep) if p) if isinstance(value, str) else value

    @field_validator("log_level")
    @classmethod
    def _level(cls, value: str) -> str:
        if value.lower() not in ("debug", "info", "warning", "error"):
            raise ValueError("expected debug, info, warning or error")
        return value.lower()

    @field_validator("gpu_decode")
    @classmethod
    def _trusted(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("untrusted"):
            raise ValueError("with IMAGEMILL_UNTRUSTED pictures are decoded in child processes only; unset one of both")
        return value

    @property
    def database(self) -> str:
        """URL of the SQL index."""
        path = str(self.home / "imagemill.db").replace("%", "%25").replace("?", "%3F")
        return self.database_url or f"sqlite:///{path}"

    @property
    def store(self) -> str:
        """URL of the object store."""
        return self.store_url or (self.home / "store").as_uri()

    @property
    def cache_folder(self) -> Path:
        """Where fetched weights are kept."""
        return self.cache or self.home / "cache"

    @property
    def embedded(self) -> bool:
        """Whether the broker is the one imagemill starts itself."""
        return not self.broker_url

    @property
    def broker_socket(self) -> Path:
        """The embedded broker's unix socket; in the temporary folder when the home folder's path is none for it."""
        path = self.home / "run" / "valkey.sock"
        if len(os.fsencode(path)) <= _SOCKET_PATH_LIMIT and not _NOT_IN_URLS.search(str(path)):
            return path
        import hashlib
        import tempfile

        name = hashlib.sha256(os.fsencode(self.home)).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"imagemill-{os.getuid()}-{name}" / "valkey.sock"

    @property
    def broker(self) -> str:
        """URL of the broker."""
        return self.broker_url or f"redis+socket://{self.broker_socket}?virtual_host=0"


def _user_data() -> Path:
    try:
        return Path(platformdirs.user_data_dir("imagemill"))
    except RuntimeError as error:  # no HOME, and a user that the system does not know, as in some containers
        raise Misconfigured(f"there is no home folder ({error}); set IMAGEMILL_HOME") from None


@lru_cache(maxsize=1)
def load() -> Settings:
    """The process's settings. Raises Misconfigured, naming the variable at fault."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"IMAGEMILL_{str(first['loc'][0]).upper()}" if first["loc"] else "IMAGEMILL_*"
        raise Misconfigured(f"{name} is not valid: {first['msg']}, but got {first.get('input')!r}") from None


def masked(url: str) -> str:
    """A URL fit for people's eyes: its password and query values replaced by ***.

    A password may hold '/', '?', '#' and '@' that nobody escaped, so it ends at the last '@' there is.
    """
    url = re.sub(r"(://[^:/@]*):.*@", r"\1:***@", url, count=1, flags=re.DOTALL)
    base, mark, query = url.partition("?")
    return base + mark + "&".join(f"{pair.split('=', 1)[0]}=***" for pair in query.split("&") if pair)
