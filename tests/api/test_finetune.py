"""Classifiers, detectors and segmentors of one's own classes, in one line."""

from __future__ import annotations

import errno
import html
import json
import os
import re
import shlex
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import cv2
import numpy as np
import pytest
import torch
from mmpretrain.apis import ImageClassificationInferencer
from mmpretrain.models import VisionTransformer

import mmmilan
from helpers import HERE, assert_identical, assert_same_weights, load_trusted, read_metrics, read_scalars, real_data
from mmmilan import cli
from mmmilan.api.finetune_encoder import encoder_in
from mmmilan.api.finetune_recipe import compared_config, new_config
from mmmilan.api.finetune_run import say_probes
from mmmilan.checkpoints.config import own_config
from mmmilan.engine.loops import EpochLoop
from mmmilan.errors import InputError
from mmmilan.files import ENDING
from mmmilan.models import MILANViT
from mmmilan.registry import roots
from processes import exit_codes, free_port, start_ranks

ARCH = dict(embed_dims=64, num_layers=2, num_heads=1, feedforward_channels=96)
AT_ONCE = {'default_hooks.checkpoint.asynchronous': False}  # so that a test knows which checkpoint is there


@pytest.fixture(scope='module')
def colours(tmp_path_factory) -> Path:
    """Eight images of each of three colours, whose names are not in the order of an alphabet of bytes."""
    root, rng = tmp_path_factory.mktemp('data') / 'colours', np.random.default_rng(0)
    for channel, name in enumerate(('Blau', 'grün', 'ro t')):
        (root / name).mkdir(parents=True)
        for i in range(8):
            image = rng.integers(0, 80, (40, 48, 3), dtype=np.uint8)
            image[..., channel] += 120
            (root / name / f'{i}.png').write_bytes(cv2.imencode('.png', image)[1].tobytes())
    return root


