"""Short waits, and a folder for the server process of a test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.glue.server_site import ServerSite
from tropd_mcore.serving import process as process_module
from tropd_mcore.serving import transport as transport_module


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_module, "POLL_S", 0.01)
    monkeypatch.setattr(transport_module, "FIRST_WAIT_S", 0.01)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[ServerSite]:
    site = ServerSite(tmp_path)
    yield site
    for process in site.made:
        process.stop()
