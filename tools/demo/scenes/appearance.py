"""The appearance of objects and backgrounds: outlines, patterns, colours and textures."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

Array = np.ndarray
Rng = np.random.Generator
Colour = tuple[float, float, float]  # RGB in [0, 1]

CREAM: Colour = (0.98, 0.96, 0.90)  # the second colour of a pattern

# ---- Shapes: closed outlines in the unit circle, filled by the even-odd rule --------------------


def polar(radius: float | list[float], angle: Array) -> Array:
    """Points [K, 2] at these radii and angles."""
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)


def regular(corners: int, radius: float = 1.0) -> Array:
    """The corners [corners, 2] of a regular polygon."""
    return polar(radius, np.arange(corners) * 2 * np.pi / corners)


def repeated(radii: list[float], angles: list[float], times: int) -> Array:
    """The corners at (radii, angles), repeated ``times`` around the centre: [times * len(radii), 2]."""
    turns = np.arange(times)[:, None] * 2 * np.pi / times
    return polar(np.tile(radii, times), (turns + angles).ravel())


def crescent() -> Array:
    """The unit disc without the disc of radius 0.8 around (0.5, 0)."""
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
# Kind -> colour and pattern; in alphabetical order, in which readers of image folders number the classes.
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
    """Smooth noise [size, size] in about [0, 1], with this number of columns and rows of random cells."""
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
