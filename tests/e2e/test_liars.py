"""Whole jobs whose servers lie: no false answer is trained on, and the user gets one line that says so.

The servers are real, and the liar is a proxy in front of one of them. `tests/sglang/test_liars.py` tests each kind of
refused answer alone. The table of all lies is in docs/borders.md.
"""

from __future__ import annotations

import base64
import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e import jobs
from tests.liars import (
    Body,
    Forward,
    Liar,
    is_sampling,
    is_scoring,
    liar,
    nothing_done,
    sampling_lies,
    scoring_lies,
    twisted,
)
from tropd_mcore.config.schema import ServerConfig
from tropd_mcore.records.replay import load_rollouts
from tropd_mcore.serving.process import ServerSpec
from tropd_mcore.serving.supervisor import SupervisedServer
from tropd_mcore.weights.architecture import read_architecture

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(jobs.TEST_LIMIT_S)]

PROMPTS, SAMPLES = 16, 4
VICTIMS = 4
"""Prompts of a step that are lied about: a quarter, which is what gates.masked_share allows."""
HONEST_UPDATES = 2
"""The two updates of the proof before the first step."""


@pytest.fixture(scope="module")
def servers(example: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, SupervisedServer]]:
    """One server of the student's and one of the teacher's weights."""
    logs = tmp_path_factory.mktemp("servers")
    config = ServerConfig(dtype="float32", max_total_tokens=16384, start_timeout_s=jobs.LIMIT_S)
    running = {
        name: SupervisedServer(
            ServerSpec(
                f"{name}.server",
                f"{name}.path",
                example / name,
                config,
                device="cpu",
                run_dir=logs,
                name=name,
                extra_env={"TROPD_SERVER_KEY": ""},  # jobs use them by URL, without a key
            )
        )
        for name in ("student", "teacher")
    }
    try:
        for server in running.values():
            server.start()
        for server in running.values():
            server.wait_ready()
        yield running
    finally:
        for server in running.values():
            server.stop()


@pytest.fixture
def short(settings: list[str]) -> list[str]:
    """Overrides of a job of one rank."""
    return [
        *settings,
        "parallel.tensor=1",
        f"rollout.prompts_per_step={PROMPTS}",
        f"rollout.samples_per_prompt={SAMPLES}",
        "run.checkpoint_every=100",
        "run.export_at_end=false",
    ]


def rollouts_at(url: str) -> list[str]:
    """Overrides for a rollout server that runs elsewhere."""
    return [f"rollout.server.url={url}", "rollout.server.max_total_tokens=null"]


def steps_trained(run_dir: Path) -> int:
    return len(jobs.metrics(run_dir))


def last_line(output: str) -> str:
    """The line that the job ends with."""
    return next(line for line in output.splitlines() if line.startswith("error:"))


