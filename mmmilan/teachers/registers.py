"""Test-time registers (Jiang et al., Vision Transformers Don't Need Trained Registers, arXiv 2506.08010).

In ViTs trained without registers a few neurons of the MLPs make a few patches outliers of large norm, which draw the
attention although they show nothing. The activations of these neurons are moved to a token of zeros, which is added
here and dropped at the end; nothing is trained.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from mmmilan.errors import InputError
from mmmilan.teachers.base import Teacher


def add_test_time_register(
    embedding: nn.Module, activations: Sequence[nn.Module], neurons: Sequence[tuple[int, int]]
) -> None:
    """Let a ViT run with one token more, the last one, that takes over from the outliers.

    Args:
        embedding: Its output [B, T, D] enters the first block.
        activations: The activation of each block's MLP, [B, T, hidden].
        neurons: Block (from 0) and index of each register neuron.

    Raises:
        InputError: there is no such block.
    """
    by_block = defaultdict(list)
    for block, neuron in neurons:
        if not 0 <= block < len(activations):
            raise InputError(f'register_neurons names block {block}; choose from 0 to {len(activations) - 1}.')
        by_block[block].append(neuron)
    embedding.register_forward_hook(
        lambda module, args, tokens: torch.cat([tokens, torch.zeros_like(tokens[:, :1])], dim=1)
    )
    for block, indices in by_block.items():
        activations[block].register_forward_hook(partial(shift_to_register, indices))


def shift_to_register(neurons: list[int], module: nn.Module, args: tuple, hidden: Tensor) -> Tensor:
    """The register, the last of the tokens, gets each neuron's maximum over all tokens; patches get 0.

    Args:
        neurons: Indices of register neurons in this layer.
        module: The activation (of a forward hook, as ``args``).
        hidden: Its output [B, T, hidden]: class token, patches, register.

    Returns:
        The output with these neurons changed; the class token keeps its own.
    """
    chosen = hidden[..., neurons]
    chosen[:, -1] = chosen.amax(dim=1)
    chosen[:, 1:-1] = 0
    hidden[..., neurons] = chosen
    return hidden


@torch.no_grad()
def find_register_neurons(
    teacher: Teacher, images: Tensor, norm_threshold: float, top_block: int, number: int
) -> list[tuple[int, int]]:
    """The neurons that make outliers: those with the largest mean activation at outlying patches.

    As the published code does it, with patches in place of all tokens. It takes 500 images and a norm of 30; look at
    the norms of your teacher's last tokens first.

    Args:
        teacher: A teacher without registers.
        images: [B, 3, H, W], normalised as for the teacher.
        norm_threshold: Patches whose last token is longer are outliers.
        top_block: Only blocks up to this one (from 0) are searched.
        number: How many neurons are returned.

    Returns:
        Block and index of each neuron, for ``register_neurons`` of the teacher; the largest first.

    Raises:
        InputError: the teacher has no such MLPs, or no patch is an outlier.
    """
    seen: list[Tensor] = []
    hooks = [
        activation.register_forward_hook(lambda module, args, hidden: seen.append(hidden.detach()))
        for activation in teacher.tower.activations()[: top_block + 1]
    ]
    [tokens], _ = teacher.forward_layers(images, [-1])
    for hook in hooks:
        hook.remove()
    outlier = tokens[:, 1:].norm(dim=-1) > norm_threshold  # [B, N]
    with_outliers = outlier.any(dim=1)
    if not with_outliers.any():
        longest = float(tokens[:, 1:].norm(dim=-1).max())
        raise InputError(
            f'No patch has a norm over {norm_threshold}, the largest is {longest:.1f}; lower norm_threshold.'
        )
    weight = outlier.float() / outlier.sum(dim=1, keepdim=True).clamp(min=1)
    scores = [
        torch.einsum('bn,bnh->bh', weight, hidden[:, -outlier.shape[1] :].float().abs())[with_outliers].mean(dim=0)
        for hidden in seen
    ]
    scores = torch.stack(scores)  # [blocks, hidden]
    best = scores.flatten().topk(number).indices.tolist()
    return [divmod(index, scores.shape[1]) for index in best]
