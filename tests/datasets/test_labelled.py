"""A folder of labelled images is understood as a person would, and labels are right on data made to confuse."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from mmmilan.datasets.labelled import Labelled, read_labelled, stratify, write_labelled
from mmmilan.errors import InputError
from mmmilan.registry import DATASETS
from tests.helpers import ROOT

DETECTION = 'detection/mask-rcnn_vit-base-p16_milan-pre_1x_coco.py'
SEGMENTATION = 'segmentation/upernet_vit-base-p16_milan-pre_160k_ade20k-512x512.py'
CLASSIFICATION = 'milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'


def image(path: Path, value: int = 0, size: tuple[int, int] = (40, 32)) -> None:
    """A grey image of a brightness, by which a test knows it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((*size[::-1], 3), value, np.uint8))


def class_folders(root: Path, counts: dict[str, int]) -> Path:
    """Folders of images whose brightness is 10 times the place of their class in ``counts``."""
    for place, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for number in range(count):
            image(root / name / f'{number}.png', 10 * place)
    return root


def built(labelled: Labelled, out: Path, config: str) -> tuple:
    """The data sets of a labelled folder with the pipelines of one of our configs."""
    cfg = Config.fromfile(ROOT / 'configs' / config)
    init_default_scope(cfg.default_scope)
    parts = write_labelled(labelled, out)
    pipelines = dict(train=cfg.train_dataloader.dataset.pipeline, val=cfg.val_dataloader.dataset.pipeline)
    for step in (*pipelines['train'], *pipelines['val']):
        if step.type == 'mmmilan.LoadLabelMap':
            step.num_classes = len(labelled.classes)
        if step.get('with_mask'):
            step.with_mask = labelled.has_masks
    return tuple(DATASETS.build(parts[split] | dict(pipeline=pipelines[split])) for split in ('train', 'val'))


def files(records: list[dict]) -> list[str]:
    return [Path(record['img_path']).name for record in records]


# -- classification


def test_split_folders_of_classes(tmp_path):
    """Classes are matched by name: the splits have them in another order, and val lacks one."""
    data = tmp_path / 'data'
    class_folders(data / 'train', {'big dog': 3, 'ämeise': 3, 'cat': 3})
    class_folders(data / 'val', {'cat': 2, 'big dog': 1})
    (data / 'train/fish').mkdir()
    labelled = read_labelled(data)
    assert labelled.task == 'classification' and labelled.classes == ('big dog', 'cat', 'fish', 'ämeise')
    assert labelled.notes == [
        'Classes that cannot be learnt, without images in train: fish.',
        'Classes that cannot be measured, without images in val: fish, ämeise.',
    ]
    train, val = built(labelled, tmp_path / 'out', CLASSIFICATION)
    assert [train.get_data_info(i)['gt_label'] for i in range(9)] == [0, 0, 0, 1, 1, 1, 3, 3, 3]
    shades = {int(sample['inputs'][0, 0, 0]): int(sample['data_samples'].gt_label) for sample in val}
    assert shades == {10: 0, 0: 1} and val.metainfo['classes'] == labelled.classes
    assert train[0]['inputs'].shape == (3, 224, 224)


def test_folders_without_a_split(tmp_path):
    """A fifth of each class, the same whatever the number of the other images; a class of one image is trained on."""
    data = class_folders(tmp_path / 'data', dict(ant=50, bee=10, cat=2, dog=1))
    labelled = read_labelled(data, seed=3)
    assert Counter(each['label'] for each in labelled.val) == {0: 10, 1: 2, 2: 1}
    assert labelled.notes[0] == 'No images to validate on: 13 of 63 are kept for it, drawn by class with seed 3.'
    assert labelled.notes[1].startswith('Classes that cannot be measured, without images in val: dog')
    assert not {each['img_path'] for each in labelled.train} & {each['img_path'] for each in labelled.val}
    assert read_labelled(data, seed=3) == labelled != read_labelled(data, seed=4)

    write_labelled(labelled, tmp_path / 'out')
    written = (tmp_path / 'out/split.json').read_text()
    assert json.loads(written)['seed'] == 3
    write_labelled(read_labelled(data, seed=4), tmp_path / 'out')
    assert (tmp_path / 'out/split.json').read_text() == written
    image(data / 'ant/new.png')
    with pytest.raises(
        InputError, match=r'split.json does not fit .*: 0 images of it are gone and 1 are new \(ant/new'
    ):
        write_labelled(read_labelled(data), tmp_path / 'out')
    with pytest.raises(InputError, match=r'split.json was written for other data \(its classes: '):
        write_labelled(read_labelled(data, ignore='bee'), tmp_path / 'out')


