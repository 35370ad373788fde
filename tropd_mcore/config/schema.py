"""Every key of the configuration: one frozen class a section, the default on its field, unit and effect under it.

Not for checks that span sections (see `checks`) or for reading files (see `loader`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["float32", "bfloat16"]


class Section(BaseModel):
    """Base of all sections: frozen, unknown keys refused, the text under a field is its documentation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )


class RunConfig(Section):
    dir: Path
    """Run directory: logs, rollouts, checkpoints, export. The same directory again means resume."""
    steps: PositiveInt = 200
    """Optimizer steps of the whole run. Source: TrOPD section 4 (200)."""
    seed: NonNegativeInt = 1234
    """Seeds prompt order, trust uniforms and dropout; stored with the data it decided."""
    checkpoint_every: PositiveInt = 50
    """Optimizer steps between checkpoints; the last step always writes one."""
    keep_checkpoints: PositiveInt = 2
    """Newest complete checkpoints to keep."""
    export_at_end: bool = True
    """Write the trained student as a Hugging Face folder to <dir>/export."""
    keep_rollouts: PositiveInt | None = None
    """Newest steps whose rollouts stay in <dir>/rollouts; None = all. Steps since the last checkpoint always stay."""
    replay: Path | None = None
    """Take rollouts and teacher scores from this run directory instead of sampling and scoring."""
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
    """Activation recomputation in the transformer layers."""


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
    max_retries: NonNegativeInt = 3
    """Retries of one request after a connection error, with exponential backoff."""
    max_restarts: NonNegativeInt = 2
    """Restarts of a started server that died, over the whole launch; the step under way is retried."""
    max_concurrency: PositiveInt = 64
    """Requests in flight from one client."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key, only with `url`; the key itself is never in a config."""


class TeacherConfig(Section):
    kind: Literal["megatron", "sglang"] = "megatron"
    """Who scores: a frozen Megatron model in the training job, sharded like the student, or an SGLang server."""
    path: Path
    """Hugging Face folder of the teacher."""
    dtype: Dtype = "bfloat16"
    """Parameters of the teacher; log-probs are float32."""
    server: ServerConfig = ServerConfig()
    """`sglang` only."""
    on_failure: Literal["mask", "stop"] = "mask"
    """`sglang` only. A sample that could not be scored after all retries: leave it out (counted) or stop the run."""


class DataConfig(Section):
    prompts: Path
    """JSONL, one object a line: `id`, `messages` (chat) or `prompt` (text), optional `answer`."""
    teacher_responses: Path | None = None
    """JSONL of stored teacher responses: `id`, `response_ids`; needed by objective.guidance."""
    max_prompt_tokens: PositiveInt = 2048
    """Longer prompts are refused when the file is read."""
    shuffle: bool = True
    """A new order each pass, decided by run.seed; False keeps the order of the file."""


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = 128
    """Prompts of one optimizer step. Source: TrOPD section 4."""
    samples_per_prompt: PositiveInt = 4
    """Student continuations a prompt; all share one teacher prefix. Source: TrOPD section 4."""
    max_new_tokens: PositiveInt = 8096
    """Longest response, prefix not counted (see objective.guidance.continuation_budget). Source: TrOPD section 4."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the trainer's log-probs are taken at the same temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass; below 1 the log-ratio estimator is biased."""
    top_k: int = -1
    """Top-k sampling; -1 = off."""
    server: ServerConfig = ServerConfig()


class TrustConfig(Section):
    mode: Literal["bernoulli", "soft", "threshold", "none"] = "bernoulli"
    """How a token is trusted: u < rho (TrOPD eq. of P_trust), weight min(rho, 1), rho > exp(threshold), or always."""
    threshold: float = math.log(0.3 / 0.7)
    """Log-ratio above which a token is trusted, `threshold` mode only. Source: REOPOLD, lambda = 0.3."""


class OutlierConfig(Section):
    mode: Literal["fkl_direct", "fkl_scalar", "mask", "clip"] = "fkl_direct"
    """Loss of a distrusted token: differentiable top-k FKL (paper), the same as a scalar advantage, none, or a
    reward floored at clip_tau. `mask` and `clip` use the static region r > clip_tau (TrOPD table 1)."""
    weight: float = Field(default=1.0, ge=0)
    """Factor of the outlier term. Source: TrOPD eq. of J_on (1:1)."""
    topk: PositiveInt = 64
    """Teacher support size k. Source: TrOPD section 4."""
    norm: Literal["truncated", "tail", "renorm", "teacher_renorm"] = "truncated"
    """Support normalisation of the FKL (docs/method.md, 4)."""
    clip_tau: float = math.log(0.3 / 0.7)
    """Log-ratio floor of `clip` and `mask`. Source: REOPOLD, lambda = 0.3."""


