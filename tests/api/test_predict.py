"""Predictions of classifiers, detectors and segmentors: in Python, and as files that a stopped run goes on with."""

from __future__ import annotations

import csv
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import cv2
import mmpretrain
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image

import mmmilan
from helpers import demo_config, rest_slow, save_trained
from mmmilan import cli
from mmmilan.api.predict_files import Items
from mmmilan.checkpoints.config import own_config
from mmmilan.datasets.listing import Names
from mmmilan.errors import InputError
from mmmilan.files import write_part
from processes import exit_codes, start_ranks

NAMES = dict(classification='abcdefghij', detection='abcdefghij', segmentation='abcdefghijklmnop')
TASKS = list(NAMES)


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory) -> dict[str, Path]:
    """An untrained model of each task. Images keep their aspect ratio, so they differ in shape within a batch."""
    folder = tmp_path_factory.mktemp('checkpoints')
    paths = {}
    for task in TASKS:
        cfg = demo_config(task)
        if task == 'segmentation':
            cfg.test_dataloader.dataset.pipeline[1].update(scale=(96, 64), keep_ratio=True)
        paths[task] = save_trained(cfg, folder / f'{task}.pth', NAMES[task])
    return paths


@pytest.fixture
def photos(tmp_path) -> Path:
    """Six photos of three shapes in nested folders, of which one does not decode."""
    rng = np.random.default_rng(0)
    sizes = {'a/0.jpg': (50, 70), 'a/1.png': (70, 50), 'b/0.jpg': (50, 70), 'b/x.jpg': None, 'c.jpg': (64, 64)}
    for name, size in (sizes | {'d.jpg': (70, 50)}).items():
        path = tmp_path / 'photos' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if size is None:
            path.write_bytes(b'no image')
        else:
            cv2.imwrite(str(path), cv2.resize(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8), size))
    return tmp_path / 'photos'


READ = ['a/0.jpg', 'a/1.png', 'b/0.jpg', 'c.jpg', 'd.jpg']


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_classes(photos, checkpoints, tmp_path, log):
    path = mmmilan.predict(photos, checkpoints['classification'], tmp_path / 'out')
    assert path == tmp_path / 'out/predictions.csv'
    header, *rows = csv.reader(path.open())
    assert header[:3] == ['path', 'class', 'score'] and header[-1] == 'score_5' and len(header) == 11
    assert [row[0] for row in rows] == [
        str(photos / name) for name in ('a/0.jpg', 'a/1.png', 'b/0.jpg', 'b/x.jpg', 'c.jpg', 'd.jpg')
    ]
    assert rows[3][1:] == [''] * 10 and f'Left out: {photos}/b/x.jpg does not decode' in log.text
    assert 'predictions for 5 images; 1 could not be read' in log.text
    predictor = mmmilan.Predictor(checkpoints['classification'])
    assert predictor.task == 'classification' and predictor.classes == tuple(NAMES['classification'])
    results = predictor([photos / name for name in READ])
    for row, result in zip(rows[:3] + rows[4:], results, strict=True):
        assert row[1::2] == [predictor.classes[label] for label in result['labels'][:5]]
        assert np.allclose(np.array(row[2::2], float), result['scores'][:5], atol=1e-5)
        assert result['scores'].sum() == pytest.approx(1, abs=1e-5) and len(result['labels']) == 10
        assert (np.diff(result['scores']) <= 0).all()
    drawn = sorted(str(path.relative_to(tmp_path / 'out/drawn')) for path in (tmp_path / 'out/drawn').rglob('*.*'))
    assert drawn == ['a/0.jpg', 'a/1.jpg', 'b/0.jpg', 'c.jpg', 'd.jpg']
    with tarfile.open(tmp_path / 'shard.tar', 'w') as shard:
        for name in READ:
            shard.add(photos / name, name)
    path = mmmilan.predict(tmp_path / 'shard.tar', checkpoints['classification'], tmp_path / 'packed')
    _, *packed = csv.reader(path.open())
    assert [row[1:] for row in packed] == [row[1:] for row in rows if row[1]]
    assert all(row[0].startswith('tar://') and Path(drawn[i]).stem in row[0] for i, row in enumerate(packed))
    assert {str(path.relative_to(tmp_path / 'packed/drawn')) for path in tmp_path.glob('packed/drawn/**/*.*')} == {
        *drawn
    }
    page = (tmp_path / 'out/index.html').read_text()
    assert all(f'src="drawn/{name}"' in page for name in drawn) and f'{rows[0][1]} ' in page


