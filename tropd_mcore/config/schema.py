"""Every key of the configuration: one frozen class a section, the default on its field, unit and effect under it.

Not for checks that span sections (see `checks`) or for reading files (see `loader`).
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tropd_mcore.config.fields import Dtype, Fraction, NonEmptyText, NonNegativeInt, PositiveFloat, PositiveInt, Section
from tropd_mcore.config.objectives import ObjectiveConfig
from tropd_mcore.config.objectives.trust_region import TropdObjective


class RunConfig(Section):
    dir: Path
    """Run directory: logs, rollouts, checkpoints, export. The same directory again means resume (docs/resume.md)."""
    steps: PositiveInt = 200
    """Steps of the whole run: rollout batches, each of one optimizer step unless objective.policy_gradient has more.
    Source: TrOPD section 4 (200)."""
    seed: NonNegativeInt = 1234
    """Seeds prompt order, trust uniforms and dropout; stored with the data it decided."""
    checkpoint_every: PositiveInt = 50
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: PositiveInt = 2
    """Newest complete checkpoints to keep."""
    export_at_end: bool = True
    """Write the trained student as a Hugging Face folder to <dir>/export."""
    keep_rollouts: PositiveInt | None = None
    """Newest steps whose rollouts stay in <dir>/rollouts (docs/run-directory.md says how large they are); None = all.
    Those of steps since the last checkpoint always stay, because a resume repeats these steps with them."""
    keep_scores: NonNegativeInt | None = 0
    """Newest steps whose teacher scores stay in <dir>/scores; 0 = of the step under way only, None = all. Those of a
    served teacher stay since the last checkpoint in any case; a teacher in the job scores repeated steps again."""
    keep_tokens: PositiveInt | None = 200
    """Newest steps whose per-token values stay in <dir>/tokens, which the report shows; None = all. How many samples of
    each step: monitor.token_samples."""
    lock: Literal["auto", "flock", "file"] = "auto"
    """How one job keeps others out of <dir>: a lock of the kernel, or a file that names host and process, for file
    systems without flock (Lustre); auto = flock where the file system has it, else a file."""
    rank_timeout_s: PositiveFloat = 120.0
    """Longest time without a sign of life of a rank (a stopped process, a frozen machine); then the job ends with a
    line that names the rank."""
    stall_timeout_s: PositiveFloat = 3600.0
    """Longest time in which no rank gets on with anything (no micro-batch, no answer of a server, no file); then the
    job ends with a line that names the rank that the others wait for."""
    replay: Path | None = None
    """Take rollouts from this run directory instead of sampling, and teacher scores where it has them for exactly these
    rows, this teacher (by content) and this objective's candidates."""
    init_from: Path | None = None
    """Begin a new run from the weights of this checkpoint folder (<dir>/checkpoints/step_<n>) of another run; looked
    at by the first launch only. student.path names the model it was trained from."""
    init_optimizer: bool = False
    """Take the optimizer's moments and main weights from run.init_from too; False starts the optimizer afresh."""
    stop_after: PositiveInt | None = None
    """Stop after this many steps of this launch (a time-boxed queue); run the same command to go on."""


