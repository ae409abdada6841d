"""The section on pinning: a process started for a device sees that device and no other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

from benchmarks.gpu_sections.bench import Bench, expect

_CHILD = """
import json, torch
found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps([[str(one.uuid), one.name] for one in found]))
"""


def run(bench: Bench) -> None:
    """A child for each device, all at once, and one for the CPU."""
    from workers import devices

    there = [*devices.find("gpu"), devices.CPU] if bench.on_gpu else [devices.CPU]
    children = [started(device.environment) for device in there]
    bench.head("device", "queue", "what its process sees")
    for device, child in zip(there, children, strict=True):

        def take(device: Any = device, child: Any = child) -> tuple[object, ...]:
            out, _ = child.communicate(timeout=300)
            expect(child.returncode == 0, f"the process ended with {child.returncode}")
            seen = json.loads(out)
            if device.id == "cpu":
                expect(not seen, f"the CPU's process sees {seen}")
                return ("no GPU",)
            expect(len(seen) == 1, f"{len(seen)} devices are visible: {seen}")
            uuid, name = seen[0]
            # torch gives a GPU's own UUID without its beginning; for a slice of one it need not be the slice's.
            expect(not device.id.startswith("GPU-") or device.id.endswith(uuid), f"it sees {uuid}")
            return (f"{name}, {uuid}",)

        bench.attempt(device.id, device.queue, take=take)


def started(environment: dict[str, str]) -> Any:
    """A child in the environment that a worker's process gets."""
    env = {**os.environ, **environment}
    return subprocess.Popen([sys.executable, "-P", "-c", _CHILD], env=env, stdout=subprocess.PIPE, text=True)
