"""``mmmilan train`` and ``mmmilan test``: one config, one process or several, one runner."""

from __future__ import annotations

import os
import pickle
import subprocess
import types
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from cyclopts import Parameter
from mmengine.config import Config
from mmengine.evaluator import DumpResults
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from mmmilan import arguments
from mmmilan.arguments import as_options, checked
from mmmilan.building import DEFAULT_HOOKS, SCOPE, change_config, check_operators
from mmmilan.checkpoints.config import check_plain, keep_encoder, own_config, place_data_preprocessor, read_config_file
from mmmilan.checkpoints.foreign_config import within_weights
from mmmilan.checkpoints.loading import use_safe_loading
from mmmilan.checkpoints.task_config import loads_annotations
from mmmilan.checkpoints.zoo import find_config
from mmmilan.components import type_name
from mmmilan.engine.config_check import (
    check_batches,
    check_data,
    check_data_sets,
    check_is_not_read,
    check_loops,
    check_packages,
    check_processes,
    use_boxes_alone,
)
from mmmilan.engine.data_checks import guard_workers, worker_errors
from mmmilan.engine.distributed import processes
from mmmilan.engine.labelled_images import tested_on
from mmmilan.engine.optim import computes_in_bfloat16
from mmmilan.engine.program import program_kept
from mmmilan.engine.schedule import own_schedule, use_schedule
from mmmilan.engine.stopping import HeartbeatHook
from mmmilan.engine.teacher_cache import remove_left
from mmmilan.engine.work_dir import can_resume, is_main, setup_env, training_in, write_config
from mmmilan.errors import InputError, count
from mmmilan.failures import build_errors, step_errors
from mmmilan.files import atomic_write, check_output, check_output_folder, extension

Launcher = Literal['none', 'pytorch', 'slurm', 'mpi']
# The hooks of every run; docs/architecture.md says in which order they are called.
EVERY_RUN = ('ExactLoadingHook', 'ImageSizeHook', 'ClassCountHook', 'CorruptImageHook', 'StopHook', 'HeartbeatHook')
# The model that averages the predictions of several views, by the scope of a config.
AVERAGES = dict(
    mmpretrain=dict(type='mmpretrain.AverageClsScoreTTA'),
    mmseg=dict(type='mmseg.SegTTAModel'),
    mmdet=dict(
        type='mmdet.models.test_time_augs.DetTTAModel',
        tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
    ),
)
LocalRank = Annotated[int, Parameter(name=['--local-rank', '--local_rank'], show=False)]


@checked
def train(
    config: arguments.Path,
    *,
    gpus: arguments.Count | None = None,
    work_dir: arguments.Path | None = None,
    resume: bool | arguments.Path = False,
    amp: bool = False,
    auto_scale_lr: bool = False,
    launcher: Launcher = 'none',
    local_rank: LocalRank = 0,
    **changes: Any,
) -> None:
    """Train from a config: pretraining, classification, detection or segmentation.

    Args:
        config: config file, a name of the zoo, or a checkpoint that holds its config.
        gpus: number of processes on this machine, one for each GPU; by default this process alone. The environment
            variables NNODES, NODE_RANK, MASTER_ADDR and PORT join several machines, as does srun with one task on each,
            and NUMA=node binds each process to the cores next to its GPU.
        work_dir: folder of logs and checkpoints, by default work_dirs/CONFIG[/PRETRAIN].
        resume: resume from this checkpoint; without a value, from the last one in the work dir.
        amp: mixed precision: bfloat16, or float16 if the GPU lacks it.
        auto_scale_lr: scale the learning rate with the real batch size.
        launcher: what started this process, if several train together.
        local_rank: number of this process on its machine.
        changes: anything in the config, e.g. ``--train_cfg.max_epochs 10``, or several as
            ``--cfg-options train_cfg.max_epochs=10 param_scheduler=None``.

    Raises:
        InputError: the config, an option of it or the data is wrong; a data worker died or hangs.
    """
    if gpus is not None and launcher == 'none':
        options = dict(work_dir=work_dir, resume='auto' if resume is True else resume, amp=amp)
        start_processes('train', [config], gpus, options | dict(auto_scale_lr=auto_scale_lr), changes)
        return
    cfg = read_config(config, work_dir, launcher, local_rank, changes)
    if amp:
        enable_amp(cfg)
    if auto_scale_lr or (cfg.get('auto_scale_lr') or {}).get('enable'):
        enable_auto_scale_lr(cfg)
    fit_processes(cfg)
    if resume not in (False, True, 'auto'):
        cfg.resume, cfg.load_from = True, os.fspath(resume)
    elif resume and can_resume(cfg):
        cfg.resume, cfg.load_from = True, None  # the newest, whatever the config begins with
    with launched(cfg, 'train') as runner, step_errors(changes):
        scale_by_accumulation(runner)
        check_batches(runner)
        runner.train()


