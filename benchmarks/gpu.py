"""The GPU suite: one GPU computes what one rank of a tensor-parallel group would, at the sizes of real models.

    python -m benchmarks.gpu --suite G1 G2 G3 G4 G5 --peer-root verl=PATH --peer-root nemo_rl=PATH

    G1  loss and gradient of given bfloat16 logits, ours against the peers'
    G2  fused output layer, K1 + entropy, against the three bare matrix products (and liger-kernel, cut-cross-entropy
        if they are installed)
    G3  fused output layer with k teacher candidates, against logits + the peers' losses
    G4  peak memory for growing numbers of tokens
    G5  the teacher's top-k, ours against torch.topk
G6 (no host sync, CUDA graphs, bitwise reruns) is tests/gpu; G7 (numerics) is `python -m benchmarks.numerics --device
cuda`. Each time is measured with CUDA events around one call, after flushing the L2 cache; methods are interleaved, and
median and range are reported. `--plan quick` has one number of tokens and two widths and takes some minutes on a GPU.
`--device cpu --plan small` runs the same code without a GPU to check that it works; its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.inputs import Tokens, Upstream, kernel_of, make_tokens, with_main_grad
from benchmarks.measure import Spread, interleaved, table, write_result
from benchmarks.ours import ours
from benchmarks.peers import Composite, load_composite
from tropd_mcore import logs
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.choose import backend as choose_backend
from tropd_mcore.kernel.shard import chunks
from tropd_mcore.kernel.source import GivenLogits, OutputLayer, matmul_into
from tropd_mcore.kernel.topk import distributed_topk
from tropd_mcore.progress import progress

log = logging.getLogger("benchmarks.gpu")

VOCABULARY = 151936
L2_FLUSH_BYTES = 256 * 2**20
"""More than the L2 cache of any current GPU."""


@dataclass(frozen=True)
class Row:
    """The result of one method at one size."""

    suite: str
    method: str
    tokens: int
    local_vocabulary: int
    hidden: int
    k: int
    ms: Spread
    peak_extra_bytes: int
    """peak memory beyond the memory allocated before the call"""
    useful_tflops: float
    """6 N D W / time for fused methods, otherwise 0"""


@dataclass(frozen=True)
class Plan:
    """Sizes and repeats of a run."""

    tokens: list[int]
    widths: list[int]
    hidden: list[int]
    topk: list[int]
    chunk_tokens: int
    warmup: int
    repeats: int


REAL = Plan([4096, 8192, 16384], [VOCABULARY // tp for tp in (1, 2, 4, 8)], [3584, 5120], [16, 64, 128], 4096, 10, 50)
QUICK = Plan([8192], [VOCABULARY, VOCABULARY // 8], [4096], [64], 4096, 5, 20)
SMALL = Plan([32, 64], [512, 768], [64], [4, 8], 32, 1, 2)
PLANS = {"full": REAL, "quick": QUICK, "small": SMALL}


@dataclass(frozen=True)
class _Size:
    tokens: int
    width: int
    hidden: int
    k: int


class Clock:
    """Measures calls on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(L2_FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.int8, device=device)

    def ms(self, call: Callable[[], object]) -> float:
        """Return the milliseconds of one call."""
        self._flush.zero_()
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def peak_bytes(self, call: Callable[[], object]) -> int:
        """Return the peak memory allocated during a call, beyond that before it; 0 without a GPU."""
        if self.device.type != "cuda":
            call()
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def given_logits(plan: Plan, clock: Clock, roots: dict[str, str], backends: list[str]) -> Iterator[Row]:
    """Run G1."""
    for tokens, width in product(plan.tokens, plan.widths):
        data = make_tokens(tokens, width, min(64, width // 4), device=str(clock.device))
        original_TW = torch.randn(tokens, width, device=clock.device).mul_(2.0).bfloat16()
        logits_TW = original_TW.clone()
        losses: dict[str, Composite] = {name: load_composite(name, roots) for name in roots}
        for name in backends:
            kernel = kernel_of(width, choose_backend(name, clock.device), plan.chunk_tokens)
            losses[f"ours-{name}"] = partial(_ours_given, kernel)
        calls = {name: partial(_given_forward_backward, loss, logits_TW, data) for name, loss in losses.items()}
        prepare = partial(logits_TW.copy_, original_TW)
        yield from _rows("G1", calls, prepare, plan, clock, _Size(tokens, width, 0, data.topk_ids_TK.shape[1]))


def fused_head(plan: Plan, clock: Clock, roots: dict[str, str], backends: list[str]) -> Iterator[Row]:
    """Run G2 (k = 0) and G3."""
    for tokens, width, hidden, k in product(plan.tokens, plan.widths, plan.hidden, [0, *plan.topk]):
        data = make_tokens(tokens, width, k, device=str(clock.device))
        hidden_TD = torch.randn(tokens, hidden, device=clock.device).bfloat16().requires_grad_(True)
        weight_WD = with_main_grad(torch.randn(width, hidden, device=clock.device).mul_(2.0 / hidden**0.5).bfloat16())
        losses = _composites(roots, hidden_TD, weight_WD, data) if k else _installed(hidden_TD, weight_WD, data)
        for name in backends:
            kernel = kernel_of(width, choose_backend(name, clock.device), plan.chunk_tokens)
            source = OutputLayer(hidden_TD, weight_WD)
            losses[f"ours-{name}"] = partial(ours, source, data, kernel, weight_gradient="folded")
        calls: dict[str, Callable[[], object]] = {
            name: partial(_forward_backward, loss, [hidden_TD, weight_WD]) for name, loss in losses.items()
        }
        calls["floor"] = _floor(hidden_TD.detach(), weight_WD, plan.chunk_tokens)
        yield from _rows("G3" if k else "G2", calls, _nothing, plan, clock, _Size(tokens, width, hidden, k))


def memory_slope(plan: Plan, clock: Clock, backends: list[str]) -> Iterator[Row]:
    """Run G4: the peaks of `fused_head` for growing numbers of tokens, with the whole vocabulary."""
    width, hidden = plan.widths[0], plan.hidden[0]
    for tokens in [scale * plan.tokens[0] for scale in (1, 2, 4, 8, 16)]:
        yield from fused_head(
            Plan([tokens], [width], [hidden], [plan.topk[0]], plan.chunk_tokens, 1, 1), clock, {}, backends
        )


def teacher_topk(plan: Plan, clock: Clock, backends: list[str]) -> Iterator[Row]:
    """Run G5."""
    for width, k in product(plan.widths, plan.topk):
        tokens = plan.tokens[0]
        logits_TW = torch.randn(tokens, width, device=clock.device)
        kernel = kernel_of(width, choose_backend(backends[0], clock.device), plan.chunk_tokens)
        source = GivenLogits(logits_TW)
        calls: dict[str, Callable[[], object]] = {
            "ours": partial(distributed_topk, source, k=k, kernel=kernel),
            "torch.topk": partial(torch.topk, logits_TW, k, dim=1),
        }
        yield from _rows("G5", calls, _nothing, plan, clock, _Size(tokens, width, 0, k))


def _ours_given(kernel: Kernel, logits_TW: Tensor, data: Tokens) -> Tensor:
    return ours(GivenLogits(logits_TW), data, kernel, weight_gradient="recompute")


def _linear_and(composite: Composite, hidden_TD: Tensor, weight_WD: Tensor, data: Tokens) -> Tensor:
    return composite(torch.nn.functional.linear(hidden_TD, weight_WD), data)


def _given_forward_backward(loss: Composite, logits_TW: Tensor, data: Tokens) -> None:
    anchor = torch.zeros((), device=logits_TW.device, requires_grad=True)
    loss(Upstream.apply(anchor, logits_TW, None), data).backward()


def _forward_backward(loss: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None
    loss().backward()


def _nothing() -> None:
    pass


def _composites(
    roots: dict[str, str], hidden_TD: Tensor, weight_WD: Tensor, data: Tokens
) -> dict[str, Callable[[], Tensor]]:
    """Methods that compute logits with a plain linear layer, then a peer's loss."""
    return {
        f"linear + {name}": partial(_linear_and, load_composite(name, roots), hidden_TD, weight_WD, data)
        for name in roots
    }


def _installed(hidden_TD: Tensor, weight_WD: Tensor, data: Tokens) -> dict[str, Callable[[], Tensor]]:
    """Fused cross entropies of other projects, if installed: one log-prob per token, no entropy, no top-k."""
    methods: dict[str, Callable[[], Tensor]] = {}
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        methods["liger"] = lambda: liger(weight_WD, hidden_TD, data.target_T)
    if importlib.util.find_spec("cut_cross_entropy") is not None:
        from cut_cross_entropy import linear_cross_entropy

        methods["cce"] = lambda: linear_cross_entropy(
            hidden_TD, weight_WD, data.target_T, reduction="sum", filter_eps=None
        )
    return methods


def _floor(hidden_TD: Tensor, weight_WD: Tensor, chunk_tokens: int) -> Callable[[], object]:
    """The three products of every chunk: logits in float32, dH, and dW added to main_grad."""
    weight, main_grad = weight_WD.detach(), weight_WD.main_grad  # type: ignore[attr-defined]
    dh_TD = torch.empty_like(hidden_TD)
    logits = torch.empty(min(chunk_tokens, len(hidden_TD)), len(weight), device=weight.device)
    dz = torch.zeros_like(logits, dtype=hidden_TD.dtype)

    def run() -> None:
        for rows in chunks(len(hidden_TD), chunk_tokens):
            count = rows.stop - rows.start
            matmul_into(logits[:count], hidden_TD[rows], weight.t(), accumulate=False)
            torch.mm(dz[:count], weight, out=dh_TD[rows])
            matmul_into(main_grad, dz[:count].t(), hidden_TD[rows], accumulate=True)

    return run


def _rows(
    suite: str,
    calls: Mapping[str, Callable[[], object]],
    prepare: Callable[[], object],
    plan: Plan,
    clock: Clock,
    size: _Size,
) -> Iterator[Row]:
    """Warm up, measure memory once, then time the calls interleaved. `prepare` runs before each call, untimed."""
    peaks = {}
    for name, call in calls.items():
        for _ in range(plan.warmup):
            prepare()
            call()
        prepare()
        peaks[name] = clock.peak_bytes(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in interleaved(calls, plan.repeats):
        prepare()
        times[name].append(clock.ms(call))
    for name in calls:
        spread = Spread.of(times[name])
        useful = 6.0 * size.tokens * size.width * size.hidden / (spread.median * 1e-3) / 1e12
        yield Row(suite, name, size.tokens, size.width, size.hidden, size.k, spread, peaks[name], useful)


def main() -> None:
    """Run one command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", default=["G1", "G2", "G4", "G5"], choices=["G1", "G2", "G3", "G4", "G5"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--backends", nargs="+", default=["triton", "compile", "eager"])
    parser.add_argument("--peer-root", action="append", default=[], metavar="PEER=PATH")
    parser.add_argument("--plan", default="full", choices=list(PLANS), help="sizes and number of repeats")
    parser.add_argument("--name", default="gpu", help="results/<name>.json")
    args = parser.parse_args()
    roots = dict(entry.split("=", 1) for entry in args.peer_root)
    plan, clock = PLANS[args.plan], Clock(torch.device(args.device))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if args.device == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            if "G1" in args.suite:
                rows += given_logits(plan, clock, roots, args.backends)
            if {"G2", "G3"} & set(args.suite):
                rows += fused_head(plan, clock, roots, args.backends)
            if "G4" in args.suite:
                rows += memory_slope(plan, clock, args.backends)
            if "G5" in args.suite:
                rows += teacher_topk(plan, clock, args.backends)
        finally:
            dist.destroy_process_group()
    cells = [
        [
            f"{row.suite} {row.method}",
            f"{row.tokens}x{row.local_vocabulary} D={row.hidden} k={row.k}",
            str(row.ms),
            f"{row.useful_tflops:.0f}",
            f"{row.peak_extra_bytes / 1e9:.3f}",
        ]
        for row in rows
    ]
    print(table(["method", "size", "ms [range]", "TF useful", "extra GB"], cells))
    options = f"--suite {' '.join(args.suite)} --plan {args.plan} --backends {' '.join(args.backends)}"
    print(write_result(args.name, rows, command=f"python -m benchmarks.gpu {options}"))


if __name__ == "__main__":
    logs.configure()
    with progress(log, "benchmarks.gpu"):
        main()
