"""Decodes hostile pictures in child processes, so that what takes over or kills a decoder costs one item, not a worker.

A child is a plain Python process whose environment holds a path, a language and nothing else. Before it sees the first
hostile byte it gives up, for good,

    what                          how                                                 where
    ----------------------------  --------------------------------------------------  ----------------------------------
    files, sockets, pipes         no new descriptor (RLIMIT_NOFILE 0); those it was   everywhere
                                  started with are closed, but for its two pipes
    memory                        RLIMIT_AS: too little is an error of one picture    Linux
    traces on disk                RLIMIT_CORE 0, RLIMIT_FSIZE 0                       everywhere
    life without its parent       end of file on its pipe; PR_SET_PDEATHSIG           everywhere; Linux
    new rights                    no_new_privs, no capabilities                       Linux
    its parent's memory and       a user and a network namespace                      Linux, where anybody may make them
      environment, the network

It may still send signals as its user. Children are used again, so one that was taken over could lie about the pictures
after it; nothing it says about sizes and lengths is believed.

Pixels come back through a pipe. That takes 0.3 ms for 1.8 MB, which take 2 ms to decode; a memfd would take 0.1 ms, but
needs seals against a child that shrinks the memory under its reader, and somebody to empty it after a large picture.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import io
import json
import logging
import os
import queue
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from jobs import processes
from storage.errors import ItemFailed, Misconfigured
from workers import images
from workers.images import Decoded, Header, Limits

log = logging.getLogger("imagemill.sandbox")

_REQUEST = struct.Struct("<cQ")  # what to do, how many bytes follow
_ANSWER = struct.Struct("<cqqQ")  # what it is, width, height, how many bytes follow
_DECODE, _HEADER = b"D", b"H"
_READY, _PIXELS, _SIZE, _FAILED = b"R", b"P", b"S", b"F"
_MAX_TEXT = 16_384  # bytes of a failure or of a format's name
_REASON = re.compile(r"[a-z][a-z-]{1,39}")
_START_S = 120  # for Python and its libraries to load on a busy machine
_PIPE_BYTES = 1 << 20
_SPARE_BYTES = 32 << 20
_KEPT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_FIXED = {
    # One thread: more would each take address space, and a process with threads cannot make a user namespace.
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    # Keep freed memory for the next picture: to get it anew takes as long as to decode a small one.
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(64 << 20),
}
_FORMATS = frozenset(name.encode() for name in images.FORMATS)
_PR_SET_NO_NEW_PRIVS, _CAPABILITY_VERSION_3 = 38, 0x20080522
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CODE = "from workers.sandbox import serve; serve()"


class _Died(Exception):
    """The child ended, or said what no honest child says. `outside`: somebody killed it, as a system out of memory."""

    def __init__(self, how: str, *, outside: bool = False) -> None:
        super().__init__(how)
        self.outside = outside


class _Late(Exception):
    """The child did not answer in time."""


@dataclass(frozen=True, slots=True)
class _Answer:
    width: int
    height: int
    body: npt.NDArray[np.uint8]


class Sandbox:
    """Decoders in child processes. Safe to call from many threads, each of which borrows a child for one picture.

    Args:
        processes: children at most; each is started when it is first needed.
        limits: of a picture, as for images.decode.
        memory_bytes: address space of a child. Python and the libraries take about 300 MB of it, a picture 6 to 15
            bytes a pixel, as WEBP 22: Pillow holds 4 bytes a pixel, and copies.
        timeout_s: for one picture, from the moment a child has it; waiting for a free child does not count.
    """

    decoder = "host"  # as workers.images.Here

    def __init__(self, processes: int, limits: Limits, memory_bytes: int, timeout_s: float) -> None:
        self._limits, self._memory_bytes, self._timeout_s = limits, memory_bytes, timeout_s
        self._processes = max(1, processes)
        self._free: queue.LifoQueue[_Child | None] = queue.LifoQueue()  # the last used first: its caches are warm
        for _ in range(self._processes):
            self._free.put(None)
        # Linux ties the life of a child to the thread that made it, so they are all made by one that stays.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="sandbox")
        self._lock = threading.Lock()
        self._alive: set[_Child] = set()
        self._closed = False
        self.started = 0  # children so far; more than `processes` tells that some were replaced

    def decode(self, data: bytes, known: Header | None = None) -> Decoded:
        """The picture in the bytes.

        Args:
            known: not used, since a child trusts nothing but the bytes.

        Raises:
            ItemFailed: as images.decode does, and with the reasons decoder-crashed and timeout.
            Misconfigured: no child can be started.
        """
        answer = self._ask(_DECODE, data)
        return Decoded(answer.body.reshape(answer.height, answer.width, 3), answer.width, answer.height)

    def header(self, data: bytes) -> Header:
        """As images.header says, since to read a header is to parse. Raises as `decode`."""
        answer = self._ask(_HEADER, data)
        return Header(answer.body.tobytes().decode(), answer.width, answer.height)

    def close(self) -> None:
        """End every child, busy or not. A picture that is being decoded fails with the reason dropped."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for child in self._alive:
                child.kill()
        for kept in [self._free.get() for _ in range(self._processes)]:  # whoever is busy gives back soon now
            if kept is not None:
                self._end(kept)
            self._free.put(None)
        self._starter.shutdown(wait=False)

    def _ask(self, what: bytes, data: bytes) -> _Answer:
        if len(data) > self._limits.max_bytes:
            images.decode(data, self._limits)  # says so before it looks at them
        child, kept = self._free.get(), None
        try:
            if child is None:
                child = self._replaced(None)
            try:
                answer = child.ask(what, data, self._limits, self._timeout_s)
            except _Died:
                if child.asked == 1:
                    raise
                # It may have been killed meanwhile, or damaged by an earlier picture: only what ends a child that saw
                # nothing else is to blame.
                child = self._replaced(child)
                answer = child.ask(what, data, self._limits, self._timeout_s)
            kept = child
        except (_Died, _Late, MemoryError) as error:
            raise self._failure(error) from error
        finally:
            if child is not None and kept is None:
                self._end(child)  # part of an answer may be under way, and nobody could tell it from the next
            self._free.put(kept)
        if isinstance(answer, ItemFailed):
            raise answer
        return answer

    def _failure(self, error: _Died | _Late | MemoryError) -> ItemFailed:
        """What becomes of the item, after what happened to the child."""
        if self._closed:
            return ItemFailed("decode", "dropped", "the decoders were stopped", retry=True)
        if isinstance(error, _Died):
            log.warning("a decoding process died and is replaced: %s", error)
            message = f"the decoder died of this picture: {error}"
            return ItemFailed("decode", "decoder-crashed", message, retry=error.outside)
        if isinstance(error, _Late):
            log.warning("a decoding process took too long and is replaced")
            message = f"decoding took longer than {self._timeout_s:g} s"
            return ItemFailed("decode", "timeout", message, retry=True)
        return ItemFailed("decode", "too-many-pixels", "no memory for the decoded picture", retry=True)

    def _replaced(self, child: _Child | None) -> _Child:
        """A new child, ready, in the place of this one."""
        if child is not None:
            self._end(child)
        with self._lock:
            if self._closed:
                raise _Died("closed")
            launched = self._starter.submit(self._launch)
        try:
            child = launched.result()
        except OSError as error:
            raise Misconfigured(f"a decoding process cannot be started: {error}") from error
        try:
            child.wait_ready(_START_S)
        except (_Died, _Late) as error:
            self._end(child)
            if self._closed:
                raise
            how = str(error) or f"not ready after {_START_S} s"
            raise Misconfigured(
                f"a decoding process did not start ({how}): look at what it wrote to stderr, and whether it needs more "
                f"than {self._memory_bytes} bytes of memory"
            ) from error
        except BaseException:
            self._end(child)
            raise
        return child

    def _launch(self) -> _Child:
        with self._lock:
            if self._closed:
                raise _Died("closed")
            child = _Child(self._limits, self._memory_bytes)
            self._alive.add(child)
            self.started += 1
        return child

    def _end(self, child: _Child) -> None:
        child.end()
        with self._lock:
            self._alive.discard(child)


