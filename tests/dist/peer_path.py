"""Put sources of Megatron-LM, Megatron-Bridge and NeMo-RL before the installed packages in a rank process.

`peer_stubs` replaces packages that they import and that are not installed.
"""

from __future__ import annotations

import importlib
import sys
import typing
from collections.abc import Iterable
from pathlib import Path

import typing_extensions

from tests.dist.peer_stubs import EmptyModule, stand_in_for

BRIDGE_STUBS = (
    "megatron.bridge.data.builders",
    "megatron.bridge.models",
    "megatron.bridge.peft",
    "datasets",
    "modelopt",
    "torch.utils.tensorboard",
)
"""packages that Megatron-Bridge's training loop imports and does not use here"""


def first_on_path(folders: list[Path], stubs: Iterable[str] = ()) -> None:
    """Let this process import from `folders` first, and the packages `stubs` as empty modules.

    A process can do this for only one stack. The stacks are written for Python 3.12: two names of its `typing` are
    taken from typing_extensions if they are older or missing.
    """
    wanted = [str(folder) for folder in folders]
    if sys.path[: len(wanted)] == wanted:
        return
    assert "megatron.core" not in sys.modules, "another megatron-core was imported already"
    importlib.import_module("examples.integrations")  # ours, before a stack's package of that name comes first
    sys.path[:0] = wanted
    stand_in_for(*stubs)
    for name in ("override", "TypedDict"):
        if sys.version_info < (3, 12):
            setattr(typing, name, getattr(typing_extensions, name))


def add_bridge(source: Path) -> None:
    """Make megatron.bridge importable from a checkout, without what its `__init__` imports: models and conversion."""
    import megatron

    if "megatron.bridge" not in sys.modules:
        package = EmptyModule("megatron.bridge")
        package.__path__ = [str(source / "src" / "megatron" / "bridge")]
        sys.modules["megatron.bridge"] = megatron.bridge = package
