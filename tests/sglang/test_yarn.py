"""A folder with YaRN: SGLang's log-probs are those of transformers, also beyond the original context."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.sglang.conftest import VOCABULARY, cpu_server
from tests.tiny_models import write_tiny_model
from tropd_mcore.errors import ServerError
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.serving.wire import ScoringRequest
from tropd_mcore.weights.independent import independent_log_probs

YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 48, "mscale": 1.0,
    "mscale_all_dim": 0.3,
}  # fmt: skip
BOUND = 1e-4
"""nats; two float32 engines."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("yarn") / "m", rope_parameters=YARN, seed=4)


def test_sglang_and_transformers_read_yarn_in_the_same_way(folder: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(3, VOCABULARY, 300).astype(np.int32)
    plain = write_tiny_model(tmp_path / "plain", seed=4)
    expected, without = independent_log_probs(folder, ids), independent_log_probs(plain, ids)
    assert np.abs(expected - without).mean() > 100 * BOUND, "the scaling matters in this model"
    with SupervisedServer(cpu_server(folder, tmp_path)) as server:
        (found,) = server.client.score([ScoringRequest(ids, first=1)])
    assert not isinstance(found, ServerError), found
    assert np.abs(found.logp_N - expected).max() < BOUND
