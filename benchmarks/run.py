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
from benchmarks.mill import Mill, planned_before
from workers import devices, tuning

KINDS = (("torch", "fp32"), ("torch", "bf16"), ("onnx", "fp32"), ("openvino", "fp32"), ("openvino", "bf16"))
FP32 = tuple(kind for kind in KINDS if kind[1] == "fp32")
COMPILED = ("inductor", "fp32")  # its forward pass: jobs take it on GPUs only; the first round compiles for a minute
_LEFT_OUT = ("yolov8n",)  # whose network leaves out most of its head, to be computed at single points
_SHARDS = 320  # of items without pictures, at the most: small ones take long enough
BENCH_PYTHON = common.ROOT / ".venv-bench" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: of which the median is taken.
        pictures: of a job.
        peer_pictures: of a run of a peer, which is timed after its first batch.
        decoded: pictures of a job that does little but decode; so many that its start and end do not matter.
        tiny: items of a job without pictures.
        waiting: items of a job of 2 x 2 pictures, also on a device that works beside the processor.
        seconds: for each part.
        names: workloads.
        kinds: (runtime, precision), those that imagemill runs in, too, and those that it does not.
        shard_sizes: of imagemill's jobs without a network; the others are of the first size.
        large_shards: also, of items without pictures.
    """

    rounds: int = 5
    pictures: int = 256
    peer_pictures: int = 128
    decoded: int = 7680
    tiny: int = 100_000
    waiting: int = 4096
    seconds: float = 6
    names: tuple[str, ...] = ("yolov8n", "dinov2", "stub")
    kinds: tuple[tuple[str, str], ...] = KINDS if common.has_bf16() else FP32
    forward_only: tuple[tuple[str, str], ...] = (COMPILED,)
    shard_sizes: tuple[int, ...] = (64, 1024)
    large_shards: int = 4096

    @property
    def precisions(self) -> list[str]:
        return list(dict.fromkeys(precision for _, precision in self.kinds))


ALL = Plan(names=tuple(workloads.WORKLOADS), kinds=KINDS)
_FEW = ("yolov8n", "stub")
QUICK = Plan(
    rounds=1,
    pictures=16,
    peer_pictures=16,
    decoded=16,
    tiny=1000,
    waiting=256,
    seconds=0.2,
    names=_FEW,
    shard_sizes=(64,),
    forward_only=(),
)


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
    title = common.machine()
    if plan.kinds != KINDS:
        title.append("bf16 is left out: this processor has none")
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="imagemill-bench-"))
    try:
        made = folder / "made"
        made.mkdir()
        common.child("workloads.py", str(made), "--pictures", str(plan.pictures))
        workloads.write_manifest(folder / "waiting.csv", [made / "tiny.ppm"], plan.waiting)
        workloads.write_manifest(folder / "decoded.csv", sorted((made / "pictures").iterdir()), plan.decoded)
        with Mill(folder / "home") as mill:
            wanted = [one for one in measures(made, mill, plan) if arguments.only in one.label or one.role == "decode"]

            def write(taken: list[common.Taken], without: list[tuple[str, str]]) -> None:
                rounds = f"{max(len(one.rates) for one in taken)} round(s), jobs of {plan.pictures} pictures"
                took = f"took {(time.monotonic() - started) / 60:.0f} minutes; load at the end {os.getloadavg()[0]:.1f}"
                text = table.text([f"{rounds}, peers in batches of {workloads.BATCH}", *title, took], taken, without)
                print(f"\n{text}", flush=True)
                if out:
                    out.write_text(text)

            common.rounds(wanted, count, functools.partial(print, flush=True), write)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def measures(folder: Path, mill: Mill, plan: Plan) -> list[Measure]:
    """Everything that is measured, in the order of a round: what is divided by one another stands close together."""
    everything: list[Measure] = []
    for workload in plan.names:
        everything += [*_with_a_network(workload, folder, mill, plan), *_peers(workload, folder, plan)]
    decode = Measure("pictures", "decode", "", "", _part("decode", folder, "--seconds", plan.seconds))
    if "stub" not in plan.names:
        return [*everything, decode]
    return [*everything, *_all_but_decoding(folder, mill, plan, decode), *_without_pictures(folder, mill, plan)]


def _part(*arguments: Any) -> Callable[[], Figures]:
    """In the environment that a worker's process has."""
    return _child("parts.py", *arguments, env=devices.CPU.environment)


def _child(script: str, *arguments: Any, **options: Any) -> Callable[[], Figures]:
    return functools.partial(common.child, script, *map(str, arguments), **options)


def _with_a_network(workload: str, folder: Path, mill: Mill, plan: Plan) -> list[Measure]:
    """For each runtime its bare forward pass, and imagemill right after it; and the preparing of pictures."""
    _, kind, weights = workloads.WORKLOADS[workload]
    brief = ("--workload", workload, "--seconds", plan.seconds)
    found = [Measure(workload, "prepare", "", "", _part("prepare", folder, *brief))]
    for runtime, precision in (*plan.forward_only, *plan.kinds) if weights else ():
        how = ("--runtime", runtime, "--precision", precision)
        forward = _part("forward", folder, *brief, *how)
        batch = tuning.USUAL_BATCH["cpu"]
        options = {"precision": precision, "batch": batch, "shard_size": plan.shard_sizes[0]}
        job = functools.partial(_warm_job, mill, kind, folder, str(folder / weights), {"runtime": runtime, **options})
        found.append(Measure(workload, "forward", f"{runtime} {precision}", precision, forward))
        if workload in _LEFT_OUT and runtime == "openvino":
            whole = _part("forward", folder, *brief, *how, "--whole")
            found.append(Measure(workload, "whole network", f"{runtime} {precision}", precision, whole))
        if (runtime, precision) in plan.kinds:
            found.append(Measure(workload, "imagemill", f"{runtime} {precision}", precision, job))
    return found


