"""`tropd train` makes the checks that one process can make in a second, then starts the ranks of this node.

The job itself is in `tropd_mcore.train`. Invariants: nothing heavy is imported and nothing is written before the checks
have passed. `--dry-run` starts nothing and needs no other node. Environment variables about nodes are read only here,
and arguments override them.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tropd_mcore.cli.arguments import add_config_arguments, exit_code, natural, positive
from tropd_mcore.config.checks import layout_problems
from tropd_mcore.config.derived import ranks_per_node
from tropd_mcore.config.loader import load
from tropd_mcore.config.plan import plan, resolved_yaml
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError

log = logging.getLogger(__name__)

DEFAULT_PORT = 29500
"""Port on the first node of a job with several nodes. It is fixed, so all nodes know it without communication."""
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Nodes:
    """The nodes of the job and the place of this launcher among them."""

    nodes: int
    node_rank: int
    address: str
    port: int
    ranks: int
    """Number of ranks per node."""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan and the launch lines; start nothing, look at no file but each model's config.json (`tropd "
        "doctor CONFIG` looks at all)",
    )
    parser.add_argument(
        "--stopped-code",
        type=exit_code,
        default=0,
        metavar="C",
        help="exit code if a signal stopped the run before its end (0); a scheduler that starts an unfinished run "
        "again needs another one, such as 75",
    )
    nodes = parser.add_argument_group("nodes", "Start the same line on each node; one node needs none of these.")
    nodes.add_argument("--nnodes", type=positive, metavar="N", help="machines in the job ($NNODES; 1)")
    nodes.add_argument("--node-rank", type=natural, metavar="R", help="number of this machine ($NODE_RANK; 0)")
    nodes.add_argument("--master-addr", metavar="A", help="first machine ($MASTER_ADDR)")
    nodes.add_argument(
        "--master-port",
        type=natural,
        metavar="P",
        help=f"port on the first machine ($MASTER_PORT; {DEFAULT_PORT}, on one node any free one)",
    )
    nodes.add_argument(
        "--nproc-per-node",
        type=positive,
        metavar="K",
        help="ranks on each machine ($NPROC_PER_NODE; what the configuration needs)",
    )


def run(options: argparse.Namespace) -> int:
    """Check, then train; returns the exit code. Raises ConfigError."""
    if "LOCAL_RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        return _as_rank(options)
    config, sources = load(options.config, options.overrides)
    nodes = read_nodes(options, config, os.environ)
    if options.dry_run:
        from tropd_mcore.train import memory_plan

        more = memory_plan.rows(config, nodes.world_size, address=nodes.address, port=nodes.port)
        print(plan(config, nodes.world_size, more), end="")
        print(launch_line(options, nodes))
        return 0
    here = "this machine" if nodes.nodes == 1 else f"{nodes.nodes} nodes, this is node {nodes.node_rank}"
    log.info("tropd train: %s in %s, %d ranks on %s", options.config, config.run.dir, nodes.world_size, here)
    from tropd_mcore.train.preflight import cheap

    if problems := cheap(config, world_size=nodes.world_size, nodes=nodes.nodes):
        raise ConfigError(problems)
    if nodes.nodes > 1:
        log.info("%s", launch_line(options, nodes))
    return _launch(options, config, resolved_yaml(config, sources), nodes)


def _launch(options: argparse.Namespace, config: Config, resolved: str, nodes: Nodes) -> int:
    from tropd_mcore.train.launch import Job, Place, launch

    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    place = Place(
        nodes=nodes.nodes,
        node_rank=nodes.node_rank,
        address=nodes.address,
        port=nodes.port,
        ranks=nodes.ranks,
        job=hashlib.sha256(resolved.encode()).hexdigest(),
    )
    arguments = (options.config, *options.overrides)
    run = config.run
    return launch(
        Job(
            place=place,
            arguments=arguments,
            run_dir=run.dir,
            steps=run.steps,
            rank_timeout_s=run.rank_timeout_s,
            join_timeout_s=run.join_timeout_s,
            node_timeout_s=run.node_timeout_s,
            stopped_code=options.stopped_code,
        )
    )


def _as_rank(options: argparse.Namespace) -> int:
    """torchrun started this process as one of its ranks. Replace the process by that rank."""
    command = [sys.executable, "-u", "-m", "tropd_mcore.train", options.config, *options.overrides]
    if options.dry_run:
        command.append("--dry-run")
    sys.stdout.flush()
    os.execv(sys.executable, command)


def read_nodes(options: argparse.Namespace, config: Config, environ: Mapping[str, str]) -> Nodes:
    """Return the nodes of the job, from the arguments, else the environment, else Slurm's step, else one node.

    Raises ConfigError with all problems.
    """
    problems: list[str] = []
    environ = {**_slurm(environ, problems), **{name: value for name, value in environ.items() if value}}

    def named(argument: str) -> str:
        """The argument if it was given, else the variable that it stands for."""
        return argument.upper() if getattr(options, argument) is None else f"--{argument.replace('_', '-')}"

    def number(argument: int | None, name: str, default: int) -> int:
        text = environ.get(name, "")
        if argument is not None:
            return argument
        if not text:
            return default
        if not text.isdecimal():
            problems.append(f"{name} is {text!r}, expected a whole number")
            return default
        return int(text)

    nodes = number(options.nnodes, "NNODES", 1)
    node_rank = number(options.node_rank, "NODE_RANK", 0)
    port = number(options.master_port, "MASTER_PORT", 0) or (DEFAULT_PORT if nodes > 1 else 0)
    address = options.master_addr or environ.get("MASTER_ADDR", "") or (LOOPBACK if nodes <= 1 else "")
    if nodes < 1:
        problems.append("NNODES is 0, expected at least 1")
    elif node_rank >= nodes:
        problems.append(
            f"{named('node_rank')} is {node_rank}, expected 0 to {nodes - 1} ({named('nnodes')} is {nodes})"
        )
    if port > 65535:
        problems.append(f"{named('master_port')} is {port}, expected at most 65535")
    if not address and not options.dry_run:
        problems.append(
            f"MASTER_ADDR is not set: {nodes} nodes ({named('nnodes')}) need the name or address of the first one"
        )
    ranks = options.nproc_per_node or number(None, "NPROC_PER_NODE", 0)
    if problems:
        raise ConfigError(problems)
    if not ranks:
        ranks = ranks_per_node(config.parallel, nodes)
    if problems := layout_problems(config.parallel, nodes * ranks):
        raise ConfigError(problems)
    return Nodes(nodes, node_rank, address or "<first node>", port, ranks)


def launch_line(options: argparse.Namespace, nodes: Nodes) -> str:
    """Return the command that starts the job, for the end of a plan."""
    command = shlex.join(["tropd", "train", options.config, *options.overrides])
    ranks = f" --nproc-per-node {nodes.ranks}"
    if nodes.nodes == 1:
        return f"launch       {command}{ranks if options.nproc_per_node else ''}"
    return (
        f"launch       on node R = 0 to {nodes.nodes - 1}: {command} --nnodes {nodes.nodes} --node-rank R "
        f"--master-addr {shlex.quote(nodes.address)} --master-port {nodes.port}{ranks}"
    )


def _slurm(environ: Mapping[str, str], problems: list[str]) -> dict[str, str]:
    """Slurm's variables about this node inside `srun`; empty in the shell of a batch job or outside Slurm."""
    nodes = environ.get("SLURM_STEP_NUM_NODES", "")
    if not nodes.isdecimal() or int(nodes) < 2:
        return {}
    if environ.get("SLURM_LOCALID", "0") != "0":
        problems.append(f"SLURM_LOCALID is {environ['SLURM_LOCALID']}: start one task per node (--ntasks-per-node=1)")
    found = {"NNODES": nodes, "NODE_RANK": environ.get("SLURM_NODEID", "")}
    if "MASTER_ADDR" not in environ and (hosts := environ.get("SLURM_STEP_NODELIST")):
        found["MASTER_ADDR"] = _first_host(hosts)
    return found


def _first_host(hosts: str) -> str:
    """The first name of a Slurm host list, by Slurm's own command; empty if that cannot be run."""
    command = ["scontrol", "show", "hostnames", hosts]
    try:
        names = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return ""
    return names[0] if names else ""
