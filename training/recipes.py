"""A recipe: everything that decides a training, read from TOML into frozen values.

An unknown key is an error that names the nearest one. What a stage does follows from its weights:
supervised training on the source is Eq. 5 with the two adversarial terms at 0; self-training is
Eq. 5 with the self-supervised term of Eq. 6 added.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cada_deploy.errors import UsageError, nearest

from .batch_norm import POLICIES
from .losses import DIRECTIONS, Weights
from .schedules import SMALL, DiscriminatorPlan, NetworkPlan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STYLES = ("none", "adversarial", "gram", "mean-std")
NETWORKS = ("small", "deeplabv2-resnet101")
UPSAMPLING = ("half-pixel", "align-corners")
SNAPSHOTS = ("last", "best-source", "best-target")
PRECISIONS = ("float32", "bfloat16", "float16")
Table = Mapping[str, Any]


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"{key} is {value!r}; {nearest(value, known)}")


@dataclass(frozen=True)
class NetworkChoice:
    """kind, and where its weights come from. batch_norm: a policy of batch_norm.POLICIES; where it
    trains, each domain's batches are normalised by themselves. upsampling: of scores to the labels'
    size. output_stride: of the output discriminator, 16 or BDL's 32; output_shrink: it sees maps
    that are so many times smaller than the crop (1 in the paper; larger is for slow machines)."""

    kind: str = "small"
    weights: str = ""  # a local file with an ImageNet backbone; empty: from nothing
    batch_norm: str = "train"
    upsampling: str = "half-pixel"
    aspp_branches: int = 4
    output_stride: int = 16
    output_shrink: int = 1

    def __post_init__(self) -> None:
        _one_of("network.kind", self.kind, NETWORKS)
        _one_of("network.batch_norm", self.batch_norm, tuple(POLICIES))
        _one_of("network.upsampling", self.upsampling, UPSAMPLING)
        if self.output_stride not in (16, 32) or self.output_shrink < 1:
            raise UsageError(
                f"network.output_stride is {self.output_stride}, output_shrink "
                f"{self.output_shrink}; expected 16 or 32, and at least 1"
            )


@dataclass(frozen=True)
class Augmentation:
    """Of a training crop. Ranges are drawn from uniformly; 0 and (1, 1) change nothing."""

    scale: tuple[float, float] = (1.0, 1.0)
    mirror: bool = True
    contrast: float = 0.0  # +- about 1
    brightness: float = 0.0  # +- of 0..255
    tint: float = 0.0  # +- about 1, each channel
    gamma: tuple[float, float] = (1.0, 1.0)
    grey: float = 0.0  # share of crops that lose half of their colour
    blur: float = 0.0  # share of crops, sigma up to 1.2 pixels
    noise: float = 0.0  # largest standard deviation, of 0..255


@dataclass(frozen=True)
class Stage:
    """One training. What it does follows from its weights: the lambdas of Eq. 5, and Eq. 6's."""

    steps: int
    weights: Weights = Weights(1.0, 0.0, 0.0, 0.0)
    style_kind: str = "adversarial"
    style_direction: str = "target"
    poly_steps: int = 0  # 0: its own steps; the paper has 250,000
    learning_rate_factor: float = 1.0
    reestimate: bool = False  # batch norm statistics on the target at the end
    strong_target: bool = True  # pseudo-labelled crops are relit as the source's are
    snapshot: str = "last"  # or `best-source`: the checkpoint with the best mIoU on `validation`;
    # `best-target` looks at target labels, which an adaptation must not, and is said aloud

    def __post_init__(self) -> None:
        _one_of("style_kind", self.style_kind, STYLES)
        _one_of("style_direction", self.style_direction, DIRECTIONS)
        _one_of("snapshot", self.snapshot, SNAPSHOTS)
        if self.steps < 1:
            raise UsageError(f"a stage of {self.steps} steps; expected at least 1")

    @property
    def styles(self) -> bool:
        return self.weights.style > 0 and self.style_kind != "none"

    @property
    def uses_target(self) -> bool:
        return self.weights.output > 0 or self.styles


@dataclass(frozen=True)
class SelfTraining:
    """Rounds of labelling with `cada-deploy pseudo-label` and training on what it wrote."""

    rounds: int = 2
    policy: str = "category-adaptive"  # or `fixed`, at the coverage that the other one has
    delta: str = "0"  # as --delta takes it
    start: str = "initial"  # each round begins with the weights before the first, or `continue`
    soft_weights: bool = False  # a pixel counts by its confidence

    def __post_init__(self) -> None:
        _one_of("self_training.start", self.start, ("initial", "continue"))
        _one_of("self_training.policy", self.policy, ("category-adaptive", "fixed"))


