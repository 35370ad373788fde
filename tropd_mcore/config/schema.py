"""Every key of the configuration. Each section is one frozen class; a key's default stands on its field, and the text
under the field describes it.

This module has no checks across sections (see `checks`) and reads no files (see `loader`). Configuration files are
YAML, so the descriptions write `null` for None.
"""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tropd_mcore.config.fields import Dtype, Fraction, NonEmptyText, NonNegativeInt, PositiveFloat, PositiveInt, Section
from tropd_mcore.config.objectives.trust_region import TropdObjective
from tropd_mcore.config.phases import RunObjective
from tropd_mcore.config.router_section import RouterConfig as RouterConfig
from tropd_mcore.config.server_section import ServerConfig as ServerConfig
from tropd_mcore.config.server_section import with_template
from tropd_mcore.config.teacher_template import with_teacher


class RunConfig(Section):
    dir: Path
    """Run directory, for logs, rollouts, checkpoints and the export. If it already holds a run, that run is resumed
    (docs/resume.md)."""
    steps: PositiveInt = 200
    """Number of steps of the whole run. One step is one rollout batch and one optimizer step, or several optimizer
    steps if objective.policy_gradient sets mini_batches or epochs. Source: TrOPD section 4 (200)."""
    seed: NonNegativeInt = 1234
    """Random seed of the prompt order, the trust uniforms and dropout. It is stored with the data that it
    determined."""
    checkpoint_every: PositiveInt = 50
    """Steps between two checkpoints. The last step always writes one."""
    keep_checkpoints: PositiveInt = 2
    """Number of most recent complete checkpoints to keep."""
    export_at_end: bool = True
    """After the last step, write the trained student as a Hugging Face folder to <dir>/export."""
    keep_rollouts: PositiveInt | None = None
    """Number of most recent steps whose rollouts are kept in <dir>/rollouts. null = all. Rollouts since the last
    checkpoint are always kept, because a resume repeats those steps with them. For their size, see
    docs/run-directory.md."""
    keep_scores: NonNegativeInt | None = 0
    """Number of most recent steps whose teacher scores are kept in <dir>/scores. 0 = only the current step, null = all.
    Scores of a served teacher are always kept since the last checkpoint. A teacher in the job scores repeated steps
    again."""
    keep_tokens: PositiveInt | None = 200
    """Number of most recent steps whose per-token values are kept in <dir>/tokens for the report. null = all.
    monitor.token_samples sets the number of samples per step."""
    lock: Literal["auto", "flock", "file"] = "auto"
    """How a job keeps other jobs out of <dir>. `flock`: a kernel lock. `file`: a file that names host and process, for
    file systems without flock (Lustre). `auto`: flock if the file system supports it, else a file."""
    join_timeout_s: PositiveFloat = 900.0
    """Longest time in seconds that the launcher of one machine waits for the launchers of the others."""
    rank_timeout_s: PositiveFloat = 120.0
    """Longest time in seconds that a rank may give no sign of life (a stopped process, a frozen machine). After that
    the job ends with a message that names the rank."""
    node_timeout_s: PositiveFloat = 60.0
    """Longest time in seconds that a node of several may give no sign of life (its machine is gone, or its launcher was
    killed or frozen). After that the other nodes end with a message that names the node."""
    stall_timeout_s: PositiveFloat = 3600.0
    """Longest time in seconds without progress on any rank (no micro-batch, no server response, no file). After that
    the job ends with a message that names the rank that the others wait for."""
    collective_timeout_s: PositiveFloat | None = None
    """Longest wait in seconds in one collective operation, with NCCL and with gloo. The other ranks wait in one while
    rank 0 samples. It must be above stall_timeout_s, so that the message about a stall comes first. null = 7200, or
    stall_timeout_s + 1800 if that is more."""
    replay: Path | None = None
    """Take rollouts from this run directory instead of sampling. Its teacher scores are used too, if they are for
    exactly these rows, this teacher (compared by content) and this objective's candidates."""
    init_from: Path | None = None
    """Start a new run from the weights of this checkpoint folder (<dir>/checkpoints/step_<n>) of another run. Only the
    first launch reads it. student.path names the model that the checkpoint was trained from."""
    init_optimizer: bool = False
    """Also take the optimizer's moments and main weights from run.init_from. false = start with a new optimizer
    state."""
    stop_after: PositiveInt | None = None
    """Stop after this many steps of this launch, for queues with a time limit. Run the same command again to
    continue."""


