"""slime's own training actor with our losses, in rank processes, and the same step by a softmax in float64.

`train` is slime's code from the reward of a sample to Megatron's backward pass: the request to the teacher's server,
the rollout manager's conversion and split, the actor's `_get_rollout_data` and `train_actor` with log-probs, advantages
and metrics, `train_one_step`, `get_batch`, `loss_function`. We replace the model (it returns leaf logits), the
optimizer (it does nothing) and the server (it answers like SGLang). tests/dist/peer_stubs.py stands in for ray, sglang,
megatron.training, wandb and others. slime's timing report is off, and its accelerator is the CPU.
"""

from __future__ import annotations

import asyncio
import importlib
import math
import sys
from argparse import Namespace
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from examples.integrations import slime_teacher  # before slime, which has a package `examples`
from tests.dist.layouts import Case, layout_of
from tests.dist.peer_stubs import stand_in_for
from tests.dist.teacher_answers import sglang_answer
from tropd_mcore import trust_uniforms

NOT_INSTALLED = (
    "ray",
    "sglang",
    "sglang_router",
    "torch_memory_saver",
    "megatron.training",
    "megatron.bridge",
    "wandb",
    "pylatexenc",
)
PROMPTS, RESPONSES, VOCABULARY, K = (4, 1, 5, 3), (5, 3, 8, 6), 41, 6
TOTALS = tuple(prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True))
TEMPERATURE, ROLLOUT, SEED = 0.7, 3, 17
PADDED = 16
"""Positions of a micro-batch: slime pads them to a multiple of --data-pad-size-multiplier times TP"""


def teacher_log_probs() -> list[Tensor]:
    """log q at each position of each sample, [S, V] in float64: row p is of token p."""
    random = torch.Generator().manual_seed(11)
    return [torch.randn(total, VOCABULARY, generator=random).double().mul(1.5).log_softmax(-1) for total in TOTALS]


def tokens_and_masks() -> tuple[list[Tensor], list[Tensor]]:
    """Tokens of prompt and response, and the loss mask of the response."""
    random = torch.Generator().manual_seed(12)
    tokens = [torch.randint(VOCABULARY, (total,), generator=random) for total in TOTALS]
    masks = [(torch.rand(count, generator=random) < 0.8).int() for count in RESPONSES]
    return tokens, masks


