"""Let MMEngine, mmpretrain, mmdet and mmseg find this project's parts, whichever package is imported first.

A plugin can extend their lists only after they are imported, and importing them takes ten seconds. So
``import mmmilan`` only registers import hooks.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from mmmilan.checkpoints.zoo import current_file, zoo_models, zoo_root

# Steps of a pipeline that inferencers look for by name, and ours in their place.
STEPS = {'LoadImageFromFile': 'mmmilan.LoadImage', 'LoadAnnotations': 'mmmilan.LoadLabelMap'}


def extend_openmmlab() -> None:
    """Extend modules that are already imported now, and the others when they are imported."""
    wrapt.register_post_import_hook(hide_debug_lines, 'mmengine.logging')
    wrapt.register_post_import_hook(extend_mmengine, 'mmengine.config.config')
    wrapt.register_post_import_hook(find_old_names, 'mmengine.hub.hub')
    wrapt.register_post_import_hook(extend_mmpretrain, 'mmpretrain.apis.model')
    wrapt.register_post_import_hook(lambda module: find_steps(module.DetInferencer), 'mmdet.apis.det_inferencer')
    wrapt.register_post_import_hook(lambda module: find_steps(module.MMSegInferencer), 'mmseg.apis.mmseg_inferencer')
    wrapt.register_post_import_hook(extend_mmseg, 'mmseg.apis.inference')


def hide_debug_lines(module: ModuleType) -> None:
    """Make ``print_log`` drop debug messages that are addressed to no logger, which it would print.

    mmpretrain, mmdet and mmseg print 'Could not import OneDL' at level debug on import, in every process.
    """
    print_log = module.print_log

    @functools.wraps(print_log)
    def print_log_by_level(msg: Any, logger: Any = None, level: int = logging.INFO) -> None:
        if logger is not None or level > logging.DEBUG:
            print_log(msg, logger, level)

    module.print_log = print_log_by_level


def extend_mmengine(module: ModuleType) -> None:
    """Let ``_base_ = 'mmmilan::…'`` and ``mmengine.hub.get_config('mmmilan::…')`` find our configs; dump all exactly.

    MMEngine would look up every type in such a base in the scope ``mmmilan``. Our configs write the scope of each type.
    """
    from mmengine.config.utils import MODULE2PACKAGE

    MODULE2PACKAGE['mmmilan'] = 'mmmilan'
    find_old_names(module)
    get_path = module.Config._get_cfg_path

    def get_path_and_scope(cfg_path: str, filename: str) -> tuple[str, str | None]:
        path, scope = get_path(cfg_path, filename)
        return os.fspath(current_file(path)), None if scope == 'mmmilan' else scope

    module.Config._get_cfg_path = staticmethod(get_path_and_scope)
    module.Config.pretty_text = property(escaped_once(module.Config.pretty_text.fget))


def escaped_once(pretty_text: Callable[[Any], str]) -> Callable[[Any], str]:
    """Let a config be dumped exactly, and formatted once: every checkpoint, and six places at the start, ask for it."""
    texts: dict[str, str] = {}

    @functools.wraps(pretty_text)
    def text_of(config: Any) -> str:
        content = repr(config.to_dict())
        if content not in texts:
            # `Config.fromfile` substitutes {{fileDirname}} and {{$HOME:default}} in the text, within a path too. Two
            # braces stand only in strings here, where an escaped brace is the same.
            text = pretty_text(config).replace('{{', '{\\x7b')
            texts.clear()
            texts[content] = text
        return texts[content]

    return text_of


def find_old_names(module: ModuleType) -> None:
    """Let ``mmmilan::…`` in MMEngine's configs and hub find a config by its name of version 0.1, too."""
    split = module._get_package_and_cfg_path

    def split_and_rename(cfg_path: str) -> tuple[str, str]:
        package, path = split(cfg_path)
        if package == 'mmmilan':
            configs = zoo_root() / 'configs'
            path = os.path.relpath(current_file(configs / path), configs)
        return package, path

    module._get_package_and_cfg_path = split_and_rename


def extend_mmpretrain(module: ModuleType) -> None:
    """Let ``mmpretrain.get_model`` and ``mmpretrain.list_models`` find our models.

    mmpretrain fills its model hub on first use. Our models are added after that and replace those of the same name.
    """
    hub = module.ModelHub
    fill = hub._register_mmpretrain_models

    @functools.lru_cache
    def fill_and_add() -> None:
        fill()
        for name in zoo_models():
            hub._models_dict.pop(name, None)
        hub.register_model_index(zoo_root() / 'model-index.yml', config_prefix=zoo_root())

    hub._register_mmpretrain_models = staticmethod(fill_and_add)


def find_steps(inferencer: type) -> None:
    """Let an inferencer of mmdet or mmseg find our steps that load images, which it replaces, and label maps."""
    find = inferencer._get_transform_idx

    @functools.wraps(find)
    def find_ours(self: Any, pipeline_cfg: list[dict], name: Any) -> int:
        place = find(self, pipeline_cfg, name)
        ours = STEPS.get(name[0] if isinstance(name, tuple) else name)
        return place if place != -1 else next((i for i, step in enumerate(pipeline_cfg) if step['type'] == ours), -1)

    inferencer._get_transform_idx = find_ours


def extend_mmseg(module: ModuleType) -> None:
    """Let mmseg's ``inference_model`` take the pipeline of evaluation where a config has no ``test_pipeline``."""
    prepare = module._preprare_data

    @functools.wraps(prepare)
    def prepare_ours(imgs: Any, model: Any) -> tuple:
        if 'test_pipeline' not in model.cfg:
            steps = model.cfg.test_dataloader.dataset.pipeline
            model.cfg.test_pipeline = [step for step in steps if step['type'] != STEPS['LoadAnnotations']]
        return prepare(imgs, model)

    module._preprare_data = prepare_ours
