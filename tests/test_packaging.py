"""What is shipped: the wheel's content, an installation that nothing shadows, and pins that name no registry."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("jobs", "storage", "workers")
# Extras whose libraries only machines with such a device install, so that no test run can tell their pins.
DEVICE_EXTRAS = ("gpu",)
# Written in two parts: this file is searched as well.
REGISTRY_HOSTS = tuple(
    name + rest
    for name, rest in [
        ("py", "pi.org"),
        ("py", "thonhosted.org"),
        ("download.py", "torch.org"),
        ("pypi.ng", "c.nvidia.com"),
        ("npm", "js.org"),
        ("npm", "js.com"),
        ("yarn", "pkg.com"),
        ("ana", "conda.org"),
        ("crates", ".io"),
        ("rubygems", ".org"),
        ("proxy.golang", ".org"),
    ]
)
LOCK_FILES = {"uv.lock", "poetry.lock", "pdm.lock", "package-lock.json", "yarn.lock", "pnpm-lock.yaml", "pylock.toml"}


def pins() -> dict[str, str]:
    """Version of each pinned library, by its canonical name."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines)}


def direct_requirements() -> list[Requirement]:
    """What pyproject asks for: to build, to run, and for every extra but those of special devices."""
    extras = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    lines += [line for name, group in extras.items() if name not in DEVICE_EXTRAS for line in group]
    return [Requirement(line) for line in lines]


def needed() -> set[str]:
    """Every library that pyproject's requirements lead to, as far as it is installed here."""
    todo, seen = direct_requirements(), set()
    while todo:
        requirement = todo.pop()
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key not in seen:
                todo += requirements_of(*key)
                seen.add(key)
    return {name for name, _ in seen if is_installed(name)}


def requirements_of(name: str, extra: str) -> list[Requirement]:
    """What an installed library asks for on this machine, with one of its extras ("" for none)."""
    lines = (importlib.metadata.distribution(name).requires or []) if is_installed(name) else []
    found = map(Requirement, lines)
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": extra})]


def is_installed(name: str) -> bool:
    """Whether this environment has a library."""
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def shipped_files() -> list[Path]:
    """Every file of the repository that git tracks or would take; every file where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if (ROOT / ".git").exists() and shutil.which("git"):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]


# --- the pins ---------------------------------------------------------------------------------------------------------


def test_every_pin_is_a_name_and_a_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[0-9][0-9a-z.]*", line)] == []
    assert lines == sorted(set(lines))
    assert len(pins()) == len(lines)


def test_every_direct_requirement_is_pinned_to_a_version_it_allows() -> None:
    found = pins()
    names = {canonicalize_name(requirement.name): requirement for requirement in direct_requirements()}
    assert sorted(names.keys() - found.keys()) == []
    wrong = [f"{r} but {found[name]}" for name, r in names.items() if not r.specifier.contains(found[name])]
    assert wrong == []


def test_every_library_they_lead_to_is_pinned() -> None:
    assert sorted(needed() - pins().keys()) == []


def test_no_pin_is_a_leftover() -> None:
    """A pinned library that is installed here must be needed by something."""
    installed = {name for name in pins() if is_installed(name)}
    assert sorted(installed - needed()) == []


def test_the_build_requirements_come_with_the_dev_extra() -> None:
    """Tests build the wheel without isolation, so that they need no network."""
    dev = {canonicalize_name(Requirement(line).name) for line in PROJECT["project"]["optional-dependencies"]["dev"]}
    assert {canonicalize_name(Requirement(line).name) for line in PROJECT["build-system"]["requires"]} <= dev


def registry_hosts_in(text: str) -> list[str]:
    """The package registries that a text names; torchvision's weights lie on the host of its wheels, under /models/."""
    text = text.lower().replace("https://download.pytorch.org/models/", "")
    return [host for host in REGISTRY_HOSTS if host in text]


