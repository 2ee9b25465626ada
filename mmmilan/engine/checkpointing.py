"""Write checkpoints atomically, and delete the old one only after the new one is complete."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import mmengine.runner.checkpoint
import mmengine.runner.runner
import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook as MMEngineCheckpointHook
from mmengine.hooks import EarlyStoppingHook
from mmengine.runner import Runner
from torch import Tensor
from torch.utils._pytree import tree_map

from mmmilan.checkpoints.io import STOPPED
from mmmilan.engine.loops import EpochLoop
from mmmilan.engine.resuming import describe_data
from mmmilan.errors import InputError, warn
from mmmilan.files import atomic_write, remove_leftovers, write_text
from mmmilan.registry import HOOKS


@HOOKS.register_module()
class CheckpointHook(MMEngineCheckpointHook):
    """MMEngine's ``CheckpointHook``; a crash at any moment leaves a complete checkpoint.

    Each file, ``last_checkpoint`` too, is written to a temporary file, flushed to disk and then renamed. Only then are
    older checkpoints, or the previous best one, deleted. A run that is resumed at the end of an epoch repeats its
    validation, which may have been interrupted, so that the best checkpoint is that of an uninterrupted run, and early
    stopping comes when it would have; of several with the best score it is the last one. MMEngine's arguments;
    ``out_dir`` must be a folder. A checkpoint holds the step of the epoch at which it was saved, and :class:`EpochLoop`
    continues from that step.

    Args:
        asynchronous: Write a copy of the state while training continues; the next checkpoint waits until the copy is
            written. The copy takes as much host memory as the checkpoint. The best checkpoint is written at once.
    """

    rule_map: ClassVar = dict(greater=operator.ge, less=operator.le)

    def __init__(self, *args, asynchronous: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not re.fullmatch(r'(epoch|iter)_\{[^{}]*\}\.pth', self.filename_tmpl):
            raise InputError(
                f'filename_tmpl={self.filename_tmpl!r} names checkpoints that no run would find to resume from; leave '
                'it out.'
            )
        self.executor = ThreadPoolExecutor(max_workers=1) if asynchronous else None
        self.pending: Future | None = None

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        self.data = describe_data(runner.train_loop.dataloader)
        if not isinstance(self.file_backend, LocalBackend):
            raise InputError(f'{self.out_dir} is not a folder; set default_hooks.checkpoint.out_dir to one.')
        if is_main_process():  # leftovers of a run that was killed while it wrote or deleted
            remove(self._paths(runner.message_hub.runtime_info.get('outdated_ckpt_ids', [])))
            remove_leftovers(Path(self.out_dir))
        counts = self.save_best or any(isinstance(hook, EarlyStoppingHook) for hook in runner.hooks)
        if counts and runner._resume and validation_is_due(runner):
            runner.val_loop.run()

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        meta, loop = checkpoint['meta'], runner.train_loop
        if isinstance(loop, EpochLoop):
            within = loop.done if meta['epoch'] == runner.epoch else 0  # 0: saved at the end of the epoch
            meta.update(steps_of_epoch=within, epoch_length=len(loop.dataloader))
        meta['data'] = self.data
        schedules = checkpoint.get('param_schedulers')
        for state in schedules if isinstance(schedules, list) else []:  # OneCycleLR holds a function: not data
            for key in [key for key, value in state.items() if callable(value)]:
                del state[key]

    def save_now(self, runner: Runner) -> Path:
        """Save within an epoch, to resume from this step; the next regular checkpoint replaces this one."""
        path = Path(self.out_dir, f'{STOPPED}{runner.iter + 1}.pth')
        with self._writing(lambda path: write_text(Path(runner.work_dir, 'last_checkpoint'), str(path))):
            meta = dict(epoch=runner.epoch, iter=runner.iter + 1)
            runner.save_checkpoint(self.out_dir, path.name, meta=meta, by_epoch=False)
        return path

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        outdated = [*self._count_in(runner, step), *Path(self.out_dir).glob(f'{STOPPED}*.pth')]
        path = Path(self.out_dir, self.filename_tmpl.format(step))
        self.last_ckpt = str(path)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)

        def settle(path: Path) -> None:
            write_text(Path(runner.work_dir, 'last_checkpoint'), str(path))
            remove(outdated)

        with self._writing(settle, self.executor):
            runner.save_checkpoint(
                self.out_dir,
                path.name,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                meta=meta,
                by_epoch=self.by_epoch,
                **self.args,
            )

    def _count_in(self, runner: Runner, step: int) -> list[Path]:
        """Add a new checkpoint to those that are kept; return those to delete for it."""
        if self.max_keep_ckpts <= 0 or step in self.keep_ckpt_ids:
            return []
        outdated = list(self.keep_ckpt_ids)[: len(self.keep_ckpt_ids) + 1 - self.max_keep_ckpts]
        self.keep_ckpt_ids.append(step)  # a deque, which drops the oldest
        runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        runner.message_hub.update_info('outdated_ckpt_ids', outdated)
        return self._paths(outdated)

    def _paths(self, steps: Iterable[int]) -> list[Path]:
        return [Path(self.out_dir, self.filename_tmpl.format(step)) for step in steps]

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Save this checkpoint if it is the best one.

        Raises:
            InputError: the validation lacks the metric that ``save_best`` names.
        """
        named = self.key_indicators if self.save_best else ()
        if missing := [name for name in named if name not in (*metrics, 'auto')]:
            raise InputError(
                f'The validation gives no {missing[0]}, by which default_hooks.checkpoint.save_best chooses; name one '
                f'that it gives ({", ".join(metrics)}), and run again with --resume.'
            )
        outdated: list[Path] = []
        backend, self.file_backend = self.file_backend, _Remembering(outdated)

        def settle(path: Path) -> None:
            remove(old for old in outdated if old != path)
            outdated.clear()

        try:
            with self._writing(settle):
                super()._save_best_checkpoint(runner, metrics)
        finally:
            self.file_backend = backend

    def after_train(self, runner: Runner) -> None:
        self.finish()
        super().after_train(runner)

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            InputError: it could not be written.
        """
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()

    @contextmanager
    def _writing(self, settle: Callable[[Path], None], executor: ThreadPoolExecutor | None = None) -> Iterator[None]:
        """Within this context MMEngine's runner saves with :meth:`write`, in the executor if there is one.

        The runner gathers what is saved and then calls ``save_checkpoint``, which it imported by name: it has no place
        for another writer, and subclassing it would leave out ``FlexibleRunner`` and its strategies, which import it in
        a second module. So both names are exchanged, and only here.
        """

        def save(checkpoint: dict[str, Any], filename: str, **kwargs) -> None:
            self.finish()
            if executor:
                self.pending = executor.submit(self.write, copied(checkpoint), Path(filename), settle)
            else:
                self.write(checkpoint, Path(filename), settle)

        modules = mmengine.runner.runner, mmengine.runner.checkpoint
        before = [module.save_checkpoint for module in modules]
        for module in modules:
            module.save_checkpoint = save
        try:
            yield
        finally:
            for module, function in zip(modules, before, strict=True):
                module.save_checkpoint = function

    def write(self, checkpoint: dict[str, Any], path: Path, settle: Callable[[Path], None]) -> None:
        """Write a checkpoint, in the main process.

        Args:
            checkpoint: What is saved.
            path: Its file.
            settle: Called with ``path`` once the file is complete; deletes older checkpoints.
        """
        with atomic_write(path) as temporary, open(temporary, 'wb') as file:
            torch.save(checkpoint, file)
        settle(path)


def validation_is_due(runner: Runner) -> bool:
    """Whether a run by epochs stands at the end of an epoch that is followed by a validation."""
    loop = runner.train_loop
    if runner.val_loop is None or not isinstance(loop, EpochLoop) or loop.done or not runner.epoch:
        return False
    whole = runner.epoch % loop.val_interval == 0 or runner.epoch == runner.max_epochs
    return whole and runner.epoch >= loop.val_begin


def copied(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy of a checkpoint, with its tensors on the CPU, that later training steps do not change."""

    def copy_leaf(value: Any) -> Any:
        return value.detach().to('cpu', copy=True) if isinstance(value, Tensor) else copy.deepcopy(value)

    result = tree_map(copy_leaf, checkpoint)
    if hasattr(checkpoint['state_dict'], '_metadata'):  # module versions, which PyTorch keeps as an attribute
        result['state_dict']._metadata = checkpoint['state_dict']._metadata
    return result


def remove(paths: Iterable[Path]) -> None:
    """Delete files; warn about those that cannot be deleted."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            warn(f'{path} was not deleted ({error.strerror}).')


class _Remembering(LocalBackend):
    """A file backend that records the files to remove instead of removing them."""

    def __init__(self, outdated: list[Path]) -> None:
        self.outdated = outdated

    def remove(self, filepath: str) -> None:
        self.outdated.append(Path(filepath))
