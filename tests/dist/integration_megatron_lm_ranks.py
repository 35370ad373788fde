"""examples/integrations/megatron_lm.py under Megatron's schedules, in rank processes, with a float64 reference.

`schedule` takes the megatron-core that comes first on the path. `megatron_lm` and `bridge` need the sources of these
stacks (tests/dist/peer_sources.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.dist import tiny_gpt
from tests.dist.peer_path import BRIDGE_STUBS, add_bridge, first_on_path

Found = dict[str, Any]
"""gradients of this rank, the reported loss, and which megatron-core it was"""


def schedule(tensor: int, per_token: bool) -> Found:
    """Two micro-batches under `forward_backward_no_pipelining` and `finalize_model_grads`."""
    with tiny_gpt.layout(tensor):
        from megatron.core.pipeline_parallel import get_forward_backward_func

        from examples.integrations.megatron_lm import make_forward_step

        module, data = tiny_gpt.model(seed=1, per_token=per_token), tiny_gpt.batches()
        module.zero_grad_buffer()
        reports = get_forward_backward_func()(
            forward_step_func=make_forward_step(tiny_gpt.VOCABULARY),
            data_iterator=iter(data),
            model=[module],
            num_microbatches=len(data),
            seq_length=tiny_gpt.LENGTH,
            micro_batch_size=tiny_gpt.BATCH,
            forward_only=False,
        )
        total = torch.stack([report["tropd loss"] for report in reports]).sum(dim=0)
        return _found(module, total[0] / total[1])


def expected(per_token: bool) -> Found:
    """One process, logits of the model itself, TrOPD by a softmax over the whole vocabulary in float64."""
    with tiny_gpt.layout():
        module, data = tiny_gpt.model(seed=1), tiny_gpt.batches()
        module.zero_grad_buffer()
        found = [tiny_gpt.tropd(module(b["tokens"], b["position_ids"], attention_mask=None), b) for b in data]
        count = sum(tokens for _, tokens, _ in found)
        assert all(0 < outliers < tokens for _, tokens, outliers in found), "both sides of the gate are seen"
        parts = [loss / (count if per_token else tokens * len(data)) for loss, tokens, _ in found]
        torch.stack(parts).sum().backward()
        return _found(module, torch.stack([loss for loss, _, _ in found]).sum() / count)


def context(source: Path | None) -> tuple[float, int, Any]:
    """(sum, count, gradient of the whole logits) of this context rank, for a model that looks its logits up."""
    if source is not None:
        first_on_path([source])
    with tiny_gpt.layout(context=2):
        from examples.integrations.megatron_lm import make_forward_step

        whole = _logits().float().requires_grad_()

        def look_up(tokens: Tensor, position_ids: Tensor, attention_mask: None) -> Tensor:
            return whole.gather(1, position_ids[..., None].expand(-1, -1, tiny_gpt.VOCABULARY))

        logits, loss_func = make_forward_step(tiny_gpt.VOCABULARY)(iter(tiny_gpt.batches(1)), look_up)
        loss, count, _ = loss_func(logits)
        loss.backward()
        assert whole.grad is not None and logits.shape[1] == tiny_gpt.LENGTH // 2
        return float(loss.detach()), int(count), whole.grad.double().numpy()


def context_expected() -> tuple[float, int, Any]:
    """The same in one process."""
    whole = _logits().requires_grad_()
    loss, count, _ = tiny_gpt.tropd(whole, tiny_gpt.batches(1)[0])
    loss.backward()
    assert whole.grad is not None
    return float(loss.detach()), count, whole.grad.numpy()


def _logits() -> Tensor:
    random = torch.Generator().manual_seed(9)
    shape = (tiny_gpt.BATCH, tiny_gpt.LENGTH, tiny_gpt.VOCABULARY)
    return 2.0 * torch.randn(shape, generator=random, dtype=torch.float64)


def _found(module: Any, loss: Tensor) -> Found:
    import megatron.core

    gradients = tiny_gpt.gradients(module)
    return {"loss": float(loss.detach()), "gradients": gradients, "version": megatron.core.__version__}


def _count_micro_batches(count: int) -> None:
    from megatron.core import num_microbatches_calculator as calculator

    calculator.unset_num_microbatches_calculator()
    calculator.init_num_microbatches_calculator(0, None, tiny_gpt.BATCH * count, tiny_gpt.BATCH, 1)


def megatron_lm(source: Path, tensor: int, per_token: bool) -> Found:
    """One `train_step` of Megatron-LM's own training loop, with its own megatron-core."""
    first_on_path([source])
    with tiny_gpt.layout(tensor):
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.core.timers import Timers
        from megatron.training import global_vars
        from megatron.training.training import train_step

        from examples.integrations.megatron_lm import make_forward_step

        data = tiny_gpt.batches()
        sizes = {"micro_batch_size": tiny_gpt.BATCH, "data_parallel_size": 1, "gtp_weight_remat_size": 1}
        lengths = {"seq_length": tiny_gpt.LENGTH, "decoder_seq_length": tiny_gpt.LENGTH}
        global_vars._GLOBAL_ARGS = tiny_gpt.Loose(empty_unused_memory_level=0, **sizes, **lengths)
        global_vars._GLOBAL_TIMERS = Timers(0, "max")
        _count_micro_batches(len(data))
        module = tiny_gpt.model(seed=1, per_token=per_token)
        reports, *_ = train_step(
            make_forward_step(tiny_gpt.VOCABULARY),
            RerunDataIterator(iter(data)),
            [module],
            tiny_gpt.IdleOptimizer(),
            tiny_gpt.Loose(step=lambda increment: None),
            module.config,
            get_forward_backward_func(),
            iteration=0,
        )
        return _found(module, reports["tropd loss"])