def test_no_file_names_a_package_registry() -> None:
    found = {
        str(path.relative_to(ROOT)): registry_hosts_in(path.read_text(errors="replace")) for path in shipped_files()
    }
    assert {path: hosts for path, hosts in found.items() if hosts} == {}


def test_a_registry_is_recognised() -> None:
    assert registry_hosts_in("https://Files.Py" + "thonHosted.org/packages/x.whl") == [REGISTRY_HOSTS[1]]


def test_no_lock_file_that_records_registries() -> None:
    assert [path for path in shipped_files() if path.name in LOCK_FILES] == []


def test_the_changelog_mentions_this_version() -> None:
    version = re.escape(PROJECT["project"]["version"])
    assert re.search(rf"^## .*\b{version}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


# --- the wheel --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the repository's files."""
    folder = tmp_path_factory.mktemp("build")
    for path in shipped_files():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "out", folder]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = (folder / "out").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed, without what it needs."""
    folder = tmp_path_factory.mktemp("target")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def names_in(wheel: Path) -> list[str]:
    """Paths of the files in a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_fixed_names_and_no_other(wheel: Path) -> None:
    label = f"imagemill-{PROJECT['project']['version']}"
    expected = {"cli.py", *PACKAGES, f"{label}.dist-info", f"{label}.data"}
    assert {name.split("/")[0] for name in names_in(wheel)} == expected


def test_the_wheel_holds_every_file_of_the_packages(wheel: Path) -> None:
    files = [path.relative_to(ROOT) for path in shipped_files()]
    expected = {path.as_posix() for path in files if path.parts[0] in PACKAGES}
    assert {name for name in names_in(wheel) if name.split("/")[0] in PACKAGES} == expected


def test_the_wheel_holds_the_migrations(wheel: Path) -> None:
    folder = f"imagemill-{PROJECT['project']['version']}.data/data/share/imagemill/migrations/"
    files = [
        path.relative_to(ROOT / "migrations") for path in shipped_files() if path.is_relative_to(ROOT / "migrations")
    ]
    assert any(path.match("versions/*.py") for path in files)
    assert {name.removeprefix(folder) for name in names_in(wheel) if ".data/" in name} == {p.as_posix() for p in files}


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder such as a user may stand in, with packages of the same names as ours."""
    for name in (*PACKAGES, "cli"):
        (tmp_path / "here" / name).mkdir(parents=True)
        (tmp_path / "here" / name / "__init__.py").write_text(f"raise SystemExit('a stranger: {name}')\n")
    return tmp_path / "here"


def run(installed: Path, folder: Path, *command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed wheel on its path, standing in a folder."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_a_console_script_finds_our_packages_in_a_foreign_folder(installed: Path, foreign: Path) -> None:
    script = installed / "bin" / "where"
    script.write_text(
        f"import {', '.join(('cli', *PACKAGES))}\nprint(cli.__file__, *(m.__file__ for m in (jobs, storage, workers)))"
    )
    done = run(installed, foreign, script)
    assert done.returncode == 0, done.stderr
    assert all(Path(word).is_relative_to(installed) for word in done.stdout.split())
    assert len(done.stdout.split()) == 4


def test_the_console_script_of_the_wheel_runs_in_a_foreign_folder(installed: Path, foreign: Path) -> None:
    done = run(installed, foreign, installed / "bin" / "imagemill", "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: imagemill" in done.stdout


def test_python_m_would_find_the_stranger(installed: Path, foreign: Path) -> None:
    """Otherwise the two tests above would prove nothing; it is also why nothing here is run with -m."""
    assert "a stranger: storage" in run(installed, foreign, "-c", "import storage").stderr


def test_the_code_in_the_wheel_is_complete(installed: Path, tmp_path: Path) -> None:
    """Every module of the light packages imports from the installed copy, far from the checkout."""
    code = (
        "import importlib, pkgutil, storage, jobs\n"
        "for package in (storage, jobs):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        print(importlib.import_module(module.name).__file__)\n"
    )
    done = run(installed, tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(installed) for line in done.stdout.splitlines())
