"""How well-known projects feed their networks, by name, and a model's spec from a TOML file.

Each preset states facts about a public project's preprocessing; no code was taken. Two families can
share every parameter name (CRST and BDL do), so a preset is chosen by a person, never guessed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cada_deploy.classes import ClassSet, class_set
from cada_deploy.errors import UsageError, nearest
from cada_deploy.model_spec import SCHEMA, InputSpec, ModelSpec, OutputSpec

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover - Python 3.10
    import tomli as tomllib

# ImageNet statistics in RGB order, for values in 0..1 (torchvision.transforms' documentation).
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

_IMAGENET_RGB = InputSpec(
    colour="RGB", scale=1 / 255, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, resize="bilinear"
)
_CAFFE_BGR = InputSpec(
    colour="BGR",
    scale=1.0,
    mean=(104.00698793, 116.66876762, 122.67891434),
    std=(1.0, 1.0, 1.0),
    resize="bicubic",
)

# imagenet-rgb: torchvision, mmsegmentation, SegFormer, DAFormer and most others.
# caffe-bgr:    AdaptSegNet, ADVENT, CLAN, FDA, MaxSquare, IntraDA, ESL (IMG_MEAN in their train
#               scripts; PIL BICUBIC; nn.Upsample(..., align_corners=True) on logits).
# bdl:          the same input; BDL takes the softmax at (h, w) and upsamples probabilities.
# crst:         yzou2/CRST, read at commit 5aed694: crst_seg.py and evaluate.py state IMG_MEAN
#               (0.406, 0.456, 0.485) and IMG_STD (0.225, 0.224, 0.229), both marked BGR;
#               deeplab/datasets.py subtracts and divides while the image is still OpenCV's BGR and
#               only then turns the channels. So red meets 0.485 and 0.229: written in RGB order
#               these are ImageNet's own numbers, not swapped ones. cv2 INTER_LINEAR,
#               nn.Upsample(align_corners=True) on logits, then the softmax. (Its tests also average
#               the scales 0.9, 1.0, 1.2: state that under [inference] when you want it.)
PRESETS: Mapping[str, tuple[InputSpec, OutputSpec]] = {
    "imagenet-rgb": (_IMAGENET_RGB, OutputSpec(align_corners=False, order="logits")),
    "caffe-bgr": (_CAFFE_BGR, OutputSpec(align_corners=True, order="logits")),
    "bdl": (_CAFFE_BGR, OutputSpec(align_corners=True, order="probs")),
    "crst": (_IMAGENET_RGB, OutputSpec(align_corners=True, order="logits")),
}


def preset(name: str) -> tuple[InputSpec, OutputSpec]:
    """The input and output of a preset. Raises UsageError with the nearest known name."""
    if name not in PRESETS:
        raise UsageError(f"no preset is called {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]


def load_spec(path: Path, classes: ClassSet | None = None) -> ModelSpec:
    """The spec of `--spec FILE.toml`; `classes` (--classes) replaces the file's own class set.

    Raises UsageError, naming the file, for an unreadable file, an unknown key or a bad value.
    """
    data = spec_from_toml(path)
    if classes is not None:
        data["classes"] = classes.to_json()
    elif "classes" not in data:
        raise UsageError(
            f'{path} names no classes: add [classes] with set = "cityscapes-19", or names, '
            "label_ids and palette; or give --classes"
        )
    try:
        return ModelSpec.from_json(data)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def spec_from_toml(path: Path) -> dict[str, Any]:
    """A TOML file as the JSON object that ModelSpec.from_json reads, preset and set names resolved.

    Tables: classes (`set` or names, label_ids, palette), input, output, inference. `preset` at the
    top is the base that input and output override key by key. "classes" is missing from the result
    when the file has none. Raises UsageError; unknown keys are left for ModelSpec to name.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read the spec {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"the spec {path} is not TOML: {error}") from error
    try:
        return _resolved(tables, f"--spec {path.name}")
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


_TABLES = {"classes", "input", "output", "inference"}


def _resolved(tables: dict[str, Any], origin: str) -> dict[str, Any]:
    known = _TABLES | {"preset"}
    for key, value in tables.items():
        if key not in known:
            raise UsageError(f"unknown key {key!r}; {nearest(key, known)}")
        if key in _TABLES and not isinstance(value, dict):
            raise UsageError(f"{key} is {value!r}; expected a table: [{key}]")
    name = tables.get("preset", "")
    if not isinstance(name, str):
        raise UsageError(f"preset is {name!r}; {nearest(str(name), PRESETS)}")
    base = {"input": vars(preset(name)[0]), "output": vars(preset(name)[1])} if name else {}
    data: dict[str, Any] = {"schema": SCHEMA, "preset": name, "provenance": {"spec": origin}}
    for table in ("input", "output"):
        data[table] = dict(base.get(table, {})) | tables.get(table, {})
    data["inference"] = tables.get("inference", {})
    _checked(data)
    if "classes" in tables:
        data["classes"] = _classes(tables["classes"])
    return data


