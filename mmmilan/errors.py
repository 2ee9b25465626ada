"""The exception for errors that a user can fix, and how the tools print it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def printable(text: str) -> str:
    r"""A text for the terminal and the log: bytes of a file name that are not UTF-8, and escape codes, as ``\x1b``."""
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() or c in '\n\t' else ascii(c)[1:-1] for c in text)


class InputError(ValueError):
    """An error that a user can fix: a wrong file, key or option.

    The message is one sentence, ``cause; remedy.``, that names the file, key or option. The tools print it without a
    stack trace.
    """

    def __init__(self, message: object = '') -> None:
        super().__init__(printable(str(message)))


class CorruptImageError(InputError):
    """An image that cannot be used: one of many is skipped, named and counted."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """End the program with the message of an ``InputError`` raised in this context, and exit status 1.

    A process that torchrun started sends the message to torchrun, which prints one message for all processes, see
    ``mmmilan.torchrun``.
    """
    try:
        yield
    except InputError as error:
        message = str(error)
        if message.startswith('Caught '):  # PyTorch puts the stack trace of a data worker before its message
            message = message.rpartition('Error: ')[2]
        message = f'error: {message.strip()}'
        sys.exit(1 if send_to_torchrun(message) else message)


def send_to_torchrun(message: str) -> bool:
    """Send a message to torchrun; False if torchrun did not start this process."""
    file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if file:
        with open(file, 'w', encoding='utf-8') as stream:
            json.dump(dict(message=message, timestamp=int(time.time())), stream)
    return bool(file)
