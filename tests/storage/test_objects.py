"""The object store on a folder and on a real S3 server: one behaviour, and one error for each thing that goes wrong."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import socket
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from storage import folder, objects, s3
from storage.errors import BadInput, Conflict, Misconfigured, NotFound, StoreFull, Unavailable
from storage.objects import Store
from storage.settings import Settings
from tests.faultproxy import HttpFaultProxy
from tests.services import SeaweedFS


@pytest.fixture(autouse=True)
def _fresh_clients() -> Iterator[None]:
    """Clients keep the credentials they were made with."""
    s3.store.cache_clear()
    yield
    s3.store.cache_clear()


@pytest.fixture
def store(store_url: str) -> Store:
    return objects.open_store(store_url)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A local file to put."""
    path = tmp_path / "small"
    path.write_bytes(b"small")
    return path


def every_call(store: Store, small: Path) -> dict[str, Callable[[], object]]:
    return {
        "get": lambda: store.get("k"),
        "put": lambda: store.put("k", b"1"),
        "put_file": lambda: store.put_file("k", small),
        "get_file": lambda: store.get_file("k", small.with_name("got")),
        "stat": lambda: store.stat("k"),
        "list": lambda: list(store.list()),
        "delete": lambda: store.delete(["k"]),
    }


def test_round_trip(store: Store, tmp_path: Path) -> None:
    store.put("a/b.bin", b"one")
    store.put("a/b.bin", b"second")
    assert store.get("a/b.bin") == b"second"
    stat = store.stat("a/b.bin")
    assert stat is not None
    assert (stat.key, stat.size) == ("a/b.bin", 6)
    assert abs(stat.modified - time.time()) < 60
    store.get_file("a/b.bin", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == b"second"
    assert objects.read(store.url_for("a/b.bin"), Settings()) == b"second"
    store.put("empty", b"")
    assert store.get("empty") == b""


def test_a_large_file(store: Store, tmp_path: Path) -> None:
    """Larger than the size from which S3 takes it in parts."""
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1 << 20) * 40)
    store.put_file("big", big)
    store.get_file("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big.read_bytes() == store.get("big")


def test_list_takes_text_prefixes(store: Store) -> None:
    for key in ("a/1", "a/2/x", "ab/3", "b", "é ü/&?#%20"):
        store.put(key, key.encode())
    assert sorted(stat.key for stat in store.list()) == ["a/1", "a/2/x", "ab/3", "b", "é ü/&?#%20"]
    assert sorted(stat.key for stat in store.list("a/")) == ["a/1", "a/2/x"]
    assert sorted(stat.key for stat in store.list("a")) == ["a/1", "a/2/x", "ab/3"]
    assert sorted(stat.key for stat in store.list("a/2/")) == ["a/2/x"]
    assert list(store.list("nothing/")) == []
    assert store.get("é ü/&?#%20") == "é ü/&?#%20".encode()


def test_delete(store: Store) -> None:
    for key in ("a/1", "a/2", "b"):
        store.put(key, b"1")
    store.delete(["a/1", "a/2", "never"])
    assert [stat.key for stat in store.list()] == ["b"]
    assert store.delete([]) == 0


def test_delete_more_than_one_batch(store: Store) -> None:
    store.put("k0005", b"1")
    store.put("k1005", b"1")
    store.delete(f"k{number:04d}" for number in range(1010))
    assert list(store.list()) == []


def test_if_absent(store: Store) -> None:
    store.put("lock", b"first", if_absent=True)
    with pytest.raises(Conflict, match="exists already"):
        store.put("lock", b"second", if_absent=True)
    with pytest.raises(Conflict):
        store.put("lock", b"first", if_absent=True)  # the same bytes from someone else are someone else's
    assert store.get("lock") == b"first"
    store.delete(["lock"])
    store.put("lock", b"third", if_absent=True)


def test_if_absent_has_one_winner(store: Store) -> None:
    def attempt(number: int) -> int:
        with contextlib.suppress(Conflict):
            store.put("race", str(number).encode(), if_absent=True)
            return number
        return -1

    with ThreadPoolExecutor(8) as pool:
        winners = [number for number in pool.map(attempt, range(16)) if number >= 0]
    assert [str(number).encode() for number in winners] == [store.get("race")]


def test_missing_keys(store: Store, tmp_path: Path) -> None:
    store.put("here", b"1")
    with pytest.raises(NotFound, match=r"none.*does not exist"):
        store.get("none")
    with pytest.raises(NotFound, match="does not exist"):
        store.get_file("none", tmp_path / "got")
    assert not (tmp_path / "got").exists()
    assert store.stat("none") is None
    assert store.stat("none/below") is None
    with pytest.raises(NotFound):
        objects.read(store.url_for("none"), Settings())


@pytest.mark.parametrize("key", ["", "/abs", "../up", "a/../b", "a\0b", "a//b", "./a", "a/"])
def test_unsafe_keys(store: Store, small: Path, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.get(key),
        lambda: store.put(key, b""),
        lambda: store.put_file(key, small),
        lambda: store.get_file(key, small.with_name("got")),
        lambda: store.stat(key),
        lambda: store.delete([key]),
    ]
    for call in calls:
        with pytest.raises(BadInput, match="unsafe object key"):
            call()


def test_the_limit_of_a_read(store: Store) -> None:
    store.put("k", b"12345")
    uri = store.url_for("k")
    assert objects.read(uri, Settings(), limit=5) == b"12345"
    with pytest.raises(BadInput, match="5 bytes and the limit is 4"):
        objects.read(uri, Settings(), limit=4)


def test_a_read_takes_no_memory_for_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"12345")
    uri = (tmp_path / "small").as_uri()
    objects.read(uri, Settings(), limit=100_000_000)
    tracemalloc.start()
    try:
        objects.read(uri, Settings(), limit=100_000_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_file_that_is_larger_than_it_said_is_read_whole_up_to_the_limit() -> None:
    uri = "file:///proc/self/limits"  # it says that it has 0 bytes
    assert b"Max open files" in objects.read(uri, Settings(), limit=100_000)
    with pytest.raises(BadInput, match="11 bytes and the limit is 10"):
        objects.read(uri, Settings(), limit=10)


@pytest.mark.parametrize("uri", ["", "k", "https://h/k", "s3://", "s3://bucket", "s3://bucket/", "file://host/k"])
def test_what_is_not_read(uri: str) -> None:
    with pytest.raises(BadInput, match="expected file:///path or s3://bucket/key"):
        objects.read(uri, Settings())


@pytest.mark.parametrize("url", ["", "folder", "http://h/b", "s3://", "file://host/x", "s3:bucket"])
def test_what_is_no_store(url: str) -> None:
    with pytest.raises(Misconfigured, match="expected file:///folder or s3://bucket/prefix"):
        objects.open_store(url)


def test_puts_and_deletes_in_one_folder(store: Store) -> None:
    """A collector that removes emptied folders must never make a put fail."""

    def one(number: int) -> None:
        for turn in range(15):
            key = f"jobs/{turn % 2}/deep/k{number}"
            store.put(key, b"x")
            assert store.get(key) == b"x"
            store.delete([key])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(8)))
    assert list(store.list()) == []


