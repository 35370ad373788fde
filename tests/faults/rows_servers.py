"""Faults: a rollout server at a URL that fails, lies, hangs, or is used by another job."""

from __future__ import annotations

import base64
import json
import pickle
import urllib.request
from collections.abc import Callable
from typing import Any

from tests.e2e.jobs import metrics
from tests.faults.lies import (
    ESCAPE,
    HTML,
    ONCE,
    Prepare,
    Told,
    each_always,
    each_once,
    hang,
    html,
    lying_sampler,
    one_rank,
    raw_controls,
    reset,
    status,
    whole_run,
)
from tests.faults.scene import Scene
from tests.faults.stage import END, SAMPLES, VOCABULARY
from tests.faults.told_rows import lied_about, told_once
from tests.faults.verdict import Fault, Seen
from tests.liars import Body, Forward, Liar, Lie, is_sampling, nothing_done, sampling_lies, twisted

Play = Callable[[Scene], Seen]
MANY = 16
"""Prompts of a step with lies about single samples. At most a quarter of the samples may be affected."""
LIES = sampling_lies(vocab_size=VOCABULARY, end=END)
PROOF_UPDATES = 2
"""Updates before the first step, which prove that an update sets every weight."""


def once(name: str) -> Play:
    """One transient failure. All of them happen in one run, each for one request."""

    def play(scene: Scene) -> Seen:
        if "told" not in scene.shared:
            told: list[Told] = []
            lying_sampler(scene, lambda proxy: told.append(each_once(proxy, ONCE, is_sampling)), steps=3)
            scene.shared |= {"told": told[0], "seen": whole_run(scene)}
        return _copy(scene, [] if scene.shared["told"].times[name] == 1 else [f"{name} was not told"], masked=0)

    return play


