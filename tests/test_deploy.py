"""The container files, as far as they can be checked without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import redis
import yaml

from tests.services import HOST, SCRIPTS, SeaweedFS, Valkey, wait_until

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
COMPOSE = DOCKER / "compose.yaml"
DOCKERFILE = DOCKER / "Dockerfile"
SECRETS = ("POSTGRES_PASSWORD", "VALKEY_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY")
OURS = ("migrate", "reconcile", "imagemill", "worker-cpu", "worker-gpu")


def compose(file: Path, *words: str, without: str = "") -> subprocess.CompletedProcess[str]:
    """Let docker-compose read a file with every profile on, and all secrets set but one."""
    secrets = {name: f"value-of-{name.lower()}" for name in SECRETS if name != without}
    command = [SCRIPTS / "docker-compose", "--profile", "*", "-f", file, "config", *words]
    environment = {**os.environ, **secrets}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """The services as docker-compose sees them, merged and filled in."""
    done = compose(COMPOSE, "--format", "json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]  # type: ignore[no-any-return]


def hadolint(file: Path) -> subprocess.CompletedProcess[str]:
    """Let hadolint read a Dockerfile."""
    return subprocess.run([SCRIPTS / "hadolint", "--no-color", file], capture_output=True, text=True, check=False)


def planted(tmp_path: Path, source: Path, old: str, new: str) -> Path:
    """A copy of a file with one text replaced, in a folder with the rest of the container files."""
    shutil.copytree(DOCKER, tmp_path / "docker")
    text = source.read_text()
    assert old in text
    path = tmp_path / "docker" / source.name
    path.write_text(text.replace(old, new, 1))
    return path


# --- compose ----------------------------------------------------------------------------------------------------------


def test_compose_accepts_the_file() -> None:
    done = compose(COMPOSE, "-q")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("stop_grace_period: 2m", "stop_grace_periode: 2m"),
        ("healthcheck:", "health_check:"),
        ("valkey: {condition: service_healthy}", "walkey: {condition: service_healthy}"),
        ("volumes: [s3:/data]", "volumes: [s4:/data]"),
        ("profiles: [gpu]", "profiles: gpu"),
    ],
)
def test_compose_refuses_a_mistake(tmp_path: Path, old: str, new: str) -> None:
    assert compose(planted(tmp_path, COMPOSE, old, new), "-q").returncode != 0


@pytest.mark.parametrize("name", SECRETS)
def test_compose_starts_nothing_without_a_secret(name: str) -> None:
    done = compose(COMPOSE, "-q", without=name)
    assert done.returncode != 0
    assert name in done.stderr


def committed_secrets(text: str) -> list[str]:
    """Lines that give a password, key or secret, or a URL with one, other than from a required variable."""
    lines = [line.strip() for line in text.splitlines() if not line.strip().startswith("#")]
    named = [
        line for line in lines if re.search(r"(PASSWORD|_KEY|SECRET|TOKEN|_AUTH)\w*\s*[:=]|://[^/\s]*:[^/\s]*@", line)
    ]
    return [line for line in named if not re.search(r"\$\{[A-Z0-9_]+:\?[^}]*\}", line)]


def test_no_secret_is_committed() -> None:
    assert committed_secrets(COMPOSE.read_text()) == []
    assert committed_secrets(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "POSTGRES_PASSWORD: hunter2",
        "S3_SECRET_KEY: ${S3_SECRET_KEY:-minio}",
        "X: redis://:pw@valkey:6379",
        "ENV API_KEY=1",
    ],
)
def test_a_committed_secret_is_found(line: str) -> None:
    assert committed_secrets(line) == [line]


def test_workers_may_finish_and_gpus_are_asked_for(services: dict[str, Any]) -> None:
    assert services["worker-cpu"]["stop_grace_period"] == services["worker-gpu"]["stop_grace_period"] == "2m0s"
    assert services["worker-gpu"]["profiles"] == ["gpu"]
    (device,) = services["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])
    assert [name for name in services if name.startswith("worker") and services[name]["command"] != ["worker"]] == []


def test_everything_waits_for_what_it_needs(services: dict[str, Any]) -> None:
    for name in ("valkey", "postgres", "s3"):
        assert services[name]["healthcheck"]["test"][0] == "CMD"
    assert services["migrate"]["command"] == ["db", "upgrade"]
    assert services["migrate"]["restart"] == "no"
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    for name in set(OURS) - {"migrate"}:
        conditions = {other: needed["condition"] for other, needed in services[name]["depends_on"].items()}
        healthy = "service_healthy"
        assert conditions == {"migrate": "service_completed_successfully", "valkey": healthy, "s3": healthy}


def test_our_containers_have_no_rights_and_forward_signals(services: dict[str, Any]) -> None:
    for name in OURS:
        assert services[name]["init"] is True
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
        assert services[name]["entrypoint"] is None


def test_no_port_is_open_to_the_host(services: dict[str, Any]) -> None:
    assert [name for name, service in services.items() if service.get("ports") or service.get("network_mode")] == []


def test_the_targets_exist(services: dict[str, Any]) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)", DOCKERFILE.read_text(), re.MULTILINE))
    assert {"producer", "cpu", "gpu"} <= targets
    assert {services[name]["build"]["target"] for name in OURS} == {"producer", "cpu", "gpu"}
    for name in OURS:
        assert (Path(services[name]["build"]["context"]) / services[name]["build"]["dockerfile"]).samefile(DOCKERFILE)


def test_every_image_is_pinned(services: dict[str, Any]) -> None:
    froms = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    images = [name for name in froms if "/" in name or ":" in name]
    images += [service["image"] for name, service in services.items() if name not in OURS]
    assert images
    assert [image for image in images if not re.search(r":[0-9][\w.-]*$", image)] == []


def test_valkey_takes_the_command_line(services: dict[str, Any]) -> None:
    """The real server, with the words that the container gets."""
    program, *words = services["valkey"]["command"]
    assert program == "valkey-server"
    as_in_compose = Valkey(*words)
    as_in_compose.password = "value-of-valkey_password"
    with as_in_compose as server, redis.Redis(HOST, server.port, password=server.password) as client:
        found = client.config_get("maxmemory-policy", "maxmemory", "appendonly")
        assert found == {"maxmemory-policy": "noeviction", "maxmemory": str(512 << 20), "appendonly": "yes"}


def test_seaweedfs_takes_the_command_line(services: dict[str, Any]) -> None:
    """The real server, with the words and variables that the container gets, on ports and folders of the test."""
    assert "-master.telemetry=false" in services["s3"]["command"]

    class AsInCompose(SeaweedFS):
        def _environment(self) -> dict[str, str]:
            return {**super()._environment(), **services["s3"]["environment"]}

        def _command(self) -> list[str]:
            weed, *ours = super()._command()
            own = [word for word in ours[2:] if word.startswith(("-dir", "-ip")) or ".port" in word]
            return [weed, *services["s3"]["command"], *own]

    with_keys = AsInCompose()
    with_keys.access_key, with_keys.secret_key = "value-of-s3_access_key", "value-of-s3_secret_key"
    with with_keys as server:
        # The server makes it after it has begun to answer.
        buckets = lambda: [bucket["Name"] for bucket in server.client().list_buckets()["Buckets"]]  # noqa: E731
        wait_until(lambda: "imagemill" in buckets(), "the bucket of the compose file")
        server.client().put_object(Bucket="imagemill", Key="results/x", Body=b"1")


# --- the Dockerfile ---------------------------------------------------------------------------------------------------


def test_hadolint_accepts_the_dockerfile() -> None:
    done = hadolint(DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('ENTRYPOINT ["imagemill"]', "ENTRYPOINT imagemill"),
        ("FROM python:3.11-slim AS base", "FROM python:latest AS base"),
        ("--no-install-recommends ", ""),
        ("USER 10001", "USER root"),
    ],
)
def test_hadolint_refuses_a_mistake(tmp_path: Path, old: str, new: str) -> None:
    text = planted(tmp_path, DOCKERFILE, old, new)
    if old.startswith("USER"):
        text.write_text(text.read_text().replace(old, new))
    assert hadolint(text).returncode != 0


def stages() -> dict[str, list[str]]:
    """The instructions of each stage, those of the stages it builds on first, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[str]] = {}
    name = ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if start := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            name = start[2]
            found[name] = list(found.get(start[1], []))
        else:
            found[name].append(line)
    return found