class PlatformConfig(Section):
    kind: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where torch sees a GPU, else cpu (gloo)."""


class ParallelConfig(Section):
    tensor: PositiveInt = 1
    """Tensor-parallel ranks (vocabulary shards)."""
    pipeline: PositiveInt = 1
    """Pipeline stages."""
    virtual_pipeline: PositiveInt | None = None
    """Model chunks a stage (interleaved schedule); needs pipeline >= 2."""
    context: PositiveInt = 1
    """Context-parallel ranks (zigzag sequence shards)."""
    data: PositiveInt | None = None
    """Data-parallel replicas; None = WORLD_SIZE / (tensor * pipeline * context)."""
    sequence_parallel: bool = False
    """Shard norms and dropout over the tensor axis; needs tensor >= 2."""


class StudentConfig(Section):
    path: Path
    """Hugging Face folder (config.json, safetensors, tokenizer)."""
    dtype: Dtype = "bfloat16"
    """Parameter and activation dtype; gradients and the optimizer's main weights are float32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: those of each layer's MLP (selective) or of whole layers
    (full). Saves memory and costs time: docs/gpu.md."""


class ServerConfig(Section):
    """One SGLang server: started and stopped by us, or, with `url`, one that runs elsewhere."""

    url: str | None = None
    """Base URL of a running server; None = start one on a free loopback port."""
    port: int | None = Field(default=None, ge=1, le=65535)
    """Port to start on; None asks the OS for a free one."""
    tensor_parallel: PositiveInt = 1
    """Ranks of the started server."""
    dtype: Dtype | None = None
    """Weights and activations of the started server; None = those of its model (student.dtype or teacher.dtype)."""
    max_total_tokens: PositiveInt | None = None
    """KV-cache size in tokens; None lets SGLang decide."""
    mem_fraction: Fraction | None = None
    """Fraction of GPU memory for weights and KV cache; None lets SGLang decide."""
    extra_args: tuple[str, ...] = ()
    """Further arguments for `sglang.launch_server`, as on its command line."""
    start_timeout_s: PositiveFloat = 600.0
    """Longest wait for a started server to answer."""
    request_timeout_s: PositiveFloat = 1200.0
    """Longest wait for one request."""
    hang_timeout_s: PositiveFloat = 60.0
    """A server that answers no health request for this long while others are in flight is taken for hung: a started one
    is restarted like one that died (max_restarts), one at a url ends the run."""
    max_retries: NonNegativeInt = 3
    """Retries of one request after a connection error, a time-out or an answer 429 or 5xx, with exponential backoff."""
    max_restarts: NonNegativeInt = 2
    """Restarts of a started server that died, over the whole launch; the step under way is retried."""
    max_concurrency: PositiveInt = 64
    """Requests in flight from one client."""
    log_max_mib: PositiveFloat = 64.0
    """Size at which the log of a started server is rotated; one older file is kept."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key, only with `url`; the key itself is never in a config."""


class TeacherConfig(Section):
    kind: Literal["megatron", "sglang"] = "megatron"
    """Who scores: a frozen Megatron model in the training job, sharded like the student, or an SGLang server."""
    path: Path
    """Hugging Face folder of the teacher; where the student teaches itself, its own."""
    dtype: Dtype = "bfloat16"
    """Parameters of the teacher; log-probs are float32."""
    server: ServerConfig = ServerConfig()
    """`sglang` only."""
    extra_tokens: Literal["refuse", "exclude"] = "refuse"
    """Tokens that the teacher's tokenizer has beyond the student's: refuse the teacher, or take them out of its
    candidates and count them. A token that both have with different ids is always refused."""
    check_every: PositiveInt = 10
    """`sglang` only. Steps between two checks that the server still serves the model it served at the start."""
    on_failure: Literal["mask", "stop"] = "mask"
    """`sglang` only. A sample that could not be scored after all retries: leave it out (counted) or stop the run."""


class DataConfig(Section):
    prompts: Path
    """JSONL, one object per line: `id`, `messages` (chat) or `prompt` (text), optional `answer`, and for a chat
    optional `tools` and `chat_template_kwargs`."""
    teacher_responses: Path | None = None
    """JSONL of stored teacher responses: `id`, `response_ids`, optional `finished`; needed by objective.guidance."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template (Qwen3: enable_thinking); those of a line of data.prompts win over these."""
    template_date: date | None = None
    """Today's date for templates that print it, YYYY-MM-DD; None = the day of the run's first launch."""
    max_prompt_tokens: PositiveInt = 2048
    """Longer prompts are refused when the file is read."""
    shuffle: bool = True
    """A new order each pass, decided by run.seed; False keeps the order of the file."""


