"""Runs every benchmark of this folder that needs nothing but this machine, one after another.

    make bench        (or: python -P benchmarks/run.py [name ...])

Each is a script that can be run by itself; what it measures and how stands in its first lines. Figures of a shared or
noisy machine mean nothing by themselves: compare within one run, quote ratios.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
LEFT_OUT = {"run.py", "gpu.py"}  # gpu.py wants a GPU


def main() -> int:
    """Run the named benchmarks, or all; exit code 1 when one of them fails."""
    wanted = sys.argv[1:] or sorted(path.stem for path in HERE.glob("*.py") if path.name not in LEFT_OUT)
    load = f"load {os.getloadavg()[0]:.1f}"
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, {load}")
    failed = []
    for name in wanted:
        print(f"\n== {name}", flush=True)
        if subprocess.run([sys.executable, "-P", str(HERE / f"{name}.py")], env=_environment(), check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE.parent)}


if __name__ == "__main__":
    sys.exit(main())
