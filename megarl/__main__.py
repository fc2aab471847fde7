"""`python -m megarl` is the command `megarl`; the launcher starts ranks this way."""

import sys

from megarl.cli import main

if __name__ == "__main__":
    sys.exit(main())