def test_the_data_may_move(tmp_path):
    class_folders(tmp_path / 'data', dict(ant=2, bee=2))
    config = write_labelled(read_labelled(tmp_path / 'data'), tmp_path / 'out')['val']
    (tmp_path / 'data').rename(tmp_path / 'moved')
    dataset = DATASETS.build(
        config | dict(data_root=str(tmp_path / 'moved'), pipeline=[dict(type='mmmilan.LoadImage')])
    )
    assert [sample['img'][0, 0, 0] for sample in dataset] == [0, 10]


def test_stratify_several_labels_an_image():
    """Each label has its share on both sides, negatives too."""
    labels = [
        set(np.flatnonzero(row).tolist()) for row in np.random.default_rng(0).random((200, 4)) < (0.5, 0.2, 0.05, 0.02)
    ]
    chosen = stratify([f'{i}' for i in range(200)], labels, 0.2, 0)
    for label in range(4):
        have = [i for i, own in enumerate(labels) if label in own]
        assert abs(len(chosen.intersection(have)) - 0.2 * len(have)) <= max(1, 0.1 * len(have)), label
        assert 0 < len(chosen.intersection(have)) < len(have)
    negatives = [i for i, own in enumerate(labels) if not own]
    assert len(chosen.intersection(negatives)) == round(0.2 * len(negatives))


def test_names_of_folders_from_a_file(tmp_path):
    data = class_folders(tmp_path / 'data', dict(ant=2, bee=2))
    (data / 'classes.txt').write_text('bee\nant\n')
    assert read_labelled(data).classes == ('bee', 'ant')
    assert read_labelled(data, classes=['ant', 'bee', 'cow']).classes == ('ant', 'bee', 'cow')
    (data / 'classes.txt').write_text('Biene\nAmeise\n')
    labelled = read_labelled(data)
    assert labelled.classes == ('ant', 'bee') and 'names none of the classes' in labelled.notes[0]
    (data / 'classes.txt').write_text('ant\nbea\n')
    with pytest.raises(InputError, match='classes.txt lacks 1 of the 2 classes of .*: bee; add'):
        read_labelled(data)
    with pytest.raises(
        InputError, match=r'has 1 of its 2 classes, bee \(2 samples\), where classes has ant, bea \(is bea meant'
    ):
        read_labelled(data, classes=['ant', 'bea'])


@pytest.mark.parametrize(
    'splits, options, message',
    [
        (dict(train=dict(ant=2)), {}, r'has no labels \(found: 2 images in train/ant\); give folders'),
        (
            dict(train=dict(ant=2)),
            dict(task='classification'),
            'has images of the class ant alone: there is nothing to tell apart; give each',
        ),
        (dict(train=dict(ant=1, bee=1)), {}, 'No class of .* has two images, so none can be kept to validate on; give'),
        (dict(train=dict(ant=2, bee=2), val=dict(Bee=1)), {}, r'val has 1 of its 1 classes, Bee .*\(is bee meant'),
        (dict(train=dict(ant=2, bee=2)), dict(ignore='cow'), r'ignore names cow, which is no class of .* \(ant, bee\)'),
        (dict(train=dict(ant=2, bee=2)), dict(ignore='bee'), 'has images of the class ant alone'),
        (dict(train=dict(ant=2, bee=2)), dict(task='detect'), "task='detect' is unknown; choose classification,"),
        (dict(train=dict(ant=2, bee=2)), dict(val_fraction=1), 'val_fraction=1 is not between 0 and 1'),
        (dict(train=dict(ant=2, bee=2)), dict(classes='none.txt'), "classes='none.txt' is no file"),
        (dict(train=dict(ant=2, bee=2)), dict(classes=['ant', 'ant']), 'classes names the class ant twice'),
    ],
)  # fmt: skip
def test_folders_that_are_wrong(tmp_path, splits, options, message):
    for split, counts in splits.items():
        class_folders(tmp_path / split, counts)
    with pytest.raises(InputError, match=message):
        read_labelled(tmp_path, **options)