def always(name: str) -> Play:
    """One lie about all samples of a prompt. All lies are told in one run."""

    def play(scene: Scene) -> Seen:
        if "told" not in scene.shared:
            told: list[Told] = []
            steps = -(-len(LIES) // (MANY // 4))
            more = (f"rollout.prompts_per_step={MANY}", "objective.guidance.enabled=false")

            def prepare(proxy: Liar) -> None:
                told.append(each_always(proxy, LIES, is_sampling, of=MANY, victims=MANY // 4))

            lying_sampler(scene, prepare, steps=steps, more=more)
            scene.shared |= {"told": told[0], "seen": whole_run(scene)}
        times = scene.shared["told"].times[name]
        problems = [] if times == 2 * SAMPLES else [f"told {times} times"]
        problems += _trained_on(scene, scene.shared["told"].victims.get(name))
        return _copy(scene, problems, masked=SAMPLES * len(LIES))

    return play


def _copy(scene: Scene, problems: list[str], *, masked: int) -> Seen:
    """The observations of the run for one of its faults."""
    seen: Seen = scene.shared["seen"]
    left_out = sum(line["rollout/masked_samples"] for line in metrics(scene.run_dir))
    if left_out != masked:
        problems = [*problems, f"{left_out:g} samples were left out of the run; expected {masked}"]
    return Seen(seen.code, seen.output, seen.seconds, seen.silence, seen.hung, list(seen.left_running), [], problems)


def _trained_on(scene: Scene, ids: tuple[int, ...] | None) -> list[str]:
    """Whether a stored rollout has the prompt that was lied about in its step."""
    from tropd_mcore.records.replay import load_rollouts

    count = 0
    for stored in (scene.run_dir / "rollouts").glob("step_*.npz"):
        count += sum(tuple(rollout.prompt_ids.tolist()) == ids for rollout in load_rollouts(stored))
    return [f"{count} samples that were lied about are stored"] if count else []


def for_ever(prepare: Prepare, *more: str, steps: int = 2) -> Play:
    """A permanent failure. None of its answers may be trained on."""

    def play(scene: Scene) -> Seen:
        lying_sampler(scene, prepare, more=more, steps=steps)
        seen = whole_run(scene)
        done = len(metrics(scene.run_dir))
        if done >= steps:
            seen.lost.append("the run went to its end")
        seen.lost += raw_controls(seen.output)
        return seen

    return play


def after(count: int, path: str, lie: Lie, about: Callable[[Body], bool] = lambda _: True) -> Prepare:
    """Answer the first `count` requests honestly."""

    def prepare(proxy: Liar) -> None:
        asked = 0

        def late(body: Body) -> bool:
            nonlocal asked
            asked += about(body)
            return about(body) and asked > count

        proxy.tell(path, lie, about=late)

    return prepare


async def half(body: Body, forward: Forward) -> Any:
    """An update that loses every second tensor on the way."""
    payloads = [
        base64.b64encode(
            pickle.dumps(pickle.loads(base64.b64decode(payload))[::2])
        ).decode()  # bytes that this project wrote
        for payload in body["serialized_named_tensors"]
    ]
    return await forward(body | {"serialized_named_tensors": payloads})


def _lower(answer: Body) -> None:
    for entry in answer["meta_info"]["output_token_logprobs"]:
        entry[0] -= 0.5


def _relabel(answer: Body) -> None:
    answer["meta_info"]["weight_versions"] = [{"version": "somebody/step-000001"}]


def hangs(proxy: Liar) -> None:
    """From the first sample on the server answers no request, not even for its health."""

    async def first(body: Body, forward: Forward) -> Any:
        proxy.lies["/health"] = proxy.lies["/model_info"] = hang
        return await hang(body, forward)

    proxy.tell("/generate", first, about=is_sampling)


def another_job(scene: Scene) -> Seen:
    """While a step samples, another job publishes its weights to the same server."""
    one_rank(scene, 3)
    launch = scene.job()
    launch.halt("before generate")
    scene.strike(launch)
    body = json.dumps({"new_version": "other/step-000007", "abort_all_requests": False}).encode()
    url = f"{scene.stage.outside('student').url}/update_weight_version"
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=30).close()
    launch.go()
    return scene.end(launch)


def _stops(
    name: str, done: str, play: Play, line: str, *, representative: bool = False, limit_s: float = 120.0
) -> Fault:
    return Fault(
        id=f"server-{name}",
        group="server",
        done=f"the rollout server {done}",
        wanted="exit code 2 and one line with the cause; no step is trained on it",
        play=play,
        line=line,
        limit_s=limit_s,
        shared=True,
        representative=representative,
    )


SAMPLES_OF_A_STEP = 4 * SAMPLES
FAULTS = [
    *told_once("server", "the rollout server", ONCE, once, "asked again with a line that says so; no sample is lost"),
    *lied_about("server", "the rollout server", LIES, always, "asked for once more, left out of the step, counted",
                line="no usable answer|no sense"),
    _stops("503-for-ever", "answers 503 for ever", for_ever(lambda p: p.tell("/generate", status(503))),
           "503.*max_retries"),
    _stops("429-for-ever", "answers 429 for ever", for_ever(lambda p: p.tell("/generate", status(429))),
           "429.*max_retries"),
    _stops("html-for-ever", "answers a web page with status 200", for_ever(lambda p: p.tell("/generate", html)),
           "(?i)text/html.*Sign in|Sign in.*text/html", representative=True),
    _stops("reset-for-ever", "breaks every connection", for_ever(lambda p: p.tell("/generate", reset)),
           "rollout.server.*no connection"),
    _stops("escapes", "answers 400 with terminal escapes and a false second line",
           for_ever(lambda p: p.tell("/generate", status(400, ESCAPE))), "400"),
    _stops("escapes-html", "answers a web page with terminal escapes",
           for_ever(lambda p: p.tell("/generate", status(200, HTML + ESCAPE, "text/html"))), "text/html"),
    _stops("hangs", "at a URL hangs in mid-rollout", for_ever(hangs, "rollout.server.hang_timeout_s=10",
           "rollout.server.request_timeout_s=30", "rollout.server.max_retries=1"), "rollout.server.*(hang|answer)"),
    _stops("update-hangs", "at a URL hangs in an update", for_ever(after(PROOF_UPDATES, "/update_weights_from_tensor",
           hang), "rollout.server.hang_timeout_s=10", "rollout.server.request_timeout_s=15"), "rollout.server"),
    _stops("loads-nothing", "answers success to an update and loads nothing",
           for_ever(after(PROOF_UPDATES, "/update_weights_from_tensor", nothing_done)), "loaded nothing"),
    _stops("loads-half", "loads half of an update", for_ever(after(PROOF_UPDATES, "/update_weights_from_tensor", half)),
           "tensors kept its old value"),
    _stops("update-500", "answers 500 to an update", for_ever(after(PROOF_UPDATES, "/update_weights_from_tensor",
           status(500))), "update_weights_from_tensor.*500|500"),
    _stops("shifts", "reports log-probs half a nat too low", for_ever(after(SAMPLES_OF_A_STEP, "/generate",
           twisted(_lower), is_sampling)), "gates.sampler_logprob"),
    _stops("stale", "samples one answer from another version", for_ever(after(SAMPLES_OF_A_STEP + 3, "/generate",
           twisted(_relabel), is_sampling)), "drawn from weights"),
    _stops("all-lies", "has no usable answer any more", for_ever(after(SAMPLES_OF_A_STEP, "/generate",
           LIES["the id -3"], is_sampling)), "gates.masked_share"),
    _stops("another-job", "gets the weights of another job in mid-step", another_job, "(?i)other/step-000007|label"),
]  # fmt: skip
