"""`tropd doctor` checks this machine and environment, and whether a job with a configuration would start here.

It does not check numbers (the trainer's gates do). Invariants: it changes nothing and starts no server. With a
configuration it makes every check of the job's start that needs no rank and no server. Every finding that is not ok
says what to do.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterator

from tropd_mcore.cli.arguments import add_config_arguments, positive
from tropd_mcore.cli.findings import Finding
from tropd_mcore.config.loader import load
from tropd_mcore.config.schema import Config

NAME_WIDTH = 26
"""Width of the longest key among the findings."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser, optional=True)
    parser.add_argument("--nodes", type=positive, default=1, metavar="N", help="number of machines of the job (1)")


def run(options: argparse.Namespace) -> int:
    """Print one line per finding; returns 2 if one of them prevents training, else 0. Raises ConfigError."""
    config = load(options.config, options.overrides)[0] if options.config is not None else None
    print(f"doctor: this machine{f' and {options.config}' if config is not None else ''}", flush=True)
    levels: Counter[str] = Counter()
    failed: set[str] = set()
    skipped: list[str] = []
    for check in (*_machine(options.nodes), *(_configuration(config, options.nodes) if config is not None else ())):
        for finding in check():
            levels[finding.level] += 1
            if finding.level == "skip":
                skipped.append(finding.name)
            else:
                failed |= {finding.name} if finding.level == "FAIL" else set()
                print(f"{finding.level:<4}  {finding.name:<{NAME_WIDTH}}  {finding.detail}", flush=True)
    if skipped := [name for name in skipped if name not in failed]:
        print(f"skip  not checked until every FAIL is fixed: {', '.join(skipped)}")
    warned = f", {levels['warn']} warn" if levels["warn"] else ""
    outcome = ": a run would not start" if levels["FAIL"] else ""
    print(f"doctor: {levels['FAIL'] or 'no'} FAIL{warned}{outcome}")
    return 2 if levels["FAIL"] else 0


Check = Callable[[], Iterator[Finding]]


def _machine(nodes: int) -> Iterator[Check]:
    from tropd_mcore.cli import checks_of_gpus, checks_of_machine

    yield checks_of_machine.versions
    yield checks_of_machine.devices
    yield lambda: checks_of_gpus.on_this_machine(nodes)
    yield checks_of_machine.compiler
    yield checks_of_machine.network
    yield checks_of_machine.proxies
    yield checks_of_machine.resources


def _configuration(config: Config, nodes: int) -> Iterator[Check]:
    from tropd_mcore.cli import checks_of_config, checks_of_gpus
    from tropd_mcore.cli.checks_of_start import start_checks
    from tropd_mcore.records.run_dir import RunDir
    from tropd_mcore.train.start_checks import State

    state = State(config, RunDir(config.run.dir))
    yield lambda: start_checks(config, nodes=nodes, state=state)
    yield lambda: checks_of_config.resources(state, nodes)
    yield lambda: checks_of_config.servers(config)
    yield lambda: checks_of_gpus.server_libraries(config, os.environ)