# What a number in the file must be; the specs themselves check ranges, not kinds.
_KINDS: Mapping[str, tuple[type, ...]] = {
    "scale": (int, float), "mean": (int, float), "std": (int, float), "scales": (int, float),
    "size": (int,), "window": (int,), "stride": (int,),
    "colour": (str,), "layout": (str,), "dtype": (str,), "resize": (str,), "name": (str,),
    "order": (str,), "meaning": (str,), "mode": (str,),
    "align_corners": (bool,), "flip": (bool,),
}  # fmt: skip
_LENGTHS = {"mean": 3, "std": 3, "size": 2, "window": 2}


def _checked(data: Mapping[str, Any]) -> None:
    """Raises UsageError for a value of another kind than its key has, before anything uses it."""
    for table in ("input", "output", "inference"):
        for key, value in data[table].items():
            if key not in _KINDS:
                continue
            length = 2 if (table, key) == ("inference", "stride") else _LENGTHS.get(key)
            if value is not None and not _fits(value, _KINDS[key], length, key == "scales"):
                wanted = " or ".join(kind.__name__ for kind in _KINDS[key])
                many = f"{length} x " if length else "a list of " if key == "scales" else ""
                raise UsageError(f"{table}.{key} is {value!r}; expected {many}{wanted}")


def _fits(value: Any, kinds: tuple[type, ...], length: int | None, any_length: bool) -> bool:
    several = isinstance(value, (list, tuple))
    if several != (any_length or length is not None) or (length and len(value) != length):
        return False
    parts = value if several else (value,)
    # bool is an int to Python, and `scale = true` must not become 1.
    return all(isinstance(p, kinds) and isinstance(p, bool) == (bool in kinds) for p in parts)


def _classes(table: Mapping[str, Any]) -> dict[str, Any]:
    """[classes] as ClassSet.from_json reads it: a set's name, or the lists themselves."""
    own = {"name", "names", "label_ids", "palette", "ignore_id"}
    for key in table:
        if key not in own | {"set"}:
            raise UsageError(f"classes has an unknown key {key!r}; {nearest(key, own | {'set'})}")
    if "set" in table:
        if len(table) > 1:
            raise UsageError("classes.set names a built-in set; leave out the other keys")
        return class_set(str(table["set"])).to_json()
    for key in ("names", "label_ids", "palette"):
        if not isinstance(table.get(key), list):
            raise UsageError(f"classes.{key} is {table.get(key)!r}; expected a list")
    return {"name": "own", **table}


def spec_template() -> str:
    """A commented TOML to fill in, shown when a foreign model comes without preset or spec.

    It is a valid spec as it stands.
    """
    return _TEMPLATE


_TEMPLATE = """\
# How this model wants to be fed and read. Look it up in the code that trained it; do not guess.
# preset = "imagenet-rgb"          # a base; the tables below then need only what differs

[classes]
set = "cityscapes-19"              # or "camvid-11", or your own three lists:
# names = ["road", "car"]
# label_ids = [7, 26]              # the data set's own ids
# palette = [[128, 64, 128], [0, 0, 142]]

[input]                            # x = (scale * v - mean) / std, v = 0..255
colour = "RGB"                     # or "BGR"; mean and std are in this order
scale = 0.00392156862745098        # 1/255, or 1.0 when mean and std are for 0..255
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
resize = "bilinear"                # OpenCV's; or "bicubic", Pillow's with antialiasing
layout = "NCHW"                    # or "NHWC"
dtype = "float32"                  # or "float16"
# size = [1024, 2048]              # height, width of a fixed-size model; leave out if dynamic
# name = "input"                   # needed only when the model has several inputs

[output]
meaning = "logits"                 # or "probabilities" (after the softmax)
align_corners = false              # of the bilinear upsampling to full size
order = "logits"                   # upsample, then softmax; "probs": softmax, then upsample
# stride = 8                       # input pixels per score
# name = "logits"                  # needed only when the model has several outputs

# [inference]
# mode = "slide"                   # with window and stride; default "whole"
# window = [512, 512]
# stride = [341, 341]
# scales = [1.0]
# flip = false
"""
