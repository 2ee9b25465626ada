"""MaskCLIP in MMEngine's loops: training and resuming, zero-shot classification, retrieval."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import open_clip
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor
from torch.nn.functional import normalize

from helpers import ROOT, assert_identical, load_trusted, read_scalars, real_data
from mmmilan.demo.scenes import write_scenes
from mmmilan.demo.scenes.appearance import SEMANTIC_CLASSES
from mmmilan.errors import InputError
from mmmilan.evaluation import RetrievalRecall
from mmmilan.evaluation.zero_shot import read_templates
from mmmilan.masking import Masking, SemanticAwareMasking
from mmmilan.models import MaskCLIP
from mmmilan.prompted_masking import PromptedMasking
from mmmilan.registry import DATASETS, MODELS

CONFIG = ROOT / 'configs/demo/maskclip_vit-tiny-p8_scenes.py'


def write_config(folder: Path, name: str, changes: dict | None = None) -> Path:
    """The demo's config on the scenes in ``folder``, for two epochs of 3 steps, with a narrower text tower."""
    cfg = Config.fromfile(CONFIG)
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(batch_size=16, num_workers=0)
        loader.dataset.data_root = loader.dataset.data_root.replace('demo/scenes', str(folder / 'scenes'))
    cfg.train_dataloader.dataset.captions = str(folder / 'scenes/captions_train.csv')
    cfg.model.text.update(width=32, layers=1)
    cfg.param_scheduler[1].update(T_max=1, end=2)
    cfg.train_cfg.max_epochs = 2
    cfg.default_hooks.logger.interval = 1
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    cfg.work_dir = str(folder / 'work')
    cfg.merge_from_dict(changes or {})
    cfg.dump(folder / f'{name}.py')
    return folder / f'{name}.py'


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """48 drawn scenes for training, 20 for testing."""
    folder = tmp_path_factory.mktemp('clip')
    write_scenes(folder / 'scenes', 48, 20)
    return folder


@pytest.fixture
def trained(folder, run_tool) -> Path:
    """The work dir of a run of two epochs."""
    if not (folder / 'work/epoch_2.pth').is_file():
        run_tool('train.py', write_config(folder, 'train'))
    return folder / 'work'


def test_resumed_run_is_bit_identical(folder, trained, run_tool):
    """With mean teachers and temperature: the second epoch again, from the checkpoint of the first."""
    (folder / 'resumed').mkdir()
    shutil.copy(trained / 'epoch_1.pth', folder / 'resumed')
    resume = ('--work-dir', folder / 'resumed', '--resume', folder / 'resumed/epoch_1.pth')
    run_tool('train.py', write_config(folder, 'resume'), *resume)
    first, expected = load_trusted(trained / 'epoch_1.pth'), load_trusted(trained / 'epoch_2.pth')
    assert_identical(load_trusted(folder / 'resumed/epoch_2.pth'), expected)

    weights = expected['state_dict']
    for name in ('logit_scale', 'backbone.layers.0.attn.qkv.weight', 'head.mean_tokenizer.module.weight'):
        assert not torch.equal(weights[name], first['state_dict'][name]), name
    student, teacher = (weights[f'{start}layers.0.attn.qkv.weight'] for start in ('backbone.', 'mean_teacher.module.'))
    assert not torch.equal(student, teacher)
    rows = read_scalars(trained)
    assert len(rows) == 6
    assert all(row['loss'] == pytest.approx(sum(v for k, v in row.items() if k.startswith('loss_'))) for row in rows)
    assert 0.01 < rows[-1]['temperature'] < 0.1 and rows[0]['temperature'] == pytest.approx(0.07)


def build(folder: Path, checkpoint: Path) -> tuple[MaskCLIP, Config]:
    cfg = Config.fromfile(write_config(folder, 'reference'))
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(load_trusted(checkpoint)['state_dict'])
    return model, cfg


