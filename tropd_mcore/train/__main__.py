"""One rank of a job: `python -m tropd_mcore.train CONFIG.yaml [key=value ...]`, started by `tropd train` or torchrun.

This module does not launch ranks (`launch`, `cli.train_command`). Invariants: a rank never outlives its launcher. An
error is printed once, by the rank on which it happened. Ranks that only notice that another rank is gone print nothing.
Exit codes are in `exits`.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, NoReturn

from tropd_mcore import signals, stopping
from tropd_mcore.errors import StopRequested, TropdError
from tropd_mcore.train.exits import BUG, BYSTANDER, EXPLAINED, INTERRUPTED, STOPPED

if TYPE_CHECKING:
    from tropd_mcore.config.schema import RunConfig

ECHO_DELAY_S = 30.0
"""Wait of the other ranks for rank 0, longer than it needs to stop its servers and print its message."""
POLL_S = 0.1
WORD_AFTER_S = 5.0
"""A stop is announced if it takes longer than this."""
LOST_CONNECTION = ("connection", "peer", "closed", "socket", "timed out", "aborted", "reset", "remote")
"""Words in errors of gloo, NCCL and the store about ranks that are gone."""


def main(arguments: list[str] | None = None) -> int:
    """Train the configuration on the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tropd_mcore.train", description="Train one configuration.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", help="dotted overrides, for example optimizer.learning_rate=1e-5")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved plan and touch nothing")
    options = parser.parse_intermixed_args(arguments)
    rank = int(os.environ.get("RANK", "0"))
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's order of communication and compute
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # packs differ in length, so fixed segments would fragment
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    try:
        return _run(options, rank)
    except StopRequested as stop:
        if rank == 0:
            signals.say(str(stop))
        return 0
    except Exception as error:
        if is_lost_connection(error):
            _stand_by(rank)
        if not isinstance(error, TropdError):
            traceback.print_exc()
            signals.end(BUG)
        if rank != 0:
            # Most errors are raised on all ranks. The launcher ends this rank as soon as rank 0 has printed the error.
            _wait_to_be_ended()
        signals.say(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}")
        return EXPLAINED


def _run(options: argparse.Namespace, rank: int) -> int:
    from tropd_mcore.config.loader import load

    config, sources = load(options.config, options.overrides)
    if options.dry_run:
        from tropd_mcore.config.plan import plan
        from tropd_mcore.train import memory_plan

        if rank == 0:
            ranks = int(os.environ.get("WORLD_SIZE", "0"))  # 0: not started by torchrun
            address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
            more = memory_plan.rows(config, ranks, address=address, port=port) if ranks else {}
            print(plan(config, ranks or None, more), end="")
        return 0
    from tropd_mcore import logs
    from tropd_mcore.progress import progress, report_every

    logs.configure(rank)
    report_every(config.monitor.progress_every_s)
    log = logging.getLogger("tropd_mcore.train")
    log.info("rank 0 of %s: loading the libraries", os.environ.get("WORLD_SIZE", "1"))
    with progress(log, "loading the libraries"):
        from tropd_mcore.mcore.collective import meetings
        from tropd_mcore.mcore.parallel import RankEnvironment
        from tropd_mcore.train.watch import open_watch

    environment = RankEnvironment.from_environ()
    watch = open_watch(config.run, rank, environment.world_size, meetings) if environment.world_size > 1 else None
    with progress(log, "loading the libraries"):
        from tropd_mcore.mcore.platform.deterministic import make_deterministic
        from tropd_mcore.train.job import run_job

    try:
        if config.platform.deterministic:
            make_deterministic(os.environ)
        run_job(config, sources, environment)
    except Exception as error:
        if not is_lost_connection(error):
            raise
        _stand_by(rank, _patience_s(config.run))  # the watch goes on: it may find the lost rank
    finally:
        if watch is not None:
            watch.close()
    return 0


def is_lost_connection(error: BaseException | None) -> bool:
    """Return whether `error`, or an error that caused it, comes from a collective whose other rank is gone."""
    from torch.distributed import DistError

    while error is not None:
        text = str(error).lower()
        lost = any(word in text for word in LOST_CONNECTION)  # otherwise the error is this rank's, such as no memory
        if lost and (isinstance(error, DistError) or (isinstance(error, RuntimeError) and _in_collective(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def _in_collective(error: BaseException) -> bool:
    """Whether the error came out of torch.distributed or of gloo below it."""
    frames = traceback.extract_tb(error.__traceback__)
    return any("torch/distributed/" in frame.filename for frame in frames) or "gloo" in str(error).lower()


def _patience_s(run: RunConfig) -> float:
    """Return how long a rank waits for the one line about a lost rank.

    In a job of several nodes, the launchers (or under torchrun the other ranks) first have to find out who is lost.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        return ECHO_DELAY_S
    launched = signals.LAUNCHER_VARIABLE in os.environ
    return ECHO_DELAY_S + (run.node_timeout_s if launched else run.rank_timeout_s)


def _stand_by(rank: int, limit_s: float = ECHO_DELAY_S) -> NoReturn:
    """Another rank is gone: let that rank or the launcher print the error. Print it here if neither ends this rank.

    Call it while the exception is handled.
    """
    asked = stopping.requested()
    _wait_to_be_ended(limit_s)
    if asked is not None:  # the other rank was asked to stop when it had nothing to save
        signals.end(STOPPED)
    traceback.print_exc()
    signals.say(f"error (rank {rank}): the connection to another rank was lost; see the output of the other nodes")
    signals.end(BYSTANDER)


def _wait_to_be_ended(limit_s: float = ECHO_DELAY_S) -> None:
    """Give the launcher time to end this rank without a message. torchrun does so with SIGTERM."""
    deadline = time.monotonic() + limit_s
    asked = stopping.requested()
    while time.monotonic() < deadline:
        if asked is None and stopping.requested() is not None:
            signals.end(BYSTANDER)
        time.sleep(POLL_S)


def _hear(number: signal.Signals) -> None:
    """React to a signal, in the thread of `signals`, even while this rank waits inside a collective."""
    launched = signals.LAUNCHER_VARIABLE in os.environ
    says = os.environ.get("RANK", "0") == "0" and not launched
    if number == signal.SIGINT:
        # The servers of this rank end with it, and there is nothing else to wait for.
        if says:
            signals.say("interrupted; the same command resumes")
        os._exit(INTERRUPTED)
    stopping.request(number.name)
    if not stopping.waits():
        if says:
            signals.say(f"stopped by {number.name} before the first step of this launch; the same command resumes")
        os._exit(STOPPED if launched else 0)
    if os.environ.get("RANK", "0") == "0":
        timer = threading.Timer(WORD_AFTER_S, _announce, [number.name])
        timer.daemon = True
        timer.start()


def _announce(reason: str) -> None:
    if stopping.waits():
        signals.say(f"{reason}: the run stops at its next safe point")


if __name__ == "__main__":
    signals.listen((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), _hear)
    launcher = os.environ.get(signals.LAUNCHER_VARIABLE)
    signals.die_with_parent(int(launcher) if launcher else None)
    sys.exit(main())
