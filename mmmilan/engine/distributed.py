"""The processes of a run: their group, how they end, what they send, and models in shards (FSDP2)."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from mmengine._strategy import DDPStrategy
from mmengine._strategy.single_device import SingleDeviceStrategy
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import barrier, broadcast, broadcast_object_list, get_world_size, is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from mmmilan.checkpoints.loading import gather, shard_as, shard_weights
from mmmilan.errors import InputError
from mmmilan.registry import HOOKS, STRATEGIES

Decision = TypeVar('Decision')


@contextmanager
def processes(cfg: Config) -> Iterator[None]:
    """Join the process group for this context; a launcher's processes exit together at its end.

    The exit status is 0, or that of a stopped run. A process without a launcher continues after the context.
    """
    init_processes(cfg)
    status = 0
    try:
        yield
    except SystemExit as stop:  # of StopHook, in all processes after the same step
        if cfg.launcher == 'none':
            raise
        status = stop.code
    if cfg.launcher != 'none':
        end_processes()
        leave(status)


@contextmanager
def joined() -> Iterator[None]:
    """A context of the processes that torchrun started beside this one, if it did; at its end they wait for each other.

    They stay together until this process exits: a second group would meet at the addresses of the first.
    """
    if 'TORCHELASTIC_RUN_ID' in os.environ and int(os.environ['WORLD_SIZE']) > 1 and not is_distributed():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['LOCAL_RANK']) % torch.cuda.device_count())
        torch.distributed.init_process_group('nccl' if torch.cuda.is_available() else 'gloo')
        atexit.register(torch.distributed.destroy_process_group)
    yield  # after an error the others may never arrive; torchrun ends them
    barrier()


def on_main(decide: Callable[[], Decision]) -> Decision | None:
    """What the main process decides, None in the others.

    Raises:
        InputError: in all processes, if the main one raises it.
    """
    decision, errors = None, [None]
    if is_main_process():
        try:
            decision = decide()
        except InputError as error:
            errors = [error]
    broadcast_object_list(errors)
    if errors[0] is not None:
        raise errors[0]
    return decision


def init_processes(cfg: Config) -> None:
    """Configure DistributedDataParallel; on machines without a GPU, torchrun's processes use gloo.

    MMEngine's own set-up requires a GPU per process and keeps a second copy of the gradients.
    """
    if cfg.launcher == 'none':
        return
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
        gradient_as_bucket_view=True,  # gradients are sent without a copy
    )
    if cfg.launcher == 'pytorch' and not torch.cuda.is_available():
        torch.distributed.init_process_group('gloo')
        wrapper['device_ids'] = None
    if 'model_wrapper_cfg' not in cfg:
        cfg.model_wrapper_cfg = wrapper


def end_processes() -> None:
    """Destroy the process group when all processes have arrived: an early exit would close connections in use.

    Garbage is collected first. A DDP wrapper that is the last owner of a process group waits for the group's threads
    while they wait for the GIL, and the process hangs or aborts (PyTorch 2.11).
    """
    if is_distributed():
        barrier()
        gc.collect()
        torch.distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Exit as ``multiprocessing`` does: run the exit handlers, but do not finalize the interpreter.

    A gloo thread may still have to release a tensor, for which it needs the interpreter. During finalization it would
    abort the process ("terminate called without an active exception").
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


@HOOKS.register_module()
class GradientCompressionHook(Hook):
    """Send gradients in bfloat16, for machines with a slow network between them.

    DistributedDataParallel then sends half as many bytes and sums gradients with 8 bits of precision.
    """

    def before_train(self, runner: Runner) -> None:
        if isinstance(runner.model, DistributedDataParallel):
            runner.model.register_comm_hook(None, bf16_compress_hook)


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of encoder and decoder, in the order of ``model.modules()``."""
    from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer

    from mmmilan.models.decoders import PromptingBlock

    return [module for module in model.modules() if isinstance(module, TransformerEncoderLayer | PromptingBlock)]


@STRATEGIES.register_module()
class FullyShardStrategy(DDPStrategy):
    """Shard weights, gradients and optimizer states, block by block (FSDP2, ``fully_shard``).

    Results and checkpoints are those of DistributedDataParallel: a run can be resumed with either, on any number of
    processes. Gradients are clipped by the norm of the whole model. For pretraining with :class:`mmmilan.MILAN`; each
    process holds the whole frozen teacher. Use it with
    ``runner_type='FlexibleRunner'``. Arguments of MMEngine's ``DDPStrategy``, but for ``model_wrapper``.
    """

    def _wrap_model(self, model: nn.Module) -> nn.Module:
        model = self.convert_model(model.to(get_device()))
        for tensor in (*model.parameters(), *model.buffers()):
            broadcast(tensor.data)  # as DistributedDataParallel does
        mesh = init_device_mesh(get_device(), (get_world_size(),))
        for block in transformer_blocks(model):
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def model_state_dict(self) -> dict:
        return gather(self.model.state_dict())

    def optim_state_dict(self) -> dict:
        return gather(super().optim_state_dict())

    def save_checkpoint(self, filename: str, *, save_optimizer: bool = True, **kwargs) -> None:
        """The main process writes the states gathered from all processes."""
        if is_main_process():
            SingleDeviceStrategy.save_checkpoint(self, filename, save_optimizer=save_optimizer, **kwargs)
            return
        self.model_state_dict()
        if save_optimizer:
            self.optim_state_dict()

    def load_checkpoint(self, filename: str, *, map_location: Any = 'cpu', **kwargs) -> dict:
        """As MMEngine's, but on the CPU: the unsharded states may not fit on a device."""
        return super().load_checkpoint(filename, map_location='cpu', **kwargs)

    def load_model_state_dict(self, state_dict: dict, **kwargs) -> None:
        super().load_model_state_dict(shard_weights(self.model, state_dict), **kwargs)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        parameters = [p for group in self.optim_wrapper.optimizer.param_groups for p in group['params']]
        for index, state in state_dict['state'].items():
            state_dict['state'][index] = {key: shard_as(value, parameters[index]) for key, value in state.items()}
        super().load_optim_state_dict(state_dict)
