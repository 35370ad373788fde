"""Write a Megatron checkpoint, converted or of a training run, as a Hugging Face folder.

python conversion/mcore_to_hf.py --mcore DIR --out DIR
torchrun --nproc-per-node 4 conversion/mcore_to_hf.py --mcore DIR --out DIR --tensor 2 --pipeline 2
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
    parser = argparse.ArgumentParser(description="Megatron checkpoint -> Hugging Face folder.")
    parser.add_argument("--mcore", type=Path, required=True, help="checkpoint folder (tropd.json is in it)")
    parser.add_argument("--out", type=Path, required=True, help="new Hugging Face folder")
    parser.add_argument("--hf", type=Path, help="folder with config.json and tokenizer, if not in the checkpoint")
    parser.add_argument("--tensor", type=positive, default=1, help="tensor-parallel ranks to read with")
    parser.add_argument("--pipeline", type=positive, default=1, help="pipeline stages to read with")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="largest safetensors file, 10^9 bytes")
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto", help="where to work")
    arguments = parser.parse_args()
    from tropd_mcore.mcore.conversion import mcore_to_hf, open_job

    try:
        parallel = ParallelConfig(tensor=arguments.tensor, pipeline=arguments.pipeline)
        with open_job(parallel, arguments.platform, os.environ) as job:
            shard_bytes = int(arguments.max_shard_gb * 1e9)
            mcore_to_hf(arguments.mcore, arguments.out, job, hf_folder=arguments.hf, max_shard_bytes=shard_bytes)
            if job.layout.rank == 0:
                print(f"wrote {arguments.out}")
    except TropdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