# On a folder


def test_a_folder_that_keeps_going_away_under_a_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a collector removes the emptied folder between the put's two steps."""
    real, times = Path.touch, iter(range(10))

    def touch(path: Path) -> None:
        if next(times, None) is not None:
            path.parent.rmdir()
        real(path)

    monkeypatch.setattr(Path, "touch", touch)
    store = folder.FolderStore(tmp_path / "store")
    store.put("a/k", b"1")
    assert store.get("a/k") == b"1"


def test_a_folder_that_goes_away_while_it_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector removes the folder that a put failed in right when the put looks why: no file stands there."""
    real_touch, goes = Path.touch, [tmp_path / "store" / "a"]

    def touch(path: Path) -> None:
        if goes:
            raise FileNotFoundError(path)
        real_touch(path)

    def looking(look: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def looked(path: Any, **options: Any) -> os.stat_result:
            found = look(path, **options)
            if goes and path == goes[0]:
                goes.pop().rmdir()
            return found

        return looked

    monkeypatch.setattr(Path, "touch", touch)
    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, looking(getattr(os, name)))
    store = folder.FolderStore(tmp_path / "store")
    store.put("a/k", b"1")
    assert store.get("a/k") == b"1"
    assert not goes


@pytest.mark.parametrize("to", ["nothing", "file"])
def test_a_link_in_the_way_of_a_folder(to: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = folder.FolderStore(tmp_path / "store")
    store.put("b", b"1")
    (tmp_path / "store" / "a").symlink_to(tmp_path / to)
    with pytest.raises(BadInput, match="take another key"):
        store.put("a/k", b"1")


def test_a_reader_never_sees_half_an_object(tmp_path: Path) -> None:
    store = folder.FolderStore(tmp_path / "store")
    sizes, stop = set(), threading.Event()

    def look() -> None:
        while not stop.is_set():
            sizes.update((stat.key, stat.size) for stat in store.list())

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(30):
        store.put("k", b"x" * 3_000_000)
    stop.set()
    thread.join()
    assert sizes <= {("k", 3_000_000)}


def test_a_killed_writers_rest_is_hidden_and_later_removed(tmp_path: Path) -> None:
    store = folder.FolderStore(tmp_path)
    rest = tmp_path / "jobs" / f".{'0' * 32}.tmp"
    store.put("jobs/k", b"1")
    rest.write_bytes(b"half")
    assert [stat.key for stat in store.list()] == ["jobs/k"]
    assert rest.exists()
    os.utime(rest, (0, 0))
    assert [stat.key for stat in store.list()] == ["jobs/k"]
    assert not rest.exists()


def test_deleting_never_removes_the_root_or_what_is_above(tmp_path: Path) -> None:
    store = folder.FolderStore(tmp_path / "above" / "root")
    store.put("a/b/c", b"1")
    store.delete(["a/b/c"])
    assert list((tmp_path / "above").rglob("*")) == [tmp_path / "above" / "root"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("where", ["fsync", "copyfile", "write"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path, where: str, code: int) -> None:
    store = folder.FolderStore(tmp_path / "store")
    store.put("k", b"before")

    def full(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    owner = {"fsync": os, "copyfile": shutil, "write": Path}[where]
    monkeypatch.setattr(owner, "write_bytes" if where == "write" else where, full)
    put = every_call(store, small)["put_file" if where == "copyfile" else "put"]
    with pytest.raises(StoreFull, match="no space left while writing 'k'"):
        put()
    monkeypatch.undo()
    assert store.get("k") == b"before"
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["k"]


def test_bytes_are_synced_before_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path
) -> None:
    steps: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(handle: int) -> None:
        steps.append("sync folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync file")
        real_sync(handle)

    def replace(source: Path, target: Path) -> None:
        steps.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    store = folder.FolderStore(tmp_path / "store")
    store.put("k", b"1")
    store.put_file("f", small)
    assert steps == ["sync file", "rename", "sync folder"] * 2


def test_a_key_below_another_object(tmp_path: Path) -> None:
    store = folder.FolderStore(tmp_path)
    store.put("a", b"1")
    store.put("d/k", b"1")
    for key in ("a/b", "a/b/c"):
        with pytest.raises(BadInput, match="is a file; take another key"):
            store.put(key, b"2")
    with pytest.raises(BadInput, match="a folder of that name"):
        store.put("d", b"2")
    with pytest.raises(NotFound):
        store.get("d")
    assert store.stat("d") is None
    store.delete(["d", "a/b"])
    assert sorted(stat.key for stat in store.list()) == ["a", "d/k"]


def test_long_and_odd_names(tmp_path: Path) -> None:
    store = folder.FolderStore(tmp_path)
    store.put("é" * 127, b"1")
    assert store.get("é" * 127) == b"1"
    with pytest.raises(BadInput, match="too long a name"):
        store.put("é" * 128, b"1")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9?#%41"))
    odd.write_bytes(b"odd")
    assert objects.read(odd.as_uri(), Settings()) == b"odd"
    assert objects.local_path(odd.as_uri()) == odd


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    store = folder.FolderStore(tmp_path / "store")
    store.put("k", b"1")

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    for name in ("open", "touch", "stat", "unlink"):
        monkeypatch.setattr(Path, name, denied)
    monkeypatch.setattr(os, "scandir", denied)
    monkeypatch.setattr(shutil, "copyfile", denied)
    for call in every_call(store, small).values():
        with pytest.raises(Misconfigured, match="no permission"):
            call()
    monkeypatch.undo()


# On S3


def on_s3(url: str, **more: object) -> Store:
    return objects.open_store(url, Settings(**more))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value"), [("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "nobody")])
def test_wrong_credentials(s3_url: str, small: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    for call in every_call(on_s3(s3_url), small).values():
        with pytest.raises(Misconfigured, match="check AWS_ACCESS_KEY_ID") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_no_credentials(s3_url: str, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for call in every_call(on_s3(s3_url), small).values():
        with pytest.raises(Misconfigured, match="check AWS_ACCESS_KEY_ID"):
            call()


def test_a_missing_bucket(s3_url: str, small: Path) -> None:
    for call in every_call(on_s3("s3://nowhere/prefix"), small).values():
        with pytest.raises(Misconfigured, match=r"bucket of s3://nowhere/prefix.* does not exist"):
            call()


def test_an_endpoint_that_is_no_url(s3_url: str, small: Path) -> None:
    for call in every_call(on_s3(s3_url, s3_endpoint_url="nonsense"), small).values():
        with pytest.raises(Misconfigured, match="IMAGEMILL_S3_ENDPOINT_URL"):
            call()


def timed(call: Callable[[], object]) -> float:
    start = time.monotonic()
    with pytest.raises(Unavailable, match="check that the server is up"):
        call()
    return time.monotonic() - start


def test_a_server_that_refuses_connections(s3_url: str, small: Path) -> None:
    calls = every_call(on_s3(s3_url, s3_endpoint_url="http://127.0.0.1:9"), small).values()
    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(timed, calls)) < 20


@pytest.mark.slow
def test_a_server_that_swallows_connections(s3_url: str, small: Path) -> None:
    """A full backlog drops the SYN, as a host behind a silent firewall does."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        calls = every_call(on_s3(s3_url, s3_endpoint_url=endpoint), small).values()
        with ThreadPoolExecutor(8) as pool:
            seconds = list(pool.map(timed, calls))
    assert 3 < min(seconds) <= max(seconds) < 20


