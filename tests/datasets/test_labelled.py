"""A folder of labelled images is understood as a person would, and labels are right on data made to confuse."""

from __future__ import annotations

import itertools
import json
import shutil
import tarfile
from collections import Counter
from copy import deepcopy
from functools import cache, partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from helpers import ROOT
from mmmilan.datasets.image_folder import list_images
from mmmilan.datasets.labelled import TASKS, Labelled, image_paths, read_labelled, stratify
from mmmilan.datasets.split_file import LabelledImages, labelled_datasets, write_labelled
from mmmilan.errors import InputError
from mmmilan.registry import DATASETS

DETECTION = 'detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py'
SEGMENTATION = 'segmentation/upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py'
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


@cache
def read_config(name: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / name)


def written(labelled: Labelled, out: Path) -> dict[str, dict]:
    """Configs of the data sets of a labelled folder, once they are written."""
    write_labelled(labelled, out)
    return labelled_datasets(labelled, out)


def built(labelled: Labelled, out: Path, config: str) -> tuple:
    """The data sets of a labelled folder with the pipelines of one of our configs."""
    cfg = deepcopy(read_config(config))
    init_default_scope(cfg.default_scope)
    parts = written(labelled, out)
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


def test_images_in_shards(tmp_path):
    class_folders(tmp_path / 'data', dict(ant=3, bee=3))
    for name in ('ant', 'bee'):
        with tarfile.open(tmp_path / f'data/{name}/0.tar', 'w') as shard:
            for path in sorted((tmp_path / 'data' / name).glob('*.png')):
                shard.add(path, path.name)
                path.unlink()
    config = written(read_labelled(tmp_path / 'data'), tmp_path / 'out')['val']
    dataset = DATASETS.build(config | dict(pipeline=[dict(type='mmmilan.LoadImage')]))
    assert [(sample['img'][0, 0, 0], sample['gt_label']) for sample in dataset] == [(0, 0), (10, 1)]
    assert (tmp_path / 'data/ant/0.tar.index.json').exists() and len(read_labelled(tmp_path / 'data').notes) == 1


def test_two_splits_of_which_none_is_called_train(tmp_path):
    """The first is trained on, and the last validates: no image is in both."""
    for split in ('dev', 'test'):
        class_folders(tmp_path / 'data' / split, dict(ant=2, bee=2))
    labelled = read_labelled(tmp_path / 'data')
    sides = [{Path(each['img_path']).parts[-3] for each in part} for part in (labelled.train, labelled.val)]
    assert sides == [{'dev'}, {'test'}] and labelled.classes == ('ant', 'bee')


def test_the_data_may_move(tmp_path):
    class_folders(tmp_path / 'data', dict(ant=2, bee=2))
    config = written(read_labelled(tmp_path / 'data'), tmp_path / 'out')['val']
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


