"""benchmarks/gpu.py runs without a GPU, leaves out what is not installed, tells what failed; nothing here measures."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision import io

from benchmarks import common, gpu
from benchmarks.common import LeftOut
from benchmarks.gpu_sections import bench as shared
from benchmarks.gpu_sections import decode, forward, machine, out_of_memory, runtimes
from benchmarks.gpu_sections.bench import Bench
from tests.workers.pretended import pretended_gpu

__all__ = ["pretended_gpu"]

FOLDER = common.HERE / "gpu_sections"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench("cpu", True, tmp_path)


def test_every_section_has_a_file() -> None:
    for name in gpu.SECTIONS:
        text = (FOLDER / f"{name}.py").read_text()
        assert text.startswith('"""The section ')
        assert "\ndef run(bench: Bench) -> None:\n" in text


def test_no_file_is_longer_than_can_be_held_in_mind() -> None:
    for path in [common.HERE / "gpu.py", *FOLDER.glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 350, path.name


class TestSections:
    """Those that take a moment, in this process; `test_all_of_it_on_the_cpu` runs the rest."""

    def test_the_machine(self, bench: Bench) -> None:
        machine.run(bench)
        assert "says nothing about a GPU" in bench.lines[0]
        assert not any(line.startswith(gpu.ON_GPU) for line in bench.lines)

    def test_decoding(self, bench: Bench) -> None:
        decode.run(bench)
        assert bench.failed == 0
        assert any("off by 0.000 levels on average, 0 at most" in line for line in bench.lines)

    def test_memory_that_runs_out(self, bench: Bench) -> None:
        out_of_memory.run(bench)
        assert any("30 answers of 30 pictures, 0 failures; batch 30 -> 3" in line for line in bench.lines)

    def test_answers_to_the_wrong_pictures_are_noticed(self, bench: Bench) -> None:
        with pytest.raises(RuntimeError, match="answers went to the wrong pictures"):
            out_of_memory.halves(bench, out_of_memory.pretender(), list(range(30)), list(range(30))[::-1])
        with pytest.raises(RuntimeError, match="the memory did not run out"):
            out_of_memory.halves(bench, out_of_memory.pretender(), [1, 2], [1, 2])

    def test_every_way_of_a_network(self, bench: Bench) -> None:
        forward.table(bench, "tiny", tiny(), (2, 3))
        assert bench.failed == 0, bench.lines
        cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in bench.lines]
        assert [row[:3] for row in cells] == [["tiny", way.name, n] for way in forward.ways(bench) for n in ("2", "3")]
        assert cells[0][4] == "0.0e+00"
        assert 0 < float(cells[2][4]) < 0.05, "bf16 rounds"

    def test_another_runtime_is_held_against_torch(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        _, off, _ = runtimes.measured(bench, "tiny", tiny(), "onnx", "fp32", 2)
        assert float(str(off)) < 1e-4
        wrong = forward.session(bench, tiny(torch.nn.Sigmoid), forward.FP32)
        monkeypatch.setattr(forward, "session", lambda *given: wrong)
        with pytest.raises(RuntimeError, match="differs from torch by"):
            runtimes.measured(bench, "wrong", tiny(), "onnx", "fp32", 2)


def tiny(act: Callable[[], Any] | None = None) -> Any:
    """A network of one convolution."""
    from workers.runtimes import Network

    def build() -> Any:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), (act or torch.nn.ReLU)())

    axes = {"images": {0: "batch"}, "out": {0: "batch"}}
    return Network("tiny", build, {"images": torch.zeros(2, 3, 8, 8)}, ("out",), axes)


class TestAttempts:
    @pytest.mark.parametrize(
        ("error", "row", "failed"),
        [
            (LeftOut("a reason"), "| a | left out: a reason |", 0),
            (ImportError("no", name="timm"), "| a | left out: timm is not installed |", 0),
            (ValueError("five\nlines"), "| a | FAILED: ValueError: five lines |", 1),
        ],
    )
    def test_a_row_that_cannot_be_taken(self, error: Exception, row: str, failed: int, bench: Bench) -> None:
        def take() -> tuple[object, ...]:
            raise error

        bench.attempt("a", take=take)
        assert (bench.lines, bench.failed) == ([row], failed)

    def test_what_is_missing_is_left_out(self, bench: Bench) -> None:
        with bench.without("a network"):
            shared.need("no_such_library")
        assert bench.lines == ["a network is left out: no_such_library is not installed"]

    def test_a_table(self, bench: Bench) -> None:
        bench.head("a", "b")
        bench.row("x|y", 1234.5)
        bench.row(3, 0.12345)
        assert bench.lines == ["", "| a | b |", "|---|---|", "| x/y | 1234 |", "| 3 | 0.123 |"]


