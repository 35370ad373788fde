"""Findings about the files, ports and servers that a configuration names, for `tropd doctor`."""

from __future__ import annotations

import os
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tropd_mcore.cli.findings import Finding
from tropd_mcore.config.derived import active_guidance, reference_path
from tropd_mcore.config.schema import Config, ServerConfig
from tropd_mcore.errors import TropdError
from tropd_mcore.mcore.checkpoint_info import latest

HEALTH_TIMEOUT_S = 10.0


def files(config: Config) -> Iterator[Finding]:
    """Model folders, data files, and a run directory that can be written."""
    models = {
        "student.path": config.student.path,
        "teacher.path": config.teacher.path,
        "objective.reference": reference_path(config),
    }
    for key, folder in models.items():
        if folder is None:
            continue
        yield _model_folder(key, folder)
        if not (folder / "config.json").is_file():
            continue
        if config.gates.tokenizer:
            yield _tokenizer(key, folder)
    for key, path in (("data.prompts", config.data.prompts), ("responses", config.data.teacher_responses)):
        if path is None:
            continue
        if path.is_file():
            yield Finding("ok", key, str(path))
        elif key == "data.prompts":
            yield Finding("FAIL", key, f"{path} not found")
        elif active_guidance(config) is None:
            yield Finding("FAIL", key, f"{path} not found; set data.teacher_responses=null, nothing needs them")
        else:
            yield Finding(
                "FAIL",
                key,
                f"data.teacher_responses={path} not found; make it with `tropd prefixes CONFIG`, or set "
                "objective.guidance.enabled=false and data.teacher_responses=null",
            )
    existing = next(parent for parent in (config.run.dir, *config.run.dir.absolute().parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        checkpoint = latest(config.run.dir / "checkpoints")
        state = (
            f"holds a run, which goes on from {checkpoint.name}" if checkpoint is not None else "holds no checkpoint"
        )
        state = state if config.run.dir.exists() else "will be created"
        yield Finding("ok", "run.dir", f"{config.run.dir} {state}")
    else:
        yield Finding("FAIL", "run.dir", f"{existing} cannot be written; choose another run.dir")


def _model_folder(key: str, folder: Path) -> Finding:
    """What training would refuse of the folder without reading a tensor."""
    from tropd_mcore.weights.hf_folder import HfReader

    try:
        with HfReader(folder) as reader:
            reader.check()
    except TropdError as error:
        return Finding("FAIL", key, str(error))
    return Finding("ok", key, str(folder))


def _tokenizer(key: str, folder: Path) -> Finding:
    from tropd_mcore.data.tokenizer_gate import check_tokenizer

    try:
        loaded = check_tokenizer(folder, key=key)
    except TropdError as error:
        return Finding("FAIL", "tokenizer", str(error))
    return Finding("ok", "tokenizer", loaded.correction or f"{key}: the ids of its tokenizer.json")


def prompts(config: Config) -> Iterator[Finding]:
    """Every prompt and stored response has what training will ask of it.

    Prompts alone where the responses are not there yet; nothing where other files are missing.
    """
    if not all(path.is_file() for path in (config.student.path / "config.json", config.data.prompts)):
        return
    from tropd_mcore.cli.template_date import template_date
    from tropd_mcore.data.chat import Renderer
    from tropd_mcore.data.end_tokens import end_tokens
    from tropd_mcore.data.prompts import load_prompts, needs_of
    from tropd_mcore.teacher.vocabulary import read_width

    try:
        renderer = Renderer(config.student.path)
        ends = end_tokens(config, renderer, config.teacher.path)
        needs = needs_of(config, vocab_size=read_width(config.student.path), end_ids=ends.ids)
        data = config.data
        if data.teacher_responses is not None and not data.teacher_responses.is_file():
            needs = replace(needs, responses=False)
            data = data.model_copy(update={"teacher_responses": None})
        found = load_prompts(data, renderer, seed=config.run.seed, needs=needs, today=template_date(config))
    except TropdError as error:
        for line in str(error).splitlines():
            yield Finding("FAIL", "prompts", line)
        return
    yield Finding("ok", "prompts", f"{len(found.prompts)} of up to {found.longest_prompt} tokens")


def servers(config: Config) -> Iterator[Finding]:
    """Ports of servers to start are free; servers at a URL are healthy."""
    yield from _server("rollout", config.rollout.server)
    if config.teacher.kind == "sglang":
        yield from _server("teacher", config.teacher.server)


def _server(name: str, server: ServerConfig) -> Iterator[Finding]:
    if server.url is not None:
        yield _health(name, server.url)
    elif server.port is not None:
        yield _free_port(name, server.port)


def _health(name: str, url: str) -> Finding:
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=HEALTH_TIMEOUT_S) as answer:
            status = answer.status
    except (urllib.error.URLError, OSError, ValueError) as error:
        return Finding("FAIL", name, f"{name}.server.url={url} does not answer /health: {error}")
    return Finding("ok", name, f"{url} answers /health with {status}")


def _free_port(name: str, port: int) -> Finding:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return Finding("ok", name, f"port {port} is free")
    except OSError as error:
        return Finding("FAIL", name, f"{name}.server.port={port}: {error.strerror}; choose another or remove it")
