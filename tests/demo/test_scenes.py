"""The drawn data set: its parts agree with one another, and it is written whole or not at all."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.path import Path as Outline
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mmmilan.demo.scenes import dataset, make_scene, write_scenes
from mmmilan.demo.scenes.appearance import BACKGROUNDS, COLOURS, KINDS, SEMANTIC_CLASSES, SHAPES
from mmmilan.demo.scenes.dataset import polygons
from mmmilan.demo.scenes.drawing import captions, paint, render, sample_scene
from mmmilan.errors import InputError

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


@pytest.mark.parametrize(('seed', 'shape'), enumerate(SHAPES))
def test_an_instance_map_is_the_outline_that_the_scene_gives(seed: int, shape: str) -> None:
    scene = sample_scene(np.random.default_rng(seed), 'oak')
    main = dataclasses.replace(scene.objects[0], shape=shape)
    _, instances = render(dataclasses.replace(scene, objects=(main,)), 96, np.random.default_rng(0))
    across, down = np.meshgrid(*[(np.arange(96) + 0.5) / 96] * 2)
    offset = (across - main.centre[0]) + 1j * (down - main.centre[1])
    offset *= np.exp(-1j * main.angle) / main.radius
    points = np.stack([offset.real.ravel(), offset.imag.ravel()], axis=1)
    inside = [Outline(loop).contains_points(points).reshape(96, 96) for loop in SHAPES[shape]]
    expected = np.logical_xor.reduce(inside)
    found = instances == 1
    assert (found & expected).sum() / (found | expected).sum() > 0.95


@pytest.mark.parametrize('kind', KINDS)
def test_the_colour_of_a_kind_looks_like_its_name(kind: str) -> None:
    hues = 360 * np.array([hue for hue, _, _ in COLOURS.values()])
    for seed in range(4):
        scene = sample_scene(np.random.default_rng(seed), kind)
        alone = dataclasses.replace(scene, objects=scene.objects[:1])
        image, instances = render(alone, 48, np.random.default_rng(seed))
        hue, saturation, _ = cv2.split(cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2HSV))
        seen = hue[(instances == 1) & (saturation > 0.5)]
        distance = np.abs((seen[:, None] - hues + 180) % 360 - 180)
        nearest = np.bincount(distance.argmin(axis=1), minlength=len(hues))
        assert list(COLOURS)[nearest.argmax()] == KINDS[kind][0]


def test_kinds_differ_in_colour_and_pattern_alone() -> None:
    assert len(set(KINDS.values())) == len(KINDS)
    scene = sample_scene(np.random.default_rng(7), 'oak')
    images = {}
    for kind in KINDS:  # all in the same colour
        main = dataclasses.replace(scene.objects[0], kind=kind)
        images[kind], _ = render(dataclasses.replace(scene, objects=(main,)), 48, np.random.default_rng(0))
    for one, other in combinations(KINDS, 2):
        assert np.array_equal(images[one], images[other]) == (KINDS[one][1] == KINDS[other][1])


def test_a_change_of_colour_changes_the_pixels_of_the_object_alone() -> None:
    scene = sample_scene(np.random.default_rng(7), 'oak')  # the one pattern without a second colour
    main = dataclasses.replace(scene.objects[0], rgb=(0.9, 0.1, 0.1))
    recoloured = dataclasses.replace(main, rgb=(0.1, 0.2, 0.9))
    images = []
    for item in (main, recoloured):
        drawn = dataclasses.replace(scene, objects=(item, *scene.objects[1:]))
        image, instances = render(drawn, 96, np.random.default_rng(0))
        images.append(image.astype(int))
    changed = np.abs(images[0] - images[1]).max(axis=2) > 30
    mask = (instances == 1).astype(np.uint8)
    assert not changed[cv2.dilate(mask, np.ones((5, 5))) == 0].any()
    assert changed[mask == 1].mean() > 0.98


def test_polygons_decode_to_the_very_mask() -> None:
    for seed in range(40):  # ragged masks with holes, islands in holes and parts at the border
        grain = np.random.default_rng(seed).random((23, 31))
        mask = cv2.GaussianBlur(grain, (0, 0), 0.3 + 0.02 * seed) > 0.5
        encoded = coco_mask.merge(coco_mask.frPyObjects(polygons(mask), 23, 31))
        assert np.array_equal(coco_mask.decode(encoded), mask), seed


def test_the_kind_has_no_say_in_anything_but_colour() -> None:
    for seed in range(20):
        seen = set()
        for kind in KINDS:
            scene = sample_scene(np.random.default_rng(seed), kind)
            assert [item.kind for item in scene.objects].count(kind) == 1 and scene.objects[0].kind == kind
            bare = tuple(dataclasses.replace(item, kind='', rgb=(0, 0, 0)) for item in scene.objects)
            seen.add(dataclasses.replace(scene, objects=bare))
        assert len(seen) == 1


def test_every_attribute_is_drawn_about_equally_often() -> None:
    drawn = []
    for seed in range(1000):
        rng = np.random.default_rng(seed)
        scene = sample_scene(rng, 'oak')
        drawn.append((scene, set(captions(scene, rng)[0].split())))
    small = [item for scene, _ in drawn for item in scene.objects[1:]]
    for choices, values in (
        (BACKGROUNDS, [scene.background for scene, _ in drawn]),
        (SHAPES, [scene.objects[0].shape for scene, _ in drawn]),
        ((1, 2, 3), [len(scene.objects) for scene, _ in drawn]),
        (KINDS.keys() - {'oak'}, [item.kind for item in small]),
        (SHAPES, [item.shape for item in small]),
        ((True, False), [scene.objects[0].shape in words for scene, words in drawn]),
        ((True, False), [scene.background in words for scene, words in drawn]),
    ):
        counts, share = Counter(values), 1 / len(choices)
        deviation = (len(values) * share * (1 - share)) ** 0.5
        assert set(counts) == set(choices)
        assert all(abs(count - len(values) * share) < 4 * deviation for count in counts.values())


def test_objects_lie_inside_the_image_and_no_centre_in_the_circle_of_another() -> None:
    for seed in range(300):
        objects = sample_scene(np.random.default_rng(seed), 'oak').objects
        for item in objects:
            assert all(item.radius <= place <= 1 - item.radius for place in item.centre)
        for one, other in combinations(objects, 2):
            assert math.dist(one.centre, other.centre) > max(one.radius, other.radius)


def test_a_later_object_lies_in_front_of_an_earlier_one() -> None:
    scene = sample_scene(np.random.default_rng(0), 'oak')
    main = dataclasses.replace(scene.objects[0], shape='disc')
    small = dataclasses.replace(main, kind='frog', radius=main.radius / 2)
    _, instances = render(dataclasses.replace(scene, objects=(main, small)), 48, np.random.default_rng(0))
    ratio = (instances == 1).sum() / (instances == 2).sum()
    assert ratio == pytest.approx(3, rel=0.1)  # a disc less one of a quarter of its area


def test_objects_stay_visible_and_the_main_one_is_the_largest() -> None:
    for index in range(60):
        scene, _, _, instances = make_scene(SEED, 'val', index, 48)
        areas = np.bincount(instances.ravel(), minlength=len(scene.objects) + 1)[1:]
        assert areas.argmax() == 0
        for area, item in zip(areas, scene.objects, strict=True):
            canvas = np.zeros((48, 48, 3), np.float32)
            whole = paint(canvas, item, scene.light, np.random.default_rng(0)) > 0.5
            assert area > 0.6 * whole.sum()


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
