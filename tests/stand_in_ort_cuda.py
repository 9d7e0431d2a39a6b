"""A stand-in for ONNX Runtime's CUDA provider: the real CPU session, on the stand-in's streams.

Names, options and calls are those of onnxruntime-gpu; what is not checked by the real package (the
options of the provider) is recorded in `sessions`. It proves that our code binds, orders, refuses
and explains; it proves nothing about CUDA.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as real
import pytest
from stand_in_device import StandInDevice, enqueue, memory_at

from cada_deploy.device import ordinal_of
from cada_deploy.engines import onnxrt
from cada_deploy.errors import EnvironmentLacks

__version__ = real.__version__
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
RunOptions, SessionOptions = real.RunOptions, real.SessionOptions
KNOWN = {
    "device_id", "user_compute_stream", "do_copy_in_default_stream", "cudnn_conv_algo_search",
    "use_tf32", "arena_extend_strategy",
}  # fmt: skip


@dataclass
class State:
    """falls: the provider cannot be loaded. on_cpu: operators that the GPU lacks. fails: what a run
    says, once it is set."""

    falls: bool = False
    on_cpu: frozenset[str] = frozenset()
    fails: str = ""
    sessions: list[CudaSession] = field(default_factory=list)
    bound: int = 0


state = State()


def get_available_providers() -> list[str]:
    return [CUDA, CPU]


def preload_dlls() -> None:
    pass


class _Node:
    def __init__(self, name: str, op_type: str) -> None:
        self.name, self.op_type = name, op_type


class _Part:
    def __init__(self, node: Any) -> None:
        self.node = node
        self.ep_name = CPU if node.op_type in state.on_cpu else CUDA

    def get_nodes(self) -> list[_Node]:
        return [_Node(self.node.name, self.node.op_type)]


class Binding:
    def __init__(self, session: CudaSession) -> None:
        self.session = session
        self.image: tuple[Any, tuple[int, ...], int] | None = None
        self.output: tuple[Any, ...] = ()
        self.shape: tuple[int, ...] = ()
        state.bound += 1

    def bind_input(
        self, name: str, device: str, device_id: int, kind: Any, shape: Any, pointer: int
    ) -> None:
        assert (device, device_id) == ("cuda", int(self.session.provider["device_id"]))
        assert name == self.session.cpu.get_inputs()[0].name
        self.image = (np.dtype(kind), tuple(shape), pointer)

    def bind_output(
        self, name: str, device: str, device_id: int = 0, kind: Any = None, shape: Any = None,
        pointer: int | None = None,
    ) -> None:  # fmt: skip
        assert device == "cuda" and name == self.session.cpu.get_outputs()[0].name
        self.output = (np.dtype(kind), tuple(shape), pointer) if pointer else ()

    def get_outputs(self) -> list[Any]:
        shape = self.shape
        return [type("Value", (), {"shape": lambda _: list(shape)})()]


def InferenceSession(source: Any, options: Any, providers: list[Any]) -> Any:
    if providers == [CPU]:
        return real.InferenceSession(source, options, providers=providers)
    return CudaSession(source, options, providers)


class CudaSession:
    def __init__(self, source: Any, options: Any, providers: list[Any]) -> None:
        (name, self.provider), *rest = providers
        assert name == CUDA and set(self.provider) <= KNOWN
        assert all(isinstance(value, str) for value in self.provider.values())
        self.options = options
        self.cpu = real.InferenceSession(source, providers=[CPU])
        self.parts = [] if state.falls else self._parts(source)
        lacking = any(part.ep_name == CPU for part in self.parts)
        if not rest and lacking:
            assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
            raise RuntimeError(
                "This session contains graph nodes that are assigned to the default CPU EP, but "
                "fallback to CPU EP has been explicitly disabled by the user."
            )
        self.providers = [CPU] if state.falls else [CUDA, CPU]
        state.sessions.append(self)

    def _parts(self, source: Any) -> list[_Part]:
        import onnx

        model = onnx.load_from_string(source) if isinstance(source, bytes) else onnx.load(source)
        return [_Part(node) for node in model.graph.node]

    def get_providers(self) -> list[str]:
        return self.providers

    def get_provider_graph_assignment_info(self) -> list[_Part]:
        return self.parts

    def io_binding(self) -> Binding:
        return Binding(self)

    def run_with_iobinding(self, binding: Binding, options: Any = None) -> None:
        if state.fails:
            raise RuntimeError(state.fails)
        assert binding.image is not None
        kind, shape, pointer = binding.image
        name = self.cpu.get_inputs()[0].name
        outputs = [self.cpu.get_outputs()[0].name]
        if not binding.output:  # the runtime allocates: only the shape is wanted
            (scores,) = self.cpu.run(outputs, {name: np.zeros(shape, kind)})
            binding.shape = scores.shape
            return
        assert options.get_run_config_entry("disable_synchronize_execution_providers") == "1"
        out_kind, out_shape, out_pointer = binding.output

        def work() -> None:
            image = memory_at(pointer, int(np.prod(shape)) * kind.itemsize)
            (scores,) = self.cpu.run(outputs, {name: image.view(kind).reshape(shape).copy()})
            assert scores.shape == out_shape and scores.dtype == out_kind
            memory_at(out_pointer, scores.nbytes)[:] = scores.reshape(-1).view(np.uint8)

        enqueue(int(self.provider["user_compute_stream"]), work)


@contextmanager
def ort_cuda_here(device: Any = None, **changed: Any) -> Iterator[State]:
    """Engine `ort` finds this provider, and `device` (a StandInDevice) as cuda:0."""
    global state
    gpu = device or StandInDevice()

    def open_device(name: str, layer: str | None = None) -> Any:
        if ordinal_of(name) != 0:
            raise EnvironmentLacks(f"--device {name}: the stand-in has one GPU, cuda:0")
        return gpu

    before, state = state, State(**changed)
    patch = pytest.MonkeyPatch()
    patch.setattr(onnxrt, "ort", sys.modules[__name__])
    patch.setattr(onnxrt, "open_device", open_device)
    try:
        yield state
    finally:
        patch.undo()
        state = before