class _Child:
    """One decoding process, seen from outside. One thread at a time uses it."""

    def __init__(self, limits: Limits, memory_bytes: int) -> None:
        numbers = (os.getpid(), memory_bytes, limits.max_bytes, limits.max_pixels)
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CODE, *map(str, numbers)],
            env={**kept, **_FIXED},
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        for fd in (self._to, self._from):
            os.set_blocking(fd, False)
            with contextlib.suppress(OSError, AttributeError):  # a wish: fewer switches between the processes
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        self.asked = 0

    def wait_ready(self, timeout_s: float) -> None:
        """Wait until it has loaded its libraries and locked itself in."""
        word = np.empty(1, np.uint8)
        self._receive(word.data, time.monotonic() + timeout_s)
        if word.tobytes() != _READY:
            raise _Died("it did not say that it is ready")

    def ask(self, what: bytes, data: bytes, limits: Limits, timeout_s: float) -> _Answer | ItemFailed:
        """Its answer, checked. After any exception it has to be ended."""
        self.asked += 1
        deadline = time.monotonic() + timeout_s
        self._send(memoryview(_REQUEST.pack(what, len(data))), deadline)
        self._send(memoryview(data), deadline)
        head = bytearray(_ANSWER.size)
        self._receive(memoryview(head), deadline)
        kind, width, height, nbytes = _ANSWER.unpack(head)
        if not _honest(what, kind, width, height, nbytes, limits):
            raise _Died(f"it answered {kind!r} with {width} x {height} pixels and {nbytes} bytes")
        body = np.empty(nbytes, np.uint8)
        self._receive(body.data, deadline)
        if kind == _FAILED:
            return _told(body.tobytes())
        if kind == _SIZE and body.tobytes() not in _FORMATS:
            raise _Died("it named a format that does not exist")
        return _Answer(width, height, body)

    def kill(self) -> None:
        """Make it end; whoever waits for its answer hears of it. Any thread may do this."""
        self._process.kill()

    def end(self) -> None:
        """Kill it and close its pipes. Only for the thread that uses it: another would poll a number used anew."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def _send(self, rest: memoryview, deadline: float) -> None:
        while rest:
            _wait(self._to, select.POLLOUT, deadline)
            try:
                rest = rest[os.write(self._to, rest) :]
            except BrokenPipeError:
                raise self._died() from None

    def _receive(self, rest: memoryview, deadline: float) -> None:
        while rest:
            _wait(self._from, select.POLLIN, deadline)
            got = os.readv(self._from, [rest])
            if not got:
                raise self._died()
            rest = rest[got:]

    def _died(self) -> _Died:
        """How it ended, its pipe being closed."""
        try:
            code = self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            return _Died("it closed its pipe")
        if code >= 0:
            return _Died(f"exit code {code}")
        with contextlib.suppress(ValueError):
            return _Died(signal.Signals(-code).name, outside=-code == signal.SIGKILL)
        return _Died(f"signal {-code}")


def _wait(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise _Late


def _honest(what: bytes, kind: bytes, width: int, height: int, nbytes: int, limits: Limits) -> bool:
    """Whether an answer may be received, by its head."""
    if kind == _PIXELS and what == _DECODE:
        return min(width, height) > 0 and width * height <= limits.max_pixels and nbytes == width * height * 3
    return nbytes <= _MAX_TEXT and (kind == _FAILED or (kind == _SIZE and what == _HEADER))


def _told(text: bytes) -> ItemFailed:
    """The failure a child tells of."""
    try:
        reason, message, retry = json.loads(text)
        if not isinstance(message, str) or not isinstance(retry, bool) or not _REASON.fullmatch(reason):
            raise ValueError("not a reason, a message and a flag")
    except (ValueError, TypeError, RecursionError):
        raise _Died("it gave a reason that cannot be read") from None
    return ItemFailed("decode", reason, message, retry=retry)


# -------------------------------------------------------------------------------------- from here on: inside the child


def serve() -> None:
    """The child's whole life: lock itself in, then answer until its pipe ends."""
    parent, memory_bytes, *rest = map(int, sys.argv[1:])
    limits = Limits(*rest)
    processes.end_with_parent(signal.SIGKILL, parent)  # even in the middle of a picture
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    _warm_up()
    _cut_off()
    _silence()
    _limit(memory_bytes)
    bytearray(_SPARE_BYTES)  # with less than this, every picture would fail, and none would be to blame
    answers.write(_READY)
    answers.flush()
    while head := questions.read(_REQUEST.size):
        what, nbytes = _REQUEST.unpack(head)
        _answer(what, questions, nbytes, limits, answers)


