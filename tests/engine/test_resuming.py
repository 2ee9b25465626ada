"""A resumed run has its progress from the checkpoint and the rates of its config."""

from __future__ import annotations

import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.hooks import Hook, ParamSchedulerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from helpers import assert_identical, load_trusted, read_scalars, rest_slow
from mmmilan.checkpoints.config import own_config
from mmmilan.errors import InputError
from processes import exit_code
from small_runs import Model, runner


class Recorded(Hook):
    """Settings of all groups at each step."""

    def __init__(self) -> None:
        self.steps: dict[int, list[dict]] = {}

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        keys = ('lr', 'weight_decay', 'betas', 'momentum')
        groups = runner.optim_wrapper.param_groups
        self.steps[runner.iter] = [{key: group[key] for key in keys if key in group} for group in groups]


class Stopped(Exception):
    pass


class StopAt(Hook):
    """Save and end the run after some steps."""

    priority = 'LOWEST'

    def __init__(self, step: int) -> None:
        self.step = step

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.step:
            next(hook for hook in runner.hooks if type(hook).__name__ == 'CheckpointHook').save_now(runner)
            raise Stopped


def train(run: Runner, stop: int | None = None) -> dict[int, list[dict]]:
    recorded = Recorded()
    run.register_hook(recorded)
    if stop:
        run.register_hook(StopAt(stop))
        with pytest.raises(Stopped):
            run.train()
    else:
        run.train()
    return recorded.steps


def adamw(lr: float = 0.01, **kwargs) -> dict:
    return dict(optimizer=dict(type='AdamW', lr=lr, **kwargs))


def warm_cosine(epochs: int, warmup: int = 2, eta_min: float = 0.0, by_epoch: bool = False) -> list[dict]:
    """Of epochs of 4 steps, in steps or in epochs that MMEngine converts."""
    unit, convert = (1, dict(convert_to_iter_based=True)) if by_epoch else (4, dict(by_epoch=False))
    return [
        dict(type='LinearLR', start_factor=1e-3, begin=0, end=warmup, **convert),
        dict(
            type='CosineAnnealingLR',
            T_max=epochs * unit - warmup,
            begin=warmup,
            end=epochs * unit,
            eta_min=eta_min,
            **convert,
        ),
    ]


LAYERS = dict(
    optimizer=dict(type='AdamW', lr=0.01, weight_decay=0.1),
    paramwise_cfg=dict(custom_keys={'layer.weight': dict(lr_mult=0.3), 'layer.bias': dict(decay_mult=0.0)}),
)
FASTER = LAYERS | dict(optimizer=dict(type='AdamW', lr=0.05, weight_decay=0.2))
LINEAR = dict(type='LinearLR', by_epoch=False)
RESTARTS = dict(type='CosineRestartLR', eta_min=1e-4)
MULTI_STEP = dict(type='MultiStepLR', by_epoch=True, gamma=0.1)
BASE = dict(epochs=2, param_scheduler=warm_cosine(2))

