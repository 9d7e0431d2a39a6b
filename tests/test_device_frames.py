"""Whole runs through a GPU pipeline, on stand-ins: the bytes of a CPU run, and what goes wrong.

The network runs in ONNX Runtime's CPU session behind a stand-in for the CUDA provider; the CUDA
kernels themselves run on this processor (tests/cuda_executor); streams are lazy.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from command_line import cada, deliverables
from cuda_executor import build
from cuda_executor.layer import ProcessorDevice
from foreign_models import fitted_colours, save_colour_model, street_like, write_images
from stand_in_ort_cuda import ort_cuda_here
from trt_on_cpu import needs_stand_in, tensorrt_here

from cada_deploy import load
from cada_deploy.device import DeviceLost, OutOfDeviceMemory
from cada_deploy.device_frames import DeviceFrames
from cada_deploy.engines import open_engine
from cada_deploy.model_files import load_model
from cada_deploy.stages import StageClock

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="not run: needs g++")

SIZE = (24, 40)
COLOURS = fitted_colours([street_like(*SIZE, seed=k) for k in range(4)], 5)
PRESET = ("--preset", "imagenet-rgb")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colour_model(tmp_path_factory.mktemp("model") / "m.onnx", COLOURS, poison=None)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven frames, one of another size and one that is no image."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, 5, SIZE)
    cv2.imwrite(str(folder / "other.png"), street_like(17, 23, seed=9))
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    return folder


@pytest.fixture
def gpu() -> Iterator[ProcessorDevice]:
    device = ProcessorDevice()
    with ort_cuda_here(device):
        yield device


def labelled(images: Path, model: Path, out: Path, *options: str | Path | int) -> Any:
    return cada("pseudo-label", *PRESET, "--model", model, "--images", images, "--out", out,
                "--allow-rejects", 1, *options)  # fmt: skip


def comparable(out: Path) -> dict[str, bytes]:
    """What a run delivers, without the id of the run (another engine is another run)."""
    files = deliverables(out)
    for name in ("statistics.json", "thresholds.json"):
        content = json.loads(files[name])
        content.pop("run_id", None)
        files[name] = json.dumps(content).encode()
    return files


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--batch-size", 3),
        ("--size", "16x32", "--batch-size", 2, "--workers", 1),
        ("--ignore-rows", "0:5", "--cache", "off"),
        ("--centroid", "mean", "--scope", "image"),
    ],
    ids=lambda options: " ".join(map(str, options)) or "plain",
)
def test_a_run_on_a_gpu_gives_the_bytes_of_one_on_the_cpu(
    model: Path, images: Path, tmp_path: Path, gpu: ProcessorDevice, options: tuple[Any, ...]
) -> None:
    on_cpu = labelled(images, model, tmp_path / "cpu", *options)
    assert on_cpu.code == 0, on_cpu.err
    assert not gpu.launched
    on_gpu = labelled(images, model, tmp_path / "gpu", "--device", "cuda:0", *options)
    assert on_gpu.code == 0, on_gpu.err
    assert comparable(tmp_path / "gpu") == comparable(tmp_path / "cpu")
    assert set(gpu.launched) >= {"cada_preprocess", "cada_encode", "cada_accumulate"}
    seconds = json.loads((tmp_path / "gpu" / "run.json").read_text())
    assert seconds["identity"]["engine"]["device_kind"] == "cuda"


@needs_stand_in
def test_tensorrt_and_our_kernels_share_a_stream(
    model: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores go from the engine to the fused kernel without leaving the device."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device = ProcessorDevice()
    frames = tmp_path / "frames"
    write_images(frames, 4, SIZE)
    options = ("--size", "24x40", "--batch-size", 3)
    with tensorrt_here(device=device):
        ran = labelled(frames, model, tmp_path / "trt", "--engine", "trt", *options)
    assert ran.code == 0, ran.err
    assert set(device.launched) >= {"cada_preprocess", "cada_encode", "cada_accumulate"}
    assert labelled(frames, model, tmp_path / "cpu", *options).code == 0
    assert comparable(tmp_path / "trt") == comparable(tmp_path / "cpu")


def test_predict_and_the_library_are_the_cpus_too(
    model: Path, images: Path, tmp_path: Path, gpu: ProcessorDevice
) -> None:
    for name, device in (("cpu", "cpu"), ("gpu", "cuda:0")):
        ran = cada("predict", *PRESET, "--model", model, "--images", images, "--device", device,
                   "--out", tmp_path / name, "--allow-rejects", 1)  # fmt: skip
        assert ran.code == 0, ran.err
    labels = [sorted((tmp_path / name / "labels").rglob("*.png")) for name in ("cpu", "gpu")]
    assert len(labels[0]) == 6
    assert [p.read_bytes() for p in labels[0]] == [p.read_bytes() for p in labels[1]]
    frame = street_like(*SIZE, seed=1)
    found = [
        load(model, preset="imagenet-rgb", device=device).predict(frame)
        for device in ("cpu", "cuda:0")
    ]
    assert np.array_equal(found[0].labels, found[1].labels)


def frames_of(model: Path, device: ProcessorDevice, **options: Any) -> DeviceFrames:
    opened = load_model(model, preset="imagenet-rgb")
    engine = open_engine("ort", opened, "cuda:0")
    return DeviceFrames(engine, opened.spec, **options)  # type: ignore[arg-type]


def evidence(frames: DeviceFrames, count: int, size: tuple[int, int] = SIZE) -> list[Any]:
    pictures = [street_like(*size, seed=k) for k in range(count)]
    return frames.evidence(pictures, size, size, "mean", None, StageClock())


def test_after_the_first_frames_nothing_is_allocated_and_one_wait_serves_a_batch(
    model: Path, gpu: ProcessorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = frames_of(model, gpu, most=3)
    for _ in range(3):  # plain, captured, replayed
        first = evidence(frames, 3)

    def refused(nbytes: int) -> Any:
        raise AssertionError(f"{nbytes} bytes allocated")

    monkeypatch.setattr(gpu, "allocate", refused)
    monkeypatch.setattr(gpu, "pinned", refused)
    waits = []
    for stream in gpu.streams:
        run = stream.synchronize
        monkeypatch.setattr(stream, "synchronize", lambda run=run: (waits.append(1), run())[1])
    again = evidence(frames, 3)
    assert len(waits) == 1
    assert [e.statistics for _, e in again] == [e.statistics for _, e in first]


def test_little_comes_back_from_the_device(
    model: Path, gpu: ProcessorDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoded scores and statistics of a frame; the maps of its full size stay."""
    frames = frames_of(model, gpu)
    size = (64, 128)
    for _ in range(3):  # the second run proves its graph
        evidence(frames, 1, size)
    fetched: list[int] = []
    copy = gpu.copy

    def counted(target: int, source: int, nbytes: int, stream: Any) -> None:
        fetched.append(nbytes)
        copy(target, source, nbytes, stream)

    monkeypatch.setattr(gpu, "copy", counted)
    evidence(frames, 1, size)
    image, *back = fetched
    assert image == 64 * 128 * 3
    assert sorted(back) == sorted([8 * 16 * 5 * 2, 8 * (5 * 5 + 5 * 128 + 2)])


