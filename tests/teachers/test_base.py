"""Options of all teachers (normalisation, grids, precision, compilation); teachers stay out of training."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.registry import MODELS as ROOT_MODELS
from torchvision.transforms.functional import InterpolationMode, resize

from helpers import randomise, relative_error, rest_slow
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from mmmilan.teachers import Teacher
from mmmilan.teachers.base import statistics_of

FAMILIES = {
    'CLIP': dict(type='mmmilan.OpenCLIPTeacher', model='ViT-S-32', input_size=64),
    'SigLIP': dict(type='mmmilan.OpenCLIPTeacher', model='ViT-B-16-SigLIP2', input_size=32),
    'PE': dict(type='mmmilan.OpenCLIPTeacher', model='PE-Core-T-16-384', input_size=64),
    'DINOv3': dict(type='mmmilan.TimmTeacher', model='vit_small_patch16_dinov3', pretrained=None, input_size=64),
    'DINOv2': dict(type='mmmilan.TimmTeacher', model='vit_small_patch14_dinov2', pretrained=None, input_size=56),
}
TINY = dict(type='mmmilan.TimmTeacher', model='vit_small_patch16_dinov3', pretrained=None, input_size=64)


@pytest.fixture(params=rest_slow(FAMILIES, 'CLIP', 'DINOv3'))
def cfg(request, shallow):
    return FAMILIES[request.param]


# -- normalisation


def test_own_normalisation(build, shallow):
    """The teacher with its own normalisation equals SigLIP on the picture normalised as SigLIP's were."""
    plain = build(**FAMILIES['SigLIP'])
    own = build(**FAMILIES['SigLIP'], teacher_mean_std='own')
    own.tower.load_state_dict(plain.tower.state_dict())
    picture = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    students = (picture - mean[:, None, None]) / std[:, None, None]
    for actual, expected in zip(own(students), plain((picture - 0.5) / 0.5), strict=True):
        assert relative_error(actual, expected) < 1e-5
    assert relative_error(plain(students)[0], own(students)[0]) > 1e-3
    with pytest.raises(InputError, match="teacher_mean_std='imagenet' is unknown; choose 'own' or None"):
        build(**TINY, teacher_mean_std='imagenet')


def test_own_normalisation_of_a_file(clip_file, build):
    """A file in OpenAI's layout has CLIP's statistics."""
    teacher = build(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file, teacher_mean_std='own')
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    prepared = teacher.prepare(black[None, :, None, None].expand(1, 3, 64, 64))
    assert prepared[0, :, 0, 0].tolist() == pytest.approx([-0.48145466 / 0.26862954, -1.7520971, -1.4802198], rel=1e-5)


# -- grids


@pytest.mark.parametrize('grid', [(6, 6), (2, 3)])
def test_features_on_the_grid_of_the_student(clip, build, grid):
    """Against torchvision's resizing of the maps; the class token stays."""
    name, path = clip
    plain = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path)
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=path, grid_size=grid)
    assert teacher.grid == grid and teacher.num_patches == grid[0] * grid[1]
    assert f'interpolated to {grid[0]} x {grid[1]}' in teacher.describe()
    images = torch.randn(2, 3, 56, 56)
    features, importance = plain(images)
    resized, resized_importance = teacher(images)

    def maps(x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2).unflatten(2, (4, 4))
        return resize(x, grid, InterpolationMode.BILINEAR, antialias=True).flatten(2).transpose(1, 2)

    assert torch.equal(resized[:, 0], features[:, 0])
    assert relative_error(resized[:, 1:], maps(features[:, 1:])) < 1e-5
    expected = maps(importance[..., None])[..., 0] * 16 / teacher.num_patches
    assert relative_error(resized_importance, expected) < 1e-5
    [tokens], _ = teacher.forward_layers(images, [0])
    assert relative_error(tokens[:, 1:], maps(plain.forward_layers(images, [0])[0][0][:, 1:])) < 1e-5


@pytest.mark.parametrize('way', [dict(input_size=96), dict(grid_size=6)], ids=['input_size', 'grid_size'])
def test_both_ways_to_a_larger_grid_train(milan_cfg, way):
    milan_cfg['backbone']['img_size'] = 96
    milan_cfg['neck']['num_patches'] = 36
    milan_cfg['head']['teacher'].update(way)
    model = MODELS.build(milan_cfg)
    model.init_weights()
    loss = model.loss(torch.randn(2, 3, 96, 96))['loss']
    loss.backward()
    assert 0 < loss < 4 and model.backbone.patch_embed.projection.weight.grad.abs().max() > 0


