"""A checkpoint fills the encoder of each of the three tasks, or a whole model, completely, or it is refused."""

from __future__ import annotations

import copy
import re
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

from helpers import ROOT, TINY_ARCH, labelled_folder, read_scores, rest_slow, strip_prefix
from mmmilan.checkpoints.layouts import convert
from mmmilan.errors import InputError
from mmmilan.registry import MODELS

pytestmark = pytest.mark.usefixtures('safe_mmengine')

CLASSIFICATION = 'milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'
DETECTION = 'detection/mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco.py'
SEGMENTATION = 'segmentation/upernet_vit-base-p16_milan-pre_8xb2-amp-160k_ade20k-512x512.py'
TASKS = dict(classification=CLASSIFICATION, detection=DETECTION, segmentation=SEGMENTATION)
# Weights of each task's encoder that pretraining lacks.
NEW = dict(
    classification=r'ln2\.(weight|bias)',
    detection=r'scales\..*|rel_pos_shared\.(windows|global)',
    segmentation=r'scales\..*|layers\.\d\.(attn\.(rel_pos_table|rel_pos_cls|gamma1\.weight)|ffn\.gamma2\.weight)',
)
ONE_BLOCK = dict(out_indices=(0, 0, 0, 0), global_indices=())


@pytest.fixture
def pretrained(milan_cfg) -> dict[str, Tensor]:
    """The state dict of a MILAN with random values."""
    weights = MODELS.build(milan_cfg).state_dict()
    return {key: torch.randn_like(value) for key, value in weights.items()}


@cache
def read(task: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / TASKS[task])


def backbone_cfg(task: str, checkpoint: object, **changes) -> dict:
    """The encoder of a task's config, in the size of ``milan_cfg``: 4 x 4 patches, 2 blocks."""
    cfg = copy.deepcopy(read(task).model.backbone)
    cfg.arch = dict(TINY_ARCH)
    cfg.img_size = 64
    if task != 'classification':
        cfg.out_indices = (0, 0, 1, 1)
    if task == 'detection':
        cfg.update(window_size=2, global_indices=(1,), scale_norm_cfg=dict(type='GN', num_groups=16))
    cfg.init_cfg.checkpoint = str(checkpoint)
    cfg.update(changes)
    return cfg


def load(task: str, checkpoint: object, **changes) -> nn.Module:
    backbone = MODELS.build(backbone_cfg(task, checkpoint, **changes))
    backbone.init_weights()
    return backbone


def check(task: str, backbone: nn.Module, pretrained: dict[str, Tensor]) -> None:
    """All weights of the encoder but its final norm are loaded; only those of ``NEW`` are not.

    Detection has no class token, and its positions start anew.
    """
    encoder = strip_prefix(pretrained, 'backbone.')
    loaded = backbone.state_dict()
    assert encoder.keys() - loaded.keys() == {'ln1.weight', 'ln1.bias'} | (
        {'cls_token'} if task == 'detection' else set()
    )
    for key in loaded.keys() - encoder.keys():
        assert re.fullmatch(NEW[task], key), key
    for key in loaded.keys() & encoder.keys():
        if (task, key) != ('detection', 'pos_embed'):
            assert torch.equal(loaded[key], encoder[key]), key


@pytest.mark.parametrize('task', TASKS)
def test_raw_checkpoint_in_the_whole_model(task, pretrained, tmp_path):
    """A checkpoint as ``tools/train.py`` writes it, in the model that ``tools/train.py`` builds."""
    torch.save(dict(meta=dict(epoch=1), state_dict=pretrained, optimizer=dict(state={})), tmp_path / 'epoch_1.pth')
    cfg = Config.fromfile(ROOT / 'configs' / TASKS[task])
    init_default_scope(cfg.default_scope)
    cfg.model.backbone = backbone_cfg(task, tmp_path / 'epoch_1.pth')
    if task == 'classification':
        cfg.model.head.in_channels = 48
    elif task == 'detection':
        cfg.model.neck.in_channels = [48] * 4
        cfg.model.roi_head.bbox_head.fc_out_channels = 8
    else:
        cfg.model.decode_head.update(in_channels=[48] * 4, channels=8)
        cfg.model.auxiliary_head.update(in_channels=48, channels=8)
    model = MODELS.build(cfg.model)
    model.init_weights()
    check(task, model.backbone, pretrained)


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('layout', ['official', 'timm', 'huggingface', 'openmmlab', 'an encoder alone'])
def test_published_layouts(task, layout, pretrained, tmp_path):
    if layout == 'openmmlab':
        weights = pretrained | {'target_generator.visual.proj': torch.zeros(2, 2)}
    elif layout == 'an encoder alone':
        weights = strip_prefix(pretrained, 'backbone.')
    else:
        weights = convert(pretrained, to=layout, encoder_only=layout != 'official')
        assert not weights.keys() & pretrained.keys()
    torch.save(dict(model=weights), tmp_path / 'published.pth')
    changes = {}
    if layout == 'an encoder alone' and task == 'classification':  # the config of this task names a prefix
        changes = dict(init_cfg=dict(prefix=None))
    check(task, load(task, tmp_path / 'published.pth', **changes), pretrained)


