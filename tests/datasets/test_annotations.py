"""Wrong annotations of detection and segmentation are refused in one sentence that names the entry."""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from contextlib import nullcontext

import cv2
import numpy as np
import pytest
from mmengine.dataset import BaseDataset
from PIL import Image, ImageColor

from mmmilan.datasets import LoadImage, LoadLabelMap
from mmmilan.datasets.annotations import category_ids, check_label_maps, check_palette, count_rle, has_masks
from mmmilan.datasets.classes import use_classes
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


def read(tmp_path, content: bytes | dict, classes: tuple[str, ...] | None = ('dog', 'horse'), **options) -> BaseDataset:
    """The data set of a file with this content, as our configs read it."""
    path = tmp_path / 'instances.json'
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    settings = dict(ann_file=str(path), data_prefix=dict(img=''), metainfo=dict(classes=classes) if classes else None)
    return DATASETS.build(dict(type='mmmilan.CocoDataset', **settings, **options))


def test_sound_annotations(tmp_path):
    dataset = read(tmp_path, instances())
    boxes = [[each['bbox'] for each in dataset.get_data_info(index)['instances']] for index in (0, 1)]
    assert boxes == [[[1, 2, 4.5, 6]], [[1, 2, 4.5, 6]]]


def test_without_names_the_classes_are_the_files(tmp_path):
    """And not COCO's 80, mmdet's default."""
    content = instances()
    content['categories'] = [dict(id=19, name='horse'), dict(id=4, name='cow'), dict(id=18, name='dog')]
    dataset = read(tmp_path, content, None)
    assert dataset.metainfo['classes'] == ('horse', 'cow', 'dog')
    assert [each['bbox_label'] for each in dataset.get_data_info(0)['instances']] == [2]


@pytest.mark.parametrize('classes', [('dog', 'horse'), ('horse', 'dog')])
@pytest.mark.parametrize('turned', [False, True])
def test_labels_are_those_of_names(tmp_path, classes, turned):
    """In whatever order the file has its categories."""
    content = instances()
    content['annotations'][2]['category_id'] = 19
    content['categories'] = content['categories'][::-1] if turned else content['categories']
    dataset = read(tmp_path, content, classes)
    found = [each['bbox_label'] for index in (0, 1) for each in dataset.get_data_info(index)['instances']]
    assert [dataset.metainfo['classes'][label] for label in found] == ['dog', 'horse']
    use_classes(dataset, ('cow', 'horse', 'dog'), 'train')
    found = [each['bbox_label'] for index in (0, 1) for each in dataset.get_data_info(index)['instances']]
    assert found == [2, 1]


def test_classes_that_only_one_side_has(tmp_path, log):
    with pytest.raises(
        InputError, match=r'instances\.json lacks 1 of the 2 classes, cat, and has dog, horse; leave out'
    ):
        read(tmp_path, instances(), ('cat', 'dog'))  # in a training split
    with pytest.raises(InputError, match=r'lacks 1 of the 2 classes, dgo, and'):
        read(tmp_path, instances(), ('dgo', 'horse'), test_mode=True)  # misspelt
    dataset = read(tmp_path, instances(), ('cat', 'dog', 'horse'), test_mode=True)
    assert [each['bbox_label'] for each in dataset.get_data_info(0)['instances']] == [1]
    assert 'instances.json lacks 1 of the 3 classes: cat.' in log.text
    dataset = read(tmp_path, instances() | dict(categories=instances()['categories'][::-1]), ('horse',))
    assert not dataset.get_data_info(0)['instances']
    assert '3 of 3 objects are left out, of the 1 categories that metainfo.classes does not name: dog.' in log.text
    with pytest.raises(InputError, match=r'instances\.json has 1 of its 2 classes, dog \(2 samples\), where train has'):
        use_classes(read(tmp_path, instances(), None, test_mode=True), ('horse', 'cow'), 'train')


def test_ids_of_categories_by_name():
    categories = {7: dict(id=7, name='dog'), 3: dict(id=3, name='cat')}
    assert category_ids(categories, ('cat', 'bee', 'dog')) == [3, -2, 7]
    assert categories[-2]['name'] == 'bee'  # of which a metric asks the name


def test_a_training_split_without_an_object(tmp_path, log):
    """It is said; it may be joined to another one, as images without objects are."""
    content = instances()
    content['annotations'][0]['iscrowd'] = 1  # the second box is empty, the third a crowd, too
    for objects in (content['annotations'], []):
        read(tmp_path, content | dict(annotations=objects), test_mode=True)
        assert 'no object to learn' not in log.text
        read(tmp_path, content | dict(annotations=objects))
        assert 'instances.json has no object to learn: none, or all are crowds' in log.text
        log.clear()


MASKS = [dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True)]