@pytest.fixture
def proxy(seaweed: SeaweedFS) -> Iterator[HttpFaultProxy]:
    with HttpFaultProxy(seaweed.port) as found:
        yield found


def test_a_lost_answer_to_our_own_put(s3_url: str, proxy: HttpFaultProxy) -> None:
    store = on_s3(s3_url, s3_endpoint_url=proxy.url)
    rule = proxy.add("lost", "PUT", "lock", times=1)
    store.put("lock", b"ours", if_absent=True)
    assert rule.hits == 1
    assert [seen.method for seen in proxy.seen] == ["PUT", "PUT", "HEAD"]
    with pytest.raises(Conflict):
        store.put("lock", b"ours", if_absent=True)


def test_a_lost_answer_after_someone_elses_put(s3_url: str, proxy: HttpFaultProxy) -> None:
    on_s3(s3_url).put("lock", b"same", if_absent=True)
    proxy.add("lost", "PUT", "lock", times=1)
    with pytest.raises(Conflict, match="exists already"):
        on_s3(s3_url, s3_endpoint_url=proxy.url).put("lock", b"same", if_absent=True)


@pytest.mark.parametrize("action", ["slowdown", "error", "lost", "reset"])
def test_passing_faults_are_outlived(s3_url: str, small: Path, proxy: HttpFaultProxy, action: str) -> None:
    store = on_s3(s3_url, s3_endpoint_url=proxy.url)
    store.put("k", b"1" * 200_000)
    for name, call in every_call(store, small).items():
        if action == "reset" and name not in ("put", "put_file"):
            continue
        rule = proxy.add(action, times=1)  # type: ignore[arg-type]
        call()
        assert rule.hits == 1, name