def logits_of(micro_batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Logits [T, V] of the trained policy and of the old policy, in float64."""
    random = torch.Generator().manual_seed(100 + micro_batch)
    now = torch.randn(length, VOCABULARY, generator=random).double()
    return now, now + 0.3 * torch.randn(length, VOCABULARY, generator=random).double()


def arguments(*, loss: str, per_token: bool, recompute: bool, full: bool) -> Namespace:
    """The arguments that slime reads on this path."""
    ours, slimes = "examples.integrations.slime_teacher", "slime.rollout.on_policy_distillation"
    return Namespace(
        custom_rm_path=f"{ours}.ask" if full else f"{slimes}.reward_func",
        custom_reward_post_process_path=f"{ours}.keep" if full else f"{slimes}.post_process_rewards",
        loss_type="custom_loss", custom_loss_function_path=loss, calculate_per_token_loss=per_token,
        recompute_loss_function=recompute, vocab_size=VOCABULARY, rollout_temperature=TEMPERATURE, seed=SEED,
        reward_key=None, rollout_top_p=1.0, global_batch_size=len(TOTALS), micro_batch_size=2,
        use_dynamic_batch_size=False, data_pad_size_multiplier=8, allgather_cp=False, seq_length=PADDED,
        decoder_seq_length=None, advantage_estimator="grpo", kl_coef=0.0, normalize_advantages=False,
        custom_advantage_function_path=None, compute_advantages_and_returns=True, use_opd=False, use_critic=False,
        use_rollout_logprobs=False, get_mismatch_metrics=False, keep_old_actor=False, use_rollout_entropy=False,
        use_routing_replay=False, use_rollout_routing_replay=False, save_debug_train_data=None,
        ref_update_interval=None,
        custom_megatron_before_log_prob_hook_path=None, custom_megatron_before_train_step_hook_path=None,
        custom_convert_samples_to_train_data_path=None, enable_mtp_training=False, ci_test=False, manual_gc=False,
        reset_optimizer_states=False, overlap_grad_reduce=False, overlap_param_gather=False, log_probs_chunk_size=-1,
        use_distributed_optimizer=False, rollout_batch_size=len(TOTALS), n_samples_per_prompt=1, balance_data=False,
        balance_by_flops=False, log_passrate=False, log_multi_turn=False, use_wandb=False, use_tensorboard=False,
        wandb_always_use_train_step=False, ci_save_grad_norm=None, ci_load_grad_norm=None,
        log_correct_samples=False, check_for_nan_in_loss_and_grad=True,
    )  # fmt: skip


class _Logits(torch.nn.Module):
    """A policy that consists only of its logits, one leaf per micro-batch. In eval mode it is the old policy."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        self.model_type, self.ddp_config = ModelType.encoder_or_decoder, DistributedDataParallelConfig()
        self.leaves: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._width, self._rank, self._size = -(-VOCABULARY // size), rank, size

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        key = tuple(input_ids[0].tolist())
        if key not in self.leaves:
            now, before = logits_of(len(self.leaves), len(key))
            # slime's log-probs include the padding columns and our loss does not. At -1e4 this makes no difference.
            self.leaves[key] = self._columns(now, 0.0).requires_grad_(), self._columns(before, -1e4)
        now, before = self.leaves[key]
        return now * 1.0 if self.training else before * 1.0

    def _columns(self, logits: Tensor, padding: float) -> Tensor:
        padded = torch.nn.functional.pad(logits.float(), (0, self._width * self._size - VOCABULARY), value=padding)
        return padded[None, :, self._width * self._rank : self._width * (self._rank + 1)].contiguous()

    def set_input_tensor(self, tensor: Any) -> None:
        """Called by Megatron's schedule."""

    def zero_grad_buffer(self) -> None:
        """The gradients are read after the step."""

    def finish_grad_sync(self, *_: Any, **__: Any) -> None:
        """There is one data rank."""

    def scale_gradients(self, factor: float | Tensor) -> None:
        """Megatron's division by the number of tokens."""
        for now, _ in self.leaves.values():
            assert now.grad is not None
            now.grad.mul_(factor)


async def _answer(request: web.Request) -> web.Response:
    """The answer of an SGLang server about the tokens of a request."""
    asked = await request.json()
    known = zip(tokens_and_masks()[0], teacher_log_probs(), strict=True)
    tokens, log_q = next(pair for pair in known if asked["input_ids"] == pair[0].tolist())
    assert (
        asked["return_logprob"] and asked["logprob_start_len"] == 0 and asked["sampling_params"]["max_new_tokens"] == 0
    )
    found = sglang_answer(tokens.tolist(), log_q, asked.get("top_logprobs_num", 0))
    return web.json_response({"meta_info": found})


async def _samples(args: Namespace, sample_class: Any, ask: Any) -> list[Any]:
    """The samples of a rollout. slime asks the server for the reward of each."""
    application = web.Application()
    application.router.add_post("/generate", _answer)
    async with TestServer(application) as server:
        args.rm_url = str(server.make_url("/generate"))
        found = []
        for tokens, mask in zip(*tokens_and_masks(), strict=True):
            sample = sample_class(
                index=len(found), tokens=tokens.tolist(), response_length=len(mask), loss_mask=mask.tolist(),
                status=sample_class.Status.COMPLETED,
            )  # fmt: skip
            sample.reward = await ask(args, sample)
            found.append(sample)
        return found


def train(size: int, root: str, options: dict[str, Any]) -> dict[str, Any]:
    """One step of slime's actor: its reports, and the samples and the gradient [T, W] of each micro-batch."""
    if root not in sys.path:
        sys.path.append(root)
        stand_in_for(*NOT_INSTALLED)
    accelerator = importlib.import_module("slime.utils.accelerator")
    accelerator.current_device, accelerator.device = lambda: "cpu", lambda *_: torch.device("cpu")
    accelerator.initialize_accelerator()
    model = importlib.import_module("slime.backends.megatron_utils.model")
    actors = importlib.import_module("slime.backends.megatron_utils.actor")
    rollouts = importlib.import_module("slime.ray.rollout")
    load_function = importlib.import_module("slime.utils.misc").load_function
    logging = importlib.import_module("slime.observability.logging_utils")
    reported: dict[str, Any] = {}
    logging.log = lambda args, numbers, **_: reported.update(numbers)
    args = arguments(**options)
    model.get_args = lambda: args
    importlib.import_module("slime.observability.train_metric_utils").log_perf_data = lambda *_, **__: None
    with layout_of(Case(tensor=size)) as (layout, _):
        manager = object.__new__(rollouts.RolloutManager)
        manager.args, manager.custom_convert_samples_to_train_data_func = args, None
        manager.custom_reward_post_process_func = load_function(args.custom_reward_post_process_path)
        manager.train_parallel_config = {
            "dp_size": 1, "cp_size": 1, "vpp_size": 1, "microbatch_group_size_per_vp_stage": 1,
        }  # fmt: skip
        slime_teacher.TOP_K = K
        ask = importlib.import_module("slime.rollout.rm_hub").async_rm
        samples = asyncio.run(_samples(args, rollouts.Sample, ask))
        data = manager._convert_samples_to_train_data(samples)
        references = manager._split_train_data_by_dp(data)

        policy = _Logits(size, layout.tp_rank)
        policy.config.calculate_per_token_loss = args.calculate_per_token_loss
        actor = object.__new__(actors.MegatronTrainRayActor)
        nothing = lambda *_, **__: None  # noqa: E731
        actor.args, actor.role, actor.model, actor._active_model_tag = args, "actor", [policy], "actor"
        actor.weights_backuper = SimpleNamespace(backup_tags=["actor"], restore=nothing, backup=nothing)
        actor.opt_param_scheduler = SimpleNamespace(step=nothing, get_lr=nothing)
        actor.optimizer = SimpleNamespace(
            zero_grad=nothing, step=lambda: (True, 0.0, 0), scale_loss=lambda loss: loss, param_groups=[]
        )
        actor.weight_updater = SimpleNamespace(pop_metrics=dict)
        actor.prof = SimpleNamespace(step=nothing, iterate_train_actor=nullcontext)
        actor.rollout_data_postprocess = (
            load_function("examples.integrations.slime_full.unpack") if options["full"] else None
        )
        rollout_data = actor._get_rollout_data(references)
        order = rollout_data["micro_batch_indices"], rollout_data["partition"]
        waiting = importlib.import_module("slime.observability.timer").Timer()
        if "train_wait" not in waiting.start_time:  # the actor's `init` starts it
            waiting.start("train_wait")
        actor.train_actor(ROLLOUT, rollout_data)
        gradients = [now.grad[0] for now, _ in policy.leaves.values()]
        return {"reported": reported, "order": order, "gradients": gradients}


def by_softmax(order: tuple[Any, Any], lengths: list[int], *, per_token: bool, full: bool) -> dict[str, Any]:
    """The same, written out: gate, forward KL or mask, PPO's clip with its dual, and the denominators."""
    log_q, (tokens, masks) = teacher_log_probs(), tokens_and_masks()
    loss, trusted, gradients = torch.zeros((), dtype=torch.float64), 0.0, []
    for number, (members, length) in enumerate(zip(order[0], lengths, strict=True)):
        now, before = logits_of(number, length)
        log_p = (now.requires_grad_() / TEMPERATURE).log_softmax(-1)
        old_log_p = (before / TEMPERATURE).log_softmax(-1)
        gradients.append(now)
        end = 0
        for sample in (order[1][member] for member in members):
            end, count = end + TOTALS[sample], RESPONSES[sample]
            weight = masks[sample].double() / (1.0 if per_token else max(int(masks[sample].sum()), 1))
            u = trust_uniforms((count,), seed=(SEED << 32) + ROLLOUT, token_ids=torch.arange(count) + (sample << 32))
            for at in range(count):
                row, place = end - count - 1 + at, TOTALS[sample] - count + at
                x = int(tokens[sample][place])
                r = float(log_q[sample][place, x] - old_log_p[row, x])
                is_trusted = float(u[at]) < min(math.exp(r), 1.0) if full else r > math.log(0.3 / 0.7)
                ratio, advantage = (log_p[row, x] - old_log_p[row, x]).exp(), r if is_trusted else 0.0
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                if advantage < 0:
                    surrogate = torch.maximum(surrogate, log_p.new_tensor(3.0 * advantage))
                each = -surrogate
                if full and not is_trusted:
                    top = log_q[sample][place].topk(K)
                    each = each + (top.values.exp() * (top.values - log_p[row, top.indices])).sum()
                loss = loss + weight[at] * each
                trusted += float(weight[at]) * is_trusted
    divisor = sum(int(mask.sum()) for mask in masks) if per_token else len(TOTALS)
    (loss / divisor).backward()
    numbers = {"train/loss": float(loss.detach()) / divisor, "train/trusted": trusted / divisor}
    return {"reported": numbers, "gradients": [now.grad for now in gradients]}
