"""k-NN: votes against slow references, accuracy by tools/test.py in one process and in two; the effective rank."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from helpers import labelled_folder, read_metrics, read_scores, strip_prefix
from mmmilan.evaluation.probes import rankme, vote
from mmmilan.registry import MODELS
from processes import run_script_on_ranks


def test_rankme():
    rng = np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.standard_normal((100, 8)))[0]
    assert rankme(orthogonal) == pytest.approx(8, abs=1e-2)
    assert rankme(np.outer(rng.random(100), rng.random(8))) == pytest.approx(1, abs=1e-2)
    assert 1 < rankme(orthogonal * np.array([5, 5, 5, 1, 1, 1, 1, 1])) < 8


KNN_OPTIONS = ['--cfg-options', 'test_evaluator.topk=(1,2,5)']


def test_vote_equals_slow_references():
    rng = np.random.default_rng(0)
    bank, queries = (rng.normal(size=(n, 12)).astype(np.float32) for n in (90, 17))
    bank, queries = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (bank, queries))
    labels = rng.integers(0, 6, 90)
    shares = vote(*map(torch.from_numpy, (queries, bank, labels)), num_classes=6, k=20, temperature=0.07).numpy()
    for query, share in zip(queries, shares, strict=True):
        expected = np.zeros(6)
        for j in sorted(range(90), key=lambda j: -(query @ bank[j]))[:20]:
            expected[labels[j]] += np.exp(query @ bank[j] / 0.07)
        np.testing.assert_allclose(share, expected / expected.sum(), rtol=1e-3, atol=1e-6)
    sklearn = KNeighborsClassifier(20, metric='cosine', weights=lambda distance: np.exp((1 - distance) / 0.07))
    np.testing.assert_allclose(shares, sklearn.fit(bank, labels).predict_proba(queries), rtol=1e-3, atol=1e-6)
    all_of_them = vote(*map(torch.from_numpy, (queries, bank, labels)), num_classes=6, k=500, temperature=0.07)
    assert (all_of_them > 0).all()  # with fewer images than neighbours, all of them vote


@pytest.fixture
def knn_config(benchmark_config, labelled_images):
    changes = {'test_dataloader.dataset': labelled_folder(labelled_images / 'val')}
    changes['test_cfg.bank_dataloader.dataset.data_root'] = str(labelled_images / 'train')
    return benchmark_config('vit-base-p16_knn_in1k.py', changes)


def accuracy_by_hand(encoder: nn.Module, images: Path) -> tuple[float, float]:
    """Top-1 and top-2 accuracy by a loop over the images."""

    def features(split: str) -> tuple[Tensor, list[int]]:
        paths = sorted((images / split).rglob('*.png'))
        pixels = np.stack([cv2.imread(str(path))[..., ::-1] for path in paths]).astype(np.float32)
        pixels = (pixels - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
        with torch.no_grad():
            tokens = encoder(torch.from_numpy(pixels).float().permute(0, 3, 1, 2))[-1]
        return F.normalize(tokens, dim=1), [int(path.parent.name[-1]) for path in paths]

    (bank, labels), (queries, truth) = features('train'), features('val')
    hits = np.zeros(2)
    for query, label in zip(queries, truth, strict=True):
        similarity = bank @ query
        votes = np.zeros(5)
        for j in similarity.argsort(descending=True)[:20]:
            votes[labels[j]] += float((similarity[j] / 0.07).exp())
        best = (-votes).argsort()
        hits += [best[0] == label, label in best[:2]]
    return tuple(100 * hits / len(truth))


def test_knn_from_a_raw_pretraining_checkpoint(
    knn_config, pretrained_checkpoint, labelled_images, milan_cfg, run_tool, tmp_path
):
    """tools/test.py takes the file unconverted and gives the accuracy of a slow reference."""
    encoder = MODELS.build(milan_cfg['backbone'])
    weights = torch.load(pretrained_checkpoint)['state_dict']
    encoder.load_state_dict(strip_prefix(weights, 'backbone.'))
    top1, top2 = accuracy_by_hand(encoder, labelled_images)
    assert 20 < top1 < top2 < 100  # better than chance, and not perfect

    run_tool('test.py', knn_config, pretrained_checkpoint, *KNN_OPTIONS)
    metrics = read_metrics(tmp_path / 'work')
    assert metrics['accuracy/top1'] == pytest.approx(top1, abs=1e-4)
    assert metrics['accuracy/top2'] == pytest.approx(top2, abs=1e-4)
    assert metrics['accuracy/top5'] == 100


def test_knn_with_the_config_of_pretraining(
    knn_config, tiny_config, pretrained_checkpoint, labelled_images, run_tool, tmp_path
):
    """It needs no teacher and builds none: the accuracy is that of the config of the encoder."""
    run_tool('test.py', knn_config, pretrained_checkpoint, '--out', tmp_path / 'encoder.pkl', *KNN_OPTIONS)
    knn = Config.fromfile(knn_config)
    config = Config.fromfile(tiny_config())
    config.model.head.teacher.pretrained = str(tmp_path / 'gone.pt')
    for key in ('test_dataloader', 'test_evaluator', 'test_cfg'):
        config[key] = knn[key]
    config.dump(tmp_path / 'pretraining.py')
    options = ['--work-dir', tmp_path / 'work2', '--out', tmp_path / 'whole.pkl', *KNN_OPTIONS]
    run_tool('test.py', tmp_path / 'pretraining.py', pretrained_checkpoint, *options)
    assert torch.equal(*(read_scores(tmp_path / name) for name in ('encoder.pkl', 'whole.pkl')))


@pytest.mark.slow
def test_knn_on_two_ranks(knn_config, pretrained_checkpoint, labelled_images, run_tool, tmp_path):
    """They give the votes of one process, for numbers of images that two does not divide: 25 test, 39 labelled."""
    (labelled_images / 'train/class0/0.png').unlink()
    run_tool('test.py', knn_config, pretrained_checkpoint, '--out', tmp_path / 'one.pkl', *KNN_OPTIONS)
    options = ['--work-dir', tmp_path / 'two', '--out', tmp_path / 'two.pkl', *KNN_OPTIONS]
    run_script_on_ranks('test.py', 2, knn_config, pretrained_checkpoint, *options)
    one, two = read_metrics(tmp_path / 'work'), read_metrics(tmp_path / 'two')
    assert [one[f'accuracy/top{k}'] for k in (1, 2)] == [two[f'accuracy/top{k}'] for k in (1, 2)]
    one, two = read_scores(tmp_path / 'one.pkl'), read_scores(tmp_path / 'two.pkl')
    assert one.shape == two.shape == (25, 5)
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_knn_of_different_classes(knn_config, pretrained_checkpoint, labelled_images, run_tool):
    (labelled_images / 'val/class4').rename(labelled_images / 'val/other')
    message = r'val/? has 1 of its 5 classes, other \(5 samples\), where .*train/? has class0, class1, .*; rename'
    with pytest.raises(SystemExit, match=message):
        run_tool('test.py', knn_config, pretrained_checkpoint)


def test_knn_of_fewer_classes(knn_config, pretrained_checkpoint, labelled_images, run_tool, tmp_path):
    """They keep their numbers: without two classes, each of the other test images gets the score that it had."""
    run_tool('test.py', knn_config, pretrained_checkpoint, '--out', tmp_path / 'all.pkl', *KNN_OPTIONS)
    for name in ('class0', 'class2'):
        shutil.rmtree(labelled_images / 'val' / name)
    run_tool('test.py', knn_config, pretrained_checkpoint, '--out', tmp_path / 'few.pkl', *KNN_OPTIONS)
    every, few = (pickle.loads((tmp_path / name).read_bytes()) for name in ('all.pkl', 'few.pkl'))
    kept = {sample['img_path']: sample for sample in every}
    assert len(few) == 15
    for sample in few:
        assert int(sample['gt_label']) == int(kept[sample['img_path']]['gt_label']) in (1, 3, 4)
        torch.testing.assert_close(sample['pred_score'], kept[sample['img_path']]['pred_score'], atol=1e-5, rtol=1e-4)
