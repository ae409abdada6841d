"""Parquet, one row an item as in the shards' own objects: part-00000.parquet and so on, failures included.

Each part has the provenance in its schema's metadata under `imagemill`, so storage.shardfile reads a part as it reads a
shard. `position` is a row's place in the shard it came from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from storage import results, shardfile
from storage.shardfile import Outcome
from storage.staging import Output

KINDS = frozenset(results.names()) - {"image"}  # whose bytes lie outside of the columns
OPTIONS: Mapping[str, tuple[Any, ...]] = {}

_PART_ROWS = 100_000
_GROUP_ROWS = 2_000  # held in memory, and a row group; divides _PART_ROWS


@contextlib.contextmanager
def writer(
    output: Output, labels: Sequence[str], provenance: Mapping[str, Any], options: Mapping[str, Any]
) -> Iterator[_Writer]:
    """Parts are made in the scratch folder one after the other and put when they are full."""
    writing = _Writer(output, {**provenance, "labels": list(labels)})
    try:
        yield writing
        writing.finish()
    finally:
        writing.close()


class _Writer:
    def __init__(self, output: Output, provenance: Mapping[str, Any]) -> None:
        self._output, self._provenance = output, provenance
        self._waiting: list[Outcome] = []
        self._part: pq.ParquetWriter | None = None
        self._number = self._rows = 0
        self.notes: list[str] = []

    def append(self, outcome: Outcome) -> None:
        self._waiting.append(outcome)
        if len(self._waiting) == _GROUP_ROWS:
            self._flush()
        if self._rows >= _PART_ROWS:
            self._put()

    def finish(self) -> None:
        """Put the last part; without any row there is one part too, so that the schema can be read."""
        if self._waiting or self._number == 0:
            self._flush()
        if self._part is not None:
            self._put()

    def close(self) -> None:
        """Give up a part that was not finished."""
        if self._part is not None:
            with contextlib.suppress(OSError, pa.ArrowException):  # of the same full disk
                self._part.close()

    def _flush(self) -> None:
        table = shardfile.to_table(self._provenance["kind"], self._waiting, self._provenance)
        if self._part is None:
            self._part = pq.ParquetWriter(self._output.scratch / self._name, table.schema, compression="zstd")
        self._part.write_table(table)
        self._rows += len(self._waiting)
        self._waiting = []

    def _put(self) -> None:
        assert self._part is not None
        self._part.close()
        path = self._output.scratch / self._name
        self._output.put_file(self._name, path)
        path.unlink()
        self._part, self._number, self._rows = None, self._number + 1, 0

    @property
    def _name(self) -> str:
        return f"part-{self._number:05d}.parquet"
