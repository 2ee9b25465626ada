"""MaskCLIP through the tools: training, resuming, export, zero-shot classification, retrieval."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from mmengine.config import Config
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from helpers import ROOT, assert_identical, load_trusted, read_metrics, read_scalars, slow_recall
from mmmilan.errors import InputError
from mmmilan.evaluation.zero_shot import read_templates
from mmmilan.models import MaskCLIP
from mmmilan.registry import DATASETS, MODELS
from scenes import write_scenes

CONFIG = ROOT / 'configs/demo/maskclip_vit-tiny-p8_scenes.py'


def write_config(folder: Path, name: str, changes: dict | None = None) -> Path:
    """Write the demo's config for the scenes in ``folder``: two epochs of 3 steps, a narrower text tower, changes."""
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


@pytest.mark.slow
def test_resumed_run_is_bit_identical(folder, trained, run_tool):
    """The second epoch again from the checkpoint of the first, with mean teachers and temperature."""
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


def load_model(folder: Path, checkpoint: Path) -> tuple[MaskCLIP, Config]:
    cfg = Config.fromfile(write_config(folder, 'reference'))
    model = MODELS.build(cfg.model).eval()
    model.load_state_dict(load_trusted(checkpoint)['state_dict'])
    return model, cfg


@torch.no_grad()
def embed(model: MaskCLIP, image: Tensor) -> Tensor:
    """Embedding of one image [3, H, W] of the pipeline, in BGR, normalised by hand."""
    mean, std = (torch.tensor(v)[:, None, None] for v in ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]))
    return model.encode_image(((image.flip(0).float() - mean) / std)[None])[0]


def result_of(work_dir: Path) -> dict[str, float]:
    """Metrics without the times."""
    return {key: value for key, value in read_metrics(work_dir).items() if not key.endswith('time')}


@pytest.mark.slow
@torch.no_grad()
def test_export_to_open_clip(folder, trained, run_tool):
    """tools/export_open_clip.py: the embeddings equal those of the checkpoint."""
    run_tool('export_open_clip.py', write_config(folder, 'export'), trained / 'epoch_2.pth', folder / 'open_clip')
    clip = open_clip.create_model(f'local-dir:{folder / "open_clip"}').eval()
    model, _ = load_model(folder, trained / 'epoch_2.pth')
    images, text = torch.randn(3, 3, 64, 64), SimpleTokenizer(context_length=24)(['a tiger', 'gold on sand'])
    assert torch.allclose(clip.encode_image(images, normalize=True), model.encode_image(images), atol=1e-5)
    assert torch.allclose(clip.encode_text(text, normalize=True), model.encode_text(text), atol=1e-5)
    milan = ROOT / 'configs/milan/ablations/mae_vit-base-p16_16xb256-amp-coslr-400e_in1k.py'
    with pytest.raises(SystemExit, match='is a config of MILAN; give one of MaskCLIP'):
        run_tool('export_open_clip.py', milan, trained / 'epoch_2.pth', folder / 'other')


TEMPLATES = ['a {}', 'a photo of a {} on grass']


@pytest.mark.slow
@torch.no_grad()
def test_zero_shot_classification(folder, trained, run_tool):
    """tools/test.py gives the accuracy of open_clip's classifier in a loop over images."""
    changes = {'test_cfg.templates': TEMPLATES, 'work_dir': str(folder / 'zero-shot'), 'test_evaluator.topk': (1, 3)}
    run_tool('test.py', write_config(folder, 'zero_shot', changes), trained / 'epoch_2.pth')
    result = result_of(folder / 'zero-shot')

    model, cfg = load_model(folder, trained / 'epoch_2.pth')
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
    """A MaskCLIP with the call that open_clip expects."""

    def __init__(self, model: MaskCLIP) -> None:
        self.model = model

    def encode_text(self, text: Tensor, normalize: bool) -> Tensor:
        assert normalize
        return self.model.encode_text(text)


