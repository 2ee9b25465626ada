"""A teacher of each family by its name, on the pixels that its library gives it: the one grammar, and no guess."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from mmengine.config import Config
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from helpers import ROOT, build_model, clip_reference, openai_numbers, randomise, relative_error
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from mmmilan.teachers import Teacher, build_teacher, teacher_config
from mmmilan.teachers.clip_source import new_visual

RECIPE = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
OWN_STATISTICS = dict(mean=[0.3, 0.4, 0.6], std=[0.2, 0.25, 0.3])


def pictures(size: int) -> list[Image.Image]:
    """Two pictures of noise on different colours."""
    rng = np.random.default_rng(0)
    shape = (size, size, 3)
    return [Image.fromarray(np.uint8(rng.uniform(low, low + 100, shape))) for low in (10, 140)]


def students_images(images: list[Image.Image], **settings: list[float]) -> Tensor:
    """What the student's data preprocessor makes of decoded images, which are BGR."""
    preprocess = MODELS.build(dict(type='mmmilan.PretrainingDataPreprocessor', to_rgb=True, **(settings or RECIPE)))
    return preprocess(dict(inputs=torch.stack([pil_to_tensor(image) for image in images]).flip(1)))['inputs']


@torch.no_grad()
def by_open_clip(name: str, images: list[Image.Image], **options: object) -> tuple[Tensor, Tensor, Tensor]:
    """open_clip's model and preprocessing: embedding, projected patches, attention of the class token."""
    clip, _, preprocess = open_clip.create_model_and_transforms(name, **options)
    return clip_reference(clip.eval().visual, torch.stack([preprocess(image) for image in images]))


@torch.no_grad()
def by_timm(vit: nn.Module, images: list[Image.Image]) -> Tensor:
    """timm's own preprocessing and features of all tokens."""
    settings = timm.data.resolve_model_data_config(vit) | dict(crop_pct=1.0)  # the pictures have the right size
    preprocess = timm.data.create_transform(**settings, is_training=False)
    return vit.eval().forward_features(torch.stack([preprocess(image) for image in images]))


def assert_same(teacher: Teacher, images: list[Image.Image], expected: tuple[Tensor, Tensor, Tensor]) -> None:
    features, importance = teacher.eval()(students_images(images))
    embedding, patches, attention = expected
    assert relative_error(features[:, 0], embedding) < 1e-4
    assert relative_error(features[:, 1:], patches) < 1e-4
    assert relative_error(importance, attention) < 1e-4
    assert embedding.std(0).min() > 0  # the pictures differ


@pytest.fixture
def folder(clip, tmp_path) -> Path:
    """A folder as open_clip writes it, with statistics of its own."""
    name, weights = clip
    folder = tmp_path / 'folder'
    folder.mkdir()
    config = dict(model_cfg=open_clip.get_model_config(f'{name}-56'), preprocess_cfg=OWN_STATISTICS)
    (folder / open_clip_config).write_text(json.dumps(config))
    safetensors.torch.save_file(
        {key: value.clone() for key, value in torch.load(weights).items()}, folder / 'open_clip_model.safetensors'
    )
    return folder


open_clip_config = 'open_clip_config.json'


# -- the same features as the libraries', from the picture on


def test_model_and_file_of_open_clip(clip):
    """With GELU as with QuickGELU: the name says it."""
    name, weights = clip
    expected = by_open_clip(f'{name}-56', images := pictures(56), pretrained=weights)
    for spelling in (f'{name}-56:{weights}', f'open_clip:{name}-56:{weights}'):
        assert_same(build_teacher(spelling), images, expected)


def test_folder_of_open_clip(folder, monkeypatch):
    """By its path or as local-dir:, and by the file in it, beside which its config is."""
    expected = by_open_clip(f'local-dir:{folder}', images := pictures(56))
    monkeypatch.chdir(folder.parent)
    names = [str(folder), folder, f'local-dir:{folder}', 'folder', 'local-dir:folder']
    for name in [*names, str(folder / 'open_clip_model.safetensors')]:
        assert_same(build_teacher(name), images, expected)
        cfg = teacher_config(name)
        assert os.path.isabs(cfg.get('model', cfg.get('pretrained')).removeprefix('local-dir:'))


