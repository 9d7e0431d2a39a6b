"""Find image files and give each its place in a run: a folder or a list in, sorted references out.

Names are bytes: whatever the file system holds can be an input. Nothing is opened but lists.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cada_deploy.errors import RunFailed, UsageError

SUFFIXES = (b".png", b".jpg", b".jpeg", b".bmp", b".tif", b".tiff", b".webp")


@dataclass(frozen=True)
class ImageRef:
    """An input by name. relative (bytes, '/' between parts) names the output and orders the run;
    size_bytes is 0 when the file cannot be looked at (read_bytes then says why)."""

    path: Path
    relative: bytes
    size_bytes: int


def find_images(source: Path) -> list[ImageRef]:
    """The images of a folder, a list file or one image file, sorted by the bytes of `relative`.

    A folder is read recursively. Names that end in one of SUFFIXES (in any case) count, whatever
    they are: a FIFO called a.png is refused later, not overlooked. Names with a leading dot, and
    everything below such a folder, are skipped. Links to files are followed. Links to folders are
    followed after the real folders, in order of their path, and each real folder is read once: a
    second way to it, a loop, or a link to a folder above `source` adds nothing.

    A list has one path a line, relative to the list's own folder (or absolute); blank lines and
    lines that begin with '#' are skipped; a suffix is not required; a missing entry becomes a
    rejection later. '..' and '/' at its front are left out of `relative`, so that no output can
    leave OUT. A name with a newline in it needs a folder.

    Raises UsageError when there is no such source or no image in it, RunFailed when a folder
    cannot be read (its images would silently be missing).
    """
    try:
        mode = source.stat().st_mode
    except (OSError, ValueError) as error:
        raise UsageError(f"no images: {shown(source)} cannot be opened ({error})") from error
    if stat.S_ISDIR(mode):
        refs = _from_folder(source)
    elif not stat.S_ISREG(mode):
        raise UsageError(f"{shown(source)} is neither a folder nor a list of paths")
    elif _is_image_name(os.fsencode(source.name)):
        refs = [ImageRef(source, os.fsencode(source.name), source.stat().st_size)]
    else:
        refs = _from_list(source)
    return sorted(refs, key=lambda ref: ref.relative)


def shown(path: Path | bytes) -> str:
    """A name for a message: one line, valid Unicode whatever the bytes are."""
    name = path if isinstance(path, bytes) else os.fsencode(path)
    return ascii(name.decode(errors="surrogateescape")) if not _printable(name) else name.decode()


def _printable(name: bytes) -> bool:
    try:
        return name.decode().isprintable()
    except UnicodeDecodeError:
        return False


def _is_image_name(name: bytes) -> bool:
    return name.lower().endswith(SUFFIXES)


def _from_folder(source: Path) -> list[ImageRef]:
    others: Counter[str] = Counter()
    refs = []
    for entry, relative in _files_below(os.fsencode(source)):
        if _is_image_name(relative):
            refs.append(ImageRef(Path(os.fsdecode(entry.path)), relative, _size_of(entry.path)))
        else:
            others[Path(os.fsdecode(entry.name)).suffix or "no suffix"] += 1
    if not refs:
        found = ", ".join(f"{n} x {kind!a}" for kind, n in others.most_common(5)) or "nothing"
        known = b" ".join(SUFFIXES).decode()
        raise UsageError(
            f"no image in folder {shown(source)}: found {found}; expected names ending in {known} "
            "(names with a leading dot are skipped)"
        )
    return refs


def _size_of(path: bytes) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - bytes in, so that any name works
    except OSError:
        return 0


def _files_below(root: bytes) -> Iterator[tuple[os.DirEntry[bytes], bytes]]:
    """(entry, relative path) of every visible file; see find_images for links."""
    seen = _ancestors(root)
    waiting = [(root, b"")]
    links: list[tuple[bytes, bytes]] = []
    while waiting or links:
        if not waiting:
            links.sort(key=lambda link: link[1], reverse=True)
            waiting.append(links.pop())
        folder, prefix = waiting.pop()
        identity, entries = _listed(folder)
        if prefix and identity in seen:
            continue
        seen.add(identity)
        for entry in entries:
            relative = prefix + entry.name
            if entry.name.startswith(b"."):
                continue
            if _is_folder(entry):
                to = links if entry.is_symlink() else waiting
                to.append((entry.path, relative + b"/"))
            else:
                yield entry, relative


def _ancestors(folder: bytes) -> set[tuple[int, int]]:
    """Device and inode of every folder above this one: a link to one of them is a loop."""
    above = Path(os.fsdecode(os.path.realpath(folder))).parents
    return {(s.st_dev, s.st_ino) for s in (p.stat() for p in above)}


def _listed(folder: bytes) -> tuple[tuple[int, int], list[os.DirEntry[bytes]]]:
    """Which real folder this is (device, inode), and what is in it."""
    try:
        here = os.stat(folder)  # noqa: PTH116
        with os.scandir(folder) as entries:
            return (here.st_dev, here.st_ino), list(entries)
    except OSError as error:
        raise RunFailed(
            f"cannot list folder {shown(folder)}: {error.strerror}; its images would be missing"
        ) from error


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _from_list(source: Path) -> list[ImageRef]:
    text = source.read_bytes()
    if b"\0" in text:
        raise UsageError(
            f"{shown(source)} holds NUL bytes: it is no list of paths (one a line), no folder and "
            "has no image suffix"
        )
    lines = text.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    names = [line.rstrip(b"\r") for line in lines]
    names = [name for name in names if name.strip() and not name.lstrip().startswith(b"#")]
    if not names:
        raise UsageError(
            f"no image in list {shown(source)}: {len(lines)} lines, all blank or comments"
        )
    folder = os.fsencode(source.parent)
    paths = [os.path.join(folder, name) for name in names]  # noqa: PTH118
    return [
        ImageRef(Path(os.fsdecode(path)), _inside(name), _size_of(path))
        for path, name in zip(paths, names)
    ]


def _inside(name: bytes) -> bytes:
    """The entry without '.', '..' and a leading '/': a relative path that stays where it is put."""
    parts = os.path.normpath(name).split(b"/")
    return b"/".join(part for part in parts if part not in (b"", b".", b"..")) or b"unnamed"


def output_stem(relative: bytes) -> bytes:
    """The relative path without its image suffix: b'a/b.PNG' -> b'a/b'. Other suffixes stay."""
    for suffix in SUFFIXES:
        if relative.lower().endswith(suffix):
            stem = relative[: -len(suffix)]
            return relative if stem == b"" or stem.endswith(b"/") else stem
    return relative


def check_output_names(refs: Sequence[ImageRef]) -> None:
    """Raises UsageError, naming both, when two inputs would write one output.

    Also when the output of one (a.png) is a folder that another one needs (a.png/b.png).
    """
    taken: dict[bytes, ImageRef] = {}
    for ref in refs:
        name = output_stem(ref.relative) + b".png"
        if name in taken:
            raise UsageError(
                f"{shown(taken[name].path)} and {shown(ref.path)} would both be written to "
                f"{shown(name)}; rename one, or give a list that names each once"
            )
        taken[name] = ref
    for ref in refs:
        for parent in _parents(ref.relative):
            if parent in taken:
                raise UsageError(
                    f"the output of {shown(taken[parent].path)} is the file {shown(parent)}, but "
                    f"{shown(ref.path)} needs a folder of that name; rename one"
                )


def _parents(relative: bytes) -> Iterator[bytes]:
    at = relative.rfind(b"/")
    while at > 0:
        yield relative[:at]
        at = relative.rfind(b"/", 0, at)


def check_out_not_inside(source: Path, out: Path) -> None:
    """Raises UsageError when OUT is the input folder or lies in it: labels would become inputs."""
    if not source.is_dir():
        return
    folder, target = source.resolve(), out.resolve()
    if target == folder or folder in target.parents:
        raise UsageError(
            f"OUT {shown(out)} lies inside the input folder {shown(source)}, and its labels "
            "would be taken for images the next time; give a folder outside it"
        )