@pytest.mark.parametrize('images', [2, 3, 40])
def test_stratify_where_each_image_has_a_label_of_its_own(images):
    """As in photographs of streets and rooms with a hundred classes."""
    labels = [{0, 10 + i} | ({100 + i} if i % 2 else set()) for i in range(images)]
    chosen = stratify([f'{i}' for i in range(images)], labels, 0.2, 0)
    assert len(chosen) == max(1, images // 10) and all(i % 2 == 0 for i in chosen)  # those that take fewest away
    assert not stratify(['0'], [{0, 1}], 0.2, 0)


def test_stratify_many_rare_labels():
    """No label is lost to train on, whatever stands beside it."""
    labels = [set(np.random.default_rng(i).integers(0, 60, 3).tolist()) for i in range(60)]
    chosen = stratify([f'{i}' for i in range(60)], labels, 0.2, 0)
    left = [own for i, own in enumerate(labels) if i not in chosen]
    assert set().union(*left) == set().union(*labels) and 12 <= len(chosen) <= 24


def test_masks_beside_the_images_of_classes(tmp_path):
    """Both tasks are possible; masks are no images of a class."""
    for name in ('benign', 'malignant'):
        for number in range(4):
            image(tmp_path / f'{name}/{name} ({number}).png', 0, (48, 32))
            label_map(tmp_path / f'{name}/{name} ({number})_mask.png', [0, 255, 0])
    refused(tmp_path, "has labels for segmentation and classification; choose with task='segmentation'")
    labelled = read_labelled(tmp_path, task='classification')
    assert len(labelled.train + labelled.val) == 8
    assert labelled.notes[0] == f'8 label maps of {tmp_path} left out.'
    label_map(tmp_path / 'benign/benign (0)_mask_1.png', [0, 255, 0])
    assert read_labelled(tmp_path, task='classification').train == labelled.train
    refused(tmp_path, r'has 2 label maps of one name, .* not clear; rename or remove some', task='segmentation')


def test_masks_of_single_objects_beside_the_images_of_classes(tmp_path, log):
    """Several an image, of names of their own."""
    for name in ('benign', 'malignant'):
        for number in range(4):
            image(tmp_path / f'{name}/images/{number}.png')
            image(tmp_path / f'{name}/masks/object {number}.png')
    labelled = read_labelled(tmp_path)
    paths = image_paths(labelled.train) + image_paths(labelled.val)
    assert sorted(paths) == sorted(map(str, tmp_path.glob('*/images/*.png'))) and len(labelled.notes) == 1
    where = 'in folders of label maps and the like (benign/masks, malignant/masks).'
    assert log.text.count(f'Left out of {tmp_path}: 8 {where}') == 1


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


def test_annotations_that_are_not_read(tmp_path):
    """As of labelme or Supervisely, whose folders are cameras or parts and not classes."""
    for number in range(8):
        path = tmp_path / f'part{number % 2}/{number}.png'
        image(path)
        path.with_suffix('.json').write_text('{"shapes": [{"label": "cat", "points": [[1, 1], [5, 5]]}]}')
    (tmp_path / 'classes.txt').write_text('part0\npart1\n')
    (tmp_path / 'table.csv').write_text('0.png,cat\n')
    assert read_labelled(tmp_path).notes[0] == 'The folders name the classes; not read: 1 .csv, 8 .json.'


def test_folders_that_may_be_folds_of_the_same_classes(tmp_path):
    for fold in 'xyz':
        class_folders(tmp_path / f'folds/{fold}', dict(ant=2, bee=2))
    notes = read_labelled(tmp_path / 'folds').notes
    assert notes[0] == 'Each of x, y, z has the folders ant, bee; if those are the classes, give one of the former.'
    class_folders(tmp_path / 'other/cat', dict(indoor=2, outdoor=2, left=1))
    class_folders(tmp_path / 'other/dog', dict(outdoor=2, right=1))
    assert len(read_labelled(tmp_path / 'other').notes) == 1


def test_only_what_is_held_out(tmp_path):
    """A folder with a single split is divided, or evaluated as it is."""
    class_folders(tmp_path / 'test', dict(ant=5, bee=5))
    labelled = read_labelled(tmp_path)
    assert labelled.classes == ('ant', 'bee') and (len(labelled.train), len(labelled.val)) == (8, 2)
    assert (labelled := read_labelled(tmp_path, evaluate=True)).train == [] and len(labelled.val) == 10
    assert labelled.notes == []


def test_to_evaluate_no_other_split_is_read(tmp_path):
    class_folders(tmp_path / 'train', dict(ant=2))
    class_folders(tmp_path / 'val', dict(ant=1, bee=3))
    labelled = read_labelled(tmp_path, task='classification', evaluate=True)
    assert labelled.classes == ('ant', 'bee') and len(labelled.val) == 4 and labelled.train == []


def test_splits_within_classes(tmp_path):
    for name in ('ant', 'bee'):
        class_folders(tmp_path / name, dict(train=2, val=1))
    for task in (None, 'classification'):
        with pytest.raises(InputError, match='into ant/train and ant/val; put the splits above them, as in train/ant'):
            read_labelled(tmp_path, task=task)


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


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize(
    ('splits', 'training', 'validation', 'tested'),
    [
        ('train valid test', 'train', 'valid', 'valid'),
        ('train test', 'train', 'test', 'test'),
        ('valid test', 'valid', 'test', 'test'),
    ],
)
def test_every_task_takes_the_same_splits(tmp_path, task, splits, training, validation, tested):
    for split in splits.split():
        if task == 'classification':
            class_folders(tmp_path / split, dict(ant=2, bee=2))
        elif task == 'detection':
            coco(tmp_path, f'{split}/x.json', split, {f'{i}.png': [DOG, CAT] for i in range(4)}, {3: 'dog', 90: 'cat'})
        else:
            maps(tmp_path, f'{split}/images', f'{split}/masks', {str(i): [0, 1] for i in range(4)})

    def read(part) -> set[str]:
        return {Path(path).relative_to(tmp_path).parts[0] for path in image_paths(part)}

    labelled = read_labelled(tmp_path, task)
    assert (read(labelled.train), read(labelled.val)) == ({training}, {validation})
    labelled = read_labelled(tmp_path, task, evaluate=True)
    assert (read(labelled.train), read(labelled.val)) == (set(), {tested})


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
        f'train: 1 image without objects, kept as a negative; the first is {data}/train2017/ü 2.png.',
        f'val: 1 object neither trained on nor scored (a crowd, or difficult); the first is {data}/val2017/1.png.',
        'Classes that cannot be measured, without images in val: cat.',
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
    again = written(read_labelled(tmp_path / 'data', seed=1), tmp_path / 'out')
    assert boxes(DATASETS.build(again['val'] | dict(pipeline=[]))) == found


def test_a_missing_image_is_none_of_the_same_name_elsewhere(tmp_path):
    """Not of another split, of another folder beside it, or its own label map."""
    names = [f'{i}.png' for i in range(4)]
    objects = dict.fromkeys(names, [DOG, CAT])
    for split in ('train', 'val'):
        coco(tmp_path / 'splits', f'{split}.json', split, objects, {3: 'dog', 90: 'cat'})
    content = coco(tmp_path / 'folders', 'a.json', 'a', objects, {3: 'dog', 90: 'cat'})
    for number, each in enumerate(content['images']):
        each['file_name'] = f'{"ab"[number % 2]}/{number}.png'
    (tmp_path / 'folders/a.json').write_text(json.dumps(content))
    coco(tmp_path / 'maps', 'annotations/a.json', 'images', objects, {3: 'dog', 90: 'cat'})
    for number in range(4):
        image(tmp_path / f'maps/annotations/{number}.png')
        for folder in ('folders/b', 'voc/x', 'voc/y'):
            image(tmp_path / folder / names[number])
        voc(tmp_path, str(number), [('dog', 1, 2, 11, 12), ('cat', 3, 4, 30, 31)], 'voc/x')
    lost = [('splits', 'train/3.png', '3.png', 'train.json'), ('folders', 'b/3.png', 'b/3.png', 'a.json')]
    lost += [('maps', 'images/3.png', '3.png', 'annotations/a.json'), ('voc', 'x/3.png', 'old.jpg', 'x/3.xml')]
    for folder, file, name, source in lost:
        whole = read_labelled(tmp_path / folder, 'detection')
        assert not any('(missing)' in note for note in whole.notes)
        (tmp_path / folder / file).unlink()
        labelled = read_labelled(tmp_path / folder, 'detection')
        note = f'train: 1 image left out (missing); the first is {name} of {tmp_path / folder / source}.'
        assert note in labelled.notes
        paths = {path for part in (labelled.train, labelled.val) for path in image_paths(part)}
        every = {path for part in (whole.train, whole.val) for path in image_paths(part)}
        assert every - paths == {str(tmp_path / folder / file)}


def test_images_of_both_splits_in_a_folder_of_one(tmp_path):
    """Kaggle's train_images, which somebody divided by two files; and folders that have other names now."""
    coco(tmp_path, 'train.json', 'train_images', {'1.png': [DOG], '2.png': [CAT]}, {3: 'dog', 90: 'cat'})
    content = coco(tmp_path, 'val.json', 'train_images', {'3.png': [DOG], '4.png': [CAT]}, {3: 'dog', 90: 'cat'})
    for each in content['images']:
        each['file_name'] = 'C:\\photos\\' + each['file_name']
    (tmp_path / 'val.json').write_text(json.dumps(content))
    labelled = read_labelled(tmp_path, task='detection')
    assert [Path(path).name for path in image_paths(labelled.val)] == ['3.png', '4.png'] and not labelled.notes


@pytest.mark.parametrize(
    'task, empty', [*itertools.product(['detection', 'segmentation'], ['train', 'val']), ('segmentation', 'test')]
)
def test_a_split_without_a_label(tmp_path, task, empty):
    """Nothing can be learnt from it or measured on it; one beside a val is not used."""
    for split in ('train', 'val', 'test'):
        if task == 'detection':
            objects = {f'{i}.png': [DOG, CAT] * (split != empty) for i in range(2)}
            coco(tmp_path, f'{split}.json', split, objects, {3: 'dog', 90: 'cat'})
        else:
            rows = [255, 255] if split == empty else [0, 1]
            maps(tmp_path, f'images/{split}', f'masks/{split}', dict.fromkeys('ab', rows))
    if empty == 'test':
        assert len(image_paths(read_labelled(tmp_path, task).val)) == 2
        shutil.rmtree(tmp_path / 'masks/val')
        empty = 'val'
    refused(tmp_path, f'has 2 images of {empty} without a label of .*; label some, or remove them', task=task)


def test_objects_none_of_which_can_be_used(tmp_path):
    """Such as boxes in shares of the image."""
    content = coco(tmp_path, 'a.json', 'images', {'0.png': [CAT], '1.png': [CAT]}, {90: 'cat'})
    for each in content['annotations']:
        each.update(bbox=[0.1, 0.1, 0.5, 0.5], segmentation=[])
    (tmp_path / 'a.json').write_text(json.dumps(content))
    refused(tmp_path, r'without a label of cat \(train: 2 objects left out \(box of less than a pixel\); the first is ')


def test_one_image_with_objects(tmp_path):
    objects = {f'{i}.png': [DOG] * (i == 3) for i in range(10)}
    coco(tmp_path, 'a.json', 'images', objects, {3: 'dog'})
    refused(tmp_path, 'No class of .* has two images, so none can be kept to validate on')


def yolo(root: Path, rows: dict[str, str], content: str | None, size: tuple[int, int] = (40, 32)) -> Path:
    """Images and their text files, and ``data.yaml``."""
    for number, (file, text) in enumerate(rows.items()):
        image(root / file, number, size)
        path = root / file.replace('images/', 'labels/')
        if text is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix('.txt').write_text(text)
    if content:
        (root / 'data.yaml').write_text(content, errors='surrogateescape')
    return root


@pytest.mark.parametrize('text', [None, ''])
def test_a_test_without_objects(tmp_path, text):
    """It is often kept back: a part of train takes its place, unless a model is to be tested on it."""
    splits = {
        f'images/{split}/{i}.png': '0 0.5 0.5 0.5 0.5' if split == 'train' else text
        for split in ('train', 'test')
        for i in range(10)
    }
    yolo(tmp_path / 'yolo', splits, 'train: images/train\ntest: images/test\nnames: [cat]')
    for split, objects in (('train', [CAT]), ('test', [])):
        coco(tmp_path / 'coco', f'{split}.json', split, {f'{i}.png': objects for i in range(10)}, {90: 'cat'})
    for root in (tmp_path / 'yolo', tmp_path / 'coco'):
        labelled = read_labelled(root)
        assert [len(image_paths(each)) for each in (labelled.train, labelled.val)] == [8, 2]
        assert any(note.startswith('Not used, as it has no objects: ') for note in labelled.notes)
        refused(root, 'has 10 images of test without a label of cat', evaluate=True)


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


@pytest.mark.parametrize('shape, points', [('[2, 3]', '0.1 0.1 2 0.9 0.9 1'), ('[2, 2]', '0 0 1 1')])
def test_yolo_boxes_with_keypoints(tmp_path, shape, points):
    """Behind a box they are as many numbers as a polygon has, or none that a row may have."""
    rows = {f'images/{i}.png': f'0 0.5 0.5 0.5 0.25 {points}\n0 0.25 0.25 0.5 0.5' for i in range(4)}
    labelled = read_labelled(yolo(tmp_path, rows, f'train: images\nnames: [cat]\nkpt_shape: {shape}'))
    assert not labelled.has_masks and 'boxes alone are used' in labelled.notes[0]
    assert {tuple(each['bbox']) for each in labelled.train['annotations']} == {(10, 12, 20, 8), (0, 0, 20, 16)}


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
    (data / '.old/ImageSets/Main').mkdir(parents=True)  # hidden, as what a tool has put aside
    (data / '.old/ImageSets/Main/train.txt').write_text('b')
    labelled = read_labelled(data)
    assert labelled.classes == ('cat', 'dog, big') and not labelled.has_masks
    train, val = built(labelled, tmp_path / 'out', DETECTION)
    assert boxes(train) == {'a.png': [], 'c.png': [('dog, big', 1, 2, 11, 12), ('cat', 3, 4, 30, 31)]}
    assert boxes(val) == {'b.png': [('dog, big', 1, 2, 11, 12)]}


def test_difficult_objects_of_pascal_voc(tmp_path):
    """As in its own scores, and as COCO's crowds, they are neither positives nor negatives."""
    pytest.importorskip('mmdet')
    for number in range(5):
        image(tmp_path / f'data/{number}.png')
        voc(tmp_path / 'data', str(number), [('cat', 1, 2, 11, 12), ('cat', 3, 4, 30, 31)], folder='')
        path = tmp_path / f'data/{number}.xml'
        first, second, rest = path.read_text().split('<bndbox>')
        path.write_text(f'{first}<difficult> 1 </difficult><bndbox>{second}<difficult>0</difficult><bndbox>{rest}')
    labelled = read_labelled(tmp_path / 'data')
    assert labelled.notes[0].startswith('train: 5 objects neither trained on nor scored (a crowd, or difficult); ')
    train, _ = built(labelled, tmp_path / 'out', DETECTION)
    for path in (tmp_path / 'data').glob('*.xml'):
        path.write_text(path.read_text().replace('<difficult>0', '<difficult>1'))
    refused(
        tmp_path / 'data',
        r'has 5 images of train without a label of cat \(train: 10 objects neither trained on nor scored',
    )
    ignored = [(each['bbox'], each['ignore_flag']) for each in train.get_data_info(0)['instances']]
    assert ignored == [([1, 2, 11, 12], 1), ([3, 4, 30, 31], 0)]


def test_spaces_around_names(tmp_path):
    """They are of the editor that wrote a file, or of a slip in the name of a folder; a name is the same without."""
    objects = {f'{i}.png': [DOG] for i in range(3)}
    coco(tmp_path / 'coco', 'train.json', 'train', objects, {3: 'dog '})
    coco(tmp_path / 'coco', 'val.json', 'val', objects, {3: ' dog'})
    class_folders(tmp_path / 'folders/train', {'cat': 2, 'dog ': 2})
    class_folders(tmp_path / 'folders/val', {'cat ': 2, 'dog': 2})
    yolo(tmp_path / 'yolo', {f'images/{i}.png': BOX for i in range(3)}, 'train: images\nnames: [" dog "]')
    for number, name in enumerate(('dog', ' dog ', '\n      dog\n    ')):
        image(tmp_path / f'voc/{number}.png')
        voc(tmp_path / 'voc', str(number), [(name, 1, 2, 11, 12)], folder='')
    for folder in ('coco', 'yolo', 'voc'):
        labelled = read_labelled(tmp_path / folder, 'detection')
        assert labelled.classes == ('dog',) and len(labelled.train['images'] + labelled.val['images']) > 2
        assert {each['category_id'] for each in labelled.train['annotations']} == {1}
    labelled = read_labelled(tmp_path / 'folders', classes=['cat', 'dog '])
    assert labelled.classes == ('cat', 'dog') and Counter(each['label'] for each in labelled.val) == {0: 2, 1: 2}
    voc(tmp_path / 'voc', '1', [(' ', 1, 2, 11, 12)], folder='')
    refused(tmp_path / 'voc', "1.xml is not as Pascal VOC has it .*' '")


@pytest.mark.parametrize('masks', [False, True])
def test_what_another_tool_converted(tmp_path, masks):
    """COCO written as YOLO by labelformat's own writers gives the same boxes."""
    formats = pytest.importorskip('labelformat.formats')
    objects = {f'{i} ä.png': [(0, 3 * i, 4, 10, 12), (1, 0, 0, 20, 16)][: i % 3] for i in range(9)}
    coco(tmp_path / 'coco', 'a.json', 'images', objects, {0: 'dog', 1: 'big cat'})
    shutil.copytree(tmp_path / 'coco/images', tmp_path / 'yolo/images')
    kind = 'InstanceSegmentation' if masks else 'ObjectDetection'
    source = getattr(formats, f'COCO{kind}Input')(tmp_path / 'coco/a.json')
    getattr(formats, f'YOLOv8{kind}Output')(tmp_path / 'yolo/data.yaml', 'train').save(source)
    found = {}
    for name in ('coco', 'yolo'):
        labelled = read_labelled(tmp_path / name)
        assert labelled.has_masks == (masks or name == 'coco')
        files = {image['id']: Path(image['file_name']).name for image in labelled.train['images']}
        found[name] = sorted(
            (files[each['image_id']], labelled.classes[each['category_id'] - 1], *np.round(each['bbox'], 3).tolist())
            for each in labelled.train['annotations']
        )
    assert found['coco'] == found['yolo'] and len(found['coco']) > 4


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


@pytest.mark.parametrize(
    'mode, folders',
    [
        ('L', ('images/{}', 'annotations/{}')), ('P', ('{}/images', '{}/masks')), ('L', ('{}2017', 'semantic/{}2017')),
        ('P', ('{}', '{}annot')), ('L', ('{}_images', '{}_labels')), ('P', ('leftImg8bit/{}/x y', 'gtFine/{}/x y')),
    ],
)  # fmt: skip
def test_label_maps(tmp_path, mode, folders):
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
    assert {label for i in range(2) for label in train[i % 2]['data_samples'].gt_sem_seg.data.unique().tolist()} <= {
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


def test_label_maps_that_are_read_are_not_left_out(tmp_path, log):
    maps(tmp_path, 'images', 'masks', {'a': [0, 1], 'b': [1, 0]})
    read_labelled(tmp_path)
    assert 'Left out' not in log.text
    assert len(list_images(tmp_path)) == 2
    assert f'Left out of {tmp_path}: 2 in folders of label maps and the like (masks).' in log.text


def test_two_classes_and_pixels_without(tmp_path):
    maps(tmp_path, 'images', 'masks', {str(i): [0, 1, 255] for i in range(4)})
    assert read_labelled(tmp_path).notes[0] == (
        'The value 0 of the label maps is taken for background, 1 for foreground; 255 marks pixels without a class.'
    )
    maps(tmp_path, 'images', 'masks', {str(i): [0, 9, 255] for i in range(4)})
    assert read_labelled(tmp_path, ignore=255).classes == ('background', 'foreground')  # as it was said


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


# -- what is wrong with them


def refused(data: Path, message: str, **options) -> None:
    """One sentence, ``cause; remedy.``"""
    with pytest.raises(InputError, match=message) as error:
        read_labelled(data, **options)
    text = str(error.value)
    assert text.endswith('.') and ';' in text and '\n' not in text


BOX = '0 0.5 0.5 0.5 0.5'
NAMES = 'train: images\nnames: [cat, dog]'


@pytest.mark.parametrize(
    'row, content, message',
    [
        (f'{BOX}\n2 0.5 0.5 0.5 0.5', NAMES, r'1\.txt, line 2, has the class 2, where .*data.yaml names 2, 0 to 1'),
        ('-1 0.5 0.5 0.5 0.5', NAMES, 'line 1, has the class -1'),
        ('0.5 0.5 0.5 0.5 0.5', NAMES, 'line 1, has the class 0.5'),
        ('cat 0.5 0.5 0.5 0.5', NAMES, r'line 1, is no row of numbers \(cat 0.5'),
        ('0 0.5 0.5 0.5', NAMES, r'has 3 numbers after the class, neither a box \(4\) nor a polygon'),
        ('0 0.5 0.5 0.5 0.5 0.9', NAMES, 'has 5 numbers after the class'),
        ('0 0.5 0.5 nan 0.5', NAMES, 'has a number that is not finite'),
        ('0 20 16 10 10', NAMES, 'has coordinates in pixels'),
        (f'{BOX}\n0 0 0 0.5 0 0.5 0.5', NAMES, r'row 1, has 4 numbers, a box or a polygon of two points, where others'),
        (BOX, 'train: images\nnames: {0: cat, 2: dog}', 'numbers its 2 names 0, 2, and not 0 to 1 without a gap'),
        (BOX, 'train: images\nnames: cat', 'has names that are no list; write names'),
        (BOX, 'train: images\nnc: 2', 'has names that are no list'),
        (BOX, 'train: images\nnames: [cat, cat]', 'names the class cat twice'),
        (BOX, 'train: images\nnc: 3\nnames: [cat, dog]', 'has nc: 3, but 2 names'),
        (BOX, 'train: pictures\nnames: [cat]', r'has train: pictures, which does not exist \(.*data/pictures\)'),
        (BOX, 'train: images\nval: [images, more]\nnames: [cat]', 'has val: more, which does not exist'),
        (BOX, 'val: images\nnames: [cat]', 'has no train; name the folder'),
        (BOX, 'train: images\nnames: [cat', r'data.yaml cannot be read as YAML \('),
        (BOX, f'train: images\nnames: {"[" * 1_000}', r'data.yaml cannot be read as YAML \('),
        (BOX, 'train: images\nnames: [caf\udce9]', r'data.yaml cannot be read as YAML \('),  # in Latin-1
        (BOX, f'{NAMES}\nkpt_shape: 17', r'has kpt_shape: 17; write two numbers, as \[17, 3\]'),
        (None, NAMES, 'Of 2 images of .*data.yaml none has a text file, as .*labels/'),
        ('', NAMES, 'has 2 images of train without a label of cat, dog'),
        (BOX, None, 'has rows of boxes in text files, but no names of their classes; write data.yaml'),
    ],
)  # fmt: skip
def test_yolo_that_is_wrong(tmp_path, row, content, message):
    rows = {'images/0.png': None if row is None else '' if row == '' else BOX, 'images/1.png': row}
    if row is not None and '0 0 0' in row:
        rows['images/0.png'] = None
    refused(yolo(tmp_path / 'data', rows, content), message)


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_yolo_splits_without_an_image(tmp_path, split):
    (tmp_path / 'none').mkdir()
    splits = dict(train='images', val='images', test='images') | {split: 'none'}
    content = ''.join(f'{key}: {folder}\n' for key, folder in splits.items())
    yolo(tmp_path, {'images/0.png': BOX}, f'{content}names: [cat]')
    refused(tmp_path, f'has {split}: none, which holds no image; correct path or {split}')


def test_yolo_boxes_of_no_width(tmp_path):
    """They are counted and named, and an image that has no other box is a negative."""
    row = '0 0.5 0.5 0 0.5'
    rows = {'images/0.png': f'{BOX}\n{row}\n{row}', 'images/1.png': row, 'images/2.png': BOX}
    labelled = read_labelled(yolo(tmp_path / 'data', rows, NAMES))
    first = f'; the first is {tmp_path}/data/images'
    assert labelled.notes[:2] == [
        f'train: 3 objects left out (box of less than a pixel){first}/0.png.',
        f'train: 1 image without objects, kept as a negative{first}/1.png.',
    ]
    assert sum(len(part['annotations']) for part in (labelled.train, labelled.val)) == 2


def test_yolo_names_that_yaml_takes_for_something_else(tmp_path):
    data = yolo(
        tmp_path / 'data', {f'images/{i}.png': BOX for i in range(3)}, 'train: images\nval:\nnames: [no, on, 007]'
    )
    assert read_labelled(data).classes == ('no', 'on', '007')
    image(data / 'images/0.jpg')
    refused(data, r'labels/0.txt belongs to .*0.jpg and to .*0.png; give the images different names')


def test_yolo_rows_behind_a_byte_order_mark(tmp_path):
    """Without data.yaml, the first row tells that a text is no caption."""
    yolo(tmp_path, {f'images/{i}.png': f'\ufeff{BOX}' for i in range(3)}, None)
    (tmp_path / 'classes.txt').write_text('cat')
    assert read_labelled(tmp_path).classes == ('cat',)


def changed(content: dict, **changes) -> dict:
    """A file with its second annotation (of ``annotation``), second image (``image``) or categories changed."""
    if 'annotation' in changes:
        content['annotations'][1] |= changes['annotation']
    if 'image' in changes:
        content['images'][1] |= changes['image']
    return content | {key: value for key, value in changes.items() if key not in ('annotation', 'image')}


DEEP = 'lists in lists'


@pytest.mark.parametrize(
    'changes, message',
    [
        (dict(annotation=dict(category_id=4)), r'a.json, annotations\[1\] \(id 6\) has the unknown category_id 4'),
        (dict(annotation=dict(image_id=4)), 'has the unknown image_id 4'),
        (dict(annotation=dict(segmentation=dict(size=[40, 32], counts=[1]))), "nor an RLE of the image's size"),
        (dict(annotation=dict(bbox=[1, 2, 'x', 4])), 'has the bbox'),
        (dict(image=dict(file_name='1.png')), r'has 1 image more than once, the first is .*1.png: objects'),
        (dict(image=dict(width=32, height=40)), '1 of 4 images are of another size .*2.png, 40 x 32 and not 32 x 40'),
        (dict(image=dict(file_name=None)), r'images\[1\] has no file_name'),
        (dict(categories=[dict(id=3, name='dog'), dict(id=90, name='dog')]), 'has the name dog of an earlier one'),
        (dict(images=DEEP), "a.json cannot be read as JSON in COCO's format "),
        (dict(annotation=dict(segments_info=[])), "a.json is in COCO's panoptic format, .*; give the file of"),
        (dict(annotations=[]), 'has 4 images of train without a label of dog, cat'),
        (dict(images=5), "is not in COCO's format: images, categories, annotations must be lists"),
    ],
)  # fmt: skip
def test_coco_that_is_wrong(tmp_path, changes, message):
    objects = {f'{i}.png': [DOG, CAT] for i in range(1, 5)}
    content = coco(tmp_path / 'data', 'a.json', 'images', objects, {3: 'dog', 90: 'cat'})
    (tmp_path / 'data/a.json').write_text(json.dumps(changed(content, **changes)).replace(f'"{DEEP}"', '[' * 100_000))
    refused(tmp_path / 'data', message)


def test_what_is_counted_in_coco(tmp_path):
    """Objects and images that cannot be used are left out, and each kind has its line."""
    data = tmp_path / 'data'
    objects = {f'{i}.png': [DOG, CAT] for i in range(10)}
    content = coco(data, 'a.json', 'images', objects, {3: 'dog', 90: 'cat', 1: 'animals'})
    for category in content['categories']:
        category['supercategory'] = 'none' if category['name'] == 'animals' else 'animals'
    far = [0, 0, 1e30, 0, 0, 16]
    changes = [
        dict(bbox=[5, 5, 0, 5]), dict(segmentation=[far]), dict(segmentation=[[-9, -9, -9, -5, -5, -5]]),
        dict(segmentation=[[1, 2, 3, 4]]), dict(bbox=[50, 5, 5, 5]), dict(bbox=[30, 5, 20, 5]),
    ]  # fmt: skip
    for number, change in enumerate(changes):
        content['annotations'][2 * number] |= change
    for annotation in content['annotations']:
        for key in ('id', 'area', 'iscrowd', 'bbox') if annotation['image_id'] == 67 else ():
            del annotation[key]  # tools leave these out
    for picture in content['images'][5:]:
        del picture['width'], picture['height']
    (data / 'images/8.png').unlink()
    (data / 'images/9.png').write_bytes(b'no image')
    image(data / 'images/more.png')
    (data / 'a.json').write_text(json.dumps(content))
    labelled = read_labelled(data)
    assert labelled.classes == ('dog', 'cat') and labelled.has_masks
    assert [note.partition('; the')[0].partition(': /')[0] for note in labelled.notes] == [
        'train: 1 image left out (missing)',
        'train: 1 image left out (does not decode)',
        'train: 1 object left out (box of less than a pixel)',
        'train: 2 objects cut at the border of the image',
        'train: 2 objects left out (outside the image)',
        'train: 1 object left out (polygon of less than three points)',
        '1 image without annotations not used',
        'No images to validate on: 2 of 8 are kept for it, drawn by class with seed 0.',
    ]
    every = labelled.train['annotations'] + labelled.val['annotations']
    assert sorted(each['bbox'] for each in every if each['bbox'] not in ([8, 4, 10, 12], [0, 0, 20, 16])) == [
        [30, 5, 10, 5]
    ]
    assert all(each['area'] in (120, 320) for each in every)
    for picture in content['images']:
        (data / 'images' / picture['file_name']).unlink(missing_ok=True)
    refused(data, r'10 of 10 images of .*a.json are missing, the first is 0.png of .*a.json; put the images beside')


def test_whole_numbers_as_pandas_writes_them(tmp_path):
    content = coco(tmp_path, 'a.json', '', {f'{i}.png': [DOG, CAT] for i in range(4)}, {3: 'dog', 90: 'cat'})
    expected = read_labelled(tmp_path)
    for entry in (entry for part in content.values() for entry in part):
        entry |= {key: float(value) for key, value in entry.items() if isinstance(value, int)}
    (tmp_path / 'a.json').write_text(json.dumps(content))
    assert '"image_id": 7.0' in (tmp_path / 'a.json').read_text() and read_labelled(tmp_path) == expected
    for entry in content['annotations']:
        entry |= dict(iscrowd=float('nan'), ignore='0')
    (tmp_path / 'a.json').write_text(json.dumps(content))
    assert read_labelled(tmp_path) == expected
    content['annotations'][1]['image_id'] = 7.5
    (tmp_path / 'a.json').write_text(json.dumps(content))
    refused(tmp_path, r'annotations\[1\] \(id 6\) has the unknown image_id 7.5')


@pytest.mark.parametrize('area', [-1, 0, None])
def test_an_area_that_a_tool_does_not_know(tmp_path, area):
    """It is that of the polygon: COCO's scores leave out an object of a negative area, and give -1 for its class."""
    content = coco(tmp_path, 'a.json', '', {f'{i}.png': [DOG] for i in range(4)}, {3: 'dog'})
    for each in content['annotations']:
        each |= dict(area=area, segmentation=[[8, 4, 18, 4, 18, 16]])
    (tmp_path / 'a.json').write_text(json.dumps(content))
    assert {each['area'] for each in read_labelled(tmp_path).train['annotations']} == {60}


def test_objects_without_masks_make_a_detector_of_boxes(tmp_path):
    content = coco(tmp_path, 'a.json', '', {f'{i}.png': [DOG, CAT] for i in range(4)}, {3: 'dog', 90: 'cat'})
    content['annotations'][0]['segmentation'] = []
    (tmp_path / 'a.json').write_text(json.dumps(content))
    labelled = read_labelled(tmp_path)
    assert not labelled.has_masks and '1 of 8 objects have no mask: boxes alone are used.' in labelled.notes
    assert not any('segmentation' in each for each in labelled.train['annotations'] + labelled.val['annotations'])


def test_classes_of_objects(tmp_path):
    """Those that are chosen, ignored, or only in one split."""
    objects = {f'{i}.png': [DOG, CAT] for i in range(4)}
    coco(tmp_path, 'train.json', 'train', objects, {3: 'dog', 90: 'cat'})
    assert read_labelled(tmp_path, classes=['cat', 'dog']).classes == ('cat', 'dog')
    (tmp_path / 'names.list').write_text('cat\ndog\n')
    for path in (tmp_path / 'names.list', [str(tmp_path / 'names.list')]):  # the latter from the command line
        assert read_labelled(tmp_path, classes=path).classes == ('cat', 'dog')
    refused(tmp_path, 'names.txt. is no file', classes=['names.txt'])
    for labelled in (read_labelled(tmp_path, classes=['cat']), read_labelled(tmp_path, ignore='dog')):
        assert labelled.classes == ('cat',) and {each['category_id'] for each in labelled.train['annotations']} == {1}
        assert labelled.notes[0] == 'train: 4 objects left out (of a class that is not used); the first is dog.'
    refused(
        tmp_path,
        r'classes has 1 of its 1 classes, Dog, where .*train.json has dog, cat \(is dog meant',
        classes=['Dog'],
    )
    refused(tmp_path, r'ignore names cow, which is no class of .*train.json \(dog, cat\)', ignore=['cow'])
    (tmp_path / 'classes.txt').write_text('cat\nbird\n')
    refused(tmp_path, r'classes.txt lacks 1 of the 2 classes of .*train.json: dog; add')
    (tmp_path / 'classes.txt').unlink()
    coco(tmp_path, 'val.json', 'val', {'0.png': [DOG, CAT]}, {3: 'dogs', 90: 'cat'})
    refused(
        tmp_path, r'val.json has 1 of its 3 classes, dogs \(1 samples\), where .*train.json has dog, cat \(is dog meant'
    )
    coco(tmp_path, 'val.json', 'val', {'0.png': [CAT]}, {3: 'dogs', 90: 'cat'})
    labelled = read_labelled(tmp_path)
    assert labelled.val['annotations'][0]['category_id'] == 2
    assert labelled.notes == ['Classes that cannot be measured, without images in val: dog.']
    coco(tmp_path, 'train2.json', 'train', objects, {3: 'dog', 90: 'cat'})
    refused(tmp_path, r'has 2 files of annotations for train: .*train.json, .*train2.json; name the one to use')
    assert read_labelled(tmp_path / 'train2.json').classes == ('dog', 'cat')


@pytest.mark.parametrize(
    'text, message',
    [
        (
            '<annotation><object><name>cat</name></object></annotation>',
            r'a.xml is not as Pascal VOC has it \(Missing field',
        ),
        ('<annotation><filename>a', r'a.xml cannot be read as XML \('),
        (None, r'is not as Pascal VOC has it \(.*x'),
    ],
)
def test_pascal_voc_that_is_wrong(tmp_path, text, message):
    image(tmp_path / 'a.png')
    voc(tmp_path, 'a', [('cat', 'x', 1, 2, 3)], folder='')
    if text:
        (tmp_path / 'a.xml').write_text(text)
    refused(tmp_path, message)


RED, GREEN = [255, 0, 0], [0, 255, 0]


@pytest.mark.parametrize(
    'rows, names, options, message',
    [
        ([[0, 1, 2]], None, {}, r'have the values 0, 1, 2 \(.*\), and nothing names them; write classes.txt'),
        ([[0, 127, 255]], None, {}, r'have the values 0, 127, 255 \(.*\), and nothing names them; write classes.txt'),
        ([[0, 1, 2], [0, 1, 7]], 'a\nb\nc', {}, r'1.png has values that .*classes.txt does not name: 7 in 512 pixels'),
        ([[0, 1, 2]], 'a\nb', {}, 'does not name: 2 .*; correct the map, or name them, or give ignore=0 if 0 marks'),
        ([[RED, GREEN]], 'a\nb', {}, r'0.png is an RGB image in colours; give label maps with one 8-bit'),
        ([[RED, GREEN]], 'a,0,0,0\nb,255,0,0', {}, r'classes.txt does not name: \(0, 255, 0\) in 512'),
        ([[1, 1], [255, 1]], 'a\nb', {}, r'have the class b alone \(values: 1, 255\): there is nothing to tell apart'),
        ([[255, 255]], 'a\nb', {}, r'have no class \(values: 255\): there'),
        ([[0, 1, 2]], 'a\nb\nc', dict(ignore='d'), r'ignore names d, which is no class of .* \(a, b, c\)'),
        ([[0, 1]], '', {}, 'classes.txt names no class'),
        ([[0, 1], [0, 255]], None, {}, r'0 and 1, .*/1.png 0 and 255, and no map has 1 and 255; write 1 for 255, or'),
        ([[0, 1], [0, 255], [255, 255]], 'a\nb', {}, 'or give ignore=255 if no class has these pixels'),
    ],
)  # fmt: skip
def test_label_maps_that_are_wrong(tmp_path, rows, names, options, message):
    maps(tmp_path / 'data', 'images', 'masks', {str(number): row for number, row in enumerate(rows)})
    if names is not None:
        (tmp_path / 'data/classes.txt').write_text(names)
    refused(tmp_path / 'data', message, **options)


def test_label_maps_of_other_sizes_and_formats(tmp_path):
    data = tmp_path / 'data'
    maps(data, 'images', 'masks', {'a': [0, 1, 2], 'b': [0, 1, 2]})
    (data / 'classes.txt').write_text('x\ny\nz\n')
    image(data / 'images/b.jpg', 0, (32, 48))
    refused(data, r'masks/b.png is 48 x 32, but its image 32 x 48 \(width x height\); make them equal')
    image(data / 'images/b.jpg', 0, (48, 32))
    image(data / 'images/b.png', 0, (48, 32))
    refused(data, r'has 2 images of one name, images/b.jpg, images/b.png: which belong together is not clear; rename')
    (data / 'images/b.png').unlink()
    Image.fromarray(np.zeros((32, 48), np.uint16)).save(data / 'masks/b.png')
    refused(data, r'masks/b.png is an image of mode I;16; give label maps of 8 bits')
    (data / 'masks/b.png').write_bytes(b'')
    refused(data, r'masks/b.png does not decode \(.*\); replace it')
    for each in (data / 'masks').iterdir():
        each.unlink()
    cv2.imwrite(str(data / 'masks/a.jpg'), np.random.default_rng(0).integers(0, 255, (32, 48), np.uint8))
    refused(data, r'JPG changes values, so save label maps as PNG')


def test_every_label_map_is_looked_at(tmp_path):
    """Also beyond a thousand: a wrong map would stop the training, and a class may be nowhere else."""
    data = tmp_path / 'data'
    maps(data, 'images', 'masks', {'0': [0, 1], 'last': [0, 2]})
    for folder, ending in (('images', '.jpg'), ('masks', '.png')):
        for number in range(1, 1001):
            (data / folder / f'{number}{ending}').hardlink_to(data / folder / f'0{ending}')
    (data / 'classes.txt').write_text('a\nb\nc\n')
    labelled = read_labelled(data)
    assert labelled.classes == ('a', 'b', 'c') and len(labelled.train) + len(labelled.val) == 1002
    assert labelled.notes[-1] == 'Classes that cannot be measured, without images in val: c.'
    label_map(data / 'masks/last.png', [0, 7])
    refused(data, 'masks/last.png has values that .*classes.txt does not name: 7 in 512 pixels of all maps')


def test_label_maps_of_the_splits_of_pascal_voc(tmp_path):
    """Its lists divide them; a hidden copy beside does not."""
    data = tmp_path / 'data'
    maps(data, 'JPEGImages', 'SegmentationClass', {'a': [0, 1], 'b': [0, 1], 'c': [1, 1]})
    for folder, lists in {
        '': dict(train='a', val='b\nc', trainval='a\nb\nc'),
        '.old': dict(train='b', val='a'),
    }.items():
        (data / folder / 'ImageSets/Segmentation').mkdir(parents=True)
        for split, names in lists.items():
            (data / folder / f'ImageSets/Segmentation/{split}.txt').write_text(names)
    labelled = read_labelled(data)
    assert [files(part) for part in (labelled.train, labelled.val)] == [['a.jpg'], ['b.jpg', 'c.jpg']]


@pytest.mark.parametrize('name', ['object_{}', 'color_000{}', 'instance-{}', 'Depth {}', '{}_color', 'a depth of {}'])
def test_label_maps_may_be_called_as_those_of_other_kinds(tmp_path, name):
    maps(tmp_path, 'images', 'masks', {name.format(i): [0, 1] for i in range(3)} | {'4': [0, 1]})
    labelled = read_labelled(tmp_path)
    assert len(labelled.train + labelled.val) == 4 and not any('left out' in note for note in labelled.notes)


def test_maps_of_other_kinds_beside_the_label_maps(tmp_path):
    """They are none, and nobody misses their images."""
    for number in range(3):
        image(tmp_path / f'leftImg8bit/x/{number}_leftImg8bit.png', 0, (32, 32))
        for kind, row in dict(labelIds=[0, 1], color=[7, 9], instanceIds=[1, 2]).items():
            label_map(tmp_path / f'gtFine/x/{number}_gtFine_{kind}.png', row)
    label_map(tmp_path / 'gtFine/x/9_gtFine_color.png', [0, 1])
    labelled = read_labelled(tmp_path)
    assert {Path(each['map_path']).name[1:] for each in labelled.train + labelled.val} == {'_gtFine_labelIds.png'}
    assert labelled.notes[0] == '1 label map left out, without an image.'


LISTS = {
    'names': b'a b\nc.d\n',
    'files': b'a b.jpg\r\nc.d.png\r\n\r\n',
    'folders': b'JPEGImages\\a b.jpg\r\n./JPEGImages/c.d.jpg',
    'mark': '\ufeffa b\nc.d'.encode(),
    'UTF-16': 'a b\r\nc.d'.encode('utf-16'),
}


def whole_voc(root: Path, kind: str) -> Path:
    """Four images with objects and label maps, of Pascal VOC; returns the folder for the lists of a kind."""
    names = ['a b', 'c.d', 'e', 'more']
    maps(root, 'JPEGImages', 'SegmentationClass', {name: [0, 1] for name in names})
    for name in names:
        voc(root, name, [('cat', 1, 2, 11, 12)], size=(32, 32))
    lists = root / 'ImageSets' / kind
    lists.mkdir(parents=True)
    return lists


@pytest.mark.parametrize('text', LISTS.values(), ids=LISTS)
@pytest.mark.parametrize('kind', ['Main', 'Segmentation'])
def test_lists_of_pascal_voc_as_people_write_them(tmp_path, kind, text):
    folder = whole_voc(tmp_path, kind)
    (folder / 'train.txt').write_bytes(text)
    (folder / 'val.txt').write_text('e\nlost.jpg')
    labelled = read_labelled(tmp_path, task='detection' if kind == 'Main' else 'segmentation')
    assert [[Path(path).stem for path in image_paths(part)] for part in (labelled.train, labelled.val)] == [
        ['a b', 'c.d'],
        ['e'],
    ]
    assert f'1 name of ImageSets/{kind}/val.txt without a file: lost.jpg.' in labelled.notes
    assert any(note.startswith(f'1 file in no list of ImageSets/{kind} not used: ') for note in labelled.notes)

    (folder / 'train.txt').write_bytes(b'x\ny')
    refused(tmp_path, f'has no file of the 2 names in ImageSets/{kind}/train.txt .x, y., where', task=labelled.task)
    (folder / 'train.txt').write_bytes('é'.encode('latin-1'))
    refused(tmp_path, r'train.txt is not in UTF-8 \(.*\); save it as UTF-8', task=labelled.task)


@pytest.mark.parametrize('kind', ['Main', 'Segmentation'])
@pytest.mark.parametrize(
    ('lists', 'train', 'val'),
    [
        (dict(trainval='a b\nc.d\ne', test='more'), ['a b', 'c.d', 'e'], ['more']),
        (dict(trainval='a b\nc.d\ne', val='e'), ['a b', 'c.d'], ['e']),
        (dict(trainval='a b\nc.d\ne\nmore', train='a b', val='e'), ['a b'], ['e']),
    ],
)
def test_a_list_of_both_splits(tmp_path, kind, lists, train, val):
    """What trainval names and val does not is trained on where there is no list for it."""
    folder = whole_voc(tmp_path, kind)
    for name, text in lists.items():
        (folder / f'{name}.txt').write_text(text)
    labelled = read_labelled(tmp_path, task='detection' if kind == 'Main' else 'segmentation')
    assert [sorted(Path(path).stem for path in image_paths(part)) for part in (labelled.train, labelled.val)] == [
        train,
        val,
    ]


@pytest.mark.parametrize(
    'text', [b'images\\a b.png', '\ufeffimages/a b.png\r\n\r\n'.encode(), b'images/a b.png\nno.png']
)
def test_lists_of_yolo_as_people_write_them(tmp_path, text):
    rows = {'images/a b.png': BOX, 'images/c.png': BOX}
    yolo(tmp_path, rows, 'train: train.txt\nval: val.txt\nnames: [cat]')
    (tmp_path / 'val.txt').write_text('images/c.png')
    (tmp_path / 'train.txt').write_bytes(text)
    labelled = read_labelled(tmp_path)
    assert list(map(Path, image_paths(labelled.train))) == [tmp_path / 'images/a b.png']
    assert [note.split(';')[0] for note in labelled.notes] == ['train: 1 image left out (missing)'] * (
        b'no.png' in text
    )
    for text, message in (
        (b'data/a b.png', r'train.txt names 1 image, of which none exists \(.*/data/a b.png\); write paths from the'),
        (b'images/\xe9.png', r'train.txt is not in UTF-8 \(.*\); save it as UTF-8'),
    ):
        (tmp_path / 'train.txt').write_bytes(text)
        refused(tmp_path, message)


def test_files_of_yolo_in_capitals(tmp_path):
    yolo(tmp_path, {'images/A.PNG': BOX, 'images/B.PNG': BOX}, 'train: TRAIN.TXT\nval: images/B.PNG\nnames: [cat]')
    for path in [*tmp_path.glob('labels/*.txt'), tmp_path / 'data.yaml']:
        path.rename(path.with_suffix(path.suffix.upper()))
    (tmp_path / 'TRAIN.TXT').write_text('images/A.PNG')
    labelled = read_labelled(tmp_path)
    assert [len(part['annotations']) for part in (labelled.train, labelled.val)] == [1, 1]


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'utf-16'])
def test_texts_of_yolo_in_the_encodings_of_windows(tmp_path, encoding):
    yolo(tmp_path, {'images/a.png': BOX, 'images/b.png': BOX}, 'train: images\nnames: [Köter]')
    for path in [*tmp_path.glob('labels/*.txt'), tmp_path / 'data.yaml']:
        path.write_text(path.read_text(), encoding=encoding)
    labelled = read_labelled(tmp_path)
    assert labelled.classes == ('Köter',) and len(labelled.train['annotations']) == 1
    (tmp_path / 'data.yaml').unlink()
    (tmp_path / 'classes.txt').write_text('Köter', encoding=encoding)
    assert read_labelled(tmp_path).classes == ('Köter',)