def _all_but_decoding(folder: Path, mill: Mill, plan: Plan, decode: Measure) -> list[Measure]:
    """Jobs of a model that takes no time, twice each, and decoding before and after every one.

    Such a job lasts twelve seconds, and a machine that others share is faster in one such while than in the next.
    """
    options = {"batch": 64}  # of a model that takes no time, larger ones cost less
    jobs = _sizes("stub", mill, folder.parent / "decoded.csv", plan, options)
    return [decode, *(one for job in jobs * 2 for one in (job, decode))]


def _without_pictures(folder: Path, mill: Mill, plan: Plan) -> list[Measure]:
    """What is around pictures: items alone, and a device that needs no processor."""
    waiting = folder.parent / "waiting.csv"
    found = [
        *_sizes("stub, 2 x 2 pictures", mill, waiting, plan, {"batch": 256}),
        # 64 items in 100 ms, and meanwhile the processor is free, as beside a GPU.
        *_sizes("stub, 100 ms a batch", mill, waiting, plan, {"batch": 64, "param": "delay_ms=100"}),
    ]
    for size in (*plan.shard_sizes, plan.large_shards):
        for before in (False, True):
            label = f"shards of {size}{', planned before' * before}"
            take = functools.partial(_items_alone, mill, folder.parent, plan.tiny, size, before=before)
            found.append(Measure("stub, no pictures", "imagemill", label, "", take))
    one = functools.partial(mill.job, "detections", folder / "few", "stub", batch=workloads.BATCH)
    return [*found, Measure("stub, one batch", "imagemill", "", "", one)]


def _sizes(workload: str, mill: Mill, dataset: Path, plan: Plan, options: dict[str, Any]) -> list[Measure]:
    """The stub's job over a dataset at each shard size."""
    job = functools.partial(mill.job, "detections", dataset, "stub", **options)
    takes = {size: functools.partial(job, shard_size=size) for size in plan.shard_sizes}
    return [Measure(workload, "imagemill", f"shards of {size}", "", take) for size, take in takes.items()]


def _items_alone(mill: Mill, folder: Path, items: int, shard_size: int, *, before: bool) -> Figures:
    """A job of items that were never seen, so that no row is replaced; planned meanwhile, or before it begins."""
    items = min(items, _SHARDS * shard_size)
    prompts = workloads.write_prompts(folder / f"prompts-{time.monotonic_ns()}.txt", items)
    job = functools.partial(planned_before, folder / "alone") if before else mill.job
    return job("detections", f"prompts:{prompts}", "stub", batch=256, shard_size=shard_size)


def _warm_job(mill: Mill, kind: str, folder: Path, model: str, options: dict[str, Any]) -> Figures:
    """A job on a worker that holds the model: a job of one batch comes first."""
    mill.job(kind, folder / "few", model, **options)
    return mill.job(kind, folder / "pictures", model, **options)


def _peers(workload: str, folder: Path, plan: Plan) -> list[Measure]:
    count = ("--count", plan.peer_pictures)
    found = []
    if workload == "yolov8n":
        found += [
            *_ultralytics(folder, count),
            Measure(workload, "Ray Data", "", "fp32", functools.partial(_ray, folder, count)),
        ]
    for precision in plan.precisions:
        how = ("--workload", workload, "--precision", precision, *count)
        if workload in ("dinov2", "yolos"):
            take = _child("peers/hf_pipeline.py", folder, *how)
            found.append(Measure(workload, "HF pipeline", precision, precision, take))
        for reader in ("PIL", "cv2") if workload in ("dinov2", "yolov8n") else ():
            take = _child("peers/dataloader.py", folder, *how, "--reader", reader)
            found.append(Measure(workload, "DataLoader", f"{reader} {precision}", precision, take))
    return found


def _ultralytics(folder: Path, count: tuple[str, int]) -> list[Measure]:
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    predict = functools.partial(_child, "peers/ultralytics_predict.py", folder, *count)
    tuned = {
        "torch, all cores": ("fp32", predict(env=threads)),
        "ONNX export": ("fp32", predict("--weights", workloads.EXPORTS["onnx"], env=threads)),
        "OpenVINO export": ("bf16", predict("--weights", workloads.EXPORTS["openvino"], env=threads)),
    }
    found = [Measure("yolov8n", "ultralytics", "as installed", "fp32", predict())]
    return found + [Measure("yolov8n", "ultralytics tuned", name, *how) for name, how in tuned.items()]


def _ray(folder: Path, count: tuple[str, int]) -> Figures:
    if not BENCH_PYTHON.exists():
        raise common.LeftOut("not installed; make bench-peers installs it")
    return common.child("peers/ray_data.py", str(folder), *map(str, count), python=str(BENCH_PYTHON))


if __name__ == "__main__":
    sys.exit(main())
