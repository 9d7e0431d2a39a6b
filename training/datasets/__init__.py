"""The contract of a data set of training: frames by number, with train ids. One file per kind.

A file has KIND (its name in a recipe) and `open(**options) -> DataSet`, whose keyword arguments are
the keys that a recipe's table may have. Kinds are found by listing this folder. Nothing is cropped,
resized or normalised here: that is the trainer's.
"""

from __future__ import annotations

import inspect
import os
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Any, Protocol, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt

from cada_deploy.classes import ClassSet
from cada_deploy.errors import UsageError, nearest


@dataclass(frozen=True, eq=False)
class Sample:
    """One frame. All maps have the image's height and width.

    weights count a pixel's share of the loss (1 where None): the confidence of a pseudo label.
    """

    name: str
    image: npt.NDArray[np.uint8]  # (H, W, 3) RGB
    labels: npt.NDArray[np.uint8] | None = None  # (H, W) train ids, 255 = ignored; None: unlabelled
    weights: npt.NDArray[np.float32] | None = None  # (H, W)


class DataSet(Protocol):
    """Frames by number, in the order of their names, whatever order a list file has.

    A set whose images are files also has `image_paths`, one path a frame. Safe to read from many
    threads at once. Reading raises ArtefactMismatch for a file that cannot be what it should be.
    """

    @property
    def kind(self) -> str: ...

    @property
    def classes(self) -> ClassSet: ...

    @property
    def labelled(self) -> bool: ...

    @property
    def names(self) -> tuple[str, ...]:
        """Of the frames: relative paths without suffix. Equal for one frame in every split and
        with and without labels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> Sample: ...

    def fingerprint(self) -> str:
        """SHA-256 over how files are read, the sorted names and the sizes in bytes of everything
        that is read: cheap. It changes with every file that is added, taken away or resized, not
        with where the set lies, and not with a change that leaves the size of a file as it was."""
        ...

    def facts(self) -> dict[str, Any]:
        """What was found, counted, as plain values for a report."""
        ...


@cache
def kinds() -> dict[str, ModuleType]:
    """Every kind of data set by its name in recipes, read from the folder."""
    modules = [import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return {module.KIND: module for module in modules}


def open_dataset(table: Mapping[str, Any]) -> DataSet:
    """The data set that a recipe's table describes: `{kind = "gta5", root = "~/gta5"}`.

    Raises UsageError for an unknown kind or key (with the nearest name), a value of another type
    and a folder of another layout, ArtefactMismatch when files are missing or do not fit.
    """
    options = dict(table)
    kind = options.pop("kind", None)
    if not isinstance(kind, str):
        raise UsageError(f"a data set's table needs kind = NAME; {nearest('', kinds())}")
    if kind not in kinds():
        raise UsageError(f"no kind of data set is called {kind!r}; {nearest(kind, kinds())}")
    opener = kinds()[kind].open
    known = inspect.signature(opener).parameters
    hints = get_type_hints(opener)
    for key, value in options.items():
        if key not in known:
            raise UsageError(f"data set {kind}: unknown key {key!r}; {nearest(key, known)}")
        options[key] = _value(value, hints[key], f"data set {kind}: {key}")
    for key, parameter in known.items():
        if parameter.default is parameter.empty and key not in options:
            raise UsageError(f"data set {kind}: key {key!r} is missing; {nearest('', known)}")
    opened: DataSet = opener(**options)
    return opened


_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


def _value(value: Any, hint: Any, where: str) -> Any:
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if not isinstance(value, list | tuple) or len(value) != len(inner):
            raise UsageError(f"{where} is {value!r}; expected a list of {len(inner)}")
        return tuple(_value(v, h, where) for v, h in zip(value, inner))
    if get_origin(hint) is UnionType:  # Path | None: a table has no None
        (hint,) = set(get_args(hint)) - {NoneType}
    if hint is Path:
        return value if isinstance(value, Path) else _path(_value(value, str, where), where)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UsageError(f"{where} is {value!r}; expected {_WORDS[hint]}")
    return value


def _path(value: str, where: str) -> Path:
    """With ~ and environment variables put in, so that a recipe can name $GTA5."""
    expanded = os.path.expandvars(value)
    if "$" in expanded:
        raise UsageError(f"{where} is {value!r}, and that variable is not set; export it")
    return Path(expanded).expanduser()
