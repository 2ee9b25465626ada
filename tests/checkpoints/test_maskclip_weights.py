"""What MaskCLIP's weights serve for: open_clip, a teacher of MILAN, the encoders of all tasks, other layouts."""

from __future__ import annotations

import argparse

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from mmengine.config import Config
from PIL import Image

from helpers import ROOT, TINY_ARCH, assert_clip, build_model, captioned_batch
from mmmilan.checkpoints.layouts import convert, from_open_clip
from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.errors import InputError
from mmmilan.export.preprocessing import Preprocessing
from mmmilan.export.publish import write_open_clip
from mmmilan.registry import MODELS

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PREPROCESSING = Preprocessing(resize=64, size=(64, 64), interpolation='bicubic', mean=MEAN, std=STD)


@pytest.fixture
def trained(maskclip_cfg, tmp_path):
    """A model with weights far from their start, and its checkpoint."""
    model = build_model(maskclip_cfg)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name != 'logit_scale':
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    path = tmp_path / 'epoch_25.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return model.eval(), str(path)


@torch.no_grad()
def test_open_clip_loads_the_export_and_gives_the_same_embeddings(trained, tmp_path):
    model, _ = trained
    write_open_clip(model, PREPROCESSING, tmp_path / 'export')
    clip, _, preprocess = open_clip.create_model_and_transforms(f'local-dir:{tmp_path / "export"}')
    clip.eval()
    pictures = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8)
    bgr = pictures.flip(3).permute(0, 3, 1, 2)  # the order of the data pipeline
    own = model.data_preprocessor(dict(inputs=bgr, data_samples=None))['inputs']
    given = torch.stack([preprocess(Image.fromarray(pixels.numpy())) for pixels in pictures])
    text = torch.stack([sample.text for sample in captioned_batch(5)[1]])
    for actual, expected in (
        (clip.encode_image(given, normalize=True), model.encode_image(own)),
        (clip.encode_text(text, normalize=True), model.encode_text(text)),
        (clip.logit_scale, model.logit_scale),
    ):
        assert (actual - expected).abs().max() < 1e-5
    assert (model.encode_image(own)[0] - model.encode_image(own)[1]).norm() > 0.01  # images differ


def test_checkpoint_is_a_teacher(trained, maskclip_cfg, tmp_path):
    """Features of all tokens and attention of the class token equal those of open_clip's own tower."""
    model, path = trained
    write_open_clip(model, PREPROCESSING, tmp_path / 'export')
    visual = open_clip.create_model(f'local-dir:{tmp_path / "export"}').eval().visual
    images = torch.randn(3, 3, 64, 64)
    teacher = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=path, head_width=16)).eval()
    assert (teacher.feature_dim, teacher.patch_size, teacher.num_patches) == (24, 16, 16)
    assert_clip(teacher, images, visual, images)
    assert torch.allclose(F.normalize(teacher(images)[0][:, 0], dim=1), model.encode_image(images), atol=1e-5)
    with pytest.raises(InputError, match='48 wide, no multiple of head_width=64'):
        MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=path))
    meta = dict(cfg=Config(dict(model=maskclip_cfg)).pretty_text)  # as training writes it
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / 'with_config.pth')
    path = str(tmp_path / 'with_config.pth')
    with_config = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=path)).eval()
    assert all(torch.equal(*pair) for pair in zip(with_config(images), teacher(images), strict=True))


def test_a_rectangular_checkpoint_is_a_teacher(maskclip_cfg, tmp_path):
    """The shape of the grid comes from the config; the weights would also fit another one."""
    maskclip_cfg['backbone']['img_size'] = (32, 96)
    maskclip_cfg['neck']['num_patches'] = (2, 6)
    model = build_model(maskclip_cfg).eval()
    path = tmp_path / 'rectangle.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=Config(dict(model=maskclip_cfg)).pretty_text)), path)
    teacher = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(path))).eval()
    images = torch.randn(3, 3, 32, 96)
    assert teacher.num_patches == 12
    assert torch.allclose(F.normalize(teacher(images)[0][:, 0], dim=1), model.encode_image(images), atol=1e-5)


def test_milan_trains_on_a_checkpoint(trained, milan_cfg):
    milan_cfg['head']['teacher'] = dict(type='mmmilan.OpenCLIPTeacher', pretrained=trained[1], head_width=16)
    model = MODELS.build(milan_cfg)
    model.init_weights()
    loss = model.loss(torch.randn(2, 3, 64, 64))['loss']
    loss.backward()
    assert 0 < loss < 4 and model.backbone.patch_embed.projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize('kind', ['mmmilan.MILANViT', 'mmpretrain.VisionTransformer', 'mmmilan.DenseViT'])
def test_encoder_of_a_checkpoint(trained, safe_mmengine, kind):
    model, path = trained
    extra = dict(out_indices=(0, 1, 1, 1)) if 'Dense' in kind else {}
    start = dict(type='Pretrained', checkpoint=path)
    encoder = MODELS.build(dict(type=kind, arch=TINY_ARCH, img_size=64, patch_size=16, init_cfg=start) | extra)
    encoder.init_weights()
    loaded = encoder.state_dict()
    for name, weight in model.backbone.state_dict().items():
        assert name.startswith('ln1') or torch.equal(loaded[name], weight), name
    if not extra:
        encoder.eval()
        images = torch.randn(2, 3, 64, 64)
        assert torch.allclose(encoder(images)[0], model.backbone(images)[0], atol=1e-6)


