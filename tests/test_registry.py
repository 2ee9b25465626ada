"""mmmilan as a plugin: found from any OpenMMLab scope, light to import, clear about versions."""

from __future__ import annotations

import subprocess
import sys

import pytest

import mmmilan.version
from mmmilan.errors import InputError
from mmmilan.version import check_versions

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


def run_python(code: str, *args: str) -> list[str]:
    result = subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


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


WORKING = {
    'torch': '2.11.0',
    'onedl-mmengine': '0.10.12',
    'onedl-mmcv': '2.3.6',
    'onedl-mmpretrain': '1.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmsegmentation': '1.4.2',
}


@pytest.fixture
def install(monkeypatch):
    """Pretend that these distributions, and no others, are installed."""

    def pretend(versions: dict[str, str | None]) -> None:
        def version(distribution: str) -> str:
            if versions.get(distribution) is None:
                raise mmmilan.version.PackageNotFoundError(distribution)
            return versions[distribution]

        monkeypatch.setattr(mmmilan.version, 'version', version)

    return pretend


def test_versions_that_work(install):
    install(WORKING)
    check_versions()
    install(WORKING | {'onedl-mmdetection': None, 'onedl-mmsegmentation': None})  # for dense prediction only
    check_versions()
    install({'torch': '2.6.0+cu124', 'mmengine': '0.10.4', 'mmcv-lite': '2.1.0', 'mmpretrain': '1.2.0'})
    check_versions()


def test_versions_that_cannot_work(install):
    """One sentence names all of them, and what to install."""
    changes = {'torch': '1.13.1', 'onedl-mmcv': '1.7.2', 'onedl-mmpretrain': None, 'onedl-mmdetection': '2.28.0'}
    install(WORKING | changes)
    with pytest.raises(InputError) as error:
        check_versions()
    message = str(error.value)
    wanted = mmmilan.version.DEPENDENCIES['torch'][1]
    assert message.startswith(f'mmmilan cannot run because torch 1.13.1 is outside {wanted}, mmcv 1.7.2 is outside ')
    assert f'mmpretrain is missing, mmdet 2.28.0 is outside >=3.0,<4.0; install torch (torch{wanted}) and ' in message
    for package in ('onedl-mmcv', 'onedl-mmpretrain', 'onedl-mmdetection'):
        assert package in message.partition('install')[2]
    assert 'onedl-mmengine' not in message and '\n' not in message


def test_release_candidate_of_a_version_that_cannot_work(install):
    install(WORKING | {'onedl-mmcv': '2.4.0rc1'})
    with pytest.raises(InputError, match='mmcv 2.4.0rc1 is outside'):
        check_versions()


def test_import_checks_versions():
    code = """
import importlib.metadata as metadata
original = metadata.version
metadata.version = lambda name: '1.7.2' if name == 'onedl-mmcv' else original(name)
try:
    import mmmilan
except ValueError as error:
    print(error)
"""
    (message,) = run_python(code)
    assert message == (
        'mmmilan cannot run because mmcv 1.7.2 is outside >=2.0,<2.4; install onedl-mmcv (mmcv>=2.0,<2.4).'
    )
