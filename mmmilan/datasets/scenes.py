"""Scenes: a small captioned data set that is drawn, not downloaded.

A scene is a textured background, one large main object and up to two small ones; an object is an
outline of one of ten kinds (tiger, gold, ladybird, ...), which a pattern in a colour makes. The class of
an image is the kind of its main object. Kind, outline, background, place and angle are drawn
independently of one another. Every colour serves two kinds and most patterns do, so neither colours
nor patterns alone give the class away.

:func:`write_scenes` writes the same images for four tasks: image folders (classification), COCO
instances (detection), label maps (segmentation) and captions (image-text training, retrieval).
"""

from __future__ import annotations

import colorsys
import csv
import json
import math
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from mmmilan.errors import InputError

VERSION = 2  # raise it whenever the same seed no longer gives the same files
SPLITS = ('train', 'val')
SUPERSAMPLING = 2  # scenes are drawn this many times larger, then averaged down

Array = np.ndarray
Rng = np.random.Generator
Colour = tuple[float, float, float]  # RGB in [0, 1]

CREAM: Colour = (0.98, 0.96, 0.90)  # the second colour of a pattern


@dataclass(frozen=True)
class SceneObject:
    """One object; lengths and positions are fractions of the image side.

    Attributes:
        kind, shape: keys of ``KINDS`` and ``SHAPES``.
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
    """A key of ``BACKGROUNDS``, the direction of the light in radians, and the objects from back
    to front, the main object first."""

    background: str
    light: float
    objects: tuple[SceneObject, ...]


# ---- Shapes: closed outlines in the unit circle, filled by the even-odd rule --------------------


def polar(radius: float | list[float], angle: Array) -> Array:
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def regular(corners: int, radius: float = 1.0) -> Array:
    return polar(radius, np.arange(corners) * 2 * np.pi / corners)


def repeated(radii: list[float], angles: list[float], times: int) -> Array:
    """The corners (radii, angles) repeated ``times`` around the centre."""
    turns = np.arange(times)[:, None] * 2 * np.pi / times
    return polar(np.tile(radii, times), (turns + angles).ravel())


def crescent() -> Array:
    """The unit disc less the disc of radius 0.8 around (0.5, 0)."""
    x = (1 - 0.8**2 + 0.5**2) / (2 * 0.5)  # where the circles meet
    outer, inner = np.arccos(x), np.arccos((x - 0.5) / 0.8)
    bite = polar(0.8, np.linspace(2 * np.pi - inner, inner, 40)) + (0.5, 0)
    return np.concatenate([polar(1.0, np.linspace(outer, 2 * np.pi - outer, 48)), bite])


def heart() -> Array:
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, y], axis=1) / 17


SHAPES: dict[str, list[Array]] = {
    'arrow': [np.array([(1, 0), (0.1, 0.8), (0.1, 0.3), (-0.95, 0.3), (-0.95, -0.3), (0.1, -0.3), (0.1, -0.8)])],
    'crescent': [crescent()],
    'cross': [repeated([1, 1, 0.47], [-0.34, 0.34, np.pi / 4], 4)],
    'disc': [regular(64)],
    'gear': [repeated([0.7, 1, 1, 0.7], [-0.3, -0.18, 0.18, 0.3], 8)],
    'heart': [heart()],
    'ring': [regular(64), regular(64, 0.52)],
    'square': [regular(4)],
    'star': [repeated([1, 0.42], [0, np.pi / 5], 5)],
    'triangle': [regular(3)],
}

# ---- Patterns: (u, v, rgb, rng) -> RGB; u, v are coordinates in the object's unit circle --------

COLOURS: dict[str, Colour] = {  # hue, saturation, value
    'red': (0.99, 0.88, 0.84),
    'orange': (0.075, 0.92, 0.96),
    'yellow': (0.15, 0.85, 0.96),
    'green': (0.37, 0.80, 0.62),
    'blue': (0.61, 0.85, 0.86),
}


def blend(weight: Array, low: Colour, high: Colour) -> Array:
    """``low`` where the map is 0, ``high`` where it is 1: [H, W] -> float32 [H, W, 3]."""
    weight = np.clip(weight, 0, 1).astype(np.float32)
    return cv2.merge([a + weight * (b - a) for a, b in zip(low, high, strict=True)])


def darker(rgb: Colour, factor: float) -> Colour:
    return tuple(factor * channel for channel in rgb)


def striped(u: Array, v: Array, rgb: Colour, rng: Rng) -> Array:
    wave = np.sin(2 * np.pi * (rng.uniform(1.6, 2.0) * u + rng.random()))
    return blend(0.5 + 4 * (wave - 0.15), rgb, CREAM)


def checkered(u: Array, v: Array, rgb: Colour, rng: Rng) -> Array:
    rate = rng.uniform(1.4, 1.7) * np.pi
    wave = np.sin(rate * u + rng.uniform(-1, 1)) * np.sin(rate * v + rng.uniform(-1, 1))
    return blend(0.5 + 8 * wave, rgb, CREAM)


def dotted(u: Array, v: Array, rgb: Colour, rng: Rng) -> Array:
    pitch = rng.uniform(0.42, 0.5)
    across, along = (((c / pitch + rng.random()) % 1) - 0.5 for c in (u, v))
    return blend(6 * (0.3 - np.hypot(across, along)) + 0.5, rgb, CREAM)


def metallic(u: Array, v: Array, rgb: Colour, rng: Rng) -> Array:
    sweep = np.sin(4.5 * v + 1.0 * u + rng.uniform(0, 2 * np.pi))
    body = blend(0.5 + 0.5 * sweep, darker(rgb, 0.55), rgb)
    glint = np.clip(sweep, 0, 1) ** 8
    return body + 0.75 * glint[..., None] * (1 - body)


def wooden(u: Array, v: Array, rgb: Colour, rng: Rng) -> Array:
    phase = rng.uniform(0, 2 * np.pi)
    rings = 14 * v + 4 * np.sin(1.3 * u + phase) + 2 * np.sin(2.3 * u - 2 * v + phase)
    grain = 0.6 * np.sin(rings) + 0.4 * np.sin(2.6 * rings + 9 * u)
    red, green, blue = rgb
    return blend(0.4 + 0.6 * grain, rgb, (0.66 * red, 0.52 * green, 0.42 * blue))


PATTERNS: dict[str, Callable] = {f.__name__: f for f in (checkered, dotted, metallic, striped, wooden)}
# Colour and pattern; in alphabetical order, as readers of image folders number the classes.
KINDS = {
    'candy': ('red', 'striped'),
    'frog': ('green', 'dotted'),
    'gingham': ('blue', 'checkered'),
    'gold': ('yellow', 'metallic'),
    'ladybird': ('red', 'dotted'),
    'melon': ('green', 'striped'),
    'oak': ('orange', 'wooden'),
    'steel': ('blue', 'metallic'),
    'taxi': ('yellow', 'checkered'),
    'tiger': ('orange', 'striped'),
}

# ---- Backgrounds: (size, rng) -> RGB [size, size, 3], float32 in about [0, 1] -------------------


def noise(size: int, columns: int, rows: int, rng: Rng) -> Array:
    """Smooth noise in about [0, 1] with the given number of cells across and down."""
    cells = rng.random((rows, columns), dtype=np.float32)
    return cv2.resize(cells, (size, size), interpolation=cv2.INTER_CUBIC)


def grid(size: int) -> tuple[Array, Array]:
    """x [1, size] and y [size, 1] of the pixel centres, in [0, 1]."""
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return centres[None, :], centres[:, None]


def grass(size: int, rng: Rng) -> Array:
    blades = 0.55 * noise(size, 64, 12, rng) + 0.35 * noise(size, 40, 20, rng)
    tufts = 0.6 * noise(size, 5, 5, rng) - 0.2
    return blend(blades + tufts - 0.05, (0.07, 0.22, 0.05), (0.46, 0.66, 0.22))


def sand(size: int, rng: Rng) -> Array:
    x, y = grid(size)
    ripples = np.sin(2 * np.pi * (7 * y + rng.uniform(-3, 3) * x + 1.2 * noise(size, 4, 4, rng)))
    grains = noise(size, 96, 96, rng) - 0.5
    return blend(0.55 + 0.22 * ripples + 0.5 * grains, (0.72, 0.56, 0.36), (0.95, 0.84, 0.62))


def water(size: int, rng: Rng) -> Array:
    _, y = grid(size)
    swell = np.sin(2 * np.pi * (5 * y + 1.3 * noise(size, 4, 5, rng)))
    chop = np.sin(2 * np.pi * (11 * y + 1.6 * noise(size, 6, 7, rng)))
    crests = 0.4 + 0.25 * swell + 0.25 * chop + 0.8 * np.clip(0.5 * (swell + chop), 0, 1) ** 4
    return blend(0.7 * crests, (0.02, 0.25, 0.38), (0.45, 0.82, 0.86))


def bricks(size: int, rng: Rng) -> Array:
    x, y = grid(size)
    rows, columns = 8, 4
    row = np.floor(y * rows)
    along = x * columns + 0.5 * (row % 2)
    shade = rng.random((rows, columns + 1))[row.astype(int), np.floor(along).astype(int)]
    clay = blend(0.7 * shade + 0.5 * noise(size, 64, 64, rng) - 0.1, (0.42, 0.19, 0.13), (0.70, 0.38, 0.27))
    joint = np.minimum(
        np.minimum(along % 1, 1 - along % 1) * rows / columns, np.minimum(y * rows % 1, 1 - y * rows % 1)
    )
    mortar = np.clip(1.5 - 12 * joint, 0, 1)[..., None].astype(np.float32)
    return clay + mortar * (np.float32((0.72, 0.69, 0.65)) - clay)


def sky(size: int, rng: Rng) -> Array:
    _, y = grid(size)
    air = blend(np.broadcast_to(y, (size, size)), (0.24, 0.52, 0.88), (0.66, 0.84, 0.97))
    billows = sum(noise(size, 2 * k, 3 * k, rng) / k for k in (1, 2, 4, 8)) / 1.875
    cloud = np.clip(4 * (billows - 0.52), 0, 0.9)[..., None]
    return air + cloud * (1 - air)


def night(size: int, rng: Rng) -> Array:
    _, y = grid(size)
    dark = blend(y + 0.5 * noise(size, 4, 4, rng) - 0.25, (0.02, 0.02, 0.09), (0.13, 0.10, 0.30))
    stars = np.zeros((size, size), dtype=np.float32)
    for across, down, glow in rng.random((60, 3)):
        spot = int(across * size), int(down * size)
        cv2.circle(stars, spot, int(size / 170 + glow), glow + 0.2, cv2.FILLED)
    return dark + cv2.GaussianBlur(stars, (0, 0), size / 300)[..., None] * (1 - dark)


BACKGROUNDS: dict[str, Callable] = {f.__name__: f for f in (bricks, grass, night, sand, sky, water)}
PLACES = {
    'bricks': 'in front of bricks',
    'grass': 'on the grass',
    'night': 'at night',
    'sand': 'on the sand',
    'sky': 'in the sky',
    'water': 'on the water',
}
SEMANTIC_CLASSES = (*BACKGROUNDS, *KINDS)  # label of a pixel = index

# ---- Sampling and captions ----------------------------------------------------------------------


def sample_place(rng: Rng, radius: float, others: tuple[SceneObject, ...]) -> tuple[float, float] | None:
    """A centre wholly inside the image that hides little of the others; None if 100 tries find no room."""
    for centre in rng.uniform(radius, 1 - radius, (100, 2)):
        if all(np.hypot(*(centre - other.centre)) >= other.radius + 0.3 * radius for other in others):
            return tuple(map(float, centre))
    return None


def sample_object(rng: Rng, kind: str, radius: float, centre: tuple[float, float]) -> SceneObject:
    hue, saturation, value = COLOURS[KINDS[kind][0]] + rng.uniform(-1, 1, 3) * (0.012, 0.03, 0.05)
    rgb = colorsys.hsv_to_rgb(hue % 1, saturation, min(value, 1.0))
    angle = rng.uniform(-1, 1) * np.pi / 4
    return SceneObject(kind, str(rng.choice(list(SHAPES))), tuple(map(float, rgb)), centre, radius, angle)


def sample_scene(rng: Rng, kind: str) -> Scene:
    """Draws everything but the kind of the main object."""
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
    """Two captions: a short one of the main object, and one of all objects and where they are."""

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
    """OpenCV's outlines: in 1/16 pixels, with pixel centres at whole numbers."""
    return [np.rint(16 * (loop - 0.5)).astype(np.int32) for loop in loops]


