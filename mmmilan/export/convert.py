"""Convert checkpoints between layouts."""

from __future__ import annotations

from typing import Literal

from mmmilan.checkpoints.io import check_values, get_state_dict, load_checkpoint_file, save_checkpoint_file
from mmmilan.checkpoints.layouts import COLUMN, TITLE, convert, detect_layout
from mmmilan.checkpoints.zoo import resolve_checkpoint
from mmmilan.errors import InputError
from mmmilan.files import check_output


def convert_checkpoint(
    src: str,
    dst: str,
    *,
    to: Literal['mmmilan', 'openmmlab', 'official', 'timm', 'huggingface'] = 'mmmilan',
    encoder_only: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint between the layouts of mmmilan, OpenMMLab, the published repository, timm and Hugging Face.

    Args:
        src: file, URL, or name of a model of the zoo; its layout is recognised.
        dst: file to write, .pth or .safetensors.
        to: layout to write.
        encoder_only: leave out decoder, head and detector parts.
        allow_pickle: read a pickle that can run any code while it is read; use it only for files that you trust.
        overwrite: replace the file if there is one.

    Raises:
        InputError: the file cannot be read or written, its layout is unknown, or the new layout has no place for some
            weights.
    """
    path = resolve_checkpoint(src)
    check_output(dst, [path], endings=('.pth', '.pt', '.bin', '.safetensors'), overwrite=overwrite)
    checkpoint = load_checkpoint_file(path, allow_pickle)
    weights = get_state_dict(checkpoint, str(path))
    try:
        print(f'{path}: {detect_layout(weights)}')
        converted = convert(weights, to, encoder_only)
        check_values(converted, 'its weights')
    except InputError as error:
        raise InputError(f'{path}: {error}') from error
    if COLUMN[to] == COLUMN['mmmilan']:
        meta = checkpoint.get('meta')
        save_checkpoint_file({'state_dict': converted, 'meta': meta if isinstance(meta, dict) else {}}, dst)
    else:
        save_checkpoint_file({'model': converted} if to == 'official' else converted, dst)
    print(f'{dst}: {len(converted)} weights in the layout of {TITLE[to]}')
