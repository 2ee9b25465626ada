"""Check COCO annotations and label maps, and name the faults that mmdet and mmseg would drop, misread or crash on."""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.dist import is_main_process
from rich.progress import track

from mmmilan.datasets.classes import IGNORE, as_name, locate, rewrite
from mmmilan.datasets.decoding import open_header, read_bytes
from mmmilan.errors import InputError, listed, warn
from mmmilan.files import first_line
from mmmilan.registry import TRANSFORMS

LOOKED_AT = 1000  # label maps of a split at most
LOOKED_AT_PAIRS = 100  # of two classes at least, where 255 may be one of them
Palettes = dict[bytes, tuple[int, str]]  # colour -> the value that has it, and the first map that does
MASK = re.compile(rb'"segmentation"\s*:\s*(?!\s|null|""|\{\s*\}|\[(?:\s|,|\[\s*\])*\])')
PARTS = ('images', 'categories', 'annotations')


def check_coco(content: dict[str, Any], path: Path) -> None:
    """Check boxes and masks in COCO's format.

    Args:
        content: The parsed file.
        path: Its name, for the error.

    Raises:
        InputError: an entry is wrong; the message names the file and its first wrong entry.
    """
    lists = [content.get(name, []) for name in PARTS]
    if not all(isinstance(each, list) for each in lists):
        raise InputError(f"{path} is not in COCO's format: {', '.join(PARTS)} must be lists; convert it.")
    fault = next(find_faults(*lists), None)
    if fault:
        raise InputError(f'{path}, {fault}; correct or remove this entry.')


def find_faults(images: list, categories: list, annotations: list) -> Iterator[str]:
    """Yield what is wrong in COCO's three lists, each fault with the position of its entry in the file."""
    known: dict[str, set] = {}
    required = dict(images=(images, 'file_name'), categories=(categories, 'name'), annotations=(annotations, ''))
    for part, (entries, text) in required.items():
        known[part] = set()
        for index, entry in enumerate(entries):
            number = entry.get('id') if isinstance(entry, dict) else None
            if not isinstance(number, (int, str)):
                yield f'{part}[{index}] has no id'
            elif number in known[part]:
                yield f'{part}[{index}] has the id {number} of an earlier one'
            elif text and not isinstance(entry.get(text), str):
                yield f'{part}[{index}] has no {text}'
            known[part].add(number)
    for index, image in enumerate(images):
        for side in ('width', 'height'):
            if not is_size(image.get(side)):
                yield f'images[{index}] ({image["file_name"]}) has the {side} {image.get(side)!r}'
    names: set[str] = set()
    for index, category in enumerate(categories):
        name = as_name(category['name'])
        if name in names:
            yield f'categories[{index}] has the name {name} of an earlier one'
        names.add(name)
    sizes = {image['id']: [image['height'], image['width']] for image in images}
    for index, annotation in enumerate(annotations):
        fault = annotation_fault(annotation, sizes, known['categories'])
        if fault:
            yield f'annotations[{index}] (id {annotation["id"]}) has {fault}'


def annotation_fault(annotation: dict[str, Any], sizes: dict[int | str, list[int]], categories: set) -> str:
    """What is wrong with an annotation; '' if nothing is.

    Args:
        annotation: The annotation.
        sizes: Id of each image -> [height, width].
        categories: Ids of the categories.
    """
    for name, known in (('image_id', sizes), ('category_id', categories)):
        value = annotation.get(name)
        if not isinstance(value, (int, str)) or value not in known:
            return f'the unknown {name} {value!r}'
    box = annotation.get('bbox')
    if not is_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        return f'the bbox {box!r}, which is not x, y, width and height'
    if not is_numbers([annotation.get('area')]) or annotation['area'] < 0:  # in COCO's scores it would be ignored
        return f'the area {annotation.get("area")!r}'
    mask = annotation.get('segmentation') or []
    size = sizes[annotation['image_id']]
    if isinstance(mask, dict) and mask.get('size') == size and count_rle(mask.get('counts')) == math.prod(size):
        return ''
    if not isinstance(mask, list) or not all(is_numbers(each) and len(each) % 2 == 0 for each in mask):
        return "a segmentation that is neither polygons x, y, x, y, ... nor an RLE of the image's size"
    return ''