@checked
def test(
    config: arguments.Path,
    checkpoint: arguments.Path | None = None,
    *,
    data: arguments.Path | None = None,
    classes: arguments.Texts | arguments.Path | None = None,
    ignore: arguments.Texts | arguments.Text | None = None,
    out: arguments.Path | None = None,
    show_dir: arguments.Path | None = None,
    tta: bool = False,
    overwrite: bool = False,
    gpus: arguments.Count | None = None,
    work_dir: arguments.Path | None = None,
    launcher: Launcher = 'none',
    local_rank: LocalRank = 0,
    **changes: Any,
) -> None:
    """Evaluate a checkpoint with a config: pretraining, classification, detection or segmentation.

    Args:
        config: config file, a name of the zoo, or a checkpoint that holds its config.
        checkpoint: file, URL or name of a model of the zoo; by default ``config``, if that is a checkpoint.
        data: folder of labelled images to test on in place of the config's test set: folders of classes, COCO, YOLO or
            Pascal VOC, or images with label maps. If it is divided, ``val`` is taken, or else ``test``.
        classes: names of the classes of ``data``, or a file of them, if it does not name them itself.
        ignore: classes of ``data`` that are left out.
        out: write all predictions to this .pkl file.
        show_dir: draw what is annotated beside what is predicted for each image, into this folder.
        tta: test-time augmentation: by ``tta_model`` and ``tta_pipeline`` of the config, else the mean over the image
            and its mirror image; not of masks.
        overwrite: replace the file of ``out`` and the pictures in ``show_dir`` if they are there.
        gpus: number of processes on this machine, one for each GPU; by default this process alone.
        work_dir: folder of logs, by default work_dirs/CONFIG[/PRETRAIN].
        launcher: what started this process, if several test together.
        local_rank: number of this process on its machine.
        changes: anything in the config, as for ``train``.

    Raises:
        InputError: the config, an option of it, the checkpoint or the data is wrong.
    """
    if gpus is not None and launcher == 'none':
        words = [config] if checkpoint is None else [config, checkpoint]
        options = dict(data=data, classes=classes, ignore=ignore, work_dir=work_dir, out=out, show_dir=show_dir)
        options |= dict(tta=tta, overwrite=overwrite)
        start_processes('test', words, gpus, options, changes)
        return
    if checkpoint is None and extension(config) == '.py':
        raise InputError(f'{config} is a config without weights; give a checkpoint after it.')
    if data is None and (classes is not None or ignore is not None):
        raise InputError('classes and ignore are about the images of data; give --data, or leave them out.')
    if out is not None:
        check_output(out, [config, checkpoint or config], endings=('.pkl', '.pickle'), overwrite=overwrite)
    cfg = read_config(config, work_dir, launcher, local_rank, changes)
    if type_name(cfg.get('test_cfg') or {}) == 'KNNLoop':
        keep_encoder(cfg)  # it needs no teacher, which may not be here
    cfg.load_from = os.fspath(checkpoint or config)
    cfg.resume = False
    if show_dir is not None:
        if is_main(cfg) and os.path.exists(show_dir) and not overwrite:
            raise InputError(f'{show_dir} exists; choose another folder, or add --overwrite to replace its pictures.')
        hook = dict(type='mmmilan.ShowHook', out_dir=os.fspath(show_dir))
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
    with nullcontext() if data is None else tested_on(cfg, data, classes, ignore):
        if tta:
            use_several_views(cfg)
        with launched(cfg, 'test') as runner, step_errors(changes):
            if out:
                runner.test_evaluator.metrics.append(SavedPredictions(os.fspath(out)))
            runner.test()


