"""A teacher runs once for each crop; training is that on its rounded output, resumed too, in one process or several."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, FUNCTIONS, MODELS
from mmengine.runner import Runner
from PIL import Image
from torch._dynamo.testing import CompileCounter

from helpers import assert_identical, load_trusted, read_scalars, relative_error
from mmmilan.datasets import Draw
from mmmilan.engine.compilation import compile_model
from mmmilan.engine.teacher_cache import TeacherCacheHook, manifest_of, recall_or_run, remove_left
from mmmilan.engine.throughput import counted_flops
from mmmilan.errors import InputError
from mmmilan.models.targets import Target
from mmmilan.teachers.cache import TeacherCache, make_cache
from processes import run_script_on_ranks

CACHE = {
    'train_dataloader.num_workers': 0,
    'train_dataloader.sampler.crops': 1,
    'default_hooks.teacher_cache': dict(type='mmmilan.TeacherCacheHook'),
}


@pytest.fixture
def teacher_calls(monkeypatch) -> list[int]:
    """The number of images in each call of the teacher."""
    calls, call_teacher = [], Target.call_teacher
    monkeypatch.setattr(
        Target, 'call_teacher', lambda self, images: calls.append(len(images)) or call_teacher(self, images)
    )
    return calls


def weights(folder: Path, epoch: int = 2) -> dict:
    return load_trusted(folder / f'epoch_{epoch}.pth')


def losses(folder: Path) -> list[float]:
    return [line['loss'] for line in read_scalars(folder) if 'loss' in line]


def test_training_runs_the_teacher_once_for_each_crop(tiny_config, run_tool, tmp_path, teacher_calls):
    run_tool('train.py', tiny_config(CACHE), '--work-dir', tmp_path / 'cached')
    assert teacher_calls == [4] * 6  # of two epochs of six steps
    assert not (tmp_path / 'cached/teacher_cache').exists()
    options = {key: value for key, value in CACHE.items() if key.startswith('train_dataloader')}
    run_tool('train.py', tiny_config(options), '--work-dir', tmp_path / 'plain')
    assert teacher_calls == [4] * 18
    cached, plain = losses(tmp_path / 'cached'), losses(tmp_path / 'plain')
    assert cached != plain and cached == pytest.approx(plain, rel=2e-3) and len(plain) == 12


def test_without_crops_nothing_is_kept(tiny_config, run_tool, tmp_path, teacher_calls, capsys):
    config = tiny_config(CACHE | {'train_dataloader.sampler.crops': None})
    run_tool('train.py', config, '--work-dir', tmp_path / 'new')
    assert teacher_calls == [4] * 12
    assert 'No crop comes again (train_dataloader.sampler.crops): the teacher runs at' in capsys.readouterr().out
    run_tool('train.py', tiny_config(CACHE | {'train_dataloader.sampler.crops': 2}))
    assert teacher_calls == [4] * 24 and 'No crop comes again' in capsys.readouterr().out
    assert not (tmp_path / 'work/teacher_cache').exists()
    hook = {'default_hooks.teacher_cache': None, 'default_hooks.prefetch': None}
    run_tool('train.py', tiny_config(CACHE | hook), '--work-dir', tmp_path / 'none')
    assert teacher_calls == [4] * 36


def test_a_cache_that_stays(tiny_config, run_tool, tmp_path, teacher_calls):
    """Filled by the tool, by a training, or in it: the weights are the same."""
    run_tool('train.py', tiny_config(CACHE), '--work-dir', tmp_path / 'own')
    kept = tiny_config(CACHE | {'default_hooks.teacher_cache.cache': str(tmp_path / 'cache')})
    teacher_calls.clear()
    for name in ('first', 'second'):
        run_tool('train.py', kept, '--work-dir', tmp_path / name)
        assert_identical(weights(tmp_path / name), weights(tmp_path / 'own'))
    assert teacher_calls == [4] * 6
    run_tool('cache_targets.py', kept, tmp_path / 'tool', '--epochs', 1)
    teacher_calls.clear()
    run_tool('train.py', tiny_config(CACHE | {'default_hooks.teacher_cache.cache': str(tmp_path / 'tool')}))
    assert teacher_calls == []


def test_masks_of_the_data_pipeline(tiny_config, run_tool, tmp_path, teacher_calls):
    """As in the config milan-cached: the importance maps of a complete cache go to the data workers."""
    config, folder = tiny_config(CACHE | {'train_dataloader.num_workers': 2}), str(tmp_path / 'cache')
    run_tool('cache_targets.py', config, folder, '--epochs', 1)
    pipeline = Config.fromfile(config).train_dataloader.dataset.to_dict()['pipeline']
    pipeline[1:1] = [dict(type='mmmilan.LoadImportance', cache=folder), dict(type='mmmilan.SemanticAwareMasking')]
    teacher_calls.clear()
    changes = {'train_dataloader.dataset.pipeline': pipeline, 'default_hooks.teacher_cache.cache': folder}
    run_tool('train.py', tiny_config(CACHE | {'train_dataloader.num_workers': 2} | changes))
    assert teacher_calls == [] and len(losses(tmp_path / 'work')) == 12


@pytest.mark.parametrize('lost', [False, True])
def test_resumed_within_an_epoch(lost, tiny_config, run_tool, tmp_path, teacher_calls):
    """With what the first part left, and without it."""
    run_tool('train.py', tiny_config(CACHE), '--work-dir', tmp_path / 'whole')
    folder = tmp_path / 'resumed'
    options = {'default_hooks.checkpoint': dict(by_epoch=False, interval=4)}
    options['default_hooks.teacher_cache.cache'] = str(folder / 'teacher_cache')  # where a stopped run leaves it
    run_tool('train.py', tiny_config(CACHE | options), '--work-dir', folder)
    for path in (folder / 'iter_8.pth', folder / 'iter_12.pth', folder / 'last_checkpoint'):
        path.unlink()
    if lost:
        shutil.rmtree(folder / 'teacher_cache')
    teacher_calls.clear()
    run_tool('train.py', tiny_config(CACHE), '--work-dir', folder, '--resume')
    assert not (folder / 'teacher_cache').exists()
    if lost:  # images are in other batches, and so rounded otherwise here and there
        assert losses(folder)[-6:] == pytest.approx(losses(tmp_path / 'whole')[-6:], rel=1e-3)
        assert sum(teacher_calls) == 2 * 4 + 4 * 4
    else:
        assert_identical(weights(folder), weights(tmp_path / 'whole'))
        assert teacher_calls == []


def test_a_run_that_begins_anew_does_not_trust_what_lies_there(tiny_config, run_tool, tmp_path, teacher_calls):
    """In the run's own folder."""
    run_tool('train.py', tiny_config(CACHE), '--work-dir', tmp_path / 'whole')
    folder = tmp_path / 'work/teacher_cache'
    run_tool('cache_targets.py', tiny_config(CACHE), folder, '--epochs', 1)
    teacher_calls.clear()
    run_tool('train.py', tiny_config(CACHE))
    assert teacher_calls == [4] * 6
    assert_identical(weights(tmp_path / 'work'), weights(tmp_path / 'whole'))


