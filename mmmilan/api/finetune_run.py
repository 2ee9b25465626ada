"""A run of fine-tuning, step by step: what it comes to, the training, the page, and the run it is compared with."""

from __future__ import annotations

import copy
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from mmengine.config import Config
from mmengine.logging import print_log

from mmmilan.api.finetune_probe import begin_as_probe, is_probed, refuse_what_it_sets
from mmmilan.api.finetune_recipe import compared_config, compared_with, new_config, resumed_config
from mmmilan.api.recipe import keep_call
from mmmilan.api.runs import save_weights, set_folder, train, trained_anyway
from mmmilan.building import change_config, in_scope
from mmmilan.checkpoints.config import config_text
from mmmilan.checkpoints.io import checkpoints_in, find_newest, load_checkpoint_file
from mmmilan.checkpoints.task_config import config_task
from mmmilan.datasets.labelled import Labelled
from mmmilan.datasets.split_file import write_labelled
from mmmilan.engine.config_check import check_batches
from mmmilan.engine.launch import launched, start_processes
from mmmilan.engine.work_dir import can_resume
from mmmilan.errors import InputError, warn
from mmmilan.evaluation.comparison import compare_models
from mmmilan.failures import step_errors
from mmmilan.files import write_text
from mmmilan.visualization.results_page import Validation, validate, write_results

COMPARED = 'compare'  # folder of the second run


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


def planned(
    folder: Path, given: dict[str, Any], changes: dict[str, Any], arguments: Iterable[str], resume: bool
) -> Plan:
    """Read the data and make the configs.

    Args:
        folder: Of the run.
        given: The arguments of ``mmmilan.finetune`` that are given, in its order.
        changes: Of the config.
        arguments: The names of all its arguments.
        resume: Whether the run in the folder is continued.
    """
    of_data = {name: given[name] for name in ('data', 'task', 'classes', 'ignore') if name in given}
    others = {name: value for name, value in given.items() if name not in (*of_data, 'compare', 'gpus')}
    compose = resumed_config if resume else new_config
    with in_scope():
        config, labelled = compose(folder, of_data, processes=given.get('gpus', 1), **others)
        change_config(config, changes, arguments)
        set_folder(config, folder)
        compare = compared_with(config, folder, given.get('compare'))
        second = None if compare is None else compared_config(config, compare)
        for each in (config, second) if second else (config,):
            refuse_what_it_sets(each, changes)
        keep_call(config, 'finetune', given | dict(out=folder, resume=resume), changes, compare=compare)
    return Plan(config, labelled, compare, second)


def carry_out(plan: Plan, folder: Path, changes: dict[str, Any], gpus: int | None, resume: bool) -> Path:
    """Train, validate, write the page, and compare; returns the path of the best model."""
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
    trial = copy.deepcopy(config)
    trial.launcher = 'none'
    with tempfile.TemporaryDirectory() as trial.work_dir, launched(trial, 'train') as runner:
        check_batches(runner)
        runner.build_optim_wrapper(runner.optim_wrapper)


def run(config: Config, folder: Path, resume: bool, gpus: int | None) -> Path:
    """Train in this process or in several; returns the path of the best model.

    The best checkpoint becomes ``model.pth``. A resumed run that found no better one has it already.
    """
    resume, meta = resume and can_resume(config), {}
    if gpus is None:
        meta = train(config, folder, resume)
    else:
        write_text(folder / 'config.py', config_text(config))
        start_processes(
            'train', [folder / 'config.py'], gpus, dict(work_dir=folder, resume='auto' if resume else None), {}
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
    with trained_anyway():
        page = write_results(found, weights, weights.with_name('report.html'), comparison)
        print_log(f'{page} shows what it gets right and wrong.', logger='current')
