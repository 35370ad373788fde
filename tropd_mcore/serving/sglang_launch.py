"""Run SGLang's own server: `python -P sglang_launch.py [--parent-pid N] <sglang.launch_server args>`.

The interpreter may belong to another environment than the trainer's (`rollout.server.python`). This file is started by
its path and needs the standard library, `signals.py` of this package beside it, and SGLang. Nothing of this project has
to be installed there. `-P` keeps this folder off the import path. In our own environment, `python -m
tropd_mcore.serving.sglang_launch` does the same.

Before SGLang starts, this module does four things:
- It asks the kernel to kill the server when process N ends, for whatever reason.
- It makes sockets, shared memory and files of the server accessible to this user only.
- It takes the API key from the environment variable `TROPD_SERVER_KEY`, if set. The key appears on no command line and
  is removed from every log line.
- With `SGLANG_USE_CPU_ENGINE=1`, it registers placeholders for `sgl_kernel` and `torchvision` if they are not installed
  (their wheels need an NVIDIA driver). They hold the names that SGLang reads at import: kernels for speculative
  decoding and KV moves, which a dense decoder never calls and which raise when called, and one enumeration.

SGLang is not patched, and installed packages are never replaced. The trainer starts the server in `process`. Invariant:
the top level of this file runs again in each process that SGLang spawns, so all of them are treated alike.
"""

import enum
import importlib.machinery
import importlib.util
import logging
import os
import runpy
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path

KEY_VARIABLE = "TROPD_SERVER_KEY"
"""Environment variable with the API key that the server requires from its clients."""
OWNER_ONLY = 0o077
PARENT_VARIABLE = "TROPD_SERVER_PARENT_PID"
"""Environment variable in which each server process passes its pid to the processes that it spawns."""

NEVER_CALLED_KERNELS = (
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "rotate_input_ids_cpu",
    "verify_tree_greedy_cpu",
)
"""Names that SGLang 0.5.23 imports from `sgl_kernel` on a CPU. If a newer one needs more, its import error names it."""


def require_key() -> None:
    """Make the server require the key in the environment, and remove it there so that children do not inherit it."""
    key = os.environ.pop(KEY_VARIABLE, "")
    if not key:
        return
    # this changes the list in this process only: /proc still shows the old command line
    sys.argv.insert(1, f"--api-key={key}")
    make = logging.getLogRecordFactory()

    def without_key(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        # SGLang logs all of its arguments when it starts
        try:
            message = record.getMessage()
        except Exception:
            # a bad logging call in a library: logging itself reports it and continues
            return record
        if key in message:
            record.msg, record.args = message.replace(key, "<key>"), ()
        return record

    logging.setLogRecordFactory(without_key)


def add_cpu_placeholders() -> None:
    """Register placeholder modules for `sgl_kernel` and `torchvision` if these are not installed."""
    if importlib.util.find_spec("sgl_kernel") is None:
        kernels = {name: _missing_kernel(name) for name in NEVER_CALLED_KERNELS}
        _register("sgl_kernel", is_package=True, contents=kernels)
    if importlib.util.find_spec("torchvision") is None:
        _remember_that_torchvision_is_absent()
        modes = {mode: mode.lower() for mode in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")}
        interpolation: dict[str, object] = {"InterpolationMode": enum.Enum("InterpolationMode", modes)}
        functional = _register("torchvision.transforms.functional", is_package=False, contents=interpolation)
        contents = {**interpolation, "functional": functional}
        transforms = _register("torchvision.transforms", is_package=True, contents=contents)
        _register("torchvision", is_package=True, contents={"transforms": transforms, "__version__": "0.0.0"})


def _remember_that_torchvision_is_absent() -> None:
    """Let transformers look for torchvision now. It caches the answer and never mistakes the placeholder for it."""
    from transformers.utils import is_torchvision_available

    assert not is_torchvision_available()


def _missing_kernel(name: str) -> Callable[..., None]:
    def call(*_args: object, **_kwargs: object) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} is called but sgl_kernel is not installed on this host")

    return call


def _register(name: str, *, is_package: bool, contents: Mapping[str, object]) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=is_package)
    if is_package:
        module.__path__ = []
    vars(module).update(contents)
    sys.modules[name] = module
    return module


def _die_with_parent(pid: int) -> None:
    """Call the function of `signals`, which another environment can read as a file but not import."""
    spec = importlib.util.spec_from_file_location("tropd_signals", Path(__file__).parents[1] / "signals.py")
    assert spec is not None and spec.loader is not None
    signals = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(signals)
    signals.die_with_parent(pid)


def _take_parent_pid() -> int | None:
    """Remove `--parent-pid N` from the command line and return N."""
    if len(sys.argv) > 2 and sys.argv[1] == "--parent-pid":
        parent_pid = int(sys.argv[2])
        del sys.argv[1:3]
        return parent_pid
    return None


def _prepare() -> None:
    """Prepare a process of the server before it imports SGLang."""
    # SGLang's children request the parent-death signal only after their imports, too late if the server was killed
    # meanwhile. When a spawned process runs this, multiprocessing does not know its parent yet, so the pid is passed
    # in the environment.
    parent_pid = _take_parent_pid() if __name__ == "__main__" else int(os.environ[PARENT_VARIABLE])
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    if parent_pid is not None:
        _die_with_parent(parent_pid)
    os.umask(OWNER_ONLY)
    if __name__ == "__main__":
        require_key()
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        add_cpu_placeholders()


if __name__ in ("__main__", "__mp_main__"):
    _prepare()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