@pytest.mark.parametrize('change', ['images', 'seed', 'damaged'])
def test_a_resumed_run_trusts_no_other_cache(change, tiny_config, image_folder, run_tool, tmp_path, teacher_calls):
    """It makes its own anew."""
    folder, changes = tmp_path / 'work', {}
    run_tool('train.py', tiny_config(CACHE | {'default_hooks.teacher_cache.cache': str(folder / 'teacher_cache')}))
    (folder / 'epoch_2.pth').unlink()
    if change == 'images':
        shutil.copytree(image_folder, tmp_path / 'images')
        next((tmp_path / 'images').rglob('*.jpg')).rename(tmp_path / 'images/other.jpg')
        changes = {'train_dataloader.dataset.data_root': str(tmp_path / 'images')}
    elif change == 'seed':
        changes = {'randomness.seed': 3}
    else:
        (folder / 'teacher_cache/manifest.json').write_text('{')
    teacher_calls.clear()
    run_tool('train.py', tiny_config(CACHE | changes), '--resume')
    assert teacher_calls == [4] * 6 and (folder / 'epoch_2.pth').exists()
    assert not (folder / 'teacher_cache').exists()


@pytest.mark.slow
def test_several_processes_share_a_cache(tiny_config, tmp_path, run_tool):
    options = CACHE | {'train_dataloader.batch_size': 2}
    run_script_on_ranks('train.py', 2, tiny_config(options), '--work-dir', tmp_path / 'own')
    assert not (tmp_path / 'own/teacher_cache').exists()
    options['default_hooks.teacher_cache.cache'] = str(tmp_path / 'cache')
    for name in ('first', 'second'):
        run_script_on_ranks('train.py', 2, tiny_config(options), '--work-dir', tmp_path / name)
        cache = TeacherCache(tmp_path / 'cache')
        assert (cache.load(0, range(24))['checksum'] > 0).all()
        assert_identical(weights(tmp_path / name), weights(tmp_path / 'own'))


