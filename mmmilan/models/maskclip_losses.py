"""MaskCLIP's losses beside the contrastive one: self-distillation at masked patches, masked language modelling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from mmengine.model import BaseModule
from torch import Tensor, nn

from mmmilan.errors import InputError
from mmmilan.models.targets import Target
from mmmilan.models.wrapping import MeanTeacher
from mmmilan.registry import MODELS
from mmmilan.teachers import Teacher


class DistillationTarget(Target):
    """Base of MaskCLIP's heads.

    Args:
        feature_dim: Width C of the teacher's features: the encoder's own with a mean teacher.
        teacher: Config or name of a frozen teacher; None for the mean teacher of MaskCLIP.
    """

    def __init__(
        self, feature_dim: int, teacher: dict | str | Teacher | None = None, init_cfg: dict | None = None
    ) -> None:
        super().__init__(teacher, init_cfg)
        self.feature_dim = feature_dim
        self.statistics: dict[str, Tensor] = {}  # of the last batch in training, for the log

    def loss_tokens(self, num_visible: int) -> slice:
        return slice(1 + num_visible, None)


@MODELS.register_module()
class CodewordTarget(DistillationTarget):
    """Cross-entropy between soft assignments to codewords, made by an online tokenizer (MaskCLIP, arXiv 2208.12262).

    The tokenizer is a linear layer; on the teacher's side stands its exponential moving average. All numbers are those
    of iBOT's patch tokens (arXiv 2111.07832), as is what keeps the codewords in use: the mean of the teacher's logits
    is subtracted from them, and its temperature rises. After each batch in training, ``statistics`` has the number of
    codewords that are some token's best (``codewords``) and the entropy of the mean assignment in nats, at most ln K
    (``codeword_entropy``).

    Args:
        feature_dim: See :class:`DistillationTarget`.
        num_codewords: Size K of the vocabulary.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits; the smaller, the harder its assignments.
        first_teacher_temperature: The teacher's temperature at the first batch in training.
        warmup_steps: Batches in training until it is ``teacher_temperature``; it rises linearly. iBOT warms up for
            30 of 800 epochs.
        center_momentum: Momentum of the mean of the teacher's logits; None for no centering.
        teacher: See :class:`DistillationTarget`.
    """

    def __init__(
        self,
        feature_dim: int = 768,
        num_codewords: int = 8192,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        first_teacher_temperature: float = 0.04,
        warmup_steps: int = 0,
        center_momentum: float | None = 0.9,
        teacher: dict | str | Teacher | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(feature_dim, teacher, init_cfg)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.first_teacher_temperature = first_teacher_temperature
        self.warmup_steps = warmup_steps
        self.center_momentum = center_momentum
        self.tokenizer = nn.Linear(feature_dim, num_codewords)
        self.mean_tokenizer = MeanTeacher(self.tokenizer)
        self.register_buffer('center', torch.zeros(num_codewords))
        self.register_buffer('steps', torch.zeros(()))

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        logits = self.mean_tokenizer(target).float()
        assignment = ((logits - self.center) / self.current_temperature()).softmax(-1)
        if self.training:
            self.advance(logits, assignment)
        log_assignment = (self.tokenizer(pred).float() / self.student_temperature).log_softmax(-1)
        return -(assignment * log_assignment).sum(-1)

    def current_temperature(self) -> Tensor:
        """The teacher's temperature at this step, a scalar."""
        progress = (self.steps / self.warmup_steps).clamp(max=1) if self.warmup_steps else 1
        return self.first_teacher_temperature + progress * (self.teacher_temperature - self.first_teacher_temperature)

    @torch.no_grad()
    def advance(self, logits: Tensor, assignment: Tensor) -> None:
        """Count the step, move the center and measure the use of codewords, by one batch [..., K] on all processes."""
        logits, assignment = logits.flatten(0, -2), assignment.flatten(0, -2)
        used = torch.zeros_like(self.center).index_fill_(0, assignment.argmax(-1), 1)
        means = torch.stack([logits.mean(0), assignment.mean(0), used])
        all_reduce(means, op='mean')
        mean_logits, mean_assignment, used = means
        self.steps += 1
        if self.center_momentum is not None:
            self.center.lerp_(mean_logits, 1 - self.center_momentum)
        self.statistics = dict(
            codewords=(used > 0).float().sum(), codeword_entropy=torch.special.entr(mean_assignment).sum()
        )


@MODELS.register_module()
class FeatureTarget(DistillationTarget):
    """Mean squared error of the features (an ablation of MaskCLIP). Arguments of :class:`DistillationTarget`."""

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred.float() - target.float()).square().mean(-1)


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
