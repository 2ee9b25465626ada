"""Mistakes in a config are found before anything is built, or named by their key when building fails."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

import mmmilan
from helpers import ROOT, rest_slow
from mmmilan.building import change_config, check_config, faults_of, in_scope, values_of
from mmmilan.checkpoints.config import option_value, place_data_preprocessor, read_config_file
from mmmilan.errors import InputError
from mmmilan.failures import step_errors

CONFIG = ROOT / 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'


@pytest.fixture(scope='module')
def config() -> Config:
    return Config.fromfile(CONFIG)


def value_at(config: Config, option: str) -> object:
    """The value below dotted keys."""
    part = config
    for key in option.split('.'):
        part = part[int(key)] if key.isdigit() else part[key]
    return part


def error_of(config: Config, changes: dict, as_options: bool = True) -> str:
    """The message with which a config with changes is refused, as options or as lines of the file."""
    changed = Config(config.to_dict())
    with pytest.raises(InputError) as error:
        if as_options:
            change_config(changed, changes)
        changed.merge_from_dict(changes)
        check_config(changed)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ('option', 'nearest'),
    [
        ('modle.backbone.arch', 'model.backbone.arch'),
        ('model.bakcbone.arch', 'model.backbone'),
        ('optim_wrapper.optimiser.lr', 'optim_wrapper.optimizer'),
        ('train_cfg.max_epoch', 'train_cfg.max_epochs'),
        ('custom_hook', 'custom_hooks'),
        ('cutsom_hooks', 'custom_hooks'),
        ('train_dataloader.droplast', 'train_dataloader.drop_last'),
        ('train_dataloader.sampler.shufle', 'train_dataloader.sampler.shuffle'),
        ('train_dataloader.dataset.pipeline.0.scal', 'train_dataloader.dataset.pipeline.0.scale'),
        ('train_dataloader.dataset.data_rot', 'train_dataloader.dataset.data_root'),
        ('model.masking.mask_ration', 'model.masking.mask_ratio'),
        ('model.head.teacher.pretraind', 'model.head.teacher.pretrained'),
        ('model.neck.decoder_dept', 'model.neck.decoder_depth'),
        ('default_hooks.checkpoint.max_keep_ckpt', 'default_hooks.checkpoint.max_keep_ckpts'),
        ('default_hooks.loger.interval', 'default_hooks.logger'),
        ('param_scheduler.0.start_facto', 'param_scheduler.0.start_factor'),
        ('custom_hooks.0.nothing', ''),
        ('default_hooks.checkpoint.intervall', 'default_hooks.checkpoint.interval'),
        ('env_cfg.cudnn_benchmrk', 'env_cfg.cudnn_benchmark'),
        ('auto_scale_lr.base_batchsize', 'auto_scale_lr.base_batch_size'),
        ('randomness.sed', 'randomness.seed'),
        ('optim_wrapper.paramwise_cfg.norm_decay_mul', 'optim_wrapper.paramwise_cfg.norm_decay_mult'),
        ('optim_wrapper.clip_grad.max_nrom', 'optim_wrapper.clip_grad.max_norm'),
    ],
)  # fmt: skip
def test_option_that_nothing_reads(config, option, nearest):
    message = error_of(config, {option: None})
    assert f'the nearest name is {nearest}.' in message or not nearest


@pytest.mark.parametrize(
    'option',
    [
        'model.backbone.arch',
        'model.backbone.with_cp',
        'model.backbone.drop_path_rate',  # an argument of the base class
        'optim_wrapper.clip_grad.max_norm',
        'optim_wrapper.accumulative_counts',
        'train_dataloader.dataset.indices',
        'train_dataloader.prefetch_factor',
        'val_dataloader',
        'randomness.deterministic',
        'param_scheduler',
        'default_hooks.checkpoint.save_best',
        'find_unused_parameters',
    ],
)
def test_option_that_is_new_but_read(config, option):
    changed = Config(config.to_dict())
    change_config(changed, {option: None})
    assert value_at(changed, option) is None


def test_types_that_do_not_exist(config):
    assert (
        error_of(config, {'model.neck.type': 'mmmilan.PromptingDecodr'})
    ) == "model.neck.type='mmmilan.PromptingDecodr' does not exist; the nearest name is mmmilan.PromptingDecoder."
    message = error_of(config, {'train_dataloader.dataset.pipeline.0.type': 'RandomResizedCrp'}, as_options=False)
    assert message.startswith("train_dataloader.dataset.pipeline.0.type='RandomResizedCrp' does not exist; the nearest")


def test_functions_that_do_not_exist(config):
    message = error_of(config, {'train_dataloader.collate_fn.type': 'defualt_collate'})
    assert message.startswith(
        "train_dataloader.collate_fn.type='defualt_collate' does not exist; the nearest name is de"
    )


def test_copies_of_values(config):
    """A variable of a config file whose value was copied when the file was read."""
    changed = Config(config.to_dict() | dict(train_pipeline=config.train_dataloader.dataset.pipeline))
    assert (
        'train_pipeline.0.scale: its value was copied when the config was read; change train_dataloader.dataset.'
        in (error_of(changed, {'train_pipeline.0.scale': 96}))
    )


def test_a_data_preprocessor_beside_the_models_own(config):
    """MMEngine takes that at the top of a config only for a model that has none."""
    option = {'data_preprocessor.mean': [1, 2, 3]}
    with pytest.raises(InputError, match='the model has its own; change model.data_preprocessor.mean.'):
        change_config(Config(config.to_dict()), option)
    without = Config(config.to_dict())
    without.data_preprocessor = without.model.pop('data_preprocessor')
    change_config(without, option)
    place_data_preprocessor(without)
    assert without.model.data_preprocessor.mean == [1, 2, 3] and 'data_preprocessor' not in without


def test_keys_of_a_file(config, log):
    """A key that would make building fail is refused; one that only does nothing is said."""
    assert 'DataLoader takes no droplast' in error_of(config, {'train_dataloader.droplast': 3}, as_options=False)
    changed = Config(config.to_dict() | dict(optim_wraper=dict(a=1)))
    changed.env_cfg.cudnn_benchmrk = True
    check_config(changed)
    assert 'Nothing reads optim_wraper of the config; the nearest name is optim_wrapper.' in log.text
    assert 'env_cfg.cudnn_benchmrk: nothing reads it; the nearest name is env_cfg.cudnn_benchmark.' in log.text


def test_options_that_do_not_fit(config):
    assert error_of(config, {'model.backbone.arch.embed_dims': 48}).startswith(
        'model.backbone.arch.embed_dims cannot be set'
    )
    assert error_of(config, {'custom_hooks.99.type': 'A'}).startswith('custom_hooks.99.type cannot be set')


@pytest.mark.parametrize('as_options', [True, False])
@pytest.mark.parametrize(
    ('option', 'value', 'taken'),
    [
        ('train_dataloader.drop_last', 3, 'DataLoader takes True or False'),
        ('train_dataloader.drop_last', 'yes', 'DataLoader takes True or False'),
        ('train_dataloader.batch_size', 'many', 'DataLoader takes a whole number'),
        ('test_dataloader.num_workers', 2.5, 'DataLoader takes a whole number'),
        ('train_dataloader.dataset.data_root', 5, 'ImageFolder takes a text'),
        ('train_dataloader.sampler.shuffle', 'no', 'ReproducibleSampler takes True or False'),
        ('train_cfg.max_epochs', '400', 'EpochBasedTrainLoop takes a whole number'),
        ('model.masking.mask_ratio', 'half', 'SemanticAwareMasking takes a number'),
        ('model.head.cls_token', 'yes', 'CLIPTarget takes True or False or a number'),
        ('model.neck.decoder_depth', [8], 'PromptingDecoder takes a whole number'),
        ('model.backbone.drop_path_rate', 'large', 'MILANViT takes a number or a list or a dict'),
        ('default_hooks.checkpoint.interval', '1', 'takes a number'),
        ('default_hooks.logger.interval', 'often', 'takes a whole number'),
        ('param_scheduler.0.begin', 'now', 'LinearLR takes a number'),
        ('optim_wrapper.optimizer.lr', 'fast', 'AdamW takes a number'),
        ('optim_wrapper.optimizer.foreach', 'yes', 'AdamW takes True or False'),
        ('randomness.seed', 'x', 'give a whole number'),
        ('env_cfg.cudnn_benchmark', 'yes', 'give True or False'),
        ('auto_scale_lr.enable', 'yes', 'give True or False'),
        ('optim_wrapper.paramwise_cfg.norm_decay_mult', 'none', 'give a number'),
        ('resume', 'yes', 'the runner takes True or False'),
        ('work_dir', 7, 'the runner takes a text'),
    ],
)  # fmt: skip
def test_values_of_another_type(config, option, value, taken, as_options):
    message = error_of(config, {option: value}, as_options)
    assert message.startswith(f'{option}={value!r} does not fit; ') and taken in message and message.endswith('.')


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        ('train_dataloader.drop_last', 1),
        ('train_dataloader.batch_size', 64.0),
        ('train_dataloader.collate_fn', 'default_collate'),
        ('model.head.cls_token', 2),
        ('model.head.teacher', 'ViT-B-16-quickgelu:openai'),
        ('model.backbone.img_size', (96, 192)),
        ('model.backbone.drop_path_rate', 0),
        ('optim_wrapper.loss_scale', 512.0),
        ('optim_wrapper.optimizer.betas', [0.9, 0.95]),
        ('param_scheduler.0.end', 2.5),
        ('default_hooks.checkpoint.save_best', ['auto', 'loss']),
        ('randomness.seed', None),
        ('val_evaluator', dict(type='Evaluator', metrics=dict(type='mmmilan.ReconstructionLoss'))),
    ],
)
def test_values_that_are_taken(config, option, value):
    changed = Config(config.to_dict())
    changed.optim_wrapper.type = 'AmpOptimWrapper'
    change_config(changed, {option: value})
    assert value_at(changed, option) == value


def test_a_part_that_is_none_takes_keys(config):
    changed = Config(config.to_dict())
    changed.optim_wrapper.clip_grad = None
    change_config(changed, {'optim_wrapper.clip_grad.max_norm': 3.0})
    assert changed.optim_wrapper.clip_grad == dict(max_norm=3.0)


@pytest.mark.parametrize(
    ('option', 'values', 'rule'),
    [
        ('train_cfg.max_epochs', (0, -1), 'a number above 0'),
        ('train_cfg.val_interval', (0, -1), 'a number above 0'),
        ('train_dataloader.batch_size', (0, -8), 'a number above 0'),
        ('test_dataloader.num_workers', (-1,), '0 or more'),
        ('param_scheduler.1.T_max', (0, -20), 'a number above 0'),
        ('optim_wrapper.clip_grad.max_norm', (-1, 0.0), 'a number above 0'),
        ('optim_wrapper.optimizer.weight_decay', (-0.05,), '0 or more'),
        ('model.neck.decoder_depth', (-1,), '0 or more'),
        ('model.neck.decoder_embed_dim', (0, -512), 'a number above 0'),
        ('model.backbone.drop_path_rate', (1.5, -0.1), 'a number from 0 to 1'),
        ('train_dataloader.dataset.pipeline.0.flip_prob', (2, -0.5), 'a number from 0 to 1'),
    ],
)
@pytest.mark.parametrize('as_options', [True, False])
def test_numbers_with_which_something_else_would_be_trained(config, option, values, rule, as_options):
    """Nothing at all, away from the minimum, or a model without its blocks."""
    for value in values:
        message = error_of(config, {option: value}, as_options)
        assert message == f'{option}={value!r} is out of range; give {rule}.'


@pytest.mark.parametrize('as_options', [True, False])
@pytest.mark.parametrize(
    ('option', 'value', 'message'),
    [
        ('optim_wrapper.clip_grad.max', 1, 'optim_wrapper.clip_grad.max: PyTorch takes no max; '),
        ('compile', 'yes', "compile='yes' does not fit; the runner takes True or False or a dict."),
    ],
)  # fmt: skip
def test_what_would_fail_in_the_first_step(config, option, value, message, as_options):
    assert message in error_of(config, {option: value}, as_options)


def test_statistics_of_values_from_0_to_1(config):
    """PyTorch's, where images have 0 to 255, would leave them as they are."""
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    preprocessor = {'model.data_preprocessor.mean': mean, 'model.data_preprocessor.std': std}
    for as_options in (True, False):
        message = error_of(config, preprocessor, as_options)
        assert message.startswith('model.data_preprocessor has mean=[0.485,') and message.endswith(
            'multiply both by 255.'
        )
    nothing = Config(config.to_dict())
    change_config(nothing, {'model.data_preprocessor.mean': [0, 0, 0], 'model.data_preprocessor.std': [1, 1, 1]})