@pytest.mark.parametrize(("target", "command"), [("producer", ["--help"]), ("cpu", ["worker"]), ("gpu", ["worker"])])
def test_each_target_runs_imagemill_as_an_ordinary_user(target: str, command: list[str]) -> None:
    lines = stages()[target]
    last = {line.split(" ", 1)[0]: line.split(" ", 1)[1] for line in lines}
    assert json.loads(last["ENTRYPOINT"]) == ["imagemill"]
    assert json.loads(last["CMD"]) == command
    assert last["STOPSIGNAL"] == "SIGTERM"
    assert last["USER"] == "10001"
    assert "RUN" not in [line.split()[0] for line in lines[lines.index("USER 10001") :]]


def test_every_library_is_installed_with_the_pins() -> None:
    installs = [line for lines in stages().values() for line in lines if "pip install" in line]
    assert installs
    assert [line for line in installs if "constraints.txt" not in line and "--no-deps" not in line] == []


@pytest.mark.parametrize(
    ("extras", "has", "lacks"),
    [
        ("", "celery", "torch"),
        ("worker,models,onnx", "torch", "tensorrt"),
        ("worker,models,gpu", "tensorrt", "onnxruntime"),
    ],
)
def test_requirements_of_each_image(extras: str, has: str, lacks: str) -> None:
    assert f"requirements.py {extras or repr('')}".replace("'", '"') in DOCKERFILE.read_text()
    command = [sys.executable, DOCKER / "requirements.py", extras]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    names = {re.split(r"[^\w.-]", line)[0] for line in lines}
    assert has in names
    assert lacks not in names


