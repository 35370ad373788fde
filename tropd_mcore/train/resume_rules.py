"""Rules for which keys may change between two launches of a run, and why the others may not.

This module does not find changes (`config.record`) or compare the contents behind paths (`train.inputs`). Invariant:
every key of the schema has a rule here, under its own name or under a section whose keys share one rule. A new key in
any other section needs a rule of its own (`tests/unit/test_resume_rules.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd_mcore.config.explain import of_teacher
from tropd_mcore.config.phases import without_phase


@dataclass(frozen=True)
class Rule:
    """How a changed key is treated in a run that has begun.

    `free`: the change is printed. `refused`: with another value the run would not be the same. `content`: a path; free
    if the content behind it is the recorded one. `verdicts`: refused if the objective learns from the verifier.
    `beginning`: decides how a run starts; refused until the run has a checkpoint of its own, and afterwards
    run.init_from may only be removed.
    """

    kind: Literal["free", "refused", "content", "verdicts", "beginning"]
    reason: str
    """Why a change is refused, or what effect it has; "" if there is nothing to add."""


def free(note: str = "") -> Rule:
    """A change that is printed, with `note`."""
    return Rule("free", note)


def refused(reason: str) -> Rule:
    """A change that is refused, with `reason`."""
    return Rule("refused", reason)


_SAMPLING = refused("the rollouts so far were sampled with the recorded value")
_LOSS = refused("the steps so far minimised another loss")
_ADAM = refused("the moments in the checkpoints were made with the recorded value")
_SCHEDULE = free("the learning rate follows the new schedule from the next optimizer step on")
_ROUNDING = free("the same numbers up to rounding")
_SERVER = free("the same model, served differently")
_TEACHER_PRECISION = refused("another rounding of the teacher is another teacher")
_ARGUMENTS = "arguments such as --quantization or --kv-cache-dtype change the rounding and are not checked here"

RULES: dict[str, Rule] = {
    "run.dir": free("the run directory was moved"),
    "run.steps": free(
        "the learning-rate schedule, the guidance (unless objective.guidance.total_steps is set) and the objective's "
        "own schedule now end there, so their next values jump"
    ),
    "run.seed": refused("prompt order and trust uniforms of the next steps would not be those of this run"),
    "run.checkpoint_every": free(),
    "run.keep_checkpoints": free(),
    "run.export_at_end": free(),
    "run.keep_rollouts": free(),
    "run.keep_scores": free(),
    "run.keep_tokens": free(),
    "run.lock": free(),
    "run.join_timeout_s": free(),
    "run.rank_timeout_s": free(),
    "run.node_timeout_s": free(),
    "run.stall_timeout_s": free(),
    "run.collective_timeout_s": free(),
    "run.replay": refused("the rollouts of the next steps would come from another source"),
    "run.init_from": Rule("beginning", "it names the weights that a run begins with, and this one has begun"),
    "run.init_optimizer": Rule("beginning", "it decides how a run begins, and this one has begun"),
    "run.stop_after": free(),
    "platform": free("other kernels: the same numbers up to rounding"),
    "parallel": free("the same numbers up to rounding; random states are not carried over"),
    "student.path": Rule("content", "the checkpoints hold another student, with its own config and tokenizer"),
    "student.dtype": refused("the checkpoints hold weights of the recorded dtype"),
    "student.recompute": _ROUNDING,
    "student.recompute_modules": _ROUNDING,
    "student.recompute_layers": _ROUNDING,
    "teacher.kind": _SERVER,
    "teacher.path": Rule("content", "the steps so far learned from another teacher"),
    "teacher.dtype": _TEACHER_PRECISION,
    "teacher.pipeline_layers": free("the same layers on other ranks"),
    "teacher.offload": free("the same weights, kept elsewhere"),
    "teacher.server": _SERVER,
    "teacher.server.dtype": _TEACHER_PRECISION,
    "teacher.servers": _SERVER,
    "teacher.server.extra_args": free(f"the teacher's numbers may change: {_ARGUMENTS}"),
    "teacher.extra_tokens": free("the tokens of student and teacher are checked again"),
    "teacher.check_every": free(),
    "teacher.on_failure": free(),
    "teachers": refused("the steps so far learned from the recorded teachers"),
    "data.prompts": Rule("content", "the order of the prompts follows from the whole file"),
    "data.teacher_responses": Rule("content", "the prefixes of the next steps would come from other responses"),
    "data.chat_template_kwargs": refused("the same prompts would be rendered differently"),
    "data.template_date": refused("the same prompts would be rendered differently"),
    "data.max_prompt_tokens": free("a bound on the file, which is checked again"),
    "data.shuffle": refused("the order of the prompts would not be that of this run"),
    "rollout.prompts_per_step": refused("it decides which prompts a step has"),
    "rollout.samples_per_prompt": _SAMPLING,
    "rollout.max_new_tokens": _SAMPLING,
    "rollout.end_tokens": _SAMPLING,
    "rollout.temperature": _SAMPLING,
    "rollout.top_p": _SAMPLING,
    "rollout.top_k": _SAMPLING,
    "rollout.truncate": _SAMPLING,
    "rollout.server": free("the student's weights are published to it as before"),
    "rollout.servers": free("the student's weights are published to them as before"),
    "rollout.router": free("the same weights answer: each answer is checked for their version"),
    "rollout.server.extra_args": free(f"the sampler's numbers may change: {_ARGUMENTS}"),
    "objective": _LOSS,
    "objective.reference": Rule("content", "the steps so far were compared with another reference"),
    "loss.form": _ROUNDING,
    "loss.backend": _ROUNDING,
    "loss.weight_gradient": _ROUNDING,
    "loss.chunk_tokens": _ROUNDING,
    "loss.overlap_chunks": _ROUNDING,
    "loss.logit_softcap": refused("it changes the log-probs of teacher and student"),
    "loss.aggregation": _LOSS,
    "loss.prefix_denominator": _LOSS,
    "loss.ignore_tokens": _LOSS,
    "loss.ignore_first_of": _LOSS,
    "batch.tokens_per_micro_batch": _ROUNDING,
    "optimizer.learning_rate": _SCHEDULE,
    "optimizer.min_learning_rate": _SCHEDULE,
    "optimizer.schedule": _SCHEDULE,
    "optimizer.warmup_steps": _SCHEDULE,
    "optimizer.weight_decay": refused("weights so far were decayed at the recorded rate"),
    "optimizer.beta1": _ADAM,
    "optimizer.beta2": _ADAM,
    "optimizer.eps": _ADAM,
    "optimizer.clip_grad_norm": _ADAM,
    "optimizer.distributed": refused("the checkpoints hold optimizer state in the recorded form"),
    "optimizer.overlap_grad_reduce": _ROUNDING,
    "optimizer.overlap_param_gather": _ROUNDING,
    "verifier": Rule("verdicts", "the steps so far learned from other verdicts"),
    "held_out": free("the curve of held-out responses is measured so from here on"),
    "monitor": free(),
    "gates": free(),
}
"""Dotted key -> rule. A section stands for all of its keys that have no entry of their own."""

WHOLE_SECTIONS = frozenset(
    {
        "platform", "parallel", "teacher.server", "data.chat_template_kwargs", "rollout.truncate", "rollout.server",
        "teacher.servers", "rollout.servers", "rollout.router",
        "objective", "verifier", "held_out", "monitor",
        "gates",
    }
)  # fmt: skip
"""Sections whose keys, including new ones, share one rule unless they have an entry of their own."""


def rule_of(key: str) -> Rule | None:
    """Return the rule of a leaf of the schema, or of a key inside a leaf that holds a mapping; None if it has none."""
    key = of_teacher(without_phase(key))
    if key in RULES:
        return RULES[key]
    parts = key.split(".")
    sections = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
    return next((RULES[section] for section in sections if section in WHOLE_SECTIONS), None)
