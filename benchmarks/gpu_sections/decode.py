"""The section on decoding: threads of the CPU beside batches on the device, and how far the pixels differ."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu_sections.bench import Bench, expect, jpegs, need


def run(bench: Bench) -> None:
    """Pictures a second of each size."""
    need("torchvision", "cv2", "PIL")
    sizes = [(64, 48)] if bench.quick else [(640, 480), (1920, 1280)]
    count = 8 if bench.quick else 64
    bench.head("pictures", "decoder", "images a second")
    for width, height in sizes:
        data = jpegs(count, width, height)
        of_size(bench, f"{width} x {height}", data)


def of_size(bench: Bench, shape: str, data: list[bytes]) -> None:
    """All decoders on the same pictures."""
    from workers import batchdecode, images

    limits = images.Limits()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor() as all_cores:
        for name, pool in (("CPU, one thread", one), ("CPU, all threads", all_cores)):
            bench.attempt(
                shape,
                name,
                take=lambda pool=pool: (
                    bench.rate(lambda: len(list(pool.map(lambda d: images.decode(d, limits), data)))),
                ),
            )
    for size in (4,) if bench.quick else (16, 64):
        batch = data[:size]
        bench.attempt(
            shape,
            f"{bench.device}, batches of {size}, left there",
            take=lambda batch=batch: (bench.rate(lambda: len(batchdecode.decode(batch, limits, bench.device))),),
        )
        bench.attempt(
            shape,
            f"{bench.device}, batches of {size}, copied back",
            take=lambda batch=batch: (
                bench.rate(lambda: len([t.cpu() for t in batchdecode.decode(batch, limits, bench.device)])),
            ),
        )
    bench.attempt(shape, f"{bench.device} against the CPU", take=lambda: (levels(bench, data),))


def levels(bench: Bench, data: list[bytes]) -> str:
    """How many grey levels the device's pixels are off."""
    import torch

    from workers import batchdecode, images

    off = []
    for one, found in zip(data, batchdecode.decode(data, images.Limits(), bench.device), strict=True):
        right = torch.from_numpy(images.decode(one, images.Limits()).pixels).permute(2, 0, 1)
        expect(found.shape == right.shape, f"the device gives a picture of {tuple(found.shape)}")
        off.append((found.cpu().int() - right.int()).abs().float())
    mean, most = (torch.stack([f(t) for t in off]) for f in (torch.mean, torch.max))
    expect(float(mean.mean()) < 8, f"the device decodes something else: {float(mean.mean()):.1f} levels off on average")
    return f"off by {float(mean.mean()):.3f} levels on average, {float(most.max()):.0f} at most"
