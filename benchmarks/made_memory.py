"""The most memory a worker takes for images that it makes, by how many of them are in a shard.

    python -P benchmarks/made_memory.py [--pictures 600] [--shard-sizes 64,600] [--model resize]

Each shard size has a worker of its own. What was made takes several hundred megabytes as PNG; a worker that held a
shard's images until its commit would need them on top of what it needs for the smallest shard.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import workloads
from benchmarks.memory import Sampler
from benchmarks.mill import Mill


def main() -> None:
    """One job a shard size, each in a home of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=600)
    parser.add_argument("--shard-sizes", default="64,600")
    parser.add_argument("--model", default="resize", help="a model of imagemill transform")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-made-") as name:
        folder = Path(name)
        (folder / "pictures").mkdir()
        for i in range(arguments.pictures):
            (folder / "pictures" / f"{i:05d}.jpg").write_bytes(workloads.jpeg(i))
        for shard_size in map(int, arguments.shard_sizes.split(",")):
            home = folder / f"home-{shard_size}"
            with Mill(home) as mill, Sampler(mill.pid, 0.05) as sampler:
                figures = mill.job("image", folder / "pictures", arguments.model, shard_size=shard_size)
            made = sum(path.stat().st_size for path in (home / "store" / "jobs").rglob("blobs/*")) / 1e6
            said = f"{arguments.pictures} pictures in shards of {shard_size}: {made:.0f} MB made"
            print(f"{said}, {figures['rate']:.1f} a second, worker at most {max(sampler.worker_mb):.0f} MB", flush=True)


if __name__ == "__main__":
    main()