def bridge(source: Path, megatron: Path, tensor: int, per_token: bool) -> Found:
    """One `train_step` of Megatron-Bridge's training loop, with the forward step as its `train` prepares it."""
    first_on_path([megatron], BRIDGE_STUBS)
    add_bridge(source)
    with tiny_gpt.layout(tensor):
        from megatron.bridge.training.train import prepare_forward_step_func, train_step
        from megatron.core.pipeline_parallel import get_forward_backward_func
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
        from megatron.core.process_groups_config import ProcessGroupCollection
        from megatron.core.rerun_state_machine import RerunDataIterator
        from megatron.core.timers import Timers

        from examples.integrations.megatron_lm import make_forward_step

        data, module = tiny_gpt.batches(), tiny_gpt.model(seed=1, per_token=per_token)
        _count_micro_batches(len(data))
        settings = tiny_gpt.Loose(
            train=tiny_gpt.Loose(empty_unused_memory_level=0, micro_batch_size=tiny_gpt.BATCH),
            optimizer=tiny_gpt.Loose(),
            ddp=tiny_gpt.Loose(),
            model=tiny_gpt.Loose(seq_length=tiny_gpt.LENGTH),
            dataset=tiny_gpt.Loose(dataloader_type="external"),
            dist=tiny_gpt.Loose(use_decentralized_pg=True),
            data_parallel_size=1,
        )
        state, groups = (
            tiny_gpt.Loose(cfg=settings, timers=Timers(0, "max")),
            ProcessGroupCollection.use_mpu_process_groups(),
        )
        reports, *_ = train_step(
            prepare_forward_step_func(make_forward_step(tiny_gpt.VOCABULARY), state),
            RerunDataIterator(iter(data)),
            [module],
            tiny_gpt.IdleOptimizer(),
            tiny_gpt.Loose(step=lambda increment: None),
            state,
            groups,
            get_forward_backward_func(),
            P2PCommunicator(groups.pp, module.config),
        )
        return _found(module, reports["tropd loss"])
