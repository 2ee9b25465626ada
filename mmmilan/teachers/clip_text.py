"""The text tower of a CLIP, from wherever its image tower comes."""

from __future__ import annotations

from torch import Tensor, nn

from mmmilan.checkpoints.io import check_values
from mmmilan.errors import InputError
from mmmilan.files import first_line
from mmmilan.teachers.clip_source import MISFITS, CLIPSource, find_source, text_sizes
from mmmilan.teachers.text_tower import TextTower

# The parts of a CLIP's state dict that are the text tower, where it has no prefix (OpenAI, most of open_clip).
_OWN = ('token_embedding.', 'positional_embedding', 'transformer.', 'ln_final.', 'text_projection')


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
    encoder, tokenize = build_text(source, sizes, path)
    kept = encoder.state_dict()
    try:  # transformers' towers no longer have their positions' numbers
        encoder.load_state_dict({key: value for key, value in own.items() if not is_dropped(key, kept)})
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


def build_text(source: CLIPSource, sizes: dict, path: str) -> tuple[nn.Module, object]:
    """A text tower with random weights, and its tokenizer."""
    import open_clip
    from open_clip.model import _build_text_tower
    from open_clip.tokenizer import SimpleTokenizer

    settings = sizes | (dict(hf_model_pretrained=False) if sizes.get('hf_model_name') else {})
    try:
        encoder = _build_text_tower(source.config['embed_dim'], settings, source.config.get('quick_gelu', False))
        if source.tokenizer is None:
            return encoder, SimpleTokenizer(context_length=encoder.context_length)
        return encoder, open_clip.get_tokenizer(source.tokenizer)
    except (*MISFITS, OSError, ImportError) as error:  # a tokenizer may be a file of the hub
        raise InputError(
            f'The text tower of {source.name} cannot be built ({first_line(error)}); correct the config beside the '
            'file, or choose a teacher with another text tower.'
        ) from error


def is_dropped(key: str, kept: dict[str, Tensor]) -> bool:
    return key.endswith('position_ids') and key not in kept
