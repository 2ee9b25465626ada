"""mmmilan: MILAN pretraining (arXiv 2208.06049) as a plugin of the OpenMMLab ecosystem."""

from mmmilan.checkpoints.zoo import extend_mmpretrain
from mmmilan.version import __version__, check_versions

check_versions()
extend_mmpretrain()

__all__ = ['FeatureExtractor', 'ImageClassificationInferencer', '__version__', 'get_model', 'list_models']


def __getattr__(name: str):
    if name in __all__:
        from mmmilan import api

        return getattr(api, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