@torch.no_grad()
def embed(model: MaskCLIP, image: Tensor) -> Tensor:
    """One image [3, H, W] of the pipeline, BGR, by hand."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    return model.encode_image(((image.flip(0).float() - mean) / std)[None])[0]


def result_of(work_dir: Path) -> dict[str, float]:
    result = json.loads(max(work_dir.glob('*/*.json'), key=lambda path: path.stat().st_mtime).read_text())
    return {key: value for key, value in result.items() if not key.endswith('time')}


@torch.no_grad()
def test_export_to_open_clip(folder, trained, run_tool):
    """By tools/export_open_clip.py; the embeddings are those of the checkpoint."""
    run_tool('export_open_clip.py', write_config(folder, 'export'), trained / 'epoch_2.pth', folder / 'open_clip')
    clip = open_clip.create_model(f'local-dir:{folder / "open_clip"}').eval()
    model, _ = build(folder, trained / 'epoch_2.pth')
    images, text = torch.randn(3, 3, 64, 64), SimpleTokenizer(context_length=24)(['a tiger', 'gold on sand'])
    assert torch.allclose(clip.encode_image(images, normalize=True), model.encode_image(images), atol=1e-5)
    assert torch.allclose(clip.encode_text(text, normalize=True), model.encode_text(text), atol=1e-5)
    milan = ROOT / 'configs/milan/ablations/mae_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
    with pytest.raises(SystemExit, match='is a config of MILAN; give one of MaskCLIP'):
        run_tool('export_open_clip.py', milan, trained / 'epoch_2.pth', folder / 'open_clip')


TEMPLATES = ['a {}', 'a photo of a {} on grass']


@torch.no_grad()
def test_zero_shot_classification(folder, trained, run_tool):
    """By tools/test.py, equal to open_clip's classifier and a loop over images."""
    changes = {'test_cfg.templates': TEMPLATES, 'work_dir': str(folder / 'zero-shot'), 'test_evaluator.topk': (1, 3)}
    run_tool('test.py', write_config(folder, 'zero_shot', changes), trained / 'epoch_2.pth')
    result = result_of(folder / 'zero-shot')

    model, cfg = build(folder, trained / 'epoch_2.pth')
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    assert len(dataset) == 20 and len(dataset.metainfo['classes']) == 10
    classifier = open_clip.build_zero_shot_classifier(
        WithNormalize(model), SimpleTokenizer(context_length=24), dataset.metainfo['classes'], TEMPLATES
    )
    hits = dict.fromkeys((1, 3), 0)
    for sample in dataset:
        order = (embed(model, sample['inputs']) @ classifier).argsort(descending=True).tolist()
        for k in hits:
            hits[k] += int(sample['data_samples'].gt_label) in order[:k]
    assert result == {f'accuracy/top{k}': pytest.approx(5 * n) for k, n in hits.items()}


class WithNormalize:
    """A MaskCLIP as open_clip calls its models."""

    def __init__(self, model: MaskCLIP) -> None:
        self.model = model

    def encode_text(self, text: Tensor, normalize: bool) -> Tensor:
        assert normalize
        return self.model.encode_text(text)


def test_names_and_templates_that_do_not_fit(folder, trained, run_tool, capsys):
    for change, message in (
        ({'test_cfg.class_names': ['cat', 'dog']}, 'names 2 classes and the data set has 10'),
        ({'test_dataloader.dataset.with_label': False}, 'names 0 classes and the data set has 0'),
        ({'test_cfg.templates': ['a {}', 'photo']}, 'give a list of prompts with {} in each'),
    ):
        config = write_config(folder, f'misfit{len(message)}', change | dict(work_dir=str(folder / 'misfit')))
        with pytest.raises(SystemExit) as exit_:
            run_tool('test.py', config, trained / 'epoch_2.pth')
        assert message in str(exit_.value)
    assert read_templates('openai')[0]('cat') == 'a bad photo of a cat.' and len(read_templates('openai')) == 80


def retrieval(folder: Path) -> dict:
    """Changes of the demo's config that test retrieval on the scenes in ``folder``."""
    dataset_cfg = dict(
        _delete_=True,
        type='mmmilan.CaptionedImages',
        data_root=str(folder / 'scenes/val'),
        captions=str(folder / 'scenes/captions_val.csv'),
        pipeline=[
            dict(type='mmmilan.LoadImage'),
            dict(type='Resize', scale=(64, 64), interpolation='area'),
            dict(type='mmmilan.TokenizeCaption', context_length=24, all_captions=True),
            dict(type='PackInputs', algorithm_keys=('text',)),
        ],
    )
    return {
        'work_dir': str(folder / 'retrieval'),
        'test_dataloader.dataset': dataset_cfg,
        'test_evaluator': dict(_delete_=True, type='mmmilan.RetrievalRecall'),
        'test_cfg': dict(_delete_=True),
    }


