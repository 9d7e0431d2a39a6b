"""Images and their label maps on disk, paired by name: found, counted, checked, read by number.

What is wrong with a whole set is said when it is opened, not at step 13,000: another layout, files
without a partner, labels of another size than their image (from the headers alone). What can only
be seen in the pixels is said with the file's name when it is read.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from cada_deploy.classes import CITYSCAPES_19, ClassSet
from cada_deploy.errors import ArtefactMismatch, UsageError
from cada_deploy.image_files import find_images, output_stem
from cada_deploy.images import decode, examine, peek_size, read_bytes
from cada_deploy.labels import read_label_png
from cada_deploy.rejections import ImageRejected

from .datasets import Sample
from .label_ids import LabelIds

LabelMap = npt.NDArray[np.uint8]
Size = tuple[int, int]  # (H, W)
T = TypeVar("T")

_NAMED = 5  # files that a message or a report names
_HEADER_BYTES = 1 << 16  # holds the size of every PNG, and of a JPEG without a large thumbnail
_READERS = 8  # threads that look at headers: they wait for the disk


# --- what lies where --------------------------------------------------------------------------


@dataclass(frozen=True)
class Folder:
    """Files called <path>/<one of within>/<name><ending>.<suffix>; names start after `path`."""

    path: Path
    ending: str = ""
    within: tuple[str, ...] = ("",)


@dataclass(frozen=True)
class File:
    path: Path
    size_bytes: int


def files_of(folder: Folder) -> dict[str, File]:
    """By the frame's name. Raises UsageError when there are none or two of one name."""
    found: dict[str, File] = {}
    for part in folder.within:
        for ref in find_images(folder.path / part):
            stem = os.fsdecode(output_stem(ref.relative))
            name = f"{part}/{stem}" if part else stem
            if not name.endswith(folder.ending):
                continue
            name = name.removesuffix(folder.ending)
            if name in found:
                raise UsageError(
                    f"{found[name].path} and {ref.path} are both called {name!r}; remove one"
                )
            found[name] = File(ref.path, ref.size_bytes)
    if not found:
        raise UsageError(
            f"no file below {folder.path} is called <frame>{folder.ending}.png; found\n"
            + tree(folder.path)
        )
    return found


