"""PyTorch's torchrun with the same arguments, which ends with what went wrong and not with a trace of its own."""

from __future__ import annotations

import logging
import socket
import sys

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


def main(argv: list[str] | None = None) -> None:
    """Start the processes and wait for them."""
    args = get_args_parser().parse_args(argv)
    if args.nnodes == '1':
        check_port(args.master_addr, args.master_port)
    logging.getLogger('torch.distributed.elastic').setLevel(logging.CRITICAL)  # each process that was ended
    try:
        run(args)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.message.startswith('error: '):
            sys.exit(failure.message)
        sys.exit(f'error: process {failure.local_rank} ended with status {failure.exitcode}; its own output says why.')


if __name__ == '__main__':
    with exit_on_input_error():
        main()
