"""Masks drawn for words."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from mmmilan.errors import InputError
from mmmilan.prompted_masking import PromptedMasking
from mmmilan.registry import MODELS


class FixedTeacher:
    """A teacher whose space has two dimensions, 'left' and 'right'."""

    def text_tower(self):
        return lambda texts: torch.tensor([[1.0, 0.0] if text == 'left' else [0.0, 1.0] for text in texts])


def prepared(**options) -> PromptedMasking:
    masking = PromptedMasking(**options)
    masking.prepare(FixedTeacher())
    return masking


def test_importance_is_that_of_the_formula():
    """A loop over patches and texts, with and without the attention."""
    features, attention = torch.randn(3, 9, 2), torch.rand(3, 8)
    for texts in (['left'], ['right', 'left']):
        alone = prepared(texts=texts, temperature=0.5).weigh(attention, features)
        times = prepared(texts=texts, temperature=0.5, with_attention=True).weigh(attention, features)
        for image in range(3):
            expected = torch.zeros(8)
            for patch in range(8):
                unit = features[image, 1 + patch] / features[image, 1 + patch].norm()
                expected[patch] = torch.exp(max(unit[0] if text == 'left' else unit[1] for text in texts) / 0.5)
            assert torch.allclose(normalize(alone[image], dim=0), normalize(expected, dim=0), atol=1e-6)
            expected *= attention[image]
            assert torch.allclose(normalize(times[image], dim=0), normalize(expected, dim=0), atol=1e-6)


def test_words_decide_what_stays_visible():
    """16 patches look like 'left', 16 like 'right'; the share drawn is that of the weights e^(1/τ) : 1."""
    features = torch.eye(2).repeat_interleave(16, dim=0)
    features = torch.cat([features[:1], features])[None].expand(4000, -1, -1)
    visible = {}
    for text in ('left', 'right'):
        masking = prepared(texts=[text], temperature=0.5, mask_ratio=31 / 32)
        visible[text] = (~masking.draw(masking.weigh(None, features), (4000, 32)))[:, :16].sum() / 4000
    share = torch.tensor(2.0).exp() / (1 + torch.tensor(2.0).exp())  # one patch is drawn
    assert visible['left'] == pytest.approx(float(share), abs=0.02)
    assert visible['right'] == pytest.approx(1 - float(share), abs=0.02)


def test_a_low_temperature_stays_finite():
    features = torch.randn(2, 17, 2)
    masking = prepared(texts=['left'], temperature=1e-4)
    weight = masking.weigh(None, features)
    assert torch.isfinite(weight).all() and weight.amax(1).tolist() == [1, 1]
    assert (~masking.draw(weight, (2, 16))).sum(1).tolist() == [4, 4]


def test_in_the_algorithm(milan_cfg, maskclip_file):
    """The model embeds the texts with its teacher's text tower; figures show the importance that was drawn from."""
    milan_cfg['head']['teacher']['pretrained'] = maskclip_file
    milan_cfg['masking'] = dict(type='mmmilan.PromptedMasking', texts=['a ship', 'a tumour'], temperature=0.05)
    model = MODELS.build(milan_cfg).eval()
    model.init_weights()
    images = torch.randn(2, 3, 64, 64)
    features, attention = model.head.run_teacher(images)
    cosine = normalize(features[:, 1:], dim=-1) @ model.text_tower()(['a ship', 'a tumour']).T
    expected = (cosine.amax(-1) / 0.05).softmax(1)
    importance = torch.stack([sample.importance for sample in model.predict(images)])
    assert torch.allclose(importance / importance.sum(1, keepdim=True), expected, atol=1e-6)
    assert not torch.allclose(importance / importance.sum(1, keepdim=True), attention, atol=1e-2)
    assert torch.isfinite(model.loss(images)['loss'])


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
    with pytest.raises(InputError, match='is no step of a data pipeline; give it to the model as masking'):
        masking.transform(dict(importance=torch.rand(16)))
    with pytest.raises(InputError, match=r"compares texts with one teacher's features; set head.type to CLIPTarget"):
        prepared(texts=['left']).weigh(None, torch.randn(2, 9, 3))
