"""What MaskCLIP distils at masked patches: soft assignments to codewords, or the features themselves."""

from __future__ import annotations

from torch import Tensor, nn

from mmmilan.models.mean_teacher import MeanTeacher
from mmmilan.models.targets.base import Target
from mmmilan.models.teachers import Teacher
from mmmilan.registry import MODELS


class DistillationTarget(Target):
    """Base of MaskCLIP's heads.

    Args:
        feature_dim: Width C of the teacher's features: the encoder's own with a mean teacher.
        teacher: Config of a frozen teacher; None for the mean teacher of MaskCLIP.
    """

    def __init__(self, feature_dim: int, teacher: dict | Teacher | None = None, init_cfg: dict | None = None) -> None:
        super().__init__(teacher, init_cfg)
        self.feature_dim = feature_dim

    def loss_tokens(self, num_visible: int) -> slice:
        return slice(1 + num_visible, None)


@MODELS.register_module()
class CodewordTarget(DistillationTarget):
    """Cross-entropy between soft assignments to codewords, made by an online tokenizer (MaskCLIP, section 3).

    The tokenizer is a linear layer; on the teacher's side stands its exponential moving average. The number of
    codewords and the temperatures are defaults of this project, those of iBOT (arXiv 2111.07832).

    Args:
        feature_dim: See :class:`DistillationTarget`.
        num_codewords: Size K of the vocabulary.
        student_temperature: Divides the student's logits.
        teacher_temperature: Divides the teacher's logits; the smaller, the harder its assignments.
        teacher: See :class:`DistillationTarget`.
    """

    def __init__(
        self,
        feature_dim: int = 768,
        num_codewords: int = 8192,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        teacher: dict | Teacher | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(feature_dim, teacher, init_cfg)
        self.student_temperature = student_temperature
        self.teacher_temperature = teacher_temperature
        self.tokenizer = nn.Linear(feature_dim, num_codewords)
        self.mean_tokenizer = MeanTeacher(self.tokenizer)

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        assignment = (self.mean_tokenizer(target).float() / self.teacher_temperature).softmax(-1)
        log_assignment = (self.tokenizer(pred).float() / self.student_temperature).log_softmax(-1)
        return -(assignment * log_assignment).sum(-1)


@MODELS.register_module()
class FeatureTarget(DistillationTarget):
    """Mean squared error of the features (an ablation of MaskCLIP). Arguments of :class:`DistillationTarget`."""

    def token_loss(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred.float() - target.float()).square().mean(-1)
