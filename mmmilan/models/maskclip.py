"""MaskCLIP: contrastive language-image pretraining with masked self-distillation (arXiv 2208.12262)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from mmengine.dist import get_rank, get_world_size
from mmengine.model import BaseModel
from mmpretrain.structures import DataSample
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

from mmmilan.errors import InputError
from mmmilan.models.fitting import check_parts
from mmmilan.models.maskclip_losses import DistillationTarget
from mmmilan.models.masking import split_patches
from mmmilan.models.vit import gather_tokens
from mmmilan.models.wrapping import MeanTeacher
from mmmilan.registry import MODELS, TRANSFORMS
from mmmilan.teachers.base import TextTower, statistics_of

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
MAX_LOGIT_SCALE = math.log(100)


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020) over the batches of all processes.

    Each process has the loss of its own rows; its mean over processes, and so DistributedDataParallel's gradient, is
    that of one process with the whole batch.

    Args:
        image: Embeddings [B, E] of length 1, float32.
        text: Embeddings [B, E] of length 1, float32, of the captions in the order of the images.
        scale: Inverse temperature, a scalar.

    Returns:
        A scalar, float32.
    """
    all_image, all_text = image, text
    if get_world_size() > 1:
        all_image, all_text = torch.cat(all_gather(image)), torch.cat(all_gather(text))
    label = torch.arange(len(image), device=image.device) + get_rank() * len(image)
    with torch.autocast(image.device.type, enabled=False):  # logits up to 100 lose too much in 16 bits
        to_text, to_image = scale * image @ all_text.T, scale * text @ all_image.T
    return (F.cross_entropy(to_text, label) + F.cross_entropy(to_image, label)) / 2


