"""Which devices this machine has, how much memory each, and how a process is pinned to one before torch is imported."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from storage.errors import BadInput

_GB = 1024**3
_SPINS = "20000"  # of 300,000, which libgomp would take; no forward pass was seen to be slower for it

# glibc would give the memory of every picture back to the kernel, and get the next one's from it page by page: a third
# of the time of decoding one. In one arena a job that does little else took less time than in one for each thread.
_HEAP = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(128 << 20),  # a picture of 40 megapixels
    "MALLOC_TRIM_THRESHOLD_": str(256 << 20),
}

# Set by the supervisor for the process of one device: device, queue, and a file that means "drain".
DEVICE, QUEUE, DRAIN_FILE = "IMAGEMILL_WORKER_DEVICE", "IMAGEMILL_WORKER_QUEUE", "IMAGEMILL_WORKER_DRAIN"


@dataclass(frozen=True, slots=True)
class Device:
    """One thing that computes: the CPU as a whole, a GPU, or a MIG slice of one.

    Attributes:
        id: "cpu", or the UUID that CUDA_VISIBLE_DEVICES takes ("GPU-...", "MIG-...").
        name: for people.
        memory_gb: of the device; 0 for the CPU.
    """

    id: str
    name: str
    memory_gb: float

    @property
    def queue(self) -> str:
        """The most demanding queue it can serve (see jobs.queue)."""
        if self.id == "cpu":
            return "cpu"
        for least in (80, 40, 24):
            if self.memory_gb >= least * 0.93:  # an "80 GB" card shows 79.2 GiB or less
                return f"gpu-{least}g"
        return "gpu"

    @property
    def environment(self) -> dict[str, str]:
        """What pins a process to it, and has it keep freed memory; must be set before it starts.

        GNU OpenMP's threads, which torch computes with on a CPU, spin for milliseconds after each operation unless told
        otherwise: on the cores that decode the next pictures.
        """
        ours = {**_HEAP, "GOMP_SPINCOUNT": _SPINS} if self.id == "cpu" else _HEAP
        kept = {name: os.environ.get(name, value) for name, value in ours.items()}
        if self.id == "cpu":
            return {**kept, "CUDA_VISIBLE_DEVICES": ""}
        return {**kept, "CUDA_VISIBLE_DEVICES": self.id, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}


CPU = Device("cpu", "CPU", 0)


def find(wanted: str = "auto") -> list[Device]:
    """The devices to work on: every GPU, or the CPU where there is none.

    Args:
        wanted: "auto", "cpu", "gpu" (all of them, none is an error), or ids and numbers with commas between.
    """
    if wanted == "cpu":
        return [CPU]
    gpus = _gpus()
    if wanted == "auto":
        return gpus or [CPU]
    if wanted == "gpu":
        if not gpus:
            raise BadInput("no NVIDIA GPU was found on this machine; use --device cpu, or check nvidia-smi")
        return gpus
    return [_one(name.strip(), gpus) for name in wanted.split(",")]


def _one(name: str, gpus: list[Device]) -> Device:
    if name == "cpu":
        return CPU
    for number, gpu in enumerate(gpus):
        if name in (str(number), gpu.id):
            return gpu
    known = ", ".join(["cpu", *(f"{i} ({gpu.id})" for i, gpu in enumerate(gpus))])
    raise BadInput(f"unknown device {name!r}; this machine has: {known}")


def _gpus() -> list[Device]:
    """Asked of NVML where its binding is installed, else of nvidia-smi; never of torch, which would touch them."""
    try:
        return _from_nvml()
    except ImportError:
        return _from_nvidia_smi()


def _from_nvml() -> list[Device]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [_nvml_device(pynvml, unit) for handle in handles for unit in _slices(pynvml, handle)]
    finally:
        pynvml.nvmlShutdown()


def _slices(pynvml: object, handle: object) -> list[object]:
    """The MIG slices of a GPU, or the GPU itself where MIG is off."""
    nvml: object = pynvml
    try:
        mode, _ = nvml.nvmlDeviceGetMigMode(handle)  # type: ignore[attr-defined]
        if not mode:
            return [handle]
        count = nvml.nvmlDeviceGetMaxMigDeviceCount(handle)  # type: ignore[attr-defined]
    except nvml.NVMLError:  # type: ignore[attr-defined]
        return [handle]
    found = []
    for i in range(count):
        try:
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, i))  # type: ignore[attr-defined]
        except nvml.NVMLError:  # type: ignore[attr-defined]
            continue
    return found


def _nvml_device(pynvml: object, handle: object) -> Device:
    nvml: object = pynvml
    uuid, name = nvml.nvmlDeviceGetUUID(handle), nvml.nvmlDeviceGetName(handle)  # type: ignore[attr-defined]
    memory = nvml.nvmlDeviceGetMemoryInfo(handle).total / _GB  # type: ignore[attr-defined]
    return Device(str(uuid), str(name), round(memory, 1))


def _from_nvidia_smi() -> list[Device]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.split(", ") for line in answer.stdout.splitlines() if line.startswith("GPU-")]
    return [Device(uuid, name, round(float(mib) / 1024, 1)) for uuid, name, mib in lines]


def cpuinfo(name: str) -> str:
    """A value of the first processor in Linux's list, "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")
