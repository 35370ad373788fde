"""Measures errors against float64 in the hardest case: bfloat16 operands and a student that is close to its teacher.

    python -m benchmarks.numerics [--device cuda]

It checks the log-prob of the sampled token, and the gradient of a top-64 forward KL for hidden states and weight. It
compares logits kept in float32 (our fused form) with logits rounded to bfloat16 (given logits). It uses one rank.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from benchmarks.inputs import kernel_of, with_main_grad
from benchmarks.measure import table, write_result
from tropd_mcore import logs
from tropd_mcore.conformance.ranks import on_fresh_ranks
from tropd_mcore.kernel.choose import backend as choose_backend
from tropd_mcore.kernel.source import GivenLogits, OutputLayer
from tropd_mcore.kernel.support_loss import TokenLoss, support_loss
from tropd_mcore.kernel.token_losses import TokenLosses
from tropd_mcore.objectives.parts.divergences import topk_forward_kl
from tropd_mcore.progress import progress

log = logging.getLogger("benchmarks.numerics")

TOKENS, HIDDEN, VOCABULARY, TOPK = 256, 1024, 32768, 64
LOGIT_NOISE = 0.05
"""Standard deviation of teacher logits minus student logits."""


@dataclass(frozen=True)
class Row:
    """Errors of one form and backend."""

    form: str
    backend: str
    logp_rms: float
    """error of the sampled token's log-prob, nats"""
    logp_max: float
    hidden_gradient_error: float
    """norm of the difference / norm of the float64 gradient"""
    weight_gradient_error: float


def errors(device: str, backends: list[str]) -> list[Row]:
    """Return all rows, computed on one rank."""
    random = torch.Generator().manual_seed(5)
    hidden_TD = torch.randn(TOKENS, HIDDEN, generator=random).bfloat16().to(device)
    weight_WD = torch.randn(VOCABULARY, HIDDEN, generator=random).mul_(4.5 / HIDDEN**0.5).bfloat16().to(device)
    exact_TV = hidden_TD.double() @ weight_WD.double().t()
    noise_TV = LOGIT_NOISE * torch.randn(exact_TV.shape, generator=random).to(device)
    teacher_TK, ids_TK = (exact_TV + noise_TV).log_softmax(dim=1).topk(TOPK, dim=1)
    sampled_T1 = torch.multinomial(exact_TV.softmax(dim=1).float().cpu(), 1, generator=random).to(device)
    true_logp_T = exact_TV.log_softmax(dim=1).gather(1, sampled_T1)[:, 0]
    true_dh, true_dw = _exact_gradient(hidden_TD.double(), weight_WD.double(), ids_TK, teacher_TK)
    ids_TJ = torch.cat([sampled_T1, ids_TK], dim=1)
    rows = []
    for name, form in product(backends, ("fused", "given")):
        kernel = kernel_of(VOCABULARY, choose_backend(name, torch.device(device)), 128)
        hidden, weight = hidden_TD.clone().requires_grad_(True), with_main_grad(weight_WD)
        source = OutputLayer(hidden, weight) if form == "fused" else GivenLogits(hidden @ weight.t())
        output = support_loss(
            source,
            ids_TJ,
            _forward_kl(teacher_TK),
            kernel,
            unique_run_lengths=(1, TOPK),
            weight_gradient="deferred" if form == "fused" else "recompute",
        )
        output.loss_sum.backward()
        difference_T = output.columns["logp"].double() - true_logp_T
        assert hidden.grad is not None
        dw: Tensor = weight.main_grad if form == "fused" else weight.grad  # type: ignore[attr-defined, assignment]
        rows.append(
            Row(
                form=form,
                backend=name,
                logp_rms=float(difference_T.square().mean().sqrt()),
                logp_max=float(difference_T.abs().max()),
                hidden_gradient_error=_relative(hidden.grad, true_dh),
                weight_gradient_error=_relative(dw, true_dw),
            )
        )
    return rows


def _forward_kl(teacher_TK: Tensor) -> TokenLoss:
    def loss(logp_CJ: Tensor, entropy_C: Tensor, divergence_C: Tensor | None, rows: slice) -> TokenLosses:
        value_C = topk_forward_kl(logp_CJ[:, 1:], teacher_TK[rows].to(logp_CJ.dtype), norm="truncated")
        counted_C = torch.ones_like(value_C, dtype=torch.bool)
        return TokenLosses(value_C, counted_C, {"logp": logp_CJ[:, 0].detach()})

    return loss


def _exact_gradient(hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, teacher_TK: Tensor) -> tuple[Tensor, Tensor]:
    hidden, weight = hidden_TD.requires_grad_(True), weight_VD.requires_grad_(True)
    logp_TK = (hidden @ weight.t()).log_softmax(dim=1).gather(1, ids_TK)
    (teacher_TK.exp() * (teacher_TK - logp_TK)).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def main() -> None:
    """Run one command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backends", nargs="+", default=["eager", "compile"])
    args = parser.parse_args()
    rows: list[Row] = on_fresh_ranks(errors, 1, args.device, args.backends)[0]
    cells = [
        [
            f"{row.form} {row.backend}",
            f"{row.logp_rms:.1e}",
            f"{row.logp_max:.1e}",
            f"{row.hidden_gradient_error:.1e}",
            f"{row.weight_gradient_error:.1e}",
        ]
        for row in rows
    ]
    print(table(["form, backend", "log-prob rms", "max", "dH error", "dW error"], cells))
    suffix = "" if args.device == "cpu" else f"_{args.device}"
    options = f"--device {args.device} --backends {' '.join(args.backends)}"
    print(write_result(f"numerics{suffix}", rows, command=f"python -m benchmarks.numerics {options}"))


if __name__ == "__main__":
    logs.configure()
    with progress(log, "benchmarks.numerics"):
        main()