@pytest.mark.parametrize('task', ['classification', 'segmentation'])
def test_positions_are_interpolated(task, pretrained, tmp_path):
    torch.save(pretrained, tmp_path / 'weights.pth')
    stored = pretrained['backbone.pos_embed']
    loaded = load(task, tmp_path / 'weights.pth', img_size=96).pos_embed
    grid = stored[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(6, 6), mode='bicubic', align_corners=False).flatten(2).transpose(1, 2)
    assert torch.equal(loaded[:, :1], stored[:, :1])
    torch.testing.assert_close(loaded[:, 1:], expected)
    assert torch.equal(load(task, tmp_path / 'weights.pth').pos_embed, stored)  # unchanged at the same size


@pytest.mark.parametrize('task', TASKS)
def test_part_of_an_encoder_is_refused(task, pretrained, tmp_path):
    """The message names what is missing and what is left over."""
    path = tmp_path / 'weights.pth'
    torch.save(pretrained, path)
    arch = TINY_ARCH | dict(num_layers=4)
    with pytest.raises(
        InputError, match=r'weights.pth does not hold all of .* missing layers.2.attn.* and 18 more, left over none'
    ):
        load(task, path, arch=arch)
    with pytest.raises(InputError, match=r'missing none, left over layers.1.attn.* and 6 more'):
        load(task, path, arch=arch | dict(num_layers=1), **({} if task == 'classification' else ONE_BLOCK))
    lost = 'layers.1.ffn.layers.0.0.weight'
    weights = {key: value for key, value in pretrained.items() if key != f'backbone.{lost}'}
    torch.save(weights | {'backbone.layers.1.other': torch.zeros(1)}, path)
    with pytest.raises(InputError, match=f'missing {lost}, left over layers.1.other; give the checkpoint'):
        load(task, path)


def test_final_norm_may_not_be_missing(pretrained, tmp_path):
    """A model without a final norm ignores it in the file; a model with one needs it."""
    torch.save({key: value for key, value in pretrained.items() if 'backbone.ln1' not in key}, tmp_path / 'weights.pth')
    load('classification', tmp_path / 'weights.pth')
    with pytest.raises(InputError, match='missing ln1.bias, ln1.weight, left over none'):
        load('classification', tmp_path / 'weights.pth', final_norm=True)


def test_classifier_as_start_of_a_detector(pretrained, tmp_path):
    """Its head and the norm of its mean token do not belong to the encoder."""
    weights = {key: value for key, value in pretrained.items() if key.startswith('backbone.')}
    head = {'head.fc.weight': torch.zeros(3, 48), 'head.fc.bias': torch.zeros(3)}
    norm = {'backbone.ln2.weight': torch.ones(48), 'backbone.ln2.bias': torch.zeros(48)}
    torch.save(dict(state_dict=weights | head | norm), tmp_path / 'classifier.pth')
    check('detection', load('detection', tmp_path / 'classifier.pth'), pretrained)


