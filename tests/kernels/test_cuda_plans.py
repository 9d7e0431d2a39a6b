"""Batches on a device: plans against single frames, in flight together, no waits, no allocation.

The device is this processor (tests/cuda_executor); its streams do nothing until somebody waits, and
memory that was freed too early is an error. With CADA_TEST_CUDA=cuda:0 the tests of results run on
that GPU.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cuda_executor import build
from cuda_executor.layer import ProcessorDevice, kernels_device, on_processor

from cada_deploy import device_arrays
from cada_deploy.device import Device
from cada_deploy.device_arrays import DeviceArray
from cada_deploy.errors import ArtefactMismatch, UsageError
from cada_deploy.fused import cuda, native
from cada_deploy.policies import Rule
from cada_deploy.scores import EncodedScores, Upsampling

pytestmark = pytest.mark.skipif(
    build.compiler() is None or not native.is_built(), reason="not run: needs g++"
)

CLASSES, LOW, SIZE = 5, (6, 9), (37, 70)
LOGITS, PROBS = Upsampling("logits", True), Upsampling("probs", False)
RULE = Rule("entropy", "<", (0.9, 0.5, None, 1.2, 0.7))


def frames(count: int, classes: int = CLASSES) -> npt.NDArray[np.float16]:
    raw = np.random.default_rng(count).normal(size=(count, classes, *LOW)).astype(np.float32) * 3
    raw[0, 0, 2, 3] = np.nan
    return native.Kernel().encode(raw, "logits")


def on_device(device: Device, array: npt.NDArray[Any]) -> DeviceArray:
    memory = device.pinned(array.nbytes)
    assert memory.host is not None
    memory.host[:] = array.reshape(-1).view(np.uint8)
    return DeviceArray(device, memory.address, array.shape, array.dtype, memory)


@pytest.mark.parametrize("upsampling", [LOGITS, PROBS], ids=str)
@pytest.mark.parametrize("classes", [CLASSES, 70])
def test_a_batch_is_its_frames(upsampling: Upsampling, classes: int) -> None:
    device = kernels_device()
    kernel, host = cuda.Kernel(device=device), native.Kernel()
    scores = frames(3, classes)
    mask = (np.random.default_rng(0).random(SIZE) < 0.2).astype(np.uint8)
    rule = Rule("ratio", ">", (0.4,) * classes, tuple(np.linspace(0.5, 1, classes)))
    stream = device.stream()
    plan = kernel.plan((4, classes, *LOW), SIZE, upsampling)  # one more than there are
    given, given_mask = on_device(device, scores), on_device(device, mask)

    plan.accumulate(given, "confidence", given_mask, stream, labels=True, entropy=True)
    plan.fetch(stream)
    stream.synchronize()
    found = [plan.evidence(k) for k in range(3)]
    plan.count(given, [rule, rule], given_mask, stream)
    plan.fetch(stream)
    stream.synchronize()
    counted = [plan.counted(k) for k in range(3)]
    plan.select(given, rule, given_mask, stream, confidence=True)
    plan.fetch(stream)
    stream.synchronize()
    for k, frame in enumerate(scores):
        one = EncodedScores(frame, upsampling)
        evidence = host.accumulate(one, SIZE, "confidence", mask, labels=True, entropy=True)
        assert found[k].statistics == evidence.statistics
        assert np.array_equal(found[k].labels, evidence.labels)
        assert np.array_equal(found[k].entropy, evidence.entropy, equal_nan=True)
        assert np.array_equal(counted[k], host.count(one, SIZE, [rule, rule], mask))
        selection, expected = plan.selection(k), host.select(one, SIZE, rule, mask, confidence=True)
        assert np.array_equal(selection.labels, expected.labels)
        assert selection.entropy is None
        assert np.array_equal(selection.confidence, expected.confidence, equal_nan=True)
        assert selection.invalid == expected.invalid and selection.masked == expected.masked


@on_processor
def test_after_the_first_use_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    device = ProcessorDevice()
    kernel, stream = cuda.Kernel(device=device), device.stream()
    plan = kernel.plan((2, CLASSES, *LOW), SIZE, PROBS)
    given = on_device(device, frames(2))

    def everything() -> None:
        plan.accumulate(given, "mean", None, stream, labels=True, entropy=True)
        plan.fetch(stream)
        plan.select(given, RULE, None, stream, entropy=True, confidence=True)
        plan.fetch(stream)

    everything()
    stream.synchronize()

    def refused(nbytes: int) -> Any:
        raise AssertionError(f"{nbytes} bytes allocated")

    monkeypatch.setattr(device, "allocate", refused)
    monkeypatch.setattr(device, "pinned", refused)
    for _ in range(3):
        everything()
    stream.synchronize()


@on_processor
def test_nothing_is_waited_for_and_two_plans_are_in_flight_at_once() -> None:
    device = ProcessorDevice()
    kernel = cuda.Kernel(device=device)
    plans = [kernel.plan((1, CLASSES, *LOW), SIZE, LOGITS) for _ in range(2)]
    streams = [device.stream() for _ in range(2)]
    scores = frames(2)
    given = [on_device(device, frame[None]) for frame in scores]
    for plan, stream, array in zip(plans, streams, given):  # tables are there after this
        plan.accumulate(array, "mean", None, stream, labels=True)
        plan.fetch(stream)
        stream.synchronize()
    first = [plan.evidence(0) for plan in plans]
    device.launched.clear()
    for plan, stream, array in zip(plans, streams, given[::-1]):
        plan.accumulate(array, "mean", None, stream, labels=True)
        plan.fetch(stream)
    assert all(stream.pending for stream in streams)
    assert plans[0].evidence(0).statistics == first[0].statistics, "not there yet"
    for stream in streams:
        stream.synchronize()
    assert [p.evidence(0).statistics for p in plans] == [e.statistics for e in first[::-1]]


def test_the_scores_event_is_waited_for() -> None:
    """The engine's stream fills the scores; the kernel's stream must not start before."""
    device = kernels_device()
    kernel, engine, ours = cuda.Kernel(device=device), device.stream(), device.stream()
    scores = frames(1)
    source = on_device(device, scores)
    target = device_arrays.empty(device, scores.shape, np.float16)
    ready = device.event()
    device.copy(target.address, source.address, target.nbytes, engine)
    ready.record(engine)
    waiting = DeviceArray(device, target.address, target.shape, target.dtype, target, ready)
    plan = kernel.plan((1, CLASSES, *LOW), SIZE, LOGITS)
    plan.accumulate(waiting, "mean", None, ours, labels=True)
    plan.fetch(ours)
    ours.synchronize()
    host = native.Kernel().accumulate(EncodedScores(scores[0], LOGITS), SIZE, "mean", labels=True)
    assert np.array_equal(plan.evidence(0).labels, host.labels)


def test_encoding_on_the_device() -> None:
    device = kernels_device()
    kernel, stream = cuda.Kernel(device=device), device.stream()
    for dtype in (np.float32, np.float16):
        raw = np.random.default_rng(1).normal(size=(2, 7, 5, 6)).astype(dtype)
        given, encoded = on_device(device, raw), device_arrays.empty(device, raw.shape, np.float16)
        back = device.pinned(encoded.nbytes)
        assert back.host is not None
        kernel.encode_on(given, "logits", encoded, stream)
        device.copy(back.address, encoded.address, encoded.nbytes, stream)
        stream.synchronize()
        assert back.host.tobytes() == native.Kernel().encode(raw, "logits").tobytes()


@on_processor
def test_what_a_plan_refuses() -> None:
    device = ProcessorDevice()
    kernel, stream = cuda.Kernel(device=device), device.stream()
    with pytest.raises(ArtefactMismatch, match="256 classes"):
        kernel.plan((1, 256, *LOW), SIZE, LOGITS)
    with pytest.raises(UsageError, match="every side"):
        kernel.plan((1, CLASSES, *LOW), (0, 4), LOGITS)
    plan, given = kernel.plan((1, CLASSES, *LOW), SIZE, LOGITS), on_device(device, frames(1))
    with pytest.raises(UsageError, match="weighting"):
        plan.accumulate(given, "literal", None, stream)
    with pytest.raises(ArtefactMismatch, match="mask"):
        plan.accumulate(given, "mean", on_device(device, np.zeros((3, 3), np.uint8)), stream)
    with pytest.raises(ArtefactMismatch, match="thresholds"):
        plan.select(given, Rule("entropy", "<", (1.0,)), None, stream)


@pytest.mark.parametrize("align", [False, True])
def test_row_groups_lie_between_the_same_rows(align: bool) -> None:
    for size, low in ((1, 1), (37, 6), (1024, 129), (5, 60), (100, 2)):
        lower, weight = cuda.tap_table(size, low, align)
        groups = cuda.row_groups(lower)
        assert groups[0] == 0 and groups[-1] == size
        assert np.all(np.diff(groups) >= 1) and np.all(np.diff(groups) <= 15)
        for first, end in itertools.pairwise(groups):
            assert len(set(lower[first:end])) == 1
        assert np.all((weight >= 0) & (weight < 1))
