"""Checks and times on a GPU everything that is meant for one; without a GPU it runs the same code on the CPU.

    python -P benchmarks/gpu.py [--quick] [--only decode,yolo] [--out FILE.md]

Runs from a bare checkout with torch 2.11 or newer and whatever else is installed. What is not installed is left out,
and that is said. Each section is a process of its own, so that one that fails, or takes its process with it, stops no
other; the exit code is then 1. A whole run on a GPU writes benchmarks/RESULTS-GPU.md as it goes; a quick or partial
one, and any on the CPU, writes only where --out says.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common

RESULTS = common.HERE / "RESULTS-GPU.md"
MACHINE = "machine"
ON_GPU = "- GPU: "  # begins a line of the section "machine" where there is one

# name -> what it tells; the names of files in gpu_sections/
SECTIONS = {
    MACHINE: "The machine",
    "decode": "Decoding JPEGs",
    "precisions": "The demo's detector in each precision against fp32 on the CPU",
    "yolo": "YOLO at 640, the network alone",
    "dinov2": "DINOv2, the network alone",
    "sam": "Segment Anything: encoder, and box prompts",
    "unet": "Steps of a UNet of Stable Diffusion 1.5's size",
    "runtimes": "Other runtimes against torch",
    "end_to_end": "From files to committed results",
    "out_of_memory": "When the device's memory runs out",
    "pinning": "One pinned process a device",
}


def main() -> int:
    """Run the sections, or in a child the one that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to see that it runs, not how fast")
    parser.add_argument("--only", default="", help=f"of these sections, with commas between: {', '.join(SECTIONS)}")
    parser.add_argument("--out", type=Path, help="write the report here")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)  # the child
    arguments = parser.parse_args()
    if arguments.section:
        from benchmarks.gpu_sections import bench

        return bench.main(arguments.section, quick=arguments.quick)
    chosen = [name.strip() for name in arguments.only.split(",") if name.strip()] or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"unknown section {unknown[0]!r}; known: {', '.join(SECTIONS)}")
    whole = not arguments.quick and not arguments.only
    return run(chosen, quick=arguments.quick, out=arguments.out, whole=whole)


def run(chosen: Sequence[str], *, quick: bool, out: Path | None, whole: bool) -> int:
    """Run sections one after the other.

    Args:
        out: where to write the report, None for RESULTS-GPU.md after a whole run on a GPU and nowhere otherwise.

    Returns:
        1 when a section failed, else 0.
    """
    lines: list[str] = [f"# {'A quick try, no measurement' if quick else 'Measured'} by benchmarks/gpu.py"]
    print(lines[0], flush=True)
    failed = []
    for name in dict.fromkeys([MACHINE, *chosen]):
        lines += said(f"\n## {SECTIONS[name]}\n")
        started = time.monotonic()
        if not section(name, quick, lines):
            failed.append(name)
        lines += said(f"\n({time.monotonic() - started:.0f} s)")
        if out is None and whole and any(line.startswith(ON_GPU) for line in lines):
            out = RESULTS
        if out is not None:  # after each section, so that a run that is cut off leaves what it has
            out.write_text("\n".join(lines) + "\n")
    lines += said(f"\nFailed: {', '.join(failed)}" if failed else "\nNo section failed.")
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
    return 1 if failed else 0


def said(text: str) -> list[str]:
    """Print lines; the same lines."""
    print(text, flush=True)
    return text.split("\n")


def section(name: str, quick: bool, lines: list[str]) -> bool:
    """Run one section in a child, add what it says to the lines; whether it did not fail."""
    with tempfile.TemporaryDirectory(prefix="imagemill-gpu-") as folder:
        env = {**common.environment(), "YOLO_CONFIG_DIR": folder, "TMPDIR": folder}
        with (Path(folder) / "stderr").open("w+") as errors:
            child = subprocess.Popen(command(name, quick), env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
            assert child.stdout is not None
            for line in child.stdout:
                lines += said(line.rstrip("\n"))
            code = child.wait()
            errors.seek(0)
            complaint = common.last_line(errors.read())
    if code and code != common.LEFT_OUT and not any(line.startswith("FAILED") for line in lines[-3:]):
        lines += said(f"FAILED: ended with {code}: {complaint[:300]}")
    return code in (0, common.LEFT_OUT)


def command(name: str, quick: bool) -> list[str]:
    """Of the child that runs a section."""
    return [sys.executable, "-P", os.fspath(Path(__file__).resolve()), "--section", name, *["--quick"] * quick]


if __name__ == "__main__":
    sys.exit(main())