# --- what they call ---------------------------------------------------------------------------------------------------


def commands_used(services: dict[str, Any]) -> set[tuple[str, ...]]:
    """The words after `imagemill` in the Dockerfile, the compose file and their README."""
    arrays = [json.loads(found) for found in re.findall(r"CMD (\[.*\])", DOCKERFILE.read_text())]
    calls = [words[1:] if words[0] == "imagemill" else words for words in arrays]
    calls += [services[name]["command"] for name in OURS]
    blocks = re.findall(r"```sh\n(.*?)```", (DOCKER / "README.md").read_text(), re.DOTALL)
    calls += [line.split() for block in blocks for line in re.findall(r" imagemill ([a-z].*)", block)]
    return {tuple(word for word in words if not word.startswith("-")) for words in calls}


def missing_command(root: click.Command, words: tuple[str, ...]) -> bool:
    """Whether a path of command names does not exist."""
    command = root
    for word in words:
        if not isinstance(command, click.Group):
            return False
        found = command.get_command(click.Context(command), word)
        if found is None:
            return True
        command = found
    return isinstance(command, click.Group) and words != ()


def test_every_command_exists(services: dict[str, Any]) -> None:
    from cli import cli

    used = commands_used(services)
    assert {("worker",), ("reconcile",), ("db", "upgrade"), ("doctor",)} <= used
    assert [words for words in used if missing_command(cli, words)] == []
    assert missing_command(cli, ("no-such-command",))


def unknown_settings(text: str) -> set[str]:
    """IMAGEMILL_ variables of a text that imagemill does not read."""
    from storage.settings import Settings

    return {name for name in re.findall(r"IMAGEMILL_([A-Z0-9_]+)", text) if name.lower() not in Settings.model_fields}


def test_every_setting_exists() -> None:
    files = [path for path in DOCKER.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    text = "\n".join(path.read_text() for path in files)
    assert "IMAGEMILL_BROKER_URL" in text
    assert unknown_settings(text) == set()
    assert unknown_settings("IMAGEMILL_REDIS_URL: x") == {"REDIS_URL"}


def test_the_readme_says_that_no_engine_has_run_them() -> None:
    assert "No container engine has run these files" in (DOCKER / "README.md").read_text()


def test_compose_names_variables_that_yaml_keeps_as_text() -> None:
    """`restart: no` without quotes is the boolean false, which compose refuses only sometimes."""
    assert yaml.safe_load(COMPOSE.read_text())["services"]["migrate"]["restart"] == "no"
