"""Teachers of timm by name (DINO, DINOv2, DINOv3, SigLIP 2, PE, RADIO, EVA-02, ...), and SLIP from its file.

Their tower, :class:`TimmTower`, also serves open_clip's models whose image tower is timm's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models import Beit, Eva, NaFlexVit, VisionTransformer, VisionTransformerRelPos
from torch import Tensor, nn

from mmmilan.checkpoints.download import download
from mmmilan.checkpoints.io import check_values
from mmmilan.errors import InputError
from mmmilan.files import first_line
from mmmilan.registry import MODELS
from mmmilan.teachers.base import IMAGENET_MEAN, IMAGENET_STD, Teacher, Tower, check_input_size, pair
from mmmilan.teachers.importance import WatchAttention, attention_to_patches, likeness_to_mean, name_of
from mmmilan.teachers.registers import add_test_time_register
from mmmilan.teachers.weights import (
    AS_FILE,
    HUB,
    LOCAL,
    hub_file,
    local_folder,
    read_weights,
    warn_random_weights,
    weights_in,
)

CONFIG = 'config.json'
HUB_FILES = ('model.safetensors', 'pytorch_model.bin')


@MODELS.register_module()
class TimmTeacher(Teacher):
    """A plain ViT of timm by name (DINO, DINOv3, SigLIP 2, ...), or SLIP from its file (paper, table 5, row 9).

    Args:
        model: Name of a ViT of timm, e.g. 'vit_base_patch16_224.dino', or ``hf-hub:REPOSITORY`` or
            ``local-dir:FOLDER`` with ``config.json`` and weights. See :class:`TimmTower` for what it teaches. The tag
            after the dot also says how the images of a file were normalised.
        pretrained: True for timm's own weights, or those of the repository or folder; a file, in SLIP's layout
            (``visual.*`` in timm's names with ``image_projection``) or a plain timm state dict; None for random
            weights (to measure speed).
        input_size: Side, or height and width, of the image that the teacher sees, by default the model's own; the
            positions are interpolated to it.
        importance_layers: Importance is the mean over so many last blocks.
        register_neurons: See :class:`TimmTower`.
        options: Of :class:`Teacher`.

    Raises:
        InputError: timm has no such model or tag, the model is not a plain ViT, patches do not fill the image, or the
            weights are not there or do not fit.
    """

    def __init__(
        self,
        model: str,
        pretrained: bool | str | None = True,
        input_size: int | tuple[int, int] | None = None,
        importance_layers: int = 1,
        register_neurons: Sequence[tuple[int, int]] = (),
        **options: Any,
    ) -> None:
        if model.startswith(HUB):
            model = f'{LOCAL}{Path(hub_file(repo := model.removeprefix(HUB), [CONFIG])).parent}'
            pretrained = hub_file(repo, HUB_FILES) if pretrained is True else pretrained
        size = check_model(model, pair(input_size) if input_size else None)
        path = published_file(model) if pretrained is True else pretrained
        if path:
            weights, head = split_projection(read_weights(path))
            vit = build_vit(model, size, weights, path)
        else:
            warn_random_weights(f'TimmTeacher {model}')
            vit, head = build_vit(model, size), nn.Identity()
        tower = TimmTower(vit, head, size, importance_layers, register_neurons)
        if isinstance(head, nn.Linear):  # SLIP; timm's own weights of this model may be of other images
            tower.mean, tower.std = IMAGENET_MEAN, IMAGENET_STD
        super().__init__(tower, **options)

    @property
    def vit(self) -> nn.Module:
        """timm's model."""
        return self.tower.vit


def check_model(model: str, input_size: tuple[int, int] | None) -> tuple[int, int]:
    """Check a model and its input size before anything is downloaded; its own input size where None is given.

    Raises:
        InputError: timm has no such model or tag, it is not a plain ViT, or patches do not fill the image.
    """
    if model.startswith(LOCAL):
        local_folder(model)
    else:
        architecture, _, tag = model.partition('.')
        if not timm.is_model(architecture):
            raise InputError(f'timm has no model {architecture!r}; timm.list_models("vit*") gives its names.')
        if tag and model not in (tags := timm.models.get_arch_pretrained_cfgs(architecture)):
            raise InputError(f'timm has no weights {model!r}; its tags for this model are {sorted(tags)}.')
    try:
        with torch.device('meta'):
            vit = timm.create_model(model, num_classes=0)
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
        raise InputError(f'timm cannot build {model} ({first_line(error)}); correct model=.') from error
    check_timm_vit(vit, model)
    input_size = input_size or own_input_size(vit)
    check_input_size(input_size, patch_size(vit))
    return input_size


def published_file(model: str) -> str:
    """The file of timm's own weights, downloaded if it is not here, or that of a folder."""
    if model.startswith(LOCAL):
        return weights_in(local_folder(model), HUB_FILES)
    config = timm.get_pretrained_cfg(model)
    if config is None or not (config.hf_hub_id or config.url):
        raise InputError(f'timm has no weights of {model}; give them as {AS_FILE}.')
    if not config.hf_hub_id:
        return str(download(config.url))
    names = [config.hf_hub_filename] if config.hf_hub_filename else HUB_FILES
    return hub_file(config.hf_hub_id, names)


def split_projection(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], nn.Module]:
    """Weights of a file -> those of the ViT, and SLIP's projection to the joint space where the file has one."""
    weights = {key.removeprefix('module.'): value for key, value in weights.items()}
    if 'image_projection' not in weights:
        return weights, nn.Identity()
    head = nn.Linear(*weights['image_projection'].shape, bias=False)
    head.load_state_dict(dict(weight=weights['image_projection'].T))
    return {key[7:]: value for key, value in weights.items() if key.startswith('visual.')}, head


def statistics_beside(path: str) -> dict[str, Any]:
    """How the images of a file were normalised, by timm's ``config.json`` beside it; empty where there is none."""
    try:
        settings = json.loads(Path(path).absolute().with_name(CONFIG).read_text(encoding='utf-8'))['pretrained_cfg']
        return {key: tuple(map(float, settings[key])) for key in ('mean', 'std')}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):  # none, or another program's
        return {}


def build_vit(
    model: str, size: tuple[int, int], weights: dict[str, Tensor] | None = None, path: str | None = None
) -> nn.Module:
    """The model at an input size, with weights that timm itself converts from other layouts and grids.

    Raises:
        InputError: the weights do not fit.
    """
    if weights is None:
        return timm.create_model(model, num_classes=0, img_size=size)
    weights = {key: value for key, value in weights.items() if not key.startswith(('head.', 'head_dist.'))}
    check_values(weights, path)
    # no classifier in either of them, or timm would load what fits and leave the rest without a word
    overlay = dict(state_dict=weights, num_classes=0, label_offset=0, source='') | statistics_beside(path)
    try:
        vit = timm.create_model(model, pretrained=True, num_classes=0, img_size=size, pretrained_cfg_overlay=overlay)
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        reason = ' '.join(str(error).split())[:400]
        raise InputError(f'{path} does not fit {model} ({reason}); correct model= or pretrained=.') from error
    vit.pretrained_cfg.pop('state_dict')
    return vit


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
