"""What the sections of benchmarks/gpu.py share: a report in Markdown, attempts that may fail, rates, random weights."""

from __future__ import annotations

import contextlib
import importlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import LeftOut

ROUNDS = 3
BEFORE_WAITING = 8  # calls that may queue up on a device before it is waited for


@dataclass
class Bench:
    """One section's run.

    Attributes:
        device: "cuda" or "cpu".
        quick: tiny sizes and fractions of a second.
        folder: for weights and datasets, deleted afterwards.
        lines: everything that was said.
        failed: attempts that failed.
    """

    device: str
    quick: bool
    folder: Path
    lines: list[str] = field(default_factory=list)
    failed: int = 0

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure on."""
        return self.device == "cuda"

    @property
    def seconds(self) -> float:
        """Of each round of a measure."""
        return 0.02 if self.quick else 1.0

    def say(self, line: str = "") -> None:
        """A line of the report, at once."""
        print(line, flush=True)
        self.lines.append(line)

    def head(self, *names: str) -> None:
        """Begin a table."""
        self.say()
        self.row(*names)
        self.say("|" + "---|" * len(names))

    def row(self, *cells: object) -> None:
        """A row of a table; numbers with three digits."""
        self.say(
            "| " + " | ".join(f"{c:.3g}" if isinstance(c, float) and abs(c) < 100 else shown(c) for c in cells) + " |"
        )

    def attempt(self, *cells: object, take: Callable[[], tuple[object, ...]]) -> None:
        """A row whose last cells are measured; what is not installed is left out, what fails is told and counted."""
        try:
            self.row(*cells, *take())
        except LeftOut as reason:
            self.row(*cells, f"left out: {reason}")
        except ImportError as error:
            self.row(*cells, f"left out: {error.name} is not installed")
        except Exception as error:  # noqa: BLE001 (the other rows still tell something)
            fits = type(error).__name__ != "OutOfMemoryError"  # torch's
            self.failed += fits
            failed = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            self.row(*cells, failed if fits else "does not fit into the device's memory")
        self.free()

    @contextlib.contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Goes on without something whose library is missing, and says so."""
        try:
            yield
        except ImportError as error:
            self.say(f"{name} is left out: {error.name} is not installed")
        except LeftOut as reason:
            self.say(f"{name} is left out: {reason}")

    def free(self) -> None:
        """Give back the memory of what went before."""
        import gc

        import torch

        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def wait(self) -> None:
        """Until the device has done what it was given."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def rate(self, work: Callable[[], float]) -> float:
        """Items a second of `work`, which returns how many it did: the median of some rounds, the device waited for."""
        for _ in range(1 if self.quick else 3):
            work()
        self.wait()
        return statistics.median(self._round(work) for _ in range(1 if self.quick else ROUNDS))

    def _round(self, work: Callable[[], float]) -> float:
        done, calls, started = 0.0, 0, time.perf_counter()
        while not calls or time.perf_counter() - started < self.seconds:
            done += work()
            calls += 1
            if calls % BEFORE_WAITING == 0:
                self.wait()
        self.wait()
        return done / (time.perf_counter() - started)


def shown(cell: object) -> str:
    """A cell as text."""
    return f"{cell:.0f}" if isinstance(cell, float) else str(cell).replace("|", "/")


def main(name: str, *, quick: bool) -> int:
    """Run a section in this process; 0, 1 when it failed, LEFT_OUT when a library is missing that all of it needs."""
    with tempfile.TemporaryDirectory(prefix="imagemill-gpu-", ignore_cleanup_errors=True) as folder:
        try:
            import torch

            bench = Bench("cuda" if torch.cuda.is_available() else "cpu", quick, Path(folder))
            importlib.import_module(f"benchmarks.gpu_sections.{name}").run(bench)
        except LeftOut as reason:
            print(f"left out: {reason}", flush=True)
            return common.LEFT_OUT
        except ImportError as error:
            print(f"left out: {error.name} is not installed", flush=True)
            return common.LEFT_OUT
        except Exception as error:  # noqa: BLE001 (told; the other sections are processes of their own)
            print(f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:500]}", flush=True)
            return 1
    return 1 if bench.failed else 0


def need(*modules: str) -> None:
    """Raise LeftOut unless these can be imported."""
    for name in modules:
        if importlib.util.find_spec(name) is None:
            raise LeftOut(f"{name} is not installed")


def expect(right: bool, what: str) -> None:
    """Raise when what must hold does not."""
    if not right:
        raise RuntimeError(what)


def networks(bench: Bench, family: str, weights: Path, params: dict[str, Any], kind: str) -> dict[str, Any]:
    """The networks that a family asks a runtime for on this device, by name, none of them opened."""
    from workers import models
    from workers.models import Site

    found: dict[str, Any] = {}

    def open_network(network: Any) -> Any:
        found[network.name] = network
        return lambda **inputs: {}

    card = models.card_for("bench", family, kind)
    models.family(family).load(card, card.params(**params), weights, Site(bench.device, open_network))
    return found


def load(
    bench: Bench,
    family: str,
    weights: Path,
    params: dict[str, Any],
    kind: str,
    precision: str,
    around: Callable[[Any], Any] = lambda session: session,
) -> Any:
    """A model on the device, in torch.

    Args:
        around: makes what the model calls of a network's session.
    """
    from workers import models
    from workers.models import Site
    from workers.runtimes import torch as runtime

    card = models.card_for("bench", family, kind)
    site = Site(bench.device, lambda network: around(runtime.open(network, bench.device, precision)), precision)
    return models.family(family).load(card, card.params(**params), weights, site)


def yolo_weights(folder: Path, name: str) -> Path:
    """A YOLO of random weights, as ultralytics saves it."""
    need("ultralytics", "cv2")
    path = folder / f"{name}.pt"
    if not path.exists():
        import torch

        with quiet(), torch.no_grad():
            from ultralytics import YOLO

            torch.manual_seed(0)
            model = YOLO(f"{name}.yaml")
            norms = [module for module in model.model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
            for norm in norms:
                norm.momentum, norm.training = None, True
            # Without it every layer halves the numbers, and in the end only the biases are left.
            model.model(torch.randn(4, 3, 128, 128))
            for norm in norms:
                norm.momentum, norm.training = 0.03, False
            model.save(str(path))
    return path


def dinov2_weights(folder: Path, name: str, width: int, layers: int, heads: int, size: int = 518) -> Path:
    """A DINOv2 of random weights, as transformers saves it."""
    need("transformers", "safetensors")
    path = folder / name
    if not path.exists():
        import transformers

        config = transformers.Dinov2Config(
            hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, image_size=size
        )
        with quiet():
            transformers.Dinov2Model(config).save_pretrained(path)
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what libraries print lands in the report."""
    import io
    import logging

    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    logging.disable(logging.NOTSET)


def jpegs(count: int, width: int, height: int) -> list[bytes]:
    """Pictures with edges and noise, as heavy for a decoder as photographs."""
    import io

    import numpy as np
    from PIL import Image

    found = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        coarse = rng.integers(0, 255, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((width, height)), np.int16)
        pixels = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        found.append(buffer.getvalue())
    return found
