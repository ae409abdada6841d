"""Knows how ONNX Runtime computes on a CUDA device with torch's own tensors, so that nothing is copied to the host."""

from __future__ import annotations

from typing import Any

from storage.errors import Misconfigured
from workers import onnxgraph
from workers.runtimes import NotRunnable

_SHAPES = 256  # of inputs, whose outputs' shapes are remembered


# What a network spends its time in. Arithmetic on shapes, which ONNX Runtime leaves to the CPU on purpose, is none.
_COSTLY = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul", "NhwcConv", "Einsum"}
    | {"Attention", "MultiHeadAttention", "LayerNormalization", "InstanceNormalization", "Resize", "Softmax"}
)


def options() -> Any:
    """Session options of `onnxgraph`, under which a session can tell which provider computes what."""
    chosen = onnxgraph.options(1)
    chosen.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return chosen


def check_placed(session: Any, provider: str) -> None:
    """Raise unless a provider computes all that costs time: ONNX Runtime gives the CPU the rest without an error.

    Raises:
        Misconfigured: the provider is not there at all.
        NotRunnable: it does not know some costly node of this graph.
    """
    there = session.get_providers()
    if provider not in there:
        raise Misconfigured(f"ONNX Runtime runs in {', '.join(there)} here, but {provider} was asked for")
    if not hasattr(session, "get_provider_graph_assignment_info"):  # before 1.24
        return
    elsewhere: dict[str, int] = {}
    for part in session.get_provider_graph_assignment_info():
        if part.ep_name == provider:
            continue
        for node in part.get_nodes():
            if node.op_type in _COSTLY:
                elsewhere[node.op_type] = elsewhere.get(node.op_type, 0) + 1
    if elsewhere:
        shown = ", ".join(f"{count} {kind}" for kind, count in sorted(elsewhere.items()))
        raise NotRunnable(f"ONNX Runtime would compute {shown} of the graph on the CPU instead of in {provider}")


class Bound:
    """An opened InferenceSession as a Session: its inputs and outputs are torch's own tensors on the device."""

    def __init__(self, session: Any, device: str) -> None:
        self._session, self._device = session, device
        self._inputs = {given.name: given.type for given in session.get_inputs()}
        self._outputs = {given.name: given.type for given in session.get_outputs()}
        self._shapes: dict[tuple[Any, ...], dict[str, tuple[int, ...]]] = {}

    def __call__(self, **inputs: Any) -> dict[str, Any]:
        import torch

        placed = {
            name: onnxgraph.typed(inputs[name].to(self._device), kind).contiguous()
            for name, kind in self._inputs.items()
        }
        torch.cuda.current_stream().synchronize()  # ONNX Runtime has a stream of its own
        try:
            outputs = self._run(placed)
        except Exception as error:
            raise onnxgraph.translated(error) from error
        return {name: t.float() if t.is_floating_point() else t for name, t in outputs.items()}

    def _run(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Into tensors of torch's, since those outlive the session's memory; their shapes are learnt by a first run."""
        import torch

        key = tuple(tuple(tensor.shape) for tensor in inputs.values())
        if key not in self._shapes:
            if len(self._shapes) >= _SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._learn(inputs)
        outputs = {
            name: torch.empty(self._shapes[key][name], dtype=_dtype(kind), device=self._device)
            for name, kind in self._outputs.items()
        }
        binding = self._binding(inputs)
        for name, tensor in outputs.items():
            binding.bind_output(name, "cuda", 0, _numpy(tensor), tuple(tensor.shape), tensor.data_ptr())
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return outputs

    def _learn(self, inputs: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        binding = self._binding(inputs)
        for name in self._outputs:
            binding.bind_output(name, "cuda")
        self._session.run_with_iobinding(binding)
        return {name: tuple(v.shape()) for name, v in zip(self._outputs, binding.get_outputs(), strict=True)}

    def _binding(self, inputs: dict[str, Any]) -> Any:
        binding = self._session.io_binding()
        for name, tensor in inputs.items():
            binding.bind_input(name, "cuda", 0, _numpy(tensor), tuple(tensor.shape), tensor.data_ptr())
        return binding


def _dtype(kind: str) -> Any:
    """torch's type for one of ONNX Runtime, such as "tensor(float)"."""
    import torch

    known = {"float": torch.float32, "float16": torch.float16, "double": torch.float64, "int64": torch.int64}
    known |= {"int32": torch.int32, "int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool}
    name = kind.removeprefix("tensor(").removesuffix(")")
    if name not in known:
        raise NotRunnable(f"the graph has a tensor of the type {kind}, which is not known; known: {', '.join(known)}")
    return known[name]


def _numpy(tensor: Any) -> Any:
    """numpy's type for a tensor's."""
    import torch

    return torch.empty(0, dtype=tensor.dtype).numpy().dtype.type
