"""Images and texts in one space: MILAN's joint embedding of whole images, and its teacher's text tower."""

from __future__ import annotations

import json

import open_clip
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch.nn.functional import normalize

from helpers import build_model, openai_numbers
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from mmmilan.teachers.clip_towers import load_text_tower

TEXTS = ['a red boat', 'two dogs on grass', 'x']
SIZES = dict(
    embed_dim=24,
    vision_cfg=dict(image_size=64, patch_size=16, width=64, layers=1, head_width=32),
    text_cfg=dict(context_length=16, vocab_size=49408, width=32, heads=1, layers=2),
)


# -- images


@torch.no_grad()
def test_joint_embedding_is_the_decoders_own_prediction(milan_cfg):
    """Prompts pass no block: the embedding is norm and projection, and equals the prediction with masked patches."""
    model = build_model(milan_cfg).eval()
    torch.nn.init.normal_(model.neck.decoder_pred.bias)
    images, everything = torch.randn(3, 3, 64, 64), torch.arange(16).expand(3, -1)
    joint = model.embed_joint(images)
    assert joint.shape == (3, 17, 24) and joint.dtype == torch.float32
    latent, neck = model.backbone(images, everything), model.neck
    prediction = neck.decoder_pred(neck.ln1(neck.decoder_embed(latent) + neck.decoder_pos_embed))
    assert torch.allclose(joint, normalize(prediction, dim=-1), atol=1e-6)
    assert torch.equal(model.encode_image(images), joint[:, 0])

    seen = neck(latent[:, [0, 3, 8]], everything[:, [2, 7]], everything[:, [0, 1, 3, 4, 5, 6]])
    assert torch.allclose(normalize(seen[:, :3], dim=-1), joint[:, [0, 3, 8]], atol=1e-6)


def test_a_decoder_that_mixes_tokens_has_no_joint_space(milan_cfg):
    """In MAE's decoder the prediction of the class token depends on all other tokens."""
    milan_cfg['neck']['type'] = 'mmmilan.MAEDecoder'
    with pytest.raises(InputError, match='MAEDecoder with CLIPTarget has no joint space of image and text; train with'):
        build_model(milan_cfg).embed_joint(torch.randn(2, 3, 64, 64))


@torch.no_grad()
def test_joint_embedding_without_a_decoder(milan_cfg):
    milan_cfg['neck'] = dict(type='mmmilan.LinearProjection', embed_dim=48, predict_feature_dim=24)
    model = build_model(milan_cfg).eval()
    images, everything = torch.randn(2, 3, 64, 64), torch.arange(16).expand(2, -1)
    prediction = model.neck(model.backbone(images, everything), everything, everything[:, :0])
    assert torch.equal(model.embed_joint(images), normalize(prediction, dim=-1))


@torch.no_grad()
def test_maskclip_has_the_same_space(maskclip_file):
    model = build_model(torch.load(maskclip_file)['meta']['model']).eval()
    joint = model.embed_joint(images := torch.randn(2, 3, 64, 64))
    assert joint.shape == (2, 17, 24)
    assert torch.allclose(joint[:, 0], model.encode_image(images), atol=1e-6)


def test_pixels_have_no_joint_space(milan_cfg):
    milan_cfg['neck']['predict_feature_dim'] = 768
    milan_cfg.update(masking=dict(type='mmmilan.RandomMasking'), head=dict(type='mmmilan.PixelTarget'))
    model = build_model(milan_cfg).eval()
    with pytest.raises(InputError, match='PixelTarget has no joint space of image and text; train with a CLIPTarget'):
        model.embed_joint(torch.randn(1, 3, 64, 64))
    with pytest.raises(InputError, match='has no teacher, and so no text tower; train it with an OpenCLIPTeacher'):
        model.text_tower()


# -- texts


@torch.no_grad()
def test_texts_of_maskclip(milan_cfg, maskclip_file):
    """The text towers of a MaskCLIP and of a MILAN that learns from it embed texts as the MaskCLIP does."""
    content = torch.load(maskclip_file)
    clip = MODELS.build(content['meta']['model'])
    clip.load_state_dict(content['state_dict'])
    expected = clip.encode_text(SimpleTokenizer(context_length=16)(TEXTS))
    milan_cfg['head']['teacher']['pretrained'] = maskclip_file
    for tower in (build_model(milan_cfg).eval().text_tower(), clip.text_tower()):
        assert torch.allclose(tower(TEXTS), expected, atol=1e-6)
        assert tower.scale == pytest.approx(float(clip.logit_scale.exp()))
    assert torch.allclose(expected.norm(dim=1), torch.ones(3)) and expected.std(0).min() > 1e-3


@pytest.fixture
def openai_file(tmp_path):
    """A small whole CLIP with QuickGELU, and its file in OpenAI's layout."""
    clip = open_clip.model.CLIP(**SIZES, quick_gelu=True).eval()
    torch.nn.init.normal_(clip.text_projection)
    torch.save(clip.state_dict() | openai_numbers(), tmp_path / 'clip.pt')
    return clip, str(tmp_path / 'clip.pt')


@torch.no_grad()
def test_texts_of_a_file_in_the_layout_of_openai(openai_file):
    clip, path = openai_file
    expected = clip.encode_text(SimpleTokenizer(context_length=16)(TEXTS), normalize=True)
    tower = load_text_tower(None, path, head_width=32)
    assert torch.allclose(tower(TEXTS), expected, atol=1e-6)
    assert tower.scale == pytest.approx(float(clip.logit_scale.exp()))
    with pytest.raises(InputError, match='is 32 wide, no multiple of head_width=64; correct it'):
        load_text_tower(None, path)


@pytest.fixture
def small_model(tmp_path, monkeypatch):
    """Name of a small open_clip model."""
    (tmp_path / 'ViT-tiny.json').write_text(json.dumps(SIZES))
    monkeypatch.setattr('open_clip.factory._MODEL_CONFIGS', dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / 'ViT-tiny.json')
    return 'ViT-tiny'


@torch.no_grad()
def test_texts_of_a_model_of_open_clip(small_model, tmp_path):
    clip = open_clip.create_model(small_model).eval()
    torch.save(clip.state_dict(), tmp_path / 'tiny.pt')
    expected = clip.encode_text(open_clip.get_tokenizer(small_model)(TEXTS), normalize=True)
    teacher = MODELS.build(
        dict(type='mmmilan.OpenCLIPTeacher', model=small_model, pretrained=str(tmp_path / 'tiny.pt'))
    )
    assert torch.allclose(teacher.text_tower()(TEXTS), expected, atol=1e-6)
    torch.save(clip.visual.state_dict(), tmp_path / 'visual.pt')
    with pytest.raises(InputError, match=r'visual.pt has no text tower; give .* a whole CLIP'):
        load_text_tower(small_model, str(tmp_path / 'visual.pt'))


def test_teachers_without_texts(milan_cfg, clip_file):
    with pytest.raises(InputError, match=r'clip.pt has no text tower; give a checkpoint of MaskCLIP or a whole CLIP'):
        build_model(milan_cfg).eval().text_tower()
    dino = dict(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=None)
    with pytest.raises(InputError, match='TimmTeacher has no text tower; for texts, train with an OpenCLIPTeacher'):
        MODELS.build(dino).text_tower()
    with pytest.raises(InputError, match='has random weights, to which no text means anything'):
        load_text_tower('ViT-B-32', None)
    with pytest.raises(InputError, match="open_clip has no model 'ViT-Z'"):
        load_text_tower('ViT-Z', 'openai')