def test_repository_of_open_clip(folder, tmp_path, monkeypatch):
    """From the hub's cache."""
    cached = tmp_path / 'hub/models--milan--clip'
    (cached / 'snapshots').mkdir(parents=True)
    (cached / 'refs').mkdir()
    (cached / 'refs/main').write_text('0' * 40)
    folder.rename(cached / 'snapshots' / ('0' * 40))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    expected = by_open_clip(f'local-dir:{cached / "snapshots" / ("0" * 40)}', images := pictures(56))
    assert_same(build_teacher('hf-hub:milan/clip'), images, expected)


@torch.no_grad()
def test_openai_archive(tmp_path):
    """Its state dict holds three numbers that mark it, as open_clip's own reader has them: QuickGELU, CLIP's images."""
    size = dict(image_size=64, patch_size=16, width=128, layers=2)
    clip = randomise(open_clip.model.CLIP(24, size, dict(context_length=8, layers=1, width=64, heads=1), True)).eval()
    path = str(tmp_path / 'ViT-tiny.pt')
    torch.save(clip.state_dict() | openai_numbers(), path)
    images = pictures(64)
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    preprocess = open_clip.image_transform(64, is_train=False, mean=mean, std=std)
    expected = clip_reference(clip.visual, torch.stack([preprocess(image) for image in images]))
    assert_same(build_teacher(path), images, expected)
    assert_same(build_teacher(f'file://{path}'), images, expected)


@torch.no_grad()
@pytest.mark.parametrize('mean', [[123.675, 116.28, 103.53], [10.0, 20.0, 30.0]])
def test_maskclip_checkpoint(maskclip_file, mean):
    """It is normalised as its own config says."""
    content = torch.load(maskclip_file)
    settings = dict(type='mmmilan.PretrainingDataPreprocessor', to_rgb=True, mean=mean, std=[50.0, 60.0, 70.0])
    content['meta']['cfg'] = Config(dict(model=content['meta']['model'] | dict(data_preprocessor=settings))).pretty_text
    torch.save(content, maskclip_file)
    clip = build_model(content['meta']['model'] | dict(data_preprocessor=settings)).eval()
    clip.load_state_dict(content['state_dict'])
    images = pictures(64)
    decoded = torch.stack([pil_to_tensor(image) for image in images]).flip(1)
    expected = clip.embed_joint(clip.data_preprocessor(dict(inputs=decoded))['inputs'])
    features, _ = build_teacher(maskclip_file).eval()(students_images(images))
    assert relative_error(nn.functional.normalize(features, dim=-1), expected) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize(
    'model',
    [
        pytest.param('ViT-B-16-SigLIP2', marks=pytest.mark.slow),
        'PE-Core-T-16-384',
        'ViT-L-14-CLIPA',
        'ViT-B-32-quickgelu',
    ],
)
def test_tags_of_open_clip(model, shallow, tmp_path, monkeypatch):
    """SigLIP's, PE's, CLIPA's and CLIP's tag each name other statistics; the weights stand for the published ones."""
    [tag, *_] = open_clip.list_pretrained_tags_by_model(model)
    visual = randomise(new_visual(open_clip.get_model_config(model))).eval()
    path = str(tmp_path / 'published.pt')
    torch.save({f'visual.{key}': value for key, value in visual.state_dict().items()}, path)
    monkeypatch.setattr('mmmilan.teachers.clip_source.hub_file', lambda repo, names: path)
    teacher = build_teacher(f'{model}:{tag}').eval()
    settings = open_clip.pretrained.get_pretrained_cfg(model, tag)
    images = pictures(teacher.input_size[0])
    preprocess = open_clip.image_transform(
        teacher.input_size[0], is_train=False, **{key: settings[key] for key in ('mean', 'std', 'interpolation')}
    )
    expected = visual(torch.stack([preprocess(image) for image in images]))
    features, importance = teacher(students_images(images))
    assert relative_error(features[:, 0], expected) < 1e-4
    teacher.renormalise = nn.Identity()
    same = teacher(torch.stack([preprocess(image) for image in images]))
    assert relative_error(features, same[0]) < 1e-4 and relative_error(importance, same[1]) < 1e-4