def coverage(loops: list[Array], shape: tuple[int, int]) -> Array:
    """How much of each pixel lies inside the outlines, float32 [H, W], in [0, 1].

    ``fillPoly`` fills every pixel that an outline touches, so the filling is done four times finer.
    """
    fine = np.zeros((4 * shape[0], 4 * shape[1]), np.uint8)
    cv2.fillPoly(fine, fixed_point([4 * loop for loop in loops]), 255, shift=4)
    return cv2.resize(fine, shape[::-1], interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def paint(canvas: Array, item: SceneObject, light: float, rng: Rng) -> Array:
    """Draws one object and its shadow onto the canvas, in place.

    Args:
        canvas: RGB, float32 [size, size, 3].
        item: the object.
        light: direction the light comes from, in radians.
        rng: source of the pattern's chance.

    Returns:
        How much of each pixel it covers, float32 [size, size], in [0, 1].
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
    """Draws a scene.

    Returns:
        The RGB image, uint8 [image_size, image_size, 3], and which object each pixel shows, uint8
        [image_size, image_size]: 0 for the background, k for ``scene.objects[k - 1]``.
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
    """Scene, captions, image and instance map of one entry; see :func:`render`.

    The scene and its captions depend on (seed, split, index) only. Classes take turns, so that
    every split is balanced.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = sample_scene(rng, list(KINDS)[index % len(KINDS)])
    texts = captions(scene, rng)
    return scene, texts, *render(scene, image_size, rng)


# ---- Writing ------------------------------------------------------------------------------------


def polygons(mask: Array) -> list[list[float]]:
    """COCO polygons that decode to exactly this mask (bool [H, W]), one for each part.

    Outlines are traced on the mask at twice its size, a quarter of a pixel inside its edge. COCO
    polygons have no holes: a mask with a hole is cut in two along a column through it.
    """
    doubled = mask.repeat(2, axis=0).repeat(2, axis=1).astype(np.uint8)
    outlines, links = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    for outline, parent in zip(outlines, links[0, :, 3], strict=True):
        if parent >= 0:  # the outline of a hole
            column = (outline[..., 0].min() + outline[..., 0].max()) // 4
            left = np.arange(mask.shape[1]) < column
            return polygons(mask & left) + polygons(mask & ~left)
    return [(outline.reshape(-1) / 2 + 0.25).tolist() for outline in outlines]


def coco_annotations(scene: Scene, instances: Array) -> list[dict]:
    """COCO annotations, without ids, of the visible part of each object."""
    annotations = []
    for number, item in enumerate(scene.objects, start=1):
        mask = instances == number
        left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
        annotations.append(
            {
                'category_id': list(KINDS).index(item.kind) + 1,
                'bbox': [left, top, width, height],
                'area': int(mask.sum()),
                'segmentation': polygons(mask),
                'iscrowd': 0,
            }
        )
    return annotations


def semantic_map(scene: Scene, instances: Array) -> Array:
    """Index into ``SEMANTIC_CLASSES`` of each pixel, uint8 [H, W]."""
    names = [scene.background, *(item.kind for item in scene.objects)]
    return np.array([SEMANTIC_CLASSES.index(name) for name in names], np.uint8)[instances]


def write_image(path: Path, image: Array) -> None:
    """Writes a BGR image as JPEG (colour at full resolution) or a label map as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = (
        []
        if path.suffix == '.png'
        else [
            cv2.IMWRITE_JPEG_QUALITY,
            92,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ]
    )
    path.write_bytes(cv2.imencode(path.suffix, image, options)[1])


def write_split(pool: Executor, folder: Path, split: str, num_images: int, image_size: int, seed: int) -> None:
    coco = {
        'info': {'description': f'Scenes drawn by mmmilan, {split} split'},
        'images': [],
        'annotations': [],
        'categories': [{'id': i, 'name': name} for i, name in enumerate(KINDS, start=1)],
    }
    rows = []
    scenes = pool.map(partial(make_scene, seed, split, image_size=image_size), range(num_images), chunksize=16)
    for index, (scene, texts, image, instances) in enumerate(
        track(scenes, total=num_images, description=f'Drawing scenes ({split})')
    ):
        stem = f'{scene.objects[0].kind}/{index:06d}'
        write_image(folder / split / f'{stem}.jpg', image[..., ::-1])
        write_image(folder / 'semantic' / split / f'{stem}.png', semantic_map(scene, instances))
        coco['images'].append({'id': index, 'file_name': f'{stem}.jpg', 'width': image_size, 'height': image_size})
        for annotation in coco_annotations(scene, instances):
            number = len(coco['annotations']) + 1
            coco['annotations'].append({'id': number, 'image_id': index, **annotation})
        rows += [(f'{stem}.jpg', text) for text in texts]
    (folder / 'annotations').mkdir(exist_ok=True)
    (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco))
    with open(folder / f'captions_{split}.csv', 'w', newline='') as file:
        csv.writer(file).writerows([('image', 'caption'), *rows])


