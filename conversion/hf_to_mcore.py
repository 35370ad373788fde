"""Convert a Hugging Face folder to a Megatron checkpoint (`torch_dist`) that loads at any parallel layout.

python conversion/hf_to_mcore.py --hf DIR --out DIR
torchrun --nproc-per-node 4 conversion/hf_to_mcore.py --hf DIR --out DIR --tensor 2 --pipeline 2

The same as `tropd convert hf-to-mcore`; --help lists the arguments.
"""

import sys

from tropd_mcore.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["convert", "hf-to-mcore", *sys.argv[1:]]))
