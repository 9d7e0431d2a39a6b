"""Calls cada_seg: the program as a process, the library through ctypes."""

from __future__ import annotations

import ctypes
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from command_line import Argument, Ran

from cada_deploy.model_files import metadata
from cada_deploy.model_spec import ModelSpec

from .built import environment

DONE, FAILED, USAGE, LACKS, MISMATCH, REJECTED = 0, 1, 2, 3, 4, 6


def run(program: Argument, *arguments: Argument, **more: str) -> Ran:
    """`cada_seg ARGUMENTS`. A crash or a hang fails the test."""
    done = subprocess.run(
        [str(program), *(str(a) for a in arguments)],
        capture_output=True,
        timeout=120,
        env=environment(**more),
    )
    assert done.returncode >= 0, f"died of signal {-done.returncode}: {done.stderr!r}"
    return Ran(done.returncode, done.stdout.decode(), done.stderr.decode(errors="replace"))


class Options(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t), ("model", ctypes.c_char_p), ("spec", ctypes.c_char_p),
        ("backend", ctypes.c_char_p), ("ort_library", ctypes.c_char_p),
        ("threads", ctypes.c_int32), ("device", ctypes.c_int32),
        ("input_height", ctypes.c_int32), ("input_width", ctypes.c_int32),
    )  # fmt: skip


class Image(ctypes.Structure):
    _fields_ = (
        ("pixels", ctypes.c_void_p), ("height", ctypes.c_int32), ("width", ctypes.c_int32),
        ("row_bytes", ctypes.c_int64),
    )  # fmt: skip


class Result(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t), ("height", ctypes.c_int32), ("width", ctypes.c_int32),
        ("labels", ctypes.c_void_p), ("entropy", ctypes.c_void_p), ("confidence", ctypes.c_void_p),
        ("invalid", ctypes.c_int64), ("preprocess_ms", ctypes.c_double),
        ("network_ms", ctypes.c_double), ("encode_ms", ctypes.c_double),
        ("fuse_ms", ctypes.c_double),
    )  # fmt: skip


class Picture(ctypes.Structure):
    _fields_ = (
        ("pixels", ctypes.POINTER(ctypes.c_uint8)), ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
    )  # fmt: skip


class Refused(Exception):
    def __init__(self, code: int, why: str) -> None:
        super().__init__(f"{code}: {why}")
        self.code, self.why = code, why


@dataclass(frozen=True)
class Library:
    """libcada_seg with NumPy arrays at its border."""

    calls: ctypes.CDLL

    @classmethod
    def at(cls, path: Path) -> Library:
        calls = ctypes.CDLL(str(path))
        for name in ("cada_seg_error", "cada_seg_backend", "cada_seg_isa"):
            getattr(calls, name).restype = ctypes.c_char_p
        return cls(calls)

    def check(self, code: int) -> None:
        if code != DONE:
            raise Refused(code, self.calls.cada_seg_error().decode(errors="replace"))

    def preprocess(
        self, spec: ModelSpec | str, image: np.ndarray, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The network's input, flat, as Python's to_batch_row makes it."""
        text = spec if isinstance(spec, str) else spec.dumps()
        half = json.loads(text)["input"].get("dtype") == "float16"
        height, width = size or image.shape[:2]
        row = np.zeros(3 * height * width, np.float16 if half else np.float32)
        frame = frame_of(image)
        self.check(
            self.calls.cada_seg_preprocess(
                text.encode(), ctypes.byref(frame), *(size or (0, 0)),
                ctypes.c_void_p(row.ctypes.data), ctypes.c_size_t(row.nbytes),
            )
        )  # fmt: skip
        return row

    def decode(self, data: bytes) -> np.ndarray:
        picture = Picture()
        self.check(
            self.calls.cada_seg_decode(data, ctypes.c_size_t(len(data)), ctypes.byref(picture))
        )
        shape = (picture.height, picture.width, 3)
        found = np.ctypeslib.as_array(picture.pixels, shape).copy()
        self.calls.cada_seg_free_picture(ctypes.byref(picture))
        return found

    def open(self, model: Path, ort_library: Path, **more: object) -> ctypes.c_void_p:
        fields: dict[str, object] = {"threads": 1, "size": ctypes.sizeof(Options), **more}
        options = Options(
            model=str(model).encode(), ort_library=str(ort_library).encode(), **fields
        )
        opened = ctypes.c_void_p()
        self.check(self.calls.cada_seg_open(ctypes.byref(options), ctypes.byref(opened)))
        return opened

    def close(self, model: ctypes.c_void_p) -> None:
        self.calls.cada_seg_close(model)

    def label(
        self, model: ctypes.c_void_p, image: np.ndarray, size: tuple[int, int] | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Result]:
        """labels, entropy, confidence and what was filled in."""
        height, width = size or image.shape[:2]
        labels = np.zeros((height, width), np.uint8)
        entropy, confidence = np.zeros((2, height, width), np.float32)
        frame = frame_of(image)
        result = Result(
            size=ctypes.sizeof(Result), height=height, width=width, labels=labels.ctypes.data,
            entropy=entropy.ctypes.data, confidence=confidence.ctypes.data,
        )  # fmt: skip
        self.check(self.calls.cada_seg_label(model, ctypes.byref(frame), ctypes.byref(result)))
        return labels, entropy, confidence, result


def frame_of(image: np.ndarray) -> Image:
    """The image as it lies in memory, gaps between rows included."""
    assert image.dtype == np.uint8 and image.strides[1:] == (3, 1)
    return Image(image.ctypes.data, image.shape[0], image.shape[1], image.strides[0])


def with_spec(model: Path, spec: ModelSpec, out: Path) -> Path:
    """The ONNX with its spec inside, as cada-deploy export writes it."""
    proto = onnx.load(model)
    onnx.helper.set_model_props(proto, metadata(spec))
    onnx.save(proto, out)
    return out
