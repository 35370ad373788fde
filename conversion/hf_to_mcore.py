"""Convert a Hugging Face folder to a Megatron checkpoint (`torch_dist`) that loads at any layout.

python conversion/hf_to_mcore.py --hf DIR --out DIR
torchrun --nproc-per-node 4 conversion/hf_to_mcore.py --hf DIR --out DIR --tensor 2 --pipeline 2
"""

import argparse
import os
import sys
from pathlib import Path

from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.errors import TropdError


def positive(text: str) -> int:
    """A positive number of ranks."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, found {text!r}")
    return int(text)


def main() -> int:
    """Parse the arguments and convert; the exit code is 0, or 2 for an error that the user can act upon."""
    parser = argparse.ArgumentParser(description="Hugging Face folder -> Megatron checkpoint.")
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder (qwen3, qwen2 or llama)")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    parser.add_argument("--tensor", type=positive, default=1, help="tensor-parallel ranks")
    parser.add_argument("--pipeline", type=positive, default=1, help="pipeline stages")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="round to this dtype (default: as stored)")
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto", help="where to work")
    arguments = parser.parse_args()
    from tropd_mcore.mcore.conversion import hf_to_mcore, open_job

    try:
        parallel = ParallelConfig(tensor=arguments.tensor, pipeline=arguments.pipeline)
        with open_job(parallel, arguments.platform, os.environ) as job:
            hf_to_mcore(arguments.hf, arguments.out, job, dtype=arguments.dtype)
            if job.layout.rank == 0:
                print(f"wrote {arguments.out}")
    except TropdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
