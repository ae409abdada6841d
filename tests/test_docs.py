"""Lists that must agree: commands and settings with the README, the changelog with the version, cards with kinds."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import click
import pytest

from cli import cli
from storage import results
from storage.settings import Settings
from workers import models

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def commands(group: click.Group, prefix: str = "") -> list[tuple[str, click.Command]]:
    """Every command with its full name."""
    found = []
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found += commands(command, f"{prefix}{name} ")
        else:
            found.append((prefix + name, command))
    return found


@pytest.mark.parametrize(("name", "command"), commands(cli), ids=lambda value: value if isinstance(value, str) else "")
def test_every_command_has_help_and_stands_in_the_readme(name: str, command: click.Command) -> None:
    assert command.help, f"{name} has no help"
    assert f"`imagemill {name}" in README or f"`{name}`" in README


@pytest.mark.parametrize("field", sorted(Settings.model_fields))
def test_every_setting_is_described_and_stands_in_the_readme(field: str) -> None:
    assert Settings.model_fields[field].description
    assert f"`IMAGEMILL_{field.upper()}`" in README


def test_the_readme_names_no_setting_that_nobody_reads() -> None:
    import re

    named = set(re.findall(r"`IMAGEMILL_([A-Z0-9_]+)`", README))
    assert named == {name.upper() for name in Settings.model_fields}


def test_the_changelog_knows_this_version() -> None:
    assert f"## {version('imagemill')}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_card_yields_a_kind_that_exists() -> None:
    assert {card.kind for card in models.cards()} <= set(results.names())


def test_every_python_file_says_in_its_first_line_what_it_knows() -> None:
    import ast
    import subprocess

    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert files
    silent = [name for name in files if not ast.get_docstring(ast.parse((ROOT / name).read_text()))]
    assert not silent
