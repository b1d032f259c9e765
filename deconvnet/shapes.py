"""An embedded data set: made-up photographs of twelve shapes, in the VOC 2012 format.

Every scene is drawn from a seed: cut-out shapes of widely different size lie rotated, overlapping
and partly outside the picture on a textured, cluttered ground; light, shadows, lens and sensor do
the rest. Colours and textures are drawn independently of the class, often near the background's,
so that only the *shape* tells the class. Thin parts and holes are what unpooling and the CRF are
for; the range of sizes is what instance-wise processing is for.

A scene depends on ``(seed, split, index)`` alone: the same set comes out of one process or many,
in one go or resumed.
"""

from __future__ import annotations

import colorsys
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from deconvnet import voc
from deconvnet.files import write_atomically
from deconvnet.voc import VOID, Annotation, Sample

__all__ = [
    "CLASS_NAMES",
    "OUTLINES",
    "TRAIN_SCENES",
    "VAL_SCENES",
    "Outline",
    "ShapesConfig",
    "draw_shape",
    "make_scene",
    "scene_seed",
    "write_shapes",
]

Array = np.ndarray
Random = np.random.Generator


@dataclass(frozen=True)
class ShapesConfig:
    """What the scenes look like. The defaults are the embedded data set's."""

    min_side: int = 144  # px, shortest image side
    max_side: int = 208  # px, longest image side
    min_objects: int = 2  # shapes thrown into a scene ...
    max_objects: int = 5  # ... of which those that find no place stay out
    min_extent: float = 20.0  # px, diameter of the smallest shape's circumscribed circle
    max_extent: float = 0.9  # the same of the largest one, by the image's longer side
    min_stretch: float = 0.85  # shapes are squeezed along a random axis by up to this factor
    camouflage: float = 0.15  # probability that a shape takes its colours from the background
    clutter: int = 5  # most twigs, pebbles and stains on the ground, which belong to no class
    max_blur: float = 0.8  # px, standard deviation of the lens blur
    max_noise: float = 0.03  # standard deviation of the sensor noise, on a range of 1
    min_quality: int = 75  # JPEG quality, up to 95
    rim: int = 1  # px of void on either side of an object's outline, as in VOC's masks
    min_visible: float = 0.35  # share of a shape that must be seen for it to be in the scene
    min_pixels: int = 8  # px inside the void rim, for the same
    difficult_below: float = 0.5  # share seen under which an object counts as difficult

    def __post_init__(self) -> None:
        counts = (self.min_objects, self.max_objects)
        largest = self.max_extent * self.max_side
        least = min(self.clutter, self.max_blur, self.max_noise, self.rim)
        requirements = {
            "32 <= min_side <= max_side": 32 <= self.min_side <= self.max_side,
            "1 <= min_objects <= max_objects < 255": 1 <= counts[0] <= counts[1] < VOID,
            "4 <= min_extent <= max_extent * max_side": 4 <= self.min_extent <= largest,
            "0 < min_stretch <= 1": 0 < self.min_stretch <= 1,
            "0 <= camouflage <= 1": 0 <= self.camouflage <= 1,
            "clutter, max_blur, max_noise, rim >= 0": least >= 0,
            "1 <= min_quality <= 95": 1 <= self.min_quality <= 95,
        }
        for requirement, met in requirements.items():
            if not met:
                raise ValueError(f"expected {requirement}, got {self}")


# ------------------------------------------------------------------------- outlines of the shapes


@dataclass(frozen=True)
class Outline:
    """A shape in its own coordinates: the union of ``solids`` without the union of ``holes``.

    Each is a list of polygons ``float [n, 2]``; the shape's farthest point is about 1 from (0, 0).
    """

    solids: Sequence[Array]
    holes: Sequence[Array] = ()


def _circle(radius: float = 1.0, centre: tuple[float, float] = (0.0, 0.0)) -> Array:
    angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1) + centre


