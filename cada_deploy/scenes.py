"""Procedural street scenes: the same street in daylight (SOURCE) and in a rainy dusk (TARGET).

A scene has exact labels for all 19 Cityscapes categories and no unlabelled pixel, and both styles
of one seed have the same labels. It stands in for data that nobody may redistribute: the demo, the
tests and the benchmarks use it. It does not imitate any real city, and a figure measured on it
says nothing about one.

The bytes are the same on every machine and under every NumPy and OpenCV release: all draws are
integers from PCG64's raw stream (which NumPy freezes; `Generator` methods it does not), all
geometry and all colours are integer arithmetic, and shapes are filled here and not by OpenCV,
whose rasteriser may change. OpenCV only packs the PNG files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from cada_deploy.classes import CITYSCAPES_19
from cada_deploy.errors import RunFailed, UsageError, nearest

SOURCE = "source"
TARGET = "target"

Ints = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
Inside = Callable[[Ints, Ints], npt.NDArray[np.bool_]]  # (u_cm, v_cm) on a face -> painted here?
Detail = tuple[Inside, int]  # where on the face, which paint
Span = tuple[int, int]  # centimetres, from and to

(ROAD, SIDEWALK, BUILDING, WALL, FENCE, POLE, LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER,
 CAR, TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE) = range(len(CITYSCAPES_19))  # fmt: skip


class Scene(NamedTuple):
    image: Bytes  # (H, W, 3) RGB
    labels: Bytes  # (H, W) train ids 0..18


def scene(seed: int, style: str, size: tuple[int, int] = (256, 512)) -> Scene:
    """The street number `seed` in that style; size is (height, width) in pixels.

    The street is laid out in fractions of the height: another size shows the same street.
    """
    if style not in _STYLES:
        raise UsageError(f"no scene style is called {style!r}; {nearest(style, _STYLES)}")
    if seed < 0 or len(size) != 2 or any(not 1 <= s <= 8192 for s in size):
        raise UsageError(f"scene seed {seed}, size {size}: the seed is >= 0, sides are 1 to 8192")
    canvas = _street(_Dice(seed, 0), size)
    return Scene(_STYLES[style](canvas, _Dice(seed, 1 + list(_STYLES).index(style))), canvas.labels)


# --- frozen sets -------------------------------------------------------------------------------


@dataclass(frozen=True)
class SceneSet:
    """`count` scenes of one style from `first_seed` on. sha256 is `digest` of the whole set."""

    name: str
    style: str
    first_seed: int
    count: int
    size: tuple[int, int] = (256, 512)
    sha256: str = ""

    def __iter__(self) -> Iterator[Scene]:
        return (scene(s, self.style, self.size) for s in self.seeds)

    def __len__(self) -> int:
        return self.count

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.count)


# Frozen before anything was trained on them; no street is in two sets. A change of a single byte of
# any scene is a new set under a new name, never a new digest under an old one.
SOURCE_TRAIN = SceneSet(
    "scenes19-source-train-1",
    SOURCE,
    0,
    600,
    sha256="98909749164c786129c34a73b6d835461301f58118e56d33acd1049219d0df38",
)
SOURCE_VAL = SceneSet(
    "scenes19-source-val-1",
    SOURCE,
    10_000,
    48,
    sha256="1714100fc8311cbce532e13e5373f3491378a1bbf126066ee15e575c716e3710",
)
TARGET_TRAIN = SceneSet(
    "scenes19-target-train-1",
    TARGET,
    20_000,
    400,
    sha256="aafef86d696e81cadff7a6fbf768844bad71f6cbe9c2a380aa18e67614bc9bd2",
)
TARGET_DEV = SceneSet(
    "scenes19-target-dev-1",
    TARGET,
    30_000,
    48,
    sha256="87aaa88d5caad4a100df568c7fde0c21ea249d3f74f912a2ca622f7443017453",
)
TARGET_DEMO = SceneSet(
    "scenes19-target-demo-1",
    TARGET,
    40_000,
    48,
    sha256="fbdc539b5be31530be3494d1f734b7bfc99645c31d4cdef03d6756a67e1406e7",
)


def frames(scene_set: SceneSet) -> Iterator[tuple[str, Bytes]]:
    """(name, image) of each scene, without its labels: what an unlabelled target set offers."""
    for seed in scene_set.seeds:
        yield _stem(scene_set, seed), scene(seed, scene_set.style, scene_set.size).image


def digest(scene_set: SceneSet) -> str:
    """SHA-256 over every image and label array, in seed order."""
    running = hashlib.sha256()
    for image, labels in scene_set:
        running.update(image.tobytes())
        running.update(labels.tobytes())
    return running.hexdigest()


def write_set(
    folder: Path, scene_set: SceneSet, progress: Callable[[int, int], None] | None = None
) -> None:
    """Writes folder/images/<name>.png and folder/labels/<name>.png, lossless.

    progress is called with (done, count) after each scene.
    """
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for done, (seed, (image, labels)) in enumerate(zip(scene_set.seeds, scene_set), start=1):
        name = f"{_stem(scene_set, seed)}.png"
        _write_png(folder / "images" / name, np.ascontiguousarray(image[..., ::-1]))
        _write_png(folder / "labels" / name, labels)
        if progress:
            progress(done, scene_set.count)


def _stem(scene_set: SceneSet, seed: int) -> str:
    return f"{scene_set.style}_{seed:06d}"


def _write_png(path: Path, pixels: Bytes) -> None:
    done, packed = cv2.imencode(".png", pixels)
    if not done:
        raise RunFailed(f"OpenCV could not pack {path.name} as PNG; is this build without PNG?")
    path.write_bytes(packed.tobytes())


# --- chance ------------------------------------------------------------------------------------


class _Dice:
    """Integers from PCG64's raw stream: the same on every machine and NumPy release."""

    def __init__(self, *key: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def below(self, count: int) -> int:
        return ((int(self._bits.random_raw()) >> 32) * count) >> 32

    def between(self, low: int, high: int) -> int:
        """low <= n < high"""
        return low + self.below(high - low)

    def percent(self, chance: int) -> bool:
        return self.below(100) < chance

    def bytes(self, *shape: int) -> Bytes:
        count = int(np.prod(shape))
        words = self._bits.random_raw(-(-count // 8)).astype("<u8")
        return words.view(np.uint8)[:count].reshape(shape)


# --- the canvas --------------------------------------------------------------------------------

# Lengths on the picture are in units of 1/16384 of its height, lengths in the street in cm; both
# are integers. A focal length of 1.1 heights sees 49 degrees from top to bottom.
_UNITS = 1 << 14
_FOCAL = 18_000
_EYE_CM = 150
_NEAR_CM = 120


class _Paint(NamedTuple):
    material: str
    tone: int  # 0..255 chooses among the material's colours
    shade: int  # percent of the light that this face gets


class _Canvas:
    """Three maps that the street is painted into, near over far: category, paint and depth.

    A paint is a row of `paints`, not yet a colour: the style turns it into one. The eye stands at
    X = 0 and height _EYE_CM, looks along Z, and the vanishing point lies at (centre, horizon).
    """

    def __init__(self, size: tuple[int, int], horizon: int, yaw: int) -> None:
        height, width = size
        self.px: Ints = ((2 * np.arange(width, dtype=np.int64) + 1) * _UNITS) // (2 * height)
        self.py: Ints = ((2 * np.arange(height, dtype=np.int64) + 1) * _UNITS) // (2 * height)
        self.horizon = horizon
        self.centre = (width * _UNITS) // (2 * height) + yaw
        self.labels: Bytes = np.full(size, SKY, np.uint8)
        self.paint: npt.NDArray[np.uint16] = np.zeros(size, np.uint16)
        self.depth_dm: npt.NDArray[np.uint16] = np.full(size, 60_000, np.uint16)
        self.paints = [_Paint("sky", 0, 100)]

    def mix(self, material: str, tone: int = 0, shade: int = 100) -> int:
        self.paints.append(_Paint(material, tone, shade))
        return len(self.paints) - 1

    def x_of(self, x_cm: int, z_cm: int) -> int:
        return self.centre + _FOCAL * x_cm // z_cm

    def y_of(self, y_cm: int, z_cm: int) -> int:
        return self.horizon + _FOCAL * (_EYE_CM - y_cm) // z_cm

    def _window(self, xs: Span, ys: Span) -> tuple[slice, slice]:
        """The pixels whose centres lie in that box of units."""
        rows = np.searchsorted(self.py, ys)
        cols = np.searchsorted(self.px, xs)
        return slice(int(rows[0]), int(rows[1])), slice(int(cols[0]), int(cols[1]))

    def _put(
        self,
        where: tuple[slice, slice],
        inside: npt.NDArray[np.bool_],
        category: int,
        paint: int | None,
        depth_dm: Ints | int,
    ) -> None:
        np.copyto(self.labels[where], np.uint8(category), where=inside)
        if paint is not None:
            np.copyto(self.paint[where], np.uint16(paint), where=inside)
        depth = np.broadcast_to(np.asarray(depth_dm).astype(np.uint16), inside.shape)
        np.copyto(self.depth_dm[where], depth, where=inside)

    def ground(self, covered: list[tuple[Inside, int, int]], details: list[Detail]) -> None:
        """Everything below the horizon: categories by (X, Z) in cm, then painted details."""
        rows = slice(int(np.searchsorted(self.py, self.horizon + 40)), len(self.py))
        where = (rows, slice(0, len(self.px)))
        z = (_FOCAL * _EYE_CM // (self.py[rows] - self.horizon))[:, None]
        x = (self.px - self.centre)[None, :] * z // _FOCAL
        depth = np.minimum(z // 10, 60_000)
        for inside, category, paint in covered:
            self._put(where, np.broadcast_to(inside(x, z), x.shape), category, paint, depth)
        for inside, paint in details:
            np.copyto(self.paint[where], np.uint16(paint), where=inside(x, z))

    def front(
        self, category: int, paint: int, xs: Span, ys: Span, z: int, *details: Detail
    ) -> None:
        """A rectangle that faces the eye. Details get (X from its left edge, Y)."""
        window = self._window(
            (self.x_of(xs[0], z), self.x_of(xs[1], z)), (self.y_of(ys[1], z), self.y_of(ys[0], z))
        )
        self.labels[window], self.paint[window] = category, paint
        self.depth_dm[window] = min(z // 10, 60_000)
        if details:
            u = ((self.px[window[1]] - self.centre) * z // _FOCAL - xs[0])[None, :]
            v = (_EYE_CM - (self.py[window[0]] - self.horizon) * z // _FOCAL)[:, None]
            for inside, colour in details:
                np.copyto(self.paint[window], np.uint16(colour), where=inside(u, v))

    def side(
        self, category: int, paint: int | None, x: int, ys: Span, zs: Span, *details: Detail
    ) -> None:
        """A rectangle along the street at X = x. Details get (Z from its near edge, Y).

        Without a paint the category is set and what stands behind stays visible (a fence).
        """
        near = max(zs[0], _NEAR_CM)
        if near >= zs[1] or x == 0:
            return
        edges = sorted((self.x_of(x, near), self.x_of(x, zs[1])))
        tops = self.y_of(ys[1], near), self.y_of(ys[1], zs[1])
        feet = self.y_of(ys[0], near), self.y_of(ys[0], zs[1])
        window = self._window((edges[0], edges[1]), (min(tops), max(feet)))
        offset = self.px[window[1]] - self.centre
        z = _FOCAL * x // np.where(offset == 0, 1, offset)
        z = np.clip(z, near, zs[1])[None, :]
        py = self.py[window[0]][:, None]
        inside = (py >= self.horizon + _FOCAL * (_EYE_CM - ys[1]) // z) & (
            py < self.horizon + _FOCAL * (_EYE_CM - ys[0]) // z
        )
        self._put(window, inside, category, paint, np.minimum(z // 10, 60_000))
        if details:
            v = _EYE_CM - (py - self.horizon) * z // _FOCAL
            for where, colour in details:
                hit = inside & where(z - zs[0], v)
                np.copyto(self.paint[window], np.uint16(colour), where=hit)

    def oval(
        self, category: int, paint: int, x: int, y: int, radii: tuple[int, int], z: int
    ) -> None:
        rx, ry = (min(max(_FOCAL * r // z, 1), 20_000) for r in radii)  # rx^2 ry^2 fits 2^63
        cx, cy = self.x_of(x, z), self.y_of(y, z)
        window = self._window((cx - rx, cx + rx), (cy - ry, cy + ry))
        dx = (self.px[window[1]] - cx)[None, :]
        dy = (self.py[window[0]] - cy)[:, None]
        inside = dx * dx * (ry * ry) + dy * dy * (rx * rx) <= rx * rx * ry * ry
        self._put(window, inside, category, paint, min(z // 10, 60_000))

    def polygon(self, category: int, paint: int, corners: list[tuple[int, int]], z: int) -> None:
        """A convex shape that faces the eye; corners are (X, Y) in cm, either way round."""
        points = [(self.x_of(x, z), self.y_of(y, z)) for x, y in corners]
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        window = self._window((min(xs), max(xs)), (min(ys), max(ys)))
        px, py = self.px[window[1]][None, :], self.py[window[0]][:, None]
        edges = list(zip(points, points[1:] + points[:1]))
        turn = 1 if sum(a[0] * b[1] - a[1] * b[0] for a, b in edges) >= 0 else -1
        inside = np.ones((py.shape[0], px.shape[1]), bool)
        for (x0, y0), (x1, y1) in edges:
            inside &= turn * ((x1 - x0) * (py - y0) - (y1 - y0) * (px - x0)) >= 0
        self._put(window, inside, category, paint, min(z // 10, 60_000))

    def bar(
        self,
        category: int,
        paint: int,
        ends: tuple[tuple[int, int], tuple[int, int]],
        thick: int,
        z: int,
    ) -> None:
        """A straight bar between two points, `thick` cm across its steeper direction."""
        (x0, y0), (x1, y1) = ends
        half = thick // 2 + 1
        upright = abs(y1 - y0) >= abs(x1 - x0)
        dx, dy = (half, 0) if upright else (0, half)
        corners = [(x0 - dx, y0 - dy), (x0 + dx, y0 + dy), (x1 + dx, y1 + dy), (x1 - dx, y1 - dy)]
        self.polygon(category, paint, corners, z)

    def box(
        self,
        category: int,
        material: str,
        tone: int,
        xs: Span,
        ys: Span,
        zs: Span,
        rear: list[Detail],
        flank: list[Detail],
    ) -> None:
        """The two faces of a box that the eye can see: the near end and the inner flank."""
        paint = self.mix(material, tone, 88)
        if xs[0] > 0:
            self.side(category, self.mix(material, tone, 70), xs[0], ys, zs, *flank)
        if xs[1] < 0:
            self.side(category, self.mix(material, tone, 100), xs[1], ys, zs, *flank)
        if zs[0] > _NEAR_CM:
            self.front(category, paint, xs, ys, zs[0], *rear)


def _between(values: Ints, span: Span) -> npt.NDArray[np.bool_]:
    return (values >= span[0]) & (values < span[1])


def _rectangle(us: Span, vs: Span) -> Inside:
    return lambda u, v: _between(u, us) & _between(v, vs)


def _within(u0: int, u1: int, v0: int, v1: int) -> Inside:
    return _rectangle((u0, u1), (v0, v1))


def _band(v0: int, v1: int) -> Inside:
    return lambda u, v: _between(v, (v0, v1))


def _disc(u0: int, v0: int, radius: int) -> Inside:
    return lambda u, v: (u - u0) * (u - u0) + (v - v0) * (v - v0) <= radius * radius


def _grid(u_pitch: int, u_open: int, v_pitch: int, v_open: int, lowest: int) -> Inside:
    return lambda u, v: (
        (u % u_pitch >= u_pitch - u_open) & (v % v_pitch >= v_pitch - v_open) & (v >= lowest)
    )


# --- the street --------------------------------------------------------------------------------

Things = list[
    tuple[int, Callable[[], None]]
]  # distance in cm and what draws it when its turn comes


@dataclass(frozen=True)
class _Plan:
    """The cross-section, cm from the eye: kerbs, lot lines, and where a street crosses."""

    left: int  # kerb, negative
    right: int
    walk_left: int  # outer edge of the sidewalk, negative
    walk_right: int
    crossing: Span
    tracks: bool  # rails beside the left kerb
    parking: tuple[bool, bool]


def _street(dice: _Dice, size: tuple[int, int]) -> _Canvas:
    canvas = _Canvas(size, horizon=dice.between(6000, 7800), yaw=dice.between(-2600, 2600))
    plan = _plan(dice)
    _lay_ground(canvas, dice, plan)
    _skyline(canvas, dice)
    for side in (-1, 1):
        _lots(canvas, dice, plan, side)
    things: Things = []
    _furnish(canvas, dice, plan, things)
    _populate(canvas, dice, plan, things)
    _traffic(canvas, dice, plan, things)
    for _, draw in sorted(things, key=lambda t: -t[0]):
        draw()
    return canvas


def _plan(dice: _Dice) -> _Plan:
    tracks = dice.percent(38)
    parking = (dice.percent(55) and not tracks, dice.percent(55))
    left = -490 - 230 * parking[0] - 420 * tracks - dice.below(120)
    right = 180 + 230 * parking[1] + dice.below(120)
    start = dice.between(1100, 4200) if dice.percent(45) else 90_000
    return _Plan(
        left=left,
        right=right,
        walk_left=left - dice.between(180, 480),
        walk_right=right + dice.between(180, 480),
        crossing=(start, start + dice.between(700, 1100)),
        tracks=tracks,
        parking=parking,
    )


def _lay_ground(canvas: _Canvas, dice: _Dice, plan: _Plan) -> None:
    near, far = plan.crossing
    asphalt = canvas.mix("asphalt", dice.below(256))
    marking, kerb = canvas.mix("marking"), canvas.mix("kerb")
    slab = dice.between(60, 140)
    joint = canvas.mix("joint")
    grass = canvas.mix("grass" if dice.percent(75) else "earth", dice.below(256))

    def crosses(z: Ints) -> npt.NDArray[np.bool_]:
        return _between(z, (near, far))

    covered: list[tuple[Inside, int, int]] = [
        (lambda x, z: z > 0, TERRAIN, grass),
        (
            lambda x, z: _between(x, (plan.walk_left, plan.walk_right)),
            SIDEWALK,
            canvas.mix("pavement", dice.below(256)),
        ),
        (lambda x, z: _between(x, (plan.left, plan.right)) | crosses(z), ROAD, asphalt),
    ]

    def on_walk(x: Ints, z: Ints) -> npt.NDArray[np.bool_]:
        left, right = (plan.walk_left, plan.left), (plan.right, plan.walk_right)
        return (_between(x, left) | _between(x, right)) & ~crosses(z) & (z < 2500)

    kerbs = (plan.left - 18, plan.left), (plan.right, plan.right + 18)
    details: list[Detail] = [
        (lambda x, z: on_walk(x, z) & ((z % slab < 7) | (x % slab < 5)), joint),
        (lambda x, z: (_between(x, kerbs[0]) | _between(x, kerbs[1])) & ~crosses(z), kerb),
        (lambda x, z: _between(x, (-166, -152)) & (z % 700 < 380) & ~crosses(z), marking),
    ]
    if plan.tracks:
        rail = canvas.mix("rail")
        on_track = plan.left + 120, plan.left + 300
        details.append(
            (lambda x, z: _between(x, on_track) & ((x - plan.left - 130) % 150 < 12), rail)
        )
    if plan.parking[1]:
        details.append((lambda x, z: _between(x, (168, 178)) & ~crosses(z), marking))
    if dice.percent(60):
        zebra = _rectangle((plan.left, plan.right), (near - 380, near - 80))
        details.append((lambda x, z: zebra(x, z) & (x % 95 < 48), marking))
    x, z = dice.between(-400, 60), dice.between(400, 1500)
    repair = _rectangle((x, x + 140), (z, z + 350))
    details.insert(0, (repair, canvas.mix("patch", dice.below(256))))
    canvas.ground(covered, details)


def _skyline(canvas: _Canvas, dice: _Dice) -> None:
    """Far blocks and woods along the horizon, so that a gap between houses is not only sky."""
    for _ in range(dice.between(10, 22)):
        x, z = dice.between(-16_000, 16_000), dice.between(11_000, 19_000)
        wide, tall = dice.between(900, 3200), dice.between(500, 2600)
        if dice.percent(55):
            paint = canvas.mix("facade", dice.below(256), dice.between(70, 100))
            pane = canvas.mix("glass", dice.below(256))
            detail = (_grid(300, 130, 320, 150, 300), pane)
            canvas.front(BUILDING, paint, (x, x + wide), (-300, tall), z, detail)
        else:
            for _ in range(4):
                lump = x + dice.below(wide), dice.between(100, 400)
                radii = dice.between(300, 900), dice.between(250, 700)
                canvas.oval(VEGETATION, canvas.mix("leaf", dice.below(256), 85), *lump, radii, z)


def _lots(canvas: _Canvas, dice: _Dice, plan: _Plan, side: int) -> None:
    """Houses and parks along one side, painted from the far end."""
    verge = dice.between(60, 420) if dice.percent(55) else 0
    line = (plan.walk_right if side > 0 else plan.walk_left) + side * verge
    lots: list[tuple[int, int, int]] = []
    z = dice.between(-400, 500)
    park_percent = dice.between(15, 65)
    while z < 12_000:
        length = dice.between(700, 2600)
        kind = dice.below(100)
        if z + length > plan.crossing[0] and z < plan.crossing[1]:
            z = plan.crossing[1] + 100
            continue
        lots.append((z, z + length, kind))
        z += length + (dice.between(60, 500) if dice.percent(30) else 0)
    for start, end, kind in reversed(lots):
        if kind < park_percent:
            _park(canvas, dice, side, line, (start, end))
        else:
            _house(canvas, dice, side, line + side * dice.below(120), (start, end))


def _house(canvas: _Canvas, dice: _Dice, side: int, line: int, zs: Span) -> None:
    tone, storey = dice.below(256), dice.between(270, 360)
    tall = storey * dice.between(2, 7) + dice.between(60, 160)
    dark, lit = canvas.mix("glass", dice.below(256)), canvas.mix("pane", dice.below(256))
    trim = canvas.mix("facade", dice.below(256), 80)
    pitch, open_ = dice.between(200, 420), dice.between(90, 150)
    shop = canvas.mix("shop", dice.below(256), 85)
    panes = _grid(pitch, open_, storey, storey // 2, storey if dice.percent(50) else 90)
    key = dice.below(64)

    def is_lit(u: Ints, v: Ints) -> npt.NDArray[np.bool_]:
        return panes(u, v) & (((u // pitch) * 5 + (v // storey) * 11 + key) % 7 < 3)

    details: list[Detail] = [(panes, dark), (is_lit, lit)]
    if dice.percent(45):
        details.insert(0, (lambda u, v: v % storey < 22, trim))
    if dice.percent(40):
        details.append((lambda u, v: (v < storey - 50) & (v > 30) & (u % 330 > 60), shop))
    if dice.percent(60):
        roof = canvas.mix("roof", dice.below(256))
        details.append((_band(tall - 70, tall + 1), roof))
    xs = (line, line + 4000) if side > 0 else (line - 4000, line)
    canvas.box(BUILDING, "facade", tone, xs, (-20, tall), zs, details, details)


def _bricks(u: Ints, v: Ints) -> npt.NDArray[np.bool_]:
    """The joints of a wall, as far as one can see them."""
    return ((v % 42 < 5) | ((u + (v // 42) * 35) % 90 < 5)) & (u < 1400)


def _park(canvas: _Canvas, dice: _Dice, side: int, line: int, zs: Span) -> None:
    """Open ground with trees and, along the sidewalk, a wall, a fence, a hedge or nothing."""
    for _ in range(dice.between(1, 5)):
        z = dice.between(max(zs[0], 400), max(zs[1], 401))
        _tree(canvas, dice, line + side * dice.between(250, 1500), z, dice.between(350, 1000))
    edge = dice.below(100)
    tall = dice.between(130, 260)
    if edge < 34:
        wall = canvas.mix("wall", dice.below(256), 90 if side < 0 else 74)
        cap = canvas.mix("cap")
        course = canvas.mix("joint", 0, 70)
        canvas.side(
            WALL, wall, line, (0, tall), zs, (_bricks, course), (_band(tall - 16, 900), cap)
        )
    elif edge < 72:
        bars = canvas.mix("fence", dice.below(256), 95)
        pitch, thick = dice.between(24, 44), dice.between(7, 14)
        rails: Detail = (
            lambda u, v: (u % pitch < thick) | (v % (tall // 2) > tall // 2 - 12) | (u % 260 < 18),
            bars,
        )
        canvas.side(FENCE, None, line, (0, tall), zs, rails)
    elif edge < 86:
        canvas.side(VEGETATION, canvas.mix("leaf", dice.below(256), 92), line, (0, tall), zs)


def _tree(canvas: _Canvas, dice: _Dice, x: int, z: int, tall: int) -> None:
    trunk, tone = canvas.mix("trunk", dice.below(256)), dice.below(256)
    thick = 10 + tall // 40
    canvas.bar(VEGETATION, trunk, ((x, 0), (x + dice.between(-20, 20), tall * 6 // 10)), thick, z)
    spread = tall * dice.between(18, 32) // 100
    for k in range(dice.between(6, 10)):
        shade = 72 + 7 * (k % 5)
        dx, dy = dice.between(-spread, spread + 1), dice.between(-spread, spread + 1) * 3 // 4
        radii = spread * dice.between(45, 85) // 100, spread * dice.between(40, 75) // 100
        leaf = canvas.mix("leaf", tone, shade)
        canvas.oval(VEGETATION, leaf, x + dx, tall * 7 // 10 + dy, radii, z)


def _furnish(canvas: _Canvas, dice: _Dice, plan: _Plan, things: Things) -> None:
    """Poles, lamps, lights, signs and street trees beside the kerbs."""

    def clear(z: int) -> bool:
        return not plan.crossing[0] <= z < plan.crossing[1]

    for side, kerb in ((-1, plan.left), (1, plan.right)):
        x = kerb + side * dice.between(25, 60)
        z, step = dice.between(450, 1500), dice.between(900, 2000)
        lamps = dice.percent(60)
        while z < 8000:
            if clear(z):
                tall, arm = dice.between(450, 800), -side * dice.between(80, 220) * lamps
                things.append((z, _bind(_lamp_post, canvas, dice, (x, z, tall, arm))))
            z += step
        if dice.percent(35):
            z, step = dice.between(600, 1600), dice.between(600, 1300)
            while z < 6000:
                if clear(z):
                    tall = dice.between(350, 700)
                    where = x + side * dice.between(30, 70), z + 40, tall
                    things.append((z + 40, _bind(_tree, canvas, dice, where)))
                z += step
        for _ in range(dice.between(0, 4)):
            z = dice.between(500, 3200)
            things.append((z, _bind(_sign, canvas, dice, (x + side * dice.below(40), z))))
        if dice.percent(60):
            z = min(plan.crossing[0] - 60, dice.between(700, 2600))
            reach = -side * dice.between(150, 330) * dice.percent(40)
            things.append((z, _bind(_traffic_light, canvas, dice, (x, z, reach))))


def _bind(
    draw: Callable[..., None], canvas: _Canvas, dice: _Dice, where: tuple[int, ...]
) -> Callable[[], None]:
    """The drawing postponed to its turn, with dice of its own: order cannot change a thing."""
    own = _Dice(dice.below(1 << 31), 2)
    return lambda: draw(canvas, own, *where)


def _lamp_post(canvas: _Canvas, dice: _Dice, x: int, z: int, tall: int, arm: int) -> None:
    paint = canvas.mix("pole", dice.below(256))
    canvas.bar(POLE, paint, ((x, 0), (x, tall)), dice.between(10, 18), z)
    if arm:
        canvas.bar(POLE, paint, ((x, tall), (x + arm, tall + 12)), 8, z)
        canvas.oval(POLE, canvas.mix("lamp"), x + arm, tall + 6, (22, 9), z)


def _sign(canvas: _Canvas, dice: _Dice, x: int, z: int) -> None:
    canvas.bar(POLE, canvas.mix("pole", dice.below(256)), ((x, 0), (x, 230)), 7, z)
    kind, big = dice.below(4), dice.between(28, 45)
    y, white = 235, canvas.mix("sign white")
    if kind == 0:  # prohibition: white in a red ring
        canvas.oval(SIGN, canvas.mix("sign red"), x, y, (big, big), z)
        canvas.oval(SIGN, white, x, y, (big * 7 // 10, big * 7 // 10), z)
    elif kind == 1:  # warning
        for paint, r in ((canvas.mix("sign red"), big + 6), (white, big - 9)):
            canvas.polygon(
                SIGN, paint, [(x - r, y - r * 2 // 3), (x + r, y - r * 2 // 3), (x, y + r)], z
            )
    elif kind == 2:  # direction board
        board = canvas.mix("sign blue" if dice.percent(60) else "sign yellow")
        arrow: Detail = (_within(20, 2 * big + 40, y - 8, y + 8), white)
        canvas.front(SIGN, board, (x - big - 30, x + big + 30), (y - big, y + big), z, arrow)
    else:  # command: white mark on a blue disc
        canvas.oval(SIGN, canvas.mix("sign blue"), x, y, (big, big), z)
        canvas.front(SIGN, white, (x - 7, x + 7), (y - big // 2, y + big // 2), z)


def _traffic_light(canvas: _Canvas, dice: _Dice, x: int, z: int, reach: int) -> None:
    pole, lit = canvas.mix("pole", dice.below(256)), dice.below(3)
    tall = 520 if reach else 320
    canvas.bar(POLE, pole, ((x, 0), (x, tall)), 13, z)
    heads = [(x, 300)]
    if reach:
        canvas.bar(POLE, pole, ((x, tall), (x + reach, tall)), 10, z)
        heads.append((x + reach, tall - 20))
    for hx, hy in heads:
        canvas.front(LIGHT, canvas.mix("housing"), (hx - 22, hx + 22), (hy - 60, hy + 60), z)
        for k, name in enumerate(("green", "amber", "red")):
            lamp = canvas.mix(f"light {name}" if k == lit else "light off")
            canvas.oval(LIGHT, lamp, hx, hy - 36 + 36 * k, (16, 16), z)


def _populate(canvas: _Canvas, dice: _Dice, plan: _Plan, things: Things) -> None:
    """People on the sidewalks and the zebra, bicycles and motorcycles that stand or are ridden."""
    walks = ((plan.walk_left, plan.left), (plan.right, plan.walk_right))
    for _ in range(dice.between(3, 11)):
        low, high = walks[dice.below(2)]
        x, z = dice.between(low + 20, high - 20), _distance(dice, 500, 4000)
        things.append((z, _bind(_person, canvas, dice, (x, z))))
    if dice.percent(30):
        x, z = dice.between(plan.left, plan.right), plan.crossing[0] - 200
        for k in range(dice.between(1, 4)):
            things.append((z, _bind(_person, canvas, dice, (x + 70 * k, z))))
    for draw, chance in ((_bicycle, 60), (_motorcycle, 35)):
        if dice.percent(chance):
            low, high = walks[dice.below(2)]
            z = _distance(dice, 450, 2200)
            for k in range(dice.between(1, 4)):
                spot = min(low + 60 + 75 * k, high), z + 20 * k, 0, dice.below(3)
                things.append((spot[1], _bind(draw, canvas, dice, spot)))


def _distance(dice: _Dice, near: int, far: int) -> int:
    """Nearer places are likelier than they would be in a real street: things should be seen."""
    return near + (far - near) * dice.below(1000) * dice.below(1000) // 1_000_000


def _person(
    canvas: _Canvas, dice: _Dice, x: int, z: int, base: int = 0, category: int = PERSON
) -> None:
    """Standing or walking; `base` lifts a rider's hips onto the saddle."""
    seated = category == RIDER
    tall = dice.between(150, 195)
    leg, step = tall * 45 // 100, dice.between(0, 26)
    cloth, trousers = canvas.mix("cloth", dice.below(256)), canvas.mix("trousers", dice.below(256))
    skin = canvas.mix("skin", dice.below(256))
    hip = base + (0 if seated else leg)
    if seated:
        canvas.bar(category, trousers, ((x, hip), (x + 16, hip - 42)), 18, z)
        canvas.bar(category, trousers, ((x + 14, hip - 40), (x + 4, hip - 80)), 13, z)
    else:
        canvas.bar(category, trousers, ((x - 6, hip), (x - 8 - step, 0)), 15, z)
        canvas.bar(category, trousers, ((x + 6, hip), (x + 8 + step, 0)), 15, z)
    chest = hip + tall * 38 // 100
    lean = dice.between(6, 26) if seated else dice.between(-5, 6)
    body = [(x - 19, hip - 6), (x + 19, hip - 6), (x + 22 + lean, chest), (x - 22 + lean, chest)]
    canvas.polygon(category, cloth, body, z)
    for hand in (-1, 1):
        shoulder = x + lean + hand * 21, chest - 6
        reach = (x + lean + 40, hip + 24) if seated else (shoulder[0] + hand * dice.below(14), hip)
        canvas.bar(category, cloth, (shoulder, reach), 10, z)
    canvas.oval(category, skin, x + lean, chest + 15, (11, 15), z)
    hat = canvas.mix("cloth" if seated and dice.percent(70) else "hair", dice.below(256))
    canvas.oval(category, hat, x + lean, chest + 22, (12, 10), z)


# The frame of a bicycle seen from the side: ends of its tubes, cm from the ground below its middle.
_BICYCLE_TUBES = (
    ((-52, 34), (-18, 78)),
    ((-52, 34), (0, 32)),
    ((-18, 78), (0, 32)),
    ((-18, 78), (34, 74)),
    ((0, 32), (34, 74)),
    ((52, 34), (32, 98)),  # fork
    ((32, 98), (18, 104)),  # handlebar
    ((-20, 78), (-20, 90)),
    ((-30, 92), (-10, 92)),  # saddle
)


def _bicycle(canvas: _Canvas, dice: _Dice, x: int, z: int, ridden: int, view: int) -> None:
    tyre, frame = canvas.mix("tyre", 0), canvas.mix("frame", dice.below(256))
    if view == 0:  # from behind
        canvas.oval(BICYCLE, tyre, x, 34, (6, 34), z)
        canvas.bar(BICYCLE, frame, ((x, 60), (x, 100)), 9, z)
        canvas.bar(BICYCLE, frame, ((x - 28, 100), (x + 28, 100)), 7, z)
    else:
        for wheel in (x - 52, x + 52):
            canvas.oval(BICYCLE, tyre, wheel, 34, (34, 34), z)
            canvas.oval(BICYCLE, canvas.mix("spokes"), wheel, 34, (27, 27), z)
        for start, end in _BICYCLE_TUBES:
            ends = (x + start[0], start[1]), (x + end[0], end[1])
            canvas.bar(BICYCLE, frame, ends, 6, z)
    if ridden:
        _person(canvas, dice, x - 12 * (view > 0), z - 1, 96, RIDER)


def _motorcycle(canvas: _Canvas, dice: _Dice, x: int, z: int, ridden: int, view: int) -> None:
    tyre, body = canvas.mix("tyre", 0), canvas.mix("coach", dice.below(256))
    seat, steel = canvas.mix("trousers", 0), canvas.mix("pole", dice.below(256))
    if view == 0:  # from behind
        canvas.oval(MOTORCYCLE, tyre, x, 32, (11, 32), z)
        canvas.polygon(
            MOTORCYCLE, body, [(x - 24, 52), (x + 24, 52), (x + 16, 96), (x - 16, 96)], z
        )
        canvas.front(MOTORCYCLE, canvas.mix("tail light"), (x - 10, x + 10), (66, 76), z)
        canvas.bar(MOTORCYCLE, steel, ((x - 38, 104), (x + 38, 104)), 8, z)
    else:
        for wheel in (x - 66, x + 66):
            canvas.oval(MOTORCYCLE, tyre, wheel, 32, (32, 32), z)
            canvas.oval(MOTORCYCLE, steel, wheel, 32, (14, 14), z)
        canvas.front(MOTORCYCLE, steel, (x - 36, x + 30), (24, 60), z)
        canvas.polygon(MOTORCYCLE, body, [(x - 20, 58), (x + 48, 58), (x + 38, 96), (x - 4, 90)], z)
        canvas.polygon(MOTORCYCLE, seat, [(x - 74, 72), (x - 8, 66), (x - 8, 86), (x - 80, 84)], z)
        canvas.bar(MOTORCYCLE, steel, ((x + 66, 32), (x + 38, 106)), 9, z)
        canvas.oval(MOTORCYCLE, canvas.mix("head light"), x + 54, 92, (9, 9), z)
    if ridden:
        _person(canvas, dice, x - 30 * (view > 0), z - 1, 84, RIDER)


# --- traffic -----------------------------------------------------------------------------------


def _traffic(canvas: _Canvas, dice: _Dice, plan: _Plan, things: Things) -> None:
    """Each lane is filled from near to far, so that nothing drives through its neighbour."""
    moving = ((_car, 44), (_truck, 15), (_bus, 14), (_ride, 27))
    parked = ((_car, 84), (_truck, 9), (_motorcycle_parked, 7))
    _lane(canvas, dice, things, (-320, 1), dice.between(700, 1800), (500, 2600), moving)
    _lane(canvas, dice, things, (0, 0), dice.between(650, 2200), (600, 3000), moving)
    if plan.parking[0]:
        _lane(canvas, dice, things, (-600, 1), dice.between(250, 900), (60, 900), parked)
    if plan.parking[1]:
        _lane(canvas, dice, things, (290, 0), dice.between(250, 900), (60, 900), parked)
    if plan.tracks and dice.percent(85):
        z = dice.between(200, 2600)
        things.append((z, _bind(_train, canvas, dice, (plan.left + 210, z))))
    if plan.crossing[0] < 5000 and dice.percent(60):
        z = plan.crossing[0] + dice.between(200, 600)
        x = dice.between(-1500, 700)
        draw = (_car_across, _truck_across, _ride_across)[dice.below(3)]
        things.append((z, _bind(draw, canvas, dice, (x, z))))


def _lane(
    canvas: _Canvas,
    dice: _Dice,
    things: Things,
    lane: tuple[int, int],
    first: int,
    gap: Span,
    kinds: tuple[tuple[Callable[..., None], int], ...],
) -> None:
    x, oncoming = lane
    z = first
    while z < 9000:
        draw = _chosen(dice.below(100), kinds)
        things.append((z, _bind(draw, canvas, dice, (x + dice.between(-30, 30), z, oncoming))))
        z += (1300 if draw in (_truck, _bus) else 480) + dice.between(*gap)


def _chosen(roll: int, kinds: tuple[tuple[Callable[..., None], int], ...]) -> Callable[..., None]:
    """The kind whose share of 100 the roll falls into."""
    for draw, share in kinds:
        if roll < share:
            return draw
        roll -= share
    return kinds[-1][0]


def _shadow(canvas: _Canvas, x: int, half: int, zs: Span) -> None:
    """The dark ground under a vehicle is road, and is painted where road already is."""
    near, far = canvas.y_of(0, max(zs[0] - 12, _NEAR_CM)), canvas.y_of(0, zs[1])
    rows = slice(int(np.searchsorted(canvas.py, far)), int(np.searchsorted(canvas.py, near)))
    if rows.start >= rows.stop:
        return
    z = (_FOCAL * _EYE_CM // np.maximum(canvas.py[rows] - canvas.horizon, 1))[:, None]
    ground = (canvas.px - canvas.centre)[None, :] * z // _FOCAL
    under = (np.abs(ground - x) < half) & (canvas.labels[rows] == ROAD)
    np.copyto(canvas.paint[rows], np.uint16(canvas.mix("shadow")), where=under)


def _lamps(canvas: _Canvas, oncoming: int) -> int:
    return canvas.mix("head light" if oncoming else "tail light")


def _car(canvas: _Canvas, dice: _Dice, x: int, z: int, oncoming: int) -> None:
    half, long, roof = dice.between(82, 96), dice.between(370, 480), dice.between(138, 178)
    tone, belt = dice.below(256), dice.between(82, 98)
    glass, dark, tyre = canvas.mix("glass", 40), canvas.mix("trim"), canvas.mix("tyre", 0)
    lamp, wide = _lamps(canvas, oncoming), 2 * half
    _shadow(canvas, x, half + 8, (z, z + long))
    wheels = [(_disc(at, 32, 34), tyre) for at in (80, long - 80)]
    rear: list[Detail] = [
        (_band(0, 44), dark),
        (_within(0, 34, 62, 80), lamp),
        (_within(wide - 34, wide, 62, 80), lamp),
        (_within(half - 26, half + 26, 50, 62), canvas.mix("plate")),
    ]
    cabin = (z + 40, z + long - (110 if not oncoming else 60))
    opening = _within(27, cabin[1] - cabin[0] - 24, belt + 7, roof - 9)
    windows: Detail = (lambda u, v: opening(u, v) & (u % 118 > 9), glass)
    across = (x - half + 12, x + half - 12)
    canvas.box(CAR, "coach", tone, across, (belt - 50, roof), cabin, [], [windows])
    screen = [
        (x - half + 6, belt - 50),
        (x + half - 6, belt - 50),
        (x + half - 20, roof),
        (x - half + 20, roof),
    ]
    canvas.polygon(CAR, canvas.mix("coach", tone, 92), screen, z + 30)
    inner = [
        (x - half + 16, belt + 4),
        (x + half - 16, belt + 4),
        (x + half - 27, roof - 9),
        (x - half + 27, roof - 9),
    ]
    canvas.polygon(CAR, glass, inner, z + 30)
    canvas.box(CAR, "coach", tone, (x - half, x + half), (16, belt), (z, z + long), rear, wheels)
    for side in (-1, 1):
        canvas.front(
            CAR, tyre, (x + side * (half - 14) - 12, x + side * (half - 14) + 12), (0, 24), z
        )


def _truck(canvas: _Canvas, dice: _Dice, x: int, z: int, oncoming: int) -> None:
    half, long, tall = dice.between(108, 126), dice.between(600, 1200), dice.between(290, 380)
    tone, cab_tone = dice.below(256), dice.below(256)
    glass, tyre, dark = canvas.mix("glass", 40), canvas.mix("tyre", 0), canvas.mix("trim")
    lamp, wide = _lamps(canvas, oncoming), 2 * half
    _shadow(canvas, x, half + 6, (z, z + long))
    flank: list[Detail] = [(_disc(at, 46, 48), tyre) for at in (110, long - 120, long - 230)]
    cargo = (z + (170 if oncoming else 0), z + long - (0 if oncoming else 170))
    cab = (z, z + 160) if oncoming else (z + long - 160, z + long)
    ribs: list[Detail] = [
        (lambda u, v: (u % 120 < 6) & (v > 96), canvas.mix("cargo", tone, 60)),
        (_band(0, 96), dark),
        *flank,
    ]
    doors: list[Detail] = [
        (_within(half - 3, half + 3, 100, tall), dark),
        (_within(0, 7, 100, tall), dark),
        (_within(wide - 7, wide, 100, tall), dark),
        (_within(0, 34, 62, 80), lamp),
        (_within(wide - 34, wide, 62, 80), lamp),
    ]

    def draw_cab() -> None:
        face: list[Detail] = [
            (_within(14, wide - 14, 168, 236), glass),
            (_within(10, 48, 62, 84), lamp),
            (_within(wide - 48, wide - 10, 62, 84), lamp),
            (_band(0, 52), dark),
        ]
        side: list[Detail] = [(_within(30, 110, 170, 232), glass), (_disc(90, 46, 48), tyre)]
        canvas.box(TRUCK, "coach", cab_tone, (x - half, x + half), (30, 262), cab, face, side)

    if not oncoming:
        draw_cab()
    canvas.box(TRUCK, "cargo", tone, (x - half - 6, x + half + 6), (52, tall), cargo, doors, ribs)
    if oncoming:
        draw_cab()
    for side in (-1, 1):
        canvas.front(
            TRUCK, tyre, (x + side * (half - 26) - 22, x + side * (half - 26) + 22), (0, 56), z
        )


def _bus(canvas: _Canvas, dice: _Dice, x: int, z: int, oncoming: int) -> None:
    half, long, tall = 124, dice.between(950, 1250), dice.between(290, 330)
    tone, wide = dice.below(256), 248
    glass, tyre, trim = canvas.mix("glass", 40), canvas.mix("tyre", 0), canvas.mix("trim")
    lamp = _lamps(canvas, oncoming)
    _shadow(canvas, x, half + 6, (z, z + long))
    flank: list[Detail] = [
        (lambda u, v: (v > 130) & (v < tall - 55) & (u % 145 > 11), glass),
        (_band(58, 72), canvas.mix("stripe", tone)),
        (_band(0, 36), trim),
        *[(_disc(at, 46, 50), tyre) for at in (260, long - 260)],
    ]
    face: list[Detail] = [
        (_within(16, wide - 16, 126 if oncoming else 170, tall - 52), glass),
        (_within(50, wide - 50, tall - 44, tall - 14), canvas.mix("board")),
        (_within(8, 42, 62, 88), lamp),
        (_within(wide - 42, wide - 8, 62, 88), lamp),
        (_band(0, 40), trim),
    ]
    canvas.box(BUS, "bus", tone, (x - half, x + half), (18, tall), (z, z + long), face, flank)
    for side in (-1, 1):
        canvas.front(BUS, tyre, (x + side * 96 - 20, x + side * 96 + 20), (0, 30), z)


def _train(canvas: _Canvas, dice: _Dice, x: int, z: int) -> None:
    """A tram of two to four cars: a band of windows, a bright sill, doors, a dark skirt."""
    tone, oncoming = dice.below(256), dice.below(2)
    glass, skirt = canvas.mix("glass", 40), canvas.mix("trim")
    stripe, door = canvas.mix("stripe", dice.below(256)), canvas.mix("rail")
    lamp = _lamps(canvas, oncoming)
    for k in reversed(range(dice.between(2, 5))):
        start = z + 1080 * k
        flank: list[Detail] = [
            (_band(120, 142), stripe),
            (lambda u, v: (v > 165) & (v < 285) & (u % 190 > 22), glass),
            (lambda u, v: (u % 520 > 400) & (v > 50) & (v < 300) & (u % 60 > 5), door),
            (_band(0, 46), skirt),
        ]
        face: list[Detail] = [
            (_within(22, 248, 160, 290), glass),
            (_band(120, 142), stripe),
            (_within(70, 200, 308, 334), canvas.mix("board")),
            (_within(20, 58, 84, 108), lamp),
            (_within(212, 250, 84, 108), lamp),
            (_band(0, 46), skirt),
        ]
        span = (start, start + 1040)
        canvas.box(TRAIN, "tram", tone, (x - 135, x + 135), (8, 350), span, face, flank)


def _ride(canvas: _Canvas, dice: _Dice, x: int, z: int, oncoming: int) -> None:
    draw = _bicycle if dice.percent(58) else _motorcycle
    draw(canvas, dice, x + (90 - 180 * oncoming), z, 1, 0)


def _motorcycle_parked(canvas: _Canvas, dice: _Dice, x: int, z: int, oncoming: int) -> None:
    _motorcycle(canvas, dice, x, z, 0, 1 + oncoming)


def _ride_across(canvas: _Canvas, dice: _Dice, x: int, z: int) -> None:
    draw = _bicycle if dice.percent(58) else _motorcycle
    draw(canvas, dice, x // 2, z, 1, 1)


def _car_across(canvas: _Canvas, dice: _Dice, x: int, z: int) -> None:
    long, tone, roof = dice.between(390, 470), dice.below(256), dice.between(138, 170)
    coach, glass, tyre = canvas.mix("coach", tone), canvas.mix("glass", 40), canvas.mix("tyre", 0)
    cabin = [(x + 50, 86), (x + long - 90, 86), (x + long - 150, roof), (x + 90, roof)]
    canvas.polygon(CAR, coach, cabin, z)
    panes = [(x + 72, 90), (x + long - 112, 90), (x + long - 160, roof - 9), (x + 98, roof - 9)]
    canvas.polygon(CAR, glass, panes, z)
    canvas.front(CAR, coach, (x, x + long), (20, 90), z)
    canvas.front(CAR, coach, (x + long // 2 - 4, x + long // 2 + 4), (86, roof), z)
    for wheel in (x + 80, x + long - 80):
        canvas.oval(CAR, tyre, wheel, 32, (34, 34), z)
        canvas.oval(CAR, canvas.mix("rail"), wheel, 32, (17, 17), z)


def _truck_across(canvas: _Canvas, dice: _Dice, x: int, z: int) -> None:
    long, tall = dice.between(600, 900), dice.between(280, 360)
    tyre, cab = canvas.mix("tyre", 0), canvas.mix("coach", dice.below(256))
    cargo = canvas.mix("cargo", dice.below(256))
    canvas.front(TRUCK, canvas.mix("trim"), (x, x + long), (44, 90), z)
    ribs: Detail = (lambda u, v: u % 120 < 6, canvas.mix("trim"))
    canvas.front(TRUCK, cargo, (x, x + long), (86, tall), z, ribs)
    pane = (_within(50, 140, 165, 232), canvas.mix("glass", 40))
    canvas.front(TRUCK, cab, (x + long + 15, x + long + 190), (36, 256), z, pane)
    for wheel in (x + 90, x + 200, x + long + 95):
        canvas.oval(TRUCK, tyre, wheel, 46, (48, 48), z)


# --- from paint to colour ----------------------------------------------------------------------

# name: (colours in daylight, colours at dusk or "" for the same, fine grain, coarse grain)
_MATERIALS: dict[str, tuple[str, str, int, int]] = {
    "sky": ("80acdc", "8294c0", 2, 22),
    "asphalt": ("606064 706e6e 52545a", "424650", 12, 7),
    "patch": ("46464a 7c7a78", "343840", 10, 6),
    "marking": ("deded8", "969696", 10, 18),
    "kerb": ("b0aca4", "7a7a7e", 8, 10),
    "joint": ("807a72", "5c5c5e", 8, 8),
    "rail": ("96989c", "", 6, 4),
    "shadow": ("2c2c30", "1e2026", 6, 4),
    "pavement": ("b2a89c a4a09e bca696", "84847e 8c8078", 10, 7),
    "grass": ("62923e 78964a", "5c763c 6a6a40", 26, 26),
    "earth": ("987c5a 887054", "685846", 22, 22),
    "facade": (
        "c4ac8c aa5c4c cec4b4 948a82 ba966c 787070 d6be96",
        "686870 7c6e6a 5c626e 8c827c 70544e",
        9,
        8,
    ),
    "glass": ("425468 54687e 343e4e", "262c38 343a46", 5, 10),
    "pane": ("485a6e 5c7084", "face78 ecba6e 303642", 5, 10),
    "shop": ("5c4a3e 46605a 7c3c38", "eccc8c 544c4a", 10, 12),
    "roof": ("824a3c 5a585c", "464248", 10, 8),
    "wall": ("a8947e 96928c a06e5a", "706e72 685a56", 14, 8),
    "cap": ("c4beb6", "8a888a", 8, 6),
    "fence": ("46524a 806244 bebeba", "404246 685a4e", 8, 6),
    "leaf": ("3a6c2c 508034 2c5c30 68883c", "405c36 606838 325034", 30, 20),
    "trunk": ("624c3a 54463a", "3a3430", 14, 8),
    "pole": ("76787a 54585a 929494", "56585e 404248", 5, 4),
    "lamp": ("d6d6d0", "ffe2a0", 3, 2),
    "sign white": ("ececea", "c4c6cc", 4, 2),
    "sign red": ("c6282a", "9c2c30", 4, 2),
    "sign blue": ("2456b0", "284884", 4, 2),
    "sign yellow": ("eec83c", "ba9e46", 4, 2),
    "housing": ("262a28", "1c1e22", 4, 2),
    "light off": ("3c3a36", "28282a", 3, 2),
    "light red": ("ec362c", "ff5446", 3, 2),
    "light amber": ("f4b430", "ffc45a", 3, 2),
    "light green": ("3cd278", "6efab4", 3, 2),
    "skin": ("e0b698 b48664 7c5640", "a88876 624c42", 4, 2),
    "hair": ("3c2c22 201e1e 967850", "282424", 6, 2),
    "cloth": (
        "be3034 2c4e96 e8e4dc 3c7854 e2aa32 603c78 32343a c8788c",
        "703238 2c3a5c 96969c 3a4e46 a8823c 282a30",
        8,
        6,
    ),
    "trousers": ("282c3a 424e6e 706456", "24262e 383c4a", 6, 4),
    "coach": (
        "c41e24 1c3c82 e2e4e6 24262a 969aa0 3c6e5a d6aa3c 5a5e64",
        "78242a 243458 989ca4 202228 626670 4a4e58",
        4,
        6,
    ),
    "cargo": ("dededa c8a03c 466ea0 96463c", "96989e 745c42 42546c", 5, 10),
    "bus": ("deb228 bc2c30 3c80b4", "967a3c 743038", 4, 8),
    "tram": ("e8e2ce 307860 ce3c32", "969492 385450", 4, 8),
    "stripe": ("be282e 28468c f0f0ec", "742c34 303e5c", 4, 4),
    "trim": ("2e3034", "22242a", 6, 4),
    "tyre": ("1e1e20", "16161a", 5, 2),
    "spokes": ("787a7a", "4a4c52", 22, 4),
    "frame": ("b42e30 285a96 282a2c 46966e", "543036 2c364a", 4, 2),
    "plate": ("e6e4d6", "a6a49c", 4, 2),
    "board": ("fac83c", "ffb446", 8, 2),
    "head light": ("ecece2", "fffae2", 2, 2),
    "tail light": ("b02226", "ff3c38", 2, 2),
}
_AT_DUSK_BRIGHT = frozenset(
    ("lamp", "head light", "tail light", "light red", "light amber", "light green", "board")
)

Signed = npt.NDArray[np.int32]


def _coloured(canvas: _Canvas, dice: _Dice, dusk: bool, grain_percent: int) -> Signed:
    """(H, W, 3) colours of the paints, each with the grain of its material."""
    rows = np.zeros((len(canvas.paints), 5), np.int32)
    for k, (material, tone, shade) in enumerate(canvas.paints):
        day, evening, fine, coarse = _MATERIALS[material]
        options = (evening if dusk and evening else day).split()
        light = 100 if dusk and material in _AT_DUSK_BRIGHT else shade
        jitter = (tone * 37 // 8) % 25 - 12
        rows[k, :3] = [
            (channel + jitter) * light // 100
            for channel in bytes.fromhex(options[tone % len(options)])
        ]
        rows[k, 3:] = fine * grain_percent // 100, coarse * grain_percent // 100
    painted = rows[canvas.paint]  # (H, W, 5)
    size = canvas.labels.shape
    fine_noise = dice.bytes(*size).astype(np.int32) - 128
    coarse_noise = _patches(dice, (size[0], size[1]))
    grain = (painted[..., 3] * fine_noise + painted[..., 4] * coarse_noise) >> 7
    return painted[..., :3] + grain[..., None]


def _patches(dice: _Dice, size: tuple[int, int]) -> Signed:
    """Soft noise in -128..127 that changes over about a fortieth of the height."""
    cell = max(size[0] // 40, 1)
    rows, cols = -(-size[0] // cell) + 1, -(-size[1] // cell) + 1
    knots = dice.bytes(rows, cols).astype(np.int32) - 128
    return _enlarged(knots[..., None], size, cell)[..., 0]


def _enlarged(knots: Signed, size: tuple[int, int], cell: int) -> Signed:
    """(rows, cols, k) knots, `cell` pixels apart -> (*size, k), bilinear in integers."""
    y, x = np.arange(size[0]), np.arange(size[1])
    fy = (y % cell).astype(np.int32)[:, None, None]
    fx = (x % cell).astype(np.int32)[None, :, None]
    wide = knots[:, x // cell] * (cell - fx) + knots[:, x // cell + 1] * fx
    large = wide[y // cell] * (cell - fy) + wide[y // cell + 1] * fy
    return (large // (cell * cell)).astype(np.int32)


def _softened(colours: Signed) -> Signed:
    """The 1-2-1 filter down and across: a lens, and no jagged edge that gives a label away."""
    padded = np.pad(colours, ((1, 1), (0, 0), (0, 0)), mode="edge")
    down = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    padded = np.pad(down, ((0, 0), (1, 1), (0, 0)), mode="edge")
    return (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) >> 4


def _hazed(canvas: _Canvas, colours: Signed, air: tuple[int, int, int], half_dm: int) -> Signed:
    """Mixes each pixel with the air in front of it; half is left at `half_dm`."""
    weight = 256 * half_dm // (half_dm + np.arange(65_536, dtype=np.int32))
    left = weight[canvas.depth_dm].astype(np.int32)[..., None]
    return (colours * left + np.array(air, np.int32) * (256 - left)) >> 8


def _sky_gradient(canvas: _Canvas, colours: Signed, low: tuple[int, int, int]) -> Signed:
    """The sky turns into `low` towards the horizon."""
    share = np.clip(canvas.py * 256 // canvas.horizon, 0, 256).astype(np.int32)[:, None, None]
    mixed = (colours * (256 - share) + np.array(low, np.int32) * share) >> 8
    return np.where((canvas.labels == SKY)[..., None], mixed, colours)


def _exposed(colours: Signed, gain_percent: tuple[int, int, int], dice: _Dice, noise: int) -> Bytes:
    """Gain per channel, sensor noise (the sum of two draws, so mostly small), and 8 bits."""
    drawn = dice.bytes(2, *colours.shape).astype(np.int32)
    grain = ((drawn[0] + drawn[1] - 255) * noise) >> 8
    lit = colours * np.array(gain_percent, np.int32) // 100 + grain
    image: Bytes = np.clip(lit, 0, 255).astype(np.uint8)
    return image


def _daylight(canvas: _Canvas, dice: _Dice) -> Bytes:
    colours = _coloured(canvas, dice, dusk=False, grain_percent=100)
    colours = _sky_gradient(canvas, colours, (214, 226, 236))
    colours = _hazed(canvas, colours, (206, 218, 230), dice.between(2500, 5000))
    sun = dice.between(90, 112)
    gain = sun + dice.between(-3, 5), sun, sun + dice.between(-5, 4)
    return _exposed(_softened(colours), gain, dice, noise=8)


def _rainy_dusk(canvas: _Canvas, dice: _Dice) -> Bytes:
    colours = _coloured(canvas, dice, dusk=True, grain_percent=80)
    glow = dice.between(0, 40)
    colours = _sky_gradient(canvas, colours, (180 + glow, 164 + glow // 3, 168))
    colours = _wet(canvas, colours, dice.between(30, 90))
    fog = 140 + glow // 2, 138 + glow // 4, 148
    colours = _hazed(canvas, colours, fog, dice.between(900, 2400))
    colours = _bloomed(canvas, colours)
    colours = _rained(canvas, colours, dice)
    light = dice.between(92, 118)
    gain = light + dice.between(-6, 8), light - 2, light + dice.between(0, 14)
    return _exposed(_softened(colours), gain, dice, noise=15)


def _wet(canvas: _Canvas, colours: Signed, share: int) -> Signed:
    """Wet ground mirrors what stands above the horizon, share/256 of it, least at one's feet."""
    horizon = int(np.searchsorted(canvas.py, canvas.horizon))
    below = np.arange(horizon, len(canvas.py))
    if not len(below):
        return colours
    mirrored = colours[np.clip(2 * horizon - below, 0, len(canvas.py) - 1)]
    ground = np.isin(canvas.labels[horizon:], (ROAD, SIDEWALK))[..., None]
    mixed = (colours[horizon:] * (256 - share) + mirrored * share) >> 8
    wet = colours.copy()
    np.copyto(wet[horizon:], mixed, where=ground)
    return wet


def _bloomed(canvas: _Canvas, colours: Signed) -> Signed:
    """Lamps spread their light over a fog of drops: cells of 1/32 height, spread twice."""
    cell = max(len(canvas.py) // 32, 1)
    bright = np.array([p.material in _AT_DUSK_BRIGHT for p in canvas.paints])[canvas.paint]
    light = np.where(bright[..., None], colours, 0)
    tall, wide = light.shape[0] // cell + 1, light.shape[1] // cell + 1
    padded = np.zeros((tall * cell, wide * cell, 3), np.int32)
    padded[: light.shape[0], : light.shape[1]] = light
    cells = padded.reshape(tall, cell, wide, cell, 3).sum(axis=(1, 3), dtype=np.int32)
    cells = np.pad(_softened(cells // (cell * cell)), ((1, 1), (1, 1), (0, 0)), mode="edge")
    size = light.shape[0] + cell, light.shape[1] + cell
    glow = _enlarged(_softened(cells), size, cell)
    half = cell // 2  # the knots are the middles of the cells
    return colours + 2 * glow[half : half + light.shape[0], half : half + light.shape[1]]


def _rained(canvas: _Canvas, colours: Signed, dice: _Dice) -> Signed:
    """Slanted streaks, each a few pixels of light added along its fall."""
    height, width = canvas.labels.shape
    fallen = colours.copy()
    slant = dice.between(-3, 4)
    drops = dice.bytes(max(height * width // 420, 1), 8).astype(np.int64)
    y = (drops[:, 0] * 256 + drops[:, 1]) * height >> 16
    x = (drops[:, 2] * 256 + drops[:, 3]) * width >> 16
    long = height * (8 + drops[:, 4] % 16) >> 8
    light = (14 + drops[:, 5] % 34).astype(np.int32)
    for k in range(int(long.max()) + 1):
        row, col = y + k, x + slant * k // 6
        seen = (k <= long) & (row < height) & (col >= 0) & (col < width)
        np.add.at(fallen, (row[seen], col[seen]), light[seen][:, None])
    return fallen


_STYLES: dict[str, Callable[[_Canvas, _Dice], Bytes]] = {SOURCE: _daylight, TARGET: _rainy_dusk}
