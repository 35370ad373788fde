"""Checks that the rollouts of `run.replay` mean the same here as in the run that sampled them.

Their scores are not checked here, because they are used only for the same teacher (`score_source`). Their log-probs are
compared by the sampler gate. Invariant: ids from another tokenizer are refused, and all other differences are reported.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from tropd_mcore.config.loader import leaves
from tropd_mcore.config.record import Change, compare, read_record
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError, DataError
from tropd_mcore.records.run_dir import RunDir
from tropd_mcore.teacher.vocabulary import check_same_vocabulary
from tropd_mcore.train.inputs import DataInput, Inputs, ModelInput, load_inputs

log = logging.getLogger(__name__)

Input = TypeVar("Input", DataInput, ModelInput)

COMPARED = (
    "rollout.temperature",
    "rollout.top_p",
    "rollout.top_k",
    "rollout.prompts_per_step",
    "rollout.samples_per_prompt",
    "rollout.max_new_tokens",
    "rollout.end_tokens",
    "data.chat_template_kwargs",
    "data.template_date",
)
"""Keys and sections that shaped the stored rollouts. This run's own values of them have no effect on these rollouts."""


def check_replayed(config: Config, now: Inputs) -> None:
    """Print the differences between the replayed run and this one. Does nothing if `run.replay` is not set.

    Raises DataError if its student had another vocabulary, and ConfigError if its records are damaged.
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
        _compare_student(config, _recorded(there.models, "student.path", other), now.models["student.path"])
        theirs, ours = _recorded(there.data, "data.prompts", other), now.data["data.prompts"]
        if theirs.sha256 != ours.sha256:
            _say(config, f"its rollouts answer other prompts: {theirs.path} there, {ours.path} here")
    for change in _other_sampling(config, other):
        _say(config, f"its rollouts were sampled with other settings, so here {change} has no effect")


def _recorded(inputs: Mapping[str, Input], key: str, other: RunDir) -> Input:
    if key not in inputs:
        raise ConfigError(
            [f"{other.inputs}: expected {key} in it (edited?); restore it, or remove the file to skip the comparison"]
        )
    return inputs[key]


def _compare_student(config: Config, theirs: ModelInput, ours: ModelInput) -> None:
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
                "cannot be compared; sample new rollouts without run.replay"
            )
    if theirs.digest.weights() != ours.digest.weights():
        _say(config, f"its rollouts come from another student: {theirs.path} there, {ours.path} here")


def _other_sampling(config: Config, other: RunDir) -> list[Change]:
    text = other.recorded_config()
    if text is None:
        return []
    changes = compare(read_record(text, str(other.config)).values, leaves(config))
    return [change for change in changes if any(f"{change.key}.".startswith(f"{key}.") for key in COMPARED)]


def _say(config: Config, what: str) -> None:
    log.warning("run.replay=%s: %s", config.run.replay, what)
