"""Labels are those of the names of classes, in whatever order a split, a file or an option has them."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmpretrain.datasets import CustomDataset
from mmpretrain.datasets.categories import IMAGENET_CATEGORIES
from torch.utils.data import Subset

from mmmilan.datasets import ImageFolder
from mmmilan.datasets.classes import class_names, read_class_names, use_classes, wordnet_ids
from mmmilan.datasets.packed import pack_images
from mmmilan.errors import InputError

NAMES = ('ant', 'bee', 'cat', 'dog')


@pytest.fixture
def split(tmp_path):
    """Makes a folder of two images a class."""
    image = cv2.imencode('.png', np.zeros((4, 4, 3), np.uint8))[1].tobytes()

    def make(name: str, classes: tuple[str, ...]) -> Path:
        for each in classes:
            (tmp_path / name / each).mkdir(parents=True)
            for number in range(2):
                (tmp_path / name / each / f'{number}.png').write_bytes(image)
        return tmp_path / name

    return make


def folder(root: Path, classes: tuple[str, ...] | None = None, **options) -> ImageFolder:
    metainfo = dict(metainfo=dict(classes=classes)) if classes else {}
    return ImageFolder(str(root), with_label=True, pipeline=[], **metainfo, **options)


def labels(dataset) -> dict[str, int]:
    """The label of each folder."""
    entries = [dataset.get_data_info(index) for index in range(len(dataset))]
    found = {Path(entry['img_path']).parent.name: entry['gt_label'] for entry in entries}
    assert all(found[Path(entry['img_path']).parent.name] == entry['gt_label'] for entry in entries)
    return found


@pytest.mark.parametrize('serialize_data', [True, False])
@pytest.mark.parametrize('kind', [ImageFolder, CustomDataset])
def test_a_split_that_lacks_a_class(split, log, kind, serialize_data):
    dataset = kind(
        str(split('val', ('ant', 'cat', 'dog'))), with_label=True, pipeline=[], serialize_data=serialize_data
    )
    assert labels(dataset) == dict(ant=0, cat=1, dog=2)
    use_classes(dataset, NAMES, 'train')
    assert labels(dataset) == dict(ant=0, cat=2, dog=3) and len(dataset) == 6
    assert dataset.metainfo['classes'] == class_names(dataset) == NAMES
    assert 'val/ lacks 1 of the 4 classes of train: bee. The others are matched by name.' in log.text.replace(
        'val ', 'val/ '
    )
    use_classes(dataset, NAMES, 'train')  # once more changes nothing
    assert labels(dataset) == dict(ant=0, cat=2, dog=3)


@pytest.mark.parametrize(
    'names, fault',
    [
        (('ant', 'cow'), r'1 of its 2 classes, cow \(2 samples\), where train has ant, bee, cat, dog; rename'),
        (('ant', 'Bee', 'cat'), r'Bee \(2 samples\), where .* \(is bee meant by Bee\?\); rename'),
        (('x', 'y'), r'2 of its 2 classes, x \(2 samples\), y \(2 samples\), where train has'),
    ],
)
def test_a_split_with_other_classes(split, names, fault):
    with pytest.raises(InputError, match=fault):
        use_classes(folder(split('val', names)), NAMES, 'train')


def test_what_is_no_class(split, log):
    """Folders without images, of a system or a tool, change no label."""
    root = split('val', ('cat', 'dog'))
    for name in ('.git', 'bin', 'cat/__MACOSX'):
        (root / name).mkdir()
    (root / 'cat/__MACOSX/._0.png').touch()
    dataset = folder(root)
    use_classes(dataset, NAMES, 'train')
    assert labels(dataset) == dict(cat=2, dog=3) and dataset.metainfo['classes'] == NAMES


def test_names_that_only_look_alike(split):
    """A system may store an accent as a character of its own."""
    composed, apart = (unicodedata.normalize(form, 'caf\u00e9') for form in ('NFC', 'NFD'))
    assert composed != apart
    dataset = folder(split('val', (apart, 'tea')))
    use_classes(dataset, ('bar', 'tea', composed), 'train')
    assert labels(dataset) == {apart: 2, 'tea': 1}
    both = folder(split('train', (apart, composed, 'tea')))
    assert both.metainfo['classes'] == (composed, 'tea') and Counter(labels(both).values()) == {0: 2, 1: 1}


def test_numbers_as_names(split):
    """They are sorted as texts, in each split alike."""
    train, val = folder(split('train', ('1', '2', '10'))), folder(split('val', ('2', '10')))
    assert class_names(train) == ('1', '10', '2')
    use_classes(val, class_names(train), 'train')
    assert labels(val) == {'10': 1, '2': 2}


def test_names_that_are_given_define_the_order(split, log):
    root = split('train', ('ant', 'cat', 'dog'))
    assert labels(folder(root, ('dog', 'bee', 'cat', 'ant'))) == dict(dog=0, cat=2, ant=3)
    assert 'lacks 1 of the 4 classes of metainfo.classes' in log.text
    with pytest.raises(
        InputError, match=r'train/? has 1 of its 3 classes, dog \(2 samples\), where metainfo.classes of'
    ):
        folder(root, ('cat', 'ant'))
    with pytest.raises(InputError, match='names the class cat twice'):
        folder(root, ('cat', 'ant', 'dog', 'cat'))
    dataset = folder(root, ('dog', 'cat', 'ant'))
    use_classes(dataset, ('ant', 'cat', 'dog'), 'train')
    assert labels(dataset) == dict(ant=0, cat=1, dog=2)


def test_images_in_a_database(split, tmp_path):
    pytest.importorskip('lmdb')
    root = split('val', ('ant', 'cat', 'dog'))
    pack_images(root, sorted(root.rglob('*.png')), tmp_path / 'val.lmdb')
    backend = dict(backend='lmdb', db_path=str(tmp_path / 'val.lmdb'))
    assert labels(folder(root, ('dog', 'cat', 'ant'), backend_args=backend)) == dict(dog=0, cat=1, ant=2)
    dataset = folder(root, backend_args=backend)
    use_classes(dataset, NAMES, 'train')
    assert labels(dataset) == dict(ant=0, cat=2, dog=3)


def test_wrappers(split):
    parts = [folder(split(name, ('ant', 'dog'))) for name in 'ab']
    for joined in (ConcatDataset(parts), RepeatDataset(folder(split('d', ('ant', 'dog'))), 2)):
        use_classes(joined, NAMES, 'train')
        assert {joined.get_data_info(index)['gt_label'] for index in range(len(joined))} == {0, 3}
        assert joined.metainfo['classes'] == NAMES and class_names(joined) == NAMES
    part = folder(split('c', ('ant', 'dog')))
    use_classes(Subset(part, [0]), NAMES, 'train')
    assert labels(part) == dict(ant=0, dog=3)


def test_labels_without_names(split, tmp_path, log):
    """Numbers in a list of files are those of the classes, unless the folders of the images say otherwise."""
    root, path = split('val', ('ant', 'cat')), tmp_path / 'val.txt'

    def use(*lines: str) -> dict[str, int]:
        path.write_text('\n'.join(lines))
        dataset = folder(root, ann_file=str(path))
        use_classes(dataset, NAMES, 'train')
        return labels(dataset)

    assert use('ant/0.png 0', 'cat/0.png 2', 'cat/1.png 2') == dict(ant=0, cat=2)
    assert (
        'val.txt names no classes; its labels are taken as those of train, in this order: ant, bee, cat, dog'
        in log.text
    )
    with pytest.raises(
        InputError, match=r'val.txt names no classes, and gives \S+cat/1.png the label 1, which is bee of'
    ):
        use('ant/0.png 0', 'cat/0.png 2', 'cat/1.png 1')
    (root / '5.png').touch()
    with pytest.raises(InputError, match=r'gives \S+/5.png the label 4, which is none of train'):
        use('5.png 4')
    assert use('5.png 3') == dict(val=3)


def test_several_labels_an_image(split):
    from mmpretrain.datasets import MultiLabelDataset

    root = split('val', ('x',))
    entries = [dict(img_path=f'x/{number}.png', gt_label=[number, 1]) for number in range(2)]
    (root / 'labels.json').write_text(json.dumps(dict(metainfo=dict(classes=['dog', 'ant']), data_list=entries)))
    dataset = MultiLabelDataset(ann_file=str(root / 'labels.json'), data_root=str(root), pipeline=[])
    use_classes(dataset, NAMES, 'train')
    assert [dataset.get_data_info(index)['gt_label'] for index in range(2)] == [[3, 0], [0, 0]]


def test_the_names_of_imagenet_are_those_of_its_folders():
    names = wordnet_ids(IMAGENET_CATEGORIES)
    assert len(set(names)) == 1000 and names[0] == 'n01440764' and list(names) == sorted(names)
    assert len(set(IMAGENET_CATEGORIES)) < 1000  # two cranes
    assert wordnet_ids(['ant']) == ('ant',)


TABLES = {
    'a.txt': 'wall\nbig tree\n\nsky\n',
    'b.txt': '0 wall\n1 big tree\n2 sky',
    'c.txt': '1: wall\n2: big tree\n3: sky',
    'd.txt': 'Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t9\t9\t1\twall\n2\t0\t9\t9\t1\tbig tree\n3\t0\t1\t1\t1\tsky',
    'e.json': '["wall", "big tree", "sky"]',
    'F.JSON': '{"2": "sky", "1": "big tree", "0": "wall"}',
    'g.json': '{"sky": 3, "wall": 1, "big tree": 2}',
    'h.json': '{"categories": [{"id": 2, "name": "big tree"}, {"id": 3, "name": "sky"}, {"id": 1, "name": "wall"}]}',
}


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('name', TABLES)
def test_tables_of_names(tmp_path, name, encoding):
    (tmp_path / name).write_text(TABLES[name], encoding=encoding)
    assert read_class_names(tmp_path / name) == ['wall', 'big tree', 'sky']


@pytest.mark.parametrize(
    'name, text, fault',
    [
        ('a.json', '{"0": "wall", "2": "sky"}', 'does not number its 2 classes without a gap from 0 or 1'),
        ('a.json', '[1, 2]', 'cannot be read as names of classes'),
        ('a.json', '{', 'cannot be read as names of classes'),
        ('a.json', '[' * 100_000, 'cannot be read as names of classes'),
        ('a.json', '[{"id": Infinity, "name": "sky"}]', 'cannot be read as names of classes'),
        ('a.txt', '0 wall\n7 sky', 'does not number its 2 classes without a gap'),
        ('a.txt', '', 'does not number its 0 classes'),
        ('a.txt', 'sky\nsky', 'names the class sky twice'),
        ('b.txt', None, r'cannot be read \(No such file'),
        ('b.txt', 'caf\udce9', r'is not in UTF-8 \(byte 3: .*; save it as UTF-8'),
    ],
)
def test_tables_that_are_none(tmp_path, name, text, fault):
    if text is not None:
        (tmp_path / name).write_text(text, errors='surrogateescape')
    with pytest.raises(InputError, match=f'{name} {fault}'):
        read_class_names(tmp_path / name)
