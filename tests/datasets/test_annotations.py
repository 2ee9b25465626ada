"""Wrong annotations of detection and segmentation are refused in one sentence that names the entry."""

from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest
from mmengine.dataset import BaseDataset

from mmmilan.datasets import LoadImage, LoadLabelMap
from mmmilan.errors import InputError
from mmmilan.registry import DATASETS

pytest.importorskip('mmdet')  # with mmseg, the extra ``dense``


def instances() -> dict:
    """Two images with three objects, as COCO writes them."""
    images = [dict(id=number, file_name=f'{number}.jpg', width=40, height=30) for number in (1, 2)]
    annotation = dict(image_id=1, category_id=18, bbox=[1, 2, 3.5, 4], area=14.0, iscrowd=0)
    polygon, rle = [[1, 2, 4.5, 2, 4.5, 6]], dict(size=[30, 40], counts=[5, 5, 1190])
    return dict(
        images=images,
        categories=[dict(id=18, name='dog'), dict(id=19, name='horse')],
        annotations=[
            annotation | dict(id=7, segmentation=polygon),
            annotation | dict(id=8, bbox=[-1, 0, 0, 4]),  # a little outside, and empty: COCO has such
            annotation | dict(id=9, image_id=2, segmentation=rle, iscrowd=1),
        ],
    )


def read(tmp_path, content: bytes | dict, classes: tuple[str, ...] = ('dog', 'horse')) -> BaseDataset:
    """The data set of a file with this content, as our configs read it."""
    path = tmp_path / 'instances.json'
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    settings = dict(ann_file=str(path), data_prefix=dict(img=''), metainfo=dict(classes=classes))
    return DATASETS.build(dict(type='mmmilan.CocoDataset', **settings))


def test_sound_annotations(tmp_path):
    dataset = read(tmp_path, instances())
    boxes = [[each['bbox'] for each in dataset.get_data_info(index)['instances']] for index in (0, 1)]
    assert boxes == [[[1, 2, 4.5, 6]], [[1, 2, 4.5, 6]]]


def test_a_class_that_the_file_lacks(tmp_path):
    with pytest.raises(InputError, match=r'instances\.json lacks 1 of the 2 classes; give'):
        read(tmp_path, instances(), ('cat', 'dog'))


FAULTS = [
    ('annotations', 'bbox', [0, 0, math.nan, 4], 'annotations[1] (id 8) has the bbox [0, 0, nan, 4]'),
    ('annotations', 'bbox', [0, 0, math.inf, 4], 'annotations[1] (id 8) has the bbox'),
    ('annotations', 'bbox', [5, 5, -3, 4], 'annotations[1] (id 8) has the bbox [5, 5, -3, 4]'),
    ('annotations', 'bbox', [5, 5, 3], 'annotations[1] (id 8) has the bbox'),
    ('annotations', 'bbox', ['5', 5, 3, 3], 'annotations[1] (id 8) has the bbox'),
    ('annotations', 'bbox', None, 'annotations[1] (id 8) has the bbox None'),
    ('annotations', 'area', None, 'annotations[1] (id 8) has the area None'),
    ('annotations', 'image_id', 3, 'annotations[1] (id 8) has the unknown image_id 3'),
    ('annotations', 'category_id', 1, 'annotations[1] (id 8) has the unknown category_id 1'),
    ('annotations', 'category_id', [18], 'annotations[1] (id 8) has the unknown category_id [18]'),
    ('annotations', 'segmentation', [[1, 2, 3]], 'annotations[1] (id 8) has a segmentation'),
    ('annotations', 'segmentation', [[1, 2, math.nan, 4]], 'annotations[1] (id 8) has a segmentation'),
    ('annotations', 'segmentation', dict(size=[40, 30], counts=[5]), 'annotations[1] (id 8) has a segmentation'),
    ('annotations', 'id', 7, 'annotations[1] has the id 7 of an earlier one'),
    ('annotations', None, 'x', 'annotations[1] has no id'),
    ('images', 'width', 0, 'images[1] (2.jpg) has the width 0'),
    ('images', 'height', '30', "images[1] (2.jpg) has the height '30'"),
    ('images', 'file_name', None, 'images[1] has no file_name'),
    ('images', 'id', 1, 'images[1] has the id 1 of an earlier one'),
    ('categories', 'name', None, 'categories[1] has no name'),
]


