"""Evaluate a checkpoint with a config: the command ``mmmilan test`` for a checkout that is not installed."""

import sys

from mmmilan.cli import main

if __name__ == '__main__':
    main(['test', *sys.argv[1:]])
