"""Semantic-aware probing: the encoder sees the patches that the teacher attends to, and only a linear layer learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from helpers import TINY_ARCH, labelled_folder, read_metrics, read_scalars, strip_prefix
from mmmilan.checkpoints.io import load_checkpoint_file
from mmmilan.errors import InputError
from mmmilan.registry import MODELS

PROBING = 'vit-base-p16_milan-pre_8xb2048-semantic-aware-linear-coslr-100e_in1k.py'


def attention_by_hand(official: dict[str, Tensor], images: Tensor) -> Tensor:
    """Attention [B, 16] of the class token in the last block of the recorded CLIP, mean over its heads."""
    clip = strip_prefix(official, 'clip/visual.')
    x = F.conv2d(images, clip['conv1.weight'], stride=16).flatten(2).mT
    x = torch.cat([clip['class_embedding'].expand(len(x), 1, -1), x], dim=1) + clip['positional_embedding']
    x = F.layer_norm(x, (128,), clip['ln_pre.weight'], clip['ln_pre.bias'])
    block = strip_prefix(clip, 'transformer.resblocks.0.')
    attn = nn.MultiheadAttention(128, 2, batch_first=True)
    attn.load_state_dict(strip_prefix(block, 'attn.'))
    y = F.layer_norm(x, (128,), block['ln_1.weight'], block['ln_1.bias'])
    x = x + attn(y, y, y)[0]
    y = F.layer_norm(x, (128,), block['ln_2.weight'], block['ln_2.bias'])
    y = F.linear(y, block['mlp.c_fc.weight'], block['mlp.c_fc.bias'])
    x = x + F.linear(y * torch.sigmoid(1.702 * y), block['mlp.c_proj.weight'], block['mlp.c_proj.bias'])
    last = strip_prefix(clip, 'transformer.resblocks.1.')
    attn.load_state_dict(strip_prefix(last, 'attn.'))
    y = F.layer_norm(x, (128,), last['ln_1.weight'], last['ln_1.bias'])
    return attn(y, y, y, need_weights=True)[1][:, 0, 1:]


@pytest.fixture
def probing_config(benchmark_config, clip_file, pretrained_checkpoint, labelled_images):
    validation = labelled_folder(labelled_images / 'val')
    changes = {'val_dataloader.dataset': validation, 'test_dataloader.dataset': validation}
    changes |= {'train_dataloader.dataset.data_root': str(labelled_images / 'train')}
    changes |= {'model.backbone.teacher': dict(model=None, pretrained=clip_file)}
    changes |= {'model.backbone.frozen_stages': 2, 'model.backbone.init_cfg.checkpoint': str(pretrained_checkpoint)}
    changes |= {f'model.{part}.num_classes': 5 for part in ('head', 'data_preprocessor')}
    return benchmark_config(PROBING, changes | {'model.neck.input_features': 48})


@pytest.fixture
def probe(probing_config):
    cfg = Config.fromfile(probing_config).model
    cfg.backbone.init_cfg = None
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def test_encoder_sees_the_top_half(probe, official):
    """The top half of an attention by hand; the class token is that of an encoder on these patches alone."""
    images = torch.randn(6, 3, 64, 64)
    with torch.no_grad():
        importance = attention_by_hand(official, images)
    top_half = [sorted(range(16), key=row.__getitem__)[8:] for row in importance.tolist()]
    seen = []
    probe.backbone.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    features = {}
    for training in (True, False):  # both modes see the same patches
        probe.train(training)
        features[training] = probe.extract_feat(images, stage='backbone')[-1]
    assert torch.equal(features[True], features[False])

    backbone = probe.backbone
    tokens = backbone.patch_embed(images)[0] + backbone.pos_embed[:, 1:]
    for i, patches in enumerate(top_half):
        x = torch.cat([backbone.cls_token[0] + backbone.pos_embed[0, :1], tokens[i, patches]])
        torch.testing.assert_close(sorted_rows(seen[0][i]), sorted_rows(x), atol=1e-5, rtol=1e-5)
        for layer in backbone.layers:
            x = layer(x[None])[0]
        torch.testing.assert_close(features[True][i], backbone.ln1(x)[0], atol=1e-5, rtol=1e-5)


def sorted_rows(tokens: Tensor) -> Tensor:
    return tokens[tokens[:, 0].argsort()]


def test_the_teacher_sees_its_own_pixels(probing_config):
    """However the images of the encoder are normalised."""
    images, importance = torch.randint(0, 256, (2, 3, 64, 64)).float(), []
    for mean, std in (([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]), ([127.5] * 3, [127.5] * 3)):
        cfg = Config.fromfile(probing_config).model
        cfg.backbone.init_cfg = None
        cfg.backbone.teacher.teacher_mean_std = 'own'
        cfg.data_preprocessor.update(mean=mean, std=std)
        model = MODELS.build(cfg)
        inputs = model.data_preprocessor(dict(inputs=images))['inputs']
        importance.append(model.backbone.teacher(inputs)[1])
    torch.testing.assert_close(*importance, atol=1e-5, rtol=1e-4)


def test_probing_trains_the_linear_layer_alone(probe):
    samples = [DataSample().set_gt_label(i % 5) for i in range(6)]
    probe.train()
    probe.loss(torch.randn(6, 3, 64, 64), samples)['loss'].backward()
    with_gradient = {key for key, parameter in probe.named_parameters() if parameter.grad is not None}
    assert with_gradient == {'head.layers.head.weight', 'head.layers.head.bias'}
    teacher = probe.backbone.teacher.module
    assert not teacher.training and not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    held = {p.data_ptr() for p in teacher.parameters()}
    assert len(held) > 20 and not held & {value.data_ptr() for value in probe.state_dict().values()}
    encoder = {key for key in probe.state_dict() if key.startswith('backbone.')}
    plain = MODELS.build(dict(type='mmmilan.MILANViT', arch=TINY_ARCH, img_size=64, patch_size=16))
    assert encoder == {f'backbone.{key}' for key in plain.state_dict()}  # any encoder checkpoint fits


def test_probing_through_the_tools(probing_config, pretrained_checkpoint, run_tool, tmp_path):
    """The encoder stays equal to the bit, no checkpoint has the teacher, and both tools give one accuracy."""
    run_tool('train.py', probing_config, '--cfg-options', 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1')
    before = load_checkpoint_file(pretrained_checkpoint)['state_dict']
    after = load_checkpoint_file(tmp_path / 'work/epoch_1.pth')['state_dict']
    encoder = {key for key in before if key.startswith('backbone.')}
    head = {'head.layers.head.weight', 'head.layers.head.bias'}
    statistics = {f'neck.bn.{key}' for key in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert after.keys() - encoder == head | statistics
    assert all(torch.equal(after[key], before[key]) for key in encoder)
    run_tool('test.py', probing_config, tmp_path / 'work/epoch_1.pth', '--work-dir', tmp_path / 'test')
    accuracies = [record['accuracy/top1'] for record in read_scalars(tmp_path / 'work') if 'accuracy/top1' in record]
    assert accuracies == [read_metrics(tmp_path / 'test')['accuracy/top1']]


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(keep_ratio=0.05), 'keep_ratio=0.05 shows 0 of 16 patches'),
        (dict(keep_ratio=1.5), 'keep_ratio=1.5 shows 24 of 16 patches'),
        (dict(img_size=96), 'teacher sees .* set teacher.input_size to'),
    ],
)
def test_refused_probing_options(clip_file, changes, message):
    teacher = dict(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    cfg = dict(type='mmmilan.SemanticAwareViT', teacher=teacher, arch=TINY_ARCH, img_size=64, patch_size=16) | changes
    with pytest.raises(InputError, match=message):
        MODELS.build(cfg)
