"""run.json: what a run is, whether it is finished, and how it was made.

Written when a run begins (status "running") and again, last of all, when it is done.
"""

from __future__ import annotations

import base64
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from cada_deploy import __version__, durable, run_identity
from cada_deploy.errors import ArtefactMismatch, UsageError
from cada_deploy.ignored import IgnoredArea, Mask
from cada_deploy.labels import encode_label_png, read_label_png
from cada_deploy.manifests import RunFolder
from cada_deploy.shards import DEFAULT_SHARD_SIZE

SCHEMA = 1
Record = dict[str, Any]


def new(
    identity: Mapping[str, Any], shard_size: int, images: int, settings: Mapping[str, Any]
) -> Record:
    """settings must hold the absolute paths `model` and `images`, the device and the selection."""
    return {
        "schema": SCHEMA,
        "run_id": run_identity.run_id(dict(identity)),
        "status": "running",
        "identity": dict(identity),
        "shard_size": shard_size,
        "image_count": images,
        "settings": dict(settings),
        "versions": versions(),
        "command": [printable(a) for a in sys.argv],
    }


def recorded_path(what: str, path: Path) -> dict[str, str]:
    """`what` for people; when the name is not UTF-8, `what`_b64 beside it, to find it again."""
    name = os.fsencode(path)
    shown = printable(path)
    if shown.encode() == name:
        return {what: shown}
    return {what: shown, f"{what}_b64": base64.b64encode(name).decode()}


def path_of(record: Record, what: str) -> Path:
    settings = record["settings"]
    name = settings.get(f"{what}_b64")
    return Path(settings[what] if name is None else os.fsdecode(base64.b64decode(name)))


def printable(path: str | Path) -> str:
    """A path as text that any JSON reader takes; bytes that are not UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def versions() -> dict[str, str]:
    found = {"cada-deploy": __version__, "python": platform.python_version()}
    for package in ("numpy", "onnx", "onnxruntime", "opencv-python-headless", "pillow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read(run: Path) -> Record:
    """Raises UsageError when OUT has no run.json, ArtefactMismatch when it is damaged."""
    path = run / "run.json"
    try:
        record = durable.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{run} is not a run: it has no run.json. Name the --out folder of a "
            "`cada-deploy pseudo-label`"
        ) from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise ArtefactMismatch(f"{path} is not a run record of schema {SCHEMA}")
    _refuse_damaged(path, record)
    return record


def _refuse_damaged(path: Path, record: Record) -> None:
    identity, settings = record.get("identity"), record.get("settings")
    counts = (record.get("shard_size"), record.get("image_count"))
    whole = (
        isinstance(identity, dict)
        and run_identity.run_id(identity) == record.get("run_id")
        and isinstance(settings, dict)
        and {"model", "images", "engine", "device"} <= settings.keys()
        and all(isinstance(n, int) and n >= 1 for n in counts)
    )
    if not whole:
        raise ArtefactMismatch(
            f"{path} was changed or damaged: its parts do not fit its run id. Put the right file "
            "back, or choose another --out"
        )


def begin(
    folder: RunFolder, record: Record, ignored: IgnoredArea, unwanted: Sequence[str] = ()
) -> None:
    """From here until `finish` the folder says that it is not finished.

    unwanted names folders of an earlier selection that would contradict the coming labels.
    """
    for path in (folder.labels, folder.shards):
        durable.make_folder(path)
    for name in ("thresholds.json", "report.html"):
        durable.remove(folder.root / name)
    for name in unwanted:
        shutil.rmtree(folder.root / name, ignore_errors=True)
    for leftover in folder.scores.glob("*.tmp"):  # of a killed run; this one may keep no scores
        durable.remove(leftover)
    if ignored.mask is not None:
        durable.write_file(folder.root / "ignored.png", encode_label_png(ignored.mask))
    durable.write_json(folder.root / "run.json", {**record, "status": "running"})


def finish(folder: RunFolder, record: Record, results: Mapping[str, Any]) -> Record:
    done = {**record, "status": "done", "results": dict(results)}
    durable.write_json(folder.root / "run.json", done)
    return done


def ignored_area(folder: RunFolder, record: Record) -> IgnoredArea:
    """The ignored pixels of a run, from its record and its copy of the mask."""
    parts = record["identity"]["ignored"]
    mask = None
    if parts["mask"] is not None:
        mask = _mask_copy(folder.root / "ignored.png")
    area = IgnoredArea(mask, tuple((r[0], r[1]) for r in parts["rows"]))
    if area.to_json() != parts:
        raise ArtefactMismatch(f"{folder.root}/ignored.png is not the mask this run was made with")
    return area


def _mask_copy(path: Path) -> Mask:
    try:
        return read_label_png(path.read_bytes(), str(path))
    except FileNotFoundError:
        raise ArtefactMismatch(f"{path} is missing; put the run's mask back there") from None


def settled_shard_size(folder: RunFolder, identity: Mapping[str, Any], asked: int | None) -> int:
    """The shard size of the run that is in OUT, which must be this very run; else as asked."""
    refuse_foreign(folder, identity)
    if not (folder.root / "run.json").exists():
        return asked or DEFAULT_SHARD_SIZE
    found = int(read(folder.root)["shard_size"])
    if asked and asked != found:
        raise ArtefactMismatch(
            f"{folder.root} was begun with --shard-size {found}; go on with that, or choose "
            "another --out"
        )
    return found


def refuse_foreign(folder: RunFolder, identity: Mapping[str, Any]) -> None:
    """Raises ArtefactMismatch when OUT holds another run, or labels that are no run's."""
    if (folder.root / "run.json").exists():
        run_identity.check_same(read(folder.root)["identity"], dict(identity), str(folder.root))
    elif folder.labels.exists() and any(folder.labels.iterdir()):
        raise ArtefactMismatch(
            f"{folder.labels} holds files but {folder.root} has no run.json: it is not a run of "
            "cada-deploy. Choose another --out"
        )
