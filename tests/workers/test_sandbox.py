"""What happens in a decoding process stays there: crashes, hangs, hunger and lies cost one item, and nothing leaks."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from storage.errors import ItemFailed, Misconfigured
from tests import mutations
from tests.mutations import saved
from tests.times import soon
from workers import images, sandbox
from workers.images import Limits
from workers.sandbox import Sandbox

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
LIMITS = Limits(max_bytes=5_000_000, max_pixels=20_000_000)
MEMORY = 2_000_000_000
PICTURE = saved(mutations.picture(), "PNG")

# A child whose decoder obeys: the bytes of a "picture" that starts with RUN are Python. Descriptor 4 is its answers'.
OBEDIENT = """
import ctypes, json, os, signal, socket, struct, sys, threading, time
from storage.errors import ItemFailed
from workers import images, sandbox

real = images.decode

def decode(data, limits):
    if data.startswith(b"RUN"):
        exec(data[3:].decode(), globals())
    return real(data, limits)

images.decode = decode
sandbox.serve()
"""


@pytest.fixture
def obedient(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """One child that runs what it is told, with three seconds for each picture."""
    monkeypatch.setattr(sandbox, "_CODE", OBEDIENT)
    with opened(1, timeout_s=3) as found:
        yield found


@contextlib.contextmanager
def opened(
    processes: int = 1, limits: Limits = LIMITS, memory_bytes: int = MEMORY, timeout_s: float = 60
) -> Iterator[Sandbox]:
    found = Sandbox(processes, limits, memory_bytes, timeout_s)
    try:
        yield found
    finally:
        found.close()


def outcome(decode: Any, data: bytes) -> Any:
    """What became of a picture, so that two ways can be compared."""
    try:
        picture = decode(data)
    except ItemFailed as error:
        return error.stage, error.reason, error.message, error.retry
    return picture if isinstance(picture, images.Header) else (picture.width, picture.height, picture.pixels.tobytes())


def failure(box: Sandbox, data: bytes | str) -> ItemFailed:
    data = b"RUN" + data.encode() if isinstance(data, str) else data
    with pytest.raises(ItemFailed) as caught:
        box.decode(data)
    assert caught.value.stage == "decode"
    return caught.value


def works(box: Sandbox) -> None:
    assert np.array_equal(box.decode(PICTURE).pixels, np.asarray(mutations.picture()))


def child_of(box: Sandbox) -> int:
    (child,) = box._alive
    return int(child._process.pid)


def told(box: Sandbox, expression: str) -> Any:
    """The value of an expression inside the child."""
    return json.loads(failure(box, f"raise ItemFailed('decode', 'told', json.dumps({expression}))").message)


# ---------------------------------------------------------------------------------------- the contract


def test_the_same_outcomes_as_in_process() -> None:
    files = [*mutations.seeds().items(), *mutations.generate(400, 11), ("bytes", bytes(5_000_001))]
    with opened() as box:
        for name, data in files:
            expected = outcome(lambda data: images.decode(data, LIMITS), data)
            assert outcome(box.decode, data) == expected, name
            if len(data) <= LIMITS.max_bytes:
                assert outcome(box.header, data) == outcome(images.header, data), name
        assert box.started == 1


def test_pixels_are_contiguous_and_writable_and_its_own() -> None:
    with opened() as box:
        first, second = box.decode(PICTURE), box.decode(PICTURE)
    assert first.pixels.flags.c_contiguous
    assert first.pixels.dtype == np.uint8
    first.pixels[:] = 0
    assert second.pixels.any()


def test_many_threads_get_their_own_pictures_from_few_children() -> None:
    def one(number: int) -> bool:
        colour = (number % 256, number * 7 % 256, number * 31 % 256)
        picture = Image.new("RGB", (20 + number % 400, 10 + number * 13 % 300), colour)
        decoded = box.decode(saved(picture, "PNG"))
        return (decoded.width, decoded.height) == picture.size and bool((decoded.pixels == colour).all())

    with opened(2) as box, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(one, range(400)))
        assert box.started == 2


def test_children_start_when_they_are_needed() -> None:
    with opened(4) as box:
        assert box.started == 0
        works(box)
        works(box)
        assert box.started == 1


def test_pictures_larger_than_the_pipes() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 1400, 3), np.uint8)
    with opened() as box:
        assert np.array_equal(box.decode(saved(Image.fromarray(noise), "BMP")).pixels, noise)


# ---------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("code", "says", "retry"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV", False),
        ("os.abort()", "SIGABRT", False),
        ("ctypes.string_at(0)", "SIGSEGV", False),
        ("os._exit(0)", "exit code 0", False),
        ("os._exit(3)", "exit code 3", False),
        ("raise RuntimeError", "exit code 1", False),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL", True),
    ],
)
def test_a_crash_costs_one_item(obedient: Sandbox, code: str, says: str, retry: bool) -> None:
    error = failure(obedient, code)
    assert (error.reason, error.retry) == ("decoder-crashed", retry)
    assert says in error.message
    works(obedient)
    assert obedient.started == 2


def test_only_what_kills_a_fresh_child_is_to_blame(obedient: Sandbox) -> None:
    """A picture damages its child so that the next one finds it broken."""
    assert failure(obedient, "images.decode = None").reason == "unknown-format"
    works(obedient)
    works(obedient)
    assert obedient.started == 2


def test_a_killer_is_tried_again_once(obedient: Sandbox) -> None:
    works(obedient)
    assert failure(obedient, "os._exit(3)").reason == "decoder-crashed"
    assert obedient.started == 2
    works(obedient)
    assert obedient.started == 3


def test_a_child_killed_while_idle_costs_nothing(obedient: Sandbox) -> None:
    works(obedient)
    os.kill(child_of(obedient), signal.SIGKILL)
    time.sleep(0.2)
    works(obedient)
    assert obedient.started == 2


def test_ctrl_c_in_a_terminal_is_not_for_children(obedient: Sandbox) -> None:
    works(obedient)
    os.kill(child_of(obedient), signal.SIGINT)
    time.sleep(0.2)
    works(obedient)
    assert obedient.started == 1


def test_too_slow_is_killed(obedient: Sandbox) -> None:
    began = time.monotonic()
    error = failure(obedient, "time.sleep(1000)")
    assert (error.reason, error.retry) == ("timeout", True)
    assert soon(time.monotonic() - began, 60)
    works(obedient)
    assert obedient.started == 2


def test_a_child_that_reads_nothing_is_killed(obedient: Sandbox) -> None:
    works(obedient)
    os.kill(child_of(obedient), signal.SIGSTOP)
    assert failure(obedient, bytes(4_000_000)).reason == "timeout"
    works(obedient)


@LINUX
def test_memory_is_bounded_and_its_lack_costs_one_item() -> None:
    with opened(1, Limits(max_pixels=400_000_000), memory_bytes=600_000_000) as box:
        error = failure(box, saved(Image.new("L", (15_000, 15_000)), "PNG", compress_level=1))
        assert (error.reason, error.retry) == ("too-many-pixels", True)
        error = failure(box, bytes(90_000_000))  # fits, and starts like nothing
        assert error.reason == "unknown-format"
        works(box)
        assert box.started == 1


@LINUX
def test_a_file_larger_than_the_memory_costs_one_item() -> None:
    with opened(1, Limits(max_bytes=500_000_000), memory_bytes=500_000_000) as box:
        error = failure(box, bytes(400_000_000))
        assert (error.reason, error.retry) == ("too-many-pixels", True)
        works(box)
        assert box.started == 1


@LINUX
def test_hunger_inside_a_decoder(obedient: Sandbox) -> None:
    assert failure(obedient, "bytearray(10**12)").reason == "too-many-pixels"
    error = failure(obedient, "kept = []\nwhile True: kept.append(bytes(10**6))")
    assert (error.reason, error.retry) == ("too-many-pixels", True)


def answer(kind: bytes, width: int, height: int, nbytes: int, body: bytes = b"") -> str:
    """Code that writes an answer and ends."""
    head = sandbox._ANSWER.pack(kind, width, height, nbytes)
    return f"os.write(4, {head + body!r}); os._exit(0)"


@pytest.mark.parametrize(
    "code",
    [
        answer(b"P", 1_000_000, 1_000_000, 3 * 10**12),
        answer(b"P", 2**62, 2**62, 2**63),
        answer(b"P", 5000, 5000, 75_000_000),
        answer(b"P", 10, 10, 299, bytes(299)),
        answer(b"P", 10, 10, 301, bytes(301)),
        answer(b"P", 10, 10, 2**63),
        answer(b"P", 10, 10, 300, bytes(299)),
        answer(b"P", -10, -10, 300, bytes(300)),
        answer(b"P", 0, 0, 0),
        answer(b"S", 10, 10, 3, b"PNG"),
        answer(b"Z", 10, 10, 300, bytes(300)),
        answer(b"F", 0, 0, 2**40),
        answer(b"F", 0, 0, 5, b"{bad}"),
        answer(b"F", 0, 0, 4, b"null"),
        answer(b"F", 0, 0, 2, b"\xff\xfe"),
        answer(b"F", 0, 0, 16_000, b"[" * 16_000),
        answer(b"F", 0, 0, 21, b'["Bad one","m",false]'),
        answer(b"F", 0, 0, 18, b'["good",[1],false]'),
        answer(b"F", 0, 0, 14, b'["good","m",1]'),
        "os.write(4, b'x')\nos._exit(0)",
        "while True: os.write(4, bytes(65536))",
    ],
)
def test_lies_are_a_crash(obedient: Sandbox, code: str) -> None:
    error = failure(obedient, code)
    assert (error.reason, error.retry) == ("decoder-crashed", False)
    works(obedient)
    assert obedient.started == 2


def test_a_lie_about_a_header(monkeypatch: pytest.MonkeyPatch) -> None:
    code = OBEDIENT.replace("sandbox.serve()", "images.header = lambda _: images.Header('EXE', 1, 1)\nsandbox.serve()")
    monkeypatch.setattr(sandbox, "_CODE", code)
    with opened() as box:
        with pytest.raises(ItemFailed) as caught:
            box.header(PICTURE)
        assert caught.value.reason == "decoder-crashed"


def test_huge_numbers_in_a_header_are_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    header = "images.header = lambda _: images.Header('PNG', 10**30, -10**30)"
    code = OBEDIENT.replace("sandbox.serve()", f"{header}\nsandbox.serve()")
    monkeypatch.setattr(sandbox, "_CODE", code)
    with opened() as box:
        assert box.header(PICTURE) == images.Header("PNG", 2**62, -(2**62))


def test_what_is_printed_in_a_child_goes_nowhere(obedient: Sandbox, capfd: pytest.CaptureFixture[str]) -> None:
    failure(obedient, "os.write(1, b'printed'); os.write(2, b'printed'); print('printed', flush=True)")
    works(obedient)
    assert obedient.started == 1
    assert "printed" not in "".join(capfd.readouterr())


def test_nothing_piles_up(obedient: Sandbox) -> None:
    works(obedient)
    before, threads = len(os.listdir("/dev/fd")), threading.active_count()
    for _ in range(5):
        assert failure(obedient, "os._exit(1)").reason == "decoder-crashed"
    works(obedient)
    assert len(os.listdir("/dev/fd")) <= before
    assert threading.active_count() == threads
    assert len(obedient._alive) == 1


def test_a_child_that_cannot_start_is_not_the_items_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_CODE", "raise SystemExit(7)")
    with opened() as box:
        for _ in range(3):
            with pytest.raises(Misconfigured, match="exit code 7"):
                box.decode(PICTURE)
        monkeypatch.setattr(sandbox, "_CODE", OBEDIENT)
        works(box)


@LINUX
def test_too_little_memory_to_start_is_said() -> None:
    with opened(memory_bytes=50_000_000) as box, pytest.raises(Misconfigured, match="50000000 bytes of memory"):
        box.decode(PICTURE)


# ---------------------------------------------------------------------------------------- its walls


@LINUX
def test_a_child_knows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "IMAGEMILL_DATABASE_URL", "DATABASE_URL", "HOME", "PYTHONPATH", "HF_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    with opened() as box:
        works(box)
        process = Path("/proc") / str(child_of(box))
        # Children in another user namespace cannot be looked at from here either.
        with contextlib.suppress(PermissionError):
            environment = (process / "environ").read_bytes()
            assert b"hunter2" not in environment
            names = {entry.split(b"=")[0].decode() for entry in environment.split(b"\0") if entry}
            assert names <= {*sandbox._KEPT, *sandbox._FIXED}
        assert b"hunter2" not in (process / "cmdline").read_bytes()


@LINUX
def test_a_child_cannot_open_anything(obedient: Sandbox) -> None:
    assert told(obedient, "sys.flags.isolated") == 1
    assert set(told(obedient, "dict(os.environ)")) <= {*sandbox._KEPT, *sandbox._FIXED, "LC_CTYPE"}
    for attempt in (
        "open('/etc/passwd')",
        "os.open('/tmp/x', os.O_CREAT | os.O_WRONLY)",
        "socket.socket()",
        "os.pipe()",
        "os.dup(0)",
        "os.memfd_create('x')",
        "__import__('subprocess').run(['true'])",
        "open(f'/proc/{os.getppid()}/environ')",
        "__import__('resource').setrlimit(7, (100, 100))",
    ):
        code = f"try: {attempt}\nexcept (OSError, ValueError, ImportError): raise ItemFailed('decode', 'refused', '')"
        assert failure(obedient, code).reason == "refused", attempt
    works(obedient)
    assert obedient.started == 1


@LINUX
def test_a_child_holds_no_descriptor_but_its_pipes(obedient: Sandbox) -> None:
    secret, end = os.pipe()  # as a connection that some library made inheritable
    os.set_inheritable(secret, True)
    code = """
