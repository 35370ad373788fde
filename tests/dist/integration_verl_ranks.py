"""verl's own distillation path with our losses, in rank processes, and the same step by a softmax in float64.

`train` is verl's code from the answer of the teacher's server to the backward pass of a micro-batch: the extraction of
log-probs, the teacher manager, the agent loop's padding and batch, `left_right_2_no_padding`, the Megatron engine's
`forward_step` with packing and logits processor, `distillation_ppo_loss` with its reduction, and
`postprocess_micro_batch_func`. We replace the model (it returns leaf logits), the client of the teacher, and the few
fields of an actor's configuration that are read. tests/dist/peer_stubs.py stands in for ray, vllm, pandas and others.
tensordict and omegaconf are the real packages. The device is the CPU.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from examples.integrations import verl, verl_full
from tests.dist.layouts import Case, layout_of
from tests.dist.peer_stubs import stand_in_for
from tests.dist.teacher_answers import sglang_answer

NOT_INSTALLED = (
    "ray", "sglang", "vllm", "hydra", "mbridge", "torchdata", "codetiming", "wandb", "datasets", "peft", "pandas",
    "cachetools", "accelerate", "pylatexenc", "megatron.training", "megatron.bridge", "megatron.legacy",
)  # fmt: skip
PROMPTS, RESPONSES, VOCABULARY, K = (4, 1, 5), (5, 8, 4), 41, 6
LENGTHS = tuple(prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True))
TEMPERATURE = 0.7


def numbers() -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """For each sequence: token ids [S], log q of the token at each place [S, V], logits after each place, mask [R]."""
    random = torch.Generator().manual_seed(21)
    ids = [torch.randint(VOCABULARY, (length,), generator=random) for length in LENGTHS]
    log_q = [torch.randn(n, VOCABULARY, generator=random).double().mul(2.0).log_softmax(-1) for n in LENGTHS]
    logits = [torch.randn(n, VOCABULARY, generator=random).double() for n in LENGTHS]
    masks = [(torch.rand(count, generator=random) < 0.8).long() for count in RESPONSES]
    return ids, log_q, logits, masks


def vllm_answer(ids: list[int], log_q: Tensor, count: int) -> Any:
    """The same in vLLM's form: for each place a dict of the top-k and the token itself, with their ranks."""
    rows: list[Any] = [None]
    for p in range(1, len(ids)):
        order = log_q[p].argsort(descending=True).tolist()
        wanted = dict.fromkeys([ids[p], *order[:count]])
        rows.append({i: SimpleNamespace(logprob=float(log_q[p, i]), rank=order.index(i) + 1) for i in wanted})
    return SimpleNamespace(prompt_logprobs=rows, prompt_token_ids=ids)


