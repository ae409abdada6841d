"""What a user gets wrong is answered in one line that says what to do, with the right exit code, and leaves nothing."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import flow
from tests.flow import pictures, run, run_json
from tests.invariants import rows
from tests.services import HOST, SCRIPTS, Postgres, SeaweedFS, Valkey, free_ports

Stack = dict[str, str]
PER_COMMAND_S = 30


@dataclass(frozen=True)
class Answer:
    """How a command ended."""

    code: int
    lines: list[str]
    seconds: float


class Commands:
    """Runs commands, and says how long each took."""

    def run(self, stack: Mapping[str, str], *arguments: str) -> Answer:
        """One command to its end."""
        started = time.monotonic()
        done = flow.forker().run(stack, arguments, 2 * PER_COMMAND_S)
        return Answer(done.returncode, done.stderr.strip().splitlines(), time.monotonic() - started)


@pytest.fixture(scope="module")
def forker() -> Commands:
    return Commands()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures, wrong folders and wrong model files."""
    folder = tmp_path_factory.mktemp("files")
    pictures(folder / "images", 3)
    (folder / "empty").mkdir()
    (folder / "texts").mkdir()
    (folder / "texts" / "a.txt.bak").write_text("no picture")
    (folder / "text.pt").write_text("these are no weights")
    (folder / "nothing.pt").write_bytes(b"")
    with zipfile.ZipFile(folder / "other.pt", "w") as archive:
        archive.writestr("word/document.xml", "a letter" * 1000)
    (folder / "truncated.pt").write_bytes((folder / "other.pt").read_bytes()[:60])
    return folder


