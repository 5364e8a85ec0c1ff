"""Draw a furniture catalogue whose truth is known: pictures, and a CSV with the noise of a real feed.

    python tests/sample.py --output data/sample                      1,200 products, seed 42
    python tests/sample.py --output data/few --count 24 --sheet      a handful, and sheet.png to look at them
    python tests/sample.py --output data/sample --queries            queries.csv alone, for what an earlier version drew
    python tests/sample.py --output data/views --views 4             each product in four photos, for --photos 4

Every product is a function of (seed, index): the same bytes whatever --count and --workers, and an interrupted run
goes on. A piece of furniture is a list of parts (sheared boxes, cones) in metres; parts are drawn far to near in an
orthographic view, each visible face with the texture of its material, shaded by its angle to the light.
"""

from __future__ import annotations

import argparse
import csv
import functools
import io
import itertools
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

sys.path.insert(0, str(Path(__file__).parents[1]))

import common

PALETTE = {
    "white": (238, 236, 230), "black": (44, 43, 46), "grey": (140, 142, 146), "beige": (214, 192, 156),
    "brown": (122, 80, 46), "red": (186, 40, 42), "blue": (50, 92, 172), "green": (62, 124, 72),
    "yellow": (232, 192, 50), "orange": (226, 122, 38), "pink": (232, 150, 172), "purple": (120, 74, 152),
}  # fmt: skip
WOODS = {"oak": (196, 156, 104), "walnut": (100, 66, 42), "pine": (222, 188, 132)}
SOFT, WOOD = ("fabric", "leather", "velvet"), ("oak", "walnut", "pine")
MATERIALS = {  # what each type is made of
    "chair": (*SOFT, *WOOD, "rattan", "metal"), "sofa": SOFT, "table": (*WOOD, "metal", "glass", "marble"),
    "bed": (*SOFT, *WOOD, "metal"), "lamp": ("metal", "fabric", "glass", "rattan"), "bookcase": (*WOOD, "metal"),
    "wardrobe": (*WOOD, "rattan"), "desk": (*WOOD, "metal", "glass"), "stool": (*SOFT, *WOOD, "metal", "rattan"),
    "bench": (*SOFT, *WOOD, "rattan"),
}  # fmt: skip
TYPES = tuple(MATERIALS)
STYLES = ("modern", "rustic", "industrial", "scandinavian", "classic", "mid-century")
LEGS = {  # style: (material, colour, thickness in metres, splay, form)
    "modern": ("metal", (150, 152, 156), 0.035, 0.0, "box"),
    "rustic": ("oak", (104, 70, 42), 0.095, 0.0, "box"),
    "industrial": ("metal", (40, 40, 43), 0.045, 0.0, "frame"),
    "scandinavian": ("pine", (226, 196, 146), 0.05, 0.05, "box"),
    "classic": ("walnut", (84, 52, 34), 0.06, 0.0, "turned"),
    "mid-century": ("walnut", (118, 74, 42), 0.045, 0.12, "cone"),
}
SYNONYMS = {"sofa": "couch", "grey": "gray", "bookcase": "bookshelf", "wardrobe": "armoire"}
SIZE = 512
VIEW = 10_000_000  # further views of products are drawn by numbers beyond all indices


@dataclass(frozen=True)
class Product:
    """One product of the feed and the truth about its picture."""

    index: int
    id: str
    design: int  # products of one design have one shape; colour variants differ in colour only
    object_type: str
    style: str
    material: str
    color: str
    twin: str  # "" or, of the product `design`: "exact" or "near" duplicate picture
    damage: str  # "" or what is wrong with the file
    form: str  # how the picture is stored: "jpg", "rotated", "cmyk", "grey16", "rgba", "webp", "gif"

    @property
    def title(self) -> str:
        return f"{self.style} {self.material} {self.object_type}"


# --------------------------------------------------------------------------------------------------------------------
# Textures: multipliers around 1, tiled


@functools.cache
def texture(material: str) -> np.ndarray:
    """float32 [256, 256] that multiplies a face's colour."""
    rng = np.random.default_rng(sum(map(ord, material)))
    y, x = np.mgrid[0:256, 0:256].astype(np.float32)

    def noise(high: int, wide: int) -> np.ndarray:
        cells = np.tile(rng.random((high, wide)).astype(np.float32), (3, 3))  # so that tiles meet without a seam
        return np.asarray(Image.fromarray(cells).resize((768, 768), Image.BICUBIC))[256:512, 256:512]

    if material in WOOD:
        bend = noise(3, 4) * 14
        rings = np.sin((y + bend * 3) / {"oak": 3.1, "walnut": 4.2, "pine": 6.5}[material])
        return 0.93 + 0.07 * rings + 0.12 * (noise(128, 5) - 0.5)
    if material == "fabric":
        return 0.94 + 0.07 * np.sign(np.sin(x / 1.6) * np.sin(y / 1.6)) + 0.08 * (noise(128, 128) - 0.5)
    if material == "velvet":
        return 0.86 + 0.3 * noise(5, 5)
    if material == "leather":
        return 0.90 + 0.18 * noise(8, 8) - 0.10 * (noise(90, 90) > 0.72)
    if material == "rattan":
        over = (np.floor(x / 12) + np.floor(y / 12)) % 2
        return 0.68 + 0.36 * np.where(over > 0, np.abs(np.sin(x * np.pi / 12)), np.abs(np.sin(y * np.pi / 12)))
    if material == "marble":
        return 1.02 - 0.30 * np.exp(-np.abs(np.sin((x + y) / 40 + 5 * noise(4, 4))) * 9)
    if material == "metal":
        return 0.92 + 0.22 * np.exp(-(((x - 70) / 26) ** 2)) + 0.05 * (noise(3, 200) - 0.5)
    return np.ones((256, 256), np.float32)