@pytest.fixture(scope='module')
def start(tmp_path_factory) -> str:
    """The weights of an encoder alone."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp('start') / 'encoder.pth'
    vit = VisionTransformer(ARCH, img_size=32, patch_size=8)
    torch.save({f'backbone.{key}': value for key, value in vit.state_dict().items()}, path)
    return str(path)


def test_size_of_a_start_without_config(tmp_path):
    """Of a rectangle too, whose positions are sines and cosines: 1 + 2 x 4 of them are no square."""
    for size in (32, (16, 32)):
        vit = MILANViT(ARCH, img_size=size, patch_size=8)
        vit.init_weights()
        torch.save(vit.state_dict(), tmp_path / 'encoder.pth')
        assert encoder_in(str(tmp_path / 'encoder.pth')).img_size == size


@pytest.mark.parametrize('to_rgb', [True, False])
def test_a_start_that_may_have_been_trained_on_bgr(start, tmp_path, log, to_rgb):
    scale = dict(mean=[103.53, 116.28, 123.675], std=[57.375, 57.12, 58.395], to_rgb=to_rgb)
    meta = dict(cfg=f'model = {dict(data_preprocessor=scale)}')
    torch.save(dict(state_dict=torch.load(start), meta=meta), tmp_path / 'bgr.pth')
    assert encoder_in(str(tmp_path / 'bgr.pth')).normalisation['mean'] == scale['mean']
    assert ('bgr.pth has no to_rgb: if it was trained on BGR images' in log.text) != to_rgb


def options_of(epochs: int = 2, **others) -> dict:
    return dict(epochs=epochs, batch_size=4) | HERE | others


@pytest.mark.slow
def test_a_classifier_that_all_take(colours, start, tmp_path, run_tool):
    weights = mmmilan.finetune(colours, tmp_path / 'run', start=start, **options_of())
    assert weights == tmp_path / 'run/model.pth'
    config = own_config(weights)
    assert config.model.backbone.arch == ARCH and config.model.backbone.img_size == 32
    for model in (mmmilan.get_model(weights), str(weights)):
        inferencer = mmmilan.ImageClassificationInferencer if isinstance(model, str) else ImageClassificationInferencer
        for name in ('Blau', 'grün', 'ro t'):
            assert inferencer(model)(str(colours / name / '0.png'))[0]['pred_class'] == name
    assert mmmilan.get_model(weights)._dataset_meta['classes'] == ('Blau', 'grün', 'ro t')

    records = read_scalars(tmp_path / 'run')
    steps = [record for record in records if 'loss' in record]
    assert steps[0]['head_lr'] > 2 * steps[0]['lr'] > 0
    validated = [record['accuracy/top1'] for record in records if 'accuracy/top1' in record]
    assert len(validated) == 2
    run_tool('test.py', weights, weights, '--work-dir', tmp_path / 'test')
    assert read_metrics(tmp_path / 'test')['accuracy/top1'] == max(validated)
    assert mmmilan.export_onnx(weights, tmp_path / 'model.onnx').stat().st_size > 0
    names = sorted(
        path.name for path in (tmp_path / 'run').iterdir() if not path.name.startswith(('.', '20', 'report'))
    )
    assert names == ['config.py', 'epoch_2.pth', 'last_checkpoint', 'model.pth', 'probe.pth', 'split.json']
    with pytest.raises(InputError, match='holds a run already'):
        mmmilan.finetune(colours, tmp_path / 'run', start=start, **options_of())


@pytest.fixture(scope='module')
def whole(colours, start, tmp_path_factory) -> Path:
    """A run of three epochs that nothing interrupts, of four batches each, of which three make a step."""
    folder = tmp_path_factory.mktemp('whole')
    mmmilan.finetune(colours, folder, start=start, **options_of(3, patience=3, accumulate=3, **AT_ONCE))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('moment', ['epoch', 'validation'])
def test_killed_and_resumed(whole, colours, start, tmp_path, monkeypatch, moment):
    """To the bit, and with the same best model, also if the validation of the last checkpoint was not done."""
    options = options_of(3, patience=3, accumulate=3, **AT_ONCE)
    with monkeypatch.context() as patch:
        stop_in(patch, moment)
        with pytest.raises(ZeroDivisionError):
            mmmilan.finetune(colours, tmp_path / 'killed', start=start, **options)
    assert not (tmp_path / 'killed/model.pth').exists() and (tmp_path / 'killed/epoch_2.pth').exists()
    cli.main(['finetune', '--out', str(tmp_path / 'killed'), '--resume'])
    last, best = (
        [load_trusted(run / name) for run in (whole, tmp_path / 'killed')] for name in ('epoch_3.pth', 'model.pth')
    )
    assert_identical(*last)
    assert last[0]['meta']['iter'] == 3 * 3
    assert best[0]['meta']['epoch'] == best[1]['meta']['epoch'] and 'optimizer' not in best[1]
    assert_same_weights(*(each['state_dict'] for each in best))
    hubs = [each['message_hub']['runtime_info'] for each in last]
    assert hubs[0]['best_score'] == hubs[1]['best_score'] and hubs[0]['early_stopping'] == hubs[1]['early_stopping']


def stop_in(patch: pytest.MonkeyPatch, moment: str) -> None:
    """Let the third epoch, or the validation of the second, fail."""
    if moment == 'epoch':
        run = EpochLoop.run_epoch
        patch.setattr(EpochLoop, 'run_epoch', lambda loop: 1 / 0 if loop.epoch == 2 else run(loop))
    else:
        from mmengine.runner import ValLoop

        run = ValLoop.run
        patch.setattr(ValLoop, 'run', lambda loop: 1 / 0 if loop.runner.epoch == 2 else run(loop))


@pytest.fixture
def full_disk(monkeypatch):
    """Until the end of the context, the file of a name is not written, as the disk is full."""

    @contextmanager
    def full(name: str) -> Iterator[None]:
        def refuse(source: str, target: Path) -> None:
            if Path(target).name == name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr('mmmilan.files.os.replace', refuse)
            with pytest.raises(InputError, match=rf'{name} was not written \(.*No space left on device\); free space'):
                yield

    return full


@pytest.mark.slow
def test_stopped_at_many_places(colours, start, tmp_path, monkeypatch, full_disk, capfd):
    """Without space or killed, in the run and in the one that it is compared with: a bare --resume ends what began."""
    torch.manual_seed(2)
    other, run = tmp_path / 'other.pth', tmp_path / 'run'
    vit = VisionTransformer(ARCH, img_size=32, patch_size=8)
    torch.save({f'backbone.{key}': value for key, value in vit.state_dict().items()}, other)
    begun, options = [], dict(start=start, compare=str(other)) | options_of(2, **AT_ONCE)
    run_epoch = EpochLoop.run_epoch

    def epoch(loop: EpochLoop, killed: str = '') -> None:
        begun.append(f'{Path(loop.runner.work_dir).name} {loop.epoch + 1}')
        run_epoch(loop) if begun[-1] != killed else 1 / 0

    def resume(killed: str = '') -> None:
        begun.clear()
        monkeypatch.setattr(EpochLoop, 'run_epoch', lambda loop: epoch(loop, killed))
        mmmilan.finetune(out=run, resume=True)

    monkeypatch.setattr(EpochLoop, 'run_epoch', lambda loop: epoch(loop))
    for name in ('split.json', 'probe.pth'):
        with full_disk(name):
            mmmilan.finetune(colours, run, **options)
        assert not run.exists()
    with full_disk('epoch_1.pth'):
        mmmilan.finetune(colours, run, **options)
    with pytest.raises(InputError, match='has compare=.*other.pth.*, which a resumed run keeps; leave compare out'):
        mmmilan.finetune(out=run, resume=True, compare='scratch')
    with full_disk('model.pth'):
        resume()
    assert begun == ['run 1', 'run 2'] and capfd.readouterr().out.count('begins anew with its config') == 1
    with pytest.raises(ZeroDivisionError):
        resume(killed='compare 2')
    assert begun == ['compare 1', 'compare 2'] and (run / 'report.html').exists()
    with full_disk('comparison.json'):
        resume()
    assert begun == ['compare 2']
    resume()
    assert not begun and not list(run.rglob(f'.*{ENDING}'))
    sentence = json.loads((run / 'comparison.json').read_text())['sentence']
    assert sentence in (run / 'report.html').read_text() and capfd.readouterr().out.endswith(f'{sentence}\n')
    whole = mmmilan.finetune(colours, tmp_path / 'whole', start=str(other), **options_of(2, **AT_ONCE))
    assert_same_weights(*(load_trusted(path)['state_dict'] for path in (run / 'compare/model.pth', whole)))


@pytest.mark.slow
def test_what_a_resumed_run_may_be_given(colours, start, tmp_path):
    mmmilan.finetune(colours, tmp_path / 'run', start=start, **options_of(1))
    for change, message in (
        (dict(start='other.pth'), 'has start=.*leave start out'),
        (dict(batch_size=8), 'has batch_size=4, which a resumed run keeps'),
        (dict(lr=1.0), 'has lr='),
        (dict(data=str(colours / 'Blau')), 'has images of no class'),
    ):
        with pytest.raises(InputError, match=message):
            mmmilan.finetune(out=tmp_path / 'run', resume=True, **change)
    mmmilan.finetune(colours, tmp_path / 'run', start=start, resume=True, epochs=2, batch_size=4)
    config = own_config(tmp_path / 'run/model.pth')
    assert config.train_cfg.max_epochs == 2 and config.param_scheduler[1].end == 2
    assert load_trusted(tmp_path / 'run/epoch_2.pth')['meta']['iter'] == 2 * 4


def test_compared_with_random_weights(colours, start, tmp_path, capfd):
    options = ['--start', start, '--epochs', 1, '--batch-size', 4, '--compare', 'scratch']
    options += [word for key, value in HERE.items() for word in (f'--{key}', value)]
    line = ['finetune', *map(str, (colours, tmp_path / 'run', *options))]
    cli.main(line)
    printed = capfd.readouterr().out.strip().splitlines()
    result = json.loads((tmp_path / 'run/comparison.json').read_text())
    validated = len(json.loads((tmp_path / 'run/split.json').read_text())['val'])
    assert len(result['images']) == len(result['scores'][0]) == len(result['scores'][1]) == validated
    assert result['difference'] == pytest.approx(100 * np.subtract(*map(np.mean, result['scores'])))
    low, high = result['interval']
    assert low <= result['difference'] <= high
    assert validated < 20 and result['sentence'].startswith(
        'Pretraining cannot be judged by fewer than 20 images: top-1'
    )
    assert printed[-2].endswith(result['sentence']) and printed[-1] == str(tmp_path / 'run/model.pth')
    page = html.unescape((tmp_path / 'run/report.html').read_text())
    assert f'<code>{shlex.join(["mmmilan", *line])}' in page and result['sentence'] in page
    first, second = (own_config(tmp_path / 'run' / name) for name in ('model.pth', 'compare/model.pth'))
    assert first.model.backbone.pop('init_cfg').checkpoint == start and second.model.backbone.pop('init_cfg') is None
    assert first.model.head.pop('init_cfg').checkpoint == str(tmp_path / 'run/probe.pth')
    assert [each['type'] for each in second.model.head.pop('init_cfg')] == ['TruncNormal']
    decays = [each.optim_wrapper.paramwise_cfg.pop('layer_decay_rate') for each in (first, second)]
    assert decays == [0.65, 1.0]  # of random weights all blocks learn alike
    for config in (first, second):  # which token is read, too
        del config.model.backbone.out_type, config.model.backbone.final_norm
    keys = ('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'randomness')
    assert all(first[key] == second[key] for key in keys)


@pytest.mark.parametrize(
    ('best', 'freeze', 'remedy'),
    [
        ('linear probe', False, 'train the head alone with --freeze, or fine-tune'),
        ('linear probe', True, 'training on from it made it no better: lower lr'),
        ('k-NN', False, r'look up neighbours of features \(mmmilan embed\)'),
        ('k-NN', True, 'look up neighbours'),
        ('none', True, None),
    ],
)
def test_what_is_said_of_the_frozen_start(best, freeze, remedy, log):
    frozen = {'linear probe on the class token': 0.5, 'k-NN by the mean token': 0.5}
    frozen |= {name: 0.75 for name in frozen if name.startswith(best)}
    say_probes(frozen, {'a.png': 1.0, 'b.png': 0.0, 'c.png': 0.0, 'd.png': 1.0}, freeze)
    trained = 'The head trained alone' if freeze else 'Fine-tuning'
    assert f'{trained} gets 50.0 % of 4 validation images right' in log.text
    assert ('is the better model here' in log.text) == (remedy is not None)
    if remedy:
        assert re.search(f'The {best} .* is the better model here; {remedy}', log.text)
        assert ('--freeze' in log.text) == (best == 'linear probe' and not freeze)


def test_the_head_alone(colours, start, tmp_path):
    weights = mmmilan.finetune(colours, tmp_path / 'run', start=start, freeze=True, **options_of(1))
    before, after = (torch.load(path, weights_only=False) for path in (start, weights))
    trained = {
        key for key, value in after['state_dict'].items() if key in before and not torch.equal(value, before[key])
    }
    assert not trained and after['state_dict']['head.fc.weight'].shape == (3, 64)
    with pytest.raises(InputError, match='freeze trains the head of random weights'):
        mmmilan.finetune(colours, tmp_path / 'other', arch=ARCH, freeze=True)
    with pytest.raises(InputError, match='would train a head on frozen random weights'):
        mmmilan.finetune(colours, tmp_path / 'other', start=start, freeze=True, compare='scratch')


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_a_frozen_dense_encoder_is_the_start(scenes, start, task, tmp_path):
    """Its maps are those of the plain ViT, as nothing in it can learn new positions or scales."""
    config, _ = new_config(tmp_path, dict(data=scenes, task=task), start=start, img_size=32, freeze=True)
    dense, plain = roots.MODELS.build(config.model.backbone), VisionTransformer(ARCH, 32, 8, out_type='featmap')
    dense.init_weights()
    weights = {key.removeprefix('backbone.'): value for key, value in torch.load(start).items()}
    plain.load_state_dict(weights)
    plain.ln1 = torch.nn.Identity()
    plain.eval()
    maps, images = [], torch.randn(2, 3, 32, 32)
    dense.scales[3].register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0]))
    dense.eval()(images)
    if task == 'segmentation':  # the detector's has no class token, which the patches would attend to
        assert torch.allclose(maps[0], plain(images)[-1], atol=1e-5)
    assert torch.equal(dense.pos_embed[:, -16:], weights['pos_embed'][:, 1:])
    learning = {name.partition('.')[0] for name, value in dense.named_parameters() if value.requires_grad}
    assert learning == {'scales'}


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_a_dense_task_compared_with_random_weights(scenes, start, task, tmp_path):
    """All but the start is the same; the rates too, as the same rate in all blocks was worse."""
    config, _ = new_config(tmp_path, dict(data=scenes, task=task), start=start, img_size=48)
    second = compared_config(config, 'scratch')
    assert config.model.backbone.pop('init_cfg') and second.model.backbone.pop('init_cfg') is None
    assert config.to_dict() == second.to_dict() and config.optim_wrapper.paramwise_cfg.layer_decay_rate == 0.75


@pytest.mark.parametrize(
    ('task', 'rate', 'jitter'), [('detection', 1e-3, (0.5, 1.5)), ('segmentation', 5e-3, (0.5, 2.0))]
)
def test_rates_and_jitter_of_dense_tasks(scenes, task, rate, jitter, tmp_path):
    """The head's rate is that of a width of 128 and a batch of 8; only large images are scaled."""
    for width, side, ratio in ((64, 64, (1.0, 1.0)), (128, 80, jitter)):
        arch = ARCH | dict(embed_dims=width)
        config, _ = new_config(
            tmp_path, dict(data=scenes, task=task), arch=arch, patch_size=8, img_size=side, batch_size=2
        )
        assert config.optim_wrapper.optimizer.lr == pytest.approx(rate * 128 / width / 2)
        steps = {step.type: step for step in config.train_dataloader.dataset.pipeline}
        assert steps['RandomResize'].ratio_range == ratio and steps['RandomCrop'].crop_size == (side, side)
        assert ('PhotoMetricDistortion' in steps) == (task == 'segmentation' and side > 64)


