"""Convert between full tensors of a checkpoint and the shards of a sharded model (DTensor)."""

from __future__ import annotations

from typing import Any

from mmengine.dist import is_main_process
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only


def shard_as(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a full ``tensor`` like ``like``; unchanged if ``like`` is not sharded or has another shape."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_weights(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Shard full weights as ``model`` shards its own, for its ``load_state_dict``."""
    own = model.state_dict()
    return {key: shard_as(value, own[key]) if key in own else value for key, value in weights.items()}


def gather(tree: Any) -> Any:
    """Replace shards in nested dicts and lists by full tensors, on the CPU of the main process. A collective call."""

    def whole(tensor: Tensor) -> Tensor | None:
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return tensor.detach().cpu() if is_main_process() else None

    return tree_map_only(Tensor, whole, tree)