@functools.cache
def thrice(material: str) -> np.ndarray:
    """[256, 768]: each value of the texture for red, green and blue, so that long rows are multiplied at once."""
    return np.repeat(texture(material), 3, axis=1)


@functools.lru_cache(maxsize=256)
def skin(material: str, color: tuple[int, int, int], shade: int) -> Image.Image:
    """The texture in a colour at a brightness in percent, RGB 256 x 256."""
    multiplied = thrice(material) * np.tile(np.array(color, np.float32), 256)
    multiplied *= shade / 100
    return Image.fromarray(multiplied.clip(0, 255, out=multiplied).astype(np.uint8).reshape(256, 256, 3))


# --------------------------------------------------------------------------------------------------------------------
# Parts


@dataclass
class Part:
    """A solid between a bottom and a top polygon, each float [n, 3], of one material."""

    bottom: np.ndarray
    top: np.ndarray
    material: str
    color: tuple[int, int, int]
    alpha: int = 255

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        corners = np.concatenate([self.bottom, self.top])
        return corners.min(0), corners.max(0)

    def faces(self) -> Iterator[np.ndarray]:
        count = len(self.bottom)
        yield self.top
        for i in range(count):
            j = (i + 1) % count
            yield np.array([self.bottom[i], self.bottom[j], self.top[j], self.top[i]])


def box(x, y, z, w, d, h, look, shift=(0.0, 0.0), shrink=0.0) -> Part:
    """A box with its centre at x, y and its foot at z; `shift` moves the foot (splay), `shrink` narrows the top."""
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) / 2 * [w, d]
    bottom = np.column_stack([corners + np.array([x + shift[0], y + shift[1]]), np.full(4, z)])
    top = np.column_stack([corners * (1 - shrink) + np.array([x, y]), np.full(4, z + h)])
    return Part(bottom, top, *look)


def cone(x, y, z, low, high, h, look, shift=(0.0, 0.0), sides=20) -> Part:
    """A round solid with radius `low` at its foot and `high` at its top."""
    angle = np.arange(sides) * 2 * math.pi / sides
    ring = np.column_stack([np.cos(angle), np.sin(angle)])
    bottom = np.column_stack([ring * low + [x + shift[0], y + shift[1]], np.full(sides, z)])
    top = np.column_stack([ring * high + [x, y], np.full(sides, z + h)])
    return Part(bottom, top, *look)


