"""Masks drawn by similarity to texts."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import Tensor
from torch.nn.functional import normalize

from helpers import ROOT, real_data
from mmmilan.errors import InputError
from mmmilan.models.masking import Masking, SemanticAwareMasking
from mmmilan.prompted_masking import PromptedMasking
from mmmilan.registry import DATASETS, MODELS
from scenes.appearance import SEMANTIC_CLASSES


class FixedTeacher:
    """A teacher whose space has two dimensions, 'left' and 'right'."""

    def text_tower(self):
        return lambda texts: torch.tensor([[1.0, 0.0] if text == 'left' else [0.0, 1.0] for text in texts])

    def weigh_by(self, weigh):
        self.weigh = weigh


def prepared(**options) -> PromptedMasking:
    masking = PromptedMasking(**options)
    masking.prepare(FixedTeacher())
    return masking


def test_importance_is_that_of_the_formula():
    """A loop over patches and texts, with and without the attention."""
    values, attention = torch.randn(3, 8, 2), torch.rand(3, 8)
    for texts in (['left'], ['right', 'left']):
        alone = prepared(texts=texts, temperature=0.5).weigh(attention, values)
        times = prepared(texts=texts, temperature=0.5, with_attention=True).weigh(attention, values)
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
    visible = {}
    for text in ('left', 'right'):
        masking = prepared(texts=[text], temperature=0.5, mask_ratio=31 / 32)
        visible[text] = (~masking.draw(masking.weigh(None, values), (4000, 32)))[:, :16].sum() / 4000
    share = torch.tensor(2.0).exp() / (1 + torch.tensor(2.0).exp())  # one patch is drawn
    assert visible['left'] == pytest.approx(float(share), abs=0.02)
    assert visible['right'] == pytest.approx(1 - float(share), abs=0.02)


def test_a_low_temperature_stays_finite():
    values = torch.randn(2, 16, 2)
    masking = prepared(texts=['left'], temperature=1e-4)
    weight = masking.weigh(None, values)
    assert torch.isfinite(weight).all() and weight.amax(1).tolist() == [1, 1]
    assert (~masking.draw(weight, (2, 16))).sum(1).tolist() == [4, 4]


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


@pytest.mark.parametrize('with_attention', [False, True])
def test_in_the_algorithm(milan_cfg, maskclip_file, with_attention):
    """The model embeds the texts with its teacher's text tower; figures show the importance that was drawn from."""
    milan_cfg['head']['teacher']['pretrained'] = maskclip_file
    prompted = dict(texts=['a ship', 'a tumour'], temperature=0.05, with_attention=with_attention)
    plain, images = MODELS.build(milan_cfg), torch.randn(2, 3, 64, 64)
    features, attention = plain.head.run_teacher(images)
    milan_cfg['masking'] = dict(type='mmmilan.PromptedMasking', **prompted)
    model = MODELS.build(milan_cfg).eval()
    model.init_weights()
    assert torch.equal(model.head.run_teacher(images)[0], features)  # the target is as it was
    values = values_of(model.head.teacher.visual, images)
    cosine = normalize(values, dim=-1) @ model.text_tower()(['a ship', 'a tumour']).T
    expected = (cosine.amax(-1) / 0.05).softmax(1) * (attention if with_attention else 1)
    importance = torch.stack([sample.importance for sample in model.predict(images)])
    shares, expected = (each / each.sum(1, keepdim=True) for each in (importance, expected))
    assert torch.allclose(shares, expected, atol=1e-5)
    assert not torch.allclose(shares, attention / attention.sum(1, keepdim=True), atol=1e-2)
    loss = model.loss(images)['loss']
    loss.backward()
    assert torch.isfinite(loss)