def count_rle(counts: Any) -> int:
    """The number of pixels in all runs of an RLE of COCO, a list or a text; -1 if it is none.

    Of one with too few pycocotools fills the mask with whatever lies in memory.
    """
    if isinstance(counts, list):
        return sum(counts) if all(type(each) is int and each >= 0 for each in counts) else -1
    if not isinstance(counts, str) or not counts.isascii():
        return -1
    # Groups of 6-bit digits, the lowest first; 32 says that another one follows, 16 in the last one is the sign.
    digits = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 32 == 0)
    sizes = np.diff(ends, prepend=-1)
    if not len(ends) or ends[-1] != len(digits) - 1 or sizes.max() > 8 or digits.min() < 0 or digits.max() > 63:
        return -1
    starts = ends - sizes + 1
    runs = np.add.reduceat((digits & 31) << 5 * (np.arange(len(digits)) - np.repeat(starts, sizes)), starts)
    runs -= np.where(digits[ends] & 16, 1 << 5 * sizes, 0)
    runs[1::2], runs[2::2] = runs[1::2].cumsum(), runs[2::2].cumsum()  # stored as differences
    return int(runs.sum()) if runs.min() >= 0 else -1


def category_ids(categories: dict[int, dict], classes: Sequence[str]) -> list[int]:
    """The ids of COCO categories in the order of ``classes``.

    Args:
        categories: Categories by id; one without objects is added, with a negative id, for each class that is missing.
        classes: Names of the classes.
    """
    ids = {as_name(category['name']): number for number, category in categories.items()}
    for place, name in enumerate(map(as_name, classes)):
        if name not in ids:
            ids[name] = -1 - place
            categories[ids[name]] = dict(id=ids[name], name=name)
    return [ids[name] for name in map(as_name, classes)]


def has_masks(path: Path) -> bool:
    """Whether an annotation file has a segmentation that is not empty."""
    return holds(path, MASK)


def holds(path: Path, *patterns: re.Pattern[bytes]) -> bool:
    """Whether a file has all of some patterns; as fast as it is read."""
    with path.open('rb') as file, suppress(ValueError), mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return all(pattern.search(content) for pattern in patterns)
    return False  # an empty file


def is_size(value: Any) -> bool:
    """Whether it is a positive integer."""
    return type(value) is int and value > 0


def is_numbers(values: Any) -> bool:
    """Whether it is a list of finite numbers."""
    return isinstance(values, list) and all(type(value) in (int, float) and math.isfinite(value) for value in values)


@TRANSFORMS.register_module()
class LoadLabelMap(BaseTransform):
    """Read ``results['seg_map_path']`` into ``results['gt_seg_map']``, uint8 [H, W]: a strict ``LoadAnnotations``.

    mmseg's ``LoadAnnotations`` lets 16-bit labels wrap around, and with colour images, maps of another size or labels
    out of range the loss fails later or is silently wrong. An RGB image of grey pixels is read as their values. With
    ``results['label_table']`` of :class:`mmmilan.datasets.LabelledImages` the file may have any values, or colours,
    that the table names.

    Args:
        num_classes: Labels are 0 to ``num_classes - 1``; 255 marks unlabelled pixels. With the data set's
            ``reduce_zero_label``, the file has 1 to ``num_classes``; 0 marks unlabelled pixels.
        backend_args: MMEngine's file backend that holds the maps.

    Raises:
        InputError: the map is missing, does not decode, has more than 8 bits or colours, differs from its image in
            size, or has a label out of range.
    """

    def __init__(self, num_classes: int, backend_args: dict | None = None) -> None:
        self.num_classes = num_classes
        self.backend_args = backend_args

    def transform(self, results: dict) -> dict:
        path = results['seg_map_path']
        content, table = read_bytes(path, self.backend_args), results.get('label_table')
        if table:
            labels = apply_table(read_values(content, path, has_colours(table)), table, path)
        else:
            labels = read_label_map(content, path, results['reduce_zero_label'])
        check_size(labels, results['ori_shape'][:2], path)
        check_labels(np.bincount(labels.ravel(), minlength=256), self.num_classes, path, results['reduce_zero_label'])
        table = np.arange(IGNORE + 1, dtype=np.uint8)
        for old, new in (results.get('label_map') or {}).items():
            table[old] = new
        results['gt_seg_map'] = table[labels]
        results['seg_fields'].append('gt_seg_map')
        return results


def read_values(content: bytes, path: str, colours: bool) -> np.ndarray:
    """Decode a label map -> its values, uint8 [H, W]; or its colours R << 16 | G << 8 | B, int32 [H, W].

    An RGB image of grey pixels has values too: many tools save masks so.

    Raises:
        InputError: the file does not decode, or is in colours where there is no table of them.
    """
    try:
        with open_header(content) as image:
            # Pillow reads 16 bits of several channels as the high ones, in a mode of 8; how it unpacks them tells.
            deep = re.search(r'\w+;16', str(image.tile))
            mode = deep[0] if deep else image.mode
            if not colours and mode in ('L', 'P', '1'):
                return np.array(image).astype(np.uint8)
            pixels = None if deep or mode in 'IF' else np.array(image.convert('RGB')).astype(np.int32)
    except Exception as error:  # of any type, as the file may hold anything
        raise InputError(f'{path} does not decode ({first_line(error)}); replace it.') from error
    if pixels is None:
        raise InputError(f'{path} is an image of mode {mode}; give label maps of 8 bits.')
    if colours:
        return pixels @ np.array([1 << 16, 1 << 8, 1], np.int32)
    if (pixels != pixels[..., :1]).any():
        raise InputError(
            f'{path} is an RGB image in colours; give label maps with one 8-bit channel, or to finetune a table of the '
            'colours in classes.json: {"NAME": [R, G, B], ...}.'
        )
    return pixels[..., 0].astype(np.uint8)