class Builder:
    """Parts of one design: proportions from its own random numbers, looks from material, colour and style."""

    def __init__(self, product: Product, seed: int):
        self.rng = np.random.default_rng([seed, product.design, 1])
        self.style = product.style
        color = tuple(int(c) for c in np.clip(np.array(PALETTE[product.color]) + self.rng.normal(0, 7, 3), 0, 255))
        self.main = (product.material, color, 150 if product.material == "glass" else 255)
        material, tint, self.thick, self.splay, self.form = LEGS[product.style]
        self.leg_look = (material, tint, 255)
        self.soft = product.material in SOFT
        self.parts: list[Part] = []

    def between(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def box(self, *place, look=None, **more) -> None:
        self.parts.append(box(*place, look or self.main, **more))

    def cone(self, *place, look=None, **more) -> None:
        self.parts.append(cone(*place, look or self.main, **more))

    def legs(self, w: float, d: float, h: float) -> None:
        """Four legs at the corners of w x d, in the manner of the style."""
        t = self.thick
        for sx in (-1, 1):
            for sy in (-1, 1):
                x, y = sx * (w / 2 - t), sy * (d / 2 - t)
                shift = (sx * self.splay * h, sy * self.splay * h)
                if self.form == "turned":
                    for z, share, radius in ((0, 0.12, 0.5), (0.12, 0.5, 0.32), (0.62, 0.14, 0.62), (0.76, 0.24, 0.4)):
                        self.cone(x, y, z * h, t * radius, t * radius, share * h, look=self.leg_look, sides=10)
                elif self.form == "cone":
                    self.cone(x, y, 0, t * 0.25, t * 0.55, h, look=self.leg_look, shift=shift, sides=10)
                else:
                    self.box(x, y, 0, t, t, h, look=self.leg_look, shift=shift)
        if self.form == "frame":
            for sx in (-1, 1):
                self.box(sx * (w / 2 - t), 0, 0, t * 0.99, d - 3 * t, t * 0.7, look=self.leg_look)

    def panel(self, w: float, h: float, x: float, y: float, z: float) -> None:
        """A back or headboard at depth y: padded, slatted, or plain, by material and style."""
        if self.soft or self.main[0] in ("rattan", "metal") or self.style in ("modern", "mid-century"):
            self.box(x, y, z, w, 0.05, h, shrink=0.08 if self.soft else 0.0)
            return
        slats = 5 if self.style in ("rustic", "scandinavian") else 3
        for i in range(slats):
            self.box(x + (i - (slats - 1) / 2) * w / slats, y, z, w / slats * 0.55, 0.035, h * 0.86)
        self.box(x, y, z + h * 0.86, w, 0.05, h * 0.16, shrink=0.15 if self.style == "classic" else 0)

    def knob(self, x: float, y: float, z: float) -> None:
        look = ("metal", (206, 168, 82) if self.style == "classic" else (60, 60, 62), 255)
        self.box(x, y, z, 0.03 if self.form != "frame" else 0.09, 0.03, 0.03, look=look)


def chair(b: Builder) -> None:
    w, d, seat = b.between(0.44, 0.6), b.between(0.44, 0.58), b.between(0.40, 0.48)
    pad = 0.12 if b.soft else 0.045
    b.legs(w, d, seat)
    b.box(0, 0, seat, w, d, pad, shrink=0.04 if b.soft else 0)
    b.panel(w, b.between(0.38, 0.62), 0, d / 2 - 0.03, seat + pad)
    if b.chance(0.35):
        for side in (-1, 1):
            b.box(side * (w / 2 + 0.02), -0.02, seat + pad + 0.16, 0.05, d * 0.8, 0.04)
            b.box(side * (w / 2 + 0.02), -d * 0.35, seat, 0.045, 0.045, pad + 0.16)


def sofa(b: Builder) -> None:
    seats = int(b.rng.integers(2, 4))
    w, d, foot = 0.62 * seats + b.between(0.2, 0.4), b.between(0.8, 0.95), b.between(0.08, 0.18)
    arm = b.between(0.1, 0.26)
    b.legs(w * 0.94, d * 0.9, foot)
    b.box(0, 0, foot, w, d, 0.22)
    b.box(0, d / 2 - 0.11, foot + 0.22, w, 0.22, b.between(0.36, 0.5), shrink=0.03)
    for side in (-1, 1):
        b.box(side * (w / 2 - arm / 2), -0.11, foot + 0.22, arm, d - 0.22, b.between(0.18, 0.28), shrink=0.06)
    room = (w - 2 * arm) / seats
    for i in range(seats):
        x = (i - (seats - 1) / 2) * room
        b.box(x, -0.12, foot + 0.22, room * 0.97, d - 0.26, 0.13, shrink=0.06)
        b.box(x, d / 2 - 0.3, foot + 0.35, room * 0.9, 0.14, 0.3, shrink=0.12)
    if b.chance(0.5):
        tint = PALETTE[str(b.rng.choice(list(PALETTE)))]
        b.box(
            -room * (seats - 1) / 2, d / 2 - 0.46, foot + 0.35, 0.34, 0.1, 0.3, look=("fabric", tint, 255), shrink=0.2
        )


def table(b: Builder) -> None:
    low = b.chance(0.4)
    w, d = b.between(1.0, 1.7), b.between(0.7, 0.95)
    h = b.between(0.36, 0.46) if low else b.between(0.7, 0.78)
    slab = 0.08 if b.style == "rustic" else 0.04
    if b.chance(0.35):
        r = b.between(0.45, 0.65)
        if b.chance(0.5):
            b.cone(0, 0, 0, r * 0.55, r * 0.45, 0.04, look=b.leg_look)
            b.cone(0, 0, 0.04, b.thick, b.thick * 0.8, h - 0.04, look=b.leg_look, sides=14)
        else:
            b.legs(r * 1.35, r * 1.35, h)
        b.cone(0, 0, h, r, r, slab, sides=36)
    else:
        b.legs(w, d, h)
        if b.style in ("rustic", "classic"):
            b.box(0, -d / 2 + 0.09, h - 0.09, w * 0.86, 0.03, 0.09, look=b.leg_look)
        b.box(0, 0, h, w, d, slab)


def bed(b: Builder) -> None:
    w, d, foot = b.between(1.0, 1.7), 2.0, b.between(0.1, 0.24)
    b.legs(w, d, foot)
    b.box(0, 0, foot, w, d, 0.2)
    b.box(0, -0.02, foot + 0.2, w * 0.95, d * 0.95, 0.18, look=("fabric", (240, 238, 234), 255), shrink=0.02)
    b.panel(w, b.between(0.5, 0.9), 0, d / 2 + 0.03, foot + 0.2)
    cover = ("fabric", tuple(int(c) for c in b.rng.integers(150, 245, 3)), 255)
    b.box(0, -d * 0.17, foot + 0.38, w * 0.97, d * 0.62, 0.05, look=cover)
    for side in (-1, 1):
        b.box(
            side * w * 0.23,
            d * 0.34,
            foot + 0.38,
            w * 0.36,
            0.4,
            0.11,
            look=("fabric", (248, 247, 244), 255),
            shrink=0.2,
        )


def lamp(b: Builder) -> None:
    tall = b.chance(0.6)
    h, r = (b.between(1.2, 1.5), b.between(0.2, 0.28)) if tall else (b.between(0.34, 0.5), b.between(0.14, 0.2))
    if b.style in ("mid-century", "scandinavian") and tall:
        for angle in (0.5, 2.6, 4.7):
            shift = (0.26 * math.cos(angle), 0.26 * math.sin(angle))
            b.cone(0, 0, 0, 0.014, 0.018, h, look=b.leg_look, shift=shift, sides=8)
    else:
        b.cone(0, 0, 0, r * 0.75, r * 0.6, 0.04, look=b.leg_look)
        if b.style in ("classic", "rustic"):
            b.cone(0, 0, 0.04, r * 0.3, r * 0.12, h * 0.4, look=b.leg_look, sides=14)
        b.cone(0, 0, 0.04, 0.018, 0.018, h, look=b.leg_look, sides=8)
    slope = {"industrial": 0.25, "modern": 1.0}.get(b.style, b.between(0.5, 0.75))
    b.cone(0, 0, h, r, r * slope, r * b.between(1.1, 1.6), sides=28)


def bookcase(b: Builder) -> None:
    w, d, h = b.between(0.7, 1.2), b.between(0.28, 0.36), b.between(1.3, 2.0)
    t, rows = 0.045 if b.style != "rustic" else 0.07, int(b.rng.integers(3, 6))
    frame = b.leg_look if b.style == "industrial" else b.main
    b.box(0, d / 2, 0.05, w, 0.02, h - 0.05, look=(b.main[0], tuple(int(c * 0.7) for c in b.main[1]), 255))
    for side in (-1, 1):
        b.box(side * (w / 2 + t / 2), 0, 0, t, d, h, look=frame)
    gap = (h - 0.1) / rows
    for row in range(rows + 1):
        b.box(0, 0, 0.06 + row * gap, w, d, 0.03)
        x = -w / 2 + 0.03
        while row < rows and x < w / 2 - 0.12 and b.chance(0.86):
            thick, tint = b.between(0.03, 0.07), tuple(int(c) for c in b.rng.integers(50, 225, 3))
            b.box(
                x + thick / 2, 0, 0.09 + row * gap, thick, d * 0.7, gap * b.between(0.5, 0.8), look=("plain", tint, 255)
            )
            x += thick + 0.004
    if b.style == "classic":
        b.box(0, 0, h, w + 0.16, d + 0.08, 0.07)


def wardrobe(b: Builder) -> None:
    doors = int(b.rng.integers(2, 4))
    w, d, h, foot = 0.5 * doors, b.between(0.52, 0.6), b.between(1.75, 2.1), b.between(0.06, 0.16)
    b.legs(w * 0.96, d * 0.92, foot)
    b.box(0, 0, foot, w, d, h)
    inset = b.style in ("classic", "rustic")
    for i in range(doors):
        x = (i - (doors - 1) / 2) * w / doors
        b.box(x, -d / 2 - 0.012, foot + 0.03, w / doors * 0.96, 0.02, h - 0.06)
        for z, tall in ((0.1, 0.36), (0.56, 0.36)) if inset else ():
            b.box(x, -d / 2 - 0.03, foot + z * h, w / doors * 0.6, 0.015, tall * h)
        b.knob(x + w / doors * 0.38, -d / 2 - 0.045, foot + h * 0.5)
    if b.style == "classic":
        b.box(0, 0, foot + h, w + 0.12, d + 0.1, 0.09)


def desk(b: Builder) -> None:
    w, d, h = b.between(1.1, 1.5), b.between(0.55, 0.72), b.between(0.72, 0.77)
    b.legs(w, d, h)
    unit, side = b.between(0.34, 0.44), -1 if b.chance(0.5) else 1
    drawers = int(b.rng.integers(1, 4))
    tall = 0.17 * drawers
    x = side * (w / 2 - unit / 2 - b.thick * 1.6)
    solid = (b.main[0] if b.main[0] != "glass" else "metal", b.main[1], 255)
    b.box(x, 0.02, h - tall, unit, d * 0.84, tall, look=solid)
    for i in range(drawers):
        z = h - tall + i * 0.17
        b.box(x, -d * 0.42, z + 0.012, unit * 0.94, 0.02, 0.145, look=solid)
        b.knob(x, -d * 0.42 - 0.03, z + 0.08)
    b.box(0, 0, h, w, d, 0.04)
    if b.chance(0.3):
        b.box(0, d / 2 - 0.1, h + 0.04, w * 0.9, 0.18, 0.22, look=solid)


def stool(b: Builder) -> None:
    h, w = b.between(0.42, 0.74), b.between(0.3, 0.42)
    pad = 0.09 if b.soft else 0.04
    b.legs(w * 0.95, w * 0.95, h)
    if h > 0.55:
        for side in (-1, 1):
            b.box(0, side * (w * 0.475 - b.thick), h * 0.3, w * 0.95 - 2 * b.thick, 0.025, 0.025, look=b.leg_look)
    if b.chance(0.6):
        b.cone(0, 0, h, w / 2, w / 2 * (0.94 if b.soft else 1), pad, sides=28)
    else:
        b.box(0, 0, h, w, w, pad, shrink=0.06 if b.soft else 0)


def bench(b: Builder) -> None:
    w, d, h = b.between(1.1, 1.6), b.between(0.34, 0.44), b.between(0.42, 0.47)
    pad = 0.1 if b.soft else 0.05
    b.legs(w, d, h)
    if b.soft or b.style in ("modern", "classic"):
        b.box(0, 0, h, w, d, pad, shrink=0.03 if b.soft else 0)
    else:
        for i in range(3):
            b.box(0, (i - 1) * d / 3, h, w, d / 3 * 0.86, pad)
    if b.chance(0.3):
        b.panel(w, 0.34, 0, d / 2 - 0.03, h + pad)


FURNITURE = {f.__name__: f for f in (chair, sofa, table, bed, lamp, bookcase, wardrobe, desk, stool, bench)}

# --------------------------------------------------------------------------------------------------------------------
# Drawing


def far_to_near(parts: list[Part], toward: np.ndarray) -> list[Part]:
    """Parts so that none is drawn over one that hides it: the viewer looks from `toward`, down and from the front."""
    bounds = [part.bounds() for part in parts]

    def hides(a: int, b: int) -> bool:  # a stands before b: separated along an axis, on the viewer's side
        (alow, ahigh), (blow, bhigh) = bounds[a], bounds[b]
        for axis in (2, 1, 0):
            if alow[axis] >= bhigh[axis] - 1e-3:
                return toward[axis] > 0
            if blow[axis] >= ahigh[axis] - 1e-3:
                return toward[axis] < 0
        return (alow + ahigh) @ toward > (blow + bhigh) @ toward

    left, order = list(range(len(parts))), []
    left.sort(key=lambda i: (bounds[i][0] + bounds[i][1]) @ toward)
    while left:
        free = next((i for i in left if not any(hides(i, j) for j in left if j != i)), left[0])
        left.remove(free)
        order.append(parts[free])
    return order


def polygons(flat: np.ndarray, counts: Iterable[int]) -> Iterator[list[float]]:
    """Points [n, 2] of many polygons as ImageDraw takes them, one list of numbers for each polygon."""
    numbers = iter(flat.ravel().tolist())
    return (list(itertools.islice(numbers, 2 * count)) for count in counts)


def paint(
    canvas: Image.Image,
    project: Callable[[np.ndarray], np.ndarray],
    faces: list[np.ndarray],
    parts: list[Part],
    shades: list[float],
    scale: float,
) -> None:
    """Faces, one over the other: the texture laid along the edges by an affine map, cut out by the polygon.

    The numbers of all faces are worked out together: a call of numpy costs more than what it does for one face.
    """
    count = np.array([len(face) for face in faces])
    start = np.cumsum(count) - count
    which = np.repeat(np.arange(len(faces)), count)
    points = np.concatenate(faces)
    flat = project(points)
    low = np.maximum(np.floor(np.minimum.reduceat(flat, start)).astype(int), 0)
    high = np.minimum(np.ceil(np.maximum.reduceat(flat, start)).astype(int) + 1, canvas.size)
    size = high - low

    first, second, last = start, start + 1, start + count - 1
    quad = (count == 4)[:, None]
    edges = np.stack([points[second] - points[first], points[last] - points[first]], axis=1)
    lengths = np.where(quad, np.sqrt(np.vecdot(edges, edges)), 1.0)
    along = np.where(quad, flat[second] - flat[first], [scale, 0])
    up = np.where(quad, flat[last] - flat[first], [0, scale * 0.6])
    matrix = np.stack([along, up], axis=2) / np.maximum(lengths, 1e-6)[:, None]  # metres -> pixels
    turned = quad[:, 0] & (lengths[:, 1] > lengths[:, 0])
    matrix[turned] = matrix[turned][..., ::-1]  # grain runs along the longer edge
    edgeways = np.abs(np.linalg.det(matrix)) < 1e-6
    matrix[edgeways] = np.eye(2)
    inverse = np.linalg.inv(matrix) * 300  # texture pixels a metre
    offset = (np.matvec(inverse, low - flat[first]) + 4096) % 256
    corners = size[:, None] * np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
    reach = corners @ inverse.transpose(0, 2, 1) + offset[:, None]
    shift, span = np.floor(reach.min(1) / 256) * 256, reach.max(1)
    repeat = np.ceil((span - shift) / 256).astype(int) + 1
    offset -= shift

    # What of the repeated texture the polygon uses; its origin stays, lest a sampled value is rounded otherwise.
    used = np.matvec(inverse[which], flat - low[which]) + offset[which]
    margin = 2 * np.abs(inverse).sum(2) + 2  # a polygon's edge takes in pixels beside it
    used_low = np.maximum(np.floor(np.minimum.reduceat(used, start) - margin).astype(int), 0)
    used_high = np.minimum(np.ceil(np.maximum.reduceat(used, start) + margin).astype(int), repeat * 256)
    used = np.concatenate([used_low, used_high], axis=1).tolist()
    affine = np.concatenate([inverse, offset[..., None]], axis=2).reshape(-1, 6).tolist()
    outlines = polygons(flat - low[which], count.tolist())

    for i, (part, shade, outline) in enumerate(zip(parts, shades, outlines, strict=True)):
        place, (wide, high) = tuple(low[i].tolist()), size[i].tolist()
        if min(wide, high) < 1:
            continue
        if part.material == "plain" or min(wide, high) < 3:
            fill = Image.new("RGB", (wide, high), tuple(min(255, int(c * shade)) for c in part.color))
        elif edgeways[i]:
            continue
        else:
            left, top, right, bottom = used[i]
            tile = skin(part.material, part.color, round(shade * 25) * 4)
            paper = Image.new("RGB", (right, bottom))  # only what the polygon shows is laid out, not its whole box
            for x in range(left // 256 * 256, right, 256):
                for y in range(top // 256 * 256, bottom, 256):
                    paper.paste(tile, (x, y))
            fill = paper.transform((wide, high), Image.AFFINE, affine[i], Image.BILINEAR)
        mask = Image.new("L", (wide, high), 0)
        ImageDraw.Draw(mask).polygon(outline, fill=part.alpha)
        canvas.paste(fill, place, mask)


def draw(product: Product, seed: int, size: int = SIZE, view: int | None = None) -> Image.Image:
    """The product's picture, RGB [size, size] (size is even), anti-aliased by drawing at twice the size."""
    builder = Builder(product, seed)
    FURNITURE[product.object_type](builder)
    rng = np.random.default_rng([seed, product.index if view is None else view, 2])
    yaw, pitch = rng.uniform(-0.85, 0.85), rng.uniform(0.22, 0.5)
    right = np.array([math.cos(yaw), math.sin(yaw), 0])
    toward = np.array([math.sin(yaw) * math.cos(pitch), -math.cos(yaw) * math.cos(pitch), math.sin(pitch)])
    up = np.cross(toward, right) * -1
    up = up if up[2] > 0 else -up
    light = np.array([rng.uniform(-0.8, 0.8), rng.uniform(-0.9, -0.2), rng.uniform(0.7, 1.2)])
    light /= np.linalg.norm(light)
    parts = builder.parts
    corners = np.concatenate([np.concatenate([part.bottom, part.top]) for part in parts])
    flat = np.column_stack([corners @ right, -(corners @ up)])
    span = flat.max(0) - flat.min(0)
    full = size * 2
    scale = full * rng.uniform(0.66, 0.8) / span.max()
    origin = (
        np.array([full * rng.uniform(0.47, 0.53), full * rng.uniform(0.49, 0.54)])
        - (flat.max(0) + flat.min(0)) / 2 * scale
    )

    def project(points: np.ndarray) -> np.ndarray:
        return np.column_stack([points @ right, -(points @ up)]) * scale + origin

    canvas = background(rng, full, float(project(np.array([[0.0, 0.9, 0.0]]))[0, 1]))
    parts = far_to_near(parts, toward)
    faces, owners = zip(*[(face, part) for part in parts for face in part.faces()], strict=True)
    cast_shadow(canvas, project, [*faces, *(part.bottom for part in parts)], light)
    ambient = rng.uniform(0.56, 0.68)
    first, second, last = (np.array([face[i] for face in faces]) for i in (0, 1, -1))
    normals = np.cross(second - first, last - first)
    lengths = np.sqrt(np.vecdot(normals, normals))
    normals /= np.maximum(lengths, 1e-12)[:, None]
    seen = np.flatnonzero((lengths >= 1e-12) & (np.vecdot(normals, toward) > 1e-3)).tolist()
    shades = (ambient + (1.12 - ambient) * np.maximum(0.0, np.vecdot(normals, light))).tolist()
    paint(canvas, project, *([values[i] for i in seen] for values in (faces, owners, shades)), scale)
    image = canvas.reduce(2)
    warm = np.array([1 + rng.uniform(-0.03, 0.04), 1.0, 1 + rng.uniform(-0.05, 0.03)]) * rng.uniform(0.93, 1.04)
    return image.point([min(255, int(v * gain)) for gain in warm for v in range(256)])


def cast_shadow(
    canvas: Image.Image, project: Callable[[np.ndarray], np.ndarray], faces: list[np.ndarray], light: np.ndarray
) -> None:
    """Darken the ground where faces stand in the light, drawn at a quarter of the size, blurred."""
    side = canvas.width // 4
    shadow = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(shadow)
    points = np.concatenate(faces)
    ground = project(points - np.outer(points[:, 2] / light[2], light)) / 4
    for polygon in polygons(ground, [len(face) for face in faces]):
        pen.polygon(polygon, fill=110)
    shadow = shadow.filter(ImageFilter.GaussianBlur(canvas.width / 160))
    left, top, right, bottom = shadow.getbbox()  # the rest of the canvas stays as it is
    left, top = max(left - 1, 0), max(top - 1, 0)
    mask = shadow.crop((left, top, min(right + 1, side), min(bottom + 1, side)))
    mask = mask.resize((mask.width * 4, mask.height), Image.BILINEAR)  # along x first at any shape: rounding
    mask = mask.resize((mask.width, mask.height * 4), Image.BILINEAR)
    canvas.paste(Image.new("RGB", mask.size, (30, 27, 25)), (left * 4, top * 4), mask)


def background(rng: np.random.Generator, size: int, horizon: float) -> Image.Image:
    """A studio's soft gradient, or a wall, a floor and a skirting board."""
    tint = np.array([1 + rng.uniform(-0.04, 0.04), 1.0, 1 + rng.uniform(-0.05, 0.05)])
    rows = np.linspace(0, 1, size)[:, None]
    if rng.random() < 0.55:
        level = rng.uniform(226, 250) - rows * rng.uniform(4, 26)
    else:
        horizon = float(np.clip(horizon, size * 0.35, size * 0.8)) / size
        wall, floor = rng.uniform(196, 240), rng.uniform(150, 206)
        level = np.where(rows < horizon, wall, floor + 24 * (rows - horizon))
        level = np.where((rows > horizon - 0.02) & (rows < horizon), wall * 1.05, level)
    pixels = np.clip(level[..., None] * tint, 0, 255).astype(np.uint8)  # (size, 1, 3)
    return Image.fromarray(pixels).resize((size, size), Image.NEAREST)


# --------------------------------------------------------------------------------------------------------------------
# The feed

DAMAGES = ("empty", "truncated", "html", "missing")
FORMS = ("rotated", "cmyk", "rgba", "webp", "gif", "grey16")
BRANDS = [a + b for a in ("Nor", "Vel", "Kas", "Tor", "Lum", "Bre") for b in ("dalo", "mira", "vik", "stra", "zeno")]


@functools.lru_cache(maxsize=100_000)
def product(index: int, seed: int) -> Product:
    """The product at an index: a design of its own, a colour variant, or a duplicate of an earlier one."""
    rng = np.random.default_rng([seed, index, 3])
    roll = rng.random()
    earlier = product(int(rng.integers(0, index)), seed) if index > 20 and roll < 0.10 else None
    kind = str(rng.choice(TYPES))
    material, style = str(rng.choice(MATERIALS[kind])), str(rng.choice(STYLES))
    colors = list(PALETTE)
    color, twin, design = str(rng.choice(colors)), "", index
    if material in WOODS and rng.random() < 0.6:
        color = str(rng.choice(["brown", "beige", "white", "black"]))
    if earlier is not None and not earlier.twin:
        kind, material, style = earlier.object_type, earlier.material, earlier.style
        if roll < 0.04:
            twin, color, design = "exact" if roll < 0.02 else "near", earlier.color, earlier.index
        else:
            color = str(rng.choice([c for c in colors if c != earlier.color]))
            design = earlier.design
    damage = DAMAGES[index // 97 % 4] if index % 97 == 50 and not twin else ""
    form = FORMS[index // 41 % 6] if index % 41 == 7 and not twin and not damage else "jpg"
    names = (
        f"SKU-{index:05d}",
        f"{index:05d}",
        f"{index % 900 + 100}.{index:03d}.{index % 90 + 10}",
        f"möbel/{index}",
        f"K·{index}",
    )
    id = names[0] if rng.random() < 0.8 else str(rng.choice(names[1:]))
    return Product(index, id, design, kind, style, material, color, twin, damage, form)


def products(count: int, seed: int = 42) -> Iterator[Product]:
    """The first `count` products."""
    return (product(index, seed) for index in range(count))


def noisy_name(item: Product, seed: int) -> str:
    """What the shop calls it: the truth under brand, SKU, price, shipping, synonyms and a wrong colour now and then."""
    rng = np.random.default_rng([seed, item.index, 4])
    if item.index % 401 == 400:
        return ""
    color = item.color
    if rng.random() < 0.04:
        color = str(rng.choice([c for c in PALETTE if c != item.color]))
    words = [w for w, share in ((color, 0.7), (item.style, 0.9), (item.material, 0.9)) if rng.random() < share]
    rng.shuffle(words)
    words = [*words, item.object_type]
    words = [SYNONYMS.get(w, w) if rng.random() < 0.3 else w for w in words]
    name = " ".join(words)
    if rng.random() < 0.5:
        name = name.title()
    brand = str(rng.choice(BRANDS))
    name = f"{brand} {name}" if rng.random() < 0.6 else name
    extras = [
        (0.25, f", SKU {rng.integers(10000, 99999)}"), (0.2, f" - ${rng.integers(29, 1999)}.99"),
        (0.2, " FREE SHIPPING!"), (0.12, f" (Set of {rng.integers(2, 5)})"),
        (0.2, f", {rng.integers(40, 200)}x{rng.integers(40, 120)} cm"), (0.03, "\nNew in our shop"),
    ]  # fmt: skip
    for share, extra in extras:
        name += extra if rng.random() < share else ""
    name = name.upper() if rng.random() < 0.08 else name
    return name.replace(" ", "  ") if rng.random() < 0.05 else name


def image_path(item: Product, view: int = 0) -> str:
    """Where the picture lies, relative to the CSV."""
    if view:
        return f"images/{item.index:06d}-{view}.jpg"
    suffix = {"rgba": "png", "grey16": "png", "webp": "webp", "gif": "gif"}.get(item.form, "jpg")
    return f"images/{item.index:06d}.{suffix}"


def encode_view(item: Product, seed: int, view: int) -> bytes:
    """A further photo of the same piece: another angle, scale, light and background. Twins share theirs."""
    item = product(item.design, seed) if item.twin else item
    image, out = draw(item, seed, view=item.index + VIEW * view), io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


def encode(item: Product, seed: int) -> bytes | None:
    """The bytes of the picture file, or None where it is missing."""
    if item.damage in ("missing", "empty"):
        return None if item.damage == "missing" else b""
    if item.damage == "html":
        return b"<!doctype html><html><title>404 Not Found</title><p>The picture has moved.</p></html>\n"
    out = io.BytesIO()
    if item.twin:
        original = product(item.design, seed)
        image = draw(original, seed)
        if item.twin == "near":
            image = image.resize((480, 480), Image.LANCZOS).crop((4, 3, 477, 476))
        image.save(out, "JPEG", quality=88 if item.twin == "exact" else 74)
        return out.getvalue()
    image = draw(item, seed)
    if item.form == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        image.transpose(Image.ROTATE_90).save(out, "JPEG", quality=88, exif=exif)
    elif item.form == "cmyk":
        image.convert("CMYK").save(out, "JPEG", quality=88)
    elif item.form == "rgba":
        distance = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((2, 2)))).convert("L")
        image.putalpha(distance.point(lambda v: 0 if v < 4 else 255))
        image.save(out, "PNG", compress_level=1)
    elif item.form == "grey16":
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257).save(out, "PNG")
    elif item.form in ("webp", "gif"):
        image.save(out, item.form.upper(), **({"quality": 88} if item.form == "webp" else {}))
    else:
        image.save(out, "JPEG", quality=88)
    data = out.getvalue()
    return data[: len(data) // 3] if item.damage == "truncated" else data


def write_image(job: tuple[int, int, str, int]) -> None:
    """Write one picture unless it is there."""
    index, seed, folder, view = job
    item = product(index, seed)
    path = Path(folder, image_path(item, view))
    if not path.exists():
        data = encode_view(item, seed, view) if view else encode(item, seed)
        if data is not None:
            common.atomic_write(path, data)


def make_catalogue(folder: Path, count: int, seed: int = 42, workers: int = 2, views: int = 1) -> Path:
    """Write images/, queries.csv and then catalogue.csv; returns its path. images/.seed says whose they are.

    views: photos of each product; image_path lists them, with "|" between.
    """
    made = folder / "images" / ".seed"
    if made.exists() and made.read_text() != str(seed):
        for path in (folder / "images").iterdir():
            path.unlink()
    common.atomic_write(made, str(seed))
    jobs = [(index, seed, str(folder), view) for index in range(count) for view in range(views)]
    with multiprocessing.get_context("spawn").Pool(max(1, workers)) as pool:
        for _ in common.progress(pool.imap_unordered(write_image, jobs, 8), "draw", len(jobs), "picture"):
            pass
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "name", "image_path", "brand", "price"])
    for item in products(count, seed):
        rng = np.random.default_rng([seed, item.index, 5])
        row = [
            item.id,
            noisy_name(item, seed),
            "|".join(image_path(item, view) for view in range(views)),
            str(rng.choice(BRANDS)),
            f"{rng.integers(29, 1999)}.99",
        ]
        writer.writerow(row)
        if item.index % 500 == 83:
            writer.writerow(row)  # a line that the export wrote twice
    write_queries(folder, count, seed)
    common.atomic_write(folder / "catalogue.csv", text.getvalue())
    return folder / "catalogue.csv"


# --------------------------------------------------------------------------------------------------------------------
# What shoppers type: in other words than titles and prompts, as a search log with clicks has it


def queries(count: int, seed: int = 42) -> Iterator[tuple[str, str, int]]:
    """(query, id, clicks): two or three attributes and the type of each product, and all products that show those."""
    sound = [item for item in products(count, seed) if not item.damage]
    sets = (("color", "material"), ("style", "color"), *[("style", "color", "material")] * 4)
    shown: dict[tuple, list[Product]] = {}
    for item in sound:
        for names in set(sets):
            shown.setdefault((*(getattr(item, name) for name in names), item.object_type), []).append(item)
    asked = set()
    for item in sound:
        rng = np.random.default_rng([seed, item.index, 8])
        key = (*(getattr(item, name) for name in sets[rng.integers(len(sets))]), item.object_type)
        words = [SYNONYMS.get(word, word) for word in key]
        rng.shuffle(words)
        if key not in asked:
            asked.add(key)
            for other in shown[key]:
                yield " ".join(words), other.id, int(rng.integers(5, 30) if other is item else rng.integers(1, 9))


def write_queries(folder: Path, count: int, seed: int = 42) -> Path:
    """Write queries.csv, with what a real log holds too: a product that is gone, and a search for nothing."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["query", "id", "weight"])
    writer.writerows([*queries(count, seed), ("blue couch", "SKU-SOLD-OUT", 3), ("", product(0, seed).id, 1)])
    common.atomic_write(folder / "queries.csv", text.getvalue())
    return folder / "queries.csv"


# --------------------------------------------------------------------------------------------------------------------
# Pictures away from furniture: what fine-tuning may forget

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "tree", "house", "car", "face", "apple", "flower")


def draw_shape(shape: str, color: tuple[int, int, int], rng: np.random.Generator, size: int = 256) -> Image.Image:
    """A simple drawing on a plain ground."""
    full = size * 2
    image = Image.new("RGB", (full, full), tuple(int(v) for v in rng.integers(200, 255, 3)))
    pen = ImageDraw.Draw(image)
    r = full * rng.uniform(0.2, 0.36)
    x, y = full * rng.uniform(0.4, 0.6, 2)
    dark = tuple(int(c * 0.55) for c in color)

    def star(points: int, inner: float) -> list[tuple[float, float]]:
        turns = [(i * math.pi / points - math.pi / 2, r if i % 2 == 0 else r * inner) for i in range(2 * points)]
        return [(x + d * math.cos(a), y + d * math.sin(a)) for a, d in turns]

    disc = (x - r, y - r, x + r, y + r)
    if shape in ("circle", "apple", "face"):
        pen.ellipse(disc, fill=color)
    if shape == "apple":
        pen.line((x, y - r, x + r * 0.2, y - r * 1.4), fill=(90, 60, 30), width=full // 50)
        pen.ellipse((x + r * 0.2, y - r * 1.4, x + r * 0.8, y - r * 1.1), fill=(60, 140, 60))
    elif shape == "face":
        for side in (-0.35, 0.35):
            pen.ellipse((x + side * r - r / 9, y - r * 0.3, x + side * r + r / 9, y - r * 0.08), fill=dark)
        pen.arc((x - r * 0.5, y - r * 0.3, x + r * 0.5, y + r * 0.6), 20, 160, fill=dark, width=full // 60)
    elif shape == "square":
        pen.rectangle(disc, fill=color)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill=color)
    elif shape == "star":
        pen.polygon(star(5, 0.42), fill=color)
    elif shape == "ring":
        pen.ellipse(disc, outline=color, width=int(r * 0.35))
    elif shape == "cross":
        pen.rectangle((x - r, y - r * 0.3, x + r, y + r * 0.3), fill=color)
        pen.rectangle((x - r * 0.3, y - r, x + r * 0.3, y + r), fill=color)
    elif shape == "tree":
        pen.rectangle((x - r * 0.12, y, x + r * 0.12, y + r * 1.2), fill=(110, 74, 44))
        pen.ellipse((x - r * 0.8, y - r, x + r * 0.8, y + r * 0.4), fill=color)
    elif shape == "house":
        pen.rectangle((x - r, y, x + r, y + r), fill=color)
        pen.polygon([(x - r * 1.15, y), (x, y - r * 0.9), (x + r * 1.15, y)], fill=dark)
    elif shape == "car":
        pen.rounded_rectangle((x - r * 1.2, y, x + r * 1.2, y + r * 0.55), r * 0.15, fill=color)
        pen.rounded_rectangle((x - r * 0.65, y - r * 0.45, x + r * 0.65, y + r * 0.1), r * 0.15, fill=color)
        for side in (-0.7, 0.7):
            pen.ellipse((x + side * r - r * 0.25, y + r * 0.3, x + side * r + r * 0.25, y + r * 0.8), fill=(30, 30, 32))
    elif shape == "flower":
        pen.polygon(star(8, 0.55), fill=color)
        pen.ellipse((x - r * 0.3, y - r * 0.3, x + r * 0.3, y + r * 0.3), fill=dark)
    return image.reduce(2)


def probe(count: int, seed: int = 7) -> Iterator[tuple[Image.Image, str]]:
    """(picture, caption) pairs without furniture."""
    for index in range(count):
        rng = np.random.default_rng([seed, index, 6])
        shape, color = SHAPES[index % len(SHAPES)], str(rng.choice(list(PALETTE)))
        yield draw_shape(shape, PALETTE[color], rng), f"a drawing of a {color} {shape}"


def make_probe(folder: Path, count: int) -> None:
    """Write such pairs as probe.csv (image_path,caption) and pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = ["image_path,caption"]
    for index, (image, caption) in enumerate(probe(count)):
        image.save(folder / f"{index:04d}.png")
        rows.append(f"{index:04d}.png,{caption}")
    common.atomic_write(folder / "probe.csv", "\n".join(rows) + "\n")


# --------------------------------------------------------------------------------------------------------------------


def sheet(count: int, seed: int, columns: int = 8, side: int = 256) -> Image.Image:
    """The first products side by side."""
    rows = math.ceil(count / columns)
    whole = Image.new("RGB", (columns * side, rows * side), "white")
    for item in products(count, seed):
        whole.paste(
            draw(item, seed).resize((side, side), Image.LANCZOS),
            (item.index % columns * side, item.index // columns * side),
        )
    return whole


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="folder for catalogue.csv and images/")
    parser.add_argument("--count", type=int, default=1200, help="products (default 1200)")
    parser.add_argument("--seed", type=int, default=42, help="of everything (default 42)")
    parser.add_argument("--views", type=int, default=1, help="photos of each product (default 1)")
    parser.add_argument("--workers", type=int, default=2, help="drawing processes (default 2)")
    parser.add_argument("--probe", type=int, default=0, help="pictures away from furniture, for 3_train.py --probe")
    parser.add_argument("--queries", action="store_true", help="write queries.csv and nothing else")
    parser.add_argument("--sheet", action="store_true", help="write sheet.png of the first 48 products too")
    return parser


@common.entry_point
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    if args.queries:
        print(write_queries(Path(args.output), args.count, args.seed))
        return common.DONE
    path = make_catalogue(Path(args.output), args.count, args.seed, args.workers, args.views)
    if args.probe:
        make_probe(path.with_name("probe"), args.probe)
    if args.sheet:
        sheet(min(48, args.count), args.seed).save(path.with_name("sheet.png"))
    print(f"{path}: {args.count} products")
    return common.DONE


if __name__ == "__main__":
    sys.exit(main())