def sizes(**changes) -> dict:
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    return dict(arch=dict(_delete_=True, **arch | changes))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(backbone=dict(frozn=1)), 'model.backbone.frozn: MILANViT takes no frozn; '),
        (dict(backbone=dict(img_sise=96)), 'the nearest name is model.backbone.img_size.'),
        (dict(backbone=dict(patch_size='a')), "patch_size='a' does not fit; MILANViT takes a number or a list or a"),
        (dict(backbone=dict(patch_size=[3, 'a'])), 'model.backbone (mmmilan.MILANViT) cannot be built ('),
        (dict(backbone=dict(arch=dict(embed_dims=3))), 'model cannot be set ('),
        (dict(bakcbone=dict(img_size=96)), 'ImageClassifier takes no bakcbone; the nearest name is model.backbone.'),
        (dict(backbone=sizes(embed_dims=32, num_heads=3)), 'model.backbone.arch.embed_dims=32 is not a multiple of'),
        (dict(backbone=sizes(num_heads=0)), 'model.backbone.arch.num_heads=0 does not fit; give a whole number'),
        (dict(backbone=sizes(num_layers=None)), 'model.backbone.arch.num_layers=None does not fit'),
        (dict(backbone=sizes(num_layers=-2)), 'model.backbone.arch.num_layers=-2 does not fit'),
        (dict(backbone=sizes(feedforward_channels=10**9)), 'model.backbone.arch.feedforward_channels=1000000000 does'),
        (dict(devcie='cpu'), 'takes no devcie; the nearest name is device.'),
    ],
)  # fmt: skip
def test_what_get_model_cannot_build(changes, message):
    with pytest.raises(InputError) as error:
        mmmilan.get_model(CONFIG, **changes)
    assert message in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    'text',
    ['a = (', 'a = b', "_base_ = 'nowhere.py'", '1/0', 'model = dict(a=1, a=2)', '\0'],
)
def test_config_files_that_cannot_be_read(tmp_path, text):
    (tmp_path / 'config.py').write_text(f'b_ = 1\n{text}\n')
    with pytest.raises(InputError, match=f'^The config {tmp_path}/config.py cannot be read'):
        read_config_file(tmp_path / 'config.py')


