"""Masked language modelling on a CLIP's text tower (MaskCLIP, section 3; BERT, arXiv 1810.04805)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmmilan.errors import InputError
from mmmilan.registry import MODELS

# What BERT puts in the place of a masked word: the mask token, a random word, or the word itself.
SHARE_MASK_TOKEN, SHARE_RANDOM_WORD = 0.8, 0.1


@MODELS.register_module()
class MaskedLanguageModel(BaseModule):
    """Mask words, run the text tower on the rest, and predict the masked words with a decoder of its own.

    The decoder is a bidirectional transformer, which the causal text tower is not. Its depth and its form are
    defaults of this project.

    Args:
        width: Width of the text tower.
        vocab_size: Number of tokens, of which the last two are the start and the end of a text (open_clip).
        mask_ratio: Share of the words that is masked, in each text at least one.
        decoder_depth: Number of blocks.
        decoder_num_heads: Attention heads of each block.
    """

    def __init__(
        self,
        width: int,
        vocab_size: int,
        mask_ratio: float = 0.2,
        decoder_depth: int = 1,
        decoder_num_heads: int = 8,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if not 0 < mask_ratio <= 1:
            raise InputError(f'mask_ratio={mask_ratio} of the language model; choose 0 < mask_ratio <= 1.')
        self.mask_ratio = mask_ratio
        self.num_words = vocab_size - 2
        self.mask_token = nn.Parameter(torch.zeros(width))
        block = nn.TransformerEncoderLayer(
            width, decoder_num_heads, 4 * width, dropout=0.0, activation='gelu', batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.decoder_blocks = nn.TransformerEncoder(block, decoder_depth, norm, enable_nested_tensor=False)
        self.decoder_pred = nn.Linear(width, vocab_size)

    def init_weights(self) -> None:
        """The mask token as small as open_clip's word embeddings."""
        super().init_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, text: Tensor, tower: nn.Module, num_words: Tensor | None = None) -> Tensor:
        """Cross-entropy, the mean over the masked words of all processes.

        Args:
            text: Token ids [B, L], int64: start, words, end, padding.
            tower: open_clip's ``TextTransformer``.
            num_words: Number of words of each text [B], int64, on the CPU; by default asked of the device, which has
                then to be waited for.

        Returns:
            The loss, a scalar, float32; 0 for texts without words.
        """
        masked = self.draw(text)
        known = num_words is not None
        total = int(torch.minimum(self.num_masked(num_words), num_words).sum() if known else masked.sum())
        places = masked.flatten().byte().argsort(descending=True, stable=True)[:total]  # masked words, in order
        words = self.decode(*self.corrupt(text, masked), tower).flatten(0, 1)[places]
        loss = F.cross_entropy(self.decoder_pred(words).float(), text.flatten()[places], reduction='sum')
        num_masked = masked.sum().float()
        all_reduce(num_masked, op='mean')  # the words of all processes count the same, whichever has more of them
        return loss / num_masked.clamp(min=torch.finfo(num_masked.dtype).tiny)

    def draw(self, text: Tensor) -> Tensor:
        """The masked words, bool [B, L]: ``mask_ratio`` of the words of each text, at random."""
        words = is_word(text)
        rank = torch.rand(text.shape, device=text.device).masked_fill(~words, 2).argsort(1).argsort(1)
        return words & (rank < self.num_masked(words.sum(1, keepdim=True)))

    def num_masked(self, num_words: Tensor) -> Tensor:
        """How many words are to be masked in texts of so many, if they have as many."""
        return (self.mask_ratio * num_words).round().clamp(min=1)

    def corrupt(self, text: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Texts [B, L] with random words at some masked places, and where the mask token stands, bool [B, L]."""
        share = torch.rand(text.shape, device=text.device)
        hidden = masked & (share < SHARE_MASK_TOKEN)
        replaced = masked & ~hidden & (share < SHARE_MASK_TOKEN + SHARE_RANDOM_WORD)
        return torch.where(replaced, torch.randint_like(text, self.num_words), text), hidden

    def decode(self, text: Tensor, hidden: Tensor, tower: nn.Module) -> Tensor:
        """Text tower and decoder: [B, L], mask token where ``hidden`` -> [B, L, width]."""
        words = tower.token_embedding(text)
        x = torch.where(hidden[..., None], self.mask_token.to(words.dtype), words) + tower.positional_embedding
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))
        return self.decoder_blocks(x, src_key_padding_mask=is_padding(text))


def is_padding(text: Tensor) -> Tensor:
    """Where a text [B, L] has ended; the end token has the largest id (open_clip)."""
    return torch.arange(text.shape[1], device=text.device) > text.argmax(1, keepdim=True)


def is_word(text: Tensor) -> Tensor:
    """Where a text [B, L] has words, and not its start, its end or padding."""
    place = torch.arange(text.shape[1], device=text.device)
    return (place > 0) & (place < text.argmax(1, keepdim=True))


def count_words(text: Tensor) -> Tensor:
    """Number of words of each text [B, L]: [B], int64."""
    return (text.argmax(1) - 1).clamp(min=0)