CHANGES = {
    'longer': (BASE, dict(epochs=5, param_scheduler=warm_cosine(5))),
    'shorter': (dict(epochs=6, param_scheduler=warm_cosine(6)), dict(epochs=3, param_scheduler=warm_cosine(3))),
    'warm-up': (BASE, dict(epochs=4, param_scheduler=warm_cosine(4, warmup=6))),
    'within the warm-up': (
        dict(epochs=6, param_scheduler=warm_cosine(6, warmup=20)),
        dict(epochs=6, param_scheduler=warm_cosine(6, warmup=10)),
    ),
    'base rate': (BASE, dict(epochs=4, param_scheduler=warm_cosine(4), optim_wrapper=adamw(0.3))),
    'last rate': (BASE, dict(epochs=4, param_scheduler=warm_cosine(4, eta_min=1e-3))),
    'epochs converted to steps': (
        dict(epochs=2, param_scheduler=warm_cosine(2, 1, by_epoch=True)),
        dict(epochs=5, param_scheduler=warm_cosine(5, 2, by_epoch=True)),
    ),
    'steps to epochs': (BASE, dict(epochs=4, param_scheduler=[dict(type='CosineAnnealingLR', T_max=4)])),
    'epochs to steps': (
        dict(epochs=2, param_scheduler=[dict(type='CosineAnnealingLR', T_max=2)]),
        dict(epochs=4, param_scheduler=warm_cosine(4)),
    ),
    'milestones': (
        dict(epochs=2, param_scheduler=[LINEAR | dict(end=3), MULTI_STEP | dict(milestones=[1])]),
        dict(epochs=5, param_scheduler=[LINEAR | dict(end=6), MULTI_STEP | dict(milestones=[1, 3])]),
    ),
    'three in a chain': (
        BASE,
        dict(
            epochs=5,
            param_scheduler=[*warm_cosine(3), dict(type='PolyLR', by_epoch=False, begin=12, end=20, power=2.0)],
        ),
    ),
    'more schedules': (BASE, dict(epochs=4, param_scheduler=[dict(type='ExponentialLR', gamma=0.9), *warm_cosine(4)])),
    'no schedule': (BASE, dict(epochs=4, param_scheduler=None)),
    'a first schedule': (dict(epochs=2, param_scheduler=None), dict(epochs=4, param_scheduler=warm_cosine(4))),
    'one cycle': (
        dict(epochs=3, param_scheduler=[dict(type='OneCycleLR', eta_max=0.1, total_steps=12, by_epoch=False)]),
        dict(epochs=5, param_scheduler=[dict(type='OneCycleLR', eta_max=0.2, total_steps=20, by_epoch=False)]),
    ),
    'restarts': (
        dict(epochs=3, param_scheduler=[RESTARTS | dict(periods=[1, 2], restart_weights=[1, 0.5])]),
        dict(epochs=5, param_scheduler=[RESTARTS | dict(periods=[2, 3], restart_weights=[1, 0.3])]),
    ),
    'rates of layers': (
        BASE | dict(optim_wrapper=LAYERS),
        dict(epochs=4, param_scheduler=warm_cosine(4), optim_wrapper=FASTER),
    ),
    'momentum': (
        BASE,
        dict(
            epochs=4,
            param_scheduler=[*warm_cosine(4), dict(type='LinearMomentum', by_epoch=False, end=12, start_factor=0.2)],
        ),
    ),
    'no momentum any more': (
        dict(epochs=2, param_scheduler=[dict(type='LinearMomentum', by_epoch=False, end=6, start_factor=0.5)]),
        dict(epochs=4, param_scheduler=[]),
    ),
    'weight decay and betas': (
        BASE,
        dict(epochs=4, param_scheduler=warm_cosine(4), optim_wrapper=adamw(weight_decay=0.3, betas=(0.8, 0.9))),
    ),
    'the batch size scales the rate': (
        dict(epochs=2, length=8, auto_scale_lr=dict(enable=True, base_batch_size=2)),
        dict(epochs=4, length=8, auto_scale_lr=dict(enable=True, base_batch_size=8)),
    ),
}


@pytest.mark.parametrize(
    'stop', rest_slow([None, 3, 6], 3), ids=['at the end of an epoch', 'in the first epoch', 'in the second']
)
@pytest.mark.parametrize(
    'case',
    rest_slow(CHANGES, 'longer', 'epochs converted to steps', 'rates of layers', 'the batch size scales the rate'),
)
def test_rates_are_those_of_a_run_with_the_new_config(tmp_path, safe_mmengine, case, stop):
    """To the bit, at every step; weights and moments are those of the checkpoint."""
    old, new = (dict(length=8) | settings for settings in CHANGES[case])
    train(runner(tmp_path / 'old', **old), stop)
    source = tmp_path / (f'old/stopped_iter_{stop}.pth' if stop else 'old/epoch_2.pth')
    resumed = runner(tmp_path / 'new', load_from=str(source), resume=True, **new)
    expected = train(runner(tmp_path / 'fresh', **new))
    actual = train(resumed)
    begin = stop or 8
    assert sorted(actual) == list(range(begin, 4 * new['epochs']))
    assert actual == {step: expected[step] for step in actual}


