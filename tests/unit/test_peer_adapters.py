"""Adapters of other projects' losses: a clear line without a checkout, and results with one (a fake, written here)."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.ranks import run_on_ranks
from tropd_mcore.config.objectives.matching import GkdObjective
from tropd_mcore.conformance.adapters.checkout import Checkout, StandIn, in_sys_modules
from tropd_mcore.conformance.adapters.inputs import CompositeInputs
from tropd_mcore.conformance.adapters.naive import composite
from tropd_mcore.conformance.peers import PeerCase, PeerMissing, load_peer
from tropd_mcore.errors import TropdError

ADAPTERS = "tropd_mcore.conformance.adapters"
PROJECTS = ("verl", "nemo_rl", "modelopt", "ms_swift", "slime")
VOCABULARY = 7
WIDTH = 4
"""Of the shard of each of two ranks: the last column of the second is padding."""
TEMPERATURE = 0.7
STUDENT_ROWS, TEACHER_ROWS = (0, 2), (3,)


def peers_of(project: str) -> list[str]:
    """The functions of an adapter that the command line can name."""
    module = importlib.import_module(f"{ADAPTERS}.{project}")
    return [name for name, function in inspect.getmembers(module) if hasattr(function, "coverage")]


ALL = [(project, name) for project in PROJECTS for name in peers_of(project)]


def make_case(group: Any, name: str = "log_prob", *, rank: int = 0) -> PeerCase:
    """One rank's part of five tokens. Rows 1 and 4 are in neither mask."""
    draw = torch.Generator().manual_seed(3)
    logits_TV = torch.randn(5, 2 * WIDTH, generator=draw)
    logits_TV[:, VOCABULARY:] = 30.0
    topk_ids_TK = torch.stack([torch.randperm(VOCABULARY, generator=draw)[:3] for _ in range(5)])
    columns = slice(rank * WIDTH, (rank + 1) * WIDTH)
    mask = torch.zeros(5, dtype=torch.bool)
    nothing_T = torch.zeros(5)
    return PeerCase(
        name=name,
        objective=GkdObjective(kind="gkd"),
        logits_TW=logits_TV[:, columns].clone().requires_grad_(),
        teacher_logits_TW=logits_TV[:, columns].clone(),
        vocab_start=columns.start,
        vocab_stop=columns.stop,
        vocab_size=VOCABULARY,
        group=group,
        temperature=TEMPERATURE,
        softcap=None,
        target_ids_T=torch.tensor([0, 1, 6, 3, 4]),
        teacher_logp_T=nothing_T,
        topk_ids_TK=topk_ids_TK,
        teacher_topk_logp_TK=torch.rand(5, 3, generator=draw).log() - 1.5,
        own_ids_TL=topk_ids_TK[:, :0],
        teacher_own_logp_TL=torch.zeros(5, 0),
        old_logp_T=nothing_T,
        rollout_logp_T=nothing_T,
        trust_u_T=nothing_T,
        student_mask_T=mask.index_fill(0, torch.tensor(STUDENT_ROWS), True),
        prefix_mask_T=mask.index_fill(0, torch.tensor(TEACHER_ROWS), True),
        weight_T=torch.tensor([0.5, 1.0, 2.0, 1.5, 1.0]),
    )


def true_loss(case: PeerCase, logits_TV: Tensor) -> Tensor:
    """Token by token. The divergence has no loss on the teacher's tokens."""
    total = torch.zeros((), dtype=torch.float64)
    for row in STUDENT_ROWS if case.name.startswith("gkd") else STUDENT_ROWS + TEACHER_ROWS:
        logp_V = torch.log_softmax(logits_TV[row, :VOCABULARY] / TEMPERATURE, dim=0)
        if case.name == "log_prob":
            loss = -logp_V[case.target_ids_T[row]]
        elif case.name == "entropy":
            loss = sum((logp.exp() * logp for logp in logp_V), start=torch.zeros(()))
        else:
            loss = torch.zeros(())
            pairs = zip(case.topk_ids_TK[row].tolist(), case.teacher_topk_logp_TK[row].tolist(), strict=True)
            for vocabulary_id, logq in pairs:
                loss = loss + math.exp(logq) * (logq - logp_V[vocabulary_id])
        total = total + float(case.weight_T[row]) * loss
    return total