@pytest.mark.parametrize(
    ('batch', 'processes', 'device', 'norm', 'together'),
    [(8, 1, 'cpu', 'BN', None), (4, 1, 'cuda', 'GN', None), (4, 2, 'cpu', 'GN', None), (4, 2, 'cuda', 'BN', 'torch')],
)
def test_norms_of_detectors(scenes, batch, processes, device, norm, together, tmp_path, monkeypatch):
    """BatchNorm where eight images share it; the processes of a machine share it on GPUs alone."""
    for module in ('recipe', 'finetune_recipe'):
        monkeypatch.setattr(f'mmmilan.api.{module}.get_device', lambda: device)
    of_data = dict(data=scenes, task='detection')
    options = dict(arch=ARCH, patch_size=8, img_size=48, batch_size=batch, processes=processes)
    config, _ = new_config(tmp_path, of_data, **options)
    parts = config.model.neck, config.model.roi_head.bbox_head, config.model.roi_head.mask_head
    assert {part.norm_cfg.type for part in parts} == {norm} and config.get('sync_bn') == together


def test_a_decay_that_is_given_is_that_of_both(colours, start, tmp_path):
    config, _ = new_config(tmp_path, dict(data=colours), start=start, img_size=48)
    decays = {}
    for given in (0.65, 0.8):  # the first is the recipe's, which random weights do not have
        config.optim_wrapper.paramwise_cfg.layer_decay_rate = given
        decays[given] = compared_config(config, 'scratch').optim_wrapper.paramwise_cfg.layer_decay_rate
    assert decays == {0.65: 1.0, 0.8: 0.8}