@pytest.mark.parametrize('name', ['vit_tiny_patch16_224', 'vit_tiny_patch16_224.augreg_in21k', 'deit_tiny_patch16_224'])
def test_model_and_file_of_timm(name, shallow, tmp_path):
    """timm's ViTs see images of mean 0.5, its DeiTs those of ImageNet; the tag or the model says so."""
    vit = randomise(timm.create_model(name, num_classes=0))
    torch.save(vit.state_dict(), tmp_path / 'vit.pth')
    images = pictures(224)
    expected = by_timm(vit, images)
    for spelling in (f'{name}:{tmp_path}/vit.pth', f'timm:{name}:{tmp_path}/vit.pth'):
        features, _ = build_teacher(spelling).eval()(students_images(images))
        assert relative_error(features, expected) < 1e-4


@pytest.mark.parametrize('kind', ['folder', 'file'])
def test_folder_of_timm(kind, shallow, tmp_path):
    """As timm writes it; a file in it takes the statistics from the config beside it."""
    vit = randomise(timm.create_model('vit_tiny_patch16_224', num_classes=0, img_size=64))
    vit.pretrained_cfg.update(OWN_STATISTICS, input_size=(3, 64, 64), crop_pct=1.0)
    settings = {key: vit.pretrained_cfg[key] for key in ('mean', 'std', 'input_size', 'crop_pct', 'interpolation')}
    config = dict(architecture='vit_tiny_patch16_224', num_classes=0, pretrained_cfg=settings)
    (tmp_path / 'config.json').write_text(json.dumps(config | dict(model_args=dict(img_size=64))))
    safetensors.torch.save_file(vit.state_dict(), tmp_path / 'model.safetensors')
    images = pictures(64)
    teacher = teacher_config(
        str(tmp_path) if kind == 'folder' else f'vit_tiny_patch16_224:{tmp_path}/model.safetensors'
    )
    features, _ = build_teacher(teacher | dict(input_size=64)).eval()(students_images(images))
    assert relative_error(features, by_timm(vit, images)) < 1e-4


@torch.no_grad()
def test_slip_sees_imagenets_statistics(vit, tmp_path):
    """Although timm's own weights of the model do not."""
    vit, _ = vit
    weights = {f'module.visual.{key}': value for key, value in vit.state_dict().items()}
    torch.save(weights | {'module.image_projection': (projection := torch.randn(192, 40))}, tmp_path / 'slip.pt')
    teacher = build_teacher(teacher_config(f'vit_tiny_patch16_224:{tmp_path}/slip.pt') | dict(input_size=64)).eval()
    images = students_images(pictures(64))
    assert relative_error(teacher(images)[0], vit.eval().forward_features(images) @ projection) < 1e-5


@pytest.mark.parametrize('own', [dict(mean=[127.5] * 3, std=[127.5] * 3), dict(mean=[1.0, 2.0, 3.0], std=[9.0] * 3)])
def test_student_with_another_normalisation(own, clip_file, milan_cfg):
    """The teacher sees its own pixels all the same, of each target where there are several."""
    images = pictures(64)
    expected = build_teacher(clip_file).eval()(students_images(images))
    milan_cfg['data_preprocessor'] = dict(type='mmmilan.PretrainingDataPreprocessor', to_rgb=True, **own)
    milan_cfg['head']['teacher'] = clip_file  # by name, in a config
    head = dict(type='mmmilan.SumTarget', targets=[milan_cfg['head'], dict(type='mmmilan.PixelTarget')])
    for each, width in ((milan_cfg['head'], 24), (head, 24 + 768)):
        milan_cfg['head'], milan_cfg['neck']['predict_feature_dim'] = each, width
        model = build_model(milan_cfg).eval()
        features, importance = model.head.run_teacher(students_images(images, **own))
        features = features[0] if width > 24 else features
        assert relative_error(features, expected[0]) < 1e-4 and relative_error(importance, expected[1]) < 1e-4