class SavedPredictions(DumpResults):
    """MMEngine's ``DumpResults``, whose file is written whole or not at all."""

    def compute_metrics(self, results: list) -> dict:
        with atomic_write(Path(self.out_file_path)) as temporary, open(temporary, 'wb') as file:
            pickle.dump(results, file)
        print_log(f'{self.out_file_path}: {count(len(results), "prediction")}.', logger='current')
        return {}


def start_processes(
    command: str, words: list, gpus: int, options: Mapping[str, Any], changes: Mapping[str, Any]
) -> None:
    """Run a command in several processes of this machine, and of others that do the same.

    Raises:
        InputError: the machine has fewer GPUs, the port is in use, or the first machine is not known.
    """
    from mmmilan import torchrun

    where = meeting_point()
    per_machine = gpus_per_machine(f'mmmilan {command} {" ".join(map(str, words))}', gpus, int(where['nnodes']))
    launch = [f'--{name}={value}' for name, value in where.items()]
    launch += [f'--nproc_per_node={per_machine}']
    launch += [f'--numa-binding={os.environ["NUMA"]}'] if os.environ.get('NUMA') else []
    words = ['--module', 'mmmilan.cli', command, *map(os.fspath, words), '--launcher', 'pytorch', *as_options(options)]
    words += ['--cfg-options', *(f'{key}={value!r}' for key, value in changes.items())] if changes else []
    torchrun.main(launch + words)


def meeting_point() -> dict[str, str]:
    """The machines of a run and where they meet, by torchrun's names: the environment's, else those of Slurm's step.

    Raises:
        InputError: the address of the first of several machines is not known.
    """
    environment = os.environ
    where = dict(nnodes='1', node_rank='0', master_addr='127.0.0.1', master_port='29500')
    if int(environment.get('SLURM_STEP_NUM_NODES', 1)) > 1:  # srun started this on each of several machines
        hosts = ['scontrol', 'show', 'hostnames', environment['SLURM_STEP_NODELIST']]
        first = subprocess.run(hosts, capture_output=True, text=True, check=True).stdout.split()[0]
        where |= dict(
            nnodes=environment['SLURM_STEP_NUM_NODES'], node_rank=environment['SLURM_NODEID'], master_addr=first
        )
    variables = dict(nnodes='NNODES', node_rank='NODE_RANK', master_addr='MASTER_ADDR', master_port='PORT')
    where |= {name: environment[variable] for name, variable in variables.items() if variable in environment}
    if where['nnodes'] != '1' and where['master_addr'] == '127.0.0.1' and 'MASTER_ADDR' not in environment:
        raise InputError(f'NNODES={where["nnodes"]}, but no MASTER_ADDR; set it to the address of the first machine.')
    return where


def gpus_per_machine(line: str, gpus: int, machines: int) -> int:
    """How many processes to start here. All those of the run may be given, where each machine has its share of GPUs.

    A machine without a GPU takes any number.

    Raises:
        InputError: this machine has fewer GPUs.
    """
    available = torch.cuda.device_count()
    if not available or gpus <= available:
        return gpus
    if gpus == machines * available:
        return available
    here = max(number for number in range(1, available + 1) if gpus % number == 0)
    needed = gpus // here
    first, last = (
        f'`NNODES={needed} NODE_RANK={rank} MASTER_ADDR=ADDRESS_OF_THE_FIRST {line} --gpus {here}`'
        for rank in (0, needed - 1)
    )
    raise InputError(
        f'gpus={gpus}, but this machine has {available}; lower it, or run on {needed} machines '
        f'{first} {"and" if needed == 2 else "to"} {last}.'
    )