def test_an_unchanged_schedule_is_not_computed_again(tmp_path, safe_mmengine, monkeypatch):
    """Its state is in the checkpoint; a million steps would take minutes."""
    settings = dict(length=8, epochs=6, param_scheduler=[*warm_cosine(6), MULTI_STEP | dict(milestones=[2, 4])])
    expected = train(runner(tmp_path, **settings))
    monkeypatch.setattr('mmmilan.engine.resuming.replay', lambda *args: pytest.fail('computed again'))
    resumed = train(runner(tmp_path, load_from=str(tmp_path / 'epoch_3.pth'), resume=True, **settings))
    assert resumed == {step: expected[step] for step in range(12, 24)}


def test_the_cosine_has_its_closed_form(tmp_path, safe_mmengine):
    train(runner(tmp_path, **BASE, length=8))
    run = runner(
        tmp_path,
        epochs=6,
        length=8,
        param_scheduler=warm_cosine(6),
        optim_wrapper=adamw(0.3),
        load_from=str(tmp_path / 'epoch_2.pth'),
        resume=True,
    )
    for step, [group] in train(run).items():
        assert group['lr'] == pytest.approx(0.15 * (1 + math.cos(math.pi * (step - 2) / 22)), rel=1e-6)


@pytest.mark.parametrize('changed', [dict(length=12), dict(length=4), dict(batch_size=4), dict(batch_size=1)])
def test_epochs_of_another_length(tmp_path, safe_mmengine, changed):
    """After two of four epochs, half of the schedule is done, however many steps an epoch has now."""
    schedule = [dict(type='CosineAnnealingLR', T_max=4, convert_to_iter_based=True)]
    old = dict(epochs=4, length=8, param_scheduler=schedule)
    new = old | changed
    train(runner(tmp_path / 'old', **old))
    source = str(tmp_path / 'old/epoch_2.pth')
    expected = train(runner(tmp_path / 'fresh', **new))
    actual = train(runner(tmp_path / 'new', load_from=source, resume=True, **new))
    assert len(actual) == len(expected) / 2 and actual == {step: expected[step] for step in actual}


def described(**settings) -> dict:
    """The config of a run, for :func:`small_runs.runner`."""
    return dict(cfg=Config(settings))


def test_what_changes_is_said_once(tmp_path, safe_mmengine, log):
    cfg = dict(
        model=dict(type='MILAN', masking=dict(mask_ratio=0.75), head=dict(teacher=dict(pretrained='openai'))),
        train_dataloader=dict(batch_size=2, dataset=dict(pipeline=[dict(type='Crop', scale=(0.2, 1.0))])),
        work_dir='a',
        randomness=dict(seed=3),
    )
    train(runner(tmp_path, epochs=1, length=8, randomness=dict(seed=3), **described(**cfg)))
    cfg['model'] = dict(type='MILAN', masking=dict(mask_ratio=0.6), head=dict(teacher=dict(pretrained='dino.pth')))
    cfg['train_dataloader'] = dict(batch_size=4, dataset=dict(pipeline=[dict(type='Crop', scale=[0.2, 1.0])]), seed=1)
    cfg |= dict(work_dir='b', randomness=dict(seed=4))
    log.clear()
    resumed = runner(
        tmp_path, load_from=str(tmp_path / 'epoch_1.pth'), resume=True, length=6, batch_size=4, **described(**cfg)
    )
    resumed.logger.addHandler(log.handler)
    resumed.train()
    [message] = [record.getMessage() for record in log.records if 'with changes' in record.getMessage()]
    lines = {line.strip() for line in message.splitlines()[1:]}
    assert lines == {
        'model.masking.mask_ratio: 0.75 -> 0.6',
        "model.head.teacher.pretrained: 'openai' -> 'dino.pth'",
        'train_dataloader.batch_size: 2 -> 4',
        'train_dataloader.seed: not set -> 1',
        'randomness.seed: 3 -> 4',
        'images: 8 -> 6',
        'images_per_step: 2 -> 4',
        'steps in an epoch: 4 -> 2',
    }
    assert resumed.seed == 4