class PlatformConfig(Section):
    kind: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on. `auto`: cuda if torch sees a GPU, else cpu (with gloo)."""
    deterministic: bool = False
    """Train with algorithms that give the same bits every time (docs/resume.md). On a GPU it is slower, and attention
    may need much more memory. On a CPU, training repeats its bits anyway."""


class ParallelConfig(Section):
    tensor: PositiveInt = 1
    """Number of tensor-parallel ranks. Each holds one shard of the vocabulary."""
    pipeline: PositiveInt = 1
    """Number of pipeline stages."""
    virtual_pipeline: PositiveInt | None = None
    """Number of model chunks per pipeline stage, 2 or more, for the interleaved schedule. Needs pipeline >= 2."""
    context: PositiveInt = 1
    """Number of context-parallel ranks. Each sequence is split over them in zigzag order."""
    data: PositiveInt | None = None
    """Number of data-parallel replicas. null = WORLD_SIZE / (tensor * pipeline * context)."""
    sequence_parallel: bool = False
    """Split the activations of norms and dropout over the tensor-parallel ranks. Needs tensor >= 2."""


class StudentConfig(Section):
    path: Path
    """Hugging Face folder of the student (config.json, safetensors, tokenizer)."""
    dtype: Dtype = "bfloat16"
    """Dtype of parameters and activations. Gradients and the optimizer's main weights are always float32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Recompute activations to save memory: those of recompute_modules in each layer (selective) or of whole layers
    (full). Memory and time were measured: docs/gpu.md."""
    recompute_modules: tuple[Literal["mlp", "core_attn"], ...] = ("mlp",)
    """`selective` only. `mlp` saves more than half of the activations. `core_attn` saves memory only if attention is
    not fused, as with platform.deterministic; otherwise it costs memory."""
    recompute_layers: PositiveInt | None = None
    """`full` only. Recompute just the first layers of each pipeline stage, this many. null = all."""


class TeacherConfig(Section):
    kind: Literal["megatron", "sglang"] = "megatron"
    """Where the teacher runs. `megatron`: a frozen Megatron model in the training job, sharded like the student.
    `sglang`: an SGLang server, which may serve a model of any architecture."""
    path: Path
    """Hugging Face folder of the teacher. If the student teaches itself (sdpo, opsd), it must be student.path."""
    dtype: Dtype = "bfloat16"
    """Dtype of the teacher's parameters. Its log-probs are always float32."""
    pipeline_layers: tuple[PositiveInt, ...] | None = None
    """`megatron` only. Number of the teacher's layers on each pipeline stage, one number per stage. null = as even as
    possible, with the rest on the first stages."""
    offload: bool = False
    """`megatron` only. Keep the teacher's weights in host memory, and copy them to the device only while it scores. The
    room on the device is then free while the student trains."""
    server: ServerConfig = ServerConfig()
    """`sglang` only."""
    servers: tuple[ServerConfig, ...] = ()
    """`sglang` only. Several servers of the same teacher. Each entry has the keys in which it differs from
    teacher.server, which is then only their template. empty = teacher.server is the one server."""
    extra_tokens: Literal["refuse", "exclude"] = "refuse"
    """What to do if the teacher's tokenizer has tokens that the student's lacks. `refuse`: stop with an error.
    `exclude`: take them out of the teacher's candidates and count them. A token that has different ids in the two is
    always an error."""
    check_every: PositiveInt = 10
    """`sglang` only. Steps between two checks that the server still serves the model that it served at the start."""
    on_failure: Literal["mask", "stop"] = "mask"
    """`sglang` only. What to do with a sample that could not be scored after all retries. `mask`: leave it out and
    count it. `stop`: stop the run."""

    _fill_servers = model_validator(mode="before")(with_template)


class DataConfig(Section):
    prompts: Path
    """JSONL file of prompts, one object per line: `id`, `messages` (chat) or `prompt` (text), optional `answer`, with
    `teachers` also `teacher`. A chat may also have `tools` and `chat_template_kwargs`."""
    teacher_responses: Path | None = None
    """JSONL file of stored teacher responses: `id`, `response_ids`, optional `finished`. objective.guidance needs
    it."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables of the chat template (for Qwen3: enable_thinking). Variables in a line of data.prompts override
    these."""
    template_date: date | None = None
    """Date, YYYY-MM-DD, for chat templates that print today's date. null = the day of the run's first launch."""
    max_prompt_tokens: PositiveInt = 2048
    """Longest prompt, in tokens. A longer one is an error when the file is read."""
    shuffle: bool = True
    """Shuffle the prompts anew on each pass through the file, seeded by run.seed. false = keep the order of the
    file."""


