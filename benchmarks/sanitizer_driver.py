"""Every CUDA kernel once over small, awkward shapes, for NVIDIA's compute-sanitizer to watch.

    compute-sanitizer --tool memcheck python benchmarks/sanitizer_driver.py

Shapes reach the fixed, the wide-block and the general kernels, both upsample orders, masks, invalid
pixels, edges of blocks, and every way of the preprocess kernel. Results are compared with the
CPU's bytes. Exits 3 without a GPU and says why, 4 when bytes differ. No torch: a sanitizer slows
down whatever is loaded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cada_deploy.device import Device, open_device
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.errors import CadaError
from cada_deploy.fused import Evidence, FusedKernel, Selection, cuda, native
from cada_deploy.model_spec import InputSpec, Size
from cada_deploy.policies import Rule
from cada_deploy.preprocess import to_batch_row
from cada_deploy.preprocess_cuda import DevicePreprocess
from cada_deploy.scores import EncodedScores, Upsampling

WRONG = 4  # exit code: bytes differ
CLASSES = (1, 19, 33, 65)  # one class, wide blocks, narrow blocks, the general kernel
SHAPES: tuple[tuple[Size, Size], ...] = (
    ((6, 9), (37, 131)),
    ((1, 1), (3, 2)),
    ((5, 40), (33, 257)),
)
UPSAMPLINGS = (Upsampling("logits", True), Upsampling("probs", False))
IMAGES: tuple[tuple[Size, Size], ...] = (
    ((7, 11), (31, 37)), ((31, 37), (7, 11)), ((38, 46), (19, 23)), ((5, 90), (40, 9)),
    ((90, 5), (9, 40)), ((20, 21), (33, 33)), ((7, 11), (7, 11)), ((211, 10), (3, 9)),
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    name: str
    raw: npt.NDArray[np.float32]  # (C, h, w)
    size: Size
    upsampling: Upsampling
    mask: npt.NDArray[np.uint8]


def cases() -> Iterator[Case]:
    for classes in CLASSES:
        for low, size in SHAPES:
            dice = np.random.default_rng([classes, *size])
            raw = (dice.normal(size=(classes, *low)) * 3).astype(np.float32)
            if raw.size > classes:
                raw[0, 0, 0] = np.nan
            mask = (dice.random(size) < 0.2).astype(np.uint8)
            for upsampling in UPSAMPLINGS:
                name = f"{classes} classes, {low} -> {size}, {upsampling.order}"
                yield Case(name, raw, size, upsampling, mask)


def results(kernel: FusedKernel, case: Case) -> dict[str, npt.NDArray[Any]]:
    """Every array that the four calls of a back end give."""
    classes = len(case.raw)
    encoded = kernel.encode(case.raw, "logits")
    scores = EncodedScores(encoded, case.upsampling)
    entropy = Rule("entropy", "<", (1.5,) * classes)
    ratio = Rule("ratio", ">", (0.3,) * classes, tuple(np.linspace(0.5, 1, classes)))
    evidence = kernel.accumulate(
        scores, case.size, "confidence", case.mask, labels=True, entropy=True
    )
    found = {"encoded": encoded, **_evidence(evidence)}
    found["counted"] = kernel.count(scores, case.size, [entropy, ratio], case.mask)
    for rule in (entropy, ratio):
        chosen = kernel.select(scores, case.size, rule, case.mask, entropy=True, confidence=True)
        found |= {f"{rule.measure} {k}": v for k, v in _selection(chosen).items()}
    return found


def _evidence(found: Evidence) -> dict[str, Any]:
    counted = found.statistics
    return {
        "labels": found.labels, "entropy": found.entropy,
        "sums": counted.sums.astype(np.int64), "histogram": counted.histogram.astype(np.int64),
        "left out": np.array([counted.invalid, counted.masked]),
    }  # fmt: skip


def _selection(found: Selection) -> dict[str, Any]:
    return {
        "selection": found.labels, "predicted": found.predicted, "selected": found.selected,
        "entropies": found.entropy, "confidences": found.confidence,
    }  # fmt: skip


def different(device: Device) -> list[str]:
    """What is not the CPU's bytes, by name."""
    gpu, cpu = cuda.Kernel(device=device), native.Kernel()
    found = []
    for case in cases():
        ours, theirs = results(gpu, case), results(cpu, case)
        found += [
            f"{case.name}: {what}"
            for what, expected in theirs.items()
            if ours[what].tobytes() != expected.tobytes()
        ]
    return found + list(_different_rows(device))


def _different_rows(device: Device) -> Iterator[str]:
    plain = InputSpec("RGB", 1.0, (0, 0, 0), (1, 1, 1), "bilinear")
    for how in ("bilinear", "bicubic"):
        for dtype in ("float32", "float16"):
            spec = replace(plain, resize=how, dtype=dtype)
            preprocess = DevicePreprocess(device, spec)
            for before, after in IMAGES:
                image = np.random.default_rng(before).integers(0, 256, (*before, 3), np.uint8)
                row = _row(device, preprocess, image, after, np.dtype(dtype))
                if row != to_batch_row(image, spec, after).tobytes():
                    yield f"preprocess, {how}, {dtype}, {before} -> {after}"


def _row(
    device: Device,
    preprocess: DevicePreprocess,
    image: npt.NDArray[np.uint8],
    size: Size,
    dtype: np.dtype[Any],
) -> bytes:
    stream, given = device.stream(), device.allocate(image.nbytes)
    staged = device.pinned(image.nbytes)
    out = device.allocate(3 * size[0] * size[1] * dtype.itemsize)
    back = device.pinned(out.nbytes)
    assert staged.host is not None and back.host is not None
    staged.host[:] = image.reshape(-1)
    device.copy(given.address, staged.address, image.nbytes, stream)
    source = DeviceArray(device, given.address, image.shape, image.dtype, given)
    target = DeviceArray(device, out.address, (1, 3, *size), dtype, out)
    preprocess.run(source, size, target, 0, stream)
    device.copy(back.address, out.address, out.nbytes, stream)
    stream.synchronize()
    return back.host.tobytes()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    try:
        found = different(open_device(arguments.device))
    except CadaError as error:
        print(f"not run: {error}")
        return error.exit_code
    for what in found:
        print(f"WRONG: {what} differs from the CPU's bytes")
    print(f"{len(list(cases()))} cases of the fused kernels, {4 * len(IMAGES)} of preprocessing")
    return WRONG if found else 0


if __name__ == "__main__":
    sys.exit(main())
