"""Runs a network in TensorRT on an NVIDIA GPU, in fp32 or fp16. It has not been run on a GPU yet.

TensorRT's own builder makes an engine from the network's ONNX file, for one range of sizes; a size outside of it has a
wider engine built. Where the library `tensorrt` is not installed, ONNX Runtime's plug-in for TensorRT RTX does the
same, on the GPUs that it knows (compute capability 8.6, 8.9, and 12.0 or higher).

A network may also come as an engine that somebody has built already. `workers/tensorrtengine.py` runs both kinds.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage import settings
from storage.errors import BadInput, Misconfigured, one_line
from workers import enginemeta, onnxcuda, onnxgraph, pixels, tensorrtengine
from workers.runtimes import Files, Network, NotRunnable, Session
from workers.tensorrtengine import Engine, Shape

RUNS = {"cuda": ("fp32", "fp16")}
EXTRA = "onnx,gpu"

_PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"
_PLUGIN_PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
_PLUGIN_KNOWS = ((8, 6), (8, 9))  # compute capabilities below 12.0, tensorrt_rtx_provider_options.h of 0.5

_USUAL_BATCH, _MOST_BATCH = 8, 32
_LEAST_SIDE = 32  # pixels; of an axis that is shorter in the example the least is 1


def installed() -> bool:
    """Whether TensorRT, or ONNX Runtime's plug-in of it, can be imported, and networks exported."""
    return (_native() or importlib.util.find_spec(_PLUGIN) is not None) and onnxgraph.installed()


def _native() -> bool:
    return importlib.util.find_spec("tensorrt") is not None


def open(network: Network, device: str, precision: str, files: Files) -> Session:
    """Build the network's engine, or take the one built before for this kind of GPU; outputs come back as float32.

    Raises:
        NotRunnable: it cannot be exported, TensorRT cannot build it, or the engine computes something else.
        Misconfigured: neither TensorRT nor the plug-in is installed, or there is no GPU.
        BadInput: the network is an engine, which runs in the precision that it was built in.
    """
    if not installed():
        raise Misconfigured(
            "the runtime tensorrt needs TensorRT; install it with: pip install 'imagemill[onnx,gpu]', or "
            f"pip install {_PLUGIN_PACKAGE}"
        )
    import torch

    if not torch.cuda.is_available():
        raise Misconfigured("the runtime tensorrt needs an NVIDIA GPU, and torch sees none; take --runtime torch")
    if network.engine is not None:
        return pixels.taken(network, _ready(network.engine, network, device, precision))
    path = onnxgraph.exported(network, files, precision)
    if _native():
        return pixels.taken(network, _Engines(path, network, device, precision, files))
    return pixels.taken(network, _plugin(path, network, device))


