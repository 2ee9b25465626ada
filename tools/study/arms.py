"""The design of the study, fixed before its first run: arms, seeds, data and measures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from mmengine.config import Config

from mmmilan.errors import InputError

CONFIGS = Path(__file__).parents[2] / 'configs' / 'study'
TEACHER = 'clip_vit-tiny-p4_cifar10.py'
# Name of each arm -> its config; the paper's arms first, then the ones with less computation.
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
# With the images sorted by path, the teacher is trained on the even ones, the student on a sixth of the odd ones. The
# probes are trained on the student's images and tested on every second test image.
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
# Top-1 accuracies in percent. The last two are semantic-aware probing of MILAN (class token of the half of the patches
# that are most important to the teacher) and zero-shot accuracy of the class token that the decoder predicts.
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
# The parts of a config that determine the result of a run.
SETTINGS = ('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'train_cfg')


def read_arm(name: str) -> Config:
    """The config of an arm, or of the 'teacher'.

    Raises:
        InputError: there is no such arm.
    """
    if name not in ARMS and name != 'teacher':
        raise InputError(f'The study has no arm {name!r}; choose one of {", ".join(map(repr, ARMS))}.')
    return Config.fromfile(CONFIGS / ARMS.get(name, TEACHER))


def study_id() -> str:
    """A hash of the design and of the configs, by which results of different studies are told apart."""
    configs = [read_arm(arm).to_dict() for arm in ('teacher', *ARMS)]
    fixed = [{key: config[key] for key in SETTINGS} for config in configs]
    fixed += [str(value) for value in (ARMS, TEACHER_IMAGES, STUDENT_IMAGES, TEST_IMAGES, TEMPLATES, MEASURES)]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]