def test_nothing_is_said_where_nothing_changes(tmp_path, safe_mmengine, log):
    cfg = described(model=dict(type='MILAN', out_indices=(0, 1)), work_dir='a', launcher='none')
    train(runner(tmp_path, epochs=1, **cfg))
    cfg = described(model=dict(type='MILAN', out_indices=[0, 1]), work_dir='b', resume=True)
    resumed = runner(tmp_path, load_from=str(tmp_path / 'epoch_1.pth'), resume=True, **cfg)
    resumed.logger.addHandler(log.handler)
    resumed.train()
    assert 'changes' not in log.text


@pytest.mark.parametrize(
    ('old', 'new', 'message'),
    [
        (dict(model=dict(type='MILAN')), dict(model=dict(type='MaskCLIP')), "model.type='MILAN', where .*'MaskCLIP'"),
        (
            dict(model=dict(backbone=dict(arch=dict(num_layers=2)))),
            dict(model=dict(backbone=dict(arch=dict(num_layers=3)))),
            'arch.num_layers=2, where this one has 3',
        ),
        (
            dict(model=dict(neck=dict(decoder_num_heads=4))),
            dict(model=dict(neck=dict(decoder_num_heads=8))),
            'decoder_num_heads=4',
        ),
        (
            dict(optim_wrapper=dict(optimizer=dict(type='AdamW'))),
            dict(optim_wrapper=dict(optimizer=dict(type='Adam'))),
            "optimizer.type='AdamW'",
        ),
        (dict(train_cfg=dict(max_epochs=3)), dict(train_cfg=dict(max_iters=3)), 'train_cfg.max_epochs'),
        (dict(train_cfg=dict(max_iters=3)), dict(train_cfg=dict(max_epochs=3)), 'train_cfg.max_iters'),
    ],
)
def test_another_model_or_optimizer_is_refused(tmp_path, safe_mmengine, old, new, message):
    train(runner(tmp_path, epochs=1, **described(**old)))
    with pytest.raises(InputError, match=f'epoch_1.pth is of a run with .*{message}'):
        runner(tmp_path, load_from=str(tmp_path / 'epoch_1.pth'), resume=True, **described(**new)).train()


@pytest.mark.parametrize('optimizer', [dict(type='SGD', lr=0.1, momentum=0.9), dict(type='mmmilan.LARS', lr=0.1)])
def test_another_optimizer_is_known_by_its_settings(tmp_path, safe_mmengine, optimizer):
    """Where the checkpoint holds no config."""
    train(runner(tmp_path, epochs=1))
    resumed = runner(
        tmp_path, load_from=str(tmp_path / 'epoch_1.pth'), resume=True, optim_wrapper=dict(optimizer=optimizer)
    )
    with pytest.raises(InputError, match='epoch_1.pth: its optimizer state is of another optimizer'):
        resumed.train()


class Deeper(Model):
    def __init__(self):
        super().__init__()
        self.second = torch.nn.Linear(1, 1)


@pytest.mark.parametrize('settings', [dict(optim_wrapper=LAYERS), dict(model=Deeper)])
def test_other_parameters_are_refused(tmp_path, safe_mmengine, settings):
    train(runner(tmp_path, epochs=1))
    settings = {key: value() if key == 'model' else value for key, value in settings.items()}
    with pytest.raises(InputError, match=r'epoch_1\.pth'):
        runner(tmp_path, load_from=str(tmp_path / 'epoch_1.pth'), resume=True, **settings).train()


@pytest.mark.parametrize(
    ('changed', 'message'),
    [
        (dict(length=12, names=()), 'images: 8 -> 12, steps in an epoch: 4 -> 6'),
        (dict(batch_size=4), 'images_per_step: 2 -> 4'),
        (dict(randomness=dict(seed=4), **described(randomness=dict(seed=4))), 'randomness.seed: '),
        (dict(names=[f'{i}.jpg' for i in (1, 0, *range(2, 8))]), 'names or order of the images'),
    ],
)
def test_within_an_epoch_the_images_must_be_the_same(tmp_path, safe_mmengine, changed, message):
    names = [f'folder/{i}.jpg' for i in range(8)]
    train(runner(tmp_path, length=8, names=names), stop=3)
    source = str(tmp_path / 'stopped_iter_3.pth')
    with pytest.raises(InputError, match=f'stopped_iter_3.pth was saved at step 3 of an epoch .*{message}'):
        runner(tmp_path, load_from=source, resume=True, **dict(length=8, names=names) | changed).train()
    moved = [f'elsewhere/{name}' for name in names]  # the same images
    assert len(train(runner(tmp_path, load_from=source, resume=True, length=8, names=moved))) == 5