# -- objects


def coco(root: Path, name: str, folder: str, objects: dict[str, list], categories: dict[int, str]) -> dict:
    """A file in COCO's format: images of 40 x 32 by name, each with (category, x, y, width, height) and its polygon."""
    content = dict(images=[], annotations=[], categories=[dict(id=i, name=each) for i, each in categories.items()])
    for number, (file, own) in enumerate(objects.items()):
        image(root / folder / file, number)
        content['images'].append(dict(id=10 * number + 7, file_name=file, width=40, height=32))
        for category, x, y, width, height in own:
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            content['annotations'].append(
                dict(
                    id=len(content['annotations']) + 5,
                    image_id=10 * number + 7,
                    category_id=category,
                    bbox=[x, y, width, height],
                    area=width * height,
                    iscrowd=0,
                    segmentation=[corners],
                )
            )
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(content))
    return content


def boxes(dataset) -> dict[str, list]:
    """What a detector sees: name of the class and box x1, y1, x2, y2 of each object, by file name."""
    found = {}
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        objects = [(dataset.metainfo['classes'][each['bbox_label']], *each['bbox']) for each in info['instances']]
        found[Path(info['img_path']).name] = objects
    return found


DOG, CAT = (3, 8, 4, 10, 12), (90, 0, 0, 20, 16)


def test_coco(tmp_path):
    """Ids have gaps, the splits number the classes in another order, images lie in folders called as the splits."""
    pytest.importorskip('mmdet')
    data = tmp_path / 'data'
    coco(
        data,
        'annotations/instances_train2017.json',
        'train2017',
        {'1.png': [DOG, CAT], 'ü 2.png': []},
        {90: 'cat', 3: 'big dog'},
    )
    val = coco(
        data,
        'annotations/instances_val2017.json',
        'val2017',
        {'1.png': [(1, 5, 5, 9, 9), (2, 2, 2, 7, 7)]},
        {1: 'big dog', 2: 'cat'},
    )
    val['annotations'][1].update(iscrowd=1, segmentation=dict(size=[32, 40], counts=[64, 7, 1209]))
    (data / 'annotations/instances_val2017.json').write_text(json.dumps(val))
    (data / 'annotations/captions_val2017.json').write_text(json.dumps(val | dict(annotations=[dict(caption='bbox')])))
    labelled = read_labelled(data)
    assert (labelled.task, labelled.classes, labelled.has_masks) == ('detection', ('cat', 'big dog'), True)
    train, val = built(labelled, tmp_path / 'out', DETECTION)
    assert boxes(train) == {'1.png': [('big dog', 8, 4, 18, 16), ('cat', 0, 0, 20, 16)], 'ü 2.png': []}
    assert boxes(val) == {'1.png': [('big dog', 5, 5, 14, 14), ('cat', 2, 2, 9, 9)]}
    truth = val[0]['data_samples'].gt_instances
    assert truth.labels.tolist() == [1] and truth.masks.masks[0][10, 10] == 1
    assert val[0]['data_samples'].ignored_instances.labels.tolist() == [0]
    assert len(train) == 2 and train[1]['data_samples'].gt_instances.labels.tolist() == []
    assert labelled.notes == [
        f'train: 1 images without objects, kept as negatives; the first is {data}/train2017/ü 2.png.'
    ]


