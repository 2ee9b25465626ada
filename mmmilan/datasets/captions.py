"""Captioned images."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from mmcv.transforms import BaseTransform

from mmmilan.datasets.image_folder import ImageFolder
from mmmilan.errors import InputError
from mmmilan.registry import DATASETS, TRANSFORMS


@DATASETS.register_module()
class CaptionedImages(ImageFolder):
    """Images with captions from a CSV file of columns ``image`` (path below ``data_root``) and ``caption``.

    An image may have several rows; ``results['captions']`` holds all its texts.

    Args:
        data_root: Folder of the images.
        captions: The CSV file.
        kwargs: Other arguments of :class:`ImageFolder`.

    Raises:
        InputError: if the file is missing, lacks a column, or names no image.
    """

    def __init__(self, data_root: str, captions: str, **kwargs) -> None:
        self.captions = Path(captions)
        super().__init__(data_root=data_root, **kwargs)

    def load_data_list(self) -> list[dict]:
        if not self.captions.is_file():
            raise InputError(f'The captions file {self.captions} does not exist.')
        texts: dict[str, list[str]] = {}
        with open(self.captions, newline='') as file:
            rows = csv.DictReader(file)
            if not {'image', 'caption'} <= set(rows.fieldnames or ()):
                raise InputError(f'{self.captions} lacks a column named image or caption; name them in its first row.')
            for row in rows:
                texts.setdefault(row['image'], []).append(row['caption'])
        if not texts:
            raise InputError(f'{self.captions} names no image.')
        return [
            dict(img_path=str(Path(self.img_prefix, image)), captions=captions) for image, captions in texts.items()
        ]


@TRANSFORMS.register_module()
class TokenizeCaption(BaseTransform):
    """One of ``results['captions']``, drawn at random, as token ids ``results['text']`` [context_length], int64.

    Args:
        context_length: Number of tokens; longer texts are cut.
    """

    def __init__(self, context_length: int = 77) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.tokenizer = SimpleTokenizer(context_length=context_length)

    def transform(self, results: dict) -> dict:
        caption = results['captions'][np.random.randint(len(results['captions']))]
        results['text'] = self.tokenizer(caption)[0]
        return results
