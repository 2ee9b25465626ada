"""Where a teacher's weights come from: a file, or the Hugging Face Hub under the name that the library gives."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from mmengine.logging import print_log
from torch import Tensor, nn

from mmmilan.checkpoints.io import get_state_dict, load_checkpoint_file
from mmmilan.errors import InputError

# Seconds to wait for the hub's first answer: long enough for a slow line, short enough to be told that there is none.
HUB_TIMEOUT = 5


def read_weights(path: str) -> dict[str, Tensor]:
    """State dict of a checkpoint file or of a TorchScript archive."""
    if not os.path.exists(path):
        raise InputError(f"The teacher's file {path} does not exist; correct pretrained=.")
    return get_state_dict(load_checkpoint_file(path), path)


def load_weights(module: nn.Module, weights: dict[str, Tensor], path: str) -> None:
    """Load weights, all of them and nothing else.

    Raises:
        InputError: they do not fit; the sentence has the first reason.
    """
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f'{path} does not fit this teacher: {" ".join(str(error).split())[:400]}') from error


def hub_file(repo: str, names: Sequence[str]) -> str:
    """The first of these files that a repository of the Hugging Face Hub has, from the cache or the network.

    Raises:
        InputError: the hub cannot be reached, has no such file, or asks for a licence to be accepted. The sentence says
            which file to put where.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    repo, _, revision = repo.partition('@')
    revision = revision or None
    for name in names:
        if isinstance(path := try_to_load_from_cache(repo, name, revision=revision), str):
            return path
    page = f'https://huggingface.co/{repo}'
    reason = f'it has none of {", ".join(names)}'
    for name in names:
        try:  # once and soon; hf_hub_download tries for a minute
            get_hf_file_metadata(hf_hub_url(repo, name, revision=revision), timeout=HUB_TIMEOUT)
            return hf_hub_download(repo, name, revision=revision)
        except EntryNotFoundError:
            continue
        except GatedRepoError:
            raise InputError(f'{page} is gated; accept its licence there and log in with `hf auth login`.') from None
        except Exception as error:  # of httpx, requests or the hub's own, by version
            reason = f'{type(error).__name__}: {str(error).strip().splitlines()[0][:200] if str(error).strip() else ""}'
            break
    raise InputError(
        f'{page} does not give the weights of the teacher ({reason}); download {names[0]} from there where there is a '
        'network, and give its path as pretrained=FILE.'
    )


def warn_random_weights(teacher: str) -> None:
    """Say that a teacher is not trained."""
    print_log(
        f'{teacher}: pretrained=None gives random weights; the target means nothing, measure speed only.',
        logger='current',
        level=logging.WARNING,
    )