def test_encoder_converts_to_other_layouts(trained):
    model, path = trained
    weights = torch.load(path)['state_dict']
    assert set(convert(weights, 'mmmilan')) == {key for key in weights if not key.startswith('data_preprocessor.')}
    encoder = convert(weights, 'timm', encoder_only=True)
    assert torch.equal(encoder['blocks.1.attn.qkv.weight'], model.backbone.layers[1].attn.qkv.weight)
    with pytest.raises(InputError, match='has no place for a MaskCLIP; convert its encoder'):
        convert(weights, 'timm')


def test_export_of_weights_without_a_place_in_open_clip(maskclip_cfg, tmp_path):
    maskclip_cfg['backbone']['layer_scale_init_value'] = 1.0
    with pytest.raises(InputError, match="open_clip's ViT has no place for 'backbone.layers.0.attn.gamma1.weight'"):
        write_open_clip(build_model(maskclip_cfg), PREPROCESSING, tmp_path)
    assert not list(tmp_path.glob('open_clip*'))


# -- a CLIP's image tower as encoder


@pytest.fixture(params=['open_clip', 'openai', 'tower'])
def clip_and_file(request, tmp_path):
    """A small CLIP with QuickGELU, and its weights in a file: whole, as OpenAI's archive, or the image tower alone."""
    vision = dict(image_size=64, patch_size=16, width=64, layers=2, head_width=32)
    text = dict(context_length=8, vocab_size=100, width=32, heads=2, layers=1)
    clip = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True).eval()
    for parameter in clip.visual.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    weights, path = clip.state_dict(), tmp_path / 'clip.pt'
    if request.param == 'openai':
        torch.jit.save(torch.jit.trace(clip.visual, torch.zeros(1, 3, 64, 64), check_trace=False), path)
    else:
        torch.save(clip.visual.state_dict() if request.param == 'tower' else weights, path)
    return clip, path


@pytest.mark.parametrize('kind', ['8xb128-coslr-100e', '8xb2048-linear-coslr-100e'])
@torch.no_grad()
def test_clip_itself_as_encoder(kind, clip_and_file, monkeypatch):
    """The encoder of the configs that fine-tune and probe CLIP equals open_clip's forward pass, from pixels on."""
    clip, path = clip_and_file
    monkeypatch.setenv('PRETRAIN', str(path))
    cfg = Config.fromfile(ROOT / f'configs/milan/benchmarks/vit-base-p16_clip-pre_{kind}_in1k.py').model
    arch = dict(embed_dims=64, num_layers=2, num_heads=2, feedforward_channels=256)
    cfg.backbone.update(arch=arch, img_size=64, frozen_stages=-1)
    use_safe_loading()
    backbone = MODELS.build(cfg.backbone)
    backbone.init_weights()
    backbone.eval()
    pixels = torch.randint(256, (3, 3, 64, 64)).float()
    mean, std = (torch.tensor(cfg.data_preprocessor[name])[:, None, None] for name in ('mean', 'std'))
    rgb = (pixels / 255 - torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]) / torch.tensor(
        open_clip.OPENAI_DATASET_STD
    )[:, None, None]
    actual = backbone((pixels - mean) / std)[-1] @ clip.visual.proj
    assert (actual - clip.encode_image(rgb)).abs().max() < 1e-5 * clip.encode_image(rgb).abs().max()


@torch.no_grad()
def test_slip_itself_as_encoder(monkeypatch, tmp_path):
    """SLIP's whole file, as it was published: the encoder of the config that fine-tunes it equals timm's ViT."""
    arch = dict(embed_dims=64, num_layers=2, num_heads=2, feedforward_channels=256)
    vit = timm.models.VisionTransformer(img_size=64, embed_dim=64, depth=2, num_heads=2, num_classes=0).eval()
    weights = {f'module.visual.{key}': torch.randn_like(value) for key, value in vit.state_dict().items()}
    vit.load_state_dict({key.removeprefix('module.visual.'): value for key, value in weights.items()})
    weights |= {'module.image_projection': torch.zeros(64, 40), 'module.positional_embedding': torch.zeros(77, 8)}
    weights |= {'module.transformer.resblocks.0.ln_1.weight': torch.zeros(8), 'module.logit_scale': torch.zeros(())}
    torch.save(dict(epoch=25, state_dict=weights, args=argparse.Namespace(lr=1)), tmp_path / 'slip.pt')
    monkeypatch.setenv('PRETRAIN', str(tmp_path / 'slip.pt'))
    cfg = Config.fromfile(ROOT / 'configs/milan/benchmarks/vit-base-p16_slip-pre_8xb128-coslr-100e_in1k.py').model
    use_safe_loading()
    backbone = MODELS.build(cfg.backbone | dict(arch=arch, img_size=64))
    backbone.init_weights()
    backbone.eval()
    images = torch.randn(3, 3, 64, 64)
    expected = vit.forward_features(images)[:, 0]
    assert (backbone(images)[-1] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert set(convert(weights, 'timm')) == set(vit.state_dict())


def test_clip_is_no_start_for_a_plain_vit(clip_and_file):
    """Its norm before the blocks has no place there."""
    arch = dict(embed_dims=64, num_layers=2, num_heads=2, feedforward_channels=256)
    init_cfg = dict(type='Pretrained', checkpoint=str(clip_and_file[1]))
    backbone = MODELS.build(dict(type='mmmilan.MILANViT', arch=arch, img_size=64, init_cfg=init_cfg))
    with pytest.raises(InputError, match='does not hold all of MILANViT'):
        backbone.init_weights()


def test_an_unknown_part_of_a_clip_is_refused():
    weights = {'visual.ln_pre.weight': torch.zeros(4), 'visual.attn_pool.query': torch.zeros(4)}
    with pytest.raises(InputError, match="has no place for 'visual.attn_pool.query'; give a plain CLIP ViT"):
        from_open_clip(weights)
