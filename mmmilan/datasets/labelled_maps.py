"""Label maps beside images: which belongs to which, and what the values or colours in them mean."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from mmmilan.datasets.annotations import as_code, check_palette, check_size, read_values, show_code, unclear_pair
from mmmilan.datasets.classes import IGNORE, Names, as_name, names_of
from mmmilan.datasets.decoding import images_of_any_size, open_header, read_bytes
from mmmilan.datasets.object_formats import by_lists, list_images_of, size_of
from mmmilan.datasets.splits import WORD, choose_parts, role_of
from mmmilan.errors import InputError, count, listed
from mmmilan.files import extension

MAPS = {'mask', 'masks', 'label', 'labels', 'annotation', 'annotations', 'annot', 'gt', 'groundtruth', 'truth', 'seg'}
MAPS |= {'segmentation', 'segmentations', 'semantic', 'segmap', 'segmaps', 'trimaps', 'maps', 'map', 'labelmaps'}
OTHER_MAPS = {'object', 'instance', 'instances', 'panoptic', 'depth', 'instanceids', 'color', 'colour'}
IMAGES = {
    'image',
    'images',
    'img',
    'imgs',
    'jpegimages',
    'jpeg',
    'photo',
    'photos',
    'rgb',
    'pictures',
    'input',
    'inputs',
}
# What stands behind the name of an image or of its map.
ENDINGS = re.compile(
    r'[_-](mask|masks|label|labels|gt|seg|segmentation|annotation|l|labelids|labeltrainids|gtfine|'
    r'leftimg8bit|img|image|rgb|sat|im|mask_\d+)$',
    re.IGNORECASE,
)
# What stands behind it in maps of other kinds, beside the label map: Cityscapes' x_gtFine_color.png.
OTHER_ENDINGS = re.compile(rf'[_-]({"|".join(sorted(OTHER_MAPS))})(?=\.\w+$)', re.IGNORECASE)
LOSSLESS = ('.png', '.bmp', '.dib', '.tif', '.tiff', '.gif', '.webp', '.pgm', '.pnm', '.ppm')


class Pairs(NamedTuple):
    """Images with their label maps.

    Attributes:
        splits: Role ('train', 'val', 'test' or '') -> pairs of absolute paths, image and map.
        folders: The folders that hold maps, where names of classes may lie.
        notes: What was left out.
        maps: All label maps, those without an image too.
        fault: Why images and maps do not belong together; '' if they do.
    """

    splits: dict[str, list[tuple[str, str]]]
    folders: list[Path]
    notes: list[str]
    maps: set[str]
    fault: str = ''


def words(text: str) -> set[str]:
    """The words in a name, in lower case, and the name itself."""
    return {text.lower(), *map(str.lower, WORD.findall(text))}


@cache
def look_at_folders(path: str) -> tuple[bool, bool, str, tuple[str, ...]]:
    """What the folders of a path say: whether of maps, and of maps of another kind; the split; the other folders."""
    folders = path.split('/') if path else []
    roles = [role[0] for each in folders if (role := role_of(each.lower().removesuffix('annot')) or role_of(each))]
    others = [each for each in folders if not (is_called(each, MAPS | IMAGES) or role_of(each))]
    is_map, is_other = (any(is_called(each, kinds) for each in folders) for kinds in (MAPS, OTHER_MAPS))
    return is_map, is_other, roles[-1] if roles else '', tuple(others)


def is_called(folder: str, kinds: set[str]) -> bool:
    """Whether the name of a folder has a word of some; CamVid's are trainannot, valannot."""
    return bool(words(folder) & kinds) or (folder.lower().endswith('annot') and 'annot' in kinds)


def is_map(file: str) -> bool:
    """Whether the folders of a file say that it is a label map; an image of one may have any name, as color_1."""
    maps, others, _, _ = look_at_folders(file.rpartition('/')[0])
    return maps and not others


def place_of(file: str) -> tuple[str, tuple[str, ...], str]:
    """What an image and its label map have in common: split, folders that tell more, and name."""
    folders, _, name = file.rpartition('/')
    stem, before = as_name(name.rpartition('.')[0]), ''
    while stem != before:  # as in x_gtFine_labelTrainIds
        stem, before = ENDINGS.sub('', stem), stem
    return *look_at_folders(folders)[2:], stem


