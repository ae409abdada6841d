"""Runs a network in OpenVINO on the CPU, in fp32 or, where the CPU computes in it, bf16.

One compiled network takes inputs of any size: compiling one for each size was measured to gain nothing (yolov8n at
640x480 and 640x640), and compiling takes a fraction of a second, so nothing but the ONNX file is kept. Nothing is sent
anywhere: of OpenVINO only the runtime is used, and only its converter reports on itself.
"""

from __future__ import annotations

import importlib.util
import threading
from typing import Any

from storage.errors import BadInput, one_line
from workers import lanes, onnxgraph
from workers.runtimes import Files, Network, NotRunnable, Session

RUNS = {"cpu": ("fp32", "bf16")}
EXTRA = "onnx,openvino"

_CHANNELS = 3
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
    try:
        model = _taking_pictures(core.read_model(path), network)
        return lanes.opened(
            network, torch.get_num_threads(), lambda calls: _compiled(core, model, network, precision, calls)
        )
    except RuntimeError as error:
        raise NotRunnable(f"OpenVINO cannot run the network {network.name}: {one_line(str(error), 400)}") from error


def _taking_pictures(model: Any, network: Network) -> Any:
    """The model with pictures given channels last: as models give them, and as OpenVINO computes them; and as bytes.

    What makes numbers of bytes costs nothing measurable there: yolov8n at 640 x 448 in bf16 ran 1.01 times as fast as
    with floats, by turns.
    """
    from openvino import Layout, Type
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(model)
    for name in filter(lambda name: _is_picture(network, name), network.example):
        steps.input(name).tensor().set_layout(Layout("NHWC"))
        steps.input(name).model().set_layout(Layout("NCHW"))
        if name in network.pixels:
            of_bytes = network.pixels[name]
            steps.input(name).tensor().set_element_type(Type.u8)
            step = steps.input(name).preprocess().convert_element_type(Type.f32)
            step = step if of_bytes.plain else step.mean([255 * mean for mean in of_bytes.mean])
            step.scale([255 * std for std in of_bytes.std])
    return steps.build()


def _is_picture(network: Network, name: str) -> bool:
    tensor = network.example[name]
    return bool(tensor.ndim == 4 and tensor.shape[1] == _CHANNELS and tensor.is_floating_point())


def _given(network: Network, name: str, tensor: Any) -> Any:
    """A tensor as the model takes it, without a copy where its memory is in that order."""
    if name in network.pixels and tensor.is_floating_point():  # numpy would cut them off to bytes
        raise TypeError(f"expected {name} as bytes, but got {tensor.dtype}")
    return (tensor.permute(0, 2, 3, 1) if _is_picture(network, name) else tensor).contiguous().numpy()


def _compiled(core: Any, model: Any, network: Network, precision: str, calls: int) -> Session:
    """The model for so many calls at once, which share all threads.

    Where that is more than one, what a call gives is overwritten by the next call of the same thread.
    """
    import openvino
    import torch

    wanted = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY" if calls == 1 else "THROUGHPUT",
        "NUM_STREAMS": calls,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core.compile_model(model, "CPU", wanted)
    # A port may have several names, any of which OpenVINO gives: it is asked by the one that we gave.
    inputs = {name: compiled.input(name).get_element_type().to_dtype() for name in network.example}
    outputs = [(name, compiled.output(name)) for name in network.outputs]
    mine = threading.local()

    def session(**tensors: Any) -> dict[str, Any]:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        arrays = {name: _given(network, name, tensors[name]).astype(kind, copy=False) for name, kind in inputs.items()}
        mine.request.infer({name: openvino.Tensor(array, shared_memory=True) for name, array in arrays.items()})
        found = {name: mine.request.get_tensor(port).data for name, port in outputs}
        return {name: onnxgraph.plain(array if calls > 1 else array.copy()) for name, array in found.items()}

    return session
