"""`tropd recipes` lists and copies the files of the package, and overwrites no file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tropd_mcore.cli import shipped
from tropd_mcore.cli.main import main

ROOT = Path(__file__).parents[2]


def tropd(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["recipes", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_list_of_recipes_describes_every_recipe_and_script(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = tropd(capsys)
    lines = out.splitlines()
    assert code == 0
    for path in shipped.files_of(ROOT):
        if path.name != "__init__.py":
            about = lines[lines.index(str(path)) + 1].strip()
            assert len(about) > 20 and about[0].isupper(), path


def test_a_recipe_is_copied_with_its_folder_by_path_name_or_pattern(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("quickstart-cpu", "quickstart-cpu.yaml", "configs/quickstart-cpu.yaml", "configs/quick*"):
        code, out, _ = tropd(capsys, name, "--to", str(tmp_path / name.replace("/", "_")))
        copy = tmp_path / name.replace("/", "_") / "configs" / "quickstart-cpu.yaml"
        assert code == 0 and out == f"{copy}\n"
        assert copy.read_text() == (ROOT / "configs" / "quickstart-cpu.yaml").read_text()


def test_all_recipes_are_copied_in_the_layout_of_the_checkout_and_a_second_copy_does_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, _ = tropd(capsys, "--all", "--to", str(tmp_path))
    files = shipped.files_of(ROOT)
    assert code == 0 and len(out.splitlines()) == len(files)
    for path in files:
        assert (tmp_path / path).read_bytes() == (ROOT / path).read_bytes()
        assert (tmp_path / path).stat().st_mode & 0o111 == (ROOT / path).stat().st_mode & 0o111
    assert tropd(capsys, "--all", "--to", str(tmp_path))[1] == f"{len(files)} files exist already and are the same\n"


def test_if_a_users_file_would_be_overwritten_nothing_is_written(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = tmp_path / "configs" / "quickstart-cpu.yaml"
    mine.parent.mkdir()
    mine.write_text("mine")
    code, out, err = tropd(capsys, "--all", "--to", str(tmp_path))
    assert code == 2 and not out
    assert err == f"error: tropd recipes: {mine} would be overwritten; give another folder with --to\n"
    assert mine.read_text() == "mine" and sorted(tmp_path.rglob("*")) == [mine.parent, mine]


def test_a_folder_without_a_name_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = tropd(capsys, "--to", str(tmp_path))
    assert code == 2 and not out and "--to needs files to copy; give a NAME, or pass --all" in err


def test_an_unknown_recipe_and_an_unwritable_folder_give_a_one_line_error(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = tropd(capsys, "quickstart-gpu")
    assert code == 2
    assert err == "error: tropd recipes quickstart-gpu: no such recipe or script; did you mean quickstart-cpu?\n"
    (tmp_path / "file").write_text("")
    code, _, err = tropd(capsys, "quickstart-cpu", "--to", str(tmp_path / "file"))
    assert code == 2 and "Not a directory" in err and "set --to to a place" in err and err.count("\n") == 1


def test_an_installed_package_without_recipe_files_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "root", lambda: tmp_path)
    code, _, err = tropd(capsys)
    assert code == 2 and err == f"error: tropd recipes: no files found in {tmp_path}; install the package again\n"