@pytest.mark.parametrize('task', TASKS)
def test_damaged_and_unfit_files_are_refused(task, pretrained, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(pretrained, path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(InputError, match='weights.pth is incomplete or damaged'):
        load(task, path)
    torch.save({'backbone.conv1.weight': torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"weights.pth holds no weight of \w+ under 'backbone.'"):
        load(task, path)
    torch.save(pretrained, path)
    with pytest.raises(InputError, match='weights.pth does not fit .*: .*size mismatch for patch_embed'):
        load(task, path, patch_size=8)
    if task == 'detection':  # has no class token itself
        return
    torch.save(pretrained | {'backbone.pos_embed': torch.zeros(1, 16, 48)}, path)  # without the class token
    with pytest.raises(InputError, match='weights.pth does not fit'):
        load(task, path)


# -- whole models, through the tools


@pytest.fixture
def classifier(benchmark_config, labelled_images):
    """The config of fine-tuning on five classes, and the weights of its model."""
    validation = labelled_folder(labelled_images / 'val')
    changes = {'val_dataloader.dataset': validation, 'test_dataloader.dataset': validation}
    changes |= {'train_dataloader.dataset.data_root': str(labelled_images / 'train'), 'model.backbone.init_cfg': None}
    changes |= {f'model.{part}.num_classes': 5 for part in ('head', 'data_preprocessor')}
    config = benchmark_config(Path(CLASSIFICATION).name, changes)
    return config, MODELS.build(Config.fromfile(config).model).state_dict()


def test_missing_weights_are_named(classifier, pretrained_checkpoint, run_tool):
    """A pretraining checkpoint has no classifier: tools/test.py refuses it, and tools/train.py with load_from."""
    config, _ = classifier
    message = (
        r'error: .*epoch_1.pth does not hold all of ImageClassifier: missing backbone.ln2.bias, backbone.ln2.weight, '
        r'head.fc.bias, head.fc.weight, left over .*and \d+ more; give a checkpoint of this config'
    )
    with pytest.raises(SystemExit, match=message):
        run_tool('test.py', config, pretrained_checkpoint)
    with pytest.raises(SystemExit, match=message):
        run_tool('train.py', config, '--cfg-options', f'load_from={pretrained_checkpoint}')


def test_one_missing_weight_is_enough(classifier, run_tool, tmp_path):
    config, weights = classifier
    del weights['backbone.layers.1.attn.qkv.bias']
    torch.save(dict(state_dict=weights), tmp_path / 'part.pth')
    with pytest.raises(SystemExit, match='missing backbone.layers.1.attn.qkv.bias, left over none'):
        run_tool('test.py', config, tmp_path / 'part.pth')


def test_another_number_of_classes_names_the_options(classifier, run_tool, tmp_path):
    config, weights = classifier
    weights |= {'head.fc.weight': torch.zeros(1000, 48), 'head.fc.bias': torch.zeros(1000)}
    torch.save(dict(state_dict=weights), tmp_path / 'imagenet.pth')
    message = (
        r'imagenet.pth does not fit ImageClassifier: its head.fc.weight is \[1000, 48\], and \[5, 48\] in the model; '
        r'set model.data_preprocessor.num_classes and model.head.num_classes to the number of classes'
    )
    with pytest.raises(SystemExit, match=message):
        run_tool('test.py', config, tmp_path / 'imagenet.pth')
    with pytest.raises(SystemExit, match=message):
        run_tool('train.py', config, '--cfg-options', f'load_from={tmp_path}/imagenet.pth')
    weights['backbone.cls_token'] = torch.zeros(1, 1, 96)  # the head is not the only difference
    torch.save(dict(state_dict=weights), tmp_path / 'imagenet.pth')
    with pytest.raises(
        SystemExit, match='imagenet.pth does not fit ImageClassifier: .*size mismatch for backbone.cls_token'
    ):
        run_tool('test.py', config, tmp_path / 'imagenet.pth')


@pytest.mark.parametrize('kind', rest_slow(['as saved by DistributedDataParallel', 'weights alone', 'timm'], 'timm'))
def test_fine_tuned_checkpoints_of_other_origin(classifier, run_tool, kind, tmp_path):
    """They give the scores of the original; the log names what is left over."""
    config, weights = classifier
    weights = {key: torch.randn_like(value) for key, value in weights.items()}
    torch.save(dict(state_dict=weights), tmp_path / 'original.pth')
    other = {
        'as saved by DistributedDataParallel': dict(state_dict={f'module.{k}': v for k, v in weights.items()}),
        'weights alone': weights | {'head.more': torch.zeros(1)},
        'timm': dict(model=convert(weights, to='timm')),
    }[kind]
    torch.save(other, tmp_path / 'other.pth')
    run_tool('test.py', config, tmp_path / 'original.pth', '--work-dir', tmp_path / 'a', '--out', tmp_path / 'a.pkl')
    run_tool('test.py', config, tmp_path / 'other.pth', '--work-dir', tmp_path / 'b', '--out', tmp_path / 'b.pkl')
    original = read_scores(tmp_path / 'a.pkl')
    assert torch.equal(original, read_scores(tmp_path / 'b.pkl'))
    assert len(set(original.argmax(1).tolist())) > 1  # predictions differ between images
    unused = 'head.more' if kind == 'weights alone' else 'none'
    log = ''.join(path.read_text() for path in tmp_path.glob('[ab]/*/*.log'))
    assert f'weights loaded from {tmp_path}/other.pth; newly initialised: none; not used: {unused}.' in log
