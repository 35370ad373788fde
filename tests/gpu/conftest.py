"""The loss alone needs no Megatron-Core, so its tests run where that is missing."""

from __future__ import annotations

import importlib.util

TRAINER = ["test_selftest_on_cuda.py", "test_training_on_cuda.py", "test_transformer_engine.py"]
collect_ignore = [] if importlib.util.find_spec("megatron") is not None else TRAINER


def pytest_report_header() -> list[str]:
    """Say what is left out."""
    return [f"tests/gpu: Megatron-Core is not installed, so {', '.join(TRAINER)} are left out"] * bool(collect_ignore)
