"""The version of mmmilan, and the versions of its dependencies that it works with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from mmmilan.errors import InputError

__version__ = '0.2.0'

# import name: (names it is published under, versions that work, required, what to install)
DEPENDENCIES = {
    'torch': (('torch',), '>=2.6', True, 'torch'),
    'mmengine': (('onedl-mmengine', 'mmengine'), '>=0.10,<1.0', True, 'onedl-mmengine'),
    'mmcv': (('onedl-mmcv', 'mmcv', 'mmcv-lite'), '>=2.0,<2.4', True, 'onedl-mmcv'),
    'mmpretrain': (('onedl-mmpretrain', 'mmpretrain'), '>=1.0,<2.0', True, 'onedl-mmpretrain'),
    'transformers': (('transformers',), '<5', False, "'transformers<5', as mmpretrain cannot be imported with 5"),
    'mmdet': (('onedl-mmdetection', 'mmdet'), '>=3.0,<4.0', False, 'onedl-mmdetection'),
    'mmseg': (('onedl-mmsegmentation', 'mmsegmentation'), '>=1.0,<2.0', False, 'onedl-mmsegmentation'),
}


def installed_version(distributions: tuple[str, ...]) -> str | None:
    """The version of the first of these distributions that is installed; None if none is. Nothing is imported."""
    for name in distributions:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def check_versions() -> None:
    """Compare the installed packages with ``DEPENDENCIES``.

    Raises:
        InputError: packages are missing or of a version that does not work; the message names them all.
    """
    faults, remedies = [], []
    for package, (distributions, wanted, required, remedy) in DEPENDENCIES.items():
        found = installed_version(distributions)
        if package == 'transformers' and installed_version(('pycocotools',)) is None:
            continue  # mmpretrain then leaves out the models that break with version 5
        if found is None and required:
            faults.append(f'{package} is missing')
        elif found is not None and not SpecifierSet(wanted).contains(found, prereleases=True):
            faults.append(f'{package} {found} is outside {wanted}')
        else:
            continue
        remedies.append(f'{remedy} ({package}{wanted})')
    if faults:
        raise InputError(f'mmmilan cannot run because {", ".join(faults)}; install {" and ".join(remedies)}.')
