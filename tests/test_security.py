"""What a stranger may send, name or read: messages, lists, links, checkpoints, secrets, SQL, sockets (security.md)."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import pickle
import re
import stat
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy as sa

from jobs import leases, lifecycle, queue
from storage import tables
from storage.errors import BadInput
from storage.settings import Settings
from tests import flow
from tests.flow import background, check_all, committed, pictures, run, run_json, wait_until, workers
from tests.invariants import rows
from tests.services import SCRIPTS, Postgres, SeaweedFS, Valkey
from tests.support import claimed, new_worker, opened, outcome, planned_job, result, spec, written
from workers.logs import MaskingFormatter, masked

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("jobs", "workers", "storage")
Stack = dict[str, str]


def laptop(**more: str) -> Stack:
    return {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}", **more}


def annotate(source: Path, *more: str) -> tuple[str, ...]:
    return ("annotate", str(source), "--model", "stub", "--shard-size", "16", "--device", "cpu", *more)


def sources() -> Iterator[tuple[Path, str]]:
    """Every line of code that is shipped."""
    for path in [ROOT / "cli.py", *(path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py")))]:
        yield path, path.read_text()


# ------------------------------------------------------------------------------------------------ messages


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def envelope(body: bytes, content_type: str, encoding: str, task: str) -> str:
    """A message as kombu lays it into Redis."""
    properties = {"delivery_mode": 2, "delivery_info": {"exchange": "", "routing_key": "cpu"}, "priority": 0}
    properties |= {"body_encoding": "base64", "delivery_tag": os.urandom(8).hex()}
    headers = {"id": os.urandom(8).hex(), "task": task, "lang": "py", "root_id": None, "parent_id": None}
    message = {"body": base64.b64encode(body).decode(), "content-encoding": encoding, "content-type": content_type}
    return json.dumps({**message, "headers": headers, "properties": properties})


def test_only_json_is_accepted_and_hostile_messages_do_nothing(
    home: Path, postgres_url: str, broker_url: str, tmp_path: Path
) -> None:
    import redis

    keys = pictures(tmp_path / "images", 32)
    mark, log = tmp_path / "it-ran", tmp_path / "worker.log"
    urls = {"IMAGEMILL_DATABASE_URL": postgres_url, "IMAGEMILL_BROKER_URL": broker_url}
    stack = laptop(**urls, IMAGEMILL_STORE_URL=(home / "store").as_uri(), IMAGEMILL_RECONCILE_SECONDS="0.5")
    bomb = pickle.dumps(([Bomb(mark)], {}, {}))
    os_system = json.dumps([[f"touch {mark}"], {}, {}]).encode()
    other_queue = json.dumps([["../../etc"], {}, {}]).encode()
    hostile = [
        envelope(bomb, "application/x-python-serialize", "binary", queue.TASK),
        envelope(bomb, "application/json", "binary", queue.TASK),
        envelope(os_system, "application/json", "utf-8", "os.system"),
        envelope(other_queue, "application/json", "utf-8", queue.TASK),
        envelope(b"[[1, 2, 3], {}, {}]", "application/json", "utf-8", queue.TASK),
    ]
    run(stack, "db", "upgrade")
    with redis.Redis.from_url(broker_url) as client, workers(stack, log=log):
        client.lpush("imagemill:cpu", *hostile)
        wait_until(lambda: not client.llen("imagemill:cpu"), "the messages to be taken")
        done = run_json(stack, *annotate(tmp_path / "images"))
    assert (done["state"], done["results"]) == ("done", 32)
    assert not mark.exists()
    assert "Traceback" not in run(stack, "status").stderr
    check_all(stack, keys)


def test_a_message_holds_nothing_but_the_name_of_a_queue(broker_url: str) -> None:
    import redis

    queue.publish(Settings(broker_url=broker_url), "cpu", 1)
    with redis.Redis.from_url(broker_url) as client:
        message = json.loads(client.lrange("imagemill:cpu", 0, 0)[0])
    assert message["content-type"] == "application/json"
    assert json.loads(base64.b64decode(message["body"]))[:2] == [["cpu"], {}]
    assert (message["headers"]["argsrepr"], message["headers"]["kwargsrepr"]) == ("-", "-")


def test_celery_takes_json_only_and_keeps_no_results(broker_url: str) -> None:
    conf = queue.app(Settings(broker_url=broker_url)).conf
    assert list(conf.accept_content) == ["json"]
    assert (conf.task_serializer, conf.event_serializer, conf.result_backend) == ("json", "json", None)
    assert conf.task_ignore_result
    assert not conf.worker_enable_remote_control
    assert not conf.task_create_missing_queues


# ------------------------------------------------------------------------------------------------ what a list may name


def test_a_manifest_reads_nothing_outside_its_roots(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    pictures(folder, 2)
    pictures(tmp_path / "private", 1)
    secret = tmp_path / "private" / "0" / "picture-00000.jpg"
    (folder / "link.jpg").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path / "private")
    for number, entry in enumerate(
        (
            "../../etc/passwd",
            "0/../../private/0/picture-00000.jpg",
            "/etc/passwd",
            str(secret),
            "file:///etc/passwd",
            "FILE:///etc/passwd",
            "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
            "https://[fd00:ec2::254]/latest/meta-data",
            "gopher://127.0.0.1:6379/_FLUSHALL",
            "link.jpg",
            "linked/0/picture-00000.jpg",
            "s3://user:password@bucket/key",
            "a\0b.jpg",
        )
    ):
        suffix, text = (("txt", entry), ("jsonl", json.dumps({"uri": entry})))[number % 2]
        manifest = folder / f"list-{number}.{suffix}"
        manifest.write_text(text + "\n")
        done = run(laptop(), *annotate(manifest, "--quiet"), code=2)
        assert done.stderr.count("\n") == 1, done.stderr
        assert "password@" not in done.stderr
    assert rows(f"sqlite:///{home}/imagemill.db", "SELECT * FROM job") == []


def test_a_link_out_of_a_folder_is_a_row_that_nobody_read(home: Path, tmp_path: Path) -> None:
    keys = pictures(tmp_path / "data", 3)
    pictures(tmp_path / "private", 1)
    (tmp_path / "data" / "link.jpg").symlink_to(tmp_path / "private" / "0" / "picture-00000.jpg")
    (tmp_path / "data" / "folder").symlink_to(tmp_path / "private")
    done = run_json(laptop(), *annotate(tmp_path / "data", "--max-failures", "1"))
    assert (done["results"], done["failures"]) == (3, 1)
    found = rows(f"sqlite:///{home}/imagemill.db", "SELECT key, stage, reason FROM item WHERE NOT ok")
    assert [tuple(row) for row in found] == [("link.jpg", "fetch", "refused")]
    check_all(laptop(), [*keys, "link.jpg"])


# ------------------------------------------------------------------------------------------------ checkpoints


def evil(path: Path, mark: Path, *, beside: bool = False) -> Path:
    """A checkpoint that runs a command when it is loaded; looks like a detector's when `beside`."""
    payload: Any = {"model": Bomb(mark), "train_args": {}, "names": {0: "cat"}} if beside else Bomb(mark)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(payload, protocol=2))
        archive.writestr("archive/version", b"3\n")
    return path


