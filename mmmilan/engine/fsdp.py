"""Shard one model over all processes: PyTorch's FSDP2 as a strategy of MMEngine."""

from __future__ import annotations

from typing import Any

from mmengine._strategy import DDPStrategy
from mmengine._strategy.single_device import SingleDeviceStrategy
from mmengine.device import get_device
from mmengine.dist import broadcast, get_world_size, is_main_process
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmmilan.checkpoints.shards import gather, shard_as, shard_weights
from mmmilan.registry import STRATEGIES


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