def test_objects(photos, checkpoints, tmp_path):
    coco = pytest.importorskip('pycocotools.coco')
    path = mmmilan.predict(photos, checkpoints['detection'], tmp_path / 'out', batch_size=4)
    content = json.loads(path.read_text())
    assert content['left_out'] == [str(photos / 'b/x.jpg')]
    assert [each['file_name'] for each in content['images']] == [str(photos / name) for name in READ]
    assert [each['id'] for each in content['images']] == [1, 2, 3, 5, 6]
    assert [(each['id'], each['name']) for each in content['categories']] == list(enumerate(NAMES['detection'], 1))
    index = coco.COCO(str(path))
    found = index.loadRes(content['annotations'])
    predictor = mmmilan.Predictor(checkpoints['detection'])
    for image, result in zip(
        content['images'], predictor([each['file_name'] for each in content['images']]), strict=True
    ):
        assert result['size'].tolist() == [image['height'], image['width']]
        own = found.loadAnns(found.getAnnIds(imgIds=image['id']))
        assert len(own) == len(result['boxes']) > 0
        left, top, right, bottom = result['boxes'].T
        assert np.allclose(
            [each['bbox'] for each in own], np.stack([left, top, right - left, bottom - top], 1), atol=0.02
        )
        assert [each['category_id'] - 1 for each in own] == result['labels'].tolist()
        assert np.allclose([each['score'] for each in own], result['scores'], atol=1e-5)
        assert all(np.array_equal(found.annToMask(each), mask) for each, mask in zip(own, result['masks'], strict=True))


def test_label_maps(photos, checkpoints, tmp_path):
    folder = mmmilan.predict(photos, checkpoints['segmentation'], tmp_path / 'out', batch_size=4)
    assert sorted(contents(folder)) == ['a/0.png', 'a/1.png', 'b/0.png', 'c.png', 'd.png']
    assert (tmp_path / 'out/classes.txt').read_text().split() == list(NAMES['segmentation'])
    predictor = mmmilan.Predictor(checkpoints['segmentation'])
    for name, result in zip(READ, predictor([photos / name for name in READ]), strict=True):
        with Image.open(folder / Path(name).with_suffix('.png')) as image:
            assert image.mode == 'P' and np.array_equal(np.asarray(image), result['map'])
            palette = np.array(image.getpalette()).reshape(-1, 3)
        assert result['map'].shape == cv2.imread(str(photos / name)).shape[:2]
        assert [tuple(colour) for colour in palette[:16]] == predictor.colours and len(set(predictor.colours)) == 16


@pytest.mark.parametrize('task', rest_slow(TASKS, 'classification', 'segmentation'))
def test_predictions_do_not_depend_on_the_batch(task, photos, checkpoints):
    """Nor on whether an image is a path, an array or of Pillow."""
    predictor = mmmilan.Predictor(checkpoints[task])
    together = predictor([photos / name for name in READ], batch_size=5)
    alone = predictor([cv2.imread(str(photos / name)) for name in READ], batch_size=1)
    with Image.open(photos / 'c.jpg') as image:
        alone[3] = predictor(image)[0]
    for one, other in zip(together, alone, strict=True):
        for name, rows in one.items():
            assert np.array_equal(rows, other[name]) or np.allclose(rows, other[name], atol=1e-4), name


@pytest.mark.slow
def test_inferencers_of_openmmlab(photos, checkpoints, tmp_path):
    """They take our configs and checkpoints, and give what a Predictor gives."""
    mmdet, mmseg = pytest.importorskip('mmdet.apis'), pytest.importorskip('mmseg.apis')
    photo, device = str(photos / 'a/1.png'), 'cpu'
    expected = {task: mmmilan.Predictor(path)(photo)[0] for task, path in checkpoints.items()}
    config, weights = {}, {task: str(path) for task, path in checkpoints.items()}
    for task, path in checkpoints.items():
        config[task] = str(tmp_path / f'{task}.py')
        own_config(path).dump(config[task])
    boxes, scores = expected['detection']['boxes'], expected['detection']['scores']
    found = mmdet.DetInferencer(weights=weights['detection'], device=device)(photo)['predictions'][0]
    assert np.allclose(found['scores'], scores, atol=1e-4) and np.allclose(found['bboxes'], boxes, atol=1e-2)
    detector = mmdet.init_detector(config['detection'], weights['detection'], device=device)
    for image in (photo, cv2.imread(photo)):
        assert np.allclose(mmdet.inference_detector(detector, image).pred_instances.bboxes, boxes, atol=1e-2)
    inferencer = mmseg.MMSegInferencer(config['segmentation'], weights['segmentation'], device=device)
    assert np.array_equal(
        inferencer(photo, out_dir=str(tmp_path / 'seg'))['predictions'], expected['segmentation']['map']
    )
    segmentor = mmseg.init_model(config['segmentation'], weights['segmentation'], device=device)
    for image in (photo, cv2.imread(photo)):
        labels = mmseg.inference_model(segmentor, image).pred_sem_seg.data[0]
        assert np.array_equal(labels, expected['segmentation']['map'])
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        classify = mmpretrain.ImageClassificationInferencer(config['classification'], weights['classification'], device)
        result = classify(photo)[0]
    assert result['pred_label'] == expected['classification']['labels'][0]
    assert result['pred_score'] == pytest.approx(expected['classification']['scores'][0], abs=1e-5)