def read_config(
    path: str | os.PathLike,
    work_dir: str | os.PathLike | None = None,
    launcher: str = 'none',
    local_rank: int = 0,
    changes: Mapping[str, Any] = types.MappingProxyType({}),
) -> Config:
    """The config with the user's changes merged in and checked.

    Raises:
        InputError: there is no such file, it cannot be read, or nothing reads a change.
    """
    path = os.fspath(find_config(path))
    if not os.path.isfile(path):
        raise InputError(f'The config {path} does not exist; correct its path.')
    cfg = read_config_file(path) if extension(path) == '.py' else own_config(path, with_data=True)
    change_config(cfg, changes)
    place_data_preprocessor(cfg)
    check_plain(cfg.to_dict())
    cfg.launcher = launcher
    cfg.work_dir = os.fspath(work_dir or cfg.get('work_dir') or default_work_dir(cfg, path))
    os.environ.setdefault('LOCAL_RANK', str(local_rank))
    return cfg


def default_work_dir(cfg: Config, path: str) -> str:
    """``work_dirs/CONFIG``, or ``work_dirs/CONFIG/NAME`` if the environment sets ``PRETRAIN=NAME``."""
    pretrain = cfg.env_variables.get('PRETRAIN', '')  # '' unless it is set and the config reads it
    return str(Path('work_dirs', Path(path).stem, pretrain.replace('/', '_')))


def enable_amp(cfg: Config) -> None:
    """Turn on mixed precision, unless the config has it already."""
    if cfg.optim_wrapper.get('type', 'OptimWrapper') == 'OptimWrapper':
        bfloat16 = not torch.cuda.is_available() or computes_in_bfloat16('cuda')
        cfg.optim_wrapper.type = 'mmmilan.BFloat16OptimWrapper' if bfloat16 else 'AmpOptimWrapper'