found = []
for fd in range(300):
    try:
        os.fstat(fd)
        found.append(fd)
    except OSError:
        pass
raise ItemFailed("decode", "told", json.dumps(found))
"""
    assert json.loads(failure(obedient, code).message) == [0, 1, 2, 3, 4]
    os.close(secret)
    os.close(end)


@LINUX
def test_limits_are_set(obedient: Sandbox) -> None:
    import resource

    works(obedient)
    pid = child_of(obedient)
    with contextlib.suppress(PermissionError):
        for what, most in (("AS", MEMORY), ("CORE", 0), ("FSIZE", 0), ("NOFILE", 0)):
            assert resource.prlimit(pid, getattr(resource, f"RLIMIT_{what}")) == (most, most)
    status = Path(f"/proc/{pid}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    for name in ("CapEff", "CapPrm", "CapInh"):
        assert f"{name}:\t0000000000000000" in status
    assert "Threads:\t1" in status


@LINUX
@pytest.mark.skipif(
    subprocess.run(["unshare", "-Un", "true"], capture_output=True, check=False).returncode != 0,
    reason="this system lets nobody make user namespaces",
)
def test_a_child_cannot_read_its_parents_memory(obedient: Sandbox) -> None:
    secret = ctypes.create_string_buffer(b"hunter2")
    code = f"""