class TruncateConfig(Section):
    """Fast OPD. Responses are cut at start + increment * floor(step / every) tokens, never above max_new_tokens."""

    start: PositiveInt = 256
    """Longest response at the first step, in tokens. Later steps allow start + increment * floor(step / every), at most
    max_new_tokens. Without the section rollout.truncate, responses are not cut. Rollouts from run.replay are cut
    too."""
    increment: NonNegativeInt = 256
    """Tokens added to the longest response at each stage. Source: Fast OPD from reasoning prefixes (about 256)."""
    every: PositiveInt = 20
    """Number of steps per stage."""


class RolloutConfig(Section):
    prompts_per_step: PositiveInt = 128
    """Number of prompts per rollout batch. Source: TrOPD section 4."""
    samples_per_prompt: PositiveInt = 4
    """Number of student responses per prompt. All of them continue the same teacher prefix. Source: TrOPD section 4."""
    max_new_tokens: PositiveInt = 8096
    """Longest response in tokens, without a teacher prefix (see objective.guidance.continuation_budget).
    Source: TrOPD section 4."""
    end_tokens: tuple[str, ...] | None = None
    """Tokens that end a response, in prefixes, training and evaluation. null = all tokens that end a response of the
    student or of the teacher (from generation_config.json, tokenizer and chat template)."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature. The trainer computes the student's log-probs at the same temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Probability mass of nucleus sampling. Below 1, the log-ratio estimator is biased."""
    top_k: int = -1
    """Number of most likely tokens to sample from. -1 = all."""
    truncate: TruncateConfig | None = None
    """Sample and train only the beginning of each response, and more of it as training proceeds. null = whole
    responses. Rollouts from run.replay are cut too."""
    server: ServerConfig = ServerConfig()
    servers: tuple[ServerConfig, ...] = ()
    """A fleet: several servers that share the samples of a step. Each entry has the keys in which it differs from
    rollout.server, which is then only their template (docs/servers.md). empty = rollout.server is the one server."""
    router: RouterConfig | None = None
    """With servers only. A router that chooses the server of each sample. Everything else goes to the servers directly.
    null = the job chooses (docs/servers.md)."""

    _fill_servers = model_validator(mode="before")(with_template)


class LossConfig(Section):
    form: Literal["fused", "logits"] = "fused"
    """Where logits are computed. `fused`: the output layer is part of the loss and runs chunk by chunk, so the full
    logits never exist. `logits`: the model computes all logits, and their gradient is written over them."""
    backend: Literal["auto", "eager", "compile", "triton"] = "auto"
    """Implementation of the passes over the logits. `eager`: PyTorch operations (the reference). `compile`:
    torch.compile. `triton`: Triton kernels, CUDA only. `auto`: triton on CUDA, eager on a CPU."""
    weight_gradient: Literal["deferred", "folded", "recompute"] = "folded"
    """How the gradient of the output weight is computed. `folded` (with form `fused` only): accumulated into main_grad
    in the forward pass; a check makes sure that the loss is not scaled afterwards. `deferred`: kept in float32 and
    scaled in the backward pass. `recompute`: all gradients of the loss are computed in the backward pass, from
    recomputed logits if the form is `fused`."""
    chunk_tokens: PositiveInt | None = None
    """Number of tokens per chunk of the loss. It bounds the memory of the loss, chunk_tokens x vocabulary shard in
    float32. null = 2048 up to parallel.tensor=2, else 1024 x parallel.tensor: smaller shards get longer chunks."""
    overlap_chunks: bool = False
    """`fused` only. Compute the logits of the next chunk during the all-reduce of the current one. Needs the memory of
    a second chunk."""
    logit_softcap: PositiveFloat | None = None
    """Replace each logit z of teacher and student by cap * tanh(z / cap). null = off, as in all supported model
    families."""
    aggregation: Literal["token_mean", "sequence_mean"] = "token_mean"
    """How token losses are averaged. `token_mean`: every supervised token of the global batch has the same weight.
    `sequence_mean`: every sample has the same weight."""
    prefix_denominator: Literal["joint", "separate"] = "joint"
    """Denominator of the loss if teacher prefixes carry a loss. `joint`: student and prefix tokens are counted
    together. `separate`: each part is divided by its own token count."""
    ignore_tokens: tuple[str, ...] = ()
    """Tokens that are never supervised, as tokens of the student's vocabulary or as texts that are a single token."""
    ignore_first_of: tuple[str, ...] = ()
    """Tokens whose first occurrence in a response is not supervised, written as in ignore_tokens. Source: local support
    matching."""


