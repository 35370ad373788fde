"""One real SGLang server for the tests of this folder, tiny models for it, and transformers as the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import write_tiny_model
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer

VOCABULARY = 307
CONTEXT = 512

ASKS_FOR_NO_KEY = {"TROPD_SERVER_KEY": ""}
"""Environment of a started server that tests also use by URL and without a key, like a server elsewhere."""

Oracle = Callable[[Path, list[int]], np.ndarray]


def cpu_server(
    folder: Path, run_dir: Path, *, name: str = "rollout", keyed: bool = True, **config: object
) -> ServerSpec:
    """A small float32 server. Its prefill chunks are shorter than the longest sequences of the tests."""
    settings: dict[str, object] = {
        "dtype": "float32",
        "max_total_tokens": 4096,
        "extra_args": ("--chunked-prefill-size", "64"),
        "start_timeout_s": 600.0,
        "max_retries": 2,
    }
    return ServerSpec(
        key=f"{name}.server",
        model_key="student.path",
        model_path=folder,
        config=ServerConfig(**(settings | config)),  # type: ignore[arg-type]
        device="cpu",
        run_dir=run_dir,
        name=name,
        extra_env={} if keyed else ASKS_FOR_NO_KEY,
    )


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("qwen3"), family="qwen3", seed=1)


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same shapes."""
    return write_tiny_model(tmp_path_factory.mktemp("other"), family="qwen3", seed=2)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("llama"), family="llama", seed=3)


@pytest.fixture(scope="session")
def server(qwen3_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SupervisedServer]:
    """The server that tests share. Each test publishes the weights that it needs. The server requires no key."""
    with SupervisedServer(cpu_server(qwen3_folder, tmp_path_factory.mktemp("run"), keyed=False)) as running:
        yield running


@pytest.fixture(scope="session")
def log_softmax() -> Oracle:
    """(folder, token ids) -> float64 [len(ids), V] log-probs of the next token, by transformers."""
    models: dict[Path, torch.nn.Module] = {}

    def compute(folder: Path, token_ids: list[int], temperature: float = 1.0) -> np.ndarray:
        if folder not in models:
            models[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            logits = models[folder](torch.tensor([token_ids])).logits[0].double()
        return torch.log_softmax(logits / temperature, dim=-1).numpy()

    return compute
