"""The NeMo-RL adapters in NeMo-RL's own code, in rank processes, with a float64 reference.

These parts of NeMo-RL run: the driver's `distillation_train`, `Policy.get_topk_logits` and the sharding, and the
Megatron worker's `get_topk_logits` and `train` with a small model. These do not run: Ray, which carries calls from the
driver to the workers (a call goes to this rank), generation, the worker's set-up, the optimizer, the packages STUBS.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.dist import tiny_gpt
from tests.dist.peer_path import BRIDGE_STUBS, add_bridge, first_on_path
from tropd_mcore import trust_uniforms

STUBS = (
    *BRIDGE_STUBS,
    "absl",
    "hydra",
    "matplotlib",
    "mlflow",
    "nemo_rl.models.generation.vllm",
    "pandas",
    "pynvml",
    "ray",
    "scipy",
    "swanlab",
    "tensordict",
    "torchdata",
    "transformers",
    "wandb",
)
STEP = 7
"""total_steps of the one step that is run; the seed of its uniforms"""
TEMPERATURE = 0.8


class _Done(Exception):
    """Raised after the training step. The rest of the driver's loop is not needed."""


def use(nemo_rl: Path, megatron: Path, bridge: Path) -> None:
    first_on_path([nemo_rl, megatron], STUBS)
    add_bridge(bridge)
    import transformers

    transformers.__version__ = "5.0"  # NeMo-RL compares it


def rollouts() -> tuple[Tensor, list[tuple[int, int]], Tensor]:
    """(token ids [B, S], first and last token of each response, whether a sample counts [B])."""
    random = torch.Generator().manual_seed(21)
    ids = torch.randint(tiny_gpt.VOCABULARY, (4, tiny_gpt.LENGTH), generator=random)
    return ids, [(3, 12), (5, 9), (2, 12), (4, 11)], torch.tensor([1.0, 1.0, 0.0, 1.0])


def _config(vocab_size: int | None) -> dict[str, Any]:
    """The part of a policy's configuration that this path reads."""
    found: dict[str, Any] = {
        "train_global_batch_size": 4,
        "train_micro_batch_size": 2,
        "logprob_batch_size": 2,
        "make_sequence_length_divisible_by": 1,
        "max_total_sequence_length": tiny_gpt.LENGTH,
        "generation": {"colocated": {"enabled": True}},
        "sequence_packing": {"enabled": False},
        "dynamic_batching": {"enabled": False},
        "megatron_cfg": {"context_parallel_size": 1, "empty_unused_memory_level": 0},
    }
    return found if vocab_size is None else {**found, "tropd_vocab_size": vocab_size}


def _worker(seed: int, vocab_size: int | None) -> Any:
    """A Megatron worker around a small model, with only the set-up that is needed here."""
    from nemo_rl.algorithms.logits_sampling_utils import TrainingSamplingParams
    from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl
    from nemo_rl.utils.timer import Timer

    found = object.__new__(MegatronPolicyWorkerImpl)
    found.cfg, found.model = _config(vocab_size), tiny_gpt.model(seed, per_token=True)
    found.sampling_params = TrainingSamplingParams(temperature=TEMPERATURE)
    found.mcore_state, found.timer, found.optimizer = tiny_gpt.Loose(), Timer(), tiny_gpt.IdleOptimizer()
    found.scheduler = tiny_gpt.Loose(step=lambda increment: None, get_lr=lambda group: 0.0, get_wd=lambda: 0.0)
    found.megatron_cfg = tiny_gpt.Loose(optimizer=tiny_gpt.Loose(), ddp=tiny_gpt.Loose(), model=tiny_gpt.Loose())
    found.dp_size, found.dtype = 1, torch.float32
    nothing = ("media_placeholder_token_id", "draft_model", "defer_fp32_logits", "delegate_pack_to_model")
    nothing += ("delegate_mtp_loss_mask_to_model", "model_slices_context_parallel_inputs", "_router_replay_enabled")
    nothing += ("should_disable_forward_pre_hook", "_first_train_step_forward_pre_hook_disabled")
    for name in nothing:
        setattr(found, name, None)
    return found