@pytest.fixture(scope="module")
def done_home(forker: Commands, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one finished job, which no test may change."""
    folder = tmp_path_factory.mktemp("done") / "home"
    run(plain(folder), "annotate", str(files / "images"), "--model", "stub", "--device", "cpu", "--quiet")
    return folder


def plain(home: Path, **more: str) -> Stack:
    """A laptop's environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("IMAGEMILL_", "AWS_"))}
    path = f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": path, "AWS_EC2_METADATA_DISABLED": "true", "IMAGEMILL_HOME": str(home), **more}


def refused(answer: Answer, code: int, *words: str) -> None:
    """One line, no traceback, the right exit code, and the words that help."""
    text = "\n".join(answer.lines)
    assert "Traceback" not in text, text[-3000:]
    assert answer.code == code, (answer.code, text)
    assert len(answer.lines) == 1, text
    for word in words:
        assert word in text, text
    assert answer.seconds < PER_COMMAND_S


def no_jobs(home: Path) -> None:
    """Nothing was made of the request."""
    database = home / "imagemill.db"
    if database.is_file() and database.stat().st_size:
        assert rows(f"sqlite:///{database}", "SELECT * FROM job") == []
    store = home / "store"
    assert not store.exists() or not [path for path in store.rglob("*") if path.is_file()]


@dataclass(frozen=True)
class Case:
    """A wrong `annotate`: what differs from a right one, and what the one line must hold."""

    words: tuple[str, ...]
    source: str = "images"
    model: str = "stub"
    more: tuple[str, ...] = ()
    code: int = 2
    env: Mapping[str, str] = field(default_factory=dict)


WRONG = {
    "missing folder": Case(("does not exist", "check the spelling"), source="nowhere"),
    "empty folder": Case(("no images", "expected files ending in"), source="empty"),
    "folder without images": Case(("no images", ".jpg"), source="texts"),
    "one file": Case(("text.pt",), source="text.pt"),
    "missing manifest": Case(("does not exist",), source="list.csv"),
    "misspelt model": Case(("unknown model 'stbu'", "did you mean 'stub'?", "imagemill models"), model="stbu"),
    "no model": Case(("unknown model ''", "imagemill models"), model=""),
    "missing model file": Case(("there is no model file", "check the path"), model="gone/model.pt"),
    "model is a folder": Case(("no checkpoint of a known family",), model="FILES/images"),
    "model is text": Case(("no checkpoint of a known family",), model="FILES/text.pt"),
    "model is empty": Case(("no checkpoint of a known family",), model="FILES/nothing.pt"),
    "model is another zip": Case(("no checkpoint of a known family",), model="FILES/other.pt"),
    "model is truncated": Case(("no checkpoint of a known family",), model="FILES/truncated.pt"),
    "parameter the model lacks": Case(("no parameter 'conf'", "it has:"), more=("--conf", "0.5")),
    "classes the model lacks": Case(("no parameter 'classes'",), more=("--classes", "dog")),
    "batch of 0": Case(("--batch must be at least 1",), more=("--batch", "0")),
    "negative batch": Case(("--batch must be at least 1",), more=("--batch", "-4")),
    "shard of 0": Case(("--shard-size must be from 1 to",), more=("--shard-size", "0")),
    "huge shard": Case(("--shard-size must be from 1 to",), more=("--shard-size", "65537")),
    "unknown parameter": Case(("no parameter 'colour'", "it has:"), more=("--param", "colour=red")),
    "nameless parameter": Case(("no parameter ''",), more=("--param", "=1")),
    "parameter of a wrong type": Case(("delay_ms must be a number",), more=("--param", "delay_ms=long")),
    "parameter out of range": Case(("objects must be a whole number",), more=("--param", "objects=-1")),
    "parameter is NaN": Case(("delay_ms must be",), more=("--param", "delay_ms=NaN")),
    "parameter is infinite": Case(("finite",), more=("--param", "delay_ms=Infinity")),
    "precision": Case(("unknown precision 'fp8'", "fp32"), more=("--precision", "fp8")),
    "failure share over 1": Case(("from 0 to 1",), more=("--max-failures", "20")),
    "failure share is NaN": Case(("from 0 to 1",), more=("--max-failures", "nan")),
    "negative failure share": Case(("from 0 to 1",), more=("--max-failures", "-1")),
    "priority": Case(("a priority must be from",), more=("--priority", "99999999999999999999")),
    "token of two lines": Case(("a token must be",), more=("--token", "a\nb")),
    "ftp source": Case(("cannot tell what dataset",), source="ftp://host/images"),
    "http source": Case(("cannot tell what dataset",), source="http://169.254.169.254/latest/meta-data"),
    "https manifest": Case(("cannot tell what dataset",), source="https://host/list.csv"),
    "s3 without bucket": Case(("expected s3://bucket/prefix",), source="s3://"),
    "s3 with password": Case(("AWS_", "user:***@"), source="s3://user:hunter2@bucket/x"),
    "empty source": Case(("cannot tell what dataset ''",), source=""),
    "control character": Case(("does not exist",), source="\x01\x02"),
    "s3 without credentials": Case(("AWS_ACCESS_KEY_ID",), source="s3://bucket/x", code=1),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_one_line_and_leaves_nothing(
    forker: Commands, files: Path, tmp_path: Path, name: str
) -> None:
    case = WRONG[name]
    source = str(files / case.source) if case.source and "://" not in case.source else case.source
    model = case.model.replace("FILES", str(files))
    home = tmp_path / "home"
    stack = plain(home, **case.env)
    command = ("annotate", source, "--model", model, "--device", "cpu", "--quiet", *case.more)
    refused(forker.run(stack, *command), case.code, *case.words)
    no_jobs(home)


def test_the_console_script_itself_answers_so(files: Path, tmp_path: Path) -> None:
    stack = plain(tmp_path / "home")
    done = run(stack, "annotate", str(files / "images"), "--model", "stbu", "--quiet", code=2)
    assert done.stderr.count("\n") == 1
    assert "did you mean 'stub'?" in done.stderr


DEVICES = ("tpu", "7", "", "gpu", "cpu,7")


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_not_there_leaves_no_job(forker: Commands, files: Path, tmp_path: Path, device: str) -> None:
    home = tmp_path / "home"
    command = ("annotate", str(files / "images"), "--model", "stub", "--quiet", "--device", device)
    refused(forker.run(plain(home), *command), 2, "device" if device != "gpu" else "no NVIDIA GPU")
    no_jobs(home)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_is_not_there_is_one_line(forker: Commands, files: Path, tmp_path: Path, device: str) -> None:
    stack = plain(tmp_path / "home")
    for command in (("annotate", str(files / "images"), "--model", "stub", "--quiet"), ("up",)):
        refused(
            forker.run(stack, *command, "--device", device), 2, "this machine has" if device != "gpu" else "--device"
        )


def test_an_impossible_place_for_the_export_leaves_no_job(forker: Commands, files: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    command = ("annotate", str(files / "images"), "--model", "stub", "--quiet", "--device", "cpu")
    refused(forker.run(plain(home), *command, "--out", "ftp://host/x"), 2, "s3://bucket/prefix")
    no_jobs(home)


CLICK = (
    ("annotate",),
    ("annotate", "images"),
    ("annotate", "images", "--model", "stub", "--conf", "high"),
    ("annotate", "images", "--model", "stub", "--imgsz", "big"),
    ("annotate", "images", "--model", "stub", "--param", "delay_ms"),
    ("annotate", "images", "--model", "stub", "--colour"),
    ("anotate",),
    ("export", "--format", "coco"),
    ("results", "--min-score", "high"),
    ("priority", "1", "high"),
    ("worker",),
)


@pytest.mark.parametrize("command", CLICK, ids=" ".join)
def test_a_wrong_option_ends_with_what_is_wrong(forker: Commands, tmp_path: Path, command: tuple[str, ...]) -> None:
    answer = forker.run(plain(tmp_path / "home"), *command)
    text = "\n".join(answer.lines)
    assert (answer.code, "Traceback" in text) == (2, False), text
    assert answer.lines[-1].startswith(("Error: ", "imagemill: ")), text


@pytest.mark.parametrize("command", CLICK, ids=" ".join)
def test_a_wrong_option_is_one_line(forker: Commands, tmp_path: Path, command: tuple[str, ...]) -> None:
    refused(forker.run(plain(tmp_path / "home"), *command), 2)


ON_A_DONE_JOB = {
    "unknown job": (("status", "99"), 2, "there is no job '99'"),
    "unknown name": (("status", "cats"), 2, "there is no job 'cats'"),
    "huge number": (("status", "9" * 40), 2, "there is no job"),
    "no number": (("status", ""), 2, "expected a job's number"),
    "superscript": (("status", "²"), 2, "there is no job"),
    "bytes that are no text": (("status", "\udcff"), 2, "there is no job"),
    **{f"{verb} unknown": ((verb, "99"), 2, "there is no job '99'") for verb in ("pause", "resume", "cancel", "retry")},
    **{f"{verb} unknown": ((verb, "99"), 2, "there is no job '99'") for verb in ("verify", "repair", "watch")},
    **{f"{verb} unknown": ((verb, "99"), 2, "there is no job '99'") for verb in ("results", "failures")},
    "priority unknown": (("priority", "99", "1"), 2, "there is no job '99'"),
    "priority huge": (("priority", "1", "9" * 30), 2, "a priority must be from"),
    "drain unknown": (("drain", "abc"), 2, "imagemill workers"),
    "export unknown": (("export", "99", "--format", "coco", "--to", "OUT"), 2, "there is no job '99'"),
    "format": (("export", "1", "--format", "coko", "--to", "OUT"), 2, "known formats: classmaps"),
    "format option": (("export", "1", "--format", "coco", "--to", "OUT", "--option", "x=1"), 2, "no option 'x'"),
    "export url": (("export", "1", "--format", "coco", "--to", "ftp://host/x"), 2, "s3://bucket/prefix"),
    "export full folder": (("export", "1", "--format", "coco", "--to", "FILES/images"), 2, "not empty"),
    "export to a file": (("export", "1", "--format", "coco", "--to", "FILES/text.pt"), 2, "not a folder"),
    "label": (("results", "1", "--label", "dgo"), 2, "did you mean 'dog'?"),
    "negative limit": (("results", "1", "--limit", "-5"), 2, "a limit of 0 or more"),
    "score": (("results", "1", "--min-score", "nan"), 2, "a score from 0 to 1"),
    "jobs limit": (("jobs", "--limit", "-1"), 2, "the limit must be"),
}


@pytest.mark.parametrize("name", ON_A_DONE_JOB)
def test_a_wrong_question_is_one_line(
    forker: Commands, files: Path, done_home: Path, tmp_path: Path, name: str
) -> None:
    command, code, word = ON_A_DONE_JOB[name]
    words = [w.replace("FILES", str(files)).replace("OUT", str(tmp_path / "out")) for w in command]
    refused(forker.run(plain(done_home), *words), code, word)
    assert not (tmp_path / "out").exists()
    assert len(rows(f"sqlite:///{done_home}/imagemill.db", "SELECT * FROM job")) == 1


def test_a_huge_limit_is_no_error(forker: Commands, done_home: Path) -> None:
    assert forker.run(plain(done_home), "jobs", "--limit", "9" * 30).code == 0


SETTINGS = {
    "DATABASE_URL": (
        "nonsense",
        "mysql://host/x",
        "sqlite://",
        "sqlite:///:memory:",
        "http://host",
        "postgresql://h:x/y",
    ),
    "STORE_URL": ("nonsense", "ftp://host", "s3://", "file://", "http://host", "file://host/x"),
    "BROKER_URL": ("nonsense", "amqp://host", "redis://:p@h:xx/0"),
    "LEASE_SECONDS": ("abc", "0", "nan", "inf"),
    "LOG_LEVEL": ("loud",),
    "MAX_IMAGE_BYTES": ("-1", "many"),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in SETTINGS.items() for v in values])
def test_a_wrong_setting_is_one_line(forker: Commands, tmp_path: Path, name: str, value: str) -> None:
    stack = plain(tmp_path / "home", **{f"IMAGEMILL_{name}": value})
    command = ("worker", "--device", "cpu") if name == "BROKER_URL" else ("jobs",)
    refused(forker.run(stack, *command), 1)
    no_jobs(tmp_path / "home")


@pytest.fixture(scope="module")
def closed() -> int:
    """A port where nobody listens."""
    return free_ports(1)[0]


def test_servers_that_are_not_there(forker: Commands, files: Path, tmp_path: Path, closed: int) -> None:
    postgres = plain(tmp_path / "a", IMAGEMILL_DATABASE_URL=f"postgresql://u:hunter2@{HOST}:{closed}/x")
    redis = plain(tmp_path / "b", IMAGEMILL_BROKER_URL=f"redis://:hunter2@{HOST}:{closed}/0")
    keys = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "hunter2"}
    endpoint = {"IMAGEMILL_S3_ENDPOINT_URL": f"http://{HOST}:{closed}", **keys}
    command = ("annotate", str(files / "images"), "--model", "stub", "--device", "cpu", "--quiet")
    remote = ("annotate", "s3://b/x", *command[2:])
    answers = {
        "cannot reach the database": forker.run(postgres, *command),
        "start Redis or Valkey there": forker.run(redis, "worker", "--device", "cpu"),
        "check that the server is up": forker.run(plain(tmp_path / "c", **endpoint), *remote),
        "S3 does not serve": forker.run(plain(tmp_path / "d", IMAGEMILL_STORE_URL="s3://b/x", **endpoint), *command),
    }
    for word, answer in answers.items():
        refused(answer, 1, word)
        assert "hunter2" not in answer.lines[0]


def test_annotate_says_that_the_broker_is_not_there(files: Path, tmp_path: Path, closed: int) -> None:
    stack = plain(tmp_path / "home", IMAGEMILL_BROKER_URL=f"redis://:hunter2@{HOST}:{closed}/0")
    done = subprocess.run(
        ["imagemill", "annotate", str(files / "images"), "--model", "stub", "--device", "cpu", "--quiet"],
        env=stack,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "cannot reach the broker" in done.stderr


def test_passwords_and_names_that_servers_refuse(
    forker: Commands, files: Path, tmp_path: Path, postgres: Postgres, valkey: Valkey, seaweed: SeaweedFS
) -> None:
    wrong, ask = "hunter2", ("annotate", str(files / "images"), "--model", "stub", "--device", "cpu", "--quiet")
    database = postgres.url.replace(postgres.password, wrong)
    missing = postgres.url_of("not_there")
    broker = valkey.url.replace(valkey.password, wrong)
    keys = {**seaweed.environment, "AWS_SECRET_ACCESS_KEY": wrong}
    refused(forker.run(plain(tmp_path / "1", IMAGEMILL_DATABASE_URL=database), *ask), 1, "IMAGEMILL_DATABASE_URL")
    refused(forker.run(plain(tmp_path / "2", IMAGEMILL_DATABASE_URL=missing), *ask), 1, "does not exist")
    refused(forker.run(plain(tmp_path / "3", IMAGEMILL_BROKER_URL=broker), "worker"), 1, "IMAGEMILL_BROKER_URL")
    refused(forker.run(plain(tmp_path / "4", **keys), "annotate", "s3://b/x", *ask[2:]), 1, "AWS_SECRET_ACCESS_KEY")
    store = plain(tmp_path / "5", IMAGEMILL_STORE_URL="s3://not-there/x", **seaweed.environment)
    refused(forker.run(store, *ask), 1, "bucket of s3://not-there", "create it or correct the URL")
    source = plain(tmp_path / "6", **seaweed.environment)
    refused(forker.run(source, "annotate", "s3://not-there/x", *ask[2:]), 1, "bucket of s3://not-there")


def test_a_database_of_another_revision(forker: Commands, tmp_path: Path, postgres_url: str) -> None:
    import sqlalchemy as sa

    stack = plain(tmp_path / "home", IMAGEMILL_DATABASE_URL=postgres_url)
    refused(forker.run(stack, "jobs"), 1, "has no tables yet", "imagemill db upgrade")
    assert forker.run(stack, "db", "upgrade").code == 0
    engine = sa.create_engine(postgres_url.replace("postgresql://", "postgresql+psycopg://"))
    with engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    engine.dispose()
    refused(forker.run(stack, "jobs"), 1, "revision 9999", "install the newer imagemill")


def test_a_corrupt_sqlite_file(forker: Commands, tmp_path: Path, done_home: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "imagemill.db").write_bytes(b"this is not a database at all " * 500)
    refused(forker.run(plain(home), "jobs"), 1, "not an imagemill database", "move the file away")
    with contextlib.closing(sqlite3.connect(done_home / "imagemill.db")) as db:
        db.execute("VACUUM INTO ?", (str(tmp_path / "whole.db"),))  # the file alone may lack what its log holds
    data = bytearray((tmp_path / "whole.db").read_bytes())
    assert len(data) > 2 * 4096
    data[4096:] = b"\xa5" * (len(data) - 4096)
    (home / "imagemill.db").write_bytes(data)
    refused(forker.run(plain(home), "jobs"), 1, "not an imagemill database", "move the file away")
    (home / "imagemill.db").unlink()
    (home / "imagemill.db").mkdir()
    refused(forker.run(plain(home), "jobs"), 1, "cannot open the database")


def test_a_home_that_is_no_folder(forker: Commands, files: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for home in (tmp_path / "file", tmp_path / "file" / "below"):
        refused(forker.run(plain(home), "jobs"), 1, "set IMAGEMILL_HOME")
    stack = plain(tmp_path / "home", IMAGEMILL_STORE_URL=(tmp_path / "file" / "store").as_uri())
    answer = forker.run(stack, "annotate", str(files / "images"), "--model", "stub", "--device", "cpu", "--quiet")
    refused(answer, 1, "is a file")


@contextlib.contextmanager
def disk(folder: Path, *options: str) -> Iterator[Path]:
    """A small disk of its own, where the tests may mount one."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_home_that_cannot_be_written(forker: Commands, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=1m", "ro") as home:
        refused(forker.run(plain(home), "jobs"), 1, "check the folder and its permissions")
        refused(forker.run(plain(home / "below"), "jobs"), 1, "Read-only file system", "IMAGEMILL_HOME")


def test_a_folder_that_is_gone_and_a_model_that_leads_nowhere(forker: Commands, files: Path, tmp_path: Path) -> None:
    """What the system refuses is one line wherever it is met."""
    code = "import os, sys; os.rmdir(os.getcwd()); os.execvp(sys.argv[1], sys.argv[1:])"
    (tmp_path / "cwd").mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "imagemill", "annotate", ".", "--model", "stub"],
        cwd=tmp_path / "cwd",
        env=plain(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    refused(Answer(done.returncode, done.stderr.splitlines(), 0), 1, "No such file or directory")
    looped = tmp_path / "loop.pt"
    looped.symlink_to(looped)
    stack = plain(tmp_path / "home")
    answer = forker.run(stack, "annotate", str(files / "images"), "--model", str(looped), "--device", "cpu")
    refused(answer, 2, "there is no model file")


def test_a_home_on_a_full_disk(forker: Commands, tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "size=64k") as home:
        with contextlib.suppress(OSError):
            (home / "filler").write_bytes(b"x" * 100_000)
        refused(forker.run(plain(home), "jobs"), 1, "no space left", "free some and run the same command again")
        (home / "filler").unlink()


def odd_pictures(folder: Path) -> dict[str, str]:
    """Key -> the reason it must fail with, "" where it must succeed."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (48, 64, 3), np.uint8))
    sound = io.BytesIO()
    picture.save(sound, "JPEG")
    (folder / "sound.jpg").write_bytes(sound.getvalue())
    (folder / "truncated.jpg").write_bytes(sound.getvalue()[: len(sound.getvalue()) // 2])
    whole = io.BytesIO()
    picture.save(whole, "PNG")
    damaged = bytearray(whole.getvalue())
    damaged[100] ^= 0xFF
    (folder / "broken.png").write_bytes(damaged)
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("I am a letter, not a picture.")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(rng.integers(0, 65535, (48, 64), np.uint16)).save(folder / "sixteen-bit.png")
    picture.convert("P").save(folder / "palette.png")
    picture.save(folder / "animated.gif", save_all=True, append_images=[picture.rotate(90)] * 3)
    picture.resize((1, 1)).save(folder / "one-pixel.png")
    Image.new("RGB", (400, 400)).save(folder / "many-pixels.png")
    noise = Image.fromarray(rng.integers(0, 255, (200, 200, 3), np.uint8))
    noise.save(folder / "many-bytes.png")
    (folder / "gone.jpg").symlink_to(folder / "never-there.jpg")
    (folder / "outside.jpg").symlink_to("/etc/hostname")
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    failed = {
        "truncated.jpg": "decode/truncated",
        "broken.png": "decode/corrupt",
        "empty.jpg": "decode/empty",
        "text.jpg": "decode/unknown-format",
        "many-pixels.png": "decode/too-many-pixels",
        "many-bytes.png": "fetch/too-many-bytes",
        "gone.jpg": "fetch/not-found",
        "circle.jpg": "fetch/not-found",
        "phone.heic": "decode/unknown-format",
        "outside.jpg": "fetch/refused",
    }
    fine = ("sound.jpg", "cmyk.jpg", "sixteen-bit.png", "palette.png", "animated.gif", "one-pixel.png")
    return {**failed, **dict.fromkeys(fine, "")}


def test_each_odd_picture_is_one_row_with_its_reason(home: Path, tmp_path: Path) -> None:
    expected = odd_pictures(tmp_path / "odd")
    stack = plain(home, IMAGEMILL_MAX_IMAGE_PIXELS="100000", IMAGEMILL_MAX_IMAGE_BYTES="60000")
    command = ("annotate", str(tmp_path / "odd"), "--model", "stub", "--device", "cpu", "--max-failures", "1")
    done = run_json(stack, *command)
    assert (done["state"], done["complete"]) == ("done with failures", True)
    assert (done["results"], done["failures"]) == (6, 10)
    found = rows(f"sqlite:///{home}/imagemill.db", "SELECT key, ok, stage, reason, message FROM item")
    assert {row.key: "" if row.ok else f"{row.stage}/{row.reason}" for row in found} == expected
    assert all("\n" not in (row.message or "") for row in found)
    assert "convert it to JPEG" in next(row.message for row in found if row.key == "phone.heic")
    flow.check_all(stack, list(expected))
    again = run_json(stack, *command)
    assert (again["planned"], again["fresh"]) == (0, len(expected))


def test_a_checkpoint_of_another_task(forker: Commands, files: Path, tmp_path: Path) -> None:
    """Built in a process of its own: this one need not hold torch."""
    path = tmp_path / "segment.pt"
    script = f"from ultralytics import YOLO; YOLO('yolov8n-seg.yaml').save({str(path)!r})"
    subprocess.run([sys.executable, "-P", "-c", script], check=True, capture_output=True, env=os.environ)
    answer = forker.run(
        plain(tmp_path / "home"), "annotate", str(files / "images"), "--model", str(path), "--device", "cpu", "--quiet"
    )
    refused(answer, 2, "segment")
    no_jobs(tmp_path / "home")
    shutil.rmtree(tmp_path / "home", ignore_errors=True)
    half = tmp_path / "half.pt"
    half.write_bytes(path.read_bytes()[:200_000])
    answer = forker.run(
        plain(tmp_path / "home"), "annotate", str(files / "images"), "--model", str(half), "--device", "cpu", "--quiet"
    )
    refused(answer, 2, "half.pt")
    no_jobs(tmp_path / "home")


# ------------------------------------------------------------------------------------------------ the other kinds


@pytest.fixture(scope="module")
def others(files: Path) -> Path:
    """Weights that only look like some, prompts and pipelines, beside the pictures: enough to be refused."""
    sd, dinov2 = files / "sd", files / "dinov2"
    for part in ("unet", "vae", "text_encoder"):
        (sd / part).mkdir(parents=True)
        (sd / part / "model.safetensors").touch()
    (sd / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    (sd / "unet" / "config.json").write_text('{"cross_attention_dim": 768}')
    for name, config in {
        "net": {"_class_name": "ControlNetModel", "cross_attention_dim": 2048},
        "no-net": {"_class_name": "UNet2DConditionModel"},
        "dinov2": {"model_type": "dinov2", "patch_size": 14},
    }.items():
        (files / name).mkdir()
        (files / name / "config.json").write_text(json.dumps(config))
    (dinov2 / "model.safetensors").touch()
    (files / "prompts.txt").write_text("a cat\n")
    (files / "empty.txt").write_text("\n\n")
    (files / "empty.jsonl").touch()
    steps = {"HorizontalFlipp": {}, "GaussNoise": {"std_range": "big"}}
    for name, values in steps.items():
        step = {"__class_fullname__": name, "p": 1.0, **values}
        whole = {"transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": [step]}}
        (files / f"{name}.json").write_text(json.dumps(whole))
    (files / "broken.json").write_text('{"transform": ')
    return files


DRAW = ("generate", "FILES/prompts.txt", "--model", "FILES/sd")
ALTER = ("transform", "FILES/images", "--model")
AUGMENT = (*ALTER, "albumentations", "--param")
OTHER_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "misspelt model": ((*ALTER, "sobbel"), ("did you mean 'sobel'?",)),
    "weights of another family": (("mask", "FILES/images", "--model", "FILES/dinov2"), ("family dinov2", "embed")),
    "a transformation of prompts": ((*DRAW[:3], "sobel"), ("'sobel' works on images", "list of prompts")),
    "a word for a number": ((*ALTER, "resize", "--param", "width=wide"), ("width must be a whole number", "'wide'")),
    "a list for a word": ((*ALTER, "resize", "--param", "fit=[1]"), ("fit must be one of inside", "[1]")),
    "an even kernel": ((*ALTER, "sobel", "--param", "ksize=4"), ("ksize must be odd",)),
    "no prompt in the file": (("generate", "FILES/empty.txt", *DRAW[2:]), ("holds no prompt", "one a line")),
    "no prompt in the word": (
        ("generate", "FILES/images", *DRAW[2:], "--prompt", " "),
        ("--prompt is empty", "what to draw"),
    ),
    "no prompts for masks": (
        ("mask", "FILES/images", "--model", "sam_vit_b", "--prompts", "FILES/gone.jsonl"),
        ("does not exist",),
    ),
    "a size that is no multiple": ((*DRAW, "--width", "65", "--height", "64"), ("width must be a multiple of 8",)),
    "a size the patches do not fill": (
        ("embed", "FILES/images", "--model", "FILES/dinov2", "--imgsz", "57"),
        ("imgsz must be a multiple of the patch of 14 pixels", "try 56"),
    ),
    "labels without a head": (("classify", "FILES/images", "--model", "FILES/dinov2"), ("no linear head", "embed")),
    "a ControlNet of another model": (
        (*DRAW, "--param", "controlnet=FILES/net"),
        ("is for another model", "cross_attention_dim is 2048", "768"),
    ),
    "a ControlNet that is none": ((*DRAW, "--param", "controlnet=FILES/no-net"), ("holds a UNet2DConditionModel",)),
    "a misspelt scheduler": ((*DRAW, "--scheduler", "Eulr"), ("did you mean 'EulerDiscrete'?",)),
    "a broken pipeline of albumentations": ((*AUGMENT, "pipeline=FILES/broken.json"), ("pipeline is not JSON",)),
    "a misspelt preset": ((*AUGMENT, "pipeline=ligth"), ("did you mean 'light'?",)),
    "a misspelt augmentation": (
        (*AUGMENT, "pipeline=FILES/HorizontalFlipp.json"),
        ("has no transform 'HorizontalFlipp'", "check its name"),
    ),
    "an augmentation's wrong value": ((*AUGMENT, "pipeline=FILES/GaussNoise.json"), ("cannot build", "std_range")),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_wrong_request_of_another_kind_leaves_nothing(
    forker: Commands, others: Path, tmp_path: Path, name: str
) -> None:
    command, words = OTHER_KINDS[name]
    given = [word.replace("FILES", str(others)) for word in command]
    home = tmp_path / "home"
    refused(forker.run(plain(home), *given, "--device", "cpu", "--quiet"), 2, *words)
    shutil.rmtree(home / "store" / "weights", ignore_errors=True)  # kept under their sha256, for the next try
    no_jobs(home)


def test_an_extra_that_is_missing_is_named(forker: Commands, others: Path, tmp_path: Path) -> None:
    """Where the machine that is asked would have to compute it; a fleet's producer needs no such library."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *more: None if name == 'diffusers' else find(name, *more)\n"
    )
    stack = plain(tmp_path / "home", PYTHONPATH=str(tmp_path))
    command = [word.replace("FILES", str(others)) for word in DRAW]
    done = run(stack, *command, "--device", "cpu", "--quiet", code=1)
    assert done.stderr.count("\n") == 1
    assert "the model family diffusion needs diffusers" in done.stderr
    assert "pip install 'imagemill[models]'" in done.stderr
    no_jobs(tmp_path / "home")
    fleet = {"IMAGEMILL_BROKER_URL": "redis://127.0.0.1:1/0", "IMAGEMILL_DATABASE_URL": f"sqlite:///{tmp_path}/x.db"}
    done = run({**stack, **fleet}, *command, "--device", "cpu", "--quiet", "--detach", code=1)
    assert "diffusers" not in done.stderr


@pytest.mark.slow
def test_prompts_that_cannot_be_are_rows(home: Path, files: Path, tmp_path: Path) -> None:
    """Outside the picture, turned over, for an image that is not there; and weights that give NaN. No shard sticks."""
    import torch

    from tests.workers.models.tinysam import tiny

    stack = plain(home)
    keys = sorted(path.relative_to(files / "images").as_posix() for path in (files / "images").rglob("*.jpg"))
    prompts = [
        {"key": keys[0], "points": [[5, 5]]},
        {"key": keys[1], "points": [[500, 9]]},
        {"key": keys[2], "boxes": [[30, 30, 10, 10]]},
        {"key": "gone.jpg", "points": [[5, 5]]},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    weights = tiny().state_dict()
    torch.save(weights, tmp_path / "sam.pth")
    torch.save({name: torch.full_like(value, torch.nan) for name, value in weights.items()}, tmp_path / "nan.pth")
    mask = ("mask", str(files / "images"), "--device", "cpu", "--max-failures", "1")
    with flow.workers(stack):
        some = run_json(
            stack, *mask, "--model", str(tmp_path / "sam.pth"), "--prompts", str(tmp_path / "prompts.jsonl")
        )
        none = run_json(stack, *mask, "--model", str(tmp_path / "nan.pth"), "--param", "points_per_side=2")
    assert (some["state"], some["results"], some["failures"]) == ("done with failures", 1, 3)
    assert (none["state"], none["results"], none["failures"]) == ("done with failures", 0, 3)
    found = rows(f"sqlite:///{home}/imagemill.db", "SELECT job_id, key, stage, reason, message FROM item WHERE NOT ok")
    assert {(row.job_id, row.key): f"{row.stage}/{row.reason}" for row in found} == {
        (1, keys[1]): "prepare/bad-prompt",
        (1, keys[2]): "prepare/bad-prompt",
        (1, "gone.jpg"): "fetch/not-found",
        **{(2, key): "infer/not-finite" for key in keys},
    }
    said = {row.key: row.message for row in found if row.job_id == 1}
    assert "[500, 9] is outside the picture of 64 x 48 pixels" in said[keys[1]]
    assert "the dataset has no image 'gone.jpg'" in said["gone.jpg"]
