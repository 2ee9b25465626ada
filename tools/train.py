"""Train from a config: the command ``mmmilan train`` for a checkout that is not installed."""

import sys

from mmmilan.cli import main

if __name__ == '__main__':
    main(['train', *sys.argv[1:]])