def check_size(values: np.ndarray, size: Sequence[int], path: str) -> None:
    """Raise an :class:`InputError` if a map [H, W] has not the height and width of its image."""
    if values.shape != tuple(size):
        own, other = (' x '.join(map(str, each[::-1])) for each in (values.shape, size))
        raise InputError(f'{path} is {own}, but its image {other} (width x height); make them equal.')


def apply_table(values: np.ndarray, table: Sequence[tuple[int | list[int], int]], path: str) -> np.ndarray:
    """The labels, uint8 [H, W], of the values or colours of a map, see :func:`read_values`.

    Args:
        values: [H, W].
        table: Pairs of a value, or of a colour [R, G, B], and its label; a value 255 that is not in it is ignored.
        path: The file, for the error.

    Raises:
        InputError: a value is not in the table.
    """
    known = {as_code(value): label for value, label in table}
    if not has_colours(table):
        known.setdefault(IGNORE, IGNORE)
    own, places = np.unique(values, return_inverse=True)
    wrong = [value for value in own.tolist() if value not in known]
    if wrong:
        shown = listed(show_code(value, has_colours(table)) for value in wrong)
        raise InputError(
            f'{path} has {shown} in {np.isin(values, wrong).sum()} pixels, which no class has; correct the map, or '
            'name them.'
        )
    return np.array([known[value] for value in own.tolist()], np.uint8)[places].reshape(values.shape)


def has_colours(table: Sequence[tuple[int | list[int], int]]) -> bool:
    """Whether a table of labels is one of colours."""
    return any(not isinstance(value, int) for value, _ in table)


def as_code(value: int | Sequence[int]) -> int:
    """A value, or a colour [R, G, B] as the number R << 16 | G << 8 | B."""
    return value if isinstance(value, int) else value[0] << 16 | value[1] << 8 | value[2]


def show_code(code: int, colour: bool) -> str:
    """A value or a colour for a message."""
    return f'({code >> 16}, {code >> 8 & 255}, {code & 255})' if colour else str(code)


def check_labels(pixels: np.ndarray, num_classes: int, path: str, reduced: bool) -> None:
    """Check that the labels of a map are those of classes, or 255.

    Args:
        pixels: Number of pixels [256] of each label.
        num_classes: Number of classes.
        path: The file, for the error.
        reduced: Whether the file has 1 to ``num_classes``, from which 1 was subtracted.

    Raises:
        InputError: there are others.
    """
    wrong = [label for label in np.flatnonzero(pixels).tolist() if num_classes <= label != IGNORE]
    if wrong:
        first = int(reduced)
        remedy = f'num_classes={num_classes} of the model and of LoadLabelMap'
        if wrong == [num_classes] and not pixels[0] and not reduced:
            remedy += ', or set reduce_zero_label=True if 0 marks pixels without a class'
        raise InputError(
            f'{path} has the label{"s" * (len(wrong) > 1)} {listed(str(label + first) for label in wrong)} in '
            f'{pixels[wrong].sum()} pixels, '
            f'where {first} to {num_classes - 1 + first} are possible; correct the map, or {remedy}.'
        )


def read_label_map(content: bytes, path: str, reduce_zero_label: bool = False) -> np.ndarray:
    """As :func:`read_values`, uint8 [H, W]; with ``reduce_zero_label``, 0 becomes 255, and others are less by 1."""
    labels = read_values(content, path, False)
    if reduce_zero_label:
        labels[labels == 0] = IGNORE
        labels[labels != IGNORE] -= 1
    return labels


