"""Accuracy on data sets with some of ImageNet's classes, such as ImageNet-A; recall of retrieval against sorting."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmpretrain.structures import DataSample
from timm.data import ImageNetInfo
from torch import Tensor
from torch.nn.functional import normalize

from helpers import read_metrics, slow_recall
from mmmilan.errors import InputError
from mmmilan.evaluation import RetrievalRecall
from mmmilan.evaluation.metrics import ImageNetSubsetAccuracy
from mmmilan.registry import MODELS

FINE_TUNING = 'vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py'


def synsets_of_imagenet_a() -> list[str]:
    import timm.data

    return Path(timm.data.__file__).with_name('_info').joinpath('imagenet_a_synsets.txt').read_text().split()


def test_subset_accuracy_is_the_argmax_over_the_subset():
    """The 200 classes of ImageNet-A, scored as by its authors: argmax over the logits of these classes."""
    folders = synsets_of_imagenet_a()
    assert len(folders) == 200
    names = ImageNetInfo('imagenet-1k').label_names()
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(200, (300,), generator=generator)
    logits = torch.randn(300, 1000, generator=generator)
    logits[range(300), [names.index(folders[label]) for label in labels]] += 2.0
    subset = torch.stack([logits[:, names.index(folder)] for folder in folders], dim=1)
    expected = 100 * (subset.argmax(1) == labels).float().mean().item()
    expected5 = 100 * (subset.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    over_all = sum(names[row.argmax()] == folders[label] for row, label in zip(logits, labels, strict=True)) / 3

    samples = [
        DataSample().set_gt_label(int(label)).set_pred_score(row.softmax(0))
        for row, label in zip(logits, labels, strict=True)
    ]
    evaluator = Evaluator(ImageNetSubsetAccuracy())
    evaluator.dataset_meta = dict(classes=tuple(folders))
    evaluator.process(samples[:150])
    evaluator.process(samples[150:])
    metrics = evaluator.evaluate(300)
    assert metrics['accuracy/top1'] == pytest.approx(expected) and over_all < expected - 5
    assert metrics['accuracy/top5'] == pytest.approx(expected5) and expected5 > expected


def test_subset_accuracy_needs_wordnet_ids_and_imagenet_classes():
    metric = ImageNetSubsetAccuracy()
    metric.dataset_meta = dict(classes=('n01498041', 'n00000001', 'dog'))
    sample = dict(pred_score=torch.ones(1000) / 1000, gt_label=torch.tensor([0]))
    with pytest.raises(InputError, match=r'2 of the 3 class folders are not WordNet ids .* \(n00000001, dog\)'):
        metric.process({}, [sample])
    with pytest.raises(InputError, match='The model has 10 classes; .* needs the 1000'):
        metric.process({}, [sample | dict(pred_score=torch.ones(10))])


def test_imagenet_a_through_the_tool(benchmark_config, image_folder, run_tool, tmp_path):
    """tools/test.py with folders named by WordNet ids and a fine-tuned checkpoint writes both accuracies."""
    folders = synsets_of_imagenet_a()[:6]
    for i, path in enumerate(sorted(image_folder.rglob('*.jpg'))):
        target = tmp_path / 'imagenet-a' / folders[i % 6] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / 'imagenet-a/README.txt').write_text('as in the original')
    model = MODELS.build(Config.fromfile(benchmark_config(FINE_TUNING)).model)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'fine-tuned.pth')
    data_root = {'test_dataloader.dataset.data_root': str(tmp_path / 'imagenet-a')}
    config = benchmark_config('vit-base-p16_imagenet-a.py', data_root)
    run_tool('test.py', config, tmp_path / 'fine-tuned.pth')
    metrics = read_metrics(tmp_path / 'work')
    assert 0 <= metrics['accuracy/top1'] <= metrics['accuracy/top5'] and metrics['accuracy/top5'] > 50  # of 6 classes


def recall_of(images: Tensor, texts: list[Tensor]) -> dict[str, float]:
    metric = Evaluator(RetrievalRecall())
    samples = [dict(image_embedding=i, text_embedding=t) for i, t in zip(images, texts, strict=True)]
    for start in range(0, len(samples), 7):
        metric.metrics[0].process({}, samples[start : start + 7])
    return metric.evaluate(len(samples))


def test_recall_of_random_embeddings(monkeypatch):
    """Images with one to three texts each; similarities are computed in several chunks."""
    monkeypatch.setattr('mmmilan.evaluation.metrics.CHUNK', 8)
    images = normalize(torch.randn(30, 6), dim=1)
    texts = [normalize(image + torch.randn(1 + i % 3, 6), dim=1) for i, image in enumerate(images)]
    owners = [i for i, own in enumerate(texts) for _ in own]
    expected = slow_recall(images, torch.cat(texts), owners)
    assert recall_of(images, texts) == {f'retrieval/{k}': pytest.approx(v) for k, v in expected.items()}
    assert 0 < expected['image_recall@1'] < expected['image_recall@10'] < 100


@pytest.mark.parametrize('value', [1.0, torch.nan])
def test_collapsed_embeddings_find_nothing(value):
    images = torch.full((30, 4), value)
    assert set(recall_of(images, [row[None] for row in images]).values()) == {0.0}


def test_retrieval_needs_texts():
    with pytest.raises(InputError, match='a.png has no text; add TokenizeCaption'):
        RetrievalRecall().process({}, [dict(img_path='a.png', image_embedding=torch.ones(2))])
