"""The teachers against the libraries that their weights come from."""

from __future__ import annotations

import json

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn

from helpers import assert_clip, relative_error
from mmmilan.errors import InputError
from mmmilan.models.teachers import Teacher
from mmmilan.registry import MODELS

VISION = dict(image_size=56, patch_size=14, width=64, layers=3, head_width=16)


def build(**cfg) -> Teacher:
    return MODELS.build(dict(cfg)).eval()


def randomise(model: nn.Module) -> nn.Module:
    """Random weights, large enough for an attention that tells patches apart; in eval mode."""
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


@pytest.fixture(params=[True, False], ids=['QuickGELU', 'GELU'])
def clip(request, tmp_path):
    """Name of a small open_clip model whose ViT has the patches of ViT-L/14, and its weights, all random."""
    name = f'milan-test-{request.param}'
    text = dict(context_length=8, vocab_size=32, width=16, heads=2, layers=1)
    for size in (56, 196):
        cfg = dict(embed_dim=24, quick_gelu=request.param, vision_cfg=VISION | dict(image_size=size), text_cfg=text)
        (tmp_path / f'{name}-{size}.json').write_text(json.dumps(cfg))
    open_clip.add_model_config(tmp_path)
    weights = randomise(open_clip.create_model(f'{name}-56')).state_dict()
    torch.save(weights, tmp_path / 'clip.pt')
    return name, str(tmp_path / 'clip.pt')


def test_open_clip(clip):
    name, path = clip
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path)
    assert (teacher.feature_dim, teacher.patch_size, teacher.num_patches) == (24, 14, 16)
    images = torch.randn(3, 3, 56, 56)
    assert_clip(teacher, images, open_clip.create_model(f'{name}-56', pretrained=path).eval().visual, images)


@torch.no_grad()
def test_tokens_of_several_layers(clip, vit):
    """Against the libraries' own intermediate tokens; the last ones give the features."""
    name, path = clip
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path)
    visual = open_clip.create_model(f'{name}-56', pretrained=path).eval().visual
    images = torch.randn(3, 3, 56, 56)
    own = visual.forward_intermediates(images, output_fmt='NLC', output_extra_tokens=True)
    own = [
        torch.cat(pair, 1) for pair in zip(own['image_intermediates_prefix'], own['image_intermediates'], strict=True)
    ]
    assert_layers(teacher, images, own)

    vit, path = vit
    teacher = build(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=path, input_size=64)
    images = torch.randn(3, 3, 64, 64)
    own = vit.forward_intermediates(images, output_fmt='NLC', return_prefix_tokens=True, intermediates_only=True)
    assert_layers(teacher, images, [torch.cat((prefix, patches), 1) for patches, prefix in own])


def assert_layers(teacher: Teacher, images: Tensor, own: list[Tensor]) -> None:
    features, importance = teacher(images)
    tokens, same_importance = teacher.forward_layers(images, [1, -2, 0, -1])
    for actual, expected in zip(tokens, [own[1], own[-2], own[0], own[-1]], strict=True):
        assert actual.shape == (3, 17, teacher.width)
        assert relative_error(actual, expected) < 1e-5
    assert torch.equal(teacher.project(tokens[-1]), features) and torch.equal(same_importance, importance)
    with pytest.raises(InputError, match=rf'blocks 0 to {len(own) - 1}, not all of \[0, {len(own)}\]'):
        teacher.forward_layers(images, [0, len(own)])


def test_open_clip_on_the_grid_of_the_student(clip):
    """Patches of 14 at 196 pixels for a student of patches of 16 at 224: positions as open_clip itself resizes them."""
    name, path = clip
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path, input_size=196)
    assert teacher.num_patches == 14 * 14
    images = torch.randn(2, 3, 224, 224)
    resized = nn.functional.interpolate(images, size=(196, 196), mode='bicubic', antialias=True)
    visual = open_clip.create_model(f'{name}-196', pretrained=path).eval().visual  # resizes the positions
    assert_clip(teacher, images, visual, resized)