@dataclass(frozen=True)
class Recipe:
    """source, target, ...: tables for datasets.open_dataset. validation is of the source domain and
    chooses nothing unless snapshots are asked for; evaluation is only ever reported."""

    name: str
    source: Table
    target: Table
    evaluation: Table
    validation: Table
    stages: Mapping[str, Stage]
    upper_bound: Table = field(default_factory=dict)  # labelled target data, for the gap
    network: NetworkChoice = NetworkChoice()
    augmentation: Augmentation = Augmentation()
    optimiser: NetworkPlan = SMALL
    discriminators: DiscriminatorPlan = DiscriminatorPlan()
    self_training: SelfTraining = SelfTraining()
    classes: str = "cityscapes-19"
    seed: int = 1
    batch: int = 4
    accumulate: int = 1  # batches whose gradients are added up before a step
    # (H, W). Images are resized to image_size first, 0 being their own; the target's are the
    # source's where they are not given.
    crop: tuple[int, int] = (256, 256)
    image_size: tuple[int, int] = (0, 0)
    target_crop: tuple[int, int] = (0, 0)
    target_image_size: tuple[int, int] = (0, 0)
    precision: str = "float32"
    save_every: int = 200

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        if min(self.batch, self.accumulate, self.save_every) < 1 or min(self.crop) < 16:
            raise UsageError(
                f"batch {self.batch}, accumulate {self.accumulate}, save_every {self.save_every}, "
                f"crop {self.crop}: expected at least 1, and crops of 16 pixels a side"
            )

    @property
    def target_sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(image size, crop) of the target's images."""
        own = self.target_image_size, self.target_crop
        given = self.image_size, self.crop
        return tuple(o if o[0] else g for o, g in zip(own, given))  # type: ignore[return-value]

    def stage(self, name: str) -> Stage:
        if name not in self.stages:
            raise UsageError(
                f"recipe {self.name} has no stage {name!r}; {nearest(name, self.stages)}"
            )
        return self.stages[name]


SHIPPED = Path(__file__).parent / "recipe_files"


def read_recipe(given: str | Path, data: Path = Path("data"), **changes: Any) -> Recipe:
    """A TOML file, or the name of a recipe that comes with the package. `{data}` in it stands for
    the folder of the data sets; `changes` replace top-level values. Raises UsageError for anything
    that is not a recipe, with the key and what is known."""
    path = Path(given)
    if not path.suffix:
        known = [p.stem for p in SHIPPED.glob("*.toml")]
        path = SHIPPED / f"{given}.toml"
        if not path.exists():
            raise UsageError(f"no recipe is called {str(given)!r}; {nearest(str(given), known)}")
    try:
        text = path.read_text(encoding="utf-8").replace("{data}", data.as_posix())
        table = tomllib.loads(text)
    except FileNotFoundError:
        raise UsageError(f"no recipe at {path}; expected a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    table.setdefault("name", path.stem)
    return recipe_from(table | changes, str(path))


def recipe_from(table: Table, where: str = "recipe") -> Recipe:
    """Raises UsageError."""
    made: Recipe = _made(Recipe, table, where)
    return made


def to_json(recipe: Recipe) -> dict[str, Any]:
    """Plain values, for checkpoints and tables."""
    return dataclasses.asdict(recipe)


def _made(kind: Any, table: Table, where: str) -> Any:
    hints = typing.get_type_hints(kind)
    unknown = [key for key in table if key not in hints]
    if unknown:
        raise UsageError(f"{where}: unknown key {unknown[0]!r}; {nearest(unknown[0], hints)}")
    values = {k: _value(hints[k], v, f"{where}: {k}") for k, v in table.items()}
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(f"{where}: {missing[0]!r} is missing")
    return kind(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _made(hint, _table(value, where), where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(arguments):
            raise UsageError(f"{where} is {value!r}; expected {len(arguments)} values")
        return tuple(_value(h, v, where) for h, v in zip(arguments, value))
    if origin is not None and issubclass(origin, Mapping):
        table = _table(value, where)
        if dataclasses.is_dataclass(arguments[1]):
            return {
                k: _made(arguments[1], _table(v, where), f"{where}.{k}") for k, v in table.items()
            }
        return dict(table)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    assert not isinstance(hint, types.UnionType)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UsageError(f"{where} is {value!r}; expected {hint.__name__}")
    return value


def _table(value: Any, where: str) -> Table:
    if not isinstance(value, Mapping):
        raise UsageError(f"{where} is {value!r}; expected a table")
    return value