def _box(x0: float, y0: float, x1: float, y1: float) -> Array:
    return np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])


def _regular(points: int, inner: float | None = None) -> Array:
    """A regular polygon, or with ``inner`` a star whose notches have that radius."""
    radii = [1.0] * points if inner is None else [1.0, inner] * points
    angle = 2 * np.pi * np.arange(len(radii)) / len(radii)
    return np.array(radii)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _disc(rng: Random) -> Outline:
    return Outline([_circle()])


def _ring(rng: Random) -> Outline:
    return Outline([_circle()], [_circle(rng.uniform(0.5, 0.72))])


def _crescent(rng: Random) -> Outline:
    radius = rng.uniform(0.72, 0.85)
    return Outline([_circle()], [_circle(radius, (rng.uniform(0.42, 0.55), 0.0))])


def _square(rng: Random) -> Outline:
    return Outline([_regular(4)])


def _frame(rng: Random) -> Outline:
    return Outline([_regular(4)], [_regular(4) * rng.uniform(0.5, 0.72)])


def _triangle(rng: Random) -> Outline:
    return Outline([_regular(3)])


def _star(rng: Random) -> Outline:
    return Outline([_regular(5, inner=rng.uniform(0.36, 0.5))])


def _cross(rng: Random) -> Outline:
    half = rng.uniform(0.18, 0.32)
    return Outline([_box(-0.97, -half, 0.97, half), _box(-half, -0.97, half, 0.97)])


def _arrow(rng: Random) -> Outline:
    neck, half, barb = rng.uniform(0.0, 0.3), rng.uniform(0.1, 0.2), rng.uniform(0.5, 0.75)
    head = np.array([(1.0, 0.0), (neck, barb), (neck, -barb)])
    return Outline([head, _box(-1.0, -half, neck + 0.01, half)])


def _heart(rng: Random) -> Outline:
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return Outline([np.stack([x, -y - 2.5], axis=1) / 18])


def _bolt(rng: Random) -> Outline:
    half = rng.uniform(0.26, 0.36)
    upper = [(0.35, -1.0), (0.35 - 2 * half, -1.0), (-0.6, 0.12), (-0.05, 0.12)]
    lower = [(-0.35, 1.0), (0.6, -0.2), (0.1, -0.2)]
    return Outline([np.array(upper + lower)])


def _key(rng: Random) -> Outline:
    bow, half, tooth = rng.uniform(0.34, 0.44), rng.uniform(0.08, 0.12), rng.uniform(0.2, 0.34)
    centre = (bow - 1.0, 0.0)
    shaft = _box(2 * bow - 1.05, -half, 1.0, half)
    teeth = [_box(x, 0.0, x + 0.15, half + tooth) for x in (0.48, 0.82)]
    return Outline([_circle(bow, centre), shaft, *teeth], [_circle(0.55 * bow, centre)])


def _twig(rng: Random) -> Outline:
    """Clutter: a bent, tapering stroke, a walk whose heading drifts."""
    heading = np.cumsum(rng.normal(0, 0.35, size=14))
    direction = np.stack([np.cos(heading), np.sin(heading)], axis=1)
    spine = np.cumsum(direction, axis=0)
    spine -= spine.mean(axis=0)
    width = rng.uniform(0.15, 0.7) * np.linspace(1, rng.uniform(0.2, 1), len(spine))[:, None]
    normal = direction[:, ::-1] * [1, -1]
    outline = np.concatenate([spine + width * normal, (spine - width * normal)[::-1]])
    return Outline([outline / np.linalg.norm(outline, axis=1).max()])


def _blob(rng: Random) -> Outline:
    """Clutter: a lobed blob, a circle whose radius wanders."""
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    phases, lobes = rng.uniform(0, 2 * np.pi, size=3), np.arange(2, 5)
    wave = np.cos(lobes * angle[:, None] + phases) @ rng.uniform(0.1, 0.3, size=3)
    radius = np.maximum(1 + wave, 0.2)[:, None]
    return Outline([radius / radius.max() * np.stack([np.cos(angle), np.sin(angle)], axis=1)])


