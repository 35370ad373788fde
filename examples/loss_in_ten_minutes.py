"""The loss in ten minutes: the gate, outliers, the gradient compared with autograd, and two ranks. Needs only torch.

    python examples/loss_in_ten_minutes.py

Read it from top to bottom, or open it in an editor that runs `# %%` cells. All numbers that it claims are checked while
it runs. The equations are in arXiv 2606.01249, and in this project's notation in docs/method.md.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from tropd_mcore import TeacherTopK, VocabParallel, distill_loss, objectives, trust_uniforms

# %% Six tokens
# The student p has sampled six tokens x from a vocabulary of 20. The teacher q gives the log-prob of each of them, and
# its 4 most likely tokens with their log-probs. Log-probs are natural logarithms.
T, V, K = 6, 20, 4


def six_tokens() -> tuple[Tensor, Tensor, TeacherTopK, Tensor]:
    """Return student logits [T, V], sampled ids [T], teacher log-probs and uniforms [T]; the same in every process."""
    random = torch.Generator().manual_seed(8)
    logits_TV = torch.randn(T, V, generator=random, dtype=torch.float64)
    ids_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=random)[:, 0]
    log_q_TV = (logits_TV + 1.5 * torch.randn(T, V, generator=random, dtype=torch.float64)).log_softmax(-1)
    top = log_q_TV.topk(K)
    teacher = TeacherTopK(log_q_TV.gather(1, ids_T[:, None])[:, 0], top.indices, top.values)
    return logits_TV, ids_T, teacher, trust_uniforms((T,), seed=1)


# %% The gate
def the_gate() -> None:
    """A token is trusted with probability min(1, q(x) / p(x)), so always if the teacher finds it at least as likely."""
    logits_TV, ids_T, teacher, u_T = six_tokens()
    out = distill_loss(
        logits_TV, ids_T, teacher, objectives.tropd(), vp=VocabParallel.single(V), trust_u_T=u_T
    )  # without a mask, all tokens count as sampled by the student
    logp_T = logits_TV.log_softmax(-1).gather(1, ids_T[:, None])[:, 0]
    assert teacher.logp_T is not None
    r_T = teacher.logp_T - logp_T
    print("   p(x)    q(x)  r = log q - log p  min(1, q/p)    u   trusted")
    for p, q, r, u, trusted in zip(logp_T.exp(), teacher.logp_T.exp(), r_T, u_T, out.columns["trusted"], strict=True):
        chance = min(1.0, float(r.exp()))
        print(f"  {p:.3f}   {q:.3f}       {r:+.2f}             {chance:.2f}       {u:.2f}     {int(trusted)}")
    assert torch.equal(out.columns["trusted"] > 0, u_T < r_T.exp())


# %% Outliers
# A trusted token gets a policy gradient with advantage r: tokens that the teacher finds more likely than the student
# become more likely. A token that is not trusted is called an outlier: the teacher would hardly have sampled it, so its
# r teaches little. There the student learns the teacher's distribution by a forward KL over the teacher's K tokens.
def by_hand(logits_TV: Tensor, ids_T: Tensor, teacher: TeacherTopK, u_T: Tensor) -> Tensor:
    """Return TrOPD's loss of each token [T], in eight lines of autograd over the whole vocabulary."""
    log_p_TV = logits_TV.log_softmax(-1)
    logp_T = log_p_TV.gather(1, ids_T[:, None])[:, 0]
    assert teacher.logp_T is not None and teacher.ids_TK is not None and teacher.logp_TK is not None
    r_T = (teacher.logp_T - logp_T).detach()
    trusted_T = u_T < r_T.exp()
    policy_gradient_T = -r_T * logp_T
    forward_kl_T = (teacher.logp_TK.exp() * (teacher.logp_TK - log_p_TV.gather(1, teacher.ids_TK))).sum(-1)
    return torch.where(trusted_T, policy_gradient_T, forward_kl_T)


def outliers() -> None:
    """Print the loss of each token, by `distill_loss` and by hand."""
    logits_TV, ids_T, teacher, u_T = six_tokens()
    out = distill_loss(
        logits_TV, ids_T, teacher, objectives.tropd(), vp=VocabParallel.single(V), trust_u_T=u_T, reduction="none"
    )
    hand_T = by_hand(logits_TV, ids_T, teacher, u_T)
    assert out.loss_T is not None
    for trusted, ours, hand in zip(out.columns["trusted"], out.loss_T, hand_T, strict=True):
        print(f"  {'policy gradient' if trusted else 'forward KL     '}  {ours:+.6f}  by hand {hand:+.6f}")
    torch.testing.assert_close(out.loss_T, hand_T)


# %% The gradient
# A loss with the right value can have a wrong gradient, so we compare gradients too. `distill_loss` computes its
# gradient explicitly; autograd computes that of `by_hand`.
def gradient_of_hand() -> Tensor:
    """Return the gradient of the mean over tokens, [T, V], by autograd."""
    logits_TV, ids_T, teacher, u_T = six_tokens()
    leaf_TV = logits_TV.requires_grad_()
    by_hand(leaf_TV, ids_T, teacher, u_T).mean().backward()
    assert leaf_TV.grad is not None
    return leaf_TV.grad


def the_gradient() -> None:
    """Print the largest difference between elements, divided by the largest element."""
    logits_TV, ids_T, teacher, u_T = six_tokens()
    leaf_TV = logits_TV.requires_grad_()
    out = distill_loss(leaf_TV, ids_T, teacher, objectives.tropd(), vp=VocabParallel.single(V), trust_u_T=u_T)
    (out.loss_sum / out.token_count).backward()  # the caller divides: it knows the other micro-batches and ranks
    expected_TV = gradient_of_hand()
    assert leaf_TV.grad is not None
    print(f"  relative error {float((leaf_TV.grad - expected_TV).abs().max() / expected_TV.abs().max()):.1e}")
    torch.testing.assert_close(leaf_TV.grad, expected_TV)


# %% Two ranks
# A large model splits its vocabulary over ranks, so no rank has a whole row of logits. Each rank passes its columns and
# gets the gradient of its columns. The loss is the same on all ranks. This needs one all-reduce in the forward pass.
def on_a_rank(rank: int, ranks: int, store: str) -> None:
    """Run one of the processes. Nothing is divided by the number of ranks."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    group = dist.group.WORLD
    assert group is not None
    logits_TV, ids_T, teacher, u_T = six_tokens()
    columns = slice(rank * V // ranks, (rank + 1) * V // ranks)
    leaf_TW = logits_TV[:, columns].clone().requires_grad_()
    out = distill_loss(leaf_TW, ids_T, teacher, objectives.tropd(), vp=VocabParallel(group, V), trust_u_T=u_T)
    (out.loss_sum / out.token_count).backward()
    assert leaf_TW.grad is not None
    torch.testing.assert_close(leaf_TW.grad, gradient_of_hand()[:, columns])
    print(
        f"  rank {rank}: columns {columns.start} to {columns.stop - 1}, sum {float(out.value):+.6f}, gradient as above"
    )
    dist.destroy_process_group()


def two_ranks() -> None:
    """Start two processes on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(on_a_rank, args=(2, f"{folder}/store"), nprocs=2)


# %% Where to go next
# docs/library.md: hidden states instead of logits, masks, teacher scores, other objectives.
# docs/integrations.md: the same call in Megatron-Core, Megatron-LM, slime, verl and NeMo-RL.
if __name__ == "__main__":
    for part in (the_gate, outliers, the_gradient, two_ranks):
        print(f"{part.__name__.replace('_', ' ')}:")
        part()
