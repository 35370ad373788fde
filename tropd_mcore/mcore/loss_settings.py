"""Settings that turn the output layer into log-probs. The loss, the scores and the metrics share them.

This module does not choose the objective. Invariant: all log-probs of one job come from one form, one backend and one
chunk size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tropd_mcore.config.derived import chunk_tokens, measures_overlap
from tropd_mcore.config.schema import Config
from tropd_mcore.errors import ConfigError
from tropd_mcore.kernel.backend import Kernel
from tropd_mcore.kernel.source import LogitSource, OutputLayer
from tropd_mcore.kernel.support_loss import WeightGradientMode
from tropd_mcore.library.arguments import VocabParallel
from tropd_mcore.mcore.model import Model


@dataclass(frozen=True)
class LossSettings:
    """The log-prob settings of the configuration section `loss`, and the related settings of other sections."""

    temperature: float
    """Temperature of the rollouts: the student's log p refers to the distribution that was sampled. A teacher uses 1.
    """
    form: Literal["fused", "logits"]
    """`fused`: the kernels compute logits chunk by chunk. `logits`: Megatron's own layer computes logits [T, W]."""
    backend: Literal["auto", "eager", "compile", "triton"]
    weight_gradient: WeightGradientMode
    chunk_tokens: int
    """Rows of one chunk."""
    overlap_chunks: bool
    logit_softcap: float | None
    topk_overlap: bool
    """Also find the student's top-k, for the overlap metric."""
    measure_force: bool = False
    """Also measure each token's distance to the teacher and the force of its loss."""
    divergence: str | None = None
    """fkl, rkl or jsd over the whole vocabulary; None if the objective has no such divergence."""
    divergence_beta: float = 0.5
    """Weight of the teacher in the mixture of the JSD."""

    @classmethod
    def from_config(cls, config: Config) -> LossSettings:
        """Return the settings that the configuration gives."""
        loss, objective = config.loss, config.objective
        whole = objective.full_vocabulary_divergence
        return cls(
            temperature=config.rollout.temperature,
            form=loss.form,
            backend=loss.backend,
            weight_gradient=loss.weight_gradient,
            chunk_tokens=chunk_tokens(config),
            overlap_chunks=loss.overlap_chunks,
            logit_softcap=loss.logit_softcap,
            topk_overlap=config.monitor.topk_overlap,
            measure_force=config.monitor.force,
            divergence=whole.name if whole is not None else None,
            divergence_beta=whole.beta if whole is not None else 0.5,
        )

    def at_step(self, config: Config, step: int) -> LossSettings:
        """Return these settings, without the overlap if it is not measured at `step` (monitor.topk_overlap_every)."""
        return self if measures_overlap(config, step) else replace(self, topk_overlap=False)

    def source(self, model: Model, layer: OutputLayer) -> LogitSource:
        """Return the output layer itself, or for the form `logits` the logits that `model` computes from it."""
        if self.form == "fused":
            return layer
        assert model.head is not None, "logits are made on the last stage"
        return model.head.given_logits(layer)

    def vocab_parallel(self, model: Model, *, temperature: float) -> VocabParallel:
        """Return the description of `model`'s sharded logits that the library takes."""
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
        """Return the same description for the functions of `kernel`."""
        vp = self.vocab_parallel(model, temperature=temperature)
        return vp.kernel(model.shard.width, model.platform.device, overlap=self.form == "fused")


def check_loss_settings(settings: LossSettings, model: Model) -> None:
    """Raise ConfigError if a gradient would be wrong or could not be computed."""
    problems = []
    scaled = model.config.grad_scale_func is not None or not model.config.calculate_per_token_loss
    if settings.weight_gradient == "folded" and scaled:
        problems.append(
            "loss.weight_gradient = folded needs an unscaled loss, found grad_scale_func or "
            "calculate_per_token_loss=False in Megatron's configuration; set loss.weight_gradient=deferred"
        )
    if settings.weight_gradient == "recompute" and settings.divergence is not None:
        problems.append(
            "loss.weight_gradient = recompute does not support a divergence over the whole vocabulary; set "
            "loss.weight_gradient=deferred or objective.full_vocabulary=false"
        )
    if problems:
        raise ConfigError(problems)
