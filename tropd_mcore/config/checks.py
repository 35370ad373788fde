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
from tropd_mcore.config.schema import Config, LossConfig, ParallelConfig, ServerConfig

MANAGED_SERVER_ARGS = {
    "--model-path": "student.path or teacher.path",
    "--model": "student.path or teacher.path",
    "--host": "the loopback address of the started server",
    "--port": "server.port",
    "--dtype": "server.dtype",
    "--tp": "server.tensor_parallel",
    "--tp-size": "server.tensor_parallel",
    "--tensor-parallel-size": "server.tensor_parallel",
    "--max-total-tokens": "server.max_total_tokens",
    "--mem-fraction-static": "server.mem_fraction",
    "--api-key": "server.api_key_env",
    "--admin-api-key": "the random key of the started server",
    "--tokenizer-worker-num": "one tokenizer process: SGLang takes no key with several",
    "--grpc-port": "HTTP alone: SGLang's gRPC asks for no key",
    "--smg-grpc-mode": "HTTP alone: SGLang's gRPC asks for no key",
    "--grpc-mode": "HTTP alone: SGLang's gRPC asks for no key",
}
"""Arguments of the SGLang server that must not be in extra_args -> the key or value that sets them."""


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


def _cache(config: Config) -> Iterator[str]:
    rollout, longest = config.rollout, config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if rollout.server.max_total_tokens is not None and rollout.server.max_total_tokens < longest:
        yield (
            f"rollout.server.max_total_tokens = {rollout.server.max_total_tokens} holds less than one request of "
            f"data.max_prompt_tokens + rollout.max_new_tokens = {longest} tokens; raise it or lower those"
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


def _backend(config: Config) -> Iterator[str]:
    yield from backend_problems(config.loss.backend, config.platform.kind)


def _weight_gradient(config: Config) -> Iterator[str]:
    if config.objective.full_vocabulary_divergence is not None and config.loss.weight_gradient == "recompute":
        yield (
            "loss.weight_gradient=recompute cannot be combined with objective.full_vocabulary, whose gradient is made "
            "in the forward pass; set deferred or folded"
        )


def _rollout_server(config: Config) -> Iterator[str]:
    yield from _server("rollout.server", config.rollout.server)


def _teacher_server(config: Config) -> Iterator[str]:
    if config.teacher.kind == "sglang":
        yield from _server("teacher.server", config.teacher.server)


def _both_servers(config: Config) -> Iterator[str]:
    servers = {"rollout.server": config.rollout.server}
    if config.teacher.kind == "sglang":
        servers["teacher.server"] = config.teacher.server
    ports = [server.port for server in servers.values() if server.port is not None]
    if len(ports) != len(set(ports)):
        yield f"rollout.server.port and teacher.server.port are both {ports[0]}; give them different ones or none"
    urls = [server.url for server in servers.values() if server.url is not None]
    if len(urls) != len(set(urls)):
        yield f"rollout.server.url and teacher.server.url are both {urls[0]}; student and teacher need a server each"


OF_A_START = ("python", "port", "tensor_parallel", "max_total_tokens", "mem_fraction", "extra_args", "log_max_mib")
"""Keys of a server section that say how a server is started, so they mean nothing for one that runs."""


def _server(key: str, server: ServerConfig) -> Iterator[str]:
    if server.url is not None:
        if not re.match(r"https?://[^/]+", server.url):
            yield f"{key}.url: expected http://host:port or https://host, found {server.url!r}"
        given = [name for name in OF_A_START if getattr(server, name) != ServerConfig.model_fields[name].default]
        if given:
            yield f"{key}.url names a running server, so {key}.{{{','.join(given)}}} would have no effect; remove one"
    default = ServerConfig.model_fields["hang_timeout_s"].default  # a short request_timeout_s may be below the default
    if server.hang_timeout_s > server.request_timeout_s and server.hang_timeout_s != default:
        yield (
            f"{key}.hang_timeout_s = {server.hang_timeout_s:g} is above {key}.request_timeout_s = "
            f"{server.request_timeout_s:g}, which would end first; lower it or raise that"
        )
    for argument in server.extra_args:
        flag = argument.partition("=")[0]
        if flag in MANAGED_SERVER_ARGS:
            yield f"{key}.extra_args: {flag} is set by {MANAGED_SERVER_ARGS[flag]}; remove it there"


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


def _timeouts(config: Config) -> Iterator[str]:
    run = config.run
    for key, who in (("rank_timeout_s", "rank"), ("node_timeout_s", "node")):
        if (limit := getattr(run, key)) >= run.stall_timeout_s:
            yield (
                f"run.{key} = {limit:g} must be below run.stall_timeout_s = {run.stall_timeout_s:g}: a {who} without a "
                "sign of life is found before a run without progress; lower the one or raise the other"
            )
    servers = {"rollout": config.rollout.server, "teacher": config.teacher.server}
    for name, server in servers.items():
        for key in ("start_timeout_s", "request_timeout_s"):
            if (limit := getattr(server, key)) >= run.stall_timeout_s:
                yield (
                    f"{name}.server.{key} = {limit:g} must be below run.stall_timeout_s = {run.stall_timeout_s:g}: a "
                    "server is given up before the run is; lower the one or raise the other"
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
    _cache,
    _packs,
    _backend,
    _loss,
    of_each_phase(_weight_gradient),
    _rollout_server,
    _teacher_server,
    _both_servers,
    _warmup,
    _rates,
    _adam,
    _overlap,
    _beginning,
    _timeouts,
    _replay,
    _pattern,
    *(_home(key) for key in PATHS),
)
"""Every check across sections. Each reads few values, because a check that needs a wrong value is left out."""
