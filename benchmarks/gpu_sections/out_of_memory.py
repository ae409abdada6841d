"""The section on memory that runs out: the batch halves until it fits, and every picture still gets its answer."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu_sections import precisions
from benchmarks.gpu_sections.bench import Bench, expect, need

LEFT_GB = 3  # of the card, for the detector; the rest is taken away beforehand


def run(bench: Bench) -> None:
    """On the card itself; without one a model that pretends."""
    if bench.on_gpu:
        on_card(bench)
    else:
        bench.say("The CPU has no memory of its own to run out of: the stub model pretends, above a batch of 4.")
        halves(bench, pretender(), list(range(30)), list(range(30)))


def on_card(bench: Bench) -> None:
    """The demo's detector on more pictures at once than the card takes, most of whose memory is taken."""
    import torch

    need("ultralytics", "cv2")
    free, total = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - LEFT_GB * 2**30), dtype=torch.uint8, device="cuda")
    bench.say(
        f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; {ballast.numel() / 2**30:.1f} GiB are taken away."
    )
    pictures = precisions.scenes(8)
    count = 128 if bench.quick else 256
    detector = precisions.load("cuda", "fp32", imgsz=1280)
    prepared = [detector.prepare(picture, item()) for picture in pictures]
    few = [one for one in prepared if one.group == prepared[0].group]  # one batch has one shape
    expected = [one.labels for one in detector.infer(few)]
    many = [few[i % len(few)] for i in range(count)]
    halves(bench, detector, many, [expected[i % len(few)] for i in range(count)])
    bench.say(f"At most {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB were held by torch, the ballast among it.")
    del ballast


def item() -> Any:
    """An item without prompts."""
    from workers.models import Item

    return Item("x")


def halves(bench: Bench, model: Any, many: list[Any], expected: list[Any]) -> None:
    """Run a batch that is too large, and hold what comes out against what should. Raises when it does not."""
    from storage.errors import ItemFailed
    from workers import batches

    size = batches.BatchSize(len(many))
    answers = batches.infer(model, many, size)
    failed = [answer for answer in answers if isinstance(answer, ItemFailed)]
    bench.say(
        f"{len(answers)} answers of {len(many)} pictures, {len(failed)} failures; batch {size.asked} -> {size.safe}."
    )
    expect(len(answers) == len(many), "pictures were lost")
    expect(not failed, f"pictures failed: {failed[:1]}")
    expect(size.safe < size.asked, "the memory did not run out: more pictures are needed")
    found = [answer.labels if hasattr(answer, "labels") else answer for answer in answers]
    same = sum(one == right for one, right in zip(found, expected, strict=True))
    bench.say(f"{same} of {len(many)} have the labels that they have in a small batch.")
    expect(same >= 0.98 * len(many), "answers went to the wrong pictures")


def pretender() -> Any:
    """The stub model, which raises MemoryError for a batch of more than 4; each answer is the picture's own number."""
    import numpy as np

    from workers.models import Item, stub

    class Pretender:
        def __init__(self) -> None:
            self.model = stub.load(stub.CARDS[0], stub.Params(oom_above=4), None, None)  # type: ignore[arg-type]
            self.picture = self.model.prepare(np.zeros((8, 8, 3), np.uint8), Item("x"))

        def infer(self, batch: Any) -> list[Any]:
            self.model.infer([self.picture] * len(batch))
            return list(batch)

    return Pretender()
