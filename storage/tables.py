"""The SQL tables. What a state means is not known here; jobs/states.py knows.

recipe 1--n job 1--n shard 1--n item 1--n item_label;  job 1--n choice;  worker, tuning and event stand beside.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import BigInteger, Boolean, Column, Float, ForeignKey, Index, Integer, Text, UniqueConstraint

# Fixed names, so that a migration can say which constraint it means on either database.
metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

Id = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself only in a column called INTEGER
Seconds = Float(53)  # since the epoch, by the database's clock
Json = sa.JSON(none_as_null=True)
Key = Text().with_variant(Text(collation="C"), "postgresql")  # sorted by bytes, as SQLite and S3 do

# An item's id is made of its shard's id and its position in it, so ids are known before the insert and one (shard,
# position) can have one row only.
POSITION_BITS = 16
MAX_SHARD_ITEMS = 1 << POSITION_BITS

recipe = sa.Table(
    "recipe",
    metadata,
    Column("id", Id, primary_key=True),
    Column("digest", Text, nullable=False, unique=True),
    Column("dataset", Text, nullable=False),
    Column("kind", Text, nullable=False),
    Column("created_at", Seconds, nullable=False),
)

job = sa.Table(
    "job",
    metadata,
    Column("id", Id, primary_key=True),
    Column("recipe_id", ForeignKey("recipe.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("spec", Json, nullable=False),
    Column("state", Text, nullable=False),
    Column("reason", Text, nullable=False, server_default=""),
    Column("paused", Boolean, nullable=False, server_default=sa.false()),
    Column("cancelled", Boolean, nullable=False, server_default=sa.false()),
    Column("priority", Integer, nullable=False, server_default="0"),
    Column("force", Boolean, nullable=False, server_default=sa.false()),
    Column("only", Text, nullable=False, server_default=""),  # "" the dataset; "failures", "retry": rows of the recipe
    Column("max_failures", Float, nullable=False, server_default="1"),  # share of items; above it the job is paused
    Column("queue", Text, nullable=False),
    Column("model_key", Text, nullable=False),
    Column("client_token", Text, unique=True),
    Column("planner", Text),  # nonce of the process that plans it
    Column("planner_beat_at", Seconds),
    Column("planned", BigInteger, nullable=False, server_default="0"),
    Column("fresh", BigInteger, nullable=False, server_default="0"),
    Column("duplicates", BigInteger, nullable=False, server_default="0"),
    Column("pruned", BigInteger, nullable=False, server_default="0"),
    Column("created_at", Seconds, nullable=False),
    Column("started_at", Seconds),
    Column("finished_at", Seconds),
    # One job at a time brings a recipe up to date; a second submit joins it.
    Index(
        "uq_job_active_recipe",
        "recipe_id",
        unique=True,
        sqlite_where=sa.text("finished_at IS NULL"),
        postgresql_where=sa.text("finished_at IS NULL"),
    ),
)

shard = sa.Table(
    "shard",
    metadata,
    Column("id", Id, primary_key=True),
    Column("job_id", ForeignKey("job.id"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("state", Text, nullable=False),
    Column("fence", BigInteger, nullable=False, server_default="0"),
    Column("worker_id", Text),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("errors", Integer, nullable=False, server_default="0"),
    Column("crashes", Integer, nullable=False, server_default="0"),
    Column("crash_workers", Json),
    Column("not_before", Seconds, nullable=False, server_default="0"),
    Column("checkpoint", Json),
    Column("message", Text, nullable=False, server_default=""),
    Column("size", Integer, nullable=False),  # items
    Column("replaces", Integer, nullable=False),  # how many of them have an older row to supersede
    Column("manifest_key", Text, nullable=False),
    Column("result_key", Text),
    Column("result_sha256", Text),
    Column("result_bytes", BigInteger),
    Column("results", Integer, nullable=False, server_default="0"),
    Column("failures", Integer, nullable=False, server_default="0"),
    Column("collected", Integer, nullable=False, server_default="0"),  # rows that the collector has removed since
    Column("device_s", Float, nullable=False, server_default="0"),
    Column("seconds", Json),  # stage -> seconds that the committed attempt spent in it
    Column("claimed_at", Seconds),
    Column("finished_at", Seconds),
    UniqueConstraint("job_id", "number"),
    Index(
        "ix_shard_ready",
        "job_id",
        "id",
        sqlite_where=sa.text("state = 'ready'"),
        postgresql_where=sa.text("state = 'ready'"),
    ),
    Index(
        "ix_shard_leased",
        "worker_id",
        "job_id",
        sqlite_where=sa.text("state = 'leased'"),
        postgresql_where=sa.text("state = 'leased'"),
    ),
    # Room in each page for the update from ready to leased to done, and statistics that keep up with it.
    postgresql_with={"fillfactor": "70", "autovacuum_vacuum_scale_factor": "0.01"},
)

worker = sa.Table(
    "worker",
    metadata,
    Column("id", Text, primary_key=True),  # one incarnation of a process, never reused
    Column("name", Text, nullable=False),
    Column("host", Text, nullable=False),  # where its pid means something: boot and pid namespace
    Column("device", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("version", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("desired", Text, nullable=False),
    Column("model", Text, nullable=False, server_default=""),
    Column("doing", Text, nullable=False, server_default=""),  # for people, while no item gets done
    Column("progress", Json, nullable=False),
    Column("done_items", BigInteger, nullable=False, server_default="0"),
    Column("rate", Float, nullable=False, server_default="0"),
    Column("failed_in_a_row", Integer, nullable=False, server_default="0"),
    Column("started_at", Seconds, nullable=False),
    Column("heartbeat_at", Seconds, nullable=False),
    # No index on what a beat changes, and room in the page: every beat is then a heap-only update.
    postgresql_with={"fillfactor": "50"},
)

item = sa.Table(
    "item",
    metadata,
    Column("id", BigInteger, primary_key=True, autoincrement=False),
    Column("recipe_id", ForeignKey("recipe.id"), nullable=False),
    Column("key", Key, nullable=False),
    Column("job_id", ForeignKey("job.id"), nullable=False),
    Column("shard_id", ForeignKey("shard.id"), nullable=False),
    Column("fence", BigInteger, nullable=False),
    Column("uri", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("current", Boolean, nullable=False),  # False once a later job has a row for the same key
    Column("pruned_at", Seconds),
    Column("ok", Boolean, nullable=False),
    Column("width", Integer),
    Column("height", Integer),
    Column("objects", Integer),
    Column("top_score", Float),
    Column("stage", Text),
    Column("reason", Text),
    Column("message", Text),
    Column("retry", Boolean),
    UniqueConstraint("recipe_id", "key", "job_id"),
    Index("ix_item_job_id_ok", "job_id", "ok"),
)

item_label = sa.Table(
    "item_label",
    metadata,
    Column("item_id", BigInteger, primary_key=True, autoincrement=False),
    Column("label", Text, primary_key=True),
    Column("recipe_id", BigInteger, nullable=False),
    Column("objects", Integer, nullable=False),
    Column("top_score", Float, nullable=False),
    # A shard's ids come in order, so its rows fall into one place for each label: by score, each would go to a page
    # of its own, which takes twice as long. The score stands in it so that a search for both reads nothing else.
    Index("ix_item_label_recipe_id_label", "recipe_id", "label", "item_id", "top_score"),
    sqlite_with_rowid=False,  # the primary key is the table: one tree less to write to
)

# How a model is run on a kind of device: decided once for a job, and what was measured, for all jobs.
choice = sa.Table(
    "choice",
    metadata,
    Column("job_id", ForeignKey("job.id"), primary_key=True),
    Column("device", Text, primary_key=True),  # its kind: two like it share a choice
    Column("value", Json, nullable=False),
)

tuning = sa.Table(
    "tuning",
    metadata,
    Column("id", Text, primary_key=True),  # sha256 of `about`
    Column("about", Json, nullable=False),  # model, device, versions
    Column("value", Json, nullable=False),
    Column("measured", Json, nullable=False),  # every candidate with its rate and agreement
    Column("at", Seconds, nullable=False),
)

event = sa.Table(
    "event",
    metadata,
    Column("id", Id, primary_key=True),
    Column("at", Seconds, nullable=False),
    Column("action", Text, nullable=False),
    Column("job_id", BigInteger),
    Column("shard_id", BigInteger),
    Column("fence", BigInteger),
    Column("worker_id", Text),
    Column("detail", Text, nullable=False, server_default=""),
    Index("ix_event_job_id", "job_id"),
)


def item_id(shard_id: int, position: int) -> int:
    """The id of the item at a position (from 0) of a shard."""
    if not 0 <= position < MAX_SHARD_ITEMS:
        raise ValueError(f"expected a position in 0..{MAX_SHARD_ITEMS - 1}, but got {position}")
    return (shard_id << POSITION_BITS) | position