@pytest.mark.parametrize(
    ('word', 'value'),
    [
        ('3', 3),
        ('1e-5', 1e-5),
        ('a,b', ['a', 'b']),
        ('1,2', [1, 2]),
        ('(1, 2)', (1, 2)),
        ('[(1,2), [a, b], c]', [(1, 2), ['a', 'b'], 'c']),
        ('dict(a=1, b=dict(c=[1]))', dict(a=1, b=dict(c=[1]))),
        ('{"a": true, "b": null}', dict(a=True, b=None)),
        ('true', True),
        ('None', None),
        ('data/my images/a.pth', 'data/my images/a.pth'),
        ("'3'", '3'),
        ('a(b', 'a(b'),
    ],
)
def test_values_of_options(word, value):
    assert option_value(word) == value


def test_dicts_that_are_none():
    for word in ('dict(a', 'dict(a=b)', '{a: 1}', '{'):
        with pytest.raises(InputError, match='is not a dict; write it as'):
            option_value(word)


@pytest.mark.parametrize(
    'name',
    rest_slow(
        [
            'mmdet/detr/detr_r50_8xb2-150e_coco.py',  # the head takes a key out of its loss
            'mmdet/vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco.py',  # super() of another class; the stage reads dcn
            'mmdet/pascal_voc/ssd512_voc0712.py',  # priority of a hook
            'mmseg/fcn/fcn_r50-d8_4xb2-80k_cityscapes-769x769.py',  # norms that are trained
            'mmpretrain/regnet/regnetx-8.0gf_8xb64_in1k.py',
            'mmpretrain/minigpt4/minigpt-4_vicuna-7b_caption.py',  # `pretrained` of a part, read by the whole
            'mmpretrain/flamingo/flamingo_zeroshot_caption.py',  # keys of a method
            'mmdet/tood/tood_x101-64x4d-dconv-c4-c5_fpn_ms-2x_coco.py',  # an old name that a decorator of mmcv takes
            'mmdet/pvt/retinanet_pvt-t_fpn_1x_coco.py',  # init_cfg without a type
            'mmdet/grounding_dino/dod/grounding_dino_swin-t_pretrain_zeroshot_concat_dod.py',  # an evaluator of its own
            'mmseg/ocrnet/ocrnet_hr18s_4xb4-40k_voc12aug-512x512.py',  # a list of heads, annotated as a dict
        ],
        'mmdet/detr/detr_r50_8xb2-150e_coco.py',
        'mmdet/pascal_voc/ssd512_voc0712.py',
        'mmpretrain/regnet/regnetx-8.0gf_8xb64_in1k.py',
        'mmpretrain/minigpt4/minigpt-4_vicuna-7b_caption.py',
        'mmseg/ocrnet/ocrnet_hr18s_4xb4-40k_voc12aug-512x512.py',
    ),
)
def test_configs_of_others_are_not_refused(name, caplog):
    package, _, path = name.partition('/')
    folder = find_spec(package).submodule_search_locations[0] if find_spec(package) else pytest.skip(f'no {package}')
    config = Config.fromfile(f'{folder}/.mim/configs/{path}')
    with DefaultScope.overwrite_default_scope(config.get('default_scope') or package):
        assert not [each.reason for each in faults_of(config)]
        for key in ('model.test_cgf', 'model.backbone.norm_cfg.requires_grd', 'custom_hooks.0.prioritty'):
            changed = Config(config.to_dict())
            holder = key.rpartition('.')[0]
            if any(holder == part and isinstance(value, dict) for part, value in values_of(changed)):
                changed.merge_from_dict({key: 1})
                assert [each.key for each in faults_of(changed)] == [key]


