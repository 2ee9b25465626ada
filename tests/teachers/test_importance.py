"""Importance by texts, from which masks are drawn."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.functional import normalize

from helpers import ROOT, randomise, real_data, rest_slow
from mmmilan.errors import InputError
from mmmilan.models.masking import SemanticAwareMasking
from mmmilan.registry import DATASETS, MODELS
from mmmilan.teachers.base import TextTower
from mmmilan.teachers.importance import TextImportance
from scenes.appearance import SEMANTIC_CLASSES


def by_texts(texts: list[str], temperature: float, with_attention: bool = False) -> TextImportance:
    """In a space of two dimensions, 'left' and 'right'."""
    embeddings = torch.tensor([[1.0, 0.0] if text == 'left' else [0.0, 1.0] for text in texts])
    return TextImportance(embeddings, temperature, with_attention)


def test_importance_is_that_of_the_formula():
    """A loop over patches and texts, with and without the attention."""
    values, attention = torch.randn(3, 8, 2), torch.rand(3, 8)
    for texts in (['left'], ['right', 'left']):
        alone = by_texts(texts, 0.5)(attention, values)
        times = by_texts(texts, 0.5, with_attention=True)(attention, values)
        for image in range(3):
            expected = torch.zeros(8)
            for patch in range(8):
                unit = values[image, patch] / values[image, patch].norm()
                expected[patch] = torch.exp(max(unit[0] if text == 'left' else unit[1] for text in texts) / 0.5)
            assert torch.allclose(normalize(alone[image], dim=0), normalize(expected, dim=0), atol=1e-6)
            expected *= attention[image]
            assert torch.allclose(normalize(times[image], dim=0), normalize(expected, dim=0), atol=1e-6)


def test_words_decide_what_stays_visible():
    """16 patches look like 'left', 16 like 'right'; the share drawn is that of the weights e^(1/τ) : 1."""
    values = torch.eye(2).repeat_interleave(16, dim=0).expand(4000, -1, -1)
    masking, visible = SemanticAwareMasking(mask_ratio=31 / 32), {}
    for text in ('left', 'right'):
        importance = by_texts([text], 0.5)(None, values)
        visible[text] = (~masking.draw(importance, (4000, 32)))[:, :16].sum() / 4000
    share = torch.tensor(2.0).exp() / (1 + torch.tensor(2.0).exp())  # one patch is drawn
    assert visible['left'] == pytest.approx(float(share), abs=0.02)
    assert visible['right'] == pytest.approx(1 - float(share), abs=0.02)


def test_a_low_temperature_stays_finite():
    weight = by_texts(['left'], 1e-4)(None, torch.randn(2, 16, 2))
    assert torch.isfinite(weight).all() and weight.amax(1).tolist() == [1, 1]
    assert (~SemanticAwareMasking().draw(weight, (2, 16))).sum(1).tolist() == [4, 4]


@torch.no_grad()
def values_of(visual: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Values [B, N, C] of patches by open_clip's own last block, in which each token may attend to itself alone."""
    seen = []
    block = visual.transformer.resblocks[-1]
    hook = block.ln_1.register_forward_hook(lambda module, args, output: seen.append(output))
    visual(images)
    hook.remove()
    alone = torch.full((seen[0].shape[1],) * 2, -torch.inf).fill_diagonal_(0)
    attended, _ = block.attn(seen[0], seen[0], seen[0], attn_mask=alone)
    return (visual.ln_post(attended) @ visual.proj)[:, 1:]


TEXTS = ['a ship', 'a tumour']


def expected_importance(values: Tensor, attention: Tensor, tower: TextTower, with_attention: bool) -> Tensor:
    cosine = normalize(values, dim=-1) @ tower(TEXTS).T
    expected = (cosine.amax(-1) / 0.05).softmax(1) * (attention if with_attention else 1)
    return expected / expected.sum(1, keepdim=True)


@pytest.mark.parametrize('head', ['CLIPTarget', 'LayerAlignment'])
@pytest.mark.parametrize('with_attention', rest_slow([False, True], True))
def test_in_the_algorithm(milan_cfg, maskclip_file, with_attention, head):
    """Whether the features or the tokens of layers are the target; figures show the importance that was drawn from."""
    milan_cfg['head']['teacher']['pretrained'] = maskclip_file
    milan_cfg['head']['type'] = f'mmmilan.{head}'
    if head == 'LayerAlignment':
        milan_cfg['backbone']['out_indices'] = [0, 1]
        milan_cfg['neck'] = dict(type='mmmilan.LayerMixture', embed_dim=48, num_layers=2, predict_feature_dim=128)
    plain, images = MODELS.build(milan_cfg), torch.randn(2, 3, 64, 64)
    features, attention = plain.head.run_teacher(images)
    milan_cfg['head']['teacher']['importance'] = dict(texts=TEXTS, temperature=0.05, with_attention=with_attention)
    model = MODELS.build(milan_cfg).eval()
    model.init_weights()
    assert torch.equal(model.head.run_teacher(images)[0], features)  # the target is as it was
    values = values_of(model.head.teacher.visual, images)
    expected = expected_importance(values, attention, model.text_tower(), with_attention)
    importance = torch.stack([sample.importance for sample in model.predict(images)])
    importance = importance / importance.sum(1, keepdim=True)
    assert torch.allclose(importance, expected, atol=1e-5)
    assert not torch.allclose(importance, attention / attention.sum(1, keepdim=True), atol=1e-2)
    assert "likeness of patches to 'a ship', 'a tumour'" in model.head.teacher.describe()
    loss = model.loss(images)['loss']
    loss.backward()
    assert torch.isfinite(loss)