def assert_right_on_this_rank(peer: str, name: str) -> None:
    """Loss and gradient of the peer on this rank's shard against the whole vocabulary in float64."""
    rank = dist.get_rank()
    case = make_case(dist.group.WORLD, name, rank=rank)
    logits_TV = torch.cat([make_case(None, rank=each).logits_TW.detach() for each in (0, 1)], dim=1).double()
    expected = true_loss(case, logits_TV.requires_grad_())
    expected.backward()
    loss = load_peer(peer)[0](case)
    loss.backward()
    assert logits_TV.grad is not None and case.logits_TW.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    expected_TW = logits_TV.grad[:, case.vocab_start : case.vocab_stop]
    torch.testing.assert_close(case.logits_TW.grad.double(), expected_TW, rtol=1e-5, atol=1e-6)


def naive_is_right_on_this_rank() -> None:
    for name in ("log_prob", "entropy", "gkd/fkl-truncated"):
        assert_right_on_this_rank(f"{ADAPTERS}.naive:autograd", name)


def composite_is_the_sum_of_its_terms_on_this_rank() -> None:
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    draw = torch.Generator().manual_seed(5)
    logits_TV = torch.randn(3, 2 * WIDTH, generator=draw)
    logq_TK, advantage_T, weight_T = torch.randn(3, 2, generator=draw) - 2.0, torch.randn(3, generator=draw), 0.1
    ids_TK, x_T = torch.tensor([[0, 7], [4, 3], [1, 2]]), torch.tensor([3, 4, 7])
    logits_TW = logits_TV.chunk(2, dim=1)[rank].clone().requires_grad_()
    inputs = CompositeInputs(
        logits_TW, group, x_T, ids_TK, logq_TK, advantage_T, torch.full((3,), weight_T), chunk_tokens=2
    )
    assert inputs.vocab_start == rank * WIDTH
    loss = composite(inputs)
    loss.backward()

    expected, exact_TV = torch.zeros((), dtype=torch.float64), logits_TV.double().requires_grad_()
    for row in range(3):
        logp_V = torch.log_softmax(exact_TV[row], dim=0)
        expected = expected - float(advantage_T[row]) * logp_V[x_T[row]] + weight_T * (logp_V.exp() * logp_V).sum()
        for vocabulary_id, logq in zip(ids_TK[row].tolist(), logq_TK[row].tolist(), strict=True):
            expected = expected + math.exp(logq) * (logq - logp_V[vocabulary_id])
    expected.backward()
    assert exact_TV.grad is not None and logits_TW.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits_TW.grad.double(), exact_TV.grad.chunk(2, dim=1)[rank], rtol=1e-5, atol=1e-6)


FAKE_SLIME = """
    import torch
    import torch.distributed as dist


    def calculate_log_probs_and_entropy(logits, tokens, tp_group, with_entropy=False):
        shards = [torch.empty_like(logits) for _ in range(tp_group.size())]
        dist.all_gather(shards, logits.detach(), group=tp_group)
        shards[tp_group.rank()] = logits
        log_probs = torch.cat(shards, dim=1).log_softmax(dim=1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=1) if with_entropy else None
        return log_probs.gather(1, tokens[:, None]), entropy
"""


