"""The exception for errors that a user can fix, how the tools print it, and Ctrl-C: one line, exit status 130.

And the words that messages share: numbers of things, lists of names, values, warnings.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

INTERRUPTED = 128 + signal.SIGINT  # exit status, as shells give it
UNFINISHED: set[str] = set()  # the temporary files and folders of this process
NAMES = 5  # in a list of names, at most
_command = 0  # the process that runs a command


def count(number: int, thing: str) -> str:
    """A number of things in words: '1 epoch', '2 epochs', '3 classes'."""
    plural = 'es' if thing.endswith('s') else 's'
    return f'{number} {thing}{plural * (number != 1)}'


def listed(names: Iterable[str | os.PathLike], most: int = NAMES) -> str:
    """Some names for a message, with the number of the others."""
    names = list(map(os.fspath, names))
    rest = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + rest


def warn(message: str) -> None:
    """Log a warning."""
    from mmengine.logging import print_log  # imports PyTorch

    print_log(message, logger='current', level=logging.WARNING)


def printable(text: str) -> str:
    r"""A text for the terminal and the log: bytes of a file name that are not UTF-8, and escape codes, as ``\x1b``."""
    if text.isprintable():
        return text
    return ''.join(c if c.isprintable() or c in '\n\t' else ascii(c)[1:-1] for c in text)


class InputError(ValueError):
    """An error that a user can fix: a wrong file, key or option.

    The message is one sentence, ``cause; remedy.``, that names the file, key or option. The tools print it without a
    stack trace. Control characters of names are escaped, so that a file cannot write to the terminal.
    """

    def __init__(self, message: object = '') -> None:
        message = str(message).strip()
        if message.startswith('Caught ') and '\n' in message:  # PyTorch puts the trace of a data worker before it
            message = message.rpartition('\n')[2].partition(': ')[2]
        super().__init__(printable(message).replace('\n', '\\n'))


class CorruptImageError(InputError):
    """An image that cannot be used: one of many is skipped, named and counted."""


@contextmanager
def exit_on_input_error() -> Iterator[None]:
    """End the program with the message of an ``InputError`` raised in this context, and exit status 1.

    An error of the operating system, such as a full disk or a folder that may not be read, ends it in one sentence as
    well, and Ctrl-C as :func:`end_at_interrupt` describes. A process that torchrun started sends the message to
    torchrun, which prints one message for all processes, see ``mmmilan.torchrun``.
    """
    end_at_interrupt()
    logging.raiseExceptions = False  # on a full disk each line of the log would print a stack trace
    try:
        yield
    except (InputError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno is None:  # a library's own
                raise
            error = from_system(error)
        message = f'error: {error}'
        sys.exit(1 if send_to_torchrun(message) else message)


def from_system(error: OSError) -> InputError:
    """An error of the operating system as one that a user can fix."""
    where = f' ({os.fsdecode(error.filename)})' if error.filename else ''
    return InputError(
        f'The system refused an access to a file: {error.strerror}{where}; check the path, its permissions and the '
        'free space.'
    )


def send_to_torchrun(message: str) -> bool:
    """Send a message to torchrun; False if torchrun did not start this process."""
    file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    if file:
        with open(file, 'w', encoding='utf-8') as stream:
            json.dump(dict(message=message, timestamp=int(time.time())), stream)
    return bool(file)


def shown(value: Any) -> str:
    """A value in a message, cut to 60 characters."""
    text = f'<{type(value).__name__}>' if hasattr(value, 'dtype') else ' '.join(repr(value).split())
    return text if len(text) <= 60 else f'{text[:57]}...'


def end_at_interrupt() -> None:
    """From now on end this command at once when it gets SIGINT.

    A KeyboardInterrupt would be printed, swallowed or turned into another error wherever it happens to be raised: in an
    import, in a callback of a library, in a data worker. Where the shell ignores SIGINT, so does the command.
    """
    global _command
    is_main_thread = threading.current_thread() is threading.main_thread()
    if is_main_thread and signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _end):
        _command = os.getpid()
        signal.signal(signal.SIGINT, _end)


def set_handlers(handlers: dict[int, Any]) -> None:
    """Set the handlers of signals; in a thread other than the main one, where Python allows none, they stay.

    So does one that stands for another language's, which Python gives as None.
    """
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)


def is_command() -> bool:
    """Whether this process was started as one of the project's commands, not as a user's program that imports it."""
    options = iter(sys.orig_argv[1:])
    for option in options:  # Python's own, before the program and its arguments
        if re.fullmatch('-[a-zA-Z]*m', option):
            return next(options, '').startswith('mmmilan.')
        if option in ('-W', '-X'):
            next(options, None)
        elif option == '-c' or not option.startswith('-'):
            break
    file = getattr(sys.modules['__main__'], '__file__', None)
    if not file:  # python -c, a notebook
        return False
    script = os.path.realpath(file)
    tools = os.path.realpath(os.path.join(os.path.dirname(__file__), '.mim', 'tools'))
    return script.startswith(os.path.join(tools, '')) or os.path.basename(script) == 'mmmilan'


def _end(number: int, frame: FrameType | None) -> None:
    if os.getpid() == _command:  # a forked data worker ends without a word
        remove_unfinished()
        with suppress(Exception):
            end_children()
        with suppress(Exception):  # the signal may have come while it was written
            sys.stdout.flush()
        with suppress(OSError):  # on a terminal: below the progress bar, which had hidden the cursor
            os.write(2, b'\n\x1b[?25hinterrupted\n' if os.isatty(2) else b'interrupted\n')
    os._exit(INTERRUPTED)


def end_children() -> None:
    """Send SIGTERM to all processes that this one has started."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.terminate()


def remove_unfinished() -> None:
    """Remove the temporary files and folders of this process."""
    for path in list(UNFINISHED):
        shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            os.unlink(path)
