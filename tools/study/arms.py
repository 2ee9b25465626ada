"""The design of the study, fixed before its first run: arms, seeds, data, budgets and measures."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import NamedTuple

from mmengine.config import Config

from mmmilan.errors import InputError

CONFIGS = Path(__file__).parents[2] / 'configs' / 'study'
TEACHER = 'clip_vit-tiny-p4_cifar10.py'
FINE_TUNING = 'finetune_vit-tiny-p4_cifar10.py'
NO_PRETRAINING = 'no pretraining'
LIGHTLY = 'LightlyTrain, distillation'
# Name of each arm -> its config; first the paper's (tables 5 and 10) and what is compared with them.
PAPER = {
    NO_PRETRAINING: 'mae_vit-tiny-p4_cifar10.py',
    'MAE': 'mae_vit-tiny-p4_cifar10.py',
    'MAE + CLIP target': 'milan-mae-decoder-random-masking_vit-tiny-p4_cifar10.py',
    'MAE + CLIP target + semantic masking': 'milan-mae-decoder_vit-tiny-p4_cifar10.py',
    'MILAN, random masking': 'milan-random-masking_vit-tiny-p4_cifar10.py',
    'MILAN': 'milan_vit-tiny-p4_cifar10.py',
    'MILAN, class token 32': 'milan-cls-32_vit-tiny-p4_cifar10.py',
    'MILAN, random masking, class token 32': 'milan-random-masking-cls-32_vit-tiny-p4_cifar10.py',
    'MILAN, few-images': 'milan-few-images_vit-tiny-p4_cifar10.py',
    'distillation': 'milan-distillation_vit-tiny-p4_cifar10.py',
    'distillation, class token 32': 'milan-distillation-cls-32_vit-tiny-p4_cifar10.py',
    LIGHTLY: 'lightly-train_vit-tiny-p4_cifar10.py',
}
# Those with less computation (docs/efficiency.md); they run only where --arms names them.
CHEAPER = {
    'MILAN, few-images, one crop, half the epochs': 'milan-few-images-one-crop_vit-tiny-p4_cifar10.py',
    'alignment, half the epochs': 'milan-alignment_vit-tiny-p4_cifar10.py',
}
ARMS = PAPER | CHEAPER
SEEDS = (0, 1, 2)


class Budget(NamedTuple):
    """How much an arm is trained.

    Attributes:
        images: The student's images, of all training images sorted by path.
        epochs: What the configs' 4 epochs are here; an arm with fewer has as many times fewer, rounded up.
    """

    images: slice
    epochs: int


# 10,934 and 1,040 steps of 16 images. With the images sorted by path, the teacher is trained on the even ones and the
# student on the odd ones, or a sixth of them. Probes and fine-tuning use the student's images, and every second test
# image.
BUDGETS = dict(long=Budget(slice(1, None, 2), 7), short=Budget(slice(1, None, 12), 4))
TEACHER_IMAGES = slice(0, None, 2)
TEST_IMAGES = slice(0, None, 2)
TEMPLATES = (
    'a photo of a {}.',
    'a picture of the {}.',
    'there is a {} in the image.',
    'a small photo of one {}.',
    'a {}.',
)
# The curve: after these epochs and the last, linear probe and k-NN by every sixth of the student's images.
CURVE_EPOCHS = (1, 2, 4)
CURVE_STEP = 6
# Fine-tuning: epochs by the share of the labels in percent.
FINE_TUNING_EPOCHS = {10: 8, 100: 1}
# Top-1 accuracies in percent. Semantic-aware probing is MILAN's (class token of the half of the patches that are most
# important to the teacher); zero-shot is by the class token that the decoder predicts.
MEASURES = (
    'fine-tuning',
    'fine-tuning, 10 % of the labels',
    'linear probe',
    'linear probe, 10 % of the labels',
    'linear probe, 1 % of the labels',
    'k-NN',
    'linear probe, mean token',
    'linear probe, 10 % of the labels, mean token',
    'linear probe, 1 % of the labels, mean token',
    'k-NN, mean token',
    'linear probe, semantic-aware',
    'zero-shot',
)
# The parts of a config that determine the result of a run.
SETTINGS = ('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg', 'pretrain')


def read_arm(name: str) -> Config:
    """The config of an arm, or of the 'teacher'.

    Raises:
        InputError: there is no such arm.
    """
    if name not in ARMS and name != 'teacher':
        raise InputError(f'The study has no arm {name!r}; choose one of {", ".join(map(repr, ARMS))}.')
    return Config.fromfile(CONFIGS / ARMS.get(name, TEACHER))


def schedule(steps: int) -> list[dict]:
    """The learning rate of a training: warm-up over an eighth of the steps, then cosine."""
    warmup, end = max(1, steps // 8), max(2, steps)
    return [
        dict(type='LinearLR', start_factor=1e-2, by_epoch=False, end=warmup),
        dict(type='CosineAnnealingLR', by_epoch=False, begin=warmup, T_max=end - warmup, end=end),
    ]


def set_schedule(cfg: Config, images: int, budget: Budget) -> None:
    """Set the epochs and the schedule of an arm with so many images."""
    cfg.train_cfg.max_epochs = math.ceil(cfg.train_cfg.max_epochs * budget.epochs / 4)
    cfg.param_scheduler = schedule(cfg.train_cfg.max_epochs * (images // cfg.train_dataloader.batch_size))


def study_id(arm: str, budget: str) -> str:
    """A hash of the design and of the configs that determine an arm's results, by which studies are told apart."""
    configs = [read_arm('teacher'), read_arm(arm), Config.fromfile(CONFIGS / FINE_TUNING)]
    fixed = [{key: config.get(key) for key in SETTINGS} for config in configs]
    design = BUDGETS[budget], TEACHER_IMAGES, TEST_IMAGES, TEMPLATES, CURVE_EPOCHS, CURVE_STEP, FINE_TUNING_EPOCHS
    fixed += [str(value) for value in (*design, MEASURES)]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]
