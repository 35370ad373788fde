"""Compare a Hugging Face folder with a Megatron checkpoint or with another folder; exit code 1 if they differ.

python conversion/verify.py --hf DIR --mcore DIR
python conversion/verify.py --hf DIR --other-hf DIR

The same as `tropd convert verify`; --help lists the arguments.
"""

import sys

from tropd_mcore.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "verify", *sys.argv[1:]]))