@dataclass(frozen=True, slots=True)
class Profile:
    """The sizes that one engine takes.

    Attributes:
        shapes: input name -> its least, usual and largest shape.
    """

    shapes: Mapping[str, tuple[Shape, Shape, Shape]]

    @classmethod
    def of(cls, network: Network) -> Profile:
        """For batches of 1 to 32, and other axes that may vary up to the example's size."""
        axes = network.dynamic_axes
        return cls({name: _range(tuple(t.shape), axes.get(name, {})) for name, t in network.example.items()})

    def covers(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether an engine built for this profile takes inputs of these shapes."""
        return all(
            len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
            for shape, (least, _, most) in ((shape, self.shapes[name]) for name, shape in shapes.items())
        )

    def widened(self, shapes: Mapping[str, Shape]) -> Profile:
        """The profile that takes these shapes too; what grows does so to a power of two, so that it grows rarely."""
        wide = {}
        for name, (least, usual, most) in self.shapes.items():
            less = tuple(min(a, n) for a, n in zip(least, shapes[name], strict=True))
            more = tuple(b if n <= b else _power(n) for b, n in zip(most, shapes[name], strict=True))
            wide[name] = (less, usual, more)
        return Profile(wide)

    def __str__(self) -> str:
        return "; ".join(f"{name} {' '.join(map(_by, shapes))}" for name, shapes in sorted(self.shapes.items()))


def _range(example: Shape, axes: Mapping[int, str]) -> tuple[Shape, Shape, Shape]:
    """Least, usual and largest shape of an input."""
    least, usual, most = list(example), list(example), list(example)
    for axis in axes:
        size = example[axis]
        if axis == 0:
            least[axis], usual[axis], most[axis] = 1, _USUAL_BATCH, _MOST_BATCH
        else:
            least[axis] = _LEAST_SIDE if size >= _LEAST_SIDE else 1
    return tuple(least), tuple(usual), tuple(most)


def _power(size: int) -> int:
    """The least power of two that is not below a size."""
    return 1 << (size - 1).bit_length()


def _by(shape: Shape) -> str:
    """A shape as TensorRT's own tools write it, such as 1x3x640x640."""
    return "x".join(map(str, shape))


def about(onnx_sha256: str, profile: Profile, precision: str, library: str, gpu: str) -> dict[str, str]:
    """Everything that an engine depends on.

    Args:
        onnx_sha256: of the ONNX file, which holds the weights.
        library: name and version of what builds it.
        gpu: name and compute capability; engines run on the kind of GPU that they were built on.
    """
    return {
        "file": "tensorrt",
        "onnx": onnx_sha256,
        "shapes": str(profile),
        "precision": precision,
        "library": library,
        "gpu": gpu,
    }


def _gpu() -> str:
    import torch

    return f"{torch.cuda.get_device_name(0)} {'.'.join(map(str, torch.cuda.get_device_capability(0)))}"


class _Engines:
    """A network as an engine of TensorRT, replaced by a wider one when a size asks for it."""

    def __init__(self, path: Path, network: Network, device: str, precision: str, files: Files) -> None:
        self._path, self._network, self._device, self._precision, self._files = path, network, device, precision, files
        self._onnx_sha256 = onnxgraph.sha256_of(path)
        self._splits = all(0 in network.dynamic_axes.get(n, {}) for n in (*network.example, *network.outputs))
        self._profile = Profile.of(network)
        self._engine = self._opened(self._profile)

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        import torch

        with tensorrtengine.context():
            placed = {name: inputs[name].to(self._device) for name in self._network.example}
            size = len(next(iter(placed.values())))
            if not self._splits or size <= _MOST_BATCH:
                return self._run(placed)
            parts = [
                self._run({name: tensor[start : start + _MOST_BATCH] for name, tensor in placed.items()})
                for start in range(0, size, _MOST_BATCH)
            ]
        return {name: torch.cat([part[name] for part in parts]) for name in self._network.outputs}

    def _run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        import torch

        shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        if not self._profile.covers(shapes):
            profile = self._profile.widened(shapes)
            torch.cuda.synchronize()  # the engine that goes may still be computing
            self._engine = self._opened(profile)
            self._profile = profile
        return self._engine(inputs)

    def _opened(self, profile: Profile) -> Engine:
        library = f"tensorrt {version('tensorrt')}"
        gpu = _gpu()
        timing = settings.load().cache_folder / "tensorrt" / f"{library} {gpu}.timing".replace(" ", "-")
        named = about(self._onnx_sha256, profile, self._precision, library, gpu)
        name = f"{self._network.name}-{self._precision}.engine"
        with tensorrtengine.context():
            path = self._files.get(named, name, functools.partial(self._build, profile, timing))
            return Engine(path.name, path.read_bytes())

    def _build(self, profile: Profile, timing: Path, path: Path) -> None:
        """Write an engine that computes what its ONNX file does. Raises NotRunnable."""
        _build(self._path, profile, timing, path)
        engine = Engine(self._network.name, path.read_bytes())

        def run(**inputs: Any) -> dict[str, Any]:
            return engine({name: tensor.to(self._device) for name, tensor in inputs.items()})

        onnxgraph.check(self._path, self._network, run, self._precision)


def _ready(path: Path, network: Network, device: str, precision: str) -> Session:
    """A session of an engine that somebody has built: batches are cut to what it takes, and filled up to it."""
    import torch

    if precision != "fp32":
        raise BadInput(f"{path.name} runs in the precision it was built in; take --precision fp32")
    if not _native():
        raise Misconfigured(f"{path.name} needs the library tensorrt: pip install 'imagemill[onnx,gpu]'")
    with tensorrtengine.context():
        engine = Engine(path.name, enginemeta.plan(path))
    (given,) = network.example
    if list(engine.inputs) != [given] or list(engine.outputs) != list(network.outputs):
        raise NotRunnable(
            f"the engine {path.name} has the inputs {', '.join(engine.inputs)} and the outputs "
            f"{', '.join(engine.outputs)}, but {given} and {', '.join(network.outputs)} were expected"
        )

    def run(**inputs: Any) -> dict[str, Any]:
        whole, parts = inputs[given].to(device), []
        with tensorrtengine.context():
            for start, end, lacking in tensorrtengine.cut(len(whole), engine.least[given][0], engine.most[given][0]):
                part = whole[start:end]
                filled = torch.cat([part, *[part[-1:]] * lacking]) if lacking else part
                parts.append({name: t[: end - start] for name, t in engine({given: filled}).items()})
            return {name: torch.cat([part[name] for part in parts]) for name in network.outputs}

    return run


def _build(onnx: Path, profile: Profile, timing: Path, path: Path) -> None:
    """Write the engine of an ONNX file. Raises NotRunnable with what TensorRT says.

    The network is strongly typed: an engine computes in the types of the ONNX file, and nothing is rounded unasked.
    """
    import tensorrt
    import torch

    torch.cuda.empty_cache()  # a builder that finds no memory leaves the fast kernels out
    logger = tensorrtengine.logger()
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        reasons = "; ".join(parser.get_error(i).desc() for i in range(min(parser.num_errors, 3)))
        raise NotRunnable(f"TensorRT cannot read {onnx.name}: {one_line(reasons, 400)}")
    config = builder.create_builder_config()
    config.clear_flag(tensorrt.BuilderFlag.TF32)  # which has 10 bits where fp32 is asked for
    chosen = builder.create_optimization_profile()
    for name, shapes in profile.shapes.items():
        chosen.set_shape(name, *shapes)
    config.add_optimization_profile(chosen)
    config.set_timing_cache(config.create_timing_cache(_read(timing)), ignore_mismatch=False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise NotRunnable(f"TensorRT cannot build an engine for {profile}: {tensorrtengine.said()}")
    path.write_bytes(memoryview(plan))
    _write(timing, memoryview(config.get_timing_cache().serialize()))


def _read(path: Path) -> bytes:
    """What was measured in earlier builds, b"" for nothing."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _write(path: Path, data: memoryview) -> None:
    """Keep it for the next build; a build goes without where that fails."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)


# ------------------------------------------------------------------------------------------------ the plug-in


def _plugin(path: Path, network: Network, device: str) -> Session:
    """A session of ONNX Runtime that runs in TensorRT RTX, compiled for the profile's sizes."""
    import onnxruntime
    import torch

    check_capability(torch.cuda.get_device_capability(0))
    name = _registered()
    devices = [found for found in onnxruntime.get_ep_devices() if found.ep_name == name]
    if not devices:
        raise NotRunnable(f"the plug-in {_PLUGIN_PACKAGE} {version(_PLUGIN_PACKAGE)} knows no device here ({_gpu()})")
    chosen = onnxcuda.options()
    folder = settings.load().cache_folder / "tensorrt" / "rtx"
    chosen.add_provider_for_devices(devices[:1], plugin_options(Profile.of(network), folder))
    try:
        session = onnxruntime.InferenceSession(path, chosen, enable_fallback=0)
    except Exception as error:
        raise NotRunnable(f"TensorRT RTX cannot run {path.name}: {one_line(str(error), 400)}") from error
    onnxcuda.check_placed(session, name)
    return onnxcuda.Bound(session, device)


@functools.cache
def _registered() -> str:
    """The name of the plug-in's provider, made known to ONNX Runtime once in a process. Raises NotRunnable."""
    import onnxruntime
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    if not hasattr(onnxruntime, "register_execution_provider_library"):
        raise NotRunnable(f"the plug-in {_PLUGIN_PACKAGE} needs onnxruntime 1.24, not {onnxruntime.__version__}")
    name = str(plugin.get_ep_name())
    try:
        onnxruntime.register_execution_provider_library(name, plugin.get_library_path())
    except Exception as error:
        raise NotRunnable(f"ONNX Runtime cannot load {_PLUGIN_PACKAGE}: {one_line(str(error), 400)}") from error
    return name


def check_capability(capability: tuple[int, int]) -> None:
    """Raise NotRunnable for a GPU that TensorRT RTX does not know."""
    if capability not in _PLUGIN_KNOWS and capability < (12, 0):
        found = ".".join(map(str, capability))
        raise NotRunnable(
            f"the plug-in {_PLUGIN_PACKAGE} runs on compute capability 8.6, 8.9 and from 12.0, but this GPU has "
            f"{found}; install tensorrt instead"
        )


def plugin_options(profile: Profile, folder: Path) -> dict[str, str]:
    """Options of the plug-in: the profile's shapes, and where it keeps what it compiles."""

    def shapes(which: int) -> str:
        return ",".join(f"{name}:{_by(found[which])}" for name, found in profile.shapes.items())

    return {
        "nv_profile_min_shapes": shapes(0),
        "nv_profile_opt_shapes": shapes(1),
        "nv_profile_max_shapes": shapes(2),
        "nv_runtime_cache_path": str(folder),
    }