def test_a_seed_that_no_config_sets_is_that_of_the_run(tmp_path, safe_mmengine):
    first = runner(tmp_path, length=8, sampler=dict(type='DefaultSampler', shuffle=True))
    train(first, stop=3)
    second = runner(
        tmp_path,
        length=8,
        sampler=dict(type='DefaultSampler', shuffle=True),
        load_from=str(tmp_path / 'stopped_iter_3.pth'),
        resume=True,
    )
    assert second.seed != first.seed
    second.train()
    assert second.seed == second.train_dataloader.sampler.seed == first.seed


def test_schedules_that_follow_a_metric(tmp_path, safe_mmengine):
    """They go on where they were; their past cannot be computed for other settings."""
    schedules = [dict(type='ReduceOnPlateauLR', monitor='score', patience=0), dict(type='ExponentialLR', gamma=0.9)]

    class Validated(Hook):
        def after_train_epoch(self, runner):
            for hook in runner.hooks:
                if isinstance(hook, ParamSchedulerHook):
                    hook.after_val_epoch(runner, dict(score=1.0))

    def run(work_dir: Path, epochs: int, **kwargs) -> dict[int, list[dict]]:
        built = runner(tmp_path / work_dir, epochs=epochs, param_scheduler=schedules, **kwargs)
        built.register_hook(Validated())
        return train(built)

    expected = run('whole', 4)
    assert expected[7][0]['lr'] < 0.01 * 0.9**3 / 10
    resume = dict(load_from=str(tmp_path / 'whole/epoch_2.pth'), resume=True)
    actual = run('resumed', 4, **resume)
    assert actual == {step: expected[step] for step in range(4, 8)}
    with pytest.raises(InputError, match='epoch_2.pth: a schedule follows score'):
        run('other', 4, optim_wrapper=adamw(0.1), **resume)
    schedules[0] |= dict(patience=1)
    with pytest.raises(InputError, match='epoch_2.pth: a schedule follows score'):
        run('another', 4, **resume)


