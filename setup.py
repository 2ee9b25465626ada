import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """Put configs, tools and the model index into the wheel as ``mmmilan/.mim``, where OpenMMLab looks for them."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for name in ('configs', 'tools'):
                shutil.copytree(name, Path(self.build_lib, 'mmmilan', '.mim', name), dirs_exist_ok=True)
            shutil.copy('model-index.yml', Path(self.build_lib, 'mmmilan', '.mim'))


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
    cmdclass={'build_py': BuildWithConfigs},
    python_requires='>=3.10',
    entry_points={'console_scripts': ['mmmilan = mmmilan.cli:main']},
    install_requires=[
        'cyclopts>=4.0',
        'torch>=2.6',
        'torchvision',
        'onedl-mmengine>=0.10',
        'onedl-mmpretrain>=1.3',
        'open_clip_torch>=3.0',
        'timm>=1.0',
        'filelock',
        'packaging',
        'pyyaml',
        'rich',
        'safetensors',
        'matplotlib',
        'scikit-learn',
    ],
    extras_require={
        'dense': ['onedl-mmcv>=2.3', 'onedl-mmdetection>=3.5', 'onedl-mmsegmentation>=1.4'],
        'test': ['pytest', 'pytest-xdist', 'ruff', 'transformers<5', 'tensorboard', 'lmdb'],
    },
)
