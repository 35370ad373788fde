"""`tropd selftest` proves on this machine, in minutes, that a job can run, and writes a report to send back.

It needs no model, no data and no network: it makes two tiny models. Invariant: the exit code is 0 only if every check
was run and passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Literal

from tropd_mcore.errors import ConfigError
from tropd_mcore.files import publish_text

NAME_WIDTH = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Check the loss on the device, collectives, a tiny Megatron model against transformers, the start of a server, "
        "publication of weights to it, sampling, and training steps. Takes minutes. Exit code 0: every check passed, "
        "1: one did not, 2: wrong arguments."
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="configuration of the tiny job, for example rollout.server.mem_fraction=0.2",
    )
    parser.add_argument("--out", type=Path, default=Path("tropd-selftest.md"), metavar="FILE", help="the report")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: GPUs if there are any"
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this new folder and keep it")


def run(options: argparse.Namespace) -> int:
    """Run all checks, print a line for each, write the report; returns 1 if one failed. Raises ConfigError."""
    from tropd_mcore.selftest.checks import Place, run_all
    from tropd_mcore.selftest.report import markdown

    if wrong := [text for text in options.overrides if "=" not in text]:
        raise ConfigError([f"tropd selftest takes KEY=VALUE and no configuration file, found {wrong[0]!r}"])
    platform, devices = _devices(options.device)
    folder = _folder(options.keep)
    started, outcomes = time.monotonic(), []
    place = Place(folder, platform, devices, tuple(options.overrides))
    what = f"{devices} GPUs" if platform == "cuda" else "CPU"
    print(f"selftest: {what}, about {'two' if platform == 'cpu' else 'four'} minutes", flush=True)
    try:
        for outcome in run_all(place):
            outcomes.append(outcome)
            print(f"{outcome.status:<4}  {outcome.name:<{NAME_WIDTH}}  {outcome.detail}", flush=True)
        seconds = time.monotonic() - started
        publish_text(options.out, markdown(outcomes, place, seconds, os.environ), key="--out")
    finally:
        if options.keep is None:
            shutil.rmtree(folder, ignore_errors=True)
    failed = [outcome.name for outcome in outcomes if outcome.status != "ok"]
    print(f"selftest: {'did not pass: ' + ', '.join(failed) if failed else 'passed'}, {seconds:.0f} s; "
          f"report: {options.out}")  # fmt: skip
    return 1 if failed else 0


def _folder(keep: Path | None) -> Path:
    if keep is None:
        return Path(tempfile.mkdtemp(prefix="tropd-selftest-"))
    try:
        keep.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError([f"--keep {keep}: expected a folder that does not exist yet"]) from error
    except OSError as error:
        raise ConfigError([f"--keep {keep}: {error.strerror}"]) from error
    return keep.absolute()


def _devices(asked: str) -> tuple[Literal["cpu", "cuda"], int]:
    """Return the platform and the number of its devices. Raises ConfigError if there is no GPU and one is wanted."""
    import torch

    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if asked == "cuda" and not found:
        raise ConfigError([f"--device cuda: torch {torch.__version__} sees no GPU; `tropd doctor` says why"])
    if asked == "cpu" and found:
        raise ConfigError(["--device cpu: the CPU platform refuses visible GPUs; hide them with CUDA_VISIBLE_DEVICES="])
    return ("cuda", found) if found else ("cpu", 2)
