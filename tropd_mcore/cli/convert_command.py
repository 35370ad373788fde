"""`tropd convert`: Hugging Face folders to Megatron checkpoints and back, and a comparison of the two.

It does not read checkpoints of other programs. To use more than one rank, launch it with torchrun:
`torchrun --nproc-per-node 4 -m tropd_mcore.cli.main convert hf-to-mcore ... --tensor 2 --pipeline 2`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from tropd_mcore.cli.arguments import positive
from tropd_mcore.cli.early_checks import checkpoint_folder, model_folder, output_folder, refuse
from tropd_mcore.config.schema import ParallelConfig
from tropd_mcore.errors import ConfigError

BYTES_PER_GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the three directions."""
    directions = parser.add_subparsers(dest="direction", metavar="WHAT", required=True)

    forward = directions.add_parser("hf-to-mcore", help="Hugging Face folder -> checkpoint that loads at any layout")
    forward.add_argument("--hf", type=Path, required=True, help="Hugging Face folder (qwen3, qwen2 or llama)")
    forward.add_argument("--out", type=Path, required=True, help="new folder for the checkpoint")
    forward.add_argument("--dtype", choices=("float32", "bfloat16"), help="round to this dtype (default: as stored)")
    _add_layout(forward)

    back = directions.add_parser("mcore-to-hf", help="checkpoint (also of a training run) -> Hugging Face folder")
    back.add_argument("--mcore", type=Path, required=True, help="checkpoint folder (with tropd.json)")
    back.add_argument("--out", type=Path, required=True, help="new Hugging Face folder")
    back.add_argument("--hf", type=Path, help="folder with config.json and tokenizer, if the checkpoint has none")
    back.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="size limit of one safetensors file, in 10^9 bytes (5)"
    )
    _add_layout(back)

    compare = directions.add_parser("verify", help="compare a folder with a checkpoint or another folder")
    compare.add_argument("--hf", type=Path, required=True, help="the original Hugging Face folder")
    compare.add_argument("--mcore", type=Path, help="checkpoint to compare with it")
    compare.add_argument("--other-hf", type=Path, help="Hugging Face folder to compare with it")
    compare.add_argument("--seed", type=int, default=0, help="seed of the random token ids (0)")
    _add_platform(compare)


def run(options: argparse.Namespace) -> int:
    """Convert or compare; returns 1 if a comparison fails. Raises TropdError."""
    if options.direction == "verify":
        return _verify(options)
    if int(os.environ.get("RANK", "0")) == 0:  # another rank might already see the folder that rank 0 creates
        _check_folders(options)
    from tropd_mcore.mcore.conversion import hf_to_mcore, mcore_to_hf, open_job

    parallel = ParallelConfig(tensor=options.tensor, pipeline=options.pipeline)
    with open_job(parallel, options.platform, os.environ) as job:
        if options.direction == "hf-to-mcore":
            hf_to_mcore(options.hf, options.out, job, dtype=options.dtype)
        else:
            shard_bytes = int(options.max_shard_gb * BYTES_PER_GB)
            mcore_to_hf(options.mcore, options.out, job, hf_folder=options.hf, max_shard_bytes=shard_bytes)
        if job.layout.rank == 0:
            print(f"wrote {options.out}")
    return 0


def _check_folders(options: argparse.Namespace) -> None:
    """Raise ConfigError with all problems of the folders, before anything heavy is imported."""
    mcore, other = getattr(options, "mcore", None), getattr(options, "other_hf", None)
    out = getattr(options, "out", None)
    refuse(
        model_folder("--hf", options.hf) if options.hf is not None else [],
        model_folder("--other-hf", other) if other is not None else [],
        checkpoint_folder("--mcore", mcore) if mcore is not None else [],
        output_folder("--out", out) if out is not None else [],
    )


def _verify(options: argparse.Namespace) -> int:
    if options.mcore is None and options.other_hf is None:
        raise ConfigError(["tropd convert verify: nothing to compare with: give --mcore, --other-hf or both"])
    _check_folders(options)
    from tropd_mcore.mcore.conversion import open_job
    from tropd_mcore.mcore.verification import table, verify

    with open_job(ParallelConfig(), options.platform, os.environ) as job:
        checks = verify(options.hf, job, mcore=options.mcore, other_hf=options.other_hf, seed=options.seed)
    print(table(checks))
    return 0 if all(check.passed for check in checks) else 1


def _add_layout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tensor", type=positive, default=1, metavar="N", help="number of tensor-parallel ranks (1)")
    parser.add_argument("--pipeline", type=positive, default=1, metavar="N", help="number of pipeline stages (1)")
    _add_platform(parser)


def _add_platform(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--platform", choices=("auto", "cpu", "cuda"), default="auto", help="device to work on (auto)")
