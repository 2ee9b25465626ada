"""Parameters and FLOPs of the configs, and those that the metafiles state."""

from __future__ import annotations

import modelindex
import pytest
import torch
from mmengine.config import Config

import mmmilan
from helpers import PRETRAINED, ROOT, rest_slow
from mmmilan.api.models import titles_of
from mmmilan.api.recipe import replace_teacher
from mmmilan.cli import main
from mmmilan.engine.throughput import counted_flops
from mmmilan.errors import InputError

STATED = [
    PRETRAINED,
    'milan_vit-large-p16_16xb256-amp-coslr-400e_in1k',
    'vit-base-p16_milan-pre_8xb128-coslr-100e_in1k',
    'vit-base-p16_milan-pre_8xb2048-semantic-aware-linear-coslr-100e_in1k',
    'vit-base-p16_clip-pre_8xb2048-linear-coslr-100e_in1k',
    'vit-large-p14_clip-pre_8xb128-coslr-100e_in1k',
    'vit-large-p16_milan-pre_8xb128-coslr-100e_in1k-384px',
    'mask-rcnn_vit-base-p16_milan-pre_8xb2-amp-lsj-1x_coco',
    'upernet_vit-large-p16_milan-pre_8xb2-amp-160k_ade20k-512x512',
    'maskclip_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m',
]


@pytest.mark.parametrize('name', rest_slow(STATED, PRETRAINED, STATED[2], STATED[-1]))
def test_metafiles_state_what_is_counted(name):
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    stated = next(model for model in index.models if model.name == name).metadata
    assert mmmilan.get_flops(name) == {'Parameters': stated.parameters, 'FLOPs': stated.flops}


def test_all_models_state_both():
    """And those of one architecture, task and size the same."""
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    for model in index.models:
        parameters, flops = model.metadata.parameters, model.metadata.flops
        assert (8e7 < parameters < 2e8) != ('large' in model.name), model.name
        assert flops > (5e11 if model.name.startswith(('mask-rcnn', 'upernet')) else 1.7e10), model.name


@pytest.mark.slow
def test_without_meta_device():
    """A forward pass that is computed has as many, and ViT-B/16 the 86.6 M parameters that its papers give."""
    name = 'vit-base-p16_milan-pre_8xb128-coslr-100e_in1k'
    found, model = mmmilan.get_flops(name), mmmilan.get_model(name)
    with torch.no_grad(), counted_flops() as counter:
        model(torch.zeros(1, 3, 224, 224), mode='tensor')
    assert counter.get_total_flops() == 2 * found['FLOPs'] and round(found['Parameters'] / 1e6, 1) == 86.6


@pytest.mark.slow
def test_flops_of_detectors_with_other_heads(tmp_path):
    """A detector of boxes alone has no mask head; a cascade has several heads."""
    pytest.importorskip('mmdet')
    config = Config.fromfile(ROOT / 'configs/demo/mask-rcnn_vit-tiny-p8_scenes.py')
    del config.model.roi_head['mask_head'], config.model.roi_head['mask_roi_extractor']
    config.model.type = 'FasterRCNN'
    config.dump(tmp_path / 'boxes.py')
    boxes = mmmilan.get_flops(tmp_path / 'boxes.py')
    head = config.model.roi_head.bbox_head
    config.model.roi_head.update(type='CascadeRoIHead', num_stages=2, stage_loss_weights=[1, 1], bbox_head=[head] * 2)
    config.model.train_cfg.rcnn = [config.model.train_cfg.rcnn] * 2
    config.model.type = 'CascadeRCNN'
    config.dump(tmp_path / 'cascade.py')
    cascade = mmmilan.get_flops(tmp_path / 'cascade.py')
    masks = mmmilan.get_flops('configs/demo/mask-rcnn_vit-tiny-p8_scenes.py')
    assert boxes['FLOPs'] < masks['FLOPs'] and boxes['FLOPs'] < cascade['FLOPs']
    assert boxes['Parameters'] < min(masks['Parameters'], cascade['Parameters'])


def test_command(capsys):
    main(['get-flops', 'configs/milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'])
    assert capsys.readouterr().out.splitlines()[-2:] == ['Parameters\t86567656', 'FLOPs\t17563828224']
    with pytest.raises(SystemExit, match='The zoo has no model'):
        main(['get-flops', 'resnet50'])
    with pytest.raises(InputError, match='does not exist|is not a file'):
        mmmilan.get_flops('configs/none.py')


def test_files_of_one_name_are_told_apart_by_their_folders():
    runs = ['a/one/milan.pth', 'b/one/milan.pth', './a/two/milan.pth']
    assert titles_of(runs) == ['a/one/milan', 'b/one/milan', 'two/milan']
    assert titles_of(['a/milan.pth', 'a/other.pth', 'teacher', 'b/milan.safetensors']) == [
        'a/milan',
        'other',
        'teacher',
        'b/milan',
    ]
    with pytest.raises(InputError, match='a/milan.pth is named twice'):
        titles_of(['a/milan.pth', './a/milan.pth'])
    with pytest.raises(InputError, match='teacher is named twice'):
        titles_of(['teacher', 'teacher'])


@pytest.mark.parametrize(
    ('teacher', 'kept'),
    [
        ('ViT-B-16-quickgelu:{file}', dict(teacher_mean_std=None, input_size=96)),  # it has moved
        ('ViT-B-16-SigLIP2:webli', dict(input_size=96)),  # sees its own pixels
        ('vit_base_patch16_224.dino', dict(input_size=96)),
    ],
)
def test_what_is_kept_of_a_teacher(clip_file, teacher, kept):
    before = dict(type='mmmilan.OpenCLIPTeacher', model='ViT-B-16-quickgelu', pretrained='old.pt')
    head = dict(teacher=before | dict(teacher_mean_std=None, input_size=96))
    config = Config(dict(model=dict(head=head)))
    replace_teacher(config, teacher.format(file=clip_file), 'milan.pth')
    after = config.model.head.teacher
    assert {key: after[key] for key in after if key not in ('type', 'model', 'pretrained')} == kept
