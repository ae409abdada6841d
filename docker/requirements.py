"""Prints what pyproject.toml asks for, with some extras, one requirement a line: python requirements.py worker,onnx."""

import sys
import tomllib
from pathlib import Path
from typing import Any


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """The base's requirements and those of the extras. Raises KeyError for an extra that does not exist."""
    return [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]


if __name__ == "__main__":
    found = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    print("\n".join(requirements(found, [extra for extra in sys.argv[1].split(",") if extra])))
