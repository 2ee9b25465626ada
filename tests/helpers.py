"""Helpers of several test files."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine import registry as roots
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmpretrain.structures import DataSample
from torch import Tensor, nn

from mmmilan.building import in_scope
from mmmilan.engine import MeanTeacherHook
from mmmilan.errors import InputError
from mmmilan.registry import MODELS
from mmmilan.teachers import Teacher

ROOT = Path(__file__).parent.parent
TINY_ARCH = dict(embed_dims=48, num_layers=2, num_heads=3, feedforward_channels=192)  # of the encoder in milan_cfg
PRETRAINED = 'milan_vit-base-p16_16xb256-amp-coslr-400e_in1k'  # models of the zoo with published weights
FINE_TUNED = 'vit-base-p16_milan-pre_8xb128-coslr-100e_in1k-openmmlab'
START_TOKEN, END_TOKEN = 38, 39  # of a text, in the vocabulary of 40 tokens of maskclip_cfg


# Options of a run that reads its images in its own process, which is quicker for few of them.
HERE = {
    f'{loader}_dataloader.{option}': value
    for loader in ('train', 'val', 'test')
    for option, value in (('num_workers', 0), ('persistent_workers', False))
}


def rest_slow(cases: Iterable, *quick: object) -> list:
    """Parameters of a test; all but the quick ones, which stand for their kind, are marked ``slow``."""
    return [case if case in quick else pytest.param(case, marks=pytest.mark.slow) for case in cases]


def strip_prefix(entries: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose key begins with ``prefix``, without the prefix."""
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def real_data(name: str) -> Path:
    """A folder or file below ``MMMILAN_TEST_DATA``; the test is skipped where it is missing."""
    folder = os.environ.get('MMMILAN_TEST_DATA')
    if not folder or not Path(folder, name).exists():
        pytest.skip(f'set MMMILAN_TEST_DATA to a folder that holds {name}')
    return Path(folder, name)


def grey_png(value: int) -> bytes:
    """A PNG of 6 x 4 pixels of one brightness."""
    return cv2.imencode('.png', np.full((6, 4, 3), value, np.uint8))[1].tobytes()


# -- what runs write