def _answer(what: bytes, questions: BinaryIO, nbytes: int, limits: Limits, answers: BinaryIO) -> None:
    """Read one question and write its answer."""
    try:
        data = _read(questions, nbytes)
        if what == _DECODE:
            picture = images.decode(data, limits)
            head = _ANSWER.pack(_PIXELS, picture.width, picture.height, picture.pixels.nbytes)
            body = picture.pixels.data.cast("B")
        else:
            found = images.header(data)
            head = _ANSWER.pack(_SIZE, _bounded(found.width), _bounded(found.height), len(found.format))
            body = memoryview(found.format.encode())
    except ItemFailed as error:
        text = json.dumps([error.reason, error.message, error.retry]).encode()
        head, body = _ANSWER.pack(_FAILED, 0, 0, len(text)), memoryview(text)
    except MemoryError:
        text = json.dumps(["too-many-pixels", "no memory for the bytes of this file", True]).encode()
        head, body = _ANSWER.pack(_FAILED, 0, 0, len(text)), memoryview(text)
    answers.write(head)
    answers.write(body)
    answers.flush()


def _read(questions: BinaryIO, nbytes: int) -> bytes:
    try:
        return questions.read(nbytes)
    except MemoryError:
        # Read past them, so that the next question is found.
        while nbytes and (got := len(questions.read(min(nbytes, 1 << 16)))):
            nbytes -= got
        raise


def _bounded(number: int) -> int:
    """A header may claim any number; this one fits 64 bits."""
    return max(-(2**62), min(2**62, number))


def _warm_up() -> None:
    """Load every decoder by using it: later no file can be opened."""
    from PIL import AvifImagePlugin, Image

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # there are as many children as there should be threads
    for name in images.FORMATS:
        data = io.BytesIO()
        with contextlib.suppress(KeyError, OSError, ItemFailed):  # a format that this Pillow lacks
            Image.new("RGB", (8, 8)).save(data, name)
            images.decode(data.getvalue(), Limits())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its children


def _silence() -> None:
    """What C libraries print goes nowhere, and never among the answers."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(nowhere, fd)
    os.close(nowhere)


def _limit(memory_bytes: int) -> None:
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        if sys.platform == "linux" or what != resource.RLIMIT_AS:
            resource.setrlimit(what, (most, most))


def _cut_off() -> None:
    """Give up all rights, and the parent's namespaces if the system lets us."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # Another user namespace is what stops a child from reading the memory and the environment of its parent.
    libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # The maker of a namespace has every right in it, which is more of the kernel than a decoder should reach.
    libc.capset((ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)())
