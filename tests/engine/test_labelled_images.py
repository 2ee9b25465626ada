"""``mmmilan test --data``: a checkpoint on a folder of labelled images, matched by the names of the classes."""

from __future__ import annotations

import json
import pickle
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from helpers import load_trusted, read_metrics, rest_slow, save_untrained
from mmmilan.datasets.classes import read_class_names
from mmmilan.engine.labelled_images import use_dataset
from mmmilan.engine.launch import test as run_test
from mmmilan.errors import InputError

TASKS = ('classification', 'detection', 'segmentation')


@pytest.mark.parametrize('task', rest_slow(TASKS, 'classification'))
def test_the_same_images(task, scenes, tmp_path):
    """A folder gives what the config's own data set of its images gives."""
    weights = save_untrained(task, scenes, tmp_path)
    run_test(weights, work_dir=tmp_path / 'own')
    data = scenes / 'val' if task == 'classification' else scenes
    run_test(weights, data=data, work_dir=tmp_path / 'other', show_dir=tmp_path / 'pictures')
    own, other = (read_metrics(tmp_path / name) for name in ('own', 'other'))
    times = ('time', 'data_time')
    assert {name: own[name] for name in own if name not in times} == {
        name: other[name] for name in other if name not in times
    }
    drawn = sorted(path.relative_to(tmp_path / 'pictures') for path in (tmp_path / 'pictures').rglob('*.jpg'))
    assert drawn == sorted(path.relative_to(scenes / 'val') for path in (scenes / 'val').rglob('*.jpg'))


def test_a_single_class(scenes, tmp_path, caplog):
    """Its images keep the number that the class has in the model."""
    weights = save_untrained('classification', scenes, tmp_path)
    names = sorted(path.name for path in (scenes / 'val').iterdir() if path.is_dir())
    shutil.copytree(scenes / 'val' / names[-1], tmp_path / 'other' / names[-1])
    run_test(weights, data=tmp_path / 'other', out=tmp_path / 'found.pkl')
    labels = [sample['gt_label'].tolist() for sample in pickle.loads((tmp_path / 'found.pkl').read_bytes())]
    assert labels == [[len(names) - 1]] * len(list((tmp_path / 'other').rglob('*.jpg')))
    (tmp_path / 'other' / 'unknown').mkdir()
    shutil.copy(next((tmp_path / 'other').rglob('*.jpg')), tmp_path / 'other/unknown/a.jpg')
    message = rf'^{tmp_path}/other has 1 of its 2 classes, unknown \(1 samples\), where .*classification.pth has'
    with pytest.raises(InputError, match=message):
        run_test(weights, data=tmp_path / 'other')
    run_test(weights, data=tmp_path / 'other', ignore='unknown')


def test_a_checkpoint_without_names(scenes, tmp_path, capfd):
    """Its classes are those of its config; if that has none, the labels are taken as they are, and a line says so."""
    weights = save_untrained('classification', scenes, tmp_path)
    content = load_trusted(weights)
    classes = list(content['meta'].pop('dataset_meta')['classes'])
    shutil.copytree(scenes / 'val' / classes[-1], tmp_path / 'other' / classes[-1])
    torch.save(content, weights)
    run_test(weights, data=scenes / 'val')
    assert 'names no classes: the first label of the data is taken' in capfd.readouterr().out
    config = Config.fromstring(content['meta']['cfg'], '.py')
    config.test_dataloader.dataset.metainfo = dict(classes=classes)
    torch.save(content | dict(meta=dict(cfg=config.pretty_text)), weights)
    run_test(weights, data=tmp_path / 'other', out=tmp_path / 'found.pkl')
    labels = {sample['gt_label'].item() for sample in pickle.loads((tmp_path / 'found.pkl').read_bytes())}
    assert labels == {len(classes) - 1} and 'names no classes' not in capfd.readouterr().out