def read_scalars(work_dir: Path) -> list[dict]:
    """What a run in ``work_dir`` logged at each step (the last run, if there were several)."""
    path = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_metrics(work_dir: Path) -> dict:
    """What the last evaluation in ``work_dir`` wrote."""
    newest = max(work_dir.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(newest.read_text().splitlines()[-1])


def read_scores(path: Path) -> Tensor:
    """Scores [images, classes] that tools/test.py --out wrote."""
    return torch.stack([sample['pred_score'] for sample in pickle.loads(path.read_bytes())])


def load_trusted(path: Path) -> dict:
    """A checkpoint that the test itself wrote, unpickled without checks."""
    return torch.load(path, weights_only=False)


def assert_identical(actual: dict, expected: dict) -> None:
    """Weights and the optimizer's moments are equal to the bit."""
    assert actual['state_dict'].keys() == expected['state_dict'].keys()
    for key, value in expected['state_dict'].items():
        assert torch.equal(actual['state_dict'][key], value), key
    assert actual['optimizer']['state'].keys() == expected['optimizer']['state'].keys()
    for index, state in expected['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(actual['optimizer']['state'][index][key], value), (index, key)


def assert_same_weights(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal to 1e-6, except biases of keys: their gradients are rounding errors, which AdamW scales up."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        other = actual[key]
        if key.endswith(('qkv.bias', '.kv.bias')):
            parts = 3 if key.endswith('qkv.bias') else 2
            other, value = (torch.cat([*x.chunk(parts)[: parts - 2], x.chunk(parts)[-1]]) for x in (other, value))
        torch.testing.assert_close(other, value, rtol=0, atol=1e-6)


# -- configs


def own_settings(path: Path) -> dict:
    """What a config file itself sets, on top of its bases."""
    text = re.sub(r'{{\$\w+:(.*?)}}', r'\1', path.read_text())  # environment variables at their defaults
    text = re.sub(r'{{_base_\..*?}}', 'None', text)  # values of the base
    text = re.sub(r', \*\*_base_\.\w+', '', text)
    settings: dict = {}
    exec(compile(text, path, 'exec'), settings)
    return {key: value for key, value in settings.items() if not key.startswith('__')}


def labelled_folder(root: Path) -> dict:
    """A data set of class folders in place of ImageNet's validation images, at 64 pixels."""
    cfg = Config.fromfile(ROOT / 'configs/milan/benchmarks/vit-base-p16_milan-pre_8xb128-coslr-100e_in1k.py')
    pipeline = cfg.test_dataloader.dataset.pipeline
    pipeline[1].scale = pipeline[2].crop_size = 64
    return dict(_delete_=True, type='mmmilan.ImageFolder', data_root=str(root), with_label=True, pipeline=pipeline)


def restated(own: dict, inherited: dict, prefix: str = '') -> Iterator[str]:
    """Keys that a config sets to the value that it inherits."""
    for key, value in own.items():
        if key in inherited and isinstance(value, dict) and isinstance(inherited[key], dict):
            if '_delete_' not in value:
                yield from restated(value, inherited[key], f'{prefix}{key}.')
        elif key in inherited and value == inherited[key]:
            yield prefix + key


def real_model(cfg: Config) -> nn.Module:
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


def check_layer_decay(
    path: str, blocks: int, decay: float, rate: float, weight_decay: float, constructor: str | None = None
) -> None:
    """Learning rates are rate · decay^(blocks + 1 - depth); depth is 0 before the blocks, blocks + 1 after them."""
    cfg = Config.fromfile(ROOT / 'configs' / path)
    model = real_model(cfg)
    cfg.optim_wrapper.type = 'OptimWrapper'  # AmpOptimWrapper asks for a GPU
    cfg.optim_wrapper.constructor = constructor or cfg.optim_wrapper.constructor
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group['params']}
    settings = {(group['lr'], group['weight_decay']) for group in optimizer.param_groups}
    assert len(settings) == len(optimizer.param_groups) <= 2 * (blocks + 2)  # not one for each parameter
    depths = set()
    for key, parameter in model.named_parameters():
        depth = blocks + 1
        if match := re.match(r'backbone\.layers\.(\d+)\.', key):
            depth = int(match[1]) + 1
        elif re.match(r'backbone\.(patch_embed|cls_token|pos_embed|pre_norm)\b', key):
            depth = 0
        group = groups.pop(id(parameter))
        assert group['lr'] == pytest.approx(rate * decay ** (blocks + 1 - depth), rel=1e-9), key
        spared = parameter.ndim == 1 or 'rel_pos' in key or key.endswith(('cls_token', 'pos_embed'))
        if path.startswith('detection') and key.endswith('.bias'):  # as in MIMDet; biases of norms are spared
            spared = isinstance(model.get_submodule(key.removesuffix('.bias')), NORMS)
        assert group['weight_decay'] == pytest.approx(0 if spared else weight_decay), key
        depths.add(depth)
    assert not groups and depths == set(range(blocks + 2))


# -- models and batches


DEMO = dict(
    classification='vit-tiny-p8_finetune_scenes.py',
    detection='mask-rcnn_vit-tiny-p8_scenes.py',
    segmentation='upernet_vit-tiny-p8_scenes.py',
)  # configs/demo, by task


def demo_config(task: str) -> Config:
    """The demo's config of a task, with an encoder of two layers and 32 dimensions, and without a checkpoint."""
    cfg = Config.fromfile(ROOT / 'configs/demo' / DEMO[task])
    arch = dict(embed_dims=32, num_layers=2, num_heads=2, feedforward_channels=64)
    cfg.model.backbone.update(arch=arch, init_cfg=None)
    if task == 'classification':
        cfg.model.head.in_channels = 32
        return cfg
    cfg.model.backbone.out_indices = (0, 0, 1, 1)
    if task == 'detection':
        cfg.model.backbone.global_indices = (1,)
        cfg.model.neck.in_channels = [32] * 4
        cfg.model.test_cfg.rcnn.score_thr = 0.0  # an untrained detector finds something
    else:
        cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels = [32] * 4, 32
    return cfg


def save_trained(cfg: Config, path: Path, classes: Sequence[str]) -> Path:
    """A checkpoint as MMEngine's runner writes one, untrained."""
    torch.manual_seed(0)
    with in_scope(cfg):
        model = roots.MODELS.build(cfg.model)
        model.init_weights()
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=tuple(classes)))
    if cfg.default_scope == 'mmseg':
        meta['dataset_meta']['palette'] = [[i, 9 * i, 255 - i] for i in range(len(classes))]
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


