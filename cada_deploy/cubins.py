"""Kernels as machine code for one GPU: made ahead of time, found in the cache, or compiled now.

`kernel_image` looks beside the kernels' sources first (cubins that were made when cada-deploy was
built with nvcc there), then in ~/.cache/cada-deploy/kernels, and then compiles with NVRTC (through
cuda-core; no driver is needed for that) or with the nvcc on the PATH. A cubin's name holds the
digest of everything that decides it: all sources, the options and the architecture. Files of the
cache begin with the digest of the rest, so a damaged one is seen and made again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from cada_deploy import durable
from cada_deploy.device import Device
from cada_deploy.errors import EnvironmentLacks, RunFailed

# What the bits need: no contraction. Precise division and no flushing are the defaults. The same
# options stand in CMakeLists.txt for cubins that are made ahead of time.
OPTIONS = ("-std=c++17", "-fmad=false")
_DIGEST_BYTES = 32
_PRIVATE_FOLDER = 0o700
_PRIVATE_FILE = 0o600


@runtime_checkable
class CompilesItself(Protocol):
    """A device that is no GPU and makes its own modules: the tests' processor."""

    def build_kernels(self, source: Path, defines: Mapping[str, int]) -> bytes: ...


def sources() -> Path:
    """The folder of the kernels' sources: of the checkout, or of the installed package."""
    package = Path(__file__).parent
    for folder in (package.parent / "kernels", package / "kernel_sources"):
        if (folder / "fused_cuda.cu").is_file():
            return folder
    raise EnvironmentLacks(
        f"the CUDA sources are not in {package / 'kernel_sources'}; reinstall cada-deploy"
    )


def kernel_image(device: Device, source: str, defines: Mapping[str, int]) -> bytes:
    """The module of one source file (`fused_cuda.cu`), ready for Device.load.

    Raises EnvironmentLacks when it has to be compiled and there is no compiler, RunFailed with the
    compiler's words when it refuses.
    """
    path = sources() / source
    if isinstance(device, CompilesItself):
        return device.build_kernels(path, defines)
    major, minor = device.compute_capability
    return image_for(path, f"sm_{major}{minor}", defines)


def image_for(source: Path, architecture: str, defines: Mapping[str, int]) -> bytes:
    """The cubin of one source for one architecture (`sm_90`); see kernel_image."""
    name = cubin_name(source, architecture, defines)
    ahead_of_time = source.parent / "cubins" / name
    if ahead_of_time.is_file():
        return ahead_of_time.read_bytes()
    cached = _cache_folder() / name
    image = _read_cached(cached)
    if image is None:
        image = compiled(source, architecture, defines)
        _write_cached(cached, image)
    return image


def cubin_name(source: Path, architecture: str, defines: Mapping[str, int]) -> str:
    """`fused_cuda-19-sm_90-0123456789abcdef.cubin`: the values of the defines, in their names'
    order, and the digest of all sources and options. CMakeLists.txt makes the same names."""
    texts = sorted([*source.parent.glob("*.cu"), source.parent / "pixel.h"])
    digests = [hashlib.sha256(text.read_bytes()).hexdigest() for text in texts]
    digest = hashlib.sha256(" ".join([*digests, *OPTIONS]).encode()).hexdigest()[:16]
    values = [str(defines[key]) for key in sorted(defines)]
    return "-".join([source.stem, *values, architecture, digest]) + ".cubin"


# ---- compilers ----


def compiled(source: Path, architecture: str, defines: Mapping[str, int]) -> bytes:
    """The cubin by the compiler that is there, NVRTC first; nothing is kept. Raises
    EnvironmentLacks, RunFailed."""
    try:
        return compile_with_nvrtc(source, architecture, defines)
    except ImportError as error:
        if shutil.which("nvcc"):
            return compile_with_nvcc(source, architecture, defines)
        raise EnvironmentLacks(
            f"{source.name} has to be compiled for {architecture}, and there is neither NVRTC "
            f"({error}) nor nvcc on the PATH; pip install 'cada-deploy[gpu]'"
        ) from error


def compile_with_nvrtc(source: Path, architecture: str, defines: Mapping[str, int]) -> bytes:
    """Raises ImportError without cuda-core, EnvironmentLacks without NVRTC, RunFailed."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=source.name,
        arch=architecture,
        std="c++17",
        fma=False,
        define_macro=[(name, str(value)) for name, value in sorted(defines.items())] or None,
        include_path=[str(source.parent)],
    )
    try:
        program = Program(source.read_text(encoding="utf-8"), "c++", options)
        return bytes(program.compile("cubin").code)
    except Exception as error:  # the classes of cuda-core's errors differ by its version
        if "NVRTC_ERROR" not in str(error):  # no library: its loader says where it looked
            raise EnvironmentLacks(
                f"NVRTC cannot be used ({error}); pip install 'cada-deploy[gpu]'"
            ) from error
        raise RunFailed(f"NVRTC refuses {source.name} for {architecture}: {error}") from error


def compile_with_nvcc(source: Path, architecture: str, defines: Mapping[str, int]) -> bytes:
    """Raises RunFailed with nvcc's words."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.cubin"
        command = ["nvcc", "-cubin", f"-arch={architecture}", *OPTIONS, "-o", str(out), str(source)]
        command += [f"-D{name}={value}" for name, value in sorted(defines.items())]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RunFailed(f"nvcc refuses {source.name} for {architecture}: {done.stderr}")
        return out.read_bytes()


# ---- the cache ----


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "cada-deploy" / "kernels"


def _read_cached(path: Path) -> bytes | None:
    """None when there is none, or when it is not what was written."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    image = data[_DIGEST_BYTES:]
    if hashlib.sha256(image).digest() == data[:_DIGEST_BYTES]:
        return image
    warnings.warn(f"{path} was damaged; the kernel is compiled again", RuntimeWarning, stacklevel=2)
    return None


def _write_cached(path: Path, image: bytes) -> None:
    """Renamed into place, so that several processes may do it at once. Without a cache every start
    compiles, some seconds each: that is said, and is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=_PRIVATE_FOLDER)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
            temporary = Path(file.name)
        durable.write_file(temporary, hashlib.sha256(image).digest() + image, _PRIVATE_FILE)
        temporary.replace(path)
    except (OSError, RunFailed) as error:
        warnings.warn(
            f"the compiled kernel cannot be kept ({error}), so every start compiles it again; make "
            f"{path.parent} writable, or set XDG_CACHE_HOME",
            RuntimeWarning,
            stacklevel=2,
        )
