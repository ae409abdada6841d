"""The section that says where it ran: card, driver, versions, and what is not installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from benchmarks import common
from benchmarks.gpu_sections.bench import Bench

# What a section may need: import name -> name of the package.
_WANTED = {
    "cv2": "opencv-python-headless",
    "torchvision": "torchvision",
    "ultralytics": "ultralytics-opencv-headless",
    "transformers": "transformers",
    "segment_anything": "segment-anything",
    "diffusers": "diffusers",
    "onnxscript": "onnxscript",
    "onnxruntime": "onnxruntime-gpu",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "pycuda": "pycuda",
    "onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu13",
    "pynvml": "nvidia-ml-py",
    "celery": "celery",
}


def run(bench: Bench) -> None:
    """Date, card, processor, versions."""
    import torch

    from workers import devices

    if bench.on_gpu:
        found = torch.cuda.get_device_properties(0)
        bench.say(
            f"- GPU: {found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors"
        )
        capability, cudnn = f"{found.major}.{found.minor}", torch.backends.cudnn.version()
        bench.say(f"- compute capability {capability}, CUDA {torch.version.cuda}, cuDNN {cudnn}")
        bench.say("- devices: " + ", ".join(f"{d.id} ({d.name}, {d.memory_gb} GB)" for d in devices.find("auto")))
    else:
        bench.say("- no GPU: what follows ran on the CPU, and says nothing about a GPU")
    for line in common.machine():
        bench.say(f"- {line}")
    lacking = [package for module, package in _WANTED.items() if importlib.util.find_spec(module) is None]
    for package in ("onnxruntime-gpu", "tensorrt", "pycuda", "nvidia-ml-py", "diffusers"):
        if any(True for _ in importlib.metadata.distributions(name=package)):
            bench.say(f"- {package} {importlib.metadata.version(package)}")
    bench.say(f"- not installed: {', '.join(lacking) or 'nothing that is used'}")