def test_a_cut_body_is_never_taken_for_the_object(s3_url: str, proxy: HttpFaultProxy) -> None:
    store = on_s3(s3_url, s3_endpoint_url=proxy.url)
    store.put("k", b"1" * 200_000)
    proxy.add("truncate", "GET")
    with pytest.raises(Unavailable):
        store.get("k")
    proxy.heal()
    assert store.get("k") == b"1" * 200_000


@pytest.mark.slow
def test_a_server_that_stays_ill(s3_url: str, small: Path, proxy: HttpFaultProxy) -> None:
    """Asked to slow down, both libraries wait longer between attempts than for a server that is not there."""
    store = on_s3(s3_url, s3_endpoint_url=proxy.url)
    proxy.add("slowdown")
    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(timed, every_call(store, small).values())) < 60


def test_a_download_onto_a_full_disk(s3_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    store = on_s3(s3_url)
    store.put("k", b"1")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("s3transfer.utils.OSUtils.rename_file", full)
    with pytest.raises(StoreFull, match="no space left"):
        store.get_file("k", tmp_path / "got")


@pytest.mark.parametrize("key", ["/lead", "a//b", "a/../b", "./a", "end/", "new\nline"])
def test_keys_that_obstore_would_change_go_through_boto3(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    asked: list[str] = []

    class Client:
        def get_object(self, Bucket: str, Key: str) -> dict[str, object]:
            asked.append(Key)
            return {"ContentLength": 3, "Body": io.BytesIO(b"abc")}

    monkeypatch.setattr(s3, "_boto_client", lambda _settings: Client())
    assert objects.read(f"s3://bucket/{key}", Settings()) == b"abc"
    assert asked == [key]
    with pytest.raises(BadInput, match="limit is 2"):
        objects.read(f"s3://bucket/{key}", Settings(), limit=2)
