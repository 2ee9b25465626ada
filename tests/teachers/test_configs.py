"""configs/milan/teachers: each states only its difference, builds at its real size, and names weights that exist."""

from __future__ import annotations

import open_clip
import pytest
import timm
from mmengine.config import Config
from mmengine.registry import MODELS

from helpers import ROOT, own_settings, rest_slow, restated

CONFIGS = {path.stem.split('_')[0]: path for path in (ROOT / 'configs/milan/teachers').glob('*.py')}
IMPORTANCE = {
    'milan-siglip2': 'attention of the pooling query',
    'milan-dinov3': 'attention of the class token',
    'milan-pe': 'attention of the pooling query',
    'milan-metaclip2': 'attention of the class token',
    'milan-siglip2-dinov3': 'attention of the pooling query',
}


def teachers_of(cfg: Config) -> list[dict]:
    head = cfg.model.head
    return [target.teacher for target in head.get('targets', [head])]


def test_there_is_one_for_each_teacher():
    assert CONFIGS.keys() == IMPORTANCE.keys()


@pytest.mark.parametrize('name', IMPORTANCE)
def test_states_only_its_difference(name):
    own = own_settings(CONFIGS[name])
    base = CONFIGS[name].parent / own.pop('_base_')
    assert list(restated(own, Config.fromfile(base).to_dict())) == []


@pytest.mark.parametrize('name', IMPORTANCE)
def test_weights_exist_by_this_name(name):
    for teacher in teachers_of(Config.fromfile(CONFIGS[name])):
        if teacher.type == 'mmmilan.TimmTeacher':
            assert teacher.model in timm.list_models('vit*', pretrained=True)
        else:
            published = open_clip.pretrained.get_pretrained_cfg(teacher.model, teacher.pretrained)
            assert published['hf_hub']
            quick = open_clip.get_model_config(teacher.model).get('quick_gelu', False)
            assert quick == published.get('quick_gelu', False)


@pytest.mark.parametrize('name', rest_slow(IMPORTANCE, 'milan-dinov3'))
def test_builds_at_its_real_size(name, on_meta):
    cfg = Config.fromfile(CONFIGS[name])
    for teacher in teachers_of(cfg):
        teacher.pretrained = None
    model = MODELS.build(cfg.model)
    teachers = [target.teacher for target in getattr(model.head, 'targets', [model.head])]
    assert all(teacher.grid == (14, 14) and teacher.depth >= 12 for teacher in teachers)
    assert model.neck.predict_feature_dim == sum(teacher.feature_dim for teacher in teachers)
    assert IMPORTANCE[name] in model.head.teacher.describe()


@pytest.mark.slow
def test_a_step_with_two_teachers(milan_cfg, shallow):
    """SigLIP 2 and DINOv3 of two blocks, and the masks are drawn by the first."""
    cfg = Config.fromfile(CONFIGS['milan-siglip2-dinov3'])
    milan_cfg['head'] = cfg.model.head
    milan_cfg['neck']['predict_feature_dim'] = cfg.model.neck.predict_feature_dim
    for teacher in teachers_of(cfg):
        teacher.update(pretrained=None, input_size=64)
    model = MODELS.build(milan_cfg)
    model.init_weights()
    images = model.backbone.pos_embed.new_empty(2, 3, 64, 64).normal_()
    model.loss(images)['loss'].backward()
    features, importance = model.head.run_teacher(images)
    siglip2, dinov3 = (target.teacher for target in model.head.targets)
    assert (importance == siglip2(images)[1]).all() and (importance != dinov3(images)[1]).any()
    assert [part.shape for part in features] == [(2, 17, 768), (2, 17, 768)]
    assert model.neck.mask_token.grad.abs().max() > 0
    assert not [key for key in model.state_dict() if 'teacher' in key or 'tower' in key]
