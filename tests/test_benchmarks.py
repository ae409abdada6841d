"""The arithmetic of the benchmarks, and that each of their scripts starts; nothing here measures."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common, memory, run, table, workloads
from benchmarks.common import LeftOut, Measure, Taken

SCRIPTS = sorted(
    path.relative_to(common.HERE)
    for path in [*common.HERE.glob("*.py"), *(common.HERE / "peers").glob("*.py")]
    if path.name not in ("common.py", "mill.py", "table.py", "s3_reads.py", "sandbox.py")
)


def measure(workload: str, role: str, name: str = "", precision: str = "", take: Any = None) -> Measure:
    return Measure(workload, role, name, precision, take or (lambda: {"rate": 1.0}))


def taken(rate: float, *names: str, **figures: float) -> Taken:
    return Taken(measure(*names), {"rate": rate, **figures}, (rate,))


class Clock:
    """A take() that gives these figures, one after the other."""

    def __init__(self, *rates: float) -> None:
        self._rates = iter(rates)

    def __call__(self) -> common.Figures:
        return {"rate": next(self._rates)}


def rounds(measures: list[Measure]) -> tuple[list[Taken], list[tuple[str, str]]]:
    """What three rounds have found at their end; each of them tells how it stands."""
    told: list[tuple[list[Taken], list[tuple[str, str]]]] = []
    common.rounds(measures, 3, lambda line: None, lambda *found: told.append(found))
    assert len(told) == 3
    return told[-1]


class TestRounds:
    def test_they_are_interleaved_and_give_medians(self) -> None:
        order: list[str] = []

        def take(name: str, clock: Clock) -> Any:
            return lambda: order.append(name) or clock()

        measures = [
            measure("w", "a", take=take("a", Clock(1, 9, 2))),
            measure("w", "b", take=take("b", Clock(5, 6, 4))),
        ]
        found, without = rounds(measures)
        assert order == ["a", "b"] * 3
        assert [(t.rate, t.rates) for t in found] == [(2, (1, 9, 2)), (5, (5, 6, 4))]
        assert not without

    def test_what_stands_there_twice_is_taken_twice_and_a_round_has_its_mean_time(self) -> None:
        often = measure("w", "a", take=Clock(2, 6, 4, 4, 9, 9))
        found, without = rounds([often, measure("w", "b", take=Clock(5, 6, 4)), often])
        assert [(t.rate, t.rates) for t in found] == [(4, (3, 4, 9)), (5, (5, 6, 4))]
        assert not without
        assert common.means([{"rate": 1, "idle": 0.3}, {"rate": 1, "idle": 0.1}]) == {"rate": 1, "idle": 0.2}

    def test_what_cannot_be_taken_is_asked_once_and_told(self) -> None:
        asked: list[int] = []

        def refuse() -> common.Figures:
            asked.append(1)
            raise LeftOut("ray is not installed")

        found, without = rounds([measure("w", "a", take=refuse), measure("w", "b")])
        assert [t.measure.role for t in found] == ["b"]
        assert without == [("w: a", "ray is not installed")]
        assert len(asked) == 1

    def test_each_figure_has_its_own_median(self) -> None:
        found = common.medians([{"rate": 1, "idle": 0.3}, {"rate": 3, "idle": 0.1}, {"rate": 2, "idle": 0.2}])
        assert found == {"rate": 2, "idle": 0.2}


class TestChildren:
    def test_figures_are_the_last_line(self, tmp_path: Path) -> None:
        script = tmp_path / "child.py"
        script.write_text("from benchmarks import common\nprint('noise')\ncommon.answer(rate=7.5)\n")
        assert common.child(str(script)) == {"rate": 7.5}

    @pytest.mark.parametrize(
        ("code", "reason"),
        [
            ("common.need('no_such_library')", "no_such_library is not installed"),
            ("raise SystemExit('the disk is full')", "the disk is full"),
            ("raise ValueError('five')", "ValueError: five"),
        ],
    )
    def test_one_that_fails_is_left_out_with_one_line(self, tmp_path: Path, code: str, reason: str) -> None:
        script = tmp_path / "child.py"
        script.write_text(f"from benchmarks import common\n{code}\n")
        with pytest.raises(LeftOut, match=f"^{reason}$"):
            common.child(str(script))

    def test_nobody_chooses_their_threads_for_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert "OMP_NUM_THREADS" not in common.environment()


class TestRatios:
    TAKEN = (
        taken(20, "yolo", "forward", "torch fp32", "fp32"),
        taken(25, "yolo", "forward", "openvino fp32", "fp32"),
        taken(50, "yolo", "forward", "torch bf16", "bf16"),
        taken(100, "yolo", "prepare"),
        taken(200, "pictures", "decode"),
        taken(10, "yolo", "ultralytics", "as installed", "fp32"),
        taken(16, "yolo", "ultralytics tuned", "ONNX", "fp32"),
        taken(12, "yolo", "DataLoader", "PIL fp32", "fp32"),
        taken(14, "yolo", "DataLoader", "cv2 fp32", "fp32"),
        taken(28, "yolo", "DataLoader", "cv2 bf16", "bf16"),
        taken(1000, "other", "forward", "torch fp32", "fp32"),
    )

    def test_the_limit_is_the_sum_of_the_parts_at_their_best(self) -> None:
        assert table.limit("fp32", self.TAKEN[:5]) == pytest.approx(1 / (1 / 25 + 1 / 100 + 1 / 200))
        assert table.limit("bf16", self.TAKEN[:5]) == pytest.approx(1 / (1 / 50 + 1 / 100 + 1 / 200))

    def test_there_is_none_where_a_part_is_not_known(self) -> None:
        assert table.limit("fp16", self.TAKEN) is None
        assert table.limit("fp32", self.TAKEN[:4]) is None

    def test_without_a_forward_pass_the_other_parts_limit(self) -> None:
        assert table.limit("", [taken(100, "stub", "prepare"), taken(300, "pictures", "decode")]) == pytest.approx(75)

    def test_each_is_divided_by_its_own_precision(self) -> None:
        fp32 = table.ratios(taken(18, "yolo", "imagemill", "a", "fp32"), self.TAKEN)
        bf16 = table.ratios(taken(40, "yolo", "imagemill", "b", "bf16"), self.TAKEN)
        assert fp32 == pytest.approx(
            {
                "limit": 18 * (1 / 25 + 1 / 100 + 1 / 200),
                "bare forward": 18 / 25,
                "ultralytics": 1.8,
                "ultralytics tuned": 18 / 16,
                "DataLoader": 18 / 14,
                "best peer": 18 / 28,
            }
        )
        assert bf16["bare forward"] == pytest.approx(0.8)
        assert bf16["DataLoader"] == pytest.approx(40 / 28)
        assert bf16["ultralytics"] == pytest.approx(4)

    def test_a_ratio_is_the_median_of_those_of_the_rounds(self) -> None:
        def over(role: str, name: str, *rates: float) -> Taken:
            return Taken(measure("w", role, name, "fp32"), {"rate": sorted(rates)[1]}, rates)

        ours = over("imagemill", "a", 9, 12, 8)
        # In the second round the machine was twice as fast, and in the first the slower runtime was lucky.
        forwards = [over("forward", "torch", 10, 20, 10), over("forward", "onnx", 12, 9, 9)]
        assert table.ratios(ours, [*forwards, ours])["bare forward"] == pytest.approx(0.8)

    def test_the_text_says_all_of_it(self) -> None:
        figures = {"idle": 0.125, "gap": 0.015, "claim_s": 0.25, "whole_s": 1.5, "command_s": 2.5}
        ours = taken(18, "yolo", "imagemill", "torch fp32, shards of 64", "fp32", **figures)
        text = table.text(["EPYC, 2 cores"], [*self.TAKEN, ours], [("yolo: Ray Data", "not installed")])
        assert "- EPYC, 2 cores\n" in text
        assert "| yolo torch fp32, shards of 64 | 18.0 | 0.99 | 0.72 | 1.80 | 1.12 |  | 1.29 |  | 0.64 |" in text
        assert "| yolo fp32 | 25.0 | 200.0 | 100.0 | 18.2 |" in text
        assert "| yolo torch fp32, shards of 64 | 12.5% | 1.5% | 0.25 | 1.50 | 2.50 |" in text
        assert "| yolo | DataLoader cv2 bf16 | 28.0 | 28.0 |" in text
        assert text.endswith("- yolo: Ray Data: not installed\n")


class TestPace:
    def test_the_first_batch_is_not_timed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        times = iter([100.0, 104.0])
        monkeypatch.setattr(common.time, "perf_counter", lambda: next(times))
        pace = common.Pace(8)
        for _ in range(28):
            pace.add(1)
        assert pace.rate == 5

    def test_one_batch_is_too_few(self) -> None:
        pace = common.Pace(8)
        pace.add(8)
        with pytest.raises(SystemExit) as ended:
            _ = pace.rate
        assert ended.value.code == common.LEFT_OUT


class TestMemory:
    def test_the_rise_is_from_the_warm_up_to_the_end(self) -> None:
        samples = [50.0] * 10 + [100.0] * 60 + [500.0] + [104.0] * 29
        assert memory.judged(samples, 0.1) == (100, 104, pytest.approx(0.04))

    def test_one_sample_tells_nothing(self) -> None:
        with pytest.raises(SystemExit, match="too few samples"):
            memory.judged([1.0], 0.1)

    def test_the_largest_child_is_the_worker(self) -> None:
        # Without a child there is nothing to sample; with one its size is told.
        code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], stdin=0)"
        with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
            sampled = threading.Event()
            with memory.Sampler(parent.pid, 0.01) as sampler:
                # A child that has just been forked has no memory of its own yet.
                while not (sampler.worker_mb and sampler.worker_mb[-1] > 1) and not sampled.wait(0.01):
                    continue
            parent.communicate(b"\n")
        assert any(1 < worker < everybody for worker, everybody in zip(sampler.worker_mb, sampler.all_mb, strict=False))


def test_a_manifest_repeats_one_picture(tmp_path: Path) -> None:
    lines = workloads.write_manifest(tmp_path / "m.csv", [tmp_path / "one.ppm"], 3).read_text().splitlines()
    assert lines[0] == "key,uri,fingerprint"
    assert len({line.split(",")[0] for line in lines[1:]}) == 3
    assert {line.split(",")[1] for line in lines[1:]} == {str(tmp_path / "one.ppm")}


def test_the_tiny_picture_can_be_read() -> None:
    from workers import images

    assert images.decode(workloads.TINY_PPM, images.Limits()).pixels.shape == (2, 2, 3)


def test_every_measure_has_a_name_of_its_own(tmp_path: Path) -> None:
    class Mill:
        def job(self) -> None: ...

    measures = set(run.measures(tmp_path, Mill(), run.Plan()))  # type: ignore[arg-type]
    labels = {one.label for one in measures}
    assert len(labels) == len(measures)
    assert {role for role in table.PEERS if any(role in label for label in labels)} == set(table.PEERS)


def test_peers_of_their_own_venv_are_pinned() -> None:
    for path in (common.HERE / "peers").glob("requirements-*.txt"):
        assert all("==" in line for line in path.read_text().split())


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_help(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(common.HERE / script), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