def test_errors_of_steps_are_named_where_the_model_was_changed():
    class Model:
        def train_step(self, data: torch.Tensor) -> torch.Tensor:
            return data @ data

    changes = dict(model=dict(head=dict(in_channels=3)), train_cfg=dict(max_epochs=1))
    message = r'^The model can be built with the given model.head.in_channels, but its first step fails .*2x3'
    with pytest.raises(InputError, match=message), step_errors(changes):
        Model().train_step(torch.zeros(2, 3))
    for others in ({}, dict(train_cfg=dict(max_epochs=1))):
        with pytest.raises(RuntimeError, match='2x3'), step_errors(others):
            Model().train_step(torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match='2x3'), step_errors(changes):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


def test_one_thread_at_a_time_is_in_a_scope():
    """MMEngine's scope is the process's: a thread would look its types up where another one means to."""

    def enter(scope: str) -> list[str]:
        found = []
        for _ in range(20):
            with in_scope(scope):
                time.sleep(0.0005)  # others run
                found.append(DefaultScope.get_current_instance().scope_name)
        return found

    before = DefaultScope.get_current_instance().scope_name
    scopes = ['mmpretrain', 'mmseg', 'mmpretrain', 'mmdet']
    with ThreadPoolExecutor(len(scopes)) as executor:
        for scope, found in zip(scopes, executor.map(enter, scopes), strict=True):
            assert set(found) == {scope}
    assert DefaultScope.get_current_instance().scope_name == before
