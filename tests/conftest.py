"""Small models and data that several tests share."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import runpy
import signal
import sys
import uuid
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import open_clip
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import WEIGHT_INITIALIZERS, init_default_scope
from mmengine.runner.checkpoint import CheckpointLoader
from mmengine.utils.dl_utils import collect_env

from helpers import ROOT, TINY_ARCH, openai_numbers, strip_prefix
from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.registry import MODELS
from scenes import write_scenes

torch.set_num_threads(1)  # the models here are too small for more


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests for a GPU on a machine without one."""
    for item in items:
        if item.get_closest_marker('gpu') and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason='needs a GPU'))


def pytest_collection_finish() -> None:
    """Leave imported modules out of garbage collections, of which MMEngine starts one for each data set."""
    gc.freeze()


@pytest.fixture(autouse=True, scope='session')
def quick_runs():
    """A run without what no test reads and what takes most of the time of a small one.

    MMEngine lets yapf format a config six times, half a second each, and asks git and the compilers for their versions;
    files are synced to the disk, which only a loss of power could show. A tokenizer reads its vocabulary again for each
    text tower.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', lambda text, **kwargs: (text, True))
        patch.setattr('mmengine.runner.runner.get_git_hash', lambda: '')
        patch.setattr('mmengine.runner.runner.collect_env', cache(collect_env))
        patch.setattr('os.fsync', lambda file: None)
        patch.setattr('open_clip.tokenizer.SimpleTokenizer', cache(open_clip.SimpleTokenizer))
        yield


@pytest.fixture(autouse=True)
def reproducible():
    init_default_scope('mmpretrain')
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.fixture(autouse=True)
def own_ctrl_c():
    """Commands that run in this process do not keep pytest's Ctrl-C."""
    handler, raises = signal.getsignal(signal.SIGINT), logging.raiseExceptions
    yield
    signal.signal(signal.SIGINT, handler)
    logging.raiseExceptions = raises


@pytest.fixture
def log(caplog):
    """What MMEngine logs, as pytest's ``caplog``."""
    logger = MMLogger.get_instance(str(uuid.uuid4()))  # a logger that exists may have a level set by another test
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def bfloat16(monkeypatch):
    """Train in bfloat16 where a test asks for it, even on processors that only emulate it."""
    monkeypatch.setattr('mmmilan.engine.optim.computes_in_bfloat16', lambda device: True)


@pytest.fixture(scope='session')
def official():
    """Inputs and results of the published code; see tests/data/README.md."""
    with np.load(ROOT / 'tests/data/official_tiny.npz') as file:
        recorded = {key: torch.from_numpy(file[key]) for key in file.files if key != 'config'}
        recorded['config'] = json.loads(str(file['config']))
    return recorded


@pytest.fixture
def clip_file(official, tmp_path):
    """A visual tower alone, in OpenAI's layout: width 128, 2 layers, 4 x 4 patches of 16, 24 dimensions."""
    path = tmp_path / 'clip.pt'
    torch.save(strip_prefix(official, 'clip/') | openai_numbers(), path)
    return str(path)


@pytest.fixture
def milan_cfg(clip_file):
    """MILAN in the sizes of the recorded run, with its teacher."""
    return dict(
        type='mmmilan.MILAN',
        backbone=dict(type='mmmilan.MILANViT', arch=dict(TINY_ARCH), img_size=64, patch_size=16),
        masking=dict(type='mmmilan.SemanticAwareMasking', mask_ratio=0.75),
        neck=dict(
            type='mmmilan.PromptingDecoder',
            num_patches=16,
            embed_dim=48,
            decoder_embed_dim=32,
            decoder_depth=2,
            decoder_num_heads=4,
            predict_feature_dim=24,
        ),
        head=dict(
            type='mmmilan.CLIPTarget',
            teacher=dict(type='mmmilan.OpenCLIPTeacher', pretrained=clip_file, teacher_mean_std=None),
        ),
    )


