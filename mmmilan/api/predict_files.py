"""The files that ``mmmilan.predict`` writes: a row, a label map and a picture for each image, a table, and pages."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from mmengine.logging import print_log
from PIL import Image

from mmmilan.api.inference import Images, Predictor, as_column
from mmmilan.checkpoints.download import file_sha256
from mmmilan.checkpoints.zoo import resolve_checkpoint
from mmmilan.datasets.image_folder import as_sources, images_in
from mmmilan.datasets.listing import Names
from mmmilan.errors import InputError, count
from mmmilan.evaluation.features import Arrays
from mmmilan.evaluation.predictions import Result, coco_results
from mmmilan.files import Journal, atomic_write, check_output_folder, short_name, write_part, write_text
from mmmilan.version import __version__
from mmmilan.visualization.page import Page
from mmmilan.visualization.pictures import DRAWN_FROM, class_lines, draw_result, reduced

RESULTS = dict(classification='predictions.csv', detection='predictions.json', segmentation='classes.txt')
MAPS, DRAWN, JOURNAL = 'maps', 'drawn', 'predictions.unfinished'  # in the folder of the output
TOP = 5  # classes of an image in predictions.csv
ON_A_PAGE, LEGEND = 200, 40  # pictures, classes
MAX_CLASSES = 256  # of a palette


class Item(NamedTuple):
    """An image: its path, and the name of what is written for it, relative and without its extension."""

    path: str
    name: str


class Items(Sequence[Item]):
    """The images of some sources, each with a name of its own: its path in its source, of several below the source's.

    Where two would share a name without extension, they keep their extensions, and then they are numbered. Names are
    made when they are asked for: kept are the paths, as one text, and whether the extension is kept.

    Args:
        sources: Images, folders and tar shards.

    Raises:
        InputError: a source does not exist or holds no image.
    """

    def __init__(self, sources: str | os.PathLike | Sequence[str | os.PathLike]) -> None:
        sources = as_sources(sources)
        parts = [images_in(source) for source in sources]
        self.paths = Names.joined(parts)
        self.ends = list(itertools.accumulate(map(len, parts)))  # of the sources
        self.folders = [os.path.join(os.path.expanduser(os.fspath(source)), '') for source in sources]
        self.before = [os.path.basename(os.path.normpath(each)) + '/' for each in sources if len(sources) > 1] or ['']
        self.with_extension, self.numbers = np.zeros(len(self.paths), bool), {}
        self.with_extension = repeated(item.name for item in self)
        used: Counter[str] = Counter()
        again = repeated(item.name for item in self) if self.with_extension.any() else self.with_extension
        for place in np.flatnonzero(again).tolist():
            name = self[place].name
            used[name] += 1
            if used[name] > 1:
                self.numbers[place] = used[name]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        path, source = self.paths[index], bisect_right(self.ends, index)
        file = path.removeprefix('tar://').rpartition('@')[0] if path.startswith('tar://') else path
        inside = file.startswith(self.folders[source])
        name = self.before[source] + file[len(self.folders[source]) :] if inside else os.path.basename(file)
        name = name if self.with_extension[index] else os.path.splitext(name)[0]
        name = '/'.join(short_name(part) for part in name.split('/') if part not in ('', '.', '..'))
        return Item(path, f'{name}-{self.numbers[index]}' if index in self.numbers else name)


def repeated(names: Iterable[str]) -> np.ndarray:
    """Whether another name is the same: [M], bool. Names are told apart by 64 bits of a hash, so that none is kept."""
    hashes = (hashlib.blake2b(name.encode('utf-8', 'surrogatepass'), digest_size=8).digest() for name in names)
    numbers = np.fromiter((int.from_bytes(each, 'little') for each in hashes), np.uint64)
    _, which, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return counts[which] > 1


def check_folder(
    out: str | os.PathLike,
    checkpoint: str | os.PathLike,
    images: str | os.PathLike | Sequence[str | os.PathLike],
    overwrite: bool,
) -> None:
    """Decide whether predictions may be written to a folder, before the model is loaded.

    Raises:
        InputError: they may not: they would replace an image, or the predictions of another run.
    """
    inputs = [checkpoint, *as_sources(images)]
    replace = overwrite or Path(out, JOURNAL).is_file()
    folder = check_output_folder(out, [*RESULTS.values(), 'index.html'], inputs, overwrite=replace, pictures=True)
    for name in (MAPS, DRAWN):
        check_output_folder(folder / name, (), inputs, pictures=True)
        if not replace and (folder / name).exists():
            raise InputError(
                f'{folder / name} exists; choose another folder, or add --overwrite (overwrite=True) to replace its '
                'pictures.'
            )


def run_of(items: Items, checkpoint: str | os.PathLike, draw: bool) -> dict:
    """What tells a run from others: one that was stopped goes on only as the same."""
    weights = file_sha256(Path(resolve_checkpoint(checkpoint)))
    images = hashlib.sha256(items.paths.content).hexdigest()
    return dict(of='mmmilan predict', checkpoint=weights, images=images, number=len(items), draw=draw)


def begin_journal(folder: Path, run: dict, overwrite: bool) -> Journal:
    """The journal of a run. With ``overwrite``, what an earlier run wrote is removed before anything is done.

    Removed are files of the names that :func:`predict` writes, and the folders of pictures that are empty then.
    """
    journal = Journal(folder / JOURNAL, run, overwrite)
    if not overwrite or journal.begin:
        return journal
    for name in (*RESULTS.values(), 'index.html'):
        (folder / name).unlink(missing_ok=True)
    for path in folder.glob('index-*.html'):
        if path.stem.removeprefix('index-').isdecimal():
            path.unlink()
    for name, ending in ((MAPS, '.png'), (DRAWN, '.jpg')):
        for inner, _, files in os.walk(folder / name, topdown=False):
            for file in files:
                if file.endswith(ending):
                    os.unlink(os.path.join(inner, file))
            with suppress(OSError):  # not empty
                os.rmdir(inner)
    return journal


class Pictured(Images):
    """Images after the pipeline of a model, each with ``picture``, a reduced one to draw on (RGB uint8 [h, w, 3])."""

    def __getitem__(self, index: int) -> dict:
        results = self.read(index)
        picture = reduced(results['img'])[..., ::-1].copy()
        return self.reader.prepare(results) | dict(picture=picture)


class Work:
    """What is written for each image, and at the end.

    Args:
        predictor: Predicts.
        folder: Where it is written.
        items: The images.
        draw: Whether pictures are drawn.
    """

    def __init__(self, predictor: Predictor, folder: Path, items: Items, draw: bool) -> None:
        self.predictor, self.folder, self.items, self.draw = predictor, folder, items, draw
        self.task, self.classes, self.colours = predictor.task, predictor.classes, predictor.colours
        if self.task == 'segmentation' and len(self.classes) > MAX_CLASSES:
            raise InputError(
                f'The checkpoint has {len(self.classes)} classes, where a PNG with a palette has {MAX_CLASSES}; use '
                'mmmilan.Predictor.'
            )

    def write(self, samples: Sequence[dict], positions: np.ndarray) -> Arrays:
        """Predict for a batch, write the files of its images, and give a row for each."""
        results = self.predictor.predict(samples)
        for sample, position, result in zip(samples, positions, results, strict=True):
            self.write_files(self.items[position].name, sample['picture'], result)
        return dict(row=as_column([self.row(result) for result in results]))

    def write_files(self, name: str, picture: np.ndarray, result: Result) -> None:
        """Write the label map and the drawn picture of an image."""
        if self.task == 'segmentation':
            labels = Image.fromarray(result['map']).convert('P')
            labels.putpalette(list(itertools.chain(*self.colours)))
            write_part(self.folder / MAPS / f'{name}.png', encoded(labels, 'PNG'))
        if self.draw:
            drawn = draw_result(picture, self.task, result, self.classes, self.colours)
            write_part(self.folder / DRAWN / f'{name}.jpg', encoded(Image.fromarray(drawn), 'JPEG', quality=90))

    def row(self, result: Result) -> dict:
        """A prediction as JSON has it, with ``note``, a few words below its picture."""
        if self.task == 'classification':
            best = zip(result['labels'][:TOP].tolist(), result['scores'][:TOP].tolist(), strict=True)
            return dict(note=', '.join(class_lines(result, self.classes)), best=list(best))
        if self.task == 'segmentation':
            return dict(note=shares(result['map'], self.classes))
        return dict(note=objects(result, self.classes), size=result['size'].tolist(), results=coco_results(result))

    def finish(self, journal: Journal, checkpoint: str | os.PathLike) -> None:
        """Write what all images share: the table or the list of results, the names of the classes, and the pages."""
        path = self.folder / RESULTS[self.task]
        if self.task == 'segmentation':
            write_text(path, ''.join(f'{name}\n' for name in self.classes))
        else:
            write = write_csv if self.task == 'classification' else write_coco
            with (
                atomic_write(path) as temporary,
                open(temporary, 'w', newline='', encoding='utf-8', errors='backslashreplace') as file,
            ):
                write(file, journal, self.items, self.classes)
        if self.draw:
            self.write_pages(journal, checkpoint)
        journal.remove()
        left_out = len(self.items) - journal.done
        text = f'{self.folder}: predictions for {count(journal.done, "image")}'
        print_log(f'{text}; {left_out} could not be read.' if left_out else f'{text}.', logger='current')

    def write_pages(self, journal: Journal, checkpoint: str | os.PathLike) -> None:
        """Write ``index.html``, and further pages if there are many pictures."""
        rows, number = iter(journal), -(-journal.done // ON_A_PAGE)
        names = ['index.html', *(f'index-{i}.html' for i in range(2, number + 1))]
        title = f'Predictions of {Path(checkpoint).name}'
        lead = f'A model for {self.task} with {len(self.classes)} classes, on {count(journal.done, "image")}.'
        for i, name in enumerate(names):
            links = {'previous page': names[i - 1]} if i else {}
            links |= {f'next page, of {number}': names[i + 1]} if i + 1 < number else {}
            page = Page(title, lead, links)
            if self.task != 'classification' and len(self.classes) <= LEGEND:
                page.legend(self.classes, self.colours)
            page.pictures(
                (f'{DRAWN}/{self.items[position].name}.jpg', self.items[position].name, row['note'])
                for position, row in itertools.islice(rows, ON_A_PAGE)
            )
            page.write(self.folder / name, f'mmmilan {__version__}')


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as the content of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shares(labels: np.ndarray, classes: Sequence[str]) -> str:
    """The three largest classes of a label map in words."""
    pixels = np.bincount(labels.ravel(), minlength=len(classes))[: len(classes)]
    largest = [label for label in np.argsort(-pixels, kind='stable')[:3] if pixels[label]]
    return ', '.join(f'{classes[label]} {100 * pixels[label] / labels.size:.0f} %' for label in largest)


def objects(result: Result, classes: Sequence[str]) -> str:
    """The drawn objects in words."""
    labels = Counter(result['labels'][result['scores'] >= DRAWN_FROM].tolist())
    return ', '.join(f'{number} {classes[label]}' for label, number in labels.most_common()) or 'nothing'


def write_csv(file: TextIO, journal: Journal, items: Items, classes: Sequence[str]) -> None:
    """Write a row for each image, with empty cells for those that could not be read."""
    best = min(TOP, len(classes))
    writer = csv.writer(file, lineterminator='\n')
    writer.writerow(
        ['path', 'class', 'score', *(f'{name}_{i}' for i in range(2, best + 1) for name in ('class', 'score'))]
    )
    rows, row = iter(journal), None
    for i, item in enumerate(items):
        row = row or next(rows, None)
        cells = [''] * 2 * best
        if row and row[0] == i:
            cells = [cell for label, score in row[1]['best'] for cell in (classes[label], f'{score:.6f}')]
            row = None
        writer.writerow([item.path, *cells])


def write_coco(file: TextIO, journal: Journal, items: Items, classes: Sequence[str]) -> None:
    """Write images, those that could not be read, categories and results; image ids are places among all, from 1."""

    def images() -> Iterator[dict]:
        for position, row in journal:
            height, width = row['size']
            yield dict(id=position + 1, file_name=items.paths[position], width=width, height=height)

    def results() -> Iterator[dict]:
        number = itertools.count(1)
        for position, row in journal:
            for each in row['results']:
                yield dict(id=next(number), image_id=position + 1, iscrowd=0) | each

    def left_out() -> Iterator[str]:
        begin = 0
        for end in itertools.chain((position for position, _ in journal), [len(items)]):
            yield from (items.paths[place] for place in range(begin, end))
            begin = end + 1

    categories, begin = (dict(id=label + 1, name=name) for label, name in enumerate(classes)), '{'
    parts = dict(images=images(), left_out=left_out(), categories=categories, annotations=results())
    for name, rows in parts.items():
        file.write(f'{begin}"{name}": [')
        for i, row in enumerate(rows):
            file.write((',\n' if i else '\n') + json.dumps(row))
        file.write(']')
        begin = ',\n'
    file.write('}\n')
