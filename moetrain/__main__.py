"""`python -m moetrain`, which is what torchrun starts: the same as the command `moetrain`."""

import sys

from moetrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
