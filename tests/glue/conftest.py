"""Tiny models and log-probs of a text by transformers, for the tests of a served teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tropd_mcore.teacher.identity import text_ids


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.tiny_models import write_tiny_model  # not at the top, because the rank processes need no transformers

    root = tmp_path_factory.mktemp("models")
    names = {"teacher": 1, "student": 2, "third": 3}
    found = {name: write_tiny_model(root / name, seed=seed) for name, seed in names.items()}
    found["copy"] = shutil.copytree(found["student"], root / "copy")
    return found


@pytest.fixture(scope="session")
def model_scores(model_folders: dict[str, Path]) -> dict[str, np.ndarray]:
    """Log-probs of the text under each model, by transformers. Only the ids come from our code."""
    import torch
    from transformers import AutoModelForCausalLM

    ids = torch.from_numpy(text_ids(model_folders["student"], model_folders["teacher"]).astype(np.int64))
    found = {}
    for name, folder in model_folders.items():
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids[None]).logits[0]
        found[name] = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].numpy()
    return found
