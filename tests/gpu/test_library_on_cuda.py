"""The library on a GPU: the results of the CPU, no host sync, and a CUDA graph that replays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.unit.test_library import NAMES, Case, K, V
from tropd_mcore import OutputLayer, TeacherLogits, TeacherTopK, VocabParallel, distill_loss, objectives, trust_uniforms

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = torch.device("cuda")
VP = VocabParallel.single(V, chunk_tokens=8)


def on_gpu(value: Any, dtype: torch.dtype) -> Any:
    """The same with all tensors on the GPU, numbers in `dtype`."""
    if isinstance(value, Tensor):
        return value.to(DEVICE, dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, dict):
        return {name: on_gpu(number, dtype) for name, number in value.items()}
    if value is None:
        return None
    fields = {name: on_gpu(number, dtype) for name, number in vars(value).items()}
    return type(value)(**fields)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_on_cuda_equal_those_of_float64_on_the_cpu(name: str) -> None:
    case, objective = Case(), objectives.from_name(name)
    leaf = case.logits().requires_grad_()
    teacher = case.teacher_of(objective)
    arguments = case.all_of(objective)
    expected = distill_loss(leaf * 1.0, case.x, teacher, objective, vp=VP, **arguments)
    expected.loss_sum.backward()

    theirs = case.logits().to(DEVICE, torch.float32).requires_grad_()
    if isinstance(teacher, TeacherLogits):
        moved: Any = TeacherLogits(on_gpu(teacher.source, torch.float32), VP, K, top=on_gpu(teacher.top, torch.float32))
    else:
        moved = on_gpu(teacher, torch.float32)
    found = distill_loss(theirs * 1.0, case.x.to(DEVICE), moved, objective, vp=VP, **on_gpu(arguments, torch.float32))
    found.loss_sum.backward()
    assert int(found.token_count) == int(expected.token_count)
    scale = float(leaf.grad.abs().max())
    torch.testing.assert_close(found.loss_sum.cpu().double(), expected.loss_sum.detach(), rtol=2e-5, atol=2e-4)
    # The tail of sdpo is log(1 - mass): float32 loses 2.7e-5 of its largest gradient here, on a CPU as well.
    torch.testing.assert_close(theirs.grad.cpu().double(), leaf.grad, rtol=2e-4, atol=5e-5 * scale)


def test_uniforms_are_bit_identical_on_cpu_and_cuda() -> None:
    assert torch.equal(trust_uniforms((4, 1001), seed=77).to(DEVICE), trust_uniforms((4, 1001), seed=77, device=DEVICE))


class Step:
    """TrOPD on bfloat16 hidden states, static tensors on the GPU."""

    def __init__(self) -> None:
        random = torch.Generator().manual_seed(5)
        self.vocabulary, tokens, width = 1000, 96, 64
        self.hidden = torch.randn(tokens, width, generator=random).to(DEVICE, torch.bfloat16).requires_grad_()
        self.weight = torch.randn(self.vocabulary, width, generator=random).to(DEVICE, torch.bfloat16).requires_grad_()
        log_q = torch.randn(tokens, self.vocabulary, generator=random).log_softmax(-1)
        top = log_q.topk(8)
        self.x = torch.randint(self.vocabulary, (tokens,), generator=random).to(DEVICE)
        self.teacher = TeacherTopK(
            log_q.gather(1, self.x.cpu()[:, None])[:, 0].to(DEVICE), top.indices.to(DEVICE), top.values.to(DEVICE)
        )
        self.mask = torch.ones(tokens, dtype=torch.bool, device=DEVICE)
        self.u = trust_uniforms((tokens,), seed=1, device=DEVICE)
        self.vp = VocabParallel.single(self.vocabulary, chunk_tokens=32)

    def __call__(self) -> Tensor:
        out = distill_loss(
            OutputLayer(self.hidden, self.weight),
            self.x,
            self.teacher,
            objectives.tropd(),
            vp=self.vp,
            student_mask_T=self.mask,
            trust_u_T=self.u,
        )
        (out.loss_sum / 96).backward()
        return out.value


def test_a_library_step_has_no_host_sync() -> None:
    step = Step()
    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_of_the_step_replays_with_the_same_numbers() -> None:
    step = Step()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step.hidden.grad = step.weight.grad = None
            eager = step().clone()
        expected = step.hidden.grad.clone(), step.weight.grad.clone()
    torch.cuda.current_stream().wait_stream(stream)
    step.hidden.grad = step.weight.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(value, eager)
    assert torch.equal(step.hidden.grad, expected[0]) and torch.equal(step.weight.grad, expected[1])
