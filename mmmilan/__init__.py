"""mmmilan: MILAN pretraining (arXiv 2208.06049) as a plugin of the OpenMMLab ecosystem."""

import importlib
from contextlib import nullcontext

from mmmilan.errors import end_at_interrupt, is_command

if is_command():
    end_at_interrupt()  # before imports, which may take seconds

from mmmilan.errors import exit_on_input_error  # noqa: E402
from mmmilan.openmmlab import extend_openmmlab  # noqa: E402
from mmmilan.version import __version__, check_versions  # noqa: E402

with exit_on_input_error() if is_command() else nullcontext():
    check_versions()
extend_openmmlab()

# The public functions and their modules, which are imported on first use.
MODULES = {
    'FeatureExtractor': 'mmmilan.api.inference',
    'ImageClassificationInferencer': 'mmmilan.api.inference',
    'Predictor': 'mmmilan.api.inference',
    'convert': 'mmmilan.export.convert',
    'embed': 'mmmilan.api.embed',
    'export_onnx': 'mmmilan.export.onnx',
    'figures': 'mmmilan.api.figures',
    'finetune': 'mmmilan.api.finetune',
    'get_flops': 'mmmilan.api.models',
    'get_model': 'mmmilan.api.models',
    'heat_maps': 'mmmilan.api.language',
    'list_models': 'mmmilan.api.models',
    'predict': 'mmmilan.api.predict',
    'pretrain': 'mmmilan.api.pretrain',
    'report': 'mmmilan.api.report',
    'search': 'mmmilan.api.language',
    'test': 'mmmilan.engine.launch',
    'train': 'mmmilan.engine.launch',
    'zero_shot': 'mmmilan.api.language',
}

__all__ = ['__version__', *MODULES]


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])


def __getattr__(name: str):
    if name in MODULES:
        return getattr(importlib.import_module(MODULES[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
