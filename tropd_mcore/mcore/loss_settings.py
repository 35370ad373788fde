"""How log-probs are made from the output layer: one choice for the loss, for scores and for what is measured.

Not for the objective. Invariant: the log-probs of one job come from one form, one backend and one chunk size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.source import LogitSource, OutputLayer
from tropd_mcore.kernel.support_loss import WeightGradientMode
from tropd_mcore.library.arguments import VocabParallel
from tropd_mcore.mcore.model import Model


@dataclass(frozen=True)
class LossSettings:
    """The section `loss` of the configuration as far as it is about log-probs, and what goes with it."""

    temperature: float
    """Of the rollouts: the student's log p is the log-prob of the distribution that was sampled. A teacher's is 1."""
    form: Literal["fused", "logits"]
    """The output layer inside the kernels, chunk by chunk, or logits [T, W] by Megatron's own layer."""
    backend: Literal["auto", "eager", "compile", "triton"]
    weight_gradient: WeightGradientMode
    chunk_tokens: int
    """Rows of one chunk."""
    overlap_chunks: bool
    logit_softcap: float | None
    topk_overlap: bool
    """Also find the student's own top-k, for the overlap metric."""
    divergence: str | None = None
    """fkl, rkl or jsd over the whole vocabulary; None where the objective has none."""
    divergence_beta: float = 0.5
    """Weight of the teacher in the mixture of the jsd."""

    @classmethod
    def from_config(cls, config: Config) -> LossSettings:
        """Return what the configuration says."""
        loss, objective = config.loss, config.objective
        whole = objective.full_vocabulary_divergence
        return cls(
            temperature=config.rollout.temperature,
            form=loss.form,
            backend=loss.backend,
            weight_gradient=loss.weight_gradient,
            chunk_tokens=loss.chunk_tokens,
            overlap_chunks=loss.overlap_chunks,
            logit_softcap=loss.logit_softcap,
            topk_overlap=config.monitor.topk_overlap,
            divergence=whole.name if whole is not None else None,
            divergence_beta=whole.beta if whole is not None else 0.5,
        )

    def source(self, model: Model, layer: OutputLayer) -> LogitSource:
        """The output layer, or the logits that `model` makes of it."""
        if self.form == "fused":
            return layer
        assert model.head is not None, "logits are made on the last stage"
        return model.head.given_logits(layer)

    def vocab_parallel(self, model: Model, *, temperature: float) -> VocabParallel:
        """How the logits of `model` are read."""
        return VocabParallel(
            model.layout.groups.tp,
            model.shard.vocab_size,
            start=model.shard.start,
            temperature=temperature,
            logit_softcap=self.logit_softcap,
            backend=self.backend,
            chunk_tokens=self.chunk_tokens,
            overlap=self.overlap_chunks,
        )

    def kernel(self, model: Model, *, temperature: float) -> Kernel:
        """The same, for the functions of the kernel."""
        vp = self.vocab_parallel(model, temperature=temperature)
        return vp.kernel(model.shard.width, model.platform.device, overlap=self.form == "fused")


def check_loss_settings(settings: LossSettings, model: Model) -> None:
    """Raise ConfigError where a gradient would be wrong, or could not be made."""
    problems = []
    scaled = model.config.grad_scale_func is not None or not model.config.calculate_per_token_loss
    if settings.weight_gradient == "folded" and scaled:
        problems.append(
            "loss.weight_gradient = folded needs a loss that nobody scales, found grad_scale_func or "
            "calculate_per_token_loss=False in Megatron's configuration; set loss.weight_gradient=deferred"
        )
    if settings.weight_gradient == "recompute" and settings.divergence is not None:
        problems.append(
            "loss.weight_gradient = recompute has no divergence over the whole vocabulary; set "
            "loss.weight_gradient=deferred or objective.full_vocabulary=false"
        )
    if problems:
        raise ConfigError(problems)