def opened(config: Path, folder: Path, crops: int = 1) -> tuple:
    """A model, its images, and a cache that is new or there."""
    cfg = Config.fromfile(config)
    model, dataset = MODELS.build(cfg.model).train(), DATASETS.build(cfg.train_dataloader.dataset)
    model.init_weights()
    make_cache(folder, manifest_of(cfg, model, dataset, 0))
    return model, dataset, TeacherCache(folder)


def batch(dataset: object, images: range, crop: int = 0) -> dict:
    return FUNCTIONS.get('default_collate')([dataset[Draw(0, crop, i)] for i in images])


def test_images_that_stand_in_for_others_are_not_kept(tiny_config, image_folder, tmp_path, teacher_calls):
    folder = tmp_path / 'images'
    shutil.copytree(image_folder, folder)
    (damaged := sorted(folder.rglob('*.jpg'))[1]).write_bytes(damaged.read_bytes()[:100])
    config = tiny_config(CACHE | {'train_dataloader.dataset.data_root': str(folder)})
    model, dataset, cache = opened(config, tmp_path / 'cache')
    data = batch(dataset, range(4))
    first, _ = recall_or_run(cache, model, 0, data)
    assert (cache.load(0, range(6))['checksum'] > 0).tolist() == [True, False, True, True, False, False]
    again, _ = recall_or_run(cache, model, 0, data)
    assert relative_error(again, first) < 1e-3 and teacher_calls == [4, 1]
    assert torch.equal(again[[0, 2, 3]], first[[0, 2, 3]])


def test_an_image_that_changed(tiny_config, image_folder, tmp_path, log):
    """Its old record is not used."""
    folder = tmp_path / 'images'
    shutil.copytree(image_folder, folder)
    config = tiny_config(CACHE | {'train_dataloader.dataset.data_root': str(folder)})
    model, dataset, cache = opened(config, tmp_path / 'cache')
    recall_or_run(cache, model, 0, batch(dataset, range(4)))
    Image.new('RGB', (80, 80), (200, 30, 30)).save(sorted(folder.rglob('*.jpg'))[1])
    model, dataset, cache = opened(config, tmp_path / 'cache')
    data = batch(dataset, range(4))
    features, _ = recall_or_run(cache, model, 0, data)
    assert 'Crop 0 of image 1 has other pixels than in' in log.text
    expected, _ = model.head.run_teacher(model.data_preprocessor(data)['inputs'])
    assert relative_error(features, expected) < 0.01


def test_the_compiled_loss_takes_each_batch_from_the_cache(tiny_config, tmp_path):
    """It is compiled once, and the targets are those of the batch at hand."""
    model, dataset, cache = opened(tiny_config(CACHE), tmp_path / 'cache')
    graphs, data = CompileCounter(), [batch(dataset, range(4), crop) for crop in (0, 1, 0)]

    def losses() -> list[float]:
        values = []
        for crop, each in zip((0, 1, 0), data, strict=True):
            model.head.recalled = recall_or_run(cache, model, crop, each)
            torch.manual_seed(1)
            values.append(model.loss(**model.data_preprocessor(each, True))['loss'].item())
        return values

    expected = losses()
    assert expected[0] == expected[2] != expected[1]
    compile_model(model, backend=graphs)
    assert losses() == pytest.approx(expected, rel=1e-6) and graphs.frame_count == 1


def test_operations_are_counted_without_the_teacher(tiny_config, tmp_path):
    """As the log counts them: on the first images of a batch."""
    model, dataset, cache = opened(tiny_config(CACHE), tmp_path / 'cache')
    data = batch(dataset, range(6))
    counts = []
    for recalled in (None, recall_or_run(cache, model, 0, data)):
        model.head.recalled = recalled
        part = {key: value[:4] for key, value in data.items()}
        with counted_flops() as counter:
            model.loss(**model.data_preprocessor(part, True))
        counts.append(counter.get_total_flops())
    with counted_flops() as counter:
        model.head.call_teacher(torch.randn(4, 3, 64, 64))
    assert counts[0] - counts[1] == counter.get_total_flops() > 0


# -- what cannot be kept


def refusal(config: Path) -> str:
    cfg = Config.fromfile(config)
    with pytest.raises(InputError) as error:
        Runner.from_cfg(cfg).train()
    return str(error.value)