def check_palette(path: str, content: bytes, values: Iterable[int], known: Palettes) -> None:
    """Check that a map with a palette has no colour at another value than the maps before it.

    Args:
        path: The file.
        content: What is in it; a file without a palette, or not of PNG or GIF, is left alone.
        values: The values of its pixels.
        known: Colour -> value and file of the maps before it, to which those of this one are added.

    Raises:
        InputError: it has.
    """
    with open_header(content) as image:
        mode, palette = image.palette.getdata() if image.mode == 'P' and image.palette else ('', b'')
    colours = [palette[3 * i : 3 * i + 3] for i in range(len(palette) // 3)] if mode == 'RGB' else []
    for value in values:
        if value >= len(colours) or colours.count(colours[value]) > 1:
            continue
        other, first = known.setdefault(colours[value], (value, path))
        if other != value:
            raise InputError(
                f'{path} has the colour {tuple(colours[value])} at {value} of its palette, {first} at {other}: the '
                'values of label maps must mean the same; write them with one palette, or without.'
            )


def unclear_pair(present: Mapping[str, set[int]]) -> str:
    """Why 255 may be the second of two classes, as in maps of 0 and 255 beside those of 0 and 1; '' if it is not.

    Args:
        present: Map -> the values in it.
    """
    first = {frozenset(values & {0, 1, IGNORE}): path for path, values in present.items()}
    pairs = [first.get(frozenset(values)) for values in ((0, 1), (0, IGNORE))]
    if not all(pairs) or any({1, IGNORE} <= values for values in first):
        return ''
    return f'{pairs[0]} has the values 0 and 1, {pairs[1]} 0 and {IGNORE}, and no map has 1 and {IGNORE}'


def check_label_maps(dataset: BaseDataset, palettes: Palettes | None = None) -> None:
    """Look at label maps of a split before it is used, until each class has been seen.

    If there are two classes, and pixels of 0 and 255 only, 255 becomes the second class in ``dataset``.

    Args:
        dataset: A data set of MMSegmentation; others are left alone.
        palettes: Those of other splits, see :func:`check_palette`.

    Raises:
        InputError: the classes have no names, a map has a label out of range, maps have palettes of another order, or
            no pixel has a class.
    """
    if not len(dataset) or not hasattr(dataset, 'reduce_zero_label') or 'seg_map_path' not in dataset.get_data_info(0):
        return
    classes = dataset.metainfo.get('classes')
    if not classes:
        raise InputError(
            f'{locate(dataset)} has no names of classes; set metainfo=dict(classes=[...]) of its data set.'
        )
    in_files = type(dataset).METAINFO.get('classes') or classes
    pixels, looked_at, unclear = count_pixels(dataset, len(in_files), {} if palettes is None else palettes)
    where = f'{looked_at} of the {len(dataset)} label maps of {locate(dataset)}'
    if len(in_files) == 2 and pixels[0] and pixels[IGNORE] and not pixels[1:IGNORE].any():
        rewrite(dataset, lambda entry: entry.update(label_map={0: 0, 1: 1} | (entry['label_map'] or {}) | {IGNORE: 1}))
        warn(f'{where} have the values 0 and 255: 255 is taken for the class {in_files[1]}.')
        return
    if unclear:
        warn(f'{unclear}: {IGNORE} is taken for pixels without a class; write 1 where it is {in_files[1]}.')
    seen = np.flatnonzero(pixels[: len(in_files)])
    first = int(dataset.reduce_zero_label)
    values = listed(str(0 if first and value == IGNORE else value + first) for value in np.flatnonzero(pixels))
    if not len(seen):
        raise InputError(f'No pixel of {where} has a class (their values: {values}); write labels from {first}.')
    lacking = [name for label, name in enumerate(in_files) if label not in seen]
    if len(seen) == 1:
        warn(f'Only the class {in_files[seen[0]]} occurs in {where} (values {values}): there is nothing to tell apart.')
    elif lacking:
        warn(f'{len(lacking)} of {len(in_files)} classes do not occur in {where}: {listed(lacking)}.')


def count_pixels(dataset: BaseDataset, num_classes: int, palettes: Palettes) -> tuple[np.ndarray, int, str]:
    """Number of pixels [256] of each label in the label maps of a split, of how many maps, and :func:`unclear_pair`."""
    pixels, reduced = np.zeros(256, int), dataset.reduce_zero_label
    order = np.random.default_rng(0).permutation(len(dataset))[:LOOKED_AT]
    present, quiet = {}, not is_main_process()
    two = num_classes == 2 and not reduced
    for index in track(order, 'Looking at label maps', transient=True, disable=quiet):
        path = dataset.get_data_info(int(index))['seg_map_path']
        content = read_bytes(path, dataset.backend_args)
        own = np.bincount(read_label_map(content, path, reduced).ravel(), minlength=256)
        check_labels(own, num_classes, path, reduced)
        pixels = pixels + own
        present[path] = set(np.flatnonzero(own).tolist())
        if not reduced:
            check_palette(path, content, present[path], palettes)
        if pixels[:num_classes].all() and len(present) >= (LOOKED_AT_PAIRS if two else 1):
            break
    return pixels, len(present), unclear_pair(present) if two else ''