def test_names_of_values_from_1_on(tmp_path):
    """A table as ADE20K's names no 0, and a list begins at 1 where 0 is ignored."""
    data = tmp_path / 'data'
    maps(data, 'images', 'masks', {'a': [0, 1, 2], 'b': [0, 1, 2]})
    (data / 'classes.txt').write_text('1 wall\n2 sky\n')
    labelled = read_labelled(data)
    assert labelled.classes == ('wall', 'sky') and labelled.table == [(1, 0), (2, 1), (0, 255)]
    assert labelled.notes[0].endswith('classes.txt does not name, is ignored: 33% of pixels.')
    for ignore in (0, '0', [0]):
        assert read_labelled(data, classes=['wall', 'sky'], ignore=ignore).table == labelled.table
    for names, said in ((['wall', 'sky', 'sea'], True), (['Background', 'wall', 'sky'], False)):
        notes = read_labelled(data, classes=names).notes
        note = (
            'The value 0 of the label maps is wall (33% of pixels); if it marks pixels without a class, give ignore=0.'
        )
        assert (note in notes) == said


def test_whose_task_is_not_clear(tmp_path):
    """Two kinds of labels, or two formats of one kind; and a folder of none."""
    refused(tmp_path / 'none', 'none does not exist; give a folder of labelled images')
    refused(tmp_path, r'has no labels \(found: 0 images\); give folders of classes, annotations')
    image(tmp_path / 'photos/1.png')
    (tmp_path / 'photos/1.txt').write_text('a photo of one two three cats')  # a caption
    refused(tmp_path, r'has no labels \(found: 1 image in photos, 1 .txt\)')
    refused(tmp_path, 'has no labels for detection', task='detection')
    refused(tmp_path / 'photos/1.png', r'has no labels \(a file without annotations of objects\)')
    shutil.rmtree(tmp_path / 'photos')
    maps(tmp_path, 'images', 'masks', {'a': [0, 1], 'b': [1, 0]})
    coco(tmp_path, 'a.json', 'images', {'a.jpg': [DOG], 'b.jpg': [DOG]}, {3: 'dog'})
    refused(tmp_path, "has labels for detection and segmentation; choose with task='detection'")
    assert read_labelled(tmp_path, task='detection').classes == ('dog',)
    image(tmp_path / 'images/a.jpg', 0, (32, 32))
    image(tmp_path / 'images/b.jpg', 0, (32, 32))
    assert read_labelled(tmp_path, task='segmentation').classes == ('background', 'foreground')
    (tmp_path / 'data.yaml').write_text(NAMES)
    refused(
        tmp_path, r'has annotations of objects in 2 formats, COCO and YOLO; give the file data.yaml', task='detection'
    )