@torch.no_grad()
def test_retrieval(folder, trained, run_tool):
    """By tools/test.py, equal to sorting all similarities by hand."""
    config = write_config(folder, 'retrieval', retrieval(folder))
    run_tool('test.py', config, trained / 'epoch_2.pth')
    result = result_of(folder / 'retrieval')

    model, _ = build(folder, trained / 'epoch_2.pth')
    dataset = DATASETS.build(Config.fromfile(config).test_dataloader.dataset)
    with open(folder / 'scenes/captions_val.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    names = [Path(dataset[i]['data_samples'].img_path).name for i in range(20)]
    images = torch.stack([embed(model, dataset[i]['inputs']) for i in range(20)])
    texts = model.encode_text(SimpleTokenizer(context_length=24)([row['caption'] for row in rows]))
    owners = [names.index(Path(row['image']).name) for row in rows]
    assert result == {f'retrieval/{key}': pytest.approx(v) for key, v in slow_recall(images, texts, owners).items()}
    assert 0 < result['retrieval/text_recall@5'] < result['retrieval/text_recall@10'] < 100  # something to tell apart


def slow_recall(images: Tensor, texts: Tensor, owners: list[int]) -> dict[str, float]:
    """Recall by sorting; what is tied comes first if it is wrong."""
    recall = {}
    for k in (1, 5, 10):
        found = 0
        for i, image in enumerate(images):
            order = sorted(range(len(texts)), key=lambda t: (-round(float(image @ texts[t]), 6), owners[t] == i))
            found += any(owners[t] == i for t in order[:k])
        recall[f'text_recall@{k}'] = 100 * found / len(images)
        found = 0
        for t, text in enumerate(texts):
            order = sorted(range(len(images)), key=lambda i: (-round(float(images[i] @ text), 6), owners[t] == i))
            found += owners[t] in order[:k]
        recall[f'image_recall@{k}'] = 100 * found / len(texts)
    return recall


def recall_of(images: Tensor, texts: list[Tensor]) -> dict[str, float]:
    metric = Evaluator(RetrievalRecall())
    samples = [dict(image_embedding=i, text_embedding=t) for i, t in zip(images, texts, strict=True)]
    for start in range(0, len(samples), 7):
        metric.metrics[0].process({}, samples[start : start + 7])
    return metric.evaluate(len(samples))


def test_recall_of_random_embeddings(monkeypatch):
    """Images with one to three texts each; similarities are taken in several pieces."""
    monkeypatch.setattr('mmmilan.evaluation.retrieval.CHUNK', 8)
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


@pytest.mark.slow
def test_finds_the_captions_of_new_images_after_half_a_minute(run_tool, tmp_path):
    """Recall far above chance, 10 of 200 images, on scenes not seen in training."""
    write_scenes(tmp_path / 'scenes', 480, 200)
    changes = {'train_dataloader.batch_size': 32, 'optim_wrapper.optimizer.lr': 3e-3, 'train_cfg.max_epochs': 5}
    changes['param_scheduler'] = [
        dict(type='LinearLR', start_factor=0.01, end=1, convert_to_iter_based=True),
        dict(type='CosineAnnealingLR', begin=1, T_max=4, end=5, convert_to_iter_based=True),
    ]
    run_tool('train.py', write_config(tmp_path, tmp_path.name, changes))
    config = write_config(tmp_path, f'{tmp_path.name}_retrieval', retrieval(tmp_path))
    run_tool('test.py', config, tmp_path / 'work/epoch_5.pth')
    result = result_of(tmp_path / 'retrieval')
    assert result['retrieval/image_recall@10'] > 20 and result['retrieval/text_recall@10'] > 20, result


@pytest.mark.data
def test_the_words_of_a_prompt_keep_what_they_name():
    """More of the tigers' patches are drawn by 'a tiger' than by attention, or by what else is on the scenes.

    With the MaskCLIP and the scenes of a run of ``tools/demo.py --out demo``.
    """
    checkpoint, cfg = real_data('demo/maskclip-seed0/epoch_4.pth'), Config.fromfile(CONFIG)
    scenes = real_data('demo/scenes')
    teacher = MODELS.build(dict(type='mmmilan.OpenCLIPTeacher', pretrained=str(checkpoint))).eval()
    dataset = dict(type='mmmilan.ImageFolder', data_root=str(scenes / 'val/tiger'))
    dataset = DATASETS.build(dataset | dict(pipeline=cfg.test_dataloader.dataset.pipeline))
    samples = [dataset[i] for i in range(len(dataset))]
    normalise = MODELS.build(cfg.model.data_preprocessor)
    images = normalise(dict(inputs=torch.stack([sample['inputs'] for sample in samples])))['inputs']
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
    """Which of the 8 x 8 patches [64] are for more than half of what the name says."""
    pixels = cv2.imread(str(label_map), cv2.IMREAD_GRAYSCALE) == SEMANTIC_CLASSES.index(name)
    return torch.from_numpy(cv2.resize(np.float32(pixels), (8, 8), interpolation=cv2.INTER_AREA) > 0.5).flatten()
