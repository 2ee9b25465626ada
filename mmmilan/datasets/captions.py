"""Captioned images in folders, with a table, a COCO JSON file or text files, or in tar shards; and their tokens."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform
from rich.progress import track

from mmmilan.datasets.decoding import EXTENSIONS
from mmmilan.datasets.image_folder import ImageFolder
from mmmilan.datasets.listing import list_folder, log_left_out
from mmmilan.datasets.packed import load_index, pair_by_name
from mmmilan.errors import InputError, warn
from mmmilan.files import extension, read_text
from mmmilan.registry import DATASETS, TRANSFORMS

SEPARATORS = {',': 'commas', ';': 'semicolons', '\t': 'tabs'}  # of the cells of a table


@DATASETS.register_module()
class CaptionedImages(ImageFolder):
    """Images in a folder and their captions; ``results['captions']`` holds all texts of an image.

    Args:
        data_root: Folder of the images.
        captions: A ``.csv`` or ``.tsv`` file with columns ``image`` (path below ``data_root``) and ``caption``, in
            which an image may have several rows; names in any case, with commas, semicolons or tabs between. Or a
            ``.json`` file in COCO's format of captions. None reads the text file of the same name beside each image,
            one caption per line, see :func:`pair_by_name`.
        on_corrupt: What to do with an image that is missing, does not decode or has no caption: 'skip' leaves it out
            and names it in the log; 'raise' stops.
        kwargs: Other arguments of :class:`ImageFolder`.

    Raises:
        InputError: a file is missing or in no known format, or no image is left.
    """

    def __init__(self, data_root: str, captions: str | None = None, **kwargs) -> None:
        self.captions = Path(captions) if captions else None
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        texts: dict[str, list[str]] = {}
        for place, image, caption in self.read_rows():
            if not isinstance(image, str) or not isinstance(caption, str) or not caption.strip() or not image:
                self.reject(f'{place} has no {"caption" if image else "image"}; complete or remove it.')
                continue
            texts.setdefault(str(Path(image)), []).append(caption.strip())  # ./a.jpg is a.jpg
        if not texts:
            raise InputError(f'{self.captions or self.img_prefix} has no image with a caption; give another one.')
        return [dict(img_path=str(Path(self.img_prefix, image)), captions=texts[image]) for image in texts]

    def read_rows(self) -> Iterable[tuple[str, str | None, str | None]]:
        """The place of each caption in its file (for messages), its image (path below the folder) and its text."""
        if self.captions is None:
            return self.read_text_files()
        if not self.captions.is_file():
            raise InputError(f'The captions file {self.captions} does not exist; correct captions=.')
        readers = {'.csv': read_table, '.tsv': read_table, '.json': read_coco}
        kind = extension(self.captions)
        if kind not in readers:
            raise InputError(
                f'The captions file {self.captions} is in no known format; give one that ends in {", ".join(readers)}.'
            )
        return readers[kind](self.captions)

    def read_text_files(self) -> Iterator[tuple[str, str, str]]:
        """As :meth:`read_rows`, from the text files beside the images; an image without caption gives ''."""
        self.check_folder()
        files = list_folder(self.img_prefix, (*EXTENSIONS, '.txt')).files
        images, texts = [[f for f in files if (extension(f) == '.txt') == wanted] for wanted in (False, True)]
        if not images:
            raise InputError(f'The data folder {self.img_prefix} holds no image; correct data_root.')
        pairs = pair_by_name(images, texts)
        log_left_out(self.img_prefix, {'.txt without image': len(set(texts).difference(*pairs.values()))})
        for image, names in pairs.items():
            lines = []
            try:
                for name in names:
                    lines += [line for line in read_text(Path(self.img_prefix, name)).split('\n') if line.strip()]
            except InputError as error:
                self.reject(str(error))
                continue
            for line in lines or ['']:
                yield f'{self.img_prefix}/{image}', image, line

    def reject(self, fault: str) -> None:
        """Leave out an entry, with a warning in the log; or stop, if ``on_corrupt`` says so."""
        if self.on_corrupt == 'raise':
            raise InputError(fault)
        warn(f'Skipped: {fault}')


@DATASETS.register_module()
class CaptionedShards(CaptionedImages):
    """Captioned images in tar files, as WebDataset packs them.

    The captions of an image are in a ``.txt`` file with one caption per line or a ``.json`` file with ``caption`` (one
    text or a list), of the same name up to the extension, or else as :func:`pair_by_name` pairs them. Images are read
    by offset, see :func:`load_index`. With ``ShardSampler`` one shard is read after the other.

    Args:
        data_root: Folder of the tar files.
        kwargs: Other arguments of :class:`CaptionedImages`, except ``captions``.

    Raises:
        InputError: there is no tar file, or one is damaged.
    """

    def __init__(self, data_root: str, **kwargs) -> None:
        self.shard_sizes: list[int] = []
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        self.check_folder()
        shards = list_folder(self.img_prefix, ('.tar',)).files
        if not shards:
            raise InputError(f'The folder {self.data_root} holds no .tar file; set data_root to the shards.')
        samples, unused = [], Counter()
        for shard in track(shards, 'Tar shards', transient=True):
            count = len(samples)
            index = load_index(Path(self.img_prefix, shard))
            unused.update(index.unused)
            for path, captions in index.samples:
                if captions:
                    samples.append(dict(img_path=path, captions=captions))
                elif self.on_corrupt == 'raise':
                    raise InputError(f'{path} has no caption; complete or remove it.')
                else:
                    unused['images without caption'] += 1
            self.shard_sizes.append(len(samples) - count)
        log_left_out(f'the shards in {self.data_root}', unused)
        if not samples:
            raise InputError(f'The tar files in {self.data_root} hold no image with a caption; set another data_root.')
        return samples


def read_table(path: Path) -> Iterator[tuple[str, str | None, str | None]]:
    """Rows of a CSV or TSV file with columns image and caption, as :meth:`CaptionedImages.read_rows` gives them.

    Raises:
        InputError: a column is missing, or the file is not a valid table.
    """
    lines, begin = io.StringIO(read_text(path), newline=''), 1
    try:
        separator, names = find_columns(path, lines.readline())
        lines.seek(0)
        rows = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)
        for cells in rows:
            if any(map(str.strip, cells[len(names) :])):  # the rest of a caption, and maybe other cells moved
                raise InputError(
                    f'{path}, line {begin} has {len(cells)} cells where the first row has {len(names)}; put captions '
                    f'with {SEPARATORS[separator]} in quotation marks.'
                )
            if begin > 1 and cells:
                row = dict(zip(names, cells, strict=False))
                yield f'{path}, line {rows.line_num},', row.get('image'), row.get('caption')
            begin = rows.line_num + 1
    except csv.Error as error:  # such as an unclosed quotation mark, which would swallow the rows after it
        remedy = 'close its quotation marks, or shorten it' if 'limit' in str(error) else 'correct the quotation marks'
        raise InputError(f'{path}, line {begin}: {error}; {remedy}.') from error


def find_columns(path: Path, first: str) -> tuple[str, list[str]]:
    """What separates the cells of a table, and the names in its first row, in lower case.

    Raises:
        InputError: a column is missing.
    """
    for separator in SEPARATORS:
        cells = next(csv.reader([first], delimiter=separator, skipinitialspace=True), [])
        names = [name.strip().lower() for name in cells]
        if {'image', 'caption'} <= set(names):
            return separator, names
    raise InputError(
        f'{path} lacks a column named image or caption; name them in its first row, with a comma, semicolon or tab '
        'between.'
    )


def read_coco(path: Path) -> Iterator[tuple[str, str | None, str | None]]:
    """Captions in COCO's format, in which ``annotations`` name ``images`` by id.

    Raises:
        InputError: the file is not in this format.
    """
    try:
        content = json.loads(read_text(path))
        images = {image['id']: image['file_name'] for image in content['images']}
        rows = [(row['image_id'], images.get(row['image_id']), row['caption']) for row in content['annotations']]
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is not in COCO's format of captions ({type(error).__name__}: {error}); mend it, or give a .csv."
        ) from error
    for number, (image_id, image, caption) in enumerate(rows):
        yield f'{path}, annotation {number} of image {image_id},', image, caption


@TRANSFORMS.register_module()
class TokenizeCaption(BaseTransform):
    """Tokenize ``results['captions']`` into ``results['text']``, int64.

    mmpretrain's data sets of images and texts give their texts, one or a list, as ``results['text']``; these are read
    where there are no ``captions``.

    Args:
        context_length: Number of tokens L; longer texts are truncated.
        all_captions: Give all texts of the image [T, L], for evaluation; by default one [L], drawn at random.
    """

    def __init__(self, context_length: int = 77, all_captions: bool = False) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.tokenizer = SimpleTokenizer(context_length=context_length)
        self.all_captions = all_captions

    def transform(self, results: dict) -> dict:
        captions = results['captions'] if 'captions' in results else results['text']
        captions = [captions] if isinstance(captions, str) else captions
        if self.all_captions:
            results['text'] = self.tokenizer(captions)
        else:
            results['text'] = self.tokenizer(captions[np.random.randint(len(captions))])[0]
        return results