def find_maps(root: Path) -> Pairs | None:
    """The label maps of a folder with their images; None if it has none."""
    files = list_images_of(root) if root.is_dir() else []
    maps = [file for file in files if is_map(file)]
    if not maps:  # a.jpg and a_mask.png beside each other
        maps = [file for file in files if re.search(r'[_-](mask|label|gt|seg)(_\d+)?\.\w+$', file, re.IGNORECASE)]
    if not maps:
        return None
    chosen = set(maps)
    places: dict[Any, list[list[str]]] = defaultdict(lambda: [[], []])
    for file in files:
        if file in chosen or not any(look_at_folders(file.rpartition('/')[0])[:2]):
            places[place_of(file)][file in chosen].append(file)
    splits: dict[str, list[tuple[str, str]]] = defaultdict(list)
    alone, fault = Counter(), ''
    other = [file for file in maps if (bare := OTHER_ENDINGS.sub('', file)) != file and place_of(bare) in places]
    for (role, _, _), pair in places.items():
        if not all(pair):
            alone.update(image=len(pair[0]), map=len(set(pair[1]).difference(other)))
            continue
        for kind, names in zip(('images', 'label maps'), pair, strict=True):
            if len(names) > 1:
                fault = (
                    f'{root} has {len(names)} {kind} of one name, {listed(names)}: which belong together is not clear'
                )
        splits[role].append((str(root / pair[0][0]), str(root / pair[1][0])))
    if not splits:
        return None
    notes = [f'{count(alone["image"], "image")} left out, without a label map.'] * bool(alone['image'])
    notes += [f'{count(alone["map"], "label map")} left out, without an image.'] * bool(alone['map'])
    folders = sorted({root / each for file in maps for each in Path(file).parents}, key=lambda each: len(each.parts))
    return Pairs(splits, folders, notes, {str(root / file) for file in maps}, fault)


def divide_by_lists(
    root: Path, splits: dict[str, list[tuple[str, str]]]
) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """The splits, or those of Pascal VOC's lists where folders name none; and lines about what the lists do not fit."""
    if set(splits) != {''}:
        return splits, []
    divided, notes = by_lists(root, 'Segmentation', [image for image, _ in splits['']])
    return {role: [splits[''][i] for i in places] for role, places in divided.items()} or splits, notes


class Seen(NamedTuple):
    """What is in label maps.

    Attributes:
        pixels: Value, or code of a colour -> number of pixels.
        first: Value or code -> the first map that has it.
        present: Map -> the values or codes in it.
    """

    pixels: Counter[int]
    first: dict[int, str]
    present: dict[str, set[int]]


