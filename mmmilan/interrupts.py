"""Ctrl-C is a normal end of a command: one line, exit status 130, and nothing unfinished is left."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

INTERRUPTED = 128 + signal.SIGINT  # exit status, as shells give it
UNFINISHED: set[str] = set()  # the temporary files and folders of this process

_command = 0  # the process that runs a command


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


def is_command() -> bool:
    """Whether this process was started as one of the project's commands, not as a user's program that imports it."""
    arguments = sys.orig_argv
    if '-m' in arguments:
        return arguments[arguments.index('-m') + 1].startswith('mmmilan.')
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
