"""The drawn data set: its parts agree with one another, and it is written whole or not at all."""

from __future__ import annotations

import csv
import json
import re
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mmmilan.errors import InputError
from scenes import dataset, make_scene, write_scenes
from scenes.appearance import BACKGROUNDS, KINDS, SEMANTIC_CLASSES, SHAPES
from scenes.dataset import polygons

SIZE, SEED = 64, 3
NUM = {'train': 40, 'val': 10}


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp('scenes') / 'set'
    write_scenes(root, NUM['train'], NUM['val'], SIZE, SEED)
    return root


def read_captions(root: Path, split: str) -> list[tuple[str, str]]:
    with open(root / f'captions_{split}.csv', newline='') as file:
        return [(row['image'], row['caption']) for row in csv.DictReader(file)]


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def load_coco(root: Path, split: str) -> COCO:
    return COCO(str(root / 'annotations' / f'instances_{split}.json'))


def test_the_same_parameters_give_the_same_files(root: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / 'again', NUM['train'], NUM['val'], SIZE, SEED)
    assert files(tmp_path / 'again') == files(root)


def test_an_image_does_not_depend_on_how_many_there_are(root: Path, tmp_path: Path) -> None:
    write_scenes(tmp_path / 'small', 10, 10, SIZE, SEED)
    small, large = files(tmp_path / 'small'), files(root)
    shared = [name for name in small if name.endswith(('.jpg', '.png'))]
    assert len(shared) == 40 and all(small[name] == large[name] for name in shared)
    captions = read_captions(tmp_path / 'small', 'train')
    assert captions == read_captions(root, 'train')[: len(captions)]
    ours, theirs = load_coco(tmp_path / 'small', 'train'), load_coco(root, 'train')
    assert list(ours.anns.values()) == list(theirs.anns.values())[: len(ours.anns)]


def test_seed_split_and_index_all_matter_and_the_size_leaves_the_scene_alone() -> None:
    scene, texts, image, _ = make_scene(0, 'train', 0, 48)
    for other in ((1, 'train', 0), (0, 'val', 0), (0, 'train', 10)):
        assert not np.array_equal(image, make_scene(*other, 48)[2])
    assert make_scene(0, 'train', 0, 96)[:2] == (scene, texts)


