"""The data preprocessors give the same as mmpretrain's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmpretrain.structures import DataSample

from mmmilan.errors import InputError
from mmmilan.models.preprocessors import ClassificationDataPreprocessor, PretrainingDataPreprocessor
from mmmilan.registry import MODELS

NORMALISATION = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)


def batch() -> dict:
    """Four labelled images with captions of 3, 0, 5 and 1 words."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    samples = [DataSample().set_gt_label(label) for label in (2, 0, 1, 2)]
    for sample, words in zip(samples, (3, 0, 5, 1), strict=True):
        text = torch.zeros(8, dtype=torch.int64)
        text[: words + 2] = torch.tensor([38, *range(1, words + 1), 39])
        sample.set_field(text, 'text')
    return dict(inputs=images, data_samples=samples)


@pytest.mark.parametrize('name', ['PretrainingDataPreprocessor', 'CaptionDataPreprocessor'])
def test_pretraining(name):
    ours = MODELS.build(dict(type=f'mmmilan.{name}', **NORMALISATION))(batch(), training=True)
    theirs = MODELS.build(dict(type='mmpretrain.SelfSupDataPreprocessor', **NORMALISATION))(batch(), training=True)
    assert torch.equal(ours['inputs'], theirs['inputs'])
    for sample, expected in zip(ours['data_samples'], theirs['data_samples'], strict=True):
        assert torch.equal(sample.text, expected.text) and torch.equal(sample.gt_label, expected.gt_label)
    if name == 'CaptionDataPreprocessor':
        assert [sample.num_words for sample in ours['data_samples']] == [3, 0, 5, 1]


def test_a_batch_without_samples():
    preprocessor = MODELS.build(dict(type='mmmilan.PretrainingDataPreprocessor', **NORMALISATION))
    assert preprocessor(dict(inputs=batch()['inputs'], data_samples=None))['data_samples'] is None
    assert preprocessor(dict(inputs=batch()['inputs']))['inputs'].shape == (4, 3, 32, 32)


@pytest.mark.parametrize('augments', [None, 'Mixup', 'CutMix'])
def test_classification(augments):
    settings = NORMALISATION | dict(num_classes=3)
    if augments:
        settings['batch_augments'] = dict(augments=[dict(type=augments, alpha=0.8)])
    results = []
    for name in ('mmmilan.ClassificationDataPreprocessor', 'mmpretrain.ClsDataPreprocessor'):
        torch.manual_seed(0)
        np.random.seed(0)
        results.append(MODELS.build(dict(type=name, **settings))(batch(), training=True))
    assert torch.equal(results[0]['inputs'], results[1]['inputs'])
    for sample, expected in zip(*(result['data_samples'] for result in results), strict=True):
        assert torch.equal(sample.gt_label, expected.gt_label)
        assert ('gt_score' in sample) == ('gt_score' in expected) == bool(augments)
        if augments:
            assert torch.equal(sample.gt_score, expected.gt_score)


@pytest.mark.parametrize('kind', [PretrainingDataPreprocessor, ClassificationDataPreprocessor])
def test_a_pipeline_that_packs_nothing(kind):
    with pytest.raises(
        InputError, match='A batch has no inputs but img_path, gt_label; let the data pipeline end with'
    ):
        kind()(dict(img_path=['a.jpg'], gt_label=[3]))


def test_a_batch_that_was_not_stacked():
    """As by MMEngine's ``pseudo_collate``."""
    images = list(batch()['inputs'])
    with pytest.raises(InputError, match='The images of a batch are a list, not a tensor; set collate_fn of the data'):
        PretrainingDataPreprocessor()(dict(inputs=images))
    assert ClassificationDataPreprocessor()(dict(inputs=images))['inputs'].shape == (4, 3, 32, 32)
