"""What the study compares, fixed before its first run: arms, seeds, data and measures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mmengine.config import Config

from mmmilan.errors import InputError

CONFIGS = Path(__file__).parents[2] / 'configs' / 'study'
TEACHER = 'clip_vit-tiny-p4_cifar10.py'
# The name of each arm and its config; the paper's arms first, then those that are to cost less.
ARMS = {
    'MAE': 'mae_vit-tiny-p4_cifar10.py',
    'MAE + CLIP target': 'milan-mae-decoder-random-masking_vit-tiny-p4_cifar10.py',
    'MAE + CLIP target + semantic masking': 'milan-mae-decoder_vit-tiny-p4_cifar10.py',
    'MILAN, random masking': 'milan-random-masking_vit-tiny-p4_cifar10.py',
    'MILAN': 'milan_vit-tiny-p4_cifar10.py',
    'distillation': 'milan-distillation_vit-tiny-p4_cifar10.py',
    'prompts only, a third predicted': 'milan-prompts-only_vit-tiny-p4_cifar10.py',
    '2 masks, half the epochs': 'milan-2-masks_vit-tiny-p4_cifar10.py',
    '4 masks, a third, a quarter of the epochs': 'milan-4-masks_vit-tiny-p4_cifar10.py',
    'alignment, half the epochs': 'milan-alignment_vit-tiny-p4_cifar10.py',
    'combined: 2 masks, a third, half the epochs': 'milan-fast_vit-tiny-p4_cifar10.py',
}
SEEDS = (0, 1, 2)
# Of the images in the order of their paths: the teacher learns from the even ones; the student from a sixth of the odd
# ones, which have the labels of the probes too; every second test image tests.
TEACHER_IMAGES = slice(0, None, 2)
STUDENT_IMAGES = slice(1, None, 12)
TEST_IMAGES = slice(0, None, 2)
TEMPLATES = (
    'a photo of a {}.',
    'a picture of the {}.',
    'there is a {} in the image.',
    'a small photo of one {}.',
    'a {}.',
)
# Percentages of the test images. The last two are semantic-aware probing of MILAN (class token, the half of the patches
# that the teacher looks at) and the decoder's class token against the teacher's texts.
MEASURES = (
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
# What of a config makes a run another one.
SETTINGS = ('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg')


def read_arm(name: str) -> Config:
    """The config of an arm, or of the 'teacher'.

    Raises:
        InputError: there is no such arm.
    """
    if name not in ARMS and name != 'teacher':
        raise InputError(f'The study has no arm {name!r}; choose among {", ".join(map(repr, ARMS))}.')
    return Config.fromfile(CONFIGS / ARMS.get(name, TEACHER))


def study_id() -> str:
    """A fingerprint of what is fixed here and by the configs: results of different studies are not mixed."""
    configs = [read_arm(arm).to_dict() for arm in ('teacher', *ARMS)]
    fixed = [{key: config[key] for key in SETTINGS} for config in configs]
    fixed += [str(value) for value in (ARMS, TEACHER_IMAGES, STUDENT_IMAGES, TEST_IMAGES, TEMPLATES, MEASURES)]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]
