"""What pages show of a model: what it sees and predicts, neighbours, curves of training; and the paper's figures.

The same inputs and seed give the same files.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from mmmilan.files import atomic_write
from mmmilan.models.vit import last_attention
from mmmilan.visualization.page import Page, plain_text

DPI = 150
WIDTH, LINE, SCALE = 1.5, 0.25, 0.6  # inches: width of an image, height of a line, width of the scale of colours


def add_predictions(
    page: Page, milan: nn.Module, backbones: dict[str, nn.Module], images: Tensor, names: list[str]
) -> None:
    """Add a section on what a model sees and predicts.

    Args:
        page: The page.
        milan: The model, in evaluation mode.
        backbones: Name -> encoder whose attention is shown.
        images: Normalised images [B, 3, H, W].
        names: What each image shows.
    """
    page.heading(
        'What MILAN sees and predicts',
        'From left to right: the image; the importance that the teacher gives each patch; the patches drawn by '
        'importance, which are all that the encoder sees; the loss of each patch; and the attention of the class token '
        'in the last block of each encoder. Each map has a scale of its own, from its lowest value to its highest: '
        'bright is high, and of the loss dark green.',
    )
    header = ['image', 'importance', 'visible', 'loss', *(f'attention: {name}' for name in backbones)]
    page.gallery(header, draw_predictions(milan, backbones, images), names)


@torch.no_grad()
def draw_predictions(milan: nn.Module, backbones: dict[str, nn.Module], images: Tensor) -> list[list[np.ndarray]]:
    """For each normalised image [B, 3, H, W]: image, importance, mask, loss, and the attention of each backbone.

    Without a teacher the importance is left grey.
    """
    attention = [last_attention(backbone, images) for backbone in backbones.values()]
    originals = to_images(images, milan.data_preprocessor)
    rows = []
    for i, (image, sample) in enumerate(zip(originals, milan.predict(images), strict=True)):
        importance = sample.importance if 'importance' in sample else torch.zeros(len(sample.mask))
        row = [image, draw_heat(image, importance, 'inferno'), draw_masked(image, sample.mask)]
        row += [draw_heat(image, sample.patch_loss, 'Greens')]
        rows.append(row + [draw_heat(image, maps[i], 'inferno') for maps in attention])
    return rows


def nearest_neighbours(features: np.ndarray, queries: np.ndarray, count: int) -> np.ndarray:
    """Indices [Q, count] of the images nearest to each query by the cosine of features [M, D], without the query."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
    similarity = unit[queries] @ unit.T
    similarity[np.arange(len(queries)), queries] = -np.inf
    return np.argsort(-similarity, axis=1)[:, :count]


Curve = tuple[list[float], list[float]]


def read_scalars(folder: Path) -> list[dict]:
    """Read the log of MMEngine's visualizer in a work dir; for steps that several runs trained, the last run counts."""
    rows: list[dict] = []
    for path in sorted(folder.glob('*/vis_data/scalars.json')):
        run = [row for line in path.read_text(errors='replace').splitlines() if (row := _read_row(line))]
        if run:
            rows = [row for row in rows if row['step'] < run[0]['step']] + run
    return rows


def _read_row(line: str) -> dict[str, float]:
    """The numbers of a line of a log; {} for one that is not complete, as the last one of a killed run may be."""
    try:
        row = {key: value for key, value in json.loads(line).items() if isinstance(value, (int, float))}
    except (ValueError, AttributeError, RecursionError):
        return {}
    return row if 'step' in row else {}


def loss_curve(folder: Path) -> Curve:
    """Epochs and training losses of a work dir."""
    rows = [row for row in read_scalars(folder) if 'loss' in row and 'epoch' in row]
    if not rows:
        return [], []
    last = rows[-1]
    return [last['epoch'] * row['step'] / last['step'] for row in rows], [row['loss'] for row in rows]


def curve(rows: list[dict], place: str, key: str) -> Curve:
    """The values of a key in a log over a place, such as the step."""
    points = [(row[place], row[key]) for row in rows if place in row and key in row]
    return tuple(map(list, zip(*points, strict=True))) if points else ([], [])


def evaluation_curves(folder: Path) -> dict[str, Curve]:
    """Epochs and scores of ``OnlineEvaluationHook`` in a work dir, by the name of the score."""
    names = {'eval/knn': 'k-NN, %', 'eval/knn_mean': 'k-NN, mean token, %'}
    names |= {'eval/probe_10': 'probe, 10 % of labels', 'eval/probe_10_mean': 'probe, 10 % of labels, mean token'}
    names |= {'eval/rankme': 'RankMe', 'eval/cosine_patches': 'cosine to the teacher'}
    rows = read_scalars(folder)
    return {name: curve(rows, 'eval/epoch', key) for key, name in names.items()}


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


PICTURE = 640  # pixels of the longer side of a drawn picture, at most
DRAWN_FROM = 0.3  # score from which a predicted object is drawn
Colour = tuple[int, int, int]