def fake_project(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
    return root


def test_every_project_has_an_adapter_with_peers() -> None:
    assert all(peers_of(project) for project in PROJECTS)


@pytest.mark.parametrize(("project", "name"), ALL)
def test_an_adapter_without_a_checkout_names_project_commit_and_option(project: str, name: str) -> None:
    peer, coverage = load_peer(f"{ADAPTERS}.{project}:{name}")
    case = make_case(None, "gkd/fkl-full" if coverage.objective("gkd/fkl-full") else "log_prob")
    with pytest.raises(PeerMissing) as caught:
        peer(case)
    message = str(caught.value)
    assert message.startswith(f"{project}: expected the path of a checkout")
    assert "commit" in message
    assert "--peer MODULE:FUNCTION@PATH" in message
    assert f"--peer-root {project}=PATH" in message
    assert "\n" not in message


@pytest.mark.parametrize(("project", "name"), ALL)
def test_a_wrong_path_names_the_file_that_was_expected(project: str, name: str, tmp_path: Path) -> None:
    peer, coverage = load_peer(f"{ADAPTERS}.{project}:{name}@{tmp_path}")
    case = make_case(None, "gkd/fkl-full" if coverage.objective("gkd/fkl-full") else "log_prob")
    with pytest.raises(PeerMissing, match=rf"^{project}: no file {tmp_path}/\S+\.py; expected a checkout"):
        peer(case)


def test_a_path_for_a_peer_that_loads_none_is_refused() -> None:
    with pytest.raises(TropdError, match="without @PATH"):
        load_peer(f"{__name__}:without_checkout@/nowhere")


def without_checkout(case: PeerCase) -> Tensor:
    return case.weight_T.sum()


without_checkout.coverage = load_peer(f"{ADAPTERS}.naive:autograd")[1]  # type: ignore[attr-defined]


def test_a_fake_project_is_loaded_by_path_and_run_on_two_ranks(tmp_path: Path) -> None:
    root = fake_project(tmp_path, {"slime/utils/ppo_utils.py": FAKE_SLIME})
    run_on_ranks(assert_right_on_this_rank, 2, f"{ADAPTERS}.slime:log_prob@{root}", "log_prob")
    run_on_ranks(assert_right_on_this_rank, 2, f"{ADAPTERS}.slime:entropy@{root}", "entropy")


def test_the_naive_peer_equals_the_oracle_on_two_ranks() -> None:
    run_on_ranks(naive_is_right_on_this_rank, 2)


def test_a_composite_peer_is_the_sum_of_its_terms_on_two_ranks() -> None:
    run_on_ranks(composite_is_the_sum_of_its_terms_on_this_rank, 2)


def test_loading_a_peer_leaves_sys_modules_unchanged(tmp_path: Path) -> None:
    before_parent = ModuleType("fakeproject")
    root = fake_project(
        tmp_path,
        {
            "fakeproject/losses.py": """
                import fakeproject.config as config
                from fakeproject.heavy.base import Base, Batch
                from fakeproject.helpers import double

                class Loss(Base):
                    batch: Batch[int]

                def loss(x):
                    return double(x) + 1
            """,
            "fakeproject/helpers.py": "def double(x):\n    return 2 * x\n",
            "fakeproject/broken.py": "from fakeproject.heavy.base import Base\nraise ValueError('broken')\n",
        },
    )
    absent = ("fakeproject.config", "fakeproject.heavy.base")
    with in_sys_modules({"fakeproject": before_parent}):
        files = Checkout("fakeproject", root, "0" * 12)
        files.load("fakeproject.helpers")
        losses = files.load("fakeproject.losses", real=("fakeproject.helpers",), absent=absent)
        with pytest.raises(ValueError, match="broken"):
            files.load("fakeproject.broken", absent=absent)
        assert losses.loss(3) == 7
        assert sys.modules["fakeproject"] is before_parent
        assert [name for name in sys.modules if name.startswith("fakeproject.")] == []
    assert "fakeproject" not in sys.modules


def test_a_stand_in_for_a_missing_class_cannot_be_instantiated() -> None:
    stand_in = StandIn("fakeproject.heavy")
    assert issubclass(stand_in.Base[int], stand_in.Base)
    with pytest.raises(RuntimeError, match=r"fakeproject\.heavy\.Base is a stand-in"):
        stand_in.Base()


def test_an_unexpected_import_or_a_removed_name_raises_peer_missing(tmp_path: Path) -> None:
    root = fake_project(
        tmp_path, {"fakeproject/new.py": "import fakeproject.unforeseen\n", "fakeproject/old.py": "x = 1\n"}
    )
    files = Checkout("fakeproject", root, "0123456789ab")
    with pytest.raises(PeerMissing, match=r"cannot load .*fakeproject/new\.py: .*unforeseen.* commit 0123456789ab"):
        files.load("fakeproject.new")
    with pytest.raises(PeerMissing, match=r"expected renamed in .*fakeproject/old\.py, found none"):
        _ = files.load("fakeproject.old").renamed