class _Teacher:
    """The client of a teacher's server, behind verl's own extraction of its log-probs."""

    def __init__(self, engine: str) -> None:
        self._engine = engine

    async def generate(self, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> Any:
        ids, log_q, *_unused = numbers()
        (found,) = [rows for own, rows in zip(ids, log_q, strict=True) if own.tolist() == prompt_ids]
        fields: dict[str, Any] = {}
        count = sampling_params["prompt_logprobs"]
        if self._engine == "sglang":
            server = importlib.import_module("verl.workers.rollout.sglang_rollout.async_sglang_server")
            server._extract_prompt_logprobs_sglang(
                sglang_answer(prompt_ids, found, count), count, len(prompt_ids), fields
            )
        else:
            known = importlib.metadata.version
            with patch.object(importlib.metadata, "version", lambda name: "0.11.0" if name == "vllm" else known(name)):
                rollout = importlib.import_module("verl.workers.rollout.vllm_rollout.utils")
            rollout.extract_prompt_logprobs(vllm_answer(prompt_ids, found, count), count, fields)
        return SimpleNamespace(extra_fields=fields)


class _Logits(torch.nn.Module):
    """A model that consists only of its logits: one leaf, in the layout of verl's packed tokens."""

    pre_process = post_process = True

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        self.leaf: Tensor | None = None
        self._size, self._rank = size, rank

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        ids, _q, logits, _m = numbers()
        width = -(-VOCABULARY // self._size)
        whole = torch.zeros(*input_ids.shape, width * self._size)
        for row, start, own, values in self._places(input_ids, ids, logits):
            assert input_ids[row, start : start + len(own)].tolist() == own.tolist()
            whole[row, start : start + len(own), :VOCABULARY] = values.float()
            whole[row, start : start + len(own), VOCABULARY:] = -1e4  # verl counts the columns that are padding
        self.leaf = whole[..., width * self._rank : width * (self._rank + 1)].contiguous().requires_grad_()
        return self.leaf * 1.0

    def _places(self, input_ids: Tensor, ids: list[Tensor], values: list[Tensor]) -> Any:
        start, packed = 0, len(input_ids) == 1
        for number, (own, each) in enumerate(zip(ids, values, strict=True)):
            yield (0, start, own, each) if packed else (number, 0, own, each)
            start += -(-len(own) // self._size) * self._size

    def gradients(self, input_shape: Any = None) -> list[Tensor]:
        """The gradient [S, W] of each sequence. The gradient of the padding must be 0."""
        assert self.leaf is not None and self.leaf.grad is not None
        ids, *_unused = numbers()
        found, rest = [], self.leaf.grad.clone()
        for row, start, own, _ in self._places(self.leaf[..., 0], ids, ids):
            found.append(self.leaf.grad[row, start : start + len(own)])
            rest[row, start : start + len(own)] = 0
        assert not rest.any(), "padding has no gradient"
        return found


def _batch(loss_config: Any, engine: str) -> Any:
    """The batch that the agent loop gives to the trainer: padded left and right, with the teacher's values."""
    managers = importlib.import_module("verl.experimental.teacher_loop.teacher_manager")
    loops = importlib.import_module("verl.experimental.agent_loop.agent_loop")
    manager = object.__new__(managers.AsyncTeacherLLMServerManager)
    manager.distillation_loss_config, manager.teacher_client = loss_config, {"teacher": _Teacher(engine)}
    manager.teacher_model_configs = {"teacher": SimpleNamespace(inference=SimpleNamespace(temperature=1.0))}
    ids, _, _, masks = numbers()
    prompt_width, response_width = max(PROMPTS) + 1, max(RESPONSES) + 2
    outputs = []
    for own, mask, prompt, response in zip(ids, masks, PROMPTS, RESPONSES, strict=True):
        found = asyncio.run(manager.compute_teacher_logprobs_single(own.tolist()))
        left, right = prompt_width - prompt, response_width - response
        teacher_ids, teacher_logprobs = managers._pad_teacher_outputs(
            *found, prompt_width=prompt_width, response_width=response_width, prompt_length=prompt,
            response_length=response, pad_token_id=0,
        )  # fmt: skip
        padded = torch.nn.functional.pad(own, (left, right))[None]
        attention = torch.nn.functional.pad(torch.ones_like(own), (left, right))[None]
        outputs.append(SimpleNamespace(
            prompt_ids=padded[:, :prompt_width], response_ids=padded[:, prompt_width:], input_ids=padded,
            response_mask=torch.nn.functional.pad(mask, (0, right))[None], attention_mask=attention,
            position_ids=(attention.cumsum(-1) - 1).clamp(min=0), response_logprobs=None, routed_experts=None,
            teacher_ids=teacher_ids, teacher_logprobs=teacher_logprobs, reward_score=None, num_turns=1,
            extra_fields={}, metrics=SimpleNamespace(model_dump=dict), multi_modal_inputs=None,
        ))  # fmt: skip
    worker = SimpleNamespace(reward_loop_worker_handles=None)
    return loops.AgentLoopWorker._postprocess(worker, outputs)


def train(size: int, roots: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """One micro-batch: the loss, the reported metrics, the drawn uniforms, and the gradient of each sequence."""
    for root in roots:
        if root not in sys.path:
            sys.path.append(root)
    if not any("peer_stubs" in type(finder).__module__ for finder in sys.meta_path):
        stand_in_for(*NOT_INSTALLED)
    losses = importlib.import_module("verl.trainer.distillation.losses")
    configs = importlib.import_module("verl.workers.config")
    padding = importlib.import_module("verl.workers.utils.padding")
    engines = importlib.import_module("verl.workers.engine.megatron.transformer_impl")
    tools = importlib.import_module("verl.utils.tensordict_utils")
    engines.get_device_id = lambda: "cpu"
    loss_config = configs.DistillationLossConfig(
        loss_mode=options["loss_mode"], topk=K, use_task_rewards=False, use_policy_gradient=False, loss_max_clamp=None,
    )  # fmt: skip
    if options["loss_mode"] == "tropd":
        verl_full.VOCAB_SIZE = VOCABULARY
    else:
        verl.install(VOCABULARY)
    with layout_of(Case(tensor=size)) as (layout, _):
        torch.manual_seed(5)  # of the uniforms: one agent loop draws them for all ranks
        batch = padding.left_right_2_no_padding(_batch(loss_config, options["engine"]).to_tensordict())
        batch["temperature"] = torch.full((len(LENGTHS),), TEMPERATURE)
        count = int(sum(mask.sum() for mask in numbers()[3]))
        tools.assign_non_tensor(
            batch, distillation_use_topk=True, distillation_only=options["alone"], dp_size=1, batch_num_tokens=count,
            global_batch_size=len(LENGTHS), num_micro_batch=1,
        )  # fmt: skip
        model = _Logits(size, layout.tp_rank)
        engine = object.__new__(engines.MegatronEngineWithLMHead)
        engine.engine_config = SimpleNamespace(
            use_fused_kernels=False, pad_to_length=False, use_remove_padding=options["packed"],
            dynamic_context_parallel=False, entropy_from_logits_with_chunking=False, context_parallel_size=1,
        )  # fmt: skip
        engine.enable_routing_replay, engine.tf_config = False, model.config
        engine.model_config = SimpleNamespace(
            hf_config=SimpleNamespace(architectures=["Qwen2ForCausalLM"]), tokenizer=SimpleNamespace(pad_token_id=0),
            mtp=SimpleNamespace(enable=False, enable_train=False),
        )  # fmt: skip
        engine.get_data_parallel_group = lambda: None
        actor = SimpleNamespace(
            strategy="megatron", loss_agg_mode=options["reduction"], global_batch_info={}, loss_scale_factor=None
        )
        loss_function = partial(
            losses.distillation_ppo_loss,
            config=actor,
            distillation_config=configs.DistillationConfig(distillation_loss=loss_config),
        )
        after = partial(engine.postprocess_micro_batch_func, forward_only=False, loss_function=loss_function)
        output, last = engine.forward_step(iter([batch]), model, loss_function, after)
        loss, report = last(output)
        loss.backward()
        metrics = {name: float(getattr(value, "values", [value])[0]) for name, value in report["metrics"].items()}
        uniforms = [row[:, -1] for row in batch["teacher_logprobs"].unbind()]
        return {"loss": float(loss), "metrics": metrics, "uniforms": uniforms, "gradients": model.gradients()}


def by_softmax(uniforms: list[Tensor], *, loss_mode: str, reduction: str) -> dict[str, Any]:
    """The same, written out in float64."""
    ids, log_q, logits, masks = numbers()
    log_p = [(each.requires_grad_() / TEMPERATURE).log_softmax(-1) for each in logits]
    sums, trusted, count = [], 0, int(sum(mask.sum() for mask in masks))
    for number, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        each = torch.zeros((), dtype=torch.float64)
        for at in range(response):
            place = prompt + at  # of the token; the logits before it predict it
            top = log_q[number][place].topk(K)
            row = log_p[number][place - 1]
            fkl = (top.values.exp() * (top.values - row[top.indices])).sum()
            if loss_mode == "tropd":
                x = ids[number][place]
                r = float(log_q[number][place, x] - row[x])
                is_trusted = float(uniforms[number][place - 1]) < min(float(torch.tensor(r).exp()), 1.0)
                loss, trusted = (-r * row[x] if is_trusted else fkl), trusted + is_trusted * int(masks[number][at])
            else:
                p, q = row[top.indices].exp().sum(), top.values.exp().sum()
                loss = fkl + (1 - q) * torch.log((1 - q) / (1 - p))
            each = each + loss * masks[number][at]
        sums.append(each / masks[number].sum() if reduction == "seq-mean-token-mean" else each)
    total = torch.stack(sums).sum() / (count if reduction == "token-mean" else len(LENGTHS))
    total.backward()
    return {"loss": float(total.detach()), "trusted": trusted / count, "gradients": [each.grad for each in logits]}