@pytest.mark.parametrize("beside", [False, True])
def test_a_checkpoint_that_runs_code_is_refused_before_torch_sees_it(home: Path, tmp_path: Path, beside: bool) -> None:
    pictures(tmp_path / "images", 2)
    mark = tmp_path / "it-ran"
    path = evil(tmp_path / "evil.pt", mark, beside=beside)
    with pytest.MonkeyPatch.context() as patch:
        # Whoever imports torch or ultralytics in this process is told so by an exit code of its own.
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "torch.py").write_text("import os; os._exit(99)")
        (tmp_path / "site" / "ultralytics.py").write_text("import os; os._exit(98)")
        patch.setenv("PYTHONPATH", str(tmp_path / "site"))
        done = run(laptop(), "annotate", str(tmp_path / "images"), "--model", str(path), "--quiet", code=2)
    assert done.stderr.count("\n") == 1
    assert "evil.pt" in done.stderr
    assert not mark.exists()
    assert rows(f"sqlite:///{home}/imagemill.db", "SELECT * FROM job") == []
    assert not (home / "store" / "weights").exists()


def test_weights_that_were_swapped_in_the_store_are_not_loaded(tmp_path: Path) -> None:
    from storage.errors import Misconfigured
    from storage.objects import open_store
    from workers import weights

    store = open_store((tmp_path / "store").as_uri())
    (tmp_path / "good.pt").write_bytes(b"the weights that were asked for")
    sha256 = weights.sha256_of(tmp_path / "good.pt")
    key = weights.publish(store, tmp_path / "good.pt", sha256)
    store.put(key, b"the weights of somebody else....")
    with pytest.raises(Misconfigured, match="not the file that was pinned"):
        weights.fetch(store, key, sha256, tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []


def test_no_code_loads_what_it_did_not_check() -> None:
    for path, text in sources():
        assert not re.search(r"trust_remote_code\s*=\s*True", text), path
        assert "shell=True" not in text, path
        assert not re.search(r"(?<![.\w])(eval|exec)\(", text), path
        assert "yaml.load(" not in text, path
        for line in re.findall(r".*(?:torch\.load|pickle\.loads?)\(.*", text):
            assert "weights_only=True" in line, f"{path}: {line}"
    ultralytics = (ROOT / "workers" / "ultralytics_checkpoints.py").read_text()
    assert re.search(r'ULTRALYTICS_SAFE_LOAD="1".*YOLO_AUTOINSTALL="false"', ultralytics)


# ------------------------------------------------------------------------------------------------ secrets


def texts(url: str) -> Iterator[tuple[str, str]]:
    """(table, everything in a row as text) over every table of a database."""
    for (table,) in rows(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        for row in rows(url, f'SELECT * FROM "{table}"'):  # noqa: S608
            yield table, repr(tuple(row))


def redis_values(url: str) -> Iterator[tuple[str, bytes]]:
    """(key, value) of everything in a Redis database."""
    import redis

    with redis.Redis.from_url(url) as client:
        for key in client.keys("*"):
            kind = client.type(key).decode()
            yield (
                key.decode(),
                repr(
                    {
                        "list": lambda k: client.lrange(k, 0, -1),
                        "hash": client.hgetall,
                        "set": client.smembers,
                        "zset": lambda k: client.zrange(k, 0, -1),
                        "string": client.get,
                    }[kind](key)
                ).encode(),
            )


def test_no_secret_is_written_anywhere(
    home: Path, tmp_path: Path, postgres: Postgres, valkey: Valkey, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole job, an outage, a wrong password and a crash at debug level; then everything that was written is read."""
    database, broker, store = postgres.new_database(), valkey.new_database(), seaweed.new_prefix()
    for name, value in seaweed.environment.items():
        monkeypatch.setenv(name, value)
    secrets = (postgres.password, valkey.password, seaweed.secret_key, seaweed.access_key)
    urls = {"IMAGEMILL_DATABASE_URL": database, "IMAGEMILL_BROKER_URL": broker, "IMAGEMILL_STORE_URL": store}
    quick = {"IMAGEMILL_LOG_LEVEL": "debug", "IMAGEMILL_LEASE_SECONDS": "3", "IMAGEMILL_RECONCILE_SECONDS": "0.5"}
    stack = laptop(**urls, **quick)
    logs, said = [tmp_path / "worker.log", tmp_path / "annotate.log", tmp_path / "wrong.log"], []
    said.append(run(stack, "db", "upgrade"))
    keys = pictures(tmp_path / "images", 64)
    (tmp_path / "images" / keys[3]).write_bytes(b"broken")
    with (
        workers(stack, log=logs[0]) as worker,
        background(stack, *annotate(tmp_path / "images", "--param", "delay_ms=150"), log=logs[1]) as job,
    ):
        wait_until(lambda: committed(stack) > 0, "a first shard")
        for child in psutil.Process(worker.pid).children(recursive=True):
            child.kill()
        assert job.wait(timeout=90) == 0
    for url, wrong in (("DATABASE", database.replace(postgres.password, f"{postgres.password}x")),
                       ("DATABASE", database.replace(str(postgres.port), "1")),
                       ("BROKER", broker.replace(valkey.password, f"{valkey.password}x")),
                       ("BROKER", broker.replace(str(valkey.port), "1"))):  # fmt: skip
        said.append(run({**stack, f"IMAGEMILL_{url}_URL": wrong}, "worker", "--device", "cpu", code=1))
        said.append(run({**stack, f"IMAGEMILL_{url}_URL": wrong}, "doctor", code=1))
    said.append(run({**stack, "AWS_SECRET_ACCESS_KEY": f"{seaweed.secret_key}x"}, "doctor", code=1))
    said += [run(stack, *words) for words in (("status", "--json"), ("doctor",), ("workers", "--all"), ("failures",))]
    said.append(run(stack, "export", "--format", "coco", "--to", str(tmp_path / "out")))

    everything: list[tuple[str, bytes]] = [
        (f"command {done.args}", f"{done.stdout}{done.stderr}".encode()) for done in said
    ]
    everything += [(str(path), path.read_bytes()) for path in logs if path.exists()]
    everything += [(str(path), path.read_bytes()) for top in (home, tmp_path / "out") for path in files(top)]
    everything += [(f"table {table}", text.encode()) for table, text in texts(database)]
    everything += [(f"redis {key}", value) for key, value in redis_values(broker)]
    everything += objects(seaweed, store)
    assert len(everything) > 80
    for where, data in everything:
        for secret in secrets:
            assert secret.encode() not in data, f"a secret is in {where}"


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def objects(server: SeaweedFS, url: str) -> Iterator[tuple[str, bytes]]:
    """Every object below a URL, its metadata with it."""
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = server.client()
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", []):
        found = client.get_object(Bucket=bucket, Key=entry["Key"])
        yield f"object {entry['Key']}", entry["Key"].encode() + repr(found["Metadata"]).encode() + found["Body"].read()
        if entry["Key"].endswith(".parquet"):
            import pyarrow.parquet as pq

            table = pq.read_table(io.BytesIO(client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()))
            yield f"parquet {entry['Key']}", repr((table.schema.metadata, table.to_pylist())).encode()


@pytest.mark.parametrize(
    "text",
    [
        "cannot connect to redis://:hunter2-x@host:6379/0",
        "postgresql://user:hunter2-x@host/db failed",
        "url='postgresql://user:hunter2-x/y#z@host/db'",
        "rediss://default:hunter2-x%40y@host",
        "aws_secret_access_key='hunter2-x'",
        "AWS_SECRET_ACCESS_KEY=hunter2-x",
        '"password": "hunter2-x"',
        "token=hunter2-x&other=1",
    ],
)
def test_what_is_logged_is_masked(text: str) -> None:
    assert "hunter2" not in masked(text)


def test_tracebacks_are_masked_and_own_secrets_wherever_they_stand(monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    monkeypatch.setenv("IMAGEMILL_DATABASE_URL", "postgresql://user:hunter2%2Fx@host/db")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter3-secret")
    try:
        raise ValueError("the server said hunter2/x, hunter2%2Fx and hunter3-secret")
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "f", 1, "broke: %s", ("hunter3-secret",), sys.exc_info())
    shown = MaskingFormatter("%(message)s").format(record)
    assert "ValueError" in shown
    assert "hunter" not in shown


# ------------------------------------------------------------------------------------------------ SQL and text

HOSTILE = (
    "'; DROP TABLE item; --",
    '" OR 1=1; --',
    "Robert'); DELETE FROM job;--",
    "%s %(x)s :x ? $1 {0}",
    "back`tick",
    "=cmd|' /C calc'!A0",
    "@SUM(1+1)",
    "-2+3",
    "ünï¢ødé ☃ \U0001f600",
    "‮right-to-left",
    "a,b;c\tno",
    "<script>alert(1)</script>",
)


@flow.by_default("fleet")
def test_hostile_names_round_trip_through_files_and_tables(stack: Stack, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (original,) = pictures(tmp_path / "one", 1)
    folder.mkdir()
    names = [f"{text.replace('/', '_')}.jpg" for text in HOSTILE]
    for i, name in enumerate(names):
        (folder / name).write_bytes((tmp_path / "one" / original).read_bytes() + bytes([i]))
    if "IMAGEMILL_BROKER_URL" in stack:
        run(stack, "db", "upgrade")
        with workers(stack):
            done = run_json(stack, *annotate(folder, "--name", HOSTILE[0]))
    else:
        done = run_json(stack, *annotate(folder, "--name", HOSTILE[0]))
    assert (done["results"], done["name"]) == (len(names), HOSTILE[0])
    lines = run(stack, "results", "--limit", "0", "--json").stdout.splitlines()
    found = sorted(json.loads(line)["key"] for line in lines)
    expected = sorted(name.replace("\t", "%09") for name in names)
    assert found == expected
    assert run_json(stack, "status", HOSTILE[0])["id"] == 1
    run(stack, "status", HOSTILE[1], code=2)
    run(stack, "results", "--label", HOSTILE[0], code=2)
    check_all(stack, expected)


def test_hostile_labels_are_bound_not_pasted(database_url: str) -> None:
    from storage import index

    with opened(database_url) as db:
        job = planned_job(db, shards=len(HOSTILE), size=1)
        worker = new_worker(db)
        for label in HOSTILE:
            claim = claimed(db, worker)
            found = [outcome(0, f"{label}.jpg", result=result(0.9, label=label))]
            assert leases.commit(db, claim, worker, written(claim), found)
        for label in HOSTILE:
            assert [row.key for row in index.find(db, job.recipe_id, label=label)] == [f"{label}.jpg"]
        assert {label for label, _, _ in index.label_counts(db, job.recipe_id)} == set(HOSTILE)


@pytest.mark.parametrize("label", ["nul\0byte", "half a letter \udcff"])
def test_labels_that_no_table_takes_are_refused_with_the_request(database_url: str, label: str) -> None:
    with opened(database_url) as db:
        with pytest.raises(BadInput, match="class name"):
            lifecycle.submit(db, spec(labels=("cat", label)))
        assert db.query(sa.select(tables.job)) == []


def test_no_sql_is_made_of_strings() -> None:
    """Text is bound. The one f-string with a statement takes names of our own tables."""
    allowed = {("storage/database.py", "bulk_insert")}
    pattern = re.compile(r"""(?i)\bf["'][^"']*\b(select|insert into|update|delete from|drop|copy)\b[^"']*\{""")
    for path, text in sources():
        for match in pattern.finditer(text):
            start = text.rfind("\ndef ", 0, match.start())
            name = text[start:].split("(")[0].replace("\ndef ", "")
            where = str(path.relative_to(ROOT))
            assert (where, name) in allowed or "sqlite" in text[start : match.end()], f"{where}: {match.group()}"


def test_exports_give_no_formulas(home: Path, tmp_path: Path) -> None:
    import csv

    folder = tmp_path / "images"
    (original,) = pictures(tmp_path / "one", 1)
    folder.mkdir()
    for name in ("=1+1.jpg", "+1.jpg", "-1.jpg", "@x.jpg"):
        (folder / name).write_bytes((tmp_path / "one" / original).read_bytes())
    (folder / "=broken.jpg").write_bytes(b"")
    run(laptop(), *annotate(folder, "--max-failures", "1", "--quiet"))
    run(laptop(), "export", "--format", "yolo", "--to", str(tmp_path / "out"))
    for path in (tmp_path / "out").glob("*.csv"):
        with path.open(newline="") as file:
            for row in csv.reader(file):
                assert not [cell for cell in row if cell[:1] in ("=", "+", "-", "@", "\t", "\r")], path


# ------------------------------------------------------------------------------------------------ sockets and folders


def test_a_laptop_opens_no_port_and_its_broker_is_private(home: Path, tmp_path: Path) -> None:
    pictures(tmp_path / "images", 64)
    with background(laptop(), *annotate(tmp_path / "images", "--param", "delay_ms=300", "--quiet")) as process:
        wait_until(lambda: (home / "imagemill.db").exists() and bool(leased(home)), "work to begin")
        run_by = psutil.Process(process.pid)
        family = [run_by, *run_by.children(recursive=True)]
        assert len(family) >= 4, "the command, the broker, a worker and its child"
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                listening = [c for c in member.net_connections("inet") if c.status == psutil.CONN_LISTEN]
                assert listening == [], f"{member.cmdline()} listens at {listening}"
        folder = Settings(home=home).broker_socket.parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.stat().st_uid == os.getuid()
        assert stat.S_IMODE(Settings(home=home).broker_socket.stat().st_mode) & 0o077 == 0
        assert process.wait(timeout=90) == 0


def leased(home: Path) -> list[Any]:
    from sqlalchemy.exc import DBAPIError

    with contextlib.suppress(DBAPIError):
        return rows(f"sqlite:///{home}/imagemill.db", "SELECT * FROM shard WHERE state = 'leased'")
    return []


def test_nothing_of_a_strangers_folder_is_imported(tmp_path: Path) -> None:
    """The current folder, where a dataset may lie, is not on the path of any process."""
    for name in ("storage", "jobs", "workers", "celery", "cli", "json"):
        (tmp_path / f"{name}.py").write_text("import os; os._exit(97)")
    (tmp_path / "images").mkdir()
    pictures(tmp_path / "images", 2)
    done = subprocess.run(
        ["imagemill", *annotate(Path("images"), "--quiet")], cwd=tmp_path, env=laptop(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
