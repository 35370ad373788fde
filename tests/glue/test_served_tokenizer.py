"""A server's tokenizer is compared over HTTP. An unusable answer is reported, a different one stops the launch."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.glue.fake_server import fake_server
from tests.tiny_models import tiny_tokenizer
from tropd_mcore.cli.server import open_servers
from tropd_mcore.config.schema import PlatformConfig, ServerConfig
from tropd_mcore.errors import GateError
from tropd_mcore.rollout.served_tokenizer import check_served_tokenizer
from tropd_mcore.serving.client import SglangClient
from tropd_mcore.serving.process import ServerProcess

TOKENIZER = tiny_tokenizer()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    TOKENIZER.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def honest(texts: list[str]) -> list[list[int]]:
    return [TOKENIZER.encode(text, add_special_tokens=False) for text in texts]


def check(folder: Path, tokenize: Callable[[list[str]], Any] | None) -> None:
    with fake_server(tokenize) as server:
        config = ServerConfig(url=server.url, max_retries=0)
        client = SglangClient(server.url, config, key="teacher.server")
        supervised: Any = SimpleNamespace(client=client, spec=SimpleNamespace(key="teacher.server"))
        check_served_tokenizer(supervised, folder)


def test_a_matching_served_tokenizer_passes_with_one_request_and_no_message(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[list[str]] = []
    check(folder, lambda texts: (asked.append(texts), honest(texts))[1])
    assert len(asked) == 1 and len(asked[0]) > 10 and not caplog.records


def test_a_server_that_drops_spaces_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(
        GateError, match=r"gates\.tokenizer: teacher\.server: the server at http://127\.0\.0\.1:\d+ has"
    ):
        check(folder, lambda texts: honest([text.replace(" ", "") for text in texts]))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "has no /tokenize"),
        (lambda texts: honest(texts)[1:], "lists of tokens; expected"),
        (lambda texts: [[1.5]] * len(texts), "expected a list of ids"),
        (lambda texts: "none", "answered 'none' as tokens"),
    ],
    ids=["older", "too few", "no ids", "no list"],
)
def test_a_served_tokenizer_that_cannot_be_compared_is_reported_and_passes(
    folder: Path, answer: Callable[[list[str]], Any] | None, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        check(folder, answer)
    assert f"teacher.server: its tokenizer is not compared with that of {folder}" in caplog.text
    assert words in caplog.text


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_server_that_we_start_gets_corrected_tokenizer_files_if_the_folder_needs_them(
    folder: Path, tmp_path: Path, name: str
) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": name}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    servers = open_servers(
        "evaluation",
        key="rollout.server",
        model_key="--model",
        model=folder,
        dtype="float32",
        configs=[ServerConfig()],
        platform=PlatformConfig(kind="cpu"),
        logs=tmp_path / "logs",
    )
    process = ServerProcess(servers.first.spec)
    process.port = 1
    command = process.command()
    corrected = str(tmp_path / "logs" / "evaluation.tokenizer")
    found = command[command.index("--tokenizer-path") + 1] if "--tokenizer-path" in command else None
    assert found == (corrected if name == "LlamaTokenizerFast" else None)
    assert command[command.index("--model-path") + 1] == str(folder)
