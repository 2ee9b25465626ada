"""A classifier, a detector or a segmentor of a user's own classes, in one call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mmmilan import arguments
from mmmilan.api.runs import check_out, save_weights, set_folder, train, trained_anyway
from mmmilan.arguments import checked
from mmmilan.errors import InputError, warn

if TYPE_CHECKING:  # imported where they are used: `import mmmilan` stays light
    from mmengine.config import Config

    from mmmilan.datasets.labelled import Labelled
    from mmmilan.visualization.results_page import Validation

FILES = ('config.py', 'model.pth', 'report.html', 'comparison.json')  # what finetune itself writes beside the run's
COMPARED = 'compare'  # folder of the second run


@checked
def finetune(
    data: arguments.Path | None = None,
    out: arguments.Path | None = None,
    *,
    start: arguments.Path | None = None,
    task: Literal['classification', 'detection', 'segmentation'] | None = None,
    arch: str | dict[str, Any] | None = None,
    patch_size: arguments.Pixels | None = None,
    img_size: arguments.Pixels | None = None,
    epochs: arguments.Count | None = None,
    batch_size: arguments.Count | None = None,
    accumulate: arguments.Count | None = None,
    lr: arguments.Rate | None = None,
    freeze: bool = False,
    compare: arguments.Path | None = None,
    classes: arguments.Texts | arguments.Path | None = None,
    ignore: arguments.Texts | arguments.Text | None = None,
    patience: arguments.Count | None = None,
    gpus: arguments.Count | None = None,
    seed: arguments.Seed | None = None,
    resume: bool = False,
    **changes: Any,
) -> Path:
    """Train a classifier, a detector or a segmentor on your own labelled images, from a pretrained encoder.

    What is trained follows from the data: folders of classes give a classifier; annotated objects Mask R-CNN, or Faster
    R-CNN where there are boxes alone; images with label maps UperNet. The recipes are the published ones, fitted to
    the number of images (docs/own_images.md). The model is validated after each epoch, and the best one is kept.

    The resulting config is written to ``out/config.py``; ``mmmilan train out/config.py`` runs the same training.

    Args:
        data: folder of labelled images: folders of classes, COCO, YOLO or Pascal VOC, or images with label maps. If it
            has no ``val``, ``test`` is validated on; without either, a fifth of the images, see ``out/split.json``.
        out: folder for config, log, checkpoints, model and report.
        start: the encoder that training starts from: a checkpoint of your own, a model of the zoo, a file or a URL in
            any layout; by default random weights.
        task: what to train, if the data allow several.
        arch: the encoder where there is no ``start``, as for ``mmmilan.pretrain``; by default 'base'.
        patch_size: side of a patch in pixels where there is no ``start``, by default 16.
        img_size: side of the images that the model sees, in pixels. By default, for a classifier that of ``start`` or
            224; for the others about that of the images, at most the 1024 and 512 of the published recipes.
        epochs: number of epochs; by default it follows from the number of images.
        batch_size: number of images that a process sees at once.
        accumulate: number of batches whose gradients make one step, where larger ones do not fit the memory.
        lr: learning rate of the head; that of the encoder falls from block to block.
        freeze: train the head alone. Of a classifier it is a linear probe.
        compare: train a second time from this start, or from random weights ('scratch'), with the same images in the
            same order, and say which is better. A resumed run is compared as it was to be.
        classes: names of the classes in the order of their labels, or a file of them.
        ignore: classes that are left out.
        patience: stop after as many epochs without a better validation.
        gpus: number of processes on this machine, one for each GPU; by default this process alone.
        seed: seed of all random numbers, by default 0; of the split, too.
        resume: continue the run in ``out`` from its newest complete checkpoint, with its own config; a run without
            checkpoints begins anew with it.
        changes: anything else in the config, e.g. ``--optim_wrapper.optimizer.weight_decay 0.1``.

    Returns:
        The path of the best model with its config and the names of its classes, ``out/model.pth``. ``mmmilan.predict``,
        ``mmmilan.test`` and the inferencers of OpenMMLab take it. ``report.html`` is beside it.

    Raises:
        InputError: data, start or an option is wrong; it is raised before training starts.

    Examples:
        >>> mmmilan.finetune('flowers', 'runs/flowers', start='runs/photos/milan.pth', compare='scratch')
    """
    if out is None or (data is None and not resume):
        missing = 'folder to write (--out)' if out is None else 'folder of labelled images'
        raise InputError(f'finetune lacks the {missing}; give it.')
    folder = Path(out)
    if data is not None and folder.resolve().is_relative_to(Path(data).expanduser().resolve()):
        raise InputError(f'{out} is within {data}, whose files are read as labelled data; choose a folder beside it.')
    check_out(folder, resume, FILES)
    given = dict(data=data, start=start, task=task, arch=arch, patch_size=patch_size, img_size=img_size, epochs=epochs)
    given |= dict(batch_size=batch_size, accumulate=accumulate, lr=lr, freeze=freeze or None, compare=compare)
    given |= dict(classes=classes, ignore=ignore, patience=patience, gpus=gpus, seed=seed)
    given = {name: value for name, value in given.items() if value is not None}
    return carry_out(planned(folder, given, changes, resume), folder, changes, gpus, resume)


class Plan(NamedTuple):
    """What a call comes to.

    Attributes:
        config: Of the run.
        labelled: The data to write for it; None if a resumed run is to read those that it has.
        compare: The start that it is compared with, or 'scratch'; None for no comparison.
        second: The config of the run from there.
    """

    config: Config
    labelled: Labelled | None
    compare: str | None
    second: Config | None


def planned(folder: Path, given: dict[str, Any], changes: dict[str, Any], resume: bool) -> Plan:
    """Read the data and make the configs.

    Args:
        folder: Of the run.
        given: The arguments of :func:`finetune` that are given, in its order.
        changes: Of the config.
        resume: Whether the run in the folder is continued.
    """
    from mmengine.registry import DefaultScope

    from mmmilan.api.finetune_probe import refuse_what_it_sets
    from mmmilan.api.finetune_recipe import compared_config, compared_with, new_config, resumed_config
    from mmmilan.api.recipe import keep_call
    from mmmilan.building import change_config

    of_data = {name: given[name] for name in ('data', 'task', 'classes', 'ignore') if name in given}
    others = {name: value for name, value in given.items() if name not in (*of_data, 'compare', 'gpus')}
    compose = resumed_config if resume else new_config
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        config, labelled = compose(folder, of_data, processes=given.get('gpus', 1), **others)
        change_config(config, changes, inspect.signature(finetune).parameters)
        set_folder(config, folder)
        compare = compared_with(config, folder, given.get('compare'))
        second = None if compare is None else compared_config(config, compare)
        for each in (config, second) if second else (config,):
            refuse_what_it_sets(each, changes)
        keep_call(config, 'finetune', given | dict(out=folder, resume=resume), changes, compare=compare)
    return Plan(config, labelled, compare, second)


def carry_out(plan: Plan, folder: Path, changes: dict[str, Any], gpus: int | None, resume: bool) -> Path:
    """Train, validate, write the page, and compare; returns the path of the best model."""
    from mmengine.logging import print_log

    from mmmilan.api.finetune_probe import begin_as_probe, is_probed
    from mmmilan.datasets.split_file import write_labelled
    from mmmilan.failures import step_errors
    from mmmilan.visualization.results_page import validate

    config = plan.config
    with no_file_if_refused(folder), step_errors(changes):
        if plan.labelled is not None:  # of a resumed run, it must be what split.json says
            write_labelled(plan.labelled, folder)
        if not resume and (gpus or is_probed(config)):  # else the run itself builds all before it writes its config
            try_out(config)
        frozen = begin_as_probe(config, folder)
        weights = run(config, folder, resume, gpus)
    found = validate(weights)
    if frozen:
        say_probes(frozen, found.scores, config.model.backbone.get('frozen_stages', -1) > 0)
    write_page(found, weights)
    if plan.second is not None:
        comparison = compare_runs(plan.second, weights, found.scores, plan.compare, gpus)
        write_page(found, weights, comparison)
        print_log(comparison['sentence'], logger='current')
    return weights


@contextmanager
def no_file_if_refused(folder: Path) -> Iterator[None]:
    """Remove what a run wrote into its folder if it is refused before its first step, when it writes its config."""
    import shutil

    before = set(folder.iterdir()) if folder.exists() else None
    try:
        yield
    except InputError:
        if folder.exists() and not (folder / 'config.py').exists():
            for path in set(folder.iterdir()).difference(before or ()):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if before is None:
                folder.rmdir()
        raise


def try_out(config: Config) -> None:
    """Build all that a run consists of, which is refused here before features are taken and processes started.

    Raises:
        InputError: a part cannot be built, or the batches do not suit the model.
    """
    import copy
    import tempfile

    from mmmilan.engine.config_check import check_batches
    from mmmilan.engine.launch import launched

    trial = copy.deepcopy(config)
    trial.launcher = 'none'
    with tempfile.TemporaryDirectory() as trial.work_dir, launched(trial, 'train') as runner:
        check_batches(runner)
        runner.build_optim_wrapper(runner.optim_wrapper)


def run(config: Config, folder: Path, resume: bool, gpus: int | None) -> Path:
    """Train in this process or in several; returns the path of the best model.

    The best checkpoint becomes ``model.pth``. A resumed run that found no better one has it already.
    """
    from mmengine.logging import print_log

    from mmmilan.checkpoints.config import config_text
    from mmmilan.checkpoints.io import find_newest, load_checkpoint_file
    from mmmilan.engine.launch import start_processes
    from mmmilan.engine.work_dir import can_resume
    from mmmilan.files import write_text

    resume, meta = resume and can_resume(config), {}
    if gpus is None:
        meta = train(config, folder, resume)
    else:
        write_text(folder / 'config.py', config_text(config))
        start_processes(
            'train', [folder / 'config.py'], gpus, dict(work_dir=folder, resume='auto' if resume else ''), {}
        )
    weights, best = folder / 'model.pth', sorted(folder.glob('best_*.pth'))
    if best or not weights.exists():
        save_weights(best[-1] if best else find_newest(folder), weights, meta)
    for path in best:
        path.unlink()
    metric, meta = config.default_hooks.checkpoint.save_best, load_checkpoint_file(weights)['meta']
    print_log(f'{weights} is the model after epoch {meta["epoch"]}, the best by {metric}.', logger='current')
    return weights


def say_probes(frozen: dict[str, float], scores: dict[str, float], freeze: bool) -> None:
    """Log whether a classifier is better than what its frozen start gives, for nothing: probe and neighbours.

    Args:
        frozen: See :func:`mmmilan.api.finetune_probe.begin_as_probe`.
        scores: Whether each validation image is right, by its path.
        freeze: Whether the head was trained alone.
    """
    from mmengine.logging import print_log

    best = max(frozen, key=frozen.get)
    accuracy = sum(scores.values()) / len(scores)
    figures = f'{100 * accuracy:.1f} % of {len(scores)} validation images right'
    others = ', '.join(f'{name} {100 * value:.1f} %' for name, value in frozen.items())
    trained = 'The head trained alone' if freeze else 'Fine-tuning'
    print_log(f'{trained} gets {figures}; the frozen start gets: {others}.', logger='current')
    if frozen[best] <= accuracy:
        return
    if best.startswith('k-NN'):
        remedy = 'look up neighbours of features (mmmilan embed), or train with more images'
    elif freeze:
        remedy = 'training on from it made it no better: lower lr, or train with more images'
    else:
        remedy = 'train the head alone with --freeze, or fine-tune with more images'
    warn(f'The {best} of the frozen encoder is the better model here; {remedy}.')


def compare_runs(
    config: Config, weights: Path, scores: dict[str, float], compare: str, gpus: int | None
) -> dict[str, Any]:
    """Train from another start, in a folder of its own, and write ``comparison.json``; returns what it holds.

    The second run goes on where it was stopped. ``scores`` are the first model's, by the path of each image.
    """
    import json

    from mmengine.logging import print_log

    from mmmilan.api.finetune_probe import begin_as_probe
    from mmmilan.checkpoints.io import checkpoints_in
    from mmmilan.checkpoints.task_config import config_task
    from mmmilan.evaluation.comparison import compare_models
    from mmmilan.files import write_text
    from mmmilan.visualization.results_page import validate

    folder = weights.parent / COMPARED
    name = 'random weights' if compare == 'scratch' else str(compare)
    print_log(f'The same training from {name}, in {folder}.', logger='current')
    set_folder(config, folder)
    begin_as_probe(config, folder)
    other = run(config, folder, bool(checkpoints_in(folder)), gpus)
    comparison = compare_models(scores, validate(other).scores, config_task(config), name)
    write_text(weights.parent / 'comparison.json', json.dumps(comparison))
    return comparison


def write_page(found: Validation, weights: Path, comparison: dict[str, Any] | None = None) -> None:
    """Write the page beside the weights."""
    from mmengine.logging import print_log

    from mmmilan.visualization.results_page import write_results

    with trained_anyway():
        page = write_results(found, weights, weights.with_name('report.html'), comparison)
        print_log(f'{page} shows what it gets right and wrong.', logger='current')
