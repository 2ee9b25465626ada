"""MaskCLIP's configs: each states only its difference, builds at its real size, and is the published recipe."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from helpers import ROOT, own_settings, rest_slow, restated
from mmmilan.models import CodewordTarget, FeatureTarget, MaskCLIP, OpenCLIPTeacher, PixelTarget
from mmmilan.registry import MODELS

FOLDER = ROOT / 'configs/maskclip'
CONFIGS = {path.stem: path for folder in ('.', 'ablations') for path in (FOLDER / folder).glob('*.py')}
BENCHMARKS = {path.stem: path for path in (FOLDER / 'benchmarks').glob('*.py')}
ENCODERS = [name for name in BENCHMARKS if not name.startswith('maskclip_')]
SUFFIX = '_vit-base-p16_16xb256-amp-coslr-25e_yfcc15m'
BASE = f'maskclip{SUFFIX}'
DEMO = ROOT / 'configs/demo/maskclip_vit-tiny-p8_scenes.py'


@pytest.mark.parametrize('path', [*CONFIGS.values(), *BENCHMARKS.values(), DEMO], ids=lambda path: path.stem)
def test_config_states_only_its_difference(path):
    own = own_settings(path)
    bases = own.pop('_base_')
    for base in [bases] if isinstance(bases, str) else bases:
        assert list(restated(own, Config.fromfile(path.parent / base).to_dict())) == []


def build(path) -> MaskCLIP:
    cfg = Config.fromfile(path)
    if 'teacher' in cfg.model.head:
        cfg.model.head.teacher.pretrained = None  # random weights: nothing to download
    return MODELS.build(cfg.model)


# weights, loss, depth of the image decoder and of the text decoder
PARTS = {
    'maskclip': (0.05, 0.05, CodewordTarget, 1, 1),
    'clip': (0, 0, None, None, None),
    'clip-distillation': (0.05, 0, CodewordTarget, 1, None),
    'clip-language': (0, 0.05, None, None, 1),
    'maskclip-mse': (0.05, 0.05, FeatureTarget, 1, 1),
    'maskclip-decoder4': (0.05, 0.05, CodewordTarget, 4, 1),
    'maskclip-decoder8': (0.05, 0.05, CodewordTarget, 8, 1),
    'maskclip-text-decoder4': (0.05, 0.05, CodewordTarget, 1, 4),
    'maskclip-external-teacher': (0.05, 0.05, CodewordTarget, 1, 1),
    'clip-mae': (0.05, 0, PixelTarget, 1, None),
}


@pytest.mark.filterwarnings('ignore:for .* copying from a non-meta parameter')
@pytest.mark.parametrize('name', rest_slow(PARTS, 'maskclip', 'clip-mae'))
def test_ablation_at_its_real_size(name, on_meta):
    model = build(CONFIGS[f'{name}{SUFFIX}'])
    assert sum(p.numel() for p in model.backbone.parameters()) == 85_798_656
    assert sum(p.numel() for p in model.text.parameters()) == 63_428_096  # as in OpenAI's ViT-B/16
    head, neck, language = (getattr(model, part, None) for part in ('head', 'neck', 'language'))
    assert (
        model.distillation_weight,
        model.language_weight,
        head and type(head),
        neck and len(neck.decoder_blocks),
        language and len(language.decoder_blocks.layers),
    ) == PARTS[name]
    if head is not None:
        assert model.masking.num_visible(196) == 49
        assert isinstance(head.teacher, OpenCLIPTeacher) == ('external' in name)
        assert (model.mean_teacher is None) == (name in ('maskclip-external-teacher', 'clip-mae'))
        if isinstance(head, CodewordTarget):
            assert head.tokenizer.weight.shape == (8192, 512 if 'external' in name else 768)


def test_every_config_is_an_ablation_of_the_table():
    assert {f'{name}{SUFFIX}' for name in (*PARTS, 'two-stage')} == set(CONFIGS)


def test_two_stages(monkeypatch, clip_file):
    """The second is a masked image model of the features of the CLIP that was trained first."""
    first = f'work_dirs/clip{SUFFIX}/epoch_25.pth'
    assert Config.fromfile(CONFIGS[f'two-stage{SUFFIX}']).model.head.teacher.pretrained == first
    monkeypatch.setenv('PRETRAIN', clip_file)
    cfg = Config.fromfile(CONFIGS[f'two-stage{SUFFIX}'])
    assert MODELS.build(cfg.model.head).teacher.feature_dim == 24
    own, base = cfg.train_dataloader, Config.fromfile(CONFIGS[BASE]).train_dataloader
    assert (own.sampler, own.dataset.type) == (base.sampler, base.dataset.type)
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 25


def test_recipe():
    """The numbers whose sources configs/maskclip/README.md lists."""
    cfg = Config.fromfile(CONFIGS[BASE])
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', 1e-3, 0.2)
    assert cfg.auto_scale_lr.base_batch_size == 16 * cfg.train_dataloader.batch_size == 4096
    warm_up, cosine = cfg.param_scheduler
    assert cfg.train_cfg.max_epochs == cosine.end == warm_up.end + cosine.T_max == 25
    hook = cfg.default_hooks.mean_teacher
    assert (hook.start, hook.end) == (0.999, 0.9999)
    assert (cfg.model.masking.mask_ratio, cfg.model.language.mask_ratio) == (0.75, 0.2)
    text = cfg.model.text
    assert (text.layers, text.width, cfg.model.neck.decoder_depth) == (12, 512, 1)
    lengths = [t.context_length for t in cfg.train_dataloader.dataset.pipeline if t.type == 'mmmilan.TokenizeCaption']
    assert lengths == [text.context_length]


def test_weight_decay_on_weights_alone(on_meta):
    """None on norms, biases, tokens, positions and temperature; sine-cosine positions are not trained at all."""
    cfg = Config.fromfile(CONFIGS[BASE])
    model = build(CONFIGS[BASE])
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    decay = {id(p): group['weight_decay'] for group in wrapper.optimizer.param_groups for p in group['params']}
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    tokens = ('bias', 'cls_token', 'mask_token', 'positional_embedding', 'logit_scale')
    for key, parameter in model.named_parameters():
        if key.endswith('pos_embed'):
            assert id(parameter) not in decay
        else:
            assert decay.pop(id(parameter)) == (0 if id(parameter) in norms or key.endswith(tokens) else 0.2), key
    assert not decay


def test_mean_teacher_is_in_no_parameter_group(on_meta):
    model = build(CONFIGS[BASE])
    optimizer = build_optim_wrapper(model, Config.fromfile(CONFIGS[BASE]).optim_wrapper).optimizer
    trained = sum(p.numel() for group in optimizer.param_groups for p in group['params'])
    assert trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(b.numel() for b in model.mean_teacher.buffers()) == 85_798_656


@pytest.mark.parametrize('name', ENCODERS)
def test_transfer_starts_from_the_checkpoint_of_the_recipe(name):
    backbone = Config.fromfile(BENCHMARKS[name]).model.backbone
    assert backbone.init_cfg.checkpoint == BASE
    assert (backbone.get('patch_size', 16), backbone.arch) == (16, 'base')


def test_evaluations():
    retrievals = [f'maskclip_vit-base-p16_retrieval_{name}' for name in ('flickr30k', 'coco')]
    assert set(BENCHMARKS) - set(ENCODERS) == {*retrievals, 'maskclip_vit-base-p16_zero-shot_custom'}
    zero_shot = Config.fromfile(CONFIGS[BASE])
    assert (zero_shot.test_cfg.type, zero_shot.test_evaluator.type) == ('mmmilan.ZeroShotLoop', 'mmpretrain.Accuracy')
    for name in retrievals:
        retrieval = Config.fromfile(BENCHMARKS[name])
        assert 'type' not in retrieval.test_cfg and retrieval.test_evaluator.type == 'mmmilan.RetrievalRecall'


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:for .* copying from a non-meta parameter')
def test_a_step_of_the_base_at_its_real_size(on_meta):
    """Shapes of all parts fit on images of 224 pixels."""
    model = build(CONFIGS[BASE])
    images = torch.empty(2, 3, 224, 224)
    loss = model.distil(images)
    assert loss.shape == () and model.encode_image(images).shape == (2, 512)
    assert model.encode_text(torch.zeros(2, 77, dtype=torch.int64)).shape == (2, 512)
