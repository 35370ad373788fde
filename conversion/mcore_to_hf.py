"""Convert a Megatron checkpoint (also of a training run) to a Hugging Face folder.

python conversion/mcore_to_hf.py --mcore DIR --out DIR
torchrun --nproc-per-node 4 conversion/mcore_to_hf.py --mcore DIR --out DIR --tensor 2 --pipeline 2

The same as `tropd convert mcore-to-hf`; --help lists the arguments.
"""

import sys

from tropd_mcore.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "mcore-to-hf", *sys.argv[1:]]))
