"""Frozen teachers: image -> target features of every token, and the importance of every patch."""

from __future__ import annotations

import logging
import math
import os
import re
import zipfile
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file
from mmmilan.checkpoints.open_clip import NORM_EPS, is_maskclip, to_open_clip
from mmmilan.errors import InputError
from mmmilan.models.attention import class_attention
from mmmilan.registry import MODELS


class Teacher(nn.Module):
    """Base of the teachers.

    Attributes:
        feature_dim: Width C of the target.
        width: Width D of the tokens inside.
        patch_size: Side of a patch in pixels.
        num_patches: Number N of patches.
        input_size: Side of the image that the teacher sees; others are resized to it.
    """

    feature_dim: int
    width: int
    patch_size: int
    input_size: int

    @property
    def num_patches(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> features [B, 1 + N, C] of all tokens and importance [B, N].

        The teacher sees the student's own tensor, ImageNet normalisation included (published code).
        """
        [tokens], importance = self.forward_layers(images, [-1])
        return self.project(tokens), importance

    @torch.no_grad()
    def forward_layers(self, images: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """The tokens of several layers, before the last norm.

        Args:
            images: [B, 3, H, W], as for ``forward``.
            layers: Indices of blocks; 0 is the first, -1 the last.

        Returns:
            The tokens [B, 1 + N, D] after each of these blocks, and importance [B, N].

        Raises:
            InputError: there is no such block.
        """
        depth = len(self.blocks)
        if not all(-depth <= layer < depth for layer in layers):
            raise InputError(f'The teacher has blocks 0 to {depth - 1}, not all of {list(layers)}; choose among them.')
        if images.shape[-1] != self.input_size:
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size=size, mode='bicubic', antialias=True, align_corners=False)
        kept: dict[int, Tensor] = {}
        x = self.embed(images)
        for index, block in enumerate(self.blocks):
            before, x = x, self.run_block(block, x)
            if {index, index - depth} & set(layers):
                kept[index] = x
        return [kept[layer % depth] for layer in layers], self.importance(self.blocks[-1], before)

    @property
    def blocks(self) -> nn.Module:
        """The transformer blocks."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Images -> tokens before the first block."""
        raise NotImplementedError

    def run_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        """One of the blocks."""
        return block(tokens)

    def importance(self, last: nn.Module, tokens: Tensor) -> Tensor:
        """Importance from the last block and its input."""
        raise NotImplementedError

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens after the last block -> features."""
        raise NotImplementedError


def check_input_size(input_size: int, patch_size: int) -> None:
    if input_size % patch_size:
        raise InputError(
            f"The teacher's input_size={input_size} is not a multiple of its patch size {patch_size}; "
            f'choose {input_size // patch_size * patch_size} or {(input_size // patch_size + 1) * patch_size}.'
        )


def resize_positions(positions: Tensor, grid_size: int) -> Tensor:
    """Positions [1 + M², D] of the class token and a square grid -> [1 + grid_size², D], bicubic."""
    if len(positions) == 1 + grid_size**2:
        return positions
    cls_position, positions = positions[:1], positions[1:]
    positions = positions.T.unflatten(1, (math.isqrt(len(positions)), -1))[None]
    positions = F.interpolate(
        positions, size=(grid_size, grid_size), mode='bicubic', antialias=True, align_corners=False
    )
    return torch.cat([cls_position, positions[0].flatten(1).T])


def warn_random_weights(teacher: str) -> None:
    print_log(
        f'{teacher}: pretrained=None gives random weights; the target means nothing, measure speed only.',
        logger='current',
        level=logging.WARNING,
    )


@MODELS.register_module()
class OpenCLIPTeacher(Teacher):
    """The image tower of a CLIP: ``ln_post``, then projection to the joint space, for every token.

    Args:
        model: Name of an open_clip model with a ViT tower. None reads the architecture off the shapes of the
            ``pretrained`` file: a checkpoint of :class:`MaskCLIP`, or one in OpenAI's layout (TorchScript archive or
            state dict, the whole CLIP or its visual tower alone, QuickGELU).
        pretrained: An open_clip tag, a file, or None for random weights (to measure speed).
        input_size: Side of the image that the teacher sees, by default its own. The positions are
            interpolated to it. 196 gives ViT-L/14 the 14 x 14 grid of a student with patches of 16 at 224.
        head_width: Width of the attention heads of a tower without model name, which no shape tells.
    """

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | None = None,
        input_size: int | None = None,
        head_width: int = 64,
    ) -> None:
        super().__init__()
        if model is None and pretrained is None:
            raise InputError('OpenCLIPTeacher needs a model name, or a file as pretrained.')
        if model is None:
            self.visual = build_tower_of_file(pretrained, head_width)
        else:
            self.visual = build_open_clip_tower(model, pretrained)
        self.width, self.feature_dim = self.visual.proj.shape
        self.patch_size = self.visual.patch_size[0]
        self.input_size = input_size or self.visual.image_size[0]
        check_input_size(self.input_size, self.patch_size)
        positions = resize_positions(self.visual.positional_embedding.data, self.input_size // self.patch_size)
        self.visual.positional_embedding = nn.Parameter(positions)
        fold_quick_gelu(self.visual)

    @property
    def blocks(self) -> nn.Module:
        return self.visual.transformer.resblocks

    def embed(self, images: Tensor) -> Tensor:
        visual = self.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        cls_token = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        return visual.ln_pre(torch.cat([cls_token, patches], dim=1) + visual.positional_embedding)

    def run_block(self, block: nn.Module, tokens: Tensor) -> Tensor:
        # open_clip goes through nn.MultiheadAttention, which on some devices forms the whole attention matrix
        attn = block.attn
        qkv = F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)
        qkv = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        tokens = tokens + block.ls_1(attn.out_proj(attended))
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))

    def importance(self, last: nn.Module, tokens: Tensor) -> Tensor:
        attn = last.attn
        return class_attention(last.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias, attn.num_heads)

    def project(self, tokens: Tensor) -> Tensor:
        return self.visual.ln_post(tokens) @ self.visual.proj


def fold_quick_gelu(visual: nn.Module) -> None:
    """Let the weights do a part of QuickGELU: x sigmoid(1.702 x) = silu(1.702 x) / 1.702, one operation, not three."""
    from open_clip.transformer import QuickGELU

    for block in visual.transformer.resblocks:
        if isinstance(block.mlp.gelu, QuickGELU):
            for parameter in block.mlp.c_fc.parameters():
                parameter.data *= 1.702
            block.mlp.c_proj.weight.data /= 1.702
            block.mlp.gelu = nn.SiLU(inplace=True)


def build_open_clip_tower(model: str, pretrained: str | None) -> nn.Module:
    """The visual tower of an open_clip model.

    Raises:
        InputError: if open_clip does not know the model or tag, or the tower is not a plain ViT.
    """
    import open_clip

    if model not in open_clip.list_models():
        raise InputError(f'open_clip has no model {model!r}; open_clip.list_models() gives its names.')
    if pretrained is None:
        warn_random_weights(f'OpenCLIPTeacher {model}')
    elif not os.path.exists(pretrained) and pretrained not in open_clip.list_pretrained_tags_by_model(model):
        raise InputError(
            f'pretrained={pretrained!r} is neither a file nor an open_clip tag of {model}; its tags are '
            f'{open_clip.list_pretrained_tags_by_model(model)}.'
        )
    visual = open_clip.create_model(model, pretrained=pretrained).visual
    block = getattr(getattr(visual, 'transformer', None), 'resblocks', [None])[-1]
    is_vit = hasattr(getattr(block, 'attn', None), 'in_proj_weight')
    if not is_vit or visual.pool_type != 'tok' or visual.attn_pool is not None:
        raise InputError(f'The image tower of {model} is not a plain ViT with a class token; choose one that is.')
    return visual


def build_tower_of_file(path: str, head_width: int) -> nn.Module:
    """A CLIP visual tower from a checkpoint of MaskCLIP or in OpenAI's layout, its architecture read off the shapes.

    Raises:
        InputError: if the file holds no such tower.
    """
    from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer

    weights = read_weights(path)
    of_maskclip = is_maskclip(weights)
    state_dict = visual_state_dict(to_open_clip(weights) if of_maskclip else weights, path)
    width, _, _, patch_size = state_dict['conv1.weight'].shape
    if width % head_width:
        raise InputError(f'The tower in {path} is {width} wide, no multiple of head_width={head_width}; correct it.')
    grid_size = math.isqrt(len(state_dict['positional_embedding']) - 1)
    layers = {re.match(r'transformer\.resblocks\.(\d+)\.', key) for key in state_dict} - {None}
    visual = VisionTransformer(
        image_size=grid_size * patch_size,
        patch_size=patch_size,
        width=width,
        layers=1 + max(int(match[1]) for match in layers),
        heads=width // head_width,
        mlp_ratio=state_dict['transformer.resblocks.0.mlp.c_fc.weight'].shape[0] / width,
        output_dim=state_dict['proj'].shape[1],
        no_ln_pre=of_maskclip,
        act_layer=nn.GELU if of_maskclip else QuickGELU,
        norm_layer=partial(LayerNorm, eps=NORM_EPS) if of_maskclip else LayerNorm,
    )
    try:
        visual.load_state_dict(state_dict)
    except RuntimeError as error:
        reason = ' '.join(str(error).split())
        raise InputError(f'{path} looks like a CLIP image tower but does not fit: {reason}') from error
    return visual


def visual_state_dict(weights: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tower's own part of the weights, whatever prefix it stands under, in float32."""
    prefixes = [key.removesuffix('class_embedding') for key in weights if key.endswith('class_embedding')]
    if len(prefixes) != 1 or f'{prefixes[0]}conv1.weight' not in weights or f'{prefixes[0]}proj' not in weights:
        raise InputError(
            f"{path} is not in OpenAI's CLIP layout (no visual.class_embedding, visual.conv1.weight and "
            f'visual.proj; it begins with {", ".join(list(weights)[:3])}); name its open_clip model as well.'
        )
    prefix = prefixes[0]
    own = ('class_embedding', 'positional_embedding', 'proj', 'conv1.', 'ln_pre.', 'transformer.', 'ln_post.')
    tower = {key.removeprefix(prefix): value.float() for key, value in weights.items() if key.startswith(prefix)}
    return {key: value for key, value in tower.items() if key.startswith(own)}


