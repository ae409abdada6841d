"""Changes imagemill in the processes of one test: Python imports this file by itself when its folder is on PYTHONPATH.

INJECT names the changes, with commas between. So the product holds no switch that takes a safety off, and no poison.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.abc
import importlib.util
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def no_fence(statements: Any) -> None:
    """A worker that lost its lease may write all the same."""
    from sqlalchemy import and_, bindparam

    shard = statements.shard
    anyone = and_(shard.c.fence >= 0 * bindparam("the_fence"), bindparam("me") != "")
    statements.ours = lambda: and_(shard.c.id == bindparam("the_shard"), anyone)


def same_prefix(shardfile: Any) -> None:
    """All attempts at a shard write to one key: jobs/<job>/<shard>/a0/."""
    write = shardfile.write

    def write_there(store: Any, prefix: str, *rest: Any) -> Any:
        return write(store, "/".join([*prefix.split("/")[:3], "a0", ""]), *rest)

    shardfile.write = write_there


def no_refill(reconcile: Any) -> None:
    """Tickets that are lost stay lost."""
    reconcile.refill = lambda *args, **options: 0


def hidden(processes: Any) -> None:
    """No process can be seen from another: each seems to be on a machine of its own."""
    name = f"elsewhere-{uuid.uuid4().hex}"
    processes.host = lambda: name


def no_backoff(states: Any) -> None:
    """Crashed shards are ready again at once."""
    states.backoff_s = lambda *args, **options: 0.0


def ledger(stub: Any) -> None:
    """Write down how many pictures each batch has computed: a line a batch in the file INJECT_LEDGER."""
    infer = stub.Stub.infer

    def noted(self: Any, batch: Sequence[Any]) -> Any:
        answers = infer(self, batch)
        with open(os.environ["INJECT_LEDGER"], "a", encoding="ascii") as file:
            file.write(f"{os.getpid()} {time.time()} {len(batch)}\n")
        return answers

    stub.Stub.infer = noted


def count_encodes(promptable: Any) -> None:
    """Write down how many images each batch has encoded: a line a batch in the file INJECT_LEDGER."""
    infer = promptable.Segmenter.infer

    def noted(self: Any, batch: Sequence[Any]) -> Any:
        before = self.encoded
        answers = infer(self, batch)
        with open(os.environ["INJECT_LEDGER"], "a", encoding="ascii") as file:
            file.write(f"{os.getpid()} {time.time()} {self.encoded - before}\n")
        return answers

    promptable.Segmenter.infer = noted


def poison(stub: Any) -> None:
    """Pictures that hurt, by a word in their names; `_SUFFERING` says how."""
    prepare, infer = stub.Stub.prepare, stub.Stub.infer
    words: dict[int, str] = {}

    def poisoned_prepare(self: Any, image: Any, item: Any) -> Any:
        if "abort" in item.key:
            os.abort()
        prepared = prepare(self, image, item)
        for word in _SUFFERING:
            if word in item.key:
                words[prepared.data] = word
        return prepared

    def poisoned_infer(self: Any, batch: Sequence[Any]) -> Any:
        for item in batch:
            if item.data in words and not _over(words[item.data]):
                _SUFFERING[words[item.data]]()
        return infer(self, batch)

    stub.Stub.prepare, stub.Stub.infer = poisoned_prepare, poisoned_infer


def _over(word: str) -> bool:
    """Whether this was to happen once, and has: the mark of a word is the file named by INJECT_ONCE and the word."""
    mark = os.environ.get("INJECT_ONCE")
    if not mark:
        return False
    try:
        os.close(os.open(f"{mark}.{word}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return True
    return False


def _no_memory() -> None:
    raise MemoryError("pretended")


_SUFFERING: dict[str, Callable[[], Any]] = {
    "kill": lambda: os.kill(os.getpid(), 9),  # as the kernel does when memory is exhausted
    "hang": lambda: time.sleep(3600),
    "seize": lambda: ctypes.PyDLL(None).sleep(3600),  # hangs and keeps the interpreter's lock: no thread runs any more
    "memory": _no_memory,
}

_CHANGES: dict[str, tuple[str, Callable[[Any], None]]] = {
    "no-fence": ("jobs.statements", no_fence),
    "same-prefix": ("storage.shardfile", same_prefix),
    "no-refill": ("jobs.reconcile", no_refill),
    "hidden": ("jobs.processes", hidden),
    "no-backoff": ("jobs.states", no_backoff),
    "ledger": ("workers.models.stub", ledger),
    "count-encodes": ("workers.promptable", count_encodes),
    "poison": ("workers.models.stub", poison),
}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the others find a module, and changes it once it has run."""

    def __init__(self, changes: list[tuple[str, Callable[[Any], None]]]) -> None:
        self.changes = changes
        self.looking: set[str] = set()

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        changes = [change for module, change in self.changes if module == name]
        if not changes or name in self.looking:
            return None
        self.looking.add(name)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking.discard(name)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_change(module: ModuleType) -> None:
            run(module)
            for change in changes:
                change(module)

        spec.loader.exec_module = run_and_change  # type: ignore[method-assign]
        return spec


if os.environ.get("INJECT"):
    faulthandler.register(signal.SIGUSR1)  # a test may ask where each thread is
    sys.meta_path.insert(0, _Finder([_CHANGES[name] for name in os.environ["INJECT"].split(",")]))