@torch.no_grad()
def test_where_a_query_pools():
    """SigLIP's patch features are values of its pooling already, and are compared as they are."""
    teacher = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', model='ViT-B-16-SigLIP', pretrained=None)).eval()
    images, seen = torch.randn(1, 3, 224, 224), []
    features, attention = teacher(images)
    teacher.weigh_by(lambda *given: seen.extend(given) or given[0])
    assert torch.equal(teacher(images)[1], attention)
    assert torch.equal(seen[0], attention) and torch.equal(seen[1], features[:, 1:])


def test_what_cannot_be_prompted(milan_cfg):
    def error(**options) -> str:
        milan_cfg['masking'] = dict(type='mmmilan.PromptedMasking', **options)
        with pytest.raises(InputError) as caught:
            MODELS.build(milan_cfg)
        return str(caught.value)

    assert "masking.texts='crack' is no list of texts; give one" in error(texts='crack')
    assert 'masking.texts=[] is no list of texts' in error(texts=[])
    assert 'masking.temperature=0 is out of range' in error(texts=['crack'], temperature=0)
    assert 'clip.pt has no text tower; give a checkpoint of MaskCLIP or a whole CLIP' in error(texts=['crack'])
    masking = PromptedMasking(['left'])
    with pytest.raises(InputError, match='needs a teacher with a text tower; give the head an OpenCLIPTeacher'):
        masking.prepare(None)
    with pytest.raises(InputError, match='does not work in a data pipeline; give it to the model as masking'):
        masking.transform(dict(importance=torch.rand(16)))
    teacher = MODELS.build(dict(type='mmmilan.TimmTeacher', model='vit_tiny_patch16_224', pretrained=None))
    with pytest.raises(InputError, match="does not give the values of its patches; choose open_clip's own ViT"):
        teacher.weigh_by(masking.weigh)


@pytest.mark.data
def test_prompt_keeps_the_patches_that_it_names():
    """'a tiger' keeps more of the tigers' patches visible than attention, or the name of another part of the scenes.

    Needs the MaskCLIP and the scenes of a run of ``tools/demo/demo.py --out demo``.
    """
    checkpoint, scenes = real_data('demo/maskclip-seed0/epoch_4.pth'), real_data('demo/scenes')
    cfg = Config.fromfile(ROOT / 'configs/demo/maskclip_vit-tiny-p8_scenes.py')
    teacher = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(checkpoint))).eval()
    dataset = dict(type='mmmilan.ImageFolder', data_root=str(scenes / 'val/tiger'))
    dataset = DATASETS.build(dataset | dict(pipeline=cfg.test_dataloader.dataset.pipeline))
    samples = [dataset[i] for i in range(len(dataset))]
    preprocess = MODELS.build(cfg.model.data_preprocessor)
    images = preprocess(dict(inputs=torch.stack([sample['inputs'] for sample in samples])))['inputs']
    names = [Path(sample['data_samples'].img_path).stem for sample in samples]
    tigers = torch.stack([patches_of('tiger', scenes / f'semantic/val/tiger/{name}.png') for name in names])

    def kept(masking: Masking) -> float:
        """Share of the tigers' patches that stay visible."""
        torch.manual_seed(0)
        with torch.no_grad():
            visible = ~masking.draw(teacher(images)[1], tuple(tigers.shape))
        return float((visible & tigers).sum() / tigers.sum())

    shares = dict(attention=kept(SemanticAwareMasking()))
    for text in ('a tiger', 'grass'):
        masking = PromptedMasking([text])
        masking.prepare(teacher)
        shares[text] = kept(masking)
    assert shares['a tiger'] > 1.2 * max(shares['attention'], shares['grass']), shares


def patches_of(name: str, label_map: Path) -> Tensor:
    """Which of the 8 x 8 patches [64] show the named object on more than half of their area."""
    pixels = cv2.imread(str(label_map), cv2.IMREAD_GRAYSCALE) == SEMANTIC_CLASSES.index(name)
    return torch.from_numpy(cv2.resize(np.float32(pixels), (8, 8), interpolation=cv2.INTER_AREA) > 0.5).flatten()
