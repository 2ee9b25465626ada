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

from mmmilan.datasets.labelled import read_labelled, stratify, write_labelled
from mmmilan.errors import InputError
from mmmilan.registry import DATASETS
from tests.helpers import ROOT

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


def built(labelled, out: Path, config: str) -> tuple:
    """The data sets of a labelled folder with the pipelines of one of our configs."""
    cfg = Config.fromfile(ROOT / 'configs' / config)
    init_default_scope(cfg.default_scope)
    parts = write_labelled(labelled, out)
    pipelines = dict(train=cfg.train_dataloader.dataset.pipeline, val=cfg.val_dataloader.dataset.pipeline)
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
    assert labelled.classes == ('ant', 'bee') and 'names none of the folders' in labelled.notes[0]
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
        (dict(train=dict(ant=2)), {}, 'has images of the class ant alone: there is nothing to tell apart; give'),
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
