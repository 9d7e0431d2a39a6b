"""DLPack capsules against NumPy and torch, who read and write them in their own code. On the CPU:
only the label says CUDA in use."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from cada_deploy import dlpack
from cada_deploy.errors import UsageError

CPU = (1, 0)
DTYPES = ["bool", "uint8", "int8", "int32", "uint16", "int64", "float16", "float32", "float64"]


class Owner:
    pass


class Producer:
    """An array that goes out through dlpack.capsule; `alive` says whether it is still lent."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = CPU) -> None:
        self.array, self.device = array, device
        self._owners: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **asked: Any) -> object:
        owner = Owner()
        self._owners.append(weakref.ref(owner))
        return dlpack.capsule(
            int(self.array.ctypes.data), self.array.shape, self.array.dtype, self.device, owner,
            versioned=asked.get("max_version") is not None,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        gc.collect()
        assert self._owners
        return any(owner() is not None for owner in self._owners)


def _torch() -> Any:
    return pytest.importorskip("torch", reason="not run: torch is not installed")


CONSUMERS: dict[str, Callable[[Any], Any]] = {
    "numpy": np.from_dlpack,
    "torch": lambda array: _torch().from_dlpack(array),
    "ours": lambda array: dlpack.take(array.__dlpack__()),
    "ours, versioned": lambda array: dlpack.take(array.__dlpack__(max_version=(1, 1))),
}


@pytest.mark.parametrize("consumer", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_others_read_what_we_lend(consumer: str, dtype: str) -> None:
    array = (np.arange(24) % 2).astype(dtype).reshape(2, 3, 4)
    got = CONSUMERS[consumer](Producer(array))
    assert tuple(got.shape) == (2, 3, 4)
    assert np.array_equal(np.asarray(got), array)
    assert str(got.dtype).removeprefix("torch.") == dtype


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_the_owner_lives_until_the_consumer_is_done(consumer: str) -> None:
    producer = Producer(np.arange(6, dtype=np.float32))
    taken = CONSUMERS[consumer](producer)
    assert producer.alive
    del taken
    assert not producer.alive


def test_a_capsule_that_nobody_takes_gives_back() -> None:
    producer = Producer(np.arange(6, dtype=np.float32))
    for asked in ({}, {"max_version": (1, 0)}):
        capsule = producer.__dlpack__(**asked)
        assert producer.alive
        del capsule
        assert not producer.alive


def test_a_capsule_may_die_while_an_exception_flies() -> None:
    producer = Producer(np.arange(6, dtype=np.float32))
    for consume in (lambda capsule: capsule, dlpack.take):
        with pytest.raises(ZeroDivisionError):
            _ = (consume(producer.__dlpack__()), 1 / 0)
        assert not producer.alive


def test_a_consumer_that_refuses_gives_back() -> None:
    producer = Producer(np.arange(6, dtype=np.float32), device=(dlpack.CUDA, 0))
    with pytest.raises(RuntimeError, match="Unsupported device"):
        np.from_dlpack(producer)
    assert not producer.alive


@pytest.mark.parametrize("versioned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_numpy_lends(dtype: str, versioned: bool) -> None:
    array = np.zeros((3, 1, 5), dtype)
    asked: dict[str, Any] = {"max_version": (1, 0)} if versioned else {}
    taken = dlpack.take(array.__dlpack__(**asked))
    assert (taken.address, taken.shape, taken.dtype) == (array.ctypes.data, (3, 1, 5), array.dtype)
    assert taken.device == CPU


def test_we_read_views_of_torch() -> None:
    tensor = _torch().zeros(4, 6)
    taken = dlpack.take(tensor[1:, 2:].__dlpack__())
    assert taken.address == tensor.data_ptr() + 4 * (6 + 2)
    assert (taken.shape, taken.strides) == ((3, 4), (6, 1))


def test_an_offset_in_bytes_counts() -> None:
    array = np.zeros(8, np.uint8)
    capsule = array.__dlpack__()
    dlpack._structure(capsule)[0].tensor.byte_offset = 3
    assert dlpack.take(capsule).address == array.ctypes.data + 3


def test_a_type_that_numpy_lacks() -> None:
    torch = _torch()
    with pytest.raises(UsageError, match="no NumPy counterpart; convert it"):
        dlpack.take(torch.zeros(3, dtype=torch.bfloat16).__dlpack__())


def test_a_capsule_is_taken_once() -> None:
    capsule = np.zeros(3).__dlpack__()
    taken = dlpack.take(capsule)
    with pytest.raises(UsageError, match="it may be used up"):
        dlpack.take(capsule)
    with pytest.raises(UsageError, match="a DLPack capsule was expected, found 'text'"):
        dlpack.take("text")
    assert taken.shape == (3,)


def test_the_label_is_ours() -> None:
    array = np.zeros((2, 2), np.uint8)
    capsule = dlpack.capsule(
        int(array.ctypes.data), (2, 2), array.dtype, (dlpack.CUDA, 3), array, versioned=True
    )
    assert dlpack.take(capsule).device == (dlpack.CUDA, 3)