class TruncateConfig(Section):
    """Fast OPD: responses are cut at start + increment * floor(step / every) tokens, never above max_new_tokens."""

    start: PositiveInt = 256
    """Longest response of the first step, tokens."""
    increment: NonNegativeInt = 256
    """Tokens that each stage adds. Source: Fast OPD from reasoning prefixes (about 256)."""
    every: PositiveInt = 20
    """Steps of one stage."""


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = 128
    """Prompts of one rollout batch. Source: TrOPD section 4."""
    samples_per_prompt: PositiveInt = 4
    """Student continuations a prompt; all share one teacher prefix. Source: TrOPD section 4."""
    max_new_tokens: PositiveInt = 8096
    """Longest response, prefix not counted (see objective.guidance.continuation_budget). Source: TrOPD section 4."""
    end_tokens: tuple[str, ...] | None = None
    """Tokens that end a response, in prefixes, training and evaluation; None = all that end one for the student or the
    teacher (generation_config.json, tokenizer, chat template)."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer's log-probs are taken at the same temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass; below 1 the log-ratio estimator is biased."""
    top_k: int = -1
    """Top-k sampling; -1 = off."""
    truncate: TruncateConfig | None = None
    """Sample and train the beginning of responses only, longer with time; None = whole responses. Rollouts taken from
    run.replay are cut likewise."""
    server: ServerConfig = ServerConfig()


class LossConfig(Section):
    form: Literal["fused", "logits"] = "fused"
    """The output layer inside the loss, chunk by chunk, so that logits never exist as a whole; or logits given, with
    the gradient written over them."""
    backend: Literal["auto", "eager", "compile", "triton"] = "auto"
    """Who computes the passes over the logits: PyTorch operations (the reference), torch.compile, or Triton kernels.
    auto = triton on CUDA, eager on a CPU."""
    weight_gradient: Literal["deferred", "folded", "recompute"] = "folded"
    """The output weight's gradient is kept in float32 and scaled in the backward pass; or (`fused` only) accumulated
    into main_grad in the forward pass and checked to be unscaled; or all gradients of the loss are made in the backward
    pass, from recomputed logits where `fused`."""
    chunk_tokens: PositiveInt = 2048
    """Rows of one chunk; bounds the memory of the loss (chunk_tokens x vocabulary shard, fp32)."""
    overlap_chunks: bool = False
    """`fused` only. Compute the next chunk's logits while the all-reduce of this one runs; a second chunk of memory."""
    logit_softcap: PositiveFloat | None = None
    """Logits z become cap * tanh(z / cap), in teacher and student; None = off, as for all supported families."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Every supervised token of the global batch weighs the same, or every sample does."""
    prefix_denominator: Literal["joint", "separate"] = "joint"
    """Student and prefix tokens share one token count, or each part is divided by its own."""
    ignore_tokens: tuple[str, ...] = ()
    """Tokens of the student's vocabulary, or texts that are one token, that are never supervised."""
    ignore_first_of: tuple[str, ...] = ()
    """The same for tokens whose first occurrence in a response is not supervised. Source: local support matching."""


class BatchConfig(Section):
    tokens_per_micro_batch: PositiveInt = 16384
    """Token budget of one pack over all context-parallel ranks; the longest sample must fit."""


class OptimizerConfig(Section):
    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate. Source: TrOPD section 4."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Floor of the decaying schedules."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning-rate schedule over all optimizer steps of the run. Source: TrOPD section 4 (constant)."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of the linear warm-up."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; norms and biases are exempt."""
    beta1: Fraction = 0.9
    """Adam beta1."""
    beta2: Fraction = 0.999
    """Adam beta2."""
    eps: PositiveFloat = 1e-8
    """Adam epsilon."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Global gradient-norm clip; 0 = off."""
    distributed: bool = True
    """Shard optimizer state over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the parameter all-gather with the next forward pass; needs `distributed`."""


