"""Where a teacher's weights come from: a file, a folder, or the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file
from mmmilan.errors import InputError, warn
from mmmilan.files import extension

# Before a repository of the Hugging Face Hub and before a folder, as timm and open_clip have it.
HUB, LOCAL = 'hf-hub:', 'local-dir:'
# Seconds to wait for the hub's first answer: long enough for a slow line, short enough to be told that there is none.
HUB_TIMEOUT = 5
# How a user gives a file of weights: on the command line and in a config.
AS_FILE = '--teacher MODEL:FILE (pretrained=FILE in a config)'


def read_weights(path: str) -> dict[str, Tensor]:
    """State dict of a checkpoint file or of a TorchScript archive."""
    if not os.path.exists(path):
        raise InputError(f"The teacher's file {path} does not exist; correct --teacher (pretrained= in a config).")
    return get_state_dict(load_checkpoint_file(path), path)


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Load weights, all of them and nothing else.

    Raises:
        InputError: they do not fit; the sentence has the first reason.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = ' '.join(str(error).split())[:400]
        raise InputError(f'{path} does not fit this teacher ({reason}); correct model= or pretrained=.') from error


def local_folder(model: str) -> Path:
    """The folder that ``local-dir:FOLDER`` names.

    Raises:
        InputError: it does not exist.
    """
    folder = Path(model.removeprefix(LOCAL)).expanduser()
    if not folder.is_dir():
        raise InputError(f"The teacher's folder {folder} does not exist; correct its path.")
    return folder


def weights_in(folder: Path, names: Sequence[str]) -> str:
    """The file of weights in a folder: the first of the usual names, else the only one.

    Raises:
        InputError: there is none, or there are several under other names.
    """
    for name in names:
        if (folder / name).is_file():
            return str(folder / name)
    found = sorted(path for path in folder.iterdir() if extension(path) in ('.safetensors', '.bin', '.pth', '.pt'))
    if len(found) != 1:
        what = f'several files of weights ({", ".join(path.name for path in found)})' if found else 'no file of weights'
        raise InputError(f'{folder} has {what}; give one as {AS_FILE}, or name it {names[0]}.')
    return str(found[0])


def hub_file(repo: str, names: Sequence[str]) -> str:
    """The first of these files that a repository of the Hugging Face Hub has, from the cache or the network.

    Raises:
        InputError: the hub cannot be reached, has no such file, or asks for a licence to be accepted. The sentence says
            which file to put where.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repo, _, revision = repo.partition('@')
    revision = revision or None
    for name in names:
        if isinstance(path := try_to_load_from_cache(repo, name, revision=revision), str):
            return path
    for name in names:
        if hub_has(repo, name, revision, names):
            return hf_hub_download(repo, name, revision=revision)
    raise InputError(f'{page_of(repo)} has none of the files {", ".join(names)}; give the weights as {AS_FILE}.')


def hub_has(repo: str, name: str, revision: str | None, names: Sequence[str]) -> bool:
    """Ask the hub once whether it has a file; ``hf_hub_download`` itself tries for a minute before it gives up."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    try:
        url = hf_hub_url(repo, name, revision=revision)
        hf_raise_for_status(get_session().head(url, headers=build_hf_headers(), timeout=HUB_TIMEOUT))
        return True
    except EntryNotFoundError:
        return False
    except GatedRepoError:
        raise InputError(
            f'{page_of(repo)} is gated; accept its licence there and run `hf auth login`, or download {names[0]} and '
            f'give its path as {AS_FILE}.'
        ) from None
    except Exception as error:  # of the hub, or of requests or httpx under it
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else type(error).__name__
        raise InputError(
            f'{page_of(repo)} does not answer ({status}); download {names[0]} from there on a machine with a network '
            f'and give its path as {AS_FILE}.'
        ) from error


def page_of(repo: str) -> str:
    """The address of a repository of the hub."""
    from huggingface_hub.constants import ENDPOINT

    return f'{ENDPOINT}/{repo}'


def warn_random_weights(teacher: str) -> None:
    """Say that a teacher is not trained."""
    warn(f'{teacher}: pretrained=None gives random weights; the target means nothing, measure speed only.')