def test_samples_that_the_server_lies_about_are_left_out_of_every_step(
    short: list[str], servers: dict[str, SupervisedServer], example: Path, tmp_path: Path
) -> None:
    """Each lie about all samples of one prompt, for as many prompts per step as may be left out."""
    width = read_architecture(example / "student").vocab_size
    lies = list(sampling_lies(vocab_size=width, end=2).values())
    steps = -(-len(lies) // VICTIMS)
    victims: dict[tuple[int, ...], int] = {}
    """Prompts that are lied about, and the lie."""
    seen: dict[tuple[int, ...], None] = {}

    async def lie(body: Body, forward: Forward) -> Any:
        ids = tuple(body["input_ids"])
        step = len(seen) // PROMPTS
        if ids not in seen and len(victims) < min(len(lies), (step + 1) * VICTIMS):
            victims[ids] = len(victims)
        seen[ids] = None
        if ids not in victims:
            return await forward(body)
        proxy.told += 1
        return await lies[victims[ids]](body, forward)

    with liar(servers["student"].client.url) as proxy:
        proxy.lies["/generate"] = lie
        run_dir = tmp_path / "run"
        overrides = [
            *short,
            f"run.steps={steps}",
            *rollouts_at(proxy.url),
            "objective.guidance.enabled=false",
        ]
        output = jobs.run(run_dir, *overrides, ranks=1)
    assert len(victims) == len(lies) and proxy.told == 2 * SAMPLES * len(lies)
    lines = jobs.metrics(run_dir)
    assert sum(line["rollout/masked_samples"] for line in lines) == SAMPLES * len(lies)
    assert output.count("samples have no usable answer, asked for twice") == steps
    for step in range(steps):
        rollouts = load_rollouts(run_dir / "rollouts" / f"step_{step:06d}.npz")
        assert not {tuple(rollout.prompt_ids.tolist()) for rollout in rollouts} & victims.keys()
        assert all(((r.response_ids >= 0) & (r.response_ids < width)).all() for r in rollouts)
        assert all((r.rollout_logp <= 1e-3).all() and np.isfinite(r.rollout_logp).all() for r in rollouts)
        assert lines[step]["tokens/student"] == sum(len(r.response_ids) for r in rollouts)


def test_samples_whose_scores_are_lies_are_left_out_of_the_loss(
    short: list[str], servers: dict[str, SupervisedServer], example: Path, tmp_path: Path
) -> None:
    """Each lie about the scores of one sample that differs from all other samples of its step."""
    lies = list(scoring_lies(vocab_size=read_architecture(example / "teacher").vocab_size).values())
    most = PROMPTS * SAMPLES // 4
    run_dir = tmp_path / "run"
    victims: dict[tuple[int, ...], int] = {}
    """Samples that are lied about, and the lie."""
    chosen: set[Path] = set()

    def choose(stored: Path) -> None:
        """Take victims from the rollouts of a step that were just stored, before they are scored."""
        counts = Counter(tuple(rollout.token_ids.tolist()) for rollout in load_rollouts(stored))
        single = [ids for ids, count in counts.items() if count == 1]
        for ids in single[: min(most, len(lies) - len(victims))]:
            victims[ids] = len(victims)
        chosen.add(stored)

    async def lie(body: Body, forward: Forward) -> Any:
        if not is_scoring(body) or not body.get("top_logprobs_num"):
            return await forward(body)
        for stored in set((run_dir / "rollouts").glob("step_*.npz")) - chosen:
            choose(stored)
        ids = tuple(body["input_ids"])
        if ids not in victims:
            return await forward(body)
        proxy.told += 1
        return await lies[victims[ids]](body, forward)

    with liar(servers["teacher"].client.url) as proxy:
        proxy.lies["/generate"] = lie
        served = ["teacher.kind=sglang", f"teacher.server.url={proxy.url}", "objective.guidance.enabled=false"]
        student = [*rollouts_at(servers["student"].client.url), "rollout.temperature=1.5"]
        jobs.run(run_dir, *short, "run.steps=4", *student, *served, ranks=1)
    assert len(victims) == len(lies) and proxy.told == 2 * len(lies)
    lines = jobs.metrics(run_dir)
    assert sum(line["teacher/masked_samples"] for line in lines) == len(lies)
    for step, line in enumerate(lines):
        rollouts = load_rollouts(run_dir / "rollouts" / f"step_{step:06d}.npz")
        kept = [rollout for rollout in rollouts if tuple(rollout.token_ids.tolist()) not in victims]
        assert len(rollouts) == PROMPTS * SAMPLES and line["teacher/masked_samples"] == len(rollouts) - len(kept)
        assert line["tokens/student"] == sum(len(rollout.response_ids) for rollout in kept)


def loads_nothing(proxy: Liar) -> None:
    """Updates after the proof answer success and load nothing."""
    _after(proxy, HONEST_UPDATES, "/update_weights_from_tensor", nothing_done)


def loads_nothing_and_forges_checksums(proxy: Liar) -> None:
    """The same, and every checksum changes with the number of updates, as if they had been loaded."""
    loads_nothing(proxy)

    def forged(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: forged(item) for key, item in value.items()}
        if isinstance(value, list):
            return [forged(item) for item in value]
        if isinstance(value, str) and len(value) >= 16:
            updates = sum(path == "/update_weights_from_tensor" for path, _ in proxy.asked)
            return hashlib.sha256(f"{value} {max(updates, HONEST_UPDATES)}".encode()).hexdigest()
        return value

    async def lie(body: Body, forward: Forward) -> Any:
        answer = await forward(body)
        updates = sum(path == "/update_weights_from_tensor" for path, _ in proxy.asked)
        return forged(answer) if updates > HONEST_UPDATES and body["action"] == "checksum" else answer

    proxy.lies["/weights_checker"] = lie


def loads_half(proxy: Liar) -> None:
    """Updates after the proof lose every second tensor on the way."""

    async def lie(body: Body, forward: Forward) -> Any:
        payloads = [
            base64.b64encode(
                pickle.dumps(pickle.loads(base64.b64decode(payload))[::2])
            ).decode()  # bytes that this project wrote
            for payload in body["serialized_named_tensors"]
        ]
        return await forward(body | {"serialized_named_tensors": payloads})

    _after(proxy, HONEST_UPDATES, "/update_weights_from_tensor", lie)


def keeps_its_cache(proxy: Liar) -> None:
    """The cache of the old weights is never flushed."""
    proxy.lies["/flush_cache"] = nothing_done


def shifts_log_probs(proxy: Liar) -> None:
    """From the second step on, every log-prob is half a nat too low: possible values, but wrong."""

    def lower(answer: Body) -> None:
        for entry in answer["meta_info"]["output_token_logprobs"]:
            entry[0] -= 0.5

    _after(proxy, PROMPTS * SAMPLES, "/generate", twisted(lower), is_sampling)


def names_another_version(proxy: Liar) -> None:
    """One answer in the second step was sampled from other weights."""

    def relabel(answer: Body) -> None:
        answer["meta_info"]["weight_versions"] = [{"version": "somebody/step-000001"}]

    _after(proxy, PROMPTS * SAMPLES + 5, "/generate", twisted(relabel), is_sampling)


def lies_about_every_sample(proxy: Liar) -> None:
    """From the second step on, no answer can be used."""
    lie = sampling_lies(vocab_size=300, end=2)["the id -3"]
    _after(proxy, PROMPTS * SAMPLES, "/generate", lie, is_sampling)


def _after(
    proxy: Liar, honest: int, path: str, lie: Callable[..., Any], about: Callable[[Body], bool] = lambda _: True
) -> None:
    """Tell `lie` about the requests to `path` that `about` selects, after the first `honest` ones."""
    count = 0

    def is_late(body: Body) -> bool:
        nonlocal count
        count += about(body)
        return about(body) and count > honest

    proxy.tell(path, lie, about=is_late)


@pytest.mark.parametrize(
    ("lie", "line", "trained"),
    [
        (loads_nothing, r"rollout.server: the server took an update .* answered success and loaded nothing", 1),
        (loads_half, r"rollout.server: \d+ of the server's \d+ tensors kept its old value.*arrived in part", 1),
        (loads_nothing_and_forges_checksums, r"gates.sampler_logprob: .*", 1),
        (keeps_its_cache, r"gates.sampler_logprob: .*", 1),
        (shifts_log_probs, r"gates.sampler_logprob: .*", 1),
        (names_another_version, r"was drawn from weights \['somebody/step-000001'\]; expected", 1),
        (lies_about_every_sample, r"64 of 64 samples have no usable answer.*gates.masked_share=0.25", 1),
    ],
    ids=lambda value: getattr(value, "__name__", None) or "",
)
def test_a_rollout_server_that_lies_from_the_second_step_on_stops_the_run_before_it_trains_on_it(
    short: list[str],
    servers: dict[str, SupervisedServer],
    tmp_path: Path,
    lie: Callable[[Liar], None],
    line: str,
    trained: int,
) -> None:
    run_dir = tmp_path / "run"
    with liar(servers["student"].client.url) as proxy:
        lie(proxy)
        code, output = jobs.attempt(run_dir, *short, *rollouts_at(proxy.url), ranks=1)
    assert code == 2, output[-3000:]
    with pytest.raises(AssertionError, match=line):
        raise AssertionError(last_line(output))
    assert steps_trained(run_dir) == trained


@pytest.mark.parametrize("served", ["student", "teacher"])
def test_a_teacher_url_that_serves_the_student_is_refused_before_the_first_step(
    short: list[str], servers: dict[str, SupervisedServer], tmp_path: Path, served: str
) -> None:
    with liar(servers[served].client.url) as proxy:
        overrides = [*short, "run.steps=1", "teacher.kind=sglang", f"teacher.server.url={proxy.url}"]
        code, output = jobs.attempt(tmp_path / "run", *overrides, ranks=1)
    if served == "teacher":
        assert code == 0, output[-3000:]
        assert "fingerprint from teacher.path" in output
        return
    assert code == 2 and "serves" in last_line(output), output[-3000:]
    assert "gates.teacher_identity" in last_line(output) and steps_trained(tmp_path / "run") == 0


def test_a_teacher_that_becomes_another_model_in_mid_run_stops_the_run(
    short: list[str], servers: dict[str, SupervisedServer], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    student = rollouts_at(servers["student"].client.url)
    with liar(servers["teacher"].client.url) as proxy:
        overrides = [
            *short,
            *student,
            "teacher.kind=sglang",
            f"teacher.server.url={proxy.url}",
            "teacher.check_every=1",
        ]
        process = jobs.start(run_dir, *overrides, ranks=1)
        try:
            jobs.wait_for(lambda: steps_trained(run_dir) >= 2, process)
            proxy.upstream = servers["student"].client.url
            code = process.wait(timeout=jobs.LIMIT_S)
        finally:
            jobs.kill(process)
    output = run_dir.with_suffix(".log").read_text()
    assert code == 2, output[-3000:]
    assert "serves another model than at the start of this launch" in last_line(output)
    assert not list((run_dir / "checkpoints").glob("step_*"))