@pytest.mark.slow
def test_the_head_of_a_segmentor_alone(scenes, start, tmp_path):
    options = options_of(1, accumulate=2, img_size=48, patience=1)
    weights = mmmilan.finetune(scenes, tmp_path / 'run', task='segmentation', start=start, freeze=True, **options)
    before, after = (torch.load(path, weights_only=False) for path in (start, weights))
    after = after['state_dict']
    same = [torch.equal(after[key], value) for key, value in before.items() if 'layers' in key or 'patch_embed' in key]
    assert all(same) and len(same) == 2 * 12 + 2
    config = own_config(weights)
    assert config.train_dataloader.batch_sampler == dict(type='mmmilan.WholeSteps', batches=2)


@pytest.mark.slow
def test_accumulated_batches_are_one_large_one(colours, start, tmp_path):
    still = {'model.backbone.drop_path_rate': 0.0, 'param_scheduler': None, 'optim_wrapper.optimizer.eps': 1.0}
    for name, sizes in (('one', dict(batch_size=8)), ('several', dict(batch_size=2, accumulate=4))):
        mmmilan.finetune(colours, tmp_path / name, start=start, lr=1.0, **options_of(1, **still) | sizes)
    one, several = (load_trusted(tmp_path / name / 'epoch_1.pth') for name in ('one', 'several'))
    assert one['meta']['iter'] == 2 and several['meta']['iter'] == 8
    begun = torch.load(start, weights_only=False)
    moved = 0.0
    for key, value in one['state_dict'].items():
        assert torch.allclose(value, several['state_dict'][key], atol=1e-5), key
        moved = max(moved, float((value - begun[key]).abs().max())) if key in begun else moved
    assert moved > 1e-3


