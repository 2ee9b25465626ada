"""PyTorch's torchrun with the same arguments, for runs that are stopped without loss and say what went wrong.

It ends with the message of the process that went wrong and not with a trace of its own. A signal to it goes on to the
processes, for as long as they need to save: torchrun itself would end them after 30 s, and itself at once at SIGUSR1.
Where they say that they can go on (:data:`mmmilan.engine.stopping.GO_ON`), so does its exit status.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, run

from mmmilan.errors import InputError, exit_on_input_error


def check_port(address: str, port: int) -> None:
    """Check that the processes can meet at a port of this machine.

    Raises:
        InputError: another program has it.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise InputError(
                f'The port {port} cannot be used ({error.strerror}); choose another one: PORT={port + 1} bash ...'
            ) from error


def forward(number: int, frame: FrameType | None) -> None:
    """Send a signal on to the processes."""
    for process in psutil.Process().children():
        process.send_signal(number)


def main(argv: list[str] | None = None) -> None:
    """Start the processes and wait for them."""
    args = get_args_parser().parse_args(argv)
    if args.nnodes == '1':
        check_port(args.master_addr, args.master_port)
    args.signals_to_handle = 'SIGHUP,SIGQUIT'  # torchrun's own handling; the others go on
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, forward)
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)  # each process that was ended
    try:
        run(args)
    except ChildFailedError as error:
        if os.EX_TEMPFAIL in [failure.exitcode for failure in error.failures.values()]:
            sys.exit(os.EX_TEMPFAIL)
        _, failure = error.get_first_failure()
        if failure.message.startswith('error: '):
            sys.exit(failure.message)
        how = f'status {failure.exitcode}' if failure.exitcode >= 0 else signal.Signals(-failure.exitcode).name
        sys.exit(f'error: process {failure.local_rank} ended with {how}; its own output says why.')


if __name__ == '__main__':
    with exit_on_input_error():
        main()