@torch.no_grad()
@pytest.mark.parametrize('with_attention', rest_slow([False, True], True))
def test_where_a_query_pools(shallow, monkeypatch, with_attention):
    """SigLIP's patch features are values of its pooling already; in both paths of the teacher."""
    tower = TextTower(nn.Linear(4, 768, bias=False), lambda texts: torch.eye(4)[: len(texts)], 1.0)
    monkeypatch.setattr('mmmilan.teachers.open_clip.load_text_tower', lambda *args: tower)
    cfg = dict(type='mmmilan.OpenCLIPTeacher', model='ViT-B-16-SigLIP', pretrained=None, input_size=64)
    plain = randomise(MODELS.build(cfg)).eval()
    options = dict(texts=TEXTS, temperature=0.05, with_attention=with_attention)
    teacher = MODELS.build(cfg | dict(importance=options)).eval()
    teacher.tower.load_state_dict(plain.tower.state_dict())
    images = torch.randn(2, 3, 64, 64)
    features, attention = plain(images)
    expected = expected_importance(features[:, 1:], attention, tower, with_attention)
    for importance in (teacher(images)[1], teacher.forward_layers(images, [0, -1])[1]):
        assert torch.allclose(importance / importance.sum(1, keepdim=True), expected, atol=1e-5)


def test_texts_stay_in_float32(maskclip_file):
    """In a teacher in float16 too; and they are not in the state dict."""
    options = dict(texts=['a ship'], temperature=0.02)
    teacher = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=maskclip_file, importance=options)).eval()
    expected = teacher(images := torch.randn(1, 3, 64, 64))[1]
    teacher.run_in_float16()
    assert teacher.by_texts.embeddings.dtype == torch.float32
    assert 'by_texts.embeddings' not in teacher.state_dict()
    assert torch.allclose(teacher(images)[1], expected, atol=0.05)


def test_refused_importance(milan_cfg, maskclip_file):
    def error(pretrained: str = maskclip_file, **options) -> str:
        teacher = dict(type='mmmilan.OpenCLIPTeacher', pretrained=pretrained, importance=options)
        with pytest.raises(InputError) as caught:
            MODELS.build(teacher)
        return str(caught.value)

    assert "importance.texts='crack' is no list of texts; give one" in error(texts='crack')
    for texts in ([], [''], ['crack', 3]):
        assert f'importance.texts={texts} is no list of texts' in error(texts=texts)
    assert 'importance.texts=() is no list of texts' in error(temperature=1.0)
    for temperature in (0, -1, float('nan'), 'hot'):
        assert f'importance.temperature={temperature!r} is out of range' in error(texts=['x'], temperature=temperature)
    assert "importance has no option 'text'; it takes texts, temperature" in error(text=['crack'])
    clip_file = milan_cfg['head']['teacher']['pretrained']
    assert 'clip.pt has no text tower; give a checkpoint of MaskCLIP or a whole CLIP' in error(clip_file, texts=['x'])
    without_values = dict(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=None)
    with pytest.raises(InputError, match="does not give the values of its patches; choose open_clip's own ViT"):
        MODELS.build(without_values | dict(importance=dict(texts=['x'])))


@pytest.mark.data
def test_prompt_keeps_the_patches_that_it_names():
    """'a tiger' keeps more of the tigers' patches visible than attention, or the name of another part of the scenes.

    Needs the MaskCLIP and the scenes of a run of ``tools/demo/demo.py --out demo``.
    """
    checkpoint, scenes = real_data('demo/maskclip-seed0/epoch_4.pth'), real_data('demo/scenes')
    cfg = Config.fromfile(ROOT / 'configs/demo/maskclip_vit-tiny-p8_scenes.py')
    dataset = dict(type='mmmilan.ImageFolder', data_root=str(scenes / 'val/tiger'))
    dataset = DATASETS.build(dataset | dict(pipeline=cfg.test_dataloader.dataset.pipeline))
    samples = [dataset[i] for i in range(len(dataset))]
    preprocess = MODELS.build(cfg.model.data_preprocessor)
    images = preprocess(dict(inputs=torch.stack([sample['inputs'] for sample in samples])))['inputs']
    names = [Path(sample['data_samples'].img_path).stem for sample in samples]
    tigers = torch.stack([patches_of('tiger', scenes / f'semantic/val/tiger/{name}.png') for name in names])

    def kept(**options) -> float:
        """Share of the tigers' patches that stay visible."""
        cfg = dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(checkpoint), **options)
        torch.manual_seed(0)
        with torch.no_grad():
            importance = MODELS.build(cfg).eval()(images)[1]
            visible = ~SemanticAwareMasking().draw(importance, tuple(tigers.shape))
        return float((visible & tigers).sum() / tigers.sum())

    shares = {text: kept(importance=dict(texts=[text])) for text in ('a tiger', 'grass')} | dict(attention=kept())
    assert shares['a tiger'] > 1.2 * max(shares['attention'], shares['grass']), shares


def patches_of(name: str, label_map: Path) -> Tensor:
    """Which of the 8 x 8 patches [64] show the named object on more than half of their area."""
    pixels = cv2.imread(str(label_map), cv2.IMREAD_GRAYSCALE) == SEMANTIC_CLASSES.index(name)
    return torch.from_numpy(cv2.resize(np.float32(pixels), (8, 8), interpolation=cv2.INTER_AREA) > 0.5).flatten()