@pytest.mark.slow
def test_a_stopped_run_goes_on(photos, checkpoints, tmp_path, monkeypatch):
    """What is done is not done again, and the files are those of a run that was not stopped."""
    from mmmilan.files import Journal

    checkpoint = checkpoints['segmentation']
    expected = contents(mmmilan.predict(photos, checkpoint, tmp_path / 'whole', batch_size=1).parent)
    append = Journal.append

    def stop(journal, entries):
        append(journal, entries)
        if journal.done == 3:
            journal._write(b'[4, {"no')  # cut off
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, 'append', stop)
    with pytest.raises(KeyboardInterrupt):
        mmmilan.predict(photos, checkpoint, tmp_path / 'out', batch_size=1)
    monkeypatch.undo()
    with pytest.raises(InputError, match='is of a run that was stopped, on other images'):
        mmmilan.predict(photos, checkpoints['classification'], tmp_path / 'out')
    with pytest.raises(InputError, match='is of a run that was stopped, on other images'):
        mmmilan.predict(photos / 'a', checkpoint, tmp_path / 'out')
    seen = []
    predict = mmmilan.Predictor.predict
    monkeypatch.setattr(
        mmmilan.Predictor, 'predict', lambda self, samples: seen.extend(samples) or predict(self, samples)
    )
    mmmilan.predict(photos, checkpoint, tmp_path / 'out', batch_size=1)
    assert len(seen) == 2 and contents(tmp_path / 'out') == expected
    with pytest.raises(InputError, match=r'classes.txt exists; choose another name, or add --overwrite'):
        mmmilan.predict(photos, checkpoint, tmp_path / 'out')
    mmmilan.predict(photos, checkpoint, tmp_path / 'out', overwrite=True, draw=False)


@pytest.mark.slow
def test_processes_share_the_images(photos, checkpoints, tmp_path):
    """Two processes write what one does, also where a stopped run left a single image."""

    def run(out: Path, rank: bool = True) -> None:
        if rank:
            os.environ['TORCHELASTIC_RUN_ID'] = 'a'  # as torchrun does
        for task in ('classification', 'segmentation'):
            mmmilan.predict(photos, checkpoints[task], out / task, batch_size=2, num_workers=0)
        mmmilan.embed(photos, checkpoints['classification'], out / 'features.npz', batch_size=1, num_workers=0)

    run(tmp_path / 'one', False)
    expected = contents(tmp_path / 'one')
    assert exit_codes(start_ranks(run, tmp_path / 'two')) == [0, 0]
    found = contents(tmp_path / 'two')
    assert found.keys() == expected.keys() and len(found) == 20
    differing = [name for name, content in found.items() if content != expected[name]]
    for name in differing:  # batches differ, and so do rounding errors
        assert name in ('features.npz', 'classification/predictions.csv')
    one, two = (np.load(tmp_path / name / 'features.npz') for name in ('one', 'two'))
    assert np.array_equal(one['paths'], two['paths']) and np.array_equal(one['ok'], two['ok'])
    assert np.allclose(one['class_token'], two['class_token'], atol=1e-5, equal_nan=True)


