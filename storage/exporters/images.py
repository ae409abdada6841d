"""The images that a job made, as files: images/<key>.<format>, and metadata.jsonl with a line for each.

A line has file_name, key, uri (of the image it was made from, if any), width, height, sha256 and what the job knows of
the image: prompt, seed, boxes. Hugging Face's image folders are read in this form. Failures stand in failures.jsonl,
and where everything came from in provenance.json.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from storage.shardfile import Outcome
from storage.staging import Output

KINDS = frozenset({"image"})
OPTIONS: Mapping[str, tuple[Any, ...]] = {}
BLOBS = True  # results come with their bytes

_THREADS = 8


@contextlib.contextmanager
def writer(
    output: Output, labels: Sequence[str], provenance: Mapping[str, Any], options: Mapping[str, Any]
) -> Iterator[_Writer]:
    """Images are put as they come, several at once; the lists at the end."""
    made, failed = output.scratch / "metadata.jsonl", output.scratch / "failures.jsonl"
    with made.open("w") as lines, failed.open("w") as failures, ThreadPoolExecutor(_THREADS) as pool:
        writing = _Writer(output, lines, failures, pool)
        yield writing
        writing.finish()
    for path in (made, failed):
        output.put_file(path.name, path)
    output.put("provenance.json", json.dumps(dict(provenance), indent=1, default=str).encode())


class _Writer:
    def __init__(self, output: Output, lines: IO[str], failures: IO[str], pool: ThreadPoolExecutor) -> None:
        self._output, self._lines, self._failures, self._pool = output, lines, failures, pool
        self._waiting: list[Any] = []
        self.notes: list[str] = []

    def append(self, outcome: Outcome) -> None:
        if outcome.failure is not None:
            told = {"key": outcome.key, **{n: getattr(outcome.failure, n) for n in ("stage", "reason", "message")}}
            self._failures.write(json.dumps(told) + "\n")
            return
        result: Any = outcome.result
        suffix = {"jpeg": "jpg"}.get(result.format, result.format)
        stem = outcome.key if Path(outcome.key).suffix.lstrip(".") != suffix else outcome.key[: -len(suffix) - 1]
        name = f"images/{stem}.{suffix}"
        told = {"key": outcome.key, "uri": outcome.uri, "sha256": result.sha256}
        size = {"width": result.width, "height": result.height}
        self._lines.write(json.dumps({"file_name": name, **told, **size, "meta": dict(result.meta)}) + "\n")
        self._waiting.append(self._pool.submit(self._output.put, name, result.data))
        if len(self._waiting) >= 4 * _THREADS:  # so that no more images wait in memory than are under way
            self._waiting.pop(0).result()

    def finish(self) -> None:
        """Wait for the images that are under way."""
        for put in self._waiting:
            put.result()
