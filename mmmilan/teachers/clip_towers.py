"""The towers of a CLIP: open_clip's own ViT as a teacher (CLIP, MetaCLIP, CLIPA, CoCa, ...), and the one of texts."""

from __future__ import annotations

from collections.abc import Sequence

import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import _build_text_tower
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from mmmilan.checkpoints.io import check_values
from mmmilan.errors import InputError
from mmmilan.files import first_line
from mmmilan.teachers import importance
from mmmilan.teachers.base import TextTower, Tower, check_input_size
from mmmilan.teachers.clip_source import MISFITS, CLIPSource, find_source, text_sizes
from mmmilan.teachers.importance import class_attention
from mmmilan.teachers.registers import add_test_time_register

# The parts of a CLIP's state dict that are the text tower, where it has no prefix (OpenAI, most of open_clip).
_OWN = ('token_embedding.', 'positional_embedding', 'transformer.', 'ln_final.', 'text_projection')


class CLIPTower(Tower):
    """The last norm, then the projection to the joint space of image and text, for every token on its own.

    The first token of the features is the image's embedding: from the class token (CLIP), from the mean token (CLIPA),
    or from a pooling query (CoCa; each patch then goes through the same pool, as if the query attended to it alone).

    Blocks are run here, and not by open_clip, which goes through ``nn.MultiheadAttention``: that forms the whole
    attention matrix on some devices. Only the class token's row of it is needed.

    Args:
        visual: open_clip's tower.
        input_size: Height and width of the images; the positions are interpolated to them. None: as the tower's.
        importance_layers: Importance is the mean over so many last blocks.
        register_neurons: Block and index of neurons for a test-time register, see ``find_register_neurons``.

    Raises:
        InputError: the tower has other blocks, patches do not fill the image, or importance comes from no block.
    """

    def __init__(
        self,
        visual: VisionTransformer,
        input_size: tuple[int, int] | None = None,
        importance_layers: int = 1,
        register_neurons: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        self.visual = visual
        self.width, self.depth = visual.transformer.width, len(visual.transformer.resblocks)
        self.feature_dim = visual.proj.shape[1]
        self.patch_size = visual.patch_size[0]
        self.input_size = input_size or visual.image_size
        check_input_size(self.input_size, self.patch_size)
        positions = resize_positions(visual.positional_embedding.data, visual.grid_size, self.grid)
        visual.positional_embedding = nn.Parameter(positions)
        fold_quick_gelu(visual)
        self.has_class_token = visual.pool_type == 'tok' and visual.attn_pool is None
        self.gives_values = visual.attn_pool is None
        self.importance_layers = importance_layers
        self.importance_is = importance.name_of(self.has_class_token, visual.attn_pool is not None, importance_layers)
        self.num_extra = 1 if register_neurons else 0
        if register_neurons:
            add_test_time_register(visual.ln_pre, self.activations(), register_neurons)

    def activations(self) -> list[nn.Module]:
        """The activation of each block's MLP."""
        return [block.mlp.gelu for block in self.visual.transformer.resblocks]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        [tokens], scores = self.forward_layers(images, [self.depth - 1])
        return self.project(tokens), scores

    def forward_layers(self, images: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        kept: dict[int, Tensor] = {}
        scores, values = [], None
        x = self.embed(images)
        for index, block in enumerate(self.visual.transformer.resblocks):
            if self.has_class_token and index >= self.depth - self.importance_layers:
                scores.append(self.class_attention(block, x))
            if self.weigh and index == self.depth - 1:
                values = self.values(block, x)
            x = self.run_block(block, x)
            if index in layers:
                kept[index] = x[:, : 1 + self.num_patches]
        last = x[:, : 1 + self.num_patches]
        attention = sum(scores) / len(scores) if scores else self.pool_importance(last)
        return [kept[layer] for layer in layers], self.weigh(attention, values) if self.weigh else attention

    def embed(self, images: Tensor) -> Tensor:
        """Images -> tokens before the first block."""
        visual = self.visual
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        cls_token = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        return visual.ln_pre(torch.cat([cls_token, patches], dim=1) + visual.positional_embedding)

    def run_block(self, block: ResidualAttentionBlock, tokens: Tensor) -> Tensor:
        """One block, with fused attention."""
        attn = block.attn
        qkv = F.linear(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias)
        qkv = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        tokens = tokens + block.ls_1(attn.out_proj(attended))
        return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))

    def class_attention(self, block: ResidualAttentionBlock, tokens: Tensor) -> Tensor:
        """Attention of the class token to each patch [B, N] in a block with this input."""
        attn = block.attn
        attention = class_attention(block.ln_1(tokens), attn.in_proj_weight, attn.in_proj_bias, attn.num_heads)
        return attention[:, : self.num_patches]

    def values(self, block: ResidualAttentionBlock, tokens: Tensor) -> Tensor:
        """What each patch [B, N, C] alone gives in the attention of the last block with this input, projected."""
        attn = block.attn
        weight, bias = attn.in_proj_weight[2 * self.width :], attn.in_proj_bias[2 * self.width :]
        values = attn.out_proj(F.linear(block.ln_1(tokens), weight, bias))
        return self.project(values)[:, 1 : 1 + self.num_patches]

    def pool_importance(self, last: Tensor) -> Tensor:
        """Importance [B, N] from the last tokens [B, 1 + N, D], where no class token attends."""
        pool = self.visual.attn_pool
        if pool is None:
            return importance.likeness_to_mean(last[:, 1:])
        query = pool.ln_q(pool.query[:1]).expand(len(last), 1, -1)
        keys = pool.ln_k(last)
        return pool.attn(query, keys, keys, need_weights=True)[1].float()[:, 0, 1:]

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1 + N, D] after the last block -> features [B, 1 + N, C]."""
        visual = self.visual
        if self.has_class_token:
            return visual.ln_post(tokens) @ visual.proj
        embedding = visual._pool(tokens)[0] @ visual.proj
        patches = tokens[:, 1:]
        if visual.attn_pool is not None:
            patches = value_of_each(visual.attn_pool, patches)
        return torch.cat([embedding[:, None], visual.ln_post(patches) @ visual.proj], dim=1)


def value_of_each(pool: nn.Module, patches: Tensor) -> Tensor:
    """What an attention pool gives for each patch [B, N, D] alone, where its attention is 1: the value, projected."""
    attn = pool.attn
    bias = attn.in_proj_bias.chunk(3)[2]
    weight = attn.v_proj_weight if attn.in_proj_weight is None else attn.in_proj_weight.chunk(3)[2]
    return attn.out_proj(F.linear(pool.ln_k(patches), weight, bias))


def check_clip_tower(visual: nn.Module, name: str) -> None:
    """Raise an :class:`InputError` for a tower that is not open_clip's plain ViT."""
    if not isinstance(visual, VisionTransformer):
        raise InputError(f'The image tower of {name} is a {type(visual).__name__}, not a ViT; choose one that is.')
    if not all(type(block) is ResidualAttentionBlock for block in visual.transformer.resblocks):
        raise InputError(f"The image tower of {name} has blocks that are not CLIP's; choose another model.")


