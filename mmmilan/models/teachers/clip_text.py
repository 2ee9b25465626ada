"""The text tower of a CLIP: of open_clip by name, or from a file alone."""

from __future__ import annotations

import os
from contextlib import suppress

from torch import Tensor, nn

from mmmilan.checkpoints.config import NoConfig, own_config
from mmmilan.checkpoints.open_clip_layout import is_maskclip, to_open_clip
from mmmilan.errors import InputError
from mmmilan.models.teachers.open_clip_zoo import find_config, published_file
from mmmilan.models.teachers.weights import read_weights
from mmmilan.models.text_tower import TextTower

# The parts of a CLIP's state dict that are the text tower, in the names of OpenAI and open_clip.
_OWN = ('token_embedding.', 'positional_embedding', 'transformer.', 'ln_final.', 'text_projection')
VOCABULARY = 49408  # of CLIP's tokenizer


class TextOfCLIP(nn.Module):
    """open_clip's model without its image tower."""

    def __init__(self, clip: nn.Module) -> None:
        super().__init__()
        del clip.visual
        self.clip = clip

    def forward(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens)


def load_text_tower(model: str | None, pretrained: str | None, head_width: int = 64) -> TextTower:
    """The text tower of what ``OpenCLIPTeacher`` takes, in evaluation mode.

    Args:
        model: Name of an open_clip model; None for a file alone.
        pretrained: Tag of open_clip or file: a checkpoint of :class:`MaskCLIP`, or a whole CLIP in OpenAI's layout.
        head_width: Width of the attention heads of a tower from a file alone, unless the file holds its config.

    Raises:
        InputError: the weights are not trained, or have no text tower.
    """
    if pretrained is None:
        raise InputError('The teacher has random weights, to which no text means anything; give it pretrained weights.')
    tower = read_text_tower(pretrained, head_width) if model is None else create_text_tower(model, pretrained)
    return tower.eval().requires_grad_(False)


def create_text_tower(model: str, pretrained: str) -> TextTower:
    """The text tower of an open_clip model; ``pretrained`` is a tag or a file."""
    import open_clip

    find_config(model, pretrained)  # raises for an unknown name
    path = pretrained if os.path.exists(pretrained) else published_file(model, pretrained)
    try:
        clip = open_clip.create_model(model, pretrained=path)
    except (RuntimeError, AssertionError) as error:  # weights that do not fit
        reason = ' '.join(str(error).split())[:200]
        raise InputError(f'{path} has no text tower of {model} ({reason}); give the whole CLIP.') from error
    return TextTower(TextOfCLIP(clip), open_clip.get_tokenizer(model), float(clip.logit_scale.exp()))


def read_text_tower(path: str, head_width: int) -> TextTower:
    """The text tower in a file alone, with the architecture read off the weights' shapes."""
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transformer import QuickGELU, TextTransformer

    weights = read_weights(path)
    of_maskclip = is_maskclip(weights)
    weights = to_open_clip(weights) if of_maskclip else weights
    own = {key: value.float() for key, value in weights.items() if key.startswith(_OWN)}
    if 'token_embedding.weight' not in own:
        raise InputError(f'{path} has no text tower; give a checkpoint of MaskCLIP or a whole CLIP.')
    vocabulary, width = own['token_embedding.weight'].shape
    if vocabulary != VOCABULARY:
        raise InputError(f"{path} knows {vocabulary} tokens and CLIP's tokenizer {VOCABULARY}; give a CLIP of English.")
    context_length, output_dim = len(own['positional_embedding']), own['text_projection'].shape[1]
    options = dict(
        context_length=context_length,
        width=width,
        heads=width // head_width,
        layers=len({key.split('.')[2] for key in own if key.startswith('transformer.resblocks.')}),
    )
    if of_maskclip:
        with suppress(NoConfig):  # the file holds no config
            options['heads'] = own_config(path).model.text.heads  # all else is in the shapes
    elif width % head_width:
        raise InputError(
            f'The text tower in {path} is {width} wide, no multiple of head_width={head_width}; correct it.'
        )
    activation = nn.GELU if of_maskclip else QuickGELU
    tower = TextTransformer(output_dim=output_dim, act_layer=activation, **options)
    try:
        tower.load_state_dict(own)
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:300]
        raise InputError(f'The text tower in {path} does not fit ({reason}); correct head_width.') from error
    return TextTower(tower, SimpleTokenizer(context_length=context_length), float(weights['logit_scale'].exp()))