def test_objects_without_masks(tmp_path):
    """They are counted where the pipeline loads masks."""
    content = instances()
    content['annotations'][1]['bbox'] = [1, 2, 3, 4]
    assert len(read(tmp_path, content).get_data_info(0)['instances']) == 2
    with pytest.raises(
        InputError, match=r'instances.json: 1 of 3 objects have no segmentation, the first in 1.jpg; add'
    ):
        read(tmp_path, content, pipeline=MASKS)
    for empty in ([], [[]], [[1, 2, 3, 4]], None):
        content['annotations'][2]['segmentation'] = empty
        with pytest.raises(InputError, match='2 of 3 objects have no segmentation'):
            read(tmp_path, content, pipeline=MASKS)
    read(tmp_path, instances(), pipeline=MASKS)  # an empty box has none, and is left out


FAULTS = [
    ('annotations', 'bbox', [0, 0, math.nan, 4], 'annotations[1] (id 8) has the bbox [0, 0, nan, 4]'),
    ('annotations', 'bbox', [0, 0, math.inf, 4], 'annotations[1] (id 8) has the bbox'),
    ('annotations', 'bbox', [5, 5, -3, 4], 'annotations[1] (id 8) has the bbox [5, 5, -3, 4]'),
    ('annotations', 'bbox', [5, 5, 3], 'annotations[1] (id 8) has the bbox'),
    ('annotations', 'bbox', ['5', 5, 3, 3], 'annotations[1] (id 8) has the bbox'),
    ('annotations', 'bbox', None, 'annotations[1] (id 8) has the bbox None'),
    ('annotations', 'area', None, 'annotations[1] (id 8) has the area None'),
    ('annotations', 'area', -1, 'annotations[1] (id 8) has the area -1'),
    ('annotations', 'image_id', 3, 'annotations[1] (id 8) has the unknown image_id 3'),
    ('annotations', 'category_id', 1, 'annotations[1] (id 8) has the unknown category_id 1'),
    ('annotations', 'category_id', [18], 'annotations[1] (id 8) has the unknown category_id [18]'),
    ('annotations', 'segmentation', [[1, 2, 3]], 'annotations[1] (id 8) has a segmentation'),
    ('annotations', 'segmentation', [[1, 2, math.nan, 4]], 'annotations[1] (id 8) has a segmentation'),
    ('annotations', 'segmentation', dict(size=[40, 30], counts=[1200]), 'annotations[1] (id 8) has a segmentation'),
    ('annotations', 'segmentation', dict(size=[30, 40], counts=[5, 1194]), 'annotations[1] (id 8) has a segmentation'),
    ('annotations', 'segmentation', dict(size=[30, 40], counts='zz'), 'annotations[1] (id 8) has a segmentation'),
    ('annotations', 'segmentation', dict(size=[30, 40]), 'annotations[1] (id 8) has a segmentation'),
    ('annotations', 'id', 7, 'annotations[1] has the id 7 of an earlier one'),
    ('annotations', None, 'x', 'annotations[1] has no id'),
    ('images', 'width', 0, 'images[1] (2.jpg) has the width 0'),
    ('images', 'height', '30', "images[1] (2.jpg) has the height '30'"),
    ('images', 'file_name', None, 'images[1] has no file_name'),
    ('images', 'id', 1, 'images[1] has the id 1 of an earlier one'),
    ('categories', 'name', None, 'categories[1] has no name'),
    ('categories', 'name', 'dog', 'categories[1] has the name dog of an earlier one'),
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


@pytest.mark.parametrize(
    'text, masks',
    [
        ('', False),
        ('{"annotations": [{"bbox": [1]}]}', False),
        ('[{"segmentation": []}, {"segmentation":null}, {"segmentation" : [ [], [] ]}, {"segmentation": {} }]', False),
        ('[{"segmentation": ""}]', False),
        ('[{"segmentation": []}, {"segmentation": [[1, 2]]}]', True),
        ('[{"segmentation":{"counts": ""}}]', True),
        ('[{"segmentation"\n:\n[\n[\n1.5\n]\n]\n}]', True),
    ],
)
def test_whether_a_file_has_masks(tmp_path, text, masks):
    (tmp_path / 'a.json').write_text(text)
    assert has_masks(tmp_path / 'a.json') == masks


def test_runs_of_masks_are_counted_as_pycocotools_reads_them():
    from pycocotools import mask

    random = np.random.default_rng(0)
    for height, width, share in ((3, 4, 0.5), (200, 300, 0.01), (1, 1, 1), (64, 64, 0), (900, 800, 0.9)):
        pixels = np.asfortranarray(random.random((height, width)) < share, np.uint8)
        text = mask.encode(pixels)['counts'].decode()
        assert count_rle(text) == height * width
        assert count_rle(text[:-1]) != height * width
    for wrong in (None, '', 'é', '0' * 20, [1, -1], [1.5], b'0', 'o' * 9 + '0'):
        assert count_rle(wrong) in (-1, 0)


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
        (SMALL.astype(np.uint16) * 300, r'map\.png is an image of mode I;16; give label maps of 8 bits'),
        (np.arange(36, dtype=np.uint8).reshape(3, 4, 3), r'map\.png is an RGB image in colours; give label maps with'),
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


@pytest.mark.parametrize('mode', ['I', 'RGB', 'RGBA', 'LA'])
def test_label_maps_of_16_bits(tmp_path, mode):
    """Pillow reads those of several channels as their high bytes, all of which are 0."""
    paths = [tmp_path / 'map.png', tmp_path / 'map.tif']
    if mode == 'LA':  # OpenCV does not write it
        del paths[1]
        paths[0].write_bytes(grey_with_alpha(np.full((3, 4, 2), 3)))
    for path in paths:
        if mode != 'LA':
            cv2.imwrite(str(path), np.full((3, 4, len(mode)), 3, np.uint16))
        with pytest.raises(InputError, match=f'{path.name} is an image of mode {mode};16; give label maps of 8 bits'):
            load(path, zero=False)


def grey_with_alpha(pixels: np.ndarray) -> bytes:
    """A PNG of 16-bit grey and alpha [H, W, 2]."""
    height, width, _ = pixels.shape
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    parts = {
        b'IHDR': struct.pack('>IIBBBBB', width, height, 16, 4, 0, 0, 0),
        b'IDAT': zlib.compress(rows),
        b'IEND': b'',
    }
    chunks = (
        struct.pack('>I', len(own)) + key + own + struct.pack('>I', zlib.crc32(key + own)) for key, own in parts.items()
    )
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def test_labels_without_a_reduced_zero(tmp_path):
    with pytest.raises(InputError, match='has the label 150 in 12 pixels, where 0 to 149 are possible'):
        load(tmp_path / 'map.png', SMALL * 150, zero=False)


@pytest.mark.parametrize('channels', [3, 4])
def test_grey_pixels_of_an_image_in_colours(tmp_path, channels):
    """Many tools save masks so; they are read as by finetune."""
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    pixels = np.stack([labels] * 3 + [np.full_like(labels, 255)] * (channels - 3), axis=-1)
    assert (load(tmp_path / 'map.png', pixels, zero=False) == labels).all()
    assert (load(tmp_path / 'map.png', pixels) == labels - 1).all()


@pytest.mark.parametrize('content', [b'', b'\x89PNG\r\n\x1a\n', b'no image'])
def test_label_maps_that_cannot_be_read(tmp_path, content):
    (tmp_path / 'map.png').write_bytes(content)
    with pytest.raises(InputError, match=r'map\.png does not decode \(.*\); replace it'):
        load(tmp_path / 'map.png')
    if content == b'no image':
        with pytest.raises(InputError, match=r'map\.png does not decode \(no image that Pillow knows\); replace it'):
            load(tmp_path / 'map.png')
    with pytest.raises(InputError, match=r'nowhere\.png is missing'):
        load(tmp_path / 'nowhere.png')


# -- a split of label maps


@pytest.fixture
def maps(tmp_path):
    """Makes a data set of label maps from their values, one map each."""

    def make(*values: list[int], classes: tuple[str, ...] | None = ('sky', 'sea'), mode: str = 'L', **options):
        for folder in ('images', 'maps'):
            (tmp_path / folder).mkdir()
        for index, row in enumerate(values):
            cv2.imwrite(str(tmp_path / f'images/{index}.jpg'), np.zeros((1, len(row), 3), np.uint8))
            image = Image.fromarray(np.array([row], np.uint8))
            if mode == 'P':
                image = Image.fromarray(np.array([row], np.uint8), 'P')
                image.putpalette([value for each in range(256) for value in (each, 255 - each, 7)])
            image.save(tmp_path / f'maps/{index}.png')
        return DATASETS.build(
            dict(
                type='mmseg.BaseSegDataset',
                data_prefix=dict(img_path=str(tmp_path / 'images'), seg_map_path=str(tmp_path / 'maps')),
                metainfo=dict(classes=classes) if classes else None,
                pipeline=[
                    dict(type='mmmilan.LoadImage'),
                    dict(type='mmmilan.LoadLabelMap', num_classes=len(classes or ())),
                ],
                **options,
            )
        )

    return make


def seen(dataset: BaseDataset) -> list[list[int]]:
    return [dataset[index]['gt_seg_map'][0].tolist() for index in range(len(dataset))]


@pytest.mark.parametrize('mode', ['L', 'P'])
@pytest.mark.parametrize('serialize_data', [True, False])
def test_masks_of_0_and_255_are_two_classes(maps, log, mode, serialize_data):
    dataset = maps([0, 255], [0, 0], [255, 255], mode=mode, serialize_data=serialize_data)
    assert seen(dataset) == [[0, 255], [0, 0], [255, 255]]
    check_label_maps(dataset)
    assert seen(dataset) == [[0, 1], [0, 0], [1, 1]]
    assert (
        '3 of the 3 label maps of ' in log.text
        and 'have the values 0 and 255: 255 is taken for the class sea' in log.text
    )
    use_classes(dataset, ('sea', 'land', 'sky'), 'train')
    assert seen(dataset) == [[2, 0], [2, 2], [0, 0]]


def test_masks_of_0_and_255_beside_those_of_0_and_1(maps, log):
    """Of another tool, or with pixels of no class: it is not clear, unless a map has all three."""
    check_label_maps(maps([0, 1], [0, 1], [0, 255]))
    assert 'has the values 0 and 1, ' in log.text and 'write 1 where it is sea' in log.text


@pytest.mark.parametrize('turned', [False, True])
def test_palettes_of_another_order(tmp_path, turned):
    """Those of two splits, of which other maps may have no palette or other colours."""
    known = {}
    for name, colours in dict(train=['black', 'red'], val=['red', 'black'] if turned else ['black', 'blue']).items():
        image = Image.new('P', (2, 1))
        image.putdata([0, 1])
        image.putpalette([number for each in colours for number in ImageColor.getrgb(each)])
        image.save(tmp_path / f'{name}.png')
        message = r'val.png has the colour \(255, 0, 0\) at 0 of its palette, train.png at 1: '
        with pytest.raises(InputError, match=message) if turned and name == 'val' else nullcontext():
            check_palette(f'{name}.png', (tmp_path / f'{name}.png').read_bytes(), [0, 1], known)


@pytest.mark.parametrize(
    'values, classes, message',
    [
        ([[0, 255, 1]], 2, ''),  # 255 has no class
        ([[0, 1], [1, 1]], 2, ''),
        ([[0, 255]], 3, r'Only the class class0 occurs in 1 of the 1 label maps of .*maps \(values 0, 255\)'),
        ([[0, 0], [0, 0]], 2, r'Only the class class0 occurs in 2 of the 2 label maps of .*maps \(values 0\)'),
        ([[0, 2], [255, 0]], 4, r'2 of 4 classes do not occur in 2 of the 2 label maps of .*maps: class1, class3\.'),
    ],
)
def test_classes_that_do_not_occur(maps, log, values, classes, message):
    dataset = maps(*values, classes=tuple(f'class{number}' for number in range(classes)))
    check_label_maps(dataset)
    assert any(record.levelname == 'WARNING' for record in log.records) == bool(message)
    assert re.search(message, log.text)
    assert seen(dataset) == values  # unchanged


@pytest.mark.parametrize(
    'values, classes, reduced, message',
    [
        (
            [[0, 128, 255]],
            2,
            False,
            r'0\.png has the label 128 in 1 pixels, where 0 to 1 are possible; correct',
        ),
        ([[0, 128, 255]], 3, False, r'0\.png has the label 128 in 1 pixels, where 0 to 2 are possible'),
        ([[0, 85, 170, 255]], 4, False, r'0\.png has the labels 85, 170 in 2 pixels, where 0 to 3 are possible'),
        ([[1, 2, 2]], 2, False, r'has the label 2 in 2 pixels, where 0 to 1 .* or set reduce_zero_label=True if 0'),
        (
            [[0, 255]],
            2,
            True,
            r'No pixel of 1 of the 1 label maps of .* has a class \(their values: 0\)',
        ),
        ([[255, 255]], 2, False, r'No pixel of 1 of the 1 label maps of .* has a class \(their values: 255\)'),
        ([[0, 1]], None, False, r'maps has no names of classes; set metainfo=dict\(classes'),
    ],
)
def test_maps_that_cannot_be_meant(maps, values, classes, reduced, message):
    names = classes and tuple(f'class{number}' for number in range(classes))
    with pytest.raises(InputError, match=message):
        check_label_maps(maps(*values, classes=names, reduce_zero_label=reduced))


def test_a_split_whose_names_are_in_another_order(maps):
    dataset = maps([0, 1, 2, 255], classes=('sky', 'sea', 'land'))
    with pytest.raises(InputError, match='maps has 1 of its 3 classes, land, where train has sky, sea;'):
        use_classes(dataset, ('sky', 'sea'), 'train')
    use_classes(dataset, ('land', 'tree', 'sky', 'sea'), 'train')
    assert seen(dataset) == [[2, 3, 0, 255]]