def resize_positions(positions: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Positions [1 + M, D] of the class token and of a grid -> [1 + N, D] of another grid, bicubic."""
    if grid == new_grid:
        return positions
    cls_position, positions = positions[:1], positions[1:].T.unflatten(1, grid)[None]
    positions = F.interpolate(positions, size=new_grid, mode='bicubic', antialias=True, align_corners=False)
    return torch.cat([cls_position, positions[0].flatten(1).T])


def fold_quick_gelu(visual: VisionTransformer) -> None:
    """Let the weights do a part of QuickGELU: x sigmoid(1.702 x) = silu(1.702 x) / 1.702, one operation, not three."""
    for block in visual.transformer.resblocks:
        if isinstance(block.mlp.gelu, QuickGELU):
            for parameter in block.mlp.c_fc.parameters():
                parameter.data *= 1.702
            block.mlp.c_proj.weight.data /= 1.702
            block.mlp.gelu = nn.SiLU(inplace=True)


def load_text_tower(model: str | None, pretrained: str | None, head_width: int = 64) -> TextTower:
    """The text tower of what ``OpenCLIPTeacher`` takes, in evaluation mode.

    Args:
        model: See :class:`OpenCLIPTeacher`.
        pretrained: See :class:`OpenCLIPTeacher`.
        head_width: Width of the attention heads of a tower from a file alone, unless the file holds its config.

    Raises:
        InputError: the weights are not trained, or have no text tower.
    """
    source = find_source(model, pretrained, head_width)
    if source.read is None:
        raise InputError('The teacher has random weights, to which no text means anything; give it pretrained weights.')
    weights, path = source.read()
    own, scale = text_part(weights, path)
    sizes = source.config.get('text_cfg') or text_sizes(own, path, head_width, source.config.get('text_heads'))
    encoder, tokenize = build_text(source, sizes)
    kept = encoder.state_dict()
    try:  # transformers' towers no longer have their positions' numbers
        encoder.load_state_dict(
            {key: value for key, value in own.items() if key in kept or not key.endswith('position_ids')}
        )
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:300]
        raise InputError(f'The text tower in {path} does not fit ({reason}); correct model= or head_width.') from error
    return TextTower(encoder, tokenize, scale).eval().requires_grad_(False)


def text_part(weights: dict[str, Tensor], path: str) -> tuple[dict[str, Tensor], float]:
    """The text tower's own weights, whatever prefix they stand under, and the inverse temperature.

    Raises:
        InputError: there is none.
    """
    embedding = next((key for key in weights if key.endswith('token_embedding.weight')), None)
    prefix = 'text.' if embedding is None else embedding.removesuffix('token_embedding.weight')
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    if not prefix.endswith('text.'):
        own = {key: value for key, value in own.items() if key.startswith(_OWN)}
    scale = weights.get(f'{prefix.removesuffix("text.")}logit_scale')
    if not own or scale is None:
        raise InputError(f'{path} has no text tower; give a checkpoint of MaskCLIP or a whole CLIP.')
    check_values(own, path)
    return {key: value.float() for key, value in own.items()}, float(scale.exp())


def build_text(source: CLIPSource, sizes: dict) -> tuple[nn.Module, object]:
    """A text tower with random weights, and its tokenizer."""
    settings = sizes | (dict(hf_model_pretrained=False) if sizes.get('hf_model_name') else {})
    try:
        encoder = _build_text_tower(source.config['embed_dim'], settings, source.config.get('quick_gelu', False))
        if source.tokenizer is None:
            return encoder, open_clip.tokenizer.SimpleTokenizer(context_length=encoder.context_length)
        return encoder, open_clip.get_tokenizer(source.tokenizer)
    except (*MISFITS, OSError, ImportError) as error:  # a tokenizer may be a file of the hub
        raise InputError(
            f'The text tower of {source.name} cannot be built ({first_line(error)}); correct the config beside the '
            'file, or choose a teacher with another text tower.'
        ) from error
