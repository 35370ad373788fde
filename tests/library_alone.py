"""A program for an environment with only torch: it compares the library with results recorded by the trainer.

    python tests/library_alone.py FOLDER      # of files rank-0.pt, rank-1.pt, ... written by test_library_alone

Prints how long the import took and whether sums and gradients are bit-identical. Imports only torch and tropd_mcore.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

REFUSED = {
    "numpy", "pydantic", "yaml", "megatron", "transformers", "tokenizers", "safetensors", "aiohttp", "sglang", "psutil",
    "tqdm", "triton",
}  # fmt: skip


class Refuse:
    """An import hook that hides the modules that the library must not need."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Raise ModuleNotFoundError for the modules of REFUSED."""
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is refused here", name=name)


def alone() -> None:
    """Hide the refused modules from this process, and put this checkout on the path."""
    sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run(rank: int, folder: str, found: Any) -> None:
    """Repeat every recorded call of one rank."""
    alone()
    import torch
    import torch.distributed as dist

    from tropd_mcore import OutputLayer, TeacherTopK, VocabParallel, distill_loss, objectives

    calls = torch.load(Path(folder, f"rank-{rank}.pt"), weights_only=True)
    ranks = len(list(Path(folder).glob("rank-*.pt")))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", ranks), rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    equal = []
    for call in calls:
        hidden, weight = call["hidden"].requires_grad_(), call["weight"].requires_grad_()
        weight.main_grad = torch.zeros_like(weight, requires_grad=False)
        out = distill_loss(
            OutputLayer(hidden, weight, reduce_hidden_grad=call["reduce"], weight_grad=call["weight_grad"]),
            call["target_ids_T"],
            TeacherTopK(**call["teacher"]),
            objectives.tropd(**call["constants"]),
            vp=VocabParallel(group, **call["vp"]),
            **call["given"],
        )
        out.loss_sum.backward()
        equal.append(torch.equal(out.value, call["value"]) and torch.equal(hidden.grad, call["gradient"]))
    found.put((rank, equal))
    dist.barrier()
    dist.destroy_process_group()


def main(folder: str) -> int:
    """Returns 0 if all results are bit-identical."""
    begun = time.monotonic()
    import torch

    loaded = time.monotonic()
    before = set(sys.modules)
    from tropd_mcore import distill_loss

    assert callable(distill_loss)
    took = time.monotonic() - loaded
    print(f"torch {torch.__version__}: {loaded - begun:.2f} s; tropd_mcore after it: {took:.3f} s, "
          f"{len(set(sys.modules) - before)} modules")  # fmt: skip
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    ranks = len(list(Path(folder).glob("rank-*.pt")))
    processes = [context.Process(target=run, args=(rank, folder, found)) for rank in range(ranks)]
    for process in processes:
        process.start()
    answers = dict(found.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    for rank, equal in sorted(answers.items()):
        print(f"rank {rank}: {sum(equal)} of {len(equal)} calls are the trainer's, bit for bit")
    return 0 if all(equal and all(equal) for equal in answers.values()) else 1


if __name__ == "__main__":
    alone()
    sys.exit(main(sys.argv[1]))
