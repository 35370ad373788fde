"""`python -m tropd_mcore`: the command `tropd`, where its script is not on the PATH."""

import sys

from tropd_mcore.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