def test_published_configs_keep_the_students_pixels():
    """As the published code feeds CLIP; every other teacher sees its own."""
    cfg = Config.fromfile(ROOT / 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py')
    assert cfg.model.head.teacher.teacher_mean_std is None
    assert 'teacher_mean_std' not in teacher_config('ViT-B-16-quickgelu:openai')


@pytest.mark.parametrize('own', [True, False])
def test_far_pixels_are_logged(own, log):
    """A config that inherits teacher_mean_std=None gives ImageNet's pixels to a ViT of mean 0.5."""
    option = {} if own else dict(teacher_mean_std=None)
    build_teacher(dict(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=None, **option))
    assert ("teacher_mean_std=None gives it the student's; set" in log.text) != own


# -- the grammar


def test_names():
    siglip = dict(type='mmmilan.OpenCLIPTeacher', model='ViT-B-16-SigLIP2', pretrained='webli')
    assert teacher_config('ViT-B-16-SigLIP2:webli') == teacher_config('open_clip:ViT-B-16-SigLIP2:webli') == siglip
    dino = dict(type='mmmilan.TimmTeacher', model='vit_base_patch16_224.dino')
    assert teacher_config('vit_base_patch16_224.dino') == teacher_config('timm:vit_base_patch16_224.dino') == dino
    assert teacher_config(dino) == dino and teacher_config(dino) is not dino
    assert teacher_config('ViT-B/16:openai')['model'] == 'ViT-B/16'
    # a name of both libraries is timm's, with a tag or a prefix open_clip's
    assert teacher_config('vit_medium_patch16_gap_256')['type'] == 'mmmilan.TimmTeacher'


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('nothing', 'The teacher nothing is unknown; give MODEL:TAG or MODEL:FILE of open_clip, a ViT of timm'),
        ('none.pt', 'The teacher none.pt is unknown'),
        ('ViT-B-16-SigLIP2', 'names no weights; choose ViT-B-16-SigLIP2:webli'),
        ('ViT-B-16-SigLip2:webli', 'is unknown .near it: ViT-B-16-SigLIP2'),
        ('vit_base_patch16_224:none.pth', "names the weights 'none.pth', which are no file"),
        ('mae_pretrain_vit_base.pth', 'is unknown'),
        ('milan_vit-base-p16_16xb256-amp-coslr-400e_in1k', 'is an encoder and no teacher'),
        ('local-dir:nowhere', 'nowhere has no open_clip_config.json or config.json'),
        ('', 'The teacher  is unknown'),
        ({}, 'The teacher {} has no type; name one, such as mmmilan.OpenCLIPTeacher'),
        (dict(pretrained='clip.pt', type=''), 'has no type; name one'),
    ],
)
def test_unknown_names(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        teacher_config(name)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    'cfg, message',
    [
        (dict(type='Nope'), "type='Nope' does not exist"),
        (dict(type='mmmilan.OpenClipTeacher'), 'the nearest name is mmmilan.OpenCLIPTeacher'),
        (dict(type='mmmilan.TimmTeacher', modle='vit_tiny_patch16_224'), 'TimmTeacher.* lacks model|takes no modle'),
        (dict(model='x'), 'has no type'),
        (dict(type=3), 'type'),
    ],
)
def test_configs_that_are_no_teachers(cfg, message):
    with pytest.raises(InputError, match=message):
        build_teacher(cfg)


# -- the activation is never guessed