def test_what_cannot_be_kept_is_refused(tiny_config, tmp_path, monkeypatch):
    pixels = {'model.head': dict(_delete_=True, type='mmmilan.PixelTarget'), 'model.neck.predict_feature_dim': 768}
    pixels['model.masking.type'] = 'mmmilan.RandomMasking'
    message = refusal(tiny_config(CACHE | pixels))
    assert 'Only the features of a single teacher can be kept; take CLIPTarget or LayerAlignment' in message
    dataset = Config.fromfile(tiny_config()).train_dataloader.dataset.to_dict()
    repeated = dict(_delete_=True, type='RepeatDataset', times=2, dataset=dataset)
    message = refusal(tiny_config(CACHE | {'train_dataloader.dataset': repeated}))
    assert 'knows the images of an ImageFolder or ImageSources, not of a RepeatDataset' in message
    loop = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=3)
    assert 'Crops come again by epochs; train by epochs' in refusal(tiny_config(CACHE | {'train_cfg': loop}))
    monkeypatch.setattr('shutil.disk_usage', lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    message = refusal(tiny_config(CACHE))
    assert "The teacher's output takes 0.0 GB more in" in message and 'sampler.crops=None' in message


def test_teachers_are_told_apart_by_their_weights(tiny_config, tmp_path):
    cfg = Config.fromfile(tiny_config(CACHE))
    model, dataset, _ = opened(tiny_config(CACHE), tmp_path / 'cache')
    shutil.copy(cfg.model.head.teacher.pretrained, tmp_path / 'moved.pt')
    opened(tiny_config(CACHE | {'model.head.teacher.pretrained': str(tmp_path / 'moved.pt')}), tmp_path / 'cache')
    half = copy.deepcopy(model)
    half.head.teacher.half()
    make_cache(tmp_path / 'cache', manifest_of(cfg, half, dataset, 0))
    next(model.head.teacher.parameters()).data[0] += 0.01
    with pytest.raises(InputError, match='holds a cache of another weights; choose another folder'):
        make_cache(tmp_path / 'cache', manifest_of(cfg, model, dataset, 0))


def test_other_pixels_than_those_of_a_record(tiny_config, tmp_path, log):
    """A pipeline that does not give the same crop again: the targets are of what it gives, and the log says so."""
    model, dataset, cache = opened(tiny_config(CACHE), tmp_path / 'cache')
    for crop in (0, 1, 2):
        data = batch(dataset, range(4), crop)
        features, _ = recall_or_run(cache, model, 0, data)  # of a sampler that says otherwise
        expected, _ = model.head.run_teacher(model.data_preprocessor(data)['inputs'])
        assert relative_error(features, expected) < 0.01
    assert log.text.count('has other pixels than in') == 1
    assert 'the image has changed, or the pipeline does not give the same crops again' in log.text


def test_a_cache_that_may_only_be_read(tiny_config, tmp_path, teacher_calls, monkeypatch):
    model, dataset, cache = opened(tiny_config(CACHE), tmp_path / 'cache')
    recall_or_run(cache, model, 0, batch(dataset, range(4)))
    monkeypatch.setattr('os.access', lambda path, mode: False)
    cache = TeacherCache(tmp_path / 'cache')
    for _ in range(2):
        recall_or_run(cache, model, 0, batch(dataset, range(2, 6)))
    assert teacher_calls == [4, 2, 2] and not cache.load(0, [5])['checksum'][0]


@pytest.mark.parametrize('lack', ['bytes', 'numbers'])
def test_images_that_cannot_be_kept(lack, tiny_config, tmp_path):
    model, dataset, cache = opened(tiny_config(CACHE), tmp_path / 'cache')
    data = batch(dataset, range(4))
    if lack == 'bytes':
        data['inputs'] = data['inputs'].float()
    else:
        del data['data_samples'][1].sample_idx
    with pytest.raises(InputError, match='needs images in bytes and their sample_idx; leave normalisation to the data'):
        recall_or_run(cache, model, 0, data)


@pytest.mark.parametrize('hooks, stays', [([], False), (['elsewhere'], False), (['run/teacher_cache'], True)])
def test_what_a_stopped_run_left_is_removed_by_one_that_makes_no_use_of_it(tmp_path, monkeypatch, hooks, stays):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / 'run/teacher_cache'
    make_cache(folder, dict(version=3, images=1, num_patches=4, feature_dim=8))
    hooks = [TeacherCacheHook(each) for each in hooks]
    remove_left(SimpleNamespace(work_dir=tmp_path / 'run', hooks=hooks, logger=Mock()))
    assert folder.exists() == stays
