"""What torchrun runs on every rank: `python -m tropd_mcore.train CONFIG.yaml [key=value ...] [--dry-run]`.

Exit codes: 0 done, 2 an error that the user can act upon (one line each on stderr), anything else a bug.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings

from tropd_mcore.config.loader import load
from tropd_mcore.config.plan import plan
from tropd_mcore.errors import TropdError

ECHO_DELAY_S = 30.0
"""Longer than rank 0 needs to stop its servers and end with the message."""


def main(arguments: list[str] | None = None) -> int:
    """Train what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tropd_mcore.train", description="Train one configuration.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, for example optimizer.learning_rate=1e-5")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and touch nothing")
    options = parser.parse_intermixed_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    try:
        config, sources = load(options.config, options.overrides)
        if options.dry_run:
            world_size = os.environ.get("WORLD_SIZE")
            if rank == 0:
                print(plan(config, int(world_size) if world_size else None), end="")
            return 0
        _configure_logging(rank)
        from tropd_mcore.mcore.parallel import RankEnvironment
        from tropd_mcore.train.job import run_job

        run_job(config, sources, RankEnvironment.from_environ())
    except TropdError as error:
        if rank != 0:
            # Most errors are met by all ranks. The launcher ends this one as soon as rank 0 has told of it.
            time.sleep(ECHO_DELAY_S)
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _configure_logging(rank: int) -> None:
    """Rank 0 tells what it does; the other ranks only what is wrong."""
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(levelname).1s %(message)s"
        if rank == 0
        else f"%(asctime)s %(levelname).1s rank {rank}: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for noisy in ("megatron", "httpx", "transformers", "torch"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Megatron and torch announce deprecations of each other in every process.
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\..*")


if __name__ == "__main__":
    sys.exit(main())
