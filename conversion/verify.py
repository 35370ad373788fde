"""Compare a Hugging Face folder with a Megatron checkpoint and/or with another folder, and say what differs.

    python conversion/verify.py --hf DIR --mcore DIR --other-hf DIR

Tensors must have the same names and bytes; log-probs, computed in float32 by transformers and by the Megatron model,
may differ by 1e-4 nats. Exit code 0 if all checks pass, 1 if one misses, 2 if something cannot be read.
"""

import argparse
import os
import sys
from pathlib import Path

from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.errors import TropdError


def main() -> int:
    """Parse the arguments, compare, print the table."""
    parser = argparse.ArgumentParser(description="Compare a Hugging Face folder with a converted model.")
    parser.add_argument("--hf", type=Path, required=True, help="the original Hugging Face folder")
    parser.add_argument("--mcore", type=Path, help="checkpoint to compare with it")
    parser.add_argument("--other-hf", type=Path, help="Hugging Face folder to compare with it")
    parser.add_argument("--seed", type=int, default=0, help="of the random token ids")
    parser.add_argument("--platform", choices=["auto", "cpu", "cuda"], default="auto", help="where Megatron runs")
    arguments = parser.parse_args()
    if arguments.mcore is None and arguments.other_hf is None:
        parser.error("nothing to compare with: give --mcore, --other-hf or both")
    from tropd_mcore.mcore.conversion import open_job
    from tropd_mcore.mcore.verification import table, verify

    try:
        with open_job(ParallelConfig(), arguments.platform, os.environ) as job:
            checks = verify(arguments.hf, job, mcore=arguments.mcore, other_hf=arguments.other_hf, seed=arguments.seed)
    except TropdError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(checks))
    return 0 if all(check.passed for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
