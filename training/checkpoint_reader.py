"""Reads what a checkpoint file holds - torch's zip and legacy formats, safetensors - and runs none
of it.

torch.load is called with weights_only=True always, and with a short list of NumPy names that some
projects' files need for a score or a table. A file that names anything else is refused. This file
knows nothing of networks.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cada_deploy.errors import ArtefactMismatch, RunFailed, UsageError

# PyTorch 2.13 reads zip files up to this version and writes 3 (caffe2/serialize/versions.h).
NEWEST_ZIP = 10
_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


@dataclass(frozen=True)
class Contents:
    """A file's contents, still nested as they were saved."""

    tree: object
    layout: str  # "zip", "legacy" or "safetensors"
    sha256: str  # of the file


def read(path: Path) -> Contents:
    """Raises UsageError for a path that is no file, ArtefactMismatch for one that cannot be read.

    No code in the file is ever run.
    """
    if not path.exists():
        raise UsageError(
            f"no checkpoint at {path}; expected a .pth, .pkl, .pt or .safetensors file"
        )
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "no ordinary file"
        raise UsageError(f"{path} is {kind}; expected a checkpoint file, give one of its files")
    try:
        digest, head, size = _digest(path)
        layout = _layout(head, size, path)
        tree = _READERS[layout](path)
    except (PermissionError, IsADirectoryError) as error:
        raise RunFailed(f"cannot read {path}: {error.strerror}") from error
    return Contents(tree, layout, digest)


def _digest(path: Path) -> tuple[str, bytes, int]:
    with path.open("rb") as file:
        head = file.read(512)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else None
        if digest is None:  # Python 3.10
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest(), head, file.tell()


def _layout(head: bytes, size: int, path: Path) -> str:
    """Told from the first bytes, not from the name: people rename files."""
    if not head:
        raise ArtefactMismatch(f"{path} is empty; expected a checkpoint. Copy or download it again")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "legacy"
    raise ArtefactMismatch(f"{path} is {_kind(head, path)}; expected a checkpoint that torch.save "
                           "or safetensors wrote")  # fmt: skip


def _kind(head: bytes, path: Path) -> str:
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html")):
        return "a web page (the download's login or warning page?); download the file itself"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer; fetch the file itself with `git lfs pull`"
    if path.suffix == ".onnx":
        return "an ONNX model, which needs no checkpoint loading"
    if path.suffix == ".safetensors":
        return "no safetensors file, or one that was cut short"
    if not head.strip(b"\0"):
        return "nothing but zero bytes (a broken copy?)"
    if not re.search(rb"[^\t\n\r\x20-\x7e]", head):
        return f"text beginning with {head[:40].decode('ascii').strip()!r}"
    return f"of an unknown kind (it begins with the bytes {head[:8].hex(' ')})"


def _read_safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError, OverflowError) as error:
        raise ArtefactMismatch(
            f"{path} cannot be read ({error}); expected a whole safetensors file. Copy or download "
            "it again"
        ) from error


def _read_zip(path: Path) -> object:
    _check_zip(path)
    return _read_torch(path)