def test_coco_without_a_split(tmp_path):
    """In the folder of the images, as many tools export; divided by class, negatives too, and read back."""
    pytest.importorskip('mmdet')
    objects = {f'{i}.png': [DOG] if i < 10 else [CAT] if i < 20 else [] for i in range(30)}
    coco(tmp_path / 'data', '_annotations.coco.json', '', objects, {3: 'dog', 90: 'cat'})
    labelled = read_labelled(tmp_path / 'data')
    assert (len(labelled.train['images']), len(labelled.val['images'])) == (24, 6)
    train, val = built(labelled, tmp_path / 'out', DETECTION)
    found = boxes(val)
    assert sorted(len(own) for own in found.values()) == [0, 0, 1, 1, 1, 1]
    assert all(
        own == ([('dog', 8, 4, 18, 16)] if int(name[:-4]) < 10 else [('cat', 0, 0, 20, 16)] if own else [])
        for name, own in found.items()
    )
    assert not found.keys() & boxes(train).keys()
    again = write_labelled(read_labelled(tmp_path / 'data', seed=1), tmp_path / 'out')
    assert boxes(DATASETS.build(again['val'] | dict(pipeline=[]))) == found


def yolo(root: Path, rows: dict[str, str], content: str | None, size: tuple[int, int] = (40, 32)) -> Path:
    """Images and their text files, and ``data.yaml``."""
    for number, (file, text) in enumerate(rows.items()):
        image(root / file, number, size)
        path = root / file.replace('images/', 'labels/')
        if text is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix('.txt').write_text(text)
    if content:
        (root / 'data.yaml').write_text(content)
    return root


@pytest.mark.parametrize(
    'folder, val, paths',
    [
        ('images/train', 'images/val', 'path: .\ntrain: images/train\nval: images/val'),
        ('images/train', 'images/val', 'path: /nowhere\ntrain: [images/train]\nval: images/val'),
        ('images/train', 'images/val', 'train: {root}/images/train\nval: {root}/images/val'),
        ('train/images', 'valid/images', 'train: ../train/images\nval: ../valid/images'),  # Roboflow
        ('images/train', 'images/val', 'train: train.txt\nval: val.txt'),
        ('images/train', 'images/val', None),  # classes.txt alone
    ],
)
def test_yolo(tmp_path, folder, val, paths):
    pytest.importorskip('mmdet')
    pytest.importorskip('labelformat')
    data = tmp_path / 'data'
    rows = {
        f'{folder}/a.b.png': '1 0.5 0.5 0.5 0.25\n\n0 0.25 0.25 0.5 0.5\n',
        f'{folder}/empty.png': None,
        f'{val}/a.b.png': '1 0.5 0.5 0.1 0.25',
    }
    yolo(data, rows, paths and paths.format(root=data) + '\nnames: {0: cat, 1: big dog}\nnc: 2\n')
    for split in ('train', 'val'):
        (data / f'{split}.txt').write_text(
            ''.join(f'./{each}\n' for each in rows if each.startswith(dict(train=folder, val=val)[split]))
        )
    if paths is None:
        (data / 'classes.txt').write_text('cat\nbig dog\n')
    labelled = read_labelled(data)
    assert labelled.task == 'detection' and labelled.classes == ('cat', 'big dog') and not labelled.has_masks
    train, val = built(labelled, tmp_path / 'out', DETECTION)
    assert boxes(train) == {'a.b.png': [('big dog', 10, 12, 30, 20), ('cat', 0, 0, 20, 16)], 'empty.png': []}
    assert boxes(val) == {'a.b.png': [('big dog', 18, 12, 22, 20)]}


