"""`tropd config` prints the resolved configuration with the source of each key, the plan of the run, or the meaning of
keys.

It reads no models and no data. Invariant: a configuration that it accepts is accepted by the trainer too.
"""

from __future__ import annotations

import argparse

from tropd_mcore.cli.arguments import add_config_arguments, positive
from tropd_mcore.config.checks import layout_problems
from tropd_mcore.config.derived import ranks_per_node
from tropd_mcore.config.loader import load
from tropd_mcore.config.plan import plan, resolved_yaml
from tropd_mcore.config.reference import explain
from tropd_mcore.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser, optional=True)
    parser.add_argument(
        "--explain",
        nargs="?",
        const="",
        metavar="KEY",
        help="print type, default and meaning of KEY or of all keys of the section KEY (without KEY: of all keys)",
    )
    parser.add_argument("--world-size", type=positive, metavar="N", help="also check the layout against N ranks")
    parser.add_argument("--check", action="store_true", help="print only problems")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of the run instead")
    parser.add_argument(
        "--ranks-per-node",
        type=positive,
        metavar="NODES",
        help="print only the number of ranks that each of NODES machines starts",
    )


def run(options: argparse.Namespace) -> int:
    """Check, then print the requested output. Raises ConfigError."""
    if options.explain is not None:
        print(explain(options.explain), end="")
        return 0
    if options.config is None:
        raise ConfigError(["tropd config: expected CONFIG, a YAML file, or --explain [KEY]"])
    config, sources = load(options.config, options.overrides)
    if options.world_size is not None and (problems := layout_problems(config.parallel, options.world_size)):
        raise ConfigError(problems)
    if options.ranks_per_node is not None:
        print(ranks_per_node(config.parallel, options.ranks_per_node))
    elif options.dry_run:
        print(plan(config, options.world_size), end="")
    elif not options.check:
        print(resolved_yaml(config, sources), end="")
    return 0
