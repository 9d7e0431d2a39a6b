"""TensorRT plans as files: the header, the manifest beside it, and every reason to refuse one.

A plan (`M.engine`) stays raw, so that trtexec and Triton load it; `M.engine.json` beside it says
what it is, on what it was built and which gates it passed. A plan is executable code, so all of
this is read and judged before TensorRT sees a byte. Nothing here imports TensorRT.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cada_deploy import durable
from cada_deploy.errors import ArtefactMismatch, UsageError, nearest
from cada_deploy.model_files import Tensor
from cada_deploy.model_spec import InferenceSpec, ModelSpec, Size

SCHEMA = 1
SUFFIXES = (".engine", ".plan")
MANIFEST_SUFFIX = ".json"  # of the whole name: m.engine.json

TAG = b"ftrt"  # 0x74727466, little endian; trtexec checks the same word
HEADER_BYTES = 28  # tag, serialisation version, ..., and at 24 one byte each of the version
_SERIALISATION = 0  # the one whose version bytes are where we look

# Spelled as BuilderFlag spells it; the integers differ between 10 and 11 and are never kept.
VERSION_COMPATIBLE = "VERSION_COMPATIBLE"
HARDWARE = {"same-capability": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
ONE_GPU = "NONE"  # hardware compatibility level of a plan for the model of GPU it was built on

# A model of any size, and nobody said which: from small crops to a Cityscapes frame.
ANY_SIZE: tuple[Size, Size, Size] = ((64, 64), (512, 1024), (1024, 2048))

BUILD_AGAIN = "build it again with: cada-deploy export MODEL.onnx -o {name} --format trt"

Version = tuple[int, ...]


# --- what is asked for -------------------------------------------------------------------------


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_count(v) for v in value)


@dataclass(frozen=True)
class PlanOptions:
    """What decides the plan, apart from the model and the machine. Sizes are (H, W) of the network
    input. batch is fixed in the plan; a shorter one is padded, so the rows of a run always go
    through the same kernels."""

    minimum: Size | None = None
    optimum: Size | None = None
    maximum: Size | None = None
    batch: int = 1
    workspace_mib: int | None = None  # None: TensorRT's default, all of the device
    hardware: str | None = None  # a key of HARDWARE
    version_compatible: bool = False
    dla: int | None = None

    def __post_init__(self) -> None:
        if self.hardware is not None and self.hardware not in HARDWARE:
            raise UsageError(
                f"hardware compatibility {self.hardware!r}; {nearest(self.hardware, HARDWARE)}"
            )
        counts = (self.workspace_mib, None if self.dla is None else self.dla + 1, self.batch)
        if not all(count is None or _is_count(count) for count in counts):
            raise UsageError(f"{self}: batch, workspace and DLA core are counts")
        sizes = (self.minimum, self.optimum, self.maximum)
        if not all(size is None or _is_size(size) for size in sizes):
            raise UsageError(f"{self}: a size is (height, width), each at least 1")

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlanOptions:
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in data.items()
        }
        return cls(**fields)


@dataclass(frozen=True)
class Build:
    """How to come to an engine: what it must be, where it goes and who is told."""

    options: PlanOptions = PlanOptions()
    rebuild: bool = False
    out: Path | None = None  # None: the cache
    timing_cache: Path | None = None  # None: one of the cache's own
    images: Path | None = None  # frames of the gates; None: drawn scenes
    quiet: bool = True
    say: Callable[[str], None] = field(default=lambda _: None, compare=False)


@dataclass(frozen=True)
class Profile:
    """The network sizes (H, W) that a plan takes, and the batch it always runs."""

    minimum: Size
    optimum: Size
    maximum: Size
    batch: int

    def __post_init__(self) -> None:
        sizes = (self.minimum, self.optimum, self.maximum)
        if not all(_is_size(size) for size in sizes) or not _is_count(self.batch):
            raise UsageError(f"{self}: expected sizes (height, width) and a batch of at least 1")
        for small, big in ((self.minimum, self.optimum), (self.optimum, self.maximum)):
            if small[0] > big[0] or small[1] > big[1]:
                raise UsageError(
                    f"sizes {shown(self.minimum)}, {shown(self.optimum)} and "
                    f"{shown(self.maximum)} (minimum, optimum, maximum, HxW) must not shrink"
                )

    def covers(self, size: Size) -> bool:
        return all(a <= s <= b for a, s, b in zip(self.minimum, size, self.maximum))

    @property
    def text(self) -> str:
        if self.minimum == self.maximum:
            return f"{shown(self.minimum)}, batch {self.batch}"
        return f"{shown(self.minimum)} to {shown(self.maximum)}, batch {self.batch}"


def shown(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def profile_for(spec: ModelSpec, fixed_batch: int | None, options: PlanOptions) -> Profile:
    """The sizes that the plan must take. Raises UsageError where the model cannot have them."""
    if fixed_batch is not None and options.batch not in (1, fixed_batch):
        raise UsageError(
            f"the model's batch is fixed at {fixed_batch}, but {options.batch} was asked for; "
            "leave --batch-size out, or export the model with a dynamic batch"
        )
    batch = fixed_batch or options.batch
    if spec.input.size is not None:
        wrong = [s for s in (options.minimum, options.optimum, options.maximum) if s]
        if any(tuple(s) != tuple(spec.input.size) for s in wrong):
            raise UsageError(
                f"the model takes {shown(spec.input.size)} (HxW) and nothing else; leave the "
                "sizes out, or export the model with a dynamic size"
            )
        size = (spec.input.size[0], spec.input.size[1])
        return Profile(size, size, size, batch)
    return Profile(*_sizes(spec.inference, options), batch)


def _sizes(inference: InferenceSpec, options: PlanOptions) -> tuple[Size, Size, Size]:
    middle = options.optimum or options.maximum or options.minimum or ANY_SIZE[1]
    low = options.minimum or (middle if options.optimum else _least(ANY_SIZE[0], middle))
    high = options.maximum or (middle if options.optimum else _most(ANY_SIZE[2], middle))
    low, high = _scaled(low, min(inference.scales)), _scaled(high, max(inference.scales))
    window = inference.window
    if window is None:
        return low, middle, high
    if not any((options.minimum, options.optimum, options.maximum)):
        return window, window, window
    return _least(low, window), _least(middle, window), _least(high, window)


def _least(a: Size, b: Size) -> Size:
    return min(a[0], b[0]), min(a[1], b[1])


def _most(a: Size, b: Size) -> Size:
    return max(a[0], b[0]), max(a[1], b[1])


def _scaled(size: Size, factor: float) -> Size:
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


# --- the machine -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a plan is built on, as far as it decides whether the plan runs elsewhere."""

    tensorrt: str
    cuda: str  # the highest version that the driver runs
    driver: str  # "" where the system does not say (Jetson)
    gpu: str
    compute_capability: tuple[int, int]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "compute_capability": _dotted(self.compute_capability)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Machine:
        major, minor = parsed_version(data["compute_capability"])[:2]
        _expect(all(isinstance(text, str) for text in data.values()), "the machine")
        return cls(**{**data, "compute_capability": (major, minor)})


