"""A scene: its objects, its captions and its image."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import cv2
import numpy as np

from scenes.appearance import (
    BACKGROUNDS,
    COLOURS,
    KINDS,
    PATTERNS,
    PLACES,
    SHAPES,
    Array,
    Colour,
    Rng,
    darker,
    grid,
)

SPLITS = ('train', 'val')
SUPERSAMPLING = 2  # scenes are drawn this many times larger, then averaged down


@dataclass(frozen=True)
class SceneObject:
    """One object; lengths and positions are fractions of the image side.

    Attributes:
        kind: a key of ``KINDS``.
        shape: a key of ``SHAPES``.
        rgb: the colour after jitter.
        centre: x and y of the centre of the circumscribed circle.
        radius: radius of that circle.
        angle: rotation in radians.
    """

    kind: str
    shape: str
    rgb: Colour
    centre: tuple[float, float]
    radius: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """The content of a scene.

    Attributes:
        background: a key of ``BACKGROUNDS``.
        light: direction of the light in radians.
        objects: the objects from back to front, the main object first.
    """

    background: str
    light: float
    objects: tuple[SceneObject, ...]


# ---- Sampling and captions ----------------------------------------------------------------------


def sample_place(rng: Rng, radius: float, others: tuple[SceneObject, ...]) -> tuple[float, float] | None:
    """Sample a centre for an object that lies inside the image and hides little of others; None after 100 failures."""
    for centre in rng.uniform(radius, 1 - radius, (100, 2)):
        if all(np.hypot(*(centre - other.centre)) >= other.radius + 0.3 * radius for other in others):
            return tuple(map(float, centre))
    return None


def sample_object(rng: Rng, kind: str, radius: float, centre: tuple[float, float]) -> SceneObject:
    """Sample shape, colour and angle of an object."""
    hue, saturation, value = COLOURS[KINDS[kind][0]] + rng.uniform(-1, 1, 3) * (0.012, 0.03, 0.05)
    rgb = colorsys.hsv_to_rgb(hue % 1, saturation, min(value, 1.0))
    angle = rng.uniform(-1, 1) * np.pi / 4
    return SceneObject(kind, str(rng.choice(list(SHAPES))), tuple(map(float, rgb)), centre, radius, angle)


def sample_scene(rng: Rng, kind: str) -> Scene:
    """Sample everything except the kind of the main object."""
    background = str(rng.choice(list(BACKGROUNDS)))
    radius = rng.uniform(0.2, 0.32)
    objects = (sample_object(rng, kind, radius, sample_place(rng, radius, ())),)
    rest = [name for name in KINDS if name != kind]
    for name in rng.choice(rest, rng.integers(3), replace=False):
        small = radius * rng.uniform(0.4, 0.5)  # its area stays below the main one's
        centre = sample_place(rng, small, objects)
        if centre is not None:
            objects += (sample_object(rng, str(name), small, centre),)
    return Scene(background, rng.uniform(0, 2 * np.pi), objects)


def captions(scene: Scene, rng: Rng) -> list[str]:
    """Two captions: a short one of the main object, and one of all objects and the background."""

    def phrase(item: SceneObject, size: str = '') -> str:
        words = ' '.join(filter(None, [size, item.kind, rng.choice(['', item.shape])]))
        return f'{"an" if words[0] in "aeiou" else "a"} {words}'

    main, *others = scene.objects
    place = PLACES[scene.background]
    one = rng.choice(['{} {}', 'a photo of {} {}', 'a picture of {} {}', 'there is {} {}'])
    short = one.format(phrase(main), rng.choice(['', place])).strip()
    both = rng.choice(['a photo of the {0} with {1}', 'the {0} with {1}', 'an image of {1} {2}', 'we see {1} {2}'])
    listed = phrase(main, 'large')
    if others:
        small = ' and '.join(phrase(item, 'small') for item in others)
        listed += f' {rng.choice(["and", "near", "next to"])} {small}'
    return [short, both.format(scene.background, listed, place)]


# ---- Drawing ------------------------------------------------------------------------------------


def fixed_point(loops: list[Array]) -> list[Array]:
    """Outlines in OpenCV's fixed-point coordinates: 1/16 pixels, with pixel centres at whole numbers."""
    return [np.rint(16 * (loop - 0.5)).astype(np.int32) for loop in loops]


