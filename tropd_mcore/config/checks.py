"""Checks across sections, and checks that need the number of ranks or the lengths in the data.

The range of a single key is checked by `schema`. Invariant: each check returns its problems, one line each, with the
keys to change. Nothing is raised, so all problems can be reported together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tropd_mcore.config.derived import longest_response_at, longest_sample
from tropd_mcore.config.objective_checks import objective_problems
from tropd_mcore.config.phase_checks import of_each_phase, phases_problems
from tropd_mcore.config.router_checks import router_problems
from tropd_mcore.config.schema import Config, LossConfig, ParallelConfig, StudentConfig
from tropd_mcore.config.server_checks import (
    cache_problems,
    rollout_server_problems,
    server_problems,
    shared_problems,
    teacher_server_problems,
)
from tropd_mcore.config.teacher_checks import names_problems, several_problems, teacher_problems
from tropd_mcore.config.teachers import teachers_of
from tropd_mcore.config.time_limits import time_limit_problems


def problems_across_sections(config: Config) -> list[str]:
    """Return every problem that the configuration itself shows."""
    return [problem for check in CHECKS for problem in check(config)]


def layout_problems(parallel: ParallelConfig, world_size: int) -> list[str]:
    """Return the conflicts between the parallel section and the number of launched ranks."""
    tensor, pipeline, context, data = parallel.tensor, parallel.pipeline, parallel.context, parallel.data
    model = tensor * pipeline * context
    if data is None:
        if world_size % model == 0:
            return []
        return [
            f"parallel: tp*pp*cp = {tensor}*{pipeline}*{context} = {model} does not divide the {world_size} ranks of "
            f"this launch; launch a multiple of {model} ranks or change parallel.tensor, parallel.pipeline or "
            "parallel.context"
        ]
    total = model * data
    if total == world_size:
        return []
    remedy = f"set parallel.data={world_size // model} or " if world_size % model == 0 else ""
    return [
        f"parallel: tp*pp*cp*dp = {tensor}*{pipeline}*{context}*{data} = {total}, but this launch has "
        f"{world_size} ranks; {remedy}launch {total} ranks"
    ]


def backend_problems(backend: str, platform: str) -> list[str]:
    """Return the conflicts between loss.backend and the platform (`cpu`, `cuda`, or `auto` if it is unknown)."""
    if backend == "triton" and platform == "cpu":
        return ["loss.backend=triton needs CUDA but the platform is cpu; set loss.backend=auto, eager or compile"]
    return []


def data_problems(config: Config, *, longest_prompt: int, longest_response: int) -> list[str]:
    """Return the conflicts between the configuration and the lengths in the data: tokens, responses without EOS."""
    problems = list(of_each_phase(lambda each: _prefixes_are_empty(each, longest_response))(config))
    needed = longest_sample(config, longest_prompt=longest_prompt, longest_response=longest_response)
    budget = config.batch.tokens_per_micro_batch
    if needed <= budget:
        return problems
    prefix = needed - longest_prompt - config.rollout.max_new_tokens
    return [
        *problems,
        f"batch.tokens_per_micro_batch = {budget} but the longest sample can have {longest_prompt} prompt + {prefix} "
        f"prefix + {config.rollout.max_new_tokens} new = {needed} tokens; set batch.tokens_per_micro_batch={needed} or "
        "more, lower rollout.max_new_tokens, or set objective.guidance.continuation_budget=shared",
    ]


def _prefixes_are_empty(config: Config, longest_response: int) -> Iterator[str]:
    """Yield a problem if guidance is on and no stored response is long enough to give a prefix."""
    guidance = config.objective.active_guidance
    if guidance is None or config.run.replay is not None:
        return
    if not longest_response or longest_response > guidance.min_continuation:  # 0: `tropd prefixes` has not run yet
        return
    lower = f"lower it (to {longest_response // 4 or 1}, for example), or " if longest_response > 1 else ""
    yield (
        f"objective.guidance.min_continuation = {guidance.min_continuation} leaves that many tokens of each response "
        f"to the student, but the longest response in data.teacher_responses has {longest_response}, so no sample "
        f"would get a prefix; {lower}set objective.guidance.enabled=false"
    )


def self_teacher_problems(config: Config, *, longest_prompt: int, context: int) -> list[str]:
    """Return the problems that leave no room for a solution between prompt and response, with lengths in tokens.

    `longest_prompt` is the teacher's longest prompt with an empty solution. `context` is the student's context length.
    """
    needed = longest_prompt + config.rollout.max_new_tokens
    budget = config.batch.tokens_per_micro_batch
    reads = (
        f"the teacher of objective.kind={config.objective.kind} can read {longest_prompt} prompt and template + "
        f"{config.rollout.max_new_tokens} response = {needed} tokens, and a solution"
    )
    problems = []
    if needed >= budget:
        problems.append(
            f"batch.tokens_per_micro_batch = {budget} but {reads}; set batch.tokens_per_micro_batch="
            f"{needed + config.rollout.max_new_tokens} for the longest solution, or lower rollout.max_new_tokens"
        )
    if needed >= context:
        problems.append(
            f"student.path={config.student.path}: its context is {context} tokens but {reads}; lower "
            "rollout.max_new_tokens, shorten objective.template or choose another model"
        )
    return problems


def _parallel(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.virtual_pipeline is not None and parallel.pipeline < 2:
        yield (
            f"parallel.virtual_pipeline = {parallel.virtual_pipeline} needs parallel.pipeline >= 2, "
            f"found {parallel.pipeline}; remove it or set parallel.pipeline=2"
        )
    if parallel.virtual_pipeline == 1:
        yield (
            "parallel.virtual_pipeline = 1 is one chunk per stage, so nothing is interleaved; remove it or set 2 or "
            "more"
        )
    if parallel.sequence_parallel and parallel.tensor < 2:
        yield (
            "parallel.sequence_parallel needs parallel.tensor >= 2, found 1; "
            "set parallel.sequence_parallel=false or parallel.tensor=2"
        )


def _guidance(config: Config) -> Iterator[str]:
    guidance = config.objective.active_guidance
    if guidance is not None and config.data.teacher_responses is None:
        yield (
            "objective.guidance.enabled needs data.teacher_responses, which is not set; "
            "write the file with `tropd prefixes`, or set objective.guidance.enabled=false"
        )
    if not config.objective.samples and config.data.teacher_responses is None:
        yield (
            f"objective.kind={config.objective.kind} needs data.teacher_responses, which is not set; write the "
            "file with `tropd prefixes`"
        )
    new_tokens = longest_response_at(0, config)
    if guidance is not None and guidance.continuation_budget == "shared" and guidance.min_continuation >= new_tokens:
        key = "max_new_tokens" if config.rollout.truncate is None else "truncate.start"
        yield (
            f"objective.guidance.min_continuation = {guidance.min_continuation} leaves no room for a prefix within the "
            f"shared rollout.{key} = {new_tokens}; lower the one or raise the other"
        )


def _policy_gradient(config: Config) -> Iterator[str]:
    correction = config.objective.policy
    if correction.icepop_low >= correction.icepop_high:
        yield (
            f"objective.policy_gradient: icepop_low = {correction.icepop_low} must be below "
            f"icepop_high = {correction.icepop_high}"
        )
    if correction.mini_batches > config.rollout.prompts_per_step:
        yield (
            f"objective.policy_gradient.mini_batches = {correction.mini_batches} is more than the "
            f"rollout.prompts_per_step = {config.rollout.prompts_per_step} prompts that it divides; lower it"
        )


def _rollout(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.top_k != -1 and rollout.top_k < 1:
        yield f"rollout.top_k = {rollout.top_k}: expected -1 (off) or at least 1"
    if rollout.truncate is not None and rollout.truncate.start >= rollout.max_new_tokens:
        yield (
            f"rollout.truncate.start = {rollout.truncate.start} cuts nothing off rollout.max_new_tokens = "
            f"{rollout.max_new_tokens}; lower it or remove rollout.truncate"
        )


def _packs(config: Config) -> Iterator[str]:
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if config.batch.tokens_per_micro_batch < longest:
        yield (
            f"batch.tokens_per_micro_batch = {config.batch.tokens_per_micro_batch} is below data.max_prompt_tokens + "
            f"rollout.max_new_tokens = {longest}; raise it or lower those"
        )


def _loss(config: Config) -> Iterator[str]:
    loss = config.loss
    if loss.form == "logits" and loss.overlap_chunks:
        yield (
            "loss.overlap_chunks has no effect with loss.form=logits, which computes no logits chunk by chunk; "
            "remove it or set loss.form=fused"
        )
    elif loss.overlap_chunks and loss.weight_gradient == "recompute":
        yield (
            "loss.overlap_chunks has no effect with loss.weight_gradient=recompute, which waits for each chunk's "
            "all-reduce; remove it or set weight_gradient=deferred or folded"
        )
    elif loss.overlap_chunks and config.parallel.tensor < 2:
        yield (
            "loss.overlap_chunks hides an all-reduce between tensor ranks, found parallel.tensor = 1; "
            "remove it, which saves the memory of a chunk"
        )
    if loss.form == "logits" and loss.weight_gradient != LossConfig().weight_gradient:
        yield (
            f"loss.weight_gradient={loss.weight_gradient} has no effect with loss.form=logits, whose weight gradient "
            "is Megatron's; remove it"
        )


def _recompute(config: Config) -> Iterator[str]:
    student, fields = config.student, StudentConfig.model_fields
    for key, needed in (("recompute_modules", "selective"), ("recompute_layers", "full")):
        value = getattr(student, key)
        if student.recompute != needed and value != fields[key].default:
            yield (
                f"student.{key} has no effect with student.recompute={student.recompute}; remove it, or set "
                f"student.recompute={needed}"
            )
    if not student.recompute_modules:
        yield "student.recompute_modules is empty, so nothing is recomputed; set student.recompute=none"


def _backend(config: Config) -> Iterator[str]:
    yield from backend_problems(config.loss.backend, config.platform.kind)


def _weight_gradient(config: Config) -> Iterator[str]:
    if config.objective.full_vocabulary_divergence is not None and config.loss.weight_gradient == "recompute":
        yield (
            "loss.weight_gradient=recompute cannot be combined with objective.full_vocabulary, whose gradient is made "
            "in the forward pass; set deferred or folded"
        )


def _warmup(config: Config) -> Iterator[str]:
    optimizer, updates = config.optimizer, config.objective.updates_per_step
    if optimizer.warmup_steps > config.run.steps * updates:
        each = f" of {updates} optimizer steps each" if updates > 1 else ""
        yield (
            f"optimizer.warmup_steps = {optimizer.warmup_steps} is more than run.steps = {config.run.steps}{each}; "
            "lower it or raise run.steps"
        )


def _rates(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield (
            f"optimizer.min_learning_rate = {optimizer.min_learning_rate} is above "
            f"optimizer.learning_rate = {optimizer.learning_rate}"
        )


def _adam(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    for name in ("beta1", "beta2"):
        if getattr(optimizer, name) == 1.0:
            yield f"optimizer.{name} = 1 never forgets the first gradient; expected less than 1"


def _overlap(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    if optimizer.overlap_param_gather and not (optimizer.distributed and optimizer.overlap_grad_reduce):
        yield "optimizer.overlap_param_gather needs optimizer.distributed=true and optimizer.overlap_grad_reduce=true"


def _beginning(config: Config) -> Iterator[str]:
    run = config.run
    if run.init_optimizer and run.init_from is None:
        yield "run.init_optimizer has no effect without run.init_from; set the checkpoint, or remove it"
    if run.init_from is not None and run.init_from.absolute().is_relative_to(run.dir.absolute()):
        yield (
            f"run.init_from={run.init_from} is in run.dir={run.dir}, which resumes by itself; "
            "remove run.init_from, or begin a new run with another run.dir"
        )
    parts = config.objective.parts
    by_default = any(part.reference_folder(Path()) and not getattr(part, "reference", None) for part in parts)
    if run.init_from is not None and by_default:
        yield (
            f"objective.reference: its default is student.path={config.student.path}, which is not what "
            "run.init_from begins with; name the reference: that folder, or an export of the checkpoint"
        )


def _replay(config: Config) -> Iterator[str]:
    if config.run.replay == config.run.dir:
        yield f"run.replay and run.dir are both {config.run.dir}; replay another run, or remove run.replay to resume"
    if config.run.replay is not None and not config.objective.samples:
        yield (
            f"run.replay: objective.kind={config.objective.kind} trains on data.teacher_responses and on no rollouts; "
            "remove the key"
        )


def _pattern(config: Config) -> Iterator[str]:
    try:
        groups = re.compile(config.verifier.pattern).groups
    except re.error as error:
        yield f"verifier.pattern: not a regular expression: {error}; found {config.verifier.pattern!r}"
    else:
        if groups < 1:
            yield f"verifier.pattern: expected a group that holds the answer, found none in {config.verifier.pattern!r}"


def _home(key: str) -> Callable[[Config], Iterator[str]]:
    """The check of one path, in which `~` is not expanded."""

    def check(config: Config) -> Iterator[str]:
        section, _, name = key.partition(".")
        path = getattr(getattr(config, section), name, None)
        if path is not None and str(path).startswith("~"):
            yield f"{key}: `~` is not expanded here; write the whole path instead of {str(path)!r}"

    return check


def _homes_of_teachers(config: Config) -> Iterator[str]:
    """The same check of the paths of `teachers`."""
    for teacher in teachers_of(config):
        if teacher.name is not None and str(teacher.path).startswith("~"):
            yield f"{teacher.path_key}: `~` is not expanded here; write the whole path instead of {str(teacher.path)!r}"


PATHS = (
    "run.dir",
    "run.replay",
    "run.init_from",
    "student.path",
    "teacher.path",
    "data.prompts",
    "data.teacher_responses",
    "held_out.prompts",
    "held_out.responses",
    "objective.reference",
)

CHECKS: tuple[Callable[[Config], Iterable[str]], ...] = (
    _parallel,
    phases_problems,
    of_each_phase(objective_problems),
    of_each_phase(_guidance),
    of_each_phase(_policy_gradient),
    _rollout,
    cache_problems,
    _packs,
    _backend,
    _recompute,
    _loss,
    of_each_phase(_weight_gradient),
    rollout_server_problems,
    router_problems,
    teacher_server_problems,
    teacher_problems,
    names_problems,
    of_each_phase(several_problems),
    shared_problems,
    server_problems,
    _warmup,
    _rates,
    _adam,
    _overlap,
    _beginning,
    time_limit_problems,
    _replay,
    _pattern,
    *(_home(key) for key in PATHS),
    _homes_of_teachers,
)
"""Every check across sections. Each reads few values, because a check that needs a wrong value is left out."""
