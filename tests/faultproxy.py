"""A proxy before a real server that does to its bytes what networks and tired servers do: TCP faults and HTTP faults.

`FaultProxy` knows bytes only and fits every server. `HttpFaultProxy` reads requests, so it can answer some of them
with 503, lose an answer after the server has done the work, or cut a body short. Request heads are forwarded as they
came (less `Expect`, which is not signed), so S3 signatures and presigned URLs stay valid when the client signs for the
proxy's address. All faults can be set and healed from the test's thread while connections are open.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self, TypeVar

from tests.services import HOST, free_ports

Direction = Literal["up", "down"]
Action = Literal["slowdown", "error", "lost", "truncate", "reset", "delay"]
T = TypeVar("T")

_CHUNK = 65536
_MAX_HEAD = 1 << 20
_ERRORS = {"slowdown": ("503 Slow Down", "SlowDown"), "error": ("500 Internal Server Error", "InternalError")}
_LINGER_ZERO = struct.pack("ii", 1, 0)


@dataclass
class _Cut:
    """Reset a connection after so many bytes in one direction, for the next `times` connections that get there."""

    after: int
    direction: Direction
    times: int


@dataclass(eq=False)
class _Connection:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter | None = None
    carried: dict[Direction, int] = field(default_factory=lambda: {"up": 0, "down": 0})

    def reset(self) -> None:
        """RST to both sides, in place of the usual FIN."""
        for writer in (self.client, self.server):
            if writer is not None:
                _reset(writer)

    def close(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.close()


class _Reset(Exception):
    """The connection was cut on purpose."""


class FaultProxy:
    """A TCP proxy with faults that can be switched on and off.

    Attributes:
        port: where it listens on 127.0.0.1; the same after refuse() and heal().
        latency: seconds added to each chunk, in each direction.
        rate: bytes a second in each direction of each connection; 0 is unlimited.
        accepted: connections taken so far.
        resets: connections reset by reset_after().
    """

    def __init__(self, port: int, host: str = HOST, *, seed: int = 0) -> None:
        """Args: port, host: of the real server; seed: of every random choice."""
        self.target = (host, port)
        self.port = 0
        self.latency = 0.0
        self.rate = 0.0
        self.accepted = 0
        self.resets = 0
        self._random = random.Random(seed)
        self._cuts: list[_Cut] = []
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._open = asyncio.Event()
        self._open.set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="faultproxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        for _ in range(20):
            (self.port,) = free_ports(1)
            with contextlib.suppress(OSError):
                self._call(self._listen())
                return self
        raise OSError("no free port for the proxy")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._shut_down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def blackhole(self) -> None:
        """Connections are taken and stay open, and nothing passes: a half-open network. Bytes pass after heal()."""
        self._call(_soon(self._open.clear))

    def refuse(self) -> None:
        """New connections are refused; open ones go on. See reset() for those."""
        self._call(self._close_listener())

    def reset(self) -> int:
        """RST every open connection, and say how many there were."""
        return self._call(_soon(self._reset_all))

    def reset_after(self, count: int, direction: Direction = "up", *, times: int = 1) -> None:
        """RST a connection once `count` bytes went "up" to the server or "down" to the client.

        Args:
            times: how many connections this happens to.
        """
        self._cuts.append(_Cut(count, direction, times))

    def heal(self) -> None:
        """End every fault. Open connections go on where they stopped."""
        self.latency = self.rate = 0.0
        self._cuts.clear()
        self._call(self._heal())

    def _call(self, work: Coroutine[object, object, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _heal(self) -> None:
        self._open.set()
        if self._server is None:
            await self._listen()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, HOST, self.port, limit=_MAX_HEAD, reuse_address=True)

    async def _close_listener(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def _shut_down(self) -> None:
        await self._close_listener()
        self._open.set()
        self._reset_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _reset_all(self) -> int:
        count = len(self._connections)
        for connection in self._connections:
            connection.reset()
        return count

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take one connection and see it to its end."""
        connection = _Connection(writer)
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._connections.add(connection)
        self.accepted += 1
        try:
            await self._open.wait()
            await self._serve(reader, connection)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError, _Reset):
            pass
        finally:
            connection.close()
            self._connections.discard(connection)
            self._tasks.discard(task)

    async def _connect(self, connection: _Connection) -> asyncio.StreamReader:
        """Open the server's side. A server that refuses makes the client see a reset."""
        try:
            reader, connection.server = await asyncio.open_connection(*self.target, limit=_MAX_HEAD)
        except OSError:
            connection.reset()
            raise
        return reader

    async def _serve(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        answers = await self._connect(connection)
        assert connection.server is not None
        up = self._pump(reader, connection.server, connection, "up")
        down = self._pump(answers, connection.client, connection, "down")
        pumps = [asyncio.ensure_future(up), asyncio.ensure_future(down)]
        try:
            await asyncio.gather(*pumps)
        finally:
            for pump in pumps:
                pump.cancel()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: _Connection, way: Direction
    ) -> None:
        try:
            while data := await reader.read(_CHUNK):
                await asyncio.sleep(self.latency)
                await self._carry(data, writer, connection, way)
        except ConnectionResetError:
            connection.reset()
            raise
        writer.write_eof()

    async def _carry(self, data: bytes, writer: asyncio.StreamWriter, connection: _Connection, way: Direction) -> None:
        """Write bytes with the faults of the moment: blackhole, cut, rate."""
        while data:
            await self._open.wait()
            size = min(len(data), max(1, int(self.rate / 20))) if self.rate else len(data)
            if self.rate:
                await asyncio.sleep(size / self.rate)
            cut = self._due(connection, way, size)
            if cut is not None:
                writer.write(data[: max(0, cut.after - connection.carried[way])])
                with contextlib.suppress(OSError):
                    await writer.drain()
                cut.times -= 1
                self.resets += 1
                connection.reset()
                raise _Reset
            connection.carried[way] += size
            writer.write(data[:size])
            await writer.drain()
            data = data[size:]

    def _due(self, connection: _Connection, way: Direction, size: int) -> _Cut | None:
        for cut in self._cuts:
            if cut.times > 0 and cut.direction == way and connection.carried[way] + size > cut.after:
                return cut
        return None