def test_folders_name_the_classes_in_order_and_are_balanced(root: Path) -> None:
    for split, number in NUM.items():
        folders = sorted((root / split).iterdir())
        assert [folder.name for folder in folders] == list(KINDS)
        assert {len(list(folder.glob('*.jpg'))) for folder in folders} == {number // len(KINDS)}


def test_mmpretrain_reads_images_and_labels(root: Path) -> None:
    from mmpretrain.datasets import CustomDataset

    dataset = CustomDataset(data_prefix=str(root / 'train'))
    assert tuple(KINDS) == dataset.CLASSES and len(dataset) == NUM['train']
    for item in dataset:
        path = Path(item['img_path'])
        assert tuple(KINDS)[item['gt_label']] == path.parent.name
        drawn = make_scene(SEED, 'train', int(path.stem), SIZE)[2].astype(int)
        stored = cv2.imread(str(path))[..., ::-1]
        assert stored.shape == (SIZE, SIZE, 3)
        assert np.abs(stored - drawn).mean() < 5  # JPEG; swapped channels would be far more


@pytest.mark.parametrize('split', NUM)
def test_annotations_label_maps_and_classes_agree(root: Path, split: str) -> None:
    coco = load_coco(root, split)
    names = {number: category['name'] for number, category in coco.cats.items()}
    assert json.loads((root / 'semantic' / 'classes.json').read_text()) == list(SEMANTIC_CLASSES)
    assert len(coco.imgs) == NUM[split]
    for image in coco.imgs.values():
        stem = image['file_name'].removesuffix('.jpg')
        assert (root / split / image['file_name']).is_file()
        labels = cv2.imread(str(root / 'semantic' / split / f'{stem}.png'), cv2.IMREAD_UNCHANGED)
        assert labels.dtype == np.uint8 and labels.shape == (image['height'], image['width'])
        expected = np.full_like(labels, 255)
        annotations = coco.imgToAnns[image['id']]
        for annotation in annotations:
            mask = coco.annToMask(annotation).astype(bool)
            assert (expected[mask] == 255).all(), 'masks overlap'
            expected[mask] = SEMANTIC_CLASSES.index(names[annotation['category_id']])
            rows, columns = np.nonzero(mask)
            left, top, width, height = annotation['bbox']
            assert (left, top) == (columns.min(), rows.min())
            assert (left + width, top + height) == (columns.max() + 1, rows.max() + 1)
            assert annotation['area'] == mask.sum() and annotation['iscrowd'] == 0
        background = set(labels[expected == 255].tolist())
        assert len(background) == 1 and background < set(range(len(BACKGROUNDS)))
        expected[expected == 255] = background.pop()
        assert np.array_equal(labels, expected)
        largest = max(annotations, key=lambda annotation: annotation['area'])
        assert names[largest['category_id']] == stem.split('/')[0]


@pytest.mark.parametrize('split', NUM)
def test_captions_tell_what_the_label_maps_show(root: Path, split: str) -> None:
    rows = read_captions(root, split)
    assert len(rows) == 2 * NUM[split]
    for (image, first), (same, second) in zip(rows[::2], rows[1::2], strict=True):
        assert image == same and first != second
        labels = cv2.imread(str(root / 'semantic' / split / image.replace('.jpg', '.png')), cv2.IMREAD_UNCHANGED)
        shown = {SEMANTIC_CLASSES[label] for label in np.unique(labels)}
        kind, index = image.removesuffix('.jpg').split('/')
        objects = make_scene(SEED, split, int(index), SIZE)[0].objects
        outlines = {item.kind: item.shape for item in objects}
        named = []
        for caption in (first, second):
            assert re.fullmatch('[a-z]+( [a-z]+)*', caption)
            assert not re.search(r'\ba [aeiou]|\ban [^aeiou]', caption)
            words = caption.split()
            named.append([word for word in words if word in KINDS])
            for word, following in pairwise(words):
                assert following not in SHAPES or following == outlines[word]
        assert named == [[kind], [item.kind for item in objects]]
        assert set(first.split()) & set(BACKGROUNDS) <= shown
        assert set(second.split()) & set(SEMANTIC_CLASSES) == shown


def test_polygons_decode_to_the_very_mask() -> None:
    for seed in range(40):  # ragged masks with holes, islands in holes and parts at the border
        grain = np.random.default_rng(seed).random((23, 31))
        mask = cv2.GaussianBlur(grain, (0, 0), 0.3 + 0.02 * seed) > 0.5
        encoded = coco_mask.merge(coco_mask.frPyObjects(polygons(mask), 23, 31))
        assert np.array_equal(coco_mask.decode(encoded), mask), seed


def test_the_same_set_is_reused(root: Path, capsys: pytest.CaptureFixture) -> None:
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    write_scenes(root, NUM['train'], NUM['val'], SIZE, SEED)
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == before
    assert capsys.readouterr().out == f'{root}: reusing the scenes written before.\n'


def test_other_parameters_are_refused(root: Path) -> None:
    with pytest.raises(InputError, match=r'other parameters \(num_val, seed\)'):
        write_scenes(root, NUM['train'], NUM['val'] + 1, SIZE, SEED + 1)


@pytest.mark.parametrize('meta', [None, 'not json', '[1, 2]', '7'])
def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, meta: str | None) -> None:
    (tmp_path / 'precious.txt').write_text('kept')
    if meta is not None:
        (tmp_path / 'meta.json').write_text(meta)
    before = files(tmp_path)
    with pytest.raises(InputError, match='is not a set of scenes'):
        write_scenes(tmp_path, 10, 10)
    assert files(tmp_path) == before


@pytest.mark.parametrize(('option', 'value'), [('num_train', 9), ('num_val', 0), ('image_size', 20), ('seed', -1)])
def test_an_option_out_of_range_is_named(tmp_path: Path, option: str, value: int) -> None:
    with pytest.raises(InputError, match=f'^{option}={value} is too small; choose at least'):
        write_scenes(tmp_path / 'set', **{'num_train': 10, 'num_val': 10, option: value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('failure', 'raised'),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(28, 'No space left'), InputError)],
)
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException, raised: type
) -> None:
    write_image = dataset.write_image

    def failing(path: Path, image: np.ndarray) -> None:
        if path.stem == '000005':
            raise failure
        write_image(path, image)

    monkeypatch.setattr(dataset, 'write_image', failing)
    with pytest.raises(raised, match='No space left' if raised is InputError else None):
        write_scenes(tmp_path / 'sets' / 'set', 10, 10, SIZE)
    assert not list((tmp_path / 'sets').iterdir())