def _check_zip(path: Path) -> None:
    """Says early, and in words, what torch.load would say late or not at all."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _refuse_compressed(entries, path)
            names = [e.filename for e in entries]
            versions = [n for n in names if n.endswith("/version")]
            version = archive.read(versions[0])[:20].strip() if versions else b""
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError) as error:
        raise ArtefactMismatch(
            f"{path} begins like a checkpoint but is cut short or damaged ({error}); expected a "
            "whole file. Copy or download it again"
        ) from error
    if any("/code/" in n for n in names):
        raise ArtefactMismatch(
            f"{path} is a TorchScript archive, a program; expected a state dict. Save "
            "model.state_dict() where the model was made, or export it to ONNX"
        )
    if not any(n.endswith("/data.pkl") for n in names):
        raise ArtefactMismatch(
            f"{path} is a zip without a checkpoint in it (it holds {', '.join(names[:4])}); "
            "expected what torch.save writes. If it was packed, unpack it first"
        )
    if version and not (version.isdigit() and int(version) <= NEWEST_ZIP):
        raise ArtefactMismatch(
            f"{path} has checkpoint format {version.decode('ascii', 'replace')!r}; expected 1 to "
            f"{NEWEST_ZIP}, which PyTorch {torch.__version__} reads. Save it again with "
            "torch.save(torch.load(file, weights_only=True), 'older.pth', "
            "_use_new_zipfile_serialization=False) in the PyTorch that wrote it"
        )


def _refuse_compressed(entries: list[zipfile.ZipInfo], path: Path) -> None:
    # torch.save stores, it never compresses: a file that grows on reading is not of its making.
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise ArtefactMismatch(
            f"{path} is a compressed zip; expected torch.save's, which stores its tensors as they "
            "are. Unpack it, or save the checkpoint again"
        )


def _read_legacy(path: Path) -> object:
    with path.open("rb") as file:
        head = file.read(64)
    # PROTO n, LONG1 10, the magic number: anything else is some other program's pickle. It goes
    # through the same reader, which names what it would have run.
    if _LEGACY_MAGIC not in head[:32]:
        _refuse_pickle(path)
    return _read_torch(path)


def _refuse_pickle(path: Path) -> None:
    found = "a pickle"
    try:
        with path.open("rb") as file:
            named = _first_global(file.read(1 << 16))
        found += f" that names {named}" if named else ""
    except (ValueError, pickle.UnpicklingError, EOFError):
        found += ", cut short or damaged"
    raise ArtefactMismatch(
        f"{path} is {found}, not written by torch.save; expected a checkpoint. A pickle can hold "
        "code, so it was not opened and nothing in it was run. Where you trust it, save its "
        "tensors with torch.save(state_dict, 'weights.pth')"
    )


def _first_global(data: bytes) -> str:
    """The first module and name that a pickle asks for, by reading its opcodes, not by obeying."""
    import pickletools

    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name == "GLOBAL":
                return str(argument).replace(" ", ".")
            if opcode.name == "STACK_GLOBAL":
                return ".".join(strings[-2:])
            if isinstance(argument, str):
                strings.append(argument)
    except (ValueError, IndexError, UnicodeDecodeError, OverflowError):
        return ""
    return ""


def _read_torch(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_SAFE), warnings.catch_warnings():
            # Old files name storage classes that new releases deprecate; nothing for a user to do.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError as error:
        raise RunFailed(f"{path} does not fit into this machine's memory") from error
    except Exception as error:  # the border: whatever the file holds, say which file it is
        raise ArtefactMismatch(_why_not(path, error)) from error


def _why_not(path: Path, error: Exception) -> str:
    said = str(error).partition("Check the documentation of torch.load")[0]
    refused = _REFUSED.search(said)
    if refused:
        named = next(g for g in refused.groups() if g)
        return (
            f"{path} names {named}, which is not a tensor and could run code when it is read; "
            "expected tensors and plain values. Nothing in it was run. If you trust the file, open "
            "it where it was made and save the weights alone: torch.save(model.state_dict(), "
            "'weights.pth')"
        )
    # Before its own words PyTorch puts advice to read the file without weights_only: not from us.
    reason = said.rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    if "weights_only" in reason.lower():
        reason = type(error).__name__
    return (
        f"{path} cannot be read ({reason.splitlines()[0][:200]}); expected a whole checkpoint as "
        "torch.save writes it. It is cut short, damaged or something else: copy or download it "
        "again"
    )


# PyTorch's three ways to refuse a name: unknown, of a blocked module, of a type it may not build.
_REFUSED = re.compile(
    r"GLOBAL ([\w.]+) was not an allowed"
    r"|unsupported GLOBAL ([\w.]+) whose module"
    r"|Can only (?:build|create)[^<]*<class '([\w.]+)'>"
)


def _safe_names() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What NumPy's scalars and plain numeric arrays are rebuilt with, under old and new names.

    CAG_UDA, ProDA and MaxSquare keep a best IoU or prototypes beside the weights. None of these
    calls anything that the file chooses; object and record dtypes are left out.
    """
    core = np._core.multiarray  # type: ignore[attr-defined]
    safe: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [np.dtype, np.ndarray]
    for function in (core.scalar, core._reconstruct):
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            safe.append((function, f"{module}.{function.__name__}"))
    numeric = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    safe += [type(np.dtype(name)) for name in numeric]
    return safe


_SAFE = _safe_names()

_READERS: dict[str, Callable[[Path], object]] = {
    "zip": _read_zip,
    "legacy": _read_legacy,
    "safetensors": _read_safetensors,
}
