"""Frozen teachers: image -> target features of every token, and the importance of every patch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn

from mmmilan.checkpoints.config import gives_rgb
from mmmilan.errors import InputError, warn
from mmmilan.teachers.importance import TextImportance, check_text_options

# The student's images are normalised by ImageNet's statistics, unless its data preprocessor says otherwise.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Tower(nn.Module):
    """The part of a teacher that runs images: the model of a library.

    Attributes:
        feature_dim: Width C of the features.
        width: Width D of the tokens inside.
        depth: Number of blocks.
        patch_size: Side of a patch in pixels.
        input_size: Height and width of the images that it takes.
        mean: Mean of the images it was trained on, for each channel, of RGB in [0, 1].
        std: Their standard deviation.
        importance_is: What the importance is, in words, for the log.
        gives_values: Whether it can give the values of patches.
        weigh: What makes importance [B, N] of the attention [B, N] and of the patches' values [B, N, C] in the last
            attention, see :meth:`Teacher.weigh_by_texts`; None: the attention is the importance.
        load_text: Builds the text tower that shares the space of the features; None where there is none.
    """

    feature_dim: int
    width: int
    depth: int
    patch_size: int
    input_size: tuple[int, int]
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    importance_is: str
    gives_values: bool = False
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None
    load_text: Callable[[], TextTower] | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.input_size[0] // self.patch_size, self.input_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return math.prod(self.grid)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, *input_size] -> features [B, 1 + N, C] and importance [B, N], float32."""
        raise NotImplementedError

    def forward_layers(self, images: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """Images -> tokens [B, 1 + N, D] after each of the blocks ``layers`` (from 0), and importance [B, N]."""
        raise InputError('This teacher does not give the tokens of its layers; choose another.')

    def activations(self) -> Sequence[nn.Module]:
        """The activation of each block's MLP, for test-time registers."""
        raise InputError('This teacher has no place for a test-time register; leave register_neurons out.')


class Teacher(nn.Module):
    """Base of the teachers. A new one is a :class:`Tower` and a subclass that builds it, see docs/teachers.md.

    Args:
        tower: What runs the images.
        grid_size: Rows and columns of patches of the student (a number: both). Features and importance are
            interpolated to them. None leaves the teacher's own grid; ``input_size`` is the better way to the student's.
        teacher_mean_std: 'own' normalises the images as the teacher was trained; None feeds it the student's tensor as
            it is, with the student's normalisation (published code).
        weight_dtype: 'bfloat16' holds the weights of linear layers and convolutions in half the memory and runs the
            teacher in bfloat16. Where training is in bfloat16 this changes no bit of the result. 'float16' runs all of
            the teacher in float16 on a GPU, its norms and residual stream too: faster, and nearer to float32.
        importance: ``dict(texts=[...], temperature=0.02, with_attention=False)`` makes the importance the likeness of
            each patch to the nearest of these texts, see :class:`TextImportance`. None: the teacher's attention.

    Attributes:
        feature_dim: Width C of the target.
        width: Width D of the tokens inside.
        depth: Number of blocks.
        patch_size: Side of a patch in pixels.
        input_size: Height and width of the image that the teacher sees; others are resized to it.
        grid: Rows and columns of patches in the result.

    Raises:
        InputError: an option has no such value, or importance is by texts and the teacher has no text tower or does not
            give the values of its patches.
    """

    def __init__(
        self,
        tower: Tower,
        grid_size: int | tuple[int, int] | None = None,
        teacher_mean_std: str | None = 'own',
        weight_dtype: str | None = None,
        importance: dict | None = None,
    ) -> None:
        super().__init__()
        if teacher_mean_std not in (None, 'own'):
            raise InputError(f"teacher_mean_std={teacher_mean_std!r} is unknown; choose 'own' or None.")
        if weight_dtype not in (None, 'bfloat16', 'float16'):
            raise InputError(f"weight_dtype={weight_dtype!r} is unknown; choose 'float16', 'bfloat16' or None.")
        self.tower = tower
        self.feature_dim, self.width, self.depth = tower.feature_dim, tower.width, tower.depth
        self.patch_size, self.input_size = tower.patch_size, tower.input_size
        self.grid = pair(grid_size) if grid_size else tower.grid
        self.teacher_mean_std = teacher_mean_std
        self.take_images(IMAGENET_MEAN, IMAGENET_STD)
        self.weight_dtype = weight_dtype
        self.in_float16 = False
        if importance is not None:
            self.weigh_by_texts(importance)
        if weight_dtype == 'bfloat16':
            hold_in_bfloat16(tower)
        print_log(f'Teacher: {self.describe()}', logger='current')
        self.warn_of_other_pixels()

    @property
    def num_patches(self) -> int:
        """Number N of patches."""
        return math.prod(self.grid)

    def describe(self) -> str:
        """One line for the log: size, grid, features, and what the importance is."""
        (height, width), (rows, columns) = self.input_size, self.tower.grid
        resized = '' if self.grid == self.tower.grid else f', interpolated to {self.grid[0]} x {self.grid[1]}'
        return (
            f'{rows} x {columns} patches of {self.patch_size} pixels at {height} x {width}{resized}; features of '
            f'{self.feature_dim} dimensions; importance: {self.tower.importance_is}; images normalised as '
        ) + ('those it was trained on.' if self.teacher_mean_std else "the student's.")

    def warn_of_other_pixels(self) -> None:
        """Warn of pixels far from the teacher's own, which a config may inherit: CLIP's are near ImageNet's."""
        ratios = [own / given for own, given in zip(self.tower.std, IMAGENET_STD, strict=True)]
        if self.teacher_mean_std is None and not all(2 / 3 < ratio < 3 / 2 for ratio in ratios):
            warn(
                f'The teacher was trained on images of mean {tuple(self.tower.mean)} and std {tuple(self.tower.std)}, '
                "and teacher_mean_std=None gives it the student's; set teacher_mean_std='own'."
            )

    def take_images(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Let images come normalised by these statistics from now on; at first they are ImageNet's.

        Args:
            mean: Of each channel, of RGB in [0, 1].
            std: Likewise.
        """
        given, own = (*mean, *std), (*self.tower.mean, *self.tower.std)
        same = all(math.isclose(*pair, rel_tol=1e-5) for pair in zip(given, own, strict=True))
        as_given = self.teacher_mean_std is None or same
        renormalise = nn.Identity() if as_given else Renormalise(mean, std, self.tower.mean, self.tower.std)
        self.renormalise = renormalise.train(self.training)

    def _apply(self, fn: Callable, recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)
        if self.weight_dtype == 'float16' and next(self.parameters()).is_cuda:
            self.run_in_float16()
        return self

    def run_in_float16(self) -> None:
        """Hold the whole tower in float16: weights, norms, positions, and so its residual stream."""
        self.in_float16 = True
        self.tower.half()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] -> features [B, 1 + N, C] of all tokens and importance [B, N], float32."""
        with self.precision(images):
            features, importance = self.tower(self.prepare(images))
        return self.on_grid(self.widen(features)), self.importance_on_grid(importance)

    @torch.no_grad()
    def forward_layers(self, images: Tensor, layers: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """The tokens of several layers, before the last norm.

        Args:
            images: [B, 3, H, W], as for ``forward``.
            layers: Indices of blocks; 0 is the first, -1 the last.

        Returns:
            The tokens [B, 1 + N, D] after each of these blocks (first the class token, or where there is none the mean
            of the patches), and importance [B, N].

        Raises:
            InputError: there is no such block.
        """
        depth = self.depth
        if not all(-depth <= layer < depth for layer in layers):
            raise InputError(f'The teacher has blocks 0 to {depth - 1}, not all of {list(layers)}; choose among them.')
        with self.precision(images):
            tokens, importance = self.tower.forward_layers(self.prepare(images), [layer % depth for layer in layers])
        return [self.on_grid(self.widen(x)) for x in tokens], self.importance_on_grid(importance)

    def weigh_by_texts(self, options: dict) -> None:
        """Let the importance be :class:`TextImportance` with these options; the texts are embedded once, here.

        The values [B, N, C] that are compared with the texts are what each patch alone gives in the teacher's last
        attention: its value, projected as features are, with no other patch, no residual and no MLP (MaskCLIP, arXiv
        2112.01071, section 3.3).
        """
        texts, temperature, with_attention = check_text_options(**options)
        if not self.tower.gives_values:
            raise InputError(
                "This teacher does not give the values of its patches; choose open_clip's own ViT (CLIP, MetaCLIP) or "
                'one with a pooling query (SigLIP, PE).'
            )
        self.by_texts = TextImportance(self.text_tower()(texts), temperature, with_attention)
        self.tower.weigh = self.by_texts.forward  # a method and no module: float16 weights leave texts in float32
        attention = f', times {self.tower.importance_is}' if with_attention else ''
        self.tower.importance_is = f'likeness of patches to {", ".join(map(repr, texts))}{attention}'

    def text_tower(self) -> TextTower:
        """The text tower that shares the space of the features, built anew.

        Raises:
            InputError: this teacher has no text tower.
        """
        if self.tower.load_text is None:
            raise InputError(f'{type(self).__name__} has no text tower; for texts, train with an OpenCLIPTeacher.')
        return self.tower.load_text()

    def precision(self, images: Tensor) -> torch.autocast | nullcontext:
        """Autocast to bfloat16 where the weights are held in it, and none where all is in float16."""
        if self.weight_dtype == 'bfloat16':
            return torch.autocast(images.device.type, torch.bfloat16)
        return torch.autocast(images.device.type, enabled=False) if self.in_float16 else nullcontext()

    def prepare(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] at the teacher's size, and normalised as it asks."""
        if images.shape[-2:] != self.input_size:
            images = F.interpolate(images, self.input_size, mode='bicubic', antialias=True, align_corners=False)
        images = self.renormalise(images)
        return images.half() if self.in_float16 else images

    def widen(self, tokens: Tensor) -> Tensor:
        """Tokens in float32 where the teacher is in float16; under autocast they are as it makes them."""
        return tokens.float() if self.in_float16 else tokens

    def on_grid(self, tokens: Tensor) -> Tensor:
        """Tokens [B, 1 + M, C] of the teacher's grid -> [B, 1 + N, C] of the student's, interpolated linearly."""
        if self.grid == self.tower.grid:
            return tokens
        return torch.cat([tokens[:, :1], resize_map(tokens[:, 1:], self.tower.grid, self.grid)], dim=1)

    def importance_on_grid(self, importance: Tensor) -> Tensor:
        """Importance [B, M] of the teacher's grid -> [B, N] of the student's, with the same sum but for the borders."""
        if self.grid == self.tower.grid:
            return importance
        resized = resize_map(importance[..., None], self.tower.grid, self.grid)[..., 0]
        return resized * (self.tower.num_patches / self.num_patches)


def statistics_of(preprocessor: dict | None) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std of images in [0, 1] by the config of a data preprocessor; ImageNet's where it has none.

    The log says if the teacher, which is given the same images, may see them in BGR.

    Raises:
        InputError: they are not three numbers each.
    """
    if not isinstance(preprocessor, dict) or not preprocessor.get('mean') or not preprocessor.get('std'):
        return IMAGENET_MEAN, IMAGENET_STD
    if not gives_rgb(preprocessor):
        warn('model.data_preprocessor has no to_rgb: the teacher sees BGR images, unless the pipeline gives RGB ones.')
    mean, std = check_statistics(preprocessor['mean'], preprocessor['std'], 'model.data_preprocessor')
    return [x / 255 for x in mean], [x / 255 for x in std]


def check_statistics(mean: Any, std: Any, source: str, largest: float = 255) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of three channels, of values from 0 to ``largest``, as floats.

    Raises:
        InputError: they are not three numbers each, out of range, or a deviation is not positive.
    """
    try:
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError):
        mean = std = ()
    if not (len(mean) == len(std) == 3 and all(map(math.isfinite, mean)) and all(0 < x < math.inf for x in std)):
        raise InputError(f'The mean and std in {source} are not three numbers each; correct them.')
    if max(*mean, *std) > largest:
        raise InputError(f'The mean and std in {source} are not of values from 0 to {largest}; correct them.')
    return mean, std


class Renormalise(nn.Module):
    """Images normalised by some statistics -> normalised by others.

    Args:
        mean: Mean of each channel that was subtracted.
        std: Standard deviation of each channel that was divided by.
        own_mean: The other mean.
        own_std: The other standard deviation.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], own_mean: Sequence[float], own_std: Sequence[float]
    ) -> None:
        super().__init__()
        mean, std, own_mean, own_std = (torch.tensor(tuple(x)) for x in (mean, std, own_mean, own_std))
        self.register_buffer('scale', (std / own_std)[:, None, None])
        self.register_buffer('shift', ((mean - own_mean) / own_std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return images * self.scale.to(images.dtype) + self.shift.to(images.dtype)


def hold_in_bfloat16(tower: nn.Module) -> None:
    """Hold what autocast would convert to bfloat16 at every use in bfloat16; norms, tokens, positions stay float32."""
    for module in tower.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            module.to(torch.bfloat16)


def resize_map(tokens: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Patch tokens [B, M, C] of one grid -> [B, N, C] of another, interpolated linearly."""
    maps = tokens.transpose(1, 2).unflatten(2, grid)
    maps = F.interpolate(maps, new_grid, mode='bilinear', antialias=True, align_corners=False)
    return maps.flatten(2).transpose(1, 2)


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    """A side, or height and width -> height and width."""
    return (size, size) if isinstance(size, int) else tuple(size)


def check_input_size(input_size: tuple[int, int], patch_size: int) -> None:
    """Raise an :class:`InputError` with the nearest right sizes where patches do not fill the image."""
    for side in input_size:
        if side % patch_size:
            below = side // patch_size * patch_size
            raise InputError(
                f"The teacher's input_size={side} is not a multiple of its patch size {patch_size}; "
                f'choose {below} or {below + patch_size}.'
            )


class TextTower(nn.Module):
    """Texts -> embeddings [T, C] of length 1, float32.

    Args:
        encoder: Token ids [T, L], int64 -> embeddings [T, C].
        tokenize: Texts -> token ids [T, L].
        scale: What the CLIP multiplies cosines with before the softmax over texts (its inverse temperature).
    """

    def __init__(self, encoder: nn.Module, tokenize: Callable[[list[str]], Tensor], scale: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenize = tokenize
        self.scale = scale

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [T, C], on the device of the tower."""
        tokens = self.tokenize(list(texts)).to(next(self.parameters()).device)
        return F.normalize(self.encoder(tokens).float(), dim=-1)
