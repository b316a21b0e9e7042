"""`python -m irgrow` does what the command `irgrow` does."""

import sys

from irgrow.cli import main

if __name__ == "__main__":
    sys.exit(main())
