"""The draw of visible patches, and masks that come from the data pipeline."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmpretrain.structures import DataSample

from helpers import rest_slow
from mmmilan.errors import InputError
from mmmilan.models.masking import draw_mask
from mmmilan.registry import MODELS, TRANSFORMS

WEIGHTS = torch.tensor([0.05, 0.4, 0.1, 0.15, 0.3])


def exact_probabilities(weights: list[float], num_visible: int) -> dict[tuple[int, ...], float]:
    """Probability of every set of visible patches: the sum over all orders of drawing it without replacement."""
    probabilities = dict.fromkeys(itertools.combinations(range(len(weights)), num_visible), 0.0)
    for order in itertools.permutations(range(len(weights)), num_visible):
        probability, rest = 1.0, sum(weights)
        for patch in order:
            probability *= weights[patch] / rest
            rest -= weights[patch]
        probabilities[tuple(sorted(order))] += probability
    return probabilities


def count_sets(visible: torch.Tensor, num_visible: int) -> dict[tuple[int, ...], int]:
    """How often each set of patches occurs among the rows of a boolean tensor [B, N]."""
    sets = visible.nonzero()[:, 1].view(-1, num_visible)
    values, counts = sets.unique(dim=0, return_counts=True)
    return {tuple(value): count for value, count in zip(values.tolist(), counts.tolist(), strict=True)}


def chi_square(observed: dict, expected: dict) -> float:
    assert observed.keys() <= expected.keys()
    return sum((observed.get(key, 0) - count) ** 2 / count for key, count in expected.items())


@pytest.mark.parametrize('num_visible', rest_slow([1, 2, 3], 2))
def test_draw_is_exactly_sampling_without_replacement(num_visible):
    probabilities = exact_probabilities(WEIGHTS.tolist(), num_visible)
    assert math.isclose(sum(probabilities.values()), 1)
    size = 200_000
    visible = ~draw_mask(WEIGHTS.expand(size, -1), num_visible)
    expected = {key: size * probability for key, probability in probabilities.items()}
    freedom = len(expected) - 1
    # 5 standard deviations of chi-square; a product of weights in place of the draws is off by 1800 at V = 2
    assert chi_square(count_sets(visible, num_visible), expected) < freedom + 5 * math.sqrt(2 * freedom)


def test_draw_agrees_with_multinomial():
    """Of 196 patches weighted like a real attention map, each is visible as often as with torch.multinomial."""
    size, num_visible = 20_000, 49
    weights = torch.randn(196).mul(1.5).softmax(0).expand(size, -1)
    ours = (~draw_mask(weights, num_visible)).double().mean(0)
    drawn = torch.multinomial(weights, num_visible, replacement=False)
    theirs = torch.zeros(size, 196, dtype=torch.float64).scatter_(1, drawn, 1).mean(0)
    deviation = (ours * (1 - ours) + theirs * (1 - theirs)).div(size).sqrt()
    assert ((ours - theirs).abs() < 5 * deviation + 1e-9).all()
    assert theirs.max() - theirs.min() > 0.8  # the map does matter


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_exactly_v_visible(dtype):
    weights = torch.rand(64, 196).pow(8).to(dtype)
    mask = draw_mask(weights, 49)
    assert mask.dtype == torch.bool and mask.shape == (64, 196)
    assert (~mask).sum(1).tolist() == [49] * 64


def test_zero_importance_is_drawn_last():
    weights = torch.zeros(100, 16)
    weights[:, :6] = torch.tensor([1e-38, 1e-20, 1e-3, 1, 1e10, 1e38])
    assert draw_mask(weights, 6)[:, :6].sum() == 0  # the six positive ones before any zero, however small
    mask = draw_mask(weights, 9)
    assert mask[:, :6].sum() == 0 and (~mask).sum(1).unique().tolist() == [9]
    assert (~mask)[:, 6:].any(0).all()  # among zeros by chance


def test_importance_all_zero_is_a_uniform_draw():
    visible = ~draw_mask(torch.zeros(20_000, 8), 2)
    expected = dict.fromkeys(itertools.combinations(range(8), 2), 20_000 / 28)
    assert chi_square(count_sets(visible, 2), expected) < 27 + 5 * math.sqrt(54)


def test_random_masking_ignores_importance():
    masking = TRANSFORMS.build(dict(type='mmmilan.RandomMasking', mask_ratio=0.75))
    visible = ~masking.draw(torch.tensor([1e6, 1, 1, 1, 0, 0, 0, 0]).expand(20_000, -1), (20_000, 8))
    expected = dict.fromkeys(itertools.combinations(range(8), 2), 20_000 / 28)
    assert chi_square(count_sets(visible, 2), expected) < 27 + 5 * math.sqrt(54)


@pytest.mark.parametrize(
    ('num_patches', 'mask_ratio', 'floor', 'ceil'),
    [(196, 0.75, 49, 49), (197, 0.75, 49, 50), (10, 0.9, 1, 1), (100, 0.7, 30, 30), (49, 0.6, 19, 20), (16, 0, 16, 16)],
)
def test_number_of_visible_patches(num_patches, mask_ratio, floor, ceil):
    for rounding, expected in dict(floor=floor, ceil=ceil).items():
        cfg = dict(type='mmmilan.SemanticAwareMasking', mask_ratio=mask_ratio, rounding=rounding)
        masking = TRANSFORMS.build(cfg)
        assert masking.num_visible(num_patches) == expected
        assert (~masking.draw(torch.rand(3, num_patches), (3, num_patches))).sum(1).tolist() == [expected] * 3


@pytest.mark.parametrize(
    ('options', 'named'),
    [(dict(mask_ratio=1.0), 'mask_ratio=1.0'), (dict(mask_ratio=-0.1), 'mask_ratio'), (dict(rounding='up'), "'up'")],
)
def test_bad_options(options, named):
    with pytest.raises(InputError, match=named):
        TRANSFORMS.build(dict(type='mmmilan.SemanticAwareMasking', **options))


def test_a_ratio_that_leaves_nothing():
    masking = TRANSFORMS.build(dict(type='mmmilan.RandomMasking', mask_ratio=0.95))
    with pytest.raises(InputError, match=r'mask_ratio=0.95 leaves none of 16 patches'):
        masking.draw(None, (1, 16))


def pipeline(*transforms: dict) -> Compose:
    """A data pipeline with mmpretrain's packing, its transforms built through the registry as in a config."""
    return Compose([*transforms, dict(type='PackInputs')])


