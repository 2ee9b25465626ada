"""Captioned images from every kind of source, bad rows, and the draw of one text of several."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from helpers import grey_png
from mmmilan.datasets import CaptionedImages, Draw, TokenizeCaption
from mmmilan.errors import InputError

CAPTIONS = {'a.png': ['a red square', 'a box'], 'b/c.png': ['naïve, "quoted"'], 'd.e.png': ['third']}
LOAD = [dict(type='mmmilan.LoadImage')]


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of three images, told apart by their brightness."""
    for i, name in enumerate(CAPTIONS):
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(grey_png(10 * i))
    return tmp_path / 'images'


def as_csv(folder: Path, delimiter: str = ',') -> str:
    path = folder.parent / ('captions.csv' if delimiter == ',' else 'captions.tsv')
    lines = [delimiter.join(['caption', 'url', 'image'])]
    for image, texts in CAPTIONS.items():
        lines += [delimiter.join(['"' + text.replace('"', '""') + '"', 'x', image]) for text in texts]
    path.write_text('\n'.join(lines), encoding='utf-8')
    return str(path)


def as_tsv(folder: Path) -> str:
    return as_csv(folder, '\t')


def as_coco(folder: Path) -> str:
    content = dict(
        images=[dict(id=7 + i, file_name=image) for i, image in enumerate(CAPTIONS)],
        annotations=[dict(image_id=7 + i, caption=t) for i, texts in enumerate(CAPTIONS.values()) for t in texts],
    )
    path = folder.parent / 'captions.json'
    path.write_text(json.dumps(content))
    return str(path)


def as_text_files(folder: Path) -> None:
    for image, texts in CAPTIONS.items():
        (folder / image).with_suffix('.txt').write_text('\n'.join(texts) + '\n', encoding='utf-8')


@pytest.mark.parametrize('write', [as_csv, as_tsv, as_coco, as_text_files])
def test_every_format_gives_the_same_images_and_texts(images, write: Callable, monkeypatch):
    monkeypatch.chdir(images.parent)
    dataset = CaptionedImages('images', write(images), pipeline=LOAD)
    found = {os.path.relpath(s['img_path'], 'images'): (s['captions'], int(s['img'][0, 0, 0])) for s in dataset}
    assert found == {image: (texts, 10 * i) for i, (image, texts) in enumerate(CAPTIONS.items())}


@pytest.mark.parametrize('name,content,message', [
    ('captions.csv', 'image,text\na.png,x', 'lacks a column named image or caption'),
    ('captions.csv', 'image,caption\n', 'has no image with a caption'),
    ('captions.json', '{"images": []}', "is not in COCO's format of captions .KeyError: 'annotations'"),
    (
        'captions.json', '{"images": [], "annotations": [{"image_id": [0], "caption": "x"}]}',
        "is not in COCO's format of captions .TypeError: unhashable type: 'list'",
    ),
    ('captions.json', '[' * 100_000, "is not in COCO's format of captions .RecursionError"),
    ('captions.json', 'a', "is not in COCO's format of captions"),
    ('captions.parquet', '', 'is in no known format; give one that ends in .csv, .tsv, .json'),
    (None, None, 'captions.csv does not exist'),
])  # fmt: skip
def test_bad_files(images, name, content, message):
    if name:
        (images.parent / name).write_text(content)
    with pytest.raises(InputError, match=message):
        CaptionedImages(str(images), str(images.parent / (name or 'captions.csv')))


BAD_ROWS = 'image,caption\na.png,one\nb/c.png,\n,lost\nd.e.png,"  "\nb/c.png,two\nd.e.png'
FAULTS = (
    'captions.csv, line 3, has no caption',
    'line 4, has no image',
    'line 5, has no caption',
    'line 7, has no caption',
)


def test_bad_rows_are_named_and_skipped(images, log):
    path = images.parent / 'captions.csv'
    path.write_text(BAD_ROWS)
    dataset = CaptionedImages(str(images), str(path))
    assert [dataset.get_data_info(i)['captions'] for i in range(len(dataset))] == [['one'], ['two']]
    assert len(log.messages) == 4
    assert all(fault in message for fault, message in zip(FAULTS, log.messages, strict=True))
    with pytest.raises(InputError, match='captions.csv, line 3, has no caption; complete or remove it'):
        CaptionedImages(str(images), str(path), on_corrupt='raise')


def test_missing_and_broken_images_are_named_and_skipped(images, log):
    path = as_csv(images)
    (images / 'a.png').unlink()
    (images / 'b/c.png').write_bytes(b'\x89PNG')
    dataset = CaptionedImages(str(images), path, pipeline=LOAD)
    assert [Path(dataset[i]['img_path']).name for i in range(3)] == ['d.e.png'] * 3
    assert 'The image' in log.text and 'a.png is missing' in log.text and 'c.png does not decode' in log.text
    assert dataset.num_corrupt >= 2
    dataset = CaptionedImages(str(images), path, pipeline=LOAD, on_corrupt='raise')
    for index, message in ((0, 'a.png is missing'), (1, 'c.png does not decode')):
        with pytest.raises(InputError, match=message):
            dataset[index]


def test_faults_of_the_pipeline_are_not_skipped(images):
    """An error of a transform is not taken for a bad row."""
    dataset = CaptionedImages(str(images), as_csv(images), pipeline=[dict(type='mmmilan.RandomMasking')])
    with pytest.raises(InputError, match="finds no results\\['importance'\\]"):
        dataset[0]


# -- texts


def test_one_of_several_texts_is_drawn_reproducibly(images):
    pipeline = [*LOAD, dict(type='mmmilan.TokenizeCaption', context_length=8)]
    dataset = CaptionedImages(str(images), as_csv(images), pipeline=pipeline)
    tokenizer = SimpleTokenizer(context_length=8)
    both = [tuple(text.tolist()) for text in tokenizer(CAPTIONS['a.png'])]
    drawn = [tuple(dataset[Draw(0, epoch, 0)]['text'].tolist()) for epoch in range(20)]
    assert drawn == [tuple(dataset[Draw(0, epoch, 0)]['text'].tolist()) for epoch in range(20)]
    assert set(drawn) == set(both)
    assert 4 <= drawn.count(both[0]) <= 16


def test_all_texts_for_evaluation():
    results = TokenizeCaption(context_length=5, all_captions=True).transform(dict(captions=['a', 'a dog in the snow']))
    tokenizer = SimpleTokenizer()
    assert results['text'].shape == (2, 5) and results['text'].dtype == torch.int64
    assert results['text'][:, 0].tolist() == [tokenizer.sot_token_id] * 2
    assert results['text'].max(1).values.tolist() == [tokenizer.eot_token_id] * 2  # a text that is cut keeps its end