@pytest.mark.slow
def test_patience(colours, start, tmp_path):
    """A run that learns nothing stops after three epochs of nine, and has no more to do when it is resumed."""
    mmmilan.finetune(colours, tmp_path / 'run', start=start, **options_of(9, patience=2, lr=1e-12))
    assert (tmp_path / 'run/epoch_3.pth').exists() and len(list((tmp_path / 'run').glob('epoch_*.pth'))) == 1
    mmmilan.finetune(out=tmp_path / 'run', resume=True)
    assert [path.name for path in (tmp_path / 'run').glob('epoch_*.pth')] == ['epoch_3.pth']


def test_encoders_of_checkpoints(start, tmp_path, monkeypatch):
    assert encoder_in(start)[:3] == (ARCH, 8, 32)
    vit = VisionTransformer(ARCH | dict(num_heads=2), img_size=(32, 64), patch_size=16)
    content = dict(state_dict={f'backbone.{key}': value for key, value in vit.state_dict().items()})
    arch = 'dict(embed_dims=64, num_layers=2, num_heads=2, feedforward_channels=96)'
    backbone = f"dict(type='VisionTransformer', arch={arch}, img_size=(32, 64), patch_size=16)"
    scale = 'dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])'
    content['meta'] = dict(cfg=f"model = dict(type='ImageClassifier', backbone={backbone}, data_preprocessor={scale})")
    torch.save(content, tmp_path / 'own.pth')
    found = encoder_in(str(tmp_path / 'own.pth'))
    assert found.arch['num_heads'] == 2 and found.img_size == (32, 64) and found.normalisation['std'] == [127.5] * 3
    monkeypatch.setitem(VisionTransformer.arch_zoo, 'small', ARCH | dict(num_heads=4))
    content['meta']['cfg'] = content['meta']['cfg'].replace(arch, "'small'")  # mmpretrain's, not that of finetune
    torch.save(content, tmp_path / 'own.pth')
    assert encoder_in(str(tmp_path / 'own.pth')).arch['num_heads'] == 4