class GuidanceConfig(Section):
    enabled: bool = True
    """Continue teacher prefixes; needs data.teacher_responses."""
    beta: float = Field(default=1e-3, ge=0)
    """Weight of the prefix loss. Source: TrOPD section 3.3."""
    loss: Literal["nll", "none", "topk_fkl", "scalar_adv"] = "nll"
    """Prefix loss: NLL (gradient of the K1 forward KL), none, top-k FKL, or the detached advantage of the authors."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """alpha(t): (1 + cos(pi t / T)) / 2, 1 - t / T, or 1; 0 after T (constant: 1)."""
    total_steps: PositiveInt | None = None
    """T of the schedule; None = run.steps."""
    length_mode: Literal["proportional", "cap"] = "proportional"
    """Prefix length: floor(alpha * len(response)), or min(floor(alpha * longest response), len(response))."""
    min_continuation: PositiveInt = 64
    """Tokens of the teacher response that are always left to the student."""
    continuation_budget: Literal["full", "shared"] = "full"
    """New tokens after the prefix: rollout.max_new_tokens, or that minus the prefix."""


class PolicyGradientConfig(Section):
    """One optimizer step a rollout batch: the ratio is 1 in value and `none` and `ratio` have the same gradient."""

    mismatch: Literal["off", "tis", "icepop", "mask"] = "off"
    """Weight of trainer/sampler probability: off, truncated at tis_cap, zero outside the icepop band, or zero where
    p_trainer - p_sampler < mask_below."""
    tis_cap: PositiveFloat = 2.0
    """Upper bound of the truncated importance weight."""
    icepop_low: PositiveFloat = 0.5
    """Lower edge of the IcePop band."""
    icepop_high: PositiveFloat = 5.0
    """Upper edge of the IcePop band."""
    mask_below: float = -0.2
    """Probability difference below which `mask` drops a token."""
    advantage_clip: PositiveFloat | None = None
    """Clamp of the log-ratio advantage to [-c, c], nats; None = off (the paper)."""


class TropdObjective(Section):
    """TrOPD, docs/method.md."""

    kind: Literal["tropd"] = "tropd"
    trust: TrustConfig = TrustConfig()
    outlier: OutlierConfig = OutlierConfig()
    guidance: GuidanceConfig = GuidanceConfig()
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()


class OpdObjective(Section):
    """Plain on-policy distillation: the same code with the gate open and no guidance."""

    kind: Literal["opd"] = "opd"
    policy_gradient: PolicyGradientConfig = PolicyGradientConfig()
    topk: PositiveInt = 64
    """Teacher support size, for the metrics only."""


ObjectiveConfig = Annotated[TropdObjective | OpdObjective, Field(discriminator="kind")]


class LossConfig(Section):
    chunk_tokens: PositiveInt = 1024
    """Rows of one chunk of the support kernel; bounds its temporary memory (chunk_tokens x vocabulary shard, fp32)."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """Every supervised token of the global batch weighs the same, or every sample does."""
    prefix_denominator: Literal["joint", "separate"] = "joint"
    """Student and prefix tokens share one token count, or each part is divided by its own."""


class BatchConfig(Section):
    tokens_per_micro_batch: PositiveInt = 16384
    """Token budget of one pack over all context-parallel ranks; the longest sample must fit."""


class OptimizerConfig(Section):
    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate. Source: TrOPD section 4."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Floor of the decaying schedules."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning-rate schedule over run.steps. Source: TrOPD section 4 (constant)."""
    warmup_steps: NonNegativeInt = 0
    """Linear warm-up steps."""
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


class MonitorConfig(Section):
    tensorboard: bool = False
    """Write TensorBoard scalars to <run.dir>/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project; None = off. Needs the extra [wandb]."""
    topk_overlap: bool = True
    """Measure teacher/student top-k overlap each step: one more top-k over the student's shard."""
    token_samples: NonNegativeInt = 4
    """Samples a step whose per-token values are kept in <run.dir>/tokens for the report."""


class GatesConfig(Section):
    """Checks before the first step; each stops the run with its likely cause."""

    sampler_logprob: bool = True
    """Compare sampler and trainer log-probs on the first rollouts."""
    sampler_logprob_p99: PositiveFloat | None = None
    """Bound on the 99th percentile of |difference|, nats; None = 1e-4 where student and server are float32, else
    0.25 (docs/numerics.md)."""
    sampler_logprob_max: PositiveFloat | None = None
    """Bound on the largest |difference|, nats; None = 1e-2 where student and server are float32, else 2.0."""
    weight_sync: bool = True
    """At the first publication, destroy the server's weights, send them again and compare checksums."""
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