@pytest.mark.slow
def test_refused_names_and_templates(folder, trained, run_tool):
    for change, message in (
        ({'test_cfg.class_names': ['cat', 'dog']}, 'names 2 classes and the data set has 10'),
        ({'test_dataloader.dataset.with_label': False}, 'names 0 classes and the data set has 0'),
        ({'test_cfg.templates': ['a {}', 'photo']}, 'give a list of prompts with {} in each'),
    ):
        config = write_config(folder, f'misfit{len(message)}', change | dict(work_dir=str(folder / 'misfit')))
        with pytest.raises(SystemExit, match=re.escape(message)):
            run_tool('test.py', config, trained / 'epoch_2.pth')
    assert read_templates('openai')[0]('cat') == 'a bad photo of a cat.' and len(read_templates('openai')) == 80


def retrieval_changes(folder: Path) -> dict:
    """Changes to the demo's config that evaluate retrieval on the scenes in ``folder``."""
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


@pytest.mark.slow
@torch.no_grad()
def test_retrieval(folder, trained, run_tool):
    """tools/test.py gives the recall of sorting all similarities by hand."""
    config = write_config(folder, 'retrieval', retrieval_changes(folder))
    run_tool('test.py', config, trained / 'epoch_2.pth')
    result = result_of(folder / 'retrieval')

    model, _ = load_model(folder, trained / 'epoch_2.pth')
    dataset = DATASETS.build(Config.fromfile(config).test_dataloader.dataset)
    with open(folder / 'scenes/captions_val.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    names = [Path(dataset[i]['data_samples'].img_path).name for i in range(20)]
    images = torch.stack([embed(model, dataset[i]['inputs']) for i in range(20)])
    texts = model.encode_text(SimpleTokenizer(context_length=24)([row['caption'] for row in rows]))
    owners = [names.index(Path(row['image']).name) for row in rows]
    assert result == {f'retrieval/{key}': pytest.approx(v) for key, v in slow_recall(images, texts, owners).items()}
    assert 0 < result['retrieval/text_recall@5'] < result['retrieval/text_recall@10'] < 100  # not perfect


@pytest.mark.slow
def test_short_training_retrieves_captions_of_new_images(run_tool, tmp_path):
    """A short training gives a recall far above chance (10 of 120 images) on unseen scenes."""
    write_scenes(tmp_path / 'scenes', 320, 120)
    changes = {'train_dataloader.batch_size': 16, 'optim_wrapper.optimizer.lr': 3e-3, 'train_cfg.max_epochs': 4}
    changes['param_scheduler'] = [
        dict(type='LinearLR', start_factor=0.01, end=1, convert_to_iter_based=True),
        dict(type='CosineAnnealingLR', begin=1, T_max=3, end=4, convert_to_iter_based=True),
    ]
    run_tool('train.py', write_config(tmp_path, tmp_path.name, changes))
    config = write_config(tmp_path, f'{tmp_path.name}_retrieval', retrieval_changes(tmp_path))
    run_tool('test.py', config, tmp_path / 'work/epoch_4.pth')
    result = result_of(tmp_path / 'retrieval')
    assert result['retrieval/image_recall@10'] > 25 and result['retrieval/text_recall@10'] > 25, result


def test_templates_of_a_file(tmp_path):
    path = tmp_path / 'food101.txt'
    path.write_text('a photo of {}, a type of food.\n\nart of the {}.\n')
    assert [prompt('ramen') for prompt in read_templates(str(path))] == [
        'a photo of ramen, a type of food.', 'art of the ramen.',
    ]  # fmt: skip
    for encoding in ('utf-8-sig', 'utf-16'):  # of editors and shells of Windows
        path.write_text('{} mit Soße\n', encoding=encoding)
        assert [prompt('ramen') for prompt in read_templates(str(path))] == ['ramen mit Soße']
    path.write_text('a photo\n')
    with pytest.raises(InputError, match='has no place for the name of a class'):
        read_templates(str(path))
    with pytest.raises(InputError, match="templates='food102.txt' is neither 'openai' nor a file"):
        read_templates('food102.txt')