def test_yolo_polygons_on_turned_images(tmp_path):
    """Sizes are those after the EXIF rotation; train and val of one folder are divided."""
    pytest.importorskip('mmdet')
    pytest.importorskip('labelformat')
    data = tmp_path / 'data'
    yolo(
        data,
        {f'images/{i}.jpg': '0 0 0 0.5 0 0.5 0.5 0 0.5' for i in range(4)},
        'train: images\nval: images\nnames: [leaf]',
    )
    for path in (data / 'images').iterdir():
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).save(path, exif=exif)
    labelled = read_labelled(data)
    assert labelled.has_masks and len(labelled.val['images']) == 1
    assert labelled.train['images'][0] | dict(file_name='') == dict(id=0, file_name='', width=32, height=40)
    train, _ = built(labelled, tmp_path / 'out', DETECTION)
    assert boxes(train)['0.jpg' if '0.jpg' in boxes(train) else '1.jpg'] == [('leaf', 0, 0, 16, 20)]
    assert train[0]['data_samples'].gt_instances.masks.masks.shape[0] <= 1


def voc(root: Path, name: str, objects: list[tuple], folder: str = 'Annotations', size: tuple = (40, 32)) -> None:
    """An XML file of Pascal VOC, whose ``filename`` is the old name of its image."""
    things = ''.join(
        f'<object><name>{each}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>'
        for each, a, b, c, d in objects
    )
    (root / folder).mkdir(parents=True, exist_ok=True)
    (root / folder / f'{name}.xml').write_text(
        f'<annotation><filename>old.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height>'
        f'<depth>3</depth></size>{things}</annotation>'
    )


def test_pascal_voc(tmp_path):
    pytest.importorskip('mmdet')
    pytest.importorskip('labelformat')
    data = tmp_path / 'data'
    for number, name in enumerate('abcd'):
        image(data / f'JPEGImages/{name}.png', number)
        voc(
            data,
            name,
            [('dog, big', 1, 2, 11, 12), ('cat', 3, 4, 30, 31)][: number % 3],
            size=(0, 0) if number else (40, 32),
        )
    (data / 'ImageSets/Main').mkdir(parents=True)
    for split, names in dict(train='a c', val='b', trainval='a b c').items():
        (data / f'ImageSets/Main/{split}.txt').write_text('\n'.join(names.split()))
    labelled = read_labelled(data)
    assert labelled.classes == ('cat', 'dog, big') and not labelled.has_masks
    train, val = built(labelled, tmp_path / 'out', DETECTION)
    assert boxes(train) == {'a.png': [], 'c.png': [('dog, big', 1, 2, 11, 12), ('cat', 3, 4, 30, 31)]}
    assert boxes(val) == {'b.png': [('dog, big', 1, 2, 11, 12)]}


# -- label maps


