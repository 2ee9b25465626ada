"""Convert a checkpoint between layouts: the command ``mmmilan convert`` for a checkout that is not installed."""

import sys

from mmmilan.cli import main

if __name__ == '__main__':
    main(['convert', *sys.argv[1:]])
