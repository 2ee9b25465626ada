"""What the names of folders mean."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmmilan.datasets import ImageFolder
from mmmilan.datasets.image_folder import list_images
from mmmilan.datasets.listing import list_pictures, listed_once
from mmmilan.datasets.splits import (
    class_folders,
    describe,
    evaluation_source,
    list_labelled_images,
    splits_of,
    training_sources,
)
from mmmilan.errors import InputError


def make(root: Path, names: str) -> Path:
    for name in names.split():
        path = root / name.replace('~', ' ')
        path.parent.mkdir(parents=True, exist_ok=True)
        tarfile.open(path, 'w').close() if name.endswith('.tar') else path.touch()
    return root


def relative(root: Path, folders) -> str:
    return ' '.join(str(Path(folder).relative_to(root)).replace(' ', '~') for folder in folders)


@pytest.mark.parametrize(
    'files, train, evaluation',
    [
        ('train/a/1.jpg val/a/2.jpg test/3.jpg', 'train', 'val'),
        ('Train/1.jpg Test/2.jpg', 'Train', 'Test'),
        ('TRAIN/1.jpg TEST/2.jpg __MACOSX/3.jpg .git/4.jpg', 'TRAIN', 'TEST'),
        ('training/1.jpg validation/2.jpg', 'training', 'validation'),
        ('train/1.jpg valid/2.jpg test/3.jpg README.dataset.txt', 'train', 'valid'),
        ('training_set/1.jpg test_set/2.jpg', 'training_set', 'test_set'),
        ('train2017/1.jpg val2017/2.jpg unlabeled2017/3.jpg annotations/i.json', 'train2017 unlabeled2017', 'val2017'),
        ('train2017/1.jpg val2017/2.jpg panoptic_val2017/3.png panoptic_train2017/4.png', 'train2017', 'val2017'),
        ('images/train/1.jpg images/val/2.jpg labels/train/1.txt', 'images/train', 'images/val'),
        ('images/training/1.jpg images/val/2.jpg annotations/training/1.png', 'images/training', 'images/val'),
        ('JPEGImages/train/x/1.png JPEGImages/val/x/2.png gtFine/train/x/1.png', 'JPEGImages/train', 'JPEGImages/val'),
        ('archive/x/train/1.jpg archive/x/test/2.jpg archive/__MACOSX/3.jpg', 'archive/x/train', 'archive/x/test'),
        ('train/images/1.jpg train/labels/1.txt test/images/2.jpg', 'train', 'test'),
        ('train/images/1.jpg train/masks/1.png val/images/2.jpg val/masks/2.png', 'train', 'val'),
        ('Train/1.png Test/2.png Meta/3.png preview.jpg', 'Train', 'Test'),
        ('ILSVRC2012_img_train/a/1.jpg ILSVRC2012_img_val/2.jpg', 'ILSVRC2012_img_train', 'ILSVRC2012_img_val'),
        ('trainA/1.jpg trainB/2.jpg testA/3.jpg testB/4.jpg', 'trainA trainB', 'testA'),
        ('train/0.tar val/1.tar', 'train', 'val'),
        ('dev/1.jpg test/2.jpg', 'dev', 'test'),
        ('trainset/1.jpg testset/2.jpg', 'trainset', 'testset'),
        ('TRAINIMAGES/1.jpg validdata/2.jpg', 'TRAINIMAGES', 'validdata'),
        ('img_dir/train/1.jpg img_dir/val/2.jpg ann_dir/train/1.png', 'img_dir/train', 'img_dir/val'),
        ('Valid/1.jpg', 'Valid', 'Valid'),
    ],
)  # fmt: skip
def test_splits(tmp_path, files, train, evaluation):
    make(tmp_path, files)
    assert relative(tmp_path, training_sources(tmp_path)) == train
    assert relative(tmp_path, [evaluation_source(tmp_path)]) == evaluation
    assert class_folders(tmp_path)[1] == []


@pytest.mark.parametrize(
    'files, classes',
    [
        ('train/1.jpg car/2.jpg boat/3.jpg', 'boat car train'),
        ('test~tube/1.jpg train~station/2.jpg', 'test~tube train~station'),
        ('valley/1.jpg testudo/2.jpg trainer/3.jpg', 'testudo trainer valley'),
        ('contestdata/1.jpg constrainset/2.jpg trainsetter/3.jpg', 'constrainset contestdata trainsetter'),
        ('cat/train.jpg dog/test.jpg .cache/x.jpg', 'cat dog'),
        ('images/cat/1.jpg images/dog/2.jpg annotations/dog/2.png', 'cat dog'),
        ('cat/images/1.jpg dog/images/2.jpg', 'cat dog'),
    ],
)
def test_classes(tmp_path, files, classes):
    make(tmp_path, files)
    assert splits_of(tmp_path) is None
    assert training_sources(tmp_path) == [evaluation_source(tmp_path)] == [tmp_path]
    root, names = class_folders(tmp_path)
    assert ' '.join(names).replace(' ', '~').replace('~', ' ').split() == classes.replace('~', ' ').split()
    images, labels, same = list_labelled_images(tmp_path)
    assert same == names and [Path(i).relative_to(root).parts[0] for i in images] == [names[i] for i in labels]


@pytest.mark.parametrize('files', ['1.jpg 2.jpg', 'cat/1.jpg', 'cat/1.jpg dog/2.jpg 3.jpg', 'test/1.jpg 2.jpg'])
def test_neither(tmp_path, files):
    make(tmp_path, files)
    assert class_folders(tmp_path)[1] == [] and training_sources(tmp_path) == [tmp_path]
    images, labels, _ = list_labelled_images(tmp_path)
    assert len(images) == len(files.split()) and not np.any(labels)


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ('ant/train/1.jpg ant/val/2.jpg bee/train/3.jpg bee/val/4.jpg', 'ant/train and ant/val; .* as in train/ant,'),
        ('ant/Training/1.jpg ant/test_set/2.jpg bee/3.jpg', 'ant/Training and ant/test_set; .* as in Training/ant'),
        ('v1/ant/train/1.jpg v1/ant/val/2.jpg v1/bee/train/3.jpg', 'ant/train and ant/val; .* such as .*/v1/ant'),
        ('a/b/train2017/1.jpg a/b/val2017/0.tar c/1.jpg', 'a/b/train2017 and a/b/val2017; .* as in train2017/a/b, or'),
        ('bottle/train/good/1.png bottle/test/bad/2.png cable/train/good/3.png', 'bottle/train and bottle/test'),
        ('gt/train/1.jpg gt/val/2.jpg x/train/1.png x/val/2.png 3.jpg', 'x/train and x/val'),
    ],
)  # fmt: skip
def test_splits_within_folders_are_refused(tmp_path, files, message):
    """Where they are not seen, training is on the images of the evaluation."""
    make(tmp_path, files)
    for read in (splits_of, training_sources, evaluation_source, lambda source: describe([source])):
        with pytest.raises(InputError, match=f'is divided within its folders, such as into {message}'):
            read(tmp_path)


@pytest.mark.parametrize(
    ('files', 'message'),
    [
        ('a/train/1.jpg b/test/2.jpg', 'is divided within its folders, such as into a/train and b/test; put'),
        ('a/x/Train/1.jpg b/y/val_2/2.jpg c/z/3.jpg', 'such as into a/x/Train and b/y/val_2; put'),
        ('appris/x/1.jpg appris/y/2.jpg test/x/3.jpg test/y/4.jpg', 'has test beside appris, with'),
        ('Val/x/1.jpg Val/y/2.jpg old/x/3.jpg old/y/4.jpg new/x/5.jpg new/y/6.jpg', r'has Val beside \w*, \w*, with'),
        ('cc3m-train-0000.tar cc3m-train-0001.tar cc3m-val-0000.tar', 'holds cc3m-train-0000.tar beside cc3m-val-0000'),
        ('x/validation.tar x/training.tar', 'holds training.tar beside validation.tar; put the shards'),
    ],
)  # fmt: skip
def test_other_divisions_are_refused(tmp_path, files, message):
    with pytest.raises(InputError, match=message):
        describe([make(tmp_path, files)])


@pytest.mark.parametrize('folders', ['train test', './x/train ./x/test', 'ant/train bee/val'])
def test_a_tar_that_is_divided(tmp_path, folders):
    (tmp_path / 'a').mkdir()
    with tarfile.open(tmp_path / 'a/all.tar', 'w') as tar:
        for folder in folders.split():
            tar.addfile(tarfile.TarInfo(f'{folder}/1.jpg'))
    for source in (tmp_path / 'a', tmp_path / 'a/all.tar'):
        with pytest.raises(
            InputError, match=r'a/all.tar is divided into \S+ and \S+; unpack it, or make a tar of each'
        ):
            describe([source])


@pytest.mark.parametrize(
    'files',
    [
        'a/train/1.jpg b/train/2.jpg',
        'a/test/1.jpg b/car/2.jpg',
        'a/val/1.jpg a/test/2.jpg b/3.jpg',
        'test/x/1.jpg car/y/2.jpg',
        'test/x/1.jpg car/x/2.jpg',
    ],
)
def test_classes_within_folders_are_not_splits(tmp_path, files):
    assert splits_of(make(tmp_path, files)) is None


def test_what_was_understood_is_said(tmp_path):
    make(tmp_path / 'x', 'train/a/1.jpg train/b/2.jpg Test/a/3.jpg Test/b/4.jpg Test/b/5.jpg Meta/6.jpg')
    assert describe([tmp_path / 'x']) == (
        f'2 images to train on, from {tmp_path}/x/train; 3 kept for evaluation, in {tmp_path}/x/Test; not used: '
        f'{tmp_path}/x/Meta; classes of the evaluation, named by folders: 2 (a, b).'
    )
    make(tmp_path / 'y', 'train/1.jpg car/2.jpg')
    assert describe([tmp_path / 'y']) == (
        f'2 images to train on, from {tmp_path}/y; none are kept for evaluation, which uses the same images; classes '
        'of the evaluation, named by folders: 2 (car, train).'
    )
    make(tmp_path / 'z', 'train/1.jpg val/2.jpg test/3.jpg')
    text = describe([tmp_path / 'z', tmp_path / 'y'])
    assert (
        text.startswith('3 images to train on')
        and 'not used: ' in text
        and text.endswith('no folders that name classes.')
    )


@pytest.mark.parametrize(
    ('files', 'maps'),
    [
        ('images/1.jpg masks/1.png masks/2.png', 'masks'),
        ('JPEGImages/1.jpg SegmentationClass/1.png SegmentationObject/1.png', 'SegmentationClass SegmentationObject'),
        ('VOC/2012/JPEGImages/1.jpg VOC/2012/SegmentationClass/1.png', 'VOC/2012/SegmentationClass'),
        ('2007/JPEGImages/1.jpg 2007/SegmentationClass/1.png 2012/JPEGImages/2.jpg 2012/SegmentationObject/2.png',
         '2007/SegmentationClass 2012/SegmentationObject'),
        ('ant/images/1.jpg ant/masks/1.png bee/images/2.jpg bee/masks/2.png', 'ant/masks bee/masks'),
        ('ant/images/1.jpg ant/masks/1.png bee/images/2.jpg cow/3.jpg', 'ant/masks'),
        ('images/x/1.jpg masks/x/1.png', 'masks'),
        ('images/1.jpg gt/rgb/1.png gt/depth/1.png', 'gt'),
        ('images/cat/1.jpg images/dog/2.jpg annotations/dog/2.png', 'annotations'),
        ('train/images/1.jpg train/masks/1.png val/images/2.jpg val/masks/2.png', 'train/masks val/masks'),
        ('train/img/a/1.jpg train/gt/a/1.png val/2.jpg', 'train/gt'),
        ('JPEGImages/train/1.jpg JPEGImages/val/2.jpg SegmentationClass/1.png', 'SegmentationClass'),
    ],
)  # fmt: skip
def test_label_maps_are_no_images(tmp_path, log, files, maps):
    """Neither to train and evaluate on, nor to embed or search."""
    root = make(tmp_path / 'data', files)
    images = {str(root / file) for file in files.split() if file.endswith('.jpg')}
    assert set(list_images(root)) == images
    assert list(list_labelled_images(root)[0]) == list(list_images(evaluation_source(root)))
    where = f'Left out of {root}: {files.count(".png")} in folders of label maps and the like'
    assert f'{where} ({", ".join(maps.split())}).' in log.text
    assert set(list_images([*training_sources(root), evaluation_source(root)])) == images
    assert 'used as images' not in describe([root])


def test_labelled_images_of_a_divided_folder_are_those_to_evaluate_on(tmp_path):
    root = make(tmp_path, 'train/a/1.jpg train/b/2.jpg val/a/3.jpg val/b/4.jpg test/a/5.jpg')
    images, labels, classes = list_labelled_images(root)
    assert [Path(path).name for path in images] == ['3.jpg', '4.jpg']
    assert (labels.tolist(), classes) == ([0, 1], ['a', 'b'])


def test_who_names_a_folder_of_label_maps_gets_them(tmp_path):
    make(tmp_path, 'ant/images/1.jpg ant/masks/a/1.png ant/masks/a/2.png')
    for folder in ('ant/masks', 'ant/masks/a'):
        assert [Path(path).name for path in list_images(tmp_path / folder)] == ['1.png', '2.png']
    with listed_once():
        assert len(list_images([tmp_path, tmp_path / 'ant/masks'])) == 3


def test_shards_of_label_maps_are_left_out(tmp_path):
    assert list(list_pictures(make(tmp_path, 'images/0.tar masks/0.tar')).files) == ['images/0.tar']


def test_classes_may_be_called_as_label_maps_are(tmp_path):
    """What lies in their folders is told apart as elsewhere."""
    make(tmp_path, 'photo/1.jpg mask/images/2.jpg mask/masks/3.png')
    data = ImageFolder(str(tmp_path), with_label=True, pipeline=[])
    assert data.CLASSES == ('mask', 'photo') and data.get_gt_labels().tolist() == [0, 1]


@pytest.mark.parametrize(
    ('files', 'among'),
    [
        ('1.jpg masks/1.png', 'masks'),
        ('ant/images/1.jpg ant/masks/x/1.png ant/3.jpg bee/2.jpg', 'ant/masks/x'),
        ('images/1.jpg masks/1.png more/2.jpg', 'masks'),
    ],
)
def test_annotations_among_the_images_are_said(tmp_path, files, among):
    assert f'; used as images, though named like annotations: {tmp_path}/{among};' in describe([make(tmp_path, files)])


def test_an_empty_folder_names_a_class_for_all(tmp_path, monkeypatch):
    """The data set, and every command that reads labels, have the same classes; the folder is walked once."""
    root = make(tmp_path / 'photos', 'a/1.jpg c/2.jpg')
    (root / 'b').mkdir()
    assert class_folders(root)[1] == ['a', 'b', 'c']
    data = ImageFolder(str(root), with_label=True, pipeline=[])
    assert [data.get_data_info(i)['gt_label'] for i in range(2)] == [0, 2] and data.CLASSES == ('a', 'b', 'c')
    with listed_once():
        class_folders(tmp_path)
        assert ImageFolder(str(root), with_label=True, pipeline=[]).CLASSES == ('a', 'b', 'c')
    seen, scandir = [], os.scandir
    monkeypatch.setattr(os, 'scandir', lambda path: seen.append(str(path)) or scandir(path))
    images, labels, classes = list_labelled_images(root)
    assert [Path(path).name for path in images] == ['1.jpg', '2.jpg']
    assert (labels.tolist(), classes) == ([0, 2], ['a', 'b', 'c'])
    assert len(seen) == len(set(seen)) == 4