@pytest.mark.parametrize(
    ("device", "outputs"),
    [("cuda", ("distances", "logits")), ("cpu", ("best", "class_id", "features0", "features1", "features2"))],
)
def test_a_network_is_the_one_that_a_job_runs_there(device: str, outputs: tuple[str, ...], tmp_path: Path) -> None:
    weights = shared.yolo_weights(tmp_path, "yolov8n")
    bench = Bench(device, True, tmp_path)
    assert shared.networks(bench, "yolo", weights, {"imgsz": 64}, "detections")["yolo"].outputs == outputs


class TestOnAPretendedGpu:
    """What sections do only where there is a GPU; torch's tensors are said to be on one."""

    @pytest.fixture(autouse=True)
    def _there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain = io.decode_jpeg
        monkeypatch.setattr(
            io, "decode_jpeg", lambda data, mode, device: [one.to(device) for one in plain(data, mode=mode)]
        )
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    @pytest.mark.parametrize(
        "name",
        ["decode", *(pytest.param(s, marks=pytest.mark.slow) for s in ("precisions", "yolo", "dinov2", "sam", "unet"))],
    )
    @pytest.mark.filterwarnings("ignore")
    def test_a_section(self, name: str, pretended_gpu: Any, tmp_path: Path) -> None:
        bench = Bench("cuda", True, tmp_path)
        with pretended_gpu():
            importlib.import_module(f"benchmarks.gpu_sections.{name}").run(bench)
        assert bench.failed == 0, bench.lines
        assert not any("left out" in line for line in bench.lines)

    @pytest.mark.slow
    def test_more_pictures_than_fit(self, pretended_gpu: Any, tmp_path: Path) -> None:
        """All of them fit into this one, which is noticed."""
        bench = Bench("cuda", True, tmp_path)
        with pretended_gpu(), pytest.raises(RuntimeError, match="the memory did not run out: more pictures are needed"):
            out_of_memory.on_card(bench)
        assert any("128 answers of 128 pictures, 0 failures" in line for line in bench.lines)


class TestRun:
    """Sections are processes; here they are small programs."""

    @pytest.fixture(autouse=True)
    def _programs(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        programs = {
            "machine": "print('- GPU: a made-up one')",
            "decode": "print('| fast |')",
            "yolo": "print('FAILED: ValueError: five'); raise SystemExit(1)",
            "sam": "import os; os.abort()",
            "unet": "print('left out: diffusers is not installed'); raise SystemExit(3)",
        }
        monkeypatch.setattr(gpu, "command", lambda name, quick: [sys.executable, "-c", programs[name]])
        monkeypatch.setattr(gpu, "RESULTS", tmp_path / "RESULTS-GPU.md")

    def test_one_that_fails_stops_no_other(self, tmp_path: Path) -> None:
        assert gpu.run(["yolo", "sam", "unet", "decode"], quick=False, out=tmp_path / "r.md", whole=False) == 1
        text = (tmp_path / "r.md").read_text()
        assert "FAILED: ValueError: five\n" in text
        assert "FAILED: ended with -6" in text
        assert "left out: diffusers is not installed\n" in text
        assert "| fast |\n" in text
        assert text.endswith("\nFailed: yolo, sam\n")
        assert not gpu.RESULTS.exists()

    def test_a_whole_run_on_a_gpu_is_written_down(self) -> None:
        assert gpu.run(["decode", "unet"], quick=False, out=None, whole=True) == 0
        assert gpu.RESULTS.read_text().startswith(
            "# Measured by benchmarks/gpu.py\n\n## The machine\n\n- GPU: a made-up"
        )
        assert gpu.RESULTS.read_text().endswith("\nNo section failed.\n")

    def test_without_a_gpu_nothing_is_written(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "command", lambda name, quick: [sys.executable, "-c", "print('- no GPU: on the CPU')"])
        assert gpu.run(["decode"], quick=False, out=None, whole=True) == 0
        assert not gpu.RESULTS.exists()


def test_a_section_that_is_unknown() -> None:
    command = [sys.executable, "-P", str(common.HERE / "gpu.py"), "--only", "decode,nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown section 'nonsense'; known: machine, decode" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_of_it_on_the_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(common.HERE / "gpu.py"), "--quick", "--out", str(tmp_path / "r.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = (tmp_path / "r.md").read_text()
    assert done.returncode == 0, text
    assert "FAILED" not in text
    assert all(f"## {title}\n" in text for title in gpu.SECTIONS.values())
    assert text.startswith("# A quick try, no measurement by benchmarks/gpu.py\n")
