"""imagemill against its limit and against everyone else, on the same pictures and weights, in interleaved rounds.

    make bench                      five rounds, then benchmarks/RESULTS.md is written
    make bench ARGS=--all           with further models, and bf16 also where the processor has none: hours
    make bench ARGS=--quick         one short round, to see that it runs; writes nothing
    make bench-peers                first, to have Ray Data measured too

What the ratios mean stands at the top of RESULTS.md; what is measured is listed in `measures`. The other scripts of
this folder are run by themselves.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import common, table, workloads
from benchmarks.common import Figures, Measure
from benchmarks.mill import Mill

KINDS = (("torch", "fp32"), ("torch", "bf16"), ("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
FP32 = tuple(kind for kind in KINDS if kind[1] == "fp32")
BENCH_PYTHON = common.ROOT / ".venv-bench" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: of which the median is taken.
        pictures: of a job.
        peer_pictures: of a run of a peer, which is timed after its first batch.
        tiny: items of a job without pictures worth the name.
        seconds: for each part.
        names: workloads.
        kinds: (runtime, precision).
        shard_sizes: of imagemill's jobs; all but the first kind's are of the first size only.
    """

    rounds: int = 5
    pictures: int = 640
    peer_pictures: int = 240
    tiny: int = 20_000
    seconds: float = 5
    names: tuple[str, ...] = ("yolov8n", "dinov2", "stub")
    kinds: tuple[tuple[str, str], ...] = KINDS if common.has_bf16() else FP32
    shard_sizes: tuple[int, ...] = (64, 1024)

    @property
    def precisions(self) -> list[str]:
        return list(dict.fromkeys(precision for _, precision in self.kinds))


ALL = Plan(names=tuple(workloads.WORKLOADS), kinds=KINDS)
_FEW = ("yolov8n", "stub")
QUICK = Plan(rounds=1, pictures=16, peer_pictures=16, tiny=1000, seconds=0.2, names=_FEW, shard_sizes=(64,))