def test_a_split_that_cannot_be_read(tmp_path):
    labelled = read_labelled(class_folders(tmp_path / 'data', dict(ant=2, bee=2)))
    for text in ('', '[]', '{"train": []}', '[' * 100_000):
        (tmp_path / 'split.json').write_text(text)
        with pytest.raises(InputError, match=r'split.json cannot be read as a split of finetune \(.*\); remove it'):
            write_labelled(labelled, tmp_path)


def test_splits_that_share_images_and_lists_of_pascal_voc(tmp_path):
    coco(tmp_path, 'train.json', 'images', {'0.png': [DOG], '1.png': [DOG]}, {3: 'dog'})
    coco(tmp_path, 'val.json', 'images', {'1.png': [DOG]}, {3: 'dog'})
    notes = read_labelled(tmp_path).notes
    assert len(notes) == 1 and notes[0].startswith('1 image of val are in train too, which flatters the result: ')


def test_a_split_of_other_data_keeps_its_names(tmp_path):
    """A model's classes number the labels and label maps of a split whose classes stand in another order."""
    images = [['1.jpg', 0], ['2.jpg', 1]]
    content = dict(data=str(tmp_path), task='classification', classes=['ant', 'bee'], seed=None, table=None)
    content |= dict(train=[], val=images)
    (tmp_path / 'split.json').write_text(json.dumps(content))
    read = partial(LabelledImages, str(tmp_path / 'split.json'), 'val', pipeline=[])
    data = read(metainfo=dict(classes=('bee', 'cow', 'ant')))
    assert [data.get_data_info(i)['gt_label'] for i in range(2)] == [2, 0]
    with pytest.raises(InputError, match=r'has 1 of its 2 classes, bee \(1 samples\), where the config has ant, cow'):
        read(metainfo=dict(classes=('ant', 'cow'))).load_data_list()
    maps = dict(task='segmentation', table=[[4, 0], [7, 1], [9, 255]], val=[['1.jpg', '1.png']])
    (tmp_path / 'split.json').write_text(json.dumps(content | maps))
    data = read(metainfo=dict(classes=('bee', 'cow', 'ant')))
    assert data.get_data_info(0)['label_table'] == [[4, 2], [7, 0], [9, 255]]
    assert read().get_data_info(0)['label_table'] == maps['table']