@pytest.mark.slow
def test_what_a_run_writes_does_not_depend_on_the_folder(
    tiny_config, run_tool, clip_file, image_folder, tmp_path, monkeypatch
):
    """Files and folders that a config names have absolute paths in the checkpoint; names stay as they are."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'photos').symlink_to(image_folder)
    changes = {'model.head.teacher.pretrained': Path(clip_file).name, 'train_dataloader.dataset.data_root': 'photos'}
    changes |= {'train_dataloader.num_workers': 0, 'train_cfg.max_epochs': 1}
    run_tool('train.py', tiny_config(changes), '--work-dir', 'run')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    config = own_config('../run/epoch_1.pth')
    assert config.model.head.teacher.pretrained == clip_file
    assert config.train_dataloader.dataset.data_root == str(tmp_path / 'photos')
    run_tool('test.py', '../run/epoch_1.pth')


@HOOKS.register_module()
class KillHook(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 8:  # in the second epoch of 6 steps
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_killed_and_resumed(tiny_config, run_tool, tmp_path):
    persistent = {'train_dataloader.persistent_workers': True}
    kill = {'default_hooks.kill': dict(type='KillHook')}
    assert exit_code(run_tool, 'train.py', tiny_config(persistent), '--work-dir', tmp_path / 'uninterrupted') == 0
    expected = load_trusted(tmp_path / 'uninterrupted/epoch_2.pth')
    killed = exit_code(run_tool, 'train.py', tiny_config(persistent | kill), '--work-dir', tmp_path / 'killed')
    assert killed == -signal.SIGKILL
    assert (tmp_path / 'killed/last_checkpoint').read_text().endswith('epoch_1.pth')

    shutil.copytree(tmp_path / 'killed', tmp_path / 'other')
    run_tool('train.py', tiny_config(), '--work-dir', tmp_path / 'killed', '--resume')
    assert_identical(load_trusted(tmp_path / 'killed/epoch_2.pth'), expected)

    # samples do not depend on the worker that reads them; the checkpoint is named this time
    config = tiny_config({'train_dataloader.num_workers': 1})
    run_tool('train.py', config, '--work-dir', tmp_path / 'other', '--resume', tmp_path / 'other/epoch_1.pth')
    assert_identical(load_trusted(tmp_path / 'other/epoch_2.pth'), expected)
    with pytest.raises(AssertionError):
        assert_identical(load_trusted(tmp_path / 'other/epoch_1.pth'), expected)


def test_steps_and_epochs_differ(tiny_config, run_tool, tmp_path):
    """The runs above do use randomness: with a learning rate of 0, no two losses are the same."""
    run_tool('train.py', tiny_config({'optim_wrapper.optimizer.lr': 0.0, 'optim_wrapper.type': 'OptimWrapper'}))
    losses = [record['loss'] for record in read_scalars(tmp_path / 'work')]
    assert len(losses) == len(set(losses)) == 12


ALIGNMENT = {
    'model.backbone.out_indices': [0, 1],
    'model.neck': dict(
        _delete_=True, type='mmmilan.LayerMixture', embed_dim=48, num_layers=2, num_targets=1, predict_feature_dim=128
    ),
    'model.head.type': 'mmmilan.LayerAlignment',
    'model.head.num_layers': 1,
}


@pytest.fixture
def pooling_teacher(tmp_path):
    """A teacher without class token, with a pooling query and a register: timm's smallest, random weights in a file."""
    vit = timm.create_model('test_vit3', num_classes=0, img_size=64)
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    teacher = dict(_delete_=True, type='mmmilan.TimmTeacher', model='test_vit3', pretrained=str(tmp_path / 'vit.pth'))
    teacher |= dict(input_size=64, teacher_mean_std='own')
    return {'model.head.teacher': teacher, 'model.neck.predict_feature_dim': 96}


@pytest.fixture
def prompted(maskclip_file):
    """Texts, not attention, decide on the masks."""
    return {
        'model.head.teacher.importance': dict(texts=['a ship', 'rust']),
        'model.head.teacher.pretrained': maskclip_file,
    }


@pytest.fixture
def several_targets(clip_file):
    """Features, of which the class token counts twice, and pixels."""
    teacher = dict(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    targets = [dict(type='mmmilan.CLIPTarget', cls_token=2.0, teacher=teacher)]
    targets += [dict(type='mmmilan.PixelTarget', norm_pix=True)]
    head = dict(_delete_=True, type='mmmilan.SumTarget', targets=targets, weights=[1.0, 0.2])
    return {'model.head': head, 'model.neck.predict_feature_dim': 24 + 768}


OTHER_PARTS = [ALIGNMENT, 'prompted', 'several_targets', 'pooling_teacher']


@pytest.mark.parametrize('options', rest_slow(OTHER_PARTS, ALIGNMENT))
def test_resumed_with_other_parts(options, tiny_config, run_tool, tmp_path, request):
    """One epoch and a resumed second one are two epochs in one run."""
    options = request.getfixturevalue(options) if isinstance(options, str) else options
    config = tiny_config({'train_dataloader.num_workers': 0} | options)
    run_tool('train.py', config, '--work-dir', tmp_path / 'whole')
    expected = load_trusted(tmp_path / 'whole/epoch_2.pth')
    (tmp_path / 'resumed').mkdir()
    shutil.copy(tmp_path / 'whole/epoch_1.pth', tmp_path / 'resumed')
    run_tool('train.py', config, '--work-dir', tmp_path / 'resumed', '--resume', tmp_path / 'resumed/epoch_1.pth')
    assert_identical(load_trusted(tmp_path / 'resumed/epoch_2.pth'), expected)