@dataclass(eq=False)
class Rule:
    """One HTTP fault and the requests it befalls.

    Attributes:
        action: "slowdown" answers 503 SlowDown and "error" 500 InternalError, both without asking the server; "lost"
            lets the server do the work and closes without an answer; "truncate" sends the answer's head and half its
            body; "reset" sends the server half the request's body, then RST to both; "delay" waits first.
        method: "PUT" and so on; empty for any.
        path: must occur in the path with its query.
        chance: share of the matching requests it befalls.
        times: how many more requests it befalls; None for ever.
        seconds: of "delay".
        hits: how many it befell.
    """

    action: Action
    method: str = ""
    path: str = ""
    chance: float = 1.0
    times: int | None = None
    seconds: float = 1.0
    hits: int = 0

    def matches(self, method: str, path: str) -> bool:
        """Whether it speaks of this request and is not used up."""
        return self.times != 0 and self.method in ("", method) and self.path in path

    def hit(self) -> None:
        """Count one request that it befell."""
        self.hits += 1
        if self.times is not None:
            self.times -= 1


@dataclass(frozen=True)
class Seen:
    """One request that came: what it asked, and which fault befell it ("" for none)."""

    method: str
    path: str
    action: Action | Literal[""]


@dataclass
class _Message:
    """The head of a request or answer."""

    head: bytes
    first: list[str]
    headers: dict[str, str]

    @property
    def chunked(self) -> bool:
        return self.headers.get("transfer-encoding", "").lower().endswith("chunked")

    @property
    def length(self) -> int:
        return int(self.headers.get("content-length", "0"))

    @property
    def closes(self) -> bool:
        return self.headers.get("connection", "").lower() == "close"