def enable_auto_scale_lr(cfg: Config) -> None:
    """Scale the learning rate by the ratio of the real batch size to that of the config's learning rate.

    Raises:
        InputError: the config lacks the batch size of its learning rate.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise InputError('The config lacks the batch size of its learning rate; set auto_scale_lr.base_batch_size.')
    cfg.auto_scale_lr.enable = True


def scale_by_accumulation(runner: Runner) -> None:
    """Let the accumulated steps count in the real batch size, by which MMEngine scales the learning rate.

    The config keeps its own ``base_batch_size``, so that a run can be repeated and resumed with the config it wrote.
    """
    options, steps = runner.cfg.get('auto_scale_lr'), runner.cfg.optim_wrapper.get('accumulative_counts', 1)
    if options and options.get('enable') and steps > 1:
        scaled = dict(options, base_batch_size=options.base_batch_size / steps)
        if hasattr(runner, 'strategy'):
            runner.strategy._auto_scale_lr = scaled
        else:
            runner.auto_scale_lr = scaled


def fit_processes(cfg: Config) -> None:
    """Fit the schedule and the rate of ``mmmilan.pretrain`` to the images that all processes see in a step."""
    variable = dict(pytorch='WORLD_SIZE', slurm='SLURM_NTASKS', mpi='OMPI_COMM_WORLD_SIZE').get(cfg.launcher, '')
    before = own_schedule(cfg)
    if before is None:
        return
    per_step = cfg.train_dataloader.batch_size * int(os.environ.get(variable, 1))
    if per_step == cfg.auto_scale_lr.base_batch_size:
        return
    images = before.steps_per_epoch * cfg.auto_scale_lr.base_batch_size
    after = use_schedule(cfg, images, per_step, before)
    print_log(
        f'{per_step} images in a step, of all processes: {count(after.steps_per_epoch, "step")} an epoch, the first '
        f'{after.warmup} for warm-up, learning rate {cfg.optim_wrapper.optimizer.lr:g}.',
        logger='current',
    )


@contextmanager
def launched(cfg: Config, task: Literal['train', 'test']) -> Iterator[Runner]:
    """Build the runner of a config, which loads checkpoints safely and exactly.

    A training run locks its work dir, and can be stopped and resumed without loss. A launcher's processes exit at the
    end of this context.

    Args:
        cfg: The config.
        task: The data of this task must exist.

    Raises:
        InputError: a part of the config cannot be built; data are missing; mmcv lacks the operators that mmdet and
            mmseg import; another run uses the work dir; there is no complete checkpoint to resume from; a data worker
            died, hangs or cannot be started.
    """
    check_launcher(cfg.launcher)
    check_operators(cfg)
    check_packages(cfg)
    check_loops(cfg, task)
    check_data(cfg, task)
    check_processes(cfg, task)
    changed = use_boxes_alone(cfg, task)
    if is_main(cfg):
        check_output_folder(cfg.work_dir)
        check_is_not_read(cfg.work_dir, cfg)
    use_safe_loading()
    with training_in(cfg) if task == 'train' else nullcontext(), program_kept(), processes(cfg):
        Runner.dump_config, Runner.setup_env = write_config, setup_env
        add_hooks(cfg)
        with build_errors(), within_weights(cfg), SCOPE:  # which the runner sets, and keeps
            runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
        if changed:
            runner.logger.warning(changed)
        guard_workers(runner)
        check_data_sets(runner)
        heartbeat = next(hook for hook in runner.hooks if isinstance(hook, HeartbeatHook))
        with closing(runner.visualizer), heartbeat.publish_error(), build_errors(), worker_errors():
            yield runner
            if task == 'train' and cfg.resume:
                remove_left(runner)


def check_launcher(launcher: str) -> None:
    """Raise an :class:`InputError` if the launcher that an option names did not start this process."""
    variable = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_LOCAL_RANK').get(launcher)
    if variable and variable not in os.environ:
        raise InputError(
            f'launcher={launcher!r}, but that did not start this process ({variable} is not set); leave it out, or '
            'start several processes with --gpus.'
        )


def add_hooks(cfg: Config) -> None:
    """Add the hooks that every run has to a config that does not name them, and leave out those that are None.

    MMEngine takes None only for its own.
    """
    for name, hook in list((cfg.get('default_hooks') or {}).items()):
        if hook is None and name not in DEFAULT_HOOKS:
            del cfg.default_hooks[name]
    hooks = [*(cfg.get('custom_hooks') or []), *(cfg.get('default_hooks') or {}).values()]
    named = {type_name(hook) for hook in hooks if isinstance(hook, dict)}
    missing = [dict(type=f'mmmilan.{name}') for name in EVERY_RUN if name not in named]
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), *missing]


def use_several_views(cfg: Config) -> None:
    """Test with ``tta_model`` and ``tta_pipeline`` of a config; without them, on the image and its mirror image.

    Raises:
        InputError: the library has no such model for the task.
    """
    scope = cfg.get('default_scope') or 'mmpretrain'
    if cfg.get('tta_model') is None:
        if scope not in AVERAGES or 'masking' in cfg.model or (cfg.model.get('head') is None and scope == 'mmpretrain'):
            raise InputError(
                f'tta averages the predictions of classes, which {cfg.model.type} has not; leave out --tta.'
            )
        if (cfg.model.get('roi_head') or {}).get('mask_head'):
            raise InputError(
                "MMDetection's DetTTAModel averages boxes and no masks; leave out --tta, or test the boxes alone "
                '(--model.roi_head.mask_head None --test_evaluator.metric bbox).'
            )
        cfg.tta_model = dict(AVERAGES[scope])
    dataset = cfg.test_dataloader.dataset
    if cfg.get('tta_pipeline') is None:
        *steps, pack = dataset.pipeline
        annotations = [step for step in steps if loads_annotations(step)]
        flips = [dict(type=f'{scope}.RandomFlip', prob=prob) for prob in (1.0, 0.0)]
        if 'meta_keys' in pack:
            pack.meta_keys = (*pack.meta_keys, 'flip', 'flip_direction')
        views = [flips, *([step] for step in annotations), [pack]]
        steps = [step for step in steps if step not in annotations]
        cfg.tta_pipeline = [*steps, dict(type='TestTimeAug', transforms=views)]
    dataset.pipeline = cfg.tta_pipeline
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), dict(type='mmmilan.SeveralViewsHook', tta_cfg=cfg.tta_model)]