class BatchConfig(Section):
    tokens_per_micro_batch: PositiveInt = 16384
    """Token budget of one micro-batch, which is one pack of samples, over all context-parallel ranks. The longest
    sample must fit."""


class OptimizerConfig(Section):
    learning_rate: PositiveFloat = 5e-6
    """Peak learning rate. Source: TrOPD section 4."""
    min_learning_rate: float = Field(default=0.0, ge=0)
    """Lowest learning rate of the schedules that decay."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Schedule of the learning rate over all optimizer steps of the run. Source: TrOPD section 4 (constant)."""
    warmup_steps: NonNegativeInt = 0
    """Length of the linear warm-up, in optimizer steps."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay. It is not applied to norms and biases."""
    beta1: Fraction = 0.9
    """Adam's beta1, below 1."""
    beta2: Fraction = 0.999
    """Adam's beta2, below 1."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Largest global gradient norm. Gradients above it are scaled down to it. 0 = off."""
    distributed: bool = True
    """Shard the optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap the gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the parameter all-gather with the next forward pass. Needs `distributed` and `overlap_grad_reduce`."""


class VerifierConfig(Section):
    kind: Literal["none", "exact_match", "math_verify"] = "none"
    """How answers are checked. `none`: not at all. `exact_match`: as a string. `math_verify`: as mathematics
    (LaTeX)."""
    pattern: str = r"####\s*(.+)"
    """`exact_match` only. Regular expression; group 1 of its last match is the answer."""
    unfinished: Literal["wrong", "judge"] = "wrong"
    """How to treat a response that was cut by length (also by rollout.truncate) or whose thinking block is still open.
    `wrong`: it has no answer. `judge`: it is checked like any other."""
    thinking: tuple[NonEmptyText, NonEmptyText] | None = ("<think>", "</think>")
    """Texts that open and close a thinking block. Answers inside a block are ignored. null = there are no such
    blocks."""


class HeldOutConfig(Section):
    """Measure the distance to the teacher on stored responses of the teacher that are not trained on."""

    prompts: Path
    """JSONL file of prompts, as data.prompts. None of them may be in data.prompts."""
    responses: Path
    """JSONL file of the teacher's responses to them, as data.teacher_responses. `tropd prefixes` writes it."""
    every: PositiveInt = 10
    """Steps between two measurements, from step 0 on, with the weights from before the step. The last step always has
    one. Each is one forward pass."""
    limit: PositiveInt | None = 128
    """Number of prompts to take from the start of the file. null = all."""
    topk: PositiveInt = 64
    """Number of candidates per token on which the two distributions are compared. All other tokens count as one. See
    docs/metrics.md."""


class MonitorConfig(Section):
    progress_every_s: PositiveFloat = 10.0
    """Seconds between two progress lines of a long operation in a log. A terminal shows a progress bar instead."""
    tensorboard: bool = False
    """Write TensorBoard scalars to <run.dir>/tensorboard."""
    wandb_project: str | None = None
    """Weights & Biases project to log to. null = off. Needs the extra [wandb]."""
    topk_overlap: bool = True
    """Measure the overlap of the teacher's and the student's top-k (topk/overlap) at some steps."""
    topk_overlap_every: PositiveInt = 10
    """Steps between two measurements of topk_overlap, from step 0 on. The last step always has one. A measurement costs
    one more product with the output layer and a top-k, about half of the loss. If the objective finds the student's
    top-k anyway, the overlap is measured at every step."""
    force: bool = True
    """Measure how much of the loss's gradient comes from tokens at each distance to the teacher (the metrics of
    `force`, and `tv`). It needs no pass over the vocabulary: docs/metrics.md."""
    hint_distance: Fraction | None = 0.5
    """Value of trust/tv at step 0 above which a line names objectives that bring such a student to its teacher sooner,
    if the chosen one is slow at it. null = off. See docs/choosing.md."""
    hint_gap: Fraction | None = 0.08
    """Difference of greedy and sampled accuracy above which `tropd eval` names objectives that remove rare mistakes
    faster, if the run's one is slow at it. null = off. See docs/choosing.md."""
    token_samples: NonNegativeInt = 4
    """Number of samples per step, spread evenly over the step, whose per-token values are kept in <run.dir>/tokens for
    the report."""


