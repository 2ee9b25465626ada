"""The pretraining configs: each states only its difference, builds at its real size, and is the paper's cell."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner import Runner
from mmpretrain.structures import DataSample
from torch import nn

from helpers import ROOT, own_settings, real_data, rest_slow, restated
from mmmilan.models import MILAN, CLIPTarget, LinearProjection, MAEDecoder, PixelTarget, PromptingDecoder
from mmmilan.models.masking import RandomMasking, SemanticAwareMasking
from mmmilan.registry import MODELS

CONFIGS = {path.stem: path for folder in ('.', 'ablations') for path in (ROOT / 'configs/milan' / folder).glob('*.py')}
BASE = 'milan_vit-base-p16_16xb256-amp-coslr-400e_in1k'
LARGE = 'milan_vit-large-p16_16xb256-amp-coslr-400e_in1k'
MAE = 'mae_vit-base-p16_16xb256-amp-coslr-400e_in1k'
SLIP = 'milan-slip_vit-base-p16_16xb256-amp-coslr-400e_in1k'


@pytest.mark.parametrize('path', CONFIGS.values(), ids=CONFIGS)
def test_config_states_only_its_difference(path):
    own = own_settings(path)
    bases = own.pop('_base_')
    for base in [bases] if isinstance(bases, str) else bases:
        assert list(restated(own, Config.fromfile(path.parent / base).to_dict())) == []


def with_random_teacher(name: str) -> Config:
    cfg = Config.fromfile(CONFIGS[name])
    if cfg.model.head.get('teacher') and 'slip' not in name:
        cfg.model.head.teacher.pretrained = None
    return cfg


@pytest.fixture
def slip_weights():
    """Zeros with the keys and shapes of SLIP's published ViT-B/16."""
    with torch.device('meta'):
        shapes = {key: value.shape for key, value in timm.create_model('vit_base_patch16_224').state_dict().items()}
    shapes = {f'module.visual.{key}': shape for key, shape in shapes.items() if not key.startswith('head.')}
    shapes['module.image_projection'] = (768, 512)
    return {key: torch.zeros((), device='cpu').expand(shape) for key, shape in shapes.items()}


@pytest.mark.filterwarnings('ignore:for .* copying from a non-meta parameter')
@pytest.mark.parametrize('name', rest_slow(CONFIGS, BASE))
def test_config_builds_at_its_real_size(name, on_meta, slip_weights, monkeypatch):
    cfg = with_random_teacher(name)
    if 'slip' in name:  # the one whose fine-tuning gives the 82.6 that the paper quotes
        assert Path(cfg.model.head.teacher.pretrained).name == 'slip_base_25ep.pt'
        monkeypatch.setattr('mmmilan.teachers.timm.read_weights', lambda path: slip_weights)
    model = MODELS.build(cfg.model)
    encoder = sum(parameter.numel() for parameter in model.backbone.parameters())
    assert encoder == (303_301_632 if 'large' in name else 85_798_656)  # without a classifier
    assert model.backbone.num_patches == 196 and model.masking.num_visible(196) == 49
    if not isinstance(model.neck, LinearProjection):
        assert len(model.neck.decoder_blocks) == 8 and model.neck.mask_token.shape[-1] == 512
    model.loss(torch.empty(2, 3, 224, 224), [DataSample(), DataSample()])['loss'].backward()  # a step, but the update
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


