"""Whether a worker's memory stays flat: stub items through one worker, its resident memory sampled all the while.

    python -P benchmarks/memory.py [--items 1000000] [--no-pictures] [--warm 0.1] [--tolerance 0.05]

The items are all one tiny picture, or no picture at all, so that nothing but imagemill's own machinery is exercised.
Exit code 1 when the memory after the warm-up rises by more than the tolerance.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workloads
from benchmarks.mill import Mill


def main() -> int:
    """Run the job, sample, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--no-pictures", action="store_true", help="minutes instead of a quarter of an hour")
    parser.add_argument("--shard-size", type=int, default=1024)
    parser.add_argument("--warm", type=float, default=0.1, help="share of the time that is not judged, 0..1")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--seconds", type=float, default=1, help="between two samples")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-memory-") as name:
        folder = Path(name)
        (folder / "tiny.ppm").write_bytes(workloads.TINY_PPM)
        if arguments.no_pictures:
            dataset = f"prompts:{workloads.write_prompts(folder / 'items.txt', arguments.items)}"
        else:
            dataset = str(workloads.write_manifest(folder / "items.csv", [folder / "tiny.ppm"], arguments.items))
        few = workloads.write_manifest(folder / "few.csv", [folder / "tiny.ppm"], 2000)
        with Mill(folder / "home") as mill:
            mill.job("detections", few, "stub")
            with Sampler(mill.pid, arguments.seconds) as sampler:
                figures = mill.job("detections", dataset, "stub", shard_size=arguments.shard_size, batch=256)
    first, last, rise = judged(sampler.worker_mb, arguments.warm)
    print(f"{arguments.items} items, {figures['rate']:.0f} items/s, {len(sampler.worker_mb)} samples")
    print(f"worker: {first:.0f} MB after the warm-up, {last:.0f} MB at the end, {rise:+.1%}")
    print(f"all processes of imagemill up, the most at once: {max(sampler.all_mb):.0f} MB")
    print(
        "over time, MB:", " ".join(f"{size:.0f}" for size in sampler.worker_mb[:: max(1, len(sampler.worker_mb) // 20)])
    )
    flat = rise <= arguments.tolerance
    print("flat" if flat else f"not flat: it rises by more than {arguments.tolerance:.0%}")
    return 0 if flat else 1


def judged(samples: Sequence[float], warm: float) -> tuple[float, float, float]:
    """(megabytes after the warm-up, at the end, relative rise): medians of the first and last fifth after it."""
    rest = samples[int(len(samples) * warm) :]
    if len(rest) < 2:
        raise SystemExit("too few samples to judge; take more items, or fewer seconds between samples")
    fifth = max(1, len(rest) // 5)
    first, last = statistics.median(rest[:fifth]), statistics.median(rest[-fifth:])
    return first, last, last / first - 1


class Sampler:
    """Reads the resident memory of a process tree, again and again, while it is entered.

    Attributes:
        worker_mb: of the largest process below the one given, which is the worker, in megabytes.
        all_mb: of all of them together; pages that they share are counted more than once.
    """

    def __init__(self, pid: int, seconds: float) -> None:
        self._pid, self._seconds = pid, seconds
        self.worker_mb: list[float] = []
        self.all_mb: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        import psutil

        root = psutil.Process(self._pid)
        while not self._ended.is_set():
            sizes = []
            for process in root.children(recursive=True):
                try:
                    sizes.append(process.memory_info().rss / 1e6)
                except psutil.NoSuchProcess:
                    continue
            if sizes:
                self.worker_mb.append(max(sizes))
                self.all_mb.append(sum(sizes) + root.memory_info().rss / 1e6)
            self._ended.wait(self._seconds)


if __name__ == "__main__":
    sys.exit(main())
