"""mmmilan as a plugin: found from any OpenMMLab scope, light to import."""

from __future__ import annotations

import pytest

from processes import run_python

# Libraries are loaded once, then each scope has its own process in which no OpenMMLab project was imported yet.
SCOPES = r"""
import os
import sys

import torch, torchvision, mmcv.ops, mmengine.runner
from transformers import AutoModel, PreTrainedModel
from mmengine.dataset import Compose
from mmengine.registry import DATASETS, DefaultScope, HOOKS, METRICS, MODELS, OPTIM_WRAPPERS, TRANSFORMS

def look_up(scope):
    assert not {'mmmilan', 'mmpretrain', 'mmdet', 'mmseg'} & set(sys.modules)
    project = MODELS  # MMEngine's root, as the runner has it; or the project's own registry, as its models have it
    if scope != 'mmengine':
        DefaultScope.get_instance('test', scope_name=scope)
        project = __import__(f'{scope}.registry').registry.MODELS
    decoder = project.build(dict(type='mmmilan.PromptingDecoder', num_patches=4, decoder_embed_dim=32, decoder_depth=1))
    masking, = Compose([dict(type='mmmilan.RandomMasking')]).transforms
    found = [type(decoder).__name__, type(masking).__name__]
    for registry, name in (
        (HOOKS, 'StepSeedHook'), (METRICS, 'ReconstructionLoss'), (DATASETS, 'ImageFolder'),
        (OPTIM_WRAPPERS, 'BFloat16OptimWrapper'), (TRANSFORMS, 'LoadImage'),
    ):
        found.append(registry.get(f'mmmilan.{name}').__name__)
    found.append(project.get('mmmilan.MILAN').__module__)
    if scope == 'mmpretrain':
        found.append(project.get('MILAN').__module__)  # mmpretrain's own keeps its name
    os.write(1, f'{scope} {" ".join(found)}\n'.encode())  # whole, as the others write too

for scope in sys.argv[1:]:
    if os.fork() == 0:
        sys.stdout = open(os.devnull, 'w')  # packages greet when imported, in pieces that would fall between the lines
        look_up(scope)
        os._exit(0)
for scope in sys.argv[1:]:
    os.wait()
"""


@pytest.mark.slow
def test_types_are_found_from_every_scope():
    """In a fresh process, by type='mmmilan.X' and without custom_imports."""
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    found = 'PromptingDecoder RandomMasking StepSeedHook ReconstructionLoss ImageFolder BFloat16OptimWrapper LoadImage'
    found += ' mmmilan.models.milan'
    lines = run_python(SCOPES, 'mmengine', 'mmdet', 'mmseg', 'mmpretrain')
    expected = [f'{scope} {found}' for scope in ('mmdet', 'mmengine', 'mmpretrain', 'mmseg')]
    expected[2] += ' mmpretrain.models.selfsup.milan'
    assert sorted(lines) == expected


def test_import_is_light():
    heavy = ('torch', 'mmengine', 'mmcv', 'mmpretrain', 'numpy', 'open_clip', 'timm', 'transformers')
    code = f'import sys, mmmilan; print([name for name in {heavy} if name in sys.modules])'
    assert run_python(code) == ['[]']