def look_at(pairs: Sequence[tuple[str, str]], colours: bool) -> Seen:
    """Read label maps, and compare their sizes with those of their images.

    Raises:
        InputError: a map does not decode, is in colours, has another size than its image, or a palette of another order
            than that of an earlier one.
    """
    seen, palettes = Seen(Counter(), {}, {}), {}
    # decoding leaves Python to other threads
    with images_of_any_size(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        parts = (pool.map(partial(look_at_one, colours), pairs[i : i + 64]) for i in range(0, len(pairs), 64))
        found = track(chain.from_iterable(parts), 'Looking at label maps', len(pairs), transient=True)
        for (_, path), (content, numbers) in zip(pairs, found, strict=True):
            seen.pixels.update(numbers)
            seen.present[path] = set(numbers)
            if not colours:
                check_palette(path, content, numbers, palettes)
            for value in numbers:
                seen.first.setdefault(value, path)
    return seen


def look_at_one(colours: bool, pair: tuple[str, str]) -> tuple[bytes, dict[int, int]]:
    """The content of a label map, and the number of pixels of each value or colour in it."""
    image, path = pair
    content = read_bytes(path)
    values = read_values(content, path, colours)
    if size := size_of(image):
        check_size(values, size[::-1], path)
    return content, count_values(values)


def has_coloured_maps(paths: Sequence[str], given: Names) -> bool:
    """Whether the colours of a table are those of the pixels: of RGB images; of palettes if names have no numbers."""
    for path in paths if given.colours else ():
        with (
            suppress(Exception),
            open_header(read_bytes(path)) as picture,
        ):  # of any type; reading it says what is wrong
            if picture.mode != 'P':
                return picture.mode in ('RGB', 'RGBA')
            return given.counted
    return False


def count_values(values: np.ndarray) -> dict[int, int]:
    """The values that occur in [H, W] and how often; of maps, whose runs are long, faster than sorting all pixels."""
    flat = values.ravel()
    begins = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    own, which = np.unique(flat[begins], return_inverse=True)
    numbers = np.bincount(which, np.diff(begins, append=len(flat)))
    return dict(zip(own.tolist(), numbers.astype(int).tolist(), strict=True))


def read_maps(
    root: Path,
    pairs: Pairs,
    classes: Sequence[str] | str | os.PathLike | None,
    ignored: Sequence[str | int],
    evaluate: bool,
) -> tuple[list[str], list, list, dict[str, set[int]], list[tuple[int | list[int], int]], list[str]]:
    """The two splits of images with label maps; to ``evaluate``, that to validate on in place of that to train on.

    Returns:
        Names of the classes; records to train and to validate on; the labels in the map of each image; the table of
        values or colours; and lines about what was counted.

    Raises:
        InputError: see :mod:`mmmilan.datasets.labelled`.
    """
    if pairs.fault:
        raise InputError(f'{pairs.fault}; rename or remove some.')
    splits, notes = divide_by_lists(root, pairs.splits)
    notes = [*pairs.notes, *notes]
    train, val = choose_parts(splits, evaluate)
    given = names_of([root, *pairs.folders], classes)
    readable = [[pair for pair in part if size_of(pair[0])] for part in (train, val)]
    if lost := len(train) + len(val) - sum(map(len, readable)):
        notes.append(f'{count(lost, "image")} left out, that do not decode.')
    train, val = readable
    every = train + val
    if given and not has_coloured_maps([path for _, path in every], given):
        given = given._replace(colours={})
    colours = bool(given and given.colours)
    seen = look_at(every, colours)
    known = given.names if given else []
    ignored = [each if each in known or not str(each).isdigit() else int(each) for each in ignored]  # '0' of a shell
    names, table = make_table(seen, given, ignored, str(root), notes)
    label = {as_code(value): number for value, number in table if number != IGNORE}
    present = {image: {label[value] for value in seen.present[path] if value in label} for image, path in every}
    records = [[dict(img_path=image, map_path=path) for image, path in part] for part in (train, val)]
    return names, *records, present, table, notes


def make_table(
    seen: Seen, given: Names | None, ignored: Sequence[str | int], where: str, notes: list[str]
) -> tuple[list[str], list[tuple[int | list[int], int]]]:
    """The names of the classes, and which value or colour in the maps has which label.

    Raises:
        InputError: a value has no name, a name that is ignored is none, or there is only one class.
    """
    if given and given.colours:
        values: dict[str, Any] = {name: given.colours.get(number) for number, name in given.numbered.items()}
        lacking = [name for name, colour in values.items() if colour is None]
        if lacking:
            raise InputError(f'{given.where} has no colour of {listed(lacking)}; add it.')
    else:
        values = {name: value for value, name in name_values(seen, given, ignored, notes).items()}
    names = [name for name in values if name not in map(as_name, ignored) and as_code(values[name]) not in ignored]
    unknown = [each for each in ignored if isinstance(each, str) and as_name(each) not in values]
    if unknown:
        raise InputError(f'ignore names {unknown[0]}, which is no class of {where} ({listed(values)}); correct it.')
    table = [(values[name], label) for label, name in enumerate(names)]
    table += [(values[name], IGNORE) for name in values if name not in names]
    known = {as_code(value) for value, _ in table}
    extra = [each for each in ignored if isinstance(each, int) and each not in known]
    table += [(each, IGNORE) for each in extra]
    check_values(seen, table, given, notes)
    if len(names) > IGNORE:
        raise InputError(f'{given.where} names {len(names)} classes; label maps of 8 bits have {IGNORE} at most.')
    classes = [name for name in names if seen.pixels[as_code(values[name])]]
    if len(classes) < 2:
        raise InputError(
            f'The label maps of {where} have {f"the class {classes[0]} alone" if classes else "no class"} (values: '
            f'{listed(show_code(v, bool(given and given.colours)) for v in sorted(seen.pixels))}): there is nothing to '
            'tell apart; correct the maps, or the names.'
        )
    return names, table


def name_values(seen: Seen, given: Names | None, ignored: Sequence[str | int], notes: list[str]) -> dict[int, str]:
    """Value -> name. Two values, of which one is 0, may go without names, or with that of the other one."""
    inside = sorted(set(seen.pixels) - {IGNORE, *(each for each in ignored if isinstance(each, int))})
    pair = [0, IGNORE] if set(seen.pixels) == {0, IGNORE} and IGNORE not in ignored else inside
    rest = set(seen.pixels) - {*pair, *ignored}  # 255 at most
    two = len(pair) == 2 and pair[0] == 0 and (not rest or pair[1] == 1)  # 0, 127 and 255 may be three classes
    few = given is None or len(given.numbered) <= 2
    if few and pair == [0, 1] and rest and (unclear := unclear_pair(seen.present)):
        raise InputError(f'{unclear}; write 1 for {IGNORE}, or give ignore={IGNORE} if no class has these pixels.')
    if given is None and two:
        unused = f'; {IGNORE} marks pixels without a class' * bool(rest)
        notes.append(f'The value 0 of the label maps is taken for background, {pair[1]} for foreground{unused}.')
        return {0: 'background', pair[1]: 'foreground'}
    if given is None:
        path = seen.first[max(seen.pixels)]
        raise InputError(
            f'The label maps have the values {listed(map(str, sorted(seen.pixels)))} ({path}), and nothing names them; '
            + (lossy(path) or 'write classes.txt beside the images, one name a line for 0, 1, 2, ..., or give classes')
            + '.'
        )
    numbered = dict(sorted(given.numbered.items()))
    if two and len(numbered) == 1:
        name = next(iter(numbered.values()))
        notes.append(f'The value 0 of the label maps is taken for background, {pair[1]} for {name}.')
        return {0: 'background', pair[1]: name}
    if pair == [0, IGNORE] and sorted(numbered) == [0, 1]:
        notes.append(f'The value 255 of the label maps is taken for {numbered[1]}.')
        return {0: numbered[0], IGNORE: numbered[1]}
    if 0 in seen.pixels and 0 not in ignored and given.counted and numbered[0].lower() != 'background':
        part = f'{numbered[0]} ({seen.pixels[0] / seen.pixels.total():.0%} of pixels)'
        notes.append(f'The value 0 of the label maps is {part}; if it marks pixels without a class, give ignore=0.')
    if 0 in ignored and given.counted:
        notes.append(f'The names of {given.where} are of the values from 1 on, as 0 is ignored.')
        return {value + 1: name for value, name in numbered.items()}
    return numbered


def lossy(path: str) -> str:
    """What to do about values of a map in a format such as JPEG; '' for others."""
    if extension(path) in LOSSLESS:
        return ''
    return f'{path.rpartition(".")[2].upper()} changes values, so save label maps as PNG'


def check_values(seen: Seen, table: list[tuple[int | list[int], int]], given: Names | None, notes: list[str]) -> None:
    """Raise an :class:`InputError` for values that a table does not name.

    255 is ignored, and so is 0 where the names begin with 1, as in ADE20K's table.
    """
    known, colours = {as_code(value) for value, _ in table}, bool(given and given.colours)
    wrong = sorted(value for value in seen.pixels if value not in known)
    if not colours:
        wrong = [value for value in wrong if value != IGNORE]
        if 0 in wrong and given and min(given.numbered) == 1:
            share = seen.pixels[0] / seen.pixels.total()
            notes.append(
                f'The value 0 of the label maps, which {given.where} does not name, is ignored: {share:.0%} of pixels.'
            )
            table.append((0, IGNORE))
            wrong.remove(0)
    if not wrong:
        return
    path, kind = seen.first[wrong[0]], 'colours' if colours else 'values'
    remedy = lossy(path) or 'correct the map, or name them'
    if wrong == [len(known)] and 0 in seen.pixels:
        remedy += ', or give ignore=0 if 0 marks pixels without a class'
    raise InputError(
        f'{path} has {kind} that {given.where if given else "nothing"} does not name: '
        f'{listed(show_code(value, colours) for value in wrong)} in '
        f'{sum(seen.pixels[value] for value in wrong)} pixels of all maps; {remedy}.'
    )