@MODELS.register_module()
class MaskCLIP(BaseModel):
    """A CLIP that also learns from masked patches and masked words. With both weights zero it is CLIP.

    A masked image goes through the image encoder and a decoder, which predicts the tokens that a mean teacher gives
    the whole image (:class:`MeanTeacher`, moved by ``MeanTeacherHook``); see :class:`CodewordTarget` for the loss.
    Parts of weight zero are not built. ``configs/maskclip/README.md`` says where each number of the recipe is from.

    Args:
        backbone: Config of the image encoder, a :class:`MILANViT`; its class token is projected to the joint space.
        text: Arguments of open_clip's ``TextTransformer``, the text encoder.
        embed_dim: Width E of the joint space.
        masking: Config of the masking of images, as for :class:`MILAN`.
        neck: Config of the decoder, as for :class:`MILAN`.
        head: Config of a :class:`CodewordTarget` or :class:`FeatureTarget`, which may bring a frozen teacher to be
            distilled in place of the mean teacher; or of a :class:`PixelTarget` (CLIP + MAE).
        language: Config of a :class:`MaskedLanguageModel`, without width and vocabulary.
        distillation_weight: Weight of the masked self-distillation.
        language_weight: Weight of the masked language modelling.
        data_preprocessor: Config of the normalisation of images.

    Raises:
        InputError: if a part is missing or does not fit another.
    """

    compiled_parts = ('encode_image', 'encode_text', 'distil', 'language.decode')  # by CompileHook
    has_joint_space = True  # texts can be compared with images

    def __init__(
        self,
        backbone: dict,
        text: dict,
        embed_dim: int = 512,
        masking: dict | None = None,
        neck: dict | None = None,
        head: dict | None = None,
        language: dict | None = None,
        distillation_weight: float = 0.05,
        language_weight: float = 0.05,
        data_preprocessor: dict | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        from open_clip.transformer import TextTransformer

        super().__init__(data_preprocessor, init_cfg)
        self.distillation_weight = distillation_weight
        self.language_weight = language_weight
        self.backbone = MODELS.build(backbone)
        self.image_projection = nn.Linear(self.backbone.embed_dims, embed_dim, bias=False)
        self.text_cfg = dict(text)
        self.text = TextTransformer(output_dim=embed_dim, **text)
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        if distillation_weight:
            self.masking = TRANSFORMS.build(require_cfg(masking, 'masking', 'distillation_weight'))
            self.neck = MODELS.build(require_cfg(neck, 'neck', 'distillation_weight'))
            self.head = MODELS.build(require_cfg(head, 'head', 'distillation_weight'))
            learns_from_itself = isinstance(self.head, DistillationTarget) and self.head.teacher is None
            self.mean_teacher = MeanTeacher(self.backbone) if learns_from_itself else None
            target_dim = self.head.feature_dim
            if isinstance(self.head, DistillationTarget):
                target_dim = self.backbone.embed_dims if learns_from_itself else self.head.teacher.feature_dim
            check_parts(self.backbone, self.masking, self.neck, self.head, target_dim)
            self.head.take_images(*statistics_of(data_preprocessor))
        if language_weight:
            sizes = dict(width=self.text.width, vocab_size=self.text.vocab_size)
            self.language = MODELS.build(require_cfg(language, 'language', 'language_weight'), default_args=sizes)

    def init_weights(self) -> None:
        """Initialise all parts; mean teachers start as their students."""
        super().init_weights()
        nn.init.normal_(self.image_projection.weight, std=self.backbone.embed_dims**-0.5)
        for module in self.modules():
            if isinstance(module, MeanTeacher):
                module.update(momentum=0)

    def forward(
        self, inputs: Tensor, data_samples: list[DataSample] | None = None, mode: str = 'tensor'
    ) -> dict[str, Tensor] | list[DataSample] | Tensor:
        """MMEngine's entry: 'loss' trains, 'predict' gives embeddings by image, 'tensor' those of images [B, E]."""
        if mode == 'loss':
            return self.loss(inputs, data_samples)
        if mode == 'predict':
            return self.predict(inputs, data_samples)
        return self.encode_image(inputs)

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Features of whole images [B, 3, H, W] before the projection, as the backbone's ``out_type`` asks."""
        return self.backbone(inputs)

    def encode_image(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] -> embeddings [B, E] of length 1, float32."""
        return self.project_joint(self.encode_tokens(self.backbone, images)[:, :1])[:, 0]

    def embed_joint(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> embeddings [B, 1 + N, E] of image and patches, of length 1, float32."""
        return self.project_joint(self.encode_tokens(self.backbone, images))

    def project_joint(self, tokens: Tensor) -> Tensor:
        """The encoder's tokens [B, T, D] -> embeddings [B, T, E] of length 1, float32."""
        return F.normalize(self.image_projection(tokens).float(), dim=-1)

    def text_tower(self) -> TextTower:
        """The text encoder with its tokenizer."""
        from open_clip.tokenizer import SimpleTokenizer

        tokenize = SimpleTokenizer(context_length=self.text.context_length)
        return TextTower(self.text, tokenize, float(self.logit_scale.exp()))

    def encode_text(self, text: Tensor) -> Tensor:
        """Token ids [B, L] -> embeddings [B, E] of length 1, float32."""
        if text.shape[1] != self.text.context_length:
            raise InputError(
                f'The texts have {text.shape[1]} tokens and model.text.context_length={self.text.context_length}; give '
                'TokenizeCaption the same.'
            )
        return F.normalize(self.text(text).float(), dim=-1)

    def encode_tokens(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """All tokens [B, 1 + N, D] of whole images, after the final norm, whatever the encoder's ``out_type``."""
        all_patches = torch.arange(self.backbone.num_patches, device=images.device).expand(len(images), -1)
        return encoder(images, all_patches)

    def loss(self, inputs: Tensor, data_samples: list[DataSample]) -> dict[str, Tensor]:
        """Weighted losses of normalised images [B, 3, H, W] and their ``data_sample.text`` [L], token ids, int64."""
        if any('text' not in sample for sample in data_samples):
            raise InputError("An image has no text; add TokenizeCaption, and PackInputs' algorithm_keys=('text',).")
        self.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
        text = torch.stack([sample.text for sample in data_samples])
        scale = self.logit_scale.exp()
        losses = dict(loss_contrastive=contrastive_loss(self.encode_image(inputs), self.encode_text(text), scale))
        if self.distillation_weight:
            losses['loss_distillation'] = self.distillation_weight * self.distil(inputs)
            losses |= getattr(self.head, 'statistics', {})
        if self.language_weight:
            num_words = [sample.get('num_words') for sample in data_samples]
            num_words = None if None in num_words else torch.tensor(num_words)
            losses['loss_language'] = self.language_weight * self.language(text, self.text, num_words)
        return losses | dict(temperature=1 / scale.detach())

    def distil(self, images: Tensor) -> Tensor:
        """Masked self-distillation: the loss of the masked patches of images [B, 3, H, W], a scalar."""
        if self.mean_teacher is None:
            features, importance = self.head.run_teacher(images)  # [B, 1+N, C], [B, N]
        else:
            features, importance = self.encode_tokens(self.mean_teacher, images), None
        target = self.head.target(images, features)  # [B, 1+N, C]: the features themselves, or pixels
        num_patches = self.backbone.num_patches
        mask = self.masking.draw(importance, (len(images), num_patches), images.device)
        visible, masked = split_patches(mask, self.masking.num_visible(num_patches))  # [B, V], [B, N-V]

        pred = self.neck(self.backbone(images, visible), visible, masked)  # [B, 1+N, C]
        pred = pred[:, self.head.loss_tokens(visible.shape[1])]  # of the masked patches [B, N-V, C]
        return self.head.token_loss(pred, gather_tokens(target[:, 1:], masked)).mean()

    @torch.no_grad()
    def predict(self, inputs: Tensor, data_samples: list[DataSample] | None = None) -> list[DataSample]:
        """Set on each data sample ``image_embedding`` [E] and, where it has ``text`` [L] or [T, L],
        ``text_embedding`` [T, E]."""
        data_samples = data_samples or [DataSample() for _ in inputs]
        for sample, embedding in zip(data_samples, self.encode_image(inputs), strict=True):
            sample.set_field(embedding, 'image_embedding')
        described = [sample for sample in data_samples if 'text' in sample]
        if described:
            texts = [sample.text.view(-1, sample.text.shape[-1]) for sample in described]
            embeddings = self.encode_text(torch.cat(texts)).split([len(text) for text in texts])
            for sample, embedding in zip(described, embeddings, strict=True):
                sample.set_field(embedding, 'text_embedding')
        return data_samples


def require_cfg(cfg: dict | None, name: str, weight: str) -> dict:
    """The config of a part that a weight asks for."""
    if cfg is None:
        raise InputError(f'MaskCLIP has no {name}; give its config, or set {weight}=0.')
    return cfg