def test_masking_in_a_data_pipeline(official, milan_cfg):
    """importance -> mask -> data sample -> the loss of this mask and no other."""
    images, importance = official['input'], official['importance'].view(-1, 4, 4).numpy()
    transform = pipeline(dict(type='mmmilan.SemanticAwareMasking', mask_ratio=0.75))
    raw = np.zeros((64, 64, 3), np.uint8)
    samples = [transform(dict(img=raw, importance=each))['data_samples'] for each in importance]
    masks = torch.stack([torch.as_tensor(sample.mask) for sample in samples])
    assert masks.dtype == torch.bool and masks.shape == (len(images), 16)
    assert (~masks).sum(1).tolist() == [4] * len(images)

    model = MODELS.build(milan_cfg)
    model.init_weights()
    loss = model.loss(images, samples)['loss']
    assert loss == model.loss(images, samples)['loss']  # nothing is drawn
    assert loss == model.loss(images, [DataSample().set_mask(mask) for mask in masks])['loss']
    assert loss != model.loss(images, [DataSample().set_mask(mask) for mask in masks.flip(1)])['loss']
    predicted = model.predict(images, [sample.clone() for sample in samples])
    assert torch.equal(torch.stack([sample.mask for sample in predicted]), masks)


def test_pipeline_without_importance():
    with pytest.raises(InputError, match=r"results\['importance'\] for cat.jpg"):
        pipeline(dict(type='mmmilan.SemanticAwareMasking'))(dict(img_path='cat.jpg'))


def test_drawn_inside_the_algorithm(official, milan_cfg):
    """The mask is that of SemanticAwareMasking.draw on the teacher's importance with the same seed."""
    model = MODELS.build(milan_cfg)
    torch.manual_seed(3)
    predicted = torch.stack([sample.mask for sample in model.predict(official['input'])])
    torch.manual_seed(3)
    assert torch.equal(predicted, model.masking.draw(model.head.run_teacher(official['input'])[1], predicted.shape))