class HttpFaultProxy(FaultProxy):
    """A proxy that reads HTTP/1.1 and lets faults befall chosen requests, besides those of FaultProxy.

    `latency` is added once to each request and once to each answer. The first rule that matches and whose chance comes
    up befalls a request.

    Attributes:
        seen: every request that came, in order.
    """

    def __init__(self, port: int, host: str = HOST, *, seed: int = 0) -> None:
        super().__init__(port, host, seed=seed)
        self.rules: list[Rule] = []
        self.seen: list[Seen] = []

    @property
    def url(self) -> str:
        """The endpoint to give to a client instead of the server's."""
        return f"http://{HOST}:{self.port}"

    def add(
        self,
        action: Action,
        method: str = "",
        path: str = "",
        *,
        chance: float = 1.0,
        times: int | None = None,
        seconds: float = 1.0,
    ) -> Rule:
        """Add a fault; see Rule."""
        rule = Rule(action, method, path, chance, times, seconds)
        self.rules.append(rule)
        return rule

    def heal(self) -> None:
        """End every fault, rules included."""
        self.rules.clear()
        super().heal()

    async def _serve(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        answers: asyncio.StreamReader | None = None
        while (request := await _read_head(reader)) is not None:
            await self._open.wait()
            rule = self._choose(request)
            action = rule.action if rule else ""
            self.seen.append(Seen(request.first[0], request.first[1], action))
            await asyncio.sleep(self.latency + (rule.seconds if rule and action == "delay" else 0))
            if "100-continue" in request.headers.get("expect", "").lower():
                connection.client.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if action in ("slowdown", "error"):
                await self._refuse(action, request, reader, connection)
                continue
            answers = answers or await self._connect(connection)
            await self._forward(request, reader, connection, cut=action == "reset")
            keep = await self._answer(request, answers, connection, action)
            if not keep:
                return

    def _choose(self, request: _Message) -> Rule | None:
        method, path = request.first[:2]
        for rule in self.rules:
            if rule.matches(method, path) and self._random.random() < rule.chance:
                rule.hit()
                return rule
        return None

    async def _refuse(
        self, action: str, request: _Message, reader: asyncio.StreamReader, connection: _Connection
    ) -> None:
        """Read the whole request, as S3 does, and answer with an error."""
        async for _ in _body(request, reader):
            pass
        status, code = (
            ("503 Service Unavailable", "SlowDown") if action == "slowdown" else ("500 Error", "InternalError")
        )
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()
        body = b"" if request.first[0] == "HEAD" else text
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(text)}\r\n\r\n"
        connection.client.write(head.encode() + body)
        await connection.client.drain()

    async def _forward(
        self, request: _Message, reader: asyncio.StreamReader, connection: _Connection, cut: bool
    ) -> None:
        server = connection.server
        assert server is not None
        await self._carry(_without_expect(request.head), server, connection, "up")
        sent = 0
        async for data in _body(request, reader):
            if cut and sent + len(data) > request.length // 2:
                break
            await self._carry(data, server, connection, "up")
            sent += len(data)
        if cut:
            connection.reset()
            raise _Reset

    async def _answer(
        self, request: _Message, answers: asyncio.StreamReader, connection: _Connection, action: str
    ) -> bool:
        """Carry the answer back. Returns whether the connection can serve another request."""
        answer = await _read_head(answers)
        while answer is not None and answer.first[1] == "100":
            answer = await _read_head(answers)
        if answer is None:
            return False
        await asyncio.sleep(self.latency)
        if action != "lost":
            await self._carry(answer.head, connection.client, connection, "down")
        left = answer.length // 2 if action == "truncate" else None
        empty = request.first[0] == "HEAD" or answer.first[1] in ("204", "304")
        endless = not empty and not answer.chunked and "content-length" not in answer.headers
        if not empty:
            async for data in _body(answer, answers, endless):
                if action == "lost":
                    continue
                piece = data if left is None else data[:left]
                await self._carry(piece, connection.client, connection, "down")
                left = None if left is None else left - len(piece)
        return action not in ("lost", "truncate") and not (endless or answer.closes or request.closes)


async def _soon(work: Callable[[], T]) -> T:
    return work()


def _reset(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None:
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
    writer.transport.abort()


async def _read_head(reader: asyncio.StreamReader) -> _Message | None:
    """The next head, or None when the other side closed before one."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return _Message(head, first.split(" ", 2), {name.strip().lower(): value.strip() for name, value in pairs})


def _without_expect(head: bytes) -> bytes:
    """The same head without Expect: the proxy has answered that itself, and S3 signatures leave it out."""
    return b"\r\n".join(line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:"))


async def _body(message: _Message, reader: asyncio.StreamReader, endless: bool = False) -> AsyncIterator[bytes]:
    """The raw bytes of a message's body in pieces, chunk sizes included, as they came."""
    if endless:
        while data := await reader.read(_CHUNK):
            yield data
    elif message.chunked:
        async for data in _chunks(reader):
            yield data
    else:
        left = message.length
        while left:
            data = await reader.read(min(_CHUNK, left))
            if not data:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(data)
            yield data


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        if not size:
            break
        yield line + await reader.readexactly(size + 2)
    while (trailer := await reader.readuntil(b"\r\n")) != b"\r\n":
        line += trailer
    yield line + b"\r\n"
