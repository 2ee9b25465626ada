"""Convert checkpoints between layouts."""

from __future__ import annotations

import os
from typing import Literal

from mmmilan import arguments
from mmmilan.arguments import checked
from mmmilan.checkpoints import layouts
from mmmilan.checkpoints.io import check_values, get_state_dict, load_checkpoint_file, save_checkpoint_file, split_name
from mmmilan.checkpoints.zoo import resolve_checkpoint
from mmmilan.errors import InputError
from mmmilan.files import check_output


@checked
def convert(
    checkpoint: arguments.Path,
    out: arguments.Path,
    *,
    to: Literal['mmmilan', 'openmmlab', 'official', 'timm', 'huggingface'] = 'mmmilan',
    encoder_only: bool = False,
    allow_pickle: bool = False,
    overwrite: bool = False,
) -> None:
    """Convert a checkpoint between the layouts of mmmilan, OpenMMLab, the published repository, timm and Hugging Face.

    Args:
        checkpoint: file, folder of save_pretrained, URL, or name of a model of the zoo; its layout is recognised.
            FILE#NAME is one of several models in a file, such as dino.pth#teacher.
        out: file to write, .pth or .safetensors.
        to: layout to write.
        encoder_only: leave out decoder, head and detector parts.
        allow_pickle: read a pickle that can run any code while it is read; use it only for files that you trust.
        overwrite: replace the file if there is one.

    Raises:
        InputError: the file cannot be read or written, its layout is unknown, or the new layout has no place for some
            weights.
    """
    path = resolve_checkpoint(checkpoint)
    check_output(out, [split_name(path)[0]], endings=('.pth', '.pt', '.bin', '.safetensors'), overwrite=overwrite)
    out, content = os.fspath(out), load_checkpoint_file(path, allow_pickle)
    weights = get_state_dict(content, str(path))
    try:
        print(f'{path}: {layouts.detect_layout(weights)}')
        converted = layouts.convert(weights, to, encoder_only)
        check_values(converted, 'its weights')
    except InputError as error:
        raise InputError(f'{path}: {error}') from error
    if layouts.COLUMN[to] == layouts.COLUMN['mmmilan']:
        meta = content.get('meta')
        save_checkpoint_file({'state_dict': converted, 'meta': meta if isinstance(meta, dict) else {}}, out)
    else:
        save_checkpoint_file({'model': converted} if to == 'official' else converted, out)
    print(f'{out}: {len(converted)} weights in the layout of {layouts.TITLE[to]}')
