import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# What serves a checkout alone: environments, the demo, measurements.
CHECKOUT_ONLY = [
    'environment.sh',
    'constraints.txt',
    'demo.sh',
    'test.sh',
    'check_install.sh',
    'demo',
    'speed',
    'study',
]


class BuildWithConfigs(build_py):
    """Put configs, tools and the model index into the wheel as ``mmmilan/.mim``, where OpenMMLab looks for them.

    In a checkout ``mmmilan/.mim`` holds links to them.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            mim = Path(self.build_lib, 'mmmilan', '.mim')
            for name, left_out in (('configs', []), ('tools', CHECKOUT_ONLY)):
                ignore = shutil.ignore_patterns('__pycache__', *left_out)
                shutil.copytree(name, mim / name, ignore=ignore, dirs_exist_ok=True)
            shutil.copy('model-index.yml', mim)


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
        'torch>=2.6',
        'torchvision',
        # pip builds mmcv where it sees no torch, so without operators, which pretraining and classification do not
        # need. Not mmcv-lite: it brings the old mmengine, whose files would overwrite those of onedl-mmengine.
        'onedl-mmcv>=2.3,<2.4',
        'onedl-mmengine>=0.10,<1.0',
        'onedl-mmpretrain>=1.3,<2.0',
        'open_clip_torch>=3.0',
        'timm>=1.0',
        'cyclopts>=4.0',
        'filelock',
        'lmdb',
        'matplotlib',
        'packaging',
        'psutil',
        'pyyaml',
        'requests',
        'rich',
        'safetensors',
        'scikit-learn',
        'tensorboard',
        'urllib3>=2.3',
        'wrapt',
    ],
    extras_require={
        # Needs mmcv with operators, built before: docs/installation.md.
        'dense': ['onedl-mmdetection>=3.5,<4.0', 'onedl-mmsegmentation>=1.4,<2.0'],
        'onnx': ['onnx', 'onnxscript', 'onnxruntime'],
        'parquet': ['pyarrow'],
        'heic': ['pillow-heif'],
        'docs': ['mkdocs-material', 'mkdocstrings[python]'],
        'test': ['labelformat', 'pillow-heif', 'pytest', 'pytest-xdist', 'ruff', 'transformers<5'],
    },
)
