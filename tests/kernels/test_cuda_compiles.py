"""Every CUDA source compiles for every architecture we name, within a budget of registers.

NVRTC needs no GPU and no driver, so this runs anywhere; nvcc is asked, too, where it is there.
"""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest

from cada_deploy import cubins

KERNELS = Path(__file__).parents[2] / "kernels"
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_110", "sm_120")

# Registers a thread may take, by kernel, of the instance for 19 classes: above 168 a multiprocessor
# holds fewer than 3 blocks of 128 threads, and the latency of the loads shows.
REGISTERS_19 = {
    "cada_accumulate": 168, "cada_count": 128, "cada_select": 128, "cada_encode": 40,
    "cada_soften": 40, "cada_preprocess": 64,
}  # fmt: skip
SPILLED_BYTES_19 = {"cada_select": 16}  # a rule's pointers; every other kernel spills nothing
SPILLED_BYTES_64 = 64  # the 64 values of a pixel and the 64 of its cell leave no room


def sources() -> list[Path]:
    return sorted(KERNELS.glob("*.cu"))


def defines(source: Path, classes: int) -> dict[str, int]:
    return {"CADA_CLASSES": classes} if source.stem == "fused_cuda" else {}


def reported(source: Path, architecture: str, classes: int) -> dict[str, tuple[int, int]]:
    """(registers, spilled bytes) by kernel, as the assembler reports them."""
    core = pytest.importorskip("cuda.core", reason="not run: needs cuda-core")
    log = io.StringIO()
    options = core.ProgramOptions(
        name=source.name, arch=architecture, std="c++17", fma=False, ptxas_options=["-v"],
        define_macro=[(k, str(v)) for k, v in defines(source, classes).items()] or None,
        include_path=[str(KERNELS)],
    )  # fmt: skip
    program = core.Program(source.read_text(encoding="utf-8"), "c++", options)
    assert program.compile("cubin", logs=log).code
    found = {}
    for part in log.getvalue().split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores", part)
        assert name and registers and spilled, part
        found[name[1]] = (int(registers[1]), int(spilled[1]))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", sources(), ids=lambda source: source.stem)
def test_compiles_everywhere_within_the_budget(source: Path, architecture: str) -> None:
    found = reported(source, architecture, 19)
    assert found
    for kernel, (registers, spilled) in found.items():
        assert registers <= REGISTERS_19[kernel], (kernel, registers)
        assert spilled <= SPILLED_BYTES_19.get(kernel, 0), (kernel, spilled)


@pytest.mark.parametrize(("classes", "architecture"), [(0, "sm_75"), (0, "sm_120"), (2, "sm_87"),
                                                       (32, "sm_90"), (64, "sm_87")])  # fmt: skip
def test_other_class_counts_compile(classes: int, architecture: str) -> None:
    for registers, spilled in reported(KERNELS / "fused_cuda.cu", architecture, classes).values():
        assert registers <= 255
        assert spilled <= (SPILLED_BYTES_64 if classes == 64 else 32)


def test_more_classes_than_the_fast_path_takes_are_refused_by_the_compiler() -> None:
    core = pytest.importorskip("cuda.core", reason="not run: needs cuda-core")
    assert core
    with pytest.raises(cubins.RunFailed, match="more than 64 classes"):
        cubins.compile_with_nvrtc(KERNELS / "fused_cuda.cu", "sm_90", {"CADA_CLASSES": 65})


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.stem)
def test_nvrtc_compiles_it_as_at_first_use(source: Path) -> None:
    pytest.importorskip("cuda.core", reason="not run: needs cuda-core")
    image = cubins.compile_with_nvrtc(source, "sm_90", defines(source, 19))
    assert image.startswith(b"\x7fELF")


@pytest.mark.parametrize("source", sources(), ids=lambda source: source.stem)
def test_nvcc_compiles_it_too(source: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("not run: no nvcc on the PATH")
    image = cubins.compile_with_nvcc(source, "sm_90", defines(source, 19))
    assert image.startswith(b"\x7fELF")
