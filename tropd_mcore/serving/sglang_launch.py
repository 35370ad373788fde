"""Run SGLang's own server: `python -m tropd_mcore.serving.sglang_launch [--parent-pid N] <sglang.launch_server args>`.

Some things come before it. The server asks the kernel to kill it when process N ends, however N ends. What it makes
(sockets, shared memory, files) is for this user alone. The key in the environment variable `TROPD_SERVER_KEY`, if there
is one, becomes its API key: it stands on no command line and is taken out of every log line. And with
`SGLANG_USE_CPU_ENGINE=1`, where `sgl_kernel` or `torchvision` are not installed (their wheels need an NVIDIA driver),
the names that SGLang reads from them at import are put in their place: kernels of speculative decoding and of KV moves,
which a dense decoder never calls and which raise when called, and one enumeration. Nothing of SGLang is patched, and
where the real packages exist nothing is put anywhere.

Not for starting the server from the trainer (see `process`). Invariant: the top level of this file runs again in each
process that SGLang spawns, so that all of them get the same treatment.
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

from tropd_mcore.signals import die_with_parent

KEY_VARIABLE = "TROPD_SERVER_KEY"
"""Environment variable with the API key that the server shall require."""
OWNER_ONLY = 0o077
PARENT_VARIABLE = "TROPD_SERVER_PARENT_PID"
"""Each process of the server leaves its pid here for those that it spawns."""

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
"""What SGLang 0.5.23 imports from `sgl_kernel` on a CPU; a newer one that wants more fails naming the missing name."""


def require_key() -> None:
    """Let the server require the key of the environment, which its children do not inherit."""
    key = os.environ.pop(KEY_VARIABLE, "")
    if not key:
        return
    # the list of this process: what /proc shows of the command line stays as it was
    sys.argv.insert(1, f"--api-key={key}")
    make = logging.getLogRecordFactory()

    def without_key(*args: object, **kwargs: object) -> logging.LogRecord:
        record = make(*args, **kwargs)
        # SGLang logs all of its arguments when it starts
        try:
            message = record.getMessage()
        except Exception:
            # a library's bad call; logging itself tells of it and goes on
            return record
        if key in message:
            record.msg, record.args = message.replace(key, "<key>"), ()
        return record

    logging.setLogRecordFactory(without_key)


def add_cpu_placeholders() -> None:
    """Register the placeholder modules for `sgl_kernel` and `torchvision` where those are not installed."""
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
    """Let transformers look now: it caches the answer, and so never takes the placeholder for the package."""
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


def _take_parent_pid() -> int | None:
    """Remove `--parent-pid N` from the command line and return N."""
    if len(sys.argv) > 2 and sys.argv[1] == "--parent-pid":
        parent_pid = int(sys.argv[2])
        del sys.argv[1:3]
        return parent_pid
    return None


def _prepare() -> None:
    """What every process of the server needs before SGLang is imported."""
    # SGLang's children ask for the same after their imports, too late where the server was killed meanwhile; while a
    # spawned process runs this, multiprocessing does not know its parent yet, so the pid comes in the environment
    parent_pid = _take_parent_pid() if __name__ == "__main__" else int(os.environ[PARENT_VARIABLE])
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    if parent_pid is not None:
        die_with_parent(parent_pid)
    os.umask(OWNER_ONLY)
    if __name__ == "__main__":
        require_key()
    if os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        add_cpu_placeholders()


if __name__ in ("__main__", "__mp_main__"):
    _prepare()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
