"""What is Parquet's own: the rows of the shards, in parts of even size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from storage import exporters, index, settings, shardfile
from storage.exporters import parquet
from storage.objects import open_store
from tests.storage.exporters.support import LABELS, Mill, mixed, provenance, shards


@pytest.fixture
def mill(tmp_path: Path) -> Iterator[Mill]:
    made = Mill(f"sqlite:///{tmp_path / 'index.db'}", open_store((tmp_path / "results").as_uri()))
    yield made
    made.db.close()


@pytest.mark.parametrize(
    ("part", "group", "parts"), [(100_000, 2_000, [50]), (20, 10, [20, 20, 10]), (25, 5, [25, 25])]
)
def test_equal_to_the_shards_rows(
    mill: Mill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, group: int, parts: list[int]
) -> None:
    monkeypatch.setattr(parquet, "_PART_ROWS", part)
    monkeypatch.setattr(parquet, "_GROUP_ROWS", group)
    job = mill.run(shards(mixed(50), 8))
    folder = tmp_path / "out"
    common = {"job": provenance(job), "settings": settings.load()}
    exporters.export(mill.db, mill.store, job.recipe_id, "parquet", open_store(folder.as_uri()), **common)
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"part-{i:05d}.parquet" for i in range(len(parts))]
    assert [pq.read_metadata(path).num_rows for path in files] == parts
    tables = [
        pq.read_table(pa.BufferReader(mill.store.get(shard.key))) for shard in index.objects(mill.db, job.recipe_id)
    ]
    rows = pa.concat_tables(table.replace_schema_metadata(None) for table in tables)
    assert ds.dataset(folder).to_table().replace_schema_metadata(None).equals(rows)
    assert sum(not ok for ok in rows.column("ok").to_pylist()) == 7


def test_a_part_reads_like_a_shard(mill: Mill, tmp_path: Path) -> None:
    outcomes = mixed(9)
    job = mill.run(shards(outcomes, 9))
    store = open_store((tmp_path / "out").as_uri())
    common = {"job": provenance(job), "settings": settings.load()}
    exporters.export(mill.db, mill.store, job.recipe_id, "parquet", store, **common)
    read, metadata = shardfile.read(store, "part-00000.parquet")
    assert [o.key for o in read] == [o.key for o in outcomes]
    assert [o.failure and o.failure.message for o in read] == [o.failure and o.failure.message for o in outcomes]
    assert metadata["labels"] == list(LABELS)
    assert metadata["weights_sha256"] == "ab" * 32