class _Workers:
    """A worker group with one worker, that of this rank, without Ray."""

    def __init__(self, worker: Any) -> None:
        self.worker, self.cluster = worker, tiny_gpt.Loose(world_size=lambda: 1)

    def run_all_workers_sharded_data(self, name: str, *, data: Any, common_kwargs: Any, **_: Any) -> list[Any]:
        return [getattr(self.worker, name)(data=data[0], **common_kwargs)]

    def get_all_worker_results(self, futures: list[Any]) -> list[Any]:
        return futures


def _policy(worker: Any) -> Any:
    """NeMo-RL's Policy over that worker. It does not move weights between host and device."""
    from nemo_rl.models.policy.lm_policy import Policy

    class OneWorker(Policy):
        data_parallel_size = 1

        def __del__(self) -> None:
            pass  # there is no Ray to shut down

        def train(self, *args: Any, **options: Any) -> Any:
            raise _Done(super().train(*args, **options))

    for name in ("prepare_for_generation", "finish_generation", "prepare_for_training"):
        setattr(OneWorker, name, lambda self: None)
    for name in ("prepare_for_lp_inference", "offload_after_refit"):
        setattr(OneWorker, name, lambda self: None)
    found = object.__new__(OneWorker)
    found.cfg, found.worker_group = worker.cfg, _Workers(worker)
    found.use_dynamic_batches = found.use_sequence_packing = found.debug_payload_metrics = False
    found.flops_tracker = None
    return found


def driver(sources: tuple[Path, ...], tensor: int, full: bool) -> dict[str, Any]:
    """One step of `distillation_train`: the student's gradients and the reported loss."""
    use(*sources)
    with tiny_gpt.layout(tensor):
        from nemo_rl.algorithms import distillation
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict

        from examples.integrations.nemo_rl import LocalSupportMatching

        distillation.run_multi_turn_rollout = lambda *, input_batch, **_: (input_batch, {})
        for name in ("should_use_nemo_gym", "should_use_async_rollouts", "maybe_gpu_profile_step"):
            setattr(distillation, name, lambda *_: False)
        BatchedDataDict.to = lambda self, device: self
        torch.cuda.get_device_name = lambda device=None: "cpu"
        torch.cuda.nvtx.range_push = torch.cuda.nvtx.range_pop = lambda *_: None
        ids, responses, counts = rollouts()
        log = [
            [{"role": "user", "token_ids": row[:start]}, {"role": "assistant", "token_ids": row[start:end]}]
            for row, (start, end) in zip(ids, responses, strict=True)
        ]
        batch = {"message_log": log, "loss_multiplier": counts, "length": torch.tensor([end for _, end in responses])}
        vocab_size = tiny_gpt.VOCABULARY if full else None
        student, teacher = _worker(1, None), _worker(2, vocab_size)
        settings = tiny_gpt.Loose(
            policy=student.cfg,
            loss_fn=distillation.DistillationLossConfig(**({"tropd_vocab_size": vocab_size} if full else {})),
            distillation=distillation.DistillationConfig(topk_logits_k=tiny_gpt.K, num_prompts_per_step=4),
            checkpointing={"checkpoint_must_save_by": None},
        )
        state = distillation._initial_distillation_save_state()
        state.total_steps = STEP
        own = tiny_gpt.Loose(pad_token_id=0)
        loss_fn = LocalSupportMatching(tiny_gpt.VOCABULARY)
        loader = [BatchedDataDict(batch)]
        try:
            distillation.distillation_train(
                _policy(student),
                _policy(teacher),
                None,
                loader,
                None,
                own,
                loss_fn,
                {},
                {},
                tiny_gpt.Loose(),
                tiny_gpt.Loose(),
                state,
                settings,
            )
            raise AssertionError("the student was not trained")
        except _Done as done:
            (results,) = done.args
        return {"loss": float(results["loss"]), "gradients": tiny_gpt.gradients(student.model)}