def coverage(loops: list[Array], shape: tuple[int, int]) -> Array:
    """The fraction of each pixel that lies inside the outlines, float32 [H, W], in [0, 1].

    ``fillPoly`` fills every pixel that an outline touches, so the outlines are filled at four times the resolution.
    """
    fine = np.zeros((4 * shape[0], 4 * shape[1]), np.uint8)
    cv2.fillPoly(fine, fixed_point([4 * loop for loop in loops]), 255, shift=4)
    return cv2.resize(fine, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def paint(canvas: Array, item: SceneObject, light: float, rng: Rng) -> Array:
    """Draw an object and its shadow onto the canvas, in place.

    Args:
        canvas: RGB, float32 [size, size, 3].
        item: the object.
        light: direction of the light in radians.
        rng: random numbers for the pattern.

    Returns:
        The fraction of each pixel that the object covers, float32 [size, size], in [0, 1].
    """
    size = len(canvas)
    centre, radius = size * np.array(item.centre), size * item.radius
    box = np.clip([centre - 1.5 * radius, centre + 1.5 * radius], 0, size).astype(int)
    (left, top), (right, bottom) = box
    patch = canvas[top:bottom, left:right]
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    turn = radius * np.array([(cos, sin), (-sin, cos)])
    loops = [loop @ turn + centre - box[0] for loop in SHAPES[item.shape]]
    sun = math.cos(light), math.sin(light)

    shadow = coverage([loop - 0.012 * size * np.array(sun) for loop in loops], patch.shape[:2])
    patch *= 1 - 0.5 * cv2.GaussianBlur(shadow, (0, 0), 0.012 * size)[..., None]

    x = ((np.arange(left, right) + 0.5 - centre[0]) / radius).astype(np.float32)[None, :]
    y = ((np.arange(top, bottom) + 0.5 - centre[1]) / radius).astype(np.float32)[:, None]
    texture = PATTERNS[KINDS[item.kind][1]](cos * x + sin * y, cos * y - sin * x, item.rgb, rng)
    texture *= (1 + 0.15 * (sun[0] * x + sun[1] * y))[..., None]
    rim, width = darker(item.rgb, 0.35), round(0.008 * size)
    cv2.polylines(texture, fixed_point(loops), True, rim, width, shift=4)
    mask = coverage(loops, patch.shape[:2])
    patch += mask[..., None] * (texture - patch)
    covered = np.zeros((size, size), np.float32)
    covered[top:bottom, left:right] = mask
    return covered


def render(scene: Scene, image_size: int, rng: Rng) -> tuple[Array, Array]:
    """Draw a scene.

    Returns:
        The RGB image, uint8 [image_size, image_size, 3], and its instance map, uint8 [image_size, image_size]: 0 for
        the background, k for ``scene.objects[k - 1]``.
    """
    shape = (image_size, image_size)
    canvas = BACKGROUNDS[scene.background](SUPERSAMPLING * image_size, rng)
    instances = np.zeros(shape, np.uint8)
    for number, item in enumerate(scene.objects, start=1):
        covered = paint(canvas, item, scene.light, rng)
        instances[cv2.resize(covered, shape, interpolation=cv2.INTER_AREA) > 0.5] = number
    image = cv2.resize(canvas, shape, interpolation=cv2.INTER_AREA)
    image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.2, 0.5) * image_size / 96)
    x, y = grid(image_size)
    slope = math.cos(scene.light) * (x - 0.5) + math.sin(scene.light) * (y - 0.5)
    image *= (1 + rng.uniform(0.1, 0.4) * slope)[..., None]
    image *= rng.uniform(0.88, 1.1) * rng.uniform(0.96, 1.04, 3).astype(np.float32)
    image += rng.uniform(0, 0.02) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.rint(255 * np.clip(image, 0, 1)).astype(np.uint8), instances


def make_scene(seed: int, split: str, index: int, image_size: int = 96) -> tuple[Scene, list[str], Array, Array]:
    """Scene, captions, image and instance map of one image of the data set; see :func:`render`.

    The scene and its captions depend only on (seed, split, index). Classes alternate, so that every split is balanced.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = sample_scene(rng, list(KINDS)[index % len(KINDS)])
    texts = captions(scene, rng)
    return scene, texts, *render(scene, image_size, rng)
