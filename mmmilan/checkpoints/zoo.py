"""The models of the metafiles, with published weights or without, read from ``model-index.yml``."""

from __future__ import annotations

import difflib
import functools
import os
from dataclasses import dataclass
from pathlib import Path

from mmmilan.errors import InputError, warn
from mmmilan.files import extension

# Ends of the names of version 0.1 -> today's, which state the batch, the precision and the augmentation as the names of
# MMDetection and MMSegmentation do.
OLD_ENDINGS = {
    '-pre_1x_coco': '-pre_8xb2-amp-lsj-1x_coco',
    '-pre_lsj-25e_coco': '-pre_32xb2-amp-lsj-25e_coco',
    '-pre_lsj-100e_coco': '-pre_32xb2-amp-lsj-100e_coco',
    '-pre_160k_ade20k-512x512': '-pre_8xb2-amp-160k_ade20k-512x512',
}


@dataclass(frozen=True)
class ZooModel:
    """An entry of a metafile.

    Attributes:
        name: name for ``get_model``.
        config: path of its config file.
        weights: URL of the checkpoint; None if it is not published.
        sha256: full hash of the checkpoint, if the metafile has it.
        collection: name of the method, such as 'MILAN'.
    """

    name: str
    config: Path
    weights: str | None
    sha256: str | None
    collection: str | None = None


def zoo_root() -> Path:
    """The folder of ``model-index.yml``, ``configs`` and ``tools``; in a checkout it holds symbolic links."""
    return Path(__file__).parents[1] / '.mim'


@functools.lru_cache
def zoo_models() -> dict[str, ZooModel]:
    """Every model of the zoo by its name."""
    import yaml

    root = zoo_root()
    models = {}
    for metafile in yaml.safe_load((root / 'model-index.yml').read_text())['Import']:
        for entry in yaml.safe_load((root / metafile).read_text())['Models']:
            sha256 = entry['Metadata'].get('SHA256')
            models[entry['Name']] = ZooModel(
                entry['Name'], root / entry['Config'], entry.get('Weights'), sha256, entry.get('In Collection')
            )
    return models


@functools.cache
def current_name(name: str) -> str:
    """Today's name of a config or a model; the log says once that an old one was meant."""

    old = next((ending for ending in OLD_ENDINGS if name.endswith(ending)), None)
    if old is None or (new := name.removesuffix(old) + OLD_ENDINGS[old]) not in zoo_models():
        return name
    warn(f'{name} is now called {new}; use that name.')
    return new


def current_file(path: str | os.PathLike) -> str | os.PathLike:
    """The path of a config file, by its old name too; a path that leads to no file as it is."""
    if os.path.isfile(path):
        return path
    new = Path(path).with_name(current_name(Path(path).stem) + Path(path).suffix)
    return new if new.is_file() else path


def find_config(config: str | os.PathLike) -> Path:
    """The file of a config: itself, or one of the package by its path (``configs/…``) or by its name alone.

    What is neither stays as it is, such as a checkpoint or a path that leads to no file.
    """
    from mmengine.logging import print_log

    path = Path(current_file(config))
    if path.exists() or extension(path) not in ('', '.py'):
        return path
    if path.name != str(path):
        found = Path(current_file(zoo_root() / path))
    else:
        name = current_name(path.stem)
        found = next((file for file in zoo_root().glob('configs/**/*.py') if file.stem == name), path)
    if not found.is_file():
        return path
    print_log(f'{config}: {found}, from the package.', logger='current')
    return found


def find_model(name: str) -> ZooModel:
    """The model of this name.

    Raises:
        InputError: the zoo has no such model.
    """
    name = current_name(name)
    if name not in zoo_models():
        raise InputError(f'The zoo has no model {name!r}; {nearest_names(name)}.')
    return zoo_models()[name]


def nearest_names(name: str) -> str:
    """Which names of the zoo somebody may have meant, as the end of a sentence."""
    nearest = difflib.get_close_matches(name, zoo_models(), n=3) or [*zoo_models()][:1]
    return f'choose one of mmmilan.list_models(), such as {" or ".join(nearest)}'


def resolve_checkpoint(checkpoint: str | os.PathLike) -> Path:
    """The local file of a checkpoint.

    Args:
        checkpoint: A file or a folder of ``save_pretrained``; a URL; or the name of a config; each with ``#NAME`` for
            one of several models in it. The name of a config stands for the run of that config in
            ``work_dirs/NAME`` if there is one, which must be finished; else for the published file, which is
            downloaded. The log says which.

    Raises:
        InputError: there is no such checkpoint, its run is not finished, or its download failed.
    """
    from mmengine.logging import print_log

    from mmmilan.checkpoints.download import download
    from mmmilan.checkpoints.io import find_newest, weights_of_folder

    text = os.fspath(checkpoint)
    path = Path(text.removeprefix('file://')).expanduser()
    if path.is_file() or weights_of_folder(path):
        return path
    name, separator, model = text.rpartition('#')
    if separator and name:
        return Path(f'{resolve_checkpoint(name)}#{model}')
    if text.startswith(('http://', 'https://')):
        return download(text)
    folder = Path('work_dirs', text)
    newest = find_newest(folder)
    if not newest and current_name(text) != text:
        return resolve_checkpoint(current_name(text))
    model = zoo_models().get(text)
    if newest:
        progress = unfinished(newest)
        if progress:
            published = f'give {model.weights} for the published file' if model and model.weights else f'give {newest}'
            raise InputError(
                f'{text} is the run in {folder}, which is not finished ({progress}); finish it with --resume, or '
                f'{published}.'
            )
        print_log(f'{text}: {newest}, the end of your own run.', logger='current')
        return newest
    if model and model.weights:
        print_log(f'{text}: the published file, as there is no run in {folder}.', logger='current')
        return download(model.weights, model.sha256)
    if model:
        raise InputError(f'No weights of {text} have been published and {folder} has none; train it, or give a file.')
    raise InputError(
        f'{text} is neither a file nor a URL nor a model of the zoo, and {folder} has no checkpoint; '
        f'{nearest_names(text)}.'
    )


def unfinished(path: Path) -> str | None:
    """How far the run of a checkpoint is, such as 'epoch 3 of 400'; None if it is finished, or does not say its end."""
    from mmmilan.checkpoints.archives import read_meta
    from mmmilan.checkpoints.config import parse_config

    meta = read_meta(path)
    if not isinstance(meta.get('cfg'), str):
        return None
    loop = parse_config(meta['cfg'], f'the config in {path}').get('train_cfg') or {}
    unit, end = ('epoch', loop['max_epochs']) if 'max_epochs' in loop else ('iteration', loop.get('max_iters'))
    done = meta.get('epoch' if unit == 'epoch' else 'iter')
    return f'{unit} {done} of {end}' if isinstance(done, int) and isinstance(end, int) and done < end else None
