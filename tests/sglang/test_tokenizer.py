"""How a real server tokenizes text: started over a folder that transformers misreads, and compared with another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.sglang.conftest import cpu_server
from tests.tiny_models import write_tiny_model
from tropd_mcore.data.tokenizer import PROBE
from tropd_mcore.errors import GateError
from tropd_mcore.rollout.served_tokenizer import check_served_tokenizer, tokenizer_for_server
from tropd_mcore.serving.supervisor import SupervisedServer


@pytest.fixture(scope="module")
def misread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer whose settings name a Llama class, as in R1-Distill-Llama."""
    folder = write_tiny_model(tmp_path_factory.mktemp("misread"), family="llama", seed=4)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}))
    return folder


def test_a_server_that_we_start_uses_the_tokenizer_of_tokenizer_json(misread: Path, tmp_path: Path) -> None:
    corrected = tokenizer_for_server(misread, tmp_path, "rollout")
    assert corrected == tmp_path / "rollout.tokenizer"
    spec = replace(cpu_server(misread, tmp_path), tokenizer_path=corrected)
    file = Tokenizer.from_file(str(misread / "tokenizer.json"))
    with SupervisedServer(spec) as server:
        texts = [*PROBE, "<unk> <s> <|im_end|>\n"]
        assert server.client.tokenize(texts) == [file.encode(text, add_special_tokens=False).ids for text in texts]
        check_served_tokenizer(server, misread)


def test_a_real_server_with_another_tokenizer_is_refused(
    server: SupervisedServer, qwen3_folder: Path, tmp_path: Path
) -> None:
    check_served_tokenizer(server, qwen3_folder)
    for path in qwen3_folder.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["W"], vocabulary["X"] = vocabulary["X"], vocabulary["W"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(
        GateError, match=r"gates\.tokenizer: rollout\.server: the server at http://.* difference is id 0"
    ):
        check_served_tokenizer(server, tmp_path)
