"""The library inside PyTorch's DDP and FSDP2, and with the parameters of Megatron's wrappers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.dist import wrapper_ranks
from tests.ranks import run_on_ranks
from tropd_mcore import OutputLayer, VocabParallel, distill_loss, objectives


@pytest.mark.parametrize("head", ["own", "tied", "frozen"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_gradients_in_pytorchs_wrappers_equal_those_of_one_process_with_a_softmax(wrapper: str, head: str) -> None:
    arguments = (head == "tied", head == "frozen")
    (expected,) = run_on_ranks(wrapper_ranks.gradients, 1, "none", *arguments)
    for found in run_on_ranks(wrapper_ranks.gradients, 2, wrapper, *arguments):
        assert found.keys() == expected.keys() and ("head.weight" in found) == (head == "own")
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12)


def _call(weight: Tensor, hidden: Tensor, mode: str) -> None:
    vp = VocabParallel.single(wrapper_ranks.V, chunk_tokens=3)
    _, labels, teacher, u = wrapper_ranks.batch(0)
    layer = OutputLayer(hidden, weight, weight_grad=mode)  # type: ignore[arg-type]
    distill_loss(layer, labels, teacher, objectives.tropd(), vp=vp, trust_u_T=u).loss_sum.backward()


def _numbers() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(3)
    shape = (wrapper_ranks.B, wrapper_ranks.S, wrapper_ranks.D)
    return torch.randn(wrapper_ranks.V, wrapper_ranks.D, generator=random), torch.randn(shape, generator=random)


@pytest.mark.parametrize("mode", ["deferred", "folded", "recompute"])
def test_a_parameter_of_megatron_fsdp_gets_an_ordinary_gradient_and_its_old_buffer_stays(mode: str) -> None:
    """Megatron-FSDP keeps the buffer of the previous step in main_grad and copies `grad` after the hook has run."""
    weight, hidden = _numbers()
    plain, owned = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    _call(plain, hidden.requires_grad_(), mode if mode != "folded" else "deferred")
    owned.__fsdp_param__ = True  # type: ignore[attr-defined]
    owned.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    owned.main_grad = torch.full_like(weight, 5.0)  # type: ignore[attr-defined]
    _call(owned, hidden.detach().requires_grad_(), mode)
    assert owned.grad is not None and plain.grad is not None
    assert torch.equal(owned.grad, plain.grad)
    assert bool((owned.main_grad == 5.0).all()) and not owned.grad_added_to_main_grad  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_main_grad_gets_the_gradient_in_its_own_dtype_and_a_tied_embedding_keeps_its_part(dtype: torch.dtype) -> None:
    weight, hidden = _numbers()
    plain, held = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    _call(plain, hidden.requires_grad_(), "deferred")
    held.main_grad = torch.ones_like(weight, dtype=dtype)  # type: ignore[attr-defined]
    held.zero_out_wgrad = True  # type: ignore[attr-defined]  # what Megatron sets where an embedding shares the weight
    _call(held, hidden.detach().requires_grad_(), "deferred")
    assert plain.grad is not None and held.grad is not None
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(held.main_grad.float(), 1.0 + plain.grad, rtol=tolerance, atol=tolerance)  # type: ignore[attr-defined]
    assert held.main_grad.dtype == dtype and held.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert not held.grad.any(), "the embedding's part is added to zeros"
