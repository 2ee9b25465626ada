from pathlib import Path

from setuptools import find_packages, setup

version: dict[str, str] = {}
for line in Path('mmmilan/version.py').read_text().splitlines():
    if line.startswith('__version__'):
        version['version'] = line.split("'")[1]

setup(
    name='mmmilan',
    version=version['version'],
    description='MILAN: masked image pretraining on language assisted representation, for OpenMMLab',
    long_description=Path('README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['mmmilan', 'mmmilan.*']),
    python_requires='>=3.10',
    install_requires=[
        'torch>=2.1',
        'torchvision',
        'onedl-mmengine>=0.10',
        'onedl-mmpretrain>=1.3',
        'open_clip_torch>=3.0',
        'timm>=1.0',
        'packaging',
        'rich',
        'safetensors',
        'matplotlib',
        'scikit-learn',
    ],
    extras_require={
        'dense': ['onedl-mmcv>=2.3', 'onedl-mmdetection>=3.5', 'onedl-mmsegmentation>=1.4'],
        'test': ['pytest', 'ruff', 'transformers<5', 'tensorboard'],
    },
)