def is_written(root: Path, meta: dict) -> bool:
    """Whether ``root`` already is the set that ``meta`` describes."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = dict(json.loads((root / 'meta.json').read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f'{root} exists and is not a set of scenes (no readable meta.json): remove it or choose another folder.'
        ) from error
    if found != meta:
        differing = ', '.join(key for key in meta if found.get(key) != meta[key])
        raise InputError(
            f'{root} holds a set of scenes with other parameters ({differing}): '
            'remove it, choose another folder or ask for the same parameters.'
        )
    return True


def write_scenes(root: Path, num_train: int, num_val: int, image_size: int = 96, seed: int = 0) -> None:
    """Writes a data set of scenes, whole or not at all, or reuses the same one.

    Under ``root``: ``{train,val}/<class>/<id>.jpg``, ``annotations/instances_{train,val}.json``
    (COCO), ``semantic/{train,val}/<class>/<id>.png`` with ``semantic/classes.json`` (index =
    label), ``captions_{train,val}.csv`` (columns image, caption; two rows an image) and
    ``meta.json`` (the parameters). File names are relative to the folder of the split.

    Args:
        root: folder to write; it may exist if it is empty or holds the same set.
        num_train: number of training images.
        num_val: number of validation images.
        image_size: side of the images in pixels.
        seed: image i of a split depends only on the seed, the split, i and the image size.

    Raises:
        InputError: on parameters out of range, a folder with something else in it, or a folder
            that cannot be written.
    """
    root = Path(root)
    meta = {'version': VERSION, 'num_train': num_train, 'num_val': num_val, 'image_size': image_size, 'seed': seed}
    for key, least in (('num_train', len(KINDS)), ('num_val', len(KINDS)), ('image_size', 48), ('seed', 0)):
        if meta[key] < least:
            raise InputError(f'{key} is {meta[key]}: it has to be at least {least}.')
    if is_written(root, meta):
        print(f'{root}: reusing the scenes written before.')
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as temporary:
            folder = Path(temporary) / root.name
            with ProcessPoolExecutor() as pool:
                write_split(pool, folder, 'train', num_train, image_size, seed)
                write_split(pool, folder, 'val', num_val, image_size, seed)
            (folder / 'semantic' / 'classes.json').write_text(json.dumps(SEMANTIC_CLASSES))
            (folder / 'meta.json').write_text(json.dumps(meta, indent=2))
            os.replace(folder, root)
    except OSError as error:
        raise InputError(f'{root} could not be written ({error.strerror}): choose another folder.') from error
