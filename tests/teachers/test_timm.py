"""timm's ViTs as teachers: files, grids, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers import relative_error
from mmmilan.errors import InputError


@torch.no_grad()
def timm_reference(vit: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """timm's own features of all tokens, and attention of the class token in the last block."""
    seen = []
    attn = vit.blocks[-1].attn
    hook = attn.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    features = vit.forward_features(images)
    hook.remove()
    query, key, _ = attn.qkv(seen[0]).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attention = (query @ key.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(-1).mean(1)
    return features, attention[:, 0, 1:]


def test_timm(build, vit):
    vit, path = vit
    teacher = build(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=path, input_size=64)
    assert (teacher.feature_dim, teacher.patch_size, teacher.num_patches) == (192, 16, 16)
    images = torch.randn(3, 3, 64, 64)
    features, importance = timm_reference(vit, images)
    ours, our_importance = teacher(images)
    assert relative_error(ours, features) < 1e-5
    assert relative_error(our_importance, importance) < 1e-5


def test_timm_on_another_grid(build, vit):
    """A file of 4 x 4 positions in a teacher of 6 x 6, resized as by timm."""
    vit, path = vit
    teacher = build(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=path, input_size=96)
    images = torch.randn(2, 3, 96, 96)
    vit.set_input_size(96)
    features, importance = timm_reference(vit, images)
    ours, our_importance = teacher(images)
    assert relative_error(ours, features) < 1e-5
    assert relative_error(our_importance, importance) < 1e-5


def test_slip_file(build, vit, tmp_path):
    """SLIP's file: the ViT under visual., a text tower, and a projection to the joint space."""
    vit, _ = vit
    weights = {f'module.visual.{key}': value for key, value in vit.state_dict().items()}
    weights['module.image_projection'] = projection = torch.randn(192, 40)
    weights |= {'module.text_projection': torch.zeros(8, 40), 'module.positional_embedding': torch.zeros(77, 8)}
    weights |= {'module.transformer.resblocks.0.ln_1.weight': torch.zeros(8), 'module.logit_scale': torch.zeros(())}
    torch.save(dict(epoch=25, state_dict=weights), tmp_path / 'slip.pt')
    path = str(tmp_path / 'slip.pt')
    teacher = build(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=path, input_size=64)
    assert teacher.feature_dim == 40
    images = torch.randn(3, 3, 64, 64)
    features, importance = timm_reference(vit, images)
    ours, our_importance = teacher(images)
    assert relative_error(ours, features @ projection) < 1e-5
    assert relative_error(our_importance, importance) < 1e-5


def test_refused_models_of_timm(build, vit):
    _, path = vit
    with pytest.raises(InputError, match="timm has no model 'vit_tinny'"):
        build(type='mmmilan.TimmTeacher', model='vit_tinny', pretrained=None)
    with pytest.raises(InputError, match='resnet10t is convolutional or hierarchical'):
        build(type='mmmilan.TimmTeacher', model='resnet10t', pretrained=None)
    with pytest.raises(InputError, match='input_size=200 is not a multiple of its patch size 16; choose 192 or 208'):
        build(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=path, input_size=(224, 200))
    with pytest.raises(InputError, match='vit.pth does not fit vit_'):
        build(type='mmmilan.TimmTeacher', model='vit_small_patch16_224', pretrained=path, input_size=64)


def test_random_weights_are_logged(build, log):
    build(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=None, input_size=32)
    assert 'pretrained=None gives random weights' in log.text