def expected(full: bool) -> dict[str, Any]:
    """The same by softmaxes over the whole vocabulary in float64, in one process."""
    with tiny_gpt.layout():
        ids, responses, counts = rollouts()
        places = torch.arange(tiny_gpt.LENGTH).expand_as(ids)
        student = tiny_gpt.model(1)
        student.zero_grad_buffer()
        raw = [model(ids, places, attention_mask=None) for model in (student, tiny_gpt.model(2))]
        logits, teacher = (each[..., : tiny_gpt.VOCABULARY].double() / TEMPERATURE for each in raw)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (start, end) in enumerate(responses):
            mask[row, start - 1 : end - 1] = counts[row] > 0
        if full:
            loss, tokens, outliers = tiny_gpt.tropd(logits, _scored(ids, teacher.detach(), mask))
            assert 0 < outliers < tokens, "both sides of the gate are seen"
        else:
            top, tokens = teacher.detach().topk(tiny_gpt.K), int(mask.sum())
            log_p = logits.gather(-1, top.indices).log_softmax(-1)
            loss = (log_p.exp() * (log_p - top.values.log_softmax(-1))).sum(-1)[mask].sum()
        (loss / tokens).backward()
        return {"loss": float(loss.detach() / tokens), "gradients": tiny_gpt.gradients(student)}


