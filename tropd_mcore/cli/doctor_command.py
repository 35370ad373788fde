"""`tropd doctor`: what this machine and environment have, and whether that is enough.

Not for checking numbers (the trainer's gates do). Invariant: it changes nothing and starts no server; every finding
that is not fine says what to do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

from tropd_mcore.cli.arguments import add_config_arguments
from tropd_mcore.cli.findings import Finding
from tropd_mcore.config.loader import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser, optional=True)


def run(options: argparse.Namespace) -> int:
    """Print one line a finding; returns 2 where one of them is in the way of training, else 0. Raises ConfigError."""
    from tropd_mcore.cli import checks_of_config, checks_of_machine

    config = load(options.config, options.overrides)[0] if options.config is not None else None
    machine: list[Callable[[], Iterator[Finding]]] = [
        checks_of_machine.versions,
        checks_of_machine.devices,
        checks_of_machine.compiler,
        checks_of_machine.network,
        checks_of_machine.resources,
    ]
    failed = False
    for check in machine:
        failed |= _show(check())
    if config is not None:
        failed |= _show(checks_of_config.files(config))
        failed |= _show(checks_of_config.prompts(config))
        failed |= _show(checks_of_config.servers(config))
    return 2 if failed else 0


def _show(findings: Iterator[Finding]) -> bool:
    failed = False
    for finding in findings:
        print(f"{finding.level:<4}  {finding.name:<12}  {finding.detail}", flush=True)
        failed |= finding.level == "FAIL"
    return failed