def test_many_pictures_have_several_pages(photos, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr('mmmilan.api.predict_files.ON_A_PAGE', 2)
    cli.main(['predict', str(photos), str(checkpoints['classification']), str(tmp_path / 'out')])
    pages = [(tmp_path / 'out' / name).read_text() for name in ('index.html', 'index-2.html', 'index-3.html')]
    assert [page.count('<img') for page in pages] == [2, 2, 1]
    assert 'href="index-2.html"' in pages[0] and 'href="index.html"' in pages[1] and 'href="index-3.html"' in pages[1]
    cli.main(['predict', str(photos), str(checkpoints['classification']), str(tmp_path / 'plain'), '--no-draw'])
    assert [path.name for path in (tmp_path / 'plain').iterdir()] == ['predictions.csv']


def test_overwrite_leaves_nothing_of_an_earlier_run(photos, checkpoints, tmp_path, monkeypatch):
    """The folder is as if it were new, but for files of other names."""
    monkeypatch.setattr('mmmilan.api.predict_files.ON_A_PAGE', 2)
    out, checkpoint = tmp_path / 'out', checkpoints['classification']
    mmmilan.predict(photos, checkpoints['segmentation'], out)
    others = {'notes.txt', 'index-new.html', 'drawn/a/notes.txt', 'maps.png'}
    for name in others:
        (out / name).write_text('mine')
    mmmilan.predict(photos / 'c.jpg', checkpoint, out, overwrite=True)
    mmmilan.predict(photos / 'c.jpg', checkpoint, tmp_path / 'new')
    found = contents(out)
    assert {name for name in others if found.pop(name) == b'mine'} == others
    assert found.keys() == contents(tmp_path / 'new').keys() and not (out / 'maps').exists()


def test_refused_outputs(photos, checkpoints, tmp_path):
    """A picture never replaces an image that is read."""
    checkpoint = checkpoints['classification']
    (tmp_path / 'out/drawn').mkdir(parents=True)
    image = tmp_path / 'out/drawn/c.jpg'
    image.write_bytes((photos / 'c.jpg').read_bytes())
    for images, out, message in (
        (photos, photos / 'out', 'whose images are read'),
        (image, tmp_path / 'out', 'is read, and lies in .*drawn, where pictures are written'),
        (image.parent, tmp_path / 'out', 'drawn'),
        (photos, tmp_path / 'out', r'out/drawn exists; choose another folder, or add --overwrite'),
        (photos, image, 'Not a directory'),
        (photos / 'none', tmp_path / 'new', 'none does not exist'),
        (photos / 'b/x.jpg', tmp_path / 'new', 'Of 1 image none can be used'),
    ):
        with pytest.raises(InputError, match=message):
            mmmilan.predict(images, checkpoint, out)
    assert not (tmp_path / 'new').exists() and image.read_bytes() == (photos / 'c.jpg').read_bytes()


def test_refused_checkpoints(photos, checkpoints, tmp_path, monkeypatch):
    cfg = demo_config('classification')
    cfg.model.head = None
    with pytest.raises(InputError, match='has no head that predicts classes; give one that was trained on labels'):
        mmmilan.predict(photos, save_trained(cfg, tmp_path / 'encoder.pth', ()), tmp_path / 'new')
    content = torch.load(checkpoints['classification'], weights_only=False)
    content['meta']['dataset_meta']['classes'] = ('one', 'two')
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(InputError, match='names 2 classes, but its head has 10'):
        mmmilan.Predictor(tmp_path / 'a.pth')
    monkeypatch.setattr('mmmilan.building.find_spec', lambda name: None)
    for task in ('detection', 'segmentation'):
        with pytest.raises(InputError, match='Detection and segmentation need mmcv with its operators'):
            mmmilan.predict(photos, checkpoints[task], tmp_path / 'new')
    mmmilan.Predictor(checkpoints['classification'])


def test_names_of_what_is_written(tmp_path):
    """Every image has a name of its own, which stays in the folder."""
    for name in ('p/a.jpg', 'p/a.png', 'p/b/c.jpg', 'q/a.jpg', 'one.jpg', 'x/one.jpg'):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'')
    with tarfile.open(tmp_path / 'p/s.tar', 'w') as tar:
        tar.add(tmp_path / 'one.jpg', '../../up.jpg')
    assert [item.name for item in Items(tmp_path / 'p')] == ['a.jpg', 'a.png', 'b/c', 's.tar/up']
    several = [tmp_path / name for name in ('p', 'q', 'one.jpg', 'x/one.jpg', 'p/s.tar')]
    names = [item.name for item in Items(several)]
    assert names == ['p/a.jpg', 'p/a.png', 'p/b/c', 'p/s.tar/up', 'q/a', 'one.jpg', 'one.jpg-2', 's.tar/up']
    assert [item.name for item in Items(tmp_path / 'p/s.tar')] == ['up']


@pytest.mark.parametrize('name', ['x' * 251, '猫' * 83 + '-'], ids=['ascii', 'cats'])
def test_long_names_of_what_is_written(tmp_path, name):
    for image in (f'{name}.jpg', f'{name}.png', f'{name[:-1]}y.jpg'):
        (tmp_path / image).touch()
    with tarfile.open(tmp_path / 's.tar', 'w') as tar:
        tar.add(tmp_path / f'{name}.jpg', f'{name * 2}/{name * 2}.jpg')
    names = [item.name for item in Items(tmp_path)]
    assert len(set(names)) == 4 and sum(each.startswith('s.tar/') for each in names) == 1
    for each in names:
        write_part(tmp_path / 'out' / f'{each}.jpg', b'')


def test_many_names_take_little_memory(monkeypatch):
    """What is kept for an image is a byte beside its path."""
    number = 5_000
    paths = Names(f'/photos/2024-01/holiday/IMG_{i:08d}.jpg' for i in range(number))
    monkeypatch.setattr('mmmilan.api.predict_files.images_in', lambda source: paths)
    Items('/photos')  # imports
    tracemalloc.start()
    try:
        items = Items('/photos')
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 2 * number and peak < 100 * number
    assert len(items) == number and items[7] == (paths[7], '2024-01/holiday/IMG_00000007')