@pytest.mark.parametrize(
    'change',
    [
        {'model.head.loss.type': 'CocoMetric'},
        {'optim_wrapper.optimizer.betas': 0.9},
        {'param_scheduler.0.end': 'soon'},
        {'val_evaluator.topk': 'first'},
        {'train_dataloader.dataset.pipeline.1.scale': 'wide'},
        {'visualizer.vis_backends': [dict(type='WandbVisBackend')]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_refused_run_leaves_no_file(colours, start, tmp_path, change, monkeypatch):
    """It is refused before the features of the start are taken."""
    monkeypatch.setattr('mmmilan.api.finetune_run.begin_as_probe', lambda *args: pytest.fail('too late'))
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/notes.txt').write_text('mine')
    for name in ('run', 'new'):
        with pytest.raises(InputError):
            mmmilan.finetune(colours, tmp_path / name, start=start, **options_of(), **change)
    assert [path.name for path in tmp_path.rglob('*')] == ['run', 'notes.txt']


def test_a_model_that_can_be_built_but_not_run_leaves_no_file(colours, start, tmp_path):
    with pytest.raises(InputError, match='with the given model.head.in_channels, but its first step fails .* shapes'):
        mmmilan.finetune(colours, tmp_path / 'run', arch=ARCH, **options_of(), **{'model.head.in_channels': 63})
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_dense_tasks_without_the_operators_of_mmcv(scenes, start, task, tmp_path, monkeypatch):
    monkeypatch.setattr('mmmilan.building.find_spec', lambda name: None)
    with pytest.raises(InputError, match='Detection and segmentation need mmcv with its operators'):
        mmmilan.finetune(scenes, tmp_path / 'run', task=task, start=start)
    assert not (tmp_path / 'run').exists()


def test_what_cannot_be(colours, start, tmp_path):
    for options, message in (
        (dict(start='nowhere.pth'), 'nowhere.pth is neither a file nor'),
        (dict(start=start, arch='tiny'), 'is a ViT of width 64 .*, but arch is one of width 192'),
        (dict(start=start, patch_size=16), 'has patches of 8 pixels, but patch_size=16'),
        (dict(start=start, img_size=33), 'img_size=33 is not a multiple of patch_size=8'),
        (dict(start=start, batch_size=1000), 'cannot fill one batch of 1000'),
        (dict(start=start, compare='nowhere.pth'), 'nowhere.pth is neither'),
        (dict(start=start, lr=-1), 'lr=-1 is not a number above 0'),
        (dict(start=start, batch_size=8, accumulate=4), 'cannot fill one step of 32 images; lower batch_size or acc'),
        (dict(start=start, **{'model.head.nonsense': 1}), 'nonsense'),
        (dict(start=start, epoch=3), 'Nothing reads epoch; the nearest name is epochs.'),
        (dict(start=start, batchsize=3), 'Nothing reads batchsize; the nearest name is batch_size.'),
        (dict(start=start, **{'default_hooks.checkpoint.out_dir': 'x'}), 'leave default_hooks.checkpoint.out_dir'),
        (dict(start=start, **{'default_hooks.checkpoint': None}), 'leave default_hooks.checkpoint out'),
        (dict(arch=ARCH, compare='scratch'), 'compares random weights with themselves'),
    ):
        with pytest.raises(InputError, match=message):
            mmmilan.finetune(colours, tmp_path / 'run', **options)
    assert not (tmp_path / 'run').exists()
    with pytest.raises(InputError, match='whose files are read as labelled data; choose a folder beside it'):
        mmmilan.finetune(colours, colours / 'runs', start=start)
    with pytest.raises(InputError, match='lacks the folder of labelled images'):
        mmmilan.finetune(out=tmp_path / 'run')


@pytest.mark.parametrize('compare', [False, True])
@pytest.mark.parametrize(
    ('key', 'value'), [('backbone.out_type', 'avg_featmap'), ('backbone.final_norm', True), ('head.init_cfg', None)]
)
def test_what_a_probe_sets_is_not_given(colours, start, tmp_path, key, value, compare):
    """It would be overwritten, in the run or in the one that it is compared with."""
    starts = dict(arch=ARCH, patch_size=8, img_size=32, compare=start) if compare else dict(start=start)
    with pytest.raises(InputError, match=f'begins as the linear probe of it, which sets model.{key}; leave it out'):
        mmmilan.finetune(colours, tmp_path / 'run', **starts, **options_of(), **{f'model.{key}': value})


@pytest.mark.slow
@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_detectors_and_segmentors(scenes, task, tmp_path, run_tool):
    """Their sizes follow from encoder and images; the model is tested as any other."""
    arch = dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64)
    options = dict(arch=arch, patch_size=8, epochs=2, batch_size=5) | HERE | AT_ONCE
    options['default_hooks.checkpoint.max_keep_ckpts'] = 2
    if task == 'detection':
        options['model.test_cfg.rcnn'] = dict(score_thr=0.0, max_per_img=10)  # something is found, and not much
    weights = mmmilan.finetune(scenes, tmp_path / 'run', task=task, **options)
    config = own_config(weights)
    backbone, classes = config.model.backbone, mmmilan.get_model(weights)._dataset_meta['classes']
    assert backbone.type == 'mmmilan.DenseViT' and backbone.img_size == 48 and backbone.init_cfg is None
    if task == 'detection':
        assert config.model.rpn_head.anchor_generator.strides == [2, 4, 8, 16, 32]
        assert config.model.roi_head.mask_head.num_classes == len(classes) == 10
        assert backbone.out_indices == [0, 1, 2, 3] and backbone.window_size == 0
    else:
        assert config.model.decode_head.num_classes == len(classes) == 16
        assert config.model.test_cfg.crop_size == (48, 48)
        validated = [record['mIoU'] for record in read_scalars(tmp_path / 'run') if 'mIoU' in record]
        run_tool('test.py', weights, weights, '--work-dir', tmp_path / 'test')
        assert read_metrics(tmp_path / 'test')['mIoU'] == max(validated)
        assert mmmilan.export_onnx(weights, tmp_path / 'model.onnx').stat().st_size > 0
    assert 'SyncBN' not in config.pretty_text and config.optim_wrapper.type == 'OptimWrapper'
    check_inferencer(task, weights, str(next((scenes / 'val').glob('*/*'))), tmp_path)

    # as if it had been killed in its second epoch
    left = {'epoch_2.pth', 'model.pth', 'report.html', 'last_checkpoint'}
    shutil.copytree(tmp_path / 'run', tmp_path / 'killed', ignore=lambda folder, names: left)
    mmmilan.finetune(out=tmp_path / 'killed', resume=True)
    assert_identical(*(load_trusted(tmp_path / name / 'epoch_2.pth') for name in ('killed', 'run')))


def check_inferencer(task: str, weights: Path, photo: str, folder: Path) -> None:
    """What ``finetune`` wrote is taken by the inferencers of mmdet and mmseg, who give what a Predictor gives."""
    mmdet, mmseg = pytest.importorskip('mmdet.apis'), pytest.importorskip('mmseg.apis')
    expected = mmmilan.Predictor(weights)(photo)[0]
    if task == 'detection':
        found = mmdet.DetInferencer(weights=str(weights), device='cpu')(photo, pred_score_thr=0)['predictions'][0]
        assert len(found['scores']) > 0 and np.allclose(found['scores'], expected['scores'], atol=1e-4)
        assert np.allclose(found['bboxes'], expected['boxes'], atol=1e-2)
        assert found['labels'] == expected['labels'].tolist()
    else:
        inferencer = mmseg.MMSegInferencer(str(weights.with_name('config.py')), str(weights), device='cpu')
        assert np.array_equal(inferencer(photo, out_dir=str(folder / 'seg'))['predictions'], expected['map'])


@pytest.mark.slow
def test_several_processes(colours, start, tmp_path, monkeypatch, capfd):
    """Two on a CPU; a run that was stopped before its first checkpoint, and one that was stopped after it, go on."""
    monkeypatch.setenv('PORT', str(free_port()))
    options = options_of(2, gpus=2, batch_size=2, start=start, compare='scratch', **AT_ONCE)
    with monkeypatch.context() as patch:  # its config is written, and no process is started
        patch.setattr('mmmilan.torchrun.main', lambda words: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            mmmilan.finetune(colours, tmp_path / 'run', **options)
    monkeypatch.setattr('mmmilan.torchrun.main', run_ranks)
    cli.main(['finetune', '--out', str(tmp_path / 'run'), '--resume', '--gpus', '2'])
    assert 'begins anew with its config' in capfd.readouterr().out
    for folder in (tmp_path / 'run', tmp_path / 'run/compare'):
        last = load_trusted(folder / 'epoch_2.pth')
        assert last['meta']['iter'] == 2 * (18 // 4) and last['meta']['epoch'] == 2
        assert len(load_trusted(folder / 'model.pth')['meta']['dataset_meta']['classes']) == 3
    mmmilan.finetune(out=tmp_path / 'run', resume=True, gpus=2, epochs=3)
    for folder in (tmp_path / 'run', tmp_path / 'run/compare'):
        assert load_trusted(folder / 'epoch_3.pth')['meta']['iter'] == 3 * (18 // 4)


def run_ranks(words: list[str]) -> None:
    """Be torchrun with forks of this process, which have everything imported."""
    assert '--nproc_per_node=2' in words
    command = words[words.index('mmmilan.cli') + 1 :]
    assert exit_codes(start_ranks(cli.main, command)) == [0, 0]


def rectangles(root: Path, kind: str) -> dict[str, tuple]:
    """Ten images of a rectangle each, in the format of YOLO or of Pascal VOC; returns class and corners by image."""
    rng, found = np.random.default_rng(0), {}
    for folder in ('images', 'labels') if kind == 'yolo' else ('JPEGImages', 'Annotations'):
        (root / folder).mkdir(parents=True)
    for number in range(10):
        name = ('zebra', 'big dog')[number % 2]
        left, top, width, height = rng.integers((0, 0, 10, 10), (16, 8, 30, 20)).tolist()
        image = rng.integers(0, 60, (32, 48, 3), dtype=np.uint8)
        image[top : top + height, left : left + width, 2 * (number % 2)] = 220
        found[f'{number}.png'] = (name, left, top, width, height)
        cv2.imwrite(str(root / ('images' if kind == 'yolo' else 'JPEGImages') / f'{number}.png'), image)
        if kind == 'yolo':
            row = [number % 2, (left + width / 2) / 48, (top + height / 2) / 32, width / 48, height / 32]
            (root / f'labels/{number}.txt').write_text(' '.join(map(str, row)))
        else:
            sides = dict(xmin=left, ymin=top, xmax=left + width, ymax=top + height)
            box = ''.join(f'<{side}>{value}</{side}>' for side, value in sides.items())
            (root / f'Annotations/{number}.xml').write_text(
                f'<annotation><filename>{number}.png</filename><size><width>48</width><height>32</height><depth>3</depth>'
                f'</size><object><name>{name}</name><bndbox>{box}</bndbox></object></annotation>'
            )
    if kind == 'yolo':
        (root / 'data.yaml').write_text('path: .\ntrain: images\nnames: [zebra, big dog]\n')
    return found


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['yolo', 'voc'])
def test_boxes_alone(kind, tmp_path):
    """They give a Faster R-CNN, from the folder to the predictions."""
    known = rectangles(tmp_path / 'data', kind)
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    options = dict(arch=arch, patch_size=8, epochs=1, batch_size=4) | HERE | {'model.test_cfg.rcnn.score_thr': 0.0}
    weights = mmmilan.finetune(tmp_path / 'data', tmp_path / 'run', **options)
    assert own_config(weights).model.roi_head.mask_head is None
    assert 'Faster R-CNN on a ViT of 32 dimensions and 2 layers' in (tmp_path / 'run/report.html').read_text()
    classes = mmmilan.get_model(weights)._dataset_meta['classes']
    assert classes == (('zebra', 'big dog') if kind == 'yolo' else ('big dog', 'zebra'))
    read = {}
    for split in ('train', 'val'):
        content = json.loads((tmp_path / f'run/annotations/{split}.json').read_text())
        names = {image['id']: Path(image['file_name']).name for image in content['images']}
        for each in content['annotations']:
            read[names[each['image_id']]] = (classes[each['category_id'] - 1], *np.round(each['bbox'], 3).tolist())
    assert read == known
    path = mmmilan.predict(tmp_path / 'data', weights, tmp_path / 'predictions', draw=False)
    content = json.loads(path.read_text())
    assert [each['name'] for each in content['categories']] == list(classes) and content['annotations']


# -- CIFAR-10


@pytest.fixture
def cifar10(tmp_path) -> Path:
    """24 + 8 images of each class of the test split, which comes first in the archive."""
    archive = real_data('cifar10.tar.xz')
    with tarfile.open(archive, 'r|xz') as files:
        for member in files:
            _, split, label, name = PurePosixPath(member.name).parts
            if split != 'test':
                break
            if (number := int(Path(name).stem)) < 32:
                path = tmp_path / 'cifar10' / ('train' if number < 24 else 'val') / label / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files.extractfile(member).read())
    return tmp_path / 'cifar10'


@pytest.mark.data
def test_cifar10(cifar10, tmp_path):
    """240 images teach more than guessing, from random weights."""
    arch = dict(embed_dims=96, num_layers=4, num_heads=3, feedforward_channels=384)
    mmmilan.finetune(cifar10, tmp_path / 'run', arch=arch, patch_size=4, img_size=32, epochs=10, batch_size=16, **HERE)
    records = read_scalars(tmp_path / 'run')
    assert max(record['accuracy/top1'] for record in records if 'accuracy/top1' in record) > 17.5  # 2.2 standard errors
    losses = [record['loss'] for record in records if 'loss' in record]
    assert losses[-1] < losses[0] - 0.2