# -- precision


def test_bfloat16_weights_change_no_bit(cfg, build):
    """The result equals that of autocast, inside autocast or not, in half the memory."""
    torch.manual_seed(0)
    plain = randomise(build(**cfg))
    held = build(**cfg, weight_dtype='bfloat16')
    held.tower.load_state_dict(plain.tower.state_dict())
    images = torch.randn(2, 3, *plain.input_size)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected = plain(images)
        assert all(map(torch.equal, held(images), expected))
    assert all(map(torch.equal, held(images), expected))
    assert bytes_of(held) < 0.62 * bytes_of(plain)
    float32 = plain(images)
    assert 0 < relative_error(expected[0], float32[0]) < 0.1  # bfloat16 has an effect


def test_float16_is_nearer_to_float32_than_bfloat16(cfg, build):
    """The whole teacher runs in float16, inside autocast or not; the student gets float32."""
    torch.manual_seed(0)
    teacher = randomise(build(**cfg, weight_dtype='float16'))
    images = torch.randn(2, 3, *teacher.input_size)
    expected = teacher(images)  # on a CPU, the option alone has no effect
    with torch.autocast('cpu', dtype=torch.bfloat16):
        in_bfloat16 = teacher(images)
    teacher.run_in_float16()
    actual = teacher(images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert all(map(torch.equal, teacher(images), actual))
    for value, worse, right in zip(actual, in_bfloat16, expected, strict=True):
        assert value.dtype == torch.float32
        assert 0 < relative_error(value, right) < 0.5 * relative_error(worse, right)


def bytes_of(teacher: Teacher) -> int:
    return sum(parameter.nbytes for parameter in teacher.parameters())


def test_unknown_precision(build):
    with pytest.raises(InputError, match="weight_dtype='float8' is unknown; choose 'float16', 'bfloat16' or None"):
        build(**TINY, weight_dtype='float8')


# -- compilation


@pytest.mark.slow
def test_compiles_as_one_graph(cfg, build):
    """Without a graph break, and with the same result."""
    teacher = randomise(build(**cfg, teacher_mean_std='own'))
    images = torch.randn(2, 3, 2 * teacher.input_size[0], 2 * teacher.input_size[1])
    expected = teacher(images)
    torch._dynamo.reset()
    actual = torch.compile(teacher.forward, backend='eager', fullgraph=True, dynamic=False)(images)
    for ours, eager in zip(actual, expected, strict=True):
        assert relative_error(ours, eager) < 1e-5


# -- training


@pytest.fixture
def model(milan_cfg, shallow):
    """The small MILAN with a teacher that has rotary positions and registers."""
    milan_cfg['head']['teacher'] = copy.deepcopy(TINY)
    milan_cfg['neck']['predict_feature_dim'] = 384
    return ROOT_MODELS.build(milan_cfg)


def test_teacher_stays_out_of_training(model):
    """It has no gradient, is not in the state dict, and stays in eval mode."""
    before = copy.deepcopy(model.head.teacher.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train().loss(torch.randn(2, 3, 64, 64))['loss'].backward()
    optimizer.step()
    teacher = model.head.teacher
    assert not any(module.training for module in teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert not [key for key in model.state_dict() if 'teacher' in key or 'vit' in key or 'tower' in key]
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_teacher_has_no_state(model):
    """It draws no random numbers and keeps nothing of a batch, so a resumed run continues unchanged."""
    images = torch.randn(2, 3, 64, 64)
    first = model.head.teacher(images)
    state = torch.get_rng_state()
    model.head.teacher(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    assert all(map(torch.equal, model.head.teacher(images), first))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(('to_rgb', 'said'), [(dict(to_rgb=True), False), (dict(bgr_to_rgb=True), False), ({}, True)])
def test_images_that_may_be_bgr(to_rgb, said, log):
    mean, _ = statistics_of(dict(mean=[51, 102, 153], std=[51, 51, 51], **to_rgb))
    assert mean == [0.2, 0.4, 0.6]
    assert ('the teacher sees BGR images, unless the pipeline gives RGB ones' in log.text) == said
