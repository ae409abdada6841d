"""Every variable is read, refused with its name when wrong, and no password is ever shown."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.broker import Broker
from storage import settings
from storage.errors import Misconfigured
from storage.objects import open_store
from storage.settings import Settings, masked
from tests.support import opened

SECRET = "s3cr3t-Pa55"


def load(monkeypatch: pytest.MonkeyPatch, **values: str) -> Settings:
    for name, value in values.items():
        monkeypatch.setenv(f"IMAGEMILL_{name.upper()}", value)
    settings.load.cache_clear()
    return settings.load()


def test_nothing_set_means_everything_under_home(home: Path) -> None:
    found = settings.load()
    assert found.database == f"sqlite:///{home}/imagemill.db"
    assert found.store == (home / "store").as_uri()
    assert found.cache_folder == home / "cache"
    assert found.embedded
    assert str(home) in found.broker or "imagemill-" in found.broker


def test_home_has_a_place_when_it_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGEMILL_HOME")
    settings.load.cache_clear()
    assert settings.load().home.is_absolute()


def test_no_home_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that runs as a user nobody has entered anywhere."""
    for name in ("HOME", "XDG_DATA_HOME", "IMAGEMILL_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    settings.load.cache_clear()
    with pytest.raises(Misconfigured, match="set IMAGEMILL_HOME"):
        settings.load()


@pytest.mark.parametrize("name", ["q?x=1", "q#x", "q%41x", "q x", "qé+@:x"])
def test_a_home_of_any_name_keeps_everything_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """What a URL would take for syntax leads to no other folder."""
    home = tmp_path / name
    found = load(monkeypatch, home=str(home))
    with opened(found.database):
        open_store(found.store).put("a/b", b"x")
    broker = Broker(found)
    broker.stop()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert {"imagemill.db", "store", "logs"} <= {path.name for path in home.iterdir()}


def test_urls_win(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(
        monkeypatch, database_url="postgresql://h/d", store_url="s3://b/p", broker_url="redis://h/0", cache="~/c"
    )
    assert (found.database, found.store, found.broker) == ("postgresql://h/d", "s3://b/p", "redis://h/0")
    assert not found.embedded
    assert found.cache_folder == Path("~/c").expanduser()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lease_seconds", "soon"),
        ("lease_seconds", "0"),
        ("max_errors", "0"),
        ("max_image_pixels", "-5"),
        ("decode_threads", "1.5"),
        ("log_level", "loud"),
        ("reconcile_seconds", "nan"),
        ("lease_seconds", "inf"),
    ],
)
def test_a_wrong_value_names_its_variable(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    with pytest.raises(Misconfigured, match=f"IMAGEMILL_{name.upper()}") as caught:
        load(monkeypatch, **{name: value})
    assert value in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_nobody_vouches_for_are_not_decoded_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(monkeypatch, gpu_decode="true").gpu_decode
    with pytest.raises(Misconfigured, match=r"IMAGEMILL_GPU_DECODE.*IMAGEMILL_UNTRUSTED.*unset one"):
        load(monkeypatch, gpu_decode="true", untrusted="true")


def test_settings_are_a_key_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(monkeypatch, local_roots=f"/a{os.pathsep}/b", log_level="DEBUG")
    assert found.local_roots == (Path("/a"), Path("/b"))
    assert found.log_level == "debug"
    assert len({found, load(monkeypatch)}) == 1
    with pytest.raises(ValueError, match="frozen"):
        found.max_errors = 5  # type: ignore[misc]


def test_the_socket_of_a_deep_home_is_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = load(monkeypatch, home=str(tmp_path / ("x" * 90) / "a")).broker_socket
    second = load(monkeypatch, home=str(tmp_path / ("x" * 90) / "b")).broker_socket
    assert first != second
    assert max(len(os.fsencode(first)), len(os.fsencode(second))) < 104


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p@h:5/db", "postgresql://u:***@h:5/db"),
        ("postgresql://u@h:5/db", "postgresql://u@h:5/db"),
        ("postgresql://h:5432/db", "postgresql://h:5432/db"),
        ("postgresql://h/db?sslmode=require&password=x", "postgresql://h/db?sslmode=***&password=***"),
        ("redis://:p@h:1/0", "redis://:***@h:1/0"),
        ("sqlite:////tmp/a b.db", "sqlite:////tmp/a b.db"),
        ("s3://bucket/prefix", "s3://bucket/prefix"),
        ("nonsense", "nonsense"),
        ("http://[::1", "http://[::1"),
        ("", ""),
    ],
)
def test_masked(url: str, expected: str) -> None:
    assert masked(url) == expected


@pytest.mark.parametrize("character", ["/", "?", "#", "@", ":", "%", "&", "=", "\n", " ", "é", "[", "]"])
def test_a_password_is_masked_whatever_it_holds(character: str) -> None:
    password = f"{SECRET}{character}{SECRET}"
    for text in (password, quote(password, safe="")):
        for url in (f"postgresql://user:{text}@host:5/db?x=1", f"redis://:{text}@host/0", f"s3://key:{text}@bucket/p"):
            assert SECRET not in masked(url)
            assert "host" in masked(url) or "bucket" in masked(url)


@given(st.text(), st.text(alphabet=":/?#@&=%[] abc"))
def test_no_password_ever_shows(prefix: str, suffix: str) -> None:
    for url in (
        f"postgresql://u:{SECRET}{suffix}@h/db",
        f"postgresql://u:{prefix.replace('@', '')}{SECRET}@h/db",
        f"postgresql://h/db?password={SECRET}",
    ):
        assert SECRET not in masked(url)