def read_weights(path: str) -> dict[str, Tensor]:
    """State dict of a checkpoint file or of a TorchScript archive."""
    if not os.path.exists(path):
        raise InputError(f"The teacher's file {path} does not exist; correct pretrained=.")
    if zipfile.is_zipfile(path) and any(name.endswith('constants.pkl') for name in zipfile.ZipFile(path).namelist()):
        return torch.jit.load(path, map_location='cpu').state_dict()
    return get_state_dict(load_checkpoint_file(path))


@MODELS.register_module()
class TimmTeacher(Teacher):
    """A timm ViT: DINO by name, or SLIP from its published file (paper, table 5, row 9).

    Args:
        model: Name of a timm ViT with a class token, e.g. 'vit_base_patch16_224.dino'.
        pretrained: True for timm's own weights; a file, in SLIP's layout (``visual.*`` in timm's names with
            ``image_projection``) or a plain timm state dict; None for random weights (to measure speed).
        input_size: Side of the image that the teacher sees, by default the model's own; the positions are
            interpolated to it.
    """

    def __init__(self, model: str, pretrained: bool | str | None = True, input_size: int | None = None) -> None:
        import timm

        super().__init__()
        kwargs = dict(num_classes=0, img_size=input_size) if input_size else dict(num_classes=0)
        if not timm.is_model(model.split('.')[0]):
            raise InputError(f'timm has no model {model!r}; timm.list_models("vit*") gives its names.')
        self.vit = timm.create_model(model, pretrained=pretrained is True, **kwargs)
        if not isinstance(self.vit, timm.models.VisionTransformer) or self.vit.num_prefix_tokens != 1:
            raise InputError(f'{model} is not a plain ViT with a class token; choose one that is.')
        self.projection: nn.Parameter | None = None
        if isinstance(pretrained, str):
            self.load_file(pretrained)
        elif not pretrained:
            warn_random_weights(f'TimmTeacher {model}')
        self.input_size, self.patch_size = self.vit.patch_embed.img_size[0], self.vit.patch_embed.patch_size[0]
        self.width = self.vit.embed_dim
        self.feature_dim = self.width if self.projection is None else self.projection.shape[1]

    def load_file(self, path: str) -> None:
        """Load SLIP's file (with its projection to the joint space) or a timm state dict."""
        weights = {key.removeprefix('module.'): value for key, value in read_weights(path).items()}
        if 'image_projection' in weights:
            self.projection = nn.Parameter(weights['image_projection'].float())
            weights = {key[7:]: value for key, value in weights.items() if key.startswith('visual.')}
        weights = {key: value for key, value in weights.items() if not key.startswith('head.')}
        if 'pos_embed' in weights:
            grid_size = self.vit.patch_embed.grid_size[0]
            weights['pos_embed'] = resize_positions(weights['pos_embed'][0].float(), grid_size)[None]
        try:
            self.vit.load_state_dict(weights)
        except RuntimeError as error:
            reason = ' '.join(str(error).split())
            raise InputError(f'{path} does not hold the weights of this timm ViT: {reason}') from error

    @property
    def blocks(self) -> nn.Module:
        return self.vit.blocks

    def embed(self, images: Tensor) -> Tensor:
        return self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(images)))

    def importance(self, last: nn.Module, tokens: Tensor) -> Tensor:
        attn = last.attn
        return class_attention(last.norm1(tokens), attn.qkv.weight, attn.qkv.bias, attn.num_heads)

    def project(self, tokens: Tensor) -> Tensor:
        tokens = self.vit.norm(tokens)
        return tokens if self.projection is None else tokens @ self.projection
