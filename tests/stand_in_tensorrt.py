"""A stand-in for NVIDIA TensorRT, for tests of our own code: it runs the ONNX with ONNX Runtime.

Every name and enum value is that of the real bindings of 10.3.0, 10.16.1.11 or 11.4.0.106 (chosen
by STAND_IN_TRT_VERSION; tests/trt_api holds it to them), what they do is a guess from their
documentation. It proves that our code handles building, refusing, loading and running; it proves
nothing about TensorRT. It can be built with the faults of planted_faults.py.
"""

from __future__ import annotations

import json
import os
import time
from enum import IntEnum
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from planted_faults import broken, planted
from stand_in_device import enqueue, memory_at

__version__ = os.environ.get("STAND_IN_TRT_VERSION", "10.16.1.11")
_VERSION = tuple(int(part) for part in __version__.split("."))
_NEW = _VERSION >= (11,)


def _enum(name: str, **members: int) -> Any:
    return IntEnum(name, members)


_flags = {"DEBUG": 2, "GPU_FALLBACK": 3, "TF32": 6, "VERSION_COMPATIBLE": 12 if _NEW else 13}
_flags |= {} if _NEW else {"FP16": 0, "INT8": 1}
_flags |= {"STRICT_NANS": 23 if _NEW else 24} if _VERSION >= (10, 7) else {}
BuilderFlag = _enum("BuilderFlag", **_flags)
NetworkDefinitionCreationFlag = _enum(
    "NetworkDefinitionCreationFlag",
    **({"STRONGLY_TYPED": 0} if _NEW else {"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}),
)
HardwareCompatibilityLevel = _enum(
    "HardwareCompatibilityLevel",
    NONE=0,
    AMPERE_PLUS=1,
    **({"SAME_COMPUTE_CAPABILITY": 2} if _VERSION >= (10, 13) else {}),
)
DataType = _enum("DataType", FLOAT=0, HALF=1, INT8=2, INT32=3, BOOL=4)
TensorIOMode = _enum("TensorIOMode", NONE=0, INPUT=1, OUTPUT=2)
TensorFormat = _enum("TensorFormat", LINEAR=0, CHW2=1)
LayerInformationFormat = _enum("LayerInformationFormat", ONELINE=0, JSON=1)
ProfilingVerbosity = _enum("ProfilingVerbosity", LAYER_NAMES_ONLY=0, NONE=1, DETAILED=2)
MemoryPoolType = _enum("MemoryPoolType", WORKSPACE=0)
DeviceType = _enum("DeviceType", GPU=0, DLA=1)
ErrorCode = _enum("ErrorCode", SUCCESS=0, UNSUPPORTED_NODE=8)
_KINDS = {1: (DataType.FLOAT, np.float32), 10: (DataType.HALF, np.float16)}


Dims = type("Dims", (list,), {})
IHostMemory = type("IHostMemory", (bytes,), {})


class ILogger:
    Severity = _enum("Severity", INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

    def log(self, severity: Any, msg: str) -> None: ...


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None: ...
    def phase_finish(self, phase_name: str) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool: ...


class ITensor:
    def __init__(self, value: Any) -> None:
        self.name = value.name
        self.shape = Dims(d.dim_value or -1 for d in value.type.tensor_type.shape.dim)


class INetworkDefinition:
    _model: Any = None
    num_inputs = property(lambda self: len(self._model.graph.input))
    num_outputs = property(lambda self: len(self._model.graph.output))

    def get_input(self, index: int) -> ITensor:
        return ITensor(self._model.graph.input[index])

    def get_output(self, index: int) -> ITensor:
        return ITensor(self._model.graph.output[index])

    def unmark_output(self, tensor: ITensor) -> None:
        outputs = self._model.graph.output
        outputs.remove(next(v for v in outputs if v.name == tensor.name))


class ParserError:
    def __init__(self, node: Any, index: int) -> None:
        self.node = lambda: index
        self.node_name = lambda: str(node.name)
        self.node_operator = lambda: str(node.op_type)
        self.desc = lambda: "no importer is registered for this operator"
        self.code = lambda: ErrorCode.UNSUPPORTED_NODE


class OnnxParser:
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def parse(self, model: bytes, path: str | None = None) -> bool:
        return self._take(onnx.load_from_string(bytes(model)))

    def parse_from_file(self, model: str) -> bool:
        return self._take(onnx.load(model))

    def _take(self, model: Any) -> bool:
        self._network._model = model
        nodes = enumerate(model.graph.node)
        self._errors = [ParserError(n, k) for k, n in nodes if n.op_type == "NonMaxSuppression"]
        return not self._errors

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]


class IOptimizationProfile:
    def set_shape(self, input: str, min: Dims, opt: Dims, max: Dims) -> None:
        self._shapes = [list(min), list(opt), list(max)]


class ITimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> IHostMemory:
        return IHostMemory(self._content or f"timings of {__version__}".encode())


class IBuilderConfig:
    profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY
    hardware_compatibility_level = HardwareCompatibilityLevel.NONE
    default_device_type, DLA_core = DeviceType.GPU, -1
    progress_monitor: Any = None
    _profile: Any = None

    def __init__(self) -> None:
        self._flags, self._cache, self._pools = {BuilderFlag.TF32}, None, {}

    def set_flag(self, flag: Any) -> None:
        self._flags.add(BuilderFlag(flag))

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[MemoryPoolType(pool)] = pool_size

    def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
        self._profile = profile
        return 0

    def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
        return ITimingCache(bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
        return cache._content in (b"", f"timings of {__version__}".encode())


class Builder:
    num_DLA_cores = 2

    def __init__(self, logger: ILogger) -> None:
        if planted() == "driver":
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._logger = logger

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        assert flags == 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED), flags
        return INetworkDefinition()

    create_builder_config = staticmethod(lambda: IBuilderConfig())
    create_optimization_profile = staticmethod(lambda: IOptimizationProfile())

    def build_serialized_network(self, network: Any, config: IBuilderConfig) -> IHostMemory | None:
        config.progress_monitor.phase_start("Building Engine", None, 5)
        for step in range(5):
            time.sleep(0.5 if planted() == "slow" else 0)
            if not config.progress_monitor.step_complete("Building Engine", step):
                return None
        config.progress_monitor.phase_finish("Building Engine")
        if planted() == "memory":
            self._logger.log(ILogger.Severity.ERROR, "CUDA error 2: out of memory")
            return None
        told = {
            "shapes": config._profile._shapes if config._profile else None,
            "detailed": config.profiling_verbosity == ProfilingVerbosity.DETAILED,
            "fault": planted(),
            "flags": sorted(flag.name for flag in config._flags),
        }
        header = b"ftrt" + bytes(20) + bytes((*_VERSION, 0)[:4])
        text = json.dumps(told).encode()
        model = network._model.SerializeToString()
        return IHostMemory(header + len(text).to_bytes(4, "little") + text + model)


class Runtime:
    engine_host_code_allowed, DLA_core = False, -1

    def __init__(self, logger: ILogger) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        length = int.from_bytes(serialized_engine[28:32], "little")
        told = json.loads(serialized_engine[32 : 32 + length])
        if serialized_engine[24:28] != bytes((*_VERSION, 0)[:4]) and not (
            self.engine_host_code_allowed and "VERSION_COMPATIBLE" in told["flags"]
        ):
            self._logger.log(ILogger.Severity.ERROR, "the plan is of another version")
            return None
        return ICudaEngine(told, bytes(serialized_engine[32 + length :]))


class ICudaEngine:
    num_io_tensors = 2

    def __init__(self, told: dict[str, Any], model: bytes) -> None:
        self._told, graph = told, onnx.load_from_string(model).graph
        self._values = [graph.input[0], graph.output[0]]
        self._types = {t.data_type for t in graph.initializer}
        self._session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])

    def _value(self, name: str) -> Any:
        return next(v for v in self._values if v.name == name)

    def get_tensor_name(self, index: int) -> str:
        return str(self._values[index].name)

    def get_tensor_mode(self, name: str) -> Any:
        return TensorIOMode.INPUT if name == self._values[0].name else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return _KINDS[self._value(name).type.tensor_type.elem_type][0]

    get_tensor_format = staticmethod(lambda name: TensorFormat.LINEAR)

    def get_tensor_shape(self, name: str) -> Dims:
        return ITensor(self._value(name)).shape

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        return [Dims(shape) for shape in self._told["shapes"]]

    def create_engine_inspector(self) -> EngineInspector:
        inspector = EngineInspector()
        inspector._engine = self
        return inspector

    def create_execution_context(self) -> IExecutionContext | None:
        return IExecutionContext(self)