def require_folders(root: Path, folders: Sequence[Path], layout: str, remedy: str = "") -> None:
    """Raises UsageError, with both trees, when one of the folders is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise UsageError(
                f"there is no folder {folder}. {remedy}".rstrip()
                + f"\nexpected\n{layout.strip()}\nfound\n{tree(root)}"
            )


def existing(*candidates: Path) -> Path:
    """The first that is there, else the first of all: archives unpack to several layouts."""
    return next((c for c in candidates if c.is_dir()), candidates[0])


def tree(root: Path, depth: int = 3, entries: int = 6) -> str:
    """The first few names of a folder and of those in it, for a message."""
    if not root.is_dir():
        return f"{root}: no such folder"
    return "\n".join([f"{root}/", *_branches(root, depth, entries, "  ")])


def _branches(folder: Path, depth: int, entries: int, indent: str) -> Iterable[str]:
    try:
        names = sorted(folder.iterdir())
    except OSError as error:
        yield f"{indent}({error.strerror})"
        return
    for path in names[:entries]:
        yield f"{indent}{path.name}{'/' if path.is_dir() else ''}"
        if depth > 1 and path.is_dir():
            yield from _branches(path, depth - 1, entries, indent + "  ")
    if len(names) > entries:
        yield f"{indent}... and {len(names) - entries} more"
    if not names:
        yield f"{indent}(empty)"


# --- which of them ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """list: a file of names, one a line (a tab and what follows it, as in lists of pairs, is left
    out), below `root` or from here; limit: so many frames at most, 0 for all; keep: (names) ->
    those that are meant."""

    root: Path
    list: Path | None = None
    limit: int = 0
    keep: Callable[[Sequence[str]], Sequence[str]] | None = None

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise UsageError(f"limit is {self.limit}; expected a number of frames, or 0 for all")


@dataclass(frozen=True)
class Tolerance:
    """max_missing: the share of the frames that may lack an image or labels; max_mismatched: how
    many may have labels of another size. Those frames are left out and counted."""

    max_missing: float = 0.0
    max_mismatched: int = 0
    about_missing: str = ""
    about_mismatched: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.max_missing < 1:
            raise UsageError(f"max_missing is {self.max_missing}; expected a share from 0 up to 1")
        if self.max_mismatched < 0:
            raise UsageError(f"max_mismatched is {self.max_mismatched}; expected 0 or more frames")


def listed(chosen: Chosen, folder: Folder) -> list[str]:
    """The frames that a list file names, as this project and BDL, ADVENT and CRST write them: paths
    of images below their folder or below anything above it, with or without suffix."""
    assert chosen.list is not None
    path = next((p for p in (chosen.root / chosen.list, chosen.list) if p.is_file()), None)
    if path is None:
        raise UsageError(f"no list {chosen.list} below {chosen.root} or here")
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UsageError(f"list {path} cannot be read: {error.strerror}") from error
    entries = [line.split(b"\t")[0].strip() for line in lines]
    names = [_entry(entry, folder) for entry in entries if entry and not entry.startswith(b"#")]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if not names or twice:
        problem = f"names {twice[0]!r} more than once" if twice else "names nothing"
        raise UsageError(f"list {path} {problem}; expected one image a line, each once")
    return names


def _entry(entry: bytes, folder: Folder) -> str:
    stem = os.fsdecode(output_stem(entry)).removeprefix("./")
    parts = folder.path.parts
    above = [folder.path.as_posix(), *("/".join(parts[k:]) for k in range(1, len(parts)))]
    start = next((f"{a}/" for a in above if stem.startswith(f"{a}/")), "")
    return stem.removeprefix(start).removesuffix(folder.ending)


# --- the set ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    name: str
    image: File
    labels: File | None = None
    weights: File | None = None

    @property
    def files(self) -> list[File]:
        return [f for f in (self.image, self.labels, self.weights) if f is not None]


@dataclass(frozen=True)
class Reading:
    """How label files become train ids. fit: to the image's size, by the nearest pixel."""

    ids: LabelIds
    decode: Callable[[bytes, str], LabelMap] = read_label_png
    fit: bool = False


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """A data set whose frames are files."""

    kind: str
    frames: tuple[Frame, ...]
    reading: Reading | None
    classes: ClassSet = CITYSCAPES_19
    found: Mapping[str, Any] = field(default_factory=dict)

    @property
    def labelled(self) -> bool:
        return self.reading is not None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.frames)

    @property
    def image_paths(self) -> tuple[Path, ...]:
        return tuple(f.image.path for f in self.frames)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, k: int) -> Sample:
        frame = self.frames[k]
        image = _read(frame.image.path, lambda data: decode(data).image)
        size = (image.shape[0], image.shape[1])
        labels = weights = None
        if self.reading is not None and frame.labels is not None:
            labels = _labels(frame.labels.path, self.reading, size)
        if frame.weights is not None:
            weights = _read(frame.weights.path, _confidence)
        for path, values in ((frame.labels, labels), (frame.weights, weights)):
            if path is not None and values is not None and values.shape != size:
                raise ArtefactMismatch(
                    f"{path.path} is {_hw(values.shape)}, its image {frame.image.path} is "
                    f"{_hw(size)} (HxW); one of them has changed since the set was opened"
                )
        return Sample(frame.name, image, labels, weights)

    def fingerprint(self) -> str:
        how = "unlabelled"
        if self.reading is not None:
            how = f"{self.reading.ids.description()} fit {self.reading.fit}"
        running = hashlib.sha256(f"{self.kind} {self.classes.name} {how}\n".encode())
        for frame in self.frames:
            sizes = " ".join(str(f.size_bytes) for f in frame.files)
            running.update(os.fsencode(frame.name) + f"\0{sizes}\n".encode())
        return running.hexdigest()

    def facts(self) -> dict[str, Any]:
        ids = None if self.reading is None else self.reading.ids.name
        return {"kind": self.kind, "frames": len(self), "labels": ids, **self.found}


def open_images(
    kind: str,
    images: Folder,
    labels: Folder | None,
    reading: Reading | None,
    chosen: Chosen,
    tolerance: Tolerance = Tolerance(),
    *,
    weights: Folder | None = None,
    expected: str = "either",
    classes: ClassSet = CITYSCAPES_19,
) -> LabelledImages:
    """The frames that are in every folder. expected: which frames there should be, without a list:
    those with an image or labels (`either`), or those with `labels`.

    Raises UsageError for folders without files, ArtefactMismatch beyond the tolerance.
    """
    maps = {"images": images}
    if reading is not None and labels is not None:
        maps["labels"] = labels
    if weights is not None:
        maps["weights"] = weights
    files = {what: files_of(folder) for what, folder in maps.items()}
    if chosen.list is not None:
        names = listed(chosen, images)
    else:
        counted = ("labels",) if expected == "labels" else ("images", "labels")
        names = sorted({n for what in counted for n in files.get(what, ())})
    if chosen.keep is not None:
        names = list(chosen.keep(names))
    if not names:
        raise UsageError(f"{kind}: no frame is left of those below {images.path}; choose others")
    names.sort(key=os.fsencode)
    complete, missing = _complete(kind, names, files, maps, tolerance)
    fit = reading is not None and reading.fit
    frames, sizes = _of_one_size(kind, complete, tolerance, fit)
    found = {"expected": len(names), **missing, **sizes}
    frames = frames[: chosen.limit or None]
    return LabelledImages(kind, tuple(frames), reading, classes, found)