class VerifierConfig(Section):
    kind: Literal["none", "exact_match", "math_verify"] = "none"
    """How an answer is judged: not at all, as a string, or as mathematics (LaTeX)."""
    pattern: str = r"####\s*(.+)"
    """Regular expression whose last match's group 1 is the answer (`exact_match` only)."""
    unfinished: Literal["wrong", "judge"] = "wrong"
    """A response that was cut by length (by rollout.truncate too) or whose thinking block is open has no answer, or is
    judged like any other."""
    thinking: tuple[NonEmptyText, NonEmptyText] | None = ("<think>", "</think>")
    """Texts that open and close a thinking block, in which no answer is looked for; None = there are no such blocks."""


class MonitorConfig(Section):
    progress_every_s: PositiveFloat = 10.0
    """Seconds between two progress lines of something long in a log; a terminal has a bar instead."""
    tensorboard: bool = False
    """Write TensorBoard scalars to <run.dir>/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; None = off. Needs the extra [wandb]."""
    topk_overlap: bool = True
    """Measure teacher/student top-k overlap each step: one more top-k over the student's shard."""
    token_samples: NonNegativeInt = 4
    """Samples per step, spread evenly over the step, whose per-token values are kept in <run.dir>/tokens for the
    report."""


class GatesConfig(Section):
    """Checks before the first step, some of them at every step; each stops the run with its likely cause."""

    sampler_logprob: bool = True
    """Compare sampler and trainer log-probs on the rollouts of every step; a launch's first step has to pass, later
    ones stop the run where they fail in a row (sampler_logprob_steps) or by far (docs/gates.md)."""
    sampler_logprob_p99: PositiveFloat | None = None
    """Bound on the 99th percentile of |difference|, nats; None = 1e-4 where student and server are float32 on a CPU,
    else 0.25 (docs/numerics.md)."""
    sampler_logprob_max: PositiveFloat | None = None
    """Bound on the largest |difference|, nats; None = 1e-2 where student and server are float32 on a CPU, else 2.0. It
    stops a run only there, at its first step; else it is a warning."""
    sampler_logprob_mean: PositiveFloat | None = None
    """Bound on the mean of |difference|, nats; None = 2e-5 where student and server are float32 on a CPU, else
    0.05."""
    sampler_logprob_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Bound on the share of tokens whose |difference| is above the bound of the 99th percentile, which is not judged
    itself where a step has fewer than 500 tokens."""
    sampler_logprob_steps: PositiveInt = 3
    """Steps in a row after which a mean, a 99th percentile or a share above its bound stops the run."""
    weight_sync: bool = True
    """At the first publication, destroy the server's weights, send them again and compare checksums; at every later
    one, see that the server's checksums moved with the weights, and after sampling that they stayed."""
    masked_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Largest share of a step's samples that may be left out because the rollout or the teacher server gave no usable
    answer for them; more stop the run."""
    tokenizer: bool = True
    """Every tokenizer of the run turns a probe text into the ids that its tokenizer.json says, and back."""
    model_reading: bool = True
    """Compare every model in the job with an independent reading of its folder (transformers, on the CPU) on a short
    text, where the host memory allows it."""
    teacher_identity: bool = True
    """A served teacher is the model of teacher.path, is not the student, and stays the same (teacher.check_every)."""
    teacher_logprob_mean: PositiveFloat | None = None
    """Bound on the mean |difference| between a served teacher's log-probs of a short text and those of teacher.path,
    nats; None = 1e-4 where the server is float32 on a CPU, else 0.1 (docs/gates.md)."""
    vocabulary: bool = True
    """Same id for the same string in teacher and student; widths may differ by padding only."""
    longest_sequence: bool = True
    """Forward and backward of a full micro-batch before any rollout, so that memory fails early."""


class Config(Section):
    """The whole file."""

    run: RunConfig
    platform: PlatformConfig = PlatformConfig()
    parallel: ParallelConfig = ParallelConfig()
    student: StudentConfig
    teacher: TeacherConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    objective: ObjectiveConfig = TropdObjective()
    loss: LossConfig = LossConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    verifier: VerifierConfig = VerifierConfig()
    monitor: MonitorConfig = MonitorConfig()
    gates: GatesConfig = GatesConfig()
