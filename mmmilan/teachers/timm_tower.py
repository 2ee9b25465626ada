"""A ViT of timm as a teacher, whichever class implements it; also inside open_clip's ``TimmModel``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import Beit, Eva, NaFlexVit, VisionTransformer, VisionTransformerRelPos
from torch import Tensor, nn

from mmmilan.errors import InputError
from mmmilan.teachers.base import Tower
from mmmilan.teachers.importance import WatchAttention, attention_to_patches, likeness_to_mean, name_of
from mmmilan.teachers.registers import add_test_time_register


class TimmTower(Tower):
    """The last norm, then what the model has after it, for every token on its own.

    The first token of the features is the image's embedding: the class token, or where a query pools (SigLIP, PE) the
    pooled embedding, or where there is neither the mean of the patches. Where a query pools, each patch goes through
    the same pool, as if the query attended to it alone, and so into the same space. Registers are left out.

    timm's own code runs the blocks; its attention is watched for the importance, see :class:`WatchAttention`.

    Args:
        vit: timm's model, without a classifier.
        head: What follows: the projection to the joint space of image and text.
        input_size: Height and width of the images that the model takes.
        importance_layers: Importance is the mean over so many last blocks.
        register_neurons: Block and index of neurons for a test-time register, see ``find_register_neurons``.

    Raises:
        InputError: importance comes from no block, or the model has no place for a test-time register.
    """

    def __init__(
        self,
        vit: nn.Module,
        head: nn.Module,
        input_size: tuple[int, int],
        importance_layers: int = 1,
        register_neurons: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        self.vit, self.head = vit, head
        self.width, self.depth = vit.num_features, len(vit.feature_info)
        self.patch_size = patch_size(vit)
        self.input_size = input_size
        data = resolve_model_data_config(vit)
        self.mean, self.std = data['mean'], data['std']
        self.pool = vit.attn_pool if getattr(vit, 'global_pool', None) == 'map' else None
        self.gives_values = self.pool is not None
        self.has_class_token = has_class_token(vit)
        self.importance_layers = importance_layers
        self.importance_is = name_of(self.has_class_token, self.pool is not None, importance_layers)
        self.num_extra = 1 if register_neurons else 0
        if register_neurons:
            add_test_time_register(vit.norm_pre, self.activations(), register_neurons)
        with torch.no_grad():  # of one token, on the device where the model is
            self.feature_dim = self.project(next(vit.parameters()).new_zeros(1, 1, self.width)).shape[-1]

    def activations(self) -> list[nn.Module]:
        """The activation of each block's MLP."""
        if not isinstance(self.vit, VisionTransformer):
            return super().activations()
        return [block.mlp.act for block in self.vit.blocks]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        calls: list[tuple] = []
        with WatchAttention(calls, self.importance_layers):
            tokens = self.sequence(self.vit.forward_features(images))
            embedding = self.embed_image(tokens)
        patches = self.patches(tokens)
        values = patches if self.pool is None else value_of_each(self.pool, patches)
        return self.project(torch.cat([embedding, values], dim=1)), self.weigh_patches(calls, tokens)

    def forward_layers(self, images: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        if not isinstance(self.vit, (VisionTransformer, Eva, Beit, NaFlexVit, VisionTransformerRelPos)):
            return super().forward_layers(images, layers)
        calls: list[tuple] = []
        with WatchAttention(calls, self.importance_layers):
            pairs = self.vit.forward_intermediates(
                images,
                indices=sorted({*layers, self.depth - 1}),
                return_prefix_tokens=True,
                output_fmt='NLC',
                intermediates_only=True,
            )
            tokens = [torch.cat(pair[::-1], dim=1) if isinstance(pair, tuple) else pair for pair in pairs]
            last = self.vit.norm(tokens[-1])
            self.embed_image(last)
        by_layer = dict(zip(sorted({*layers, self.depth - 1}), tokens, strict=True))
        return [self.without_registers(by_layer[layer]) for layer in layers], self.weigh_patches(calls, last)

    def sequence(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D], or a map [B, rows, columns, D] or [B, D, rows, columns] of them -> [B, T, D]."""
        if tokens.ndim == 4 and tokens.shape[1:3] != self.grid:
            tokens = tokens.permute(0, 2, 3, 1)
        return tokens.flatten(1, -2)

    def embed_image(self, tokens: Tensor) -> Tensor:
        """Normed tokens [B, T, D] -> the image's embedding [B, 1, D], before the head."""
        if self.pool is not None:
            first = 0 if self.pools_prefix() else self.first_patch(tokens)
            return self.pool(tokens[:, first:])[:, None]
        return self.without_registers(tokens)[:, :1]

    def pools_prefix(self) -> bool:
        """Whether class token and registers are in the pool too."""
        return getattr(self.vit, 'pool_include_prefix', True)  # timm's Eva has no such option and pools all

    def first_patch(self, tokens: Tensor) -> int:
        """Index of the first patch; before it stand class token and registers."""
        first = tokens.shape[1] - self.num_patches - self.num_extra
        if first < 0:
            raise InputError(
                f'The teacher gives {tokens.shape[1]} tokens, not {self.num_patches} patches; choose another.'
            )
        return first

    def patches(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] -> those of the patches [B, N, D]."""
        first = self.first_patch(tokens)
        return tokens[:, first : first + self.num_patches]

    def without_registers(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] -> class token, or else the mean of the patches, then patches [B, 1 + N, D]."""
        patches = self.patches(tokens)
        first = tokens[:, :1] if self.has_class_token else patches.mean(dim=1, keepdim=True)
        return torch.cat([first, patches], dim=1)

    def weigh_patches(self, calls: list[tuple], tokens: Tensor) -> Tensor:
        """Importance [B, N], from the attention that was watched or from the last normed tokens [B, T, D]."""
        if self.pool is None and not self.has_class_token:
            return likeness_to_mean(self.patches(tokens))
        if not calls:
            raise InputError('The teacher runs without fused attention; set TIMM_FUSED_ATTN=1.')
        first = calls[-1][1].shape[-2] - self.num_patches - self.num_extra
        attention = attention_to_patches(calls, first, self.num_patches)
        if self.weigh is None:
            return attention
        return self.weigh(attention, self.project(value_of_each(self.pool, self.patches(tokens))))

    def project(self, tokens: Tensor) -> Tensor:
        """Pooled or single tokens [B, T, D] -> features [B, T, C]."""
        if isinstance(norm := getattr(self.vit, 'fc_norm', None), nn.Module):
            tokens = norm(tokens)
        if isinstance(classifier := getattr(self.vit, 'head', None), nn.Linear):  # open_clip projects with it
            tokens = classifier(tokens)
        return self.head(tokens)


def value_of_each(pool: nn.Module, patches: Tensor) -> Tensor:
    """What timm's ``AttentionPoolLatent`` gives for each patch [B, N, D] alone, where its attention is 1."""
    width = pool.kv.out_features // 2
    bias = None if pool.kv.bias is None else pool.kv.bias[width:]
    x = pool.proj(F.linear(patches, pool.kv.weight[width:], bias))
    return x if pool.mlp is None else x + pool.mlp(pool.norm(x))


def has_class_token(vit: nn.Module) -> bool:
    """Whether the first token stands for the image."""
    holder = getattr(vit, 'embeds', vit)  # NaFlexVit keeps its tokens there
    return getattr(holder, 'cls_token', None) is not None


def patch_size(vit: nn.Module) -> int:
    """Side of a patch in pixels; timm gives it for each block."""
    [reduction] = {info['reduction'] for info in vit.feature_info}
    return reduction


def own_input_size(vit: nn.Module) -> tuple[int, int]:
    """Height and width of the images that a model is made for."""
    return getattr(getattr(vit, 'patch_embed', None), 'img_size', None) or vit.pretrained_cfg['input_size'][1:]


def check_timm_vit(vit: nn.Module, name: str) -> None:
    """Raise an :class:`InputError` for a model that does not keep its patches, or whose attention cannot be watched."""
    reductions = sorted({info['reduction'] for info in getattr(vit, 'feature_info', [])})
    if len(reductions) != 1:
        raise InputError(
            f'{name} is convolutional or hierarchical, its maps have strides {reductions}; choose a plain ViT.'
        )
    if not any(getattr(module, 'fused_attn', False) for module in vit.modules()):
        raise InputError(f'{name} has no attention that timm can fuse; choose a plain ViT, or set TIMM_FUSED_ATTN=1.')