def _complete(
    kind: str,
    names: Sequence[str],
    files: Mapping[str, Mapping[str, File]],
    folders: Mapping[str, Folder],
    tolerance: Tolerance,
) -> tuple[list[Frame], dict[str, Any]]:
    """The frames that have everything, and what is missing."""
    lacking = {what: [n for n in names if n not in there] for what, there in files.items()}
    without = {n for absent in lacking.values() for n in absent}
    facts: dict[str, Any] = {f"missing_{what}": len(absent) for what, absent in lacking.items()}
    facts["first_missing"] = sorted(without)[:_NAMED]
    if len(without) > tolerance.max_missing * len(names) or len(without) == len(names):
        lines = [f"{len(absent)} {what} below {folders[what].path}, such as "
                 f"{', '.join(n + folders[what].ending for n in absent[:_NAMED])}"
                 for what, absent in lacking.items() if absent]  # fmt: skip
        raise ArtefactMismatch(
            f"{kind}: of {len(names)} frames, {len(without)} are not complete: missing are "
            f"{'; '.join(lines)}. At most {tolerance.max_missing:g} of the set may be: complete "
            "it, name the frames that are there with `list`, or leave the others out with "
            f"max_missing. {tolerance.about_missing}".rstrip()
        )
    images, labels, weights = (files.get(what, {}) for what in ("images", "labels", "weights"))
    complete = [n for n in names if n not in without]
    frames = [Frame(n, images[n], labels.get(n), weights.get(n)) for n in complete]
    return frames, facts


def _of_one_size(
    kind: str, frames: Sequence[Frame], tolerance: Tolerance, fit: bool
) -> tuple[list[Frame], dict[str, Any]]:
    """The frames whose maps have their image's size (its shape, with `fit`), and all the sizes."""
    if not any(f.labels or f.weights for f in frames):
        return list(frames), {}
    with ThreadPoolExecutor(_READERS, thread_name_prefix="cada-headers") as pool:
        sizes = list(pool.map(_sizes, frames))
    agrees = _same_shape if fit else lambda a, b: a == b
    good = [all(agrees(s[0], other) for other in s[1:]) for s in sizes]
    odd = [f"{f.name}: image {_hw(s[0])}, {' and '.join(_hw(o) for o in s[1:])}"
           for f, s, fine in zip(frames, sizes, good) if not fine]  # fmt: skip
    if len(odd) > tolerance.max_mismatched or len(odd) == len(frames):
        raise ArtefactMismatch(
            f"{kind}: {len(odd)} of {len(frames)} frames have labels of another size (HxW) than "
            f"their image: {'; '.join(odd[:_NAMED])}{'; ...' if len(odd) > _NAMED else ''}. "
            f"At most {tolerance.max_mismatched} may (max_mismatched), and are left out. "
            f"{tolerance.about_mismatched}".rstrip()
        )
    kept = [f for f, fine in zip(frames, good) if fine]
    counts = Counter(_hw(s[0]) for s, fine in zip(sizes, good) if fine)
    return kept, {
        "mismatched": len(odd),
        "first_mismatched": odd[:_NAMED],
        "sizes": dict(counts.most_common(8)),
    }


def _sizes(frame: Frame) -> list[Size]:
    return [_size(f.path) for f in frame.files]


def _size(path: Path) -> Size:
    """(H, W) from the header."""
    with contextlib.suppress(OSError, ImageRejected):  # _read says what it is
        if path.is_file():  # a FIFO would keep us waiting
            with path.open("rb") as file:
                return peek_size(file.read(_HEADER_BYTES))
    return _read(path, peek_size)


def _same_shape(a: Size, b: Size) -> bool:
    """Heights to widths agree within 2 %: the same picture in another size."""
    return abs(a[0] * b[1] - a[1] * b[0]) <= 0.02 * a[0] * b[1]


# --- one file ---------------------------------------------------------------------------------


def _read(path: Path, how: Callable[[bytes], T]) -> T:
    try:
        return how(read_bytes(path))
    except ImageRejected as error:
        raise ArtefactMismatch(
            f"{path} cannot be read: {error}; get it again, or leave it out with `list`"
        ) from error


def _labels(path: Path, reading: Reading, size: Size) -> LabelMap:
    stored = _read(path, lambda data: reading.decode(data, str(path)))
    labels = reading.ids.to_train_ids(stored, str(path))
    if reading.fit and labels.shape != size:
        how = cv2.INTER_NEAREST_EXACT  # pixel centres, as Pillow; INTER_NEAREST shifts by a half
        labels = np.asarray(cv2.resize(labels, size[::-1], interpolation=how), np.uint8)
    return labels


def _confidence(data: bytes) -> npt.NDArray[np.float32]:
    """(H, W) 0..1 from a 16-bit grey PNG, as `cada-deploy pseudo-label` writes it."""
    found = examine(data)
    if found.format != "PNG" or {"grey", "sixteen-bit"} - set(found.notices):
        raise ImageRejected("unsupported-format", "expected a 16-bit grey PNG of confidences")
    stored = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if stored is None or stored.dtype != np.uint16 or stored.ndim != 2:
        raise ImageRejected("corrupt", "OpenCV cannot decode this 16-bit PNG")
    return stored.astype(np.float32) / np.float32(65535)


def _hw(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
