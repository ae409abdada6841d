"""The one rule, checked: who may import whom, and that the checks themselves can fail."""

from __future__ import annotations

import ast
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import SCRIPTS

ROOT = Path(__file__).parents[1]
PACKAGES = ("jobs", "storage", "workers")
WITHOUT_INIT = ("tests", "migrations", "docker", "demo", "benchmarks")
HEAVY = ("torch", "torchvision", "cv2", "PIL", "ultralytics", "onnxruntime", "transformers", "timm", "diffusers")
IMPORT_ALL = f"""
import importlib, pkgutil, sys
for package in {{packages}}:
    importlib.import_module(package)
    for module in pkgutil.walk_packages([package], package + "."):
        importlib.import_module(module.name)
print(*sorted(set({HEAVY!r}) & sys.modules.keys()))
"""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter over the packages in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [SCRIPTS / "lint-imports", "--config", folder / "pyproject.toml", "--no-cache"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The packages and their rules, free to be broken."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def plant(path: Path, line: str) -> None:
    """Add a line of code to a module, making the module where there is none."""
    text = path.read_text() if path.exists() else ""
    path.write_text(f"{text}\n{line}\n")


def two_plugins(folder: Path) -> tuple[Path, str]:
    """One plug-in's file, and the module name of another beside it."""
    for name in ("one", "two"):
        plant(folder / f"planted_{name}.py", "")
    package = ".".join(folder.parts[-2:])
    return folder / "planted_one.py", f"{package}.planted_two"


def test_the_tree_keeps_the_rules() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_copy_keeps_the_rules(copy: Path) -> None:
    """Otherwise a planted violation would prove nothing."""
    done = lint_imports(copy)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("storage/errors.py", "import jobs.states", "storage <- jobs <- workers"),
        ("jobs/states.py", "from workers import models", "storage <- jobs <- workers"),
        ("jobs/states.py", "def late():\n    import workers.models", "storage <- jobs <- workers"),
        ("jobs/plan.py", "import torch", "heavy libraries stay in workers"),
        ("jobs/plan.py", "def late():\n    import PIL.Image", "heavy libraries stay in workers"),
        ("storage/errors.py", "from ultralytics import YOLO", "heavy libraries stay in workers"),
        ("storage/tables.py", "import celery", "storage knows no Celery"),
        ("jobs/states.py", "import sqlalchemy", "pure modules import nothing of the house"),
    ],
)
def test_a_forbidden_import_is_found(copy: Path, module: str, line: str, contract: str) -> None:
    plant(copy / module, line)
    done = lint_imports(copy)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in done.stdout
    assert done.stdout.count(" BROKEN") == 1


@pytest.mark.parametrize(
    ("folder", "contract"),
    [
        ("workers/models", "model families are independent"),
        ("workers/runtimes", "runtimes are independent"),
        ("jobs/sources", "sources are independent"),
        ("storage/results", "result kinds are independent"),
        ("storage/exporters", "exporters are independent"),
    ],
)
def test_a_plugin_that_imports_its_sibling_is_found(copy: Path, folder: str, contract: str) -> None:
    path, sibling = two_plugins(copy / folder)
    plant(path, f"import {sibling}")
    done = lint_imports(copy)
    assert done.returncode == 1
    assert f"{contract} BROKEN" in done.stdout


def imports_of(path: Path) -> set[str]:
    """Top-level names that a file imports anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


def importers_of_cli(root: Path) -> list[str]:
    """Files of the packages and migrations that import cli."""
    files = [path for folder in (*PACKAGES, "migrations") for path in sorted((root / folder).rglob("*.py"))]
    return [str(path.relative_to(root)) for path in files if "cli" in imports_of(path)]


def test_nothing_imports_cli() -> None:
    assert importers_of_cli(ROOT) == []


@pytest.mark.parametrize("line", ["import cli", "from cli import main", "def late():\n    import cli as c"])
def test_an_import_of_cli_is_found(copy: Path, line: str) -> None:
    plant(copy / "jobs" / "states.py", line)
    assert importers_of_cli(copy) == ["jobs/states.py"]


def test_folders_that_are_no_packages_have_no_init() -> None:
    assert [path for name in WITHOUT_INIT for path in (ROOT / name).rglob("__init__.py")] == []


def test_folders_that_are_packages_have_an_init() -> None:
    """A folder without one would be left out of the wheel and of every check above."""
    folders = {path.parent for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert [folder for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def heavy_after_importing(root: Path, *packages: str) -> list[str]:
    """Heavy libraries that importing every module of some packages has imported."""
    code = IMPORT_ALL.format(packages=packages)
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_producer_imports_nothing_heavy() -> None:
    assert heavy_after_importing(ROOT, "storage", "jobs") == []


def test_a_heavy_import_of_a_producer_is_found(copy: Path) -> None:
    plant(copy / "storage" / "errors.py", "import PIL.Image")
    assert heavy_after_importing(copy, "storage", "jobs") == ["PIL"]


def modules_after(*command: str) -> set[str]:
    """Top-level modules that the console script has imported, as Python's own trace names them."""
    environment = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(
        [SCRIPTS / "imagemill", *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}


def test_help_imports_nothing_heavy() -> None:
    imported = modules_after("--help")
    assert {"cli", "click"} <= imported
    slow = {*HEAVY, "sqlalchemy", "celery", "kombu", "boto3", "botocore", "pyarrow", "numpy", "redis", "alembic"}
    assert imported & slow == set()


def test_help_is_quick() -> None:
    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([SCRIPTS / "imagemill", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # What it computes, since what else this machine is doing is no fault of it.
    assert min(once() for _ in range(5)) < 0.5
