"""How fast a producer plans a manifest of a million lines, fresh and again, and how much memory it takes at most.

    python -P benchmarks/plan_manifest.py [--lines 1000000] [--database postgresql://...]

The second pass finds every line known: results are put into the index by hand, as workers would have done.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_CHILD = """
import json, resource, sys, time
from jobs import lifecycle, plan
from jobs.spec import JobSpec
from storage import migrate
from storage.database import Database
from storage.objects import open_store
from storage.settings import load

settings = load()
db = Database(settings.database)
migrate.upgrade(db)
store = open_store(settings.store, settings)
spec = JobSpec(dataset=sys.argv[1], kind="detections", family="stub", weights_sha256="", params={}, model="stub")
job, _ = lifecycle.submit(db, spec)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.monotonic()
report = plan.plan(db, store, settings, job)
seconds = time.monotonic() - started
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"job": job.id, "listed": report.listed, "planned": report.planned, "fresh": report.fresh,
                  "seconds": seconds, "before_mb": before / 1024, "peak_mb": peak / 1024}))
"""

_FILL = """
import sys
from jobs import leases, lifecycle
from storage import shardfile
from storage.database import Database
from storage.objects import open_store
from storage.results import detections
from storage.settings import load
from storage.shardfile import Outcome

settings = load()
db = Database(settings.database)
store = open_store(settings.store, settings)
leases.register(db, "fill", name="fill", host="fill", device="cpu", queue="cpu", pid=1, version="0")
while (claim := leases.claim(db, "fill", "cpu", None)) is not None:
    rows = shardfile.read_manifest(store, claim.manifest_key)
    outcomes = [Outcome(i, *row[:3], 1, 1, detections.empty(), None) for i, row in enumerate(rows)]
    leases.commit(db, claim, "fill", shardfile.Written("none", "0", 0), outcomes)
print(lifecycle.finish(db, int(sys.argv[1])))
"""


def main() -> None:
    """Write the manifest, plan it twice in fresh processes, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--database", default="")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-plan-") as folder:
        manifest = Path(folder) / "million.txt"
        with manifest.open("w") as file:
            file.writelines(f"s3://bucket/photos/{i // 1000:05d}/image-{i:08d}.jpg\n" for i in range(arguments.lines))
        environment = {**os.environ, "IMAGEMILL_HOME": folder, "IMAGEMILL_DATABASE_URL": arguments.database}
        first = json.loads(_python(environment, _CHILD, str(manifest)))
        started = time.monotonic()
        _python(environment, _FILL, str(first["job"]))
        filled = time.monotonic() - started
        second = json.loads(_python(environment, _CHILD, str(manifest)))
    if arguments.json:
        print(json.dumps({"first": first, "second": second}))
        return
    for name, run in (("first", first), ("again", second)):
        print(
            f"{name}: listed {run['listed']}, {run['fresh']} fresh, {run['planned']} planned "
            f"in {run['seconds']:.1f} s = {run['listed'] / run['seconds']:.0f} images/s; "
            f"peak memory {run['peak_mb']:.0f} MB ({run['before_mb']:.0f} MB before planning)"
        )
    print(f"rows put into the index between the two: {arguments.lines / filled:.0f} items/s")


def _python(environment: dict[str, str], code: str, argument: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, argument], env=environment, text=True, stdout=subprocess.PIPE, check=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
