"""Writes down what an importable TensorRT binding has: api.json, and type stubs for mypy.

    python describe.py FOLDER    with the bindings on PYTHONPATH

pybind11 states the signature of every function in its docstring. What cannot be read there becomes
Any; docstrings themselves are not kept.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)(\(.*\))(?: -> (.+))?$")
_KNOWN = {
    "int", "float", "str", "bytes", "bool", "list", "tuple", "dict", "set", "None", "object",
    "Any", "Callable", "Sequence", "Iterable", "Buffer",
}  # fmt: skip
# Where the C++ name shows through, and is not the Python one; what takes an int is held to ints.
_RENAMED = {
    "IParserError": "ParserError",
    "IBuilder": "Builder",
    "IRuntime": "Runtime",
    "IParser": "OnnxParser",
    "buffer": "Buffer",
    "capsule": "object",
    "function": "object",
    "SupportsInt": "int",
    "SupportsFloat": "float",
    "List": "list",
    "Tuple": "tuple",
    "Dict": "dict",
    "Set": "set",
}
_HEAD = """\
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

from typing_extensions import Buffer

__version__: str
"""


def is_enum(thing: type) -> bool:
    return hasattr(thing, "__members__")


def classes(module: types.ModuleType) -> dict[str, type]:
    found = {n: v for n, v in vars(module).items() if isinstance(v, type) and n[0] != "_"}
    return dict(sorted(found.items()))


def api(thing: type) -> dict[str, Any]:
    """Names with their kinds; an enum's with their values."""
    if is_enum(thing):
        return {"enum": {name: int(value) for name, value in thing.__members__.items()}}  # type: ignore[attr-defined]
    named = {n: v for n, v in inherited(thing).items() if not n.startswith("_")}
    return {
        "methods": sorted(n for n, v in named.items() if callable(v) and not isinstance(v, type)),
        "properties": sorted(n for n, v in named.items() if isinstance(v, property)),
        "nested": {n: api(v) for n, v in named.items() if isinstance(v, type)},
    }


def inherited(thing: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for base in reversed(thing.__mro__):
        if base is not object and not base.__name__.startswith("pybind11"):
            found |= vars(base)
    return found


# --- type stubs --------------------------------------------------------------------------------


class Stubs:
    def __init__(self, module: types.ModuleType) -> None:
        self._classes = classes(module)
        nested = {n for c in self._classes.values() for n, v in vars(c).items()
                  if isinstance(v, type)}  # fmt: skip
        self._known = {*self._classes, *nested, *_KNOWN}

    def text(self) -> str:
        ordered = sorted(self._classes.items(), key=lambda item: len(item[1].__mro__))
        return _HEAD + "\n".join("\n".join(self._class(n, c, "")) for n, c in ordered) + "\n"

    def _class(self, name: str, thing: type, indent: str) -> Iterator[str]:
        bases = [b.__name__ for b in thing.__bases__ if b.__name__ in self._classes]
        yield f"{indent}class {name}({', '.join(bases)}):"
        inner = indent + "    "
        if is_enum(thing):
            yield from (f"{inner}{member}: {name}" for member in thing.__members__)  # type: ignore[attr-defined]
            yield f"{inner}name: str"
            yield f"{inner}def __int__(self) -> int: ..."
            return
        yield f"{inner}__hash__ = object.__hash__"
        if name == "IHostMemory":  # a buffer, which a docstring does not say
            yield f"{inner}def __buffer__(self, flags: int, /) -> memoryview: ..."
        if name == "Dims":
            yield f"{inner}def __iter__(self) -> Any: ..."
        for member, value in vars(thing).items():
            yield from self._member(member, value, thing, inner)

    def _member(self, name: str, value: Any, thing: type, indent: str) -> Iterator[str]:
        special = ("__init__", "__len__", "__getitem__", "__setitem__")
        if name.startswith("_") and name not in special:
            return
        if isinstance(value, type):
            yield from self._class(name, value, indent)
        elif isinstance(value, property):
            yield from self._property(name, value, indent)
        elif callable(getattr(thing, name)):
            yield from self._function(name, getattr(thing, name).__doc__ or "", indent)
        else:
            yield f"{indent}{name}: {type(value).__name__ if is_enum(type(value)) else 'Any'}"

    def _property(self, name: str, value: property, indent: str) -> Iterator[str]:
        found = re.search(r"-> (.+)", value.fget.__doc__ or "")
        kind = self._type(found.group(1)) if found else "Any"
        yield f"{indent}@property"
        yield f"{indent}def {name}(self) -> {kind}: ..."
        if value.fset is not None:
            yield f"{indent}@{name}.setter"
            yield f"{indent}def {name}(self, value: {kind}) -> None: ..."

    def _function(self, name: str, doc: str, indent: str) -> Iterator[str]:
        matches = (_SIGNATURE.match(line.strip()) for line in doc.splitlines())
        found = [m for m in matches if m and m.group(1) == name and "*args" not in m.group(2)]
        if not found:
            result = "None" if name == "__init__" else "Any"
            yield f"{indent}def {name}(self, *args: Any, **kwargs: Any) -> {result}: ..."
        for match in found:
            if len(found) > 1:
                yield f"{indent}@overload"
            result = "None" if name == "__init__" else self._type(match.group(3) or "Any")
            arguments = self._arguments(match.group(2))
            yield f"{indent}def {name}(self{arguments}) -> {result}: ..."

    def _arguments(self, text: str) -> str:
        """Everything after self. A default is only known to be there."""
        text = re.sub(r"<[^<>]*>", "...", _plain(text))
        try:
            (function,) = ast.parse(f"def f{text}: ...").body
        except SyntaxError:
            return ", *args: Any, **kwargs: Any"
        assert isinstance(function, ast.FunctionDef)
        given = function.args.args
        plain = len(given) - len(function.args.defaults)
        defaults = [None] * plain + [ast.unparse(d) for d in function.args.defaults]
        parts = []
        for argument, default in list(zip(given, defaults))[1:]:
            kind = self._type(ast.unparse(argument.annotation)) if argument.annotation else "Any"
            optional = " | None" if default == "None" else ""
            ending = "" if default is None else " = ..."
            parts.append(f", {argument.arg}: {kind}{optional}{ending}")
        return "".join(parts)

    def _type(self, text: str) -> str:
        """A type with every name that is not known as Any."""
        try:
            tree = ast.parse(_plain(text), mode="eval")
        except SyntaxError:
            return "Any"
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                node.id = _RENAMED.get(node.id, node.id)
                if node.id not in self._known:
                    node.id = "Any"
        return ast.unparse(tree)


def _plain(text: str) -> str:
    """`tensorrt_bindings.tensorrt.ILogger.Severity` -> `ILogger.Severity`, no C++ scopes."""
    text = re.sub(r"(?:nvinfer1|nvonnxparser)::(?:v_\d+_\d+::)?", "", text)
    return re.sub(
        r"\b(?:tensorrt_bindings|tensorrt|typing|typing_extensions|collections\.abc)\.", "", text
    )


def main(folder: Path) -> None:
    module = importlib.import_module("tensorrt_bindings.tensorrt")
    whole = importlib.import_module("tensorrt_bindings")
    described = {
        "version": whole.__version__,
        "classes": {name: api(thing) for name, thing in classes(module).items()},
    }
    (folder / "api.json").write_text(json.dumps(described, indent=1, sort_keys=True))
    types_folder = folder / "types" / "tensorrt"
    types_folder.mkdir(parents=True, exist_ok=True)
    (types_folder / "__init__.pyi").write_text(Stubs(module).text())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