class GatesConfig(Section):
    """Checks before the first step, and some at every step. A check that fails stops the run and names the likely
    cause."""

    sampler_logprob: bool = True
    """At every step, compare the log-probs of sampler and trainer on the rollouts. The first step of a launch must
    pass. Later steps stop the run if several fail in a row (sampler_logprob_steps) or one fails by far
    (docs/gates.md)."""
    sampler_logprob_p99: PositiveFloat | None = None
    """Bound on the 99th percentile of |sampler - trainer log-prob|, in nats. null = 1e-4 if student and server compute
    in float32 on a CPU, else 0.25 (docs/numerics.md)."""
    sampler_logprob_max: PositiveFloat | None = None
    """Bound on the largest |sampler - trainer log-prob|, in nats. null = 1e-2 if student and server compute in float32
    on a CPU, else 2.0. In the float32 CPU case it stops the run at the first step of a launch. Otherwise it only
    warns."""
    sampler_logprob_mean: PositiveFloat | None = None
    """Bound on the mean of |sampler - trainer log-prob|, in nats. null = 2e-5 if student and server compute in float32
    on a CPU, else 0.05."""
    sampler_logprob_share: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Bound on the share of tokens whose |sampler - trainer log-prob| exceeds sampler_logprob_p99. The percentile
    itself is only checked at steps with at least 500 tokens."""
    sampler_logprob_steps: PositiveInt = 3
    """Number of consecutive steps with a mean, 99th percentile or share above its bound after which the run stops."""
    weight_sync: bool = True
    """Check that the student's weights reach the rollout server. At the first publication: destroy the server's
    weights, send them again and compare checksums. At every later one: check that the server's checksums changed with
    the weights and, after sampling, that they did not change again."""
    masked_share: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Largest share of a step's samples that may be left out because the rollout server or the teacher server returned
    no usable result for them. A larger share stops the run."""
    tokenizer: bool = True
    """Check that every tokenizer of the run turns a probe text into the ids given by its tokenizer.json, and back."""
    model_reading: bool = True
    """Compare every model in the job on a short text with the same folder loaded by transformers on the CPU. This is
    skipped if the host memory does not suffice."""
    teacher_identity: bool = True
    """Check that a served teacher is the model of teacher.path, is not the student, and stays the same
    (teacher.check_every)."""
    teacher_logprob_mean: PositiveFloat | None = None
    """Bound, in nats, on the mean |difference| between the log-probs of a served teacher and those of teacher.path on a
    short text. null = 1e-4 if the server computes in float32 on a CPU, else 0.1 (docs/gates.md)."""
    vocabulary: bool = True
    """Check that teacher and student have the same id for the same string. Their vocabulary widths may differ by
    padding only."""
    longest_sequence: bool = True
    """Run forward and backward of a full micro-batch before the first rollout, so that a lack of memory shows early."""


class Config(Section):
    """The whole configuration file."""

    run: RunConfig
    platform: PlatformConfig = PlatformConfig()
    parallel: ParallelConfig = ParallelConfig()
    student: StudentConfig
    teacher: TeacherConfig
    teachers: dict[str, TeacherConfig] = Field(default_factory=dict)
    """Several teachers by name (docs/teachers.md). Each line of data.prompts names its teacher in the field `teacher`.
    A line without the field has the teacher `default`. Each entry has the keys in which it differs from the section
    `teacher`, which is then only their template. empty = `teacher` is the one teacher."""
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    objective: RunObjective = TropdObjective()
    loss: LossConfig = LossConfig()
    batch: BatchConfig = BatchConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    verifier: VerifierConfig = VerifierConfig()
    held_out: HeldOutConfig | None = None
    """Measure KL(teacher || student) on stored responses of the teacher that are not trained on. null = off."""
    monitor: MonitorConfig = MonitorConfig()
    gates: GatesConfig = GatesConfig()

    _fill_teachers = model_validator(mode="before")(with_teacher)
