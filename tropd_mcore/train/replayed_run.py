"""Do the rollouts of `run.replay` mean here what they meant where they were sampled?

Not for their scores, which are used for the same teacher alone (`score_source`), or for the log-probs, which the
sampler gate compares. Invariant: ids that another tokenizer made are refused; what else differs is said.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tropd_mcore.config.loader import leaves
from tropd_mcore.config.record import Change, read_record
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import DataError
from tropd_mcore.teacher.vocabulary import check_same_vocabulary
from tropd_mcore.train.inputs import Inputs, load_inputs
from tropd_mcore.train.run_dir import RunDir

log = logging.getLogger(__name__)

COMPARED = (
    "rollout.temperature",
    "rollout.top_p",
    "rollout.top_k",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
)
"""Keys that decided the stored rollouts and that this run's own value does not change any more."""


def check_replayed(config: Config, now: Inputs) -> None:
    """Print what differs between the replayed run and this one; nothing where `run.replay` is not set.

    Raises DataError where its student had another vocabulary, ConfigError where its records are damaged.
    """
    if config.run.replay is None:
        return
    other = RunDir(config.run.replay)
    there = load_inputs(other)
    if there is None:
        _say(
            config, f"no {other.inputs.name} there: whether its prompts and its student are those of here is not known"
        )
    else:
        _compare_student(config, there, now)
        theirs, ours = there.data["data.prompts"], now.data["data.prompts"]
        if theirs.sha256 != ours.sha256:
            _say(config, f"its rollouts answer other prompts: {theirs.path} there, {ours.path} here")
    for change in _other_sampling(config, other):
        _say(config, f"its rollouts were sampled otherwise, here {change} has no effect")


def _compare_student(config: Config, there: Inputs, now: Inputs) -> None:
    theirs, ours = there.models["student.path"], now.models["student.path"]
    if theirs.digest.tokenizer() != ours.digest.tokenizer():
        folder = Path(theirs.path)
        if theirs.files.get("tokenizer.json") == ours.files.get("tokenizer.json"):
            _say(config, f"settings of its student's tokenizer differ: {folder} there, {config.student.path} here")
        elif (folder / "config.json").is_file():
            check_same_vocabulary(config.student.path, folder, key="run.replay")
        else:
            raise DataError(
                f"run.replay={config.run.replay}: its rollouts are ids of another tokenizer.json than that of "
                f"student.path={config.student.path}, and the student of that run ({folder}) is gone, so the two "
                "cannot be compared; sample rollouts anew without run.replay"
            )
    if theirs.digest.weights() != ours.digest.weights():
        _say(config, f"its rollouts come from another student: {theirs.path} there, {ours.path} here")


def _other_sampling(config: Config, other: RunDir) -> list[Change]:
    text = other.recorded_config()
    if text is None:
        return []
    there, here = read_record(text, str(other.config)).values, leaves(config)
    return [Change(key, there[key], here[key]) for key in COMPARED if there[key] != here[key]]


def _say(config: Config, what: str) -> None:
    log.warning("run.replay=%s: %s", config.run.replay, what)
