"""PyTorch's torchrun with the same arguments, for runs that stop without loss and say what went wrong.

* When a process fails, it ends with the message of that process in place of a stack trace of its own.
* It forwards signals to the processes and lets them save for as long as they need. PyTorch's torchrun kills them after
  30 s, and itself dies of SIGUSR1.
* If processes end with the status "can be resumed" (``os.EX_TEMPFAIL``) and none fails, so does torchrun.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from mmmilan.errors import InputError, exit_on_input_error, set_handlers

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def check_port(address: str, port: int) -> None:
    """Check that the processes can use a port of this machine as their meeting point.

    Raises:
        InputError: another program uses the port, or it is not allowed.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise InputError(
                f'The port {port} cannot be used ({error.strerror}); choose another one: PORT={port + 1} bash ...'
            ) from error


@contextmanager
def forwarding() -> Iterator[None]:
    """Within this context, signals are forwarded to the processes; afterwards they mean what they meant before."""
    # torchrun has handlers of its own for the last two, and leaves them behind
    numbers = (*FORWARDED, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in numbers}
    set_handlers(dict.fromkeys(FORWARDED, forward_signal))
    try:
        yield
    finally:
        set_handlers(before)


def forward_signal(number: int, frame: FrameType | None) -> None:
    """Forward a signal to the processes."""
    for process in psutil.Process().children():
        process.send_signal(number)


def main(argv: list[str] | None = None) -> None:
    """Start the processes and wait for them."""
    args = get_args_parser().parse_args(argv)
    if args.nnodes == '1':
        check_port(args.master_addr, args.master_port)
    args.signals_to_handle = 'SIGHUP,SIGQUIT'  # torchrun kills the processes on these; the others are forwarded
    # torchrun logs an error for each process that it ends
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)
    try:
        with forwarding():
            run(args)
    except ChildFailedError as error:
        failures = error.failures.values()
        # a process that torchrun ends because another one failed may save and exit with the same status
        failed = [each for each in failures if each.exitcode not in (os.EX_TEMPFAIL, -signal.SIGTERM)]
        if not failed and os.EX_TEMPFAIL in [each.exitcode for each in failures]:
            sys.exit(os.EX_TEMPFAIL)
        failure = min(failed or failures, key=lambda each: each.timestamp)
        if failure.message.startswith('error: '):
            sys.exit(failure.message)
        how = f'status {failure.exitcode}' if failure.exitcode >= 0 else signal.Signals(-failure.exitcode).name
        sys.exit(f'error: process {failure.local_rank} ended with {how}; its own output says why.')


if __name__ == '__main__':
    with exit_on_input_error():
        main()
