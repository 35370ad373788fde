"""Faults: a teacher at a URL that fails, lies, is a different model, or becomes one."""

from __future__ import annotations

from collections.abc import Callable

from tests.e2e.jobs import metrics
from tests.faults.lies import (
    ONCE,
    Prepare,
    Told,
    each_always,
    each_once,
    hang,
    lying_teacher,
    reset,
    status,
    whole_run,
)
from tests.faults.scene import Scene
from tests.faults.stage import VOCABULARY
from tests.faults.told_rows import lied_about, told_once
from tests.faults.verdict import Fault, Seen
from tests.liars import Body, Liar, is_scoring, scoring_lies

Play = Callable[[Scene], Seen]
LIES = scoring_lies(vocab_size=VOCABULARY)
PASSING = {name: lie for name, lie in ONCE.items() if name not in ("abort", "slow")}
OF = 16
"""Samples of a step with lies about single samples. At most a quarter of them may be affected."""


def scored_rollout(scene: Scene) -> Callable[[Body], bool]:
    """Selects requests for the scores of a step. Other requests check the teacher's identity."""
    rollouts = scene.run_dir / "rollouts"

    def about(body: Body) -> bool:
        return is_scoring(body) and bool(body.get("top_logprobs_num")) and any(rollouts.glob("step_*.npz"))

    return about


def once(name: str) -> Play:
    """One transient failure. All happen in one run."""

    def play(scene: Scene) -> Seen:
        if "told" not in scene.shared:
            told: list[Told] = []
            about = scored_rollout(scene)
            lying_teacher(scene, lambda proxy: told.append(each_once(proxy, PASSING, about)), steps=3)
            scene.shared |= {"told": told[0], "seen": whole_run(scene)}
        return _copy(scene, [] if scene.shared["told"].times[name] == 1 else [f"{name} was not told"], masked=0)

    return play


def always(name: str) -> Play:
    """One lie about the scores of one sample. All are told in one run."""

    def play(scene: Scene) -> Seen:
        if "told" not in scene.shared:
            told: list[Told] = []
            about = scored_rollout(scene)

            def prepare(proxy: Liar) -> None:
                told.append(each_always(proxy, LIES, about, of=OF, victims=OF // 4))

            steps = -(-len(LIES) // (OF // 4)) + 1
            more = ("rollout.prompts_per_step=8", "rollout.temperature=1.5")
            lying_teacher(scene, prepare, steps=steps, more=more)
            scene.shared |= {"told": told[0], "seen": whole_run(scene)}
        times = scene.shared["told"].times[name]
        return _copy(scene, [] if times == 2 else [f"told {times} times"], masked=len(LIES))

    return play


def _copy(scene: Scene, problems: list[str], *, masked: int) -> Seen:
    seen: Seen = scene.shared["seen"]
    left_out = sum(line["teacher/masked_samples"] for line in metrics(scene.run_dir))
    if left_out != masked:
        problems = [*problems, f"{left_out:g} samples were left out of the run; expected {masked}"]
    return Seen(seen.code, seen.output, seen.seconds, seen.silence, seen.hung, list(seen.left_running), [], problems)


def for_ever(prepare: Callable[[Scene], Prepare], *more: str, steps: int = 2) -> Play:
    """A permanent failure."""

    def play(scene: Scene) -> Seen:
        lying_teacher(scene, prepare(scene), steps=steps, more=more)
        seen = whole_run(scene)
        if len(metrics(scene.run_dir)) >= steps:
            seen.lost.append("the run went to its end")
        return seen

    return play


def tells(lie: object) -> Callable[[Scene], Prepare]:
    """Tell `lie` about every score of a step."""
    return lambda scene: lambda proxy: proxy.tell("/generate", lie, about=scored_rollout(scene))  # type: ignore[arg-type]


def student_as_teacher(scene: Scene) -> Seen:
    """The teacher's URL is that of the student's server, under another name of the same address."""
    lying_teacher(scene, lambda proxy: None)
    url = scene.stage.outside("student").url.replace("127.0.0.1", "localhost")
    scene.overrides.append(f"teacher.server.url={url}")
    return whole_run(scene)


def becomes_another(scene: Scene) -> Seen:
    """In mid-run the URL of the teacher serves another model."""
    proxy = lying_teacher(scene, lambda proxy: None, steps=6, more=("teacher.check_every=1",))
    launch = scene.job()
    launch.halt("before metrics")
    scene.strike(launch)
    proxy.upstream = scene.stage.outside("student").url
    launch.go()
    return scene.end(launch)


def _stops(name: str, done: str, play: Play, line: str) -> Fault:
    return Fault(
        id=f"teacher-{name}",
        group="teacher",
        done=f"the served teacher {done}",
        wanted="exit code 2 and one line with the cause; no step is trained on it",
        play=play,
        line=line,
        shared=True,
    )


FAULTS = [
    *told_once("teacher", "the served teacher", PASSING, once, "asked again; no sample is lost"),
    *lied_about("teacher", "the served teacher", LIES, always, "asked for once more, left out of the loss, counted"),
    _stops("500-for-ever", "answers 500 for ever", for_ever(tells(status(500)), "teacher.on_failure=stop"), "teacher"),
    _stops("reset-for-ever", "breaks every connection", for_ever(tells(reset)), "teacher.server"),
    _stops("hangs", "hangs in mid-step", for_ever(tells(hang), "teacher.server.hang_timeout_s=10",
           "teacher.server.request_timeout_s=15", "teacher.server.max_retries=1"), "teacher.server|masked_share"),
    _stops("most-fail", "lies about every sample", for_ever(tells(LIES["a score of +3"])), "masked_share"),
    _stops("is-the-student", "is the student's server", student_as_teacher, "gates.teacher_identity.*serves"),
    _stops("becomes-another", "becomes another model in mid-run", becomes_another, "another model"),
]  # fmt: skip
