"""A whole job whose servers run in another virtual environment, in which this project cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.e2e import jobs

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(jobs.TEST_LIMIT_S)]


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its interpreter: a new prefix that reads our site-packages without the .pth files there, which name the checkout.

    SECOND_PYTHON names another one instead, for example one with another torch (docs/install.md).
    """
    if named := os.environ.get("SECOND_PYTHON"):
        return Path(named)
    folder = tmp_path_factory.mktemp("second") / "env"
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def test_both_servers_of_a_job_run_in_a_second_environment_and_get_weights_by_shared_memory(
    second: Path, settings: list[str], tmp_path: Path
) -> None:
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [second, "-P", "-c", "import sglang, tropd_mcore"], env=bare, cwd="/", capture_output=True, text=True
    )
    assert "No module named 'tropd_mcore'" in found.stderr, found

    run_dir = tmp_path / "run"
    process = jobs.start(
        run_dir,
        *settings,
        f"rollout.server.python={second}",
        "teacher.kind=sglang",
        f"teacher.server.python={second}",
        "teacher.server.max_total_tokens=8192",
        "run.steps=2",
        "run.export_at_end=false",
    )
    try:
        jobs.wait_for(lambda: len(list((run_dir / "logs").glob("*.server.json"))) == 2, process)
        leaders = [each for each in jobs.server_processes(run_dir) if "--parent-pid" in each.cmdline()]
        assert [leader.cmdline()[0] for leader in leaders] == [str(second)] * 2
        assert process.wait(timeout=jobs.LIMIT_S) == 0, run_dir.with_suffix(".log").read_text()[-6000:]
    finally:
        jobs.kill(process)
    output = run_dir.with_suffix(".log").read_text()
    assert [line["step"] for line in jobs.metrics(run_dir)] == [0, 1]
    assert "by value" not in output