@pytest.fixture
def maskclip_cfg() -> dict:
    """MaskCLIP: 4 x 4 patches of 16, 24 dimensions, a vocabulary of 40 tokens, texts of 12 tokens."""
    return dict(
        type='mmmilan.MaskCLIP',
        backbone=dict(type='mmmilan.MILANViT', arch=dict(TINY_ARCH), img_size=64, patch_size=16),
        text=dict(context_length=12, vocab_size=40, width=32, heads=2, layers=2),
        embed_dim=24,
        masking=dict(type='mmmilan.RandomMasking', mask_ratio=0.75),
        neck=dict(
            type='mmmilan.MAEDecoder',
            num_patches=16,
            embed_dim=48,
            decoder_embed_dim=32,
            decoder_depth=1,
            decoder_num_heads=4,
            predict_feature_dim=48,
        ),
        head=dict(type='mmmilan.CodewordTarget', feature_dim=48, num_codewords=20),
        language=dict(type='mmmilan.MaskedLanguageModel', decoder_num_heads=4),
        data_preprocessor=dict(
            type='mmpretrain.SelfSupDataPreprocessor',
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            to_rgb=True,
        ),
    )


@pytest.fixture
def maskclip_file(tmp_path):
    """A whole MaskCLIP with random weights: 4 x 4 patches of 16, 24 dimensions, texts of 16 tokens."""
    arch = dict(embed_dims=64, num_layers=2, num_heads=1, feedforward_channels=256)
    model = dict(
        type='mmmilan.MaskCLIP',
        backbone=dict(type='mmmilan.MILANViT', arch=arch, img_size=64, patch_size=16),
        text=dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1),
        embed_dim=24,
        distillation_weight=0,
        language_weight=0,
    )
    clip = MODELS.build(model)
    clip.init_weights()
    torch.nn.init.normal_(clip.text.text_projection)
    path = tmp_path / 'maskclip.pth'
    meta = dict(cfg=Config(dict(model=model)).pretty_text, model=model)
    torch.save(dict(state_dict=clip.state_dict(), meta=meta), path)
    return str(path)


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory):
    """24 small images in three nested folders."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for i in range(24):
        path = root / f'class{i % 3}' / 'nested' / f'{i}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        image = cv2.resize(rng.integers(0, 255, (8, 10, 3), dtype=np.uint8), (80, 72), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(path), image)
    return root


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """Ten drawn scenes of 48 pixels for training and ten for validation, with annotations for every task."""
    root = tmp_path_factory.mktemp('data') / 'scenes'
    write_scenes(root, 10, 10, image_size=48)
    return root


@pytest.fixture
def tiny_config(milan_cfg, image_folder, tmp_path):
    """Writes a config file: the base config in the sizes of the recorded run, 2 epochs of 6 steps on the 24 images.

    Call it with changes, as for ``Config.merge_from_dict``. The work directory is ``tmp_path / 'work'``.
    """
    numbers = itertools.count()

    def write(changes: dict | None = None) -> Path:
        cfg = Config.fromfile(ROOT / 'configs/milan/milan_vit-base-p16_16xb256-amp-coslr-400e_in1k.py')
        cfg.model = milan_cfg | dict(data_preprocessor=cfg.model.data_preprocessor)
        for loader in ('train_dataloader', 'test_dataloader'):
            # persistent workers take 5 s each to end when the garbage collector frees them in this process
            cfg[loader].update(batch_size=4, num_workers=2, persistent_workers=False)
            cfg[loader].dataset.data_root = str(image_folder)
        cfg.train_dataloader.dataset.pipeline[0].scale = 64
        cfg.test_dataloader.dataset.pipeline[1].scale = 64
        cfg.test_dataloader.dataset.pipeline[2].crop_size = 64
        cfg.param_scheduler = [
            dict(type='LinearLR', start_factor=0.1, end=1, convert_to_iter_based=True),
            dict(type='CosineAnnealingLR', begin=1, T_max=1, end=2, convert_to_iter_based=True),
        ]
        cfg.train_cfg.max_epochs = 2
        cfg.default_hooks.logger.interval = 1
        cfg.default_hooks.checkpoint.update(interval=1, asynchronous=False)
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
        cfg.work_dir = str(tmp_path / 'work')
        cfg.merge_from_dict(changes or {})
        # MMEngine keeps one logger for each name of a config file
        path = tmp_path / f'{tmp_path.name}_{next(numbers)}.py'
        cfg.dump(path)
        return path

    return write


@pytest.fixture
def benchmark_config(tmp_path):
    """Writes a config of configs/milan/benchmarks in the sizes of ``milan_cfg``, for 64 pixels, with changes."""

    def write(name: str, changes: dict | None = None) -> Path:
        cfg = Config.fromfile(ROOT / 'configs/milan/benchmarks' / name)
        cfg.model.backbone.update(arch=dict(TINY_ARCH), img_size=64)
        if cfg.model.get('head'):
            cfg.model.head.in_channels = 48
        loaders = [cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader]
        loaders += [cfg.test_cfg.bank_dataloader] if 'bank_dataloader' in cfg.test_cfg else []
        for loader in loaders:
            loader.update(batch_size=4, num_workers=0, persistent_workers=False)
            next(step for step in loader.dataset.pipeline if 'scale' in step).scale = 64
        for loader in loaders[1:]:
            loader.dataset.pipeline[2].crop_size = 64
        cfg.optim_wrapper.type = 'OptimWrapper'
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
        cfg.default_hooks.logger.interval = 1
        cfg.work_dir = str(tmp_path / 'work')
        cfg.merge_from_dict(changes or {})
        path = tmp_path / f'{tmp_path.name}_{name}'
        cfg.dump(path)
        return path

    return write


@pytest.fixture
def pretrained_checkpoint(milan_cfg, tmp_path) -> Path:
    """A checkpoint as pretraining writes it: encoder, decoder, and more than weights."""
    model = MODELS.build(milan_cfg)
    model.init_weights()
    torch.save(dict(meta=dict(epoch=1), state_dict=model.state_dict(), optimizer={}), tmp_path / 'epoch_1.pth')
    return tmp_path / 'epoch_1.pth'


@pytest.fixture
def labelled_images(tmp_path) -> Path:
    """Five classes of coloured noise, 8 images each to train, and 5 (an odd number) to validate."""
    rng = np.random.default_rng(0)
    for split, count in dict(train=8, val=5).items():
        for label in range(5):
            folder = tmp_path / 'data' / split / f'class{label}'
            folder.mkdir(parents=True)
            colour = np.array([100 + 10 * label, 150 - 10 * label, 120])
            for i in range(count):
                noise = rng.normal(0, 15, 3) + rng.normal(0, 60, (64, 64, 3))
                cv2.imwrite(str(folder / f'{i}.png'), np.clip(colour + noise, 0, 255).astype(np.uint8))
    return tmp_path / 'data'


@pytest.fixture
def run_tool(monkeypatch):
    """Run a script of tools/ in this process, as the command line would."""

    def run(script: str, *args: object) -> None:
        monkeypatch.setattr(sys, 'argv', [script, *map(str, args)])
        monkeypatch.syspath_prepend(str((ROOT / 'tools' / script).parent))  # where a script finds its neighbours
        monkeypatch.setenv('LOCAL_RANK', '0')  # undone after the test, unlike what the script would set
        runpy.run_path(str(ROOT / 'tools' / script), run_name='__main__')

    return run


@pytest.fixture
def safe_mmengine():
    """MMEngine loads checkpoints safely, as in our tools; undone after the test."""
    schemes, initializer = CheckpointLoader._schemes.copy(), WEIGHT_INITIALIZERS.get('Pretrained')
    use_safe_loading()
    yield
    CheckpointLoader._schemes = schemes
    WEIGHT_INITIALIZERS.register_module('Pretrained', force=True, module=initializer)


@pytest.fixture
def on_meta(monkeypatch):
    """Models are built at their real size on the meta device, which takes no memory."""
    create_model = open_clip.create_model
    monkeypatch.setattr(open_clip, 'create_model', lambda *args, **kwargs: create_model(*args, **kwargs, device='meta'))
    with torch.device('meta'):
        yield
