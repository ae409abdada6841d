"""Every model family on a GPU that is only pretended: it finds what it finds on the CPU, and mixes no devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
import torch
from PIL import Image
from torchvision import io

from jobs import lifecycle, plan
from storage import rle, shardfile, tables
from storage.errors import ItemFailed
from storage.objects import open_store
from storage.settings import Settings
from tests.support import opened
from tests.workers.models import test_conformance as shared
from tests.workers.models import tinydiffusion
from tests.workers.models.promptable_support import Shelf
from tests.workers.pretended import OnGpu, pretended_gpu
from workers import devices, graphed, inflight, models, nms, runtimes, submit, torchcall
from workers.incarnation import Incarnation
from workers.models import Encodings, Item, Prepared, Site
from workers.stream import Stream

__all__ = ["pretended_gpu"]


class TestThePretence:
    def test_devices_are_not_mixed(self, pretended_gpu: Any) -> None:
        with pretended_gpu():
            there = torch.ones(2, 3, device="cuda")
            assert there.is_cuda
            assert (there + 1).device == torch.device("cuda:0")
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                there + torch.ones(3)
            with pytest.raises(TypeError, match="numpy"):
                there.numpy()
            assert (there + torch.tensor(1)).cpu().sum() == 12
            assert torch.tensor([1, 2], device="cuda").tolist() == [1, 2]

    def test_a_view_is_one(self, pretended_gpu: Any) -> None:
        with pretended_gpu():
            there = torch.zeros(2, 2).to("cuda")
            there[0] += torch.tensor([1.0, 2.0], device="cuda")
            there[1, 1] = 5
            assert there.cpu().tolist() == [[1, 2], [0, 5]]

    def test_modules_move(self, pretended_gpu: Any) -> None:
        conv = torch.nn.Conv2d(3, 4, 3).eval().requires_grad_(False)
        picture = torch.rand(1, 3, 8, 8)
        expected = conv(picture)
        with pretended_gpu():
            conv.to("cuda").to(memory_format=torch.channels_last)
            assert isinstance(conv.weight, OnGpu)
            assert torch.allclose(conv(picture.to("cuda")).cpu(), expected, atol=1e-6)
            with pytest.raises(RuntimeError, match="expected all tensors on one device"):
                conv(picture)


class TestGraphs:
    def test_a_graph_is_given_new_numbers_and_gives_copies(self, pretended_gpu: Any) -> None:
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.Flatten()).eval()
        some = [torch.rand(2, 3, 8, 8) for _ in range(3)]
        with torch.inference_mode(), pretended_gpu():
            expected = [module(one) for one in some]
            graph = graphed.captured(torchcall.called(module.to("cuda")), [torch.zeros(2, 3, 8, 8, device="cuda")])
            found = [graph(one.to("cuda"))[0] for one in some]
            assert all(torch.allclose(a.cpu(), b, atol=1e-6) for a, b in zip(found, expected, strict=True))

    def test_all_are_captured_on_one_stream(self, pretended_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """With one each, of the few that torch has, another thread's work could come into a graph."""
        streams, plain = [], torch.cuda.graph

        def graph(made: Any, *, stream: Any, capture_error_mode: str) -> Any:
            streams.append(stream)
            return plain(made, stream=stream, capture_error_mode=capture_error_mode)

        monkeypatch.setattr(torch.cuda, "graph", graph)
        with torch.inference_mode(), pretended_gpu():
            for side in (1, 2):
                graphed.captured(lambda one: (one + 1,), [torch.zeros(side, device="cuda")])
        assert len(streams) == 2
        assert streams[0] is streams[1]

    def test_what_asks_for_a_number_runs_without(self, pretended_gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
        def call(one: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (one * 2 if one.sum().item() > 0 else one,)

        with torch.inference_mode(), pretended_gpu():
            run = graphed.Graphed(call)
            for i in range(6):
                (found,) = run(torch.full((2,), float(i), device="cuda"))
                assert found.tolist() == [2.0 * i] * 2
        assert caplog.text.count("no CUDA graphs for this network") == 1

    def test_without_room_there_is_none(self, pretended_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1e9, 3e9))
        with (
            pretended_gpu(),
            pytest.raises(RuntimeError, match=r"only 1\.0 of 3\.0 GB of the device's memory are free"),
        ):
            graphed.captured(lambda one: (one,), [torch.zeros(1, device="cuda")])


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and batches that it computes."""

    name: str
    kind: str
    weights: Path | None
    params: dict[str, Any]
    batches: list[list[tuple[np.ndarray | None, Item]]]
    encodings: Callable[[], Encodings] = lambda: None  # type: ignore[assignment, return-value]

    def loaded(self, device: str) -> Any:
        """The model on a device."""
        from workers.runtimes import torch

        family = models.family(self.name)
        card = next(card for card in family.CARDS if card.kind == self.kind)
        site = Site(device, lambda network: torch.open(network, device, "fp32"), encodings=self.encodings())
        return family.load(card, card.params(**self.params), self.weights, site)


UNGRAPHED = {"detr", "onnxfile"}  # one asks for a number on its way, the other is no torch


def check(case: Case, pretended_gpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Assert that a model finds on the pretended GPU what it finds on the CPU, again and again, at last as a graph."""
    model = case.loaded("cpu")
    expected = [model.infer(prepared(model, batch)) for batch in case.batches]
    with pretended_gpu():
        model = case.loaded("cuda")
        for _ in range(4):  # by the third a network runs as a graph
            found = [model.infer(prepared(model, batch)) for batch in case.batches]
        staged = inflight.staged(model)
        if staged is not None:  # two under way
            ready = [prepared(model, batch) for batch in case.batches]
            raw = [staged.compute(batch) for batch in ready]
            found = [staged.answer(one, batch) for one, batch in zip(raw, ready, strict=True)]
    for some, right in zip(found, expected, strict=True):
        assert all(alike(a, b) for a, b in zip(some, right, strict=True))
    assert ("no CUDA graphs" in caplog.text) == (case.name in UNGRAPHED)


def alike(found: Any, right: Any) -> bool:
    if isinstance(right, ItemFailed):
        return str(found) == str(right)
    return shared.same(found, right, 1e-3)


def prepared(model: Any, batch: list[tuple[np.ndarray | None, Item]]) -> list[Prepared]:
    return [model.prepare(picture, item) for picture, item in batch]


def batches(data: dict[str, Any]) -> list[list[tuple[np.ndarray | None, Item]]]:
    """One of wide pictures, and a tall one."""
    shapes = [(48, 64), (48, 64), (48, 64), (60, 40)]
    items = [Item(f"key-{i}", f"file:///{i}", "etag:1", data) for i in range(4)]
    each = [(shared.pictures(i + 1, shape)[i], items[i]) for i, shape in enumerate(shapes)]
    return [each[:3], each[3:]]  # type: ignore[list-item]


@pytest.mark.parametrize("pair", shared._pairs(), ids="/".join)
def test_the_same_as_on_the_cpu(
    pair: tuple[str, str], pretended_gpu: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, kind = pair
    family = models.family(name)
    only = getattr(family, "RUNTIME", None)
    if only and not runtimes.precisions(only, "cpu"):
        pytest.skip(f"the runtime {only} alone runs it")
    both = f"{name}/{kind}"
    build = shared.WEIGHTS.get(both) or shared.WEIGHTS.get(name) or getattr(family, "example_weights", None)
    params = shared.SMALL[both] if both in shared.SMALL else shared.SMALL.get(name, {})
    check(Case(name, kind, build(tmp_path) if build else None, params, batches({})), pretended_gpu, caplog)


@pytest.mark.parametrize("name", ["yolo", "sam", pytest.param("onnxfile", marks=pytest.mark.slow)])
def test_what_suppresses_boxes_is_there_before_the_first(
    name: str, pretended_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()
    monkeypatch.setattr(nms, "ready", asked.append)
    weights = shared.WEIGHTS[name](tmp_path)  # type: ignore[misc]
    case = Case(name, models.family(name).CARDS[0].kind, weights, shared.SMALL.get(name, {}), [])
    with pretended_gpu():
        case.loaded("cuda")
    assert asked == ["cuda"]


ROUGH = np.pad(np.ones((12, 10), bool), ((4, 44), (6, 24)))  # of the tall picture


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sam", "sam2"])
@pytest.mark.parametrize(
    "asked",
    [
        {"boxes": [[5, 5, 30, 40], [10, 3, 38, 44]]},
        {"points": [[[20, 20]], [[30, 30], [5, 5]]], "point_labels": [[1], [1, 0]]},
        {"boxes": [[5, 5, 30, 40]], "points": [[[20, 20]]]},
        {"boxes": [[5, 5, 30, 40]], "masks": [{"size": [60, 40], "counts": rle.encode(ROUGH)}]},
    ],
    ids=" and ".join,
)
def test_prompts(
    name: str, asked: dict[str, Any], pretended_gpu: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    some = batches(asked)[1:] if "masks" in asked else batches(asked)
    weights = shared.WEIGHTS[name](tmp_path)  # type: ignore[misc]
    check(Case(name, "masks", weights, shared.SMALL[name], some, Shelf), pretended_gpu, caplog)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["drawn", "drawn by XL", "redrawn by XL", "controlled", "flagged"])
def test_images(how: str, pretended_gpu: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    xl = how.endswith("XL")
    weights = tinydiffusion.xl(tmp_path) if xl else tinydiffusion.sd(tmp_path, safety=how == "flagged")
    params: dict[str, Any] = {"prompt": "a cat", "steps": 3, "safety": how == "flagged"}
    some = batches({})
    if how == "controlled":
        params |= {"controlnet": str(tinydiffusion.controlnet(tmp_path, weights)), "control": "canny"}
    elif how != "redrawn by XL":
        some = [[(None, item) for _, item in batch] for batch in some]
    check(Case("diffusion", "image", weights, params, some), pretended_gpu, caplog)


@pytest.mark.parametrize("name", ["yolo", "dinov2"])
def test_a_whole_job_with_two_batches_under_way(
    name: str,
    pretended_gpu: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = shared.WEIGHTS[name](tmp_path)  # type: ignore[misc]
    card = models.family(name).CARDS[0]
    asked = {"kind": card.kind, "model": str(weights), "params": shared.SMALL.get(name, {})}
    on_cpu = job(tmp_path / "cpu", "cpu", dataset=dataset(tmp_path / "pictures"), **asked)
    monkeypatch.setattr(devices, "_gpus", lambda: [devices.Device("GPU-1", "none", 24)])
    with pretended_gpu():
        found = job(tmp_path / "gpu", "gpu", dataset=str(tmp_path / "pictures"), **asked)
    assert "is tried again" not in caplog.text
    assert len(found) == 30
    assert all(shared.same(a, b, 1e-3) for a, b in zip(found, on_cpu, strict=True))


def test_a_job_whose_pictures_the_gpu_decodes(
    pretended_gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"kind": "detections", "model": str(shared.WEIGHTS["yolo"](tmp_path)), "params": {"imgsz": 64}}  # type: ignore[misc]
    pictures = dataset(tmp_path / "pictures")
    on_cpu = job(tmp_path / "cpu", "cpu", dataset=pictures, **asked)
    plain, counts = io.decode_jpeg, list[int]()

    def decode_jpeg(data: list[torch.Tensor], mode: Any, device: str) -> list[torch.Tensor]:
        counts.append(len(data))
        return [one.to(device) for one in plain(data, mode=mode)]

    monkeypatch.setattr(io, "decode_jpeg", decode_jpeg)
    monkeypatch.setattr(devices, "_gpus", lambda: [devices.Device("GPU-1", "none", 24)])
    with pretended_gpu():
        found = job(tmp_path / "gpu", "gpu", {"gpu_decode": True}, dataset=pictures, **asked)
    assert sum(counts[1:]) == 15, "the JPEGs, after one to see whether it can"
    assert all(shared.same(a, b, 1e-3) for a, b in zip(found, on_cpu, strict=True))


def dataset(folder: Path) -> str:
    """Thirty pictures of two shapes, every other one a JPEG."""
    folder.mkdir()
    for i, picture in enumerate([*shared.pictures(20), *shared.pictures(10, (64, 40))]):
        Image.fromarray(picture).save(folder / f"{i:02d}.{'jpg' if i % 2 else 'png'}")
    return str(folder)


def job(
    home: Path, device: str, set_to: dict[str, Any] | None = None, runtime: str = "torch", **asked: Any
) -> list[Any]:
    """The results of a job by a worker in this process, in the order of their keys."""
    home.mkdir()
    settings = Settings(home=home, **(set_to or {}))
    store = open_store((home / "store").as_uri(), settings)
    with opened(f"sqlite:///{home / 'index.db'}") as db:
        spec = submit.resolve(
            db, store, settings, device=device, runtime=runtime, precision="fp32", batch=4, shard_size=16, **asked
        )
        made, _ = lifecycle.submit(db, spec, force=True)
        plan.plan(db, store, settings, made)
        me = Incarnation(db, settings, device, spec.queue, lambda: False)
        me.start()
        stream = Stream(db, store, settings, me, "cpu" if device == "cpu" else "cuda")
        try:
            stream.run(spec.queue)
        finally:
            me.stop()
            stream.close()
        written = db.query(sa.select(tables.shard.c.result_key))
    outcomes = [outcome for (key,) in written for outcome in shardfile.read(store, key)[0]]
    return [outcome.result for outcome in sorted(outcomes, key=lambda outcome: outcome.key)]