def test_out_of_memory_says_what_to_lower(model: Path, images: Path, tmp_path: Path) -> None:
    with ort_cuda_here(ProcessorDevice(limit_bytes=20_000)):
        ran = labelled(images, model, tmp_path / "out", "--device", "cuda:0", "--batch-size", 4)
    assert ran.code == 1 and ran.said("20000 there"), ran.err


def test_auto_batch_halves_until_it_fits_and_says_so(
    model: Path, images: Path, tmp_path: Path
) -> None:
    ran = labelled(images, model, tmp_path / "cpu", "--workers", 1)
    assert ran.code == 0
    with ort_cuda_here(ProcessorDevice(limit_bytes=30_000)):
        ran = labelled(images, model, tmp_path / "gpu", "--device", "cuda:0", "--batch-size", 8,
                       "--auto-batch", "--workers", 1)  # fmt: skip
    assert ran.code == 0, ran.err
    assert ran.said("batches of 4 in place of 8", "batches of 2 in place of 4")
    assert comparable(tmp_path / "gpu") == comparable(tmp_path / "cpu")


def test_auto_batch_is_refused_where_it_does_nothing(
    model: Path, images: Path, tmp_path: Path
) -> None:
    ran = labelled(images, model, tmp_path / "out", "--auto-batch")
    assert ran.code == 2 and ran.said("--auto-batch", "leave it out")


def test_a_gpu_that_is_lost_ends_the_run_cleanly_and_it_resumes(
    model: Path, images: Path, tmp_path: Path
) -> None:
    class Lost(ProcessorDevice):
        left = 9

        def launch(self, function: Any, *arguments: Any, **more: Any) -> None:
            if function.name == "cada_accumulate":
                self.left -= 1
            if self.left < 6:
                raise DeviceLost("the GPU has fallen off the bus (CUDA 719)")
            super().launch(function, *arguments, **more)

    options = ("--device", "cuda:0", "--shard-size", 2, "--workers", 1)
    with ort_cuda_here(Lost()):
        ran = labelled(images, model, tmp_path / "out", *options)
    assert ran.code == 1 and ran.said("fallen off the bus"), ran.err
    kept = list((tmp_path / "out").rglob("*.scored.json")) + list(
        (tmp_path / "out" / "scores").glob("*")
    )
    assert kept
    with ort_cuda_here(ProcessorDevice()):
        ran = labelled(images, model, tmp_path / "out", *options)
    assert ran.code == 0 and ran.said("resuming:"), ran.err
    assert labelled(images, model, tmp_path / "cpu").code == 0
    assert comparable(tmp_path / "out") == comparable(tmp_path / "cpu")


def test_where_memory_is_shared_the_image_is_not_copied(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Jetson: the GPU reads the pinned bytes themselves, and the results are the same."""
    found = []
    for integrated in (False, True):
        device = ProcessorDevice(integrated=integrated)
        with ort_cuda_here(device):
            frames = frames_of(model, device, most=2)
            for _ in range(3):
                evidence(frames, 2)
            sizes: list[int] = []
            copy = device.copy
            monkeypatch.setattr(
                device, "copy", lambda t, s, n, q, c=copy, z=sizes: (z.append(n), c(t, s, n, q))[1]
            )
            found.append([e.statistics for _, e in evidence(frames, 2)])
            image = SIZE[0] * SIZE[1] * 3
            assert sizes.count(image) == (0 if integrated else 2)
    assert found[0] == found[1]


def test_a_lane_that_failed_is_not_used_again(model: Path, gpu: ProcessorDevice) -> None:
    frames = frames_of(model, gpu)
    evidence(frames, 1)
    (lane,) = frames._idle
    with pytest.raises(RuntimeError), frames._lane() as taken:
        assert taken is lane
        raise RuntimeError
    assert frames._idle == []
    with pytest.raises(OutOfDeviceMemory):
        frames._lower(1, OutOfDeviceMemory("no room"))