@pytest.mark.parametrize('part', ['whole', 'visual', 'bare'])
def test_a_state_dict_alone_is_refused(clip, part, tmp_path):
    """With GELU and with QuickGELU the weights look alike."""
    weights = torch.load(clip[1])
    if part != 'whole':
        prefix = '' if part == 'bare' else 'visual.'
        weights = {f'{prefix}{key[7:]}': value for key, value in weights.items() if key.startswith('visual.')}
    torch.save(weights, tmp_path / 'alone.pt')
    cfg = dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(tmp_path / 'alone.pt'), head_width=16)
    with pytest.raises(InputError, match='does not say whether it was trained with GELU or with QuickGELU; name its'):
        build_teacher(cfg)


def test_the_refusal_names_models_of_these_sizes(tmp_path, shallow):
    for model in ('ViT-B-32', 'ViT-B-16-quickgelu'):
        config = open_clip.get_model_config(model)
        with torch.device('meta'):
            visual = new_visual(config)
        weights = {f'visual.{key}': torch.zeros(value.shape) for key, value in visual.state_dict().items()}
        torch.save(weights, tmp_path / 'clip.pt')
        patch = model.split('-')[2]
        with pytest.raises(InputError, match=f'such as ViT-B-{patch} or ViT-B-{patch}-quickgelu'):
            build_teacher(str(tmp_path / 'clip.pt'))


def test_a_file_of_openai_under_the_name_of_the_other_kind(clip, build, tmp_path, log):
    """What the file says goes before the name."""
    name, path = clip
    torch.save(torch.load(path) | openai_numbers(), tmp_path / 'openai.pt')
    images = torch.randn(2, 3, 56, 56)
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=f'{name}-56', pretrained=str(tmp_path / 'openai.pt'))
    own = build(type='mmmilan.OpenCLIPTeacher', pretrained=str(tmp_path / 'openai.pt'), head_width=16)
    assert relative_error(teacher(images)[0], own(images)[0]) < 1e-6
    assert ('was trained with QuickGELU, and so it is run' in log.text) == ('False' in name)


def test_config_beside_a_file(folder, build):
    """Statistics and activation are those of the config beside it, also where a name is given."""
    path = str(folder / 'open_clip_model.safetensors')
    config = json.loads((folder / open_clip_config).read_text())
    name = next(model for model in open_clip.list_models() if open_clip.get_model_config(model) == config['model_cfg'])
    teacher = build(type='mmmilan.OpenCLIPTeacher', model=name, pretrained=path)
    assert list(teacher.tower.mean) == OWN_STATISTICS['mean'] and list(teacher.tower.std) == OWN_STATISTICS['std']


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ('{', 'cannot be read'),
        ('[]', 'describes no model'),
        ('{"model_cfg": 3}', 'describes no model'),
        ('{"model_cfg": {"embed_dim": 4, "vision_cfg": {"depth": 3}}}', 'is no config of open_clip'),
        ('{"model_cfg": {"embed_dim": 24, "vision_cfg": {}}, "preprocess_cfg": {"mean": [1, 2]}}', 'not three numbers'),
        ('{"model_cfg": {"embed_dim": 24, "vision_cfg": {}, "quick_gelu": "no"}}', 'neither true nor false'),
        (
            '{"model_cfg": {"embed_dim": 24, "vision_cfg": {}}, "preprocess_cfg": {"mean": [127.5, 127.5, 127.5]}}',
            'not of values from 0 to 1',
        ),
    ],
)
def test_damaged_config(content, message, folder):
    (folder / open_clip_config).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        build_teacher(folder)
    assert '\n' not in str(error.value)


def test_folders_without_weights(folder):
    for path in folder.glob('*.safetensors'):
        path.rename(path.with_name('mine.PTH'))
    with pytest.raises(InputError, match='mine.PTH is'):  # not a PyTorch file
        (folder / 'mine.PTH').write_bytes(b'no weights')
        build_teacher(folder)
    (folder / 'other.pt').touch()
    with pytest.raises(InputError, match='has several files of weights .mine.PTH, other.pt.; give one as --teacher'):
        build_teacher(folder)
    for path in (folder / 'mine.PTH', folder / 'other.pt'):
        path.unlink()
    with pytest.raises(InputError, match='has no file of weights'):
        build_teacher(folder)
