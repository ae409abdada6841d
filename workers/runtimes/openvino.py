"""Runs a network in OpenVINO on the CPU, in fp32 or, where the CPU computes in it, bf16.

One compiled network takes inputs of any size: compiling one for each size was measured to gain nothing (yolov8n at
640x480 and 640x640), and compiling takes a fraction of a second, so nothing but the ONNX file is kept. Nothing is sent
anywhere: of OpenVINO only the runtime is used, and only its converter reports on itself.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from storage.errors import BadInput, one_line
from workers import onnxgraph
from workers.runtimes import Files, Network, NotRunnable, Session

RUNS = {"cpu": ("fp32", "bf16")}
EXTRA = "onnx,openvino"

_HINTS = {"fp32": "f32", "bf16": "bf16"}


def installed() -> bool:
    """Whether networks can be exported, and OpenVINO imported."""
    return importlib.util.find_spec("openvino") is not None and onnxgraph.installed()


def open(network: Network, device: str, precision: str, files: Files) -> Session:
    """Export the network, or take the file exported before, and compile it; outputs come back as float32.

    Raises:
        NotRunnable: it cannot be exported, or OpenVINO cannot compile it.
        BadInput: this CPU does not compute in bf16.
    """
    import openvino
    import torch

    core = openvino.Core()
    if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise BadInput("this CPU has no instructions for bf16; take --precision fp32")
    path = onnxgraph.exported(network, files)
    wanted = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",  # one batch at a time with all threads; THROUGHPUT would split them
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    try:
        compiled = core.compile_model(core.read_model(path), "CPU", wanted)
    except RuntimeError as error:
        raise NotRunnable(f"OpenVINO cannot run the network {network.name}: {one_line(str(error), 400)}") from error
    request = compiled.create_infer_request()
    # A port may have several names, any of which OpenVINO gives: it is asked by the one that we gave.
    inputs = {name: compiled.input(name).get_element_type().to_dtype() for name in network.example}
    outputs = [(name, compiled.output(name)) for name in network.outputs]

    def session(**tensors: Any) -> dict[str, Any]:
        arrays = {name: tensors[name].contiguous().numpy().astype(kind, copy=False) for name, kind in inputs.items()}
        request.infer({name: openvino.Tensor(array, shared_memory=True) for name, array in arrays.items()})
        # Copies: the next call writes into the same memory.
        return {name: onnxgraph.plain(request.get_tensor(port).data.copy()) for name, port in outputs}

    return session
