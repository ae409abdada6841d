"""Fixtures every test may ask for: a clean environment, and fresh databases, stores and brokers on real servers."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.services import SCRIPTS, Postgres, SeaweedFS, Valkey, stop_leftovers

# Libraries read these once, when they are imported, so they are set before any test module is.
_LIBRARY_FOLDER = Path(tempfile.mkdtemp(prefix="im-libraries-"))
_LIBRARIES = {
    "YOLO_CONFIG_DIR": str(_LIBRARY_FOLDER / "ultralytics"),
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "ULTRALYTICS_SAFE_LOAD": "1",
    "HF_HOME": str(_LIBRARY_FOLDER / "huggingface"),
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TORCH_HOME": str(_LIBRARY_FOLDER / "torch"),
    "MPLCONFIGDIR": str(_LIBRARY_FOLDER / "matplotlib"),
    "MPLBACKEND": "agg",
}
os.environ.update(_LIBRARIES)
# Hundreds of processes are started; each would compile our modules anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# Several tests run at once; with a thread for every core in each, a network's threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
Path(_LIBRARIES["YOLO_CONFIG_DIR"]).mkdir()

# Nobody's own credentials or metadata service may answer in a test.
_NO_ACCOUNT = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}

# A run that was started in the background of a script ignores Ctrl-C, and every process it starts would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Delete what the libraries wrote."""
    shutil.rmtree(_LIBRARY_FOLDER, ignore_errors=True)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh IMAGEMILL_HOME; every other IMAGEMILL_ and AWS_ variable is unset, and settings are read anew."""
    from storage import settings

    for name in [name for name in os.environ if name.startswith(("IMAGEMILL_", "AWS_"))]:
        monkeypatch.delenv(name)
    for name, value in _NO_ACCOUNT.items():
        monkeypatch.setenv(name, value)
    folder = tmp_path / "home"
    monkeypatch.setenv("IMAGEMILL_HOME", str(folder))
    settings.load.cache_clear()
    yield folder
    settings.load.cache_clear()
    if (folder / "run").exists():
        stop_leftovers(folder)


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    """The Valkey server that all tests share: take `broker_url` from it, do not kill it."""
    with Valkey() as server:
        yield server


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """The Postgres server that all tests share: take `postgres_url` from it, do not kill it."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="session")
def seaweed() -> Iterator[SeaweedFS]:
    """The S3 server that all tests share: take `s3_url` from it, do not kill it."""
    with SeaweedFS() as server:
        yield server


@pytest.fixture
def broker_url(valkey: Valkey) -> str:
    """URL of an empty Valkey database of its own."""
    return valkey.new_database()


@pytest.fixture
def postgres_url(postgres: Postgres) -> Iterator[str]:
    """URL of an empty Postgres database of its own, dropped afterwards."""
    url = postgres.new_database()
    yield url
    postgres.drop_database(url)


@pytest.fixture
def s3_url(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty prefix; the environment names its server and keys."""
    from storage import settings

    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    settings.load.cache_clear()
    return seaweed.new_prefix()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty SQL database, once on SQLite and once on Postgres."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'index.db'}"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture(params=["file", "s3"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty object store, once a folder and once S3 (whose server and keys the environment then names)."""
    if request.param == "file":
        return (tmp_path / "store").as_uri()
    return str(request.getfixturevalue("s3_url"))


@pytest.fixture(params=["laptop", "fleet"])
def stack(request: pytest.FixtureRequest, home: Path) -> Iterator[dict[str, str]]:
    """The environment for subprocesses of the console script, with `imagemill` first on PATH.

    Once "laptop": nothing set but IMAGEMILL_HOME. Once "fleet": Postgres, S3 and Valkey by URL. Whatever was started
    with it and still runs at the end of the test is killed.
    """
    urls: dict[str, str] = {}
    if request.param == "fleet":
        urls = {
            "IMAGEMILL_DATABASE_URL": str(request.getfixturevalue("postgres_url")),
            "IMAGEMILL_STORE_URL": str(request.getfixturevalue("s3_url")),
            "IMAGEMILL_BROKER_URL": str(request.getfixturevalue("broker_url")),
        }
    path = f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    yield {**os.environ, "PATH": path, **urls}
    stop_leftovers(home)
