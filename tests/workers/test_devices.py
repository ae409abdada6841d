"""Devices: which queue each can serve, and how a process is pinned to one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import queue
from storage.errors import BadInput
from workers import devices
from workers.devices import CPU, Device


@pytest.mark.parametrize(
    ("memory_gb", "name"), [(8, "gpu"), (23.7, "gpu-24g"), (39.5, "gpu-40g"), (79.2, "gpu-80g"), (139.8, "gpu-80g")]
)
def test_a_gpu_serves_what_its_memory_allows(memory_gb: float, name: str) -> None:
    device = Device("GPU-1", "a GPU", memory_gb)
    assert device.queue == name
    assert device.queue in queue.QUEUES
    assert queue.served_by(device.queue)[0] == "gpu"


def test_the_cpu_sees_no_gpu_and_a_gpu_only_itself() -> None:
    assert CPU.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert Device("MIG-1", "a slice", 10).environment["CUDA_VISIBLE_DEVICES"] == "MIG-1"


def test_threads_spin_a_little_unless_the_user_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert int(CPU.environment["GOMP_SPINCOUNT"]) < 300_000  # libgomp's own
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert CPU.environment["GOMP_SPINCOUNT"] == "7"


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="no glibc"
)
@pytest.mark.parametrize("device", [CPU, Device("GPU-1", "a GPU", 24)])
def test_a_process_keeps_the_memory_of_a_picture_for_the_next(device: Device) -> None:
    """Also in a thread, whose arena would be another one."""
    code = """
import resource, threading
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def pictures():
    for _ in range(20):
        held = [bytearray(20 << 20) for _ in range(4)]
        del held
def counted():
    pictures()
    before = faults()
    pictures()
    print(faults() - before)
thread = threading.Thread(target=counted)
thread.start()
thread.join()
"""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    counts = []
    for env in (plain, {**plain, **device.environment}):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        counts.append(int(done.stdout))
    assert counts[1] < 1000 < counts[0]  # of 400,000 pages of 4 kB


@pytest.fixture
def two_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi tells of two GPUs."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU-a, First, 24576'\necho 'GPU-b, Second, 81559'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(devices, "_from_nvml", _no_nvml)


def _no_nvml() -> list[Device]:
    raise ImportError


def test_every_gpu_is_found_by_number_and_by_id(two_gpus: None) -> None:
    assert [d.id for d in devices.find("auto")] == ["GPU-a", "GPU-b"]
    assert [d.queue for d in devices.find("gpu")] == ["gpu-24g", "gpu-80g"]
    assert [d.id for d in devices.find("1,GPU-a,cpu")] == ["GPU-b", "GPU-a", "cpu"]
    with pytest.raises(BadInput, match=r"this machine has: cpu, 0 \(GPU-a\), 1 \(GPU-b\)"):
        devices.find("7")


def test_a_machine_without_gpus_uses_its_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_gpus", list)
    assert devices.find("auto") == [CPU]
    with pytest.raises(BadInput, match="no NVIDIA GPU"):
        devices.find("gpu")