def driver_version(where: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Of the kernel module, such as 580.95.05; "" where there is none to ask."""
    try:
        found = re.search(r"Kernel Module\s.*?\b(\d+\.\d+(?:\.\d+)?)\b", where.read_text())
    except OSError:
        return ""
    return found.group(1) if found else ""


def parsed_version(text: str) -> Version:
    """`10.16.1.11` -> (10, 16, 1, 11); what follows the numbers is left out."""
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _dotted(version: Version) -> str:
    return ".".join(str(part) for part in version)


# --- the manifest ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """One check of a built engine: what was found, with its figures."""

    name: str
    passed: bool
    found: str


@dataclass(frozen=True)
class PlanManifest:
    """Everything that stands in `M.engine.json`."""

    plan_sha256: str
    plan_bytes: int
    model: str  # file name of the ONNX that it was built from
    model_sha256: str
    spec: ModelSpec
    input: Tensor
    output: Tensor
    machine: Machine
    options: PlanOptions
    profile: Profile
    precision: str
    flags: tuple[str, ...]  # names of BuilderFlag
    hardware_compatibility: str  # name of HardwareCompatibilityLevel
    gates: tuple[Gate, ...]
    frames: str  # what the gates looked at
    build_seconds: float
    cada_deploy: str

    def __post_init__(self) -> None:
        """What a manifest must hold to be judged at all; the rest of it only tells."""
        texts = (
            self.plan_sha256, self.model, self.model_sha256, self.precision, self.frames,
            self.cada_deploy, *self.flags, *(gate.found for gate in self.gates),
        )  # fmt: skip
        _expect(all(isinstance(text, str) for text in texts), "a text")
        _expect(_is_count(self.plan_bytes), "plan_bytes")
        _expect(self.hardware_compatibility in (ONE_GPU, *HARDWARE.values()), "the GPUs it is for")
        _expect(all(isinstance(gate.passed, bool) for gate in self.gates), "a gate")

    @property
    def verified(self) -> bool:
        return bool(self.gates) and all(gate.passed for gate in self.gates)

    def to_json(self) -> dict[str, Any]:
        sizes = {k: list(v) for k, v in vars(self.profile).items() if k != "batch"}
        return {
            "schema": SCHEMA,
            **{k: v for k, v in vars(self).items() if k != "profile"},
            "spec": self.spec.to_json(),
            "input": _tensor_json(self.input),
            "output": _tensor_json(self.output),
            "machine": self.machine.to_json(),
            "options": self.options.to_json(),
            "profiles": [sizes],  # a list, as TensorRT has it; this version writes one
            "batch": self.profile.batch,
            "flags": list(self.flags),
            "gates": [vars(gate) for gate in self.gates],
            "verified": self.verified,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PlanManifest:
        """Raises KeyError, TypeError or ValueError for what is not a manifest."""
        (sizes,) = data["profiles"]
        _expect(isinstance(data["flags"], list) and isinstance(data["gates"], list), "a list")
        _expect(set(data["options"]) == set(vars(PlanOptions())), "options")
        fields: dict[str, Any] = {k: v for k, v in data.items() if k not in _ONLY_WRITTEN}
        manifest = cls(
            **{
                **fields,
                "spec": ModelSpec.from_json(data["spec"]),
                "input": _tensor(data["input"]),
                "output": _tensor(data["output"]),
                "machine": Machine.from_json(data["machine"]),
                "options": PlanOptions.from_json(data["options"]),
                "profile": Profile(
                    **{k: (v[0], v[1]) for k, v in sizes.items()}, batch=data["batch"]
                ),
                "flags": tuple(data["flags"]),
                "gates": tuple(Gate(**gate) for gate in data["gates"]),
                "build_seconds": float(data["build_seconds"]),
            }
        )
        _expect(data["verified"] is manifest.verified, "verified, which follows from the gates")
        return manifest


def _expect(true: bool, what: str) -> None:
    if not true:
        raise ValueError(f"{what} is not as it was written")


_ONLY_WRITTEN = ("schema", "profiles", "batch", "verified")


def _tensor_json(tensor: Tensor) -> dict[str, Any]:
    shape = None if tensor.shape is None else list(tensor.shape)
    return {"name": tensor.name, "dtype": tensor.dtype, "shape": shape}


def _tensor(data: Mapping[str, Any]) -> Tensor:
    shape = None if data["shape"] is None else tuple(data["shape"])
    _expect(isinstance(data["name"], str) and isinstance(data["dtype"], str), "a tensor")
    _expect(all(d is None or _is_count(d) for d in shape or ()), "a tensor's shape")
    return Tensor(data["name"], data["dtype"], shape)


def manifest_path(plan: Path) -> Path:
    return plan.with_name(plan.name + MANIFEST_SUFFIX)


def read_manifest(plan: Path) -> PlanManifest | None:
    """The manifest beside a plan; None when there is none. Raises ArtefactMismatch for a file that
    is not one."""
    path = manifest_path(plan)
    try:
        data = durable.read_json(path)
    except FileNotFoundError:
        return None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ArtefactMismatch(
            f"{path} has schema {found!r}; this cada-deploy reads {SCHEMA}. "
            + BUILD_AGAIN.format(name=plan.name)
        )
    try:
        return PlanManifest.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
        raise ArtefactMismatch(
            f"{path} is not the manifest of an engine ({error!r}); it was changed or damaged. "
            + BUILD_AGAIN.format(name=plan.name)
        ) from error


# --- the plan ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A plan that was read and whose file holds what it claims. `version` stands in its header;
    manifest is None for one that came without."""

    path: Path
    content: bytes = field(repr=False)
    sha256: str
    version: Version
    manifest: PlanManifest | None

    @property
    def version_compatible(self) -> bool:
        return self.manifest is not None and VERSION_COMPATIBLE in self.manifest.flags


def read_plan(path: Path) -> Plan:
    """Read a plan and its manifest. Raises ArtefactMismatch for another tool's file, one that is
    cut short or was changed, and UsageError for a file that is not there."""
    content = _content(path)
    version = header_version(path, content)
    manifest = read_manifest(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if manifest is not None:
        _check_content(path, len(content), sha256, manifest)
    return Plan(path, content, sha256, version, manifest)


def _content(path: Path) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"engine {path} is not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"engine {path} does not exist") from None
    except PermissionError:
        raise UsageError(f"engine {path} cannot be read: permission denied") from None


def header_version(path: Path, content: bytes) -> Version:
    """The TensorRT version in a plan's header. Raises ArtefactMismatch when it is no plan."""
    if content[: len(TAG)] != TAG:
        raise ArtefactMismatch(f"{path} is not a TensorRT plan: {_foreign(path, content)}")
    if len(content) < HEADER_BYTES:
        raise ArtefactMismatch(
            f"{path} is cut short: {len(content)} bytes, and a plan's header alone has "
            f"{HEADER_BYTES}. " + BUILD_AGAIN.format(name=path.name)
        )
    serialisation = int.from_bytes(content[4:8], "little")
    if serialisation != _SERIALISATION:
        raise ArtefactMismatch(
            f"{path} is a TensorRT plan of serialisation version {serialisation}; this "
            f"cada-deploy knows {_SERIALISATION}. " + BUILD_AGAIN.format(name=path.name)
        )
    return tuple(content[24:28])


def _foreign(path: Path, content: bytes) -> str:
    """What a file without a plan's tag is, and what to do with it."""
    found = _ultralytics(content)
    if found is not None:
        names, start = found
        return (
            f"Ultralytics wrote {start} bytes of its own before the plan (a length and JSON: "
            f"{', '.join(names[:6])}), so neither trtexec nor cada-deploy can load it. Export the "
            "network as ONNX (yolo export format=onnx) and build from that: "
            + BUILD_AGAIN.format(name=path.name)
        )
    if not content:
        return "it is empty. " + BUILD_AGAIN.format(name=path.name)
    if content.lstrip()[:1] in (b"{", b"<"):
        return f"it is text that begins with {content.lstrip()[:20]!r}"
    if content[:1] == b"\x08":  # ir_version, the first field of an ONNX file
        return "it looks like an ONNX file; give it the suffix .onnx"
    return (
        f"it begins with {content[:4].hex(' ')}, a plan with {TAG.hex(' ')} ({TAG.decode()!r}). "
        + BUILD_AGAIN.format(name=path.name)
    )


def _ultralytics(content: bytes) -> tuple[list[str], int] | None:
    """(keys of its JSON, where the plan starts) when Ultralytics' metadata stands before it."""
    length = int.from_bytes(content[:4], "little")
    if not 2 <= length <= 1 << 24 or content[4:5] != b"{":
        return None
    try:
        data = json.loads(content[4 : 4 + length])
    except (ValueError, UnicodeDecodeError):
        return None
    if not isinstance(data, dict) or content[4 + length : 8 + length] != TAG:
        return None
    return sorted(str(key) for key in data), 4 + length


def _check_content(path: Path, size: int, sha256: str, manifest: PlanManifest) -> None:
    if size < manifest.plan_bytes:
        raise ArtefactMismatch(
            f"{path} is cut short: {size} of {manifest.plan_bytes} bytes. Copy it again, or "
            + BUILD_AGAIN.format(name=path.name)
        )
    if sha256 != manifest.plan_sha256 or size != manifest.plan_bytes:
        raise ArtefactMismatch(
            f"{path} is not the plan of its manifest: sha256 {sha256[:12]}..., expected "
            f"{manifest.plan_sha256[:12]}.... It was changed, or the two files are of different "
            "builds; an engine is code, so it is not loaded. " + BUILD_AGAIN.format(name=path.name)
        )


# --- does it run here --------------------------------------------------------------------------


def check_version(plan: Plan, runtime: str) -> None:
    """Raises ArtefactMismatch when this TensorRT cannot load the plan."""
    here = parsed_version(runtime)
    # Some builds of 10.x state three numbers ("10.3.0"): what both state is compared.
    same = all(a == b for a, b in zip(plan.version, here))
    later = plan.version_compatible and plan.version[: len(here)] <= here
    if not here or same or later:
        return
    why = "and was not built for other versions (--version-compatible)"
    if plan.version_compatible:
        why = "and a version-compatible plan runs on later versions only"
    raise ArtefactMismatch(
        f"{plan.path} was built with TensorRT {_dotted(plan.version)}, here is {runtime}, {why}. "
        "Give --rebuild with the ONNX beside it, or " + BUILD_AGAIN.format(name=plan.path.name)
    )


def check_gpu(plan: Plan, machine: Machine) -> None:
    """Raises ArtefactMismatch when the plan was built for another GPU. One without a manifest does
    not say, and is left to TensorRT."""
    if plan.manifest is None:
        return
    built, level = plan.manifest.machine, plan.manifest.hardware_compatibility
    here = machine.compute_capability
    fits = {
        ONE_GPU: built.gpu == machine.gpu and built.compute_capability == here,
        HARDWARE["same-capability"]: built.compute_capability == here,
        HARDWARE["ampere-plus"]: here >= (8, 0),
    }
    if fits.get(level, False):
        return
    raise ArtefactMismatch(
        f"{plan.path} was built on {built.gpu} (compute capability "
        f"{_dotted(built.compute_capability)}) with hardware compatibility {level}; here is "
        f"{machine.gpu} ({_dotted(here)}). Give --rebuild with the ONNX beside it, or "
        + BUILD_AGAIN.format(name=plan.path.name)
        + " [--hardware-compatible same-capability|ampere-plus]"
    )


def without_manifest(path: Path) -> ArtefactMismatch:
    """The error for a plan that says nothing about itself."""
    return ArtefactMismatch(
        f"{path} has no {manifest_path(path).name} beside it, so nothing says how it is fed or "
        "what it was built from. Copy the manifest too, or give --spec FILE.toml (then the "
        "engine runs unverified), or " + BUILD_AGAIN.format(name=path.name)
    )


def source_model(path: Path) -> Path:
    """The ONNX that `path` is to be built from anew: the one its manifest names, or the one of its
    own name, beside it. Raises UsageError when there is none."""
    manifest = read_manifest(path) if manifest_path(path).exists() else None
    names = [manifest.model] if manifest else []
    for name in (*names, path.with_suffix(".onnx").name):
        if (path.parent / Path(name).name).is_file():
            return path.parent / Path(name).name
    raise UsageError(
        f"--rebuild needs the ONNX that {path.name} comes from, and {path.parent} holds none "
        f"called {' or '.join(dict.fromkeys((*names, path.with_suffix('.onnx').name)))}; give "
        "--model MODEL.onnx, which builds its own engine"
    )


def with_options(build: Build, manifest: PlanManifest | None) -> Build:
    """A rebuild takes over what the first build was asked for."""
    return build if manifest is None else replace(build, options=manifest.options)
