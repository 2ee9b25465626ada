"""Decoders: from the encoder's tokens to predictions for all patches (paper, section 2.3 and figure 1b, c).

Every decoder takes the latent tokens with the indices of the visible and of the masked patches, and returns predictions
in the order [class token, visible patches, masked patches].
Attention does not depend on the order of its keys, so nothing is put back into image order in between.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import FFN
from mmengine.model import BaseModule
from mmpretrain.models.backbones.vision_transformer import TransformerEncoderLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmmilan.checkpoints.positions import sincos_position_embedding
from mmmilan.errors import InputError
from mmmilan.models.vit import gather_tokens, init_linear
from mmmilan.registry import MODELS

NORM_CFG = dict(type='LN', eps=1e-6)


def read_grid(num_patches: int | Sequence[int]) -> tuple[int, int]:
    """Rows and columns: those given, or those of a square of so many patches.

    Raises:
        InputError: it is neither a square number nor a pair.
    """
    grid = [round(num_patches**0.5)] * 2 if isinstance(num_patches, int) else num_patches
    if len(grid) != 2 or (isinstance(num_patches, int) and math.prod(grid) != num_patches):
        raise InputError(f'num_patches={num_patches} is not a square number; give (rows, columns) of the grid.')
    return tuple(grid)


class Decoder(BaseModule):
    """What both decoders share: embedding, mask token, positions, norm and prediction.

    The keys of the state dict are those of mmpretrain's ``MILANPretrainDecoder`` and ``MAEPretrainDecoder``.

    Args:
        num_patches: Number N of patches of a square image, or the (rows, columns) of a rectangular grid.
        embed_dim: Width D of the encoder.
        decoder_embed_dim: Width of the decoder.
        decoder_depth: Number of blocks.
        decoder_num_heads: Attention heads of each block.
        mlp_ratio: Hidden width of the feed-forward network over the decoder's width.
        predict_feature_dim: Width C of the target.
        with_cp: Activation checkpointing: recompute each block in the backward pass to save memory.

    Attributes:
        grid: Rows and columns of patches.

    Raises:
        InputError: ``num_patches`` is neither a square number nor a pair, or the heads do not share the width equally.
    """

    def __init__(
        self,
        num_patches: int | Sequence[int] = 196,
        embed_dim: int = 768,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4,
        predict_feature_dim: int = 512,
        with_cp: bool = False,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if decoder_num_heads < 1 or decoder_embed_dim % decoder_num_heads:
            raise InputError(
                f'decoder_embed_dim={decoder_embed_dim} is not a multiple of decoder_num_heads={decoder_num_heads}; '
                'choose one that is.'
            )
        self.with_cp = with_cp
        self.embed_dim = embed_dim
        self.grid = read_grid(num_patches)
        self.num_patches = num_patches = math.prod(self.grid)
        self.predict_feature_dim = predict_feature_dim
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        positions = torch.zeros(1, 1 + num_patches, decoder_embed_dim)
        self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        feedforward_channels = int(mlp_ratio * decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            self.build_block(decoder_embed_dim, decoder_num_heads, feedforward_channels) for _ in range(decoder_depth)
        )
        self.ln1 = nn.LayerNorm(decoder_embed_dim, eps=NORM_CFG['eps'])
        self.decoder_pred = nn.Linear(decoder_embed_dim, predict_feature_dim)

    def build_block(self, embed_dims: int, num_heads: int, feedforward_channels: int) -> nn.Module:
        raise NotImplementedError

    def run_block(self, block: nn.Module, *tokens: Tensor) -> Tensor:
        return checkpoint(block, *tokens, use_reentrant=False) if self.with_cp else block(*tokens)

    def init_weights(self) -> None:
        """Initialise as MAE does."""
        self.apply(init_linear)
        nn.init.normal_(self.mask_token, std=0.02)
        positions = sincos_position_embedding(self.grid, self.decoder_pos_embed.shape[-1])
        self.decoder_pos_embed.data.copy_(positions)
        for block in self.decoder_blocks:
            block.is_init = True  # keep mmpretrain from re-initialising its blocks
        super().init_weights()

    def embed(self, latent: Tensor, visible: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """z' = W z + pos for what the encoder saw, x = m + pos for the rest.

        Args:
            latent: Encoder tokens z [B, 1 + V, D].
            visible: Indices [B, V] of the visible patches, in the order of ``latent``.
            masked: Indices [B, N - V] of the masked patches.

        Returns:
            Prompts z' [B, 1 + V, d] and mask tokens x [B, N - V, d].
        """
        cls_position, positions = self.decoder_pos_embed.split([1, self.num_patches], dim=1)
        cls_position = cls_position.expand(len(latent), -1, -1)
        prompts = self.decoder_embed(latent)
        prompts = prompts + torch.cat([cls_position, gather_tokens(positions, visible)], dim=1)
        return prompts, self.mask_token + gather_tokens(positions, masked)

    def predict(self, tokens: Tensor) -> Tensor:
        """Norm and projection to the target: [B, 1 + N, d] -> [B, 1 + N, C]."""
        return self.decoder_pred(self.ln1(tokens))


class PromptingAttention(nn.Module):
    """Mask tokens attend to prompts and to each other (paper, eq. 2).

    Args:
        embed_dims: Width d.
        num_heads: Number of heads.
        project_prompts: Pass the prompts through the key and value projections too (published code);
            False appends them as they are (paper's eq. 2).
    """

    def __init__(self, embed_dims: int, num_heads: int, project_prompts: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project_prompts = project_prompts
        self.q = nn.Linear(embed_dims, embed_dims)
        self.kv = nn.Linear(embed_dims, 2 * embed_dims)
        self.proj = nn.Linear(embed_dims, embed_dims)

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        """x [B, M, d], prompts [B, P, d] -> [B, M, d]."""
        if self.project_prompts:
            keys_values = self.kv(torch.cat([prompts, x], dim=1))
        else:
            keys_values = torch.cat([prompts.repeat(1, 1, 2), self.kv(x)], dim=1)
        query, key, value = (
            t.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for t in (self.q(x), *keys_values.chunk(2, dim=2))
        )
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class PromptingBlock(BaseModule):
    """Transformer block that updates the mask tokens only (paper, figure 1b)."""

    def __init__(self, embed_dims: int, num_heads: int, feedforward_channels: int, project_prompts: bool) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(embed_dims, eps=NORM_CFG['eps'])
        self.attn = PromptingAttention(embed_dims, num_heads, project_prompts)
        self.ln2 = nn.LayerNorm(embed_dims, eps=NORM_CFG['eps'])
        self.ffn = FFN(embed_dims, feedforward_channels, act_cfg=dict(type='GELU'))

    def forward(self, x: Tensor, prompts: Tensor) -> Tensor:
        """x [B, M, d], prompts [B, P, d] -> [B, M, d]; the prompts are not normed (published code)."""
        x = x + self.attn(self.ln1(x), prompts)
        return self.ffn(self.ln2(x), identity=x)


@MODELS.register_module()
class PromptingDecoder(Decoder):
    """MILAN's decoder: the encoder's tokens are fixed prompts, only mask tokens are updated.

    "Fixed" means that no block changes them; gradients do flow through them into the encoder.

    Args:
        project_prompts: See :class:`PromptingAttention`.
        kwargs: The other arguments are those of :class:`Decoder`.
    """

    def __init__(self, *args, project_prompts: bool = True, **kwargs) -> None:
        self.project_prompts = project_prompts
        super().__init__(*args, **kwargs)

    def build_block(self, embed_dims: int, num_heads: int, feedforward_channels: int) -> nn.Module:
        return PromptingBlock(embed_dims, num_heads, feedforward_channels, self.project_prompts)

    def forward(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """latent [B, 1 + V, D], visible [B, V], masked [B, N - V] -> predictions [B, 1 + N, C]."""
        prompts, x = self.embed(latent, visible, masked)
        for block in self.decoder_blocks if masked.shape[1] else ():
            x = self.run_block(block, x, prompts)
        return self.predict(torch.cat([prompts, x], dim=1))

    def project(self, latent: Tensor) -> Tensor:
        """What is predicted of a whole image: its tokens are all prompts, which skip the blocks.

        Args:
            latent: The first T of the encoder's tokens of whole images [B, T, D]: class token, patches in image order.

        Returns:
            Predictions [B, T, C].
        """
        return self.predict(self.decoder_embed(latent) + self.decoder_pos_embed[:, : latent.shape[1]])


@MODELS.register_module()
class MAEDecoder(Decoder):
    """The vanilla decoder of MAE: self-attention among all tokens. Arguments of :class:`Decoder`."""

    def build_block(self, embed_dims: int, num_heads: int, feedforward_channels: int) -> nn.Module:
        return TransformerEncoderLayer(embed_dims, num_heads, feedforward_channels, norm_cfg=NORM_CFG)

    def forward(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """latent [B, 1 + V, D], visible [B, V], masked [B, N - V] -> predictions [B, 1 + N, C]."""
        tokens = torch.cat(self.embed(latent, visible, masked), dim=1)
        for block in self.decoder_blocks:
            tokens = self.run_block(block, tokens)
        return self.predict(tokens)


@MODELS.register_module()
class LinearProjection(BaseModule):
    """No decoder: the encoder's tokens are projected to the target (knowledge distillation, table 10).

    Only the class token and the visible patches are predicted, so only they enter the loss.

    Args:
        embed_dim: Width D of the encoder.
        predict_feature_dim: Width C of the target.
    """

    def __init__(self, embed_dim: int = 768, predict_feature_dim: int = 512, init_cfg: dict | None = None) -> None:
        super().__init__(init_cfg)
        self.embed_dim = embed_dim
        self.predict_feature_dim = predict_feature_dim
        self.decoder_pred = nn.Linear(embed_dim, predict_feature_dim)

    def init_weights(self) -> None:
        """Initialise as MAE does."""
        self.apply(init_linear)
        super().init_weights()

    def forward(self, latent: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
        """latent [B, 1 + V, D] -> predictions [B, 1 + V, C]; the indices are not needed."""
        return self.project(latent)

    def project(self, latent: Tensor) -> Tensor:
        """latent [B, T, D] -> predictions [B, T, C], see :meth:`PromptingDecoder.project`."""
        return self.decoder_pred(latent)