def main() -> int:
    """Make pictures and weights, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round")
    parser.add_argument("--all", action="store_true", help="every model and precision")
    parser.add_argument("--rounds", type=int, help="instead of five")
    parser.add_argument("--only", default="", metavar="TEXT", help="measures with this in their names")
    parser.add_argument("--out", type=Path, help="the file to write; default RESULTS.md, none with --quick or --only")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else ALL if arguments.all else Plan()
    count = arguments.rounds or plan.rounds
    partial = arguments.quick or bool(arguments.only)
    out = arguments.out or (None if partial else common.HERE / "RESULTS.md")
    title = [f"{count} round(s), jobs of {plan.pictures} pictures, batch {workloads.BATCH}", *common.machine()]
    if plan.kinds != KINDS:
        title.append("bf16 is left out: this processor has none")
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="imagemill-bench-"))
    try:
        made = folder / "made"
        made.mkdir()
        common.child("workloads.py", str(made), "--pictures", str(plan.pictures))
        workloads.write_manifest(folder / "tiny.csv", made / "tiny.ppm", plan.tiny)
        workloads.write_prompts(folder / "prompts.txt", plan.tiny)
        with Mill(folder / "home") as mill:
            wanted = [one for one in measures(made, mill, plan) if arguments.only in one.label or one.role == "decode"]
            taken, without = common.rounds(wanted, count, functools.partial(print, flush=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    title.append(f"took {(time.monotonic() - started) / 60:.0f} minutes; load at the end {os.getloadavg()[0]:.1f}")
    text = table.text(title, taken, without)
    print(f"\n{text}")
    if out:
        out.write_text(text)
    return 0


def measures(folder: Path, mill: Mill, plan: Plan) -> list[Measure]:
    """Everything that is measured, in the order of a round."""
    everything = [*_parts(folder, plan), *_ours(folder, mill, plan), *_peers(folder, plan)]
    wanted = {*plan.names, "pictures"}
    return [one for one in everything if one.workload.partition(",")[0] in wanted]


def _child(script: str, *arguments: Any, **options: Any) -> Callable[[], Figures]:
    return functools.partial(common.child, script, *map(str, arguments), **options)


def _parts(folder: Path, plan: Plan) -> list[Measure]:
    found = []
    brief = ("--seconds", plan.seconds)
    for workload in plan.names:
        for runtime, precision in plan.kinds if workload != "stub" else ():
            how = ("--workload", workload, "--runtime", runtime, "--precision", precision)
            take = _child("parts.py", "forward", folder, *how, *brief)
            found.append(Measure(workload, "forward", f"{runtime} {precision}", precision, take))
        take = _child("parts.py", "prepare", folder, "--workload", workload, *brief)
        found.append(Measure(workload, "prepare", "", "", take))
    found.append(Measure("pictures", "decode", "", "", _child("parts.py", "decode", folder, *brief)))
    return found


def _ours(folder: Path, mill: Mill, plan: Plan) -> list[Measure]:
    found = []
    for workload in plan.names:
        _, kind, weights = workloads.WORKLOADS[workload]
        model = str(folder / weights) if weights else "stub"
        for runtime, precision in plan.kinds if weights else KINDS[:1]:
            for shard_size in plan.shard_sizes if (runtime, precision) == KINDS[0] else plan.shard_sizes[:1]:
                options = {
                    "runtime": runtime,
                    "precision": precision,
                    "batch": workloads.BATCH,
                    "shard_size": shard_size,
                }
                take = functools.partial(_warm_job, mill, kind, folder, model, options)
                name = f"{runtime} {precision}, shards of {shard_size}"
                found.append(Measure(workload, "imagemill", name, precision if weights else "", take))
    for shard_size in plan.shard_sizes:
        take = functools.partial(mill.job, "detections", folder.parent / "tiny.csv", "stub", shard_size=shard_size)
        found.append(Measure("stub, 2 x 2 pictures", "imagemill", f"shards of {shard_size}", "", take))
        prompts = f"prompts:{folder.parent / 'prompts.txt'}"
        take = functools.partial(mill.job, "detections", prompts, "stub", shard_size=shard_size)
        found.append(Measure("stub, no pictures", "imagemill", f"shards of {shard_size}", "", take))
    one = functools.partial(mill.job, "detections", folder / "few", "stub", batch=workloads.BATCH)
    found.append(Measure("stub, one batch", "imagemill", "", "", one))
    return found


def _warm_job(mill: Mill, kind: str, folder: Path, model: str, options: dict[str, Any]) -> Figures:
    """A job on a worker that holds the model: a job of one batch comes first."""
    mill.job(kind, folder / "few", model, **options)
    return mill.job(kind, folder / "pictures", model, **options)


def _peers(folder: Path, plan: Plan) -> list[Measure]:
    count = ("--count", plan.peer_pictures)
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    ultralytics = functools.partial(_child, "peers/ultralytics_predict.py", folder, *count)
    tuned = {
        "torch, all cores": ("fp32", ultralytics(env=threads)),
        "ONNX export": ("fp32", ultralytics("--weights", workloads.EXPORTS["onnx"], env=threads)),
        "OpenVINO export": ("bf16", ultralytics("--weights", workloads.EXPORTS["openvino"], env=threads)),
    }
    found = [Measure("yolov8n", "ultralytics", "as installed", "fp32", ultralytics())]
    found += [Measure("yolov8n", "ultralytics tuned", name, *how) for name, how in tuned.items()]
    for workload in ("dinov2", "yolos"):
        for precision in plan.precisions:
            take = _child("peers/hf_pipeline.py", folder, "--workload", workload, "--precision", precision, *count)
            found.append(Measure(workload, "HF pipeline", precision, precision, take))
    for workload in ("yolov8n", "dinov2"):
        for precision in plan.precisions:
            for reader in ("PIL", "cv2"):
                how = ("--workload", workload, "--precision", precision, "--reader", reader)
                take = _child("peers/dataloader.py", folder, *how, *count)
                found.append(Measure(workload, "DataLoader", f"{reader} {precision}", precision, take))
    return [*found, Measure("yolov8n", "Ray Data", "", "fp32", functools.partial(_ray, folder, count))]


def _ray(folder: Path, count: tuple[str, int]) -> Figures:
    if not BENCH_PYTHON.exists():
        raise common.LeftOut("not installed; make bench-peers installs it")
    return common.child("peers/ray_data.py", str(folder), *map(str, count), python=str(BENCH_PYTHON))


if __name__ == "__main__":
    sys.exit(main())
