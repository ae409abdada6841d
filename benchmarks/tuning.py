"""Whether tuning picks the fastest way: what it picks, and what it costs, beside every way measured at length.

    python -P benchmarks/tuning.py [--workload yolov8n] [--rounds 5] [--seconds 2]
    python -P benchmarks/tuning.py --weights demo/shapes-yolov8.pt --pictures FOLDER

Tuning is given the time a worker gives it (IMAGEMILL_TUNE_SECONDS), with nothing built before. Then each way that may
be taken, at every batch, is measured in interleaved rounds. The workloads' detectors have random weights and find
nothing, and nothing found is no evidence for bf16: trained ones show the choice among all precisions. Exit code 1 when
what it picked is slower than the fastest by more than the tolerance, or when it took longer than it may.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, workloads


def main() -> int:
    """Tune as a worker does, measure everything, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("yolov8n", "dinov2", "timm", "yolos"), default="yolov8n")
    parser.add_argument("--weights", type=Path, help="a checkpoint instead of the workload's, for the same task")
    parser.add_argument("--pictures", type=Path, help="a folder of JPEGs instead of the workload's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="for each way in each round")
    parser.add_argument("--tolerance", type=float, default=0.1, help="what two runs of one way may differ by here")
    parser.add_argument("--most", type=float, default=15, help="seconds that tuning may take")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="imagemill-tuning-") as name:
        folder = Path(name)
        made = folder / "made"
        common.child("workloads.py", str(made), "--pictures", str(workloads.DISTINCT))
        os.environ["IMAGEMILL_HOME"] = str(folder / "home")
        _, kind, weights = workloads.WORKLOADS[arguments.workload]
        weights_path, pictures = arguments.weights or made / weights, arguments.pictures or made / "pictures"
        return _judge(_spec(pictures, kind, weights_path), pictures, arguments)


def _judge(spec: Any, pictures: Path, arguments: argparse.Namespace) -> int:
    from storage import settings as settings_module
    from storage.objects import open_store
    from workers import loaded, tuning

    settings = settings_module.load()
    models = loaded.Models(open_store(settings.store, settings), settings, "cpu")
    models.get(tuning.plain(spec, "cpu"))  # a worker has it before it measures anything
    started = time.perf_counter()
    reference = models.apart(tuning.reference(tuning.plain(spec, "cpu")))
    prepared = _prepared(pictures, reference.model)
    work = tuning.Tuning(spec, "cpu", models.apart, lambda one: print(f"  {tuning.shown(one)}"), settings.tune_seconds)
    work.refer(reference.model, prepared)
    choice = work.run()
    took_s = time.perf_counter() - started
    assert choice is not None
    print(f"picked {choice.runtime} {choice.precision}, batch {choice.batch}, in {took_s:.1f} s: {choice.why}")
    refused = {(one.runtime, one.precision) for one in work.found if not _may_be_taken(one)}
    rates = _exhaustive(spec, models, prepared, refused, arguments)
    best = max(rates, key=lambda way: rates[way])
    picked = rates[choice.runtime, choice.precision, choice.batch]
    for way, rate in sorted(rates.items(), key=lambda pair: -pair[1]):
        print(f"  {' '.join(map(str, way)):<24} {rate:7.1f} items/s")
    print(f"what was picked is {picked / rates[best]:.3f} of the fastest, {' '.join(map(str, best))}")
    good = picked >= (1 - arguments.tolerance) * rates[best] and took_s <= arguments.most
    print("good" if good else "not good")
    return 0 if good else 1


def _may_be_taken(measured: Any) -> bool:
    """Whether it is admitted, or would be if there had been time to measure it."""
    from workers import tuning

    if not measured.rate:
        return measured.agreement is None
    return tuning.fastest([measured]) is not None


def _exhaustive(
    spec: Any, models: Any, pictures: Sequence[Any], refused: set[tuple[str, str]], arguments: argparse.Namespace
) -> dict[tuple[str, str, int], float]:
    """Median items a second of (runtime, precision, batch), of all that may be taken."""
    from jobs.choices import Choice
    from workers import batches, tuning

    ways = [pair for pair in tuning.candidates(spec, "cpu") if pair not in refused]
    found: dict[tuple[str, str, int], list[float]] = {}
    for _ in range(arguments.rounds):
        for runtime, precision in ways:
            for batch in (tuning.USUAL_BATCH["cpu"], *tuning.OTHER_BATCHES["cpu"]):
                model = models.apart(tuning.chosen(spec, Choice(runtime, precision, batch))).model
                size = batches.BatchSize(batch)
                infer = lambda model=model, size=size, batch=batch: batches.infer(model, pictures[:batch], size)  # noqa: E731
                infer()
                started, count = time.perf_counter(), 0
                while time.perf_counter() - started < arguments.seconds:
                    count += len(infer())
                found.setdefault((runtime, precision, batch), []).append(count / (time.perf_counter() - started))
                model.close()
    return {way: statistics.median(rates) for way, rates in found.items()}


def _spec(pictures: Path, kind: str, weights: Path) -> Any:
    """What a job over the pictures would be asked to do, with everything left open."""
    from storage import migrate
    from storage import settings as settings_module
    from storage.database import Database
    from storage.objects import open_store
    from workers import submit

    settings = settings_module.load()
    db = Database(settings.database)
    migrate.upgrade(db)
    try:
        return submit.resolve(
            db,
            open_store(settings.store, settings),
            settings,
            dataset=str(pictures),
            kind=kind,
            model=str(weights),
            params={},
            on_download=lambda name, done, total: None,
            device="cpu",
        )
    finally:
        db.close()


def _prepared(folder: Path, model: Any) -> list[Any]:
    from workers import images, tuning
    from workers.models import Item

    paths = sorted(folder.glob("*.jpg"))[: tuning.PICTURES]
    return [model.prepare(images.decode(path.read_bytes(), images.Limits()).pixels, Item(path.name)) for path in paths]


if __name__ == "__main__":
    sys.exit(main())
