"""The sections of the report page."""

from __future__ import annotations

import pytest
import torch
from mmengine.config import Config

from mmmilan.visualization.page import Page
from mmmilan.visualization.report_sections import add_training

CLIP = dict(type='mmmilan.OpenCLIPTeacher', model='ViT-B/16', pretrained='/weights/clip.pt')
DINO = 'timm:vit_base_patch16_224.dino'


@pytest.mark.parametrize(
    ('head', 'words'),
    [
        (dict(teacher=CLIP), '; the teacher is ViT-B/16 clip.pt. Recipe'),
        (dict(teacher=DINO), f'; the teacher is {DINO}. Recipe'),
        (dict(teacher='ViT-B-16:/weights/clip.pt'), '; the teacher is ViT-B-16:clip.pt. Recipe'),
        (dict(targets=[dict(teacher=CLIP), dict(teacher=DINO)]), f'; the teachers are ViT-B/16 clip.pt and {DINO}. R'),
        (dict(teacher=None), 'learning rate 0.001. Recipe'),
        (dict(targets=[dict(norm_pix=True)]), 'learning rate 0.001. Recipe'),
    ],
)
def test_the_teacher_is_named(head, words, tmp_path):
    torch.save(dict(state_dict={}, meta=dict(epoch=2)), tmp_path / 'milan.pth')
    config = Config(
        dict(
            train_cfg=dict(max_epochs=2),
            model=dict(head=head),
            train_dataloader=dict(batch_size=8),
            optim_wrapper=dict(optimizer=dict(lr=1e-3)),
        )
    )
    page = Page('title', 'lead')
    add_training(page, tmp_path / 'milan.pth', config, 'Recipe.')
    assert words in page.parts[-1]