def save_untrained(task: str, scenes: Path, folder: Path, boxes_alone: bool = False) -> Path:
    """An untrained checkpoint of a task, whose config reads the ten scenes and writes to ``work`` in the folder."""
    cfg = demo_config(task)
    if boxes_alone:
        cfg.model.roi_head.mask_head = cfg.model.roi_head.mask_roi_extractor = None
        cfg.test_dataloader.dataset.pipeline[2].with_mask = False
        cfg.test_evaluator.metric = 'bbox'
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False, batch_size=5)
        loader.dataset.update(data_root=str(scenes), indices=None)
    if task == 'detection':
        for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
            evaluator.ann_file = str(scenes / 'annotations/instances_val.json')
    classes = cfg.test_dataloader.dataset.get('metainfo', {}).get('classes') or sorted(
        path.name for path in (scenes / 'val').iterdir() if path.is_dir()
    )
    cfg.work_dir = str(folder / 'work')
    return save_trained(cfg, folder / f'{task}.pth', classes)


def build_model(cfg: dict) -> nn.Module:
    """A model with initialised weights, the same at each call."""
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return model


def build_error(cfg: dict) -> str:
    """Build a model, or a part of one, that cannot be built; returns the error message, which is one line."""
    with pytest.raises(InputError) as error:
        MODELS.build(cfg)
    assert '\n' not in str(error.value)
    return str(error.value)


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Change every weight, in place: most start at zero or one, where a part has no effect. Sets eval mode."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.eval()  # mmpretrain's backbones return None
    return model


def masked_batch(size: int) -> tuple[Tensor, list[DataSample]]:
    """Fixed images [size, 3, 64, 64] and masks with 4 of 16 patches visible."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 64, 64, generator=generator)
    order = torch.rand(size, 16, generator=generator).argsort(1)
    mask = torch.ones(size, 16, dtype=torch.bool).scatter_(1, order[:, :4], False)
    return images, [DataSample().set_mask(each) for each in mask]


def captioned_batch(size: int) -> tuple[Tensor, list[DataSample]]:
    """Fixed images [size, 3, 64, 64] and texts of 1 to 10 words."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 64, 64, generator=generator)
    words = [torch.randint(START_TOKEN, (1 + i % 10,), generator=generator).tolist() for i in range(size)]
    samples = [DataSample() for _ in range(size)]
    for sample, text in zip(samples, encode_words(words), strict=True):
        sample.set_field(text, 'text')
    return images, samples


def encode_words(words: list[list[int]], length: int = 12) -> Tensor:
    """Texts of words [B, length] with start, end and padding."""
    texts = torch.zeros(len(words), length, dtype=torch.int64)
    for text, own in zip(texts, words, strict=True):
        text[: len(own) + 2] = torch.tensor([START_TOKEN, *own, END_TOKEN])
    return texts


def run_mean_teacher_hook(hook: MeanTeacherHook, model: nn.Module, iteration: int, updated: bool = True) -> None:
    """Call the hook after one of 100 iterations; with ``updated=False``, gradients were only accumulated in it."""
    wrapper = SimpleNamespace(should_update=lambda: updated)
    hook.after_train_iter(SimpleNamespace(model=model, optim_wrapper=wrapper, iter=iteration, max_iters=100), 0)


def sum_losses(losses: dict[str, Tensor]) -> Tensor:
    return sum(value for name, value in losses.items() if 'loss' in name)


# -- teachers


def openai_numbers() -> dict[str, Tensor]:
    """What a state dict of OpenAI's CLIP holds beside the weights, and no file of open_clip does."""
    return dict(input_resolution=torch.tensor(64), context_length=torch.tensor(77), vocab_size=torch.tensor(49408))


# -- numbers


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= bound * value.norm(), name


def assert_within(actual: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    """Each value to ``bound`` of the largest."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= bound * expected.abs().max()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.detach().double() - expected.double()).norm() / expected.double().norm())


def slow_recall(images: Tensor, texts: Tensor, owners: list[int]) -> dict[str, float]:
    """Recall in percent by sorting; of equal similarities, wrong pairs come first."""
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


@torch.no_grad()
def clip_reference(visual: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """open_clip's own image feature, projected tokens, and attention of the class token in the last block."""
    seen = []
    last = visual.transformer.resblocks[-1]
    hook = last.ln_1.register_forward_hook(lambda module, args, output: seen.append(output))
    visual.output_tokens = True
    pooled, tokens = visual(images)
    hook.remove()
    attention = last.attn(seen[0], seen[0], seen[0], need_weights=True, average_attn_weights=True)[1]
    return pooled, tokens @ visual.proj, attention[:, 0, 1:]


def assert_clip(teacher: Teacher, images: Tensor, visual: nn.Module, own_images: Tensor) -> None:
    features, importance = teacher(images)
    pooled, tokens, attention = clip_reference(visual, own_images)
    assert relative_error(features[:, 0], pooled) < 1e-5
    assert relative_error(features[:, 1:], tokens) < 1e-5
    assert relative_error(importance, attention) < 1e-5
    assert importance.std(1).min() > 0.1 * importance.mean()
