"""What MaskCLIP distils at masked patches: soft assignments to codewords, or the features themselves."""

from __future__ import annotations

import torch
from mmengine.dist import all_reduce
from torch import Tensor, nn

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
