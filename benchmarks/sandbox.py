"""How much slower pictures decode in two child processes (workers/sandbox.py) than in two threads of this process.

Run from the repository: .venv/bin/python benchmarks/sandbox.py
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image

from workers import images
from workers.images import Decoded, Limits
from workers.sandbox import Sandbox

COUNT, WIDTH, HEIGHT, WORKERS, ROUNDS = 400, 960, 640, 2, 5
MEMORY_BYTES, TIMEOUT_S = 4_000_000_000, 60


def main() -> None:
    pictures = [jpeg(seed % 20) for seed in range(COUNT)]
    limits = Limits()
    sandbox = Sandbox(WORKERS, limits, MEMORY_BYTES, TIMEOUT_S)
    ways: dict[str, Callable[[bytes], Decoded]] = {
        "in process": lambda data: images.decode(data, limits),
        "sandbox": sandbox.decode,
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with ThreadPoolExecutor(WORKERS) as pool:
        for turn in range(ROUNDS + 1):
            for name, way in ways.items():
                rate = pictures_a_second(pool, way, pictures)
                if turn:  # the first round loads the libraries and starts the children
                    rates[name].append(rate)
    sandbox.close()
    report(rates, sum(map(len, pictures)) // COUNT)


def jpeg(seed: int) -> bytes:
    """A picture with edges and noise, as heavy for a decoder as a photograph."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT)), np.int16)
    pixels = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return out.getvalue()


def pictures_a_second(pool: ThreadPoolExecutor, way: Callable[[bytes], Decoded], pictures: list[bytes]) -> float:
    start = time.perf_counter()
    if any(picture.width != WIDTH for picture in pool.map(way, pictures)):
        raise SystemExit("a picture came back with another size")
    return len(pictures) / (time.perf_counter() - start)


def report(rates: dict[str, list[float]], nbytes: int) -> None:
    print(f"{COUNT} JPEGs of {WIDTH} x {HEIGHT}, {nbytes // 1000} KB each, {WORKERS} threads, {ROUNDS} rounds each")
    for name, found in rates.items():
        print(f"{name:<11} median {statistics.median(found):5.0f} pictures/s ({min(found):.0f} to {max(found):.0f})")
    ratio = statistics.median(rates["sandbox"]) / statistics.median(rates["in process"])
    print(f"the sandbox decodes {ratio:.2f} times as many pictures a second")


if __name__ == "__main__":
    main()
