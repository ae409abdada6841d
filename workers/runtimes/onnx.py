"""Runs a network in ONNX Runtime: on the CPU in fp32, on a CUDA device in fp32 or fp16 without leaving it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage.errors import Misconfigured, one_line
from workers import lanes, onnxcuda, onnxgraph, pixels
from workers.runtimes import Files, Network, NotRunnable, Session

RUNS = {"cpu": ("fp32",), "cuda": ("fp32", "fp16")}
EXTRA = "onnx"

_CUDA = "CUDAExecutionProvider"

# A new algorithm search for every new size costs more than it gains; TF32 has 10 bits where fp32 is asked for.
_CUDA_OPTIONS = {"device_id": "0", "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}


def installed() -> bool:
    """Whether networks can be exported, and ONNX Runtime imported."""
    return onnxgraph.installed()


def open(network: Network, device: str, precision: str, files: Files) -> Session:
    """Export the network, or take the file exported before, and open it; outputs come back as float32.

    Raises:
        NotRunnable: it cannot be exported, ONNX Runtime cannot open it, or would compute parts of it on the CPU.
        Misconfigured: a CUDA device was asked for, and ONNX Runtime would run on the CPU.
    """
    import torch

    path = onnxgraph.exported(network, files, precision)
    if device.startswith("cuda"):
        return pixels.taken(network, _on_cuda(path, device))
    threads = torch.get_num_threads()

    def opened(calls: int) -> Session:
        return pixels.taken(network, onnxgraph.opened(path, threads // calls))

    return lanes.opened(network, threads, opened)


def _on_cuda(path: Path, device: str) -> Session:
    import onnxruntime

    onnxruntime.preload_dlls()  # the CUDA libraries that torch brought
    session = _opened(path)
    _check_provider(session.get_providers())
    onnxcuda.check_placed(session, _CUDA)
    return onnxcuda.Bound(session, device)


def _opened(path: Path) -> Any:
    import onnxruntime

    if _CUDA not in onnxruntime.get_available_providers():
        _check_provider(onnxruntime.get_available_providers())
    try:
        given = [(_CUDA, _CUDA_OPTIONS)]
        return onnxruntime.InferenceSession(path, onnxcuda.options(), providers=given, enable_fallback=0)
    except Exception as error:
        raise NotRunnable(f"ONNX Runtime cannot open {path.name}: {one_line(str(error), 400)}") from error


def _check_provider(providers: list[str]) -> None:
    """Raise Misconfigured unless CUDA is among them: ONNX Runtime falls back to the CPU without an error."""
    if _CUDA not in providers:
        raise Misconfigured(
            f"ONNX Runtime does not run on CUDA here, only with {', '.join(providers)}; replace onnxruntime by "
            "onnxruntime-gpu for torch's CUDA version, or take --runtime torch"
        )