def test_wrappers_evaluators_and_views():
    """Whatever the config has around data set, metrics and steps."""
    load, other = dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', reduce_zero_label=True)
    views = dict(type='TestTimeAug', transforms=[[dict(type='Resize')], [other], [dict(type='PackSegInputs')]])
    inner = dict(type='BaseSegDataset', pipeline=[load, other])
    config = Config(
        dict(
            test_dataloader=dict(dataset=dict(type='ConcatDataset', datasets=[inner])),
            test_evaluator=[dict(type='CocoMetric', ann_file='old.json'), dict(type='IoUMetric')],
            tta_pipeline=[load, views],
        )
    )
    use_dataset(config, dict(type='Own', ann_file='new.json', metainfo=dict(classes=['a', 'b'])), 'segmentation')
    own = dict(type='mmmilan.LoadLabelMap', num_classes=2)
    assert config.test_dataloader.dataset.pipeline == [load, own] and config.test_dataloader.dataset.type == 'Own'
    assert config.tta_pipeline[1].transforms == [[dict(type='Resize')], [own], [dict(type='PackSegInputs')]]
    assert config.test_evaluator[0].ann_file == 'new.json'


@pytest.mark.slow
def test_objects_numbered_otherwise(scenes, tmp_path):
    """Categories in another order, with gaps and without some of the model's."""
    weights, other = save_untrained('detection', scenes, tmp_path), tmp_path / 'other'
    content = json.loads((scenes / 'annotations/instances_val.json').read_text())
    names = {each['id']: each['name'] for each in content['categories']}
    dropped = content['annotations'][0]['category_id']
    content['annotations'] = [each for each in content['annotations'] if each['category_id'] != dropped]
    expected = {image['file_name']: [] for image in content['images']}
    files = {image['id']: image['file_name'] for image in content['images']}
    for each in content['annotations']:
        expected[files[each['image_id']]].append(names[each['category_id']])
        each['category_id'] = 1000 - 7 * each['category_id']
    content['categories'] = [dict(id=1000 - 7 * i, name=name) for i, name in names.items() if i != dropped][::-1]
    shutil.copytree(scenes / 'val', other / 'val')
    (other / 'val' / '_annotations.coco.json').write_text(json.dumps(content))
    run_test(weights, data=other, out=tmp_path / 'found.pkl')
    for sample in pickle.loads((tmp_path / 'found.pkl').read_bytes()):
        found = [list(names.values())[label] for label in sample['gt_instances']['labels'].tolist()]
        assert sorted(found) == sorted(next(own for file, own in expected.items() if sample['img_path'].endswith(file)))


@pytest.mark.slow
def test_maps_of_other_values(scenes, tmp_path):
    """Values in another order, whose names are those of the model."""
    weights, other = save_untrained('segmentation', scenes, tmp_path), tmp_path / 'other'
    names = read_class_names(scenes / 'semantic/classes.json')
    shutil.copytree(scenes / 'val', other / 'images')
    for path in sorted((scenes / 'semantic/val').rglob('*.png')):
        labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        target = other / 'masks' / path.relative_to(scenes / 'semantic/val')
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), (len(names) - 1 - labels).astype(np.uint8))
    with pytest.raises(InputError, match='nothing names them; write classes.txt'):
        run_test(weights, data=other)
    run_test(weights, data=other, classes=names[::-1], out=tmp_path / 'found.pkl')
    for sample in pickle.loads((tmp_path / 'found.pkl').read_bytes()):
        place = sample['img_path'].partition('images/')[2].replace('.jpg', '.png')
        own = cv2.imread(str(scenes / 'semantic/val' / place), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(sample['gt_sem_seg']['data'][0].numpy(), own)


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(classes='a.txt'), 'classes and ignore are about the images of data; give --data, or leave them out'),
        (dict(ignore='a'), 'classes and ignore are about the images of data'),
        (dict(data='nowhere'), 'nowhere does not exist; give a folder of labelled images'),
    ],
)
def test_refusals(options, message, scenes, tmp_path):
    with pytest.raises(InputError, match=message):
        run_test(save_untrained('classification', scenes, tmp_path), **options)


def test_of_a_pretraining(tiny_config, image_folder, tmp_path):
    with pytest.raises(InputError, match='MILAN predicts no classes, so data cannot be given; leave out --data'):
        run_test(tiny_config(), tmp_path / 'any.pth', data=image_folder)
