"""`tropd config`: the resolved configuration with the source of each key, the plan of the run, or what the keys mean.

Not for reading models or data. Invariant: what it accepts, the trainer accepts too.
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
        help="print what KEY, all keys of the section KEY, or without KEY all keys accept, default to and mean",
    )
    parser.add_argument("--world-size", type=positive, metavar="N", help="also check the layout against N ranks")
    parser.add_argument("--check", action="store_true", help="print nothing but problems")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of the run instead")
    parser.add_argument(
        "--ranks-per-node",
        type=positive,
        metavar="NODES",
        help="print how many ranks each of NODES machines starts instead",
    )


def run(options: argparse.Namespace) -> int:
    """Check, then print what was asked for. Raises ConfigError."""
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