def reduced(image: np.ndarray) -> np.ndarray:
    """An image [H, W, 3] with its longer side at most :data:`PICTURE`, to draw on."""
    factor = PICTURE / max(image.shape[:2])
    if factor >= 1:
        return np.ascontiguousarray(image)
    height, width = (max(1, round(factor * side)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def draw_result(
    image: np.ndarray, task: str, result: Mapping[str, np.ndarray], classes: Sequence[str], colours: Sequence[Colour]
) -> np.ndarray:
    """Draw what was predicted for an image, or annotated, on the image or a reduced one.

    Args:
        image: RGB uint8 [h, w, 3].
        task: 'classification', 'detection' or 'segmentation'.
        result: As :mod:`mmmilan.evaluation.predictions` gives it, in pixels of the image's own size.
        classes: Names of the classes.
        colours: Of the classes.
    """
    if task == 'classification':
        return draw_lines(image, class_lines(result, classes))
    if task == 'segmentation':
        labels = cv2.resize(result['map'], image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        return draw_labels(image, labels, colours)
    return draw_objects(enlarged(image, 320), result, classes, colours)


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """The image, a whole number of times as large so that names fit on its shorter side; a long one stays as it is."""
    zoom = min(-(-side // min(image.shape[:2])), 2 * PICTURE // max(image.shape[:2]))
    return image if zoom <= 1 else cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)


def class_lines(result: Mapping[str, np.ndarray], classes: Sequence[str]) -> list[str]:
    """The first three classes of a prediction in words, or those of an annotation."""
    names = [classes[label] for label in result['labels'][:3]]
    if 'scores' not in result:
        return names
    return [f'{name} {100 * score:.0f} %' for name, score in zip(names, result['scores'], strict=False)]


def draw_lines(image: np.ndarray, lines: Sequence[str]) -> np.ndarray:
    """The image, enlarged if it is small, with lines of text below it."""
    image = enlarged(image, 160)
    font = ImageFont.truetype(findfont('DejaVu Sans'), 14)
    below = Image.new('RGB', (image.shape[1], 4 + 18 * len(lines)), 'white')
    for i, line in enumerate(lines):
        ImageDraw.Draw(below).text((4, 2 + 18 * i), line, 'black', font)
    return np.concatenate([image, np.asarray(below)])


def draw_labels(image: np.ndarray, labels: np.ndarray, colours: Sequence[Colour]) -> np.ndarray:
    """The image with each pixel in the colour of its class; ``labels`` is int [H, W], without a class beyond them."""
    known = labels < len(colours)
    table = np.array(colours, np.float32)[np.where(known, labels, 0)]
    return np.where(known[..., None], 0.3 * image + 0.7 * table, image).astype(np.uint8)


def draw_objects(
    image: np.ndarray, result: Mapping[str, np.ndarray], classes: Sequence[str], colours: Sequence[Colour]
) -> np.ndarray:
    """The image with the box, the mask and the class name of each object, see :func:`draw_result`."""
    if 'scores' in result:
        drawn = result['scores'] >= DRAWN_FROM
        result = {name: rows[drawn] for name, rows in result.items() if name != 'size'} | dict(size=result['size'])
    labels, (height, width) = result['labels'].tolist(), image.shape[:2]
    if not labels:
        return image
    names, own = [classes[label] for label in labels], [colours[label] for label in labels]
    if 'scores' in result:
        names = [f'{name} {100 * score:.0f} %' for name, score in zip(names, result['scores'], strict=True)]
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    if masks := [cv2.resize(mask.astype(np.uint8), (width, height)) for mask in result.get('masks', ())]:
        pixels = draw_segmentation_masks(pixels, torch.from_numpy(np.array(masks, bool)), alpha=0.5, colors=own)
    factor = height / result['size'][0], width / result['size'][1]
    boxes = torch.from_numpy(result['boxes']) * torch.tensor([factor[1], factor[0]] * 2, dtype=torch.float32)
    font = dict(font=findfont('DejaVu Sans'), font_size=13)  # this font is part of matplotlib
    pixels = draw_bounding_boxes(pixels, in_order(boxes), names, colors=own, width=2, **font)
    return pixels.permute(1, 2, 0).numpy()


def in_order(boxes: Tensor) -> Tensor:
    """Boxes whose right is not left of their left, nor their bottom above their top, by rounding."""
    return torch.cat([boxes[:, :2], torch.maximum(boxes[:, :2], boxes[:, 2:])], dim=1)


def class_colours(num_classes: int) -> list[Colour]:
    """One RGB colour (0 to 255) per class; those of classes that follow each other are far apart."""
    numbers = np.arange(num_classes)
    hues = numbers * (np.sqrt(5) - 1) / 2 % 1  # by the golden ratio, which fills the circle evenly
    colours = hsv_to_rgb(np.stack([hues, np.ones(num_classes), 1 - 0.2 * (numbers % 3)], axis=1))
    return [tuple(map(int, colour)) for colour in 255 * colours]


def colours_of(metainfo: Mapping[str, Any] | None, classes: Sequence[str]) -> list[Colour]:
    """A colour for each class: the palette of a data set if it has one of so many, else :func:`class_colours`."""
    palette = (metainfo or {}).get('palette')
    if isinstance(palette, (list, tuple)) and len(palette) == len(classes):
        return [tuple(map(int, colour)) for colour in palette]
    return class_colours(len(classes))


@plain_text
def draw_tsne(features: dict[str, np.ndarray], labels: np.ndarray, classes: Sequence[str], seed: int = 0) -> Figure:
    """Features in two dimensions by t-SNE, one panel per model, with the silhouette of the classes (paper, figure 2).

    The silhouette score (Rousseeuw, 1987) is computed from the features, with cosine distance, not from the
    two-dimensional points: 1 if each class is a cluster of its own, 0 if classes overlap.

    Args:
        features: Name of the model -> features [M, D].
        labels: Class of each image [M], an index into ``classes``.
        classes: Names of the classes, two or more.
        seed: Seed of t-SNE.
    """
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    figure = Figure(figsize=(3.2 * len(features), 3.8), layout='constrained')
    colours = np.array([hsv_to_rgb((i / len(classes), 0.85, 0.55 + 0.4 * (i % 2))) for i in range(len(classes))])
    for axes, (name, values) in zip(figure.subplots(1, len(features), squeeze=False)[0], features.items(), strict=True):
        values = values / np.linalg.norm(values, axis=1, keepdims=True)
        perplexity = min(30.0, (len(values) - 1) / 3)
        points = TSNE(init='pca', perplexity=perplexity, random_state=seed).fit_transform(values)
        axes.scatter(*points.T, c=colours[labels], s=6, linewidths=0)
        axes.set(title=name, xticks=[], yticks=[], box_aspect=1)
        if len(classes) < len(values):  # with one image a class there are no clusters
            axes.set_xlabel(f'silhouette {silhouette_score(values, labels, metric="cosine"):.3f}')
    handles = [axes.scatter([], [], color=colour, s=16) for colour in colours]
    style = dict(ncols=max(2, 2 * len(features)), fontsize=6, frameon=False)
    figure.legend(handles, classes, loc='outside lower center', **style)
    return figure


@plain_text
def draw_pictures(columns: dict[str, Sequence[np.ndarray]], colormap: str, quantity: str) -> Figure:
    """A grid of images over the scale of their heat maps: a row per image, a column per view (paper, figures 3 to 5).

    Args:
        columns: Title, of one line or more -> RGB uint8 images [H, W, 3], as many in each column.
        colormap: Of the heat maps, each of which :func:`draw_heat` scales by its own values.
        quantity: What they show, in a word.
    """
    gap = 4
    tiles = [
        [np.pad(image, ((0, gap), (0, gap), (0, 0)), constant_values=255) for image in c] for c in columns.values()
    ]
    canvas = np.concatenate([np.concatenate(column) for column in tiles], axis=1)
    height, width = canvas.shape[0] / tiles[0][0].shape[1], len(tiles)  # in widths of an image
    titles = LINE * (1 + max(title.count('\n') for title in columns))
    total = LINE + WIDTH * height + titles
    figure = Figure(figsize=(WIDTH * width, total))
    axes = figure.add_axes((0, LINE / total, 1, WIDTH * height / total))
    axes.imshow(canvas, interpolation='nearest', aspect='auto')
    axes.set_axis_off()
    for i, title in enumerate(columns):
        axes.annotate(title, ((i + 0.5) / width, 1), (0, 4), 'axes fraction', 'offset points', fontsize=8, ha='center')
    side = SCALE / (WIDTH * width)
    scale = figure.add_axes(((1 - side) / 2, 0.3 * LINE / total, side, 0.4 * LINE / total))
    scale.imshow(np.linspace(0, 1, 256)[None], cmap=colormap, aspect='auto')
    scale.set_axis_off()
    for text, x, offset, align in ((f'lowest {quantity}', 0, -4, 'right'), ('highest of each map', 1, 4, 'left')):
        place = dict(xycoords='axes fraction', textcoords='offset points', va='center', ha=align)
        scale.annotate(text, (x, 0.5), (offset, 0), fontsize=7, **place)
    return figure


def save_figure(figure: Figure, path: Path) -> bytes:
    """Write a figure as ``path`` with .png and .pdf at its end, with the same bytes each time; returns the PNG."""
    for ending, metadata in (('.pdf', dict(CreationDate=None)), ('.png', dict(Software=None))):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=ending[1:], dpi=DPI, metadata=metadata)
        with atomic_write(path.with_name(f'{path.name}{ending}')) as temporary:
            Path(temporary).write_bytes(buffer.getvalue())
    return buffer.getvalue()
