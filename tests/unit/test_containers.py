"""The container recipes: pinned base, sources that exist, and the environments that examples/setup_env.sh makes.

They were never built here. These tests read them. hadolint found nothing in the Dockerfile when it was written.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER, APPTAINER = ROOT / "containers" / "Dockerfile", ROOT / "containers" / "tropd.def"
READ_BY_SETUP = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "requirements", "examples", "tropd_mcore"}
"""What the installation of the trainer reads; setup.py copies recipes only into a wheel."""


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, with continued lines joined."""
    lines = [line for line in DOCKER.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, " ".join(rest.split())) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def sections() -> dict[str, list[str]]:
    """Section of the Apptainer recipe -> its lines; the head has the name ''."""
    found: dict[str, list[str]] = {"": []}
    name = ""
    for line in APPTAINER.read_text().splitlines():
        if line.startswith("%"):
            name = line[1:].strip()
            found[name] = []
        elif line.strip() and not line.strip().startswith("#"):
            found[name].append(line.strip())
    return found


def copied() -> list[str]:
    """Sources of COPY that come from the checkout."""
    copies = [rest.split() for word, rest in instructions() if word == "COPY" and not rest.startswith("--from=")]
    return [source for words in copies for source in words[:-1]]


def test_every_file_that_a_container_copies_exists() -> None:
    for source in [*copied(), *(line.split()[0] for line in sections()["files"])]:
        assert (ROOT / source).exists(), source


def test_both_containers_copy_what_the_installation_reads_and_nothing_is_ignored() -> None:
    for sources in (copied(), [line.split()[0] for line in sections()["files"]]):
        assert not READ_BY_SETUP - set(sources)
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert not {source.split("/")[0] for source in copied()} & set(ignored)
    assert ".venv*" in ignored and "models" in ignored, "an image without gigabytes that belong to this machine"


def test_the_stages_of_the_dockerfile_use_each_other_and_a_base_with_a_tag() -> None:
    stages: set[str] = set()
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            assert base in stages or re.fullmatch(r"[a-z/]+:[0-9.]+", base), base
            stages |= {name} - {""}
        assert word != "COPY" or not rest.startswith("--from=") or rest.split()[0].removeprefix("--from=") in stages
    assert stages == {"base", "server", "trainer"}


def test_both_containers_have_the_same_base_and_system_packages() -> None:
    base = next(rest for word, rest in instructions() if word == "FROM").partition(" ")[0]
    assert f"From: {base}" in sections()[""]
    (install,) = re.findall(r"apt-get install .*?(?= &&|$)", " ".join(rest for word, rest in instructions()))
    assert install in sections()["post"]


@pytest.mark.parametrize("path", [DOCKER, APPTAINER])
def test_a_container_makes_both_environments_with_the_setup_script(path: Path) -> None:
    text = path.read_text()
    calls = re.findall(r"PLATFORM=gpu .*bash examples/setup_env\.sh", text)
    assert len(calls) == (2 if path == DOCKER else 1)
    told = set(re.findall(r"([A-Z_]+)=", " ".join(calls)))
    known = set(re.findall(r'^([A-Z_]+)="\$\{\1', (ROOT / "examples" / "setup_env.sh").read_text(), re.MULTILINE))
    assert {"TRAINER_VENV", "SERVER_VENV"} <= told <= known
    assert "Never built and never run by us" in text
    assert "pip install" not in text, "what is installed is decided in one place"


def test_the_server_stage_of_the_dockerfile_copies_what_the_setup_of_a_server_reads() -> None:
    words = DOCKER.read_text().split("AS server")[1].split("\nFROM")[0]
    script = (ROOT / "examples" / "setup_env.sh").read_text()
    assert 'environment "$SERVER_VENV" SERVER_VENV install_server "$SERVER_LOCK" "$ROUTER_LOCK"\n' in script
    assert "ROUTER_LOCK=requirements/router.txt\n" in script and "requirements/router.txt" in words
    assert "requirements/server-gpu.txt" in words and "examples/setup_env.sh" in words
