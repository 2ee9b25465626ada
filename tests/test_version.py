"""Versions of the dependencies: which ones work, and one sentence on those that do not."""

from __future__ import annotations

import pytest

import mmmilan.version
from mmmilan.errors import InputError
from mmmilan.version import check_versions
from processes import run_python

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
