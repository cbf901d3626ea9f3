"""`python -m minigemma` is the command `minigemma`."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
