"""Registries of scope ``mmmilan``, children of MMEngine's roots.

``type='mmmilan.X'`` in the config of any OpenMMLab project finds X here, without ``custom_imports``: MMEngine imports
this file when it meets the scope, and a registry imports its ``locations`` on its first lookup.
"""

from mmengine import registry as roots
from mmengine.registry import Registry


def _child(root: Registry, *locations: str) -> Registry:
    return Registry(root.name, parent=root, scope='mmmilan', locations=list(locations))


MODELS = _child(roots.MODELS, 'mmmilan.models', 'mmmilan.teachers')
TRANSFORMS = _child(roots.TRANSFORMS, 'mmmilan.models.masking', 'mmmilan.datasets', 'mmmilan.teachers.cache')
DATASETS = _child(roots.DATASETS, 'mmmilan.datasets')
DATA_SAMPLERS = _child(roots.DATA_SAMPLERS, 'mmmilan.datasets')
RUNNERS = _child(roots.RUNNERS, 'mmmilan.engine')
HOOKS = _child(roots.HOOKS, 'mmmilan.engine', 'mmmilan.visualization.show_hook')
LOOPS = _child(roots.LOOPS, 'mmmilan.evaluation', 'mmmilan.engine')
METRICS = _child(roots.METRICS, 'mmmilan.evaluation')
OPTIMIZERS = _child(roots.OPTIMIZERS, 'mmmilan.engine')
OPTIM_WRAPPERS = _child(roots.OPTIM_WRAPPERS, 'mmmilan.engine')
OPTIM_WRAPPER_CONSTRUCTORS = _child(roots.OPTIM_WRAPPER_CONSTRUCTORS, 'mmmilan.engine')
STRATEGIES = _child(roots.STRATEGIES, 'mmmilan.engine')
