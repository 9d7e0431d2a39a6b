"""The score cache: one safetensors file a shard, fp16, so that no threshold needs a second pass.

Written as a stream: room for the header is reserved, tensors are appended as they come, and the
header goes in last, so a shard of full-size scores never stands in memory. Format:
https://github.com/huggingface/safetensors#format (8-byte little-endian header length, JSON padded
with spaces, data).
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from cada_deploy.durable import explained, sync_folder

_ENTRY_ROOM = 160  # bytes of header for one tensor: the name, F16, a shape and two 64-bit offsets


def tensor_name(position: int) -> str:
    """The name of the image at `position` (0-based) of the shard."""
    return f"{position:06d}"


def digest(scores: npt.NDArray[np.float16]) -> str:
    """SHA-256 of the little-endian fp16 bytes in (C, h, w) order."""
    return hashlib.sha256(np.ascontiguousarray(scores).data).hexdigest()


class ScoreFile:
    """Writes one shard's scores; nothing stands under the final name before `commit`."""

    def __init__(self, path: Path, images: int) -> None:
        self._path = path
        self._temporary = path.with_name(path.name + ".tmp")
        self._room = -(-(64 + _ENTRY_ROOM * images) // 8) * 8
        self._entries: dict[str, object] = {}
        self._end = 0
        with explained(path):
            self._file = self._temporary.open("wb")
            self._file.write(bytes(8 + self._room))

    def append(self, position: int, scores: npt.NDArray[np.float16]) -> None:
        data = np.ascontiguousarray(scores).data
        with explained(self._path):
            self._file.write(data)
        self._entries[tensor_name(position)] = {
            "dtype": "F16",
            "shape": list(scores.shape),
            "data_offsets": [self._end, self._end + data.nbytes],
        }
        self._end += data.nbytes

    def commit(self) -> int:
        """Make the file durable under its name; the number of bytes it has."""
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        assert len(header) <= self._room
        with explained(self._path):
            self._file.seek(0)
            self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self._path)
        sync_folder(self._path.parent)
        return 8 + self._room + self._end

    def __enter__(self) -> ScoreFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._file.closed:
            # Closing writes what is still buffered; on a full disk that fails a second time.
            with suppress(OSError):
                self._file.close()
            self._temporary.unlink(missing_ok=True)


def read_scores(path: Path, position: int) -> npt.NDArray[np.float16]:
    """One image's scores (C, h, w) float16. Raises OSError or SafetensorError when damaged."""
    with safe_open(path, framework="numpy") as file:
        scores: npt.NDArray[np.float16] = file.get_tensor(tensor_name(position))
    return scores


READ_ERRORS = (OSError, SafetensorError, KeyError, ValueError)
