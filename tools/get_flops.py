"""Parameters and FLOPs of a config: the command ``mmmilan get-flops`` for a checkout that is not installed."""

import sys

from mmmilan.cli import main

if __name__ == '__main__':
    main(['get-flops', *sys.argv[1:]])
