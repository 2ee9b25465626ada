"""Pictures of what a masked model sees and predicts (paper, figures 3 to 5). Images are RGB uint8 [H, W, 3]."""

from __future__ import annotations

import io
from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

MASKED_GREY = 225


def to_images(normalised: Tensor, data_preprocessor: nn.Module) -> list[np.ndarray]:
    """Undo the normalisation of images [B, 3, H, W] by MMEngine's data preprocessor; RGB uint8 [H, W, 3] each."""
    mean, std = (each.cpu().view(3, 1, 1) for each in (data_preprocessor.mean, data_preprocessor.std))
    pixels = (normalised.cpu() * std + mean).round().clamp(0, 255)
    return list(pixels.permute(0, 2, 3, 1).byte().numpy())


def patch_map(values: Tensor, image: np.ndarray) -> np.ndarray:
    """Values of square patches [N] as a float32 array [H, W] of the image's size, constant within each patch."""
    height, width = image.shape[:2]
    rows = round((len(values) * height / width) ** 0.5)
    grid = values.float().cpu().numpy().reshape(rows, -1)
    return cv2.resize(grid, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)


def draw_masked(image: np.ndarray, mask: Tensor) -> np.ndarray:
    """The image with its masked patches in grey; ``mask`` is bool [N], True = masked."""
    masked = patch_map(mask, image)[..., None] > 0.5
    return np.where(masked, MASKED_GREY, image).astype(np.uint8)


def draw_heat(
    image: np.ndarray,
    values: Tensor,
    colormap: str,
    opacity: float = 0.75,
    limits: tuple[float, float] | None = None,
) -> np.ndarray:
    """Draw a heat map over the grey image.

    Args:
        image: RGB uint8 [H, W, 3].
        values: Value of each patch [N]; a patch of value NaN keeps its colours.
        colormap: Name of one of matplotlib's.
        opacity: Of the heat map, 0 to 1.
        limits: The values at the two ends of the colormap, by default the minimum and the maximum of ``values``.
    """
    heat = patch_map(values, image)
    low, high = limits or (np.nanmin(heat), np.nanmax(heat))
    scaled = (heat - low) / max(high - low, 1e-12)
    colour = matplotlib.colormaps[colormap](np.nan_to_num(scaled))[..., :3] * 255
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    blended = opacity * colour + (1 - opacity) * grey
    return np.where(np.isnan(heat)[..., None], image, blended).astype(np.uint8)


def draw_curve(epochs: list[float], values: list[float], title: str) -> str:
    """Draw values over epochs as an SVG element."""
    figure = Figure(figsize=(3.4, 2.4), layout='constrained')
    axes = figure.subplots()
    axes.plot(epochs, values, color='#2563eb', linewidth=1.2, marker='o' if len(values) < 30 else None, markersize=3)
    axes.set(title=title, xlabel='epoch')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.25)
    buffer = io.StringIO()
    figure.savefig(buffer, format='svg')
    text = buffer.getvalue()
    return text[text.index('<svg') :]


def draw_labels(image: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """The image with each pixel in the colour of its class; ``labels`` is int [H, W]."""
    masks = torch.from_numpy(labels)[None] == torch.arange(num_classes)[:, None, None]
    return _to_array(draw_segmentation_masks(_to_tensor(image), masks, alpha=0.7, colors=class_colours(num_classes)))


def draw_objects(
    image: np.ndarray, boxes: Tensor, masks: Tensor, labels: Tensor, classes: Sequence[str], zoom: int = 3
) -> np.ndarray:
    """The image, enlarged ``zoom`` times, with the box, the mask and the class name of each object.

    Args:
        image: RGB uint8 [H, W, 3].
        boxes: Left, top, right, bottom in pixels [K, 4].
        masks: bool [K, H, W].
        labels: Index of each object into ``classes`` [K].
    """
    enlarged = _to_tensor(cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC))
    if len(labels):
        colours = [class_colours(len(classes))[label] for label in labels]
        masks = masks.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
        enlarged = draw_segmentation_masks(enlarged, masks, alpha=0.5, colors=colours)
        names = [classes[label] for label in labels]
        font = dict(font=findfont('DejaVu Sans'), font_size=8 * zoom)  # this font is part of matplotlib
        enlarged = draw_bounding_boxes(enlarged, zoom * boxes, names, colors=colours, width=2, **font)
    return _to_array(enlarged)


def class_colours(num_classes: int) -> list[tuple[int, int, int]]:
    """One RGB colour (0 to 255) per class, with evenly spaced hues."""
    hues = matplotlib.colormaps['hsv'](np.linspace(0, 1, num_classes, endpoint=False))
    return [tuple(int(255 * channel) for channel in colour[:3]) for colour in hues]


def _to_tensor(image: np.ndarray) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def _to_array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()
