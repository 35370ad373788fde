"""Run SGLang's router: `python -P router_launch.py [--parent-pid N] <arguments of smg launch>`.

The interpreter may belong to another environment than the trainer's (`rollout.router.python`). This file is started by
its path and needs the standard library, `signals.py` of this package beside it, and the package smg. Before the router
starts, this module asks the kernel to end it with process N, makes its files accessible to this user only, and takes
the key from the environment variable `TROPD_ROUTER_KEY`, so that the key is on no command line. The router requires
this key of callers and for changes of its workers.
"""

import importlib.util
import os
import sys
from pathlib import Path

KEY_VARIABLE = "TROPD_ROUTER_KEY"
"""Environment variable with the API key that the router requires."""
OWNER_ONLY = 0o077


def _die_with_parent(pid: int) -> None:
    """Call the function of `signals`, which another environment can read as a file but not import."""
    spec = importlib.util.spec_from_file_location("tropd_signals", Path(__file__).parents[1] / "signals.py")
    assert spec is not None and spec.loader is not None
    signals = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(signals)
    signals.die_with_parent(pid)


def main(arguments: list[str]) -> None:
    """Start the router and serve until SIGTERM."""
    if arguments[:1] == ["--parent-pid"]:
        _die_with_parent(int(arguments[1]))
        arguments = arguments[2:]
    os.umask(OWNER_ONLY)
    key = os.environ.pop(KEY_VARIABLE, "")
    if not key:
        sys.exit(f"{KEY_VARIABLE} is unset: a router without a key would serve every user of this machine")
    from smg.launch_router import launch_router, parse_router_args

    router = parse_router_args(arguments)
    router.api_key = key
    launch_router(router)


if __name__ == "__main__":
    main(sys.argv[1:])
