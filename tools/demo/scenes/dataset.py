"""Write the data set: images, COCO instances, label maps and captions."""

from __future__ import annotations

import csv
import json
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from mmmilan.errors import InputError
from mmmilan.files import atomic_folder
from scenes.appearance import KINDS, SEMANTIC_CLASSES, Array
from scenes.drawing import Scene, make_scene

VERSION = 2  # increase it whenever the same seed no longer gives the same files


def polygons(mask: Array) -> list[list[float]]:
    """COCO polygons that decode to exactly this mask (bool [H, W]), one per connected part.

    Outlines are traced on the mask at twice its size, a quarter of a pixel inside its edge. COCO polygons have no
    holes, so a mask with a hole is cut in two along a column through the hole.
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
    """The label map of a scene: an index into ``SEMANTIC_CLASSES`` for each pixel, uint8 [H, W]."""
    names = [scene.background, *(item.kind for item in scene.objects)]
    return np.array([SEMANTIC_CLASSES.index(name) for name in names], np.uint8)[instances]


def write_image(path: Path, image: Array) -> None:
    """Write a BGR image as JPEG without chroma subsampling, or a label map as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = []
    if path.suffix != '.png':
        options = [cv2.IMWRITE_JPEG_QUALITY, 92]
        options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    path.write_bytes(cv2.imencode(path.suffix, image, options)[1])


def write_split(pool: Executor, folder: Path, split: str, num_images: int, image_size: int, seed: int) -> None:
    """Draw and write the scenes of a split."""
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
    """Whether ``root`` already holds the data set with the parameters ``meta``.

    Raises:
        InputError: it holds something else.
    """
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = dict(json.loads((root / 'meta.json').read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f'{root} exists and is not a set of scenes (no readable meta.json); remove it or choose another folder.'
        ) from error
    if found != meta:
        differing = ', '.join(key for key in meta if found.get(key) != meta[key])
        raise InputError(
            f'{root} holds a set of scenes with other parameters ({differing}); '
            'remove it, choose another folder or ask for the same parameters.'
        )
    return True


def write_scenes(root: Path, num_train: int, num_val: int, image_size: int = 96, seed: int = 0) -> None:
    """Write a data set of scenes, whole or not at all; reuse it if it is there already.

    The files below ``root`` are ``{train,val}/<class>/<id>.jpg``, ``annotations/instances_{train,val}.json`` (COCO),
    ``semantic/{train,val}/<class>/<id>.png`` with ``semantic/classes.json`` (index = label),
    ``captions_{train,val}.csv`` (columns image, caption; two rows per image) and ``meta.json`` (the parameters). File
    names in them are relative to the folder of the split.

    Args:
        root: folder to write; it may exist if it is empty or holds the same set.
        num_train: number of training images.
        num_val: number of validation images.
        image_size: side of the images in pixels.
        seed: image i of a split depends only on the seed, the split, i and the image size.

    Raises:
        InputError: a parameter is out of range, or the folder holds something else or cannot be written.
    """
    root = Path(root)
    meta = {'version': VERSION, 'num_train': num_train, 'num_val': num_val, 'image_size': image_size, 'seed': seed}
    for key, least in (('num_train', len(KINDS)), ('num_val', len(KINDS)), ('image_size', 48), ('seed', 0)):
        if meta[key] < least:
            raise InputError(f'{key}={meta[key]} is too small; choose at least {least}.')
    if is_written(root, meta):
        print(f'{root}: reusing the scenes written before.')
        return
    with atomic_folder(root) as folder:
        with ProcessPoolExecutor() as pool:
            write_split(pool, folder, 'train', num_train, image_size, seed)
            write_split(pool, folder, 'val', num_val, image_size, seed)
        (folder / 'semantic' / 'classes.json').write_text(json.dumps(SEMANTIC_CLASSES))
        (folder / 'meta.json').write_text(json.dumps(meta, indent=2))