class Span(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), ("length", ctypes.c_size_t)]
found = ctypes.create_string_buffer(8)
libc = ctypes.CDLL(None, use_errno=True)
here, there = Span(ctypes.addressof(found), 7), Span({ctypes.addressof(secret)}, 7)
got = libc.process_vm_readv({os.getpid()}, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
raise ItemFailed("decode", "told", json.dumps([got, ctypes.get_errno(), found.value.decode()]))
"""
    assert json.loads(failure(obedient, code).message) == [-1, 1, ""]  # EPERM
    ours, its = Path("/proc/self/ns"), Path(f"/proc/{child_of(obedient)}/ns")
    with contextlib.suppress(PermissionError):
        assert os.readlink(its / "net") != os.readlink(ours / "net")


# ---------------------------------------------------------------------------------------- its end


def test_close_ends_every_child(obedient: Sandbox) -> None:
    works(obedient)
    pid = child_of(obedient)
    obedient.close()
    obedient.close()
    assert gone(pid)
    assert failure(obedient, PICTURE).reason == "dropped"


def test_close_while_pictures_are_decoded_and_waited_for(obedient: Sandbox) -> None:
    works(obedient)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(failure, obedient, "time.sleep(1000)") for _ in range(4)]
        time.sleep(0.3)
        began = time.monotonic()
        obedient.close()
        found = [future.result(timeout=30) for future in waiting]
    assert soon(time.monotonic() - began, 2.5)
    assert {(error.reason, error.retry) for error in found} == {("dropped", True)}
    assert not obedient._alive


def test_close_while_a_child_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_CODE", "import time; time.sleep(1000)")
    box = Sandbox(1, LIMITS, MEMORY, 60)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(failure, box, PICTURE)
        while not box._alive:
            time.sleep(0.01)
        box.close()
        assert waiting.result(timeout=30).reason == "dropped"


def test_a_child_outlives_the_thread_that_first_needed_it(obedient: Sandbox) -> None:
    thread = threading.Thread(target=works, args=(obedient,))
    thread.start()
    thread.join()
    pid = child_of(obedient)
    time.sleep(0.3)
    works(obedient)
    assert child_of(obedient) == pid


@LINUX
@pytest.mark.parametrize("busy", [False, True])
def test_a_killed_parent_takes_its_children_along(busy: bool) -> None:
    code = f"""
import threading, time
from workers import images, sandbox
sandbox._CODE = {OBEDIENT!r}
box = sandbox.Sandbox(1, images.Limits(), {MEMORY}, 1000)
box.header({PICTURE!r})
(child,) = box._alive
if {busy}:
    threading.Thread(target=box.decode, args=(b"RUNwhile True: pass",), daemon=True).start()
    time.sleep(0.5)
print(child._process.pid, flush=True)
time.sleep(1000)
"""
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid, patience_s=0)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert gone(pid)


def gone(pid: int, patience_s: float = 10) -> bool:
    """Whether a process ends soon."""
    import psutil

    deadline = time.monotonic() + patience_s
    while True:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
