"""The command line: quick help, one line for a user error, and the output of the subcommands."""

import argparse
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tropd_mcore.cli import main as cli
from tropd_mcore.cli.prefixes_command import teacher_settings
from tropd_mcore.config.loader import load
from tropd_mcore.config.teachers import the_teacher

RECIPE = """\
run: {dir: DIR/run, steps: 8}
parallel: {tensor: 2, pipeline: 2}
student: {path: DIR/student}
teacher: {kind: megatron, path: DIR/teacher}
data: {prompts: DIR/prompts.jsonl, teacher_responses: DIR/responses.jsonl}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("DIR", str(tmp_path)))
    return str(path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def processor_time_of_children_s() -> float:
    """Processor time of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_takes_less_than_a_second_of_processor_time_and_lists_every_subcommand():
    """Time on the processor, not on the clock: other processes may be busy."""
    fastest = 10.0
    for _ in range(3):
        start = processor_time_of_children_s()
        result = subprocess.run(
            [sys.executable, "-m", "tropd_mcore.cli.main", "--help"], capture_output=True, text=True, timeout=300
        )
        fastest = min(fastest, processor_time_of_children_s() - start)
    assert result.returncode == 0 and fastest < 1.0
    for name in cli.COMMANDS:
        assert re.search(rf"^\s+{name}\s", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_a_subcommand_imports_no_tensor_library(name):
    code = (
        "import sys; from tropd_mcore.cli.main import main\n"
        "try: main([sys.argv[1], '--help'])\n"
        "except SystemExit as error: assert error.code == 0\n"
        "assert not {'torch', 'megatron', 'transformers', 'aiohttp', 'sglang'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert f"usage: tropd {name}" in result.stdout


def test_a_user_error_is_reported_without_traceback_and_with_exit_code_2(capsys, recipe):
    code, out, err = run(capsys, "config", recipe, "run.stps=4", "rollout.top_k=x")
    assert (code, out) == (2, "")
    assert err.startswith("error: command line: run.stps: unknown key; did you mean run.steps?\n")
    assert len(err.splitlines()) == 2 and "Traceback" not in err


@pytest.mark.parametrize("arguments", [[], ["nope"], ["convert"], ["config", "a.yaml", "--nope"]])
def test_a_wrong_command_line_is_refused_with_the_usage(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: tropd" in capsys.readouterr().err


def test_a_mistyped_command_is_answered_with_the_likely_one(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["trian", "a.yaml"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith("tropd: error: trian: no such command; did you mean train?\n")


def test_a_closed_output_pipe_ends_the_command_silently():
    command = f"{sys.executable} -m tropd_mcore.cli.main config --explain | head -1"
    found = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=300)
    assert found.stdout.count("\n") == 1 and found.stderr == "" and found.returncode in (0, 141)


def test_config_prints_every_key_with_its_source_as_a_valid_configuration(capsys, recipe, tmp_path):
    code, out, _ = run(capsys, "config", recipe, "run.steps=3")
    assert code == 0 and "  steps: 3  # command line\n" in out
    again = tmp_path / "again.yaml"
    again.write_text(out)
    assert load(again, [])[0] == load(recipe, ["run.steps=3"])[0]


def test_config_can_check_a_file_print_the_plan_and_count_ranks(capsys, recipe):
    assert run(capsys, "config", recipe, "--check") == (0, "", "")
    code, out, _ = run(capsys, "config", recipe, "--dry-run", "--world-size", "12")
    assert code == 0 and "dp 3 = 12 ranks" in out
    assert run(capsys, "config", recipe, "--dry-run", "--ranks-per-node", "1") == (0, "4\n", "")
    assert run(capsys, "config", recipe, "--ranks-per-node", "2", "parallel.data=3") == (0, "6\n", "")
    code, _, err = run(capsys, "config", recipe, "--ranks-per-node", "5", "parallel.data=3")
    assert code == 2 and "12 ranks do not divide over 5 machines" in err
    code, _, err = run(capsys, "config", recipe, "--world-size", "6")
    assert code == 2 and "tp*pp*cp = 2*2*1 = 4 does not divide the 6 ranks of this launch" in err


def test_an_interrupt_exits_with_130_and_no_traceback(capfd, recipe, monkeypatch):
    def interrupt(options: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("tropd_mcore.cli.config_command.run", interrupt)
    assert run(capfd, "config", recipe) == (130, "", "interrupted\n")


def settings_of_teacher(recipe, *overrides):
    config = load(recipe, list(overrides))[0]
    return teacher_settings(config, the_teacher(config))


def test_prefixes_starts_its_own_server_for_a_teacher_in_the_training_job(recipe):
    (server,) = settings_of_teacher(
        recipe, "rollout.server.url=http://127.0.0.1:1", "teacher.dtype=float32", "rollout.server.max_retries=7"
    )
    assert server.url is None and server.port is None and server.dtype is None and server.max_retries == 7
    (served,) = settings_of_teacher(recipe, "teacher={kind: sglang, path: t, server: {port: 5}}")
    assert served.port == 5


def test_prefixes_starts_as_many_servers_as_the_job_has_on_this_machine(recipe):
    entries = "[{port: 4}, {url: 'http://h:1'}, {node: 1}, {threads: 2}]"
    first, second = settings_of_teacher(recipe, f"rollout.servers={entries}")
    assert (first.port, second.threads) == (None, 2) and first.url is second.url is None
    served = settings_of_teacher(recipe, "teacher={kind: sglang, path: t, servers: [{url: 'http://h:1'}, {port: 5}]}")
    assert [server.url for server in served] == ["http://h:1", None]


def test_prefixes_without_an_output_file_names_the_key(capsys, recipe):
    overrides = ["data.teacher_responses=null", "objective.guidance.enabled=false"]
    code, _, err = run(capsys, "prefixes", recipe, *overrides)
    assert code == 2 and "set data.teacher_responses or give --out" in err


def test_report_writes_one_file_into_the_run_directory_and_refuses_a_missing_one(capsys, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 0, "loss/trusted": 0.5}\n{"step": 1, "loss/trusted": 0.25}\n')
    code, out, err = run(capsys, "report", str(run_dir))
    assert (code, out) == (0, f"{run_dir / 'report.html'}\n")
    assert err.endswith(
        "config.resolved.yaml: not found, so it is unknown what the run trained, and its hints are left out\n"
    )
    assert "Loss by region" in (run_dir / "report.html").read_text()
    code, _, err = run(capsys, "report", str(tmp_path / "none"))
    assert code == 2 and err.startswith(f"error: {tmp_path / 'none'}: expected the run directory")


def test_eval_needs_a_verifier_and_a_model(capsys, recipe, tmp_path):
    code, _, err = run(capsys, "eval", recipe, "--prompts", "p.jsonl")
    assert code == 2 and "verifier.kind is none; set verifier.kind to exact_match or math_verify" in err
    code, _, err = run(capsys, "eval", recipe, "verifier.kind=exact_match", "--prompts", "p.jsonl")
    assert code == 2 and f"no model folder at {tmp_path / 'run' / 'export'}; give --model" in err
    arguments = ["--prompts", "p.jsonl", "--compare-with", str(tmp_path / "none.json")]
    code, _, err = run(capsys, "eval", recipe, "verifier.kind=exact_match", *arguments)
    assert code == 2 and "none.json: not found; expected a result of `tropd eval`" in err


def test_convert_refuses_a_comparison_without_a_second_model_and_a_parallel_size_of_zero(capsys):
    code, _, err = run(capsys, "convert", "verify", "--hf", "x")
    assert code == 2 and "give --mcore, --other-hf or both" in err
    with pytest.raises(SystemExit):
        cli.main(["convert", "hf-to-mcore", "--hf", "a", "--out", "b", "--tensor", "0"])
    assert "expected a positive number, found '0'" in capsys.readouterr().err