OUTLINES: dict[str, Callable[[Random], Outline]] = {
    "disc": _disc,
    "ring": _ring,
    "crescent": _crescent,
    "square": _square,
    "frame": _frame,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "arrow": _arrow,
    "heart": _heart,
    "bolt": _bolt,
    "key": _key,
}
"""The twelve shapes in the order of their labels; each call draws another set of proportions."""

CLASS_NAMES: tuple[str, ...] = ("background", *OUTLINES)
"""Background and the twelve shapes; the index is the label."""


# ----------------------------------------------------------------------- where the shapes lie


@dataclass(frozen=True)
class Piece:
    """A shape with its place in the picture.

    Attributes:
        label: Its class.
        cover: ``float32 [h, w]``, the share of each pixel that it covers.
        corner: ``(x, y)`` of ``cover``'s first pixel in the picture; may lie outside.
        extent: Diameter of its circumscribed circle before squeezing, px.
    """

    label: int
    cover: Array
    corner: tuple[int, int]
    extent: float

    def overlap(self, height: int, width: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Where it meets a picture of this size: slices of the picture and of ``cover``."""
        (x, y), (h, w) = self.corner, self.cover.shape
        x0, y0 = min(max(x, 0), width), min(max(y, 0), height)
        x1, y1 = min(max(x + w, x0), width), min(max(y + h, y0), height)
        return (slice(y0, y1), slice(x0, x1)), (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))


def draw_shape(outline: Outline, transform: Array, supersampling: int = 4) -> tuple[Array, Array]:
    """Draw a transformed outline with anti-aliasing.

    Args:
        outline: The shape.
        transform: ``float [2, 3]``, from the outline's coordinates to pixels.
        supersampling: Drawn pixels a side for each returned one.

    Returns:
        ``float32 [h, w]``, each pixel's covered share, and the ``(x, y)`` of its first pixel.
    """

    def place(polygons: Sequence[Array]) -> list[Array]:
        return [polygon @ transform[:, :2].T + transform[:, 2] for polygon in polygons]

    solids, holes = place(outline.solids), place(outline.holes)
    points = np.concatenate(solids)
    corner = np.floor(points.min(axis=0)).astype(int) - 1
    width, height = np.ceil(points.max(axis=0)).astype(int) + 2 - corner
    fine = np.zeros((height * supersampling, width * supersampling), np.uint8)
    for polygons, value in ((solids, 255), (holes, 0)):
        for polygon in polygons:
            # Pixel centres, not corners, are OpenCV's whole numbers.
            centred = (polygon - corner) * supersampling - 0.5
            cv2.fillPoly(fine, [np.round(centred * 16).astype(np.int32)], value, shift=4)
    cover = cv2.resize(fine, (int(width), int(height)), interpolation=cv2.INTER_AREA)
    return cover.astype(np.float32) / 255, corner


def _throw(
    rng: Random, label: int, outline: Outline, extent: float, min_stretch: float, size: Array
) -> Piece:
    """Lay a shape at a random place and angle in a picture of ``size``, ``(width, height)``."""
    squeeze = np.diag([1.0, rng.uniform(min_stretch, 1.0)])
    mirror = np.diag([1.0, rng.choice([-1.0, 1.0])])
    linear = _rotation(rng) @ squeeze @ _rotation(rng) @ mirror * extent / 2
    # Large shapes are seen whole more often if their centres keep away from the border.
    margin = np.minimum(0.4 * extent, 0.47 * size)
    centre = rng.uniform(margin, size - margin)
    cover, (x, y) = draw_shape(outline, np.column_stack([linear, centre]))
    return Piece(label, cover, (int(x), int(y)), extent)


def _rotation(rng: Random) -> Array:
    angle = rng.uniform(0, 2 * np.pi)
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _arrange(
    rng: Random, config: ShapesConfig, height: int, width: int
) -> tuple[list[Piece], Array]:
    """Throw shapes on the ground, each on top of those before, large ones mostly first.

    Returns:
        The pieces, and ``uint8 [H, W]`` with the number (from 1) of the piece on top.
    """
    count = rng.integers(config.min_objects, config.max_objects, endpoint=True)
    largest = max(config.min_extent, config.max_extent * max(height, width))
    log_extents = rng.uniform(np.log(config.min_extent), np.log(largest), size=count)
    order = np.argsort(-(log_extents + rng.normal(0, 0.4, size=count)))
    size = np.array([width, height])
    pieces: list[Piece] = []
    on_top = np.zeros((height, width), np.uint8)
    for log_extent in log_extents[order]:
        for _ in range(8):
            label = int(rng.integers(1, len(CLASS_NAMES)))
            outline = OUTLINES[CLASS_NAMES[label]](rng)
            piece = _throw(rng, label, outline, np.exp(log_extent), config.min_stretch, size)
            trial = on_top.copy()
            there, here = piece.overlap(height, width)
            trial[there][piece.cover[here] >= 0.5] = len(pieces) + 1
            if _all_visible(config, [*pieces, piece], trial):
                pieces.append(piece)
                on_top = trial
                break
    return pieces, on_top


def _visible_shares(pieces: Sequence[Piece], on_top: Array) -> Array:
    counts = np.bincount(on_top.ravel(), minlength=len(pieces) + 1)[1:]
    return counts / np.array([piece.cover.sum() for piece in pieces])


def _all_visible(config: ShapesConfig, pieces: Sequence[Piece], on_top: Array) -> bool:
    inside = np.bincount(_with_rim(on_top, config.rim).ravel(), minlength=len(pieces) + 1)
    return bool(
        (inside[1 : len(pieces) + 1] >= config.min_pixels).all()
        and (_visible_shares(pieces, on_top) >= config.min_visible).all()
    )


def _with_rim(on_top: Array, rim: int) -> Array:
    """Turn what lies within ``rim`` pixels of another object or the background into void."""
    kernel = np.ones((2 * rim + 1, 2 * rim + 1), np.uint8)
    differs = cv2.dilate(on_top, kernel) != cv2.erode(on_top, kernel)
    return np.where(differs, np.uint8(VOID), on_top)


# ---------------------------------------------------------------------------- how it looks


HUES = (0.02, 0.07, 0.1, 0.14, 0.3, 0.42, 0.55, 0.6)  # brick, wood, sand, straw, leaves, sea, sky


def _colour(rng: Random, muted: bool = False) -> Array:
    """A random colour of things that people photograph, ``float32 [3]`` RGB in 0 to 1."""
    anywhere = rng.random() < 0.3
    hue = rng.random() if anywhere else HUES[rng.integers(len(HUES))] + rng.normal(0, 0.03)
    saturation = rng.beta(1.5, 4) if muted else rng.beta(2, 2)
    value = rng.uniform(0.3, 0.85) if muted else rng.uniform(0.25, 0.95)
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def _noise(rng: Random, height: int, width: int, cell: float) -> Array:
    """Smooth noise with features of about ``cell`` pixels, ``float32 [H, W]`` around 0."""
    grid = rng.standard_normal((int(height / cell) + 2, int(width / cell) + 2), np.float32)
    return cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)


def _fractal_noise(rng: Random, height: int, width: int, cell: float) -> Array:
    """Noise on several scales, each half as coarse and half as strong as the one before."""
    octaves = range(4)
    return sum(_noise(rng, height, width, max(cell / 2**i, 1.0)) / 2**i for i in octaves) * 0.6


def _coordinates(rng: Random, height: int, width: int) -> tuple[Array, Array]:
    """Pixel coordinates along two orthogonal axes at a random angle."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    cos, sin = _rotation(rng)[:, 0].astype(np.float32)
    return cos * x + sin * y, cos * y - sin * x


def _stripes(rng: Random, height: int, width: int, period: float) -> Array:
    u, _ = _coordinates(rng, height, width)
    wave = np.sin(2 * np.pi * u / period + _noise(rng, height, width, 40) * rng.uniform(0, 0.6))
    return np.clip(wave * rng.uniform(1, 4) * 0.5 + 0.5, 0, 1)


def _checks(rng: Random, height: int, width: int, period: float) -> Array:
    u, v = _coordinates(rng, height, width)
    wave = np.sin(np.pi * u / period) * np.sin(np.pi * v / period)
    return np.clip(wave * 4 + 0.5, 0, 1)


def _dots(rng: Random, height: int, width: int, period: float) -> Array:
    u, v = _coordinates(rng, height, width)
    wave = np.cos(2 * np.pi * u / period) + np.cos(2 * np.pi * v / period)
    return np.clip((wave - rng.uniform(0.4, 1.0)) * 3, 0, 1)


def _grain(rng: Random, height: int, width: int, period: float) -> Array:
    """Wood: noise that is long along one axis."""
    u, v = _coordinates(rng, height, width)
    bend = _noise(rng, height, width, 50) * 0.8
    fibres = _noise(rng, height, width, 3) * 0.25
    return 0.5 + 0.35 * np.sin(2 * np.pi * (u / period + bend + 0.02 * v)) + fibres


def _marble(rng: Random, height: int, width: int, period: float) -> Array:
    return 0.5 + 0.5 * np.sin(3.0 * _fractal_noise(rng, height, width, 2.5 * period))


def _mottle(rng: Random, height: int, width: int, period: float) -> Array:
    return 0.5 + 0.4 * _fractal_noise(rng, height, width, 1.5 * period)


def _ramp(rng: Random, height: int, width: int, period: float) -> Array:
    u, _ = _coordinates(rng, height, width)
    return (u - u.min()) / max(float(np.ptp(u)), 1.0)


PATTERNS = (_stripes, _checks, _dots, _grain, _marble, _mottle, _mottle, _ramp, _ramp)


def _texture(rng: Random, height: int, width: int, colours: Sequence[Array]) -> Array:
    """A random pattern of two colours with a touch of noise, ``float32 [H, W, 3]``."""
    pattern = PATTERNS[rng.integers(len(PATTERNS))](rng, height, width, rng.uniform(6, 26))
    pattern = np.clip(pattern, 0, 1)[..., None].astype(np.float32)
    texture = colours[0] * (1 - pattern) + colours[1] * pattern
    speckle = _noise(rng, height, width, 2) + _noise(rng, height, width, 7)
    texture *= 1 + rng.uniform(0.005, 0.04) * speckle[..., None]
    return texture


def _near(rng: Random, colour: Array, spread: float) -> Array:
    """A colour at about ``spread`` from another in each channel, most of it lightness."""
    shift = rng.normal(0, spread) + rng.normal(0, 0.5 * spread, size=3)
    return np.clip(colour + shift, 0.05, 0.98).astype(np.float32)


def _ground(rng: Random, height: int, width: int) -> tuple[Array, list[Array]]:
    """One surface, or two that meet; and the colours used."""
    colours = [_colour(rng, muted=True)]
    canvas = _texture(rng, height, width, [colours[0], _near(rng, colours[0], 0.12)])
    if rng.random() < 0.55:
        alike = rng.random() < 0.5
        colours.append(_near(rng, colours[0], 0.25) if alike else _colour(rng, muted=True))
        other = _texture(rng, height, width, [colours[1], _near(rng, colours[1], 0.12)])
        u, _ = _coordinates(rng, height, width)
        u = u + _noise(rng, height, width, 30) * rng.choice([0.0, 4.0])
        side = np.clip(u - np.quantile(u, rng.uniform(0.25, 0.75)), 0, 1)[..., None]
        canvas += (other - canvas) * side
    return canvas, colours


def _scatter_clutter(
    rng: Random, config: ShapesConfig, canvas: Array, light: Array, ground_colours: Sequence[Array]
) -> None:
    """Lay twigs, pebbles and stains without a class onto the canvas."""
    size = np.array(canvas.shape[1::-1])
    for _ in range(rng.integers(0, config.clutter, endpoint=True)):
        outline = _twig(rng) if rng.random() < 0.5 else _blob(rng)
        piece = _throw(rng, 0, outline, np.exp(rng.uniform(np.log(6), np.log(60))), 0.5, size)
        if rng.random() < 0.5:
            _lay(rng, config, canvas, piece, light, ground_colours)
            continue
        there, here = piece.overlap(*canvas.shape[:2])
        stain = _near(rng, ground_colours[rng.integers(len(ground_colours))], 0.2)
        opacity = piece.cover[here][..., None] * np.float32(rng.uniform(0.3, 0.9))
        canvas[there] += (stain - canvas[there]) * opacity


def _lay(
    rng: Random,
    config: ShapesConfig,
    canvas: Array,
    piece: Piece,
    light: Array,
    ground_colours: Sequence[Array],
) -> None:
    """Lay a piece onto the canvas: its shadow, then its bevelled, textured surface."""
    there, here = piece.overlap(*canvas.shape[:2])
    _cast_shadow(rng, canvas, piece, light)
    if rng.random() < config.camouflage:
        base = _near(rng, ground_colours[rng.integers(len(ground_colours))], 0.12)
    else:
        base = _colour(rng)
    second = _near(rng, base, 0.15) if rng.random() < 0.6 else _colour(rng)
    surface = _texture(rng, *piece.cover.shape, [base, second])
    surface *= _bevel(rng, piece, light)[..., None]
    canvas[there] += (surface[here] - canvas[there]) * piece.cover[here][..., None]


def _cast_shadow(rng: Random, canvas: Array, piece: Piece, light: Array) -> None:
    distance = rng.uniform(1.0, 2.0 + 0.05 * piece.extent)
    pad = int(3 * distance) + 2
    shadow = cv2.copyMakeBorder(piece.cover, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0)
    shadow = cv2.GaussianBlur(shadow, (0, 0), 0.6 * distance)
    x, y = np.round(np.array(piece.corner) - pad - light * distance).astype(int)
    moved = Piece(piece.label, shadow, (int(x), int(y)), piece.extent)
    (rows, columns), here = moved.overlap(*canvas.shape[:2])
    canvas[rows, columns] *= 1 - rng.uniform(0.15, 0.6) * shadow[here][..., None]


def _bevel(rng: Random, piece: Piece, light: Array) -> Array:
    """Brightness of a surface that slopes down towards its outline, ``float32 [h, w]``."""
    inside = (piece.cover >= 0.5).astype(np.uint8)
    depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
    slope = rng.uniform(1.5, 2.0 + 0.06 * piece.extent)
    surface = cv2.GaussianBlur(np.minimum(depth / slope, 1), (0, 0), max(0.3 * slope, 0.6))
    towards_light = cv2.Sobel(surface, cv2.CV_32F, 1, 0) * -light[0]
    towards_light += cv2.Sobel(surface, cv2.CV_32F, 0, 1) * -light[1]
    return 1 - np.clip(rng.uniform(0.1, 0.35) * towards_light, -0.5, 0.5)


def _photograph(rng: Random, config: ShapesConfig, canvas: Array, light: Array) -> Array:
    """Light the scene, take it through lens and sensor; ``uint8 [H, W, 3]``."""
    height, width = canvas.shape[:2]
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    gradient = 1 + rng.uniform(0.0, 0.35) * (light[0] * x + light[1] * y)
    vignette = 1 - rng.uniform(0.0, 0.2) * (x * x + y * y) / 2
    exposure = (rng.uniform(0.85, 1.15) * gradient * vignette).astype(np.float32)
    warmth = 1 + rng.uniform(-0.06, 0.06) * np.array([1.0, 0.0, -1.0], np.float32)
    photo = canvas * exposure[..., None] * warmth
    blur = rng.uniform(0.0, config.max_blur)
    if blur > 0.25:
        photo = cv2.GaussianBlur(photo, (0, 0), blur)
    # Brighter pixels catch more photons, and so have more noise.
    grain = rng.standard_normal(photo.shape, np.float32)
    grain *= np.sqrt(np.clip(photo, 0.05, 1)) * (rng.uniform(0.3, 1) * config.max_noise)
    photo += grain
    return cv2.convertScaleAbs(np.maximum(photo, 0), alpha=255)


# ------------------------------------------------------------------------------ whole scenes


def scene_seed(seed: int, split: str, index: int) -> tuple[int, int, int]:
    """The seed of one scene of a data set, for :func:`make_scene`.

    Args:
        seed: The data set's seed, not negative.
        split: The split's name.
        index: The scene's place in the split, from 0.
    """
    return seed, zlib.crc32(split.encode()), index


def make_scene(
    config: ShapesConfig | None = None, seed: int | Sequence[int] = 0, name: str = "scene"
) -> Sample:
    """Make one scene.

    Args:
        config: What scenes look like; ``None`` for the defaults.
        seed: Not negative; one number or several, as NumPy's ``default_rng`` takes them.
        name: The sample's name.

    Returns:
        The same sample that :class:`deconvnet.voc.VOCDataset` reads back after
        :func:`write_shapes`, with the losses of JPEG.

    Raises:
        ValueError: If ``seed`` is negative.
    """
    return _make_scene(config or ShapesConfig(), seed, name)[0]


def _make_scene(config: ShapesConfig, seed: int | Sequence[int], name: str) -> tuple[Sample, bytes]:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(config.min_side, config.max_side, endpoint=True, size=2).tolist()
    pieces, on_top = _arrange(rng, config, height, width)
    canvas, ground_colours = _ground(rng, height, width)
    light = _rotation(rng)[:, 0].astype(np.float32)  # unit vector towards the lamp
    _scatter_clutter(rng, config, canvas, light, ground_colours)
    for piece in pieces:
        _lay(rng, config, canvas, piece, light, ground_colours)
    photo = _photograph(rng, config, canvas, light)
    buffer = io.BytesIO()
    quality = int(rng.integers(config.min_quality, 95, endpoint=True))
    Image.fromarray(photo).save(buffer, format="JPEG", quality=quality)
    objects = _with_rim(on_top, config.rim)
    labels_by_number = np.full(256, VOID, np.uint8)
    labels_by_number[: len(pieces) + 1] = [0, *(piece.label for piece in pieces)]
    sample = Sample(
        name=name,
        image=voc.read_image(io.BytesIO(buffer.getvalue())),
        labels=torch.from_numpy(labels_by_number[objects]),
        objects=torch.from_numpy(objects),
        annotations=tuple(_annotations(config, pieces, on_top)),
    )
    return sample, buffer.getvalue()


def _annotations(config: ShapesConfig, pieces: Sequence[Piece], on_top: Array) -> list[Annotation]:
    shares = _visible_shares(pieces, on_top) if pieces else ()
    annotations = []
    for number, (piece, share) in enumerate(zip(pieces, shares, strict=True), start=1):
        x, y, w, h = cv2.boundingRect((on_top == number).astype(np.uint8))
        box = (float(x), float(y), float(x + w), float(y + h))
        annotations.append(Annotation(piece.label, box, bool(share < config.difficult_below)))
    return annotations


# ----------------------------------------------------------------------------- whole data sets


TRAIN_SCENES, VAL_SCENES = 2500, 200
"""Scenes of the embedded data set that the recorded runs used."""

FILES = {
    "JPEGImages": "jpg",
    "SegmentationClass": "png",
    "SegmentationObject": "png",
    "Annotations": "xml",
}


def write_shapes(
    root: str | Path,
    train: int = TRAIN_SCENES,
    val: int = VAL_SCENES,
    seed: int = 0,
    config: ShapesConfig | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write the data set in the VOC format, or what is missing of it.

    Scenes that are already there stay; a run that was stopped goes on where it was.

    Args:
        root: Where to; made where needed.
        train: Number of training scenes.
        val: Number of validation scenes.
        seed: Another seed makes other scenes; not negative.
        config: What scenes look like; ``None`` for the defaults.
        workers: Processes; ``None`` for one a core. The files don't depend on it.
        progress: Show a progress bar.

    Returns:
        ``root``, to give to :class:`deconvnet.voc.VOCDataset`.

    Raises:
        ValueError: If a number is out of range, or if ``root`` holds scenes made with
            another seed or configuration.
    """
    root, config = Path(root), config or ShapesConfig()
    if workers is None:
        workers = os.cpu_count() or 1
    for name, value, least in (
        ("train", train, 1),
        ("val", val, 1),
        ("seed", seed, 0),
        ("workers", workers, 1),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for folder in FILES:
        (root / folder).mkdir(parents=True, exist_ok=True)
    _check_recipe(root, {"seed": seed, **asdict(config)})
    write_atomically(root / "classes.txt", "".join(f"{n}\n" for n in CLASS_NAMES).encode())

    splits = {"train": train, "val": val}
    jobs = [(split, index) for split, count in splits.items() for index in range(count)]
    missing = [
        job for job in jobs if not all(_file(root, folder, *job).is_file() for folder in FILES)
    ]
    with tqdm(
        desc="shapes",
        total=len(jobs),
        initial=len(jobs) - len(missing),
        unit="scene",
        disable=not progress,
    ) as bar:
        for _ in _map(partial(_write_scene, root, config, seed), missing, workers):
            bar.update()
    for split, count in splits.items():
        voc.write_split(root, split, (_name(split, index) for index in range(count)))
    return root


def _write_scene(root: Path, config: ShapesConfig, seed: int, job: tuple[str, int]) -> None:
    split, index = job
    sample, jpeg = _make_scene(config, scene_seed(seed, split, index), _name(split, index))
    write_atomically(_file(root, "JPEGImages", *job), jpeg)
    voc.write_label_map(_file(root, "SegmentationClass", *job), sample.labels)
    voc.write_label_map(_file(root, "SegmentationObject", *job), sample.objects)
    height, width = sample.labels.shape
    path = _file(root, "Annotations", *job)
    voc.write_annotations(path, sample.annotations, (height, width), CLASS_NAMES)


def _map(
    function: Callable[[tuple[str, int]], None], jobs: list[tuple[str, int]], workers: int
) -> Iterator[None]:
    workers = min(workers, len(jobs) // 16)  # a process takes a moment to start
    if workers < 2:
        yield from map(function, jobs)
        return
    # One thread each: the processes fill the cores, and OpenCV's pool does not survive a fork.
    with ProcessPoolExecutor(workers, initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        yield from pool.map(function, jobs, chunksize=8)


def _name(split: str, index: int) -> str:
    return f"{split}_{index:06d}"


def _file(root: Path, folder: str, split: str, index: int) -> Path:
    return root / folder / f"{_name(split, index)}.{FILES[folder]}"


def _check_recipe(root: Path, recipe: dict) -> None:
    path = root / "shapes.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found != recipe:
            raise ValueError(
                f"{root}: holds scenes made with another seed or configuration ({found}); "
                f"choose another folder or delete this one"
            )
    write_atomically(path, (json.dumps(recipe, indent=2) + "\n").encode())