@pytest.mark.parametrize('part, key, value, message', FAULTS)
def test_a_fault_of_annotations_is_found_at_the_start(tmp_path, part, key, value, message):
    content = instances()
    content[part][1] = content[part][1] | {key: value} if key else value
    with pytest.raises(InputError) as error:
        read(tmp_path, content)
    assert str(error.value).startswith(f'{tmp_path}/instances.json, {message}')
    assert str(error.value).endswith('; correct or remove this entry.')


@pytest.mark.parametrize('content', [b'', b'[', b'[]', b'\xff\xfe', b'{"images": 1}', b'null'])
def test_no_annotations_at_all(tmp_path, content):
    with pytest.raises(InputError, match=r"instances\.json (cannot be read as JSON|is not) in COCO's format"):
        read(tmp_path, content)


def test_an_image_of_another_size_than_its_annotations(tmp_path):
    path = str(tmp_path / '1.jpg')
    cv2.imwrite(path, np.zeros((30, 40, 3), np.uint8))
    LoadImage()(dict(img_path=path, height=30, width=40))
    with pytest.raises(InputError, match=r'1\.jpg is 40 x 30, but 30 x 40 \(width x height\) in its annotations'):
        LoadImage()(dict(img_path=path, height=40, width=30))


# -- label maps


def load(path, labels=None, zero: bool = True, label_map: dict | None = None) -> np.ndarray:
    if labels is not None:
        cv2.imwrite(str(path), labels)
    results = dict(seg_map_path=str(path), reduce_zero_label=zero, label_map=label_map, ori_shape=(3, 4), seg_fields=[])
    return LoadLabelMap(num_classes=150)(results)['gt_seg_map']


def test_labels_as_mmseg_reads_them(tmp_path):
    from mmseg.datasets.transforms import LoadAnnotations

    labels = np.array([[0, 1, 2, 150], [255, 7, 7, 0], [3, 4, 5, 6]], np.uint8)
    for zero, label_map in ((True, None), (False, {0: 5, 2: 255}), (True, {0: 1, 1: 0})):
        own = load(tmp_path / 'map.png', labels if zero else labels.clip(max=149), zero, label_map)
        results = dict(seg_map_path=str(tmp_path / 'map.png'), reduce_zero_label=zero, label_map=label_map)
        results = LoadAnnotations()(results | dict(seg_fields=[]))
        assert own.dtype == np.uint8 and (own == results['gt_seg_map']).all()


SMALL = np.ones((3, 4), np.uint8)


@pytest.mark.parametrize(
    'labels, message',
    [
        (SMALL.astype(np.uint16) * 300, r'map\.png is an image of mode I;16; give label maps with one 8-bit channel'),
        (np.ones((3, 4, 3), np.uint8), r'map\.png is an image of mode RGB; give'),
        (np.ones((3, 4, 4), np.uint8), r'map\.png is an image of mode RGBA; give'),
        (np.ones((4, 3), np.uint8), r'map\.png is 3 x 4, but its image 4 x 3 \(width x height\); make them equal'),
        (
            SMALL * 151,
            r'map\.png has the label 151 in 12 pixels, where 1 to 150 are possible; correct',
        ),
    ],
)
def test_images_that_are_no_label_maps(tmp_path, labels, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path / 'map.png', labels)


def test_labels_without_a_reduced_zero(tmp_path):
    with pytest.raises(InputError, match='has the label 150 in 12 pixels, where 0 to 149 are possible'):
        load(tmp_path / 'map.png', SMALL * 150, zero=False)


@pytest.mark.parametrize('content', [b'', b'\x89PNG\r\n\x1a\n', b'no image'])
def test_label_maps_that_cannot_be_read(tmp_path, content):
    (tmp_path / 'map.png').write_bytes(content)
    with pytest.raises(InputError, match=r'map\.png does not decode \(.*\); replace it'):
        load(tmp_path / 'map.png')
    with pytest.raises(InputError, match=r'nowhere\.png is missing'):
        load(tmp_path / 'nowhere.png')
