"""mmmilan: MILAN pretraining (arXiv 2208.06049) as a plugin of the OpenMMLab ecosystem."""

from mmmilan.version import __version__, check_versions

check_versions()

__all__ = ['__version__']