def label_map(path: Path, rows: list, mode: str = 'L', size: int = 16) -> None:
    """A map of stripes: each value, or colour, in 16 columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.repeat(np.array(rows, np.uint8)[None], 32, 0).repeat(size, 1)
    if mode == 'P':
        picture = Image.fromarray(values, 'P')
        picture.putpalette([value for each in range(256) for value in (each, 255 - each, 7)])
        picture.save(path)
    else:
        Image.fromarray(values).save(path)


def stripes(dataset, classes: bool = True) -> dict[str, list]:
    """The classes of the stripes that a segmentor sees, by file name."""
    found = {}
    for i in range(len(dataset)):
        sample = dataset[i]['data_samples']
        row = sample.gt_sem_seg.data[0, 0, 8::16].tolist()
        names = dataset.metainfo['classes']
        found[Path(sample.img_path).name] = ['-' if label == 255 else names[label] for label in row]
    return found


def maps(root: Path, images: str, maps: str, rows: dict[str, list], **options) -> None:
    for name, row in rows.items():
        image(root / images / f'{name}.jpg', 0, (16 * len(row), 32))
        label_map(root / maps / f'{name}.png', row, **options)


@pytest.mark.parametrize('mode', ['L', 'P'])
@pytest.mark.parametrize(
    'folders',
    [
        ('images/{}', 'annotations/{}'), ('{}/images', '{}/masks'), ('{}2017', 'semantic/{}2017'), ('{}', '{}annot'),
        ('{}_images', '{}_labels'), ('leftImg8bit/{}/x y', 'gtFine/{}/x y'),
    ],
)  # fmt: skip
def test_label_maps(tmp_path, folders, mode):
    """Values have gaps, 255 is ignored, names come from a file."""
    pytest.importorskip('mmseg')
    data = tmp_path / 'data'
    rows = dict(train=dict(a=[0, 7, 255], b=[7, 7, 20]), val=dict(a=[20, 0, 0]))
    for split, own in rows.items():
        maps(data, *(each.format(split) for each in folders), own, mode=mode)
    (data / 'classes.json').write_text('{"7": "big tree", "20": "sky", "0": "sea"}')
    labelled = read_labelled(data)
    assert (
        labelled.task == 'segmentation'
        and labelled.classes == ('sea', 'big tree', 'sky')
        and labelled.notes == ['Classes that cannot be measured, without images in val: big tree.']
    )
    train, val = built(labelled, tmp_path / 'out', SEGMENTATION)
    assert stripes(val) == {'a.jpg': ['sky', 'sea', 'sea']}
    assert {label for i in range(8) for label in train[i % 2]['data_samples'].gt_sem_seg.data.unique().tolist()} <= {
        0,
        1,
        2,
        255,
    }
    assert len(train) == 2
    named = read_labelled(data, ignore='sea')
    assert named.classes == ('big tree', 'sky')
    _, val = built(named, tmp_path / 'out2', SEGMENTATION)
    assert stripes(val) == {'a.jpg': ['sky', '-', '-']}


def test_maps_of_colours(tmp_path):
    pytest.importorskip('mmseg')
    red, green, black = [255, 0, 0], [0, 128, 0], [0, 0, 0]
    data = tmp_path / 'data'
    for split in ('train', 'val'):
        maps(data, f'{split}/images', f'{split}/masks', dict(a=[red, green, black], b=[green, black, black]))
    tables = {
        'class_dict.csv': 'name,r,g,b\nvoid,0,0,0\nbig tree,0,128,0\ncar,255,0,0\n',
        'labelmap.txt': '# label:color_rgb:parts:actions\nvoid:0,0,0::\nbig tree:0,128,0::\ncar:255,0,0::\n',
        'classes.txt': '0 0 0 void\n0 128 0 big tree\n255 0 0 car\n',
        'classes.json': '{"void": [0, 0, 0], "big tree": "#008000", "car": [255, 0, 0]}',
    }
    for number, (name, text) in enumerate(tables.items()):
        (data / name).write_text(text)
        labelled = read_labelled(data, ignore='void')
        assert labelled.classes == ('big tree', 'car'), name
        _, val = built(labelled, tmp_path / f'out{number}', SEGMENTATION)
        assert stripes(val) == {'a.jpg': ['car', 'big tree', '-'], 'b.jpg': ['big tree', '-', '-']}
        (data / name).unlink()


@pytest.mark.parametrize(
    'classes, names',
    [(None, ('background', 'foreground')), (['polyp'], ('background', 'polyp')), (['b', 'p'], ('b', 'p'))],
)
@pytest.mark.parametrize('value, channels', [(255, 1), (1, 1), (255, 3)])
def test_two_classes(tmp_path, classes, names, value, channels):
    """0 and 255, or 0 and 1, also where a tool saved the map as RGB; maps lie beside the images."""
    pytest.importorskip('mmseg')
    for number in range(4):
        rows = [[0, value, 0], [value, value, 0]][number % 2]
        maps(tmp_path / 'data', '.', '.', {f'{number}': rows if channels == 1 else [[each] * 3 for each in rows]})
        (tmp_path / f'data/{number}.png').rename(tmp_path / f'data/{number}_mask.png')
    labelled = read_labelled(tmp_path / 'data', classes=classes)
    assert labelled.classes == names
    _, val = built(labelled, tmp_path / 'out', SEGMENTATION)
    for name, row in stripes(val).items():
        assert row == [[names[0], names[1], names[0]], [names[1], names[1], names[0]]][int(name[0]) % 2]