class EngineInspector:
    _engine: Any = None

    def get_engine_information(self, format: Any) -> str:
        told, half = self._engine._told, 10 in self._engine._types
        word = "Half" if half and told["fault"] != "wide" else "Float"
        word = "Int8" if 3 in self._engine._types and told["fault"] != "wide" else word
        kind = {"Format": "Row major linear", "Datatype": word} if _NEW else {
            "Format/Datatype": f"Row major linear {word} format"
        }  # fmt: skip
        layer = {"Name": "conv", "Inputs": [kind], "Outputs": [kind]}
        names = [v.name for v in self._engine._values]
        io = {"I/O Tensors": [{"Name": n} for n in names]} if _NEW else {"Bindings": names}
        return json.dumps({"Layers": [layer if told["detailed"] else "conv"], **io})


class IExecutionContext:
    def __init__(self, engine: ICudaEngine) -> None:
        self._engine, self._shape, self._at, self._runs = engine, None, {}, 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return profile_index == 0

    def set_input_shape(self, name: str, shape: Any) -> bool:
        low, _, high = self._engine._told["shapes"] or [shape] * 3
        self._shape = tuple(shape)
        return all(a <= d <= b for a, d, b in zip(low, shape, high))

    def infer_shapes(self) -> list[str]:
        return [] if self._shape else [self._engine.get_tensor_name(0)]

    def get_tensor_shape(self, name: str) -> Dims:
        if name == self._engine.get_tensor_name(0):
            return Dims(self._shape)
        return Dims(self._run(np.zeros(self._shape, self._dtype(0)), "").shape)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._at[name] = memory
        return memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._engine._told["fault"] == "execute":
            return False
        image, scores = (self._at[self._engine.get_tensor_name(k)] for k in (0, 1))
        enqueue(stream_handle, lambda: self._execute(image, scores))
        return True

    def _dtype(self, k: int) -> Any:
        return _KINDS[self._engine._values[k].type.tensor_type.elem_type][1]

    def _execute(self, image: int, scores: int) -> None:
        rows = np.empty(self._shape, self._dtype(0))
        rows.view(np.uint8).reshape(-1)[:] = memory_at(image, rows.nbytes)
        found = self._run(rows, self._engine._told["fault"])
        memory_at(scores, found.nbytes)[:] = found.view(np.uint8).reshape(-1)

    def _run(self, rows: Any, fault: str) -> Any:
        name, self._runs = self._engine.get_tensor_name(0), self._runs + 1
        fixed = max(1, self._engine.get_tensor_shape(name)[0])
        alone = (np.repeat(r[None], fixed, 0) for r in rows)
        each = [self._engine._session.run(None, {name: r})[0][:1] for r in alone]
        return np.ascontiguousarray(broken(np.concatenate(each), rows, fault, self._runs))