# Tables 5, 9 and 10 of the paper, and the published variants
CELLS = {
    MAE: (PixelTarget, None, MAEDecoder, RandomMasking, 400),
    'mae_vit-base-p16_16xb256-amp-coslr-1600e_in1k': (PixelTarget, None, MAEDecoder, RandomMasking, 1600),
    'milan-mae-decoder-random-masking_vit-base-p16_16xb256-amp-coslr-400e_in1k': (
        CLIPTarget, 'ViT-B-16-quickgelu', MAEDecoder, RandomMasking, 400,
    ),
    'milan-pixel-random-masking_vit-base-p16_16xb256-amp-coslr-400e_in1k': (
        PixelTarget, None, PromptingDecoder, RandomMasking, 400,
    ),
    'milan-pixel-mae-decoder_vit-base-p16_16xb256-amp-coslr-400e_in1k': (
        PixelTarget, 'ViT-B-16-quickgelu', MAEDecoder, SemanticAwareMasking, 400,
    ),
    'milan-pixel_vit-base-p16_16xb256-amp-coslr-400e_in1k': (
        PixelTarget, 'ViT-B-16-quickgelu', PromptingDecoder, SemanticAwareMasking, 400,
    ),
    'milan-mae-decoder_vit-base-p16_16xb256-amp-coslr-400e_in1k': (
        CLIPTarget, 'ViT-B-16-quickgelu', MAEDecoder, SemanticAwareMasking, 400,
    ),
    'milan-random-masking_vit-base-p16_16xb256-amp-coslr-400e_in1k': (
        CLIPTarget, 'ViT-B-16-quickgelu', PromptingDecoder, RandomMasking, 400,
    ),
    BASE: (CLIPTarget, 'ViT-B-16-quickgelu', PromptingDecoder, SemanticAwareMasking, 400),
    'milan_vit-base-p16_16xb256-amp-coslr-1600e_in1k': (
        CLIPTarget, 'ViT-B-16-quickgelu', PromptingDecoder, SemanticAwareMasking, 1600,
    ),
    SLIP: (
        CLIPTarget, 'vit_base_patch16_224', PromptingDecoder, SemanticAwareMasking, 400,
    ),
    'milan-clip-base_vit-large-p16_16xb256-amp-coslr-400e_in1k': (
        CLIPTarget, 'ViT-B-16-quickgelu', PromptingDecoder, SemanticAwareMasking, 400,
    ),
    LARGE: (CLIPTarget, 'ViT-L-14-quickgelu', PromptingDecoder, SemanticAwareMasking, 400),
    'milan-distillation_vit-base-p16_16xb256-amp-coslr-400e_in1k': (
        CLIPTarget, 'ViT-B-16-quickgelu', LinearProjection, SemanticAwareMasking, 400,
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', CELLS)
def test_cells_of_the_papers_tables(name):
    cfg = Config.fromfile(CONFIGS[name])
    parts = (cfg.model.head.type, cfg.model.neck.type, cfg.model.masking.type)
    target, teacher, decoder, masking, epochs = CELLS[name]
    assert parts == tuple(f'mmmilan.{part.__name__}' for part in (target, decoder, masking))
    assert (cfg.model.head.get('teacher') or {}).get('model') == teacher
    assert cfg.train_cfg.max_epochs == epochs
    warm_up, cosine = cfg.param_scheduler
    assert (warm_up.end, cosine.begin, cosine.end, cosine.T_max) == (40, 40, epochs, epochs - 40)
    if target is PixelTarget:
        assert cfg.model.head.norm_pix


def test_recipe():
    """Appendix A.1."""
    cfg = Config.fromfile(CONFIGS[BASE])
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.betas, optimizer.weight_decay) == ('AdamW', (0.9, 0.95), 0.05)
    assert optimizer.lr == pytest.approx(1.5e-4 * 4096 / 256)
    assert cfg.auto_scale_lr.base_batch_size == 16 * cfg.train_dataloader.batch_size == 4096
    assert cfg.model.masking.mask_ratio == 0.75
    crop = cfg.train_dataloader.dataset.pipeline[0]
    assert crop.type == 'mmmilan.LoadRandomResizedCrop'
    assert (crop.scale, crop.crop_ratio_range, crop.flip_prob) == (224, (0.2, 1.0), 0.5)


@pytest.mark.parametrize('name', [BASE, LARGE, MAE])
def test_weight_decay_on_weights_alone(name, on_meta):
    """None on norms, biases and tokens; positions are not trained at all."""
    cfg = with_random_teacher(name)
    model = MODELS.build(cfg.model)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    assert len(norms) > 4 * 8
    for key, parameter in model.named_parameters():
        if key.endswith('pos_embed'):
            assert id(parameter) not in decay and not parameter.requires_grad
        elif id(parameter) in norms or key.endswith(('.bias', 'cls_token', 'mask_token')):
            assert decay.pop(id(parameter)) == 0, key
        else:
            assert key.endswith('.weight') and decay.pop(id(parameter)) == 0.05, key
    assert not decay  # every parameter, and nothing else


@pytest.mark.data
@pytest.mark.parametrize('name', [BASE, pytest.param(LARGE, marks=pytest.mark.slow)])
def test_step_on_real_images(name):
    """One training step at the real size, through the config's data pipeline and optimizer."""
    images = real_data('imagenet_sample/train')
    cfg = with_random_teacher(name)
    cfg.optim_wrapper.type = 'OptimWrapper'  # float32, for CPUs that only emulate bfloat16
    cfg.train_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.train_dataloader.dataset.data_root = str(images)
    data = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    model: MILAN = MODELS.build(cfg.model)
    model.init_weights()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    watched = [key for key, _ in model.named_parameters() if key.endswith(('pos_embed', 'cls_token', 'pred.weight'))]
    before = {key: model.get_parameter(key).detach().clone() for key in watched}
    loss = model.train_step(data, wrapper)['loss'].item()
    assert 1.5 < loss < 2.5  # 2 - 2 cos of directions that know nothing of each other
    moved = {key for key, value in before.items() if not torch.equal(model.get_parameter(key), value)}
    assert moved == {'backbone.cls_token', 'neck.decoder_pred.weight'}