def test_open_clip_refusals(clip):
    name, path = clip
    with pytest.raises(InputError, match='input_size=200 is not a multiple of its patch size 14; choose 196 or 210'):
        build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path, input_size=200)
    with pytest.raises(InputError, match="no model 'ViT-X-99'"):
        build(type='mmmilan.OpenCLIPTeacher', model='ViT-X-99')
    with pytest.raises(InputError, match="'opanai' is neither a file nor an open_clip tag of ViT-B-16"):
        build(type='mmmilan.OpenCLIPTeacher', model='ViT-B-16', pretrained='opanai')
    with pytest.raises(InputError, match='needs a model name, or a file'):
        build(type='mmmilan.OpenCLIPTeacher')


@pytest.mark.parametrize('model', ['RN50', 'convnext_base', 'coca_ViT-B-32', 'ViT-B-16-SigLIP'])
def test_open_clip_towers_that_do_not_serve(model, monkeypatch):
    """A ResNet, a ConvNeXt, a ViT with attentional pooling, a ViT without class token."""
    create_model = open_clip.create_model
    monkeypatch.setattr(open_clip, 'create_model', lambda *args, **kwargs: create_model(*args, **kwargs, device='meta'))
    with torch.device('meta'), pytest.raises(InputError, match=f'image tower of {model} is not a plain ViT'):
        build(type='mmmilan.OpenCLIPTeacher', model=model)


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


def tiny_vit(size: int) -> nn.Module:
    return timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=size)


@pytest.fixture
def vit(tmp_path):
    """timm's ViT-Ti/16 at 64 pixels with random weights, in a file."""
    vit = randomise(tiny_vit(64))
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    return vit, str(tmp_path / 'vit.pth')


def test_timm(vit):
    vit, path = vit
    teacher = build(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=path, input_size=64)
    assert (teacher.feature_dim, teacher.patch_size, teacher.num_patches) == (192, 16, 16)
    images = torch.randn(3, 3, 64, 64)
    features, importance = timm_reference(vit, images)
    ours, our_importance = teacher(images)
    assert relative_error(ours, features) < 1e-5
    assert relative_error(our_importance, importance) < 1e-5


def test_timm_on_another_grid(vit):
    """A file of 4 x 4 positions in a teacher of 6 x 6, resized as timm does it."""
    vit, path = vit
    teacher = build(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=path, input_size=96)
    images = torch.randn(2, 3, 96, 96)
    vit.set_input_size(96)
    features, importance = timm_reference(vit, images)
    ours, our_importance = teacher(images)
    assert relative_error(ours, features) < 1e-5
    assert relative_error(our_importance, importance) < 1e-5


def test_slip_file(vit, tmp_path):
    """SLIP's file: the ViT under visual., the text tower beside it, and a projection to the joint space."""
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


def test_timm_refusals(vit):
    _, path = vit
    with pytest.raises(InputError, match="timm has no model 'vit_tinny'"):
        build(type='mmmilan.TimmTeacher', model='vit_tinny', pretrained=None)
    with pytest.raises(InputError, match='resnet10t is not a plain ViT with a class token'):
        build(type='mmmilan.TimmTeacher', model='resnet10t', pretrained=None)
    with pytest.raises(InputError, match='vit.pth does not hold the weights of this timm ViT'):
        build(type='mmmilan.TimmTeacher', model='vit_small_patch16_224', pretrained=path, input_size=64)


def test_random_weights_are_said_in_the_log(log):
    build(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=None, input_size=32)
    assert 'pretrained=None gives random weights' in log.text


def test_importance_sums_to_what_the_class_token_leaves(clip_file, official):
    teacher = build(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    importance = teacher(official['input'])[1]
    assert importance.min() > 0 and (importance.sum(1) < 1).all()


def test_teacher_in_reduced_precision(clip_file, official):
    """In autocast the features are bfloat16, near those in float32; the importance is a float32 softmax."""
    teacher = build(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file)
    expected, expected_importance = teacher(official['input'])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        features, importance = teacher(official['input'])
    assert features.dtype == torch.bfloat16 and importance.dtype == torch.float32
    assert relative_error(features, expected) < 0.03
    assert relative_error(importance, expected_importance) < 0.03