def _scored(ids: Tensor, teacher: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The inputs that `tiny_gpt.tropd` takes from a teacher's logits [B, S, V]."""
    log_q, labels = teacher.log_softmax(-1), ids.roll(-1, 1)
    top = log_q.topk(tiny_gpt.K)
    return {
        "labels": labels,
        "student_mask": mask,
        "teacher_logp": log_q.gather(-1, labels[..., None])[..., 0],
        "teacher_ids": top.indices,
        "teacher_topk_logp": top.values,
        "trust_u": trust_uniforms(ids.shape, seed=STEP),
    }


LENGTHS, ROOMS = (9, 5, 12), (12, 8, 12)
"""Tokens of the packed sequences, and what each is padded to"""
MICRO_BATCHES = 3


def _packed() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(token ids [B, S], response mask [B, S], packed logits of student and teacher [1, T, V] in float64)."""
    random = torch.Generator().manual_seed(22)
    shape = (1, sum(ROOMS), tiny_gpt.VOCABULARY)
    student, teacher = (2.0 * torch.randn(shape, generator=random, dtype=torch.float64) for _ in range(2))
    ids, mask = (
        torch.randint(tiny_gpt.VOCABULARY, (3, tiny_gpt.LENGTH), generator=random),
        torch.zeros(3, tiny_gpt.LENGTH),
    )
    for row, length in enumerate(LENGTHS):
        mask[row, 2:length] = 1.0
        ids[row, length:] = 0
    return ids, mask, student, teacher


def packed(sources: tuple[Path, ...], tensor: int, context: int, full: bool) -> tuple[float, Any]:
    """(reported loss, gradient of the whole packed logits as far as this rank has it) through both post-processors.

    The logits are given, because packing needs an attention that a CPU does not have. The factor of Megatron's
    schedule, context ranks / micro-batches, is applied here.
    """
    use(*sources)
    with tiny_gpt.layout(tensor, context):
        from megatron.core import parallel_state
        from megatron.core.packed_seq_params import PackedSeqParams
        from nemo_rl.distributed.batched_data_dict import BatchedDataDict
        from nemo_rl.distributed.model_utils import _get_tokens_on_this_cp_rank
        from nemo_rl.models.megatron.train import LossPostProcessor, TopkLogitsPostProcessor

        from examples.integrations.nemo_rl import LocalSupportMatching
        from examples.integrations.nemo_rl_full import Tropd

        ids, mask, student, teacher = _packed()
        ends = torch.tensor([0, *ROOMS]).cumsum(0)
        cp_rank, tp_rank = parallel_state.get_context_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
        places = [torch.arange(start, end)[None] for start, end in itertools.pairwise(ends.tolist())]
        rows = torch.cat([_get_tokens_on_this_cp_rank(each, cp_rank, context)[0] for each in places])
        width = tiny_gpt.PADDED // tensor
        whole = torch.nn.functional.pad(student.float(), (0, tiny_gpt.PADDED - tiny_gpt.VOCABULARY)).requires_grad_()
        wide = torch.nn.functional.pad(
            teacher.float(), (0, tiny_gpt.PADDED - tiny_gpt.VOCABULARY), value=9.0 if full else -99.0
        )
        columns = slice(tp_rank * width, (tp_rank + 1) * width)
        settings = _config(tiny_gpt.VOCABULARY if full else None)
        settings["sequence_packing"] = {"enabled": True}
        settings["megatron_cfg"]["context_parallel_size"] = context
        data = BatchedDataDict({"input_ids": ids, "input_lengths": torch.tensor(LENGTHS), "token_mask": mask})
        data["sample_mask"] = torch.tensor([1.0, 0.0, 1.0])
        with torch.no_grad():
            _, found = TopkLogitsPostProcessor(settings, tiny_gpt.K)(data, ends)(wide[:, rows, columns])
        data["teacher_topk_logits"], data["teacher_topk_indices"] = found["topk_logits"], found["topk_indices"]
        loss_fn = Tropd(data, tiny_gpt.VOCABULARY, STEP) if full else LocalSupportMatching(tiny_gpt.VOCABULARY)
        borders = torch.tensor([0, *LENGTHS]).cumsum(0)
        layout = PackedSeqParams(qkv_format="thd", cu_seqlens_q=borders, cu_seqlens_q_padded=ends)
        count = (mask * data["sample_mask"][:, None])[:, 1:].sum()
        post = LossPostProcessor(loss_fn, settings, MICRO_BATCHES)(data, layout, torch.tensor(2.0), count)
        loss, report = post(whole[:, rows, columns] * 1.0)
        (loss * context / MICRO_BATCHES).backward()
        assert whole.grad is not None and not whole.grad[..., tiny_gpt.VOCABULARY :].any()
        return report["loss"], whole.grad[..., : tiny_gpt.VOCABULARY].double().numpy()


def packed_expected(full: bool) -> tuple[float, Any]:
    """The same in float64."""
    ids, mask, student, teacher = _packed()
    leaf, total = student.requires_grad_(), torch.zeros((), dtype=torch.float64)
    tokens = outliers = start = 0
    uniforms = trust_uniforms(ids.shape, seed=STEP)
    for row, (length, room) in enumerate(zip(LENGTHS, ROOMS, strict=True)):
        logits, log_q = leaf[:, start : start + length], teacher[:, start : start + length]
        keep, start = mask[row : row + 1, :length].roll(-1, 1) > 0, start + room
        keep[:, -1] = False
        if row == 1:
            continue
        if full:
            scored = _scored(ids[row : row + 1, :length], log_q, keep) | {"trust_u": uniforms[row : row + 1, :length]}
            loss, count, found = tiny_gpt.tropd(logits, scored)
            outliers += found
        else:
            top, count = log_q.topk(tiny_gpt.K), int(keep.sum())
            log_p = logits.gather(-1, top.indices).log_softmax(-1)
            loss = (log_p.exp() * (log_p - top.values.log_softmax(-1))).sum(-1)[keep].sum()
        total, tokens = total + loss, tokens + count
    assert not full or 0 < outliers < tokens, "both sides of the gate are seen"
    (total / tokens).backward()
    assert leaf.grad is not None
    return float(total.detach() / tokens), leaf.grad.numpy()
